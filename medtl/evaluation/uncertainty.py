"""Intervals by drawing patients again, not images.

Images of one patient are alike; drawing images would make intervals too narrow. Every resample draws as many patients
as there are, with replacement, and each image counts as often as its patient was drawn.
Source: Efron and Tibshirani 1993, percentile interval; Field and Welsh 2007 for clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medtl.records import FloatArray, Score

MOST_MISSING = 0.2  # share of resamples that may be without a value
FEWEST_PATIENTS = 2  # of each kind, for an interval


def patient_weights(patients: Sequence[str], resamples: int, seed: int) -> FloatArray:
    """Draw patients with replacement.

    Returns:
        (resamples, n): how often each study counts.
    """
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    if count == 0:
        raise ValueError("no patients to draw from")
    drawn = np.random.default_rng([seed, 0xB007]).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn.astype(np.float64)[:, index]


def score_of(
    metric: str,
    label: str,
    point: float,
    draws: FloatArray,
    level: float,
    patients: Sequence[str],
    kinds: int,
    n: int | None = None,
) -> Score:
    """Make a score with its percentile interval, or say why there is none.

    Args:
        point: the value on all studies; NaN where not estimable.
        draws: (b,) values of the resamples.
        kinds: least number of distinct patients among the studies of each kind (diseased, healthy).
    """
    people = len(set(patients))
    studies = len(patients) if n is None else n
    if not np.isfinite(point):
        return Score(
            metric, label, None, None, None, studies, people, "not estimable: the test part lacks a kind it needs"
        )
    finite = draws[np.isfinite(draws)]
    if people < FEWEST_PATIENTS or kinds < FEWEST_PATIENTS:
        note = "interval not estimable: fewer than two patients of a kind"
        return Score(metric, label, float(point), None, None, studies, people, note)
    if len(finite) < (1 - MOST_MISSING) * len(draws):
        note = "interval not estimable: too many resamples lack a kind it needs"
        return Score(metric, label, float(point), None, None, studies, people, note)
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Score(metric, label, float(point), float(low), float(high), studies, people)
