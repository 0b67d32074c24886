"""The steps of a learning curve: the model's own training on fewer patients, each seen on validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medtl.artifacts import code_digest, file_digest
from medtl.audit import AuditedStore
from medtl.config import Config
from medtl.errors import SplitError
from medtl.records import Artifact, CurvePoint, LearningCurve
from pipelines.contenders import FEWEST, curve_sizes, fewer_patients
from pipelines.prepared import Prepared

if TYPE_CHECKING:
    from medtl.records import Score


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of training patients of a curve, from few to all."""

    patients: tuple[int, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Grown:
    """One network of a curve: what it learned from, and what it says of validation."""

    split: Artifact
    val: Artifact


def sizes_of(config: Config, prepared: Prepared) -> Sizes:
    """Choose the sizes: halves of halves, as long as every class is in them and there is somebody to learn from."""
    from medtl.dataset.io import read_split
    from medtl.studies.io import read_cohort

    cohort, split = read_cohort(prepared.cohort.path), read_split(prepared.split.path)
    whole = len({split.groups[study] for study in split.train})
    fewest = max(FEWEST, config.model.segmenter.members if config.segments else 0)
    wanted = config.report.learning_curve
    usable, note = [whole], ""
    for size in reversed(curve_sizes(whole, 1 + wanted, fewest)[:-1]):
        try:
            fewer_patients(cohort, split, size, config.seed)
        except SplitError as error:
            note = str(error)
            break
        usable.insert(0, size)
    if not note and len(usable) <= wanted:
        note = f"Nothing is trained on fewer than {fewest} patients."
    return Sizes(tuple(usable), note)


def draw_learning_curve(config: Config, prepared: Prepared, found: Sequence[Grown], note: str) -> Artifact:
    """Predictions of validation, from few patients to all -> a learning curve."""
    from medtl.dataset.io import read_split
    from medtl.evaluation import io

    inputs = {
        "cohort": prepared.cohort.digest,
        "scans": prepared.scans.digest,
        "plan": prepared.plan.digest,
        "found": [[one.split.digest, one.val.digest] for one in found],
        "note": note,
        "config": config.evaluation.model_dump(mode="json"),
        "seed": config.seed,
        "code": [code_digest("evaluation", "dataset"), file_digest(Path(__file__))],
    }

    def build(folder: Path) -> None:
        points = []
        for one in found:
            split = read_split(one.split.path)
            patients = len({split.groups[study] for study in split.train})
            points.append(CurvePoint(patients, len(split.train), _seen(config, prepared, one.val)))
        io.write_learning_curve(folder, LearningCurve(tuple(points), note))

    return AuditedStore(config.workspace).make("curve", inputs, build)


def _seen(config: Config, prepared: Prepared, val: Artifact) -> Score:
    from medtl.dataset.io import read_plan
    from medtl.evaluation.growth import auroc_of, dice_of
    from medtl.evaluation.io import read_predictions

    if config.segments:
        from pipelines.segmenting import Masks

        material = Masks(config, prepared)
        studies = material.studies(val)
        names, people = [one.study_id for one in studies], [one.patient for one in studies]
        return dice_of(material.dice_of(val, None), names, people, config.evaluation, config.seed)
    plan = read_plan(prepared.plan.path)
    return auroc_of(read_predictions(val.path), plan.task, plan.classes, config.evaluation, config.seed)
