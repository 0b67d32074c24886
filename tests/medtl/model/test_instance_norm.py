"""Instance normalisation gives what torch's gives, forward and backward, and turns nothing round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medtl.model.instance_norm import InstanceNorm2d, InstanceNorm3d, keep_channels_last

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def pair(dimensions: int) -> tuple[nn.Module, nn.Module]:
    theirs = (nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d)(6, affine=True)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(0.5, 1.5, 6))
        theirs.bias.copy_(torch.linspace(-1, 1, 6))
    ours = nn.Sequential(theirs)
    keep_channels_last(ours)
    return ours[0], theirs


def draw(dimensions: int, mean: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, 6, *(9, 7, 8)[:dimensions]) + mean
    return x.to(memory_format=LAYOUTS[dimensions]).requires_grad_()


def gradients(norm: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, x.numel()).view(x.shape) + x.detach().float() ** 2
    return torch.autograd.grad((norm(x).float() * weights).sum(), [x, *norm.parameters()])


@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_values_and_gradients_are_torchs(dimensions: int, mean: float) -> None:
    ours, theirs = pair(dimensions)
    assert isinstance(ours, InstanceNorm2d if dimensions == 2 else InstanceNorm3d)
    x = draw(dimensions, mean)
    found = ours(x)
    assert found.is_contiguous(memory_format=LAYOUTS[dimensions])
    assert type(found.grad_fn).__name__ == "_LastChannelsBackward"
    torch.testing.assert_close(found, theirs(x), rtol=1e-4, atol=1e-4)
    for mine, other in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert float((mine - other).norm() / other.norm()) < 1e-3


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_sixteen_bits_are_as_near_as_torchs(mean: float) -> None:
    ours, theirs = pair(3)
    x = draw(3, mean)
    exact = gradients(theirs, x)
    short = x.detach().bfloat16().requires_grad_()
    for mine, other, true in zip(gradients(ours, short), gradients(theirs, short), exact, strict=True):
        error, torchs = ((one.float() - true).norm() / true.norm() for one in (mine, other))
        assert error < max(3 * torchs, 0.01)


def test_where_channels_come_first_torch_does_it() -> None:
    ours, theirs = pair(3)
    x = draw(3).contiguous()
    assert torch.equal(ours(x), theirs(x))


def test_one_voxel_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        pair(2)[0](torch.ones(2, 6, 1, 1))


def test_names_and_weights_stay() -> None:
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.InstanceNorm2d(6))
    before = network.state_dict()
    keep_channels_last(network)
    assert list(before) == list(network.state_dict())
    assert type(network[2]) is nn.InstanceNorm2d  # without weights there is nothing of ours to do
