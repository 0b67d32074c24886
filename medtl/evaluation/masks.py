"""Masks of whole studies, measured: each structure of each study, then all of them with intervals over patients.

A mask comes as codes, one of each voxel: 0 is background, k the k-th structure (of structures that share voxels, bit
k - 1), and 255 in the true mask says that a voxel does not count. It is then background in both masks, on either side.

Lesions are the pieces of a structure that touch by a face, an edge or a corner. One is found if a predicted piece
overlaps it with at least ``lesion_iou``; pairs are taken from the largest overlap down, and each piece is in one pair
at most. Sensitivity and precision are shares of all lesions of all studies, because a study without any has neither.
Source: Maier-Hein et al., Metrics reloaded, Nature Methods 21 (2024); Kofler et al., arXiv 2312.02608 (2023).

The AUROC of pixels is the chance that a pixel of the structure has a higher probability than one that is not, ties one
half. Of several images together it is made of the counts of every image's pixels against every other's, so that drawn
images need no second sorting and the interval is exact too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.stats import rankdata, spearmanr, wilcoxon
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import Ridge

from medtl.config import EvaluationConfig, MasksConfig, UncertaintyConfig
from medtl.errors import SplitError
from medtl.evaluation.bounds import RATIO, SHARE, Scale
from medtl.evaluation.comparison import judge
from medtl.evaluation.folds import patient_folds
from medtl.evaluation.overlap import MASK_METRICS, BoolArray, Overlap, Pair, overlap_of, pairs, summary
from medtl.evaluation.questions import Question, answers, basis_of, measured, share
from medtl.evaluation.surfaces import Surfaces, surfaces_of
from medtl.evaluation.uncertainty import difference_of, estimate, score_of
from medtl.records import (
    Comparison,
    ComponentChoice,
    Evaluation,
    FloatArray,
    FoldScores,
    IntArray,
    MaskQuality,
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
FEWEST_FOR_QUALITY = 10  # patients
_LESIONS = ("lesions", "predicted_lesions", "lesions_found")
_QUALITY_FOLDS = 5
_CLEARLY = 1e-6  # of a mean Dice
_RIDGE = 1.0


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
        pixels: ranked pixels of each image, by structure, where their AUROC is wanted.

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
    pixels: Mapping[str, Sequence[PixelRanks]] | None = None,
) -> Evaluation:
    """Assess the test parts of several folds together; each study was segmented by a model that saw nobody of it.

    Raises:
        SplitError: a patient is tested in two folds, or nothing was measured.
        ValueError: as of :func:`assess_masks`.
    """
    tested = [patient for results in folds.values() for patient in {one.patient for one in results}]
    twice = len(tested) - len(set(tested))
    if twice:
        raise SplitError(f"{twice} patients are tested in two folds. Split by patient.")
    found = assess_masks([one for results in folds.values() for one in results], config, seed, unit, pixels)
    parts = tuple(_fold(name, results) for name, results in folds.items() if results)
    note = f"{len(parts)} folds, each tested by a model of its own; the intervals do not hold the luck of training."
    return replace(found, folds=parts, notes=(note, *found.notes))


def _fold(name: str, results: Sequence[MaskResult]) -> FoldScores:
    table = _table(results)
    values = {
        metric: _mean_of_known([_mean_of_known([one.values.get(metric) for one in rows]) for rows in table.values()])
        for metric in MASK_METRICS
    }
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


@dataclass(frozen=True, slots=True)
class PixelRanks:
    """The probabilities of one image's pixels of a structure and of all others, each ascending."""

    study_id: str
    patient: str
    inside: FloatArray
    outside: FloatArray


def pixel_ranks(
    study_id: str, patient: str, probability: FloatArray, truth: BoolArray, counts: BoolArray | None = None
) -> PixelRanks:
    """Sort the pixels of one image that count.

    Args:
        probability: of the structure, of any shape.
        truth: where the structure is, of the same shape.
        counts: which pixels count, as those in a field of view; all if not said.

    Raises:
        ValueError: other shapes, or a probability that is not a number.
    """
    counts = np.ones(truth.shape, dtype=np.bool_) if counts is None else counts
    if not probability.shape == truth.shape == counts.shape:
        raise ValueError("pixels: probability, truth and what counts are of one shape")
    if not np.isfinite(probability[counts]).all():
        raise ValueError("pixels: a probability is not a number")
    return PixelRanks(
        study_id, patient, *(np.sort(probability[counts & side].astype(np.float32)) for side in (truth, ~truth))
    )


def pixel_auroc(probability: FloatArray, truth: BoolArray, counts: BoolArray | None = None) -> float | None:
    """Give the exact AUROC of pixels, ties one half; ``None`` where a kind is missing.

    Args and errors are those of :func:`pixel_ranks`.
    """
    ranks = pixel_ranks("", "", probability, truth, counts)
    pairs_in_all = len(ranks.inside) * len(ranks.outside)
    return _ahead(ranks.inside, ranks.outside) / pairs_in_all if pairs_in_all else None


