"""Learn to diagnose: what a classifier is trained and judged on, phase after phase (:mod:`medtl.model.trainer`).

What is frozen is computed once (:mod:`medtl.model.cache`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from torch import Tensor, nn

from medtl.config import ModelConfig, PhaseConfig
from medtl.errors import ConfigError, ModelError, StorageError
from medtl.model import cache, parallel
from medtl.model.cache import ActivationStore, Images, Source, Trunk, autocast, to_images
from medtl.model.heads import BANK, VOTES, Linear, NearestNeighbours, solve
from medtl.model.losses import class_weights, evaluation_loss, known_labels, loss_sum, mixture
from medtl.model.phases import Norms, frozen_count, rate_factor, set_learning, train_again
from medtl.model.surgery import HEAD, StagedNetwork
from medtl.model.trainer import Judge, Saver, State, Steps, Trainer
from medtl.progress import advance
from medtl.records import AnyArray, Epoch, FloatArray, IntArray, Phase, Task

log = logging.getLogger("medtl")
CLIP = 5.0  # norm of the gradient


class Training(Protocol):
    """Where training images come from; see :class:`medtl.dataset.loading.TrainingBatches`."""

    @property
    def rows(self) -> Sequence[int]:
        """Give the pack's rows to learn from."""
        ...

    @property
    def targets(self) -> FloatArray:
        """Give the targets of all rows of the pack, (N, classes), NaN where unknown."""
        ...

    def __len__(self) -> int: ...

    def order(self, phase: int, epoch: int) -> list[IntArray]:
        """Give the rows of each batch of an epoch; the same arguments give the same batches."""
        ...

    def view(self, rows: IntArray, view: int) -> AnyArray:
        """Give one view of some images; :data:`medtl.model.cache.CLEAN` is the image as it is."""
        ...


class Validation(Protocol):
    """Where validation images come from; see :class:`medtl.dataset.loading.EvaluationBatches`."""

    @property
    def images(self) -> AnyArray:
        """Give the pack, (N, ..., channels)."""
        ...

    @property
    def rows(self) -> Sequence[int]:
        """Give the pack's rows to judge on."""
        ...

    @property
    def targets(self) -> FloatArray:
        """Give the targets of all rows of the pack, (N, classes), NaN where unknown."""
        ...


@dataclass(frozen=True)
class Material:
    """What is learned from and what it is judged on.

    Args:
        name: digest of a view of these rows: everything that its activations depend on but the network.
        groups: patient of each training row.
        judge: tells in which share of resamples of the validation patients the first of two sets of probabilities is
            better than the second; the judge of the negative-transfer guard.
    """

    train: Training
    val: Validation
    task: Task
    groups: Sequence[str]
    name: Callable[[Sequence[int], int], str]
    judge: Judge
    pool: Sequence[int] | None = None  # rows whose activations are kept: of all folds, where folds share them


def fit(
    network: StagedNetwork,
    material: Material,
    config: ModelConfig,
    seed: int,
    saver: Saver,
    store: ActivationStore | None = None,
    label: str = "training",
    units: Sequence[float] | None = None,
) -> tuple[tuple[Phase, ...], tuple[Epoch, ...]]:
    """Train through all phases; leave the best state in the network, in evaluation mode.

    Args:
        store: where activations of frozen layers are kept; None: they are computed each time, with the same result.
        units: forecast seconds of an epoch of each phase, for the progress that is shown.

    Raises:
        ModelError: the loss is not finite, or a frozen layer moved.
        ConfigError: BatchNorm would be frozen in a network that never learned its statistics.
    """
    if config.origin == "none":
        refuse_frozen_noise(network, config)
    return _Run(network, material, config, seed, saver, store, label, units).run()


