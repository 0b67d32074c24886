"""A mask that goes out lies where its scan lies, says who drew it, and tells nothing new of the patient."""

from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset, FileMetaDataset, dcmread
from pydicom.sr.codedict import codes as standard
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from medtl.artifacts import Store
from medtl.config import ChecksConfig, ScansConfig
from medtl.delivery.io import write_file, write_mask_nifti, write_table
from medtl.delivery.masks import (
    MEANINGS,
    Algorithm,
    Drawn,
    dicom_seg,
    mask_nifti,
    mask_png,
    meaning_of,
    segments,
    source_header,
    volumes,
    volumes_table,
)
from medtl.errors import ScanError
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Exclusion, GridPlan, Scan, Structure
from medtl.scans.geometry import Affine
from medtl.scans.intake import ingest, read_origins, read_scans
from medtl.scans.masks import Grid, dicom_masks
from medtl.scans.nifti import as_affine
from medtl.scans.segments import PixelStore
from medtl.scans.sources import survey
from mosaics import UP, WHOLE, grid, mosaic
from spect import spect

hd = pytest.importorskip("highdicom")

Array = np.ndarray[Any, Any]
CONFIG = ScansConfig(stable_seconds=0)
NAMES = Pseudonymiser(bytes(range(32)))
ALGORITHM = Algorithm("liver-net", "r-0123456789abcdef")
SHAPE = (5, 9, 12)
ROOT = "1.2.826.0.1.3680043.8.498."
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
TILTED = ((0.8, 0.6, 0.0), (-0.6, 0.8, 0.0))


def plan_of(*structures: Structure) -> GridPlan:
    three = (1, 1, 1)
    return GridPlan(
        structures or (Structure("liver", (1,)), Structure("tumour", (2,))), None, 3, "axial", 0, 1, three, "zscore",
        None, None, None, None, (), (8, 8, 8), 2, (three,), (three,), (4,), (), {}, {},
    )  # fmt: skip


def overlapping() -> GridPlan:
    return plan_of(Structure("whole", (1, 2, 4)), Structure("core", (1, 4)), Structure("active", (4,)))


def codes_in(shape: tuple[int, ...], most: int = 2, seed: int = 0) -> Array:
    codes = np.zeros(shape, np.uint8)
    inner = tuple(slice(1, -1) for _ in shape)
    codes[inner] = np.random.default_rng(seed).integers(0, most + 1, codes[inner].shape)
    return codes


def affine_of(axes: Any = AXIAL, gap: float = 2.5) -> Affine:
    """Give the place of :func:`ct_series`, straight from the standard's equation."""
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = np.array(axes[0]) * 0.5, np.array(axes[1]) * 0.8
    lps[:3, 2], lps[:3, 3] = np.cross(*axes) * gap, (-20.0, 15.0, 100.0)
    return as_affine(np.diag([-1.0, -1, 1, 1]) @ lps)


