"""Whether a comparison with a network from scratch was fair: how both were trained, what to know before believing it.

An interval says what chance may have done; it does not say that the reference had a tenth of the learning rate, stopped
while it was still improving, or collapsed. Those have each made transfer look better than it is (docs/log.md), so they
are looked for in the records of both trainings, and shown whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from medtl.records import Checkpoint, Comparison
from medtl.report.facts import Facts
from medtl.report.figures import COLOURS, STYLE, as_svg
from medtl.report.tables import Table
from medtl.report.words import DASH, metric_name, number, verdict

# Conventions, all of them.
_LAST = 0.2  # share of the epochs that are called the last ones
_RATIO = 3.0  # from which a learning rate is called another one
_SHORTER = 0.8  # share of the other's epochs, below which a training is called shorter
_LEAST = 0.005  # rise on validation that could matter
_SHARE = 0.25  # of the difference on test, from which the loser's rise counts
_FALL = 0.05  # below the best epochs
_LOSS = 1.5  # times the first training's loss, from which a second one is said to have gone otherwise
_FEWEST = 5  # looks at validation that a change can be told from
_ERRORS = {"rise": 3.0, "fall": 5.0}  # standard errors that must be exceeded; a collapse is nothing subtle
_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_NOTHING = "Nothing was transferred: the network that is compared started from random weights too."


@dataclass(frozen=True, slots=True)
class Training:
    """How a network was trained, or how several were on folds; ``None`` where it cannot be told.

    The last epochs are the last fifth; what is compared with them are means over as many, so that no single lucky epoch
    counts, and the error of their difference, from the scatter of epoch to epoch, tells chance from change. Validation
    watched the first training of each network; of a second one, on validation too, there is the loss alone.
    """

    parameters: int
    epochs: float  # mean
    rate: float | None  # highest, of the phases in which all of it learned
    metric: str  # on validation
    best: float | None  # mean over the networks that know it
    rise: float | None  # mean: from the fourth fifth of the epochs to the last
    rise_error: float | None  # ``None`` where a fifth has but one value
    fallen: tuple[float, ...]  # of each network that fell back: from its best epochs to the last ones
    courses: tuple[tuple[tuple[int, float], ...], ...]  # of each network: epoch, and the metric on validation
    again: float | None  # mean epochs of the second trainings
    strayed: tuple[float, ...]  # of each second training that ended far above the first one's loss: how many times it


@dataclass(frozen=True, slots=True)
class Terms:
    """Both trainings, and what a reader should know before believing their difference."""

    transfer: Training
    scratch: Training
    transferred: bool
    cautions: tuple[str, ...]

    @property
    def twice(self) -> bool:
        """Whether what was tested comes from a second training."""
        return self.transfer.again is not None or self.scratch.again is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """The cautions, or that nothing was transferred, where no sentence beside them says so."""
        return self.cautions if self.transferred else (_NOTHING,)

    def table(self) -> Table:
        """Tabulate both trainings side by side."""
        sides = (self.transfer, self.scratch)
        name = metric_name(sides[0].metric)
        rows = (
            ("Parameters", *(f"{one.parameters:,}" for one in sides)),
            ("Epochs", *(f"{one.epochs:g}" for one in sides)),
            ("Highest learning rate where all of it learned", *(_rate(one.rate) for one in sides)),
            (f"Best {name} on validation", *(_best(one) for one in sides)),
            ("Its rise in the last fifth of the epochs", *(number(one.rise) for one in sides)),
            *([("Epochs of the second training", *(_epochs(one.again) for one in sides))] if self.twice else []),
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
        return Terms(one, other, False, ())
    found = (_rates(one, other), _lengths(one, other), _unfinished(one, other, comparison), _collapse(other),
             _strayed(one, other), _chance(comparison))  # fmt: skip
    return Terms(one, other, True, tuple(caution for caution in found if caution))


def curves(both: Terms) -> str | None:
    """Draw what validation showed of both over the epochs, a line for each network; ``None`` where a side has none."""
    sides = ((both.transfer, "with transfer", COLOURS[0], "-"), (both.scratch, "from scratch", COLOURS[1], "--"))
    lines = [[course for course in one.courses if len(course) > 1] for one, *_ in sides]
    if not all(lines):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        axes: Any = figure.subplots()
        for courses, (_, name, colour, style) in zip(lines, sides, strict=True):
            for place, course in enumerate(courses):
                axes.plot(*zip(*course, strict=True), style, color=colour, lw=1.4, label=None if place else name)
        axes.set(xlabel="Epoch", ylabel=f"{metric_name(both.scratch.metric)} on validation")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend(loc="lower right")
        return as_svg(figure)


def _training(checkpoints: Sequence[Checkpoint]) -> Training:
    first, courses = checkpoints[0], tuple(_course(checkpoint) for checkpoint in checkpoints)
    rates = [rate for phase in first.phases if not phase.frozen and phase.head == "gradient"
             for rate in phase.learning_rates.values()]  # fmt: skip
    changes = [
        _changes(course, len(checkpoint.history)) for course, checkpoint in zip(courses, checkpoints, strict=True)
    ]
    rises = [change.rise for change in changes if change.rise is not None]
    errors = [change.error for change in changes if change.rise is not None and change.several]
    again = [one.refit for one in checkpoints if one.refit is not None]
    losses = [_times_the_loss(one) for one in checkpoints]
    return Training(
        parameters=first.parameters,
        epochs=fmean(len(one.history) for one in checkpoints),
        rate=max(rates, default=None),
        metric="dice" if first.head == "mask" else "auroc",
        best=_mean([max(value for _, value in course) for course in courses if course]),
        rise=_mean(rises),
        rise_error=math.hypot(*errors) / len(errors) if errors and len(errors) == len(rises) else None,
        fallen=tuple(change.fall for change in changes if change.fall > max(_FALL, _ERRORS["fall"] * change.error)),
        courses=courses,
        again=_mean([len(one.history) for one in again]),
        strayed=tuple(times for times in losses if times is not None and times >= _LOSS),
    )


def _times_the_loss(checkpoint: Checkpoint) -> float | None:
    """Compare the loss that a second training ended with to the first one's at the state that was kept.

    More patients are learned from, so a little more is to be expected.
    """
    if checkpoint.refit is None or not checkpoint.refit.history:
        return None
    kept = next(phase for phase in checkpoint.phases if phase.kept)
    of_phase = [epoch.train_loss for epoch in checkpoint.history if epoch.phase == kept.name]
    first, last = of_phase[kept.best_epoch - 1], checkpoint.refit.history[-1].train_loss
    return last / first if first > 0 else None


@dataclass(frozen=True, slots=True)
class _Change:
    rise: float | None  # ``None``: too few epochs before the last ones
    fall: float
    error: float  # standard error of either
    several: bool  # values in either of the last fifths


def _changes(course: Sequence[tuple[int, float]], epochs: int) -> _Change:
    """Tell how the last fifth of a training went, of however many of its epochs were validated."""
    values = [value for _, value in course]
    last = sum(epoch > (1 - _LAST) * epochs for epoch, _ in course)
    if len(values) < _FEWEST or not last:
        return _Change(None, 0.0, 0.0, several=False)
    before = [value for epoch, value in course if (1 - 2 * _LAST) * epochs < epoch <= (1 - _LAST) * epochs]
    means = [fmean(values[start : start + last]) for start in range(len(values) - last + 1)]
    settled = values[len(values) // 3 :]  # the first epochs learn most: their steps are no scatter
    steps = [later - earlier for earlier, later in pairwise(settled)]
    scatter = _NORMAL * median(abs(step - median(steps)) for step in steps) / math.sqrt(2)
    fewest = min(len(before), last)
    error = scatter * math.sqrt(2 / max(fewest, 1))
    rise = means[-1] - fmean(before) if before else None
    return _Change(rise, max(means) - means[-1], error, several=fewest > 1)


def _course(checkpoint: Checkpoint) -> tuple[tuple[int, float], ...]:
    """Give what validation showed, epoch by epoch; not every epoch of a segmentation is validated."""
    masks = checkpoint.head == "mask"
    found = (
        (number, 1 - epoch.val_loss if masks else epoch.val_auroc) for number, epoch in enumerate(checkpoint.history, 1)
    )  # a segmentation minimises 1 - Dice on validation
    return tuple((number, value) for number, value in found if value is not None and math.isfinite(value))


def _rates(transfer: Training, scratch: Training) -> str:
    if transfer.rate is None or scratch.rate is None or transfer.rate < _RATIO * scratch.rate:
        return ""
    return (
        f"From scratch learned at a rate of {scratch.rate:.2g}, with transfer at {transfer.rate:.2g} where all of it "
        "learned. Part of the difference may be the rate's: set model.scratch_phases alike, or find a rate for it by "
        "medtl lr-find."
    )


def _lengths(transfer: Training, scratch: Training) -> str:
    if scratch.epochs >= _SHORTER * transfer.epochs:
        return ""
    return (
        f"From scratch learned for {_counted(scratch.epochs)}, with transfer for {transfer.epochs:g}. Unless its "
        "patience ended it, give model.scratch_phases as many."
    )


def _unfinished(transfer: Training, scratch: Training, comparison: Comparison | None) -> str:
    """Say that the side that lost was still improving when it stopped."""
    won = "not estimable" if comparison is None else verdict(comparison)
    if comparison is None or comparison.difference.value is None or won not in ("helped", "hurt"):
        return ""
    name, loser = ("From scratch", scratch) if won == "helped" else ("With transfer", transfer)
    least = max(_LEAST, _SHARE * abs(comparison.difference.value)) if comparison.metric == loser.metric else _LEAST
    if loser.rise is None or loser.rise_error is None or loser.rise < max(least, _ERRORS["rise"] * loser.rise_error):
        return ""
    return (
        f"{name} was still improving when it stopped: by {number(loser.rise)} of {metric_name(loser.metric)} on "
        "validation in the last fifth of its epochs. More epochs may take away part of the difference."
    )


def _collapse(scratch: Training) -> str:
    if not scratch.fallen:
        return ""
    of = f" in {len(scratch.fallen)} of {len(scratch.courses)} folds" if len(scratch.courses) > 1 else ""
    return (
        f"From scratch fell back{of}: in its last epochs the {metric_name(scratch.metric)} on validation is "
        f"{number(max(scratch.fallen))} below that of its best. A reference that collapses makes the other side look "
        "better than it is; try a lower rate in model.scratch_phases."
    )


def _strayed(transfer: Training, scratch: Training) -> str:
    """Say that a second training, which validation does not watch, went otherwise than the first."""
    said = []
    for name, one in (("With transfer", transfer), ("From scratch", scratch)):
        if one.strayed:
            which = "the second training" if len(one.courses) == 1 else f"{len(one.strayed)} of {len(one.courses)}"
            said.append(f"{name} {which} ended with up to {max(one.strayed):.2g} times the loss of the first")
    if not said:
        return ""
    return f"{'; '.join(said)}. Validation does not watch a second training: see what the first ones give."


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


def _epochs(mean: float | None) -> str:
    return DASH if mean is None else f"{mean:g}"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _best(one: Training) -> str:
    known = sum(bool(course) for course in one.courses)
    return number(one.best) + (f" (of {known} of {len(one.courses)} folds)" if 0 < known < len(one.courses) else "")


def _rate(rate: float | None) -> str:
    return DASH if rate is None else f"{rate:.2g}"
