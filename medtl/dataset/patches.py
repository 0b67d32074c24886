"""Patches of packed volumes: which, from where, and augmented how.

A patch is a pure function of the seed, phase, epoch and its number in the epoch: a killed run goes on with the same
bits, and a patch does not depend on the batch that it is in. Cropping comes first and from the file: what a patch does
not show is not read.

Turning, zooming and bending are one resampling (image linear, mask nearest), read from as large a crop as it needs, so
that it shows what lies around a patch and not a border. Angles are in mm; where slices are far apart, a patch is only
turned within them. Then come mirroring and the intensities. Outside of a volume is its least value, and background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional

from medtl.config import PatchesConfig
from medtl.dataset.grid import Volumes
from medtl.errors import PlanError
from medtl.records import FloatArray, GridPlan, IntArray

_ANISOTROPIC = 3.0  # a volume is not turned out of slices that are so many times as far apart as pixels
_OFTEN = 0.2  # share of patches that get each of noise, blur, brightness, contrast and gamma
_KNOTS = 4  # pieces of the spline that bends a patch, along each axis
_ORDER, _PATCH = 0x0DE5, 0xA7C4  # of random numbers
_COARSEST = 0.5  # of the resolution that is left


@dataclass(frozen=True)
class Patches:
    """Patches of some of the packed volumes, ``plan.batch_size`` at a time.

    Args:
        volumes: the pack.
        rows: the volumes to learn from, by their place in the pack.
        seed: of what is drawn.
    """

    volumes: Volumes
    rows: Sequence[int]
    plan: GridPlan
    config: PatchesConfig
    seed: int

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise PlanError("There is no volume to draw patches from.")

    def __len__(self) -> int:
        return -(-len(self.rows) * self.config.per_study // self.plan.batch_size)

    def step(self, phase: int, epoch: int, step: int, augmented: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Give one batch; the same arguments give the same bits.

        Every batch is full: an epoch's last one begins again with its first studies, other patches of them.

        Returns:
            float32 (batch, channels, *patch) and codes uint8 (batch, *patch).
        """
        size = self.plan.batch_size
        images = torch.empty(size, self.plan.channels, *self.plan.patch)
        codes = torch.zeros(size, *self.plan.patch, dtype=torch.uint8)
        order = self._order(phase, epoch)
        for place in range(size):
            number = step * size + place
            rng = np.random.default_rng([self.seed, _PATCH, phase, epoch, number])
            row, corner = self._corner(rng, int(order[number % len(order)]), number)
            if augmented:
                self._augment(rng, row, corner, images[place], codes[place])
            else:
                self._crop(row, corner, self.plan.patch, images[place], codes[place])
        return images, codes

    def _order(self, phase: int, epoch: int) -> IntArray:
        every = np.tile(np.asarray(self.rows), self.config.per_study)
        return np.random.default_rng([self.seed, _ORDER, phase, epoch]).permutation(every)

    @cached_property
    def _holders(self) -> list[tuple[int, IntArray]]:
        """Name each structure that any volume shows, and the volumes that do."""
        counts = np.array([self.volumes.counts[row] for row in self.rows])
        rows = np.asarray(self.rows)
        return [(k, rows[shown > 0]) for k, shown in enumerate(counts.T) if shown.any()]

    @cached_property
    def _gaps(self) -> FloatArray:
        """Give the spacing along the axes of a patch."""
        spacing = self.plan.spacing_mm or (1.0,) * self.plan.dimensions
        return np.array(spacing[-self.plan.dimensions :])

    def _corner(self, rng: np.random.Generator, row: int, number: int) -> tuple[int, IntArray]:
        """Choose a volume and the first voxel of a patch of it; in 2-D of volumes the slice goes first.

        Of so many patches as the config says one is centred on a structure, each structure as often as the others:
        where the volume does not show it, another one that does is taken.
        """
        share = self.config.foreground
        place: IntArray | None = None
        if int((number + 1) * share) > int(number * share) and self._holders:
            structure, holders = self._holders[rng.integers(len(self._holders))]
            if not self.volumes.counts[row][structure]:
                row = int(rng.choice(holders))
            places = self.volumes.places(row)[structure]
            place = places[rng.integers(len(places))]
        space = np.array(self.volumes.shapes[row][1:])
        apart = len(space) - self.plan.dimensions  # 1: patches are of slices
        sides = np.array([1] * apart + list(self.plan.patch))
        room = space - sides  # below 0: the patch is larger, and lies around the volume
        if place is None:
            return row, rng.integers(np.minimum(room, 0), np.maximum(room, 0) + 1)
        centred = np.clip(place - sides // 2, 0, np.maximum(room, 0))
        return row, np.where(room < 0, rng.integers(np.minimum(room, 0), 1), centred)

    def _crop(self, row: int, corner: IntArray, sides: Sequence[int], image: torch.Tensor, codes: torch.Tensor) -> None:
        """Read a box of a volume, in 2-D of volumes with its neighbours as channels, into what it is given.

        Args:
            corner: its first voxel; may lie outside.
            image: float32 (channels, *sides).
            codes: uint8 (*sides), zeros.
        """
        space = self.volumes.shapes[row][1:]
        first = corner[-len(sides) :]
        depth = space[-len(sides) :]
        inner = [slice(max(int(c), 0), min(int(c) + n, s)) for c, n, s in zip(first, sides, depth, strict=True)]
        outer = [slice(i.start - int(c), i.stop - int(c)) for i, c in zip(inner, first, strict=True)]
        if any(i.stop - i.start < n for i, n in zip(inner, sides, strict=True)):
            image.fill_(self.volumes.fills[row])
        if any(i.stop <= i.start for i in inner):
            return
        source, shown = self.volumes.image(row), self.volumes.codes(row)
        if len(space) > len(sides):
            reach = np.arange(-self.plan.neighbours, self.plan.neighbours + 1)
            slices = np.clip(int(corner[0]) + reach, 0, space[0] - 1)
            for channel, chosen in enumerate(slices):
                image[channel][tuple(outer)].copy_(torch.from_numpy(source[(0, chosen, *inner)]))
            shown = shown[int(corner[0])]
        else:
            image[(slice(None), *outer)].copy_(torch.from_numpy(source[(slice(None), *inner)]))
        codes.numpy()[tuple(outer)] = shown[tuple(inner)]

    def _augment(
        self, rng: np.random.Generator, row: int, corner: IntArray, image: torch.Tensor, codes: torch.Tensor
    ) -> None:
        """Draw one patch augmented, into what it is given."""
        if rng.random() < self.config.warped:
            self._warp(rng, row, corner, image, codes)
        else:
            self._crop(row, corner, self.plan.patch, image, codes)
        mirrored = [axis for axis in self.plan.mirror if rng.random() < 0.5]
        if mirrored:
            image.copy_(image.flip([1 + axis for axis in mirrored]))
            codes.copy_(codes.flip(mirrored))
        if self.config.colour and self.plan.axis is None:  # channels of a volume are its slices
            _tinted(rng, image, self.config.colour)
        recoloured(rng, image, self.config)

    def _warp(
        self, rng: np.random.Generator, row: int, corner: IntArray, image: torch.Tensor, codes: torch.Tensor
    ) -> None:
        """Resample a patch once, turned, zoomed and bent, from a crop as large as that needs."""
        sides = self.plan.patch
        matrix = _linear(rng, self._gaps, self.config)
        bent = _bending(rng, sides, self.config.elastic)
        centre = (np.array(sides) - 1) / 2
        reach = np.abs(matrix) @ centre + (0 if bent is None else self.config.elastic * np.array(sides))
        before = np.ceil(np.maximum(reach - centre, 0)).astype(np.int64) + 1
        wide = [int(n + 2 * b) for n, b in zip(sides, before, strict=True)]
        start = corner.copy()
        start[-len(sides) :] -= before
        crop = torch.empty(1, len(image), *wide)
        shown = torch.zeros(1, 1, *wide, dtype=torch.uint8)
        self._crop(row, start, wide, crop[0], shown[0, 0])
        # to grid_sample's coordinates: -1 and 1 are the centres of the outermost voxels, the last axis is named first
        scale = 2 / (np.array(wide) - 1)
        affine = (scale[:, None] * matrix * centre)[::-1, ::-1]
        theta = torch.from_numpy(np.concatenate([affine, np.zeros((len(sides), 1))], 1).astype(np.float32))
        grid = functional.affine_grid(theta[None], [1, 1, *sides], align_corners=True)
        if bent is not None:
            grid += bent.flip(-1) * torch.from_numpy(scale[::-1].astype(np.float32))
        least = self.volumes.fills[row]
        sampled = functional.grid_sample(crop - least, grid, "bilinear", "zeros", align_corners=True)
        torch.add(sampled[0], least, out=image)
        nearest = functional.grid_sample(shown.float(), grid, "nearest", "zeros", align_corners=True)
        codes.copy_(nearest[0, 0])


def recoloured(rng: np.random.Generator, image: torch.Tensor, config: PatchesConfig) -> None:
    """Change the values of one patch in place: blur, resolution, noise, brightness, contrast, gamma.

    Strengths are of the patch's own standard deviation: the same means the same, whatever the values' scale is.

    Args:
        image: float32 (channels, *patch).
    """
    drawn = rng.random(6) < [_OFTEN, config.low_resolution, _OFTEN, _OFTEN, _OFTEN, _OFTEN]
    strengths = rng.random(6)
    seed = int(rng.integers(2**62))
    if drawn[0] and config.blur:
        image.copy_(blurred(image, config.blur * max(strengths[0], 0.2)))
    if drawn[1]:
        image.copy_(coarsened(image, _COARSEST + (1 - _COARSEST) * strengths[1]))
    deviation, mean = (float(v) for v in torch.std_mean(image, correction=0))
    if drawn[2] and config.noise:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(image.shape, generator=generator)
        image.add_(noise, alpha=config.noise * strengths[2] * deviation)
    if drawn[3]:
        image.add_(config.brightness * (2 * strengths[3] - 1) * deviation)
        mean += config.brightness * (2 * strengths[3] - 1) * deviation
    if drawn[4]:
        gain = 1 + config.contrast * (2 * strengths[4] - 1)
        image.mul_(gain).add_(mean * (1 - gain))
    if drawn[5] and config.gamma:
        low, high = (float(v) for v in torch.aminmax(image))
        span = max(high - low, 1e-6)
        image.sub_(low).div_(span).clamp_(0, 1).pow_(1 + config.gamma * (2 * strengths[5] - 1)).mul_(span).add_(low)


def _tinted(rng: np.random.Generator, image: torch.Tensor, strength: float) -> None:
    """Give each channel its own gain and offset in place, as another lamp, camera or skin would."""
    for channel in image:
        gain, offset = rng.uniform(-strength, strength, 2)
        deviation = float(channel.std(correction=0))
        channel.mul_(float(np.exp(gain))).add_(offset * deviation)


def blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur (channels, *space) by a Gaussian of ``sigma`` voxels; edges are repeated."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    shares = (kernel / kernel.sum()).tolist()
    for axis in range(1, image.ndim):
        n = image.shape[axis]
        ends = [image.narrow(axis, 0, 1), image.narrow(axis, n - 1, 1)]
        padded = torch.cat([ends[0]] * reach + [image] + [ends[1]] * reach, axis)
        image = padded.narrow(axis, 0, n) * shares[0]
        for number in range(1, 2 * reach + 1):
            image.add_(padded.narrow(axis, number, n), alpha=shares[number])
    return image


def coarsened(image: torch.Tensor, share: float) -> torch.Tensor:
    """Lose resolution: take every so-manieth voxel of (channels, *space) and interpolate between them."""
    small = [max(2, round(n * share)) for n in image.shape[1:]]
    how = "trilinear" if image.ndim == 4 else "bilinear"
    coarse = functional.interpolate(image[None], small, mode="nearest-exact")
    return functional.interpolate(coarse, image.shape[1:], mode=how, align_corners=False)[0]


def _linear(rng: np.random.Generator, gaps: FloatArray, config: PatchesConfig) -> FloatArray:
    """Draw a turn in mm and a zoom: the matrix from a patch's voxels to the volume's, about the centre."""
    dimensions = len(gaps)
    angles = np.deg2rad(rng.uniform(-config.rotate_degrees, config.rotate_degrees, 3))
    zoom = rng.uniform(1 - config.scale, 1 + config.scale)
    planes = [(dimensions - 2, dimensions - 1)]
    if dimensions == 3 and gaps.max() < _ANISOTROPIC * gaps.min():
        planes += [(0, 1), (0, 2)]
    turn = np.eye(dimensions)
    for (first, second), angle in zip(planes, angles, strict=False):
        one = np.eye(dimensions)
        one[[first, second], [first, second]] = np.cos(angle)
        one[first, second], one[second, first] = -np.sin(angle), np.sin(angle)
        turn = turn @ one
    matrix: FloatArray = turn * gaps / gaps[:, None] / zoom
    return matrix


def _bending(rng: np.random.Generator, sides: Sequence[int], strength: float) -> torch.Tensor | None:
    """Draw a smooth displacement in voxels, (1, *sides, dimensions), or None where nothing is bent.

    A cubic B-spline over control points with random displacements (Rueckert et al. 1999, doi:10.1109/42.796284).
    """
    if not strength:
        return None
    dimensions = len(sides)
    field = rng.uniform(-strength, strength, (*[_KNOTS + 3] * dimensions, dimensions)) * sides
    for axis, side in enumerate(sides):
        field = np.moveaxis(np.tensordot(_spline(side), field, (1, axis)), 0, axis)
    return torch.from_numpy(field.astype(np.float32))[None]


def _spline(side: int) -> FloatArray:
    """Give the shares that control points have in each voxel of a side, (side, _KNOTS + 3); rows add up to 1."""
    place = (np.arange(side) + 0.5) / side * _KNOTS
    piece = np.floor(place).astype(np.int64)
    t = place - piece
    basis = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    shares = np.zeros((side, _KNOTS + 3))
    for number in range(4):
        shares[np.arange(side), piece + number] = basis[number]
    return shares
