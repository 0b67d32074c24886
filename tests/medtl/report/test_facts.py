"""What is counted of people: their way into the parts, and who they are there."""

from __future__ import annotations

from dataclasses import replace

from medtl.records import Exclusion
from medtl.report.acquired import Acquisition
from medtl.report.facts import compose, flow
from medtl.report.words import box_lines, lost_line


def rows_of(facts, variable):
    return {row.value: row.cells for row in compose(facts) if row.variable == variable}


def with_studies(facts, change):
    studies = tuple(change(i, study) for i, study in enumerate(facts.cohort.studies))
    return replace(facts, cohort=replace(facts.cohort, studies=studies))


def with_acquisitions(facts, make):
    return replace(facts, acquisitions={s.study_id: make(i) for i, s in enumerate(facts.cohort.studies)})


def test_who_loses_one_study_and_keeps_another_does_not_leave(make_facts):
    facts = make_facts()
    left_out = tuple(Exclusion(name, "dataset", "copy_across_parts", "A copy.") for name in ("s-117", "s-118", "s-119"))
    facts = replace(facts, split=replace(facts.split, train=facts.split.train[:-3], exclusions=left_out))
    last, parts = flow(facts).steps[-1], flow(facts).parts
    assert (last.left_out[0].count, last.patients_lost) == (3, 1)  # s-116 is of the same patient as s-117
    assert [(part.name, part.patients, part.items) for part in parts] == [
        ("Training", 59, 117), ("Validation", 15, 30), ("Test", 25, 50),
    ]  # fmt: skip
    assert last.box.patients == 100


def test_whose_files_were_left_out_is_not_known(make_facts):
    assert lost_line(flow(make_facts()).steps[0]) == "Patients who leave here: not known"


def test_scans_of_nobody_known_yet_are_counted_as_scans(make_facts):
    step = flow(make_facts(scan_patients=None)).steps[1]
    assert box_lines(step.box, patients_known=True) == ("204 scans", "patients not known yet")
    assert step.patients_lost is None


def test_without_known_patients_no_box_counts_them(make_facts):
    facts = make_facts()
    made = flow(replace(facts, cohort=replace(facts.cohort, patients_known=False)))
    boxes = (*(step.box for step in made.steps), *made.parts)
    assert {box.patients for box in boxes} == {step.patients_lost for step in made.steps} == {None}
    assert {box_lines(box, patients_known=False)[1:] for box in boxes[1:]} == {("patients not known",)}


def test_one_is_not_many(make_facts):
    box = replace(flow(make_facts()).parts[0], patients=1, items=1)
    assert box_lines(box, patients_known=True) == ("1 patient", "1 study")


def test_attributes_are_counted_by_patient_and_protected(make_facts):
    def viewed(i, study):
        return replace(study, attributes={"view": "lateral" if i < 6 else "frontal"} if i < 120 else {})

    facts = with_studies(make_facts(), viewed)
    assert rows_of(facts, "view") == {
        "frontal": ("≥5", "0", "0"), "lateral": ("<5", "0", "0"), "not recorded": ("0", "15", "25"),
    }  # fmt: skip
    assert compose(facts)[-1].variable == "view"


def test_modality_is_counted_by_patient_and_protected(make_facts):
    facts = with_acquisitions(make_facts(), lambda i: Acquisition("CR" if i in (0, 1, 2) else "DX", 20, 30))
    assert rows_of(facts, "Modality") == {"DX": ("≥5", "15", "25"), "CR": ("<5", "0", "0")}
    assert rows_of(facts, "Rows × columns") == {"20 × 30": ("60", "15", "25")}
    assert not rows_of(facts, "Slice spacing, mm")


def test_many_sizes_are_told_by_their_median(make_facts):
    facts = with_acquisitions(make_facts(), lambda i: Acquisition("XC", 400 + i // 2, 300))
    assert not rows_of(facts, "Rows × columns")
    assert rows_of(facts, "Rows")["median (quartiles)"][0] == "430 (415 to 444)"
    assert rows_of(facts, "Columns")["median (quartiles)"][0] == "300 (300 to 300)"


def test_spacing_is_the_median_over_patients_each_counted_once(make_facts):
    def spaced(i):  # each of the patients has one study of 1 and one of 3 mm; a few of validation have none known
        known = i < 120 or 142 <= i < 150
        return Acquisition("CT", 512, 512, 1.0 + 2 * (i % 2), 0.703125) if known else Acquisition("CT", 512, 512)

    facts = with_acquisitions(make_facts(), spaced)
    assert rows_of(facts, "Slice spacing, mm") == {"median (quartiles)": ("2 (2 to 2)", "<5 known", "–")}
    assert rows_of(facts, "In-plane spacing, mm")["median (quartiles)"][0] == "0.703 (0.703 to 0.703)"


def test_what_is_not_known_of_scans_is_called_not_recorded(make_facts):
    facts = make_facts(acquisitions={})
    for variable in ("Modality", "Rows × columns"):
        assert rows_of(facts, variable) == {"not recorded": ("60", "15", "25")}
