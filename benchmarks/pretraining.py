"""Few labels: a segmentation from scratch against one pre-trained on the scans whose labels nobody gave.

Patients are dealt out: a test part, some with labels, as many for validation, and the rest, of whom the masks are not
looked at. These rest are pre-trained on (`medtl pretrain`); then the same network learns from the few labels three
times, with the same patches and phases: from scratch, from the weights of pre-training, and from scratch for as many
more steps as pre-training took. Differences of Dice are paired by patient, with 95 % intervals; one seed, one split.

    python benchmarks/pretraining.py --source FOLDER [--config configs/hippocampus.yaml] [--labelled 10] [--json]

FOLDER holds the label table and scans that the config names. Nothing that was finished is computed again where
``--workspace`` is given.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medtl.config import Config, load_config
from medtl.evaluation.io import read_mask_results
from medtl.evaluation.masks import compare_masks
from medtl.records import Score

ROOT = Path(__file__).parents[1]
SCRATCH, LONGER, PRETRAINED = "medtl, from scratch", "medtl, from scratch, longer", "medtl, pre-trained"
NAME = "unlabelled"  # of the weights in the vault


@dataclass(frozen=True)
class Arm:
    """One way to a segmentation: its Dice, its results and how long all of it took."""

    name: str
    dice: Mapping[str, float | None]
    results: Path
    seconds: float


def medtl(verb: str, *words: str) -> dict[str, Any]:
    """Run one command and read its last line."""
    command = [sys.executable, "-m", "pipelines.cli", verb, *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"medtl {verb} failed; its messages are above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def deal(config: Config, source: Path, labelled: int, seed: int, folder: Path) -> dict[str, int]:
    """Write a table of the few labelled patients with their parts, and one of the others without masks."""
    labels = config.studies.labels
    assert labels.table is not None and labels.path is not None and labels.mask is not None
    with (source / labels.table).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    person = labels.patient or labels.path
    people = sorted({row[person] for row in rows})
    random.Random(seed).shuffle(people)
    bounds = [0, round(0.2 * len(people))]
    bounds += [bounds[1] + labelled, bounds[1] + 2 * labelled, len(people)]
    if bounds[3] >= bounds[4]:
        raise SystemExit(f"{len(people)} patients leave none without labels: lower --labelled")
    parts = ("test", "val", "train", "")
    part_of = {
        one: part for part, a, b in zip(parts, bounds, bounds[1:], strict=False) for one in people[a:b]
    }  # fmt: skip
    columns = [labels.path, labels.mask, person, "part"]
    for name, wanted in (("few.csv", True), ("unlabelled.csv", False)):
        chosen = [{**row, "part": part_of[row[person]]} for row in rows if bool(part_of[row[person]]) == wanted]
        kept = columns if wanted else [labels.path, person]
        with (folder / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, kept, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(chosen)
    return {part or "unlabelled": sum(p == part for p in part_of.values()) for part in parts}


def settings(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Give the overrides that every command shares."""
    said = {
        "workspace": folder / "workspace",
        "scans.source": arguments.source,
        "seed": arguments.seed,
        "model.threads": arguments.threads,
        "dataset.grid.filters": arguments.filters,
    }
    return [word for key, value in said.items() for word in ("--set", f"{key}={value}")]


def arm(name: str, arguments: argparse.Namespace, folder: Path, patch: Sequence[int], epochs: int, weights: str) -> Arm:
    """Train on the few labels and measure the test part."""
    started = time.perf_counter()
    few = json.dumps(str(folder / "few.csv"))
    phase = f"{{name: all, unfreeze: all, epochs: {epochs}, lr: {arguments.lr}, decay: 1.0, batchnorm: with_stage}}"
    own = (f"studies.labels.table={few}", "studies.labels.split=part", f"dataset.grid.patch={list(patch)}",
           f"model.weights={weights}", f"model.phases=[{phase}]")  # fmt: skip
    words = [*settings(arguments, folder), *(word for one in own for word in ("--set", one))]
    found = medtl("evaluate", str(arguments.config), *words)
    return Arm(name, found["metrics"]["dice"], Path(found["artifact"]), time.perf_counter() - started)


