"""Every step from a folder of scans to a report, as plain functions of a config and earlier artifacts.

A step names what its result depends on, asks the store, and computes only if the store has nothing. torch is imported
inside the steps that need it, so that looking something up stays fast.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtl.artifacts import (
    Store,
    code_digest,
    digest_of,
    file_digest,
    load_array,
    read_record,
    save_array,
    storage_errors,
    write_bytes,
    write_json,
    write_record,
)
from medtl.audit import AuditedStore, AuditLog, Event
from medtl.config import Config
from medtl.errors import PlanError, StorageError
from medtl.pseudonyms import load_pseudonymiser
from medtl.records import (
    Artifact,
    CleanProof,
    Cohort,
    Evaluation,
    Exclusion,
    GateCheck,
    Part,
    Predictions,
    Release,
    Scan,
    Split,
)
from pipelines import training
from pipelines.examination import read_examination
from pipelines.explanations import read_explanations
from pipelines.prepared import Prepared, Segmented, Trained
from pipelines.upkeep import at_work

if TYPE_CHECKING:
    from medtl.dataset.leaks import Fingerprints, Listed, Near
    from medtl.registry.promotion import Beside
    from medtl.report.facts import Facts
    from medtl.scans.quarantine import Readmission
    from medtl.scans.sources import SourceFile

log = logging.getLogger("medtl")
PROOF = "proof.json"  # beside a split
_DIGESTS, _SPECTRA = "digests.json", "spectra.npy"  # of fingerprints
_FEATURES = "features.npy"  # of look-alikes, in the order of the fingerprints
_NOT_COMPARED = "No look-alikes were looked for by distance in feature space: "
BY_THEMSELVES = (  # settings of the model that a checkpoint does not depend on, or by what they come to
    "vault", "scratch", "scratch_phases", "weights", "device", "threads", "precision", "cache", "fetch",
    "save_every_s", "inference", "reconstruct",
)  # fmt: skip
NOT_CHOOSING = ("reference", "incumbent")  # looks at the test part that say nothing about the model under way
VIEWER = "-viewer.html"  # ends the name of the page beside a report that shows the cases themselves


def label_table(config: Config) -> Path | None:
    """Give the label table's path: as configured, relative to the source."""
    table = config.studies.labels.table
    if table is None or config.scans.source is None or table.is_absolute():
        return table
    source = config.scans.source
    beside = (source if source.is_dir() else source.parent) / table
    try:
        return beside if beside.exists() or not table.exists() else table
    except OSError:  # a folder that may not be looked into is said when it is read
        return beside


def pixel_folder(config: Config) -> Path:
    """Give the folder of the pixel store."""
    return config.workspace.absolute() / "artifacts" / "pixels"


def spool_folder(config: Config) -> Path:
    """Give the folder where scans from the network lie."""
    return config.workspace.absolute() / "spool" / "objects"


def fetch_scans(config: Config) -> dict[str, Any]:
    """Bring what the archive has and we have not into the spool; what fails is counted and tried the next time."""
    from medtl.scans.pacs.fetch import fetch

    assert config.scans.pacs is not None
    names = load_pseudonymiser(config.scans.key_file)
    done = fetch(config.scans.pacs, names, spool_folder(config).parent)
    details = {"series": done.series, "received": done.received, "known": done.known, "failed": len(done.failed)}
    if done.received or done.failed:
        AuditLog(config.workspace).append("scans.fetched", config.name, details=details)
    log.info("%d series in the archive: %d objects came, %d were here", done.series, done.received, done.known)
    return details


def source_files(config: Config) -> tuple[SourceFile, ...]:
    """List every file of the source, and what came over the network, by their bytes; unchanged ones are not read."""
    from medtl.scans.sources import SourceIndex, survey

    names, table = load_pseudonymiser(config.scans.key_file), label_table(config)
    sources = [config.scans.source] if config.scans.source is not None or config.scans.pacs is None else []
    spool = spool_folder(config)
    if config.scans.pacs is not None and spool.is_dir() and any(spool.iterdir()):
        sources.append(spool)
    if not sources:
        raise StorageError("No scans have come over the network yet: nothing was received, and no folder is set.")
    found: list[SourceFile] = []
    for source in sources:
        where = names.name("source", str(source.absolute())) if source is not None else "none"
        index = SourceIndex(config.workspace.absolute() / "index" / where, names)
        found += survey(source, config.scans, frozenset([table] if table else []), index)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Intake:
    """What an ingest starts from."""

    files: tuple[SourceFile, ...]
    readmitted: tuple[Readmission, ...]
    inputs: dict[str, Any]  # by bytes: what its result is known by


def look_at_source(config: Config) -> Intake:
    """List the source and what a person took back from quarantine; nothing is decoded."""
    from medtl.scans.intake import libraries
    from medtl.scans.quarantine import readmissions

    names = load_pseudonymiser(config.scans.key_file)
    files, readmitted = source_files(config), readmissions(config.workspace)
    left_out = ("source", "key_file", "workers", "pacs", "stable_seconds", "max_archive_files", "max_archive_ratio")
    inputs = {
        "files": digest_of([[names.file(f.relative), f.sha256, f.refusal.code if f.refusal else None] for f in files]),
        "count": len(files),
        "config": _settings(config.scans, *left_out, "deidentify"),
        "readmitted": [[one.content, one.code] for one in readmitted],
        "key": names.fingerprint,
        "code": code_digest("scans"),
        "libraries": libraries(),
    }
    return Intake(files, readmitted, inputs)


