"""A copy that its hash does not tell is found by features and by laying it on its original; strangers are not."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from medtl.dataset.leaks import Fingerprints, bounds_of, fingerprint_scans, near_duplicates, near_pairs
from medtl.dataset.lookalikes import SIDE, near_by_features, thumbnail, with_features
from medtl.records import AnyArray, Cohort, FloatArray, Scan, Study

STRAIGHT = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0))
COUNT = 120


def picture(seed: int) -> AnyArray:
    """Draw a picture as nature does: the finer the fainter."""
    rng = np.random.default_rng([seed, 77])
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(112), np.fft.fftfreq(96)))
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(96, 112))) / np.maximum(frequency, 0.02) ** 1.5).real
    return np.array(np.clip(128 + 38 * (field - field.mean()) / field.std(), 5, 235), dtype=np.uint8)


def turned(pixels: AnyArray, degrees: float) -> AnyArray:
    rows, columns = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D((columns / 2, rows / 2), degrees, 1)
    return np.asarray(cv2.warpAffine(pixels, matrix, (columns, rows), borderMode=cv2.BORDER_REFLECT_101))


def prints_of(pictures: list[AnyArray]) -> Fingerprints:
    scans = [Scan(f"{n}", "image", p.shape, "|u1", f"{n:04d}", (), 8) for n, p in enumerate(pictures)]
    return fingerprint_scans(scans, lambda scan: pictures[int(scan.pixel_digest)])


def features_of(count: int) -> FloatArray:
    """Draw features of people who have much in common."""
    rng = np.random.default_rng(5)
    return np.asarray(3 * rng.normal(size=32) + rng.normal(size=(count, 32)))


def near(one: FloatArray) -> FloatArray:
    return np.asarray(one + np.random.default_rng(6).normal(size=32) * 0.1)


def found(features: FloatArray, prints: Fingerprints, owners: AnyArray | None = None) -> list[list[int]]:
    own = np.arange(len(features)) if owners is None else owners
    pairs: list[list[int]] = near_by_features(features, prints, own)[0].tolist()
    return pairs


COPIES: dict[str, Callable[[AnyArray], AnyArray]] = {
    "turned by 8 degrees": lambda p: turned(p, 8),
    "cropped by 15 %": lambda p: p[7:-7, 8:-8],
    "turned and cropped": lambda p: turned(p, 6)[4:-4, 4:-4],
    "turned, and mirrored": lambda p: np.ascontiguousarray(turned(p, 7)[:, ::-1]),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_pictures_alone_do_not_tell_is_told_by_features(name: str) -> None:
    pictures = [picture(seed) for seed in range(COUNT)]
    features = features_of(COUNT)
    prints = prints_of([*pictures, COPIES[name](pictures[3])])
    own = np.arange(COUNT + 1)
    assert near_duplicates(prints.spectra, own, bounds_of(prints.spectra, own)).tolist() == []
    assert found(np.vstack([features, near(features[3])]), prints) == [[3, COUNT]]
    assert found(np.vstack([features, near(features[3])]), prints, np.array([*range(COUNT), 3])) == []


def test_strangers_are_no_copies_in_whichever_of_the_two_they_stand_out() -> None:
    pictures = [picture(seed) for seed in range(COUNT)]
    features = features_of(COUNT + 1)
    assert found(features, prints_of([*pictures, turned(pictures[3], 8)])) == []  # nothing in features says so
    features[COUNT] = features[3] + features[COUNT] - features.mean(0)  # nearest, by no more than others are
    assert found(features, prints_of([*pictures, turned(pictures[3], 8)])) == []
    features[COUNT] = near(features[3])
    assert found(features, prints_of([*pictures, picture(999)])) == []  # a network finds them alike, and they are not


def test_the_order_of_the_pictures_changes_nothing() -> None:
    pictures = [picture(seed) for seed in range(COUNT)]
    pictures += [turned(pictures[3], 8), turned(pictures[50], -7)]
    features = features_of(COUNT + 2)
    features[COUNT:] = [near(features[3]), near(features[50])]
    order = np.random.default_rng(0).permutation(COUNT + 2)
    there = found(features[order], prints_of([pictures[n] for n in order]))
    assert sorted(sorted(order[pair].tolist()) for pair in there) == [[3, COUNT], [50, COUNT + 1]]


def test_pairs_by_features_join_those_by_pictures_and_are_counted() -> None:
    pictures = [picture(seed) for seed in range(COUNT)]
    pictures += [turned(pictures[3], 8), np.ascontiguousarray(pictures[7][:, ::-1])]
    features = features_of(COUNT + 2)
    features[COUNT:] = [near(features[3]), near(features[7])]
    prints = prints_of(pictures)
    studies = [Study(f"s-{d}", d, f"p-{d}", (n % 2, 1 - n % 2), d) for n, d in enumerate(prints.digests)]
    cohort = Cohort("binary", ("well", "ill"), tuple(studies))
    alone = near_pairs(cohort, prints)
    assert alone.pairs == (("0007", f"{COUNT + 1:04d}"),)
    joined = with_features(alone, cohort, prints, features)
    assert joined.pairs == (("0003", f"{COUNT:04d}"), *alone.pairs)
    assert joined.by_features is not None and joined.by_features.pairs == 1
    assert 0 < joined.by_features.distance < 1 and 0 < joined.by_features.likeness < 1


def test_fewer_than_forty_pictures_and_plain_ones_give_no_estimate() -> None:
    pictures = [picture(seed) for seed in range(39)]
    prints = prints_of([*pictures, *(np.full((64, 64), value, np.uint8) for value in range(20))])
    assert near_by_features(features_of(59), prints, np.arange(59)) == (pytest.approx(np.zeros((0, 2))), None)
    studies = [Study(f"s-{d}", d, f"p-{d}", (1, 0), d) for d in prints.digests]
    cohort = Cohort("binary", ("well", "ill"), tuple(studies))
    said = with_features(near_pairs(cohort, prints), cohort, prints, features_of(59))
    assert said.by_features is None and "not estimable with fewer than 40" in said.note


def test_thumbnails_have_one_size_and_the_ends_of_a_pictures_own_values() -> None:
    grey = picture(0)
    assert thumbnail(grey, scan_of(grey)).shape == (SIDE, SIDE, 3)
    assert (np.diff(thumbnail(grey, scan_of(grey)).astype(int), axis=2) == 0).all()
    colour = np.stack([grey, grey // 2, grey // 4], -1)
    means = thumbnail(colour, scan_of(colour)).mean((0, 1))
    np.testing.assert_allclose(means, colour.mean((0, 1)), atol=1)
    deep = grey.astype(np.int16) * 40 - 2000
    np.testing.assert_allclose(thumbnail(deep, scan_of(deep)), thumbnail(deep * 2 + 7, scan_of(deep)), atol=1)
    assert np.percentile(thumbnail(deep, scan_of(deep)), [2, 98]) == pytest.approx([0, 255], abs=25)


def test_a_volume_is_shown_by_its_middle_slice_along_its_coarsest_axis() -> None:
    volume = np.stack([picture(seed) for seed in range(5)])
    scan = Scan("v", "nifti", volume.shape, "|u1", "v", (), 8, affine=STRAIGHT)
    shown = thumbnail(volume, scan)[..., 0].astype(float)
    middle = thumbnail(volume[2], scan_of(volume[2]))[..., 0].astype(float)
    ways = [np.rot90(flipped, k) for flipped in (middle, middle[::-1]) for k in range(4)]
    assert max(np.corrcoef(shown.ravel(), way.ravel())[0, 1] for way in ways) > 0.999


def scan_of(pixels: AnyArray) -> Scan:
    return Scan("p", "image", pixels.shape, pixels.dtype.str, "p", (), 8)
