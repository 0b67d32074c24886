"""The operating point, chosen on validation and never looked for on the test part."""

from __future__ import annotations

import numpy as np

from medtl.config import ThresholdConfig
from medtl.records import FloatArray, OperatingPoint

FINEST = 1e-6  # scores closer than this are not told apart: another machine's last digits would decide


def choose(truth: FloatArray, score: FloatArray, config: ThresholdConfig, label: str) -> OperatingPoint:
    """Choose a threshold; a study is called where its score is at or above it.

    ``youden`` takes the largest sensitivity + specificity; ``sensitivity`` the highest threshold that reaches the
    target; ``specificity`` the lowest that does. A threshold lies half-way between neighbouring scores, so that a
    change in the last digits of one score moves no decision. Source: Youden 1950.

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
        best = np.flatnonzero(np.isclose(sensitivity + specificity, (sensitivity + specificity).max()))
        index = int(best[len(best) // 2])
        rule = "Youden's index"
    elif config.rule == "sensitivity":
        index = int(np.flatnonzero(sensitivity >= config.target - 1e-12)[-1])
        rule = f"sensitivity of at least {config.target:g}"
    else:
        index = int(np.flatnonzero(specificity >= config.target - 1e-12)[0])
        rule = f"specificity of at least {config.target:g}"
    return OperatingPoint(label, float(thresholds[index]), rule, "val")


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
