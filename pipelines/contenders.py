"""The steps of a study: strategies on one split, the same with fewer patients, and one page about all of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from medtl.artifacts import Store, code_digest, digest_of, storage_errors, write_bytes, write_json
from medtl.audit import AuditedStore, AuditLog
from medtl.config import STRATEGIES, Config
from medtl.errors import ConfigError, SplitError
from medtl.records import Artifact, Cohort, Split, Trial
from pipelines.prepared import Trained
from pipelines.steps import seconds_of

OWN = "config"  # the phases that the config itself lists
_SIZES = 5  # of a learning curve, each twice the one before
FEWEST = 4  # patients that anything is trained on


def with_strategy(config: Config, strategy: str) -> Config:
    """Give the config of one contender.

    Raises:
        ConfigError: no such strategy.
    """
    if strategy == OWN:
        return config
    if strategy not in STRATEGIES:
        raise ConfigError(f"There is no strategy '{strategy}'; there are {', '.join((OWN, *STRATEGIES))}.")
    if strategy == "scratch" and config.model.scratch_phases:
        changed: dict[str, Any] = {"weights": "none", "phases": config.model.scratch_phases}
    else:
        changed = {"phases": strategy}
    return config.model_copy(update={"model": config.model.model_copy(update=changed)})


def curve_sizes(patients: int, count: int = _SIZES, fewest: int = FEWEST) -> list[int]:
    """Give the sizes of a learning curve: all patients, and half as many each time."""
    sizes = [patients]
    while len(sizes) < count and sizes[0] // 2 >= fewest:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def take_patients(config: Config, cohort: Artifact, split: Artifact, patients: int) -> Artifact:
    """Split -> the same split with fewer training patients; a smaller one is part of every larger one."""
    from medtl.dataset import io
    from medtl.studies.io import read_cohort

    inputs = {
        "split": split.digest,
        "patients": patients,
        "seed": config.seed,
        "code": code_digest("dataset"),
        "rule": 1,
    }

    def build(folder: Path) -> None:
        whole = io.read_split(split.path)
        io.write_split(folder, fewer_patients(read_cohort(cohort.path), whole, patients, config.seed))

    return AuditedStore(config.workspace).make("split", inputs, build)


def fewer_patients(cohort: Cohort, split: Split, patients: int, seed: int) -> Split:
    """Keep so many of the training part's patients, in the proportion of its kinds, drawn from their pixels and a seed.

    Raises:
        SplitError: more than there are, or too few to hold every class.
    """
    by_id = {study.study_id: study for study in cohort.studies}
    members: dict[str, list[str]] = defaultdict(list)
    for study in split.train:
        members[split.groups[study]].append(study)
    if not 0 < patients <= len(members):
        raise SplitError(f"The training part holds {len(members)} patients; {patients} cannot be taken.")
    strata: dict[tuple[bool, ...], list[tuple[str, str]]] = defaultdict(list)
    for group, studies in members.items():
        kind = tuple(any(by_id[s].target[i] == 1 for s in studies) for i in range(len(cohort.classes)))
        key = sha256(f"{seed}:{min(by_id[s].pixel_digest for s in studies)}".encode()).hexdigest()
        strata[kind].append((key, group))
    ranked = [  # a stratum's patients at even distances: any beginning of the list has its share of them
        ((place + 0.5) / len(one), key, group)
        for one in strata.values()
        for place, (key, group) in enumerate(sorted(one))
    ]
    chosen = {group for _, _, group in sorted(ranked)[:patients]}
    train = tuple(study for study in split.train if split.groups[study] in chosen)
    lacking = [name for i, name in enumerate(cohort.classes) if not any(by_id[study].target[i] == 1 for study in train)]
    if lacking:
        raise SplitError(f"{patients} patients do not hold every class ({', '.join(lacking)} missing). Take more.")
    groups = {study: split.groups[study] for study in (*train, *split.val, *split.test)}
    return replace(split, train=train, groups=groups)


def p_values(paired: Mapping[str, Artifact | None]) -> dict[str, float | None]:
    """Give each strategy's p value against the reference, corrected for how many strategies were compared."""
    from medtl.evaluation.comparison import corrected
    from medtl.evaluation.io import read_comparison

    known = {name: read_comparison(one.path).tests[0].p_value for name, one in paired.items() if one is not None}
    return dict(zip(known, corrected(list(known.values()), "holm"), strict=True))


def trial_of(
    config: Config,
    strategy: str,
    split: Artifact,
    whole: int,
    trained: Trained,
    paired: Artifact | None,
    p_value: float | None,
    reference: Trained | None = None,
) -> Trial:
    """Put together what is known of one contender; ``paired`` compares it with the reference."""
    from medtl.dataset.io import read_split
    from medtl.evaluation.io import read_comparison, read_evaluation
    from medtl.model.io import read_checkpoint
    from medtl.report.fairness import terms

    parts, network = read_split(split.path), read_checkpoint(trained.checkpoint.path)
    patients = len({parts.groups[study] for study in parts.train})
    comparison = read_comparison(paired.path) if paired is not None else None
    cautions: tuple[str, ...] = ()
    if comparison is not None and reference is not None:
        cautions = terms([network], [read_checkpoint(reference.checkpoint.path)], comparison).warnings
    return Trial(
        strategy=strategy,
        patients=patients,
        studies=len(parts.train),
        share=patients / max(whole, 1),
        scores=read_evaluation(trained.evaluation.path).metrics,
        difference=comparison.difference if comparison is not None else None,
        p_value=p_value,
        phase=next(p.name for p in network.phases if p.kept),
        seconds=seconds_of(config, trained.checkpoint),
        cautions=cautions,
    )


def write_study(
    config: Config, trials: Sequence[Trial], curve: Sequence[Trial], facts: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Write the page about a study, and its figures for machines beside it."""
    from medtl.report.study import as_json, render

    figures = as_json(trials, curve, facts)
    page = render(config.report.title or config.name, trials, curve, facts)
    folder = Store(config.workspace).workspace / "reports"
    name = f"{config.name}-study-{digest_of(json.loads(json.dumps(figures, default=str)))[:12]}"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    write_bytes(folder / f"{name}.html", page.encode())
    write_json(folder / f"{name}.json", figures)
    written = [folder / f"{name}.html", folder / f"{name}.json"]
    AuditLog(config.workspace).note_files("report.published", name, written)
    return folder / f"{name}.html", figures
