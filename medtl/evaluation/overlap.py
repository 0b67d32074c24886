"""How much two masks share: Dice, IoU and the error of the volume, and their means over patients.

Counts of voxels become volumes by the spacing (areas in 2-D). Where one mask of the two is empty nothing is shared, and
Dice and IoU are 0: that is what was measured, and a mean without it would flatter a model that misses lesions. Where
both are empty they are 0 / 0 and unknown, unless ``empty="agree"`` asks for the convention of the challenges that count
an empty prediction of an empty truth as perfect.
Source: Dice, Ecology 26 (1945); Jaccard 1901; Maier-Hein et al., Metrics reloaded, Nature Methods 21 (2024), for the
empty ones; Baid et al., arXiv 2107.02314 (2021), BraTS, for the other convention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.special import ndtr, stdtrit

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import LINE, RATIO, SHARE, Scale
from medtl.evaluation.questions import basis_of, measured
from medtl.evaluation.uncertainty import estimate, score_of
from medtl.records import AnyArray, FloatArray, Score

BoolArray = npt.NDArray[np.bool_]
Empty = Literal["unknown", "agree"]
Box = tuple[slice, ...]
MOST_LABELS = 65_535
_WIDEST = 1 - 1e-12  # level of an interval: at 1 itself nothing is estimable
BOTH_EMPTY = "not estimable: both masks are empty"


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two masks of one label share; mm² instead of mm³ where they are 2-D."""

    label: int
    truth_mm3: float
    predicted_mm3: float
    dice: float | None
    iou: float | None
    volume_error_mm3: float  # predicted minus true
    relative_volume_error: float | None  # of the true volume
    note: str = ""

    @property
    def absolute_volume_error_mm3(self) -> float:
        """The volume error without its sign."""
        return abs(self.volume_error_mm3)

    @property
    def absolute_relative_volume_error(self) -> float | None:
        """The relative volume error without its sign."""
        return None if self.relative_volume_error is None else abs(self.relative_volume_error)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two masks of one label, cut to the box that holds both."""

    label: int
    truth: BoolArray
    predicted: BoolArray


def pairs(truth: AnyArray, predicted: AnyArray, labels: Sequence[int] | None = None) -> Iterator[Pair]:
    """Cut both masks to the box around each label, in one pass over the image.

    Args:
        truth: bool, or integer where 0 is background; 2-D or 3-D.
        predicted: of the same shape.
        labels: wanted, in this order; all that occur if not said. A bool mask has the label 1, also where it is empty.

    Raises:
        ValueError: other types or shapes, or labels that are not 1 to 65,535.
    """
    if truth.shape != predicted.shape or truth.ndim not in (2, 3):
        raise ValueError(f"masks of shapes {truth.shape} and {predicted.shape}: two equal ones, 2-D or 3-D, are wanted")
    if any(mask.dtype.kind not in "biu" for mask in (truth, predicted)):
        raise ValueError(f"masks of {truth.dtype} and {predicted.dtype}: bool or integer labels are wanted")
    if any(not 1 <= label <= MOST_LABELS for label in labels or ()):
        raise ValueError(f"labels from 1 to {MOST_LABELS:,} are wanted, 0 is background; number them anew")
    box = _union(_box(truth), _box(predicted), truth.ndim)
    truth, predicted = truth[box], predicted[box]
    if truth.dtype == predicted.dtype == np.bool_:
        nothing = np.zeros((0,) * truth.ndim, dtype=np.bool_)
        for label in (1,) if labels is None else labels:
            yield Pair(label, truth, predicted) if label == 1 else Pair(label, nothing, nothing)
        return
    boxes = [_boxes(mask) for mask in (truth, predicted)]
    for label in sorted({*boxes[0], *boxes[1]}) if labels is None else labels:
        box = _union(boxes[0].get(label), boxes[1].get(label), truth.ndim)
        yield Pair(label, truth[box] == label, predicted[box] == label)


def overlap_of(pair: Pair, spacing_mm: Sequence[float], empty: Empty = "unknown") -> Overlap:
    """Measure what the two masks of one label share.

    Args:
        spacing_mm: of the voxels along each axis of the arrays.
        empty: what two empty masks are: unknown, or in perfect agreement.
    """
    truth, predicted = int(np.count_nonzero(pair.truth)), int(np.count_nonzero(pair.predicted))
    shared, voxel = int(np.count_nonzero(pair.truth & pair.predicted)), math.prod(spacing_mm)
    perfect = 1.0 if empty == "agree" else None
    volumes = truth * voxel, predicted * voxel
    return Overlap(
        pair.label,
        *volumes,
        2 * shared / (truth + predicted) if truth + predicted else perfect,
        shared / (truth + predicted - shared) if truth + predicted else perfect,
        volumes[1] - volumes[0],
        (predicted - truth) / truth if truth else None,
        note_of(bool(truth), bool(predicted), empty),
    )


def note_of(truth: bool, predicted: bool, empty: Empty) -> str:
    """Say which of two masks is empty."""
    if truth and predicted:
        return ""
    if truth or predicted:
        return f"the {'predicted' if truth else 'true'} mask is empty"
    return BOTH_EMPTY if empty == "unknown" else "both masks are empty and so agree"


@dataclass(frozen=True, slots=True)
class Row:
    """On which scale one value of a mask lies, and whose it is."""

    scale: Scale
    higher_is_better: bool | None  # None: neither; a signed error should be 0
    source: str


MASK_METRICS: Mapping[str, Row] = {
    "dice": Row(SHARE, True, "Dice 1945"),
    "iou": Row(SHARE, True, "Jaccard 1901"),
    "volume_error_mm3": Row(LINE, None, "predicted minus true"),
    "absolute_volume_error_mm3": Row(RATIO, False, "its size"),
    "relative_volume_error": Row(LINE, None, "of the true volume"),
    "absolute_relative_volume_error": Row(RATIO, False, "its size"),
    "hd95_mm": Row(RATIO, False, "Huttenlocher et al. 1993, 95th percentile, larger direction"),
    "hd_mm": Row(RATIO, False, "Huttenlocher et al. 1993"),
    "assd_mm": Row(RATIO, False, "Heimann et al. 2009, both surfaces pooled"),
    "nsd": Row(SHARE, True, "Nikolov et al. 2018"),
}


@dataclass(frozen=True, slots=True)
class Summary:
    """One value over all cases: its mean and its median, with intervals over patients."""

    mean: Score
    median: Score
    cases: int
    not_estimable: int  # of the cases; neither mean nor median holds them


def summary(
    metric: str,
    values: Sequence[float | None],
    case_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
    label: str = "all",
) -> Summary:
    """Give the mean and the median of one value over the cases that have it; patients are drawn again.

    What leaving one patient out does to a median says little of its spread, so that its ``auto`` is the percentiles of
    the draws, taken as much further out as Student's interval is wider than the normal one.
    Source: Hesterberg, The American Statistician 69 (2015), the expanded percentile interval.

    Args:
        metric: a key of ``MASK_METRICS``.
        values: of each case, None where not estimable.

    Raises:
        KeyError: there is no such metric.
    """
    scale, known = MASK_METRICS[metric].scale, [value is not None for value in values]
    values_there = np.array([value for value in values if value is not None], dtype=np.float64)
    ids, people = ([name for name, there in zip(names, known, strict=True) if there] for names in (case_ids, patients))
    lacking = f"{len(known) - len(ids)} of {len(known)} cases not estimable, and left out" if not all(known) else ""
    scores = []
    for name, of in (("mean", _mean), ("median", _median)):
        if not ids:
            note = f"not estimable: no case has a value ({len(known)} cases)"
            scores.append(Score(f"{name}_{metric}", label, None, None, None, 0, 0, note))
            continue
        (value,), (draws,), (without,) = measured(partial(_alone, of, values_there), ids, people, config, seed)
        level, method, basis = config.level, config.method, basis_of(people, config.level)
        if of is _median and method in ("auto", "analytic"):
            level, method = _expanded(level, basis.needed), "percentile"
        found = estimate(float(value), draws, without, level, basis, scale, method)
        score = score_of(f"{name}_{metric}", label, found, level, people)
        scores.append(replace(score, note="; ".join(note for note in (lacking, score.note) if note)))
    return Summary(scores[0], scores[1], len(known), len(known) - len(ids))


def _alone(of: Callable[[FloatArray, FloatArray], FloatArray], values: FloatArray, weights: FloatArray) -> FloatArray:
    return of(values, weights)[None]


def _mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Give the mean of each row of weights, shape (b,)."""
    total = weights.sum(1)
    mean: FloatArray = np.divide(weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0)
    return mean


