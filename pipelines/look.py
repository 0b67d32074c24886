"""What ``medtl show`` shows: tables of a run's facts, looked up without Prefect and without training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from medtl.config import Config
from medtl.errors import MedtlError
from medtl.pseudonyms import load_pseudonymiser
from medtl.records import PARTS, Artifact, Exclusion
from pipelines import results, steps

Table = tuple[str, Sequence[str], list[tuple[Any, ...]]]


def at(what: str, config: Config) -> Table:
    """Give title, columns and rows of one topic.

    Raises:
        MedtlError: the run has not come that far.
    """
    topics = {
        "config": _config,
        "codes": codes,
        "strategies": strategies,
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
    scans = steps.ingest_scans(config)
    cohort = split = None
    with contextlib.suppress(MedtlError):  # how far it comes
        cohort = steps.build_cohort(config, scans)
        split = steps.split_by_patient(config, scans, cohort)
    found = results.excluded(scans, cohort, split)
    named = _named(config, scans)
    rows = [(e.stage, e.code, e.item, _few(_files_of(e, named)) or "-", e.reason) for e in found]
    return "Left out (file names are shown here only)", ("stage", "code", "item", "file", "reason"), rows


def refused(config: Config) -> Table:
    """Give what ingest left out, item by item, with the names of the files."""
    exclusions, named = _refused(config)
    rows = [(e.item, e.code, e.action, e.files, _few(_files_of(e, named)), e.reason) for e in exclusions]
    return "Refused (file names are shown here only)", ("item", "code", "action", "files", "where", "reason"), rows


def refused_item(config: Config, item: str) -> Table:
    """Give all that is known of one refused item."""
    from medtl.scans.checks import CODES
    from medtl.scans.quarantine import find

    exclusions, named = _refused(config)
    one = find(exclusions, item)
    row = CODES.get(one.code)
    facts = [("item", one.item), ("code", one.code), ("action", one.action), ("reason", one.reason)]
    if row is not None:
        facts += [("meaning", row.meaning), ("what to try", row.what_to_try), ("a policy may", ", ".join(row.allowed))]
    facts += [("content", one.content or "-"), ("files", str(one.files))]
    facts += [(f"file {n}", name) for n, name in enumerate(_files_of(one, named), 1)]
    return f"Refused: {one.item}", ("what", "value"), facts


def readmit(config: Config, item: str, why: str) -> str:
    """Take a refused item back; give a sentence that says so."""
    from medtl.artifacts import record_bytes
    from medtl.audit import AuditLog
    from medtl.scans.intake import read_origins
    from medtl.scans.io import write_readmissions
    from medtl.scans.quarantine import FOLDER, READMITTED, find, readmissions
    from medtl.scans.quarantine import readmit as with_word

    scans = steps.ingest_scans(config, pixels=False)
    one = find(results.excluded(scans), item)
    members = tuple(read_origins(scans.path).get(one.content or "", ()))
    words = with_word(readmissions(config.workspace), one, members, why)
    details = {"item": one.item, "code": one.code, "files": one.files, "why": why.strip()}
    # logged first: nothing is taken back without a trace, not even when the log cannot be written
    trail, subject, path = AuditLog(config.workspace), one.content or one.item, config.workspace / FOLDER / READMITTED
    trail.note_ahead("scan.readmitted", subject, path, record_bytes(words), details)
    trail.note_files("quarantine.readmitted", subject, [write_readmissions(config.workspace, words)])
    files = "1 file" if one.files == 1 else f"{one.files} files"
    return f"{one.item} ({one.code}, {files}) is taken with the next ingest; the audit log says by whom and why."


def strategies(config: Config) -> Table:
    """Spell out every strategy, and what this config asks for."""
    from medtl.config import STRATEGIES, PhaseConfig

    chosen = config.model.phases if isinstance(config.model.phases, str) else "this config"
    listed: dict[str, tuple[PhaseConfig, ...]] = dict(STRATEGIES)
    if not isinstance(config.model.phases, str):
        listed[chosen] = config.model.phases
    rows = [
        (
            f"{name} (chosen)" if name == chosen else name,
            phase.name,
            str(phase.unfreeze) if isinstance(phase.unfreeze, int | str) else " ".join(phase.unfreeze),
            phase.epochs if phase.head == "gradient" else phase.head,
            phase.lr if phase.head == "gradient" else "-",
            phase.decay,
            phase.batchnorm,
            "none" if not phase.augment else f"{phase.cycled} views" if phase.cycled else "live",
        )
        for name, phases in listed.items()
        for phase in phases
    ]
    head = ("strategy", "phase", "unfrozen", "epochs", "peak rate", "decay", "BatchNorm", "augmentation")
    again = config.segments and config.model.segmenter.refit
    twice = "; the chosen one twice, the second time on validation too (model.segmenter.refit)" if again else ""
    return f"Strategies (model.phases){twice}", head, rows


def codes(config: Config) -> Table:
    """Give every reason code, and what this config's policy makes of it."""
    from medtl.scans.checks import CODES, action_of, check_policy

    policy = config.scans.checks.policy
    check_policy(policy)
    rows = [
        (code, action_of(code, policy), " ".join(row.allowed), row.meaning, row.what_to_try)
        for code, row in CODES.items()
    ]
    return "Reason codes of intake", ("code", "action", "allowed", "meaning", "what to try"), rows


