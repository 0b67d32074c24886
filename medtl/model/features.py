"""What a frozen trunk makes of images, computed once and kept; and how far that is from what the trunk was trained on.

And what tells a picture from others: :func:`describe`, for near duplicates.

Folds, heads and later calls read the same features back. Two hints come with them, neither of which says how a model
will do: the distance between source and target, and LogME. Scores of this kind order networks unreliably on medical
images (Chaves et al., arXiv 2308.07444), so that what is recommended rests on what was measured, not on them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medtl.artifacts import digest_of
from medtl.model import cache
from medtl.model.cache import CLEAN, ActivationStore, Images, Precision, Trunk
from medtl.model.surgery import HEAD, StagedNetwork
from medtl.records import AnyArray, FloatArray, IntArray

_MOST_ROUNDS = 100  # of LogME's fixed point; it settles in about ten
_SETTLED = 1e-8  # relative change
_DESCRIBED = 32  # pictures at once
_NO_NOISE = 1e-12  # of the targets' square: what counts as a perfect fit


def features_of(
    network: StagedNetwork,
    pixels: AnyArray,
    rows: IntArray,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    store: ActivationStore,
    name: str,
) -> FloatArray:
    """Give the features that enter the head, (n, features) float32, of images as they are.

    They are kept in the store, if it has room, and read back the next time. The network is moved to the device and
    stays in evaluation mode.

    Args:
        pixels: the pack, (N, rows, columns, channels), uint8 or uint16.
        rows: of the pack, sorted.
        batch_size: images computed at once; bits depend on it.
        name: digest of the pack.
    """
    trunk = _trunk(network, batch_size, device, precision)
    (boundary,) = trunk.boundaries
    images = Images(rows, lambda chosen, _: pixels[chosen], lambda _: name)
    width = trunk(cache.to_images(pixels[rows[:1]], device))[boundary].shape[1]
    shape, dtype = (len(rows), width), cache.STORED[trunk.numbers]
    prefix = cache.prefix_digest(network, boundary)
    key = cache.key_of(prefix, trunk, digest_of([name, rows.tolist()]), torch.get_num_threads())
    if float(np.prod(shape)) * dtype.itemsize / 1e6 > store.room_mb():
        return np.concatenate(
            [
                trunk(cache.to_images(pixels[batch], device))[boundary].cpu().numpy()
                for batch in cache.batches_of(rows, batch_size)
            ]
        )
    kept = store.entry(key, shape, dtype, cache.chunk_rows(batch_size))
    cache.fill(trunk, images, CLEAN, {boundary: kept}, (0, 1), "features")
    return np.array(kept.array)


def describe(network: StagedNetwork, pictures: AnyArray, device: torch.device) -> FloatArray:
    """Describe pictures by what a trunk makes of them: two levels, each averaged over space, of length one, (n, d).

    The levels are what the last stage hands on, and the last before it that still has places or tokens to average over.
    The network is moved to the device and stays in evaluation mode. Thirty-two pictures are computed at once.

    Args:
        pictures: (n, rows, columns, channels), uint8, of a size that the network takes.
    """
    network.to(device, memory_format=network.memory_format).eval()  # type: ignore[call-overload]
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), _DESCRIBED):
            x = network.normalise(cache.to_images(pictures[start : start + _DESCRIBED], device))
            levels = [x, x]
            for number in range(len(network.stages) - 1):
                x = network.run(x, number, number + 1)
                levels = [levels[1] if levels[1].ndim > 2 else levels[0], x]
            found.append(torch.cat([nn.functional.normalize(_over_space(level), dim=1) for level in levels], 1))
    made: FloatArray = torch.cat(found).float().cpu().numpy()
    return made


def _over_space(x: Tensor) -> Tensor:
    """Average over tokens, (n, tokens, c), or over the two sides that are equal: channels may come first or last."""
    if x.ndim == 2:
        return x
    if x.ndim == 3:
        return x.mean(1)
    return x.mean((2, 3) if x.shape[2] == x.shape[3] else (1, 2))


def seconds_per_image(
    network: StagedNetwork, example: AnyArray, batch_size: int, device: torch.device, precision: Precision
) -> float:
    """Measure how long the frozen trunk takes for one image, on one batch, after a first one that warms up.

    Args:
        example: (n, rows, columns, channels); no more than ``batch_size`` are used.
    """
    trunk = _trunk(network, batch_size, device, precision)
    images = cache.to_images(example[:batch_size], device)
    trunk(images)
    started = time.perf_counter()
    for handed in trunk(images).values():
        handed.cpu()  # waits for an accelerator to finish
    return (time.perf_counter() - started) / batch_size  # a smaller batch is filled up


def _trunk(network: StagedNetwork, batch_size: int, device: torch.device, precision: Precision) -> Trunk:
    network.to(device, memory_format=network.memory_format).eval()  # type: ignore[call-overload]
    return Trunk(network, [len(network.stages) - 1], precision, "fp32", batch_size, device)


@dataclass(frozen=True, slots=True)
class SourceDistance:
    """How far the target's activations are from the source's, at the last BatchNorm of the trunk."""

    frechet: float  # squared, in the network's own units: not comparable between backbones
    per_channel: float  # the same per channel, in standard deviations of the source: comparable
    channels: int
    images: int  # of the target that were looked at


def source_distance(
    network: StagedNetwork, pixels: AnyArray, rows: IntArray, batch_size: int, device: torch.device
) -> SourceDistance | None:
    """Measure the distance between what the network was trained on and these images; None without BatchNorm.

    The images of the source need not be at hand: BatchNorm's running mean and variance are their statistics. Both sides
    are taken as Gaussians without correlations between channels, because that is all BatchNorm keeps.

    Args:
        pixels: the pack, (N, rows, columns, channels).
        rows: of the pack.

    Source: Dowson and Landau, Journal of Multivariate Analysis 12 (1982), for the Fréchet distance of two Gaussians.
    """
    network.to(device, memory_format=network.memory_format).eval()  # type: ignore[call-overload]
    layer = _last_batchnorm(network, cache.to_images(pixels[rows[:1]], device))
    if layer is None or layer.running_mean is None or layer.running_var is None:
        return None
    sums: list[tuple[int, FloatArray, FloatArray]] = []

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        values = given[0].detach().double().movedim(1, -1).flatten(0, -2)
        mean = values.mean(0)
        sums.append((len(values), mean.cpu().numpy(), ((values - mean) ** 2).sum(0).cpu().numpy()))

    handle = layer.register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            for batch in cache.batches_of(rows, batch_size):
                network.run(network.normalise(cache.to_images(pixels[batch], device)), 0, len(network.stages) - 1)
    finally:
        handle.remove()
    mean, variance = _pooled(sums)
    source_mean = layer.running_mean.double().cpu().numpy()
    source_variance = layer.running_var.double().cpu().numpy()
    apart = gaussian_distances(source_mean, source_variance, mean, variance)
    return SourceDistance(
        float(apart.sum()), float((apart / (source_variance + layer.eps)).mean()), len(apart), len(rows)
    )


def gaussian_distances(
    mean: FloatArray, variance: FloatArray, other_mean: FloatArray, other_variance: FloatArray
) -> FloatArray:
    """Give each channel's part of the squared Fréchet distance between two diagonal Gaussians; all are (channels,)."""
    apart: FloatArray = (mean - other_mean) ** 2 + (np.sqrt(variance) - np.sqrt(other_variance)) ** 2
    return apart


