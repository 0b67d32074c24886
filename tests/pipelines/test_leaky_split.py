"""A split that leaks is refused, or used because somebody said so; then every page says it too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medtl.audit import AuditLog

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


def medtl(config: Path, *settings: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "pipelines.cli", "run", str(config), "--json"]
    for setting in ("studies.labels.split=part", *settings):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def test_a_leaking_split_is_refused_by_counts_and_where_it_is_allowed_every_page_says_so(
    config_file: Path, elsewhere: Path, tmp_path: Path
) -> None:
    table = tmp_path / "study" / "labels.csv"
    head, *rows = table.read_text().splitlines()
    parts = ["train"] * 24 + ["val"] * 12 + ["test"] * 12
    parts[1] = "test"  # the first patient's second image
    parts[25] = "test"  # the thirteenth's, in validation and test
    table.write_text("\n".join([f"{head},part", *(f"{r},{p}" for r, p in zip(rows, parts, strict=True))]) + "\n")

    code, _, log = medtl(config_file)
    assert code == 1
    assert "1 patient in both 'train' and 'test'" in log and "1 patient in both 'val' and 'test'" in log
    assert "patient-0" not in log and "allow_leaky_split=true" in log

    code, found, log = medtl(config_file, "dataset.split.allow_leaky_split=true")
    assert code == 3, log  # the gate asks for a clean split unless it is told otherwise
    page = Path(found["report"]).read_text()
    assert "This split leaks: 1 patient in both train and test" in page
    assert "Patients in both validation and test: 1." in page
    opened = [e["details"] for e in AuditLog(tmp_path / "workspace").events() if e["action"] == "test.opened"]
    assert [one["clean"] for one in opened] == [False]

    careless = ("dataset.split.allow_leaky_split=true", "registry.promotion.clean=false")
    code, found, log = medtl(config_file, *careless)
    assert code == 0 and found["status"] == "candidate", log
    command = [sys.executable, "-m", "pipelines.cli", "elsewhere", str(config_file), "--scans", str(elsewhere)]
    command += ["--allow-candidate", "--release", found["release"], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    page = Path(json.loads(done.stdout.splitlines()[-1])["report"]).read_text()
    assert "measured on a split that leaks" in page
    told = {e["action"]: e for e in AuditLog(tmp_path / "workspace").events()}
    assert told["split.leak_allowed"]["details"]["leaks"].startswith("1 patient in both")
    assert told["release.unvalidated"]["subject"] == found["release"]


def test_corrected_labels_are_learned_from_although_the_split_stays(config_file: Path, tmp_path: Path) -> None:
    table = tmp_path / "study" / "labels.csv"
    head, *rows = table.read_text().splitlines()
    parts = ["train"] * 24 + ["val"] * 12 + ["test"] * 12
    with_parts = [f"{row},{part}" for row, part in zip(rows, parts, strict=True)]
    table.write_text("\n".join([f"{head},part", *with_parts]) + "\n")
    code, first, log = medtl(config_file)
    assert code == 0, log
    swapped = [
        row.replace(",bright,", ",X,").replace(",dark,", ",bright,").replace(",X,", ",dark,") for row in with_parts[:4]
    ]
    table.write_text("\n".join([f"{head},part", *swapped, *with_parts[4:]]) + "\n")
    code, second, log = medtl(config_file)
    assert code == 0, log
    assert second["digests"]["checkpoint"] != first["digests"]["checkpoint"]
    assert second["release"] != first["release"]
