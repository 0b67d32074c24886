"""What is far from training is found, and what is like validation is flagged as seldom as promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf

from medtl.config import NoveltyConfig, UncertaintyConfig
from medtl.errors import StorageError
from medtl.evaluation.io import read_novelty, write_novelty
from medtl.evaluation.novelty import examine, fit, flagged, novelty, table
from medtl.records import FloatArray, NoveltyRule

FEW = UncertaintyConfig(resamples=200)
METHODS: Any = ("mahalanobis", "relative", "knn")
MIX = np.random.default_rng(42).normal(size=(16, 16))


def features(n: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Two classes of correlated features."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    return (rng.normal(size=(n, 16)) @ MIX + 3 * label[:, None]).astype(np.float32), np.eye(2)[label]


def people(n: int, per_patient: int = 1) -> list[str]:
    return [f"p-{i // per_patient}" for i in range(n)]


def rule_for(method: Any = "mahalanobis", n: int = 300, n_val: int = 100, **given_: Any) -> NoveltyRule:
    train, targets = features(n, 0)
    val, _ = features(n_val, 1)
    config = NoveltyConfig(method=method, **given_)
    return fit(train, targets, people(n), val, people(n_val), config)


def test_the_distance_is_mahalanobis_from_the_nearest_centre() -> None:
    train, targets = features(300, 0)
    scaled = train.astype(np.float64) / train.astype(np.float64).std(0)
    centres = np.stack([scaled[targets[:, k] > 0.5].mean(0) for k in (0, 1)])
    covariance, _ = ledoit_wolf(scaled - centres[targets.argmax(1)], assume_centered=True)
    inverse, row = np.linalg.inv(covariance), features(1, 5)[0][0] / train.astype(np.float64).std(0)
    wanted = min(mahalanobis(row, centre, inverse) for centre in centres) / 4  # the root of 16 features
    assert novelty(rule_for(), features(1, 5)[0])[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_shifted_or_of_another_shape_is_found(method: Any) -> None:
    rng = np.random.default_rng(3)
    test, _ = features(120, 2)
    ids = [f"s-{i}" for i in range(120)]
    strange = {
        "shift": test + 8 * rng.normal(size=16),
        "noise": (3 * np.abs(MIX).mean() * 4 * rng.normal(size=(120, 16))).astype(np.float32),
        "nothing": features(120, 7)[0],
    }
    found = examine(rule_for(method), test, ids, people(120), strange, FEW, 0)
    scores = {name: score.value or 0.0 for name, score in table(found)[1:]}
    assert scores["shift"] > 0.9 and scores["noise"] > 0.9
    assert 0.35 < scores["nothing"] < 0.65
    assert found.flagged.value is not None and found.flagged.value < 0.15 and not found.notes


@pytest.mark.parametrize("method", METHODS)
def test_what_is_far_is_far_also_where_features_vary_very_unequally(method: Any) -> None:
    rng = np.random.default_rng(0)
    spread, turn = np.geomspace(1, 0.1, 50), np.linalg.qr(rng.normal(size=(50, 50)))[0]
    apart = rng.normal(size=50) * spread

    def rows(n: int) -> FloatArray:
        return np.asarray((rng.normal(size=(n, 50)) * spread + (np.arange(n) % 2)[:, None] * apart) @ turn)

    train, val = rows(300), rows(60)
    rule = fit(train, np.eye(2)[np.arange(300) % 2], people(300), val, people(60), NoveltyConfig(method=method))
    far = val + 5 * rng.normal(size=50)
    found = examine(rule, val, [f"s-{i}" for i in range(60)], people(60), {"far": far}, FEW, 0)
    assert found.detection[0].value is not None and found.detection[0].value > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_new_patients_are_flagged_no_more_often_than_promised(method: Any) -> None:
    train, targets = features(300, 0)
    shares = []
    for seed in range(40):
        val, _ = features(60, 100 + seed)
        rule = fit(train, targets, people(300), val, people(60), NoveltyConfig(method=method, flagged_share=0.1))
        shares.append(flagged(rule, novelty(rule, features(400, 500 + seed)[0])).mean())
    assert 0.06 < np.mean(shares) < 0.115


def test_too_few_patients_in_validation_leave_no_threshold_and_it_is_said() -> None:
    rule = rule_for(n_val=18)
    assert rule.threshold is None and "too few patients" in rule.reason
    assert np.isnan(flagged(rule, novelty(rule, features(5, 9)[0]))).all()
    found = examine(rule, features(30, 2)[0], [f"s-{i}" for i in range(30)], people(30), {}, FEW, 0)
    assert found.flagged.value is None and "too few patients" in found.flagged.note


def test_a_test_part_that_is_not_like_validation_is_said() -> None:
    test = features(80, 2)[0] + 20
    found = examine(rule_for(), test, [f"s-{i}" for i in range(80)], people(80), {}, FEW, 0)
    assert found.flagged.value == 1 and "not like validation" in found.notes[0]


@given(st.integers(0, 50), st.sampled_from(METHODS))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_a_score_does_not_depend_on_who_else_is_scored(seed: int, method: Any) -> None:
    rule, rows = rule_for(method, n=80), features(20, seed)[0]
    assert novelty(rule, rows)[7] == pytest.approx(novelty(rule, rows[7:8])[0], rel=1e-9)


def test_many_images_of_one_patient_do_not_move_the_centre() -> None:
    train, targets = features(100, 0)
    often = np.concatenate([train, np.tile(train[:1] + 50, (400, 1))])
    known = np.concatenate([targets, np.tile(targets[:1], (400, 1))])
    val = features(60, 1)[0]
    rule = fit(often, known, [*people(100), *["p-many"] * 400], val, people(60), NoveltyConfig())
    centre = rule.centres[0] * rule.scale
    assert np.abs(centre - train[::2].mean(0)).max() < 2


def test_a_feature_that_never_varied_and_one_that_is_no_number_do_no_harm() -> None:
    train, targets = features(100, 0)
    train[:, 3] = 0
    rule = fit(train, targets, people(100), train[:40], people(40), NoveltyConfig())
    odd = np.repeat(train[:1], 4, axis=0)
    odd[1, 3], odd[2, 3], odd[3, 5] = 1e-4, 50, np.nan
    scores = novelty(rule, odd)
    assert scores[1] == pytest.approx(scores[0], rel=1e-3) and scores[2] > 2 * scores[0]
    assert np.isnan(scores[3]) and np.isnan(flagged(rule, scores)[3])


@pytest.mark.parametrize(
    ("rows", "said"), [(np.zeros((50, 16)), "same features"), (np.full((50, 16), np.nan), "not a number")]
)
def test_training_that_says_nothing_gives_no_rule(rows: FloatArray, said: str) -> None:
    rule = fit(rows, np.eye(2)[np.arange(50) % 2], people(50), features(30, 1)[0], people(30), NoveltyConfig())
    assert rule.method == "none" and said in rule.reason
    assert np.isnan(novelty(rule, features(3, 0)[0])).all()
    found = examine(rule, features(30, 2)[0], [f"s-{i}" for i in range(30)], people(30), {"x": rows}, FEW, 0)
    assert found.flagged.value is None and not found.detection


def test_few_training_patients_give_no_rule() -> None:
    train, targets = features(100, 0)
    rule = fit(train, targets, people(100, 40), train, people(100), NoveltyConfig())
    assert rule.method == "none" and "fewer than 5 patients" in rule.reason


def test_other_features_than_those_of_training_are_refused() -> None:
    with pytest.raises(ValueError, match="3 features are given, 16 were trained on"):
        novelty(rule_for(), np.zeros((2, 3)))


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_a_rule_comes_back_from_its_files_to_the_last_bit(tmp_path: Path, method: Any) -> None:
    rule, rows = rule_for(method), features(9, 4)[0]
    write_novelty(tmp_path, rule)
    back = read_novelty(tmp_path)
    assert np.array_equal(novelty(back, rows), novelty(rule, rows), equal_nan=True)
    assert (back.threshold, back.quantiles, back.method) == (rule.threshold, rule.quantiles, rule.method)
    (tmp_path / "novelty_scale.npy").write_bytes(b"no array")
    with pytest.raises(StorageError, match="no readable novelty rule"):
        read_novelty(tmp_path)


def test_only_knn_keeps_what_is_one_studys_own() -> None:
    assert rule_for("knn").references.shape == (300, 16)
    assert rule_for("mahalanobis").references.size == 0 and rule_for("relative").references.size == 0
