"""What a model's answers are worth beyond its metrics.

::

    val ─▶ calibrate ─▶ Calibrator, ConformalRule ─┐
    images ─▶ look_inside ─▶ features ─────────────┴─▶ examine ─▶ does 0.8 come true · when should it be silent ·
                                                                  how strange is a case · for whom is it worse · by what
                                                                  shortcut could it be right · who lies too near
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medtl.artifacts import code_digest, load_array, read_record, save_array, write_record
from medtl.audit import AuditedStore
from medtl.config import Config
from medtl.records import (
    PARTS,
    AbstentionFindings,
    AnyArray,
    Artifact,
    CalibrationFindings,
    Calibrator,
    Cohort,
    ConformalRule,
    Evaluation,
    Examination,
    FeatureCheck,
    FloatArray,
    NoveltyFindings,
    NoveltyRule,
    Part,
    Plan,
    Predictions,
    Robustness,
    ShortcutFindings,
    Split,
    StressTest,
    Study,
    SubgroupFindings,
)
from pipelines import training
from pipelines.prepared import Prepared, Trained

CALIBRATOR, CONFORMAL, ROBUSTNESS = "calibrator.json", "conformal.json", "robustness.json"
TALLY = "tally.json"
_FOUND = {
    "calibration": CalibrationFindings, "abstention": AbstentionFindings, "novelty": NoveltyFindings,
    "subgroups": SubgroupFindings, "shortcuts": ShortcutFindings, "robustness": Robustness, "neighbours": FeatureCheck,
}  # fmt: skip


def read_examination(folder: Path) -> Examination:
    """Read an examination back."""
    return Examination(**{name: read_record(folder / f"found_{name}.json", kind) for name, kind in _FOUND.items()})


def calibrate(config: Config, plan: Artifact, val: Artifact) -> Artifact:
    """Validation -> the calibrator of a model's probabilities, and when it should not answer."""
    from medtl.dataset.io import read_plan
    from medtl.evaluation import abstention, calibration
    from medtl.evaluation.io import read_predictions

    wanted = config.evaluation
    inputs = {
        "plan": plan.digest,
        "val": val.digest,
        "config": [wanted.calibration.model_dump(mode="json"), wanted.abstention.model_dump(mode="json")],
        "seed": config.seed,
        "code": code_digest("evaluation"),
    }

    def build(folder: Path) -> None:
        how, answers = read_plan(plan.path), read_predictions(val.path)
        found = calibration.fit(answers, how.task, how.classes, wanted.calibration, config.seed)
        write_record(folder / CALIBRATOR, found)
        rule = abstention.fit(calibration.calibrated(found, answers), how.task, how.classes, wanted.abstention)
        write_record(folder / CONFORMAL, rule)

    return AuditedStore(config.workspace).make("calibrator", inputs, build)


def look_inside(config: Config, checkpoint: Artifact, prepared: Prepared) -> Artifact:
    """Checkpoint and images -> the features that enter its head, of every part; slices of a volume are averaged."""
    from medtl.dataset.io import read_pack, read_split
    from medtl.dataset.loading import EvaluationBatches, rows_of, slices_of
    from medtl.model import devices, io
    from medtl.model.predict import look
    from medtl.studies.io import read_cohort

    inputs = {
        "checkpoint": checkpoint.digest,
        "cohort": prepared.cohort.digest,
        "split": prepared.split.digest,
        "pack": prepared.pack.digest,
        "batch_size": config.model.batch_size,
        "code": code_digest("model", "dataset"),
    }

    def build(folder: Path) -> None:
        known, split = read_cohort(prepared.cohort.path), read_split(prepared.split.path)
        images, network = read_pack(prepared.pack.path), io.read_network(checkpoint.path)
        slices, device = slices_of(images, len(known.studies)), devices.device_of(config.model)
        place = {study.study_id: row for row, study in enumerate(known.studies)}
        devices.make_deterministic(config.seed, training.threads_for(config.model, 1))
        for part in PARTS:
            shown = rows_of([place[study] for study in split.part(part)], slices)
            batches = EvaluationBatches(images, np.repeat(known.targets, slices, 0), shown, config.model.batch_size)
            inside = look(network, batches, known.task, device)[1]
            save_array(folder / f"{part}.npy", inside.reshape(-1, slices, inside.shape[1]).mean(axis=1))

    return AuditedStore(config.workspace).make("features", inputs, build)


