"""The steps of a segmentation: plan the grid, pack volumes, train, predict masks, measure them, release, report.

What is the same for a diagnosis (intake, cohort, split, proof, sealed test part, gate, register) is done by the steps
of :mod:`pipelines.steps`; only what a mask needs is here.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medtl.artifacts import (
    code_digest,
    digest_of,
    file_digest,
    load_array,
    read_record,
    save_array,
    write_record,
)
from medtl.audit import AuditedStore
from medtl.config import Config
from medtl.errors import PlanError, SplitError
from medtl.progress import advance
from medtl.records import (
    AnyArray,
    Artifact,
    Cohort,
    ComponentChoice,
    FloatArray,
    GridPlan,
    MaskResult,
    Part,
    Refit,
    Release,
    Scan,
    Split,
    Structure,
    Study,
)
from pipelines import steps, training
from pipelines.prepared import Prepared, Segmented

if TYPE_CHECKING:
    from medtl.evaluation.pixels import PixelRanks
    from medtl.model.cache import Precision
    from medtl.model.inference import Doubt
    from medtl.model.segmenter import SegmenterNetwork
    from medtl.report.masks import MaskCase
    from pipelines.pooling import Tested

log = logging.getLogger("medtl")
_BEST = 2  # of the cases that are shown
_TOLD = "told.json"  # beside predicted masks: what the network says of itself
_RESAMPLES = 1000  # of the judge between phases


def plan_grid(config: Config, scans: Artifact, cohort: Artifact, split: Artifact) -> Artifact:
    """Training part -> grid, intensity, patch and depth of the network."""
    from medtl.dataset import grid, io
    from medtl.model.segmenter import least_multiple
    from medtl.scans.segments import PixelStore
    from medtl.studies.io import read_cohort

    multiple = least_multiple(config.model)
    inputs = {
        "scans": scans.digest,
        "cohort": cohort.digest,  # what the structures are, and which masks show them
        "split": split.digest,
        "config": config.dataset.grid.model_dump(mode="json"),
        "multiple": multiple,
        "code": [code_digest("dataset"), file_digest(Path(__file__))],
    }

    def build(folder: Path) -> None:
        known, training_part = read_cohort(cohort.path), set(io.read_split(split.path).train)
        by_id = scans_by_id(scans)
        chosen = [study for study in known.studies if study.study_id in training_part]
        images, masks = [by_id[s.scan_id] for s in chosen], [_mask_of(s, by_id) for s in chosen]
        stored = PixelStore(steps.pixel_folder(config))
        in_pieces = {study.mask: study for study in chosen if study.regions}

        def read(scan: Scan) -> AnyArray:
            study = in_pieces.get(scan.scan_id)
            return stored(scan) if study is None else _painted(study, by_id, stored, known.structures, known.ignore)

        plan = grid.make_grid_plan(
            images, masks, read, known.structures, known.ignore, config.dataset.grid, (multiple,)
        )
        io.write_grid(folder, plan)

    return AuditedStore(config.workspace).make("plan", inputs, build)


def pack_volumes(config: Config, scans: Artifact, cohort: Artifact, plan: Artifact) -> Artifact:
    """Scans and masks -> one memory-mapped file each, on the plan's grid, in the cohort's order."""
    from medtl.dataset import grid, io
    from medtl.scans.segments import PixelStore
    from medtl.studies.io import read_cohort

    how = io.read_grid(plan.path)
    decided = {name: value for name, value in asdict(how).items() if name not in ("facts", "reasons")}
    inputs = {
        "scans": scans.digest,
        "cohort": cohort.digest,
        "plan": decided,
        "code": [code_digest("dataset"), file_digest(Path(__file__))],
    }

    def build(folder: Path) -> None:
        known, by_id = read_cohort(cohort.path), scans_by_id(scans)
        read = PixelStore(steps.pixel_folder(config))

        wrong = [why for study in known.studies if (why := grid.misfit(by_id[study.scan_id], how)) is not None]
        if wrong:
            raise PlanError(
                f"{len(wrong)} of {len(known.studies)} scans do not fit the plan, the first: {wrong[0]}. Take them out "
                "of the label table, or normalise each by itself: --set dataset.grid.intensity=zscore"
            )

        def items() -> Iterator[tuple[str, FloatArray, AnyArray]]:
            for study in known.studies:
                scan = by_id[study.scan_id]
                yield study.study_id, grid.to_grid(read(scan), scan, how), _on_grid(study, scan, by_id, read, how)

        io.write_volumes(folder, items(), how, len(known.studies))

    return AuditedStore(config.workspace).make("pack", inputs, build)


def from_scratch(config: Config) -> Config:
    """Give the config of the same network without weights."""
    from medtl.model.segmenter import choose

    model = training.scratch_model(config.model, masks=True)
    named = model.segmenter.model_copy(update={"network": choose(config.model)})  # not what "auto" is without weights
    return config.model_copy(update={"model": model.model_copy(update={"segmenter": named})})


def fit_masks(config: Config, prepared: Prepared, scratch: bool = False) -> Artifact:
    """Packed volumes -> checkpoint of one network, or of several, each trained without one fold."""
    config = from_scratch(config) if scratch else config
    label, count = "training from scratch" if scratch else "training", config.model.segmenter.members
    if count == 1:
        return _fit_one(config, prepared, label)
    found = [
        _fit_one(config, replace(prepared, split=split), f"{label}, network {number} of {count}")
        for number, split in enumerate(_folds_within(config, prepared, count), 1)
    ]
    inputs = {"members": [one.digest for one in found], "code": [code_digest("model"), file_digest(Path(__file__))]}
    store, folders = AuditedStore(config.workspace), [one.path for one in found]
    joined = store.make("checkpoint", inputs, lambda folder: _join(folder, folders))
    if not joined.reused:
        steps.keep_seconds(config, joined, sum(steps.seconds_of(config, one) or 0.0 for one in found))
    return joined


def refit_masks(config: Config, prepared: Prepared, chosen: Artifact, scratch: bool = False) -> Artifact:
    """Checkpoint -> one trained once more, on training and validation together, as long as its best state took."""
    from medtl.model.io import read_checkpoint
    from medtl.model.phases import phases_again
    from medtl.model.segmenter import choose

    config = from_scratch(config) if scratch else config
    model = config.model
    again = phases_again(model.schedule, read_checkpoint(chosen.path).phases, model.guard)
    named = model.segmenter.model_copy(update={"network": choose(model)})
    # a strategy by name may say where weights come from, and phases of one's own do not: it starts where the first did
    alike = model.model_copy(update={"phases": again, "weights": model.origin, "segmenter": named})
    config = config.model_copy(update={"model": alike})
    label = "training from scratch on validation too" if scratch else "training on validation too"
    return _fit_one(config, prepared, label, chosen)


def _join(folder: Path, members: Sequence[Path]) -> None:
    from medtl.model.io import join_segmenters

    join_segmenters(folder, members)


def _folds_within(config: Config, prepared: Prepared, count: int) -> list[Artifact]:
    """Cut the training part into folds; validation and test are in none of them."""
    from medtl.dataset import io, split
    from medtl.studies.io import read_cohort

    known, outer = read_cohort(prepared.cohort.path), io.read_split(prepared.split.path)
    inputs = {
        "cohort": prepared.cohort.digest,  # folds are stratified by what its masks show
        "split": prepared.split.digest,
        "members": count,
        "seed": config.seed,
        "code": code_digest("dataset"),
    }
    store, found = AuditedStore(config.workspace), []
    for number, inner in enumerate(split.folds_within(known.studies, outer, count, config.seed), 1):

        def build(folder: Path, inner: Split = inner) -> None:
            io.write_split(folder, inner)

        found.append(store.make("folds", {**inputs, "member": number}, build))
    return found


def _fit_one(config: Config, prepared: Prepared, label: str, chosen: Artifact | None = None) -> Artifact:
    """Train one network, phase by phase; go on where an interrupted run was."""
    code = [file_digest(Path(__file__))]
    return train_patches(config, prepared, label, code, counts="inference", chosen=chosen)  # inference validates


def train_patches(
    config: Config,
    prepared: Prepared,
    label: str,
    code: Sequence[str],
    counts: str,
    unlabelled: bool = False,
    chosen: Artifact | None = None,
) -> Artifact:
    """Train a network that learns from patches; see :func:`pipelines.steps.train_network`."""
    rests_on = {
        "patches": config.dataset.patches.model_dump(mode="json"),
        "code": [*training.code_of_training(), *code],
        "libraries": training.versions("torch", "torchvision", "monai", "numpy"),
    }
    artifacts = (prepared.cohort, prepared.split, prepared.plan, prepared.pack)
    return steps.train_network(config, *artifacts, rests_on, label, counts, unlabelled=unlabelled, chosen=chosen)


def train_here(job: training.Job, folder: Path) -> None:
    """Train in this process, alone or as one of several that torchrun has started; the first writes the checkpoint."""
    from medtl.dataset.io import read_grid, read_split, read_volumes
    from medtl.dataset.patches import Patches
    from medtl.evaluation.superiority import share_of_means_better
    from medtl.model import devices, io, parallel, segment_fit, segmenter
    from medtl.model.vault import Vault, resolve_weights
    from medtl.studies.io import read_cohort

    config, model = job.config, job.config.model
    cohort, split, plan = read_cohort(job.cohort), read_split(job.split), read_grid(job.plan)
    devices.make_deterministic(config.seed, job.threads)
    weights = resolve_weights(model.origin, model.backbone, Vault(training.vault_folder(config)), model.fetch)
    network, report = segmenter.build(plan, model, config.seed, weights)
    if parallel.rank() == 0:
        log.info("weights of %s: %s, %.1f %% of the trunk", network.kind, report.source, 100 * report.share)
    device = devices.device_of(model)
    network = parallel.prepare(network, model.schedule, device)
    volumes = read_volumes(job.pack)
    row = {study_id: number for number, study_id in enumerate(volumes.study_ids)}
    patient = {study.study_id: study.patient for study in cohort.studies}
    val = sorted(split.val, key=row.__getitem__)
    precision = devices.precision_of(model, device)

    def validate(trained: SegmenterNetwork) -> FloatArray:
        mine = parallel.share_of(np.arange(len(val)), whole=True)
        found = [_dice_on_grid(trained, volumes, row[val[int(i)]], plan, config, device, precision) for i in mine]
        return parallel.gather(np.array(found, dtype=np.float64).reshape(len(mine), len(plan.structures)))

    def judge(new: FloatArray, old: FloatArray) -> float:
        return share_of_means_better(new, old, val, [patient[s] for s in val], _RESAMPLES, config.seed)

    learned = split.train if job.chosen is None else sorted((*split.train, *split.val), key=row.__getitem__)
    patches = Patches(volumes, [row[s] for s in learned], plan, config.dataset.patches, config.seed)
    asked = (validate, judge) if job.chosen is None else (None, None)
    material = segment_fit.SegmentMaterial(patches, *asked)
    saver = io.FolderSaver(job.unfinished)
    phases, history = segment_fit.fit_segmenter(network, material, plan, model, config.seed, saver, job.label)
    if parallel.rank() != 0:
        return
    refit: Refit | None = None
    if job.chosen is not None:
        first, people = io.read_checkpoint(job.chosen), {patient[study] for study in learned}
        refit = Refit(first.weights_sha256, len(learned), len(people), phases, history)
        phases, history = first.phases, first.history
    described = {
        "backbone": network.kind,
        "task": cohort.task,
        "classes": cohort.classes,
        "channels": plan.channels,
        "size": plan.patch,
        **training.described_by(network, report, phases, history),
        "environment": training.environment_of(job, device.type, precision),
        "refit": refit,
    }
    io.write_segmenter(folder, network.to("cpu"), described, model)


def _dice_on_grid(
    network: SegmenterNetwork, volumes: Any, row: int, plan: GridPlan, config: Config, device: Any, precision: Any
) -> FloatArray:
    from medtl.evaluation.masks import dice_of_codes
    from medtl.model.inference import codes, predict_grid

    image = np.asarray(volumes.image(row), dtype=np.float32)
    probabilities = predict_grid(network, image, plan, config.model.inference, device, precision)
    return dice_of_codes(np.asarray(volumes.codes(row)), codes(probabilities, plan), plan.structures, plan.overlapping)


def predict_masks(
    config: Config, prepared: Prepared, checkpoint: Artifact, part: Part, purpose: str = "model"
) -> Artifact:
    """Checkpoint -> masks of one part in the voxels of its scans. Opening the test part is logged.

    Raises:
        SplitError: of the validation part, by a network that learned from it.
    """
    from medtl.dataset.io import read_split
    from medtl.model.io import read_checkpoint
    from medtl.scans.segments import PixelStore
    from medtl.studies.io import read_cohort

    if part == "val" and read_checkpoint(checkpoint.path).refit is not None:
        raise SplitError("This network learned from the validation part: nothing may be chosen or judged there by it.")
    inputs = {
        "checkpoint": checkpoint.digest,
        "scans": prepared.scans.digest,
        "cohort": prepared.cohort.digest,
        "split": prepared.split.digest,
        "plan": prepared.plan.digest,
        "part": part,
        "code": [code_digest("model", "dataset"), file_digest(Path(__file__))],
    }
    if part == "test":
        steps.open_test(config, prepared.cohort, prepared.split, checkpoint, inputs, purpose, "masks")

    def build(folder: Path) -> None:
        known, by_id = read_cohort(prepared.cohort.path), scans_by_id(prepared.scans)
        chosen = set(read_split(prepared.split.path).part(part))
        studies = [study for study in known.studies if study.study_id in chosen]
        network = Segmenter(config, checkpoint.path, prepared.plan.path)
        read, said = PixelStore(steps.pixel_folder(config)), {}
        for number, study in enumerate(studies, 1):
            kept = unfinished / f"{study.study_id}.json"  # written last: what is there is whole
            if not kept.is_file():
                scan = by_id[study.scan_id]
                predicted = network(read(scan), scan)
                save_array(unfinished / f"{study.study_id}.npy", predicted.codes)
                if predicted.probabilities is not None:
                    save_array(unfinished / f"{study.study_id}.probabilities.npy", predicted.probabilities)
                write_record(kept, dict(predicted.doubts))
            said[study.study_id] = read_record(kept, dict[str, float | None])
            advance(f"segmenting, {part}", number, len(studies))
        for path in sorted(unfinished.glob("*.npy")):
            shutil.copyfile(path, folder / path.name)  # a kill here must leave what was computed
        write_record(folder / _TOLD, said)

    store = AuditedStore(config.workspace)
    unfinished = store.scratch(f"masks-{digest_of(inputs)[:24]}")
    made = store.make("masks", inputs, build)
    shutil.rmtree(unfinished, ignore_errors=True)
    return made


def evaluate_masks(config: Config, prepared: Prepared, val: Artifact, test: Artifact) -> Artifact:
    """Predicted masks -> what is kept of them and how Dice is foretold, from validation; then the test part."""
    from medtl.evaluation import io, masks, quality

    inputs = {
        "cohort": prepared.cohort.digest,
        "scans": prepared.scans.digest,
        "plan": prepared.plan.digest,
        "val": val.digest,
        "test": test.digest,
        "config": config.evaluation.model_dump(mode="json"),
        "seed": config.seed,
        "code": [code_digest("evaluation", "dataset"), file_digest(Path(__file__))],
    }

    def build(folder: Path) -> None:
        material, asked = Masks(config, prepared), config.evaluation.masks
        whole, largest = (material.dice_of(val, choice) for choice in (None, material.largest))
        components = masks.choose_components(whole, largest, material.cohort.classes, asked)
        filled = [replace(choice, fill=True) for choice in components]
        kept = [material.dice_of(val, some) for some in (components, filled)]
        components = masks.choose_holes(components, kept[0], kept[1], asked)
        io.write_components(folder, components)
        learned = material.measured(val, components)
        rule = quality.fit_quality(*material.foretold_from(val, learned), asked, config.seed, _assumed(learned))
        io.write_quality(folder, rule)
        results = material.measured(test, components)
        io.write_mask_results(folder, results)
        evaluation = masks.assess_masks(results, config.evaluation, config.seed, material.unit, material.pixels(test))
        doubts, dice, ids, people = material.foretold_from(test, results)
        foretold = quality.foretell(rule, doubts)
        told = quality.quality_scores(rule, foretold, dice, ids, people, config.evaluation.uncertainty, config.seed)
        io.write_evaluation(folder, replace(evaluation, scores=(*evaluation.scores, *told)))

    return AuditedStore(config.workspace).make("evaluation", inputs, build)


class Masks:
    """The true and the predicted masks of a cohort, study by study."""

    def __init__(self, config: Config, prepared: Prepared) -> None:
        from medtl.dataset.io import read_grid
        from medtl.scans.segments import PixelStore
        from medtl.studies.io import read_cohort

        self.config, self.plan = config, read_grid(prepared.plan.path)
        self.cohort, self.by_id = read_cohort(prepared.cohort.path), scans_by_id(prepared.scans)
        self.read = PixelStore(steps.pixel_folder(config))
        self.unit: Literal["mm", "pixels"] = "pixels" if self.plan.axis is None else "mm"

    def studies(self, part: Artifact) -> tuple[Study, ...]:
        """List the studies that have a predicted mask, in the cohort's order."""
        there = read_record(part.path / _TOLD, dict[str, dict[str, float | None]])
        return tuple(study for study in self.cohort.studies if study.study_id in there)

    def truth(self, study: Study) -> AnyArray:
        """Give the true codes in the scan's voxels."""
        return truth_of(study, self.cohort, self.by_id, self.read)

    def predicted(self, part: Artifact, study: Study, components: Sequence[ComponentChoice] = ()) -> AnyArray:
        """Give the predicted codes, cleaned as chosen."""
        return cleaned(load_array(part.path / f"{study.study_id}.npy"), self.plan, components)

    @property
    def largest(self) -> tuple[ComponentChoice, ...]:
        """Choose the largest part of every structure."""
        return tuple(ComponentChoice(name, "largest", "", None, None, 0) for name in self.cohort.classes)

    def dice_of(self, part: Artifact, components: Sequence[ComponentChoice] | None) -> FloatArray:
        """Give the Dice of each study and structure, NaN where both masks are empty."""
        from medtl.evaluation.masks import dice_of_codes

        found = [
            dice_of_codes(
                self.truth(study), self.predicted(part, study, components or ()), self.plan.structures,
                self.plan.overlapping,
            )
            for study in self.studies(part)
        ]  # fmt: skip
        return np.array(found).reshape(len(found), len(self.plan.structures))

    def measured(self, part: Artifact, components: Sequence[ComponentChoice]) -> tuple[MaskResult, ...]:
        """Measure every structure of every study."""
        from medtl.evaluation.masks import measure_case

        found: list[MaskResult] = []
        studies = self.studies(part)
        for number, study in enumerate(studies, 1):
            found += measure_case(
                study.study_id, study.patient, self.truth(study), self.predicted(part, study, components),
                _spacing(self.by_id[study.scan_id]), self.plan.structures, self.plan.overlapping,
                self.config.evaluation.masks,
            )  # fmt: skip
            advance("measuring masks", number, len(studies))
        return tuple(found)

    def foretold_from(
        self, part: Artifact, results: Sequence[MaskResult]
    ) -> tuple[list[dict[str, float | None]], FloatArray, list[str], list[str]]:
        """Give what the network said of itself, the mean Dice, identifiers and patients, study by study."""
        told = read_record(part.path / _TOLD, dict[str, dict[str, float | None]])
        studies = self.studies(part)
        doubts = [told[study.study_id] for study in studies]
        by_study: dict[str, list[float]] = {study.study_id: [] for study in studies}
        for one in results:
            if (dice := one.values["dice"]) is not None:
                by_study[one.study_id].append(dice)
        means = np.array([np.mean(values) if values else np.nan for values in by_study.values()])
        return doubts, means, [s.study_id for s in studies], [s.patient for s in studies]

    def pixels(self, part: Artifact) -> dict[str, list[PixelRanks]] | None:
        """Rank the pixels of images, structure by structure; volumes have too many to keep."""
        from medtl.dataset.grid import IGNORED, shown
        from medtl.evaluation.pixels import pixel_ranks

        if self.plan.axis is not None:
            return None
        found: dict[str, list[PixelRanks]] = {name: [] for name in self.cohort.classes}
        for study in self.studies(part):
            truth = self.truth(study)
            probabilities = load_array(part.path / f"{study.study_id}.probabilities.npy")
            for place, name in enumerate(self.cohort.classes):
                inside = shown(truth, place, self.plan.overlapping)
                found[name].append(
                    pixel_ranks(study.study_id, study.patient, probabilities[place], inside, truth != IGNORED)
                )
        return found

    def cases(
        self,
        part: Artifact,
        results: Sequence[MaskResult],
        components: Sequence[ComponentChoice],
        chosen: Sequence[str],
    ) -> tuple[MaskCase, ...]:
        """Draw some studies, given from the worst to the best; pack volumes for the viewer where it is installed."""
        from medtl.dataset.transforms import meaning, oriented
        from medtl.report import viewer
        from medtl.report.masks import MaskCase, pictures

        studies = {study.study_id: study for study in self.cohort.studies}
        found = []
        for place, study_id in enumerate(chosen):
            study = studies[study_id]
            scan = self.by_id[study.scan_id]
            arrays = [_from_0_to_1(self.read(scan)), self.truth(study), self.predicted(part, study, components)]
            spacing, viewed = _spacing(scan), None
            if self.plan.axis is not None:
                assert scan.affine is not None
                if viewer.is_installed():
                    viewed = viewer.view(meaning(self.read(scan), scan), arrays[1], arrays[2], np.array(scan.affine))
                turned = [oriented(array, scan.affine, self.plan.axis) for array in arrays]
                arrays, spacing = [array for array, _ in turned], turned[0][1]
            drawn = pictures(
                arrays[0], arrays[1], arrays[2], spacing, len(self.plan.structures), self.plan.overlapping,
                self.plan.axis,
            )  # fmt: skip
            own = tuple(one for one in results if one.study_id == study_id)
            found.append(MaskCase(place < len(chosen) - _BEST, own, drawn, viewed))
        return tuple(found)


