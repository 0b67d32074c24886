"""Splits, plans and packs on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from medtl.artifacts import load_array, read_record, write_record
from medtl.dataset.transforms import prepare_scan
from medtl.progress import advance
from medtl.records import AnyArray, Plan, Scan, Split

SPLIT, PLAN, IMAGES = "split.json", "plan.json", "images.npy"


def write_split(folder: Path, split: Split) -> None:
    """Write a split."""
    write_record(folder / SPLIT, split)


def read_split(folder: Path) -> Split:
    """Read a split; a shared patient is refused here as where it was made."""
    return read_record(folder / SPLIT, Split)


def write_plan(folder: Path, plan: Plan) -> None:
    """Write a plan."""
    write_record(folder / PLAN, plan)


def read_plan(folder: Path) -> Plan:
    """Read a plan."""
    return read_record(folder / PLAN, Plan)


def write_pack(folder: Path, scans: Sequence[Scan], read: Callable[[Scan], AnyArray], plan: Plan) -> None:
    """Prepare every scan, in this order, into one array.

    (n, rows, columns, channels) of images; of volumes shown as slices ``plan.slices`` such rows each, one after the
    other; of whole volumes (n, depth, rows, columns, channels).
    """
    space = plan.size if plan.depth is None else (plan.depth, *plan.size)
    shape = (len(scans) * plan.slices, *space, plan.channels)
    dtype = np.dtype(np.uint8 if plan.bits == 8 else np.uint16)
    with (folder / IMAGES).open("wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for number, scan in enumerate(scans, 1):
            stream.write(np.ascontiguousarray(prepare_scan(read(scan), scan, plan)).data)
            advance("packing images", number, len(scans))


def read_pack(folder: Path) -> AnyArray:
    """Open a pack, memory-mapped and read-only."""
    return load_array(folder / IMAGES, mapped=True)
