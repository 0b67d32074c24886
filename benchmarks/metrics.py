"""The AUROC's bootstrap over patients against scikit-learn called once per resample with the same weights.

10,000 studies of 5,000 patients, 2,000 resamples, CPU time of one process; warm-up dropped, contenders interleaved,
median of three. scikit-learn runs 100 of the resamples and its time is scaled to all of them (each costs the same); the
values of these 100 are compared.

    python benchmarks/metrics.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import patient_weights

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


def studies(count: int) -> tuple[FloatArray, FloatArray, list[str]]:
    """Give truth, score (rounded: with ties) and patients, two studies each."""
    rng = np.random.default_rng(0)
    truth = (rng.random(count) < 0.3).astype(np.float64)
    score = np.round(1 / (1 + np.exp(-(rng.normal(0, 1, count) + truth))), 4)
    return truth, score, [f"p-{number // 2}" for number in range(count)]


def loop(truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Call scikit-learn once per resample."""
    return np.array([roc_auc_score(truth, score, sample_weight=row) for row in weight])


def seconds(work: Callable[[], FloatArray]) -> tuple[float, FloatArray]:
    """Give the CPU time and the values."""
    started = time.process_time()
    values = work()
    return time.process_time() - started, values


def main() -> None:
    """Run, print the table, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="few studies, one repeat: to see that it works")
    arguments = parser.parse_args()
    count, resamples, peer, repeats = (500, 200, 20, 1) if arguments.quick else (10_000, 2_000, 100, 3)
    truth, score, patients = studies(count)
    weight = patient_weights(patients, resamples, 0)
    times: dict[str, list[float]] = {"medtl": [], "scikit-learn in a loop": []}
    difference = 0.0
    for repeat in range(repeats + 1):
        own, all_values = seconds(lambda: auroc(truth, score, weight))
        scaled, values = seconds(lambda: loop(truth, score, weight[:peer]))
        difference = max(difference, float(np.abs(all_values[:peer] - values).max()))
        if repeat:
            times["medtl"].append(own)
            times["scikit-learn in a loop"].append(scaled * resamples / peer)
    title = f"AUROC, {count:,} studies, {resamples:,} resamples"
    table = Table("contender", "CPU time", "medtl is faster by", title=title)
    rows = []
    for name, spent in times.items():
        ratio = median(spent) / median(times["medtl"])
        table.add_row(name, f"{median(spent):,.2f} s", f"{ratio:,.1f}x")
        rows.append({"name": name, "case": "auroc", "median": median(spent), "unit": "s", "ratio": ratio})
    Console().print(table)
    Console().print(f"scikit-learn: {peer} resamples measured and scaled; largest difference {difference:.1e}")
    if arguments.json:
        figures = {"benchmark": "metrics", "studies": count, "resamples": resamples, "largest_difference": difference}
        print(json.dumps({**figures, "rows": rows}))


if __name__ == "__main__":
    main()
