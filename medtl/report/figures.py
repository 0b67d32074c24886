"""Plots as SVG text: the same facts give the same bytes.

Drawn on a ``Figure`` of its own, not through pyplot, so nothing is kept between calls. The background is clear, for
the page to turn dark. Names from data are drawn as they are, never as mathematics.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from medtl.records import Checkpoint, Comparison, Curve, Epoch, Evaluation, Score, Subgroup, SubgroupFindings
from medtl.report.facts import HISTOGRAM_BINS, Facts, Histogram
from medtl.report.words import label_name, label_score, metric_name

FONT = "DejaVu Sans"
COLOURS = ("#0b6e75", "#b3541e", "#5a4fa3", "#7a7d1c", "#a8325e", "#3b74b9", "#6b5344", "#3d8b4f")
INK, FAINT = "#33414d", "#b8c1c9"
LONGEST_NAME = 28
MOST_CURVES = len(COLOURS)
STYLE = {
    "svg.hashsalt": "medtl",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.family": FONT,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def training_curves(checkpoint: Checkpoint) -> str:
    """Draw loss and validation AUROC over all epochs, with the borders of the phases."""
    history = checkpoint.history
    epochs = range(1, len(history) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        loss, auroc = figure.subplots(1, 2)
        loss.plot(epochs, [e.train_loss for e in history], color=COLOURS[1], marker="o", ms=3, label="training")
        loss.plot(epochs, [e.val_loss for e in history], color=COLOURS[0], marker="o", ms=3, label="validation")
        loss.set(ylabel="Loss")
        loss.legend(loc="upper right")
        values = [float("nan") if e.val_auroc is None else e.val_auroc for e in history]
        auroc.plot(epochs, values, color=COLOURS[0], marker="o", ms=3)
        auroc.set(ylabel="AUROC on validation")
        _mark_kept(auroc, checkpoint, values)
        for axes in (loss, auroc):
            axes.set(xlabel="Epoch", xlim=(0.5, len(history) + 0.5))
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            _mark_phases(axes, history)
        return as_svg(figure)


def _mark_phases(axes: Any, history: Sequence[Epoch]) -> None:
    starts = [i for i, e in enumerate(history) if i == 0 or e.phase != history[i - 1].phase]
    for start, end in zip(starts, [*starts[1:], len(history)], strict=True):
        if start:
            axes.axvline(start + 0.5, color=INK, lw=0.8, ls=(0, (3, 3)))
        middle = (start + end + 1) / 2
        axes.text(middle, 1.02, drawable(history[start].phase, 14), ha="center", size=8.5,
                  transform=axes.get_xaxis_transform())  # fmt: skip


def _mark_kept(axes: Any, checkpoint: Checkpoint, values: Sequence[float]) -> None:
    kept = {(phase.name, phase.best_epoch) for phase in checkpoint.phases if phase.kept}
    for index, epoch in enumerate(checkpoint.history):
        if (epoch.phase, epoch.epoch) in kept:
            axes.plot([index + 1], [values[index]], "o", ms=9, mfc="none", mec=COLOURS[1], mew=1.6, label="kept")
            axes.legend(loc="lower right")


def learning_curve(lines: Mapping[str, Sequence[tuple[int, Score]]], name: str, chance: float | None) -> str | None:
    """Draw a score against the number of training patients, a line and a band for each name.

    ``None`` where no line has two points with an interval.

    Args:
        lines: name to (patients, score), in any order; a line alone may go without a name.
        name: of the score.
        chance: its value by chance, drawn as a line; None where there is none.
    """
    drawn = {
        label: sorted(
            (patients, one.value, one.low, one.high)
            for patients, one in points
            if one.value is not None and one.low is not None and one.high is not None
        )
        for label, points in lines.items()
    }
    if not any(len(points) > 1 for points in drawn.values()):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for (label, points), colour, marker in zip(drawn.items(), COLOURS, "osD^vP*X", strict=False):
            sizes, values, lows, highs = zip(*points, strict=True) if points else ((), (), (), ())
            axes.fill_between(sizes, lows, highs, color=colour, alpha=0.13, lw=0)
            axes.plot(sizes, values, color=colour, marker=marker, ms=5, label=drawable(label))
        every = sorted({point[0] for points in drawn.values() for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(size) for size in every])
        axes.minorticks_off()
        axes.set(xlabel="Training patients", ylabel=name)
        if chance is not None:
            axes.axhline(chance, color=INK, lw=0.8, ls=":")
        if any(drawn):
            axes.legend()
        return as_svg(figure)


def growth(facts: Facts) -> str | None:
    """Draw the learning curve of a model; ``None`` where there is none, or one point alone."""
    if facts.growth is None:
        return None
    points = [(one.patients, one.score) for one in facts.growth.points]
    metric = facts.growth.points[-1].score.metric
    return learning_curve({"": points}, f"{metric_name(metric)} on validation", 0.5 if metric == "auroc" else None)


def roc(evaluation: Evaluation) -> str | None:
    """Draw the ROC curves with the operating points marked; ``None`` where there is no curve."""
    curves = _curves(evaluation.curves, "roc")
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("1 − specificity", "Sensitivity")
        axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=(0, (3, 3)))
        for curve, colour in zip(curves, COLOURS, strict=False):
            area = label_score(evaluation, "auroc", curve.label)
            value = "" if area is None or area.value is None else f"  {area.value:.3f}"
            axes.plot(curve.x, curve.y, color=colour, label=f"{drawable(curve.label)}{value}")
            _mark_operating_point(axes, evaluation, curve.label, colour)
        axes.legend(loc="lower right", title="AUROC", alignment="left")
        return as_svg(figure)


def _mark_operating_point(axes: Any, evaluation: Evaluation, label: str, colour: str) -> None:
    sensitivity, specificity = (label_score(evaluation, metric, label) for metric in ("sensitivity", "specificity"))
    if sensitivity is None or specificity is None or sensitivity.value is None or specificity.value is None:
        return
    axes.plot([1 - specificity.value], [sensitivity.value], "o", ms=8, mfc="white", mec=colour, mew=2, zorder=5)


def precision_recall(evaluation: Evaluation) -> str | None:
    """Draw PPV over sensitivity with the share of the finding as the line of chance; ``None`` without a curve."""
    curves = _curves(evaluation.curves, "pr")
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("Sensitivity", "Positive predictive value")
        for curve, colour in zip(curves, COLOURS, strict=False):
            area = label_score(evaluation, "average_precision", curve.label)
            value = "" if area is None or area.value is None else f"  {area.value:.3f}"
            axes.plot(curve.x, curve.y, color=colour, label=f"{drawable(curve.label)}{value}")
            share = label_score(evaluation, "prevalence", curve.label)
            if share is not None and share.value is not None:
                axes.axhline(share.value, color=colour, lw=1, ls=(0, (3, 3)), alpha=0.6)
        axes.legend(loc="best", title="Average precision", alignment="left")
        return as_svg(figure)


def calibration(after: Sequence[Curve], before: Sequence[Curve] = ()) -> str | None:
    """Draw observed share over mean probability; a point's area follows its studies. ``None`` without a curve."""
    curves = _curves(after, "calibration")
    if not curves:
        return None
    old = {curve.label: curve for curve in _curves(before, "calibration")}
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("Predicted probability", "Observed share")
        axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=(0, (3, 3)))
        most = max((w for curve in curves for w in curve.weight), default=1.0) or 1.0
        for curve, colour in zip(curves, COLOURS, strict=False):
            if (raw := old.get(curve.label)) is not None:
                axes.plot(raw.x, raw.y, color=colour, lw=1.1, ls=(0, (2, 2)), alpha=0.7)
            axes.plot(curve.x, curve.y, color=colour, lw=1.2, label=drawable(curve.label))
            areas = [12 + 130 * w / most for w in curve.weight] or 24
            axes.scatter(curve.x, curve.y, s=areas, color=colour, alpha=0.75, lw=0)
        axes.legend(loc="upper left")
        return as_svg(figure)


