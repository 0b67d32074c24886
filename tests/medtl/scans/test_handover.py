from __future__ import annotations

import csv
import gc
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.fileset import FileSet

from medtl.config import ChecksConfig, ScansConfig
from medtl.errors import ConfigError, ScanError, StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans import io
from medtl.scans.handover import RECORD, Handover, hand_over
from medtl.scans.profile import Rules
from medtl.scans.sources import list_files

KEY = b"a key of these tests"
NAMES = Pseudonymiser(KEY)
SECRETS = (b"DOE^JANE", b"ID-1", b"Smith", b"SMITH")
Make = Callable[..., Dataset]
Series = Callable[..., list[Path]]


def give(source: Path, out: Path, key_table: Path | None = None, **config: Any) -> Handover:
    return hand_over(source, out, ScansConfig(**config), NAMES, key_table)


def outputs(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def codes(done: Handover) -> list[str]:
    return sorted(one.code for one in done.refused)


def assert_no_secret(out: Path) -> None:
    for name, data in outputs(out).items():
        data = gzip.decompress(data) if name.endswith(".gz") else data
        assert not [secret for secret in SECRETS if secret in data or secret in name.encode()], name


def named(folder: Path, series: Series, **attributes: Any) -> list[Path]:
    """A series whose file names give the patient away, too."""
    return [path.rename(path.with_name(f"Smith-{path.name}")) for path in series(folder, slices=4, **attributes)]


def nifti(path: Path, **size: Any) -> np.ndarray[Any, Any]:
    voxels = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    scan = nib.Nifti1Image(voxels, np.diag([1, 2, 3, 1]))
    scan.header["descrip"] = "Smith"
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Smith" * 40))
    nib.save(scan, path)
    return voxels


# --- sources ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_leaves_without_names(folder: Path, series: Series, tmp_path: Path) -> None:
    named(folder / "Smith" / "study", series)
    nifti(folder / "Smith.nii")
    nifti(folder / "Smith.nii.gz")
    (folder / "Smith.txt").write_text("Smith")
    (folder / "Smith.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "empty").touch()
    (folder / "link").symlink_to(folder / "Smith.nii")
    done = give(folder, tmp_path / "out")
    assert (done.files, done.written) == (10, 6)
    assert codes(done) == ["empty_file", "not_a_file", "not_an_image", "not_an_image"]
    shape = r"p-[0-9a-f]{16}/f-[0-9a-f]{16}\.dcm|f-[0-9a-f]{16}\.nii(\.gz)?|refused\.csv|handover\.json"
    assert all(re.fullmatch(shape, name) for name in outputs(tmp_path / "out"))
    assert_no_secret(tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "refused.csv").read_text().splitlines()))
    assert sorted(row["code"] for row in rows) == codes(done)


def test_pixels_arrive_as_they_were(folder: Path, series: Series, tmp_path: Path) -> None:
    paths = series(folder)
    give(folder, tmp_path / "out", workers=3)
    for path in paths:
        own = NAMES.file(path.name)
        (written,) = (tmp_path / "out").rglob(f"{own}.dcm")
        np.testing.assert_array_equal(dcmread(written).pixel_array, dcmread(path).pixel_array)
        assert written.parent.name == dcmread(written).PatientID


def test_what_a_file_becomes_does_not_depend_on_the_files_before_it(
    folder: Path, series: Series, tmp_path: Path
) -> None:
    for number in range(3):
        series(folder / str(number), slices=3, PatientID=f"ID-1{number}", StudyDate=f"2024010{number + 1}")
    give(folder, tmp_path / "all", workers=1)
    together = {name: data for name, data in outputs(tmp_path / "all").items() if name.endswith(".dcm")}
    for path in folder.rglob("*.dcm"):
        fresh = Pseudonymiser(KEY)
        file = next(f for f in list_files(folder, ScansConfig()) if f.path == path)
        alone = io.deidentify_file(file, tmp_path / "alone", fresh, Rules(), ScansConfig())
        assert alone is not None
        assert (tmp_path / "alone" / alone.output).read_bytes() == together.pop(alone.output)
    assert not together


