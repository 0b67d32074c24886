"""The judge of two models: patients are drawn, not images."""

from __future__ import annotations

import numpy as np
import pytest

from medtl.evaluation.superiority import Watched, share_better

METRICS: list[Watched] = ["auroc", "average_precision", "balanced_accuracy", "loss"]


def judged(new: np.ndarray, old: np.ndarray, truth: np.ndarray, metric: Watched, images: int = 1) -> float:
    names = [f"s{i:03d}" for i in range(len(truth))]
    patients = [f"p{i // images}" for i in range(len(truth))]
    both = lambda p: np.stack([1 - p, p], 1)  # noqa: E731
    return share_better(both(new), both(old), np.eye(2)[truth], names, patients, metric, 400, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_a_clearly_better_model_wins_nearly_always_and_an_equal_one_half(metric: Watched) -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 2
    good = np.clip(0.25 + 0.5 * truth + rng.normal(0, 0.15, 200), 0.01, 0.99)
    poor = np.clip(0.45 + 0.1 * truth + rng.normal(0, 0.25, 200), 0.01, 0.99)
    assert judged(good, poor, truth, metric) > 0.97
    assert judged(poor, good, truth, metric) < 0.03
    assert judged(good, good, truth, metric) == 0.5


def test_many_images_of_few_patients_convince_less() -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(8) % 2, 25)
    old = np.clip(0.5 + rng.normal(0, 0.1, 200), 0, 1)
    new = old + np.where(np.arange(200) < 25, -0.3, 0.0) + np.where(np.arange(200) >= 175, 0.02, 0.0)  # one patient
    assert judged(new, old, truth, "auroc", images=1) > judged(new, old, truth, "auroc", images=25)


def test_classes_that_a_resample_lacks_do_not_decide() -> None:
    targets = np.array([[1, np.nan], [0, np.nan], [1, np.nan], [0, np.nan]])
    new, old = np.array([[0.9, 0.5], [0.1, 0.5], [0.8, 0.5], [0.2, 0.5]]), np.full((4, 2), 0.5)
    found = share_better(new, old, targets, list("abcd"), list("abcd"), "auroc", 200, 0)
    assert found > 0.9
