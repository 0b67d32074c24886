"""Nobody is on two sides, whatever the cohort looks like."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtl.config import SplitConfig
from medtl.dataset.io import read_split, write_split
from medtl.dataset.split import split_cohort
from medtl.errors import SplitError, StorageError
from medtl.records import PARTS, Cohort, Split, Study

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
def test_no_patient_and_no_image_is_on_two_sides_and_nobody_is_lost(given_: Cohort, seed: int) -> None:
    found = sides(split_cohort(given_, CONFIG, seed))
    assert sorted(found) == [s.study_id for s in given_.studies]
    seen: dict[str, set[str]] = defaultdict(set)
    for one in given_.studies:
        seen[one.patient].add(found[one.study_id])
        seen[one.pixel_digest].add(found[one.study_id])
    assert all(len(where) == 1 for where in seen.values())


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
