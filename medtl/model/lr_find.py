"""Which learning rate a phase can bear: raise it step by step until the loss breaks away.

The test trains a copy of the network as a phase would (its groups and their decay with depth, its loss, its BatchNorm,
its precision, its frozen trunk), on the training part alone. What it suggests is the head's peak rate, ``lr`` of the
phase. A curve that does not fall by more than its own scatter suggests nothing.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from medtl.config import ModelConfig, PhaseConfig
from medtl.errors import ConfigError, ModelError
from medtl.model import cache
from medtl.model.cache import Images, Source, Trunk, autocast, to_images
from medtl.model.devices import device_of, precision_of
from medtl.model.fit import CLIP, Material, refuse_frozen_noise
from medtl.model.losses import class_weights, known_labels, loss_sum, mixture
from medtl.model.phases import frozen_count, set_learning
from medtl.model.surgery import StagedNetwork
from medtl.model.trainer import Steps
from medtl.progress import advance
from medtl.records import FloatArray, IntArray

STEPS = 100
LOWEST, HIGHEST = 1e-6, 3.0
_MEMORY = 0.9  # of the loss that is watched while it runs
_REACH = 0.8  # of the loss that is read afterwards, to both sides
_DIVERGED = 4.0  # times the best
_SAFE = 0.1  # of the rate where the loss is least
_EDGE = 4  # steps at either end that are no evidence of a slope: they are smoothed from one side
_LEAST_FALL = 0.05  # of the loss at the start; less is called flat
_SCATTERS = 4.0  # standard errors that a fall must exceed; noise alone does so in 3 of 1,000 tests
_HELD_MB = 512.0  # of inputs kept in memory, where batches are used again
_LR_FIND = 0x12F1


@dataclass(frozen=True, slots=True)
class RangeTest:
    """What a learning-rate range test saw. Rates are of the head; the stages below take theirs from ``decay``."""

    phase: str
    rates: tuple[float, ...]  # one a step
    losses: tuple[float, ...]  # of each step's batch, before the step
    smoothed: tuple[float, ...]
    configured: float  # the phase's own rate
    steepest: float | None  # where the loss falls fastest; None: no clear minimum
    safe: float | None  # a tenth of the rate where the loss is least; None: no clear minimum
    ended: Literal["diverged", "not finite", "highest rate"]
    batches: int  # different ones; they were used again where there are fewer than steps
    note: str  # what to make of it, in a sentence or two


def find_learning_rate(
    network: StagedNetwork, material: Material, config: ModelConfig, seed: int, phase: str | None = None
) -> RangeTest:
    """Raise the learning rate of one phase from 1e-6 to 3 over 100 steps and read the loss.

    The network is not changed, nor is torch's random state; the same seed gives the same record.

    Args:
        phase: name of the phase; None: the first one that trains part of the trunk by gradient.

    Raises:
        ConfigError: there is no such phase, its head is solved and has no learning rate, or BatchNorm would be frozen
            in a network that never learned its statistics.
        ModelError: the training part has no batch of two images.
    """
    if config.origin == "none":
        refuse_frozen_noise(network, config)
    number = choose_phase(config.schedule, network.stage_names, phase)
    device = device_of(config)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        run = _Sweep(network, material, config, seed, number)
        rates = np.geomspace(LOWEST, HIGHEST, STEPS)
        losses: list[float] = []
        ended: Literal["diverged", "not finite", "highest rate"] = "highest rate"
        for step, rate in enumerate(rates):
            loss = run.step(step, float(rate))
            if not math.isfinite(loss):
                ended = "not finite"
                break
            losses.append(loss)
            advance("learning-rate range test", step + 1, STEPS)
            if _has_diverged(losses):
                ended = "diverged"
                break
    chosen, earlier = config.schedule[number], [one.name for one in config.schedule[:number]]
    seen = tuple(float(rate) for rate in rates[: len(losses)])
    steepest, safe, smoothed, note = read_curve(seen, losses)
    if earlier:
        note += f" The network is as it starts: {', '.join(earlier)} did not run before."
    return RangeTest(
        chosen.name, seen, tuple(losses), smoothed, chosen.lr, steepest, safe, ended, len(run.batches), note
    )


def choose_phase(phases: Sequence[PhaseConfig], stages: Sequence[str], name: str | None) -> int:
    """Give the number of the phase to test: the named one, or the first by gradient that trains part of the trunk.

    Where no phase trains the trunk, the first by gradient is taken.

    Raises:
        ConfigError: no such phase, or it has no learning rate.
    """
    if name is not None:
        found = [number for number, phase in enumerate(phases) if phase.name == name]
        if not found:
            raise ConfigError(f"There is no phase '{name}'; this config has {', '.join(p.name for p in phases)}.")
        if phases[found[0]].head != "gradient":
            raise ConfigError(f"Phase '{name}' solves its head ({phases[found[0]].head}); it has no learning rate.")
        return found[0]
    learning = [number for number, phase in enumerate(phases) if phase.head == "gradient"]
    if not learning:
        raise ConfigError("No phase of this config learns by gradient, so there is no learning rate to find.")
    return next((n for n in learning if frozen_count(phases[n], stages) < len(stages) - 1), learning[0])


def read_curve(
    rates: Sequence[float], losses: Sequence[float]
) -> tuple[float | None, float | None, tuple[float, ...], str]:
    """Read a curve: the rate of steepest descent, a tenth of the rate of the least loss, the smoothed loss, a note.

    Losses are cut off at the mark of divergence (never below where they began), so that the last ones do not bend what
    lies before them.
    """
    if len(losses) < 2 * _EDGE + 2:
        return None, None, tuple(losses), "No clear minimum: the loss broke away at once."
    heights = np.asarray(losses)
    early = max(_EDGE, len(losses) // 10)
    cut = np.minimum(heights, max(_DIVERGED * float(_watched(losses).min()), float(heights[:early].max())))
    smoothed = smooth(cut)
    least = int(smoothed.argmin())
    judged = max(least + 1, 2 * early)
    scatter = float(np.std(cut[:judged] - smoothed[:judged]))
    # both are weighted means of independent batches, and the least is the lowest of many
    error = scatter * math.sqrt(1 / early + _weight_norm() ** 2)
    start = float(cut[:early].mean())
    fall = start - float(smoothed[least])
    kept = tuple(float(value) for value in smoothed)
    if fall < max(_LEAST_FALL * start, _SCATTERS * error):
        return None, None, kept, "No clear minimum: the loss does not fall by more than it scatters."
    slope = np.gradient(smoothed, np.log(np.asarray(rates)))
    inner = slope[_EDGE : max(least, _EDGE + 1)]
    steepest = float(rates[_EDGE + int(inner.argmin())])
    if least >= len(losses) - _EDGE:
        note = "No clear minimum: the loss still falls at the highest rate that was tried."
        return steepest, None, kept, note
    return steepest, _SAFE * float(rates[least]), kept, f"The loss is least at a rate of {rates[least]:.1e}."


def smooth(losses: FloatArray) -> FloatArray:
    """Average exponentially to both sides, each point's weights divided by their sum (no bias, and no lag)."""
    places = np.arange(len(losses))
    weights = _REACH ** np.abs(places[:, None] - places[None, :])
    averaged: FloatArray = weights @ losses / weights.sum(1)
    return averaged


