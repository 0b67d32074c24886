"""The checklists: complete by number, answered by what the page says, and honest about the rest."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from medtl.records import Case, Explanations, PointingFindings, Score
from medtl.report import checklists as module
from medtl.report.acquired import Acquisition
from medtl.report.checklists import SECTIONS, checklists
from medtl.report.io import write_report


def answers(facts, name):
    return {item.number: item.answer for item in next(c for c in checklists(facts) if c.name == name).items}


@pytest.fixture(scope="module")
def full(make_facts):
    return make_facts(full=True)


def test_every_item_is_there_once(full):
    tripod = (
        "1 2 3a 3b 3c 4 5a 5b 6a 6b 6c 7 8a 8b 8c 9a 9b 9c 10 11 12a 12b 12c 12d 12e 12f 12g 13 14 15 16 17 18a 18b "
    )
    tripod += "18c 18d 18e 18f 19 20a 20b 20c 21 22 23a 23b 24 25 26 27a 27b 27c"
    stard = [str(n) for n in range(1, 41) if n not in (15, 16, 17, 26, 40)]
    stard += ["15a", "15b", "15c", "15d", "16a", "16b", "16c", "17a", "17b", "26a", "26b", "40a", "40b"]
    assert list(answers(full, "CLAIM 2024")) == [str(n) for n in range(1, 45)]
    assert list(answers(full, "TRIPOD+AI")) == tripod.split()
    assert sorted(answers(full, "STARD-AI")) == sorted(stard)
    assert [len(c.items) for c in checklists(full)] == [44, 52, 48, 14]


def test_every_answer_names_a_section_of_the_page(full):
    for checklist in checklists(full):
        for item in checklist.items:
            assert set(item.answer.sections) <= set(SECTIONS)
            assert item.answer.sections or not item.answer.remark


@pytest.mark.parametrize(
    ("name", "number"),
    [("CLAIM 2024", "14"), ("CLAIM 2024", "30"), ("CLAIM 2024", "33"), ("CLAIM 2024", "44"), ("TRIPOD+AI", "5b"),
     ("TRIPOD+AI", "17"), ("STARD-AI", "6"), ("STARD-AI", "29"), ("STARD-AI", "32")],
)  # fmt: skip
def test_what_the_page_does_not_say_is_not_reported(full, name, number):
    assert answers(full, name)[number].sections == ()


def test_maps_count_as_held_against_marks_only_where_they_were(full):
    case, score = Case(True, "a", "a", 0.9, "", ""), Score("pointing_hits", "a", 0.5, 0.1, 0.9, 4, 4)
    found = Explanations("Grad-CAM", (case,), None)
    pointed = replace(found, pointing=(PointingFindings("Grad-CAM", "a", 0.0, *(score for _ in range(6))),))
    for held, said in ((found, "not compared with marks"), (pointed, "held against what was drawn")):
        assert said in answers(replace(full, explanations=held), "CLAIM 2024")["31"].remark


def test_without_findings_fairness_is_not_reported(make_facts, full):
    assert answers(full, "TRIPOD+AI")["14"].sections == ("subgroups",)
    assert answers(make_facts(), "TRIPOD+AI")["14"].sections == ()
    hidden = tuple(replace(group, scores=()) for group in full.examination.subgroups.groups)
    groups = replace(full.examination.subgroups, groups=hidden)
    nobody = replace(full, examination=replace(full.examination, subgroups=groups))
    assert answers(nobody, "TRIPOD+AI")["14"].sections == ()


def test_an_external_test_part_is_reported_as_one(full):
    tested = set(full.split.test)
    studies = tuple(replace(s, site="far" if s.study_id in tested else "near") for s in full.cohort.studies)
    assert answers(replace(full, cohort=replace(full.cohort, studies=studies)), "CLAIM 2024")["33"].sections


@pytest.mark.parametrize(
    ("change", "name", "number"),
    [({"intended_use": None}, "CLAIM 2024", "41"), ({"limits": ()}, "Model card", "2"),
     ({"demographics": False}, "CLAIM 2024", "36"), ({"demographics": False}, "CLAIM 2024", "7")],
)  # fmt: skip
def test_what_nobody_stated_is_not_reported(make_facts, full, change, name, number):
    assert answers(full, name)[number].sections
    assert not answers(make_facts(full=True, **change), name)[number].sections


@pytest.mark.parametrize(
    ("patients_known", "scan_patients", "said"),
    [(True, 102, "patients and studies, from the decoded scans"), (True, None, "patients from the studies"),
     (False, 102, "patients are not known")],
)  # fmt: skip
def test_the_flow_says_from_where_on_patients_are_counted(full, patients_known, scan_patients, said):
    facts = replace(full, cohort=replace(full.cohort, patients_known=patients_known), scan_patients=scan_patients)
    assert said in answers(facts, "STARD-AI")["24"].remark


def test_acquisition_is_reported_by_what_is_recorded_of_it(full, make_facts):
    assert answers(full, "CLAIM 2024")["13"].remark.startswith("scanners, modality and")
    nobody = make_facts(demographics=False)
    assert not answers(nobody, "CLAIM 2024")["13"].sections
    sized = {study.study_id: Acquisition(None, 512, 512) for study in nobody.cohort.studies}
    assert not answers(replace(nobody, acquisitions=sized), "CLAIM 2024")["13"].sections
    volumes = {name: replace(one, slice_mm=5.0, in_plane_mm=0.7) for name, one in sized.items()}
    assert "spacing" in answers(replace(nobody, acquisitions=volumes), "CLAIM 2024")["13"].remark


def test_no_topic_is_answered_that_nothing_asks_for(full):
    asked = {topic for items in module._CHECKLISTS.values() for _, _, topic in items}
    answered = module._always() | module._where_known(full) | module._where_examined(full)
    assert set(answered) <= asked


def test_the_record_holds_the_checklists(tmp_path, make_facts):
    record = json.loads(write_report(tmp_path, make_facts())[1].read_text())
    assert record["checklists"]["CLAIM 2024"][19] == {
        "item": "20", "asks": "Level at which parts are disjoint", "sections": ["split"], "remark": "",
    }  # fmt: skip
