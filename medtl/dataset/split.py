"""Who is in which part: by patient, stratified, stable under a seed. Pure.

Studies that share a patient, an exam, a named group (lesion, source) or pixels, or whose pictures are nearly the same,
are linked; what is linked by a chain forms a group, and a group lies in one part. Groups are put in an order drawn from
the seed and from their *pixels*, not from names or keys: the same images under the same seed give the same split on
every machine. Within each stratum (the set of classes a group holds) groups are dealt out to whichever part is furthest
below its share, counted in studies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TypeVar

from medtl.config import SplitConfig
from medtl.dataset.leaks import Leaks, Pairs, crossings, in_words, links_of
from medtl.errors import SplitError
from medtl.records import PARTS, Cohort, Exclusion, Part, Split, Study

Name = TypeVar("Name", bound=str)
_PRECIOUS: Mapping[Part, int] = {"train": 0, "val": 1, "test": 2}


def split_cohort(
    cohort: Cohort, config: SplitConfig, seed: int, near: Pairs = (), pretrained: Collection[str] = ()
) -> Split:
    """Divide a cohort into train, val and test.

    A predefined split (a split column, or the parts of an ``.npz``) is used as it is; a part it lacks is cut from its
    training part. A copy of one image in two predefined parts is taken out of the less precious one. Anything else on
    two sides refuses it, unless ``allow_leaky_split``; then the split carries the counts.

    Args:
        near: digests of pixels that are nearly the same (:func:`medtl.dataset.leaks.near_pairs`).
        pretrained: studies that the weights were trained on; they and whoever is linked to them go into training.

    Raises:
        SplitError: something on two sides of a predefined split, a part without studies, or a class missing from
            training.
    """
    given = [study for study in cohort.studies if study.part is not None]
    if given and len(given) < len(cohort.studies):
        raise SplitError(
            f"{len(cohort.studies) - len(given)} studies have no part in the predefined split; give all one."
        )
    if not given:
        groups = groups_of(cohort.studies, near)
        shares: dict[Part, float] = {"val": config.val, "test": config.test}
        learned = {groups[study_id] for study_id in pretrained}
        return checked(cohort, as_split(_deal(cohort.studies, groups, shares, seed, learned), groups))
    kept, exclusions = _without_copies(cohort.studies)
    groups = groups_of(kept, near)
    parts = {study.study_id: study.part for study in kept if study.part is not None}
    leaks = crossings(kept, parts, near, pretrained)
    if leaks and not config.allow_leaky_split:
        raise SplitError(_refusal(leaks))
    lacking: dict[Part, float] = {"val": config.val, "test": config.test}
    lacking = {part: share for part, share in lacking.items() if part not in parts.values()}
    if lacking:
        training = [study for study in kept if study.part == "train"]
        learned = {groups[study.study_id] for study in training if study.study_id in pretrained}
        parts |= _deal(training, groups, lacking, seed, learned)
    leaks = crossings(kept, parts, near, pretrained)
    return checked(cohort, replace(as_split(parts, groups, leaks), predefined=True, exclusions=exclusions))


def hold_out(studies: Sequence[Study], share: float, seed: int, near: Pairs = ()) -> Split:
    """Divide scans to pre-train on into those that are learned from and those held out; there is no test part.

    Args:
        share: of the scans that are held out.
        near: as of :func:`split_cohort`.

    Raises:
        SplitError: too few patients to hold anybody out.
    """
    groups = groups_of(studies, near)
    split = as_split(_deal(studies, groups, {"val": share}, seed), groups)
    if not split.train or not split.val:
        raise SplitError(
            f"{len(set(groups.values()))} patients are too few to hold {share:.0%} of their scans out. Give more, or "
            "another dataset.split.val."
        )
    return split


def folds_within(studies: Sequence[Study], split: Split, count: int, seed: int) -> tuple[Split, ...]:
    """Cut the training part of a split into folds, each the validation part of one network; nobody else is in them.

    Linked studies stay together, as they do in ``split``.

    Args:
        studies: of the cohort that was split.

    Raises:
        SplitError: too few patients for a fold.
    """
    learned = set(split.train)
    inner = [study for study in studies if study.study_id in learned]
    groups = {study.study_id: split.groups[study.study_id] for study in inner}
    names = [str(number) for number in range(count)]
    fold_of = deal(inner, groups, dict.fromkeys(names, 1 / count), seed)
    if len(set(fold_of.values())) < count:
        raise SplitError(
            f"The training part has {len(set(groups.values()))} patients or groups, too few for {count} networks. "
            "Lower model.segmenter.members."
        )
    sides: list[dict[str, Part]] = [
        {study: "val" if fold == name else "train" for study, fold in fold_of.items()} for name in names
    ]
    return tuple(as_split(parts, groups, split.leaks) for parts in sides)


def groups_of(studies: Sequence[Study], near: Pairs = ()) -> dict[str, str]:
    """Give each study its group: everything linked by a chain, named by its pixels."""
    parent: dict[Hashable, Hashable] = {}

    def root(item: Hashable) -> Hashable:
        parent.setdefault(item, item)
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for study in studies:
        for link in links_of(study):
            parent[root(link)] = root(study.study_id)
    for one, other in near:
        parent[root(("pixels", one))] = root(("pixels", other))
    content: dict[Hashable, str] = {}
    for study in studies:
        name = root(study.study_id)
        content[name] = min(content.get(name, study.pixel_digest), study.pixel_digest)
    return {study.study_id: "g-" + content[root(study.study_id)][:16] for study in studies}


def _refusal(leaks: Leaks) -> str:
    tries = ["Give whoever is on two sides one part", "drop the split column and let medtl split"]
    if any(leak.kind == "pretraining" for leak in leaks):
        tries.append("take weights that were not trained on these images")
    return (
        f"The predefined split leaks: {in_words(leaks)}. {tries[0]}, or {', or '.join(tries[1:])}. To use it as it is, "
        "and have every page say so: --set dataset.split.allow_leaky_split=true"
    )


def deal(
    studies: Sequence[Study],
    groups: Mapping[str, str],
    shares: Mapping[Name, float],
    seed: int,
    fixed: Mapping[str, Name] | None = None,
) -> dict[str, Name]:
    """Deal groups out, stratified by the classes they hold, each to whoever is furthest below the wanted share.

    Args:
        groups: study to group.
        shares: name of a part or fold to its share of the studies; they sum to 1.
        fixed: group to where it must go.

    Returns:
        Study to name.
    """
    members: dict[str, list[Study]] = defaultdict(list)
    for study in studies:
        members[groups[study.study_id]].append(study)
    strata: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for group, own in members.items():
        present = {i for study in own for i, t in enumerate(study.target) if t}
        strata[tuple(sorted(present))].append(group)
    fixed = fixed or {}
    overall: Counter[str] = Counter()
    parts: dict[str, Name] = {}
    for stratum in sorted(strata):
        here: Counter[str] = Counter()
        for group in sorted(strata[stratum], key=lambda name: sha256(f"{seed}/{name}".encode()).digest()):
            size = len(members[group])
            wanted = sum(here.values()) + size
            wanted_overall = sum(overall.values()) + size

            def shortfall(
                part: Name, w: int = wanted, o: int = wanted_overall, here: Counter[str] = here
            ) -> tuple[float, float]:
                share = shares[part]
                return share * w - here[part] + share * o - overall[part], share

            chosen = fixed.get(group) or max(shares, key=shortfall)
            here[chosen] += size
            overall[chosen] += size
            parts |= dict.fromkeys((study.study_id for study in members[group]), chosen)
    return parts


def _deal(
    studies: Sequence[Study],
    groups: Mapping[str, str],
    shares: Mapping[Part, float],
    seed: int,
    learned: Collection[str] = (),
) -> dict[str, Part]:
    """Deal groups out to parts; those that the weights have ``learned`` stay in training."""
    full: dict[Part, float] = {**shares, "train": 1.0 - sum(shares.values())}
    return deal(studies, groups, full, seed, dict.fromkeys(learned, "train"))


def _without_copies(studies: Sequence[Study]) -> tuple[list[Study], tuple[Exclusion, ...]]:
    """Take a copy of an image out of the less precious of the predefined parts it is in."""
    best: dict[str, int] = {}
    for study in studies:
        rank = _PRECIOUS[study.part or "train"]
        best[study.pixel_digest] = max(best.get(study.pixel_digest, 0), rank)
    kept, exclusions = [], []
    for study in studies:
        if _PRECIOUS[study.part or "train"] < best[study.pixel_digest]:
            reason = f"the same pixels are in a later part of the predefined split; taken out of '{study.part}'"
            exclusions.append(Exclusion(study.study_id, "dataset", "copy_across_parts", reason))
        else:
            kept.append(study)
    return kept, tuple(exclusions)


def as_split(parts: Mapping[str, Part], groups: Mapping[str, str], leaks: Leaks = ()) -> Split:
    """Lay out who is in which part."""
    train, val, test = (tuple(sorted(s for s, part in parts.items() if part == name)) for name in PARTS)
    return Split(train, val, test, groups=dict(sorted(groups.items())), predefined=False, leaks=leaks)


def checked(cohort: Cohort, split: Split) -> Split:
    """Give a split that one can learn from.

    Raises:
        SplitError: a part is empty, or training lacks a class.
    """
    targets = {study.study_id: study.target for study in cohort.studies}
    for part in PARTS:
        if not split.part(part):
            raise SplitError(
                f"The '{part}' part is empty: {len(set(split.groups.values()))} patients are too few for "
                "dataset.split, or a share is too small."
            )
    for index, name in enumerate(cohort.classes):
        if not any(targets[study_id][index] for study_id in split.train):
            raise SplitError(f"No training study shows class '{name}': too few patients have it to divide them.")
    return split
