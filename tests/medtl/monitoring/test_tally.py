"""Answers become counts that nobody can be found in."""

from __future__ import annotations

import numpy as np
import pytest

from medtl.monitoring.tally import between, decided, flagged, tally, tenths


def test_every_probability_falls_into_one_tenth() -> None:
    counts = tenths(np.array([0.0, 0.05, 0.1, 0.95, 1.0, np.nan]))
    assert list(counts) == sorted(counts) and len(counts) == 10
    assert (counts["0.0 to 0.1"], counts["0.1 to 0.2"], counts["0.9 to 1.0"]) == (2, 1, 2)
    assert sum(counts.values()) == 5


def test_scores_of_validation_lie_between_its_quantiles_as_they_must_also_where_they_are_negative() -> None:
    scores = np.random.default_rng(0).normal(-5, 1, 10_000)
    counts = between(scores, np.percentile(scores, (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)).tolist())
    assert list(counts) == sorted(counts)
    assert list(counts.values()) == pytest.approx([100, 400, 500, 1500, 2500, 2500, 1500, 500, 400, 100], abs=1)
    assert between(np.array([-99.0, 99.0, np.nan]), [float(n) for n in range(11)]) == {
        name: int(name.startswith("00") or name.startswith("99")) for name in counts
    }


def test_classes_that_exclude_each_other_are_one_question_and_labels_one_each() -> None:
    called = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert decided(called, "binary", ("dark", "bright")) == {"decision": {"dark": 1, "bright": 2}}
    assert decided(called, "multilabel", ("mass", "nodule")) == {
        "decision: mass": {"no": 2, "yes": 1},
        "decision: nodule": {"no": 1, "yes": 2},
    }


def test_what_cannot_be_told_is_neither_yes_nor_no() -> None:
    assert flagged(np.array([1.0, 0.0, np.nan])) == {"no": 1, "yes": 1}


@pytest.mark.parametrize("patients", [["a", "b", "c", "d"], [None] * 4, ["a", "b", "c", "d", "d", "d"], []])
def test_the_counts_of_a_few_are_not_kept(patients: list[str | None]) -> None:
    assert tally(patients, {}) is None


def test_patients_are_known_only_where_all_are() -> None:
    known, unknown = tally(list("abcdee"), {}, 0.05), tally([*"abcde", None], {})
    assert known is not None and (known.scans, known.patients, known.promised) == (6, 5, 0.05)
    assert unknown is not None and unknown.patients is None
