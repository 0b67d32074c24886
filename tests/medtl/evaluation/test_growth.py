"""The score of a learning curve is the one that a report gives of the test part; of masks the mean over structures."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medtl.config import EvaluationConfig, UncertaintyConfig
from medtl.evaluation.assess import assess
from medtl.evaluation.growth import auroc_gain, auroc_of, dice_gain, dice_of
from medtl.records import FloatArray, Predictions

CONFIG = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=300))


def predictions(part: str, classes: int, seed: int) -> Predictions:
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(60) % classes)
    score = rng.random((60, classes)) + np.eye(classes)[truth]
    names, people = tuple(f"{part}{i}" for i in range(60)), tuple(f"{part}-p{i // 2}" for i in range(60))
    return Predictions(part, names, people, np.eye(classes)[truth], score / score.sum(1, keepdims=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [2, 4])
def test_it_is_the_score_that_a_report_would_give(classes: int) -> None:
    one, other = predictions("val", classes, 1), predictions("test", classes, 2)
    task, names = ("binary" if classes == 2 else "multiclass"), tuple("abcd"[:classes])
    found = auroc_of(other, task, names, CONFIG, 5)
    assert found == assess(one, other, task, names, CONFIG, 5).metrics["auroc"]
    wanted = roc_auc_score(other.targets, other.probabilities, average="macro")
    assert found.value == pytest.approx(wanted, abs=1e-12)


def test_the_gain_is_the_difference_over_the_same_patients() -> None:
    many = predictions("val", 2, 1)
    few = Predictions("val", many.study_ids, many.patients, many.targets, many.probabilities[::-1].copy())
    gain = auroc_gain(many, few, CONFIG, 0)
    each = [auroc_of(one, "binary", ("a", "b"), CONFIG, 0).value for one in (many, few)]
    assert gain.value == pytest.approx(each[0] - each[1])  # type: ignore[operator]
    assert gain.low is not None and 0 < gain.low < gain.value < gain.high  # type: ignore[operator]
    nothing = auroc_gain(many, many, CONFIG, 0)
    assert nothing.value == 0 and nothing.low is not None and nothing.high is not None
    assert nothing.low <= 0 <= nothing.high


def test_the_gain_of_dice_leaves_out_what_one_of_the_two_lacks() -> None:
    rng = np.random.default_rng(0)
    few = rng.uniform(0.6, 0.7, (12, 2))
    many = few + rng.uniform(0.02, 0.06, few.shape)
    few[0] = np.nan
    many[1, 0] = np.nan
    names, people = [f"s{i}" for i in range(12)], [f"p{i // 2}" for i in range(12)]
    gain = dice_gain(many, few, names, people, CONFIG, 0)
    wanted = [float(np.nanmean(row)) for row in (many - few)[1:]]
    assert gain.value == pytest.approx(np.mean(wanted))
    assert gain.low is not None and gain.low > 0
    assert (gain.n, gain.patients) == (11, 6)


def test_one_class_alone_is_not_estimable() -> None:
    whole = predictions("val", 2, 1)
    alone = Predictions("val", whole.study_ids, whole.patients, np.eye(2)[np.zeros(60, int)], whole.probabilities)
    assert auroc_of(alone, "binary", ("a", "b"), CONFIG, 0).value is None


def test_dice_is_the_mean_over_patients_of_the_mean_over_structures() -> None:
    dice: FloatArray = np.array([[0.9, 0.7], [np.nan, 0.6], [np.nan, np.nan], [0.8, 0.8]])
    found = dice_of(dice, list("abcd"), list("wxyz"), CONFIG, 0)
    assert (found.metric, found.value) == ("dice", pytest.approx((0.8 + 0.6 + 0.8) / 3))
    assert "1 of 4 cases not estimable" in found.note
    assert dice_of(dice[2:3], ["c"], ["y"], CONFIG, 0).value is None
