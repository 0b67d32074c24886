"""Whether releases were asked in a period about the world that they were released for: read off the trail. Pure.

Two things are looked at. The share of scans unlike training has a promise to keep (:mod:`medtl.evaluation.novelty`):
more than promised is a reason to look. How the answers lie is held against the release's own test part by a chi-square
test, and the population stability index says how far they lie apart. Neither knows the truth: another case mix moves
both and is no worse model, and a model that errs where it is sure moves neither.

A patient has one vote however many scans he has, as if they all said the same. That is careful: a real change may be
missed, and one that is not there is not found more often than said.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from scipy.special import chdtrc, ndtri

from medtl.monitoring.tally import FEWEST
from medtl.records import Drift, FloatArray, Score, Shift, Tally

LEVEL = 0.01  # of a period's questions together: one period in a hundred is looked at for nothing
_CONFIDENCE = 0.95
_EXPECTED = 5  # votes in every cell. Source: Cochran, Biometrics 10 (1954)
_USED, _STRANGE = "release.applied", "unlike training"
_WHOSE = (
    "It is not known whose scans these are. Each counts as somebody’s: signs come too easily where people have several."
)


def measure(events: Sequence[Mapping[str, Any]], start: datetime, end: datetime) -> tuple[Drift, ...]:
    """Measure every release that was used in a period, in the order of first use.

    The same scans asked again are counted once, by their digest; scans that two folders share are counted twice.

    Args:
        events: of a verified trail, oldest first.
        start, end: a time counts if it is not before the one and before the other.
    """
    used: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for event in events:
        if event["action"] == _USED and start <= datetime.fromisoformat(event["time"]) < end:
            used[event["subject"]][event["details"]["scans"]] = event["details"]
    return tuple(_drift(release, list(uses.values())) for release, uses in used.items())


def pool(tallies: Sequence[Tally]) -> Tally:
    """Add counts up; patients are known only where all of them are, and one of two uses counts twice."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for one in tallies:
        for question, counts in one.answers.items():
            answers[question].update(counts)
    people = [one.patients for one in tallies if one.patients is not None]
    known = sum(people) if len(people) == len(tallies) else None
    return Tally(sum(one.scans for one in tallies), known, answers, tallies[0].promised)


def unlike_training(now: Tally) -> Score:
    """Give the share of scans unlike training with Wilson's interval, a patient as one vote."""
    counts = now.answers.get(_STRANGE, {})
    scans = sum(counts.values())
    if not scans:
        return Score(_STRANGE, "all", None, None, None, 0, 0, "not estimable: the release cannot tell")
    share = counts["yes"] / scans
    low, high = wilson(share, scans * _votes(now), _CONFIDENCE)
    note = "" if now.patients is not None else _WHOSE
    return Score(_STRANGE, "all", share, low, high, scans, now.patients or 0, note)


