"""Losses are the published ones, and sum to the same over parts of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from medtl.config import PhaseConfig
from medtl.errors import ModelError
from medtl.model.losses import class_weights, known_labels, loss_sum, mixture


def phase(**options: object) -> PhaseConfig:
    return PhaseConfig.model_validate({"name": "x", "unfreeze": "all", **options})


LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
WANTED = torch.eye(3)[torch.arange(12) % 3]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    found = loss_sum(LOGITS, WANTED, "multiclass", phase(label_smoothing=smoothing))
    assert float(found) == pytest.approx(
        float(functional.cross_entropy(LOGITS, WANTED, label_smoothing=smoothing, reduction="sum")), rel=1e-5
    )


def test_the_focal_loss_is_torchvisions_and_looks_away_from_easy_cases() -> None:
    found = loss_sum(LOGITS, WANTED, "multilabel", phase(loss="focal"))
    assert float(found) == pytest.approx(
        float(sigmoid_focal_loss(LOGITS, WANTED, alpha=-1, gamma=2, reduction="sum")), rel=1e-4
    )
    easy = torch.tensor([[6.0, 0.0]])
    plain, focal = (
        loss_sum(easy, torch.tensor([[1.0, 0.0]]), "binary", phase(loss=n)) for n in ("cross_entropy", "focal")
    )
    assert float(focal) < 1e-4 * float(plain)


def test_a_class_balanced_loss_weighs_the_rare_class_more() -> None:
    targets = np.eye(2)[np.array([0] * 30 + [1] * 6)]
    weights = class_weights(targets, phase(loss="class_balanced"), "binary")
    assert weights is not None
    assert weights == pytest.approx([0.6, 3.0])
    assert class_weights(targets, phase(), "binary") is None
    logits, wanted = torch.zeros(2, 2), torch.eye(2)
    rare = loss_sum(logits[1:], wanted[1:], "binary", phase(), weights)
    assert float(rare) == pytest.approx(5 * float(loss_sum(logits[:1], wanted[:1], "binary", phase(), weights)))
    with pytest.raises(ModelError, match="multi-label"):
        class_weights(targets, phase(loss="class_balanced"), "multilabel")


def test_unknown_labels_do_not_enter_a_multilabel_loss() -> None:
    logits, wanted = torch.tensor([[0.0, 50.0]]), torch.tensor([[1.0, torch.nan]])
    assert float(loss_sum(logits, wanted, "multilabel", phase())) == pytest.approx(np.log(2), abs=1e-5)
    assert known_labels(wanted.numpy(), "multilabel") == 1


@pytest.mark.parametrize("task, loss", [("multiclass", "focal"), ("multilabel", "cross_entropy")])
def test_parts_of_a_batch_sum_to_the_whole(task: object, loss: str) -> None:
    whole = loss_sum(LOGITS, WANTED, task, phase(loss=loss))  # type: ignore[arg-type]
    parts = sum(float(loss_sum(LOGITS[i : i + 5], WANTED[i : i + 5], task, phase(loss=loss))) for i in (0, 5, 10))  # type: ignore[arg-type]
    assert parts == pytest.approx(float(whole), rel=1e-5)


def test_a_mixture_is_drawn_from_its_generator_alone() -> None:
    draws = [mixture(WANTED, 0.4, np.random.default_rng(s)) for s in (1, 1, 2)]
    assert draws[0][0] == draws[1][0] != draws[2][0]
    assert 0 <= draws[0][0] <= 1 and sorted(draws[0][1].tolist()) == list(range(12))
