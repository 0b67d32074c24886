"""How scans and masks become the arrays of a segmentation, decided from the training part alone. Pure.

Facts are measured on the training scans and masks, decisions follow from them, each is kept with a reason, and the same
plan is used in training and in the clinic. The rules of spacing, patch, levels and batch are those of nnU-Net
(Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), bounded by a memory budget.

Where the voxels lie: a volume is turned by right angles (``transforms.oriented``) and its *corner* stays where it is,
so voxel i of the grid has its centre at source voxel (i + 0.5) * step - 0.5, where step is grid spacing / source
spacing; there are round(n / step) of them. Values between voxels are linear, beyond the outermost centres constant;
shrinking by more than 1.5 averages over what is covered. Slices of volumes that are shown one by one (2-D) are never
resampled across.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from medtl.config import GridConfig
from medtl.dataset.transforms import Axis, coarsest, luma, meaning, oriented
from medtl.errors import PlanError
from medtl.progress import advance
from medtl.records import AnyArray, FloatArray, GridPlan, IntArray, Scan, Structure

IGNORED = 255  # code of what does not count
MOST_EXCLUDING, MOST_OVERLAPPING = 254, 7  # structures that a code of 8 bits holds beside it
PERCENTILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)  # Nyul & Udupa 2000
_EVEN = 1e-3  # relative difference of two spacings that are one
_SHRINKS = 1.5  # step from which values are averaged, not only interpolated
_ANISOTROPIC = 3.0  # slices so many times as far apart as pixels are seen one by one
_FEW_SLICES = 8
_SAMPLE = 10_000  # values of one volume's foreground that are looked at
_TIE = 1e-6  # shares that differ by rounding alone: background
_AIR = 0.05  # share of a volume that has its least value, from which that value is background
_HOUNSFIELD = -500.0  # no other unit reaches so low
_LEAST_SIDE, _MOST_HALVINGS = 4, 5  # of the network's coarsest level
_MOST_FILTERS = 320
_MAPS = 14  # feature maps of each level that a training step keeps at once, measured on a U-Net of two convolutions
_SIDED, _OFF_CENTRE = 0.9, 0.03  # a structure keeps to one side: in so many studies, so far off the middle

Intensity = Literal["window", "zscore", "nyul", "unit"]


@dataclass(frozen=True, slots=True)
class Lattice:
    """Where the voxels of one scan's grid lie; all of (slices, rows, columns) of the turned volume, or (rows, columns).

    ``steps`` is the grid's spacing by the source's.
    """

    source: tuple[int, ...]  # shape of the turned scan
    shape: tuple[int, ...]  # of the grid
    steps: tuple[float, ...]
    spacing_mm: tuple[float, ...] | None  # of the grid; None: an image's pixels

    @property
    def same(self) -> bool:
        """Tell that nothing is resampled."""
        return all(step == 1 for step in self.steps)


@dataclass(frozen=True)
class Volumes:
    """Packed images and masks of a segmentation, memory-mapped: a crop reads only the pages that it touches."""

    study_ids: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # (channels, *space) of each
    fills: tuple[float, ...]  # least value of each: what lies outside
    counts: tuple[tuple[int, ...], ...]  # places kept of each structure
    values: AnyArray  # float16, one image after the other
    masks: AnyArray  # uint8, one mask after the other
    kept: IntArray  # (places, dimensions of space)

    def __len__(self) -> int:
        return len(self.study_ids)

    def image(self, number: int) -> AnyArray:
        """Give one image, float16 (channels, *space), a view of the file."""
        start, end = self._bounds[0][number : number + 2]
        return self.values[start:end].reshape(self.shapes[number])

    def codes(self, number: int) -> AnyArray:
        """Give one mask's codes, uint8 (*space), a view of the file."""
        start, end = self._bounds[1][number : number + 2]
        return self.masks[start:end].reshape(self.shapes[number][1:])

    def places(self, number: int) -> tuple[IntArray, ...]:
        """Give voxels of each structure, (n, dimensions of space) each; at most some thousand were kept."""
        start, end = self._bounds[2][number : number + 2]
        return tuple(np.split(self.kept[start:end], np.cumsum(self.counts[number])[:-1]))

    @cached_property
    def _bounds(self) -> tuple[IntArray, IntArray, IntArray]:
        sizes = (map(prod, self.shapes), (prod(shape[1:]) for shape in self.shapes), map(sum, self.counts))
        values, masks, kept = (np.cumsum([0, *size]) for size in sizes)
        return values, masks, kept


