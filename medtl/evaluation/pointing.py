"""Whether explanations point at what a person marked, more often than a map would that knows nothing.

Two questions of each map. Does its highest place lie in the mark (the pointing game: Zhang et al., Top-down Neural
Attention by Excitation Backprop, ECCV 2016)? Which share of its positive relevance does (Wang et al., Score-CAM, CVPR
Workshops 2020)? Both stand beside chance, which is the share of the image that is marked: a mark over half the image is
hit half the time by anything. Where several places are equally high, as in an occlusion map, a hit counts by the share
of them in the mark. A map without any positive relevance points nowhere: it is a miss, and holds nothing inside.

A mark is a mask, or a box that the label table gives. What a mark is of, its name says: a mask called as a class is a
mark of that class and of no other. Where no mask is called as any class, and a box never is, whatever was drawn counts,
of studies that hold one class only: of several it could be either's.

Intervals are over patients. A high score says that the network looked at the mark, not that it is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.ndimage import distance_transform_edt

from medtl.config import UncertaintyConfig
from medtl.evaluation.metrics import sensitivity
from medtl.evaluation.questions import Question, answers, basis_of
from medtl.evaluation.uncertainty import difference_of, score_of
from medtl.records import AnyArray, FloatArray, PointingFindings, Predictions, Scan, Score, Task

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image, half-open
Mark = Scan | Box
UNNAMED = "no mark is called as a class: whatever was drawn counts as a mark of the class that the study holds"
_NO_STUDY = "not estimable: there is no study with a mark and a map"


@dataclass(frozen=True, slots=True)
class Marked:
    """One study that holds a class, and what was drawn of it."""

    row: int  # of the predictions
    marks: tuple[Mark, ...]


def marked_studies(
    predictions: Predictions, task: Task, classes: Sequence[str], marks: Mapping[str, Sequence[Mark]]
) -> tuple[dict[int, tuple[Marked, ...]], str]:
    """Choose, for each class that was drawn, the studies that hold it and have a mark of it.

    Of two classes the second is asked about, of several and of labels each.

    Args:
        marks: those of a study, by its identifier; a mask's ``region`` is a number and a name, a box has none.

    Returns:
        Numbers of classes with their studies, in the order of the predictions, and a note, where there is one.
    """
    called = {name.strip().casefold(): index for index, name in enumerate(classes)}
    named = any(_name(mark) in called for study_id in predictions.study_ids for mark in marks.get(study_id, ()))
    found: dict[int, list[Marked]] = {}
    for row, (study_id, target) in enumerate(zip(predictions.study_ids, predictions.targets, strict=True)):
        drawn, held = marks.get(study_id, ()), np.flatnonzero(target == 1).tolist()
        for index in held if named or len(held) == 1 else ():
            own = tuple(mark for mark in drawn if not named or called.get(_name(mark)) == index)
            if own and (task != "binary" or index == len(classes) - 1):
                found.setdefault(index, []).append(Marked(row, own))
    return {index: tuple(found[index]) for index in sorted(found)}, "" if named or not found else UNNAMED


def _name(mark: Mark) -> str:
    return ((mark.region or "") if isinstance(mark, Scan) else "").partition(" ")[2].strip().casefold()


def measure_pointing(
    maps: FloatArray,
    marks: AnyArray,
    method: str,
    label: str,
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
    tolerance: float = 0.0,
) -> PointingFindings:
    """Measure hits and relevance inside the marks, with intervals over patients, beside chance.

    Studies without a mark have nothing to point at, and maps with a value that is no number point nowhere that is
    known; both are left out and counted in the notes.

    Args:
        maps: (n, ...), high where the image speaks for the class.
        marks: (n, ...) on the same grid: true, or above 0, inside.
        label: the class that the maps are of; each study should hold it.
        study_ids: (n,) which study each map is of.
        tolerance: pixels by which the highest place may miss the mark.

    Raises:
        ValueError: maps and marks are not on one grid.
    """
    if maps.shape != marks.shape:
        raise ValueError(f"maps of {maps.shape} and marks of {marks.shape} are not on one grid")
    inside = marks > 0
    rest = tuple(range(1, maps.ndim))
    marked, known = inside.any(axis=rest), np.isfinite(maps).all(axis=rest)
    rows = np.flatnonzero(marked & known).tolist()
    maps, inside = maps[rows], inside[rows]
    near = np.stack([within(mark, tolerance) for mark in inside]) if len(rows) else inside
    ask = partial(
        _gain,
        study_ids=[study_ids[row] for row in rows],
        patients=[patients[row] for row in rows],
        label=label,
        config=config,
        seed=seed,
    )
    blank = int((maps <= 0).all(axis=rest).sum())
    said = (
        (int((~marked).sum()), "without a mark: left out"),
        (int((marked & ~known).sum()), "with a map that is not all numbers: left out"),
        (blank, "with a map that shows nothing: counted as misses"),
    )
    return PointingFindings(
        method,
        label,
        tolerance,
        *ask("pointing_hits", hits(maps, near), near.mean(axis=rest)),
        *ask("relevance_inside", relevance_inside(maps, inside), inside.mean(axis=rest)),
        tuple(f"{count} studies {what}" for count, what in said if count),
    )


def hits(maps: FloatArray, inside: AnyArray) -> FloatArray:
    """Tell of each map whether its highest place is inside: 1 or 0, between where several are equally high.

    Args:
        maps: (n, ...).
        inside: (n, ...), true inside.

    Returns:
        (n,); 0 where nothing is above 0.

    Source: Zhang et al., ECCV 2016, section 4.1.
    """
    flat, within_mark = _flat(maps), _flat(inside) > 0
    highest = flat == flat.max(axis=1, keepdims=True, initial=-np.inf)
    share: FloatArray = (highest & within_mark).sum(axis=1) / np.maximum(highest.sum(axis=1), 1)
    found: FloatArray = np.where((flat > 0).any(axis=1), share, 0.0)
    return found


def relevance_inside(maps: FloatArray, inside: AnyArray) -> FloatArray:
    """Give the share of each map's positive relevance that is inside, (n,); 0 where there is none.

    Source: Wang et al., Score-CAM, CVPR Workshops 2020, section 4.3: the energy-based pointing game.
    """
    positive = np.maximum(_flat(maps), 0).astype(np.float64)
    total = positive.sum(axis=1)
    held = (positive * (_flat(inside) > 0)).sum(axis=1)
    share: FloatArray = np.divide(held, total, out=np.zeros(len(maps)), where=total > 0)
    return share


def within(mark: AnyArray, tolerance: float) -> AnyArray:
    """Widen a mark by a distance in pixels.

    Args:
        mark: (...), true inside; an empty one stays empty.
    """
    inside: AnyArray = mark > 0
    if tolerance <= 0 or not inside.any():
        return inside
    wider: AnyArray = distance_transform_edt(~inside) <= tolerance
    return wider


def box(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> AnyArray:
    """Draw a box as a mark: true from ``low`` up to, and without, ``high`` along each axis."""
    mark = np.zeros(tuple(shape), dtype=np.bool_)
    mark[tuple(slice(max(0, start), stop) for start, stop in zip(low, high, strict=True))] = True
    return mark


def box_on(image: Scan, corners: Box) -> AnyArray:
    """Draw a label table's box on an image as a mark, (rows, columns): true where it touches a pixel."""
    x0, y0, x1, y1 = corners
    return box(image.shape[:2], (math.floor(y0), math.floor(x0)), (math.ceil(y1), math.ceil(x1)))


def _flat(maps: AnyArray) -> AnyArray:
    return maps.reshape(len(maps), math.prod(maps.shape[1:]))


def _gain(
    metric: str,
    values: FloatArray,
    chance: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    label: str,
    config: UncertaintyConfig,
    seed: int,
) -> tuple[Score, Score, Score]:
    """Give the mean of values between 0 and 1, that of chance, and their difference on the same drawn patients."""
    names = (metric, f"{metric}_chance", f"{metric}_gain")
    if not len(values):
        one, other, gain = (Score(name, label, None, None, None, 0, 0, _NO_STUDY) for name in names)
        return one, other, gain
    # the mean is the sensitivity where every study is diseased
    ill, basis = np.ones(len(values)), basis_of(patients, config.level)
    questions = [Question(partial(sensitivity, ill, each), basis) for each in (values, chance)]
    found, by_chance = answers(questions, study_ids, patients, config, seed)
    estimates = (found, by_chance, difference_of(found, by_chance, config.level))
    one, other, gain = (
        score_of(name, label, each, config.level, patients) for name, each in zip(names, estimates, strict=True)
    )
    return one, other, gain
