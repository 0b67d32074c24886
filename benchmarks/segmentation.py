"""Predicting whole volumes: exact tiles and windows against MONAI's sliding windows, same network, same volume.

A 256 x 256 x 128 volume and MONAI's UNet of 16, 32, 64 and 128 channels: with BatchNorm, which exact tiles serve, and
with InstanceNorm, which sees its window. MONAI runs as its tutorials have it: windows of 96, half overlapping, Gaussian
weights, four at once. CPU time of one process, one thread; contenders interleaved, warm-up dropped, median of three.
``agreement`` is the share of voxels with the label that one fp32 pass of the whole volume gives (of InstanceNorm:
MONAI's windows, whose weights end at a thousandth of the middle's), ``difference`` the largest of probabilities.

    python benchmarks/segmentation.py [--json] [--quick] [--large]

``--large`` instead predicts a CT of 512 x 512 x 800 with three outputs on a grid of 0.8 mm, restores it in its own
voxels and prints the most memory that this process ever held, in GB, as its last word.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import resource
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from rich.console import Console
from rich.table import Table

from medtl.config import InferenceConfig
from medtl.dataset.grid import lattice_of
from medtl.dataset.restore import to_source
from medtl.model.cache import Precision
from medtl.model.inference import choose_way, predict_grid, predict_slabs
from medtl.model.instance_norm import keep_channels_last
from medtl.model.reach import bytes_per_voxel
from medtl.model.segmenter import SegmenterNetwork, Whole
from medtl.model.surgery import HEAD
from medtl.records import FloatArray, GridPlan, Scan, Structure

CPU = torch.device("cpu")
MONAI = "MONAI sliding windows"
SPACE = {False: (128, 256, 256), True: (32, 64, 64)}
WINDOW = {False: 96, True: 32}
TILE = 0.4  # of the volume may pass at once, where tiles are measured


@dataclass(frozen=True)
class Contender:
    """One way to probabilities, and how it is called."""

    name: str
    run: Callable[[], FloatArray]
    note: str = ""


def plan_of(window: int, structures: int) -> GridPlan:
    """Write down the plan of a small 3-D U-Net."""
    levels = tuple((1 + (level > 0),) * 3 for level in range(4))
    return GridPlan(
        structures=tuple(Structure(f"structure {n}", (n,)) for n in range(1, structures + 1)),
        ignore=None,
        dimensions=3,
        axis="axial",
        neighbours=0,
        channels=1,
        spacing_mm=(1.0, 1.0, 1.0),
        intensity="zscore",
        low=None,
        high=None,
        mean=None,
        std=None,
        landmarks=(),
        patch=(window,) * 3,
        batch_size=2,
        strides=levels,
        kernels=((3, 3, 3),) * 4,
        filters=(16, 32, 64, 128),
        mirror=(),
        facts={},
        reasons={},
    )


def network_of(plan: GridPlan, norm: str, volume: FloatArray) -> SegmenterNetwork:
    """Build MONAI's UNet; of BatchNorm with the statistics of a part of the volume, as after training."""
    torch.manual_seed(0)
    kind = (norm, {"affine": True})
    unet = UNet(3, 1, plan.outputs, plan.filters, (2,) * (len(plan.filters) - 1), norm=kind)
    network = SegmenterNetwork("unet", {HEAD: Whole(unet)}, [], (0.0,), (1.0,), plan, (8, 8, 8))
    with torch.no_grad():
        network.train()(torch.from_numpy(volume[None, :, :32, :64, :64].copy()))
    return network.eval()


def body(space: tuple[int, ...]) -> FloatArray:
    """Draw a noisy ellipsoid of soft tissue in air, (1, *space)."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, side, dtype=np.float32) for side in space], indexing="ij", sparse=True)
    inside = sum(axis**2 for axis in axes) < 0.8
    volume = np.where(inside, rng.normal(1, 0.5, space), rng.normal(-1, 0.05, space))
    return volume.astype(np.float32)[None]


def contenders(network: SegmenterNetwork, plan: GridPlan, volume: FloatArray, exact: bool) -> list[Contender]:
    """Give MONAI's windows and our ways; of a BatchNorm network tiles too, at a memory that allows no single pass."""
    window, theirs = plan.patch, copy.deepcopy(network)
    keep_channels_last(network)  # as medtl builds networks: the same weights and layers

    def monai(at_once: int, fast: bool) -> FloatArray:
        format_ = torch.channels_last_3d if fast else torch.contiguous_format
        theirs.to(memory_format=format_)
        x = torch.from_numpy(volume)[None].contiguous(memory_format=format_)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = sliding_window_inference(x, window, at_once, theirs, 0.5, "gaussian")
        found: FloatArray = logits.float().softmax(1)[0].numpy()
        return found

    def ours(precision: Precision, **settings: object) -> Contender:
        config = InferenceConfig.model_validate(settings)
        way = choose_way([network], plan, config, volume.shape[1:], CPU, precision)
        name = f"medtl {way.name}, {precision}"
        return Contender(name, lambda: predict_grid(network, volume, plan, config, CPU, precision), way.why)

    peers = [
        Contender(MONAI, lambda: monai(4, False), "as shipped: overlap .5, gaussian, batches of 4"),
        Contender("MONAI, bf16, channels last", lambda: monai(1, True), "one window at a time"),
    ]
    both: tuple[Precision, Precision] = ("bf16", "fp32")
    if not exact:
        return [*peers, *(ours(precision) for precision in both)]
    tight = TILE * volume[0].size * bytes_per_voxel(network, 1, window, CPU, "fp32") / 1e9
    return [*peers, *(ours(p, way=way, memory_gb=gb) for p in both for way, gb in (("whole", 64), ("tiles", tight)))]


