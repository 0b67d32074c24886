"""Masks that were drawn elsewhere, laid on an image's own voxels. Pure: datasets and arrays in, arrays out.

A mask that does not lie where its image lies is worse than none: nothing here resamples. Planes that coincide are
copied voxel by voxel; what is off by less than half a voxel is laid on the nearest and comes with a finding; what is
further off, turned, or in another frame of reference is refused. An empty mask is a mask, and says that it is empty.

Frames of a DICOM SEG may be compressed: the caller decides where that decoder runs.
Source: DICOM PS3.3 C.8.20 (segmentation), C.8.8.5 and C.8.8.6 (structure set, ROI contour).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medtl.config import ScansConfig
from medtl.errors import ScanError
from medtl.records import AnyArray, FloatArray, IntArray
from medtl.scans.geometry import Affine, Finding
from medtl.scans.nifti import NiftiHeader

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # also as label map
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS+ from LPS and back
_EXACT = 0.05  # voxels; decimal strings of six digits are off by less over a whole image
_NEAREST = 0.5  # voxels
_SAME_MM = 1e-3  # between the entries of two affines
_CROSSINGS = 200_000_000  # of one region's contours with the rows of the image: seconds of work
_AT_ONCE = 2_000_000
_TEXT = re.compile(r"[^A-Za-z0-9 ._/()+-]")

MaskArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Grid:
    """The voxels of an image: shape (slices, rows, columns); affine, voxel (column, row, slice) -> RAS+ mm."""

    shape: tuple[int, int, int]
    affine: Affine
    frame_of_reference: str | None = None

    @property
    def matrix(self) -> FloatArray:
        """The affine as an array."""
        return np.array(self.affine, dtype=np.float64)

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """One region on the voxels of an image.

    ``values`` has the grid's shape: 1 inside, 0 outside. Where ``number`` is ``None`` (NIfTI) it holds the labels
    themselves, in the smallest unsigned type.
    """

    values: AnyArray
    affine: Affine
    number: int | None  # of the segment or region in its file
    label: str | None
    algorithm: str | None  # AUTOMATIC, SEMIAUTOMATIC, MANUAL
    source_series: str | None  # SeriesInstanceUID of the image it was drawn on; stays in memory
    findings: tuple[Finding, ...] = ()


def dicom_masks(dataset: Dataset, grid: Grid, config: ScansConfig) -> list[Mask]:
    """Give the masks of a DICOM SEG or RT Structure Set on an image's voxels.

    A fractional segment counts as inside where it is half or more. A contour holds the voxels whose centres it holds,
    by the even-odd rule over all contours of a slice, so that a contour inside another is a hole.

    Returns:
        One mask for each segment or region. Findings: ``mask_geometry``, ``empty_mask``; of segments
        ``fractional_mask``; of regions ``contour_off_plane`` and ``open_contour``.

    Raises:
        ScanError: ``mask_geometry``, ``no_geometry``, ``bad_geometry``, ``bad_mask``, ``too_large`` or ``no_decoder``.
    """
    try:
        kind = str(dataset.get("SOPClassUID", ""))
        if dataset.get("ConcatenationUID") and dataset.get("InConcatenationTotalNumber") != 1:
            raise ScanError("bad_mask", "a part of a segmentation that was cut into several: export it in one piece")
        if kind in SEGMENTATIONS:
            return _segments(dataset, grid, config)
        if kind == STRUCTURES:
            return _regions(dataset, grid, config)
    except ScanError:
        raise
    except Exception as error:
        # pydicom decodes a value where it is first asked for, and highdicom trusts what it is told: a hostile header
        # may raise anything, anywhere. Its text may quote the file, so only the kind of error is kept.
        raise ScanError("bad_mask", f"a mask that cannot be read ({type(error).__name__})") from error
    raise ScanError("bad_mask", "neither a DICOM segmentation nor an RT Structure Set")


# ------------------------------------------------------------------------------------------------- DICOM SEG


def _segments(dataset: Dataset, grid: Grid, config: ScansConfig) -> list[Mask]:
    """Lay each segment of a DICOM SEG (binary, fractional or label map) on an image's voxels."""
    seg = _segmentation(dataset)
    _same_frame(seg.get("FrameOfReferenceUID"), grid)
    numbers = [int(number) for number in seg.segment_numbers if int(number) > 0]
    _bound(len(numbers), grid, config)
    if int(seg.Rows) * int(seg.Columns) > config.max_megapixels * 1e6:
        raise ScanError("too_large", "a frame larger than scans.max_megapixels")
    masks = {number: np.zeros(grid.shape, dtype=np.uint8) for number in numbers}
    seen: set[tuple[int, ...]] = set()
    partial: dict[int, int] = {}
    furthest, planes = 0.0, set()
    inverse = np.linalg.inv(grid.matrix)
    for number, frame, plane, between in _frames(seg):
        step, start, off = _onto(inverse @ _LPS @ plane, frame.shape)
        across = int(np.argmin(np.abs(step).sum(axis=1)))
        _check_between(between, across, grid)
        planes.add(start[across])
        furthest = max(furthest, off)
        if (number, *start) in seen:
            raise ScanError("bad_mask", "two frames of one segment lie on each other")
        seen.add((number, *start))
        for segment, inside, uncertain in _segments_of(seg, number, frame):
            if segment not in masks:
                raise ScanError("bad_mask", "a frame belongs to a segment that is not described")
            partial[segment] = partial.get(segment, 0) + uncertain
            _lay(masks[segment], inside, step, start)
    shared = _nearly(furthest) + _sparse(planes, "frames")
    return [_described(seg, number, masks[number], grid, shared, partial.get(number, 0)) for number in numbers]


