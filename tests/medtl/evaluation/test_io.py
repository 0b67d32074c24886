"""What is written comes back, and twice the same is the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medtl.config import EvaluationConfig, UncertaintyConfig
from medtl.errors import StorageError
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


def predicted(part: str = "test") -> Predictions:
    truth = np.array([[1.0, 0], [0, 1], [1, np.nan], [0, 1], [1, 0], [np.nan, 0]])
    ids, people = tuple(f"s-{part}-{i}" for i in range(6)), tuple(f"p-{part}-{i}" for i in range(6))
    return Predictions(part, ids, people, truth, np.random.default_rng(0).random((6, 2)))


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
    evaluation = assess(predicted("val"), predictions, "multilabel", ("a", "b"), config, 0)
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
        write_evaluation(folder, assess(predicted("val"), predictions, "multilabel", ("a", "b"), config, 3))
    files = [sorted((f.name, f.read_bytes()) for f in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert len(files[0]) == 4 and files[0] == files[1]


@pytest.mark.parametrize("name", ["studies.json", "targets.npy", "probabilities.npy"])
@pytest.mark.parametrize("data", [None, b"", b"{}", b"[1]", b"\x93NUMPY"], ids=str)
def test_predictions_that_cannot_be_read_are_a_storage_error(tmp_path: Path, name: str, data: bytes | None) -> None:
    write_predictions(tmp_path, predicted())
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(StorageError, match="no readable predictions"):
        read_predictions(tmp_path)


def test_predictions_of_another_number_of_studies_are_a_storage_error(tmp_path: Path) -> None:
    write_predictions(tmp_path, predicted())
    np.save(tmp_path / "targets.npy", np.zeros((5, 2)))
    with pytest.raises(StorageError, match="no readable predictions"):
        read_predictions(tmp_path)
