"""What nothing wanted for long goes on a person's word, and only what is made again; the trail knows of each."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medtl.artifacts import Store, verify
from medtl.audit import AuditLog
from medtl.config import Config, load_config
from medtl.errors import StorageError, TamperedError
from medtl.records import Artifact
from medtl.registry.history import Word
from pipelines import advise, lr_find, results, steps, upkeep
from pipelines.trail import recorded, verify_workspace
from verbs import faults_of, medtl

pytestmark = [pytest.mark.prefect, pytest.mark.slow]
WORD = ["--by", "N. Engineer", "--role", "operations", "--reason", "the disk is small"]
GATE = "registry.promotion.gate=[{metric: auroc, bound: value, at_least: 0.0}]"  # of the finished runs
SAID = Word("N. Engineer", "operations", "the disk is small")


@pytest.fixture
def config(finished: Path, workspace: Path) -> Config:
    return load_config(finished.parent / "tiny.yaml", [f"workspace={workspace}", GATE])


def age(workspace: Path, days: float = 40.0) -> None:
    """Let everything in a workspace be so old."""
    then = time.time() - days * 86_400
    for path in (workspace, *workspace.rglob("*")):
        os.utime(path, (then, then))


def named(found: list[upkeep.Unused]) -> list[str]:
    return sorted(one.folder.split("/")[1] for one in found)


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
    days_ago = [(datetime.now(UTC) - datetime.fromisoformat(one["since"])).days for one in told["found"]]
    assert days_ago == [40, 40]
    assert medtl(capsys, "audit", "sweep", "--delete", *here)[0] == 2
    assert medtl(capsys, "audit", "sweep", "--delete", *WORD[:4], *here)[0] == 2
    assert medtl(capsys, "audit", "sweep", "--unused", -1, *here)[0] == 2
    assert medtl(capsys, "audit", "sweep", "--unused", "nan", *here)[0] == 2
    assert medtl(capsys, "audit", "sweep", "--unused", 41, *here)[1]["found"] == []
    assert digests(workspace) == before

    code, told, _ = medtl(capsys, "audit", "sweep", "--delete", *WORD, *here)
    assert code == 0 and told["deleted"] and [one["folder"] for one in told["found"]] == folders
    assert digests(workspace) == {name: digest for name, digest in before.items() if name not in folders}
    assert faults_of(workspace) == []
    swept = [event for event in AuditLog(workspace).events() if event["action"] == "result.swept"]
    assert [(event["details"]["folder"], event["subject"]) for event in swept] == [(f, before[f]) for f in folders]
    assert all(event["details"]["reason"] == "the disk is small" for event in swept)
    again = results.finished_run(config)
    assert again is not None and again["release"]  # what was swept is not missed by a run that has nothing to do

    command = [sys.executable, "-m", "pipelines.cli", "run", str(finished.parent / "tiny.yaml"), "--json"]
    command += ["--set", f"workspace={workspace}", "--set", GATE, "--set", "seed=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    now = digests(workspace)
    assert {name: now.get(name) for name in before} == before and len(now) > len(before)
    assert "not the same" not in done.stderr and faults_of(workspace) == []


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
    assert upkeep.sweep(workspace, 30, SAID) == (found, [])
    assert results.finished_ingest(config) is None
    scans = steps.ingest_scans(config)
    assert scans.reused and results.finished_ingest(config) is not None
    now = digests(workspace)
    assert {name for name in before if name not in now} == {one.folder for one in found if "/pack/" in one.folder}
    assert all(before[name] == digest for name, digest in now.items()) and faults_of(workspace) == []


def test_segments_of_other_settings_go_when_nothing_wants_their_scans(workspace: Path, config: Config) -> None:
    other = config.model_copy(update={"scans": config.scans.model_copy(update={"max_megapixels": 90.0})})
    (first,) = (workspace / "artifacts" / "pixels").iterdir()
    scans = steps.ingest_scans(other)
    (second,) = set((workspace / "artifacts" / "pixels").iterdir()) - {first}
    for newer, older in ((first, second), (second, first)):  # of two with the same pixels the one that was used last
        age(workspace)
        Store(workspace).mark_used(scans.path)
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
    assert faults_of(workspace) == [inside]


def test_training_that_was_given_up_goes_and_what_goes_on_stays(workspace: Path) -> None:
    for name in ("fit-old", "fit-young", "fit-resumed"):
        (workspace / "unfinished" / name).mkdir(parents=True)
        (workspace / "unfinished" / name / "progress.safetensors").write_bytes(bytes(200_000))
    age(workspace)
    (workspace / "unfinished" / "fit-young" / "progress.safetensors").touch()
    Store(workspace).scratch("fit-resumed")  # somebody goes on with it, and has written nothing yet
    found = upkeep.unused(workspace, 30)
    assert named(found) == ["fit-old", "pack", "pixels"]
    assert next(one.megabytes for one in found if not one.is_result) == 0.2
    assert upkeep.sweep(workspace, 30, SAID) == (found, [])
    assert sorted(path.name for path in (workspace / "unfinished").iterdir()) == ["fit-resumed", "fit-young"]
    assert [e["subject"] for e in AuditLog(workspace).events() if e["action"] == "unfinished.swept"] == ["fit-old"]
    assert faults_of(workspace) == []


def test_an_ingest_marks_what_it_rests_on_whether_its_scans_are_found_or_new(
    workspace: Path, config: Config, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.parent / "study", tmp_path / "more")
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(tmp_path / "more" / "images" / "new.png")
    more = config.model_copy(update={"scans": config.scans.model_copy(update={"source": tmp_path / "more"})})
    store, (segment,) = Store(workspace), (workspace / "artifacts" / "pixels").iterdir()
    for wanted in (config, more):
        age(workspace)
        assert time.time() - store.last_used(segment) > 39 * 86_400
        steps.ingest_scans(wanted)
        assert time.time() - store.last_used(segment) < 600
        assert named(upkeep.unused(workspace, 30)) == ["pack"]


def test_nothing_is_deleted_while_a_command_is_at_work_and_a_command_waits_for_the_sweep(
    workspace: Path, config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    age(workspace)
    before, command = digests(workspace), ["audit", "sweep", "--delete", *WORD, "--workspace", workspace]
    at_work = """