def apply_calibrator(config: Config, calibrator: Artifact, predictions: Artifact) -> Artifact:
    """Predictions -> the same with calibrated probabilities."""
    from medtl.evaluation.calibration import calibrated
    from medtl.evaluation.io import read_predictions, write_predictions

    inputs = {"predictions": predictions.digest, "calibrator": calibrator.digest, "code": code_digest("evaluation")}

    def build(folder: Path) -> None:
        fitted = read_record(calibrator.path / CALIBRATOR, Calibrator)
        write_predictions(folder, calibrated(fitted, read_predictions(predictions.path)))

    return AuditedStore(config.workspace).make("predictions", inputs, build)


def stress(config: Config, prepared: Prepared, trained: Trained) -> Artifact:
    """Checkpoint and the test part's images, changed as another scanner or hand would -> how much worse it gets."""
    from medtl.dataset.io import read_pack, read_split
    from medtl.dataset.loading import rows_of, slices_of, voted
    from medtl.dataset.perturb import PERTURBATIONS, Strength, perturbed
    from medtl.evaluation.calibration import apply
    from medtl.evaluation.comparison import compare
    from medtl.evaluation.grouped import mean_auroc
    from medtl.evaluation.io import read_predictions
    from medtl.model import devices, io
    from medtl.model.predict import predict
    from medtl.progress import advance
    from medtl.studies.io import read_cohort

    inputs = {
        "checkpoint": trained.checkpoint.digest,
        "test": trained.test.digest,
        "cohort": prepared.cohort.digest,
        "split": prepared.split.digest,
        "pack": prepared.pack.digest,
        "calibrator": trained.calibrator.digest,
        "config": config.evaluation.uncertainty.model_dump(mode="json"),
        "batch_size": config.model.batch_size,
        "seed": config.seed,
        "code": code_digest("model", "dataset", "evaluation"),
    }

    def build(folder: Path) -> None:
        known, split = read_cohort(prepared.cohort.path), read_split(prepared.split.path)
        images, plain = read_pack(prepared.pack.path), read_predictions(trained.test.path)
        slices = slices_of(images, len(known.studies))
        place = {study.study_id: row for row, study in enumerate(known.studies)}
        rows = rows_of([place[study] for study in split.test], slices)
        fitted = read_record(trained.calibrator.path / CALIBRATOR, Calibrator)
        network, device = io.read_network(trained.checkpoint.path), devices.device_of(config.model)
        devices.make_deterministic(config.seed, training.threads_for(config.model, 1))
        size, found = config.model.batch_size, []
        strengths: tuple[Strength, ...] = ("mild", "strong")
        asked = [(name, strength) for name in PERTURBATIONS for strength in strengths]
        for done, (name, strength) in enumerate(asked, 1):
            batches = (
                (perturbed(images[rows[start : start + size]], name, strength, config.seed + start), known.targets)
                for start in range(0, len(rows), size)
            )
            told = apply(fitted, voted(predict(network, batches, known.task, device), slices))
            new = replace(plain, probabilities=told)
            paired = compare(new, plain, (name, "as it was"), config.evaluation.uncertainty, config.seed)
            auroc = mean_auroc(new, known.task, known.classes, config.evaluation.uncertainty, config.seed)
            other = float(np.mean(told.argmax(1) != plain.probabilities.argmax(1)))
            found.append(StressTest(name, strength, PERTURBATIONS[name][2], auroc, paired.difference, other))
            advance("stress tests", done, len(asked))
        write_record(folder / ROBUSTNESS, Robustness(tuple(found)))

    return AuditedStore(config.workspace).make("robustness", inputs, build)


