"""Every file becomes a scan or an exclusion with its reason; nothing stops the batch."""

from __future__ import annotations

import errno
import gzip
import io
import logging
import os
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from medtl.artifacts import Store
from medtl.config import ScansConfig
from medtl.errors import ConfigError, MedtlError, StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Exclusion, Scan
from medtl.scans import intake, quarantine
from medtl.scans import io as io_of_scans
from medtl.scans.intake import ingest, names_of, read_exclusions, read_scans, read_sizes
from medtl.scans.io import write_readmissions
from medtl.scans.segments import PixelStore, unneeded
from medtl.scans.sources import SourceIndex, survey

NAMES = Pseudonymiser(b"0123456789abcdef")
QUIET = ScansConfig(stable_seconds=0)
Array = np.ndarray[Any, Any]


def take(folder: Path, **options: Any) -> tuple[tuple[Scan, ...], tuple[Exclusion, ...], PixelStore]:
    config = ScansConfig(**({"stable_seconds": 0} | options))
    out = folder.parent / f"out{len(list(folder.parent.iterdir()))}"
    out.mkdir()
    workspace = folder.parent / "workspace"
    ingest(survey(folder, config), config, NAMES, out, Store(workspace))
    return read_scans(out), read_exclusions(out), PixelStore(workspace / "artifacts" / "pixels")


def only(folder: Path, **options: Any) -> tuple[Scan, Array]:
    scans, exclusions, store = take(folder, **options)
    assert exclusions == ()
    (scan,) = scans
    return scan, store(scan)


def code(folder: Path, **options: Any) -> str:
    scans, exclusions, _ = take(folder, **options)
    assert scans == ()
    (exclusion,) = exclusions
    return exclusion.code


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_every_common_syntax_gives_the_same_16_bit_values(folder: Path, ramp: Array, syntax: Any, dicom: Any) -> None:
    header = dicom(ramp)
    if syntax is not None:
        header.compress(syntax)
    header.save_as(folder / "x.dcm", enforce_file_format=True)
    scan, pixels = only(folder)
    assert np.array_equal(pixels, ramp)
    assert (scan.source, scan.bits, scan.modality, scan.scanner, scan.sex, scan.age_years) == (
        "dicom", 16, "CR", "Maker Model 1", "F", 45.0,
    )  # fmt: skip


def test_rescale_makes_hounsfield_units(folder: Path, ramp: Array, dicom: Any) -> None:
    dicom(ramp, RescaleSlope=2, RescaleIntercept=-1024).save_as(folder / "x.dcm", enforce_file_format=True)
    _, pixels = only(folder)
    assert pixels.dtype == np.int16
    assert np.array_equal(pixels, ramp.astype(int) * 2 - 1024)


def test_monochrome1_is_inverted_over_the_stored_bits(folder: Path, ramp: Array, dicom: Any) -> None:
    dicom(ramp, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11).save_as(
        folder / "x.dcm", enforce_file_format=True
    )
    _, pixels = only(folder)
    assert np.array_equal(pixels, 4095 - ramp)


def test_a_window_is_applied_only_where_asked_for(folder: Path, ramp: Array, dicom: Any) -> None:
    dicom(ramp, WindowCenter=100, WindowWidth=51).save_as(folder / "x.dcm", enforce_file_format=True)
    assert np.array_equal(only(folder)[1], ramp)
    windowed = only(folder, window="header")[1]
    assert windowed[ramp <= 74].max() == 0
    assert windowed[ramp >= 125].min() == 65535
    assert np.array_equal(only(folder, window=(100, 51))[1], windowed)


def test_colour_stays_colour(folder: Path, dicom: Any) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    dicom(rgb).save_as(folder / "x.dcm", enforce_file_format=True)
    assert np.array_equal(only(folder)[1], rgb)


def test_a_16_bit_png_keeps_its_depth(folder: Path, ramp: Array) -> None:
    Image.fromarray(ramp * 80).save(folder / "x.png")
    assert np.array_equal(only(folder)[1], ramp * 80)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_png_and_tiff_are_read_whatever_they_are_called(folder: Path, kind: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "no-ending", format=kind)
    assert np.array_equal(only(folder)[1], grey)


def test_a_nifti_slice_lies_as_its_dicom_image(folder: Path) -> None:
    lps = np.arange(12, dtype=np.int16).reshape(3, 4)  # rows to the back, columns to the left
    array = lps.T[::-1, ::-1, None]  # RAS+
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "x.nii.gz")
    assert np.array_equal(only(folder)[1], lps)


