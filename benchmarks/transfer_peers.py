"""The contenders of benchmarks/transfer.py: one of them, in a process of its own, does one job.

    python benchmarks/transfer_peers.py CONTENDER JOB.json

Every contender reads the same image files and the same start weights, and trains the same stages with the same
batches, epochs, optimiser (SGD, momentum 0.9) and constant learning rates; each looks at the validation part after
every epoch. What differs between the columns ``matched`` and ``shipped`` is said beside each contender. A contender
first does a small job of the same kind, which is not counted: that pays for imports and for what torch makes ready at
the first call. Decoding, caches and whatever else it prepares are counted. No contender writes logs, checkpoints or
progress bars. Loss and AUROC at the end are computed in one way for all, uncounted.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOMENTUM = 0.9
ALL = -1  # unfreeze: everything


@dataclass(frozen=True)
class Stage:
    """Some epochs with the head and the last ``unfreeze`` blocks learning."""

    name: str
    unfreeze: int
    epochs: int
    lr: float


@dataclass(frozen=True)
class Part:
    """Rows of the sorted files to learn from and to look at; the rows to learn from are whole batches."""

    train: tuple[int, ...]
    val: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """What is to be done, the same for everybody; several parts are folds, each from the start weights."""

    images: str  # folder of one folder per class
    weights: str  # state of the torchvision network with its new head
    backbone: str
    classes: tuple[str, ...]
    size: int
    resize: bool  # the files are of other sizes
    batch: int
    stages: tuple[Stage, ...]
    parts: tuple[Part, ...]
    column: Literal["matched", "shipped"]
    threads: int
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Lap:
    """One epoch with its validation, or what a contender does once; a stage's first holds what it needed to begin."""

    stage: str
    wall: float  # seconds
    cpu: float  # seconds, of the process and of its own processes that have ended


@dataclass(frozen=True)
class Result:
    """What a contender did."""

    wall: float
    cpu: float
    laps: tuple[Lap, ...]
    val_loss: float  # mean over the parts
    val_auroc: float
    note: str  # versions and settings


class Clock:
    """Collects the laps of a job."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self.laps: list[Lap] = []
        self._wall, self._cpu = self._now()

    def lap(self, stage: str) -> None:
        """End an epoch of a stage, or what a contender does once."""
        wall, cpu = self._now()
        self.laps.append(Lap(stage, wall - self._wall, cpu - self._cpu))
        self._wall, self._cpu = wall, cpu

    def rest(self) -> None:
        """Leave out what was done since the last lap."""
        self._wall, self._cpu = self._now()

    def _now(self) -> tuple[float, float]:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter(), time.process_time() + ended.ru_utime + ended.ru_stime


# ---------------------------------------------------------------------------------------------------- what all share


def read_job(path: Path) -> Job:
    """Read a job."""
    raw = json.loads(path.read_text())
    stages = tuple(Stage(**stage) for stage in raw.pop("stages"))
    parts = tuple(Part(tuple(part["train"]), tuple(part["val"])) for part in raw.pop("parts"))
    return Job(**{**raw, "classes": tuple(raw["classes"]), "stages": stages, "parts": parts})


def write_job(path: Path, job: Job) -> None:
    """Write a job."""
    path.write_text(json.dumps(asdict(job)))


def files_of(job: Job) -> list[Path]:
    """List the images in the order that rows count in: by class, then by name, as ImageFolder does."""
    return [path for name in job.classes for path in sorted(Path(job.images, name).iterdir())]


def new_network(job: Job) -> Any:
    """Build the torchvision network with the start weights."""
    import torch
    import torchvision

    network = getattr(torchvision.models, job.backbone)(num_classes=len(job.classes))
    if Path(job.weights).exists():
        network.load_state_dict(torch.load(job.weights, weights_only=True))
    return network


def blocks(network: Any) -> list[list[Any]]:
    """Give the modules that hold weights, block by block from the stem to the head."""
    if hasattr(network, "layer4"):
        middle = [[network.layer1], [network.layer2], [network.layer3], [network.layer4]]
        return [[network.conv1, network.bn1], *middle, [network.fc]]
    f = network.features
    return [
        [f.conv0, f.norm0],
        [f.denseblock1, f.transition1],
        [f.denseblock2, f.transition2],
        [f.denseblock3, f.transition3],
        [f.denseblock4, f.norm5],
        [network.classifier],
    ]


def frozen_blocks(stage: Stage, count: int) -> int:
    """Count the blocks from the stem on that a stage freezes, of ``count`` with the head."""
    return 0 if stage.unfreeze == ALL else count - 1 - stage.unfreeze


def image_folder(job: Job) -> Any:
    """Open the images as torchvision's ImageFolder, decoded, scaled and normalised, not augmented."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor

    first = [Resize((job.size, job.size))] if job.resize else []
    return ImageFolder(job.images, Compose([*first, ToTensor(), Normalize(MEAN, STD)]))


