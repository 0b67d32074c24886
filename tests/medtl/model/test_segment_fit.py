"""A segmentation learns in phases, resumes to the bit, keeps its best weights, and does so in two processes too."""

from __future__ import annotations

import copy
import dataclasses
import math
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from medtl.config import ModelConfig, PhaseConfig
from medtl.errors import ConfigError, ModelError
from medtl.model import parallel, segment_fit
from medtl.model.devices import make_deterministic
from medtl.model.io import FolderSaver
from medtl.model.phases import phases_again
from medtl.model.segment_fit import SegmentMaterial, fit_segmenter, mean_dice
from medtl.model.segmenter import SegmenterNetwork, build
from medtl.model.trainer import Progress
from medtl.progress import listening
from medtl.records import FloatArray, GridPlan, Phase, Structure

PLAN = GridPlan(
    structures=(Structure("square", (1,)), Structure("stripe", (2,))), ignore=None, dimensions=2, axis=None,
    neighbours=0, channels=1, spacing_mm=None, intensity="zscore", low=None, high=None, mean=None, std=None,
    landmarks=(), patch=(16, 16), batch_size=4, strides=((1, 1), (2, 2), (2, 2)), kernels=((3, 3),) * 3,
    filters=(4, 8, 16), mirror=(), facts={}, reasons={},
)  # fmt: skip
HEAD = PhaseConfig(name="head", unfreeze="head", epochs=2, lr=0.01, augment=False)
ALL = PhaseConfig(name="all", unfreeze="all", epochs=3, lr=0.01, decay=1.0)


class Squares:
    """Bright squares and dark stripes; a pure function of where training is."""

    def __init__(self, steps: int = 3) -> None:
        self.steps = steps
        self.asked: list[tuple[int, int, int, bool]] = []

    def __len__(self) -> int:
        return self.steps

    def step(self, phase: int, epoch: int, step: int, augmented: bool) -> tuple[Tensor, Tensor]:
        self.asked.append((phase, epoch, step, augmented))
        rng = np.random.default_rng([phase, epoch, step, augmented])
        codes = np.zeros((4, 16, 16), np.uint8)
        for one in codes:
            row, column = rng.integers(0, 10, 2)
            one[row : row + 6, column : column + 6] = 1
            one[(row + 8) % 16] = 2
        images = rng.normal(0, 0.3, codes.shape) + np.array([0.0, 2.0, -2.0])[codes]
        return torch.from_numpy(images[:, None].astype(np.float32)), torch.from_numpy(codes)


def dice_of(network: SegmenterNetwork) -> FloatArray:
    images, codes = Squares().step(99, 0, 0, False)
    found = network(images).argmax(1)
    rows = []
    for mine, true in zip(found, codes, strict=True):
        rows.append(
            [
                2 * float(((mine == k) & (true == k)).sum()) / float((mine == k).sum() + (true == k).sum())
                for k in (1, 2)
            ]
        )
    return np.array(rows)


