"""For whom the model works less well.

Each group has the metrics of the whole with an interval over its own patients. Groups too small to be judged, or so
small that somebody could be recognised, show no figures; nor do further ones from which these could be computed by
subtraction from the whole (Hundepool et al., Statistical Disclosure Control, 2012: secondary suppression). Patients of
whom a value is unknown are not singled out by it: for the sake of a few of them no other group is hidden.

The largest of many differences is large by chance alone. All differences between groups are therefore judged together:
the resamples say how large the largest standardised one becomes where none is real, and an interval that wide holds for
all of them at once (max-t: Westfall and Young 1993; Romano and Wolf, Econometrica 73, 2005). Unknown values are a group
of their own, shown and not compared. The calibration error is shown and not compared: it grows where a group is small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from scipy.linalg import null_space
from scipy.special import ndtri

from medtl.config import EvaluationConfig, SubgroupsConfig
from medtl.evaluation.bounds import Counts
from medtl.evaluation.metrics import METRICS, calibration_error
from medtl.evaluation.questions import Question, answers, closed_forms
from medtl.evaluation.uncertainty import MOST_MISSING, drawn, score_of
from medtl.records import (
    FloatArray,
    Gap,
    IntArray,
    OperatingPoint,
    Predictions,
    Score,
    Study,
    Subgroup,
    SubgroupFindings,
    Task,
)

UNKNOWN = "unknown"
SHOWN = ("auroc", "sensitivity", "specificity", "calibration_error")
COMPARED = ("auroc", "sensitivity", "specificity")
_NAMES = {"auroc": "AUROC", "sensitivity": "sensitivity", "specificity": "specificity"}
_ZERO = 1e-9
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def columns_of(
    studies: Sequence[Study], age_edges: Sequence[float], attributes: Sequence[str] = ()
) -> dict[str, list[str | None]]:
    """Give sex, age band, site, scanner and the named attributes of studies, None where unknown."""
    columns = {
        "sex": [study.sex for study in studies],
        "age": [None if study.age_years is None else age_band(study.age_years, age_edges) for study in studies],
        "site": [study.site for study in studies],
        "scanner": [study.scanner for study in studies],
    }
    for name in attributes:  # the scanner of the headers stays beside that of the table
        columns[f"{name} (label table)" if name in columns else name] = [s.attributes.get(name) for s in studies]
    return columns


def age_band(years: float, edges: Sequence[float]) -> str:
    """Name the band of an age; a band begins at its edge."""
    place = int(np.searchsorted(edges, years, side="right"))
    if not edges:
        return "all ages"
    if place == 0:
        return f"under {edges[0]:g}"
    return f"{edges[-1]:g} and over" if place == len(edges) else f"{edges[place - 1]:g} to under {edges[place]:g}"


@dataclass(frozen=True, slots=True)
class _Cell:
    """One group and one class: where it lies in the test part, and whether it may be shown."""

    column: str
    value: str
    index: int  # of the class
    rows: IntArray  # studies whose target is known
    counts: Counts
    shown: bool  # its size
    judged: bool  # its outcomes too


def examine(
    test: Predictions,
    points: Sequence[OperatingPoint],
    task: Task,
    classes: Sequence[str],
    columns: Mapping[str, Sequence[str | None]],
    config: EvaluationConfig,
    seed: int,
) -> SubgroupFindings:
    """Measure every group of every column, and the largest difference between groups of a column.

    Args:
        points: operating point of each reported class, in their order: of a binary task the last class, else all.
        columns: name to one value for each study of the test part; None where unknown.
    """
    reported = [len(classes) - 1] if task == "binary" else list(range(len(classes)))
    thresholds = {index: point.threshold for index, point in zip(reported, points, strict=True)}
    cells: list[_Cell] = []
    notes = []
    for column, values in columns.items():
        if len({value for value in values if value is not None}) == 0:
            notes.append(f"{column} is not known of any study of the test part.")
            continue
        cells += _cells(test, column, values, reported, task == "multiclass", config.subgroups)
    scores = [_scores(test, cell, classes[cell.index], thresholds[cell.index], config, seed) for cell in cells]
    groups = [_group(test, cell, classes[cell.index], found) for cell, found in zip(cells, scores, strict=True)]
    gaps, looked_at = _gaps(test, cells, scores, classes, thresholds, config, seed)
    hidden = len({(cell.column, cell.value) for cell in cells if not cell.judged})
    if hidden:
        notes.append(
            f"{hidden} groups show no figures: fewer than {config.subgroups.fewest_patients} patients, fewer than "
            f"{config.subgroups.fewest_of_an_outcome} with or without the finding, or such a group could be computed."
        )
    return SubgroupFindings(tuple(groups), tuple(gaps), looked_at, config.uncertainty.level, tuple(notes))


def table(findings: SubgroupFindings) -> list[tuple[Subgroup, tuple[Score | None, ...]]]:
    """Give one row for each group: the group, then its metrics in the order of ``SHOWN``, None where not shown."""
    rows = []
    for group in findings.groups:
        by_name = {score.metric: score for score in group.scores}
        rows.append((group, tuple(by_name.get(metric) for metric in SHOWN)))
    return rows


def _cells(
    test: Predictions,
    column: str,
    values: Sequence[str | None],
    reported: Sequence[int],
    exhaustive: bool,
    config: SubgroupsConfig,
) -> list[_Cell]:
    named = np.array([UNKNOWN if value is None else value for value in values], dtype=np.str_)
    order = sorted(set(named.tolist()) - {UNKNOWN}) + [UNKNOWN] * bool((named == UNKNOWN).any())
    rows, counts = [], []
    for value in order:
        for index in reported:
            mine = np.flatnonzero((named == value) & np.isfinite(test.targets[:, index]))
            truth = test.targets[mine, index]
            rows.append(mine)
            counts.append(Counts.of([test.patients[row] for row in mine], truth, truth))
    shape = len(order), len(reported)
    people, ill, well = (
        np.array([getattr(count, name) for count in counts]).reshape(shape) for name in ("all", "diseased", "healthy")
    )
    guarded = np.array([value != UNKNOWN for value in order])
    unseen = np.stack([hidden_sizes(sizes, guarded, config.fewest_patients) for sizes in people.T], axis=1)
    unjudged = hidden_outcomes(ill, well, unseen, guarded, exhaustive, config.fewest_of_an_outcome)
    return [
        _Cell(
            column, value, index, rows[k], counts[k], not unseen[divmod(k, shape[1])], not unjudged[divmod(k, shape[1])]
        )
        for k, (value, index) in enumerate((value, index) for value in order for index in reported)
    ]


def hidden_sizes(patients: IntArray, guarded: BoolArray, fewest: int) -> BoolArray:
    """Choose the groups whose size is not shown: too small ones, and more until no such size can be computed.

    Args:
        patients: (groups,) whose sum is known to everybody.
        guarded: groups for whose sake others are hidden.
    """
    hidden: BoolArray = patients < fewest
    while (hidden & guarded).any() and not hidden.all() and (hidden.sum() < 2 or patients[hidden].sum() < fewest):
        visible = np.flatnonzero(~hidden)
        hidden[visible[patients[visible].argmin()]] = True
    return hidden


def hidden_outcomes(
    ill: IntArray, well: IntArray, unseen: BoolArray, guarded: BoolArray, exhaustive: bool, fewest: int
) -> BoolArray:
    """Choose the cells whose outcomes are not shown, so that none of them can be computed from what is.

    Args:
        ill: (groups, classes) patients with the finding; each class's sum is known to everybody.
        well: without it.
        unseen: (groups, classes) whose size is not shown.
        guarded: (groups,) for whose sake others are hidden.
        exhaustive: a group's patients each have one of the classes, so that the classes' sum is known too.
    """
    hidden: BoolArray = unseen | (np.minimum(ill, well) < fewest)
    there = ill.sum(axis=0) > 0  # of a class that nobody has there is nothing to hide
    while not hidden.all():
        secret = hidden & there
        bare = np.argwhere(secret & guarded[:, None] & _computable(secret, unseen, exhaustive)).tolist()
        further = {cell for g, c in bare for cell in _beside(hidden, unseen, g, c, exhaustive)}
        for c in np.flatnonzero((secret & guarded[:, None]).any(axis=0)):
            mine = secret[:, c]
            if min(ill[mine, c].sum(), well[mine, c].sum()) < fewest:
                further |= {(int(g), int(c)) for g in np.flatnonzero(~hidden[:, c])}
        if not further:
            return hidden
        hidden[min(further, key=lambda cell: (min(ill[cell], well[cell]), cell))] = True
    return hidden


def _beside(hidden: BoolArray, unseen: BoolArray, group: int, label: int, exhaustive: bool) -> list[tuple[int, int]]:
    """Name the visible cells of the same class, or, where the classes' sum is known, of the same group."""
    same_class = [(int(g), label) for g in np.flatnonzero(~hidden[:, label])]
    if not exhaustive or unseen[group].any():
        return same_class
    return same_class + [(group, int(c)) for c in np.flatnonzero(~hidden[group])]


