"""Where received objects come to rest. A door: files are written here.

* ``objects/`` holds whole DICOM files (PS3.10), as they came, each named by keyed digests of its SOP instance UID and
  of its bytes: no name says anything, the folder itself is the index of what is there, the same object is kept once,
  and one UID with two contents is kept twice.
* ``incoming/`` holds what is still being received, each file locked by who writes it; the next start sweeps the rest.

An object is streamed to the disk while it comes, so that memory does not grow with it. It is whole and on the disk
(file synced, renamed, folder synced) before anybody is told so.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pydicom import FileMetaDataset, dcmread, uid
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID

from medtl.artifacts import storage_errors
from medtl.errors import ScanError
from medtl.pseudonyms import Pseudonymiser

log = logging.getLogger(__name__)
OBJECTS, INCOMING = "objects", "incoming"
BUFFER = 1 << 20
UID_PATTERN = re.compile(r"[0-9.]{1,64}", re.ASCII)
_LOOK_EVERY = 32 << 20  # bytes between two looks at the disk's free space
MAX_COMMAND = 1 << 16


@dataclass(frozen=True, slots=True)
class Received:
    """What came over the port so far."""

    stored: int
    known: int  # came again, with the same bytes
    conflicting: int  # of those stored: another content under a UID that was there
    refused: Mapping[str, int]  # code -> objects
    last: datetime | None  # UTC, of the last object that was acknowledged


class Spool:
    """The folder where objects come to rest.

    Args:
        folder: made where it is missing (0700); several processes may share it.
        max_object_mb: a larger object is refused while it comes.
        min_free_mb: objects are refused while the disk has less free space.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, names: Pseudonymiser, max_object_mb: float, min_free_mb: float) -> None:
        self.objects, self.incoming = folder / OBJECTS, folder / INCOMING
        self.max_bytes, self.min_free_bytes = int(max_object_mb * 1e6), int(min_free_mb * 1e6)
        self.refusals: dict[str, ScanError] | None = None  # by keyed UID, where somebody asks for them
        self.heard = 0.0  # on the monotonic clock: when bytes of any object last came
        self._names, self._lock = names, threading.Lock()
        self._stored = self._known = self._conflicting = 0
        self._refused: Counter[str] = Counter()
        self._last: datetime | None = None
        with storage_errors(folder):
            for path in (folder, self.objects, self.incoming):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            _sync_folder(self.objects)  # a process that was killed may have renamed and not synced
            self._held = {entry.name.partition(".")[0] for entry in os.scandir(self.objects)}

    def holds(self, sop_uid: str) -> bool:
        """Tell whether an object is here."""
        return self.key(sop_uid) in self._held

    def key(self, sop_uid: str) -> str:
        """Give the keyed name of an object's UID."""
        return self._names.name("uid", sop_uid)

    def receive(self, head: bytes = b"") -> Part:
        """Open a file for an object that comes in."""
        return Part(self, head)

    def keep(self, part: Part, sop_uid: str, digest: str | None = None) -> None:
        """Put a whole object to rest: when this returns it is on the disk.

        Args:
            digest: of its transfer syntax and data set; default: what the part counted.

        Raises:
            ScanError: the part was refused (``too_large``, ``disk_full`` ...), or ``bad_uid`` or ``empty_object``.
        """
        try:
            if part.refusal is not None:
                raise part.refusal
            if not UID_PATTERN.fullmatch(sop_uid):
                raise ScanError("bad_uid", "its SOP instance UID is none")
            if part.size == 0:
                raise ScanError("empty_object", "it has no data")
            key = self.key(sop_uid)
            self._rest(part, key, self._names.name("content", digest or part.digest))
        except ScanError as error:
            self.refuse(error, sop_uid)
            raise
        finally:
            part.discard()

    def refuse(self, error: ScanError, sop_uid: str) -> None:
        """Count an object that was not taken."""
        with self._lock:
            self._refused[error.code] += 1
            if self.refusals is not None:
                self.refusals[self.key(sop_uid)] = error
        log.info("an object was refused: %s (%s)", error.reason, error.code)

    def counts(self) -> Received:
        """Say what came so far."""
        with self._lock:
            return Received(self._stored, self._known, self._conflicting, dict(self._refused), self._last)

    def check_space(self) -> None:
        """Refuse to write where the disk is nearly full.

        Raises:
            ScanError: ``disk_full``.
        """
        status = os.statvfs(self.incoming)
        if status.f_bavail * status.f_frsize < self.min_free_bytes:
            raise ScanError("disk_full", f"the disk has less than {self.min_free_bytes / 1e6:.0f} MB of free space")

    def _rest(self, part: Part, key: str, content: str) -> None:
        target = self.objects / f"{key}.{content}.dcm"
        try:
            known = target.exists()
            if not known:
                part.settle(target)
        except OSError as error:
            raise disk_refusal(error) from error
        with self._lock:
            conflicting = not known and key in self._held
            self._held.add(key)
            self._known += known
            self._stored += not known
            self._conflicting += conflicting
            self._last = datetime.now(UTC)
        if conflicting:
            log.warning("%s came with another content than before; both are kept", key)

    def _sweep(self) -> None:
        """Delete what a killed process left; what is locked is being written by another."""
        for path in self.incoming.glob("*.part"):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                path.unlink()


