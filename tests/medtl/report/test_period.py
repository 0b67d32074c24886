"""The page of a period tells drift in words, and that it was not measured where it was not."""

from __future__ import annotations

from datetime import UTC, datetime
from html import unescape

from medtl.records import Drift, Score, Shift
from medtl.report.period import facts_of, page

START, END = datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)
STRANGE = Score("unlike training", "all", 0.15, 0.093, 0.233, 100, 100)
UNKNOWN = Score("unlike training", "all", None, None, None, 0, 0, "not measured")


def shown(*drifts: Drift) -> str:
    return unescape(page(facts_of([], START, END, "0" * 64, [], drifts)))


def test_signs_of_drift_are_counted_and_told_with_their_numbers() -> None:
    shifts = (
        Shift("decision", 100, 0.321, 0.012, 0.0001),
        Shift("novelty", 100, None, None, None, "not estimable: few"),
    )
    drift = Drift("r-1", 3, 100, 25, STRANGE, 0.05, shifts, ("<b>more than promised",))
    assert facts_of([], START, END, "", [], [drift]).counts["signs of drift"] == 1
    told = page(facts_of([], START, END, "", [], [drift]))
    assert "&lt;b&gt;more than promised" in told and "<b>" not in told
    for figure in ("25 (20 %)", "0.150 [0.093,\u00a00.233]", "0.050", "0.321", "0.012", "<0.001", "not estimable: few"):
        assert figure in unescape(told)
    assert "another case mix is not a worse model" in told


def test_what_was_not_measured_is_not_called_no_drift() -> None:
    told = shown(Drift("r-1", 1, 9, 0, UNKNOWN, None, notes=("1 of 1 uses are not measured.",)))
    assert "not measured" in told and "no sign of drift" not in told and "1 of 1 uses" in told
    few = (Shift("decision", 9, None, None, None, "not estimable: few"),)
    assert "no sign of drift" not in shown(Drift("r-1", 1, 9, 0, UNKNOWN, None, few))
    assert "no sign of drift was found" in shown(Drift("r-1", 1, 9, 0, STRANGE, 0.2))
    assert "No release was used." in shown()
