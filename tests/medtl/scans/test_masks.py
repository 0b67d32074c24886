"""A mask lies where its image lies, or it is refused."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, FileMetaDataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ct_files import AXIAL, ct_series
from medtl.config import ScansConfig
from medtl.errors import ScanError
from medtl.scans.geometry import Affine
from medtl.scans.masks import STRUCTURES, Grid, Mask, dicom_masks, filled, nifti_mask
from medtl.scans.nifti import as_affine, nifti_header, parse_nifti

hd = pytest.importorskip("highdicom")

Array = np.ndarray[Any, Any]
CONFIG = ScansConfig()
FRAME = generate_uid()
SHAPE = (6, 10, 12)
TILTED = ((0.8, 0.6, 0.0), (-0.6, 0.8, 0.0))
SPACING = (0.5, 0.8, 2.0)  # between columns, rows, slices
CORNER = (-20.0, 15.0, 100.0)


def grid_of(axes: Any = AXIAL, step: float = SPACING[2]) -> Grid:
    """Give the voxels of the series below, straight from the standard's equation."""
    normal = np.cross(*axes)
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2] = (
        np.array(axes[0]) * SPACING[0],
        np.array(axes[1]) * SPACING[1],
        normal * step,
    )
    lps[:3, 3] = CORNER
    return Grid(SHAPE, as_affine(np.diag([-1.0, -1, 1, 1]) @ lps), FRAME)


def ct_images(axes: Any = AXIAL) -> list[Dataset]:
    """Make the slices of a CT series on :func:`grid_of`."""
    columns, rows, slices = SPACING
    empty = np.zeros(SHAPE, np.uint16)
    return ct_series(empty, (rows, columns, slices), CORNER, axes, FrameOfReferenceUID=FRAME)


