"""The port where others send scans with C-STORE."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import AssociationServer, RequestHandler

from medtl.config import ListenConfig
from medtl.errors import StorageError
from medtl.progress import advance
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.pacs.association import drop_unfinished, guard, resolve, take, unspoken, why
from medtl.scans.pacs.classes import COMPRESSED, STORAGE_CLASSES, UNCOMPRESSED, uids
from medtl.scans.pacs.spool import Received, Spool

log = logging.getLogger(__name__)
_MAX_UNNAMED = 32  # connections that have not said who they are
_HANDSHAKE_S = 10.0


class _Server(AssociationServer):
    """The listening port. It never waits for one who connects: not for a TLS handshake, not for a name."""

    def __init__(self, *args: Any, config: ListenConfig, spool: Spool, **kwargs: Any) -> None:
        self.config, self.spool = config, spool
        super().__init__(*args, **{**kwargs, "request_handler": _Caller})

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; TLS shakes hands when the connection's own thread first reads."""
        assert self.socket is not None
        client, address = self.socket.accept()
        client.settimeout(self.config.timeout_s)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.ssl_context:
            client = self.ssl_context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        return client, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Hang up where nobody is allowed, or where too many are connected."""
        limit = self.config.max_associations + _MAX_UNNAMED
        return bool(self.config.callers) and len(self.active_associations) < limit

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Go on after a connection that failed at once."""
        log.warning("a connection failed before it said who it is")

    def admit(self, event: Event) -> None:
        """Refuse a sender while as many as allowed are sending. Source: DICOM PS3.8 Table 9-21."""
        if sum(one.is_established for one in self.active_associations) >= self.config.max_associations:
            event.assoc.acse.send_reject(0x02, 0x03, 0x02)
            event.assoc.kill()  # returns when the answer is sent

    def stop(self) -> None:
        """Close the port and every connection; what was not acknowledged is not kept."""
        super(AssociationServer, self).shutdown()
        self.server_close()
        open_now = self.active_associations
        for one in open_now:
            connection = one.dul.socket.socket if one.dul.socket else None
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for one in open_now:
            one.join(timeout=5)
            one.dul.kill_dul()


class _Caller(RequestHandler):
    """One connection to the port."""

    def _create_association(self) -> Association:
        assoc = super()._create_association()
        assert isinstance(self.server, _Server)
        assert assoc.dul.socket is not None
        config = self.server.config
        guard(assoc, assoc.dul.socket, self.server.spool, config.max_pdu, config.timeout_s)
        return assoc


class Receiver:
    """An open port that takes objects into a spool, while the block lasts.

    Args:
        config: who may send what, and where.
        spool: where objects come to rest.

    Raises:
        StorageError: the port cannot be opened, or a certificate cannot be read.
    """

    def __init__(self, config: ListenConfig, spool: Spool) -> None:
        self.config, self.spool = config, spool
        self.address = (config.address, config.port)

    def __enter__(self) -> Receiver:
        config = self.config
        entity = AE(config.ae_title)
        entity.acse_timeout = min(config.timeout_s, _HANDSHAKE_S)
        entity.dimse_timeout = entity.network_timeout = config.timeout_s
        entity.maximum_pdu_size = config.max_pdu
        entity.maximum_associations = config.max_associations + _MAX_UNNAMED
        entity.require_called_aet = True
        entity.require_calling_aet = list(config.callers)
        entity.add_supported_context(Verification)
        for sop_class in uids(STORAGE_CLASSES):
            entity.add_supported_context(sop_class, uids(UNCOMPRESSED + COMPRESSED))
        self._stack = ExitStack()
        self._stack.enter_context(unspoken())
        try:
            self._server = _Server(
                entity,
                resolve(config.address, config.port, passive=True),
                config.ae_title,
                entity.supported_contexts,
                _server_tls(config),
                evt_handlers=[(evt.EVT_C_STORE, take, [self.spool]), (evt.EVT_CONN_CLOSE, drop_unfinished)],
                config=config,
                spool=self.spool,
            )
        except OSError as error:
            self._stack.close()
            raise StorageError(
                f"Port {config.port} of {config.address} cannot be opened ({error.strerror or type(error).__name__}). "
                "If another `medtl listen` runs, stop it, or choose another scans.pacs.listen.port."
            ) from error
        except StorageError:
            self._stack.close()
            raise
        self._server.bind(evt.EVT_REQUESTED, self._server.admit)
        self.address = self._server.server_address[:2]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            self._server.stop()
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Tell whether the port is still served."""
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Tell whether nobody is connected."""
        return not self._server.active_associations


def listen(
    config: ListenConfig,
    names: Pseudonymiser,
    folder: Path,
    stop: threading.Event,
    opened: Callable[[str, int], None] = lambda address, port: None,
) -> Received:
    """Receive objects into ``folder`` until told to stop.

    Args:
        names: gives the keyed names that files get.
        stop: see :func:`stopped_by_signals`.
        opened: called once with the address and port, when senders can connect.

    Raises:
        StorageError: the port cannot be opened, or the folder cannot be written.
    """
    spool = Spool(folder, names, config.max_object_mb, config.min_free_mb)
    if not config.callers:
        log.warning("scans.pacs.listen.callers is empty: everybody is refused")
    with Receiver(config, spool) as receiver:
        opened(*receiver.address)
        said = 0
        while not stop.wait(1.0):
            if not receiver.alive:
                raise StorageError(
                    "The port has closed by itself. Start `medtl listen` again; senders will send again."
                )
            now = spool.counts()
            if now.stored + now.known != said:
                said = now.stored + now.known
                advance("receiving", said, said)
    return spool.counts()


@contextmanager
def stopped_by_signals(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """Give an event that SIGTERM or SIGINT (or the signals named) set; only for a process's main thread."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in numbers or (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _server_tls(config: ListenConfig) -> ssl.SSLContext | None:
    if config.cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.cert_file, config.key_file)
        if config.ca_file is not None:
            context.load_verify_locations(config.ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise StorageError(
            f"A certificate or key of scans.pacs.listen cannot be read ({why(error)}). "
            "Check cert_file, key_file and ca_file: PEM, readable, and belonging together."
        ) from error
    return context
