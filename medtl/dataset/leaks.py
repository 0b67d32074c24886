"""Is one thing on two sides of a split? Same patient, study, group, pixels, or a picture that is nearly the same. Pure.

A picture's *fingerprint* is the low corner of its cosine transform: 32 x 32 numbers of a 64 x 64 thumbnail, without the
mean, of length one. Size, brightness and contrast are gone from it; a mirrored or turned picture has the same numbers
with other signs, or transposed. Of a volume three thick slabs have one each. Signs alone are a hash of 255 bits.

Look-alikes are found in four steps, each for what the one before let through: a signature that mirroring and turning
leave alone, for all pairs; the hash's Hamming distance, the least of eight orientations; the correlation of the
fingerprints, their frequencies weighted up because chest films agree in the low ones whoever they are of; and, where
that is high but not enough, the same after the two pictures were laid on each other (a copy may be cropped).

How much alike is too much comes from the cohort: beyond the far-out fence (Tukey 1977) of how much alike the nearest
pictures of *different* people are. Cells on black backgrounds need .99, skin lesions .95.

Sources: Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), for signs of the cosine
transform; Evangelidis and Psarakis, IEEE TPAMI 30 (2008), for the alignment.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np

from medtl.dataset.transforms import coarsest, oriented, resliced
from medtl.errors import SplitError
from medtl.progress import advance
from medtl.records import (
    PARTS,
    AnyArray,
    CleanProof,
    Cohort,
    FeatureCheck,
    FeaturePairs,
    FloatArray,
    IntArray,
    Leak,
    LeakKind,
    Part,
    Scan,
    Split,
    Study,
)

SIDE, CORNER = 64, 32  # of the thumbnail; of what is kept of its cosine transform
SLABS = 3  # of a volume
STRICTEST, LOOSEST = 0.99, 0.95  # correlation of near duplicates
HASH_BITS = 255
HASH_ALIKE = 20  # bits that differ between a picture and one of which the hash alone is known
_BAND = 16  # frequencies that are compared; higher ones do not survive a small copy
_SIGNED = 8  # frequencies in the signature
_SIGNATURE_ALIKE, _HASH_LOOK = 0.6, 80
_FEW = 256  # pictures among which all pairs are looked at
_SAMPLE = 512  # pictures whose nearest look-alikes say what is common
FEWEST = 40  # pictures that a fence can be made from
_ALIGNED = 2_000  # pairs that are laid on each other, about
_WORTH_ALIGNING = 0.6
_BLOCK = 1024
_PLAIN = 8.0  # effective number of frequencies below which a picture is too plain to be told from others
_MOST_SCALE, _MOST_SHIFT, _MOST_TURN = 0.15, 5.0, 0.1  # of an alignment: share, thumbnail pixels, radians
_FOUND = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 15, 1e-3)
_FREQUENCY = np.hypot(*np.mgrid[:CORNER, :CORNER]).astype(np.float32)
_ODD = (-1.0) ** np.arange(CORNER, dtype=np.float32)

_SAME_FEATURES = 1e-6  # cosine distance; below it float32 tells nothing apart
_DIGITS = {("exact", 64), ("exact", 32), ("near", 64)}
_WORDS: Mapping[LeakKind, tuple[str, str]] = {
    "patient": ("patient", "patients"),
    "exam": ("DICOM study", "DICOM studies"),
    "group": ("group (studies.labels.groups)", "groups (studies.labels.groups)"),
    "pixels": ("identical image", "identical images"),
    "near": ("pair of nearly the same image", "pairs of nearly the same image"),
    "pretraining": ("image", "images"),
}

Pairs = tuple[tuple[str, str], ...]
Leaks = tuple[Leak, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprints:
    """Fingerprints of different pixels.

    Args:
        digests: of the pixels, sorted, each once.
        spectra: (n, slabs, 32, 32), float16; all zero where a picture is too plain to be compared.
    """

    digests: tuple[str, ...]
    spectra: AnyArray

    @property
    def comparable(self) -> AnyArray:
        """Which pictures have something to compare, (n,)."""
        return np.asarray(self.spectra.any(axis=(1, 2, 3)))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What counts as alike in one cohort: two correlations.

    ``near`` and above are near duplicates. From ``look`` on two pictures are laid on each other first.
    """

    near: float
    look: float


