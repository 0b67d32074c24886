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

from medtl.records import FloatArray

Metric = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
_CHUNK = 4_000_000  # values held at once by the ranking metrics


@dataclass(frozen=True, slots=True)
class Row:
    """How one metric is computed and what it needs."""

    function: Metric
    needs: Literal["scores", "decisions"]
    higher_is_better: bool
    source: str


def auroc(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the area under the ROC curve; ties count one half.

    Sorted once for all resamples; within a group of tied scores positives meet the group's negatives half. Source:
    Mann and Whitney 1947; Hanley and McNeil, Radiology 143 (1982).
    """
    order, starts = _tied(score)
    positive = truth[order] > 0.5

    def of(rows: FloatArray) -> FloatArray:
        ordered = rows[:, order]
        ups = np.add.reduceat(ordered * positive, starts, axis=1)
        downs = np.add.reduceat(ordered * ~positive, starts, axis=1)
        below = np.cumsum(downs, axis=1) - downs
        wins = (ups * (below + 0.5 * downs)).sum(1)
        return _ratio(wins, ups.sum(1) * downs.sum(1))

    return _in_chunks(of, weight)


def average_precision(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Give the mean of precision over recall steps, without interpolation. Source: scikit-learn's definition."""
    order, starts = _tied(-score)
    positive = truth[order] > 0.5

    def of(rows: FloatArray) -> FloatArray:
        ordered = rows[:, order]
        ups = np.add.reduceat(ordered * positive, starts, axis=1)
        all_ = np.add.reduceat(ordered, starts, axis=1)
        hits, seen = np.cumsum(ups, axis=1), np.cumsum(all_, axis=1)
        precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
        return _ratio((precision * ups).sum(1), hits[:, -1])

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
    "auroc": Row(auroc, "scores", True, "Hanley and McNeil 1982"),
    "average_precision": Row(average_precision, "scores", True, "Zhu 2004; scikit-learn's step-wise sum"),
    "balanced_accuracy": Row(balanced_accuracy, "decisions", True, "Brodersen 2010"),
    "sensitivity": Row(sensitivity, "decisions", True, "Altman and Bland 1994"),
    "specificity": Row(specificity, "decisions", True, "Altman and Bland 1994"),
    "ppv": Row(ppv, "decisions", True, "Altman and Bland 1994"),
    "npv": Row(npv, "decisions", True, "Altman and Bland 1994"),
    "f1": Row(f1, "decisions", True, "van Rijsbergen 1979"),
    "brier": Row(brier, "scores", False, "Brier 1950"),
    "calibration_error": Row(calibration_error, "scores", False, "Naeini 2015"),
}


def _tied(
    score: FloatArray,
) -> tuple[np.ndarray[tuple[int], np.dtype[np.intp]], np.ndarray[tuple[int], np.dtype[np.intp]]]:
    """Give the ascending order and where each group of equal scores starts in it."""
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return order, starts


def _in_chunks(of: Callable[[FloatArray], FloatArray], weight: FloatArray) -> FloatArray:
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    return np.concatenate([of(weight[start : start + rows]) for start in range(0, len(weight), rows)])


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    ratio: FloatArray = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)
    return ratio
