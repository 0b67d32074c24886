"""How often a 95 % interval of the AUROC holds the truth: medtl's, and the percentile bootstrap over patients alone.

Scores are normal, shifted for the diseased, so that the true AUROC is known; images of one patient share half of their
variance. The figure is the share of simulated test parts whose interval holds the truth: .95 is what is promised.

    python benchmarks/coverage.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
from statistics import NormalDist
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from medtl.evaluation.bounds import Counts, least_of_a_perfect
from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import drawn, estimate

# diseased patients, healthy patients, images of each, distance of the two kinds in standard deviations
CASES = ((8, 8, 1, 3.5), (15, 30, 1, 3.5), (30, 60, 1, 2.5), (15, 15, 20, 3.0), (60, 60, 20, 3.0))
SHARED = 0.5
LEVEL = 0.95


def simulate(case: tuple[int, int, int, float], trials: int, resamples: int) -> dict[str, float]:
    """Give the share of intervals that hold the truth, with and without the bounds."""
    diseased, healthy, images, distance = case
    rng = np.random.default_rng([diseased, healthy, images])
    truth = np.repeat([1.0] * diseased + [0.0] * healthy, images)
    patients = [f"p{number}" for number in range(diseased + healthy) for _ in range(images)]
    studies = [f"s{number:06d}" for number in range(len(truth))]
    counts = Counts.of(patients, truth, truth)
    least = least_of_a_perfect("rarer", counts, LEVEL)
    shared = SHARED if images > 1 else 0.0
    held = {"medtl": 0, "percentile bootstrap alone": 0}
    true_value = NormalDist().cdf(distance / math.sqrt(2))
    for trial in range(trials):
        own = np.repeat(rng.normal(size=diseased + healthy), images) * math.sqrt(shared)
        score = own + rng.normal(size=len(truth)) * math.sqrt(1 - shared) + distance * truth
        draws = np.concatenate([auroc(truth, score, weights) for weights in drawn(studies, patients, resamples, trial)])
        value = float(auroc(truth, score, np.ones((1, len(truth))))[0])
        low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found = estimate(value, draws, LEVEL, min(diseased, healthy), least)
        held["percentile bootstrap alone"] += bool(low <= true_value <= high)
        held["medtl"] += bool(low - found.below <= true_value <= high + found.above)
    return {name: count / trials for name, count in held.items()}


def main() -> None:
    """Run, print the table, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="few trials: to see that it works")
    arguments = parser.parse_args()
    trials, resamples = (20, 100) if arguments.quick else (300, 400)
    table = Table(
        "patients", "images of each", "true AUROC", "medtl", "bootstrap alone", title="held, of 95 % intervals"
    )
    rows: list[dict[str, Any]] = []
    for case in CASES:
        found = simulate(case, trials, resamples)
        label = f"{case[0]} + {case[1]}"
        true_value = NormalDist().cdf(case[3] / math.sqrt(2))
        table.add_row(label, str(case[2]), f"{true_value:.3f}", *(f"{share:.2f}" for share in found.values()))
        for name, share in found.items():
            ratio = found["medtl"] / share if share else math.inf
            row = {"name": name, "case": f"{label} x {case[2]}", "median": share, "unit": "share", "ratio": ratio}
            rows.append(row)
    Console().print(table)
    if arguments.json:
        print(json.dumps({"benchmark": "coverage", "trials": trials, "rows": rows}))


if __name__ == "__main__":
    main()
