"""One DICOM connection with bounds, whoever opened it: message length, time, memory, and objects to the spool.

Patients' data passes through pynetdicom's and urllib3's logs and pydicom's warnings: all of them are silent here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import queue
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydicom import Dataset
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ, DIMSEMessage
from pynetdicom.events import Event
from pynetdicom.fsm import StateMachine
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket

from medtl.errors import ScanError
from medtl.scans.pacs.spool import BUFFER, MAX_COMMAND, UID_PATTERN, Part, Spool, file_head

MAX_ANSWER = 16 << 20  # bytes of a message that is not an object, of one page of a DICOMweb answer
_MAX_WAITING = 8  # objects of one sender that wait for their answer; one is what the standard's default allows
_MAX_HANDSHAKE = 1 << 18  # bytes; an association request with 128 contexts has about 30 kB
_QUICK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux
_TALKERS = ("pynetdicom", "urllib3", "pydicom")
# What a sender is told. Source: DICOM PS3.4 Table B.2-1 and PS3.7 C.5.
_STATUS: Mapping[str, int] = {
    "disk_full": 0xA700,
    "wrong_object": 0xA900,
    "bad_uid": 0x0117,
    "too_large": 0xC000,
    "empty_object": 0xC000,
    "not_dicom": 0xC000,
    "cut_off": 0xC000,
}


@contextmanager
def unspoken() -> Iterator[None]:
    """Keep silent what the libraries would say: their logs and warnings hold identifiers."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


class IncomingObject(io.BytesIO):
    """The data set of one message: an object's goes to the disk, any other's stays in (bounded) memory."""

    def __init__(self, part: Callable[[], Part | None]) -> None:
        super().__init__()
        self.part: Part | None = None
        self.sop_uid = ""
        self._open, self._begun = part, False

    def write(self, data: Any, /) -> int:
        """Take the next piece.

        Raises:
            OverflowError: it has no end.
        """
        if not self._begun:
            self._begun, self.part = True, self._open()
        if self.part is None:
            if self.tell() + len(data) > MAX_ANSWER:
                raise OverflowError
            return super().write(data)
        self.part.write(data)
        # a refused object is read to its end, so that the others of the association can come; but not for ever
        if self.part.refusal is not None and self.part.size > max(2 * self.part.max_bytes, BUFFER):
            raise OverflowError
        return len(data)


