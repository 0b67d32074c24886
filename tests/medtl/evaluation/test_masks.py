"""Masks are measured as the parts they are made of are, nothing is not zero, and what does not count does not count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric, SurfaceDistanceMetric
from scipy import ndimage

from medtl.config import EvaluationConfig, GateConfig, MasksConfig, PromotionConfig, UncertaintyConfig
from medtl.errors import SplitError, StorageError
from medtl.evaluation import io
from medtl.evaluation.masks import (
    assess_masks,
    choose_components,
    choose_holes,
    compare_masks,
    dice_of_codes,
    lesions_of,
    measure_case,
    pool_masks,
    telling_masks,
)
from medtl.evaluation.overlap import MASK_METRICS
from medtl.evaluation.pixels import PixelRanks, pixel_ranks, pooled_auroc
from medtl.evaluation.surfaces import measure
from medtl.records import MaskQuality, MaskResult, Structure
from medtl.registry.promotion import check

Array = np.ndarray[Any, np.dtype[Any]]
SOME = settings(derandomize=True, max_examples=30, deadline=None)
TWO = (Structure("anterior", (1,)), Structure("posterior", (2,)))
FEW = UncertaintyConfig(resamples=200)
CONFIG = EvaluationConfig(uncertainty=FEW)
SPACING = (2.0, 1.0, 0.5)


def codes(seed: int, highest: int = 2, shape: tuple[int, ...] = (6, 7, 8)) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    truth = (ndimage.gaussian_filter(rng.random(shape), 1) * 1e6 % (highest + 1)).astype(np.uint8)
    return truth, np.where(rng.random(shape) < 0.3, rng.integers(0, highest + 1, shape), truth).astype(np.uint8)


def case(truth: Array, predicted: Array, study: str = "s", patient: str = "p", **config: Any) -> tuple[MaskResult, ...]:
    return measure_case(study, patient, truth, predicted, SPACING[: truth.ndim], TWO, False, MasksConfig(**config))


def result(study: int, dice: float | None, structure: str = "a", per_patient: int = 1, **more: float) -> MaskResult:
    values = dict.fromkeys(MASK_METRICS, dice) | more
    return MaskResult(f"s{study:03}", f"p{study // per_patient}", structure, 1.0, 1.0, values)


@SOME
@given(seed=st.integers(0, 9999))
def test_a_structure_is_measured_as_overlap_and_surfaces_measure_it(seed: int) -> None:
    truth, predicted = codes(seed)
    found = case(truth, predicted, tolerance_mm=1.5)
    for one, (shared, apart) in zip(found, measure(truth, predicted, SPACING, 1.5, labels=(1, 2)), strict=True):
        assert (one.values["dice"], one.values["nsd"]) == (shared.dice, apart.nsd)
        assert one.values["hd95_mm"] == apart.hd95_mm
        assert (one.truth_ml, one.predicted_ml) == (shared.truth_mm3 / 1000, shared.predicted_mm3 / 1000)
        assert set(one.values) == set(MASK_METRICS)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
def test_dice_and_assd_are_those_of_monai() -> None:
    import torch

    truth, predicted = codes(5)
    one_hot = [torch.tensor(np.stack([mask == k for k in range(3)]))[None] for mask in (predicted, truth)]
    dice = DiceMetric(include_background=False)(*one_hot)[0].tolist()
    assd = SurfaceDistanceMetric(symmetric=True)(*one_hot, spacing=SPACING)[0].tolist()
    found = case(truth, predicted, convention="voxels")
    assert [one.values["dice"] for one in found] == pytest.approx(dice)
    assert [one.values["assd_mm"] for one in found] == pytest.approx(assd)
    assert dice_of_codes(truth, predicted, TWO, False).tolist() == [one.values["dice"] for one in found]


@SOME
@given(seed=st.integers(0, 9999))
def test_overlapping_structures_are_measured_as_each_of_them_alone(seed: int) -> None:
    truth, predicted = codes(seed, highest=3)
    both = measure_case("s", "p", truth, predicted, SPACING, TWO, True, MasksConfig())
    for bit, one in enumerate(both):
        alone = [(mask >> bit & 1).astype(np.uint8) for mask in (truth, predicted)]
        (expected,) = measure_case("s", "p", *alone, SPACING, TWO[bit : bit + 1], False, MasksConfig())
        assert one == expected


@SOME
@given(seed=st.integers(0, 9999))
def test_what_does_not_count_does_not_count_on_either_side(seed: int) -> None:
    truth, predicted = codes(seed)
    left = np.random.default_rng(seed).random(truth.shape) < 0.2
    with_it = case(np.where(left, 255, truth).astype(np.uint8), predicted)
    assert with_it == case(np.where(left, 0, truth).astype(np.uint8), np.where(left, 0, predicted).astype(np.uint8))


def test_two_empty_masks_are_unknown_or_agree_and_a_missed_one_is_zero() -> None:
    nothing, something = np.zeros((2, 3, 3), np.uint8), np.ones((2, 3, 3), np.uint8)
    anterior, posterior = case(something, nothing)
    assert (anterior.values["dice"], anterior.values["nsd"], anterior.values["hd95_mm"]) == (0.0, 0.0, None)
    assert "predicted mask is empty" in anterior.note
    assert posterior.values["dice"] is None and "both masks are empty" in posterior.note
    assert case(nothing, nothing, empty="agree")[0].values["dice"] == 1.0


@pytest.mark.parametrize(
    ("truth", "predicted", "says"),
    [
        (np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), "two equal ones"),
        (np.zeros((2, 2), np.uint8), np.full((2, 2), 3, np.uint8), "above 2"),
        (np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8), "above 2"),
        (np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64), "uint8"),
        (np.zeros(4, np.uint8), np.zeros(4, np.uint8), "2-D or 3-D"),
    ],
)
def test_what_is_no_pair_of_codes_is_refused(truth: Array, predicted: Array, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        case(truth, predicted)


def test_lesions_are_paired_one_to_one_from_the_largest_overlap_down() -> None:
    truth, predicted = np.zeros((2, 1, 20), bool)
    truth[0, 0:4] = truth[0, 6:10] = truth[0, 15:17] = True  # three lesions
    predicted[0, 1:8] = predicted[0, 16:17] = predicted[0, 19] = True  # one over two of them, one half, one invented
    assert lesions_of(truth, predicted, 0.1) == (3, 3, 2)
    assert lesions_of(truth, predicted, 0.51) == (3, 3, 0)
    assert lesions_of(truth, np.zeros_like(truth), 0.1) == (3, 0, 0)


def test_the_largest_overlap_is_paired_first_also_where_others_go_without() -> None:
    truth, predicted = np.zeros((2, 1, 20), bool)
    truth[0, 0:10] = truth[0, 11:14] = True
    predicted[0, 0:2] = predicted[0, 3:13] = True  # the second lies over both lesions, over the first by far the most
    assert lesions_of(truth, predicted, 0.1) == (2, 2, 1)


def test_lesions_that_touch_by_a_corner_are_one() -> None:
    diagonal = np.eye(3, dtype=bool)
    assert lesions_of(diagonal, diagonal, 1.0) == (1, 1, 1)


def test_shares_of_lesions_are_of_all_lesions_together() -> None:
    counts = [(4, 2, 2), (1, 1, 0), (0, 3, 0)]
    results = [
        result(i, 0.5, lesions=t, predicted_lesions=p, lesions_found=f) for i, (t, p, f) in enumerate(counts * 3)
    ]
    found = assess_masks(results, CONFIG, seed=0)
    assert found.score("lesion_sensitivity").value == pytest.approx(2 / 5)
    assert found.score("lesion_precision").value == pytest.approx(2 / 6)
    assert found.score("lesion_f1").value == pytest.approx(4 / 11)
    assert found.score("false_lesions_per_study").value == pytest.approx(4 / 3)
    assert found.score("lesion_f1").label == "all"


def test_the_macro_mean_is_within_a_study_first() -> None:
    results = [
        result(0, 0.9),
        result(0, 0.5, "b"),
        result(1, 0.8),
        result(1, None, "b"),
        result(2, 0.6),
        result(2, 0.6, "b"),
    ]
    found = assess_masks(results, CONFIG, seed=0)
    assert found.score("dice").label == "macro"
    assert found.score("dice").value == pytest.approx((0.7 + 0.8 + 0.6) / 3)
    assert "1 of 6 values of structures not estimable" in found.score("dice").note
    assert found.score("median_dice").value == pytest.approx(0.7)
    assert (found.task, found.classes, found.n, found.patients) == ("multilabel", ("a", "b"), 3, 3)


def test_images_of_one_patient_make_no_narrower_interval() -> None:
    values = np.random.default_rng(1).beta(8, 2, 60)
    alone = [result(i, float(values[i])) for i in range(60)]
    twice = [result(2 * i + k, float(values[i]), per_patient=2) for i in range(60) for k in "01" and (0, 1)]
    one, two = (assess_masks(some, CONFIG, seed=0).score("dice") for some in (alone, twice))
    assert None not in (one.low, one.high, two.low, two.high)
    assert two.patients == 60 and two.n == 120
    assert (two.high - two.low) == pytest.approx(one.high - one.low, rel=0.1)


def test_structures_shown_are_counted_as_a_table_of_two_by_two() -> None:
    nothing, something = np.zeros((2, 3, 3), np.uint8), np.ones((2, 3, 3), np.uint8)
    results = [
        *case(something, nothing, "s1", "p1"),
        *case(nothing, something, "s2", "p2"),
        *case(something, something),
    ]
    assert assess_masks(results, CONFIG, seed=0).confusion == ((0, 1), (1, 1), (3, 0), (0, 0))


def test_pixels_of_pictures_are_scored_beside_their_masks() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((6, 50)) < 0.4
    ranks = [pixel_ranks(f"s{i}", f"p{i}", (one + rng.random(50)) / 2, one) for i, one in enumerate(truth)]
    found = assess_masks([result(i, 0.5) for i in range(6)], CONFIG, seed=0, unit="pixels", pixels={"a": ranks})
    assert {one.metric: one.value for one in found.scores if one.label == "a"}["pixel_auroc"] == 1.0


def test_conventions_are_said() -> None:
    config = EvaluationConfig(uncertainty=FEW, masks=MasksConfig(tolerance_mm=2, lesions=True))
    said = " ".join(assess_masks([result(0, 0.5), result(1, 0.6)], config, seed=0, unit="pixels").notes)
    for words in (
        "both are empty",
        "within 2 pixels",
        "surface",
        "within a study first",
        "IoU of at least 0.1",
        "2 patients",
    ):
        assert words in said


def test_a_gate_on_the_lower_bound_of_dice_passes_and_refuses() -> None:
    values = np.random.default_rng(0).uniform(0.85, 0.95, 40)
    found = assess_masks([result(i, float(v)) for i, v in enumerate(values)], CONFIG, seed=0)
    wanted = tuple(GateConfig(metric="dice", bound="low", at_least=least) for least in (0.85, 0.95))
    assert [one.passed for one in check(found, PromotionConfig(gate=wanted))] == [True, False]


def test_the_same_masks_under_other_names_and_in_another_order_have_the_same_figures() -> None:
    results = [result(i, float(v)) for i, v in enumerate(np.random.default_rng(3).random(30))]
    one, other = (assess_masks(some, CONFIG, seed=4) for some in (results, results[::-1]))
    assert one.score("dice").low == pytest.approx(other.score("dice").low, abs=1e-12)


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([result(0, 0.5), result(0, 0.5)], "one result for each"),
        ([result(0, 1.0), result(1, 1.0, "b")], "one result for each"),
    ],
)
def test_a_study_that_lacks_a_structure_or_has_it_twice_is_refused(results: list[MaskResult], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        assess_masks(results, CONFIG, seed=0)


def test_nothing_measured_is_an_error_that_says_what_to_try() -> None:
    with pytest.raises(SplitError, match="at least one study"):
        assess_masks([], CONFIG, seed=0)


def test_folds_are_pooled_and_a_patient_is_in_one() -> None:
    folds = {f"fold {k}": [result(10 * k + i, 0.5 + 0.1 * k) for i in range(10)] for k in range(3)}
    found = pool_masks(folds, CONFIG, seed=0)
    assert found.score("dice").value == pytest.approx(0.6)
    assert [one.values["dice"] for one in found.folds] == pytest.approx([0.5, 0.6, 0.7])
    assert all("pixel_auroc" not in one.values for one in found.folds)
    with pytest.raises(SplitError, match="10 patients"):
        pool_masks(folds | {"again": folds["fold 0"]}, CONFIG, seed=0)


def test_pixels_of_pictures_are_ranked_within_each_fold_and_over_all() -> None:
    rng = np.random.default_rng(5)
    folds = {f"fold {k}": [result(10 * k + i, 0.5) for i in range(3)] for k in range(2)}
    pixels: dict[str, dict[str, list[PixelRanks]]] = {}
    for number, (name, results) in enumerate(folds.items()):
        some = []
        for one in results:
            truth = rng.random(200) < 0.3
            told = np.clip(rng.random(200) * 0.8 + truth * 0.2 * number, 0, 1)  # the first fold's network knows nothing
            some.append(pixel_ranks(one.study_id, one.patient, told, truth))
        pixels[name] = {"a": some}
    found = pool_masks(folds, CONFIG, seed=0, unit="pixels", pixels=pixels)
    first, second = (one.values["pixel_auroc"] for one in found.folds)
    assert first is not None and second is not None
    assert first == pooled_auroc(pixels["fold 0"]["a"])
    assert first < 0.6 < second
    together = found.score("pixel_auroc").value
    assert together is not None and first < together < second


def test_a_better_model_is_superior_and_an_equal_one_is_not() -> None:
    rng = np.random.default_rng(2)
    base = rng.uniform(0.6, 0.8, 40)
    reference, better, same = (
        [result(i, float(v)) for i, v in enumerate(values)]
        for values in (base, base + rng.uniform(0.02, 0.1, 40), base + rng.normal(0, 0.02, 40))
    )
    won = compare_masks(better, reference, ("with weights", "from scratch"), CONFIG, seed=0)
    assert won.verdict == "superior" and (won.tests[0].p_value or 1) < 1e-6
    assert won.difference.value == pytest.approx(
        float(np.mean([b.values["dice"] - r.values["dice"] for b, r in zip(better, reference, strict=True)]))
    )
    assert compare_masks(same, reference, ("one", "other"), CONFIG, seed=0).verdict == "inconclusive"
    assert compare_masks(reference, better, ("one", "other"), CONFIG, seed=0, metric="hd95_mm").verdict == "superior"


def test_models_of_other_studies_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same structures of the same studies"):
        compare_masks([result(0, 0.5)], [result(1, 0.5)], ("one", "other"), CONFIG, seed=0)


def test_the_largest_part_alone_is_kept_where_validation_is_better_by_it() -> None:
    whole, largest = np.array([[0.8, 0.9], [0.7, np.nan]]), np.array([[0.9, 0.5], [0.7, np.nan]])
    choices = choose_components(whole, largest, ("a", "metastases"), MasksConfig())
    assert [one.keep for one in choices] == ["largest", "all"]
    assert "0.8000 with the largest part alone, 0.7500 with all" in choices[0].reason
    assert choices[1].studies == 1
    told = choose_components(whole, largest, ("a", "metastases"), MasksConfig(components="all"))
    assert [one.keep for one in told] == ["all", "all"]
    equal = choose_components(whole, whole, ("a", "metastases"), MasksConfig())
    assert [one.keep for one in equal] == ["all", "all"]
    unseen = choose_components(np.full((2, 1), np.nan), np.full((2, 1), np.nan), ("a",), MasksConfig())
    assert (unseen[0].keep, unseen[0].dice_all) == ("all", None)
    assert unseen[0].reason == "no validation study shows the structure"


def test_holes_are_filled_where_validation_is_better_by_it_and_parts_stay_as_chosen() -> None:
    left, filled = np.array([[0.8, 0.9], [0.7, np.nan]]), np.array([[0.9, 0.5], [0.7, np.nan]])
    parts = choose_components(left, filled, ("bladder", "vessel"), MasksConfig())
    choices = choose_holes(parts, left, filled, MasksConfig())
    assert [(one.keep, one.fill) for one in choices] == [("largest", True), ("all", False)]
    assert "of 2 validation studies: 0.8000 with holes filled, 0.7500 with holes left" in choices[0].fill_reason
    assert (choices[1].dice_open, choices[1].dice_filled) == (0.9, 0.5)
    told = choose_holes(parts, left, filled, MasksConfig(holes="fill"))
    assert [(one.fill, one.fill_reason) for one in told] == [(True, "as the configuration says")] * 2
    assert not any(one.fill for one in choose_holes(parts, left, filled, MasksConfig(holes="keep")))
    assert not any(one.fill for one in choose_holes(parts, left, left, MasksConfig()))
    unseen = choose_holes(parts[:1], left[:, :1] * np.nan, filled[:, :1], MasksConfig())
    assert unseen == (replace(parts[0], fill_reason="no validation study shows the structure"),)


def test_the_worst_and_the_best_are_shown_and_no_patient_twice() -> None:
    results = [result(i, i / 20, per_patient=2) for i in range(20)]
    assert telling_masks(results, worst=2, best=1) == ("s000", "s002", "s019")
    assert telling_masks(results[:2]) == ("s000",)


def test_what_was_measured_comes_back_from_the_disk(tmp_path: Path) -> None:
    results = case(*codes(3), lesions=True)
    choices = choose_components(np.array([[0.8]]), np.array([[0.9]]), ("a",), MasksConfig())
    choices = choose_holes(choices, np.array([[0.9]]), np.array([[0.95]]), MasksConfig())
    quality = MaskQuality("isotonic", "error 0.1", ("entropy",), 0.7, feature=0, knots=((0.1, 0.9), (0.3, 0.6)))
    io.write_mask_results(tmp_path, results)
    io.write_components(tmp_path, choices)
    io.write_quality(tmp_path, quality)
    assert io.read_mask_results(tmp_path) == results
    assert io.read_components(tmp_path) == choices
    assert io.read_quality(tmp_path) == quality
    (tmp_path / io.MASKS).write_text("[{}]")
    with pytest.raises(StorageError):
        io.read_mask_results(tmp_path)
