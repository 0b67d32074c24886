"""The test parts of several folds, or of several repeats of them, as one evaluation with one interval.

Each fold has its own model and its own operating point, so that probabilities of two folds are not compared: a metric
is measured in each fold, and the mean over folds counts each by its patients. Patients are drawn from all folds
together, and a patient drawn twice counts twice in every repeat: repeats show again what the same patients showed, so
they steady the value and hardly narrow the interval. It is the interval of these models on new patients, given what
each was trained on; no interval from one set of patients holds how much training on others would change.
Source: LeDell, Petersen and van der Laan, Electronic Journal of Statistics 9 (2015), for the AUROC of cross-validation;
Bengio and Grandvalet, Journal of Machine Learning Research 5 (2004), for what is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from medtl.config import EvaluationConfig
from medtl.errors import SplitError
from medtl.evaluation.assess import (
    Asked,
    answer,
    ask,
    confusion_of,
    curves_of,
    reported_classes,
    scores_of,
)
from medtl.evaluation.bounds import together
from medtl.evaluation.comparison import judge
from medtl.evaluation.uncertainty import MOST_MISSING, Estimate, difference_of, mean_of, score_of
from medtl.records import Comparison, Evaluation, FloatArray, FoldScores, IntArray, OperatingPoint, Predictions, Task


@dataclass(frozen=True, slots=True)
class Fold:
    """One model's predictions of the patients it was not trained on."""

    name: str  # number of the fold, or the site left out
    test: Predictions
    points: tuple[OperatingPoint, ...]  # of the reported classes, chosen on the fold's own validation
    repeat: int = 0


def pool(
    folds: Sequence[Fold], task: Task, classes: tuple[str, ...], config: EvaluationConfig, seed: int
) -> Evaluation:
    """Measure every metric in each fold and give the mean over folds with its interval over patients.

    Curves and tables are of the first repeat's folds put together. A mean is not estimable where folds with more than
    a fifth of the patients have no value.

    Raises:
        SplitError: no fold, a study or patient in two folds of one repeat, or repeats of other studies.
    """
    first, folds = _in_order(folds)
    joined = _joined([fold.test for fold in first])
    asked = [ask(fold.test, task, classes, fold.points, config) for fold in folds]
    questions = _questions(folds, asked, joined, config.uncertainty.level)
    answers = answer(questions, joined.study_ids, joined.patients, config.uncertainty, seed)
    reported = reported_classes(task, classes)
    tables = [np.array(confusion_of(fold.test, task, reported, fold.points)) for fold in first]
    level = config.uncertainty.level
    parts = [_fold_scores(fold, some, level, classes[-1]) for fold, some in zip(folds, asked, strict=True)]
    return Evaluation(
        task=task,
        classes=classes,
        scores=tuple(scores_of(questions, answers, joined.patients, level)),
        operating_points=(),
        curves=tuple(line for index in reported for line in curves_of(joined, index, classes[index], config)),
        confusion=tuple(tuple(int(cell) for cell in row) for row in np.sum(tables, axis=0)),
        n=len(joined.study_ids),
        patients=len(set(joined.patients)),
        resamples=config.uncertainty.resamples,
        notes=_notes(parts),
        folds=tuple(parts),
    )


def compare_folds(
    model: Sequence[Fold],
    reference: Sequence[Fold],
    names: tuple[str, str],
    task: Task,
    classes: tuple[str, ...],
    config: EvaluationConfig,
    seed: int,
) -> Comparison:
    """Give the difference of two ways of training in the mean AUROC over folds, by one bootstrap of the patients.

    No test stands beside it: those of ranks would hold one fold's probabilities against another's.

    Args:
        names: of the model and of the reference.

    Raises:
        ValueError: the two did not test the same studies in the same folds.
        SplitError: see :func:`pool`.
    """
    if [(one.name, one.repeat, one.test.study_ids) for one in model] != [
        (one.name, one.repeat, one.test.study_ids) for one in reference
    ]:
        raise ValueError("the two must have tested the same studies in the same folds")
    (first, ours_in_order), (_, theirs_in_order) = _in_order(model), _in_order(reference)
    level, joined = config.uncertainty.level, _joined([fold.test for fold in first])
    both: list[Asked] = []
    for side in (ours_in_order, theirs_in_order):
        asked = [ask(fold.test, task, classes, fold.points, config) for fold in side]
        ranks = [[question for question in some if question.metric == "auroc"] for some in asked]
        both += _questions(side, ranks, joined, level)
    found = answer(both, joined.study_ids, joined.patients, config.uncertainty, seed)
    half = len(both) // 2
    labels = [question.label for question in both[:half]]
    ours, theirs = mean_of(found[:half], labels), mean_of(found[half:], labels)
    patients = both[0].patients
    difference = score_of("auroc difference", "macro", difference_of(ours, theirs, level), level, patients)
    score = score_of("auroc", "macro", theirs, level, patients)
    return Comparison("auroc", *names, difference, score, (), config.margin, judge(difference, config.margin))


