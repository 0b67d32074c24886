"""Surfaces lie as far apart as one finds by looking at every pair of their pieces, in both conventions."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from monai.metrics.utils import create_table_neighbour_code_to_contour_length as lengths_of_monai
from monai.metrics.utils import create_table_neighbour_code_to_surface_area as areas_of_monai
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter
from scipy.spatial.distance import cdist

from medtl.evaluation import surfaces
from medtl.evaluation.surfaces import Convention, Surfaces, areas_mm, measure

Array = np.ndarray[Any, np.dtype[Any]]
SOME = settings(derandomize=True, max_examples=40, deadline=None)
SURFACE_DISTANCE = [1.6124515496597098, 1.9209372712298547, 0.576703390965819, 0.7244566149603181]
SURFACE_DISTANCE_FLAT = [1.6124515496597098, 1.746424919657298, 0.6531595529927412, 0.7475131211397488]
CONVENTIONS: tuple[Convention, ...] = ("surfels", "voxels")
KINDS = ("blobs", "noise", "a voxel", "one flipped")


def masks(seed: int, dimensions: int | None = None) -> tuple[Array, Array, tuple[float, ...]]:
    """Give two masks that are not empty: pieces, holes, single voxels, often at the image's border; and a spacing."""
    rng = np.random.default_rng(seed)
    axes = dimensions or int(rng.integers(2, 4))
    shape, kind = tuple(rng.integers(1, 9, axes)), KINDS[seed % len(KINDS)]
    one, other = (gaussian_filter(rng.normal(size=shape), 0.8) > rng.choice([0, 0.2]) for _ in range(2))
    if kind == "noise":
        one, other = (rng.random(shape) < rng.choice([0.1, 0.5, 0.9]) for _ in range(2))
    if kind == "a voxel":
        one = np.zeros(shape, bool)
    if kind == "one flipped":
        other = one.copy()
        other[tuple(rng.integers(0, shape))] ^= True
    for mask in (one, other):
        if not mask.any():
            mask[tuple(rng.integers(0, shape))] = True
    return one, other, tuple(float(size) for size in rng.choice([0.5, 0.7, 1, 2.5, 3], axes))


def found(one: Array, other: Array, spacing: Any, tolerance: float = 1.4, how: Convention = "surfels") -> Surfaces:
    ((_, result),) = measure(one, other, spacing, tolerance, convention=how)
    return result


def values(result: Surfaces) -> list[float | None]:
    return [result.hd95_mm, result.hd_mm, result.assd_mm, result.nsd]


def pieces(mask: Array, spacing: tuple[float, ...], how: Convention) -> tuple[Array, Array]:
    """List the places and the areas of a surface, looking at one corner or voxel after the other."""
    if how == "voxels":
        places = np.argwhere(mask & ~binary_erosion(mask))
        return places * np.array(spacing), np.ones(len(places))
    monai = (areas_of_monai if mask.ndim == 3 else lengths_of_monai)(spacing)[0].numpy()
    padded, corners, areas = np.pad(mask, 1), [], []
    for corner in product(*(range(size + 1) for size in mask.shape)):
        around = padded[tuple(slice(at, at + 2) for at in corner)].ravel()
        if around.any() and not around.all():
            corners.append(corner)
            areas.append(monai[int("".join(str(int(inside)) for inside in around), 2)])
    return np.array(corners) * np.array(spacing), np.array(areas, dtype=float)


def pair_by_pair(one: Array, other: Array, spacing: Any, tolerance: float, how: Convention) -> list[float]:
    """Measure every piece against every other."""
    (a, areas), (b, others) = pieces(one, spacing, how), pieces(other, spacing, how)
    apart = cdist(a, b)
    directions = [(apart.min(1), areas), (apart.min(0), others)]
    hd95 = []
    for mm, area in directions:
        if how == "voxels":
            hd95.append(np.percentile(mm, 95))
        else:
            hd95.append(next(d for d in np.sort(mm) if area[mm <= d + 1e-9].sum() >= 0.95 * area.sum() - 1e-6))
    total = areas.sum() + others.sum()
    near = sum(area[mm <= tolerance + 1e-9].sum() for mm, area in directions)
    return [
        max(hd95),
        apart.min(1).max(initial=apart.min(0).max()),
        sum(d @ w for d, w in directions) / total,
        near / total,
    ]


