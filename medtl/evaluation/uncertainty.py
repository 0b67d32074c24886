"""Intervals by drawing patients again, not images, that hold the truth also where patients are few.

Images of one patient are alike; drawing images would make intervals too narrow. Every resample draws as many patients
as there are, with replacement, and each image counts as often as its patient was drawn. The percentiles of such draws
are still too narrow if patients are few (a fifth of them miss with thirty patients), for three reasons, and each has
its cure. One rule serves every metric:

* The spread is that of fewer patients than stand for the population: standard error times ``sqrt(n / (n - 1))``, and
  never below that of leaving each patient out once. Source: Efron and Stein, Annals of Statistics 9 (1981).
* The spread is itself uncertain, and more so if a few patients carry most of it: the quantile is Student's, with the
  degrees of freedom that the kurtosis of the patients' influences gives, at most one less than the patients of the
  rarer kind. Source: Satterthwaite 1946; O'Neill, The American Statistician 68 (2014), for the variance of a variance.
* Values near 1 are skewed, and no interval may leave the scale: it is laid on the log odds of the value.
  Source: Pepe, The Statistical Evaluation of Medical Tests (2003), for the AUROC. What has other ends has another
  scale: MCC and kappa the log odds between -1 and 1 (Fisher's z), likelihood ratios and the log loss the logarithm,
  calibration slope and intercept and net benefit their own.

Two more sentences keep it honest at the ends. Patients show no less than if each were one yes or no: the interval is no
wider than Clopper and Pearson's for a share of that many patients (less if a few have most studies: Kish 1965). And
where the draws' mean differs from the value by more than a quarter of the standard error, the value is biased, and the
interval reaches further by what noise that large would add. Source: Efron and Tibshirani 1993, chapter 10.

The drawing cannot show what no patient showed: of a perfect model on five patients every resample is perfect, and of a
nearly perfect one many are. Where the draws reach the end of the scale (more than 2.5 % of the resamples are perfect,
so that fewer than about four patients carry all the error), the interval is made no narrower than
:mod:`medtl.evaluation.bounds` says so few patients could make it. How often all this holds the truth is measured by
``benchmarks/coverage.py``.

That is ``method: auto``. By name there are also ``percentile`` (Efron 1979) and ``bca`` (Efron, Journal of the American
Statistical Association 82 (1987)) of the same draws, as their sources have them, but for the exact bound where no
resample differs; and ``analytic``: DeLong for the AUROC (:mod:`medtl.evaluation.delong`) and Wilson for shares, both
over patients, and for all else ``auto``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import betaincinv, expit, logit, ndtr, ndtri, stdtrit

from medtl.config import IntervalMethod
from medtl.evaluation.bounds import LINE, RATIO, SHARE, SIGNED, Basis, Scale
from medtl.records import FloatArray, IntArray, Score

MOST_MISSING = 0.2  # share of resamples that may be without a value
FEWEST_PATIENTS = 2  # of each kind, for an interval
_GROUPS = 500  # patients are left out one by one up to here, and in as many groups beyond: t has its limit by then
_CHUNK = 1_000_000  # weights held at once: 8 MB
_NO_SPREAD = 1e-9  # values closer than this are one value: sums of the same terms differ by rounding
_BIASED = 0.25  # standard errors
_NOISE = 1 / (math.sqrt(2) - 1)  # pure noise is sqrt(2) times as large in a resample as in the value: the rest is bias
_ONE_SIDED = "interval not estimable by BCa: the value lies at the edge of the resamples; try method auto"
_ALIKE = "interval not estimable: no resample differs"
_NO_LOGARITHM = "interval not estimable: a ratio of 0 has no standard error"
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
    index = _numbered(study_ids, patients)
    count, at_once = int(index.max()) + 1, max(1, _CHUNK // len(index))
    rng = np.random.default_rng([seed, 0xB007])
    for start in range(0, resamples, at_once):
        weights = np.empty((min(at_once, resamples - start), len(index)))
        for row in weights:  # counting draws is a multinomial, many times faster than drawing it as one
            row[:] = np.bincount(rng.integers(count, size=count, dtype=np.uint32), minlength=count)[index]
        yield weights


def left_out(study_ids: Sequence[str], patients: Sequence[str]) -> Iterator[FloatArray]:
    """Leave each patient out once, or each of 500 groups of patients where there are more.

    Returns:
        Arrays of shape (some patients or groups, n): 0 for the studies left out, else 1.

    Raises:
        ValueError: there are no patients.
    """
    index = _numbered(study_ids, patients) % _GROUPS
    count, at_once = int(index.max()) + 1, max(1, _CHUNK // len(index))
    for start in range(0, count, at_once):
        yield (np.arange(start, min(start + at_once, count))[:, None] != index).astype(np.float64)


def _numbered(study_ids: Sequence[str], patients: Sequence[str]) -> IntArray:
    if not len(patients):
        raise ValueError("no patients to draw from")
    numbers: dict[str, int] = {}
    for _, patient in sorted(zip(study_ids, patients, strict=True)):
        numbers.setdefault(patient, len(numbers))
    return np.array([numbers[patient] for patient in patients])


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, the values of the resamples and those without each patient, before it becomes a score."""

    value: float  # NaN where not estimable
    draws: FloatArray  # (resamples,)
    without: FloatArray  # (patients or groups of them,)
    needed: int = 0  # patients of the rarest kind
    votes: float = 0.0  # how many patients of one yes or no each would show as much; 0 is unknown
    below: float = 0.0  # how far the interval reaches beyond the rule, for patients who all agree
    above: float = 0.0
    problem: str = ""  # why there is no value, or no interval
    bounded: str = ""  # why the interval is wider than the rule
    lean: tuple[float, float] = (1.0, 1.0)  # how much further than by its spread a difference reaches down and up
    scale: Scale = SHARE
    method: IntervalMethod = "auto"
    limits: tuple[float, float] | None = None  # of method analytic


