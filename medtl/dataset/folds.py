"""A cohort divided several times, so that everybody is tested on once by a model that never saw them. Pure.

By patient: linked studies (:func:`medtl.dataset.split.groups_of`) are dealt out to folds of equal size, stratified by
class; each fold is tested once, and validation is cut from the others. By site: each site is left out once; whoever is
linked across two sites is in no fold, because he would be on both sides of one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from medtl.config import FoldsConfig, SplitConfig
from medtl.dataset.leaks import Pairs
from medtl.dataset.split import as_split, checked, deal, groups_of
from medtl.errors import SplitError
from medtl.records import Cohort, Exclusion, Part, Split, Study

_NEXT_DEAL = 1_000_003  # added to the seed for each repeat


@dataclass(frozen=True, slots=True)
class FoldSplit:
    """One fold's parts."""

    name: str  # number of the fold, or the site left out
    repeat: int
    split: Split


def fold_splits(
    cohort: Cohort,
    config: FoldsConfig,
    parts: SplitConfig,
    seed: int,
    near: Pairs = (),
    pretrained: Collection[str] = (),
) -> tuple[FoldSplit, ...]:
    """Divide a cohort into folds; a split that came with the data is not used.

    Args:
        parts: how large validation is, of the whole cohort.
        near: digests of pixels that are nearly the same.
        pretrained: studies that the weights were trained on; they and whoever is linked to them are never tested on.

    Raises:
        SplitError: too few patients for a fold, a class missing from a fold's training part, or sites that are unknown.
    """
    groups = groups_of(cohort.studies, near)
    learned = {groups[study_id] for study_id in pretrained}
    if config.by == "site":
        return _by_site(cohort, parts, groups, seed, learned)
    names = [str(number + 1) for number in range(config.count)]
    found = []
    for repeat in range(config.repeats):
        dealt_seed = seed + repeat * _NEXT_DEAL
        testable = [study for study in cohort.studies if groups[study.study_id] not in learned]
        fold_of = deal(testable, groups, dict.fromkeys(names, 1 / config.count), dealt_seed)
        for name in names:
            test = {study for study, fold in fold_of.items() if fold == name}
            if not test:
                raise SplitError(
                    f"Fold {name} of {config.count} is empty: too few patients. Lower dataset.folds.count."
                )
            split = _around(cohort.studies, test, groups, parts, dealt_seed, learned)
            found.append(FoldSplit(name, repeat, checked(cohort, split)))
    return tuple(found)


def _by_site(
    cohort: Cohort, parts: SplitConfig, groups: Mapping[str, str], seed: int, learned: Collection[str]
) -> tuple[FoldSplit, ...]:
    nowhere = sum(study.site is None for study in cohort.studies)
    if nowhere:
        raise SplitError(f"{nowhere} studies have no site. Name its column: --set studies.labels.site=COLUMN")
    sites_of: dict[str, set[str]] = defaultdict(set)
    for study in cohort.studies:
        sites_of[groups[study.study_id]].add(str(study.site))
    away = [study for study in cohort.studies if len(sites_of[groups[study.study_id]]) > 1]
    reason = "the same patient, or somebody linked to him, was at two sites"
    left_out = tuple(Exclusion(study.study_id, "dataset", "at_several_sites", reason) for study in away)
    studies = [study for study in cohort.studies if len(sites_of[groups[study.study_id]]) == 1]
    names = sorted({str(study.site) for study in studies})
    if len(names) < 2:
        raise SplitError("There are not two sites to tell apart. Use dataset.folds.by=patient.")
    found = []
    for name in names:
        test = {s.study_id for s in studies if s.site == name and groups[s.study_id] not in learned}
        others = [study for study in studies if study.site != name]
        if not test:
            continue  # the weights know all of this site
        split = _around([*others, *(s for s in studies if s.study_id in test)], test, groups, parts, seed, learned)
        found.append(FoldSplit(name, 0, replace(checked(cohort, split), exclusions=left_out)))
    return tuple(found)


def _around(
    studies: Sequence[Study],
    test: Collection[str],
    groups: Mapping[str, str],
    parts: SplitConfig,
    seed: int,
    learned: Collection[str],
) -> Split:
    """Cut validation from what is not tested on."""
    rest = [study for study in studies if study.study_id not in test]
    share = min(0.5, parts.val * len(studies) / max(1, len(rest)))
    shares: dict[Part, float] = {"val": share, "train": 1 - share}
    known: dict[str, Part] = dict.fromkeys(learned, "train")
    dealt = deal(rest, groups, shares, seed, known)
    tested: dict[str, Part] = dict.fromkeys(test, "test")
    kept = {**dealt, **tested}
    return as_split(kept, {study: groups[study] for study in kept})
