"""Predict whole scans: in one pass where it fits, in exact tiles, else in weighted windows.

A network of convolutions and BatchNorm looks only so far. A tile with as much around it gives the same numbers as the
whole scan does (the same bits in fp32 where both are large enough for one and the same kernel), and computes a voxel
once or little more; windows that overlap by half compute it five times and more. A network that takes means over all
it is given was trained on patches, and sees windows of that size, their middles weighted most.

Results come in slabs along the first axis of space, each finished before the next begins: memory holds one slab,
however large the scan. Probabilities are averaged, not logits, over windows, mirrored views and networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, product
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from medtl.config import InferenceConfig
from medtl.errors import ConfigError, ModelError
from medtl.model.cache import Precision, autocast
from medtl.model.reach import bytes_per_voxel, reach_of
from medtl.model.segmenter import SegmenterNetwork
from medtl.records import AnyArray, FloatArray, GridPlan

Networks = SegmenterNetwork | Sequence[SegmenterNetwork]
_SIGMA = 1 / 8  # of a window's side: Isensee et al., nnU-Net, Nature Methods 2021
_AT_ONCE = {"cpu": 1, "mps": 1, "cuda": 8}  # windows: on a CPU one at a time is fastest
_SLICES_AT_ONCE = {"cpu": 4, "mps": 4, "cuda": 32}
_DARK = 1e-12
_HINT = 0.05  # probability from which a voxel counts: a background of millions of near-zeros does not
_THIN = 16  # planes of weighted windows that are handed on at a time
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Way:
    """How a scan is passed through a network; sizes in voxels, one for each axis of a pass."""

    name: Literal["whole", "tiles", "windows"]
    padded: tuple[int, ...]  # size of the scan with what is put around it
    size: tuple[int, ...]  # of a tile without its halo, or of a window
    halo: tuple[int, ...]
    at_once: int  # windows, tiles or slices
    why: str


@dataclass(frozen=True, slots=True)
class Quality:
    """How sure a prediction is of each structure; None where it predicted nothing of it.

    ``entropy`` is the mean, in bits, of the structure's probability over the voxels that were given to it;
    ``agreement`` the mean Dice of all pairs of networks or mirrored views, None where there was one only;
    ``expected`` the Dice of the mask with its own probabilities, one voxel added to both: always known, and 1 where
    nothing was outlined and nothing looked like it.
    """

    entropy: tuple[float | None, ...]
    agreement: tuple[float | None, ...]
    expected: tuple[float, ...]


class Doubt:
    """Add up, slab by slab, what :class:`Quality` says.

    Windows that overlap each count what they saw, so that there the agreement is one of windows, not of the scan.
    """

    def __init__(self, plan: GridPlan) -> None:
        count = len(plan.structures)
        self._plan = plan
        self._entropy, self._voxels = np.zeros(count), np.zeros(count)
        self._both, self._either = np.zeros(count), np.zeros(count)
        self._inside, self._hinted = np.zeros(count), np.zeros(count)
        self._pairs = False

    def see(self, slab: FloatArray) -> None:
        """Take the mean probabilities of one slab, (outputs, ...)."""
        coded = codes(slab, self._plan)
        for number in range(len(self._plan.structures)):
            mine = coded & (1 << number) > 0 if self._plan.overlapping else coded == number + 1
            own = slab[number + (not self._plan.overlapping)]
            p = np.clip(own[mine].astype(np.float64), _DARK, 1 - _DARK)
            self._entropy[number] -= float((p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum())
            self._voxels[number] += p.size
            self._inside[number] += float(p.sum())
            self._hinted[number] += float(own.sum(dtype=np.float64, where=own >= _HINT))

    def compare(self, members: Sequence[Tensor]) -> None:
        """Take the codes, uint8, that each network and view gave to the same voxels."""
        for first, second in combinations(members, 2):
            self._pairs = True
            for number in range(len(self._plan.structures)):
                bit = 1 << number
                one, other = (c & bit > 0 if self._plan.overlapping else c == number + 1 for c in (first, second))
                self._both[number] += 2 * float((one & other).sum())
                self._either[number] += float(one.sum() + other.sum())

    @property
    def quality(self) -> Quality:
        """Give what was seen so far."""
        entropy = (e / n if n else None for e, n in zip(self._entropy.tolist(), self._voxels.tolist(), strict=True))
        pairs = zip(self._both.tolist(), self._either.tolist(), strict=True)
        agreement = tuple(b / n if n and self._pairs else None for b, n in pairs)
        expected = (2 * self._inside + 1) / (self._hinted + self._voxels + 1)
        return Quality(tuple(entropy), agreement, tuple(np.minimum(expected, 1).tolist()))


def predict_grid(
    networks: Networks,
    image: AnyArray,
    plan: GridPlan,
    config: InferenceConfig,
    device: torch.device,
    precision: Precision,
    doubt: Doubt | None = None,
    out: FloatArray | None = None,
) -> FloatArray:
    """Give the probabilities of every voxel of one scan.

    Args:
        networks: one, or several whose probabilities are averaged.
        image: (channels of space, *space) as :func:`medtl.dataset.grid.to_grid` gives it; float16 too.
        doubt: told what is needed for :class:`Quality`.
        out: written to and given back, for instance an array on disk; default: a new one.

    Returns:
        float32 (plan.outputs, *space): a softmax, or one sigmoid a region where the plan's structures overlap.

    Raises:
        ConfigError, ModelError: see :func:`predict_slabs`.
    """
    found = np.empty((plan.outputs, *image.shape[1:]), np.float32) if out is None else out
    done = 0
    for slab in predict_slabs(networks, image, plan, config, device, precision, doubt):
        found[:, done : done + slab.shape[1]] = slab
        done += slab.shape[1]
    return found


def predict_slabs(
    networks: Networks,
    image: AnyArray,
    plan: GridPlan,
    config: InferenceConfig,
    device: torch.device,
    precision: Precision,
    doubt: Doubt | None = None,
) -> Iterator[FloatArray]:
    """Give the probabilities of one scan slab by slab along the first axis of space, as :func:`predict_grid` does.

    Raises:
        ConfigError: see :func:`choose_way`.
        ModelError: a probability is not a number.
    """
    several = (networks,) if isinstance(networks, SegmenterNetwork) else tuple(networks)
    for network in several:
        network.to(device, memory_format=network.memory_format).eval()  # type: ignore[call-overload]
    flat = image.ndim - 1 > plan.dimensions
    way = choose_way(several, plan, config, image.shape[2:] if flat else image.shape[1:], device, precision)
    passes = _Passes(several, plan, config, way, device, precision, doubt)
    least = float(image.min())  # what patches that reach beyond their scan were filled with in training
    if flat:
        found = _by_slices(passes, image, plan.neighbours, least)
    else:
        found = (slab[0] for slab in passes.slabs(image[None], least))
    for slab in found:
        if not math.isfinite(float(slab.sum())):
            raise ModelError("A probability is not a number. Set model.inference.precision to fp32.")
        values = slab.cpu().numpy()
        if doubt is not None:
            doubt.see(values)
        yield values


def codes(probabilities: FloatArray, plan: GridPlan) -> AnyArray:
    """Give the code of each voxel, uint8, from (outputs, ...): see :func:`medtl.dataset.grid.codes_of`."""
    return _codes(torch.from_numpy(probabilities)[None], plan)[0].numpy()


def choose_way(
    networks: Sequence[SegmenterNetwork],
    plan: GridPlan,
    config: InferenceConfig,
    space: Sequence[int],
    device: torch.device,
    precision: Precision,
) -> Way:
    """Choose how scans of a size are passed: one pass where memory allows, else what computes fewest voxels.

    Args:
        space: size of the scan; where slices of a volume are predicted, of a slice.

    Raises:
        ConfigError: exact tiles are wanted of a network that has none, the whole of one whose input has one size, or
            no tile fits in memory.
    """
    multiple = tuple(reduce(math.lcm, sides) for sides in zip(*(n.multiple for n in networks), strict=True))
    fixed = next((network.window for network in networks if network.window is not None), None)
    window = tuple(fixed or _up(plan.patch, multiple))
    padded = _up(space, multiple)
    if fixed is not None:
        halo, why = None, "the network takes one size of input"
    else:
        halo, why = _halo(networks, plan.channels, multiple)
    per_voxel = max(bytes_per_voxel(n, plan.channels, window, device, precision) for n in networks)
    room = int(config.memory_gb * 1e9 / per_voxel)  # voxels that may pass at once
    windows = _windows(space, window, config.overlap, room, device, why)
    if config.way == "windows" or (config.way == "auto" and halo is None):
        return windows
    if halo is None and (config.way == "tiles" or fixed is not None):
        raise ConfigError(f"model.inference.way is '{config.way}', and {why}. Set it to auto or windows.")
    at_once = max(1, min(_SLICES_AT_ONCE[device.type], room // math.prod(padded)))
    whole = Way("whole", padded, padded, (0,) * len(padded), at_once, "the whole fits in memory")
    if config.way == "whole" or (config.way == "auto" and math.prod(padded) <= room):
        return whole
    assert halo is not None
    tiles = _tiles(padded, multiple, halo, room, window if config.way == "tiles" else None, why)
    if config.way == "tiles":
        if tiles is None:
            raise ConfigError(f"No exact tile fits model.inference.memory_gb ({config.memory_gb:g}). Raise it.")
        return tiles
    return tiles if tiles is not None and _work(tiles) < _work(windows) else windows


def _halo(
    networks: Sequence[SegmenterNetwork], channels: int, multiple: tuple[int, ...]
) -> tuple[tuple[int, ...] | None, str]:
    """Give what the furthest-looking of the networks needs around a tile."""
    widest = [0] * len(multiple)
    for network in networks:
        reach = reach_of(network, channels, network.multiple)
        if reach.halo is None:
            return None, reach.why
        widest = [max(pair) for pair in zip(widest, reach.halo, strict=True)]
    halo = _up(widest, multiple)
    return halo, f"tiles with {' x '.join(map(str, halo))} voxels around them are exact"


def _tiles(
    padded: tuple[int, ...],
    multiple: tuple[int, ...],
    halo: tuple[int, ...],
    room: int,
    wanted: tuple[int, ...] | None,
    why: str,
) -> Way | None:
    """Cut the axis that adds least to compute until a tile with its halo fits; None where none does."""
    counts = [1] * len(padded)

    def cut(numbers: Sequence[int]) -> Way:
        size = _up([-(-side // n) for side, n in zip(padded, numbers, strict=True)], multiple)
        return Way("tiles", padded, size, halo, 1, why)

    def taken(way: Way) -> int:
        sides = zip(way.size, halo, padded, strict=True)
        return math.prod(min(side + 2 * margin, whole) for side, margin, whole in sides)

    if wanted is not None:  # of tiles that were asked for, none is much larger than a patch
        counts = [-(-side // patch) for side, patch in zip(padded, wanted, strict=True)]
    while taken(cut(counts)) > room:
        further = [
            [*counts[:axis], counts[axis] + 1, *counts[axis + 1 :]]
            for axis in range(len(counts))
            if cut(counts).size[axis] > multiple[axis]
        ]
        if not further:
            return None
        counts = min(further, key=lambda numbers: (taken(cut(numbers)) > room, _work(cut(numbers)), numbers))
    return cut(counts)


def _windows(
    space: Sequence[int], window: tuple[int, ...], overlap: float, room: int, device: torch.device, why: str
) -> Way:
    padded = tuple(max(side, least) for side, least in zip(space, window, strict=True))
    at_once = max(1, min(_AT_ONCE[device.type], room // math.prod(window)))
    margin = tuple(int(side * overlap) for side in window)
    return Way("windows", padded, window, margin, at_once, why)


def _work(way: Way) -> int:
    """Count the voxels that are computed."""
    if way.name == "windows":
        return math.prod(len(_starts(*sides)) * sides[1] for sides in zip(way.padded, way.size, way.halo, strict=True))
    total = 1
    for side, core, margin in zip(way.padded, way.size, way.halo, strict=True):
        total *= sum(stop - start for _, _, start, stop in _cores(side, core, margin))
    return total


def _up(sizes: Sequence[int], multiple: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // step) * step for size, step in zip(sizes, multiple, strict=True))


def _starts(side: int, window: int, overlap: int) -> list[int]:
    """Spread windows evenly, so that they overlap at least so much."""
    count = -(-(side - window) // max(1, window - overlap)) + 1
    return [round(number * (side - window) / max(1, count - 1)) for number in range(count)]


def _cores(side: int, core: int, margin: int) -> list[tuple[int, int, int, int]]:
    """Give where each tile begins and ends, without its halo and with it."""
    edges = [(start, min(start + core, side)) for start in range(0, side, core)]
    return [(start, stop, max(0, start - margin), min(side, stop + margin)) for start, stop in edges]


class _Passes:
    """The passes over one scan, or over a batch of slices.

    Windows of one row are computed together. Their weights are products of one line for each axis, and so are the sums
    of the weights that a voxel gets: no map of them is added up.
    """

    def __init__(
        self,
        networks: Sequence[SegmenterNetwork],
        plan: GridPlan,
        config: InferenceConfig,
        way: Way,
        device: torch.device,
        precision: Precision,
        doubt: Doubt | None,
    ) -> None:
        self.networks, self.plan, self.way, self.device = networks, plan, way, device
        self.precision, self.doubt, self.skip_empty = precision, doubt, config.skip_empty
        axes = plan.mirror if config.mirror else ()
        self.views = [tuple(2 + a for a in view) for n in range(len(axes) + 1) for view in combinations(axes, n)]
        self.format = networks[0].memory_format

    def slabs(self, image: AnyArray, least: float) -> Iterator[Tensor]:
        """Give float32 (b, outputs, part of the first axis, *rest) in order, of an image (b, c, *space)."""
        space = image.shape[2:]
        before = [(padded - side) // 2 for padded, side in zip(self.way.padded, space, strict=True)]
        padding = _Padded(image, before, least)
        inside = tuple(slice(first, first + side) for first, side in zip(before[1:], space[1:], strict=True))
        done = 0
        for slab in (self._weighted if self.way.name == "windows" else self._exact)(padding):
            first, last = max(before[0] - done, 0), min(before[0] + space[0] - done, slab.shape[2])
            done += slab.shape[2]
            if last > first:
                yield slab[_last((slice(first, last), *inside))]

    def _exact(self, padding: _Padded) -> Iterator[Tensor]:
        lines = [_cores(*sides) for sides in zip(self.way.padded, self.way.size, self.way.halo, strict=True)]
        for along in lines[0]:
            slab: Tensor | None = None
            for rest in product(*lines[1:]):
                tile = (along, *rest)
                core = tuple(slice(start - first, stop - first) for start, stop, first, _ in tile)
                found = self._mean([padding.crop([(first, last) for _, _, first, last in tile])], core)
                if len(lines[0]) == self._count(lines):  # one tile is the slab
                    slab = found
                    continue
                if slab is None:
                    shape = (*found.shape[:2], along[1] - along[0], *self.way.padded[1:])
                    slab = torch.empty(shape, device=self.device)
                slab[_last(slice(start, stop) for start, stop, *_ in tile[1:])] = found
            assert slab is not None
            yield slab

    @staticmethod
    def _count(lines: Sequence[Sequence[object]]) -> int:
        return math.prod(len(line) for line in lines)

    def _weighted(self, padding: _Padded) -> Iterator[Tensor]:
        sizes, size = self.way.padded, self.way.size
        starts = [_starts(*sides) for sides in zip(sizes, size, self.way.halo, strict=True)]
        lines = [_line(side, self.device) for side in size]
        weight = _product(lines)
        sums = [_summed(line, first, side) for line, first, side in zip(lines, starts, sizes, strict=True)]
        held: Tensor | None = None
        for number, first in enumerate(starts[0]):
            for row in _batches(list(product(*starts[1:])), self.way.at_once):
                places = [[(a, a + n) for a, n in zip((first, *rest), size, strict=True)] for rest in row]
                found = self._mean([padding.crop(place) for place in places], (slice(None),) * len(size))
                if held is None:
                    held = torch.zeros((padding.count, found.shape[1], size[0], *sizes[1:]), device=self.device)
                for place, one in zip(places, torch.split(found, padding.count), strict=True):
                    held[_last(slice(*edges) for edges in place[1:])].addcmul_(one, weight)
            assert held is not None
            done = (starts[0][number + 1] if number + 1 < len(starts[0]) else sizes[0]) - first
            whole = held[:, :, :done].div_(_product([sums[0][first : first + done], *sums[1:]]))
            for thin in torch.split(whole, _THIN, 2):
                yield thin.clone()  # whoever takes it may keep it, and it is moved over below
            left = held.shape[2] - done
            for plane in range(left):  # one at a time: of many structures a second copy would not fit
                held[:, :, plane].copy_(held[:, :, plane + done])
            held[:, :, left:].zero_()

    def _mean(self, crops: Sequence[AnyArray], core: tuple[slice, ...]) -> Tensor:
        """Give the mean probabilities of all networks and views, (b, outputs, *core)."""
        if self.skip_empty and all(crop.min() == crop.max() for crop in crops):
            return self._background(crops, core)
        x = torch.from_numpy(np.concatenate(crops) if len(crops) > 1 else crops[0]).to(self.device)
        mean: Tensor | None = None
        members = []
        for network, view in product(self.networks, self.views):
            seen = (x.flip(view) if view else x).contiguous(memory_format=self.format)
            with torch.no_grad(), autocast(self.device, self.precision):
                logits = network(seen)
            logits = (logits.flip(view) if view else logits)[_last(core)].float()
            found = logits.sigmoid() if self.plan.overlapping else logits.softmax(1)
            if self.doubt is not None:
                members.append(_codes(found, self.plan))
            mean = found if mean is None else mean.add_(found)
        assert mean is not None
        if self.doubt is not None:
            self.doubt.compare(members)
        count = len(self.networks) * len(self.views)
        return mean if count == 1 else mean.div_(count)

    def _background(self, crops: Sequence[AnyArray], core: tuple[slice, ...]) -> Tensor:
        space = [len(range(*cut.indices(side))) for cut, side in zip(core, crops[0].shape[2:], strict=True)]
        count = sum(len(crop) for crop in crops)
        found = torch.zeros((count, self.plan.outputs, *space), device=self.device)
        if not self.plan.overlapping:
            found[:, 0] = 1
        return found


class _Padded:
    """Images (b, c, *space) with their scan's least value around them, of which crops alone are made."""

    def __init__(self, image: AnyArray, before: Sequence[int], least: float) -> None:
        self.image, self.before, self.least, self.count = image, before, least, len(image)

    def crop(self, edges: Sequence[tuple[int, int]]) -> FloatArray:
        """Give float32 (b, c, *sizes), from and to places that count from the padding's edge."""
        shifted = [(a - b, z - b) for (a, z), b in zip(edges, self.before, strict=True)]
        sides = self.image.shape[2:]
        there = [(max(a, 0), max(min(z, side), max(a, 0))) for (a, z), side in zip(shifted, sides, strict=True)]
        found = self.image[_last(slice(a, z) for a, z in there)]
        if there == shifted:
            return np.ascontiguousarray(found, np.float32)
        whole = np.full((*self.image.shape[:2], *(z - a for a, z in edges)), self.least, np.float32)
        inner = tuple(slice(a - b, z - b) for (a, z), (b, _) in zip(there, shifted, strict=True))
        whole[_last(inner)] = found
        return whole


