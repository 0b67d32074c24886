"""What takes room in a workspace and nobody has wanted for long: found, and deleted on a person's word.

Only copies of pixels go, which are made again from the scans when they are wanted, and training that was given up.
Evidence stays: scans, cohorts, splits, plans, checkpoints, predictions, evaluations, releases, reports.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from medtl.artifacts import Store, verify
from medtl.audit import SWEPT, AuditLog
from medtl.errors import ConfigError, StorageError, TamperedError
from medtl.progress import advance

if TYPE_CHECKING:
    from medtl.registry.history import Word

FEWEST_DAYS = 7  # a run may take days, and reads at its end what it found at its beginning
_PACKS, _SEGMENTS, _SCANS, _UNFINISHED = "pack", "pixels", "scans", "unfinished"
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Unused:
    """A result, or unfinished training, that nobody has wanted for some time."""

    folder: str  # relative to the workspace
    megabytes: float
    since: str  # it was last used, or made; UTC

    @property
    def is_result(self) -> bool:
        """Tell a result, which is on the trail, from training under way, which is not."""
        return not self.folder.startswith(f"{_UNFINISHED}/")


def unused(workspace: Path, days: float) -> list[Unused]:
    """Find what can be made again and was not used for so many days, largest first.

    A segment of the pixel store stays while scans that were used since rest on it.

    Raises:
        ConfigError: fewer than :data:`FEWEST_DAYS`.
        StorageError: a result cannot be read.
    """
    if not days >= FEWEST_DAYS:
        raise ConfigError(
            f"--unused {days:g}: fewer than {FEWEST_DAYS} days could take away what a run under way still reads. Give "
            f"{FEWEST_DAYS} or more."
        )
    store, border = Store(workspace), time.time() - days * _DAY_S
    found = [(folder, used) for folder, used in _by_use(store, _PACKS) if used < border]
    found += [(folder, used) for folder, used in _spare_segments(store, border) if used < border]
    found += [(folder, used) for folder, used in _given_up(store.workspace / _UNFINISHED) if used < border]
    listed = [
        Unused(folder.relative_to(store.workspace).as_posix(), round(_bytes_of(folder) / 1e6, 1), _time(used))
        for folder, used in found
    ]
    return sorted(listed, key=lambda one: (-one.megabytes, one.folder))


def sweep(workspace: Path, days: float, found: Sequence[Unused], word: Word) -> tuple[list[Unused], list[Unused]]:
    """Delete what :func:`unused` found, each entered on the trail before it goes.

    Returns:
        What was deleted, and what was left because it is not what was written there. What was wanted meanwhile is in
        neither.

    Raises:
        StorageError: something cannot be deleted.
    """
    store, trail, border = Store(workspace), AuditLog(workspace), time.time() - days * _DAY_S
    gone, altered = [], []
    for number, one in enumerate(found, 1):
        folder = store.workspace / one.folder
        if one.is_result:
            with store.lock(f"{folder.parent.name}-{folder.name[:16]}"), suppress(FileNotFoundError):
                if store.last_used(folder) < border:
                    try:
                        delete_entered(trail, folder, verify(folder), SWEPT, word)
                        gone.append(one)
                    except TamperedError:
                        altered.append(one)
        elif _newest(folder) < border:
            delete_entered(trail, folder, folder.name, "unfinished.swept", word)
            gone.append(one)
        advance("deleting", number, len(found))
    return gone, altered


def delete_entered(trail: AuditLog, folder: Path, digest: str, action: str, word: Word) -> None:
    """Delete a folder of the workspace; entered first: nothing goes without a trace.

    Raises:
        StorageError: it cannot be deleted.
    """
    inside = folder.relative_to(trail.path.parent).as_posix()
    trail.append(action, digest, details={"folder": inside, **asdict(word)})
    doomed = folder.with_name(f".{folder.name[:16]}.swept")  # half of it, after a crash, must not pass for a result
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise StorageError(
            f"'{folder}' could not be deleted ({error.strerror}). Delete it by hand; it is entered."
        ) from error


def _by_use(store: Store, kind: str) -> list[tuple[Path, float]]:
    """List the finished results of a kind, from the one that was used last."""
    folders = [folder for folder in sorted((store.root / kind).glob("[!.]*")) if folder.is_dir()]
    return sorted(((folder, store.last_used(folder)) for folder in folders), key=lambda one: -one[1])


def _spare_segments(store: Store, border: float) -> list[tuple[Path, float]]:
    """Name the segments that no scans rest on that were used since."""
    from medtl.scans.intake import read_origins, read_scans
    from medtl.scans.segments import unneeded

    pixels: set[str] = set()
    files: set[str] = set()
    for folder, used in _by_use(store, _SCANS):
        if used >= border:
            pixels |= {scan.pixel_digest for scan in read_scans(folder)}
            files |= {sha for members in read_origins(folder).values() for sha in members}
    segments = dict(_by_use(store, _SEGMENTS))
    return [(folder, segments[folder]) for folder in unneeded(segments, pixels, files)]


def _given_up(root: Path) -> Iterator[tuple[Path, float]]:
    for folder in sorted(root.glob("*")):
        if folder.is_dir():
            yield folder, _newest(folder)


def _newest(folder: Path) -> float:
    """Tell when anything in a folder was written last; now, where it is going away."""
    with suppress(FileNotFoundError):
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    return time.time()


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
