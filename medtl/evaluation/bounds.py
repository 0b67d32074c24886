"""What a result leaves open when patients are few and all of them agree.

Where every patient is judged rightly, every resample gives the same value and the bootstrap's interval is a point,
however few the patients were. Then the exact bound stands in. A share of patients that would be judged otherwise goes
unseen among n with a chance of ``alpha / 2`` if it is ``1 - (alpha / 2) ** (1 / n)``, whatever these would score:
5 of 5 found is a sensitivity in [.478, 1].
Source: Clopper and Pearson, Biometrika 26 (1934); Hanley and Lippman-Hand, JAMA 249 (1983), the rule of three.

The same bound holds for the AUROC A, with n the patients of the rarer kind: these make n pairs of a diseased and a
healthy patient that share nobody, each pair is in order with a chance of at most A, so all of them with at most A ** n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medtl.records import FloatArray

RestsOn = Literal[
    "diseased", "healthy", "rarer", "both", "association", "agreement", "ranking", "called", "cleared", "all"
]
_STEPS = 256  # of the search for the worst average precision; finer ones move the third digit


@dataclass(frozen=True, slots=True)
class Scale:
    """Between which values a metric lies, and so on what its interval is laid."""

    lowest: float
    highest: float

    @property
    def has_ends(self) -> bool:
        """Tell a metric with a best and a worst value, as a share has them."""
        return math.isfinite(self.lowest) and math.isfinite(self.highest)

    def at(self, place: float) -> float:
        """Give the value at a place from 0 to 1 between both ends."""
        return self.lowest + (self.highest - self.lowest) * place


SHARE = Scale(0.0, 1.0)  # log odds
SIGNED = Scale(-1.0, 1.0)  # log odds of the place between both ends: Fisher's z
RATIO = Scale(0.0, math.inf)  # logarithm
LINE = Scale(-math.inf, math.inf)  # as it is


@dataclass(frozen=True, slots=True)
class Counts:
    """Distinct patients of each kind; a patient with images of two kinds counts in both."""

    diseased: int
    healthy: int
    called: int
    cleared: int
    all: int
    odds: float  # healthy studies per diseased study
    evenness: float = 1.0  # 1 where patients have equally many studies of each kind

    @classmethod
    def of(cls, patients: Sequence[str], truth: FloatArray, called: FloatArray) -> Counts:
        """Count the patients of studies whose truth and decision are 0 or 1."""
        people = np.asarray(patients, dtype=np.str_)
        kinds = (truth > 0.5, truth < 0.5, called > 0.5, called < 0.5)
        diseased, healthy, positive, negative = (len(np.unique(people[kind])) for kind in kinds)
        odds = float(kinds[1].sum() / max(1, kinds[0].sum()))
        even = min(evenness(people[kind]) for kind in (*kinds, slice(None)))
        return cls(diseased, healthy, positive, negative, len(np.unique(people)), odds, even)

    def needed(self, rests_on: RestsOn) -> int:
        """Count the patients of the rarest kind that a metric cannot do without."""
        if rests_on == "all":
            return self.all
        rarer = min(self.diseased, self.healthy)
        return min(rarer, {"called": self.called, "cleared": self.cleared}.get(rests_on, rarer))

    def basis(self, rests_on: RestsOn, level: float) -> Basis:
        """Say how much these patients can show of a metric."""
        return Basis(self.needed(rests_on), least_of_a_perfect(rests_on, self, level), self.evenness)


@dataclass(frozen=True, slots=True)
class Basis:
    """How much patients can show of one metric."""

    needed: int  # distinct patients of the rarest kind among those the metric needs
    least: float  # lower limit that a perfect value on them would have: its place between both ends of the scale
    evenness: float = 1.0  # of the numbers of studies among them

    def votes(self, level: float) -> float:
        """Count the patients of one yes or no each whose interval would be as wide as these could need at most."""
        if not 0 < self.least < 1:
            return 0.0
        return self.evenness * math.log((1 - level) / 2) / math.log(self.least)


def together(parts: Sequence[Basis], level: float, people: Sequence[str]) -> Basis:
    """Say how much patients show together who are judged in several parts, each of them in one.

    Args:
        people: patient of each study of all parts.
    """
    votes = sum(part.votes(level) / part.evenness for part in parts)
    least = ((1 - level) / 2) ** (1 / votes) if votes else 0.0
    return Basis(sum(part.needed for part in parts), least, evenness(people))


def evenness(people: Sequence[str] | np.ndarray[tuple[int, ...], np.dtype[np.str_]]) -> float:
    """Give the share of patients that would do if all had equally many studies: 1 if they have, 1 / n if one has all.

    Source: Kish, Survey Sampling (1965), effective sample size under unequal weights.
    """
    _, studies = np.unique(np.asarray(people, dtype=np.str_), return_counts=True)
    return float(studies.sum() ** 2 / (len(studies) * (studies**2).sum())) if len(studies) else 1.0


def least_of_a_perfect(rests_on: RestsOn, counts: Counts, level: float) -> float:
    """Give the least value that patients who all agree on 1 leave open; 0 where there is nobody."""
    if rests_on == "both":  # if the mean is below the mean of two bounds, one of the two is below its own
        return (least_share(counts.diseased, level) + least_share(counts.healthy, level)) / 2
    if rests_on == "ranking":
        return _least_average_precision(counts, level)
    if rests_on in ("association", "agreement"):
        return _least_of_a_table(rests_on, counts, level)
    rarer = min(counts.diseased, counts.healthy)
    patients = {
        "diseased": counts.diseased,
        "healthy": counts.healthy,
        "called": counts.called,
        "cleared": counts.cleared,
        "all": counts.all,
    }
    return least_share(patients.get(rests_on, rarer), level)


def least_share(patients: int, level: float) -> float:
    """Give the lower limit of a share where all of these patients are in it: Clopper and Pearson's."""
    return float(((1 - level) / 2) ** (1 / patients)) if patients else 0.0


