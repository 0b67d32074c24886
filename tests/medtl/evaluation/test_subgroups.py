"""Groups are judged by their own patients, small ones are not shown, and the largest gap is not chance dressed up."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from medtl.artifacts import read_record, write_record
from medtl.config import EvaluationConfig, SubgroupsConfig, UncertaintyConfig, parse_config
from medtl.errors import ConfigError
from medtl.evaluation.subgroups import (
    SHOWN,
    age_band,
    columns_of,
    examine,
    hidden_outcomes,
    hidden_sizes,
    table,
)
from medtl.records import IntArray, OperatingPoint, Predictions, Study, Subgroup, SubgroupFindings

CONFIG = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=300))
POINT = (OperatingPoint("ill", 0.5, "given", "val"),)


def predicted(n: int = 400, seed: int = 0, strength: Any = 2.0, per_patient: int = 1) -> Predictions:
    rng = np.random.default_rng(seed)
    label = (rng.random(n // per_patient) < 0.4).repeat(per_patient) * 1
    noise = rng.normal(size=n // per_patient).repeat(per_patient) + rng.normal(size=n)
    score = expit(noise + strength * (label - 0.5))
    ids, people = tuple(f"s-{i:04d}" for i in range(n)), tuple(f"p-{i // per_patient}" for i in range(n))
    return Predictions("test", ids, people, np.eye(2)[label], np.stack([1 - score, score], 1))


def found_for(test: Predictions, config: EvaluationConfig = CONFIG, **columns: Any) -> SubgroupFindings:
    return examine(test, POINT, "binary", ("well", "ill"), columns, config, 0)


def only(found: SubgroupFindings, value: str) -> Subgroup:
    (group,) = [group for group in found.groups if group.value == value]
    return group


def test_a_group_has_the_metrics_of_its_own_studies() -> None:
    test, sex = predicted(), np.array(["F", "M"]).repeat(200).tolist()
    found = found_for(test, sex=sex)
    group, scores = table(found)[0]
    truth, score = test.targets[:200, 1], test.probabilities[:200, 1]
    assert (group.value, group.n, group.patients) == ("F", 200, 200)
    assert group.prevalence == pytest.approx(truth.mean())
    values = [s.value for s in scores if s is not None]
    assert len(values) == len(SHOWN)
    assert values[:2] == pytest.approx([roc_auc_score(truth, score), (score[truth > 0.5] >= 0.5).mean()])
    assert all(s is not None and s.low is not None and s.low < s.value < s.high for s in scores[:3])  # type: ignore[operator]


def test_unknown_is_a_group_of_its_own_that_is_shown_and_not_compared() -> None:
    sex = [["F", "M", None][i % 3] for i in range(400)]
    found = found_for(predicted(), sex=sex)
    assert [group.value for group in found.groups] == ["F", "M", "unknown"]
    assert only(found, "unknown").scores
    assert found.differences == 3 and {gap.best for gap in found.gaps} | {gap.worst for gap in found.gaps} == {"F", "M"}


def test_a_column_that_nobody_recorded_is_said_and_not_shown() -> None:
    found = found_for(predicted(), site=[None] * 400)
    assert not found.groups and found.notes == ("site is not known of any study of the test part.",)


def test_images_of_one_patient_widen_the_interval() -> None:
    sex = np.array(["F", "M"]).repeat(200).tolist()
    wide, narrow = (only(found_for(predicted(per_patient=per), sex=sex), "F").scores[0] for per in (10, 1))
    assert wide.high is not None and wide.low is not None and narrow.high is not None and narrow.low is not None
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_small_group_shows_nothing_and_the_next_smallest_keeps_it_company() -> None:
    site = ["a"] * 6 + ["b"] * 94 + ["c"] * 300
    found = found_for(predicted(), site=site)
    for value in ("a", "b"):
        group = only(found, value)
        assert (group.n, group.patients, group.prevalence, group.scores, group.note) == (
            None,
            None,
            None,
            (),
            "too few",
        )
    assert only(found, "c").n == 300
    assert not found.gaps and any("2 groups show no figures" in note for note in found.notes)


def test_a_few_of_whom_nothing_is_known_hide_nobody_else() -> None:
    sex = [None] * 4 + ["F", "M"] * 198
    found = found_for(predicted(), sex=sex)
    assert only(found, "unknown").note == "too few" and only(found, "F").n == only(found, "M").n == 198
    assert len(found.gaps) == 3


def test_unknown_keeps_a_small_group_company() -> None:
    found = found_for(predicted(), site=["a"] * 6 + [None] * 94 + ["c"] * 300)
    assert [only(found, value).n for value in ("a", "unknown", "c")] == [None, None, 300]


def test_a_group_with_hardly_any_diseased_shows_its_size_alone() -> None:
    test = predicted()
    ill = np.flatnonzero(test.targets[:, 1])
    site = np.array(["a", "b", "c", "d"])[np.arange(400) % 4]
    site[ill[site[ill] == "a"][3:]] = "b"
    found = found_for(test, site=site.tolist())
    assert only(found, "a").n is not None and only(found, "a").prevalence is None
    assert sum(group.prevalence is None for group in found.groups) == 2
    assert only(found, "a").note == "too few with or without the finding"


@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 20))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_hidden_size_is_what_the_others_leave(sizes: list[int], fewest: int) -> None:
    patients = np.array(sizes)
    hidden = hidden_sizes(patients, patients >= 0, fewest)
    assert hidden[patients < fewest].all()
    assert not hidden.any() or hidden.all() or (hidden.sum() >= 2 and patients[hidden].sum() >= fewest)
    assert (patients >= fewest).any() or hidden.all()
    assert hidden.any() or (patients >= fewest).all()


@given(
    st.integers(1, 5).flatmap(
        lambda classes: st.lists(
            st.lists(st.integers(0, 25), min_size=classes, max_size=classes), min_size=1, max_size=6
        )
    ),
    st.booleans(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_hidden_outcome_follows_from_sums(rows: list[list[int]], exhaustive: bool) -> None:
    ill = np.array(rows)
    total = ill.sum(1, keepdims=True) if exhaustive else np.full((len(ill), 1), 40)
    unseen = np.repeat(total < 10, ill.shape[1], axis=1)
    hidden = hidden_outcomes(ill, total - ill, unseen, total[:, 0] >= 0, exhaustive, 5)
    assert hidden[np.minimum(ill, total - ill) < 5].all()
    if hidden.all():
        return
    secret = hidden & (ill.sum(0) > 0)
    for c in np.flatnonzero(
        secret.any(0) & (~hidden).any(0)
    ):  # a class that is hidden in all groups has no more to hide
        assert min(ill[secret[:, c], c].sum(), (total - ill)[secret[:, c], c].sum()) >= 5
    equations = [(np.indices(ill.shape)[1] == c) & secret for c in range(ill.shape[1])]
    if exhaustive:
        equations += [(np.indices(ill.shape)[0] == g) & secret for g in np.flatnonzero(~unseen[:, 0])]
    matrix = np.array([e.ravel() for e in equations], dtype=float)
    rank = np.linalg.matrix_rank(matrix)
    for cell in np.flatnonzero(secret):
        one = np.eye(ill.size)[cell]
        visible_beside = (~hidden[:, cell % ill.shape[1]]).any()
        if visible_beside:
            assert np.linalg.matrix_rank(np.vstack([matrix, one])) == rank + 1


@given(st.lists(st.integers(0, 12), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_by_trying_all_tables_a_hidden_count_could_be_another(counts: list[int]) -> None:
    ill: IntArray = np.array(counts)[:, None]
    hidden = hidden_outcomes(ill, np.full(ill.shape, 50), ill < 0, ill[:, 0] >= 0, False, 5)[:, 0]
    rest = int(ill[hidden].sum())
    tables = [t for t in product(range(rest + 1), repeat=int(hidden.sum())) if sum(t) == rest]
    if rest and hidden.sum() > 1:
        assert all(len({t[k] for t in tables}) > 1 for k in range(int(hidden.sum())))
    assert hidden.sum() != 1 or len(ill) == 1


def test_classes_of_a_group_do_not_give_each_other_away() -> None:
    ill = np.array([[3, 30, 30], [20, 20, 20], [25, 25, 25]])
    hidden = hidden_outcomes(ill, ill.sum(1, keepdims=True) - ill, ill < 0, ill[:, 0] >= 0, True, 5)
    assert hidden[0].sum() >= 2 and hidden[:, 0].sum() >= 2 and not hidden.all()


def test_a_group_that_the_model_fails_is_named_with_its_interval() -> None:
    site = np.array(["a", "b", "c"])[np.arange(600) % 3]
    test = predicted(600, strength=np.where(site == "b", 0.0, 4.0))
    found = found_for(test, site=site.tolist())
    (gap,) = [gap for gap in found.gaps if gap.metric == "auroc"]
    assert gap.worst == "b" and gap.difference.low is not None and gap.difference.low > 0.1
    assert gap.p_adjusted is not None and gap.p_adjusted < 0.01 and found.differences == 9
    assert "lower for site b" in gap.statement and gap.statement.endswith("more than chance.")


def test_where_all_groups_are_alike_the_largest_of_many_gaps_is_seldom_more_than_chance() -> None:
    config = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=100))
    alarms = []
    for seed in range(60):
        rng = np.random.default_rng([5, seed])
        test = predicted(240, seed=seed, per_patient=2)
        people = np.array([int(p[2:]) for p in test.patients])
        columns = {
            name: np.array(list("abc"))[rng.integers(3, size=120)[people]].tolist() for name in ("site", "scanner")
        }
        found = found_for(test, config, **columns)
        alarms.append(any((gap.difference.low or 0) > 0 for gap in found.gaps))
    assert np.mean(alarms) <= 0.1


def test_one_uncorrected_interval_would_cry_wolf_where_the_corrected_one_does_not() -> None:
    found = found_for(predicted(600), site=[f"site {i % 8}" for i in range(600)])
    gap = next(gap for gap in found.gaps if gap.metric == "auroc")
    assert gap.difference.value is not None and gap.difference.low is not None and gap.p_adjusted is not None
    assert found.differences == 3 * 28 and gap.p_adjusted > 0.05 and gap.difference.low < 0
    assert gap.statement.endswith("may be chance.")


def test_names_of_groups_and_the_order_of_studies_change_nothing() -> None:
    test, site = predicted(), [f"site {i % 2}" for i in range(400)]
    back = Predictions("test", test.study_ids[::-1], test.patients[::-1], test.targets[::-1], test.probabilities[::-1])
    one, other = found_for(test, site=site), found_for(back, site=site[::-1])
    for left, right in zip(one.groups, other.groups, strict=True):
        assert [s.low for s in left.scores] == pytest.approx([s.low for s in right.scores])
    assert [gap.difference.low for gap in one.gaps] == pytest.approx([gap.difference.low for gap in other.gaps])


def test_labels_are_counted_where_they_are_known() -> None:
    test = predicted()
    targets = np.stack([test.targets[:, 1], test.targets[:, 1]], 1)
    targets[:150, 0] = np.nan
    many = Predictions("test", test.study_ids, test.patients, targets, np.stack([test.probabilities[:, 1]] * 2, 1))
    points = tuple(OperatingPoint(label, 0.5, "given", "val") for label in ("mass", "edema"))
    sex = [["F", "M"][i % 2] for i in range(400)]
    found = examine(many, points, "multilabel", ("mass", "edema"), {"sex": sex}, CONFIG, 0)
    assert [(group.value, group.label, group.n) for group in found.groups] == [
        ("F", "mass", 125), ("F", "edema", 200), ("M", "mass", 125), ("M", "edema", 200),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("years", "band"), [(0, "under 18"), (17.9, "under 18"), (18, "18 to under 40"), (80, "80 and over")]
)
def test_ages_fall_into_bands(years: float, band: str) -> None:
    assert age_band(years, (18.0, 40.0, 80.0)) == band


def test_columns_come_from_studies_and_unknown_stays_unknown() -> None:
    study = Study("s-1", "x", "p-1", (0, 1), "d", sex="F", age_years=None, scanner="mri-1")
    assert columns_of([study], (18.0,)) == {"sex": ["F"], "age": [None], "site": [None], "scanner": ["mri-1"]}


def test_attributes_are_columns_beside_the_others_and_the_headers_scanner_stays() -> None:
    told = {"view": "PA", "scanner": "old one"}
    studies = [
        Study("s-1", "x", "p-1", (0, 1), "d", scanner="mri-1", attributes=told),
        Study("s-2", "y", "p-2", (0, 1), "e"),
    ]
    found = columns_of(studies, (), ("view", "scanner", "ward"))
    assert list(found) == ["sex", "age", "site", "scanner", "view", "scanner (label table)", "ward"]
    assert (found["view"], found["scanner"]) == (["PA", None], ["mri-1", None])
    assert (found["scanner (label table)"], found["ward"]) == (["old one", None], [None, None])


def test_small_groups_of_an_attribute_show_no_figures() -> None:
    views = ["PA"] * 230 + ["AP"] * 160 + ["lateral"] * 6 + [None] * 4
    studies = [
        Study(f"s-{n}", "x", f"p-{n}", (0, 1), "d", attributes={} if view is None else {"view": view})
        for n, view in enumerate(views)
    ]
    found = found_for(predicted(), **{"view": columns_of(studies, (), ("view",))["view"]})
    assert [group.value for group in found.groups] == ["AP", "PA", "lateral", "unknown"]
    assert [bool(group.scores) for group in found.groups] == [False, True, False, False]
    assert [group.n for group in found.groups] == [160, 230, None, None]


def test_edges_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ConfigError, match="age_edges ascend"):
        parse_config({"name": "x", "evaluation": {"subgroups": {"age_edges": [40, 18]}}})
    assert SubgroupsConfig(age_edges=()).age_edges == ()


def test_findings_come_back_from_their_file(tmp_path: Path) -> None:
    found = found_for(predicted(), site=["a"] * 6 + ["b"] * 94 + ["c"] * 150 + ["d"] * 150)
    write_record(tmp_path / "found.json", found)
    assert read_record(tmp_path / "found.json", SubgroupFindings) == found


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_however_few_and_odd_the_studies_are_there_is_a_table(seed: int, n: int, fewest: int) -> None:
    rng = np.random.default_rng(seed)
    test = predicted(n, seed=seed)
    site = [[None, "a", "b", "c"][k] for k in rng.integers(4, size=n)]
    limits = SubgroupsConfig(fewest_patients=fewest, fewest_of_an_outcome=fewest)
    found = found_for(test, EvaluationConfig(uncertainty=UncertaintyConfig(resamples=100), subgroups=limits), site=site)
    for group, scores in table(found):
        assert (group.n is None) or group.n >= fewest
        assert group.prevalence is not None or scores == (None,) * len(SHOWN)
