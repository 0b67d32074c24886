"""Phases freeze what they say, resume to the bit, and keep the best."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from medtl.config import STRATEGIES, ModelConfig, PhaseConfig, TransformsConfig
from medtl.dataset.loading import EvaluationBatches, TrainingBatches
from medtl.errors import ConfigError, ModelError
from medtl.model import devices, fit
from medtl.model.fit import Material
from medtl.model.heads import BANK, VOTES
from medtl.model.io import FolderActivations, FolderSaver, build_network, read_network, write_checkpoint
from medtl.model.phases import (
    learning_rates,
    make_optimiser,
    rate_factor,
    restore_optimiser,
    set_learning,
    unfrozen_stages,
)
from medtl.model.trainer import Progress

NAME = "monai_resnet10_narrow"
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
HEAD = PhaseConfig(name="head", unfreeze="head", epochs=1, lr=0.01)
DEEP = PhaseConfig(name="deep", unfreeze=2, epochs=2, lr=0.005, decay=0.5, batchnorm="with_stage")
ALL = PhaseConfig(name="all", unfreeze="all", epochs=2, lr=0.002, decay=0.5, batchnorm="with_stage")


class Memory:
    """Keep progress; optionally stop after some saves, as a kill would."""

    def __init__(self, progress: Progress | None = None, stop_after: int | None = None) -> None:
        self.progress, self.left = progress, stop_after

    def load(self) -> Progress | None:
        return self.progress

    def save(self, progress: Progress) -> None:
        self.progress = copy.deepcopy(progress)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def material(n: int = 36, seed: int = 0, judge: fit.Judge = lambda new, old: 1.0) -> Material:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(40, 120, (n, 24, 24, 1), dtype=np.uint8)
    images[labels == 1, 6:14, 6:14] += 90
    targets = np.eye(2)[labels]
    rows = list(range(n))
    train = TrainingBatches(images, targets, rows[: n * 2 // 3], 8, TransformsConfig(), seed)
    val = EvaluationBatches(images, targets, rows[n * 2 // 3 :], 8)
    patients = [f"p-{row // 2}" for row in train.rows]
    return Material(train, val, "binary", patients, lambda chosen, view: f"{seed}-{chosen}-{view}", judge)


def train(saver: Any, *phases: PhaseConfig, **options: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    devices.make_deterministic(0, 1)
    network, _ = build_network(NAME, 24, 1, 2, options.get("dropout", 0.1), None, 0.9, seed=0)
    store = options.pop("store", None)
    data = options.pop("material", None) or material()
    given = {"weights": "none", "precision": "fp32", "save_every_s": 0.0, **options}
    config = ModelConfig(backbone=NAME, batch_size=8, phases=phases, **given)
    done, history = fit.fit(network, data, config, 0, saver, store)
    return done, history, network.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_phases_learn_and_prove_what_they_froze() -> None:
    phases, history, _ = train(Memory(), HEAD, DEEP, ALL)
    assert [phase.name for phase in phases] == ["head", "deep", "all"]
    assert phases[0].frozen == STAGES[:-1]
    assert phases[2].frozen == ()
    assert set(phases[0].trainable) == {"stages.head.1.weight", "stages.head.1.bias"}
    assert [phase.epochs for phase in phases] == [1, 2, 2]
    assert all(phase.frozen_digest_before == phase.frozen_digest_after for phase in phases)
    assert phases[0].trainable_parameters < phases[1].trainable_parameters < phases[2].trainable_parameters
    assert sum(phase.kept for phase in phases) == 1
    assert len(history) == 5
    assert history[-1].train_loss < history[0].train_loss


def test_a_frozen_batchnorm_stands_still_and_a_learning_one_moves() -> None:
    network, _ = build_network(NAME, 24, 1, 2, 0.0, None, 0.9, seed=0)
    frozen = set_learning(network, DEEP)
    before = {key: value.clone() for key, value in network.state_dict().items() if "running_mean" in key}
    network(torch.rand(8, 1, 24, 24) + 3, frozen)
    moved = {key.split(".")[1] for key, old in before.items() if not torch.equal(old, network.state_dict()[key])}
    assert moved == {"layer3", "layer4"}


def test_batchnorm_can_stay_frozen_in_a_stage_that_learns() -> None:
    network, _ = build_network(NAME, 24, 1, 2, 0.0, None, 0.9, seed=0)
    phase = DEEP.model_copy(update={"batchnorm": "frozen"})
    before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
    network(torch.rand(8, 1, 24, 24) + 3, set_learning(network, phase))
    assert all(torch.equal(old, network.state_dict()[key]) for key, old in before.items())


@pytest.mark.parametrize("saves", [1, 3, 4, 8, 12, 14])
def test_training_stopped_anywhere_ends_with_the_same_bits(saves: int, tmp_path: Any) -> None:
    """With ``save_every_s`` 0 every step is saved: the stops lie within epochs too."""
    whole_phases, whole_history, whole = train(Memory(), HEAD, DEEP, ALL)
    stopped = Memory(stop_after=saves)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, HEAD, DEEP, ALL)
    disk = FolderSaver(tmp_path)
    assert stopped.progress is not None
    disk.save(stopped.progress)
    phases, history, resumed = train(FolderSaver(tmp_path), HEAD, DEEP, ALL)
    assert history == whole_history
    assert phases == whole_phases
    assert same(resumed, whole)


NEIGHBOURS = PhaseConfig(name="neighbours", unfreeze="head", epochs=1, head="knn", augment=False)


@pytest.mark.parametrize("phases", [(NEIGHBOURS,), (HEAD, NEIGHBOURS), (ALL, NEIGHBOURS)])
def test_neighbours_take_the_place_of_the_head_and_survive_a_stop(
    phases: tuple[PhaseConfig, ...], tmp_path: Any
) -> None:
    done, _, state = train(Memory(), *phases)
    assert done[-1].kept and done[-1].head == "knn" and done[-1].trainable == ()
    assert {key for key in state if key.startswith("stages.head.")} == {BANK, VOTES, "stages.head.1.k"}
    assert state[BANK].shape[0] == 24, "every training image votes"
    stopped = Memory(stop_after=1 if phases[0] is NEIGHBOURS else 4)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, *phases)
    assert stopped.progress is not None
    FolderSaver(tmp_path).save(stopped.progress)
    assert same(train(FolderSaver(tmp_path), *phases)[2], state)


def test_neighbours_answer_alike_after_they_were_written_and_read(tmp_path: Any) -> None:
    devices.make_deterministic(0, 1)
    network, weights = build_network(NAME, 24, 1, 2, 0.1, None, 0.9, seed=0)
    data = material()
    config = ModelConfig(backbone=NAME, batch_size=8, phases=(ALL, NEIGHBOURS), weights="none", precision="fp32")
    phases, history = fit.fit(network, data, config, 0, Memory())
    described = {"backbone": NAME, "task": "binary", "classes": ("a", "b"), "channels": 1, "size": (24, 24)}
    described |= {"stages": network.stage_names, "weights": weights, "phases": phases, "history": history}
    record = write_checkpoint(tmp_path, network, {**described, "parameters": 1, "environment": {}})
    assert record.head == "knn"
    images = torch.from_numpy(data.val.images.astype("float32") / 255).movedim(-1, 1)
    with torch.no_grad():
        assert torch.equal(read_network(tmp_path)(images), network(images))


def test_neighbours_that_are_no_better_leave_the_head_that_learned() -> None:
    data = material(judge=lambda new, old: 0.0)
    done, _, state = train(Memory(), ALL, NEIGHBOURS, material=data)
    assert [phase.kept for phase in done] == [True, False]
    assert same(state, train(Memory(), ALL, material=data)[2])


def test_momentum_that_has_not_begun_survives_a_stop(tmp_path: Any) -> None:
    phases = [p.model_copy(update={"optimiser": "sgd"}) for p in (HEAD, DEEP)]
    _, _, whole = train(Memory(), *phases)
    stopped = Memory(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, *phases)
    disk = FolderSaver(tmp_path)
    assert stopped.progress is not None
    disk.save(stopped.progress)
    assert same(train(disk, *phases)[2], whole)


def test_how_often_progress_is_saved_changes_nothing() -> None:
    assert same(train(Memory(), HEAD, DEEP)[2], train(Memory(), HEAD, DEEP, save_every_s=1e9)[2])


@pytest.mark.parametrize("numbers", ["fp32", "fp16"])
def test_kept_activations_change_no_bit(numbers: str, tmp_path: Any) -> None:
    deep = DEEP.model_copy(update={"views": 1, "epochs": 3})
    plain = HEAD.model_copy(update={"augment": False, "epochs": 3})
    runs = {
        use: train(
            Memory(), plain, deep, cache={"use": use, "numbers": numbers}, store=FolderActivations(tmp_path, 100)
        )
        for use in ("never", "always")
    }
    assert runs["never"][1] == runs["always"][1]
    assert same(runs["never"][2], runs["always"][2])
    assert any(tmp_path.iterdir())


def test_sixteen_bit_activations_cost_little(tmp_path: Any) -> None:
    plain = HEAD.model_copy(update={"augment": False, "epochs": 5})
    losses = {
        numbers: [e.val_loss for e in train(Memory(), plain, cache={"numbers": numbers})[1]]
        for numbers in ("fp32", "fp16")
    }
    assert losses["fp16"] == pytest.approx(losses["fp32"], abs=2e-3)
    assert losses["fp16"] != losses["fp32"]


def test_a_frozen_layer_that_moves_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fit.probabilities_of

    def meddling(logits: Any, task: Any) -> Any:
        for module in meddled:
            with torch.no_grad():
                next(module.parameters()).add_(1e-3)
        return real(logits, task)

    meddled: list[torch.nn.Module] = []
    build = fit._Run._validate
    monkeypatch.setattr(
        fit._Run, "_validate", lambda run, *rest: (meddled.append(run.network.stages["stem"]), build(run, *rest))[1]
    )
    monkeypatch.setattr(fit, "probabilities_of", meddling)
    with pytest.raises(ModelError, match="changed a layer that was frozen"):
        train(Memory(), HEAD)


def test_a_frozen_buffer_that_drifts_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest fault of all: requires_grad is False, and the running statistics of BatchNorm move all the same."""

    def as_tutorials_do(network: Any, phase: Any, boundary: int) -> None:
        network.train()
        network(torch.rand(8, 1, 24, 24) + 3)

    monkeypatch.setattr(fit, "train_again", as_tutorials_do)
    with pytest.raises(ModelError, match="changed a layer that was frozen"):
        train(Memory(), HEAD)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    devices.make_deterministic(0, 1)
    network, _ = build_network(NAME, 24, 1, 2, 0.0, None, 0.9, seed=0)
    with torch.no_grad():
        network.stages["head"][1].weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="Lower the phase's learning rate"):
        fit.fit(network, material(), ModelConfig(backbone=NAME, weights="none", phases=(HEAD,)), 0, Memory())


