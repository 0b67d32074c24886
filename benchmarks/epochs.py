"""An epoch of training a 3-D segmentation: medtl against MONAI with CacheDataset, same network, same volumes.

Small MR-like volumes (36 x 50 x 35, two structures), patches of 40 x 56 x 40, two at a time, a DynUNet of 32, 64 and
128 channels with two coarser outputs, Dice and cross-entropy, AdamW; both sides rotate, scale and add noise to half of
the patches. MONAI is run as its tutorials have it (fp32), and once more in bf16. CPU time of one process, one thread;
warm-up dropped, contenders interleaved, median of three.

With ``--cores 2`` medtl alone, by the clock: one process of two threads beside two of one thread each that train as one
(``model.processes: 2``). Needs a machine that does nothing else.

    python benchmarks/epochs.py [--json] [--quick] [--cores N]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from medtl.config import GridConfig, ModelConfig, PatchesConfig
from medtl.dataset import grid
from medtl.dataset.io import read_volumes, write_volumes
from medtl.dataset.patches import Patches
from medtl.model import segmenter, trainer
from medtl.model.segment_fit import SegmentMaterial, fit_segmenter
from medtl.records import AnyArray, GridPlan, Scan, Structure

PATCH, SHAPE, BATCH = (40, 56, 40), (36, 50, 35), 2
STRUCTURES = (Structure("front", (1,)), Structure("back", (2,)))
RATE = 1e-3


class Nothing:
    """Unfinished training that is not kept: one epoch is not worth it."""

    def load(self) -> None:
        """Give nothing."""

    def save(self, progress: trainer.Progress) -> None:
        """Keep nothing."""


def volumes_of(count: int) -> list[tuple[AnyArray, AnyArray]]:
    """Make volumes with two bright halves of a ball."""
    rng = np.random.default_rng(0)
    place = np.moveaxis(np.indices(SHAPE), 0, -1) - np.array(SHAPE) / 2
    ball = np.linalg.norm(place, axis=-1) < 12
    mask = np.where(ball, 1 + (place[..., 1] > 0), 0).astype(np.uint8)
    return [((rng.normal(200, 30, SHAPE) + 80 * mask).astype(np.int16), mask) for _ in range(count)]


def ours(volumes: list[tuple[AnyArray, AnyArray]], folder: Path) -> Callable[[], None]:
    """Plan and pack once; give an epoch of the product's own training."""
    affine = ((-1.0, 0.0, 0.0, 0.0), (0.0, -1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    pixels: dict[str, AnyArray] = {}

    def scan_of(name: str, array: AnyArray) -> Scan:
        pixels[name] = array
        return Scan(name, "nifti", array.shape, array.dtype.str, name, (), 16, modality="MR", affine=affine)

    scans = [scan_of(f"scan{number}", image) for number, (image, _) in enumerate(volumes)]
    masks = [scan_of(f"mask{number}", mask) for number, (_, mask) in enumerate(volumes)]
    config = GridConfig(dimensions=3, patch=PATCH, batch_size=BATCH)
    plan = grid.make_grid_plan(scans, masks, lambda scan: pixels[scan.scan_id], STRUCTURES, None, config)
    plan = three_levels(plan)
    items = (
        (scan.scan_id, grid.to_grid(image, scan, plan), grid.mask_to_grid(mask, scan, plan))
        for scan, (image, mask) in zip(scans, volumes, strict=True)
    )
    write_volumes(folder, items, plan)
    light = PatchesConfig(foreground=0, blur=0, brightness=0, contrast=0, gamma=0, low_resolution=0)
    patches = Patches(read_volumes(folder), range(len(scans)), plan, light, 0)
    phase = {"name": "all", "unfreeze": "all", "epochs": 1, "lr": RATE, "batchnorm": "with_stage"}
    model = ModelConfig.model_validate({"weights": "none", "phases": [phase], "segmenter": {"network": "dynunet"}})
    judged = np.full((1, len(STRUCTURES)), 0.5)
    material = SegmentMaterial(patches, lambda _: judged, lambda new, old: 0.5)

    def epoch() -> None:
        network, _ = segmenter.build(plan, model, 0, None)
        fit_segmenter(network, material, plan, model, 0, Nothing())  # type: ignore[arg-type]

    return epoch


def three_levels(plan: GridPlan) -> GridPlan:
    """Make the plan that of the network that both sides train."""
    return replace(plan, strides=plan.strides[:3], kernels=plan.kernels[:3], filters=(32, 64, 128))


def monai(volumes: list[tuple[AnyArray, AnyArray]], folder: Path, half: bool) -> Callable[[], None]:
    """Cache once; give an epoch of MONAI's own parts."""
    from monai.data import CacheDataset, DataLoader
    from monai.losses import DeepSupervisionLoss, DiceCELoss
    from monai.networks.nets import DynUNet
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        RandAffined,
        RandGaussianNoised,
        RandSpatialCropd,
        SpatialPadd,
    )

    both = ["image", "label"]
    items = []
    for number, pair in enumerate(volumes):
        names = {key: str(folder / f"{key}{number}.nii") for key in both}
        for name, array in zip(names.values(), pair, strict=True):
            nib.save(nib.Nifti1Image(array, np.eye(4)), name)
        items.append(names)
    turned = (np.deg2rad(15),) * 3
    transforms = Compose(
        [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            NormalizeIntensityd("image"),
            SpatialPadd(both, PATCH),
            RandSpatialCropd(both, PATCH, random_size=False),
            RandAffined(both, prob=0.5, rotate_range=turned, scale_range=(0.2,) * 3, mode=("bilinear", "nearest")),
            RandGaussianNoised("image", prob=1.0, std=0.1),
        ]
    )
    loader = DataLoader(CacheDataset(items, transforms, progress=False), batch_size=BATCH, shuffle=True)

    def epoch() -> None:
        network = DynUNet(
            3, 1, 3, (3, 3, 3), (1, 2, 2), (2, 2), filters=(32, 64, 128), deep_supervision=True, deep_supr_num=1
        )
        loss_of = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True, batch=True))
        optimiser = torch.optim.AdamW(network.parameters(), RATE)
        network.train()
        for batch in loader:
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                found = network(batch["image"].as_tensor())
            outputs = [one.float() for one in torch.unbind(found, dim=1)]
            loss_of(outputs, batch["label"].as_tensor()).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimiser.step()

    return epoch