def _segmentation(dataset: Dataset) -> Any:
    try:
        from highdicom.seg import Segmentation
    except ImportError as error:
        raise ScanError(
            "no_decoder", "DICOM segmentations are read by highdicom: pip install 'medtl[masks]'"
        ) from error
    seg = Segmentation.from_dataset(dataset, copy=False)
    if len(seg.PerFrameFunctionalGroupsSequence) != int(seg.get("NumberOfFrames", 1)):
        raise ScanError("bad_mask", "another number of frames than the header declares")
    return seg


def _frames(seg: Any) -> Iterator[tuple[int, AnyArray, FloatArray, float | None]]:
    """Give each frame's segment (0 in a label map), stored values, plane (LPS mm) and spacing between slices."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    label_map = str(seg.get("SegmentationType")) == "LABELMAP"
    for index, own in enumerate(seg.PerFrameFunctionalGroupsSequence):

        def said(sequence: str, keyword: str, own: Any = own) -> Any:
            for group in (own, shared):
                items = group.get(sequence)
                if items and keyword in items[0]:
                    return items[0].get(keyword)
            return None

        number = 0 if label_map else said("SegmentIdentificationSequence", "ReferencedSegmentNumber")
        plane = _plane(
            said("PlanePositionSequence", "ImagePositionPatient"),
            said("PlaneOrientationSequence", "ImageOrientationPatient"),
            said("PixelMeasuresSequence", "PixelSpacing"),
        )
        between = said("PixelMeasuresSequence", "SpacingBetweenSlices")
        frame = np.asarray(seg.get_stored_frame(index + 1))
        yield int(number), frame, plane, None if between is None else abs(float(between))


def _plane(position: Any, orientation: Any, spacing: Any) -> FloatArray:
    """Give the matrix from (column, row, 0) of a frame to LPS mm. Source: DICOM PS3.3 C.7.6.2.1.1."""
    if position is None or orientation is None or spacing is None:
        raise ScanError("no_geometry", "a frame of the mask has no position, orientation or spacing")
    origin, axes = np.array(position, dtype=np.float64), np.array(orientation, dtype=np.float64).reshape(2, 3)
    between_rows, between_columns = (float(step) for step in spacing)
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1] = axes[0] * between_columns, axes[1] * between_rows
    matrix[:3, 2] = np.cross(axes[0], axes[1])
    if origin.shape != (3,) or not (np.abs(matrix) < 1e6).all() or not (np.abs(origin) < 1e6).all():
        raise ScanError("bad_geometry", "position, orientation or spacing of the mask are not finite")
    matrix[:3, 3] = origin
    return matrix


def _onto(steps: FloatArray, shape: tuple[int, ...]) -> tuple[IntArray, tuple[int, ...], float]:
    """Find the whole voxels that a frame's pixels fall on.

    Returns:
        Step of the voxel index per column and per row of the frame, shape (3, 2); index of its first pixel; how far
        the furthest pixel lies from its voxel's centre, in voxels along the worst axis.
    """
    step, start = np.rint(steps[:3, :2]), np.rint(steps[:3, 3])
    along = np.abs(step).sum(axis=0)
    if (along != 1).any() or (np.abs(step).sum(axis=1) > 1).any():
        raise ScanError("mask_geometry", "pixels of the mask are turned, or of another size, against the image's")
    far = np.abs(steps[:3, :2] - step) @ [shape[1] - 1, shape[0] - 1] + np.abs(steps[:3, 3] - start)
    off = float(far.max())
    if off > _NEAREST:
        raise ScanError("mask_geometry", f"the mask lies {off:.2f} voxels away from the voxels of the image")
    return step.astype(np.int64), tuple(int(index) for index in start), off


def _check_between(between: float | None, across: int, grid: Grid) -> None:
    """Refuse frames that are spaced otherwise than the image's slices: what lies between would stay empty."""
    spacing = float(np.linalg.norm(grid.matrix[:3, across]))
    if between and abs(between - spacing) > 0.02 * spacing and grid.shape[2 - across] > 1:
        raise ScanError("mask_geometry", f"planes of the mask are {between:.3f} mm apart, the image's {spacing:.3f} mm")


