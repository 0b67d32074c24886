"""From probabilities on the grid back to the voxels of the scan: the way of :mod:`medtl.dataset.grid`, reversed. Pure.

Probabilities are resampled, not codes, whose borders would be steps of the grid: by the same rule as scans are, linear
between voxels, and the likeliest is chosen in the scan's own voxels. Slice by slice, so that of a large scan no more is
in memory than the slab that the prediction gave and the codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy import ndimage

from medtl.dataset.grid import IGNORED, lattice_of, resampled, shown, taps
from medtl.dataset.transforms import oriented
from medtl.errors import PlanError
from medtl.records import AnyArray, FloatArray, GridPlan, Scan


def to_source(probabilities: FloatArray | Iterable[FloatArray], scan: Scan, plan: GridPlan) -> AnyArray:
    """Give the code of each voxel of a scan from probabilities on its grid.

    Args:
        probabilities: (plan.outputs, *space of the grid), or slabs of it along the first axis of space, in order.

    Returns:
        uint8 codes (:func:`medtl.dataset.grid.codes_of`) in the shape and order of the scan's pixels: (slices, rows,
        columns) or (rows, columns).

    Raises:
        PlanError: the probabilities are not of this scan's grid.
    """
    lattice = lattice_of(scan, plan)
    codes = np.zeros(scan.shape[:2] if plan.axis is None else scan.shape, np.uint8)
    turned = codes
    if plan.axis is not None:
        assert scan.affine is not None
        turned, _ = oriented(codes, scan.affine, plan.axis)
    slabs = _checked([probabilities] if isinstance(probabilities, np.ndarray) else probabilities, lattice.shape, plan)
    steps = [1 / step for step in lattice.steps]
    for number, slice_ in enumerate(_along(slabs, lattice.shape[0], turned.shape[0], steps[0])):
        finer = resampled(slice_, (len(slice_), *turned.shape[1:]), (1.0, *steps[1:]))
        turned[number] = likeliest(finer, plan)
    return codes


def likeliest(probabilities: FloatArray, plan: GridPlan) -> AnyArray:
    """Give uint8 codes from (outputs, ...): the largest, the first of equals; of regions each that has one half."""
    if plan.overlapping:
        bits = np.zeros(probabilities.shape[1:], np.uint8)
        for number, region in enumerate(probabilities):
            bits |= (region >= 0.5).astype(np.uint8) << np.uint8(number)
        return bits
    chosen, best = np.zeros(probabilities.shape[1:], np.uint8), probabilities[0]
    for number in range(1, len(probabilities)):
        chosen[probabilities[number] > best] = number
        best = np.maximum(best, probabilities[number])
    return chosen


def codes_to_values(codes: AnyArray, plan: GridPlan) -> AnyArray | list[AnyArray]:
    """Turn codes into what masks hold: of each structure its first value; of regions one mask of 0 and 1 each.

    What does not count becomes the ignored value, or background where there is none.
    """
    if plan.overlapping:
        return [shown(codes, number, True).astype(np.uint8) for number in range(len(plan.structures))]
    values = [0, *(one.values[0] for one in plan.structures)]
    table = np.zeros(IGNORED + 1, np.min_scalar_type(max(*values, plan.ignore or 0)))
    table[: len(values)] = values
    table[IGNORED] = plan.ignore or 0
    return table[codes]


def keep_largest(codes: AnyArray, plan: GridPlan, structures: Sequence[int] | None = None) -> AnyArray:
    """Keep of each structure its largest part alone, the first of equals; parts hang together by a corner too.

    Args:
        codes: uint8 (*space).
        structures: numbers from 0; default: all.
    """
    kept = codes.copy()
    for number in range(len(plan.structures)) if structures is None else structures:
        inside = shown(codes, number, plan.overlapping)
        parts, count = ndimage.label(inside, np.ones((3,) * codes.ndim, bool))
        if count > 1:
            sizes = np.bincount(parts.reshape(-1))
            lost = inside & (parts != 1 + int(np.argmax(sizes[1:])))
            kept[lost] = kept[lost] & ~np.uint8(1 << number) if plan.overlapping else 0
    return kept


def fill_holes(codes: AnyArray, plan: GridPlan, structures: Sequence[int] | None = None) -> AnyArray:
    """Fill of each structure what it encloses on all sides, in three dimensions of a volume.

    Where structures exclude each other background alone is filled: what lies in a hole and is something stays so.

    Args:
        codes, structures: as of :func:`keep_largest`.
    """
    filled = codes.copy()
    for number in range(len(plan.structures)) if structures is None else structures:
        inside = shown(filled, number, plan.overlapping)
        holes = ndimage.binary_fill_holes(inside) & ~inside & (filled != IGNORED)
        if plan.overlapping:
            filled[holes] |= np.uint8(1 << number)
        else:
            filled[holes & (filled == 0)] = number + 1
    return filled


def _checked(slabs: Iterable[FloatArray], shape: tuple[int, ...], plan: GridPlan) -> Iterator[FloatArray]:
    done = 0
    for slab in slabs:
        done += slab.shape[1]
        if (len(slab), *slab.shape[2:]) != (plan.outputs, *shape[1:]) or done > shape[0]:
            break
        yield slab
    else:
        if done == shape[0]:
            return
    raise PlanError("The probabilities have another shape than the scan's grid. Predict the scan with this plan.")


def _along(slabs: Iterator[FloatArray], count: int, wanted: int, step: float) -> Iterator[FloatArray]:
    """Resample along the first axis of space: give (outputs, *rest) for each of ``wanted`` slices, in order."""
    places, weights = taps(count, wanted, step)
    held: FloatArray | None = None
    first = given = 0  # slice that the held ones begin with, and slices given
    for slab in slabs:
        held = slab if held is None or not held.shape[1] else np.concatenate([held, slab], 1)
        while given < wanted and places[:, given].max() < first + held.shape[1]:
            near = zip(places[:, given] - first, weights[:, given], strict=True)
            parts = [held[:, place] * share for place, share in near if share > 0]
            yield parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])
            given += 1
        past = (int(places[:, given].min()) if given < wanted else count) - first
        held, first = held[:, past:], first + min(past, held.shape[1])
