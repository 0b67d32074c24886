"""The answers that are shown are the surest ones of their kind, and nobody is shown twice."""

from __future__ import annotations

from typing import Any

import numpy as np

from medtl.evaluation.cases import telling_cases
from medtl.records import OperatingPoint, Predictions


def predictions(targets: Any, probabilities: Any, patients: tuple[str, ...]) -> Predictions:
    ids = tuple(f"s-{n}" for n in range(len(patients)))
    return Predictions("test", ids, patients, np.array(targets, dtype=float), np.array(probabilities, dtype=float))


POINT = (OperatingPoint("ill", 0.5, "Youden's index", "val"),)


def test_the_surest_failures_come_first_and_each_patient_once() -> None:
    wrong = [[0.1, 0.9], [0.2, 0.8], [0.05, 0.95], [0.7, 0.3], [0.9, 0.1]]
    found = telling_cases(
        predictions([[1, 0], [1, 0], [1, 0], [1, 0], [1, 0]], wrong, ("a", "b", "a", "c", "d")),
        "binary", ("well", "ill"), POINT, 2,
    )  # fmt: skip
    assert [(one.row, one.right) for one in found] == [(2, False), (1, False), (4, True), (3, True)]
    assert (found[0].truth, found[0].decision, found[0].probability, found[0].asked) == ("well", "ill", 0.95, 1)


def test_of_several_classes_the_answer_is_the_one_that_was_decided_for() -> None:
    (one,) = telling_cases(predictions([[0, 0, 1]], [[0.2, 0.5, 0.3]], ("a",)), "multiclass", ("x", "y", "z"), (), 3)
    assert (one.asked, one.truth, one.decision, one.right) == (1, "z", "y", False)


def test_labels_are_asked_one_by_one_where_they_are_known() -> None:
    points = (OperatingPoint("x", 0.5, "", "val"), OperatingPoint("y", 0.5, "", "val"))
    found = telling_cases(
        predictions([[1, np.nan], [0, 1]], [[0.1, 0.9], [0.2, 0.3]], ("a", "b")), "multilabel", ("x", "y"), points, 3
    )
    assert [(one.row, one.truth, one.decision) for one in found if not one.right] == [
        (0, "x present", "x absent"),
        (1, "y present", "y absent"),
    ]
    assert [one.row for one in found if one.right] == []


def test_a_part_without_failures_shows_successes_alone() -> None:
    found = telling_cases(predictions([[0, 1]], [[0.1, 0.9]], ("a",)), "binary", ("well", "ill"), POINT, 4)
    assert [one.right for one in found] == [True]
