"""Label rows find their scans, or say why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from medtl.config import LabelsConfig, StudiesConfig
from medtl.errors import StudyError
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Cohort, Scan
from medtl.studies.grouping import connected
from medtl.studies.io import read_table
from medtl.studies.labels import build_cohort, rows_from_scans, rows_of

NAMES = Pseudonymiser(b"0123456789abcdef")


def scan(name: str, number: int, patient: str | None = None, uid: str | None = None, **more: Any) -> Scan:
    keys = (*NAMES.file_keys(name), *([NAMES.uid_key(uid)] if uid else []))
    return Scan(f"{number:016d}{0:016d}", "image", (4, 4), "|u1", f"px{number}", keys, 8, patient=patient, **more)


def joined(tmp_path: Path, table: str, scans: list[Scan], **options: Any) -> Cohort:
    (tmp_path / "labels.csv").write_text(table)
    loose = options.pop("image_is_patient", False)
    config = StudiesConfig(labels=LabelsConfig(**options), image_is_patient=loose)
    columns, rows = read_table(tmp_path / "labels.csv")
    return build_cohort(scans, rows_of(columns, rows, config.labels, NAMES), config)


SCANS = [scan("a/x.png", 1), scan("b/y.png", 2), scan("b/z.dcm", 3)]


def codes(cohort: Cohort) -> list[str]:
    return sorted(e.code for e in cohort.exclusions)


def test_rows_find_scans_by_path_name_or_stem(tmp_path: Path) -> None:
    table = "path,label,patient\n./a/x.png,no,1\ny.png,yes,2\nz,yes,3\n"
    cohort = joined(tmp_path, table, SCANS)
    assert codes(cohort) == []
    assert [s.target for s in cohort.studies] == [(1, 0), (0, 1), (0, 1)]
    assert cohort.task == "binary"
    assert "1" not in [s.patient for s in cohort.studies]


def test_a_name_that_two_scans_share_finds_neither(tmp_path: Path) -> None:
    scans = [scan("a/x.png", 1), scan("b/x.png", 2), scan("c/y.png", 3), scan("c/w.png", 4)]
    cohort = joined(tmp_path, "path,label,patient\nx.png,no,1\ny.png,yes,2\nw.png,no,3\n", scans)
    assert codes(cohort) == ["image_without_label", "image_without_label", "label_without_image"]


def test_a_study_uid_finds_all_its_scans(tmp_path: Path) -> None:
    scans = [scan("1", 1, uid="1.2"), scan("2", 2, uid="1.2"), scan("3", 3, uid="1.3")]
    cohort = joined(tmp_path, "uid,label,patient\n1.2,no,a\n1.3,yes,b\n", scans, uid="uid")
    assert len(cohort.studies) == 3


def test_each_missing_half_is_an_exclusion(tmp_path: Path) -> None:
    table = "path,label,patient\na/x.png,no,1\nb/y.png,yes,2\nnowhere.png,no,3\n"
    assert codes(joined(tmp_path, table, SCANS)) == ["image_without_label", "label_without_image"]


def test_blank_unknown_and_contradictory_labels_are_exclusions(tmp_path: Path) -> None:
    scans = [scan(f"{n}.png", n) for n in range(6)]
    table = "path,label,patient\n0,no,0\n1,yes,1\n2,,2\n3,perhaps,3\n4,no,4\n4,yes,4\n5,no,5\n5,no,6\n"
    cohort = joined(tmp_path, table, scans, classes=("no", "yes"))
    assert codes(cohort) == ["blank_label", "conflicting_labels", "conflicting_patients", "unknown_class"]


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no column 'label' .*did you mean 'labels'\?.*path, labels"):
        joined(tmp_path, "path,labels\nx,1\n", SCANS)


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="one class only"):
        joined(tmp_path, "path,label,patient\na/x.png,no,1\nb/y.png,no,2\n", SCANS)


def test_no_match_at_all_says_what_a_path_should_be(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="No labelled scan is left"):
        joined(tmp_path, "path,label,patient\nq,no,1\nr,yes,2\n", SCANS)


def test_unknown_patients_are_refused_unless_allowed_and_then_said_loudly(tmp_path: Path) -> None:
    table = "path,label\na/x.png,no\nb/y.png,yes\n"
    with pytest.raises(StudyError, match=r"--set studies\.image_is_patient=true"):
        joined(tmp_path, table, SCANS)
    cohort = joined(tmp_path, table, SCANS, image_is_patient=True)
    assert not cohort.patients_known
    assert "PATIENTS ARE UNKNOWN for 2 of 2" in cohort.warnings[0]
    assert len({s.patient for s in cohort.studies}) == 2


def test_the_headers_patient_is_used_where_the_table_has_none(tmp_path: Path) -> None:
    scans = [scan("x", 1, patient="p-1"), scan("y", 2, patient="p-1"), scan("z", 3, patient="p-2")]
    cohort = joined(tmp_path, "path,label\nx,no\ny,no\nz,yes\n", scans, patient=None)
    assert [s.patient for s in cohort.studies] == ["p-1", "p-1", "p-2"]
    assert cohort.patients_known


def test_two_names_of_one_patient_are_one_patient(tmp_path: Path) -> None:
    scans = [scan("x", 1, patient="p-1"), scan("y", 2, patient="p-1"), scan("z", 3, patient="p-2")]
    cohort = joined(tmp_path, "path,label,patient\nx,no,A\ny,no,B\nz,yes,C\n", scans)
    assert cohort.studies[0].patient == cohort.studies[1].patient != cohort.studies[2].patient
    assert connected([("a", "b"), ("c", "b"), ("d", "e")]) == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "d"}


def test_named_groups_are_pseudonyms_by_column_and_a_blank_cell_links_nothing(tmp_path: Path) -> None:
    table = "path,label,patient,lesion,source\na/x.png,no,1,7,7\nb/y.png,yes,2,7,\nz,yes,3,,7\n"
    first, second, third = (s.groups for s in joined(tmp_path, table, SCANS, groups=("lesion", "source")).studies)
    assert first == tuple(sorted((*second, *third)))
    assert len(set(first)) == 2 and all(name.startswith("g-") and name != "g-7" for name in first)
    with pytest.raises(StudyError, match=r"no column 'lesions' \(studies.labels.groups\); did you mean 'lesion'"):
        joined(tmp_path, table, SCANS, groups=("lesions",))


PEOPLE = [scan(f"{n}.png", n) for n in range(1, 31)]


def wards(cells: list[str]) -> str:
    rows = [f"{n},{'yes' if n % 2 else 'no'},{n},{cell}" for n, cell in enumerate(cells, 1)]
    return "\n".join(["path,label,patient,ward", *rows]) + "\n"


def test_attributes_are_kept_in_the_tables_own_words_and_a_blank_cell_is_not_recorded(tmp_path: Path) -> None:
    table = "path,label,patient,view,ward\na/x.png,no,1, PA ,ICU\nb/y.png,yes,2,PA,\nz,yes,3, ,ICU\n"
    found = {s.study_id: s.attributes for s in joined(tmp_path, table, SCANS, attributes=("view", "ward")).studies}
    assert list(found.values()) == [{"view": "PA", "ward": "ICU"}, {"view": "PA"}, {"ward": "ICU"}]
    assert all(study.attributes == {} for study in joined(tmp_path, table, SCANS).studies)


def test_an_attribute_that_two_rows_of_a_scan_contradict_is_not_recorded(tmp_path: Path) -> None:
    table = "path,label,patient,view,ward\nx,no,1,PA,ICU\nx,no,1,AP,\ny,yes,2,PA,ICU\nz,yes,3,PA,ICU\n"
    first = joined(tmp_path, table, SCANS, attributes=("view", "ward")).studies[0]
    assert first.attributes == {"ward": "ICU"}


def test_a_missing_attribute_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"'wards' \(studies.labels.attributes\); did you mean 'ward'"):
        joined(tmp_path, wards(["A"] * 30), PEOPLE, attributes=("wards",))


def test_an_attribute_of_more_than_twenty_values_is_refused_and_none_is_named(tmp_path: Path) -> None:
    names = [f"Jane {n % 20}" for n in range(30)]
    assert len(joined(tmp_path, wards(names), PEOPLE, attributes=("ward",)).studies) == 30
    with pytest.raises(StudyError, match=r"'ward' .* has 21 different values, more than 20") as refused:
        joined(tmp_path, wards(["Jane Doe", *names[1:], *names[:1]]), PEOPLE, attributes=("ward",))
    assert "Jane" not in str(refused.value)


def test_an_attribute_that_no_two_patients_share_is_refused_however_few_they_are(tmp_path: Path) -> None:
    scans = [scan(f"{n}.png", n, patient=f"p-{n // 2}") for n in range(2, 8)]
    table = "path,label,ward\n" + "".join(f"{n},{n % 2},Doe {n // 2}\n" for n in range(2, 8))
    with pytest.raises(StudyError, match="No value of the column 'ward'") as refused:
        joined(tmp_path, table, scans, attributes=("ward",))
    assert "Doe" not in str(refused.value)
    shared = table.replace("Doe 2", "Doe 1")
    assert len(joined(tmp_path, shared, scans, attributes=("ward",)).studies) == 6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attributes": ("Patient",)}, "'Patient' cannot be one of attributes"),
        ({"attributes": ("sex",)}, "another key of studies.labels"),
        ({"attributes": ("lesion",), "groups": ("lesion",)}, "'lesion' cannot"),
        ({"attributes": ("view", "view")}, "'view' is twice"),
        ({"attributes": ("view",), "table": None}, "give table too"),
        ({"attributes": tuple("abcdefghi")}, "at most 8"),
    ],
)
def test_attributes_that_are_something_else_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        LabelsConfig(**options)


def test_a_scan_of_two_rows_has_the_groups_of_both_and_its_dicom_study(tmp_path: Path) -> None:
    table = "path,label,patient,lesion\nx,no,1,a\nx,no,1,b\ny,yes,2,b\n"
    scans = [scan("x", 1, study="s-abc"), scan("y", 2)]
    first, second = joined(tmp_path, table, scans, groups=("lesion",)).studies
    assert set(second.groups) < set(first.groups) and len(first.groups) == 2
    assert (first.exam, second.exam) == ("s-abc", None)


def test_several_label_columns_are_a_multilabel_task(tmp_path: Path) -> None:
    table = "path,mass,fluid,patient\na/x.png,1,0,1\nb/y.png,0,,2\nz,,,3\n"
    cohort = joined(tmp_path, table, SCANS, label=("mass", "fluid"))
    assert cohort.task == "multilabel"
    assert [s.target for s in cohort.studies] == [(1, 0), (0, None)]
    assert codes(cohort) == ["blank_label"]


def test_labels_inside_the_source_get_the_configs_names() -> None:
    scans = [scan(str(n), n, label=(n % 2,), part="train") for n in range(4)]
    config = StudiesConfig(labels=LabelsConfig(table=None, classes=("no", "yes")), image_is_patient=True)
    cohort = build_cohort(scans, rows_from_scans(scans), config)
    assert cohort.classes == ("no", "yes")
    assert [s.target[1] for s in cohort.studies] == [0, 1, 0, 1]
    assert {s.part for s in cohort.studies} == {"train"}


def test_a_number_is_no_class_where_the_table_has_names(tmp_path: Path) -> None:
    scans = [scan(f"{n}.png", n) for n in range(4)]
    table = "path,label,patient\n0,no,0\n1,yes,1\n2,1,2\n3,0,3\n"
    cohort = joined(tmp_path, table, scans, classes=("no", "yes"))
    assert codes(cohort) == ["unknown_class", "unknown_class"]
    assert [s.target for s in cohort.studies] == [(1, 0), (0, 1)]


@pytest.mark.parametrize("classes", [("no", "yes"), ("0", "1"), None])
def test_a_number_is_a_class_where_the_table_has_numbers_alone(tmp_path: Path, classes: tuple[str, str] | None) -> None:
    cohort = joined(tmp_path, "path,label,patient\na/x.png,0,1\nb/y.png,1,2\nz,1,3\n", SCANS, classes=classes)
    assert [s.target for s in cohort.studies] == [(1, 0), (0, 1), (0, 1)]
    assert cohort.classes == (classes or ("0", "1"))


@pytest.mark.parametrize("text", ["\ufeffpath;label\nx;1\n", "path\tlabel\nx\t1\n", "path,label\r\nx,1\r\n"])
def test_tables_as_hospitals_write_them_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    assert read_table(tmp_path / "t.csv") == (("path", "label"), ({"path": "x", "label": "1"},))


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"path,label\nx\n", "row 2"), (b"path,label\n", "no rows"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_tables_that_cannot_be_read_say_why(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(StudyError, match=reason):
        read_table(tmp_path / "t.csv")
    with pytest.raises(StudyError, match=r"studies\.labels\.table"):
        read_table(tmp_path / "missing.csv")


def test_two_names_of_one_patient_are_one_patient_also_beside_unknown_ones(tmp_path: Path) -> None:
    scans = [scan("x", 1, patient="p-1"), scan("y", 2, patient="p-1"), scan("z", 3)]
    cohort = joined(tmp_path, "path,label,patient\nx,no,A\ny,no,\nz,yes,\n", scans, image_is_patient=True)
    patients = [s.patient for s in cohort.studies]
    assert patients[0] == patients[1] != patients[2]
    assert "for 1 of 3" in cohort.warnings[0]


def test_two_parts_for_one_image_are_a_contradiction(tmp_path: Path) -> None:
    table = "path,label,patient,split\na/x.png,no,1,train\na/x.png,no,1,test\nb/y.png,yes,2,train\nz,no,3,Dev\n"
    cohort = joined(tmp_path, table, SCANS, split="split")
    assert codes(cohort) == ["conflicting_parts"]
    assert [s.part for s in cohort.studies] == ["train", "val"]


def test_a_part_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not train, val or test"):
        joined(tmp_path, "path,label,patient,split\na/x.png,no,1,later\n", SCANS, split="split")


def test_a_digit_that_is_no_number_is_a_class_like_any_other(tmp_path: Path) -> None:
    cohort = joined(tmp_path, "path,label,patient\na/x.png,²,1\nb/y.png,10,2\nz,9,3\n", SCANS)
    assert cohort.classes == ("9", "10", "²")


def test_nothing_in_a_cohort_is_what_the_table_said_of_a_person_or_a_file(tmp_path: Path) -> None:
    table = (
        "path,label,patient,age,sex\na/x.png,no,Jane Doe,97,female\nb/y.png,yes,John Roe,?,m\nq.png,no,Q Public,4,x\n"
    )
    cohort = joined(tmp_path, table, SCANS, age="age", sex="sex")
    assert not any(word in repr(cohort) for word in ("Jane", "Roe", "Public", "x.png", "y.png", "q.png"))
    assert [(s.age_years, s.sex) for s in cohort.studies] == [(90.0, "F"), (None, "M")]


PLACE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def test_a_volume_is_left_out_of_images_by_name_and_a_mask_is_none_of_them(tmp_path: Path) -> None:
    others = [scan("v.nii", 4, affine=PLACE), scan("m.dcm", 5, affine=PLACE, mask_of="x", region="1 liver")]
    table = "path,label,patient\nx.png,no,1\ny.png,yes,2\nz,yes,3\nv.nii,no,4\n"
    cohort = joined(tmp_path, table, SCANS + others)
    assert (len(cohort.studies), codes(cohort)) == (3, ["volume"])


def test_volumes_are_learned_from_and_the_localiser_beside_one_is_not(tmp_path: Path) -> None:
    table = "uid,label,patient\n1.2,no,a\n1.3,yes,b\n"
    volumes = [scan("1", 1, uid="1.2", affine=PLACE), scan("2", 2, uid="1.3", affine=PLACE)]
    localisers = [scan("3", 3, uid="1.2"), scan("4", 4, uid="1.3")]
    cohort = joined(tmp_path, table, [*volumes, *localisers, scan("5", 5)], uid="uid")
    assert {study.scan_id for study in cohort.studies} == {volume.scan_id for volume in volumes}
    assert codes(cohort) == ["image", "image", "image_without_label"]


BOX = ("x0", "y0", "x1", "y1")


def boxed(tmp_path: Path, *boxes: str, **more: Any) -> Cohort:
    """Join wide images, (4, 6), with their boxes."""
    scans = [scan(f"{n}.png", n, **more) for n in range(len(boxes))]
    wide = [replace(one, shape=(4, 6, 3)) if not one.is_volume else one for one in scans]
    rows = [f"{n},{'yes' if n % 2 else 'no'},{n},{cells}" for n, cells in enumerate(boxes)]
    return joined(tmp_path, "path,label,patient,x0,y0,x1,y1\n" + "\n".join(rows) + "\n", wide, box=BOX)


def test_a_box_is_read_and_four_blank_cells_are_none(tmp_path: Path) -> None:
    cohort = boxed(tmp_path, "0,0,6,4", ", , ,", " 1.5,2,3,2.5 ")
    assert [s.box for s in cohort.studies] == [(0.0, 0.0, 6.0, 4.0), None, (1.5, 2.0, 3.0, 2.5)]
    assert codes(cohort) == []
    plain = joined(tmp_path, "path,label,patient\na/x.png,no,1\nb/y.png,yes,2\n", SCANS)
    assert [s.box for s in plain.studies] == [None, None]


@pytest.mark.parametrize(
    ("cells", "code"),
    [
        ("a,0,1,1", "box_unreadable"),
        ("0,0,1,", "box_unreadable"),
        ("nan,0,1,1", "box_unreadable"),
        ("0,0,inf,1", "box_unreadable"),
        ("2,0,2,1", "box_unreadable"),
        ("2,0,1,1", "box_unreadable"),
        ("0,3,1,2", "box_unreadable"),
        ("-0.5,0,1,1", "box_outside"),
        ("0,-1,1,1", "box_outside"),
        ("0,0,6.1,1", "box_outside"),
        ("0,0,1,4.1", "box_outside"),
        ("0,0,4,6", "box_outside"),
    ],
)
def test_a_box_that_cannot_be_laid_on_its_image_is_an_exclusion(tmp_path: Path, cells: str, code: str) -> None:
    cohort = boxed(tmp_path, ",,,", "1,1,2,2", cells)
    assert (len(cohort.studies), codes(cohort)) == (2, [code])


def test_a_box_of_a_volume_or_of_several_images_is_an_exclusion(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="box_unclear"):
        boxed(tmp_path, "0,0,1,1", "0,0,1,1", affine=PLACE)
    scans = [scan("1", 1, uid="1.2"), scan("2", 2, uid="1.2"), scan("3", 3, uid="1.3"), scan("4", 4, uid="1.4")]
    table = "uid,label,patient,x0,y0,x1,y1\n1.2,no,a,0,0,1,1\n1.3,yes,b,0,0,1,1\n1.4,no,c,,,,\n"
    cohort = joined(tmp_path, table, scans, uid="uid", box=BOX)
    assert (len(cohort.studies), codes(cohort)) == (2, ["box_unclear", "box_unclear"])


def test_two_boxes_for_one_image_are_a_contradiction_and_one_given_twice_is_not(tmp_path: Path) -> None:
    rows = ("x,no,1,0,0,1,1", "x,no,1,0,0,1,1.0", "y,yes,2,0,0,1,1", "y,yes,2,1,1,2,2", "z,yes,3,,,,")
    cohort = joined(tmp_path, "\n".join(("path,label,patient,x0,y0,x1,y1", *rows)), SCANS, box=BOX)
    assert (len(cohort.studies), codes(cohort)) == (2, ["conflicting_labels"])


def test_a_missing_column_of_a_box_is_named_and_masks_have_no_boxes(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no column 'x0' \(studies\.labels\.box\)"):
        joined(tmp_path, "path,label,patient\na/x.png,no,1\n", SCANS, box=BOX)
    with pytest.raises(ValueError, match="box is of a diagnosis"):
        LabelsConfig(mask="mask", structures={"liver": 1}, box=BOX)
