"""A mask's Dice is foretold where something tells it, and a mask of which nothing can be foretold is looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medtl.config import MasksConfig, UncertaintyConfig
from medtl.evaluation.quality import QUALITY_METRICS, fit_quality, foretell, is_flagged, quality_scores
from medtl.records import MaskQuality

Array = np.ndarray[Any, np.dtype[Any]]
FEW = UncertaintyConfig(resamples=200)


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


def with_a_failure(dice: Array, numbers: list[dict[str, float]]) -> tuple[Array, list[dict[str, float | None]]]:
    """Add one study whose structure was missed altogether, so that no number tells anything of it."""
    return np.append(dice, 0.0), [*numbers, dict.fromkeys(numbers[0])]


def test_a_study_whose_structure_is_missed_altogether_is_flagged_and_its_failure_counted() -> None:
    dice, numbers = with_a_failure(many := np.linspace(0.75, 0.95, 30), doubts(many, 0.005))
    ids = [f"s{i}" for i in range(31)]
    quality = fit_quality(numbers, dice, ids, ids, MasksConfig(), seed=0)
    assert (quality.method, quality.studies) == ("linear", 30)
    assert (quality.failures, quality.failures_flagged, quality.flagged) == (1, 1, 1)
    foretold = foretell(quality, numbers)
    assert is_flagged(quality, foretold).tolist() == [False] * 30 + [True]
    error, flagged, failures = quality_scores(quality, foretold, dice, ids, ids, FEW, seed=0)
    assert (error.n, flagged.n, failures.n) == (30, 31, 1)
    assert flagged.value == pytest.approx(1 / 31) and failures.value == 1
    assert "nothing is foretold of 1 of 31 studies" in error.note and "1 of 31" in flagged.note


def test_what_may_be_absent_is_doubted_only_where_something_looked_like_it() -> None:
    dice = np.linspace(0.4, 0.95, 30)
    numbers = [{"entropy liver": one["disagreement"], "expected Dice liver": 0.9} for one in doubts(dice, 0.005)]
    ids = [f"s{i}" for i in range(30)]
    absent: dict[str, float | None] = {"entropy liver": None, "expected Dice liver": 0.99}
    hinted: dict[str, float | None] = {"entropy liver": None, "expected Dice liver": 0.002}
    strict = fit_quality(numbers, dice, ids, ids, MasksConfig(), seed=0)
    assert is_flagged(strict, foretell(strict, [absent, hinted])).tolist() == [True, True]
    assumed = {"entropy liver": 0.0, "agreement liver": 1.0}
    knowing = fit_quality(numbers, dice, ids, ids, MasksConfig(), seed=0, assumed=assumed)
    assert knowing.assumed == {"entropy liver": 0.0}  # of no number that is not looked at
    assert foretell(knowing, [absent]) == pytest.approx(foretell(knowing, [absent | {"entropy liver": 0.0}]))
    assert is_flagged(knowing, foretell(knowing, [absent, hinted])).tolist() == [False, True]


def test_a_study_without_a_dice_is_no_part_of_any_share() -> None:
    dice, numbers = with_a_failure(many := np.linspace(0.4, 0.95, 30), doubts(many, 0.005))
    dice[-1], ids = np.nan, [f"s{i}" for i in range(31)]
    quality = fit_quality(numbers, dice, ids, ids, MasksConfig(), seed=0)
    found = quality_scores(quality, foretell(quality, numbers), dice, ids, ids, FEW, seed=0)
    assert quality.failures == found[2].n == int((many < 0.7).sum())
    assert found[0].n == found[1].n == 30 and not found[1].note.startswith("nothing")
    assert quality.flagged == fit_quality(numbers[:-1], many, ids[:-1], ids[:-1], MasksConfig(), seed=0).flagged


def test_without_a_rule_nothing_is_flagged_and_nothing_estimable() -> None:
    rule = MaskQuality("none", "validation has 9 patients; 10 are needed", ("entropy",), 0.7)
    foretold = foretell(rule, [{"entropy": 0.1}, {"entropy": None}])
    assert not is_flagged(rule, foretold).any()
    found = quality_scores(rule, foretold, np.array([0.9, 0.0]), ["s1", "s2"], ["p1", "p2"], FEW, seed=0)
    assert [one.metric for one in found] == list(QUALITY_METRICS)
    assert all(one.value is None and "validation has 9 patients" in one.note for one in found)


def test_numbers_that_most_studies_lack_leave_no_rule() -> None:
    dice, ids = np.linspace(0.4, 0.9, 30), [f"s{i}" for i in range(30)]
    quality = fit_quality([{"views": 0.1 if i < 9 else None} for i in range(30)], dice, ids, ids, MasksConfig(), seed=0)
    assert quality.method == "none" and "at least half" in quality.reason
