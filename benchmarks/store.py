"""How volumes are kept: packed in blocks, against .nii.gz, .nii and a memory map; write, read, one patch, bytes.

One CT-like int16 volume; wall time, files in the page cache, contenders interleaved, median of five. nibabel runs as
shipped; its ``.nii.gz`` is at its default level, gzip 6 is there for its size. Two threads where a contender has them.

    python benchmarks/store.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import mmap
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import nibabel
import numpy as np
from rich.console import Console
from rich.table import Table

from medtl.scans.geometry import Affine
from medtl.scans.nifti import (
    bounded_gunzip,
    gunzip_start,
    gzip_members,
    nifti_header,
    pack_volume,
    unpack_patch,
    unpack_volume,
)

Array = np.ndarray[Any, Any]
Act = Callable[[], Any]
AFFINE: Affine = ((-0.7, 0, 0, 180.0), (0, -0.7, 0, 160.0), (0, 0, 2.5, -40.0), (0, 0, 0, 1))
UNITS = {"size": "MB"}
TITLES = {
    "export": "volume -> .nii.gz on disk",
    "import": ".nii.gz -> voxels",
    "write": "volume -> store",
    "read": "store -> voxels",
    "patch": "one patch of at most 96 x 96 x 96",
    "size": "bytes on disk",
}


def ct_like(shape: tuple[int, int, int]) -> Array:
    """Make a body with smooth organs and noise, in air."""
    rng = np.random.default_rng(0)
    slices, rows, columns = shape
    coarse = rng.normal(40, 250, (slices // 8 + 2, 16, 16)).astype(np.float32)
    planes = [cv2.resize(plane, (columns, rows), interpolation=cv2.INTER_CUBIC) for plane in coarse]
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    body = (x / 0.85) ** 2 + (y / 0.65) ** 2 < 1
    values = np.full(shape, -1024, dtype=np.int16)
    for index in range(slices):
        part = index % 8 / 8
        plane = planes[index // 8] * (1 - part) + planes[index // 8 + 1] * part + rng.normal(0, 12, (rows, columns))
        values[index][body] = np.clip(plane, -1000, 3000)[body]
    return values


def contenders(values: Array, folder: Path, side: int) -> dict[str, dict[str, Act]]:
    """Give, case by case, what each contender does; writers come first and leave the files that readers read."""
    paths = {name: folder / name for name in ("ours.nii.gz", "theirs.nii.gz", "plain.nii", "packed", "raw")}
    start = tuple((length - side) // 2 for length in values.shape)
    stop = tuple(at + side for at in start)
    inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    image = nibabel.Nifti1Image(values.T, np.array(AFFINE))
    header = nifti_header(values.shape, "i2", AFFINE)

    def export() -> None:
        with paths["ours.nii.gz"].open("wb") as stream:
            for member in itertools.chain(gzip_members(header), gzip_members(values)):
                stream.write(member)

    def taken() -> Array:
        packed = paths["ours.nii.gz"].read_bytes()
        assert len(gunzip_start(packed)) == 540
        return np.frombuffer(bounded_gunzip(packed, values.nbytes + 352), np.int16, values.size, 352)

    def patch() -> Array:
        with (
            paths["packed"].open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            return unpack_patch(view, start, stop, threads=2)

    def saved(name: str) -> Act:
        return lambda: nibabel.save(image, paths[name])

    def loaded(name: str) -> Act:
        return lambda: np.asarray(nibabel.load(paths[name]).dataobj)

    def sliced(name: str) -> Act:
        return lambda: np.array(nibabel.load(paths[name]).dataobj[inside[::-1]])

    def raw() -> Array:
        return np.memmap(paths["raw"], np.int16, "r", shape=values.shape)

    gz, nii, memmap = "nibabel .nii.gz", "nibabel .nii", "memory map"
    return {
        "export": {"medtl .nii.gz": export, gz: saved("theirs.nii.gz")},
        "import": {"medtl .nii.gz": taken, gz: loaded("theirs.nii.gz")},
        "write": {
            "medtl packed": lambda: paths["packed"].write_bytes(pack_volume(values)),
            gz: saved("theirs.nii.gz"),
            nii: saved("plain.nii"),
            memmap: lambda: values.tofile(paths["raw"]),
        },
        "read": {
            "medtl packed": lambda: unpack_volume(paths["packed"].read_bytes()),
            gz: loaded("theirs.nii.gz"),
            nii: lambda: np.array(loaded("plain.nii")()),
            memmap: lambda: np.array(raw()),
        },
        "patch": {
            "medtl packed": patch,
            gz: sliced("theirs.nii.gz"),
            nii: sliced("plain.nii"),
            memmap: lambda: np.array(raw()[inside]),
        },
    }


def seconds(acts: dict[str, Act], repeats: int) -> dict[str, float]:
    """Give each contender's median time: interleaved, the first round dropped."""
    spent: dict[str, list[float]] = {name: [] for name in acts}
    for repeat in range(repeats + 1):
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            if repeat:
                spent[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in spent.items()}


def sizes(folder: Path, values: Array) -> dict[str, float]:
    """Give what each way leaves on disk, in MB."""
    six = len(gzip.compress(values.tobytes(), 6))
    files = {"medtl packed": "packed", "export .nii.gz": "ours.nii.gz", "nibabel .nii.gz": "theirs.nii.gz"}
    found = {name: (folder / file).stat().st_size / 1e6 for name, file in files.items()}
    return {**found, "gzip 6": six / 1e6, "nibabel .nii": (folder / "plain.nii").stat().st_size / 1e6}


def main() -> None:
    """Run, print the tables, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small volume, one repeat: to see that it works")
    arguments = parser.parse_args()
    shape, repeats = ((24, 128, 128), 1) if arguments.quick else ((120, 512, 512), 5)
    values = ct_like(shape)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = {case: seconds(acts, repeats) for case, acts in contenders(values, folder, min(96, shape[0])).items()}
        found["size"] = sizes(folder, values)
    for case, figures in found.items():
        unit = UNITS.get(case, "s")
        table = Table("contender", unit, "medtl is better by", title=TITLES[case])
        ours = next(iter(figures.values()))
        for name, figure in figures.items():
            table.add_row(name, f"{figure:,.4f}", f"{figure / ours:,.2f}x")
            rows.append({"name": name, "case": case, "median": figure, "unit": unit, "ratio": figure / ours})
        Console().print(table)
    if arguments.json:
        print(json.dumps({"benchmark": "store", "shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()