def _segments_of(seg: Any, number: int, frame: AnyArray) -> Iterator[tuple[int, npt.NDArray[np.bool_], int]]:
    """Give the segments of one frame: number, where it is inside, and how many pixels are partly inside."""
    if number == 0:
        background = int(seg.get("PixelPaddingValue", 0) or 0)
        for value in np.unique(frame):
            if value not in (0, background):
                yield int(value), frame == value, 0
        return
    if str(seg.get("SegmentationType")) != "FRACTIONAL":
        yield number, frame != 0, 0
        return
    most = int(seg.get("MaximumFractionalValue") or 0)
    if most < 1 or frame.max(initial=0) > most:
        raise ScanError("bad_mask", "fractional values exceed the maximum that the header declares")
    yield number, frame >= most / 2, int(np.count_nonzero((frame > 0) & (frame < most)))


def _lay(mask: MaskArray, inside: npt.NDArray[np.bool_], step: IntArray, start: tuple[int, ...]) -> None:
    rows, columns = np.nonzero(inside)
    if not rows.size:
        return
    column, row, plane = (step[a, 0] * columns + step[a, 1] * rows + start[a] for a in range(3))
    for index, side in zip((plane, row, column), mask.shape, strict=True):
        if index.min() < 0 or index.max() >= side:
            raise ScanError("mask_geometry", "the mask reaches out of the image")
    mask[plane, row, column] = 1


def _described(
    seg: Any, number: int, values: MaskArray, grid: Grid, findings: tuple[Finding, ...], partial: int
) -> Mask:
    description = seg.get_segment_description(number)
    if partial:
        reason = f"{partial} voxels are partly inside; half and more counts as inside"
        findings += (Finding("fractional_mask", reason),)
    series = [item.get("SeriesInstanceUID") for item in seg.get("ReferencedSeriesSequence") or ()]
    return Mask(
        values=values,
        affine=grid.affine,
        number=number,
        label=_shown(description.get("SegmentLabel")),
        algorithm=_shown(description.get("SegmentAlgorithmType")),
        source_series=str(series[0]) if len(series) == 1 and series[0] else None,
        findings=findings + _emptiness(values),
    )


# ------------------------------------------------------------------------------------------ RT Structure Sets


def _regions(dataset: Dataset, grid: Grid, config: ScansConfig) -> list[Mask]:
    """Fill the closed contours of each region of an RT Structure Set on an image's voxels."""
    regions = list(dataset.get("StructureSetROISequence") or ())
    _bound(len(regions), grid, config)
    drawn: dict[int, Any] = {}
    for item in dataset.get("ROIContourSequence") or ():
        number = int(item.get("ReferencedROINumber"))
        if number in drawn:
            raise ScanError("bad_mask", "a region is drawn twice")
        drawn[number] = item
    numbers = [int(region.get("ROINumber")) for region in regions]
    if len(set(numbers)) < len(numbers) or not set(drawn) <= set(numbers):
        raise ScanError("bad_mask", "a region is described twice, or drawn and not described")
    series = _contoured_on(dataset)
    masks = []
    for number, region in zip(numbers, regions, strict=True):
        _same_frame(region.get("ReferencedFrameOfReferenceUID"), grid)
        contours = list(drawn[number].get("ContourSequence") or ()) if number in drawn else []
        values, findings = _fill(contours, grid)
        masks.append(
            Mask(
                values=values,
                affine=grid.affine,
                number=number,
                label=_shown(region.get("ROIName")),
                algorithm=_shown(region.get("ROIGenerationAlgorithm")),
                source_series=series,
                findings=findings + _emptiness(values),
            )
        )
    return masks