def _computable(hidden: BoolArray, unseen: BoolArray, exhaustive: bool) -> BoolArray:
    """Tell which hidden cells the known sums determine: those that no other solution of the sums changes."""
    found = np.zeros(hidden.shape, dtype=bool)
    if not hidden.any():
        return found
    places = np.argwhere(hidden)
    sums = [places[:, 1] == c for c in range(hidden.shape[1])]
    if exhaustive:
        sums += [places[:, 0] == g for g in range(len(hidden)) if not unseen[g].any()]
    free = null_space(np.array([line for line in sums if line.any()], dtype=np.float64))
    found[hidden] = np.abs(free).max(axis=1, initial=0.0) < _ZERO
    return found


def _questions(test: Predictions, cell: _Cell, threshold: float, config: EvaluationConfig) -> dict[str, Question]:
    """Give each metric's question to weights of the cell's own studies."""
    truth, score = test.targets[cell.rows, cell.index], test.probabilities[cell.rows, cell.index]
    called = (score >= threshold).astype(np.float64)
    people, level = [test.patients[row] for row in cell.rows], config.uncertainty.level
    closed = closed_forms(truth, score, called, people, level)
    questions = {}
    for metric in SHOWN:
        row = METRICS[metric]
        of = partial(row.function, truth, called if row.needs == "decisions" else score)
        if metric == "calibration_error":
            of = partial(calibration_error, truth, score, bins=config.calibration_bins)
        questions[metric] = Question(of, cell.counts.basis(row.rests_on, level), row.scale, closed.get(metric))
    return questions


