"""Every metric against scikit-learn or a slow formula, and what it says where there is nothing to say."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.special import expit, logit
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from medtl.evaluation.metrics import (
    METRICS,
    SUREST,
    agreement_of_classes,
    agreement_of_grades,
    association_of_classes,
    auroc,
    calibration_error,
    calibration_intercept,
    calibration_slope,
    net_benefit,
)

Array = np.ndarray[Any, np.dtype[np.float64]]
Case = tuple[Array, Array, Array]
SOME = settings(derandomize=True, max_examples=25, deadline=None)


def _specificity(truth: Array, called: Array, sample_weight: Array) -> float:
    return float(sk.recall_score(truth, called, pos_label=0, sample_weight=sample_weight))


def _npv(truth: Array, called: Array, sample_weight: Array) -> float:
    return float(sk.precision_score(truth, called, pos_label=0, sample_weight=sample_weight))


ORACLES: dict[str, Any] = {
    "auroc": sk.roc_auc_score,
    "average_precision": sk.average_precision_score,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "sensitivity": sk.recall_score,
    "specificity": _specificity,
    "ppv": sk.precision_score,
    "npv": _npv,
    "f1": sk.f1_score,
    "brier": sk.brier_score_loss,
    "mcc": sk.matthews_corrcoef,
    "kappa": sk.cohen_kappa_score,
    "positive_likelihood_ratio": lambda truth, score, sample_weight: _likelihood_ratios(truth, score, sample_weight)[0],
    "negative_likelihood_ratio": lambda truth, score, sample_weight: _likelihood_ratios(truth, score, sample_weight)[1],
    "log_loss": lambda truth, score, sample_weight: sk.log_loss(
        truth, np.clip(score, SUREST, 1 - SUREST), sample_weight=sample_weight
    ),
    "net_benefit": lambda truth, score, sample_weight: _net_benefit(truth, score, sample_weight),
    "prevalence": lambda truth, _, sample_weight: np.average(truth, weights=sample_weight),
    "calibration_slope": lambda truth, score, sample_weight: _recalibrated(truth, score, sample_weight)[1],
    "calibration_intercept": lambda truth, score, sample_weight: _in_the_large(truth, score, sample_weight),
    "calibration_error": lambda truth, score, sample_weight: _calibration_error(truth, score, sample_weight),
}
NEED_OVERLAP = {"calibration_slope"}


def _likelihood_ratios(truth: Array, called: Array, weight: Array) -> tuple[float, float]:
    return tuple(map(float, sk.class_likelihood_ratios(truth, called, sample_weight=weight)))  # type: ignore[return-value]


def _net_benefit(truth: Array, called: Array, weight: Array) -> float:
    (_, alarm), (_, hit) = sk.confusion_matrix(truth, called, sample_weight=weight)
    return float((hit - alarm) / weight.sum())


def _odds(score: Array) -> Array:
    return np.asarray(logit(np.clip(score, SUREST, 1 - SUREST)), float)


def _recalibrated(truth: Array, score: Array, weight: Array) -> Array:
    """Search the best line by its likelihood alone, from values, in an optimiser that knows nothing of Newton."""
    x = _odds(score) / 5  # so that both numbers are of one size
    loss = lambda line: float(weight @ (np.logaddexp(0, line[0] + line[1] * x) - truth * (line[0] + line[1] * x)))  # noqa: E731
    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000})
    return np.array([found.x[0], found.x[1] / 5])


def _in_the_large(truth: Array, score: Array, weight: Array) -> float:
    """Find the constant at which as many are expected as there are."""
    return float(brentq(lambda a: weight @ (truth - expit(a + _odds(score))), -60, 60, xtol=1e-13))


def _calibration_error(truth: Array, score: Array, weight: Array, bins: int = 10) -> float:
    """Go through the bins one by one."""
    gaps = []
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins if number < bins - 1 else 1.1
        inside = (score >= low) & (score < high)
        gaps.append(abs(float(weight[inside] @ score[inside]) - float(weight[inside] @ truth[inside])))
    return sum(gaps) / float(weight.sum())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Give few studies with many ties, two resamples, both kinds and both decisions among those that count."""
    n = draw(st.integers(4, 40))
    truth = np.array([0, 1, 0, 1, *draw(st.lists(st.integers(0, 1), min_size=n - 4, max_size=n - 4))], float)
    score = np.array([0.2, 0.8, 0.8, 0.2, *draw(st.lists(st.integers(0, 10), min_size=n - 4, max_size=n - 4))], float)
    score[4:] = (score[4:] + 0.5) / 11  # in no bin's edge, where a last digit would decide
    weight = np.array([draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for _ in range(2)], float)
    weight[:, :4] += 1
    return truth, score, weight


