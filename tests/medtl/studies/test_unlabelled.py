"""Scans without labels become a cohort without classes; patients stay known, masks and the other kind stay out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medtl.config import LabelsConfig, StudiesConfig
from medtl.errors import StudyError
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Scan
from medtl.studies.io import read_cohort, read_table, write_cohort
from medtl.studies.labels import rows_of
from medtl.studies.unlabelled import gather, is_unlabelled, rows_of_every_scan

NAMES = Pseudonymiser(b"0123456789abcdef")
AFFINE = ((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))


def volume(name: str, number: int, patient: str | None = None, **more: Any) -> Scan:
    given = {"affine": AFFINE, **more}
    scan_id = f"{number:016d}{0:016d}"
    return Scan(scan_id, "nifti", (9, 8, 7), "<i2", f"px{number}", NAMES.file_keys(name), 12, patient=patient, **given)


def test_every_volume_of_a_folder_is_taken_but_drawn_masks_and_pictures(tmp_path: Path) -> None:
    scans = [volume("a.nii", 1, "p1"), volume("b.nii", 2, "p1"), volume("c.nii", 3, "p2")]
    others = [volume("m", 4, "p1", mask_of=scans[0].scan_id), volume("x.png", 5, "p1", affine=None)]
    cohort = gather([*scans, *others], rows_of_every_scan([*scans, *others]), StudiesConfig())
    assert [s.scan_id for s in cohort.studies] == [s.scan_id for s in scans]
    assert [s.patient for s in cohort.studies] == ["p1", "p1", "p2"]
    assert cohort.classes == () and all(s.target == () for s in cohort.studies)
    assert [e.code for e in cohort.exclusions] == ["image"]
    write_cohort(tmp_path, cohort)
    assert read_cohort(tmp_path) == cohort


def test_a_table_says_whose_scans_they_are_and_which_are_meant(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("image,patient,part\na.nii,7,train\nb.nii,8,test\n")
    config = StudiesConfig(
        labels=LabelsConfig(table=Path("cases.csv"), path="image", label=(), split="part"), image_is_patient=False
    )
    columns, rows = read_table(tmp_path / "cases.csv")
    scans = [volume("a.nii", 1), volume("b.nii", 2), volume("masks/a.nii.gz", 3)]
    cohort = gather(scans, rows_of(columns, rows, config.labels, NAMES), config)
    assert [(s.patient, s.part) for s in cohort.studies] == [
        (NAMES.name("patient", "7"), "train"), (NAMES.name("patient", "8"), "test"),
    ]  # fmt: skip
    assert [e.code for e in cohort.exclusions] == ["image_without_label"]


def test_unknown_patients_are_asked_for() -> None:
    scans = [volume("a.nii", 1), volume("b.nii", 2)]
    with pytest.raises(StudyError, match=r"studies\.image_is_patient=true"):
        gather(scans, rows_of_every_scan(scans), StudiesConfig())
    cohort = gather(scans, rows_of_every_scan(scans), StudiesConfig(image_is_patient=True))
    assert not cohort.patients_known and len({s.patient for s in cohort.studies}) == 2


def test_an_empty_folder_is_said_with_what_to_check() -> None:
    with pytest.raises(StudyError, match=r"no scan to pre-train on \(no scans\)\. Check scans\.source"):
        gather([], (), StudiesConfig())


def test_a_part_that_the_source_gave_stays() -> None:
    scan = volume("a", 1, "p", label=(1,), part="test")
    (row,) = rows_of_every_scan([scan])
    assert row.part == "test" and row.labels == ()


def test_a_study_with_labels_is_told_from_scans_without() -> None:
    assert is_unlabelled(LabelsConfig(table=None))
    assert is_unlabelled(LabelsConfig(label=()))
    assert not is_unlabelled(LabelsConfig())
    assert not is_unlabelled(LabelsConfig(label=(), mask="mask", structures={"one": 1}))
