"""The AUROC's bootstrap over patients against scikit-learn called once per resample with the same weights.

10,000 studies of 5,000 patients, 2,000 resamples, CPU time of one process; warm-up dropped, contenders interleaved,
median of three. medtl's time holds the drawing of the patients, scikit-learn's does not. scikit-learn runs 100 of the
resamples and its time is scaled to all of them (each costs the same); the values of these 100 are compared.

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
from medtl.evaluation.uncertainty import drawn

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


def studies(count: int) -> tuple[FloatArray, FloatArray, list[str]]:
    """Give truth, score (rounded: with ties) and patients, two studies each."""
    rng = np.random.default_rng(0)
    truth = (rng.random(count) < 0.3).astype(np.float64)
    score = np.round(1 / (1 + np.exp(-(rng.normal(0, 1, count) + truth))), 4)
    return truth, score, [f"p-{number // 2}" for number in range(count)]


def bootstrap(truth: FloatArray, score: FloatArray, patients: list[str], resamples: int) -> FloatArray:
    """Draw the patients and measure every resample, as an evaluation does."""
    names = [f"s-{number}" for number in range(len(patients))]
    return np.concatenate([auroc(truth, score, some) for some in drawn(names, patients, resamples, 0)])


def first(patients: list[str], resamples: int, wanted: int) -> FloatArray:
    """Give the weights of the first resamples."""
    names = [f"s-{number}" for number in range(len(patients))]
    return next(drawn(names, patients, resamples, 0))[:wanted]


def drawing(patients: list[str], resamples: int) -> FloatArray:
    """Draw the patients and do nothing with them."""
    names = [f"s-{number}" for number in range(len(patients))]
    return np.array([some[0, 0] for some in drawn(names, patients, resamples, 0)])


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
    weight = first(patients, resamples, peer)
    peer = len(weight)
    times: dict[str, list[float]] = {"medtl": [], "scikit-learn in a loop": []}
    drawn_in = []
    difference = 0.0
    for repeat in range(repeats + 1):
        own, all_values = seconds(lambda: bootstrap(truth, score, patients, resamples))
        scaled, values = seconds(lambda: loop(truth, score, weight))
        drew, _ = seconds(lambda: drawing(patients, resamples))
        difference = max(difference, float(np.abs(all_values[:peer] - values).max()))
        if repeat:
            times["medtl"].append(own)
            drawn_in.append(drew)
            times["scikit-learn in a loop"].append(scaled * resamples / peer)
    title = f"AUROC, {count:,} studies, {resamples:,} resamples"
    table = Table("contender", "CPU time", "medtl is faster by", title=title)
    rows = []
    for name, spent in times.items():
        ratio = median(spent) / median(times["medtl"])
        table.add_row(name, f"{median(spent):,.2f} s", f"{ratio:,.1f}x")
        rows.append({"name": name, "case": "auroc", "median": median(spent), "unit": "s", "ratio": ratio})
    Console().print(table)
    share = median(drawn_in) / median(times["medtl"])
    Console().print(f"of medtl's time, {share:.0%} draws the patients")
    Console().print(f"scikit-learn: {peer} resamples measured and scaled; largest difference {difference:.1e}")
    if arguments.json:
        figures = {"benchmark": "metrics", "studies": count, "resamples": resamples, "largest_difference": difference}
        figures["drawing_share"] = share
        print(json.dumps({**figures, "rows": rows}))


if __name__ == "__main__":
    main()