def loaders(job: Job, part: Part, workers: int) -> tuple[Any, Any]:
    """Give torch's loaders of the two sides of a part."""
    from torch.utils.data import DataLoader, Subset

    data = image_folder(job)
    train = DataLoader(Subset(data, part.train), batch_size=job.batch, shuffle=True, num_workers=workers)
    return train, DataLoader(Subset(data, part.val), batch_size=job.batch, num_workers=workers)


def figures(network: Any, job: Job, part: Part) -> tuple[float, float]:
    """Give loss and AUROC on the validation side, in fp32, for a network that takes normalised images."""
    import torch
    from sklearn.metrics import roc_auc_score

    network.eval()
    logits, truth = [], []
    with torch.no_grad():
        for images, labels in loaders(job, part, 0)[1]:
            logits.append(network(images.to(job.device)).float().cpu())
            truth.append(labels)
    scores, labels = torch.cat(logits), torch.cat(truth)
    loss = float(torch.nn.functional.cross_entropy(scores, labels))
    shares = scores.softmax(1).double()
    if len(job.classes) == 2:
        return loss, float(roc_auc_score(labels, shares[:, 1]))
    return loss, float(roc_auc_score(labels, shares, multi_class="ovr", labels=range(len(job.classes))))


def has_bf16(device: str) -> bool:
    """Tell whether the machine computes in bf16 natively."""
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def version(*names: str) -> str:
    """Name packages with their versions."""
    from importlib.metadata import version as of

    return ", ".join(f"{name} {of(name)}" for name in names)


# ---------------------------------------------------------------------------------------------------- the plain loop


def run_tutorial(job: Job, clock: Clock) -> tuple[list[tuple[float, float]], str]:
    """Train as PyTorch's tutorial on transfer learning does: ``requires_grad=False``, ``train()``, fp32."""
    found = [_plain(job, part, clock, by_hand=False) for part in job.parts]
    return found, version("torch", "torchvision") + ", fp32"


def run_tuned(job: Job, clock: Clock) -> tuple[list[tuple[float, float]], str]:
    """Train as somebody does who knows: frozen blocks in ``eval()``, channels last, bf16 where the machine has it."""
    found = [_plain(job, part, clock, by_hand=True) for part in job.parts]
    return found, f"{version('torch')}, {'bf16' if has_bf16(job.device) else 'fp32'}, channels last, eval() below"


