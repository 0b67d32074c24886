"""One training: everything a network learns from, brought together from the rooms, in this process or in several.

Several processes (``model.processes``) are started by torchrun, each with the same job, a small JSON file; the first of
them writes the checkpoint. Rows, seeds and results are the same as in one process, up to the order of additions.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtl.artifacts import Store, code_digest, digest_of, file_digest, write_bytes
from medtl.config import Config, ModelConfig
from medtl.errors import ModelError
from medtl.progress import advance

if TYPE_CHECKING:
    from medtl.model.fit import Material
    from medtl.model.surgery import StagedNetwork
    from medtl.records import AnyArray, Cohort, Epoch, LoadReport, Phase, Plan, Scan, Split

log = logging.getLogger("medtl")
LIBRARIES = ("torch", "torchvision", "monai", "numpy", "scikit-learn", "pydicom", "opencv-python-headless")
_GUARD_RESAMPLES = 1000
_AT_ONCE = 256  # pictures whose thumbnails are in memory
_TAIL = 2000  # characters of a worker's last words


@dataclass(frozen=True, slots=True)
class Job:
    """What one training is made from: a config whose model is the one to train, and folders of finished artifacts."""

    config: Config
    cohort: Path
    split: Path
    plan: Path
    pack: Path
    pack_digest: str
    unfinished: Path  # folder where progress is kept
    label: str
    threads: int
    shared: bool = False  # keep the frozen layers' activations of the whole cohort, for other folds
    unlabelled: bool = False  # scans are filled in, not diagnosed or segmented
    chosen: Path | None = None  # the checkpoint that phases and epochs were chosen with: validation is learned from too


def train(job: Job, folder: Path) -> None:
    """Train and write the checkpoint into ``folder``, with as many processes as the config says."""
    if job.config.model.processes > 1:
        _in_processes(job, folder)
    else:
        train_here(job, folder)


def train_here(job: Job, folder: Path) -> None:
    """Train in this process, alone or as one of several that torchrun has started; the first writes the checkpoint."""
    if job.unlabelled:
        from pipelines import unlabelled

        unlabelled.train_here(job, folder)
        return
    if job.config.segments:
        from pipelines import segmenting

        segmenting.train_here(job, folder)
        return
    from medtl.dataset.io import read_pack, read_plan, read_split
    from medtl.model import devices, estimate, fit, io, parallel
    from medtl.studies.io import read_cohort

    config, model = job.config, job.config.model
    cohort, split, plan = read_cohort(job.cohort), read_split(job.split), read_plan(job.plan)
    devices.make_deterministic(config.seed, job.threads)
    network, report = network_for(config, cohort, plan)
    if parallel.rank() == 0:
        log.info("weights of %s: %s, %.1f %% of the trunk", model.backbone, report.source, 100 * report.share)
    device = devices.device_of(model)
    network = parallel.prepare(network, model.schedule, device)
    material = material_for(config, cohort, split, read_pack(job.pack), job.pack_digest, job.shared)
    store = activations_of(config)
    units: list[float] = []
    if parallel.rank() == 0:
        said = estimate.forecast(network, material, model, store.room_mb())
        log.info("%s", estimate.describe(said))
        units = estimate.work_units(said, model.schedule)
    saver = io.FolderSaver(job.unfinished)
    phases, history = fit.fit(network, material, model, config.seed, saver, store, job.label, parallel.agree(units))
    if parallel.rank() != 0:
        return
    described = {
        "backbone": model.backbone,
        "task": cohort.task,
        "classes": cohort.classes,
        "channels": plan.channels,
        "size": plan.size,
        **described_by(network, report, phases, history),
        "environment": environment_of(job, device.type, devices.precision_of(model, device)),
    }
    io.write_checkpoint(folder, network.to("cpu"), described)


def threads_for(model: ModelConfig, processes: int | None = None) -> int:
    """Give the threads of each process: as wanted, else the cores that this process may use, shared out."""
    # what taskset or a cpuset left of the machine, which Linux alone can tell; a quota of time is not looked at
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return model.threads or max(1, cores // (processes or model.processes))


def described_by(
    network: StagedNetwork, report: LoadReport, phases: Sequence[Phase], history: Sequence[Epoch]
) -> dict[str, Any]:
    """Give what any checkpoint says of its network and its training."""
    return {
        "stages": network.stage_names,
        "weights": report,
        "phases": tuple(phases),
        "history": tuple(history),
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def environment_of(job: Job, device: str, precision: str) -> dict[str, str]:
    """Give what a training was computed with and on."""
    return {**versions(*LIBRARIES), "device": device, "threads": str(job.threads), "precision": precision}


def network_for(config: Config, cohort: Cohort, plan: Plan) -> tuple[StagedNetwork, LoadReport]:
    """Build the network that a config asks for, with its weights."""
    from medtl.model import io
    from medtl.model.vault import Vault, resolve_weights

    model = config.model
    weights = resolve_weights(model.origin, model.backbone, Vault(vault_folder(config)), model.fetch)
    return io.build_network(
        model.backbone, plan.size[0], plan.channels, len(cohort.classes), model.dropout, weights, model.min_share,
        config.seed,
    )  # fmt: skip


def comparing_network(config: Config) -> str | None:
    """Name the pretrained network that pictures are compared by: a digest of backbone, weights and their input.

    None where the config has no network of two dimensions with weights. What the vault says is read here, because the
    vault itself would wake torch. It is woken where weights are not there yet, and fetches them or says why not.

    Raises:
        WeightsError: as the training's own, of weights that are not there and cannot be had.
    """
    from medtl.model.backbones import BACKBONES

    model, row = config.model, BACKBONES.get(config.model.backbone)
    encodes = not config.segments or model.segmenter.network in ("auto", "encoder_unet")
    if row is None or row.dimensions != 2 or model.origin == "none" or not encodes:
        return None
    found = _known_weights(model, vault_folder(config))
    if found is None:
        from medtl.model.vault import Vault, resolve_weights

        resolve_weights(model.origin, model.backbone, Vault(vault_folder(config)), model.fetch)
        found = _known_weights(model, vault_folder(config))
    return digest_of([model.backbone, *found]) if found is not None else None


def _known_weights(model: ModelConfig, vault: Path) -> tuple[str, Any] | None:
    """Give the digest of weights that are here, and what the vault says they were trained to see; None: not here."""
    if model.origin != "imagenet" and not model.origin.startswith("vault:"):
        path = Path(model.origin)
        return (file_digest(path), None) if path.is_file() else None
    name = f"imagenet-{model.backbone}" if model.origin == "imagenet" else model.origin.removeprefix("vault:")
    try:
        entry = json.loads((vault / name / "entry.json").read_bytes())
        return entry["sha256"], entry.get("contract")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # said when the vault is asked
        return None


def describe_scans(config: Config, scans: Sequence[Scan], read: Callable[[Scan], AnyArray]) -> AnyArray:
    """Pixels -> features of the pretrained network, (n, d) float16.

    Weights that fill too little of the backbone pass here: training refuses them, and knows by how much.
    """
    from medtl.dataset.lookalikes import SIDE, thumbnail
    from medtl.model import devices, io
    from medtl.model.backbones import backbone
    from medtl.model.features import describe
    from medtl.model.vault import Vault, resolve_weights

    model, row = config.model, backbone(config.model.backbone)
    side = -(-max(row.min_size, SIDE) // row.multiple) * row.multiple
    weights = resolve_weights(model.origin, model.backbone, Vault(vault_folder(config)), model.fetch)
    devices.make_deterministic(config.seed, threads_for(model, 1))
    network, _ = io.build_network(model.backbone, side, 3, 1, 0.0, weights, min_share=0.0, seed=0)
    found, device = [], devices.device_of(model)
    with ThreadPoolExecutor(config.scans.workers) as pool:
        for start in range(0, len(scans), _AT_ONCE):
            some = scans[start : start + _AT_ONCE]
            pictures = np.stack(list(pool.map(lambda scan: thumbnail(read(scan), scan, side), some)))
            found.append(describe(network, pictures, device).astype(np.float16))
            advance("describing images", start + len(some), len(scans))
    return np.concatenate(found)


def material_for(
    config: Config, cohort: Cohort, split: Split, images: Any, pack_digest: str, shared: bool = False
) -> Material:
    """Bring together what is learned from and what it is judged on; never the test part.

    ``shared`` has the frozen layers pass over the whole cohort once, whatever part an image is in: what they hand on
    does not depend on labels, and nothing is learned from it but by the rows of training.

    Slices of volumes are learned from one by one, each with its study's target and patient. The judge lets them vote.
    """
    from medtl.dataset.loading import CLEAN, EvaluationBatches, TrainingBatches, rows_of, slices_of, voted
    from medtl.evaluation.superiority import share_better
    from medtl.model.fit import Material

    rows = {study.study_id: row for row, study in enumerate(cohort.studies)}
    patient = {study.study_id: study.patient for study in cohort.studies}
    size, targets = config.model.batch_size, cohort.targets
    slices = slices_of(images, len(cohort.studies))
    by_row = np.repeat(targets, slices, 0)
    train_rows, val_rows = (rows_of([rows[s] for s in part], slices) for part in (split.train, split.val))
    train = TrainingBatches(images, by_row, train_rows, size, config.dataset.transforms, config.seed)
    val = EvaluationBatches(images, by_row, val_rows, size)
    in_order = sorted(split.val, key=rows.__getitem__)
    code = code_digest("model", "dataset")

    def name(chosen: Sequence[int], view: int) -> str:
        drawn = None if view == CLEAN else [config.dataset.transforms.model_dump(mode="json"), config.seed, view]
        return digest_of([pack_digest, list(chosen), drawn, code])

    def judge(new: Any, old: Any) -> float:
        return share_better(
            voted(new, slices), voted(old, slices), targets[[rows[s] for s in in_order]], in_order,
            [patient[s] for s in in_order], config.model.monitor, _GUARD_RESAMPLES, config.seed,
        )  # fmt: skip

    groups = [patient[s] for s in split.train for _ in range(slices)]
    pool = range(len(images)) if shared else None
    return Material(train, val, cohort.task, groups, name, judge, pool)


def activations_of(config: Config) -> Any:
    """Give the place where this workspace keeps activations of frozen layers."""
    from medtl.model.io import FolderActivations

    folder = Store(config.workspace).workspace / "cache" / "activations"
    return FolderActivations(folder, config.model.cache.budget_gb * 1000)


def vault_folder(config: Config) -> Path:
    """Give the folder of the weight vault."""
    return config.model.vault or config.workspace / "weights"


def scratch_model(model: ModelConfig, masks: bool = False) -> ModelConfig:
    """Give the same network without weights: everything unfrozen, at least as many epochs as all phases together.

    A diagnosis learns by the strategy ``scratch``, which docs/results.md measures. A segmentation, most of which starts
    at random with weights too, learns as that phase which unfreezes all at the highest rate: at another rate or with
    another loss the difference would not be that of the weights.
    """
    from medtl.config import STRATEGIES

    (plain,) = STRATEGIES["scratch"]
    epochs = max(plain.epochs, sum(phase.epochs for phase in model.schedule))
    alike, everything = plain, [phase for phase in model.schedule if phase.unfreeze == "all"]
    if masks and everything:
        like = max(everything, key=lambda phase: phase.lr)
        own = {"name": plain.name, "decay": plain.decay, "batchnorm": plain.batchnorm, "l2_sp": 0.0, "patience": None}
        alike = like.model_copy(update={**own, "lr": max(like.lr, plain.lr)})
    default = (alike.model_copy(update={"epochs": epochs}),)
    return model.model_copy(update={"weights": "none", "phases": model.scratch_phases or default})


def _in_processes(job: Job, folder: Path) -> None:
    """Let torchrun start the processes on this machine; it ends them all when one fails."""
    said = {
        "config": job.config.model_dump(mode="json"),
        **{name: str(getattr(job, name)) for name in ("cohort", "split", "plan", "pack", "unfinished")},
        "pack_digest": job.pack_digest, "label": job.label, "threads": job.threads, "folder": str(folder),
        "shared": job.shared, "unlabelled": job.unlabelled, "started_by": os.getpid(),
        "chosen": str(job.chosen) if job.chosen else None,
    }  # fmt: skip
    path = job.unfinished / "job.json"
    write_bytes(path, json.dumps(said).encode())
    count = job.config.model.processes
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        f"--nproc-per-node={count}", "-m", "pipelines.worker", str(path),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(job.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "medtl-error:" in line), "")
        if not reason:
            log.error("%s", done.stderr[-_TAIL:])
        raise ModelError(
            f"Training in {count} processes failed. "
            + (reason.partition("medtl-error:")[2].strip() or "The log says why; ")
            + " model.processes: 1 trains in one."
        )


def versions(*names: str) -> dict[str, str]:
    """Give the installed versions of libraries."""
    return {name: metadata.version(name) for name in names}


def code_of_training() -> list[str]:
    """Name the code that a checkpoint depends on: evaluation too, whose judge decides which phase is kept."""
    return [code_digest("model", "dataset", "evaluation"), file_digest(Path(__file__))]
