"""A release on scans from elsewhere, on one page: its figures there, beside those it was released with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medtl.records import Evaluation, Score
from medtl.report import figures
from medtl.report.page import as_data, sealed
from medtl.report.tables import Table
from medtl.report.words import compact, metric_name


def page(
    title: str,
    release: str,
    inside: Evaluation,
    outside: Evaluation,
    changes: Mapping[str, Score],
    patients_known: bool,
    looked: bool,
    limits: Sequence[str] = (),
) -> str:
    """Write the page; the same evaluations give the same text.

    Args:
        inside: what the release was released with.
        outside: the same release on the new scans.
        changes: outside minus inside, by metric.
        looked: whether it could be looked for who taught the release.
    """
    drawn = {"roc": figures.roc(outside), "calibration": figures.calibration(outside.curves)}
    return sealed(
        "elsewhere.html.jinja",
        title=title,
        release=release,
        outside=outside,
        inside=inside,
        patients_known=patients_known,
        looked=looked,
        limits=limits,
        verdict=verdict(changes.get("auroc")),
        table=_table(inside, outside, changes),
        figures={name: None if svg is None else as_data(svg) for name, svg in drawn.items()},
    )


def verdict(change: Score | None) -> str:
    """Say what the change of the AUROC allows to say."""
    if change is None or change.low is None or change.high is None:
        return "Whether the AUROC is another than the one it was released with cannot be told."
    if change.high < 0:
        return "The AUROC is lower than the one the model was released with, beyond chance."
    if change.low > 0:
        return "The AUROC is higher than as released, beyond chance: ask whether the cases here are easier."
    return "No clear difference to the AUROC the model was released with; the interval says how much may be hidden."


def _table(inside: Evaluation, outside: Evaluation, changes: Mapping[str, Score]) -> Table:
    rows = tuple(
        (metric_name(name), compact(outside.metrics[name]), compact(inside.metrics[name]), compact(score))
        for name, score in changes.items()
    )
    return Table("Here, and as released", ("Metric", "Here", "As released", "Here minus as released"), rows)
