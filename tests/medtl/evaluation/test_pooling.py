"""Folds are measured apart and pooled over patients, and repeats do not make a study larger than it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, confusion_matrix, recall_score, roc_auc_score

from medtl.config import EvaluationConfig, UncertaintyConfig
from medtl.errors import SplitError
from medtl.evaluation.assess import assess
from medtl.evaluation.io import read_evaluation, write_evaluation
from medtl.evaluation.pooling import Fold, compare_folds, pool
from medtl.records import OperatingPoint, Predictions

CONFIG = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=200))
CLASSES = ("well", "ill")
TRUE_AREA = 0.8451682087  # of normal scores 1.5 apart, with the noise of one repeat


def folds(patients: int = 60, images: int = 4, count: int = 5, repeats: int = 1, seed: int = 0) -> list[Fold]:
    """Simulate models that differ in how sure they are, on patients whose images share half of their variance."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), images)
    truth = patient % 2
    kept = np.sqrt(0.5) * (rng.normal(size=patients)[patient] + rng.normal(size=len(patient))) + 1.5 * (truth - 0.5)
    found = []
    for repeat in range(repeats):
        fold = np.empty(patients, int)
        for kind in (0, 1):
            some = rng.permutation(np.flatnonzero(np.arange(patients) % 2 == kind))
            fold[some] = np.arange(len(some)) % count
        score = (kept + 0.3 * rng.normal(size=len(kept))) / np.sqrt(1.09)
        for number in range(count):
            rows = np.flatnonzero(fold[patient] == number)
            chance = expit(score[rows] * (1 + 0.2 * number) + number)
            names = tuple(f"s-{row:05d}" for row in rows), tuple(f"p-{patient[row]:03d}" for row in rows)
            test = Predictions("test", *names, np.eye(2)[truth[rows]], np.stack([1 - chance, chance], 1))
            point = OperatingPoint("ill", float(expit(number)), "as simulated", "val")
            found.append(Fold(str(number + 1), test, (point,), repeat))
    return found


def pooled(some: list[Fold], **changes: Any) -> Any:
    return pool(some, "binary", CLASSES, CONFIG.model_copy(update=changes), 0)


def areas(some: list[Fold]) -> list[float]:
    return [float(roc_auc_score(f.test.targets[:, 1], f.test.probabilities[:, 1])) for f in some]


def test_the_value_is_the_mean_over_folds() -> None:
    some = folds()
    found = pooled(some)
    assert found.score("auroc").value == pytest.approx(np.mean(areas(some)))
    precision = [average_precision_score(f.test.targets[:, 1], f.test.probabilities[:, 1]) for f in some]
    assert found.score("average_precision").value == pytest.approx(np.mean(precision))
    recall = [recall_score(f.test.targets[:, 1], f.test.probabilities[:, 1] >= f.points[0].threshold) for f in some]
    assert found.score("sensitivity").value == pytest.approx(np.mean(recall))
    assert (found.n, found.patients, found.score("auroc").n, found.score("auroc").patients) == (240, 60, 240, 60)
    assert "5 folds" in found.notes[0]


def test_the_results_of_every_fold_are_kept() -> None:
    some = folds(repeats=2)
    found = pooled(some).folds
    assert [(one.fold, one.repeat) for one in found] == [(str(n), r) for r in (0, 1) for n in range(1, 6)]
    assert [one.values["auroc"] for one in found] == pytest.approx(areas(some))
    assert sum(one.n for one in found) == 480


def test_models_that_differ_in_how_sure_they_are_are_not_judged_together() -> None:
    some = folds()
    together = roc_auc_score(
        np.concatenate([f.test.targets[:, 1] for f in some]), np.concatenate([f.test.probabilities[:, 1] for f in some])
    )
    assert pooled(some).score("auroc").value > together + 0.02


def test_a_fold_counts_by_its_patients() -> None:
    some = folds(count=2)
    large, small = some[0].test, some[1].test
    rows = [row for row, patient in enumerate(small.patients) if patient in sorted(set(small.patients))[:6]]
    few = Predictions(
        "test", tuple(small.study_ids[r] for r in rows), tuple(small.patients[r] for r in rows),
        small.targets[rows], small.probabilities[rows],
    )  # fmt: skip
    both = [some[0], replace(some[1], test=few)]
    weight = [len(set(large.patients)), 6]
    assert pooled(both).score("auroc").value == pytest.approx(np.average(areas(both), weights=weight))


