"""Near duplicates that a picture's hash is too blind for, found by what a pretrained network makes of them. Pure.

A copy that was turned by some degrees has another hash, but is often among the three pictures of other people whose
features are nearest to its original's. That alone says little: in every cohort somebody is nearest. So such pairs are
also laid on each other (:func:`medtl.dataset.leaks.likeness`), and a pair is a near duplicate if it stands out in both:
among all pairs of nearest strangers in the cohort, by more than one interquartile range below the lower quartile in
each of the two logarithms (of the cosine distance, of 1 - correlation), and by more than four in their sum. Quartiles
do not mind that a few of those pairs are the copies themselves. In one of the two alone strangers stand out as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from medtl.dataset.leaks import FEWEST, Fingerprints, Near, likeness, owners_of
from medtl.dataset.transforms import coarsest, oriented
from medtl.progress import advance
from medtl.records import AnyArray, Cohort, FeaturePairs, FloatArray, IntArray, Scan

SIDE = 128  # rows and columns of what a network sees, if it can
_NEIGHBOURS = 3  # of other people, that each picture is laid on
_EACH, _TOGETHER = 1.0, 4.0  # interquartile ranges below the lower quartile
_ENDS = (1, 99)  # percentiles of a picture's values that become black and white
_SAMPLE = 2_048  # pairs that say how alike strangers are once laid on each other
_LEAST = 1e-6  # distance; below it float32 tells nothing apart
_BLOCK = 1024


def thumbnail(pixels: AnyArray, scan: Scan, side: int = SIDE) -> AnyArray:
    """Shrink an image, or a volume's middle slice along its coarsest axis, to (side, side, 3) uint8.

    Args:
        pixels: (rows, columns), (rows, columns, 3), or (slices, rows, columns) of a volume.
    """
    if scan.is_volume:
        assert scan.affine is not None
        volume, _ = oriented(pixels, scan.affine, coarsest(scan.affine))
        pixels = volume[len(volume) // 2]
    if pixels.dtype == np.uint8:
        values = np.ascontiguousarray(pixels)
    else:
        low, high = np.percentile(pixels, _ENDS)
        values = np.clip((pixels.astype(np.float32) - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.float32)
    how = cv2.INTER_AREA if min(values.shape[:2]) > side else cv2.INTER_LINEAR
    small = np.rint(cv2.resize(values, (side, side), interpolation=how)).astype(np.uint8)
    return small if small.ndim == 3 else np.repeat(small[..., None], 3, axis=2)


def with_features(near: Near, cohort: Cohort, prints: Fingerprints, features: AnyArray, threads: int = 2) -> Near:
    """Add the pairs that features tell to those that pictures tell alone.

    Args:
        near: of the same cohort and fingerprints.
        features: (n, d) of the fingerprinted pictures, in their order.

    Raises:
        SplitError: the fingerprints are of other pictures than the cohort's.
    """
    pairs, bounds = near_by_features(features, prints, owners_of(cohort, prints), threads)
    if bounds is None:
        return replace(near, note=f"Look-alikes by features: not estimable with fewer than {FEWEST} images.")
    named = {(prints.digests[i], prints.digests[j]) for i, j in pairs.tolist()} - set(near.pairs)
    told = FeaturePairs(len(named), round(bounds[0], 6), round(bounds[1], 4))
    return replace(near, pairs=tuple(sorted({*near.pairs, *named})), by_features=told)


def near_by_features(
    features: AnyArray, prints: Fingerprints, owners: Sequence[int] | IntArray, threads: int = 2
) -> tuple[IntArray, tuple[float, float] | None]:
    """Find pairs of different people that stand out among nearest strangers, in features and laid on each other.

    Args:
        features: (n, d) of the fingerprinted pictures, in their order.
        owners: (n,), the same number for pictures of one person.

    Returns:
        Pairs, (pairs, 2), the smaller number first; the cosine distance below and the correlation above which a pair
        may be one, None where too few pictures can be compared.
    """
    known = np.flatnonzero(prints.comparable)
    spectra = np.asarray(prints.spectra)[known]
    pairs, apart = _nearest_strangers(_unit(np.asarray(features)[known]), np.asarray(owners)[known])
    if len(np.unique(pairs)) < FEWEST:
        return np.zeros((0, 2), np.int64), None
    sample = np.unique(np.linspace(0, len(pairs) - 1, min(_SAMPLE, len(pairs))).astype(np.int64))
    near, alike = Usual.of(apart), Usual.of(1 - likeness(spectra, pairs[sample], threads))
    worth = near.stands_out(apart) > _EACH
    some = pairs[worth]
    by_features, laid = near.stands_out(apart[worth]), alike.stands_out(1 - likeness(spectra, some, threads))
    found = some[(laid > _EACH) & (by_features + laid > _TOGETHER)]
    return known[found], (near.beyond(_EACH), 1 - alike.beyond(_EACH))


@dataclass(frozen=True, slots=True)
class Usual:
    """How far apart nearest strangers are: the lower quartile of the logarithms, and the range between quartiles."""

    quartile: float
    spread: float

    @classmethod
    def of(cls, distances: FloatArray) -> Usual:
        """Measure it."""
        low, high = np.quantile(np.log(np.maximum(distances, _LEAST)), [0.25, 0.75])
        return cls(float(low), max(float(high - low), _LEAST))

    def stands_out(self, distances: FloatArray) -> FloatArray:
        """Tell by how many interquartile ranges distances are below the lower quartile."""
        out: FloatArray = (self.quartile - np.log(np.maximum(distances, _LEAST))) / self.spread
        return out

    def beyond(self, ranges: float) -> float:
        """Give the distance that is so many interquartile ranges below the lower quartile."""
        return float(np.exp(self.quartile - ranges * self.spread))


def _unit(features: AnyArray) -> FloatArray:
    wide = features.astype(np.float32)
    made: FloatArray = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return made


def _nearest_strangers(unit: FloatArray, owners: IntArray) -> tuple[IntArray, FloatArray]:
    """Pair each picture with its three nearest of other people; give the pairs, each once, and their cosine distances.

    Rows and columns go by in blocks: memory does not grow with the square of the pictures.
    """
    count = len(unit)
    nearest = np.full((count, _NEIGHBOURS), -1, np.int64)
    apart = np.full((count, _NEIGHBOURS), np.inf, np.float32)
    for start in range(0, count, _BLOCK):
        rows = slice(start, start + _BLOCK)
        for left in range(0, count, 8 * _BLOCK):
            columns = np.arange(left, min(left + 8 * _BLOCK, count))
            distance = np.maximum(1 - unit[rows] @ unit[columns].T, _LEAST)
            distance[owners[rows, None] == owners[columns]] = np.inf
            both = np.concatenate([apart[rows], distance], axis=1)
            names = np.concatenate([nearest[rows], np.broadcast_to(columns, distance.shape)], axis=1)
            best = np.argpartition(both, _NEIGHBOURS - 1, axis=1)[:, :_NEIGHBOURS]
            apart[rows], nearest[rows] = (np.take_along_axis(one, best, axis=1) for one in (both, names))
        advance("comparing features", min(start + _BLOCK, count), count)
    first = np.repeat(np.arange(count), _NEIGHBOURS)
    ends = np.sort(np.column_stack([first, nearest.ravel()]), axis=1)
    real = np.isfinite(apart.ravel())
    pairs, places = np.unique(ends[real], axis=0, return_index=True)
    return pairs, apart.ravel()[real][places].astype(np.float64)