@dataclass(frozen=True, slots=True)
class Near:
    """Pictures of different patients that are nearly the same, as pairs of digests of their pixels.

    ``by_features`` tells how many of the pairs a network's features added; where it is None, ``note`` may say why.
    """

    bounds: Bounds
    pairs: Pairs
    by_features: FeaturePairs | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Listed:
    """What is known of the pictures that a network was pretrained on: hexadecimal hashes."""

    files: frozenset[str]  # first 32 digits of the sha256 of each file
    pixels: frozenset[str]
    hashes: AnyArray  # (n, 4) uint64

    def __len__(self) -> int:
        return max(len(self.files), len(self.pixels), len(self.hashes))


def fingerprint_scans(scans: Sequence[Scan], read: Callable[[Scan], AnyArray], threads: int = 2) -> Fingerprints:
    """Fingerprint scans, each different array of pixels once."""
    different = {scan.pixel_digest: scan for scan in scans}
    chosen = [different[digest] for digest in sorted(different)]
    spectra = np.zeros((len(chosen), SLABS if any(s.is_volume for s in chosen) else 1, CORNER, CORNER), np.float16)
    with ThreadPoolExecutor(threads) as pool:
        for row, made in enumerate(pool.map(lambda scan: fingerprint(read(scan), scan), chosen)):
            spectra[row] = made
            advance("fingerprinting images", row + 1, len(chosen))
    return Fingerprints(tuple(scan.pixel_digest for scan in chosen), spectra)


def fingerprint(pixels: AnyArray, scan: Scan) -> FloatArray:
    """Fingerprint one image, (1, 32, 32), or volume, (3, 32, 32); zero where it is too plain to be compared.

    A volume's slabs are means of thirds of its slices along its coarsest axis.

    Args:
        pixels: (rows, columns), (rows, columns, 3), or (slices, rows, columns) of a volume.
    """
    if not scan.is_volume:
        return _spectrum(pixels)[None]
    assert scan.affine is not None
    volume, _ = oriented(pixels, scan.affine, coarsest(scan.affine))
    small = np.stack([_thumbnail(picture) for picture in volume])
    return np.stack([_spectrum(slab) for slab in resliced(small, SLABS)])


def _thumbnail(picture: AnyArray) -> FloatArray:
    """Shrink in two steps: area averages are exact only from a multiple of the size."""
    native = picture if picture.dtype in (np.uint8, np.uint16, np.int16, np.float32) else picture.astype(np.float32)
    large = min(picture.shape[:2]) > 4 * SIDE
    twice = cv2.resize(
        native if large else native.astype(np.float32),
        (4 * SIDE, 4 * SIDE),
        interpolation=cv2.INTER_AREA if large else cv2.INTER_CUBIC,
    ).astype(np.float32)
    grey = twice.mean(-1) if twice.ndim == 3 else twice
    return np.asarray(cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA), dtype=np.float32)


def _spectrum(picture: AnyArray) -> FloatArray:
    small = picture if picture.shape == (SIDE, SIDE) and picture.dtype == np.float32 else _thumbnail(picture)
    corner = cv2.dct(small - small.mean())[:CORNER, :CORNER]
    corner[0, 0] = 0
    steps = 0.5 if picture.dtype.kind in "iu" else 1e-6 * float(np.abs(small).max())  # whole numbers hide less
    energy = (corner * _FREQUENCY) ** 2
    if np.sqrt((corner**2).sum()) <= steps * SIDE or energy.sum() ** 2 < _PLAIN * (energy**2).sum():
        return np.zeros_like(corner)
    made: FloatArray = corner / np.sqrt((corner**2).sum())
    return made


