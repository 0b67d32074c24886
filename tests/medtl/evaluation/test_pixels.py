"""Counted pixels give the AUROC that sorted ones give: of one image, of all together, and of images that are drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from medtl.config import UncertaintyConfig
from medtl.evaluation.pixels import (
    PixelRanks,
    _pooled_auroc,
    pairs_in_order,
    pixel_ranks,
    pixel_scores,
    pooled_auroc,
)

Array = np.ndarray[Any, np.dtype[Any]]
SOME = settings(derandomize=True, max_examples=30, deadline=None)
FEW = UncertaintyConfig(resamples=200)


def drawn(seed: int, count: int, size: int = 90) -> list[tuple[Array, Array]]:
    """Images of probabilities in half precision, many of them tied, with their true masks."""
    rng = np.random.default_rng(seed)
    return [
        (np.round(rng.random(size), int(rng.integers(1, 4))).astype(np.float16), rng.random(size) < rng.random())
        for _ in range(count)
    ]


def ranks_of(images: list[tuple[Array, Array]]) -> list[PixelRanks]:
    return [pixel_ranks(f"s{i}", f"p{i}", *one) for i, one in enumerate(images)]


def test_several_images_together_have_one_auroc() -> None:
    images = drawn(3, 4)
    assert pooled_auroc(ranks_of(images)) == pytest.approx(by_scikit_learn(*images), abs=1e-12)
    assert pooled_auroc([]) is None
    assert pooled_auroc(ranks_of([(images[0][0], np.ones(90, bool))])) is None


def by_scikit_learn(*images: tuple[Array, Array]) -> float:
    told, true = (np.concatenate([np.ravel(part) for part in parts]) for parts in zip(*images, strict=True))
    return float(roc_auc_score(true, told.astype(np.float64)))


@SOME
@given(seed=st.integers(0, 9999))
def test_the_auroc_of_pixels_is_that_of_scikit_learn_also_with_ties(seed: int) -> None:
    ((probability, truth),) = drawn(seed, 1)
    counts = np.random.default_rng(seed).random(truth.shape) < 0.8
    told = np.where(counts, probability, np.float16(np.nan))
    pooled, mean = pixel_scores("vessel", [pixel_ranks("s", "p", told, truth, counts)], FEW, seed=0)
    if 0 < truth[counts].sum() < counts.sum():
        expected = by_scikit_learn((probability[counts], truth[counts]))
        assert (pooled.value, mean.value) == (pytest.approx(expected, abs=1e-12), pytest.approx(expected, abs=1e-12))
    else:
        assert pooled.value is None and "inside and outside" in pooled.note


@SOME
@given(seed=st.integers(0, 9999))
def test_pairs_of_any_two_images_are_counted_one_by_one(seed: int) -> None:
    images = drawn(seed, 3, size=12)
    by_hand = [
        [sum(float(a > b) + float(a == b) / 2 for a in p[t] for b in q[~u]) for q, u in images] for p, t in images
    ]
    assert pairs_in_order(ranks_of(images)).tolist() == by_hand


def test_every_value_of_half_precision_from_0_to_1_is_told_from_its_neighbour() -> None:
    values = np.arange(15_361, dtype=np.uint16).view(np.float16)
    assert (values[0], values[-1]) == (0, 1)
    ranks = pixel_ranks("s", "p", values, np.arange(len(values)) % 2 == 1)
    assert (ranks.inside + ranks.outside == 1).all() and ranks.inside.sum() == 7680
    assert pixel_ranks("s", "p", np.array([-0.0]), np.array([True])).inside[0] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1, 1e9])
def test_what_is_no_probability_is_refused_where_it_counts(value: float) -> None:
    told, truth = np.array([0.5, value]), np.array([True, False])
    with pytest.raises(ValueError, match="number from 0 to 1"):
        pixel_ranks("s", "p", told, truth)
    assert pixel_ranks("s", "p", told, truth, np.array([True, False])).outside.sum() == 0
    with pytest.raises(ValueError, match="one shape"):
        pixel_ranks("s", "p", told, truth[:1])


def test_pooled_pixels_are_those_of_all_images_put_together() -> None:
    images = drawn(7, 4)
    images[2] = (images[2][0], np.zeros(90, bool))
    pooled, mean = pixel_scores("vessel", ranks_of(images), FEW, seed=0)
    assert pooled.value == pytest.approx(by_scikit_learn(*images), abs=1e-12)
    assert mean.value == pytest.approx(np.mean([by_scikit_learn(one) for one in images if one[1].any()]), abs=1e-12)
    assert "1 of 4 images left out" in mean.note
    assert pooled.low is not None and pooled.low < pooled.value < (pooled.high or 0)


def test_images_without_the_structure_have_no_auroc_of_pixels() -> None:
    (probability, _), *_ = drawn(0, 1)
    for one in pixel_scores("vessel", ranks_of([(probability, np.zeros(90, bool))]), FEW, seed=0):
        assert one.value is None and "inside and outside" in one.note


def test_drawn_images_give_the_auroc_of_their_pixels() -> None:
    images = drawn(8, 3)
    ranks = ranks_of(images)
    sizes = np.array([[one.inside.sum(), one.outside.sum()] for one in ranks], dtype=float)
    found = _pooled_auroc(pairs_in_order(ranks), sizes, np.array([[2.0, 0, 1], [0, 0, 0]]))
    assert found[0] == pytest.approx(by_scikit_learn(images[0], images[0], images[2]), abs=1e-12)
    assert np.isnan(found[1])


def picture(path: Path) -> Array:
    with Image.open(path) as opened:
        return np.asarray(opened)


@pytest.mark.data
def test_pixels_of_real_retinas_are_ranked_inside_the_field_of_view_as_scikit_learn_ranks_them() -> None:
    root = Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "drive"
    ranks, inside = [], []
    for number in range(21, 24):
        dark = (1 - picture(root / "images" / f"{number}_training.tif")[..., 1] / 255).astype(np.float16)
        vessel = picture(root / "1st_manual" / f"{number}_manual1.gif") > 0
        field = picture(next((root / "mask").glob(f"{number}_*.gif"))) > 0
        ranks.append(pixel_ranks(f"s{number}", f"p{number}", dark, vessel, field))
        inside.append((dark[field], vessel[field]))
    pooled, mean = pixel_scores("vessel", ranks, FEW, seed=0)
    assert pooled.value == pytest.approx(by_scikit_learn(*inside), abs=1e-12)
    assert mean.value == pytest.approx(np.mean([by_scikit_learn(one) for one in inside]), abs=1e-12)
