"""What predictions must be before anything is measured on them."""

from __future__ import annotations

import numpy as np

from medtl.errors import ModelError, SplitError, StudyError
from medtl.records import Predictions, Task

ROUNDING = 1e-3  # by which the probabilities of one study may miss a sum of 1


def check_predictions(
    val: Predictions, test: Predictions, task: Task, classes: tuple[str, ...], may_share: bool = False
) -> None:
    """Refuse predictions whose figures would not mean what they say.

    Args:
        may_share: a patient in validation and test is known and allowed (``dataset.split.allow_leaky_split``).

    Raises:
        SplitError: a part is empty, holds a study twice, or validation and test share a patient.
        StudyError: a target is not 0, 1 or unknown, or a study of a single-label task is not of one class.
        ModelError: a probability is not a number from 0 to 1, or those of one study do not sum to 1.
    """
    for predictions in (val, test):
        _check_part(predictions, task, classes)
    shared = len(set(val.patients) & set(test.patients))
    if shared and not may_share:
        raise SplitError(
            f"{shared} patients are in both validation and test: the operating point would be chosen on patients it is "
            "judged by. Predict the parts of one split."
        )


def _check_part(predictions: Predictions, task: Task, classes: tuple[str, ...]) -> None:
    where, probabilities, targets = f"of the '{predictions.part}' part", predictions.probabilities, predictions.targets
    if not predictions.study_ids:
        raise SplitError(f"There are no predictions {where}. Give it studies (dataset.split).")
    if len(set(predictions.study_ids)) < len(predictions.study_ids):
        raise SplitError(f"The predictions {where} hold a study twice. Predict each study once.")
    if probabilities.ndim != 2 or probabilities.shape[1] != len(classes):
        raise ModelError(f"The predictions {where} do not have one column for each of {len(classes)} classes.")
    # a comparison with NaN is false, so what is not a number is refused too
    wrong = int((~((probabilities >= 0) & (probabilities <= 1))).any(axis=1).sum())
    if wrong:
        raise ModelError(
            f"The probabilities {where} are not numbers from 0 to 1 for {wrong} studies. The training diverged, or the "
            "predictions were made by something else: train again."
        )
    odd = int((~(np.isnan(targets) | (targets == 0) | (targets == 1))).any(axis=1).sum())
    if odd:
        raise StudyError(f"The targets {where} are not 0, 1 or unknown for {odd} studies. Check the label table.")
    if task == "multilabel":
        return
    off = int((np.abs(probabilities.sum(axis=1) - 1) > ROUNDING).sum())
    if off:
        raise ModelError(f"The probabilities {where} do not sum to 1 for {off} studies; one class each is wanted.")
    several = int((~((targets == 1).sum(axis=1) == 1) | np.isnan(targets).any(axis=1)).sum())
    if several:
        raise StudyError(f"The targets {where} do not name exactly one class for {several} studies.")
