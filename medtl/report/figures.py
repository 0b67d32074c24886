"""Plots as SVG text: the same facts give the same bytes.

Drawn on a ``Figure`` of its own, not through pyplot, so nothing is kept between calls. The background is clear, for
the page to turn dark. Names from data are drawn as they are, never as mathematics.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from medtl.records import Checkpoint, Comparison, Curve, Epoch, Evaluation
from medtl.report.words import label_score

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


def roc(evaluation: Evaluation) -> str | None:
    """Draw the ROC curves with the operating points marked; ``None`` where there is no curve."""
    curves = _curves(evaluation, "roc")
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


def calibration(evaluation: Evaluation) -> str | None:
    """Draw observed share over mean probability; a point's area follows its studies. ``None`` without a curve."""
    curves = _curves(evaluation, "calibration")
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("Predicted probability", "Observed share")
        axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=(0, (3, 3)))
        most = max((w for curve in curves for w in curve.weight), default=1.0) or 1.0
        for curve, colour in zip(curves, COLOURS, strict=False):
            axes.plot(curve.x, curve.y, color=colour, lw=1.2, label=drawable(curve.label))
            areas = [12 + 130 * w / most for w in curve.weight] or 24
            axes.scatter(curve.x, curve.y, s=areas, color=colour, alpha=0.75, lw=0)
        axes.legend(loc="upper left")
        return as_svg(figure)


def difference(comparison: Comparison) -> str | None:
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
        axes.set(xlim=(-reach, reach), ylim=(-1, 1), yticks=[], xlabel="Transfer minus scratch")
        for side, name in ((-1, "lower with transfer"), (1, "higher with transfer")):
            axes.text(side * 0.02 * reach, 0.72, name, ha="left" if side > 0 else "right", size=8.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        return as_svg(figure)


def drawable(text: str, longest: int = LONGEST_NAME) -> str:
    """Shorten a name and replace what the font of the plots cannot draw."""
    known = get_font(findfont(FONT)).get_charmap()
    line = "".join(c if ord(c) in known and c.isprintable() else "□" for c in " ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _curves(evaluation: Evaluation, kind: str) -> list[Curve]:
    return [curve for curve in evaluation.curves if curve.kind == kind and curve.x][:MOST_CURVES]


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
