"""The frozen part of a network runs once per image; phases train from what it handed on.

::

    images ─▶ Trunk (frozen, evaluation mode) ─▶ activations at the freeze boundary ─▶ the part that learns
                                                 └── kept on disk, named by everything they depend on

Keeping activations never changes a result. A trunk always computes batches of one size (a smaller one is filled up) and
always hands on the same kind of numbers, so that what is read back has the bits that would have been computed. The
decision to keep them may therefore rest on measured time and on what fits the disk.

One pass stores every boundary that a later phase will want, because with unfreezing from the head down all of these
lie in weights that have not moved yet.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from medtl.config import CacheConfig, PhaseConfig
from medtl.errors import ModelError
from medtl.model.phases import frozen_count, stage_digest, state_digest
from medtl.model.surgery import StagedNetwork
from medtl.progress import advance
from medtl.records import AnyArray, IntArray

Precision = Literal["fp32", "bf16", "fp16"]
CLEAN = -1  # the view of an image as it is
TYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED: Mapping[str, np.dtype[Any]] = {  # numpy has no bfloat16: its 16 bits are kept as they are
    "fp32": np.dtype("<f4"), "bf16": np.dtype("<u2"), "fp16": np.dtype("<f2"),
}  # fmt: skip
_BATCHES_A_CHUNK = 8  # what is lost at most when a pass is interrupted
_READ_MB_S = 500.0  # of activations from the disk; deliberately low


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Compute in a precision inside the block; weights stay as they are."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, TYPES[precision])


def to_images(batch: AnyArray, device: torch.device) -> Tensor:
    """Turn packed pixels (n, ..., channels) into floats of 0 to 1, (n, channels, ...)."""
    # numpy widens and scales in one pass over memory, eight times as fast as torch does it on a CPU
    scaled = np.multiply(batch, np.float32(1.0 / np.iinfo(batch.dtype).max), dtype=np.float32)
    return torch.from_numpy(scaled).to(device).movedim(-1, 1)


class Trunk:
    """The frozen stages of a network as one function of images, without gradients.

    Args:
        network: its stages up to the last boundary are copied where the precision asks for it, else used as they are.
        boundaries: counts of stages after which activations are handed on.
        precision: what it computes in.
        numbers: what it hands on.
        batch_size: it always computes so many images at once.
    """

    def __init__(
        self,
        network: StagedNetwork,
        boundaries: Sequence[int],
        precision: Precision,
        numbers: Precision,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.boundaries = tuple(sorted(set(boundaries)))
        self.precision, self.numbers, self.batch_size, self.device = precision, numbers, batch_size, device
        self._normalise = network.normalise
        self._wide = list(network.stages.values())[: self.boundaries[-1]]

    @cached_property
    def stages(self) -> Sequence[nn.Module]:
        """Give what is computed; copied at its first use, which never comes where all activations are kept."""
        if self.precision == "fp32":
            return self._wide
        return [_narrowed(stage, TYPES[self.precision]) for stage in self._wide]

    def __call__(self, images: Tensor, passed: Callable[[int], None] | None = None) -> dict[int, Tensor]:
        """Give the activations of up to ``batch_size`` images at each boundary, on the device.

        Args:
            images: (n, channels, ...), 0 to 1.
            passed: is told the number of each boundary when it is reached.

        Raises:
            ModelError: an activation is not finite in the numbers that are handed on.
        """
        count, found = len(images), {}
        if count < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - count, *images.shape[1:])])
        with torch.no_grad(), autocast(self.device, self.precision):
            x = self._normalise(images)
            for number, stage in enumerate(self.stages, 1):
                x = stage(x)
                if number in self.boundaries:
                    found[number] = x[:count].to(TYPES[self.numbers])
                    if passed:
                        passed(number)
        if not all(bool(torch.isfinite(x).all()) for x in found.values()):
            raise ModelError(
                f"An activation of the frozen layers is too large for {self.numbers}. Set model.cache.numbers to fp32, "
                "and model.precision too if this stays."
            )
        return found


def _narrowed(stage: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a stage with the weights of convolutions and linear layers in 16 bits; norms keep their 32."""
    narrow = copy.deepcopy(stage)
    for module in narrow.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) or type(module) is nn.Linear:
            module.to(dtype)
    return narrow.eval().requires_grad_(False)


