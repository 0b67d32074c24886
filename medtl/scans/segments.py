"""The pixel store: decoded pixels under their digest, in segments that are written once.

A segment is an artifact: ``pixels.bin`` (values as they are, uncompressed, so that any part of them is one memory map
away), ``places.json`` (digest of pixels -> offset and length) and ``units.json`` (what intake found out about the files
behind them). Each ingest adds segments for what is new and touches no other: what was decoded stays decoded, and an
interrupted ingest goes on at the segment it was writing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from medtl.artifacts import Store, read_record, verify, write_json, write_record
from medtl.errors import StorageError
from medtl.records import AnyArray, Artifact, Scan

PIXELS, PLACES, UNITS = "pixels.bin", "places.json", "units.json"
KIND = "pixels"
_ALIGN = 64  # bytes; a cache line, so that a view of any type starts evenly


@dataclass(frozen=True, slots=True)
class Taken:
    """A scan and the files it was built from. The scan's keys are those its header gave; names are added later."""

    scan: Scan
    members: tuple[str, ...]  # sha256 of each file


@dataclass(frozen=True, slots=True)
class Refused:
    """Files that were left out, and why."""

    members: tuple[str, ...]  # sha256 of each file
    code: str
    reason: str
    action: str


@dataclass(frozen=True, slots=True)
class Unit:
    """What became of one volume, or of one file.

    ``bundle`` names the files that were judged together (a series) and every setting that mattered: a unit counts
    only while its whole bundle is there as it was.
    """

    digest: str  # of its files' bytes, the settings and the judgement
    bundle: str
    key: str | None  # pseudonym of the series
    members: tuple[str, ...]  # sha256 of each file
    taken: tuple[Taken, ...]
    refused: tuple[Refused, ...]


def pixel_digest(pixels: AnyArray) -> str:
    """Name pixels by their type, shape and values."""
    whole = np.ascontiguousarray(pixels)
    digest = sha256(f"{whole.dtype.str}{whole.shape}".encode())
    digest.update(whole.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def unneeded(segments: Iterable[Path], pixels: Set[str], files: Set[str]) -> list[Path]:
    """Name the segments that nothing rests on.

    Args:
        segments: folders, from those used last to the oldest: of two with the same pixels the former is kept.
        pixels: digests that are wanted.
        files: sha256 of the files whose findings are wanted.
    """
    pixels, files, found = set(pixels), set(files), []
    for folder in segments:
        places = read_record(folder / PLACES, dict[str, tuple[int, int]])
        members = {sha for unit in read_record(folder / UNITS, tuple[Unit, ...]) for sha in unit.members}
        if pixels.isdisjoint(places) and files.isdisjoint(members):
            found.append(folder)
        pixels -= places.keys()
        files -= members
    return found


def write_segment(
    store: Store, digests: tuple[str, ...], finished: Callable[[], Iterable[tuple[Unit, list[AnyArray] | None]]]
) -> Artifact:
    """Write the pixels and findings of some units, in one artifact.

    Args:
        digests: of the units, in order; what the segment is known by.
        finished: computes the units, each with the pixels of its scans in the order of ``taken``; None where another
            segment has them.
    """

    def build(folder: Path) -> None:
        units: list[Unit] = []
        places: dict[str, tuple[int, int]] = {}
        offset = 0
        with (folder / PIXELS).open("wb") as stream:
            for unit, arrays in finished():
                units.append(unit)
                for taken, array in zip(unit.taken if arrays is not None else (), arrays or (), strict=True):
                    if taken.scan.pixel_digest in places:
                        continue
                    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                    stream.write(bytes(-array.nbytes % _ALIGN))
                    places[taken.scan.pixel_digest] = (offset, array.nbytes)
                    offset += array.nbytes + -array.nbytes % _ALIGN
        write_json(folder / PLACES, places)
        write_record(folder / UNITS, tuple(units))

    return store.make(KIND, {"units": list(digests)}, build)


def known_units(store: Store) -> Iterator[Unit]:
    """Give every unit that some finished segment holds."""
    for folder in _segments(store.root / KIND):
        yield from read_record(folder / UNITS, tuple[Unit, ...])


class PixelStore:
    """All decoded pixels of a workspace, memory-mapped and read-only.

    Args:
        root: folder of the segments (``<workspace>/artifacts/pixels``).
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._maps: dict[Path, AnyArray] = {}
        for folder in _segments(root):
            for digest, (offset, size) in read_record(folder / PLACES, dict[str, tuple[int, int]]).items():
                self._places[digest] = (folder, offset, size)

    def __contains__(self, scan: Scan) -> bool:
        return scan.pixel_digest in self._places

    def segments(self, scans: Iterable[Scan]) -> list[Path]:
        """Name the segments that hold the pixels of these scans, as far as any does."""
        return sorted({self._places[scan.pixel_digest][0] for scan in scans if scan in self})

    def __call__(self, scan: Scan) -> AnyArray:
        """Give one scan's pixels, shape ``scan.shape``, without copying them.

        Raises:
            StorageError: no segment holds them.
            TamperedError: the segment was altered.
        """
        if scan not in self:
            raise self._gone()
        folder, offset, size = self._places[scan.pixel_digest]
        if folder not in self._maps:
            try:
                _verified(folder, (folder / PIXELS).stat().st_mtime_ns)
                self._maps[folder] = np.memmap(folder / PIXELS, dtype=np.uint8, mode="r")
            except FileNotFoundError as error:
                raise self._gone() from error
        return self._maps[folder][offset : offset + size].view(np.dtype(scan.dtype)).reshape(scan.shape)

    def _gone(self) -> StorageError:
        return StorageError(
            f"The pixels of a scan are gone from '{self._root}'. Run the same command again: its files are read again."
        )


def mark_used(store: Store, pixels: PixelStore, scans: Iterable[Scan]) -> None:
    """Note that the segments of some scans are wanted: nobody may sweep them from under a run."""
    for folder in pixels.segments(scans):
        store.mark_used(folder)


@functools.lru_cache(maxsize=4096)
def _verified(folder: Path, modified: int) -> str:
    """Check every byte of a segment, once per process and state of the file."""
    return verify(folder)


def _segments(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (folder for folder in sorted(root.iterdir()) if not folder.name.startswith("."))
