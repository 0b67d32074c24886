"""Two models on the same patients: the difference, paired, and what may be said of it.

The interval of the difference comes from the same drawn patients for both; the tests beside it draw nobody. A verdict
follows from the interval alone, so that page, gate and test cannot contradict each other by chance of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import Counts
from medtl.evaluation.delong import area, contrast
from medtl.evaluation.metrics import METRICS
from medtl.evaluation.questions import Question, answers, closed_forms, known_only
from medtl.evaluation.uncertainty import Estimate, difference_of, mean_of, score_of
from medtl.records import Comparison, FloatArray, IntArray, PairedTest, Predictions, Score, Verdict


def compare(
    model: Predictions,
    reference: Predictions,
    names: tuple[str, str],
    config: UncertaintyConfig,
    seed: int,
    metric: str = "auroc",
    margin: float | None = None,
    decisions: tuple[FloatArray, FloatArray] | None = None,
) -> Comparison:
    """Give the difference of a metric's mean over classes, by one bootstrap of the patients both models saw.

    Args:
        names: of the model and of the reference.
        metric: a row of :data:`medtl.evaluation.metrics.METRICS`.
        margin: by how much the model may be worse and still be non-inferior.
        decisions: (n, classes) of 0 and 1 of both models, each at its own operating point; a metric that rests on
            decisions needs them, and so does the test of decisions.

    Raises:
        ValueError: the two did not predict the same studies in the same order, or decisions are missing.
    """
    same = model.study_ids == reference.study_ids and model.patients == reference.patients
    if not same or not np.array_equal(model.targets, reference.targets, equal_nan=True):
        raise ValueError("the two models must have predicted the same studies in the same order")
    if METRICS[metric].needs == "decisions" and decisions is None:
        raise ValueError(f"{metric} rests on decisions: give those of both models")
    found = _means((model, reference), metric, decisions, config, seed)
    known = np.flatnonzero(np.isfinite(model.targets).any(axis=1))
    patients = [model.patients[row] for row in known]
    difference = score_of(f"{metric} difference", "macro", difference_of(*found, config.level), config.level, patients)
    tests = [_ranking_test(model, reference)]
    if decisions is not None:
        tests.append(_decision_test(model, decisions))
    return Comparison(
        metric,
        *names,
        difference,
        score_of(metric, "macro", found[1], config.level, patients),
        tuple(tests),
        margin,
        judge(difference, margin, METRICS[metric].higher_is_better),
    )


def judge(difference: Score, margin: float | None = None, higher_is_better: bool | None = True) -> Verdict | None:
    """Say what an interval of a difference shows; ``None`` where there is none, or no better and worse.

    Superior: all of it is better. Non-inferior: none of it is worse by the margin or more. Inferior: all of it is worse
    (with a margin: by more than the margin). Source: Piaggio et al., JAMA 308 (2012), figure 1.
    """
    if difference.low is None or difference.high is None or higher_is_better is None:
        return None
    low, high = difference.low, difference.high
    if not higher_is_better:
        low, high = -high, -low
    if low > 0:
        return "superior"
    if margin is not None and low > -margin:
        return "non-inferior"
    return "inferior" if high < -(margin or 0.0) else "inconclusive"


def change(before: Score, after: Score) -> Score:
    """Give how much a metric changed between two sets of other patients, as from the test part to another hospital.

    The limits are recovered from the two intervals, which nobody shares.
    Source: Zou and Donner, Statistics in Medicine 27 (2008).
    """
    metric, counts = f"{after.metric} difference", (after.n, after.patients)
    if before.value is None or after.value is None:
        note = (before if before.value is None else after).note
        return Score(metric, after.label, None, None, None, *counts, note or "not estimable")
    value = after.value - before.value
    if before.low is None or before.high is None or after.low is None or after.high is None:
        note = (before if before.low is None else after).note
        return Score(metric, after.label, value, None, None, *counts, note or "interval not estimable")
    down = math.hypot(after.value - after.low, before.high - before.value)
    up = math.hypot(after.high - after.value, before.value - before.low)
    return Score(metric, after.label, value, value - down, value + up, *counts)


def swap_test(one: FloatArray, other: FloatArray, patient: IntArray) -> tuple[float, float]:
    """Test whether two models are right equally often, exactly; a patient's studies are swapped together.

    If the two are alike, a patient's studies that only one model has right could as well be the other's. All ways to
    swap them are counted, not drawn. With one study of each patient this is McNemar's exact test; with several,
    McNemar's would take alike images for so many witnesses, and its p value would be too small.
    Source: McNemar, Psychometrika 12 (1947); Pitman 1937, for swapping; Good, Permutation Tests (2000).

    Args:
        one: (n,) 1 where the model is right.
        other: (n,) 1 where the reference is right.
        patient: (n,) numbers from 0.

    Returns:
        Studies that only the model has right less those that only the reference has, and the two-sided p value.
    """
    ahead = np.rint(np.bincount(patient, one - other)).astype(int)
    reach, observed = int(np.abs(ahead).sum()), abs(int(ahead.sum()))
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for step in np.abs(ahead[ahead != 0]):
        moved = np.zeros_like(chance)
        moved[step:] += chance[:-step] / 2
        moved[:-step] += chance[step:] / 2
        chance = moved
    far = np.abs(np.arange(-reach, reach + 1)) >= observed
    return float(ahead.sum()), min(1.0, float(chance[far].sum()))


def corrected(
    p_values: Sequence[float | None], method: Literal["holm", "benjamini-hochberg"] = "holm"
) -> tuple[float | None, ...]:
    """Correct p values for how many there are; an unknown one stays unknown and does not count.

    ``holm`` keeps the chance of any false finding, ``benjamini-hochberg`` the share of false ones among the findings.
    Source: Holm, Scandinavian Journal of Statistics 6 (1979); Benjamini and Hochberg, Journal of the Royal Statistical
    Society B 57 (1995).
    """
    known = [(p, place) for place, p in enumerate(p_values) if p is not None]
    order = [place for _, place in sorted(known)]
    values = np.array(sorted(p for p, _ in known))
    count, rank = len(values), np.arange(1, len(values) + 1)
    if method == "holm":
        adjusted = np.maximum.accumulate(values * (count + 1 - rank))
    else:
        adjusted = np.minimum.accumulate((values * count / rank)[::-1])[::-1]
    by_place = dict(zip(order, np.minimum(1.0, adjusted).tolist(), strict=True))
    return tuple(by_place.get(place) for place in range(len(p_values)))


def _ranking_test(model: Predictions, reference: Predictions) -> PairedTest:
    """Test the difference of the mean AUROC over classes by DeLong's variance over patients."""
    numbers = _numbers(model.patients)
    name = "DeLong, paired" if len(set(model.patients)) == len(model.patients) else "DeLong, paired, over patients"
    ones, others = (
        [area(one.targets[:, index], one.probabilities[:, index], numbers) for index in _asked(model)]
        for one in (model, reference)
    )
    found = contrast(ones, others)
    if not math.isfinite(found.p_value):
        reason = "not estimable: fewer than two patients of a kind, or no patient moves the difference"
        return PairedTest(name, None, None, reason)
    return PairedTest(name, found.z, found.p_value)


