"""A patch is a function of its number, shows its volume, and augmentation moves image and mask alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medtl.config import PatchesConfig
from medtl.dataset.io import read_volumes, write_volumes
from medtl.dataset.patches import Patches, blurred, coarsened, recoloured
from medtl.errors import PlanError
from medtl.records import AnyArray, GridPlan, Structure

PLAN = GridPlan(
    (Structure("front", (1,)), Structure("back", (2,))), None, 3, "axial", 0, 1, (1.0, 1.0, 1.0), "zscore", None, None,
    None, None, (), (16, 16, 16), 3, ((1, 1, 1),), ((3, 3, 3),), (8,), (), {}, {},
)  # fmt: skip
STILL = PatchesConfig(
    foreground=0.5, rotate_degrees=0, scale=0, warped=1, noise=0, blur=0, brightness=0, contrast=0, gamma=0,
    low_resolution=0,
)  # fmt: skip


class Made:
    """Packs volumes and draws from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, arrays: Sequence[tuple[AnyArray, AnyArray]], config: PatchesConfig = STILL, seed: int = 0, **plan: Any
    ) -> Patches:
        how = replace(PLAN, **plan)
        write_volumes(self.folder, ((f"s-{n}", *one) for n, one in enumerate(arrays)), how)
        return Patches(read_volumes(self.folder), range(len(arrays)), how, config, seed)


@pytest.fixture
def patches_of(tmp_path: Path) -> Made:
    return Made(tmp_path)


