"""The steps of a learning curve: the model's own training on fewer patients, each seen on validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medtl.artifacts import code_digest, file_digest
from medtl.audit import AuditedStore
from medtl.config import Config
from medtl.records import Artifact, CurvePoint, LearningCurve
from pipelines.contenders import FEWEST, curve_sizes
from pipelines.prepared import Prepared

if TYPE_CHECKING:
    from medtl.records import FloatArray, Score


@dataclass(frozen=True, slots=True)
class Grown:
    """One network of a curve: what it learned from, and what it says of validation."""

    split: Artifact
    val: Artifact


def sizes_of(config: Config, prepared: Prepared) -> list[int]:
    """Give the numbers of patients to train on, all of them last: halves of halves."""
    from medtl.dataset.io import read_split

    split = read_split(prepared.split.path)
    whole = len({split.groups[study] for study in split.train})
    return curve_sizes(whole, 1 + config.report.learning_curve, _fewest(config))


def why_no_more(config: Config, smaller: int) -> str:
    """Say why there are fewer smaller sizes than were asked for; empty where there are as many."""
    if smaller == config.report.learning_curve:
        return ""
    return f"Nothing is trained on fewer than {_fewest(config)} patients."


def _fewest(config: Config) -> int:
    return max(FEWEST, config.model.segmenter.members if config.segments else 0)


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
        seen = _Diagnosed(config, prepared) if not config.segments else _Outlined(config, prepared)
        points = []
        for one in found:
            split = read_split(one.split.path)
            patients = len({split.groups[study] for study in split.train})
            points.append(CurvePoint(patients, len(split.train), seen.score(one.val)))
        gain = seen.gain(found[-1].val, found[-2].val) if len(found) > 1 else None
        io.write_learning_curve(folder, LearningCurve(tuple(points), note, gain))

    return AuditedStore(config.workspace).make("curve", inputs, build)


class _Diagnosed:
    """What networks that diagnose say of validation."""

    def __init__(self, config: Config, prepared: Prepared) -> None:
        from medtl.dataset.io import read_plan

        self.config, self.plan = config, read_plan(prepared.plan.path)

    def score(self, val: Artifact) -> Score:
        from medtl.evaluation.growth import auroc_of
        from medtl.evaluation.io import read_predictions

        found, plan = read_predictions(val.path), self.plan
        return auroc_of(found, plan.task, plan.classes, self.config.evaluation, self.config.seed)

    def gain(self, val: Artifact, fewer: Artifact) -> Score:
        from medtl.evaluation.growth import auroc_gain
        from medtl.evaluation.io import read_predictions

        both = read_predictions(val.path), read_predictions(fewer.path)
        return auroc_gain(*both, self.config.evaluation, self.config.seed)


class _Outlined:
    """What networks that segment outline on validation, before anything is cleaned."""

    def __init__(self, config: Config, prepared: Prepared) -> None:
        from pipelines.segmenting import Masks

        self.config, self.material = config, Masks(config, prepared)

    def score(self, val: Artifact) -> Score:
        from medtl.evaluation.growth import dice_of

        return dice_of(self._dice(val), *self._who(val), self.config.evaluation, self.config.seed)

    def gain(self, val: Artifact, fewer: Artifact) -> Score:
        from medtl.evaluation.growth import dice_gain

        both = self._dice(val), self._dice(fewer)
        return dice_gain(*both, *self._who(val), self.config.evaluation, self.config.seed)

    def _dice(self, val: Artifact) -> FloatArray:
        return self.material.dice_of(val, None)

    def _who(self, val: Artifact) -> tuple[list[str], list[str]]:
        studies = self.material.studies(val)
        return [one.study_id for one in studies], [one.patient for one in studies]
