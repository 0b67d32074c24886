"""What a run gave, and whether it is done already.

A finished run is remembered under a name made from the bytes of everything it depends on: its files, labels, weights,
config and code. The same command finds it, checks every byte of every result, and computes nothing.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medtl.artifacts import Store, code_digest, digest_of, file_digest, storage_errors, verify, write_json
from medtl.audit import SWEPT, AuditLog
from medtl.config import Config
from medtl.pseudonyms import load_pseudonymiser
from medtl.records import PARTS, Artifact, Checkpoint, Exclusion, Release
from pipelines.prepared import Prepared, Segmented, Trained
from pipelines.steps import (
    file_count,
    find_scans,
    label_table,
    pixel_folder,
    source_files,
)
from pipelines.training import LIBRARIES, threads_for, vault_folder, versions
from pipelines.upkeep import at_work

log = logging.getLogger("medtl")
EXTRAS = ("weasyprint", "ipyniivue")  # where they are installed, a report has a PDF and a viewer


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run starts from, by its bytes."""

    files: int
    source: str  # digest over names (keyed) and bytes
    labels: str | None
    weights: str | None
    pretraining: str | None  # list of what the weights were trained on
    readmitted: str  # what a person took back from quarantine
    key: str


def fetches(config: Config) -> bool:
    """Tell whether scans are fetched from an archive before anything else."""
    return config.scans.pacs is not None and config.scans.pacs.kind is not None


def look_at_inputs(config: Config) -> Inputs:
    """Hash everything that a run depends on; decode nothing."""
    from medtl.scans.quarantine import readmissions

    names = load_pseudonymiser(config.scans.key_file)
    table, files = label_table(config), source_files(config)
    weights, listed = Path(config.model.weights), config.dataset.split.pretraining_hashes
    return Inputs(
        files=len(files),
        source=digest_of([[names.file(f.relative), f.sha256, f.refusal.code if f.refusal else None] for f in files]),
        labels=file_digest(table) if table is not None and table.is_file() else None,
        weights=_weights_digest(config) if not weights.is_file() else file_digest(weights),
        readmitted=digest_of([[one.content, one.code] for one in readmissions(config.workspace)]),
        pretraining=file_digest(listed) if listed is not None and listed.is_file() else None,
        key=names.fingerprint,
    )


@at_work
def finished_ingest(config: Config) -> dict[str, Any] | None:
    """Find the summary of an ingest that is done already; None where an archive must be asked first."""
    from medtl.scans.intake import without_pixels

    found = None if fetches(config) else find_scans(config)
    if found is None or without_pixels(found.path, pixel_folder(config)):
        return None
    return summarise_ingest(found)


def excluded(scans: Artifact, cohort: Artifact | None = None, split: Artifact | None = None) -> tuple[Exclusion, ...]:
    """Collect what was left out so far, stage by stage."""
    from medtl.dataset.io import read_split
    from medtl.scans.intake import read_exclusions
    from medtl.studies.io import read_cohort

    found = list(read_exclusions(scans.path))
    if cohort is not None:
        found += read_cohort(cohort.path).exclusions
    if split is not None:
        found += read_split(split.path).exclusions
    return tuple(found)


def run_key(config: Config, inputs: Inputs) -> str:
    """Name a run by the bytes of everything it depends on."""
    rooms = ("scans", "studies", "dataset", "model", "evaluation", "report", "registry")
    settings = config.model_dump(
        mode="json", exclude={"workspace": True, "audit": True, "scans": {"source", "key_file", "workers", "pacs"}}
    )
    settings["model"].pop("weights")
    threads = threads_for(config.model, 1)
    own = ("steps.py", "examination.py", "explanations.py", "training.py", "results.py", "run.py", "incumbent.py",
           "segmenting.py", "contenders.py", "growth.py", "evaluate.py", "train.py", "tasks.py")  # fmt: skip
    code = [code_digest(*rooms), *(file_digest(Path(__file__).parent / name) for name in own)]
    extras = [find_spec(name) is not None for name in EXTRAS]
    return digest_of([asdict(inputs), settings, threads, code, versions(*LIBRARIES), extras, _live(config)])


def _live(config: Config) -> str | None:
    """Name the live release, where a run's gate depends on it."""
    from medtl.registry.io import Register

    if config.registry.promotion.incumbent is None:
        return None
    entries = (entry.release for entry in Register(config.workspace).entries())
    return next((one.release_id for one in entries if one.name == config.name and one.status == "live"), None)


