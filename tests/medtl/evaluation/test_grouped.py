"""The AUROC of cross-validation is scikit-learn's, and its interval counts patients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medtl.config import UncertaintyConfig
from medtl.evaluation.comparison import compare
from medtl.evaluation.grouped import mean_auroc
from medtl.records import Predictions, Task

CONFIG = UncertaintyConfig(resamples=300)


def predictions(classes: int, per_patient: int = 1, multilabel: bool = False, patients: int = 40) -> Predictions:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(patients) % classes, per_patient)
    scores = rng.dirichlet(np.ones(classes), patients).repeat(per_patient, 0) + 0.4 * np.eye(classes)[label]
    targets: Any = np.eye(classes)[label]
    if multilabel:
        targets[::5, 0] = np.nan
    ids = tuple(f"s-{i:04d}" for i in range(len(label)))
    people = tuple(f"p-{i // per_patient}" for i in range(len(label)))
    return Predictions("val", ids, people, targets, scores / scores.sum(1, keepdims=True))


@pytest.mark.parametrize(("task", "classes"), [("binary", 2), ("multiclass", 3), ("multilabel", 3)])
def test_the_value_is_scikit_learns(task: Task, classes: int) -> None:
    given = predictions(classes, multilabel=task == "multilabel")
    names = tuple("abc"[:classes])
    known = np.isfinite(given.targets)
    each = [roc_auc_score(given.targets[k, i], given.probabilities[k, i]) for i, k in enumerate(known.T)]
    found = mean_auroc(given, task, names, CONFIG, 0)
    assert found.value == pytest.approx(each[-1] if task == "binary" else np.mean(each))
    assert found.label == (names[-1] if task == "binary" else "macro")
    assert found.low is not None and found.high is not None and found.low < found.value < found.high


def test_the_interval_is_that_of_a_comparison() -> None:
    given = predictions(3)
    same = compare(given, given, ("a", "b"), CONFIG, 0).reference_score
    found = mean_auroc(given, "multiclass", ("a", "b", "c"), CONFIG, 0)
    assert (found.value, found.low, found.high) == pytest.approx((same.value, same.low, same.high))


def test_more_images_of_the_same_patients_do_not_narrow_the_interval() -> None:
    one, many = (mean_auroc(predictions(2, n), "binary", ("a", "b"), CONFIG, 0) for n in (1, 5))
    assert (many.n, many.patients) == (200, 40)
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.15)


def test_a_class_that_nobody_has_is_said() -> None:
    given = predictions(2)
    targets = np.concatenate([given.targets, np.zeros((len(given.targets), 1))], axis=1)
    wide = np.concatenate([given.probabilities, np.zeros((len(given.targets), 1))], axis=1)
    found = mean_auroc(
        Predictions("val", given.study_ids, given.patients, targets, wide), "multiclass", ("a", "b", "rare"), CONFIG, 0
    )
    assert found.value is None and "rare" in found.note
