"""What a run is held against, and what its page says of that: the live release, other gates, looks at the test part."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medtl.artifacts import digest_of
from medtl.audit import AuditLog
from medtl.config import Config
from medtl.dataset.io import write_split
from medtl.records import Artifact, Split
from pipelines import steps

from .conftest import GATE

WORD = ("--by", "A. Auditor", "--role", "head of radiology", "--reason", "seen")


def medtl(*arguments: object, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """Give the config, and the settings that use a copy of the finished workspace."""
    shutil.copytree(finished, tmp_path / "w")
    return finished.parent / "tiny.yaml", ("--set", f"workspace={tmp_path / 'w'}")


@pytest.mark.prefect
@pytest.mark.slow
def test_a_candidate_stands_beside_the_live_release_and_every_gate_is_asked(
    copied: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    config, here = copied
    live = medtl("report", config, *here, "--set", GATE)
    page = Path(live["report"]).read_text()
    assert "was not asked for (registry.promotion.incumbent)" in page
    for to in ("approved", "live"):
        medtl("registry", "promote", live["release"], "--to", to, *WORD, "--workspace", tmp_path / "w")
    gates = "{incumbent: {metric: auroc, margin: 0.9}, licences: [BSD-3-Clause], subgroup_floor: {at_least: 0.5}, "
    gates += "gate: [{metric: auroc, bound: value, at_least: 0.0}]}"
    asked = ("--set", f"registry.promotion={gates}", "--set", "seed=1")
    found = medtl("run", config, *here, *asked, code=3)
    assert found["status"] == "refused"  # nobody here has a sex or a scanner: no subgroup shows anything
    release = medtl("registry", "show", found["release"], "--workspace", tmp_path / "w")
    passed = {check["condition"]: check["passed"] for check in release["checks"]}
    assert len(passed) == 5
    assert [name for name, well in passed.items() if not well] == [n for n in passed if "subgroup" in n]
    assert any(live["release"] in name for name in passed)
    page = Path(found["report"]).read_text()
    assert "was not asked for" not in page and live["release"] in page
    openings = [e["details"] for e in AuditLog(tmp_path / "w").events() if e["action"] == "test.opened"]
    assert openings[-1]["purpose"] == "incumbent"


@pytest.mark.prefect
@pytest.mark.slow
def test_a_report_that_is_written_again_has_the_same_bytes(
    copied: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    config, here = copied
    first = Path(medtl("report", config, *here, "--set", GATE)["report"])
    written = first.read_bytes()
    shutil.rmtree(tmp_path / "w" / "artifacts" / "report")
    first.unlink()
    again = medtl("report", config, *here, "--set", GATE)
    assert Path(again["report"]) == first and first.read_bytes() == written


def test_looks_at_the_same_test_studies_are_counted_under_whatever_split(tmp_path: Path) -> None:
    config = Config(name="x", workspace=tmp_path)
    groups = {name: name for name in "abcdef"}
    full = Split(("a", "b"), ("c",), ("d", "e"), groups, predefined=False)
    others = {"full": full, "fewer": replace(full, train=("a",)), "else": replace(full, test=("d", "f"))}
    splits = {}
    for name, split in others.items():
        (tmp_path / name).mkdir()
        write_split(tmp_path / name, split)
        splits[name] = Artifact("split", name, digest_of(name), tmp_path / name, reused=False)
    log = AuditLog(tmp_path)
    for name in ("full", "fewer", "fewer", "else"):
        part = digest_of(sorted(others[name].test))
        log.append("test.opened", splits[name].digest, details={"purpose": "model", "part": part})
    log.append("test.opened", splits["full"].digest, details={"purpose": "reference"})
    assert [steps.test_openings(config, splits[name]) for name in others] == [3, 3, 1]
