"""What every training does, whatever is learned: so that stopping and starting again changes nothing.

All randomness of a step is drawn from (seed, phase, epoch, step); the whole state is saved every few seconds; a run
that was killed goes on from there and ends with the same bits (on the same CPU and threads). Each phase starts from the
best state so far, and its own best state replaces that only if it is better on validation by more than chance. What a
phase freezes is proved not to have moved (:mod:`medtl.model.phases`).

What is learned from, and how it is judged, is said by :mod:`medtl.model.fit` and :mod:`medtl.model.segment_fit`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medtl.config import ModelConfig, PhaseConfig
from medtl.errors import ModelError
from medtl.model import parallel
from medtl.model.devices import device_of, precision_of
from medtl.model.phases import (
    frozen_digest,
    frozen_digests,
    learning_rates,
    learning_state,
    make_optimiser,
    restore_optimiser,
    set_learning,
    unfrozen_stages,
)
from medtl.model.surgery import HEAD, StagedNetwork
from medtl.records import Epoch, FloatArray, Phase

State = dict[str, Tensor]
Judge = Callable[[FloatArray, FloatArray], float]  # what two models gave on validation -> share of resamples


class Saver(Protocol):
    """Where unfinished training is kept."""

    def load(self) -> Progress | None:
        """Give what was saved last, if anything."""
        ...

    def save(self, progress: Progress) -> None:
        """Keep it, in one step."""
        ...


@dataclass
class Progress:
    """Everything needed to go on: which phase, epoch and step come next, the states, the optimiser and the history.

    ``current`` and ``phase_best`` hold what the phase may move; the rest is in ``best``, or in the network as it was
    built where no phase is finished yet.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    current: State = field(default_factory=dict)
    best: State = field(default_factory=dict)  # over all finished phases
    best_val: State = field(default_factory=dict)  # what it gave on validation
    phase_best: State = field(default_factory=dict)
    phase_val: State = field(default_factory=dict)
    optimiser: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    phase_score: tuple[float, float] | None = None
    phase_best_epoch: int = 0
    phase_digest: str = ""
    losses: float = 0.0  # of the epoch so far
    count: int = 0
    phases: list[Phase] = field(default_factory=list)
    history: list[Epoch] = field(default_factory=list)


class Steps:
    """What turns gradients into steps: the optimiser, fp16's scaler, and where L2-SP pulls to.

    Args:
        origin: the state that training started from.
        clip: norm of the gradient.
    """

    def __init__(
        self,
        network: StagedNetwork,
        phase: PhaseConfig,
        origin: State,
        precision: str,
        device: torch.device,
        clip: float,
    ) -> None:
        self.optimiser = make_optimiser(network, phase)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.clip, self.strength = clip, phase.l2_sp
        self.pull = _pull(network, origin, device) if phase.l2_sp else []

    def resume(self, progress: Progress) -> None:
        """Go on where an interrupted phase was saved."""
        if progress.optimiser is not None:
            restore_optimiser(self.optimiser, progress.optimiser)
            self.scaler.load_state_dict(progress.scaler or {})

    def keep(self, progress: Progress) -> None:
        """Put into the progress what :meth:`resume` needs."""
        progress.optimiser, progress.scaler = self.optimiser.state_dict(), self.scaler.state_dict()

    def begin(self, factor: float) -> None:
        """Set the rates, as a share of each group's peak, and forget the last gradient."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimiser.zero_grad(set_to_none=True)

    def take(self) -> None:
        """Take the step that the gradient asks for."""
        self.scaler.unscale_(self.optimiser)
        with torch.no_grad():
            for parameter, origin in self.pull:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - origin, alpha=self.strength)
        nn.utils.clip_grad_norm_([p for g in self.optimiser.param_groups for p in g["params"]], self.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()


def _pull(network: StagedNetwork, origin: State, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Pair each learning parameter below the head with the value it started from.

    Source: Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning (L2-SP), ICML 2018.
    """
    return [
        (parameter, origin[name].to(device))
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and not name.startswith(f"stages.{HEAD}.")
    ]


