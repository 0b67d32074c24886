"""What is measured on the test part, for each kind of task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from medtl.config import EvaluationConfig, ThresholdConfig, UncertaintyConfig
from medtl.errors import ModelError, SplitError, StudyError
from medtl.evaluation.assess import assess, price_of_a_false_alarm
from medtl.evaluation.bounds import SHARE
from medtl.evaluation.delong import area, interval
from medtl.evaluation.metrics import METRICS
from medtl.records import Evaluation, Predictions, Score, Task

CONFIG = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=100))
CLASSES = {"binary": ("healthy", "ill"), "multiclass": ("a", "b", "c"), "multilabel": ("edema", "mass", "nodule")}


def predicted(task: str, part: str = "test", n: int = 120, seed: int = 0) -> Predictions:
    rng = np.random.default_rng([seed, len(part)])
    width = len(CLASSES[task])
    targets = (rng.random((n, width)) < 0.4) * 1.0 if task == "multilabel" else np.eye(width)[np.arange(n) % width]
    scores = rng.random((n, width)) + targets
    probabilities = scores / 2 if task == "multilabel" else scores / scores.sum(1, keepdims=True)
    ids, people = tuple(f"s-{part}-{i}" for i in range(n)), tuple(f"p-{part}-{i // 2}" for i in range(n))
    return Predictions(part, ids, people, targets, probabilities)


def assessed(task: Any, n: int = 120, **changes: Any) -> Any:
    test = replace(predicted(task, n=n), **changes)
    return assess(predicted(task, "val"), test, task, CLASSES[task], CONFIG, 0), test


def only(found: Evaluation, metric: str, label: str) -> Score:
    (score,) = [score for score in found.scores if (score.metric, score.label) == (metric, label)]
    return score


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
    found, _ = assessed(task, probabilities=hard(task).probabilities)
    assert set(METRICS) <= set(found.metrics)
    for name, score in found.metrics.items():
        assert score.low is not None and score.high is not None, (name, score.note)
        assert score.low <= score.value + 0.05 and score.value - 0.05 <= score.high
        scale = METRICS[name].scale if name in METRICS else SHARE
        assert scale.lowest <= score.low < score.high <= scale.highest


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


def test_a_label_nobody_read_leaves_no_macro_mean_that_a_gate_could_pass() -> None:
    targets = predicted("multilabel").targets.copy()
    targets[:, 1] = np.nan
    found, _ = assessed("multilabel", targets=targets)
    assert only(found, "auroc", "edema").value is not None
    macro = only(found, "auroc", "macro")
    assert (macro.value, macro.low) == (None, None) and macro.note == "not estimable: no value for mass"
    assert found.score("auroc") == macro


def test_a_class_without_an_interval_leaves_the_macro_mean_without_one() -> None:
    people = np.array(predicted("multiclass").patients)
    people[2::3] = "p-only"
    found, _ = assessed("multiclass", patients=tuple(people))
    macro = only(found, "auroc", "macro")
    assert macro.value is not None and macro.low is None and "none for c" in macro.note


def test_the_balanced_accuracy_of_several_classes_is_that_of_the_most_probable_one() -> None:
    probabilities = predicted("multiclass").probabilities.copy()
    probabilities[::5] = np.roll(probabilities[::5], 1, axis=1)
    found, test = assessed("multiclass", probabilities=probabilities)
    truth, chosen = test.targets.argmax(1), test.probabilities.argmax(1)
    score = found.score("balanced_accuracy")
    assert score.label == "all"
    assert score.value == pytest.approx(sk.balanced_accuracy_score(truth, chosen))
    assert 0 < score.low < score.value < score.high < 1
    absent, _ = assessed("multiclass", targets=np.eye(3)[np.arange(120) % 2])
    assert absent.score("balanced_accuracy").value is None
    assert "no value for c" in absent.score("balanced_accuracy").note


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_perfect_model_on_few_patients_is_far_from_certain(task: Any) -> None:
    lows = []
    for n in (12, 24, 60):
        targets = predicted(task, n=n).targets
        found, _ = assessed(task, n=n, probabilities=targets, patients=tuple(f"p-{i}" for i in range(n)))
        for metric in ("auroc", "average_precision", "balanced_accuracy", "sensitivity", "specificity", "f1"):
            score = found.score(metric)
            assert score.value == 1 and score.high == 1 and "exact bound" in score.note, metric
        lows.append(found.score("auroc").low)
        assert found.score("brier").value == 0 and found.score("brier").high > 0.05
    assert lows[0] < lows[1] < lows[2] < 1


def test_five_of_five_found_is_clopper_and_pearsons_interval() -> None:
    targets = np.eye(2)[np.arange(10) % 2]
    found, _ = assessed("binary", n=10, targets=targets, probabilities=targets, patients=tuple("abcdefghij"))
    score = found.score("sensitivity")
    assert (score.value, score.high) == (1, 1) and score.low == pytest.approx(0.4782, abs=1e-4)
    assert found.score("auroc").low == pytest.approx(0.4782, abs=1e-4)


def test_one_mistake_never_raises_the_lower_bound() -> None:
    targets = np.eye(2)[np.arange(20) % 2]
    probabilities = targets * 0.8 + 0.1
    worse = probabilities.copy()
    worse[1] = [0.15, 0.85]
    worse[0] = [0.12, 0.88]
    people = tuple(f"p-{i}" for i in range(20))
    perfect, _ = assessed("binary", n=20, targets=targets, probabilities=probabilities, patients=people)
    mistaken, _ = assessed("binary", n=20, targets=targets, probabilities=worse, patients=people)
    assert mistaken.score("auroc").value < 1
    for metric in ("auroc", "average_precision", "sensitivity", "specificity", "balanced_accuracy", "f1"):
        assert mistaken.score(metric).low <= perfect.score(metric).low, metric


@pytest.mark.parametrize("task", get_args(Task))
def test_another_key_for_the_pseudonyms_changes_no_figure(task: Any) -> None:
    test = predicted(task)
    others = {name: f"q-{hash_ * 7919 % 1009:04d}" for hash_, name in enumerate(dict.fromkeys(test.patients))}
    renamed = tuple(others[name] for name in test.patients)
    assert sorted(renamed) != list(renamed) and len(set(renamed)) == len(set(test.patients))
    assert assessed(task)[0] == assessed(task, patients=renamed)[0]


def test_no_label_at_all_is_not_estimable() -> None:
    found, _ = assessed("multilabel", targets=np.full((120, 3), np.nan))
    assert found.score("auroc").value is None and found.score("brier").value is None


def test_one_patient_has_values_but_no_interval() -> None:
    found, _ = assessed("binary", patients=("p-0",) * 120)
    score = found.score("auroc")
    assert score.value is not None and score.low is None and "two patients" in score.note
    assert found.score("brier").low is None
    assert any("1 patients only" in note for note in found.notes)


def test_all_probabilities_equal_is_chance_and_no_certainty() -> None:
    found, _ = assessed("binary", probabilities=np.full((120, 2), 0.5))
    score = found.score("auroc")
    assert score.value == 0.5 and 0.4 < score.low < 0.5 < score.high < 0.6


def changed(array: np.ndarray[Any, Any], row: int, values: list[float]) -> np.ndarray[Any, Any]:
    return np.concatenate([array[:row], [values], array[row + 1 :]])


@pytest.mark.parametrize("values", [[0.5, np.nan], [1.5, -0.5], [np.inf, 0], [0.6, 0.6], [0, 0]], ids=str)
@pytest.mark.parametrize("part", ["val", "test"])
def test_what_is_no_probability_is_refused(part: str, values: list[float]) -> None:
    parts = {name: predicted("binary", name) for name in ("val", "test")}
    parts[part] = replace(parts[part], probabilities=changed(parts[part].probabilities, 3, values))
    with pytest.raises(ModelError, match=f"'{part}' part .* 1 studies"):
        assess(parts["val"], parts["test"], "binary", CLASSES["binary"], CONFIG, 0)


@pytest.mark.parametrize("values", [[0.5, 0.5], [0, 2], [1, 1], [0, 0], [np.nan, np.nan]], ids=str)
def test_what_is_no_truth_is_refused(values: list[float]) -> None:
    with pytest.raises(StudyError, match=r"'test' part .* 1 studies"):
        assessed("binary", targets=changed(predicted("binary").targets, 3, values))


def test_a_multilabel_truth_is_0_or_1_or_unknown() -> None:
    with pytest.raises(StudyError, match="not 0, 1 or unknown for 1 studies"):
        assessed("multilabel", targets=changed(predicted("multilabel").targets, 3, [0, 0.3, np.nan]))


def test_a_patient_in_validation_and_test_is_refused() -> None:
    people = (*predicted("binary", "val").patients[:2], *predicted("binary").patients[2:])
    with pytest.raises(SplitError, match="1 patients are in both validation and test"):
        assessed("binary", patients=people)


def test_an_empty_part_and_a_study_predicted_twice_are_refused() -> None:
    with pytest.raises(SplitError, match="no predictions of the 'test' part"):
        assessed("binary", n=0)
    with pytest.raises(SplitError, match="'test' part hold a study twice"):
        assessed("binary", study_ids=("s-1",) * 120)


def test_a_column_too_few_is_refused() -> None:
    one = np.ones((120, 1))
    with pytest.raises(ModelError, match="one column for each of 2 classes"):
        assessed("binary", targets=one, probabilities=one)


def test_the_calibration_curve_counts_every_study_once() -> None:
    found, _ = assessed("binary")
    (curve,) = [c for c in found.curves if c.kind == "calibration"]
    assert sum(curve.weight) == 120
    assert np.average(curve.y, weights=curve.weight) == pytest.approx(0.5)


def hard(task: str) -> Predictions:
    """Give predictions that are far from perfect."""
    test = predicted(task)
    chance = test.probabilities + 2 * np.random.default_rng(1).random(test.probabilities.shape)
    return replace(test, probabilities=chance / (3 if task == "multilabel" else chance.sum(1, keepdims=True)))


def by_method(method: Any, task: Any = "binary", **changes: Any) -> Evaluation:
    config = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=200, method=method), **changes)
    return assess(predicted(task, "val"), hard(task), task, CLASSES[task], config, 0)


def test_the_method_of_intervals_is_a_choice_that_moves_no_value() -> None:
    found = {method: by_method(method) for method in ("auto", "percentile", "bca", "analytic")}
    for metric, score in found["auto"].metrics.items():
        assert {one.score(metric).value for one in found.values()} == {score.value}
    limits = {(one.score("auroc").low, one.score("auroc").high) for one in found.values()}
    assert len(limits) == 4


def test_analytic_is_delong_for_the_area_wilson_for_shares_and_auto_for_the_rest() -> None:
    found, auto, test = by_method("analytic"), by_method("auto"), hard("binary")
    people = np.unique(test.patients, return_inverse=True)[1]
    wanted = interval(area(test.targets[:, 1], test.probabilities[:, 1], people), 0.95)
    assert (found.score("auroc").low, found.score("auroc").high) == pytest.approx(wanted)
    truth, called = test.targets[:, 1], test.probabilities[:, 1] >= found.operating_points[0].threshold
    # every patient has one diseased study: as many independent votes as patients
    exact = binomtest(int((truth * called).sum()), 60).proportion_ci(0.95, method="wilson")
    assert (found.score("sensitivity").low, found.score("sensitivity").high) == pytest.approx((exact.low, exact.high))
    assert found.score("brier") == auto.score("brier")


def test_several_classes_have_one_mcc_and_kappa_of_the_one_decision() -> None:
    found, test = by_method("auto", "multiclass", ordered=True), hard("multiclass")
    truth, chosen = test.targets.argmax(1), test.probabilities.argmax(1)
    assert found.score("mcc").value == pytest.approx(sk.matthews_corrcoef(truth, chosen))
    assert found.score("kappa").value == pytest.approx(sk.cohen_kappa_score(truth, chosen))
    graded = sk.cohen_kappa_score(truth, chosen, weights="quadratic")
    assert found.score("weighted_kappa").value == pytest.approx(graded)
    assert {s.label for s in found.scores if s.metric == "mcc"} == {"a", "b", "c", "all"}
    assert "weighted_kappa" not in by_method("auto", "multiclass").metrics


def test_one_class_leaves_the_mcc_of_all_unknown() -> None:
    found, _ = assessed("multiclass", targets=np.tile([1.0, 0, 0], (120, 1)))
    assert only(found, "mcc", "all").value is None


def test_net_benefit_is_at_the_price_of_the_operating_point_or_of_the_config() -> None:
    found, test = by_method("auto"), hard("binary")
    at = found.operating_points[0].threshold
    truth, called = test.targets[:, 1], test.probabilities[:, 1] >= at
    wanted = ((truth * called).sum() - (called & (truth == 0)).sum() * at / (1 - at)) / 120
    assert found.score("net_benefit").value == pytest.approx(wanted)
    dear = ThresholdConfig(rule="cost", cost=4)
    assert price_of_a_false_alarm(0.9, dear) == 0.25 and price_of_a_false_alarm(
        0.9, ThresholdConfig()
    ) == pytest.approx(9)
    assert np.isnan(price_of_a_false_alarm(1.000001, ThresholdConfig()))


def test_a_net_benefit_without_an_error_is_no_more_certain_than_its_parts() -> None:
    people = tuple(f"p-{i}" for i in range(120))
    found, _ = assessed("binary", patients=people)
    benefit, hit = found.score("net_benefit"), found.score("sensitivity")
    assert hit.value == 1 and "exact bound" in benefit.note
    at = found.operating_points[0].threshold
    unseen = 0.5 * (1 - hit.low) + 0.5 * (1 - found.score("specificity").low) * at / (1 - at)
    down, up = benefit.value - benefit.low, benefit.high - benefit.value
    assert down - up == pytest.approx(unseen)  # beyond the prevalence, which varies as much either way


def test_what_has_no_value_says_why() -> None:
    found, _ = assessed("binary")
    assert found.score("positive_likelihood_ratio").note == "not estimable: nobody healthy is called"
    assert found.score("calibration_slope").note == "not estimable: a threshold parts the two kinds"
    one_kind, _ = assessed("binary", targets=np.tile([1.0, 0], (120, 1)))
    assert "lacks a kind" in one_kind.score("calibration_slope").note


def test_the_decision_curve_stands_between_treating_all_and_none() -> None:
    test = hard("binary")
    found = by_method("auto")
    lines = {curve.kind: curve for curve in found.curves}
    assert set(lines) == {"roc", "pr", "calibration", "decision", "decision_all", "decision_none"}
    truth, score = test.targets[:, 1], test.probabilities[:, 1]
    for at, model, everybody in zip(lines["decision"].x, lines["decision"].y, lines["decision_all"].y, strict=True):
        called = score >= at
        odds = at / (1 - at)
        assert model == pytest.approx((called * truth).mean() - odds * (called * (1 - truth)).mean())
        assert everybody == pytest.approx(truth.mean() - odds * (1 - truth).mean())
    assert set(lines["decision_none"].y) == {0.0}


def test_the_precision_recall_curve_is_scikit_learns() -> None:
    test = hard("binary")
    (line,) = [curve for curve in by_method("auto").curves if curve.kind == "pr"]
    precision, recall, _ = sk.precision_recall_curve(test.targets[:, 1], test.probabilities[:, 1])
    assert set(zip(line.x, line.y, strict=True)) <= set(zip(recall.tolist(), precision.tolist(), strict=True))