def to_stored(x: Tensor) -> AnyArray:
    """Turn activations into an array for the disk, channels last, 16-bit brain floats as their bits."""
    ordered = x.movedim(1, -1) if x.ndim > 3 else x
    plain = ordered.contiguous().cpu()
    return plain.view(torch.uint16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()


def from_stored(array: AnyArray, numbers: Precision, device: torch.device) -> Tensor:
    """Turn an array from the disk back into activations, as they were handed on."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # a copy only of what is mapped
    tensor = tensor.view(torch.bfloat16) if numbers == "bf16" else tensor
    tensor = tensor.to(device)
    return tensor.movedim(-1, 1) if tensor.ndim > 3 else tensor


class Kept(Protocol):
    """Activations of some images on disk, in chunks; each chunk is whole and checked, or missing."""

    array: AnyArray  # (rows, ...), mapped

    def missing(self) -> list[int]:
        """Give the numbers of the chunks that are not there, or not as they were written."""
        ...

    def write(self, chunk: int, data: AnyArray) -> None:
        """Keep a chunk."""
        ...


class ActivationStore(Protocol):
    """Where activations are kept."""

    def has(self, key: str) -> bool:
        """Tell whether all of it is there."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Tell the shape of what is there."""
        ...

    def room_mb(self) -> float:
        """Tell how many MB may be added: of the budget, and of the disk."""
        ...

    def entry(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk: int) -> Kept:
        """Open or begin activations of this key; the oldest others make room."""
        ...


@dataclass(frozen=True, slots=True)
class Images:
    """Images that can be asked for by row and view.

    Args:
        rows: sorted, of the pack.
        view: gives one view of some rows, (n, ..., channels), uint8 or uint16.
        name: digest of the pixels and of everything that decides a view.
    """

    rows: IntArray
    view: Callable[[IntArray, int], AnyArray]
    name: Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is kept, and why."""

    boundaries: tuple[int, ...]  # kept by the next pass, the deepest first; empty: nothing is kept
    mb: float
    reason: str


def views_of(phase: PhaseConfig, number: int, phases: Sequence[PhaseConfig]) -> list[int]:
    """Give the view that each epoch of a phase shows.

    Kept views are cycled through all phases: the next phase goes on where this one stopped, so that phases which share
    a trunk share its views too.
    """
    if not phase.augment:
        return [CLEAN] * phase.epochs
    before = sum(p.epochs for p in phases[:number])
    if phase.cycled is None:
        return [number * 1_000_000 + epoch for epoch in range(phase.epochs)]
    return [(before + epoch) % phase.cycled for epoch in range(phase.epochs)]


def is_repeated(phase: PhaseConfig) -> bool:
    """Tell whether a phase shows the same views again, so that their activations can be kept."""
    return not phase.mixup and (not phase.augment or phase.cycled is not None)


def sharing(phases: Sequence[PhaseConfig], now: int, stages: Sequence[str]) -> list[int]:
    """Number the phases from ``now`` on whose trunk is part of this phase's trunk and has not moved until then."""
    lowest, found = frozen_count(phases[now], stages), []
    for number in range(now, len(phases)):
        lowest = min(lowest, frozen_count(phases[number], stages))
        if lowest == 0:
            break
        if lowest == frozen_count(phases[number], stages):
            found.append(number)
    return found


def decide(
    phases: Sequence[PhaseConfig],
    now: int,
    stages: Sequence[str],
    counts: tuple[int, int],
    seconds: Mapping[int, float],
    mb: Mapping[int, float],
    room_mb: float,
    use: Literal["auto", "always", "never"],
) -> Decision:
    """Decide which boundaries the next pass keeps: bytes against time.

    Args:
        now: number of the phase that is about to begin.
        counts: images of training and validation.
        seconds: per image, of the trunk up to each boundary.
        mb: per image, at each boundary.
    """
    boundary = frozen_count(phases[now], stages)
    if use == "never" or boundary == 0:
        return Decision((), 0.0, "nothing is frozen" if boundary == 0 else "model.cache.use is never")
    train, val = counts
    kept: dict[int, set[int]] = {}
    saved = needed = 0.0
    shared_views: set[int] = set()
    for number in sharing(phases, now, stages):
        phase, here = phases[number], frozen_count(phases[number], stages)
        shown = views_of(phase, number, phases)
        repeated = set(shown) if is_repeated(phase) else set()
        views = kept.get(here, set()) | repeated
        more = mb[here] * (train * (len(views) - len(kept.get(here, ()))) + (val if here not in kept else 0))
        if needed + more > room_mb:
            if number == now:
                return Decision(
                    (), needed + more, f"{needed + more:,.0f} MB do not fit the {room_mb:,.0f} MB there are"
                )
            break
        needed, kept[here] = needed + more, views
        shared_views |= views
        uses = sum(view in views for view in shown) * train + phase.epochs * val
        saved += uses * (seconds[here] - mb[here] / _READ_MB_S)
    cost = (len(shared_views) * train + val) * seconds[boundary] + needed / _READ_MB_S
    if boundary not in kept or (use == "auto" and saved <= cost):
        return Decision((), needed, f"computing again takes {saved:.0f} s, keeping {cost:.0f} s")
    order = tuple(sorted(kept, reverse=True))
    return Decision(order, needed, f"{needed:,.0f} MB save about {saved - cost:.0f} s")


def fill(
    trunk: Trunk,
    images: Images,
    view: int,
    kept: Mapping[int, Kept],
    share: tuple[int, int],
    label: str,
    first: Mapping[int, Tensor] | None = None,
) -> None:
    """Run the trunk over the images whose activations are missing, and keep them at every boundary.

    Args:
        kept: boundary to activations, all with chunks of :func:`chunk_rows`.
        share: this process's number and how many processes share the work.
        first: what the trunk handed on for the first batch, where that is known already.
    """
    size = chunk_rows(trunk.batch_size)
    missing = sorted({chunk for one in kept.values() for chunk in one.missing()})
    # by the chunk's own number: processes look at different times, and must not divide different lists
    mine = [chunk for chunk in missing if chunk % share[1] == share[0]]
    for done, chunk in enumerate(mine, 1):
        rows = images.rows[chunk * size : (chunk + 1) * size]
        parts: dict[int, list[AnyArray]] = {boundary: [] for boundary in kept}
        for start in range(0, len(rows), trunk.batch_size):
            if chunk == start == 0 and first is not None:
                handed = first
            else:
                batch = images.view(rows[start : start + trunk.batch_size], view)
                handed = trunk(to_images(batch, trunk.device))
            for boundary, found in parts.items():
                found.append(to_stored(handed[boundary]))
        for boundary, found in parts.items():
            kept[boundary].write(chunk, np.concatenate(found))
        advance(label, done, len(mine))


def key_of(prefix: str, trunk: Trunk, images: str, threads: int) -> str:
    """Name activations by everything they depend on.

    Args:
        prefix: :func:`prefix_digest` of the frozen stages.
        images: digest of the pixels and the view.
    """
    said = ["activations-1", prefix, trunk.precision, trunk.numbers, trunk.batch_size, trunk.device.type, threads]
    return sha256(json.dumps([*said, torch.__version__, images]).encode()).hexdigest()[:40]


def prefix_digest(network: StagedNetwork, boundary: int, known: Mapping[str, str] | None = None) -> str:
    """Give the digest of the frozen stages below a boundary: their names, weights, buffers and input scaling.

    Args:
        known: digests of stages by :func:`medtl.model.phases.stage_digest`, so that none is computed twice.
    """
    known = known or {}
    said = {name: known.get(name) or stage_digest(network.stages[name]) for name in network.stage_names[:boundary]}
    scaling = state_digest({"mean": network.mean, "std": network.std})
    return sha256(json.dumps([scaling, said]).encode()).hexdigest()


def chunk_rows(batch_size: int) -> int:
    """Tell how many rows a chunk has: whole batches, so that each image is computed in the same company."""
    return _BATCHES_A_CHUNK * batch_size


@dataclass(frozen=True, slots=True)
class Measured:
    """One pass of a trunk over one batch, at each boundary."""

    seconds: Mapping[int, float]  # per image
    mb: Mapping[int, float]  # per image, as it is kept
    shapes: Mapping[int, tuple[int, ...]]  # of one image, as it is kept
    handed: Mapping[int, Tensor]


def measure(trunk: Trunk, example: Tensor) -> Measured:
    """Measure a trunk in one pass over one batch.

    A process's first pass is slower than those after it: who wants a forecast lets one go before.
    """
    reached: dict[int, float] = {}

    def passed(boundary: int) -> None:
        if trunk.device.type == "cuda":
            torch.cuda.synchronize()
        reached[boundary] = time.perf_counter()

    started = time.perf_counter()
    handed = trunk(example, passed)
    shapes = {boundary: tuple(to_stored(x).shape[1:]) for boundary, x in handed.items()}
    seconds = {boundary: (end - started) / trunk.batch_size for boundary, end in reached.items()}
    item = STORED[trunk.numbers].itemsize
    return Measured(seconds, {b: float(np.prod(s)) * item / 1e6 for b, s in shapes.items()}, shapes, handed)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the part that learns gets its input from: kept activations, a live trunk, or the images themselves."""

    images: Images
    trunk: Trunk | None
    boundary: int
    kept: Mapping[int, Kept]  # by view
    device: torch.device

    def at(self, rows: IntArray, view: int) -> Tensor:
        """Give the input of the learning part for some rows in one view."""
        if view in self.kept and self.trunk is not None:
            places = np.searchsorted(self.images.rows, rows)
            return self._wide(from_stored(self.kept[view].array[places], self.trunk.numbers, self.device))
        return self.live(to_images(self.images.view(rows, view), self.device))

    def live(self, images: Tensor) -> Tensor:
        """Give the input of the learning part for images, computed now."""
        return images if self.trunk is None else self._wide(self.trunk(images)[self.boundary])

    def _wide(self, x: Tensor) -> Tensor:
        return x if self.trunk is None or self.trunk.numbers == self.trunk.precision else x.float()


def choose_numbers(config: CacheConfig, precision: Precision) -> Precision:
    """Give the kind of numbers that a frozen trunk hands on."""
    if config.numbers != "auto":
        return config.numbers
    return "bf16" if precision == "bf16" else "fp16"


def batches_of(rows: IntArray, size: int) -> Iterable[IntArray]:
    """Cut rows into batches, in their order."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