def _by_slices(passes: _Passes, image: AnyArray, neighbours: int, least: float) -> Iterator[Tensor]:
    """Predict the slices of a volume (c, slices, rows, columns) with their neighbours as channels."""
    reach = np.arange(-neighbours, neighbours + 1)
    for numbers in _batches(list(range(image.shape[1])), passes.way.at_once):
        near = np.clip(np.asarray(numbers)[:, None] + reach, 0, image.shape[1] - 1)
        batch = np.moveaxis(image[:, near], 0, 2)  # (b, near, c, rows, columns)
        batch = batch.reshape(len(numbers), -1, *image.shape[2:])
        yield torch.cat(list(passes.slabs(batch, least)), 2).movedim(0, 1)


def _codes(probabilities: Tensor, plan: GridPlan) -> Tensor:
    """Give uint8 (b, ...) from (b, outputs, ...)."""
    if not plan.overlapping:
        return probabilities.argmax(1).to(torch.uint8)
    bits = [(probabilities[:, k] >= 0.5).to(torch.uint8) << k for k in range(probabilities.shape[1])]
    return reduce(torch.bitwise_or, bits)


def _line(side: int, device: torch.device) -> Tensor:
    places = torch.arange(side, dtype=torch.float64, device=device) - (side - 1) / 2
    return torch.exp(-0.5 * (places / (side * _SIGMA)) ** 2).float()


def _summed(line: Tensor, starts: Sequence[int], side: int) -> Tensor:
    total = torch.zeros(side, device=line.device)
    for first in starts:
        total[first : first + len(line)] += line
    return total


def _product(lines: Sequence[Tensor]) -> Tensor:
    found = lines[0]
    for line in lines[1:]:
        found = found[..., None] * line
    return found


def _last(cuts: Iterable[slice]) -> Any:
    """Index the last axes of an array."""
    return (..., *cuts)


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))
