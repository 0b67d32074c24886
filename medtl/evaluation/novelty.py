"""How far a study is from what the model was trained on, so that a person looks where the model never learned.

A distance in the space of the features that enter the head. ``mahalanobis`` measures it to the nearest class centre, in
units of the spread within classes (Lee et al., NeurIPS 2018); ``relative`` takes the distance to all classes together
off it, which helps where the strange is near (Ren et al., arXiv 2106.09022); ``knn`` is the distance to the k-th
nearest training study among directions (Sun et al., ICML 2022). The first two keep means and a matrix; ``knn`` keeps
training studies' features, from which a study could be recognised: it is not for models that leave the house.

Everything is fitted on the training part, each patient with one vote. The threshold is a quantile of validation that
counts patients (:mod:`medtl.evaluation.quantile`): an image of a new patient like those of validation is flagged with a
chance of at most ``flagged_share``. A flag says "strange", not "wrong", and no flag does not say "right": what the
trunk never learned to see it cannot find strange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from sklearn.covariance import ledoit_wolf_shrinkage

from medtl.config import NoveltyConfig, UncertaintyConfig
from medtl.evaluation.grouped import mean_auroc
from medtl.evaluation.quantile import patient_quantile, votes
from medtl.evaluation.questions import share
from medtl.records import FloatArray, NoveltyFindings, NoveltyRule, Predictions, Score

_FEWEST = 5  # training patients
_MOST_REFERENCES = 20_000  # training studies that knn keeps
_AT_ONCE = 2_000_000  # distances held at once: 16 MB
_NO_SPREAD = 1e-3  # of the mean spread: features that hardly vary in training are measured by the mean spread
_LEAST_SHRINKAGE = 1e-4
_PERCENT = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
_NOTHING = np.zeros((0, 0), dtype=np.float32)


def fit(
    train: FloatArray,
    targets: FloatArray,
    train_patients: Sequence[str],
    val: FloatArray,
    val_patients: Sequence[str],
    config: NoveltyConfig,
) -> NoveltyRule:
    """Fit the distance on training features and its threshold on those of validation.

    Args:
        train: (n, d) features that enter the head.
        targets: (n, classes); studies of which not exactly one class is true have one centre together.
        val: (m, d).

    Returns:
        A rule with method ``none``, and the reason, where it is not wanted or training does not allow it.
    """
    wanted = train.astype(np.float64)
    if config.method == "none":
        return _none(config, "not wanted (evaluation.novelty.method)")
    if not np.isfinite(wanted).all() or not np.isfinite(val).all():
        return _none(config, "a feature is not a number")
    if len(set(train_patients)) < _FEWEST:
        return _none(config, f"training has fewer than {_FEWEST} patients")
    spread = wanted.std(axis=0)
    if spread.mean() <= 0:
        return _none(config, "all training studies have the same features")
    scale = np.where(spread > _NO_SPREAD * spread.mean(), spread, spread.mean())
    scaled, weight = wanted / scale, votes(train_patients)
    weight = weight / weight.sum()
    centres = middle = whitening = background = references = _NOTHING
    if config.method == "knn":
        references = _directions(scaled[_evenly(len(scaled))])
    else:
        kinds = _kinds(targets)
        centres = np.stack(
            [np.average(scaled[kinds == k], axis=0, weights=weight[kinds == k]) for k in np.unique(kinds)]
        )
        within = scaled - centres[kinds]
        towards = _shrinkage(within, weight)
        whitening = _whitening(within, weight, towards)
        if config.method == "relative":
            middle = np.average(scaled, axis=0, weights=weight)[None]
            # drawn as far as the other: two amounts of their own outweigh, far away, all that the classes differ by
            background = _whitening(scaled - middle, weight, towards)
    rule = _rule(config, scale, centres, whitening, middle, background, references)
    return _with_threshold(rule, novelty(rule, val), val_patients)


def novelty(rule: NoveltyRule, features: FloatArray) -> FloatArray:
    """Give each study's score, (n,); higher is stranger. NaN where the rule has no method or a feature is no number.

    Raises:
        ValueError: the features are not as many as those of training.
    """
    if rule.method == "none":
        return np.full(len(features), np.nan)
    if features.shape[1] != len(rule.scale):
        raise ValueError(f"{features.shape[1]} features are given, {len(rule.scale)} were trained on")
    found = np.full(len(features), np.nan)
    fine = np.flatnonzero(np.isfinite(features).all(axis=1))
    rows = max(1, _AT_ONCE // max(1, len(rule.references), features.shape[1] * max(1, len(rule.centres))))
    for start in range(0, len(fine), rows):
        some = fine[start : start + rows]
        found[some] = _distances(rule, features[some].astype(np.float64) / rule.scale)
    return found


def flagged(rule: NoveltyRule, scores: FloatArray) -> FloatArray:
    """Tell which studies are strange: 1 or 0; NaN where the rule has no threshold or a study has no score."""
    if rule.threshold is None:
        return np.full(len(scores), np.nan)
    return np.where(np.isfinite(scores), (scores > rule.threshold) * 1.0, np.nan)


def examine(
    rule: NoveltyRule,
    test: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    strange: Mapping[str, FloatArray],
    config: UncertaintyConfig,
    seed: int,
) -> NoveltyFindings:
    """Measure how many studies of the test part are flagged, and how well known differences are found.

    Args:
        test: (n, d) features of the test part.
        strange: name of a difference to the (n, d) features of the same studies with it: noise, blur, another scanner.
    """
    scores = novelty(rule, test)
    flags = flagged(rule, scores)
    known = np.flatnonzero(np.isfinite(flags)).tolist()
    few = Score("flagged", "all", None, None, None, 0, 0, f"not estimable: {rule.reason or 'there is no threshold'}")
    seen = few
    if len(known):
        ids, people = [study_ids[k] for k in known], [patients[k] for k in known]
        seen = share("flagged", "all", flags[known], ids, people, config, seed)
    detection = [
        _detected(name, scores, novelty(rule, features), study_ids, patients, config, seed)
        for name, features in strange.items()
        if rule.method != "none"
    ]
    notes = []
    if seen.low is not None and seen.low > rule.flagged_share:
        notes.append(
            f"More of the test part is flagged than the promised {rule.flagged_share:g}: it is not like validation."
        )
    return NoveltyFindings(
        rule.method, rule.reason, rule.threshold, rule.flagged_share, seen, tuple(detection), tuple(notes)
    )


def table(findings: NoveltyFindings) -> list[tuple[str, Score]]:
    """Give one row for the share flagged, and one for each difference that was looked for."""
    return [("flagged", findings.flagged), *((score.label, score) for score in findings.detection)]


def _detected(
    name: str,
    inside: FloatArray,
    outside: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> Score:
    """Give the AUROC of strange against ordinary versions of the same patients' studies."""
    score = np.concatenate([inside, outside])
    truth = np.repeat([0.0, 1.0], [len(inside), len(outside)])
    fine = np.flatnonzero(np.isfinite(score)).tolist()
    ids = [f"{study}-{turn}" for turn in (0, 1) for study in study_ids]
    people = [*patients, *patients]
    both = Predictions(
        "test",
        tuple(ids[k] for k in fine),
        tuple(people[k] for k in fine),
        np.stack([1 - truth[fine], truth[fine]], axis=1),
        np.stack([-score[fine], score[fine]], axis=1),
    )
    found = mean_auroc(both, "binary", ("ordinary", name), config, seed)
    return Score("detection", name, found.value, found.low, found.high, len(outside), len(set(patients)), found.note)


