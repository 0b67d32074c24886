"""The operating point, chosen on validation and never looked for on the test part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medtl.config import ThresholdConfig
from medtl.records import FloatArray, OperatingPoint, Predictions, Task

FINEST = 1e-6  # scores closer than this are not told apart: another machine's last digits would decide


def choose(truth: FloatArray, score: FloatArray, config: ThresholdConfig, label: str) -> OperatingPoint:
    """Choose a threshold; a study is called where its score is at or above it.

    ``youden`` takes the largest sensitivity + specificity; ``sensitivity`` the highest threshold that reaches the
    target; ``specificity`` the lowest that does; ``cost`` the least expected cost of misses and false alarms at the
    prevalence where the model will serve. A threshold lies half-way between neighbouring scores, so that a change in
    the last digits of one score moves no decision. Source: Youden 1950; Metz, Seminars in Nuclear Medicine 8 (1978).

    Args:
        truth: (n,) 0 and 1, without unknowns.
        score: (n,) probabilities.
    """
    if len(np.unique(truth)) < 2:
        return OperatingPoint(label, 0.5, "one half: validation holds one kind only", "none")
    thresholds = _candidates(score)
    positives, negatives = np.sort(score[truth > 0.5]), np.sort(score[truth < 0.5])
    sensitivity = 1 - np.searchsorted(positives, thresholds, side="left") / len(positives)
    specificity = np.searchsorted(negatives, thresholds, side="left") / len(negatives)
    if config.rule == "youden":
        index, rule = _middle_of_the_best(sensitivity + specificity), "Youden's index"
    elif config.rule == "cost":
        share = config.prevalence or len(positives) / len(score)
        lost = config.cost * share * (1 - sensitivity) + (1 - share) * (1 - specificity)
        index = _middle_of_the_best(-lost / lost.max())
        rule = f"least cost, a miss as {config.cost:g} false alarms, prevalence {share:.3g}"
    elif config.rule == "sensitivity":
        index = int(np.flatnonzero(sensitivity >= config.target - 1e-12)[-1])
        rule = f"sensitivity of at least {config.target:g}"
    else:
        index = int(np.flatnonzero(specificity >= config.target - 1e-12)[0])
        rule = f"specificity of at least {config.target:g}"
    return OperatingPoint(label, float(thresholds[index]), rule, "val")


def decide(predictions: Predictions, task: Task, points: Sequence[OperatingPoint]) -> FloatArray:
    """Give every study's decisions, (n, classes) of 0 and 1.

    A study of several classes is of the most probable one; else each class is called at or above its own threshold,
    and of a binary task the first class is what the last is not.

    Args:
        points: of the classes an evaluation reports: the last of a binary task, all of a multi-label one.
    """
    scores = predictions.probabilities
    if task == "multiclass":
        best: FloatArray = np.eye(scores.shape[1])[scores.argmax(axis=1)]
        return best
    thresholds = np.array([point.threshold for point in points])
    called = (scores[:, -len(thresholds) :] >= thresholds).astype(np.float64)
    return np.concatenate([1 - called, called], axis=1) if task == "binary" else called


def _middle_of_the_best(gain: FloatArray) -> int:
    """Give the middle one of the thresholds that are as good as the best."""
    best = np.flatnonzero(np.isclose(gain, gain.max()))
    return int(best[len(best) // 2])


def _candidates(score: FloatArray) -> FloatArray:
    """Give the thresholds that divide the scores differently, ascending: all called first, none called last.

    The first lies half-way to 0 and the last half-way to 1. Where a score is 0 or 1 itself there is no half-way: 0
    calls everything, and what is above 1 calls nothing.
    """
    values = np.unique(score)
    apart = np.flatnonzero(np.diff(values) > FINEST)
    first = values[0] / 2 if values[0] > FINEST else 0.0
    last = (values[-1] + 1) / 2 if values[-1] < 1 - FINEST else 1 + FINEST
    return np.concatenate([[first], (values[apart] + values[apart + 1]) / 2, [last]])
