"""What a report promises, on facts made here."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.errors import StorageError
from medtl.records import (
    Comparison,
    Exclusion,
    FeaturePairs,
    GateCheck,
    Score,
)
from medtl.report.checklists import SECTIONS
from medtl.report.facts import as_json, compose, count_reasons, protect_cells
from medtl.report.figures import drawable, training_curves
from medtl.report.io import write_report
from medtl.report.page import render
from medtl.report.words import growth_sentence, number, verdict

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Reader(HTMLParser):
    """Collect elements, attributes and text as a browser would."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(make_facts):
    return render(make_facts(full=True))


@pytest.mark.parametrize(
    "text",
    ["0.912", "0.865", "0.948", "0.881", "0.833", "0.437", "0.064", "0.121", "0.848", "231", "204", "r-3f9a1c20",
     "11,180,000", "Children were not studied.", "CC BY 4.0", "not_an_image", "opened once"],
)  # fmt: skip
def test_every_headline_number_is_on_the_page(page, text):
    assert text in Reader(page).text


def test_sections_come_in_the_order_a_reader_needs(page):
    assert re.findall(r'<section id="(\w+)"', page) == list(SECTIONS)
    assert list(SECTIONS)[:2] + list(SECTIONS)[-2:] == ["summary", "data", "limits", "checklists"]