def _in_order(folds: Sequence[Fold]) -> tuple[list[Fold], list[Fold]]:
    """Give the folds of the first repeat, and all with those before the others, after a look at what each holds."""
    if not folds:
        raise SplitError("There are no folds to pool. Evaluate at least one.")
    repeats: dict[int, list[Fold]] = {}
    for fold in folds:
        repeats.setdefault(fold.repeat, []).append(fold)
    held = []
    for some in repeats.values():
        studies = Counter(study_id for fold in some for study_id in fold.test.study_ids)
        patients = Counter(patient for fold in some for patient in set(fold.test.patients))
        twice = sum(times > 1 for times in studies.values()), sum(times > 1 for times in patients.values())
        if any(twice):
            raise SplitError(
                f"{twice[0]} studies and {twice[1]} patients are tested in two folds of one repeat. Split by patient."
            )
        held.append(set(studies))
    if any(one != held[0] for one in held):
        raise SplitError("The repeats do not test the same studies. Pool repeats of one cohort.")
    first = repeats[folds[0].repeat]
    return first, [*first, *(fold for fold in folds if fold.repeat != first[0].repeat)]


def _joined(parts: Sequence[Predictions]) -> Predictions:
    return Predictions(
        parts[0].part,
        tuple(study_id for part in parts for study_id in part.study_ids),
        tuple(patient for part in parts for patient in part.patients),
        np.concatenate([part.targets for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
    )


def _questions(
    folds: Sequence[Fold], asked: Sequence[Sequence[Asked]], joined: Predictions, level: float
) -> list[Asked]:
    """Join the questions to each fold into questions to all patients.

    Args:
        folds: those of the first repeat before all others.
        joined: the test parts of the first repeat.
    """
    rows = {study_id: row for row, study_id in enumerate(joined.study_ids)}
    places = [np.array([rows[study_id] for study_id in fold.test.study_ids]) for fold in folds]
    first = sum(fold.repeat == folds[0].repeat for fold in folds)
    return [_of_folds(same, places, first, level) for same in zip(*asked, strict=True)]


def _of_folds(same: Sequence[Asked], places: Sequence[IntArray], first: int, level: float) -> Asked:
    """Join one question to each fold into one question to all patients.

    Args:
        same: the question of each fold, those of the first repeat before all others.
        first: how many folds the first repeat has.
    """
    share = np.array([len(set(question.patients)) for question in same], dtype=np.float64)
    people = tuple(patient for question in same[:first] for patient in question.patients)
    return Asked(
        partial(_mean_over_folds, same, places, share / share.sum()),
        together([question.basis for question in same[:first]], level, people),
        same[0].scale,
        unknown=same[0].unknown,
        metric=same[0].metric,
        label=same[0].label,
        patients=people,
        price=float(np.mean([question.price for question in same])),
    )


def _mean_over_folds(
    same: Sequence[Asked], places: Sequence[IntArray], share: FloatArray, weights: FloatArray
) -> FloatArray:
    """Give the mean over the folds that have a value, shape (b,); NaN where too many patients are in others."""
    values = np.array(
        [
            question.of(weights[:, rows]) if question.estimable else np.full(len(weights), np.nan)
            for question, rows in zip(same, places, strict=True)
        ]
    )
    there = np.isfinite(values)
    counted = share @ there
    total = share @ np.where(there, values, 0.0)
    mean: FloatArray = np.divide(total, counted, out=np.full(len(weights), np.nan), where=counted >= 1 - MOST_MISSING)
    return mean


def _fold_scores(fold: Fold, questions: Sequence[Asked], level: float, last: str) -> FoldScores:
    """Give a fold's headline values: the mean over classes, or of the positive class."""
    nothing, ones = np.empty(0), np.ones((1, len(fold.test.study_ids)))
    found = [float(question.of(ones)[0]) if question.estimable else np.nan for question in questions]
    answers = [Estimate(value, nothing, nothing, problem="of one fold") for value in found]
    values: dict[str, float | None] = {}
    for score in scores_of(questions, answers, fold.test.patients, level):
        if score.label in ("macro", "all", last):
            values[score.metric] = score.value  # the mean comes after the classes
    return FoldScores(fold.name, fold.repeat, len(fold.test.study_ids), len(set(fold.test.patients)), values)


def _notes(folds: Sequence[FoldScores]) -> tuple[str, ...]:
    repeats = len({fold.repeat for fold in folds})
    each = f"{len(folds) // repeats} folds" + (f", repeated {repeats} times" if repeats > 1 else "")
    notes = [
        f"Means over {each}, each by a model of its own at its own operating point; a fold counts by its patients."
    ]
    lacking = sum(fold.values["auroc"] is None for fold in folds)
    if lacking:
        notes.append(f"{lacking} of {len(folds)} folds have no AUROC of some class and are left out of its mean.")
    return tuple(notes)