@at_work
def finished_run(config: Config) -> dict[str, Any] | None:
    """Find the summary of a run that is done already, with every artifact behind it checked byte by byte.

    A copy of pixels that was swept since is not missed: it is made again by whatever wants it.
    """
    from medtl.registry.io import Register

    path = config.workspace.absolute() / "runs" / f"{run_key(config, look_at_inputs(config))[:32]}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_bytes())
    store, trail = Store(config.workspace), AuditLog(config.workspace)
    for relative, digest in record["artifacts"].items():
        folder = store.workspace / relative
        if not folder.exists() and trail.gone(relative) == (SWEPT, digest):
            continue
        if not folder.is_dir() or verify(folder) != digest:
            log.warning("a result of this run is gone; making it again")
            return None
        store.mark_used(folder)
    summary: dict[str, Any] = record["summary"]
    page = config.workspace.absolute() / "reports" / Path(summary["report"]).name  # the workspace may have been moved
    if not page.is_file():
        return None
    entries = (entry.release for entry in Register(config.workspace).entries())
    now = next((one.status for one in entries if one.release_id == summary["release"]), summary["status"])
    return {**summary, "report": str(page), "status": now}  # it may have been promoted or retired since


def key_now(config: Config) -> str:
    """Name a run by what it starts from; ask before it starts: what comes in meanwhile belongs to the next one."""
    return run_key(config, look_at_inputs(config))


def remember_run(config: Config, key: str, artifacts: tuple[Artifact, ...], summary: Mapping[str, Any]) -> None:
    """Write down that a run is done and what it gave.

    Args:
        key: of :func:`key_now`, from before the run began.
    """
    root = config.workspace.absolute()
    folder = root / "runs"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    names = [a.path.relative_to(root).as_posix() for a in artifacts]
    record = {
        "artifacts": dict(zip(names, (a.digest for a in artifacts), strict=True)),
        "order": names,
        "summary": dict(summary),
    }
    path = folder / f"{key[:32]}.json"
    write_json(path, record)
    AuditLog(root).note_files("run.remembered", str(summary["release"]), [path])


def summarise(
    config: Config,
    prepared: Prepared,
    trained: Trained | Segmented,
    scratch: Trained | Segmented | None,
    comparison: Artifact | None,
    release: Release,
    page: Path,
) -> dict[str, Any]:
    """Put a run's results into the one object that machines read."""
    from medtl.dataset.io import read_split
    from medtl.evaluation.io import read_comparison, read_evaluation
    from medtl.model.io import read_checkpoint
    from medtl.report.fairness import terms

    split, network = read_split(prepared.split.path), read_checkpoint(trained.checkpoint.path)
    scores = read_evaluation(trained.evaluation.path).metrics
    summary: dict[str, Any] = {
        "name": config.name,
        "release": release.release_id,
        "status": release.status,
        "report": str(page),
        "split": {part: len(split.part(part)) for part in PARTS},
        "metrics": {name: {"value": s.value, "low": s.low, "high": s.high} for name, s in scores.items()},
        "gate": [asdict(one) for one in release.checks],
        "excluded": dict(Counter(e.code for e in excluded(prepared.scans, prepared.cohort, prepared.split))),
        "digests": {
            "checkpoint": trained.checkpoint.digest,
            "predictions": trained.test.digest,
            "evaluation": trained.evaluation.digest,
        },
        **_second_training(network),
    }
    if scratch is not None and comparison is not None:
        found = read_comparison(comparison.path)
        bare = read_checkpoint(scratch.checkpoint.path)
        summary["cautions"] = list(terms([network], [bare], found).warnings)
        reference, difference = found.reference_score, found.difference
        summary["scratch"] = {found.metric: {"value": reference.value, "low": reference.low, "high": reference.high}}
        summary["difference"] = {
            found.metric: {"value": difference.value, "low": difference.low, "high": difference.high}
        }
    return summary


def summarise_ingest(scans: Artifact) -> dict[str, Any]:
    """Count what an ingest took and left out."""
    from medtl.scans.intake import read_scans

    found = read_scans(scans.path)
    return {
        "files": file_count(scans),
        "scans": sum(scan.mask_of is None for scan in found),
        "excluded": dict(Counter(e.code for e in excluded(scans))),
        "excluded_files": sum(e.files for e in excluded(scans)),
        "volumes": sum(scan.is_volume and scan.mask_of is None for scan in found),
        "masks": sum(scan.mask_of is not None for scan in found),
        "reused": scans.reused,
        "artifact": str(scans.path),
    }


