"""Probabilities come back to the voxels they came from, however the scan lay and was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medtl.dataset.grid import lattice_of, mask_to_grid
from medtl.dataset.restore import codes_to_values, fill_holes, keep_largest, likeliest, to_source
from medtl.dataset.transforms import oriented
from medtl.errors import PlanError
from medtl.records import AnyArray, FloatArray, GridPlan, Scan, Structure

TWO = (Structure("liver", (10, 11)), Structure("tumour", (300,)))
REGIONS = (Structure("whole", (1, 2)), Structure("core", (2,)))
UPRIGHT = np.eye(3)
OBLIQUE = np.array([[0.98, -0.17, 0.1], [0.18, 0.97, -0.15], [-0.07, 0.16, 0.98]])


def a_plan(spacing: tuple[float, ...] | None, structures: Any = TWO, axis: Any = "axial", ignore: Any = None) -> Any:
    dimensions = 3 if spacing else 2
    return GridPlan(
        structures, ignore, dimensions, axis if spacing else None, 0, 1, spacing, "zscore", None, None, None, None, (),
        (16,) * dimensions, 1, ((1,) * dimensions,), ((3,) * dimensions,), (4,), (), {}, {},
    )  # fmt: skip


def a_scan(shape: Sequence[int], spacing: Sequence[float], turn: Any = UPRIGHT) -> Scan:
    """Give the header of a volume: spacing is of columns, rows and slices, as the affine's."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(turn) * np.asarray(spacing)
    rows = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine)
    return Scan("s", "nifti", tuple(shape), "int16", "d", (), 16, affine=rows)


def some(plan: GridPlan, shape: Sequence[int], seed: int = 0) -> FloatArray:
    """Draw smooth probabilities on a grid."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(plan.outputs)]) * 20
    if plan.overlapping:
        return (1 / (1 + np.exp(-drawn))).astype(np.float32)
    shares = np.exp(drawn)
    return (shares / shares.sum(0)).astype(np.float32)


def by_scipy(probabilities: FloatArray, scan: Scan, plan: GridPlan) -> FloatArray:
    """Interpolate with scipy at the turned scan's voxels, which are named by their corner."""
    lattice = lattice_of(scan, plan)
    places = np.meshgrid(
        *[(np.arange(n) + 0.5) / step - 0.5 for n, step in zip(lattice.source, lattice.steps, strict=True)],
        indexing="ij",
    )
    return np.stack([ndimage.map_coordinates(one, places, order=1, mode="nearest") for one in probabilities])


ORDERS = list(permutations(range(3)))
TURNS = [UPRIGHT[:, list(order)] * signs for order in ORDERS for signs in product((1, -1), repeat=3)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(2, 17)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.4, 0.7, 1.0, 1.3])] * 3),
    turn=st.sampled_from([*TURNS, OBLIQUE, OBLIQUE @ TURNS[13], OBLIQUE @ TURNS[30]]),
    axis=st.sampled_from(["axial", "coronal", "sagittal"]),
    structures=st.sampled_from([TWO, REGIONS]),
)
def test_interpolation_is_scipys_however_the_scan_lies(
    shape: Any, spacing: Any, turn: Any, axis: Any, structures: Any
) -> None:
    scan, plan = a_scan(shape, spacing, turn), a_plan((1.25, 1.0, 1.0), structures, axis)
    probabilities = some(plan, lattice_of(scan, plan).shape)
    codes, wanted = to_source(probabilities, scan, plan), by_scipy(probabilities, scan, plan)
    assert codes.shape == tuple(shape) and codes.dtype == np.uint8
    assert scan.affine is not None
    turned, _ = oriented(codes, scan.affine, axis)
    first, second = np.sort(wanted, 0)[:-3:-1]
    clear = (np.abs(wanted - 0.5) > 1e-5).all(0) if plan.overlapping else first - second > 1e-5
    assert np.array_equal(turned[clear], likeliest(wanted, plan)[clear]) and clear.mean() > 0.9


@pytest.mark.parametrize("turn", [UPRIGHT, TURNS[13], OBLIQUE @ TURNS[30]])
def test_the_same_spacing_gives_the_very_codes_back(turn: AnyArray) -> None:
    scan, plan = a_scan((5, 9, 7), (1.0, 1.0, 1.0), turn), a_plan((1.0, 1.0, 1.0))
    values = np.random.default_rng(1).choice([0, 10, 11, 300], (5, 9, 7))
    grid = mask_to_grid(values, scan, plan)
    sure = np.stack([(grid == code).astype(np.float32) for code in range(3)])
    back = codes_to_values(to_source(sure, scan, plan), plan)
    assert np.array_equal(back, np.where(values == 11, 10, values))


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 2.5), (0.4, 0.5, 0.6), (2.0, 1.5, 1.1)])
def test_a_ball_returns_to_where_it_was(spacing: tuple[float, float, float]) -> None:
    scan, plan = a_scan((20, 33, 41), spacing, OBLIQUE @ TURNS[30]), a_plan((1.0, 1.0, 1.0))
    mm = np.stack(np.meshgrid(*map(np.arange, scan.shape), indexing="ij"), -1) * spacing[::-1]
    ball = np.linalg.norm(mm - mm.reshape(-1, 3).mean(0), axis=-1) < 7
    grid = mask_to_grid(ball * np.uint8(10), scan, plan)
    back = to_source(np.stack([grid == code for code in range(3)]).astype(np.float32), scan, plan)
    assert 2 * (ball & (back == 1)).sum() / (ball.sum() + (back == 1).sum()) > 0.95
    centre, found = (ndimage.center_of_mass(m) for m in (ball, back == 1))
    np.testing.assert_allclose(np.multiply(found, spacing[::-1]), np.multiply(centre, spacing[::-1]), atol=0.2)


