"""A release on labelled scans from elsewhere: the figures it has there, beside those it was released with.

The release is taken as it is: its own plan, weights, calibrator and operating points. Nothing is fitted, and nobody
whom it learned from may be among the new ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtl.artifacts import Store, code_digest, storage_errors, write_bytes, write_json
from medtl.audit import AuditedStore, AuditLog
from medtl.config import Config
from medtl.errors import SplitError, StudyError
from medtl.records import Artifact, Cohort, Evaluation, Split
from pipelines import examination, steps
from pipelines.incumbent import taught

if TYPE_CHECKING:
    from medtl.registry.io import Entry

_COMPARED = (
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "brier",
    "calibration_slope",
)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Labelled scans from elsewhere, and the release that is asked about them."""

    scans: Path
    release: str | None = None
    allow_candidate: bool = False


def validate_elsewhere(config: Config, scans: Artifact, asked: Elsewhere) -> dict[str, Any]:
    """Predict, calibrate, measure and compare; write one page.

    Raises:
        StudyError: the labels are of another question than the release's.
        SplitError: patients or images that the release learned from are among the new ones.
    """
    from medtl.dataset.io import read_plan
    from medtl.registry.io import Register
    from medtl.studies.io import read_cohort

    register = Register(config.workspace)
    entry = register.choose(config.name, asked.release, asked.allow_candidate)
    folder = register.open(entry)
    plan = read_plan(folder)
    labels = config.studies.labels.model_copy(update={"classes": plan.classes})
    config = config.model_copy(update={"studies": config.studies.model_copy(update={"labels": labels})})
    cohort = steps.build_cohort(config, scans)
    known = read_cohort(cohort.path)
    if (known.task, known.classes) != (plan.task, plan.classes):
        raise StudyError(
            f"The labels say {known.task} with {', '.join(known.classes)}; release {entry.release.release_id} answers "
            f"{plan.task} with {', '.join(plan.classes)}."
        )
    looked = _refuse_the_known(config, known, entry)
    split = _all_of_it(config, cohort, known)
    as_both = Artifact("release", entry.release.release_id, entry.digest, folder, reused=True)
    pack = steps.pack_images(config, scans, cohort, as_both)
    raw = steps.predict_part(config, as_both, cohort, split, pack, "test", "external")
    told = examination.apply_calibrator(config, as_both, raw)
    evaluation = _measure(config, folder, told, entry.digest)
    return _written(config, entry, folder, evaluation, known, looked)


def _refuse_the_known(config: Config, known: Cohort, entry: Entry) -> bool:
    """Refuse patients and images that the release learned from; tell whether that could be looked for."""
    seen = taught(config, entry.release.provenance)
    if seen is None:
        return False
    patients = {s.patient for s in seen} & {s.patient for s in known.studies}
    images = {s.pixel_digest for s in seen} & {s.pixel_digest for s in known.studies}
    if patients or images:
        raise SplitError(
            f"{len(patients)} patients and {len(images)} images among these taught release {entry.release.release_id}. "
            "Take them out of the label table: what is measured on them says nothing."
        )
    return True


def _all_of_it(config: Config, cohort: Artifact, known: Cohort) -> Artifact:
    from medtl.dataset import io
    from medtl.dataset.split import groups_of

    names = tuple(sorted(study.study_id for study in known.studies))
    split = Split((), (), names, groups_of(known.studies), predefined=False)
    inputs = {"cohort": cohort.digest, "all": "test", "code": code_digest("dataset")}
    return AuditedStore(config.workspace).make("split", inputs, lambda folder: io.write_split(folder, split))


def _measure(config: Config, folder: Path, told: Artifact, release: str) -> Artifact:
    from medtl.evaluation import io, pooling

    inputs = {
        "predictions": told.digest,
        "release": release,
        "config": config.evaluation.model_dump(mode="json"),
        "seed": config.seed,
        "code": code_digest("evaluation"),
    }

    def build(out: Path) -> None:
        inside = io.read_evaluation(folder)
        fold = pooling.Fold("elsewhere", io.read_predictions(told.path), inside.operating_points)
        io.write_evaluation(out, pooling.pool([fold], inside.task, inside.classes, config.evaluation, config.seed))

    return AuditedStore(config.workspace).make("evaluation", inputs, build)


def _written(
    config: Config, entry: Entry, folder: Path, found: Artifact, known: Cohort, looked: bool
) -> dict[str, Any]:
    from medtl.evaluation.comparison import change
    from medtl.evaluation.io import read_evaluation
    from medtl.report.elsewhere import page

    inside, outside = read_evaluation(folder), read_evaluation(found.path)
    metrics = [m for m in _COMPARED if m in inside.metrics and m in outside.metrics]
    changes = {m: change(inside.metrics[m], outside.metrics[m]) for m in metrics}
    release, limits = entry.release.release_id, config.report.limits
    out = Store(config.workspace).workspace / "reports"
    with storage_errors(out):
        out.mkdir(exist_ok=True)
    path = out / f"{config.name}-{release}-elsewhere-{found.digest[:12]}.html"
    title = config.report.title or config.name
    write_bytes(path, page(title, release, inside, outside, changes, known.patients_known, looked, limits).encode())
    figures = {
        "release": release,
        "studies": outside.n,
        "patients": outside.patients,
        "metrics": {name: asdict(score) for name, score in outside.metrics.items()},
        "released_with": {name: asdict(inside.metrics[name]) for name in metrics},
        "overlap_looked_for": looked,
        "change": {name: asdict(score) for name, score in changes.items()},
    }
    write_json(path.with_suffix(".json"), figures)
    trail = AuditLog(config.workspace)
    trail.note_files("report.published", found.digest, [path, path.with_suffix(".json")])
    auroc = _plain(outside)
    trail.append("release.validated_elsewhere", release, details={"evaluation": found.digest, "n": outside.n, **auroc})
    return {**figures, "report": str(path)}


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    score = evaluation.metrics.get("auroc")
    return {} if score is None else {"auroc": [score.value, score.low, score.high]}