def find_scans(config: Config) -> Artifact | None:
    """Find the result of an ingest whose every input is unchanged."""
    return Store(config.workspace).find("scans", look_at_source(config).inputs)


@at_work
def ingest_scans(config: Config, pixels: bool = True) -> Artifact:
    """Files -> scans, exclusions and pixels.

    Args:
        pixels: they are wanted: what the store no longer holds of scans that were taken before is read again.
    """
    from medtl.scans.intake import ingest, read_exclusions, restore
    from medtl.scans.io import write_quarantine
    from medtl.scans.quarantine import FOLDER, TABLE, reasons_table

    trail = AuditLog(config.workspace)
    trail.finish_files()
    intake, store = look_at_source(config), AuditedStore(config.workspace)
    names = load_pseudonymiser(config.scans.key_file)
    artifact = _make(
        config,
        "scans",
        intake.inputs,
        lambda folder: ingest(intake.files, config.scans, names, folder, store, intake.readmitted),
    )
    if pixels and artifact.reused:
        restore(intake.files, config.scans, names, artifact.path, store, intake.readmitted)
    exclusions = read_exclusions(artifact.path)
    table = store.workspace / FOLDER / TABLE
    trail.note_ahead("quarantine.listing", artifact.digest, table, reasons_table(exclusions))
    trail.note_files("quarantine.listed", artifact.digest, [write_quarantine(store.workspace, exclusions)])
    enter_exclusions(config, exclusions)
    return artifact


def enter_exclusions(config: Config, exclusions: Sequence[Exclusion]) -> None:
    """Put every item that was left out on the audit trail, once."""
    events = [
        Event(f"excluded.{e.code}", e.content or e.item, "refused", {"stage": e.stage, "files": e.files})
        for e in exclusions
    ]
    AuditLog(config.workspace).once(events)


def build_cohort(config: Config, scans: Artifact) -> Artifact:
    """Scans and labels -> cohort."""
    from medtl.scans.intake import read_exclusions, read_scans
    from medtl.scans.segments import PixelStore
    from medtl.studies import io, labels, masks

    table = label_table(config)
    names = load_pseudonymiser(config.scans.key_file)
    inputs = {
        "scans": scans.digest,
        "labels": file_digest(table) if table is not None and table.is_file() else None,
        "config": _settings(config.studies),
        "order": list(config.studies.labels.structures),  # numbers them; a digest of a mapping does not know it
        "key": names.fingerprint,
        "code": code_digest("studies"),
    }

    def build(folder: Path) -> None:
        found = read_scans(scans.path)
        if table is None:
            rows = labels.rows_from_scans(found)
        else:
            columns, cells = io.read_table(table)
            rows = labels.rows_of(columns, cells, config.studies.labels, names)
        if config.segments:
            read, refused = PixelStore(pixel_folder(config)), read_exclusions(scans.path)
            cohort = masks.build_cohort(found, rows, config.studies, read, refused)
        else:
            cohort = labels.build_cohort(found, rows, config.studies)
        io.write_cohort(folder, cohort)

    artifact = _make(config, "cohort", inputs, build)
    cohort = io.read_cohort(artifact.path)
    enter_exclusions(config, cohort.exclusions)
    fingerprint_scans(config, scans, artifact)
    for warning in cohort.warnings:
        log.warning("%s", warning)
    return artifact


def fingerprint_scans(config: Config, scans: Artifact, cohort: Artifact) -> Artifact:
    """Pixels -> what tells nearly the same pictures from different ones; once for the same pictures."""
    from medtl.dataset import leaks
    from medtl.scans.segments import PixelStore
    from medtl.studies.io import read_cohort

    known = read_cohort(cohort.path)

    def build(folder: Path) -> None:
        chosen = list(_scans_by_study(scans, known).values())
        made = leaks.fingerprint_scans(chosen, PixelStore(pixel_folder(config)), config.scans.workers)
        write_record(folder / _DIGESTS, made.digests)
        save_array(folder / _SPECTRA, made.spectra)

    return _make(config, "fingerprints", _pictures(known), build)


def _pictures(cohort: Cohort) -> dict[str, Any]:
    return {"pixels": digest_of(sorted({s.pixel_digest for s in cohort.studies})), "code": code_digest("dataset")}


def fingerprints_of(config: Config, cohort: Cohort) -> tuple[Artifact, Fingerprints]:
    """Read the fingerprints of a cohort's pictures."""
    from medtl.dataset.leaks import Fingerprints

    found = Store(config.workspace).find("fingerprints", _pictures(cohort))
    if found is None:
        raise StorageError("The fingerprints of the images are gone. Run the same command again: they are made again.")
    digests = read_record(found.path / _DIGESTS, tuple[str, ...])
    return found, Fingerprints(digests, load_array(found.path / _SPECTRA))


def describe_pictures(config: Config, scans: Artifact, cohort: Cohort, network: str | None) -> Artifact | None:
    """Pixels -> what a pretrained network makes of them, once for the same pictures; None without a network."""

    def build(folder: Path) -> None:
        from medtl.scans.segments import PixelStore

        different = {scan.pixel_digest: scan for scan in _scans_by_study(scans, cohort).values()}
        chosen = [different[digest] for digest in sorted(different)]
        save_array(folder / _FEATURES, training.describe_scans(config, chosen, PixelStore(pixel_folder(config))))

    return _make(config, "lookalikes", _described(cohort, network), build) if network is not None else None