def ct_series(axes: Any = AXIAL, drift: Any = (0.0, 0.0, 0.0), **attributes: Any) -> list[Dataset]:
    slices = []
    for number in range(SHAPE[0]):
        ct = Dataset()
        ct.file_meta = FileMetaDataset()
        ct.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ct.SOPClassUID, ct.SOPInstanceUID = CTImageStorage, f"{ROOT}1.1.{number + 1}"
        ct.StudyInstanceUID, ct.SeriesInstanceUID, ct.FrameOfReferenceUID = ROOT + "1", ROOT + "1.1", ROOT + "2"
        ct.PatientID, ct.PatientName, ct.PatientBirthDate, ct.PatientSex = "ID-1", "DOE^JANE", "19700102", "F"
        ct.StudyDate, ct.StudyTime, ct.StudyID, ct.AccessionNumber = "20260102", "101112", "7", "A-9"
        ct.ReferringPhysicianName = ct.PositionReferenceIndicator = ""
        ct.Modality, ct.SeriesNumber, ct.InstanceNumber = "CT", 3, number + 1
        ct.Manufacturer, ct.ImageType = "ACME", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ct.Rows, ct.Columns = SHAPE[1:]
        ct.SamplesPerPixel, ct.PhotometricInterpretation, ct.PixelRepresentation = 1, "MONOCHROME2", 0
        ct.BitsAllocated, ct.BitsStored, ct.HighBit = 16, 16, 15
        ct.RescaleIntercept, ct.RescaleSlope, ct.KVP, ct.AcquisitionNumber = 0, 1, "", 1
        ct.PixelSpacing, ct.SliceThickness, ct.SpacingBetweenSlices = [0.8, 0.5], 2.0, 9.0  # wrong, as it often is
        ct.ImageOrientationPatient = [*axes[0], *axes[1]]
        place = np.array([-20.0, 15.0, 100.0]) + number * (np.cross(*axes) * 2.5 + np.array(drift))
        ct.ImagePositionPatient = [round(float(mm), 4) for mm in place]
        ct.PixelData = np.random.default_rng(number).integers(0, 999, SHAPE[1:], dtype=np.uint16).tobytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are wrong on purpose
            for keyword, value in attributes.items():
                if value is None:
                    delattr(ct, keyword)
                else:
                    setattr(ct, keyword, value)
        slices.append(ct)
    return slices


def read(data: bytes) -> Dataset:
    return dcmread(io.BytesIO(data))


def saved(dataset: Dataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def drawn_again(data: bytes, affine: Affine, shape: tuple[int, ...] = SHAPE) -> list[Array]:
    grid = Grid((shape[0], shape[1], shape[2]), affine, ROOT + "2")
    masks = dicom_masks(read(data), grid, CONFIG)
    assert {finding.code for mask in masks for finding in mask.findings} <= {"empty_mask"}
    return [mask.values for mask in masks]


# ----------------------------------------------------------------------------------------------- NIfTI and PNG

PLACES = {
    "axial": affine_of(),
    "oblique": affine_of(TILTED),
    "sagittal": affine_of(SAGITTAL),
    "left-handed": affine_of(gap=-2.5),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_two_other_readers_find_a_nifti_mask_where_its_scan_is(place: str, kind: str, tmp_path: Path) -> None:
    values, path = codes_in(SHAPE).astype(kind), tmp_path / "new" / "mask.nii.gz"
    write_mask_nifti(path, values, PLACES[place])
    image = nibabel.load(path)
    assert isinstance(image, nibabel.Nifti1Image)
    assert np.asarray(image.dataobj).dtype == kind and (values == np.asarray(image.dataobj).T).all()
    for matrix, code in (image.header.get_sform(coded=True), image.header.get_qform(coded=True)):
        assert code == 1 and np.allclose(matrix, PLACES[place], atol=1e-5)
    sitk = pytest.importorskip("SimpleITK")
    other = sitk.ReadImage(str(path))
    assert (sitk.GetArrayFromImage(other) == values).all()
    corner = np.diag([-1.0, -1, 1, 1]) @ np.array(PLACES[place]) @ [11, 8, 4, 1]
    assert np.allclose(other.TransformIndexToPhysicalPoint((11, 8, 4)), corner[:3], atol=1e-4)


def test_a_nifti_mask_lies_on_its_nifti_scan_to_the_last_bit(tmp_path: Path) -> None:
    matrix = np.array(affine_of(TILTED)) + 1e-3  # no round numbers
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE[::-1], np.float32), matrix), tmp_path / "scan.nii.gz")
    source = nibabel.load(tmp_path / "scan.nii.gz")
    assert isinstance(source, nibabel.Nifti1Image)
    write_mask_nifti(tmp_path / "mask.nii", codes_in(SHAPE), as_affine(source.affine))
    mask = nibabel.load(tmp_path / "mask.nii")
    assert isinstance(mask, nibabel.Nifti1Image)
    assert (mask.affine == source.affine).all() and mask.shape == source.shape


