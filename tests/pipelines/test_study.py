"""A study: the same patients for every strategy, smaller parts within larger ones, one page."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from medtl.audit import AuditLog
from medtl.config import Config
from medtl.errors import ConfigError, SplitError
from medtl.model.surgery import source_network
from medtl.records import Cohort, Score, Split, Study, Trial
from medtl.report.study import cautions, learning_curve, render, verdict
from pipelines.contenders import OWN, curve_sizes, fewer_patients, with_strategy

KINDS = ((1, 0), (0, 1))  # well, ill


def cohort(patients: int, ill_every: int = 3) -> tuple[Cohort, Split]:
    studies = tuple(
        Study(
            f"s{p:03d}{i}",
            f"c{p}{i}",
            f"p{p}",
            (int(p % ill_every != 0), int(p % ill_every == 0)),
            f"{p * 7919 % 1009:04d}{i}",
        )
        for p in range(patients)
        for i in range(2)
    )
    names = tuple(study.study_id for study in studies)
    groups = {study.study_id: study.patient for study in studies}
    return Cohort("binary", ("well", "ill"), studies), Split(names[:-8], names[-8:-4], names[-4:], groups, False)


@settings(deadline=None, derandomize=True)
@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 5))
def test_a_smaller_training_part_lies_within_every_larger_one(small: int, more: int, seed: int) -> None:
    known, split = cohort(34)
    large = min(30, small + more)
    try:
        less, much = (fewer_patients(known, split, n, seed) for n in (small, large))
    except SplitError:
        assert small < 5, "only very few patients lack a kind"
        return
    assert set(less.train) <= set(much.train) <= set(split.train)
    assert len({split.groups[s] for s in less.train}) == small
    assert (less.val, less.test) == (split.val, split.test)
    ill = len({s.patient for s in known.studies if s.study_id in less.train and s.target[1] == 1})
    assert abs(ill - small / 3) <= 1, "kinds keep their proportion"


def test_too_many_patients_and_too_few_are_refused() -> None:
    known, split = cohort(34)
    with pytest.raises(SplitError, match="holds 30 patients; 31"):
        fewer_patients(known, split, 31, 0)
    with pytest.raises(SplitError, match="do not hold every class"):
        fewer_patients(known, split, 1, 0)


def test_sizes_are_halved_down_to_a_few_patients() -> None:
    assert curve_sizes(66) == [4, 8, 16, 33, 66]
    assert curve_sizes(9) == [4, 9]


def test_contenders_are_the_config_with_other_phases() -> None:
    config = Config(name="x", model={"weights": "imagenet"})  # type: ignore[arg-type]
    assert with_strategy(config, OWN) == config
    assert with_strategy(config, "probe").model.phases == "probe"
    assert with_strategy(config, "scratch").model.origin == "none"
    with pytest.raises(ConfigError, match="no strategy 'probes'"):
        with_strategy(config, "probes")


def trial(name: str, low: float | None, high: float | None, patients: int = 40) -> Trial:
    auroc = Score("auroc", "x", 0.9, 0.8, 0.95, 20, 10)
    difference = None if low is None else Score("auroc difference", "macro", 0.1, low, high, 20, 10)
    return Trial(
        name,
        patients,
        2 * patients,
        patients / 40,
        {"auroc": auroc},
        difference,
        "all",
        0.01 if difference else None,
        12.0,
    )


def test_the_verdict_says_no_more_than_the_intervals() -> None:
    said = verdict(
        [
            trial("staged", 0.02, 0.2),
            trial("probe", -0.05, 0.2),
            trial("full", -0.3, -0.1),
            trial("scratch", None, None),
        ]
    )
    assert "Better than from scratch, beyond chance: staged." in said
    assert "No clear difference from scratch: probe." in said
    assert "Worse than from scratch, beyond chance: full." in said
    assert "no comparison" in verdict([trial("staged", None, None)])


def test_what_holds_for_several_strategies_is_said_once_with_their_names() -> None:
    both, one = "From scratch fell back.", "From scratch was trained for one epoch."
    trials = [replace(trial("staged", 0.02, 0.2), cautions=(both, one)), trial("probe", 0.02, 0.2),
              replace(trial("full", 0.02, 0.2), cautions=(both,))]  # fmt: skip
    assert cautions(trials) == (f"{both} (staged; full)", f"{one} (staged)")
    assert cautions(trials[:1], sizes=True) == (f"{both} (staged, 40)", f"{one} (staged, 40)")
    parts = {part: {"studies": 9, "patients": 5} for part in ("train", "val", "test")}
    facts = {"backbone": "resnet18", "weights": "w", "parts": parts, "limits": [], "test_openings": 1}
    curve = [replace(trial("staged", 0.02, 0.2, n), cautions=(one,)) for n in (10, 40)]
    page = render("A study", trials, curve, facts | {"patients_known": True})
    assert f"{one} (staged, 10; staged, 40)" in page.split("How much data")[1]
    assert page.index("Better than from scratch") < page.index("Before you believe it") < page.index("<table")
    assert page.count("Before you believe it") == 3


def test_every_line_of_a_learning_curve_has_its_strategys_name() -> None:
    alone = learning_curve([trial("staged", None, None, n) for n in (10, 40)])
    assert alone is not None and "<!-- staged -->" in alone
    assert learning_curve([trial("staged", None, None, 10)]) is None, "one size alone is no curve"


def test_the_page_shows_every_trial_and_asks_for_nothing() -> None:
    parts = {part: {"studies": 9, "patients": 5} for part in ("train", "val", "test")}
    facts = {"backbone": "resnet18", "weights": "<script>w", "parts": parts, "limits": ["One hospital."]}
    facts |= {"test_openings": 7, "patients_known": False}
    page = render(
        "A study",
        [trial("staged", 0.02, 0.2), trial("scratch", None, None)],
        [trial("staged", None, None, n) for n in (10, 40)],
        facts,
    )
    assert page.count('<img src="data:image/svg+xml;base64,') == 2
    assert "&lt;script&gt;w" in page and "<script" not in page and "opened 7 times" in page and "too narrow" in page
    assert "default-src &#39;none&#39;" in page and "0.100 [0.020, 0.200]" in page


@pytest.mark.prefect
@pytest.mark.slow
def test_a_study_trains_measures_and_counts_every_look(config_file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "ours.safetensors"
    save_file(source_network("monai_resnet10_narrow", 32).state_dict(), weights)
    command = [
        sys.executable, "-m", "pipelines.cli", "study", str(config_file), "--strategies", "config", "scratch",
        "--curve", "features", "--patients", "6", "--set", f"model.weights={weights}",
        "--set", "model.scratch_phases=[{name: s, unfreeze: all, batchnorm: with_stage}]",
        "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [t["strategy"] for t in found["strategies"]] == ["config", "scratch"]
    (caution,) = (one for one in found["strategies"][0]["cautions"] if "learned for" in one)
    assert "for one epoch, with transfer for 3." in caution and caution in Path(found["report"]).read_text()
    assert found["strategies"][1]["cautions"] == []
    assert found["strategies"][0]["difference"]["metric"] == "auroc difference"
    assert found["curve"][0]["patients"] == 6 and Path(found["report"]).is_file()
    opened = [e for e in AuditLog(tmp_path / "workspace").events() if e["action"] == "test.opened"]
    assert len(opened) == 3 == found["test_openings"]
    assert {e["details"]["purpose"] for e in opened} == {"study"}
