"""Measure how far a segmentation network looks, and how much memory a voxel of its input takes.

A voxel that is not a number makes everything computed from it not a number: what a block of them spoils is what the
network sees of it, exactly, whatever its layers are called. Where that ends, a tile with so much around it gives the
same numbers as the whole scan. Layers that take a mean over all they are given (InstanceNorm, attention) spoil all,
and have no such tile: they see the window. Memory is counted while a patch passes: every tensor as it comes and goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medtl.model.cache import Precision, autocast

_LONGEST = 1024  # voxels along one axis in which the end of the reach is looked for
_SHORTEST = 64
_SCRATCH = 1.25  # of what tensors take: kernels have room of their own
_CLOSE = 1e-4  # of the largest value: what an unshared edge changes is far more
_SEES_ALL = (
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.MultiheadAttention,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a network looks from the edge of a tile, in voxels of each axis, multiples of ``multiple``.

    ``halo`` is None where a network depends on the whole window.
    """

    halo: tuple[int, ...] | None
    multiple: tuple[int, ...]
    why: str


_known: weakref.WeakKeyDictionary[nn.Module, Reach] = weakref.WeakKeyDictionary()
_bytes: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], float]] = weakref.WeakKeyDictionary()


def reach_of(network: nn.Module, channels: int, multiple: Sequence[int]) -> Reach:
    """Measure how far a network looks; once for each network, whose weights do not matter.

    Args:
        network: in evaluation mode; (b, channels, *space) to (b, outputs, *space).
        channels: of its input.
        multiple: of each axis of space, which sizes of its input must be multiples of.
    """
    if network not in _known:
        _known[network] = _measured(network, channels, tuple(multiple))
    return _known[network]


def _measured(network: nn.Module, channels: int, multiple: tuple[int, ...]) -> Reach:
    named = next((type(module).__name__ for module in network.modules() if isinstance(module, _SEES_ALL)), None)
    if named is not None:
        return Reach(None, multiple, f"{named} takes its mean over all that it is given")
    halo = []
    for axis in range(len(multiple)):
        found = _along(network, axis, channels, multiple)
        if found is None:
            return Reach(None, multiple, f"it looks further than {_LONGEST // 2} voxels")
        halo.append(found)
    if not _tiles_agree(network, channels, multiple, halo):
        return Reach(None, multiple, "a tile of a trial volume gave other numbers than the whole of it")
    return Reach(tuple(halo), multiple, f"it looks {' x '.join(map(str, halo))} voxels far")


def _along(network: nn.Module, axis: int, channels: int, multiple: tuple[int, ...]) -> int | None:
    """Spoil one block of an axis and see how far the output is spoilt; None where that has no end."""
    step = multiple[axis]
    length = -(-max(_SHORTEST, 4 * step) // step) * step
    while length <= max(_LONGEST, 4 * step):
        space = [side if number != axis else length for number, side in enumerate(multiple)]
        first = length // 2 // step * step
        spoilt = _run(network, _spoil(torch.zeros(1, channels, *space), axis, first, step)).isnan()
        line = spoilt.amax([number for number in range(spoilt.ndim) if number != axis + 2])
        places = line.nonzero().flatten().tolist()
        if not places:  # something in the network hides what is not a number
            return None
        if places[0] > 0 and places[-1] < length - 1:
            far: int = max(first - places[0], places[-1] - (first + step - 1), 0)
            return -(-far // step) * step
        length *= 2
    return None


def _spoil(x: Tensor, axis: int, first: int, count: int) -> Tensor:
    x.narrow(axis + 2, first, count).fill_(float("nan"))
    return x


def _tiles_agree(network: nn.Module, channels: int, multiple: tuple[int, ...], halo: Sequence[int]) -> bool:
    """Compare a tile with the whole of a trial volume, along every axis by itself."""
    draw = torch.Generator().manual_seed(0)
    for axis, (step, margin) in enumerate(zip(multiple, halo, strict=True)):
        length = 2 * margin + 3 * step
        space = [side if number != axis else length for number, side in enumerate(multiple)]
        trial = torch.randn(1, channels, *space, generator=draw)
        whole = _run(network, trial).narrow(axis + 2, margin + step, step)
        tile = _run(network, trial.narrow(axis + 2, step, 2 * margin + step)).narrow(axis + 2, margin, step)
        if not torch.allclose(whole, tile, rtol=0, atol=_CLOSE * float(whole.abs().max())):
            return False
    return True


def _run(network: nn.Module, x: Tensor) -> Tensor:
    parameter = next(network.parameters(), x)
    with torch.no_grad():
        logits: Tensor = network(x.to(parameter.device))
    return logits.cpu()


def bytes_per_voxel(
    network: nn.Module, channels: int, space: Sequence[int], device: torch.device, precision: Precision
) -> float:
    """Count what passing one patch takes at its most, weights apart, divided by its voxels; once for each network.

    Args:
        space: of the patch that passes.
    """
    kept = _bytes.setdefault(network, {})
    key = (channels, tuple(space), device.type, precision)
    if key not in kept:
        x = torch.zeros(1, channels, *space, device=device)
        with torch.no_grad(), autocast(device, precision), _Living() as living:
            network(x + 0)  # so that the input counts too
        kept[key] = _SCRATCH * living.most / x[0, 0].numel()
    return kept[key]


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all tensors that are alive at one time; what is made of weights alone is not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], nn.Parameter):  # a weight in half precision: the same for every size
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._come(tensor.untyped_storage())
        return result

    def _come(self, storage: torch.UntypedStorage) -> None:
        name, size = id(storage), storage.nbytes()
        if name in self._seen:
            return

        def go(_: Any) -> None:
            del self._seen[name]
            self.now -= size

        self._seen[name] = weakref.ref(storage, go)
        self.now += size
        self.most = max(self.most, self.now)
