"""Sets hold the truth as often as promised, for patients and for each class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from medtl.artifacts import read_record, write_record
from medtl.config import AbstentionConfig, UncertaintyConfig
from medtl.evaluation.abstention import answered, examine, fit, prediction_sets, table
from medtl.records import AbstentionFindings, ConformalRule, Predictions

FEW = UncertaintyConfig(resamples=200)
# Sets of the sixteen studies of `waves(16, 100)` by MAPIE 1.6.0: SplitConformalClassifier(of the given probabilities,
# confidence_level=coverage, conformity_score="lac", prefit=True), conformalized on waves(24, 0); "-" is the empty set
MAPIE = {
    0.7: "b - a a c - b c a b c - b c a b",
    0.8: "b bc a a c bc b c a ab c ab b c a b",
    0.9: "b bc a ab bc bc b c a ab c ab b c a b",
}


def drawn(
    n: int, seed: Any, classes: int = 3, per_patient: int = 1, rare: float = 0.2, part: str = "val"
) -> Predictions:
    """Patients share half of the noise of their images; the last class is rare and harder."""
    rng = np.random.default_rng(seed)
    label = rng.choice(classes, size=n, p=[*[(1 - rare) / (classes - 1)] * (classes - 1), rare]).repeat(per_patient)
    noise = rng.normal(size=(n, classes)).repeat(per_patient, 0) + rng.normal(size=(n * per_patient, classes))
    odds = noise + np.eye(classes)[label] * np.where(label == classes - 1, 1.0, 2.5)[:, None]
    ids = tuple(f"s-{part}-{i:05d}" for i in range(len(label)))
    people = tuple(f"p-{part}-{i // per_patient}" for i in range(len(label)))
    return Predictions(part, ids, people, np.eye(classes)[label], softmax(odds, 1))


def waves(n: int, first: int) -> Predictions:
    """Give studies of patients with one study each, the same on every machine; the classes a, b and c in turn."""
    number = np.arange(first, first + n)
    label = np.eye(3)[number % 3]
    ids = tuple(f"s-{one:03d}" for one in number)
    return Predictions("val", ids, ids, label, softmax(2 * np.sin(np.outer(number, [1.0, 1.7, 2.3])) + 2 * label, 1))


def rule_for(val: Predictions, **given_: Any) -> ConformalRule:
    task: Any = "binary" if val.targets.shape[1] == 2 else "multiclass"
    return fit(val, task, "abcd"[: val.targets.shape[1]], AbstentionConfig(**given_))


@pytest.mark.parametrize("method", ["lac", "aps"])
@pytest.mark.parametrize("per_patient", [1, 8])
def test_new_patients_have_their_truth_in_the_set_as_often_as_promised_also_those_of_the_rare_class(
    method: str, per_patient: int
) -> None:
    test = drawn(4000, 99)
    every, rare = [], []
    for seed in range(60):
        rule = rule_for(drawn(150, [1, seed], per_patient=per_patient), method=method)
        held = prediction_sets(rule, test.probabilities)[0][test.targets > 0.5]
        every.append(held.mean())
        rare.append(held[test.targets[:, 2] > 0.5].mean())
    assert 0.895 < np.mean(every) < 0.95
    assert 0.885 < np.mean(rare) < 0.96


def test_one_threshold_for_all_classes_leaves_the_rare_one_uncovered() -> None:
    val, test = drawn(2000, 0), drawn(4000, 1)
    rare = test.targets[:, 2] > 0.5
    for per_class, low, high in ((False, 0.6, 0.85), (True, 0.87, 0.94)):
        held = prediction_sets(rule_for(val, per_class=per_class), test.probabilities)[0][test.targets > 0.5]
        assert low < held[rare].mean() < high


@given(st.integers(0, 200), st.sampled_from(["lac", "aps"]), st.floats(0.5, 0.95), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_wider_promise_never_takes_an_answer_away(seed: int, method: str, coverage: float, per_class: bool) -> None:
    val = drawn(60, seed)
    small, large = (
        prediction_sets(rule_for(val, method=method, coverage=c, per_class=per_class), val.probabilities)
        for c in (coverage, (coverage + 1) / 2)
    )
    assert (large >= small).all()
    held = small[0][val.targets > 0.5]
    assert per_class or held.mean() >= coverage - 1e-9  # of validation itself


def test_lac_and_aps_are_what_their_papers_say() -> None:
    chances = np.array([[0.6, 0.3, 0.1]])
    lac = ConformalRule("multiclass", ("a", "b", "c"), "lac", 0.9, False, ((0.5, 0.5, 0.5),), ((9, 9, 9),))
    assert prediction_sets(lac, chances)[0].tolist() == [[True, False, False]]
    aps = replace(lac, method="aps", thresholds=((0.7, 0.7, 0.7),))
    assert prediction_sets(aps, chances)[0].tolist() == [[True, True, False]]


@pytest.mark.parametrize("coverage", MAPIE)
def test_with_one_study_of_each_patient_and_one_threshold_the_sets_are_mapies(coverage: float) -> None:
    rule = rule_for(waves(24, 0), method="lac", coverage=coverage, per_class=False)
    (sets,) = prediction_sets(rule, waves(16, 100).probabilities)
    named = ["".join(name for name, held in zip("abc", row, strict=True) if held) or "-" for row in sets]
    assert named == MAPIE[coverage].split()


def test_a_class_of_too_few_patients_stays_open_and_the_note_says_how_many_it_wants() -> None:
    val = drawn(60, 3, rare=0.05)
    rule = rule_for(val)
    assert rule.patients[0][2] < 9 and rule.thresholds[0][2] is None
    assert prediction_sets(rule, val.probabilities)[0][:, 2].all()
    found = examine(drawn(60, 4, part="test"), rule, FEW, 0)
    assert any("wants 9 patients of each" in note for note in found.notes)


def test_only_a_single_answer_that_the_operating_point_gives_too_is_given() -> None:
    sets = np.array([[[True, False], [False, True], [True, True], [False, False]]])
    assert answered(sets)[:, 0].tolist() == [True, True, False, False]
    assert answered(sets, np.array([[1], [1], [1], [0]]))[:, 0].tolist() == [False, True, False, False]


def test_without_abstention_the_most_probable_answer_is_given() -> None:
    val = drawn(50, 0)
    rule = rule_for(val, method="none")
    assert (prediction_sets(rule, val.probabilities)[0].argmax(1) == val.probabilities.argmax(1)).all()
    assert answered(prediction_sets(rule, val.probabilities)).all()


def test_labels_are_questions_of_their_own_over_studies_where_they_are_known() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((300, 2)) < 0.4) * 1.0
    chances = np.clip(0.25 + 0.5 * targets + 0.15 * rng.normal(size=(300, 2)), 0.01, 0.99)
    targets[:200, 1] = np.nan
    ids = tuple(f"s-{i:03d}" for i in range(300))
    val = Predictions("val", ids, ids, targets, chances)
    rule = fit(val, "multilabel", ("mass", "edema"), AbstentionConfig())
    assert sum(rule.patients[0]) == 300 and sum(rule.patients[1]) == 100
    found = examine(val, rule, FEW, 0)
    assert [score.label for score in found.coverage] == [
        "mass", "mass absent", "mass present", "edema", "edema absent", "edema present",
    ]  # fmt: skip
    assert found.coverage[3].n == 100
    assert all(score.value is not None and score.value >= 0.9 for score in found.coverage)


def test_the_test_part_shows_coverage_size_and_how_many_answers_are_right() -> None:
    rule, test = rule_for(drawn(300, 0)), drawn(200, 5, per_patient=3, part="test")
    found = examine(test, rule, FEW, 0)
    label, coverage, given_, right, size, whole = table(found)[0]
    sets = prediction_sets(rule, test.probabilities)[0]
    held = sets[test.targets > 0.5]
    assert (label, coverage.n, coverage.patients) == ("all", 600, 200)
    assert coverage.value == pytest.approx(held.mean())
    assert given_.value == pytest.approx((sets.sum(1) == 1).mean())
    assert right.value == pytest.approx(held[sets.sum(1) == 1].mean())
    assert size.value == pytest.approx(sets.sum(1).mean()) and size.high is not None and size.high <= 3
    assert whole.value == pytest.approx(held.reshape(200, 3).all(1).mean())
    assert coverage.low is not None and coverage.value is not None and coverage.low < coverage.value


def test_a_class_that_the_test_part_lacks_is_not_estimable() -> None:
    test = drawn(40, 0, part="test")
    kept = np.flatnonzero(test.targets[:, 2] < 0.5)
    part = Predictions(
        "test", test.study_ids[: len(kept)], test.patients[: len(kept)], test.targets[kept], test.probabilities[kept]
    )
    assert examine(part, rule_for(drawn(100, 1)), FEW, 0).coverage[3].value is None


def test_a_promise_that_is_not_kept_is_said() -> None:
    test = drawn(300, 7, part="test")
    spoilt = replace(test, probabilities=test.probabilities[:, [1, 2, 0]])
    found = examine(spoilt, rule_for(drawn(300, 0)), FEW, 0)
    assert any("below the promised 0.9" in note for note in found.notes)
    assert not examine(test, rule_for(drawn(300, 0)), FEW, 0).notes


def test_rules_and_findings_come_back_from_their_files(tmp_path: Path) -> None:
    rule = rule_for(drawn(60, 3, rare=0.05))
    found = examine(drawn(60, 4, part="test"), rule, FEW, 0)
    write_record(tmp_path / "found.json", found)
    assert read_record(tmp_path / "found.json", AbstentionFindings) == found


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.sampled_from(["lac", "aps", "none"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_however_few_the_studies_are_they_are_measured(seed: int, n: int, n_test: int, method: str) -> None:
    test = drawn(n_test, seed + 1, part="test")
    found = examine(test, rule_for(drawn(n, seed), method=method), UncertaintyConfig(resamples=100), 0)
    assert len(table(found)) == 4 and found.coverage[0].n == n_test
    assert all(score.value is None or 0 <= score.value <= 1 for score in found.coverage)
