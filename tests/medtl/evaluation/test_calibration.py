"""Calibrators are scikit-learn's where these agree, plain numbers, and none where validation cannot tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.calibration import CalibratedClassifierCV, _sigmoid_calibration
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from medtl.artifacts import read_record, write_record
from medtl.config import CalibrationConfig, EvaluationConfig, UncertaintyConfig
from medtl.evaluation.calibration import apply, calibrated, examine, fit, reliability, table
from medtl.records import Calibrator, Predictions, Task

CLASSES = {"binary": ("no", "yes"), "multiclass": ("a", "b", "c"), "multilabel": ("a", "b", "c")}
METHODS: tuple[Literal["temperature", "platt", "isotonic"], ...] = ("temperature", "platt", "isotonic")


def predicted(task: str, heat: float = 1.0, shift: float = 0.0, n: int = 400, seed: int = 0) -> Predictions:
    """Draw the truth from probabilities, and give them sharpened by ``heat`` and moved by ``shift`` log odds."""
    rng = np.random.default_rng(seed)
    width = len(CLASSES[task])
    odds = 1.5 * rng.normal(size=(n, width))
    if task == "multilabel":
        targets = (rng.random((n, width)) < expit(odds)) * 1.0
        probabilities = expit(heat * odds + shift)
    else:
        drawn = (softmax(odds, 1).cumsum(1) > rng.random((n, 1))).argmax(1)
        targets = np.eye(width)[drawn]
        probabilities = softmax(heat * odds + shift * np.arange(width), 1)
    ids, people = tuple(f"s-{i}" for i in range(n)), tuple(f"p-{i // 2}" for i in range(n))
    return Predictions("val", ids, people, targets, probabilities)


def fitted(task: Any, method: Any, val: Predictions) -> Calibrator:
    return fit(val, task, CLASSES[task], CalibrationConfig(method=method), 0)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_the_temperature_is_scikit_learns(task: Any) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(len(CLASSES[task]), size=400)
    x = rng.normal(size=(400, 4)) + truth[:, None]
    frozen = LogisticRegression(C=100).fit(x[:100], truth[:100])
    theirs = CalibratedClassifierCV(FrozenEstimator(frozen), method="temperature").fit(x[100:], truth[100:])
    given_ = frozen.predict_proba(x[100:])
    ids = tuple(map(str, range(300)))
    val = Predictions("val", ids, ids, np.eye(len(CLASSES[task]))[truth[100:]], given_)
    ours = apply(fitted(task, "temperature", val), given_)
    assert np.abs(ours - theirs.predict_proba(x[100:])).max() < 1e-5


def test_platt_is_scikit_learns_on_the_log_odds() -> None:
    val = predicted("binary", heat=2, shift=0.7)
    odds = np.log(val.probabilities[:, 1] / val.probabilities[:, 0])
    slope, intercept = _sigmoid_calibration(odds, val.targets[:, 1])
    found = fitted("binary", "platt", val)
    assert (found.slopes[0], found.intercepts[0]) == pytest.approx((-slope, -intercept), abs=1e-4)


def test_isotonic_is_scikit_learns_away_from_certainty() -> None:
    val = predicted("binary", heat=2)
    score, truth = val.probabilities[:, 1], val.targets[:, 1]
    theirs = np.clip(IsotonicRegression(out_of_bounds="clip").fit(score, truth).predict(score), 1 / 202, 201 / 202)
    assert apply(fitted("binary", "isotonic", val), val.probabilities)[:, 1] == pytest.approx(theirs)


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("heat", [0.4, 3.0])
def test_the_temperature_that_was_put_in_is_found(task: Any, heat: float) -> None:
    assert fitted(task, "temperature", predicted(task, heat, n=3000)).temperature == pytest.approx(heat, rel=0.15)


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("method", METHODS)
def test_what_was_fitted_makes_other_patients_probabilities_truer(task: Any, method: Any) -> None:
    test = predicted(task, heat=4, seed=9)
    made = apply(fitted(task, method, predicted(task, heat=4, n=2000)), test.probabilities)
    assert ((made - test.targets) ** 2).sum() < 0.95 * ((test.probabilities - test.targets) ** 2).sum()


@given(st.sampled_from(sorted(CLASSES)), st.sampled_from(METHODS), st.floats(0.2, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_probabilities_stay_probabilities_and_keep_their_order(task: Any, method: Any, heat: float, seed: int) -> None:
    val = predicted(task, heat, n=200, seed=seed)
    found = fitted(task, method, val)
    made = apply(found, val.probabilities)
    assert ((made >= 0) & (made <= 1)).all()
    if task != "multilabel":
        assert np.abs(made.sum(1) - 1).max() < 1e-12
    if task != "multiclass":
        order = np.argsort(val.probabilities[:, -1], kind="stable")
        assert (np.diff(made[order, -1]) >= -1e-15).all()
    elif method == "temperature":
        assert (made.argmax(1) == val.probabilities.argmax(1)).all()


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_the_auroc_does_not_move(method: Any) -> None:
    val = predicted("binary", heat=3, shift=1)
    areas = [
        roc_auc_score(val.targets[:, 1], p[:, 1])
        for p in (val.probabilities, apply(fitted("binary", method, val), val.probabilities))
    ]
    assert areas[0] == areas[1]


@pytest.mark.parametrize("task", CLASSES)
def test_auto_takes_none_where_probabilities_come_true_already(task: Any) -> None:
    found = fitted(task, "auto", predicted(task))
    assert found.method == "none" and "no other is better" in found.reason
    assert found.log_losses.keys() == {"none", "temperature", "platt", "isotonic"}


def test_auto_takes_the_temperature_for_heat_and_platt_for_a_shift() -> None:
    assert fitted("binary", "auto", predicted("binary", heat=3, n=1000)).method == "temperature"
    assert fitted("binary", "auto", predicted("binary", shift=2, n=1000)).method == "platt"


def test_auto_does_not_depend_on_the_order_of_studies_or_the_names_of_patients() -> None:
    val = predicted("binary", heat=1.3)
    back = Predictions(
        "val",
        val.study_ids[::-1],
        tuple(f"q{p}" for p in val.patients[::-1]),
        val.targets[::-1],
        val.probabilities[::-1],
    )
    one, other = fitted("binary", "auto", val), fitted("binary", "auto", back)
    assert one.method == other.method
    assert one.log_losses["platt"] == pytest.approx(other.log_losses["platt"], abs=1e-9)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_one_class_or_few_patients_leave_the_probabilities_alone(method: Any) -> None:
    one_class = replace(predicted("binary"), targets=np.tile([0.0, 1.0], (400, 1)))
    found = fitted("binary", method, one_class)
    assert found.method == "none" and "fewer than 10 patients" in found.reason
    assert (apply(found, one_class.probabilities) == one_class.probabilities).all()
    assert fitted("multiclass", method, predicted("multiclass", n=24)).method == "none"


def test_a_rare_label_is_left_as_it_is_and_named() -> None:
    val = predicted("multilabel", heat=3)
    targets = val.targets.copy()
    targets[:, 1] = np.nan
    found = fitted("multilabel", "platt", replace(val, targets=targets))
    assert (found.slopes[1], found.intercepts[1]) == (1, 0) and found.slopes[0] < 0.6
    assert found.reason.endswith("left as they are, with too few patients: b")


def test_a_validation_without_an_error_has_no_temperature() -> None:
    val = predicted("binary")
    right = np.where(val.targets > 0.5, 0.9, 0.1)
    found = fitted("binary", "temperature", replace(val, probabilities=right))
    assert found.method == "none" and "without an error" in found.reason


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_a_model_that_is_wrong_way_round_is_not_turned_by_its_calibrator(method: Any) -> None:
    val = predicted("binary")
    found = fitted("binary", method, replace(val, probabilities=val.probabilities[:, ::-1]))
    assert found.method == "none" and "no sign" in found.reason


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_a_calibrator_is_plain_numbers_in_a_file(tmp_path: Path, method: Any) -> None:
    val = predicted("multiclass", heat=2)
    found = fitted("multiclass", method, val)
    write_record(tmp_path / "calibrator.json", found)
    back = read_record(tmp_path / "calibrator.json", Calibrator)
    assert (apply(back, val.probabilities) == apply(found, val.probabilities)).all()


@pytest.mark.parametrize("task", CLASSES)
def test_the_test_part_shows_before_and_after_paired(task: Task) -> None:
    test = predicted(task, heat=5, seed=3)
    config = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=200))
    found = examine(test, fitted(task, "temperature", predicted(task, heat=5)), CLASSES[task], config, 0)
    (name, before, after, difference), error = table(found)
    assert (name, error[0]) == ("brier", "calibration_error")
    assert before.value is not None and after.value is not None and difference.high is not None
    assert difference.value == pytest.approx(after.value - before.value) and difference.high < 0
    if task == "binary":
        assert before.value == pytest.approx(((test.probabilities - test.targets)[:, 1] ** 2).mean())


def test_calibrating_changes_nothing_but_probabilities() -> None:
    test = predicted("binary", heat=3)
    made = calibrated(Calibrator("binary", "temperature", "", temperature=2.0), test)
    assert (made.study_ids, made.patients) == (test.study_ids, test.patients)
    assert (made.targets == test.targets).all() and (made.probabilities != test.probabilities).any()


def test_reliability_leaves_empty_bins_out() -> None:
    curve = reliability(np.array([0.0, 1.0, 1.0]), np.array([0.05, 0.95, 1.0]), 10, "yes")
    assert curve.x == pytest.approx((0.05, 0.975))
    assert (curve.y, curve.weight) == ((0.0, 1.0), (1.0, 2.0))


@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from(["binary", "multiclass", "multilabel"]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_however_few_and_odd_the_studies_are_probabilities_come_out(seed: int, n: int, task: Any) -> None:
    rng = np.random.default_rng(seed)
    val = predicted(task, heat=8, n=n, seed=seed)
    targets = val.targets.copy()
    if task == "multilabel":
        targets[rng.random(targets.shape) < 0.5] = np.nan
    for method in ("auto", *METHODS):
        config = CalibrationConfig(method=method, fewest_patients=2)
        found = fit(replace(val, targets=targets), task, CLASSES[task], config, 0)
        made = apply(found, val.probabilities)
        assert found.reason and np.isfinite(made).all() and (made >= 0).all() and (made <= 1).all()
