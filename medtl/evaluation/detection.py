"""How well findings are detected: FROC and average precision, of boxes and of points, with intervals over patients.

Conventions, all of them by name, because each moves the values:

* **A hit** is by overlap (IoU of the boxes, corners are continuous: a box from 2 to 5 is 3 wide) or by distance (of the
  centres, in mm, at most a radius that is given or that each true finding has: LUNA16).
* **Matching** is within an image and greedy by score: each detection takes the best true finding it hits that no
  detection with a higher score has taken (COCO's; in VOC's the second detection of a finding takes no other).
* **A second detection** of the same finding is a false positive for average precision (VOC, COCO) and counts neither
  way for FROC (LUNA16). A detection whose only hits are findings marked as neither (``ignored``) counts neither way.
* **FROC** is the sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives per image, on straight lines between
  operating points; their mean is the competition performance metric. Beyond the last false positive it stays the same.
  Source: Setio et al., Medical Image Analysis 42 (2017), LUNA16.
* **Average precision** is the area under precision made monotone: ``coco`` the mean at 101 recalls, with at most 100
  detections per image; ``voc`` the whole area (since 2010). mAP is its mean over the classes with findings and over
  the thresholds. Source: Lin et al., ECCV 2014; Everingham et al., International Journal of Computer Vision 88 (2010).

Detections with the same score, in whichever images, come together: no threshold could part them, and the order of the
images must not matter (COCO takes them one by one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from medtl.config import UncertaintyConfig
from medtl.evaluation.questions import basis_of, measured
from medtl.evaluation.uncertainty import Estimate, estimate, mean_of, score_of
from medtl.records import FloatArray, IntArray, Score

BoolArray = npt.NDArray[np.bool_]
Interpolation = Literal["coco", "voc"]
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per image
COCO_MOST = 100  # detections per image
_RECALLS = np.linspace(0, 1, 101)
_ROUNDING = 1e-9
_NO_FINDINGS = "not estimable: no image has a true finding"
_NO_NUMBER = "not estimable: a score is not a number"
_MISS, _HIT, _SECOND, _NEITHER = range(4)


@dataclass(frozen=True, slots=True)
class Findings:
    """What is in one image and what was detected there, of one class.

    Boxes are the lower corner, then the upper one: (n, 4) or (n, 6). Points are (n, 2) or (n, 3). In mm, or in pixels
    where only overlaps are asked for.
    """

    image_id: str
    patient: str
    truth: FloatArray
    found: FloatArray
    scores: FloatArray  # (found,), higher is surer
    radii_mm: FloatArray | None = None  # (truth,) within which a detection hits
    ignored: BoolArray | None = None  # (truth,) findings that count neither way

    def __post_init__(self) -> None:
        widths = {part.shape[1] if part.ndim == 2 else 0 for part in (self.truth, self.found)}
        if len(widths) != 1 or not widths < {2, 3, 4, 6}:
            raise ValueError("findings: boxes (n, 4 or 6) or points (n, 2 or 3), the same in truth and detections")
        if self.scores.shape != (len(self.found),):
            raise ValueError("findings: one score per detection is wanted")
        if any(part is not None and part.shape != (len(self.truth),) for part in (self.radii_mm, self.ignored)):
            raise ValueError("findings: one radius and one mark per true finding are wanted")
        for part in (self.truth, self.found):
            half = part.shape[1] // 2
            if not np.isfinite(part).all() or (not self.points and (part[:, half:] < part[:, :half]).any()):
                raise ValueError("findings: finite numbers, the lower corner before the upper one, are wanted")

    @property
    def points(self) -> bool:
        """Tell points from boxes."""
        return bool(self.truth.shape[1] < 4)


@dataclass(frozen=True, slots=True)
class HitRule:
    """When a detection hits a true finding."""

    by: Literal["overlap", "distance"]
    limit: float | None = None  # least IoU, or largest distance in mm; None: each true finding's own radius

    def __post_init__(self) -> None:
        if self.by == "overlap" and (self.limit is None or not 0 < self.limit <= 1):
            raise ValueError("a hit by overlap wants an IoU above 0 and up to 1")
        if self.by == "distance" and self.limit is not None and not self.limit >= 0:
            raise ValueError("a hit by distance wants a radius of 0 mm or more")


COCO_RULES = tuple(HitRule("overlap", float(limit)) for limit in np.linspace(0.5, 0.95, 10))


@dataclass(frozen=True, slots=True)
class Froc:
    """Sensitivity against false positives per image."""

    at: tuple[Score, ...]  # at each rate
    mean: Score  # over the rates: the competition performance metric
    false_positives_per_image: tuple[float, ...]  # the curve, from no detection to all
    sensitivity: tuple[float, ...]
    thresholds: tuple[float, ...]  # the score that each point but the first begins at
    images: int
    findings: int
    convention: str


@dataclass(frozen=True, slots=True)
class Precision:
    """Average precision of each class, and the mean of those that have findings."""

    classes: tuple[Score, ...]
    mean: Score
    convention: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """All detections of all images by score, the surest first."""

    image: npt.NDArray[np.intp]  # (n,) of each detection
    score: FloatArray  # (n,)
    hit: FloatArray  # (n,) 1 for a finding's first detection
    miss: FloatArray  # (n,) 1 for a false positive
    last: npt.NDArray[np.intp]  # (k,) where each distinct score ends
    findings: FloatArray  # (images,) that count


def froc(
    images: Sequence[Findings],
    rule: HitRule,
    config: UncertaintyConfig,
    seed: int,
    rates: Sequence[float] = RATES,
    label: str = "all",
) -> Froc:
    """Give the sensitivity at some false positives per image, with intervals over patients.

    Raises:
        ValueError: no images, an image twice, or a rule that does not fit them.
    """
    ranking, problem = ranked(images, rule, seconds="neither"), _problem(images)
    names = [f"sensitivity_at_{rate:g}_fp" for rate in rates]
    convention = f"{_hits(rule)}; seconds count neither way; straight lines between operating points (LUNA16)"
    counts = len(images), int(ranking.findings.sum())
    people = [image.patient for image in images]
    if problem:
        missing = [_missing(name, label, images, problem) for name in (*names, "froc")]
        return Froc(tuple(missing[:-1]), missing[-1], (), (), (), *counts, convention)
    parts = _estimates(partial(_sensitivities, ranking, tuple(rates)), [images] * len(rates), config, seed)
    scores = [score_of(name, label, part, config.level, people) for name, part in zip(names, parts, strict=True)]
    mean = score_of("froc", label, mean_of(parts, names), config.level, people)
    false, true = _curve(ranking, np.ones(len(images)))
    x, y, at = (tuple(map(float, line)) for line in (false, true, ranking.score[ranking.last]))
    return Froc(tuple(scores), mean, x, y, at, *counts, convention)


def average_precision(
    classes: Mapping[str, Sequence[Findings]],
    config: UncertaintyConfig,
    seed: int,
    rules: Sequence[HitRule] = COCO_RULES,
    interpolation: Interpolation = "coco",
) -> Precision:
    """Give the average precision of each class and its mean over those with findings, with intervals over patients.

    Args:
        classes: the findings of each class in the same images.
        rules: over which each class's average precision is averaged.

    Raises:
        ValueError: no class, no rule, classes of other images, or rules that do not fit them.
    """
    if not classes or not rules or len({tuple(image.image_id for image in images) for images in classes.values()}) > 1:
        raise ValueError(
            "average precision: at least one rule, and one class or several of the same images, are wanted"
        )
    most = COCO_MOST if interpolation == "coco" else None
    problems = {name: _problem(images) for name, images in classes.items()}
    there = [name for name, problem in problems.items() if not problem]
    rankings = [[ranked(classes[name], rule, "miss", most) for rule in rules] for name in there]
    of = partial(_precisions, rankings, interpolation)
    parts = _estimates(of, [classes[name] for name in there], config, seed) if there else []
    images = next(iter(classes.values()))
    people = [image.patient for image in images]
    found = {name: score_of("ap", name, part, config.level, people) for name, part in zip(there, parts, strict=True)}
    scores = [found.get(name) or _missing("ap", name, classes[name], problems[name]) for name in classes]
    if _NO_NUMBER in problems.values() or not there:
        problem = _NO_NUMBER if _NO_NUMBER in problems.values() else _NO_FINDINGS
        mean = _missing("map", "all", images, problem)
    else:
        mean = score_of("map", "all", mean_of(parts, there), config.level, people)
        left = f"of {len(there)} of {len(classes)} classes: the rest have no true finding"
        mean = replace(mean, note="; ".join(filter(None, (left if len(there) < len(classes) else "", mean.note))))
    how = {"coco": f"101 recalls, at most {COCO_MOST} detections per image (COCO)", "voc": "whole area (VOC)"}
    convention = f"{_hits(*rules)}; seconds are false positives; {how[interpolation]}"
    return Precision(tuple(scores), mean, convention)


def ranked(
    images: Sequence[Findings], rule: HitRule, seconds: Literal["miss", "neither"], most: int | None = None
) -> Ranking:
    """Match every image's detections and lay them in one row, the surest first.

    Args:
        seconds: what later detections of a finding are.
        most: detections of an image that count; its surest.

    Raises:
        ValueError: no images, an image twice, or a rule that does not fit them.
    """
    if not images or len({image.image_id for image in images}) < len(images):
        raise ValueError("detection: images are wanted, each once")
    if len({image.truth.shape[1] for image in images}) > 1:
        raise ValueError("detection: boxes or points of the same dimensions in all images are wanted")
    if rule.by == "overlap" and images[0].points:
        raise ValueError("detection: points have no overlap; ask for a distance")
    if rule.by == "distance" and rule.limit is None and any(image.radii_mm is None for image in images):
        raise ValueError("detection: give the rule a distance, or each true finding a radius")
    orders = [np.argsort(-image.scores, kind="stable")[:most] for image in images]
    marks = [_matched(image, rule, order) for image, order in zip(images, orders, strict=True)]
    kind = np.concatenate(marks)
    score = np.concatenate([image.scores[order] for image, order in zip(images, orders, strict=True)])
    place = np.repeat(np.arange(len(images)), [len(order) for order in orders])
    order = np.argsort(-score, kind="stable")
    kind, score, place = kind[order], score[order], place[order]
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True)) if len(score) else np.empty(0, dtype=np.intp)
    miss = (kind == _MISS) | ((kind == _SECOND) & (seconds == "miss"))
    findings = np.array([_counted(image).sum() for image in images], dtype=np.float64)
    return Ranking(place, score, (kind == _HIT).astype(np.float64), miss.astype(np.float64), last, findings)


def _matched(image: Findings, rule: HitRule, order: IntArray) -> IntArray:
    """Say of each detection, in this order, whether it is a hit, a second one, a miss, or neither."""
    marks, counted = np.full(len(order), _MISS), _counted(image)
    closeness, hits = _closeness(image, rule)
    free = counted.copy()
    for row in np.flatnonzero(hits[order].any(axis=1)):  # few detections hit anything
        hit = hits[order[row]]
        if (hit & free).any():
            free[np.argmax(np.where(hit & free, closeness[order[row]], -np.inf))] = False
            marks[row] = _HIT
        else:
            marks[row] = _SECOND if (hit & counted).any() and not (hit & ~counted).any() else _NEITHER
    return marks


def _closeness(image: Findings, rule: HitRule) -> tuple[FloatArray, BoolArray]:
    """Give how close each detection is to each true finding, and whether it hits it, shape (found, truth) each."""
    if rule.by == "overlap":
        shared = intersection_over_union(image.found, image.truth)
        return shared, shared >= (rule.limit or 0.0)
    apart = np.linalg.norm(_centres(image.found)[:, None] - _centres(image.truth)[None], axis=2)
    radius = image.radii_mm if rule.limit is None else rule.limit
    hits: BoolArray = apart <= np.asarray(radius, dtype=np.float64) * (1 + _ROUNDING)
    return -apart, hits


def intersection_over_union(one: FloatArray, other: FloatArray) -> FloatArray:
    """Give the IoU of each box with each other one, shape (n, m); 0 where both have no size.

    Args:
        one: (n, 4) or (n, 6), the lower corner and the upper one.
        other: (m, 4) or (m, 6).
    """
    half = one.shape[1] // 2
    low = np.maximum(one[:, None, :half], other[None, :, :half])
    high = np.minimum(one[:, None, half:], other[None, :, half:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    sizes = [(boxes[:, half:] - boxes[:, :half]).prod(axis=1) for boxes in (one, other)]
    together = sizes[0][:, None] + sizes[1][None] - shared
    ratio: FloatArray = np.divide(shared, together, out=np.zeros_like(shared), where=together > 0)
    return ratio


def _centres(findings: FloatArray) -> FloatArray:
    half = findings.shape[1] // 2
    return findings if half == 1 else (findings[:, :half] + findings[:, half:]) / 2


def _counted(image: Findings) -> BoolArray:
    return np.ones(len(image.truth), dtype=np.bool_) if image.ignored is None else ~image.ignored


def _problem(images: Sequence[Findings]) -> str:
    """Say why nothing can be told of these images."""
    if any(np.isnan(image.scores).any() for image in images):
        return _NO_NUMBER
    return "" if any(_counted(image).any() for image in images) else _NO_FINDINGS


def _missing(metric: str, label: str, images: Sequence[Findings], problem: str) -> Score:
    people = {image.patient for image in images}
    return Score(metric, label, None, None, None, len(images), len(people), problem)


def _hits(*rules: HitRule) -> str:
    """Say what a hit is; of many overlaps the least and the largest."""
    overlaps = [rule.limit for rule in rules if rule.by == "overlap" and rule.limit]
    ends = dict.fromkeys((min(overlaps), max(overlaps))) if overlaps else ()
    said = [f"IoU of at least {' to '.join(f'{limit:.2f}' for limit in ends)}"] if ends else []
    for rule in rules:
        if rule.by == "distance":
            said.append(
                "centre within the finding's radius" if rule.limit is None else f"centre within {rule.limit:g} mm"
            )
    return ", ".join(said)


def _estimates(
    of: Callable[[FloatArray], FloatArray], groups: Sequence[Sequence[Findings]], config: UncertaintyConfig, seed: int
) -> list[Estimate]:
    """Judge several values on the same drawn patients.

    Args:
        of: (b, images) weights -> (values, b).
        groups: the images behind each value; patients without findings cannot show a sensitivity.
    """
    ids, people = ([getattr(image, what) for image in groups[0]] for what in ("image_id", "patient"))
    values, draws, without = measured(of, ids, people, config, seed)
    bases = [basis_of([image.patient for image in some if _counted(image).any()], config.level) for some in groups]
    return [
        estimate(value, row, others, config.level, basis, method=config.method)
        for value, row, others, basis in zip(values.tolist(), draws, without, bases, strict=True)
    ]


def _curve(ranking: Ranking, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Give false positives per image and sensitivity from no detection to all, of images that count so often."""
    counted, findings = weight[ranking.image], float(weight @ ranking.findings)
    false, true = (np.cumsum(counted * kind)[ranking.last] for kind in (ranking.miss, ranking.hit))
    images = max(1.0, float(weight.sum()))  # where there are none there are no findings either
    return np.append(0.0, false) / images, np.append(0.0, true) / (findings if findings else np.nan)


def _sensitivities(ranking: Ranking, rates: tuple[float, ...], weights: FloatArray) -> FloatArray:
    """Give the sensitivity at each rate of false positives per image, (rates, b)."""
    return np.array([np.interp(rates, *_curve(ranking, weight)) for weight in weights]).T


def _precisions(rankings: Sequence[Sequence[Ranking]], interpolation: Interpolation, weights: FloatArray) -> FloatArray:
    """Give each class's average precision, (classes, b)."""
    return np.array(
        [[np.mean([_area(one, weight, interpolation) for one in rules]) for weight in weights] for rules in rankings]
    )


def _area(ranking: Ranking, weight: FloatArray, interpolation: Interpolation) -> float:
    """Give the area under precision over recall, where precision is the best at this recall or a higher one."""
    counted, findings = weight[ranking.image], float(weight @ ranking.findings)
    if not findings:
        return float("nan")
    true, false = (np.cumsum(counted * kind)[ranking.last] for kind in (ranking.hit, ranking.miss))
    called, recall = true + false, true / findings
    precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "voc":
        return float(np.diff(recall, prepend=0.0) @ precision)
    return float(np.append(precision, 0.0)[np.searchsorted(recall, _RECALLS)].mean())
