"""Metrics, as a table of plain functions of arrays.

Every metric takes ``truth`` (n,) of 0 and 1, ``score`` (n,) and ``weight`` (b, n): how often each study counts in each
of b resamples. It gives (b,) values, NaN where the resample does not let it be estimated. One call so measures a whole
bootstrap; the point estimate is the same function with one row of ones. ``score`` is a probability, or, for metrics
that need decisions, 0 or 1. A score that is not a number leaves a metric unknown, and so does nobody to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from medtl.evaluation.bounds import LINE, RATIO, SHARE, SIGNED, RestsOn, Scale
from medtl.records import FloatArray, IntArray

Metric = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
BoolArray = npt.NDArray[np.bool_]
_CHUNK = 100_000  # values held at once by the ranking metrics: 0.8 MB, what a core's own cache holds
SUREST = 1e-7  # a probability nearer to 0 or 1 is taken for this: what single precision still tells from them
_STEPS = 100  # of Newton, at most; a handful is usual
_SETTLED = 1e-5  # log odds; Newton squares the error, so that a step this small is the last one
_LARGEST = 700.0  # log odds whose exponential is still a number


@dataclass(frozen=True, slots=True)
class Row:
    """How one metric is computed and what it needs."""

    function: Metric
    needs: Literal["scores", "decisions"]
    rests_on: RestsOn  # whose outcomes alone can move it; few of them leave much open
    higher_is_better: bool | None  # None: neither; a slope should be 1, an intercept 0
    source: str
    scale: Scale = SHARE
    unknown: str = ""  # why it may have no value although both kinds are there


def auroc(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the area under the ROC curve; ties count one half.

    The healthy are sorted once for all resamples; a diseased study wins against the weight below it, and half of the
    weight it ties with. Source: Mann and Whitney 1947; Hanley and McNeil, Radiology 143 (1982).
    """
    if np.isnan(score).any():
        return np.full(len(weight), np.nan)
    positive, negative = np.flatnonzero(truth > 0.5), np.flatnonzero(truth <= 0.5)
    negative = negative[np.argsort(score[negative], kind="stable")]
    below = np.searchsorted(score[negative], score[positive], side="left")
    not_above = np.searchsorted(score[negative], score[positive], side="right")

    def of(rows: FloatArray) -> FloatArray:
        passed, ups = _cumulative(rows, negative), rows.take(positive, axis=1)
        wins = passed.take(below, axis=1)
        wins += passed.take(not_above, axis=1)
        return _ratio(0.5 * np.einsum("ij,ij->i", ups, wins), ups.sum(1) * passed[:, -1])

    return _in_chunks(of, weight)


