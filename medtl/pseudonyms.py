"""Keyed names for people and files: what may be written down instead of what a header or a table said.

A pseudonym is an HMAC-SHA256 of the raw value under a secret key that lies outside the workspace (0600). The same key
gives the same pseudonym, so that a scan finds its row in the label table and a patient keeps one name; without the key
nobody can go back by trying names. Whoever needs the way back keeps the source folder: its names can be keyed again.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import unicodedata
from pathlib import Path, PurePosixPath

from medtl.artifacts import storage_errors
from medtl.errors import StorageError

log = logging.getLogger(__name__)
KEY_BYTES = 32
LONGEST_SHIFT_DAYS = 3650
SEVERAL = "several:"  # before a key of a file that several volumes came from: it finds none of them


class Pseudonymiser:
    """Give keyed names.

    Args:
        key: at least 16 secret bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise StorageError(
                "The pseudonym key is shorter than 16 bytes: its file is damaged. Bring it back from your backup; "
                "with a new key every patient gets another name."
            )
        self._key = key
        block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def __reduce__(self) -> tuple[type[Pseudonymiser], tuple[bytes]]:
        return type(self), (self._key,)

    def name(self, kind: str, raw: str) -> str:
        """Give the pseudonym of a raw value, ``<first letter of kind>-<16 hex digits>``."""
        return f"{kind[0]}-{self._digest(kind, raw).hex()[:16]}"

    def file(self, relative: str) -> str:
        """Give the pseudonym of a file's path below the source."""
        return self.name("file", _posix(relative))

    def file_keys(self, relative: str) -> tuple[str, str, str]:
        """Give the keys of a file's path, bare name and stem: what a label table may call it."""
        path = PurePosixPath(_posix(relative))
        return (
            "path:" + self.name("path", str(path)),
            "name:" + self.name("name", path.name),
            "stem:" + self.name("stem", path.name.split(".")[0]),
        )

    def uid_key(self, uid: str) -> str:
        """Give the key of a DICOM unique identifier."""
        return "uid:" + self.name("uid", uid)

    def uid(self, raw: str) -> str:
        """Give the DICOM unique identifier that stands for another, under the root 2.25. Source: PS3.5 B.2."""
        return f"2.25.{int.from_bytes(self._digest('dicom-uid', raw)[:16], 'big')}"

    def days(self, patient: str) -> int:
        """Give by how many days a patient's dates are moved back, 1 to 3650."""
        return 1 + int.from_bytes(self._digest("days", patient)[:8], "big") % LONGEST_SHIFT_DAYS

    def _digest(self, kind: str, raw: str) -> bytes:
        text = (raw if raw.isascii() else unicodedata.normalize("NFC", raw)).strip()
        inner, outer = self._inner.copy(), self._outer.copy()  # HMAC (RFC 2104), three times faster than hmac.digest
        inner.update(f"{kind}\0{text}".encode("utf-8", "surrogateescape"))
        outer.update(inner.digest())
        return outer.digest()

    @property
    def fingerprint(self) -> str:
        """Tell keys apart without telling them."""
        return hmac.new(self._key, b"fingerprint", hashlib.sha256).hexdigest()[:16]


def default_key_file() -> Path:
    """Give the key's place in the user's configuration folder."""
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "medtl" / "pseudonym.key"


def load_pseudonymiser(key_file: Path | None = None) -> Pseudonymiser:
    """Read the key, or make one on first use (0600, in a 0700 folder).

    Raises:
        StorageError: the key cannot be read or written.
    """
    path = key_file or default_key_file()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(handle, "wb") as stream:
                stream.write(secrets.token_bytes(KEY_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
            log.warning("made a new key of pseudonyms: '%s'. Back it up; another key gives other names", path)
        return Pseudonymiser(path.read_bytes())


def _posix(relative: str) -> str:
    path = unicodedata.normalize("NFC", relative).replace("\\", "/").strip()
    return path.removeprefix("./")