def _weight_norm() -> float:
    """Give the ratio of a smoothed loss's standard error to one batch's, away from the ends."""
    return math.sqrt((1 + _REACH**2) / (1 - _REACH**2)) * (1 - _REACH) / (1 + _REACH)


def _watched(losses: Sequence[float]) -> FloatArray:
    """Average exponentially over the past, corrected for the empty start; what can be known while it runs."""
    mean, found = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = _MEMORY * mean + (1 - _MEMORY) * loss
        found.append(mean / (1 - _MEMORY**step))
    return np.asarray(found)


def _has_diverged(losses: Sequence[float]) -> bool:
    watched = _watched(losses)
    return len(losses) > 1 and bool(watched[-1] > _DIVERGED * watched.min())


class _Sweep:
    """One phase's training on a copy of the network, a step at a time, at any rate."""

    def __init__(self, network: StagedNetwork, material: Material, config: ModelConfig, seed: int, number: int) -> None:
        self.phase, self.task, self.seed, self.number = config.schedule[number], material.task, seed, number
        self.targets, self.accumulate = material.train.targets, config.accumulate
        self.device = device_of(config)
        self.precision = precision_of(config, self.device)
        self.network = copy.deepcopy(network)
        self.network.to(self.device, memory_format=network.memory_format)  # type: ignore[call-overload]
        self.boundary = set_learning(self.network, self.phase)
        origin = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.steps = Steps(self.network, self.phase, origin, self.precision, self.device, CLIP)
        rows = np.sort(np.asarray(material.train.rows))
        self.weights = class_weights(self.targets[rows], self.phase, self.task)
        self.view = cache.views_of(self.phase, number, config.schedule)[0]
        self.batches = [batch for batch in material.train.order(number, 0) if len(batch) >= 2][:STEPS]
        if not self.batches:
            raise ModelError("The training part has no batch of two images; there is nothing to find a rate on.")
        self.source = self._source(Images(rows, material.train.view, lambda _: ""), config)
        self.held: dict[tuple[int, int], Tensor] = {}
        self.held_mb = 0.0

    def step(self, number: int, rate: float) -> float:
        """Do one step at a rate of the head; give the loss before it, not finite where it no longer is."""
        self.steps.begin(rate / self.phase.lr)
        loss = self._gradient(number)
        if math.isfinite(loss):
            self.steps.take()
        return loss

    def _gradient(self, number: int) -> float:
        place = number % len(self.batches)
        rows = self.batches[place]
        key = [self.seed, _LR_FIND, self.number, number]
        rng = np.random.default_rng(key)
        torch.manual_seed(int(rng.integers(2**32)))
        whole, total = max(known_labels(self.targets[rows], self.task), 1), 0.0
        for part, some in enumerate(np.array_split(rows, min(self.accumulate, len(rows)))):
            wanted = torch.from_numpy(np.ascontiguousarray(self.targets[some])).to(self.device, torch.float32)
            x, wanted = self._input((place, part), some, wanted, rng)
            with autocast(self.device, self.precision):
                x = self.network.normalise(x) if self.boundary == 0 else x
                logits = self.network.run(x, self.boundary)
            loss = loss_sum(logits, wanted, self.task, self.phase, self.weights) / whole
            self.steps.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _input(
        self, key: tuple[int, int], rows: IntArray, wanted: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Give the input of the learning part; what is used again is held, as far as memory allows."""
        if self.phase.mixup:
            images = to_images(self.source.images.view(rows, self.view), self.device)
            share, partners = mixture(wanted, self.phase.mixup, rng)
            images = share * images + (1 - share) * images[partners]
            return self.source.live(images), share * wanted + (1 - share) * wanted[partners]
        if key in self.held:
            return self.held[key], wanted
        x = self.source.at(rows, self.view)
        size = x.numel() * x.element_size() / 1e6
        if len(self.batches) < STEPS and self.held_mb + size <= _HELD_MB:
            self.held[key], self.held_mb = x, self.held_mb + size
        return x, wanted

    def _source(self, images: Images, config: ModelConfig) -> Source:
        if self.boundary == 0:
            return Source(images, None, 0, {}, self.device)
        numbers = cache.choose_numbers(config.cache, self.precision)
        trunk = Trunk(self.network, [self.boundary], self.precision, numbers, config.batch_size, self.device)
        return Source(images, trunk, self.boundary, {}, self.device)