def pretrain(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], float]:
    """Pre-train on the others."""
    started = time.perf_counter()
    table = json.dumps(str(folder / "unlabelled.csv"))
    own = (f"studies.labels.table={table}", "studies.labels.label=[]", "studies.labels.mask=null",
           "studies.labels.structures={}", f"model.reconstruct.epochs={arguments.pretraining_epochs}")  # fmt: skip
    words = [*settings(arguments, folder), *(word for one in own for word in ("--set", one))]
    found = medtl("pretrain", str(arguments.config), "--into", NAME, *words)
    return found, time.perf_counter() - started


def compare(config: Config, one: Arm, other: Arm) -> Score:
    """Give the difference of the mean Dice, paired by patient."""
    results = [read_mask_results(each.results) for each in (one, other)]
    return compare_masks(results[0], results[1], (one.name, other.name), config.evaluation, config.seed).difference


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything; give one object for machines."""
    config = load_config(arguments.config)
    counts = deal(config, arguments.source, arguments.labelled, arguments.seed, folder)
    found, seconds = pretrain(arguments, folder)
    more = round(arguments.pretraining_epochs * found["scans"] * (1 - config.dataset.split.val) / arguments.labelled)
    epochs, patch = arguments.epochs, found["patch"]
    arms = [
        arm(SCRATCH, arguments, folder, patch, epochs, "none"),
        arm(PRETRAINED, arguments, folder, patch, epochs, f"vault:{NAME}"),
        arm(LONGER, arguments, folder, patch, epochs + more, "none"),
    ]
    case = f"{arguments.labelled} labelled, {counts['unlabelled']} unlabelled patients"
    first = arms[0].dice["value"] or 1.0
    rows = [
        {"name": one.name, "case": case, "median": one.dice["value"], "low": one.dice["low"], "high": one.dice["high"],
         "unit": "Dice", "ratio": (one.dice["value"] or 0.0) / first, "seconds": round(one.seconds, 1)}
        for one in arms
    ]  # fmt: skip
    differences = []
    for other in (arms[0], arms[2]):
        score = compare(config, arms[1], other)
        differences.append(
            {"of": PRETRAINED, "minus": other.name, "dice": score.value, "low": score.low, "high": score.high}
        )
    return {
        "benchmark": "pretraining", "rows": rows, "differences": differences, "parts": counts,
        "pretraining": {"seconds": round(seconds, 1), "explained": found["explained"]},
    }  # fmt: skip


def show(found: Mapping[str, Any]) -> None:
    """Print the tables."""
    table = Table("network", "test Dice", "95 %", "seconds", title=found["rows"][0]["case"])
    for row in found["rows"]:
        table.add_row(row["name"], _figure(row["median"]), _interval(row), f"{row['seconds']:.0f}")
    paired = Table("difference, paired by patient", "Dice", "95 %")
    for one in found["differences"]:
        paired.add_row(f"{one['of']} minus {one['minus']}", _figure(one["dice"]), _interval(one))
    console, pre = Console(), found["pretraining"]
    console.print(table, paired)
    console.print(f"pre-training: {pre['seconds']:.0f} s; explains {_figure(pre['explained'])} of what is hidden")


def _figure(value: float | None) -> str:
    return "not estimable" if value is None else f"{value:.3f}"


def _interval(of: Mapping[str, Any]) -> str:
    return "" if of["low"] is None else f"{of['low']:.3f} to {of['high']:.3f}"


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--source", type=Path, required=True, help="folder of the label table and the scans")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "hippocampus.yaml")
    parser.add_argument("--labelled", type=int, default=10, help="patients with labels; as many for validation")
    parser.add_argument("--epochs", type=int, default=100, help="on the few labels")
    parser.add_argument("--pretraining-epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--filters", type=int, default=32, help="channels of the network's first level")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workspace", type=Path, help="where results are kept; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    arguments = parser.parse_args()
    arguments.source, arguments.config = arguments.source.absolute(), arguments.config.absolute()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.workspace or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(arguments, folder)
    show(found)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