def segmentation(images: list[Dataset], pixels: Array, kind: str = "BINARY", count: int = 1) -> Dataset:
    """Let highdicom write a DICOM SEG."""
    described = [
        hd.seg.SegmentDescription(
            segment_number=number + 1,
            segment_label=f"region {number + 1}",
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Bone,
            algorithm_type="MANUAL",
        )
        for number in range(count)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hd.seg.Segmentation(
            source_images=images,
            pixel_array=pixels.copy(),  # highdicom scales fractions in place
            segmentation_type=kind,
            segment_descriptions=described,
            series_instance_uid=generate_uid(),
            series_number=2,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="M",
            manufacturer_model_name="M",
            software_versions="1",
            device_serial_number="1",
        )


def structures(
    contours: list[Array], region: str = "liver", frame: str = FRAME, kind: str = "CLOSED_PLANAR"
) -> Dataset:
    """Make an RT Structure Set of one region; contours are (n, 3), LPS mm."""
    dataset = Dataset()
    dataset.SOPClassUID = STRUCTURES
    roi = Dataset()
    roi.ROINumber, roi.ROIName, roi.ROIGenerationAlgorithm = 7, region, "MANUAL"
    roi.ReferencedFrameOfReferenceUID = frame
    dataset.StructureSetROISequence = [roi]
    drawn = Dataset()
    drawn.ReferencedROINumber = 7
    drawn.ContourSequence = []
    for points in contours:
        contour = Dataset()
        contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
        contour.ContourData = [f"{value:.6g}" for value in np.ravel(points)]
        drawn.ContourSequence.append(contour)
    dataset.ROIContourSequence = [drawn]
    return dataset


def contour(corners: list[tuple[float, float]], plane: float, grid: Grid) -> Array:
    """Turn (column, row) corners on a slice into LPS mm."""
    voxels = np.array([[c, r, plane, 1] for c, r in corners], dtype=float).T
    points: Array = (np.diag([-1.0, -1, 1, 1]) @ np.array(grid.affine) @ voxels)[:3].T
    return points


def box(low: float, high: float) -> list[tuple[float, float]]:
    return [(low, low), (high, low), (high, high), (low, high)]


def found(mask: Mask) -> list[str]:
    return [finding.code for finding in mask.findings]


def refusal(dataset: Dataset, grid: Grid) -> str:
    with pytest.raises(ScanError) as caught:
        dicom_masks(dataset, grid, CONFIG)
    return caught.value.code


@pytest.fixture
def blobs() -> Array:
    return (np.random.default_rng(0).random(SHAPE) < 0.3).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- DICOM SEG


@pytest.mark.parametrize("axes", [AXIAL, TILTED])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_a_segmentation_comes_back_voxel_by_voxel(axes: Any, kind: str, blobs: Array) -> None:
    images = ct_images(axes)
    # any order of the files: geometry decides
    (mask,) = dicom_masks(segmentation(images[::-1], blobs[::-1], kind), grid_of(axes), CONFIG)
    assert mask.values.dtype == np.uint8 and (mask.values == blobs).all() and mask.findings == ()
    assert (mask.number, mask.label, mask.algorithm) == (1, "region 1", "MANUAL")
    assert mask.source_series == images[0].SeriesInstanceUID and mask.affine == grid_of(axes).affine


def test_slices_that_were_left_out_are_empty(blobs: Array) -> None:
    blobs[[0, 3, 5]] = 0
    (mask,) = dicom_masks(segmentation(ct_images(), blobs), grid_of(), CONFIG)
    assert (mask.values == blobs).all()


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segments_are_told_apart(kind: str) -> None:
    labels = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
    masks = dicom_masks(segmentation(ct_images(), labels, kind, count=3), grid_of(), CONFIG)
    assert [mask.number for mask in masks] == [1, 2, 3]
    assert all((mask.values == (labels == mask.number)).all() for mask in masks)


def test_a_true_fraction_is_halved_and_said() -> None:
    shares = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    (mask,) = dicom_masks(segmentation(ct_images(), shares, "FRACTIONAL"), grid_of(), CONFIG)
    clear = np.abs(shares - 0.5) > 0.01
    assert (mask.values == (shares >= 0.5))[clear].all() and found(mask) == ["fractional_mask"]


def test_a_flipped_image_grid_gets_the_mask_flipped(blobs: Array) -> None:
    flip = np.array([[-1, 0, 0, SHAPE[2] - 1], [0, 1, 0, 0], [0, 0, -1, SHAPE[0] - 1], [0, 0, 0, 1]])
    turned = Grid(SHAPE, as_affine(np.array(grid_of().affine) @ flip), FRAME)
    (mask,) = dicom_masks(segmentation(ct_images(), blobs), turned, CONFIG)
    assert (mask.values == blobs[::-1, :, ::-1]).all()


def moved(columns: float, grid: Grid) -> Grid:
    shift = np.eye(4)
    shift[0, 3] = columns
    return Grid(grid.shape, as_affine(np.array(grid.affine) @ shift), grid.frame_of_reference)


def test_a_mask_off_by_part_of_a_voxel_is_laid_on_the_nearest_and_said(blobs: Array) -> None:
    (mask,) = dicom_masks(segmentation(ct_images(), blobs), moved(0.3, grid_of()), CONFIG)
    assert (mask.values == blobs).all() and found(mask) == ["mask_geometry"]
    assert "0.30 voxels" in mask.findings[0].reason


@pytest.mark.parametrize(
    "grid",
    [
        grid_of(TILTED),
        grid_of(step=4.0),
        moved(3.0, grid_of()),
        Grid(SHAPE, grid_of().affine, generate_uid()),
        Grid((2, 10, 12), grid_of().affine, FRAME),
        Grid(SHAPE, as_affine(np.array(grid_of().affine) @ np.diag([2.0, 1, 1, 1])), FRAME),
        Grid(SHAPE, as_affine(np.array(grid_of().affine) @ np.diag([1.2, 1, 1, 1])), FRAME),
    ],
    ids=["turned", "thicker", "outside", "other frame", "fewer slices", "wider", "a little wider"],
)
def test_a_mask_of_another_geometry_is_refused(grid: Grid, blobs: Array) -> None:
    assert refusal(segmentation(ct_images(), blobs), grid) == "mask_geometry"


def test_a_mask_without_a_frame_of_reference_or_position_is_refused(blobs: Array) -> None:
    seg = segmentation(ct_images(), blobs)
    del seg.FrameOfReferenceUID
    assert refusal(seg, grid_of()) == "mask_geometry"
    seg = segmentation(ct_images(), blobs)
    del seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert refusal(seg, grid_of()) == "no_geometry"
    seg = segmentation(ct_images(), blobs)
    del seg.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    assert refusal(seg, grid_of()) == "bad_mask"


def test_a_part_of_a_mask_that_was_cut_into_several_is_no_mask(blobs: Array) -> None:
    """What the other parts drew would count as background."""
    seg = segmentation(ct_images(), blobs)
    seg.ConcatenationUID, seg.InConcatenationNumber = "1.2.5", 1
    assert refusal(seg, grid_of()) == "bad_mask"
    seg.InConcatenationTotalNumber = 2
    assert refusal(seg, grid_of()) == "bad_mask"
    seg.InConcatenationTotalNumber = 1
    assert dicom_masks(seg, grid_of(), CONFIG)


def test_an_empty_mask_is_a_mask_and_says_so() -> None:
    nothing = np.zeros(SHAPE, dtype=np.uint8)
    seg = segmentation(ct_images(), nothing)
    (mask,) = dicom_masks(seg, grid_of(), CONFIG)
    assert not mask.values.any() and found(mask) == ["empty_mask"]


def test_frames_on_every_second_slice_are_said(blobs: Array) -> None:
    seg = segmentation(ct_images()[::2], blobs[::2])
    if "SpacingBetweenSlices" in seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]:
        assert refusal(seg, grid_of()) == "mask_geometry"
        del seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    (mask,) = dicom_masks(seg, grid_of(), CONFIG)
    assert found(mask) == ["mask_geometry"] and "frames lie 2 slices apart" in mask.findings[0].reason