import sys, pathlib
from medtl.artifacts import Store
with Store(pathlib.Path(sys.argv[1])).at_work():
    print("at work", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", at_work, str(workspace)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        code, told, why = medtl(capsys, *command)
        assert (code, told) == (1, None) and "at work" in why and digests(workspace) == before
        assert len(medtl(capsys, "audit", "sweep", "--workspace", workspace)[1]["found"]) == 2  # a list may be had
        with Store(workspace).at_work():  # several work at once
            pass
        other.kill()  # its hold ends with it

    came, ended = list[Artifact](), threading.Event()

    def ingest() -> None:
        came.append(steps.ingest_scans(config))
        ended.set()

    def slowly(*args: Any) -> None:
        if worker.ident is None:
            worker.start()
        assert not ended.wait(1.0)  # it waits
        deleted(*args)

    worker, deleted = threading.Thread(target=ingest), upkeep.delete_entered
    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "delete_entered", slowly)
        assert len(upkeep.sweep(workspace, 30, SAID)[0]) == 2
    worker.join(60)
    assert came and came[0].reused and results.finished_ingest(config) is not None and faults_of(workspace) == []


def test_what_reads_the_workspace_holds_it(workspace: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Any:
        with pytest.raises(StorageError, match="at work"):
            upkeep.sweep(workspace, 30, SAID)
        raise InterruptedError

    async def flow(config: Config) -> dict[str, Any]:
        return refused(config)

    age(workspace)
    inside = {
        "pipelines.steps.look_at_source": lambda: steps.ingest_scans(config),
        "pipelines.results.look_at_inputs": lambda: results.finished_run(config),
        "pipelines.results.find_scans": lambda: results.finished_ingest(config),
        "pipelines.steps.build_cohort": lambda: advise.advise_on(config, [], [], False, True),
        "pipelines.steps.split_by_patient": lambda: lr_find.measure(config, None),
    }
    for place, call_it in inside.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, refused)
            with pytest.raises(InterruptedError):
                call_it()
    with pytest.raises(InterruptedError):
        asyncio.run(recorded(flow)(config))
    assert len(upkeep.sweep(workspace, 30, SAID)[0]) > 0


