"""The demo does what it says, and nothing of the canary patient leaves the hospital."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medtl.scans.phantom import CANARY

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "pipelines.cli", "demo", str(folder / "demo"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "demo", json.loads(done.stdout.splitlines()[-1]), done.stderr + done.stdout


def test_the_demo_transfers_and_compares(demo: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, _ = demo
    assert summary["status"] == "validated"
    assert summary["difference"]["auroc"]["value"] > 0
    page = Path(summary["report"]).read_text()
    assert "How both were trained" in page and page.count("Before you believe it") == len(summary["cautions"])
    excluded = summary["excluded"]
    assert excluded["truncated"] == excluded["duplicate_file"] == excluded["empty_file"] == 1


def test_no_byte_of_the_canary_is_anywhere(demo: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, printed = demo
    hospital = b"".join(p.read_bytes() for p in (folder / "hospital").rglob("*") if p.is_file())
    assert all(word.encode() in hospital for word in CANARY), "the canary must be in what goes in"
    written = [path for path in folder.rglob("*") if (folder / "hospital") not in path.parents and path.is_file()]
    assert any(path.suffix == ".db" for path in written), "Prefect's database is among what is searched"
    assert any(path.name == "medtl.log" for path in written)
    for word in CANARY:
        assert word not in printed
        for path in written:
            assert word not in str(path.relative_to(folder)), path
            assert word.encode() not in path.read_bytes(), path