def estimate(
    value: float,
    draws: FloatArray,
    without: FloatArray,
    level: float,
    basis: Basis,
    scale: Scale = SHARE,
    method: IntervalMethod = "auto",
) -> Estimate:
    """Judge whether a value has an interval, and widen it where so few patients could not make it so narrow.

    Where the draws reach the best value the interval may not begin above ``basis.least``, and where they reach the
    worst not end below its mirror image: a nearly perfect result shows no more than a perfect one. Where all resamples
    are the same, the bound is scaled to lie around the value. A metric without a best value has no such bound.

    Args:
        value: on all studies, on its scale; NaN where not estimable.
        draws: (b,) values of the resamples.
        without: (g,) values without each patient, or each group of patients.
    """
    if not np.isfinite(value):
        return Estimate(np.nan, draws, without, problem="not estimable: the test part lacks a kind it needs")
    if basis.needed < FEWEST_PATIENTS:
        return Estimate(value, draws, without, problem="interval not estimable: fewer than two patients of a kind")
    if scale is RATIO and value <= 0:
        return Estimate(value, draws, without, problem=_NO_LOGARITHM)
    finite = draws[np.isfinite(draws) & (draws > 0 if scale is RATIO else True)]
    if not len(finite) or len(finite) < (1 - MOST_MISSING) * len(draws):
        problem = "interval not estimable: too many resamples lack a kind it needs"
        return Estimate(value, draws, without, problem=problem)
    if not scale.has_ends and float(np.ptp(finite)) <= _NO_SPREAD:
        return Estimate(value, draws, without, problem=_ALIKE)
    votes = basis.votes(level) if scale.has_ends else 0.0
    method = "auto" if method == "analytic" else method  # for all that has no closed form, and to average what has
    found = Estimate(value, draws, without, basis.needed, votes, scale=scale, method=method)
    return _bounded(found, finite, level, basis.least) if scale.has_ends else found


def _bounded(found: Estimate, finite: FloatArray, level: float, least: float) -> Estimate:
    """Widen an interval between two ends where the draws cannot tell how far it reaches."""
    value, size = found.value, found.scale.at(1) - found.scale.lowest
    best, worst = found.scale.at(least), found.scale.at(1 - least)
    lowest, highest = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    alike = highest - lowest <= _NO_SPREAD
    if found.method != "auto" and not alike:
        return found
    low, high = _interval(found, level) if found.method == "auto" else (value, value)
    below = max(0.0, low - best) if highest >= found.scale.highest - _NO_SPREAD else 0.0
    above = max(0.0, worst - high) if lowest <= found.scale.lowest + _NO_SPREAD else 0.0
    if alike:
        place = (value - found.scale.lowest) / size
        below = max(0.0, low - found.scale.at(place * least))
        above = max(0.0, found.scale.at(place + (1 - place) * (1 - least)) - high)
    return replace(found, below=below, above=above, bounded=_WIDENED if below or above else "")


