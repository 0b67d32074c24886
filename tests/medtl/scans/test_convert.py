"""A folder becomes NIfTI files without a workspace, whatever it is packed in."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from pydicom import dcmread

from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.convert import convert

NAMES = Pseudonymiser(b"0123456789abcdef")
CONFIG = ScansConfig(stable_seconds=0)


def test_an_archive_in_the_folder_or_instead_of_it_is_opened(folder: Path, series: Any, tmp_path: Path) -> None:
    paths = series(tmp_path / "ct")
    with zipfile.ZipFile(folder / "ct.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.name)
        archive.writestr("../outside", b"x")
    for source in (folder, folder / "ct.zip"):
        done = convert(source, tmp_path / "out", CONFIG, NAMES)
        (volume,) = done.volumes
        assert ([one.code for one in done.refused], done.files, volume.files) == (["archive_path"], 13, 12)
        image = nibabel.load(tmp_path / "out" / volume.output)
        assert isinstance(image, nibabel.Nifti1Image)
        stored = image.dataobj.get_unscaled()
        assert all(np.array_equal(stored[:, :, n].T, dcmread(path).pixel_array) for n, path in enumerate(paths))


def test_no_name_and_no_number_of_a_patient_is_in_the_outputs(folder: Path, series: Any, tmp_path: Path) -> None:
    paths = series(folder / "DOE^JANE")
    series(folder / "JANE-2")[3].unlink()
    convert(folder, tmp_path / "out", CONFIG, NAMES, gzip=False)
    written = list((tmp_path / "out").iterdir())
    assert len(written) == 2  # one volume, one table of refusals
    everything = b"".join(path.read_bytes() + path.name.encode() for path in written)
    uid = str(dcmread(paths[0]).SeriesInstanceUID).encode()
    assert not any(raw in everything for raw in (b"JANE", b"DOE", b"ID-1", uid))


def test_a_copy_of_a_folder_beside_it_changes_nothing(folder: Path, series: Any, tmp_path: Path) -> None:
    series(folder / "ct")
    shutil.copytree(folder / "ct", folder / "backup")
    done = convert(folder, tmp_path / "out", CONFIG, NAMES)
    assert [volume.files for volume in done.volumes] == [12]
    assert {(one.code, one.action) for one in done.refused} == {("duplicate_file", "reject")}
    assert len(done.refused) == 12


def test_a_series_that_is_refused_now_leaves_no_volume_of_before(folder: Path, series: Any, tmp_path: Path) -> None:
    paths = series(folder / "ct")
    series(folder / "other")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.nii").write_bytes(b"somebody's")
    assert len(convert(folder, tmp_path / "out", CONFIG, NAMES).volumes) == 2
    paths[5].unlink()
    (left,) = convert(folder, tmp_path / "out", CONFIG, NAMES).volumes
    assert {path.name for path in (tmp_path / "out").iterdir()} == {left.output, "refused.csv", "mine.nii"}
