"""An archive reached with DICOMweb."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

import requests

from medtl.config import PacsConfig
from medtl.errors import ConfigError, ScanError, StorageError
from medtl.scans.pacs.association import MAX_ANSWER, why
from medtl.scans.pacs.query import Series, Unreachable
from medtl.scans.pacs.spool import BUFFER, MAX_COMMAND, Spool, digest_of_file

log = logging.getLogger(__name__)
_PAGE = 1000


class WebArchive:
    """An archive reached with QIDO-RS and WADO-RS. Source: DICOM PS3.18 10.4, 10.6.

    Objects are taken with plain requests, one each, and not with a client that would read and write them anew: they
    are spooled as they came.
    """

    _PATHS: Mapping[str, str] = {
        "STUDY": "studies",
        "SERIES": "studies/{StudyInstanceUID}/series",
        "IMAGE": "studies/{StudyInstanceUID}/series/{SeriesInstanceUID}/instances",
    }
    _TAGS: Mapping[str, str] = {
        "StudyInstanceUID": "0020000D",
        "SeriesInstanceUID": "0020000E",
        "Modality": "00080060",
        "SOPInstanceUID": "00080018",
        "SOPClassUID": "00080016",
    }
    _NAMES: Mapping[str, str] = {
        "STUDY": "StudyInstanceUID",
        "SERIES": "SeriesInstanceUID",
        "IMAGE": "SOPInstanceUID",
    }

    def __init__(self, config: PacsConfig, spool: Spool | None, session: requests.Session) -> None:
        self.config, self.spool, self.session = config, spool, session
        self._silent = 0
        session.headers["Accept-Encoding"] = "identity"
        session.max_redirects = 3
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=config.workers)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        if config.ca_file is not None:
            session.verify = str(config.ca_file)
            session.trust_env = False  # or REQUESTS_CA_BUNDLE would be preferred to what the configuration says
        if config.cert_file is not None:
            session.cert = (str(config.cert_file), str(config.key_file))
        if config.token_env:
            session.auth = _Bearer(_secret(config.token_env))
        elif config.username_env and config.password_env:
            session.auth = (_secret(config.username_env), _secret(config.password_env))
        if session.auth and urlsplit(str(config.url)).scheme == "http":
            log.warning("scans.pacs.url is not https: the network can read the password")

    def ask(self, level: str, keys: Mapping[str, str]) -> list[dict[str, str]]:
        """Give what matches the keys; see :class:`~medtl.scans.pacs.query.Archive`."""
        path = self._PATHS[level].format(**keys)
        params = {name: value for name, value in keys.items() if "{" + name + "}" not in self._PATHS[level]}
        found: dict[str, dict[str, str]] = {}
        offset = 0
        while True:
            page = self._page(path, params | {"limit": str(_PAGE), "offset": str(offset)})
            rows = [{name: _value(row, tag) for name, tag in self._TAGS.items()} for row in page]
            fresh = [row for row in rows if row[self._NAMES[level]] not in found]
            found |= {row[self._NAMES[level]]: row for row in fresh}
            offset += len(page)
            if not fresh:  # the end, or a server that does not know offsets
                return list(found.values())

    def retrieve(self, series: Series, wanted: Mapping[str, str], whole: bool) -> dict[str, ScanError]:
        """Take objects into the spool; see :class:`~medtl.scans.pacs.query.Archive`."""
        self._silent = 0
        with ThreadPoolExecutor(self.config.workers) as pool:
            answers = list(pool.map(lambda sop_uid: self._take(series, sop_uid), wanted))
        problems = {sop_uid: error for sop_uid, error in zip(wanted, answers, strict=True) if error is not None}
        if problems and len(problems) == len(wanted) and {e.code for e in problems.values()} == {"connection"}:
            raise Unreachable(f"{self._where} does not answer. Check scans.pacs.url and the network.")
        return problems

    def _take(self, series: Series, sop_uid: str) -> ScanError | None:
        """Take one object into the spool; give the reason where it does not come."""
        assert self.spool is not None
        if self._silent >= 2 * self.config.workers:  # so many in a row: the others would wait for nothing
            return ScanError("connection", "the archive did not answer")
        path = f"studies/{series.study_uid}/series/{series.series_uid}/instances/{sop_uid}"  # all matched UID_PATTERN
        part = self.spool.receive()
        try:
            accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
            with self._get(path, accept, {}) as response, _connected(self._where):
                for piece in object_of(response):
                    part.write(piece)
                    if part.refusal is not None:
                        break
            self._silent = 0
            self.spool.keep(part, sop_uid, digest_of_file(part, sop_uid))
        except Unreachable:
            self._silent += 1
            return ScanError("connection", "the archive did not answer, or the connection ended")
        except ScanError as error:
            return error
        finally:
            part.discard()
        return None

    def _page(self, path: str, params: Mapping[str, str]) -> list[Any]:
        with self._get(path, "application/dicom+json", params) as response, _connected(self._where):
            if response.status_code == 204:
                return []
            text = bytearray()
            for piece in response.iter_content(BUFFER):
                text += piece
                if len(text) > MAX_ANSWER:
                    raise StorageError(f"{self._where} answers with too much. Narrow scans.pacs.query.")
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StorageError(
                f"{self._where} answers with something that is not DICOM JSON. Check scans.pacs.url: the root of "
                "DICOMweb, for instance https://pacs.example/dicom-web"
            ) from error
        return rows if isinstance(rows, list) else [rows]

    def _get(self, path: str, accept: str, params: Mapping[str, str]) -> requests.Response:
        with _connected(self._where):
            response = self.session.get(
                f"{str(self.config.url).rstrip('/')}/{path}",
                params=dict(params),
                headers={"Accept": accept},
                timeout=self.config.timeout_s,
                stream=True,
            )
        code = response.status_code
        if code in (200, 204):
            return response
        response.close()
        if code in (401, 403):
            raise StorageError(
                f"{self._where} refuses this user (HTTP {code}). Check the variables that scans.pacs.username_env and "
                "password_env, or token_env, name."
            )
        if not params:  # one object: its trouble is its own
            known = code in (400, 404, 410)
            raise ScanError("not_found" if known else "not_sent", f"the archive does not send it (HTTP {code})")
        if code in (408, 429) or code >= 500:
            raise Unreachable(f"{self._where} cannot answer now (HTTP {code}). Try again later.")
        raise StorageError(f"{self._where} refuses the query (HTTP {code}). Check scans.pacs.url.")

    @property
    def _where(self) -> str:
        return f"The archive at {urlsplit(str(self.config.url)).netloc}"


class _Bearer(requests.auth.AuthBase):
    """A token in place of a password; a redirect to another host does not take it along."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _secret(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"The environment variable {name}, which scans.pacs names, is not set.")
    return value


