"""From pixels to network input: prepare once, augment at random every time. Pure.

``prepare`` is the plan at work, in training and in the clinic. Augmentation is in two halves: ``sample`` draws numbers
from a generator it is given, ``augment`` applies them; the same draw gives the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import cv2
import numpy as np

from medtl.config import TransformsConfig
from medtl.records import AnyArray, FloatArray, IntArray, Plan, Scan

cv2.setNumThreads(0)  # images are small and batches run beside torch's own threads


Axis = Literal["sagittal", "coronal", "axial"]
# Of slices, rows and columns: 0 right to left, 1 back to front, 2 feet to head.
_ORDER: Mapping[Axis, tuple[int, int, int]] = {"sagittal": (0, 2, 1), "coronal": (1, 2, 0), "axial": (2, 1, 0)}
_AXES: tuple[Axis, ...] = ("sagittal", "coronal", "axial")
_THINNED = 40  # values looked at along each axis of a volume
_HALF = 0.5 - 1e-4  # of a place; an area average in float32 ends a little beside the half
_TRACE = 1e-6  # of a place: less is none
_COARSER = 1.05  # an axis is the coarsest if its spacing is so many times the next


def prepare_scan(pixels: AnyArray, scan: Scan, plan: Plan) -> AnyArray:
    """Turn one scan into its rows of the packed array.

    An image has one row. A volume is turned (:func:`oriented`), each of its slices is fitted into the plan's rows and
    columns in mm, as an image is, and then either ``plan.slices`` evenly spaced slices are rows, each with its
    neighbours as channels (the outermost slice stands in for what lies outside), or the slice axis is stretched or
    shrunk to ``plan.depth``.

    Returns:
        (plan.slices, rows, columns, channels), or (1, depth, rows, columns, 1) where volumes are shown whole.
    """
    if plan.volumes is None:
        return prepare(pixels, plan)[None]
    assert scan.affine is not None and plan.axis is not None
    volume, spacing = oriented(pixels, scan.affine, plan.axis)
    top, dtype = (255, np.uint8) if plan.bits == 8 else (65535, np.uint16)
    low, high = _range(thinned(volume, scan), plan)

    def fitted(number: int) -> FloatArray:
        values = np.clip((meaning(volume[number], scan) - low) / max(high - low, 1e-6), 0, 1) * top
        return _fit(values.astype(np.float32), plan.size, spacing[1:])

    if plan.volumes == "whole":
        assert plan.depth is not None
        stack = np.stack([fitted(number) for number in range(len(volume))])
        return np.rint(resliced(stack, plan.depth)).astype(dtype)[None, ..., None]
    reach = np.arange(-plan.neighbours, plan.neighbours + 1)
    chosen = np.clip(evenly(len(volume), plan.slices)[:, None] + reach, 0, len(volume) - 1)
    pictures = {int(number): np.rint(fitted(int(number))).astype(dtype) for number in np.unique(chosen)}
    return np.stack([np.stack([pictures[int(number)] for number in row], -1) for row in chosen])


def prepare_mark(mask: AnyArray, scan: Scan, plan: Plan) -> AnyArray:
    """Lay what was drawn on a scan onto the places of its rows of the packed array.

    The shares of each place that are inside go the way of the scan's own pixels; at least half makes it inside. A mark
    too small for that is where most of it is; one between the slices that are shown is nowhere. Neighbours of a slice
    are channels, and channels have no mark of their own.

    Args:
        mask: of the scan's shape, 1 inside, 0 outside.

    Returns:
        (plan.slices, rows, columns), or (1, depth, rows, columns) where volumes are shown whole; true inside.
    """
    inside = (mask > 0).astype(np.float32)
    if plan.volumes is None:
        return _mostly(_fit(inside, plan.size)[None])
    assert scan.affine is not None and plan.axis is not None
    volume, spacing = oriented(inside, scan.affine, plan.axis)
    whole = plan.volumes == "whole"
    chosen = range(len(volume)) if whole else evenly(len(volume), plan.slices).tolist()
    stack = np.stack([_fit(volume[number], plan.size, spacing[1:]) for number in chosen])
    if not whole:
        return _mostly(stack)
    assert plan.depth is not None
    return _mostly(resliced(stack, plan.depth)[None])


def oriented(values: AnyArray, affine: Sequence[Sequence[float]], axis: Axis) -> tuple[AnyArray, tuple[float, ...]]:
    """Turn a volume by right angles so that its slices are axial, coronal or sagittal, without resampling.

    Each voxel axis is taken for the anatomical axis (R, A, S) it is nearest to. Slices run towards R, A or S; pictures
    are as radiologists look at them: rows towards the back or the feet, columns towards the patient's left or back.

    Args:
        values: (slices, rows, columns), any order.
        affine: maps voxel (column, row, slice) to RAS+ mm.

    Returns:
        A view of the values, (slices, rows, columns), and their spacing in mm in this order.
    """
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    voxel = _nearest(matrix / spacing)
    order = [voxel[anatomical] for anatomical in _ORDER[axis]]
    turned = values.transpose([2 - v for v in order])
    for place, (anatomical, v) in enumerate(zip(_ORDER[axis], order, strict=True)):
        ascends = matrix[anatomical, v] > 0
        if ascends != (place == 0):
            turned = np.flip(turned, place)
    return turned, tuple(float(spacing[v]) for v in order)


def coarsest(affine: Sequence[Sequence[float]]) -> Axis:
    """Name the slices of a volume whose spacing is largest; axial where none is larger than the next by 5 %."""
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    by_axis = spacing[list(_nearest(matrix / spacing))]
    least, most = np.sort(by_axis)[1:]
    return _AXES[int(np.argmax(by_axis))] if most > _COARSER * least else "axial"


def evenly(count: int, wanted: int) -> IntArray:
    """Choose slices at the middles of ``wanted`` equal parts of a volume; the nearest again where there are fewer."""
    places = np.floor((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64)
    return np.minimum(places, count - 1)


def resliced(stack: FloatArray, depth: int) -> FloatArray:
    """Stretch or shrink a volume along its slices: linear between two, the mean of those covered when shrinking.

    Slice by slice and not as a matrix product, whose last bits depend on the number of threads.

    Args:
        stack: (slices, rows, columns).
    """
    count = len(stack)
    if count == depth:
        return stack
    out = np.zeros((depth, *stack.shape[1:]), np.float32)
    for number in range(depth):
        if count < depth:
            place = min(max((number + 0.5) * count / depth - 0.5, 0.0), count - 1.0)
            shares = [(int(place), 1 - place % 1), (min(int(place) + 1, count - 1), place % 1)]
        else:
            start, end = number * count / depth, (number + 1) * count / depth
            covered = range(int(start), min(int(np.ceil(end)), count))
            shares = [(s, (min(end, s + 1) - max(start, s)) * depth / count) for s in covered]
        for chosen, share in shares:
            if share > 0:
                out[number] += np.float32(share) * stack[chosen]
    return out


def meaning(values: AnyArray, scan: Scan) -> FloatArray:
    """Turn stored values into what they mean (of CT: HU): slope * stored + intercept."""
    real: FloatArray = values.astype(np.float32) * np.float32(scan.slope) + np.float32(scan.intercept)
    return real


def thinned(volume: AnyArray, scan: Scan) -> FloatArray:
    """Give the meaning of about 64,000 values of a volume, evenly spaced along every axis."""
    steps = tuple(slice(None, None, -(-side // _THINNED)) for side in volume.shape)
    return meaning(volume[steps], scan)


def prepare(pixels: AnyArray, plan: Plan) -> AnyArray:
    """Turn one scan's pixels into one row of the packed array.

    Longer side to the plan's size, aspect kept, padded with the darkest value; area average when shrinking.

    Args:
        pixels: (rows, columns) or (rows, columns, 3), any depth.

    Returns:
        (size, size, channels), uint8 or uint16 as the plan says.
    """
    image = _with_channels(np.asarray(pixels), plan.channels)
    top = 255 if plan.bits == 8 else 65535
    low, high = _range(image, plan)
    untouched = image.dtype == np.uint8 and plan.bits == 8 and (low, high) == (0.0, 255.0)
    if not untouched:
        image = (np.clip((image.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * top).astype(np.float32)
    fitted = _fit(image, plan.size)
    if fitted.dtype == np.float32:
        fitted = np.rint(fitted).astype(np.uint8 if plan.bits == 8 else np.uint16)
    return fitted.reshape(*plan.size, plan.channels)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What was drawn for a batch of n images: affine maps (n, 2, 3) in pixels, gains (n,) and offsets (n,)."""

    maps: FloatArray
    gains: FloatArray
    offsets: FloatArray

    def take(self, rows: IntArray) -> Augmentation:
        """Give what was drawn for some of the images."""
        return Augmentation(self.maps[rows], self.gains[rows], self.offsets[rows])


