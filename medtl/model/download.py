"""One file over HTTP, whole or not at all.

What arrives is kept in a ``.part`` file, and a broken download goes on from there. Nothing here opens what it brings:
the caller checks its sha256 first. Only the host that was named is asked: a redirect to another host, or from https to
http, is refused unless the caller allows the host; so a firewall needs one rule. Proxies are those of the environment
(``https_proxy``, ``no_proxy``), certificates those of ``SSL_CERT_FILE``.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medtl.artifacts import storage_errors
from medtl.errors import WeightsError
from medtl.progress import advance

_MB = 1_000_000
_PIECE = 1 << 18
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_FROM = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long, how often and how much."""

    attempts: int = 3  # in a row that bring nothing
    backoff_s: float = 1.0  # before the second attempt; doubled before each later one
    stalled_s: float = 30.0  # without a byte
    total_s: float = 3600.0
    most_bytes: int = 4 << 30


class _Broken(Exception):
    """It may work the next time."""


def base_address(host: str) -> str:
    """Give the address that file names are appended to; ``https`` unless ``http`` is written out.

    Raises:
        WeightsError: another scheme, no host, or a name and password in the address.
    """
    address = host if "://" in host else f"https://{host}"
    try:
        parts = urllib.parse.urlsplit(address)
        named = parts.hostname
    except ValueError:
        named = None
    if not named or parts.scheme not in ("http", "https"):
        raise WeightsError("A server of weights is named as https://HOST/FOLDER/ (http only where you write it out).")
    if parts.username or parts.password:
        raise WeightsError(
            f"The address of '{named}' holds a name or password, which would end up in logs: leave it out."
        )
    return address.rstrip("/") + "/"


def download(
    url: str,
    part: Path,
    patience: Patience | None = None,
    other_hosts: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Bring a file into ``part``, going on where an earlier attempt ended.

    Args:
        url: https or http.
        part: kept when the connection breaks.
        patience: how long, how often and how much.
        other_hosts: follow redirects to other hosts.
        wait: sleeps so many seconds between attempts.

    Raises:
        WeightsError: it is not there, too large, or did not come in time.
    """
    patience, failures = patience or Patience(), 0
    until = time.monotonic() + patience.total_s
    while True:
        before = _size(part)
        try:
            _attempt(url, part, patience, other_hosts, until)
            return
        except _Broken as error:
            failures = 1 if _size(part) > before else failures + 1
            pause = patience.backoff_s * 2 ** (failures - 1)
            if failures >= patience.attempts or time.monotonic() + pause > until:
                raise WeightsError(
                    f"{_host(url)} does not deliver it ({error}). Try again: it goes on from there"
                ) from error
            wait(pause)


def _attempt(url: str, part: Path, patience: Patience, other_hosts: bool, until: float) -> None:
    have = _size(part)
    headers = {"User-Agent": "medtl", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    opener = urllib.request.build_opener(_Redirects(other_hosts))
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - base_address allows http and https only
        with contextlib.closing(opener.open(request, timeout=patience.stalled_s)) as answer:
            _keep(answer, part, have, patience, until)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # nothing was left to bring
        if error.code == 416 and have:  # more than the file has: what was kept is of another
            part.unlink()
            raise _Broken("what was kept of it does not fit") from error
        if error.code in _AGAIN:
            raise _Broken(f"answer {error.code}") from error
        raise WeightsError(f"{_host(url)} does not have it (answer {error.code})") from error
    except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise WeightsError(
                f"the certificate of {_host(url)} is not trusted: name your hospital's with SSL_CERT_FILE"
            ) from error
        raise _Broken(str(cause)[:100] or type(cause).__name__) from error


def _keep(answer: Any, part: Path, have: int, patience: Patience, until: float) -> None:
    """Write what comes; say whether it was all."""
    if answer.headers.get_content_type() == "text/html":
        raise WeightsError("a web page came instead: a proxy or a login page answered")
    began = _FROM.fullmatch(answer.headers.get("Content-Range", "")) if answer.status == 206 else None
    if answer.status == 206 and (began is None or int(began[1]) != have):
        part.unlink(missing_ok=True)
        raise _Broken("it came in another piece than asked for")
    have = have if began else 0
    length = answer.headers.get("Content-Length", "")
    total = have + int(length) if length.isdigit() else None
    if (total or 0) > patience.most_bytes:
        raise WeightsError(f"it has {total} bytes; more than {patience.most_bytes} are not taken")
    with part.open("ab" if began else "wb") as stream:
        have = _copy(answer, stream, have, total, patience, until, part)
    if total is not None and have != total:
        raise _Broken("the connection ended early")


def _copy(
    answer: Any, stream: IO[bytes], have: int, total: int | None, patience: Patience, until: float, part: Path
) -> int:
    while piece := answer.read1(_PIECE):
        have += len(piece)
        if have > patience.most_bytes:
            part.unlink()
            raise WeightsError(f"it has no end: more than {patience.most_bytes} bytes are not taken")
        if time.monotonic() > until:
            raise WeightsError(
                f"it did not come within {patience.total_s:.0f} seconds. Try again: it goes on from there"
            )
        with storage_errors(part):  # a full disk is not the server's fault
            stream.write(piece)
        advance(f"{part.stem}, MB", have // _MB, max(total or have, have) // _MB)
    return have


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects on the same host, and to others only where that is allowed; never from https to http."""

    def __init__(self, other_hosts: bool) -> None:
        self._other_hosts = other_hosts

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if old.scheme != new.scheme or old.hostname != new.hostname:
            fp.close()
        if old.scheme == "https" and new.scheme != "https":
            raise WeightsError(f"{old.hostname} sends on from https to {new.scheme}, which is refused")
        if old.hostname != new.hostname and not self._other_hosts:
            raise WeightsError(
                f"{old.hostname} sends on to {new.hostname}, which was not named. If that is right: --other-hosts"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or "the server"


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
