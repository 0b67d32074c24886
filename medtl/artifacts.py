"""A result is a folder named by the fingerprint of what it was made from.

The one place that decides whether work is done already, from bytes: the fingerprint covers the config section, the
digests of the inputs and the code that ran. A folder is written under a temporary name, every file is fsynced, the
manifest goes last, and one rename publishes it: a crash leaves rubbish to sweep, never a lie. Every file is checked
against the manifest when it is read. One lock per fingerprint makes two runs at once safe: the second waits, then
finds the first one's result.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from medtl.errors import StorageError, TamperedError
from medtl.records import Artifact

log = logging.getLogger(__name__)
T = TypeVar("T")
MANIFEST = "manifest.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
    errno.ENOENT,
}  # fmt: skip
_HALF_BUILT = re.compile(r"\.[0-9a-f]{16}\..+")
_DAY_S = 86_400.0
_SINCE = ".since"  # made with the first mark of use
FORMAT = 1


def canonical(value: Any) -> bytes:
    """Write a JSON value (paths are text) in its one canonical form: sorted keys, no spaces, UTF-8.

    What is read back from the form has the same form: keys are text before they are sorted. A lone surrogate (a file
    name that is not UTF-8) is written as its JSON escape.

    Raises:
        TypeError: a value that is not JSON; its text could differ from run to run.
        ValueError: NaN or an infinity.
    """
    plain = json.loads(json.dumps(value, default=_path_as_text, allow_nan=False))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def digest_of(value: Any) -> str:
    """Give the sha256 of a JSON value's canonical form, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_digest(path: Path) -> str:
    """Give the sha256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def code_digest(*rooms: str) -> str:
    """Give the digest of the source of some packages of medtl and of the foundation they stand on.

    Args:
        rooms: package names below ``medtl``, for instance ``"scans"``.

    Raises:
        ValueError: there is no such package.
    """
    root = Path(__file__).parent
    missing = [room for room in rooms if not (root / room).is_dir()]
    if missing:
        raise ValueError(f"medtl has no {', '.join(missing)}")
    kinds = {".py", ".jinja", ".css"}
    inside = [f for room in sorted(rooms) for f in sorted((root / room).rglob("*")) if f.suffix in kinds]
    files = sorted(root.glob("*.py")) + inside
    return digest_of([[f.relative_to(root).as_posix(), file_digest(f)] for f in files])


def write_record(path: Path, record: Any) -> None:
    """Write a record (or a tuple of them) as canonical, indented JSON."""
    write_bytes(path, record_bytes(record))


def record_bytes(record: Any) -> bytes:
    """Give what :func:`write_record` writes."""
    return _indented(TypeAdapter(type(record)).dump_python(record, mode="json") if record is not None else None)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented, keys sorted, and put it on the disk."""
    write_bytes(path, _indented(value))