def _plain(job: Job, part: Part, clock: Clock, by_hand: bool) -> tuple[float, float]:
    import torch

    network = new_network(job).to(job.device)
    if by_hand:
        network = network.to(memory_format=torch.channels_last)
    bf16 = by_hand and has_bf16(job.device)
    train, val = loaders(job, part, 0)

    def context() -> AbstractContextManager[Any]:
        return torch.autocast(job.device.split(":")[0], torch.bfloat16) if bf16 else nullcontext()

    for stage in job.stages:
        network.requires_grad_(True)
        below = [m for block in blocks(network)[: frozen_blocks(stage, len(blocks(network)))] for m in block]
        for module in below:
            module.requires_grad_(False)
        learning = [p for p in network.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(learning, stage.lr, momentum=MOMENTUM)
        for _ in range(stage.epochs):
            network.train()
            for module in below if by_hand else ():
                module.eval()
            for images, labels in train:
                optimiser.zero_grad()
                with context():
                    loss = torch.nn.functional.cross_entropy(network(images.to(job.device)), labels.to(job.device))
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            network.eval()
            with torch.no_grad(), context():
                for images, labels in val:
                    torch.nn.functional.cross_entropy(network(images.to(job.device)), labels.to(job.device)).item()
            clock.lap(stage.name)
    found = figures(network, job, part)
    clock.rest()
    return found


# ---------------------------------------------------------------------------------------------------- fastai


def run_fastai(job: Job, clock: Clock) -> tuple[list[tuple[float, float]], str]:
    """Train with fastai: ``freeze_to`` and ``fit_one_cycle``, which is what ``fine_tune`` calls.

    Shipped: ``vision_learner`` with its own head, BatchNorm trained everywhere (``train_bn=True``), the one-cycle
    schedule, weight decay, and as many loading processes as it likes. Matched: `Learner` on the shared network,
    ``train_bn=False``, a constant rate, no weight decay, no processes.
    """
    found = [_fastai(job, part, clock) for part in job.parts]
    shipped = job.column == "shipped"
    return found, version("fastai") + (", train_bn, one cycle, own head" if shipped else ", train_bn=False")


def _fastai(job: Job, part: Part, clock: Clock) -> tuple[float, float]:
    import fastai.vision.all as fv  # type: ignore[import-not-found,unused-ignore]
    import torch

    files, shipped = files_of(job), job.column == "shipped"
    items = [files[row] for row in (*part.train, *part.val)]
    block = fv.DataBlock(
        blocks=(fv.ImageBlock, fv.CategoryBlock(vocab=list(job.classes))),
        get_items=lambda _: items,
        get_y=fv.parent_label,
        splitter=fv.IndexSplitter(range(len(part.train), len(items))),
        item_tfms=fv.Resize((job.size, job.size), method="squish") if job.resize else None,
        batch_tfms=fv.Normalize.from_stats(MEAN, STD),
    )
    workers = {} if shipped else {"num_workers": 0}
    data = block.dataloaders(job.images, bs=job.batch, device=torch.device(job.device), **workers)
    options = {"opt_func": fv.SGD, "path": Path(job.weights).parent}
    loss = fv.CrossEntropyLossFlat()
    if shipped:
        arch = getattr(fv, job.backbone)
        learn = fv.vision_learner(data, arch, pretrained=False, splitter=_fastai_groups, loss_func=loss, **options)
        start = new_network(job).state_dict().values()
        with torch.no_grad():
            for mine, theirs in zip(learn.model[0].state_dict().values(), start, strict=False):
                mine.copy_(theirs)
    else:
        # its SGD takes the momentum from `moms` where there is a schedule, so it is given here for constant rates
        options["opt_func"] = partial(fv.SGD, mom=MOMENTUM)
        options |= {"wd": 0.0, "train_bn": False, "moms": (MOMENTUM,) * 3}
        learn = fv.Learner(data, new_network(job), loss_func=loss, splitter=_fastai_groups, **options)

    def after_epoch(_: Any) -> None:
        clock.lap(names[-1])

    names: list[str] = []
    learn.add_cb(fv.Callback(after_epoch=after_epoch))
    with learn.no_bar(), learn.no_logging():
        for stage in job.stages:
            names.append(stage.name)
            learn.freeze_to(frozen_blocks(stage, len(learn.opt.hypers) if learn.opt else 6))
            (learn.fit_one_cycle if shipped else learn.fit)(stage.epochs, stage.lr)
    found = figures(learn.model, job, part)
    clock.rest()
    return found


def _fastai_groups(model: Any) -> list[list[Any]]:
    """Give fastai's parameter groups: a block each, so that ``freeze_to`` means the same for everybody."""
    if hasattr(model, "fc") or hasattr(model, "classifier"):
        cut = blocks(model)
    else:
        body = model[0]
        if len(body) > 1:
            cut = [[body[0], body[1]], [body[4]], [body[5]], [body[6]], [body[7]], [model[1]]]
        else:
            f = body[0]
            cut = [
                [f.conv0, f.norm0],
                *([getattr(f, f"denseblock{n}"), getattr(f, f"transition{n}")] for n in (1, 2, 3)),
                [f.denseblock4, f.norm5],
                [model[1]],
            ]
    return [[p for module in block for p in module.parameters()] for block in cut]


# ---------------------------------------------------------------------------------------------------- Lightning


def run_lightning(job: Job, clock: Clock) -> tuple[list[tuple[float, float]], str]:
    """Train with Lightning's `BackboneFinetuning`, or its base class where the middle of the network is unfrozen.

    Shipped: BatchNorm is trained everywhere (``train_bn=True``). Matched: ``train_bn=False`` below the boundary.
    """
    found = [_lightning(job, part, clock) for part in job.parts]
    return found, version("lightning") + (", train_bn" if job.column == "shipped" else ", train_bn=False")


def _lightning(job: Job, part: Part, clock: Clock) -> tuple[float, float]:
    import lightning.pytorch as pl  # type: ignore[import-not-found,unused-ignore]
    import torch
    from lightning.pytorch.callbacks import (  # type: ignore[import-not-found,unused-ignore]
        BackboneFinetuning,
        BaseFinetuning,
    )

    per_epoch = [stage for stage in job.stages for _ in range(stage.epochs)]

    class Model(pl.LightningModule):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = new_network(job)
            self.blocks = blocks(self.backbone)
            name = "fc" if hasattr(self.backbone, "fc") else "classifier"
            self.head = getattr(self.backbone, name)
            setattr(self.backbone, name, torch.nn.Identity())

        def forward(self, images: Any) -> Any:
            return self.head(self.backbone(images))

        def training_step(self, batch: Any, _: int) -> Any:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            torch.nn.functional.cross_entropy(self(batch[0]), batch[1]).item()

        def configure_optimizers(self) -> Any:
            learning = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(learning, per_epoch[0].lr, momentum=MOMENTUM)

    class Staged(BaseFinetuning):  # type: ignore[misc,unused-ignore]
        def freeze_before_training(self, module: Any) -> None:
            below = frozen_blocks(per_epoch[0], len(module.blocks))
            options = {} if job.column == "shipped" else {"train_bn": False}
            self.freeze(module.blocks[:below], **options)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch and per_epoch[epoch] != per_epoch[epoch - 1]:
                before, now = (frozen_blocks(per_epoch[e], len(module.blocks)) for e in (epoch - 1, epoch))
                for group in optimizer.param_groups:
                    group["lr"] = per_epoch[epoch].lr
                self.unfreeze_and_add_param_group(module.blocks[now:before], optimizer, lr=per_epoch[epoch].lr)

    class Laps(pl.Callback):  # type: ignore[misc,name-defined,unused-ignore]
        def on_train_epoch_end(self, trainer: Any, _: Any) -> None:  # validation is over by then
            clock.lap(per_epoch[trainer.current_epoch].name)

    head_alone = all(stage.unfreeze == 0 for stage in job.stages) and job.column == "shipped"
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=len(per_epoch)) if head_alone else Staged()
    model = Model()
    trainer = pl.Trainer(
        max_epochs=len(per_epoch), accelerator="gpu" if job.device.startswith("cuda") else "cpu", devices=1,
        callbacks=[finetuning, Laps()], num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=Path(job.weights).parent,
    )  # fmt: skip
    trainer.fit(model, *loaders(job, part, 0))
    found = figures(model.to(job.device), job, part)
    clock.rest()
    return found