def _from_0_to_1(pixels: AnyArray) -> FloatArray:
    """Stretch values between their 0.5 and 99.5 percentiles, for the eye."""
    values = pixels.astype(np.float32)
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    stretched: FloatArray = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    return stretched


def cleaned(codes: AnyArray, plan: GridPlan, components: Sequence[ComponentChoice]) -> AnyArray:
    """Keep of each structure what validation chose to keep, and fill its holes where validation chose to."""
    from medtl.dataset.restore import fill_holes, keep_largest

    kept = [place for place, choice in enumerate(components) if choice.keep == "largest"]
    filled = [place for place, choice in enumerate(components) if choice.fill]
    codes = keep_largest(codes, plan, kept) if kept else codes
    return fill_holes(codes, plan, filled) if filled else codes


def pool_mask_folds(config: Config, cohort: Artifact, found: Sequence[Tested]) -> Artifact:
    """Folds -> one evaluation with intervals over patients."""
    from medtl.evaluation import io, masks

    inputs = {
        "cohort": cohort.digest,
        "folds": [[one.name, one.repeat, one.trained.evaluation.digest] for one in found],
        "config": config.evaluation.model_dump(mode="json"),
        "seed": config.seed,
        "code": [code_digest("evaluation"), file_digest(Path(__file__))],
    }

    def build(folder: Path) -> None:
        results = {one.name: io.read_mask_results(one.trained.evaluation.path) for one in found}
        ranks: dict[str, Mapping[str, Sequence[PixelRanks]]] = {}
        unit: Literal["mm", "pixels"] = "mm"
        for one in found:
            material = Masks(config, one.prepared)
            unit = material.unit
            if (counted := material.pixels(one.trained.test)) is not None:
                ranks[one.name] = counted
        io.write_evaluation(folder, masks.pool_masks(results, config.evaluation, config.seed, unit, ranks or None))

    return AuditedStore(config.workspace).make("evaluation", inputs, build)


