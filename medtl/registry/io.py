"""The register of releases: one small JSON each, written once, pointing to an immutable artifact.

How a release stands is nowhere but on the audit trail (:mod:`medtl.registry.history`): a status that somebody writes
into a file changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medtl.artifacts import file_digest, read_record, storage_errors, verify, write_record
from medtl.audit import AuditLog, Event
from medtl.errors import MedtlError, StorageError, TamperedError
from medtl.records import Artifact, Release, Standing
from medtl.registry.history import standing

RELEASE = "release.json"
_SERVES: tuple[Standing, ...] = ("live", "approved", "validated")  # without leave; the first that there is


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
        self.trail = AuditLog(self.workspace)

    def entries(self) -> tuple[Entry, ...]:
        """List the releases as they stand now, oldest first; one that the trail does not know is a candidate.

        Raises:
            TamperedError: the audit trail was altered.
        """
        paths = list(self.folder.glob("r-*.json"))
        now: Mapping[str, Standing] = standing(self.trail.events()) if paths else {}
        found = (read_record(path, Entry) for path in paths)
        return tuple(sorted((_as_it_stands(entry, now) for entry in found), key=lambda entry: entry.order))

    def enter(self, release: Release, artifact: Artifact, details: Mapping[str, Any]) -> bool:
        """Enter a release and what the gate made of it; tell whether it is new.

        Args:
            details: for the audit trail: what was observed.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{release.release_id}.json"
        new = not path.exists()
        if not new and read_record(path, Entry).digest != artifact.digest:
            raise TamperedError(f"Another release is entered as {release.release_id} already. Find out which is right.")
        if new:
            order = 1 + max((read_record(other, Entry).order for other in self.folder.glob("r-*.json")), default=0)
            relative = artifact.path.relative_to(self.workspace).as_posix()
            write_record(path, Entry(release, relative, artifact.digest, order))
        files = {path.relative_to(self.workspace).as_posix(): file_digest(path)}
        said = {"name": release.name, "artifact": artifact.digest, "files": files, **details}
        outcome = "refused" if release.status == "refused" else "done"
        self.trail.once([Event(f"release.{release.status}", release.release_id, outcome, said)])
        return new

    def called(self, release_id: str) -> Entry:
        """Find one release by its identifier, or the beginning of it.

        Raises:
            MedtlError: there is none, or several begin so.
        """
        entries = list(self.entries())
        fitting = _called(entries, release_id)
        if not fitting:
            had = ", ".join(f"{e.release.release_id} ({e.release.status})" for e in entries) or "none"
            raise MedtlError(f"There is no release '{release_id}' in this workspace (found: {had}).")
        return fitting[0]

    def choose(self, name: str, release_id: str | None, candidates: bool) -> Entry:
        """Find the release to use: the one asked for, else the live one, else the newest approved or validated one.

        Args:
            name: of the config.
            release_id: a release, or the beginning of its identifier.
            candidates: also take a release that no gate has validated; a refused one only if asked for by identifier.

        Raises:
            MedtlError: there is none, or the beginning fits several; they are named.
        """
        entries = [entry for entry in self.entries() if entry.release.name == name]
        had = ", ".join(f"{e.release.release_id} ({e.release.status})" for e in entries) or "none"
        wanted = entries if release_id is None else _called(entries, release_id)
        groups: list[tuple[Standing, ...]] = [(state,) for state in _SERVES]
        if candidates:
            groups = [("live",), ("candidate", *_SERVES, *(("refused",) if release_id else ()))]
        for states in groups:
            usable = [entry for entry in wanted if entry.release.status in states]
            if usable:
                return usable[-1]
        raise MedtlError(
            f"There is no validated release of '{name}' here (found: {had}). Run `medtl run CONFIG` first; "
            "--allow-candidate uses one that no gate has validated; one that is retired is never used."
        )

    def open(self, entry: Entry) -> Path:
        """Give the folder of a release after checking every byte of it.

        Raises:
            TamperedError: it is not what was entered.
        """
        folder = self.workspace / entry.artifact
        if not folder.is_dir():
            raise StorageError(f"The files of release {entry.release.release_id} are gone from this workspace.")
        said = next(
            (
                event["details"].get("artifact")
                for event in self.trail.events()
                if event["subject"] == entry.release.release_id and "artifact" in event["details"]
            ),
            None,
        )
        if verify(folder) != entry.digest or said != entry.digest:
            raise TamperedError(f"Release {entry.release.release_id} is not what was entered in the register.")
        return folder


def _as_it_stands(entry: Entry, now: Mapping[str, Standing]) -> Entry:
    status = now.get(entry.release.release_id, "candidate")
    return replace(entry, release=replace(entry.release, status=status))


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
