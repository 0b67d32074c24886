"""The score below which the next patient's stays, with a chance that was asked for.

Images of one patient are alike, so that n images are not n exchangeable draws, as conformal prediction wants them;
patients are. Each of K patients therefore has one vote, shared among his images, and the patient to come has one of
K + 1, of which nothing is known and the worst is assumed. The score of an image drawn at random from a new patient is
then at most the quantile with at least the chance asked for, whatever the scores' distribution. With one image of each
patient this is the quantile of split conformal prediction.
Source: Lee, Barber and Willett, Distribution-free inference with hierarchical data, arXiv 2306.06342 (2023); Vovk,
Gammerman and Shafer, Algorithmic Learning in a Random World (2005).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medtl.records import FloatArray

_ROUNDING = 1e-9  # of sums of votes


def patient_quantile(scores: FloatArray, patients: Sequence[str], share: float) -> float | None:
    """Give the least score that a new patient's exceeds with a chance of at most ``1 - share``.

    Args:
        scores: (n,) of studies.
        patients: of the studies.

    Returns:
        None where there are too few patients: fewer than ``share / (1 - share)``.
    """
    if not len(scores):
        return None
    order = np.argsort(scores, kind="stable")
    heard = np.cumsum(votes(patients)[order])
    reached = np.flatnonzero(heard >= share * (heard[-1] + 1) - _ROUNDING)
    return float(scores[order[reached[0]]]) if len(reached) else None


def votes(patients: Sequence[str]) -> FloatArray:
    """Give each study its part of its patient's one vote, (n,)."""
    _, member, studies = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True, return_counts=True)
    parts: FloatArray = 1.0 / studies[member]
    return parts