class Receiving(DIMSEServiceProvider):
    """Messages of one association, objects streamed to the spool."""

    def __init__(self, assoc: Association, spool: Spool) -> None:
        super().__init__(assoc)
        self._spool = spool
        self._parts: list[Part] = []

    def get_msg(self, block: bool = False) -> Any:
        """Give the next message; wait as long as bytes come, an object may take longer than any timeout."""
        if not block:
            return super().get_msg()
        asked = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return self.msg_queue.get(timeout=0.25)
            patience = self.dimse_timeout or 0.0
            if not self.assoc.dul.is_alive() or time.monotonic() - max(asked, self._spool.heard) > patience:
                return None, None

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Take the next piece of a message; see the base class."""
        self._spool.heard = time.monotonic()
        try:
            if self.message is None:
                self.message = message = DIMSEMessage()
                message.data_set = IncomingObject(lambda: self._part(message))
            self._check_bounds(self.message)
            super().receive_primitive(primitive)
        except Exception:  # a hostile peer may break the decoder anywhere; here it costs its own association only
            data = self.message.data_set if self.message else None
            if isinstance(data, IncomingObject) and data.part is not None and data.part.refusal is not None:
                self._spool.refuse(data.part.refusal, data.sop_uid)  # it had no end
            self.drop()
            self.dul.event_queue.put("Evt19")  # invalid PDU: abort. Source: DICOM PS3.8 9.2.3

    def drop(self) -> None:
        """Delete what was received and cannot be acknowledged any more."""
        self.message = None
        for part in self._parts:
            part.discard()

    def _check_bounds(self, message: DIMSEMessage) -> None:
        if message.encoded_command_set.tell() > MAX_COMMAND:
            raise OverflowError
        if self.assoc.is_acceptor and self.msg_queue.qsize() > _MAX_WAITING:
            raise OverflowError

    def _part(self, message: DIMSEMessage) -> Part | None:
        if not isinstance(message, C_STORE_RQ):
            return None
        command, context = message.command_set, self.assoc._accepted_cx[message.context_id or 0]
        sop_uid, syntax = str(command.AffectedSOPInstanceUID), str(context.transfer_syntax[0])
        if not UID_PATTERN.fullmatch(sop_uid):
            sop_uid = "0"  # refused when it is complete; nothing of it is written under this name
        assert isinstance(message.data_set, IncomingObject)
        message.data_set.sop_uid = sop_uid
        part = self._spool.receive(file_head(str(context.abstract_syntax), sop_uid, syntax))
        part.mark(syntax)
        # one whose request is not valid is never asked for, and waits here for the end of the association
        self._parts = [one for one in self._parts if not one.closed] + [part]
        return part


class _Socket(AssociationSocket):
    """A connection whose messages have a longest length and a longest time."""

    longest: int
    timeout_s: float

    def _shutdown_socket(self) -> None:
        # the base class leaves a connection open that the other side has closed
        connection = self.socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def recv(self, nr_bytes: int) -> bytearray:
        if nr_bytes > self.longest:
            raise OSError("message too long")
        connection, data, got = self.socket, bytearray(nr_bytes), 0
        deadline = time.monotonic() + self.timeout_s
        with memoryview(data) as view:
            while got < nr_bytes and connection is not None:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                more = connection.recv_into(view[got:])
                if more == 0:
                    break
                got += more
        if connection is not None:
            connection.settimeout(self.timeout_s)  # for what is sent
            if _QUICK is not None:  # a sender that waits for TCP's acknowledgement waits 40 ms for each object
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.IPPROTO_TCP, _QUICK, 1)
        del data[got:]
        return data


class _Machine(StateMachine):
    """The protocol's states; what is not foreseen in one ends the association, not the thread with a shout."""

    def do_action(self, event: str) -> None:
        """Act on an event; see the base class."""
        dul = self.dul
        try:
            super().do_action(event)
        except Exception:  # InvalidEventError, and whatever a message out of place makes an action raise
            if dul.socket is not None:
                dul.socket._shutdown_socket()
            if isinstance(dul.assoc.dimse, Receiving):
                dul.assoc.dimse.drop()
            # as pynetdicom itself gives up when its reading fails
            dul.assoc.is_aborted, dul.assoc.is_established = True, False
            dul.assoc._kill = dul._kill_thread = True


def guard(
    assoc: Association, connection: AssociationSocket, spool: Spool | None, max_pdu: int, timeout_s: float
) -> None:
    """Put bounds on an association that has not received anything yet; its objects go to the spool."""
    if spool is not None:
        assoc.dimse = Receiving(assoc, spool)
    assoc.dul.state_machine = _Machine(assoc.dul)
    # pynetdicom makes its socket where it cannot be told of another class
    connection.__class__ = _Socket
    assert isinstance(connection, _Socket)
    connection.longest, connection.timeout_s = max(max_pdu + 1024, _MAX_HANDSHAKE), timeout_s


def take(event: Event, spool: Spool) -> Dataset | int:
    """Answer a C-STORE: success only for what is on the disk."""
    request = event.request
    data, sop_uid = getattr(request, "DataSet", None), str(getattr(request, "AffectedSOPInstanceUID", None) or "")
    try:
        if not isinstance(data, IncomingObject) or data.part is None:
            error = ScanError("empty_object", "it has no data")
            spool.refuse(error, sop_uid)
            raise error
        if str(getattr(request, "AffectedSOPClassUID", "")) != str(event.context.abstract_syntax):
            data.part.discard()
            error = ScanError("wrong_object", "it is of another SOP class than was agreed")
            spool.refuse(error, sop_uid)
            raise error
        spool.keep(data.part, sop_uid)
    except ScanError as error:
        answer = Dataset()
        answer.Status = _STATUS[error.code]
        answer.ErrorComment = error.reason[:64]
        return answer
    return 0x0000


def drop_unfinished(event: Event) -> None:
    """Delete what a connection that has ended left unfinished."""
    if isinstance(event.assoc.dimse, Receiving):
        event.assoc.dimse.drop()


def resolve(host: str, port: int, passive: bool = False) -> Any:
    """Give the numeric address of a host.

    Raises:
        OSError: it is not known.
    """
    flags = socket.AI_PASSIVE if passive else 0
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0][4]


def why(error: OSError) -> str:
    """Give the system's reason, without what it was about."""
    return error.strerror or type(error).__name__
