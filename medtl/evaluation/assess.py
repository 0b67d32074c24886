"""Everything measured on the test part, with what was chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from medtl.config import EvaluationConfig, ThresholdConfig, UncertaintyConfig
from medtl.evaluation.bounds import SIGNED, Basis, Counts, evenness, least_share
from medtl.evaluation.calibration import reliability
from medtl.evaluation.checks import check_predictions
from medtl.evaluation.metrics import (
    METRICS,
    agreement_of_classes,
    agreement_of_grades,
    association_of_classes,
    calibration_error,
    net_benefit,
    sensitivity,
)
from medtl.evaluation.questions import Question, answers, basis_of, closed_forms, known_only, wilson_limits
from medtl.evaluation.threshold import choose
from medtl.evaluation.uncertainty import Estimate, mean_of, score_of
from medtl.records import Curve, Evaluation, FloatArray, OperatingPoint, Predictions, Score, Task

_FEW_PATIENTS = 30
_MIX_BOTH_KINDS = {"average_precision", "ppv", "npv", "f1"}  # with one kind alone they say nothing, not 0 and not 1
_OF_ONE_DECISION = {"mcc", "kappa"}  # several classes have one value of these, not a mean of several
_WITHOUT_MEAN = {"prevalence"}  # of classes that share the studies it is one over their number
_WEIGHTED = "weighted_kappa"
_DECISION_THRESHOLDS = np.arange(1, 100) / 100
_HIT = "share of a class whose most probable class is right"  # measured for the balanced accuracy, not reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Question):
    """A question about one metric of one class."""

    metric: str
    label: str
    patients: tuple[str, ...]  # of the studies it is measured on
    price: float = 0.0  # of a false alarm, of the net benefit


def assess(
    val: Predictions,
    test: Predictions,
    task: Task,
    classes: tuple[str, ...],
    config: EvaluationConfig,
    seed: int,
    may_share: bool = False,
) -> Evaluation:
    """Measure every metric on the test part, each with an interval over patients.

    Binary tasks report the last class (the positive one); multi-class ones each class against the rest and the macro
    mean, with sensitivity and specificity at each class's own operating point, and for all classes together accuracy
    and balanced accuracy of the most probable one; multi-label ones each label over the studies where it is known, and
    the macro mean. A mean over fewer classes than there are is not estimable.

    Args:
        may_share: a patient in validation and test is known and allowed; the evaluation's notes say so.

    Raises:
        SplitError: validation and test share a patient, or one of them is empty or holds a study twice.
        StudyError: a target is not 0, 1 or unknown, or not exactly one class is true where one is wanted.
        ModelError: a probability is not a number from 0 to 1, or those of one study do not sum to 1.
    """
    check_predictions(val, test, task, classes, may_share)
    reported = reported_classes(task, classes)
    points = operating_points(val, task, classes, config)
    questions = ask(test, task, classes, points, config)
    answers = answer(questions, test.study_ids, test.patients, config.uncertainty, seed)
    curves = [curve for index in reported for curve in curves_of(test, index, classes[index], config)]
    return Evaluation(
        task=task,
        classes=classes,
        scores=tuple(scores_of(questions, answers, test.patients, config.uncertainty.level)),
        operating_points=tuple(points),
        curves=tuple(curves),
        confusion=confusion_of(test, task, reported, points),
        n=len(test.study_ids),
        patients=len(set(test.patients)),
        resamples=config.uncertainty.resamples,
        notes=_notes(val, test, classes),
    )


def reported_classes(task: Task, classes: Sequence[str]) -> list[int]:
    """Give the classes that are reported: of a binary task the last one, which is the positive one."""
    return [len(classes) - 1] if task == "binary" else list(range(len(classes)))


def ask(
    test: Predictions, task: Task, classes: Sequence[str], points: Sequence[OperatingPoint], config: EvaluationConfig
) -> list[Asked]:
    """Ask for every metric of every reported class, and of several classes for those of the one decision too.

    Args:
        points: of the reported classes.
    """
    questions = [
        question
        for index, point in zip(reported_classes(task, classes), points, strict=True)
        for question in _questions(test, index, classes[index], point, config)
    ]
    if task == "multiclass":
        level = config.uncertainty.level
        questions += [_accuracy(test, level), *_hits(test, classes, level), *_of_all_classes(test, config)]
    return questions


def _known(
    predictions: Predictions, index: int
) -> tuple[FloatArray, FloatArray, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    truth = predictions.targets[:, index]
    known = np.isfinite(truth)
    return truth[known], predictions.probabilities[known, index], known


def operating_points(
    val: Predictions, task: Task, classes: Sequence[str], config: EvaluationConfig
) -> list[OperatingPoint]:
    """Choose the threshold of each reported class on validation."""
    points = []
    for index in reported_classes(task, classes):
        truth, score, _ = _known(val, index)
        points.append(choose(truth, score, config.threshold, classes[index]))
    return points


def _questions(
    test: Predictions, index: int, label: str, point: OperatingPoint, config: EvaluationConfig
) -> list[Asked]:
    truth, score, known = _known(test, index)
    patients = tuple(patient for patient, is_known in zip(test.patients, known, strict=True) if is_known)
    called = (score >= point.threshold).astype(np.float64)
    counts = Counts.of(patients, truth, called)
    closed = closed_forms(truth, score, called, patients, config.uncertainty.level)
    price = price_of_a_false_alarm(point.threshold, config.threshold)
    own: Mapping[str, Callable[..., FloatArray]] = {
        "calibration_error": partial(calibration_error, bins=config.calibration_bins),
        "net_benefit": partial(net_benefit, odds=price),
    }
    questions = []
    for metric, row in METRICS.items():
        of = partial(own.get(metric, row.function), truth, called if row.needs == "decisions" else score)
        questions.append(
            Asked(
                of if known.all() else known_only(of, known),
                counts.basis(row.rests_on, config.uncertainty.level),
                row.scale,
                closed.get(metric),
                metric not in _MIX_BOTH_KINDS or min(counts.diseased, counts.healthy) > 0,
                row.unknown,
                metric=metric,
                label=label,
                patients=patients,
                price=price,
            )
        )
    return questions


def price_of_a_false_alarm(threshold: float, config: ThresholdConfig) -> float:
    """Give how many true calls a false one costs: what rule cost says, else what the threshold itself says.

    Whoever acts from a probability of 0.2 on accepts four false alarms for each true one. NaN at a threshold of 1 and
    beyond, which accepts none.
    """
    if config.rule == "cost":
        return 1 / config.cost
    return threshold / (1 - threshold) if threshold < 1 else np.nan


def _accuracy(test: Predictions, level: float) -> Asked:
    right = (test.probabilities.argmax(1) == test.targets.argmax(1)).astype(np.float64)
    # the share of the studies that are right is the sensitivity where every study is diseased
    of = partial(sensitivity, np.ones(len(right)), right)
    closed = partial(wilson_limits, right, np.ones(len(right)), test.patients, level)
    basis = basis_of(test.patients, level)
    return Asked(of, basis, limits=closed, metric="accuracy", label="all", patients=test.patients)


def _hits(test: Predictions, classes: Sequence[str], level: float) -> list[Asked]:
    chosen = test.probabilities.argmax(1)
    questions = []
    for index, (label, truth) in enumerate(zip(classes, test.targets.T, strict=True)):
        of = partial(sensitivity, truth, (chosen == index).astype(np.float64))
        people = [patient for patient, is_true in zip(test.patients, truth, strict=True) if is_true]
        questions.append(Asked(of, basis_of(people, level), metric=_HIT, label=label, patients=test.patients))
    return questions


def _of_all_classes(test: Predictions, config: EvaluationConfig) -> list[Asked]:
    """Ask for MCC and kappa of the one decision among all classes."""
    truth, classes = test.targets.argmax(1), test.targets.shape[1]
    functions = {"mcc": association_of_classes, "kappa": agreement_of_classes}
    if config.ordered:
        functions[_WEIGHTED] = agreement_of_grades
    # both are perfect where each class is, and as much above chance as the classes' mean share is: 0 where it is 1 / k
    people = [{p for p, is_true in zip(test.patients, column, strict=True) if is_true} for column in test.targets.T]
    mean = float(np.mean([least_share(len(some), config.uncertainty.level) for some in people]))
    place = (1 + (classes * mean - 1) / (classes - 1)) / 2 if classes > 1 else 0.0
    basis = Basis(min(map(len, people)), place, evenness(test.patients))
    return [
        Asked(
            partial(function, truth, test.probabilities.argmax(1), classes=classes),
            basis,
            SIGNED,
            metric=metric,
            label="all",
            patients=test.patients,
        )
        for metric, function in functions.items()
    ]


def answer(
    questions: Sequence[Asked],
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> list[Estimate]:
    """Answer every question from the same resamples."""
    return _with_bounded_benefit(questions, answers(questions, study_ids, patients, config, seed))


def _with_bounded_benefit(questions: Sequence[Asked], found: list[Estimate]) -> list[Estimate]:
    """Let a net benefit be as much lower as its sensitivity and specificity may be beyond what the draws show."""
    by_name = {(q.metric, q.label): one for q, one in zip(questions, found, strict=True)}
    for place, question in enumerate(questions):
        if question.metric != "net_benefit" or found[place].problem:
            continue
        share = by_name["prevalence", question.label].value
        spared = by_name["specificity", question.label]
        hit = by_name["sensitivity", question.label]
        below = share * hit.below + (1 - share) * question.price * spared.below
        if below > 0:
            found[place] = replace(found[place], below=below, bounded=hit.bounded or spared.bounded)
    return found


def scores_of(
    questions: Sequence[Asked], answers: Sequence[Estimate], patients: Sequence[str], level: float
) -> list[Score]:
    """Order the scores by metric, the mean over classes after the classes."""
    scores = []
    hits = [(q.label, answer) for q, answer in zip(questions, answers, strict=True) if q.metric == _HIT]
    for metric in (*METRICS, "accuracy", _WEIGHTED):
        asked = [(q, answer) for q, answer in zip(questions, answers, strict=True) if q.metric == metric]
        scores += [score_of(metric, q.label, answer, level, q.patients) for q, answer in asked]
        if len(asked) < 2 or metric in _WITHOUT_MEAN or (metric in _OF_ONE_DECISION and asked[-1][0].label == "all"):
            continue
        label, parts = "macro", [(q.label, answer) for q, answer in asked]
        if metric == "balanced_accuracy" and hits:
            label, parts = "all", hits  # of one decision among all classes: what the term means for several classes
        names, estimates = [name for name, _ in parts], [answer for _, answer in parts]
        scores.append(score_of(metric, label, mean_of(estimates, names), level, patients))
    return scores


def curves_of(test: Predictions, index: int, label: str, config: EvaluationConfig) -> list[Curve]:
    """Draw the lines of one class, or none where a kind is missing."""
    truth, score, _ = _known(test, index)
    if len(np.unique(truth)) < 2:
        return []
    fall_out, recall, _ = roc_curve(truth, score)
    precision, found, _ = precision_recall_curve(truth, score, drop_intermediate=True)
    return [
        Curve("roc", label, _line(fall_out), _line(recall)),
        Curve("pr", label, _line(found), _line(precision)),
        reliability(truth, score, config.calibration_bins, label),
        *_decision_curves(truth, score, label),
    ]


def _decision_curves(truth: FloatArray, score: FloatArray, label: str) -> list[Curve]:
    """Give the net benefit at every threshold a reader may hold, of the model and of treating all or none.

    Source: Vickers and Elkin, Medical Decision Making 26 (2006).
    """
    at, everybody, ones = _DECISION_THRESHOLDS, np.ones(len(truth)), np.ones((1, len(truth)))
    model = [net_benefit(truth, (score >= t).astype(np.float64), ones, t / (1 - t))[0] for t in at]
    treat_all = [net_benefit(truth, everybody, ones, t / (1 - t))[0] for t in at]
    return [
        Curve("decision", label, _line(at), _line(model)),
        Curve("decision_all", label, _line(at), _line(treat_all)),
        Curve("decision_none", label, _line(at), (0.0,) * len(at)),
    ]


def _line(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


def confusion_of(
    test: Predictions, task: Task, reported: Sequence[int], points: Sequence[OperatingPoint]
) -> tuple[tuple[int, ...], ...]:
    """Count truths by decisions: of one decision among several classes, else two by two for each class."""
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


def _notes(val: Predictions, test: Predictions, classes: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    shared = len(set(val.patients) & set(test.patients))
    if shared:
        notes.append(f"Patients in both validation and test: {shared}. Thresholds were chosen on people judged here.")
    patients = len(set(test.patients))
    if patients < _FEW_PATIENTS:
        notes.append(f"The test part holds {patients} patients only; intervals from so few are wide and rough.")
    absent = [name for name, truth in zip(classes, test.targets.T, strict=True) if not (truth == 1).any()]
    if absent:
        notes.append(f"The test part holds no study of {', '.join(absent)}.")
    return tuple(notes)
