"""Whether a comparison with a network from scratch was fair: how both were trained, what to know before believing it.

An interval says what chance may have done; it does not say that the reference had a tenth of the learning rate, stopped
while it was still improving, or collapsed. Those have each made transfer look better than it is (docs/log.md), so they
are looked for in the records of both trainings, and shown whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from medtl.records import Checkpoint, Comparison
from medtl.report.facts import Facts
from medtl.report.figures import COLOURS, STYLE, as_svg
from medtl.report.tables import Table
from medtl.report.words import DASH, metric_name, number, verdict

_TAIL = 5  # the last epochs are a fifth of all
_RATIO = 3.0  # of two learning rates, from which they are called different
_LEAST = 0.005  # gain on validation that is more than the noise of an epoch
_SHARE = 0.25  # of the difference on test, from which the loser's gain in its last epochs counts
_FALL = 0.05  # from the best epoch to the last ones


@dataclass(frozen=True, slots=True)
class Training:
    """How a network was trained, or the mean of how several were on folds; ``None`` where it cannot be told."""

    parameters: int
    epochs: float
    rate: float | None  # highest, of the last phase in which all of it learned
    metric: str  # on validation
    best: float | None
    gain: float | None  # of the best value in the last fifth of the epochs over the best one before
    fall: float | None  # from the best value to the best one in the last fifth
    courses: tuple[tuple[tuple[int, float], ...], ...]  # of each network: epoch, and the metric on validation


@dataclass(frozen=True, slots=True)
class Terms:
    """Both trainings, and what a reader should know before believing their difference."""

    transfer: Training
    scratch: Training
    cautions: tuple[str, ...]

    def table(self) -> Table:
        """Tabulate both trainings side by side."""
        sides = (self.transfer, self.scratch)
        rows = (
            ("Parameters", *(f"{one.parameters:,}" for one in sides)),
            ("Epochs", *(f"{one.epochs:g}" for one in sides)),
            ("Highest learning rate where all of it learned", *(_rate(one.rate) for one in sides)),
            (f"Best {metric_name(sides[0].metric)} on validation", *(number(one.best) for one in sides)),
            ("Gained in the last fifth of the epochs", *(number(one.gain) for one in sides)),
        )
        return Table("How both were trained", ("What", "With transfer", "From scratch"), rows, frozenset({1, 2}))

    def plain(self) -> dict[str, Any]:
        """Give the same for machines."""
        return asdict(self)


def of(facts: Facts) -> Terms | None:
    """Give the terms of a report's comparison; ``None`` where there is no network from scratch."""
    return None if facts.scratch is None else terms([facts.checkpoint], [facts.scratch], facts.comparison)


def terms(transfer: Sequence[Checkpoint], scratch: Sequence[Checkpoint], comparison: Comparison | None = None) -> Terms:
    """Put both trainings side by side, and say where they were not alike.

    Args:
        transfer: the network of one run, or those of the folds.
        scratch: the same without weights.
        comparison: of both on the test part; without it only what needs no difference is said.
    """
    one, other = _training(transfer), _training(scratch)
    if all(checkpoint.weights.share == 0 for checkpoint in transfer):
        return Terms(one, other, ())  # the page says that nothing was transferred
    found = (_rates(one, other), _lengths(one, other), _unfinished(one, other, comparison), _collapse(other),
             _chance(comparison))  # fmt: skip
    return Terms(one, other, tuple(caution for caution in found if caution))


def curves(both: Terms) -> str | None:
    """Draw what validation showed of both over the epochs, a line for each network; ``None`` where one has none."""
    sides = ((both.transfer, "with transfer", COLOURS[0], "-"), (both.scratch, "from scratch", COLOURS[1], "--"))
    if any(len(course) < 2 for one, *_ in sides for course in one.courses):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        axes: Any = figure.subplots()
        for one, name, colour, style in sides:
            for number, course in enumerate(one.courses):
                epochs, values = zip(*course, strict=True)
                axes.plot(epochs, values, style, color=colour, lw=1.4, label=name if number == 0 else None)
        axes.set(xlabel="Epoch", ylabel=f"{metric_name(both.scratch.metric)} on validation")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend(loc="lower right")
        return as_svg(figure)