def test_the_same_facts_give_the_same_bytes(tmp_path, make_facts):
    first, second = (write_report(tmp_path / name, make_facts(full=True)) for name in ("one", "two"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_other_facts_give_another_page(page, make_facts):
    assert render(make_facts(test_openings=2, full=True)) != page


def test_hostile_names_stay_text(make_facts):
    classes = ("normal", HOSTILE)
    facts = make_facts(classes=classes)
    cohort = replace(
        facts.cohort,
        studies=tuple(replace(s, scanner=HOSTILE, site=HOSTILE, sex=HOSTILE) for s in facts.cohort.studies),
        warnings=(HOSTILE,),
    )
    facts = replace(facts, title=HOSTILE, cohort=cohort, release_id=HOSTILE, release_status=HOSTILE, limits=(HOSTILE,),
                    intended_use=HOSTILE, exclusions=(Exclusion("f-1", "scans", HOSTILE, HOSTILE),),
                    provenance={HOSTILE: HOSTILE}, gate=(GateCheck(HOSTILE, None, False),))  # fmt: skip
    reader = Reader(render(facts))
    assert reader.text.count(HOSTILE) > 15
    assert not {"script", "iframe", "object", "form", "base"} & {tag for tag, _ in reader.elements}
    assert not [name for _, attrs in reader.elements for name in attrs if name.startswith("on") or name == "style"]
    assert all(attrs["src"].startswith("data:image/svg+xml;base64,") for tag, attrs in reader.elements if tag == "img")


def test_hostile_class_names_stay_text_inside_the_figures(make_facts):
    reader = Reader(render(make_facts(classes=("normal", HOSTILE), full=True)))
    sources = [attrs["src"] for tag, attrs in reader.elements if tag == "img" and "svg" in attrs["src"][:20]]
    assert len(sources) == 11
    for source in sources:
        svg = Reader(base64.b64decode(source.partition(",")[2]).decode())
        assert "script" not in {tag for tag, _ in svg.elements}


@settings(max_examples=6, deadline=None)
@given(st.text(max_size=40), st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_in_a_name_leaves_the_structure_alone(make_facts, title, name):
    facts = make_facts(classes=("other", f"x{name}"), scratch=False, title=title)
    plain = make_facts(classes=("other", "x"), scratch=False, title="t")
    shape = [[(tag, sorted(attrs)) for tag, attrs in Reader(render(f)).elements] for f in (facts, plain)]
    assert shape[0] == shape[1]


def test_braces_in_a_class_name_are_braces(make_facts):
    assert "Of 100 studies with “x{0}”" in render(make_facts(classes=("other", "x{0}")))


def test_directional_overrides_cannot_turn_a_name_around(make_facts):
    assert "\u202e" not in render(make_facts(title="benign \u202etnangilam"))


def test_nothing_is_fetched(page):
    for tag, attrs in Reader(page).elements:
        for name in {"src", "href", "srcset", "action", "data", "poster", "xlink:href"} & set(attrs):
            assert attrs[name].startswith(("#", "data:")), (tag, name)
    assert "@import" not in page
    assert "url(" not in page


def test_the_policy_allows_exactly_the_one_style_sheet(page):
    style = page.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(a["content"] for t, a in Reader(page).elements if t == "meta" and "http-equiv" in a)
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_every_image_has_words_and_every_table_a_caption(page):
    elements = Reader(page).elements
    assert all(len(attrs["alt"]) > 20 for tag, attrs in elements if tag == "img")
    tags = [tag for tag, _ in elements]
    assert tags.count("table") == tags.count("caption") > 8


def test_what_is_not_estimable_says_why(page):
    assert "not estimable: no healthy patient was cleared" in Reader(page).text


def test_a_missing_headline_is_a_dash_and_not_zero(make_facts):
    facts = make_facts()
    scores = tuple(
        replace(s, value=None, low=None, high=None, note="one class only") if s.metric == "auroc" else s
        for s in facts.evaluation.scores
    )
    page = render(replace(facts, evaluation=replace(facts.evaluation, scores=scores)))
    assert '<p class="value none">–</p>\n<p class="span">not estimable: one class only</p>' in page


def test_an_auroc_whose_interval_holds_a_half_is_called_chance(make_facts):
    facts = make_facts()
    scores = tuple(replace(s, low=0.48) if s.metric == "auroc" else s for s in facts.evaluation.scores)
    page = render(replace(facts, evaluation=replace(facts.evaluation, scores=scores)))
    assert "Not shown to be better than chance" in page


def test_a_single_model_has_a_page_that_claims_nothing_about_transfer(make_facts):
    text = Reader(render(make_facts(scratch=False))).text
    assert "cannot say whether transfer helped" in text
    assert "Did transfer help?" not in text


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_many_classes_are_shown_each_with_its_mean(task, make_facts):
    reader = Reader(render(make_facts(task, ("effusion", "mass", "nodule"))))
    assert "Mean over 3 classes" in reader.text
    assert "AUROC, mean over classes" in reader.text
    assert [a["class"] for t, a in reader.elements if t == "table"].count("narrow") == 1


def test_one_class_never_stands_for_the_mean_of_many(make_facts):
    facts = make_facts("multilabel", ("effusion", "mass"))
    scores = tuple(s for s in facts.evaluation.scores if s.label != "macro")
    page = render(replace(facts, evaluation=replace(facts.evaluation, scores=scores)))
    assert page.count('<p class="span">not computed</p>') == 3


def test_unknown_people_are_called_not_recorded(make_facts):
    rows = compose(make_facts(demographics=False))
    assert {row.value for row in rows} == {"not recorded"}
    assert next(row for row in rows if row.variable == "Age, years").cells == ("–", "–", "–")


@pytest.mark.parametrize(
    ("counts", "cells"),
    [
        ([0, 7, 1200], ["0", "7", "1,200"]),
        ([3, 40, 9], ["<5", "40", "≥5"]),
        ([3, 4, 40], ["<5", "<5", "40"]),
        ([2], ["<5"]),
    ],
)
def test_small_cells_cannot_be_read_or_told_from_the_total(counts, cells):
    assert protect_cells(counts) == cells


@given(st.lists(st.integers(0, 30), max_size=8))
def test_no_protected_cell_shows_fewer_than_five(counts):
    assert not {"1", "2", "3", "4"} & set(protect_cells(counts))


@pytest.mark.parametrize(
    ("value", "low", "high", "metric", "expected"),
    [
        (0.06, 0.01, 0.12, "auroc", "helped"),
        (-0.06, -0.12, -0.01, "auroc", "hurt"),
        (0.06, -0.01, 0.12, "auroc", "no clear difference"),
        (0.06, 0.0, 0.12, "auroc", "no clear difference"),
        (-0.06, -0.12, -0.01, "brier", "helped"),
        (None, None, None, "auroc", "not estimable"),
        (0.06, None, None, "auroc", "not estimable"),
    ],
)
def test_the_verdict_is_honest(value, low, high, metric, expected, make_facts):
    score = Score("difference", "macro", value, low, high, 50, 25)
    assert verdict(Comparison(metric, "transfer", "scratch", score, score)) == expected
    comparison = replace(make_facts().comparison, difference=score, metric=metric)
    said = Reader(render(make_facts(comparison=comparison))).text
    start = {"not estimable": "Whether transfer helped cannot be said"}.get(expected, expected.capitalize())
    assert (start if expected not in ("helped", "hurt") else f"Transfer {expected}: ") in said


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.000"), (0.0001, "<0.001"), (-0.0001, ">−0.001"), (-0.25, "−0.250"), (0.9125, "0.912")],
)
def test_numbers_have_three_decimals_and_never_hide_as_zero(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"release_status": "refused", "gate": (GateCheck("auroc >= 0.99", 0.9, False),)}, "1 of 1 gate conditions"),
        ({"test_openings": 3}, "opened 3 times"),
        ({"intended_use": None}, "No intended use was stated"),
    ],
)
def test_what_must_not_be_missed_is_a_warning(changes, words, make_facts):
    alarms = render(make_facts(**changes)).partition('<ul class="alarms">')[2].partition("</ul>")[0]
    assert words in alarms


