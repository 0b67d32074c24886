"""What more patients would bring: one way of training on fewer of them, seen on the validation part.

The test part stays closed: it is for the model that may serve. Validation chose the epoch of each network, so that all
points flatter alike; what the curve is read for is its slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medtl.config import EvaluationConfig
from medtl.evaluation.assess import answer, ask, reported_classes, scores_of
from medtl.evaluation.overlap import summary
from medtl.evaluation.threshold import choose
from medtl.records import FloatArray, Predictions, Score, Task


def auroc_of(val: Predictions, task: Task, classes: Sequence[str], config: EvaluationConfig, seed: int) -> Score:
    """Give the AUROC, of several classes their mean, with an interval over patients.

    Every network of a curve has it by the same seed, and so from the same resamples of patients.
    """
    points = []
    for index in reported_classes(task, classes):
        known = np.isfinite(val.targets[:, index])
        truth, score = val.targets[known, index], val.probabilities[known, index]
        points.append(choose(truth, score, config.threshold, classes[index]))
    asked = [one for one in ask(val, task, classes, points, config) if one.metric == "auroc"]
    found = answer(asked, val.study_ids, val.patients, config.uncertainty, seed)
    return scores_of(asked, found, val.patients, config.uncertainty.level)[-1]


def dice_of(
    dice: FloatArray, study_ids: Sequence[str], patients: Sequence[str], config: EvaluationConfig, seed: int
) -> Score:
    """Give the mean over studies of the mean Dice over structures, with an interval over patients.

    Args:
        dice: (studies, structures), NaN where both masks are empty; such a structure is left out of its study's mean.
    """
    means = [float(np.mean(known)) if (known := row[np.isfinite(row)]).size else None for row in dice]
    return replace(summary("dice", means, study_ids, patients, config.uncertainty, seed).mean, metric="dice")
