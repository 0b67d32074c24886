"""Instance normalisation that leaves channels where convolutions want them on a CPU: last.

torch's own turns them round and back, forward and backward, which cost a third of a training step of a 3-D U-Net in
bf16 and half of a prediction. Statistics are in fp32, and so is what the backward pass adds up over rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LastChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        count, channels = x.shape[:2]
        voxels = x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, count, channels, voxels, channels, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Give the gradient ``a * g + b * x + c``, with a, b and c of each channel and image.

        Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, section 3, with the mean over one image.
        """
        x, weight, mean, rstd = ctx.saved_tensors
        count, channels = x.shape[:2]
        flat_x, flat_g = _flat(x), _flat(gradient.to(x.dtype))
        voxels, rows = flat_x.shape[1], x[0, 0, ..., 0].numel()
        mean, rstd = mean.view(count, channels).float(), rstd.view(count, channels).float()
        summed = _summed(flat_g, rows)
        projected = (_summed(flat_g * flat_x, rows) - mean * summed) * rstd
        a = weight * rstd
        b = -a * rstd * projected / voxels
        c = -a * summed / voxels - b * mean
        a, b, c = (one.to(x.dtype).unsqueeze(1) for one in (a, b, c))
        found = torch.addcmul(c, flat_g, a).addcmul_(flat_x, b)
        shaped = found.view(count, *x.shape[2:], channels).movedim(-1, 1)
        return shaped, projected.sum(0), summed.sum(0), None


def _flat(x: Tensor) -> Tensor:
    """Give (n, voxels, channels), without a copy where channels are last."""
    return x.movedim(1, -1).reshape(len(x), -1, x.shape[1])


def _summed(flat: Tensor, rows: int) -> Tensor:
    """Add up voxels, in fp32: (n, voxels, channels) -> (n, channels).

    Each row by itself first: of a sum that is to be in fp32 torch makes a copy in fp32, which takes several times as
    long. What a row gives is rounded to the type of the values; the roundings of thousands of rows cancel.
    """
    count, _, channels = flat.shape
    return flat.view(count, rows, -1, channels).sum(2).sum(1, dtype=torch.float32)


def _normalised(x: Tensor, norm: nn.InstanceNorm2d | nn.InstanceNorm3d) -> Tensor:
    found: Tensor = _LastChannels.apply(x, norm.weight, norm.bias, norm.eps)
    return found


def _is_last(x: Tensor, layout: torch.memory_format) -> bool:
    """Tell whether ours is faster; what has one voxel is torch's to refuse."""
    return x.device.type == "cpu" and x.is_contiguous(memory_format=layout) and x[0, 0].numel() > 1


class InstanceNorm2d(nn.InstanceNorm2d):
    """As torch's, affine, of images."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of each image."""
        return _normalised(x, self) if _is_last(x, torch.channels_last) else super().forward(x)


class InstanceNorm3d(nn.InstanceNorm3d):
    """As torch's, affine, of volumes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of each volume."""
        return _normalised(x, self) if _is_last(x, torch.channels_last_3d) else super().forward(x)


def keep_channels_last(network: nn.Module) -> None:
    """Put these in the place of torch's; weights and names stay."""
    kinds: dict[type[nn.Module], type[InstanceNorm2d | InstanceNorm3d]] = {
        nn.InstanceNorm2d: InstanceNorm2d,
        nn.InstanceNorm3d: InstanceNorm3d,
    }
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d) and type(child) in kinds and child.affine:
                ours = kinds[type(child)](child.num_features, child.eps, affine=True)
                ours.weight, ours.bias = child.weight, child.bias
                setattr(parent, name, ours)
