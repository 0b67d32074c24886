"""What a source holds is listed without following, unpacking or believing anything."""

from __future__ import annotations

import gc
import io
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, FileMetaDataset
from pydicom.fileset import FileSet
from pydicom.uid import ExplicitVRLittleEndian

from medtl.config import ScansConfig
from medtl.errors import ScanError, StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.sources import SourceFile, SourceIndex, opened, read_bytes, survey

ROOT = Path(__file__).parents[3]
NAMES = Pseudonymiser(b"0123456789abcdef")
QUIET = ScansConfig(stable_seconds=0)


def codes(files: tuple[SourceFile, ...]) -> dict[str, str | None]:
    return {file.relative: file.refusal.code if file.refusal else None for file in files}


def pack(path: Path, members: dict[str, bytes], links: tuple[str, ...] = ()) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        for name in links:
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")


def test_the_files_of_an_archive_are_files_of_the_source(folder: Path) -> None:
    pack(folder / "a.zip", {"x/one.dcm": b"one", "two": b"two"})
    files = survey(folder, QUIET)
    assert codes(files) == {"a.zip/x/one.dcm": None, "a.zip/two": None}
    assert [read_bytes(file) for file in files] == [b"one", b"two"]


def test_an_archive_is_a_source_by_itself(folder: Path) -> None:
    pack(folder / "a.zip", {"one.dcm": b"one"})
    assert codes(survey(folder / "a.zip", QUIET)) == {"a.zip/one.dcm": None}


def test_names_that_lead_out_of_an_archive_are_refused(folder: Path) -> None:
    pack(folder / "a.zip", {"../x": b"1", "/etc/x": b"1", "a/../../x": b"1", "C:/x": b"1", "ok": b"1"}, links=("link",))
    found = {name.removeprefix("a.zip/"): code for name, code in codes(survey(folder, QUIET)).items()}
    assert found.pop("ok") is None
    assert found.pop("link") == "archive_link"
    assert set(found.values()) == {"archive_path"}
    assert {p.name for p in folder.parent.iterdir()} == {"in"}


def test_an_archive_that_grows_without_bound_is_refused(folder: Path) -> None:
    pack(folder / "ratio.zip", {"x": bytes(50_000_000)})
    pack(folder / "many.zip", {f"{n}": b"x" for n in range(60)})
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("x", b"x")
    pack(folder / "nested.zip", {"inner.zip": inner.getvalue()})
    found = codes(survey(folder, ScansConfig(stable_seconds=0, max_archive_files=50)))
    assert found["ratio.zip"] == found["many.zip"] == "archive_bomb"
    assert found["nested.zip/inner.zip"] == "archive_nested"


