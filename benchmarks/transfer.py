"""Staged transfer learning from image files: medtl beside the plain loop, fastai, Lightning and MONAI.

Every contender runs in a process of its own over the same PNG files, start weights, batches, epochs and learning
rates (benchmarks/transfer_peers.py says what each does). Column ``matched``: fp32 everywhere, frozen layers frozen as
far as the library can. Column ``shipped``: each library's own defaults. Contenders take turns in rotated order; imports
and a first small job are not counted; the median is given. Peers that cannot be imported are named and left out:
`pip install fastai lightning pytorch-ignite` includes them all.

    python benchmarks/transfer.py [--json] [--quick] [--backbones resnet18,resnet50,densenet121] [--repeats 2]
                                  [--stages head:6,last:6,last2:3,full:2] [--cases schedule,head,folds]
                                  [--threads 2] [--clock wall] [--device cpu] [--images 64] [--batch 16] [--size 224]
                                  [--source FOLDER] [--label COLUMN] [--patient COLUMN]

``--source`` takes a folder with labels.csv (a column ``image``, one of labels, one of patients) instead of generated
images. `schedule` is the stages one after the other, `head` ten epochs of a head alone, `folds` the same five times,
cross-validated by patient; the longest, and run once.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from transfer_peers import ALL, Job, Part, Stage, write_job

PEERS = Path(__file__).with_name("transfer_peers.py")
NEEDS = {"fastai": ("fastai",), "lightning": ("lightning",), "monai": ("monai", "ignite")}
NAMES = {
    "medtl": "medtl",
    "tutorial": "torchvision loop",
    "tuned": "the loop, tuned",
    "fastai": "fastai",
    "lightning": "Lightning",
    "monai": "MONAI",
}
# The tutorial and MONAI have nothing to match: they are run once and stand in both columns.
COLUMNS = {
    "matched": ("medtl", "tutorial", "monai", "fastai", "lightning"),
    "shipped": ("medtl", "tutorial", "monai", "fastai", "lightning", "tuned"),
}
SAME = ("tutorial", "monai")
FEW = ("medtl", "tutorial")  # cases head and folds
BLOCKS = {"head": 0, "last": 1, "last2": 2, "full": ALL}
RATES = {"head": 0.01, "last": 0.002, "last2": 0.001, "full": 0.0005}
CLASSES = ("normal", "striped")


@dataclass(frozen=True)
class Images:
    """A folder of one folder per class; patients in the order of the sorted files."""

    folder: Path
    classes: tuple[str, ...]
    patients: tuple[str, ...]
    resize: bool


@dataclass(frozen=True)
class Run:
    """One contender's turn."""

    result: Mapping[str, Any]
    peak_mb: float


# ---------------------------------------------------------------------------------------------------- the images


