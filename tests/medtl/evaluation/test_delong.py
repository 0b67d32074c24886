"""DeLong's variance is that of its pairs, and that of clusters where patients have several studies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from medtl.evaluation.delong import Area, area, contrast, covariance, interval

Array = np.ndarray[Any, np.dtype[np.float64]]
SOME = settings(derandomize=True, max_examples=40, deadline=None)
K = np.arange(60)
CASES: dict[str, Any] = {  # truth and the scores of two models
    "four diseased and nine healthy, ties": (
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        [0.1, 0.2, 0.2, 0.3, 0.4, 0.4, 0.5, 0.6, 0.7, 0.3, 0.4, 0.5, 0.6],
        [0.3, 0.1, 0.5, 0.3, 0.6, 0.2, 0.4, 0.8, 0.3, 0.4, 0.6, 0.2, 0.5],
    ),
    "one diseased in eight, mostly ties": (K % 8 == 3, K * 7 % 11 + 3 * (K % 8 == 3), K * 5 % 13 + 2 * (K % 8 == 3)),
    "two diseased in three, no ties": (
        K % 3 > 0,
        np.sin(K) + 0.5 * (K % 3 > 0),
        np.sin(1.7 * K + 1) + 0.8 * (K % 3 > 0),
    ),
}
# MLstatkit 0.1.91, Delong_test(*case): area and plain 95 % interval of each model; z (the second less the first) and p
MLSTATKIT = {
    "four diseased and nine healthy, ties": [
        (0.625, 0.3092984335678456, 0.9407015664321544),
        (0.5833333333333334, 0.21998027331723996, 0.9466863933494267),
        (-0.17568711308272944, 0.8605397600974043),
    ],
    "one diseased in eight, mostly ties": [
        (0.6201923076923077, 0.4306154488982236, 0.8097691664863917),
        (0.5973557692307692, 0.4362922343737112, 0.7584193040878271),
        (-0.19419186509400585, 0.8460256523437923),
    ],
    "two diseased in three, no ties": [
        (0.7012500000000002, 0.5573592113562469, 0.8451407886437534),
        (0.7987500000000001, 0.6809643350149799, 0.9165356649850203),
        (1.0251963538598174, 0.30527054832061684),
    ],
}


def studies(seed: int, n: int = 40) -> tuple[Array, Array, Array]:
    """Give truth and the scores of two models, with ties."""
    rng = np.random.default_rng(seed)
    truth = np.array([0, 1, 0, 1, *rng.integers(0, 2, n - 4)], float)
    one, other = (np.round(truth + rng.normal(size=n), 1) for _ in range(2))
    return truth, one, other


def pairs(truth: Array, score: Array) -> tuple[Array, Array]:
    """Compare everybody with everybody: the share of the other kind that each one is in order with."""
    ill, well = score[truth == 1], score[truth == 0]
    won = (ill[:, None] > well) + 0.5 * (ill[:, None] == well)
    return won.mean(1), won.mean(0)


def obuchowski(truth: Array, one: Array, other: Array, patient: Any) -> float:
    """Write the covariance of two clustered areas as the paper does, patient by patient."""
    (x, y), (u, v) = pairs(truth, one), pairs(truth, other)
    ill, well, a, b = patient[truth == 1], patient[truth == 0], x.mean(), u.mean()
    people = sorted(set(patient))
    sums = [
        [float((z[w == p] - m).sum()) for p in people]
        for z, w, m in ((x, ill, a), (y, well, a), (u, ill, b), (v, well, b))
    ]
    m, n, i10, i01, i = len(ill), len(well), len(set(ill)), len(set(well)), len(people)
    s10 = i10 / ((i10 - 1) * m) * sum(p * q for p, q in zip(sums[0], sums[2], strict=True))
    s01 = i01 / ((i01 - 1) * n) * sum(p * q for p, q in zip(sums[1], sums[3], strict=True))
    s11 = i / (i - 1) * sum(p * q for p, q in zip(sums[0], sums[3], strict=True))
    s11 += i / (i - 1) * sum(p * q for p, q in zip(sums[1], sums[2], strict=True))
    return s10 / m + s01 / n + s11 / (m * n)


@SOME
@given(seed=st.integers(0, 9999))
def test_with_one_study_of_each_patient_it_is_delongs_own(seed: int) -> None:
    truth, one, other = studies(seed)
    (x, y), (u, v) = pairs(truth, one), pairs(truth, other)
    wanted = np.cov(x, u) / len(x) + np.cov(y, v) / len(y)
    found = [area(truth, score) for score in (one, other)]
    assert [a.value for a in found] == pytest.approx([roc_auc_score(truth, one), roc_auc_score(truth, other)])
    table = [[covariance(a, b) for b in found] for a in found]
    assert np.array(table) == pytest.approx(wanted, abs=1e-14)
    difference = contrast(found[:1], found[1:])
    spread = wanted[0, 0] + wanted[1, 1] - 2 * wanted[0, 1]
    assert difference.error == pytest.approx(math.sqrt(max(0.0, spread)), abs=1e-9)
    if spread > 1e-12:
        assert difference.p_value == pytest.approx(2 * norm.sf(abs(difference.value) / math.sqrt(spread)))


@pytest.mark.parametrize("name", CASES)
def test_areas_variances_and_the_paired_test_are_mlstatkits(name: str) -> None:
    truth, *scores = (np.asarray(row, dtype=float) for row in CASES[name])
    found = [area(truth, score) for score in scores]
    *wanted, (z, p_value) = MLSTATKIT[name]
    for mine, (value, low, high) in zip(found, wanted, strict=True):
        reach = (high - low) / 2
        assert mine.value == pytest.approx(value, rel=1e-12)
        assert math.sqrt(covariance(mine, mine)) == pytest.approx(reach / norm.ppf(0.975), rel=1e-12)
        limits = interval(mine, 0.95)  # as many standard errors, but on the log odds
        assert logit(limits) - logit(value) == pytest.approx(
            np.array([-1, 1]) * reach / (value * (1 - value)), rel=1e-9
        )
    both = contrast(found[1:], found[:1])
    assert (both.z, both.p_value) == pytest.approx((z, p_value), rel=1e-12)


@SOME
@given(seed=st.integers(0, 9999), images=st.integers(2, 5))
def test_with_several_it_is_obuchowskis(seed: int, images: int) -> None:
    truth, one, other = studies(seed)
    patient = np.random.default_rng(seed).integers(0, 40 // images, 40)
    found = [area(truth, score, patient) for score in (one, other)]
    assert covariance(found[0], found[0]) == pytest.approx(obuchowski(truth, one, one, patient), abs=1e-13)
    assert covariance(*found) == pytest.approx(obuchowski(truth, one, other, patient), abs=1e-13)


@SOME
@given(seed=st.integers(0, 9999))
def test_neither_order_nor_numbering_nor_a_rising_curve_moves_it(seed: int) -> None:
    truth, one, _ = studies(seed)
    rng = np.random.default_rng(seed)
    patient, order, names = rng.integers(0, 12, 40), rng.permutation(40), rng.permutation(12)
    found = area(truth, one, patient)
    for other in (area(truth[order], one[order], patient[order]), area(truth, np.exp(one), names[patient])):
        assert (other.value, covariance(other, other)) == pytest.approx((found.value, covariance(found, found)))


def test_copies_of_each_study_leave_the_variance_over_patients_alone() -> None:
    truth, one, _ = studies(3)
    single = area(truth, one)
    copied = area(np.repeat(truth, 5), np.repeat(one, 5), np.repeat(np.arange(40), 5))
    assert covariance(copied, copied) == pytest.approx(covariance(single, single))
    apart = area(np.repeat(truth, 5), np.repeat(one, 5))
    assert covariance(apart, apart) < covariance(single, single) / 4


def test_a_class_and_its_mirror_image_have_one_variance() -> None:
    truth, one, other = studies(1, 200)
    both = contrast([area(truth, one), area(1 - truth, -one)], [area(truth, other), area(1 - truth, -other)])
    single = contrast([area(truth, one)], [area(truth, other)])
    assert both.value == pytest.approx(single.value)
    assert both.error == pytest.approx(single.error, rel=0.01)


def test_a_model_does_not_differ_from_itself() -> None:
    truth, one, _ = studies(0)
    found = contrast([area(truth, one)], [area(truth, one)])
    assert (found.value, found.error, found.p_value) == (0, 0, 1)


def test_the_interval_is_on_the_log_odds_and_stays_on_the_scale() -> None:
    truth, one, _ = studies(2)
    found = area(truth, one)
    limits = interval(found, 0.95)
    assert limits is not None
    low, high = limits
    odds = [math.log(value / (1 - value)) for value in (low, found.value, high)]
    error = math.sqrt(covariance(found, found)) / (found.value * (1 - found.value))
    assert odds[1] - odds[0] == pytest.approx(norm.ppf(0.975) * error) == pytest.approx(odds[2] - odds[1])


@pytest.mark.parametrize(
    "truth, score",
    [
        (np.zeros(4), np.arange(4.0)),
        (np.ones(4), np.arange(4.0)),
        (np.array([0.0, 1, 1]), np.arange(3.0)),
        (np.array([0.0, 0, 1, 1]), np.arange(4.0)),
        (np.array([0.0, 0, 1, 1]), np.array([0.1, np.nan, 0.2, 0.3])),
        (np.full(3, np.nan), np.arange(3.0)),
        (np.empty(0), np.empty(0)),
    ],
)
def test_what_is_not_estimable_has_no_interval_and_no_p_value(truth: Array, score: Array) -> None:
    found = area(truth, score)
    assert interval(found, 0.95) is None
    other = contrast([found], [area(truth, -score)])
    assert math.isnan(other.p_value)


def test_a_study_whose_truth_is_unknown_is_left_out() -> None:
    truth, one, _ = studies(5)
    more = np.concatenate([truth, [np.nan] * 3])
    found, whole = area(more, np.concatenate([one, [9.0, -9, 0]])), area(truth, one)
    assert isinstance(found, Area)
    assert (found.value, covariance(found, found)) == pytest.approx((whole.value, covariance(whole, whole)))


def test_under_no_difference_p_values_are_even_also_with_several_images() -> None:
    """Images of a patient share half of their variance; the plain test would call a third of them different."""
    clustered: list[float] = []
    plain: list[float] = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(60), 8)
        truth = (patient % 2).astype(float)
        one, other = (truth + rng.normal(size=60)[patient] + rng.normal(size=480) for _ in range(2))
        for people, found in ((patient, clustered), (None, plain)):
            found.append(contrast([area(truth, one, people)], [area(truth, other, people)]).p_value)
    assert 0.02 < np.mean(np.array(clustered) < 0.05) < 0.09
    assert np.mean(np.array(plain) < 0.05) > 0.3
