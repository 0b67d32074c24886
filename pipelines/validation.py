"""A release on labelled scans from elsewhere: the figures it has there, beside those it was released with.

The release is taken as it is: its own plan, weights, calibrator and operating points. Nothing is fitted, and nobody
whom it learned from may be among the new ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtl.artifacts import Store, code_digest, file_digest, storage_errors, write_bytes, write_json
from medtl.audit import AuditedStore, AuditLog
from medtl.config import Config
from medtl.errors import SplitError, StudyError
from medtl.records import Artifact, Cohort, Evaluation, Split
from pipelines import examination, segmenting, steps
from pipelines.incumbent import taught
from pipelines.prepared import Prepared

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
_COMPARED_MASKS = ("dice", "median_dice", "nsd", "hd95_mm", "assd_mm", "relative_volume_error", "pixel_auroc")


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
    steps.note_unvalidated(config, entry.release)
    folder = register.open(entry)
    if config.segments:
        return _of_masks(config, scans, asked, entry, folder)
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
    return _written(config, entry, folder, evaluation, known, looked, _COMPARED)


def _of_masks(config: Config, scans: Artifact, asked: Elsewhere, entry: Entry, folder: Path) -> dict[str, Any]:
    """Draw the masks of a segmentation, clean them as the release does, measure them."""
    from medtl.dataset.grid import misfit, overlap
    from medtl.dataset.io import read_grid
    from medtl.evaluation import io, masks, quality
    from medtl.studies.io import read_cohort

    plan = read_grid(folder)
    cohort = steps.build_cohort(config, scans)
    known = read_cohort(cohort.path)
    shown, outlined = ([one.name for one in structures] for structures in (known.structures, plan.structures))
    if shown != outlined or overlap(known.structures) != plan.overlapping:
        raise StudyError(
            f"The masks show {', '.join(shown)}; release {entry.release.release_id} outlines {', '.join(outlined)}. "
            "Name the same structures in this order, with the values that masks have here: studies.labels.structures."
        )
    looked = _refuse_the_known(config, known, entry)
    by_id = segmenting.scans_by_id(scans)
    unfit = {study.study_id: why for study in known.studies if (why := misfit(by_id[study.scan_id], plan)) is not None}
    if len(unfit) == len(known.studies):
        raise StudyError(f"No scan fits the release: {next(iter(unfit.values()))}.")
    split = _all_of_it(config, cohort, known, unfit)
    as_both = Artifact("release", entry.release.release_id, entry.digest, folder, reused=True)
    prepared = Prepared(scans, cohort, split, as_both, as_both)
    drawn = segmenting.predict_masks(config, prepared, as_both, "test", "external")
    inputs = {
        "masks": drawn.digest,
        "scans": scans.digest,  # and the cohort: what the true masks are, and what their values mean
        "cohort": cohort.digest,
        "release": entry.digest,
        "config": config.evaluation.model_dump(mode="json"),
        "seed": config.seed,
        "code": [code_digest("evaluation", "dataset"), file_digest(Path(segmenting.__file__))],
        "here": file_digest(Path(__file__)),
    }

    def build(out: Path) -> None:
        material = segmenting.Masks(config, prepared)
        results = material.measured(drawn, io.read_components(folder))
        io.write_mask_results(out, results)
        found = masks.assess_masks(results, config.evaluation, config.seed, material.unit, material.pixels(drawn))
        rule = io.read_quality(folder)
        doubts, dice, ids, people = material.foretold_from(drawn, results)
        foretold = quality.foretell(rule, doubts)
        told = quality.quality_scores(rule, foretold, dice, ids, people, config.evaluation.uncertainty, config.seed)
        io.write_evaluation(out, replace(found, scores=(*found.scores, *told)))

    evaluation = AuditedStore(config.workspace).make("evaluation", inputs, build)
    return _written(config, entry, folder, evaluation, known, looked, _COMPARED_MASKS, Counter(unfit.values()))


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


def _all_of_it(config: Config, cohort: Artifact, known: Cohort, without: Collection[str] = ()) -> Artifact:
    from medtl.dataset import io
    from medtl.dataset.split import groups_of

    studies = [study for study in known.studies if study.study_id not in without]
    split = Split((), (), tuple(sorted(s.study_id for s in studies)), groups_of(studies), predefined=False)
    inputs = {"cohort": cohort.digest, "all": "test", "without": sorted(without), "code": code_digest("dataset")}
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
    config: Config,
    entry: Entry,
    folder: Path,
    found: Artifact,
    known: Cohort,
    looked: bool,
    compared: Sequence[str],
    left_out: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    from medtl.evaluation.comparison import change
    from medtl.evaluation.io import read_evaluation
    from medtl.report.elsewhere import LEAKED, page

    inside, outside = read_evaluation(folder), read_evaluation(found.path)
    metrics = [m for m in compared if m in inside.metrics and m in outside.metrics]
    changes = {m: change(inside.metrics[m], outside.metrics[m]) for m in metrics}
    release, limits = (
        entry.release.release_id,
        (*([LEAKED] if entry.release.provenance.get("leaks") else []), *config.report.limits),
    )
    out = Store(config.workspace).workspace / "reports"
    with storage_errors(out):
        out.mkdir(exist_ok=True)
    path = out / f"{config.name}-{release}-elsewhere-{found.digest[:12]}.html"
    title = config.report.title or config.name
    shown = page(title, release, inside, outside, changes, known.patients_known, looked, limits, left_out)
    write_bytes(path, shown.encode())
    figures = {
        "release": release,
        "studies": outside.n,
        "patients": outside.patients,
        "metrics": {name: asdict(score) for name, score in outside.metrics.items()},
        "released_with": {name: asdict(inside.metrics[name]) for name in metrics},
        "overlap_looked_for": looked,
        "left_out": dict(left_out or {}),
        "change": {name: asdict(score) for name, score in changes.items()},
    }
    write_json(path.with_suffix(".json"), figures)
    trail = AuditLog(config.workspace)
    trail.note_files("report.published", found.digest, [path, path.with_suffix(".json")])
    details = {"evaluation": found.digest, "n": outside.n, "left_out": sum((left_out or {}).values())}
    trail.append("release.validated_elsewhere", release, details=details | _plain(outside, compared[0]))
    return {**figures, "report": str(path)}


def _plain(evaluation: Evaluation, metric: str) -> dict[str, Any]:
    score = evaluation.metrics.get(metric)
    return {} if score is None else {metric: [score.value, score.low, score.high]}