def _fill(contours: Sequence[Any], grid: Grid) -> tuple[MaskArray, tuple[Finding, ...]]:
    inverse = np.linalg.inv(grid.matrix) @ _LPS
    slices, rows, columns = grid.shape
    edges: dict[int, list[FloatArray]] = {}
    open_, tilted, between, outside = 0, 0, 0, 0
    for contour in contours:
        points = _points(contour)
        if not str(contour.get("ContourGeometricType", "")).startswith("CLOSED") or len(points) < 3:
            open_ += 1
            continue
        column, row, depth = inverse[:3, :3] @ points.T + inverse[:3, 3:]
        plane = round(float(np.median(depth)))
        if np.ptp(depth) > 2 * _EXACT:
            tilted += 1
            continue
        between += bool(np.abs(depth - plane).max() > _EXACT)
        inside = column.min() >= -1 and row.min() >= -1 and column.max() <= columns and row.max() <= rows
        outside += not (inside and 0 <= plane < slices)
        if 0 <= plane < slices:
            here = np.stack([column, row], axis=1)
            edges.setdefault(plane, []).append(np.hstack([here, np.roll(here, -1, axis=0)]))
    _check_work(edges, rows)
    values = np.zeros(grid.shape, dtype=np.uint8)
    for plane, lines in edges.items():
        values[plane] = filled(np.concatenate(lines), (rows, columns))
    told = [
        (open_, "open_contour", "contours are open, points or of fewer than three points, and enclose nothing"),
        (tilted, "contour_off_plane", "contours are not parallel to the slices and were left out"),
        (between, "contour_off_plane", "contours lie between slices and were laid on the nearest"),
        (outside, "mask_geometry", "contours reach out of the image and were cut off"),
    ]
    findings = [Finding(code, f"{count} {reason}") for count, code, reason in told if count]
    return values, (*findings, *_sparse(set(edges), "contours"))


def _points(contour: Any) -> FloatArray:
    """Give the points of a contour, shape (n, 3), LPS mm."""
    flat = np.array(contour.get("ContourData") or (), dtype=np.float64).reshape(-1)
    declared = contour.get("NumberOfContourPoints")
    if flat.size % 3 or (declared is not None and int(declared) * 3 != flat.size):
        raise ScanError("bad_mask", "a contour has fewer or more points than it declares")
    if not (np.abs(flat) < 1e6).all():
        raise ScanError("bad_mask", "a contour holds points that are not finite")
    return flat.reshape(-1, 3)


def _check_work(edges: dict[int, list[FloatArray]], rows: int) -> None:
    crossings = sum(
        float(np.clip(np.abs(line[:, 3] - line[:, 1]) + 1, 0, rows).sum()) for lines in edges.values() for line in lines
    )
    if crossings > _CROSSINGS:
        raise ScanError("too_large", "contours with more edges than any region needs")


