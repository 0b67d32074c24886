"""What was drawn as DICOM SEG or RT structures becomes the mask of a study; real files, read by intake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydantic import ValidationError
from pydicom import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from ct_files import ct_series, write_series
from medtl.config import Config, LabelsConfig, parse_config
from medtl.dataset.grid import codes_of
from medtl.dataset.io import read_grid, read_volumes
from medtl.errors import StudyError
from medtl.records import Cohort, Structure
from medtl.regions import paint
from medtl.scans.masks import STRUCTURES
from medtl.scans.segments import PixelStore
from medtl.studies.io import read_cohort
from pipelines import segmenting, steps

hd = pytest.importorskip("highdicom")

Array = np.ndarray[Any, Any]
SPACE = (6, 16, 20)  # slices, rows, columns
WHOLE, CORE = (slice(1, 5), slice(4, 12), slice(5, 15)), (slice(2, 4), slice(6, 10), slice(8, 12))
ASIDE = (slice(1, 5), slice(13, 15), slice(2, 18))
RUN = """
name: drawn
workspace: {workspace}
scans: {{source: {folder}/scans, read: volumes, stable_seconds: 0}}
studies: {{labels: {{path: image, mask: mask, patient: patient, structures: {{tumour: [tumour, core], core: core}}}}}}
dataset: {{split: {{val: 0.25, test: 0.25}}, grid: {{filters: 8}}}}
model:
  weights: none
  threads: 1
  phases: [{{name: all, unfreeze: all, epochs: 30, lr: 1.0e-2, decay: 1.0, batchnorm: with_stage}}]