def test_patients_are_not_counted_where_they_are_not_known(make_facts):
    cohort = replace(make_facts().cohort, patients_known=False)
    page = render(make_facts(cohort=cohort))
    assert "Patients are not known" in page.partition('<ul class="alarms">')[2].partition("</ul>")[0]
    said = Reader(page).text
    assert not re.search(r"\d patients", said.replace("The test part holds 25 patients only", ""))


def test_the_flow_counts_patients_first_from_scans_to_parts(page):
    steps = page.partition('<ol class="flow"')[2].partition("</ol>")[0]
    boxes = [
        re.sub(r"<[^>]+>", " ", box).split("  ") for box in re.findall(r'class="box[^>]*>(.*?)</div>', steps, re.S)
    ]
    assert [[line.strip() for line in box if line.strip()] for box in boxes] == [
        ["Files found", "231 files"],
        ["Scans decoded", "102 patients", "204 scans"],
        ["Studies with a label", "100 patients", "200 studies"],
        ["Training", "60 patients", "120 studies"],
        ["Validation", "15 patients", "30 studies"],
        ["Test", "25 patients", "50 studies"],
    ]
    assert re.findall(r"Patients who leave here: ([\w ]+)", steps) == ["not known", "2"]


def test_a_clean_run_has_no_warning(page):
    assert '<ul class="alarms">' not in page


def test_paths_of_the_machine_are_in_neither_file(tmp_path, make_facts):
    for path in write_report(tmp_path, make_facts()):
        assert "/home/anna" not in path.read_text()


def test_the_json_holds_the_facts_and_no_study(tmp_path, make_facts):
    _, path = write_report(tmp_path, make_facts())
    record = json.loads(path.read_text())
    assert record["data"]["studies"] == 200
    assert record["data"]["flow"]["steps"][1] == {
        "box": {"name": "Scans decoded", "items": 204, "unit": "scans", "patients": 102},
        "left_out": [
            {"stage": "studies", "code": "no_label", "count": 1, "reason": "The label table has no row for this image."}
        ],
        "patients_lost": 2,
    }
    assert [part["patients"] for part in record["data"]["flow"]["parts"]] == [60, 15, 25]
    assert record["scratch"]["comparison"]["difference"]["value"] == 0.064
    assert record["trainings"]["scratch"]["epochs"] == 9 and "improving" in record["trainings"]["cautions"][0]
    assert record["data"]["exclusions"][0] == {
        "stage": "scans", "code": "not_an_image", "count": 24, "reason": "The file holds no image.",
    }  # fmt: skip
    assert not re.search(r'"[sp]-\d', path.read_text())


def test_not_a_number_becomes_null_in_json(make_facts):
    assert as_json(make_facts(resources={"seconds": float("nan")}))["resources"] == {"seconds": None}