def test_one_fold_is_an_evaluation() -> None:
    (only,) = folds(count=1)
    alone = pooled([only])
    val = folds(seed=1, count=1)[0].test
    val = replace(val, patients=tuple(f"v{p}" for p in val.patients), study_ids=tuple(f"v{s}" for s in val.study_ids))
    whole = assess(val, only.test, "binary", CLASSES, CONFIG, 0)
    for metric in ("auroc", "average_precision", "brier", "log_loss", "calibration_slope"):
        one, other = alone.score(metric), whole.score(metric)
        assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))


def test_the_interval_holds_the_truth_and_repeats_hardly_narrow_it() -> None:
    held, widths = {1: 0, 4: 0}, {1: 0.0, 4: 0.0}
    for seed in range(24):
        for repeats in held:
            score = pool(folds(images=3, repeats=repeats, seed=seed), "binary", CLASSES, CONFIG, seed).score("auroc")
            assert score.low is not None and score.high is not None
            held[repeats] += score.low <= TRUE_AREA <= score.high
            widths[repeats] += score.high - score.low
    assert min(held.values()) >= 21
    assert 0.75 < widths[4] / widths[1] <= 1.02  # four times the patients would give one half


def test_identical_repeats_change_nothing() -> None:
    once = folds()
    again = once + [replace(fold, repeat=1) for fold in once]
    one, two = pooled(once), pooled(again)
    for metric, score in one.metrics.items():
        other = two.score(metric)
        assert (other.value, other.low, other.high, other.n) == pytest.approx(
            (score.value, score.low, score.high, score.n)
        )
    assert two.confusion == one.confusion


def test_tables_are_of_each_study_once() -> None:
    some = folds(repeats=3)
    wanted = sum(
        confusion_matrix(f.test.targets[:, 1], f.test.probabilities[:, 1] >= f.points[0].threshold) for f in some[:5]
    )
    assert pooled(some).confusion == tuple(map(tuple, wanted.tolist()))
    assert {"roc", "pr", "calibration", "decision"} <= {curve.kind for curve in pooled(some).curves}


def test_a_fold_without_a_kind_is_left_out_and_said_and_many_leave_no_value() -> None:
    some = folds(count=10)
    broken = [replace(f, test=replace(f.test, targets=np.tile([1.0, 0.0], (len(f.test.targets), 1)))) for f in some]
    one = pooled([broken[0], *some[1:]])
    assert one.score("auroc").value == pytest.approx(np.mean(areas(some[1:])))
    assert "1 of 10 folds have no AUROC" in one.notes[1] and one.folds[0].values["auroc"] is None
    three = pooled([*broken[:3], *some[3:]]).score("auroc")
    assert three.value is None and "not estimable" in three.note


@pytest.mark.parametrize("task, classes", [("multiclass", ("a", "b", "c")), ("multilabel", ("a", "b"))])
def test_several_classes_are_pooled_too(task: Any, classes: tuple[str, ...]) -> None:
    some = []
    for number, fold in enumerate(folds(count=3)):
        n = len(fold.test.study_ids)
        rng = np.random.default_rng(number)
        targets = np.eye(len(classes))[rng.integers(0, len(classes), n)]
        chance = rng.dirichlet(np.ones(len(classes)), n) + 0.3 * targets
        test = replace(fold.test, targets=targets, probabilities=chance / chance.sum(1, keepdims=True))
        some.append(replace(fold, test=test, points=tuple(OperatingPoint(c, 0.4, "x", "val") for c in classes)))
    found = pool(some, task, classes, CONFIG, 0)
    wanted = np.mean([roc_auc_score(f.test.targets, f.test.probabilities, average="macro") for f in some])
    assert found.score("auroc").value == pytest.approx(wanted)
    assert (found.score("auroc").label, found.score("mcc").label) == (
        "macro",
        "all" if task == "multiclass" else "macro",
    )
    assert found.folds[0].values["mcc"] is not None


