"""Every config that ships is one that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtl.config import load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"demo", "malaria", "pneumoniamnist", "ham10000"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_names_no_place(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    values = [line.split("#")[0] for line in path.read_text().splitlines()]
    assert not [line for line in values if ": /" in line or "../" in line or "~" in line]