def test_medmnist_archives_bring_labels_and_parts(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 3), ("test", 2)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n, dtype=np.uint8)[:, None] % 2
    np.savez(folder / "x.npz", **arrays)
    scans, _, store = take(folder)
    assert [scan.part for scan in scans] == ["train"] * 3 + ["test"] * 2
    assert [scan.label for scan in scans] == [(0,), (1,), (0,), (0,), (1,)]
    assert np.array_equal(store(scans[4]), arrays["test_images"][1])
    names = names_of(survey(folder, QUIET), folder.parent / "out1")
    assert names[scans[4].scan_id] == ["x.npz#test/1"]


def test_an_empty_file_is_named_empty(folder: Path) -> None:
    (folder / "x.dcm").touch()
    assert code(folder) == "empty_file"


def test_a_truncated_dicom_is_refused(folder: Path, ramp: Array, dicom: Any) -> None:
    buffer = io.BytesIO()
    dicom(ramp).save_as(buffer, enforce_file_format=True)
    (folder / "x.dcm").write_bytes(buffer.getvalue()[:-100])
    assert code(folder) in ("truncated", "undecodable", "no_pixels")


def test_pixel_data_shorter_than_declared_is_refused(folder: Path, ramp: Array, dicom: Any) -> None:
    dicom(ramp, Rows=65).save_as(folder / "x.dcm", enforce_file_format=True)
    assert code(folder) == "truncated"


def test_a_corrupt_png_is_refused(folder: Path, ramp: Array) -> None:
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(buffer, "PNG")
    (folder / "x.png").write_bytes(buffer.getvalue()[:60] + b"rubbish")
    assert code(folder) == "undecodable"


def test_a_header_that_asks_for_too_much_is_refused_before_allocation(folder: Path, ramp: Array, dicom: Any) -> None:
    header = dicom(ramp)
    header.compress(RLELossless)
    header.Rows = header.Columns = 65535
    header.save_as(folder / "x.dcm", enforce_file_format=True)
    assert code(folder) == "too_large"


def test_a_gzip_bomb_is_refused(folder: Path) -> None:
    header = nibabel.Nifti1Image(np.zeros((2, 2, 1), np.uint8), np.eye(4)).to_bytes()[:352]
    (folder / "x.nii.gz").write_bytes(gzip.compress(header + bytes(30_000_000)))
    assert code(folder, max_megapixels=1) == "archive_bomb"


def test_a_film_is_refused_or_by_policy_taken_frame_by_frame(folder: Path, ramp: Array, dicom: Any) -> None:
    header = dicom(ramp, NumberOfFrames=2)
    header.PixelData = ramp.tobytes() + ramp[::-1].tobytes()
    header.save_as(folder / "x.dcm", enforce_file_format=True)
    assert code(folder) == "multi_frame"
    scans, exclusions, store = take(folder, checks={"policy": {"multi_frame": "accept"}})
    assert exclusions == ()
    assert all(np.array_equal(store(scan), frame) for scan, frame in zip(scans, (ramp, ramp[::-1]), strict=True))
    assert len({scan.scan_id for scan in scans}) == 2


def test_a_volume_is_refused_where_images_are_wanted(folder: Path) -> None:
    values = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "x.nii")
    assert code(folder, read="images") == "volume"
    assert only(folder)[0].is_volume


def test_nan_and_blank_images_are_refused(folder: Path) -> None:
    values = np.ones((4, 4, 1), np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "blank.nii")
    values[0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "nan.nii")
    _, exclusions, _ = take(folder)
    assert {e.code for e in exclusions} == {"blank", "non_finite"}


def test_a_link_is_not_followed(folder: Path, ramp: Array, tmp_path: Path) -> None:
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked-folder").symlink_to(tmp_path)
    _, exclusions, _ = take(folder)
    assert [e.code for e in exclusions] == ["not_a_file", "not_a_file"]


def test_the_same_bytes_twice_are_one_scan_that_answers_to_both_names(folder: Path, ramp: Array, dicom: Any) -> None:
    for name in ("a.dcm", "b.dcm"):
        dicom(ramp, SOPInstanceUID="1.2.3").save_as(folder / name, enforce_file_format=True)
    (folder / "b.dcm").write_bytes((folder / "a.dcm").read_bytes())
    scans, exclusions, _ = take(folder)
    assert [e.code for e in exclusions] == ["duplicate_file"]
    assert {NAMES.file_keys("a.dcm")[0], NAMES.file_keys("b.dcm")[0]} <= set(scans[0].keys)


