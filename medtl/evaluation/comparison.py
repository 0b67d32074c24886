"""Two models on the same patients: the difference, paired."""

from __future__ import annotations

import numpy as np

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import least_share
from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import Estimate, difference_of, drawn, estimate, mean_of, score_of
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
    found = _mean_aurocs((model, reference), config, seed)
    known = np.flatnonzero(np.isfinite(model.targets).any(axis=1))
    patients = [model.patients[row] for row in known]
    difference = difference_of(*found)
    return Comparison(
        "auroc",
        *names,
        score_of("auroc difference", "macro", difference, config.level, patients, lowest=-1.0),
        score_of("auroc", "macro", found[1], config.level, patients),
    )


def _mean_aurocs(
    both: tuple[Predictions, Predictions], config: UncertaintyConfig, seed: int
) -> tuple[Estimate, Estimate]:
    """Measure both models on the same resamples."""
    first = both[0]
    weights = drawn(first.study_ids, first.patients, config.resamples, seed)
    draws = np.concatenate([np.array([_aurocs(p, some) for p in both]) for some in weights], axis=2)
    values = np.array([_aurocs(p, np.ones((1, len(p.study_ids)))) for p in both])[:, :, 0]
    rarer = [_rarer(first.patients, truth) for truth in first.targets.T]
    names = [f"class {number} of {len(rarer)}" for number in range(1, len(rarer) + 1)]
    one, other = (
        mean_of(
            [
                estimate(float(value), row, config.level, count, least_share(count, config.level))
                for value, row, count in zip(values[model], draws[model], rarer, strict=True)
            ],
            names,
        )
        for model in (0, 1)
    )
    return one, other


def _aurocs(predictions: Predictions, weight: FloatArray) -> FloatArray:
    """Give the AUROC of each class on each resample, shape (classes, b)."""
    rows = []
    for truth, score in zip(predictions.targets.T, predictions.probabilities.T, strict=True):
        known = np.isfinite(truth)
        rows.append(auroc(truth[known], score[known], weight[:, known]))
    return np.array(rows)


def _rarer(patients: tuple[str, ...], truth: FloatArray) -> int:
    people = np.asarray(patients)
    return min(len(np.unique(people[truth == kind])) for kind in (0, 1))
