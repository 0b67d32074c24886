"""Learn to draw masks: what a segmenter is trained and judged on, phase after phase (:mod:`medtl.model.trainer`).

Patches are drawn while the step before is computed; validation predicts whole scans, so it is done some fifteen times a
phase; the mean Dice chooses; a running mean of the weights may stand in for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from medtl.config import ModelConfig, PhaseConfig
from medtl.errors import ConfigError
from medtl.model import parallel
from medtl.model.cache import autocast
from medtl.model.mask_losses import coarsened, loss_of, sums, weights_of
from medtl.model.phases import Norms, learning_state, rate_factor, train_again
from medtl.model.segmenter import SegmenterNetwork
from medtl.model.surgery import HEAD
from medtl.model.trainer import Judge, Saver, State, Steps, Trainer
from medtl.progress import advance
from medtl.records import Epoch, FloatArray, GridPlan, Phase

CLIP = 12.0  # norm of the gradient (nnU-Net)
_VALIDATIONS = 15  # in a phase
_MEAN = "mean:"  # what the running mean of a tensor is called in unfinished training
Batch = tuple[Tensor, Tensor]
Forward = Callable[[Tensor], "Tensor | list[Tensor]"]
BatchLoss = Callable[[Forward, Tensor, Tensor], Tensor]  # of what a network gives for images, and of their codes


class PatchSource(Protocol):
    """Where patches come from; see :class:`medtl.dataset.patches.Patches`."""

    def __len__(self) -> int: ...

    def step(self, phase: int, epoch: int, step: int, augmented: bool) -> Batch:
        """Give the patches of a step, (b, channels, *patch), and their codes; the same arguments give the same."""
        ...


@dataclass(frozen=True)
class SegmentMaterial:
    """What is learned from and what it is judged on.

    Args:
        validate: predicts the validation part; Dice of each study and structure, NaN where both masks are empty. Every
            process calls it at the same time and gets the whole table, so each may predict its share. ``None``: nobody
            is left to ask, and a phase ends with its last epoch.
        judge: tells in which share of resamples of the validation patients the first of two such tables is better;
            ``None`` with ``validate``.
        loss: of a batch, where it is not of masks.
        watched: what the table of validation holds, if not Dice; more is better, 1 is all.
    """

    patches: PatchSource
    validate: Callable[[SegmenterNetwork], FloatArray] | None
    judge: Judge | None
    loss: BatchLoss | None = None
    watched: str = "dice"


def fit_segmenter(
    network: SegmenterNetwork,
    material: SegmentMaterial,
    plan: GridPlan,
    model: ModelConfig,
    seed: int,
    saver: Saver,
    label: str = "training",
) -> tuple[tuple[Phase, ...], tuple[Epoch, ...]]:
    """Train through all phases; leave the best state in the network, in evaluation mode.

    The validation loss of an epoch is one minus the mean Dice, NaN where the epoch was not validated.

    Raises:
        ModelError: the loss is not finite, or a frozen layer moved.
        ConfigError: BatchNorm would be frozen where nobody ever measured its statistics, or a phase solves its head.
    """
    refuse_phases(network, model)
    return _Run(network, material, plan, model, seed, saver, label).run()


def refuse_phases(network: SegmenterNetwork, model: ModelConfig) -> None:
    """Refuse phases that cannot work for this network.

    Raises:
        ConfigError: a head that is solved, a setting of a diagnosis alone, or frozen BatchNorm without statistics.
    """
    fresh = list(network.stages.values()) if model.origin == "none" else [network.stages[HEAD]]
    unmeasured = any(isinstance(module, Norms) for stage in fresh for module in stage.modules())
    for phase in model.schedule:
        if phase.head != "gradient":
            raise ConfigError(f"Phase '{phase.name}' solves a linear head; a segmentation learns it: head: gradient.")
        if phase.loss != "cross_entropy" or phase.label_smoothing or phase.mixup or phase.views not in ("auto", "live"):
            raise ConfigError(
                f"Phase '{phase.name}': loss, label_smoothing, mixup and views are of a diagnosis. Take them out; the "
                "loss of a segmentation is model.segmenter.loss, and every patch is a new one."
            )
        if unmeasured and phase.batchnorm == "frozen":
            raise ConfigError(
                f"Phase '{phase.name}' freezes BatchNorm in a part that starts without weights, whose statistics "
                "nobody ever measured. Set batchnorm: with_stage in that phase, or model.segmenter.norm: instance."
            )


def mean_dice(dice: FloatArray) -> float | None:
    """Give the mean over structures of the mean over studies, without what is not known; None where nothing is.

    Args:
        dice: (studies, structures), NaN where both masks are empty.
    """
    means = [float(column[np.isfinite(column)].mean()) for column in dice.T if np.isfinite(column).any()]
    return float(np.mean(means)) if means else None


class _Run(Trainer):
    """One training of a segmenter."""

    clip = CLIP
    judged = "dice"
    network: SegmenterNetwork

    def __init__(
        self,
        network: SegmenterNetwork,
        material: SegmentMaterial,
        plan: GridPlan,
        model: ModelConfig,
        seed: int,
        saver: Saver,
        label: str,
    ) -> None:
        super().__init__(network, model, seed, saver, material.judge, material.watched)
        self.material, self.plan, self.label = material, plan, label
        self.mean: State = {}  # running mean of what learns, where it is wanted

    def load(self, state: State) -> None:
        super().load({key: value for key, value in state.items() if not key.startswith(_MEAN)})

    def current(self, phase: PhaseConfig) -> State:
        mean = {f"{_MEAN}{key}": value.detach().cpu().clone() for key, value in self.mean.items()}
        return {**super().current(phase), **mean}

    # -- a phase ---------------------------------------------------------------------------------------------------

    def learn(self, phase: PhaseConfig, boundary: int) -> None:
        current = self.progress.current
        kept = {key.removeprefix(_MEAN): value for key, value in current.items() if key.startswith(_MEAN)}
        wanted = kept or learning_state(self.network, phase)
        self.mean = {k: v.to(self.device, copy=True) for k, v in wanted.items()} if self.config.segmenter.ema else {}
        super().learn(phase, boundary)

    def epoch(self, phase: PhaseConfig, boundary: int, steps: Steps) -> None:
        progress, number = self.progress, len(self.material.patches)
        train_again(self.network, phase, boundary)
        for step, (images, codes) in self._batches(phase):
            done = progress.epoch * number + step
            gradient = partial(self._gradient, boundary, images, codes, step, steps)
            loss = self.step(phase, steps, rate_factor(phase, done, phase.epochs * number), gradient)
            self._average(done)
            progress.losses, progress.count, progress.step = progress.losses + loss, progress.count + 1, step + 1
            self.tell()
            if step + 1 < number:
                self.save_within(phase, steps)

    def _batches(self, phase: PhaseConfig) -> Iterator[tuple[int, Batch]]:
        """Draw the patches of one step while the step before is computed."""
        patches, now, epoch = self.material.patches, self.progress.phase, self.progress.epoch
        with ThreadPoolExecutor(1, "patches") as pool:

            def draw(step: int) -> Future[Batch]:
                return pool.submit(patches.step, now, epoch, step, phase.augment)

            first, steps = self.progress.step, len(patches)
            coming = draw(first) if first < steps else None
            for step in range(first, steps):
                assert coming is not None
                batch = coming.result()
                coming = draw(step + 1) if step + 1 < steps else None
                yield step, batch

    def _gradient(self, boundary: int, images: Tensor, codes: Tensor, step: int, steps: Steps) -> float:
        """Find the gradient of one batch, over all processes; give its loss."""
        key = [self.seed, self.progress.phase, self.progress.epoch, step, *([parallel.rank()] * (parallel.rank() > 0))]
        self.draw_from(int(np.random.SeedSequence(key).generate_state(1)[0]))
        mine = parallel.share_of(np.arange(len(images)))
        if parallel.together():
            images, codes = images[mine], codes[mine]
        images = images.to(self.device, memory_format=self.network.memory_format)
        codes = codes.to(self.device)
        if not len(mine):
            raise ConfigError(f"{parallel.world()} processes cannot share a batch of fewer patches: model.processes.")

        def forward(given: Tensor) -> Tensor | list[Tensor]:
            with autocast(self.device, self.precision):
                found: Tensor | list[Tensor] = self.network(given, boundary)
                return found

        loss = (self.material.loss or self._of_masks)(forward, images, codes)
        steps.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        parallel.add_gradients(self.network)
        return float(loss.detach())

    def _of_masks(self, forward: Forward, images: Tensor, codes: Tensor) -> Tensor:
        found = forward(images)
        outputs = found if isinstance(found, list) else [found]
        kind, overlapping = self.config.segmenter.loss, self.plan.overlapping
        each = [sums(one, coarsened(codes, tuple(one.shape[2:])), overlapping, kind) for one in outputs]
        added = over_processes(torch.stack(each))
        losses = [weight * loss_of(one, kind) for weight, one in zip(weights_of(len(each)), added, strict=True)]
        return torch.stack(losses).sum()

    # -- the running mean of the weights ---------------------------------------------------------------------------

    def _average(self, done: int) -> None:
        """Take the weights of this step into their running mean, which follows fast at first.

        Source: Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017.
        """
        if not self.mean:
            return
        share = 1 - min(self.config.segmenter.ema, (1 + done) / (10 + done))
        own = self.network.state_dict()
        with torch.no_grad():
            for key, mean in self.mean.items():
                if mean.is_floating_point():
                    mean.lerp_(own[key], share)
                else:
                    mean.copy_(own[key])

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the running mean into the network, and what it had back."""
        if not self.mean:
            yield
            return
        own = self.network.state_dict()
        held = {key: own[key].clone() for key in self.mean}
        self.network.load_state_dict({**own, **self.mean})
        yield
        self.network.load_state_dict({**own, **held})

    # -- validation ------------------------------------------------------------------------------------------------

    def judge(self, phase: PhaseConfig, boundary: int) -> bool:
        progress, loss = self.progress, self.progress.losses / max(self.progress.count, 1)
        every, done = self.config.segmenter.validate_every or -(-phase.epochs // _VALIDATIONS), progress.epoch + 1
        watched = self.material.validate is not None
        if done < phase.epochs and (done % every or not watched):
            progress.history.append(Epoch(phase.name, done, loss, math.nan, None))
            return False
        for stage in list(self.network.stages.values())[boundary:]:
            stage.eval()
        with self._averaged():
            dice = parallel.agree(self._validate())
            mean = mean_dice(dice)
            self.offer(phase, (-math.inf if mean is None else mean, -loss), dice)
        progress.history.append(Epoch(phase.name, done, loss, math.nan if mean is None else 1 - mean, None))
        return watched

    def _validate(self) -> FloatArray:
        if self.material.validate is None:
            return np.empty((0, 0))
        with torch.no_grad():
            return np.ascontiguousarray(self.material.validate(self.network), dtype=np.float64)

    def tell(self) -> None:
        """Tell how far it is, in steps of all phases."""
        progress, steps = self.progress, len(self.material.patches)
        planned = [phase.epochs * steps for phase in self.phases]
        done = sum(planned[: progress.phase])
        if progress.phase < len(planned):
            done += progress.epoch * steps + progress.step
        advance(self.label, done, sum(planned))


def over_processes(local: Tensor) -> Tensor:
    """Add sums over all processes; the gradient is of this process's part, as gradients are added up later."""
    if not parallel.together():
        return local
    others = parallel.add(local.detach().clone()) - local.detach()
    return local + others