def test_no_name_or_number_of_a_patient_is_written(tmp_path: Path, folder: Path, ramp: Array, dicom: Any) -> None:
    dicom(ramp, AccessionNumber="ACC-77").save_as(folder / "DOE_JANE.dcm", enforce_file_format=True)
    out = folder.parent / "out"
    out.mkdir()
    ingest(survey(folder, QUIET), QUIET, NAMES, out, Store(tmp_path / "workspace"))
    written = b"".join(
        path.read_bytes() for path in folder.parent.rglob("*") if path.is_file() and folder not in path.parents
    )
    for raw in (b"DOE", b"JANE", b"ID-1", b"ACC-77"):
        assert raw not in written


def test_a_series_becomes_one_volume_in_the_order_of_its_places(folder: Path, series: Any) -> None:
    paths = series(folder / "ct")
    scan, voxels = only(folder)
    assert (scan.shape, scan.dtype, scan.files, scan.is_volume) == ((12, 64, 72), "<i2", 12, True)
    assert (scan.slope, scan.intercept) == (1.0, -1024.0)
    for index, path in enumerate(paths):
        assert np.array_equal(voxels[index], dcmread(path).pixel_array)
    assert scan.affine is not None
    first = np.array(scan.affine) @ [0, 0, 0, 1]
    last = np.array(scan.affine) @ [71, 63, 11, 1]
    assert np.allclose(first[:3], [10.0, -20.0, 5.0])
    assert np.allclose(last[:3], [10.0 - 71 * 0.75, -20.0 - 63 * 0.5, 5.0 + 11 * 2.5])
    assert set(NAMES.file_keys("ct")) <= set(scan.keys)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless])
def test_a_volume_is_the_same_in_every_syntax(folder: Path, series: Any, syntax: Any) -> None:
    paths = series(folder / "ct", SeriesDescription="x" * 20)
    wanted = only(folder)[1].copy()
    for path in paths:
        header = Dataset()
        header.update(dcmread(path))
        header.file_meta = dcmread(path).file_meta
        if syntax.is_compressed:
            header.compress(syntax)
        else:
            values = dcmread(path).pixel_array
            header.PixelData = values.astype("<i2" if syntax.is_little_endian else ">i2").tobytes()
            header.file_meta.TransferSyntaxUID = syntax
        header.save_as(path, enforce_file_format=True)
    assert np.array_equal(only(folder)[1], wanted)


def test_two_series_in_one_folder_are_two_volumes(folder: Path, series: Any) -> None:
    series(folder / "a")
    for path in series(folder / "b"):
        path.rename(folder / "a" / f"other-{path.name}")
    scans, exclusions, _ = take(folder)
    assert ([scan.files for scan in scans], exclusions) == ([12, 12], ())


