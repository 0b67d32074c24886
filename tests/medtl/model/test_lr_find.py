"""The range test finds the rate that a phase can bear, on a copy and on the training part alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.config import ModelConfig, PhaseConfig, TransformsConfig
from medtl.dataset.loading import EvaluationBatches, TrainingBatches
from medtl.errors import ConfigError, ModelError
from medtl.model.devices import make_deterministic
from medtl.model.fit import Material
from medtl.model.io import build_network
from medtl.model.lr_find import HIGHEST, LOWEST, STEPS, RangeTest, choose_phase, find_learning_rate, read_curve, smooth
from medtl.model.surgery import StagedNetwork

NAME = "monai_resnet10_narrow"
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
SOLVED = PhaseConfig(name="solved", unfreeze="head", head="logistic_regression", augment=False)
HEAD = PhaseConfig(name="head", unfreeze="head")
DEEP = PhaseConfig(name="deep", unfreeze=2, lr=0.005, decay=0.5, batchnorm="with_stage")
RATES = tuple(float(rate) for rate in np.geomspace(1e-6, 1, 100))


class Sealed:
    """A validation part that must not be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError("the range test looked at the validation part")


def material(n: int = 24, signal: int = 90, batch_size: int = 8) -> Material:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    images = rng.integers(40, 120, (n, 24, 24, 1), dtype=np.uint8)
    images[labels == 1, 6:14, 6:14] += signal
    train = TrainingBatches(images, np.eye(2)[labels], list(range(n)), batch_size, TransformsConfig(), 0)
    val: EvaluationBatches = Sealed()  # type: ignore[assignment]
    return Material(train, val, "binary", ["p"] * n, lambda chosen, view: "", lambda new, old: 1.0)


def network(dropout: float = 0.1) -> StagedNetwork:
    make_deterministic(0, 1)
    return build_network(NAME, 24, 1, 2, dropout, None, 0.9, seed=0)[0]


def config(*phases: PhaseConfig, **options: Any) -> ModelConfig:
    return ModelConfig(backbone=NAME, weights="none", batch_size=8, phases=phases, **{"precision": "fp32", **options})


@pytest.fixture(scope="module")
def found() -> RangeTest:
    return find_learning_rate(network(), material(), config(HEAD, DEEP), 0)


def test_a_phase_that_can_learn_gets_a_rate(found: RangeTest) -> None:
    assert found.phase == "deep"
    assert found.configured == 0.005
    assert found.batches == 3
    assert found.steepest is not None
    assert LOWEST < found.steepest < HIGHEST
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert min(found.smoothed) < 0.8 * found.losses[0]
    assert "head did not run before" in found.note


def test_the_same_seed_gives_the_same_record_and_another_one_does_not(found: RangeTest) -> None:
    given_network, setup = network(), config(HEAD, DEEP)
    before = {key: value.clone() for key, value in given_network.state_dict().items()}
    state, flags = torch.get_rng_state(), [p.requires_grad for p in given_network.parameters()]
    assert find_learning_rate(given_network, material(), setup, 0) == found
    assert all(torch.equal(value, before[key]) for key, value in given_network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in given_network.parameters()] == flags
    assert given_network.training
    assert find_learning_rate(given_network, material(), setup, 1).losses != found.losses


def test_parts_of_a_batch_see_the_same_losses_as_the_whole() -> None:
    still = [PhaseConfig(name="probe", unfreeze="head", augment=False, l2_sp=0.1)]
    whole = find_learning_rate(network(0.0), material(), config(*still), 0)
    parts = find_learning_rate(network(0.0), material(), config(*still, accumulate=2), 0)
    assert whole.losses[:50] == pytest.approx(parts.losses[:50], rel=1e-3)


def test_mixup_and_live_images_are_tested_as_they_are_trained() -> None:
    mixed = DEEP.model_copy(update={"mixup": 0.4, "loss": "focal"})
    assert find_learning_rate(network(), material(), config(mixed), 0).losses[0] > 0


def test_frozen_noise_is_refused_as_in_training() -> None:
    with pytest.raises(ConfigError, match="freezes BatchNorm"):
        find_learning_rate(network(), material(), config(DEEP.model_copy(update={"batchnorm": "frozen"})), 0)


