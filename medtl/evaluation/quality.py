"""How good a mask probably is, foretold without a true one from how unsure the network was; learned on validation.

A number of uncertainty is unknown where a structure is not outlined at all. Of such a study nothing is foretold, and it
is flagged: it may be the worst failure of all. Of a structure that validation patients rightly lack, that it is not
outlined says nothing by itself: numbers may be assumed for it, as long as another number says that nothing looked like
it either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import rankdata, spearmanr
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import Ridge

from medtl.config import MasksConfig, UncertaintyConfig
from medtl.evaluation.folds import patient_folds
from medtl.evaluation.overlap import BoolArray
from medtl.evaluation.questions import share
from medtl.records import FloatArray, IntArray, MaskQuality, Score

FEWEST_PATIENTS = 10
QUALITY_METRICS = ("dice_foretold_error", "flagged", "failures_flagged")
EXPECTED = "expected Dice"  # begins the name of a number that is always known; then the structure's
_FOLDS = 5
_RIDGE = 1.0


def fit_quality(
    doubts: Sequence[Mapping[str, float | None]],
    dice: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: MasksConfig,
    seed: int,
    assumed: Mapping[str, float] | None = None,
) -> MaskQuality:
    """Learn on validation to foretell a study's Dice from numbers of uncertainty.

    Of a line through all numbers (ridge) and a staircase along the most telling one (isotonic) the one with the smaller
    error, cross-validated by patient, stays; none, if foretelling everybody the mean is as good.

    Args:
        doubts: numbers of uncertainty of each validation study, by name; None where unknown.
        dice: (n,), a study's mean over structures; NaN where not estimable.
        assumed: what stands for a number where it is unknown, by its name; of structures that may be absent, whose
            ``expected Dice`` must be known and no failure.
    """
    assumed = dict(assumed or {})
    features = _often_known(doubts, assumed, config.fail_below)
    numbers = _numbers(doubts, features, assumed, config.fail_below)
    known = np.isfinite(numbers).all(1) & np.isfinite(dice)
    x, y = numbers[known], dice[known]
    ids, people = ([name for name, there in zip(names, known, strict=True) if there] for names in (study_ids, patients))
    empty = MaskQuality("none", "", features, config.fail_below, studies=len(ids), patients=len(set(people)))
    empty = replace(empty, assumed={name: value for name, value in assumed.items() if name in features})
    if not features:
        return replace(empty, reason="no number of uncertainty is known of at least half of the validation studies")
    if empty.patients < FEWEST_PATIENTS:
        return replace(empty, reason=f"validation has {empty.patients} patients; {FEWEST_PATIENTS} are needed")
    folds = patient_folds(ids, people, np.zeros(len(ids), dtype=np.int64), _FOLDS, seed)
    crossed = {method: _crossed(method, x, y, folds, empty) for method in ("none", "linear", "isotonic")}
    errors = {method: float(np.abs(values - y).mean()) for method, values in crossed.items()}
    best = min(errors, key=lambda method: errors[method])
    foretold = np.full(len(dice), np.nan)
    foretold[known] = crossed[best]
    judged = _judged(_fitted(best, x, y, empty), foretold, dice)
    judged = replace(judged, error=errors[best], error_of_the_mean=errors["none"])
    if best == "none":
        reason = f"no number of uncertainty foretells the Dice better than its mean does (error {errors['none']:.3f})"
        return replace(judged, reason=reason)
    reason = f"error {errors[best]:.3f} on patients kept aside, {errors['none']:.3f} by the mean alone"
    return replace(judged, reason=reason)


def foretell(quality: MaskQuality, doubts: Sequence[Mapping[str, float | None]]) -> FloatArray:
    """Foretell the Dice of studies, (n,); NaN where there is no rule, or a number is unknown.

    Args:
        doubts: numbers of uncertainty of each study, by the names that :func:`fit_quality` learned from.
    """
    numbers = _numbers(doubts, quality.features, quality.assumed, quality.fail_below)
    known = np.isfinite(numbers).all(1)
    found = np.full(len(numbers), np.nan)
    if quality.method != "none" and known.any():
        found[known] = _applied(quality, numbers[known])
    return found


def is_flagged(quality: MaskQuality, foretold: FloatArray) -> BoolArray:
    """Tell which studies are to be looked at: a low Dice is foretold, or none can be; nobody where there is no rule.

    Args:
        foretold: (n,), as :func:`foretell` gives it.
    """
    if quality.method == "none":
        return np.zeros(len(foretold), dtype=np.bool_)
    flags: BoolArray = ~(foretold >= quality.fail_below)
    return flags


def quality_scores(
    quality: MaskQuality,
    foretold: FloatArray,
    dice: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> tuple[Score, ...]:
    """Measure on the test part how far foretold Dice is off, which share is flagged, and which share of failures.

    Studies of which nothing can be foretold are flagged, and are no part of the error alone.
    """
    if quality.method == "none":
        note = f"not estimable: {quality.reason}"
        return tuple(Score(metric, "all", None, None, None, 0, 0, note) for metric in QUALITY_METRICS)
    counted, failed = np.isfinite(dice), dice < quality.fail_below
    told, flags = np.isfinite(foretold), is_flagged(quality, foretold).astype(np.float64)
    asked = (np.abs(foretold - dice), counted & told), (flags, counted), (flags, counted & failed)
    found = []
    for metric, (values, who) in zip(QUALITY_METRICS, asked, strict=True):
        ids, people = (
            [name for name, there in zip(names, who, strict=True) if there] for names in (study_ids, patients)
        )
        found.append(share(metric, "all", values[who], ids, people, config, seed))
    untold = int((counted & ~told).sum())
    if untold:
        said = f"nothing is foretold of {untold} of {int(counted.sum())} studies: a number of uncertainty is unknown"
        found = [replace(one, note="; ".join(filter(None, (said, one.note)))) for one in found[:2]] + found[2:]
    return tuple(found)


def _numbers(
    doubts: Sequence[Mapping[str, float | None]], features: Sequence[str], assumed: Mapping[str, float], surely: float
) -> FloatArray:
    """Lay the numbers of each study in a row, NaN where unknown and nothing may be assumed."""

    def value(one: Mapping[str, float | None], name: str) -> float:
        known = one.get(name)
        if known is not None:
            return known
        expected = one.get(f"{EXPECTED} {name.partition(' ')[2]}")
        return assumed.get(name, np.nan) if expected is not None and expected >= surely else np.nan

    rows = [[value(one, name) for name in features] for one in doubts]
    return np.array(rows, dtype=np.float64).reshape(len(doubts), len(features))


def _often_known(
    doubts: Sequence[Mapping[str, float | None]], assumed: Mapping[str, float], surely: float
) -> tuple[str, ...]:
    """Name the numbers that at least half of the studies have, so that one that nobody has costs no study."""
    names = sorted({name for one in doubts for name in one})
    known = {name: np.isfinite(_numbers(doubts, (name,), assumed, surely)).sum() for name in names}
    return tuple(name for name in names if 2 * known[name] >= len(doubts))


def _crossed(method: str, x: FloatArray, y: FloatArray, folds: IntArray, empty: MaskQuality) -> FloatArray:
    """Foretell each study by what was learned from the patients of the other folds."""
    found = np.empty(len(y))
    for fold in np.unique(folds):
        out = folds == fold
        rule = _fitted(method, x[~out], y[~out], empty)
        found[out] = y[~out].mean() if method == "none" else _applied(rule, x[out])
    return found


def _fitted(method: str, x: FloatArray, y: FloatArray, quality: MaskQuality) -> MaskQuality:
    if method == "linear":
        mean, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
        line = Ridge(alpha=_RIDGE).fit((x - mean) / scale, y)
        weights, middle, width = (tuple(map(float, part)) for part in (line.coef_, mean, scale))
        return replace(
            quality, method="linear", weights=weights, mean=middle, scale=width, intercept=float(line.intercept_)
        )
    if method == "isotonic":
        telling = [_rank_correlation(column, y) or 0.0 for column in x.T]
        feature = int(np.argmax(np.abs(telling)))
        stairs = IsotonicRegression(increasing=telling[feature] >= 0).fit(x[:, feature], y)
        knots = tuple(zip(map(float, stairs.X_thresholds_), map(float, stairs.y_thresholds_), strict=True))
        return replace(quality, method="isotonic", feature=feature, knots=knots)
    return quality


def _applied(quality: MaskQuality, x: FloatArray) -> FloatArray:
    if quality.method == "linear":
        z = (x - np.array(quality.mean)) / np.array(quality.scale)
        line: FloatArray = np.clip(z @ np.array(quality.weights) + (quality.intercept or 0.0), 0.0, 1.0)
        return line
    assert quality.feature is not None
    places, values = np.array(quality.knots).T
    return np.asarray(np.interp(x[:, quality.feature], places, values))


def _judged(quality: MaskQuality, foretold: FloatArray, dice: FloatArray) -> MaskQuality:
    """Count what the rule flags of all studies that have a Dice, and how it orders those of which it foretells one."""
    counted, told = np.isfinite(dice), np.isfinite(dice) & np.isfinite(foretold)
    failed, flagged = counted & (dice < quality.fail_below), counted & is_flagged(quality, foretold)
    orders = quality.method != "none"  # means of other folds order studies the wrong way round, whatever these are
    return replace(
        quality,
        rank_correlation=_rank_correlation(foretold[told], dice[told]) if orders else None,
        failures=int(failed.sum()),
        failures_flagged=int((failed & flagged).sum()),
        flagged=int(flagged.sum()),
    )


def _rank_correlation(one: FloatArray, other: FloatArray) -> float | None:
    """Give Spearman's correlation; ``None`` where one of the two is constant."""
    if len(one) < 3 or np.ptp(rankdata(one)) == 0 or np.ptp(rankdata(other)) == 0:
        return None
    return float(spearmanr(one, other).statistic)
