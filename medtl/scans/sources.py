"""The door in: which files a source holds, what is in its archives, and what has changed since the last look.

A source is a folder, one file, a zip archive or a DICOMDIR. It is only read; nothing is ever unpacked to disk, so no
name from outside becomes a path. Links and devices are not followed. A file that is still being written is given a
moment to come to rest, and is left for the next time if it does not.

The index remembers each file's size, times and inode beside its digest: what has not changed is not read again. It
lies in the workspace and holds keyed names only.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO

from medtl.artifacts import file_digest, write_bytes
from medtl.config import ScansConfig
from medtl.errors import ScanError, StorageError
from medtl.progress import advance
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.faults import faults_refused
from medtl.scans.headers import hush_pydicom

log = logging.getLogger(__name__)
_DIRECTORY = b"1.2.840.10008.1.3.10"  # Media Storage Directory, in a DICOMDIR's first bytes
_START = 1024
_ZIP = b"PK\x03\x04"
_DAMAGED = (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, UnicodeDecodeError, NotImplementedError)  # an archive
_NPZ_PARTS = frozenset(f"{part}_{what}.npy" for part in ("train", "val", "test") for what in ("images", "labels"))
_INDEX_FORMAT = 1
_MEMBER_CHUNK = 1 << 20
_RACY_NS = 2_000_000_000  # a file changed this shortly before it was read may change again under the same time stamp

Stamp = tuple[int, int, int, int]  # size, modification and change time in ns, inode


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the source, known by its bytes."""

    path: Path  # of the archive, for a file inside one
    relative: str  # below the source; inside an archive: the archive's own, a slash, the member's
    size: int
    sha256: str | None  # None: not read, and why
    refusal: ScanError | None = None
    member: str | None = None  # name inside the archive
    stamp: Stamp | None = None


class SourceIndex:
    """What is known about files that were read before: ``<folder>/source-index.json``.

    Args:
        folder: made if missing; ``None`` remembers nothing.
        names: keys the file names; none is written down as it is.
    """

    def __init__(self, folder: Path | None, names: Pseudonymiser) -> None:
        self._path = folder / "source-index.json" if folder else None
        self._names = names
        self._known: dict[str, list[object]] = {}
        self._new: dict[str, list[object]] = {}
        if self._path is not None and self._path.is_file():
            self._known = self._read(self._path)

    def get(self, file: SourceFile) -> str | None:
        """Give the digest of a file that has not changed since it was read."""
        if file.stamp is None:
            return None
        known = self._known.get(self._names.file(file.relative))
        return str(known[4]) if known is not None and tuple(known[:4]) == file.stamp else None

    def put(self, file: SourceFile, read_at_ns: int) -> None:
        """Remember a file's digest, unless it changed so shortly before that its time stamp proves nothing."""
        if file.stamp is None or file.sha256 is None or read_at_ns - max(file.stamp[1:3]) < _RACY_NS:
            return
        self._new[self._names.file(file.relative)] = [*file.stamp, file.sha256]

    def save(self) -> None:
        """Write what is new; an index that cannot be written costs time, not results."""
        if self._path is None or not self._new:
            return
        self._known |= self._new
        self._new = {}
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(self._path, json.dumps({"format": _INDEX_FORMAT, "files": self._known}).encode())

    @staticmethod
    def _read(path: Path) -> dict[str, list[object]]:
        try:
            record = json.loads(path.read_bytes())
            rows = record["files"] if record["format"] == _INDEX_FORMAT else {}
            if not all(len(row) == 5 for row in rows.values()):
                raise ValueError
            return dict(rows)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("the index of the source is damaged; every file is read again")
            return {}


def survey(
    source: Path | None,
    config: ScansConfig,
    ignore: frozenset[Path] = frozenset(),
    index: SourceIndex | None = None,
) -> tuple[SourceFile, ...]:
    """List every file below the source, with its digest, in order of their names.

    Args:
        source: folder, zip archive, DICOMDIR, or one file.
        ignore: files that are not scans (the label table).
        index: what was read before; unchanged files are not read again.

    Raises:
        StorageError: the source is not set, does not exist, cannot be read or is empty.
    """
    if source is None:
        raise StorageError("No source of scans is set. Name a folder: --set scans.source=FOLDER")
    if not source.exists():
        raise StorageError(f"scans.source '{source}' does not exist. Name a folder of scans, or one file.")
    files = list(_listed(source, config, {path.resolve() for path in ignore}))
    if not files:
        raise StorageError(f"scans.source '{source}' holds no files.")
    files = _at_rest(files, config.stable_seconds)
    done: list[SourceFile] = []
    with ThreadPoolExecutor(config.workers) as pool:
        for number, found in enumerate(pool.map(lambda file: _identify(file, config, index), files), 1):
            done += found
            advance("reading files", number, len(files))
    if index is not None:
        index.save()
    return tuple(done)