def _refused(config: Config) -> tuple[tuple[Exclusion, ...], dict[str, list[str]]]:
    """Give what ingest refused, and the file names behind each item and content."""
    scans = steps.ingest_scans(config, pixels=False)
    return results.excluded(scans), _named(config, scans)


def _named(config: Config, scans: Artifact) -> dict[str, list[str]]:
    """Give the file names behind each item and content."""
    from medtl.scans.intake import read_origins

    names, files = load_pseudonymiser(config.scans.key_file), steps.source_files(config)
    named: dict[str, list[str]] = {names.file(file.relative): [file.relative] for file in files}
    by_sha: dict[str, list[str]] = {}
    for file in files:
        by_sha.setdefault(file.sha256 or "", []).append(file.relative)
    for content, members in read_origins(scans.path).items():
        named[content] = sorted(name for sha in members for name in by_sha.get(sha, []))
    return named


def _files_of(one: Exclusion, named: dict[str, list[str]]) -> list[str]:
    return named.get(one.content or "", named.get(one.item, []))


def _few(files: Sequence[str]) -> str:
    return ", ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")


def _split(config: Config) -> Table:
    from medtl.dataset.io import read_split
    from medtl.studies.io import read_cohort

    scans = steps.ingest_scans(config)
    artifact = steps.build_cohort(config, scans)
    cohort, split = read_cohort(artifact.path), read_split(steps.split_by_patient(config, scans, artifact).path)
    by_id = {study.study_id: study for study in cohort.studies}
    rows = []
    for part in PARTS:
        studies = [by_id[study_id] for study_id in split.part(part)]
        counts = [sum(s.target[i] == 1 for s in studies) for i in range(len(cohort.classes))]
        rows.append((part, len(studies), len({s.patient for s in studies}), *counts))
    return "Split by patient", ("part", "studies", "patients", *cohort.classes), rows


def _plan(config: Config) -> Table:
    from medtl.dataset.io import read_grid, read_plan
    from pipelines import segmenting

    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    made = segmenting.plan_grid if config.segments else steps.make_plan
    artifact = made(config, scans, cohort, steps.split_by_patient(config, scans, cohort))
    reasons = read_grid(artifact.path).reasons if config.segments else read_plan(artifact.path).reasons
    return "Plan, from the training part", ("decision", "value and reason"), list(reasons.items())


def _phases(config: Config) -> Table:
    from medtl.artifacts import read_record
    from medtl.records import Checkpoint

    folder = _finished(config, "checkpoint")
    record = read_record(folder / "checkpoint.json", Checkpoint)
    rows = [
        (p.name, " ".join(p.unfrozen), p.trainable_parameters, p.best_epoch, p.monitor, p.watched, p.kept)
        for p in record.phases
    ]
    columns = ("phase", "unfrozen", "trainable", "best epoch", "watched on validation", "best value", "kept")
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
        "`medtl/dataset/split.py`. Any key can be set from the command line: `--set dataset.split.test=0.3`;",
        "an entry of a list goes by its name or its number from 0: `--set model.phases.all.epochs=40`.",
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
        kind = _kind(field.annotation).replace("|", "\\|")
        given = field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else f"`{_shown(given)}`".replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {default} | {field.description or ''} |")
    lines.append("")
    for section, full in inner:
        if full.endswith("scratch_phases[]"):
            continue  # the same keys as phases
        _reference(section, full, lines)


def _kind(annotation: Any) -> str:
    """Write a type as somebody who writes YAML would say it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Union or origin is UnionType:
        return " | ".join(map(_kind, inner))
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is tuple:
        return f"list of {_kind(inner[0])}" if inner[-1] is Ellipsis else f"[{', '.join(map(_kind, inner))}]"
    if origin is Mapping:
        return f"{_kind(inner[0])}: {_kind(inner[1])}"
    return "null" if annotation is NoneType else str(annotation.__name__)


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
