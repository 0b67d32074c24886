"""What nothing wanted for long goes on a person's word, and only what is made again; the trail knows of each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medtl.artifacts import Store, verify
from medtl.audit import AuditLog
from medtl.config import Config, load_config
from medtl.errors import StorageError
from medtl.registry.history import Word
from pipelines import results, steps, upkeep
from pipelines.cli import call
from pipelines.trail import verify_workspace

pytestmark = [pytest.mark.prefect, pytest.mark.slow]
WORD = ["--by", "N. Engineer", "--role", "operations", "--reason", "the disk is small"]
GATE = "registry.promotion.gate=[{metric: auroc, bound: value, at_least: 0.0}]"  # of the finished runs
SAID = Word("N. Engineer", "operations", "the disk is small")


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def config(finished: Path, workspace: Path) -> Config:
    return load_config(finished.parent / "tiny.yaml", [f"workspace={workspace}", GATE])


def medtl(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    code = call([*map(str, arguments), "--json"])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return code, json.loads(lines[-1]) if lines else None, said.err


def age(workspace: Path, days: float = 40.0) -> None:
    """Let everything in a workspace be so old."""
    then = time.time() - days * 86_400
    for path in (workspace, *workspace.rglob("*")):
        os.utime(path, (then, then))


def named(found: list[upkeep.Unused]) -> list[str]:
    return sorted(one.folder.split("/")[1] for one in found)


def faults(workspace: Path) -> list[str]:
    trail = AuditLog(workspace)
    return [fault.where for fault in verify_workspace(workspace, trail.verify(), trail.events())]


def digests(workspace: Path) -> dict[str, str]:
    return {p.parent.relative_to(workspace).as_posix(): verify(p.parent) for p in workspace.rglob("manifest.json")}


def test_only_copies_of_pixels_go_and_a_run_makes_the_same_again(
    workspace: Path, config: Config, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, before = ["--workspace", workspace], digests(workspace)
    assert medtl(capsys, "audit", "sweep", *here)[1]["found"] == []
    age(workspace)
    code, told, _ = medtl(capsys, "audit", "sweep", *here)
    assert code == 0 and not told["deleted"] and digests(workspace) == before
    folders = [one["folder"] for one in told["found"]]
    assert sorted(folder.split("/")[1] for folder in folders) == ["pack", "pixels"]  # both runs have one of each
    assert told["megabytes"] == pytest.approx(sum(one["megabytes"] for one in told["found"]), abs=0.1)
    assert all(one["since"] < "2027" and one["since"].endswith("+00:00") for one in told["found"])
    assert medtl(capsys, "audit", "sweep", "--delete", *here)[0] == 2
    assert medtl(capsys, "audit", "sweep", "--delete", *WORD[:4], *here)[0] == 2
    assert medtl(capsys, "audit", "sweep", "--unused", 6, *here)[0] == 2
    assert digests(workspace) == before

    code, told, _ = medtl(capsys, "audit", "sweep", "--delete", *WORD, *here)
    assert code == 0 and told["deleted"] and [one["folder"] for one in told["found"]] == folders
    assert digests(workspace) == {name: digest for name, digest in before.items() if name not in folders}
    assert faults(workspace) == []
    swept = [event for event in AuditLog(workspace).events() if event["action"] == "result.swept"]
    assert [(event["details"]["folder"], event["subject"]) for event in swept] == [(f, before[f]) for f in folders]
    assert all(event["details"]["reason"] == "the disk is small" for event in swept)
    assert results.finished_run(config) is None

    command = [sys.executable, "-m", "pipelines.cli", "run", str(finished.parent / "tiny.yaml"), "--json"]
    command += ["--set", f"workspace={workspace}", "--set", GATE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "a result of this run is gone; making it again" in done.stderr
    assert digests(workspace) == before and faults(workspace) == []
    assert results.finished_run(config) is not None


def test_what_was_wanted_since_stays_and_so_do_the_pixels_it_rests_on(workspace: Path, config: Config) -> None:
    age(workspace)
    steps.ingest_scans(config)  # finds what it did before
    assert named(upkeep.unused(workspace, 30)) == ["pack"]
    assert results.finished_run(config) is not None
    assert upkeep.unused(workspace, 30) == []


def test_pixels_that_were_swept_come_back_with_the_next_ingest(workspace: Path, config: Config) -> None:
    age(workspace)
    found = upkeep.unused(workspace, 30)
    before = digests(workspace)
    assert len(upkeep.sweep(workspace, 30, found, SAID)[0]) == 2
    assert results.finished_ingest(config) is None
    scans = steps.ingest_scans(config)
    assert scans.reused and results.finished_ingest(config) is not None
    now = digests(workspace)
    assert {name for name in before if name not in now} == {one.folder for one in found if "/pack/" in one.folder}
    assert all(before[name] == digest for name, digest in now.items()) and faults(workspace) == []


def test_segments_of_other_settings_go_when_nothing_wants_their_scans(workspace: Path, config: Config) -> None:
    other = config.model_copy(update={"scans": config.scans.model_copy(update={"max_megapixels": 90.0})})
    (first,) = (workspace / "artifacts" / "pixels").iterdir()
    steps.ingest_scans(other)
    (second,) = set((workspace / "artifacts" / "pixels").iterdir()) - {first}
    for newer, older in ((first, second), (second, first)):  # of two with the same pixels the one that was used last
        age(workspace)
        steps.ingest_scans(other)
        os.utime(newer, (time.time() - 35 * 86_400,) * 2)
        found = [one.folder for one in upkeep.unused(workspace, 30) if "/pixels/" in one.folder]
        assert found == [older.relative_to(workspace).as_posix()]


def test_what_was_altered_is_left_for_whoever_asks(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((workspace / "artifacts" / "pack").glob("*/*.npy"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    age(workspace)
    code, told, why = medtl(capsys, "audit", "sweep", "--delete", *WORD, "--workspace", workspace)
    inside = path.parent.relative_to(workspace).as_posix()
    assert code == 1 and told["altered"] == [inside] and inside in why and path.exists()
    assert [one["folder"].split("/")[1] for one in told["found"]] == ["pixels"]
    assert faults(workspace) == [inside]


def test_training_that_was_given_up_goes_and_what_goes_on_stays(workspace: Path) -> None:
    for name in ("fit-old", "fit-young"):
        (workspace / "unfinished" / name).mkdir(parents=True)
        (workspace / "unfinished" / name / "progress.safetensors").write_bytes(bytes(200_000))
    age(workspace)
    (workspace / "unfinished" / "fit-young" / "progress.safetensors").touch()
    found = upkeep.unused(workspace, 30)
    assert named(found) == ["fit-old", "pack", "pixels"]
    assert next(one.megabytes for one in found if not one.is_result) == 0.2
    gone, _ = upkeep.sweep(workspace, 30, found, SAID)
    assert gone == found
    assert [path.name for path in (workspace / "unfinished").iterdir()] == ["fit-young"]
    assert [e["subject"] for e in AuditLog(workspace).events() if e["action"] == "unfinished.swept"] == ["fit-old"]
    assert faults(workspace) == []


def test_what_is_wanted_between_the_list_and_the_deed_stays(workspace: Path) -> None:
    age(workspace)
    found = upkeep.unused(workspace, 30)
    pack = next(one.folder for one in found if "/pack/" in one.folder)
    Store(workspace).mark_used(workspace / pack)
    gone, altered = upkeep.sweep(workspace, 30, found, SAID)
    assert [one.folder for one in gone] == [one.folder for one in found if one.folder != pack] and altered == []
    assert (workspace / pack).is_dir() and faults(workspace) == []


def test_half_of_a_deleted_result_never_passes_for_one(
    workspace: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(workspace)
    (found,) = (one for one in upkeep.unused(workspace, 30) if "/pixels/" in one.folder)

    def fails(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            next(folder.rglob("*.bin")).unlink()
            raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(upkeep.shutil, "rmtree", fails)
        with pytest.raises(StorageError, match="it is entered"):
            upkeep.sweep(workspace, 30, [found], SAID)
    assert not (workspace / found.folder).exists() and faults(workspace) == []
    steps.ingest_scans(config)
    assert (workspace / found.folder).is_dir() and faults(workspace) == []
    assert list((workspace / "artifacts").glob("*/.*")) == []  # the half of it was rubbish of a day ago
