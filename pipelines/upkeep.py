"""What takes room in a workspace and nobody has wanted for long: found, and deleted on a person's word.

Only copies of pixels go, which are made again from the scans when they are wanted, and training that was given up.
Evidence stays: scans, cohorts, splits, plans, checkpoints, predictions, evaluations, releases, reports. Nothing is
deleted while a command is at work in the workspace, and no command begins while something is.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, cast

from medtl.artifacts import MANIFEST, Store, file_digest, storage_errors, sync_folder, verify
from medtl.audit import SWEPT, AuditLog
from medtl.config import Config
from medtl.errors import ConfigError, StorageError, TamperedError
from medtl.progress import advance

if TYPE_CHECKING:
    from medtl.registry.history import Word

_PACKS, _SEGMENTS, _SCANS, _UNFINISHED = "pack", "pixels", "scans", "unfinished"
_DAY_S = 86_400.0
P = ParamSpec("P")
T = TypeVar("T")


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


def at_work(step: Callable[Concatenate[Config, P], T]) -> Callable[Concatenate[Config, P], T]:
    """Let nobody sweep the workspace while a function of a config goes on."""

    @functools.wraps(step)
    def guarded(config: Config, *args: P.args, **kwargs: P.kwargs) -> T:
        with Store(config.workspace).at_work():
            return step(config, *args, **kwargs)

    return cast("Callable[Concatenate[Config, P], T]", guarded)


def unused(workspace: Path, days: float) -> list[Unused]:
    """Find what can be made again and was not used for so many days, largest first.

    A segment of the pixel store stays while scans that were used since rest on it. What a crash kept from being deleted
    is among them whenever it was used.

    Raises:
        ConfigError: days below 0.
        StorageError: a result cannot be read.
    """
    if not days >= 0:
        raise ConfigError(f"--unused {days:g}: write a number of days, for instance 30.")
    store, trail, border = Store(workspace), AuditLog(workspace), time.time() - days * _DAY_S
    packs, segments = _by_use(store, _PACKS), _by_use(store, _SEGMENTS)
    spare = _spare_segments(store, segments, border)
    found = [(folder, used) for folder, used in packs if used < border]
    found += [(folder, used) for folder, used in segments if used < border and folder in spare]
    found += [one for one in (*packs, *segments) if one not in found and trail.gone(_inside(store, one[0]))]
    found += [(folder, used) for folder, used in _given_up(store.workspace / _UNFINISHED) if used < border]
    listed = [Unused(_inside(store, folder), round(_bytes_of(folder) / 1e6, 1), _time(used)) for folder, used in found]
    return sorted(listed, key=lambda one: (-one.megabytes, one.folder))


def sweep(workspace: Path, days: float, word: Word) -> tuple[list[Unused], list[Unused]]:
    """Delete what :func:`unused` finds, each entered on the trail before it goes.

    Returns:
        What was deleted, and what was left because it is not what the trail says was made there.

    Raises:
        ConfigError: as of :func:`unused`.
        StorageError: a command is at work in the workspace, or something cannot be deleted.
        TamperedError: the trail was altered.
    """
    store, trail = Store(workspace), AuditLog(workspace)
    gone, altered = list[Unused](), list[Unused]()
    with store.alone():
        found = unused(workspace, days)
        for number, one in enumerate(found, 1):
            folder = store.workspace / one.folder
            if not one.is_result:
                delete_entered(trail, folder, folder.name, "unfinished.swept", word)
                gone.append(one)
            elif (digest := _as_entered(trail, folder, one.folder)) is not None:
                delete_entered(trail, folder, digest, SWEPT, word)
                gone.append(one)
            else:
                altered.append(one)
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
        sync_folder(folder.parent)
        shutil.rmtree(doomed)
    except OSError as error:
        raise StorageError(
            f"'{folder}' could not be deleted ({error.strerror}). Delete it by hand; it is entered."
        ) from error


def _as_entered(trail: AuditLog, folder: Path, inside: str) -> str | None:
    """Give a result's digest where it is what the trail says was made there, or was about to be deleted."""
    with storage_errors(folder):
        try:
            digest, manifest = verify(folder), file_digest(folder / MANIFEST)
        except TamperedError:
            return None
    entered = trail.made(inside) == (digest, manifest) or trail.gone(inside) == (SWEPT, digest)
    return digest if entered else None


def _by_use(store: Store, kind: str) -> list[tuple[Path, float]]:
    """List the finished results of a kind, from the one that was used last."""
    found = []
    for folder in sorted((store.root / kind).glob("[!.]*")):
        with suppress(FileNotFoundError):  # deleted by hand, just now
            found.append((folder, store.last_used(folder)))
    return sorted(found, key=lambda one: -one[1])


def _spare_segments(store: Store, segments: Sequence[tuple[Path, float]], border: float) -> set[Path]:
    """Name the segments that no scans rest on that were used since."""
    from medtl.scans.intake import read_origins, read_scans
    from medtl.scans.segments import unneeded

    pixels: set[str] = set()
    files: set[str] = set()
    for folder, used in _by_use(store, _SCANS):
        if used >= border:
            pixels |= {scan.pixel_digest for scan in read_scans(folder)}
            files |= {sha for members in read_origins(folder).values() for sha in members}
    return set(unneeded([folder for folder, _ in segments], pixels, files))


def _given_up(root: Path) -> Iterator[tuple[Path, float]]:
    """List unfinished work with the time at which anything in it was written last."""
    for folder in sorted(root.glob("*")):
        if folder.is_dir():
            yield folder, max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _inside(store: Store, folder: Path) -> str:
    return folder.relative_to(store.workspace).as_posix()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
