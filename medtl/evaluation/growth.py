"""What more patients would bring: one way of training on fewer of them, seen on the validation part.

The test part stays closed: it is for the model that may serve. Validation chose the epoch of each network, so that all
points flatter alike; what the curve is read for is its slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medtl.config import EvaluationConfig
from medtl.evaluation.assess import answer, ask, operating_points, scores_of
from medtl.evaluation.comparison import compare
from medtl.evaluation.masks import compare_masks
from medtl.evaluation.overlap import summary
from medtl.records import FloatArray, MaskResult, Predictions, Score, Task

_NAMES = ("all patients", "fewer")


def auroc_of(val: Predictions, task: Task, classes: Sequence[str], config: EvaluationConfig, seed: int) -> Score:
    """Give the AUROC, of several classes their mean, with an interval over patients.

    Every network of a curve has it by the same seed, and so from the same resamples of patients.
    """
    points = operating_points(val, task, classes, config)  # the AUROC rests on none of them
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


def auroc_gain(val: Predictions, fewer: Predictions, config: EvaluationConfig, seed: int) -> Score:
    """Give by how much the AUROC of the one that learned from more patients is higher, paired by patient."""
    return compare(val, fewer, _NAMES, config.uncertainty, seed).difference


def dice_gain(
    dice: FloatArray,
    fewer: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: EvaluationConfig,
    seed: int,
) -> Score:
    """Give by how much the mean Dice of the one that learned from more patients is higher, paired by patient.

    Args:
        dice: as of :func:`dice_of`; a structure that one of the two lacks is left out of both.
    """
    both = [_results(one, study_ids, patients) for one in (dice, fewer)]
    return compare_masks(both[0], both[1], _NAMES, config, seed).difference


def _results(dice: FloatArray, study_ids: Sequence[str], patients: Sequence[str]) -> list[MaskResult]:
    return [
        MaskResult(study, patient, str(place), 0.0, 0.0, {"dice": float(value) if np.isfinite(value) else None})
        for study, patient, row in zip(study_ids, patients, dice, strict=True)
        for place, value in enumerate(row)
    ]
