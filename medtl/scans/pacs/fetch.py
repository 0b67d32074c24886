"""Bring what the query asks for from an archive into the spool."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

import requests

from medtl.config import PacsConfig
from medtl.errors import ConfigError, ScanError, StorageError
from medtl.progress import advance
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Exclusion
from medtl.scans.pacs.association import unspoken
from medtl.scans.pacs.classes import STORAGE_CLASSES, uids
from medtl.scans.pacs.dicomweb import WebArchive
from medtl.scans.pacs.dimse import DimseArchive
from medtl.scans.pacs.listen import Receiver
from medtl.scans.pacs.query import Archive, Series, Unreachable, find_series, patiently, pause, stopped
from medtl.scans.pacs.spool import UID_PATTERN, Spool

log = logging.getLogger(__name__)
_NOT_AGAIN = {"wrong_object", "bad_uid", "too_large", "empty_object", "not_dicom", "not_found"}


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What one fetch brought; the files lie in ``folder``."""

    folder: Path
    series: int
    received: int
    known: int  # were there before
    failed: tuple[Exclusion, ...] = ()


def find(config: PacsConfig, today: date | None = None) -> tuple[Series, ...]:
    """List the series of the archive that the query asks for.

    Args:
        today: what ``query.last_days`` counts from; default: this day.

    Raises:
        StorageError: the archive does not answer, or refuses.
        ConfigError: an environment variable that the configuration names is not set.
    """
    with ExitStack() as stack:
        stack.enter_context(unspoken())
        archive = _reach(config, None, stack)
        return find_series(archive, config, today or _today(), threading.Event())


def fetch(
    config: PacsConfig,
    names: Pseudonymiser,
    folder: Path,
    stop: threading.Event | None = None,
    today: date | None = None,
) -> FetchResult:
    """Bring every object that the query asks for into ``folder``; what is there already is not asked for again.

    Each series is tried ``retries`` times more, with longer and longer pauses, and only for what is missing. An object
    that does not come is an exclusion; the others come.

    Args:
        names: gives the keyed names that files get.
        stop: ends the fetch; what came stays.
        today: what ``query.last_days`` counts from; default: this day.

    Raises:
        StorageError: the archive does not answer or refuses, or the disk is full.
        ConfigError: an environment variable that the configuration names is not set.
    """
    stop = stop or threading.Event()
    spool = Spool(folder, names, config.max_object_mb, config.min_free_mb)
    failed: list[Exclusion] = []
    known = 0
    with ExitStack() as stack:
        stack.enter_context(unspoken())
        archive = _reach(config, spool, stack)
        series = find_series(archive, config, today or _today(), stop)
        for number, one in enumerate(series, 1):
            held, refused = fetch_series(archive, one, spool, config, stop)
            known += held
            failed += [Exclusion(spool.key(u), "scans", e.code, e.reason) for u, e in sorted(refused.items())]
            advance("fetching series", number, len(series))
    if failed:
        log.warning("%d objects of the archive did not come", len(failed))
    return FetchResult(spool.objects, len(series), spool.counts().stored, known, tuple(failed))


def _today() -> date:
    return datetime.now().astimezone().date()


def _reach(config: PacsConfig, spool: Spool | None, stack: ExitStack) -> Archive:
    if config.kind is None:
        raise ConfigError("scans.pacs.kind is not set: choose cget, cmove or dicomweb to fetch scans.")
    if config.kind == "dicomweb":
        return WebArchive(config, spool, stack.enter_context(requests.Session()))
    if config.kind == "cmove" and spool is not None and config.listen is not None:
        stack.enter_context(Receiver(config.listen, spool))
    return DimseArchive(config, spool)


def fetch_series(
    archive: Archive, series: Series, spool: Spool, config: PacsConfig, stop: threading.Event
) -> tuple[int, dict[str, ScanError]]:
    """Bring one series; give how many of its objects were there before, and which did not come."""
    keys = {"StudyInstanceUID": series.study_uid, "SeriesInstanceUID": series.series_uid}
    taken = uids(STORAGE_CLASSES)
    rows = patiently(lambda: archive.ask("IMAGE", keys), config, stop)
    listed = {row.get("SOPInstanceUID", ""): row.get("SOPClassUID", "") for row in rows}
    nameless = ScanError("bad_uid", "the archive lists an object whose UID is none")
    other = ScanError("other_kind", "not an image, a segmentation, a structure set or a report")
    refused = {one: nameless for one in listed if not UID_PATTERN.fullmatch(one)}
    refused |= {one: other for one, kind in listed.items() if kind and kind not in taken and one not in refused}
    missing = {one: kind for one, kind in listed.items() if one not in refused and not spool.holds(one)}
    known, whole = len(listed) - len(refused) - len(missing), len(missing) == len(listed)
    for attempt in range(config.retries + 1):
        if not missing:
            break
        if attempt:
            pause(attempt, stop)
        elif stop.is_set():
            raise stopped()
        try:
            problems = archive.retrieve(series, missing, whole=whole and attempt == 0)
        except Unreachable:
            if attempt == config.retries:
                raise
            problems = {}
        _stop_if_full(problems)
        missing = {one: kind for one, kind in missing.items() if not spool.holds(one)}
        refused |= {one: problems[one] for one in missing if one in problems}
        missing = {one: kind for one, kind in missing.items() if one not in refused or _may_pass(refused[one])}
    unsent = ScanError("not_sent", "the archive lists it and did not send it")
    return known, dict.fromkeys(missing, unsent) | {one: e for one, e in refused.items() if not spool.holds(one)}


def _may_pass(error: ScanError) -> bool:
    return error.code not in _NOT_AGAIN


def _stop_if_full(problems: Mapping[str, ScanError]) -> None:
    for problem in problems.values():
        if problem.code == "disk_full":
            raise StorageError(
                f"The fetch was stopped: {problem.reason}. What came is kept: free some space (or lower "
                "scans.pacs.min_free_mb), then run the same command again."
            )