def _scores(
    test: Predictions, cell: _Cell, label: str, threshold: float, config: EvaluationConfig, seed: int
) -> tuple[Score, ...]:
    if not cell.judged:
        return ()
    ids, people = [test.study_ids[row] for row in cell.rows], [test.patients[row] for row in cell.rows]
    questions = _questions(test, cell, threshold, config)
    found = answers(list(questions.values()), ids, people, config.uncertainty, seed)
    return tuple(
        score_of(metric, label, one, config.uncertainty.level, people)
        for metric, one in zip(questions, found, strict=True)
    )


def _group(test: Predictions, cell: _Cell, label: str, scores: tuple[Score, ...]) -> Subgroup:
    if not cell.shown:
        return Subgroup(cell.column, cell.value, label, None, None, None, (), "too few")
    n, patients = len(cell.rows), cell.counts.all
    if not cell.judged:
        note = "too few with or without the finding"
        return Subgroup(cell.column, cell.value, label, n, patients, None, (), note)
    prevalence = float(test.targets[cell.rows, cell.index].mean())
    return Subgroup(cell.column, cell.value, label, n, patients, prevalence, scores)


@dataclass(frozen=True, slots=True)
class _Side:
    """One metric of one group, as the resamples of the whole test part give it."""

    value: str
    score: Score
    draws: FloatArray
    error: float  # no smaller than what the interval of the group says


@dataclass(frozen=True, slots=True)
class _Difference:
    family: tuple[str, str, str]  # column, class, metric
    best: _Side
    worst: _Side
    size: float
    error: float
    draws: FloatArray  # around 0, in units of their own spread; 0 where missing


