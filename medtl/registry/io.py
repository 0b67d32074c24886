"""The register of releases: one small JSON each, pointing to an immutable artifact.

The register says what a release is called *now*; the audit log says what it was called when, and by whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medtl.artifacts import read_record, storage_errors, verify, write_record
from medtl.errors import MedtlError, StorageError, TamperedError
from medtl.records import Artifact, Release

RELEASE = "release.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the register."""

    release: Release
    artifact: str  # folder, relative to the workspace
    digest: str
    order: int  # 1 for the first release of the workspace


class Register:
    """The releases of one workspace, under ``<workspace>/registry``."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace.absolute()
        self.folder = self.workspace / "registry"

    def entries(self) -> tuple[Entry, ...]:
        """List the releases, oldest first."""
        found = (read_record(path, Entry) for path in self.folder.glob("r-*.json"))
        return tuple(sorted(found, key=lambda entry: entry.order))

    def enter(self, release: Release, artifact: Artifact) -> bool:
        """Enter a release; tell whether it, or its status, is new."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{release.release_id}.json"
        entries = self.entries()
        known = next((entry for entry in entries if entry.release.release_id == release.release_id), None)
        if known is not None and known.release.status == release.status:
            return False
        order = known.order if known else 1 + max((entry.order for entry in entries), default=0)
        relative = artifact.path.relative_to(self.workspace).as_posix()
        write_record(path, Entry(release, relative, artifact.digest, order))
        return True

    def choose(self, name: str, release_id: str | None, candidates: bool) -> Entry:
        """Find the release to use: the one asked for, or the newest validated one of this name.

        Args:
            name: of the config.
            release_id: a release, or the beginning of its identifier.
            candidates: also take a release that no gate has validated; a refused one only if asked for by identifier.

        Raises:
            MedtlError: there is none, or the beginning fits several; they are named.
        """
        entries = [entry for entry in self.entries() if entry.release.name == name]
        if release_id is not None:
            entries = _called(entries, release_id)
            allowed = {"validated", "candidate", "refused"} if candidates else {"validated"}
        else:
            allowed = {"validated", "candidate"} if candidates else {"validated"}
        usable = [entry for entry in entries if entry.release.status in allowed]
        if not usable:
            had = ", ".join(f"{e.release.release_id} ({e.release.status})" for e in entries) or "none"
            raise MedtlError(
                f"There is no validated release of '{name}' here (found: {had}). Run `medtl run CONFIG` first; "
                "--allow-candidate uses one that no gate has validated."
            )
        return usable[-1]

    def open(self, entry: Entry) -> Path:
        """Give the folder of a release after checking every byte of it.

        Raises:
            TamperedError: it is not what was entered.
        """
        folder = self.workspace / entry.artifact
        if not folder.is_dir():
            raise StorageError(f"The files of release {entry.release.release_id} are gone from this workspace.")
        if verify(folder) != entry.digest:
            raise TamperedError(f"Release {entry.release.release_id} is not what was entered in the register.")
        return folder


def _called(entries: list[Entry], release_id: str) -> list[Entry]:
    """Find the entry of an identifier, or the one that begins with it.

    Raises:
        MedtlError: several begin with it.
    """
    fitting = [entry for entry in entries if entry.release.release_id.startswith(release_id)]
    exact = [entry for entry in fitting if entry.release.release_id == release_id]
    if len(fitting) > 1 and not exact:
        had = ", ".join(f"{entry.release.release_id} ({entry.release.status})" for entry in fitting)
        raise MedtlError(f"'{release_id}' fits several releases: {had}. Give more of the identifier.")
    return exact or fitting
