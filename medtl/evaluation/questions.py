"""Questions put to the same resamples of the patients, and the one way from them to values with intervals.

Whatever this room measures is asked here, so that answers can be compared, and so that the method of
``evaluation.uncertainty`` is every interval's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import SHARE, Basis, Scale, evenness, least_share
from medtl.evaluation.delong import area, interval
from medtl.evaluation.metrics import sensitivity
from medtl.evaluation.uncertainty import Estimate, drawn, estimate, independent_votes, left_out, score_of, wilson
from medtl.records import FloatArray, IntArray, Score

Limits = Callable[[], tuple[float, float] | None]


@dataclass(frozen=True, slots=True)
class Question:
    """One value: how resamples give it, how much its patients can show, and what its interval needs."""

    of: Callable[[FloatArray], FloatArray]  # (b, n) weights -> (b,)
    basis: Basis
    scale: Scale = SHARE
    limits: Limits | None = None  # of method analytic, where it has any
    estimable: bool = True
    unknown: str = ""  # why it may have no value although nobody is missing


def answers(
    questions: Sequence[Question],
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> list[Estimate]:
    """Put every question to the same resamples, and to all patients but one."""
    values, draws, without = measured(partial(_asked, questions), study_ids, patients, config, seed)
    return [
        _answer(question, value if question.estimable else np.nan, row, others, config)
        for question, value, row, others in zip(questions, values.tolist(), draws, without, strict=True)
    ]


def measured(
    of: Callable[[FloatArray], FloatArray],
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Give values on all studies, on the resamples, and without each patient, a few rows of weights at a time.

    Args:
        of: (b, n) weights -> (values, b).

    Returns:
        Arrays of shape (values,), (values, resamples) and (values, patients or groups of them).
    """

    def over(parts: Iterable[FloatArray]) -> FloatArray:
        return np.concatenate([of(weights) for weights in parts], axis=1)

    draws, without = over(drawn(study_ids, patients, config.resamples, seed)), over(left_out(study_ids, patients))
    return over([np.ones((1, len(patients)))])[:, 0], draws, without


def _asked(questions: Sequence[Question], weights: FloatArray) -> FloatArray:
    return np.array([question.of(weights) for question in questions])


def _answer(
    question: Question, value: float, draws: FloatArray, without: FloatArray, config: UncertaintyConfig
) -> Estimate:
    found = estimate(value, draws, without, config.level, question.basis, question.scale, config.method)
    if np.isnan(found.value) and question.unknown and question.basis.needed:
        return replace(found, problem=f"not estimable: {question.unknown}")
    if config.method == "analytic" and question.limits is not None and not found.problem:
        return replace(found, limits=question.limits())
    return found


def closed_forms(
    truth: FloatArray, score: FloatArray, called: FloatArray, patients: Sequence[str], level: float
) -> dict[str, Limits]:
    """Give the limits that need no draws, by metric: DeLong's of the AUROC, Wilson's of shares.

    Args:
        truth: (n,) 0 or 1.
        score: (n,).
        called: (n,) 0 or 1.
    """
    everybody = np.ones(len(truth))
    shares = {
        "sensitivity": (called, truth),
        "specificity": (1 - called, 1 - truth),
        "ppv": (truth, called),
        "npv": (1 - truth, 1 - called),
        "prevalence": (truth, everybody),
    }
    return {
        "auroc": partial(_delong, truth, score, patients, level),
        **{metric: partial(wilson_limits, *share, patients, level) for metric, share in shares.items()},
    }


def _delong(truth: FloatArray, score: FloatArray, patients: Sequence[str], level: float) -> tuple[float, float] | None:
    return interval(area(truth, score, _numbers(patients)), level)


def wilson_limits(
    outcome: FloatArray, counted: FloatArray, patients: Sequence[str], level: float
) -> tuple[float, float] | None:
    """Give Wilson's limits of the share of the counted studies (0 or 1) whose outcome is 1; None where none counts."""
    votes = independent_votes(outcome, counted, _numbers(patients))
    return wilson(float((outcome * counted).sum() / counted.sum()), votes, level) if votes else None


def _numbers(patients: Sequence[str]) -> IntArray:
    return np.asarray(np.unique(np.array(patients, dtype=np.str_), return_inverse=True)[1])


def share(
    metric: str,
    label: str,
    right: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> Score:
    """Give the mean of values between 0 and 1, one for each study, with its interval; not estimable without studies."""
    if not len(right):
        return Score(metric, label, None, None, None, 0, 0, "not estimable: there is no such study")
    everybody = np.ones(len(right))
    yes_or_no = bool(np.isin(right, (0.0, 1.0)).all())
    limits = partial(wilson_limits, right, everybody, patients, config.level) if yes_or_no else None
    # the mean is the sensitivity where every study is diseased
    question = Question(partial(sensitivity, everybody, right), basis_of(patients, config.level), limits=limits)
    (found,) = answers([question], study_ids, patients, config, seed)
    return score_of(metric, label, found, config.level, patients)


def known_only(
    of: Callable[[FloatArray], FloatArray], known: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
) -> Callable[[FloatArray], FloatArray]:
    """Ask of the weights of all studies what is told by those that are known."""
    return partial(_of_known, of, known)


def _of_known(
    of: Callable[[FloatArray], FloatArray], known: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], weights: FloatArray
) -> FloatArray:
    return of(weights[:, known])


def basis_of(patients: Sequence[str], level: float) -> Basis:
    """Say how much these patients can show of a share among all of them."""
    count = len(set(patients))
    return Basis(count, least_share(count, level), evenness(patients))