def test_intake_reads_a_nifti_mask_back(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_mask_nifti(tmp_path / "in" / "mask.nii.gz", codes_in(SHAPE), affine_of(TILTED))
    store = Store(tmp_path / "ws")
    ingest(survey(tmp_path / "in", CONFIG), CONFIG, NAMES, tmp_path / "out", store)
    (scan,) = read_scans(tmp_path / "out")
    assert np.allclose(np.array(scan.affine), affine_of(TILTED), atol=1e-5)
    assert (PixelStore(store.root / "pixels")(scan) == codes_in(SHAPE)).all()


def test_the_same_mask_is_the_same_bytes_for_its_owner_alone(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_mask_nifti(tmp_path / name, codes_in(SHAPE), affine_of())
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_a_sheared_affine_has_no_qform() -> None:
    sheared = np.array(affine_of())
    sheared[1, 2] = 0.7
    header = nibabel.Nifti1Image.from_bytes(mask_nifti(codes_in(SHAPE), as_affine(sheared), gzipped=False)).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (0, 1)
    assert np.allclose(header.get_sform(), sheared)


@pytest.mark.parametrize("wrong", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)])
def test_an_affine_that_is_no_place_is_refused(wrong: Array) -> None:
    with pytest.raises(ScanError, match="not finite, or flat") as refused:
        mask_nifti(codes_in(SHAPE), wrong.tolist())
    assert refused.value.code == "bad_geometry"


def test_a_mask_of_an_image_is_a_png() -> None:
    for values in (codes_in((7, 9)), codes_in((7, 9)).astype(np.uint16) * 300):
        assert (np.asarray(Image.open(io.BytesIO(mask_png(values)))) == values).all()
        assert mask_png(values) == mask_png(values)


# ------------------------------------------------------------------------------------------------------- codes


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=30))
def test_segments_are_the_bits_of_overlapping_codes(values: list[int]) -> None:
    codes = np.array(values, np.uint8)
    found = list(segments(codes, overlapping()))
    assert (sum(inside.astype(int) << bit for bit, inside in enumerate(found)) == codes).all()


def test_what_does_not_count_is_in_no_segment_and_a_strange_code_is_refused() -> None:
    assert not any(inside.any() for inside in segments(np.full((2, 2), 255, np.uint8), overlapping()))
    with pytest.raises(ScanError, match="no structure"):
        list(segments(np.array([3], np.uint8), plan_of()))


# --------------------------------------------------------------------------------------------------- DICOM SEG


@pytest.mark.parametrize("axes", [AXIAL, SAGITTAL, TILTED])
@pytest.mark.parametrize("gap", [2.5, -2.5])
@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_a_segmentation_lands_on_the_voxels_of_its_series(axes: Any, gap: float, kind: Any) -> None:
    codes, series = codes_in(SHAPE), ct_series(axes)
    affine = affine_of(axes, gap)
    if gap < 0:  # the same slices, counted from the other end
        matrix = np.array(affine)
        matrix[:3, 3] -= 4 * matrix[:3, 2]
        affine = as_affine(matrix)
    data = dicom_seg(codes, plan_of(), affine, series[::-1], ALGORITHM, kind=kind)
    for number, values in enumerate(drawn_again(data, affine), 1):
        assert (values == (codes == number)).all()
    own = hd.seg.Segmentation.from_dataset(read(data)).get_volume_geometry()
    theirs = hd.get_volume_from_series(series).get_geometry()
    inside = theirs.map_reference_to_indices(own.map_indices_to_reference(np.eye(3)))
    assert np.allclose(np.abs(inside - np.rint(inside)), 0, atol=1e-4)
    assert own.spacing_between_slices == pytest.approx(2.5)
    frames = read(data).PerFrameFunctionalGroupsSequence
    positions = {tuple(one.PlanePositionSequence[0].ImagePositionPatient) for one in frames}
    assert positions <= {tuple(one.ImagePositionPatient) for one in series}  # word for word


def test_every_frame_names_the_slice_it_was_drawn_on() -> None:
    series = ct_series()
    seg = read(dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), series, ALGORITHM))
    place = {tuple(one.ImagePositionPatient): one.SOPInstanceUID for one in series}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        named = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert named == place[tuple(frame.PlanePositionSequence[0].ImagePositionPatient)]
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == ROOT + "1.1"