class Trainer(ABC):
    """One training, from the first phase to the last.

    Args:
        compare: tells in which share of resamples of the validation patients the first of two models is better, from
            what they gave there; the judge of the negative-transfer guard. ``None``: every phase is kept.
        monitor: which figure of validation chooses the best epoch.
    """

    clip: float  # norm of the gradient
    judged: str  # what of a phase's best epoch is kept for ``compare``: a key of ``Progress.phase_val``

    def __init__(
        self,
        network: StagedNetwork,
        config: ModelConfig,
        seed: int,
        saver: Saver,
        compare: Judge | None,
        monitor: str,
    ) -> None:
        self.network, self.config, self.seed, self.saver = network, config, seed, saver
        self.compare, self.monitor, self.phases = compare, monitor, config.schedule
        self.device = device_of(config)
        self.precision = precision_of(config, self.device)
        network.to(self.device, memory_format=network.memory_format)  # type: ignore[call-overload]
        self.start: State = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
        self.progress = saver.load() or Progress()
        self.frozen: dict[str, str] = {}  # stage -> digest of what must not move in this phase
        self.saved = time.monotonic()

    def run(self) -> tuple[tuple[Phase, ...], tuple[Epoch, ...]]:
        """Train through all phases; leave the best state in the network, in evaluation mode."""
        while self.progress.phase < len(self.phases):
            self._phase()
        self.load(self.whole(self.progress.best))
        self.network.eval()
        done = self.progress.phases
        kept = max(range(len(done)), key=lambda i: (done[i].kept, i))
        return tuple(replace(p, kept=i == kept) for i, p in enumerate(done)), tuple(self.progress.history)

    # -- what a subclass says --------------------------------------------------------------------------------------

    @abstractmethod
    def epoch(self, phase: PhaseConfig, boundary: int, steps: Steps) -> None:
        """Take the steps of one epoch, or what is left of them."""

    @abstractmethod
    def judge(self, phase: PhaseConfig, boundary: int) -> bool:
        """Put the epoch into the history, and what validation says; tell whether anybody asked it."""

    @abstractmethod
    def tell(self) -> None:
        """Tell how far it is."""

    def load(self, state: State) -> None:
        """Put a whole state into the network."""
        self.network.load_state_dict(state)

    def whole(self, part: Mapping[str, Tensor]) -> State:
        """Complete a part of a state from the best phase so far and the network as it was built."""
        return {**self.start, **self.progress.best, **part}

    def current(self, phase: PhaseConfig) -> State:
        """Give what must be saved of the network in the middle of a phase."""
        return learning_state(self.network, phase)

    def learn(self, phase: PhaseConfig, boundary: int) -> None:
        """Do the epochs of one phase, or what is left of them."""
        progress = self.progress
        steps = Steps(self.network, phase, self.start, self.precision, self.device, self.clip)
        steps.resume(progress)
        while progress.epoch < phase.epochs:
            self.epoch(phase, boundary, steps)
            validated = self.judge(phase, boundary)
            steps.keep(progress)
            progress.epoch, progress.step = progress.epoch + 1, 0
            progress.losses, progress.count = 0.0, 0
            self.tell()
            if validated and self._stops_early(phase):  # nobody looked at the epochs between two validations
                break
            if progress.epoch < phase.epochs:
                self._save(phase)

    # -- what all have in common -----------------------------------------------------------------------------------

    def _phase(self) -> None:
        progress, phase = self.progress, self.phases[self.progress.phase]
        self.load(self.whole(progress.current))
        boundary = set_learning(self.network, phase)
        self.frozen = frozen_digests(self.network, phase)
        if progress.epoch == 0 and progress.step == 0:
            progress.phase_digest, progress.phase_score = frozen_digest(self.frozen), None
        self.learn(phase, boundary)
        self._close(phase)
        self._save(None)

    def step(self, phase: PhaseConfig, steps: Steps, factor: float, gradient: Callable[[], float]) -> float:
        """Take one step; give its loss.

        Args:
            factor: share of the peak rates.
            gradient: computes the gradient, and gives the loss.

        Raises:
            ModelError: the loss is not finite.
        """
        steps.begin(factor)
        loss = gradient()
        if not math.isfinite(loss):
            raise ModelError(
                f"The loss is not finite in phase '{phase.name}', epoch {self.progress.epoch + 1}. "
                f"Lower the phase's learning rate (now {phase.lr:g})."
            )
        steps.take()
        return loss

    def save_within(self, phase: PhaseConfig, steps: Steps) -> None:
        """Save in the middle of an epoch, where it is time."""
        if self._is_time():
            steps.keep(self.progress)
            self._save(phase, now=True)

    def draw_from(self, seed: int) -> None:
        """Seed what is drawn in a step."""
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed looks after every device: a millisecond
        else:
            torch.manual_seed(seed)

    def offer(self, phase: PhaseConfig, score: tuple[float, float], given: FloatArray) -> None:
        """Keep this epoch's state if it is the phase's best on validation.

        Args:
            score: what is watched, and minus the loss; more is better.
            given: what validation gave, for ``compare``.
        """
        progress = self.progress
        if progress.phase_score is None or score > progress.phase_score:
            progress.phase_score, progress.phase_best_epoch = score, progress.epoch + 1
            progress.phase_best = learning_state(self.network, phase)
            progress.phase_val = {self.judged: torch.from_numpy(given)}

    def _stops_early(self, phase: PhaseConfig) -> bool:
        return phase.patience is not None and self.progress.epoch - self.progress.phase_best_epoch >= phase.patience

    def _close(self, phase: PhaseConfig) -> None:
        progress = self.progress
        after = frozen_digest(frozen_digests(self.network, phase))
        if after != progress.phase_digest:
            raise ModelError(f"Phase '{phase.name}' changed a layer that was frozen. The checkpoint is not written.")
        assert progress.phase_score is not None
        chance, better, why = self._is_better()
        set_learning(self.network, phase)
        learning = unfrozen_stages(phase, self.network.stage_names)
        trainable = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        watched, epochs = progress.phase_score[0], [one for one in progress.history if one.phase == phase.name]
        best = epochs[progress.phase_best_epoch - 1]
        progress.phases.append(
            Phase(
                name=phase.name,
                unfrozen=learning,
                frozen=tuple(name for name in self.network.stage_names if name not in learning),
                trainable_parameters=trainable,
                frozen_parameters=sum(p.numel() for p in self.network.parameters()) - trainable,
                learning_rates=learning_rates(phase, self.network.stage_names),
                frozen_digest_before=progress.phase_digest,
                frozen_digest_after=after,
                best_epoch=progress.phase_best_epoch,
                val_loss=best.val_loss,
                val_auroc=best.val_auroc,
                kept=better,
                head=phase.head,
                epochs=len(epochs),
                trainable=tuple(name for name, p in self.network.named_parameters() if p.requires_grad),
                monitor=self.monitor,
                watched=watched if math.isfinite(watched) else None,
                chance_better=chance,
                reason=why,
            )
        )
        if better:
            progress.best, progress.best_val = self.whole(progress.phase_best), progress.phase_val
        progress.phase, progress.epoch, progress.step = progress.phase + 1, 0, 0
        progress.current, progress.phase_best, progress.phase_val = {}, {}, {}
        progress.optimiser, progress.scaler, progress.losses, progress.count = None, None, 0.0, 0
        self.tell()

    def _is_better(self) -> tuple[float | None, bool, str]:
        """Ask whether this phase beats the best one before it by more than chance on validation."""
        progress, guard = self.progress, self.config.guard
        if not progress.best:
            return None, True, "the first phase"
        if self.compare is None:
            return None, True, "nothing was asked"
        new, old = (part[self.judged].double().numpy() for part in (progress.phase_val, progress.best_val))
        chance = self.compare(new, old)
        before = next(p.name for p in reversed(progress.phases) if p.kept)
        why = f"better than '{before}' in {chance:.0%} of validation resamples; {guard:.0%} are asked for"
        return round(chance, 4), chance >= guard, why

    def _is_time(self) -> bool:
        return parallel.agree(time.monotonic() - self.saved >= self.config.save_every_s)

    def _save(self, phase: PhaseConfig | None, now: bool = False) -> None:
        """Save where it is time; ``phase`` is the one that is not finished."""
        if now or self._is_time():
            if parallel.rank() == 0:
                self.progress.current = self.current(phase) if phase is not None else {}
                self.saver.save(self.progress)
            self.saved = time.monotonic()