def filled(edges: FloatArray, shape: tuple[int, int]) -> MaskArray:
    """Fill polygons by the even-odd rule: a pixel is inside where its centre is; a left or upper border counts.

    Args:
        edges: column and row of both ends of each edge, shape (n, 4), in pixels; pixel centres are whole numbers.
        shape: (rows, columns).

    Returns:
        1 inside, 0 outside.

    Source: J. D. Foley et al., Computer Graphics, 3.5 (scan conversion by parity of the crossings to the left).
    """
    rows, columns = shape
    x0, y0, x1, y1 = edges.T
    first = np.clip(np.ceil(np.minimum(y0, y1)), 0, rows).astype(np.int64)
    count = np.maximum(np.clip(np.ceil(np.maximum(y0, y1)), 0, rows).astype(np.int64) - first, 0)
    flips = np.zeros(rows * (columns + 1), dtype=np.int64)
    batch = max(_AT_ONCE // rows, 1)
    for at in range(0, len(edges), batch):
        part = slice(at, at + batch)
        edge = np.repeat(np.arange(len(count[part])), count[part])
        before = np.cumsum(count[part]) - count[part]
        row = first[part][edge] + np.arange(edge.size) - before[edge]
        share = (row - y0[part][edge]) / (y1[part] - y0[part])[edge]
        column = x0[part][edge] + share * (x1[part] - x0[part])[edge]
        index = row * (columns + 1) + np.clip(np.ceil(column), 0, columns).astype(np.int64)
        flips += np.bincount(index, minlength=flips.size)
    parity = np.cumsum(flips.reshape(rows, columns + 1)[:, :columns], axis=1) % 2
    return parity.astype(np.uint8)


def drawn_on(dataset: Dataset) -> str | None:
    """Give the one image series that a segmentation or structure set refers to; None: none, or several."""
    named = {str(item.get("SeriesInstanceUID") or "") for item in dataset.get("ReferencedSeriesSequence") or ()} - {""}
    if named:
        return named.pop() if len(named) == 1 else None
    return _contoured_on(dataset)


def frames_of_reference(dataset: Dataset) -> set[str]:
    """Give the frames of reference in which something is drawn."""
    items = [dataset, *(dataset.get("ReferencedFrameOfReferenceSequence") or ())]
    return {str(item.get("FrameOfReferenceUID") or "") for item in items} - {""}


def _contoured_on(dataset: Dataset) -> str | None:
    found = {
        str(series.get("SeriesInstanceUID"))
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
        for study in frame.get("RTReferencedStudySequence") or ()
        for series in study.get("RTReferencedSeriesSequence") or ()
        if series.get("SeriesInstanceUID")
    }
    return found.pop() if len(found) == 1 else None


# -------------------------------------------------------------------------------------------------- NIfTI


def nifti_mask(header: NiftiHeader, values: AnyArray, grid: Grid) -> Mask:
    """Check that a NIfTI volume is a mask of an image: whole labels from 0, on the very same voxels.

    Args:
        header: of the mask's file; its affine is compared with the grid's, entry by entry, within 0.001 mm.
        values: stored values of its one volume, shape (slices, rows, columns).

    Returns:
        One mask whose values are the labels. Findings: ``mask_geometry`` (off by less than half a voxel),
        ``empty_mask``, and those of the header.

    Raises:
        ScanError: ``mask_geometry`` or ``bad_mask``.
    """
    if header.volumes != 1 or header.channels != 1:
        raise ScanError("bad_mask", "a mask is one grey volume")
    if header.shape != grid.shape or values.shape != grid.shape:
        raise ScanError("mask_geometry", f"the mask has shape {header.shape}, its image {grid.shape}")
    findings = header.findings
    own, image = np.array(header.affine, dtype=np.float64), grid.matrix
    if np.abs(own - image).max() > _SAME_MM:
        far = _furthest(np.linalg.inv(image) @ own, grid.shape)
        if far > _NEAREST:
            raise ScanError("mask_geometry", f"the mask lies up to {far:.2f} voxels away from its image")
        findings += _nearly(far, least=0.0)
    labels = _labels(values, header.slope, header.intercept)
    return Mask(labels, grid.affine, None, None, None, None, findings + _emptiness(labels))


def _labels(values: AnyArray, slope: float, intercept: float) -> AnyArray:
    """Give the labels in the smallest unsigned type that holds them."""
    if (slope, intercept) != (1.0, 0.0):
        values = values * np.float64(slope) + np.float64(intercept)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise ScanError("bad_mask", "a mask whose values are not whole numbers: an image, or a map of probabilities")
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise ScanError("bad_mask", "a mask with labels below 0 or above 65,535")
    return values.astype(np.uint8 if high <= np.iinfo(np.uint8).max else np.uint16)


def _furthest(between: FloatArray, shape: tuple[int, int, int]) -> float:
    """Give how far a corner voxel moves, in voxels along the worst axis."""
    sides = [side - 1 for side in reversed(shape)]
    corners = np.array([[x, y, z, 1] for x in (0, sides[0]) for y in (0, sides[1]) for z in (0, sides[2])]).T
    return float(np.abs(between @ corners - corners).max())


# -------------------------------------------------------------------------------------------------- of all


def _nearly(off: float, least: float = _EXACT) -> tuple[Finding, ...]:
    if off <= least:
        return ()
    return (Finding("mask_geometry", f"the mask lies up to {off:.2f} voxels off and was laid on the nearest"),)


def _emptiness(values: AnyArray) -> tuple[Finding, ...]:
    return () if values.any() else (Finding("empty_mask", "the mask holds no voxel"),)


def _sparse(planes: set[int], what: str) -> tuple[Finding, ...]:
    """See that a mask was not drawn on every second slice, which would leave the ones between empty."""
    steps = np.diff(sorted(planes))
    if steps.size < 2 or steps.min() < 2:
        return ()
    return (Finding("mask_geometry", f"{what} lie {steps.min()} slices apart or more, with nothing between them"),)


def _same_frame(frame: Any, grid: Grid) -> None:
    if grid.frame_of_reference is None:
        return
    if not frame:
        raise ScanError("mask_geometry", "the mask does not say in which frame of reference it is drawn")
    if str(frame) != grid.frame_of_reference:
        raise ScanError("mask_geometry", "the mask is drawn in another frame of reference than its image's")


def _bound(regions: int, grid: Grid, config: ScansConfig) -> None:
    megabytes = regions * grid.voxels / 1e6
    if megabytes > config.max_volume_mb:
        raise ScanError(
            "too_large",
            f"{regions} masks of {megabytes:.0f} MB, more than scans.max_volume_mb = {config.max_volume_mb:g}",
        )


def _shown(text: Any) -> str | None:
    return _TEXT.sub("", str(text or "")).strip()[:64] or None
