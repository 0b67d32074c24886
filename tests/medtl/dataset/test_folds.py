"""Everybody is tested on once in each repeat, by a model that saw nobody linked to them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.config import FoldsConfig, SplitConfig
from medtl.dataset.folds import FoldSplit, fold_splits
from medtl.errors import SplitError
from medtl.records import Cohort, Study


def cohort(patients: int = 30, images: int = 2, sites: tuple[str | None, ...] = (None,)) -> Cohort:
    studies = [
        Study(
            f"s-{p}-{i}", f"scan-{p}-{i}", f"p-{p}", (1 - p % 2, p % 2), f"{p:03d}{i}".rjust(16, "0"),
            site=sites[p % len(sites)],
        )
        for p in range(patients)
        for i in range(images)
    ]  # fmt: skip
    return Cohort("binary", ("no", "yes"), tuple(studies))


def folds(known: Cohort, seed: int = 0, pretrained: tuple[str, ...] = (), **config: object) -> tuple[FoldSplit, ...]:
    return fold_splits(known, FoldsConfig(**config), SplitConfig(), seed, pretrained=pretrained)  # type: ignore[arg-type]


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 99))
def test_every_study_is_tested_once_in_each_repeat(count: int, repeats: int, seed: int) -> None:
    known = cohort()
    found = folds(known, seed, count=count, repeats=repeats)
    assert len(found) == count * repeats
    for repeat in range(repeats):
        tested = Counter(s for one in found if one.repeat == repeat for s in one.split.test)
        assert tested == Counter(study.study_id for study in known.studies)
    for one in found:
        sizes = [len(one.split.part(part)) for part in ("train", "val", "test")]
        assert sum(sizes) == 60 and min(sizes) > 0
        assert abs(len(one.split.test) - 60 / count) <= 4


def test_folds_are_stratified_and_repeats_differ() -> None:
    found = folds(cohort(), count=5, repeats=2)
    for one in found:
        assert Counter(int(s.split("-")[1]) % 2 for s in one.split.test) == {0: 6, 1: 6}
    assert {one.split.test for one in found if one.repeat == 0} != {one.split.test for one in found if one.repeat == 1}
    assert folds(cohort(), count=5, repeats=2) == found


def test_near_copies_are_on_one_side_of_every_fold() -> None:
    known = cohort(images=1)
    pair = (known.studies[3].pixel_digest, known.studies[8].pixel_digest)
    for one in fold_splits(known, FoldsConfig(count=5), SplitConfig(), 0, near=(pair,)):
        sides = [{"s-3-0", "s-8-0"} & set(one.split.part(part)) for part in ("train", "val", "test")]
        assert sorted(map(len, sides)) == [0, 0, 2]


def test_what_the_weights_know_is_never_tested_on() -> None:
    found = folds(cohort(), pretrained=("s-4-0",), count=5)
    assert not {"s-4-0", "s-4-1"} & {s for one in found for s in one.split.test}
    assert all({"s-4-0", "s-4-1"} <= set(one.split.train) for one in found)


def test_each_site_is_left_out_once_and_who_was_at_two_is_in_no_fold() -> None:
    known = cohort(sites=("a", "b", "c"))
    found = folds(known, by="site")
    assert [one.name for one in found] == ["a", "b", "c"]
    for one in found:
        site = {study.study_id: study.site for study in known.studies}
        assert {site[s] for s in one.split.test} == {one.name}
        assert one.name not in {site[s] for s in (*one.split.train, *one.split.val)}
    traveller = Study("s-t", "scan-t", "p-0", (1, 0), "f" * 16, site="b")
    known = Cohort("binary", ("no", "yes"), (*known.studies, traveller))
    for one in folds(known, by="site"):
        assert not {"s-t", "s-0-0", "s-0-1"} & {*one.split.train, *one.split.val, *one.split.test}
        assert {e.code for e in one.split.exclusions} == {"at_several_sites"} and len(one.split.exclusions) == 3


@pytest.mark.parametrize(
    "known, config, message",
    [
        (cohort(patients=4), {"count": 20}, "is empty"),
        (cohort(), {"by": "site"}, "60 studies have no site"),
        (cohort(sites=("a",)), {"by": "site"}, "not two sites"),
    ],
)
def test_folds_that_cannot_be_are_refused(known: Cohort, config: dict[str, object], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        folds(known, **config)