def test_a_second_run_writes_the_same_bytes_and_other_bytes_have_other_names() -> None:
    series, codes = ct_series(), codes_in(SHAPE)
    first = dicom_seg(codes, plan_of(), affine_of(), series, ALGORITHM)
    assert first == dicom_seg(codes, plan_of(), affine_of(), series[::-1], ALGORITHM)
    other = read(dicom_seg(codes_in(SHAPE, seed=1), plan_of(), affine_of(), series, ALGORITHM))
    newer = read(dicom_seg(codes, plan_of(), affine_of(), series, Algorithm("liver-net", "r-2")))
    seg = read(first)
    assert len({one.SOPInstanceUID for one in (seg, other, newer)}) == 3
    assert seg.SeriesInstanceUID == other.SeriesInstanceUID != newer.SeriesInstanceUID
    assert seg.file_meta.MediaStorageSOPInstanceUID == seg.SOPInstanceUID
    assert all(len(one.SOPInstanceUID) == 44 and one.SOPInstanceUID.is_valid for one in (seg, other, newer))
    assert (seg.ContentDate, seg.ContentTime) == ("20260102", "101112")
    later = dicom_seg(codes, plan_of(), affine_of(), series, ALGORITHM, when=datetime(2027, 3, 4, 5, 6, 7))
    assert (read(later).ContentDate, read(later).InstanceCreationTime) == ("20270304", "050607")


def test_a_segmentation_says_who_drew_what() -> None:
    seg = read(dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), ct_series(), ALGORITHM))
    liver, tumour = seg.SegmentSequence
    assert [one.SegmentLabel for one in (liver, tumour)] == ["liver", "tumour"]
    assert {one.SegmentAlgorithmType for one in (liver, tumour)} == {"AUTOMATIC"}
    assert tumour.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    drawn_by = liver.SegmentationAlgorithmIdentificationSequence[0]
    assert (drawn_by.AlgorithmName, drawn_by.AlgorithmVersion) == (ALGORITHM.name, ALGORITHM.release)
    assert drawn_by.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"


def test_overlapping_structures_keep_the_voxels_they_share() -> None:
    codes, plan = codes_in(SHAPE, 7), overlapping()
    data = dicom_seg(codes, plan, affine_of(), ct_series(), ALGORITHM)
    assert read(data).SegmentsOverlap == "YES"
    for bit, values in enumerate(drawn_again(data, affine_of())):
        assert (values == (codes >> bit & 1)).all()
    with pytest.raises(ScanError, match="share voxels"):
        dicom_seg(codes, plan, affine_of(), ct_series(), ALGORITHM, kind="labelmap")


@pytest.mark.parametrize("plan", [plan_of(), overlapping()])
def test_an_empty_mask_is_said_once_for_each_structure(plan: GridPlan) -> None:
    data = dicom_seg(np.zeros(SHAPE, np.uint8), plan, affine_of(), ct_series(), ALGORITHM)
    assert int(read(data).NumberOfFrames) == len(plan.structures)
    assert not any(values.any() for values in drawn_again(data, affine_of()))


def test_what_does_not_count_is_left_out() -> None:
    codes = codes_in(SHAPE)
    codes[0] = 255
    first, second = drawn_again(dicom_seg(codes, plan_of(), affine_of(), ct_series(), ALGORITHM), affine_of())
    assert not first[0].any() and (first == (codes == 1)).all() and (second == (codes == 2)).all()


