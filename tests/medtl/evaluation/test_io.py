"""What is written comes back, and twice the same is the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medtl.config import EvaluationConfig, UncertaintyConfig
from medtl.evaluation.assess import assess
from medtl.evaluation.comparison import compare
from medtl.evaluation.io import (
    read_comparison,
    read_evaluation,
    read_predictions,
    write_comparison,
    write_evaluation,
    write_predictions,
)
from medtl.records import Predictions

FEW = UncertaintyConfig(resamples=100)


def predicted() -> Predictions:
    truth = np.array([[1.0, 0], [0, 1], [1, np.nan], [0, 1], [1, 0], [np.nan, 0]])
    ids, people = tuple(f"s-{i}" for i in range(6)), tuple(f"p-{i}" for i in range(6))
    return Predictions("test", ids, people, truth, np.random.default_rng(0).random((6, 2)))


def test_predictions_come_back_with_what_is_unknown(tmp_path: Path) -> None:
    predictions = predicted()
    write_predictions(tmp_path, predictions)
    back = read_predictions(tmp_path)
    assert (back.part, back.study_ids, back.patients) == ("test", predictions.study_ids, predictions.patients)
    assert np.array_equal(back.targets, predictions.targets, equal_nan=True)
    assert np.array_equal(back.probabilities, predictions.probabilities)


def test_evaluations_and_comparisons_come_back_equal(tmp_path: Path) -> None:
    predictions = predicted()
    config = EvaluationConfig(uncertainty=FEW)
    evaluation = assess(predictions, predictions, "multilabel", ("a", "b"), config, 0)
    comparison = compare(predictions, predictions, ("x", "y"), FEW, 0)
    write_evaluation(tmp_path, evaluation)
    write_comparison(tmp_path, comparison)
    assert read_evaluation(tmp_path) == evaluation
    assert read_comparison(tmp_path) == comparison


def test_two_measurements_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        predictions = predicted()
        write_predictions(folder, predictions)
        config = EvaluationConfig(uncertainty=FEW)
        write_evaluation(folder, assess(predictions, predictions, "multilabel", ("a", "b"), config, 3))
    files = [sorted((f.name, f.read_bytes()) for f in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert len(files[0]) == 4 and files[0] == files[1]
