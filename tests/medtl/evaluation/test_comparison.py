"""Two models, the same patients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medtl.config import UncertaintyConfig
from medtl.evaluation.comparison import compare
from medtl.evaluation.metrics import auroc
from medtl.evaluation.uncertainty import drawn
from medtl.records import Predictions

FEW = UncertaintyConfig(resamples=200)


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
