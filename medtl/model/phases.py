"""Who learns in a phase, how fast, and the proof that nobody else moved. Pure but for the network it is given.

Parameter groups are keyed by the stage a parameter lies in and carry the names of their parameters, so every parameter
is in exactly one group, and an optimiser's state that is read back is matched by name. A frozen stage is in evaluation
mode for the whole phase (its BatchNorm statistics stand still), runs without gradients, and its parameters and buffers
have the same digest before and after.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from medtl.config import PhaseConfig
from medtl.errors import ConfigError, ModelError
from medtl.model.surgery import HEAD, StagedNetwork
from medtl.records import Phase

_MOMENTUM = 0.9
Norms = nn.modules.batchnorm._BatchNorm


def unfrozen_stages(phase: PhaseConfig, stages: Sequence[str]) -> tuple[str, ...]:
    """Name the stages that learn in a phase, stem first.

    Raises:
        ConfigError: an unknown stage, or a gap: everything above the lowest unfrozen stage must learn too.
    """
    names = tuple(stages)
    if phase.unfreeze == "all":
        return names
    if phase.unfreeze == "head":
        return (HEAD,)
    if isinstance(phase.unfreeze, int):
        if not 0 <= phase.unfreeze < len(names):
            raise ConfigError(
                f"Phase '{phase.name}' unfreezes {phase.unfreeze} stages of {len(names) - 1} in the trunk."
            )
        return names[len(names) - 1 - phase.unfreeze :]
    wanted = {*phase.unfreeze, HEAD}
    unknown = sorted(wanted - set(names))
    if unknown:
        raise ConfigError(f"Phase '{phase.name}' names stage '{unknown[0]}'; this backbone has {', '.join(names)}.")
    first = min(names.index(name) for name in wanted)
    if len(names) - first != len(wanted):
        raise ConfigError(
            f"Phase '{phase.name}' leaves a frozen stage above an unfrozen one. Unfreeze from a stage up to the head."
        )
    return names[first:]


def phases_again(schedule: Sequence[PhaseConfig], done: Sequence[Phase], guard: float) -> tuple[PhaseConfig, ...]:
    """Give the phases that led to the state that was kept, each as long as its best epoch and never stopped early.

    A phase that did not beat the best before it by more than chance left no trace: the next one started from that best.

    Args:
        schedule: what was asked for.
        done: what came of it, in the same order.
        guard: share of resamples in which a phase had to be better.
    """
    kept = next(number for number, phase in enumerate(done) if phase.kept)
    return tuple(
        wanted.model_copy(update={"epochs": phase.best_epoch, "patience": None})
        for wanted, phase in zip(schedule[: kept + 1], done[: kept + 1], strict=True)
        if phase.chance_better is None or phase.chance_better >= guard
    )


def frozen_count(phase: PhaseConfig, stages: Sequence[str]) -> int:
    """Count the stages from the stem up that a phase leaves alone: its freeze boundary."""
    return len(stages) - len(unfrozen_stages(phase, stages))


def learning_rates(phase: PhaseConfig, stages: Sequence[str]) -> dict[str, float]:
    """Give each unfrozen stage its peak learning rate: the head's, falling by ``decay`` per stage below it."""
    learning = unfrozen_stages(phase, stages)
    return {name: phase.lr * phase.decay ** (len(learning) - 1 - depth) for depth, name in enumerate(learning)}


def parameter_groups(network: StagedNetwork, phase: PhaseConfig) -> list[dict[str, Any]]:
    """Make the optimiser's groups, two a stage; biases and norm weights take no weight decay."""
    groups = []
    for stage, rate in learning_rates(phase, network.stage_names).items():
        learning = [(name, p) for name, p in network.stages[stage].named_parameters() if p.requires_grad]
        for decayed in (True, False):
            chosen = [(name, p) for name, p in learning if (p.ndim > 1) == decayed]
            if chosen:
                groups.append(
                    {
                        "params": [p for _, p in chosen],
                        "names": [f"{stage}.{name}" for name, _ in chosen],
                        "lr": rate,
                        "peak": rate,
                        "weight_decay": phase.weight_decay if decayed else 0.0,
                        "stage": stage,
                    }
                )
    return groups


