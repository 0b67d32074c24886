"""How often 95 % intervals hold the truth: medtl's, the percentile bootstrap over patients, and the one over images.

Scores are normal, shifted for the diseased, so that the truth is known; images of one patient share a part of their
variance. Every metric's interval is made from the same simulated test parts. A figure is the share of test parts whose
interval holds the truth, beside it the mean width: .95 is what is promised. Where a case says so, the kind of each
patient is drawn as well (prevalence 1/3): then PPV, F1 and average precision vary as they do in a clinic.
``mixed 20`` is fifteen patients with images of both kinds and five with healthy ones only.

    python benchmarks/coverage.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from medtl.evaluation.bounds import Basis, Counts
from medtl.evaluation.metrics import METRICS
from medtl.evaluation.uncertainty import drawn, estimate, left_out, score_of
from medtl.records import FloatArray

LEVEL = 0.95
UNEVEN = (2, 5, 10, 20, 63)  # images of each patient, in turn: twenty in the mean
CONTENDERS = ("medtl", "percentiles over patients", "percentiles over images")
POPULATION = 20_000  # quantiles of the normal distribution that stand for everybody of one kind


@dataclass(frozen=True, slots=True)
class Case:
    """A test part to simulate."""

    patients: str  # "15 + 15": diseased and healthy; "mixed 20": see above; "drawn 45": of either kind
    images: int  # of each patient and kind; 0: uneven
    shared: float  # part of the variance that images of one patient share
    auroc: float

    @property
    def name(self) -> str:
        """Say what it is in a table's column."""
        return f"{self.patients} x {self.images or 'uneven'}, shared {self.shared:g}, AUROC {self.auroc:g}"

    @property
    def distance(self) -> float:
        """Give the distance of the two kinds' means in standard deviations."""
        return math.sqrt(2) * NormalDist().inv_cdf(self.auroc)


CASES = (
    *(Case(patients, 1, 0.0, auroc) for patients in ("8 + 8", "15 + 15", "30 + 60") for auroc in (0.9, 0.98)),
    *(
        Case(patients, 20, shared, auroc)
        for patients in ("8 + 8", "15 + 15", "mixed 20", "60 + 60")
        for shared, auroc in ((0.3, 0.75), (0.3, 0.98), (0.5, 0.98))
    ),
    *(Case(patients, 0, 0.3, 0.98) for patients in ("15 + 15", "mixed 20", "60 + 60")),
    Case("drawn 45", 1, 0.0, 0.9),
    Case("drawn 45", 20, 0.5, 0.9),
    Case("drawn 120", 0, 0.3, 0.98),
)