def test_a_zip_archive_gives_the_same_volume_as_its_folder(folder: Path, series: Any) -> None:
    paths = series(folder / "ct")
    wanted = only(folder)[1].copy()
    with zipfile.ZipFile(folder / "ct.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.name)
            path.unlink()
    assert np.array_equal(only(folder)[1], wanted)


HOSTILE: dict[str, Callable[[list[Path]], None]] = {
    "missing_slices": lambda paths: [path.unlink() for path in paths[4:7]] and None,
    "decimated": lambda paths: [path.unlink() for path in paths[1::2]] and None,
    "duplicate_position": lambda paths: _change(paths[11:], ImagePositionPatient=[-10.0, 20.0, 30.0]),
    "missing_rescale": lambda paths: _change(paths, RescaleSlope=None, RescaleIntercept=None),
    "inconsistent_rescale": lambda paths: _change(paths[5:6], RescaleIntercept=-1000),
    "foreign_patient": lambda paths: _change(paths[5:6], PatientID="OTHER"),
    "truncated": lambda paths: paths[5].write_bytes(paths[5].read_bytes()[:-100]) and None,
    "uneven_gaps": lambda paths: _change(paths[11:], ImagePositionPatient=[-10.0, 20.0, 33.3]),
    "localizer": lambda paths: _change(paths, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    "burned_in": lambda paths: _change(paths, BurnedInAnnotation="YES"),
    "bad_geometry": lambda paths: _change(paths, PixelSpacing=[-1, 0.5]),
    "repeated_pixels": lambda paths: _change(paths[5:6], PixelData=dcmread(paths[2]).PixelData),
    "mixed_orientation": lambda paths: _change(paths[5:6], ImageOrientationPatient=[0, 1, 0, 0, 0, 1]),
}


@pytest.mark.parametrize("wanted", HOSTILE)
def test_a_broken_series_never_becomes_a_volume(folder: Path, series: Any, wanted: str) -> None:
    series(folder / "good")
    HOSTILE[wanted](series(folder / "bad"))
    scans, exclusions, _ = take(folder)
    assert [scan.files for scan in scans if scan.is_volume] == [12]
    assert wanted in {exclusion.code for exclusion in exclusions}
    assert sum(scan.files for scan in scans) + sum(e.files for e in exclusions) == len(list(folder.rglob("*.dcm")))


def test_instance_numbers_and_file_names_change_nothing(folder: Path, series: Any) -> None:
    paths = series(folder / "ct")
    wanted = only(folder)[1].copy()
    _change(paths, InstanceNumber=1)
    assert np.array_equal(only(folder)[1], wanted)


def test_a_copy_of_a_slice_is_dropped_only_by_policy(folder: Path, series: Any) -> None:
    paths = series(folder / "ct")
    wanted = only(folder)[1].copy()
    header = dcmread(paths[3])
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    header.save_as(folder / "ct" / "copy.dcm")
    assert code(folder) == "duplicate_pixels"
    scan, voxels = only(folder, checks={"policy": {"duplicate_pixels": "repair"}})
    assert np.array_equal(voxels, wanted)
    assert scan.findings == ("duplicate_pixels",)


def test_pet_values_are_scaled_slice_by_slice(folder: Path, series: Any) -> None:
    paths = series(folder / "pet", Modality="PT")
    for number, path in enumerate(paths):
        _change([path], RescaleSlope=0.5 + number, RescaleIntercept=0)
    scan, voxels = only(folder)
    assert (scan.dtype, scan.slope, scan.findings) == ("<f4", 1.0, ("scaled_by_slice",))
    for number, path in enumerate(paths):
        assert np.allclose(voxels[number], dcmread(path).pixel_array * (0.5 + number))


def test_slices_can_be_taken_as_images(folder: Path, series: Any) -> None:
    series(folder / "ct")
    scans, exclusions, _ = take(folder, read="images")
    assert (len(scans), exclusions) == (12, ())
    assert not any(scan.is_volume for scan in scans)


def test_what_was_read_is_not_read_again(folder: Path, series: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    series(folder / "a")
    first = take(folder)[0]
    (newer,) = (path for path in [folder / "x.png"])
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(newer)
    looked: list[str] = []
    look = intake.io.look
    monkeypatch.setattr(intake.io, "look", lambda file: looked.append(file.relative) or look(file))
    again = take(folder)[0]
    assert looked == ["x.png"]
    assert set(first) < set(again)
    assert len(again) == 2


def test_a_slice_that_arrives_later_opens_its_series_and_no_other(folder: Path, series: Any) -> None:
    series(folder / "whole")
    paths = series(folder / "late")
    kept = paths[5].read_bytes()
    paths[5].unlink()
    assert [e.code for e in take(folder)[1]] == ["missing_slices"]
    paths[5].write_bytes(kept)
    scans, exclusions, _ = take(folder)
    assert ([scan.files for scan in scans], exclusions) == ([12, 12], ())
    paths[5].unlink()
    assert [e.code for e in take(folder)[1]] == ["missing_slices"]


def test_a_person_takes_an_item_back_for_these_bytes_and_this_code_only(
    folder: Path, series: Any, tmp_path: Path
) -> None:
    paths = series(folder / "ct")
    _change(paths, BurnedInAnnotation="YES")
    (refused,) = take(folder)[1]
    members = tuple(file.sha256 or "" for file in survey(folder, QUIET))
    write_readmissions(tmp_path, quarantine.readmit((), refused, members, "looked at it: a protocol name"))
    words = quarantine.readmissions(tmp_path)

    def again() -> tuple[Scan, ...]:
        out = tmp_path / f"again{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        ingest(survey(folder, QUIET), QUIET, NAMES, out, Store(tmp_path / "workspace"), words)
        return read_scans(out)

    assert [scan.findings for scan in again()] == [("burned_in",)]
    _change(paths[:1], PatientAge="046Y")
    assert again() == ()


def test_an_item_with_two_reasons_is_taken_back_for_both(folder: Path, series: Any, tmp_path: Path) -> None:
    series(folder / "ct", BurnedInAnnotation="YES", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    members = tuple(file.sha256 or "" for file in survey(folder, QUIET))
    words: tuple[quarantine.Readmission, ...] = ()
    for number in range(3):
        out = tmp_path / f"again{number}"
        out.mkdir()
        ingest(survey(folder, QUIET), QUIET, NAMES, out, Store(tmp_path / "workspace"), words)
        if number < 2:
            (refused,) = read_exclusions(out)
            words = quarantine.readmit(words, refused, members, "looked at it")
    assert {word.code for word in words} == {"burned_in", "localizer"}
    (scan,) = read_scans(out)
    assert {"burned_in", "localizer"} <= set(scan.findings)
    assert read_sizes(out) == {scan.scan_id: sum(path.stat().st_size for path in (folder / "ct").iterdir())}


def test_the_policy_says_what_becomes_of_a_damaged_file(folder: Path, series: Any) -> None:
    paths = series(folder / "ct")
    paths[5].write_bytes(paths[5].read_bytes()[:-100])
    for action in ("reject", "quarantine"):
        _, exclusions, _ = take(folder, checks={"policy": {"truncated": action}})
        assert {e.action for e in exclusions if e.code == "truncated"} == {action}


def test_nobody_can_talk_a_damaged_series_whole(folder: Path, series: Any, tmp_path: Path) -> None:
    series(folder / "ct")[4].unlink()
    (refused,) = take(folder)[1]
    with pytest.raises(ConfigError, match="missing_slices"):
        quarantine.readmit((), refused, ("x",), "please")


def test_a_policy_that_a_code_does_not_allow_is_refused(folder: Path, series: Any) -> None:
    series(folder / "ct")
    with pytest.raises(ConfigError, match="missing_slices"):
        take(folder, checks={"policy": {"missing_slices": "accept"}})


def _change(paths: list[Path], **attributes: Any) -> None:
    for path in paths:
        header = dcmread(path)
        for keyword, value in attributes.items():
            if value is None:
                delattr(header, keyword)
            else:
                setattr(header, keyword, value)
        header.save_as(path)


def test_a_missing_or_empty_source_says_what_to_try(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StorageError, match=r"--set scans\.source"):
        survey(None, ScansConfig())
    with pytest.raises(StorageError, match="does not exist"):
        survey(tmp_path / "nowhere", ScansConfig())
    with pytest.raises(StorageError, match="holds no files"):
        survey(folder, ScansConfig())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2300), st.integers(0, 255)), min_size=1, max_size=12))
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_cost_that_file_alone(tmp_path_factory: Any, changes: list[tuple[int, int]], dicom: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "in"
    folder.mkdir()
    ramp = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32)
    buffer = io.BytesIO()
    dicom(ramp).save_as(buffer, enforce_file_format=True)
    data = bytearray(buffer.getvalue())
    for place, value in changes:
        data[place % len(data)] = value
    (folder / "bad.dcm").write_bytes(bytes(data))
    Image.fromarray(ramp.astype(np.uint8)).save(folder / "good.png")
    scans, exclusions, _ = take(folder)
    assert "image" in {scan.source for scan in scans}
    assert len(scans) + len(exclusions) == 2


