"""Real scans with real labels (make test-data)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.data, pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
WEIGHTS = "squeezenet1_0-deepcompression.pth"


def run(name: str, data: Path, workspace: Path, *more: str) -> dict[str, Any]:
    sets = [f"scans.source={data / 'data' / name}", f"model.weights={data / 'weights' / WEIGHTS}"]
    sets += [f"workspace={workspace}", *more]
    command = [sys.executable, "-m", "pipelines.cli", "run", str(ROOT / "configs" / f"{name}.yaml"), "--json"]
    for one in sets:
        command += ["--set", one]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def test_malaria_by_patient_reaches_what_staged_transfer_should(real_data: Path, tmp_path: Path) -> None:
    summary = run("malaria", real_data, tmp_path)
    assert summary["metrics"]["auroc"]["value"] >= 0.98
    assert summary["scratch"]["auroc"]["value"] < summary["metrics"]["auroc"]["high"]
    assert sum(summary["split"].values()) == 4040


SHORT = (
    "model.phases=[{name: head, unfreeze: head, epochs: 1, lr: 2e-3}, {name: deep, unfreeze: 2, epochs: 2, lr: 1e-3}]"
)


def test_pneumoniamnist_runs_on_its_own_split(real_data: Path, tmp_path: Path) -> None:
    summary = run("pneumoniamnist", real_data, tmp_path, SHORT, "model.scratch=false", "registry.promotion.gate=[]")
    assert summary["split"]["val"] == 524
    assert summary["metrics"]["auroc"]["low"] > 0.9
    assert summary["excluded"]["copy_across_parts"] > 0


def test_ham10000_reports_seven_classes(real_data: Path, tmp_path: Path) -> None:
    summary = run("ham10000", real_data, tmp_path, SHORT, "model.scratch=false")
    assert summary["metrics"]["auroc"]["value"] > 0.75
    evaluation = next((tmp_path / "artifacts" / "evaluation").glob("*/evaluation.json"))
    assert len(json.loads(evaluation.read_text())["classes"]) == 7


@pytest.mark.parametrize(
    ("policy", "taken"),
    [
        ("{}", 12),  # the others are secondary captures, ultrasound without a word on burned-in text, broken, or copies
        ("{derived: accept, burned_in: accept, multi_frame: accept}", 90),
    ],
)
def test_pydicoms_own_files_are_taken_or_refused_each_with_a_reason(
    real_data: Path, tmp_path: Path, policy: str, taken: int
) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "ingest", str(ROOT / "configs" / "malaria.yaml"), "--json"]
    settings = {
        "scans.source": real_data / "data" / "dicom" / "pydicom",
        "scans.read": "auto" if policy == "{}" else "images",
        "scans.checks.policy": policy,
        "workspace": tmp_path,
    }
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["files"] - summary["excluded_files"] >= taken
    assert summary["scans"] >= taken
    if policy == "{}":
        assert summary["scans"] + summary["excluded_files"] == summary["files"]