evaluation: {{uncertainty: {{resamples: 200}}}}
registry: {{promotion: {{gate: [{{metric: dice, bound: value, at_least: 0.0}}]}}}}
"""


def inside(*boxes: tuple[slice, ...], space: tuple[int, int, int] = SPACE) -> Array:
    drawn = np.zeros((*space, len(boxes)), np.uint8)
    for number, box in enumerate(boxes):
        drawn[(*box, number)] = 1
    return drawn


def write_ct(folder: Path, patient: str, volume: Array | None = None) -> list[Dataset]:
    if volume is None:
        volume = np.random.default_rng(len(patient)).integers(0, 2000, SPACE)
    slices = ct_series(volume, PatientID=patient, RescaleIntercept=-1000)
    write_series(folder, slices)
    return slices


def write_seg(path: Path, images: list[Dataset], names: tuple[str, ...], *boxes: tuple[slice, ...]) -> None:
    described = [
        hd.seg.SegmentDescription(number, name, codes.SCT.Tissue, codes.SCT.Bone, algorithm_type="MANUAL")
        for number, name in enumerate(names, 1)
    ]
    drawn = inside(*boxes, space=(len(images), images[0].Rows, images[0].Columns))
    hd.seg.Segmentation(
        images, drawn, "BINARY", described, generate_uid(), 2, generate_uid(), 1, "M", "M", "1", "1"
    ).save_as(path)


def write_structures(path: Path, images: list[Dataset], names: tuple[str, ...], *boxes: tuple[slice, ...]) -> None:
    rt = Dataset()
    rt.file_meta = FileMetaDataset()
    rt.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    rt.SOPClassUID = rt.file_meta.MediaStorageSOPClassUID = STRUCTURES
    rt.SOPInstanceUID = rt.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    rt.PatientID, rt.StudyInstanceUID, rt.SeriesInstanceUID = images[0].PatientID, generate_uid(), generate_uid()
    rt.Modality = "RTSTRUCT"
    of_series = Dataset()
    of_series.SeriesInstanceUID = images[0].SeriesInstanceUID
    of_study = Dataset()
    of_study.RTReferencedSeriesSequence = [of_series]
    frame = Dataset()
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = images[0].FrameOfReferenceUID, [of_study]
    rt.ReferencedFrameOfReferenceSequence = [frame]
    rt.StructureSetROISequence, rt.ROIContourSequence = [], []
    for number, (name, (slices, rows, columns)) in enumerate(zip(names, boxes, strict=True), 7):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ROIGenerationAlgorithm = number, name, "MANUAL"
        roi.ReferencedFrameOfReferenceUID = images[0].FrameOfReferenceUID
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        x, y = (columns.start - 10.5, columns.stop - 10.5), (rows.start - 10.5, rows.stop - 10.5)
        for plane in range(slices.start, slices.stop):
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
            corners = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])]
            contour.ContourData = [value for corner in corners for value in (*corner, 3.0 * plane)]
            drawn.ContourSequence.append(contour)
        rt.StructureSetROISequence.append(roi)
        rt.ROIContourSequence.append(drawn)
    rt.save_as(path, enforce_file_format=True)


def configured(folder: Path, structures: dict[str, Any], **labels: Any) -> Config:
    scans = {"source": str(folder / "scans"), "key_file": str(folder / "key"), "stable_seconds": 0, "read": "volumes"}
    named = {"labels": {"path": "image", "mask": "mask", "structures": structures} | labels}
    rest = {"name": "t", "workspace": str(folder / "w"), "model": {"weights": "none"}}
    return parse_config(rest | {"scans": scans, "studies": named})


def cohort_of(config: Config) -> Cohort:
    return read_cohort(steps.build_cohort(config, steps.ingest_scans(config)).path)


def truths(config: Config) -> list[Array]:
    """Give the true codes of each study, as training and evaluation read them."""
    cohort, by_id = cohort_of(config), segmenting.scans_by_id(steps.ingest_scans(config))
    read = PixelStore(steps.pixel_folder(config))
    return [segmenting.truth_of(study, cohort, by_id, read) for study in cohort.studies]


def write_cases(
    folder: Path, write: Any, names: tuple[str, ...], *boxes: tuple[slice, ...], patients: tuple[str, ...] = ("p", "qq")
) -> None:
    for patient in patients:
        images = write_ct(folder / "scans" / f"ct-{patient}", patient)
        write(folder / "scans" / f"drawn-{patient}.dcm", images, names, *boxes)
    rows = ["image,mask,patient", *(f"ct-{patient},drawn-{patient}.dcm,{patient}" for patient in patients)]
    (folder / "scans" / "labels.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("write", [write_seg, write_structures], ids=["SEG", "RTSTRUCT"])
def test_regions_that_are_named_become_the_mask(tmp_path: Path, write: Any) -> None:
    write_cases(tmp_path, write, ("Tumour", "Duct"), WHOLE, ASIDE)
    found = truths(configured(tmp_path, {"duct": "duct", "tumour": "TUMOUR"}))
    assert len(found) == 2
    for codes_ in found:
        assert (codes_[WHOLE] == 2).all() and (codes_[ASIDE] == 1).all()
        assert int((codes_ > 0).sum()) == int(inside(WHOLE, ASIDE).sum())


def test_what_is_packed_for_training_is_what_was_drawn(tmp_path: Path) -> None:
    everybody = tuple("p" * number for number in range(1, 9))
    write_cases(tmp_path, write_seg, ("tumour", "core"), WHOLE, CORE, patients=everybody)
    config = configured(tmp_path, {"tumour": ["tumour", "core"], "core": "core"})
    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    plan = segmenting.plan_grid(config, scans, cohort, steps.split_by_patient(config, scans, cohort))
    volumes = read_volumes(segmenting.pack_volumes(config, scans, cohort, plan).path)
    assert read_grid(plan.path).overlapping and len(volumes.study_ids) == 8
    assert read_grid(plan.path).facts["shown"] == {"tumour": 5, "core": 5}  # in the training part
    for row in range(8):
        codes_ = np.asarray(volumes.codes(row))
        assert int((codes_ == 0b11).sum()) == int(inside(CORE).sum())
        assert int((codes_ > 0).sum()) == int(inside(WHOLE).sum())


def test_segments_may_be_named_by_their_numbers(tmp_path: Path) -> None:
    write_cases(tmp_path, write_seg, ("one", "two"), WHOLE, ASIDE)
    cohort = cohort_of(configured(tmp_path, {"tumour": 1, "duct": 2}))
    assert [study.target for study in cohort.studies] == [(1, 1), (1, 1)]
    assert {len(study.regions) for study in cohort.studies} == {2} and cohort.exclusions == ()


def test_a_region_within_another_is_said_to_be_part_of_it_or_refused(tmp_path: Path) -> None:
    write_cases(tmp_path, write_seg, ("tumour", "core"), WHOLE, CORE)
    with pytest.raises(StudyError, match="mask_regions_overlap"):
        cohort_of(configured(tmp_path, {"tumour": "tumour", "core": "core"}))


def test_a_part_of_the_whole_counts_for_both(tmp_path: Path) -> None:
    write_cases(tmp_path, write_structures, ("tumour", "core"), WHOLE, CORE)
    for codes_ in truths(configured(tmp_path, {"tumour": ["tumour", "core"], "core": "core"})):
        assert (codes_[CORE] == 0b11).all() and int((codes_ == 0b11).sum()) == int(inside(CORE).sum())
        assert int((codes_ > 0).sum()) == int(inside(WHOLE).sum())


def test_regions_that_nothing_names_are_refused_or_said_to_be_background(tmp_path: Path) -> None:
    write_cases(tmp_path, write_seg, ("tumour", "couch"), WHOLE, ASIDE)
    with pytest.raises(StudyError, match="mask_unknown_values"):
        cohort_of(configured(tmp_path, {"tumour": "tumour"}))
    for codes_ in truths(configured(tmp_path, {"tumour": "tumour"}, other_regions="background")):
        assert (codes_[WHOLE] == 1).all() and not codes_[ASIDE].any()
    with pytest.raises(StudyError, match="mask_empty"):
        cohort_of(configured(tmp_path, {"liver": "liver"}, other_regions="background"))


def test_the_reason_tells_which_regions_nothing_names(tmp_path: Path) -> None:
    write_cases(tmp_path, write_seg, ("tumour", "couch", "air"), WHOLE, ASIDE, ASIDE)
    images = write_ct(tmp_path / "scans" / "ct-rrr", "rrr")
    write_seg(tmp_path / "scans" / "drawn-rrr.dcm", images, ("tumour",), WHOLE)
    with (tmp_path / "scans" / "labels.csv").open("a") as table:
        table.write("ct-rrr,drawn-rrr.dcm,rrr\n")
    cohort = cohort_of(configured(tmp_path, {"tumour": "tumour"}))
    assert len(cohort.studies) == 1 and len(cohort.exclusions) == 2
    reason = cohort.exclusions[0].reason
    assert "regions of number 2, 3;" in reason and "other_regions: background" in reason and "couch" not in reason


def test_a_mask_of_values_has_no_regions_to_name(tmp_path: Path) -> None:
    write_cases(tmp_path, write_seg, ("tumour",), WHOLE)
    values = np.zeros(SPACE, np.uint8)
    values[WHOLE] = 1
    affine = np.array([[-1.0, 0, 0, 10], [0, -1.0, 0, 10], [0, 0, 3.0, 0], [0, 0, 0, 1]])  # RAS: columns, rows, slices
    nibabel.save(nibabel.Nifti1Image(values.T, affine), tmp_path / "scans" / "drawn.nii.gz")
    images = write_ct(tmp_path / "scans" / "ct-rrr", "rrr")
    assert len(images) == len(values)
    with (tmp_path / "scans" / "labels.csv").open("a") as table:
        table.write("ct-rrr,drawn.nii.gz,rrr\n")
    by_words = cohort_of(configured(tmp_path, {"tumour": "tumour"}))
    assert [one.code for one in by_words.exclusions] == ["mask_has_no_regions"] and len(by_words.studies) == 2
    assert len(cohort_of(configured(tmp_path, {"tumour": 1})).studies) == 3


def test_a_mask_of_another_image_is_refused(tmp_path: Path) -> None:
    write_cases(tmp_path, write_seg, ("tumour",), WHOLE)
    table = tmp_path / "scans" / "labels.csv"
    table.write_text("image,mask,patient\nct-p,drawn-qq.dcm,p\nct-qq,drawn-qq.dcm,qq\n")
    cohort = cohort_of(configured(tmp_path, {"tumour": "tumour"}))
    assert len(cohort.studies) == 1 and [one.code for one in cohort.exclusions] == ["mask_elsewhere"]


def test_a_bare_name_that_two_files_have_means_neither(tmp_path: Path) -> None:
    write_cases(tmp_path, write_seg, ("tumour",), WHOLE)
    images = write_ct(tmp_path / "scans" / "ct-rrr", "rrr")
    for reader, drawn in (("one", WHOLE), ("two", ASIDE)):
        (tmp_path / "scans" / reader).mkdir()
        write_seg(tmp_path / "scans" / reader / "seg.dcm", images, ("tumour",), drawn)
    table = tmp_path / "scans" / "labels.csv"
    rows, config = table.read_text(), configured(tmp_path, {"tumour": "tumour"})
    for named in ("seg.dcm", "three/seg.dcm"):
        table.write_text(f"{rows}ct-rrr,{named},rrr\n")
        assert [one.code for one in cohort_of(config).exclusions] == ["mask_missing"]
    table.write_text(f"{rows}ct-rrr,two/seg.dcm,rrr\n")
    assert sum(bool((codes_[ASIDE] == 1).all()) for codes_ in truths(config)) == 1


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ({"structures": {"a": 1, "b": "tumour"}}, "not by both"),
        ({"structures": {"a": "tumour"}, "ignore": 9}, "not by both"),
        ({"structures": {"a": ["tumour", "Tumour"]}}, "several different ones"),
    ],
)
def test_structures_are_told_in_one_way(labels: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        LabelsConfig(path="image", mask="mask", **labels)


def test_what_is_ignored_wins_over_what_it_covers() -> None:
    left, right = np.array([1, 1, 0], bool), np.array([0, 1, 1], bool)
    structures = (Structure("organ", (1,)),)
    values = paint([(left, 9), (right, 1)], structures, ignore=9)
    assert values is not None and values.tolist() == [9, 9, 1]
    assert codes_of(values, structures, 9).tolist() == [255, 255, 1]


@pytest.mark.prefect
@pytest.mark.slow
def test_a_run_learns_from_what_was_drawn_in_either_way(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), ["image,mask,patient"]
    for number in range(16):
        row, column = rng.integers(4, 16, 2)
        whole = (slice(1, 7), slice(row, row + 10), slice(column, column + 10))
        core = (slice(2, 5), slice(row + 3, row + 7), slice(column + 3, column + 7))
        volume = rng.integers(0, 400, (8, 32, 32))
        volume[whole] += 800
        volume[core] += 700
        images = write_ct(tmp_path / "scans" / f"ct{number}", f"p{number}", volume)
        write = write_seg if number % 2 else write_structures
        write(tmp_path / "scans" / f"drawn{number}.dcm", images, ("Tumour", "Core"), whole, core)
        rows.append(f"ct{number},drawn{number}.dcm,p{number}")
    (tmp_path / "scans" / "labels.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "drawn.yaml").write_text(RUN.format(workspace=tmp_path / "w", folder=tmp_path))
    command = [sys.executable, "-m", "pipelines.cli", "run", str(tmp_path / "drawn.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["split"] == {"train": 8, "val": 4, "test": 4}
    assert summary["metrics"]["dice"]["value"] > 0.8