def _distances(rule: NoveltyRule, scaled: FloatArray) -> FloatArray:
    if rule.method == "knn":
        near = np.sqrt(np.maximum(2 - 2 * _directions(scaled) @ rule.references.T.astype(np.float64), 0))
        k = min(rule.neighbours, near.shape[1]) - 1
        kth: FloatArray = np.partition(near, k, axis=1)[:, k]
        return kth
    nearest = np.min([_square(scaled - centre, rule.whitening) for centre in rule.centres], axis=0)
    if rule.method == "relative":
        apart: FloatArray = nearest - _square(scaled - rule.middle, rule.background)
        return apart
    return np.asarray(np.sqrt(nearest))


def _square(apart: FloatArray, whitening: FloatArray) -> FloatArray:
    """Give the squared Mahalanobis distance per feature, so that it is about 1 inside."""
    squares: FloatArray = ((apart @ whitening.astype(np.float64)) ** 2).mean(axis=1)
    return squares


def _whitening(apart: FloatArray, weight: FloatArray, towards: float) -> FloatArray:
    """Give the matrix that turns the spread into the unit, from a covariance drawn towards a round one.

    Args:
        towards: how far it is drawn, 0 to 1; of :func:`_shrinkage`.
    """
    rooted = apart * np.sqrt(weight * len(weight))[:, None]
    covariance = rooted.T @ rooted / len(rooted)
    width = len(covariance)
    drawn = (1 - towards) * covariance + towards * np.trace(covariance) / width * np.eye(width)
    values, vectors = np.linalg.eigh(drawn)
    made: FloatArray = vectors / np.sqrt(np.maximum(values, np.finfo(np.float64).tiny ** 0.5))
    return made


def _shrinkage(apart: FloatArray, weight: FloatArray) -> float:
    """Give how far a covariance is best drawn towards a round one.

    Source: Ledoit and Wolf, Journal of Multivariate Analysis 88 (2004).
    """
    rooted = apart * np.sqrt(weight * len(weight))[:, None]
    return max(float(ledoit_wolf_shrinkage(rooted, assume_centered=True)), _LEAST_SHRINKAGE)


def _directions(scaled: FloatArray) -> FloatArray:
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    made: FloatArray = scaled / np.maximum(length, np.finfo(np.float64).tiny)
    return made


def _evenly(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_REFERENCES)).round().astype(np.int64))


def _kinds(targets: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Number the classes of studies, from 0 without holes; several classes or none are a kind of their own."""
    single = np.nansum(targets, axis=1) == 1
    kinds = np.where(single, np.nan_to_num(targets).argmax(axis=1), targets.shape[1])
    return np.unique(kinds, return_inverse=True)[1].astype(np.int64)


def _none(config: NoveltyConfig, reason: str) -> NoveltyRule:
    return NoveltyRule(
        "none", reason, None, config.flagged_share, config.neighbours, 0, (), *(_NOTHING for _ in range(6))
    )


def _rule(config: NoveltyConfig, scale: FloatArray, *arrays: FloatArray) -> NoveltyRule:
    kept = [array.astype(np.float32) for array in (scale, *arrays)]
    return NoveltyRule(config.method, "", None, config.flagged_share, config.neighbours, 0, (), *kept)


def _with_threshold(rule: NoveltyRule, scores: FloatArray, patients: Sequence[str]) -> NoveltyRule:
    threshold = patient_quantile(scores, patients, 1 - rule.flagged_share)
    reason = "" if threshold is not None else "validation has too few patients for a threshold"
    quantiles = tuple(map(float, np.percentile(scores, _PERCENT))) if len(scores) else ()
    return replace(rule, threshold=threshold, reason=reason, patients=len(set(patients)), quantiles=quantiles)
