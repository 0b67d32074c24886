"""Metrics against what a project would call otherwise, CPU time of one process; contenders interleaved, medians.

``classification``: 10,000 studies of 5,000 patients. The AUROC's bootstrap of 2,000 resamples against scikit-learn
called once per resample with the same weights; medtl's time holds the drawing of the patients, scikit-learn's does not.
The other metrics on the same weights, without the drawing. scikit-learn runs some of the resamples and its time is
scaled to all of them (each costs the same); the values of these are compared. DeLong's interval and paired test against
one that compares every diseased study with every healthy one, which is what the formula says.

``surfaces``: Dice, NSD at 2 mm, HD95 and ASSD of one pair of masks against MONAI's four functions, in both conventions
(``voxels`` is MONAI as it comes, ``surfels`` its NSD with ``use_subvoxels=True``); the bumpy balls are as large as an
organ and a lesion in a CT volume, and as a hippocampus in its crop, with a Dice of .85 to .9.

    python benchmarks/metrics.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter, zoom
from scipy.stats import norm
from sklearn import metrics as sk

from medtl.evaluation.delong import area, contrast, covariance
from medtl.evaluation.metrics import METRICS, auroc
from medtl.evaluation.surfaces import Convention, measure
from medtl.evaluation.uncertainty import drawn

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
PEERS: Mapping[str, Callable[..., float]] = {
    "average_precision": sk.average_precision_score,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "sensitivity": sk.recall_score,
    "ppv": sk.precision_score,
    "f1": sk.f1_score,
    "mcc": sk.matthews_corrcoef,
    "kappa": sk.cohen_kappa_score,
    "brier": sk.brier_score_loss,
    "log_loss": sk.log_loss,
}


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


def loop(peer: Callable[..., float], truth: FloatArray, score: FloatArray, weight: FloatArray) -> FloatArray:
    """Call scikit-learn once per resample."""
    return np.array([peer(truth, score, sample_weight=row) for row in weight])


def delong(truth: FloatArray, one: FloatArray, other: FloatArray) -> FloatArray:
    """Give variance and paired p value as an evaluation does."""
    found = area(truth, one), area(truth, other)
    return np.array([covariance(found[0], found[0]), contrast(found[:1], found[1:]).p_value])


def pair_by_pair(truth: FloatArray, one: FloatArray, other: FloatArray) -> FloatArray:
    """Give the same from a table of everybody diseased by everybody healthy. Source: DeLong et al. 1988."""
    rows = []
    for score in (one, other):
        high, low = score[truth > 0.5][:, None], score[truth <= 0.5]
        won = (high > low) + 0.5 * (high == low)
        rows.append((won.mean(1), won.mean(0)))
    ill, well = (np.cov([row[kind] for row in rows]) / len(rows[0][kind]) for kind in (0, 1))
    table = ill + well
    spread = math.sqrt(table[0, 0] + table[1, 1] - 2 * table[0, 1])
    difference = float(rows[0][0].mean() - rows[1][0].mean())
    return np.array([table[0, 0], 2 * norm.sf(abs(difference) / spread)])


def seconds(work: Callable[[], FloatArray]) -> tuple[float, FloatArray]:
    """Give the CPU time and the values."""
    started = time.process_time()
    values = work()
    return time.process_time() - started, values


def side_by_side(
    case: str, own: Callable[[], FloatArray], name: str, peer: Callable[[], FloatArray], scale: float, repeats: int
) -> tuple[list[dict[str, Any]], float]:
    """Time two contenders in turn after one warm-up; give their rows and the largest difference of their values.

    Args:
        scale: how many times the peer's work the own work is.
    """
    times: dict[str, list[float]] = {"medtl": [], name: []}
    difference = 0.0
    for repeat in range(repeats + 1):
        mine, values = seconds(own)
        theirs, expected = seconds(peer)
        difference = max(difference, float(np.abs(values[: len(expected)] - expected).max()))
        if repeat:
            times["medtl"].append(mine)
            times[name].append(theirs * scale)
    fastest = max(median(times["medtl"]), 1e-9)  # the clock of a quick run may not have moved
    rows: list[dict[str, Any]] = [
        {"name": contender, "case": case, "median": max(median(spent), 1e-9), "unit": "s"}
        for contender, spent in times.items()
    ]
    return [{**row, "ratio": row["median"] / fastest} for row in rows], difference


def classification(quick: bool) -> dict[str, Any]:
    """Measure the metrics of classification: rows, and what else there is to say."""
    count, resamples, peer, repeats = (500, 200, 20, 1) if quick else (10_000, 2_000, 100, 3)
    truth, score, patients = studies(count)
    weight = first(patients, resamples, peer)
    boot = partial(bootstrap, truth, score, patients, resamples)
    rows, difference = side_by_side(
        f"auroc, {count:,} studies, {resamples:,} resamples", boot, "scikit-learn in a loop",
        partial(loop, sk.roc_auc_score, truth, score, weight), resamples / len(weight), repeats,
    )  # fmt: skip
    drew = median(seconds(lambda: drawing(patients, resamples))[0] for _ in range(repeats))
    share = drew / rows[0]["median"]
    for name, function in PEERS.items():
        used = (score >= 0.5).astype(np.float64) if METRICS[name].needs == "decisions" else np.clip(score, 1e-4, 0.9999)
        few = weight[: max(1, len(weight) // 4)]
        more, apart = side_by_side(
            name, partial(METRICS[name].function, truth, used, weight), "scikit-learn in a loop",
            partial(loop, function, truth, used, few), len(weight) / len(few), repeats,
        )  # fmt: skip
        rows, difference = rows + more, max(difference, apart)
    other = np.round(score + np.random.default_rng(1).normal(0, 0.1, count), 4)
    more, apart = side_by_side(
        f"DeLong, variance and paired test, {count:,} studies", partial(delong, truth, score, other), "pair by pair",
        partial(pair_by_pair, truth, score, other), 1.0, 2 * repeats,
    )  # fmt: skip
    found = {"studies": count, "resamples": resamples, "largest_difference": difference, "drawing_share": share}
    return {**found, "delong_difference": apart, "rows": rows + more}


def bumpy_ball(shape: tuple[int, ...], radius: float, away: float, seed: int) -> FloatArray:
    """Give a mask whose border goes in and out by a twentieth of its radius."""
    rough = gaussian_filter(np.random.default_rng(seed).normal(size=[size // 4 + 2 for size in shape]), 2)
    bumps = zoom(rough / rough.std(), [size / few for size, few in zip(shape, rough.shape, strict=True)], order=1)
    square = sum((np.arange(size) - size / 2 - away).reshape(-1, *[1] * (len(shape) - axis - 1)) ** 2
                 for axis, size in enumerate(shape))  # fmt: skip
    ball: FloatArray = np.sqrt(square) + bumps * radius / 20 < radius
    return ball


def four_values(truth: FloatArray, predicted: FloatArray, spacing: tuple[float, ...], how: Convention) -> FloatArray:
    """Give Dice, NSD, HD95 and ASSD, as an evaluation does."""
    ((overlap, surface),) = measure(truth, predicted, spacing, 2.0, convention=how)
    return np.array([overlap.dice, surface.nsd, surface.hd95_mm, surface.assd_mm], dtype=np.float64)


def four_calls(truth: FloatArray, predicted: FloatArray, spacing: tuple[float, ...], how: Convention) -> FloatArray:
    """Give the same by MONAI; of surfels, which its distances do not know, the first two only."""
    one, other = (torch.from_numpy(mask[None, None]) for mask in (truth, predicted))
    masks: dict[str, Any] = {"y": one.float(), "y_pred": other.float(), "include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of one of its functions to another
        found = [
            compute_dice(other, one),
            compute_surface_dice(class_thresholds=[2.0], use_subvoxels=how == "surfels", **masks),
            compute_hausdorff_distance(percentile=95, **masks),
            compute_average_surface_distance(symmetric=True, **masks),
        ]
    values = np.array([float(value) for value in found])
    return values[:2] if how == "surfels" else values


def surfaces(quick: bool) -> dict[str, Any]:
    """Measure overlap and surfaces of three sizes of masks."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    difference, volume, ct = 0.0, (64, 64, 32) if quick else (256, 256, 128), (0.8, 0.8, 1.5)
    sizes = {"organ": (volume, volume[0] / 6.3, 2.0, ct), "lesion": (volume, 8, 1.0, ct)}
    for name, (shape, radius, away, spacing) in {**sizes, "hippocampus": ((36, 50, 35), 11, 1.0, (1.0,) * 3)}.items():
        two = bumpy_ball(shape, radius, 0.0, 0), bumpy_ball(shape, radius, away, 1)
        for how in ("surfels", "voxels"):
            case = f"{name}, {np.count_nonzero(two[0]):,} voxels, {how}"
            own, peer = (partial(work, *two, spacing, how) for work in (four_values, four_calls))
            more, apart = side_by_side(case, own, "MONAI", peer, 1.0, 1 if quick else 7)
            rows, difference = rows + more, max(difference, apart)
    return {"surfaces_difference": difference, "rows": rows}


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Lay out rows for people."""
    laid = Table("case", "contender", "CPU time", "medtl is faster by", title=title)
    for row in rows:
        laid.add_row(row["case"], row["name"], f"{1000 * row['median']:,.2f} ms", f"{row['ratio']:,.1f}x")
    return laid


def main() -> None:
    """Run, print the tables, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="few studies, one repeat: to see that it works")
    arguments = parser.parse_args()
    console = Console(width=120)
    classes = classification(arguments.quick)
    masks = surfaces(arguments.quick)
    rows = [*classes["rows"], *masks["rows"]]
    console.print(table("classification", classes["rows"]))
    console.print(f"of the AUROC bootstrap's time, {classes['drawing_share']:.0%} draws the patients")
    console.print(
        f"largest difference: {classes['largest_difference']:.1e}; DeLong: {classes['delong_difference']:.1e}"
    )
    console.print(table("surfaces", masks["rows"]))
    console.print(f"largest difference, MONAI being of single precision: {masks['surfaces_difference']:.1e}")
    if arguments.json:
        print(json.dumps({"benchmark": "metrics", **classes, **masks, "rows": rows}))


if __name__ == "__main__":
    main()
