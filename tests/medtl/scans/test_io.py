"""Every file becomes a scan or an exclusion with its reason; nothing stops the batch."""

from __future__ import annotations

import gzip
import importlib.util
import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from medtl.config import ScansConfig
from medtl.errors import StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Exclusion, Scan
from medtl.scans.io import PixelStore, ingest, names_of, read_exclusions, read_scans, survey

_spec = importlib.util.spec_from_file_location("scan_fixtures", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
dicom = _module.dicom

NAMES = Pseudonymiser(b"0123456789abcdef")
Array = np.ndarray[Any, Any]


def take(folder: Path, **options: Any) -> tuple[tuple[Scan, ...], tuple[Exclusion, ...], PixelStore]:
    config = ScansConfig(**options)
    out = folder.parent / f"out{len(list(folder.parent.iterdir()))}"
    out.mkdir()
    ingest(survey(folder, config), config, NAMES, out)
    return read_scans(out), read_exclusions(out), PixelStore(out)


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
def test_every_common_syntax_gives_the_same_16_bit_values(folder: Path, ramp: Array, syntax: Any) -> None:
    header = dicom(ramp)
    if syntax is not None:
        header.compress(syntax)
    header.save_as(folder / "x.dcm", enforce_file_format=True)
    scan, pixels = only(folder)
    assert np.array_equal(pixels, ramp)
    assert (scan.source, scan.bits, scan.modality, scan.scanner, scan.sex, scan.age_years) == (
        "dicom", 16, "CR", "Maker Model 1", "F", 45.0,
    )  # fmt: skip


def test_rescale_makes_hounsfield_units(folder: Path, ramp: Array) -> None:
    dicom(ramp, RescaleSlope=2, RescaleIntercept=-1024).save_as(folder / "x.dcm", enforce_file_format=True)
    _, pixels = only(folder)
    assert pixels.dtype == np.int16
    assert np.array_equal(pixels, ramp.astype(int) * 2 - 1024)


def test_monochrome1_is_inverted_over_the_stored_bits(folder: Path, ramp: Array) -> None:
    dicom(ramp, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11).save_as(
        folder / "x.dcm", enforce_file_format=True
    )
    _, pixels = only(folder)
    assert np.array_equal(pixels, 4095 - ramp)


def test_a_window_is_applied_only_where_asked_for(folder: Path, ramp: Array) -> None:
    dicom(ramp, WindowCenter=100, WindowWidth=51).save_as(folder / "x.dcm", enforce_file_format=True)
    assert np.array_equal(only(folder)[1], ramp)
    windowed = only(folder, window="header")[1]
    assert windowed[ramp <= 74].max() == 0
    assert windowed[ramp >= 125].min() == 65535
    assert np.array_equal(only(folder, window=(100, 51))[1], windowed)


def test_colour_stays_colour(folder: Path) -> None:
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
    names = names_of(survey(folder, ScansConfig()), scans)
    assert names[scans[4].scan_id] == ["x.npz#test/1"]


def test_an_empty_file_is_named_empty(folder: Path) -> None:
    (folder / "x.dcm").touch()
    assert code(folder) == "empty_file"


def test_a_truncated_dicom_is_refused(folder: Path, ramp: Array) -> None:
    buffer = io.BytesIO()
    dicom(ramp).save_as(buffer, enforce_file_format=True)
    (folder / "x.dcm").write_bytes(buffer.getvalue()[:-100])
    assert code(folder) in ("truncated", "undecodable", "no_pixels")


def test_pixel_data_shorter_than_declared_is_refused(folder: Path, ramp: Array) -> None:
    dicom(ramp, Rows=65).save_as(folder / "x.dcm", enforce_file_format=True)
    assert code(folder) == "truncated"


def test_a_corrupt_png_is_refused(folder: Path, ramp: Array) -> None:
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(buffer, "PNG")
    (folder / "x.png").write_bytes(buffer.getvalue()[:60] + b"rubbish")
    assert code(folder) == "undecodable"


def test_a_header_that_asks_for_too_much_is_refused_before_allocation(folder: Path, ramp: Array) -> None:
    dicom(ramp, Rows=65535, Columns=65535).save_as(folder / "x.dcm", enforce_file_format=True)
    assert code(folder) == "too_large"


def test_a_gzip_bomb_is_refused(folder: Path) -> None:
    header = nibabel.Nifti1Image(np.zeros((2, 2, 1), np.uint8), np.eye(4)).to_bytes()[:352]
    (folder / "x.nii.gz").write_bytes(gzip.compress(header + bytes(30_000_000)))
    assert code(folder, max_megapixels=1) == "too_large"


def test_several_frames_are_refused(folder: Path, ramp: Array) -> None:
    header = dicom(ramp, NumberOfFrames=2)
    header.PixelData = ramp.tobytes() * 2
    header.save_as(folder / "x.dcm", enforce_file_format=True)
    assert code(folder) == "multi_frame"


def test_a_volume_is_refused_by_name(folder: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), folder / "x.nii")
    assert code(folder) == "volume"


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


def test_the_same_bytes_twice_are_one_scan_that_answers_to_both_names(folder: Path, ramp: Array) -> None:
    for name in ("a.dcm", "b.dcm"):
        dicom(ramp, SOPInstanceUID="1.2.3").save_as(folder / name, enforce_file_format=True)
    (folder / "b.dcm").write_bytes((folder / "a.dcm").read_bytes())
    scans, exclusions, _ = take(folder)
    assert [e.code for e in exclusions] == ["duplicate_file"]
    assert {NAMES.file_keys("a.dcm")[0], NAMES.file_keys("b.dcm")[0]} <= set(scans[0].keys)


def test_no_name_or_number_of_a_patient_is_written(folder: Path, ramp: Array) -> None:
    dicom(ramp, AccessionNumber="ACC-77").save_as(folder / "DOE_JANE.dcm", enforce_file_format=True)
    out = folder.parent / "out"
    out.mkdir()
    ingest(survey(folder, ScansConfig()), ScansConfig(), NAMES, out)
    written = b"".join(path.read_bytes() for path in out.iterdir())
    for raw in (b"DOE", b"JANE", b"ID-1", b"ACC-77"):
        assert raw not in written


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
def test_flipped_bytes_cost_that_file_alone(tmp_path_factory: Any, changes: list[tuple[int, int]]) -> None:
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
