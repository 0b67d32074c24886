"""The AUROC of predictions that belong to no part, as those of cross-validation, with its interval over patients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import Counts
from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import Estimate, drawn, estimate, left_out, mean_of, score_of
from medtl.records import FloatArray, Predictions, Score, Task


def mean_auroc(
    predictions: Predictions, task: Task, classes: tuple[str, ...], config: UncertaintyConfig, seed: int
) -> Score:
    """Give the AUROC of the positive class of a binary task, else the mean over classes, with its interval.

    Probabilities of several folds are judged together: where the folds' heads differ in how sure they are, the value is
    as a rule a little too low.

    Args:
        predictions: of each study once.
    """
    chosen = [len(classes) - 1] if task == "binary" else list(range(len(classes)))
    ids, people = predictions.study_ids, predictions.patients
    draws = _measured(predictions, chosen, drawn(ids, people, config.resamples, seed))
    without = _measured(predictions, chosen, left_out(ids, people))
    values = _measured(predictions, chosen, iter([np.ones((1, len(ids)))]))[:, 0]
    parts: list[Estimate] = []
    for index, value, row, others in zip(chosen, values, draws, without, strict=True):
        truth = predictions.targets[:, index]
        known = np.isfinite(truth)
        counted = [patient for patient, is_known in zip(people, known, strict=True) if is_known]
        basis = Counts.of(counted, truth[known], truth[known]).basis("rarer", config.level)
        parts.append(estimate(float(value), row, others, config.level, basis, method=config.method))
    if len(parts) == 1:
        return score_of("auroc", classes[-1], parts[0], config.level, people)
    return score_of("auroc", "macro", mean_of(parts, classes), config.level, people)


def _measured(predictions: Predictions, chosen: list[int], parts: Iterator[FloatArray]) -> FloatArray:
    """Give the AUROC of the chosen classes on rows of weights, shape (classes, rows)."""
    return np.concatenate([np.array([_auroc(predictions, i, weights) for i in chosen]) for weights in parts], axis=1)


def _auroc(predictions: Predictions, index: int, weights: FloatArray) -> FloatArray:
    truth = predictions.targets[:, index]
    known = np.isfinite(truth)
    return auroc(truth[known], predictions.probabilities[known, index], weights[:, known])