def hash_of(spectra: AnyArray) -> AnyArray:
    """Give the signs of 255 low frequencies of each picture (of a volume: of its middle slab), (n, 4) uint64."""
    middle = spectra[:, spectra.shape[1] // 2, :_BAND, :_BAND]
    bits = np.packbits((middle > 0).reshape(len(spectra), -1), axis=1)
    return np.ascontiguousarray(bits).view(np.uint64)


def _turned(spectra: AnyArray, orientation: int) -> AnyArray:
    """Mirror and transpose pictures by their spectra, (..., k, k); eight orientations."""
    side = spectra.shape[-1]
    turned = np.swapaxes(spectra, -1, -2) if orientation & 4 else spectra
    turned = turned * _ODD[:side, None].astype(turned.dtype) if orientation & 2 else turned
    return turned * _ODD[None, :side].astype(turned.dtype) if orientation & 1 else turned


def _weighted(spectra: AnyArray) -> FloatArray:
    """Weight frequencies up, (n, slabs, 16, 16), of length one over slabs and frequencies."""
    weighted = spectra[..., :_BAND, :_BAND].astype(np.float32) * _FREQUENCY[:_BAND, :_BAND]
    length = np.sqrt((weighted**2).sum(axis=(-3, -2, -1), keepdims=True))
    made: FloatArray = weighted / np.maximum(length, 1e-12)
    return made


def _signature(spectra: AnyArray) -> FloatArray:
    """Give what mirroring and turning leave alone, (n, 35): the mean of all is taken off, of length one."""
    middle = np.abs(spectra[:, spectra.shape[1] // 2, :_SIGNED, :_SIGNED].astype(np.float32))
    energy = (middle * _FREQUENCY[:_SIGNED, :_SIGNED]) ** 2
    upper = np.triu_indices(_SIGNED)
    loud = ((energy + np.swapaxes(energy, 1, 2))[:, upper[0], upper[1]][:, 1:]) ** 0.25
    loud /= np.maximum(np.linalg.norm(loud, axis=1, keepdims=True), 1e-12)
    loud -= loud.mean(axis=0)
    made: FloatArray = loud / np.maximum(np.linalg.norm(loud, axis=1, keepdims=True), 1e-12)
    return made


def bounds_of(spectra: AnyArray, owners: IntArray) -> Bounds:
    """Tell from a cohort what counts as alike in it.

    Each picture of a sample has a nearest one of another owner. A near duplicate is nearer than three interquartile
    ranges below the lower quartile of the logarithms of these distances (1 - correlation), within .95 and .99; .99
    where there are fewer than 40 pictures.

    Args:
        spectra: (n, slabs, 32, 32).
        owners: (n,), the same number for pictures of one person.
    """
    sample = np.unique(np.linspace(0, len(spectra) - 1, min(_SAMPLE, len(spectra))).astype(np.int64))
    if len(sample) < FEWEST:
        return Bounds(STRICTEST, _WORTH_ALIGNING)
    weighted = _weighted(spectra)
    flat = weighted.reshape(len(weighted), -1)
    counts, edges = np.zeros(1000, np.int64), np.linspace(0, 1, 1001)
    nearest: list[float] = []
    for rows in np.array_split(sample, -(-len(sample) // 64)):
        best = np.full((len(rows), len(flat)), -1.0, np.float32)
        for orientation in range(8):
            turned = _turned(weighted[rows], orientation).reshape(len(rows), -1)
            np.maximum(best, turned @ flat.T, out=best)
        best[owners[rows][:, None] == owners[None]] = -1.0
        nearest += best.max(axis=1).tolist()
        counts += np.histogram(best, bins=edges)[0]
    alone = np.array(nearest) == -1.0
    if alone.all():
        return Bounds(STRICTEST, _WORTH_ALIGNING)
    low, high = np.quantile(np.log(np.maximum(1 - np.array(nearest)[~alone], 1e-6)), [0.25, 0.75])
    fence = 1 - float(np.exp(low - 3 * (high - low)))
    share = _ALIGNED / max(len(flat) * (len(flat) - 1) / 2, 1)
    above = np.cumsum(counts[::-1])[::-1] / max(len(sample) * len(flat), 1)
    look = float(edges[int(np.argmax(above <= share))]) if (above <= share).any() else 1.0
    return Bounds(round(min(max(fence, LOOSEST), STRICTEST), 4), round(max(look, _WORTH_ALIGNING), 4))


def near_duplicates(spectra: AnyArray, apart: IntArray, bounds: Bounds, threads: int = 2) -> IntArray:
    """Find pairs of pictures that are nearly the same, (pairs, 2), the smaller number first.

    Args:
        spectra: (n, slabs, 32, 32).
        apart: (n,); pairs with the same number are not looked at.
    """
    hashes, weighted = _hashes(spectra), _weighted(spectra)
    sure: list[IntArray] = []
    unsure: list[IntArray] = []
    for pairs in _candidates(spectra, apart):
        bits, orientation = _hash_distance(hashes, pairs)
        kept = bits <= _HASH_LOOK
        pairs, orientation = pairs[kept], orientation[kept]
        alike = _correlation(weighted, pairs, orientation)
        sure.append(pairs[alike >= bounds.near])
        again = (alike < bounds.near) & (alike >= bounds.look)
        unsure.append(np.column_stack([pairs[again], orientation[again]]))
    rest = np.concatenate(unsure) if unsure else np.zeros((0, 3), np.int64)
    with ThreadPoolExecutor(threads) as pool:
        laid = list(pool.map(lambda row: _aligned(spectra[row[0]], spectra[row[1]], int(row[2]), bounds.near), rest))
    found = [*sure, rest[np.array(laid) >= bounds.near, :2]] if laid else sure
    every = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    return np.unique(every.reshape(-1, 2), axis=0)


def likeness(spectra: AnyArray, pairs: IntArray, threads: int = 2) -> FloatArray:
    """Correlate some pairs, (pairs,): turned as fits best, and laid on each other where they are no copies as they lie.

    Args:
        spectra: (n, slabs, 32, 32).
        pairs: (pairs, 2).
    """
    _, orientation = _hash_distance(_hashes(spectra), pairs)
    alike = _correlation(_weighted(spectra), pairs, orientation)
    unsure = np.flatnonzero(alike < STRICTEST)
    with ThreadPoolExecutor(threads) as pool:
        rows = np.column_stack([pairs, orientation])[unsure].tolist()
        laid = pool.map(lambda row: _aligned(spectra[row[0]], spectra[row[1]], row[2], STRICTEST), rows)
        for done, (row, made) in enumerate(zip(unsure, laid, strict=True), 1):
            alike[row] = max(float(alike[row]), made)
            advance("laying images on each other", done, len(unsure))
    return alike


def _hashes(spectra: AnyArray) -> AnyArray:
    """Give the hashes in all eight orientations, (8, n, 4)."""
    return np.stack([hash_of(_turned(spectra[..., :_BAND, :_BAND], orientation)) for orientation in range(8)])


def _candidates(spectra: AnyArray, apart: IntArray) -> Iterator[IntArray]:
    """Give the pairs worth a look, a block of rows at a time, (pairs, 2)."""
    known = np.flatnonzero(spectra.any(axis=(1, 2, 3)))
    signature = _signature(spectra[known])
    least = -np.inf if len(known) <= _FEW else _SIGNATURE_ALIKE
    for start in range(0, len(known), _BLOCK):
        rows = slice(start, start + _BLOCK)
        for left in range(start, len(known), 8 * _BLOCK):
            columns = slice(left, left + 8 * _BLOCK)
            alike = signature[rows] @ signature[columns].T
            first, second = np.divmod(np.flatnonzero(alike.ravel() >= least), alike.shape[1])
            first, second = known[first + start], known[second + left]
            wanted = (first < second) & (apart[first] != apart[second])
            yield np.column_stack([first[wanted], second[wanted]])
        advance("comparing images", min(start + _BLOCK, len(known)), len(known))


def _hash_distance(hashes: AnyArray, pairs: IntArray) -> tuple[IntArray, IntArray]:
    """Give the least Hamming distance over eight orientations of the first, and which orientation that is."""
    least = np.full(len(pairs), HASH_BITS + 1, np.int64)
    orientation = np.zeros(len(pairs), np.int64)
    second = hashes[0][pairs[:, 1]]
    for number, turned in enumerate(hashes):
        bits = np.bitwise_count(turned[pairs[:, 0]] ^ second).sum(axis=1, dtype=np.int64)
        orientation[bits < least] = number
        np.minimum(least, bits, out=least)
    return least, orientation


def _correlation(weighted: FloatArray, pairs: IntArray, orientation: IntArray) -> FloatArray:
    """Correlate pairs of fingerprints; of volumes as they are, or with the slabs of one in reverse."""
    alike = np.zeros(len(pairs), np.float32)
    for number in range(8):
        rows = np.flatnonzero(orientation == number)
        for some in np.array_split(rows, -(-len(rows) // 4096)) if len(rows) else ():
            first, second = _turned(weighted[pairs[some, 0]], number), weighted[pairs[some, 1]]
            forth = np.einsum("nsuv,nsuv->n", first, second)
            back = np.einsum("nsuv,nsuv->n", first[:, ::-1], second)
            alike[some] = np.maximum(forth, back)
    return alike


def _aligned(first: AnyArray, second: AnyArray, orientation: int, enough: float) -> float:
    """Lay two pictures on each other, by a small affine warp of either, and correlate what then lies there."""
    turned, other = _turned(first.astype(np.float32), orientation), second.astype(np.float32)
    best = 0.0
    for order in (slice(None), slice(None, None, -1)) if len(other) > 1 else (slice(None),):
        slabs = list(zip(turned[order], other, strict=True))
        for still, moved in ((0, 1), (1, 0)):  # whichever of them is the cropped one
            best = max(best, float(np.mean([_laid(pair[still], pair[moved]) for pair in slabs])))
            if best >= enough:
                return best
    return best


def _laid(still: AnyArray, moved: AnyArray) -> float:
    """Warp one picture onto another and correlate them; 0 where no small warp does it."""
    start = np.eye(2, 3, dtype=np.float32)
    everywhere = np.full((CORNER, CORNER), 255, np.uint8)
    small, other = _picture(still, CORNER), _picture(moved, CORNER)
    try:  # at half the size: four times as fast, and as good
        _, found = cv2.findTransformECC(small, other, start, cv2.MOTION_AFFINE, _FOUND, everywhere, 3)
    except cv2.error:  # it did not converge: these two do not lie on each other
        return 0.0
    linear = np.asarray(found)[:, :2].astype(np.float64)
    shift = 2 * np.asarray(found)[:, 2] + 0.5 - linear @ np.full(2, 0.5)
    middle = linear @ np.full(2, (SIDE - 1) / 2) + shift - (SIDE - 1) / 2
    scale, turn = np.linalg.svd(linear, compute_uv=False), abs(linear[0, 1] - linear[1, 0]) / 2
    if np.abs(scale - 1).max() > _MOST_SCALE or np.abs(middle).max() > _MOST_SHIFT or turn > _MOST_TURN:
        return 0.0
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warp = np.column_stack([linear, shift])
    laid = cv2.warpAffine(_picture(moved, SIDE), warp, (SIDE, SIDE), flags=how, borderMode=cv2.BORDER_REPLICATE)
    weighted = _weighted(np.stack([still, cv2.dct(laid)[:CORNER, :CORNER]])[:, None])
    return float((weighted[0] * weighted[1]).sum())


def _picture(spectrum: AnyArray, side: int) -> FloatArray:
    """Draw a fingerprint at some size, with variance one."""
    whole = np.zeros((side, side), np.float32)
    whole[:CORNER, :CORNER] = spectrum
    picture = cv2.idct(whole)
    return np.asarray(picture / max(float(picture.std()), 1e-12), dtype=np.float32)


def near_pairs(cohort: Cohort, prints: Fingerprints, threads: int = 2) -> Near:
    """Name pictures of different patients that are nearly the same, by the digests of their pixels.

    Raises:
        SplitError: the fingerprints are of other pictures than the cohort's.
    """
    owners = owners_of(cohort, prints)
    bounds = bounds_of(prints.spectra, owners)
    pairs = near_duplicates(prints.spectra, owners, bounds, threads)
    return Near(bounds, tuple((prints.digests[i], prints.digests[j]) for i, j in pairs.tolist()))


def owners_of(cohort: Cohort, prints: Fingerprints) -> IntArray:
    """Number the patients of the fingerprinted pictures, (n,).

    Raises:
        SplitError: the fingerprints are of other pictures than the cohort's.
    """
    owner = {study.pixel_digest: study.patient for study in cohort.studies}
    if sorted(owner) != list(prints.digests):
        raise SplitError("The fingerprints are of other images than the cohort's. Run the same command again.")
    names = np.array([owner[digest] for digest in prints.digests], dtype=str)
    return np.asarray(np.unique(names, return_inverse=True)[1])


def crossings(studies: Sequence[Study], part_of: Mapping[str, Part], near: Pairs, pretrained: Collection[str]) -> Leaks:
    """Count what stands on two sides, kind by kind.

    Args:
        part_of: study -> part; studies that are in none are left out.
        near: digests of pixels that are nearly the same.
        pretrained: studies that the weights were trained on; no leak where the study is in training.
    """
    counts: Counter[tuple[LeakKind, tuple[str, str]]] = Counter()
    kept = [study for study in studies if study.study_id in part_of]
    sides: dict[tuple[LeakKind, str], set[Part]] = defaultdict(set)
    patients: dict[str, set[str]] = defaultdict(set)
    for study in kept:
        patients[study.pixel_digest].add(study.patient)
        for link in links_of(study):
            sides[link].add(part_of[study.study_id])
    for (kind, _), where in sides.items():
        counts.update((kind, pair) for pair in combinations(sorted(where, key=PARTS.index), 2))
    for one, other in near:
        where, there = sides.get(("pixels", one), set()), sides.get(("pixels", other), set())
        if patients[one] != patients[other]:  # the same person is counted as that
            crossed = {tuple(sorted((a, b), key=PARTS.index)) for a in where for b in there if a != b}
            counts.update(("near", (first, second)) for first, second in crossed)
    for study in kept:
        if study.study_id in pretrained and part_of[study.study_id] != "train":
            counts["pretraining", ("pretraining", part_of[study.study_id])] += 1
    return tuple(Leak(kind, pair, count) for (kind, pair), count in sorted(counts.items()))


def links_of(study: Study) -> Iterator[tuple[LeakKind, str]]:
    """Name everything that binds a study to others: two studies that share one of these belong on one side."""
    yield "patient", study.patient
    yield "pixels", study.pixel_digest
    if study.exam is not None:
        yield "exam", study.exam
    yield from (("group", name) for name in study.groups)


def in_words(leaks: Leaks) -> str:
    """Say what stands on two sides: counts, never who."""
    return ", ".join(
        f"{leak.count:,} {_WORDS[leak.kind][leak.count > 1]} in both '{leak.sides[0]}' and '{leak.sides[1]}'"
        for leak in leaks
    )


def prove_clean(
    cohort: Cohort,
    split: Split,
    prints: Fingerprints,
    listed: Listed | None = None,
    near: Near | None = None,
    threads: int = 2,
) -> CleanProof:
    """Look for everything that may stand on two sides of a split, whoever made it and however.

    The split's own groups are not believed: patients, exams, groups, pixels and pictures are compared again.

    Args:
        listed: what the weights were trained on, where that is known.
        near: of the whole cohort, where it was just looked for; None: looked for here.

    Raises:
        SplitError: the fingerprints are of other pictures than the cohort's.
    """
    part_of: dict[str, Part] = {study_id: part for part in PARTS for study_id in split.part(part)}
    kept = [study for study in cohort.studies if study.study_id in part_of]
    near = near or near_pairs(cohort, prints, threads)
    pretrained = overlap(cohort, prints, listed) if listed is not None else frozenset()
    comparable = {digest for digest, yes in zip(prints.digests, prints.comparable, strict=True) if yes}
    leaks = crossings(kept, part_of, near.pairs, pretrained)
    here = {study.pixel_digest for study in kept}
    pairs = sum(one in here and other in here for one, other in near.pairs)
    return CleanProof(
        studies={part: len(split.part(part)) for part in PARTS},
        checked=_checked_by_kind(kept, comparable, listed),
        leaks=leaks,
        near=near.bounds.near,
        look=near.bounds.look,
        pairs=pairs,
        listed=len(listed) if listed is not None else None,
        notes=(*_gaps(cohort, kept, comparable, listed), *([near.note] if near.note else [])),
        by_features=near.by_features,
    )


def _checked_by_kind(kept: Sequence[Study], comparable: Collection[str], listed: Listed | None) -> dict[LeakKind, int]:
    return {
        "patient": sum(not study.patient.startswith("i-") for study in kept),
        "exam": sum(study.exam is not None for study in kept),
        "group": sum(bool(study.groups) for study in kept),
        "pixels": len(kept),
        "near": sum(study.pixel_digest in comparable for study in kept),
        "pretraining": len(kept) if listed is not None else 0,
    }


def _gaps(cohort: Cohort, kept: Sequence[Study], comparable: Collection[str], listed: Listed | None) -> tuple[str, ...]:
    """Say what a proof does not cover."""
    notes = []
    plain = sum(study.pixel_digest not in comparable for study in kept)
    if not cohort.patients_known:
        notes.append(
            "Patients are not known for all images: one person under several names is found by pictures alone."
        )
    if plain:
        notes.append(
            f"{plain} images are too plain to be compared (nearly one colour); identical ones are still found."
        )
    if listed is None:
        notes.append("No list of the images that the weights were trained on: overlap with them was not looked for.")
    return tuple(notes)


def require_clean(proof: CleanProof, split: Split) -> None:
    """Refuse a split that has more on two sides than what was allowed when it was made.

    Raises:
        SplitError: with counts per kind.
    """
    if proof.leaks != split.leaks:
        raise SplitError(
            f"The split is not what was proved: {in_words(proof.leaks) or 'nothing'}; known before were "
            f"{in_words(split.leaks) or 'none'}. Delete the artifact 'split' and run again; report it if it comes back."
        )


def read_hashes(text: str) -> Listed:
    """Read a list of the pictures that weights were trained on: one hexadecimal hash at the beginning of each line.

    64 digits are the sha256 of a file (what ``sha256sum`` writes), 32 the digest of its pixels, ``near:`` and 64 digits
    its perceptual hash (:func:`hash_lines`). Empty lines and lines that begin with # are skipped.

    Raises:
        SplitError: another line; it names its number.
    """
    files: set[str] = set()
    pixels: set[str] = set()
    hashes: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.split(maxsplit=1)[0].lower() if line.strip() else "#"
        kind, digits = ("near", word[5:]) if word.startswith("near:") else ("exact", word)
        if word.startswith("#"):
            continue
        if set(digits) - set("0123456789abcdef") or (kind, len(digits)) not in _DIGITS:
            raise SplitError(
                f"Line {number} of dataset.split.pretraining_hashes is no hash. Each line begins with a sha256 (64 hex "
                "digits), a digest of pixels (32) or near: and 64 digits."
            )
        if kind == "near":
            hashes.append(digits)
        else:
            (files if len(digits) == 64 else pixels).add(digits[:32])
    rows = np.frombuffer(bytes.fromhex("".join(sorted(set(hashes)))), dtype=np.uint8).reshape(-1, 32)
    return Listed(frozenset(files), frozenset(pixels), np.ascontiguousarray(rows).view(np.uint64))


def hash_lines(prints: Fingerprints) -> tuple[str, ...]:
    """Write the lines that tell others which pictures were trained on, without showing them: pixels and near hash."""
    hashes = hash_of(prints.spectra).view(np.uint8)
    near = [f"near:{row.tobytes().hex()}" for row, yes in zip(hashes, prints.comparable, strict=True) if yes]
    return (*prints.digests, *near)


def overlap(cohort: Cohort, prints: Fingerprints, listed: Listed) -> frozenset[str]:
    """Name the studies whose picture is on a list: its file, its pixels, or 235 of the 255 bits of its hash."""
    known = np.flatnonzero(prints.comparable)
    alike = known[_on_list(prints.spectra[known], listed.hashes)]
    pixels = listed.pixels | {prints.digests[row] for row in alike}
    return frozenset(s.study_id for s in cohort.studies if s.pixel_digest in pixels or s.scan_id[:32] in listed.files)


def _on_list(spectra: AnyArray, hashes: AnyArray) -> AnyArray:
    """Tell which pictures have a hash within 20 bits of a listed one, in any orientation, (n,).

    Two hashes that differ in 20 bits agree in one of 21 bands at least: only those pairs are counted out.
    """
    found = np.zeros(len(spectra), bool)
    if not len(hashes) or not len(spectra):
        return found
    turned = [hash_of(_turned(spectra, orientation)) for orientation in range(8)]
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    for band in np.array_split(np.arange(bits.shape[1]), HASH_ALIKE + 1):
        powers = 1 << np.arange(len(band))
        keys = bits[:, band] @ powers
        order = np.argsort(keys, kind="stable")
        for own in turned:
            wanted = np.unpackbits(own.view(np.uint8), axis=1)[:, band] @ powers
            low, high = (np.searchsorted(keys[order], wanted, side=side) for side in ("left", "right"))
            for row in np.flatnonzero((high > low) & ~found):
                near = np.bitwise_count(hashes[order[low[row] : high[row]]] ^ own[row]).sum(axis=1)
                found[row] = near.min() <= HASH_ALIKE
    return found


def near_in_features(features: FloatArray, sides: Sequence[Part], owners: Sequence[str]) -> FeatureCheck:
    """Count images of a later part whose features lie suspiciously near those of somebody in an earlier part.

    The bound comes from the data: of each image the distance to the nearest image of another owner, on any side, and
    of their logarithms the far-out fence, three interquartile ranges below the lower quartile. It warns; it proves
    nothing, because what a network finds alike may be two people.

    Args:
        features: (n, d), of the images in any order.
        sides: part of each image.
        owners: patient (or linked group) of each image.

    Returns:
        With threshold None and a note where it is not estimable.
    """
    count = len(features)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if count < FEWEST or not np.isfinite(length).all() or (length == 0).any():
        why = "features are zero or not finite" if count >= FEWEST else f"fewer than {FEWEST} images"
        return FeatureCheck(count, None, None, {}, f"not estimable: {why}")
    unit = (features / length).astype(np.float32)
    owner = np.unique(np.array(owners, dtype=str), return_inverse=True)[1]
    side = np.array([PARTS.index(part) for part in sides])
    nearest = np.column_stack([_nearest_of_others(unit, owner, side == part) for part in range(len(PARTS))])
    anywhere = nearest.min(axis=1)
    logs = np.log(anywhere[np.isfinite(anywhere)])
    low, high = np.quantile(logs, [0.25, 0.75]) if len(logs) >= FEWEST else (0.0, 0.0)
    if high - low < 1e-9:
        return FeatureCheck(
            count, None, None, {}, "not estimable: distances to other people do not differ, or are too few"
        )
    threshold = float(np.exp(low - 3 * (high - low)))
    suspects: dict[str, int] = {}
    across = np.inf
    for first, second in combinations(range(len(PARTS)), 2):
        far = nearest[side == second, first]
        suspects[f"{PARTS[first]}-{PARTS[second]}"] = int((far <= max(threshold, _SAME_FEATURES)).sum())
        across = min(across, float(far.min(initial=np.inf)))
    return FeatureCheck(count, threshold, across if np.isfinite(across) else None, suspects)


def _nearest_of_others(unit: FloatArray, owner: IntArray, among: AnyArray) -> FloatArray:
    """Give each image's cosine distance to the nearest one among some that is another owner's, (n,); inf: nobody's."""
    nearest = np.full(len(unit), np.inf)
    some = np.flatnonzero(among)
    for columns in np.split(some, range(8 * _BLOCK, len(some), 8 * _BLOCK)):  # not all at once: memory
        for start in range(0, len(unit) if len(columns) else 0, _BLOCK):
            rows = slice(start, start + _BLOCK)
            distance = np.maximum(1.0 - unit[rows] @ unit[columns].T, _SAME_FEATURES)
            distance[owner[rows, None] == owner[columns]] = np.inf
            np.minimum(nearest[rows], distance.min(axis=1), out=nearest[rows])
    return nearest
