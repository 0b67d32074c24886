"""Everything measured on the test part, with what was chosen on validation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from sklearn.metrics import roc_curve

from medtl.config import EvaluationConfig
from medtl.evaluation.calibration import reliability
from medtl.evaluation.metrics import METRICS, Row, calibration_error
from medtl.evaluation.threshold import choose
from medtl.evaluation.uncertainty import patient_weights, score_of
from medtl.records import Curve, Evaluation, FloatArray, OperatingPoint, Predictions, Score, Task

_FEW_PATIENTS = 30


def assess(
    val: Predictions, test: Predictions, task: Task, classes: tuple[str, ...], config: EvaluationConfig, seed: int
) -> Evaluation:
    """Measure every metric on the test part, each with an interval over patients.

    Binary tasks report the last class (the positive one); multi-class ones each class against the rest and the macro
    mean, with sensitivity and specificity at each class's own operating point and accuracy of the most probable class;
    multi-label ones each label over the studies where it is known, and the macro mean.

    Raises:
        ValueError: a probability is not finite.
    """
    for predictions in (val, test):
        if not np.isfinite(predictions.probabilities).all():
            raise ValueError(f"probabilities of the '{predictions.part}' part are not finite")
    reported = [len(classes) - 1] if task == "binary" else list(range(len(classes)))
    points = [_operating_point(val, index, classes[index], config) for index in reported]
    level = config.uncertainty.level
    weights = patient_weights(test.patients, config.uncertainty.resamples, seed)
    scores: list[Score] = []
    for metric, row in METRICS.items():
        per_class = [
            _measure(metric, row, test, index, classes[index], point, weights, config)
            for index, point in zip(reported, points, strict=True)
        ]
        scores += [score for score, _, _ in per_class]
        if len(per_class) > 1:
            scores.append(_macro(metric, per_class, level, test.patients))
    if task == "multiclass":
        scores.append(_accuracy(test, weights, level))
    curves = [curve for index in reported for curve in _curves(test, index, classes[index], config)]
    return Evaluation(
        task=task,
        classes=classes,
        scores=tuple(scores),
        operating_points=tuple(points),
        curves=tuple(curves),
        confusion=_confusion(test, task, reported, points),
        n=len(test.study_ids),
        patients=len(set(test.patients)),
        resamples=config.uncertainty.resamples,
        notes=_notes(test, classes),
    )


def _known(
    predictions: Predictions, index: int
) -> tuple[FloatArray, FloatArray, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    truth = predictions.targets[:, index]
    known = np.isfinite(truth)
    return truth[known], predictions.probabilities[known, index], known


def _operating_point(val: Predictions, index: int, label: str, config: EvaluationConfig) -> OperatingPoint:
    truth, score, _ = _known(val, index)
    return choose(truth, score, config.threshold, label)


def _measure(
    metric: str,
    row: Row,
    test: Predictions,
    index: int,
    label: str,
    point: OperatingPoint,
    weights: FloatArray,
    config: EvaluationConfig,
) -> tuple[Score, float, FloatArray]:
    truth, score, known = _known(test, index)
    patients = [patient for patient, k in zip(test.patients, known, strict=True) if k]
    function = (
        partial(calibration_error, bins=config.calibration_bins) if metric == "calibration_error" else row.function
    )
    if not len(truth):
        empty = np.full(len(weights), np.nan)
        return score_of(metric, label, np.nan, empty, config.uncertainty.level, patients, 0), np.nan, empty
    used = (score >= point.threshold).astype(np.float64) if row.needs == "decisions" else score
    value = float(function(truth, used, np.ones((1, len(truth))))[0])
    draws = function(truth, used, weights[:, known])
    people = np.asarray(patients)
    kinds = min(len(set(people[truth == kind])) for kind in (0, 1))
    if metric in ("brier", "calibration_error"):
        kinds = len(set(patients))  # these need no healthy or diseased patients
    elif kinds == 0 and metric in ("average_precision", "ppv", "npv", "f1"):
        value = np.nan  # they mix both kinds: with one alone they say nothing, not 0 and not 1
    return score_of(metric, label, value, draws, config.uncertainty.level, patients, kinds), value, draws


def _macro(
    metric: str, per_class: Sequence[tuple[Score, float, FloatArray]], level: float, patients: Sequence[str]
) -> Score:
    estimable = [(value, draws) for _, value, draws in per_class if np.isfinite(value)]
    if not estimable:
        return score_of(metric, "macro", np.nan, np.array([np.nan]), level, patients, 0)
    value = float(np.mean([value for value, _ in estimable]))
    draws = np.mean([draws for _, draws in estimable], axis=0)
    score = score_of(metric, "macro", value, draws, level, patients, 2)
    left_out = len(per_class) - len(estimable)
    if left_out and not score.note:
        note = f"without {left_out} of {len(per_class)} classes that are not estimable"
        return Score(metric, "macro", score.value, score.low, score.high, score.n, score.patients, note)
    return score


def _accuracy(test: Predictions, weights: FloatArray, level: float) -> Score:
    right = (test.probabilities.argmax(1) == test.targets.argmax(1)).astype(np.float64)
    draws = weights @ right / weights.sum(1)
    return score_of("accuracy", "all", float(right.mean()), draws, level, test.patients, len(set(test.patients)))


def _curves(test: Predictions, index: int, label: str, config: EvaluationConfig) -> list[Curve]:
    truth, score, _ = _known(test, index)
    if len(np.unique(truth)) < 2:
        return []
    fall_out, recall, _ = roc_curve(truth, score)
    roc = Curve("roc", label, tuple(map(float, fall_out)), tuple(map(float, recall)))
    return [roc, reliability(truth, score, config.calibration_bins, label)]


def _confusion(
    test: Predictions, task: Task, reported: Sequence[int], points: Sequence[OperatingPoint]
) -> tuple[tuple[int, ...], ...]:
    if task == "multiclass":
        size = test.targets.shape[1]
        flat = test.targets.argmax(1) * size + test.probabilities.argmax(1)
        table = np.bincount(flat, minlength=size * size).reshape(size, size)
    else:
        tables = []
        for index, point in zip(reported, points, strict=True):
            truth, score, _ = _known(test, index)
            flat = (truth > 0.5).astype(int) * 2 + (score >= point.threshold)
            tables.append(np.bincount(flat, minlength=4).reshape(2, 2))
        table = np.concatenate(tables)
    return tuple(tuple(int(value) for value in row) for row in table)


def _notes(test: Predictions, classes: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    patients = len(set(test.patients))
    if patients < _FEW_PATIENTS:
        notes.append(f"The test part holds {patients} patients only; intervals from so few are wide and rough.")
    absent = [name for name, truth in zip(classes, test.targets.T, strict=True) if not (truth == 1).any()]
    if absent:
        notes.append(f"The test part holds no study of {', '.join(absent)}.")
    return tuple(notes)
