"""What a release was called when, and by whose word: read off the audit trail, the only place that says it. Pure.

::

    candidate ──▶ validated ──▶ approved ──▶ live ──▶ retired
        └▶ refused   (the gate)      ▲          │
                                     └──────────┘ replaced by another: may go live again
                  ▲                             │
                  └─────────────────────────────┘ rolled back: needs a new approval

The gate decides what is validated; a person with a name, a role and a reason decides the rest. Of the releases of one
name at most one is live.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal

from medtl.errors import GateRefused, MedtlError
from medtl.records import Release, Standing

PREFIX = "release."
STATES: Mapping[str, Standing] = {  # action of an event -> what the release is called from then on
    "release.candidate": "candidate",
    "release.refused": "refused",
    "release.validated": "validated",
    "release.approved": "approved",
    "release.live": "live",
    "release.replaced": "approved",
    "release.rolled_back": "validated",
    "release.retired": "retired",
}
_BEFORE: Mapping[str, tuple[Standing, ...]] = {  # what a person may do, and to a release in which state
    "approved": ("validated",),
    "live": ("approved",),
    "retired": ("candidate", "refused", "validated", "approved", "live"),
}


@dataclass(frozen=True, slots=True)
class Word:
    """Who says so, in what role, and why."""

    by: str
    role: str
    reason: str

    def __post_init__(self) -> None:
        for what, text in (("name (--by)", self.by), ("role (--role)", self.role), ("reason (--reason)", self.reason)):
            if not text.strip():
                raise MedtlError(f"A {what} is wanted: who asks later must find it on the audit trail.")


@dataclass(frozen=True, slots=True)
class Change:
    """A release was called something from a moment on."""

    release_id: str
    name: str
    state: Standing
    time: str  # UTC, ISO 8601
    actor: str  # the user of the machine
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Service:
    """A release was live from a moment to a moment."""

    release_id: str
    name: str
    start: str  # UTC, ISO 8601
    end: str | None  # None: it still is
    live_by: Mapping[str, Any]  # by, role, reason
    approved_by: Mapping[str, Any]
    evidence: Mapping[str, Any]  # digests of the release, and its gate as observed


def changes(events: Iterable[Mapping[str, Any]]) -> list[Change]:
    """Read every change of state off the trail, oldest first."""
    found = []
    names: dict[str, str] = {}
    for event in events:
        state = STATES.get(event["action"])
        if state is None:
            continue
        release_id, details = str(event["subject"]), event["details"]
        name = names.setdefault(release_id, str(details.get("name", "")))
        found.append(Change(release_id, name, state, str(event["time"]), str(event["actor"]), details))
    return found


def standing(events: Iterable[Mapping[str, Any]]) -> dict[str, Standing]:
    """Give what every release is called after all these events."""
    return {change.release_id: change.state for change in changes(events)}


def services(events: Iterable[Mapping[str, Any]]) -> list[Service]:
    """Read off every time that a release was live, in the order they began."""
    found: list[Service] = []
    made: dict[str, Change] = {}
    approved: dict[str, Change] = {}
    for change in changes(events):
        made.setdefault(change.release_id, change)
        if change.state == "approved" and "by" in change.details:
            approved[change.release_id] = change
        open_ = next(
            (i for i, one in enumerate(found) if one.end is None and one.release_id == change.release_id), None
        )
        if change.state == "live" and open_ is None:
            found.append(
                Service(
                    change.release_id, change.name, change.time, None, _word(change),
                    _word(approved.get(change.release_id)),
                    {"artifact": made[change.release_id].details.get("artifact"),
                     "gate": made[change.release_id].details.get("gate", [])},
                )
            )  # fmt: skip
        elif change.state != "live" and open_ is not None:
            found[open_] = replace(found[open_], end=change.time)
    return found


def live_on(events: Iterable[Mapping[str, Any]], when: date | datetime, name: str | None = None) -> list[Service]:
    """Tell which releases served at a moment, or at any time of a day (UTC)."""
    if isinstance(when, datetime):
        start = end = when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)
    else:
        start = datetime.combine(when, time(), UTC)
        end = start + timedelta(days=1) - timedelta(microseconds=1)
    return [
        one
        for one in services(events)
        if (name is None or one.name == name)
        and datetime.fromisoformat(one.start) <= end
        and (one.end is None or datetime.fromisoformat(one.end) > start)
    ]


def check_promotion(release: Release, to: Literal["validated", "approved", "live", "retired"]) -> None:
    """Refuse a step that is not allowed from where the release stands.

    Raises:
        GateRefused: the gate has not validated it, or the step before is missing.
    """
    here = release.status
    failed = [check.condition for check in release.checks if not check.passed]
    if to == "validated":
        why = (
            f"its gate refused it ({'; '.join(failed)})"
            if failed
            else "it has no gate: set registry.promotion.gate and run again"
            if not release.checks
            else f"it is {here} already"
        )
        raise GateRefused(f"Release {release.release_id} cannot be called validated by hand: {why}.")
    if here not in _BEFORE[to]:
        raise GateRefused(
            f"Release {release.release_id} is {here}; only one that is {' or '.join(_BEFORE[to])} can become {to}."
        )
    if to != "retired" and (failed or not release.checks):
        raise GateRefused(f"Release {release.release_id} has not passed a gate: {'; '.join(failed) or 'it has none'}.")


def to_roll_back_to(events: Sequence[Mapping[str, Any]], name: str) -> tuple[str, str]:
    """Find the release that is live and the one that served before it and may serve again.

    Raises:
        GateRefused: nothing is live, or nothing that may serve again was live before.
    """
    served, now = services(events), standing(events)
    live = next((one.release_id for one in reversed(served) if one.name == name and one.end is None), None)
    if live is None:
        raise GateRefused(f"No release of '{name}' is live; there is nothing to roll back.")
    before = (one.release_id for one in reversed(served) if one.name == name and one.release_id != live)
    found = next((one for one in before if now[one] == "approved"), None)
    if found is None:
        raise GateRefused(
            f"No release of '{name}' that was live before {live} may serve again. Retire {live}, or approve another."
        )
    return live, found


def _word(change: Change | None) -> dict[str, Any]:
    if change is None:
        return {}
    return {key: change.details[key] for key in ("by", "role", "reason") if key in change.details} | {
        "actor": change.actor, "time": change.time
    }  # fmt: skip
