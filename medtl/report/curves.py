"""Plot of a search over learning rates and the page that shows it, in the style of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from medtl.report.figures import COLOURS, FAINT, STYLE, as_svg, drawable
from medtl.report.page import as_data, sealed

_HEADROOM = 1.5  # losses above this many times the first are cut off: the end would flatten all before it
_NARROWEST = 1e-3  # the least height of the plot, in units of the loss


def range_test(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marks: Mapping[str, float | None]
) -> str:
    """Draw the loss over the learning rate as SVG; the same numbers give the same bytes.

    Args:
        marks: name to learning rate; None is left out.
    """
    present = {name: rate for name, rate in marks.items() if rate is not None}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.semilogx(rates, losses, color=FAINT, lw=1, label="each batch")
        axes.semilogx(rates, smoothed, color=COLOURS[0], label="smoothed")
        for (name, rate), colour in zip(present.items(), COLOURS[1:], strict=False):
            axes.axvline(rate, color=colour, lw=1.2, ls=(0, (4, 3)), label=f"{drawable(name)}: {rate:.1e}")
        axes.set(xlabel="Learning rate of the head", ylabel="Loss")
        axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:.0e}")  # powers would be set as mathematics
        if losses:
            axes.set(ylim=_limits(losses, smoothed))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return as_svg(figure)


def _limits(losses: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    values = np.asarray([*losses, *smoothed])
    low, top = float(values.min()), min(float(values.max()), _HEADROOM * max(losses[0], smoothed[0]))
    margin = 0.05 * max(top - low, _NARROWEST)
    return low - margin, top + margin


def page(title: str, svg: str, rows: Sequence[tuple[str, str]]) -> str:
    """Write the page of a range test: its curve, and what was read off it."""
    return sealed(
        "curves.html.jinja",
        title=title,
        figure=as_data(svg),
        rows=rows,
    )