class Part:
    """An object on its way to the disk. It never raises while bytes come: it notes why they are refused."""

    def __init__(self, spool: Spool, head: bytes) -> None:
        self.size = 0  # bytes after the head
        self.refusal: ScanError | None = None
        self.max_bytes = spool.max_bytes
        self._spool, self._digest = spool, hashlib.sha256()
        self._looked = 0
        self._stream: BinaryIO | None = None
        self._lock = threading.RLock()  # a connection may end in one thread while another puts the object to rest
        self.path = spool.incoming / f"{secrets.token_hex(8)}.part"
        try:
            spool.check_space()
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._stream = stream = os.fdopen(handle, "wb", buffering=BUFFER)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.write(head)
        except OSError as error:
            self._give_up(disk_refusal(error))
        except ScanError as error:
            self._give_up(error)

    @property
    def digest(self) -> str:
        """Give the sha256 of what was written after the head."""
        return self._digest.hexdigest()

    def mark(self, text: str) -> None:
        """Let something that is not in the bytes count in their digest."""
        self._digest.update(text.encode() + b"\0")

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self.size += len(data)
        self._spool.heard = time.monotonic()
        with self._lock:
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._stream is None:
            return
        try:
            if self.size > self.max_bytes:
                raise ScanError("too_large", f"larger than max_object_mb = {self.max_bytes / 1e6:g}")
            if self.size - self._looked > _LOOK_EVERY:
                self._looked = self.size
                self._spool.check_space()
            self._stream.write(data)
        except OSError as error:
            self._give_up(disk_refusal(error))
        except ScanError as error:
            self._give_up(error)
        else:
            self._digest.update(data)

    def flush(self) -> None:
        """Hand everything to the system.

        Raises:
            ScanError: why the object is refused.
        """
        with self._lock:
            try:
                if self._stream is not None:
                    self._stream.flush()
            except OSError as error:
                self._give_up(disk_refusal(error))
        if self.refusal is not None:
            raise self.refusal

    def settle(self, target: Path) -> None:
        """Put the bytes on the disk under their name.

        Raises:
            OSError: they cannot be put there.
            ScanError: ``cut_off``.
        """
        with self._lock:
            if self._stream is None:
                raise ScanError("cut_off", "the connection ended before it was whole")
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self.path.replace(target)
            _sync_folder(target.parent)

    def discard(self) -> None:
        """Close the file, and delete it where it has not come to rest."""
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is not None:
                # after the rename there is nothing of this name; what a full disk cannot take is deleted anyway
                with contextlib.suppress(FileNotFoundError):
                    self.path.unlink()
                with contextlib.suppress(OSError):
                    stream.close()

    @property
    def closed(self) -> bool:
        """Tell whether it was put to rest, or given up."""
        return self._stream is None

    def _give_up(self, refusal: ScanError) -> None:
        self.refusal = refusal
        self.discard()


def disk_refusal(error: OSError) -> ScanError:
    """Say that the disk does not take an object."""
    return ScanError("disk_full", f"it cannot be written ({error.strerror or type(error).__name__})")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_head(sop_class: str, sop_uid: str, syntax: str) -> bytes:
    """Give what stands before a data set in a file: preamble, prefix, file meta. Source: DICOM PS3.10 7.1."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.UID(sop_class), uid.UID(sop_uid)
    meta.TransferSyntaxUID = uid.UID(syntax)
    meta.ImplementationClassUID = PYNETDICOM_IMPLEMENTATION_UID
    buffer = DicomBytesIO()
    buffer.write(bytes(128) + b"DICM")
    write_file_meta_info(buffer, meta)
    return buffer.getvalue()


def digest_of_file(part: Part, sop_uid: str) -> str:
    """Give the digest of a file's transfer syntax and data set: the same as when it comes over C-STORE.

    Raises:
        ScanError: ``not_dicom``, ``wrong_object``, or what the part was refused for.
    """
    part.flush()
    with part.path.open("rb") as stream:
        head = stream.read(144)
        length = int.from_bytes(head[140:], "little")
        if head[128:140] != b"DICM\x02\x00\x00\x00UL\x04\x00" or length > MAX_COMMAND:
            raise ScanError("not_dicom", "the archive's answer is not a DICOM file")
        try:
            meta = dcmread(io.BytesIO(head + stream.read(length))).file_meta
            syntax, named = str(meta.TransferSyntaxUID), str(meta.MediaStorageSOPInstanceUID)
        except Exception as error:  # a hostile answer may make pydicom raise anything
            raise ScanError("not_dicom", "its file meta information cannot be read") from error
        if named != sop_uid:
            raise ScanError("wrong_object", "the archive sent another object than was asked for")
        digest = hashlib.sha256(syntax.encode() + b"\0")
        while data := stream.read(BUFFER):
            digest.update(data)
    return digest.hexdigest()