def _last_batchnorm(network: StagedNetwork, image: Tensor) -> nn.BatchNorm2d | nn.BatchNorm3d | None:
    """Find the BatchNorm of the trunk that an image passes last."""
    passed: list[nn.BatchNorm2d | nn.BatchNorm3d] = []
    kinds = (nn.BatchNorm2d, nn.BatchNorm3d)
    trunk = [stage for name, stage in network.stages.items() if name != HEAD]
    layers = [module for stage in trunk for module in stage.modules() if isinstance(module, kinds)]
    handles = [layer.register_forward_pre_hook(lambda module, _: passed.append(module)) for layer in layers]
    try:
        with torch.no_grad():
            network.run(network.normalise(image), 0, len(network.stages) - 1)
    finally:
        for handle in handles:
            handle.remove()
    return passed[-1] if passed else None


def _pooled(sums: list[tuple[int, FloatArray, FloatArray]]) -> tuple[FloatArray, FloatArray]:
    """Join counts, means and sums of squares around them into one mean and variance, without cancellation."""
    counts = np.array([count for count, _, _ in sums], dtype=np.float64)[:, None]
    means = np.array([mean for _, mean, _ in sums])
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    squares = np.array([square for _, _, square in sums]).sum(0) + (counts * (means - mean) ** 2).sum(0)
    return mean, squares / total


def logme(features: FloatArray, targets: FloatArray) -> float | None:
    """Give LogME: the log evidence per study of a linear model of the targets, its two precisions at their best.

    The mean over classes; higher hints at a better fit. None where no class has two kinds of studies.

    Args:
        features: (n, features).
        targets: (n, classes) of 0 and 1, NaN where unknown.

    Source: You et al., LogME: Practical Assessment of Pre-trained Models for Transfer Learning, ICML 2021.
    """
    found: list[float] = []
    spectrum: tuple[FloatArray, FloatArray] | None = None
    for column in targets.T:
        known = np.isfinite(column)
        if len(np.unique(column[known])) < 2:
            continue
        if spectrum is None or not known.all():
            left, singular, _ = np.linalg.svd(features[known].astype(np.float64), full_matrices=False)
            spectrum = left, singular**2
        found.append(_evidence(*spectrum, features.shape[1], column[known]))
        if not known.all():
            spectrum = None
    return float(np.mean(found)) if found else None


def _evidence(left: FloatArray, power: FloatArray, width: int, y: FloatArray) -> float:
    """Maximise the evidence over the precision of the weights (alpha) and of the noise (beta) by its fixed point."""
    n, square = len(y), float(y @ y)
    seen = (left.T @ y) ** 2
    unseen = max(0.0, square - float(seen.sum()))
    alpha = beta = 1.0
    for _ in range(_MOST_ROUNDS):
        ratio = alpha / beta
        effective = float((power / (power + ratio)).sum())
        weights = max(float((power * seen / (power + ratio) ** 2).sum()), _NO_NOISE)
        noise = max(float((seen * (ratio / (power + ratio)) ** 2).sum()) + unseen, _NO_NOISE * square)
        alpha, beta = effective / weights, max(n - effective, _NO_NOISE) / noise
        if abs(alpha / beta - ratio) <= _SETTLED * ratio:
            break
    ratio = alpha / beta
    weights = float((power * seen / (power + ratio) ** 2).sum())
    noise = float((seen * (ratio / (power + ratio)) ** 2).sum()) + unseen
    spread = float(np.log(alpha + beta * power).sum()) + (width - len(power)) * np.log(alpha)
    logs = width * np.log(alpha) + n * np.log(beta) - spread - n * np.log(2 * np.pi)
    return float(0.5 * (logs - beta * noise - alpha * weights)) / n
