"""Losses equal MONAI's, add up over parts of a batch, and do not see what does not count."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss, FocalLoss
from torch import Tensor, nn

from medtl.model.mask_losses import IGNORED, MaskLoss, coarsened, loss_of, sums, weights_of


def draw(outputs: int = 3, codes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return 2 * torch.randn(2, outputs, 5, 6, 7), torch.randint(0, codes, (2, 5, 6, 7)).to(torch.uint8)


def loss(logits: Tensor, codes: Tensor, overlapping: bool = False, kind: MaskLoss = "dice_ce") -> Tensor:
    return loss_of(sums(logits, codes, overlapping, kind), kind)


def bits(codes: Tensor, structures: int) -> Tensor:
    return torch.stack([(codes >> k) & 1 for k in range(structures)], 1).float()


def test_dice_and_cross_entropy_are_monais() -> None:
    logits, codes = draw()
    theirs = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    torch.testing.assert_close(loss(logits, codes), theirs(logits, codes.unsqueeze(1).long()))


def test_dice_and_focal_loss_are_monais_but_for_its_mean_over_classes() -> None:
    logits, codes = draw()
    wanted = codes.unsqueeze(1).long()
    dice = DiceLoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)(logits, wanted)
    focal = FocalLoss(use_softmax=True, to_onehot_y=True)(logits, wanted)
    torch.testing.assert_close(loss(logits, codes, kind="dice_focal"), dice + 3 * focal)


def test_regions_have_a_sigmoid_each() -> None:
    logits, codes = draw(3, 8)
    truth = bits(codes, 3)
    dice = DiceLoss(sigmoid=True, batch=True)(logits, truth)
    crossed = nn.functional.binary_cross_entropy_with_logits(logits, truth)
    torch.testing.assert_close(loss(logits, codes, overlapping=True), dice + crossed)


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("kind", ["dice_ce", "dice_focal", "dice", "ce"])
def test_what_does_not_count_is_as_if_it_were_cut_off(kind: MaskLoss, overlapping: bool) -> None:
    logits, codes = draw(3, 8 if overlapping else 3)
    codes[..., 4:] = IGNORED
    logits.requires_grad_()
    found = loss(logits, codes, overlapping, kind)
    torch.testing.assert_close(found, loss(logits[..., :4], codes[..., :4], overlapping, kind))
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient[..., 4:].abs().max() == 0 < gradient[..., :4].abs().max()


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    logits, codes = draw()
    parts = sums(logits[:1], codes[:1], False, "dice_ce") + sums(logits[1:], codes[1:], False, "dice_ce")
    torch.testing.assert_close(loss_of(parts, "dice_ce"), loss(logits, codes))


def test_a_batch_in_which_nothing_counts_has_a_finite_loss() -> None:
    logits, codes = draw()
    assert torch.isfinite(loss(logits, torch.full_like(codes, IGNORED)))


def test_a_right_answer_costs_nothing() -> None:
    _, codes = draw()
    sure = 100 * nn.functional.one_hot(codes.long(), 3).movedim(-1, 1).float()
    assert float(loss(sure, codes)) == pytest.approx(0, abs=1e-6)
    assert float(loss(-sure, codes)) > 50


def test_coarser_codes_are_those_at_the_coarser_voxels() -> None:
    codes = torch.arange(8 * 6).view(1, 8, 6)
    assert coarsened(codes, (4, 2)).tolist() == [[[0, 3], [12, 15], [24, 27], [36, 39]]]


def test_each_coarser_output_weighs_half() -> None:
    assert weights_of(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
