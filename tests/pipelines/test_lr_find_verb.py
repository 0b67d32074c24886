"""``medtl lr-find`` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from medtl.errors import ConfigError
from pipelines.lr_find import lr_find


def call(*arguments: object) -> None:
    app = App(name="medtl")
    app.command(lr_find, name="lr-find")
    app(["lr-find", *map(str, arguments)], exit_on_error=False, print_error=False, result_action="return_value")


SETS = ("--set", "model.phases=[{name: deep, unfreeze: 2, batchnorm: with_stage}]")


def test_a_rate_is_found_and_its_page_is_written(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(config_file, *SETS, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["phase"] == "deep"
    assert len(found["rates"]) == len(found["losses"]) > 10
    page = Path(found["page"])
    assert page.parent.name == "reports"
    assert "data:image/svg+xml" in page.read_text()
    with pytest.raises(ConfigError, match="no phase 'other'"):
        call(config_file, *SETS, "--phase", "other")
    call(config_file, *SETS)
    assert "suggested (safe)" in capsys.readouterr().out