def _described(cohort: Cohort, network: str | None) -> dict[str, Any]:
    return {**_pictures(cohort), "network": network, "code": code_digest("dataset", "model")}


def _network(config: Config) -> str | None:
    return training.comparing_network(config) if config.dataset.split.near_in_features else None


def _near_pairs(config: Config, cohort: Cohort, prints: Fingerprints, described: Artifact | None) -> Near:
    """Name the pictures that are nearly the same, by themselves and by features where there are any."""
    from medtl.dataset import leaks, lookalikes

    near, workers = leaks.near_pairs(cohort, prints, config.scans.workers), config.scans.workers
    if described is None:
        off = not config.dataset.split.near_in_features
        why = "dataset.split.near_in_features is off." if off else "no network of two dimensions with weights."
        return replace(near, note=_NOT_COMPARED + why)
    return lookalikes.with_features(near, cohort, prints, load_array(described.path / _FEATURES), workers)


def _listed(config: Config) -> Listed | None:
    """Read the lists of the images that the weights were trained on, as far as there are any."""
    from medtl.dataset.leaks import read_hashes

    texts = []
    for path in _lists(config):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(
                "dataset.split.pretraining_hashes, or the list beside the weights in the vault, is no readable text "
                "file. Give its path, or null; weights are made anew, or taken out with `medtl weights remove`."
            ) from error
    return read_hashes("\n".join(texts)) if texts else None


def _lists(config: Config) -> list[Path]:
    """Name the lists of images that the weights were trained on: the config's, and what lies beside them in the vault.

    The vault's entry is read here and not by the vault itself, which would wake torch.
    """
    hashes = config.dataset.split.pretraining_hashes
    found = [hashes] if hashes is not None else []
    if config.model.origin.startswith("vault:"):
        folder = training.vault_folder(config) / config.model.origin.removeprefix("vault:")
        try:
            listed = json.loads((folder / "entry.json").read_bytes()).get("trained_on")
        except (OSError, ValueError, AttributeError):  # said when the weights are taken
            listed = None
        if isinstance(listed, str) and re.fullmatch("[0-9a-f]{64}", listed):
            found.append(folder / f"{listed[:32]}.hashes.txt")
    return found


def split_by_patient(config: Config, scans: Artifact, cohort: Artifact) -> Artifact:
    """Cohort -> split and the proof that it is clean; the test part is sealed from here on."""
    from medtl.dataset import io, leaks
    from medtl.dataset.split import split_cohort
    from medtl.studies.io import read_cohort

    known = read_cohort(cohort.path)
    artifact, prints = fingerprints_of(config, known)
    settings, network, listed = config.dataset.split, _network(config), _listed(config)
    described = describe_pictures(config, scans, known, network)
    inputs = {
        "cohort": cohort.digest,
        "fingerprints": artifact.digest,
        "lookalikes": [network, described.digest] if described is not None else None,
        "config": _settings(settings, "pretraining_hashes"),
        "pretraining": _listed_digest(config),
        "seed": config.seed,
        "code": code_digest("dataset"),
    }

    def build(folder: Path) -> None:
        near = _near_pairs(config, known, prints, described)
        pretrained = leaks.overlap(known, prints, listed) if listed is not None else frozenset()
        split = replace(split_cohort(known, settings, config.seed, near.pairs, pretrained), network=network)
        proof = leaks.prove_clean(known, split, prints, listed, near)
        leaks.require_clean(proof, split)
        io.write_split(folder, split)
        write_record(folder / PROOF, proof)

    made = _make(config, "split", inputs, build)
    enter_exclusions(config, io.read_split(made.path).exclusions)
    allowed = io.read_split(made.path).leaks
    for leak in allowed:
        log.warning("THE SPLIT LEAKS (allow_leaky_split): %s", leaks.in_words((leak,)))
    if allowed and not made.reused:
        AuditLog(config.workspace).append("split.leak_allowed", made.digest, details={"leaks": leaks.in_words(allowed)})
    return made


def split_into_folds(config: Config, scans: Artifact, cohort: Artifact) -> list[tuple[str, int, Artifact]]:
    """Cohort -> the folds of the design that the config asks for: name, repeat, split with its proof."""
    from medtl.dataset import folds, io, leaks
    from medtl.studies.io import read_cohort

    known = read_cohort(cohort.path)
    artifact, prints = fingerprints_of(config, known)
    listed, network = _listed(config), _network(config)
    described = describe_pictures(config, scans, known, network)
    near = _near_pairs(config, known, prints, described)
    pretrained = leaks.overlap(known, prints, listed) if listed is not None else frozenset()
    found = []
    for one in folds.fold_splits(
        known, config.dataset.folds, config.dataset.split, config.seed, near.pairs, pretrained
    ):
        inputs = {
            "cohort": cohort.digest,
            "fingerprints": artifact.digest,
            "lookalikes": [network, described.digest] if described is not None else None,
            "fold": [one.name, one.repeat],
            "config": [_settings(config.dataset.folds), _settings(config.dataset.split, "pretraining_hashes")],
            "pretraining": _listed_digest(config),
            "seed": config.seed,
            "code": code_digest("dataset"),
        }

        def build(folder: Path, split: Split = one.split) -> None:
            proof = leaks.prove_clean(known, split, prints, listed, near)
            leaks.require_clean(proof, split)
            io.write_split(folder, replace(split, network=network))
            write_record(folder / PROOF, proof)

        made = _make(config, "split", inputs, build)
        enter_exclusions(config, one.split.exclusions)
        found.append((one.name, one.repeat, made))
    return found


