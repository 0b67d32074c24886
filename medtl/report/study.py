"""A study on one page: strategies side by side, and what they make of fewer patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from medtl.records import Score, Trial
from medtl.report import figures
from medtl.report.figures import COLOURS, STYLE, as_svg, drawable
from medtl.report.page import as_data, sealed
from medtl.report.tables import Table
from medtl.report.words import DASH, interval, number, p_value

_CHANCE = 0.05
_SHOWN = ("auroc", "average_precision", "balanced_accuracy", "brier")


def render(title: str, trials: Sequence[Trial], curve: Sequence[Trial], facts: Mapping[str, Any]) -> str:
    """Write the page; the same trials give the same text."""
    drawn = {"forest": forest(trials), "curve": learning_curve(curve)}
    return sealed(
        "study.html.jinja",
        title=title,
        facts=facts,
        verdict=verdict(trials),
        cautions={"strategies": cautions(trials), "curve": cautions(curve, sizes=True)},
        strategies=_table("Strategies on the test part", trials, curve=False),
        points=_table("Fewer training patients", curve, curve=True),
        parts=_parts(facts),
        figures={name: None if svg is None else as_data(svg) for name, svg in drawn.items()},
    )


def as_json(trials: Sequence[Trial], curve: Sequence[Trial], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Give everything on the page as plain values."""
    return {**facts, "strategies": [asdict(t) for t in trials], "curve": [asdict(t) for t in curve]}


def verdict(trials: Sequence[Trial]) -> str:
    """Say in a sentence or two what the differences to training from scratch allow to say, all of them together.

    Beyond chance is what the interval of the difference says and the p value, corrected for the number of strategies.
    """
    compared = [t for t in trials if t.difference is not None and t.difference.low is not None]
    if not compared:
        return "There is no comparison with training from scratch."
    sure = [t for t in compared if t.p_value is None or t.p_value < _CHANCE]
    better = [t.strategy for t in sure if t.difference and t.difference.low is not None and t.difference.low > 0]
    worse = [t.strategy for t in sure if t.difference and t.difference.high is not None and t.difference.high < 0]
    said = []
    if better:
        said.append(f"Better than from scratch, beyond chance: {', '.join(better)}.")
    if worse:
        said.append(f"Worse than from scratch, beyond chance: {', '.join(worse)}.")
    unclear = [t.strategy for t in compared if t.strategy not in (*better, *worse)]
    if unclear:
        said.append(f"No clear difference from scratch: {', '.join(unclear)}.")
    return " ".join(said)


def cautions(trials: Sequence[Trial], sizes: bool = False) -> tuple[str, ...]:
    """List what to know before believing the differences to the network from scratch, each with whose they are.

    Args:
        sizes: name the number of patients too.
    """
    found: dict[str, list[str]] = {}
    for trial in trials:
        for caution in trial.cautions:
            found.setdefault(caution, []).append(f"{trial.strategy}, {trial.patients:,}" if sizes else trial.strategy)
    return tuple(f"{caution} ({'; '.join(names)})" for caution, names in found.items())


def forest(trials: Sequence[Trial]) -> str | None:
    """Draw the AUROC of each strategy with its interval; ``None`` where none has one."""
    shown = [(t.strategy, s) for t in trials if (s := t.scores.get("auroc")) is not None and _has_interval(s)]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.75 + 0.34 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for place, (_, score) in enumerate(reversed(shown)):
            assert score.value is not None and score.low is not None and score.high is not None
            axes.plot(
                [score.low, score.high], [place, place], color=COLOURS[0], lw=4, alpha=0.45, solid_capstyle="round"
            )
            axes.plot([score.value], [place], "o", ms=7, color=COLOURS[0])
        axes.set(xlabel="AUROC", ylim=(-0.6, len(shown) - 0.4))
        axes.set_yticks(range(len(shown)), [drawable(name) for name, _ in reversed(shown)])
        axes.grid(axis="y", visible=False)
        return as_svg(figure)


def learning_curve(curve: Sequence[Trial]) -> str | None:
    """Draw the AUROC against the number of training patients, a line and a band for each strategy."""
    lines: dict[str, list[tuple[int, Score]]] = {}
    for one in curve:
        lines.setdefault(one.strategy, []).append((one.patients, one.scores["auroc"]))
    return figures.learning_curve(lines, "AUROC", 0.5)


def _has_interval(score: Score) -> bool:
    return score.value is not None and score.low is not None and score.high is not None


def _table(caption: str, trials: Sequence[Trial], curve: bool) -> Table:
    head = ("Strategy", "Patients", "Studies", "AUROC", "Average precision", "Balanced accuracy", "Brier",
            "AUROC minus scratch", "p (Holm)", "Kept phase", "Seconds")  # fmt: skip
    rows = tuple(
        (
            t.strategy,
            f"{t.patients:,}" + (f" ({t.share:.0%})" if curve else ""),
            f"{t.studies:,}",
            *(interval(t.scores[m]) if m in t.scores else DASH for m in _SHOWN),
            interval(t.difference) if t.difference is not None else DASH,
            p_value(t.p_value),
            t.phase,
            number(t.seconds, 0),
        )
        for t in trials
    )
    return Table(caption, head, rows, frozenset({1, 2, 8, 10}))


def _parts(facts: Mapping[str, Any]) -> Table:
    rows = tuple((part, f"{n['studies']:,}", f"{n['patients']:,}") for part, n in facts["parts"].items())
    return Table("Parts", ("Part", "Studies", "Patients"), rows, frozenset({1, 2}))
