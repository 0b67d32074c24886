"""Folds on one page: the pooled figures with intervals over patients, and what each fold gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
from matplotlib.figure import Figure

from medtl.records import Comparison, Evaluation, FoldScores, Score
from medtl.report.fairness import Terms, curves
from medtl.report.figures import COLOURS, INK, STYLE, as_svg, drawable
from medtl.report.page import as_data, sealed
from medtl.report.tables import Table
from medtl.report.words import interval, metric_in, metric_name, number, transfer_sentence, verdict

_SHOWN = ("auroc", "average_precision", "balanced_accuracy", "sensitivity", "specificity", "brier", "dice", "iou",
          "hd95_mm", "assd_mm", "nsd", "pixel_auroc")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Design:
    """What the folds were made of."""

    by: str  # patient or site
    title: str
    backbone: str
    weights: str
    studies: int
    patients: int
    patients_known: bool
    limits: Sequence[str] = ()
    scratch: Evaluation | None = None  # of the same network without weights on the same folds
    comparison: Comparison | None = None  # with it
    terms: Terms | None = None  # how both were trained
    level: float = 0.95  # coverage of the intervals
    unit: Literal["mm", "pixels"] = "mm"  # of distances
    twice: bool = False  # each fold's network was trained once more, on its validation part too


def render(evaluation: Evaluation, design: Design) -> str:
    """Write the page; the same evaluation gives the same text."""
    svg = strip(evaluation, design.scratch)
    return sealed(
        "folds.html.jinja",
        design=design,
        evaluation=evaluation,
        pooled=_pooled(evaluation, design),
        folds=_folds(evaluation, design),
        beside=None if design.scratch is None else _beside(evaluation, design.scratch, design),
        verdict=None if design.comparison is None else verdict(design.comparison),
        sentence=None if design.comparison is None else _sentence(design, design.comparison),
        drawn=metric_name(headline(evaluation)),
        trained=None if design.terms is None or (drawn := curves(design.terms)) is None else as_data(drawn),
        figure=None if svg is None else as_data(svg),
    )


def strip(evaluation: Evaluation, scratch: Evaluation | None = None) -> str | None:
    """Draw the headline of each fold beside the pooled one, and without weights; ``None`` where none is estimable."""
    metric = headline(evaluation)
    bare = {_name(one): one.values.get(metric) for one in scratch.folds} if scratch is not None else {}
    folds = [(one, value) for one in evaluation.folds if (value := one.values.get(metric)) is not None]
    if not folds:
        return None
    score = evaluation.score(metric)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.9 + 0.26 * len(folds)), layout="constrained")
        axes = figure.subplots()
        if score.low is not None and score.high is not None:
            axes.axvspan(score.low, score.high, color=COLOURS[0], alpha=0.15, lw=0)
        if score.value is not None:
            axes.axvline(score.value, color=COLOURS[0], lw=1.6)
        for place, (one, value) in enumerate(reversed(folds)):
            axes.plot([value], [place], "o", ms=6, color=INK)
            if (without := bare.get(_name(one))) is not None:
                axes.plot([without], [place], "o", ms=6, mfc="none", color=INK)
        axes.set(xlabel=metric_name(metric), ylim=(-0.7, len(folds) - 0.3))
        axes.set_yticks(range(len(folds)), [drawable(_name(one)) for one, _ in reversed(folds)])
        return as_svg(figure)


def headline(evaluation: Evaluation) -> str:
    """Name the metric that is drawn: Dice of a segmentation, else AUROC."""
    return "dice" if "dice" in evaluation.metrics else "auroc"


def _name(one: FoldScores) -> str:
    return one.fold if not one.repeat else f"{one.fold}, repeat {one.repeat + 1}"


def _pooled(evaluation: Evaluation, design: Design) -> Table:
    scores: list[Score] = [evaluation.metrics[name] for name in evaluation.metrics]
    rows = tuple((metric_in(one.metric, design.unit), interval(one), one.note) for one in scores)
    return Table("Mean over folds", ("Metric", "Value and interval", "Remark"), rows, frozenset({1}))


def _beside(evaluation: Evaluation, scratch: Evaluation, design: Design) -> Table:
    """Put the pooled figures of both beginnings side by side."""
    both = [name for name in _SHOWN if name in evaluation.metrics and name in scratch.metrics]
    rows = tuple(
        (metric_in(name, design.unit), interval(evaluation.metrics[name]), interval(scratch.metrics[name]))
        for name in both
    )
    head = ("Mean over folds", "With weights", "Without")
    return Table("The same network, with weights and without, on the same folds", head, rows, frozenset({1, 2}))


def _sentence(design: Design, comparison: Comparison) -> str:
    same = f"on the same {comparison.difference.n:,} studies of {comparison.difference.patients:,} patients"
    return transfer_sentence(comparison, f"{100 * design.level:g}", same, design.weights == "none")


def _folds(evaluation: Evaluation, design: Design) -> Table:
    what = "Site left out" if design.by == "site" else "Fold"
    shown = [name for name in _SHOWN if any(one.values.get(name) is not None for one in evaluation.folds)]
    head = (what, "Studies", "Patients", *(metric_in(name, design.unit) for name in shown))
    rows = tuple(
        (_name(one), f"{one.n:,}", f"{one.patients:,}", *(number(one.values.get(name)) for name in shown))
        for one in evaluation.folds
    )
    return Table("What each fold's test part gave", head, rows, frozenset(range(1, len(head))))