def groups(case: Case, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Give patient, kind and number of images of every group of images."""
    images = UNEVEN if case.images == 0 else (case.images,)
    if case.patients.startswith("mixed"):
        kinds = [(person, kind) for person in range(20) for kind in ((0, 1) if person < 15 else (0,))]
    elif case.patients.startswith("drawn"):
        count = int(case.patients.split()[1])
        kinds = list(enumerate((rng.random(count) < 1 / 3).astype(int).tolist()))
    else:
        diseased, healthy = map(int, case.patients.split(" + "))
        kinds = [(person, int(person < diseased)) for person in range(diseased + healthy)]
    return [(person, kind, images[person % len(images)]) for person, kind in kinds]


def odds(case: Case) -> float:
    """Give diseased per healthy images in the population."""
    if case.patients.startswith("drawn"):
        return 0.5
    sizes = [sum(n for _, kind, n in groups(case, np.random.default_rng(0)) if kind == one) for one in (0, 1)]
    return sizes[1] / sizes[0]


def scores(case: Case, rng: np.random.Generator) -> tuple[FloatArray, FloatArray, list[str]]:
    """Draw a test part: truth, scores, patients."""
    own: dict[int, float] = {}
    truth, values, people = [], [], []
    mixed = case.patients.startswith("mixed")
    for person, kind, images in groups(case, rng):
        common = own.setdefault(person, float(rng.normal()))
        if mixed and person < 15:  # half of what a patient's images share is shared by both kinds
            common = (common + float(rng.normal())) / math.sqrt(2)
        noise = rng.normal(size=images) * math.sqrt(1 - case.shared)
        values.append(math.sqrt(case.shared) * common + noise + case.distance * kind)
        truth += [float(kind)] * images
        people += [f"p{person:04d}"] * images
    return np.array(truth), np.concatenate(values), people


def probability(case: Case, score: FloatArray) -> FloatArray:
    """Turn a score into the probability of an overconfident model: log odds half as large again as they should be."""
    logit = 1.5 * (case.distance * score - case.distance**2 / 2) + math.log(odds(case))
    chance: FloatArray = 1 / (1 + np.exp(-logit))
    return chance


def truths(case: Case) -> dict[str, float]:
    """Measure everybody."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((number + 0.5) / POPULATION) for number in range(POPULATION)])
    truth = np.repeat([1.0, 0.0], len(quantiles))
    score = np.concatenate([quantiles + case.distance, quantiles])
    weight = np.where(truth > 0.5, odds(case), 1.0)[None, :]
    return {
        name: float(measure(truth, score)(weight)[0]) if name != "auroc" else case.auroc
        for name, measure in measures(case).items()
    }


def measures(case: Case) -> dict[str, Callable[[FloatArray, FloatArray], Callable[[FloatArray], FloatArray]]]:
    """Give every metric of the table as a function of truth and score, then of weights; the threshold is fixed."""

    def bound(name: str, truth: FloatArray, score: FloatArray) -> Callable[[FloatArray], FloatArray]:
        row = METRICS[name]
        decided = row.needs == "decisions"
        used = (score >= case.distance / 2).astype(np.float64) if decided else probability(case, score)
        return partial(row.function, truth, used)

    return {name: partial(bound, name) for name in METRICS}


def intervals(case: Case, trial: int, resamples: int) -> Iterator[tuple[str, str, float, float]]:
    """Simulate one test part: metric, contender, low, high; a metric that is not estimable is left out."""
    rng = np.random.default_rng([trial, *case.name.encode()])
    truth, score, people = scores(case, rng)
    ids = [f"s{number:06d}" for number in range(len(truth))]
    counts = Counts.of(people, truth, (score >= case.distance / 2).astype(np.float64))
    of_patients = np.concatenate(list(drawn(ids, people, resamples, trial)))
    of_images = np.concatenate(list(drawn(ids, ids, resamples, trial)))
    without, ones = np.concatenate(list(left_out(ids, people))), np.ones((1, len(truth)))
    for name, measure in measures(case).items():
        of = measure(truth, score)
        basis: Basis = counts.basis(METRICS[name].rests_on, LEVEL)
        draws = of(of_patients)
        answer = estimate(float(of(ones)[0]), draws, of(without), LEVEL, basis, METRICS[name].scale)
        found = score_of(name, "", answer, LEVEL, people)
        if found.low is None or found.high is None:
            continue
        yield name, CONTENDERS[0], found.low, found.high
        for contender, some in zip(CONTENDERS[1:], (draws, of(of_images)), strict=True):
            low, high = np.nanquantile(some, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            yield name, contender, float(low), float(high)


def simulate(case: Case, trials: int, resamples: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Give the share of intervals that hold the truth and their mean width, by metric and contender."""
    true_values = truths(case)
    held: dict[tuple[str, str], list[tuple[bool, float]]] = {}
    for trial in range(trials):
        for name, contender, low, high in intervals(case, trial, resamples):
            holds = low - 1e-9 <= true_values[name] <= high + 1e-9
            held.setdefault((name, contender), []).append((holds, high - low))
    return {
        name: {
            contender: (
                fmean(hit for hit, _ in held[name, contender]),
                fmean(width for _, width in held[name, contender]),
            )
            for contender in CONTENDERS
        }
        for name in METRICS
        if (name, CONTENDERS[0]) in held
    }


def main() -> None:
    """Run, print the table, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--trials", type=int, default=200, help="simulated test parts of each case")
    parser.add_argument("--quick", action="store_true", help="few trials: to see that it works")
    arguments = parser.parse_args()
    trials, resamples, cases = (4, 100, CASES[::8]) if arguments.quick else (arguments.trials, 400, CASES)
    table = Table("case", "metric", *CONTENDERS, title="held, of 95 % intervals (mean width)")
    rows: list[dict[str, Any]] = []
    for case in cases:
        for metric, found in simulate(case, trials, resamples).items():
            table.add_row(case.name, metric, *(f"{share:.3f} ({width:.3f})" for share, width in found.values()))
            own = found[CONTENDERS[0]][0]
            for name, (share, width) in found.items():
                ratio = own / share if share else None
                row = {"name": name, "case": f"{metric}, {case.name}", "median": share, "unit": "share"}
                rows.append({**row, "width": width, "ratio": ratio})
    Console(width=160).print(table)
    if arguments.json:
        print(json.dumps({"benchmark": "coverage", "trials": trials, "rows": rows}))


if __name__ == "__main__":
    main()
