"""Intervals come from patients, and say so where they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import difference_of, drawn, estimate, mean_of, score_of

Weights = np.ndarray[Any, np.dtype[np.floating[Any]]]


def weights_of(patients: list[str], resamples: int, seed: int) -> Weights:
    ids = [f"s-{number:04d}" for number in range(len(patients))]
    return np.concatenate(list(drawn(ids, patients, resamples, seed)))


def test_images_of_one_patient_are_drawn_together() -> None:
    weights = weights_of(["a", "b", "a", "c", "b"], 200, 0)
    assert weights.shape == (200, 5)
    assert np.array_equal(weights[:, 0], weights[:, 2]) and np.array_equal(weights[:, 1], weights[:, 4])
    assert not np.array_equal(weights[:, 0], weights[:, 1])


def test_each_resample_draws_as_many_patients_as_there_are() -> None:
    weights = weights_of(["a", "b", "a", "c"], 100, 0)
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_every_patient_is_as_likely_as_another() -> None:
    weights = weights_of([f"p-{i}" for i in range(10)], 5000, 0)
    assert weights.mean(0) == pytest.approx(np.ones(10), abs=0.06)
    assert weights.var(0) == pytest.approx(np.full(10, 0.9), abs=0.1)  # of a multinomial: 1 - 1 / 10


def test_the_seed_alone_decides_the_draw() -> None:
    people = [f"p-{i}" for i in range(20)]
    assert np.array_equal(weights_of(people, 50, 1), weights_of(people, 50, 1))
    assert not np.array_equal(weights_of(people, 50, 1), weights_of(people, 50, 2))


def test_neither_names_nor_the_order_of_studies_decide_the_draw() -> None:
    people, ids = ["a", "b", "a", "c", "d"], ["s-3", "s-1", "s-0", "s-4", "s-2"]
    (weights,) = drawn(ids, people, 50, 1)
    (renamed,) = drawn(ids, [{"a": "z", "b": "y", "c": "x", "d": "w"}[name] for name in people], 50, 1)
    (turned,) = drawn(ids[::-1], people[::-1], 50, 1)
    assert np.array_equal(weights, renamed) and np.array_equal(weights, turned[:, ::-1])


def test_few_at_a_time_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    people = [f"p-{i // 2}" for i in range(20)]
    whole = weights_of(people, 50, 1)
    monkeypatch.setattr("medtl.evaluation.uncertainty._CHUNK", 7 * 20)
    ids = [f"s-{number:04d}" for number in range(20)]
    assert [len(some) for some in drawn(ids, people, 50, 1)] == [7] * 7 + [1]
    assert np.array_equal(weights_of(people, 50, 1), whole)


def test_nobody_to_draw_from_is_refused() -> None:
    with pytest.raises(ValueError, match="no patients"):
        next(drawn([], [], 10, 0))


def _width(patients: list[str], truth: np.ndarray, score: np.ndarray) -> float:
    draws = auroc(truth, score, weights_of(patients, 500, 0))
    interval = score_of("auroc", "x", estimate(0.8, draws, 0.95, 20, 0.9), 0.95, patients)
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
        draws = auroc(truth, score, weights_of(patients, 300, trial))
        interval = score_of("auroc", "x", estimate(0.5, draws, 0.95, 30, 0.884), 0.95, patients)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= true_auroc <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_a_nearly_perfect_model_on_few_patients_is_covered_where_the_drawing_alone_fails() -> None:
    true_auroc = 0.9933330752  # of two normal distributions 3.5 standard deviations apart
    rng = np.random.default_rng(1)
    truth, people = np.arange(16) % 2 * 1.0, [f"p-{i}" for i in range(16)]
    alone = covered = 0
    for trial in range(100):
        score = rng.normal(size=16) + 3.5 * truth
        draws = auroc(truth, score, weights_of(people, 200, trial))
        alone += bool(np.quantile(draws, 0.025) <= true_auroc <= np.quantile(draws, 0.975))
        value = float(auroc(truth, score, np.ones((1, 16)))[0])
        interval = score_of("auroc", "x", estimate(value, draws, 0.95, 8, 0.025 ** (1 / 8)), 0.95, people)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= true_auroc <= interval.high
    assert alone < 50 and covered >= 95


def test_a_value_that_is_unknown_is_none_with_a_note() -> None:
    score = score_of("auroc", "x", estimate(np.nan, np.full(10, np.nan), 0.95, 2, 0.5), 0.95, ["a", "b"])
    assert (score.value, score.low, score.high) == (None, None, None)
    assert "not estimable" in score.note


def test_one_patient_of_a_kind_has_a_value_but_no_interval() -> None:
    score = score_of("auroc", "x", estimate(0.8, np.full(10, 0.8), 0.95, 1, 0.5), 0.95, ["a", "b", "c"])
    assert (score.value, score.low, score.high) == (0.8, None, None)
    assert "fewer than two patients" in score.note


def test_too_many_empty_resamples_give_no_interval() -> None:
    draws = np.concatenate([np.linspace(0.7, 0.9, 79), np.full(21, np.nan)])
    score = score_of("auroc", "x", estimate(0.8, draws, 0.95, 2, 0.9), 0.95, ["a", "b", "c"])
    assert score.low is None and "resamples" in score.note
    assert score_of("auroc", "x", estimate(0.8, draws[:-2], 0.95, 2, 0.9), 0.95, ["a"]).low == pytest.approx(0.705)


def test_an_interval_the_patients_allow_is_left_alone() -> None:
    found = estimate(0.8, np.linspace(0.7, 0.9, 100), 0.95, 50, 0.93)
    assert (found.below, found.above, found.bounded) == (0, 0, "")


@pytest.mark.parametrize("value, low, high", [(1.0, 0.6, 1.0), (0.0, 0.0, 0.4), (0.5, 0.3, 0.7)])
def test_where_no_resample_differs_the_exact_bound_stands_in(value: float, low: float, high: float) -> None:
    score = score_of("auroc", "x", estimate(value, np.full(10, value), 0.95, 5, 0.6), 0.95, ["a"] * 5)
    assert [score.low, score.high] == pytest.approx([low, high])
    assert "exact bound" in score.note


def test_a_nearly_perfect_value_shows_no_more_than_a_perfect_one() -> None:
    draws = np.concatenate([np.linspace(0.9, 1, 100), np.ones(5)])
    found = score_of("auroc", "x", estimate(0.98, draws, 0.95, 5, 0.6), 0.95, ["a"] * 5)
    assert found.low == pytest.approx(0.6) and found.high == 1


def test_errors_of_many_patients_are_left_to_the_drawing() -> None:
    draws = np.random.default_rng(0).normal(0.98, 0.004, 1000).clip(0, 0.999)
    found = estimate(0.98, draws, 0.95, 15, 0.78)
    assert (found.below, found.above, found.bounded) == (0, 0, "")


def test_a_mean_takes_over_what_its_parts_lack() -> None:
    good = estimate(0.8, np.linspace(0.7, 0.9, 100), 0.95, 50, 0.95)
    perfect = estimate(1.0, np.ones(100), 0.95, 50, 0.9)
    mean = score_of("auroc", "macro", mean_of([good, perfect], ["a", "b"]), 0.95, ["x"])
    assert mean.value == pytest.approx(0.9) and mean.note.endswith("(b)")
    assert mean.low == pytest.approx((0.705 + 0.9) / 2)
    unknown = estimate(np.nan, np.full(100, np.nan), 0.95, 50, 0.9)
    assert mean_of([good, unknown], ["a", "b"]).problem == "not estimable: no value for b"
    lonely = estimate(1.0, np.ones(100), 0.95, 1, 0.9)
    assert mean_of([good, lonely], ["a", "b"]).problem == "interval not estimable: none for b"


def test_a_difference_may_be_as_far_off_as_both() -> None:
    perfect, poor = estimate(1.0, np.ones(100), 0.95, 5, 0.6), estimate(0.8, np.linspace(0.7, 0.9, 100), 0.95, 50, 0.95)
    score = score_of("d", "x", difference_of(perfect, poor), 0.95, ["a"], lowest=-1.0)
    assert [score.low, score.high] == pytest.approx([0.105 - 0.4, 0.295])