@SOME
@given(seed=st.integers(0, 9999), how=st.sampled_from(CONVENTIONS), tolerance=st.sampled_from([0, 0.7, 1.4, 2.1]))
def test_the_values_are_those_of_every_pair_of_pieces(seed: int, how: Convention, tolerance: float) -> None:
    one, other, spacing = masks(seed)
    wanted = pair_by_pair(one, other, spacing, tolerance, how)
    assert values(found(one, other, spacing, tolerance, how)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@SOME
@given(seed=st.integers(0, 9999))
def test_voxels_are_monais_convention_and_surfels_its_subvoxels(seed: int) -> None:
    one, other, spacing = masks(seed)
    truth, predicted = (torch.from_numpy(mask[None, None]).float() for mask in (one, other))
    tensors: dict[str, Any] = {"y": truth, "y_pred": predicted, "include_background": True, "spacing": spacing}
    wanted = [
        compute_hausdorff_distance(percentile=95, **tensors),
        compute_hausdorff_distance(**tensors),
        compute_average_surface_distance(symmetric=True, **tensors),
        compute_surface_dice(class_thresholds=[1.5], **tensors),
    ]
    ours = found(one, other, spacing, 1.5, "voxels")
    assert values(ours) == pytest.approx([float(value) for value in wanted], abs=1e-5)
    subvoxels = compute_surface_dice(class_thresholds=[1.5], use_subvoxels=True, **tensors)
    assert found(one, other, spacing, 1.5).nsd == pytest.approx(float(subvoxels), abs=1e-5)


@SOME
@given(spacing=st.lists(st.floats(0.1, 10), min_size=2, max_size=3))
def test_the_areas_are_those_of_the_published_table(spacing: list[float]) -> None:
    table = areas_mm(tuple(spacing))
    monai = (areas_of_monai if len(spacing) == 3 else lengths_of_monai)(tuple(spacing))[0].numpy()
    assert table == pytest.approx(monai, rel=1e-5)


def test_the_values_of_surface_distance_were_these() -> None:
    """Computed once with surface-distance 0.1 (Nikolov et al. 2018) on two balls of another radius and centre."""
    grid = np.indices((24, 26, 20)).astype(float)
    one, other = (
        sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)) < radius**2
        for centre, radius in (((11, 12, 9), 7.2), ((12, 13, 9), 7.9))
    )
    ours = found(np.asarray(one), np.asarray(other), (0.8, 0.7, 1.6), 0.8)
    assert values(ours) == pytest.approx(SURFACE_DISTANCE, abs=1e-12)
    flat = found(np.asarray(one)[:, :, 9], np.asarray(other)[:, :, 9], (0.8, 0.7), 0.8)
    assert values(flat) == pytest.approx(SURFACE_DISTANCE_FLAT, abs=1e-12)


@SOME
@given(seed=st.integers(0, 9999), how=st.sampled_from(CONVENTIONS))
def test_which_mask_is_the_true_one_does_not_matter(seed: int, how: Convention) -> None:
    one, other, spacing = masks(seed)
    assert values(found(one, other, spacing, how=how)) == pytest.approx(values(found(other, one, spacing, how=how)))


@SOME
@given(seed=st.integers(0, 9999), how=st.sampled_from(CONVENTIONS))
def test_where_the_masks_lie_and_which_way_round_does_not_matter(seed: int, how: Convention) -> None:
    one, other, spacing = masks(seed)
    rng = np.random.default_rng(seed)
    turn = tuple(rng.permutation(one.ndim))
    room = [tuple(rng.integers(0, 5, 2)) for _ in range(one.ndim)]
    first, second = (np.flip(np.pad(mask, room).transpose(turn), axis=0) for mask in (one, other))
    turned = found(first, second, [spacing[axis] for axis in turn], how=how)
    assert values(turned) == pytest.approx(values(found(one, other, spacing, how=how)))


@SOME
@given(seed=st.integers(0, 9999), how=st.sampled_from(CONVENTIONS), factor=st.sampled_from([0.1, 0.3, 7.0]))
def test_distances_grow_with_the_spacing_and_nsd_does_not(seed: int, how: Convention, factor: float) -> None:
    one, other, spacing = masks(seed)
    small, large = (found(one, other, np.array(spacing) * by, 2.1 * by, how) for by in (1.0, factor))
    assert large.nsd == pytest.approx(small.nsd)
    for name in ("hd95_mm", "hd_mm", "assd_mm"):
        assert getattr(large, name) == pytest.approx(factor * getattr(small, name))


@SOME
@given(seed=st.integers(0, 9999), how=st.sampled_from(CONVENTIONS))
def test_hd95_is_at_most_hd_and_nsd_a_share_that_grows_with_the_tolerance(seed: int, how: Convention) -> None:
    one, other, spacing = masks(seed)
    few, more = (found(one, other, spacing, tolerance, how) for tolerance in (0.5, 2.0))
    assert few.hd95_mm is not None and few.hd_mm is not None and few.nsd is not None and more.nsd is not None
    assert 0 <= few.hd95_mm <= few.hd_mm and 0 <= few.nsd <= more.nsd <= 1
    assert found(one, other, spacing, few.hd_mm, how).nsd == 1
    assert values(found(one, one, spacing, 0, how)) == [0, 0, 0, 1]


