"""Two models on the same patients: the difference, paired."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import Counts
from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import Estimate, difference_of, drawn, estimate, left_out, mean_of, score_of
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
    difference = difference_of(*found, config.level)
    return Comparison(
        "auroc",
        *names,
        score_of("auroc difference", "macro", difference, config.level, patients, lowest=-1.0),
        score_of("auroc", "macro", found[1], config.level, patients),
    )


def _mean_aurocs(
    both: tuple[Predictions, Predictions], config: UncertaintyConfig, seed: int
) -> tuple[Estimate, Estimate]:
    """Measure both models on the same resamples, and without the same patients."""
    ids, people = both[0].study_ids, both[0].patients
    draws = _measured(both, drawn(ids, people, config.resamples, seed))
    without = _measured(both, left_out(ids, people))
    values = _measured(both, iter([np.ones((1, len(ids)))]))[:, :, 0]
    bases = [_counts(people, truth).basis("rarer", config.level) for truth in both[0].targets.T]
    names = [f"class {number} of {len(bases)}" for number in range(1, len(bases) + 1)]
    one, other = (
        mean_of(
            [
                estimate(float(value), row, others, config.level, basis)
                for value, row, others, basis in zip(values[model], draws[model], without[model], bases, strict=True)
            ],
            names,
        )
        for model in (0, 1)
    )
    return one, other


def _measured(both: tuple[Predictions, Predictions], parts: Iterator[FloatArray]) -> FloatArray:
    """Give both models' AUROC of each class on rows of weights, shape (2, classes, rows)."""
    return np.concatenate([np.array([_aurocs(p, weights) for p in both]) for weights in parts], axis=2)


def _aurocs(predictions: Predictions, weight: FloatArray) -> FloatArray:
    """Give the AUROC of each class on each resample, shape (classes, b)."""
    rows = []
    for truth, score in zip(predictions.targets.T, predictions.probabilities.T, strict=True):
        known = np.isfinite(truth)
        rows.append(auroc(truth[known], score[known], weight[:, known]))
    return np.array(rows)


def _counts(patients: tuple[str, ...], truth: FloatArray) -> Counts:
    known = np.isfinite(truth)
    people = [patient for patient, is_known in zip(patients, known, strict=True) if is_known]
    return Counts.of(people, truth[known], truth[known])