def _segmentation(paths: list[Path], inside: Array) -> Dataset:
    """Draw one segment on a series, as a clinical tool would send it."""
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from highdicom.seg.enum import SegmentAlgorithmTypeValues, SegmentationTypeValues
    from highdicom.sr.coding import CodedConcept

    organ = CodedConcept("10200004", "SCT", "Liver")
    tool = AlgorithmIdentificationSequence("tool", CodedConcept("123109", "DCM", "Manual Processing"), "1")
    described = SegmentDescription(1, "liver", organ, organ, SegmentAlgorithmTypeValues.AUTOMATIC, tool)
    return Segmentation(
        source_images=[dcmread(path) for path in paths],
        pixel_array=inside,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[described],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="x",
        manufacturer_model_name="x",
        software_versions="1",
        device_serial_number="1",
    )


COMPLETE = {
    "PatientBirthDate": "",
    "AccessionNumber": "",
    "StudyID": "",
    "StudyDate": "20260101",
    "StudyTime": "101500",
    "ReferringPhysicianName": "",
}


@pytest.mark.filterwarnings("ignore")  # highdicom's own
def test_a_segmentation_lies_on_the_volume_it_was_drawn_on(folder: Path, series: Any) -> None:
    paths = series(folder / "ct", **COMPLETE)
    inside = np.zeros((12, 64, 72), np.uint8)
    inside[3:6, 10:20, 30:50] = 1
    _segmentation(paths, inside).save_as(folder / "seg.dcm")
    scans, exclusions, store = take(folder)
    assert exclusions == ()
    (image,) = (scan for scan in scans if scan.mask_of is None)
    (mask,) = (scan for scan in scans if scan.mask_of is not None)
    assert (mask.mask_of, mask.region, mask.affine) == (image.scan_id, "1 liver", image.affine)
    assert np.array_equal(store(mask), inside)
    assert take(folder)[0] == scans
    for path in paths:
        path.unlink()
    assert [e.code for e in take(folder)[1]] == ["mask_without_image"]