def test_a_volume_set_upright_from_a_tilted_stack_gets_its_own_planes(tmp_path: Path) -> None:
    series = ct_series(drift=(-0.2, 0.6, 0.0))
    for number, one in enumerate(series):
        write_file(tmp_path / "in" / f"{number}.dcm", saved(one))
    (tmp_path / "out").mkdir()
    repairing = CONFIG.model_copy(update={"checks": ChecksConfig(policy={"gantry_tilt": "repair"})})
    ingest(survey(tmp_path / "in", repairing), repairing, NAMES, tmp_path / "out", Store(tmp_path / "ws"))
    (scan,) = read_scans(tmp_path / "out")
    assert scan.findings == ("gantry_tilt",) and scan.shape == (5, 12, 14) and scan.affine is not None
    codes = codes_in(scan.shape)
    data = dicom_seg(codes, plan_of(), scan.affine, series, ALGORITHM)
    for number, values in enumerate(drawn_again(data, scan.affine, scan.shape), 1):
        assert (values == (codes == number)).all()
    frame = read(data).PerFrameFunctionalGroupsSequence[0]
    assert frame.DerivationImageSequence[0].SourceImageSequence[0].SpatialLocationsPreserved == "NO"
    assert data == dicom_seg(codes, plan_of(), scan.affine, series[::-1], ALGORITHM)


@pytest.mark.parametrize("kind", ["mosaic", "grid", "a grid by its number of slices"])
def test_slices_out_of_one_image_are_segmented_where_they_lie(tmp_path: Path, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(1, 4000, (6 if kind == "mosaic" else 7, 16, 20)).astype(np.uint16)
    source = mosaic(one_image, pixels, **WHOLE) if kind == "mosaic" else grid(one_image, pixels, UP)
    if kind.endswith("slices"):
        source.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    scan = taken(tmp_path, [source])
    codes = codes_in(scan.shape)
    data = dicom_seg(codes, plan_of(), scan.affine, [source], ALGORITHM)
    for number, values in enumerate(drawn_again(data, scan.affine, scan.shape), 1):
        assert (values == (codes == number)).all()


def test_frames_that_do_not_say_where_they_lie_are_not_segmented(tmp_path: Path) -> None:
    source = spect(one_image, np.random.default_rng(0).integers(1, 4000, (5, 16, 20)).astype(np.uint16), -4.0)
    scan = taken(tmp_path, [source])
    with pytest.raises(ScanError, match="one by one") as refusal:
        dicom_seg(codes_in(scan.shape), plan_of(), scan.affine, [source], ALGORITHM)
    assert refusal.value.code == "no_geometry"


def test_an_image_that_was_cut_into_several_objects_is_not_segmented() -> None:
    halves = [enhanced_ct(), enhanced_ct()]
    with pytest.raises(ScanError, match="cut into several"):
        dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), halves, ALGORITHM)


def one_image(pixels: Array, **attributes: Any) -> Dataset:
    (made, *_) = ct_series(**{"ImagePositionPatient": None, "ImageOrientationPatient": None} | attributes)
    made.Rows, made.Columns, made.PixelData = *pixels.shape, pixels.tobytes()
    return made


def taken(folder: Path, sources: list[Dataset]) -> Scan:
    for number, one in enumerate(sources):
        one.FrameOfReferenceUID = ROOT + "2"
        write_file(folder / "in" / f"{number}.dcm", saved(one))
    (folder / "out").mkdir()
    ingest(survey(folder / "in", CONFIG), CONFIG, NAMES, folder / "out", Store(folder / "ws"))
    (scan,) = read_scans(folder / "out")
    return scan


def test_an_image_without_a_place_is_segmented_as_it_is() -> None:
    (image, *_) = ct_series(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.1", Modality="CR", FrameOfReferenceUID=None, ImagePositionPatient=None,
        ImageOrientationPatient=None, PatientOrientation=["L", "F"],
    )  # fmt: skip
    codes = codes_in(SHAPE[1:])
    seg = read(dicom_seg(codes, plan_of(), None, [image], ALGORITHM))
    assert list(seg.PatientOrientation) == ["L", "F"]
    stored = seg.pixel_array.reshape(-1, *codes.shape)
    assert [(frame == (codes == number)).all() for number, frame in enumerate(stored, 1)] == [True, True]


