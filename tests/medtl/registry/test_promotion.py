"""A gate passes what it should and nothing else; a release is what was entered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medtl.artifacts import Store, write_json
from medtl.config import FloorConfig, GateConfig, IncumbentConfig, PromotionConfig
from medtl.errors import ConfigError, MedtlError, TamperedError
from medtl.records import Comparison, Evaluation, Leak, Release, Score, Subgroup, SubgroupFindings
from medtl.registry.io import Register
from medtl.registry.promotion import (
    Beside,
    check,
    check_clean,
    check_incumbent,
    check_licence,
    check_subgroups,
    status_of,
)


def evaluation(value: float | None, low: float | None) -> Evaluation:
    score = Score("auroc", "yes", value, low, None, 9, 9)
    return Evaluation("binary", ("no", "yes"), (score,), (), (), (), 9, 9, 100)


def gate(**condition: object) -> PromotionConfig:
    return PromotionConfig(gate=(GateConfig(metric="auroc", **condition),))


def test_a_gate_looks_at_the_bound_it_names() -> None:
    found = evaluation(0.95, 0.85)
    assert status_of(check(found, gate(bound="low", at_least=0.8)), True) == "validated"
    assert status_of(check(found, gate(bound="low", at_least=0.9)), True) == "refused"
    assert status_of(check(found, gate(bound="value", at_least=0.9)), True) == "validated"
    assert status_of(check(found, gate(bound="value", at_least=0.9, at_most=0.94)), True) == "refused"
    assert status_of(check(found, PromotionConfig()), False) == "candidate"


def test_without_a_gate_on_a_metric_nothing_is_validated_and_a_leak_still_refuses() -> None:
    assert status_of([check_clean(())], False) == "candidate"
    assert status_of([check_clean((Leak("patient", ("train", "test"), 2),))], False) == "refused"


@pytest.mark.parametrize(
    "licence, started, passed",
    [("Apache-2.0", True, True), ("CC-BY-NC-4.0", True, False), (None, True, False), (None, False, True)],
)
def test_weights_whose_licence_is_not_allowed_or_not_known_do_not_pass(
    licence: str | None, started: bool, passed: bool
) -> None:
    assert check_licence(licence, ("Apache-2.0", "BSD-3-Clause"), started).passed is passed


@pytest.mark.parametrize(
    "verdict, passed",
    [("superior", True), ("non-inferior", True), ("inconclusive", False), ("inferior", False), (None, False)],
)
def test_a_candidate_that_may_be_worse_than_the_live_release_does_not_pass(verdict: Any, passed: bool) -> None:
    score = Score("auroc difference", "macro", 0.0, -0.01, 0.01, 9, 9)
    beside = Beside("r-1", Comparison("auroc", "candidate", "r-1", score, score, verdict=verdict), "none taught it")
    assert check_incumbent(beside, IncumbentConfig()).passed is passed
    assert not check_incumbent(Beside("r-1", None, "classes differ"), IncumbentConfig()).passed
    assert check_incumbent(None, IncumbentConfig()).passed


def test_what_is_not_estimable_does_not_pass() -> None:
    assert status_of(check(evaluation(0.99, None), gate(bound="low", at_least=0.1)), True) == "refused"


def test_a_gate_on_an_unknown_metric_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="there are auroc"):
        check(evaluation(1, 1), PromotionConfig(gate=(GateConfig(metric="auc", at_least=0.5),)))


def release(number: int, status: str) -> Release:
    return Release(f"r-{number}", "study", status, ())  # type: ignore[arg-type]


def test_the_newest_validated_release_is_chosen_and_checked(tmp_path: Path) -> None:
    register, store = Register(tmp_path), Store(tmp_path)
    artifacts = [store.make("release", {"n": n}, lambda folder: write_json(folder / "x.json", 1)) for n in range(3)]
    for number, status in enumerate(("validated", "validated", "refused")):
        assert register.enter(release(number, status), artifacts[number], {})
        assert not register.enter(release(number, status), artifacts[number], {})
    assert register.choose("study", None, candidates=False).release.release_id == "r-1"
    with pytest.raises(MedtlError, match="no validated release of 'other'"):
        register.choose("other", None, candidates=True)
    with pytest.raises(MedtlError, match="r-2"):
        register.choose("study", "r-2", candidates=False)
    entry = register.choose("study", "r-0", candidates=False)
    folder = register.open(entry)
    (folder / "x.json").write_text("2")
    with pytest.raises(TamperedError, match=r"x\.json"):
        register.open(entry)


@pytest.mark.parametrize(
    "values, bound, passed",
    [
        (((0.9, 0.8), (0.85, 0.6)), "value", True),
        (((0.9, 0.8), (0.85, 0.6)), "low", False),
        (((0.9, 0.8), (0.65, 0.6)), "value", False),
        (((0.9, 0.8), (None, None)), "value", False),
        ((), "value", False),
    ],
)
def test_no_subgroup_may_be_below_the_floor_and_none_at_all_shows_nothing(
    values: tuple[tuple[float | None, float | None], ...], bound: Any, passed: bool
) -> None:
    groups = tuple(
        Subgroup("sex", str(n), "yes", 20, 20, 0.5, (Score("auroc", "yes", value, low, 1.0, 20, 20),))
        for n, (value, low) in enumerate(values)
    )
    found = SubgroupFindings((*groups, Subgroup("sex", "few", "yes", None, None, None, (), "too few")), (), 0, 0.95)
    assert check_subgroups(found, FloorConfig(at_least=0.7, bound=bound)).passed is passed
