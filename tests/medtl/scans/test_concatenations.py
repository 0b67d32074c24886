"""A multi-frame object that was cut into several is put together again, or refused where a part is not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import EnhancedMRImageStorage, generate_uid

from functional_groups import item
from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.convert import Conversion, convert

Array = np.ndarray[Any, Any]
NAMES = Pseudonymiser(b"0123456789abcdef")
CUTS = (0, 2, 5, 7)  # three parts: 2, 3 and 2 slices


@pytest.fixture
def slices() -> Array:
    return np.random.default_rng(0).integers(1, 3000, (7, 16, 20)).astype(np.uint16)


def cut(dicom: Callable[..., Dataset], slices: Array, whole: str, cuts: Sequence[int] = CUTS) -> list[Dataset]:
    """Cut an object of slices 3 mm apart into parts."""
    parts = []
    for number, (first, last) in enumerate(pairwise(cuts), 1):
        made = dicom(slices[0], SOPClassUID=EnhancedMRImageStorage, Modality="MR", FrameOfReferenceUID="1.2.3")
        made.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
        made.StudyInstanceUID, made.SeriesInstanceUID, made.InstanceNumber = "1.2.8", "1.2.9", 1
        made.NumberOfFrames, made.PixelData = last - first, slices[first:last].tobytes()
        made.ConcatenationUID, made.SOPInstanceUIDOfConcatenationSource = whole, "1.2.99"
        made.InConcatenationNumber, made.InConcatenationTotalNumber = number, len(cuts) - 1
        made.ConcatenationFrameOffsetNumber = first
        made.SharedFunctionalGroupsSequence = [item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75], SliceThickness=3.0, SpacingBetweenSlices=3.0)],
        )]  # fmt: skip
        made.PerFrameFunctionalGroupsSequence = [
            item(
                PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 3.0 * place])],
                FrameContentSequence=[item(StackID="1", InStackPositionNumber=place + 1)],
            )
            for place in range(first, last)
        ]
        parts.append(made)
    return parts


def taken(folder: Path, parts: Sequence[Dataset]) -> Conversion:
    (folder / "in").mkdir()
    for part in parts:
        part.SOPInstanceUID = part.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        part.save_as(folder / "in" / part.SOPInstanceUID, enforce_file_format=True)
    return convert(folder / "in", folder / "out", ScansConfig(stable_seconds=0), NAMES)


def voxels(folder: Path, done: Conversion) -> list[Array]:
    images = [nibabel.load(folder / "out" / one.output) for one in done.volumes]
    return [np.asarray(image.dataobj).T for image in images if isinstance(image, nibabel.Nifti1Image)]


def test_the_parts_of_an_object_are_one_volume(tmp_path: Path, dicom: Callable[..., Dataset], slices: Array) -> None:
    done = taken(tmp_path, cut(dicom, slices, "1.2.5")[::-1])
    (values,) = voxels(tmp_path, done)
    assert np.array_equal(values, slices)
    assert done.refused == ()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_where_a_part_is_not_here_there_is_no_volume(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array, lost: int
) -> None:
    parts = cut(dicom, slices, "1.2.5")
    del parts[lost]
    done = taken(tmp_path, parts)
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["incomplete" if lost != 1 else "missing_slices"])


def test_one_frame_of_an_object_is_an_image_and_lacks_nothing(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array
) -> None:
    done = taken(tmp_path, cut(dicom, slices, "1.2.5", range(8))[:1])
    assert [one.code for one in done.refused] == ["single_slice"]  # `convert` takes no images


@pytest.mark.parametrize("lost", [0, 1])
def test_a_part_before_others_is_missed_without_their_total(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array, lost: int
) -> None:
    parts = cut(dicom, slices, "1.2.5")
    del parts[lost]
    for part in parts:
        del part.InConcatenationTotalNumber
    assert taken(tmp_path, parts).volumes == ()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part: setattr(part, "ConcatenationFrameOffsetNumber", 1),
        lambda part: setattr(part, "InConcatenationNumber", 4),
        lambda part: delattr(part, "InConcatenationNumber"),
        lambda part: setattr(part, "InConcatenationTotalNumber", 5),
    ],
    ids=["another offset", "another number", "no number", "another total"],
)
def test_parts_that_contradict_each_other_make_no_volume(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array, spoil: Callable[[Dataset], None]
) -> None:
    parts = cut(dicom, slices, "1.2.5")
    spoil(parts[1])
    done = taken(tmp_path, parts)
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["incomplete"])


def echoes(dicom: Callable[..., Dataset], slices: Array, cuts: Sequence[int]) -> list[Dataset]:
    """Cut an object of two echoes whose times go on from slice to slice: its dimension says which are one volume."""
    both = np.repeat(slices, 2, axis=0) + np.tile([0, 5000], len(slices)).astype(np.uint16)[:, None, None]
    parts = cut(dicom, both, "1.2.5", cuts)
    frame = 0
    for part in parts:
        part.DimensionIndexSequence = [item(DimensionIndexPointer=0x00209057), item(DimensionIndexPointer=0x00189082)]
        for group in part.PerFrameFunctionalGroupsSequence:
            place, echo = divmod(frame, 2)
            group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3.0 * place]
            group.MREchoSequence = [item(EffectiveEchoTime=10.0 + frame)]
            group.FrameContentSequence = [item(StackID="1", DimensionIndexValues=[place + 1, echo + 1])]
            frame += 1
    return parts


@pytest.mark.parametrize("at", [*range(1, 14)])
def test_an_object_of_two_volumes_gives_both_whole_or_none(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array, at: int
) -> None:
    """Each part is read by itself and may see other volumes in it than the whole has."""
    done = taken(tmp_path, echoes(dicom, slices, (0, at, 14)))
    assert [one.shape[0] for one in done.volumes] in ([], [7, 7])
    assert done.volumes or done.refused
    assert all(one.code in ("incomplete", "multi_frame", "duplicate_position", "single_slice") for one in done.refused)


def test_an_object_of_two_volumes_that_was_not_cut_gives_both(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array
) -> None:
    done = taken(tmp_path, echoes(dicom, slices, (0, 14)))
    assert ([one.shape[0] for one in done.volumes], done.refused) == ([7, 7], ())


def test_two_objects_at_the_same_places_are_told_apart_and_not_their_parts(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: Array
) -> None:
    again = slices[::-1].copy()
    done = taken(tmp_path, [*cut(dicom, slices, "1.2.5"), *cut(dicom, again, "1.2.6", (0, 4, 7))])
    found = voxels(tmp_path, done)
    assert done.refused == ()
    assert len(found) == 2
    assert all(any(np.array_equal(one, whole) for one in found) for whole in (slices, again))
