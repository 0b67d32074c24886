"""Apply a network: probabilities in, nothing learned."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from medtl.model.fit import to_images
from medtl.model.surgery import StagedNetwork
from medtl.progress import advance
from medtl.records import AnyArray, FloatArray, Task


def predict(
    network: StagedNetwork, batches: Iterable[tuple[AnyArray, FloatArray]], task: Task, device: torch.device
) -> FloatArray:
    """Give probabilities, shape (n, classes): softmax, or one sigmoid per label of a multi-label task."""
    network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    rows = []
    with torch.no_grad():
        for number, (images, _) in enumerate(batches, 1):
            logits = network(to_images(images, device)).double()
            rows.append((logits.sigmoid() if task == "multilabel" else logits.softmax(1)).cpu().numpy())
            advance("predicting batches", number, number)
    return np.concatenate(rows)