def test_a_later_phase_that_is_not_better_than_chance_does_not_win() -> None:
    asked: list[tuple[Any, Any]] = []

    def judge(new: Any, old: Any) -> float:
        asked.append((new, old))
        return 0.79

    phases, _, state = train(Memory(), HEAD, DEEP, material=material(judge=judge))
    alone, _, head_only = train(Memory(), HEAD)
    assert [phase.kept for phase in phases] == [True, False]
    assert "79%" in phases[1].reason and phases[1].chance_better == 0.79
    assert same(state, head_only) and alone[0].kept
    assert asked[0][0].shape == asked[0][1].shape == (12, 2)


def test_training_stops_early_where_nothing_gets_better() -> None:
    idle = HEAD.model_copy(update={"epochs": 9, "lr": 1e-12, "patience": 2, "augment": False})
    phases, history, _ = train(Memory(), idle)
    assert len(history) < 9
    assert len(history) - phases[0].best_epoch == 2


def test_the_pull_towards_the_start_keeps_the_trunk_nearer_to_it() -> None:
    devices.make_deterministic(0, 1)
    start = build_network(NAME, 24, 1, 2, 0.1, None, 0.9, seed=0)[0].state_dict()
    names = [key for key in start if "conv" in key]

    def moved(pull: float) -> float:
        full = ALL.model_copy(update={"epochs": 4, "l2_sp": pull, "optimiser": "sgd", "lr": 0.05, "decay": 1.0})
        state = train(Memory(), full)[2]
        return sum(float((state[key] - start[key]).square().sum()) for key in names)

    assert moved(5.0) < 0.5 * moved(0.0)


