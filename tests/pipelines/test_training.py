"""Two processes train as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.prefect, pytest.mark.slow]
PHASES = "[{name: head, unfreeze: head, epochs: 2}, {name: deep, unfreeze: 2, epochs: 2, lr: 5e-4}]"


def trained(config_file: Path, workspace: Path, processes: int, *more: str) -> subprocess.CompletedProcess[str]:
    settings = [f"workspace={workspace}", f"model.processes={processes}", "model.backbone=squeezenet1_0",
                "model.precision=fp32", "model.dropout=0", f"model.phases={PHASES}", *more]  # fmt: skip
    command = [sys.executable, "-m", "pipelines.cli", "train", str(config_file), "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_two_processes_give_the_weights_of_one(config_file: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        done = trained(config_file, tmp_path / f"by{processes}", processes)
        assert done.returncode == 0, done.stderr
        folder = Path(json.loads(done.stdout.splitlines()[-1])["artifact"])
        found.append(load_file(folder / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-5) for key in found[0])


def test_what_a_process_cannot_do_is_said_by_the_one_that_started_it(config_file: Path, tmp_path: Path) -> None:
    learning = "model.phases=[{name: all, unfreeze: all, batchnorm: with_stage}]"
    done = trained(config_file, tmp_path / "w", 2, "model.backbone=monai_resnet10_narrow", learning)
    assert done.returncode == 1
    assert "BatchNorm that learns cannot be shared" in done.stderr and "Traceback" not in done.stderr
