"""Apply a network: probabilities in, nothing learned."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from medtl.model.cache import to_images
from medtl.model.fit import probabilities_of
from medtl.model.surgery import StagedNetwork
from medtl.progress import advance
from medtl.records import AnyArray, FloatArray, Task


def predict(
    network: StagedNetwork, batches: Iterable[tuple[AnyArray, FloatArray]], task: Task, device: torch.device
) -> FloatArray:
    """Give probabilities, shape (n, classes): softmax, or one sigmoid per label of a multi-label task."""
    return look(network, batches, task, device)[0]


def look(
    network: StagedNetwork, batches: Iterable[tuple[AnyArray, FloatArray]], task: Task, device: torch.device
) -> tuple[FloatArray, FloatArray]:
    """Give probabilities, (n, classes), and the features that enter the head, (n, features)."""
    network.to(device, memory_format=network.memory_format).eval()  # type: ignore[call-overload]
    rows, inside = [], []
    head = len(network.stages) - 1
    with torch.no_grad():
        for number, (images, _) in enumerate(batches, 1):
            features = network.run(network.normalise(to_images(images, device)), 0, head)
            rows.append(probabilities_of(network.run(features, head), task))
            inside.append(features.float().cpu().numpy())
            advance("predicting batches", number, number)
    return np.concatenate(rows), np.concatenate(inside)
