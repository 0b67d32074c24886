"""Intervals by drawing patients again, not images.

Images of one patient are alike; drawing images would make intervals too narrow. Every resample draws as many patients
as there are, with replacement, and each image counts as often as its patient was drawn.
Source: Efron and Tibshirani 1993, percentile interval; Field and Welsh 2007 for clusters.

The drawing cannot show what no patient showed: of a perfect model on five patients every resample is perfect, and of a
nearly perfect one many are. Where the interval reaches the end of the scale (more than 2.5 % of the resamples are
perfect, so that fewer than about four patients carry all the error), it is made no narrower than
:mod:`medtl.evaluation.bounds` says so few patients could make it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medtl.records import FloatArray, Score

MOST_MISSING = 0.2  # share of resamples that may be without a value
FEWEST_PATIENTS = 2  # of each kind, for an interval
_CHUNK = 1_000_000  # weights held at once: 8 MB
_NO_SPREAD = 1e-9  # values closer than this are one value: sums of the same terms differ by rounding
_WIDENED = "widened to the exact bound: so few patients show no more, even if all agree"


def drawn(study_ids: Sequence[str], patients: Sequence[str], resamples: int, seed: int) -> Iterator[FloatArray]:
    """Draw patients with replacement, a few resamples at a time.

    Patients are numbered by the first of their studies, and studies are named by their bytes: the same images under
    the same seed give the same draws whatever the patients are called and in whatever order the studies come.

    Returns:
        Arrays of shape (some resamples, n): how often each study counts.

    Raises:
        ValueError: there are no patients.
    """
    if not len(patients):
        raise ValueError("no patients to draw from")
    numbers: dict[str, int] = {}
    for _, patient in sorted(zip(study_ids, patients, strict=True)):
        numbers.setdefault(patient, len(numbers))
    index = np.array([numbers[patient] for patient in patients])
    count, at_once = len(numbers), max(1, _CHUNK // len(index))
    rng = np.random.default_rng([seed, 0xB007])
    for start in range(0, resamples, at_once):
        weights = np.empty((min(at_once, resamples - start), len(index)))
        for row in weights:  # counting draws is a multinomial, many times faster than drawing it as one
            row[:] = np.bincount(rng.integers(count, size=count, dtype=np.uint32), minlength=count)[index]
        yield weights


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the values of the resamples, before it becomes a score."""

    value: float  # NaN where not estimable
    draws: FloatArray  # (resamples,)
    below: float = 0.0  # how far the interval reaches beyond the draws, for patients who all agree
    above: float = 0.0
    problem: str = ""  # why there is no value, or no interval
    bounded: str = ""  # why the interval is wider than the draws


def estimate(value: float, draws: FloatArray, level: float, needed: int, least: float) -> Estimate:
    """Judge whether a value has an interval, and widen it where so few patients could not make it so narrow.

    An interval that reaches 1 may not begin above ``least``, and one that reaches 0 may not end below ``1 - least``: a
    nearly perfect result shows no more than a perfect one. Where all resamples are the same, the bound is scaled to lie
    around the value.

    Args:
        value: on all studies, between 0 and 1; NaN where not estimable.
        draws: (b,) values of the resamples.
        needed: least number of distinct patients among those the metric needs (diseased, healthy).
        least: the lower limit that a value of 1 on these patients would have.
    """
    if not np.isfinite(value):
        return Estimate(np.nan, draws, problem="not estimable: the test part lacks a kind it needs")
    if needed < FEWEST_PATIENTS:
        return Estimate(value, draws, problem="interval not estimable: fewer than two patients of a kind")
    finite = draws[np.isfinite(draws)]
    if not len(finite) or len(finite) < (1 - MOST_MISSING) * len(draws):
        return Estimate(value, draws, problem="interval not estimable: too many resamples lack a kind it needs")
    low, high = _percentiles(draws, level)
    below = max(0.0, low - least) if high >= 1 - _NO_SPREAD else 0.0
    above = max(0.0, 1 - least - high) if low <= _NO_SPREAD else 0.0
    if high - low <= _NO_SPREAD:
        below, above = value * (1 - least), (1 - value) * (1 - least)
    return Estimate(value, draws, below, above, bounded=_WIDENED if below or above else "")


def mean_of(parts: Sequence[Estimate], names: Sequence[str]) -> Estimate:
    """Give the mean of several values; one that lacks a value or an interval takes it from the mean.

    The bounds of parts that no resample changed are averaged and added: if the mean is lower than the mean of the
    parts' bounds, one part is lower than its own.

    Args:
        names: of the parts, for what is said of them.
    """
    value = float(np.mean([part.value for part in parts]))
    draws = np.mean([part.draws for part in parts], axis=0)
    if not np.isfinite(value):
        lacking = [name for name, part in zip(names, parts, strict=True) if not np.isfinite(part.value)]
        return Estimate(np.nan, draws, problem=f"not estimable: no value for {', '.join(lacking)}")
    lacking = [name for name, part in zip(names, parts, strict=True) if part.problem]
    if lacking:
        return Estimate(value, draws, problem=f"interval not estimable: none for {', '.join(lacking)}")
    if np.isnan(draws).mean() > MOST_MISSING:
        return Estimate(value, draws, problem="interval not estimable: too many resamples lack a kind it needs")
    widened = [name for name, part in zip(names, parts, strict=True) if part.bounded]
    return Estimate(
        value,
        draws,
        float(np.mean([part.below for part in parts])),
        float(np.mean([part.above for part in parts])),
        bounded=f"{_WIDENED} ({', '.join(widened)})" if widened else "",
    )


def difference_of(one: Estimate, other: Estimate) -> Estimate:
    """Give one value minus another that was drawn with the same patients."""
    return Estimate(
        one.value - other.value,
        one.draws - other.draws,
        one.below + other.above,
        one.above + other.below,
        one.problem or other.problem,
        one.bounded or other.bounded,
    )


def score_of(
    metric: str, label: str, found: Estimate, level: float, patients: Sequence[str], lowest: float = 0.0
) -> Score:
    """Make a score with its percentile interval, or say why there is none.

    Args:
        patients: of the studies it was measured on.
        lowest: value that the metric can have; -1 of a difference.
    """
    counts = len(patients), len(set(patients))
    if not np.isfinite(found.value):
        return Score(metric, label, None, None, None, *counts, found.problem)
    if found.problem:
        return Score(metric, label, found.value, None, None, *counts, found.problem)
    low, high = _percentiles(found.draws, level)
    low, high = max(lowest, low - found.below), min(1.0, high + found.above)
    return Score(metric, label, found.value, low, high, *counts, found.bounded)


def _percentiles(draws: FloatArray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws[np.isfinite(draws)], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
