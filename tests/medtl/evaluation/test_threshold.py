"""The operating point reaches what its rule promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from medtl.config import ThresholdConfig
from medtl.evaluation.threshold import choose, decide
from medtl.records import OperatingPoint, Predictions

Array = np.ndarray[Any, np.dtype[np.float64]]


@st.composite
def validations(draw: st.DrawFn) -> tuple[Array, Array]:
    n = draw(st.integers(2, 40))
    truth = np.array([0, 1, *draw(st.lists(st.integers(0, 1), min_size=n - 2, max_size=n - 2))], float)
    return truth, np.array(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)), float) / 20


def rates(truth: Array, score: Array, threshold: float) -> tuple[float, float]:
    called = score >= threshold
    return float(called[truth == 1].mean()), float((~called[truth == 0]).mean())


@settings(derandomize=True, deadline=None, max_examples=50)
@given(validations())
def test_no_threshold_has_a_larger_youden_index(data: tuple[Array, Array]) -> None:
    truth, score = data
    point = choose(truth, score, ThresholdConfig(rule="youden"), "ill")
    fall_out, recall, _ = roc_curve(truth, score, drop_intermediate=False)
    assert sum(rates(truth, score, point.threshold)) - 1 == pytest.approx((recall - fall_out).max())
    assert (point.chosen_on, point.label) == ("val", "ill")


@settings(derandomize=True, deadline=None, max_examples=50)
@given(validations(), st.sampled_from([0.0, 0.5, 0.8, 0.9, 1.0]))
def test_sensitivity_reaches_its_target_at_the_most_specific_threshold(
    data: tuple[Array, Array], target: float
) -> None:
    truth, score = data
    reached, specific = rates(
        truth, score, choose(truth, score, ThresholdConfig(rule="sensitivity", target=target), "ill").threshold
    )
    assert reached >= target - 1e-9
    others = [rates(truth, score, value) for value in [*np.unique(score), 2.0]]
    assert specific == pytest.approx(max(other for hit, other in others if hit >= target - 1e-9))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(validations(), st.sampled_from([0.0, 0.5, 0.8, 0.9, 1.0]))
def test_specificity_reaches_its_target_at_the_most_sensitive_threshold(
    data: tuple[Array, Array], target: float
) -> None:
    truth, score = data
    hit, reached = rates(
        truth, score, choose(truth, score, ThresholdConfig(rule="specificity", target=target), "ill").threshold
    )
    assert reached >= target - 1e-9
    others = [rates(truth, score, value) for value in [*np.unique(score), 2.0]]
    assert hit == pytest.approx(max(other for other, spared in others if spared >= target - 1e-9))


def test_the_threshold_lies_between_scores_so_that_a_last_digit_moves_nothing() -> None:
    truth, score = np.array([0.0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.9])
    assert choose(truth, score, ThresholdConfig(), "ill").threshold == pytest.approx(0.4)


@pytest.mark.parametrize("truth", [np.zeros(3), np.ones(3), np.array([])])
@pytest.mark.parametrize("rule", ["youden", "sensitivity", "specificity", "cost"])
def test_one_kind_only_gives_one_half_and_says_so(truth: Array, rule: Any) -> None:
    point = choose(truth, np.linspace(0, 1, len(truth)), ThresholdConfig(rule=rule), "ill")
    assert point.threshold == 0.5 and point.chosen_on == "none" and "one kind" in point.rule


@settings(derandomize=True, deadline=None, max_examples=50)
@given(validations(), st.sampled_from(["youden", "sensitivity", "specificity", "cost"]), st.integers(0, 2**32 - 1))
def test_a_nudge_of_the_last_digits_flips_no_decision(data: tuple[Array, Array], rule: Any, seed: int) -> None:
    truth, score = data
    nudge = np.random.default_rng(seed).uniform(-1e-7, 1e-7, len(score))
    nudged = np.clip(score + nudge, 0, 1)
    config = ThresholdConfig(rule=rule, target=0.8)
    point, other = choose(truth, score, config, "ill").threshold, choose(truth, nudged, config, "ill").threshold
    assert ((score >= point) == (nudged >= point)).all()
    assert other == pytest.approx(point, abs=1e-6)
    assert np.isfinite(point)


@pytest.mark.parametrize("rule, score", [("sensitivity", [0.2, 0.3]), ("specificity", [0.3, 0.2])])
def test_where_only_an_extreme_reaches_the_target_it_lies_off_the_scores(rule: Any, score: list[float]) -> None:
    point = choose(np.array([1.0, 0]), np.array(score[::-1]), ThresholdConfig(rule=rule, target=1.0), "ill")
    assert min(abs(point.threshold - value) for value in score) > 0.04


@settings(derandomize=True, deadline=None, max_examples=50)
@given(validations(), st.sampled_from([0.2, 1.0, 10.0]), st.sampled_from([None, 0.01, 0.5]))
def test_no_threshold_costs_less(data: tuple[Array, Array], cost: float, prevalence: float | None) -> None:
    truth, score = data
    share = truth.mean() if prevalence is None else prevalence
    point = choose(truth, score, ThresholdConfig(rule="cost", cost=cost, prevalence=prevalence), "ill")

    def lost(threshold: float) -> float:
        hit, spared = rates(truth, score, threshold)
        return float(cost * share * (1 - hit) + (1 - share) * (1 - spared))

    assert lost(point.threshold) == pytest.approx(min(lost(value) for value in [*np.unique(score), 2.0]))
    assert f"a miss as {cost:g} false alarms" in point.rule and point.chosen_on == "val"


def test_the_dearer_a_miss_the_lower_the_threshold() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0.0, 1.0], 200)
    score = 1 / (1 + np.exp(-(rng.normal(size=400) + 2 * truth - 1)))
    at = [choose(truth, score, ThresholdConfig(rule="cost", cost=cost), "ill").threshold for cost in (0.1, 1, 10, 100)]
    assert at == sorted(at, reverse=True) and at[0] > at[3]


def test_a_study_is_decided_as_its_task_says() -> None:
    scores = np.array([[0.5, 0.2, 0.3], [0.3, 0.6, 0.4]])
    some = Predictions("test", ("s-1", "s-2"), ("p-1", "p-2"), np.zeros((2, 3)), scores)
    points = [OperatingPoint(name, at, "x", "val") for name, at in (("a", 0.3), ("b", 0.2), ("c", 0.4))]
    assert decide(some, "multiclass", points).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert decide(some, "multilabel", points).tolist() == [[1, 1, 0], [1, 1, 1]]
    two = Predictions("test", ("s-1", "s-2"), ("p-1", "p-2"), np.zeros((2, 2)), np.array([[0.7, 0.3], [0.3, 0.7]]))
    assert decide(two, "binary", points[2:]).tolist() == [[1, 0], [0, 1]]