def write_images(folder: Path, patients: int, side: int) -> Images:
    """Write two grey PNGs for each patient: smooth clouds of their own, half of the patients with faint stripes."""
    import cv2
    import numpy as np

    rng, owners = np.random.default_rng(0), []
    columns = np.arange(side)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(patients // 2):
            cloud = cv2.resize(rng.uniform(60, 180, (7, 7)), (side, side), interpolation=cv2.INTER_CUBIC)
            for view in range(2):
                image = cloud + rng.normal(0, 8, (side, side))
                if name == CLASSES[1]:
                    image += 20 * np.sin(2 * np.pi * (columns / 9 + rng.uniform()))
                cv2.imwrite(str(folder / name / f"{number:04d}-{view}.png"), image.clip(0, 255).astype(np.uint8))
                owners.append(f"{name}-{number}")
    return Images(folder, CLASSES, tuple(owners), resize=False)


def copy_images(source: Path, folder: Path, label: str, patient: str, count: int) -> Images:
    """Copy images of a folder with labels.csv into a folder per class, about as many of each class as there are."""
    with (source / "labels.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    missing = {"image", label, patient} - set(table[0])
    if missing:
        raise SystemExit(f"labels.csv has no column {', '.join(sorted(missing))}; it has {', '.join(table[0])}")
    random.Random(0).shuffle(table)
    classes = tuple(sorted({row[label] for row in table}))
    owners: dict[tuple[str, str], str] = {}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number, row in enumerate([row for row in table if row[label] == name][: count // len(classes)]):
            path = (source / row["image"]).resolve()
            copy = f"{number:05d}{path.suffix}"
            shutil.copyfile(path, folder / name / copy)
            owners[name, copy] = row[patient]
    return Images(folder, classes, tuple(owner for _, owner in sorted(owners.items())), resize=True)


def parts_of(images: Images, folds: int, batch: int, whole: bool) -> tuple[Part, ...]:
    """Cut into folds by patient; learn from whole batches, so that everybody takes the same steps.

    Args:
        whole: give every fold, else the first alone.
    """
    patients = sorted(set(images.patients))
    random.Random(0).shuffle(patients)
    fold_of = {patient: number % folds for number, patient in enumerate(patients)}
    parts = []
    for fold in range(folds if whole else 1):
        rows = list(range(len(images.patients)))
        random.Random(fold).shuffle(rows)
        train = [row for row in rows if fold_of[images.patients[row]] != fold]
        val = [row for row in rows if fold_of[images.patients[row]] == fold]
        parts.append(Part(tuple(train[: len(train) // batch * batch]), tuple(val)))
    return tuple(parts)


def stages_of(text: str) -> tuple[Stage, ...]:
    """Read stages as they are typed: name:epochs, with commas between."""
    try:
        pairs = [item.split(":") for item in text.split(",")]
        return tuple(Stage(name, BLOCKS[name], int(epochs), RATES[name]) for name, epochs in pairs)
    except (KeyError, ValueError) as error:
        raise SystemExit(f"--stages {text}: write head:6,last:6,last2:3,full:2") from error


# ---------------------------------------------------------------------------------------------------- the runs


def absent() -> dict[str, str]:
    """Name the peers that cannot be imported, and what each lacks."""
    lacking = {peer: [name for name in names if find_spec(name) is None] for peer, names in NEEDS.items()}
    return {peer: ", ".join(names) for peer, names in lacking.items() if names}


def turn(contender: str, job: Job, folder: Path) -> Run:
    """Let one contender do a job in its own process."""
    path = folder / "job.json"
    write_job(path, job)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "NO_ALBUMENTATIONS_UPDATE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PEERS.parents[1]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(PEERS), contender, str(path)]
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        assert process.stdout is not None
        text = process.stdout.read()
        process.stdout.close()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        told = errors.read()
    if process.returncode:
        raise SystemExit(f"{contender} failed ({process.returncode}); without it the table is no use\n{told[-2000:]}")
    return Run(json.loads(text.splitlines()[-1]) if contender != "prepare" else {}, used.ru_maxrss / 1024)


def take_turns(jobs: Mapping[tuple[str, str], Job], folder: Path, repeats: int) -> dict[tuple[str, str], list[Run]]:
    """Run every (column, contender) so many times, each round in another order."""
    order: list[tuple[str, str]] = list(jobs)
    runs: dict[tuple[str, str], list[Run]] = {}
    for repeat in range(repeats):
        for key in order[repeat % len(order) :] + order[: repeat % len(order)]:
            runs.setdefault(key, []).append(turn(key[1], jobs[key], folder))
    return runs


def jobs_of(job: Job, case: str, missing: Mapping[str, str]) -> dict[tuple[str, str], Job]:
    """Give the job of every (column, contender) of a case."""
    found = {}
    for column, contenders in COLUMNS.items():
        for name in contenders:
            wanted = name not in missing and (case == "schedule" or name in FEW)
            if wanted and not (name in SAME and column == "shipped"):
                found[column, name] = replace(job, column=column)  # type: ignore[arg-type]
    return found


# ---------------------------------------------------------------------------------------------------- the figures


def epoch_seconds(run: Run, stage: str, clock: str) -> float:
    """Give the median epoch of a stage, its first left out where there are more."""
    laps: list[float] = [lap[clock] for lap in run.result["laps"] if lap["stage"] == stage]
    return median(laps[1:] or laps)


def once_seconds(run: Run, job: Job, clock: str) -> float:
    """Give what a contender did beside its epochs: packing files, one pass through the frozen layers."""
    stages = {stage.name for stage in job.stages}
    return sum(float(lap[clock]) for lap in run.result["laps"] if lap["stage"] not in stages)


def rows_of(case: str, job: Job, clock: str, runs: Mapping[tuple[str, str], list[Run]]) -> list[dict[str, Any]]:
    """Give a row for each column, contender and thing measured; a first epoch is part of the case's sum alone."""
    rows, images = [], len(job.parts[0].train)
    for column, contenders in COLUMNS.items():
        taken = {n: runs.get((column, n)) or (runs.get(("matched", n)) if n in SAME else None) for n in contenders}
        for stage in (*(s.name for s in job.stages), "") if case == "schedule" else ("",):
            for name, its in taken.items():
                if not its:
                    continue
                spent = [epoch_seconds(run, stage, clock) if stage else run.result[clock] for run in its]
                rows.append(
                    {
                        "name": f"{NAMES[name]}, {column}",
                        "case": f"{job.backbone}, {stage} epoch" if stage else f"{job.backbone}, {case}",
                        "column": column,
                        "contender": name,
                        "median": median(spent),
                        "min": min(spent),
                        "max": max(spent),
                        "unit": "s",
                        "images_per_s": images / median(spent) if stage else None,
                        "once_s": median(once_seconds(run, job, clock) for run in its),
                        "peak_mb": max(run.peak_mb for run in its),
                        "val_loss": median(run.result["val_loss"] for run in its),
                        "val_auroc": median(run.result["val_auroc"] for run in its),
                        "settings": its[0].result["note"],
                    }
                )
    for row in rows:
        same = (r for r in rows if r["case"] == row["case"] and r["column"] == row["column"])
        ours = next(r["median"] for r in same if r["contender"] == "medtl")
        row["ratio"] = row["median"] / ours
    return rows


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one column of one backbone: seconds, and how many times medtl's they are."""
    from rich.console import Console
    from rich.table import Table

    cases = list(dict.fromkeys(row["case"] for row in rows))
    heads = [f"{case.split(', ', 1)[1]}, s" for case in cases]
    table = Table("contender", *heads, "once, s", "min-max", "peak MB", "loss", "AUROC", title=title)
    for name in dict.fromkeys(row["contender"] for row in rows):
        its = [next((r for r in rows if r["case"] == case and r["contender"] == name), None) for case in cases]
        cells = [f"{r['median']:.3g} ({r['ratio']:,.3g}x)" if r else "-" for r in its]
        last = next(r for r in rows if r["contender"] == name and not r["case"].endswith("epoch"))
        spread = f"{last['min']:.3g}-{last['max']:.3g}"
        quality = (f"{last['peak_mb']:,.0f}", f"{last['val_loss']:.3f}", f"{last['val_auroc']:.3f}")
        table.add_row(NAMES[name], *cells, f"{last['once_s']:.3g}", spread, *quality)
    Console(width=max(150, Console().width)).print(table)


def measure(backbone: str, images: Images, base: Job, options: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Run all cases of one backbone."""
    missing, rows = absent(), []
    for case in options.cases.split(","):
        folds = parts_of(images, 5 if case == "folds" else 4, base.batch, whole=case == "folds")
        stages = stages_of(options.stages) if case == "schedule" else stages_of(f"head:{options.head_epochs}")
        job = replace(base, backbone=backbone, stages=stages, parts=folds, weights=str(root / f"{backbone}.pt"))
        if not Path(job.weights).exists():
            turn("prepare", job, root)
        runs = take_turns(jobs_of(job, case, missing), root, 1 if case == "folds" else options.repeats)
        found = rows_of(case, job, options.clock, runs)
        for column in COLUMNS:
            title = f"{backbone}, {case}: {len(job.parts[0].train)} images of {base.size} px, column {column}"
            title += f" ({options.clock} time, {base.threads} threads)"
            show(title, [row for row in found if row["column"] == column])
        rows += found
    return rows


def read_options() -> argparse.Namespace:
    """Read what was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="few small images, one round: to see that it works")
    parser.add_argument("--backbones", default="resnet18", help="of resnet18, resnet50, densenet121 and their kin")
    parser.add_argument("--stages", default="head:6,last:6,last2:3,full:2", help="of the case schedule")
    parser.add_argument("--cases", default="schedule,head,folds")
    parser.add_argument("--head-epochs", type=int, default=10, help="of the cases head and folds")
    parser.add_argument("--images", type=int, default=64, help="three quarters learn, a quarter validates")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=2, help="of schedule and head; folds are run once")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is not quiet")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--source", type=Path, help="a folder with labels.csv instead of generated images")
    parser.add_argument("--label", default="label", help="column of --source")
    parser.add_argument("--patient", default="patient", help="column of --source")
    options = parser.parse_args()
    if options.quick:
        options.stages, options.head_epochs, options.repeats = "head:2,last:1,last2:1,full:1", 2, 1
        options.images, options.batch, options.size, options.cases = 32, 8, 64, "schedule"
    return options


def main() -> None:
    """Run, print the tables, and the figures for machines."""
    options, rows = read_options(), []
    missing = absent()
    for name, packages in missing.items():
        print(f"{NAMES[name]} is left out: {packages} is not installed")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if options.source:
            images = copy_images(options.source, root / "images", options.label, options.patient, options.images)
        else:
            images = write_images(root / "images", options.images // 2, options.size)
        base = Job(
            images=str(images.folder), weights="", backbone="", classes=images.classes, size=options.size,
            resize=images.resize, batch=options.batch, stages=(), parts=(), column="matched",
            threads=options.threads, device=options.device,
        )  # fmt: skip
        for backbone in options.backbones.split(","):
            rows += measure(backbone, images, base, options, root)
    if options.json:
        counted = {
            "images": options.images,
            "size": options.size,
            "repeats": options.repeats,
            "clock": options.clock,
            "threads": options.threads,
        }
        print(json.dumps({"benchmark": "transfer", **counted, "absent": sorted(missing), "rows": rows}))


if __name__ == "__main__":
    main()
