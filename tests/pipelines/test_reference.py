"""What the network from scratch learns with, where the config does not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtl.config import STRATEGIES, Config, ModelConfig, PhaseConfig, load_config
from pipelines.segmenting import from_scratch
from pipelines.training import scratch_model

(PLAIN,) = STRATEGIES["scratch"]
HEAD = {"name": "head", "unfreeze": "head", "epochs": 2}
LAST = {"name": "all", "unfreeze": "all", "epochs": 28, "lr": 3e-3, "decay": 0.8, "weight_decay": 1e-2,
        "loss": "focal", "l2_sp": 0.1, "patience": 4}  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs"


def reference(*phases: dict[str, object], masks: bool = True, **more: object) -> PhaseConfig:
    given = {"weights": "imagenet", "phases": phases, **more}
    model = scratch_model(ModelConfig.model_validate(given), masks)
    assert model.weights == "none"
    (found,) = model.schedule
    return found


def test_a_segmentation_learns_as_the_phase_that_unfreezes_all_at_the_highest_rate() -> None:
    polish = {"name": "polish", "unfreeze": "all", "lr": 1e-5, "loss": "cross_entropy"}
    found = reference(HEAD, LAST, polish)
    assert (found.epochs, found.lr, found.weight_decay, found.loss) == (31, 3e-3, 1e-2, "focal")
    assert (found.decay, found.batchnorm, found.l2_sp, found.unfreeze) == (1.0, "with_stage", 0.0, "all")
    assert found.patience is None, "or it might not be given as many epochs"


def test_a_rate_for_tuning_is_none_to_begin_with() -> None:
    found = reference(HEAD, {"name": "all", "unfreeze": "all", "epochs": 5, "lr": 1e-5})
    assert (found.lr, found.epochs) == (PLAIN.lr, PLAIN.epochs)


@pytest.mark.parametrize("phases", [[HEAD], [HEAD, {"name": "deep", "unfreeze": 2, "lr": 1e-4, "epochs": 20}]])
def test_where_nothing_unfreezes_everything_it_is_the_strategy(phases: list[dict[str, object]]) -> None:
    epochs = max(PLAIN.epochs, 2 if len(phases) == 1 else 22)
    assert reference(*phases) == PLAIN.model_copy(update={"epochs": epochs})


def test_a_diagnosis_is_compared_with_the_strategy() -> None:
    assert reference(HEAD, LAST, masks=False) == PLAIN.model_copy(update={"epochs": 30})


@pytest.mark.parametrize("strategy", ["features", "probe", "staged", "lp-ft", "full"])
def test_so_is_a_strategy_by_name(strategy: str) -> None:
    model = ModelConfig.model_validate({"weights": "imagenet", "phases": strategy})
    epochs = sum(phase.epochs for phase in STRATEGIES[strategy])
    assert scratch_model(model).schedule == (PLAIN.model_copy(update={"epochs": max(PLAIN.epochs, epochs)}),)


@pytest.mark.parametrize("masks", [True, False])
def test_what_the_config_says_is_what_counts(masks: bool) -> None:
    own = {"name": "own", "unfreeze": "all", "lr": 7e-4, "epochs": 3}
    assert reference(HEAD, LAST, masks=masks, scratch_phases=[own]) == PhaseConfig.model_validate(own)


def test_drive_gives_both_the_same_rate_and_length() -> None:
    config: Config = load_config(CONFIGS / "drive.yaml")
    (found,) = from_scratch(config).model.schedule
    wanted = {"name": "scratch", "unfreeze": "all", "epochs": 30, "lr": 3e-3, "decay": 1.0, "batchnorm": "with_stage",
              "weight_decay": 1e-2}  # fmt: skip
    assert found == PhaseConfig.model_validate(wanted)
