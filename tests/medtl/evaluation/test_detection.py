"""Findings are matched, ranked and counted as LUNA16, COCO and VOC say, and patients without any show nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_froc_curve_data
from sklearn.metrics import roc_curve

from medtl.config import UncertaintyConfig
from medtl.evaluation.detection import (
    COCO_RULES,
    RATES,
    Findings,
    HitRule,
    _area,
    average_precision,
    froc,
    intersection_over_union,
    ranked,
)

Array = np.ndarray[Any, np.dtype[Any]]
SOME = settings(derandomize=True, max_examples=30, deadline=None)
CONFIG = UncertaintyConfig(resamples=100)
HALF = HitRule("overlap", 0.5)
PYCOCOTOOLS = {"nodule": 0.1471224308265621, "cyst": 0.12785215234947891}


def images(seed: int, count: int = 12, axes: int = 2, decimals: int = 6) -> list[Findings]:
    """Give images of some boxes, most of them found, some twice, and some false alarms; two images per patient."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        low = rng.uniform(0, 60, (rng.integers(0, 4), axes))
        truth = np.hstack([low, low + rng.uniform(8, 30, low.shape)])
        repeated = truth[rng.integers(0, max(1, len(truth)), rng.integers(0, 5) if len(truth) else 0)]
        near = repeated + rng.normal(0, 1.5, repeated.shape)
        low = rng.uniform(0, 60, (rng.integers(0, 4), axes))
        found = np.concatenate([near, np.hstack([low, low + rng.uniform(8, 30, low.shape)])])
        scores = np.round(rng.random(len(found)), decimals)
        made.append(Findings(f"i-{number:03d}", f"p-{number // 2:03d}", truth, found, scores))
    return made


