"""Masks share what they share, nothing is not zero, and a missed lesion is not left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm
from sklearn.metrics import f1_score, jaccard_score

from medtl.config import UncertaintyConfig
from medtl.evaluation.overlap import MASK_METRICS, Pair, _expanded, _median, overlap_of, pairs, summary
from medtl.evaluation.surfaces import measure

Array = np.ndarray[Any, np.dtype[Any]]
SOME = settings(derandomize=True, max_examples=60, deadline=None)
CONFIG = UncertaintyConfig(resamples=500)


def masks(seed: int, labels: int = 1) -> tuple[Array, Array]:
    """Give two label images of a few voxels, some of them without a label or two."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, rng.integers(2, 4)))
    one, other = (rng.integers(0, labels + 1, shape) * (rng.random(shape) < rng.random()) for _ in "12")
    return one, other


@SOME
@given(seed=st.integers(0, 9999))
def test_dice_and_iou_are_those_of_scikit_learn(seed: int) -> None:
    truth, predicted = masks(seed, labels=3)
    for pair in pairs(truth, predicted):
        found = overlap_of(pair, [1.0] * truth.ndim)
        flat = (truth == pair.label).ravel(), (predicted == pair.label).ravel()
        assert found.dice == pytest.approx(f1_score(*flat), abs=1e-15)
        assert found.iou == pytest.approx(jaccard_score(*flat), abs=1e-15)
        assert found.dice is not None and found.iou is not None
        assert found.dice == pytest.approx(2 * found.iou / (1 + found.iou))


@SOME
@given(seed=st.integers(0, 9999))
def test_labels_in_one_pass_are_as_each_of_them_alone(seed: int) -> None:
    truth, predicted = masks(seed, labels=3)
    spacing = (0.5, 2.0, 1.5)[: truth.ndim]
    found = [overlap_of(pair, spacing) for pair in pairs(truth, predicted)]
    assert [one.label for one in found] == sorted({*truth.flat, *predicted.flat} - {0})
    for one in found:
        (alone,) = (overlap_of(pair, spacing) for pair in pairs(truth == one.label, predicted == one.label))
        assert (alone.dice, alone.iou, alone.truth_mm3) == (one.dice, one.iou, one.truth_mm3)
        assert one.truth_mm3 == pytest.approx((truth == one.label).sum() * np.prod(spacing))


def test_a_volume_error_has_a_sign_and_a_size() -> None:
    truth, predicted = np.zeros((2, 4, 5, 6), bool)
    truth[:2, :2, :2], predicted[:1, :2, :2] = True, True
    found = overlap_of(next(pairs(truth, predicted)), (1.0, 0.5, 2.0))
    assert (found.truth_mm3, found.predicted_mm3, found.volume_error_mm3) == (8.0, 4.0, -4.0)
    assert (found.relative_volume_error, found.absolute_relative_volume_error) == (-0.5, 0.5)
    assert (found.absolute_volume_error_mm3, found.dice, found.iou) == (4.0, 2 / 3, 0.5)


def test_a_missed_lesion_has_a_dice_of_zero_and_two_empty_masks_have_none() -> None:
    nothing, lesion = np.zeros((5, 5), bool), np.eye(5, dtype=bool)
    missed, invented, neither = (
        overlap_of(next(pairs(*two)), (1.0, 1.0)) for two in ((lesion, nothing), (nothing, lesion), (nothing, nothing))
    )
    assert (missed.dice, missed.iou, missed.relative_volume_error) == (0, 0, -1)
    assert "predicted mask is empty" in missed.note
    assert (invented.dice, invented.relative_volume_error, invented.absolute_relative_volume_error) == (0, None, None)
    assert "true mask is empty" in invented.note
    assert (neither.dice, neither.iou, neither.relative_volume_error) == (None, None, None)
    assert "not estimable" in neither.note
    agreed = overlap_of(next(pairs(nothing, nothing)), (1.0, 1.0), empty="agree")
    assert (agreed.dice, agreed.iou) == (1, 1) and "agree" in agreed.note


def test_wanted_labels_come_in_their_order_also_where_they_do_not_occur() -> None:
    truth, predicted = np.array([[1, 2], [0, 0]]), np.array([[1, 0], [0, 0]])
    found = {pair.label: overlap_of(pair, (1.0, 1.0)).dice for pair in pairs(truth, predicted, [7, 2, 1])}
    assert list(found.items()) == [(7, None), (2, 0), (1, 1)]
    assert [pair.label for pair in pairs(truth > 0, predicted > 0, [2, 1])] == [2, 1]
    assert list(pairs(truth * 0, predicted * 0)) == []


def test_how_an_array_lies_in_memory_does_not_matter() -> None:
    truth, predicted = np.random.default_rng(0).integers(0, 3, (2, 6, 7, 8))
    wanted = [overlap_of(pair, (1.0, 1.0, 1.0)) for pair in pairs(truth, predicted)]
    other = [overlap_of(p, (1.0, 1.0, 1.0)) for p in pairs(np.asfortranarray(truth), predicted.astype(np.uint8)[...])]
    assert wanted == other


