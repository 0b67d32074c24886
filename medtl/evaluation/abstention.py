"""When the model should not answer: conformal prediction, with patients as what is exchangeable.

For each study the answers remain open that are not too strange for it; where that is not exactly one, the model does
not answer. On validation the threshold of strangeness is set so that the truth stays in the set with the wanted chance
(:mod:`medtl.evaluation.quantile`). ``lac`` takes one minus the answer's probability: sets are small, and empty where no
answer fits (Sadinle, Lei and Wasserman, JASA 114, 2019). ``aps`` takes the sum of the probabilities above the answer's:
sets grow where the model is unsure and are never empty (Romano, Sesia and Candès, NeurIPS 2020, whose random part would
answer one study in two ways; with the answer's own probability in the sum, few classes would leave all sets full).

With ``per_class`` each class has a threshold of its own, so that what is promised is promised to the diseased too, and
not only to the many who are healthy (Vovk, ACML 2012, Mondrian prediction). With too few patients of a class that class
always stays open: the model then abstains rather than guesses.

The promise: an image drawn at random from a new patient of the same population has its truth in the set with at least
the wanted chance. Not all images of a patient at once; that share is measured beside it. The same validation part chose
the epoch and the calibrator, so that the promise is checked on the test part.

MAPIE 1.6 gives the same ``lac`` sets where each patient has one image and one threshold serves all classes, and its
``aps`` draws at random. It is not used: it knows no patients, no thresholds by class and no labels that may be unknown,
and it keeps an estimator where a row of numbers is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medtl.config import AbstentionConfig, UncertaintyConfig
from medtl.evaluation.quantile import patient_quantile
from medtl.evaluation.questions import share
from medtl.records import AbstentionFindings, ConformalRule, FloatArray, IntArray, Predictions, Score, Task

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
_ROUNDING = 1e-9  # of a sum of probabilities


def fit(val: Predictions, task: Task, classes: Sequence[str], config: AbstentionConfig) -> ConformalRule:
    """Set the thresholds on validation.

    Args:
        val: with the probabilities that will be shown: calibrated, where there is a calibrator.
    """
    people = np.asarray(val.patients, dtype=np.str_)
    thresholds, counts = [], []
    if config.method != "none":
        for chances, truth in zip(_answers(task, val.probabilities), _answers(task, val.targets), strict=True):
            known = np.isfinite(truth).all(axis=1)
            true = truth[known].argmax(axis=1)
            strange = _strangeness(config.method, chances[known])[np.arange(len(true)), true]
            row, patients = [], []
            for answer in range(chances.shape[1]):
                mine = true == answer if config.per_class else np.ones(len(true), dtype=bool)
                row.append(patient_quantile(strange[mine], people[known][mine].tolist(), config.coverage))
                patients.append(len(np.unique(people[known][mine])))
            thresholds.append(tuple(row))
            counts.append(tuple(patients))
    return ConformalRule(
        task, tuple(classes), config.method, config.coverage, config.per_class, tuple(thresholds), tuple(counts)
    )


def prediction_sets(rule: ConformalRule, probabilities: FloatArray) -> BoolArray:
    """Give the answers that remain open, shape (questions, n, answers).

    A single-label task is one question with the classes as answers, each label of a multi-label task one with the
    answers absent and present. Method ``none`` leaves the most probable answer.
    """
    made = []
    for question, chances in enumerate(_answers(rule.task, probabilities)):
        if rule.method == "none":
            made.append(chances.argmax(axis=1)[:, None] == np.arange(chances.shape[1]))
            continue
        most = [np.inf if limit is None else limit + _ROUNDING for limit in rule.thresholds[question]]
        made.append(_strangeness(rule.method, chances) <= np.array(most))
    return np.array(made)


def answered(sets: BoolArray, decisions: IntArray | None = None) -> BoolArray:
    """Tell which studies have one answer only, shape (n, questions); the others are left to a person.

    Args:
        sets: of :func:`prediction_sets`.
        decisions: (n, questions) number of the answer that the operating point gives; where it is another than the
            only one in the set, the study is not answered either.
    """
    single = sets.sum(axis=2) == 1
    if decisions is not None:
        single &= sets.argmax(axis=2) == np.asarray(decisions).T
    told: BoolArray = single.T
    return told


def _answers(task: Task, rows: FloatArray) -> FloatArray:
    """Give each question's answers, shape (questions, n, answers)."""
    if task != "multilabel":
        return rows[None]
    return np.stack([1 - rows, rows], axis=-1).transpose(1, 0, 2)


def _strangeness(method: str, chances: FloatArray) -> FloatArray:
    """Give how strange each answer is, (n, answers), from 0 to 1."""
    if method == "lac":
        return 1 - chances
    order = np.argsort(-chances, axis=1, kind="stable")
    ranked = np.take_along_axis(chances, order, axis=1)
    above: FloatArray = np.empty(chances.shape)
    np.put_along_axis(above, order, ranked.cumsum(axis=1) - ranked, axis=1)
    return above


