"""Heads that are solved instead of trained: scikit-learn on the features of a frozen trunk.

A logistic regression and a linear SVM end as the weights of the network's own linear head, so that nothing about the
network changes: standardisation and calibration are folded in. Nearest neighbours need a head of their own, which keeps
the training part's features. The strength of the regularisation, or the number of neighbours, is chosen on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from medtl.errors import ModelError
from medtl.progress import advance
from medtl.records import AnyArray, FloatArray, Task

Kind = Literal["logistic_regression", "linear_svm", "knn"]
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C, on standardised features
NEIGHBOURS = (5, 11, 21, 51)
BANK, VOTES = "stages.head.1.bank", "stages.head.1.votes"  # what a network's state calls them
_TEMPERATURE = 0.07  # Wu et al., CVPR 2018
_ABSENT = -30.0  # logit of a class that training never saw
_FOLDS = 5
_FEWEST = 1e-6  # a probability is never exactly 0 or 1


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights (classes, features) and bias (classes,) of a solved head."""

    weight: FloatArray
    bias: FloatArray


class NearestNeighbours(nn.Module):
    """Vote by the most similar training images.

    Each of the ``k`` neighbours votes with ``exp(cosine / 0.07)``. Source: Wu et al., CVPR 2018.

    Args:
        bank: features of the training part, (m, features).
        votes: their targets, (m, classes); NaN where a multi-label reader said nothing.
        multilabel: give a logit per label instead of logits that share a softmax.
    """

    bank: Tensor
    votes: Tensor
    k: Tensor

    def __init__(self, bank: Tensor, votes: Tensor, k: int, multilabel: bool) -> None:
        super().__init__()
        self.register_buffer("bank", nn.functional.normalize(bank.float(), dim=1))
        self.register_buffer("votes", votes.float())
        self.register_buffer("k", torch.tensor(k))
        self.multilabel = multilabel

    def forward(self, x: Tensor) -> Tensor:
        """Give logits, (n, classes), of features (n, features)."""
        with torch.autocast(x.device.type, enabled=False):
            nearness = nn.functional.normalize(x.float(), dim=1) @ self.bank.T
            near, places = nearness.topk(min(int(self.k), len(self.bank)), dim=1)
            weights = (near / _TEMPERATURE).softmax(1)[..., None]
            votes = self.votes[places]
            known = ~torch.isnan(votes)
            heard = (weights * known).sum(1)
            share = (weights * torch.where(known, votes, 0.0)).sum(1) / heard.clamp(min=_FEWEST)
            share = torch.where(heard > 0, share, 0.5).clamp(_FEWEST, 1 - _FEWEST)
            return share.logit() if self.multilabel else share.log()


def solve(
    kind: Kind,
    features: FloatArray,
    targets: FloatArray,
    groups: Sequence[str],
    task: Task,
    balanced: bool,
    score: Callable[[Linear | NearestNeighbours], float],
    seed: int,
) -> Linear | NearestNeighbours:
    """Solve a head for every strength and give the one that scores best on validation.

    Args:
        features: of the training part, (n, features).
        targets: (n, classes), NaN where unknown.
        groups: patient of each row; the SVM's calibration keeps a patient on one side.
        balanced: weigh classes by the inverse of their frequency.
        score: judges a head on validation; higher is better.

    Raises:
        ModelError: the training part holds one class only.
    """
    if task != "multilabel" and (targets > 0.5).any(0).sum() < 2:
        raise ModelError("The training part holds one class only; nothing can be told apart.")
    candidates: list[Callable[[], Linear | NearestNeighbours]] = []
    if kind == "knn":
        bank, votes = torch.from_numpy(features), torch.from_numpy(targets)
        for k in NEIGHBOURS:
            if k <= len(features) or k == NEIGHBOURS[0]:
                candidates.append(lambda k=k: NearestNeighbours(bank, votes, k, task == "multilabel"))  # type: ignore[misc]
    else:
        centre, spread = features.mean(0), features.std(0)
        spread = np.where(
            spread > 1e-6 * max(float(spread.max(initial=0.0)), 1e-12), spread, np.inf
        )  # constant: no say
        scaled = (features - centre) / spread
        one = _logistic if kind == "logistic_regression" else _svm
        for strength in STRENGTHS:
            candidates.append(
                lambda c=strength: _unscaled(one(scaled, targets, groups, task, balanced, c, seed), centre, spread)  # type: ignore[misc]
            )
    best: tuple[float, Linear | NearestNeighbours] | None = None
    for number, make in enumerate(candidates, 1):
        head = make()
        found = score(head)
        if best is None or found > best[0]:
            best = found, head
        advance(f"solving {kind}", number, len(candidates))
    assert best is not None
    return best[1]