class _Run(Trainer):
    """One training of a classifier."""

    clip = CLIP
    judged = "probabilities"
    train: Source  # of the phase that is done
    val: Source
    weights: FloatArray | None
    views: Sequence[int]

    def __init__(
        self,
        network: StagedNetwork,
        material: Material,
        config: ModelConfig,
        seed: int,
        saver: Saver,
        store: ActivationStore | None,
        label: str,
        units: Sequence[float] | None,
    ) -> None:
        super().__init__(network, config, seed, saver, material.judge, config.monitor)
        self.material, self.store, self.label, self.task = material, store, label, material.task
        self.numbers = cache.choose_numbers(config.cache, self.precision)
        self.head = network.stages[HEAD]  # as it was built: solved neighbours take its place
        self.linear = {f"stages.{HEAD}.{name}" for name in self.head.state_dict()}
        self.units = units or [1.0] * len(self.phases)
        self.val_rows = np.sort(np.asarray(material.val.rows))
        self.train_rows = np.sort(np.asarray(material.train.rows))
        self.val_targets = material.val.targets[self.val_rows]

    def whole(self, part: Mapping[str, Tensor]) -> State:
        found = super().whole(part)
        if BANK in found:  # neighbours took the place of the layer that the network was built with
            found = {key: value for key, value in found.items() if key not in self.linear}
        return found

    def load(self, state: State) -> None:
        """Load a whole state, with the kind of head that it is of."""
        if BANK in state:
            put_head(self.network, NearestNeighbours(state[BANK], state[VOTES], 1, self.task == "multilabel"))
        else:
            self.network.stages[HEAD] = self.head
        super().load(state)

    # -- a phase ---------------------------------------------------------------------------------------------------

    def learn(self, phase: PhaseConfig, boundary: int) -> None:
        self.train, self.val = self._sources(phase, boundary)
        if phase.head != "gradient":
            self._solve(phase, boundary)
            return
        self.weights = class_weights(self.material.train.targets[self.train_rows], phase, self.task)
        self.views = cache.views_of(phase, self.progress.phase, self.phases)
        super().learn(phase, boundary)

    def epoch(self, phase: PhaseConfig, boundary: int, steps: Steps) -> None:
        progress = self.progress
        train_again(self.network, phase, boundary)
        batches = self.material.train.order(progress.phase, progress.epoch)
        planned = phase.epochs * len(batches)
        for step in range(progress.step, len(batches)):
            if len(batches[step]) < 2:
                continue  # one image has no batch statistics
            gradient = partial(self._gradient, phase, boundary, batches[step], step, steps)
            factor = rate_factor(phase, progress.epoch * len(batches) + step, planned)
            loss = self.step(phase, steps, factor, gradient)
            progress.losses += loss * len(batches[step])
            progress.count += len(batches[step])
            progress.step = step + 1
            if step + 1 < len(batches):
                self.save_within(phase, steps)

    def _gradient(self, phase: PhaseConfig, boundary: int, rows: IntArray, step: int, steps: Steps) -> float:
        """Add up the gradient of one batch, a part at a time, over all processes; give its mean loss."""
        key = [self.seed, self.progress.phase, self.progress.epoch, step]
        targets = self.material.train.targets
        whole = known_labels(targets[rows], self.task)
        mine = parallel.share_of(rows)
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(np.array_split(mine, min(self.config.accumulate, max(1, len(mine))))):
            if not len(part):
                continue
            seeds = [*key, number, parallel.rank()] if number or parallel.rank() else key
            self.draw_from(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
            wanted = torch.from_numpy(np.ascontiguousarray(targets[part])).to(self.device, torch.float32)
            x, wanted = self._input(phase, part, wanted, [*seeds, 0x5EED])
            with autocast(self.device, self.precision):
                if boundary == 0:
                    x = self.network.normalise(x)
                logits = self.network.run(x, boundary)
            loss = loss_sum(logits, wanted, self.task, phase, self.weights) / max(whole, 1)
            steps.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        parallel.add_gradients(self.network)
        return float(parallel.add(total))

    def _input(self, phase: PhaseConfig, rows: IntArray, wanted: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        view = self.views[self.progress.epoch]
        if not phase.mixup:
            return self.train.at(rows, view), wanted
        images = to_images(self.train.images.view(rows, view), self.device)
        share, partners = mixture(wanted, phase.mixup, np.random.default_rng(seeds))
        images = share * images + (1 - share) * images[partners]
        return self.train.live(images), share * wanted + (1 - share) * wanted[partners]

    # -- validation ------------------------------------------------------------------------------------------------

    def _validate(self, boundary: int) -> tuple[float, FloatArray]:
        """Measure the mean loss and the probabilities of the validation part."""
        for stage in list(self.network.stages.values())[boundary:]:
            stage.eval()
        size, rows = self.config.batch_size, parallel.share_of(self.val_rows, whole=True)
        losses, found = 0.0, []
        with torch.no_grad(), autocast(self.device, self.precision):
            for batch in cache.batches_of(rows, size):
                x = self.val.at(batch, cache.CLEAN)
                logits = self.network.run(self.network.normalise(x) if boundary == 0 else x, boundary).float()
                wanted = torch.from_numpy(self.material.val.targets[batch]).to(self.device, torch.float32)
                losses += float(evaluation_loss(logits, wanted, self.task))
                found.append(probabilities_of(logits, self.task))
        counted = known_labels(self.val_targets, self.task)
        gathered = parallel.gather(np.concatenate(found) if found else np.empty((0, self.val_targets.shape[1])))
        return parallel.add_number(losses) / max(counted, 1), gathered

    def judge(self, phase: PhaseConfig, boundary: int) -> bool:
        progress = self.progress
        loss, probabilities = self._validate(boundary)
        auroc = macro_auroc(self.val_targets, probabilities)
        watched = auroc
        if self.config.monitor != "auroc":
            watched = monitored(self.config.monitor, self.val_targets, probabilities, loss)
        progress.history.append(
            Epoch(phase.name, progress.epoch + 1, progress.losses / max(progress.count, 1), loss, auroc)
        )
        self.offer(phase, (watched if watched is not None else -math.inf, -loss), probabilities)
        return True

    def tell(self) -> None:
        """Tell how far it is, in thousandths of forecast seconds: epochs of different phases cost different time."""
        planned = [unit * phase.epochs for unit, phase in zip(self.units, self.phases, strict=True)]
        now = self.progress.phase
        done = sum(planned[:now]) + (self.units[now] * self.progress.epoch if now < len(planned) else 0.0)
        advance(self.label, round(1000 * done), max(1, round(1000 * sum(planned))))

    # -- heads that are solved -------------------------------------------------------------------------------------

    def _solve(self, phase: PhaseConfig, boundary: int) -> None:
        progress, head = self.progress, phase.head
        assert head != "gradient"
        views = [cache.CLEAN] if not phase.augment else list(range(phase.cycled or 1))
        parts = [self.train.at(batch, view) for view in views for batch in self._batches(self.train_rows)]
        x = torch.cat(parts).double().cpu().numpy()
        targets = np.tile(self.material.train.targets[self.train_rows], (len(views), 1))
        patients = dict(zip(self.material.train.rows, self.material.groups, strict=True))
        groups = [patients[row] for _ in views for row in self.train_rows.tolist()]
        balanced = phase.loss == "class_balanced"
        class_weights(targets, phase, self.task)  # refuses what cannot be balanced
        solved = solve(head, x, targets, groups, self.task, balanced, lambda h: self._score(h, boundary), self.seed)
        put_head(self.network, solved)
        set_learning(self.network, phase)
        progress.losses, progress.count = math.nan, 1
        self.judge(phase, boundary)
        progress.epoch = 1
        self.tell()

    def _score(self, head: Linear | NearestNeighbours, boundary: int) -> float:
        put_head(self.network, head)
        loss, probabilities = self._validate(boundary)
        found = monitored(self.config.monitor, self.val_targets, probabilities, loss)
        return -loss if found is None else found - 1e-6 * loss

    def _batches(self, rows: IntArray) -> Sequence[IntArray]:
        return list(cache.batches_of(rows, self.config.batch_size))

    # -- what is frozen --------------------------------------------------------------------------------------------

    def _sources(self, phase: PhaseConfig, boundary: int) -> tuple[Source, Source]:
        """Set up where this phase's input comes from; run the trunk where that pays."""
        pool = self.train_rows if self.material.pool is None else np.sort(np.asarray(self.material.pool))
        judged = pool if np.isin(self.val_rows, pool).all() else self.val_rows
        train = Images(pool, self.material.train.view, self._names(pool))
        pixels = self.material.val.images
        val = Images(judged, lambda rows, _: pixels[rows], self._names(judged))
        if boundary == 0:
            return Source(train, None, 0, {}, self.device), Source(val, None, 0, {}, self.device)
        trunk = self._trunk([boundary])
        kept: dict[str, dict[int, cache.Kept]] = {"train": {}, "val": {}}
        if self.store is not None:
            try:
                kept = self._keep(phase, boundary, train, val)
            except StorageError as error:
                log.warning("activations of frozen layers cannot be kept; computing them each time: %s", error)
        return (
            Source(train, trunk, boundary, kept["train"], self.device),
            Source(val, trunk, boundary, kept["val"], self.device),
        )

    def _trunk(self, boundaries: Sequence[int]) -> Trunk:
        return Trunk(self.network, boundaries, self.precision, self.numbers, self.config.batch_size, self.device)

    def _names(self, rows: IntArray) -> Callable[[int], str]:
        return lambda view: self.material.name(rows.tolist(), view)

    def _keep(self, phase: PhaseConfig, boundary: int, train: Images, val: Images) -> dict[str, dict[int, cache.Kept]]:
        assert self.store is not None
        now, stages = self.progress.phase, self.network.stage_names
        wanted = sorted({frozen_count(self.phases[n], stages) for n in cache.sharing(self.phases, now, stages)})
        trunk = self._trunk([boundary])
        needed = [(train, view) for view in self._views([boundary])] + [(val, cache.CLEAN)]
        keys = [self._key(trunk, images, view, boundary) for images, view in needed]
        shapes: Mapping[int, tuple[int, ...]] = {}
        first: Mapping[int, Tensor] | None = None
        first_view = next(iter(self._views([boundary])), cache.CLEAN)
        if len(needed) > 1 and self.config.cache.use != "never" and all(self.store.has(key) for key in keys):
            shapes = {boundary: self.store.shape(keys[0])[1:]}
            decision = cache.Decision((boundary,), 0.0, "they are there from an earlier pass")
        else:
            trunk = self._trunk(wanted)
            example = to_images(train.view(train.rows[: self.config.batch_size], first_view), self.device)
            measured = cache.measure(trunk, example)
            shapes, first = measured.shapes, measured.handed
            decision = cache.decide(
                self.phases, now, stages, (len(train.rows), len(val.rows)), measured.seconds, measured.mb,
                self.store.room_mb(), self.config.cache.use,
            )  # fmt: skip
        boundaries = parallel.agree(decision.boundaries)
        log.info("phase %s: activations %s (%s)", phase.name, "kept" if boundaries else "not kept", decision.reason)
        found: dict[str, dict[int, cache.Kept]] = {"train": {}, "val": {}}
        if not boundaries:
            return found
        trunk = self._trunk(boundaries)
        clean = {cache.CLEAN: list(boundaries)}
        for part, images, views in (("train", train, self._views(boundaries)), ("val", val, clean)):
            for view, here in views.items():
                kept = {b: self._open(trunk, images, view, b, shapes[b]) for b in here}
                known = first if (part, view) == ("train", first_view) else None
                share = (parallel.rank(), parallel.world())
                cache.fill(trunk, images, view, kept, share, f"frozen layers, {part}", known)
                parallel.wait()
                for depth in here:
                    if not self.store.has(self._key(trunk, images, view, depth)):
                        raise ModelError(
                            "Another process did not keep its share of the activations. Run the command again, or set "
                            "model.cache.use to never."
                        )
                if boundary in kept:
                    found[part][view] = kept[boundary]
        return found

    def _views(self, boundaries: Sequence[int]) -> dict[int, list[int]]:
        """Say which views are kept at which boundaries: those that any phase from here on shows more than once."""
        now, stages = self.progress.phase, self.network.stage_names
        found: dict[int, list[int]] = {}
        for number in cache.sharing(self.phases, now, stages):
            phase, boundary = self.phases[number], frozen_count(self.phases[number], stages)
            if boundary not in boundaries or not cache.is_repeated(phase):
                continue
            for view in cache.views_of(phase, number, self.phases):
                if boundary not in found.setdefault(view, []):
                    found[view].append(boundary)
        return found

    def _open(self, trunk: Trunk, images: Images, view: int, boundary: int, shape: tuple[int, ...]) -> cache.Kept:
        assert self.store is not None
        size = cache.chunk_rows(trunk.batch_size)
        key = self._key(trunk, images, view, boundary)
        return self.store.entry(key, (len(images.rows), *shape), cache.STORED[self.numbers], size)

    def _key(self, trunk: Trunk, images: Images, view: int, boundary: int) -> str:
        prefix = cache.prefix_digest(self.network, boundary, self.frozen)
        return cache.key_of(prefix, trunk, images.name(view), torch.get_num_threads())


def refuse_frozen_noise(network: StagedNetwork, config: ModelConfig) -> None:
    """Refuse what cannot work: frozen BatchNorm, or a frozen trunk, of a network without weights."""
    has_norms = any(isinstance(module, Norms) for module in network.modules())
    for phase in config.schedule:
        if has_norms and phase.batchnorm == "frozen" and phase.unfreeze != "head":
            raise ConfigError(
                f"Phase '{phase.name}' freezes BatchNorm in a network that starts without weights, whose statistics "
                "nobody ever measured. Set batchnorm: with_stage in that phase, or give model.weights."
            )


def put_head(network: StagedNetwork, head: Linear | NearestNeighbours) -> None:
    """Give the network a solved head."""
    device = next(network.parameters()).device
    stage = network.stages[HEAD]
    assert isinstance(stage, nn.Sequential)
    if isinstance(head, NearestNeighbours):
        network.stages[HEAD] = nn.Sequential(stage[0], head).to(device)
        return
    linear = stage[1]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.weight))
        linear.bias.copy_(torch.from_numpy(head.bias))


