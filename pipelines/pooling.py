"""Folds into one evaluation and one page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtl.artifacts import Store, code_digest, digest_of, storage_errors, write_bytes, write_json
from medtl.audit import AuditedStore, AuditLog
from medtl.config import Config
from medtl.records import Artifact
from pipelines.prepared import Prepared, Segmented, Trained

if TYPE_CHECKING:
    from medtl.evaluation.pooling import Fold


@dataclass(frozen=True, slots=True)
class Tested:
    """One fold's model on the patients it never saw."""

    name: str
    repeat: int
    trained: Trained | Segmented
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class Reference:
    """The same network without weights on the same folds."""

    folds: list[Tested]
    pooled: Artifact
    comparison: Artifact  # with it


def pool_folds(config: Config, cohort: Artifact, found: list[Tested]) -> Artifact:
    """Folds -> one evaluation with intervals over patients."""
    from medtl.evaluation import io, pooling
    from medtl.studies.io import read_cohort

    inputs = {
        "cohort": cohort.digest,
        "folds": _named(found),
        "config": config.evaluation.model_dump(mode="json"),
        "seed": config.seed,
        "code": code_digest("evaluation"),
    }

    def build(folder: Path) -> None:
        known = read_cohort(cohort.path)
        folds = _folds_of(found)
        io.write_evaluation(folder, pooling.pool(folds, known.task, known.classes, config.evaluation, config.seed))

    return AuditedStore(config.workspace).make("evaluation", inputs, build)


def compare_folds(config: Config, cohort: Artifact, found: list[Tested], scratch: list[Tested]) -> Artifact:
    """Folds with weights and without -> the difference of their AUROC."""
    from medtl.evaluation import io, pooling
    from medtl.studies.io import read_cohort

    inputs = {
        "cohort": cohort.digest,
        "model": _named(found),
        "reference": _named(scratch),
        "config": config.evaluation.model_dump(mode="json"),
        "seed": config.seed,
        "code": code_digest("evaluation"),
    }

    def build(folder: Path) -> None:
        known, sides = read_cohort(cohort.path), (_folds_of(found), _folds_of(scratch))
        names = ("transfer", "scratch")
        io.write_comparison(
            folder, pooling.compare_folds(*sides, names, known.task, known.classes, config.evaluation, config.seed)
        )

    return AuditedStore(config.workspace).make("comparison", inputs, build)


def _named(found: list[Tested]) -> list[list[str | int]]:
    """Name what :func:`_folds_of` reads."""
    return [[one.name, one.repeat, one.trained.test.digest, one.trained.evaluation.digest] for one in found]


def _folds_of(found: list[Tested]) -> list[Fold]:
    """Read what each fold's model said of a diagnosis."""
    from medtl.evaluation import io, pooling

    return [
        pooling.Fold(
            one.name,
            io.read_predictions(one.trained.test.path),
            io.read_evaluation(one.trained.evaluation.path).operating_points,
            one.repeat,
        )
        for one in found
    ]


def write_folds(
    config: Config,
    cohort: Artifact,
    pooled: Artifact,
    found: list[Tested],
    scratch: Reference | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write the page about the folds, and its figures for machines beside it."""
    from medtl.dataset.io import read_grid
    from medtl.evaluation.io import read_comparison, read_evaluation
    from medtl.model.io import read_checkpoint
    from medtl.report.fairness import terms
    from medtl.report.folds import Design, render
    from medtl.studies.io import read_cohort

    evaluation, known = read_evaluation(pooled.path), read_cohort(cohort.path)
    comparison = read_comparison(scratch.comparison.path) if scratch else None
    networks = [read_checkpoint(one.trained.checkpoint.path) for one in found]
    bare = [read_checkpoint(one.trained.checkpoint.path) for one in scratch.folds] if scratch else []
    design = Design(
        by=config.dataset.folds.by,
        title=config.report.title or config.name,
        backbone=networks[0].backbone,
        weights=Path(config.model.origin).name,
        studies=len(known.studies),
        patients=len({study.patient for study in known.studies}),
        patients_known=known.patients_known,
        limits=config.report.limits,
        level=config.evaluation.uncertainty.level,
        scratch=read_evaluation(scratch.pooled.path) if scratch else None,
        comparison=comparison,
        terms=terms(networks, bare, comparison) if bare else None,
        unit="pixels" if config.segments and read_grid(found[0].prepared.plan.path).axis is None else "mm",
        twice=any(network.refit is not None for network in networks),
    )
    figures: dict[str, Any] = {
        "name": config.name,
        "metrics": {name: asdict(score) for name, score in evaluation.metrics.items()},
        "folds": [asdict(one) for one in evaluation.folds],
        "by": config.dataset.folds.by,
        "twice": design.twice,
        "artifact": pooled.digest,
    }
    if design.scratch is not None and design.comparison is not None and design.terms is not None:
        figures["difference"] = {design.comparison.metric: asdict(design.comparison.difference)}
        figures["scratch"] = {name: asdict(score) for name, score in design.scratch.metrics.items()}
        figures["trainings"] = design.terms.plain()
        figures["cautions"] = list(design.terms.warnings)
    folder = Store(config.workspace).workspace / "reports"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    beside = [scratch.pooled.digest, scratch.comparison.digest] if scratch else []
    shown = digest_of([pooled.digest, *beside]) if beside else pooled.digest
    path = folder / f"{config.name}-folds-{shown[:12]}.html"
    write_bytes(path, render(evaluation, design).encode())
    write_json(path.with_suffix(".json"), figures)
    AuditLog(config.workspace).note_files("report.published", pooled.digest, [path, path.with_suffix(".json")])
    return path, figures