def _training(checkpoints: Sequence[Checkpoint]) -> Training:
    first, courses = checkpoints[0], tuple(_course(checkpoint) for checkpoint in checkpoints)
    ends = [found for course in courses if (found := _ends([value for _, value in course])) is not None]
    everything = [phase for phase in first.phases if not phase.frozen and phase.head == "gradient"]
    return Training(
        parameters=first.parameters,
        epochs=fmean(len(one.history) for one in checkpoints),
        rate=max(everything[-1].learning_rates.values(), default=None) if everything else None,
        metric="dice" if first.head == "mask" else "auroc",
        best=_mean([max(value for _, value in course) for course in courses if course]),
        gain=_mean([max(0.0, late - early) for early, late in ends]),
        fall=_mean([max(0.0, early - late) for early, late in ends]),
        courses=courses,
    )


def _course(checkpoint: Checkpoint) -> tuple[tuple[int, float], ...]:
    """Give what validation showed, epoch by epoch; not every epoch of a segmentation is validated."""
    masks = checkpoint.head == "mask"
    found = (
        (number, 1 - epoch.val_loss if masks else epoch.val_auroc) for number, epoch in enumerate(checkpoint.history, 1)
    )  # a segmentation minimises 1 - Dice on validation
    return tuple((number, value) for number, value in found if value is not None and math.isfinite(value))


def _ends(course: Sequence[float]) -> tuple[float, float] | None:
    """Give the best value before the last fifth and the best one in it; none of few epochs."""
    if len(course) < _TAIL:
        return None
    tail = max(1, round(len(course) / _TAIL))
    return max(course[:-tail]), max(course[-tail:])


def _rates(transfer: Training, scratch: Training) -> str:
    if transfer.rate is None or scratch.rate is None:
        return ""
    high, low = max(transfer.rate, scratch.rate), min(transfer.rate, scratch.rate)
    if high < _RATIO * low:
        return ""
    return (
        f"From scratch learned at a rate of {scratch.rate:.2g}, with transfer at {transfer.rate:.2g} where all of it "
        "learned. Part of the difference may be the rate's: set model.scratch_phases alike, or find a rate for each by "
        "medtl lr-find."
    )


def _lengths(transfer: Training, scratch: Training) -> str:
    if scratch.epochs >= transfer.epochs:
        return ""
    return (
        f"From scratch was trained for {_counted(scratch.epochs)}, with transfer for {transfer.epochs:g}. "
        "Give model.scratch_phases as many."
    )


def _unfinished(transfer: Training, scratch: Training, comparison: Comparison | None) -> str:
    """Say that the side that lost was still improving when it stopped."""
    won = "not estimable" if comparison is None else verdict(comparison)
    if comparison is None or comparison.difference.value is None or won not in ("helped", "hurt"):
        return ""
    name, loser = ("From scratch", scratch) if won == "helped" else ("With transfer", transfer)
    least = max(_LEAST, _SHARE * abs(comparison.difference.value)) if comparison.metric == loser.metric else _LEAST
    if loser.gain is None or loser.gain < least:
        return ""
    return (
        f"{name} was still improving when it stopped: {number(loser.gain)} of {metric_name(loser.metric)} on "
        "validation in the last fifth of its epochs. More epochs may take away part of the difference."
    )


def _collapse(scratch: Training) -> str:
    if scratch.best is None or scratch.fall is None or scratch.fall < _FALL:
        return ""
    return (
        f"From scratch fell back: the best {metric_name(scratch.metric)} of its last epochs on validation is "
        f"{number(scratch.fall)} below its best, {number(scratch.best)}. A reference that collapses makes the other "
        "side look better than it is; try a lower rate in model.scratch_phases."
    )


def _chance(comparison: Comparison | None) -> str:
    if comparison is None or comparison.metric != "auroc":
        return ""
    low = comparison.reference_score.low
    if low is None or low > 0.5:
        return ""
    return (
        "From scratch may have learned nothing: the interval of its AUROC reaches .5. The difference then says how "
        "good the other one is, and little about transfer; see whether from scratch learns with more epochs or another "
        "rate."
    )


def _counted(epochs: float) -> str:
    return "one epoch" if epochs == 1 else f"{epochs:g} epochs"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _rate(rate: float | None) -> str:
    return DASH if rate is None else f"{rate:.2g}"