def examine(config: Config, prepared: Prepared, trained: Trained, inside: Artifact, stressed: Artifact) -> Artifact:
    """Predictions and features of the test part -> what they are worth, for whom, and what they may rest on."""
    inputs = {
        "calibrator": trained.calibrator.digest,
        "features": inside.digest,
        "plan": prepared.plan.digest,
        "scans": prepared.scans.digest,
        "pack": prepared.pack.digest,
        "split": prepared.split.digest,
        "robustness": stressed.digest,
        "cohort": prepared.cohort.digest,
        "test": [trained.raw_test.digest, trained.test.digest],
        "evaluation": trained.evaluation.digest,
        "config": config.evaluation.model_dump(mode="json"),
        "attributes": config.studies.labels.attributes,
        "seed": config.seed,
        "code": code_digest("evaluation", "dataset", "monitoring"),
    }
    return AuditedStore(config.workspace).make(
        "examination", inputs, lambda folder: _examine(config, prepared, trained, inside, stressed, folder)
    )


def _examine(
    config: Config, prepared: Prepared, trained: Trained, inside: Artifact, stressed: Artifact, folder: Path
) -> None:
    from medtl.dataset.io import read_plan, read_split
    from medtl.dataset.leaks import near_in_features
    from medtl.evaluation import abstention, calibration, novelty, shortcuts, subgroups
    from medtl.evaluation.io import read_evaluation, read_predictions, write_novelty
    from medtl.monitoring.tally import tally
    from medtl.studies.io import read_cohort

    wanted, seed, plan = config.evaluation, config.seed, read_plan(prepared.plan.path)
    split, known = read_split(prepared.split.path), read_cohort(prepared.cohort.path)
    raw, answers = read_predictions(trained.raw_test.path), read_predictions(trained.test.path)
    evaluation = read_evaluation(trained.evaluation.path)
    fitted = read_record(trained.calibrator.path / CALIBRATOR, Calibrator)
    rule = read_record(trained.calibrator.path / CONFORMAL, ConformalRule)
    features = {part: load_array(inside.path / f"{part}.npy") for part in PARTS}
    studies = {part: _studies(known, split, part) for part in PARTS}
    learned = {part: _part(prepared, known, split, part, features[part], plan) for part in ("train", "test")}
    strange = novelty.fit(
        features["train"], learned["train"].targets, _patients(studies["train"]),
        features["val"], _patients(studies["val"]), wanted.novelty,
    )  # fmt: skip
    write_novelty(folder, strange)
    weighed = _weigh(rule, strange, answers.probabilities, features["test"], evaluation)
    people = answers.patients if known.patients_known else (None,) * len(answers.patients)
    counted = tally(people, weighed.counts, weighed.promised)
    if counted is not None:
        write_record(folder / TALLY, counted)
    columns = {"site": [s.site for s in studies["train"]], "scanner": [s.scanner for s in studies["train"]]}
    groups = subgroups.columns_of(studies["test"], wanted.subgroups.age_edges, config.studies.labels.attributes)
    common = (plan.task, plan.classes)
    found = {
        "calibration": calibration.examine(raw, fitted, plan.classes, wanted, seed),
        "abstention": abstention.examine(answers, rule, wanted.uncertainty, seed),
        "novelty": novelty.examine(
            strange, features["test"], answers.study_ids, answers.patients, {}, wanted.uncertainty, seed
        ),
        "subgroups": subgroups.examine(answers, evaluation.operating_points, *common, groups, wanted, seed),
        "shortcuts": shortcuts.examine(
            learned["train"], learned["test"], answers, columns, *common, wanted.uncertainty, seed
        ),
        # whoever the split binds together stands together: what is known to be alike is no news
        "neighbours": near_in_features(
            np.concatenate([features[part] for part in PARTS]),
            [part for part in PARTS for _ in studies[part]],
            [split.groups[study.study_id] for part in PARTS for study in studies[part]],
        ),
    }
    for name, record in (*found.items(), ("robustness", read_record(stressed.path / ROBUSTNESS, Robustness))):
        write_record(folder / f"found_{name}.json", record)


def _studies(known: Cohort, split: Split, part: Part) -> list[Study]:
    by_id = {study.study_id: study for study in known.studies}
    return [by_id[study] for study in split.part(part)]


