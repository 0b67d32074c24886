"""Everything measured on the test part, with what was chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.metrics import roc_curve

from medtl.config import EvaluationConfig, UncertaintyConfig
from medtl.evaluation.bounds import Basis, Counts, evenness, least_share
from medtl.evaluation.calibration import reliability
from medtl.evaluation.checks import check_predictions
from medtl.evaluation.metrics import METRICS, calibration_error, sensitivity
from medtl.evaluation.threshold import choose
from medtl.evaluation.uncertainty import Estimate, drawn, estimate, left_out, mean_of, score_of
from medtl.records import Curve, Evaluation, FloatArray, OperatingPoint, Predictions, Score, Task

_FEW_PATIENTS = 30
_MIX_BOTH_KINDS = {"average_precision", "ppv", "npv", "f1"}  # with one kind alone they say nothing, not 0 and not 1
_HIT = "share of a class whose most probable class is right"  # measured for the balanced accuracy, not reported


@dataclass(frozen=True, slots=True)
class _Question:
    """One metric of one class: how resamples give its values, and what its interval needs."""

    metric: str
    label: str
    of: Callable[[FloatArray], FloatArray]  # (b, studies of the test part) weights -> (b,)
    patients: tuple[str, ...]  # of the studies it is measured on
    basis: Basis
    estimable: bool = True


def assess(
    val: Predictions, test: Predictions, task: Task, classes: tuple[str, ...], config: EvaluationConfig, seed: int
) -> Evaluation:
    """Measure every metric on the test part, each with an interval over patients.

    Binary tasks report the last class (the positive one); multi-class ones each class against the rest and the macro
    mean, with sensitivity and specificity at each class's own operating point, and for all classes together accuracy
    and balanced accuracy of the most probable one; multi-label ones each label over the studies where it is known, and
    the macro mean. A mean over fewer classes than there are is not estimable.

    Raises:
        SplitError: validation and test share a patient, or one of them is empty or holds a study twice.
        StudyError: a target is not 0, 1 or unknown, or not exactly one class is true where one is wanted.
        ModelError: a probability is not a number from 0 to 1, or those of one study do not sum to 1.
    """
    check_predictions(val, test, task, classes)
    reported = [len(classes) - 1] if task == "binary" else list(range(len(classes)))
    points = [_operating_point(val, index, classes[index], config) for index in reported]
    level = config.uncertainty.level
    questions = [
        question
        for index, point in zip(reported, points, strict=True)
        for question in _questions(test, index, classes[index], point, config)
    ]
    if task == "multiclass":
        questions += [_accuracy(test, level), *_hits(test, classes, level)]
    answers = _answers(questions, test, config.uncertainty, seed)
    curves = [curve for index in reported for curve in _curves(test, index, classes[index], config)]
    return Evaluation(
        task=task,
        classes=classes,
        scores=tuple(_scores(questions, answers, test.patients, level)),
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


def _questions(
    test: Predictions, index: int, label: str, point: OperatingPoint, config: EvaluationConfig
) -> list[_Question]:
    truth, score, known = _known(test, index)
    patients = tuple(patient for patient, is_known in zip(test.patients, known, strict=True) if is_known)
    called = (score >= point.threshold).astype(np.float64)
    counts = Counts.of(patients, truth, called)
    questions = []
    for metric, row in METRICS.items():
        function = row.function
        if metric == "calibration_error":
            function = partial(calibration_error, bins=config.calibration_bins)
        of = partial(function, truth, called if row.needs == "decisions" else score)
        questions.append(
            _Question(
                metric,
                label,
                of if known.all() else partial(_of_known, of, known),
                patients,
                counts.basis(row.rests_on, config.uncertainty.level),
                metric not in _MIX_BOTH_KINDS or min(counts.diseased, counts.healthy) > 0,
            )
        )
    return questions


def _of_known(
    of: Callable[[FloatArray], FloatArray], known: np.ndarray[tuple[int], np.dtype[np.bool_]], weights: FloatArray
) -> FloatArray:
    return of(weights[:, known])


def _accuracy(test: Predictions, level: float) -> _Question:
    right = (test.probabilities.argmax(1) == test.targets.argmax(1)).astype(np.float64)
    # the share of the studies that are right is the sensitivity where every study is diseased
    of = partial(sensitivity, np.ones(len(right)), right)
    return _Question("accuracy", "all", of, test.patients, _basis(test.patients, level))


def _hits(test: Predictions, classes: Sequence[str], level: float) -> list[_Question]:
    chosen = test.probabilities.argmax(1)
    questions = []
    for index, (label, truth) in enumerate(zip(classes, test.targets.T, strict=True)):
        of = partial(sensitivity, truth, (chosen == index).astype(np.float64))
        people = [patient for patient, is_true in zip(test.patients, truth, strict=True) if is_true]
        questions.append(_Question(_HIT, label, of, test.patients, _basis(people, level)))
    return questions


def _basis(people: Sequence[str], level: float) -> Basis:
    count = len(set(people))
    return Basis(count, least_share(count, level), evenness(people))


def _answers(questions: Sequence[_Question], test: Predictions, config: UncertaintyConfig, seed: int) -> list[Estimate]:
    """Put every question to the same resamples, and to all patients but one, a few at a time."""
    draws = _asked(questions, drawn(test.study_ids, test.patients, config.resamples, seed))
    without = _asked(questions, left_out(test.study_ids, test.patients))
    ones = np.ones((1, len(test.study_ids)))
    values = [float(question.of(ones)[0]) if question.estimable else np.nan for question in questions]
    return [
        estimate(value, row, others, config.level, question.basis)
        for value, row, others, question in zip(values, draws, without, questions, strict=True)
    ]


def _asked(questions: Sequence[_Question], parts: Iterator[FloatArray]) -> FloatArray:
    """Give each question's values on rows of weights, shape (questions, rows)."""
    return np.concatenate([np.array([question.of(weights) for question in questions]) for weights in parts], axis=1)


def _scores(
    questions: Sequence[_Question], answers: Sequence[Estimate], patients: Sequence[str], level: float
) -> list[Score]:
    """Order the scores by metric, the mean over classes after the classes."""
    scores = []
    hits = [(q.label, answer) for q, answer in zip(questions, answers, strict=True) if q.metric == _HIT]
    for metric in (*METRICS, "accuracy"):
        asked = [(q, answer) for q, answer in zip(questions, answers, strict=True) if q.metric == metric]
        scores += [score_of(metric, q.label, answer, level, q.patients) for q, answer in asked]
        if len(asked) < 2:
            continue
        label, parts = "macro", [(q.label, answer) for q, answer in asked]
        if metric == "balanced_accuracy" and hits:
            label, parts = "all", hits  # of one decision among all classes: what the term means for several classes
        names, estimates = [name for name, _ in parts], [answer for _, answer in parts]
        scores.append(score_of(metric, label, mean_of(estimates, names), level, patients))
    return scores


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