def decision(evaluation: Evaluation) -> str | None:
    """Draw the net benefit of the model over the threshold, beside treating all and none; ``None`` without a curve."""
    curves = _curves(evaluation.curves, "decision")
    if not curves:
        return None
    everybody = {curve.label: curve for curve in _curves(evaluation.curves, "decision_all")}
    highest = max(max(_numbers(line.y), default=0.0) for line in (*curves, *everybody.values()))
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("Threshold probability", "Net benefit")
        axes.axhline(0, color=INK, lw=1, label="none")
        for curve, colour in zip(curves, COLOURS, strict=False):
            axes.plot(curve.x, curve.y, color=colour, label=drawable(curve.label))
            if (treated := everybody.get(curve.label)) is not None:
                name = "all" if len(curves) == 1 else None
                axes.plot(treated.x, treated.y, color=colour, lw=1.1, ls=(0, (3, 2)), label=name)
        top = max(0.05, 1.08 * highest)
        axes.set(ylim=(-0.35 * top, top), aspect="auto")
        axes.legend(loc="upper right")
        return as_svg(figure)


def histograms(counted: Sequence[Histogram]) -> str | None:
    """Draw how many studies with and without each finding have which probability; ``None`` without counts."""
    shown = [made for made in counted if sum(made.absent) + sum(made.present)][:MOST_CURVES]
    if not shown:
        return None
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    edges = [i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.4 + 2.3 * down), layout="constrained")
        for axes, made in zip(figure.subplots(down, across, squeeze=False).flat, shown, strict=False):
            for counts, sign, colour, name in (
                (made.present, 1, COLOURS[1], "with"),
                (made.absent, -1, COLOURS[0], "without"),
            ):
                heights = [sign * count for count in counts]
                axes.bar(edges, heights, 0.9 / HISTOGRAM_BINS, align="edge", color=colour, label=name)
            axes.axhline(0, color=INK, lw=0.8)
            axes.set(xlim=(0, 1), xlabel="Predicted probability", ylabel="Studies", title=drawable(made.label))
            axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="best")
        for axes in figure.axes[len(shown) :]:
            axes.remove()
        return as_svg(figure)