# ---------------------------------------------------------------------------------------------------- MONAI


def run_monai(job: Job, clock: Clock) -> tuple[list[tuple[float, float]], str]:
    """Train with MONAI's `SupervisedTrainer` and `CacheDataset` (decoded images stay in memory): both columns alike."""
    found = [_monai(job, part, clock) for part in job.parts]
    return found, version("monai", "pytorch-ignite") + ", CacheDataset, fp32"


def _monai(job: Job, part: Part, clock: Clock) -> tuple[float, float]:
    import torch
    from monai.engines import SupervisedEvaluator, SupervisedTrainer
    from monai.handlers import ValidationHandler

    network, device = new_network(job).to(job.device), torch.device(job.device)
    train, val = _monai_loaders(job, part)
    for stage in job.stages:
        network.requires_grad_(True)
        for block in blocks(network)[: frozen_blocks(stage, len(blocks(network)))]:
            for module in block:
                module.requires_grad_(False)
        learning = [p for p in network.parameters() if p.requires_grad]
        evaluator = SupervisedEvaluator(device=device, val_data_loader=val, network=network)
        trainer: Any = SupervisedTrainer(
            device=device,
            max_epochs=stage.epochs,
            train_data_loader=train,
            network=network,
            optimizer=torch.optim.SGD(learning, stage.lr, momentum=MOMENTUM),
            loss_function=torch.nn.CrossEntropyLoss(),
            train_handlers=[ValidationHandler(interval=1, validator=evaluator)],
        )
        trainer.add_event_handler(_epoch_completed(), partial(_lap, clock, stage.name))
        trainer.run()
    found = figures(network, job, part)
    clock.rest()
    return found


