"""Which answers to show to people: the surest that were wrong, and the surest that were right, a patient once. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medtl.evaluation.threshold import decide
from medtl.records import OperatingPoint, Predictions, Task


@dataclass(frozen=True, slots=True)
class Telling:
    """One answer worth a look."""

    row: int  # of the predictions
    asked: int  # number of the class that was answered
    right: bool
    truth: str
    decision: str
    probability: float  # of the answer


def telling_cases(
    predictions: Predictions, task: Task, classes: Sequence[str], points: Sequence[OperatingPoint], count: int
) -> tuple[Telling, ...]:
    """Choose the surest wrong answers and the surest right ones, up to ``count`` of each, failures first.

    A single-label study is asked about the class it was decided for; a multi-label one about each label that is known.
    No patient is shown twice.
    """
    called = decide(predictions, task, points)
    found: list[Telling] = []
    for row, (truth, chances, decision) in enumerate(
        zip(predictions.targets, predictions.probabilities, called, strict=True)
    ):
        if task == "multilabel":
            found += [
                _label(row, index, name, bool(truth[index]), bool(decision[index]), float(chances[index]))
                for index, name in enumerate(classes)
                if np.isfinite(truth[index])
            ]
            continue
        answer, true = int(decision.argmax()), int(truth.argmax())
        found.append(Telling(row, answer, answer == true, classes[true], classes[answer], float(chances[answer])))
    shown: list[Telling] = []
    for right in (False, True):
        taken: set[str] = {predictions.patients[one.row] for one in shown}
        for one in sorted((f for f in found if f.right is right), key=lambda f: (-f.probability, f.row)):
            patient = predictions.patients[one.row]
            if patient not in taken and sum(s.right is right for s in shown) < count:
                taken.add(patient)
                shown.append(one)
    return tuple(shown)


def _label(row: int, index: int, name: str, truth: bool, decision: bool, chance: float) -> Telling:
    said, is_so = (f"{name} present" if value else f"{name} absent" for value in (decision, truth))
    return Telling(row, index, decision == truth, is_so, said, chance if decision else 1 - chance)
