"""Do cached views cost accuracy? The same phases with 1, 2, 4 and 8 views of each image, and with new ones every epoch.

A head and a deeper phase are trained on real images with a frozen trunk; each is measured on the same test patients and
compared with live augmentation, paired. Seconds are of training, cache pass included.

    python benchmarks/views.py --config configs/malaria.yaml --source FOLDER --weights FILE [--epochs 8] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from medtl.config import Config, PhaseConfig, load_config
from medtl.evaluation.io import read_comparison, read_evaluation
from medtl.records import Artifact, Score
from pipelines import steps

VIEWS: tuple[int | Literal["live"], ...] = ("live", 1, 2, 4, 8)


def with_views(config: Config, views: int | Literal["live"], epochs: int) -> Config:
    """Give the config with a head and a deeper phase that augment with so many views."""
    common: dict[str, Any] = {"epochs": epochs, "views": views}
    phases = (
        PhaseConfig(name="head", unfreeze="head", lr=2e-3, **common),
        PhaseConfig(name="deep", unfreeze=2, lr=1e-3, decay=0.7, **common),
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"phases": phases, "guard": 0.0})})


def measure(config: Config, epochs: int) -> list[dict[str, Any]]:
    """Train and measure every number of views; give a row for each."""
    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    split = steps.split_by_patient(config, scans, cohort)
    plan = steps.make_plan(config, scans, cohort, split)
    pack = steps.pack_images(config, scans, cohort, plan)
    rows: list[dict[str, Any]] = []
    reference: Artifact | None = None
    for views in VIEWS:
        chosen = with_views(config, views, epochs)
        checkpoint = steps.fit_in_phases(chosen, cohort, split, plan, pack)
        val, test = (steps.predict_part(chosen, checkpoint, cohort, split, pack, part, "benchmark") for part in PARTS)
        auroc = read_evaluation(steps.evaluate(chosen, plan, val, test).path).metrics["auroc"]
        difference = (
            None if reference is None else read_comparison(steps.compare(chosen, test, reference).path).difference
        )
        reference = reference or test
        rows.append(
            {"views": views, "auroc": auroc, "difference": difference, "seconds": steps.seconds_of(chosen, checkpoint)}
        )
    return rows


PARTS: tuple[Literal["val", "test"], ...] = ("val", "test")


def _interval(score: Score | None) -> str:
    if score is None or score.value is None:
        return "-"
    return f"{score.value:.3f}" + (f" [{score.low:.3f}, {score.high:.3f}]" if score.low is not None else "")


def main() -> None:
    """Run, print the table, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True, help="folder of the config's images")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of the config's backbone")
    parser.add_argument("--epochs", type=int, default=8, help="of each of the two phases")
    parser.add_argument("--workspace", type=Path, help="default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        said = [f"scans.source={arguments.source.absolute()}", f"model.weights={arguments.weights.absolute()}"]
        workspace = arguments.workspace or Path(temporary)
        rows = measure(load_config(arguments.config, [*said, f"workspace={workspace.absolute()}"]), arguments.epochs)
    table = Table(
        "views", "AUROC", "minus live augmentation", "seconds", title=f"{arguments.epochs} + {arguments.epochs} epochs"
    )
    for row in rows:
        table.add_row(str(row["views"]), _interval(row["auroc"]), _interval(row["difference"]), f"{row['seconds']:.0f}")
    Console().print(table)
    if arguments.json:
        live = rows[0]["seconds"]
        found = [
            {"name": f"medtl, {row['views']} views", "median": row["seconds"], "unit": "s",
             "ratio": live / row["seconds"], "auroc": row["auroc"].value}
            for row in rows
        ]  # fmt: skip
        print(json.dumps({"benchmark": "views", "rows": found}))


if __name__ == "__main__":
    main()