@pytest.mark.parametrize("name", sorted(ORACLES))
@SOME
@given(case=cases())
def test_a_metric_agrees_with_an_independent_oracle_on_ties_and_weights(name: str, case: Case) -> None:
    truth, score, weight = case
    used = (score >= 0.5).astype(float) if METRICS[name].needs == "decisions" else score
    ours = METRICS[name].function(truth, used, weight)
    exact = 1e-5 if name in NEED_OVERLAP else 1e-10 if name == "calibration_intercept" else 1e-12
    assert ours == pytest.approx(
        [ORACLES[name](truth, used, sample_weight=row) for row in weight], abs=exact, rel=exact
    )


def test_every_metric_has_an_oracle_and_a_source() -> None:
    assert set(METRICS) == set(ORACLES)
    assert all(row.source for row in METRICS.values())


@pytest.mark.parametrize("name", sorted(METRICS))
@SOME
@given(case=cases(), seed=st.integers(0, 99))
def test_a_weight_is_that_many_copies_in_any_order(name: str, case: Case, seed: int) -> None:
    truth, score, weight = case
    used = (score >= 0.5).astype(float) if METRICS[name].needs == "decisions" else score
    order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(truth)), weight[0].astype(int)))
    once = METRICS[name].function(truth[order], used[order], np.ones((1, len(order))))
    assert METRICS[name].function(truth, used, weight[:1]) == pytest.approx(once, abs=1e-8)


@pytest.mark.parametrize("name", sorted(METRICS))
@SOME
@given(case=cases())
def test_a_metric_stays_on_its_scale(name: str, case: Case) -> None:
    truth, score, weight = case
    used = (score >= 0.5).astype(float) if METRICS[name].needs == "decisions" else score
    values = METRICS[name].function(truth, used, weight)
    scale = METRICS[name].scale
    assert ((values >= scale.lowest - 1e-12) & (values <= scale.highest + 1e-12)).all()


@pytest.mark.parametrize("name", sorted(METRICS))
def test_what_is_not_a_number_and_nobody_are_unknown(name: str) -> None:
    truth, score = np.array([0.0, 1, 0, 1, 1]), np.array([0.2, 0.9, 0.8, 0.3, 0.7])
    score = (score >= 0.5).astype(float) if METRICS[name].needs == "decisions" else score
    assert np.isfinite(METRICS[name].function(truth, score, np.ones((2, 5)))).all()
    if name != "prevalence":
        score[2] = np.nan
        assert np.isnan(METRICS[name].function(truth, score, np.ones((2, 5)))).all()
    empty = METRICS[name].function(np.empty(0), np.empty(0), np.ones((3, 0)))
    assert empty.shape == (3,) and np.isnan(empty).all()


def test_a_calibration_slope_says_by_how_much_a_model_is_too_sure() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(0.4, 1.5, 40_000)
    truth, ones = (rng.random(40_000) < expit(odds)).astype(float), np.ones((1, 40_000))
    assert calibration_slope(truth, expit(odds), ones) == pytest.approx([1], abs=0.03)
    assert calibration_slope(truth, expit(2 * odds), ones) == pytest.approx([0.5], abs=0.02)
    assert calibration_intercept(truth, expit(odds), ones) == pytest.approx([0], abs=0.03)
    assert calibration_intercept(truth, expit(odds - 1), ones) == pytest.approx([1], abs=0.03)


def test_a_slope_is_unknown_where_a_threshold_parts_the_kinds_or_all_scores_are_one() -> None:
    truth = np.array([0.0, 0, 1, 1])
    rows = np.array([[1.0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 1], [2, 1, 3, 0]])
    found = calibration_slope(truth, np.array([0.2, 0.6, 0.4, 0.8]), rows)
    assert np.isfinite(found).tolist() == [True, False, False, True]
    assert np.isnan(calibration_slope(truth, np.full(4, 0.7), rows)).all()
    assert np.isnan(calibration_slope(truth, truth, rows)).all()
    assert np.isnan(calibration_slope(truth, 1 - truth, rows)).all()


