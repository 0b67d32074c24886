"""What a release said of many scans, as counts: what the trail may hold, and nobody can be found in. Pure.

The answers to one question exclude each other, and lie in order where they are sorted by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medtl.records import FloatArray, Tally, Task

FEWEST = 5  # scans, and patients: the counts of fewer could be read as somebody's own answers
_BINS = 10
_PERCENT = ("00 to 01 %", "01 to 05 %", "05 to 10 %", "10 to 25 %", "25 to 50 %", "50 to 75 %", "75 to 90 %",
            "90 to 95 %", "95 to 99 %", "99 to 100 %")  # fmt: skip

Answers = Mapping[str, Mapping[str, int]]


def tally(patients: Sequence[str | None], answers: Answers, promised: float | None = None) -> Tally | None:
    """Put counts together; none of fewer than five scans, or of fewer than five patients.

    Args:
        patients: of each scan; None where it is not known whose it is.
        promised: share unlike training that the release promised.
    """
    known = None if None in patients else len(set(patients))
    few = len(patients) < FEWEST or (known is not None and known < FEWEST)
    return None if few else Tally(len(patients), known, answers, promised)


def decided(called: FloatArray, task: Task, classes: Sequence[str]) -> Answers:
    """Count the scans of each class; of several labels each is a question of its own.

    Args:
        called: (n, classes) of 0 and 1; as decided at the operating points.
    """
    if task == "multilabel":
        return {f"decision: {name}": flagged(called[:, place]) for place, name in enumerate(classes)}
    counts = called.sum(axis=0).astype(int).tolist()
    return {"decision": dict(zip(classes, counts, strict=True))}


def flagged(flags: FloatArray) -> Mapping[str, int]:
    """Count yes (1) and no (0); NaN is neither."""
    return {"no": int((flags == 0).sum()), "yes": int((flags == 1).sum())}


def tenths(probabilities: FloatArray) -> Mapping[str, int]:
    """Count probabilities, (n,), in ten bins from 0 to 1."""
    fine = probabilities[np.isfinite(probabilities)]
    places = np.minimum((fine * _BINS).astype(int), _BINS - 1)
    counts = np.bincount(places, minlength=_BINS).tolist()
    return {f"{place / _BINS:.1f} to {(place + 1) / _BINS:.1f}": count for place, count in enumerate(counts)}


def between(scores: FloatArray, quantiles: Sequence[float]) -> Mapping[str, int]:
    """Count novelty scores, (n,), between those that validation had; a score that is no number is not counted.

    Scores of one method may be negative, so that a share of the threshold would mean nothing.

    Args:
        quantiles: of validation's scores: 0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100 %.
    """
    places = np.searchsorted(quantiles[1:-1], scores[np.isfinite(scores)], side="right")
    return dict(zip(_PERCENT, np.bincount(places, minlength=len(_PERCENT)).tolist(), strict=True))
