"""What calibration, abstention, novelty, subgroups, shortcuts and the live release look like on the page."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest

from medtl.records import Case, Explanations, FeatureCheck, PairedTest, PointingFindings, Predictions, Score
from medtl.report import figures, findings
from medtl.report.facts import as_json, has_unseen_sites, score_histograms
from medtl.report.findings import no_incumbent
from medtl.report.page import bar, render
from medtl.report.tables import class_table, confusion_tables, headline_group
from medtl.report.words import METRICS, alarms, compact, metric_name, not_for

THREE = ("effusion", "mass", "nodule")
NOT_KNOWN = Score("auroc", "all", None, None, None, 3, 2, "not estimable: one class only")


@pytest.fixture(scope="module")
def facts(make_facts):
    return make_facts(full=True)


@pytest.fixture(scope="module")
def text(facts):
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", render(facts))))


@pytest.mark.parametrize(
    "said",
    ["divided by one temperature, fitted on 34 validation patients", "0.140 [0.090, 0.190]",
     "it answered 80 of 100 studies", "90 % wanted", "AUROC of noise against the test part",
     "It works less well for some: pneumonia: the AUROC is 0.060 lower for age 65 and over", "site: east",
     "“Hidden”: so few patients", "site from the features", "✓ not found", "Not worse, by the margin, than the live",
     "no study of a later part lies suspiciously near to another person's", "is 0.0142; up to 0.0031 would be",
     "DeLong, clustered by patient", "With care where age is 65 and over", "kept out of training, from 3 sites"],
)  # fmt: skip
def test_every_finding_is_on_the_page(text, said):
    assert said in text.replace("\u00a0", " ")


def test_what_was_not_examined_is_said_not_to_be(make_facts):
    text = unescape(re.sub(r"<[^>]+>", " ", render(make_facts())))
    for said in ("not examined what calibration did", "not examined when the model should not", "Subgroups were not",
                 "Shortcuts were not", "comparison with the live release was not asked for"):  # fmt: skip
        assert said in text


def test_why_no_live_release_stands_beside_it_is_said(make_facts):
    facts = make_facts()
    asked = {**facts.config, "registry": {"promotion": {"incumbent": {"metric": "auroc", "margin": 0.02}}}}
    assert "No release of this name was live" in no_incumbent(replace(facts, config=asked))
    unlike = replace(facts, config=asked, beside_note="its plan does not fit these scans")
    assert "could not be compared with: its plan does not fit" in no_incumbent(unlike)


def test_a_hidden_group_shows_no_count_and_no_figure(facts):
    table = findings.subgroup_table(facts.examination.subgroups)
    assert {row[1:] for row in table.rows if row[0] == "site: east"} == {("hidden",) * 7}


def test_groups_of_several_classes_are_told_apart(make_facts):
    found = make_facts("multilabel", THREE, full=True).examination.subgroups
    assert findings.subgroup_table(found).head[1] == "Class"
    assert {row[1] for row in findings.subgroup_table(found).rows} == set(THREE)
    assert findings.gap_table(found).head[1] == "Class"


def test_a_table_of_many_groups_is_folded_away(make_facts):
    names = tuple(f"finding {i}" for i in range(9))
    assert "<summary>All 72 groups</summary>" in render(make_facts("multilabel", names, full=True))


def test_no_difference_beyond_chance_is_not_called_equality(facts):
    found = facts.examination.subgroups
    gaps = tuple(replace(gap, difference=replace(gap.difference, low=-0.01)) for gap in found.gaps)
    said = findings.subgroup_sentence(replace(found, gaps=gaps))
    assert said.startswith("Of 9 differences between groups none is more than chance. That does not show")
    assert findings.subgroup_sentence(replace(found, gaps=())) == "No two groups could be compared."


def test_an_alarm_about_shortcuts_is_an_alarm_of_the_page(facts):
    found = replace(facts.examination.shortcuts, alarms=("The features tell the site.",))
    assert "The features tell the site." in alarms(
        replace(facts, examination=replace(facts.examination, shortcuts=found))
    )


def test_studies_too_near_to_other_peoples_are_counted_in_a_warning_and_in_the_section_of_the_split(facts):
    near = FeatureCheck(200, 0.0031, 0.0004, {"train-val": 0, "train-test": 3, "val-test": 1})
    said = replace(facts, examination=replace(facts.examination, neighbours=near))
    (warning,) = [alarm for alarm in alarms(said) if "suspiciously near" in alarm]
    assert "3 of test near one of train, 1 of test near one of val." in warning
    assert "train-val" not in warning and not [alarm for alarm in alarms(facts) if "suspiciously" in alarm]
    page = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", render(said))))
    assert f"Warning. {warning}" in page[page.index("On two sides of the split") :]
    assert as_json(said)["examination"]["neighbours"]["suspects"]["train-test"] == 3


def test_features_that_tell_nothing_are_said_to_tell_nothing():
    few = FeatureCheck(12, None, None, {}, "not estimable: fewer than 40 images")
    assert findings.neighbours_sentence(few).endswith("is not estimable: fewer than 40 images.")
    assert findings.neighbours_sentence(None).endswith("was not looked at.")


def test_a_worse_model_than_the_live_one_is_an_alarm(facts):
    assert any(
        "live now does better" in a for a in alarms(replace(facts, beside=replace(facts.beside, verdict="inferior")))
    )


@pytest.mark.parametrize(
    ("verdict", "start"),
    [("superior", "Better than the live release: the whole interval is better."),
     ("non-inferior", "Not worse, by the margin, than the live release"),
     ("inconclusive", "Not decided against the live release"), ("inferior", "Worse than the live release"),
     (None, "Whether this model is better than the live release cannot be said")],
)  # fmt: skip
def test_the_verdict_against_the_live_release_is_said_in_words(facts, verdict, start):
    assert findings.incumbent_sentence(facts, replace(facts.beside, verdict=verdict)).startswith(start)


def test_a_test_without_a_p_value_says_why(facts):
    beside = replace(facts.beside, tests=(PairedTest("McNemar", None, None, "no decisions"),))
    assert findings.paired_table(beside).rows == (("McNemar", "–", "–", "no decisions"),)
    assert findings.paired_table(replace(facts.beside, tests=())) is None


def test_what_is_not_estimable_is_never_a_number(facts):
    examined = facts.examination
    blind = replace(examined.novelty, method="none", reason="features were not kept", threshold=None, flagged=NOT_KNOWN)
    assert "are not told: features were not kept" in findings.novelty_sentence(blind)
    assert findings.novelty_table(blind).rows[0][1] == "not estimable: one class only"
    quiet = replace(examined.shortcuts, model_minus_properties=NOT_KNOWN)
    assert findings.properties_sentence(quiet).endswith("not estimable: one class only.")
    silent = replace(examined.abstention, rule=replace(examined.abstention.rule, method="none"))
    assert findings.abstention_sentence(silent).startswith("The model always answers")


def test_every_metric_of_the_house_has_a_name():
    from medtl.evaluation.metrics import METRICS as MEASURED

    assert set(MEASURED) <= set(METRICS)
    assert metric_name("positive_likelihood_ratio") == "Positive likelihood ratio"


@pytest.mark.parametrize("metric", ["positive_likelihood_ratio", "mcc", "calibration_slope", "log_loss"])
def test_a_figure_that_is_no_share_has_no_bar_from_0_to_1(metric):
    assert bar(Score(metric, "x", 0.5, 0.4, 0.6, 50, 25)) is None
    assert bar(Score("auroc", "x", 0.5, 0.4, 0.6, 50, 25)) is not None


def test_a_narrow_column_breaks_before_the_bracket_only():
    assert compact(Score("auroc", "x", 0.5, 0.4, 0.6, 50, 25)) == "0.500 [0.400,\u00a00.600]"


def test_the_main_figures_are_few_and_the_rest_is_not_lost(facts, text):
    main = [score.metric for score in headline_group(facts.evaluation).scores]
    assert main[:4] == ["auroc", "average_precision", "sensitivity", "specificity"]
    assert "mcc" not in main
    assert "Matthews correlation" in text


def test_classes_stand_side_by_side(make_facts):
    table = class_table(make_facts("multilabel", THREE).evaluation)
    assert [row[0] for row in table.rows] == list(THREE)
    assert class_table(make_facts().evaluation) is None


def test_a_multi_label_confusion_is_one_row_for_each_finding(make_facts):
    evaluation = replace(make_facts("multilabel", THREE).evaluation, confusion=((21, 4), (3, 22)) * 3)
    (table,) = confusion_tables(evaluation)
    assert table.rows[0] == ("effusion", "22", "3", "4", "21")
    assert table.head[1:3] == ("present, found", "present, missed")


def test_scores_are_counted_by_class_and_unknown_ones_are_not(make_facts):
    truth = np.array([[1, 0], [0, 1], [0, 1], [np.nan, np.nan]])
    given = Predictions(
        "test", tuple("abcd"), tuple("abcd"), truth, np.array([[0.9, 0.1], [0.38, 0.62], [0, 1], [0, 1]])
    )
    (made,) = score_histograms(make_facts(predictions=given))
    assert (sum(made.absent), sum(made.present)) == (1, 2)
    assert made.present[12] == made.present[-1] == made.absent[2] == 1


def test_a_single_study_is_in_no_file(facts):
    assert as_json(facts)["histograms"][0]["present"]
    assert not re.search(r'"[sp]-\d', str(as_json(facts)).replace("'", '"'))


def test_sites_that_were_not_trained_on_are_told(facts):
    tested = set(facts.split.test)
    studies = tuple(replace(s, site="far" if s.study_id in tested else "near") for s in facts.cohort.studies)
    moved = replace(facts, cohort=replace(facts.cohort, studies=studies))
    assert has_unseen_sites(moved)
    assert not has_unseen_sites(facts)
    assert not any("not tested there" in limit for limit in not_for(moved))
    one_unknown = (replace(studies[0], site=None), *studies[1:])
    assert not has_unseen_sites(replace(facts, cohort=replace(facts.cohort, studies=one_unknown)))


@pytest.mark.parametrize("draw", [figures.roc, figures.precision_recall, figures.decision])
def test_a_plot_without_its_curve_is_not_drawn(make_facts, draw):
    assert draw(make_facts().evaluation) is None
    assert "<svg" in draw(make_facts(full=True).evaluation)


def test_the_forest_leaves_out_what_is_hidden(facts):
    found = facts.examination.subgroups
    assert "<svg" in figures.forest(found, facts.evaluation)
    bare = tuple(replace(group, scores=()) for group in found.groups)
    assert figures.forest(replace(found, groups=bare), facts.evaluation) is None


def test_calibration_before_is_drawn_beside_after(facts):
    curves = facts.evaluation.curves
    assert len(figures.calibration(curves, curves)) > len(figures.calibration(curves))
    assert figures.calibration(()) is None


def pointing(low, high, **more):
    names = [f"{metric}{end}" for metric in ("pointing_hits", "relevance_inside") for end in ("", "_chance", "_gain")]
    scores = [Score(name, "pneumonia", 0.4, low, high, 12, 9) for name in names]
    return PointingFindings("Grad-CAM", "pneumonia", more.pop("tolerance", 0.0), *scores, **more)


def explained(*found):
    case = Case(False, "normal", "pneumonia", 0.97, "iVBORw0K", "iVBORw0K")
    return Explanations("Grad-CAM", (case,), None, pointing=found)


def test_maps_that_were_held_against_marks_say_how_often_they_hit_beside_chance(make_facts):
    found = pointing(0.1, 0.7, notes=("2 studies without a mark: left out",))
    text = unescape(re.sub(r"<[^>]+>", " ", render(make_facts(explanations=explained(found)))))
    assert "pneumonia: the highest place of a map lies in the mark more often than chance would have it." in text
    assert "Note: 2 studies without a mark: left out." in text
    for said in ("Highest place in the mark, by chance", "Share of what speaks for it in the mark, minus chance"):
        assert said in text
    assert "0.400 [0.100, 0.700]" in text.replace("\u00a0", " ")


def test_maps_without_a_mark_to_be_held_against_are_said_not_to_be(make_facts):
    text = unescape(re.sub(r"<[^>]+>", " ", render(make_facts(explanations=explained()))))
    assert "No scan of the test part came with a mask of what the model was asked about" in text
    assert "Highest place in the mark" not in text


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.1, 0.5, "not clearly more often"), (-0.4, -0.1, "mark less often"), (None, None, "not clearly more often")],
)
def test_pointing_is_said_to_beat_chance_only_where_its_interval_does(low, high, said):
    assert said in findings.pointing_sentence(pointing(low, high))


def test_pointing_that_is_not_estimable_says_why_and_a_tolerance_is_named():
    unknown = Score("pointing_hits_gain", "pneumonia", None, None, None, 0, 0, "not estimable: no study with a mark")
    assert "not estimable: no study with a mark" in findings.pointing_sentence(
        replace(pointing(0.1, 0.7), hits_gain=unknown)
    )
    assert "or at most 3 pixels beside it more often" in findings.pointing_sentence(pointing(0.1, 0.7, tolerance=3.0))


def test_the_record_holds_what_was_measured_of_maps_and_no_picture(make_facts):
    value = as_json(make_facts(explanations=explained(pointing(0.1, 0.7))))["explanations"]
    assert value["pointing"][0]["hits"]["low"] == 0.1
    assert "cases" not in value and as_json(make_facts())["explanations"] is None
