"""An archive reached with C-FIND, and C-GET or C-MOVE."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydicom import Dataset, uid
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
from pynetdicom.transport import AddressInformation, AssociationSocket

from medtl.config import PacsConfig
from medtl.errors import ScanError, StorageError
from medtl.scans.pacs.association import drop_unfinished, guard, resolve, take, why
from medtl.scans.pacs.classes import COMPRESSED, STORAGE_CLASSES, UNCOMPRESSED, uids
from medtl.scans.pacs.query import Series, Unreachable
from medtl.scans.pacs.spool import BUFFER, Spool


class _Entity(AE):
    """The side that calls an archive."""

    def __init__(self, config: PacsConfig, spool: Spool | None) -> None:
        super().__init__(config.calling_ae)
        self.acse_timeout = self.dimse_timeout = self.network_timeout = self.connection_timeout = config.timeout_s
        self._spool, self._timeout_s = spool, config.timeout_s

    def _create_socket(self, assoc: Association, address: AddressInformation, tls_args: Any) -> AssociationSocket:
        connection = super()._create_socket(assoc, address, tls_args)
        guard(assoc, connection, self._spool, BUFFER, self._timeout_s)
        return connection


class DimseArchive:
    """An archive reached with C-FIND, and C-GET or C-MOVE. Source: DICOM PS3.4 C.4."""

    _RETURNED: Mapping[str, tuple[str, ...]] = {
        "STUDY": ("StudyInstanceUID",),
        "SERIES": ("SeriesInstanceUID", "Modality"),
        "IMAGE": ("SOPInstanceUID", "SOPClassUID"),
    }

    def __init__(self, config: PacsConfig, spool: Spool | None) -> None:
        self.config, self.spool = config, spool
        self._tls = _client_tls(config) if config.tls else None

    def ask(self, level: str, keys: Mapping[str, str]) -> list[dict[str, str]]:
        """Give what matches the keys; see :class:`~medtl.scans.pacs.query.Archive`."""
        model = StudyRootQueryRetrieveInformationModelFind
        asked = _identifier(level, dict.fromkeys(self._RETURNED[level], "") | dict(keys))
        rows = []
        with self._associate([build_context(model)]) as assoc:
            for answer, identifier in assoc.send_c_find(asked, model):
                status = answer.get("Status")
                if status in (0xFF00, 0xFF01):
                    rows.append({} if identifier is None else _row(identifier, self._RETURNED[level]))
                elif status != 0x0000:
                    raise self._refusal("query", status)
        return rows

    def retrieve(self, series: Series, wanted: Mapping[str, str], whole: bool) -> dict[str, ScanError]:
        """Take objects into the spool; see :class:`~medtl.scans.pacs.query.Archive`."""
        assert self.spool is not None
        refusals: dict[str, ScanError] = {}
        self.spool.refusals = refusals
        one_series = {"StudyInstanceUID": series.study_uid, "SeriesInstanceUID": series.series_uid}
        requests_ = [("SERIES", one_series)] if whole else [
            ("IMAGE", one_series | {"SOPInstanceUID": sop_uid}) for sop_uid in wanted
        ]  # fmt: skip
        status = None
        with self._associate(*self._contexts(wanted.values())) as assoc:
            for level, keys in requests_:
                status = self._send(assoc, _identifier(level, keys))
        if status is not None and status & 0xF000 in (0xA000, 0xC000) and self.spool.counts().stored == 0:
            # not one object since the start: that is not the fault of one series
            raise (
                self._unknown_destination(status) if self.config.kind == "cmove" else self._refusal("retrieval", status)
            )
        missing = [sop_uid for sop_uid in wanted if not self.spool.holds(sop_uid)]
        unsent = ScanError("not_sent", f"the archive did not send it (status 0x{status or 0:04X})")
        return {sop_uid: refusals.get(self.spool.key(sop_uid), unsent) for sop_uid in missing}

    def _send(self, assoc: Association, identifier: Dataset) -> int:
        """Ask for objects and wait until they have come; give the archive's last word."""
        if self.config.kind == "cmove":
            assert self.config.listen is not None
            answers = assoc.send_c_move(
                identifier, self.config.listen.ae_title, StudyRootQueryRetrieveInformationModelMove
            )
        else:
            answers = assoc.send_c_get(identifier, StudyRootQueryRetrieveInformationModelGet)
        status = None
        for answer, _ in answers:
            status = answer.get("Status")
        if status == 0xA801:
            raise self._unknown_destination(status)
        if status is None or status in (0xFE00, 0xA701, 0xA702):
            raise self._refusal("retrieval", status)
        return int(status)  # whatever else it says, what counts is what has come

    def _contexts(self, sop_classes: Iterable[str]) -> tuple[list[PresentationContext], list[Any]]:
        if self.config.kind == "cmove":
            return [build_context(StudyRootQueryRetrieveInformationModelMove)], []
        allowed = uids(STORAGE_CLASSES)
        kinds: list[str | uid.UID] = sorted({uid.UID(one) for one in sop_classes if one in allowed})
        first = [build_context(StudyRootQueryRetrieveInformationModelGet)]
        plain, packed = uids(UNCOMPRESSED[:2]), uids(COMPRESSED)
        # one context per compressed syntax, so that an object can come as it is stored; an association has 128 at most
        if not kinds or len(kinds) * (1 + len(packed)) > 127:
            kinds, packed = allowed, []
        syntaxes = [plain, *([one] for one in packed)]
        contexts = [build_context(kind, syntax) for kind in kinds for syntax in syntaxes]
        return first + contexts, [build_role(kind, scp_role=True) for kind in kinds]

    @contextmanager
    def _associate(self, contexts: list[PresentationContext], roles: Sequence[Any] = ()) -> Iterator[Association]:
        config = self.config
        handlers: list[Any] = [(evt.EVT_CONN_CLOSE, drop_unfinished)]
        if self.spool is not None:
            handlers.append((evt.EVT_C_STORE, take, [self.spool]))
        try:
            address = resolve(str(config.host), config.port)
        except OSError as error:
            raise Unreachable(f"{self._where} cannot be found ({why(error)}). Check scans.pacs.host.") from error
        assoc = _Entity(config, self.spool).associate(
            address[0],
            config.port,
            contexts,
            ae_title=str(config.called_ae),
            max_pdu=BUFFER,
            ext_neg=list(roles),
            evt_handlers=handlers,
            tls_args=(self._tls, str(config.host)) if self._tls else None,
        )
        if not assoc.is_established:
            raise self._rejection(assoc)
        try:
            yield assoc
        finally:
            if assoc.is_established:
                assoc.release()

    @property
    def _where(self) -> str:
        return f"The archive '{self.config.called_ae}' at {self.config.host}:{self.config.port}"

    def _rejection(self, assoc: Association) -> StorageError:
        said = assoc.acceptor.primitive
        if not assoc.is_rejected or said is None:
            tls = " and whether both sides use TLS, with certificates that they trust" if self.config.tls else ""
            return Unreachable(f"{self._where} cannot be reached. Check scans.pacs.host and port, the network{tls}.")
        if said.result == 0x02:
            return Unreachable(f"{self._where} is too busy. Try again later.")
        return StorageError(
            f"{self._where} refuses '{self.config.calling_ae}'. Check scans.pacs.called_ae, and have "
            "scans.pacs.calling_ae entered at the archive."
        )

    def _unknown_destination(self, status: int) -> StorageError:
        assert self.config.listen is not None
        return StorageError(
            f"{self._where} refuses to send (status 0x{status:04X}). Have '{self.config.listen.ae_title}' "
            "(scans.pacs.listen.ae_title) entered there as a destination, with this machine's address and port."
        )

    def _refusal(self, what: str, status: int | None) -> StorageError:
        if status is None:
            return Unreachable(f"{self._where} ended the connection during a {what}. Try again later.")
        if status & 0xFF00 == 0xA700:
            return Unreachable(f"{self._where} has no resources for the {what} (status 0x{status:04X}).")
        return StorageError(
            f"{self._where} refuses the {what} (status 0x{status:04X}). Ask its administrator what "
            f"'{self.config.calling_ae}' may do there."
        )


def _identifier(level: str, keys: Mapping[str, str]) -> Dataset:
    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(asked, keyword, value)
    return asked


def _row(identifier: Dataset, keywords: Iterable[str]) -> dict[str, str]:
    try:
        return {keyword: str(identifier.get(keyword) or "") for keyword in keywords}
    except (ValueError, TypeError, NotImplementedError):  # what pydicom says of a value it cannot read
        return {}


def _client_tls(config: PacsConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.cert_file is not None:
            context.load_cert_chain(config.cert_file, config.key_file)
    except OSError as error:
        raise StorageError(
            f"A certificate or key of scans.pacs cannot be read ({why(error)}). "
            "Check ca_file, cert_file and key_file: PEM, readable, and belonging together."
        ) from error
    return context