def average_precision(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the mean of precision over recall steps, without interpolation. Source: scikit-learn's definition."""
    if np.isnan(score).any():
        return np.full(len(weight), np.nan)
    positive, negative = np.flatnonzero(truth > 0.5), np.flatnonzero(truth <= 0.5)
    positive = positive[np.argsort(-score[positive], kind="stable")]
    negative = negative[np.argsort(-score[negative], kind="stable")]
    right = np.searchsorted(-score[positive], -score[positive], side="right")
    wrong = np.searchsorted(-score[negative], -score[positive], side="right")

    def of(rows: FloatArray) -> FloatArray:
        hits, misses = _cumulative(rows, positive), _cumulative(rows, negative)
        hit = hits.take(right, axis=1)
        called = hit + misses.take(wrong, axis=1)
        precision = np.divide(hit, called, out=np.zeros_like(hit), where=called > 0)
        return _ratio(np.einsum("ij,ij->i", rows.take(positive, axis=1), precision), hits[:, -1])

    return _in_chunks(of, weight)


def sensitivity(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the share of the diseased that are called diseased."""
    return _ratio(weight @ (truth * score), weight @ truth)


def specificity(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the share of the healthy that are called healthy."""
    return _ratio(weight @ ((1 - truth) * (1 - score)), weight @ (1 - truth))


def balanced_accuracy(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the mean of sensitivity and specificity. Source: Brodersen et al., ICPR 2010."""
    return (sensitivity(truth, score, weight) + specificity(truth, score, weight)) / 2


def ppv(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the share of the called that are diseased, at the test part's prevalence."""
    return _ratio(weight @ (truth * score), weight @ score)


def npv(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the share of the not called that are healthy, at the test part's prevalence."""
    return _ratio(weight @ ((1 - truth) * (1 - score)), weight @ (1 - score))


def f1(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the harmonic mean of sensitivity and PPV."""
    return _ratio(2 * (weight @ (truth * score)), weight @ truth + weight @ score)


def mcc(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give Matthews' correlation of truth and decision, -1 to 1. Source: Matthews 1975; Chicco and Jurman 2020."""
    hit, missed, alarm, spared = _table(truth, score, weight)
    margins = (hit + missed) * (alarm + spared) * (hit + alarm) * (missed + spared)
    return _ratio(hit * spared - missed * alarm, np.sqrt(margins))


def kappa(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the agreement of truth and decision beyond chance, at most 1. Source: Cohen 1960."""
    hit, missed, alarm, spared = _table(truth, score, weight)
    chance = (hit + missed) * (missed + spared) + (hit + alarm) * (alarm + spared)
    return _ratio(2 * (hit * spared - missed * alarm), chance)


def positive_likelihood_ratio(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give by how much being called raises the odds of disease; unknown where nobody healthy is called.

    Sensitivity over one minus specificity. Source: Deeks and Altman, BMJ 329 (2004).
    """
    hit, missed, alarm, spared = _table(truth, score, weight)
    return _ratio(hit * (alarm + spared), alarm * (hit + missed))


def negative_likelihood_ratio(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give by how much not being called changes the odds of disease; unknown where nobody healthy is spared.

    One minus sensitivity over specificity. Source: Deeks and Altman, BMJ 329 (2004).
    """
    hit, missed, alarm, spared = _table(truth, score, weight)
    return _ratio(missed * (alarm + spared), spared * (hit + missed))


def net_benefit(truth: FloatArray, score: FloatArray, weight: FloatArray, odds: float = 1.0) -> FloatArray:
    """Give true calls less false ones, per study, in units of one true call.

    Args:
        odds: how many true calls a false one costs; threshold / (1 - threshold) where the threshold says it.

    Source: Vickers and Elkin, Medical Decision Making 26 (2006).
    """
    hit, _, alarm, _ = _table(truth, score, weight)
    return _ratio(hit - odds * alarm, weight.sum(1))


def prevalence(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the share of the studies that are diseased: what PPV, NPV and net benefit depend on."""
    return _ratio(weight @ truth, weight.sum(1))


def log_loss(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the mean of minus the logarithm of the probability of what was true. Source: Good 1952."""
    surprise = -np.log(np.where(truth > 0.5, _unsure(score), 1 - _unsure(score)))
    return _ratio(weight @ surprise, weight.sum(1))


def calibration_slope(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the slope of a logistic regression of truth on the log odds of the probability: below 1 is overconfident.

    Unknown where a threshold parts the two kinds or there is one probability only: no slope is best then.
    Source: Cox, Biometrika 45 (1958); Steyerberg et al., Epidemiology 21 (2010).
    """
    return _recalibrated(truth, score, weight, slope=True)


def calibration_intercept(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the constant by which all log odds are too low (calibration in the large): below 0 is overestimated.

    The slope is held at 1. Source: Cox, Biometrika 45 (1958); Steyerberg et al., Epidemiology 21 (2010).
    """
    return _recalibrated(truth, score, weight, slope=False)


def brier(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the mean squared difference of probability and truth. Source: Brier 1950."""
    return _ratio(weight @ (score - truth) ** 2, weight.sum(1))


def calibration_error(truth: FloatArray, score: FloatArray, weight: FloatArray, bins: int = 10) -> FloatArray:
    """Give the expected calibration error over bins of equal width. Source: Naeini et al., AAAI 2015."""
    if np.isnan(score).any():
        return np.full(len(weight), np.nan)
    member = np.zeros((len(score), bins))
    member[np.arange(len(score)), np.minimum((score * bins).astype(int), bins - 1)] = 1.0
    gap = np.abs((weight * score) @ member - (weight * truth) @ member)
    return _ratio(gap.sum(1), weight.sum(1))


def agreement_of_classes(truth: IntArray, chosen: IntArray, weight: FloatArray, classes: int) -> FloatArray:
    """Give Cohen's kappa of one decision among several classes. Source: Cohen 1960.

    Args:
        truth: (n,) number of the true class.
        chosen: (n,) number of the chosen class.
    """
    return _kappa(_tables(truth, chosen, weight, classes), 1 - np.eye(classes))


def agreement_of_grades(truth: IntArray, chosen: IntArray, weight: FloatArray, classes: int) -> FloatArray:
    """Give kappa of ordered classes, where a miss by two grades costs four times one by one. Source: Cohen 1968."""
    grade = np.arange(classes)
    return _kappa(_tables(truth, chosen, weight, classes), (grade[:, None] - grade) ** 2.0)


def association_of_classes(truth: IntArray, chosen: IntArray, weight: FloatArray, classes: int) -> FloatArray:
    """Give the correlation of truth and one decision among several classes. Source: Gorodkin 2004."""
    table = _tables(truth, chosen, weight, classes)
    true, called, total = table.sum(2), table.sum(1), table.sum((1, 2))
    together = np.einsum("bii->b", table) * total - (true * called).sum(1)
    margins = (total**2 - (true**2).sum(1)) * (total**2 - (called**2).sum(1))
    return _ratio(together, np.sqrt(margins))


METRICS: Mapping[str, Row] = {
    "auroc": Row(auroc, "scores", "rarer", True, "Hanley and McNeil 1982"),
    "average_precision": Row(average_precision, "scores", "ranking", True, "Zhu 2004; scikit-learn's step-wise sum"),
    "balanced_accuracy": Row(balanced_accuracy, "decisions", "both", True, "Brodersen 2010"),
    "sensitivity": Row(sensitivity, "decisions", "diseased", True, "Altman and Bland 1994"),
    "specificity": Row(specificity, "decisions", "healthy", True, "Altman and Bland 1994"),
    "ppv": Row(ppv, "decisions", "called", True, "Altman and Bland 1994"),
    "npv": Row(npv, "decisions", "cleared", True, "Altman and Bland 1994"),
    "f1": Row(f1, "decisions", "rarer", True, "van Rijsbergen 1979"),
    "mcc": Row(mcc, "decisions", "association", True, "Matthews 1975; Gorodkin 2004", SIGNED, "one decision only"),
    "kappa": Row(kappa, "decisions", "agreement", True, "Cohen 1960", SIGNED),
    "positive_likelihood_ratio": Row(
        positive_likelihood_ratio, "decisions", "both", True, "Deeks and Altman 2004", RATIO, "nobody healthy is called"
    ),
    "negative_likelihood_ratio": Row(
        negative_likelihood_ratio,
        "decisions",
        "both",
        False,
        "Deeks and Altman 2004",
        RATIO,
        "nobody healthy is spared",
    ),
    "net_benefit": Row(net_benefit, "decisions", "all", True, "Vickers and Elkin 2006", LINE, "the threshold is 1"),
    "brier": Row(brier, "scores", "all", False, "Brier 1950"),
    "log_loss": Row(log_loss, "scores", "all", False, "Good 1952", RATIO),
    "calibration_slope": Row(
        calibration_slope, "scores", "rarer", None, "Cox 1958; Steyerberg 2010", LINE, "a threshold parts the two kinds"
    ),
    "calibration_intercept": Row(calibration_intercept, "scores", "rarer", None, "Cox 1958; Steyerberg 2010", LINE),
    "calibration_error": Row(calibration_error, "scores", "all", False, "Naeini 2015"),
    "prevalence": Row(prevalence, "scores", "all", None, "Altman and Bland 1994"),
}


def _table(
    truth: FloatArray, called: FloatArray, weight: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Count the diseased that are called and not, the healthy that are called and not, shape (b,) each."""
    cells = (truth * called, truth * (1 - called), (1 - truth) * called, (1 - truth) * (1 - called))
    hit, missed, alarm, spared = (weight @ cell for cell in cells)
    return hit, missed, alarm, spared


def _tables(truth: IntArray, chosen: IntArray, weight: FloatArray, classes: int) -> FloatArray:
    """Count the studies of each true and chosen class, shape (b, classes, classes)."""
    cell = truth * classes + chosen
    counts = np.array([weight[:, cell == one].sum(1) for one in range(classes * classes)])
    return counts.T.reshape(len(weight), classes, classes)


def _kappa(table: FloatArray, cost: FloatArray) -> FloatArray:
    """Give one minus the cost of a table over what it would be by chance."""
    chance = table.sum(2)[:, :, None] * table.sum(1)[:, None, :]
    expected = (chance * cost).sum((1, 2))
    return _ratio(expected - (table * cost).sum((1, 2)) * table.sum((1, 2)), expected)


def _unsure(score: FloatArray) -> FloatArray:
    return np.clip(score, SUREST, 1 - SUREST)


def _recalibrated(truth: FloatArray, score: FloatArray, weight: FloatArray, slope: bool) -> FloatArray:
    """Give the slope, or with the slope held at 1 the intercept, of the logistic recalibration of each row.

    All rows start from what is best for their sum: a few steps from there, and the first shares its work.
    """
    if np.isnan(score).any() or not weight.size:
        return np.full(len(weight), np.nan)
    odds = np.log(_unsure(score)) - np.log1p(-_unsure(score))
    total = weight.sum(0, keepdims=True)
    known = (_has_a_slope if slope else _has_both)(truth, odds, np.concatenate([weight, total]))
    found = np.full(len(weight), np.nan)
    if known[-1]:
        start = _settled(truth, odds, total, np.array([0.0, 1.0]), slope)[0]
        of = partial(_settled, truth, odds, start=start, slope=slope)
        found[known[:-1]] = _in_chunks(lambda rows: of(rows)[:, int(slope)], weight[known[:-1]])
    return found


def _settled(truth: FloatArray, odds: FloatArray, weight: FloatArray, start: FloatArray, slope: bool) -> FloatArray:
    """Take Newton's steps until they are small, shape (b, 2): intercept and slope; NaN where they never are.

    Each step is damped by how far it moves the log odds, so that none overshoots.
    Source: Sun and Tran-Dinh, Mathematical Programming 178 (2019).
    """
    found, rows, line = np.full((len(weight), 2), np.nan), np.arange(len(weight)), start[None, :]
    ends = np.array([odds.min(), odds.max()])
    for _ in range(_STEPS):
        if not len(rows):
            break
        step = _newton(truth, odds, weight[rows], line, slope)
        reach = np.abs(step[:, :1] + step[:, 1:] * ends).max(1)
        line = line + step * np.divide(np.log1p(reach), reach, out=np.ones_like(reach), where=reach > 0)[:, None]
        settled = reach < _SETTLED
        found[rows[settled]] = line[settled]
        rows, line = rows[~settled], line[~settled]
    return found


def _newton(truth: FloatArray, odds: FloatArray, weight: FloatArray, line: FloatArray, slope: bool) -> FloatArray:
    """Give Newton's step of intercept and slope for each row, shape (b, 2); the slope's is 0 where it is held.

    Args:
        line: (b, 2), or (1, 2) for all rows.
    """
    chance = line[:, 1:] * -odds
    chance -= line[:, :1]
    np.exp(np.minimum(chance, _LARGEST, out=chance), out=chance)
    chance += 1
    np.reciprocal(chance, out=chance)
    moments = np.stack([np.ones(len(odds)), odds, odds**2], 1)
    if len(line) == 1:  # one product for all rows
        lacking, spread = truth - chance[0], chance[0] * (1 - chance[0])
        pull, stiffness = weight @ (lacking[:, None] * moments[:, :2]), weight @ (spread[:, None] * moments)
    else:
        expected = weight * chance
        pull = weight @ (truth[:, None] * moments[:, :2]) - expected @ moments[:, :2]
        expected *= 1 - chance
        stiffness = expected @ moments
    if not slope:
        return np.stack([pull[:, 0] / stiffness[:, 0], np.zeros(len(weight))], 1)
    determinant = stiffness[:, 0] * stiffness[:, 2] - stiffness[:, 1] ** 2
    up = stiffness[:, 2] * pull[:, 0] - stiffness[:, 1] * pull[:, 1]
    turn = stiffness[:, 0] * pull[:, 1] - stiffness[:, 1] * pull[:, 0]
    step: FloatArray = np.stack([up, turn], 1) / determinant[:, None]
    return step


def _has_both(truth: FloatArray, odds: FloatArray, weight: FloatArray) -> BoolArray:
    return (weight @ truth > 0) & (weight @ (1 - truth) > 0)


def _has_a_slope(truth: FloatArray, odds: FloatArray, weight: FloatArray) -> BoolArray:
    """Tell the rows in which the two kinds overlap, so that a best slope exists. Source: Albert and Anderson 1984."""
    order = np.argsort(odds, kind="stable")
    kinds = [order[truth[order] > 0.5], order[truth[order] <= 0.5]]
    if not min(map(len, kinds)):
        return np.zeros(len(weight), bool)
    (least_ill, most_ill), (least_well, most_well) = (_extremes(odds[kind], weight[:, kind] > 0) for kind in kinds)
    return _has_both(truth, odds, weight) & (most_well > least_ill) & (most_ill > least_well)


def _extremes(ascending: FloatArray, there: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Give the first and the last value that is there, shape (b,) each."""
    return ascending[there.argmax(1)], ascending[len(ascending) - 1 - there[:, ::-1].argmax(1)]


def _cumulative(rows: FloatArray, order: IntArray) -> FloatArray:
    """Sum weights in this order; column k holds the sum of the first k, shape (b, len(order) + 1)."""
    sums = np.zeros((len(rows), len(order) + 1))
    np.cumsum(rows.take(order, axis=1), axis=1, out=sums[:, 1:])
    return sums


def _in_chunks(of: Callable[[FloatArray], FloatArray], weight: FloatArray) -> FloatArray:
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    if not len(weight):
        return np.empty(0)
    return np.concatenate([of(weight[start : start + rows]) for start in range(0, len(weight), rows)])


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    ratio: FloatArray = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)
    return ratio