def forest(findings: SubgroupFindings, evaluation: Evaluation, metric: str = "auroc") -> str | None:
    """Draw one metric of every group that may be shown beside that of all; ``None`` where no group has it.

    Of several classes, the one with the largest gap, because a mean would hide it.
    """
    label = forest_label(findings)
    rows = [(group, score) for group in findings.groups if (score := _shown(group, metric, label)) is not None]
    if not rows:
        return None
    whole = label_score(evaluation, metric, label) if label is not None else None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.9 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        if whole is not None and whole.value is not None:
            axes.axvline(whole.value, color=INK, lw=0.9, ls=(0, (3, 3)))
        for place, (_, score) in enumerate(reversed(rows)):
            assert score.value is not None
            if score.low is not None and score.high is not None:
                axes.plot([score.low, score.high], [place, place], color=COLOURS[0], lw=4, alpha=0.45,
                          solid_capstyle="round")  # fmt: skip
            axes.scatter([score.value], [place], s=49, color=COLOURS[0], zorder=3)
        names = [drawable(f"{group.column}: {group.value}  (n {score.n})", 48) for group, score in reversed(rows)]
        axes.set_yticks(range(len(rows)), names)
        title = metric_name(metric) if label is None else f"{metric_name(metric)}, {label_name(label, ())}"
        axes.set(xlabel=drawable(title, 60), ylim=(-0.6, len(rows) - 0.4))
        axes.grid(axis="y", visible=False)
        return as_svg(figure)


def forest_label(findings: SubgroupFindings) -> str | None:
    """Give the class that the forest is drawn for: the one with the largest gap, else the last."""
    gaps = [gap for gap in findings.gaps if gap.difference.value is not None]
    if gaps:
        return max(gaps, key=lambda gap: gap.difference.value or 0.0).label
    return findings.groups[-1].label if findings.groups else None


def _shown(group: Subgroup, metric: str, label: str | None) -> Score | None:
    return next((s for s in group.scores if s.metric == metric and group.label == label and s.value is not None), None)


def _numbers(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def difference(comparison: Comparison, names: tuple[str, str] = ("transfer", "scratch")) -> str | None:
    """Draw the difference with its interval against the line of no difference; ``None`` where not estimable."""
    score = comparison.difference
    if score.value is None or score.low is None or score.high is None:
        return None
    reach = 1.25 * max(abs(score.low), abs(score.high), abs(score.value), 0.01)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.45), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=INK, lw=1)
        axes.plot([score.low, score.high], [0, 0], color=COLOURS[0], lw=4, solid_capstyle="round", alpha=0.45)
        axes.plot([score.value], [0], "o", ms=9, color=COLOURS[0])
        axes.set(xlim=(-reach, reach), ylim=(-1, 1), yticks=[], xlabel=f"{names[0].capitalize()} minus {names[1]}")
        for side, name in ((-1, f"lower with {names[0]}"), (1, f"higher with {names[0]}")):
            axes.text(side * 0.02 * reach, 0.72, name, ha="left" if side > 0 else "right", size=8.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        return as_svg(figure)


def drawable(text: str, longest: int = LONGEST_NAME) -> str:
    """Shorten a name and replace what the font of the plots cannot draw."""
    known = get_font(findfont(FONT)).get_charmap()
    line = "".join(c if ord(c) in known and c.isprintable() else "□" for c in " ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _curves(curves: Sequence[Curve], kind: str) -> list[Curve]:
    return [curve for curve in curves if curve.kind == kind and curve.x][:MOST_CURVES]


def _square(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.5, 4.3), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure, axes


def as_svg(figure: Figure) -> str:
    """Write a figure as SVG text."""
    FigureCanvasSVG(figure)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue()
