"""How far logits are from masks: soft Dice over a whole batch, cross-entropy and focal loss of all that counts.

A batch is summed up in a few numbers (:func:`sums`), which several processes add before they make the loss of them: the
Dice of a batch is not the mean of its parts'. Codes are as of :mod:`medtl.dataset.grid`: 0 background, then the number
of the structure, or one bit for each structure where they share voxels; 255 does not count.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

IGNORED = 255
MaskLoss = Literal["dice_ce", "dice_focal", "dice", "ce"]
_SMOOTH = 1e-5
_GAMMA = 2.0


def sums(logits: Tensor, codes: Tensor, overlapping: bool, kind: MaskLoss) -> Tensor:
    """Sum up a batch.

    Args:
        logits: (n, outputs, *space).
        codes: (n, *space), uint8.
        overlapping: one sigmoid for each structure; else a softmax with the background first.
        kind: of the loss.

    Returns:
        (3 * structures + 2,): overlap, predicted and true size of each structure, cross-entropy (or focal loss) summed
        over voxels, number of voxels that count.
    """
    logits = logits.float()
    known = codes != IGNORED
    if overlapping:
        truth = _bits(codes, logits.shape[1]) * known.unsqueeze(1)
        probabilities = logits.sigmoid() * known.unsqueeze(1)
        each = nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        certain = torch.exp(-each)
        voxelwise = each.mean(1)
        if kind == "dice_focal":
            voxelwise = ((1 - certain) ** _GAMMA * each).mean(1)
    else:
        target = torch.where(known, codes, 0).long().unsqueeze(1)
        logs = logits.log_softmax(1)
        picked = logs.gather(1, target).squeeze(1)
        truth = torch.zeros_like(logs).scatter_(1, target, 1.0)[:, 1:] * known.unsqueeze(1)
        probabilities = logs[:, 1:].exp() * known.unsqueeze(1)
        voxelwise = -picked if kind != "dice_focal" else -((1 - picked.exp()) ** _GAMMA) * picked
    over = (0, *range(2, logits.ndim))
    of_voxels = (voxelwise * known).sum()
    parts = [(probabilities * truth).sum(over), probabilities.sum(over), truth.sum(over)]
    return torch.cat([*parts, of_voxels.view(1), known.sum().to(of_voxels.dtype).view(1)])


def loss_of(added: Tensor, kind: MaskLoss) -> Tensor:
    """Make the loss of what :func:`sums` gave: one minus the mean soft Dice, plus the mean of the voxels.

    Source: Milletari et al., V-Net, 3DV 2016 (Dice); Lin et al., Focal Loss, ICCV 2017. Structures without the
    background, one Dice for the batch: Isensee et al., nnU-Net, Nature Methods 2021.
    """
    overlap, predicted, true = added[:-2].view(3, -1)
    dice: Tensor = 1 - ((2 * overlap + _SMOOTH) / (predicted + true + _SMOOTH)).mean()
    voxels: Tensor = added[-2] / added[-1].clamp(min=1)
    if kind == "dice":
        return dice
    return voxels if kind == "ce" else dice + voxels


def coarsened(codes: Tensor, space: tuple[int, ...]) -> Tensor:
    """Take codes at a coarser output's voxels: every so-manieth along each axis."""
    steps = [whole // part for whole, part in zip(codes.shape[1:], space, strict=True)]
    return codes[(slice(None), *(slice(None, part * step, step) for part, step in zip(space, steps, strict=True)))]


def weights_of(outputs: int) -> list[float]:
    """Give outputs their weights: each half of the finer one's, 1 together.

    Source: Isensee et al., nnU-Net, Nature Methods 2021, deep supervision.
    """
    raw = [0.5**level for level in range(outputs)]
    return [weight / sum(raw) for weight in raw]


def _bits(codes: Tensor, structures: int) -> Tensor:
    places = torch.arange(structures, device=codes.device, dtype=torch.uint8).view(1, -1, *(1,) * (codes.ndim - 1))
    return torch.bitwise_and(torch.bitwise_right_shift(codes.unsqueeze(1), places), 1).float()
