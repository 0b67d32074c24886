"""The command line as people and machines call it: exit codes, one clear sentence, nothing lost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest


def medtl(*arguments: object, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, timeout=300, check=False)


def test_help_answers_at_once_and_names_every_verb() -> None:
    medtl("--help")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = medtl("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < 1.5  # seconds of the processor, so that other work beside it does not count; half a one is usual
    assert done.returncode == 0
    verbs = "run ingest train evaluate report predict serve demo show backbones weights registry audit"
    for verb in verbs.split():
        assert verb in done.stdout


def test_an_unknown_verb_is_a_usage_error() -> None:
    done = medtl("rum", "x.yaml")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unknown_key_is_a_usage_error_that_names_the_nearest(config_file: Path) -> None:
    done = medtl("run", config_file, "--set", "model.bakbone=resnet18")
    assert done.returncode == 2
    assert "did you mean 'backbone'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_backbone_names_the_nearest_before_anything_is_begun(config_file: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "nothing"
    done = medtl("run", config_file, "--set", "model.backbone=resnet81", "--set", f"workspace={workspace}")
    assert done.returncode == 2
    assert "resnet18" in done.stderr and not workspace.exists()


def test_an_unwritable_workspace_says_so(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = medtl("run", config_file, "--set", f"workspace={tmp_path / 'file' / 'workspace'}")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "--set workspace=" in done.stderr


def test_a_full_disk_says_so_and_loses_nothing(config_file: Path, tmp_path: Path) -> None:
    done = medtl("run", config_file, limit_bytes=20_000)
    assert done.returncode == 1
    assert "full disk" in done.stderr or "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "workspace" / "artifacts").glob("*/[0-9a-f]*"))


def test_a_source_that_is_not_there_says_so(config_file: Path, tmp_path: Path) -> None:
    done = medtl("run", config_file, "--set", f"scans.source={tmp_path / 'nowhere'}")
    assert done.returncode == 1
    assert "does not exist" in done.stderr


def test_audit_without_a_log_says_what_to_try(tmp_path: Path) -> None:
    done = medtl("audit", "verify", "--workspace", tmp_path)
    assert done.returncode == 1
    assert "--workspace" in done.stderr


def test_backbones_are_listed_for_machines() -> None:
    done = medtl("backbones", "--json")
    names = [row["backbone"] for row in json.loads(done.stdout.splitlines()[-1])]
    assert {"resnet18", "vit_b_16", "squeezenet1_0"} <= set(names)


def test_an_empty_environment_is_enough(config_file: Path, tmp_path: Path) -> None:
    home = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "show", "split", str(config_file), "--json"],
        capture_output=True,
        text=True,
        env=home,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {row["part"] for row in json.loads(done.stdout.splitlines()[-1])} == {"train", "val", "test"}
    assert (tmp_path / "home" / ".config" / "medtl" / "pseudonym.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["0h", "soon", "5 weeks"])
def test_a_schedule_that_cannot_be_read_is_a_usage_error(config_file: Path, text: str) -> None:
    assert medtl("serve", config_file, "--every", text).returncode == 2