def enhanced_ct(gap: float = 2.5) -> Dataset:
    """Make one object of all slices, which says for each frame what others say once, and a wrong gap."""
    (ct, *_) = ct_series(ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None)
    ct.SOPClassUID, ct.NumberOfFrames = "1.2.840.10008.5.1.4.1.1.2.1", SHAPE[0]
    ct.SharedFunctionalGroupsSequence, ct.PerFrameFunctionalGroupsSequence = [Dataset()], []
    for number in range(SHAPE[0]):
        frame, place, plane, measures = (Dataset() for _ in range(4))
        place.ImagePositionPatient, plane.ImageOrientationPatient = (
            [-20.0, 15.0, 100.0 + number * gap],
            [1, 0, 0, 0, 1, 0],
        )
        measures.PixelSpacing, measures.SliceThickness, measures.SpacingBetweenSlices = [0.8, 0.5], 2.0, 9.0
        frame.PlanePositionSequence, frame.PlaneOrientationSequence = [place], [plane]
        frame.PixelMeasuresSequence = [measures]
        ct.PerFrameFunctionalGroupsSequence.append(frame)
    return ct


def test_an_enhanced_image_is_segmented_frame_by_frame() -> None:
    codes = codes_in(SHAPE)
    data = dicom_seg(codes, plan_of(), affine_of(), [enhanced_ct()], ALGORITHM)
    for number, values in enumerate(drawn_again(data, affine_of()), 1):
        assert (values == (codes == number)).all()
    for frame in read(data).PerFrameFunctionalGroupsSequence:
        number = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        assert frame.PlanePositionSequence[0].ImagePositionPatient[2] == 100.0 + 2.5 * (int(number) - 1)
    with pytest.raises(ScanError, match="lie elsewhere"):
        dicom_seg(codes, plan_of(), affine_of(), [enhanced_ct(gap=2.0)], ALGORITHM)


def moved(by: Any) -> Affine:
    matrix = np.array(affine_of())
    matrix[:3, 3] += by
    return as_affine(matrix)


def flipped() -> Affine:
    matrix = np.array(affine_of())
    matrix[:3, 0] *= -1
    return as_affine(matrix)


@pytest.mark.parametrize(
    ("code", "reason", "codes", "affine", "series"),
    [
        ("mask_geometry", "lie elsewhere", codes_in(SHAPE), moved((0, 0, 1.0)), ct_series()),
        ("mask_geometry", "lie elsewhere", codes_in(SHAPE), moved((0, 0, 30.0)), ct_series()),
        ("mask_geometry", "lie elsewhere", codes_in(SHAPE), moved((5.0, 0, 0)), ct_series()),
        ("mask_geometry", "lie elsewhere", codes_in(SHAPE), affine_of(), ct_series(drift=(0, 0.6, 0))),
        ("mask_geometry", "lie elsewhere", codes_in(SHAPE), flipped(), ct_series()),
        ("mask_geometry", "lie elsewhere", codes_in(SHAPE), affine_of(SAGITTAL), ct_series()),
        ("mask_geometry", "1 slices of the mask have no file", codes_in(SHAPE), affine_of(), ct_series()[1:]),
        ("mask_geometry", "another shape", codes_in((5, 9, 13)), affine_of(), ct_series()),
        ("mask_geometry", "another shape", codes_in((9, 13)), None, ct_series()[:1]),
        ("mask_geometry", "more than one series", codes_in(SHAPE), affine_of(),
         [*ct_series()[:4], *ct_series(SeriesInstanceUID="1.2.3")[4:]]),
        ("no_geometry", "one frame", codes_in(SHAPE[1:]), None, ct_series()),
        ("no_geometry", "frame of reference", codes_in(SHAPE), affine_of(), ct_series(FrameOfReferenceUID=None)),
        ("no_geometry", "needs the files", codes_in(SHAPE), affine_of(), []),
        ("bad_header", "no date", codes_in(SHAPE), affine_of(), ct_series(StudyDate="")),
        ("bad_header", "KeyError", codes_in(SHAPE), affine_of(), ct_series(SOPClassUID="1.2.3")),
        ("bad_mask", "no structure", codes_in(SHAPE, 9), affine_of(), ct_series()),
    ],
)  # fmt: skip
def test_a_mask_that_does_not_fit_its_series_is_refused(
    code: str, reason: str, codes: Array, affine: Affine | None, series: list[Dataset]
) -> None:
    with pytest.raises(ScanError, match=reason) as refused:
        dicom_seg(codes, plan_of(), affine, series, ALGORITHM)
    assert refused.value.code == code
    assert "DOE" not in str(refused.value) and "ID-1" not in str(refused.value)