def test_an_archive_that_lies_about_a_size_is_refused(folder: Path) -> None:
    pack(folder / "a.zip", {"x": bytes(5000)})
    data = (folder / "a.zip").read_bytes()
    (folder / "a.zip").write_bytes(data.replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    (file,) = survey(folder, QUIET)
    assert file.refusal is not None
    assert file.refusal.code in ("archive_bomb", "archive_damaged")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_data_of_any_method_cost_their_member_alone(folder: Path, method: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.dcm", os.urandom(2000))
        archive.writestr("b.dcm", os.urandom(2000))
    data = bytearray(buffer.getvalue())
    at = data.index(b"a.dcm") + 5
    data[at + 20 : at + 60] = bytes(40)
    (folder / "x.zip").write_bytes(data)
    assert codes(survey(folder, QUIET)) == {"x.zip/a.dcm": "archive_damaged", "x.zip/b.dcm": None}


def test_a_member_without_a_name_is_refused(folder: Path) -> None:
    pack(folder / "x.zip", {".": b"odd", "sound.dcm": b"sound"})
    assert codes(survey(folder, QUIET)) == {"x.zip/.": "archive_path", "x.zip/sound.dcm": None}


def test_a_name_in_no_encoding_costs_the_archive_alone(folder: Path) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("\u00e4\u00e4.dcm", b"odd")
    data = (folder / "x.zip").read_bytes().replace("\u00e4\u00e4".encode(), b"\xff\xfe\xff\xfe")
    (folder / "x.zip").write_bytes(data)
    (folder / "y.dcm").write_bytes(b"sound")
    assert codes(survey(folder, QUIET)) == {"x.zip": "archive_damaged", "y.dcm": None}


def test_a_damaged_archive_costs_itself_alone(folder: Path) -> None:
    pack(folder / "a.zip", {"x": b"x" * 1000})
    (folder / "a.zip").write_bytes((folder / "a.zip").read_bytes()[:60])
    (folder / "b.png").write_bytes(b"\x89PNG")
    assert codes(survey(folder, QUIET)) == {"a.zip": "archive_damaged", "b.png": None}


def test_links_pipes_and_devices_are_not_opened(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe")
    assert codes(survey(folder, QUIET)) == {"link": "not_a_file", "pipe": "not_a_file"}
    # put there after it was listed
    with pytest.raises(ScanError, match="cannot be read"), opened(SourceFile(folder / "link", "link", 6, None)):
        pass
    with pytest.raises(ScanError, match="device or a pipe"), opened(SourceFile(folder / "pipe", "pipe", 6, None)):
        pass


def test_a_file_that_changes_after_it_was_surveyed_is_not_taken(folder: Path) -> None:
    (folder / "x").write_bytes(b"one")
    (file,) = survey(folder, QUIET)
    (folder / "x").write_bytes(b"two")
    with pytest.raises(ScanError, match="changed while it was being read"):
        read_bytes(file)


def test_a_file_still_being_written_waits_for_the_next_time(folder: Path) -> None:
    (folder / "done").write_bytes(b"done")
    going = True

    def write() -> None:
        with (folder / "growing").open("wb", buffering=0) as stream:
            while going:
                stream.write(b"x" * 100)
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.1)
    found = codes(survey(folder, ScansConfig(stable_seconds=0.5)))
    going = False
    writer.join()
    assert found == {"done": None, "growing": "unstable"}
    assert codes(survey(folder, ScansConfig(stable_seconds=0.5))) == {"done": None, "growing": None}


def test_what_has_not_changed_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    pack(folder / "a.zip", {"x": b"x" * 100})
    (folder / "DOE_JANE").write_bytes(b"bytes")
    for path in folder.iterdir():
        os.utime(path, (time.time() - 100, time.time() - 100))
    time.sleep(2.1)  # the change time cannot be set back
    first = survey(folder, QUIET, index=SourceIndex(tmp_path / "index", NAMES))
    text = (tmp_path / "index" / "source-index.json").read_text()
    assert "DOE" not in text
    # a wrong digest in the index shows that the file is not read; a changed file is
    forged = text.replace(str(first[0].sha256), "0" * 64)
    assert forged != text
    (tmp_path / "index" / "source-index.json").write_text(forged)
    assert survey(folder, QUIET, index=SourceIndex(tmp_path / "index", NAMES))[0].sha256 == "0" * 64
    (folder / "DOE_JANE").write_bytes(b"other")
    assert survey(folder, QUIET, index=SourceIndex(tmp_path / "index", NAMES))[0].sha256 not in ("0" * 64, None)


def test_a_damaged_index_costs_time_only(folder: Path, tmp_path: Path, caplog: Any) -> None:
    (folder / "x").write_bytes(b"x")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "source-index.json").write_text('{"format": 1, "files": {"a": [1]}}')
    assert codes(survey(folder, QUIET, index=SourceIndex(tmp_path / "index", NAMES))) == {"x": None}


@pytest.fixture
def disc(tmp_path: Path) -> Path:
    """Write a DICOMDIR with two images."""
    files = FileSet()
    for number in (1, 2):
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = f"1.2.{number}"
        header.StudyInstanceUID, header.SeriesInstanceUID, header.PatientID = "1.3", "1.4", "P"
        header.PatientName, header.StudyDate, header.StudyTime, header.StudyID = "A^B", "20200101", "101010", "1"
        header.AccessionNumber, header.Modality, header.SeriesNumber, header.InstanceNumber = "", "CR", 1, number
        header.Rows = header.Columns = 2
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 8
        header.HighBit, header.PixelRepresentation = 7, 0
        header.PixelData = np.arange(4, dtype=np.uint8).tobytes()
        files.add(header)
    files.write(tmp_path / "disc")
    with warnings.catch_warnings():  # pydicom leaves its temporary folder to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        del files
        gc.collect()
    return tmp_path / "disc"


def test_a_dicomdir_as_source_gives_the_files_it_lists(disc: Path) -> None:
    (disc / "not-listed").write_bytes(b"x")
    files = survey(disc / "DICOMDIR", QUIET)
    assert list(codes(files).values()) == [None, None]
    listed = [file.path for file in files]
    listed[0].unlink()
    assert sorted(map(str, codes(survey(disc / "DICOMDIR", QUIET)).values())) == ["None", "missing_file"]


def test_a_dicomdir_among_other_files_is_named_as_what_it_is(disc: Path) -> None:
    assert codes(survey(disc, QUIET))["DICOMDIR"] == "dicomdir"


def test_a_dicomdir_that_leads_out_of_its_folder_is_refused(disc: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    data = (disc / "DICOMDIR").read_bytes()
    start = data.index(b"\x04\x00\x00\x15CS") + 8
    length = int.from_bytes(data[start - 2 : start], "little")
    leads_out = b"..\\outside".ljust(length)
    assert len(leads_out) == length
    (disc / "DICOMDIR").write_bytes(data[:start] + leads_out + data[start + length :])
    assert "archive_path" in codes(survey(disc / "DICOMDIR", QUIET)).values()


def test_a_broken_dicomdir_says_what_to_try(disc: Path) -> None:
    data = (disc / "DICOMDIR").read_bytes()
    (disc / "DICOMDIR").write_bytes(data[:400])
    with pytest.raises(StorageError, match=r"holds no files|cannot be read"):
        survey(disc / "DICOMDIR", QUIET)


LOCKED = """
import os, sys
from pathlib import Path
from medtl.config import ScansConfig
from medtl.scans.sources import survey
if os.getuid() == 0:
    os.setuid(65534)  # root may read everything
for file in survey(Path(sys.argv[1]), ScansConfig(stable_seconds=0)):
    print(file.relative, file.refusal.code if file.refusal else None)
"""


def test_a_folder_that_may_not_be_read_is_counted() -> None:
    with tempfile.TemporaryDirectory() as name:  # outside tmp_path, whose parents nobody may enter
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "locked").mkdir()
        (folder / "locked" / "x").write_bytes(b"x")
        (folder / "y").write_bytes(b"y")
        (folder / "locked").chmod(0)
        try:
            command = [sys.executable, "-c", LOCKED, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        finally:
            (folder / "locked").chmod(0o700)
    assert sorted(done.stdout.splitlines()) == ["locked unreadable", "y None"]