def test_a_lookup_table_without_content_and_a_bare_data_set_are_read(folder: Path, ramp: Array, dicom: Any) -> None:
    empty = Dataset()
    empty.add_new("ModalityLUTType", "LO", "")
    header = dicom(ramp, ModalityLUTSequence=[empty], RescaleSlope=None, RescaleIntercept=None)
    header.save_as(folder / "lut.dcm", enforce_file_format=True)
    bare = dicom(ramp + 1)
    del bare.file_meta
    bare.save_as(folder / "bare", implicit_vr=True, little_endian=True)
    scans, exclusions, store = take(folder)
    assert exclusions == ()
    assert sorted(int(store(scan)[0, 0]) for scan in scans) == [0, 1]


def test_a_volume_behind_a_lookup_table_is_not_taken_for_plain_values(folder: Path, series: Any) -> None:
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, 16])
    table.add_new("ModalityLUTType", "LO", "HU")
    table.add_new("LUTData", "OW", np.arange(4096, dtype=np.uint16).tobytes())
    series(folder / "ct", ModalityLUTSequence=[table])
    assert code(folder) == "modality_lut"


def test_values_that_end_at_a_higher_bit_are_moved_down(folder: Path, ramp: Array, dicom: Any) -> None:
    dicom((ramp << 4).astype(np.uint16), BitsStored=12, HighBit=15).save_as(folder / "x.dcm", enforce_file_format=True)
    assert np.array_equal(only(folder)[1], ramp)


def test_a_high_bit_that_contradicts_the_values_is_refused(folder: Path, ramp: Array, dicom: Any, series: Any) -> None:
    dicom(ramp, BitsStored=12, HighBit=15).save_as(folder / "x.dcm", enforce_file_format=True)
    series(folder / "ct", BitsStored=12, HighBit=15)
    assert [one.code for one in take(folder)[1]] == ["out_of_range", "out_of_range"]


def test_compressed_values_that_end_at_a_higher_bit_are_refused(folder: Path, series: Any) -> None:
    for path in series(folder / "ct", BitsStored=12, HighBit=11, PixelRepresentation=0):
        header = dcmread(path)
        header.compress(JPEGLSLossless)
        header.HighBit = 15
        header.save_as(path)
    assert code(folder) == "bad_header"


def test_pixels_that_rows_do_not_account_for_are_refused(folder: Path, series: Any) -> None:
    _change(series(folder / "ct"), Rows=32)
    assert code(folder) == "extra_bytes"


def test_a_file_touched_while_it_was_read_is_taken_next_time(folder: Path, series: Any, tmp_path: Path) -> None:
    paths = series(folder / "ct")
    files = survey(folder, QUIET)
    os.utime(paths[3])
    codes = []
    for number, seen in enumerate((files, survey(folder, QUIET), survey(folder, QUIET))):
        (tmp_path / str(number)).mkdir()
        ingest(seen, QUIET, NAMES, tmp_path / str(number), Store(tmp_path / "workspace"))
        codes.append([one.code for one in read_exclusions(tmp_path / str(number))])
    assert codes == [["changed"], [], []]


