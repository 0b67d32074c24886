"""How pixels become network input, decided from the training part alone. Pure.

Facts are measured, decisions follow from them, and both are kept with a reason each: the same plan is used in training
and in the clinic, so nothing about it may depend on a validation or test image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from medtl.config import PlanConfig
from medtl.errors import PlanError
from medtl.progress import advance
from medtl.records import AnyArray, Plan, Scan, Task

_STEP = 16  # sizes are multiples of this
_SAMPLE = 65_536  # pixels looked at per image


def make_plan(
    scans: Sequence[Scan],
    read: Callable[[Scan], AnyArray],
    task: Task,
    classes: tuple[str, ...],
    config: PlanConfig,
    min_size: int,
    multiple: int = 1,
) -> Plan:
    """Measure the training images and decide size, channels, depth and intensity.

    Args:
        scans: of the training part only.
        read: gives a scan's pixels.
        min_size: least rows and columns the backbone takes.
        multiple: sizes the backbone takes are multiples of it.

    Raises:
        PlanError: no training images, or a configured size below what the backbone takes.
    """
    if not scans:
        raise PlanError("There is no training image to plan from.")
    facts = _measure(scans, read, config)
    reasons: dict[str, str] = {}
    size = _size(facts, config, min_size, multiple, reasons)
    channels = _channels(facts, config, reasons)
    eight = facts["bits"] == 8
    reasons["bits"] = "8: every training image has 8 bits" if eight else f"16: images have up to {facts['bits']} bits"
    intensity, low, high = _intensity(facts, config, reasons)
    return Plan(
        task=task,
        classes=classes,
        size=(size, size),
        channels=channels,
        bits=8 if eight else 16,
        intensity=intensity,
        low=low,
        high=high,
        percentiles=config.percentiles,
        facts=facts,
        reasons=reasons,
    )


def misfit(scan: Scan, plan: Plan) -> str | None:
    """Say why a scan is not what the plan was made for, or None.

    A fixed range was measured on images of one depth; on another depth it would clip an image to black or white, and
    the network would decide on nothing.
    """
    if scan.is_volume:
        return "a volume, and the release takes images"
    eight = scan.dtype.endswith("u1")
    if plan.intensity == "fixed" and eight != (plan.bits == 8):
        return f"the scan has {scan.bits} bits and the plan's fixed range was measured on images of another depth"
    return None


def _measure(scans: Sequence[Scan], read: Callable[[Scan], AnyArray], config: PlanConfig) -> dict[str, Any]:
    lows, highs, sides = [], [], []
    for number, scan in enumerate(scans, 1):
        pixels = np.asarray(read(scan))
        thinned = pixels.reshape(-1)[:: max(1, pixels.size // _SAMPLE)]
        low, high = np.percentile(thinned, config.percentiles)
        lows.append(float(low))
        highs.append(float(high))
        sides.append(max(scan.shape[:2]))
        advance("planning", number, len(scans))
    spread = np.subtract(highs, lows)
    variation = float(np.std(spread)) / max(float(np.mean(spread)), 1e-9)
    return {
        "images": len(scans),
        "median_side": float(np.median(sides)),
        "largest_side": int(max(sides)),
        "colour": sum(scan.channels == 3 for scan in scans),
        "bits": 8 if all(scan.dtype.endswith("u1") for scan in scans) else max(9, *(scan.bits for scan in scans)),
        "modalities": sorted({scan.modality for scan in scans if scan.modality}),
        "low": round(float(np.percentile(lows, 5)), 4),
        "high": round(float(np.percentile(highs, 95)), 4),
        "window_variation": round(variation, 4),
    }


def _size(facts: dict[str, Any], config: PlanConfig, min_size: int, multiple: int, reasons: dict[str, str]) -> int:
    if config.size is not None:
        if config.size < min_size:
            raise PlanError(f"dataset.plan.size is {config.size}; this backbone takes {min_size} or more.")
        if config.size % multiple:
            near = max(min_size, round(config.size / multiple) * multiple)
            raise PlanError(
                f"dataset.plan.size is {config.size}; this backbone takes multiples of {multiple}, for instance {near}."
            )
        reasons["size"] = f"{config.size}: set by the config"
        return config.size
    natural = int(np.ceil(facts["median_side"] / _STEP) * _STEP)
    size = int(np.clip(natural, min_size, max(min_size, config.max_size)))
    why = "the median longer side of the training images"
    fitting = max(size // multiple, 1) * multiple
    if fitting != size:
        reasons["size"] = f"{fitting}: {size} would do, and this backbone takes multiples of {multiple}"
        return fitting
    if size < natural:
        why += f", held to dataset.plan.max_size = {config.max_size}"
    elif size > natural:
        why += f", raised to {min_size}, the least that this backbone takes"
    reasons["size"] = f"{size}: {why}"
    return size


def _channels(facts: dict[str, Any], config: PlanConfig, reasons: dict[str, str]) -> int:
    if config.channels is not None:
        reasons["channels"] = f"{config.channels}: set by the config"
        return config.channels
    colour = facts["colour"] * 2 > facts["images"]
    reasons["channels"] = f"{facts['colour']} of {facts['images']} training images are in colour"
    return 3 if colour else 1


def _intensity(
    facts: dict[str, Any], config: PlanConfig, reasons: dict[str, str]
) -> tuple[Literal["fixed", "per_image"], float | None, float | None]:
    choice = config.intensity
    if choice == "auto":
        if facts["bits"] == 8:
            choice, why = "fixed", "8-bit images: 0 to 255 as they are"
        elif facts["modalities"] == ["CT"]:
            choice, why = "fixed", "CT values are absolute: percentiles of the training images"
        else:
            choice, why = "per_image", "values have no absolute scale in this modality: percentiles of each image"
    else:
        why = "set by the config"
    reasons["intensity"] = f"{choice}: {why}"
    if choice == "per_image":
        return "per_image", None, None
    if facts["bits"] == 8:
        return "fixed", 0.0, 255.0
    return "fixed", facts["low"], max(facts["high"], facts["low"] + 1.0)
