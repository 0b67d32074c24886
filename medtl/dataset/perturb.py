"""What another scanner, another hand or another day does to an image: mild, strong, and the same each time. Pure.

Source: Hendrycks and Dietterich, ICLR 2019, for the idea and for two strengths that a reader would still diagnose; the
kinds are those that acquisition changes in medical images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import cv2
import numpy as np

from medtl.records import AnyArray, FloatArray

Strength = Literal["mild", "strong"]
_Change = Callable[[FloatArray, float, np.random.Generator], FloatArray]


def _noise(image: FloatArray, sigma: float, rng: np.random.Generator) -> FloatArray:
    return image + rng.normal(0.0, sigma, image.shape)


def _blur(image: FloatArray, share: float, _: np.random.Generator) -> FloatArray:
    return _each(image, lambda plane: cv2.GaussianBlur(plane, (0, 0), share * min(plane.shape[:2])))


def _contrast(image: FloatArray, factor: float, _: np.random.Generator) -> FloatArray:
    middle = image.mean(axis=tuple(range(image.ndim - 1)), keepdims=True)
    made: FloatArray = middle + factor * (image - middle)
    return made


def _brightness(image: FloatArray, shift: float, _: np.random.Generator) -> FloatArray:
    return image + shift


def _coarser(image: FloatArray, factor: float, _: np.random.Generator) -> FloatArray:
    def resample(plane: AnyArray) -> AnyArray:
        rows, columns = plane.shape[:2]
        small = (max(1, round(columns / factor)), max(1, round(rows / factor)))
        fewer = cv2.resize(plane, small, interpolation=cv2.INTER_AREA)
        return cv2.resize(fewer, (columns, rows), interpolation=cv2.INTER_LINEAR)

    return _each(image, resample)


PERTURBATIONS: Mapping[str, tuple[_Change, Mapping[Strength, float], str]] = {
    "noise": (_noise, {"mild": 0.02, "strong": 0.06}, "Gaussian noise, standard deviation in shares of the range"),
    "blur": (_blur, {"mild": 0.008, "strong": 0.02}, "Gaussian blur, standard deviation in shares of the side"),
    "less contrast": (_contrast, {"mild": 0.8, "strong": 0.5}, "distance to the mean, times"),
    "more contrast": (_contrast, {"mild": 1.25, "strong": 1.6}, "distance to the mean, times"),
    "darker": (_brightness, {"mild": -0.05, "strong": -0.15}, "shift in shares of the range"),
    "brighter": (_brightness, {"mild": 0.05, "strong": 0.15}, "shift in shares of the range"),
    "coarser": (_coarser, {"mild": 1.5, "strong": 3.0}, "pixels so many times as large, then brought back"),
}  # fmt: skip


def perturbed(images: AnyArray, name: str, strength: Strength, seed: int) -> AnyArray:
    """Change every image of a batch in one way.

    Args:
        images: (n, ..., rows, columns, channels), uint8 or uint16.
        name: a row of :data:`PERTURBATIONS`.
        seed: of the noise; an image's noise depends on its place in the batch too.

    Returns:
        An array of the same shape and type.
    """
    change, strengths, _ = PERTURBATIONS[name]
    full = float(np.iinfo(images.dtype).max)
    made = np.empty_like(images)
    for number, image in enumerate(images):
        rng = np.random.default_rng([seed, number])
        altered = change(image.astype(np.float64) / full, strengths[strength], rng)
        made[number] = np.rint(np.clip(altered, 0.0, 1.0) * full)
    return made


def _each(image: FloatArray, of: Callable[[AnyArray], AnyArray]) -> FloatArray:
    """Apply to each plane (rows, columns, channels) of an image or volume; cv2 drops a single channel."""
    planes = image.reshape(-1, *image.shape[-3:])
    return np.stack([np.asarray(of(plane)).reshape(plane.shape) for plane in planes]).reshape(image.shape)
