"""Masks are measured as the parts they are made of are, nothing is not zero, and what does not count does not count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric, SurfaceDistanceMetric
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from medtl.config import EvaluationConfig, GateConfig, MasksConfig, PromotionConfig, UncertaintyConfig
from medtl.errors import SplitError, StorageError
from medtl.evaluation import io
from medtl.evaluation.masks import (
    assess_masks,
    choose_components,
    compare_masks,
    dice_of_codes,
    fit_quality,
    foretell,
    lesions_of,
    measure_case,
    pixel_auroc,
    pixel_ranks,
    pixel_scores,
    pool_masks,
    quality_scores,
    telling_masks,
)
from medtl.evaluation.overlap import MASK_METRICS
from medtl.evaluation.surfaces import measure
from medtl.records import MaskResult, Structure
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
    with pytest.raises(SplitError, match="10 patients"):
        pool_masks(folds | {"again": folds["fold 0"]}, CONFIG, seed=0)


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


@SOME
@given(seed=st.integers(0, 9999))
def test_the_auroc_of_pixels_is_that_of_scikit_learn_also_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability = np.round(rng.random((9, 11)), int(rng.integers(1, 4))).astype(np.float32)
    truth, counts = rng.random((9, 11)) < 0.3, rng.random((9, 11)) < 0.8
    if 0 < truth[counts].sum() < counts.sum():
        expected = roc_auc_score(truth[counts], probability[counts])
        assert pixel_auroc(probability, truth, counts) == pytest.approx(expected, abs=1e-12)


def test_an_image_without_the_structure_has_no_auroc_of_pixels() -> None:
    assert pixel_auroc(np.zeros((3, 3), np.float32), np.zeros((3, 3), bool)) is None


def test_pooled_pixels_are_those_of_all_images_put_together() -> None:
    rng = np.random.default_rng(7)
    images = [(rng.random((8, 8)).astype(np.float32), rng.random((8, 8)) < share) for share in (0.1, 0.5, 0.0, 0.3)]
    ranks = [pixel_ranks(f"s{i}", f"p{i}", *one) for i, one in enumerate(images)]
    pooled, mean = pixel_scores("vessel", ranks, FEW, seed=0)
    assert pooled.value == pytest.approx(
        roc_auc_score(np.ravel([t for _, t in images]), np.ravel([p for p, _ in images]))
    )
    assert mean.value == pytest.approx(np.mean([roc_auc_score(t.ravel(), p.ravel()) for p, t in images if t.any()]))
    assert "1 of 4 images left out" in mean.note
    assert pooled.low is not None and pooled.low < pooled.value < (pooled.high or 0)


def test_drawn_images_give_the_auroc_of_their_pixels() -> None:
    from medtl.evaluation.masks import _ahead, _pooled_auroc

    rng = np.random.default_rng(8)
    images = [(rng.random(50).astype(np.float32), rng.random(50) < 0.4) for _ in range(3)]
    ranks = [pixel_ranks(f"s{i}", f"p{i}", *one) for i, one in enumerate(images)]
    ahead = np.array([[_ahead(a.inside, b.outside) for b in ranks] for a in ranks])
    sizes = np.array([[len(a.inside), len(a.outside)] for a in ranks], dtype=float)
    drawn = [0, 0, 2]
    expected = roc_auc_score(np.ravel([images[i][1] for i in drawn]), np.ravel([images[i][0] for i in drawn]))
    assert _pooled_auroc(ahead, sizes, np.array([[2.0, 0, 1]]))[0] == pytest.approx(expected)


def test_the_largest_part_alone_is_kept_where_validation_is_better_by_it() -> None:
    whole, largest = np.array([[0.8, 0.9], [0.7, np.nan]]), np.array([[0.9, 0.5], [0.7, np.nan]])
    choices = choose_components(whole, largest, ("liver", "metastases"), MasksConfig())
    assert [one.keep for one in choices] == ["largest", "all"]
    assert "0.8000 with the largest part alone, 0.7500 with all" in choices[0].reason
    assert choices[1].studies == 1
    told = choose_components(whole, largest, ("liver", "metastases"), MasksConfig(components="all"))
    assert [one.keep for one in told] == ["all", "all"]
    equal = choose_components(whole, whole, ("liver", "metastases"), MasksConfig())
    assert [one.keep for one in equal] == ["all", "all"]
    unseen = choose_components(np.full((2, 1), np.nan), np.full((2, 1), np.nan), ("liver",), MasksConfig())
    assert (unseen[0].keep, unseen[0].dice_all) == ("all", None)


def doubts(dice: Array, noise: float, seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    return [{"disagreement": float(1 - d + rng.normal(0, noise)), "noise": float(rng.random())} for d in dice]


@pytest.mark.parametrize("bent", [False, True])
def test_dice_is_foretold_from_what_tells_it_and_failures_are_flagged(bent: bool) -> None:
    dice = np.random.default_rng(4).uniform(0.4, 0.95, 60)
    ids, people = [f"s{i}" for i in range(60)], [f"p{i // 2}" for i in range(60)]
    given_ = doubts(dice, 0.02)
    if bent:
        given_ = [{"disagreement": 1.0 if one["disagreement"] > 0.3 else one["disagreement"] / 50} for one in given_]
    quality = fit_quality(given_, dice, ids, people, MasksConfig(), seed=0)
    assert quality.method == ("isotonic" if bent else "linear")
    assert quality.error is not None and quality.error_of_the_mean is not None
    assert quality.error < 0.5 * quality.error_of_the_mean
    assert quality.failures_flagged >= 0.9 * quality.failures > 0
    fresh = np.random.default_rng(5).uniform(0.4, 0.95, 40)
    unseen = doubts(fresh, 0.02, seed=1)
    if not bent:
        foretold = foretell(quality, unseen)
        assert np.abs(foretold - fresh).mean() < 0.05
        scores = quality_scores(quality, foretold, fresh, ids[:40], people[:40], FEW, seed=0)
        assert [one.metric for one in scores] == ["dice_foretold_error", "flagged", "failures_flagged"]
        assert scores[2].value is not None and scores[2].value > 0.8


def test_numbers_that_tell_nothing_foretell_nothing() -> None:
    rng = np.random.default_rng(6)
    dice, ids = rng.uniform(0.6, 0.9, 40), [f"s{i}" for i in range(40)]
    quality = fit_quality([{"noise": float(v)} for v in rng.random(40)], dice, ids, ids, MasksConfig(), seed=0)
    assert quality.method == "none" and "no number of uncertainty" in quality.reason
    assert np.isnan(foretell(quality, [{"noise": 0.3}])).all()


def test_few_patients_and_unknown_numbers_leave_no_rule_and_no_value() -> None:
    dice = np.linspace(0.4, 0.9, 9)
    ids = [f"s{i}" for i in range(9)]
    quality = fit_quality(doubts(dice, 0.0), dice, ids, ids, MasksConfig(), seed=0)
    assert quality.method == "none" and "9 patients" in quality.reason
    many = np.linspace(0.4, 0.9, 30)
    names = [f"s{i}" for i in range(30)]
    learned = fit_quality(doubts(many, 0.01), many, names, names, MasksConfig(), seed=0)
    assert np.isnan(foretell(learned, [{}, {"disagreement": None, "noise": 0.1}])).all()
    partly = [one | {"views": None, "noise": None if i == 0 else 0.5} for i, one in enumerate(doubts(many, 0.01))]
    without = fit_quality(partly, many, names, names, MasksConfig(), seed=0)
    assert (without.method, without.features, without.studies) == ("linear", ("disagreement", "noise"), 29)


def test_the_worst_and_the_best_are_shown_and_no_patient_twice() -> None:
    results = [result(i, i / 20, per_patient=2) for i in range(20)]
    assert telling_masks(results, worst=2, best=1) == ("s000", "s002", "s019")
    assert telling_masks(results[:2]) == ("s000",)


def test_what_was_measured_comes_back_from_the_disk(tmp_path: Path) -> None:
    results = case(*codes(3), lesions=True)
    choices = choose_components(np.array([[0.8]]), np.array([[0.9]]), ("liver",), MasksConfig())
    dice, ids = np.linspace(0.4, 0.9, 30), [f"s{i}" for i in range(30)]
    quality = fit_quality(doubts(dice, 0.01), dice, ids, ids, MasksConfig(), seed=0)
    io.write_mask_results(tmp_path, results)
    io.write_components(tmp_path, choices)
    io.write_quality(tmp_path, quality)
    assert io.read_mask_results(tmp_path) == results
    assert io.read_components(tmp_path) == choices
    assert io.read_quality(tmp_path) == quality
    (tmp_path / io.MASKS).write_text("[{}]")
    with pytest.raises(StorageError):
        io.read_mask_results(tmp_path)


def picture(path: Path) -> Array:
    with Image.open(path) as opened:
        return np.asarray(opened)


@pytest.mark.data
def test_pixels_of_real_retinas_are_ranked_inside_the_field_of_view_as_scikit_learn_ranks_them() -> None:
    root = Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "drive"
    ranks, told, true = [], [], []
    for number in range(21, 24):
        dark = 1 - picture(root / "images" / f"{number}_training.tif")[..., 1] / np.float32(255)
        vessel = picture(root / "1st_manual" / f"{number}_manual1.gif") > 0
        field = picture(next((root / "mask").glob(f"{number}_*.gif"))) > 0
        ranks.append(pixel_ranks(f"s{number}", f"p{number}", dark, vessel, field))
        told.append(dark[field])
        true.append(vessel[field])
    pooled, mean = pixel_scores("vessel", ranks, FEW, seed=0)
    assert pooled.value == pytest.approx(roc_auc_score(np.concatenate(true), np.concatenate(told)), abs=1e-12)
    assert mean.value == pytest.approx(np.mean([roc_auc_score(t, p) for t, p in zip(true, told, strict=True)]))
