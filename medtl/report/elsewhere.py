"""A release on scans from elsewhere, on one page: its figures there, beside those it was released with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medtl.records import Evaluation, Score
from medtl.report import figures
from medtl.report.page import as_data, sealed
from medtl.report.tables import Table
from medtl.report.words import DASH, compact, label_score, metric_name

LEAKED = (
    "The release was measured on a split that leaks (allow_leaky_split): what it was released with flatters it, so "
    "that a fall to the figures here looks deeper than it is, and a rise smaller."
)
_OF_DIAGNOSES = "plan, weights, calibrator and operating points"
_OF_MASKS = "plan, weights, what is kept of a mask, and when a mask is doubted"


def page(
    title: str,
    release: str,
    inside: Evaluation,
    outside: Evaluation,
    changes: Mapping[str, Score],
    patients_known: bool,
    looked: bool,
    limits: Sequence[str] = (),
    left_out: Mapping[str, int] | None = None,
) -> str:
    """Write the page; the same evaluations give the same text.

    Args:
        inside: what the release was released with.
        outside: the same release on the new scans.
        changes: outside minus inside, by metric; the first is what the verdict speaks of.
        looked: whether it could be looked for who taught the release.
        left_out: how many scans do not fit the release, by why.
    """
    drawn = {"roc": figures.roc(outside), "calibration": figures.calibration(outside.curves)}
    named = next(iter(changes), "auroc")
    return sealed(
        "elsewhere.html.jinja",
        title=title,
        release=release,
        outside=outside,
        inside=inside,
        patients_known=patients_known,
        looked=looked,
        limits=limits,
        verdict=verdict(changes.get(named), metric_name(named)),
        structures=_structures(inside, outside, named) if named == "dice" else None,
        chosen_before=_OF_MASKS if named == "dice" else _OF_DIAGNOSES,
        left_out=dict(left_out or {}),
        table=_table(inside, outside, changes),
        figures={name: None if svg is None else as_data(svg) for name, svg in drawn.items()},
    )


def verdict(change: Score | None, name: str = "AUROC") -> str:
    """Say what the change of a metric, of which more is better, allows to say."""
    if change is None or change.low is None or change.high is None:
        return f"Whether the {name} is another than the one it was released with cannot be told."
    if change.high < 0:
        return f"The {name} is lower than the one the model was released with, beyond chance."
    if change.low > 0:
        return f"The {name} is higher than as released, beyond chance: ask whether the cases here are easier."
    return f"No clear difference to the {name} the model was released with; the interval says how much may be hidden."


def _structures(inside: Evaluation, outside: Evaluation, metric: str) -> Table:
    rows = tuple(
        (name, *(DASH if score is None else compact(score) for score in both))
        for name in outside.classes
        if any(both := [label_score(one, metric, name) for one in (outside, inside)])
    )
    return Table(f"{metric_name(metric)} of each structure", ("Structure", "Here", "As released"), rows)


def _table(inside: Evaluation, outside: Evaluation, changes: Mapping[str, Score]) -> Table:
    rows = tuple(
        (metric_name(name), compact(outside.metrics[name]), compact(inside.metrics[name]), compact(score))
        for name, score in changes.items()
    )
    return Table("Here, and as released", ("Metric", "Here", "As released", "Here minus as released"), rows)
