"""Which series an archive has for us, and patience with one that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Protocol, TypeVar

from medtl.config import PacsConfig, QueryConfig
from medtl.errors import ConfigError, ScanError, StorageError
from medtl.scans.pacs.spool import UID_PATTERN

T = TypeVar("T")
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an archive. Its identifiers are raw: they are for the archive, and printed nowhere."""

    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    modality: str | None = None


class Unreachable(StorageError):
    """The archive did not answer; it may the next time."""


class Archive(Protocol):
    """What is asked of an archive, however it is reached. It raises :class:`Unreachable` for what may pass."""

    def ask(self, level: str, keys: Mapping[str, str]) -> list[dict[str, str]]:
        """Give what matches the keys at a level (STUDY, SERIES, IMAGE), by keyword."""

    def retrieve(self, series: Series, wanted: Mapping[str, str], whole: bool) -> dict[str, ScanError]:
        """Take objects (UID -> SOP class, or nothing known) into the spool; tell which did not come, and why."""


def find_series(archive: Archive, config: PacsConfig, today: date, stop: threading.Event) -> tuple[Series, ...]:
    """Ask for studies, then for their series, and keep those that the query names.

    Raises:
        StorageError: the archive does not answer, or refuses.
    """
    query = config.query
    if query is None:
        raise ConfigError("scans.pacs.query is not set: say which series to fetch.")
    found: dict[str, Series] = {}
    for study in patiently(lambda: _find_studies(archive, query, today), config, stop):
        keys = {"StudyInstanceUID": study}
        for row in patiently(lambda keys=keys: archive.ask("SERIES", keys), config, stop):  # type: ignore[misc]
            series, modality = row.get("SeriesInstanceUID", ""), row.get("Modality")
            # archives may leave out a key that they do not match on, and then answer with more than was asked for
            wanted = (not query.modality or modality in query.modality) and (
                not query.series_uid or series in query.series_uid
            )
            if wanted and UID_PATTERN.fullmatch(series):
                found.setdefault(series, Series(study, series, modality))
    return tuple(found.values())


def _find_studies(archive: Archive, query: QueryConfig, today: date) -> list[str]:
    keys: dict[str, str] = {}
    if query.study_date:
        keys["StudyDate"] = query.study_date
    if query.last_days is not None:
        keys["StudyDate"] = f"{today - timedelta(days=query.last_days):%Y%m%d}-"
    found: dict[str, None] = {}
    for study in query.study_uid or (None,):
        for modality in query.modality or (None,):
            more = {"StudyInstanceUID": study} if study else {}
            more |= {"ModalitiesInStudy": modality} if modality else {}
            for row in archive.ask("STUDY", keys | more):
                if UID_PATTERN.fullmatch(row.get("StudyInstanceUID", "")):
                    found.setdefault(row["StudyInstanceUID"])
    return list(found)


def patiently(action: Callable[[], T], config: PacsConfig, stop: threading.Event) -> T:
    """Do it, again and with longer pauses where the archive does not answer.

    Raises:
        StorageError: what the last attempt said.
    """
    for attempt in range(config.retries):
        try:
            return action()
        except Unreachable:
            pause(attempt + 1, stop)
    return action()


def pause(attempt: int, stop: threading.Event) -> None:
    """Wait before the next attempt, twice as long each time, and a minute at most.

    Raises:
        StorageError: it was told to stop.
    """
    if stop.wait(min(PAUSE_S * 2.0 ** (attempt - 1), LONGEST_PAUSE_S)):
        raise stopped()


def stopped() -> StorageError:
    """Make the error of a fetch that was told to stop."""
    return StorageError("The fetch was stopped. What came is kept: run the same command again for the rest.")