def list_files(source: Path, config: ScansConfig) -> tuple[SourceFile, ...]:
    """List the regular files below the source without reading them (digests stay ``None``)."""
    return tuple(_listed(source, config, set()))


def unpack(archive: SourceFile, config: ScansConfig) -> tuple[SourceFile, ...]:
    """List and digest what is in a zip archive; give the file itself where it is an array archive or none at all."""
    return (archive,) if _is_npz(archive) else tuple(_members(archive, config, None))


@contextmanager
def opened(file: SourceFile) -> Iterator[IO[bytes]]:
    """Open a file of the source for reading, never through a link.

    Raises:
        ScanError: ``not_a_file``, ``unreadable`` or ``archive_damaged``.
    """
    if file.member is None:
        with _open_regular(file.path) as stream:
            yield stream
        return
    try:
        with _archive(file).open(file.member) as inside:
            yield inside
    except (*_DAMAGED, KeyError, RuntimeError) as error:
        raise ScanError("archive_damaged", f"the archive cannot be unpacked ({type(error).__name__})") from error


def read_bytes(file: SourceFile) -> bytes:
    """Read a whole file of the source; it must be the bytes that were surveyed.

    Raises:
        ScanError: ``changed`` where it is not what it was, or what :func:`opened` raises.
    """
    with opened(file) as stream:
        data = stream.read(file.size + 1)
    if len(data) != file.size or (file.sha256 is not None and sha256(data).hexdigest() != file.sha256):
        raise ScanError("changed", "the file changed while it was being read; it will be taken next time")
    return data