def _monai_loaders(job: Job, part: Part) -> tuple[Any, Any]:
    from monai.data import CacheDataset, DataLoader, PILReader
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        Resized,
        ScaleIntensityRanged,
    )

    transforms = Compose(
        [
            # its reader puts columns first; the others see rows first, and so does the network here
            LoadImaged("image", reader=PILReader(converter=lambda image: image.convert("RGB"), reverse_indexing=False)),
            EnsureChannelFirstd("image", channel_dim=-1),
            *([Resized("image", (job.size, job.size))] if job.resize else []),
            ScaleIntensityRanged("image", 0, 255, 0, 1),
            NormalizeIntensityd("image", subtrahend=MEAN, divisor=STD, channel_wise=True),
        ]
    )
    files = files_of(job)

    def loader(rows: Sequence[int], shuffle: bool) -> Any:
        items = [{"image": str(files[row]), "label": job.classes.index(files[row].parent.name)} for row in rows]
        return DataLoader(CacheDataset(items, transforms, progress=False), batch_size=job.batch, shuffle=shuffle)

    return loader(part.train, True), loader(part.val, False)


def _epoch_completed() -> Any:
    from ignite.engine import Events  # type: ignore[import-not-found,unused-ignore]

    return Events.EPOCH_COMPLETED


def _lap(clock: Clock, stage: str, _: Any) -> None:
    clock.lap(stage)


# ---------------------------------------------------------------------------------------------------- medtl