def points(some: list[Findings], radius: float | None = None) -> list[Findings]:
    """Give the centres of boxes, and to each true one its radius."""
    made = []
    for image in some:
        truth, found = ((boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (image.truth, image.found))
        radii = np.full(len(truth), radius) if radius else (image.truth[:, 2] - image.truth[:, 0]) / 2
        made.append(Findings(image.image_id, image.patient, truth, found, image.scores, radii))
    return made


def iou(one: Array, other: Array) -> float:
    """Compare two boxes side by side."""
    half, shared, sizes = len(one) // 2, 1.0, [1.0, 1.0]
    for axis in range(half):
        shared *= max(0.0, min(one[half + axis], other[half + axis]) - max(one[axis], other[axis]))
        for which, box in enumerate((one, other)):
            sizes[which] *= box[half + axis] - box[axis]
    return float(shared / (sum(sizes) - shared)) if sum(sizes) > shared else 0.0


def one_by_one(some: list[Findings], limit: float) -> tuple[list[tuple[float, bool]], int]:
    """Match as COCO's pages say: each detection, the surest first, the best of the findings that are still free."""
    called, findings = [], 0
    for image in some:
        free = list(range(len(image.truth)))
        findings += len(free)
        for row in np.argsort(-image.scores, kind="stable"):
            best = max(free, key=lambda m: iou(image.found[row], image.truth[m]), default=None)
            hit = best is not None and iou(image.found[row], image.truth[best]) >= limit
            if hit and best is not None:
                free.remove(best)
            called.append((float(image.scores[row]), hit))
    return sorted(called, key=lambda one: -one[0]), findings


def slow_area(called: list[tuple[float, bool]], findings: int, coco: bool) -> float:
    """Draw precision over recall threshold by threshold."""
    line = []
    for threshold in sorted({score for score, _ in called}, reverse=True):
        hits = [hit for score, hit in called if score >= threshold]
        line.append((sum(hits) / findings, sum(hits) / len(hits)))
    best = [(recall, max(p for r, p in line if r >= recall)) for recall, _ in line]
    if coco:
        wanted = np.linspace(0, 1, 101)
        return float(np.mean([max((p for r, p in best if r >= at), default=0.0) for at in wanted]))
    recalls = [0.0, *(recall for recall, _ in best)]
    return sum((r - before) * p for before, (r, p) in zip(recalls, best, strict=False))


@SOME
@given(seed=st.integers(0, 9999), decimals=st.sampled_from([1, 6]), how=st.sampled_from(["coco", "voc"]))
def test_average_precision_is_that_of_every_threshold_looked_at(seed: int, decimals: int, how: Any) -> None:
    some = images(seed, decimals=decimals)
    found = average_precision({"nodule": some}, CONFIG, 0, (HALF,), how)
    assert found.classes[0].value == pytest.approx(slow_area(*one_by_one(some, 0.5), coco=how == "coco"), abs=1e-12)


def test_the_values_of_pycocotools_were_these() -> None:
    """Computed once with pycocotools 2.0.11 on the same boxes, scores without ties."""
    found = average_precision({"nodule": images(1, 30), "cyst": images(2, 30)}, CONFIG, 0)
    assert {score.label: score.value for score in found.classes} == pytest.approx(PYCOCOTOOLS, abs=1e-12)
    assert found.mean.value == pytest.approx(np.mean(list(PYCOCOTOOLS.values())), abs=1e-12)
    assert "IoU of at least 0.50 to 0.95" in found.convention and "COCO" in found.convention


@SOME
@given(seed=st.integers(0, 9999), axes=st.integers(2, 3))
def test_iou_is_that_of_two_boxes_side_by_side(seed: int, axes: int) -> None:
    (one,), (other,) = images(seed, 1, axes), images(seed + 1, 1, axes)
    wanted = [[iou(a, b) for b in other.found] for a in one.found]
    found = intersection_over_union(one.found, other.found)
    assert found == pytest.approx(np.array(wanted).reshape(found.shape), abs=1e-15)
    assert intersection_over_union(one.found, one.found).diagonal() == pytest.approx(1)


@SOME
@given(seed=st.integers(0, 9999), decimals=st.sampled_from([1, 6]))
def test_froc_is_the_curve_of_luna16(seed: int, decimals: int) -> None:
    """LUNA16's script scales scikit-learn's ROC curve, which is without missed findings and second detections."""
    some = points(images(seed, decimals=decimals))
    ranking = ranked(some, HitRule("distance"), seconds="neither")
    kept = (ranking.hit + ranking.miss) > 0
    if len(set(ranking.hit[kept])) < 2:
        return
    false, true, _ = roc_curve(ranking.hit[kept], ranking.score[kept])
    per_image = false * ranking.miss.sum() / len(some)
    sensitivity = true * ranking.hit.sum() / ranking.findings.sum()
    found = froc(some, HitRule("distance"), CONFIG, 0)
    wanted = np.interp(RATES, per_image, sensitivity)
    assert [score.value for score in found.at] == pytest.approx(wanted, abs=1e-12)
    assert found.mean.value == pytest.approx(wanted.mean(), abs=1e-12)


def test_the_curve_is_monais() -> None:
    some = points(images(5, 40))
    ranking, found = ranked(some, HitRule("distance"), seconds="neither"), froc(some, HitRule("distance"), CONFIG, 0)
    false, true = ranking.score[ranking.miss > 0], ranking.score[ranking.hit > 0]
    per_image, sensitivity = compute_froc_curve_data(false, true, int(ranking.findings.sum()), len(some))
    curve = set(zip(np.round(found.false_positives_per_image, 9), np.round(found.sensitivity, 9), strict=True))
    assert set(zip(np.round(per_image, 9), np.round(sensitivity, 9), strict=True)) <= curve


def box(*corners: float) -> list[float]:
    return [*corners, *(corner + 10 for corner in corners)]


def findings(truth: list[Any], found: list[Any], scores: list[float], **more: Any) -> Findings:
    true, called = (np.array(some, float).reshape(-1, 4) for some in (truth, found))
    return Findings("i", "p", true, called, np.array(scores, float), **more)


def marks(image: Findings, rule: HitRule = HALF, seconds: Any = "neither") -> list[tuple[float, float]]:
    ranking = ranked([image], rule, seconds)
    return list(zip(ranking.hit, ranking.miss, strict=True))


def test_the_surest_detection_takes_the_finding_and_the_second_is_what_was_said() -> None:
    image = findings([box(0, 0)], [box(0, 0), box(1, 0), box(50, 50)], [0.2, 0.9, 0.5])
    assert marks(image, seconds="neither") == [(1, 0), (0, 1), (0, 0)]
    assert marks(image, seconds="miss") == [(1, 0), (0, 1), (0, 1)]


def test_a_detection_of_two_findings_takes_the_nearer_and_leaves_the_other() -> None:
    image = findings([box(0, 0), box(4, 0)], [box(3, 0), box(-2, 0)], [0.9, 0.8])
    assert marks(image, seconds="miss") == [(1, 0), (1, 0)]


def test_findings_that_do_not_count_make_neither_hits_nor_misses() -> None:
    some = findings([box(0, 0), box(50, 50)], [box(50, 50), box(51, 50), box(0, 0)], [0.9, 0.8, 0.7])
    image = replace(some, ignored=np.array([False, True]))
    assert marks(image, seconds="miss") == [(0, 0), (0, 0), (1, 0)]
    beside = findings([box(0, 0), box(4, 0)], [box(0, 0), box(2, 0)], [0.9, 0.8], ignored=np.array([False, True]))
    assert marks(beside, seconds="miss") == [(1, 0), (0, 0)]
    found = froc([image], HALF, CONFIG, 0)
    assert (found.findings, found.mean.value, found.false_positives_per_image[-1]) == (1, 1.0, 0.0)


def test_boxes_can_be_hit_by_distance_and_each_finding_can_have_its_radius() -> None:
    image = findings([box(0, 0), box(40, 0)], [box(3, 4), box(43, 4)], [0.9, 0.8], radii_mm=np.array([5.0, 4.9]))
    assert marks(image, HitRule("distance")) == [(1, 0), (0, 1)]
    assert marks(image, HitRule("distance", 5.0)) == [(1, 0), (1, 0)]


def test_coco_counts_at_most_a_hundred_detections_of_an_image_and_voc_all() -> None:
    image = findings([box(0, 0)], [box(50, 50)] * 100 + [box(0, 0)], [0.9] * 100 + [0.5])
    assert average_precision({"a": [image]}, CONFIG, 0, (HALF,)).mean.value == 0
    assert average_precision({"a": [image]}, CONFIG, 0, (HALF,), "voc").mean.value == pytest.approx(1 / 101)


@SOME
@given(seed=st.integers(0, 9999))
def test_neither_the_order_of_the_images_nor_the_scale_of_the_scores_matters(seed: int) -> None:
    some = images(seed, decimals=1)
    rng = np.random.default_rng(seed)
    other = [replace(some[n], scores=np.exp(3 * some[n].scores)) for n in rng.permutation(len(some))]
    if not any(len(image.truth) for image in some):
        return
    one, two = (average_precision({"a": group}, CONFIG, 0, (HALF,)).mean for group in (some, other))
    assert (one.value, one.low, one.high) == pytest.approx((two.value, two.low, two.high))
    first, second = (froc(group, HALF, CONFIG, 0).mean for group in (some, other))
    assert (first.value, first.low, first.high) == pytest.approx((second.value, second.low, second.high))


@SOME
@given(seed=st.integers(0, 9999))
def test_sensitivity_grows_with_the_false_positives_that_are_let_in(seed: int) -> None:
    values = [score.value for score in froc(images(seed, 20), HALF, CONFIG, 0).at]
    assert None not in values and values == sorted(values, key=float) and 0 <= values[0] <= values[-1] <= 1  # type: ignore


def test_intervals_are_over_patients() -> None:
    some = images(0, 80)
    again = [replace(image, image_id=f"{image.image_id}-{n}") for n in range(4) for image in some]
    once, copied = (froc(group, HALF, UncertaintyConfig(resamples=500), 0).mean for group in (some, again))
    assert (once.n, once.patients, copied.n, copied.patients) == (80, 40, 320, 40)
    assert (copied.value, copied.low, copied.high) == pytest.approx((once.value, once.low, once.high), abs=0.02)
    one, four = (average_precision({"a": group}, CONFIG, 0, (HALF,)).mean for group in (some, again))
    assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=0.03)


