"""Metrics, as a table of plain functions of arrays.

Every metric takes ``truth`` (n,) of 0 and 1, ``score`` (n,) and ``weight`` (b, n): how often each study counts in each
of b resamples. It gives (b,) values, NaN where the resample does not let it be estimated. One call so measures a whole
bootstrap; the point estimate is the same function with one row of ones. ``score`` is a probability, or, for metrics
that need decisions, 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medtl.evaluation.bounds import RestsOn
from medtl.records import FloatArray, IntArray

Metric = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
_CHUNK = 100_000  # values held at once by the ranking metrics: 0.8 MB, what a core's own cache holds


@dataclass(frozen=True, slots=True)
class Row:
    """How one metric is computed and what it needs."""

    function: Metric
    needs: Literal["scores", "decisions"]
    rests_on: RestsOn  # whose outcomes alone can move it; few of them leave much open
    higher_is_better: bool
    source: str


def auroc(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the area under the ROC curve; ties count one half.

    The healthy are sorted once for all resamples; a diseased study wins against the weight below it, and half of the
    weight it ties with. Source: Mann and Whitney 1947; Hanley and McNeil, Radiology 143 (1982).
    """
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


def brier(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the mean squared difference of probability and truth. Source: Brier 1950."""
    return _ratio(weight @ (score - truth) ** 2, weight.sum(1))


def calibration_error(truth: FloatArray, score: FloatArray, weight: FloatArray, bins: int = 10) -> FloatArray:
    """Give the expected calibration error over bins of equal width. Source: Naeini et al., AAAI 2015."""
    member = np.zeros((len(score), bins))
    member[np.arange(len(score)), np.minimum((score * bins).astype(int), bins - 1)] = 1.0
    gap = np.abs((weight * score) @ member - (weight * truth) @ member)
    return _ratio(gap.sum(1), weight.sum(1))


METRICS: Mapping[str, Row] = {
    "auroc": Row(auroc, "scores", "rarer", True, "Hanley and McNeil 1982"),
    "average_precision": Row(average_precision, "scores", "ranking", True, "Zhu 2004; scikit-learn's step-wise sum"),
    "balanced_accuracy": Row(balanced_accuracy, "decisions", "both", True, "Brodersen 2010"),
    "sensitivity": Row(sensitivity, "decisions", "diseased", True, "Altman and Bland 1994"),
    "specificity": Row(specificity, "decisions", "healthy", True, "Altman and Bland 1994"),
    "ppv": Row(ppv, "decisions", "called", True, "Altman and Bland 1994"),
    "npv": Row(npv, "decisions", "cleared", True, "Altman and Bland 1994"),
    "f1": Row(f1, "decisions", "rarer", True, "van Rijsbergen 1979"),
    "brier": Row(brier, "scores", "all", False, "Brier 1950"),
    "calibration_error": Row(calibration_error, "scores", "all", False, "Naeini 2015"),
}


def _cumulative(rows: FloatArray, order: IntArray) -> FloatArray:
    """Sum weights in this order; column k holds the sum of the first k, shape (b, len(order) + 1)."""
    sums = np.zeros((len(rows), len(order) + 1))
    np.cumsum(rows.take(order, axis=1), axis=1, out=sums[:, 1:])
    return sums


def _in_chunks(of: Callable[[FloatArray], FloatArray], weight: FloatArray) -> FloatArray:
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    return np.concatenate([of(weight[start : start + rows]) for start in range(0, len(weight), rows)])


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    ratio: FloatArray = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)
    return ratio