def compare_masks(config: Config, own: Sequence[Segmented], reference: Sequence[Segmented]) -> Artifact:
    """Two ways' masks of the same test part, or of those of several folds -> the difference of their Dice."""
    from medtl.evaluation import io, masks

    inputs = {
        "model": [one.evaluation.digest for one in own],
        "reference": [one.evaluation.digest for one in reference],
        "config": config.evaluation.model_dump(mode="json"),
        "seed": config.seed,
        "code": [code_digest("evaluation"), file_digest(Path(__file__))],
    }

    def build(folder: Path) -> None:
        both = [
            [result for one in side for result in io.read_mask_results(one.evaluation.path)]
            for side in (own, reference)
        ]
        found = masks.compare_masks(both[0], both[1], ("transfer", "scratch"), config.evaluation, config.seed)
        io.write_comparison(folder, found)

    return AuditedStore(config.workspace).make("comparison", inputs, build)


def release_masks(config: Config, prepared: Prepared, segmented: Segmented) -> tuple[Artifact, Release]:
    """Checkpoint and evaluation -> release, entered in the register as the gate decides."""
    parts = (segmented.checkpoint, prepared.plan, segmented.evaluation)
    return steps.enter_release(config, prepared, segmented, parts)


def report_masks(
    config: Config,
    prepared: Prepared,
    segmented: Segmented,
    scratch: Segmented | None,
    comparison: Artifact | None,
    release: Release,
    resources: Mapping[str, Any],
) -> tuple[Artifact, Path]:
    """Everything known -> one page; give the artifact and the copy that people open."""
    from medtl.evaluation import io
    from medtl.evaluation.masks import telling_masks
    from medtl.evaluation.quality import QUALITY_METRICS
    from medtl.model.io import read_checkpoint
    from medtl.report import viewer
    from medtl.report.io import viewer_digest, write_mask_report
    from medtl.report.masks import MaskFacts

    material = Masks(config, prepared)
    results, components = (
        io.read_mask_results(segmented.evaluation.path),
        io.read_components(segmented.evaluation.path),
    )
    facts = MaskFacts(
        **steps.known_facts(config, prepared, segmented, release),
        plan=material.plan,
        scratch=read_checkpoint(scratch.checkpoint.path) if scratch else None,
        scratch_evaluation=io.read_evaluation(scratch.evaluation.path) if scratch else None,
        comparison=io.read_comparison(comparison.path) if comparison else None,
        results=results,
        components=components,
        quality=io.read_quality(segmented.evaluation.path),
        quality_scores=tuple(
            s for s in io.read_evaluation(segmented.evaluation.path).scores if s.metric in QUALITY_METRICS
        ),
        unit=material.unit,
    )
    inputs = {
        **steps.shown_by(config, prepared, facts),
        "test": segmented.test.digest,
        "comparison": comparison.digest if comparison else None,
        "scratch": scratch.checkpoint.digest if scratch else None,
        "growth": segmented.growth.digest if segmented.growth else None,
        "viewer": viewer_digest() if material.plan.axis is not None else None,
    }
    measured = steps.first_measured(config, inputs, resources)

    def build(folder: Path) -> None:
        cases = material.cases(segmented.test, results, components, telling_masks(results))
        name = f"{config.name}-{release.release_id}{steps.VIEWER}" if viewer.chosen(cases) else None
        write_mask_report(folder, replace(facts, cases=cases, viewer=name, resources=measured))

    artifact = AuditedStore(config.workspace).make("report", inputs, build)
    return artifact, steps.copy_to_reports(config, f"{config.name}-{release.release_id}.html", artifact)


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a release says of one scan."""

    codes: AnyArray  # in the scan's voxels, (slices, rows, columns) or (rows, columns)
    probabilities: FloatArray | None  # of images, (structures, rows, columns), float16
    doubts: Mapping[str, float | None]  # how unsure the network is, by name


class Segmenter:
    """A trained segmentation, of one network or several, asked scan by scan; nothing is cleaned yet."""

    def __init__(self, config: Config, checkpoint: Path, plan: Path) -> None:
        from medtl.dataset.io import read_grid
        from medtl.model import devices, io

        devices.make_deterministic(config.seed, training.threads_for(config.model, 1))
        self.settings, self.plan = io.read_inference(checkpoint), read_grid(plan)
        self.device = devices.device_of(config.model)
        self.networks = io.read_segmenters(checkpoint, self.plan)
        trained_in: Any = io.read_checkpoint(checkpoint).environment["precision"]
        wanted = self.settings.precision
        self.precision: Precision = trained_in if wanted == "auto" else wanted

    def __call__(self, pixels: AnyArray, scan: Scan) -> Predicted:
        """Predict one scan in its own voxels."""
        from medtl.dataset.grid import to_grid
        from medtl.dataset.restore import to_source
        from medtl.model.inference import Doubt, predict_grid, predict_slabs

        image, doubt = to_grid(pixels, scan, self.plan), Doubt(self.plan)
        asked = (self.networks, image, self.plan, self.settings, self.device, self.precision, doubt)
        if scan.is_volume:  # slab by slab: a large volume's probabilities are never whole in memory
            return Predicted(to_source(predict_slabs(*asked), scan, self.plan), None, self._said(doubt))
        probabilities = predict_grid(*asked)
        shown = probabilities[-len(self.plan.structures) :].astype(np.float16)
        return Predicted(to_source(probabilities, scan, self.plan), shown, self._said(doubt))

    def _said(self, doubt: Doubt) -> dict[str, float | None]:
        from medtl.evaluation.quality import EXPECTED

        found, names = doubt.quality, [one.name for one in self.plan.structures]
        said = {f"entropy {name}": value for name, value in zip(names, found.entropy, strict=True)}
        said |= {f"{EXPECTED} {name}": value for name, value in zip(names, found.expected, strict=True)}
        if any(value is not None for value in found.agreement):
            said |= {f"agreement {name}": value for name, value in zip(names, found.agreement, strict=True)}
        return said


def _assumed(learned: Sequence[MaskResult]) -> dict[str, float]:
    """Say what stands for the numbers of structures that some validation patients rightly lack: that all is sure."""
    absent = sorted({one.structure for one in learned if one.truth_ml == 0})
    return {f"{number} {name}": sure for name in absent for number, sure in (("entropy", 0.0), ("agreement", 1.0))}


def scans_by_id(scans: Artifact) -> dict[str, Scan]:
    """Read the scans of an intake."""
    from medtl.scans.intake import read_scans

    return {scan.scan_id: scan for scan in read_scans(scans.path)}


def _on_grid(study: Study, scan: Scan, by_id: Mapping[str, Scan], read: Any, plan: GridPlan) -> AnyArray:
    from medtl.dataset import grid

    values, field = _drawn(study, by_id, read, plan.structures, plan.ignore)
    return grid.mask_to_grid(values, scan, plan, field)


def _drawn(
    study: Study, by_id: Mapping[str, Scan], read: Any, structures: Sequence[Structure], ignore: int | None
) -> tuple[AnyArray, AnyArray | None]:
    """Read what the values of a study's mask and of its field mean."""
    from medtl.dataset.grid import values_of

    field = None if study.field is None else values_of(read(by_id[study.field]), by_id[study.field])
    if study.regions:
        return _painted(study, by_id, read, structures, ignore), field
    mask = _mask_of(study, by_id)
    return values_of(read(mask), mask), field


