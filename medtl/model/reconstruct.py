"""Learn what scans look like without labels: hide blocks of a patch, and have the network fill them in.

The network is that of a segmentation, whose output gives values instead of logits; the loop is that of
:mod:`medtl.model.segment_fit`, for which a voxel's code says whether it is hidden. Hidden voxels take the mean of what
is shown of their patch; the loss is of the hidden voxels alone, of the values themselves. What is watched on scans that
are held out is the share of the hidden voxels' variance that is explained: 0 is what their mean would give.

Sources: Chen et al., Masked Image Modeling Advances 3D Medical Image Analysis, WACV 2023, arXiv:2204.11716 (raw values,
a high share hidden, small blocks); Wald et al., Revisiting MAE pre-training for 3D medical image segmentation, CVPR
2025, arXiv:2410.23132 (a U-Net of convolutions, squared error of what is hidden).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from medtl.config import ModelConfig, PhaseConfig, ReconstructConfig
from medtl.model.cache import Precision, autocast
from medtl.model.segment_fit import Batch, BatchLoss, Forward, PatchSource, over_processes
from medtl.model.segmenter import SegmenterNetwork, build
from medtl.records import AnyArray, GridPlan, Structure

HIDDEN = 1  # code of a hidden voxel
WATCHED = "explained variance of what is hidden"
_WEIGHT_DECAY = 1e-2
_NARROWEST = 4  # voxels of a block's side: less is interpolated, not understood
_BLOCKS = 0xB10C  # of random numbers
_HELD_OUT = 1_000_000  # stands for a phase: no training draws these


def model_to_pretrain(model: ModelConfig) -> ModelConfig:
    """Give a study's model the way of pre-training: from nothing, one phase in which everything learns, one output."""
    phase = PhaseConfig(
        name="reconstruct",
        unfreeze="all",
        epochs=model.reconstruct.epochs,
        lr=model.reconstruct.lr,
        decay=1.0,
        batchnorm="with_stage",
        weight_decay=_WEIGHT_DECAY,
    )
    single = model.segmenter.model_copy(update={"deep_supervision": False})
    return model.model_copy(update={"weights": "none", "phases": (phase,), "segmenter": single})


def plan_of_values(plan: GridPlan) -> GridPlan:
    """Give the plan of a network with one output for each channel of its input."""
    channels = tuple(Structure(f"channel {n}", (n,)) for n in range(1, plan.channels))
    return replace(plan, structures=channels, ignore=None)


def hidden_blocks(rng: np.random.Generator, patch: tuple[int, ...], config: ReconstructConfig) -> AnyArray:
    """Choose the blocks of one patch that are hidden.

    Args:
        patch: at least 8 voxels along each axis.

    Returns:
        uint8 (*patch): 1 hidden, 0 shown; at least one block is either.
    """
    sides = [max(_NARROWEST, -(-n // config.blocks)) for n in patch]
    counts = [-(-n // side) for n, side in zip(patch, sides, strict=True)]
    total = prod(counts)
    blocks = np.zeros(total, np.uint8)
    blocks[rng.permutation(total)[: min(max(1, round(config.hidden * total)), total - 1)]] = HIDDEN
    voxels = blocks.reshape(counts)
    for axis, side in enumerate(sides):
        voxels = voxels.repeat(side, axis)
    return voxels[tuple(slice(0, n) for n in patch)]


@dataclass(frozen=True)
class HiddenPatches:
    """Patches with codes that say which of their voxels are hidden; the same arguments hide the same."""

    patches: PatchSource
    config: ReconstructConfig
    seed: int

    def __len__(self) -> int:
        return len(self.patches)

    def step(self, phase: int, epoch: int, step: int, augmented: bool) -> Batch:
        """Give the patches of a step and what of them is hidden."""
        images, codes = self.patches.step(phase, epoch, step, augmented)
        for place, one in enumerate(codes):
            rng = np.random.default_rng([self.seed, _BLOCKS, phase, epoch, step, place])
            one.copy_(torch.from_numpy(hidden_blocks(rng, tuple(one.shape), self.config)))
        return images, codes

    def held_out(self) -> Batch:
        """Give the first patches as no training draws them: the same whenever they are asked for."""
        return self.step(_HELD_OUT, 0, 0, False)


def hide(images: Tensor, codes: Tensor) -> Tensor:
    """Give hidden voxels the mean of what is shown of their patch, channel by channel.

    Args:
        images: (n, channels, *space).
        codes: (n, *space).
    """
    hidden = (codes == HIDDEN).unsqueeze(1)
    space = tuple(range(2, images.ndim))
    shown = (images * ~hidden).sum(space, keepdim=True) / (~hidden).sum(space, keepdim=True).clamp(min=1)
    return torch.where(hidden, shown, images)


def loss_of_hidden(kind: Literal["l2", "l1"]) -> BatchLoss:
    """Make the loss of a batch: the mean difference of its hidden voxels, squared or absolute."""

    def loss(forward: Forward, images: Tensor, codes: Tensor) -> Tensor:
        found = forward(hide(images, codes))
        assert isinstance(found, Tensor)  # one output: model_to_pretrain
        hidden = (codes == HIDDEN).unsqueeze(1)
        apart = (found.float() - images) * hidden
        total = (apart.abs() if kind == "l1" else apart.square()).sum()
        added = over_processes(torch.stack([total, hidden.sum().to(total.dtype) * images.shape[1]]))
        return added[0] / added[1].clamp(min=1)

    return loss


def explained(network: SegmenterNetwork, batch: Batch, device: torch.device, precision: Precision) -> float:
    """Give the share of the hidden voxels' variance that a network explains; NaN where they are all alike.

    1 is all of it, 0 what their mean explains; less is worse than their mean.
    """
    images, codes = (part.to(device) for part in batch)
    with torch.no_grad(), autocast(device, precision):
        found = network(hide(images, codes).contiguous(memory_format=network.memory_format))
    assert isinstance(found, Tensor)
    hidden = (codes == HIDDEN).unsqueeze(1).expand_as(images)
    true, told = images[hidden].double(), found.float()[hidden].double()
    spread = float((true - true.mean()).square().sum())
    return 1 - float((true - told).square().sum()) / spread if spread > 0 else math.nan


def transferable(state: Mapping[str, Tensor], plan: GridPlan, model: ModelConfig, kind: str) -> dict[str, Tensor]:
    """Take what a segmentation can start from: all but the output, which gives values and knows no structure.

    The output is what has another shape in a network of one output more.

    Args:
        state: of the network that was pre-trained.
        plan: of the scans.
        kind: of the network, as it was built.
    """
    own = plan_of_values(plan)
    wider = replace(own, structures=(*own.structures, Structure("another", (plan.channels,))))
    settings = model.segmenter.model_copy(update={"network": kind})
    other, _ = build(wider, model.model_copy(update={"segmenter": settings, "weights": "none"}), 0, None)
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    return {key: value for key, value in state.items() if shapes[key] == value.shape}