def test_two_frames_at_one_place_are_refused(blobs: Array) -> None:
    seg = segmentation(ct_images(), blobs)
    groups = seg.PerFrameFunctionalGroupsSequence
    groups[1].PlanePositionSequence = groups[0].PlanePositionSequence
    assert refusal(seg, grid_of()) == "bad_mask"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda seg: delattr(seg, "SegmentSequence"),
        lambda seg: delattr(seg, "PixelData"),
        lambda seg: setattr(seg, "PixelData", seg.PixelData[:10]),
        lambda seg: setattr(seg, "NumberOfFrames", 5),
        lambda seg: delattr(seg, "SharedFunctionalGroupsSequence"),
        lambda seg: setattr(seg, "SOPClassUID", CTImageStorage),
        lambda seg: delattr(seg.SharedFunctionalGroupsSequence[0], "SegmentIdentificationSequence"),
    ],
)
def test_a_damaged_segmentation_is_refused(break_it: Any, blobs: Array) -> None:
    seg = segmentation(ct_images(), blobs)
    break_it(seg)
    assert refusal(seg, grid_of()) == "bad_mask"


def test_more_masks_than_the_limit_are_refused_before_they_are_made(blobs: Array) -> None:
    seg = segmentation(ct_images(), blobs)
    huge = Grid((30_000, 1000, 1000), grid_of().affine, FRAME)
    assert refusal(seg, huge) == "too_large"


# ------------------------------------------------------------------------------------------ structure sets


@pytest.mark.parametrize("axes", [AXIAL, TILTED])
def test_a_contour_holds_the_voxels_whose_centres_it_holds(axes: Any) -> None:
    grid = grid_of(axes)
    (mask,) = dicom_masks(structures([contour(box(1.5, 5.5), 3, grid)]), grid, CONFIG)
    expected = np.zeros(SHAPE)
    expected[3, 2:6, 2:6] = 1
    assert (mask.values == expected).all() and mask.findings == ()
    assert (mask.number, mask.label, mask.algorithm) == (7, "liver", "MANUAL")


def test_a_contour_inside_another_is_a_hole_and_beside_another_is_a_part() -> None:
    grid = grid_of()
    rings = [contour(box(0.5, 6.5), 1, grid), contour(box(2.5, 4.5), 1, grid), contour(box(7.5, 8.5), 1, grid)]
    (mask,) = dicom_masks(structures(rings), grid, CONFIG)
    assert mask.values.sum() == 36 - 4 + 1 and not mask.values[1, 3:5, 3:5].any() and mask.values[1, 8, 8]


@pytest.mark.parametrize(
    ("drawn", "code", "voxels"),
    [
        (lambda g: contour(box(1.5, 3.5), 2.3, g), "contour_off_plane", 4),
        (lambda g: contour(box(1.5, 3.5), 2, g) + np.outer([0, 0, 1, 1], [0, 0, 1.0]), "contour_off_plane", 0),
        (lambda g: contour(box(1.5, 30), 2, g), "mask_geometry", 80),
        (lambda g: contour(box(1.5, 3.5), 9, g), "mask_geometry", 0),
        (lambda g: contour(box(1.5, 3.5)[:2], 2, g), "open_contour", 0),
    ],
    ids=["between", "tilted", "beyond", "above", "two points"],
)
def test_a_contour_that_does_not_fit_is_said(drawn: Any, code: str, voxels: int) -> None:
    grid = grid_of()
    (mask,) = dicom_masks(structures([drawn(grid)]), grid, CONFIG)
    assert found(mask)[0] == code and mask.values.sum() == voxels