def _indented(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_record(path: Path, kind: type[T]) -> T:
    """Read a record back and check its types.

    Raises:
        StorageError: missing, not JSON, or not such a record.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError) as error:
        raise StorageError(f"{path}: is not a readable {getattr(kind, '__name__', kind)}: {error}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step: temporary name, fsync, rename.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence that says what to try.

    Args:
        path: what is written; a refusal to read something elsewhere is told apart, without its name: it may be a scan.

    Raises:
        StorageError: full disk, file-size limit, no permission, read-only file system, impossible name.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"The disk is full, or a file-size limit was reached, while writing below '{_folder(path)}'. Nothing "
                "that was finished is lost: free some space (or raise the limit), then run the same command again."
            ) from error
        if _refused_to_read(error, path):
            raise StorageError(
                f"Something that is read cannot be ({error.strerror}). Let this user read the scans, the label table, "
                "the weights and the workspace, then run the same command again."
            ) from error
        if error.errno in _REFUSED:
            raise StorageError(
                f"'{_folder(path)}' cannot be written ({error.strerror}). Name another folder "
                "(of a run: --set workspace=FOLDER)."
            ) from error
        raise


class Store:
    """The artifacts of one workspace, under ``<workspace>/artifacts/<kind>/<fingerprint>``.

    Args:
        workspace: folder; made (0700) if it is missing.

    Raises:
        StorageError: the workspace cannot be written.
    """

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace.absolute()
        self.root = self.workspace / "artifacts"
        with storage_errors(self.workspace):
            # private where it is made here; a folder that somebody else made keeps its mode
            self.workspace.mkdir(parents=True, mode=0o700, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
            probe = self.root / f".probe.{os.getpid()}"
            probe.write_bytes(b"medtl")
            probe.unlink()
            self._marks = self.workspace / "index" / "used"
            self._marks.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                (self._marks / _SINCE).touch(exist_ok=False)

    def find(self, kind: str, inputs: Mapping[str, Any]) -> Artifact | None:
        """Look a finished result up by its inputs; check every byte of it.

        Raises:
            TamperedError: it is there, and is not what was written.
        """
        fingerprint = digest_of([FORMAT, kind, inputs])
        folder = self._folder(kind, fingerprint)
        if not folder.exists():  # a folder without a manifest is no unfinished one: those have temporary names
            return None
        digest = verify(folder)
        if _manifest(folder)["fingerprint"] != fingerprint:
            raise TamperedError(
                f"'{folder}' holds another result than its name says ({MANIFEST}). Find out who moved it; if nothing "
                "is wrong, delete the folder and it will be made again."
            )
        self.mark_used(folder)
        return Artifact(kind, fingerprint, digest, folder, reused=True)

    def make(self, kind: str, inputs: Mapping[str, Any], build: Callable[[Path], None]) -> Artifact:
        """Find a result, or build it once, whoever else is asking.

        Args:
            kind: short name; the folder it goes under.
            inputs: JSON mapping of everything the result depends on.
            build: writes the result's files into the empty folder it is given.

        Raises:
            TamperedError: a finished result was altered.
            StorageError: the disk is full or cannot be written.
        """
        fingerprint = digest_of([FORMAT, kind, inputs])
        folder = self._folder(kind, fingerprint)
        with self.lock(f"{kind}-{fingerprint[:16]}"):
            found = self.find(kind, inputs)
            if found is not None:
                log.info("%s %s: done before, nothing to compute", kind, fingerprint[:12])
                return found
            with storage_errors(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                for rubbish in folder.parent.glob(f".{fingerprint[:16]}.*"):  # ours: this process holds its lock
                    shutil.rmtree(rubbish, ignore_errors=True)
                self._sweep()
                temporary = Path(tempfile.mkdtemp(prefix=f".{fingerprint[:16]}.", dir=folder.parent))
            try:
                with storage_errors(folder):
                    build(temporary)
                    digest = _seal(temporary, kind, fingerprint, inputs)
                    temporary.rename(folder)
                    sync_folder(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        log.info("%s %s: written", kind, fingerprint[:12])
        return Artifact(kind, fingerprint, digest, folder)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of this name; wait, and say so, while another process holds it. Dies with the process."""
        folder = self.workspace / "locks"
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            handle = (folder / name).open("w")
        try:
            since = time.monotonic()
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if (waited := time.monotonic() - since) < 1:
                        log.warning("another run is working on %s; waiting for it", name)
                        since -= 1
                    time.sleep(min(1.0, 0.05 + waited / 10))
            yield
        finally:
            handle.close()

    def mark_used(self, folder: Path) -> None:
        """Note that a result is wanted now; beside it, because a finished result is never touched."""
        with storage_errors(self._marks):
            self._mark(folder).touch()

    def last_used(self, folder: Path) -> float:
        """Tell when a result was found last, or made if it never was; seconds since the epoch.

        Nothing is known of the time before the first mark of a workspace: what is older counts from then.

        Raises:
            FileNotFoundError: it is gone.
        """
        made, since = folder.stat().st_mtime, (self._marks / _SINCE).stat().st_mtime
        try:
            return max(made, since, self._mark(folder).stat().st_mtime)
        except FileNotFoundError:
            return max(made, since)

    def _mark(self, folder: Path) -> Path:
        return self._marks / f"{folder.parent.name}-{folder.name}"

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep what is here from being swept, as long as this lasts; several may work at once."""
        with self._gate() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("the workspace is being swept; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_SH)
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one at work here; who comes meanwhile waits.

        Raises:
            StorageError: somebody is at work.
        """
        with self._gate() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"A command is at work in '{self.workspace}', and may be reading what would go. Run this again "
                    "when it has ended."
                ) from error
            yield

    @contextlib.contextmanager
    def _gate(self) -> Iterator[Any]:
        folder = self.workspace / "locks"
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            handle = (folder / "workspace").open("w")
        with handle:
            yield handle

    def scratch(self, name: str) -> Path:
        """Give a folder for unfinished work that survives a crash (training state), made if missing."""
        folder = self.workspace / "unfinished" / name
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)  # somebody goes on with it
        return folder

    def _sweep(self) -> None:
        """Remove half-built results of any fingerprint that are a day old and whose builder is gone."""
        for rubbish in self.root.glob("*/.*.*"):
            lock = self.workspace / "locks" / f"{rubbish.parent.name}-{rubbish.name[1:17]}"
            if not _HALF_BUILT.fullmatch(rubbish.name) or not _is_old(rubbish):
                continue
            with lock.open("w") as handle, contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a builder holds it as long as it lives
                shutil.rmtree(rubbish, ignore_errors=True)

    def _folder(self, kind: str, fingerprint: str) -> Path:
        return self.root / kind / fingerprint[:32]


