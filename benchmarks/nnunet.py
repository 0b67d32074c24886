"""medtl against nnU-Net v2: the same patients, the same cores, the same minutes of training; Dice on the same test.

Patients are dealt out once. medtl trains as its config says, with as many epochs as fit the time (measured first), on
the training part, and chooses on validation; nnU-Net trains 3d_fullres on training and validation together, since it
has no need of the latter when time decides. Planning and packing are not in the time; they are told apart. Each point
of the plot is a whole training whose learning rate fell to the end. Means over structures with 95 % intervals over
patients, from the same function for both; one seed, one split.

    python -m venv NN && NN/bin/pip install nnunetv2
    python benchmarks/nnunet.py --source FOLDER --nnunet NN/bin/python [--minutes 4 10] [--plot nnunet.svg] [--json]

FOLDER holds the label table and scans that the config names (configs/hippocampus.yaml: cases.csv and NIfTI files).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from medtl.config import Config, load_config
from medtl.evaluation.masks import assess_masks, measure_case
from medtl.records import AnyArray, MaskResult, Structure

ROOT = Path(__file__).parents[1]
NAME = "Dataset001_Peer"
SHARES = (0.6, 0.2, 0.2)  # train, val, test
SHOWN = ("dice", "hd95_mm", "nsd")


def main() -> None:
    """Deal out, train both for each time, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the label table and the scans")
    parser.add_argument("--nnunet", type=Path, required=True, help="Python of an environment that has nnunetv2")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "hippocampus.yaml")
    parser.add_argument("--minutes", type=float, nargs="+", default=[4.0, 10.0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="write the picture here (svg, png, pdf)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    config = load_config(given.config, (f"scans.source={given.source.absolute()}",))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows = dealt(config, given.source)
        theirs_in(work / "nnunet", given.source, rows, config)
        lines = ours(given, work, rows)
        lines += theirs(given, work / "nnunet", rows, config)
    if given.plot:
        drawn(lines, len([row for row in rows if row["part"] == "test"])).savefig(given.plot, bbox_inches="tight")
    if given.json:
        print(json.dumps(lines))
    else:
        shown(lines)


def dealt(config: Config, source: Path) -> list[dict[str, str]]:
    """Read the label table and give each patient a part, the same every time."""
    labels = config.studies.labels
    with (source / str(labels.table)).open(newline="") as lines:
        rows = [dict(row) for row in csv.DictReader(lines)]
    patients = sorted({row[labels.patient] for row in rows})
    random.Random(0).shuffle(patients)
    ends = np.cumsum(np.array(SHARES) * len(patients)).round().astype(int)
    part = {
        patient: ("train", "val", "test")[int(np.searchsorted(ends, n, "right"))] for n, patient in enumerate(patients)
    }
    return [row | {"part": part[row[labels.patient]]} for row in rows]


def table_of(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write the label table with its parts."""
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# -- ours ----------------------------------------------------------------------------------------------------------


def ours(given: argparse.Namespace, work: Path, rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Measure how long an epoch takes, then train for as many as fit each time."""
    table = table_of(work / "labels.csv", rows)
    wanted = load_config(given.config).model.schedule
    if len(wanted) != 1:
        raise SystemExit("the config has several phases; this benchmark gives its time to one")
    phase = {key: value for key, value in wanted[0].model_dump(mode="json").items() if value is not None}
    common = [
        f"scans.source={given.source.absolute()}", f"workspace={work / 'workspace'}", "studies.labels.split=part",
        f"studies.labels.table={table}", f"model.threads={given.threads}",
    ]  # fmt: skip

    def trained(verb: str, epochs: int, *more: str) -> tuple[dict[str, Any], float]:
        settings = [*common, f"model.phases={json.dumps([phase | {'epochs': epochs}])}", *more]
        told = medtl(verb, given.config, settings)
        newest = max(
            (work / "workspace" / "index" / "seconds").glob("*.json"), key=lambda path: path.stat().st_mtime_ns
        )
        return told, float(json.loads(newest.read_text())["seconds"])

    # of the trials the longer one validates once more; a long training does so fifteen times in all
    seconds = [trained("train", epochs, f"model.segmenter.validate_every={epochs}")[1] for epochs in (1, 4)]
    each = (seconds[1] - seconds[0]) / 3
    validating = max(0.0, seconds[0] - each)
    found = []
    for minutes in given.minutes:
        epochs = max(2, int((60 * minutes - 15 * validating) / each))
        told, taken = trained("run", epochs)
        line = {"who": "medtl", "minutes": minutes, "seconds": taken, "did": f"{epochs} epochs"}
        found.append(line | {name: told["metrics"][name] for name in SHOWN})
    return found


def medtl(verb: str, config: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Run one command and read its last line."""
    words = [word for one in settings for word in ("--set", one)]
    command = [sys.executable, "-m", "pipelines.cli", verb, str(config.absolute()), *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode not in (0, 3):  # 3: the config's gate refused it, as it should what learned for minutes
        raise SystemExit(f"medtl {verb} failed; its messages are above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- theirs --------------------------------------------------------------------------------------------------------


def theirs_in(work: Path, source: Path, rows: Sequence[Mapping[str, str]], config: Config) -> None:
    """Lay the same scans out as nnU-Net wants them, the masks' values as the config's structures."""
    labels, folder = config.studies.labels, work / "raw" / NAME
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    for number, row in enumerate(rows):
        where = "imagesTs" if row["part"] == "test" else "imagesTr"
        shutil.copyfile(source / row[labels.path], folder / where / f"case_{number:04d}_0000.nii.gz")
        if where == "imagesTr":
            mask = nibabel.load(source / row[str(labels.mask)])
            codes = nibabel.Nifti1Image(coded(np.asarray(mask.dataobj), config), mask.affine)
            nibabel.save(codes, folder / "labelsTr" / f"case_{number:04d}.nii.gz")
    described = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0} | {one.name: n for n, one in enumerate(structures_of(config), 1)},
        "numTraining": len([row for row in rows if row["part"] != "test"]),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described))


def structures_of(config: Config) -> tuple[Structure, ...]:
    """Give the config's structures, one value each."""
    named = config.studies.labels.structures
    if not all(isinstance(value, int) for value in named.values()):
        raise SystemExit("the config has regions of several values; nnU-Net is given plain labels here")
    return tuple(Structure(name, (int(str(value)),)) for name, value in named.items())


def coded(values: AnyArray, config: Config) -> AnyArray:
    """Number the values of a mask as the structures are numbered."""
    codes = np.zeros(values.shape, np.uint8)
    for number, one in enumerate(structures_of(config), 1):
        codes[np.isin(values, one.values)] = number
    return codes


def theirs(
    given: argparse.Namespace, work: Path, rows: Sequence[Mapping[str, str]], config: Config
) -> list[dict[str, Any]]:
    """Train nnU-Net in its own environment, and measure what it wrote as ours is measured."""
    peer = [str(given.nnunet), str(ROOT / "benchmarks" / "nnunet_peers.py"), str(work)]
    command = [*peer, *(f"{minutes:g}" for minutes in given.minutes), "--threads", str(given.threads)]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit("nnU-Net failed; its messages are above")
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"nnU-Net: {told['prepared_s']} s to prepare, {time.monotonic() - began:.0f} s in all", file=sys.stderr)
    labels, lines = config.studies.labels, []
    for run in told["runs"]:
        results: list[MaskResult] = []
        for number, row in enumerate(rows):
            if row["part"] != "test":
                continue
            truth = nibabel.load(given.source / row[str(labels.mask)])
            found = nibabel.load(work / "out" / f"{run['minutes']:g}" / f"case_{number:04d}.nii.gz")
            spacing = [float(step) for step in truth.header.get_zooms()[:3]]
            both = coded(np.asarray(truth.dataobj), config), np.asarray(found.dataobj).astype(np.uint8)
            results += measure_case(
                f"case_{number:04d}", row[labels.patient], *both, spacing, structures_of(config), False,
                config.evaluation.masks,
            )  # fmt: skip
        scores = assess_masks(results, config.evaluation, 0).scores
        did = f"{run['steps']} steps of {run['batch']}"
        line: dict[str, Any] = {"who": "nnU-Net", "minutes": run["minutes"], "seconds": run["seconds"], "did": did}
        for name in SHOWN:
            score = next(one for one in scores if one.metric == name and one.label == "macro")
            line[name] = {"value": score.value, "low": score.low, "high": score.high}
        lines.append(line | {"peer": run})
    return lines


# -- shown ---------------------------------------------------------------------------------------------------------


def shown(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    table = Table("", "minutes", "did", "Dice", "HD95, mm", "NSD")
    for line in sorted(lines, key=lambda one: (one["minutes"], one["who"])):
        figures = [
            f"{line[name]['value']:.3f} [{line[name]['low']:.3f}, {line[name]['high']:.3f}]"
            if line[name]["value"] is not None and line[name]["low"] is not None
            else "not estimable"
            for name in SHOWN
        ]
        table.add_row(line["who"], f"{line['seconds'] / 60:.1f}", line["did"], *figures)
    Console().print(table)


def drawn(lines: Sequence[Mapping[str, Any]], patients: int) -> Figure:
    """Draw Dice against wall-clock."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for who, marker in (("medtl", "o-"), ("nnU-Net", "s--")):
        own = sorted((line for line in lines if line["who"] == who), key=lambda line: line["seconds"])
        minutes = [line["seconds"] / 60 for line in own]
        dice = [[line["dice"][bound] for line in own] for bound in ("value", "low", "high")]
        error = [np.subtract(dice[0], dice[1]), np.subtract(dice[2], dice[0])]
        axes.errorbar(minutes, dice[0], yerr=error, fmt=marker, capsize=3, label=who)
    axes.set(xlabel="minutes of training", ylabel=f"Dice, {patients} test patients, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