def pixel_scores(label: str, images: Sequence[PixelRanks], config: UncertaintyConfig, seed: int) -> tuple[Score, ...]:
    """Give the AUROC of pixels of all images together and its mean over images, with intervals over patients.

    Args:
        label: the structure.
    """
    ids, people = [one.study_id for one in images], [one.patient for one in images]
    sizes = np.array([[len(one.inside), len(one.outside)] for one in images], dtype=np.float64).reshape(-1, 2)
    whole = sizes.prod(1) > 0
    if not whole.any():
        note = "not estimable: no image has pixels inside and outside the structure"
        counts = len(images), len(set(people))
        return tuple(
            Score(name, label, None, None, None, *counts, note) for name in ("pixel_auroc", "mean_pixel_auroc")
        )
    ahead = np.array([[_ahead(one.inside, other.outside) for other in images] for one in images])
    pooled = Question(partial(_pooled_auroc, ahead, sizes), basis_of(people, config.level))
    (found,) = answers([pooled], ids, people, config, seed)
    each = ahead.diagonal()[whole] / sizes[whole].prod(1)
    (some, who) = ([name for name, is_whole in zip(names, whole, strict=True) if is_whole] for names in (ids, people))
    mean = share("mean_pixel_auroc", label, each, some, who, config, seed)
    lacking = (
        f"{len(images) - len(each)} of {len(images)} images left out: a kind is missing" if not whole.all() else ""
    )
    return (
        score_of("pixel_auroc", label, found, config.level, people),
        replace(mean, note=_joined(lacking, mean.note)),
    )


def _ahead(inside: FloatArray, outside: FloatArray) -> float:
    """Count the pairs in which the pixel inside is the more probable one, ties one half; both ascending."""
    places = (np.searchsorted(outside, inside, side).sum(dtype=np.int64) for side in ("left", "right"))
    return float(sum(places)) / 2


def _pooled_auroc(ahead: FloatArray, sizes: FloatArray, weights: FloatArray) -> FloatArray:
    """Give the AUROC of all pixels together, each image as often as its weight says, (b,)."""
    inside, outside = (weights @ sizes).T
    return _quotient((weights @ ahead * weights).sum(1), inside * outside)


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
    known = np.isfinite(whole) & np.isfinite(largest)
    studies = int(known.sum())
    if not studies:
        reason = "as the configuration says" if asked != "auto" else "no validation study shows the structure"
        return ComponentChoice(name, "all" if asked == "auto" else asked, reason, None, None, 0)
    every, one = float(whole[known].mean()), float(largest[known].mean())
    if asked != "auto":
        return ComponentChoice(name, asked, "as the configuration says", every, one, studies)
    keep: Literal["all", "largest"] = "largest" if one > every + _CLEARLY else "all"
    of = f"of {studies} validation studies: {one:.4f} with the largest part alone, {every:.4f} with all parts"
    return ComponentChoice(name, keep, f"the better mean Dice {of}", every, one, studies)


def fit_quality(
    doubts: Sequence[Mapping[str, float | None]],
    dice: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: MasksConfig,
    seed: int,
) -> MaskQuality:
    """Learn on validation to foretell a study's Dice from numbers of uncertainty.

    Of a line through all numbers (ridge) and a staircase along the most telling one (isotonic) the one with the smaller
    error, cross-validated by patient, stays; none, if foretelling everybody the mean is as good.

    Args:
        doubts: numbers of uncertainty of each validation study, by name; None where unknown.
        dice: (n,), a study's mean over structures; NaN where not estimable.
    """
    features = _often_known(doubts)
    numbers = _numbers(doubts, features)
    known = np.isfinite(numbers).all(1) & np.isfinite(dice)
    x, y = numbers[known], dice[known]
    ids, people = ([name for name, there in zip(names, known, strict=True) if there] for names in (study_ids, patients))
    empty = MaskQuality("none", "", features, config.fail_below, studies=len(ids), patients=len(set(people)))
    if empty.patients < FEWEST_FOR_QUALITY or not x.shape[1]:
        return replace(empty, reason=f"validation has {empty.patients} patients; {FEWEST_FOR_QUALITY} are needed")
    folds = patient_folds(ids, people, np.zeros(len(ids), dtype=np.int64), _QUALITY_FOLDS, seed)
    foretold = {method: _crossed(method, x, y, folds, empty) for method in ("none", "linear", "isotonic")}
    errors = {method: float(np.abs(values - y).mean()) for method, values in foretold.items()}
    best = min(errors, key=lambda method: errors[method])
    judged = _judged(foretold[best], y, empty)
    judged = replace(judged, error=errors[best], error_of_the_mean=errors["none"])
    if best == "none":
        reason = f"no number of uncertainty foretells the Dice better than its mean does (error {errors['none']:.3f})"
        return replace(judged, reason=reason)
    reason = f"error {errors[best]:.3f} on patients kept aside, {errors['none']:.3f} by the mean alone"
    return replace(_fitted(best, x, y, judged), reason=reason)