def test_a_single_image_has_no_rate() -> None:
    with pytest.raises(ModelError, match="no batch of two images"):
        find_learning_rate(network(), material(n=1), config(DEEP), 0)


def test_the_first_phase_by_gradient_that_trains_the_trunk_is_chosen() -> None:
    assert choose_phase([SOLVED, HEAD, DEEP], STAGES, None) == 2
    assert choose_phase([SOLVED, HEAD], STAGES, None) == 1
    assert choose_phase([HEAD, DEEP], STAGES, "head") == 0


@pytest.mark.parametrize(
    ("phases", "name", "says"),
    [
        ([HEAD], "last", "no phase 'last'; this config has head"),
        ([SOLVED], "solved", "it has no learning rate"),
        ([SOLVED], None, "No phase of this config learns by gradient"),
    ],
)
def test_a_phase_without_a_rate_is_refused(phases: list[PhaseConfig], name: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose_phase(phases, STAGES, name)


def valley(at: float, noise: float = 0.02, depth: float = 0.5) -> list[float]:
    """Give losses that fall around a tenth of ``at``, are least at it and rise after it."""
    decades = np.log10(RATES) - np.log10(at)
    losses = 0.7 - depth / (1 + np.exp(-4 * (decades + 1))) + 2 * np.maximum(decades, 0) ** 2
    return list(losses + noise * np.random.default_rng(0).normal(size=len(losses)))


@given(st.floats(-3.5, -0.5))
@settings(max_examples=20, derandomize=True)
def test_the_valley_of_a_curve_is_found_without_lag(decade: float) -> None:
    steepest, safe, _, note = read_curve(RATES, valley(10**decade))
    assert steepest is not None
    assert safe is not None
    assert abs(np.log10(steepest) - (decade - 1)) < 0.5
    assert abs(np.log10(safe) - (decade - 1)) < 0.35
    assert "least" in note


def test_noise_alone_suggests_nothing() -> None:
    fooled = 0
    for seed in range(500):
        losses = list(0.7 + 0.1 * np.random.default_rng(seed).normal(size=len(RATES)))
        steepest, safe, _, note = read_curve(RATES, losses)
        fooled += steepest is not None
        assert note.startswith("No clear minimum") or safe is not None
    assert fooled <= 5


def test_a_loss_that_almost_vanishes_is_read_from_where_it_began() -> None:
    steepest, safe, smoothed, _ = read_curve(RATES, valley(1e-2, noise=0.01, depth=0.68))
    assert steepest is not None
    assert safe is not None
    assert smoothed[0] == pytest.approx(0.7, abs=0.02)


def test_a_loss_that_only_falls_has_no_safe_rate() -> None:
    steepest, safe, _, note = read_curve(RATES, list(np.linspace(1, 0.2, len(RATES))))
    assert steepest is not None
    assert safe is None
    assert "still falls" in note


def test_a_loss_that_breaks_away_at_once_suggests_nothing() -> None:
    assert read_curve(RATES[:4], [0.7, 0.9, 3.0, 20.0])[:2] == (None, None)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
@settings(max_examples=30, derandomize=True)
def test_smoothing_has_no_bias_and_no_lag(losses: list[float]) -> None:
    array = np.array(losses)
    assert np.allclose(smooth(np.full(len(losses), 0.7)), 0.7)
    assert np.allclose(smooth(array[::-1]), smooth(array)[::-1])
    assert array.min() - 1e-9 <= smooth(array).min()


def test_a_rate_that_breaks_the_network_ends_the_test() -> None:
    wild = DEEP.model_copy(update={"optimiser": "sgd", "batchnorm": "frozen", "unfreeze": "all", "decay": 1.0})
    given_network = network()
    with torch.no_grad():
        for parameter in given_network.stages["head"].parameters():
            parameter.mul_(1e3)
    setup = replace_weights(config(wild))
    found = find_learning_rate(given_network, material(), setup, 0)
    assert found.ended in ("diverged", "not finite")
    assert len(found.losses) < STEPS


def replace_weights(setup: ModelConfig) -> ModelConfig:
    """Say that the network has weights, so that frozen norms are allowed."""
    return setup.model_copy(update={"weights": "vault:some"})


def test_a_record_is_plain_values(found: RangeTest) -> None:
    assert replace(found, note="") != found
    assert all(type(value) is float for value in (*found.rates, *found.losses, *found.smoothed))