@pytest.mark.parametrize("whole", [True, False], ids=["the source is the archive", "an archive inside the source"])
def test_members_of_an_archive_are_handed_over(folder: Path, series: Series, tmp_path: Path, whole: bool) -> None:
    paths = named(tmp_path / "scans", series)
    nifti(tmp_path / "Smith.nii.gz")
    with zipfile.ZipFile(folder / "Smith.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [*paths, tmp_path / "Smith.nii.gz"]:
            archive.write(path, f"Smith/{path.name}")
        archive.writestr("../Smith.dcm", paths[0].read_bytes())
        archive.writestr("Smith/inner.zip", b"PK\x03\x04 and more")
    done = give(folder / "Smith.zip" if whole else folder, tmp_path / "out")
    assert (done.written, codes(done)) == (5, ["archive_nested", "archive_path"])
    assert_no_secret(tmp_path / "out")
    assert not list(tmp_path.glob("*.dcm"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_members_of_one_name_are_refused(folder: Path, series: Series, tmp_path: Path) -> None:
    (first, second, *_) = series(tmp_path / "scans")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("x.dcm", first.read_bytes())
        archive.writestr("x.dcm", second.read_bytes())
    assert codes(give(folder, tmp_path / "out")) == ["archive_damaged", "changed"]


def test_a_damaged_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "a.zip").write_bytes(b"PK\x03\x04 and nothing")
    assert codes(give(folder, tmp_path / "out")) == ["archive_damaged"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a temporary folder of pydicom's own
def test_the_files_of_a_dicomdir_are_handed_over(series: Series, tmp_path: Path) -> None:
    medium = FileSet()
    for path in series(tmp_path / "scans", slices=3, StudyDate="20240101", StudyTime="10", SeriesNumber=1):
        dataset = dcmread(path)
        dataset.StudyID = "1"
        medium.add(dataset)
    medium.write(tmp_path / "medium")
    del medium
    gc.collect()
    done = give(tmp_path / "medium" / "DICOMDIR", tmp_path / "out")
    assert (done.files, done.written) == (3, 3)
    done = give(tmp_path / "medium", tmp_path / "all")
    assert (done.written, codes(done)) == (3, ["dicomdir"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_is_refused_without_its_name(folder: Path, series: Series, tmp_path: Path) -> None:
    named(folder, series)[0].chmod(0)
    assert codes(give(folder, tmp_path / "out")) == ["unreadable"]
    assert_no_secret(tmp_path / "out")


def test_a_file_that_is_gone_or_was_exchanged_is_refused(folder: Path, series: Series, tmp_path: Path) -> None:
    series(folder, slices=4)
    gone, grown, *_ = list_files(folder, ScansConfig())
    gone.path.unlink()
    with grown.path.open("ab") as stream:
        stream.write(b"\0\0")
    found = []
    for file in (gone, grown):
        with pytest.raises(ScanError) as caught:
            io.deidentify_file(file, tmp_path / "out", NAMES, Rules(), ScansConfig())
        found.append(caught.value.code)
    assert found == ["unreadable", "changed"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


# --- burned-in text ---------------------------------------------------------------------------------------------------

US, CAPTURE = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.7"


@pytest.mark.parametrize(
    "attributes",
    [
        {"BurnedInAnnotation": "YES"},
        {"SOPClassUID": US, "Modality": "US"},
        {"SOPClassUID": CAPTURE},
        {"Modality": "XA"},
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"], "BurnedInAnnotation": "YES"},
    ],
    ids=lambda attributes: " ".join(attributes),
)
def test_pictures_that_may_have_text_in_them_stay_unless_the_policy_accepts_them(
    folder: Path, dicom: Make, ramp: np.ndarray[Any, Any], tmp_path: Path, attributes: dict[str, Any]
) -> None:
    dicom(ramp, **attributes).save_as(folder / "a.dcm", enforce_file_format=True)
    dicom(ramp, **attributes | {"BurnedInAnnotation": "NO"}).save_as(folder / "b.dcm", enforce_file_format=True)
    done = give(folder, tmp_path / "out")
    assert (done.written, codes(done)) == (1, ["burned_in"])
    assert NAMES.file("b.dcm") in " ".join(outputs(tmp_path / "out"))
    accepting = ScansConfig(checks=ChecksConfig(policy={"burned_in": "accept"}))
    assert hand_over(folder, tmp_path / "accepted", accepting, NAMES).written == 2


def test_a_report_without_pixels_has_no_text_burned_in(
    folder: Path, dicom: Make, ramp: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    report = dicom(ramp, Modality="OT")
    del report.PixelData
    report.save_as(folder / "a.dcm", enforce_file_format=True)
    assert give(folder, tmp_path / "out").written == 1


# --- NIfTI ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["nii", "nii.gz"])
def test_the_voxels_of_a_nifti_stay_and_its_texts_go(folder: Path, tmp_path: Path, end: str) -> None:
    voxels = nifti(folder / f"Smith.{end}")
    give(folder, tmp_path / "out")
    written = tmp_path / "out" / f"{NAMES.file(f'Smith.{end}')}.{end}"
    np.testing.assert_array_equal(np.asarray(nib.load(written).dataobj), voxels)
    assert_no_secret(tmp_path / "out")
    assert b"Smith" not in written.read_bytes()  # nor in the head of the gzip stream


@pytest.mark.parametrize("end", ["nii", "nii.gz"])
def test_bytes_behind_the_voxels_never_leave(folder: Path, tmp_path: Path, end: str) -> None:
    nifti(tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes() + b"Smith"
    (folder / f"a.{end}").write_bytes(data if end == "nii" else gzip.compress(data))
    assert codes(give(folder, tmp_path / "out")) == ["extra_bytes"]
    accepting = ScansConfig(checks=ChecksConfig(policy={"extra_bytes": "accept"}))
    assert hand_over(folder, tmp_path / "accepted", accepting, NAMES).written == 1
    assert_no_secret(tmp_path / "accepted")


def test_a_nifti_header_without_its_voxels_is_refused(folder: Path, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(np.zeros((2, 2, 2), np.int16), np.eye(4)), folder / "Smith.hdr")
    assert codes(give(folder, tmp_path / "out")) == ["detached_header", "not_an_image"]


@pytest.mark.parametrize(
    ("code", "damage"),
    [
        ("truncated", lambda data: gzip.compress(data[:-1])),
        ("truncated", lambda data: gzip.compress(data)[:-9]),
        ("archive_damaged", lambda data: gzip.compress(data) + b"more"),
        ("not_an_image", lambda data: gzip.compress(b"Smith" * 200)),
        ("bad_size", lambda data: gzip.compress(data[:40] + b"\x09" + data[41:])),
        ("too_large", lambda data: gzip.compress(data[:42] + b"\xff\x7f" * 4 + data[50:])),
    ],
)
def test_a_damaged_packed_nifti_is_refused(
    folder: Path, tmp_path: Path, code: str, damage: Callable[[bytes], bytes]
) -> None:
    nifti(tmp_path / "a.nii")
    (folder / "a.nii.gz").write_bytes(damage((tmp_path / "a.nii").read_bytes()))
    assert codes(give(folder, tmp_path / "out")) == [code]
    assert set(outputs(tmp_path / "out")) == {"refused.csv", RECORD}


@pytest.mark.parametrize("end", ["nii", "nii.gz"])
def test_a_large_nifti_is_never_in_memory_as_a_whole(folder: Path, tmp_path: Path, end: str) -> None:
    head = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).header
    head.set_data_shape((1000, 1000, 300))
    with gzip.open(folder / "a.nii.gz", "wb", 1) if end == "nii.gz" else (folder / "a.nii").open("wb") as stream:
        stream.write(head.binaryblock + b"\0" * 4)
        for _ in range(300):
            stream.write(bytes(2_000_000))
    program = (
        "import resource, sys; from pathlib import Path; from medtl.config import ScansConfig;"
        "from medtl.pseudonyms import Pseudonymiser; from medtl.scans.handover import hand_over;"
        "import medtl.scans.nifti, imagecodecs;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        f"done = hand_over(Path({str(folder)!r}), Path({str(tmp_path / 'out')!r}), ScansConfig(),"
        f" Pseudonymiser({KEY!r})); assert done.written == 1;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(told.stdout) < 300_000  # KiB, of a file of 600 MB


# --- again and again --------------------------------------------------------------------------------------------------


def test_a_second_call_writes_the_same_bytes(folder: Path, series: Series, tmp_path: Path) -> None:
    series(folder)
    first = give(folder, tmp_path / "out")
    before = outputs(tmp_path / "out")
    second = give(folder, tmp_path / "out")
    assert first == second
    assert outputs(tmp_path / "out") == before
    record = json.loads(before[RECORD])
    assert (record["finished"], record["written"], record["refused"]) == (True, 12, {})


def test_what_is_refused_or_gone_by_now_is_removed(folder: Path, series: Series, tmp_path: Path) -> None:
    first, second, *_ = series(folder / "a", slices=4)
    series(folder / "b", slices=2, PatientID="ID-2")
    give(folder, tmp_path / "out")
    damaged = first.read_bytes()[:-7]
    first.write_bytes(damaged)
    second.unlink()
    for path in (folder / "b").iterdir():
        path.unlink()
    done = give(folder, tmp_path / "out")
    assert (done.files, done.written, done.removed, codes(done)) == (3, 2, 4, ["truncated"])
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 2
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) == 1


def test_a_folder_that_holds_something_else_is_not_given_away(folder: Path, series: Series, tmp_path: Path) -> None:
    series(folder, slices=4)
    series(tmp_path / "other", slices=4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("Smith")
    with pytest.raises(ConfigError, match="other files"):
        give(folder, tmp_path / "out")
    give(folder, tmp_path / "mine")
    with pytest.raises(ConfigError, match="another source"):
        give(tmp_path / "other", tmp_path / "mine")
    with pytest.raises(ConfigError, match="another key"):
        hand_over(folder, tmp_path / "mine", ScansConfig(), Pseudonymiser(b"another key for these"))
    assert len(list((tmp_path / "mine").rglob("*.dcm"))) == 4


def test_two_runs_do_not_write_to_one_folder(folder: Path, series: Series, tmp_path: Path) -> None:
    series(folder, slices=4)
    (tmp_path / "out").mkdir()
    with io.alone_in(tmp_path / "out"), pytest.raises(StorageError, match="Another run"):
        give(folder, tmp_path / "out")
    assert give(folder, tmp_path / "out").written == 4


@pytest.mark.parametrize("wait", [0.0, 0.03, 0.1])
def test_a_killed_run_leaves_no_half_file_and_is_made_again(
    folder: Path, series: Series, tmp_path: Path, wait: float
) -> None:
    for number in range(8):
        series(folder / str(number), slices=40)
    give(folder, tmp_path / "whole")
    out = tmp_path / "out"
    program = (
        "from pathlib import Path; from medtl.config import ScansConfig; from medtl.pseudonyms import Pseudonymiser;"
        "from medtl.scans.handover import hand_over;"
        f"hand_over(Path({str(folder)!r}), Path({str(out)!r}), ScansConfig(), Pseudonymiser({KEY!r}))"
    )
    run = subprocess.Popen([sys.executable, "-c", program])
    while not (out / RECORD).exists():
        time.sleep(0.002)
    time.sleep(wait)
    run.send_signal(signal.SIGKILL)
    run.wait()
    whole = outputs(tmp_path / "whole")
    left = {name: data for name, data in outputs(out).items() if name.endswith(".dcm")}
    assert all(whole[name] == data for name, data in left.items())
    (out / ".f-0123456789abcdef.nii.tmp").write_bytes(b"half")
    assert give(folder, out).written == 320
    assert outputs(out) == whole


def test_a_full_disk_stops_the_run_and_leaves_no_half_file(folder: Path, series: Series, tmp_path: Path) -> None:
    series(folder, slices=4)
    program = (
        "import resource, signal; from pathlib import Path; from medtl.config import ScansConfig;"
        "from medtl.errors import StorageError; from medtl.pseudonyms import Pseudonymiser;"
        "from medtl.scans.handover import hand_over; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        f"try: hand_over(Path({str(folder)!r}), Path({str(tmp_path / 'out')!r}), ScansConfig(), Pseudonymiser({KEY!r}))"
        "\nexcept StorageError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "disk is full" in told.stdout
    assert set(outputs(tmp_path / "out")) == {RECORD}
    assert not json.loads((tmp_path / "out" / RECORD).read_text())["finished"]


# --- the key table ----------------------------------------------------------------------------------------------------


def test_key_tables_of_two_runs_say_the_same_and_none_is_written_over(
    folder: Path, series: Series, tmp_path: Path
) -> None:
    series(folder, slices=4, IssuerOfPatientID="HOSPITAL")
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    give(folder, tmp_path / "out", one)
    with pytest.raises(StorageError, match="exists"):
        give(folder, tmp_path / "out", one)
    give(folder, tmp_path / "out", two)
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_mode & 0o077 == 0
    rows = list(csv.DictReader(one.read_text().splitlines()))
    headers = [dcmread(path) for path in folder.iterdir()]
    uids = {str(h[tag].value) for h in headers for tag in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")}
    assert uids <= {row["raw"] for row in rows if row["kind"] == "uid"}
    (patient,) = (row for row in rows if row["kind"] == "patient")
    assert patient["raw"].startswith("ID-1")
    assert (tmp_path / "out" / patient["pseudonym"]).is_dir()


@pytest.mark.parametrize("where", ["inside the output", "output inside the source", "source inside the output"])
def test_places_that_would_give_the_key_or_the_source_away(
    folder: Path, series: Series, tmp_path: Path, where: str
) -> None:
    series(folder, slices=4)
    out, key = tmp_path / "out", None
    if where == "inside the output":
        key = out / "key.csv"
    else:
        out = folder / "out" if where == "output inside the source" else tmp_path
    with pytest.raises(ConfigError):
        give(folder, out, key)
    assert not list(tmp_path.rglob(RECORD))


def test_a_source_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        give(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="holds no files"):
        give(tmp_path / "empty", tmp_path / "out")