def test_what_only_agrees_with_itself_and_what_nobody_entered_stays(workspace: Path) -> None:
    (true,) = (workspace / "artifacts" / "pack").iterdir()
    (workspace / "artifacts" / "pack" / "forged").mkdir()
    for path in true.iterdir():
        shutil.copy(path, true.with_name("forged"))
    manifest = json.loads((true / "manifest.json").read_bytes())
    manifest["note"] = "agrees with all its files"
    (true / "manifest.json").write_text(json.dumps(manifest))
    age(workspace)
    found = faults_of(workspace)
    assert sorted(found) == sorted(["artifacts/pack/forged", true.relative_to(workspace).as_posix()])
    gone, altered = upkeep.sweep(workspace, 30, SAID)
    assert named(gone) == ["pixels"] and named(altered) == ["pack", "pack"]
    assert sorted(faults_of(workspace)) == sorted(found)


def test_a_deed_that_a_crash_kept_from_being_done_is_unfinished_and_done_next_time(
    workspace: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(workspace)
    (segment,) = (workspace / "artifacts" / "pixels").iterdir()

    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)  # between the entry and the deed
        with pytest.raises(SystemExit):
            upkeep.sweep(workspace, 30, SAID)
    trail = AuditLog(workspace)
    (fault,) = verify_workspace(workspace, trail.verify(), trail.events())
    assert fault.what == "unfinished" and "again" in fault.why
    Store(workspace).mark_used(workspace / fault.where)  # whoever wanted it since
    assert fault.where in [one.folder for one in upkeep.unused(workspace, 30)]
    upkeep.sweep(workspace, 30, SAID)
    assert faults_of(workspace) == [] and not (workspace / fault.where).exists()
    steps.ingest_scans(config)
    assert segment.is_dir() and faults_of(workspace) == []


def test_a_trail_that_was_cut_is_said_and_nothing_is_called_altered(workspace: Path) -> None:
    age(workspace)
    log = workspace / "audit.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    before = digests(workspace)
    with pytest.raises(TamperedError, match=r"audit\.jsonl"):
        upkeep.sweep(workspace, 30, SAID)
    assert digests(workspace) == before


def test_a_workspace_without_marks_counts_from_now(workspace: Path) -> None:
    age(workspace)
    shutil.rmtree(workspace / "index" / "used")
    assert upkeep.unused(workspace, 30) == []
    age(workspace)
    assert named(upkeep.unused(workspace, 30)) == ["pack", "pixels"]


def test_half_of_a_deleted_result_never_passes_for_one(
    workspace: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(workspace)
    shutil.rmtree(workspace / "artifacts" / "pack")
    (found,) = upkeep.unused(workspace, 30)
    before = faults_of(workspace)  # the pack is missing

    def fails(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            next(folder.rglob("*.bin")).unlink()
            raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(upkeep.shutil, "rmtree", fails)
        with pytest.raises(StorageError, match="it is entered"):
            upkeep.sweep(workspace, 30, SAID)
    assert not (workspace / found.folder).exists() and faults_of(workspace) == before
    steps.ingest_scans(config)
    assert (workspace / found.folder).is_dir() and faults_of(workspace) == before
    assert list((workspace / "artifacts").glob("*/.*")) == []  # the half of it was rubbish of a day ago
