"""A release as one file that another workspace takes in: a zip of its folder, the same bytes each time.

What goes in with it, so that a release speaks for itself: ``SHA256SUMS`` (``sha256sum -c`` checks it without medtl),
the bill of materials of the environment it was made in (CycloneDX), and its card.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from medtl.artifacts import MANIFEST, Store, file_digest, storage_errors, verify, write_bytes
from medtl.errors import StorageError, TamperedError
from medtl.records import Artifact

SUMS, SBOM, CARD = "SHA256SUMS", "sbom.cdx.json", "card.md"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can name
_LARGEST = 8 << 30  # bytes unpacked
_MOST_FILES = 200


def write_sums(folder: Path) -> None:
    """Write the sha256 of every file of a folder, in the form that ``sha256sum -c`` reads."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in names]
    write_bytes(folder / SUMS, "".join(lines).encode())


def bill_of_materials() -> dict[str, Any]:
    """List what is installed, with versions and licences. Source: CycloneDX 1.6, ecma-international.org, ECMA-424."""
    found: dict[str, dict[str, Any]] = {}
    for distribution in metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        if not name:
            continue  # a folder that somebody left half removed
        licence = distribution.metadata.json.get("license_expression")
        plain = name.lower().replace("_", "-")
        found[plain] = {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{plain}@{version}",
            **({"licenses": [{"expression": licence}]} if licence else {}),
        }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": [found[n] for n in sorted(found)],
    }


def pack(folder: Path, out: Path) -> str:
    """Write a verified release folder as a zip; give the sha256 of the file.

    Raises:
        TamperedError: the folder is not what was written.
        StorageError: the file is there already, or cannot be written.
    """
    verify(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    temporary = out.with_name(f".{out.name}.tmp")
    with storage_errors(out):
        if out.exists():
            raise StorageError(f"'{out}' is there already. Name another file.")
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as parcel:
                for name in names:
                    entry = zipfile.ZipInfo(name, _EPOCH)
                    entry.external_attr = 0o600 << 16
                    parcel.writestr(entry, (folder / name).read_bytes())
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    return file_digest(out)


def unpack(parcel: Path, store: Store) -> Artifact:
    """Take a packed release into a store, if every byte of it is what its manifest says.

    Raises:
        TamperedError: it is no packed release, or not as it was packed.
        StorageError: it cannot be read, or the workspace cannot be written.
    """
    try:
        with zipfile.ZipFile(parcel) as opened:
            files = dict(_files(opened, parcel))
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise StorageError(f"'{parcel}' is no zip that can be read ({type(error).__name__}).") from error
    try:
        manifest = json.loads(files.pop(MANIFEST))
        said, inputs, digest = dict(manifest["files"]), dict(manifest["inputs"]), str(manifest["digest"])
        kind = manifest["kind"]
    except (KeyError, ValueError, TypeError) as error:
        raise TamperedError(f"'{parcel}' is no packed release: its {MANIFEST} is missing or unreadable.") from error
    wrong = sorted(name for name in said.keys() | files.keys() if _sha256(files.get(name)) != said.get(name))
    if wrong or kind != "release":
        raise TamperedError(f"'{parcel}' is not as it was packed ({', '.join(wrong) or kind}). Fetch it again.")

    def build(folder: Path) -> None:
        for name, data in files.items():
            write_bytes(folder / name, data)

    artifact = store.make("release", inputs, build)
    if artifact.digest != digest:
        raise TamperedError(
            f"'{parcel}' does not hold what its {MANIFEST} was written for, or another is here already."
        )
    return artifact


def _files(opened: zipfile.ZipFile, parcel: Path) -> Iterator[tuple[str, bytes]]:
    entries = opened.infolist()
    if len(entries) > _MOST_FILES or sum(entry.file_size for entry in entries) > _LARGEST:
        raise TamperedError(f"'{parcel}' holds more than a release does.")
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise TamperedError(f"'{parcel}' holds a file twice.")
    for name in names:
        if PurePosixPath(name).name != name or name in ("", ".", ".."):  # a release has no folders
            raise TamperedError(f"'{parcel}' holds a path that leads elsewhere.")
        yield name, opened.read(name)


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