def measure(all_of: list[Contender], repeats: int) -> tuple[Mapping[str, float], Mapping[str, FloatArray]]:
    """Give each contender's seconds, interleaved, warm-up dropped, median; and what it gave."""
    seconds: dict[str, list[float]] = {one.name: [] for one in all_of}
    given: dict[str, FloatArray] = {}
    for repeat in range(repeats + 1):
        for one in all_of:
            started = time.process_time()
            given[one.name] = one.run()
            if repeat or repeats == 1:
                seconds[one.name].append(time.process_time() - started)
    return {name: median(times) for name, times in seconds.items()}, given


def compare(norm: str, quick: bool, repeats: int) -> list[dict[str, object]]:
    """Measure one network and print its table; give its rows."""
    plan, volume, exact = plan_of(WINDOW[quick], 1), body(SPACE[quick]), norm == "batch"
    network = network_of(plan, norm, volume)
    all_of = contenders(network, plan, volume, exact)
    seconds, given = measure(all_of, repeats)
    reference = given["medtl whole, fp32"] if exact else given[MONAI]
    title = f"{norm}: {' x '.join(map(str, volume.shape[1:]))}"
    table = Table("contender", "seconds", "Mvoxels/s", "faster than MONAI by", "agreement", "difference", title=title)
    rows: list[dict[str, object]] = []
    for one in all_of:
        ratio = seconds[MONAI] / seconds[one.name]
        agreement = float((given[one.name].argmax(0) == reference.argmax(0)).mean())
        difference = float(np.abs(given[one.name] - reference).max())
        rate = volume[0].size / seconds[one.name] / 1e6
        table.add_row(
            one.name,
            f"{seconds[one.name]:.2f}",
            f"{rate:.2f}",
            f"{ratio:.1f}x",
            f"{agreement:.4f}",
            f"{difference:.1e}",
        )
        row = {"name": one.name, "case": norm, "median": seconds[one.name], "unit": "s", "than_monai": ratio}
        slower = seconds[one.name] / seconds[all_of[2].name]  # than ours
        rows.append({**row, "ratio": slower, "agreement": agreement, "difference": difference, "note": one.note})
    Console().print(table)
    return rows


def large() -> None:
    """Predict and restore a large CT slab by slab, and print the most memory held."""
    shape, spacing = (800, 512, 512), (0.7, 0.7, 0.75)
    affine = tuple(tuple(row) for row in np.diag([*spacing[::-1], 1.0]).tolist())
    scan = Scan("ct", "dicom", shape, "int16", "digest", (), 16, affine=affine)
    plan = replace(plan_of(96, 2), spacing_mm=(0.8, 0.8, 0.8), filters=(4, 8, 16, 32))
    grid = lattice_of(scan, plan).shape
    image = np.random.default_rng(0).standard_normal((1, *grid), np.float32)
    network = network_of(plan, "instance", image)
    started = time.process_time()
    config = InferenceConfig(overlap=0.25)
    found = to_source(predict_slabs(network, image, plan, config, CPU, "bf16"), scan, plan)
    seconds = time.process_time() - started
    assert found.shape == shape
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    Console().print(f"{' x '.join(map(str, grid))} on the grid, {seconds:.0f} s; most memory in GB:", f"{most:.2f}")


def main() -> None:
    """Run, print the tables, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small volume, one repeat: to see that it works")
    parser.add_argument("--large", action="store_true", help="predict and restore 512 x 512 x 800; print memory")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.large:
        large()
        return
    repeats = 1 if arguments.quick else 3
    rows = [row for norm in ("batch", "instance") for row in compare(norm, arguments.quick, repeats)]
    if arguments.json:
        print(json.dumps({"benchmark": "segmentation", "space": SPACE[arguments.quick], "rows": rows}))


if __name__ == "__main__":
    main()
