"""The steps of pre-training without labels: take scans, hold some out, hide and fill in, keep the weights in the vault.

A config of scans without labels (``studies.labels.table: null``, or a table with ``label: []``) gives all its scans but
those of a predefined test part. The config of a labelled study gives its own training part alone. Either way the images
are listed beside the weights, and no later run takes them into its test part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtl.artifacts import code_digest, file_digest
from medtl.audit import AuditedStore, AuditLog
from medtl.config import Config
from medtl.pseudonyms import load_pseudonymiser
from medtl.records import AnyArray, Artifact, Cohort, FloatArray, Scan, Split, Study
from pipelines import segmenting, steps, training
from pipelines.prepared import Prepared

if TYPE_CHECKING:
    from medtl.model.reconstruct import HiddenPatches
    from medtl.model.segmenter import SegmenterNetwork

log = logging.getLogger("medtl")
_RESAMPLES = 1000  # of the judge between phases
_VIEWS = 4  # patches of each scan that is held out


def is_unlabelled(config: Config) -> bool:
    """Tell scans without labels from a study."""
    from medtl.studies import unlabelled

    return unlabelled.is_unlabelled(config.studies.labels)


def settled(config: Config) -> Config:
    """Give the config with the model that is pre-trained."""
    from medtl.model.reconstruct import model_to_pretrain

    return config.model_copy(update={"model": model_to_pretrain(config.model)})


def gather_cohort(config: Config, scans: Artifact) -> Artifact:
    """Scans -> cohort without classes."""
    from medtl.scans.intake import read_scans
    from medtl.studies import io, labels, unlabelled

    table, names = steps.label_table(config), load_pseudonymiser(config.scans.key_file)
    inputs = {
        "scans": scans.digest,
        "labels": file_digest(table) if table is not None and table.is_file() else None,
        "config": config.studies.model_dump(mode="json"),
        "unlabelled": True,
        "key": names.fingerprint,
        "code": code_digest("studies"),
    }

    def build(folder: Path) -> None:
        found = read_scans(scans.path)
        if table is None:
            rows = unlabelled.rows_of_every_scan(found)
        else:
            columns, cells = io.read_table(table)
            rows = labels.rows_of(columns, cells, config.studies.labels, names)
        io.write_cohort(folder, unlabelled.gather(found, rows, config.studies))

    artifact = AuditedStore(config.workspace).make("cohort", inputs, build)
    cohort = io.read_cohort(artifact.path)
    steps.enter_exclusions(config, cohort.exclusions)
    steps.fingerprint_scans(config, scans, artifact)
    for warning in cohort.warnings:
        log.warning("%s", warning)
    return artifact


def hold_out(config: Config, cohort: Artifact, study: Artifact | None) -> Artifact:
    """Cohort -> who is learned from and who is held out; of a study its training part alone.

    ``study`` is its split.
    """
    from medtl.dataset import io, leaks
    from medtl.dataset.split import hold_out as hold_out_some
    from medtl.studies.io import read_cohort

    known, share = read_cohort(cohort.path), config.dataset.split.val
    artifact, prints = steps.fingerprints_of(config, known)
    inputs = {
        "cohort": cohort.digest,
        "fingerprints": artifact.digest,
        "study": study.digest if study is not None else None,
        "share": share,
        "seed": config.seed,
        "code": code_digest("dataset"),
    }

    def build(folder: Path) -> None:
        chosen = _taken(known, io.read_split(study.path) if study is not None else None)
        near = leaks.near_pairs(known, prints, config.scans.workers)
        io.write_split(folder, hold_out_some(chosen, share, config.seed, near.pairs))

    return AuditedStore(config.workspace).make("split", inputs, build)


def plan_scans(config: Config, scans: Artifact, cohort: Artifact, split: Artifact) -> Artifact:
    """Scans that are learned from -> grid, intensity, patch and depth of the network."""
    from medtl.dataset import grid, io
    from medtl.model.segmenter import least_multiple
    from medtl.scans.segments import PixelStore
    from medtl.studies.io import read_cohort

    multiple = least_multiple(config.model)
    inputs = {
        "scans": scans.digest,
        "split": split.digest,
        "config": config.dataset.grid.model_dump(mode="json"),
        "multiple": multiple,
        "unlabelled": True,
        "code": [code_digest("dataset"), file_digest(Path(__file__))],
    }

    def build(folder: Path) -> None:
        learned, by_id = set(io.read_split(split.path).train), segmenting.scans_by_id(scans)
        images = [by_id[s.scan_id] for s in read_cohort(cohort.path).studies if s.study_id in learned]
        blank = [replace(scan, mask_of=scan.scan_id, slope=1.0, intercept=0.0) for scan in images]
        stored = PixelStore(steps.pixel_folder(config))

        def read(scan: Scan) -> AnyArray:
            return stored(scan) if scan.mask_of is None else _nothing(scan)

        io.write_grid(folder, grid.make_grid_plan(images, blank, read, (), None, config.dataset.grid, (multiple,)))

    return AuditedStore(config.workspace).make("plan", inputs, build)


def pack_scans(config: Config, scans: Artifact, cohort: Artifact, split: Artifact, plan: Artifact) -> Artifact:
    """Scans that are learned from or held out -> one memory-mapped file, on the plan's grid."""
    from medtl.dataset import grid, io
    from medtl.scans.segments import PixelStore
    from medtl.studies.io import read_cohort

    how = replace(io.read_grid(plan.path), structures=(), ignore=None)
    decided = {name: value for name, value in asdict(how).items() if name not in ("facts", "reasons")}
    inputs = {"scans": scans.digest, "split": split.digest, "plan": decided, "code": code_digest("dataset")}

    def build(folder: Path) -> None:
        by_id, used = segmenting.scans_by_id(scans), _used(read_cohort(cohort.path), io.read_split(split.path))
        read = PixelStore(steps.pixel_folder(config))

        def items() -> Iterator[tuple[str, FloatArray, AnyArray]]:
            for study in used:
                image = grid.to_grid(read(by_id[study.scan_id]), by_id[study.scan_id], how)
                yield study.study_id, image, np.zeros(image.shape[1:], np.uint8)

        io.write_volumes(folder, items(), how, len(used))

    return AuditedStore(config.workspace).make("pack", inputs, build)