def test_an_archive_that_was_replaced_is_read_anew(folder: Path, series: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with zipfile.ZipFile(folder / "ct.zip", "w") as archive:
            for path in series(tmp_path / name):
                archive.write(path, f"{name}/{path.name}")
        scans, exclusions, _ = take(folder)
        assert ([scan.files for scan in scans], exclusions) == ([12], ())


ECHOES = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5", "Modality": "MR"}


def test_what_a_series_became_is_stored_whole_or_not_at_all(
    folder: Path, series: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for echo in (10, 20, 30):
        series(folder / str(echo), EchoTime=echo, **ECHOES)
    monkeypatch.setattr(intake, "_SEGMENT_UNITS", 1)
    assert len(take(folder)[0]) == 3
    assert len(list((tmp_path / "workspace" / "artifacts" / "pixels").glob("[!.]*"))) == 1


def test_pixels_that_are_gone_are_read_again_also_where_a_newer_segment_knows_their_files(
    folder: Path, series: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, root = Store(tmp_path / "workspace"), tmp_path / "workspace" / "artifacts" / "pixels"
    series(folder / "10", EchoTime=10, **ECHOES)
    first = take(folder)[2]
    (older,) = root.glob("[!.]*")
    for path in series(folder / "20", EchoTime=20, **ECHOES):
        _change([path], PixelData=dcmread(path).pixel_array[::-1].tobytes())
    scans, _, pixels = take(folder)  # the same series: opened again, and the first echo is known
    whole, out = [pixels(scan).copy() for scan in scans], max(tmp_path.glob("out*"))
    assert read_scans(out) == scans and [scan in first for scan in scans] in ([True, False], [False, True])
    assert intake.restore(survey(folder, QUIET), QUIET, NAMES, out, store) == 0 and len(list(root.iterdir())) == 2

    shutil.rmtree(older)
    assert len(intake.without_pixels(out, root)) == 1
    with caplog.at_level(logging.WARNING):
        assert intake.restore(survey(folder, QUIET), QUIET, NAMES, out, store) == 1
    assert "the pixels of 1 scans are gone" in caplog.text
    again = PixelStore(root)
    assert all(np.array_equal(again(scan), values) for scan, values in zip(scans, whole, strict=True))
    assert take(folder)[0] == scans and len(list(root.iterdir())) == 2  # and a later ingest finds them

    for segment in root.iterdir():
        shutil.rmtree(segment)
    assert take(folder)[0] == scans
    for segment in root.iterdir():
        shutil.rmtree(segment)
    shutil.rmtree(folder / "10")
    with pytest.raises(StorageError, match="no longer gives them"):
        intake.restore(survey(folder, QUIET), QUIET, NAMES, out, store)


def test_of_segments_with_the_same_pixels_the_first_is_kept_and_refusals_count_too(
    folder: Path, series: Any, tmp_path: Path
) -> None:
    root = tmp_path / "workspace" / "artifacts" / "pixels"

    def segment(**options: Any) -> tuple[Path, tuple[Scan, ...]]:
        before = set(root.glob("[!.]*"))
        scans = take(folder, **options)[0]
        (new,) = set(root.glob("[!.]*")) - before
        return new, scans

    series(folder / "ct")
    one, scans = segment()
    two, _ = segment(max_megapixels=90.0)  # other settings: judged and decoded anew, to the same pixels
    (folder / "x.png").write_bytes(b"no picture")
    three, _ = segment(max_megapixels=90.0)
    pixels = {scan.pixel_digest for scan in scans}
    files = {str(file.sha256) for file in survey(folder, QUIET)}
    assert unneeded([three, two, one], pixels, files) == [one]
    assert unneeded([three, one, two], pixels, files) == [two]
    assert unneeded([three, two, one], set(), set()) == [three, two, one]
    picture = next(file for file in survey(folder, QUIET) if file.relative == "x.png")
    assert unneeded([three, two, one], pixels, files - {str(picture.sha256)}) == [three, one]


def test_pydicom_quotes_no_header_to_the_terminal(
    folder: Path, ramp: Array, dicom: Any, caplog: pytest.LogCaptureFixture
) -> None:
    header = dicom(ramp)
    header.SpecificCharacterSet = "ISO_IR 100"
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    (folder / "x.dcm").write_bytes(buffer.getvalue().replace(b"ISO_IR 100", b"JANE^DOE  "))
    caplog.set_level(logging.DEBUG)
    assert len(take(folder)[0]) == 1  # a warning would be an error here
    assert "JANE" not in caplog.text


def _pool(folder: Path, series: Any) -> list[Path]:
    """Write what a folder may hold in any combination: whole and broken series, echoes, copies, other files."""
    paths = [*series(folder / "a", slices=4), *series(folder / "b", slices=3)]
    one = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5", "Modality": "MR"}
    for echo in (10, 20):
        paths += series(folder / str(echo), slices=3, EchoTime=echo, **one)
    copy = dcmread(paths[1])
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    copy.save_as(folder / "copy")
    (folder / "cut").write_bytes(paths[0].read_bytes()[:-50])
    (folder / "note").write_bytes(b"no image at all")
    values = np.random.default_rng(0).integers(0, 99, (4, 5, 3, 2)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "volumes.nii")
    return [*paths, *(folder / name for name in ("copy", "cut", "note", "volumes.nii"))]


def _shuffle(folder: Path, pool: list[Path], chance: random.Random) -> None:
    """Add, remove, rename or exchange a file, or write an archive of some."""
    there = sorted(path for path in folder.rglob("*") if path.is_file())
    place = folder / chance.choice(["", "x", "y/z"]) / str(chance.randrange(20))
    place.parent.mkdir(parents=True, exist_ok=True)
    what = chance.choice(["add", "add", "add", "remove", "rename", "exchange", "archive"])
    if what == "archive":
        with zipfile.ZipFile(folder / "some.zip", "w") as archive:
            for path in chance.sample(pool, 4):
                archive.write(path, f"{path.parent.name}-{path.name}")
    elif what == "add" or len(there) < 2:
        shutil.copy(chance.choice(pool), place)
    elif what == "remove":
        chance.choice(there).unlink()
    elif what == "rename":
        chance.choice(there).rename(place)
    else:
        one, other = chance.sample(there, 2)
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_whatever_happened_to_a_folder_the_result_is_that_of_a_fresh_ingest(
    tmp_path_factory: Any, series: Any, seed: int
) -> None:
    root, chance = tmp_path_factory.mktemp("history"), random.Random(seed)
    pool = _pool(root / "pool", series)
    folder = root / "in"
    folder.mkdir()
    for step in range(8):
        for _ in range(chance.randint(1, 5)):
            _shuffle(folder, pool, chance)
        results = []
        for workspace in (root / "workspace", root / f"fresh{step}"):
            out = root / f"out{step}" / workspace.name
            out.mkdir(parents=True)
            files = survey(folder, QUIET, index=SourceIndex(workspace, NAMES))
            ingest(files, QUIET, NAMES, out, Store(workspace))
            results.append((read_scans(out), read_exclusions(out)))
        assert results[0] == results[1]


def test_a_series_that_has_not_come_whole_waits_for_the_rest(
    folder: Path, series: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """Its headers say how many images there must be: nothing else shows that the last ones are not here yet."""
    files = sorted(series(tmp_path / "sent", 12, ImagesInAcquisition=12), key=lambda path: dcmread(path).InstanceNumber)
    for path in files[:9]:
        shutil.copy(path, folder)
    assert code(folder) == "fewer_than_declared"
    scans, _, _ = take(folder, checks={"policy": {"fewer_than_declared": "accept"}})
    assert [(scan.shape[0], "fewer_than_declared" in scan.findings) for scan in scans] == [(9, True)]
    assert len(take(folder, read="images")[0]) == 9
    for path in files[9:]:
        shutil.copy(path, folder)
    assert only(folder)[0].shape[0] == 12


def test_one_image_of_many_is_an_image(folder: Path, series: Callable[..., list[Path]], tmp_path: Path) -> None:
    shutil.copy(series(tmp_path / "sent", 12, ImagesInAcquisition=12)[0], folder)
    assert not only(folder)[0].is_volume


def test_a_picture_is_never_decoded_in_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "x.png")

    def decoded_here(*_: object, **__: object) -> None:
        raise AssertionError("Pillow was given a stranger's bytes")

    monkeypatch.setattr(Image, "open", decoded_here)
    assert np.array_equal(only(folder)[1], grey)


@pytest.mark.parametrize("command", [(sys.executable, "-c", "raise SystemExit(1)"), ("/nonexistent/python",)])
@pytest.mark.parametrize("kind", ["png", "dcm"])
def test_where_no_decoder_starts_the_run_ends_and_no_file_is_blamed(
    folder: Path, ramp: Array, dicom: Any, kind: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "png":
        Image.fromarray(ramp.astype(np.uint8)).save(folder / "x.png")
    else:
        image = dicom(ramp)
        image.compress(RLELossless)
        image.save_as(folder / "x.dcm", enforce_file_format=True)
    without = partial(io_of_scans.decoding.DecodingPool, command=command)
    monkeypatch.setattr(io_of_scans.decoding, "DecodingPool", without)
    with pytest.raises(MedtlError, match="does not start"):
        take(folder)


@pytest.mark.parametrize("fault", ["folder", "member"])
def test_a_full_temporary_disk_ends_the_run_and_blames_no_file(
    folder: Path, ramp: Array, dicom: Any, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, stream = dicom(ramp), io.BytesIO()
    image.compress(RLELossless)
    image.save_as(stream, enforce_file_format=True)
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("x.dcm", stream.getvalue())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fault == "folder":
        monkeypatch.setattr(io_of_scans.tempfile, "TemporaryDirectory", full)
    else:
        write = Path.write_bytes
        monkeypatch.setattr(
            Path, "write_bytes", lambda path, data: (full if "medtl-" in str(path) else write)(path, data)
        )
    with pytest.raises(StorageError, match="disk is full"):
        take(folder)
