"""What training makes small: one mean over the known labels of a batch.

Every loss is a sum over labels divided by how many there are, so that a batch cut into parts, or spread over processes,
gives the gradient of the whole: the caller divides by the count of the whole batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from medtl.config import PhaseConfig
from medtl.errors import ModelError
from medtl.records import FloatArray, Task

_FOCUS = 2.0  # gamma of the focal loss


def class_weights(targets: FloatArray, phase: PhaseConfig, task: Task) -> FloatArray | None:
    """Give each class the inverse of its frequency, of mean 1 over studies; None where the phase does not ask for it.

    Args:
        targets: of the training part, (n, classes).

    Raises:
        ModelError: asked for in a multi-label task, where a study has no one class.
    """
    if phase.loss != "class_balanced":
        return None
    if task == "multilabel":
        raise ModelError(
            f"Phase '{phase.name}': loss class_balanced weighs one class per study; a multi-label task has several. "
            "Set it to cross_entropy or focal."
        )
    counts = targets.sum(0)
    weights: FloatArray = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return weights


def known_labels(targets: FloatArray, task: Task) -> int:
    """Count what a loss is a mean over: studies, or the known labels of a multi-label task."""
    return int(np.isfinite(targets).sum()) if task == "multilabel" else len(targets)


def loss_sum(
    logits: Tensor, wanted: Tensor, task: Task, phase: PhaseConfig, weights: FloatArray | None = None
) -> Tensor:
    """Give the loss, summed over studies (over known labels of a multi-label task).

    Args:
        logits: (n, classes).
        wanted: (n, classes), 0 to 1 (a mixture may lie between); NaN where a multi-label reader said nothing.
        weights: of the classes, (classes,).

    Source: Lin et al., Focal Loss, ICCV 2017; label smoothing: Szegedy et al., CVPR 2016.
    """
    logits, smoothing = logits.float(), phase.label_smoothing
    if task == "multilabel":
        known = ~torch.isnan(wanted)
        wanted = torch.where(known, wanted * (1 - smoothing) + 0.5 * smoothing, 0.0)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        if phase.loss == "focal":
            right = torch.sigmoid(logits)
            losses = losses * (wanted - right).abs().pow(_FOCUS)
        return (losses * known).sum()
    smooth = wanted * (1 - smoothing) + smoothing / wanted.shape[1]
    logarithms = logits.log_softmax(1)
    if phase.loss == "focal":
        logarithms = logarithms * (1 - logarithms.exp()).pow(_FOCUS)
    losses = -(smooth * logarithms).sum(1)
    if weights is not None:
        losses = losses * (wanted @ torch.from_numpy(weights).to(wanted))
    return losses.sum()


def mixture(targets: Tensor, alpha: float, rng: np.random.Generator) -> tuple[float, Tensor]:
    """Draw how a batch is mixed with itself: the share of each image, and the order of its partners.

    Source: Zhang et al., mixup, ICLR 2018.
    """
    share = float(rng.beta(alpha, alpha))
    return share, torch.from_numpy(rng.permutation(len(targets))).to(targets.device)


def evaluation_loss(logits: Tensor, wanted: Tensor, task: Task) -> Tensor:
    """Give the plain cross-entropy, summed: what validation reports whatever a phase minimises."""
    return loss_sum(logits, wanted, task, PhaseConfig(name="plain", unfreeze="head"))
