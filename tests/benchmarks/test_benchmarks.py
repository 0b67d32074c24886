"""The benchmarks run, and their last line is for machines."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = sorted(
    path
    for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py")
    if not path.stem.endswith("_peers") and path.stem not in ("leaks", "nnunet", "pretraining", "results", "views")
)


def figures(script: Path) -> dict[str, Any]:
    command = [sys.executable, str(script), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_prints_its_figures_beside_those_of_its_peers(script: Path) -> None:
    found = figures(script)
    assert found["benchmark"] == script.stem
    names = {row["name"] for row in found["rows"]}
    assert len(names) >= 2 and any(name.startswith("medtl") for name in names)
    for row in found["rows"]:
        assert math.isfinite(row["median"]) and row["median"] > 0 and row["ratio"] > 0
    assert any(row["ratio"] == 1 for row in found["rows"] if row["name"].startswith("medtl"))


@pytest.mark.slow
def test_both_ways_to_the_auroc_agree() -> None:
    script = next(path for path in BENCHMARKS if path.stem == "metrics")
    assert figures(script)["largest_difference"] < 1e-12