def _listed_digest(config: Config) -> str | None:
    lists = _lists(config)
    return digest_of([file_digest(path) for path in lists]) if lists else None


def prove_again(config: Config, cohort: Artifact, split: Artifact) -> CleanProof:
    """Look again for what may stand on two sides of a split, before its test part is opened.

    Features are those of the network that the split was made with, whichever model is about to be tested.

    Raises:
        SplitError: something that was not known and allowed when the split was made.
    """
    from medtl.dataset import io, leaks
    from medtl.studies.io import read_cohort

    known, made = read_cohort(cohort.path), io.read_split(split.path)
    _, prints = fingerprints_of(config, known)
    described = Store(config.workspace).find("lookalikes", _described(known, made.network)) if made.network else None
    if made.network and described is None:
        raise StorageError("The features of the images are gone. Run the same command again: they are made again.")
    near = _near_pairs(config, known, prints, described)
    proof = leaks.prove_clean(known, made, prints, _listed(config), near)
    leaks.require_clean(proof, made)
    return proof


def make_plan(config: Config, scans: Artifact, cohort: Artifact, split: Artifact) -> Artifact:
    """Training part -> plan."""
    from medtl.dataset import io, plan
    from medtl.model.backbones import BACKBONES
    from medtl.scans.segments import PixelStore
    from medtl.studies.io import read_cohort

    row = BACKBONES.get(config.model.backbone)
    least, multiple = (row.min_size, row.multiple) if row is not None else (16, 1)
    dimensions = row.dimensions if row is not None else 2
    inputs = {
        "scans": scans.digest,
        "cohort": cohort.digest,  # its task and classes
        "split": split.digest,
        "config": _settings(config.dataset.plan),
        "min_size": least,
        "multiple": multiple,
        "dimensions": dimensions,
        "code": code_digest("dataset"),
    }

    def build(folder: Path) -> None:
        known = read_cohort(cohort.path)
        training = set(io.read_split(split.path).train)
        by_study = _scans_by_study(scans, known)
        chosen = [by_study[s.study_id] for s in known.studies if s.study_id in training]
        settings = config.dataset.plan
        read = PixelStore(pixel_folder(config))
        made = plan.make_plan(chosen, read, known.task, known.classes, settings, least, multiple, dimensions)
        io.write_plan(folder, made)

    return _make(config, "plan", inputs, build)


def pack_images(config: Config, scans: Artifact, cohort: Artifact, plan: Artifact) -> Artifact:
    """Scans -> one array at the plan's size, the plan's rows per study in the cohort's order."""
    from medtl.dataset import io
    from medtl.dataset.plan import misfit
    from medtl.scans.segments import PixelStore
    from medtl.studies.io import read_cohort

    decided = {
        name: value for name, value in asdict(io.read_plan(plan.path)).items() if name not in ("facts", "reasons")
    }
    # by what was decided, not by what was measured: folds whose plans agree share one array
    inputs = {"scans": scans.digest, "cohort": cohort.digest, "plan": decided, "code": code_digest("dataset")}

    def build(folder: Path) -> None:
        known = read_cohort(cohort.path)
        by_study = _scans_by_study(scans, known)
        ordered = [by_study[study.study_id] for study in known.studies]
        how = io.read_plan(plan.path)
        wrong = [why for scan in ordered if (why := misfit(scan, how)) is not None]
        if wrong and how.volumes is None and not any(scan.is_volume for scan in ordered):
            raise PlanError(
                f"{len(wrong)} of {len(ordered)} scans have another bit depth than the training images the fixed range "
                "was measured on. Normalise each image by itself: --set dataset.plan.intensity=per_image"
            )
        if wrong:
            raise PlanError(
                f"{len(wrong)} of {len(ordered)} scans do not fit the plan, the first: {wrong[0]}. Take them out of "
                "the label table, or normalise each by itself: --set dataset.plan.intensity=per_image"
            )
        io.write_pack(folder, ordered, PixelStore(pixel_folder(config)), how)

    return _make(config, "pack", inputs, build)


def fit_in_phases(
    config: Config,
    cohort: Artifact,
    split: Artifact,
    plan: Artifact,
    pack: Artifact,
    scratch: bool = False,
    shared: bool = False,
) -> Artifact:
    """Pack -> checkpoint, phase by phase; goes on where an interrupted run was.

    ``shared`` keeps the frozen layers' activations of the whole cohort, for other folds.
    """
    from medtl.model import devices
    from medtl.model.cache import choose_numbers

    model = training.scratch_model(config.model) if scratch else config.model
    precision = devices.precision_of(model, devices.device_of(model))
    rests_on = {
        "transforms": _settings(config.dataset.transforms),
        "numbers": choose_numbers(model.cache, precision),
        "shared": shared,
        "code": training.code_of_training(),
        "libraries": training.versions("torch", "torchvision", "monai", "numpy", "scikit-learn"),
    }
    settings = config.model_copy(update={"model": model})
    label = "training from scratch" if scratch else "training"
    return train_network(settings, cohort, split, plan, pack, rests_on, label, shared=shared)


