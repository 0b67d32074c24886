"""Intervals come from patients, and say so where they cannot."""

from __future__ import annotations

import numpy as np
import pytest

from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import patient_weights, score_of


def test_images_of_one_patient_are_drawn_together() -> None:
    weights = patient_weights(["a", "b", "a", "c", "b"], 200, 0)
    assert weights.shape == (200, 5)
    assert np.array_equal(weights[:, 0], weights[:, 2]) and np.array_equal(weights[:, 1], weights[:, 4])
    assert not np.array_equal(weights[:, 0], weights[:, 1])


def test_each_resample_draws_as_many_patients_as_there_are() -> None:
    weights = patient_weights(["a", "b", "a", "c"], 100, 0)
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_the_seed_alone_decides_the_draw() -> None:
    people = [f"p-{i}" for i in range(20)]
    assert np.array_equal(patient_weights(people, 50, 1), patient_weights(people, 50, 1))
    assert not np.array_equal(patient_weights(people, 50, 1), patient_weights(people, 50, 2))


def test_nobody_to_draw_from_is_refused() -> None:
    with pytest.raises(ValueError, match="no patients"):
        patient_weights([], 10, 0)


def _width(patients: list[str], truth: np.ndarray, score: np.ndarray) -> float:
    draws = auroc(truth, score, patient_weights(patients, 500, 0))
    interval = score_of("auroc", "x", 0.8, draws, 0.95, patients, 20)
    assert interval.low is not None and interval.high is not None
    return interval.high - interval.low


def test_clustering_by_patient_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(40) % 2, 10) * 1.0  # forty patients, ten nearly equal images each
    score = np.repeat(rng.normal(size=40), 10) + truth
    images = [f"i-{i}" for i in range(400)]
    patients = [f"p-{i // 10}" for i in range(400)]
    assert _width(patients, truth, score) > 2 * _width(images, truth, score)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    true_auroc = 0.760249938906524  # of two normal distributions one standard deviation apart
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        truth = np.repeat(np.arange(60) % 2, 2) * 1.0
        person = np.repeat(rng.normal(size=60), 2)
        score = np.sqrt(0.5) * (person + rng.normal(size=120)) + truth
        patients = [f"p-{i // 2}" for i in range(120)]
        draws = auroc(truth, score, patient_weights(patients, 300, trial))
        interval = score_of("auroc", "x", 0.5, draws, 0.95, patients, 30)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= true_auroc <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_a_value_that_is_unknown_is_none_with_a_note() -> None:
    score = score_of("auroc", "x", np.nan, np.full(10, np.nan), 0.95, ["a", "b"], 2)
    assert (score.value, score.low, score.high) == (None, None, None)
    assert "not estimable" in score.note


@pytest.mark.parametrize("patients, kinds", [(["a", "a", "a"], 1), (["a", "b", "c"], 1)])
def test_one_patient_of_a_kind_has_a_value_but_no_interval(patients: list[str], kinds: int) -> None:
    score = score_of("auroc", "x", 0.8, np.full(10, 0.8), 0.95, patients, kinds)
    assert (score.value, score.low, score.high) == (0.8, None, None)
    assert "fewer than two patients" in score.note


def test_too_many_empty_resamples_give_no_interval() -> None:
    draws = np.concatenate([np.full(79, 0.8), np.full(21, np.nan)])
    score = score_of("auroc", "x", 0.8, draws, 0.95, ["a", "b", "c"], 2)
    assert score.low is None and "resamples" in score.note
    assert score_of("auroc", "x", 0.8, draws[:-2], 0.95, ["a", "b", "c"], 2).low == 0.8
