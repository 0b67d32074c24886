"""Nobody is on two sides, whatever the cohort looks like."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.config import SplitConfig
from medtl.dataset.io import read_split, write_split
from medtl.dataset.leaks import crossings
from medtl.dataset.split import folds_within, hold_out, split_cohort
from medtl.errors import SplitError, StorageError
from medtl.records import PARTS, Cohort, Leak, Split, Study

CONFIG = SplitConfig(val=0.2, test=0.2)


def study(number: int, label: int = 0, **changes: Any) -> Study:
    pixels = sha256(str(number).encode()).hexdigest()
    made = Study(f"s-{number:04d}", f"scan-{number}", f"p-{number}", (1 - label, label), pixels)
    return replace(made, **changes)


def cohort(*studies: Study) -> Cohort:
    return Cohort("binary", ("healthy", "ill"), studies)


def sides(found: Split) -> dict[str, str]:
    return {study_id: part for part in PARTS for study_id in found.part(part)}


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Give patients with one to four images each, some images the same as another's."""
    people = draw(st.lists(st.integers(1, 4), min_size=30, max_size=60))
    studies: list[Study] = []
    for person, images in enumerate(people):
        label = person % 3 == 0
        studies += [study(len(studies) + i, label, patient=f"p-{person}") for i in range(images)]
    for first, second in draw(st.lists(st.tuples(*[st.integers(0, len(studies) - 1)] * 2), max_size=3)):
        studies[second] = replace(studies[second], pixel_digest=studies[first].pixel_digest)
    return cohort(*studies)


@given(cohorts(), st.integers(0, 3))
def test_scans_without_labels_are_held_out_by_patient_and_none_is_left_for_testing(given_: Cohort, seed: int) -> None:
    near = ((given_.studies[0].pixel_digest, given_.studies[-1].pixel_digest),)
    split = hold_out([replace(s, target=()) for s in given_.studies], 0.2, seed, near)
    found = sides(split)
    assert sorted(found) == [s.study_id for s in given_.studies] and not split.test
    assert found[given_.studies[0].study_id] == found[given_.studies[-1].study_id]
    seen: dict[str, set[str]] = defaultdict(set)
    for one in given_.studies:
        seen[one.patient].add(found[one.study_id])
    assert all(len(where) == 1 for where in seen.values())
    assert 0.1 < len(split.val) / len(found) < 0.35


@settings(max_examples=50)
@given(cohorts(), st.integers(0, 3), st.integers(2, 4))
def test_folds_of_the_training_part_hold_nobody_else_and_everybody_once(given_: Cohort, seed: int, count: int) -> None:
    outer = split_cohort(given_, SplitConfig(), seed)
    found = folds_within(given_.studies, outer, count, seed)
    assert Counter(name for inner in found for name in inner.val) == Counter(outer.train)
    for inner in found:
        assert sorted((*inner.train, *inner.val)) == sorted(outer.train) and inner.test == ()
        assert {inner.groups[name] for name in inner.train}.isdisjoint(inner.groups[name] for name in inner.val)


def test_a_training_part_of_few_patients_has_no_folds() -> None:
    few = cohort(*(study(n, n % 2) for n in range(12)))
    outer = split_cohort(few, SplitConfig(val=0.3, test=0.3), 0)
    with pytest.raises(SplitError, match=r"model\.segmenter\.members"):
        folds_within(few.studies, outer, 20, 0)


def test_one_patient_is_too_few_to_hold_anybody_out() -> None:
    with pytest.raises(SplitError, match=r"1 patients are too few .* dataset\.split\.val"):
        hold_out([study(0), study(1, patient="p-0")], 0.2, 0)


@given(cohorts(), st.integers(0, 3))
def test_no_patient_and_no_image_is_on_two_sides_and_nobody_is_lost(given_: Cohort, seed: int) -> None:
    found = sides(split_cohort(given_, CONFIG, seed))
    assert sorted(found) == [s.study_id for s in given_.studies]
    seen: dict[str, set[str]] = defaultdict(set)
    for one in given_.studies:
        seen[one.patient].add(found[one.study_id])
        seen[one.pixel_digest].add(found[one.study_id])
    assert all(len(where) == 1 for where in seen.values())