def _painted(
    study: Study, by_id: Mapping[str, Scan], read: Any, structures: Sequence[Structure], ignore: int | None
) -> AnyArray:
    """Put the pieces of a DICOM mask together, as was done when the cohort was made."""
    from medtl.regions import paint

    whole = paint(((read(by_id[region]), value) for region, value in study.regions), structures, ignore)
    assert whole is not None  # else the study were not in the cohort
    return whole


def _mask_of(study: Study, by_id: Mapping[str, Scan]) -> Scan:
    assert study.mask is not None  # a cohort for segmentation holds no other
    return by_id[study.mask]


def truth_of(study: Study, cohort: Cohort, by_id: Mapping[str, Scan], read: Any) -> AnyArray:
    """Give the true codes of a study in its scan's voxels."""
    from medtl.dataset import grid

    values, field = _drawn(study, by_id, read, cohort.structures, cohort.ignore)
    return grid.codes_of(values, cohort.structures, cohort.ignore, field)


def _spacing(scan: Scan) -> tuple[float, ...]:
    """Give the distance of voxels along each axis of a scan's array: mm, of images pixels."""
    if scan.affine is None:
        return (1.0, 1.0)
    columns, rows, slices = (float(v) for v in np.linalg.norm(np.array(scan.affine)[:3, :3], axis=0))
    return slices, rows, columns