def fit_reconstruction(config: Config, prepared: Prepared) -> Artifact:
    """Packed scans -> checkpoint that fills in what is hidden; goes on where an interrupted run was."""
    code = [file_digest(Path(__file__))]
    return segmenting.train_patches(config, prepared, "pre-training", code, counts="reconstruct", unlabelled=True)


def train_here(job: training.Job, folder: Path) -> None:
    """Train in this process, alone or as one of several that torchrun has started; the first writes the checkpoint."""
    from medtl.dataset.io import read_grid, read_split, read_volumes
    from medtl.evaluation.superiority import share_of_means_better
    from medtl.model import devices, io, parallel, reconstruct, segment_fit, segmenter
    from medtl.studies.io import read_cohort

    config, model = job.config, job.config.model
    cohort, split = read_cohort(job.cohort), read_split(job.split)
    plan = reconstruct.plan_of_values(read_grid(job.plan))
    devices.make_deterministic(config.seed, job.threads)
    network, report = segmenter.build(plan, model, config.seed, None)
    device = devices.device_of(model)
    network, precision = parallel.prepare(network, model.schedule, device), devices.precision_of(model, device)
    volumes = read_volumes(job.pack)
    row = {study_id: number for number, study_id in enumerate(volumes.study_ids)}
    patient = {study.study_id: study.patient for study in cohort.studies}
    val = sorted(split.val, key=row.__getitem__)
    held = [_hidden(config, replace(plan, batch_size=_VIEWS), volumes, [row[s]]) for s in val]

    def validate(trained: SegmenterNetwork) -> FloatArray:
        mine = parallel.share_of(np.arange(len(val)), whole=True)
        found = [reconstruct.explained(trained, held[int(i)].held_out(), device, precision) for i in mine]
        return parallel.gather(np.array(found, dtype=np.float64).reshape(len(mine), 1))

    def judge(new: FloatArray, old: FloatArray) -> float:
        return share_of_means_better(new, old, val, [patient[s] for s in val], _RESAMPLES, config.seed)

    patches = _hidden(config, plan, volumes, [row[s] for s in split.train])
    loss = reconstruct.loss_of_hidden(model.reconstruct.loss)
    material = segment_fit.SegmentMaterial(patches, validate, judge, loss, reconstruct.WATCHED)
    saver = io.FolderSaver(job.unfinished)
    phases, history = segment_fit.fit_segmenter(network, material, plan, model, config.seed, saver, job.label)
    if parallel.rank() != 0:
        return
    described = {
        "backbone": network.kind,
        "task": cohort.task,
        "classes": (),
        "channels": plan.channels,
        "size": plan.patch,
        **training.described_by(network, report, phases, history),
        "environment": training.environment_of(job, device.type, precision),
    }
    io.write_segmenter(folder, network.to("cpu"), described, model)


