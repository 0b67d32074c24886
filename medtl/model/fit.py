"""Train a network in phases, so that stopping and starting again changes nothing.

All randomness of an epoch is drawn from (seed, phase, epoch); after every epoch the whole state can be saved; a run
that was killed goes on from the last saved epoch and ends with the same bits (on the same CPU and threads). Each phase
starts from the best state so far, and its own best state replaces that only if it is better on validation.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from medtl.config import ModelConfig, PhaseConfig
from medtl.errors import ModelError
from medtl.model.phases import (
    frozen_digest,
    learning_rates,
    parameter_groups,
    schedule,
    set_learning,
    unfrozen_stages,
)
from medtl.model.surgery import StagedNetwork
from medtl.progress import advance
from medtl.records import AnyArray, Epoch, FloatArray, Phase, Task

_CLIP = 5.0  # norm of the gradient
State = dict[str, Tensor]


class Training(Protocol):
    """Where training batches come from: images (n, rows, columns, channels) and targets (n, classes)."""

    def __len__(self) -> int: ...

    def epoch(self, phase: int, epoch: int, augmented: bool = True) -> Iterator[tuple[AnyArray, FloatArray]]:
        """Give the batches of one epoch; the same arguments give the same batches."""
        ...


class Validation(Protocol):
    """Where validation batches come from."""

    def __iter__(self) -> Iterator[tuple[AnyArray, FloatArray]]: ...


class Saver(Protocol):
    """Where unfinished training is kept."""

    def load(self) -> Progress | None:
        """Give what was saved last, if anything."""
        ...

    def save(self, progress: Progress) -> None:
        """Keep it, in one step."""
        ...


@dataclass
class Progress:
    """Everything needed to go on: which phase and epoch come next, the states, the optimiser and the history."""

    phase: int = 0
    epoch: int = 0
    current: State = field(default_factory=dict)
    best: State = field(default_factory=dict)  # over all finished phases
    phase_best: State = field(default_factory=dict)
    optimiser: dict[str, Any] | None = None
    best_score: tuple[float, float] | None = None
    phase_score: tuple[float, float] | None = None
    phase_best_epoch: int = 0
    phase_digest: str = ""
    phases: list[Phase] = field(default_factory=list)
    history: list[Epoch] = field(default_factory=list)


def device_of(config: ModelConfig) -> torch.device:
    """Choose where to compute.

    Raises:
        ModelError: CUDA is wanted and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is 'cuda' and this machine has no usable CUDA device. Set it to auto or cpu.")
    wanted = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def make_deterministic(seed: int, threads: int | None) -> int:
    """Seed torch, ask for deterministic kernels and fix the threads; give their number."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    count = threads or os.cpu_count() or 1
    torch.set_num_threads(count)
    return count


def fit(
    network: StagedNetwork,
    train: Training,
    val: Validation,
    task: Task,
    config: ModelConfig,
    seed: int,
    saver: Saver,
    label: str = "training",
) -> tuple[tuple[Phase, ...], tuple[Epoch, ...]]:
    """Train through all phases; leave the best state in the network.

    Raises:
        ModelError: the loss is not finite, or a frozen layer moved.
    """
    device = device_of(config)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress = saver.load() or Progress(current=_copy(network), best=_copy(network))
    total = sum(phase.epochs for phase in config.phases)
    weights = class_weights(train, config, task)
    while progress.phase < len(config.phases):
        phase = config.phases[progress.phase]
        network.load_state_dict(progress.current if progress.epoch else progress.best)
        frozen = set_learning(network, phase)
        optimiser = torch.optim.AdamW(parameter_groups(network, phase))
        if progress.epoch == 0:
            progress.phase_digest, progress.phase_score = frozen_digest(network, phase), None
        elif progress.optimiser is not None:
            optimiser.load_state_dict(progress.optimiser)
        while progress.epoch < phase.epochs:
            _one_epoch(network, optimiser, train, val, task, config, phase, frozen, seed, progress, device, weights)
            advance(label, len(progress.history), total)
            if progress.epoch < phase.epochs:
                saver.save(progress)
        _close_phase(network, phase, progress)
        saver.save(progress)
    network.load_state_dict(progress.best)
    network.eval()
    kept = max(range(len(progress.phases)), key=lambda i: (progress.phases[i].kept, i))
    phases = tuple(replace(p, kept=i == kept) for i, p in enumerate(progress.phases))
    return phases, tuple(progress.history)


def to_images(batch: AnyArray, device: torch.device) -> Tensor:
    """Turn packed pixels (n, rows, columns, channels) into floats of 0 to 1, (n, channels, rows, columns)."""
    # numpy widens and scales in one pass over memory, eight times as fast as torch does it on a CPU
    scaled = np.multiply(batch, np.float32(1.0 / np.iinfo(batch.dtype).max), dtype=np.float32)
    return torch.from_numpy(scaled).to(device).permute(0, 3, 1, 2)


def _one_epoch(
    network: StagedNetwork,
    optimiser: torch.optim.Optimizer,
    train: Training,
    val: Validation,
    task: Task,
    config: ModelConfig,
    phase: PhaseConfig,
    frozen: int,
    seed: int,
    progress: Progress,
    device: torch.device,
    weights: FloatArray | None,
) -> None:
    torch.manual_seed(int(np.random.SeedSequence([seed, progress.phase, progress.epoch]).generate_state(1)[0]))
    set_learning(network, phase)
    steps, losses, count = phase.epochs * len(train), 0.0, 0
    for number, (batch, targets) in enumerate(train.epoch(progress.phase, progress.epoch, phase.augment)):
        factor = schedule(progress.epoch * len(train) + number, steps)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        if len(batch) < 2:
            continue  # one image has no batch statistics
        logits = network(to_images(batch, device), frozen)
        loss = loss_of(logits, targets, task, config.label_smoothing, device, weights)
        if not torch.isfinite(loss):
            raise ModelError(
                f"The loss is not finite in phase '{phase.name}', epoch {progress.epoch + 1}. "
                f"Lower the phase's learning rate (now {phase.lr:g})."
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], _CLIP)
        optimiser.step()
        losses += float(loss.detach()) * len(batch)
        count += len(batch)
    val_loss, val_auroc = validate(network, val, task, device)
    progress.history.append(Epoch(phase.name, progress.epoch + 1, losses / max(count, 1), val_loss, val_auroc))
    progress.epoch += 1
    progress.current = _copy(network)
    progress.optimiser = copy.deepcopy(optimiser.state_dict())
    score = (val_auroc if val_auroc is not None else -math.inf, -val_loss)
    if progress.phase_score is None or score > progress.phase_score:
        progress.phase_score, progress.phase_best_epoch = score, progress.epoch
        progress.phase_best = progress.current


def _close_phase(network: StagedNetwork, phase: PhaseConfig, progress: Progress) -> None:
    after = frozen_digest(network, phase)
    if after != progress.phase_digest:
        raise ModelError(f"Phase '{phase.name}' changed a layer that was frozen. The checkpoint is not written.")
    assert progress.phase_score is not None
    better = progress.best_score is None or progress.phase_score > progress.best_score
    learning = unfrozen_stages(phase, network.stage_names)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    auroc, negative_loss = progress.phase_score
    progress.phases.append(
        Phase(
            name=phase.name,
            unfrozen=learning,
            frozen=tuple(name for name in network.stage_names if name not in learning),
            trainable_parameters=trainable,
            frozen_parameters=sum(p.numel() for p in network.parameters()) - trainable,
            learning_rates=learning_rates(phase, network.stage_names),
            frozen_digest_before=progress.phase_digest,
            frozen_digest_after=after,
            best_epoch=progress.phase_best_epoch,
            val_loss=-negative_loss,
            val_auroc=auroc if math.isfinite(auroc) else None,
            kept=better,
        )
    )
    if better:
        progress.best, progress.best_score = progress.phase_best, progress.phase_score
    progress.phase, progress.epoch = progress.phase + 1, 0
    progress.current, progress.phase_best, progress.optimiser = {}, {}, None


def class_weights(train: Training, config: ModelConfig, task: Task) -> FloatArray | None:
    """Give each class the inverse of its frequency in training, of mean 1 over studies; None where not asked for.

    Raises:
        ModelError: asked for in a multi-label task, where a study has no one class.
    """
    if not config.class_balance:
        return None
    if task == "multilabel":
        raise ModelError(
            "model.class_balance weighs one class per study; a multi-label task has several. Set it to false."
        )
    counts = np.sum([targets.sum(0) for _, targets in train.epoch(0, 0, augmented=False)], axis=0)
    weights: FloatArray = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return weights


def loss_of(
    logits: Tensor,
    targets: FloatArray,
    task: Task,
    smoothing: float,
    device: torch.device,
    weights: FloatArray | None = None,
) -> Tensor:
    """Give the mean loss: cross-entropy, or binary cross-entropy over the known labels of a multi-label task.

    Args:
        weights: of the classes, (classes,); not for multi-label tasks.
    """
    wanted = torch.from_numpy(np.ascontiguousarray(targets)).to(device, torch.float32)
    if task != "multilabel":
        losses = nn.functional.cross_entropy(logits, wanted, label_smoothing=smoothing, reduction="none")
        if weights is None:
            return losses.mean()
        return (losses * (wanted @ torch.from_numpy(weights).to(wanted))).mean()
    known = ~torch.isnan(wanted)
    wanted = torch.where(known, wanted * (1 - smoothing) + 0.5 * smoothing, 0.0)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def validate(network: StagedNetwork, val: Validation, task: Task, device: torch.device) -> tuple[float, float | None]:
    """Measure mean loss and (macro) AUROC; the AUROC is None where no class has both kinds."""
    network.eval()
    losses, count = 0.0, 0
    scores, truth = [], []
    with torch.no_grad():
        for batch, targets in val:
            logits = network(to_images(batch, device))
            losses += float(loss_of(logits, targets, task, 0.0, device)) * len(batch)
            count += len(batch)
            probabilities = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
            scores.append(probabilities.double().cpu().numpy())
            truth.append(targets)
    return losses / max(count, 1), macro_auroc(np.concatenate(truth), np.concatenate(scores))


def macro_auroc(targets: FloatArray, scores: FloatArray) -> float | None:
    """Give the mean of the one-against-rest AUROCs of the classes that have both kinds, or None."""
    values = []
    for wanted, score in zip(targets.T, scores.T, strict=True):
        known = np.isfinite(wanted)
        if len(np.unique(wanted[known])) == 2:
            values.append(float(roc_auc_score(wanted[known], score[known])))
    return float(np.mean(values)) if values else None


def _copy(network: StagedNetwork) -> State:
    return {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