def mean_of(parts: Sequence[Estimate], names: Sequence[str]) -> Estimate:
    """Give the mean of several values; one that lacks a value or an interval takes it from the mean.

    The bounds of parts that no resample changed are averaged and added: if the mean is lower than the mean of the
    parts' bounds, one part is lower than its own.

    Args:
        names: of the parts, for what is said of them.
    """
    value = float(np.mean([part.value for part in parts]))
    draws = np.mean([part.draws for part in parts], axis=0)
    without = np.mean([part.without for part in parts], axis=0)
    if not np.isfinite(value):
        lacking = [name for name, part in zip(names, parts, strict=True) if not np.isfinite(part.value)]
        return Estimate(np.nan, draws, without, problem=f"not estimable: no value for {', '.join(lacking)}")
    lacking = [name for name, part in zip(names, parts, strict=True) if part.problem]
    if lacking:
        return Estimate(value, draws, without, problem=f"interval not estimable: none for {', '.join(lacking)}")
    if np.isnan(draws).mean() > MOST_MISSING:
        problem = "interval not estimable: too many resamples lack a kind it needs"
        return Estimate(value, draws, without, problem=problem)
    widened = [name for name, part in zip(names, parts, strict=True) if part.bounded]
    return Estimate(
        value,
        draws,
        without,
        min(part.needed for part in parts),
        min(part.votes for part in parts),
        float(np.mean([part.below for part in parts])),
        float(np.mean([part.above for part in parts])),
        bounded=f"{_WIDENED} ({', '.join(widened)})" if widened else "",
        scale=parts[0].scale,
        method=parts[0].method,
        limits=parts[0].limits if len(parts) == 1 else None,
    )


def difference_of(one: Estimate, other: Estimate, level: float) -> Estimate:
    """Give one value minus another that was drawn with the same patients.

    A difference is as lopsided as the intervals of its two values are, also where these vary together: it reaches
    further to the side to which the two together do, and never less far than its own spread.
    Source: after Zou and Donner, Statistics in Medicine 27 (2008), who recover a difference's limits from its parts'.
    """
    lean = (1.0, 1.0)
    if not one.problem and not other.problem and one.method == "auto":
        (low, high), (other_low, other_high) = _interval(one, level), _interval(other, level)
        down = math.hypot(one.value - low, other_high - other.value)
        up = math.hypot(high - one.value, other.value - other_low)
        mean = math.hypot(down, up) / math.sqrt(2)
        lean = (max(1.0, down / mean), max(1.0, up / mean)) if mean > _NO_SPREAD else lean
    return Estimate(
        one.value - other.value,
        one.draws - other.draws,
        one.without - other.without,
        min(one.needed, other.needed),
        0.0,
        one.below + other.above,
        one.above + other.below,
        one.problem or other.problem,
        one.bounded or other.bounded,
        lean,
        SIGNED if one.scale is SHARE else LINE,
        one.method,
    )


def score_of(metric: str, label: str, found: Estimate, level: float, patients: Sequence[str]) -> Score:
    """Make a score with its interval, or say why there is none.

    Args:
        patients: of the studies it was measured on.
    """
    counts = len(patients), len(set(patients))
    if not np.isfinite(found.value):
        return Score(metric, label, None, None, None, *counts, found.problem)
    if found.problem:
        return Score(metric, label, found.value, None, None, *counts, found.problem)
    if found.limits is not None:
        return Score(metric, label, found.value, *found.limits, *counts)
    low, high = _interval(found, level)
    if not (np.isfinite(low) and np.isfinite(high)):
        return Score(metric, label, found.value, None, None, *counts, _ONE_SIDED)
    low, high = max(found.scale.lowest, low - found.below), min(found.scale.highest, high + found.above)
    return Score(metric, label, found.value, low, high, *counts, found.bounded)


