"""The operating point, chosen on validation and never looked for on the test part."""

from __future__ import annotations

import numpy as np

from medtl.config import ThresholdConfig
from medtl.records import FloatArray, OperatingPoint


def choose(truth: FloatArray, score: FloatArray, config: ThresholdConfig, label: str) -> OperatingPoint:
    """Choose a threshold; a study is called where its score is at or above it.

    ``youden`` takes the largest sensitivity + specificity; ``sensitivity`` the highest threshold that reaches the
    target; ``specificity`` the lowest that does. Thresholds lie half-way between
    neighbouring scores, so that a change in the last digit of one score moves nothing. Source: Youden 1950.

    Args:
        truth: (n,) 0 and 1, without unknowns.
    """
    if len(np.unique(truth)) < 2:
        return OperatingPoint(label, 0.5, "one half: validation holds one kind only", "none")
    values = np.unique(score)
    thresholds = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2, [np.nextafter(values[-1], np.inf)]])
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