@SOME
@given(seed=st.integers(0, 10_000), n=st.integers(5, 30), sure=st.sampled_from([0.01, 1.0, 30.0, 1e4]))
def test_the_slope_settles_wherever_there_is_one(seed: int, n: int, sure: float) -> None:
    rng = np.random.default_rng(seed)
    truth, odds = np.array([1.0, 0, 1, 0, *rng.integers(0, 2, n)]), np.array([-1, 1, 1, -1, *rng.normal(size=n)]) * sure
    odds, ones = np.clip(odds, -15, 15), np.ones((1, n + 4))
    (slope,) = calibration_slope(truth, expit(odds), ones)
    assert np.isfinite(slope)
    best = LogisticRegression(C=np.inf, tol=1e-10, solver="newton-cholesky", max_iter=500)
    scale = np.abs(odds).max()
    best.fit(odds[:, None] / scale, truth)
    assert slope == pytest.approx(best.coef_[0, 0] / scale, rel=1e-3, abs=1e-3 / scale)


def test_net_benefit_weighs_a_false_alarm_by_the_odds_of_the_threshold() -> None:
    truth, called = np.array([1.0, 1, 0, 0, 0]), np.array([1.0, 0, 1, 1, 0])
    assert net_benefit(truth, called, np.ones((1, 5)), odds=0.25) == pytest.approx([(1 - 2 * 0.25) / 5])
    assert net_benefit(truth, np.zeros(5), np.ones((1, 5)), odds=0.25) == [0]


@SOME
@given(seed=st.integers(0, 999), classes=st.integers(2, 5), n=st.integers(10, 60))
def test_one_decision_among_several_classes_agrees_with_scikit_learn(seed: int, classes: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), rng.integers(0, classes, n)])
    chosen = np.where(rng.random(len(truth)) < 0.5, truth, rng.permutation(truth))
    weight = rng.integers(1, 4, (2, len(truth))).astype(float)
    how = {"sample_weight": weight[1]}
    kappa = agreement_of_classes(truth, chosen, weight, classes)
    assert kappa[1] == pytest.approx(sk.cohen_kappa_score(truth, chosen, **how), abs=1e-12)
    graded = agreement_of_grades(truth, chosen, weight, classes)
    assert graded[1] == pytest.approx(sk.cohen_kappa_score(truth, chosen, weights="quadratic", **how), abs=1e-12)
    mcc = association_of_classes(truth, chosen, weight, classes)
    assert mcc[1] == pytest.approx(sk.matthews_corrcoef(truth, chosen, **how), abs=1e-12)


def test_one_class_alone_leaves_agreement_unknown() -> None:
    same, weight = np.zeros(5, int), np.ones((2, 5))
    for function in (agreement_of_classes, agreement_of_grades, association_of_classes):
        assert np.isnan(function(same, same, weight, 3)).all()


def test_the_calibration_error_is_the_gap_of_each_bin_by_its_size() -> None:
    truth, score = np.array([0.0, 1, 1, 1]), np.array([0.1, 0.1, 0.9, 0.9])
    assert calibration_error(truth, score, np.ones((1, 4)), bins=5) == pytest.approx([0.5 * 0.4 + 0.5 * 0.1])


def test_all_scores_equal_is_an_auroc_of_one_half() -> None:
    assert auroc(np.array([0.0, 1, 1]), np.full(3, 0.7), np.ones((2, 3))).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("kind", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 5])
def test_one_class_is_not_estimable_and_never_a_crash(name: str, kind: float, n: int) -> None:
    truth, score = np.full(n, kind), np.ones(n) if kind else np.zeros(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = METRICS[name].function(truth, score, np.ones((3, n)))
    assert value.shape == (3,)
    needs_both = {"auroc", "balanced_accuracy", "mcc", "kappa", "positive_likelihood_ratio"}
    needs_both |= {"negative_likelihood_ratio", "calibration_slope", "calibration_intercept"}
    needs_one = {"specificity", "npv"} if kind else {"average_precision", "sensitivity", "ppv", "f1"}
    assert np.isnan(value).all() == (name in needs_both | needs_one)


def test_a_resample_without_a_kind_is_unknown_and_not_zero() -> None:
    weight = np.array([[1.0, 1, 1, 1], [0, 0, 1, 1]])
    value = auroc(np.array([0.0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4]), weight)
    assert value[0] == 1 and np.isnan(value[1])


def test_many_resamples_in_chunks_are_the_same_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    truth, score, weight = rng.integers(0, 2, 50) * 1.0, rng.random(50), rng.integers(0, 3, (30, 50)) * 1.0
    whole = auroc(truth, score, weight)
    monkeypatch.setattr("medtl.evaluation.metrics._CHUNK", 7 * 50)
    assert np.array_equal(auroc(truth, score, weight), whole)