def wilson(share: float, votes: float, level: float) -> tuple[float, float]:
    """Give the limits of a share of this many independent votes, that need not be whole. Source: Wilson 1927."""
    z = float(ndtri((1 + level) / 2))
    middle = (share + z**2 / (2 * votes)) / (1 + z**2 / votes)
    reach = z / (1 + z**2 / votes) * math.sqrt(share * (1 - share) / votes + z**2 / (4 * votes**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def independent_votes(outcome: FloatArray, counted: FloatArray, patient: IntArray) -> float:
    """Count the independent votes that a share's studies are worth: fewer where a patient's studies agree.

    Studies over the design effect, which is the variance over patients by that of a share of as many patients.
    Where all agree a patient is one vote. Source: Rao and Scott, Biometrics 48 (1992).

    Args:
        outcome: (n,) 0 or 1.
        counted: (n,) 1 where a study is in the share's denominator.
        patient: (n,) numbers from 0.
    """
    studies = np.bincount(patient, counted)
    studies, yes = studies[studies > 0], np.bincount(patient, counted * outcome)[studies > 0]
    count, total = len(studies), studies.sum()
    if count == total or count < FEWEST_PATIENTS:
        return float(total)
    share = yes.sum() / total
    variance = count / (count - 1) * ((yes - share * studies) ** 2).sum() / total**2
    if variance <= 0:
        return float(total**2 / (studies**2).sum())
    return float(min(total, share * (1 - share) / variance))


def _interval(found: Estimate, level: float) -> tuple[float, float]:
    """Lay the interval by the estimate's method."""
    if found.method == "percentile":
        low, high = np.nanquantile(found.draws, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)
    if found.method == "bca":
        return _corrected(found, level)
    if found.scale is RATIO:
        logs = replace(found, value=math.log(found.value), scale=LINE)
        low, high = _students(replace(logs, draws=_logs(found.draws), without=_logs(found.without)), level)
        return math.exp(low), math.exp(high)
    return _students(found, level)


def _students(found: Estimate, level: float) -> tuple[float, float]:
    """Lay Student's interval on the log odds of the value between the ends of its scale, if it has any."""
    value, error = found.value, _standard_error(found)
    if error <= _NO_SPREAD:
        return value, value
    lowest, highest = found.scale.lowest, found.scale.highest
    quantile = stdtrit(_freedom(found), (1 + level) / 2)
    low, high = lowest, highest
    if not found.scale.has_ends:
        low, high = value - quantile * error * found.lean[0], value + quantile * error * found.lean[1]
    else:
        place, size = (value - lowest) / (highest - lowest), highest - lowest
        if 0 < place < 1:
            reach = quantile * error / size / (place * (1 - place))
            sides = (-reach * found.lean[0], reach * found.lean[1])
            low, high = (lowest + size * float(expit(logit(place) + side)) for side in sides)
        if found.votes:
            fewest, most = _share(place, found.votes, level)
            low, high = max(low, lowest + size * fewest), min(high, lowest + size * most)
    bias = float(np.nanmean(found.draws)) - value
    if abs(bias) > _BIASED * error:
        low, high = low - _NOISE * max(0.0, bias), high + _NOISE * max(0.0, -bias)
    return min(value, max(lowest, low)), max(value, min(highest, high))


def _corrected(found: Estimate, level: float) -> tuple[float, float]:
    """Give the bias-corrected and accelerated limits; NaN where the value is at the edge of the draws."""
    draws = found.draws[np.isfinite(found.draws)]
    if float(draws.max() - draws.min()) <= _NO_SPREAD:
        return found.value, found.value
    apart = draws - found.value
    share = (apart < -_NO_SPREAD).mean() + (np.abs(apart) <= _NO_SPREAD).mean() / 2
    if not 0 < share < 1:
        return math.nan, math.nan
    influence, bias = -_influence(found), float(ndtri(share))
    spread = float((influence**2).sum())
    skew = float((influence**3).sum()) / (6 * spread**1.5) if spread > _NO_SPREAD**2 else 0.0
    shifted = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    low, high = np.quantile(draws, ndtr(bias + shifted / (1 - skew * shifted)))
    return float(low), float(high)


def _logs(values: FloatArray) -> FloatArray:
    logs: FloatArray = np.log(values, out=np.full(len(values), np.nan), where=values > 0)
    return logs


def _standard_error(found: Estimate) -> float:
    """Give the larger of the drawing's and the leaving out's, as of the population, not of these patients."""
    drawing = float(np.nanstd(found.draws)) * math.sqrt(found.needed / (found.needed - 1))
    influence = _influence(found)
    if len(influence) < 2:
        return drawing
    return max(drawing, math.sqrt((len(influence) - 1) / len(influence) * float((influence**2).sum())))


def _freedom(found: Estimate) -> float:
    """Count the degrees of freedom that the variance has: few if a few patients carry most of it."""
    most = found.needed - 1
    influence = _influence(found)
    square = float((influence**2).mean()) if len(influence) > 3 else 0.0
    if square <= _NO_SPREAD**2:
        return most
    count, kurtosis = len(influence), float((influence**4).mean()) / square**2
    excess = kurtosis - (count - 3) / (count - 1)
    return min(most, max(1.0, 2 * count / excess)) if excess > 0 else most


def _influence(found: Estimate) -> FloatArray:
    without = found.without[np.isfinite(found.without)]
    return without - without.mean() if len(without) else without


def _share(share: float, votes: float, level: float) -> tuple[float, float]:
    """Give Clopper and Pearson's limits of a share of this many votes, that need not be whole."""
    yes, no, chance = share * votes, (1 - share) * votes, (1 - level) / 2
    low = float(betaincinv(yes, no + 1, chance)) if yes > 0 else 0.0
    high = float(betaincinv(yes + 1, no, 1 - chance)) if no > 0 else 1.0
    return low, high