def lattice_of(scan: Scan, plan: GridPlan) -> Lattice:
    """Tell where the voxels of a scan's grid lie, from its header alone."""
    if plan.axis is None:
        space = scan.shape[:2]
        return Lattice(space, space, (1.0,) * len(space), None)
    source, spacing = _turned(scan, plan.axis)
    assert plan.spacing_mm is not None
    steps = [wanted / own for wanted, own in zip(plan.spacing_mm, spacing, strict=True)]
    if plan.dimensions == 2:
        steps[0] = 1.0
    steps = [1.0 if abs(step - 1) < _EVEN else step for step in steps]
    shape = tuple(max(1, round(n / step)) for n, step in zip(source, steps, strict=True))
    return Lattice(source, shape, tuple(steps), tuple(s * step for s, step in zip(spacing, steps, strict=True)))


def to_grid(pixels: AnyArray, scan: Scan, plan: GridPlan) -> FloatArray:
    """Turn one scan's pixels into normalised values on the plan's grid.

    Args:
        pixels: as stored, (slices, rows, columns), (rows, columns) or (rows, columns, 3).

    Returns:
        float32 (channels, *space): 1 channel, of images in colour 3. Neighbours of slices are taken later.
    """
    if plan.axis is None:
        image = _coloured(meaning(pixels, scan), plan.channels)
        return np.ascontiguousarray(np.moveaxis(normalised(image, plan), -1, 0))
    assert scan.affine is not None
    turned, _ = oriented(normalised(meaning(pixels, scan), plan), scan.affine, plan.axis)
    lattice = lattice_of(scan, plan)
    return np.ascontiguousarray(resampled(turned, lattice.shape, lattice.steps))[None]


def mask_to_grid(pixels: AnyArray, scan: Scan, plan: GridPlan, field: AnyArray | None = None) -> AnyArray:
    """Turn a mask's values into codes on the grid of its scan.

    Of each code the share in a voxel is interpolated, and the largest wins; of overlapping structures each one that
    has more than half.

    Args:
        pixels: the mask's values (:func:`values_of`), in the shape and order of the scan's.
        scan: on whose voxels the mask lies.
        field: values of a mask outside of which (0) nothing counts.

    Returns:
        uint8 (*space), as :func:`codes_of`.
    """
    codes = codes_of(pixels, plan.structures, plan.ignore, field)
    if plan.axis is None:
        return codes
    assert scan.affine is not None
    turned, _ = oriented(codes, scan.affine, plan.axis)
    lattice = lattice_of(scan, plan)
    if lattice.same:
        return np.ascontiguousarray(turned)
    shares = _winning_bits if plan.overlapping else _winning_code
    return shares(turned, lattice)


def values_of(pixels: AnyArray, scan: Scan) -> IntArray:
    """Turn the stored values of a mask into what they mean: whole numbers."""
    if (scan.slope, scan.intercept) == (1.0, 0.0) and pixels.dtype.kind in "iu":
        return pixels
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8)
    whole: IntArray = np.rint(meaning(pixels, scan)).astype(np.int32)
    return whole


def codes_of(
    pixels: AnyArray, structures: Sequence[Structure], ignore: int | None, field: AnyArray | None = None
) -> AnyArray:
    """Code a mask's values, without resampling.

    Structures that exclude each other: 0 background, k the k-th (from 1). Structures that share values: bit k - 1 is
    set for the k-th. 255: does not count (the ignored value, or outside the field).

    Args:
        pixels: whole numbers, any shape.
        field: the same shape; 0 is outside.

    Raises:
        PlanError: more structures than a code holds, values that no structure has, or a field of another shape.
    """
    sharing = overlap(structures)
    most = MOST_OVERLAPPING if sharing else MOST_EXCLUDING
    if len(structures) > most:
        what = "that share values (regions)" if sharing else "in one mask"
        raise PlanError(f"{len(structures)} structures {what}; {most} are the most. Train two models.")
    pixels = pixels.view(np.uint8) if pixels.dtype == bool else pixels
    known = [0, *(value for one in structures for value in one.values), *(() if ignore is None else (ignore,))]
    if pixels.size and (int(pixels.min()) < 0 or int(pixels.max()) > max(known)):
        raise _unknown(pixels, known)
    table = np.full(max(known) + 1, -1, np.int16)
    table[known] = 0
    for number, one in enumerate(structures):
        for value in one.values:
            table[value] = table[value] | (1 << number) if sharing else number + 1
    if ignore is not None:
        table[ignore] = IGNORED
    codes = table[pixels]
    if codes.size and int(codes.min()) < 0:
        raise _unknown(pixels, known)
    codes = codes.astype(np.uint8)
    if field is not None:
        if field.shape != codes.shape:
            raise PlanError("The field of a mask has another shape than the mask. Draw it on the same pixels.")
        codes[field == 0] = IGNORED
    return codes


