"""Who learns in a phase, how fast, and the proof that nobody else moved. Pure but for the network it is given.

Parameter groups are keyed by the stage a parameter lies in, so every parameter is in exactly one group. A frozen stage
is in evaluation mode for the whole phase (its BatchNorm statistics stand still), runs without gradients, and its
parameters and buffers have the same digest before and after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from medtl.config import PhaseConfig
from medtl.errors import ConfigError
from medtl.model.surgery import HEAD, StagedNetwork

_WARMUP = 0.1  # share of a phase's steps


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


def learning_rates(phase: PhaseConfig, stages: Sequence[str]) -> dict[str, float]:
    """Give each unfrozen stage its peak learning rate: the head's, falling by ``decay`` per stage below it."""
    learning = unfrozen_stages(phase, stages)
    return {name: phase.lr * phase.decay ** (len(learning) - 1 - depth) for depth, name in enumerate(learning)}


def parameter_groups(network: StagedNetwork, phase: PhaseConfig) -> list[dict[str, Any]]:
    """Make the optimiser's groups, two a stage; biases and norm weights take no weight decay."""
    groups = []
    for name, rate in learning_rates(phase, network.stage_names).items():
        parameters = [p for p in network.stages[name].parameters() if p.requires_grad]
        for decayed in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == decayed]
            if chosen:
                decay = phase.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "lr": rate, "peak": rate, "weight_decay": decay, "stage": name})
    return groups


def set_learning(network: StagedNetwork, phase: PhaseConfig) -> int:
    """Put every stage in the mode the phase wants; call it again at each epoch. Give the number of frozen stages."""
    learning = set(unfrozen_stages(phase, network.stage_names))
    for name, stage in network.stages.items():
        stage.train(name in learning)
        stage.requires_grad_(name in learning)
        if name in learning and phase.batchnorm == "frozen":
            for module in stage.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval().requires_grad_(False)
    return len(network.stage_names) - len(learning)


def frozen_digest(network: StagedNetwork, phase: PhaseConfig) -> str:
    """Give the sha256 over names and bytes of all parameters and buffers that the phase must not move."""
    learning = set(unfrozen_stages(phase, network.stage_names))
    digest = sha256()
    for name, stage in network.stages.items():
        still = {} if name in learning else stage.state_dict()
        if name in learning and phase.batchnorm == "frozen":
            still = {
                f"{path}.{key}": value
                for path, module in stage.named_modules()
                if isinstance(module, nn.modules.batchnorm._BatchNorm)
                for key, value in module.state_dict().items()
            }
        for key, value in still.items():
            digest.update(f"{name}.{key}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def schedule(step: int, steps: int) -> float:
    """Give the factor on the peak learning rate: linear warm-up over a tenth of the steps, then cosine to zero.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017.
    """
    warm = max(1, int(steps * _WARMUP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