@contextmanager
def _connected(where: str) -> Iterator[None]:
    """Translate what the HTTP library raises; its own texts hold addresses with identifiers in them."""
    try:
        yield
    except requests.exceptions.SSLError:
        raise StorageError(
            f"{where} shows a certificate that is not trusted, or wants one. Name its authority: scans.pacs.ca_file"
        ) from None
    except requests.exceptions.RequestException as error:
        raise Unreachable(f"{where} does not answer ({type(error).__name__}). Check scans.pacs.url.") from None
    except OSError as error:  # a certificate file that is not there
        raise StorageError(f"{where} cannot be asked ({why(error)}). Check the files that scans.pacs names.") from None


def _value(row: Any, tag: str) -> str:
    """Give the first value of an attribute in DICOM JSON. Source: DICOM PS3.18 F.2."""
    try:
        return str(row[tag]["Value"][0])
    except (KeyError, IndexError, TypeError):
        return ""


def object_of(response: requests.Response) -> Iterator[bytes]:
    """Give the bytes of the one object in an answer, alone or in an envelope of parts. Source: RFC 2387, RFC 2046 5.1.

    Raises:
        ScanError: ``not_dicom`` or ``cut_off``.
    """
    kind = Message()
    kind["content-type"] = response.headers.get("Content-Type", "")
    chunks: Iterator[bytes] = response.iter_content(BUFFER)
    if kind.get_content_maintype() != "multipart":
        yield from chunks
        return
    named = kind.get_param("boundary")
    if not isinstance(named, str) or not named:
        raise ScanError("not_dicom", "the archive's answer has parts, and does not say where they begin")
    boundary = b"--" + named.encode()
    waiting, begun = b"", False
    for chunk in chunks:
        waiting += chunk
        if not begun:
            first = waiting.find(boundary)
            start = waiting.find(b"\r\n\r\n", first) if first >= 0 else -1
            if start < 0:
                if len(waiting) > MAX_COMMAND:
                    break
                continue
            waiting, begun = waiting[start + 4 :], True
        end = waiting.find(b"\r\n" + boundary)
        if end >= 0:
            yield waiting[:end]
            return
        tail = len(boundary) + 1
        yield waiting[:-tail]
        waiting = waiting[-tail:]
    raise ScanError("cut_off" if begun else "not_dicom", "the archive's answer has no whole object in it")
