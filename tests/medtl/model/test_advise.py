"""Heads are judged on patients they never saw, and a lead is told from chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from medtl.config import STRATEGIES
from medtl.errors import ModelError
from medtl.model.advise import Contender, Lead, grouped_folds, out_of_fold, recommend, shortened

SURE, OPEN = Lead(0.99, 0.01), Lead(0.8, -0.02)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(2, 4))
def test_folds_judge_each_study_once_and_divide_no_patient(seed: int, patients: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.array([f"g{i}" for i in np.concatenate([np.arange(patients), rng.integers(patients, size=patients)])])
    targets = np.eye(classes)[rng.integers(classes, size=2 * patients)]
    folds = grouped_folds(targets, groups.tolist(), 5, seed)
    assert sorted(np.concatenate([out for _, out in folds])) == list(range(2 * patients))
    for learn, out in folds:
        assert not set(groups[learn]) & set(groups[out])
        assert len(learn) + len(out) == 2 * patients


def test_folds_are_the_same_for_a_seed_and_others_for_another() -> None:
    targets, groups = np.eye(2)[np.arange(60) % 2], [f"g{i // 2}" for i in range(60)]
    first, again, other = (grouped_folds(targets, groups, 5, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(first, other, strict=True))


def test_a_rare_class_is_spread_over_the_folds() -> None:
    targets = np.eye(2)[(np.arange(100) % 10 == 0).astype(int)]
    folds = grouped_folds(targets, [f"g{i}" for i in range(100)], 5, 0)
    assert [int(targets[out, 1].sum()) for _, out in folds] == [2] * 5


def test_one_patient_cannot_be_divided() -> None:
    with pytest.raises(ModelError, match="Fewer than two patients"):
        grouped_folds(np.eye(2), ["g", "g"], 5, 0)


def told_apart(patients: int = 30, signal: float = 2.0, classes: int = 2) -> tuple[Any, Any, list[str]]:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(patients) % classes, 3)
    x = rng.normal(size=(len(label), 4)) + signal * np.eye(4)[label]
    return x.astype(np.float32), np.eye(classes)[label], [f"g{i // 3}" for i in range(len(label))]


@pytest.mark.parametrize("kind", ["logistic_regression", "knn", "linear_svm"])
def test_a_signal_is_found_on_patients_left_out(kind: Any) -> None:
    x, targets, groups = told_apart()
    found = out_of_fold(kind, x, targets, groups, "binary", 0)
    assert found.probabilities.sum(1) == pytest.approx(1)
    assert roc_auc_score(targets[:, 1], found.probabilities[:, 1]) > 0.9
    assert found.folds == 5


def test_what_marks_patients_and_not_classes_is_not_taken_for_a_signal() -> None:
    """A head that saw the patients would be perfect; grouped folds show that it knows nothing."""
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(40), 4)
    marks = rng.normal(size=(40, 20))
    x = marks[patients] + 0.01 * rng.normal(size=(160, 20))
    label = rng.integers(2, size=40)[patients]
    found = out_of_fold("knn", x.astype(np.float32), np.eye(2)[label], [f"g{p}" for p in patients], "binary", 0)
    assert roc_auc_score(label, found.probabilities[:, 1]) < 0.7


def test_labels_that_nobody_read_are_left_out_of_a_multilabel_task() -> None:
    x, targets, groups = told_apart(classes=3)
    targets[::7, 1] = np.nan
    found = out_of_fold("logistic_regression", x, targets, groups, "multilabel", 0)
    known = np.isfinite(targets[:, 1])
    assert roc_auc_score(targets[known, 1], found.probabilities[known, 1]) > 0.8


def test_a_lead_that_is_no_chance_is_a_clear_winner() -> None:
    ways = [Contender("a", 0.9, 100.0, True), Contender("b", 0.8, 1.0, True)]
    found = recommend(ways, lambda *_: SURE)
    assert found is not None
    assert (found.clear, found.best, found.recommended, found.unbeaten) == (True, "a", "a", ("a",))


def test_without_a_clear_winner_the_cheapest_that_was_not_beaten_is_recommended() -> None:
    ways = [Contender("a", 0.9, 100.0, True), Contender("b", 0.89, 10.0, True), Contender("c", 0.6, 1.0, True)]
    found = recommend(ways, lambda _, other: SURE if other == "c" else OPEN)
    assert found is not None
    assert (found.clear, found.best, found.recommended, found.unbeaten) == (False, "a", "b", ("a", "b"))


def test_of_about_equal_cost_the_higher_is_recommended() -> None:
    ways = [Contender("a", 0.9, 1.2, True), Contender("b", 0.89, 1.0, True)]
    found = recommend(ways, lambda *_: OPEN)
    assert found is not None and not found.clear and found.recommended == "a"


def test_a_reference_that_beats_the_best_on_the_hold_out_is_the_best() -> None:
    ways = [Contender("a", 0.9, 1.0, True), Contender("staged", 0.8, 50.0, False)]
    found = recommend(ways, lambda one, _: SURE if one == "staged" else OPEN)
    assert found is not None and found.clear and found.best == "staged"
    high = [Contender("a", 0.9, 1.0, True), Contender("staged", 0.99, 50.0, False)]
    kept = recommend(high, lambda *_: OPEN)  # another, smaller set of patients: its figure is no reason
    assert kept is not None and (kept.best, kept.recommended) == ("a", "a")


@pytest.mark.parametrize("lead", [Lead(0.99, None), Lead(0.99, -0.1), Lead(0.94, 0.1)])
def test_a_lead_needs_the_resamples_and_the_interval(lead: Lead) -> None:
    assert not lead.certain
    assert SURE.certain


def test_what_could_not_be_estimated_is_not_recommended() -> None:
    assert recommend([Contender("a", None, 1.0, True)], lambda *_: SURE) is None
    found = recommend([Contender("a", None, 1.0, True), Contender("b", 0.7, None, True)], lambda *_: SURE)
    assert found is not None and found.recommended == "b"


def test_shortened_phases_keep_at_least_one_epoch() -> None:
    assert [phase.epochs for phase in shortened(STRATEGIES["staged"], 4)] == [1, 1, 1, 2]
