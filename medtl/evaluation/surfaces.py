"""How far two surfaces lie apart: HD95, HD, ASSD and NSD, in mm, from one set of distances.

What a surface is made of is a convention, and moves the values: of one pair of masks NSD was .870 by one and .837 by
the other. Both are here by name, and every result says which it is.

* ``surfels``: between eight (in 2-D four) neighbouring voxels lies a corner, and where they are not all alike a piece
  of the surface that marching cubes would lay there. Its area (2-D: length) follows from the spacing, and every
  distance counts by it. HD95 is the distance that 95 % of the area does not exceed, without interpolation. These are
  the values of ``surface-distance`` and the NSD of MONAI's ``use_subvoxels=True``.
  Source: Nikolov et al., arXiv 1809.04430 (2018); the table of areas after surface-distance 0.1 (Apache 2.0).
* ``voxels``: the surface is every voxel with a neighbour (by a face) that is outside, and each counts as one, whatever
  the spacing. HD95 is interpolated between the two nearest ranks. These are the values of MONAI as it comes.

In both, HD95 and HD are those of the worse direction, ASSD is the mean over both surfaces pooled (MONAI's, not the mean
of two means), and what lies outside the image is background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from medtl.evaluation.overlap import BoolArray, Empty, Overlap, Pair, note_of, overlap_of, pairs
from medtl.records import AnyArray, FloatArray, IntArray

Convention = Literal["surfels", "voxels"]
PERCENTILE = 0.95
_ROUNDING = 1e-9  # of a distance: 3 x 0.7 mm are within a tolerance of 2.1 mm
_REACH = 3  # voxels along an axis that a neighbour is away at most
_NEIGHBOURS = 60  # of a place that are looked at, at most
_AROUND = 5  # voxels that a tree looks around
_MANY = 1 / 2000  # far places per place of the box, from which on the transform is faster than a second look
_BLOCK = 100_000  # places whose neighbours are looked at together
_LARGEST = 100_000_000  # places of a box whose transform still fits into memory: 1.2 GB
# A corner's eight voxels as bits: what lies inside, and the normals of the pieces there, in eighths of a voxel's face.
# What is mirrored, turned or inside out has the same area along other axes.
_CASES: Mapping[int, Sequence[tuple[tuple[int, int, int], int]]] = {
    0b00000001: (((1, 1, 1), 1),),
    0b00000011: (((1, 1, 0), 4),),
    0b00000110: (((1, 1, 1), 2),),
    0b00000111: (((1, 0, 0), 4), ((1, 1, 1), 3)),
    0b00001111: (((1, 0, 0), 8),),
    0b00010110: (((1, 1, 1), 3),),
    0b00010111: (((1, 1, 1), 6),),
    0b00011000: (((1, 1, 1), 2),),
    0b00011001: (((0, 1, 1), 4), ((1, 1, 1), 1)),
    0b00011011: (((0, 1, 1), 2), ((1, 0, 1), 2), ((1, 1, 1), 4)),
    0b00011110: (((1, 0, 0), 4), ((1, 1, 1), 4)),
    0b00111100: (((1, 1, 0), 8),),
    0b01101001: (((1, 1, 1), 4),),
}


@dataclass(frozen=True, slots=True)
class Surfaces:
    """How far the surfaces of two masks of one label lie apart."""

    label: int
    hd95_mm: float | None
    hd_mm: float | None
    assd_mm: float | None
    nsd: float | None
    tolerance_mm: float  # of the NSD
    convention: Convention
    note: str = ""


@dataclass(frozen=True, slots=True)
class Distances:
    """From every piece of one surface to the other surface."""

    mm: FloatArray  # (n,)
    area: FloatArray  # (n,) mm², or mm in 2-D, or 1 for each voxel


def measure(
    truth: AnyArray,
    predicted: AnyArray,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    *,
    labels: Sequence[int] | None = None,
    convention: Convention = "surfels",
    empty: Empty = "unknown",
) -> tuple[tuple[Overlap, Surfaces], ...]:
    """Measure overlap and surfaces of every label of one case.

    Args:
        truth: bool or integer mask, 2-D or 3-D; 0 is background.
        predicted: of the same shape.
        spacing_mm: of the voxels along each axis of the arrays.
        tolerance_mm: how far apart surfaces may lie for the NSD; what two readers differ by.
        labels: wanted, in this order; all that occur if not said.
        convention: what a surface is made of.
        empty: what two empty masks are: unknown, or in perfect agreement.

    Raises:
        ValueError: masks or labels that :func:`medtl.evaluation.overlap.pairs` refuses, a spacing that is not positive
            along each axis, or a negative tolerance.
    """
    if len(spacing_mm) != truth.ndim or not all(0 < size < math.inf for size in spacing_mm):
        raise ValueError(f"a spacing of {truth.ndim} positive numbers of mm is wanted, not {tuple(spacing_mm)}")
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"a tolerance of 0 mm or more is wanted, not {tolerance_mm}")
    return tuple(
        (overlap_of(pair, spacing_mm, empty), surfaces_of(pair, spacing_mm, tolerance_mm, convention, empty))
        for pair in pairs(truth, predicted, labels)
    )


def surfaces_of(
    pair: Pair,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    convention: Convention = "surfels",
    empty: Empty = "unknown",
) -> Surfaces:
    """Measure how far the surfaces of one label lie apart.

    Where one of the two is empty there is no distance, and no piece of the other lies within the tolerance: NSD is 0.
    """
    there = bool(pair.truth.any()), bool(pair.predicted.any())
    note = note_of(*there, empty)
    if not any(there):
        far, near = (0.0, 1.0) if empty == "agree" else (None, None)
        return Surfaces(pair.label, far, far, far, near, tolerance_mm, convention, note)
    if not all(there):
        note = f"distances not estimable: {note}"
        return Surfaces(pair.label, None, None, None, 0.0, tolerance_mm, convention, note)
    both = distances(pair.truth, pair.predicted, spacing_mm, convention)
    area = sum(float(one.area.sum()) for one in both)
    limit = tolerance_mm * (1 + _ROUNDING)
    return Surfaces(
        pair.label,
        max(_percentile(one, convention) for one in both),
        max(float(one.mm.max()) for one in both),
        sum(float(one.mm @ one.area) for one in both) / area,
        sum(float(one.area[one.mm <= limit].sum()) for one in both) / area,
        tolerance_mm,
        convention,
        note,
    )


def distances(
    truth: BoolArray, predicted: BoolArray, spacing_mm: Sequence[float], convention: Convention
) -> tuple[Distances, Distances]:
    """Give the distances from the true surface to the predicted one and back; neither mask may be empty."""
    lattice = tuple(size + 1 for size in truth.shape)
    walls = [_wall(mask, lattice, convention) for mask in (truth, predicted)]
    places = [np.flatnonzero(wall) for wall, _ in walls]
    table = areas_mm(tuple(float(size) for size in spacing_mm)) if convention == "surfels" else np.ones(2)
    areas = [table[code[place]] for (_, code), place in zip(walls, places, strict=True)]
    there = _nearest(places[0], places[1], walls[1][0], lattice, spacing_mm)
    back = _nearest(places[1], places[0], walls[0][0], lattice, spacing_mm)
    return Distances(there, areas[0]), Distances(back, areas[1])


@lru_cache(maxsize=16)
def areas_mm(spacing_mm: tuple[float, ...]) -> FloatArray:
    """Give the area of the surface at a corner for each arrangement of its 8 voxels, (256,); in 2-D the length, (16,).

    The first voxel along each axis comes first; it is the highest bit.
    """
    if len(spacing_mm) == 2:
        down, across = spacing_mm
        slant = math.hypot(down, across) / 2
        lengths = (0, slant, slant, across, slant, down, 2 * slant, slant)
        return np.array([*lengths, *reversed(lengths)], dtype=np.float64)
    bits = (1 << np.arange(7, -1, -1)).reshape(2, 2, 2)
    face, areas = math.prod(spacing_mm) / np.array(spacing_mm), np.zeros(256)
    for case, normals in _CASES.items():
        for turn in permutations(range(3)):
            area = sum(
                count / 8 * float(np.linalg.norm(np.array(normal)[list(turn)] * face)) for normal, count in normals
            )
            for flips in product((1, -1), repeat=3):
                inside = ((case & bits) > 0).transpose(turn)[tuple(slice(None, None, flip) for flip in flips)]
                code = int(bits[inside].sum())
                areas[[code, 255 - code]] = area
    return areas


def _wall(mask: BoolArray, lattice: tuple[int, ...], convention: Convention) -> tuple[BoolArray, AnyArray]:
    """Mark the surface on a lattice that is one longer than the mask along each axis, flat.

    A step along an axis is a shift of the flat array: what it wraps into is the empty last row.

    Returns:
        The marks, and for surfels the arrangement of voxels around each corner, for voxels the mask.
    """
    padded = np.zeros(lattice, dtype=np.uint8)
    padded[tuple(slice(0, size) for size in mask.shape)] = mask
    flat = padded.ravel()
    steps = [math.prod(lattice[axis + 1 :]) for axis in range(len(lattice))]
    if convention == "voxels":
        inner = flat.copy()
        for step in steps:
            inner[step:] &= flat[:-step]
            inner[:-step] &= flat[step:]
            inner[:step] = 0
        return flat > inner, flat
    for bits, step in zip((1, 2, 4), reversed(steps), strict=False):
        flat[step:] |= flat[:-step] << bits
    full = (1 << 2 ** len(lattice)) - 1
    return (flat > 0) & (flat < full), flat


def _nearest(
    places: IntArray, others: IntArray, wall: BoolArray, lattice: tuple[int, ...], spacing_mm: Sequence[float]
) -> FloatArray:
    """Give the distance in mm from each place to the nearest of the others.

    Most are next to each other, and a look at the neighbours finds them. A tree finds those around; from afar, where it
    would have to look at all that is about as far, the distance transform does, whose time is that of the box.
    """
    found = np.where(wall[places], 0.0, np.inf)  # what lies on both surfaces is there
    left = np.flatnonzero(found)
    found[left] = _neighbours(places[left], wall, lattice, spacing_mm)
    left = left[np.isinf(found[left])]
    if not len(left):
        return found
    points = _points(places[left], lattice, spacing_mm)
    tree = cKDTree(_points(others, lattice, spacing_mm), leafsize=48, compact_nodes=False, balanced_tree=False)
    found[left] = tree.query(points, distance_upper_bound=_AROUND * max(spacing_mm))[0]
    far = np.isinf(found[left])
    if len(wall) <= _LARGEST and far.sum() > _MANY * len(wall):
        found[left[far]] = _transformed(places[left[far]], wall, lattice, spacing_mm)
    elif far.any():
        found[left[far]] = tree.query(points[far])[0]
    return found


def _neighbours(places: IntArray, wall: BoolArray, lattice: tuple[int, ...], spacing_mm: Sequence[float]) -> FloatArray:
    """Give the distance in mm from each place to the surface if it is among the nearest neighbours, else infinity."""
    shells = _shells(tuple(float(size) for size in spacing_mm))
    padded = np.pad(wall.reshape(lattice), _REACH)
    flat, steps = padded.ravel(), np.array(padded.strides)
    at = (np.stack(np.unravel_index(places, lattice), axis=1) + _REACH) @ steps
    found = np.full(len(places), np.inf)
    for start in range(0, len(places), _BLOCK):
        left = np.arange(start, min(start + _BLOCK, len(places)))
        for mm, offsets in shells:
            hit = flat[at[left, None] + offsets @ steps].any(axis=1)
            found[left[hit]] = mm
            left = left[~hit]
            if not len(left):
                break
    return found


@lru_cache(maxsize=16)
def _shells(spacing_mm: tuple[float, ...]) -> Sequence[tuple[float, IntArray]]:
    """Give the nearest neighbours of a place by their distance in mm: all that are so far, the nearest first."""
    offsets = np.array([one for one in product(range(-_REACH, _REACH + 1), repeat=len(spacing_mm)) if any(one)])
    mm = np.sqrt(((offsets * np.array(spacing_mm)) ** 2).sum(axis=1))
    order = np.argsort(mm, kind="stable")
    order = order[mm[order] < (_REACH + 1) * min(spacing_mm) * (1 - _ROUNDING)]  # beyond, others may be as near
    offsets, mm = offsets[order], mm[order]
    ends = np.flatnonzero(np.diff(mm, append=np.inf) > _ROUNDING * mm) + 1
    ends = ends[ends <= _NEIGHBOURS]
    return [(float(mm[start]), offsets[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _transformed(
    places: IntArray, wall: BoolArray, lattice: tuple[int, ...], spacing_mm: Sequence[float]
) -> FloatArray:
    """Give the distance in mm from each place to the surface by the distance transform of the box."""
    nearest = ndimage.distance_transform_edt(
        ~wall.reshape(lattice), sampling=spacing_mm, return_distances=False, return_indices=True
    )
    apart = nearest.reshape(len(lattice), -1)[:, places] - np.stack(np.unravel_index(places, lattice))
    mm: FloatArray = np.sqrt(((apart * np.asarray(spacing_mm, dtype=np.float64)[:, None]) ** 2).sum(0))
    return mm


def _points(places: IntArray, lattice: tuple[int, ...], spacing_mm: Sequence[float]) -> FloatArray:
    points: FloatArray = np.stack(np.unravel_index(places, lattice), axis=1).astype(np.float64)
    points *= np.asarray(spacing_mm)
    return points


def _percentile(found: Distances, convention: Convention) -> float:
    """Give the distance that 95 % of a surface does not exceed."""
    if convention == "voxels":
        return float(np.quantile(found.mm, PERCENTILE))
    order = np.argsort(found.mm, kind="stable")
    passed = np.cumsum(found.area[order])
    return float(found.mm[order[np.searchsorted(passed, PERCENTILE * passed[-1] * (1 - _ROUNDING))]])
