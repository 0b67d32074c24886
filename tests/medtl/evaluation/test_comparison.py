"""Two models, the same patients."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control
from sklearn.metrics import f1_score, roc_auc_score

from medtl.config import ThresholdConfig, UncertaintyConfig
from medtl.evaluation.comparison import change, compare, corrected, judge, swap_test
from medtl.evaluation.delong import area, contrast
from medtl.evaluation.metrics import METRICS, auroc
from medtl.evaluation.threshold import choose, decide
from medtl.evaluation.uncertainty import drawn
from medtl.records import Predictions, Score

FEW = UncertaintyConfig(resamples=200)
SOME = settings(derandomize=True, max_examples=40, deadline=None)


def predicted(strength: float, n: int = 80, noise: int = 0) -> Predictions:
    labels = np.arange(n) % 2
    chance = np.random.default_rng(7).normal(size=n) + 0.3 * np.random.default_rng(noise).normal(size=n)
    score = 1 / (1 + np.exp(-(chance + strength * labels)))
    ids, people = tuple(f"s-{i}" for i in range(n)), tuple(f"p-{i // 2}" for i in range(n))
    return Predictions("test", ids, people, np.eye(2)[labels], np.stack([1 - score, score], 1))


def test_a_model_does_not_differ_from_itself() -> None:
    difference = compare(predicted(1), predicted(1), ("model", "same"), FEW, 0).difference
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_the_difference_is_of_the_aurocs_and_its_sign_says_who_is_better() -> None:
    good, poor = predicted(2), predicted(0.5)
    found = compare(good, poor, ("good", "poor"), FEW, 0)
    areas = [roc_auc_score(p.targets[:, 1], p.probabilities[:, 1]) for p in (good, poor)]
    assert found.difference.value == pytest.approx(areas[0] - areas[1])
    assert found.reference_score.value == pytest.approx(areas[1])
    assert found.difference.low is not None and found.difference.low > 0
    assert compare(poor, good, ("poor", "good"), FEW, 0).difference.value == pytest.approx(areas[1] - areas[0])


def test_pairing_makes_the_interval_narrower_than_two_models_apart() -> None:
    model, reference = predicted(1, noise=1), predicted(1, noise=2)
    paired = compare(model, reference, ("a", "b"), FEW, 0).difference
    apart = [
        auroc(p.targets[:, 1], p.probabilities[:, 1], next(drawn(p.study_ids, p.patients, 200, seed)))
        for seed, p in enumerate((model, reference))
    ]
    low, high = np.quantile(apart[0] - apart[1], [0.025, 0.975])
    assert paired.low is not None and paired.high is not None
    assert paired.high - paired.low < 0.7 * (high - low)


@pytest.mark.parametrize("field", ["study_ids", "patients", "targets"])
def test_models_of_other_studies_are_not_paired(field: str) -> None:
    model = predicted(1)
    other = replace(model, **{field: getattr(model, field)[::-1]})
    with pytest.raises(ValueError, match="same studies in the same order"):
        compare(model, other, ("a", "b"), FEW, 0)


def test_one_class_is_not_estimable() -> None:
    model = replace(predicted(1), targets=np.tile([0.0, 1.0], (80, 1)))
    found = compare(model, model, ("a", "b"), FEW, 0)
    assert found.difference.value is None and "not estimable" in found.difference.note


def test_unknown_targets_are_left_out_of_both() -> None:
    targets = predicted(1).targets.copy()
    targets[:10] = np.nan
    good, poor = (replace(predicted(strength), targets=targets) for strength in (2, 0.5))
    found = compare(good, poor, ("good", "poor"), FEW, 0)
    assert found.reference_score.value == pytest.approx(roc_auc_score(targets[10:, 1], poor.probabilities[10:, 1]))


def test_two_perfect_models_on_few_patients_may_differ() -> None:
    labels = np.arange(12) % 2
    ids, people = tuple(f"s-{i}" for i in range(12)), tuple(f"p-{i}" for i in range(12))
    perfect = Predictions("test", ids, people, np.eye(2)[labels], np.eye(2)[labels])
    found = compare(perfect, perfect, ("a", "b"), FEW, 0)
    assert found.difference.value == 0
    assert found.difference.low == pytest.approx(-(1 - 0.025 ** (1 / 6)))
    assert found.difference.high == pytest.approx(1 - 0.025 ** (1 / 6))
    assert found.reference_score.low == pytest.approx(0.025 ** (1 / 6))


def test_a_class_that_one_cannot_measure_leaves_no_mean() -> None:
    targets = np.stack([predicted(1).targets[:, 1], np.ones(80)], 1)
    model = replace(predicted(1), targets=targets)
    found = compare(model, model, ("a", "b"), FEW, 0)
    assert found.difference.value is None and "class 2 of 2" in found.difference.note


def both_decided(*models: Predictions) -> Any:
    points = [choose(p.targets[:, 1], p.probabilities[:, 1], ThresholdConfig(), "ill") for p in models]
    return tuple(decide(p, "binary", [point]) for p, point in zip(models, points, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_any_metric_can_be_compared(metric: str) -> None:
    good, poor = predicted(2, noise=1), predicted(0.5, noise=2)
    found = compare(good, poor, ("a", "b"), FEW, 0, metric, decisions=both_decided(good, poor))
    assert found.difference.value is not None and found.reference_score.value is not None
    if metric == "f1":
        areas = [f1_score(good.targets[:, 1], called[:, 1]) for called in both_decided(good, poor)]
        assert found.difference.value == pytest.approx(areas[0] - areas[1])
    if metric == "prevalence":
        assert found.difference.value == 0 and found.verdict is None
    else:
        assert found.difference.low is not None and found.difference.high is not None
        assert found.difference.low <= found.difference.value <= found.difference.high
    if metric in ("log_loss", "f1", "mcc", "balanced_accuracy"):
        assert found.verdict == "superior"


def test_a_metric_of_decisions_wants_them() -> None:
    with pytest.raises(ValueError, match="rests on decisions"):
        compare(predicted(1), predicted(2), ("a", "b"), FEW, 0, "f1")


def test_the_ranking_is_tested_by_delong_over_patients() -> None:
    good, poor = predicted(2, noise=1), predicted(0.5, noise=2)
    (test,) = compare(good, poor, ("a", "b"), FEW, 0).tests
    people = np.arange(80) // 2
    wanted = contrast(*([area(p.targets[:, 1], p.probabilities[:, 1], people)] for p in (good, poor)))
    assert (test.statistic, test.p_value) == pytest.approx((wanted.z, wanted.p_value))
    assert test.name == "DeLong, paired, over patients"
    apart = [replace(p, patients=p.study_ids) for p in (good, poor)]
    assert compare(apart[0], apart[1], ("a", "b"), FEW, 0).tests[0].name == "DeLong, paired"


def test_a_test_that_cannot_be_made_says_so() -> None:
    model = replace(predicted(1), targets=np.tile([0.0, 1.0], (80, 1)))
    (test,) = compare(model, model, ("a", "b"), FEW, 0).tests
    assert test.p_value is None and "not estimable" in test.note


def test_decisions_are_tested_by_swapping_whole_patients() -> None:
    good, poor = predicted(2, noise=1), predicted(0.5, noise=2)
    decisions = both_decided(good, poor)
    test = compare(good, poor, ("a", "b"), FEW, 0, decisions=decisions).tests[1]
    right = [(called == good.targets).all(1).astype(float) for called in decisions]
    assert (test.statistic, test.p_value) == pytest.approx(swap_test(right[0], right[1], np.arange(80) // 2))
    assert test.name == "McNemar, exact, patients swapped whole"


@SOME
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_with_one_study_of_each_patient_swapping_is_mcnemars_exact_test(right: list[tuple[bool, bool]]) -> None:
    one, other = np.array(right, float).T
    gained, lost = int((one > other).sum()), int((one < other).sum())
    statistic, p_value = swap_test(one, other, np.arange(len(one)))
    wanted = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert (statistic, p_value) == pytest.approx((gained - lost, wanted))


@SOME
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 7)), min_size=1, max_size=30))
def test_with_several_it_counts_every_way_to_swap_patients(right: list[tuple[bool, bool, int]]) -> None:
    one, other, patient = np.array(right, float).T
    ahead = [float((one - other)[patient == p].sum()) for p in range(8)]
    all_ways = [sum(s * a for s, a in zip(signs, ahead, strict=True)) for signs in itertools.product((-1, 1), repeat=8)]
    wanted = np.mean([abs(way) >= abs(sum(ahead)) for way in all_ways])
    assert swap_test(one, other, patient.astype(int))[1] == pytest.approx(wanted)


def test_alike_images_of_a_patient_are_no_further_witnesses() -> None:
    one, other = np.repeat([1.0, 1, 1, 0], 10), np.repeat([0.0, 0, 0, 1], 10)
    assert swap_test(one, other, np.repeat(np.arange(4), 10))[1] == pytest.approx(
        swap_test(one[::10], other[::10], np.arange(4))[1]
    )
    assert swap_test(one, other, np.arange(40))[1] < 0.01


def interval(low: float, high: float) -> Score:
    return Score("auroc difference", "ill", (low + high) / 2, low, high, 100, 50)


@pytest.mark.parametrize(
    "low, high, without, with_margin",
    [
        (0.01, 0.05, "superior", "superior"),
        (-0.03, 0.05, "inconclusive", "non-inferior"),
        (-0.04, -0.01, "inferior", "non-inferior"),
        (-0.08, 0.05, "inconclusive", "inconclusive"),
        (-0.08, -0.01, "inferior", "inconclusive"),
        (-0.09, -0.06, "inferior", "inferior"),
        (-0.05, 0.05, "inconclusive", "inconclusive"),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_margin(
    low: float, high: float, without: str, with_margin: str
) -> None:
    assert judge(interval(low, high)) == without
    assert judge(interval(low, high), 0.05) == with_margin
    assert judge(interval(-high, -low), 0.05, higher_is_better=False) == with_margin
    assert judge(replace(interval(low, high), low=None), 0.05) is None
    assert judge(interval(low, high), 0.05, higher_is_better=None) is None


def test_a_comparison_carries_margin_and_verdict() -> None:
    found = compare(predicted(1), predicted(1), ("model", "same"), FEW, 0, margin=0.05)
    assert (found.margin, found.verdict) == (0.05, "non-inferior")
    assert compare(predicted(0.2), predicted(3), ("poor", "good"), FEW, 0, margin=0.05).verdict == "inferior"


def test_a_change_between_two_sets_of_patients_is_as_open_as_both() -> None:
    before, after = Score("auroc", "ill", 0.95, 0.92, 0.97, 100, 50), Score("auroc", "ill", 0.85, 0.75, 0.91, 40, 20)
    found = change(before, after)
    assert found.value == pytest.approx(-0.1) and (found.n, found.patients) == (40, 20)
    assert found.low == pytest.approx(-0.1 - np.hypot(0.1, 0.02)) and found.high == pytest.approx(
        -0.1 + np.hypot(0.06, 0.03)
    )
    lost = change(before, replace(after, low=None, high=None, note="interval not estimable: few"))
    assert lost.value == pytest.approx(-0.1) and (lost.low, lost.note) == (None, "interval not estimable: few")
    assert change(before, replace(after, value=None)).value is None


@SOME
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_p_values_are_corrected_for_how_many_there_are(given_values: list[float | None]) -> None:
    known = [p for p in given_values if p is not None]
    holm, rate = (corrected(given_values, method) for method in ("holm", "benjamini-hochberg"))
    assert [p is None for p in holm] == [p is None for p in given_values] == [p is None for p in rate]
    found = [p for p in rate if p is not None]
    assert found == pytest.approx(false_discovery_control(known) if known else [])
    for p, adjusted in zip(given_values, holm, strict=True):
        if p is not None and adjusted is not None:  # Holm by its definition: the largest of the steps up to this one
            steps = [min(1.0, sum(other >= step for other in known) * step) for step in known if step <= p]
            assert adjusted == pytest.approx(max(steps)) and adjusted >= p