def test_an_exclusion_handed_on_is_counted_once(make_facts):
    facts = make_facts()
    again = replace(facts, exclusions=(*facts.exclusions, *facts.cohort.exclusions))
    assert as_json(again)["data"]["exclusions"] == as_json(facts)["data"]["exclusions"]


def test_a_code_is_explained_by_its_commonest_wording():
    items = [Exclusion(str(i), "scans", "odd", reason) for i, reason in enumerate(("b", "a", "b"))]
    assert [(r.count, r.reason) for r in count_reasons(items)] == [(3, "b")]


def test_names_in_plots_are_not_mathematics_and_always_drawable(make_facts):
    assert drawable("$\\frac{$ 肺炎") == "$\\frac{$ □□"
    checkpoint = make_facts(full=True).checkpoint
    history = tuple(replace(epoch, phase="$\\frac{$ 肺炎") for epoch in checkpoint.history)
    assert "<svg" in training_curves(replace(checkpoint, history=history))


def test_a_folder_that_cannot_be_written_says_what_to_try(tmp_path, make_facts):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Name another folder"):
        write_report(tmp_path / "file", make_facts())


def test_the_split_says_how_look_alikes_were_looked_for_and_what_could_not_be(make_facts):
    facts = make_facts()
    assert "Nearly the same picture, by pixels alone" in Reader(render(facts)).text
    proof = replace(facts.proof, by_features=FeaturePairs(2, 0.01, 0.97), notes=("3 images are too plain.",))
    text = Reader(render(replace(facts, proof=proof))).text
    assert "by pixels and by a network's features" in text and "3 images are too plain." in text


def test_the_learning_curve_is_drawn_and_says_what_it_was_measured_on(page, make_facts):
    told = Reader(page)
    assert "0.714 [0.664, 0.744]" in told.text
    assert "Fewer sizes than asked for: Nothing is trained on fewer than 15 patients." in told.text
    assert "Measured on validation" in told.text
    assert (
        "More patients still helped: with 60 patients instead of 30, AUROC on validation is higher by 0.058"
        in told.text
    )
    drawn = [found["alt"] for tag, found in told.elements if tag == "img" and found["alt"].startswith("Learning curve")]
    assert drawn == [
        "Learning curve: AUROC on validation over the number of training patients; the figures are in the table above."
    ]
    points = as_json(make_facts(full=True))["learning_curve"]["points"]
    assert [(one["patients"], one["score"]["value"]) for one in points] == [(15, 0.714), (30, 0.803), (60, 0.861)]


def test_a_page_without_a_learning_curve_says_how_to_ask_for_one(make_facts):
    told = Reader(render(make_facts())).text
    assert "report.learning_curve: 4" in told
    assert "Fewer training patients" not in told


@pytest.mark.parametrize(
    ("value", "low", "high", "says"),
    [
        (0.058, 0.011, 0.104, "More patients still helped: "),
        (0.01, -0.02, 0.04, "Whether more patients help is not clear: "),
        (-0.05, -0.09, -0.01, "More patients did harm: "),
        (None, None, None, "What 60 patients give over 30 cannot be said: "),
    ],
)
def test_the_gain_of_more_patients_is_said_as_far_as_its_interval_allows(make_growth, value, low, high, says):
    curve = make_growth()
    assert curve.gain is not None
    curve = replace(curve, gain=replace(curve.gain, value=value, low=low, high=high, note="not estimable: one class"))
    assert growth_sentence(curve, "95").startswith(says)
    assert growth_sentence(replace(curve, gain=None), "95") == ""


def test_points_without_an_interval_are_tabulated_and_not_drawn(make_facts, make_growth):
    whole = make_growth()
    lacking = replace(whole.points[0], score=replace(whole.points[0].score, value=None, note="one class only"))
    told = Reader(render(make_facts(growth=replace(whole, points=(lacking, whole.points[-1])))))
    assert "one class only" in told.text
    assert not [found for tag, found in told.elements if tag == "img" and "Learning curve" in found["alt"]]
