"""3-D patches with their masks: crops of the memory-mapped pack against MONAI's CacheDataset on the same volumes.

Two cases: random 96 x 96 x 96 of CT 512 x 512 x 120, and small volumes (36 x 50 x 35) whole, padded to 40 x 56 x 40.
Every contender delivers float32 images and their labels, not augmented. CPU time of one process, one thread; warm-up
dropped, contenders interleaved, median of three. MONAI's caches are filled before; `CacheDataset` copies a whole
volume before it crops unless it is told not to (copy_cache=False): both are measured.

    python benchmarks/patches.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from medtl.config import GridConfig, PatchesConfig
from medtl.dataset import grid
from medtl.dataset.io import read_volumes, write_volumes
from medtl.dataset.patches import Patches
from medtl.records import AnyArray, Scan, Structure

LOW, HIGH = -100.0, 300.0  # window of the peers; ours is measured
BATCH = 2


@dataclass(frozen=True)
class Case:
    """Volumes to draw from, (slices, rows, columns), and the patch."""

    name: str
    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    volumes: int


def volumes_of(case: Case) -> list[tuple[AnyArray, AnyArray]]:
    """Make smooth random volumes, int16, each with a ball as its mask."""
    rng = np.random.default_rng(0)
    away = [np.arange(n) - n / 2 for n in case.shape]
    ball = sum(a**2 for a in np.meshgrid(*away, indexing="ij", sparse=True)) < (min(case.shape) / 4) ** 2
    found = []
    for _ in range(case.volumes):
        coarse = rng.integers(-1000, 1000, [n // 8 + 1 for n in case.shape], dtype=np.int16)
        for axis, n in enumerate(case.shape):
            coarse = np.repeat(coarse, 8, axis).take(np.arange(n), axis)
        found.append((np.ascontiguousarray(coarse), np.asarray(ball, np.uint8)))
    return found


def ours(case: Case, volumes: list[tuple[AnyArray, AnyArray]], folder: Path) -> Callable[[int], Any]:
    """Plan and pack once; give the batches of a training step."""
    affine = ((-1.0, 0.0, 0.0, 0.0), (0.0, -1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    pixels: dict[str, AnyArray] = {}

    def scan_of(name: str, array: AnyArray) -> Scan:
        pixels[name] = array
        return Scan(name, "nifti", array.shape, array.dtype.str, name, (), 16, modality="CT", affine=affine)

    scans = [scan_of(f"scan{number}", image) for number, (image, _) in enumerate(volumes)]
    masks = [scan_of(f"mask{number}", mask) for number, (_, mask) in enumerate(volumes)]
    ball = (Structure("ball", (1,)),)
    config = GridConfig(dimensions=3, patch=case.patch, batch_size=BATCH)
    plan = grid.make_grid_plan(scans, masks, lambda scan: pixels[scan.scan_id], ball, None, config)
    items = (
        (scan.scan_id, grid.to_grid(image, scan, plan), grid.mask_to_grid(mask, scan, plan))
        for scan, (image, mask) in zip(scans, volumes, strict=True)
    )
    write_volumes(folder, items, plan)
    patches = Patches(read_volumes(folder), range(len(scans)), plan, PatchesConfig(foreground=0), 0)
    return lambda step: patches.step(0, step, step % len(patches), augmented=False)


def peers(case: Case, volumes: list[tuple[AnyArray, AnyArray]], folder: Path) -> dict[str, Callable[[int], Any]]:
    """Give the batches of MONAI's cached dataset, as shipped and without its copy of whole volumes."""
    from monai.data import CacheDataset, DataLoader
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        RandSpatialCropd,
        ScaleIntensityRanged,
        SpatialPadd,
    )

    both = ["image", "label"]
    items = []
    for number, pair in enumerate(volumes):
        names = {key: str(folder / f"{key}{number}.nii") for key in both}
        for name, array in zip(names.values(), pair, strict=True):
            nib.save(nib.Nifti1Image(array, np.eye(4)), name)
        items.append(names)
    transforms = Compose(
        [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            ScaleIntensityRanged("image", LOW, HIGH, 0, 1, clip=True),
            SpatialPadd(both, case.patch),
            RandSpatialCropd(both, case.patch, random_size=False),
        ]
    )

    def batches(copies: bool) -> Callable[[int], Any]:
        loader = DataLoader(CacheDataset(items, transforms, progress=False, copy_cache=copies), batch_size=BATCH)
        going = iter(loader)

        def step(_: int) -> Any:
            nonlocal going
            batch = next(going, None)
            if batch is None:
                going = iter(loader)
                batch = next(going)
            return batch["image"], batch["label"]

        return step

    return {"MONAI CacheDataset": batches(True), "MONAI CacheDataset(copy_cache=False)": batches(False)}


def measure(steps: dict[str, Callable[[int], Any]], repeats: int, enough_s: float) -> dict[str, float]:
    """Give each contender's patches per CPU second: interleaved, warm-up dropped, median."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            started, patches, number = time.process_time(), 0, 0
            while True:
                images, _ = step(number)
                patches, number = patches + len(images), number + 1
                spent = time.process_time() - started
                if spent >= enough_s or repeat == 0:
                    break
            if repeat:
                rates[name].append(patches / spent)
    return {name: median(values) for name, values in rates.items()}


def main() -> None:
    """Run, print the tables, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="small volumes, one repeat: to see that it works")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    quick = arguments.quick
    cases = (
        Case("CT", (48, 64, 64) if quick else (120, 512, 512), (32, 32, 32) if quick else (96, 96, 96), 2),
        Case("small volumes", (36, 50, 35), (40, 56, 40), 4 if quick else 64),
    )
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            volumes = volumes_of(case)
            steps = {"medtl pack": ours(case, volumes, folder), **peers(case, volumes, folder)}
            rates = measure(steps, 1 if quick else 3, 0.05 if quick else 2.0)
        table = Table("contender", "patches/s (CPU time)", "medtl is faster by", title=f"3-D patches, {case.name}")
        for name, rate in rates.items():
            ratio = rates["medtl pack"] / rate
            table.add_row(name, f"{rate:,.0f}", f"{ratio:,.1f}x")
            rows.append({"name": name, "case": case.name, "median": rate, "unit": "patches/s", "ratio": ratio})
        Console().print(table)
    if arguments.json:
        print(json.dumps({"benchmark": "patches", "rows": rows}))


if __name__ == "__main__":
    main()
