"""Solved heads are scikit-learn's, folded into the network's own linear head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from medtl.errors import ModelError
from medtl.model import heads
from medtl.model.heads import Linear, NearestNeighbours, solve


def features(classes: int = 2, n: int = 120, seed: int = 0) -> tuple[Any, Any, list[str]]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = rng.normal(size=(n, 6)) + 1.2 * np.eye(6)[labels]
    x[:, 3] *= 50  # scales differ, as those of features do
    x[:, 5] = 7.0  # a feature that never varies
    return x, np.eye(classes)[labels], [f"p-{i // 4}" for i in range(n)]


def probabilities(head: Linear, x: Any) -> Any:
    logits = torch.from_numpy(x @ head.weight.T + head.bias)
    return logits.softmax(1).numpy()


def first(monkeypatch: pytest.MonkeyPatch, kind: heads.Kind, classes: int, **options: Any) -> Any:
    monkeypatch.setattr(heads, "STRENGTHS", (0.1,))
    monkeypatch.setattr(heads, "NEIGHBOURS", (7,))
    x, targets, groups = features(classes)
    return solve(kind, x, targets, groups, "multiclass", options.get("balanced", False), lambda head: 1.0, 0)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_logistic_head_gives_scikit_learns_probabilities(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    head = first(monkeypatch, "logistic_regression", classes)
    x, targets, _ = features(classes)
    spread = np.where(x.std(0) > 0, x.std(0), 1.0)
    oracle = LogisticRegression(C=0.1, max_iter=2000).fit((x - x.mean(0)) / spread, targets.argmax(1))
    assert probabilities(head, x) == pytest.approx(oracle.predict_proba((x - x.mean(0)) / spread), abs=1e-4)


@pytest.mark.parametrize("classes", [2, 3])
def test_an_svm_head_separates_and_its_probabilities_are_calibrated(
    monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    head = first(monkeypatch, "linear_svm", classes)
    x, targets, _ = features(classes, n=600, seed=1)
    found = probabilities(head, x)
    assert (found.argmax(1) == targets.argmax(1)).mean() > 0.6
    right = found[np.arange(len(x)), found.argmax(1)]
    assert right.mean() == pytest.approx((found.argmax(1) == targets.argmax(1)).mean(), abs=0.12)


def test_nearest_neighbours_find_what_scikit_learn_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    head = first(monkeypatch, "knn", 3)
    x, targets, _ = features(3)
    new, _, _ = features(3, seed=5)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    oracle = KNeighborsClassifier(7, weights=lambda d: np.exp(-(d**2) / 2 / 0.07)).fit(unit(x), targets.argmax(1))
    found = head(torch.from_numpy(new)).softmax(1).numpy()
    assert found == pytest.approx(oracle.predict_proba(unit(new)), abs=1e-4)


def test_the_strength_that_validates_best_is_chosen() -> None:
    x, targets, groups = features()
    seen: list[float] = []

    def score(head: Any) -> float:
        seen.append(float(np.abs(head.weight).max()))
        return -abs(len(seen) - 3)

    head = solve("logistic_regression", x, targets, groups, "binary", False, score, 0)
    assert isinstance(head, Linear)
    assert float(np.abs(head.weight).max()) == seen[2] and len(seen) == len(heads.STRENGTHS)


@pytest.mark.parametrize("kind", ["logistic_regression", "linear_svm"])
def test_labels_that_nobody_read_do_not_count(kind: heads.Kind) -> None:
    x, targets, groups = features()
    holes = np.stack([targets[:, 1], np.where(np.arange(len(x)) < 60, targets[:, 1], np.nan), np.zeros(len(x))], 1)
    head = solve(kind, x, holes, groups, "multilabel", False, lambda head: 1.0, 0)
    assert isinstance(head, Linear)
    half = solve(kind, x[:60], holes[:60, :1], groups[:60], "multilabel", False, lambda head: 1.0, 0)
    assert isinstance(half, Linear)
    logits = x @ head.weight.T + head.bias
    assert np.corrcoef(logits[:, 0], holes[:, 0])[0, 1] > 0.5
    assert np.sign(head.weight[1, 0]) == np.sign(half.weight[0, 0])
    assert (logits[:, 2] < -4).all(), "a label that nobody has keeps its rate"


def test_neighbours_without_a_reading_are_not_asked() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    votes = torch.tensor([[torch.nan], [1.0], [0.0]])
    head = NearestNeighbours(bank, votes, 2, multilabel=True)
    assert float(head(torch.tensor([[1.0, 0.0]])).sigmoid()) > 0.99


def test_a_class_that_training_lacks_is_never_predicted() -> None:
    x, targets, groups = features(3)
    only_two = targets.argmax(1) < 2
    who = [g for g, keep in zip(groups, only_two, strict=True) if keep]
    head = solve("logistic_regression", x[only_two], targets[only_two], who, "multiclass", False, lambda h: 1.0, 0)
    assert isinstance(head, Linear)
    assert probabilities(head, x)[:, 2].max() < 1e-6
    with pytest.raises(ModelError, match="one class only"):
        solve("knn", x[:1], targets[:1], ["p"], "multiclass", False, lambda h: 1.0, 0)
