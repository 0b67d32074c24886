"""From pixels to network input: prepare once, augment at random every time. Pure.

``prepare`` is the plan at work, in training and in the clinic. Augmentation is in two halves: ``sample`` draws numbers
from a generator it is given, ``augment`` applies them; the same draw gives the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from medtl.config import TransformsConfig
from medtl.records import AnyArray, FloatArray, IntArray, Plan

cv2.setNumThreads(0)  # images are small and batches run beside torch's own threads


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
    if plan.intensity == "per_image":
        low, high = (float(v) for v in np.percentile(image, plan.percentiles))
    else:
        assert plan.low is not None and plan.high is not None
        low, high = plan.low, plan.high
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
    """Apply what was drawn.

    Args:
        images: (n, rows, columns, channels), uint8 or uint16.

    Returns:
        The same shape and type; edges are mirrored outwards, values clipped at the ends of the type.
    """
    top = np.iinfo(images.dtype).max
    rows, columns = images.shape[1:3]
    out = np.empty_like(images)
    levels = np.arange(256, dtype=np.float32)
    for image, target, matrix, gain, offset in zip(images, out, drawn.maps, drawn.gains, drawn.offsets, strict=True):
        warped = cv2.warpAffine(
            image, matrix, (columns, rows), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        bias = (0.5 - 0.5 * gain + offset) * top
        if images.dtype == np.uint8:  # through a table of 256 values
            table = np.rint(np.clip(levels * gain + bias, 0, top)).astype(np.uint8)
            warped = cv2.LUT(warped, table)
        else:
            warped = np.rint(np.clip(warped.astype(np.float32) * gain + bias, 0, top)).astype(images.dtype)
        target[...] = warped.reshape(target.shape)
    return out


def _with_channels(image: AnyArray, channels: int) -> AnyArray:
    if image.dtype not in (np.uint8, np.float32):
        image = image.astype(np.float32)
    if channels == 1 and image.ndim == 3:
        # ITU-R BT.601 luma
        return (image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)).astype(image.dtype)
    if channels == 3 and image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return image


def _fit(image: AnyArray, size: tuple[int, int]) -> AnyArray:
    rows, columns = image.shape[:2]
    scale = min(size[0] / rows, size[1] / columns)
    new_rows = min(size[0], max(1, round(rows * scale)))
    new_columns = min(size[1], max(1, round(columns * scale)))
    if (new_rows, new_columns) != (rows, columns):
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image = cv2.resize(np.ascontiguousarray(image), (new_columns, new_rows), interpolation=how)
    top, left = (size[0] - new_rows) // 2, (size[1] - new_columns) // 2
    padded = np.zeros((*size, *image.shape[2:]), dtype=image.dtype)
    padded[top : top + new_rows, left : left + new_columns] = image
    return padded