def _logistic(
    x: FloatArray, targets: FloatArray, groups: Sequence[str], task: Task, balanced: bool, strength: float, seed: int
) -> Linear:
    del groups
    weight = "balanced" if balanced else None
    make = partial(LogisticRegression, C=strength, max_iter=2000, class_weight=weight, random_state=seed)
    if task == "multilabel":
        return _per_label(x, targets, lambda rows, y, _: _two_sided(make().fit(rows, y)))
    model = make().fit(x, targets.argmax(1))
    return _all_classes(model.coef_, model.intercept_, model.classes_, targets.shape[1])


def _svm(
    x: FloatArray, targets: FloatArray, groups: Sequence[str], task: Task, balanced: bool, strength: float, seed: int
) -> Linear:
    """Fit one SVM a class; turn decision values into logits by a regression on values of patients left out.

    Source: Platt 1999, generalised to several classes by a multinomial regression.
    """
    weight = "balanced" if balanced else None
    names = np.asarray(groups)

    def fit(rows: FloatArray, y: FloatArray, who: AnyArray) -> tuple[FloatArray, FloatArray]:
        make = partial(LinearSVC, C=strength, class_weight=weight, random_state=seed, max_iter=5000)
        folds = min(_FOLDS, len(np.unique(who)))
        held = np.full((len(rows), 1 if len(np.unique(y)) == 2 else len(np.unique(y))), np.nan)
        for learn, out in GroupKFold(folds).split(rows, y, who) if folds > 1 else ():
            if len(np.unique(y[learn])) == len(np.unique(y)):
                held[out] = make().fit(rows[learn], y[learn]).decision_function(rows[out]).reshape(len(out), -1)
        model = make().fit(rows, y)
        judged = np.isfinite(held).all(1)
        if len(np.unique(y[judged])) < len(np.unique(y)):
            raise ModelError(
                "The SVM cannot be calibrated: too few patients hold all classes. Use head: logistic_regression."
            )
        platt = LogisticRegression(C=1e3, max_iter=2000).fit(held[judged], y[judged])
        return platt.coef_ @ model.coef_, platt.coef_ @ model.intercept_ + platt.intercept_

    if task == "multilabel":
        return _per_label(x, targets, lambda rows, y, known: fit(rows, y, names[known]))
    y = targets.argmax(1)
    coefficients, intercept = fit(x, y, names)
    return _all_classes(coefficients, intercept, np.unique(y), targets.shape[1])


def _two_sided(model: LogisticRegression) -> tuple[FloatArray, FloatArray]:
    return model.coef_, model.intercept_


def _per_label(
    x: FloatArray, targets: FloatArray, fit: Callable[[FloatArray, FloatArray, AnyArray], tuple[FloatArray, FloatArray]]
) -> Linear:
    """Solve each label over the studies where it is known; a label without two kinds keeps its rate."""
    weight = np.zeros((targets.shape[1], x.shape[1]))
    bias = np.zeros(targets.shape[1])
    for label, column in enumerate(targets.T):
        known = np.isfinite(column)
        if len(np.unique(column[known])) < 2:
            rate = float(np.clip(column[known].mean() if known.any() else 0.5, 1e-3, 1 - 1e-3))
            bias[label] = np.log(rate / (1 - rate))
            continue
        coefficients, intercept = fit(x[known], column[known], known)
        weight[label], bias[label] = coefficients[0], intercept[0]
    return Linear(weight, bias)


def _all_classes(coefficients: FloatArray, intercept: FloatArray, present: AnyArray, classes: int) -> Linear:
    """Lay the classes that training saw into all of them; two classes share one logit between them."""
    if len(present) == 2:
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercept = np.concatenate([-intercept / 2, intercept / 2])
    weight, bias = np.zeros((classes, coefficients.shape[1])), np.full(classes, _ABSENT)
    weight[present], bias[present] = coefficients, intercept
    return Linear(weight, bias)


def _unscaled(head: Linear, centre: FloatArray, spread: FloatArray) -> Linear:
    weight = head.weight / spread
    return Linear(weight, head.bias - weight @ centre)
