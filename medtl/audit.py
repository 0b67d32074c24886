"""An append-only log of what happened, each line chained to the one before by its hash.

One JSON object a line: sequence, UTC time, actor, action, subject, outcome, details, ``previous`` and ``hash``
(sha256 over the canonical line without ``hash``). Changing, dropping or swapping a line, even one byte of its
spelling, breaks the chain at a line that :func:`verify` names. An event is written whole or not at all, full disk or
not. Cutting lines off the end leaves a valid, shorter chain: keep the head hash that ``medtl audit verify`` prints
somewhere else and pass it back to find that out.
"""

from __future__ import annotations

import fcntl
import getpass
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medtl.artifacts import canonical, digest_of, storage_errors
from medtl.errors import StorageError, TamperedError

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True)
class Chain:
    """A verified log: how many events, and the hash of the last one."""

    events: int
    head: str


class AuditLog:
    """The audit trail of one workspace, ``<workspace>/audit.jsonl``."""

    def __init__(self, workspace: Path) -> None:
        self.path = workspace.absolute() / "audit.jsonl"

    def append(self, action: str, subject: str, outcome: str = "done", details: Mapping[str, Any] | None = None) -> str:
        """Add one event and put it on the disk before returning; give its hash.

        Args:
            action: what was done, for instance ``release.validated``.
            subject: digest or identifier of what it was done to; never a patient.
            outcome: ``done``, ``refused`` or ``failed``.
            details: JSON mapping without personal data.

        Raises:
            StorageError: the log cannot be written, or its last line is broken.
        """
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                sequence, previous = self._last(stream)
                event: dict[str, Any] = {
                    "sequence": sequence + 1,
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "actor": _actor(),
                    "action": action,
                    "subject": subject,
                    "outcome": outcome,
                    "details": json.loads(canonical(details or {})),
                    "previous": previous,
                }
                event["hash"] = digest_of(event)
                _write_whole(stream, _line(event) + b"\n")
                return str(event["hash"])

    def events(self) -> list[dict[str, Any]]:
        """Read all events, oldest first, after verifying the chain.

        Raises:
            TamperedError: see :meth:`verify`.
            StorageError: the log cannot be read.
        """
        lines = self._lines()
        events: list[dict[str, Any]] = []
        previous = GENESIS
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
                same = _line(event) + b"\n" == line  # nothing said twice, nothing respelled, nothing cut off
                claimed = event.pop("hash")
                chained = event["previous"] == previous and event["sequence"] == number
                good = same and chained and digest_of(event) == claimed
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                good, event, claimed = False, {}, ""
            if not good:
                raise TamperedError(
                    f"{self.path}: line {number} is not what was written there, or a line before it is missing. "
                    "Compare with a backup; nothing from this line on can be trusted."
                )
            event["hash"] = previous = claimed
            events.append(event)
        return events

    def verify(self, head: str | None = None) -> Chain:
        """Check the whole chain, and that it still holds the event with hash ``head``.

        Raises:
            TamperedError: a line was changed, dropped, swapped or added by hand (it is named), or ``head`` is gone.
        """
        events = self.events()
        if head not in (None, GENESIS) and all(event["hash"] != head for event in events):
            raise TamperedError(f"{self.path}: the event with hash {head} is gone: the log was cut off or replaced.")
        return Chain(len(events), events[-1]["hash"] if events else GENESIS)

    def _lines(self) -> list[bytes]:
        try:
            with self.path.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH)  # not in the middle of somebody's line
                return stream.readlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror}). Try again as its owner.") from error

    def _last(self, stream: io.FileIO) -> tuple[int, str]:
        end = stream.seek(0, os.SEEK_END)
        if end == 0:
            return 0, GENESIS
        stream.seek(max(0, end - (1 << 20)))
        tail = stream.read()
        try:
            if not tail.endswith(b"\n"):
                raise ValueError
            last = json.loads(tail.splitlines()[-1])
            return int(last["sequence"]), str(last["hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self.path}: the last line is broken; run `medtl audit verify` and keep a copy."
            ) from error


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _write_whole(stream: io.FileIO, line: bytes) -> None:
    end = stream.seek(0, os.SEEK_END)
    rest, written = line, False
    try:
        while rest:
            rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())
        written = True
    finally:
        if not written:  # half a line would end the log for good
            stream.truncate(end)


def _actor() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"