def volume(shape: tuple[int, ...] = (24, 26, 28), number: int = 0) -> tuple[AnyArray, AnyArray]:
    """Make values that tell their place, and a box of each structure."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) % 2048 - 5
    codes = np.zeros(shape, np.uint8)
    codes[tuple(slice(n // 3, n // 2) for n in shape)] = 1
    codes[tuple(slice(n // 2, 2 * n // 3) for n in shape)] = 2
    return image + number, codes


def test_the_same_numbers_give_the_same_bits(patches_of: Made) -> None:
    patches = patches_of([volume(), volume()], PatchesConfig(elastic=0.05))
    first, again = patches.step(1, 2, 3), patches.step(1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first[0], patches.step(*other)[0])
    assert not torch.equal(first[0], replace(patches, seed=1).step(1, 2, 3)[0])


def test_a_patch_does_not_depend_on_the_batch_it_is_in(patches_of: Made) -> None:
    patches = patches_of([volume(number=n) for n in range(6)], PatchesConfig())
    alone = replace(patches, plan=replace(patches.plan, batch_size=1))
    together = patches.step(0, 0, 1)[0]
    assert all(torch.equal(together[n], alone.step(0, 0, 3 + n)[0][0]) for n in range(3))


def test_an_epoch_shows_every_study_as_often_as_asked(patches_of: Made) -> None:
    arrays = [(np.full((1, 20, 20, 20), n, np.float32), np.zeros((20, 20, 20), np.uint8)) for n in range(6)]
    patches = patches_of(arrays, STILL.model_copy(update={"per_study": 2}))
    assert len(patches) == 4
    seen = torch.cat([patches.step(0, 0, s)[0][:, 0, 0, 0, 0] for s in range(4)])
    assert torch.bincount(seen.long()).tolist() == [2] * 6


def test_every_batch_is_full(patches_of: Made) -> None:
    patches = patches_of([volume()] * 2)
    images, codes = patches.step(0, 0, 0)
    assert len(patches) == 1 and images.shape == (3, 1, 16, 16, 16) and codes.shape == (3, 16, 16, 16)
    assert images.dtype == torch.float32 and codes.dtype == torch.uint8


def test_a_patch_is_a_crop_of_its_volume(patches_of: Made) -> None:
    image, codes = volume()
    patches = patches_of([(image, codes)])
    for step in range(5):
        for crop, shown in zip(*patches.step(0, 0, step, augmented=False), strict=True):
            start = [int(v[0]) for v in np.nonzero(image[0] == float(crop[0, 0, 0, 0]))]
            found = [np.argwhere(image[0] == float(crop[0, 0, 0, 0]))][0]
            boxes = [tuple(slice(int(a), int(a) + 16) for a in at) for at in found]
            assert start and any(
                np.array_equal(image[0][box], crop[0]) and np.array_equal(codes[box], shown) for box in boxes
            )


def test_half_of_the_patches_are_centred_on_structures_in_turn(patches_of: Made) -> None:
    shape = (60, 60, 60)
    codes = np.zeros(shape, np.uint8)
    codes[5:50, 5:50, 5:50] = 1
    codes[55, 55, 55] = 2
    patches = patches_of([(np.zeros((1, *shape), np.float32), codes)], batch_size=1, patch=(9, 9, 9))
    rare = sum(bool((patches.step(0, 0, s, augmented=False)[1] == 2).any()) for s in range(80))
    assert 12 <= rare <= 30  # a quarter of them, and hardly ever by chance


def test_a_structure_that_few_studies_show_is_shown_as_often(patches_of: Made) -> None:
    codes = volume()[1]
    common = np.where(codes == 2, 0, codes).astype(np.uint8)
    arrays = [(np.full((1, *codes.shape), n, np.float32), codes if n < 2 else common) for n in range(10)]
    patches = patches_of(arrays, STILL.model_copy(update={"foreground": 1.0}), batch_size=10)
    images, shown = (torch.cat(both) for both in zip(*(patches.step(0, e, 0, False) for e in range(8)), strict=True))
    rare = (shown == 2).flatten(1).any(1)
    assert 0.35 < float(rare.float().mean()) < 0.75
    from_each = torch.bincount(images[rare][:, 0, 0, 0, 0].long())
    assert len(from_each) == 2 and from_each.min() > 10


def test_volumes_without_any_structure_are_drawn_from_too(patches_of: Made) -> None:
    patches = patches_of([(np.ones((1, 20, 20, 20), np.float32), np.zeros((20, 20, 20), np.uint8))])
    assert not patches.step(0, 0, 0)[1].any()
    with pytest.raises(PlanError, match="no volume"):
        replace(patches, rows=())


def test_around_a_volume_that_is_smaller_than_the_patch_lie_its_least_value_and_background(patches_of: Made) -> None:
    image, codes = np.full((1, 10, 20, 12), 3, np.float32), np.full((10, 20, 12), 1, np.uint8)
    image[0, 0, 0, 0] = -2
    for augmented in (False, True):
        crops, shown = patches_of([(image, codes)]).step(0, 0, 0, augmented)
        inside = shown == 1
        assert torch.all(inside.flatten(1).sum(1) == 10 * 16 * 12)
        assert torch.all((crops[:, 0][~inside] + 2).abs() < 1e-3) and torch.all(shown[~inside] == 0)


def test_warping_by_nothing_changes_nothing(patches_of: Made) -> None:
    patches = patches_of([volume(), volume((12, 40, 13))])
    for plain, warped in zip(patches.step(0, 0, 0, False), patches.step(0, 0, 0, True), strict=True):
        assert torch.allclose(plain.float(), warped.float(), atol=2e-2)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.08]))
def test_image_and_mask_move_together(tmp_path_factory: Any, seed: int, elastic: float) -> None:
    codes = np.zeros((30, 30, 30), np.uint8)
    codes[8:22, 10:20, 9:24] = 1
    config = STILL.model_copy(update={"rotate_degrees": 30.0, "scale": 0.3, "elastic": elastic})
    made = Made(tmp_path_factory.mktemp("pack"))
    patches = made([(codes[None].astype(np.float32), codes)], config, seed, mirror=(0, 2), batch_size=1)
    image, shown = patches.step(0, 0, 0)
    agree = ((image[:, 0] > 0.5) == (shown == 1)).float().mean()
    assert agree > 0.97 and (elastic or image[:, 0].max() <= 1.0001)


def test_a_turn_is_a_turn_in_mm_and_a_zoom_is_a_zoom(patches_of: Made) -> None:
    spacing = np.array([2.0, 1.0, 0.5])
    shape = tuple(int(60 / s) for s in spacing)
    away = np.meshgrid(*[(np.arange(n) + 0.5) * s - 30 for n, s in zip(shape, spacing, strict=True)], indexing="ij")
    ball = (sum(a**2 for a in away) < 10**2).astype(np.uint8)
    sides = tuple(int(n * 0.8) for n in shape)
    config = STILL.model_copy(update={"rotate_degrees": 90.0, "foreground": 1.0, "scale": 0.25})
    patches = patches_of(
        [(ball[None].astype(np.float32), ball)], config, spacing_mm=tuple(spacing), patch=sides, batch_size=12
    )
    codes = patches.step(0, 0, 0)[1].numpy()
    radii = [(np.sum(one) * spacing.prod() * 3 / 4 / np.pi) ** (1 / 3) for one in codes]
    assert 7.2 < min(radii) < 9 and 11 < max(radii) < 12.8
    for one, radius in zip(codes, radii, strict=True):  # a ball stays a ball
        deviations = [np.std(np.nonzero(one)[axis]) * spacing[axis] for axis in range(3)]
        assert max(deviations) / min(deviations) < 1.08 and radius > 0


def test_a_volume_of_thick_slices_is_only_turned_within_them(patches_of: Made) -> None:
    image, codes = np.zeros((1, 20, 40, 40), np.float32), np.zeros((20, 40, 40), np.uint8)
    image[0, 10:] = 1
    codes[5:15, 20, 20] = 1
    config = STILL.model_copy(update={"rotate_degrees": 45.0, "foreground": 1.0})
    images, _ = patches_of([(image, codes)], config, spacing_mm=(5.0, 1.0, 1.0)).step(0, 0, 0)
    assert torch.allclose(images, images[..., :1, :1].expand_as(images), atol=1e-5)


def test_a_warped_patch_shows_what_lies_around_it_and_no_border(patches_of: Made) -> None:
    image = np.ones((1, 64, 64, 64), np.float32)
    image[0, 0, 0, 0] = -9  # what a border would show
    codes = np.zeros((64, 64, 64), np.uint8)
    codes[32, 32, 32] = 1
    config = STILL.model_copy(update={"rotate_degrees": 45.0, "scale": 0.3, "elastic": 0.1, "foreground": 1.0})
    images, _ = patches_of([(image, codes)], config, batch_size=8).step(0, 0, 0)
    assert torch.allclose(images, torch.ones(()), atol=1e-5)


def test_mirroring_is_along_the_axes_of_the_plan(patches_of: Made) -> None:
    image, codes = volume((16, 16, 16))
    config = STILL.model_copy(update={"warped": 0.0})
    images, shown = patches_of([(image, codes)], config, mirror=(1,), batch_size=24).step(0, 0, 0)
    stored = torch.from_numpy(image[0].astype(np.float16).astype(np.float32))
    ways = [
        "as it is" if torch.equal(one[0], stored) else "mirrored" if torch.equal(one[0].flip(1), stored) else "other"
        for one in images
    ]
    assert set(ways) == {"as it is", "mirrored"}
    mirrored = [torch.equal(one.flip(1), torch.from_numpy(codes)) for one in shown]
    assert all(m == (w == "mirrored") for m, w in zip(mirrored, ways, strict=True))


def test_slices_of_volumes_come_with_their_neighbours(patches_of: Made) -> None:
    image = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None], (6, 30, 30))[None].copy()
    codes = np.zeros((6, 30, 30), np.uint8)
    codes[5, 10:20, 10:20] = 2
    more: Any = {"dimensions": 2, "neighbours": 1, "channels": 3, "patch": (16, 16), "batch_size": 16}
    patches = patches_of([(image, codes)], **more)
    for augmented in (False, True):
        images, shown = patches.step(0, 0, 0, augmented)
        assert images.shape == (16, 3, 16, 16) and shown.shape == (16, 16, 16)
        slices = [tuple(round(float(v)) for v in one[:, 8, 8]) for one in images]
        assert set(slices) <= {(max(s - 1, 0), s, min(s + 1, 5)) for s in range(6)} and (4, 5, 5) in slices
        assert all((s == (4, 5, 5)) or not c.any() for s, c in zip(slices, shown, strict=True))


def test_pictures_in_colour_are_cropped_and_turned(patches_of: Made) -> None:
    rng = np.random.default_rng(0)
    image, codes = rng.random((3, 40, 50)).astype(np.float32), np.ones((40, 50), np.uint8)
    more: Any = {"dimensions": 2, "axis": None, "channels": 3, "patch": (16, 24), "spacing_mm": None, "mirror": (0, 1)}
    images, shown = patches_of([(image, codes)], PatchesConfig(elastic=0.05), **more).step(0, 0, 0)
    assert images.shape == (3, 3, 16, 24) and shown.shape == (3, 16, 24)
    assert torch.isfinite(images).all()


def test_the_channels_of_a_picture_change_each_by_itself_and_those_of_slices_do_not(patches_of: Made) -> None:
    rng = np.random.default_rng(0)
    image, codes = rng.random((3, 16, 16)).astype(np.float32), np.ones((16, 16), np.uint8)
    coloured = STILL.model_copy(update={"colour": 0.3, "warped": 0.0})
    more: Any = {"dimensions": 2, "axis": None, "channels": 3, "patch": (16, 16), "spacing_mm": None}
    shown = patches_of([(image, codes)], coloured, **more).step(0, 0, 0)[0][0].numpy()
    fits = [np.polyfit(before.ravel(), after.ravel(), 1) for before, after in zip(image, shown, strict=True)]
    assert all(np.allclose(np.polyval(f, b), a, atol=2e-3) for f, b, a in zip(fits, image, shown, strict=True))
    gains = [float(gain) for gain, _ in fits]
    assert len({round(gain, 2) for gain in gains}) == 3 and all(np.exp(-0.31) < gain < np.exp(0.31) for gain in gains)

    more = {"dimensions": 2, "neighbours": 1, "channels": 3, "patch": (16, 16)}
    slices, codes = rng.random((1, 6, 16, 16)).astype(np.float32), np.ones((6, 16, 16), np.uint8)
    patches = patches_of([(slices, codes)], coloured, **more)
    assert torch.equal(patches.step(0, 0, 0)[0], patches.step(0, 0, 0, augmented=False)[0])


def test_blurring_is_a_gaussian() -> None:
    image = np.random.default_rng(0).normal(size=(2, 12, 14, 16)).astype(np.float32)
    wanted = np.stack([ndimage.gaussian_filter(one, 1.0, mode="nearest", truncate=3) for one in image])
    assert np.allclose(blurred(torch.from_numpy(image), 1.0), wanted, atol=1e-5)


def test_resolution_is_lost_and_the_size_is_kept() -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 20, 20, 20)).astype(np.float32))
    coarse = coarsened(image, 0.5)
    assert coarse.shape == image.shape and coarse.std() < 0.8 * image.std()


def test_intensities_change_as_much_whatever_the_scale_of_values_is() -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 12, 12, 12)).astype(np.float32))
    for seed in range(12):
        plain, scaled = image.clone(), image * 0.1 + 4
        for one in (plain, scaled):
            recoloured(np.random.default_rng(seed), one, PatchesConfig())
        assert torch.isfinite(plain).all() and torch.allclose(plain * 0.1 + 4, scaled, atol=2e-3)
    changed = image.clone()
    recoloured(np.random.default_rng(0), changed, PatchesConfig(low_resolution=1.0))
    assert not torch.equal(changed, image)