def foretell(quality: MaskQuality, doubts: Sequence[Mapping[str, float | None]]) -> FloatArray:
    """Foretell the Dice of studies, (n,); NaN where there is no rule, or a number is unknown.

    Args:
        doubts: numbers of uncertainty of each study, by the names that :func:`fit_quality` learned from.
    """
    numbers = _numbers(doubts, quality.features)
    known = np.isfinite(numbers).all(1)
    found = np.full(len(numbers), np.nan)
    if quality.method != "none" and known.any():
        found[known] = _applied(quality, numbers[known])
    return found


def _numbers(doubts: Sequence[Mapping[str, float | None]], features: Sequence[str]) -> FloatArray:
    """Lay the numbers of each study in a row, NaN where unknown."""
    rows = [[np.nan if (value := one.get(name)) is None else value for name in features] for one in doubts]
    return np.array(rows, dtype=np.float64).reshape(len(doubts), len(features))


def _often_known(doubts: Sequence[Mapping[str, float | None]]) -> tuple[str, ...]:
    """Name the numbers that at least half of the studies have, so that one that nobody has costs no study."""
    names = sorted({name for one in doubts for name in one})
    return tuple(name for name in names if 2 * np.isfinite(_numbers(doubts, (name,))).sum() >= len(doubts))


def quality_scores(
    quality: MaskQuality,
    foretold: FloatArray,
    dice: FloatArray,
    study_ids: Sequence[str],
    patients: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> tuple[Score, ...]:
    """Measure on the test part how far foretold Dice is off, which share is flagged, and which share of failures."""
    known = np.isfinite(foretold) & np.isfinite(dice)
    flagged, failed = foretold < quality.fail_below, dice < quality.fail_below
    asked: tuple[tuple[str, FloatArray, BoolArray], ...] = (
        ("dice_foretold_error", np.abs(foretold - dice), known),
        ("flagged", flagged.astype(np.float64), known),
        ("failures_flagged", flagged.astype(np.float64), known & failed),
    )
    found = []
    for metric, values, who in asked:
        ids, people = (
            [name for name, there in zip(names, who, strict=True) if there] for names in (study_ids, patients)
        )
        found.append(share(metric, "all", values[who], ids, people, config, seed))
    return tuple(found)


def _crossed(method: str, x: FloatArray, y: FloatArray, folds: IntArray, empty: MaskQuality) -> FloatArray:
    """Foretell each study by what was learned from the patients of the other folds."""
    found = np.empty(len(y))
    for fold in np.unique(folds):
        out = folds == fold
        rule = _fitted(method, x[~out], y[~out], empty)
        found[out] = y[~out].mean() if method == "none" else _applied(rule, x[out])
    return found


def _fitted(method: str, x: FloatArray, y: FloatArray, quality: MaskQuality) -> MaskQuality:
    if method == "linear":
        mean, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
        line = Ridge(alpha=_RIDGE).fit((x - mean) / scale, y)
        weights, middle, width = (tuple(map(float, part)) for part in (line.coef_, mean, scale))
        return replace(
            quality, method="linear", weights=weights, mean=middle, scale=width, intercept=float(line.intercept_)
        )
    if method == "isotonic":
        telling = [_rank_correlation(column, y) or 0.0 for column in x.T]
        feature = int(np.argmax(np.abs(telling)))
        stairs = IsotonicRegression(increasing=telling[feature] >= 0).fit(x[:, feature], y)
        knots = tuple(zip(map(float, stairs.X_thresholds_), map(float, stairs.y_thresholds_), strict=True))
        return replace(quality, method="isotonic", feature=feature, knots=knots)
    return quality


def _applied(quality: MaskQuality, x: FloatArray) -> FloatArray:
    if quality.method == "linear":
        z = (x - np.array(quality.mean)) / np.array(quality.scale)
        line: FloatArray = np.clip(z @ np.array(quality.weights) + (quality.intercept or 0.0), 0.0, 1.0)
        return line
    assert quality.feature is not None
    places, values = np.array(quality.knots).T
    return np.asarray(np.interp(x[:, quality.feature], places, values))


def _judged(foretold: FloatArray, dice: FloatArray, quality: MaskQuality) -> MaskQuality:
    failed, flagged = dice < quality.fail_below, foretold < quality.fail_below
    return replace(
        quality,
        rank_correlation=_rank_correlation(foretold, dice),
        failures=int(failed.sum()),
        failures_flagged=int((failed & flagged).sum()),
        flagged=int(flagged.sum()),
    )


def _rank_correlation(one: FloatArray, other: FloatArray) -> float | None:
    """Give Spearman's correlation; ``None`` where one of the two is constant."""
    if len(one) < 3 or np.ptp(rankdata(one)) == 0 or np.ptp(rankdata(other)) == 0:
        return None
    return float(spearmanr(one, other).statistic)