def test_patients_without_findings_cannot_make_an_interval_of_a_sensitivity() -> None:
    image = findings([box(0, 0)], [box(0, 0)], [0.5])
    bare = findings([], [box(0, 0)], [0.4])
    some = [image, *(replace(bare, image_id=f"i-{n}", patient=f"p-{n}") for n in range(9))]
    for score in (froc(some, HALF, CONFIG, 0).at[0], average_precision({"a": some}, CONFIG, 0).classes[0]):
        assert (score.value, score.low, score.patients) == (1.0, None, 10) and "fewer than two patients" in score.note


def test_a_resample_without_findings_has_no_value() -> None:
    ranking = ranked([findings([box(0, 0)], [], [])], HALF, "miss")
    assert np.isnan(_area(ranking, np.zeros(1), "coco")) and np.isnan(_area(ranking, np.zeros(1), "voc"))


def test_without_a_finding_or_with_a_score_that_is_no_number_nothing_is_estimable() -> None:
    nothing = findings([], [box(0, 0)], [0.5])
    unsure = findings([box(0, 0)], [box(0, 0)], [float("nan")])
    for image, why in ((nothing, "no image has a true finding"), (unsure, "not a number")):
        found = froc([image], HALF, CONFIG, 0)
        assert found.mean.value is None and why in found.mean.note and {s.value for s in found.at} == {None}
        precision = average_precision({"a": [image]}, CONFIG, 0)
        assert precision.mean.value is None and why in precision.mean.note and precision.classes[0].value is None