def measure(epochs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Give each contender's CPU seconds of an epoch: interleaved, warm-up dropped, median."""
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(repeats + 1):
        for name, epoch in epochs.items():
            started = time.process_time()
            epoch()
            if repeat:
                seconds[name].append(time.process_time() - started)
    return {name: median(values) for name, values in seconds.items()}


def by_the_clock(volumes: list[tuple[AnyArray, AnyArray]], threads: int, repeats: int) -> float:
    """Be one process, or one of several that torchrun started; give the median seconds of an epoch."""
    import torch.distributed as dist

    torch.set_num_threads(threads)
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("gloo")
    seconds = []
    with tempfile.TemporaryDirectory() as temporary:
        epoch = ours(volumes, Path(temporary))
        for _ in range(repeats + 1):
            if several:
                dist.barrier()
            started = time.perf_counter()
            epoch()
            seconds.append(time.perf_counter() - started)
    if several:
        dist.destroy_process_group()
    return median(seconds[1:])


def compare_cores(cores: int, quick: bool) -> dict[str, float]:
    """Give seconds of an epoch of one process with all cores, and of one process a core; three turns, their medians."""
    run = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", f"--nproc-per-node={cores}"]
    ways = {f"one process, {cores} threads": [], f"{cores} processes, one thread each": run}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if quick else 3):
        for name, start in ways.items():
            threads = 1 if start else cores
            command = [sys.executable, *start, __file__, "--turn", str(threads), *(["--quick"] if quick else [])]
            said = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            found[name].append(float(said.split()[-1]))
    return {name: median(seconds) for name, seconds in found.items()}


def show(found: dict[str, float], base: str, unit: str, as_json: bool) -> None:
    """Print the table, and the figures for machines."""
    table = Table("contender", unit, f"times {base}")
    rows = []
    for name, seconds in found.items():
        ratio = seconds / found[base]
        table.add_row(name, f"{seconds:.2f}", f"{ratio:.2f}")
        rows.append({"name": name, "median": seconds, "unit": "s/epoch", "ratio": ratio})
    Console().print(table)
    if as_json:
        print(json.dumps({"benchmark": "epochs", "rows": rows}))


def main() -> None:
    """Run, print the table, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="two volumes, one repeat: to see that it works")
    parser.add_argument("--cores", type=int, help="compare by the clock how medtl uses so many cores")
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)  # be one contender with so many threads
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    volumes = volumes_of(2 if arguments.quick else 16)
    if arguments.turn:
        seconds = by_the_clock(volumes, arguments.turn, 1 if arguments.quick else 3)
        if os.environ.get("RANK", "0") == "0":
            print(seconds)
        return
    if arguments.cores:
        found = compare_cores(arguments.cores, arguments.quick)
        show(found, f"one process, {arguments.cores} threads", f"s an epoch, {len(volumes)} volumes", arguments.json)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        epochs: dict[str, Any] = {
            "medtl": ours(volumes, folder),
            "MONAI, CacheDataset, fp32": monai(volumes, folder, half=False),
            "MONAI, CacheDataset, bf16": monai(volumes, folder, half=True),
        }
        found = measure(epochs, 1 if arguments.quick else 3)
    show(found, "medtl", f"s an epoch (CPU time), {len(volumes)} volumes", arguments.json)


if __name__ == "__main__":
    main()
