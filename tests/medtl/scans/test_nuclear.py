"""Slices of a SPECT lie where the detector's position and the signed spacing put them, or nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom import Dataset

from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.convert import Conversion, convert
from spect import ENERGY_WINDOW_VECTOR, SLICE_VECTOR, TIME_SLOT_VECTOR, spect

Array = np.ndarray[Any, Any]
NAMES = Pseudonymiser(b"0123456789abcdef")


@pytest.fixture
def slices() -> Array:
    return np.random.default_rng(0).integers(1, 3000, (5, 16, 20)).astype(np.uint16)


def taken(folder: Path, header: Dataset) -> Conversion:
    (folder / "in").mkdir()
    header.save_as(folder / "in" / "x.dcm", enforce_file_format=True)
    return convert(folder / "in", folder / "out", ScansConfig(stable_seconds=0), NAMES)


def voxels(folder: Path, done: Conversion, number: int = 0) -> tuple[Array, Array]:
    image = nibabel.load(folder / "out" / done.volumes[number].output)
    assert isinstance(image, nibabel.Nifti1Image)
    return np.asarray(image.dataobj).T, image.affine


@pytest.mark.parametrize("between_mm", [4.0, -4.0])
def test_the_sign_of_the_spacing_is_the_direction_of_the_slices(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array, between_mm: float
) -> None:
    done = taken(tmp_path, spect(dicom, slices, between_mm))
    values, affine = voxels(tmp_path, done)
    assert done.refused == ()
    for number, one in enumerate(slices):
        (place,) = (k for k, other in enumerate(values) if np.array_equal(one, other))
        assert np.allclose(affine @ [0, 0, place, 1], [30, 20, 100 + between_mm * number, 1])
        assert np.allclose(affine @ [7, 5, place, 1], [30 - 21, 20 - 10, 100 + between_mm * number, 1])


@pytest.mark.parametrize("between_mm", [4.0, -4.0])
def test_the_volume_is_the_one_that_simpleitk_reads(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array, between_mm: float
) -> None:
    """dcm2niix 1.0.20260724 agrees where the spacing is positive; it takes the sign for none (its issue 885)."""
    sitk = pytest.importorskip("SimpleITK")
    oblique = [0.8, 0.6, 0, -0.48, 0.64, 0.6]
    header = spect(dicom, slices, between_mm)
    header.DetectorInformationSequence[0].ImageOrientationPatient = oblique
    values, affine = voxels(tmp_path, taken(tmp_path, header))
    theirs = sitk.ReadImage(str(tmp_path / "in" / "x.dcm"))
    for number, one in enumerate(sitk.GetArrayFromImage(theirs)):
        (place,) = (k for k, other in enumerate(values) if np.array_equal(one, other))
        for column, row in ((0, 0), (19, 15)):
            x, y, z = theirs.TransformIndexToPhysicalPoint((column, row, number))
            assert np.allclose((affine @ [column, row, place, 1])[:3], [-x, -y, z], atol=1e-4)


def test_slice_numbers_and_not_the_order_of_the_frames_decide(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array
) -> None:
    order = [0, 3, 1, 4, 2]
    header = spect(dicom, slices[order], 4.0, SliceVector=[number + 1 for number in order])
    values, _ = voxels(tmp_path, taken(tmp_path, header))
    assert np.array_equal(values, slices)


@pytest.mark.parametrize("pointer", [TIME_SLOT_VECTOR, ENERGY_WINDOW_VECTOR])
def test_gates_and_energy_windows_are_volumes_of_their_own(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array, pointer: int
) -> None:
    both = np.concatenate([slices, slices[::-1] + 1])
    header = spect(dicom, both, 4.0, NumberOfSlices=5, SliceVector=[1, 2, 3, 4, 5] * 2)
    header.ImageType = ["ORIGINAL", "PRIMARY", "RECON GATED TOMO", "EMISSION"]
    header.FrameIncrementPointer = [pointer, SLICE_VECTOR]
    setattr(header, {TIME_SLOT_VECTOR: "TimeSlotVector"}.get(pointer, "EnergyWindowVector"), [1] * 5 + [2] * 5)
    done = taken(tmp_path, header)
    assert np.array_equal(voxels(tmp_path, done, 0)[0], both[:5])
    assert np.array_equal(voxels(tmp_path, done, 1)[0], both[5:])
    assert (len(done.volumes), done.refused) == (2, ())


def lose(header: Dataset, keyword: str) -> None:
    delattr(header, keyword)


def place(header: Dataset, keyword: str, value: Any) -> None:
    setattr(header.DetectorInformationSequence[0], keyword, value)


SPOILT: dict[str, Callable[[Dataset], None]] = {
    "projections": lambda header: setattr(header, "ImageType", ["ORIGINAL", "PRIMARY", "TOMO", "EMISSION"]),
    "no vector": lambda header: lose(header, "SliceVector"),
    "no pointer": lambda header: lose(header, "FrameIncrementPointer"),
    "counted by another vector": lambda header: setattr(header, "FrameIncrementPointer", 0x00181063),
    "a short vector": lambda header: setattr(header, "SliceVector", [1, 2, 3, 4]),
    "a long vector": lambda header: setattr(header, "SliceVector", [1, 2, 3, 4, 5, 5]),
    "a number for no slice": lambda header: setattr(header, "SliceVector", [1, 2, 3, 4, 6]),
    "from nought": lambda header: setattr(header, "SliceVector", [0, 1, 2, 3, 4]),
    "from the end": lambda header: setattr(header, "SliceVector", [5, 4, 3, 2, 1]),
    "another number of slices": lambda header: setattr(header, "NumberOfSlices", 6),
    "no detector": lambda header: lose(header, "DetectorInformationSequence"),
    "no position": lambda header: place(header, "ImagePositionPatient", None),
    "no orientation": lambda header: place(header, "ImageOrientationPatient", None),
    "two positions": lambda header: setattr(header, "ImagePositionPatient", [0, 0, 0]),
    "no spacing": lambda header: lose(header, "SpacingBetweenSlices"),
    "no step": lambda header: setattr(header, "SpacingBetweenSlices", 0),
    "no pixel spacing": lambda header: lose(header, "PixelSpacing"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_not_told_completely_makes_no_volume(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array, what: str
) -> None:
    header = spect(dicom, slices, 4.0)
    SPOILT[what](header)
    done = taken(tmp_path, header)
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["multi_frame"])


def test_a_slice_that_is_there_twice_is_refused(tmp_path: Path, dicom: Callable[..., Dataset], slices: Array) -> None:
    done = taken(tmp_path, spect(dicom, slices, 4.0, SliceVector=[1, 2, 3, 4, 4], NumberOfSlices=4))
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["duplicate_position"])
