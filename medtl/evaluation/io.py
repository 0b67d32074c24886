"""Predictions, evaluations and comparisons on disk."""

from __future__ import annotations

import json
from pathlib import Path

from medtl.artifacts import load_array, read_record, save_array, write_json, write_record
from medtl.errors import StorageError
from medtl.records import Comparison, Evaluation, Predictions

EVALUATION, COMPARISON, STUDIES = "evaluation.json", "comparison.json", "studies.json"
TARGETS, PROBABILITIES = "targets.npy", "probabilities.npy"


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write predictions as two arrays and a list of (pseudonymous) studies."""
    write_json(
        folder / STUDIES,
        {"part": predictions.part, "study_ids": predictions.study_ids, "patients": predictions.patients},
    )
    save_array(folder / TARGETS, predictions.targets)
    save_array(folder / PROBABILITIES, predictions.probabilities)


def read_predictions(folder: Path) -> Predictions:
    """Read predictions back.

    Raises:
        StorageError: a file is missing or is not what was written.
    """
    try:
        studies = json.loads((folder / STUDIES).read_bytes())
        return Predictions(
            studies["part"],
            tuple(studies["study_ids"]),
            tuple(studies["patients"]),
            load_array(folder / TARGETS),
            load_array(folder / PROBABILITIES),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"'{folder}' holds no readable predictions ({type(error).__name__}). Delete the folder and run again."
        ) from error


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write an evaluation."""
    write_record(folder / EVALUATION, evaluation)


def read_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation."""
    return read_record(folder / EVALUATION, Evaluation)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write a comparison."""
    write_record(folder / COMPARISON, comparison)


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison."""
    return read_record(folder / COMPARISON, Comparison)
