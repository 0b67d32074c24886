"""A gate passes what it should and nothing else; a release is what was entered."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtl.artifacts import Store, write_json
from medtl.config import GateConfig, PromotionConfig
from medtl.errors import ConfigError, MedtlError, TamperedError
from medtl.records import Evaluation, Release, Score
from medtl.registry.io import Register
from medtl.registry.promotion import check, status_of


def evaluation(value: float | None, low: float | None) -> Evaluation:
    score = Score("auroc", "yes", value, low, None, 9, 9)
    return Evaluation("binary", ("no", "yes"), (score,), (), (), (), 9, 9, 100)


def gate(**condition: object) -> PromotionConfig:
    return PromotionConfig(gate=(GateConfig(metric="auroc", **condition),))  # type: ignore[arg-type]


def test_a_gate_looks_at_the_bound_it_names() -> None:
    found = evaluation(0.95, 0.85)
    assert status_of(check(found, gate(bound="low", at_least=0.8))) == "validated"
    assert status_of(check(found, gate(bound="low", at_least=0.9))) == "refused"
    assert status_of(check(found, gate(bound="value", at_least=0.9))) == "validated"
    assert status_of(check(found, gate(bound="value", at_least=0.9, at_most=0.94))) == "refused"
    assert status_of(check(found, PromotionConfig())) == "candidate"


def test_what_is_not_estimable_does_not_pass() -> None:
    assert status_of(check(evaluation(0.99, None), gate(bound="low", at_least=0.1))) == "refused"


def test_a_gate_on_an_unknown_metric_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="there are auroc"):
        check(evaluation(1, 1), PromotionConfig(gate=(GateConfig(metric="auc", at_least=0.5),)))


def release(number: int, status: str) -> Release:
    return Release(f"r-{number}", "study", status, ())  # type: ignore[arg-type]


def test_the_newest_validated_release_is_chosen_and_checked(tmp_path: Path) -> None:
    register, store = Register(tmp_path), Store(tmp_path)
    artifacts = [store.make("release", {"n": n}, lambda folder: write_json(folder / "x.json", 1)) for n in range(3)]
    for number, status in enumerate(("validated", "validated", "refused")):
        assert register.enter(release(number, status), artifacts[number])
        assert not register.enter(release(number, status), artifacts[number])
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
