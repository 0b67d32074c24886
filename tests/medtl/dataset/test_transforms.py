"""Pixels keep their shape and depth on the way in, and chance is drawn apart from its use."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtl.config import TransformsConfig
from medtl.dataset.transforms import (
    Augmentation,
    augment,
    coarsest,
    evenly,
    oriented,
    prepare,
    prepare_mark,
    prepare_scan,
    resliced,
    sample,
)
from medtl.records import Plan, Scan

STILL = TransformsConfig(flip_horizontal=False, rotate_degrees=0, scale=0, shift=0, brightness=0, contrast=0)


def generator() -> np.random.Generator:
    return np.random.default_rng(3)


def noise(dtype: Any = np.uint8, n: int = 6, channels: int = 1) -> np.ndarray[Any, Any]:
    return generator().integers(0, np.iinfo(dtype).max, (n, 32, 32, channels), dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    "shape, box", [((64, 32), (32, 16)), ((10, 40), (8, 32)), ((5, 5), (32, 32)), ((1, 90), (1, 32))]
)
def test_the_longer_side_fits_and_the_aspect_is_kept(plan: Plan, shape: tuple[int, int], box: tuple[int, int]) -> None:
    ready = prepare(np.full(shape, 200, np.uint8), plan)[..., 0]
    rows, columns = np.flatnonzero(ready.any(1)), np.flatnonzero(ready.any(0))
    assert ready.shape == (32, 32)
    assert (len(rows), len(columns)) == box
    assert abs(rows[0] - (31 - rows[-1])) <= 1 and abs(columns[0] - (31 - columns[-1])) <= 1
    assert set(np.unique(ready)) <= {0, 200}


def test_an_image_that_fits_is_left_alone(plan: Plan) -> None:
    image = noise()[0, ..., 0]
    assert np.array_equal(prepare(image, plan)[..., 0], image)


def test_shrinking_averages_all_pixels(plan: Plan) -> None:
    image = np.zeros((256, 256), np.uint8)
    image[::8, ::8] = 64  # one pixel in each block of 64, at a place that nearest and linear sampling miss
    assert (prepare(np.roll(image, (1, 1), (0, 1)), plan) == 1).all()


def test_sixteen_bits_are_kept(plan: Plan) -> None:
    image = np.arange(1024, dtype=np.uint16).reshape(32, 32) + 1000
    deep = replace(plan, bits=16, intensity="fixed", low=1000.0, high=2023.0)
    ready = prepare(image, deep)
    assert ready.dtype == np.uint16 and len(np.unique(ready)) == 1024
    assert (ready.min(), ready.max()) == (0, 65535)


def test_values_outside_the_range_are_clipped_and_below_zero_is_no_trouble(plan: Plan) -> None:
    image = np.full((32, 32), -1000, np.int16)
    image[0, 0], image[0, 1] = 3000, 0
    ready = prepare(image, replace(plan, bits=16, low=-100.0, high=100.0))[..., 0]
    assert (ready[5, 5], ready[0, 0], ready[0, 1]) == (0, 65535, 32768)


def test_an_image_on_its_own_scale_does_not_depend_on_gain_and_offset(plan: Plan) -> None:
    own = replace(plan, bits=16, intensity="per_image", low=None, high=None)
    image = generator().integers(0, 1000, (32, 32)).astype(np.int32)
    difference = prepare(image, own).astype(int) - prepare(image * 7 - 500, own)
    assert np.abs(difference).max() <= 1


def test_a_flat_image_is_no_division_by_zero(plan: Plan) -> None:
    own = replace(plan, bits=16, intensity="per_image", low=None, high=None)
    assert not prepare(np.full((32, 32), 7, np.uint16), own).any()


def test_grey_becomes_three_equal_channels_and_colour_becomes_its_luma(plan: Plan) -> None:
    grey = noise()[0, ..., 0]
    three = prepare(grey, replace(plan, channels=3))
    assert np.array_equal(three, np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(prepare(three, plan)[..., 0], grey)
    for channel, luma in enumerate((76, 150, 29)):  # 76.2, 149.7 and 29.1
        pure = np.zeros((32, 32, 3), np.uint8)
        pure[..., channel] = 255
        assert (prepare(pure, plan) == luma).all()


def test_equal_channels_of_any_depth_are_grey_to_the_last_bit(plan: Plan) -> None:
    deep = replace(plan, bits=16, high=65535.0)
    every = np.arange(65536, dtype=np.uint16).reshape(64, 32, 32)
    assert all(np.array_equal(prepare(np.repeat(g[..., None], 3, 2), deep)[..., 0], g) for g in every)
    small = every[0, :8].astype(np.uint8)
    assert np.array_equal(prepare(np.repeat(small[..., None], 3, 2), replace(plan, size=(8, 32)))[..., 0], small)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 3]), st.sampled_from(["u1", "u2", "i2", "f4"]))
def test_whatever_comes_in_the_plan_comes_out(rows: int, columns: int, channels: int, dtype: str) -> None:
    plan = Plan("binary", ("a", "b"), (32, 32), channels, 16, "per_image", None, None, (0.5, 99.5), {}, {})
    ready = prepare(np.arange(rows * columns).reshape(rows, columns).astype(dtype), plan)
    assert ready.shape == (32, 32, channels) and ready.dtype == np.uint16


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_identity_draw_leaves_the_image(dtype: Any, channels: int) -> None:
    images = noise(dtype, channels=channels)
    assert np.array_equal(augment(images, sample(generator(), 6, (32, 32), STILL)), images)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("key, axis", [("flip_horizontal", 2), ("flip_vertical", 1)])
def test_a_flip_is_a_mirror_image_about_half_the_time(dtype: Any, key: str, axis: int) -> None:
    images = noise(dtype, n=60)
    turned = augment(images, sample(generator(), 60, (32, 32), STILL.model_copy(update={key: True})))
    kept = (turned == images).all((1, 2, 3))
    mirrored = (turned == np.flip(images, axis)).all((1, 2, 3))
    assert (kept ^ mirrored).all() and 15 < mirrored.sum() < 45


def test_the_same_draw_gives_the_same_picture_and_another_draw_another() -> None:
    images = noise()
    first, again = (augment(images, sample(generator(), 6, (32, 32), TransformsConfig())) for _ in range(2))
    other = augment(images, sample(np.random.default_rng(4), 6, (32, 32), TransformsConfig()))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.shape == images.shape and first.dtype == images.dtype
    assert not np.array_equal(first, images)


def test_edges_are_mirrored_outwards_and_no_black_corner_tells_the_angle() -> None:
    config = STILL.model_copy(update={"rotate_degrees": 45.0, "scale": 0.3, "shift": 0.2})
    images = np.full((20, 32, 32, 1), 200, np.uint8)
    assert (augment(images, sample(generator(), 20, (32, 32), config)) == 200).all()


def test_what_is_drawn_stays_within_the_config() -> None:
    config = STILL.model_copy(update={"rotate_degrees": 15.0, "scale": 0.1, "brightness": 0.2, "contrast": 0.3})
    drawn = sample(generator(), 500, (32, 32), config)
    zoom = np.sqrt(np.abs(np.linalg.det(drawn.maps[:, :, :2])))
    angle = np.degrees(np.arctan2(drawn.maps[:, 1, 0], drawn.maps[:, 0, 0]))
    assert 0.9 <= zoom.min() < 0.92 and 1.08 < zoom.max() <= 1.1
    assert 14 < np.abs(angle).max() <= 15
    assert 0.7 <= drawn.gains.min() < drawn.gains.max() <= 1.3
    assert -0.2 <= drawn.offsets.min() < drawn.offsets.max() <= 0.2
    centre = np.array([15.5, 15.5, 1.0])
    assert drawn.maps @ centre == pytest.approx(np.tile([15.5, 15.5], (500, 1)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_light_is_added_and_clipped_at_the_ends_of_the_type(dtype: Any) -> None:
    images = noise(dtype, n=2)
    top = np.iinfo(dtype).max
    still = sample(generator(), 2, (32, 32), STILL)
    lit = augment(images, Augmentation(still.maps, np.array([1.0, 2.0]), np.array([0.2, 0.0])))
    assert np.abs(lit[0].astype(int) - np.minimum(images[0] + 0.2 * top, top)).max() <= 1
    assert np.abs(lit[1].astype(int) - np.clip(2.0 * images[1] - 0.5 * top, 0, top)).max() <= 1


BODY = generator().integers(-1000, 2000, (6, 8, 10)).astype(np.int16)  # voxels by R, A, S
SPACING = (1.0, 2.0, 5.0)


def lying(order: tuple[int, ...], ascends: tuple[bool, ...]) -> tuple[np.ndarray[Any, Any], Any]:
    """Store the body with its axes in another order and direction; give (slices, rows, columns) and the affine."""
    affine, values = np.eye(4), BODY
    affine[:3, :3] = 0
    for voxel, (anatomical, up) in enumerate(zip(order, ascends, strict=True)):
        affine[anatomical, voxel] = SPACING[anatomical] if up else -SPACING[anatomical]
        values = values if up else np.flip(values, anatomical)
    return values.transpose(order[::-1]), tuple(map(tuple, affine.tolist()))


def volume(affine: Any, dtype: str = "<i2", shape: tuple[int, ...] = (4, 32, 32), **more: Any) -> Scan:
    return Scan("v", "nifti", shape, dtype, "x", (), 12, affine=affine, **more)


FLAT = ((-1.0, 0.0, 0.0, 0.0), (0.0, -1.0, 0.0, 0.0), (0.0, 0.0, 3.0, 0.0), (0.0, 0.0, 0.0, 1.0))  # as DICOM lies


@pytest.mark.parametrize("axis, spacing", [("axial", (5, 2, 1)), ("coronal", (2, 5, 1)), ("sagittal", (1, 5, 2))])
def test_a_volume_looks_the_same_however_it_was_stored(axis: Any, spacing: tuple[float, ...]) -> None:
    for order, ascends in product(permutations(range(3)), product((True, False), repeat=3)):
        values, affine = lying(order, ascends)
        turned, found = oriented(values, affine, axis)
        assert found == spacing
        if axis == "axial":  # slices from the feet up, the front on top, the patient's right on the left
            assert np.array_equal(turned, BODY.transpose(2, 1, 0)[:, ::-1, ::-1])
        assert np.array_equal(turned, oriented(*lying((0, 1, 2), (True, True, True)), axis)[0])
        assert coarsest(affine) == "axial"


def test_slices_are_those_across_the_coarsest_axis_and_axial_where_none_is() -> None:
    sagittal = ((3.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))
    assert coarsest(sagittal) == "sagittal"
    assert coarsest(np.eye(4).tolist()) == "axial"


@given(st.integers(1, 200), st.integers(1, 64))
def test_slices_are_evenly_spaced_and_symmetric(count: int, wanted: int) -> None:
    chosen = evenly(count, wanted)
    assert len(chosen) == wanted and chosen[0] >= 0 and chosen[-1] < count
    assert np.ptp(np.diff(chosen)) <= 1 if wanted > 1 else True
    assert np.array_equal(evenly(count, count), np.arange(count))


def test_a_slice_has_its_neighbours_as_channels_and_the_last_is_its_own(plan: Plan) -> None:
    pixels = np.arange(4, dtype=np.int16)[:, None, None] + np.zeros((4, 32, 32), np.int16)
    how = replace(plan, volumes="slices", axis="axial", slices=4, neighbours=1, channels=3, low=0.0, high=3.0)
    rows = prepare_scan(pixels, volume(FLAT), how)
    assert rows.shape == (4, 32, 32, 3) and rows.dtype == np.uint8
    assert (rows[:, 0, 0] // 85).tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]
    assert (rows == rows[:, :1, :1]).all()


def test_a_short_volume_shows_its_nearest_slice_again(plan: Plan) -> None:
    pixels = np.stack([np.full((32, 32), value, np.int16) for value in (0, 255)])
    how = replace(plan, volumes="slices", axis="axial", slices=4)
    assert prepare_scan(pixels, volume(FLAT, shape=(2, 32, 32)), how)[:, 0, 0, 0].tolist() == [0, 0, 255, 255]


def test_values_of_a_volume_are_what_they_mean(plan: Plan) -> None:
    pixels = np.full((4, 32, 32), 1024, np.int16)
    how = replace(plan, volumes="whole", axis="axial", depth=16, bits=16, low=-1000.0, high=1000.0)
    ready = prepare_scan(pixels, volume(FLAT, intercept=-1024.0), how)
    assert ready.shape == (1, 16, 32, 32, 1)
    assert np.unique(ready).tolist() == [round(65535 / 2)]


def test_pictures_keep_their_shape_in_mm(plan: Plan) -> None:
    how = replace(plan, volumes="slices", axis="coronal", slices=1, bits=16, low=0.0, high=1.0)
    (ready,) = prepare_scan(np.ones((8, 32, 32), np.int16), volume(FLAT, shape=(8, 32, 32)), how)
    box = np.argwhere(ready[..., 0] > 0)
    assert (np.ptp(box, 0) + 1).tolist() == [24, 32]  # 8 slices of 3 mm, 32 columns of 1 mm


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize(
    "shown", [{"volumes": "slices", "slices": 5, "neighbours": 1}, {"volumes": "whole", "depth": 17}], ids=str
)
@given(st.permutations(range(3)), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_a_mark_goes_the_way_of_the_pixels_it_lies_on(axis: Any, shown: Any, order: Any, ascends: Any) -> None:
    values, affine = lying(tuple(order), ascends)
    mask = values > 700
    how = Plan("binary", ("a", "b"), (24, 20), 3, 16, "fixed", 0.0, 1.0, (0.0, 100.0), {}, {}, axis=axis, **shown)
    shares = prepare_scan(mask.astype(np.int16), volume(affine, shape=mask.shape), how) / 65535
    mark = prepare_mark(mask, volume(affine, shape=mask.shape), how)
    assert mark.dtype == np.bool_ and mark.shape == shares.shape[:-1]
    assert 0.05 < mark.mean() < 0.8
    middle = shares[..., shown.get("neighbours", 0)]
    assert (mark == (middle > 0.5))[np.abs(middle - 0.5) > 0.01].all()


def test_a_mark_on_an_image_is_padded_as_the_image_is(plan: Plan) -> None:
    mask = np.zeros((64, 32), np.uint8)
    mask[:, :4] = 1
    mark = prepare_mark(mask, volume(None, shape=mask.shape), plan)
    assert np.array_equal(mark[0], prepare(255 * mask, plan)[..., 0] > 127)
    assert np.flatnonzero(mark[0].any(0)).tolist() == [8, 9]


def test_a_mark_smaller_than_a_place_is_where_most_of_it_is_and_an_empty_one_nowhere(plan: Plan) -> None:
    mask = np.zeros((320, 320), np.uint8)
    assert not prepare_mark(mask, volume(None), plan).any()
    mask[9:11, 41:44] = 1  # less in the upper of two places
    mask[10, 44] = 1
    assert np.argwhere(prepare_mark(mask, volume(None), plan)).tolist() == [[0, 1, 4]]


def test_a_mark_between_the_slices_that_are_shown_is_nowhere(plan: Plan) -> None:
    mask = np.zeros((4, 32, 32), np.uint8)
    mask[2] = 1
    how = replace(plan, volumes="slices", axis="axial", slices=2)  # the second and the last
    assert not prepare_mark(mask, volume(FLAT), how).any()
    assert prepare_mark(np.roll(mask, 1, 0), volume(FLAT), how).all(axis=(1, 2)).tolist() == [False, True]


@given(st.integers(1, 40), st.integers(1, 40))
def test_reslicing_keeps_a_ramp_and_a_mean(count: int, depth: int) -> None:
    ramp = (np.arange(count, dtype=np.float32) + 0.5)[:, None, None] * np.ones((1, 2, 2), np.float32)
    found = resliced(ramp, depth)
    assert found.shape == (depth, 2, 2)
    assert found.mean() == pytest.approx(ramp.mean(), rel=1e-4)
    inner = (np.arange(depth) + 0.5) * count / depth
    exact = depth >= count or count % depth == 0  # else a slice that two share counts for both
    assert found[:, 0, 0] == pytest.approx(np.clip(inner, 0.5, count - 0.5), abs=1e-4 if exact else 0.13)


def test_all_slices_of_a_volume_are_augmented_alike_whatever_their_channels() -> None:
    images = generator().integers(0, 65535, (3, 4, 16, 16, 7)).astype(np.uint16)
    drawn = sample(generator(), 3, (16, 16), TransformsConfig())
    found = augment(images, drawn)
    assert not np.array_equal(found, images)
    for number, channel in product(range(4), range(7)):
        alone = augment(images[:, number, ..., channel : channel + 1], drawn)
        assert np.array_equal(found[:, number, ..., channel : channel + 1], alone)