def test_nothing_is_told_of_a_patient_that_the_series_does_not_tell(caplog: pytest.LogCaptureFixture) -> None:
    gone = dict.fromkeys(("PatientBirthDate", "AccessionNumber", "StudyID", "ReferringPhysicianName"))
    marks: dict[str, Any] = {
        "PatientIdentityRemoved": "YES", "DeidentificationMethod": "medtl", "PatientName": "no caret",
        "PatientSex": "female", "StudyTime": "noon",
    }  # fmt: skip
    series = ct_series(**gone, **marks)
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    seg = read(dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), series, ALGORITHM))
    assert {seg.get(keyword) or "" for keyword in gone} == {""}
    assert (seg.PatientIdentityRemoved, seg.DeidentificationMethod, seg.PatientID) == ("YES", "medtl", "ID-1")
    of_patient = {element.keyword for element in seg if element.tag.group == 0x0010 and element.value}
    assert of_patient <= {element.keyword for element in series[0]}
    assert not caplog.text


def test_the_headers_it_was_given_are_left_as_they_are() -> None:
    series = ct_series(PatientSex="female", StudyTime="noon")
    before = [saved(one) for one in series]
    dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), [source_header(data) for data in before], ALGORITHM)
    dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), series, ALGORITHM)
    assert [saved(one) for one in series] == before


@pytest.mark.parametrize(
    ("charset", "name"), [("ISO_IR 100", "Müller^Jörg"), ("ISO_IR 192", "山田^太郎"), ("ISO_IR 144", "Люкс^Ия")]
)
def test_a_name_in_any_character_set_stays_the_same_name(charset: str, name: str) -> None:
    series = [source_header(saved(one)) for one in ct_series(SpecificCharacterSet=charset, PatientName=name)]
    plan = plan_of(Structure("größte\\Läsion", (1,)))
    seg = read(dicom_seg(codes_in(SHAPE, 1), plan, affine_of(), series, ALGORITHM))
    assert str(seg.PatientName) == name
    assert seg.SegmentSequence[0].SegmentLabel == "groteLasion"


def test_without_highdicom_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom.seg", None)
    with pytest.raises(ScanError, match=r"medtl\[masks\]"):
        dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), ct_series(), ALGORITHM)


HEADERS = [saved(one) for one in ct_series()]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_costs_no_more_than_its_segmentation(number: int, damage: list[tuple[int, int]]) -> None:
    data = bytearray(HEADERS[number])
    for place, value in damage:
        data[place] = value
    files = [*HEADERS[:number], bytes(data), *HEADERS[number + 1 :]]
    try:
        dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), [source_header(one) for one in files], ALGORITHM)
    except ScanError as refused:
        assert refused.code in ("bad_header", "mask_geometry", "no_geometry")
        assert "DOE" not in refused.reason


def test_bytes_that_are_no_header_are_refused() -> None:
    for data in (b"", b"nothing", HEADERS[0][:300]):
        with pytest.raises(ScanError) as refused:
            dicom_seg(codes_in(SHAPE), plan_of(), affine_of(), [source_header(data)], ALGORITHM)
        assert refused.value.code in ("bad_header", "no_geometry")


def test_every_code_is_one_of_the_standard() -> None:
    known = {(code.value, "SCT", code.meaning) for code in standard.SCT.concepts.values()}
    categories = {(code.value, "SCT", code.meaning) for code in standard.cid7150.concepts.values()}
    for meaning in (*MEANINGS.values(), meaning_of("thing")):
        assert meaning.category in categories and meaning.type in known


