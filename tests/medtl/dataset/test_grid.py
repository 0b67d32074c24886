"""The grid follows from the training scans and says why; scans and masks come to lie on it where they are."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medtl.config import GridConfig
from medtl.dataset import grid
from medtl.dataset.io import read_grid, write_grid
from medtl.dataset.transforms import oriented
from medtl.errors import PlanError
from medtl.records import AnyArray, GridPlan, Scan, Structure

TWO = (Structure("front", (1,)), Structure("back", (2,)))
REGIONS = (Structure("whole", (1, 2)), Structure("core", (2,)))
AUTO = GridConfig()
Affine = tuple[tuple[float, float, float, float], ...]


def affine_of(spacing: tuple[float, float, float], flips: tuple[int, int, int] = (-1, -1, 1)) -> Affine:
    """Give the affine of (slices, rows, columns) of some spacing; as flipped here nothing is turned."""
    column, row, slice_ = (flip * s for flip, s in zip(flips, spacing[::-1], strict=True))
    return (column, 0.0, 0.0, 5.0), (0.0, row, 0.0, -7.0), (0.0, 0.0, slice_, 3.0), (0.0, 0.0, 0.0, 1.0)


class Cohort:
    """Scans with masks, in memory."""

    def __init__(self) -> None:
        self.pixels: dict[str, AnyArray] = {}
        self.scans: list[Scan] = []
        self.masks: list[Scan] = []

    def add(self, image: AnyArray, mask: AnyArray, spacing: Any = (1.0, 1.0, 1.0), modality: str | None = None) -> Any:
        affine = None if spacing is None else affine_of(spacing)
        bits = 8 * image.dtype.itemsize
        for kind, array, into in (("i", image, self.scans), ("m", mask, self.masks)):
            name = f"{kind}{len(into)}"
            self.pixels[name] = array
            into.append(
                Scan(name, "nifti", array.shape, array.dtype.str, name, (), bits, modality=modality, affine=affine)
            )
        return self

    def plan(
        self, structures: Any = TWO, ignore: int | None = None, config: GridConfig = AUTO, **more: Any
    ) -> GridPlan:
        def read(scan: Scan) -> AnyArray:
            return self.pixels[scan.scan_id]

        return grid.make_grid_plan(self.scans, self.masks, read, structures, ignore, config, **more)


def volumes(
    shape: tuple[int, ...] = (36, 50, 35), spacing: Any = (1.0, 1.0, 1.0), count: int = 10, modality: str | None = None
) -> Cohort:
    cohort, rng = Cohort(), np.random.default_rng(0)
    for _ in range(count):
        image = rng.normal(50, 10, shape).astype(np.int16)
        mask = np.zeros(shape, np.uint8)
        middle = tuple(slice(n // 4, n - n // 4) for n in shape)
        mask[middle] = 1
        mask[tuple(slice(n // 2 - 2, n // 2 + 2) for n in shape)] = 2
        image[mask == 1] += 100
        cohort.add(image, mask, spacing, modality)
    return cohort


def test_a_small_organ_gets_a_patch_that_holds_it_whole() -> None:
    plan = volumes().plan()
    assert (plan.dimensions, plan.patch, plan.spacing_mm, plan.axis) == (3, (40, 56, 40), (1.0, 1.0, 1.0), "axial")
    assert plan.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)) and plan.filters == (32, 64, 128, 256)
    assert all(n % s == 0 for n, s in zip(plan.patch, grid.total_stride(plan.strides), strict=True))


def test_every_decision_has_a_reason_and_the_plan_comes_back_from_the_disk(tmp_path: Path) -> None:
    plan = volumes().plan()
    wanted = "axis spacing_mm dimensions channels intensity patch levels filters batch_size mirror"
    assert set(plan.reasons) == set(wanted.split())
    write_grid(tmp_path, plan)
    assert read_grid(tmp_path) == plan


def test_slices_far_apart_are_seen_one_by_one_and_never_resampled_across() -> None:
    cohort = volumes((12, 60, 60), (5.0, 0.8, 0.8))
    plan = cohort.plan()
    assert (plan.dimensions, len(plan.patch), plan.channels) == (2, 2, 1) and "6.2 times" in plan.reasons["dimensions"]
    other = replace(cohort.scans[0], affine=affine_of((3.0, 0.4, 0.4)))
    lattice = grid.lattice_of(other, plan)
    assert lattice.shape == (12, 30, 30) and lattice.spacing_mm == pytest.approx((3.0, 0.8, 0.8))


def test_neighbours_are_channels_of_slices() -> None:
    plan = volumes().plan(config=GridConfig(neighbours=2))
    assert (plan.dimensions, plan.channels, plan.neighbours) == (2, 5, 2)


def test_moderately_thick_slices_are_halved_later_and_convolved_later() -> None:
    strides, kernels = grid.levels_of((32, 128, 128), (2.5, 1.0, 1.0))
    assert strides[1] == (1, 2, 2) and strides[2] == (2, 2, 2)
    assert kernels[0] == (1, 3, 3) and kernels[1] == (3, 3, 3)


def test_the_patch_shrinks_until_a_step_fits_the_memory() -> None:
    cohort = Cohort().add(np.zeros((110, 120, 116), np.int16), np.ones((110, 120, 116), np.uint8))
    small, large = (cohort.plan(config=GridConfig(memory_gb=gb)) for gb in (0.5, 2))
    assert np.prod(small.patch) < np.prod(large.patch) < 110 * 120 * 116
    assert max(large.patch) / min(large.patch) < 1.5 and small.batch_size == 2
    with pytest.raises(PlanError, match="Give it more"):
        cohort.plan(config=GridConfig(memory_gb=0.0005))


def test_a_configured_patch_is_kept_and_only_halved_while_it_is_even() -> None:
    plan = volumes().plan(config=GridConfig(patch=(36, 52, 36), batch_size=3, filters=200))
    assert plan.patch == (36, 52, 36) and grid.total_stride(plan.strides) == (4, 4, 4)
    assert plan.batch_size == 3 and plan.filters == (200, 320, 320)


def test_a_network_that_wants_multiples_gets_them() -> None:
    assert volumes().plan(multiple=(32,)).patch == (64, 64, 64)
    with pytest.raises(PlanError, match="multiples of 32 x 32 x 32"):
        volumes().plan(config=GridConfig(patch=(40, 40, 40)), multiple=(32,))


def test_ct_is_scaled_by_what_its_structures_show() -> None:
    plan = volumes(modality="CT").plan()
    assert plan.intensity == "window" and plan.low is not None and plan.high is not None
    assert 10 < plan.low < 60 and 165 < plan.high < 185 and plan.mean == pytest.approx(150, abs=5)


def test_hounsfield_units_are_known_without_a_header() -> None:
    cohort = volumes()
    for name in [name for name in cohort.pixels if name.startswith("i")]:
        cohort.pixels[name][0] = -1000
    assert cohort.plan().intensity == "window"
    assert volumes(modality="MR").plan().intensity == "zscore"


def test_a_window_without_any_foreground_says_where_it_comes_from() -> None:
    cohort = volumes(modality="CT")
    cohort.pixels.update({name: np.zeros_like(a) for name, a in cohort.pixels.items() if name.startswith("m")})
    plan = cohort.plan()
    assert plan.mean is not None and "whole volumes" in plan.reasons["intensity"]


def test_zscore_leaves_background_out_of_the_mean() -> None:
    cohort = volumes(modality="MR")
    image = cohort.pixels["i0"].astype(np.int16)
    image[:10] = 0
    values = grid.to_grid(image, cohort.scans[0], cohort.plan())
    assert values.shape == (1, 36, 50, 35) and values.dtype == np.float32
    body = values[0, 10:]
    assert body.mean() == pytest.approx(0, abs=1e-3) and body.std() == pytest.approx(1, abs=1e-3)


def test_nyul_brings_scans_of_any_gain_to_one_scale() -> None:
    cohort = volumes(modality="MR")
    plan = cohort.plan(config=GridConfig(intensity="nyul"))
    assert len(plan.landmarks) == len(grid.PERCENTILES) and list(plan.landmarks) == sorted(plan.landmarks)
    scan = cohort.scans[0]
    plain = grid.to_grid(cohort.pixels["i0"], scan, plan)
    gained = grid.to_grid(cohort.pixels["i0"], replace(scan, slope=3.0, intercept=70.0), plan)
    assert np.allclose(plain, gained, atol=1e-3) and abs(float(plain.mean())) < 0.2


def test_standard_landmarks_are_met_and_the_outer_pieces_go_on() -> None:
    values = np.array([0.0, 10.0, 20.0, 40.0, 60.0], np.float32)
    bent = grid.standardised(values, np.array([10.0, 20.0, 40.0]), (0.0, 50.0, 100.0))
    assert bent.tolist() == [-50.0, 0.0, 50.0, 100.0, 150.0]


def test_pictures_become_zero_to_one_with_their_colours_first() -> None:
    cohort = Cohort()
    for _ in range(3):
        cohort.add(np.full((64, 48, 3), 255, np.uint8), np.ones((64, 48), np.uint8), None)
    plan = cohort.plan()
    assert (plan.dimensions, plan.channels, plan.intensity, plan.axis, plan.spacing_mm) == (2, 3, "unit", None, None)
    values = grid.to_grid(cohort.pixels["i0"], cohort.scans[0], plan)
    assert values.shape == (3, 64, 48) and np.all(values == 1)
    assert grid.to_grid(np.full((10, 12), 51, np.uint8), replace(cohort.scans[0], shape=(10, 12)), plan)[2, 3, 4] == 0.2
    coloured = np.full((10, 12, 3), (51, 102, 204), np.uint8)
    grey = grid.to_grid(coloured, replace(cohort.scans[0], shape=(10, 12, 3)), replace(plan, channels=1))
    assert grey.shape == (1, 10, 12) and grey[0, 2, 3] == pytest.approx((51 * 0.299 + 102 * 0.587 + 204 * 0.114) / 255)
    assert grid.misfit(replace(cohort.scans[0], dtype="<u2"), plan) is not None
    assert grid.misfit(cohort.scans[1], plan) is None


def test_only_left_and_right_are_mirrored_and_only_where_no_structure_has_a_side() -> None:
    assert volumes().plan().mirror == (2,)
    sided = volumes()
    for name in [name for name in sided.pixels if name.startswith("m")]:
        sided.pixels[name][..., :20] = 0
    plan = sided.plan()
    assert plan.mirror == () and "keeps to one side" in plan.reasons["mirror"]
    assert sided.plan(config=GridConfig(mirror=True)).mirror == (0, 1, 2)


def test_pictures_are_mirrored_along_both_axes() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 20:44] = 1
    assert Cohort().add(np.zeros((64, 64), np.uint8), mask, None).plan().mirror == (0, 1)


@pytest.mark.parametrize(
    "config, match",
    [
        (GridConfig(spacing_mm=(1, 1, 1)), "pixels of images have no mm"),
        (GridConfig(dimensions=3), "the scans are images"),
        (GridConfig(neighbours=1), "the scans are images"),
    ],
)
def test_wishes_that_images_cannot_fulfil_are_refused(config: GridConfig, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        Cohort().add(np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8), None).plan(config=config)


def test_wishes_that_volumes_cannot_fulfil_are_refused() -> None:
    with pytest.raises(PlanError, match="three entries"):
        volumes(count=1).plan(config=GridConfig(spacing_mm=(1, 1)))
    with pytest.raises(PlanError, match="neighbours are channels of slices"):
        volumes(count=1).plan(config=GridConfig(dimensions=3, neighbours=1))
    with pytest.raises(PlanError, match="3 sides are wanted"):
        volumes(count=1).plan(config=GridConfig(patch=(32, 32)))
    with pytest.raises(PlanError, match="one kind"):
        volumes(count=1).add(np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8), None).plan()
    with pytest.raises(PlanError, match="to plan from"):
        Cohort().plan()


def test_structures_that_exclude_each_other_are_numbered() -> None:
    pixels = np.array([[0, 1, 2], [9, 1, 0]], np.uint8)
    codes = grid.codes_of(pixels, TWO, 9, np.array([[1, 1, 1], [1, 0, 1]]))
    assert codes.tolist() == [[0, 1, 2], [255, 255, 0]] and codes.dtype == np.uint8
    assert grid.shown(codes, 0, False).sum() == 1


def test_regions_are_bits() -> None:
    codes = grid.codes_of(np.array([0, 1, 2, 7], np.uint16), REGIONS, 7)
    assert codes.tolist() == [0, 1, 3, 255]
    assert grid.shown(codes, 0, True).tolist() == [False, True, True, False]
    assert grid.shown(codes, 1, True).tolist() == [False, False, True, False]


@pytest.mark.parametrize("value", [3, 200, -1])
def test_a_value_that_no_structure_has_is_refused(value: int) -> None:
    with pytest.raises(PlanError, match=f"no structure has: {value}"):
        grid.codes_of(np.array([0, 1, value]), (*TWO, Structure("far", (5,))), None)


def test_more_structures_than_a_code_holds_are_refused() -> None:
    many = tuple(Structure(f"s{k}", (k,)) for k in range(1, 256))
    with pytest.raises(PlanError, match="254 are the most"):
        grid.codes_of(np.zeros(3, np.uint8), many, None)
    regions = tuple(Structure(f"s{k}", (1, k)) for k in range(2, 10))
    with pytest.raises(PlanError, match="7 are the most"):
        grid.codes_of(np.zeros(3, np.uint8), regions, None)


def test_masks_of_fractions_are_read_as_what_they_mean() -> None:
    scan = Scan("m", "nifti", (3,), "<f4", "m", (), 32, slope=0.5)
    assert grid.values_of(np.array([0, 2, 4], np.float32), scan).tolist() == [0, 1, 2]
    assert grid.values_of(np.array([False, True]), replace(scan, slope=1.0)).tolist() == [0, 1]


def test_equal_spacing_changes_no_voxel_whatever_way_the_volume_lies() -> None:
    cohort = volumes(count=1, modality="CT")
    plan = replace(cohort.plan(), low=-1e4, high=1e4, mean=0.0, std=1.0)
    scan = replace(cohort.scans[0], affine=affine_of((1, 1, 1), (1, 1, -1)))
    assert scan.affine is not None
    turned, _ = oriented(cohort.pixels["i0"], scan.affine, "axial")
    assert np.array_equal(grid.to_grid(cohort.pixels["i0"], scan, plan)[0], turned.astype(np.float32))
    mask, _ = oriented(cohort.pixels["m0"], scan.affine, "axial")
    assert np.array_equal(grid.mask_to_grid(cohort.pixels["m0"], scan, plan), mask)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.tuples(*[st.integers(3, 12)] * 3), st.tuples(*[st.floats(0.4, 1.5)] * 3))
def test_resampling_is_linear_interpolation_at_the_voxels_centres(shape: Any, steps: Any) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    wanted = [max(1, round(n / step)) for n, step in zip(shape, steps, strict=True)]
    centres = [(np.arange(n) + 0.5) * step - 0.5 for n, step in zip(wanted, steps, strict=True)]
    expected = ndimage.map_coordinates(values, np.meshgrid(*centres, indexing="ij"), order=1, mode="nearest")
    assert np.allclose(grid.resampled(values, wanted, steps), expected, atol=1e-5)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.floats(0.2, 6))
def test_shares_of_a_voxel_add_up_and_none_comes_from_far(count: int, step: float) -> None:
    wanted = max(1, round(count / step))
    places, weights = grid.taps(count, wanted, step)
    assert np.allclose(weights.sum(0), 1, atol=1e-6) and places.min() >= 0 and places.max() < count
    assert np.all(grid.resampled(np.full(count, 7.0, np.float32), [wanted], [step]) == pytest.approx(7))


def test_shrinking_averages_and_does_not_alias() -> None:
    stripes = np.tile([0.0, 1.0], 33).astype(np.float32)
    assert np.allclose(grid.resampled(stripes, [22], [3.0])[1:-1], 0.5, atol=0.06)  # plainly linear: 1, 0, 1, 0


@pytest.mark.parametrize("structures", [TWO, REGIONS])
@pytest.mark.parametrize("spacing", [(0.7, 0.7, 0.9), (2.0, 1.6, 1.7)])
def test_masks_are_resampled_by_the_largest_share(structures: Any, spacing: Any) -> None:
    cohort = volumes(count=1)
    plan = replace(cohort.plan(structures, 9), spacing_mm=spacing)
    mask = cohort.pixels["m0"].copy()
    mask[:6, :6, :6] = 9
    scan, lattice = cohort.scans[0], grid.lattice_of(cohort.scans[0], plan)
    codes = grid.mask_to_grid(mask, scan, plan)
    whole = grid.codes_of(mask, structures, 9)
    shares = {
        c: grid.resampled((whole == c).astype(np.float32), lattice.shape, lattice.steps) for c in np.unique(whole)
    }
    order = list(shares)
    largest = np.array(order)[np.argmax(np.stack([shares[c] for c in order]), 0)]
    clear = np.max(np.stack(list(shares.values())), 0) > 0.5 + 1e-5
    assert codes.shape == lattice.shape and np.array_equal(codes[clear], largest[clear]) and clear.mean() > 0.9
    assert set(np.unique(codes)) == set(np.unique(whole))
    volume = np.mean(grid.shown(codes, 0, plan.overlapping)) / np.mean(grid.shown(whole, 0, plan.overlapping))
    assert volume == pytest.approx(1, abs=0.16)  # a face that halves a voxel is lost


def test_a_voxel_stays_where_it_is_in_the_patient() -> None:
    shape = (20, 24, 22)
    image = np.zeros(shape, np.int16)
    image[10:14, 6:10, 12:16] = 1000
    cohort = Cohort().add(image, (image > 0).astype(np.uint8), (2.0, 1.5, 1.5), "CT")
    plan = cohort.plan(config=GridConfig(spacing_mm=(1.0, 1.0, 1.0)))
    codes = grid.mask_to_grid((image > 0).astype(np.uint8), cohort.scans[0], plan)
    fine, coarse = ndimage.center_of_mass(codes > 0), ndimage.center_of_mass(image)
    from_corner = [(c + 0.5) * s for c, s in zip(coarse, (2.0, 1.5, 1.5), strict=True)]
    assert [f + 0.5 for f in fine] == pytest.approx(from_corner, abs=0.26)


def test_scans_of_another_kind_do_not_fit() -> None:
    cohort = volumes(count=2, modality="CT")
    plan, scan = cohort.plan(), cohort.scans[0]
    assert grid.misfit(scan, plan) is None
    assert "window" in str(grid.misfit(replace(scan, modality="MR"), plan))
    assert "an image" in str(grid.misfit(replace(scan, affine=None), plan))
    assert "a mask" in str(grid.misfit(replace(scan, mask_of="i1"), plan))


@pytest.mark.data
def test_the_hippocampus_is_planned_as_published() -> None:
    folder = Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "hippocampus"
    with (folder / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))[:60]
    cohort = Cohort()
    for row in rows:
        image, mask = (np.asarray(nib.load(folder / row[key]).dataobj).transpose(2, 1, 0) for key in ("image", "mask"))
        cohort.add(image, mask)
    plan = cohort.plan()
    assert (plan.patch, len(plan.strides), plan.intensity) == ((40, 56, 40), 4, "zscore")
