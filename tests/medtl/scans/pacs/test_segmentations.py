"""A segmentation that goes out is sound by an independent verifier, and an archive gives it back as it was."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from medtl.config import PacsConfig, QueryConfig, ScansConfig
from medtl.delivery.io import write_file
from medtl.delivery.masks import Algorithm, dicom_seg
from medtl.pseudonyms import Pseudonymiser
from medtl.records import GridPlan, Structure
from medtl.scans.masks import Grid, dicom_masks
from medtl.scans.nifti import as_affine
from medtl.scans.pacs.fetch import fetch

pytest.importorskip("highdicom")
pytestmark = pytest.mark.services

SHAPE = (6, 16, 16)
AFFINE = as_affine(np.array([[-0.5, 0, 0, 20], [0, -0.5, 0, -15], [0, 0, 2, 100], [0, 0, 0, 1.0]]))
ALGORITHM = Algorithm("liver-net", "r-0123456789abcdef")


def plan_of(*structures: Structure) -> GridPlan:
    three = (1, 1, 1)
    return GridPlan(
        structures, None, 3, "axial", 0, 1, three, "zscore", None, None, None, None, (), (8, 8, 8), 2, (three,),
        (three,), (4,), (), {}, {},
    )  # fmt: skip


APART = plan_of(Structure("liver", (1,)), Structure("something", (2,)))
SHARED = plan_of(Structure("whole", (1, 2)), Structure("tumour", (2,)))


@pytest.fixture
def slices(ct: Callable[..., Dataset]) -> list[Dataset]:
    return [
        ct(
            number + 1, ImagePositionPatient=[-20.0, 15.0, 100.0 + 2 * number], PixelSpacing=[0.5, 0.5],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0], SliceThickness=2.0, FrameOfReferenceUID="1.2.840.99.1",
            StudyTime="101112", PatientBirthDate="", PatientSex="F", StudyID="7", AccessionNumber="",
            ReferringPhysicianName="", PositionReferenceIndicator="", SeriesNumber=1, ImageType=["ORIGINAL", "PRIMARY"],
        )
        for number in range(SHAPE[0])
    ]  # fmt: skip


def codes_in(most: int) -> Any:
    codes = np.zeros(SHAPE, np.uint8)
    codes[1:4, 2:9, 3:12] = np.random.default_rng(0).integers(0, most + 1, (3, 7, 9))
    return codes


@pytest.mark.parametrize(("plan", "most"), [(APART, 2), (SHARED, 3), (APART, 0)], ids=["apart", "shared", "empty"])
def test_dciodvfy_finds_no_error(
    program: Callable[[str], str], slices: list[Dataset], plan: GridPlan, most: int, tmp_path: Path
) -> None:
    write_file(tmp_path / "seg.dcm", dicom_seg(codes_in(most), plan, AFFINE, slices, ALGORITHM))
    verified = subprocess.run(
        [program("dciodvfy"), str(tmp_path / "seg.dcm")], capture_output=True, text=True, check=False
    )
    assert verified.stderr.splitlines() == ["Segmentation"]  # what it was taken for, and no warning either


def test_an_archive_takes_a_segmentation_and_gives_it_back_equal(
    program: Callable[[str], str],
    orthanc: Any,
    slices: list[Dataset],
    tmp_path: Path,
    names: Pseudonymiser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_USER", "medtl")
    monkeypatch.setenv("TEST_PASSWORD", orthanc.password)
    codes = codes_in(2)
    data = dicom_seg(codes, APART, AFFINE, slices, ALGORITHM)
    write_file(tmp_path / "seg.dcm", data)
    sent = [program("storescu"), "-R", "-aec", "ORTHANC", "127.0.0.1", str(orthanc.dicom), str(tmp_path / "seg.dcm")]
    subprocess.run(sent, check=True, capture_output=True)  # -R: only what is sent is proposed

    auth = {"username_env": "TEST_USER", "password_env": "TEST_PASSWORD"}
    query = QueryConfig(modality=("SEG",))
    there = PacsConfig(kind="dicomweb", url=orthanc.url + "/dicom-web", query=query, min_free_mb=1, **auth)
    (path,) = fetch(there, names, tmp_path).folder.iterdir()
    back, own = dcmread(path), dcmread(io.BytesIO(data))
    assert back == own
    for number, mask in enumerate(dicom_masks(back, Grid(SHAPE, AFFINE, "1.2.840.99.1"), ScansConfig()), 1):
        assert (mask.values == (codes == number)).all()
