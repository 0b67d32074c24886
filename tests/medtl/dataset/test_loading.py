"""Every image once per epoch, and an epoch can be had again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtl.config import TransformsConfig
from medtl.dataset.io import read_pack, write_pack
from medtl.dataset.loading import EvaluationBatches, TrainingBatches, rows_of, slices_of, voted
from medtl.dataset.transforms import prepare, prepare_scan
from medtl.errors import PlanError
from medtl.progress import listening
from medtl.records import Plan, Scan

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), dtype=np.uint8)
TARGETS = np.stack([np.arange(40) % 2, np.arange(40)], 1) * 1.0  # the second tells which image it is


def training(rows: list[int], batch_size: int = 8, seed: int = 0) -> TrainingBatches:
    return TrainingBatches(IMAGES, TARGETS, rows, batch_size, TransformsConfig(), seed)


def same(left: Any, right: Any) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(np.array_equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


@given(st.sets(st.integers(0, 39), min_size=1), st.integers(1, 12), st.integers(0, 5))
def test_an_epoch_holds_each_image_once(rows: set[int], batch_size: int, epoch: int) -> None:
    batches = training(sorted(rows), batch_size)
    seen = [targets[:, 1].astype(int) for _, targets in batches.epoch(0, epoch, augmented=False)]
    assert sorted(np.concatenate(seen).tolist()) == sorted(rows)
    assert len(seen) == len(batches) and max(map(len, seen)) <= batch_size
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_seed_phase_and_epoch_alone_decide_the_batches(seed: int, phase: int, epoch: int) -> None:
    rows = list(range(40))
    first = list(training(rows, seed=seed).epoch(phase, epoch))
    assert same(first, training(rows, seed=seed).epoch(phase, epoch))
    for other in ((seed + 1, phase, epoch), (seed, phase + 1, epoch), (seed, phase, epoch + 1)):
        assert not same(first, training(rows, seed=other[0]).epoch(*other[1:]))


def test_images_keep_their_targets_and_only_augmentation_changes_them() -> None:
    batches = training(list(range(0, 40, 3)))
    for images, targets in batches.epoch(1, 2, augmented=False):
        assert np.array_equal(images, IMAGES[targets[:, 1].astype(int)])
    plain, turned = (list(batches.epoch(1, 2, augmented=choice)) for choice in (False, True))
    for (image, target), (other, other_target) in zip(plain, turned, strict=True):
        assert np.array_equal(target, other_target) and not np.array_equal(image, other)


def test_evaluation_keeps_the_order_and_the_last_few() -> None:
    rows = [5, 3, 30, 1, 8]
    batches = EvaluationBatches(IMAGES, TARGETS, rows, 2)
    assert [t[:, 1].astype(int).tolist() for _, t in batches] == [[5, 3], [30, 1], [8]]
    assert np.array_equal(np.concatenate([i for i, _ in batches]), IMAGES[rows])
    assert len(batches) == 3


@pytest.mark.parametrize("bits, channels", [(8, 1), (16, 3)])
def test_a_pack_holds_what_prepare_gives_and_can_be_read_only(
    tmp_path: Path, plan: Plan, bits: int, channels: int
) -> None:
    wanted = replace(plan, bits=bits, channels=channels, high=255.0 if bits == 8 else 300.0)
    pictures = {f"scan-{i}": np.full((20 + i, 40), 10 * i, np.uint8) for i in range(3)}
    scans = [Scan(name, "image", p.shape, "|u1", name, (), 8) for name, p in pictures.items()]
    told: list[tuple[int, int]] = []
    with listening(lambda _, done, total: told.append((done, total))):
        write_pack(tmp_path, scans, lambda scan: pictures[scan.scan_id], wanted)
    pack = read_pack(tmp_path)
    assert np.array_equal(pack, np.stack([prepare(p, wanted) for p in pictures.values()]))
    assert isinstance(pack, np.memmap) and not pack.flags.writeable
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_slices_of_a_volume_are_rows_one_after_the_other(tmp_path: Path, plan: Plan) -> None:
    place = ((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 3.0, 0), (0, 0, 0, 1.0))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 9, 32, 32)).astype(np.uint8)
    scans = [Scan(str(n), "nifti", (9, 32, 32), "|u1", str(n), (), 8, affine=place) for n in range(2)]
    how = replace(plan, volumes="slices", axis="axial", slices=3, bits=16)
    write_pack(tmp_path, scans, lambda scan: pixels[int(scan.scan_id)], how)
    pack = read_pack(tmp_path)
    assert pack.shape == (6, 32, 32, 1) and slices_of(pack, 2) == 3
    assert np.array_equal(pack[rows_of([1], 3)], prepare_scan(pixels[1], scans[1], how))


def test_the_slices_of_each_study_vote_by_their_mean() -> None:
    found = voted(np.array([[0.2, 0.8], [0.4, 0.6], [1.0, 0.0], [0.5, 0.5]]), 2)
    assert found == pytest.approx(np.array([[0.3, 0.7], [0.75, 0.25]]))
    assert rows_of([2, 0], 2) == [4, 5, 0, 1]


def test_a_pack_of_other_studies_is_refused() -> None:
    with pytest.raises(PlanError, match="40 packed rows do not belong to 7 studies"):
        slices_of(IMAGES, 7)


def test_a_view_of_a_volume_does_not_depend_on_its_batch() -> None:
    volumes = np.random.default_rng(1).integers(0, 65535, (6, 4, 16, 12, 1)).astype(np.uint16)
    batches = TrainingBatches(volumes, TARGETS[:6], range(6), 2, TransformsConfig(), 0)
    together = batches.view(np.arange(6), 3)
    assert together.shape == volumes.shape and not np.array_equal(together, volumes)
    assert np.array_equal(together[4:5], batches.view(np.array([4]), 3))
    flat = replace(batches, images=volumes[:, 2], _drawn={})
    assert np.array_equal(together[:, 2], flat.view(np.arange(6), 3))
