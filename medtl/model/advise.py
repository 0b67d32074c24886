"""Which backbone, and which strategy? Answered by measuring, on patients that the head did not learn from.

Each head is solved on the features of some patients and judged on others, in five folds, so that every patient of
training and validation is judged once. Folds, and the hold-out inside each that chooses the strength of the head, never
divide a patient. The test part is not an argument of anything here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold

from medtl.config import PhaseConfig
from medtl.errors import ModelError
from medtl.model.fit import monitored, probabilities_of
from medtl.model.heads import Kind, Linear, NearestNeighbours, solve
from medtl.progress import advance
from medtl.records import FloatArray, IntArray, Task

FOLDS = 5
CERTAIN = 0.95  # of a lead
_ABOUT = 1.5  # times the cheapest: as cheap
_LEAST = 1e-12  # probability whose logarithm is taken


def grouped_folds(targets: FloatArray, groups: Sequence[str], folds: int, seed: int) -> list[tuple[IntArray, IntArray]]:
    """Divide studies into folds that never divide a group and hold about equal shares of each class.

    Args:
        targets: (n, classes), NaN where unknown. Studies with several labels are told apart by their rarest one.
        groups: of each study: its patient, or what else must stay together.
        folds: at most so many; fewer where a class has fewer groups, never less than two.

    Returns:
        Rows to learn from and rows left out, of each fold.

    Raises:
        ModelError: there are fewer than two groups.
    """
    names = np.asarray(groups, dtype=np.str_)
    if len(np.unique(names)) < 2:
        raise ModelError("Fewer than two patients in training and validation: nothing can be held out. Add patients.")
    strata = _strata(targets)
    spread = [len(np.unique(names[strata == stratum])) for stratum in np.unique(strata)]
    count = min(folds, len(np.unique(names)), max(2, min(spread)))
    found, sizes = np.unique(strata, return_counts=True)
    for stratum, size in zip(found, sizes, strict=True):
        if size < count:  # too few for a fold each: they need not be spread
            strata[strata == stratum] = found[sizes.argmax()]
    split = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(strata, strata, names)
    return [(np.sort(learn), np.sort(out)) for learn, out in split if len(learn) and len(out)]


def _strata(targets: FloatArray) -> IntArray:
    """Number studies by their class; of several labels, by the rarest; those without any come last."""
    positive = np.nan_to_num(targets) > 0.5
    order = np.argsort(positive.sum(0), kind="stable")
    first: IntArray = np.where(positive.any(1), order[positive[:, order].argmax(1)], targets.shape[1])
    return first


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Probabilities of every study from a head that never saw its patient."""

    probabilities: FloatArray  # (n, classes)
    folds: int
    seconds: float  # to solve one fold's head, on average


def out_of_fold(
    kind: Kind, features: FloatArray, targets: FloatArray, groups: Sequence[str], task: Task, seed: int
) -> LeftOut:
    """Judge a solved head on patients left out, fold by fold.

    In each fold the head is solved on four fifths of the patients, and its strength (or number of neighbours) chosen on
    the last fifth, as strategy ``features`` does with training and validation.

    Args:
        features: (n, features).
        targets: (n, classes), NaN where unknown.
        groups: of each study; never divided.

    Raises:
        ModelError: too few patients, or a fold's training patients are of one class.
    """
    wide, names = features.astype(np.float64), np.asarray(groups, dtype=np.str_)
    found = np.full(targets.shape, np.nan)
    folds = grouped_folds(targets, groups, FOLDS, seed)
    started = time.perf_counter()
    for number, (learn, out) in enumerate(folds, 1):
        inner, judged = grouped_folds(targets[learn], names[learn].tolist(), FOLDS, seed)[0]
        fitted, held = learn[inner], learn[judged]
        x, truth = wide[held], targets[held]
        head = solve(
            kind, wide[fitted], targets[fitted], names[fitted].tolist(), task, False,
            lambda h, x=x, truth=truth: _score(probabilities(h, x, task), truth, task),  # type: ignore[misc]
            seed,
        )  # fmt: skip
        found[out] = probabilities(head, wide[out], task)
        advance(f"cross-validating {kind}", number, len(folds))
    return LeftOut(found, len(folds), (time.perf_counter() - started) / len(folds))