def test_contours_on_every_second_slice_are_said() -> None:
    grid = grid_of()
    (mask,) = dicom_masks(structures([contour(box(1.5, 3.5), k, grid) for k in (0, 2, 4)]), grid, CONFIG)
    assert found(mask) == ["mask_geometry"] and "2 slices apart" in mask.findings[0].reason


def test_points_and_open_contours_enclose_nothing() -> None:
    (mask,) = dicom_masks(structures([contour(box(1, 5), 1, grid_of())], kind="OPEN_PLANAR"), grid_of(), CONFIG)
    assert found(mask) == ["open_contour", "empty_mask"]


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda s: setattr(s.StructureSetROISequence[0], "ReferencedFrameOfReferenceUID", "1.2.3"), "mask_geometry"),
        (lambda s: delattr(s.StructureSetROISequence[0], "ReferencedFrameOfReferenceUID"), "mask_geometry"),
        (lambda s: setattr(s.ROIContourSequence[0], "ReferencedROINumber", 9), "bad_mask"),
        (lambda s: s.ROIContourSequence.append(s.ROIContourSequence[0]), "bad_mask"),
        (lambda s: setattr(s.ROIContourSequence[0].ContourSequence[0], "NumberOfContourPoints", 99), "bad_mask"),
        (lambda s: s.ROIContourSequence[0].ContourSequence[0].ContourData.pop(), "bad_mask"),
        (lambda s: setattr(s.ROIContourSequence[0].ContourSequence[0], "ContourData", ["1e300"] * 12), "bad_mask"),
    ],
)
def test_a_structure_set_that_contradicts_itself_or_its_image_is_refused(break_it: Any, code: str) -> None:
    dataset = structures([contour(box(1, 5), 1, grid_of())])
    break_it(dataset)
    assert refusal(dataset, grid_of()) == code


def test_a_contour_made_to_cost_hours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtl.scans.masks._CROSSINGS", 1000)
    zigzag = [(1.0 + n % 2, 0.5 if n % 2 else 8.5) for n in range(400)]
    assert refusal(structures([contour(zigzag, 1, grid_of())]), grid_of()) == "too_large"


def test_a_region_name_loses_what_is_not_plain_text() -> None:
    (mask,) = dicom_masks(structures([contour(box(1, 5), 1, grid_of())], region="liver\n<b>^x"), grid_of(), CONFIG)
    assert mask.label == "liverbx"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.floats(-3, 14, width=32), st.floats(-3, 12, width=32)), min_size=3, max_size=9),
)
def test_filling_is_even_odd_at_pixel_centres(points: list[tuple[float, float]]) -> None:
    corners = np.array(points, dtype=np.float64)
    edges = np.hstack([corners, np.roll(corners, -1, axis=0)])
    expected = np.zeros((10, 12), dtype=np.uint8)
    for row in range(10):
        for column in range(12):
            left = 0
            for x0, y0, x1, y1 in edges:
                if min(y0, y1) <= row < max(y0, y1):
                    left += x0 + (row - y0) / (y1 - y0) * (x1 - x0) <= column
            expected[row, column] = left % 2
    np.testing.assert_array_equal(filled(edges, (10, 12)), expected)


def test_a_polygon_has_the_area_it_should_have() -> None:
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([255.5 + 200 * np.cos(angle), 255.5 + 200 * np.sin(angle)], axis=1)
    inside = filled(np.hstack([circle, np.roll(circle, -1, axis=0)]), (512, 512))
    assert inside.sum() == pytest.approx(np.pi * 200**2, rel=1e-3)
    assert (inside == inside[::-1]).mean() > 0.999


# ---------------------------------------------------------------------------------------------------- NIfTI


def nifti(values: Array, affine: Affine, slope: float = 1.0, grid: Grid | None = None) -> Mask:
    data = nifti_header(values.shape, values.dtype.str, affine, slope) + values.tobytes()
    return nifti_mask(parse_nifti(data, len(data), CONFIG), values, grid or grid_of())


