"""The advisor's page says what was measured, and nothing a reader could be misled by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medtl.records import Score
from medtl.report.advice import Advice, ClassCount, Hint, Way, hints_table, plot, render, sentence_of, ways_table


def score(value: float | None, patients: int = 24) -> Score:
    if value is None:
        return Score("auroc", "macro", None, None, None, 80, patients, "not estimable: one kind")
    return Score("auroc", "macro", value, value - 0.05, value + 0.02, 80, patients)


FIRST = Way("resnet18, logistic regression", "resnet18", "imagenet", "logistic_regression", "cross-validation",
            score(0.91), 12.0, None, None, ("model.backbone=resnet18", "model.phases=features"))  # fmt: skip
SECOND = Way("resnet18, scratch (10 epochs)", "resnet18", "none", "scratch", "hold-out", score(0.7, 5), 300.0, 0.97,
             Score("auroc difference", "macro", 0.2, 0.05, 0.3, 80, 5))  # fmt: skip
ADVICE = Advice(
    title="Cells <b>", task="binary", studies=80, patients=24, held_out=16, folds=5,
    counts=(ClassCount("healthy", 60, 20), ClassCount("ill", 20, 9)), ways=(FIRST, SECOND),
    hints=(Hint("resnet18", "imagenet", 512, None, None, 0.123, 0), Hint("b", "w", 8, 1.5, 0.25, None, 80)),
    best=FIRST.name, recommended=FIRST.name, clear=True, sentence="resnet18 & features.", notes=("A note.",),
    level=0.95,
)  # fmt: skip


def test_the_page_has_every_figure_with_its_interval_and_patients() -> None:
    page = render(ADVICE)
    for text in ("0.910 [0.860, 0.930]", "0.700 [0.650, 0.720]", "97 %", "0.200 [0.050, 0.300]", "25.0 %", "A note."):
        assert text in page, text
    assert "The test part was not opened" in page
    assert '<code>--set "model.phases=features"</code>' in page


def test_the_page_is_escaped_self_contained_and_always_the_same() -> None:
    page = render(ADVICE)
    assert "Cells &lt;b&gt;" in page and "Cells <b>" not in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "default-src 'none'" in page.replace("&#39;", "'")
    assert page == render(ADVICE)


def test_only_the_recommended_way_is_marked() -> None:
    assert [row[-1] for row in ways_table(ADVICE).rows] == ["✓", ""]


def test_a_distance_that_cannot_be_estimated_is_said_and_not_zero() -> None:
    first, second = hints_table(ADVICE).rows
    assert first[3:5] == ("not estimable", "not estimable") and first[5] == "–"
    assert second[3:5] == ("1.5", "0.25")


def test_a_way_without_a_value_is_in_the_table_and_not_in_the_plot() -> None:
    without = replace(ADVICE, ways=(FIRST, replace(SECOND, score=score(None), ahead=None, difference=None)))
    assert "not estimable: one kind" in render(without)
    assert plot(without) == plot(replace(ADVICE, ways=(FIRST,)))


@pytest.mark.parametrize(
    ("recommended", "unbeaten", "clear", "words"),
    [
        (FIRST, 1, True, "ahead of every other"),
        (SECOND, 2, False, "No clear winner: resnet18, logistic regression came out highest, but 1 other could"),
        (
            FIRST,
            3,
            False,
            "2 others could not be told from it. resnet18, logistic regression is recommended: the highest",
        ),
        (None, 0, False, "too few patients"),
    ],
)
def test_the_sentence_says_whether_there_is_a_winner(
    recommended: Way | None, unbeaten: int, clear: bool, words: str
) -> None:
    assert words in sentence_of(FIRST if recommended else None, recommended, unbeaten, clear)