def test_mixup_mixes_images_and_labels_and_can_be_resumed(tmp_path: Any) -> None:
    mixed = DEEP.model_copy(update={"mixup": 0.4})
    _, history, whole = train(Memory(), mixed)
    assert not same(whole, train(Memory(), DEEP)[2])
    stopped = Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, mixed)
    again = train(Memory(stopped.progress), mixed)
    assert again[1] == history and same(again[2], whole)


def test_a_batch_computed_in_parts_gives_the_gradient_of_the_whole() -> None:
    frozen = DEEP.model_copy(update={"unfreeze": "head", "augment": False})
    whole, parts = (train(Memory(), frozen, accumulate=n, dropout=0.0)[2] for n in (1, 3))
    assert all(torch.allclose(whole[key], parts[key], atol=1e-5) for key in whole)


def test_frozen_batchnorm_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="batchnorm: with_stage"):
        train(Memory(), DEEP.model_copy(update={"batchnorm": "frozen"}))


def test_bf16_and_fp32_learn_the_same_thing() -> None:
    def last(precision: str) -> float:
        return float(train(Memory(), HEAD, DEEP, precision=precision)[1][-1].val_loss)

    assert last("bf16") == pytest.approx(last("fp32"), abs=0.05)


def test_an_optimiser_of_other_parameters_is_not_taken() -> None:
    network, _ = build_network(NAME, 24, 1, 2, 0.0, None, 0.9, seed=0)
    set_learning(network, DEEP)
    deep = make_optimiser(network, DEEP).state_dict()
    set_learning(network, HEAD)
    with pytest.raises(ModelError, match="belongs to other parameters"):
        restore_optimiser(make_optimiser(network, HEAD), deep)


