"""Masks of whole studies, measured: each structure of each study, then all of them with intervals over patients.

A mask comes as codes, one of each voxel: 0 is background, k the k-th structure (of structures that share voxels, bit
k - 1), and 255 in the true mask says that a voxel does not count. It is then background in both masks, on either side.

Lesions are the pieces of a structure that touch by a face, an edge or a corner. One is found if a predicted piece
overlaps it with at least ``lesion_iou``; pairs are taken from the largest overlap down, and each piece is in one pair
at most. Sensitivity and precision are shares of all lesions of all studies, because a study without any has neither.
Source: Maier-Hein et al., Metrics reloaded, Nature Methods 21 (2024); Kofler et al., arXiv 2312.02608 (2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.stats import wilcoxon

from medtl.config import EvaluationConfig, MasksConfig, UncertaintyConfig
from medtl.errors import SplitError
from medtl.evaluation.bounds import RATIO, SHARE, Scale
from medtl.evaluation.comparison import judge
from medtl.evaluation.overlap import MASK_METRICS, BoolArray, Overlap, Pair, overlap_of, pairs, summary
from medtl.evaluation.pixels import PixelRanks, pixel_scores, pooled_auroc
from medtl.evaluation.questions import Question, answers, basis_of, measured
from medtl.evaluation.surfaces import Surfaces, surfaces_of
from medtl.evaluation.uncertainty import difference_of, estimate, score_of
from medtl.records import (
    Comparison,
    ComponentChoice,
    Evaluation,
    FloatArray,
    FoldScores,
    MaskResult,
    PairedTest,
    Score,
    Structure,
)

CodeArray = npt.NDArray[np.uint8]
Unit = Literal["mm", "pixels"]
NOT_COUNTED = 255
MOST_STRUCTURES, MOST_REGIONS = 254, 7
FEW_PATIENTS = 30
_LESIONS = ("lesions", "predicted_lesions", "lesions_found")
_CLEARLY = 1e-6  # of a mean Dice


def measure_case(
    study_id: str,
    patient: str,
    truth: CodeArray,
    predicted: CodeArray,
    spacing_mm: Sequence[float],
    structures: Sequence[Structure],
    overlapping: bool,
    config: MasksConfig,
) -> tuple[MaskResult, ...]:
    """Measure every structure of one study.

    Args:
        truth: codes, 2-D or 3-D; 255 does not count.
        predicted: codes, of the same shape.
        spacing_mm: of the voxels along each axis of the arrays; 1 where it is not known, and all is in pixels.

    Returns:
        One result for each structure, in order. In 2-D its volumes are areas, in thousands of mm² or pixels.

    Raises:
        ValueError: other types, shapes or codes, or a spacing that is not positive along each axis.
    """
    if len(spacing_mm) != truth.ndim or not all(0 < size < np.inf for size in spacing_mm):
        raise ValueError(f"a spacing of {truth.ndim} positive numbers of mm is wanted, not {tuple(spacing_mm)}")
    cut = _pairs_of(truth, predicted, len(structures), overlapping)
    return tuple(
        _measured(study_id, patient, one.name, pair, spacing_mm, config)
        for one, pair in zip(structures, cut, strict=True)
    )


def dice_of_codes(
    truth: CodeArray, predicted: CodeArray, structures: Sequence[Structure], overlapping: bool
) -> FloatArray:
    """Give the Dice of each structure, (structures,); NaN where both masks are empty.

    Args and errors are those of :func:`measure_case`.
    """
    cut = _pairs_of(truth, predicted, len(structures), overlapping)
    found = [overlap_of(pair, (1.0,) * truth.ndim).dice for pair in cut]
    return np.array([np.nan if dice is None else dice for dice in found])


def _pairs_of(truth: CodeArray, predicted: CodeArray, structures: int, overlapping: bool) -> list[Pair]:
    """Cut both masks to each structure, with what does not count made background in both."""
    if truth.shape != predicted.shape or truth.ndim not in (2, 3):
        raise ValueError(f"masks of shapes {truth.shape} and {predicted.shape}: two equal ones, 2-D or 3-D, are wanted")
    if truth.dtype != np.uint8 or predicted.dtype != np.uint8:
        raise ValueError(f"masks of {truth.dtype} and {predicted.dtype}: codes of uint8 are wanted")
    if not 1 <= structures <= (MOST_REGIONS if overlapping else MOST_STRUCTURES):
        raise ValueError(f"{structures} structures: 1 to {MOST_STRUCTURES}, overlapping {MOST_REGIONS}, have codes")
    left = truth == NOT_COUNTED
    if left.any():
        truth, predicted = (np.where(left, np.uint8(0), mask) for mask in (truth, predicted))
    highest = (1 << structures) - 1 if overlapping else structures
    if max(truth.max(initial=0), predicted.max(initial=0)) > highest:
        raise ValueError(f"a mask holds a code above {highest}, that of the last structure")
    if not overlapping:
        return list(pairs(truth, predicted, range(1, structures + 1)))
    bits = [[(mask >> np.uint8(k)) & np.uint8(1) == 1 for mask in (truth, predicted)] for k in range(structures)]
    return [replace(next(pairs(one, other)), label=k) for k, (one, other) in enumerate(bits, 1)]


def _measured(
    study_id: str, patient: str, name: str, pair: Pair, spacing_mm: Sequence[float], config: MasksConfig
) -> MaskResult:
    shared = overlap_of(pair, spacing_mm, config.empty)
    apart = surfaces_of(pair, spacing_mm, config.tolerance_mm, config.convention, config.empty)
    values = {metric: _value(shared, apart, metric) for metric in MASK_METRICS}
    if config.lesions:
        values |= dict(
            zip(_LESIONS, map(float, lesions_of(pair.truth, pair.predicted, config.lesion_iou)), strict=True)
        )
    volumes = shared.truth_mm3 / 1000, shared.predicted_mm3 / 1000
    return MaskResult(study_id, patient, name, *volumes, values, apart.note)


def _value(shared: Overlap, apart: Surfaces, metric: str) -> float | None:
    found: float | None = getattr(shared if hasattr(shared, metric) else apart, metric)
    return found


def lesions_of(truth: BoolArray, predicted: BoolArray, least_iou: float) -> tuple[int, int, int]:
    """Count true lesions, predicted ones, and those of both that were paired."""
    touching = np.ones((3,) * truth.ndim)
    (one, ones), (other, others) = (ndimage.label(mask, touching) for mask in (truth, predicted))
    if not ones or not others:
        return int(ones), int(others), 0
    both = truth & predicted
    joint, shared = np.unique(one[both].astype(np.int64) * (others + 1) + other[both], return_counts=True)
    first, second = np.divmod(joint, others + 1)
    sizes = np.bincount(one.ravel())[first] + np.bincount(other.ravel())[second]
    iou = shared / (sizes - shared)
    free, free_too, found = np.ones(ones + 1, bool), np.ones(others + 1, bool), 0
    for row in np.argsort(-iou, kind="stable"):
        if iou[row] >= least_iou and free[first[row]] and free_too[second[row]]:
            free[first[row]] = free_too[second[row]] = False
            found += 1
    return int(ones), int(others), found


def assess_masks(
    results: Sequence[MaskResult],
    config: EvaluationConfig,
    seed: int,
    unit: Unit = "mm",
    pixels: Mapping[str, Sequence[PixelRanks]] | None = None,
) -> Evaluation:
    """Give every metric of all studies: of each structure, and the mean over structures within a study (macro).

    Means come under the metric's own name, medians as ``median_dice`` and so on, each with its interval over patients.

    Args:
        results: of every structure of every study; the structures are reported in their order.
        unit: what distances are really in: of pictures, pixels.
        pixels: counted pixels of each image, by structure, where their AUROC is wanted.

    Raises:
        SplitError: nothing was measured.
        ValueError: a study lacks a structure, has one twice, or is of two patients.
    """
    table = _table(results)
    names, people = list(table), [rows[0].patient for rows in table.values()]
    structures = tuple(one.structure for one in next(iter(table.values())))
    scores: list[Score] = []
    for metric in MASK_METRICS:
        values = [[one.values.get(metric) for one in rows] for rows in table.values()]
        columns = dict(zip(structures, zip(*values, strict=True), strict=True))
        for label, column in columns.items():
            scores += _mean_and_median(metric, column, names, people, config.uncertainty, seed, label)
        within = [_mean_of_known(row) for row in values]
        left = sum(value is None for row in values for value in row)
        note = (
            f"{left} of {len(values) * len(structures)} values of structures not estimable, and left out"
            if left
            else ""
        )
        both = _mean_and_median(metric, within, names, people, config.uncertainty, seed, "macro")
        scores += [one if one.value is None else replace(one, note=_joined(note, *_own(one))) for one in both]
    if any(_LESIONS[0] in one.values for one in results):
        scores += _lesion_scores(table, structures, config.uncertainty, seed)
    for label, ranks in (pixels or {}).items():
        scores += pixel_scores(label, ranks, config.uncertainty, seed)
    return Evaluation(
        task="multilabel",
        classes=structures,
        scores=tuple(scores),
        operating_points=(),
        curves=(),
        confusion=_shown_or_not(table, len(structures)),
        n=len(names),
        patients=len(set(people)),
        resamples=config.uncertainty.resamples,
        notes=(*conventions(config.masks, unit), *_notes(table, structures)),
    )


def pool_masks(
    folds: Mapping[str, Sequence[MaskResult]],
    config: EvaluationConfig,
    seed: int,
    unit: Unit = "mm",
    pixels: Mapping[str, Mapping[str, Sequence[PixelRanks]]] | None = None,
) -> Evaluation:
    """Assess the test parts of several folds together; each study was segmented by a model that saw nobody of it.

    Args:
        folds: what each fold's test part gave, by the fold's name.
        pixels: counted pixels of each image, by fold and structure, where their AUROC is wanted.

    Raises:
        SplitError: a patient is tested in two folds, or nothing was measured.
        ValueError: as of :func:`assess_masks`.
    """
    tested = [patient for results in folds.values() for patient in {one.patient for one in results}]
    twice = len(tested) - len(set(tested))
    if twice:
        raise SplitError(f"{twice} patients are tested in two folds. Split by patient.")
    pixels = pixels or {}
    joined: dict[str, list[PixelRanks]] = {}
    for of_fold in pixels.values():
        for label, images in of_fold.items():
            joined.setdefault(label, []).extend(images)
    found = assess_masks([one for results in folds.values() for one in results], config, seed, unit, joined)
    parts = tuple(_fold(name, results, pixels.get(name, {})) for name, results in folds.items() if results)
    note = f"{len(parts)} folds, each tested by a model of its own; the intervals do not hold the luck of training."
    return replace(found, folds=parts, notes=(note, *found.notes))


def _fold(name: str, results: Sequence[MaskResult], pixels: Mapping[str, Sequence[PixelRanks]]) -> FoldScores:
    table = _table(results)
    values = {
        metric: _mean_of_known([_mean_of_known([one.values.get(metric) for one in rows]) for rows in table.values()])
        for metric in MASK_METRICS
    }
    if pixels:
        values["pixel_auroc"] = _mean_of_known([pooled_auroc(images) for images in pixels.values()])
    return FoldScores(name, 0, len(table), len({one.patient for one in results}), values)


def compare_masks(
    model: Sequence[MaskResult],
    reference: Sequence[MaskResult],
    names: tuple[str, str],
    config: EvaluationConfig,
    seed: int,
    metric: str = "dice",
) -> Comparison:
    """Give the difference of a metric's mean between two models, over the studies where both have a value.

    Beside it stands the signed-rank test of the patients' differences. Source: Wilcoxon, Biometrics Bulletin 1 (1945).

    Args:
        names: of the model and of the reference.
        metric: a key of ``MASK_METRICS``.

    Raises:
        KeyError: there is no such metric.
        ValueError: the two did not segment the same structures of the same studies.
    """
    row, tables = MASK_METRICS[metric], (_table(model), _table(reference))
    if set(tables[0]) != set(tables[1]) or {_key(one) for one in model} != {_key(one) for one in reference}:
        raise ValueError("the two models must have segmented the same structures of the same studies")
    ids, people, ones, others = _paired(*tables, metric)
    counts, level = (len(ids), len(set(people))), config.uncertainty.level
    label = f"{metric} difference"
    if not ids:
        lacking = Score(label, "macro", None, None, None, *counts, "not estimable: no study has both values")
        return Comparison(metric, *names, lacking, replace(lacking, metric=metric), (), config.margin, None)
    of = partial(_means, np.array([ones, others]))
    values, draws, without = measured(of, ids, people, config.uncertainty, seed)
    basis, method = basis_of(people, level), config.uncertainty.method
    found = [
        estimate(float(value), some, rest, level, basis, row.scale, method)
        for value, some, rest in zip(values, draws, without, strict=True)
    ]
    difference = score_of(label, "macro", difference_of(found[0], found[1], level), level, people)
    reference_score = score_of(metric, "macro", found[1], level, people)
    tests = (_signed_ranks(np.subtract(ones, others), people),)
    verdict = judge(difference, config.margin, row.higher_is_better)
    return Comparison(metric, *names, difference, reference_score, tests, config.margin, verdict)


def _key(one: MaskResult) -> tuple[str, str, str]:
    return one.study_id, one.patient, one.structure


def _paired(
    one: Mapping[str, Sequence[MaskResult]], other: Mapping[str, Sequence[MaskResult]], metric: str
) -> tuple[list[str], list[str], list[float], list[float]]:
    """Give the studies, their patients and both values, over the structures for which both models have one."""
    ids, people, ones, others = [], [], [], []
    for study_id, rows in one.items():
        second = {result.structure: result.values.get(metric) for result in other[study_id]}
        both = [
            (a, b) for r in rows if (a := r.values.get(metric)) is not None and (b := second[r.structure]) is not None
        ]
        if both:
            ids.append(study_id)
            people.append(rows[0].patient)
            ones.append(float(np.mean([a for a, _ in both])))
            others.append(float(np.mean([b for _, b in both])))
    return ids, people, ones, others


def _signed_ranks(differences: FloatArray, people: Sequence[str]) -> PairedTest:
    name = "Wilcoxon signed-rank, over patients"
    of = {
        person: [d for d, p in zip(differences, people, strict=True) if p == person] for person in dict.fromkeys(people)
    }
    means = np.array([np.mean(some) for some in of.values()])
    if len(means) < 2 or not np.any(means):
        return PairedTest(name, None, None, "not estimable: fewer than two patients, or none differs")
    found = wilcoxon(means)
    return PairedTest(name, float(found.statistic), float(found.pvalue))


def _table(results: Sequence[MaskResult]) -> dict[str, list[MaskResult]]:
    """Lay results out by study, structures in one order."""
    if not results:
        raise SplitError("No mask was measured. Give the test part at least one study.")
    order = {name: place for place, name in enumerate(dict.fromkeys(one.structure for one in results))}
    table: dict[str, list[MaskResult]] = {}
    for one in results:
        table.setdefault(one.study_id, []).append(one)
    for rows in table.values():
        rows.sort(key=lambda one: order[one.structure])
        if [one.structure for one in rows] != list(order):
            raise ValueError("masks: every study has one result for each structure")
        if len({one.patient for one in rows}) > 1:
            raise ValueError("masks: a study is of one patient")
    return table


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _mean_and_median(
    metric: str,
    values: Sequence[float | None],
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
    label: str,
) -> list[Score]:
    found = summary(metric, values, study_ids, patients, config, seed, label)
    return [replace(found.mean, metric=metric), found.median]


def _own(score: Score) -> list[str]:
    """Give a note without what it says of studies, which the mean over structures says of these."""
    return [part for part in score.note.split("; ") if "cases not estimable" not in part]


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _lesion_scores(
    table: Mapping[str, Sequence[MaskResult]], structures: Sequence[str], config: UncertaintyConfig, seed: int
) -> list[Score]:
    """Give what share of all lesions was found, each structure's and all together, and how many were invented."""
    people = [rows[0].patient for rows in table.values()]
    counts = np.array([[[one.values.get(name) or 0.0 for name in _LESIONS] for one in rows] for rows in table.values()])
    scores = []
    for label, some in [(name, counts[:, k]) for k, name in enumerate(structures)] + [("all", counts.sum(1))]:
        true, called, found = some.T
        asked = (
            ("lesion_sensitivity", found, true, SHARE),
            ("lesion_precision", found, called, SHARE),
            ("lesion_f1", 2 * found, true + called, SHARE),
            ("false_lesions_per_study", called - found, np.ones(len(true)), RATIO),
        )
        questions = [_ratio(above, below, people, scale, config.level) for _, above, below, scale in asked]
        answered = answers(questions, list(table), people, config, seed)
        for (metric, _, _, _), one in zip(asked, answered, strict=True):
            scores.append(score_of(metric, label, one, config.level, people))
    return scores


