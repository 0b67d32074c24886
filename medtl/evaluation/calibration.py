"""Whether a probability of 0.8 comes true eight times in ten."""

from __future__ import annotations

import numpy as np

from medtl.records import Curve, FloatArray


def reliability(truth: FloatArray, score: FloatArray, bins: int, label: str) -> Curve:
    """Give mean probability and observed share in bins of equal width; empty bins are left out."""
    member = np.minimum((score * bins).astype(int), bins - 1)
    count = np.bincount(member, minlength=bins)
    filled = count > 0
    mean = np.bincount(member, score, bins)[filled] / count[filled]
    observed = np.bincount(member, truth, bins)[filled] / count[filled]
    return Curve(
        "calibration",
        label,
        tuple(map(float, mean)),
        tuple(map(float, observed)),
        tuple(map(float, count[filled])),
    )