def _least_of_a_table(rests_on: Literal["association", "agreement"], counts: Counts, level: float) -> float:
    """Give the place between -1 and 1 of the least MCC or kappa that a table without errors leaves open.

    Both grow with sensitivity and with specificity: if one is below what it is at the bounds of these two, one of the
    two is below its own.
    """
    if not min(counts.diseased, counts.healthy):
        return 0.0
    found, spared = least_share(counts.diseased, level), least_share(counts.healthy, level)
    ill = 1 / (1 + counts.odds)
    called = ill * found + (1 - ill) * (1 - spared)
    shared = 2 * ill * (1 - ill) * (found + spared - 1)
    if rests_on == "agreement":
        return (1 + shared / (ill * (1 - called) + called * (1 - ill))) / 2
    return (1 + shared / 2 / math.sqrt(ill * (1 - ill) * called * (1 - called))) / 2


def _least_average_precision(counts: Counts, level: float) -> float:
    """Give the least average precision that a perfect ranking leaves open.

    A share ``low`` of the diseased may yet rank last, a share ``high`` of the healthy first, together unseen with a
    chance of ``alpha / 2``. With ``c = high * odds``, precision at recall r is then ``r / (r + c)`` up to ``1 - low``.
    One false alarm among many healthy costs more precision than one miss does, so the AUROC's bound would not hold.
    """
    if not min(counts.diseased, counts.healthy):
        return 0.0
    kept = np.linspace(least_share(counts.diseased, level), 1, _STEPS)  # 1 - low
    unseen = np.minimum((1 - level) / 2 / kept**counts.diseased, 1)
    c = np.maximum((1 - unseen ** (1 / counts.healthy)) * counts.odds, 1e-12)
    return max(0.0, float((kept - c * np.log1p(kept / c)).min()))