@pytest.mark.parametrize("how", CONVENTIONS)
def test_a_voxel_two_steps_away_is_two_steps_away(how: Convention) -> None:
    one, other = np.zeros((2, 5, 5, 5), bool)
    one[1, 1, 1], other[1, 1, 3] = True, True
    far = found(one, other, (1.0, 1.0, 2.5), 2.5, how)
    assert far.hd_mm == 5.0 and far.convention == how and far.tolerance_mm == 2.5
    assert far.nsd == (0.5 if how == "surfels" else 0.0)  # of eight corners four are one voxel nearer


def test_three_steps_of_a_tenth_are_within_three_tenths() -> None:
    one, other = np.zeros((2, 3, 9), bool)
    one[1, 1], other[1, 4] = True, True
    assert 3 * 0.1 > 0.3 and found(one, other, (1.0, 0.1), 0.3, "voxels").nsd == 1


@pytest.mark.parametrize("how", CONVENTIONS)
def test_an_empty_mask_has_no_distance_and_nothing_within_the_tolerance(how: Convention) -> None:
    nothing, lesion = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    lesion[1:3, 1:3, 1:3] = True
    for two, word in (((lesion, nothing), "predicted"), ((nothing, lesion), "true")):
        result = found(*two, (1.0, 1.0, 1.0), how=how)
        assert values(result) == [None, None, None, 0]
        assert "not estimable" in result.note and f"the {word} mask is empty" in result.note
    both = found(nothing, nothing, (1.0, 1.0, 1.0), how=how)
    assert values(both) == [None] * 4 and "both masks are empty" in both.note
    ((_, agreed),) = measure(nothing, nothing, (1.0, 1.0, 1.0), 1.0, convention=how, empty="agree")
    assert values(agreed) == [0, 0, 0, 1] and "agree" in agreed.note


@pytest.mark.parametrize("how", CONVENTIONS)
def test_labels_in_one_pass_are_as_each_of_them_alone(how: Convention) -> None:
    rng = np.random.default_rng(3)
    truth, predicted = (np.digitize(gaussian_filter(rng.normal(size=(12, 14, 10)), 2), [-0.05, 0.05]) for _ in "12")
    together = measure(truth, predicted, (1.0, 0.8, 2.0), 1.0, convention=how)
    assert [overlap.label for overlap, _ in together] == [1, 2]
    for overlap, surface in together:
        alone = found(truth == surface.label, predicted == surface.label, (1.0, 0.8, 2.0), 1.0, how)
        assert values(surface) == values(alone) and overlap.label == surface.label


@pytest.mark.parametrize("spacing", [(1.0, 0.7, 1.3), (5.0, 0.5, 0.5)])
@pytest.mark.parametrize("largest", [surfaces._LARGEST, 0], ids=["with transform", "tree alone"])
@pytest.mark.parametrize("kind", ["far apart", "crowded", "sparse", "one inside the other", "alike"])
def test_however_they_are_found_the_distances_are_those_of_the_transform(
    kind: str, largest: int, spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = np.indices((24, 22, 20)) - 9.5
    away, rng = np.sqrt((grid**2).sum(0)), np.random.default_rng(0)
    one, other = {
        "far apart": (grid[0] < -8, grid[0] > 12),
        "crowded": (rng.random(away.shape) < 0.5, rng.random(away.shape) < 0.5),
        "sparse": (rng.random(away.shape) < 0.002, rng.random(away.shape) < 0.01),
        "one inside the other": (away < 2, away < 9),
        "alike": (away < 7, (away < 7) ^ (rng.random(away.shape) < 0.01)),
    }[kind]
    monkeypatch.setattr(surfaces, "_LARGEST", largest)
    edges = [mask & ~binary_erosion(mask) for mask in (one, other)]
    there, back = surfaces.distances(one, other, spacing, "voxels")
    assert there.mm == pytest.approx(distance_transform_edt(~edges[1], sampling=spacing)[edges[0]], abs=1e-12)
    assert back.mm == pytest.approx(distance_transform_edt(~edges[0], sampling=spacing)[edges[1]], abs=1e-12)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, -1.0), (1.0, 1.0, float("nan"))])
def test_a_spacing_that_is_none_is_refused(spacing: tuple[float, ...]) -> None:
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match="spacing of 3 positive"):
        measure(mask, mask, spacing, 1.0)
    with pytest.raises(ValueError, match="tolerance of 0 mm or more"):
        measure(mask, mask, (1.0, 1.0, 1.0), -1.0)
