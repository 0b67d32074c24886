"""The whole way on Prefect's embedded server: once, again, killed half-way, refused, scheduled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medtl.audit import AuditLog

pytestmark = [pytest.mark.prefect, pytest.mark.slow]
COMMAND = [sys.executable, "-m", "pipelines.cli"]


def medtl(*arguments: object) -> tuple[int, dict[str, Any], str]:
    """Give exit code, the last line of stdout as JSON, and stderr."""
    command = [*COMMAND, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_gives_what_it_promises_and_the_second_does_nothing(config_file: Path, tmp_path: Path) -> None:
    code, first, log = medtl("run", config_file)
    assert code == 0, log
    assert first["status"] == "candidate"
    assert sum(first["split"].values()) == 48
    assert {"auroc", "average_precision", "balanced_accuracy", "sensitivity", "brier"} <= set(first["metrics"])
    auroc = first["metrics"]["auroc"]
    assert auroc["low"] <= auroc["value"] <= auroc["high"]
    assert first["reused"] is False
    assert first["peak_memory_mb"] > 100
    page = Path(first["report"]).read_text()
    assert f"{auroc['value']:.3f}" in page
    assert "Content-Security-Policy" in page
    assert "<b>24 patients</b>" in page.partition("Scans decoded")[2].partition("</div>")[0]
    assert "Rows × columns: 32 × 32" in page

    before = files_of(tmp_path / "workspace" / "artifacts")
    code, second, log = medtl("run", config_file)
    assert code == 0
    assert second["reused"] is True
    assert "nothing to do" in log
    assert second["seconds"] < 10
    assert second["digests"] == first["digests"]
    assert files_of(tmp_path / "workspace" / "artifacts") == before

    actions = [event["action"] for event in AuditLog(tmp_path / "workspace").events()]
    assert [action for action in actions if action.startswith(("test.", "release.c"))] == [
        "test.opened",
        "release.candidate",
    ]
    assert [actions[0], *actions[-2:]] == ["run.started", "run.finished", "run.unchanged"]

    code, _, log = medtl("predict", config_file, "--scans", tmp_path / "study", "--out", tmp_path / "p.csv")
    assert code == 1
    assert "no validated release" in log
    code, summary, log = medtl(
        "predict", config_file, "--scans", tmp_path / "study", "--out", tmp_path / "p.csv", "--allow-candidate"
    )
    assert code == 0, log
    rows = (tmp_path / "p.csv").read_text().splitlines()
    assert rows[0] == "scan,file,probability_dark,probability_bright,decision,look,reason"
    assert summary["scans"] == 48
    assert len(rows) == 1 + 48  # the label table is known and not a scan
    assert (tmp_path / "p.csv").stat().st_mode & 0o777 == 0o600

    changed = next((tmp_path / "workspace" / "artifacts" / "evaluation").glob("*/evaluation.json"))
    changed.write_text(changed.read_text().replace('"n": ', '"n": 1'))
    code, _, log = medtl("run", config_file)
    assert code == 1
    assert "altered" in log


def test_a_learning_curve_trains_on_fewer_and_leaves_the_test_part_closed(config_file: Path, tmp_path: Path) -> None:
    code, summary, log = medtl("run", config_file, "--set", "report.learning_curve=3")
    assert code == 0, log
    folder = tmp_path / "workspace"
    (written,) = (folder / "artifacts" / "report").glob("*/report.json")
    found = json.loads(written.read_bytes())
    sizes = [(one["patients"], one["studies"]) for one in found["learning_curve"]["points"]]
    assert sizes == [(6, 12), (12, 24)]
    assert found["learning_curve"]["note"] == "Nothing is trained on fewer than 4 patients."
    assert all(one["score"]["metric"] == "auroc" for one in found["learning_curve"]["points"])
    assert len(list((folder / "artifacts" / "checkpoint").glob("[0-9a-f]*"))) == 2
    gained = [one["score"]["value"] for one in found["learning_curve"]["points"]]
    assert found["learning_curve"]["gain"]["value"] == pytest.approx(gained[1] - gained[0])
    assert found["split"]["test_openings"] == 1
    assert [event["action"] for event in AuditLog(folder).events()].count("test.opened") == 1
    assert "Fewer training patients, on validation" in Path(summary["report"]).read_text()
    code, again, log = medtl("run", config_file, "--set", "report.learning_curve=3")
    assert (code, again["reused"]) == (0, True), log


def test_a_gate_that_refuses_exits_3_and_keeps_the_report(config_file: Path) -> None:
    gate = "registry.promotion.gate=[{metric: auroc, bound: low, at_least: 1.01}]"
    code, summary, log = medtl(
        "run", config_file, "--set", gate, "--set", "model.phases=[{name: a, unfreeze: head, epochs: 1, lr: 0.01}]"
    )
    assert code == 3
    assert "refused" in log
    assert summary["status"] == "refused"
    assert Path(summary["report"]).is_file()


@pytest.fixture
def long_config(config_file: Path) -> Path:
    config_file.write_text(config_file.read_text().replace("epochs: 2", "epochs: 14"))
    return config_file


def test_a_run_killed_in_training_ends_with_the_same_bits(long_config: Path, tmp_path: Path) -> None:
    code, undisturbed, log = medtl("run", long_config, "--set", f"workspace={tmp_path / 'other'}")
    assert code == 0, log
    command = [*COMMAND, "run", str(long_config)]
    seen: set[int] = set()
    for _ in range(2):  # killed twice, each time somewhere else
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            saved = wait_for(lambda: saved_anew(tmp_path / "workspace" / "unfinished", seen))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert saved
    assert not list((tmp_path / "workspace" / "artifacts" / "checkpoint").glob("[0-9a-f]*"))
    code, resumed, log = medtl("run", long_config)
    assert code == 0, log
    assert "going on from where it was last saved" in log
    assert resumed["digests"] == undisturbed["digests"]
    assert resumed["release"] == undisturbed["release"]


def saved_anew(folder: Path, seen: set[int]) -> bool:
    """Tell whether progress was saved three more times since the last kill."""
    for path in folder.glob("*/progress.safetensors"):
        seen.add(path.stat().st_mtime_ns)
    if len(seen) % 4 == 3:
        seen.add(-len(seen))  # the next process has three to go
        return True
    return False


def wait_for(condition: Any, seconds: float = 90) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    return None


@pytest.fixture
def service(config_file: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (tmp_path / "serve.log").open("wb") as log:
        command = [*COMMAND, "serve", str(config_file), "--every", "15s"]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        yield process
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_scheduled_run_really_happens(service: subprocess.Popen[bytes], tmp_path: Path) -> None:
    done = wait_for(lambda: list((tmp_path / "workspace" / "runs").glob("*.json")), seconds=180)
    assert done, (tmp_path / "serve.log").read_text()[-3000:]
    summary = json.loads(done[0].read_text())["summary"]
    assert Path(summary["report"]).is_file()
    assert service.poll() is None