def summarise_training(checkpoint: Artifact) -> dict[str, Any]:
    """Tell what training gave, on validation."""
    from medtl.model.io import read_checkpoint

    record = read_checkpoint(checkpoint.path)
    return {
        "checkpoint": checkpoint.digest,
        "backbone": record.backbone,
        "weights": {"source": record.weights.source, "share": record.weights.share},
        "phases": [
            {
                "name": p.name,
                "best_epoch": p.best_epoch,
                "val_auroc": p.val_auroc,
                "monitor": p.monitor,
                "watched": p.watched,
                "val_loss": p.val_loss,
                "epochs": p.epochs,
                "kept": p.kept,
                "reason": p.reason,
            }
            for p in record.phases
        ],
        **_second_training(record),  # whose phases these are
        "reused": checkpoint.reused,
        "artifact": str(checkpoint.path),
    }


def _second_training(record: Checkpoint) -> dict[str, Any]:
    """Say whether validation was learned from too, in a second training; nothing where there was one alone."""
    refit = record.refit
    return {"refit": {"chosen_by": refit.chosen_by, "patients": refit.patients}} if refit else {}


def training_patients(prepared: Prepared) -> int:
    """Count the patients of the training part."""
    from medtl.dataset.io import read_split

    split = read_split(prepared.split.path)
    return len({split.groups[study] for study in split.train})


def study_facts(config: Config, prepared: Prepared) -> dict[str, Any]:
    """Tell what a study rests on: parts, network, source of the weights, looks at the test part."""
    from medtl.dataset.io import read_plan, read_split
    from medtl.report.words import leak_warning
    from medtl.studies.io import read_cohort

    split, cohort, plan = (
        read_split(prepared.split.path),
        read_cohort(prepared.cohort.path),
        read_plan(prepared.plan.path),
    )
    events = AuditLog(config.workspace).events()
    return {
        "name": config.name,
        "backbone": config.model.backbone,
        "weights": Path(config.model.weights).name,
        "classes": list(cohort.classes),
        "size": list(plan.size),
        "patients_known": cohort.patients_known,
        "parts": {
            part: {"studies": len(split.part(part)), "patients": len({split.groups[s] for s in split.part(part)})}
            for part in PARTS
        },
        "test_openings": sum(e["action"] == "test.opened" for e in events),
        "limits": [*([leak_warning(split.leaks)] if split.leaks else []), *config.report.limits],
    }


def summarise_evaluation(trained: Trained | Segmented) -> dict[str, Any]:
    """Tell what was measured on the test part."""
    from medtl.evaluation.io import read_evaluation

    scores = read_evaluation(trained.evaluation.path).metrics
    return {
        "metrics": {name: {"value": s.value, "low": s.low, "high": s.high} for name, s in scores.items()},
        "checkpoint": trained.checkpoint.digest,
        "reused": trained.evaluation.reused,
        "artifact": str(trained.evaluation.path),
    }


def artifacts_of(
    prepared: Prepared,
    trained: Trained | Segmented,
    scratch: Trained | Segmented | None,
    comparison: Artifact | None,
) -> tuple[Artifact, ...]:
    """List every artifact behind a run."""
    models = [trained] + ([scratch] if scratch else [])
    found = [prepared.scans, prepared.cohort, prepared.split, prepared.plan, prepared.pack]
    for model in models:
        if isinstance(model, Segmented):
            found += [model.checkpoint, model.val, model.test, model.evaluation]
            found += [model.chosen] if model.chosen.digest != model.checkpoint.digest else []
            found += [model.growth] if model.growth else []
            continue
        found += [model.checkpoint, model.calibrator, model.val, model.test, model.evaluation]
        found += [one for one in (model.examination, model.explanations, model.growth) if one is not None]
    return tuple(found + ([comparison] if comparison else []))


def finished_artifacts(config: Config) -> list[Path]:
    """List the folders behind a finished run, its own model first; empty if it is not finished."""
    path = config.workspace.absolute() / "runs" / f"{run_key(config, look_at_inputs(config))[:32]}.json"
    if finished_run(config) is None:
        return []
    return [config.workspace.absolute() / name for name in json.loads(path.read_bytes())["order"]]


def peak_memory_mb() -> float:
    """Give the largest resident memory of this process so far, in MB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def _flat(backbone: str) -> str:
    """Name the backbone whose published weights this one takes, without torch."""
    from medtl.model.backbones import BACKBONES

    row = BACKBONES.get(backbone)
    return row.inflates or backbone if row is not None else backbone


def _weights_digest(config: Config) -> str | None:
    """Tell which weights a vault name means today, without torch; None where they are not there yet."""
    spec = config.model.origin
    name = f"imagenet-{_flat(config.model.backbone)}" if spec == "imagenet" else spec.removeprefix("vault:")
    entry = vault_folder(config) / name / "entry.json"
    return file_digest(entry) if spec != "none" and entry.is_file() else None