def sample(rng: np.random.Generator, n: int, size: tuple[int, int], config: TransformsConfig) -> Augmentation:
    """Draw an augmentation for n images of one size.

    Args:
        size: rows, columns.
    """
    rows, columns = size
    angle = np.deg2rad(rng.uniform(-config.rotate_degrees, config.rotate_degrees, n))
    zoom = rng.uniform(1 - config.scale, 1 + config.scale, n)
    mirror_x = np.where(config.flip_horizontal & (rng.random(n) < 0.5), -1.0, 1.0)
    mirror_y = np.where(config.flip_vertical & (rng.random(n) < 0.5), -1.0, 1.0)
    shift = rng.uniform(-config.shift, config.shift, (n, 2)) * (columns, rows)
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    linear = np.stack(
        [np.stack([cos * mirror_x, -sin * mirror_y], -1), np.stack([sin * mirror_x, cos * mirror_y], -1)], 1
    )
    centre = np.array([(columns - 1) / 2, (rows - 1) / 2])
    offset = centre - linear @ centre + shift
    gains = rng.uniform(1 - config.contrast, 1 + config.contrast, n)
    offsets = rng.uniform(-config.brightness, config.brightness, n)
    return Augmentation(np.concatenate([linear, offset[..., None]], 2), gains, offsets)


