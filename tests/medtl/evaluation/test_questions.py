"""One way to every interval: the method of the config is everybody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from medtl.config import (
    AbstentionConfig,
    CalibrationConfig,
    EvaluationConfig,
    NoveltyConfig,
    SubgroupsConfig,
    UncertaintyConfig,
)
from medtl.evaluation import abstention, calibration, novelty, subgroups
from medtl.evaluation.assess import assess
from medtl.evaluation.comparison import compare
from medtl.evaluation.delong import area, interval
from medtl.evaluation.grouped import mean_auroc
from medtl.evaluation.metrics import auroc
from medtl.evaluation.overlap import summary
from medtl.evaluation.questions import share
from medtl.evaluation.uncertainty import drawn, independent_votes, left_out, wilson
from medtl.records import FloatArray, Predictions, Score

CLASSES = ("well", "ill")
Measured = dict[str, Score]


def predicted(part: str, seed: int, n: int = 160) -> Predictions:
    rng = np.random.default_rng(seed)
    ill = np.arange(n) % 2.0
    told = 1 / (1 + np.exp(-(1.5 * (ill - 0.5) + rng.normal(0, 1, n))))
    ids, people = (tuple(f"{part}-{kind}{k // size:03d}" for k in range(n)) for kind, size in (("s", 1), ("p", 4)))
    return Predictions(part, ids, people, np.stack([1 - ill, ill], 1), np.stack([1 - told, told], 1))


VAL, TEST = predicted("val", 0), predicted("test", 1)
ILL, TOLD = TEST.targets[:, 1], TEST.probabilities[:, 1]
SEX = np.array(["F", "F", "F", "F", "M", "M", "M", "M"] * 20)
FEATURES = {
    name: np.random.default_rng(seed).normal(size=(160, 5)) for seed, name in enumerate(("train", "val", "test"))
}


def measured(method: Any) -> tuple[Measured, Any]:
    """Measure one score of every kind of finding, and give what the calibrator and the rules made of the test part."""
    drawing = UncertaintyConfig(resamples=400, method=method)
    few = SubgroupsConfig(fewest_patients=2, fewest_of_an_outcome=2)
    config = EvaluationConfig(uncertainty=drawing, subgroups=few)
    main = assess(VAL, TEST, "binary", CLASSES, config, 0)
    made = calibration.fit(VAL, "binary", CLASSES, CalibrationConfig(method="temperature"), 0)
    rule = abstention.fit(VAL, "binary", CLASSES, AbstentionConfig(coverage=0.8))
    strange = novelty.fit(
        FEATURES["train"], VAL.targets, VAL.patients, FEATURES["val"], VAL.patients, NoveltyConfig(flagged_share=0.2)
    )
    groups = subgroups.examine(TEST, main.operating_points, "binary", CLASSES, {"sex": SEX.tolist()}, config, 0)
    scores = {
        "auroc": main.score("auroc"),
        "brier": main.score("brier"),
        "calibrated": calibration.examine(TEST, made, CLASSES, config, 0).after[0],
        "women": next(s for g in groups.groups if g.value == "F" for s in g.scores if s.metric == "auroc"),
        "flagged": novelty.examine(strange, FEATURES["test"], TEST.study_ids, TEST.patients, {}, drawing, 0).flagged,
        "answered": abstention.examine(TEST, rule, drawing, 0).answered[0],
        "alone": mean_auroc(TEST, "binary", CLASSES, drawing, 0),
        "reference": compare(TEST, TEST, ("one", "other"), drawing, 0).reference_score,
        "mean": summary("dice", TOLD.tolist(), TEST.study_ids, TEST.patients, drawing, 0).mean,
        "median": summary("dice", TOLD.tolist(), TEST.study_ids, TEST.patients, drawing, 0).median,
    }
    told = calibration.calibrated(made, TEST).probabilities[:, 1]
    flags = novelty.flagged(strange, novelty.novelty(strange, FEATURES["test"]))
    single = (abstention.prediction_sets(rule, TEST.probabilities)[0].sum(axis=1) == 1).astype(float)
    return scores, (told, flags, single)


def area_of(rows: Any) -> Callable[[FloatArray], FloatArray]:
    return lambda weights: auroc(ILL[rows], TOLD[rows], weights)


def mean_of(values: FloatArray) -> Callable[[FloatArray], FloatArray]:
    return lambda weights: weights @ values / weights.sum(axis=1)


def bca(of: Callable[[FloatArray], FloatArray], rows: Any) -> tuple[float, float]:
    """Lay the limits as Efron 1987 has them, from the draws themselves."""
    ids, people = np.array(TEST.study_ids)[rows].tolist(), np.array(TEST.patients)[rows].tolist()
    draws = np.concatenate([of(weights) for weights in drawn(ids, people, 400, 0)])
    without = np.concatenate([of(weights) for weights in left_out(ids, people)])
    value = of(np.ones((1, len(ids))))[0]
    influence = without.mean() - without
    bias = norm.ppf((draws < value - 1e-9).mean() + (abs(draws - value) <= 1e-9).mean() / 2)
    skew = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    z = bias + norm.ppf([0.025, 0.975])
    low, high = np.quantile(draws, norm.cdf(bias + z / (1 - skew * z)))
    return float(low), float(high)


def test_bca_by_name_is_bca_in_everything_that_is_measured() -> None:
    scores, (told, flags, single) = measured("bca")
    everybody, women = np.arange(160), np.flatnonzero(SEX == "F")
    wanted = {
        "auroc": bca(area_of(everybody), everybody),
        "brier": bca(mean_of((TOLD - ILL) ** 2), everybody),
        "calibrated": bca(mean_of((told - ILL) ** 2), everybody),
        "women": bca(area_of(women), women),
        "flagged": bca(mean_of(flags), everybody),
        "answered": bca(mean_of(single), everybody),
        "alone": bca(area_of(everybody), everybody),
        "reference": bca(area_of(everybody), everybody),
        "mean": bca(mean_of(TOLD), everybody),
    }
    for name, limits in wanted.items():
        assert (scores[name].low, scores[name].high) == pytest.approx(limits, abs=1e-12), name


def test_analytic_by_name_is_the_closed_form_wherever_there_is_one_and_auto_elsewhere() -> None:
    scores, (_, flags, single) = measured("analytic")
    auto, _ = measured("auto")
    numbers, women = np.unique(TEST.patients, return_inverse=True)[1], SEX == "F"
    whole = interval(area(ILL, TOLD, numbers), 0.95)
    half = interval(area(ILL[women], TOLD[women], np.unique(numbers[women], return_inverse=True)[1]), 0.95)
    assert whole is not None and half is not None
    for name, limits in {"auroc": whole, "alone": whole, "reference": whole, "women": half}.items():
        assert (scores[name].low, scores[name].high) == pytest.approx(limits), name
    for name, values in {"flagged": flags, "answered": single}.items():
        votes = independent_votes(values, np.ones(160), numbers)
        assert (scores[name].low, scores[name].high) == pytest.approx(wilson(values.mean(), votes, 0.95)), name
    assert {name: scores[name] == auto[name] for name in ("brier", "calibrated", "mean", "median")} == {
        "brier": True, "calibrated": True, "mean": True, "median": True,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["auto", "percentile", "bca", "analytic"])
def test_a_method_moves_limits_and_no_value(method: Any) -> None:
    scores, _ = measured(method)
    assert {name: one.value for name, one in scores.items()} == {n: o.value for n, o in measured("auto")[0].items()}
    assert all(one.low is not None and one.high is not None for one in scores.values())


def test_few_patients_who_all_agree_are_no_surer_by_a_closed_form() -> None:
    people = [f"p-{k}" for k in range(8)]
    drawing = UncertaintyConfig(resamples=100, method="analytic")
    found = share("right", "all", np.ones(8), people, people, drawing, 0)
    assert (found.low, found.high) == pytest.approx(wilson(1.0, 8, 0.95))
    halves = share("right", "all", np.full(8, 0.5), people, people, drawing, 0)
    assert halves == share("right", "all", np.full(8, 0.5), people, people, UncertaintyConfig(resamples=100), 0)
