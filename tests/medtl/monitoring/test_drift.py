"""A broken promise and moved answers are found; another draw of the same world is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from medtl.evaluation import uncertainty
from medtl.monitoring.drift import LEVEL, corrected, measure, pool, shift, unlike_training, wilson
from medtl.records import Drift, Shift, Tally

START, END = datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)
TEST_PART = Tally(400, 400, {"decision": {"dark": 200, "bright": 200}, "unlike training": {"no": 385, "yes": 15}}, 0.05)


def used(tally: Tally | None, scans: str = "a", **more: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"scans": scans, "count": 100, "excluded": 3, **more}
    if tally is not None:
        said |= {"tally": asdict(tally), "released_with": asdict(TEST_PART)} | more
    return {"action": "release.applied", "subject": "r-1", "time": "2026-05-03T10:00:00+00:00", "details": said}


def answers(dark: int, strange: int, scans: int = 100, patients: int | None = 100) -> Tally:
    counts = {"dark": dark, "bright": scans - dark}
    return Tally(scans, patients, {"decision": counts, "unlike training": share(strange, scans)}, 0.05)


def share(yes: int, of: int) -> Mapping[str, int]:
    return {"no": of - yes, "yes": yes}


def measured(*events: dict[str, Any]) -> Drift:
    (found,) = measure(events, START, END)
    return found


def test_the_same_world_gives_no_alarm() -> None:
    found = measured(used(answers(dark=52, strange=6)))
    assert (found.uses, found.scans, found.left_out, found.alarms, found.notes) == (1, 100, 3, (), ())
    (decision,) = found.shifts
    assert decision.p_value is not None and decision.p_value > 0.5
    assert found.strange.low is not None and found.strange.low < 0.05


def test_more_unlike_training_than_promised_is_told() -> None:
    (alarm,) = measured(used(answers(dark=50, strange=15))).alarms
    assert "15.0 % of the scans are unlike training, 5 % at most were promised" in alarm


def test_other_decisions_are_told_and_not_called_errors() -> None:
    (alarm,) = measured(used(answers(dark=20, strange=5))).alarms
    assert "“decision”" in alarm and "error" not in alarm


def test_many_scans_of_few_patients_prove_less() -> None:
    unknown = measured(used(answers(dark=30, strange=12, patients=None)))
    assert len(unknown.alarms) == 2 and "not known whose" in unknown.notes[0]
    assert not measured(used(answers(dark=30, strange=12, patients=20))).alarms


def test_the_same_scans_asked_again_count_once_and_others_are_added() -> None:
    again = measured(used(answers(50, 5)), used(answers(50, 5)), used(answers(40, 5), "b"))
    assert (again.uses, again.scans, again.strange.n, again.shifts[0].scans) == (2, 200, 200, 200)


def test_what_was_not_counted_is_not_measured() -> None:
    old = measured(used(None))
    assert old.strange.value is None and old.strange.note == "not measured" and not old.shifts
    assert (old.scans, old.left_out) == (100, 3) and "1 of 1 uses are not measured" in old.notes[0]
    some = measured(used(None), used(answers(50, 5), "b"))
    assert some.strange.n == 100 and "1 of 2 uses are not measured" in some.notes[0]


def test_a_release_without_counts_of_its_test_part_still_has_its_promise() -> None:
    found = measured(used(answers(20, 15), released_with=None))
    assert len(found.alarms) == 1 and not found.shifts and "no counts of its own test part" in found.notes[0]


def test_other_events_and_other_days_are_not_looked_at() -> None:
    late, other = used(answers(50, 5)), used(answers(50, 5))
    late["time"], other["action"] = "2026-06-01T00:00:00+00:00", "release.validated"
    assert measure([late, other], START, END) == ()


def test_a_release_that_cannot_tell_what_is_strange_says_so() -> None:
    found = measured(used(Tally(9, None, {"decision": {"dark": 4, "bright": 5}})))
    assert found.strange.value is None and "cannot tell" in found.strange.note and found.promised is None


def test_the_test_is_that_of_a_contingency_table_and_rare_answers_are_laid_together() -> None:
    now = Tally(100, 100, {"q": {"a": 60, "b": 39, "c": 1}})
    then = Tally(200, 200, {"q": {"a": 100, "b": 98, "c": 2}})
    found = shift("q", now, then)
    assert found.p_value == pytest.approx(chi2_contingency([[60, 40], [100, 100]], correction=False).pvalue)
    assert found.by_chance == pytest.approx(1 / 100 + 1 / 200)


@pytest.mark.parametrize("counts", [{"a": 0, "b": 0}, {"a": 3, "b": 3}, {"a": 900, "b": 1}])
def test_too_few_answers_are_not_estimable_and_say_why(counts: dict[str, int]) -> None:
    found = shift("q", Tally(sum(counts.values()) or 5, None, {"q": counts}), Tally(50, 50, {"q": {"a": 50, "b": 0}}))
    assert found.p_value is None and found.index is None and "expected 5 times" in found.note


def test_the_index_of_the_same_world_is_about_what_stands_beside_it() -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(300, [0.4, 0.3, 0.2, 0.1], (300, 2))
    found = []
    for pair in draws:
        now, then = (Tally(300, None, {"q": dict(zip("abcd", row.tolist(), strict=True))}) for row in pair)
        found.append(shift("q", now, then))
    index, chance = np.mean([one.index for one in found]), np.mean([one.by_chance for one in found])  # type: ignore[arg-type]
    assert index == pytest.approx(chance, rel=0.1)
    assert np.mean([one.p_value < 0.05 for one in found]) < 0.08  # type: ignore[operator]


def test_p_values_are_corrected_for_all_questions_and_what_is_unknown_stays_so() -> None:
    shifts = [Shift(str(value), 1, None, None, value) for value in (0.04, None, 0.004, 0.03)]
    assert [one.p_value for one in corrected(shifts)] == [0.06, None, 0.012, 0.06]
    assert corrected(shifts[2:3])[0].p_value < LEVEL  # type: ignore[operator]


def test_one_unknown_patient_makes_the_number_of_patients_unknown() -> None:
    assert pool([answers(50, 5), answers(50, 5)]).patients == 200
    assert pool([answers(50, 5), answers(50, 5, patients=None)]).patients is None
    assert "not known whose" in unlike_training(answers(50, 5, patients=None)).note


@settings(derandomize=True, max_examples=50)
@given(st.floats(0, 1), st.floats(1, 1e5), st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_the_one_of_the_evaluation(value: float, votes: float, level: float) -> None:
    assert wilson(value, votes, level) == pytest.approx(uncertainty.wilson(value, votes, level), abs=1e-12)