def _gaps(
    test: Predictions,
    cells: Sequence[_Cell],
    scores: Sequence[tuple[Score, ...]],
    classes: Sequence[str],
    thresholds: Mapping[int, float],
    config: EvaluationConfig,
    seed: int,
) -> tuple[list[Gap], int]:
    """Compare the groups of each column, and give the largest difference of each metric."""
    families = _sides(test, cells, scores, classes, thresholds, config, seed)
    largest = np.zeros(config.uncertainty.resamples)
    widest: list[_Difference] = []
    count = 0
    for family, sides in families.items():
        found = [_difference(family, one, other) for one, other in combinations(sides, 2)]
        for difference in found:
            np.maximum(largest, np.abs(difference.draws), out=largest)
        widest += [max(found, key=lambda difference: difference.size)] if found else []
        count += len(found)
    return [_gap(difference, largest, count, config.uncertainty.level) for difference in widest], count


def _sides(
    test: Predictions,
    cells: Sequence[_Cell],
    scores: Sequence[tuple[Score, ...]],
    classes: Sequence[str],
    thresholds: Mapping[int, float],
    config: EvaluationConfig,
    seed: int,
) -> dict[tuple[str, str, str], list[_Side]]:
    """Ask what is compared of the resamples of the whole, so that patients in two groups count in both."""
    chosen = [
        (cell, score, _questions(test, cell, thresholds[cell.index], config)[score.metric].of)
        for cell, found in zip(cells, scores, strict=True)
        for score in found
        if cell.value != UNKNOWN and score.metric in COMPARED and score.low is not None
    ]
    level = config.uncertainty.level
    parts = [
        [of(weights[:, cell.rows]) for cell, _, of in chosen]
        for weights in drawn(test.study_ids, test.patients, config.uncertainty.resamples, seed)
    ]
    families: dict[tuple[str, str, str], list[_Side]] = {}
    for number, (cell, score, _) in enumerate(chosen):
        draws = np.concatenate([part[number] for part in parts])
        if np.isnan(draws).mean() > MOST_MISSING or score.low is None or score.high is None:
            continue
        error = max(float(np.nanstd(draws)), (score.high - score.low) / 2 / float(ndtri((1 + level) / 2)))
        side = _Side(cell.value, score, draws, error)
        families.setdefault((cell.column, classes[cell.index], score.metric), []).append(side)
    return families


def _difference(family: tuple[str, str, str], one: _Side, other: _Side) -> _Difference:
    best, worst = (one, other) if (one.score.value or 0) >= (other.score.value or 0) else (other, one)
    draws = best.draws - worst.draws
    known = np.isfinite(draws)
    spread = float(draws[known].std()) if known.any() else 0.0
    # what the two share by having patients in common, as far as the draws show it
    shared = float(np.cov(best.draws[known], worst.draws[known])[0, 1]) if known.sum() > 1 else 0.0
    error = max(spread, math.sqrt(max(0.0, best.error**2 + worst.error**2 - 2 * max(0.0, shared))))
    around = np.where(known, draws - draws[known].mean(), 0.0) / spread if spread > _ZERO else np.zeros(len(draws))
    return _Difference(family, best, worst, (best.score.value or 0) - (worst.score.value or 0), error, around)


def _gap(found: _Difference, largest: FloatArray, count: int, level: float) -> Gap:
    column, label, metric = found.family
    critical = max(float(np.quantile(largest, level)), float(ndtri((1 + level) / 2)))
    low, high = max(-1.0, found.size - critical * found.error), min(1.0, found.size + critical * found.error)
    standardised = found.size / found.error if found.error > _ZERO else 0.0
    p = (1 + int((largest >= standardised).sum())) / (1 + len(largest))
    sides = found.best.score, found.worst.score
    score = Score(
        f"{metric} difference", label, found.size, low, high, sum(s.n for s in sides), sum(s.patients for s in sides)
    )
    verdict = "more than chance" if low > 0 else "may be chance"
    interval = f"{100 * level:g} % interval {low:.3f} to {high:.3f}, for all {count} differences looked at together"
    statement = (
        f"{label}: the {_NAMES[metric]} is {found.size:.3f} lower for {column} {found.worst.value} than for "
        f"{found.best.value} ({interval}): {verdict}."
    )
    return Gap(column, label, metric, found.best.value, found.worst.value, score, p, statement)
