"""The AUROC of predictions that belong to no part, as those of cross-validation, with its interval over patients."""

from __future__ import annotations

from functools import partial

import numpy as np

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import Counts
from medtl.evaluation.metrics import auroc
from medtl.evaluation.questions import Question, answers, closed_forms, known_only
from medtl.evaluation.uncertainty import mean_of, score_of
from medtl.records import Predictions, Score, Task


def mean_auroc(
    predictions: Predictions, task: Task, classes: tuple[str, ...], config: UncertaintyConfig, seed: int
) -> Score:
    """Give the AUROC of the positive class of a binary task, else the mean over classes, with its interval.

    Probabilities of several folds are judged together: where the folds' heads differ in how sure they are, the value is
    as a rule a little too low.

    Args:
        predictions: of each study once.
    """
    chosen = [len(classes) - 1] if task == "binary" else list(range(len(classes)))
    ids, people = predictions.study_ids, predictions.patients
    questions = []
    for index in chosen:
        known = np.isfinite(predictions.targets[:, index])
        truth, score = predictions.targets[known, index], predictions.probabilities[known, index]
        counted = [patient for patient, is_known in zip(people, known, strict=True) if is_known]
        basis = Counts.of(counted, truth, truth).basis("rarer", config.level)
        limits = closed_forms(truth, score, truth, counted, config.level)["auroc"]
        questions.append(Question(known_only(partial(auroc, truth, score), known), basis, limits=limits))
    parts = answers(questions, ids, people, config, seed)
    if len(parts) == 1:
        return score_of("auroc", classes[-1], parts[0], config.level, people)
    return score_of("auroc", "macro", mean_of(parts, classes), config.level, people)
