"""Folds of a real cohort: everybody tested once, one pass through the frozen layers, pooled on a page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medtl.audit import AuditLog
from pipelines.cli import _fold_rows

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


def crossval(config: Path, *settings: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "pipelines.cli", "crossval", str(config), "--json"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def test_folds_are_trained_tested_and_pooled_and_a_second_call_trains_nothing(
    config_file: Path, tmp_path: Path
) -> None:
    phases = "model.phases=[{name: head, unfreeze: head, epochs: 4, lr: 1.0e-2, augment: false}]"
    options = ("dataset.folds.count=3", phases, "model.backbone=squeezenet1_0", "model.cache.use=always")
    code, found, log = crossval(config_file, *options)
    assert code == 0, log
    assert [one["fold"] for one in found["folds"]] == ["1", "2", "3"]
    assert sum(one["n"] for one in found["folds"]) == found["metrics"]["auroc"]["n"] == 48
    assert found["metrics"]["auroc"]["patients"] == 24
    page = Path(found["report"]).read_text()
    assert "Cross-validation by patient" in page and "Mean over folds" in page
    events = AuditLog(tmp_path / "workspace").events()
    made = [event["action"] for event in events]
    assert (made.count("checkpoint.made"), made.count("pack.made"), made.count("split.made")) == (3, 1, 3)
    opened = [event["details"] for event in events if event["action"] == "test.opened"]
    assert [one["purpose"] for one in opened] == ["fold"] * 3 and all(one["clean"] for one in opened)
    kept = list((tmp_path / "workspace" / "cache" / "activations").iterdir())
    assert len(kept) == 1, "the three folds share one pass over the cohort"

    code, again, _ = crossval(config_file, *options)
    assert code == 0 and again["metrics"] == found["metrics"]
    assert AuditLog(tmp_path / "workspace").events()[-1]["action"] == "run.finished"
    assert [e["action"] for e in AuditLog(tmp_path / "workspace").events()].count("checkpoint.made") == 3


def test_sites_are_left_out_one_at_a_time(config_file: Path, tmp_path: Path) -> None:
    table = tmp_path / "study" / "labels.csv"
    head, *rows = table.read_text().splitlines()
    # two patients of each kind in turn, so that every site has both
    lines = [f"{row},site {int(row.rsplit('-', 1)[1]) // 2 % 2}" for row in rows]
    table.write_text("\n".join([f"{head},site", *lines]) + "\n")
    once = "[{name: all, unfreeze: all, epochs: 1, lr: 3.0e-3, batchnorm: with_stage}]"
    # a strategy that takes no weights, whatever is named: nothing is learned of transfer
    beside = ("model.weights=imagenet", "model.phases=scratch", "model.scratch=true", f"model.scratch_phases={once}")
    code, found, log = crossval(config_file, "dataset.folds.by=site", "studies.labels.site=site", *beside)
    assert code == 0, log
    assert len(found["folds"]) == 2 and found["by"] == "site"
    apart = found["metrics"]["auroc"]["value"] - found["scratch"]["auroc"]["value"]
    assert found["difference"]["auroc"]["value"] == pytest.approx(apart)
    page = Path(found["report"]).read_text()
    assert "Leave one site out" in page and "weights: none" in page
    assert "Transfer or scratch" in page and "says nothing about transfer" in page
    assert ["Nothing was transferred" in one for one in found["cautions"]] == [True]
    opened = [
        e["details"]["purpose"] for e in AuditLog(tmp_path / "workspace").events() if e["action"] == "test.opened"
    ]
    assert sorted(opened) == ["fold", "fold", "reference", "reference"]
    code, _, log = crossval(config_file, "dataset.folds.by=site")
    assert code == 1 and "48 studies have no site" in log and "Traceback" not in log


def test_the_table_shows_dice_or_auroc_of_each_fold_and_what_weights_made_of_it() -> None:
    value = {"value": 0.8, "low": 0.7, "high": 0.9}
    folds = [{"fold": "1", "repeat": 0, "values": {"absolute_volume_error": 3.0, "dice": 0.79}},
             {"fold": "2", "repeat": 1, "values": {"brier": 0.1, "auroc": 0.88}}]  # fmt: skip
    summary = {"metrics": {"dice": value}, "folds": folds, "by": "patient", "difference": {"dice": value}}
    rows = _fold_rows(summary)
    assert rows == [
        ("mean over folds: dice", "0.800", "0.700", "0.900"),
        ("fold 1: dice", "0.790", "", ""),
        ("fold 2, repeat 2: auroc", "0.880", "", ""),
        ("dice, with weights - without", "0.800", "0.700", "0.900"),
    ]
    del summary["difference"]
    assert (
        len(_fold_rows(summary | {"by": "site"})) == 3 and _fold_rows(summary | {"by": "site"})[1][0][:9] == "without 1"
    )