def train_network(
    config: Config,
    cohort: Artifact,
    split: Artifact,
    plan: Artifact,
    pack: Artifact,
    rests_on: Mapping[str, Any],
    label: str,
    counts: str | None = None,
    shared: bool = False,
    unlabelled: bool = False,
    chosen: Artifact | None = None,
) -> Artifact:
    """Train the network of a config's model, or find it trained; keep how long it took.

    Args:
        rests_on: what the network depends on beside what was prepared, the model's settings and the machine.
        counts: a setting of the model that it depends on here, though elsewhere it does not.
        chosen: the checkpoint of a first training, which these phases were chosen with on validation.
    """
    from medtl.model import devices, io
    from medtl.model.vault import Vault, resolve_weights

    model, vault = config.model, Vault(training.vault_folder(config))
    device, threads = devices.device_of(model), training.threads_for(model)
    weights = None if unlabelled else resolve_weights(model.origin, model.backbone, vault, model.fetch)
    left_out: dict[str, Any] = dict.fromkeys(set(BY_THEMSELVES) - {counts}, True)
    inputs = {
        "cohort": cohort.digest,  # the labels
        "split": split.digest,
        "plan": plan.digest,
        "pack": pack.digest,
        "config": {
            **model.model_dump(mode="json", exclude={**left_out, "segmenter": {"members", "refit"}}),
            "phases": [phase.model_dump(mode="json") for phase in model.schedule],
        },
        "weights": [weights.sha256, asdict(weights.contract) if weights.contract else None] if weights else None,
        "seed": config.seed,
        "device": device.type,
        "precision": devices.precision_of(model, device),
        "threads": threads,
        **({"chosen": chosen.digest} if chosen else {}),
        **rests_on,
    }
    store = AuditedStore(config.workspace)
    saver = io.FolderSaver(store.scratch(f"fit-{digest_of(inputs)[:24]}"))
    job = training.Job(
        config, cohort.path, split.path, plan.path, pack.path, pack.digest, saver.path.parent, label, threads, shared,
        unlabelled, chosen.path if chosen else None,
    )  # fmt: skip

    def build(folder: Path) -> None:  # under the artifact's lock: what is there is not of a run that is at work
        if saver.path.exists():
            log.warning("an interrupted training was found; going on from where it was last saved")
        began = time.perf_counter()
        training.train(job, folder)
        taken.append(time.perf_counter() - began)

    taken: list[float] = []
    artifact = store.make("checkpoint", inputs, build)
    if taken:
        keep_seconds(config, artifact, *taken)
    saver.clear()
    return artifact


def keep_seconds(config: Config, checkpoint: Artifact, seconds: float) -> None:
    """Write down how long a training took."""
    taken = _seconds_file(config, checkpoint)
    write_json(taken, {"seconds": round(seconds, 2)})
    AuditLog(config.workspace).note_files("training.timed", checkpoint.digest, [taken])


def seconds_of(config: Config, checkpoint: Artifact) -> float | None:
    """Tell how long a training took (its last unbroken part); None where that was never written down."""
    try:
        return float(json.loads(_seconds_file(config, checkpoint).read_bytes())["seconds"])
    except (OSError, ValueError, KeyError):
        return None


def _seconds_file(config: Config, artifact: Artifact) -> Path:
    # not in the checkpoint itself: the same training has the same digest however long it took
    folder = config.workspace.absolute() / "index" / "seconds"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{artifact.fingerprint[:32]}.json"


def predict_part(
    config: Config,
    checkpoint: Artifact,
    cohort: Artifact,
    split: Artifact,
    pack: Artifact,
    part: Part,
    purpose: str = "model",
) -> Artifact:
    """Checkpoint -> probabilities of one part. Opening the test part is logged, with what for (see NOT_CHOOSING)."""
    from medtl.dataset import io as dataset_io
    from medtl.dataset.loading import EvaluationBatches, rows_of, slices_of, voted
    from medtl.evaluation.io import write_predictions
    from medtl.model import devices, io
    from medtl.model.predict import predict
    from medtl.studies.io import read_cohort

    inputs = {
        "checkpoint": checkpoint.digest,
        "cohort": cohort.digest,
        "split": split.digest,
        "pack": pack.digest,
        "part": part,
        "batch_size": config.model.batch_size,
        "code": code_digest("model", "dataset", "evaluation"),
    }

    if part == "test":
        open_test(config, cohort, split, checkpoint, inputs, purpose)

    def build(folder: Path) -> None:
        known, parts = read_cohort(cohort.path), dataset_io.read_split(split.path)
        chosen, rows = parts.part(part), _rows(known)
        images, targets = dataset_io.read_pack(pack.path), known.targets
        slices = slices_of(images, len(known.studies))
        shown = rows_of([rows[s] for s in chosen], slices)
        devices.make_deterministic(config.seed, training.threads_for(config.model, 1))
        batches = EvaluationBatches(images, np.repeat(targets, slices, 0), shown, config.model.batch_size)
        by_row = predict(io.read_network(checkpoint.path), batches, known.task, devices.device_of(config.model))
        probabilities = voted(by_row, slices)
        patient = {study.study_id: study.patient for study in known.studies}
        write_predictions(
            folder,
            Predictions(
                part, chosen, tuple(patient[s] for s in chosen), targets[[rows[s] for s in chosen]], probabilities
            ),
        )

    return _make(config, "predictions", inputs, build)


def open_test(
    config: Config,
    cohort: Artifact,
    split: Artifact,
    checkpoint: Artifact,
    inputs: Mapping[str, Any],
    purpose: str,
    kind: str = "predictions",
) -> None:
    """Prove the split clean again and enter the look at its test part, unless this look is entered already."""
    looked = any(
        event["action"] == "test.opened"
        and event["subject"] == split.digest
        and (event["details"].get("checkpoint"), event["details"].get("purpose")) == (checkpoint.digest, purpose)
        for event in AuditLog(config.workspace).events()
    )
    if looked and Store(config.workspace).find(kind, inputs) is not None:
        return
    proof = prove_again(config, cohort, split)
    details = {
        "checkpoint": checkpoint.digest,
        "purpose": purpose,
        "clean": proof.clean,
        "part": _tested_by(split),
    }
    AuditLog(config.workspace).append("test.opened", split.digest, details=details)


