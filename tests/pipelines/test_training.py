"""Two processes train as one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


def test_processes_end_with_the_one_that_started_them(config_file: Path, tmp_path: Path) -> None:
    """After ``kill -9`` of the command nobody else would end them, and they would train beside the next run."""
    command = [sys.executable, "-m", "pipelines.cli", "train", str(config_file), "--set", "model.processes=2"]
    command += ["--set", "model.backbone=squeezenet1_0", "--set", f"workspace={tmp_path / 'killed'}"]
    command += ["--set", "model.phases=[{name: head, unfreeze: head, epochs: 9000}]"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    saved = (tmp_path / "killed" / "unfinished").glob
    try:
        assert eventually(lambda: bool(list(saved("*/progress.safetensors"))), 120)
    finally:
        assert len(servers_of(process.pid)) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    try:
        assert eventually(lambda: not workers_of(tmp_path / "killed") and not servers_of(process.pid), 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("moment", ["before the flow", "in it"])
def test_nothing_outlives_a_command_that_is_ended(config_file: Path, tmp_path: Path, moment: str) -> None:
    """SIGTERM to the command alone, as a service manager's stop or ``kill`` sends it, also ends Prefect's server."""
    command = [sys.executable, "-m", "pipelines.cli", "train", str(config_file), "--set", f"workspace={tmp_path / 'w'}"]
    command += ["--set", "model.phases=[{name: head, unfreeze: head, epochs: 9000}]"]
    reached = "*" if moment == "before the flow" else "unfinished/*/progress.safetensors"
    said = tmp_path / "stderr.txt"
    with said.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        assert eventually(lambda: bool(list((tmp_path / "w").glob(reached))), 120)
        process.terminate()
        assert process.wait(60) == 143, said.read_text()[-2000:]
        assert "the same command goes on from here" in said.read_text()
        assert eventually(lambda: not alive(process.pid) and not servers_of(process.pid), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(("number", "server"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_stop_of_everything_at_once_is_obeyed(
    config_file: Path, tmp_path: Path, number: signal.Signals, server: bool
) -> None:
    """A service manager ends Prefect's server at the same moment: nobody is left to tell. Ctrl-C leaves it alone."""
    command = [sys.executable, "-m", "pipelines.cli", "train", str(config_file), "--set", f"workspace={tmp_path / 'w'}"]
    command += ["--set", "model.phases=[{name: head, unfreeze: head, epochs: 9000}]"]
    said = tmp_path / "stderr.txt"
    with said.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it is off in what a shell started with &
        )
    try:
        assert eventually(lambda: bool(list((tmp_path / "w").glob("unfinished/*/progress.safetensors"))), 120)
        (of_prefect,) = servers_of(process.pid)
        if server:
            os.kill(of_prefect, signal.SIGKILL)
        os.killpg(process.pid, number)
        assert process.wait(60) == 128 + number, said.read_text()[-2000:]
        assert "the same command goes on from here" in said.read_text()
        assert eventually(lambda: not alive(process.pid) and not servers_of(process.pid), 20)
        assert server or "run.failed" in (tmp_path / "w" / "audit.jsonl").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def alive(group: int) -> bool:
    """Tell whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def commands() -> dict[int, str]:
    """Give the command lines of all living processes."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            lines[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return lines


def workers_of(workspace: Path) -> list[int]:
    """Give the processes that work on a job of this workspace."""
    return [pid for pid, line in commands().items() if "pipelines.worker" in line and str(workspace) in line]


def servers_of(command: int) -> list[int]:
    """Give the processes that are Prefect's server for a command."""
    return [pid for pid, line in commands().items() if f"pipelines.server {command} " in line]


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False