def stamp_of(status: os.stat_result) -> Stamp:
    """Give what tells whether a file changed."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def open_regular(path: Path) -> int:
    """Open a regular file for reading, never through a link; give its descriptor, for the caller to close.

    Raises:
        ScanError: ``not_a_file`` or ``unreadable``.
    """
    try:
        # without O_NONBLOCK a pipe put there since would hold us for ever
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ScanError("unreadable", f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ScanError("not_a_file", "a device or a pipe, not a regular file")
    return handle


def _open_regular(path: Path) -> IO[bytes]:
    return os.fdopen(open_regular(path), "rb")


class _LastArchive(threading.local):
    """The archive a thread read last, still open: its list of members is read once, not once per member."""

    key: tuple[Path, tuple[int, ...] | None] | None = None
    archive: zipfile.ZipFile | None = None


_last = _LastArchive()


def _archive(file: SourceFile) -> zipfile.ZipFile:
    """Open the archive of a member; it must be the archive that was surveyed.

    Raises:
        ScanError: ``changed``.
    """
    key = file.path, None if file.stamp is None else file.stamp[1:]  # its time stamp is the member's
    if _last.archive is None or _last.key != key:
        if _last.archive is not None:
            _last.archive.close()
            _last.key, _last.archive = None, None
        with _open_regular(file.path) as stream:  # opened once more by number: that one the archive closes itself
            if file.stamp is not None and stamp_of(os.fstat(stream.fileno()))[1:] != file.stamp[1:]:
                raise ScanError("changed", "the archive changed while it was read; it will be taken next time")
            _last.archive = zipfile.ZipFile(f"/dev/fd/{stream.fileno()}")
            _last.key = key
    return _last.archive


def _listed(source: Path, config: ScansConfig, ignored: set[Path]) -> Iterator[SourceFile]:
    if source.is_file():
        start = _first_bytes(source)
        if _is_directory(start):
            yield from _of_directory(source, config)
        else:
            yield _look(source, source.name, config)
        return
    closed: list[OSError] = []
    for folder, folders, names in os.walk(source, followlinks=False, onerror=closed.append):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        here = Path(folder)
        below = here.relative_to(source).as_posix()
        for name in sorted(names + links):
            path = here / name
            if not ignored or path.resolve() not in ignored:
                yield _look(path, name if below == "." else f"{below}/{name}", config)
    for (
        error
    ) in closed:  # a folder that cannot be looked into counts as one file, so that its scans are not lost unseen
        path = Path(error.filename)
        if path == source:
            raise StorageError(f"scans.source '{source}' cannot be read ({error.strerror}). Let this user read it.")
        refusal = ScanError("unreadable", f"a folder that cannot be read ({error.strerror})")
        yield SourceFile(path, path.relative_to(source).as_posix(), 0, None, refusal)


def _look(path: Path, relative: str, config: ScansConfig) -> SourceFile:
    """Look at a file from outside: kind, size, times."""
    try:
        status = path.lstat()
    except OSError as error:
        return SourceFile(path, relative, 0, None, ScanError("unreadable", f"cannot be read ({error.strerror})"))
    if not stat.S_ISREG(status.st_mode):
        refusal = ScanError("not_a_file", "a link or a device, not a regular file; links are not followed")
        return SourceFile(path, relative, 0, None, refusal)
    stamp = stamp_of(status)
    if status.st_size == 0:
        return SourceFile(path, relative, 0, None, ScanError("empty_file", "the file has no bytes"), stamp=stamp)
    if status.st_size > config.max_file_mb * 1e6:
        limit = ScanError("too_large", f"larger than scans.max_file_mb = {config.max_file_mb:g}")
        return SourceFile(path, relative, status.st_size, None, limit, stamp=stamp)
    return SourceFile(path, relative, status.st_size, None, stamp=stamp)


def _at_rest(files: Sequence[SourceFile], seconds: float) -> list[SourceFile]:
    """Wait until the youngest file is old enough; refuse what changed meanwhile."""
    if seconds <= 0:
        return list(files)
    now = time.time_ns()
    young = [file for file in files if file.stamp and now - max(file.stamp[1:3]) < seconds * 1e9]
    if not young:
        return list(files)
    youngest = max(max(file.stamp[1:3]) for file in young if file.stamp)
    time.sleep(min(seconds, max(0.0, seconds - (now - youngest) / 1e9)))
    unstable = {file.path for file in young if _changed(file)}
    refusal = ScanError("unstable", "the file is still being written; it will be taken when it has come to rest")
    return [replace(file, refusal=refusal) if file.path in unstable else file for file in files]


def _changed(file: SourceFile) -> bool:
    try:
        status = file.path.lstat()
    except OSError:
        return True
    return stamp_of(status) != file.stamp


def _identify(file: SourceFile, config: ScansConfig, index: SourceIndex | None) -> list[SourceFile]:
    """Give a file its digest; give an archive's members theirs."""
    if file.refusal is not None:
        return [file]
    known = index.get(file) if index else None
    if known is not None:
        return [replace(file, sha256=known)]
    try:
        with faults_refused():
            start = _first_bytes(file.path)
            if start.startswith(_ZIP) and not _is_npz(file):
                return _members(file, config, index)
            read_at = time.time_ns()
            if _is_directory(start):
                listed = ScanError("dicomdir", "a DICOMDIR: the files it lists are taken by themselves")
                return [replace(file, refusal=listed)]
            with opened(file):  # refuses links and devices that were put there since
                found = replace(file, sha256=file_digest(file.path))
    except ScanError as error:
        return [replace(file, refusal=error)]
    except OSError as error:
        return [replace(file, refusal=ScanError("unreadable", f"cannot be read ({error.strerror})"))]
    if index is not None:
        index.put(found, read_at)
    return [found]


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_START)
    except OSError:
        return b""


def _is_directory(start: bytes) -> bool:
    return start[128:132] == b"DICM" and _DIRECTORY in start[132:512]


# ---------------------------------------------------------------------------------------------------- archives


def _is_npz(file: SourceFile) -> bool:
    try:
        with opened(file) as stream, zipfile.ZipFile(stream) as archive:
            return any(PurePosixPath(name).name in _NPZ_PARTS for name in archive.namelist()[:64])
    except (*_DAMAGED, ScanError):
        return False


def _members(file: SourceFile, config: ScansConfig, index: SourceIndex | None) -> list[SourceFile]:
    """List and digest the files of a zip archive, within its limits; nothing is written anywhere."""
    try:
        with opened(file) as stream, zipfile.ZipFile(stream) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_archive(entries, file.size, config)
            return [_member(file, entry, archive, config, index) for entry in entries]
    except ScanError as error:
        return [replace(file, refusal=error)]
    except _DAMAGED as error:
        damaged = ScanError("archive_damaged", f"the archive cannot be unpacked ({type(error).__name__})")
        return [replace(file, refusal=damaged)]


def _check_archive(entries: Sequence[zipfile.ZipInfo], size: int, config: ScansConfig) -> None:
    """Refuse an archive that would grow without bound.

    Raises:
        ScanError: ``archive_bomb``.
    """
    if len(entries) > config.max_archive_files:
        raise ScanError("archive_bomb", f"more than scans.max_archive_files = {config.max_archive_files} files inside")
    grown = sum(entry.file_size for entry in entries)
    if grown > max(size, 1) * config.max_archive_ratio:
        raise ScanError(
            "archive_bomb",
            f"it would grow {grown / max(size, 1):.0f} times, more than scans.max_archive_ratio = "
            f"{config.max_archive_ratio:g}",
        )


