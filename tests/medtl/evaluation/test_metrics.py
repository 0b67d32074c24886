"""Every metric against scikit-learn, and what it says where there is nothing to say."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from medtl.evaluation.metrics import METRICS, auroc, calibration_error

Array = np.ndarray[Any, np.dtype[np.float64]]
Case = tuple[Array, Array, Array]


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
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Give few studies with many ties, two resamples, both kinds and both decisions among those that count."""
    n = draw(st.integers(4, 40))
    truth = np.array([0, 1, 0, 1, *draw(st.lists(st.integers(0, 1), min_size=n - 4, max_size=n - 4))], float)
    score = np.array([0.2, 0.8, 0.8, 0.2, *draw(st.lists(st.integers(0, 10), min_size=n - 4, max_size=n - 4))], float)
    score[4:] /= 10
    weight = np.array([draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for _ in range(2)], float)
    weight[:, :4] += 1
    return truth, score, weight


@pytest.mark.parametrize("name", sorted(ORACLES))
@given(case=cases())
def test_a_metric_agrees_with_scikit_learn_on_ties_and_weights(name: str, case: Case) -> None:
    truth, score, weight = case
    used = (score >= 0.5).astype(float) if METRICS[name].needs == "decisions" else score
    ours = METRICS[name].function(truth, used, weight)
    assert ours == pytest.approx([ORACLES[name](truth, used, sample_weight=row) for row in weight], abs=1e-12)


def test_every_metric_but_the_calibration_error_has_an_oracle() -> None:
    assert set(METRICS) == set(ORACLES) | {"calibration_error"}


@given(case=cases())
def test_a_weight_is_that_many_copies(case: Case) -> None:
    truth, score, weight = case
    copies = weight[0].astype(int)
    once = calibration_error(np.repeat(truth, copies), np.repeat(score, copies), np.ones((1, copies.sum())))
    assert calibration_error(truth, score, weight[:1]) == pytest.approx(once)


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
    needs_both = {"auroc", "balanced_accuracy"}
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
