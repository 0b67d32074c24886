"""Pixels of images ranked by their probability: the AUROC of all of them together, and its mean over images.

It is the chance that a pixel of the structure has a higher probability than one that is not, ties one half. Half
precision has 15,361 values from 0 to 1, and an image is kept as the counts of its pixels that have each, however many
pixels there are. Of several images the AUROC is made of the counts of every image's pixels against every other's, all
by one matrix product, so that drawn images need no second sorting and the interval is exact too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from medtl.config import UncertaintyConfig
from medtl.evaluation.overlap import BoolArray
from medtl.evaluation.questions import Question, answers, basis_of, share
from medtl.evaluation.uncertainty import score_of
from medtl.records import FloatArray, Score

CountArray = npt.NDArray[np.uint32]
_ONE = int(np.float16(1).view(np.uint16))  # the bits of numbers from 0 up rise with the numbers
_MINUS_ZERO, _INSIDE = 0x8000, np.uint16(0x4000)  # a bit that no probability has, for the pixels of the structure
_AT_ONCE = 1024  # values counted at once: of 1,000 images 8 MB


@dataclass(frozen=True, slots=True)
class PixelRanks:
    """How many of one image's pixels, of a structure and of all others, have each probability from 0 up to 1."""

    study_id: str
    patient: str
    inside: CountArray  # (15361,)
    outside: CountArray


def pixel_ranks(
    study_id: str, patient: str, probability: FloatArray, truth: BoolArray, counts: BoolArray | None = None
) -> PixelRanks:
    """Count the pixels of one image by their probability, rounded to half precision.

    Args:
        probability: of the structure, of any shape.
        truth: where the structure is, of the same shape.
        counts: which pixels count, as those in a field of view; all if not said.

    Raises:
        ValueError: other shapes, or a probability that is not a number from 0 to 1.
    """
    counts = np.ones(truth.shape, dtype=np.bool_) if counts is None else counts
    if not probability.shape == truth.shape == counts.shape:
        raise ValueError("pixels: probability, truth and what counts are of one shape")
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        values = probability[counts].astype(np.float16).view(np.uint16)
    values[values == _MINUS_ZERO] = 0
    if values.max(initial=0) > _ONE:
        raise ValueError("pixels: a probability is not a number from 0 to 1")
    sides = np.bincount(values + _INSIDE * truth[counts], minlength=2 * _INSIDE).reshape(2, -1).astype(np.uint32)
    return PixelRanks(study_id, patient, inside=sides[1, : _ONE + 1], outside=sides[0, : _ONE + 1])


def pixel_scores(label: str, images: Sequence[PixelRanks], config: UncertaintyConfig, seed: int) -> tuple[Score, ...]:
    """Give the AUROC of pixels of all images together and its mean over images, with intervals over patients.

    Args:
        label: the structure.
    """
    ids, people = [one.study_id for one in images], [one.patient for one in images]
    sizes = np.array([[one.inside.sum(), one.outside.sum()] for one in images], dtype=np.float64).reshape(-1, 2)
    whole = sizes.prod(1) > 0
    if not whole.any():
        note = "not estimable: no image has pixels inside and outside the structure"
        counts = len(images), len(set(people))
        return tuple(
            Score(name, label, None, None, None, *counts, note) for name in ("pixel_auroc", "mean_pixel_auroc")
        )
    ahead = pairs_in_order(images)
    pooled = Question(partial(_pooled_auroc, ahead, sizes), basis_of(people, config.level))
    (found,) = answers([pooled], ids, people, config, seed)
    each = ahead.diagonal()[whole] / sizes[whole].prod(1)
    some, who = ([name for name, is_whole in zip(names, whole, strict=True) if is_whole] for names in (ids, people))
    mean = share("mean_pixel_auroc", label, each, some, who, config, seed)
    if not whole.all():
        lacking = f"{len(images) - len(each)} of {len(images)} images left out: a kind is missing"
        mean = replace(mean, note="; ".join(filter(None, (lacking, mean.note))))
    return score_of("pixel_auroc", label, found, config.level, people), mean


def pooled_auroc(images: Sequence[PixelRanks]) -> float | None:
    """Give the AUROC of the pixels of all images together; ``None`` where one kind of pixel is missing."""
    if not images:
        return None
    sizes = np.array([[one.inside.sum(), one.outside.sum()] for one in images], dtype=np.float64)
    (area,) = _pooled_auroc(pairs_in_order(images), sizes, np.ones((1, len(images))))
    return float(area) if np.isfinite(area) else None


def pairs_in_order(images: Sequence[PixelRanks]) -> FloatArray:
    """Count for each two images the pairs in which the first's pixel inside is more probable than the other's outside.

    Returns:
        (images, images), ties one half; exact up to 2**52 pairs.
    """
    found, below = np.zeros((len(images), len(images))), np.zeros((len(images), 1))
    for first in range(0, _ONE + 1, _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        inside = np.array([one.inside[part] for one in images], dtype=np.float64)
        outside = np.array([one.outside[part] for one in images], dtype=np.float64)
        up_to = below + outside.cumsum(1)
        found += inside @ (up_to - outside / 2).T
        below = up_to[:, -1:]
    return found


def _pooled_auroc(ahead: FloatArray, sizes: FloatArray, weights: FloatArray) -> FloatArray:
    """Give the AUROC of all pixels together, each image as often as its weight says, (b,); NaN without both kinds."""
    pairs = (weights @ sizes).prod(1)
    area: FloatArray = np.divide(
        (weights @ ahead * weights).sum(1), pairs, out=np.full(len(weights), np.nan), where=pairs > 0
    )
    return area
