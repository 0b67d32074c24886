"""How pixels become network input, decided from the training part alone. Pure.

Facts are measured, decisions follow from them, and both are kept with a reason each: the same plan is used in training
and in the clinic, so nothing about it may depend on a validation or test image.

A cohort of volumes is shown as slices to a backbone of two dimensions and whole to one of three. All volumes are sliced
along one anatomical axis: the one in which most training volumes are coarsest, axial where they are even. Their values
are what they mean (of CT: HU), always packed with 16 bits: the type they were stored in says nothing of their depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from medtl.config import PlanConfig
from medtl.dataset.transforms import Axis, coarsest, oriented, thinned
from medtl.errors import PlanError
from medtl.progress import advance
from medtl.records import AnyArray, Plan, Scan, Task

_STEP = 16  # sizes are multiples of this
_SAMPLE = 65_536  # pixels looked at per image
_MOST_SLICES = 32  # of a volume that the plan shows by itself
_MOST_DEPTH = 96
_MOST_SIDE = 128  # rows and columns of a whole volume: a network of three dimensions keeps all of it in memory


def make_plan(
    scans: Sequence[Scan],
    read: Callable[[Scan], AnyArray],
    task: Task,
    classes: tuple[str, ...],
    config: PlanConfig,
    min_size: int,
    multiple: int = 1,
    dimensions: int = 2,
) -> Plan:
    """Measure the training images and decide size, channels, depth and intensity.

    Args:
        scans: of the training part only.
        read: gives a scan's pixels.
        min_size: least rows and columns the backbone takes.
        multiple: sizes the backbone takes are multiples of it.
        dimensions: of space, that the backbone takes: 2 or 3.

    Raises:
        PlanError: no training images, images and volumes together, a configured size below what the backbone takes, or
            a wish that images or this backbone cannot fulfil.
    """
    if not scans:
        raise PlanError("There is no training image to plan from.")
    if _are_volumes(scans):
        return _plan_volumes(scans, read, task, classes, config, min_size, multiple, dimensions)
    _check_images(config, dimensions)
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
    if scan.mask_of is not None:
        return "a mask, and the release takes scans"
    if scan.is_volume != (plan.volumes is not None):
        return "a volume, and the release takes images" if scan.is_volume else "an image, and the release takes volumes"
    if scan.is_volume:
        return _misfit_of_volume(scan, plan)
    eight = scan.dtype.endswith("u1")
    if plan.intensity == "fixed" and eight != (plan.bits == 8):
        return f"the scan has {scan.bits} bits and the plan's fixed range was measured on images of another depth"
    return None


def _misfit_of_volume(scan: Scan, plan: Plan) -> str | None:
    known = plan.facts.get("modalities")
    if plan.intensity == "fixed" and known and scan.modality and scan.modality not in known:
        return f"a volume of {scan.modality}, and the plan's fixed range was measured on {' and '.join(known)}"
    return None


def _are_volumes(scans: Sequence[Scan]) -> bool:
    volumes = sum(scan.is_volume for scan in scans)
    if volumes not in (0, len(scans)):
        raise PlanError(
            f"{volumes} of {len(scans)} training scans are volumes and the others images; a network learns from one "
            "kind. Take one out of the label table, or every slice as an image: --set scans.read=images"
        )
    return volumes > 0


def _check_images(config: PlanConfig, dimensions: int) -> None:
    """Refuse wishes that only volumes fulfil."""
    if dimensions == 3:
        raise PlanError("The backbone reads volumes, and the scans are images. Name a backbone of two dimensions.")
    wished = {
        "volumes": config.volumes,
        "neighbours": config.neighbours,
        "slices": config.slices,
        "depth": config.depth,
    }
    for key, value in {**wished, "axis": None if config.axis == "auto" else config.axis}.items():
        if value:
            raise PlanError(f"dataset.plan.{key} is {value}, and the scans are images. Leave it out.")


def _plan_volumes(
    scans: Sequence[Scan],
    read: Callable[[Scan], AnyArray],
    task: Task,
    classes: tuple[str, ...],
    config: PlanConfig,
    min_size: int,
    multiple: int,
    dimensions: int,
) -> Plan:
    reasons: dict[str, str] = {}
    shown = _shown(config, dimensions, reasons)
    axis = _axis(scans, config, reasons)
    facts = _measure_volumes(scans, read, config, axis)
    bounded = config if shown == "slices" else config.model_copy(update={"max_size": min(config.max_size, _MOST_SIDE)})
    size = _size(facts, bounded, min_size, multiple, reasons)
    if shown == "whole" and config.size is None and config.max_size > _MOST_SIDE:
        reasons["size"] = reasons["size"].replace("dataset.plan.max_size =", "the most of a whole volume,")
    channels = 2 * config.neighbours + 1
    if config.channels not in (None, channels):
        raise PlanError(
            f"dataset.plan.channels is {config.channels}; a volume's are 2 * dataset.plan.neighbours + 1 = {channels}. "
            "Leave channels out."
        )
    around = f", each slice with {config.neighbours} more on each side" if config.neighbours else ""
    reasons["channels"] = f"{channels}: volumes are grey{around}"
    reasons["bits"] = "16: a volume's values are scaled from what they mean, whatever type they were stored in"
    intensity, low, high = _intensity(facts, config, reasons)
    slices, depth = 1, None
    if shown == "slices":
        slices = _slices(facts, config, reasons)
    else:
        depth = _depth(facts, config, min_size, multiple, reasons)
    return Plan(
        task, classes, (size, size), channels, 16, intensity, low, high, config.percentiles, facts, reasons, shown,
        axis, slices, config.neighbours, depth,
    )  # fmt: skip


def _shown(config: PlanConfig, dimensions: int, reasons: dict[str, str]) -> Literal["slices", "whole"]:
    fitting: Literal["slices", "whole"] = "slices" if dimensions == 2 else "whole"
    if config.volumes not in (None, fitting):
        raise PlanError(
            f"dataset.plan.volumes is {config.volumes}, and this backbone has {dimensions} dimensions: it takes "
            f"{fitting}. Leave volumes out, or name another backbone (`medtl backbones`)."
        )
    if fitting == "whole" and config.neighbours:
        raise PlanError("dataset.plan.neighbours are channels of slices; a backbone of three dimensions sees them all.")
    unused = "depth" if fitting == "slices" else "slices"
    if getattr(config, unused) is not None:
        raise PlanError(f"dataset.plan.{unused} does not apply to volumes shown as '{fitting}'. Leave it out.")
    voting = "; the slices of a study vote by their mean probability" if fitting == "slices" else ""
    reasons["volumes"] = f"{fitting}: the backbone has {dimensions} dimensions{voting}"
    return fitting


def _axis(scans: Sequence[Scan], config: PlanConfig, reasons: dict[str, str]) -> Axis:
    if config.axis != "auto":
        reasons["axis"] = f"{config.axis}: set by the config"
        return config.axis
    counts: Counter[Axis] = Counter(coarsest(scan.affine) for scan in scans if scan.affine is not None)
    names: tuple[Axis, ...] = ("axial", "coronal", "sagittal")
    chosen = max(names, key=lambda name: counts[name])
    reasons["axis"] = f"{chosen}: {counts[chosen]} of {len(scans)} training volumes are coarsest across it, or even"
    return chosen


def _slices(facts: dict[str, Any], config: PlanConfig, reasons: dict[str, str]) -> int:
    if config.slices is not None:
        reasons["slices"] = f"{config.slices}: set by the config"
        return config.slices
    median = int(facts["median_slices"])
    slices = min(median, _MOST_SLICES)
    held = "" if slices == median else f" ({median}), held to {_MOST_SLICES}"
    reasons["slices"] = f"{slices}: the median of the training volumes{held}; evenly spaced"
    return slices


def _depth(facts: dict[str, Any], config: PlanConfig, least: int, multiple: int, reasons: dict[str, str]) -> int:
    if config.depth is not None:
        if config.depth < least or config.depth % multiple:
            raise PlanError(
                f"dataset.plan.depth is {config.depth}; this backbone takes {least} or more slices, in multiples of "
                f"{multiple}."
            )
        reasons["depth"] = f"{config.depth}: set by the config"
        return config.depth
    median = facts["median_slices"]
    natural = int(np.ceil(median / _STEP) * _STEP)
    depth = int(np.clip(natural, least, max(least, _MOST_DEPTH)))
    depth = max(depth // multiple, 1) * multiple
    how = "" if depth == natural else f", held between {least} and {_MOST_DEPTH}"
    reasons["depth"] = f"{depth}: the median number of slices ({median:.0f}) in steps of {_STEP}{how}"
    return depth


def _measure_volumes(
    scans: Sequence[Scan], read: Callable[[Scan], AnyArray], config: PlanConfig, axis: Axis
) -> dict[str, Any]:
    lows, highs, sides, counts, gaps = [], [], [], [], []
    for number, scan in enumerate(scans, 1):
        assert scan.affine is not None
        volume, spacing = oriented(np.asarray(read(scan)), scan.affine, axis)
        low, high = np.percentile(thinned(volume, scan), config.percentiles)
        lows.append(float(low))
        highs.append(float(high))
        extent = max(volume.shape[1] * spacing[1], volume.shape[2] * spacing[2])
        sides.append(round(extent / min(spacing[1:])))
        counts.append(volume.shape[0])
        gaps.append(spacing[0])
        advance("planning", number, len(scans))
    return {
        **_facts(scans, lows, highs, sides),
        "colour": 0,
        "bits": max(scan.bits for scan in scans),
        "median_slices": float(np.median(counts)),
        "most_slices": max(counts),
        "spacing_mm": round(float(np.median(gaps)), 4),
    }


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
    return {
        **_facts(scans, lows, highs, sides),
        "colour": sum(scan.channels == 3 for scan in scans),
        "bits": 8 if all(scan.dtype.endswith("u1") for scan in scans) else max(9, *(scan.bits for scan in scans)),
    }


def _facts(
    scans: Sequence[Scan], lows: Sequence[float], highs: Sequence[float], sides: Sequence[int]
) -> dict[str, Any]:
    spread = np.subtract(highs, lows)
    variation = float(np.std(spread)) / max(float(np.mean(spread)), 1e-9)
    return {
        "images": len(scans),
        "median_side": float(np.median(sides)),
        "largest_side": int(max(sides)),
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
    eight = facts["bits"] == 8 and "median_slices" not in facts  # a volume's type says nothing of its values
    if choice == "auto":
        if eight:
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
    if eight:
        return "fixed", 0.0, 255.0
    return "fixed", facts["low"], max(facts["high"], facts["low"] + 1.0)