@pytest.mark.parametrize(
    "truth, predicted, labels, message",
    [
        (np.zeros((3, 3), int), np.zeros((3, 4), int), None, "shapes"),
        (np.zeros(3, int), np.zeros(3, int), None, "2-D or 3-D"),
        (np.zeros((3, 3)), np.zeros((3, 3)), None, "bool or integer"),
        (np.full((3, 3), -1), np.zeros((3, 3), int), None, "labels from"),
        (np.full((3, 3), 10**6), np.zeros((3, 3), int), None, "labels from"),
        (np.ones((3, 3), int), np.ones((3, 3), int), [0], "background"),
    ],
)
def test_what_is_no_mask_is_refused(truth: Array, predicted: Array, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(pairs(truth, predicted, labels))


def test_every_metric_of_the_table_is_a_value_of_a_case() -> None:
    mask = np.eye(4, dtype=bool)
    (case,) = measure(mask, mask, (1.0, 1.0), 1.0)
    for name in MASK_METRICS:
        values = [getattr(part, name) for part in case if hasattr(part, name)]
        assert len(values) == 1 and values[0] in (0.0, 1.0), name


def people(count: int, cases: int = 1) -> tuple[list[str], list[str]]:
    return [f"c-{n:04d}" for n in range(count * cases)], [f"p-{n // cases:04d}" for n in range(count * cases)]


def test_mean_and_median_over_patients_have_intervals() -> None:
    rng = np.random.default_rng(0)
    values = rng.beta(8, 2, 80)
    found = summary("dice", list(values), *people(80), CONFIG, 0)
    assert (found.mean.value, found.median.value) == pytest.approx((values.mean(), np.median(values)))
    for score, statistic in ((found.mean, np.mean), (found.median, np.median)):
        limits = bootstrap((values,), statistic, method="percentile", rng=np.random.default_rng(1)).confidence_interval
        assert (score.low, score.high) == pytest.approx(tuple(limits), abs=0.012)
        assert (score.n, score.patients, score.note) == (80, 80, "")


def test_cases_of_one_patient_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.beta(8, 2, 30), 5)
    together = summary("dice", list(values), *people(30, 5), CONFIG, 0)
    apart = summary("dice", list(values), *people(150), CONFIG, 0)
    for few, many in ((together.mean, apart.mean), (together.median, apart.median)):
        assert few.low is not None and few.high is not None and many.low is not None and many.high is not None
        assert few.high - few.low > 1.6 * (many.high - many.low)
        assert (few.n, few.patients) == (150, 30)


def test_cases_that_are_not_estimable_are_counted_and_left_out() -> None:
    values: list[float | None] = [1.0, 2.0, None, 4.0, None, 3.0, 2.5, 1.5]
    found = summary("hd95_mm", values, *people(8), CONFIG, 0, "liver")
    assert (found.cases, found.not_estimable, found.mean.n, found.mean.label) == (8, 2, 6, "liver")
    assert found.mean.value == pytest.approx(14 / 6) and found.median.value == 2.25
    assert "2 of 8 cases not estimable" in found.mean.note and "2 of 8" in found.median.note
    nothing = summary("hd95_mm", [None, None], *people(2), CONFIG, 0)
    assert (nothing.mean.value, nothing.median.value, nothing.not_estimable) == (None, None, 2)
    assert "no case has a value" in nothing.mean.note


def test_intervals_lie_on_the_scale_of_their_value() -> None:
    error = np.random.default_rng(0).normal(0, 0.2, 30)
    signed = summary("relative_volume_error", list(error), *people(30), CONFIG, 0)
    far = summary("hd95_mm", list(np.exp(5 * error) * 3), *people(30), CONFIG, 0)
    for score in (signed.mean, signed.median):
        assert score.low is not None and score.high is not None and score.low < 0 < score.high
    for score in (far.mean, far.median):
        assert score.low is not None and score.high is not None and 1 < score.low < score.high


def test_few_patients_widen_the_percentiles_of_a_median() -> None:
    """Of ten, Student's 2.262 times the root of 10 / 9 is the normal's 0.86 % on each side, instead of 2.5 %."""
    assert (1 - _expanded(0.95, 10)) / 2 == pytest.approx(norm.sf(2.2622 * np.sqrt(10 / 9)), rel=1e-3)
    assert _expanded(0.95, 100_000) == pytest.approx(0.95, abs=1e-4) and _expanded(0.95, 1) == 0.95
    values = list(np.random.default_rng(0).beta(8, 2, 30))
    wide, narrow = (
        summary("dice", values, *people(30), UncertaintyConfig(resamples=1000, method=method), 0).median
        for method in ("auto", "percentile")
    )
    assert wide.low is not None and wide.high is not None and narrow.low is not None and narrow.high is not None
    assert wide.low < narrow.low and narrow.high < wide.high


def test_one_patient_has_a_value_and_no_interval() -> None:
    found = summary("assd_mm", [1.0, 3.0], ["c-1", "c-2"], ["p-1", "p-1"], CONFIG, 0)
    assert (found.mean.value, found.mean.low) == (2.0, None) and "two patients" in found.mean.note


@SOME
@given(seed=st.integers(0, 9999), count=st.integers(2, 12))
def test_a_weighted_median_is_that_of_the_repeated_values(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    values, weight = rng.integers(0, 6, count).astype(float), rng.integers(0, 4, (3, count)).astype(float)
    weight[:, 0] += 1
    wanted = [np.median(np.repeat(values, row.astype(int))) for row in weight]
    assert _median(values, weight) == pytest.approx(wanted)


def test_a_pair_is_cut_to_the_box_of_both() -> None:
    truth, predicted = np.zeros((2, 50, 60, 70), bool)
    truth[10, 20, 30], predicted[12, 21, 30] = True, True
    (pair,) = pairs(truth, predicted)
    assert isinstance(pair, Pair) and pair.truth.shape == pair.predicted.shape == (3, 2, 1)
