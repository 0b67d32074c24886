"""What happened in a period, for whoever answers for it: read off the verified audit trail. Pure.

::

    events ─▶ facts_of(events, start, end) ─▶ Period ─▶ page
      └─▶ (monitoring) Drift ─┘
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from medtl.records import Drift, Shift
from medtl.report.page import sealed
from medtl.report.tables import Table
from medtl.report.words import DASH, compact, number, p_value

Happened = Mapping[str, Any]
Rows = tuple[tuple[str, ...], ...]
_CHANGES = {
    "release.candidate": "candidate", "release.refused": "refused by its gate", "release.validated": "validated",
    "release.approved": "approved", "release.live": "live", "release.replaced": "replaced",
    "release.rolled_back": "rolled back", "release.retired": "retired",
}  # fmt: skip
_INCIDENTS = {
    "run.failed": "run failed or was stopped",
    "log.recovered": "the trail itself was cut by a crash and recovered",
    "file.finished": "a crash had kept a file from being entered; it was as announced",
    "trail.not_anchored": "the head of the trail could not be kept elsewhere",
    "split.leak_allowed": "a split that leaks was used, because the config allows it",
    "release.unvalidated": "a release that no gate has validated was used, because somebody asked for it",
    "scan.readmitted": "a person took a scan that a check had refused",
    "result.discarded": "a person deleted a result",
    "release.rolled_back": "a live release was rolled back",
}
_STEPS = {
    "scans.made": "ingests", "cohort.made": "cohorts", "split.made": "splits", "checkpoint.made": "trainings",
    "evaluation.made": "evaluations", "release.applied": "uses of a release",
    "scans.fetched": "fetches from an archive", "result.swept": "unused copies swept",
    "unfinished.swept": "given-up trainings swept",
}  # fmt: skip
_CLEAN: Mapping[Any, str] = {True: "yes", False: "no: leaks were allowed", None: "not recorded"}
_USED = ("Release", "Uses", "Scans", "Left out", "Share unlike training", "Promised at most")
_SHIFTED = ("Release", "Question", "Scans", "Stability index", "By chance alone", "p")


@dataclass(frozen=True, slots=True)
class Period:
    """Everything that the page says. Times are UTC."""

    start: datetime
    end: datetime  # the first moment after it
    head: str
    counts: Mapping[str, int]
    runs: tuple[tuple[str, ...], ...]
    incidents: tuple[tuple[str, ...], ...]
    excluded: Mapping[str, int]
    openings: tuple[tuple[str, ...], ...]
    releases: tuple[tuple[str, ...], ...]
    faults: tuple[tuple[str, str, str], ...] = field(default=())
    drifts: tuple[Drift, ...] = ()


def facts_of(
    events: Sequence[Happened],
    start: datetime,
    end: datetime,
    head: str,
    faults: Sequence[tuple[str, str, str]],
    drifts: Sequence[Drift] = (),
) -> Period:
    """Read a period off a verified trail.

    Args:
        events: all of them, oldest first.
        start, end: a time counts if it is not before the one and before the other.
        head: hash of the last event of the trail.
        faults: what is not as the trail says, today: what, where, why.
        drifts: of every release that was used in the period.
    """
    here = [event for event in events if start <= datetime.fromisoformat(event["time"]) < end]
    runs, interrupted = _runs(here, events)
    incidents = tuple(sorted((*_incidents(here), *interrupted)))
    excluded = Counter(e["action"].removeprefix("excluded.") for e in here if e["action"].startswith("excluded."))
    releases = tuple(_release(e) for e in here if e["action"] in _CHANGES)
    openings = tuple(
        (
            e["time"],
            e["subject"][:16],
            str(e["details"].get("purpose", "")),
            _CLEAN[e["details"].get("clean")],
            e["actor"],
        )
        for e in here
        if e["action"] == "test.opened"
    )
    steps = Counter(_STEPS[e["action"]] for e in here if e["action"] in _STEPS)
    counts = {
        "events": len(here),
        "runs": len(runs),
        "runs that failed or were stopped": sum(row[3] != "done" for row in runs),
        **{name: steps[name] for name in _STEPS.values()},
        "items left out": sum(excluded.values()),
        "looks at a test part": len(openings),
        "changes of a release": len(releases),
        "incidents": len(incidents),
        "signs of drift": sum(len(one.alarms) for one in drifts),
        "not as the trail says today": len(faults),
    }
    left_out = dict(excluded.most_common())
    return Period(start, end, head, counts, runs, incidents, left_out, openings, releases, tuple(faults), tuple(drifts))


def page(period: Period) -> str:
    """Write the page; the same facts give the same text."""
    tables = {
        "counts": Table("In numbers", ("What", "How many"), _pairs(period.counts), frozenset({1})),
        "faults": Table("Not as the trail says", ("What", "Where", "Why"), period.faults),
        "incidents": Table("Incidents", ("Time", "What", "Of what", "Who", "Why"), period.incidents),
        "releases": Table("Releases", ("Time", "Release", "Became", "By whose word", "Why"), period.releases),
        "runs": Table("Runs", ("Began", "Verb", "Name", "How it ended", "Seconds"), period.runs, frozenset({4})),
        "excluded": Table("Left out", ("Reason", "Items"), _pairs(period.excluded), frozenset({1})),
        "openings": Table("Looks at a test part", ("Time", "Split", "For", "Clean", "Who"), period.openings),
        "used": Table("Releases in use", _USED, tuple(map(_used, period.drifts)), frozenset({1, 2, 3, 5})),
        "shifts": Table(
            "Answers beside those of the release’s own test part",
            _SHIFTED,
            tuple(_shifted(drift, one) for drift in period.drifts for one in drift.shifts),
            frozenset({2, 3, 4}),
        ),
    }
    return sealed(
        "period.html.jinja",
        period=period,
        tables=tables,
    )


def _used(drift: Drift) -> tuple[str, ...]:
    items = drift.scans + drift.left_out
    left_out = f"{drift.left_out:,} ({100 * drift.left_out / items:.0f} %)" if items else DASH
    promised = number(drift.promised)
    return drift.release_id, f"{drift.uses:,}", f"{drift.scans:,}", left_out, compact(drift.strange), promised


def _shifted(drift: Drift, one: Shift) -> tuple[str, ...]:
    if one.p_value is None:
        return drift.release_id, one.question, f"{one.scans:,}", DASH, DASH, one.note
    found = (number(one.index), number(one.by_chance), p_value(one.p_value))
    return drift.release_id, one.question, f"{one.scans:,}", *found


def _pairs(counts: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    return tuple((name, f"{count:,}") for name, count in counts.items())


def _runs(here: Sequence[Happened], events: Sequence[Happened]) -> tuple[Rows, list[tuple[str, ...]]]:
    """Give a row for each run that began, and an incident for each that never ended."""
    ended = {e["subject"]: e for e in events if e["action"] in ("run.finished", "run.failed")}
    rows: list[tuple[str, ...]] = []
    interrupted: list[tuple[str, ...]] = []
    for event in here:
        said = event["details"]
        if event["action"] == "run.unchanged":
            rows.append((event["time"], "run", str(said["name"]), "done", "nothing to do"))
        if event["action"] != "run.started":
            continue
        end = ended.get(event["subject"])
        how = "no end was entered" if end is None else end["outcome"]
        seconds = "-" if end is None else f"{_seconds_between(event, end):,.0f}"
        rows.append((event["time"], str(said["verb"]), str(said["name"]), how, seconds))
        if end is None:
            why = "killed, or still under way when this was written"
            interrupted.append((event["time"], "run without an end", str(said["name"]), event["actor"], why))
    return tuple(rows), interrupted


def _seconds_between(start: Happened, end: Happened) -> float:
    return (datetime.fromisoformat(end["time"]) - datetime.fromisoformat(start["time"])).total_seconds()


def _incidents(here: Sequence[Happened]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for event in here:
        said = event["details"]
        what = _INCIDENTS.get(event["action"])
        if event["action"].startswith("promotion."):
            what = f"promotion to {event['action'].removeprefix('promotion.')} was refused"
        if what:
            who = str(said.get("by") or event["actor"])
            why = str(said.get("why") or said.get("reason") or said.get("error") or "")
            found.append((event["time"], what, str(said.get("name") or event["subject"][:16]), who, why))
    return found


def _release(event: Happened) -> tuple[str, ...]:
    said = event["details"]
    word = f"{said['by']}, {said['role']}" if "by" in said else "the gate"
    gate = "; ".join(f"{one['condition']}: {one['observed']}" for one in said.get("gate", ()))
    return event["time"], event["subject"], _CHANGES[event["action"]], word, str(said.get("reason") or gate)