def wilson(share: float, votes: float, level: float) -> tuple[float, float]:
    """Give the limits of a share of this many independent votes, that need not be whole. Source: Wilson 1927."""
    z = float(ndtri((1 + level) / 2))
    middle = (share + z**2 / (2 * votes)) / (1 + z**2 / votes)
    reach = z / (1 + z**2 / votes) * math.sqrt(share * (1 - share) / votes + z**2 / (4 * votes**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def shift(question: str, now: Tally, then: Tally) -> Shift:
    """Compare how the answers to a question lie, by a chi-square test and the population stability index.

    Rare answers are laid to a neighbour, by name, until each is expected five times. The index of two samples of the
    same is not 0 but about what stands in ``by_chance``. Source: Yurdakul and Naranjo, Journal of Risk Model
    Validation 14 (2020).

    Args:
        then: of the release's own test part.
    """
    names = sorted({*now.answers[question], *then.answers[question]})
    counts = [[one.answers[question].get(name, 0) * _votes(one) for name in names] for one in (now, then)]
    scans = sum(now.answers[question].values())
    seen = _merged(np.array(counts, dtype=np.float64))
    cells = seen.shape[1]
    if cells < 2:
        why = f"not estimable: no two answers are expected {_EXPECTED} times in the period and in the test part"
        return Shift(question, scans, None, None, None, why)
    expected = _expected(seen)
    p_value = float(chdtrc(cells - 1, ((seen - expected) ** 2 / expected).sum()))
    totals = seen.sum(axis=1)
    shares = (seen + 0.5) / (totals + 0.5 * cells)[:, None]  # half a vote each: an answer that nobody gave has a log
    index = float(((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum())
    return Shift(question, scans, index, float((cells - 1) * (1 / totals).sum()), p_value)


def corrected(shifts: Sequence[Shift]) -> tuple[Shift, ...]:
    """Correct the p values for the number of questions. Source: Holm, Scandinavian Journal of Statistics 6 (1979)."""
    known = {place: one.p_value for place, one in enumerate(shifts) if one.p_value is not None}
    found, largest = list(shifts), 0.0
    for rank, (place, value) in enumerate(sorted(known.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        found[place] = replace(found[place], p_value=largest)
    return tuple(found)


def _drift(release: str, uses: Sequence[Mapping[str, Any]]) -> Drift:
    tallies = [Tally(**use["tally"]) for use in uses if use.get("tally")]
    scans, left_out = (sum(int(use[name]) for use in uses) for name in ("count", "excluded"))
    notes = _unmeasured(len(tallies), len(uses))
    if not tallies:
        unknown = Score(_STRANGE, "all", None, None, None, 0, 0, "not measured")
        return Drift(release, len(uses), scans, left_out, unknown, None, notes=notes)
    now, strange = pool(tallies), unlike_training(pool(tallies))
    then = next((Tally(**use["released_with"]) for use in uses if use.get("released_with")), None)
    shifts: tuple[Shift, ...] = ()
    if now.patients is None:
        notes = (*notes, _WHOSE)
    if then is None:
        notes = (*notes, "Answers are held against nothing: the release holds no counts of its own test part.")
    else:
        both = sorted(now.answers.keys() & then.answers.keys() - {_STRANGE})
        shifts = corrected([shift(question, now, then) for question in both])
    alarms = (*_broken_promise(strange, now.promised), *(_shifted(one) for one in shifts if _is_told(one)))
    return Drift(release, len(uses), scans, left_out, strange, now.promised, shifts, alarms, notes)


def _unmeasured(counted: int, uses: int) -> tuple[str, ...]:
    if counted == uses:
        return ()
    return (
        f"{uses - counted} of {uses} uses are not measured: they are from before uses were counted, or of fewer than "
        f"{FEWEST} scans or patients, whose answers their counts would tell.",
    )


def _broken_promise(strange: Score, promised: float | None) -> tuple[str, ...]:
    if promised is None or strange.value is None or strange.low is None or strange.low <= promised:
        return ()
    return (
        f"{100 * strange.value:.1f} % of the scans are unlike training, {100 * promised:g} % at most were promised: "
        "look at them before the release is relied on.",
    )


def _is_told(one: Shift) -> bool:
    return one.p_value is not None and one.p_value < LEVEL


def _shifted(one: Shift) -> str:
    return f"“{one.question}” is answered otherwise than in the test part: look whether other people or scans come."


def _votes(one: Tally) -> float:
    """Give what a scan counts: a patient has one vote, where it is known who they are."""
    return 1.0 if one.patients is None else one.patients / one.scans


def _expected(seen: FloatArray) -> FloatArray:
    made: FloatArray = seen.sum(axis=1, keepdims=True) * seen.sum(axis=0) / seen.sum()
    return made


def _merged(seen: FloatArray) -> FloatArray:
    """Lay the rarest answer to its rarer neighbour until each is expected often enough in both rows."""
    while seen.shape[1] > 1 and (not seen.any() or _expected(seen).min() < _EXPECTED):
        often = seen.sum(axis=0)
        place = int(often.argmin())
        beside = [other for other in (place - 1, place + 1) if 0 <= other < len(often)]
        other = min(beside, key=lambda one: often[one])
        seen = np.delete(seen + np.where(np.arange(len(often)) == other, seen[:, [place]], 0.0), place, axis=1)
    return seen
