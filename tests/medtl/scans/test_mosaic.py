"""A mosaic is cut into its slices where its header tells how, and refused where it does not."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import MRImageStorage

from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.convert import convert
from medtl.scans.mosaic import read_csa

NAMES = Pseudonymiser(b"0123456789abcdef")
COUNT, ROWS, COLUMNS = 6, 16, 20


def csa(**fields: list[str]) -> bytes:
    """Write a CSA header, version 2."""
    out = b"SV10\4\3\2\1" + struct.pack("<II", len(fields), 77)
    for name, values in fields.items():
        out += struct.pack("<64si4siii", name.encode(), len(values), b"FD\0\0", 4, len(values), 77)
        for value in values:
            text = value.encode() + b"\0"
            out += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + bytes(-len(text) % 4)
    return out


WHOLE = {"NumberOfImagesInMosaic": ["6"], "SliceNormalVector": ["0.0", "0.0", "1.0"], "ProtocolSliceNumber": ["0"]}


def mosaic(dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any], **fields: list[str]) -> Dataset:
    image = np.zeros((3 * ROWS, 3 * COLUMNS), np.uint16)
    for number, one in enumerate(slices):
        top, left = number // 3 * ROWS, number % 3 * COLUMNS
        image[top : top + ROWS, left : left + COLUMNS] = one
    header = dicom(image, SOPClassUID=MRImageStorage, Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    header.file_meta.MediaStorageSOPClassUID = MRImageStorage
    header.ImagePositionPatient, header.ImageOrientationPatient = [-60, -48, 10], [1, 0, 0, 0, 1, 0]
    header.PixelSpacing, header.SliceThickness, header.SpacingBetweenSlices = [2, 2], 3, 4
    header.FrameOfReferenceUID = "1.2.3"
    if fields:
        header.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", csa(**fields))
    return header


@pytest.fixture
def slices() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(1, 4000, (COUNT, ROWS, COLUMNS)).astype(np.uint16)


def taken(folder: Path, header: Dataset, out: Path) -> Any:
    folder.mkdir(exist_ok=True)
    header.save_as(folder / "x.dcm", enforce_file_format=True)
    return convert(folder, out, ScansConfig(stable_seconds=0), NAMES)


def test_the_tiles_become_slices_that_lie_where_they_were_measured(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any]
) -> None:
    import nibabel

    done = taken(tmp_path / "in", mosaic(dicom, slices, **WHOLE), tmp_path / "out")
    (volume,) = done.volumes
    image = nibabel.load(tmp_path / "out" / volume.output)
    assert isinstance(image, nibabel.Nifti1Image)
    assert np.array_equal(np.asarray(image.dataobj).T, slices)
    # the mosaic is 60 columns wide, a slice 20: its corner lies 20 columns of 2 mm further in
    assert np.allclose(image.affine @ [0, 0, 0, 1], [60 - 40, 48 - 32, 10, 1])
    assert np.allclose(image.affine @ [19, 15, 5, 1], [20 - 38, 16 - 30, 10 + 20, 1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**WHOLE, "NumberOfImagesInMosaic": ["5"]},
        {**WHOLE, "NumberOfImagesInMosaic": ["7"]},
        {**WHOLE, "NumberOfImagesInMosaic": ["0"]},
        {**WHOLE, "SliceNormalVector": ["0.0", "1.0", "0.0"]},
        {**WHOLE, "SliceNormalVector": ["0.0", "0.0"]},
        {**WHOLE, "ProtocolSliceNumber": ["4"]},
    ],
    ids=["no CSA", "too few", "too many", "none", "another way", "no way", "another order"],
)
def test_a_mosaic_that_is_not_told_completely_is_refused(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any], fields: dict[str, list[str]]
) -> None:
    done = taken(tmp_path / "in", mosaic(dicom, slices, **fields), tmp_path / "out")
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["mosaic"])


def test_a_damaged_csa_header_gives_nothing() -> None:
    whole = csa(**WHOLE)
    assert read_csa(whole) == WHOLE
    rng = np.random.default_rng(0)
    for _ in range(500):
        broken = bytearray(whole[: int(rng.integers(0, len(whole)))])
        for place in rng.integers(0, max(len(broken), 1), 4):
            if broken:
                broken[place] = int(rng.integers(0, 256))
        assert isinstance(read_csa(bytes(broken)), dict)
    assert read_csa(whole[:-40]) == {}