def test_a_structure_is_known_by_any_of_its_names() -> None:
    for name in ("Liver", "left_kidney", "Lungs", "TUMOUR", "kidney right", "nodule 2"):
        assert meaning_of(name).type[2] != "Tissue", name
    assert meaning_of("thing").type[2] == meaning_of("").type[2] == "Tissue"


# ------------------------------------------------------------------------------------------------------- table


def test_the_table_gives_each_structure_its_volume_and_loses_nobody(tmp_path: Path) -> None:
    codes = np.zeros(SHAPE, np.uint8)
    codes[0, 0, :4], codes[1, 1, 1] = 1, 2
    found = volumes(codes, plan_of(), affine_of())
    assert [(one.voxels, one.ml) for one in found] == [(4, pytest.approx(0.004)), (1, pytest.approx(0.001))]
    drawn = [
        Drawn("s" * 32, ("b.dcm", "=a.dcm"), "mask.nii.gz", found, ("small",)),
        Drawn("t" * 32, (), "m.png", volumes(codes[0], plan_of(Structure("=vessel", (1,))), None)),
    ]
    excluded = [(Exclusion("f-1", "scans", "truncated", "cut off"), "bad.dcm")]
    write_table(tmp_path / "t.csv", *volumes_table(drawn, excluded, named=True))
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "scan,file,structure,voxels,ml,mask,look,reason",
        f"{'s' * 16},'=a.dcm,liver,4,0.004,mask.nii.gz,small,",
        f"{'s' * 16},'=a.dcm,tumour,1,0.001,mask.nii.gz,small,",
        f"{'t' * 16},,'=vessel,4,,m.png,,",
        "f-1,bad.dcm,,,,,,truncated: cut off",
    ]
    assert "file" not in volumes_table(drawn, excluded, named=False)[0]


# -------------------------------------------------------------------------------------------------- real series


@pytest.mark.data
@pytest.mark.parametrize("name", ["mr_t1_study/12-T1post-05670", "mr_t1_study/13_HCropVolume", "dcm_qa_enh/In"])
def test_a_real_series_goes_in_and_its_segmentation_comes_back_on_the_same_voxels(name: str, tmp_path: Path) -> None:
    source = Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "dicom" / name
    files = survey(source, CONFIG)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    ingest(files, CONFIG, NAMES, tmp_path / "first", Store(tmp_path / "ws"))
    scan = next(one for one in read_scans(tmp_path / "first") if one.is_volume)
    own = set(read_origins(tmp_path / "first")[scan.scan_id])
    paths = [file.path for file in files if file.sha256 in own]
    codes = codes_in(scan.shape)
    assert scan.affine is not None
    data = dicom_seg(codes, plan_of(), scan.affine, [source_header(p.read_bytes()) for p in paths], ALGORITHM)

    study = tmp_path / "study"
    for number, path in enumerate(paths):
        write_file(study / f"{number}.dcm", path.read_bytes())
    write_file(study / "seg.dcm", data)
    store = Store(tmp_path / "ws2")
    ingest(survey(study, CONFIG), CONFIG, NAMES, tmp_path / "second", store)
    masks = [one for one in read_scans(tmp_path / "second") if one.mask_of is not None]
    assert [one.region for one in masks] == ["1 liver", "2 tumour"]
    of_file = {item for item, shas in read_origins(tmp_path / "first").items() if own.issuperset(shas)}
    assert {one.mask_of for one in masks} <= of_file  # an enhanced object may hold several volumes in one place
    assert {(one.affine, one.findings) for one in masks} == {(scan.affine, ())}
    for number, one in enumerate(masks, 1):
        assert (PixelStore(store.root / "pixels")(one) == (codes == number)).all()
    if verifier := shutil.which("dciodvfy"):
        said = subprocess.run([verifier, str(study / "seg.dcm")], capture_output=True, text=True, check=False).stderr
        assert not [line for line in said.splitlines() if line.startswith("Error")] and "Segmentation" in said
