"""The AUROC's variance without drawing anybody: DeLong's, over patients.

A diseased study is worth the share of the healthy that it outranks, a healthy one the share of the diseased that
outrank it. How these shares vary among patients is how the area varies; summed by patient first, several images of one
patient count as what they are. With one study of each patient this is DeLong's own variance.
Source: DeLong et al., Biometrics 44 (1988); Obuchowski, Biometrics 53 (1997), for clusters; Sun and Xu, IEEE Signal
Processing Letters 21 (2014), for ranks instead of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri

from medtl.evaluation.uncertainty import FEWEST_PATIENTS
from medtl.records import FloatArray, IntArray

_NO_VARIANCE = 1e-18  # sums of the same terms differ by rounding


@dataclass(frozen=True, slots=True)
class Area:
    """One AUROC and what each patient adds to it."""

    value: float  # NaN where a kind is missing
    of_diseased: FloatArray  # (patients,) how much a patient's diseased studies move the area
    of_healthy: FloatArray  # (patients,)
    diseased: int  # patients with a diseased study
    healthy: int
    patients: int  # of all with a study that counts

    @property
    def estimable(self) -> bool:
        """Tell whether there are patients enough for a variance."""
        return min(self.diseased, self.healthy) >= FEWEST_PATIENTS


def area(truth: FloatArray, score: FloatArray, patient: IntArray | None = None) -> Area:
    """Measure one AUROC with its parts by patient.

    Args:
        truth: (n,) 0 and 1; NaN where unknown.
        score: (n,) finite.
        patient: (n,) numbers from 0; default: one study of each.
    """
    people = np.arange(len(truth)) if patient is None else patient
    ill, well = np.flatnonzero(truth > 0.5), np.flatnonzero(truth <= 0.5)
    count = int(people.max(initial=-1)) + 1
    if not min(len(ill), len(well)) or not np.isfinite(score).all():
        nobody = np.zeros(count)
        return Area(math.nan, nobody, nobody, 0, 0, 0)
    ill, well = ill[np.argsort(score[ill])], well[np.argsort(score[well])]
    outranked = _share_below(score[ill], score[well])
    value = float(outranked.mean())
    outranking = 1 - _share_below(score[well], score[ill])
    here_ill, here_well = np.bincount(people[ill], minlength=count), np.bincount(people[well], minlength=count)
    of_diseased = np.bincount(people[ill], (outranked - value) / len(ill), count).astype(np.float64, copy=False)
    of_healthy = np.bincount(people[well], (outranking - value) / len(well), count).astype(np.float64, copy=False)
    patients = [int((here > 0).sum()) for here in (here_ill, here_well, here_ill + here_well)]
    return Area(value, of_diseased, of_healthy, *patients)


def covariance(one: Area, other: Area) -> float:
    """Give the covariance of two areas on the same patients; of an area with itself its variance."""
    ill = _correction(one.diseased, other.diseased) * float(one.of_diseased @ other.of_diseased)
    well = _correction(one.healthy, other.healthy) * float(one.of_healthy @ other.of_healthy)
    across = float(one.of_diseased @ other.of_healthy + one.of_healthy @ other.of_diseased)
    return ill + well + _correction(one.patients, other.patients) * across


def interval(found: Area, level: float) -> tuple[float, float] | None:
    """Give DeLong's limits of one area, on its log odds; ``None`` where it has no variance.

    Source of the scale: Pepe 2003; Qin and Hotilovac, Statistical Methods in Medical Research 17 (2008).
    """
    if not found.estimable or not 0 < found.value < 1:
        return None
    variance = covariance(found, found)
    if variance <= _NO_VARIANCE:
        return None
    reach = float(ndtri((1 + level) / 2)) * math.sqrt(variance) / (found.value * (1 - found.value))
    return float(expit(logit(found.value) - reach)), float(expit(logit(found.value) + reach))


@dataclass(frozen=True, slots=True)
class Contrast:
    """The difference of two mean areas and its standard error; NaN where not estimable."""

    value: float
    error: float

    @property
    def z(self) -> float:
        """Give the difference in standard errors; 0 where two that never differ are equal."""
        if self.error > 0:
            return self.value / self.error
        return 0.0 if self.value == 0 and self.error == 0 else math.nan

    @property
    def p_value(self) -> float:
        """Give the two-sided p value of no difference."""
        return float(2 * ndtr(-abs(self.z)))


def contrast(ones: Sequence[Area], others: Sequence[Area]) -> Contrast:
    """Compare the mean area over classes of two models on the same studies.

    Args:
        ones: of the model, one area a class.
        others: of the reference, in the same order.
    """
    areas, count = [*ones, *others], len(ones)
    value = float(np.mean([found.value for found in ones]) - np.mean([found.value for found in others]))
    if not all(found.estimable for found in areas):
        return Contrast(value, math.nan)
    signs = np.repeat([1.0, -1.0], count) / count
    table = np.array([[covariance(one, other) for other in areas] for one in areas])
    variance = float(signs @ table @ signs)
    return Contrast(value, math.sqrt(variance) if variance > _NO_VARIANCE else 0.0)


def _share_below(ascending: FloatArray, others: FloatArray) -> FloatArray:
    """Give the share of the others (ascending too) below each value; ties count one half."""
    below = np.searchsorted(others, ascending, side="left")
    return (below + np.searchsorted(others, ascending, side="right")) / (2 * len(others))


def _correction(one: int, other: int) -> float:
    """Give n / (n - 1), of two numbers of patients their geometric mean."""
    return math.sqrt(one / max(1, one - 1) * other / max(1, other - 1))
