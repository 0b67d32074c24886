"""What ``medtl show`` shows: tables of a run's facts, looked up without Prefect and without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from medtl.config import Config
from medtl.errors import MedtlError
from medtl.pseudonyms import load_pseudonymiser
from medtl.records import PARTS
from pipelines import results, steps

Table = tuple[str, Sequence[str], list[tuple[Any, ...]]]


def at(what: str, config: Config) -> Table:
    """Give title, columns and rows of one topic.

    Raises:
        MedtlError: the run has not come that far.
    """
    topics = {
        "config": _config,
        "excluded": _excluded,
        "split": _split,
        "plan": _plan,
        "phases": _phases,
        "metrics": _metrics,
        "releases": _releases,
    }
    return topics[what](config)


def _config(config: Config) -> Table:
    rows: list[tuple[Any, ...]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            rows.append((prefix, json.dumps(value)))

    walk("", config.model_dump(mode="json"))
    return f"Config of '{config.name}', defaults included", ("key", "value"), rows


def _excluded(config: Config) -> Table:
    from medtl.scans.io import survey

    scans = steps.ingest_scans(config)
    try:
        cohort = steps.build_cohort(config, scans)
        split = steps.split_by_patient(config, cohort)
        found = results.excluded(scans, cohort, split)
    except MedtlError:
        found = results.excluded(scans)
    names = load_pseudonymiser(config.scans.key_file)
    files = {names.file(f.relative): f.relative for f in survey(config.scans.source, config.scans)}
    rows = [(e.stage, e.code, e.item, files.get(e.item, "-"), e.reason) for e in found]
    return "Left out (file names are shown here only)", ("stage", "code", "item", "file", "reason"), rows


def _split(config: Config) -> Table:
    from medtl.dataset.io import read_split
    from medtl.studies.io import read_cohort

    artifact = steps.build_cohort(config, steps.ingest_scans(config))
    cohort, split = read_cohort(artifact.path), read_split(steps.split_by_patient(config, artifact).path)
    by_id = {study.study_id: study for study in cohort.studies}
    rows = []
    for part in PARTS:
        studies = [by_id[study_id] for study_id in split.part(part)]
        counts = [sum(s.target[i] == 1 for s in studies) for i in range(len(cohort.classes))]
        rows.append((part, len(studies), len({s.patient for s in studies}), *counts))
    return "Split by patient", ("part", "studies", "patients", *cohort.classes), rows


def _plan(config: Config) -> Table:
    from medtl.dataset.io import read_plan

    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    plan = read_plan(steps.make_plan(config, scans, cohort, steps.split_by_patient(config, cohort)).path)
    return "Plan, from the training part", ("decision", "value and reason"), list(plan.reasons.items())


def _phases(config: Config) -> Table:
    from medtl.artifacts import read_record
    from medtl.records import Checkpoint

    folder = _finished(config, "checkpoint")
    record = read_record(folder / "checkpoint.json", Checkpoint)
    rows = [
        (p.name, " ".join(p.unfrozen), p.trainable_parameters, p.best_epoch, p.val_auroc, p.kept) for p in record.phases
    ]
    columns = ("phase", "unfrozen", "trainable", "best epoch", "validation AUROC", "kept")
    return f"Phases of {record.backbone}", columns, rows


def _metrics(config: Config) -> Table:
    from medtl.evaluation.io import read_evaluation

    evaluation = read_evaluation(_finished(config, "evaluation"))
    rows = [(s.metric, s.label, s.value, s.low, s.high, s.n, s.patients, s.note) for s in evaluation.scores]
    return "Test part", ("metric", "class", "value", "low", "high", "studies", "patients", "note"), rows


def _releases(config: Config) -> Table:
    from medtl.registry.io import Register

    entries = [e for e in Register(config.workspace).entries() if e.release.name == config.name]
    rows = [(e.release.release_id, e.release.status, "; ".join(c.condition for c in e.release.checks)) for e in entries]
    return f"Releases of '{config.name}'", ("release", "status", "gate"), rows


def _finished(config: Config, kind: str) -> Any:
    done = results.finished_artifacts(config)
    folders = [folder for folder in done if folder.parent.name == kind]
    if not folders:
        raise MedtlError("This run is not finished yet, or something about it changed since. First: medtl run CONFIG")
    return folders[0]


def config_reference() -> str:
    """Write docs/config.md: every key with its type, default and meaning, from the sections themselves."""
    lines = [
        "# Every key of a config",
        "",
        "Written by `make docs` from `medtl/config.py`. A config path is a code path: `dataset.split` is",
        "`medtl/dataset/split.py`. Any key can be set from the command line: `--set dataset.split.test=0.3`.",
        "",
    ]
    _reference(Config, "", lines)
    return "\n".join(lines) + "\n"


def _reference(model: Any, path: str, lines: list[str]) -> None:
    inner: list[tuple[Any, str]] = []
    lines += [f"## {path or 'top level'}", "", (model.__doc__ or "").strip(), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        full = f"{path}.{name}" if path else name
        nested = list(_sections(field.annotation))
        inner += [(m, f"{full}[]" if m is not field.annotation else full) for m in nested]
        kind = str(field.annotation).replace("typing.", "").replace("medtl.config.", "").replace("pathlib.", "")
        kind = kind.removeprefix("<class '").removesuffix("'>").replace("|", "\\|")
        default = "required" if field.is_required() else f"`{_shown(field.default)}`".replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {default} | {field.description or ''} |")
    lines.append("")
    for section, full in inner:
        if full.endswith("scratch_phases[]"):
            continue  # the same keys as phases
        _reference(section, full, lines)


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return ", ".join(str(getattr(item, "name", item)) for item in value)
    return json.dumps(value, default=str)


def _sections(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections(inner)]