@st.composite
def linked(draw: st.DrawFn) -> tuple[Cohort, list[tuple[str, str]], list[str]]:
    """Give studies with every kind of link between any of them, near duplicates, and some the weights have seen."""
    count = draw(st.integers(60, 90))
    studies = [study(n, n % 2, part=None) for n in range(count)]
    numbers = st.tuples(*[st.integers(0, count - 1)] * 2)
    for kind in ("patient", "pixel_digest", "exam", "groups"):
        for first, second in draw(st.lists(numbers, max_size=6)):
            if kind == "groups":
                name = f"g-{first}-{second}"
                for row in {first, second}:
                    studies[row] = replace(studies[row], groups=(*studies[row].groups, name))
            else:
                value = getattr(studies[first], kind) or f"e-{first}"
                studies[first] = replace(studies[first], **{kind: value})
                studies[second] = replace(studies[second], **{kind: value})
    near = [(studies[a].pixel_digest, studies[b].pixel_digest) for a, b in draw(st.lists(numbers, max_size=6))]
    return cohort(*studies), near, [studies[row].study_id for row in draw(st.sets(st.integers(0, 9), max_size=3))]


@settings(derandomize=True, deadline=None)
@given(linked(), st.integers(0, 3))
def test_no_link_of_any_kind_ever_crosses_two_sides(
    given_: tuple[Cohort, list[tuple[str, str]], list[str]], seed: int
) -> None:
    people, near, pretrained = given_
    found = split_cohort(people, CONFIG, seed, tuple(near), pretrained)
    where = sides(found)
    assert sorted(where) == [s.study_id for s in people.studies]
    seen: dict[Any, set[str]] = defaultdict(set)
    for one in people.studies:
        for link in (("patient", one.patient), one.pixel_digest, ("exam", one.exam), *one.groups):
            if link != ("exam", None):
                seen[link].add(where[one.study_id])
    for first, second in near:
        assert seen[first] == seen[second]
    assert all(len(parts) == 1 for parts in seen.values())
    assert {where[study_id] for study_id in pretrained} <= {"train"}
    assert crossings(people.studies, where, tuple(near), pretrained) == ()  # type: ignore[arg-type]


@given(st.integers(0, 20), st.integers(60, 200), st.sampled_from([0.1, 0.15, 0.3]))
def test_each_part_gets_its_share_of_each_class(seed: int, count: int, share: float) -> None:
    studies = cohort(*(study(n, n % 4 == 0) for n in range(count)))
    found = sides(split_cohort(studies, SplitConfig(val=share, test=share), seed))
    for label in (0, 1):
        own = [s for s in studies.studies if s.target[1] == label]
        counts = Counter(found[s.study_id] for s in own)
        for part, wanted in {"val": share, "test": share, "train": 1 - 2 * share}.items():
            assert abs(counts[part] - wanted * len(own)) <= 2