@pytest.mark.parametrize("kind", ["u1", "i2", "i8", "f4", "f8"])
def test_a_nifti_mask_keeps_its_labels(kind: str) -> None:
    labels = np.random.default_rng(0).integers(0, 3, SHAPE).astype(kind)
    mask = nifti(labels, grid_of(TILTED).affine, grid=grid_of(TILTED))
    assert mask.values.dtype == np.uint8 and (mask.values == labels).all() and mask.findings == ()


def test_labels_above_255_keep_their_number() -> None:
    labels = np.full(SHAPE, 300, dtype=np.int32)
    assert nifti(labels, grid_of().affine).values.max() == 300
    assert nifti(labels, grid_of().affine, slope=2.0).values.max() == 600


@pytest.mark.parametrize("value", [0.5, np.nan, -1.0, 1e9])
def test_what_is_no_label_is_refused(value: float) -> None:
    with pytest.raises(ScanError) as caught:
        nifti(np.full(SHAPE, value, dtype=np.float32), grid_of().affine)
    assert caught.value.code == "bad_mask"


def test_a_nifti_mask_elsewhere_is_refused_and_nearly_there_is_said(blobs: Array) -> None:
    assert found(nifti(blobs, moved(0.2, grid_of()).affine)) == ["mask_geometry"]
    for affine in (moved(1.0, grid_of()).affine, grid_of(TILTED).affine, grid_of(step=2.5).affine):
        with pytest.raises(ScanError) as caught:
            nifti(blobs, affine)
        assert caught.value.code == "mask_geometry"
    with pytest.raises(ScanError, match="shape"):
        nifti(blobs[:3], grid_of().affine)


def test_an_empty_nifti_mask_says_so(blobs: Array) -> None:
    assert found(nifti(blobs * 0, grid_of().affine)) == ["empty_mask"]


# -------------------------------------------------------------------------------------------------- hostile


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "structures"])
def test_mutated_objects_are_read_or_refused_and_nothing_else(kind: str, blobs: Array) -> None:
    grid = grid_of()
    if kind == "structures":
        dataset = structures([contour(box(1.5, 5.5), k, grid) for k in range(4)])
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    else:
        dataset = segmentation(ct_images(), blobs, kind)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=kind != "structures")
    original, rng, outcomes = stream.getvalue(), np.random.default_rng(5), set()
    for _ in range(150):
        data = bytearray(original)
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data) // 8, len(data))] = rng.integers(0, 256)
        try:
            dataset = dcmread(io.BytesIO(bytes(data)), force=True)
        except Exception:
            continue  # reading the file is io.py's matter
        try:
            dicom_masks(dataset, grid, CONFIG)
            outcomes.add("read")
        except ScanError as error:
            outcomes.add(error.code)
    assert outcomes >= {"read", "bad_mask"}


# ----------------------------------------------------------------------------------------------------- data


def highdicom_grid(volume: Any) -> Grid:
    """Give highdicom's volume geometry (slice, row, column -> LPS mm) in our convention."""
    swapped = volume.affine @ np.eye(4)[[2, 1, 0, 3]]
    return Grid(volume.spatial_shape, as_affine(np.diag([-1.0, -1, 1, 1]) @ swapped), volume.frame_of_reference_uid)


@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["ct_binary", "ct_binary_fractional", "ct_binary_overlap", "ct_binary_single_frame", "ct_true_fractional"]
)
def test_real_segmentations_are_as_highdicom_lays_them(name: str) -> None:
    folder = Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "dicom" / "highdicom"
    dataset = dcmread(folder / f"seg_image_{name}.dcm")
    volume = hd.seg.Segmentation.from_dataset(dataset).get_volume(rescale_fractional=True)
    masks = dicom_masks(dataset, highdicom_grid(volume), CONFIG)
    assert masks and any(mask.values.any() for mask in masks)
    for index, mask in enumerate(masks):
        assert (mask.values == (volume.array[..., index] >= 0.5)).all()


@pytest.mark.data
@pytest.mark.parametrize("name", ["seg_image_sm_control.dcm", "seg_image_cr_binary.dcm", "ct_image.dcm"])
def test_what_has_no_place_in_a_patient_is_refused(name: str) -> None:
    dataset = dcmread(Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "dicom" / "highdicom" / name)
    grid = Grid(SHAPE, grid_of().affine)
    assert refusal(dataset, grid) in ("no_geometry", "bad_mask")