def shown(codes: AnyArray, number: int, overlapping: bool) -> AnyArray:
    """Tell where codes show one structure (from 0); False where nothing counts."""
    if overlapping:
        found: AnyArray = (codes & np.uint8(1 << number)).astype(bool) & (codes != IGNORED)
        return found
    equal: AnyArray = codes == number + 1
    return equal


def normalised(values: FloatArray, plan: GridPlan) -> FloatArray:
    """Bring the values of one whole scan to the network's scale, as the plan says.

    Args:
        values: what the pixels mean, any shape; changed in place.
    """
    if plan.intensity == "unit":
        assert plan.high is not None
        values /= np.float32(plan.high)
        return values
    if plan.intensity == "zscore":
        body = _body(values)
        mean, std = float(body.mean(dtype=np.float64)), float(body.std(dtype=np.float64))
    else:
        assert plan.mean is not None and plan.std is not None
        mean, std = plan.mean, plan.std
    if plan.intensity == "window":
        np.clip(values, plan.low, plan.high, out=values)
    elif plan.intensity == "nyul":
        values = standardised(values, np.percentile(_body(values), PERCENTILES), plan.landmarks)
    values -= np.float32(mean)
    values /= np.float32(max(std, 1e-8))
    return values


def standardised(values: FloatArray, own: FloatArray, standard: Sequence[float]) -> FloatArray:
    """Bend values so that their landmarks come to lie on the standard ones; the outer two pieces go on.

    Source: Nyul, Udupa, Zhang 2000, doi:10.1109/42.836373.
    """
    own = np.maximum.accumulate(np.asarray(own, np.float64))
    distinct = np.r_[True, np.diff(own) > 1e-9 * max(1.0, abs(float(own[-1])))]
    marks, wanted = own[distinct], np.asarray(standard, np.float64)[distinct]
    if len(marks) < 2:
        return np.full_like(values, wanted[0])
    slopes = np.diff(wanted) / np.diff(marks)
    bent = np.interp(values, marks, wanted).astype(np.float32)
    below, above = values < marks[0], values > marks[-1]
    bent[below] = wanted[0] + (values[below] - marks[0]) * slopes[0]
    bent[above] = wanted[-1] + (values[above] - marks[-1]) * slopes[-1]
    return bent


def resampled(values: FloatArray, shape: Sequence[int], steps: Sequence[float]) -> FloatArray:
    """Resample along each axis: linear between two, the weighted mean of those covered when shrinking by over 1.5.

    Axis by axis and tap by tap, not as a matrix product, whose last bits depend on the number of threads.

    Args:
        values: (*space), float.
        steps: source voxels that one voxel of the result is wide.
    """
    along = [
        None if step == 1 and n == count else taps(count, n, step)
        for count, n, step in zip(values.shape, shape, steps, strict=True)
    ]
    return _mixed(values, along)


def taps(count: int, wanted: int, step: float) -> tuple[IntArray, FloatArray]:
    """Give the source voxels that each of ``wanted`` voxels is made of, and their shares: (taps, wanted) both."""
    centres = (np.arange(wanted) + 0.5) * step - 0.5
    reach = step if step > _SHRINKS else 1.0
    first = np.floor(centres - reach).astype(np.int64) + 1
    places = first + np.arange(int(np.ceil(2 * reach)) + (reach > 1))[:, None]
    weights = np.maximum(0.0, 1 - np.abs(places - centres) / reach)
    weights /= weights.sum(0)
    return np.clip(places, 0, count - 1), weights.astype(np.float32)


def misfit(scan: Scan, plan: GridPlan) -> str | None:
    """Say why a scan is not what the plan was made for, or None."""
    if scan.mask_of is not None:
        return "a mask, and the release takes scans"
    if scan.is_volume != (plan.axis is not None):
        return "a volume, and the release takes images" if scan.is_volume else "an image, and the release takes volumes"
    known = plan.facts.get("modalities")
    if plan.intensity == "window" and known and scan.modality and scan.modality not in known:
        return f"a volume of {scan.modality}, and the plan's window was measured on {' and '.join(known)}"
    if plan.intensity == "unit" and scan.dtype.endswith("u1") != (plan.high == 255):
        return f"the scan has {scan.bits} bits and the plan's scale is of images of another depth"
    return None


