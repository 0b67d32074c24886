"""Splits, plans and packs on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from medtl.artifacts import load_array, read_record, write_record
from medtl.dataset.grid import Volumes, shown
from medtl.dataset.transforms import prepare_scan
from medtl.errors import PlanError, StorageError
from medtl.progress import advance
from medtl.records import AnyArray, FloatArray, GridPlan, IntArray, Plan, Scan, Split

SPLIT, PLAN, GRID, IMAGES = "split.json", "plan.json", "grid.json", "images.npy"
VALUES, MASKS, PLACES, VOLUMES = "volumes.f16", "masks.u8", "places.npy", "volumes.json"
_MOST_PLACES = 2000  # voxels of one structure of one study that patches may be centred on
_HALF = float(np.finfo(np.float16).max)


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


def write_grid(folder: Path, plan: GridPlan) -> None:
    """Write the plan of a segmentation."""
    write_record(folder / GRID, plan)


def read_grid(folder: Path) -> GridPlan:
    """Read the plan of a segmentation."""
    return read_record(folder / GRID, GridPlan)


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


@dataclass(frozen=True, slots=True)
class _Packed:
    """What the index of packed volumes says of each."""

    study_ids: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    fills: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]


def write_volumes(
    folder: Path, items: Iterator[tuple[str, FloatArray, AnyArray]], plan: GridPlan, total: int = 0
) -> None:
    """Write images and masks on the plan's grid one after the other, for :func:`read_volumes`.

    Args:
        items: study, image float32 (channels, *space), codes uint8 (*space) each; one at a time is in memory.
        total: how many there will be, to say how far it is.

    Raises:
        PlanError: there is none, or an image and its codes differ in shape.
    """
    packed: list[tuple[str, tuple[int, ...], float, tuple[int, ...]]] = []
    kept: list[IntArray] = []
    with (folder / VALUES).open("wb") as values, (folder / MASKS).open("wb") as masks:
        for study_id, image, codes in items:
            if image.shape[1:] != codes.shape:
                raise PlanError("A mask on the grid has another shape than its scan. Draw it on the same voxels.")
            places = _places(codes, plan, len(packed))
            half = np.clip(image, -_HALF, _HALF).astype(np.float16)
            values.write(np.ascontiguousarray(half).data)
            masks.write(np.ascontiguousarray(codes, np.uint8).data)
            packed.append((study_id, image.shape, float(half.min()), tuple(map(len, places))))
            kept += places
            advance("packing volumes", len(packed), total)
    if not packed:
        raise PlanError("There is no scan to pack.")
    with (folder / PLACES).open("wb") as stream:
        every = kept or [np.zeros((0, len(packed[0][1]) - 1), np.int32)]  # scans without structures: of pre-training
        np.lib.format.write_array(stream, np.concatenate(every), allow_pickle=False)
    write_record(folder / VOLUMES, _Packed(*zip(*packed, strict=True)))


def read_volumes(folder: Path) -> Volumes:
    """Open packed volumes, memory-mapped; what is written into a view never reaches the file.

    Raises:
        StorageError: the files do not hold what their index says.
    """
    index = read_record(folder / VOLUMES, _Packed)
    voxels = [sum(prod(shape[first:]) for shape in index.shapes) for first in (0, 1)]
    for name, size in ((VALUES, 2 * voxels[0]), (MASKS, voxels[1])):
        if (folder / name).stat().st_size != size:
            raise StorageError(f"'{folder / name}' has not the size its index says. Delete the artifact and run again.")
    # copy on write and not read-only: torch wraps only what it might write to
    values = np.memmap(folder / VALUES, np.float16, "c")
    masks = np.memmap(folder / MASKS, np.uint8, "c")
    return Volumes(index.study_ids, index.shapes, index.fills, index.counts, values, masks, load_array(folder / PLACES))


def _places(codes: AnyArray, plan: GridPlan, number: int) -> list[IntArray]:
    """Choose voxels of each structure at random, the same whenever the pack is written."""
    found: list[IntArray] = []
    for structure in range(len(plan.structures)):
        flat = np.flatnonzero(shown(codes, structure, plan.overlapping))
        if len(flat) > _MOST_PLACES:
            rng = np.random.default_rng([number, structure])
            flat = np.sort(rng.choice(flat, _MOST_PLACES, replace=False))
        found.append(np.stack(np.unravel_index(flat, codes.shape), -1).astype(np.int32))
    return found