def verify(folder: Path) -> str:
    """Check every file of a finished result against its manifest; give the digest of its contents.

    Raises:
        TamperedError: a file is missing, added or altered, or the manifest is.
        StorageError: a file cannot be read.
    """
    manifest = _manifest(folder)
    files, digest = manifest["files"], str(manifest["digest"])
    try:
        present = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
        wrong = present ^ set(files) or {name for name, sha in files.items() if file_digest(folder / name) != sha}
    except OSError as error:
        raise StorageError(f"'{folder}' cannot be read ({error.strerror}). Try again as its owner.") from error
    made_from = digest_of([manifest.get("format", FORMAT), manifest["kind"], manifest["inputs"]])
    if wrong or digest != digest_of([manifest["kind"], files]) or made_from != manifest["fingerprint"]:
        named = ", ".join(sorted(wrong)) or MANIFEST
        raise TamperedError(
            f"'{folder}' was altered after it was written ({named}). Find out why; if nothing is wrong, delete the "
            "folder and it will be made again."
        )
    return digest


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an array as ``.npy`` without pickling.

    Raises:
        OSError: with the system's reason, which numpy drops when it is given the file itself.
    """
    with path.open("wb") as stream:
        np.save(_Sink(stream.write), array, allow_pickle=False)


def load_array(path: Path, mapped: bool = False) -> np.ndarray[Any, Any]:
    """Read an ``.npy`` array; never unpickle. ``mapped`` keeps it on disk, read-only."""
    array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False, mmap_mode="r" if mapped else None)
    return array


@dataclass(frozen=True, slots=True)
class _Sink:
    write: Callable[[bytes], int]


def _path_as_text(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no canonical form")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest.keys() >= {"kind", "fingerprint", "inputs", "files", "digest"} and hasattr(
            manifest["files"], "items"
        ):
            return dict(manifest)
        raise ValueError
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TamperedError(
            f"'{folder}' has no readable {MANIFEST}. Find out why; if nothing is wrong, delete the folder and it will "
            "be made again."
        ) from error


def _seal(folder: Path, kind: str, fingerprint: str, inputs: Mapping[str, Any]) -> str:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            files[path.relative_to(folder).as_posix()] = file_digest(path)
        else:
            sync_folder(path)
    digest = digest_of([kind, files])
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "fingerprint": fingerprint,
        "inputs": json.loads(canonical(inputs)),
        "files": files,
        "digest": digest,
    }
    write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    sync_folder(folder)
    return digest


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused_to_read(error: OSError, path: Path) -> bool:
    """Tell a thing elsewhere that may not be read from one that may not be written."""
    if error.errno not in {errno.EACCES, errno.EPERM} or not isinstance(error.filename, (str, bytes)):
        return False
    named, written = Path(os.fsdecode(error.filename)).absolute(), path.absolute()
    if written.parent in named.parents or named in (written.parent, *written.parents):
        return False
    wanted, mode = (named, os.R_OK) if os.access(named, os.F_OK) else (named.parent, os.X_OK)
    return not os.access(wanted, mode)


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > _DAY_S
    except FileNotFoundError:  # its builder has just finished
        return False


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
