"""Two models on the same patients: the difference, paired."""

from __future__ import annotations

import numpy as np

from medtl.config import UncertaintyConfig
from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import patient_weights, score_of
from medtl.records import Comparison, FloatArray, Predictions


def compare(
    model: Predictions, reference: Predictions, names: tuple[str, str], config: UncertaintyConfig, seed: int
) -> Comparison:
    """Give the difference of the mean AUROC over classes, by one bootstrap of the patients both models saw.

    Args:
        names: of the model and of the reference.

    Raises:
        ValueError: the two did not predict the same studies in the same order.
    """
    same = model.study_ids == reference.study_ids and model.patients == reference.patients
    if not same or not np.array_equal(model.targets, reference.targets, equal_nan=True):
        raise ValueError("the two models must have predicted the same studies in the same order")
    ones = np.ones((1, len(model.study_ids)))
    weights = patient_weights(model.patients, config.resamples, seed)
    points = [_mean_auroc(p, ones)[0] for p in (model, reference)]
    draws = [_mean_auroc(p, weights) for p in (model, reference)]
    kinds = _fewest(model)
    people = model.patients
    difference = score_of(
        "auroc difference", "macro", float(points[0] - points[1]), draws[0] - draws[1], config.level, people, kinds
    )
    return Comparison(
        "auroc",
        *names,
        difference,
        score_of("auroc", "macro", float(points[1]), draws[1], config.level, people, kinds),
    )


def _mean_auroc(predictions: Predictions, weight: FloatArray) -> FloatArray:
    rows = []
    for truth, score in zip(predictions.targets.T, predictions.probabilities.T, strict=True):
        known = np.isfinite(truth)
        if len(np.unique(truth[known])) == 2:
            rows.append(auroc(truth[known], score[known], weight[:, known]))
    return np.mean(rows, axis=0) if rows else np.full(len(weight), np.nan)


def _fewest(predictions: Predictions) -> int:
    patients = np.asarray(predictions.patients)
    counts = [
        len(set(patients[truth == kind]))
        for truth in predictions.targets.T
        if len(np.unique(truth[np.isfinite(truth)])) == 2
        for kind in (0, 1)
    ]
    return min(counts, default=0)
