"""A release meets labelled scans of another hospital: measured as it is, and never on whom it learned from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medtl.audit import AuditLog

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


def medtl(*arguments: object) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def test_a_release_is_measured_elsewhere_and_compared_with_what_it_was_released_with(
    finished: Path, elsewhere: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "w"
    shutil.copytree(finished, workspace)
    config = tmp_path / "tiny.yaml"
    config.write_text((finished.parent / "tiny.yaml").read_text())
    here = ("--set", f"workspace={workspace}")
    trained = [e["action"] for e in AuditLog(workspace).events()].count("checkpoint.made")
    code, found, log = medtl("elsewhere", config, "--scans", elsewhere, *here)
    assert code == 0, log
    assert (found["studies"], found["patients"]) == (32, 16)
    inside, outside, change = (found[key]["auroc"] for key in ("released_with", "metrics", "change"))
    assert change["value"] == pytest.approx(outside["value"] - inside["value"])
    assert change["low"] <= change["value"] <= change["high"]
    page = Path(found["report"]).read_text()
    assert "External validation" in page and found["release"] in page and "Nothing was fitted here" in page
    events = AuditLog(workspace).events()
    assert [e["details"]["purpose"] for e in events if e["action"] == "test.opened"][-1] == "external"
    assert events[-2]["action"] == "release.validated_elsewhere" and events[-2]["subject"] == found["release"]
    assert [e["action"] for e in events].count("checkpoint.made") == trained, "nothing is fitted"
    assert "other-" not in json.dumps(found) + page

    code, _, log = medtl("elsewhere", config, "--scans", finished.parent / "study", *here)
    assert code == 1 and "taught release" in log and "patient-" not in log
    table = elsewhere / "labels.csv"
    table.write_text(table.read_text().replace("bright", "shiny"))
    code, _, log = medtl("elsewhere", config, "--scans", elsewhere, *here)
    assert code == 1 and "Traceback" not in log