@pytest.mark.parametrize("cuts", [[1], [3, 4, 9], list(range(1, 14))])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (3.0, 1.0, 1.0)])
def test_slabs_give_what_the_whole_gives(cuts: list[int], spacing: tuple[float, float, float]) -> None:
    scan, plan = a_scan((11, 13, 14), (1.3, 0.7, 1.0), TURNS[13]), a_plan(spacing)
    probabilities = some(plan, lattice_of(scan, plan).shape)
    cuts = [cut for cut in cuts if cut < probabilities.shape[1]]
    slabs = (slab for slab in np.split(probabilities, cuts, axis=1))
    assert np.array_equal(to_source(slabs, scan, plan), to_source(probabilities, scan, plan))


def test_an_image_keeps_its_pixels() -> None:
    scan, plan = Scan("s", "image", (6, 5, 3), "uint8", "d", (), 8), a_plan(None)
    probabilities = some(plan, (6, 5))
    assert np.array_equal(to_source(probabilities, scan, plan), probabilities.argmax(0))


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (3, 6, 6, 5), (3, 5, 6, 6), (2, 5, 6, 5)])
def test_probabilities_of_another_scan_are_refused(shape: tuple[int, ...]) -> None:
    scan, plan = a_scan((5, 6, 5), (1.0, 1.0, 1.0)), a_plan((1.0, 1.0, 1.0))
    with pytest.raises(PlanError, match="another shape than the scan's grid"):
        to_source(np.zeros(shape, np.float32), scan, plan)


def test_the_likeliest_is_the_first_of_equals_and_a_region_needs_half() -> None:
    one = np.array([[0.4, 0.2, 0.1], [0.4, 0.2, 0.6], [0.2, 0.6, 0.3]], np.float32)
    assert likeliest(one, a_plan(None)).tolist() == [0, 2, 1]
    regions = np.array([[0.5, 0.9, 0.1], [0.49, 0.7, 0.6]], np.float32)
    assert likeliest(regions, a_plan(None, REGIONS)).tolist() == [1, 3, 2]


def test_codes_become_first_values_and_regions_masks_of_their_own() -> None:
    codes = np.array([0, 1, 2, 255], np.uint8)
    values = codes_to_values(codes, a_plan(None, ignore=7))
    assert isinstance(values, np.ndarray) and values.dtype == np.uint16 and values.tolist() == [0, 10, 300, 7]
    masks = codes_to_values(np.array([0, 1, 2, 3, 255], np.uint8), a_plan(None, REGIONS))
    assert [mask.tolist() for mask in masks] == [[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]


def test_the_largest_part_alone_is_kept_and_corners_hold_together() -> None:
    codes = np.zeros((3, 8, 8), np.uint8)
    codes[0, :2, :2] = 1
    codes[1, 2, 2] = 1  # by a corner
    codes[:, 6, 6] = 1
    codes[2, 0, 7] = 2
    kept = keep_largest(codes, a_plan((1.0, 1.0, 1.0)))
    assert kept[1, 2, 2] == 1 and not kept[:, 6, 6].any() and kept[2, 0, 7] == 2
    assert np.array_equal(keep_largest(codes, a_plan((1.0, 1.0, 1.0)), [1]), codes)


def test_of_regions_a_part_that_goes_leaves_the_others() -> None:
    codes = np.array([[3, 3, 0, 1, 1, 0, 2]], np.uint8)
    assert keep_largest(codes, a_plan(None, REGIONS)).tolist() == [[3, 3, 0, 0, 0, 0, 0]]
    assert keep_largest(codes, a_plan(None, REGIONS), [1]).tolist() == [[3, 3, 0, 1, 1, 0, 0]]


def test_holes_are_filled_and_what_lies_in_them_stays() -> None:
    codes = np.ones((5, 5), np.uint8)
    codes[1, 1], codes[2, 3], codes[4, 4] = 0, 2, 0
    filled = fill_holes(codes, a_plan(None))
    assert filled[1, 1] == 1 and filled[2, 3] == 2 and filled[4, 4] == 0
    regions = np.full((5, 5), 1, np.uint8)
    regions[2, 2] = 2
    assert fill_holes(regions, a_plan(None, REGIONS))[2, 2] == 3
