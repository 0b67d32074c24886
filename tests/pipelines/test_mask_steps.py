"""The steps of a segmentation that need no training: what they depend on, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medtl.config import Config, parse_config
from medtl.dataset.io import read_grid
from medtl.errors import ConfigError, PlanError
from medtl.model.segmenter import choose
from medtl.records import Artifact
from pipelines import look, segmenting, steps
from pipelines.prepared import Prepared


def write_pictures(folder: Path, bits: int = 8, odd: int = -1) -> Path:
    """Write twelve pictures with a bright square and a mask each; one of them, ``odd``, with 16 bits."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = ["image,mask,patient"]
    for number in range(12):
        row, column = rng.integers(4, 30, 2)
        deep = bits == 16 or number == odd
        values, mask = rng.normal(90, 20, (48, 48)), np.zeros((48, 48), np.uint8)
        values[row : row + 12, column : column + 12] += 80
        mask[row : row + 12, column : column + 12] = 1 + number % 2
        values = np.clip(values, 0, 255) * (200 if deep else 1)
        Image.fromarray(values.astype(np.uint16 if deep else np.uint8)).save(folder / f"i{number}.png")
        Image.fromarray(mask).save(folder / f"m{number}.png")
        rows.append(f"i{number}.png,m{number}.png,patient-{number}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def config_of(folder: Path, structures: dict[str, int], **more: Any) -> Config:
    labels = {"path": "image", "mask": "mask", "structures": structures}
    raw = {
        "name": "squares", "workspace": str(folder / "w"), "scans": {"source": str(folder / "study")},
        "studies": {"labels": labels}, "model": {"weights": "none"}, **more,
    }  # fmt: skip
    return parse_config(raw)


def prepared(config: Config) -> tuple[Artifact, Artifact, Artifact]:
    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    return scans, cohort, steps.split_by_patient(config, scans, cohort)


def test_other_structures_are_another_plan_though_the_split_is_the_same(tmp_path: Path) -> None:
    write_pictures(tmp_path / "study")
    plans = []
    for structures in ({"odd": 2, "even": 1}, {"odd": 1, "even": 2}):
        config = config_of(tmp_path, structures)
        plan = read_grid(segmenting.plan_grid(config, *prepared(config)).path)
        assert {one.name: one.values[0] for one in plan.structures} == structures
        plans.append(plan)
    assert plans[0] != plans[1]


def test_a_picture_of_another_depth_is_refused_before_it_is_packed(tmp_path: Path) -> None:
    write_pictures(tmp_path / "study", odd=3)
    config = config_of(tmp_path, {"odd": 2, "even": 1})
    scans, cohort, split = prepared(config)
    plan = segmenting.plan_grid(config, scans, cohort, split)
    with pytest.raises(PlanError, match="scans do not fit the plan"):
        segmenting.pack_volumes(config, scans, cohort, plan)


@pytest.mark.parametrize(
    "more",
    [
        {"registry": {"promotion": {"incumbent": {}}}},
        {"registry": {"promotion": {"subgroup_floor": {"at_least": 0.7}}}},
        {"dataset": {"folds": {"repeats": 2}}},
    ],
)
def test_what_is_for_diagnosis_is_refused_by_name(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="for diagnosis only"):
        config_of(tmp_path, {"odd": 2}, **more)


def test_a_value_twice_in_a_structure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several different ones"):
        config_of(tmp_path, {"odd": [1, 1]})  # type: ignore[dict-item]


def test_phases_are_shown_with_how_often_they_are_gone_through(tmp_path: Path) -> None:
    once, *_ = look.strategies(config_of(tmp_path, {"odd": 1}))
    twice, *_ = look.strategies(config_of(tmp_path, {"odd": 1}, model={"segmenter": {"refit": True}}))
    assert "twice" in twice and "twice" not in once


@pytest.mark.parametrize("network", ["auto", "encoder_unet", "dynunet"])
@pytest.mark.parametrize("phases", ["scratch", "full"])
def test_a_second_training_starts_where_the_first_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phases: str, network: str
) -> None:
    """A strategy by name may say that there are no weights; the phases that are done again do not."""
    config = config_of(tmp_path, {"bright": 1}, model={"phases": phases, "segmenter": {"network": network}})
    (wanted,) = config.model.schedule
    done = SimpleNamespace(kept=True, chance_better=None, best_epoch=2, name=wanted.name)
    monkeypatch.setattr("medtl.model.io.read_checkpoint", lambda folder: SimpleNamespace(phases=(done,)))
    asked: list[Config] = []
    monkeypatch.setattr(segmenting, "_fit_one", lambda given, *_: asked.append(given))
    artifact = Artifact("checkpoint", "", "", tmp_path, reused=True)
    segmenting.refit_masks(config, Prepared(*[artifact] * 5), artifact)
    (again,) = asked
    assert again.model.origin == config.model.origin == ("none" if phases == "scratch" else "imagenet")
    assert choose(again.model) == choose(config.model)
    assert [(one.epochs, one.lr) for one in again.model.schedule] == [(2, wanted.lr)]