def _member(
    file: SourceFile,
    entry: zipfile.ZipInfo,
    archive: zipfile.ZipFile,
    config: ScansConfig,
    index: SourceIndex | None,
) -> SourceFile:
    found = SourceFile(file.path, f"{file.relative}/{entry.filename}", entry.file_size, None, None, entry.filename)
    refusal = _refuse_member(entry, config)
    if refusal is not None:
        return replace(found, refusal=refusal)
    # a member is as unchanged as its archive, and the archive's time stamp is the member's
    stamped = replace(found, stamp=None if file.stamp is None else (entry.file_size, *file.stamp[1:]))
    known = index.get(stamped) if index else None
    if known is not None:
        return replace(stamped, sha256=known)
    read_at = time.time_ns()
    digest, grown = sha256(), 0
    try:
        with archive.open(entry) as stream:
            while chunk := stream.read(_MEMBER_CHUNK):
                if grown == 0 and chunk.startswith(_ZIP):
                    return replace(found, refusal=ScanError("archive_nested", "an archive inside an archive"))
                grown += len(chunk)
                if grown > entry.file_size:
                    return replace(found, refusal=ScanError("archive_bomb", "it grows past the size it declares"))
                digest.update(chunk)
    except (*_DAMAGED, RuntimeError) as error:
        damaged = ScanError("archive_damaged", f"cannot be unpacked ({type(error).__name__})")
        return replace(found, refusal=damaged)
    except OSError as error:
        if error.errno is not None:  # without a number it is an unpacker's own
            raise
        return replace(found, refusal=ScanError("archive_damaged", "cannot be unpacked (its data are damaged)"))
    if grown != entry.file_size:
        return replace(found, refusal=ScanError("archive_damaged", "shorter than the size it declares"))
    done = replace(stamped, sha256=digest.hexdigest())
    if index is not None:
        index.put(done, read_at)
    return done


def _refuse_member(entry: zipfile.ZipInfo, config: ScansConfig) -> ScanError | None:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if not name.parts:
        return ScanError("archive_path", "it has no name inside the archive")
    if name.is_absolute() or ".." in name.parts or "\0" in entry.orig_filename or ":" in name.parts[0]:
        return ScanError("archive_path", "its name inside the archive leads outside of it")
    if kind not in (0, stat.S_IFREG):
        return ScanError("archive_link", "a link or a device inside an archive")
    if entry.flag_bits & 1:
        return ScanError("archive_damaged", "it is encrypted; unpack it first")
    if entry.file_size == 0:
        return ScanError("empty_file", "the file has no bytes")
    if entry.file_size > config.max_file_mb * 1e6:
        return ScanError("too_large", f"larger than scans.max_file_mb = {config.max_file_mb:g}")
    return None


# ---------------------------------------------------------------------------------------------------- DICOMDIR


def _of_directory(path: Path, config: ScansConfig) -> Iterator[SourceFile]:
    """List the files that a DICOMDIR names, below its own folder only. Source: DICOM PS3.10 8.6, PS3.3 F.3."""
    for number, parts in enumerate(_referenced(path)):
        relative = "/".join(parts) or f"record {number}"
        target = path.parent.joinpath(*parts)
        if not parts or any(part in ("", ".", "..") or "/" in part or "\\" in part for part in parts):
            leads_out = ScanError("archive_path", "a record of the DICOMDIR names a file outside its folder")
            yield SourceFile(path, f"DICOMDIR record {number}", 0, None, leads_out)
        elif any(parent.is_symlink() for parent in (target, *list(target.parents)[: len(parts) - 1])):
            yield SourceFile(target, relative, 0, None, ScanError("not_a_file", "a link; links are not followed"))
        elif not target.exists():
            yield SourceFile(target, relative, 0, None, ScanError("missing_file", "the DICOMDIR names a missing file"))
        else:
            yield _look(target, relative, config)


def _referenced(path: Path) -> Iterable[tuple[str, ...]]:
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    hush_pydicom()
    try:
        records = dcmread(path, specific_tags=["DirectoryRecordSequence"]).get("DirectoryRecordSequence") or []
        named = [record.get("ReferencedFileID") for record in records]
    except (InvalidDicomError, AttributeError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
        raise StorageError(
            f"'{path.name}' is a DICOMDIR that cannot be read ({type(error).__name__}). Name its folder instead."
        ) from error
    found = [(name,) if isinstance(name, str) else tuple(map(str, name)) for name in named if name]
    return dict.fromkeys(found)