def _targets(known: Cohort, split: Split, part: Part) -> FloatArray:
    place = {study.study_id: row for row, study in enumerate(known.studies)}
    return known.targets[[place[study] for study in split.part(part)]]


def _patients(studies: list[Study]) -> list[str]:
    return [study.patient for study in studies]


def _part(prepared: Prepared, known: Cohort, split: Split, part: Part, features: FloatArray, plan: Plan) -> Any:
    """Lay out what the questions about shortcuts look at; the properties of volumes are not asked."""
    from medtl.dataset.io import read_pack
    from medtl.evaluation import shortcuts
    from medtl.scans.intake import read_scans, read_sizes

    studies, properties = _studies(known, split, part), None
    if plan.volumes is None:
        place = {study.study_id: row for row, study in enumerate(known.studies)}
        shapes = {scan.scan_id: (scan.shape[0], scan.shape[1]) for scan in read_scans(prepared.scans.path)}
        rows = [place[study.study_id] for study in studies]
        pixels: AnyArray = read_pack(prepared.pack.path)
        sizes, names = read_sizes(prepared.scans.path), [study.scan_id for study in studies]
        both = [shapes[name] for name in names], [sizes[name] for name in names]
        properties = shortcuts.image_properties(pixels[rows], *both)
    ids, patients = tuple(study.study_id for study in studies), tuple(_patients(studies))
    return shortcuts.Part(ids, patients, _targets(known, split, part), properties, features)


UNSURE, STRANGE = "unsure", "unlike training"


@dataclass(frozen=True, slots=True)
class Weighed:
    """What to think of new answers: each study's doubts, and all of them counted."""

    doubts: tuple[tuple[str, ...], ...] = ()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # question, answer, studies
    promised: float | None = None  # share unlike training


def weigh(
    folder: Path, probabilities: FloatArray, features: FloatArray, evaluation: Evaluation
) -> tuple[FloatArray, Weighed]:
    """Calibrate new answers as a release says, and say for each study why a person should look.

    Args:
        folder: of the release.
        probabilities: (n, classes), as the network gives them.
        features: (n, d), that enter its head.

    Returns:
        Calibrated probabilities; for each study ``unsure`` (more than one answer remains open, or another than the
        decision) or ``unlike training``, both or none; and how many studies gave which answer.
    """
    from medtl.evaluation.calibration import apply
    from medtl.evaluation.io import read_novelty

    told = apply(read_record(folder / CALIBRATOR, Calibrator), probabilities)
    rule = read_record(folder / CONFORMAL, ConformalRule)
    return told, _weigh(rule, read_novelty(folder), told, features, evaluation)


def _weigh(
    rule: ConformalRule, distance: NoveltyRule, told: FloatArray, features: FloatArray, evaluation: Evaluation
) -> Weighed:
    from medtl.evaluation import abstention, novelty, threshold
    from medtl.monitoring import tally

    task, classes = evaluation.task, evaluation.classes
    names = tuple(str(number) for number in range(len(told)))
    new = Predictions("new", names, names, np.full_like(told, np.nan), told)
    called = threshold.decide(new, task, evaluation.operating_points)
    answers = called.astype(int) if task == "multilabel" else called.argmax(axis=1)[:, None]
    sure = np.all(abstention.answered(abstention.prediction_sets(rule, told), answers), axis=1)
    scores = novelty.novelty(distance, features)
    strange = novelty.flagged(distance, scores)
    top = told[:, -1] if task == "binary" else told.max(axis=1)
    counts = {**tally.decided(called, task, classes), "probability": tally.tenths(top)}
    if rule.method != "none":  # a doubt that a release cannot have is no question
        counts[UNSURE] = tally.flagged(1.0 - sure)
    if distance.quantiles:
        counts["novelty"] = tally.between(scores, distance.quantiles)
    if distance.threshold is not None:
        counts[STRANGE] = tally.flagged(strange)
    doubts = []
    for row in range(len(told)):
        unsure = [UNSURE] if rule.method != "none" and not sure[row] else []
        doubts.append((*unsure, *([STRANGE] if strange[row] == 1 else [])))
    return Weighed(tuple(doubts), counts, None if distance.threshold is None else distance.flagged_share)