def keep_weights(
    config: Config, prepared: Prepared, checkpoint: Artifact, into: str, licence: str | None, citation: str | None
) -> dict[str, Any]:
    """Put what a segmentation can start from into the vault, with the hashes of the images it was trained on."""
    from medtl.dataset import leaks
    from medtl.dataset.io import read_grid, read_split
    from medtl.model import io, reconstruct
    from medtl.model.vault import WEIGHTS, Vault, read_weights
    from medtl.studies.io import read_cohort

    record, plan, known = (
        io.read_checkpoint(checkpoint.path),
        read_grid(prepared.plan.path),
        read_cohort(prepared.cohort.path),
    )
    used = _used(known, read_split(prepared.split.path))
    _, prints = steps.fingerprints_of(config, known)
    seen = {study.pixel_digest for study in used}
    rows = [row for row, digest in enumerate(prints.digests) if digest in seen]
    listed = leaks.Fingerprints(tuple(prints.digests[row] for row in rows), np.asarray(prints.spectra)[rows])
    vault = Vault(training.vault_folder(config))
    source = f"filled in hidden blocks of {len(used)} scans of '{config.name}': checkpoint {checkpoint.digest[:16]}"
    said = (source, licence, citation)
    entry = next((e for e in vault.entries() if e.name == into and (e.source, e.licence, e.citation) == said), None)
    if entry is None:
        state = read_weights(checkpoint.path / WEIGHTS)
        state = reconstruct.transferable(state, plan, config.model, record.backbone)
        network = config.model.backbone if record.backbone == "encoder_unet" else record.backbone
        entry = vault.add(
            into, network, state, source, record.weights_sha256, licence, citation,
            layout="medtl", trained_on=leaks.hash_lines(listed),
        )  # fmt: skip
        told = {"name": into, "checkpoint": checkpoint.digest, "scans": len(used), "licence": licence}
        AuditLog(config.workspace).append("weights.kept", entry.sha256, details=told)
    kept = next(phase for phase in record.phases if phase.kept)
    return {
        "vault": into,
        "folder": str(vault.folder),
        "network": record.backbone,
        "backbone": config.model.backbone if record.backbone == "encoder_unet" else None,
        "source": source,
        "checkpoint": checkpoint.digest,
        "scans": len(used),
        "patients": len({study.patient for study in used}),
        "patch": list(plan.patch),
        "explained": kept.watched,
        "epochs": kept.epochs,
        "parameters": entry.parameters,
        "reused": checkpoint.reused,
    }


def _taken(cohort: Cohort, study: Split | None) -> tuple[Study, ...]:
    """Choose who may be used: of a study its training part, else all but a predefined test part."""
    if study is not None:
        return tuple(one for one in cohort.studies if one.study_id in set(study.train))
    return tuple(one for one in cohort.studies if one.part != "test")


def _used(cohort: Cohort, split: Split) -> tuple[Study, ...]:
    chosen = {*split.train, *split.val}
    return tuple(study for study in cohort.studies if study.study_id in chosen)


def _nothing(scan: Scan) -> AnyArray:
    """Give a mask that shows nothing, on the voxels of a scan."""
    space = scan.shape if scan.is_volume else scan.shape[:2]
    return np.zeros(space, np.uint8)


def _hidden(config: Config, plan: Any, volumes: Any, rows: list[int]) -> HiddenPatches:
    from medtl.dataset.patches import Patches
    from medtl.model.reconstruct import HiddenPatches

    # what is to be filled in is the scan, not noise that we added
    clean = config.dataset.patches.model_copy(update={"noise": 0.0, "blur": 0.0, "low_resolution": 0.0})
    return HiddenPatches(Patches(volumes, rows, plan, clean, config.seed), config.model.reconstruct, config.seed)
