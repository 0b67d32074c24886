"""What is measured on the test part, for each kind of task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from sklearn import metrics as sk

from medtl.config import EvaluationConfig, UncertaintyConfig
from medtl.evaluation.assess import assess
from medtl.evaluation.metrics import METRICS
from medtl.records import Predictions, Task

CONFIG = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=100))
CLASSES = {"binary": ("healthy", "ill"), "multiclass": ("a", "b", "c"), "multilabel": ("edema", "mass", "nodule")}


def predicted(task: str, part: str = "test", n: int = 120, seed: int = 0) -> Predictions:
    rng = np.random.default_rng([seed, len(part)])
    width = len(CLASSES[task])
    targets = (rng.random((n, width)) < 0.4) * 1.0 if task == "multilabel" else np.eye(width)[np.arange(n) % width]
    scores = rng.random((n, width)) + targets
    probabilities = scores / 2 if task == "multilabel" else scores / scores.sum(1, keepdims=True)
    ids, people = tuple(f"s-{i}" for i in range(n)), tuple(f"p-{i // 2}" for i in range(n))
    return Predictions(part, ids, people, targets, probabilities)


def assessed(task: Any, **changes: Any) -> Any:
    test = replace(predicted(task), **changes)
    return assess(predicted(task, "val"), test, task, CLASSES[task], CONFIG, 0), test


def test_a_binary_task_reports_the_positive_class_at_the_threshold_of_validation() -> None:
    found, test = assessed("binary")
    truth, score = test.targets[:, 1], test.probabilities[:, 1]
    (point,) = found.operating_points
    called = score >= point.threshold
    assert (point.label, point.chosen_on) == ("ill", "val")
    assert found.score("auroc").value == pytest.approx(sk.roc_auc_score(truth, score))
    assert found.score("sensitivity").value == pytest.approx(sk.recall_score(truth, called))
    assert found.confusion == tuple(map(tuple, sk.confusion_matrix(truth, called).tolist()))
    assert {score.label for score in found.scores} == {"ill"}


def test_the_threshold_is_never_looked_for_on_the_test_part() -> None:
    found, test = assessed("binary")
    other, _ = assessed("binary", probabilities=test.probabilities[:, ::-1])
    assert other.operating_points == found.operating_points


def test_a_multiclass_task_reports_each_class_the_macro_mean_and_accuracy() -> None:
    found, test = assessed("multiclass")
    areas = [s.value for s in found.scores if s.metric == "auroc" and s.label != "macro"]
    assert len(areas) == 3
    assert found.score("auroc").value == pytest.approx(
        sk.roc_auc_score(test.targets, test.probabilities, average="macro")
    )
    truth, chosen = test.targets.argmax(1), test.probabilities.argmax(1)
    assert found.score("accuracy").value == pytest.approx(sk.accuracy_score(truth, chosen))
    assert found.confusion == tuple(map(tuple, sk.confusion_matrix(truth, chosen).tolist()))


def test_a_multilabel_task_uses_each_label_where_it_is_known() -> None:
    targets = predicted("multilabel").targets.copy()
    targets[:40, 0] = np.nan
    found, test = assessed("multilabel", targets=targets)
    scores = {s.label: s for s in found.scores if s.metric == "auroc"}
    assert scores["edema"].value == pytest.approx(sk.roc_auc_score(targets[40:, 0], test.probabilities[40:, 0]))
    assert (scores["edema"].n, scores["edema"].patients) == (80, 60 - 20)
    assert scores["mass"].n == 120
    assert sum(map(sum, found.confusion[:2])) == 80 and len(found.confusion) == 6


@pytest.mark.parametrize("task", get_args(Task))
def test_every_metric_has_an_interval_around_its_value(task: Any) -> None:
    found, _ = assessed(task)
    assert set(METRICS) <= set(found.metrics)
    for score in found.metrics.values():
        assert 0 <= score.low <= score.value + 0.05 and score.value - 0.05 <= score.high <= 1


@pytest.mark.parametrize("task", get_args(Task))
def test_the_same_seed_gives_the_same_evaluation(task: Any) -> None:
    assert assessed(task)[0] == assessed(task)[0]


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_one_class_only_is_not_estimable_and_never_zero(task: Any) -> None:
    width = len(CLASSES[task])
    found, _ = assessed(task, targets=np.tile(np.eye(width)[0], (120, 1)))
    last = [s for s in found.scores if s.metric == "auroc" and s.label == CLASSES[task][-1]]
    assert [s.value for s in last] == [None] and "not estimable" in last[0].note
    assert any(CLASSES[task][-1] in note for note in found.notes)
    assert not found.curves


def test_a_label_nobody_read_is_not_estimable_and_left_out_of_the_macro_mean() -> None:
    targets = predicted("multilabel").targets.copy()
    targets[:, 1] = np.nan
    found, _ = assessed("multilabel", targets=targets)
    scores = {s.label: s for s in found.scores if s.metric == "auroc"}
    assert scores["mass"].value is None
    assert scores["macro"].value == pytest.approx((scores["edema"].value + scores["nodule"].value) / 2)
    assert "without 1 of 3" in scores["macro"].note


def test_no_label_at_all_is_not_estimable() -> None:
    found, _ = assessed("multilabel", targets=np.full((120, 3), np.nan))
    assert found.score("auroc").value is None and found.score("brier").value is None


def test_one_patient_has_values_but_no_interval() -> None:
    found, _ = assessed("binary", patients=("p-0",) * 120)
    score = found.score("auroc")
    assert score.value is not None and score.low is None and "two patients" in score.note
    assert found.score("brier").low is None
    assert any("1 patients only" in note for note in found.notes)


def test_all_probabilities_equal_is_chance() -> None:
    found, _ = assessed("binary", probabilities=np.full((120, 2), 0.5))
    score = found.score("auroc")
    assert (score.value, score.low, score.high) == (0.5, 0.5, 0.5)


def test_a_probability_that_is_not_a_number_is_refused() -> None:
    broken = predicted("binary").probabilities.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="'test' part are not finite"):
        assessed("binary", probabilities=broken)


def test_the_calibration_curve_counts_every_study_once() -> None:
    found, _ = assessed("binary")
    (curve,) = [c for c in found.curves if c.kind == "calibration"]
    assert sum(curve.weight) == 120
    assert np.average(curve.y, weights=curve.weight) == pytest.approx(0.5)
