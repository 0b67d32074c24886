"""What the network from scratch learns with, where the config does not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtl.config import STRATEGIES, Config, ModelConfig, PhaseConfig, load_config
from pipelines.training import scratch_model

HEAD = {"name": "head", "unfreeze": "head", "epochs": 2}
CONFIGS = Path(__file__).parents[2] / "configs"


def reference(*phases: dict[str, object], **more: object) -> tuple[PhaseConfig, ...]:
    model = scratch_model(ModelConfig.model_validate({"weights": "imagenet", "phases": phases, **more}))
    assert model.weights == "none"
    return model.schedule


def test_it_learns_as_the_last_listed_phase_that_unfreezes_everything() -> None:
    last = {"name": "all", "unfreeze": "all", "epochs": 28, "lr": 3e-3, "decay": 0.8, "weight_decay": 1e-2,
            "loss": "focal", "l2_sp": 0.1, "mixup": 0.2}  # fmt: skip
    (found,) = reference(HEAD, {"name": "first", "unfreeze": "all", "lr": 1e-5}, last)
    assert (found.epochs, found.lr, found.weight_decay, found.loss, found.mixup) == (31, 3e-3, 1e-2, "focal", 0.2)
    assert (found.decay, found.batchnorm, found.l2_sp, found.unfreeze) == (1.0, "with_stage", 0.0, "all")


@pytest.mark.parametrize("phases", [[HEAD], [HEAD, {"name": "deep", "unfreeze": 2, "lr": 1e-4, "epochs": 20}]])
def test_where_nothing_unfreezes_everything_it_is_the_strategy(phases: list[dict[str, object]]) -> None:
    (plain,) = STRATEGIES["scratch"]
    epochs = max(plain.epochs, 2 if len(phases) == 1 else 22)
    assert reference(*phases) == (plain.model_copy(update={"epochs": epochs}),)


@pytest.mark.parametrize("strategy", ["features", "probe", "staged", "lp-ft", "full"])
def test_a_strategy_by_name_is_compared_with_the_one_called_scratch(strategy: str) -> None:
    model = ModelConfig.model_validate({"weights": "imagenet", "phases": strategy})
    epochs = sum(phase.epochs for phase in STRATEGIES[strategy])
    (plain,), (found,) = STRATEGIES["scratch"], scratch_model(model).schedule
    assert found == plain.model_copy(update={"epochs": max(plain.epochs, epochs)})


def test_what_the_config_says_is_what_counts() -> None:
    own = {"name": "own", "unfreeze": "all", "lr": 7e-4, "epochs": 3}
    assert reference(HEAD, {"name": "all", "unfreeze": "all"}, scratch_phases=[own]) == (PhaseConfig(**own),)


def test_drive_gives_both_the_same_rate_and_length() -> None:
    config: Config = load_config(CONFIGS / "drive.yaml")
    (found,) = scratch_model(config.model).schedule
    wanted = {"name": "scratch", "unfreeze": "all", "epochs": 30, "lr": 3e-3, "decay": 1.0, "batchnorm": "with_stage",
              "weight_decay": 1e-2}  # fmt: skip
    assert found == PhaseConfig(**wanted)