def evaluate(config: Config, plan: Artifact, val: Artifact, test: Artifact) -> Artifact:
    """Predictions -> evaluation with intervals."""
    from medtl.dataset.io import read_plan
    from medtl.evaluation import io
    from medtl.evaluation.assess import assess

    inputs = {
        "plan": plan.digest,
        "val": val.digest,
        "test": test.digest,
        "config": _settings(config.evaluation),
        "may_share": config.dataset.split.allow_leaky_split,
        "seed": config.seed,
        "code": code_digest("evaluation"),
    }

    def build(folder: Path) -> None:
        how = read_plan(plan.path)
        io.write_evaluation(
            folder,
            assess(
                io.read_predictions(val.path),
                io.read_predictions(test.path),
                how.task,
                how.classes,
                config.evaluation,
                config.seed,
                config.dataset.split.allow_leaky_split,
            ),
        )

    return _make(config, "evaluation", inputs, build)


def compare(
    config: Config,
    test: Artifact,
    reference: Artifact,
    names: tuple[str, str] = ("transfer", "scratch"),
    metric: str = "auroc",
    margin: float | None = None,
    evaluations: tuple[Artifact, Artifact] | None = None,
) -> Artifact:
    """Two models' predictions of the same test part -> their difference with an interval.

    ``evaluations`` of both have their decisions compared too, each at its own operating point.
    """
    from medtl.evaluation import io
    from medtl.evaluation.comparison import compare as compare_predictions
    from medtl.evaluation.threshold import decide

    inputs = {
        "model": test.digest,
        "reference": reference.digest,
        "asked": [names, metric, config.evaluation.margin if margin is None else margin],
        "evaluations": [one.digest for one in evaluations or ()],
        "config": _settings(config.evaluation.uncertainty),
        "seed": config.seed,
        "code": code_digest("evaluation"),
    }

    def build(folder: Path) -> None:
        both = (io.read_predictions(test.path), io.read_predictions(reference.path))
        called = []
        for predictions, one in zip(both, evaluations or (), strict=False):
            found = io.read_evaluation(one.path)
            called.append(decide(predictions, found.task, found.operating_points))
        io.write_comparison(
            folder,
            compare_predictions(
                *both,
                names,
                config.evaluation.uncertainty,
                config.seed,
                metric,
                config.evaluation.margin if margin is None else margin,
                (called[0], called[1]) if called else None,
            ),
        )

    return _make(config, "comparison", inputs, build)


def _make(config: Config, kind: str, inputs: Mapping[str, Any], build: Any) -> Artifact:
    return AuditedStore(config.workspace).make(kind, inputs, build)


def _settings(section: Any, *left_out: str) -> Any:
    return section.model_dump(mode="json", exclude=set(left_out))


def _rows(cohort: Cohort) -> dict[str, int]:
    return {study.study_id: row for row, study in enumerate(cohort.studies)}


def _scans_by_study(scans: Artifact, cohort: Cohort) -> dict[str, Scan]:
    from medtl.scans.intake import read_scans

    by_id = {scan.scan_id: scan for scan in read_scans(scans.path)}
    return {study.study_id: by_id[study.scan_id] for study in cohort.studies}


def make_release(
    config: Config, prepared: Prepared, trained: Trained, beside: Beside | None = None
) -> tuple[Artifact, Release]:
    """Checkpoint and evaluation -> release, entered in the register as the gate decides."""
    parts = (trained.checkpoint, prepared.plan, trained.calibrator, trained.evaluation, trained.examination)
    return enter_release(config, prepared, trained, tuple(filter(None, parts)), beside)


def note_unvalidated(config: Config, release: Release) -> None:
    """Enter that somebody had a release used that no gate has validated."""
    if release.status == "candidate":
        details = {"reason": "asked for by --allow-candidate"}
        AuditLog(config.workspace).append("release.unvalidated", release.release_id, details=details)