def make_grid_plan(
    scans: Sequence[Scan],
    masks: Sequence[Scan],
    read: Callable[[Scan], AnyArray],
    structures: tuple[Structure, ...],
    ignore: int | None,
    config: GridConfig,
    multiple: Sequence[int] = (1,),
) -> GridPlan:
    """Measure the training scans and masks and decide grid, intensity, patch, batch and levels.

    Args:
        scans: of the training part only.
        masks: of the same studies, in the same order.
        read: gives a scan's pixels.
        multiple: what a patch must be a multiple of for the network, one number or one for each dimension.

    Raises:
        PlanError: nothing to plan from, images and volumes together, a wish that these scans cannot fulfil, or a budget
            in which no patch fits.
    """
    volumes = _kind(scans, masks)
    reasons: dict[str, str] = {}
    axis = _axis(scans, reasons) if volumes else None
    spacing = _spacing(scans, axis, config, reasons)
    dimensions = _dimensions(scans, axis, config, reasons)
    channels = _channels(scans, dimensions, volumes, config, reasons)
    facts, samples = _measured(scans, masks, read, structures, ignore, axis)
    chosen = _intensity(facts, volumes, config, reasons)
    low, high, mean, std, landmarks = _scale(chosen, facts, samples, reasons)
    shapes = [_on_grid(scan, axis, spacing, dimensions) for scan in scans]
    facts["median_shape"] = [float(v) for v in np.median(shapes, 0)]
    facts["largest_shape"] = [int(v) for v in np.max(shapes, 0)]
    net = _network(facts, spacing, dimensions, len(structures), config, multiple, reasons)
    batch = _batch(shapes, net, config, reasons)
    mirror = _mirror(facts, axis, dimensions, config, reasons)
    return GridPlan(
        structures, ignore, dimensions, axis, config.neighbours, channels, spacing, chosen, low, high, mean, std,
        landmarks, net.patch, batch, net.strides, net.kernels, net.filters, mirror, facts, reasons,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Network:
    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    filters: tuple[int, ...]
    bytes_of_patch: float
    budget: float  # bytes, less what the weights take


def levels_of(
    patch: Sequence[int], spacing: Sequence[float], exactly: bool = False
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Decide each level's strides and kernels by nnU-Net's rule.

    An axis is halved while 4 or more remain and its spacing is within twice the finest; a kernel is 1 wide along an
    axis until its spacing is.

    Args:
        exactly: halve only what is even: the patch is kept as it is.
    """
    size, gaps = list(patch), [float(s) for s in spacing]
    strides, kernels, kernel = [(1,) * len(size)], [], [1] * len(size)
    while True:
        open_axes = [a for a, n in enumerate(size) if n >= 2 * _LEAST_SIDE and not (exactly and n % 2)]
        finest = min((gaps[a] for a in open_axes), default=0.0)
        halved = [a for a in open_axes if gaps[a] < 2 * finest]
        kernel = [3 if k == 3 or gaps[a] < 2 * min(gaps) else 1 for a, k in enumerate(kernel)]
        kernels.append(tuple(kernel))
        alone = len(size) > 1 and len(halved) == 1 and size[halved[0]] < 3 * _LEAST_SIDE
        if not halved or alone or len(strides) > _MOST_HALVINGS:
            break
        strides.append(tuple(2 if a in halved else 1 for a in range(len(size))))
        size = [-(-n // stride) for n, stride in zip(size, strides[-1], strict=True)]
        gaps = [gap * stride for gap, stride in zip(gaps, strides[-1], strict=True)]
    return tuple(strides), tuple(kernels)


def total_stride(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Give what each side of the network's input must be a multiple of."""
    return tuple(prod(column) for column in zip(*strides, strict=True))


def _kind(scans: Sequence[Scan], masks: Sequence[Scan]) -> bool:
    if not scans or len(scans) != len(masks):
        raise PlanError("There is no training scan with a mask to plan from.")
    volumes = sum(scan.is_volume for scan in scans)
    if volumes not in (0, len(scans)):
        raise PlanError(
            f"{volumes} of {len(scans)} training scans are volumes and the others images; a network learns from one "
            "kind. Take one out of the label table."
        )
    return volumes > 0


def _axis(scans: Sequence[Scan], reasons: dict[str, str]) -> Axis:
    counts: Counter[Axis] = Counter(coarsest(scan.affine) for scan in scans if scan.affine is not None)
    names: tuple[Axis, ...] = ("axial", "coronal", "sagittal")
    chosen = max(names, key=lambda name: counts[name])
    reasons["axis"] = f"{chosen}: {counts[chosen]} of {len(scans)} training volumes are coarsest across it, or even"
    return chosen


def _turned(scan: Scan, axis: Axis) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Give a volume's shape and spacing after turning, without its pixels."""
    assert scan.affine is not None
    hollow, spacing = oriented(np.broadcast_to(np.uint8(0), scan.shape), scan.affine, axis)
    return hollow.shape, spacing


def _spacing(
    scans: Sequence[Scan], axis: Axis | None, config: GridConfig, reasons: dict[str, str]
) -> tuple[float, ...] | None:
    if axis is None:
        if config.spacing_mm is not None:
            raise PlanError("dataset.grid.spacing_mm is of volumes, and pixels of images have no mm. Leave it out.")
        reasons["spacing_mm"] = "none: images keep their pixels"
        return None
    if config.spacing_mm is not None:
        if len(config.spacing_mm) != 3:
            raise PlanError("dataset.grid.spacing_mm has three entries: slices, rows, columns; for instance [1, 1, 1].")
        reasons["spacing_mm"] = "set by the config"
        return config.spacing_mm
    median = np.median([_turned(scan, axis)[1] for scan in scans], 0)
    spacing = tuple(round(float(s), 4) for s in median)
    reasons["spacing_mm"] = f"{_by(spacing)}: the median of {len(scans)} training volumes (slices, rows, columns)"
    return spacing


def _dimensions(scans: Sequence[Scan], axis: Axis | None, config: GridConfig, reasons: dict[str, str]) -> int:
    if axis is None:
        if config.dimensions == 3 or config.neighbours:
            raise PlanError("dataset.grid.dimensions 3 and neighbours are of volumes, and the scans are images.")
        reasons["dimensions"] = "2: the scans are images"
        return 2
    found = [_turned(scan, axis) for scan in scans]
    gap = float(np.median([spacing[0] / min(spacing[1:]) for _, spacing in found]))
    slices = float(np.median([shape[0] for shape, _ in found]))
    if config.dimensions is not None:
        dimensions, why = config.dimensions, "set by the config"
    elif config.neighbours:
        dimensions, why = 2, f"each slice is shown with {config.neighbours} more on each side (2.5-D)"
    elif gap >= _ANISOTROPIC:
        dimensions, why = 2, f"slices are {gap:.1f} times as far apart as pixels, and are seen one by one"
    elif slices < _FEW_SLICES:
        dimensions, why = 2, f"a median of {slices:.0f} slices is too few for a network of three dimensions"
    else:
        dimensions, why = 3, f"slices are {gap:.1f} times as far apart as pixels; from {_ANISOTROPIC:.0f} it would be 2"
    if dimensions == 3 and config.neighbours:
        raise PlanError("dataset.grid.neighbours are channels of slices; a patch of three dimensions sees them all.")
    reasons["dimensions"] = f"{dimensions}: {why}"
    return dimensions


def _channels(
    scans: Sequence[Scan], dimensions: int, volumes: bool, config: GridConfig, reasons: dict[str, str]
) -> int:
    if volumes:
        channels = 2 * config.neighbours + 1 if dimensions == 2 else 1
        reasons["channels"] = f"{channels}: volumes are grey" + (", a slice and its neighbours" if channels > 1 else "")
        return channels
    colour = sum(scan.channels == 3 for scan in scans)
    reasons["channels"] = f"{colour} of {len(scans)} training images are in colour"
    return 3 if colour * 2 > len(scans) else 1


def _measured(
    scans: Sequence[Scan],
    masks: Sequence[Scan],
    read: Callable[[Scan], AnyArray],
    structures: Sequence[Structure],
    ignore: int | None,
    axis: Axis | None,
) -> tuple[dict[str, Any], list[tuple[FloatArray, FloatArray]]]:
    """Measure each training scan: values of its structures and of its body, and where its structures lie."""
    sharing = overlap(structures)
    samples, centres, lows = [], [], []
    for number, (scan, mask) in enumerate(zip(scans, masks, strict=True), 1):
        codes = codes_of(values_of(np.asarray(read(mask)), mask), structures, ignore)
        values = meaning(np.asarray(read(scan)), scan)
        if axis is not None:
            assert scan.affine is not None
            codes, values = (oriented(array, scan.affine, axis)[0] for array in (codes, values))
        if codes.shape != values.shape[: codes.ndim]:
            raise PlanError("A mask has another shape than its scan. Draw it on the same voxels.")
        inside = values[(codes > 0) & (codes != IGNORED)]
        samples.append((_some(inside.reshape(-1)), _some(_body(values))))
        lows.append(float(values.min()))
        centres.append([_centre(shown(codes, k, sharing)) for k in range(len(structures))])
        advance("planning", number, len(scans))
    facts = {
        "images": len(scans),
        "modalities": sorted({scan.modality for scan in scans if scan.modality}),
        "bits": 8 if all(s.dtype.endswith("u1") for s in scans) else max(9, *(s.bits for s in scans)),
        "whole_numbers": all("f" not in scan.dtype for scan in scans),
        "hounsfield": float(np.mean(np.asarray(lows) <= _HOUNSFIELD)),
        "shown": {one.name: sum(c[k] is not None for c in centres) for k, one in enumerate(structures)},
        "sides": [_sides(centres, along) for along in range(3 if axis else 2)],
    }
    return facts, samples


def _centre(inside: AnyArray) -> list[float] | None:
    """Give the centre of what is shown, along each axis from -0.5 to 0.5 of the side."""
    where = np.nonzero(inside)
    if not len(where[0]):
        return None
    return [(float(w.mean()) + 0.5) / n - 0.5 for w, n in zip(where, inside.shape, strict=True)]


def _sides(centres: Sequence[Sequence[list[float] | None]], along: int) -> bool:
    """Tell whether some structure keeps to one side of the scans along an axis."""
    for structure in zip(*centres, strict=True):
        offsets = np.array([one[along] for one in structure if one is not None])
        if len(offsets):
            share = float(np.mean(offsets > 0))
            if max(share, 1 - share) >= _SIDED and abs(float(offsets.mean())) > _OFF_CENTRE:
                return True
    return False


def _intensity(facts: Mapping[str, Any], volumes: bool, config: GridConfig, reasons: dict[str, str]) -> Intensity:
    chosen: Intensity
    if config.intensity != "auto":
        chosen, why = config.intensity, "set by the config"
    elif not volumes:
        chosen, why = "unit", "pictures: 0 to 1 of what their depth can hold"
    elif facts["modalities"] == ["CT"]:
        chosen, why = "window", "CT values are absolute: percentiles of what the structures show"
    elif not facts["modalities"] and facts["hounsfield"] >= _SIDED:
        chosen, why = "window", f"values below {_HOUNSFIELD:.0f} in nearly every volume are Hounsfield units"
    else:
        chosen, why = "zscore", "values have no absolute scale in this modality: mean 0 and deviation 1 of each volume"
    if chosen == "unit" and not facts["whole_numbers"]:
        raise PlanError("Images of fractions have no depth to scale by. Try --set dataset.grid.intensity=zscore")
    reasons["intensity"] = f"{chosen}: {why}"
    return chosen


def _scale(
    chosen: Intensity,
    facts: Mapping[str, Any],
    samples: Sequence[tuple[FloatArray, FloatArray]],
    reasons: dict[str, str],
) -> tuple[float | None, float | None, float | None, float | None, tuple[float, ...]]:
    """Give low, high, mean, deviation and landmarks, as far as this intensity has them."""
    if chosen == "zscore":
        return None, None, None, None, ()
    if chosen == "unit":
        return 0.0, float(2 ** facts["bits"] - 1), None, None, ()
    if chosen == "window":
        inside = np.concatenate([one for one, _ in samples])
        if not len(inside):
            inside = np.concatenate([body for _, body in samples])
            reasons["intensity"] += "; no training mask shows a structure, so of whole volumes"
        low, high = (round(float(v), 4) for v in np.percentile(inside, (0.5, 99.5)))
        return low, high, round(float(inside.mean()), 4), round(max(float(inside.std()), 1e-3), 4), ()
    marks = []
    for _, body in samples:
        own = np.percentile(body, PERCENTILES)
        marks.append((own - own[0]) / max(float(own[-1] - own[0]), 1e-9) * 100)
    landmarks = tuple(round(float(v), 4) for v in np.mean(marks, 0))
    bent = np.concatenate([standardised(body, np.percentile(body, PERCENTILES), landmarks) for _, body in samples])
    return None, None, round(float(bent.mean()), 4), round(max(float(bent.std()), 1e-3), 4), landmarks


def _on_grid(scan: Scan, axis: Axis | None, spacing: tuple[float, ...] | None, dimensions: int) -> tuple[int, ...]:
    """Give the shape of a scan's grid before there is a plan."""
    if axis is None or spacing is None:
        return scan.shape[:2]
    shape, own = _turned(scan, axis)
    sides = tuple(max(1, round(n * s / wanted)) for n, s, wanted in zip(shape, own, spacing, strict=True))
    return (shape[0], *sides[1:]) if dimensions == 2 else sides


def _network(
    facts: Mapping[str, Any],
    spacing: tuple[float, ...] | None,
    dimensions: int,
    structures: int,
    config: GridConfig,
    multiple: Sequence[int],
    reasons: dict[str, str],
) -> _Network:
    """Decide patch and levels: the median shape where it fits the budget twice, else the largest that does."""
    median = [max(1, round(n)) for n in facts["median_shape"][-dimensions:]]
    gaps = (spacing or (1.0, 1.0))[-dimensions:]
    grid = tuple(multiple) * dimensions if len(multiple) == 1 else tuple(multiple)
    budget = config.memory_gb * 2**30
    if config.patch is not None:
        if len(config.patch) != dimensions or any(n % m for n, m in zip(config.patch, grid, strict=True)):
            raise PlanError(
                f"dataset.grid.patch is {_by(config.patch)}; {dimensions} sides are wanted, in multiples of "
                f"{_by(grid)}."
            )
        net = _sized(config.patch, gaps, grid, budget, config, exactly=True)
        reasons["patch"] = f"{_by(net.patch)}: set by the config"
    else:
        raw = list(median)
        net = _sized(raw, gaps, grid, budget, config)
        while 2 * net.bytes_of_patch > net.budget:
            by_mm = sorted(range(dimensions), key=lambda a: -raw[a] * gaps[a])
            longest = next((a for a in by_mm if raw[a] > 2 * _LEAST_SIDE and net.patch[a] > grid[a]), None)
            if longest is None:
                raise PlanError(f"No patch fits into dataset.grid.memory_gb = {config.memory_gb}. Give it more.")
            step = lcm(total_stride(net.strides)[longest], grid[longest])
            raw[longest] = max(2 * _LEAST_SIDE, min(raw[longest], net.patch[longest]) - step)
            net = _sized(raw, gaps, grid, budget, config)
        whole = raw == median
        why = "covers the median training shape" if whole else f"the most that twice fits into {config.memory_gb:g} GB"
        reasons["patch"] = f"{_by(net.patch)}: {why}, in multiples of what the network halves"
    strides = _by(total_stride(net.strides))
    reasons["levels"] = f"{len(net.strides)}: sides are halved while {_LEAST_SIDE} remain, {strides} in all"
    reasons["filters"] = f"{_by(net.filters)}: doubled at each level, {_MOST_FILTERS} at most"
    return net


def _sized(
    patch: Sequence[int],
    gaps: Sequence[float],
    multiple: Sequence[int],
    budget: float,
    config: GridConfig,
    exactly: bool = False,
) -> _Network:
    """Pad a patch to what its levels need and estimate the memory of a training step.

    float32: of each level so many feature maps (:data:`_MAPS`); weights four times (gradient, two moments).
    """
    strides, kernels = levels_of(patch, gaps, exactly)
    steps = [lcm(s, m) for s, m in zip(total_stride(strides), multiple, strict=True)]
    padded = tuple(-(-n // step) * step for n, step in zip(patch, steps, strict=True))
    filters = tuple(min(config.filters * 2**level, max(_MOST_FILTERS, config.filters)) for level in range(len(strides)))
    maps, weights, voxels = 0.0, 0.0, float(prod(padded))
    for level, (stride, kernel) in enumerate(zip(strides, kernels, strict=True)):
        voxels /= prod(stride)
        maps += voxels * filters[level]
        weights += (5 if level + 1 < len(strides) else 1.5) * prod(kernel) * filters[level] ** 2
    return _Network(padded, strides, kernels, filters, 4 * _MAPS * maps, budget - 16 * weights)


def _batch(shapes: Sequence[tuple[int, ...]], net: _Network, config: GridConfig, reasons: dict[str, str]) -> int:
    if config.batch_size is not None:
        reasons["batch_size"] = f"{config.batch_size}: set by the config"
        return config.batch_size
    fits = int(net.budget // net.bytes_of_patch)
    voxels = 0.05 * sum(prod(shape) for shape in shapes) / prod(net.patch)
    most = max(2, min(round(voxels), len(shapes) // 8))
    batch = max(1, min(fits, most))
    held = (
        f"as many as fit into {config.memory_gb:g} GB"
        if batch == fits
        else "5 % of all training voxels, an eighth of the studies, at least 2"
    )
    reasons["batch_size"] = f"{batch}: {held}"
    return batch


def _mirror(
    facts: Mapping[str, Any], axis: Axis | None, dimensions: int, config: GridConfig, reasons: dict[str, str]
) -> tuple[int, ...]:
    every = tuple(range(dimensions))
    if config.mirror is not None:
        reasons["mirror"] = "set by the config"
        return every if config.mirror else ()
    sides = facts["sides"][-dimensions:]
    # left and right are the only two sides of a body that are nearly each other's mirror image
    lateral = {"axial": (dimensions - 1,), "coronal": (dimensions - 1,), "sagittal": (0,) if dimensions == 3 else ()}
    allowed = every if axis is None else lateral[axis]
    mirrored = tuple(a for a in allowed if not sides[a])
    which = "of an image" if axis is None else "of a body: left and right"
    kept = f"; on {len(allowed) - len(mirrored)} a structure keeps to one side" if mirrored != allowed else ""
    reasons["mirror"] = f"{len(mirrored)} axes {which}{kept}"
    return mirrored


def _mixed(values: FloatArray, along: Sequence[tuple[IntArray, FloatArray] | None]) -> FloatArray:
    """Make each voxel of the result of its taps, axis by axis; None: the axis stays."""
    work = [(a, *one) for a, one in enumerate(along) if one is not None]
    for axis, places, weights in sorted(work, key=lambda w: w[1].shape[1] / values.shape[w[0]]):  # what shrinks first
        wide = [1] * values.ndim
        wide[axis] = -1
        out = np.zeros((*values.shape[:axis], places.shape[1], *values.shape[axis + 1 :]), np.float32)
        for chosen, share in zip(places, weights, strict=True):
            if share.any():
                taken = np.take(values, chosen, axis).astype(np.float32, copy=False)
                taken *= share.reshape(wide)
                out += taken
        values = out
    return values


def _winning_code(codes: AnyArray, lattice: Lattice) -> AnyArray:
    out = np.zeros(lattice.shape, np.uint8)
    best, left = np.zeros(lattice.shape, np.float32), np.ones(lattice.shape, np.float32)
    for code, box in enumerate(ndimage.find_objects(codes), 1):
        if box is not None:
            window, share = _share(codes[box] == code, box, lattice)
            left[window] -= share
            out[window][share > best[window]] = code
            np.maximum(best[window], share, out=best[window])
    out[left >= best - _TIE] = 0
    return out


def _winning_bits(codes: AnyArray, lattice: Lattice) -> AnyArray:
    out = np.zeros(lattice.shape, np.uint8)
    bits = [(1 << number, shown(codes, number, overlapping=True)) for number in range(MOST_OVERLAPPING)]
    for code, inside in [*bits, (IGNORED, codes == IGNORED)]:
        for box in ndimage.find_objects(inside.view(np.uint8)):
            window, share = _share(inside[box], box, lattice)
            out[window][share > 0.5] |= np.uint8(code)
    return out


def _share(inside: AnyArray, box: tuple[slice, ...], lattice: Lattice) -> tuple[tuple[slice, ...], FloatArray]:
    """Give the share of the grid's voxels that lies inside, in the window of the grid that a box touches."""
    window, along = [], []
    for one, count, wanted, step in zip(box, lattice.source, lattice.shape, lattice.steps, strict=True):
        places, weights = taps(count, wanted, step)
        weights = weights * ((places >= one.start) & (places < one.stop))
        touched = np.flatnonzero(weights.any(0))
        window.append(slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 0))
        along.append((np.clip(places - one.start, 0, one.stop - one.start - 1)[:, window[-1]], weights[:, window[-1]]))
    return tuple(window), _mixed(inside.astype(np.float32), along)


def _body(values: FloatArray) -> FloatArray:
    """Give a volume's values without its background: the least value, where 5 % or more of it have exactly that."""
    least = values.min()
    inside = values != least
    body: FloatArray = values[inside] if 1 - float(inside.mean()) >= _AIR and inside.any() else values.reshape(-1)
    return body


def _some(values: FloatArray) -> FloatArray:
    return values[:: max(1, len(values) // _SAMPLE)].copy()


def _coloured(image: FloatArray, channels: int) -> FloatArray:
    """Give an image (rows, columns, channels): grey repeated, or colour as ITU-R BT.601 luma."""
    if image.ndim == 2:
        return np.repeat(image[..., None], channels, 2)
    if channels == 1:
        return luma(image)[..., None]
    return image


def overlap(structures: Sequence[Structure]) -> bool:
    """Tell whether structures share values: they are regions, and may share voxels."""
    values = [value for one in structures for value in one.values]
    return len(set(values)) < len(values)


def _unknown(pixels: AnyArray, known: Sequence[int]) -> PlanError:
    others = sorted(set(np.unique(pixels).tolist()) - set(known))
    return PlanError(
        f"A mask holds values that no structure has: {', '.join(map(str, others[:8]))}. Name them in "
        "studies.labels.structures, or one of them as studies.labels.ignore."
    )


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
