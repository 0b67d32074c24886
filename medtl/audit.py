"""An append-only log of what happened, each line chained to the one before by its hash, and signed if there is a key.

One JSON object a line: sequence, UTC time, actor, software, action, subject, outcome, details, ``previous``, ``key``
and ``hash`` (sha256 over the canonical line without ``hash`` and ``signature``). Changing, dropping or swapping a line,
even one byte of its spelling, breaks the chain at a line that :meth:`AuditLog.verify` names.

Beside the log lies its head: how many events there are, and the hash of the last. A log that was cut off no longer
holds it. Whoever can write both can still cut both: keep the head somewhere else too (``medtl audit anchor``), and sign
(``MEDTL_AUDIT_KEY``), so that nobody without the key can write a chain of their own.

An event is written whole or not at all, full disk or not. What a crash left of a line that nobody was told about is set
aside, and the next event says so.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import io
import json
import logging
import os
import pwd
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medtl import __version__
from medtl.artifacts import MANIFEST, Store, canonical, digest_of, file_digest, storage_errors, write_bytes
from medtl.errors import ConfigError, StorageError, TamperedError
from medtl.records import Artifact

log = logging.getLogger(__name__)
GENESIS = "0" * 64
KEY_VARIABLE = "MEDTL_AUDIT_KEY"
SWEPT = "result.swept"
GONE = ("result.discarded", SWEPT)  # actions that say that a result was deleted
Happened = dict[str, Any]
_Named = tuple[str, str, str]  # action, subject, folder


@dataclass(frozen=True, slots=True)
class Event:
    """What is about to be written.

    Args:
        action: what was done, for instance ``release.validated``.
        subject: digest or identifier of what it was done to; never a patient.
        outcome: ``done``, ``refused`` or ``failed``.
        details: JSON mapping without personal data.
    """

    action: str
    subject: str
    outcome: str = "done"
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """A verified log.

    Args:
        events: how many there are.
        head: hash of the last.
        signed: how many of them are signed.
        ahead: how many the kept head does not know: a crash came between them and it, or somebody's hand.
        torn: bytes of a line that ends without its end: a crash, or somebody's hand. The next event sets them aside.
    """

    events: int
    head: str
    signed: int = 0
    ahead: int = 0
    torn: int = 0


@dataclass
class _Held:
    """What a log holds, as far as it was read."""

    read: int = 0
    named: set[_Named] = field(default_factory=set)
    made: dict[str, tuple[str, str]] = field(default_factory=dict)  # folder -> digest and manifest of a result
    gone: dict[str, tuple[str, str]] = field(default_factory=dict)  # folder -> action and digest of one deleted
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256, as last said
    ahead: dict[str, str] = field(default_factory=dict)  # the same of what was about to be written then


_READING = threading.Lock()
_HELD: dict[Path, _Held] = {}  # only what was added since the last look is read again


class AuditLog:
    """The audit trail of one workspace, ``<workspace>/audit.jsonl``, with its head in ``audit.head``."""

    def __init__(self, workspace: Path) -> None:
        self.path = workspace.absolute() / "audit.jsonl"
        self.head_path = self.path.with_name("audit.head")

    def append(self, action: str, subject: str, outcome: str = "done", details: Mapping[str, Any] | None = None) -> str:
        """Add one event and put it on the disk before returning; give its hash. See :class:`Event`.

        Raises:
            StorageError: the log cannot be written.
            TamperedError: its end is not what was written last.
            ConfigError: the key to sign with cannot be read, or the log is signed and there is none.
        """
        return self.extend([Event(action, subject, outcome, details)])

    def extend(self, events: Sequence[Event]) -> str:
        """Add events, all or none of them, and put them on the disk before returning; give the last hash.

        Raises:
            StorageError, TamperedError, ConfigError: see :meth:`append`.
        """
        key = signing_key()
        with self._locked() as stream:
            last = self._last(stream)
            if last is not None and last.get("key") and key is None:
                raise ConfigError(f"{self.path} is signed. Name the file of the key in {KEY_VARIABLE}.")
            lines, happened = [], last
            for event in (*self._recovered(stream, last), *events):
                happened = _happened(event, happened, key)
                lines.append(_line(happened) + b"\n")
            if happened is None:
                return GENESIS
            _write_whole(stream, b"".join(lines))
            self._keep_head(happened)
            return str(happened["hash"])

    def events(self, public_keys: Sequence[Ed25519PublicKey] = ()) -> list[Happened]:
        """Read all events, oldest first, after verifying the chain, its signatures and its end.

        Args:
            public_keys: where given, every event from the first signed one on must be signed with one of them.

        Raises:
            TamperedError: see :meth:`verify`.
            StorageError: the log cannot be read.
        """
        return self._verified(public_keys)[0]

    def verify(
        self, head: str | None = None, anchors: Iterable[str] = (), public_keys: Sequence[Ed25519PublicKey] = ()
    ) -> Chain:
        """Check the whole chain, and that it still holds the events whose hashes were noted elsewhere.

        Raises:
            TamperedError: a line was changed, dropped, swapped, added by hand or cut off (it is named), a signature is
                missing or wrong, or ``head`` or an anchor is gone.
        """
        events, ahead, torn = self._verified(public_keys)
        there = {GENESIS, *(event["hash"] for event in events)}
        for noted in (*([head] if head else []), *anchors):
            if noted not in there:
                raise TamperedError(
                    f"{self.path}: the event with hash {noted} is gone: the log was cut off or replaced."
                )
        signed = sum(bool(event.get("key")) for event in events)
        return Chain(len(events), events[-1]["hash"] if events else GENESIS, signed, ahead, torn)

    def _verified(self, public_keys: Sequence[Ed25519PublicKey]) -> tuple[list[Happened], int, int]:
        lines, head = self._lines()
        torn = lines.pop() if len(lines) > head["events"] and not lines[-1].endswith(b"\n") else b""
        events: list[Happened] = []
        previous = GENESIS
        trusted, signed = [_public_text(key) for key in public_keys], False
        for number, line in enumerate(lines, 1):
            event = _read(line)
            chained = event is not None and (event["previous"], event["sequence"]) == (previous, number)
            if event is None or not chained or _hash_of(event) != event["hash"]:
                raise TamperedError(
                    f"{self.path}: line {number} is not what was written there, or a line before it is missing. "
                    "Compare with a backup; nothing from this line on can be trusted."
                )
            if event.get("key"):
                _check_signature(self.path, number, event, trusted)
            elif signed:
                raise TamperedError(f"{self.path}: line {number} is not signed, and those before it are.")
            signed = signed or bool(event.get("key"))
            previous = event["hash"]
            events.append(event)
        self._check_end(events, head)
        if trusted and not signed:
            raise TamperedError(f"{self.path}: no event is signed with a key that was given.")
        return events, len(events) - head["events"], len(torn)

    def once(self, events: Sequence[Event]) -> int:
        """Add those events that the log does not hold yet, by action, subject and folder; tell how many they were.

        Raises:
            StorageError, TamperedError, ConfigError: see :meth:`append`.
        """
        held = self._held().named
        new = [event for event in events if _named(event.action, event.subject, event.details) not in held]
        if new:
            self.extend(new)
        return len(new)

    def made(self, folder: str) -> tuple[str, str] | None:
        """Give the digest and the manifest's sha256 of the result that was made in a folder and not deleted."""
        return self._held().made.get(folder)

    def gone(self, folder: str) -> tuple[str, str] | None:
        """Give the action and the digest of the result that was deleted from a folder, and not made again since."""
        return self._held().gone.get(folder)

    def files(self) -> dict[str, frozenset[str]]:
        """Give each file that the log names, and the sha256 that it may have; '' where it may not be there.

        That is as it was entered last, and what it was about to become since.
        """
        held = self._held()
        names = held.files.keys() | held.ahead.keys()
        return {n: frozenset((held.files.get(n, ""), held.ahead.get(n, held.files.get(n, "")))) for n in names}

    def note_files(self, action: str, subject: str, paths: Iterable[Path]) -> None:
        """Add one event with the sha256 of files of the workspace that are not as the log said last.

        Raises:
            StorageError, TamperedError, ConfigError: see :meth:`append`.
        """
        root, known = self.path.parent, self._held().files
        with storage_errors(self.path):
            now = {path.absolute().relative_to(root).as_posix(): file_digest(path) for path in paths}
        changed = {name: sha256 for name, sha256 in now.items() if known.get(name) != sha256}
        if changed:
            self.append(action, subject, details={"files": changed})

    def note_ahead(
        self, action: str, subject: str, path: Path, data: bytes, details: Mapping[str, Any] | None = None
    ) -> None:
        """Add one event with the sha256 that a file of the workspace is about to have, before it is written.

        Once it is written :meth:`note_files` enters it. A crash between the two leaves a file that is told from one
        that somebody altered, and that :meth:`finish_files` enters. Without details nothing is added where the log
        says already that the file has these bytes.

        Raises:
            StorageError, TamperedError, ConfigError: see :meth:`append`.
        """
        name, digest = path.absolute().relative_to(self.path.parent).as_posix(), sha256(data).hexdigest()
        if details or self._held().files.get(name) != digest:
            self.append(action, subject, details={**(details or {}), "ahead": {name: digest}})

    def finish_files(self) -> int:
        """Enter the files that a crash kept from being entered once they were written whole, or removed; say how many.

        Raises:
            StorageError, TamperedError, ConfigError: see :meth:`append`.
        """
        held, root, finished = self._held(), self.path.parent, 0
        for name, sha256_ahead in sorted(held.ahead.items()):
            with storage_errors(root / name):
                there = file_digest(root / name) if (root / name).is_file() else ""
            if there == sha256_ahead != held.files.get(name, ""):
                self.append("file.finished", there or name, details={"files": {name: there}})
                finished += 1
        return finished

    def _held(self) -> _Held:
        with _READING:
            return self._read_on()

    def _read_on(self) -> _Held:
        held = _HELD.setdefault(self.path, _Held())
        try:
            with self.path.open("rb") as stream:
                if stream.seek(0, os.SEEK_END) < held.read:
                    held = _HELD[self.path] = _Held()
                stream.seek(held.read)
                data = stream.read()
        except FileNotFoundError:
            _HELD[self.path] = _Held()
            return _HELD[self.path]
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror}). Try again as its owner.") from error
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines(keepends=True):
            event = _read(line)
            if event is None:
                continue  # it is found by verify, which is asked for that
            details = event.get("details") or {}
            held.named.add(_named(event.get("action"), event.get("subject"), details))
            if str(event.get("action")).endswith(".made"):
                held.made[str(details.get("folder"))] = (str(event.get("subject")), str(details.get("manifest")))
                held.gone.pop(str(details.get("folder")), None)
            elif event.get("action") in GONE:
                held.made.pop(str(details.get("folder")), None)
                held.gone[str(details.get("folder"))] = (str(event.get("action")), str(event.get("subject")))
            if isinstance(details.get("files"), dict):
                held.files |= details["files"]
                held.ahead = {name: sha for name, sha in held.ahead.items() if name not in details["files"]}
            if isinstance(details.get("ahead"), dict):
                held.ahead |= details["ahead"]
        held.read += len(whole)
        return held

    @contextlib.contextmanager
    def _locked(self) -> Iterator[io.FileIO]:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                yield stream

    def _lines(self) -> tuple[list[bytes], Happened]:
        try:
            with self.path.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH)  # not in the middle of somebody's line
                return stream.readlines(), self._head()
        except FileNotFoundError:
            return [], self._head()
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror}). Try again as its owner.") from error

    def _head(self) -> Happened:
        try:
            head = json.loads(self.head_path.read_bytes())
            return {"events": int(head["events"]), "hash": str(head["hash"])}
        except FileNotFoundError:
            return {"events": 0, "hash": GENESIS}
        except OSError as error:
            raise StorageError(f"{self.head_path}: cannot be read ({error.strerror}). Try as its owner.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise TamperedError(f"{self.head_path}: is not what was written there. Compare with a backup.") from error

    def _keep_head(self, last: Happened) -> None:
        write_bytes(self.head_path, (json.dumps({"events": last["sequence"], "hash": last["hash"]}) + "\n").encode())

    def _check_end(self, events: Sequence[Happened], head: Happened) -> None:
        if len(events) < head["events"]:
            raise TamperedError(
                f"{self.path}: line {len(events) + 1} is missing: {head['events']} events were written and "
                f"{len(events)} are there. The log was cut off; compare with a backup."
            )
        if head["events"] and events[head["events"] - 1]["hash"] != head["hash"]:
            raise TamperedError(f"{self.path}: line {head['events']} is not the one that {self.head_path.name} names.")

    def _last(self, stream: io.FileIO) -> Happened | None:
        """Read the last whole event; it must be the one that the head names, or the first after it."""
        head = self._head()
        whole = [line for line in _tail(stream).splitlines(keepends=True) if line.endswith(b"\n")]
        last = _read(whole[-1]) if whole else None
        here = (last["sequence"], last["hash"]) if last else (0, GENESIS)
        unreadable = bool(whole) and last is None
        # a crash between a line and its head leaves events that the head does not know yet
        if unreadable or here[0] < head["events"] or (here[0] == head["events"] and here[1] != head["hash"]):
            raise TamperedError(
                f"{self.path}: its end is not what was written last. Keep a copy and run `medtl audit verify`."
            )
        return last

    def _recovered(self, stream: io.FileIO, last: Happened | None) -> list[Event]:
        """Say what a crash left: events without a head, and a piece of a line, which is kept beside the log."""
        end, sequence = stream.seek(0, os.SEEK_END), last["sequence"] if last else 0
        torn = _tail(stream).rpartition(b"\n")[2]
        if torn:
            write_bytes(self.path.with_name(f"audit.torn-{sequence + 1}"), torn)
            stream.truncate(end - len(torn))
        ahead = sequence - self._head()["events"]
        found = {"bytes": len(torn), "events": ahead}
        return [Event("log.recovered", sha256(torn).hexdigest(), details=found)] if torn or ahead else []


class AuditedStore(Store):
    """A store whose every result is on the audit trail, also one that a crash kept from being entered."""

    def make(self, kind: str, inputs: Mapping[str, Any], build: Callable[[Path], None]) -> Artifact:
        """Find a result, or build it once; see :meth:`medtl.artifacts.Store.make`.

        Raises:
            TamperedError, StorageError, ConfigError: also where the trail cannot be written.
        """
        artifact = super().make(kind, inputs, build)
        trail, folder = AuditLog(self.workspace), artifact.path.relative_to(self.workspace).as_posix()
        manifest = file_digest(artifact.path / MANIFEST)
        known, gone = trail.made(folder), trail.gone(folder)
        if gone is not None and gone[1] not in (artifact.digest, "altered"):
            log.warning(
                "%s was deleted, and what is made again is not the same (another version of a library?): what rests on "
                "it is made again too",
                folder,
            )
        if known == (artifact.digest, manifest):
            return artifact
        if known is not None and artifact.reused:
            raise TamperedError(
                f"'{artifact.path}' is not what the audit trail says was made there, though its files agree with one "
                "another. Find out who wrote it; if nothing is wrong: medtl audit discard, and run again."
            )
        details = {
            "folder": folder,
            "made_from": artifact.fingerprint,
            "manifest": manifest,
            "code": inputs.get("code"),
        }
        trail.append(f"{kind}.made", artifact.digest, details=details)
        return artifact


# ------------------------------------------------------------------------------------------------------------- keys


def signing_key() -> Ed25519PrivateKey | None:
    """Read the key that events are signed with, from the file that ``MEDTL_AUDIT_KEY`` names; None without one.

    Raises:
        ConfigError: the file is not an Ed25519 private key in PEM.
    """
    name = os.environ.get(KEY_VARIABLE)
    return _private_key(Path(name)) if name else None


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{KEY_VARIABLE}: {path} holds no key that can be read. Try medtl audit keygen.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{KEY_VARIABLE}: {path} is not an Ed25519 key. `medtl audit keygen FILE` makes one.")
    return key


def make_key(path: Path) -> str:
    """Write a new private key (0600) and its public half beside it (``.pub``); give the fingerprint.

    Raises:
        StorageError: the file is there already, or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with storage_errors(path):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise StorageError(f"{path}: is there already. Name another file; a key is never overwritten.") from error
        with os.fdopen(handle, "wb") as stream:
            stream.write(private)
    write_bytes(path.with_name(path.name + ".pub"), public)
    return fingerprint_of(key.public_key())


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read the public half of a key.

    Raises:
        ConfigError: the file is not an Ed25519 public key in PEM.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} holds no readable public key. Give the .pub file that keygen wrote.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is not an Ed25519 public key. Give the .pub file that keygen wrote.")
    return key


def fingerprint_of(key: Ed25519PublicKey) -> str:
    """Give the first 16 hex digits of the sha256 of a public key."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return sha256(raw).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ lines


def _happened(event: Event, last: Happened | None, key: Ed25519PrivateKey | None) -> Happened:
    happened: Happened = {
        "sequence": (last["sequence"] if last else 0) + 1,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "actor": _actor(),
        "software": f"medtl {__version__}",
        "action": event.action,
        "subject": event.subject,
        "outcome": event.outcome,
        "details": json.loads(canonical(event.details or {})),
        "previous": last["hash"] if last else GENESIS,
        "key": _public_text(key.public_key()) if key else None,
    }
    happened["hash"] = digest_of(happened)
    if key is not None:
        happened["signature"] = base64.b64encode(key.sign(happened["hash"].encode())).decode()
    return happened


def _named(action: object, subject: object, details: Mapping[str, Any] | None) -> _Named:
    return str(action), str(subject), str((details or {}).get("folder"))


def _hash_of(event: Happened) -> str:
    return digest_of({name: value for name, value in event.items() if name not in ("hash", "signature")})


def _read(line: bytes) -> Happened | None:
    """Read one line; None unless it is exactly what this module would have written."""
    try:
        event = json.loads(line, parse_constant=_no_constant)
        # nothing said twice, nothing respelled, nothing cut off
        good = _line(event) + b"\n" == line and isinstance(event["sequence"], int) and isinstance(event["hash"], str)
        good = good and isinstance(event["previous"], str) and ("signature" in event) == bool(event.get("key"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return event if good else None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _check_signature(path: Path, number: int, event: Happened, trusted: Sequence[str]) -> None:
    """Check an event's signature with the key that it names, and that this key is one of the trusted, if any are."""
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(event["key"], validate=True))
        key.verify(base64.b64decode(event["signature"], validate=True), event["hash"].encode())
    except (TypeError, ValueError, binascii.Error, InvalidSignature) as error:
        raise TamperedError(f"{path}: line {number} does not carry the signature that was written there.") from error
    if trusted and event["key"] not in trusted:
        raise TamperedError(f"{path}: line {number} is not signed with a key that was given.")


def _public_text(key: Ed25519PublicKey) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return base64.b64encode(raw).decode()


def _tail(stream: io.FileIO) -> bytes:
    """Read the end of a log, far enough back to hold its last whole line."""
    end, length = stream.seek(0, os.SEEK_END), 1 << 20
    while True:
        stream.seek(max(0, end - length))
        data = stream.read()
        if length >= end or data.count(b"\n") >= 2:
            return data
        length *= 2


def _write_whole(stream: io.FileIO, lines: bytes) -> None:
    end = stream.seek(0, os.SEEK_END)
    rest, written = lines, False
    try:
        while rest:
            rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())
        written = True
    finally:
        if not written:  # half a line would have to be set aside
            stream.truncate(end)


def _actor() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name  # not the environment's: anybody may set that
    except KeyError:
        return f"uid-{os.getuid()}"