def enter_release(
    config: Config,
    prepared: Prepared,
    trained: Trained | Segmented,
    parts: Sequence[Artifact],
    beside: Beside | None = None,
) -> tuple[Artifact, Release]:
    """Put the files of some artifacts together as a release and enter it in the register as the gate decides."""
    from medtl.dataset.io import read_grid, read_plan, read_split
    from medtl.evaluation.io import read_evaluation
    from medtl.model.io import read_checkpoint
    from medtl.registry import parcel, promotion
    from medtl.registry.io import RELEASE, Register
    from medtl.report.card import card
    from medtl.report.words import leak_warning

    evaluation = read_evaluation(trained.evaluation.path)
    examination = trained.examination if isinstance(trained, Trained) else None
    checks = _checks(config, prepared, trained, evaluation, beside)
    inputs = {
        "name": config.name,
        "checkpoint": trained.checkpoint.digest,
        "plan": prepared.plan.digest,
        "evaluation": trained.evaluation.digest,
        "calibrator": trained.calibrator.digest if isinstance(trained, Trained) else None,
        "examination": examination.digest if examination else None,
        "gate": [_settings(config.registry.promotion), [asdict(check) for check in checks]],
        "report": _settings(config.report),
        "provenance": provenance(config, prepared, trained),
        "code": code_digest("registry", "report"),
    }
    release = Release(
        release_id=f"r-{digest_of(inputs)[:12]}",
        name=config.name,
        status=promotion.status_of(checks, has_gate=bool(config.registry.promotion.gate)),
        checks=checks,
        provenance=provenance(config, prepared, trained),
    )

    leaks = read_split(prepared.split.path).leaks

    def build(folder: Path) -> None:
        for source in parts:
            for path in sorted(source.path.iterdir()):
                if path.name != "manifest.json":
                    (folder / path.name).write_bytes(path.read_bytes())
        write_record(folder / RELEASE, release)
        limits = (*([leak_warning(leaks)] if leaks else []), *config.report.limits)
        plan = (read_grid if config.segments else read_plan)(prepared.plan.path)
        told = card(
            config.report.title or config.name, config.report.intended_use, limits, plan,
            read_checkpoint(trained.checkpoint.path), evaluation, checks, release.provenance,
        )  # fmt: skip
        write_bytes(folder / parcel.CARD, told.encode())
        write_json(folder / parcel.SBOM, parcel.bill_of_materials())
        parcel.write_sums(folder)

    artifact = _make(config, "release", inputs, build)
    observed = [{"condition": c.condition, "observed": c.observed, "passed": c.passed} for c in checks]
    evidence = {"gate": observed, "evaluation": trained.evaluation.digest, "checkpoint": trained.checkpoint.digest}
    Register(config.workspace).enter(release, artifact, evidence)
    return artifact, release


def _checks(
    config: Config, prepared: Prepared, trained: Trained | Segmented, evaluation: Evaluation, beside: Beside | None
) -> tuple[GateCheck, ...]:
    from medtl.dataset.io import read_split
    from medtl.model.io import read_checkpoint
    from medtl.registry import promotion

    wanted = config.registry.promotion
    checks = list(promotion.check(evaluation, wanted))
    if wanted.clean:
        checks.append(promotion.check_clean(read_split(prepared.split.path).leaks))
    if wanted.licences is not None:
        weights = read_checkpoint(trained.checkpoint.path).weights
        checks.append(promotion.check_licence(weights.licence, wanted.licences, weights.sha256 is not None))
    if wanted.subgroup_floor is not None and isinstance(trained, Trained) and trained.examination is not None:
        groups = read_examination(trained.examination.path).subgroups
        checks.append(promotion.check_subgroups(groups, wanted.subgroup_floor))
    if wanted.incumbent is not None:
        checks.append(promotion.check_incumbent(beside, wanted.incumbent))
    return tuple(checks)


def provenance(config: Config, prepared: Prepared, trained: Trained | Segmented) -> dict[str, Any]:
    """Name everything a model was made from by its digest."""
    from medtl.dataset.io import read_split
    from medtl.dataset.leaks import in_words
    from medtl.model.io import read_checkpoint

    checkpoint = read_checkpoint(trained.checkpoint.path)
    rooms = ("scans", "studies", "dataset", "model", "evaluation", "registry")
    leaks = read_split(prepared.split.path).leaks
    return {
        "scans": prepared.scans.digest,
        "cohort": prepared.cohort.digest,
        "split": prepared.split.digest,
        "plan": prepared.plan.digest,
        "images": prepared.pack.digest,
        "config": digest_of(
            config.model_dump(mode="json", exclude={"workspace": True, "scans": {"source", "key_file"}})
        ),
        "code": code_digest(*rooms),
        "weights": checkpoint.weights.sha256,
        "checkpoint": trained.checkpoint.digest,
        "model": checkpoint.weights_sha256,
        **({"members": list(checkpoint.members)} if checkpoint.members else {}),
        **({"chosen_by": checkpoint.refit.chosen_by} if checkpoint.refit else {}),
        **({"leaks": in_words(leaks)} if leaks else {}),  # travels with the release, whatever its gate asked
        "evaluation": trained.evaluation.digest,
        "environment": dict(checkpoint.environment),
    }


def write_report(
    config: Config,
    prepared: Prepared,
    trained: Trained,
    scratch: Trained | None,
    comparison: Artifact | None,
    release: Release,
    resources: Mapping[str, Any],
    beside: Beside | None = None,
) -> tuple[Artifact, Path]:
    """Everything known -> one page; give the artifact and the copy that people open."""
    from medtl.dataset.io import read_plan
    from medtl.evaluation.io import read_comparison, read_evaluation, read_predictions
    from medtl.model.io import read_checkpoint
    from medtl.report.facts import Facts
    from medtl.report.io import write_report as write

    facts = Facts(
        **known_facts(config, prepared, trained, release),
        plan=read_plan(prepared.plan.path),
        scratch=read_checkpoint(scratch.checkpoint.path) if scratch else None,
        scratch_evaluation=read_evaluation(scratch.evaluation.path) if scratch else None,
        comparison=read_comparison(comparison.path) if comparison else None,
        examination=read_examination(trained.examination.path) if trained.examination else None,
        explanations=read_explanations(trained.explanations.path) if trained.explanations else None,
        predictions=read_predictions(trained.test.path),
        beside=beside.comparison if beside else None,
        beside_note=beside.note if beside else "",
    )
    inputs = {
        **shown_by(config, prepared, facts),
        "comparison": comparison.digest if comparison else None,
        "scratch": scratch.checkpoint.digest if scratch else None,
        "beside": asdict(beside) if beside else None,
        "growth": trained.growth.digest if trained.growth else None,
        "explanations": trained.explanations.digest if trained.explanations else None,
    }
    facts = replace(facts, resources=first_measured(config, inputs, resources))
    artifact = _make(config, "report", inputs, lambda folder: write(folder, facts))
    return artifact, copy_to_reports(config, f"{config.name}-{release.release_id}.html", artifact)