class Memory:
    """Keep progress; optionally stop after some saves, as a kill would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.progress: Progress | None = None
        self.left = stop_after

    def load(self) -> Progress | None:
        return self.progress

    def save(self, progress: Progress) -> None:
        self.progress = copy.deepcopy(progress)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def train(saver: Any, *phases: PhaseConfig, **options: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    make_deterministic(0, 1)
    patches = options.pop("patches", None) or Squares()
    validate: Callable[..., FloatArray] | None = options.pop("validate", dice_of)
    judge = options.pop("judge", lambda new, old: 1.0)
    settings = {"network": "dynunet", "validate_every": 1, **options.pop("segmenter", {})}
    given = {"weights": "none", "precision": "fp32", "save_every_s": 0.0, "device": "cpu", **options}
    model = ModelConfig(phases=phases, segmenter=settings, **given)
    network, _ = build(PLAN, model, 0, None)
    done, history = fit_segmenter(network, SegmentMaterial(patches, validate, judge), PLAN, model, 0, saver)
    assert not network.training
    return done, history, network.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_segmentation_learns_and_proves_what_it_froze() -> None:
    phases, history, _ = train(Memory(), HEAD, ALL.model_copy(update={"epochs": 8}))
    assert [phase.name for phase in phases] == ["head", "all"]
    assert phases[0].frozen == ("stem", "level2", "level3") and phases[1].frozen == ()
    assert all(phase.frozen_digest_before == phase.frozen_digest_after for phase in phases)
    assert phases[1].monitor == "dice" and phases[1].watched is not None and phases[1].watched > 0.8
    assert history[-1].train_loss < 0.5 * history[0].train_loss
    assert phases[1].val_loss == pytest.approx(1 - phases[1].watched)
    assert all(name.startswith("stages.head.") for name in phases[0].trainable)


@pytest.mark.parametrize("saves", [1, 3, 6, 7, 11, 14])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("watched", [True, False])
def test_training_stopped_anywhere_ends_with_the_same_bits(
    saves: int, ema: float, watched: bool, tmp_path: Path
) -> None:
    """With ``save_every_s`` 0 every step is saved: the stops lie within epochs too."""
    asked = {} if watched else {"validate": None, "judge": None}
    whole_phases, whole_history, whole = train(Memory(), HEAD, ALL, segmenter={"ema": ema}, **asked)
    stopped = Memory(stop_after=saves)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, HEAD, ALL, segmenter={"ema": ema}, **asked)
    assert stopped.progress is not None
    FolderSaver(tmp_path).save(stopped.progress)
    phases, history, resumed = train(FolderSaver(tmp_path), HEAD, ALL, segmenter={"ema": ema}, **asked)
    assert repr(history) == repr(whole_history) and repr(phases) == repr(whole_phases)  # NaN is no NaN's equal
    assert same(resumed, whole)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_where_nobody_is_left_to_ask_every_phase_goes_to_its_end(ema: float) -> None:
    """Its last state is kept, which is what an observer sees there; patience has nothing to lose."""
    ends: list[dict[str, Tensor]] = []

    def worse_and_worse(network: SegmenterNetwork) -> FloatArray:
        ends.append(copy.deepcopy(network.state_dict()))
        return np.array([[1.0 / len(ends)]])

    segmenter = {"ema": ema}
    hasty = ALL.model_copy(update={"patience": 1})
    phases, history, state = train(Memory(), HEAD, hasty, validate=None, judge=None, segmenter=segmenter)
    assert [(one.phase, one.epoch) for one in history] == [("head", 1), ("head", 2), ("all", 1), ("all", 2), ("all", 3)]
    assert all(math.isnan(one.val_loss) for one in history)
    assert [(one.best_epoch, one.epochs, one.kept, one.watched) for one in phases] == [
        (2, 2, False, None),
        (3, 3, True, None),
    ]
    assert phases[0].frozen == ("stem", "level2", "level3") and phases[0].frozen_digest_before
    alone = train(Memory(), HEAD, validate=worse_and_worse, segmenter=segmenter)[2]
    last = train(Memory(), HEAD, validate=None, judge=None, segmenter=segmenter)[2]
    assert same(alone, ends[0]) and same(last, ends[1]) and not same(last, state)


def test_where_nobody_is_left_to_ask_a_loss_that_rises_chooses_nothing() -> None:
    class Harder(Squares):
        def step(self, phase: int, epoch: int, step: int, augmented: bool) -> tuple[Tensor, Tensor]:
            images, codes = super().step(phase, epoch, step, augmented)
            return (images, codes) if epoch < 2 else (images, codes.flip(1))

    (phase,), history, _ = train(Memory(), ALL, patches=Harder(), validate=None, judge=None)
    assert history[2].train_loss > history[1].train_loss
    assert (phase.best_epoch, phase.epochs) == (3, 3)


def test_the_phases_that_led_to_what_was_kept_are_done_again() -> None:
    guard = 0.8
    (kept,), _, _ = train(Memory(), HEAD)

    def done(name: str, best: int, chance: float | None, kept_: bool = False) -> Phase:
        return dataclasses.replace(kept, name=name, best_epoch=best, chance_better=chance, kept=kept_)

    wanted = [HEAD, ALL, *(ALL.model_copy(update={"name": name, "patience": 2}) for name in ("more", "most"))]
    found = phases_again(wanted, [done("head", 1, None), done("all", 2, 0.79), done("more", 3, 0.8, True),
                                  done("most", 1, 0.1)], guard)  # fmt: skip
    assert [(one.name, one.epochs, one.patience) for one in found] == [("head", 1, None), ("more", 3, None)]
    assert found[1].lr == ALL.lr and found[1].unfreeze == "all"
    only = phases_again(wanted[:2], [done("head", 2, None, True), done("all", 3, 0.5)], guard)
    assert [(one.name, one.epochs) for one in only] == [("head", 2)]


def test_how_often_progress_is_saved_changes_nothing() -> None:
    assert same(train(Memory(), HEAD, ALL)[2], train(Memory(), HEAD, ALL, save_every_s=1e9)[2])


def test_every_step_is_drawn_once_and_augmented_as_the_phase_says() -> None:
    patches = Squares()
    train(Memory(), HEAD, ALL, patches=patches)
    wanted = [(0, e, s, False) for e in range(2) for s in range(3)] + [
        (1, e, s, True) for e in range(3) for s in range(3)
    ]
    assert patches.asked == wanted


def test_validation_is_done_now_and_then_and_at_the_end() -> None:
    phase = ALL.model_copy(update={"epochs": 5})
    _, history, _ = train(Memory(), phase, segmenter={"validate_every": 2})
    assert [math.isnan(epoch.val_loss) for epoch in history] == [True, False, True, False, False]
    _, history, _ = train(
        Memory(), phase.model_copy(update={"epochs": 31}), segmenter={"validate_every": None}, patches=Squares(1)
    )
    assert sum(not math.isnan(epoch.val_loss) for epoch in history) == 11


def test_the_best_epoch_is_kept_and_patience_ends_a_phase() -> None:
    values = iter([0.3, 0.9, 0.5, 0.4, 0.2])
    seen: list[dict[str, Tensor]] = []

    def validate(network: SegmenterNetwork) -> FloatArray:
        seen.append(copy.deepcopy(network.state_dict()))
        return np.array([[next(values), np.nan]])

    phase = ALL.model_copy(update={"epochs": 5, "patience": 2})
    phases, history, state = train(Memory(), phase, validate=validate)
    assert phases[0].best_epoch == 2 and phases[0].watched == 0.9 and len(history) == 4
    assert same(state, seen[1])


def test_the_running_mean_of_the_weights_is_what_is_judged_and_kept() -> None:
    judged: list[dict[str, Tensor]] = []

    def validate(network: SegmenterNetwork) -> FloatArray:
        judged.append(copy.deepcopy(network.state_dict()))
        return dice_of(network)

    _, history, state = train(Memory(), ALL, segmenter={"ema": 0.9}, validate=validate)
    _, plain, other = train(Memory(), ALL)
    assert [e.train_loss for e in history] == [e.train_loss for e in plain]  # the weights that learn are as before
    assert any(same(state, one) for one in judged) and not same(state, other)


def test_the_mean_follows_the_weights() -> None:
    _, _, state = train(Memory(), ALL.model_copy(update={"epochs": 1}), segmenter={"ema": 1e-9})
    _, _, plain = train(Memory(), ALL.model_copy(update={"epochs": 1}))
    for key, value in state.items():
        torch.testing.assert_close(value, plain[key])


def test_a_later_phase_that_is_not_better_than_chance_does_not_win() -> None:
    asked: list[Any] = []

    def judge(new: FloatArray, old: FloatArray) -> float:
        asked.append((new, old))
        return 0.79

    phases, _, state = train(Memory(), HEAD, ALL, judge=judge)
    alone = train(Memory(), HEAD)[2]
    assert [phase.kept for phase in phases] == [True, False] and "79%" in phases[1].reason
    assert same(state, alone) and asked[0][0].shape == (4, 2)


def test_a_frozen_layer_that_moves_stops_the_run() -> None:
    def meddling(network: SegmenterNetwork) -> FloatArray:
        with torch.no_grad():
            next(network.stages["stem"].parameters()).add_(1e-3)
        return dice_of(network)

    with pytest.raises(ModelError, match="changed a layer that was frozen"):
        train(Memory(), HEAD, validate=meddling)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    class Broken(Squares):
        def step(self, phase: int, epoch: int, step: int, augmented: bool) -> tuple[Tensor, Tensor]:
            images, codes = super().step(phase, epoch, step, augmented)
            return images * math.nan, codes

    with pytest.raises(ModelError, match="Lower the phase's learning rate"):
        train(Memory(), ALL, patches=Broken())


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="nobody ever measured"):
        train(Memory(), ALL, segmenter={"norm": "batch"})
    solved = PhaseConfig(name="solved", unfreeze="head", head="logistic_regression")
    with pytest.raises(ConfigError, match="head: gradient"):
        train(Memory(), solved)
    for setting in ({"mixup": 0.2}, {"loss": "focal"}, {"views": 4}, {"label_smoothing": 0.1}):
        with pytest.raises(ConfigError, match=r"model\.segmenter\.loss"):
            train(Memory(), ALL.model_copy(update=setting))


def test_batchnorm_that_learns_is_measured() -> None:
    phase = ALL.model_copy(update={"batchnorm": "with_stage"})
    _, _, state = train(Memory(), phase, segmenter={"norm": "batch"})
    assert all(float(value.abs().max()) > 0 for key, value in state.items() if key.endswith("running_mean"))


def test_nothing_known_on_validation_is_not_a_crash() -> None:
    phases, _, _ = train(Memory(), HEAD, validate=lambda network: np.full((2, 2), np.nan))
    assert phases[0].watched is None and math.isnan(phases[0].val_loss)


def test_the_mean_dice_is_of_structures_and_leaves_out_what_is_unknown() -> None:
    assert mean_dice(np.array([[1.0, 0.2], [0.5, np.nan], [0.0, np.nan]])) == pytest.approx((0.5 + 0.2) / 2)
    assert mean_dice(np.array([[0.4, np.nan]])) == 0.4
    assert mean_dice(np.full((2, 2), np.nan)) is None


def test_steps_are_told_as_they_are_done() -> None:
    told: list[tuple[str, int, int]] = []
    with listening(lambda *said: told.append(said)):
        train(Memory(), HEAD, ALL)
    assert [done for _, done, _ in told if done] == sorted(done for _, done, _ in told if done)
    assert told[-1] == ("training", 15, 15)


def shared_dice(network: SegmenterNetwork) -> FloatArray:
    """Each process gives half of the studies, and gets all."""
    return parallel.gather(parallel.share_of(dice_of(network), whole=True))


def _in_a_process(rank: int, place: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    _, history, state = train(Memory(), HEAD, ALL, validate=shared_dice)
    results.put((rank, [e.train_loss for e in history], {k: v.numpy() for k, v in state.items()}))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    _, history, whole = train(Memory(), HEAD, ALL)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_in_a_process, args=(r, str(tmp_path / "meet"), results)) for r in range(2)]
    for process in processes:
        process.start()
    found = {rank: (losses, state) for rank, losses, state in (results.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert found[0][0] == pytest.approx([e.train_loss for e in history], rel=1e-4)
    for key, value in whole.items():
        np.testing.assert_allclose(found[0][1][key], value.numpy(), rtol=2e-2, atol=2e-4)
        np.testing.assert_array_equal(found[0][1][key], found[1][1][key])


def test_patches_are_drawn_while_the_step_before_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = threading.Event()  # of the second step

    class Watched(Squares):
        def step(self, phase: int, epoch: int, step: int, augmented: bool) -> tuple[Tensor, Tensor]:
            if step == 1:
                drawn.set()
            return super().step(phase, epoch, step, augmented)

    real = segment_fit._Run._gradient

    def waiting(run: Any, *given: Any) -> float:
        assert drawn.wait(20)  # the first step is not over
        return real(run, *given)

    monkeypatch.setattr(segment_fit._Run, "_gradient", waiting)
    train(Memory(), HEAD, patches=Watched())