def run_medtl(job: Job, clock: Clock) -> tuple[list[tuple[float, float]], str]:
    """Train with medtl: files are ingested and packed once, folds share what is kept of the frozen layers.

    Shipped: what a config without a word about it gives (precision and kept numbers by the machine, BatchNorm frozen,
    dropout 0.2, grey images in one channel). Matched: fp32, BatchNorm with its stage, no dropout, three channels.
    """
    from medtl.config import CacheConfig, ModelConfig, PhaseConfig
    from medtl.model.devices import device_of, make_deterministic, precision_of
    from medtl.model.fit import fit
    from medtl.model.io import FolderActivations, FolderSaver
    from medtl.model.surgery import HEAD, cut
    from medtl.progress import listening

    make_deterministic(job.seed, job.threads)
    work, shipped = Path(tempfile.mkdtemp(dir=Path.cwd())), job.column == "shipped"
    phases = tuple(
        PhaseConfig(
            name=stage.name, unfreeze="all" if stage.unfreeze == ALL else stage.unfreeze, epochs=stage.epochs,
            lr=stage.lr, decay=1.0, optimiser="sgd", weight_decay=0.0, schedule="constant", warmup=0.0, augment=False,
            **({} if shipped else {"batchnorm": "with_stage"}),
        )
        for stage in job.stages
    )  # fmt: skip
    same: dict[str, Any] = (
        {} if shipped else {"precision": "fp32", "dropout": 0.0, "cache": CacheConfig(numbers="fp32")}
    )
    config = ModelConfig(
        backbone=job.backbone, phases=phases, batch_size=job.batch, threads=job.threads,
        device=job.device.split(":")[0], **same,
    )  # fmt: skip
    pack = _pack(job, work, channels=1 if shipped else 3)
    clock.lap("files")
    per_epoch = [stage.name for stage in job.stages for _ in range(stage.epochs)]

    told = {"training": 0}

    def listener(
        step: str, done: int, _: int
    ) -> None:  # training tells thousandths of epochs, and again at a phase's end
        new = step == "training" and done > told["training"]
        told["training"] = done if step == "training" else told["training"]
        clock.lap(per_epoch[done // 1000 - 1] if new else "frozen layers")

    store, found = FolderActivations(work / "activations", config.cache.budget_gb * 1000), []
    for number, part in enumerate(job.parts):
        told["training"] = 0
        source = new_network(job)
        network = cut(source, job.backbone, pack.shape[-1], len(job.classes), config.dropout)
        network.stages[HEAD][1].load_state_dict(blocks(source)[-1][0].state_dict())  # type: ignore[index]
        unfinished = work / f"unfinished{number}"
        unfinished.mkdir()
        with listening(listener):
            fit(network, _material(job, part, pack, work), config, job.seed, FolderSaver(unfinished), store)
        clock.lap("closing")
        found.append(figures(_normalised(network), job, part))
        clock.rest()
    precision = precision_of(config, device_of(config))
    return found, f"{precision}, {pack.shape[-1]} channels, " + (
        "BatchNorm frozen" if shipped else "BatchNorm with its stage"
    )


def _pack(job: Job, work: Path, channels: int) -> Any:
    """Ingest the files and pack them, in the order of the rows."""
    from medtl.artifacts import Store
    from medtl.config import ScansConfig
    from medtl.dataset.io import read_pack, write_pack
    from medtl.pseudonyms import Pseudonymiser
    from medtl.records import Plan
    from medtl.scans.intake import ingest, read_scans
    from medtl.scans.segments import PixelStore
    from medtl.scans.sources import survey

    config, store, names = ScansConfig(stable_seconds=0), Store(work / "workspace"), Pseudonymiser(b"benchmark-key-16")
    ingest(survey(Path(job.images), config), config, names, work, store)
    scans = {key: scan for scan in read_scans(work) for key in scan.keys}
    paths = [path.relative_to(job.images).as_posix() for path in files_of(job)]
    in_order = [scans[names.file_keys(path)[0]] for path in paths]
    channels = max(channels, *(scan.channels for scan in in_order))
    plan = Plan(
        "binary" if len(job.classes) == 2 else "multiclass", job.classes, (job.size, job.size), channels, 8, "fixed",
        0.0, 255.0, (0.5, 99.5), {}, {},
    )  # fmt: skip
    write_pack(work, in_order, PixelStore(store.root / "pixels"), plan)
    return read_pack(work)


def _material(job: Job, part: Part, pack: Any, work: Path) -> Any:
    import numpy as np

    from medtl.artifacts import digest_of
    from medtl.config import TransformsConfig
    from medtl.dataset.loading import EvaluationBatches, TrainingBatches
    from medtl.evaluation.superiority import share_better
    from medtl.model.fit import Material

    labels = np.array([job.classes.index(path.parent.name) for path in files_of(job)])
    targets = np.eye(len(job.classes))[labels]
    train = TrainingBatches(pack, targets, part.train, job.batch, TransformsConfig(), job.seed)
    val = EvaluationBatches(pack, targets, part.val, job.batch)
    rows = sorted(part.val)
    patients = [str(row) for row in rows]

    def judge(new: Any, old: Any) -> float:
        return share_better(new, old, targets[rows], patients, patients, "auroc", 1000, job.seed)

    def name(chosen: Sequence[int], view: int) -> str:
        return digest_of([str(work), list(chosen), view])

    task = "binary" if len(job.classes) == 2 else "multiclass"
    pool = sorted({row for fold in job.parts for row in (*fold.train, *fold.val)})  # folds share one trunk pass
    kept = pool if len(job.parts) > 1 else None
    return Material(train, val, task, [str(row) for row in part.train], name, judge, kept)  # type: ignore[arg-type]


def _normalised(network: Any) -> Any:
    """Let a medtl network, which normalises by itself, take normalised colour images."""
    import torch

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, images: Any) -> Any:
            mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
            plain = images * std + mean
            return self.inner(plain if len(network.mean.flatten()) == 3 else plain.mean(1, keepdim=True))

    return Outer()


# ---------------------------------------------------------------------------------------------------- start weights


def prepare(job: Job) -> None:
    """Write start weights: random ones of the seed, with the BatchNorm statistics that these images give them.

    A pretrained network's statistics fit its weights; those of a freshly made one do not, and would make evaluation
    mode meaningless. Scale and shift are drawn too: in a pretrained network no two layers share them.
    """
    import torch

    torch.manual_seed(job.seed)
    network = new_network(job)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.9, 1.1)
            norm.bias.uniform_(-0.1, 0.1)
            norm.momentum = None  # the mean over all batches
        network.train()
        for images, _ in loaders(job, job.parts[0], 0)[0]:
            network(images)
        head = blocks(network)[-1][0]
        torch.nn.init.normal_(head.weight, std=0.01)
        torch.nn.init.zeros_(head.bias)
    torch.save(network.state_dict(), job.weights)


