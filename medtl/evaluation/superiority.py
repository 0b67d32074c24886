"""Is one model better than another on the same patients, or is it chance? The judge of the negative-transfer guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from medtl.evaluation.metrics import METRICS
from medtl.evaluation.uncertainty import drawn
from medtl.records import FloatArray

Watched = Literal["auroc", "average_precision", "balanced_accuracy", "loss"]
_SMALLEST = 1e-12


def share_better(
    new: FloatArray,
    old: FloatArray,
    targets: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    metric: Watched,
    resamples: int,
    seed: int,
) -> float:
    """Give the share of resamples of the patients in which the new model is better; equal ones count one half.

    Args:
        new: probabilities, (n, classes).
        old: probabilities of the other model for the same studies, (n, classes).
        targets: (n, classes), NaN where unknown.
        metric: what better means; the mean over classes, of those that a resample lets be estimated. The loss is the
            mean logarithmic loss.

    Returns:
        0 to 1; one half where nothing can be told.
    """
    votes: list[FloatArray] = []
    for weights in drawn(study_ids, patients, resamples, seed):
        ahead = _values(new, targets, metric, weights) - _values(old, targets, metric, weights)
        ahead = ahead[np.isfinite(ahead)]
        votes.append(np.where(ahead > _SMALLEST, 1.0, np.where(ahead < -_SMALLEST, 0.0, 0.5)))
    told = np.concatenate(votes)
    return float(told.mean()) if len(told) else 0.5


def share_of_means_better(
    new: FloatArray,
    old: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    resamples: int,
    seed: int,
) -> float:
    """Give the share of resamples of the patients in which the mean of ``new`` is higher; equal ones count one half.

    Args:
        new: a value of each study and structure, (n, structures), NaN where not estimable; a study's is their mean.
        old: of the other model for the same studies.

    Returns:
        0 to 1; one half where nothing can be told.
    """
    counts = [np.isfinite(values).sum(1) for values in (new, old)]
    known = (counts[0] > 0) & (counts[1] > 0)
    if not known.any():
        return 0.5
    ahead = np.nanmean(new[known], 1) - np.nanmean(old[known], 1)
    votes = []
    for weights in drawn(study_ids, patients, resamples, seed):
        told = weights[:, known] @ ahead
        votes.append(np.where(told > _SMALLEST, 1.0, np.where(told < -_SMALLEST, 0.0, 0.5)))
    return float(np.concatenate(votes).mean())


def _values(probabilities: FloatArray, targets: FloatArray, metric: Watched, weights: FloatArray) -> FloatArray:
    classes = [1] if targets.shape[1] == 2 and np.allclose(targets.sum(1), 1) else range(targets.shape[1])
    per_class = []
    for index in classes:
        known = np.isfinite(targets[:, index])
        truth, score, weight = targets[known, index], probabilities[known, index], weights[:, known]
        if metric == "loss":
            right = np.where(truth > 0.5, score, 1 - score)
            with np.errstate(invalid="ignore"):  # a resample without anybody known
                per_class.append((weight @ np.log(np.maximum(right, _SMALLEST))) / weight.sum(1))
            continue
        if METRICS[metric].needs == "decisions":
            chosen = probabilities.argmax(1)[known] == index if len(classes) > 1 else score >= 0.5
            score = chosen.astype(np.float64)
        per_class.append(METRICS[metric].function(truth, score, weight))
    table = np.stack(per_class)
    there = np.isfinite(table)
    counted = there.sum(0)
    return np.where(counted > 0, np.where(there, table, 0.0).sum(0) / np.maximum(counted, 1), np.nan)
