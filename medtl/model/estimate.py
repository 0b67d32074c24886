"""How long a training will take and how much memory, told before it begins.

One warm batch of every freeze boundary is timed on a copy of the network: the frozen trunk apart from the part that
learns, since what the trunk hands on may be kept (:func:`medtl.model.cache.decide` says so here as in training).
Memory is counted, not watched, so that it is the same on every device: weights, gradients, the optimiser's state, what
autograd saves for the backward pass, and the largest activations that come and go.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medtl.config import ModelConfig, PhaseConfig
from medtl.model import cache
from medtl.model.cache import CLEAN, Trunk, autocast, from_stored, to_images, to_stored
from medtl.model.devices import device_of, precision_of
from medtl.model.fit import Material
from medtl.model.heads import NEIGHBOURS, STRENGTHS
from medtl.model.losses import class_weights, known_labels, loss_sum
from medtl.model.phases import frozen_count, make_optimiser, set_learning
from medtl.model.surgery import StagedNetwork
from medtl.records import IntArray

_LONG_S = 5.0  # a batch that takes longer than this is not measured again after its warm-up
_STATES = {"adamw": 2, "sgd": 1}  # numbers that an optimiser keeps for each parameter
_ITERATIONS = 150  # of a solver on standardised features, as seen
_SVM_FITS = 7  # five folds, the whole, and the regression on its values
_SOLVER_COPIES = 4  # of the features in 64 bits: as they are, scaled, and in the solver
_PASSING = 2  # of the largest activation: one comes while one goes


@dataclass(frozen=True, slots=True)
class PhaseForecast:
    """What a phase will take."""

    name: str
    epochs: int
    seconds: float  # all of it, with the pass of the frozen layers
    preparation_s: float  # of the seconds: the pass that keeps activations, and solving a head
    epoch_s: float  # one epoch, with its validation
    peak_mb: float  # on the device (on a CPU: beside Python and the libraries)
    trainable_parameters: int
    boundary: int  # stages that are frozen
    kept: bool  # the frozen stages' activations are kept


@dataclass(frozen=True, slots=True)
class _Costs:
    """What was measured: seconds a batch of the configured size."""

    load: Mapping[bool, float]  # of images, augmented or not
    trunk: Mapping[int, float]  # up to each boundary
    read: Mapping[int, float]  # of kept activations
    mb: Mapping[int, float]  # an image, at each boundary
    passing_mb: float  # the largest that the trunk holds at one time


@dataclass(frozen=True, slots=True)
class _Learning:
    """What one step of the part that learns takes."""

    step_s: float
    judge_s: float  # the same batch without gradients
    saved_mb: float
    trainable: int


def forecast(
    network: StagedNetwork, material: Material, config: ModelConfig, room_mb: float | None = None
) -> tuple[PhaseForecast, ...]:
    """Forecast seconds and memory of every phase from one warm batch each.

    Neither the network nor torch's random state is changed. Early stopping, and activations that an earlier run kept,
    make training shorter than is said here.

    Args:
        room_mb: what activations may take on the disk; None: they are not kept.
    """
    device, precision = device_of(config), precision_of(config, device_of(config))
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        bench = _Bench(network, material, config, device, precision, room_mb is not None)
        costs = bench.costs()
        kept = _kept(config, network.stage_names, bench, costs, room_mb)
        return tuple(bench.phase(number, costs, kept[number]) for number in range(len(config.schedule)))


def describe(forecasts: Sequence[PhaseForecast]) -> str:
    """Write forecasts for the log, a line a phase and one for all."""
    lines = [
        f"phase {one.name}: {one.epochs} {'epoch' if one.epochs == 1 else 'epochs'}, about {_duration(one.seconds)}, "
        f"{one.peak_mb / 1000:.1f} GB, {one.trainable_parameters:,} parameters learn"
        + (", frozen layers run once" if one.kept else "")
        for one in forecasts
    ]
    total, peak = sum(one.seconds for one in forecasts), max(one.peak_mb for one in forecasts)
    return "\n".join([*lines, f"all phases: about {_duration(total)}, {peak / 1000:.1f} GB at most"])


def work_units(forecasts: Sequence[PhaseForecast], phases: Sequence[PhaseConfig]) -> list[float]:
    """Give the seconds that an epoch of each phase stands for, its share of the phase's preparation included.

    Progress that is counted in these, not in epochs, moves evenly, and what is left of it is a time.

    Raises:
        ValueError: the forecasts are of other phases.
    """
    if [one.name for one in forecasts] != [phase.name for phase in phases]:
        raise ValueError("work_units: the forecasts are of other phases")
    return [one.seconds / phase.epochs for one, phase in zip(forecasts, phases, strict=True)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _kept(
    config: ModelConfig, stages: Sequence[str], bench: _Bench, costs: _Costs, room_mb: float | None
) -> list[tuple[tuple[int, ...], bool]]:
    """Decide for each phase what its pass keeps, and whether it reads what is kept: as training will."""
    phases, size, room = config.schedule, config.batch_size, room_mb or 0.0
    by: dict[int, tuple[int, ...]] = {}
    found: list[tuple[tuple[int, ...], bool]] = []
    seconds = {boundary: spent / size for boundary, spent in costs.trunk.items()}
    for now, phase in enumerate(phases):
        boundary = frozen_count(phase, stages)
        there = any(boundary in kept and now in cache.sharing(phases, before, stages) for before, kept in by.items())
        if room_mb is None or boundary == 0 or there:
            found.append(((), there))
            continue
        decision = cache.decide(phases, now, stages, bench.counts, seconds, costs.mb, room, config.cache.use)
        if decision.boundaries:
            by[now] = decision.boundaries
            room -= decision.mb
        found.append((decision.boundaries, bool(decision.boundaries)))
    return found


class _Bench:
    """A copy of the network, one batch, and a clock."""

    def __init__(
        self,
        network: StagedNetwork,
        material: Material,
        config: ModelConfig,
        device: torch.device,
        precision: cache.Precision,
        keeps: bool,
    ) -> None:
        self.material, self.config, self.device, self.precision = material, config, device, precision
        self.keeps = keeps  # there is a place for activations
        self.phases, self.size, self.task = config.schedule, config.batch_size, material.task
        self.network = copy.deepcopy(network)
        self.network.to(device, memory_format=network.memory_format)  # type: ignore[call-overload]
        self.stages = network.stage_names
        self.rows = np.sort(np.asarray(material.train.rows))
        self.counts = (len(self.rows), len(material.val.rows))
        self.batch = self.rows[: self.size]
        self.classes = material.train.targets.shape[1]
        self.images = to_images(material.train.view(self.batch, CLEAN), device)
        self.measured: dict[tuple[object, ...], _Learning] = {}

    # -- what is measured ------------------------------------------------------------------------------------------

    def costs(self) -> _Costs:
        """Time loading, the trunk up to every boundary, and reading what it handed on."""
        load = {augmented: self._load(0 if augmented else CLEAN) for augmented in (False, True)}
        boundaries = sorted({b for p in self.phases if (b := frozen_count(p, self.stages))})
        if not boundaries:
            return _Costs(load, {}, {}, {}, 0.0)
        self.network.eval().requires_grad_(False)
        numbers = cache.choose_numbers(self.config.cache, self.precision)
        trunk = Trunk(self.network, boundaries, self.precision, numbers, self.size, self.device)
        passing = _largest_passing_mb(trunk, self.images)
        measured = cache.measure(trunk, self.images)
        handed = {boundary: to_stored(x) for boundary, x in measured.handed.items()}
        places = np.arange(len(self.batch))
        read = {b: self._timed(lambda x=x: from_stored(x[places], numbers, self.device)) for b, x in handed.items()}  # type: ignore[misc]
        return _Costs(load, {b: s * self.size for b, s in measured.seconds.items()}, read, measured.mb, passing)

    def learning(self, phase: PhaseConfig) -> _Learning:
        """Time one step of the part that learns, and count what it holds in memory."""
        boundary = frozen_count(phase, self.stages)
        key = (boundary, phase.batchnorm, phase.optimiser, phase.head == "gradient")
        if key not in self.measured:
            set_learning(self.network, phase)
            self.measured[key] = self._learning(phase, boundary)
        return self.measured[key]

    def _learning(self, phase: PhaseConfig, boundary: int) -> _Learning:
        some = self.batch[: max(1, math.ceil(len(self.batch) / self.config.accumulate))]
        x, parts = self._into(boundary)[: len(some)], math.ceil(len(self.batch) / len(some))
        trainable = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        judge_s = self._timed(lambda: self._judge(x, boundary)) * parts
        if phase.head != "gradient":
            return _Learning(0.0, judge_s, 0.0, trainable)
        set_learning(self.network, phase)
        optimiser = make_optimiser(self.network, phase)
        for group in optimiser.param_groups:
            group["lr"] = 0.0  # the same work, and weights that stay where they are
        saved: dict[int, int] = {}
        warm_s = self._clock(lambda: self._step(phase, x, some, boundary, optimiser, parts, saved))
        if warm_s < _LONG_S:
            warm_s = self._clock(lambda: self._step(phase, x, some, boundary, optimiser, parts, None))
        optimiser.zero_grad(set_to_none=True)
        largest = max(saved.values(), default=0)
        return _Learning(warm_s, judge_s, (sum(saved.values()) + _PASSING * largest) / 1e6, trainable)

    def _step(
        self,
        phase: PhaseConfig,
        x: Tensor,
        rows: IntArray,
        boundary: int,
        optimiser: torch.optim.Optimizer,
        parts: int,
        saved: dict[int, int] | None,
    ) -> None:
        """Do what training does with one batch; note the bytes that autograd saves by the storage they lie in."""
        targets = self.material.train.targets
        weights = class_weights(targets[self.rows], phase, self.task)
        wanted = torch.from_numpy(np.ascontiguousarray(targets[rows])).to(self.device, torch.float32)
        known = {p.untyped_storage().data_ptr() for p in self.network.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if saved is not None and storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        optimiser.zero_grad(set_to_none=True)
        for part in range(parts):
            if part and saved is not None:
                break  # one part of a batch is in memory at a time
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                with autocast(self.device, self.precision):
                    shown = self.network.normalise(x) if boundary == 0 else x
                    logits = self.network.run(shown, boundary)
                loss = loss_sum(logits, wanted, self.task, phase, weights)
            (loss / max(known_labels(targets[rows], self.task), 1)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()

    def _judge(self, x: Tensor, boundary: int) -> None:
        self.network.eval()
        with torch.no_grad(), autocast(self.device, self.precision):
            self.network.run(self.network.normalise(x) if boundary == 0 else x, boundary)

    def _into(self, boundary: int) -> Tensor:
        """Give the batch as the part that learns takes it."""
        if boundary == 0:
            return self.images
        with torch.no_grad(), autocast(self.device, self.precision):
            x = self.network.run(self.network.normalise(self.images), 0, boundary)
        return x if self.precision != "fp32" else x.float()

    def _load(self, view: int) -> float:
        return self._timed(lambda: to_images(self.material.train.view(self.batch, view), self.device))

    def _timed(self, work: Callable[[], object]) -> float:
        """Time some work that has been done once before."""
        spent = self._clock(work)
        return spent if spent >= _LONG_S else self._clock(work)

    def _clock(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - started

    # -- what follows from it --------------------------------------------------------------------------------------

    def phase(self, number: int, costs: _Costs, kept: tuple[tuple[int, ...], bool]) -> PhaseForecast:
        """Add up one phase."""
        phase, boundary = self.phases[number], frozen_count(self.phases[number], self.stages)
        learning, (filled, reads) = self.learning(phase), kept
        batches = [math.ceil(count / self.size) for count in self.counts]
        full = self.counts[0] / len(self.batch)  # batches of the size that was measured
        load = costs.load[phase.augment]
        live = [load * batches[0], costs.load[False] * batches[1]]
        if boundary:
            # a trunk fills every part of a batch up to the whole size, see cache.Trunk
            live = [live[0] + costs.trunk[boundary] * batches[0] * self.config.accumulate,
                    live[1] + costs.trunk[boundary] * batches[1]]  # fmt: skip
        stored = [costs.read.get(boundary, 0.0) * count for count in batches]
        train_s = stored[0] if reads and cache.is_repeated(phase) else live[0]
        val_s = (stored if reads else live)[1] + learning.judge_s * self.counts[1] / len(self.batch)
        preparation = self._measuring_s(number, costs) + self._pass_s(number, costs, filled)
        if phase.head == "gradient":
            epoch_s = train_s + learning.step_s * full + val_s
        else:
            views = len(range(phase.cycled or 1)) if phase.augment else 1
            tries = len(NEIGHBOURS if phase.head == "knn" else STRENGTHS)
            preparation += self._solve_s(phase, views) + tries * val_s
            epoch_s = train_s * views + val_s
        seconds = preparation + phase.epochs * epoch_s
        peak = self._peak_mb(phase, boundary, learning, costs)
        return PhaseForecast(
            phase.name, phase.epochs, seconds, preparation, epoch_s, peak, learning.trainable, boundary, reads
        )

    def _measuring_s(self, number: int, costs: _Costs) -> float:
        """Add up the batches on which training itself measures a trunk before it decides what to keep."""
        if not self.keeps:
            return 0.0
        wanted = {frozen_count(self.phases[n], self.stages) for n in cache.sharing(self.phases, number, self.stages)}
        return sum(costs.trunk[boundary] for boundary in wanted) + max((costs.trunk[b] for b in wanted), default=0.0)

    def _pass_s(self, number: int, costs: _Costs, filled: tuple[int, ...]) -> float:
        """Add up the pass that keeps activations at some boundaries for this phase and later ones."""
        if not filled:
            return 0.0
        views = set()
        for later in cache.sharing(self.phases, number, self.stages):
            phase = self.phases[later]
            if frozen_count(phase, self.stages) in filled and cache.is_repeated(phase):
                views |= set(cache.views_of(phase, later, self.phases))
        train, val = (math.ceil(count / self.size) for count in self.counts)
        load = sum(costs.load[view != CLEAN] for view in views) * train + costs.load[False] * val
        writing = sum(costs.read[boundary] for boundary in filled)  # a copy, as reading is
        return load + (costs.trunk[max(filled)] + writing) * (len(views) * train + val)

    def _solve_s(self, phase: PhaseConfig, views: int) -> float:
        """Estimate a solver's time from one product of features and weights, two of which make an iteration."""
        if phase.head == "knn":
            return 0.0  # the neighbours are looked up when they judge
        head = next(m for m in self.network.stages[self.stages[-1]].modules() if isinstance(m, nn.Linear))
        features = np.ones((len(self.rows) * views, head.in_features))
        weights = np.ones((head.in_features, self.classes))
        product = self._timed(lambda: features @ weights)
        return len(STRENGTHS) * (_SVM_FITS if phase.head == "linear_svm" else 1) * 2 * _ITERATIONS * product

    def _peak_mb(self, phase: PhaseConfig, boundary: int, learning: _Learning, costs: _Costs) -> float:
        weights = [*self.network.parameters(), *self.network.buffers()]
        held = sum(t.numel() * t.element_size() for t in weights) / 1e6
        moving = 4 * learning.trainable / 1e6
        frozen = sum(p.numel() for name in self.stages[:boundary] for p in self.network.stages[name].parameters())
        total = held + (0.0 if self.precision == "fp32" else 2 * frozen / 1e6)  # the trunk's copy in 16 bits
        images = self.images.numel() * self.images.element_size() / 1e6
        if self.device.type == "cpu":
            total += held + 3 * moving  # the start, the best of this phase and before, and what is saved
        if phase.head != "gradient":
            features = self.counts[0] * costs.mb[boundary] * 8 / cache.STORED[self._numbers()].itemsize
            return total + images + costs.passing_mb + _SOLVER_COPIES * features
        total += moving * (1 + _STATES[phase.optimiser])
        return total + images + max(learning.saved_mb, costs.passing_mb if boundary else 0.0)

    def _numbers(self) -> cache.Precision:
        return cache.choose_numbers(self.config.cache, self.precision)


def _largest_passing_mb(trunk: Trunk, images: Tensor) -> float:
    """Run the trunk once and give the most that one of its layers takes in and hands on together."""
    most = 0

    def watch(_: nn.Module, taken: tuple[object, ...], handed: object) -> None:
        nonlocal most
        tensors = [t for t in (*taken, handed) if isinstance(t, Tensor)]
        most = max(most, sum(t.numel() * t.element_size() for t in tensors))

    leaves = [module for stage in trunk.stages for module in stage.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(watch) for leaf in leaves]
    try:
        trunk(images)
    finally:
        for hook in hooks:
            hook.remove()
    return most / 1e6
