"""Predictions, evaluations, comparisons and what was measured of masks on disk."""

from __future__ import annotations

import json
from pathlib import Path

from medtl.artifacts import load_array, read_record, save_array, write_json, write_record
from medtl.errors import StorageError
from medtl.records import (
    Comparison,
    ComponentChoice,
    Evaluation,
    LearningCurve,
    MaskQuality,
    MaskResult,
    NoveltyRule,
    Predictions,
)

EVALUATION, COMPARISON, STUDIES = "evaluation.json", "comparison.json", "studies.json"
TARGETS, PROBABILITIES = "targets.npy", "probabilities.npy"
NOVELTY = "novelty.json"
MASKS, COMPONENTS, QUALITY = "masks.json", "components.json", "quality.json"
CURVE = "learning_curve.json"
_NOVELTY_ARRAYS = ("scale", "centres", "whitening", "middle", "background", "references")


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


def write_novelty(folder: Path, rule: NoveltyRule) -> None:
    """Write a novelty rule as its numbers and one array each."""
    facts = {name: getattr(rule, name) for name in rule.__slots__ if name not in _NOVELTY_ARRAYS}
    write_json(folder / NOVELTY, facts)
    for name in _NOVELTY_ARRAYS:
        save_array(folder / f"novelty_{name}.npy", getattr(rule, name))


def read_novelty(folder: Path) -> NoveltyRule:
    """Read a novelty rule back.

    Raises:
        StorageError: a file is missing or is not what was written.
    """
    try:
        facts = json.loads((folder / NOVELTY).read_bytes())
        facts["quantiles"] = tuple(facts["quantiles"])
        facts |= {name: load_array(folder / f"novelty_{name}.npy") for name in _NOVELTY_ARRAYS}
        return NoveltyRule(**facts)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"'{folder}' holds no readable novelty rule ({type(error).__name__}). Delete the folder and run again."
        ) from error


def write_mask_results(folder: Path, results: tuple[MaskResult, ...]) -> None:
    """Write what was measured of each structure of each (pseudonymous) study."""
    write_record(folder / MASKS, results)


def read_mask_results(folder: Path) -> tuple[MaskResult, ...]:
    """Read what was measured of each structure of each study.

    Raises:
        StorageError: the file is missing or is not what was written.
    """
    return read_record(folder / MASKS, tuple[MaskResult, ...])


def write_components(folder: Path, choices: tuple[ComponentChoice, ...]) -> None:
    """Write which parts of each structure are kept."""
    write_record(folder / COMPONENTS, choices)


def read_components(folder: Path) -> tuple[ComponentChoice, ...]:
    """Read which parts of each structure are kept.

    Raises:
        StorageError: the file is missing or is not what was written.
    """
    return read_record(folder / COMPONENTS, tuple[ComponentChoice, ...])


def write_quality(folder: Path, quality: MaskQuality) -> None:
    """Write how Dice is foretold."""
    write_record(folder / QUALITY, quality)


def read_quality(folder: Path) -> MaskQuality:
    """Read how Dice is foretold.

    Raises:
        StorageError: the file is missing or is not what was written.
    """
    return read_record(folder / QUALITY, MaskQuality)


def write_learning_curve(folder: Path, curve: LearningCurve) -> None:
    """Write a learning curve."""
    write_record(folder / CURVE, curve)


def read_learning_curve(folder: Path) -> LearningCurve:
    """Read a learning curve.

    Raises:
        StorageError: the file is missing or is not what was written.
    """
    return read_record(folder / CURVE, LearningCurve)
