"""The advisor's page: what was measured, in a table and a plot, and what follows from it.

It is made like the model report (page.py): self-contained, escaped, without scripts.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from medtl.records import Score
from medtl.report.figures import COLOURS, FAINT, INK, STYLE, as_svg, drawable
from medtl.report.page import as_data, sealed
from medtl.report.tables import Table
from medtl.report.words import DASH, interval, number

_HEADS = {"logistic_regression": "logistic regression", "linear_svm": "linear SVM", "knn": "nearest neighbours"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a model and what was measured of it."""

    name: str
    backbone: str
    weights: str  # where they came from, or none
    strategy: str  # a solved head, staged, or scratch
    judged: str  # cross-validation, or hold-out
    score: Score
    seconds: float | None  # to make it; None is unknown
    ahead: float | None = None  # share of resamples in which the best was better; None of the best itself
    difference: Score | None = None  # the best minus this one, on the patients both were judged on
    settings: tuple[str, ...] = ()  # for --set, to train it


@dataclass(frozen=True, slots=True)
class Hint:
    """What is known of a backbone without training; no recommendation rests on it."""

    backbone: str
    weights: str
    features: int
    frechet: float | None  # None: not estimable
    per_channel: float | None
    logme: float | None
    images: int  # that the distance was measured on


@dataclass(frozen=True, slots=True)
class ClassCount:
    """How much there is of one class in training and validation."""

    label: str
    studies: int
    patients: int


@dataclass(frozen=True, slots=True)
class Advice:
    """Everything the advisor found."""

    title: str
    task: str
    studies: int  # of training and validation
    patients: int
    held_out: int  # studies of the hold-out that references were judged on; 0: there were no references
    folds: int
    counts: tuple[ClassCount, ...]
    ways: tuple[Way, ...]
    hints: tuple[Hint, ...]
    best: str | None
    recommended: str | None
    clear: bool
    sentence: str
    notes: tuple[str, ...]
    level: float

    def way(self, name: str | None) -> Way | None:
        """Find a way by its name."""
        return next((way for way in self.ways if way.name == name), None)


def head_name(kind: str) -> str:
    """Give a solved head's name in words."""
    return _HEADS.get(kind, kind)


def sentence_of(best: Way | None, recommended: Way | None, unbeaten: int, clear: bool) -> str:
    """Say what follows from the measurements, in plain words."""
    if best is None or recommended is None:
        return "Nothing could be estimated: there are too few patients of one kind. No recommendation."
    if clear and best.ahead is None and unbeaten == 1:
        return f"{best.name} is recommended: it is ahead of every other with at least 95 % certainty."
    others = unbeaten - 1
    cheap = "among the cheapest of these" if recommended is not best else "the highest, and as cheap as any of these"
    return (
        f"No clear winner: {best.name} came out highest, but {others} other{'s' * (others != 1)} could not be told "
        f"from it. {recommended.name} is recommended: {cheap}{_cost(recommended)}."
    )


def _cost(way: Way) -> str:
    return "" if way.seconds is None else f", about {_seconds(way.seconds)} s here"


def render(advice: Advice) -> str:
    """Write the page; the same advice gives the same text."""
    page: str = sealed(
        "advice.html.jinja",
        advice=advice,
        ways=ways_table(advice),
        hints=hints_table(advice),
        counts=counts_table(advice),
        plot=as_data(plot(advice)),
    )
    return page


def ways_table(advice: Advice) -> Table:
    """Give every way with its AUROC, patients, and how it stands against the best."""
    best = advice.best
    rows = []
    for way in advice.ways:
        share = "the highest" if way.name == best else DASH if way.ahead is None else f"{100 * way.ahead:.0f} %"
        behind = DASH if way.difference is None else interval(way.difference)
        counts = (f"{way.score.n:,}", f"{way.score.patients:,}", _seconds(way.seconds))
        mark = "✓" if way.name == advice.recommended else ""
        rows.append((way.name, way.weights, interval(way.score), *counts, way.judged, share, behind, mark))
    head = (
        "Way", "Weights", f"AUROC [{100 * advice.level:.0f} %]", "Studies", "Patients", "Seconds", "Judged by",
        "Best is ahead in", "Best minus this", "Recommended",
    )  # fmt: skip
    return Table("Measured on patients that were not learned from", head, tuple(rows), frozenset({3, 4, 5}))


def hints_table(advice: Advice) -> Table:
    """Give the distance between source and target, and LogME, of each backbone."""
    rows = tuple(
        (
            hint.backbone,
            hint.weights,
            f"{hint.features:,}",
            "not estimable" if hint.frechet is None else f"{hint.frechet:.4g}",
            "not estimable" if hint.per_channel is None else f"{hint.per_channel:.4g}",
            f"{hint.images:,}" if hint.images else DASH,
            number(hint.logme),
        )
        for hint in advice.hints
    )
    head = (
        "Backbone",
        "Weights",
        "Features",
        "Fréchet distance²",
        "per channel, source SD²",
        "Images",
        "LogME (a hint)",
    )
    return Table("Hints, which no recommendation rests on", head, rows, frozenset({2, 3, 4, 5, 6}))


def counts_table(advice: Advice) -> Table:
    """Give the size and the balance of classes."""
    rows = [
        (one.label, f"{one.studies:,}", f"{100 * one.studies / max(advice.studies, 1):.1f} %", f"{one.patients:,}")
        for one in advice.counts
    ]
    rows.append(("All", f"{advice.studies:,}", "", f"{advice.patients:,}"))
    return Table(
        "Training and validation", ("Class", "Studies", "Share", "Patients"), tuple(rows), frozenset({1, 2, 3})
    )


def plot(advice: Advice) -> str:
    """Draw each way's AUROC with its interval; filled: cross-validation, open: hold-out."""
    ways = [(way, way.score.value) for way in advice.ways if way.score.value is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.1 + 0.34 * max(len(ways), 1)), layout="constrained")
        axes = figure.subplots()
        for place, (way, value) in enumerate(ways):
            score = way.score
            colour = COLOURS[1] if way.name == advice.recommended else COLOURS[0]
            if score.low is not None and score.high is not None:
                axes.plot([score.low, score.high], [place] * 2, color=colour, lw=4, alpha=0.45, solid_capstyle="round")
            face = colour if way.judged == "cross-validation" else "white"
            axes.plot([value], [place], "o", ms=8, mfc=face, mec=colour, mew=1.6)
        axes.axvline(0.5, color=FAINT, lw=1, ls=(0, (3, 3)))
        axes.set(ylim=(max(len(ways), 1) - 0.4, -0.6), xlabel="AUROC on patients not learned from")
        axes.set_yticks(range(len(ways)), [drawable(way.name, 64) for way, _ in ways], color=INK)
        axes.grid(axis="y", visible=False)
        return as_svg(figure)


def _seconds(value: float | None) -> str:
    return DASH if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
