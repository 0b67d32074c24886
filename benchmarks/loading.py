"""2-D loading: the memory-mapped pack against MONAI's datasets on the same images and transforms.

Every contender delivers float batches of 224 x 224 from 512 x 512 grey PNGs. CPU time of one process, one thread;
warm-up dropped, contenders interleaved, median of three. MONAI runs as shipped (default collate and arguments);
`CacheDataset` and `PersistentDataset` are measured with their caches filled.

    python benchmarks/loading.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from medtl.artifacts import Store
from medtl.config import ScansConfig, TransformsConfig
from medtl.dataset.io import read_pack, write_pack
from medtl.dataset.loading import EvaluationBatches, TrainingBatches
from medtl.model.fit import to_images
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Plan
from medtl.scans.intake import ingest, read_scans
from medtl.scans.segments import PixelStore
from medtl.scans.sources import survey

BATCH, SIZE = 32, 224
TURNS = TransformsConfig(rotate_degrees=15, flip_horizontal=True, scale=0, shift=0, brightness=0, contrast=0)
DEVICE = torch.device("cpu")


def write_images(folder: Path, count: int) -> list[str]:
    """Write smooth random PNGs."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(count):
        coarse = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        names.append(str(folder / f"{number:04d}.png"))
        Image.fromarray(cv2.resize(coarse, (512, 512), interpolation=cv2.INTER_CUBIC)).save(names[-1])
    return names


def ours(folder: Path, work: Path) -> tuple[Callable[[], Iterable[Any]], Callable[[], Iterable[Any]]]:
    """Ingest and pack once; give the two epochs, plain and augmented."""
    config, store = ScansConfig(stable_seconds=0), Store(work / "workspace")
    ingest(survey(folder, config), config, Pseudonymiser(b"benchmark-key-16"), work, store)
    scans = read_scans(work)
    plan = Plan("binary", ("a", "b"), (SIZE, SIZE), 1, 8, "fixed", 0.0, 255.0, (0.5, 99.5), {}, {})
    write_pack(work, scans, PixelStore(store.root / "pixels"), plan)
    images, targets, rows = read_pack(work), np.zeros((len(scans), 2)), list(range(len(scans)))
    plain = EvaluationBatches(images, targets, rows, BATCH)
    turned = TrainingBatches(images, targets, rows, BATCH, TURNS, 0)
    return (
        lambda: (to_images(batch, DEVICE) for batch, _ in plain),
        lambda: (to_images(batch, DEVICE) for batch, _ in turned.epoch(0, 0)),
    )


def peers(names: list[str], cache: Path) -> dict[str, tuple[Callable[[], Iterable[Any]], Callable[[], Iterable[Any]]]]:
    """Give each MONAI dataset's two epochs, plain and augmented."""
    from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        RandFlipd,
        RandRotated,
        Resized,
        ScaleIntensityRanged,
    )

    fixed = [
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        Resized("image", (SIZE, SIZE), mode="area"),
        ScaleIntensityRanged("image", 0, 255, 0, 1),
    ]
    drawn = [RandRotated("image", range_x=np.deg2rad(15), prob=1.0), RandFlipd("image", prob=0.5, spatial_axis=1)]
    items = [{"image": name} for name in names]

    def loader(make: Callable[[Any], Any], transforms: list[Any]) -> Callable[[], Iterable[Any]]:
        ready = DataLoader(make(Compose(transforms)), batch_size=BATCH)
        return lambda: (batch["image"] for batch in ready)

    makers: dict[str, Callable[[Any], Any]] = {
        "MONAI Dataset": lambda t: Dataset(items, t),
        "MONAI CacheDataset": lambda t: CacheDataset(items, t, progress=False),
        "MONAI PersistentDataset": lambda t: PersistentDataset(items, t, cache_dir=cache / str(len(t.transforms))),
    }
    return {name: (loader(make, fixed), loader(make, fixed + drawn)) for name, make in makers.items()}


def measure(
    epochs: dict[str, Callable[[], Iterable[Any]]], count: int, repeats: int, enough_s: float
) -> dict[str, float]:
    """Give each contender's samples per CPU second: interleaved, warm-up dropped, median."""
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(repeats + 1):
        for name, epoch in epochs.items():
            started, samples = time.process_time(), 0
            while True:
                for batch in epoch():
                    samples += len(batch)
                spent = time.process_time() - started
                if spent >= enough_s or repeat == 0:
                    break
            if repeat:
                rates[name].append(samples / spent)
    assert count
    return {name: median(values) for name, values in rates.items()}


def main() -> None:
    """Run, print the tables, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="few images, one repeat: to see that it works")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    count, repeats, enough = (32, 1, 0.05) if arguments.quick else (120, 3, 1.0)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in ("images", "ours", "cache"):
            (root / name).mkdir()
        names = write_images(root / "images", count)
        contenders = {"medtl pack": ours(root / "images", root / "ours"), **peers(names, root / "cache")}
        for index, label in enumerate(("as they are", "rotated and flipped")):
            rates = measure({n: both[index] for n, both in contenders.items()}, count, repeats, enough)
            table = Table("contender", "samples/s (CPU time)", "medtl is faster by", title=f"2-D loading, {label}")
            for name, rate in rates.items():
                ratio = rates["medtl pack"] / rate
                table.add_row(name, f"{rate:,.0f}", f"{ratio:,.1f}x")
                rows.append({"name": name, "case": label, "median": rate, "unit": "samples/s", "ratio": ratio})
            Console().print(table)
    if arguments.json:
        print(json.dumps({"benchmark": "loading", "images": count, "rows": rows}))


if __name__ == "__main__":
    main()