def make_optimiser(network: StagedNetwork, phase: PhaseConfig) -> torch.optim.Optimizer:
    """Make a phase's optimiser over what learns in it, and over nothing else.

    Raises:
        ModelError: a parameter that learns is in no group, or in two.
    """
    groups = parameter_groups(network, phase)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    learning = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != learning:
        raise ModelError(
            f"Phase '{phase.name}': a parameter that should learn is in no group of the optimiser, or in two."
        )
    if phase.optimiser == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM)
    return torch.optim.AdamW(groups)


def restore_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, after making sure that its groups hold the same parameters.

    Raises:
        ModelError: they do not: the state belongs to another network or phase.
    """
    here = [group["names"] for group in optimiser.param_groups]
    if here != [list(group["names"]) for group in state["param_groups"]]:
        raise ModelError("The saved optimiser belongs to other parameters. Delete the workspace's 'unfinished' folder.")
    optimiser.load_state_dict(state)


def set_learning(network: StagedNetwork, phase: PhaseConfig) -> int:
    """Put every stage in the mode the phase wants; give the number of frozen stages.

    Nobody but this touches a frozen stage's mode: validation and :func:`train_again` go to the unfrozen ones alone.
    """
    boundary = frozen_count(phase, network.stage_names)
    for number, stage in enumerate(network.stages.values()):
        stage.train(number >= boundary)
        stage.requires_grad_(number >= boundary)
        if number >= boundary and phase.batchnorm == "frozen":
            for module in stage.modules():
                if isinstance(module, Norms):
                    module.eval().requires_grad_(False)
    return boundary


def train_again(network: StagedNetwork, phase: PhaseConfig, boundary: int) -> None:
    """Put the unfrozen stages back into training after validation; a frozen BatchNorm in them stays as it is."""
    for stage in list(network.stages.values())[boundary:]:
        stage.train()
        if phase.batchnorm == "frozen":
            for module in stage.modules():
                if isinstance(module, Norms):
                    module.eval()


def frozen_digests(network: StagedNetwork, phase: PhaseConfig) -> dict[str, str]:
    """Give a digest for each stage that has something which the phase must not move: all of it, or its BatchNorm."""
    learning = set(unfrozen_stages(phase, network.stage_names))
    found: dict[str, str] = {}
    for name, stage in network.stages.items():
        if name not in learning:
            found[name] = stage_digest(stage)
        elif phase.batchnorm == "frozen":
            norms = {
                f"{path}.{key}": value
                for path, module in stage.named_modules()
                if isinstance(module, Norms)
                for key, value in module.state_dict().items()
            }
            if norms:
                found[f"{name}, BatchNorm"] = state_digest(norms)
    return found


def learning_state(network: StagedNetwork, phase: PhaseConfig) -> dict[str, Tensor]:
    """Copy what a phase may move: the whole state of its unfrozen stages, by the network's own names."""
    learning = unfrozen_stages(phase, network.stage_names)
    return {
        f"stages.{name}.{key}": value.detach().cpu().clone()
        for name in learning
        for key, value in network.stages[name].state_dict().items()
    }


def frozen_digest(digests: Mapping[str, str]) -> str:
    """Give one sha256 over the digests of :func:`frozen_digests`: all parameters and buffers that must not move."""
    return sha256(json.dumps(digests).encode()).hexdigest()


def stage_digest(stage: nn.Module) -> str:
    """Give the sha256 over names and bytes of a stage's parameters and buffers."""
    return state_digest(stage.state_dict())


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Give the sha256 over names, shapes and bytes of tensors, in their order."""
    digest = sha256()
    for key, value in state.items():
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rate_factor(phase: PhaseConfig, step: int, steps: int) -> float:
    """Give the factor on the peak learning rate: linear warm-up, then the phase's schedule down to zero.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017 (cosine).
    """
    warm = max(1, int(steps * phase.warmup))
    if step < warm:
        return (step + 1) / warm
    if phase.schedule == "constant":
        return 1.0
    gone = (step - warm) / max(1, steps - warm)
    return 0.5 * (1 + math.cos(math.pi * gone)) if phase.schedule == "cosine" else 1 - gone