def examine(test: Predictions, rule: ConformalRule, config: UncertaintyConfig, seed: int) -> AbstentionFindings:
    """Measure on the test part what the sets hold: coverage, answers given and how many of them are right, size.

    Of single-label tasks all studies together (label *all*) and those of each class; of a multi-label task each label
    over the studies where it is known, and those with and without it. Coverage gives each patient one vote, as the
    promise does; the other shares count studies.
    """
    sets, truths = prediction_sets(rule, test.probabilities), _answers(rule.task, test.targets)
    single_label = rule.task != "multilabel"
    found: list[dict[str, Score]] = []
    for held, truth, name in zip(sets, truths, ("all",) if single_label else rule.classes, strict=True):
        known = np.isfinite(truth).all(axis=1)
        true = np.where(known, truth.argmax(axis=1), -1)
        options = rule.classes if single_label else (f"{name} absent", f"{name} present")
        found.append(_measured(test, held, true, known, name, config, seed))
        found += [
            _measured(test, held, true, true == answer, option, config, seed) for answer, option in enumerate(options)
        ]
    coverage = tuple(scores["coverage"] for scores in found)
    return AbstentionFindings(
        rule,
        coverage,
        answered=tuple(scores["answered"] for scores in found),
        right=tuple(scores["right where answered"] for scores in found),
        set_size=tuple(scores["set size"] for scores in found),
        patients_covered=tuple(scores["patients covered"] for scores in found),
        notes=_notes(rule, coverage),
    )


def table(findings: AbstentionFindings) -> list[tuple[str, Score, Score, Score, Score, Score]]:
    """Give one row for each group: its label, coverage, answered, right where answered, set size, patients covered."""
    columns = (findings.coverage, findings.answered, findings.right, findings.set_size, findings.patients_covered)
    return [(scores[0].label, *scores) for scores in zip(*columns, strict=True)]


def _measured(
    test: Predictions,
    held: BoolArray,
    true: IntArray,
    among: BoolArray,
    label: str,
    config: UncertaintyConfig,
    seed: int,
) -> dict[str, Score]:
    """Measure the sets of some studies; ``held`` is (n, answers), ``true`` the number of the answer."""
    rows = np.flatnonzero(among)
    covered = held[rows, true[rows]].astype(np.float64)
    sizes = held[rows].sum(axis=1)
    ids, people = [test.study_ids[row] for row in rows], [test.patients[row] for row in rows]

    def of(metric: str, values: FloatArray, some: BoolArray) -> Score:
        kept = np.flatnonzero(some)
        return share(metric, label, values[kept], [ids[k] for k in kept], [people[k] for k in kept], config, seed)

    names, first, member = np.unique(np.asarray(people, dtype=np.str_), return_index=True, return_inverse=True)
    firsts = [min(ids[k] for k in np.flatnonzero(member == number)) for number in range(len(first))]
    votes = np.bincount(member, covered, len(names)) / np.maximum(1, np.bincount(member, minlength=len(names)))
    by_patient = [
        replace(share(metric, label, values, firsts, names.tolist(), config, seed), n=len(rows))
        for metric, values in (("coverage", votes), ("patients covered", (votes == 1).astype(np.float64)))
    ]
    scores = {score.metric: score for score in by_patient}
    scores["answered"] = of("answered", (sizes == 1).astype(np.float64), sizes >= 0)
    scores["right where answered"] = of("right where answered", covered, sizes == 1)
    scores["set size"] = _times(of("set size", sizes / held.shape[1], sizes >= 0), held.shape[1])
    return scores


def _times(score: Score, factor: int) -> Score:
    value, low, high = (None if x is None else x * factor for x in (score.value, score.low, score.high))
    return replace(score, value=value, low=low, high=high)


def _notes(rule: ConformalRule, coverage: Sequence[Score]) -> tuple[str, ...]:
    notes = []
    if rule.method == "none":
        notes.append("The model always answers (evaluation.abstention.method: none): nothing is promised.")
    always = sum(limit is None for row in rule.thresholds for limit in row)
    if always:
        need = math.ceil(rule.coverage / (1 - rule.coverage) - _ROUNDING)
        notes.append(
            f"{always} answers always stay open: a coverage of {rule.coverage:g} wants {need} patients of each in "
            "validation. More of them there make the model answer more often."
        )
    short = [s.label for s in coverage if rule.method != "none" and s.high is not None and s.high < rule.coverage]
    if not rule.per_class:  # promised of each question as a whole
        short = [label for label in short if label in (rule.classes if rule.task == "multilabel" else ("all",))]
    if short:
        notes.append(
            f"The coverage of {', '.join(short)} lies below the promised {rule.coverage:g}: the test part is not like "
            "validation, or validation was used up by choices made on it."
        )
    return tuple(notes)
