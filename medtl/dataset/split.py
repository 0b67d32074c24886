"""Who is in which part: by patient, stratified, stable under a seed. Pure.

Studies that share a patient, or whose pixels are identical, form a group, and a group lies in one part. Groups are put
in an order drawn from the seed and from their *pixels*, not from names or keys: the same images under the same seed
give the same split on every machine. Within each stratum (the set of classes a group holds) groups are dealt out to
whichever part is furthest below its share, counted in studies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256

from medtl.config import SplitConfig
from medtl.errors import SplitError
from medtl.records import PARTS, Cohort, Exclusion, Part, Split, Study

_PRECIOUS: Mapping[Part, int] = {"train": 0, "val": 1, "test": 2}


def split_cohort(cohort: Cohort, config: SplitConfig, seed: int) -> Split:
    """Divide a cohort into train, val and test.

    A predefined split (a split column, or the parts of an ``.npz``) is used as it is; a part it lacks is cut from its
    training part. A copy of one image in two predefined parts is taken out of the less precious one.

    Raises:
        SplitError: a patient in two predefined parts, a part without studies, or a class missing from training.
    """
    given = [study for study in cohort.studies if study.part is not None]
    if given and len(given) < len(cohort.studies):
        raise SplitError(
            f"{len(cohort.studies) - len(given)} studies have no part in the predefined split; give all one."
        )
    if not given:
        groups = _group_of(cohort.studies, by_patient=True)
        parts = _deal(cohort.studies, groups, {"val": config.val, "test": config.test}, seed)
        return _checked(cohort, _as_split(parts, groups, predefined=False))
    kept, exclusions = _without_copies(cohort.studies)
    groups = _group_of(kept, by_patient=True)
    parts = {study.study_id: study.part for study in kept if study.part is not None}
    Split(*_lists(parts), groups=groups, predefined=True)  # refuses a patient on two sides
    lacking: dict[Part, float] = {"val": config.val, "test": config.test}
    lacking = {part: share for part, share in lacking.items() if part not in parts.values()}
    if lacking:
        training = [study for study in kept if study.part == "train"]
        parts |= _deal(training, groups, lacking, seed)
    return _checked(cohort, _as_split(parts, groups, predefined=True, exclusions=exclusions))


def _group_of(studies: Sequence[Study], by_patient: bool) -> dict[str, str]:
    """Give each study its group: studies linked by patient or by identical pixels, named by their pixels."""
    parent = {study.study_id: study.study_id for study in studies}

    def root(item: str) -> str:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    first: dict[str, str] = {}
    for study in studies:
        links = [f"pixels {study.pixel_digest}", *([f"patient {study.patient}"] if by_patient else [])]
        for link in links:
            parent[root(study.study_id)] = root(first.setdefault(link, study.study_id))
    content: dict[str, str] = {}
    for study in studies:
        name = root(study.study_id)
        content[name] = min(content.get(name, study.pixel_digest), study.pixel_digest)
    return {study.study_id: "g-" + content[root(study.study_id)][:16] for study in studies}


def _deal(
    studies: Sequence[Study], groups: Mapping[str, str], shares: Mapping[Part, float], seed: int
) -> dict[str, Part | None]:
    members: dict[str, list[Study]] = defaultdict(list)
    for study in studies:
        members[groups[study.study_id]].append(study)
    strata: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for group, own in members.items():
        present = {i for study in own for i, t in enumerate(study.target) if t}
        strata[tuple(sorted(present))].append(group)
    full = {**shares, "train": 1.0 - sum(shares.values())}
    overall: Counter[str] = Counter()
    parts: dict[str, Part | None] = {}
    for stratum in sorted(strata):
        here: Counter[str] = Counter()
        for group in sorted(strata[stratum], key=lambda name: sha256(f"{seed}/{name}".encode()).digest()):
            size = len(members[group])
            wanted = sum(here.values()) + size
            wanted_overall = sum(overall.values()) + size

            def shortfall(
                part: str, w: int = wanted, o: int = wanted_overall, here: Counter[str] = here
            ) -> tuple[float, float]:
                share = full[part]  # type: ignore[index]
                return share * w - here[part] + share * o - overall[part], share

            chosen = max(full, key=shortfall)
            here[chosen] += size
            overall[chosen] += size
            parts |= dict.fromkeys((study.study_id for study in members[group]), chosen)
    return parts


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


def _lists(parts: Mapping[str, Part | None]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    train, val, test = (tuple(sorted(s for s, part in parts.items() if part == name)) for name in PARTS)
    return train, val, test


def _as_split(
    parts: Mapping[str, Part | None],
    groups: Mapping[str, str],
    predefined: bool,
    exclusions: tuple[Exclusion, ...] = (),
) -> Split:
    return Split(*_lists(parts), groups=dict(sorted(groups.items())), predefined=predefined, exclusions=exclusions)


def _checked(cohort: Cohort, split: Split) -> Split:
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
