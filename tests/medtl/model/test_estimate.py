"""The forecast is near what training takes, and training is not touched by it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medtl.config import ModelConfig, PhaseConfig, TransformsConfig
from medtl.dataset.loading import EvaluationBatches, TrainingBatches
from medtl.model import devices, fit
from medtl.model.estimate import PhaseForecast, describe, forecast, work_units
from medtl.model.fit import Material
from medtl.model.io import FolderActivations, build_network
from medtl.model.surgery import StagedNetwork
from medtl.model.trainer import Progress

NAME = "monai_resnet10_narrow"
HEAD = PhaseConfig(name="head", unfreeze="head", epochs=4, augment=False)
DEEP = PhaseConfig(name="deep", unfreeze=2, epochs=2, batchnorm="with_stage")
ALL = PhaseConfig(name="all", unfreeze="all", epochs=2, batchnorm="with_stage")
SOLVED = PhaseConfig(name="solved", unfreeze="head", head="logistic_regression", augment=False)


class Forgetful:
    """Keep no progress."""

    def load(self) -> Progress | None:
        return None

    def save(self, progress: Progress) -> None:
        del progress


def material(n: int = 48, side: int = 24, batch_size: int = 8) -> Material:
    rng = np.random.default_rng(0)
    images, targets = rng.integers(0, 255, (n, side, side, 1), dtype=np.uint8), np.eye(2)[np.arange(n) % 2]
    train = TrainingBatches(images, targets, list(range(n * 2 // 3)), batch_size, TransformsConfig(), 0)
    val = EvaluationBatches(images, targets, list(range(n * 2 // 3, n)), batch_size)
    patients = [f"p-{row}" for row in train.rows]
    return Material(train, val, "binary", patients, lambda chosen, view: f"{chosen}-{view}", lambda new, old: 1.0)


def network(side: int = 24) -> StagedNetwork:
    devices.make_deterministic(0, 1)
    return build_network(NAME, side, 1, 2, 0.1, None, 0.9, seed=0)[0]


def config(*phases: PhaseConfig, **options: Any) -> ModelConfig:
    given = {"backbone": NAME, "weights": "none", "batch_size": 8, "precision": "fp32", "device": "cpu", **options}
    return ModelConfig(phases=phases, **given)


def test_every_phase_is_forecast_and_nothing_is_touched() -> None:
    given, state = network(), torch.get_rng_state()
    before = {key: value.clone() for key, value in given.state_dict().items()}
    head, deep, whole = forecast(given, material(), config(HEAD, DEEP, ALL))
    assert [one.name for one in (head, deep, whole)] == ["head", "deep", "all"]
    assert [one.boundary for one in (head, deep, whole)] == [5, 3, 0]
    assert head.trainable_parameters < deep.trainable_parameters < whole.trainable_parameters
    assert head.trainable_parameters == sum(p.numel() for p in given.stages["head"].parameters())
    assert head.peak_mb < deep.peak_mb < whole.peak_mb
    assert all(one.seconds > 0 for one in (head, deep, whole))
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in given.parameters())


def test_what_is_kept_costs_its_pass_once() -> None:
    setup = config(HEAD, DEEP, ALL, cache={"use": "always"})
    kept = forecast(network(), material(), setup, room_mb=1000)
    assert [one.kept for one in kept] == [True, True, False]
    assert kept[1].preparation_s < kept[0].preparation_s / 2  # the first pass kept its boundary too
    assert kept[2].preparation_s == 0  # nothing is frozen
    live = forecast(network(), material(), setup)
    assert not any(one.kept for one in live)
    assert kept[0].epoch_s < live[0].epoch_s
    assert not any(one.kept for one in forecast(network(), material(), setup, room_mb=0.0))


def test_a_pass_over_more_images_takes_longer() -> None:
    setup = config(HEAD, cache={"use": "always"})
    few, many = (forecast(network(), material(n), setup, room_mb=1000)[0] for n in (48, 4800))
    assert many.preparation_s > 8 * few.preparation_s
    assert many.epoch_s > 8 * few.epoch_s


def test_a_trunk_that_moved_is_passed_again() -> None:
    phases = [p.model_copy(update={"name": str(n)}) for n, p in enumerate((HEAD, ALL, HEAD))]
    found = forecast(network(), material(), config(*phases, cache={"use": "always"}), room_mb=1000)
    assert [one.preparation_s > 0 for one in found] == [True, False, True]


def test_seconds_are_near_what_training_takes(tmp_path: Path) -> None:
    """Three tries, for a machine that does other things too: the nearest counts."""
    setup, data = config(HEAD, DEEP, ALL, batch_size=16), material(240, 48, 16)
    nearest = np.inf
    for attempt in range(3):
        said = sum(one.seconds for one in forecast(network(48), data, setup, room_mb=1000))
        store = FolderActivations(tmp_path / str(attempt), 1000)
        started = time.perf_counter()
        fit.fit(network(48), data, setup, 0, Forgetful(), store)
        nearest = min(nearest, abs(np.log(said / (time.perf_counter() - started))))
        if nearest < np.log(2.5):
            break
    assert nearest < np.log(2.5)


CHILD = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_estimate as t
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
small = t.config(t.ALL.model_copy(update={"epochs": 1}), batch_size=4)
t.fit.fit(t.network(96), t.material(12, 96, 4), small, 0, t.Forgetful())
setup, data, network = t.config(t.ALL.model_copy(update={"epochs": 1}), batch_size=64), t.material(192, 96, 64), None
network = t.network(96)
before = peak()
(whole,) = t.forecast(t.network(96), t.material(12, 96, 4), small)
t.fit.fit(network, data, setup, 0, t.Forgetful())
after = peak()
(said,) = t.forecast(network, data, setup)
print(said.peak_mb - whole.peak_mb, after - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory as Linux tells it")
def test_memory_is_near_what_training_takes() -> None:
    """Grow the batch from 4 to 64: the process grows by what the forecasts differ."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)], capture_output=True, text=True, check=True
    )
    said, grown = map(float, done.stdout.split())
    assert grown > 30  # else the batch is too small to show
    assert 0.5 < said / grown < 2