def test_findings_that_nothing_was_said_of_are_all_missed() -> None:
    silent = findings([box(0, 0)], [], [])
    assert froc([silent], HALF, CONFIG, 0).mean.value == 0
    assert average_precision({"a": [silent]}, CONFIG, 0).mean.value == 0


def test_a_class_without_findings_is_left_out_of_the_mean_and_said() -> None:
    some = images(0, 20)
    bare = [replace(image, truth=np.empty((0, 4))) for image in some]
    found = average_precision({"nodule": some, "cyst": bare}, CONFIG, 0)
    assert found.classes[1].value is None and found.mean.value == found.classes[0].value
    assert "1 of 2 classes" in found.mean.note


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": np.zeros(2)}, "one score per detection"),
        ({"radii_mm": np.zeros(3)}, "one radius"),
        ({"ignored": np.zeros(3, bool)}, "one radius and one mark"),
        ({"found": np.zeros((1, 6))}, "the same in truth"),
        ({"found": np.array([[5.0, 5, 4, 9]])}, "lower corner"),
        ({"found": np.array([[5.0, np.nan, 9, 9]])}, "finite"),
    ],
)
def test_findings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(findings([box(0, 0)], [box(0, 0)], [0.5]), **changes)


def test_what_cannot_be_asked_is_refused() -> None:
    some, centres = images(0), points(images(0))
    for message, ask in (
        ("each once", lambda: froc([some[0], some[0]], HALF, CONFIG, 0)),
        ("each once", lambda: froc([], HALF, CONFIG, 0)),
        ("points have no overlap", lambda: froc(centres, HALF, CONFIG, 0)),
        ("same dimensions", lambda: froc([some[0], centres[1]], HitRule("distance", 1.0), CONFIG, 0)),
        ("give the rule a distance", lambda: froc(some, HitRule("distance"), CONFIG, 0)),
        ("at least one rule", lambda: average_precision({"a": some}, CONFIG, 0, ())),
        ("same images", lambda: average_precision({"a": some, "b": some[1:]}, CONFIG, 0)),
        ("IoU above 0", lambda: HitRule("overlap", 0.0)),
        ("radius of 0 mm", lambda: HitRule("distance", -1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    assert len(COCO_RULES) == 10