def probabilities(head: Linear | NearestNeighbours, features: FloatArray, task: Task) -> FloatArray:
    """Apply a solved head to features: (n, classes)."""
    if isinstance(head, NearestNeighbours):
        with torch.no_grad():
            return probabilities_of(head(torch.from_numpy(features)), task)
    return probabilities_of(torch.from_numpy(features @ head.weight.T + head.bias), task)


def _score(found: FloatArray, truth: FloatArray, task: Task) -> float:
    """Score as training does: AUROC, the loss between equals; the loss alone where no AUROC can be estimated."""
    known = np.isfinite(truth)
    chance = found if task != "multilabel" else np.where(truth > 0.5, found, 1 - found)
    counted = known & (truth > 0.5) if task != "multilabel" else known
    loss = float(-np.log(np.maximum(chance[counted], _LEAST)).mean()) if counted.any() else 0.0
    auroc = monitored("auroc", truth, found, loss)
    return -loss if auroc is None else auroc - 1e-6 * loss


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to a model, and what it came to."""

    name: str
    value: float | None  # AUROC; None where it could not be estimated
    seconds: float | None  # to make it; None is unknown
    folds: bool  # judged on every patient by cross-validation, or else on a hold-out


@dataclass(frozen=True, slots=True)
class Lead:
    """How far one way is ahead of another on the patients that both were judged on."""

    share: float  # of resamples of these patients in which it is ahead
    low: float | None  # of the lead, with 95 % certainty, widened for few patients; None: not estimable

    @property
    def certain(self) -> bool:
        """Tell a lead from chance; a drawing of four patients alone would be too sure of itself."""
        return self.share >= CERTAIN and self.low is not None and self.low > 0


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What the measurements say."""

    clear: bool  # the best beat every other
    best: str
    recommended: str  # the best, or the cheapest of those it did not beat
    unbeaten: tuple[str, ...]  # in the order they were given, the best among them
    leads: dict[str, Lead]  # of the best over each other


def recommend(contenders: Sequence[Contender], lead: Callable[[str, str], Lead]) -> Recommendation | None:
    """Recommend one of several ways; without a clear winner the cheapest of those that the best did not beat.

    The best is the highest in cross-validation, unless one that was judged on the hold-out beats it there. Of those
    that cost about as little as the cheapest (half as much again) the higher is taken: seconds are never exact. None
    where nothing could be estimated.

    Args:
        lead: gives the lead of the first over the second.
    """
    judged = [one for one in contenders if one.value is not None]
    if not judged:
        return None
    best = max([one for one in judged if one.folds] or judged, key=_height)
    ahead = [one for one in judged if not one.folds and one is not best and lead(one.name, best.name).certain]
    best = max(ahead, key=_height, default=best)
    leads = {one.name: lead(best.name, one.name) for one in judged if one is not best}
    unbeaten = [one for one in judged if one is best or not leads[one.name].certain]
    least = min(map(_cost, unbeaten))
    chosen = best if len(unbeaten) == 1 else max((o for o in unbeaten if _cost(o) <= _ABOUT * least), key=_height)
    return Recommendation(len(unbeaten) == 1, best.name, chosen.name, tuple(one.name for one in unbeaten), leads)


def _height(one: Contender) -> float:
    return -math.inf if one.value is None else one.value


def _cost(one: Contender) -> float:
    return math.inf if one.seconds is None else one.seconds


def shortened(phases: Sequence[PhaseConfig], divisor: int) -> tuple[PhaseConfig, ...]:
    """Give the same phases with their epochs divided, rounded up."""
    return tuple(phase.model_copy(update={"epochs": -(-phase.epochs // divisor)}) for phase in phases)