def first_measured(config: Config, inputs: Mapping[str, Any], resources: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the time and memory of the run that first wrote a report: one that is written again has the same bytes."""
    folder = config.workspace.absolute() / "index" / "resources"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest_of(inputs)[:32]}.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        write_json(path, dict(resources))
        AuditLog(config.workspace).note_files("run.timed", digest_of(inputs), [path])
        return resources


def known_facts(config: Config, prepared: Prepared, trained: Trained | Segmented, release: Release) -> dict[str, Any]:
    """Collect what a page says of any model, as fields of :class:`medtl.report.facts.Facts`."""
    from medtl.dataset.io import read_split
    from medtl.evaluation.io import read_evaluation, read_learning_curve
    from medtl.model.io import read_checkpoint
    from medtl.report.acquired import acquisitions, count_patients
    from medtl.scans.intake import read_exclusions, read_scans
    from medtl.studies.io import read_cohort

    scans, cohort = read_scans(prepared.scans.path), read_cohort(prepared.cohort.path)
    return {
        "title": config.report.title or config.name,
        "config": config.model_dump(mode="json"),
        "intended_use": config.report.intended_use,
        "limits": config.report.limits,
        "files": file_count(prepared.scans),
        "scans": len(scans),
        "scan_patients": count_patients(scans, cohort),
        "acquisitions": acquisitions(scans, cohort),
        "exclusions": read_exclusions(prepared.scans.path),
        "cohort": cohort,
        "split": read_split(prepared.split.path),
        "proof": read_record(prepared.split.path / PROOF, CleanProof),
        "checkpoint": read_checkpoint(trained.checkpoint.path),
        "evaluation": read_evaluation(trained.evaluation.path),
        "release_status": release.status,
        "gate": release.checks,
        "release_id": release.release_id,
        "provenance": release.provenance,
        "test_openings": test_openings(config, prepared.split),
        "growth": read_learning_curve(trained.growth.path) if trained.growth else None,
    }


def shown_by(config: Config, prepared: Prepared, facts: Facts) -> dict[str, Any]:
    """Name what the page of any model depends on."""
    from medtl.report.facts import shown_config
    from medtl.report.pdf import is_installed

    return {
        "release": facts.release_id,
        "status": facts.release_status,
        "report": _settings(config.report),
        "scans": prepared.scans.digest,
        "cohort": prepared.cohort.digest,
        "split": prepared.split.digest,
        "shown": digest_of(shown_config(facts.config)),
        "provenance": digest_of(dict(facts.provenance)),
        "openings": facts.test_openings,
        "pdf": is_installed(),
        "code": code_digest("report"),
    }


def test_openings(config: Config, split: Artifact) -> int:
    """Count the looks at these test studies, under whatever split; a reference from scratch chooses nothing."""
    opened = [event for event in AuditLog(config.workspace).events() if event["action"] == "test.opened"]
    part = _tested_by(split)
    looks = [e for e in opened if e["subject"] == split.digest or e["details"].get("part") == part]
    return sum(look["details"].get("purpose") not in NOT_CHOOSING for look in looks)


def _tested_by(split: Artifact) -> str:
    """Name a test part by its studies: the same ones under another split or proof are the same part."""
    from medtl.dataset.io import read_split

    return digest_of(sorted(read_split(split.path).test))


def copy_to_reports(config: Config, name: str, report: Artifact) -> Path:
    """Put a report where people look for it; give the page."""
    folder = Store(config.workspace).workspace / "reports"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    copies = []
    for kind in (".html", ".pdf"):
        written = (report.path / "report.html").with_suffix(kind)
        if written.is_file():
            copies.append((folder / name).with_suffix(kind))
            write_bytes(copies[-1], written.read_bytes())
    for written in report.path.glob(f"*{VIEWER}"):  # under its own name, which the page links to
        copies.append(folder / written.name)
        write_bytes(copies[-1], written.read_bytes())
    AuditLog(config.workspace).note_files("report.published", report.digest, copies)
    return folder / name


def add_to_vault(config: Config, target: Config, checkpoint: Artifact) -> dict[str, Any]:
    """Put a checkpoint's trunk into the target's vault under the source's name, with where it came from."""
    from medtl.model import io
    from medtl.model.vault import WEIGHTS, Vault, read_weights

    record = io.read_checkpoint(checkpoint.path)
    vault = Vault(training.vault_folder(target))
    source = f"trained here on '{config.name}': checkpoint {checkpoint.digest[:16]}"
    known = next((e for e in vault.entries() if e.name == config.name and e.source == source), None)
    entry = known or vault.add(
        config.name,
        record.backbone,
        read_weights(checkpoint.path / WEIGHTS),
        source,
        original_sha256=record.weights_sha256,
        licence="as this project and its synthetic data: Apache-2.0",
        citation="trained by medtl on its own synthetic source task",
    )
    return {"vault": entry.name, "source": source, "checkpoint": checkpoint.digest}


def file_count(scans: Artifact) -> int:
    """Tell how many files an ingest looked at."""
    manifest = json.loads((scans.path / "manifest.json").read_bytes())
    return int(manifest["inputs"]["count"])