def _decision_test(model: Predictions, decisions: tuple[FloatArray, FloatArray]) -> PairedTest:
    """Test whether the decisions on whole studies are right equally often."""
    several = len(set(model.patients)) < len(model.patients)
    name = "McNemar, exact, patients swapped whole" if several else "McNemar, exact"
    complete = np.isfinite(model.targets).all(axis=1)
    if not complete.any():
        return PairedTest(name, None, None, "not estimable: no study whose targets are all known")
    right = [(called == model.targets)[complete].all(axis=1).astype(np.float64) for called in decisions]
    return PairedTest(name, *swap_test(right[0], right[1], _numbers(model.patients)[complete]))


def _numbers(patients: Sequence[str]) -> IntArray:
    numbers: IntArray = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)[1]
    return numbers


def _asked(predictions: Predictions) -> list[int]:
    """Give the classes to ask about: of one yes or no the yes, whose mirror image the no is."""
    targets = predictions.targets
    mirrored = targets.shape[1] == 2 and np.allclose(targets.sum(axis=1), 1)
    return [1] if mirrored else list(range(targets.shape[1]))


def _means(
    both: tuple[Predictions, Predictions],
    metric: str,
    decisions: tuple[FloatArray, FloatArray] | None,
    config: UncertaintyConfig,
    seed: int,
) -> tuple[Estimate, Estimate]:
    """Measure both models on the same resamples, and without the same patients."""
    ids, people, row, classes = both[0].study_ids, both[0].patients, METRICS[metric], _asked(both[0])
    used = decisions if row.needs == "decisions" and decisions is not None else [p.probabilities for p in both]
    questions = [_question(both[0], metric, scores, index, config.level) for scores in used for index in classes]
    found = answers(questions, ids, people, config, seed)
    names = [f"class {number} of {len(classes)}" for number in range(1, len(classes) + 1)]
    return mean_of(found[: len(classes)], names), mean_of(found[len(classes) :], names)


def _question(predictions: Predictions, metric: str, scores: FloatArray, index: int, level: float) -> Question:
    """Ask for one metric of one class by one model's probabilities or decisions, whichever it rests on."""
    row, known = METRICS[metric], np.isfinite(predictions.targets[:, index])
    truth, score = predictions.targets[known, index], scores[known, index]
    people = [patient for patient, is_known in zip(predictions.patients, known, strict=True) if is_known]
    counts = Counts.of(people, truth, score if row.needs == "decisions" else truth)
    limits = closed_forms(truth, score, score, people, level).get(metric)
    of = known_only(partial(row.function, truth, score), known)
    return Question(of, counts.basis(row.rests_on, level), row.scale, limits)
