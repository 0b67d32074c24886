"""What is read off decoded scans: whose they are, and how they were taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medtl.records import Cohort, Scan, Study
from medtl.report.acquired import Acquisition, acquisitions, count_patients


def scan(name, patient=None, shape=(20, 30), affine=None, modality=None):
    return Scan(name, "dicom", shape, "<u2", name, (), 12, patient=patient, modality=modality, affine=affine)


def cohort(**patients):
    return Cohort("binary", ("no", "yes"), tuple(Study(f"s-{n}", n, p, (1, 0), n) for n, p in patients.items()))


def test_rows_and_columns_are_those_of_an_image_a_photograph_and_a_volume():
    turn = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    affine = tuple(map(tuple, (turn @ np.diag([0.5, 0.7, 5.0, 1])).tolist()))
    scans = (scan("a", modality="DX"), scan("b", shape=(20, 30, 3)), scan("c", None, (9, 20, 30), affine, "CT"))
    found = acquisitions(scans, cohort(a="p", b="p", c="p"))
    assert found["s-a"] == Acquisition("DX", 20, 30)
    assert found["s-b"] == Acquisition(None, 20, 30)
    assert (found["s-c"].modality, found["s-c"].size) == ("CT", "20 × 30")
    assert (found["s-c"].slice_mm, found["s-c"].in_plane_mm) == pytest.approx((5.0, 0.6))


def test_only_studies_have_an_acquisition():
    assert set(acquisitions((scan("a"), scan("left out")), cohort(a="p"))) == {"s-a"}


@pytest.mark.parametrize(
    ("scans", "patients"),
    [
        ((scan("a", "p"), scan("b", "q")), 2),
        ((scan("a", "p"), scan("b", "q"), scan("c", "r")), 3),  # who has no study is a patient all the same
        ((scan("a", "p"), scan("b", "q"), scan("c", "p")), 2),
        ((scan("a", "p"), scan("b", "q"), scan("c")), None),
        ((scan("a"), scan("b")), 2),  # named by the label table
        ((scan("a", "header"), scan("b", "q"), scan("c", "header")), 2),  # the header's name for p
    ],
)
def test_patients_of_scans_are_counted_where_every_scan_has_one(scans, patients):
    assert count_patients(scans, cohort(a="p", b="q")) == patients


def test_the_mask_of_a_study_is_of_its_patient():
    masked = replace(cohort(a="p"), studies=(replace(cohort(a="p").studies[0], mask="m", field="f"),))
    assert count_patients((scan("a"), scan("m"), scan("f")), masked) == 1
    assert count_patients((scan("a"), scan("m")), cohort(a="p")) is None
