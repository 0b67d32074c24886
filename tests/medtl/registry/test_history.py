"""What the trail says of a release, whatever the order in which people spoke."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.errors import GateRefused, MedtlError
from medtl.records import GateCheck, Release, Standing
from medtl.registry.history import STATES, Word, check_promotion, live_on, services, standing, to_roll_back_to

PASSED, FAILED = GateCheck("auroc >= 0.8", 0.9, passed=True), GateCheck("auroc >= 0.8", 0.7, passed=False)


def event(day: int, action: str, release: str = "r-1", **details: Any) -> dict[str, Any]:
    time = datetime(2026, 1, day, 12, tzinfo=UTC).isoformat(timespec="milliseconds")
    return {"time": time, "actor": "root", "action": f"release.{action}", "subject": release, "details": details}


def served(day: int, releases: str = "r-1") -> list[Mapping[str, Any]]:
    word = {"name": "study", "by": "A", "role": "B", "reason": "C"}
    return [
        event(day, "validated", releases, name="study", artifact="digest", gate=[{"passed": True}]),
        event(day, "approved", releases, **word),
        event(day + 1, "live", releases, **word),
    ]


WALK = [
    *served(1, "r-1"),
    *served(4, "r-2")[:2],
    event(5, "replaced", "r-1", name="study", by="A"),
    event(5, "live", "r-2", name="study", by="A"),
    event(8, "rolled_back", "r-2", name="study", by="A"),
    event(8, "live", "r-1", name="study", by="A"),
]


@pytest.mark.parametrize(
    "day, live",
    [(1, []), (2, ["r-1"]), (4, ["r-1"]), (5, ["r-1", "r-2"]), (6, ["r-2"]), (8, ["r-2", "r-1"]), (30, ["r-1"])],
)
def test_a_day_names_every_release_that_served_on_it(day: int, live: list[str]) -> None:
    assert [one.release_id for one in live_on(WALK, date(2026, 1, day))] == live


def test_a_moment_names_one() -> None:
    assert [one.release_id for one in live_on(WALK, datetime(2026, 1, 5, 11, 59))] == ["r-1"]
    assert [one.release_id for one in live_on(WALK, datetime(2026, 1, 5, 12, 0))] == ["r-2"]
    assert live_on(WALK, datetime(2026, 1, 5, 12, 0), "another study") == []


def test_a_service_names_who_approved_it_and_on_what() -> None:
    first = services(WALK)[0]
    assert (first.approved_by["by"], first.live_by["reason"], first.evidence["artifact"]) == ("A", "C", "digest")
    assert first.end is not None and datetime.fromisoformat(first.end).day == 5


def test_the_release_before_comes_back_and_the_one_that_was_live_must_be_approved_anew() -> None:
    assert to_roll_back_to(WALK[:7], "study") == ("r-2", "r-1")
    assert standing(WALK) == {"r-1": "live", "r-2": "validated"}
    with pytest.raises(GateRefused, match="may serve again"):
        to_roll_back_to(WALK, "study")
    with pytest.raises(GateRefused, match="nothing to roll back"):
        to_roll_back_to(WALK[:2], "study")


@pytest.mark.parametrize(
    "here, to, allowed",
    [
        ("validated", "approved", True), ("approved", "live", True), ("live", "retired", True),
        ("refused", "retired", True), ("candidate", "approved", False), ("refused", "approved", False),
        ("validated", "live", False), ("live", "live", False), ("retired", "approved", False),
        ("retired", "retired", False), ("candidate", "validated", False), ("refused", "validated", False),
    ],
)  # fmt: skip
def test_only_the_next_step_is_allowed(here: Standing, to: Any, allowed: bool) -> None:
    release = Release("r-1", "study", here, (PASSED,))
    if allowed:
        check_promotion(release, to)
    else:
        with pytest.raises(GateRefused):
            check_promotion(release, to)


@pytest.mark.parametrize("checks", [(), (PASSED, FAILED)])
def test_what_passed_no_gate_is_not_approved_whatever_the_trail_says(checks: tuple[GateCheck, ...]) -> None:
    with pytest.raises(GateRefused, match="has not passed a gate"):
        check_promotion(Release("r-1", "study", "validated", checks), "approved")


@pytest.mark.parametrize("word", [("", "b", "c"), ("a", " ", "c"), ("a", "b", "\n")])
def test_a_word_wants_a_name_a_role_and_a_reason(word: tuple[str, str, str]) -> None:
    with pytest.raises(MedtlError, match="is wanted"):
        Word(*word)


@settings(derandomize=True, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(sorted(STATES)), st.sampled_from(["r-1", "r-2", "r-3"])), max_size=20))
def test_a_release_serves_exactly_while_it_is_called_live(said: list[tuple[str, str]]) -> None:
    events = [event(1 + n, action.removeprefix("release."), release) for n, (action, release) in enumerate(said)]
    live = {release for release, state in standing(events).items() if state == "live"}
    assert {one.release_id for one in services(events) if one.end is None} == live
