"""Metrics against scikit-learn, and what happens where nothing can be estimated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from medtl.config import EvaluationConfig, ThresholdConfig, UncertaintyConfig
from medtl.evaluation import metrics
from medtl.evaluation.assess import assess
from medtl.evaluation.comparison import compare
from medtl.evaluation.io import read_predictions, write_predictions
from medtl.evaluation.metrics import METRICS
from medtl.evaluation.threshold import choose
from medtl.evaluation.uncertainty import patient_weights, score_of
from medtl.records import Predictions

FAST = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=200))
scores = st.lists(st.integers(0, 8), min_size=4, max_size=40)


@settings(deadline=None)
@given(values=scores, seed=st.integers(0, 1000))
def test_ranking_metrics_equal_scikit_learn_with_ties_and_weights(values: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = np.array(values) / 8
    truth = rng.integers(0, 2, len(score)).astype(float)
    weight = rng.integers(0, 4, (3, len(score))).astype(float)
    weight[0] = 1
    assume(all(len(np.unique(truth[row > 0])) == 2 for row in weight))
    for row, ours, ap in zip(
        weight, metrics.auroc(truth, score, weight), metrics.average_precision(truth, score, weight), strict=True
    ):
        assert ours == pytest.approx(oracle.roc_auc_score(truth, score, sample_weight=row), abs=1e-12)
        assert ap == pytest.approx(oracle.average_precision_score(truth, score, sample_weight=row), abs=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_decision_metrics_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, called = rng.integers(0, 2, (2, 30)).astype(float)
    assume(0 < truth.sum() < 30 and 0 < called.sum() < 30)
    one = np.ones((1, 30))
    expected = {
        "sensitivity": oracle.recall_score(truth, called),
        "specificity": oracle.recall_score(1 - truth, 1 - called),
        "balanced_accuracy": oracle.balanced_accuracy_score(truth, called),
        "ppv": oracle.precision_score(truth, called),
        "npv": oracle.precision_score(1 - truth, 1 - called),
        "f1": oracle.f1_score(truth, called),
    }
    for name, value in expected.items():
        assert METRICS[name].function(truth, called, one)[0] == pytest.approx(value, abs=1e-12), name


def test_brier_and_calibration_by_hand() -> None:
    truth, score, one = np.array([0.0, 1, 1, 1]), np.array([0.05, 0.05, 0.95, 0.85]), np.ones((1, 4))
    assert metrics.brier(truth, score, one)[0] == pytest.approx(oracle.brier_score_loss(truth, score))
    # bins 0, 8 and 9: gaps .45 (two studies), .15, .05
    assert metrics.calibration_error(truth, score, one)[0] == pytest.approx((0.9 + 0.15 + 0.05) / 4)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_bounded_and_never_crashes(name: str) -> None:
    rng = np.random.default_rng(0)
    for truth in (np.zeros(6), np.ones(6), rng.integers(0, 2, 6).astype(float)):
        value = METRICS[name].function(truth, np.round(rng.random(6)), np.ones((2, 6)))
        assert value.shape == (2,)
        assert np.isnan(value).all() or ((value >= 0) & (value <= 1)).all()


def test_one_class_is_not_estimable_and_not_zero() -> None:
    test = predictions(np.zeros(10, int), np.linspace(0, 1, 10))
    result = assess(predictions(np.arange(10) % 2, np.linspace(0, 1, 10)), test, "binary", ("no", "yes"), FAST, 0)
    score = result.score("auroc")
    assert (score.value, score.low, score.high) == (None, None, None)
    assert "not estimable" in score.note
    assert result.score("brier").value is not None


def test_one_patient_has_a_value_and_no_interval() -> None:
    truth, probability = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.4, 0.6])
    one = predictions(truth, probability, patients=("p",) * 4)
    score = assess(one, one, "binary", ("no", "yes"), FAST, 0).score("auroc")
    assert (score.value, score.low) == (1.0, None)
    assert "fewer than two patients" in score.note


def test_images_of_one_patient_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.integers(0, 2, 40), 10)
    score = np.clip(np.repeat(rng.normal(0.45, 0.2, 40), 10) + truth * 0.15, 0, 1)
    by_patient = tuple(str(i // 10) for i in range(400))
    by_image = tuple(str(i) for i in range(400))
    widths = []
    for patients in (by_patient, by_image):
        found = predictions(truth, score, patients=patients)
        interval = assess(found, found, "binary", ("no", "yes"), FAST, 0).score("auroc")
        assert interval.low is not None
        assert interval.high is not None
        widths.append(interval.high - interval.low)
    assert widths[0] > 2 * widths[1]


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for repeat in range(120):
        truth = rng.integers(0, 2, 120)
        score = 1 / (1 + np.exp(-rng.normal(truth * 1.0, 1.0)))
        weights = patient_weights([str(i) for i in range(120)], 300, repeat)
        draws = metrics.auroc(truth.astype(float), score, weights)
        low, high = np.quantile(draws, [0.025, 0.975])
        covered += low <= 0.7602 <= high  # Phi(1 / sqrt 2)
    assert 0.88 <= covered / 120 <= 1.0


def test_every_drawn_sample_has_as_many_patients() -> None:
    weights = patient_weights(["a", "a", "b", "c"], 500, 0)
    assert np.array_equal(weights[:, 0], weights[:, 1])
    assert set((weights[:, 0] + weights[:, 2] + weights[:, 3]).tolist()) == {3.0}
    assert np.array_equal(weights, patient_weights(["a", "a", "b", "c"], 500, 0))


def test_too_many_resamples_without_a_kind_give_no_interval() -> None:
    draws = np.array([0.5] * 70 + [np.nan] * 30)
    assert score_of("auroc", "x", 0.5, draws, 0.95, ["a", "b", "c"], 2).low is None


@pytest.mark.parametrize(
    ("rule", "target", "expected"), [("sensitivity", 1.0, 0.3), ("specificity", 1.0, 0.7), ("youden", 0, 0.5)]
)
def test_thresholds_lie_between_scores(rule: str, target: float, expected: float) -> None:
    truth = np.array([0, 0, 1, 0, 1, 1.0])
    score = np.array([0.1, 0.2, 0.4, 0.6, 0.8, 0.9])
    point = choose(truth, score, ThresholdConfig(rule=rule, target=target), "yes")  # type: ignore[arg-type]
    if rule == "youden":
        assert point.threshold in (pytest.approx(0.3), pytest.approx(0.7))
    else:
        assert point.threshold == pytest.approx(expected)
    assert point.chosen_on == "val"


def test_validation_of_one_kind_gives_one_half_and_says_so() -> None:
    point = choose(np.ones(3), np.array([0.2, 0.3, 0.4]), ThresholdConfig(), "yes")
    assert point.threshold == 0.5
    assert "one kind" in point.rule


def test_a_model_does_not_differ_from_itself() -> None:
    rng = np.random.default_rng(0)
    found = predictions(rng.integers(0, 2, 60), rng.random(60))
    comparison = compare(found, found, ("a", "b"), UncertaintyConfig(resamples=200), 0)
    assert (comparison.difference.value, comparison.difference.low, comparison.difference.high) == (0.0, 0.0, 0.0)
    other = predictions(rng.integers(0, 2, 60), rng.random(60), patients=tuple(map(str, range(1, 61))))
    with pytest.raises(ValueError, match="same studies"):
        compare(found, other, ("a", "b"), UncertaintyConfig(), 0)


def test_multiclass_and_multilabel_report_each_class_and_the_mean() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    probabilities = rng.dirichlet(np.ones(3), 90)
    probabilities[np.arange(90), labels] += 0.5
    probabilities /= probabilities.sum(1, keepdims=True)
    patients = tuple(map(str, range(90)))
    found = Predictions("test", patients, patients, np.eye(3)[labels], probabilities)
    multi = assess(found, found, "multiclass", ("a", "b", "c"), FAST, 0)
    assert multi.score("auroc").value == pytest.approx(
        oracle.roc_auc_score(labels, probabilities, multi_class="ovr"), abs=1e-12
    )
    assert np.sum(multi.confusion) == 90
    targets = np.eye(3)[labels]
    targets[:30, 0] = np.nan
    some = assess(
        *[Predictions("test", patients, patients, targets, probabilities)] * 2, "multilabel", ("a", "b", "c"), FAST, 0
    )
    (first,) = [s for s in some.scores if (s.metric, s.label) == ("auroc", "a")]
    assert first.n == 60


def test_probabilities_that_are_not_numbers_are_refused() -> None:
    bad = predictions(np.array([0, 1]), np.array([0.1, np.nan]))
    with pytest.raises(ValueError, match="not finite"):
        assess(bad, bad, "binary", ("no", "yes"), FAST, 0)


def test_predictions_come_back_as_they_went(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    found = predictions(np.array([0, 1, 1]), np.array([0.1, 0.2, 0.7]))
    write_predictions(folder, found)
    again = read_predictions(folder)
    assert again.study_ids == found.study_ids
    assert np.array_equal(again.probabilities, found.probabilities)


def predictions(truth: np.ndarray, probability: np.ndarray, patients: tuple[str, ...] | None = None) -> Predictions:  # type: ignore[type-arg]
    names = tuple(map(str, range(len(truth))))
    return Predictions(
        "test", names, patients or names, np.eye(2)[truth], np.stack([1 - probability, probability], axis=1)
    )