def test_a_new_norm_layer_with_equal_values_still_learns() -> None:
    """Groups are keyed by identity: two layers of equal value are two layers."""
    network, _ = build_network(NAME, 24, 1, 2, 0.0, None, 0.9, seed=0)
    set_learning(network, DEEP)
    optimiser = make_optimiser(network, DEEP)
    grouped = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    norms = [m.weight for m in network.stages["layer4"].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert torch.equal(norms[0], norms[1]) and {id(norms[0]), id(norms[1])} <= set(grouped)


def test_unfreezing_goes_from_the_head_down() -> None:
    assert unfrozen_stages(HEAD, STAGES) == ("head",)
    assert unfrozen_stages(DEEP, STAGES) == ("layer3", "layer4", "head")
    assert unfrozen_stages(ALL, STAGES) == STAGES
    named = PhaseConfig(name="x", unfreeze=("layer4",), epochs=1, lr=1)
    assert unfrozen_stages(named, STAGES) == ("layer4", "head")
    with pytest.raises(ConfigError, match="frozen stage above"):
        unfrozen_stages(PhaseConfig(name="x", unfreeze=("layer2",), epochs=1, lr=1), STAGES)
    with pytest.raises(ConfigError, match="names stage 'layer9'"):
        unfrozen_stages(PhaseConfig(name="x", unfreeze=("layer9",), epochs=1, lr=1), STAGES)


def test_learning_rates_fall_with_depth() -> None:
    assert learning_rates(DEEP, STAGES) == {"layer3": 0.00125, "layer4": 0.0025, "head": 0.005}


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    for name, end in (("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)):
        phase = HEAD.model_copy(update={"schedule": name})
        factors = [rate_factor(phase, step, 100) for step in range(100)]
        assert factors[9] == 1.0
        assert factors[0] == 0.1
        assert factors[-1] == pytest.approx(end, abs=0.02)


def test_folds_share_what_a_frozen_trunk_hands_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fold computes nothing below the boundary, and learns what it would learn alone."""
    from dataclasses import replace

    from medtl.model.cache import Trunk

    plain = HEAD.model_copy(update={"augment": False, "epochs": 3})
    whole = material()
    pool = list(range(36))

    def fold(number: int) -> Material:
        held = [row for row in pool if row % 3 == number]
        rest = [row for row in pool if row % 3 != number]
        patients = [f"p-{row // 2}" for row in rest]
        train, val = replace(whole.train, rows=rest), replace(whole.val, rows=held)  # type: ignore[type-var]
        return replace(whole, train=train, val=val, groups=patients, pool=pool)

    options = {"cache": {"use": "always"}, "store": FolderActivations(tmp_path, 100)}
    train(Memory(), plain, material=fold(0), **options)
    asked: list[int] = []
    real = Trunk.__call__
    monkeypatch.setattr(Trunk, "__call__", lambda trunk, images: (asked.append(len(images)), real(trunk, images))[1])
    _, history, state = train(
        Memory(), plain, material=fold(1), cache={"use": "always"}, store=FolderActivations(tmp_path, 100)
    )
    assert asked == []
    alone = train(Memory(), plain, material=replace(fold(1), pool=None))
    assert history == alone[1] and same(state, alone[2])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_moves_what_it_says_and_nothing_else(strategy: str) -> None:
    phases = tuple(p.model_copy(update={"epochs": 1}) for p in STRATEGIES[strategy])
    devices.make_deterministic(0, 1)
    start = build_network(NAME, 24, 1, 2, 0.1, None, 0.9, seed=0)[0].state_dict()
    # the network counts as one with weights: frozen BatchNorm would be refused otherwise
    done, history, state = train(Memory(), *phases, weights="some.pth")
    assert [p.name for p in done] == [p.name for p in phases] and len(history) == len(phases)
    assert all(p.frozen_digest_before == p.frozen_digest_after for p in done)
    assert done[-1].kept, "the judge says that every phase is better"
    moved = {key for key, value in state.items() if not torch.equal(value, start[key])}
    allowed = {name for p in done for name in p.trainable}
    if any(p.batchnorm == "with_stage" for p in phases):
        allowed |= {key for key in state if "running_" in key or "num_batches" in key}
    assert moved and moved <= allowed
    frozen = {stage for p in done for stage in p.frozen} - {stage for p in done for stage in p.unfrozen}
    assert not any(key.split(".")[1] in frozen for key in moved)