# ---------------------------------------------------------------------------------------------------- one process


CONTENDERS: dict[str, Callable[[Job, Clock], tuple[list[tuple[float, float]], str]]] = {
    "medtl": run_medtl,
    "tutorial": run_tutorial,
    "tuned": run_tuned,
    "fastai": run_fastai,
    "lightning": run_lightning,
    "monai": run_monai,
}


def small(job: Job) -> Job:
    """Cut a job down to one batch, and one epoch of its first and last stage."""
    part = Part(job.parts[0].train[: job.batch], job.parts[0].val)
    stages = dict.fromkeys((job.stages[0], job.stages[-1]))
    return replace(job, parts=(part,), stages=tuple(replace(stage, epochs=1) for stage in stages))


def measure(contender: str, job: Job) -> Result:
    """Do a job, after a small one that does not count."""
    import torch

    torch.set_num_threads(job.threads)
    run = CONTENDERS[contender]
    run(small(job), Clock(job.device))
    gc.collect()
    torch.manual_seed(job.seed)
    clock = Clock(job.device)
    found, note = run(job, clock)
    losses, aurocs = zip(*found, strict=True)
    wall, cpu = sum(lap.wall for lap in clock.laps), sum(lap.cpu for lap in clock.laps)
    return Result(wall, cpu, tuple(clock.laps), sum(losses) / len(losses), sum(aurocs) / len(aurocs), note)


def main() -> None:
    """Be one contender; the last line of stdout is the result."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    contender, job = sys.argv[1], read_job(Path(sys.argv[2]))
    if contender == "prepare":
        prepare(job)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # a library that leaves files where it runs leaves them here
        result = measure(contender, job)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
