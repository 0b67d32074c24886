"""Phases freeze what they say, resume to the bit, and keep the best."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from medtl.config import ModelConfig, PhaseConfig, TransformsConfig
from medtl.dataset.loading import EvaluationBatches, TrainingBatches
from medtl.errors import ConfigError, ModelError
from medtl.model import fit
from medtl.model.fit import Progress
from medtl.model.io import FolderSaver, build_network
from medtl.model.phases import learning_rates, schedule, set_learning, unfrozen_stages

NAME = "monai_resnet10_narrow"
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
HEAD = PhaseConfig(name="head", unfreeze="head", epochs=1, lr=0.01)
DEEP = PhaseConfig(name="deep", unfreeze=2, epochs=2, lr=0.005, decay=0.5)
ALL = PhaseConfig(name="all", unfreeze="all", epochs=2, lr=0.002, decay=0.5)


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


def batches(n: int = 36, seed: int = 0) -> tuple[TrainingBatches, EvaluationBatches]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(40, 120, (n, 24, 24, 1), dtype=np.uint8)
    images[labels == 1, 6:14, 6:14] += 90
    targets = np.eye(2)[labels]
    rows = list(range(n))
    train = TrainingBatches(images, targets, rows[: n * 2 // 3], 8, TransformsConfig(), seed)
    return train, EvaluationBatches(images, targets, rows[n * 2 // 3 :], 8)


def train(saver: Any, *phases: PhaseConfig, **options: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    fit.make_deterministic(0, 1)
    network, _ = build_network(NAME, 24, 1, 2, 0.1, None, 0.9, seed=0)
    config = ModelConfig(backbone=NAME, weights="none", batch_size=8, phases=phases, **options)
    data, val = batches()
    done, history = fit.fit(network, data, val, "binary", config, 0, saver)
    return done, history, network.state_dict()


def test_phases_learn_and_prove_what_they_froze() -> None:
    phases, history, _ = train(Memory(), HEAD, DEEP, ALL)
    assert [phase.name for phase in phases] == ["head", "deep", "all"]
    assert phases[0].frozen == STAGES[:-1]
    assert phases[2].frozen == ()
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


@pytest.mark.parametrize("saves", [1, 2, 3, 4])
def test_training_stopped_anywhere_ends_with_the_same_bits(saves: int, tmp_path: Any) -> None:
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
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


def test_a_frozen_layer_that_moves_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fit.validate

    def meddling(network: Any, *rest: Any) -> Any:
        with torch.no_grad():
            next(network.stages["stem"].parameters()).add_(1e-3)
        return real(network, *rest)

    monkeypatch.setattr(fit, "validate", meddling)
    with pytest.raises(ModelError, match="changed a layer that was frozen"):
        train(Memory(), HEAD)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(ModelError, match="Lower the phase's learning rate"):
        data, val = batches()
        fit.make_deterministic(0, 1)
        network, _ = build_network(NAME, 24, 1, 2, 0.0, None, 0.9, seed=0)
        with torch.no_grad():
            network.stages["head"][1].weight.fill_(float("inf"))
        fit.fit(network, data, val, "binary", ModelConfig(backbone=NAME, weights="none", phases=(HEAD,)), 0, Memory())


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
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[9] == 1.0
    assert factors[0] == 0.1
    assert factors[-1] < 0.01


def test_class_balance_weighs_the_rare_class_more() -> None:
    data, _ = batches()
    targets = np.eye(2)[np.array([0] * 30 + [1] * 6)]
    rare = TrainingBatches(data.images, targets, range(36), 8, TransformsConfig(), 0)
    weights = fit.class_weights(rare, ModelConfig(class_balance=True), "binary")
    assert weights is not None
    assert weights == pytest.approx([0.6, 3.0])
    with pytest.raises(ModelError, match="multi-label"):
        fit.class_weights(rare, ModelConfig(class_balance=True), "multilabel")


def test_unknown_labels_do_not_enter_a_multilabel_loss() -> None:
    logits = torch.tensor([[0.0, 50.0]])
    known = fit.loss_of(logits, np.array([[1.0, np.nan]]), "multilabel", 0.0, torch.device("cpu"))
    assert float(known) == pytest.approx(np.log(2), abs=1e-5)