def augment(images: AnyArray, drawn: Augmentation) -> AnyArray:
    """Apply what was drawn; every slice of a volume gets the same.

    Args:
        images: (n, rows, columns, channels) or (n, slices, rows, columns, channels), uint8 or uint16.

    Returns:
        The same shape and type; edges are mirrored outwards, values clipped at the ends of the type.
    """
    top = np.iinfo(images.dtype).max
    out = np.empty_like(images)
    levels = np.arange(256, dtype=np.float32)
    for image, target, matrix, gain, offset in zip(images, out, drawn.maps, drawn.gains, drawn.offsets, strict=True):
        warped = _warp(image, matrix) if image.ndim == 3 else np.stack([_warp(one, matrix) for one in image])
        bias = (0.5 - 0.5 * gain + offset) * top
        if images.dtype == np.uint8:  # through a table of 256 values
            table = np.rint(np.clip(levels * gain + bias, 0, top)).astype(np.uint8)
            warped = cv2.LUT(warped, table) if image.ndim == 3 else table[warped]
        else:
            warped = np.rint(np.clip(warped.astype(np.float32) * gain + bias, 0, top)).astype(images.dtype)
        target[...] = warped.reshape(target.shape)
    return out


def _warp(image: AnyArray, matrix: FloatArray) -> AnyArray:
    """Warp one picture; cv2 takes four channels at once."""
    size = (image.shape[1], image.shape[0])
    channels = image.shape[2]
    parts = [image[..., first : first + 4] for first in range(0, channels, 4)] if channels > 4 else [image]
    warped = [
        cv2.warpAffine(
            np.ascontiguousarray(part), matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        ).reshape(part.shape)
        for part in parts
    ]
    return warped[0] if len(warped) == 1 else np.concatenate(warped, -1)


def _range(values: AnyArray, plan: Plan) -> tuple[float, float]:
    if plan.intensity == "per_image":
        low, high = (float(v) for v in np.percentile(values, plan.percentiles))
        return low, high
    assert plan.low is not None and plan.high is not None
    return plan.low, plan.high


def _mostly(shares: FloatArray) -> AnyArray:
    """Tell which places are inside by their shares, 0 to 1."""
    inside: AnyArray = shares >= min(_HALF, max(float(shares.max()), _TRACE))
    return inside


def _nearest(cosines: FloatArray) -> tuple[int, int, int]:
    """Give the voxel axis nearest to each of R, A and S, each voxel axis once."""
    ways = list(permutations(range(3)))
    closeness = [sum(abs(float(cosines[a, v])) for a, v in enumerate(way)) for way in ways]
    first, second, third = ways[int(np.argmax(closeness))]
    return first, second, third


def _with_channels(image: AnyArray, channels: int) -> AnyArray:
    if image.dtype not in (np.uint8, np.float32):
        image = image.astype(np.float32)
    if channels == 1 and image.ndim == 3:
        return luma(image)
    if channels == 3 and image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return image


def luma(image: AnyArray) -> AnyArray:
    """Weigh red, green and blue as ITU-R BT.601 does, to the nearest integer of 8 bits; equal ones stay what they are.

    Term by term and not as a matrix product, whose last bits depend on the processor.

    Args:
        image: (rows, columns, 3), uint8 or any float.

    Returns:
        (rows, columns), uint8 or float32.
    """
    if image.dtype == np.uint8:
        red, green, blue = np.moveaxis(image.astype(np.uint32), -1, 0)
        nearest: AnyArray = (299 * red + 587 * green + 114 * blue + 500) // 1000
        return nearest.astype(np.uint8)
    red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
    weighed: FloatArray = 0.299 * red + 0.587 * green + 0.114 * blue
    return weighed.astype(np.float32)


def _fit(image: AnyArray, size: tuple[int, int], spacing: Sequence[float] = (1.0, 1.0)) -> AnyArray:
    """Fit a picture into a size, aspect kept in mm."""
    rows, columns = image.shape[:2]
    tall, wide = rows * spacing[0], columns * spacing[1]
    scale = min(size[0] / tall, size[1] / wide)
    new_rows = min(size[0], max(1, round(tall * scale)))
    new_columns = min(size[1], max(1, round(wide * scale)))
    if (new_rows, new_columns) != (rows, columns):
        shrinks = new_rows <= rows and new_columns <= columns
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = cv2.resize(np.ascontiguousarray(image), (new_columns, new_rows), interpolation=how)
    top, left = (size[0] - new_rows) // 2, (size[1] - new_columns) // 2
    padded = np.zeros((*size, *image.shape[2:]), dtype=image.dtype)
    padded[top : top + new_rows, left : left + new_columns] = image
    return padded