def test_folds_that_share_a_patient_and_repeats_of_others_are_refused() -> None:
    some = folds()
    for wrong, message in (
        ([], "no folds"),
        ([some[0], *some], "two folds of one repeat"),
        ([*some, *(replace(f, repeat=1) for f in folds(patients=40))], "do not test the same"),
    ):
        with pytest.raises(SplitError, match=message):
            pooled(wrong)
    moved = replace(some[1].test, patients=(some[0].test.patients[0], *some[1].test.patients[1:]))
    with pytest.raises(SplitError, match="1 patients are tested in two folds"):
        pooled([some[0], replace(some[1], test=moved), *some[2:]])


def test_neither_the_order_of_folds_nor_the_patients_names_move_anything(tmp_path: Path) -> None:
    some = folds(repeats=2)
    one = pooled(some)
    turned = pooled([*some[:5][::-1], *some[5:]])
    assert {m: s.low for m, s in turned.metrics.items()} == pytest.approx({m: s.low for m, s in one.metrics.items()})
    write_evaluation(tmp_path, one)
    assert read_evaluation(tmp_path) == one


def compared(one: list[Fold], other: list[Fold], **changes: Any) -> Any:
    config = CONFIG.model_copy(update=changes)
    return compare_folds(one, other, ("transfer", "scratch"), "binary", CLASSES, config, 0)


def blurred(some: list[Fold], noise: float) -> list[Fold]:
    """Give the same folds by models that see less."""
    rng, found = np.random.default_rng(9), []
    for one in some:
        chance = expit(logit(one.test.probabilities[:, 1]) + noise * rng.normal(size=len(one.test.study_ids)))
        found.append(replace(one, test=replace(one.test, probabilities=np.stack([1 - chance, chance], 1))))
    return found


@pytest.mark.parametrize("repeats", [1, 2])
def test_two_ways_are_compared_fold_by_fold_on_the_same_patients(repeats: int) -> None:
    sharp = folds(repeats=repeats)
    dull = blurred(sharp, 1.5)
    found, ours, theirs = compared(sharp, dull), pooled(sharp).score("auroc"), pooled(dull).score("auroc")
    assert found.difference.value == pytest.approx(ours.value - theirs.value)
    assert (found.reference_score.value, found.reference_score.low) == (theirs.value, pytest.approx(theirs.low))
    assert found.difference.low > 0 and found.verdict == "superior"
    assert compared(dull, sharp).verdict == "inferior"
    apart = np.hypot(ours.high - ours.low, theirs.high - theirs.low)
    assert found.difference.high - found.difference.low < apart  # the patients are the same
    assert (found.difference.n, found.difference.patients, found.tests) == (240, 60, ())


def test_a_way_is_no_better_than_itself_and_nothing_is_compared_with_others() -> None:
    some = folds()
    same = compared(some, some)
    assert same.difference.value == 0 and same.verdict == "inconclusive"
    assert compared(some, some, margin=0.02).verdict == "non-inferior"
    with pytest.raises(ValueError, match="the same studies in the same folds"):
        compared(some, folds(seed=1))
    with pytest.raises(ValueError, match="the same studies in the same folds"):
        compared(some, some[::-1])


def test_several_classes_are_compared_by_their_mean() -> None:
    some = folds()
    three = []
    for one in some:
        third = np.arange(len(one.test.study_ids)) % 3 == 0
        targets = np.column_stack([one.test.targets * ~third[:, None], third]).astype(float)
        sure = np.column_stack([one.test.probabilities * 0.6, np.where(third, 0.45, 0.35)])
        test = replace(one.test, targets=targets, probabilities=sure / sure.sum(1, keepdims=True))
        three.append(replace(one, test=test, points=tuple(replace(one.points[0], label=name) for name in "abc")))
    other = [replace(one, test=replace(one.test, probabilities=one.test.probabilities[:, [1, 0, 2]])) for one in three]
    found = compare_folds(three, other, ("a", "b"), "multiclass", ("a", "b", "c"), CONFIG, 0)
    means = [pool(side, "multiclass", ("a", "b", "c"), CONFIG, 0).score("auroc") for side in (three, other)]
    assert means[0].label == "macro" and found.difference.value == pytest.approx(means[0].value - means[1].value)
