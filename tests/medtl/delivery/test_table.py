"""Decisions are made at the chosen points; nobody's scan is lost; a table runs nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medtl.delivery.io import write_table
from medtl.delivery.table import decide, inert, rows_of
from medtl.records import Evaluation, Exclusion, OperatingPoint, Task


def evaluation(task: Task, classes: tuple[str, ...], *thresholds: float) -> Evaluation:
    reported = classes[-1:] if task == "binary" else classes
    points = tuple(OperatingPoint(name, t, "x", "val") for name, t in zip(reported, thresholds, strict=True))
    return Evaluation(task, classes, (), points, (), (), 0, 0, 0)


def test_decisions_follow_the_operating_points() -> None:
    binary = evaluation("binary", ("no", "yes"), 0.3)
    assert decide(np.array([[0.8, 0.2], [0.7, 0.3]]), binary) == ("no", "yes")
    assert decide(np.array([[0.2, 0.5, 0.3]]), evaluation("multiclass", ("a", "b", "c"), 0.9, 0.9, 0.9)) == ("b",)
    labels = evaluation("multilabel", ("a", "b"), 0.5, 0.5)
    assert decide(np.array([[0.6, 0.9], [0.1, 0.2]]), labels) == ("a;b", "none")


def test_every_file_has_a_row_the_excluded_ones_too(tmp_path: Path) -> None:
    excluded = [(Exclusion("f-1", "scans", "truncated", "cut off"), "=bad.dcm")]
    columns, rows = rows_of(
        [("s" * 32, ["x.png", "copy.png"])],
        np.array([[0.25, 0.75]]),
        ("yes",),
        (("unsure", "unlike training"),),
        ("no", "yes"),
        excluded,
        True,
    )
    write_table(tmp_path / "t.csv", columns, rows)
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "scan,file,probability_no,probability_yes,decision,look,reason",
        f"{'s' * 16},x.png,0.250000,0.750000,yes,unsure; unlike training,",
        f"{'s' * 16},copy.png,0.250000,0.750000,yes,unsure; unlike training,",
        "f-1,'=bad.dcm,,,excluded,,truncated: cut off",
    ]
    assert "file" not in rows_of([], np.zeros((0, 2)), (), (), ("no", "yes"), excluded, False)[0]


def test_a_cell_is_not_a_formula() -> None:
    assert [inert(cell) for cell in ("=1+1", "+1", "-1", "@x", "\tx", "plain")] == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@x",
        "'\tx",
        "plain",
    ]


def test_a_class_that_looks_like_a_formula_runs_nothing() -> None:
    classes = ("no", "=HYPERLINK(1)")
    (decision,) = decide(np.array([[0.1, 0.9]]), evaluation("binary", classes, 0.5))
    _, rows = rows_of([("s" * 32, ["\n=1+1.png"])], np.array([[0.1, 0.9]]), (decision,), ((),), classes, [], True)
    assert (rows[0]["decision"], rows[0]["file"]) == ("'=HYPERLINK(1)", "'\n=1+1.png")


def test_nothing_to_predict_is_an_empty_table_with_its_exclusions() -> None:
    for task, classes, thresholds in (("binary", ("no", "yes"), (0.5,)), ("multiclass", ("a", "b"), (0.5, 0.5))):
        assert decide(np.zeros((0, 2)), evaluation(task, classes, *thresholds)) == ()  # type: ignore[arg-type]
    excluded = [(Exclusion("f-1", "scans", "truncated", "cut off"), "x.dcm")]
    _, rows = rows_of([], np.zeros((0, 2)), (), (), ("no", "yes"), excluded, False)
    assert [(row["scan"], row["decision"]) for row in rows] == [("f-1", "excluded")]


def test_a_table_is_for_its_owner_alone(tmp_path: Path) -> None:
    write_table(tmp_path / "new" / "t.csv", ["a"], [{"a": 'x,"y"'}])
    assert (tmp_path / "new" / "t.csv").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new" / "t.csv").read_text() == 'a\n"x,""y"""\n'