def probabilities_of(logits: Tensor, task: Task) -> FloatArray:
    """Turn logits into probabilities: softmax, or one sigmoid per label of a multi-label task."""
    wide = logits.double()
    found: FloatArray = (wide.sigmoid() if task == "multilabel" else wide.softmax(1)).cpu().numpy()
    return found


def monitored(metric: str, targets: FloatArray, probabilities: FloatArray, loss: float) -> float | None:
    """Give the validation metric that chooses; higher is better, None where it is not estimable."""
    if metric == "loss":
        return -loss
    if metric == "auroc":
        return macro_auroc(targets, probabilities)
    if metric == "average_precision":
        return _macro(targets, probabilities, average_precision_score)
    if targets.shape[1] > 1 and np.isfinite(targets).all() and (targets.sum(1) == 1).all():
        return float(balanced_accuracy_score(targets.argmax(1), probabilities.argmax(1)))
    return _macro(targets, probabilities >= 0.5, balanced_accuracy_score)


def macro_auroc(targets: FloatArray, scores: FloatArray) -> float | None:
    """Give the mean of the one-against-rest AUROCs of the classes that have both kinds, or None.

    Of two classes that share a softmax both have the same one. By ranks: Mann and Whitney 1947.
    """
    if targets.shape[1] == 2 and np.array_equal(targets[:, 0], 1 - targets[:, 1]):
        targets, scores = targets[:, 1:], scores[:, 1:]
    return _macro(targets, scores, _auroc)


def _auroc(wanted: FloatArray, score: FloatArray) -> float:
    ill, well = score[wanted > 0.5], np.sort(score[wanted <= 0.5])
    below = np.searchsorted(well, ill, "left") + np.searchsorted(well, ill, "right")
    return float(below.sum()) / (2 * len(ill) * len(well))


def _macro(targets: FloatArray, scores: AnyArray, metric: Callable[..., float]) -> float | None:
    values = []
    for wanted, score in zip(targets.T, scores.T, strict=True):
        known = np.isfinite(wanted)
        if len(np.unique(wanted[known])) == 2:
            values.append(float(metric(wanted[known], score[known])))
    return float(np.mean(values)) if values else None
