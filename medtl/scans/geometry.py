"""Planes become volumes. Pure: no pixel and no file is needed.

::

    headers ─▶ group (what belongs in one volume) ─▶ build (order, spacing, affine) ─▶ Volume ─▶ checks.check_volume

Order, spacing and affine come from positions along the slice normal, never from InstanceNumber or file names. The
affine maps voxel (column, row, slice) to RAS+ millimetres; DICOM's own axes are LPS. Its third column is the measured
step from slice to slice: of a tilted stack it is sheared, as the stack is. Nothing is judged here: a stack with a hole
is built like any other, and :mod:`medtl.scans.checks` finds the hole. Source: DICOM PS3.3 C.7.6.2.1.1.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np

from medtl.errors import ScanError
from medtl.records import AnyArray, FloatArray, IntArray
from medtl.scans.headers import Header, Plane

Affine = tuple[tuple[float, float, float, float], ...]
Member = tuple[int, int]  # index of the header, index of the frame in it
Splits = tuple[tuple[str, str], ...]
_Value = TypeVar("_Value", bound=Hashable)

MAX_SPACING_MM = 100.0
MAX_POSITION_MM = 10_000.0
GAP_TOLERANCE = 0.01  # of the gap; also what is left of a gap when two slices count as one place
ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine, about 0.06 degrees
SPACING_TOLERANCE = 1e-3  # of the pixel spacing
TILT_DEGREES = 0.1  # less is rounding, if it also moves the last slice by less than TILT_PIXELS
TILT_PIXELS = 0.25
WRITTEN_MM = (0.1, 0.01, 0.001)  # last digits that positions are commonly rounded to

# What always makes another volume, in the order in which it names it.
STRONG = (
    "StackID",
    "ComplexImageComponent",
    "EchoNumbers",
    "EchoTime",
    "EffectiveEchoTime",
    "DiffusionBValue",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
)
# What differs from slice to slice in plain series too: it counts only where it alone tells repeated positions apart.
WEAK = ("AcquisitionNumber", "TriggerTime")
_TIMES = ("EchoTime", "EffectiveEchoTime")  # the same echo is written 2.46 and 2.462
_ECHO_TOLERANCE = 0.01
_COMPONENTS = frozenset({"M", "P", "R", "I", "MAGNITUDE", "PHASE", "REAL", "IMAGINARY", "W", "F", "WATER", "FAT"})
_LINE = np.array([0.37, 0.59, 0.83, 0.71, 0.43, 0.97, 0.31, 0.53])  # any direction that no axis has
BY_ORDER = ("InstanceNumber", "TriggerTimeRank")  # splits that rest on an order, not on a value: see `split_by_order`


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a check saw. The policy of its code decides what becomes of the scan; see ``checks.CODES``.

    ``reason`` is one sentence for a person; it holds no name and no identifier.
    """

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Volume:
    """One volume of a series: which frames in which order, and where they lie.

    ``members`` are (index of the header, index of the frame in it), in slice order. ``shape`` is (slices, rows,
    columns). ``affine`` is 4 x 4, rows of floats, voxel (column, row, slice) -> RAS+ mm. ``spacing_mm`` is of columns,
    rows, slices.
    """

    members: tuple[tuple[int, int], ...]
    shape: tuple[int, int, int]
    affine: Affine
    spacing_mm: tuple[float, float, float]
    splits: tuple[tuple[str, str], ...] = ()  # what tells it from the other volumes of its series
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Frames that belong together, in the order of their headers.

    ``is_stack``: all of them are grey and have a sound place in space, so that :func:`build` can make a volume.
    """

    members: tuple[Member, ...]
    is_stack: bool
    splits: Splits = ()


def group(headers: Sequence[Header]) -> tuple[Group, ...]:
    """Sort frames into what can be one volume each.

    Frames of one group share patient, study, series, frame of reference, kind of pixel, matrix, pixel spacing and
    orientation, and whatever splits a series honestly: stack, component (magnitude, phase), echo, b-value, temporal
    position. Where positions still repeat, they are told apart by image type, by the multi-frame object, by what else
    differs (InversionTime, FlipAngle ...) where each of its values has the same places, by AcquisitionNumber or
    TriggerTime only if that alone gives volumes with the same places, or as a last resort by the order of
    InstanceNumber, if that runs through all places again and again. Where nothing does, the repeated positions stay in
    one group, for the check to find. A mosaic, and frames without a sound place, are no stack.

    The result does not depend on the order of the headers, but for the indices in it.
    """
    kinds: dict[Hashable, list[Member]] = defaultdict(list)
    lost: dict[Hashable, list[Member]] = defaultdict(list)
    for index, header in enumerate(headers):
        kind = _kind(header, index)
        if header.mosaic:
            lost[kind, index].append((index, 0))
            continue
        for frame in range(header.frames):
            sound = frame < len(header.planes) and header.samples == 1 and fault(header.planes[frame]) is None
            (kinds if sound else lost)[kind].append((index, frame))
    groups = [Group(tuple(members), False) for members in lost.values()]
    for members in kinds.values():
        for aligned in _aligned(headers, members):
            groups += _split(headers, aligned)
    return tuple(sorted(groups, key=lambda one: one.members[0]))


def build(headers: Sequence[Header], stack: Group) -> Volume:
    """Order a group along its normal and measure where it lies.

    Slices go up along the normal (row direction x column direction). Slices at one place follow each other by what
    their headers say, so that the order of the files does not matter.

    Raises:
        ScanError: ``no_geometry`` for a group that is no stack, ``single_slice`` where one slice has no known depth.
    """
    if not stack.is_stack:
        raise ScanError("no_geometry", "frames without a sound position, orientation and pixel spacing, or a mosaic")
    placed = measure(headers, stack.members)
    planes, order = placed.planes, placed.order
    first = planes[order[0]]
    row, column, normal = placed.axes
    between_rows, between_columns = first.spacing_mm or (math.nan, math.nan)
    step = placed.step_mm
    if step is None:
        depth = next((mm for mm in (first.thickness_mm, first.between_mm) if mm and 0 < mm <= MAX_SPACING_MM), None)
        if depth is None:
            raise ScanError("single_slice", "one slice, and its header does not say how thick it is")
        step = normal * depth
    header = headers[stack.members[0][0]]
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2] = row * between_columns, column * between_rows, step
    matrix[:3, 3] = placed.positions_mm[order[0]]
    matrix[:2] *= -1.0  # LPS -> RAS
    return Volume(
        members=tuple(stack.members[i] for i in order),
        shape=(len(order), header.rows, header.columns),
        affine=as_rows(matrix),
        spacing_mm=(between_columns, between_rows, float(np.linalg.norm(step))),
        splits=stack.splits,
    )


def assemble(headers: Sequence[Header]) -> tuple[Volume, ...]:
    """Build every volume of two or more slices, unjudged; frames that are in none of them are single images."""
    return tuple(build(headers, one) for one in group(headers) if one.is_stack and len(one.members) > 1)


def fault(plane: Plane) -> str | None:
    """Say what is wrong with the place of a frame, or ``None``.

    ``missing`` where there is no position, orientation or pixel spacing; otherwise a phrase for a person.
    """
    if plane.position_mm is None or plane.orientation is None or plane.spacing_mm is None:
        return "missing"
    rx, ry, rz, cx, cy, cz = plane.orientation
    (x, y, z), (between_rows, between_columns) = plane.position_mm, plane.spacing_mm
    if not math.isfinite(x + y + z + rx + ry + rz + cx + cy + cz + between_rows + between_columns):
        return "numbers that are not finite"
    if max(x, y, z) > MAX_POSITION_MM or min(x, y, z) < -MAX_POSITION_MM:
        return f"a position more than {MAX_POSITION_MM / 1000:g} m from the origin"
    if not (0 < between_rows <= MAX_SPACING_MM and 0 < between_columns <= MAX_SPACING_MM):
        return f"a pixel spacing outside of 0 to {MAX_SPACING_MM:g} mm"
    row, column = rx * rx + ry * ry + rz * rz, cx * cx + cy * cy + cz * cz
    if not (abs(row - 1) <= 0.01 and abs(column - 1) <= 0.01 and abs(rx * cx + ry * cy + rz * cz) <= 0.01):
        return "row and column directions that are not perpendicular unit vectors"
    return None


@dataclass(frozen=True, slots=True)
class Placed:
    """Frames and where they lie along their normal; the arrays follow the order of the members."""

    planes: tuple[Plane, ...]
    axes: FloatArray  # row direction, column direction, normal; (3, 3), LPS, unit vectors
    positions_mm: FloatArray  # (n, 3), LPS
    heights_mm: FloatArray  # along the normal, (n,)
    order: IntArray  # of the members, upwards
    places: IntArray  # which place from below each member has, (n,)
    step_mm: FloatArray | None  # mean step from place to place, (3,), LPS; None where there is one place

    @property
    def levels(self) -> IntArray:
        """One member of every place, upwards."""
        first: IntArray = self.order[np.diff(self.places[self.order], prepend=-1) > 0]
        return first

    @property
    def gaps_mm(self) -> FloatArray:
        """Distances between neighbouring places along the normal, upwards."""
        return np.diff(self.heights_mm[self.levels])


def measure(headers: Sequence[Header], members: Sequence[Member]) -> Placed:
    """Find order, places and steps of frames that share an orientation.

    Slices closer to each other than 1 % of the median gap share a place.
    """
    planes = tuple(headers[index].planes[frame] for index, frame in members)
    positions = np.array([plane.position_mm for plane in planes], dtype=np.float64)
    directions = np.median(np.array([plane.orientation for plane in planes], dtype=np.float64), axis=0)
    row = directions[:3] / np.linalg.norm(directions[:3])
    column = directions[3:] - row * (row @ directions[3:])
    column /= np.linalg.norm(column)
    normal = np.cross(row, column)
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    gaps = np.diff(heights[order])
    apart = gaps[gaps > 1e-3]
    closest = max(1e-3, GAP_TOLERANCE * float(np.median(apart))) if len(apart) else 1e-3
    rising = np.concatenate(([0], np.cumsum(gaps > closest)))
    places = np.empty(len(members), dtype=np.intp)
    places[order] = rising
    if rising[-1] < len(members) - 1:  # some share a place: what the headers say decides, not the order of the files
        order = np.array(sorted(range(len(members)), key=lambda i: (places[i], _rank(headers, members[i]))))
    steps = int(rising[-1])
    step = (positions[order[-1]] - positions[order[0]]) / steps if steps else None
    return Placed(planes, np.array([row, column, normal]), positions, heights, order, places, step)


def unevenness(placed: Placed) -> float:
    """Tell by how much a gap differs from the median gap, as a share of it; 0 where rounding explains it.

    Old scanners write positions to a tenth of a millimetre: gaps of 1.2 and 1.3 mm are then one gap of 1.25 mm, which
    shows in that every slice lies within about half a digit of an even grid. What they add to it (a corner's distance
    from the middle) has more digits, so it is steps that are looked at. (1e-4: numbers of six figures, or of float32.)
    """
    gaps = placed.gaps_mm
    if len(gaps) < 2:
        return 0.0
    median = float(np.median(gaps))
    share = float(np.max(np.abs(gaps - median))) / median
    if share <= GAP_TOLERANCE:
        return share
    written = placed.positions_mm[:, np.ptp(placed.positions_mm, axis=0) > 1e-4]  # where they differ at all
    steps = written - written[:1]
    digit = next((mm for mm in WRITTEN_MM if np.allclose(steps, np.round(steps / mm) * mm, rtol=0, atol=1e-4)), 0.0)
    if not 0 < digit <= median / 3:  # a missing slice moves the others by half a gap: that must stay visible
        return share
    heights, places = placed.heights_mm[placed.levels], np.arange(len(gaps) + 1)
    grid = np.polyval(np.polyfit(places, heights, 1), places)
    most = 0.65 * digit * float(np.sum(np.abs(placed.axes[2])))  # an oblique height is made of up to three digits
    return 0.0 if float(np.max(np.abs(heights - grid))) <= most else share


def displacement_mm(placed: Placed) -> float:
    """Tell how far, within its plane, a slice lies from the straight line through the first and the last one."""
    if placed.step_mm is None:
        return 0.0
    normal, first = placed.axes[2], placed.positions_mm[placed.order[0]]
    along = (placed.heights_mm - placed.heights_mm[placed.order[0]]) / float(placed.step_mm @ normal)
    away = placed.positions_mm - first - along[:, None] * placed.step_mm
    return float(np.max(np.linalg.norm(away, axis=1)))


def shear(volume: Volume) -> tuple[float, float, float]:
    """Measure the tilt of a volume from its affine.

    Returns:
        The angle in degrees between the step from slice to slice and the normal, and how far one step moves along
        columns and along rows, in voxels.
    """
    axes, step = _axes(volume)
    x, y, z = (float(value) for value in axes @ step)
    return math.degrees(math.atan2(math.hypot(x, y), z)), x / volume.spacing_mm[0], y / volume.spacing_mm[1]


def is_tilted(volume: Volume) -> bool:
    """Tell a tilted stack from one whose positions are only rounded."""
    angle, along_columns, along_rows = shear(volume)
    drift = math.hypot(along_columns, along_rows) * (volume.shape[0] - 1)
    return angle > TILT_DEGREES and drift > TILT_PIXELS


def untilt(values: AnyArray, volume: Volume, fill: float) -> tuple[AnyArray, Volume]:
    """Resample a tilted stack onto a grid with right angles.

    Each slice moves within its own plane, by linear interpolation, and the frame grows so that nothing is cut off.
    This is a resampling: values between pixels are blends, and noise is smoothed. Integer values are rounded.

    Args:
        values: shape (slices, rows, columns).
        fill: value outside of the scanned region (for CT: air, as stored).

    Returns:
        The new values and the volume they make; its slices are the same members.

    Raises:
        ScanError: ``volume`` where the values do not have the volume's shape.
    """
    if values.shape != volume.shape:
        raise ScanError("volume", f"values of shape {values.shape} for a volume of shape {volume.shape}")
    count = len(values)
    _, along_columns, along_rows = shear(volume)
    columns, rows = np.arange(count) * along_columns, np.arange(count) * along_rows
    before = (math.ceil(max(0.0, -rows[-1])), math.ceil(max(0.0, -columns[-1])))
    grown = (math.ceil(abs(rows[-1])), math.ceil(abs(columns[-1])))
    result = np.full((count, values.shape[1] + grown[0], values.shape[2] + grown[1]), fill, dtype=values.dtype)
    for i in range(count):
        whole = (math.floor(rows[i]), math.floor(columns[i]))
        part = (rows[i] - whole[0], columns[i] - whole[1])
        top, left = before[0] + whole[0], before[1] + whole[1]
        moved = _nudged(values[i], part, fill)
        moved = moved[: result.shape[1] - top, : result.shape[2] - left]
        result[i, top : top + moved.shape[0], left : left + moved.shape[1]] = moved
    return result, _upright(volume, before, (count, *result.shape[1:]))


def _nudged(values: AnyArray, part: tuple[float, float], fill: float) -> AnyArray:
    """Move an image by a part of a pixel down and to the right; it grows by one row and one column for that."""
    from scipy import ndimage

    padded = np.pad(values.astype(np.float64), ((0, 1), (0, 1)), constant_values=fill)
    moved: AnyArray = ndimage.shift(padded, part, order=1, mode="grid-constant", cval=fill, prefilter=False)
    if values.dtype.kind in "iu":
        moved = np.rint(moved)
    return moved.astype(values.dtype)


def _upright(volume: Volume, before: tuple[int, int], shape: tuple[int, int, int]) -> Volume:
    """Give the volume that :func:`untilt` makes: the step along the normal, the origin moved by what was added."""
    axes, step = _axes(volume)
    matrix = np.array(volume.affine)
    upright = axes[2] * (axes[2] @ step)
    matrix[:3, 2] = upright
    matrix[:3, 3] -= matrix[:3, 1] * before[0] + matrix[:3, 0] * before[1]
    spacing = (volume.spacing_mm[0], volume.spacing_mm[1], float(np.linalg.norm(upright)))
    return replace(volume, shape=shape, affine=as_rows(matrix), spacing_mm=spacing)


def _axes(volume: Volume) -> tuple[FloatArray, FloatArray]:
    """Give row direction, column direction and normal as unit vectors, and the step from slice to slice, in RAS+."""
    matrix = np.array(volume.affine)[:3]
    row, column = (matrix[:, i] / np.linalg.norm(matrix[:, i]) for i in (0, 1))
    return np.array([row, column, np.cross(row, column)]), matrix[:, 2]


def _kind(header: Header, index: int) -> Hashable:
    """Give what frames of one volume must have in common, bar orientation and spacing."""
    return (
        header.patient,
        header.issuer,
        header.study,
        header.series if header.series is not None else index,  # an unknown series is nobody else's
        header.frame_of_reference,
        header.modality,
        header.rows,
        header.columns,
        header.samples,
        header.bits_allocated,
        header.signed,
        header.photometric,
        header.pixel_keyword,
    )


def _object(header: Header, index: int) -> Hashable:
    return index if header.part is None else header.part.whole


def _rank(headers: Sequence[Header], member: Member) -> tuple[float, str, int]:
    header = headers[member[0]]
    number = header.instance_number
    return (math.inf if number is None else number, header.sop_instance or "", member[1])


def _aligned(headers: Sequence[Header], members: list[Member]) -> list[list[Member]]:
    """Part frames by orientation and pixel spacing, within tolerance."""
    exact: dict[tuple[float, ...], list[Member]] = defaultdict(list)
    for index, frame in members:
        plane = headers[index].planes[frame]
        assert plane.orientation is not None and plane.spacing_mm is not None
        exact[(*plane.orientation, *plane.spacing_mm)].append((index, frame))
    if len(exact) == 1:
        return [members]
    keys = np.array(sorted(exact))
    line = keys @ _LINE  # keys that are near are near on any line: only those are compared
    by_line = np.argsort(line, kind="stable")
    keys, line = keys[by_line], line[by_line]
    left = np.ones(len(keys), dtype=bool)
    parts = []
    for start, head in enumerate(keys):
        if not left[start]:
            continue
        limits = np.array([ORIENTATION_TOLERANCE] * 6 + [SPACING_TOLERANCE * head[6], SPACING_TOLERANCE * head[7]])
        stop = int(np.searchsorted(line, line[start] + limits @ _LINE, side="right"))
        near = left[start:stop] & np.all(np.abs(keys[start:stop] - head) <= limits, axis=1)
        near[0] = True
        left[start:stop] &= ~near
        parts.append(sorted(member for key in keys[start:stop][near] for member in exact[tuple(key.tolist())]))
    return parts


def _split(headers: Sequence[Header], members: list[Member]) -> list[Group]:
    """Part frames of one orientation into volumes."""
    if len(members) == 1:
        return [Group(tuple(members), True)]
    values = split_values(headers, members)
    places = measure(headers, members)
    parts: dict[Splits, list[int]] = {(): list(range(len(members)))}
    for keyword in STRONG:
        if len(set(values.get(keyword, ()))) > 1:
            finer: dict[Splits, list[int]] = defaultdict(list)
            for splits, chosen in parts.items():
                for i in chosen:
                    finer[(*splits, (keyword, values[keyword][i]))].append(i)
            parts = finer if len(finer) > len(parts) else parts  # EffectiveEchoTime after EchoTime tells nothing new
    stacked = any(keyword == "StackID" for splits in parts for keyword, _ in splits)
    if len(parts) > 1 and not stacked and _is_one_stack(places):
        parts = {(): list(range(len(members)))}  # the values differ inside of one stack: a check says so
    groups = []
    for splits, chosen in parts.items():
        resolver = _Resolver(headers, members, values, places.places)
        resolved = resolver.resolve(chosen, resolver.keywords()) or [(chosen, ())]
        groups += [Group(tuple(members[i] for i in part), True, (*splits, *more)) for part, more in resolved]
    return groups


def _is_one_stack(placed: Placed) -> bool:
    """Tell whether every frame has a place of its own, in even steps."""
    gaps = placed.gaps_mm
    return len(gaps) == len(placed.order) - 1 and len(gaps) > 1 and float(np.ptp(gaps)) <= 0.05 * float(np.median(gaps))


def split_values(headers: Sequence[Header], members: Sequence[Member]) -> dict[str, list[str]]:
    """Give for every keyword that may split its value per member; "" where there is none."""
    found: dict[str, list[str]] = {}
    for i, (index, frame) in enumerate(members):
        for keyword, value in headers[index].planes[frame].splits:
            found.setdefault(keyword, [""] * len(members))[i] = value
    if "ImageType" not in found and len({headers[index].image_type for index, _ in members}) > 1:
        found["ImageType"] = ["/".join(headers[index].image_type) for index, _ in members]
    if "ComplexImageComponent" not in found:
        kinds = [found[keyword] for keyword in ("ImageType", "FrameType") if keyword in found]
        found["ComplexImageComponent"] = ["/".join(map(_component, both)) for both in zip(*kinds, strict=True)]
    for keyword in _TIMES:
        if len(set(found.get(keyword, ()))) > 1:
            found[keyword] = _same_times(found[keyword])
    if any(headers[index].frames > 1 for index, _ in members):
        first: dict[Hashable, int] = {}  # parts of one object are one
        for index in sorted({index for index, _ in members}, key=lambda i: _rank(headers, (i, 0))):
            first.setdefault(_object(headers[index], index), len(first) + 1)
        found["Object"] = [str(first[_object(headers[index], index)]) for index, _ in members]
    return found


def _component(image_type: str) -> str:
    """Give what an image type says of the part of the signal that is shown."""
    return "+".join(token for token in re.split(r"[^A-Z0-9_]+", image_type.upper()) if token in _COMPONENTS)


def _same_times(values: Sequence[str]) -> list[str]:
    """Give times that differ by less than 1 % the same value."""
    try:
        numbers = {value: float(value) for value in set(values) if value}
    except ValueError:
        return list(values)
    names: dict[str, str] = {}
    head = ""
    for value in sorted(numbers, key=lambda value: (numbers[value], value)):
        if not head or numbers[value] - numbers[head] > _ECHO_TOLERANCE * abs(numbers[head]):
            head = value
        names[value] = head
    return [names.get(value, value) for value in values]


class _Resolver:
    """Tells frames at repeated places apart."""

    def __init__(
        self, headers: Sequence[Header], members: Sequence[Member], values: dict[str, list[str]], places: IntArray
    ) -> None:
        self._headers, self._members, self._values = headers, members, values
        self._places = [int(place) for place in places]

    def keywords(self) -> tuple[str, ...]:
        """Give what may tell frames apart honestly, the surest first."""
        known = sorted(set(self._values) - set(STRONG) - set(WEAK) - {"Object", "ImageType"})
        return tuple(k for k in ("Object", "ImageType", *known) if k in self._values)

    def resolve(self, chosen: list[int], keywords: tuple[str, ...]) -> list[tuple[list[int], Splits]] | None:
        """Part frames until no place repeats; ``None`` where that cannot be done honestly."""
        if not self._repeats(chosen):
            return [(chosen, ())]
        for number, keyword in enumerate(keywords):
            parts = self._parts(chosen, self._values[keyword].__getitem__)
            if len(parts) < 2 or (keyword not in ("Object", "ImageType") and not self._cover_alike(parts.values())):
                continue
            finer = [(value, self.resolve(part, keywords[number + 1 :])) for value, part in sorted(parts.items())]
            if all(found is not None for _, found in finer):
                return [(part, ((keyword, value), *more)) for value, found in finer for part, more in found or ()]
        return self._by_hint(chosen) or self._by_order(chosen)

    def _by_hint(self, chosen: list[int]) -> list[tuple[list[int], Splits]] | None:
        hints = [keyword for keyword in WEAK if keyword in self._values]
        for some in [(keyword,) for keyword in hints] + list(combinations(hints, 2)):
            values = list(zip(*(self._values[keyword] for keyword in some), strict=True))
            parts = self._parts(chosen, values.__getitem__)
            if len(parts) > 1 and self._cover_alike(parts.values()) and not any(map(self._repeats, parts.values())):
                return [(part, tuple(zip(some, value, strict=True))) for value, part in sorted(parts.items())]
        return None

    def _by_order(self, chosen: list[int]) -> list[tuple[list[int], Splits]] | None:
        """Part by the order of TriggerTime at every place, or of InstanceNumber over all places."""
        at = list(self._parts(chosen, self._places.__getitem__).values())
        if len({len(there) for there in at}) > 1:
            return None
        for keyword, parts in (
            ("TriggerTimeRank", self._by_trigger(at)),
            ("InstanceNumber", self._by_number(chosen, len(at))),
        ):
            if parts:
                return [(sorted(part), ((keyword, str(number)),)) for number, part in enumerate(parts, 1)]
        return None

    def _by_trigger(self, at: list[list[int]]) -> list[list[int]]:
        """Take the first, second ... trigger time of every place together: the phases of a heart's cycle."""
        try:
            times = [float(value) for value in self._values.get("TriggerTime", ())]
        except ValueError:  # some have none
            return []
        if not times or any(len({times[i] for i in there}) < len(there) for there in at):
            return []
        return [list(phase) for phase in zip(*(sorted(there, key=times.__getitem__) for there in at), strict=True)]

    def _by_number(self, chosen: list[int], places: int) -> list[list[int]]:
        """Take numbers that run through all places again and again, or stay at each place for all times."""
        numbers = {i: self._headers[self._members[i][0]].instance_number for i in chosen}
        known = {number: i for i, number in numbers.items() if number is not None}
        if len(known) < len(chosen):
            return []
        ordered = [known[number] for number in sorted(known)]
        table = [self._places[i] for i in ordered]
        times = len(chosen) // places
        if table == table[:places] * times and len(set(table[:places])) == places:
            return [ordered[n * places : (n + 1) * places] for n in range(times)]
        if table == [place for place in table[::times] for _ in range(times)]:
            return [ordered[n::times] for n in range(times)]
        return []

    def _parts(self, chosen: list[int], value: Callable[[int], _Value]) -> dict[_Value, list[int]]:
        parts: dict[_Value, list[int]] = defaultdict(list)
        for i in chosen:
            parts[value(i)].append(i)
        return parts

    def _repeats(self, part: list[int]) -> bool:
        return len({self._places[i] for i in part}) < len(part)

    def _cover_alike(self, parts: Iterable[list[int]]) -> bool:
        """Tell whether every part has slices at the same places."""
        return len({frozenset(self._places[i] for i in part) for part in parts}) == 1


def as_rows(matrix: FloatArray) -> Affine:
    """Give a 4 x 4 matrix as the rows of an affine."""
    a, b, c, d = ((float(r[0]), float(r[1]), float(r[2]), float(r[3])) for r in matrix + 0.0)  # no negative zero
    return a, b, c, d