def test_parts_of_a_batch_need_less_memory() -> None:
    (whole,) = forecast(network(48), material(48, 48, 32), config(ALL, batch_size=32))
    (parts,) = forecast(network(48), material(48, 48, 32), config(ALL, batch_size=32, accumulate=8))
    assert parts.peak_mb < 0.6 * whole.peak_mb


@pytest.mark.parametrize("head", ["logistic_regression", "linear_svm", "knn"])
def test_a_head_that_is_solved_is_forecast_too(head: str) -> None:
    phase = SOLVED.model_copy(update={"head": head})
    (found,) = forecast(network(), material(), config(phase), room_mb=1000)
    assert found.epochs == 1
    assert 0 < found.seconds < 60
    assert found.preparation_s > 0


def test_narrow_numbers_are_forecast() -> None:
    (found,) = forecast(network(), material(), config(DEEP, precision="bf16"))
    assert found.seconds > 0


DONE = PhaseForecast("head", 4, 40.0, 8.0, 8.0, 400.0, 1026, 5, True)
LONG = PhaseForecast("all", 1, 7000.0, 0.0, 7000.0, 2500.0, 11_000_000, 0, False)


def test_a_forecast_reads_as_a_sentence() -> None:
    assert describe([DONE, LONG]).splitlines() == [
        "phase head: 4 epochs, about 40 s, 0.4 GB, 1,026 parameters learn, frozen layers run once",
        "phase all: 1 epoch, about 1.9 h, 2.5 GB, 11,000,000 parameters learn",
        "all phases: about 2.0 h, 2.5 GB at most",
    ]


def test_an_epoch_stands_for_its_seconds() -> None:
    phases = [HEAD, ALL.model_copy(update={"epochs": 1})]
    assert work_units([DONE, LONG], phases) == [10.0, 7000.0]
    with pytest.raises(ValueError, match="other phases"):
        work_units([DONE], [ALL])