@given(cohorts(), st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter(given_: Cohort, random: Any) -> None:
    before = split_cohort(given_, CONFIG, 5)
    studies = [replace(s, patient=f"q-{sha256(s.patient.encode()).hexdigest()}") for s in given_.studies]
    random.shuffle(studies)
    assert sides(split_cohort(cohort(*studies), CONFIG, 5)) == sides(before)


def test_the_seed_changes_the_split_and_repeats_it() -> None:
    people = cohort(*(study(n, n % 2) for n in range(60)))
    assert split_cohort(people, CONFIG, 1) == split_cohort(people, CONFIG, 1)
    assert sides(split_cohort(people, CONFIG, 1)) != sides(split_cohort(people, CONFIG, 2))


def test_two_patients_joined_by_one_image_are_one_group() -> None:
    people = [study(n, n % 2) for n in range(40)]
    people += [study(40, 0, patient="p-0"), study(41, 1, patient="p-1", pixel_digest=study(40).pixel_digest)]
    found = split_cohort(cohort(*people), CONFIG, 0)
    assert len({found.groups[name] for name in ("s-0000", "s-0001", "s-0040", "s-0041")}) == 1


def _parts(counts: dict[str, int]) -> list[Study]:
    parts = [part for part, n in counts.items() for _ in range(n)]
    return [study(n, n % 2, part=part) for n, part in enumerate(parts)]


def test_a_predefined_split_is_kept() -> None:
    studies = _parts({"train": 10, "val": 4, "test": 6})
    found = split_cohort(cohort(*studies), CONFIG, 0)
    assert found.predefined
    assert sides(found) == {s.study_id: s.part for s in studies}


def test_a_patient_in_two_predefined_parts_is_refused() -> None:
    studies = _parts({"train": 10, "val": 4, "test": 6})
    studies[0] = replace(studies[0], patient=studies[-1].patient)
    with pytest.raises(SplitError, match="both 'train' and 'test'"):
        split_cohort(cohort(*studies), CONFIG, 0)


LINKS: list[tuple[str, dict[str, Any]]] = [
    ("1 patient in", {"patient": "p-x"}),
    ("1 DICOM study in", {"exam": "e-x"}),
    (r"1 group \(studies.labels.groups\) in", {"groups": ("g-x",)}),
]


@pytest.mark.parametrize("said, link", LINKS)
def test_a_link_between_predefined_parts_is_refused_unless_allowed_and_then_counted(
    said: str, link: dict[str, Any]
) -> None:
    studies = _parts({"train": 10, "val": 4, "test": 6})
    for row in (0, 12, -1):
        studies[row] = replace(studies[row], **link)
    three = ", ".join(f"{said} both '{a}' and '{b}'" for a, b in (("train", "test"), ("train", "val"), ("val", "test")))
    with pytest.raises(SplitError, match=f"leaks: {three}. Give whoever .*--set dataset.split.allow_leaky_split=true"):
        split_cohort(cohort(*studies), CONFIG, 0)
    found = split_cohort(cohort(*studies), CONFIG.model_copy(update={"allow_leaky_split": True}), 0)
    assert [leak.count for leak in found.leaks] == [1, 1, 1]
    assert sides(found) == {s.study_id: s.part for s in studies}


def test_a_group_on_two_sides_needs_leaks_that_were_allowed() -> None:
    leaks = (Leak("patient", ("train", "val"), 1),)
    given_ = Split(("s-1",), ("s-2",), ("s-3",), {"s-1": "g", "s-2": "g", "s-3": "h"}, predefined=True, leaks=leaks)
    with pytest.raises(SplitError, match="both 'train' and 'val'"):
        replace(given_, leaks=())


def test_near_duplicates_in_two_predefined_parts_are_refused_and_one_patients_own_are_not_counted_twice() -> None:
    studies = _parts({"train": 10, "val": 4, "test": 6})
    near = ((studies[0].pixel_digest, studies[-1].pixel_digest), (studies[1].pixel_digest, studies[2].pixel_digest))
    with pytest.raises(SplitError, match="leaks: 1 pair of nearly the same image in both 'train' and 'test'"):
        split_cohort(cohort(*studies), CONFIG, 0, near)
    studies[0] = replace(studies[0], patient=studies[-1].patient)
    with pytest.raises(SplitError, match=r"leaks: 1 patient in both 'train' and 'test'\. Give"):
        split_cohort(cohort(*studies), CONFIG, 0, near)


def test_a_copy_is_taken_out_of_the_less_precious_part() -> None:
    studies = _parts({"train": 10, "val": 4, "test": 6})
    studies[0] = replace(studies[0], pixel_digest=studies[-1].pixel_digest)
    studies[11] = replace(studies[11], pixel_digest=studies[-2].pixel_digest)
    found = split_cohort(cohort(*studies), CONFIG, 0)
    assert [(e.item, e.code) for e in found.exclusions] == [
        ("s-0000", "copy_across_parts"),
        ("s-0011", "copy_across_parts"),
    ]
    assert set(sides(found)) == {s.study_id for s in studies} - {"s-0000", "s-0011"}


@pytest.mark.parametrize("there, lacking", [("test", "val"), ("val", "test")])
def test_a_part_that_is_missing_is_cut_from_training(there: str, lacking: str) -> None:
    studies = _parts({"train": 50, there: 10})
    found = sides(split_cohort(cohort(*studies), CONFIG, 0))
    counts = Counter(found.values())
    assert counts[there] == 10 and 8 <= counts[lacking] <= 12
    assert all(found[s.study_id] == there for s in studies if s.part == there)
    assert all(found[s.study_id] in ("train", lacking) for s in studies if s.part == "train")


def test_half_a_predefined_split_is_refused() -> None:
    studies = _parts({"train": 10, "val": 4, "test": 6})
    studies[3] = replace(studies[3], part=None)
    with pytest.raises(SplitError, match="1 studies have no part"):
        split_cohort(cohort(*studies), CONFIG, 0)


@pytest.mark.parametrize("people", [1, 2])
def test_too_few_patients_are_refused(people: int) -> None:
    with pytest.raises(SplitError, match="too few"):
        split_cohort(cohort(*(study(n, n % 2, patient=f"p-{n % people}") for n in range(20))), CONFIG, 0)


def test_a_class_missing_from_training_is_refused() -> None:
    studies = [replace(s, target=(0, 1) if s.part == "test" else (1, 0)) for s in _parts({"train": 9, "test": 9})]
    with pytest.raises(SplitError, match="No training study shows class 'ill'"):
        split_cohort(cohort(*studies), CONFIG, 0)


def test_a_split_comes_back_from_disk_and_a_shared_patient_is_refused_there_too(tmp_path: Path) -> None:
    found = split_cohort(cohort(*(study(n, n % 2) for n in range(40))), CONFIG, 0)
    write_split(tmp_path, found)
    assert read_split(tmp_path) == found
    path = tmp_path / "split.json"
    groups = found.groups[found.train[0]], found.groups[found.test[0]]
    path.write_text(path.read_text().replace(*groups))
    with pytest.raises((SplitError, StorageError), match="both 'train' and 'test'"):
        read_split(tmp_path)