def _median(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Give the median of each row of weights, shape (b,): halfway between two values where half lie on each side."""
    order = np.argsort(values, kind="stable")
    passed = np.cumsum(weights[:, order], axis=1)
    half = passed[:, -1:] / 2
    low, high = (np.argmax(reached, axis=1) for reached in (passed >= half, passed > half))
    median: FloatArray = np.where(half[:, 0] > 0, (values[order[low]] + values[order[high]]) / 2, np.nan)
    return median


def _expanded(level: float, patients: int) -> float:
    """Give the level whose percentiles hold the truth as often as asked for, although patients are few."""
    if patients < 2:
        return level
    reach = math.sqrt(patients / (patients - 1)) * float(stdtrit(patients - 1, (1 + level) / 2))
    return min(float(2 * ndtr(reach) - 1), _WIDEST)


def _box(mask: AnyArray) -> Box | None:
    """Give the box around everything that is not background."""
    box: list[slice] = []
    for axis in range(mask.ndim):  # cut axis by axis: the next look is at less
        cut = mask[tuple(box)]
        places = np.flatnonzero(cut.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(places):
            return None
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(box)


def _boxes(mask: AnyArray) -> dict[int, Box]:
    """Give the box around each label."""
    found = mask.view(np.uint8) if mask.dtype == np.bool_ else mask
    if not found.size:
        return {}
    if found.max() > MOST_LABELS or found.min() < 0:
        raise ValueError(f"labels from 0 to {MOST_LABELS:,} are wanted; number them anew")
    return {label: box for label, box in enumerate(ndimage.find_objects(found), 1) if box is not None}


def _union(one: Box | None, other: Box | None, axes: int) -> Box:
    """Give the box that holds both; an empty one where there is neither."""
    if one is None or other is None:
        return one or other or (slice(0, 0),) * axes
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
