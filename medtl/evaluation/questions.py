"""Questions put to the same resamples of the patients, so that their answers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import Basis, evenness, least_share
from medtl.evaluation.metrics import sensitivity
from medtl.evaluation.uncertainty import Estimate, drawn, estimate, left_out, score_of
from medtl.records import FloatArray, Score


@dataclass(frozen=True, slots=True)
class Question:
    """One value between 0 and 1: how resamples give it, and how much its patients can show."""

    of: Callable[[FloatArray], FloatArray]  # (b, n) weights -> (b,)
    basis: Basis


def answers(
    questions: Sequence[Question],
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> list[Estimate]:
    """Put every question to the same resamples, and to all patients but one."""
    draws = _asked(questions, drawn(study_ids, patients, config.resamples, seed))
    without = _asked(questions, left_out(study_ids, patients))
    values = _asked(questions, iter([np.ones((1, len(patients)))]))[:, 0]
    return [
        estimate(float(value), row, others, config.level, question.basis, method=config.method)
        for value, row, others, question in zip(values, draws, without, questions, strict=True)
    ]


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
    # the mean is the sensitivity where every study is diseased
    question = Question(partial(sensitivity, np.ones(len(right)), right), basis_of(patients, config.level))
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


def _asked(questions: Sequence[Question], parts: Iterator[FloatArray]) -> FloatArray:
    """Give each question's values on rows of weights, shape (questions, rows)."""
    return np.concatenate([np.array([question.of(weights) for question in questions]) for weights in parts], axis=1)
