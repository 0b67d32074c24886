"""Nobody is on two sides; the same images give the same split; a plan sees training only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.config import PlanConfig, SplitConfig, TransformsConfig
from medtl.dataset.loading import EvaluationBatches, TrainingBatches
from medtl.dataset.plan import make_plan
from medtl.dataset.split import split_cohort
from medtl.dataset.transforms import Augmentation, augment, prepare, sample
from medtl.errors import PlanError, SplitError
from medtl.records import PARTS, Cohort, Plan, Scan, Study


def study(number: int, patient: str, label: int, pixels: str | None = None, part: Any = None) -> Study:
    target = (1 - label, label)
    return Study(
        f"s-{number:04d}", f"{number}", patient, target, pixels or f"pixels-{number * 7919 % 10007:05d}", part=part
    )


def cohort(*studies: Study) -> Cohort:
    return Cohort("binary", ("no", "yes"), tuple(sorted(studies, key=lambda s: s.study_id)))


def plain(patients: int = 60, images: int = 2, prefix: str = "p") -> Cohort:
    return cohort(*(study(p * images + i, f"{prefix}{p}", p % 3 == 0) for p in range(patients) for i in range(images)))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1)), min_size=40, max_size=90), st.integers(0, 99))
def test_no_patient_is_ever_on_two_sides(rows: list[tuple[int, int]], seed: int) -> None:
    rows = [*rows, *[(100 + i, i % 2) for i in range(30)]]
    known = cohort(*(study(i, f"p{p}", label) for i, (p, label) in enumerate(rows)))
    split = split_cohort(known, SplitConfig(), seed)
    sides = [{s.patient for s in known.studies if s.study_id in split.part(part)} for part in PARTS]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert sum(len(split.part(part)) for part in PARTS) == len(rows)


def test_shares_and_classes_are_kept() -> None:
    known = plain(200)
    split = split_cohort(known, SplitConfig(val=0.15, test=0.2), 0)
    label = {s.study_id: s.target[1] for s in known.studies}
    for part, share in (("train", 0.65), ("val", 0.15), ("test", 0.2)):
        ids = split.part(part)  # type: ignore[arg-type]
        assert len(ids) / 400 == pytest.approx(share, abs=0.02)
        assert np.mean([label[i] for i in ids]) == pytest.approx(1 / 3, abs=0.05)


def test_the_split_depends_on_pixels_and_seed_not_on_names() -> None:
    by_pixels = []
    for known in (plain(prefix="p"), plain(prefix="other")):
        pixels = {s.study_id: s.pixel_digest for s in known.studies}
        by_pixels.append({pixels[i] for i in split_cohort(known, SplitConfig(), 0).test})
    assert by_pixels[0] == by_pixels[1]
    assert split_cohort(plain(), SplitConfig(), 1).test != split_cohort(plain(), SplitConfig(), 0).test


def test_identical_pixels_stay_together_whoever_they_belong_to() -> None:
    twins = [study(1000 + i, f"twin{i}", 0, pixels="same") for i in range(12)]
    split = split_cohort(cohort(*plain().studies, *twins), SplitConfig(), 0)
    sides = [sum(t.study_id in split.part(part) for t in twins) for part in PARTS]
    assert sorted(sides) == [0, 0, 12]


def test_a_patient_in_two_predefined_parts_is_refused() -> None:
    parts = ["train"] * 10 + ["test"] * 10 + ["val"] * 10
    studies = [study(i, f"p{i % 25}", i % 2, part=part) for i, part in enumerate(parts)]
    with pytest.raises(SplitError, match="in both"):
        split_cohort(cohort(*studies), SplitConfig(), 0)


def test_a_copy_across_predefined_parts_leaves_training() -> None:
    parts = ["train"] * 10 + ["test"] * 10 + ["val"] * 10
    studies = [study(i, f"p{i}", i % 2, "same" if i in (0, 12) else None, part) for i, part in enumerate(parts)]
    split = split_cohort(cohort(*studies), SplitConfig(), 0)
    assert split.predefined
    assert [e.item for e in split.exclusions] == ["s-0000"]
    assert "s-0012" in split.test


def test_a_predefined_split_without_a_test_part_gets_one_from_training() -> None:
    parts = ["train"] * 40 + ["val"] * 10
    studies = [study(i, f"p{i}", i % 2, part=part) for i, part in enumerate(parts)]
    split = split_cohort(cohort(*studies), SplitConfig(test=0.25), 0)
    assert len(split.test) == 10
    assert {s.study_id for s in studies[40:]} == set(split.val)


def test_too_few_patients_are_refused_with_a_reason() -> None:
    with pytest.raises(SplitError, match="too few"):
        split_cohort(cohort(study(0, "a", 0), study(1, "b", 1)), SplitConfig(), 0)


# ------------------------------------------------------------------------------------------------- plan


def scan(pixels: Any, number: int = 0, modality: str | None = None, bits: int = 8) -> Scan:
    return Scan(str(number), "x", pixels.shape, pixels.dtype.str, 0, str(number), (), bits, modality=modality)


def planned(images: list[Any], modality: str | None = None, bits: int = 8, **options: Any) -> Plan:
    scans = [scan(image, i, modality, bits) for i, image in enumerate(images)]
    return make_plan(scans, lambda s: images[int(s.scan_id)], "binary", ("a", "b"), PlanConfig(**options), 32)


def test_eight_bit_images_stay_as_they_are() -> None:
    plan = planned([np.arange(3600, dtype=np.uint8).reshape(60, 60)])
    assert (plan.size, plan.bits, plan.channels, plan.intensity, plan.low, plan.high) == (
        (64, 64),
        8,
        1,
        "fixed",
        0,
        255,
    )


def test_ct_is_fixed_and_other_deep_images_are_per_image() -> None:
    deep = [np.arange(4096, dtype=np.int16).reshape(64, 64) - 1000]
    ct, cr = planned(deep, "CT", 12), planned(deep, "CR", 12)
    assert (ct.intensity, ct.bits) == ("fixed", 16)
    assert ct.low == pytest.approx(-979.5, abs=25)
    assert (cr.intensity, cr.low) == ("per_image", None)
    assert "no absolute scale" in cr.reasons["intensity"]


def test_the_config_may_decide_and_the_plan_says_so() -> None:
    plan = planned([np.zeros((60, 60, 3), np.uint8)], size=48, channels=1)
    assert (plan.size, plan.channels) == ((48, 48), 1)
    assert plan.reasons["size"] == "48: set by the config"
    with pytest.raises(PlanError, match="takes 32 or more"):
        planned([np.zeros((60, 60), np.uint8)], size=16)


# -------------------------------------------------------------------------------------------- transforms


def test_prepare_keeps_the_aspect_and_pads_with_dark() -> None:
    plan = planned([np.full((60, 60), 9, np.uint8)], size=32)
    out = prepare(np.full((20, 40), 200, np.uint8), plan)
    assert out.shape == (32, 32, 1)
    assert (out[8:24] == 200).all()
    assert (out[:8] == 0).all()
    assert (out[24:] == 0).all()


def test_prepare_keeps_sixteen_bits() -> None:
    image = (np.arange(4096).reshape(64, 64) % 4096).astype(np.uint16)
    plan = planned([image], "CR", 12, size=64)
    out = prepare(image, plan)
    assert out.dtype == np.uint16
    assert len(np.unique(out)) > 4000


def test_the_same_draw_gives_the_same_picture_and_no_draw_none() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 1), dtype=np.uint8)
    drawn = sample(np.random.default_rng(5), 3, (24, 24), TransformsConfig())
    assert np.array_equal(augment(images, drawn), augment(images, drawn))
    still = Augmentation(np.tile([[1.0, 0, 0], [0, 1, 0]], (3, 1, 1)), np.ones(3), np.zeros(3))
    assert np.array_equal(augment(images, still), images)
    quiet = {"rotate_degrees": 0, "scale": 0, "shift": 0, "brightness": 0, "contrast": 0}
    mirrored = augment(images, sample(np.random.default_rng(1), 3, (24, 24), TransformsConfig(**quiet)))
    for image, out in zip(images, mirrored, strict=True):
        assert np.array_equal(out, image) or np.array_equal(out, image[:, ::-1])


def test_an_epoch_is_repeatable_and_shows_every_image_once() -> None:
    images = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    targets = np.eye(2)[np.arange(50) % 2]
    batches = TrainingBatches(images, targets, list(range(5, 50)), 8, TransformsConfig(), 3)
    seen = [batch for batch, _ in batches.epoch(0, 1, augmented=False)]
    assert sorted(np.concatenate(seen)[:, 0, 0, 0].tolist()) == list(range(5, 50))
    assert {len(batch) for batch in seen} == {7, 8}
    again = [batch for batch, _ in batches.epoch(0, 1, augmented=False)]
    assert all(np.array_equal(a, b) for a, b in zip(seen, again, strict=True))
    assert not np.array_equal(seen[0], next(iter(batches.epoch(0, 2, augmented=False)))[0])
    assert [len(b) for b, _ in EvaluationBatches(images, targets, list(range(10)), 8)] == [8, 2]