def _ratio(above: FloatArray, below: FloatArray, people: Sequence[str], scale: Scale, level: float) -> Question:
    who = [person for person, weight in zip(people, below, strict=True) if weight]
    unknown = "" if who else "no study has such a lesion"
    return Question(
        partial(_ratio_of_sums, above, below), basis_of(who, level), scale, unknown=unknown, estimable=bool(who)
    )


def _ratio_of_sums(above: FloatArray, below: FloatArray, weights: FloatArray) -> FloatArray:
    return _quotient(weights @ above, weights @ below)


def _quotient(above: FloatArray, below: FloatArray) -> FloatArray:
    """Divide, and give NaN where there is nothing to divide by."""
    ratio: FloatArray = np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)
    return ratio


def _means(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Give the mean of each row of values under each row of weights, (values, b)."""
    return _quotient(values @ weights.T, weights.sum(1))


def _shown_or_not(table: Mapping[str, Sequence[MaskResult]], structures: int) -> tuple[tuple[int, ...], ...]:
    """Count for each structure the studies whose masks show it: rows truth, columns prediction, absent first."""
    counts = np.zeros((structures, 2, 2), dtype=int)
    for rows in table.values():
        for place, one in enumerate(rows):
            counts[place, int(one.truth_ml > 0), int(one.predicted_ml > 0)] += 1
    return tuple(tuple(int(cell) for cell in row) for two in counts for row in two)


def conventions(config: MasksConfig, unit: Unit = "mm") -> tuple[str, ...]:
    """Say by which conventions masks are measured, because each of them moves the figures."""
    empty = {
        "unknown": "where both are empty there is no value, and the study is left out of the mean",
        "agree": "where both are empty they agree perfectly (Dice and NSD 1, distances 0)",
    }[config.empty]
    surface = {
        "surfels": "pieces of surface between voxels, weighed by their area (Nikolov et al. 2018)",
        "voxels": "voxels with a neighbour outside, each counting as one",
    }[config.convention]
    said = [
        f"Empty masks: where one of the two is empty, Dice, IoU and NSD are 0 and distances have no value; {empty}.",
        f"NSD: share of both surfaces that lies within {config.tolerance_mm:g} {unit} of the other. Surfaces are "
        f"{surface}; HD95 is of the worse direction, ASSD of both surfaces together.",
        "The mean over structures (macro) is taken within a study first, over the structures that have a value.",
    ]
    if unit == "pixels":
        said.append("The images have no spacing: what is named mm is pixels, and volumes are areas.")
    if config.lesions:
        said.append(
            "Lesions are pieces that touch by a face, edge or corner; one is found if a predicted piece overlaps it "
            f"with an IoU of at least {config.lesion_iou:g}, each piece in one pair at most; shares are of all lesions."
        )
    return tuple(said)


def _notes(table: Mapping[str, Sequence[MaskResult]], structures: Sequence[str]) -> list[str]:
    notes, patients = [], len({rows[0].patient for rows in table.values()})
    if patients < FEW_PATIENTS:
        notes.append(f"The test part holds {patients} patients only; intervals from so few are wide and rough.")
    shown = {one.structure for rows in table.values() for one in rows if one.truth_ml > 0}
    absent = [name for name in structures if name not in shown]
    if absent:
        notes.append(f"No true mask of the test part shows {', '.join(absent)}.")
    return notes


def telling_masks(results: Sequence[MaskResult], worst: int = 4, best: int = 2) -> tuple[str, ...]:
    """Choose the studies worth a look, no patient twice: those of the lowest mean Dice first, then of the highest.

    Returns:
        Study identifiers, ascending in Dice.
    """
    table = _table(results)
    dice = {study: _mean_of_known([one.values.get("dice") for one in rows]) for study, rows in table.items()}
    ordered = sorted((value, study) for study, value in dice.items() if value is not None)
    shown: dict[str, str] = {}  # by patient
    for some, most in ((ordered, worst), (ordered[::-1], worst + best)):
        for _, study in some:
            if len(shown) < most:
                shown.setdefault(table[study][0].patient, study)
    return tuple(study for _, study in ordered if study in shown.values())


def choose_components(
    dice_all: FloatArray, dice_largest: FloatArray, structures: Sequence[str], config: MasksConfig
) -> tuple[ComponentChoice, ...]:
    """Choose for each structure whether all its parts are kept or the largest alone, by the mean Dice on validation.

    Args:
        dice_all: (validation studies, structures), NaN where not estimable; of masks as predicted.
        dice_largest: the same, of masks of which the largest part alone is left.
    """
    return tuple(
        _component_choice(name, dice_all[:, place], dice_largest[:, place], config.components)
        for place, name in enumerate(structures)
    )


def _component_choice(
    name: str, whole: FloatArray, largest: FloatArray, asked: Literal["auto", "all", "largest"]
) -> ComponentChoice:
    every, one, studies = _means_of_both(whole, largest)
    keep: Literal["all", "largest"] = "all" if asked == "auto" else asked
    if asked == "auto" and _is_better(one, every):
        keep = "largest"
    reason = _reason(asked == "auto", every, one, studies, "with all parts", "with the largest part alone")
    return ComponentChoice(name, keep, reason, every, one, studies)


def choose_holes(
    choices: Sequence[ComponentChoice], dice_open: FloatArray, dice_filled: FloatArray, config: MasksConfig
) -> tuple[ComponentChoice, ...]:
    """Choose for each structure whether its holes are filled, by the mean Dice on validation.

    Args:
        choices: what is kept of each structure's parts.
        dice_open: (validation studies, structures), NaN where not estimable; of masks of which that is kept.
        dice_filled: the same, of these masks with the holes of all structures filled.
    """
    return tuple(
        _hole_choice(choice, dice_open[:, place], dice_filled[:, place], config.holes)
        for place, choice in enumerate(choices)
    )


def _hole_choice(
    choice: ComponentChoice, left: FloatArray, filled: FloatArray, asked: Literal["auto", "keep", "fill"]
) -> ComponentChoice:
    before, after, studies = _means_of_both(left, filled)
    fill = asked == "fill" or (asked == "auto" and _is_better(after, before))
    reason = _reason(asked == "auto", before, after, studies, "with holes left", "with holes filled")
    return replace(choice, fill=fill, fill_reason=reason, dice_open=before, dice_filled=after)


def _means_of_both(one: FloatArray, other: FloatArray) -> tuple[float | None, float | None, int]:
    """Give the two means over the studies that have both values, and how many these are."""
    known = np.isfinite(one) & np.isfinite(other)
    if not known.any():
        return None, None, 0
    return float(one[known].mean()), float(other[known].mean()), int(known.sum())


def _is_better(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one > other + _CLEARLY


def _reason(
    by_validation: bool, plain: float | None, changed: float | None, studies: int, as_is: str, other: str
) -> str:
    if not by_validation:
        return "as the configuration says"
    if not studies:
        return "no validation study shows the structure"
    return f"the better mean Dice of {studies} validation studies: {changed:.4f} {other}, {plain:.4f} {as_is}"
