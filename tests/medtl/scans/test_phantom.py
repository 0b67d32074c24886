"""The synthetic hospital is real files, the same every time, dirty as promised, and not solved by a trivial rule."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import ComputedRadiographyImageStorage, JPEG2000Lossless, RLELossless
from sklearn.metrics import roc_auc_score

from medtl.errors import StorageError
from medtl.scans import phantom

TYPE_1 = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "Rows",
    "Columns",
    "PixelData",
)
TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "SeriesNumber",
    "BodyPartExamined",
    "ViewPosition",
    "Manufacturer",
    "InstanceNumber",
)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, phantom.HospitalSummary]:
    folder = tmp_path_factory.mktemp("hospital")
    return folder, phantom.write_hospital(folder, seed=0)


@pytest.fixture(scope="module")
def headers(hospital: tuple[Path, phantom.HospitalSummary]) -> dict[str, Dataset]:
    """Every file that has a DICOM header, by its path below the folder."""
    folder, _ = hospital
    paths = [p for p in sorted((folder / "DICOM").rglob("*")) if p.is_file() and p.read_bytes()[128:132] == b"DICM"]
    return {p.relative_to(folder).as_posix(): pydicom.dcmread(p) for p in paths}


@pytest.fixture(scope="module")
def pixels(headers: dict[str, Dataset]) -> dict[str, np.ndarray]:
    """Every image that decodes, bright where tissue is, on a scale of 0 to 1."""
    images = {}
    for path, header in headers.items():
        try:
            image = header.pixel_array / (2**header.BitsStored - 1)
        except ValueError:  # the truncated one, counted below
            continue
        images[path] = 1 - image if header.PhotometricInterpretation == "MONOCHROME1" else image
    return images


@pytest.fixture(scope="module")
def rows(hospital: tuple[Path, phantom.HospitalSummary]) -> list[dict[str, str]]:
    with (hospital[0] / "labels.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom.write_source_task(tmp_path_factory.mktemp("source"), seed=1, images=480)


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        phantom.write_hospital(tmp_path / name, seed, patients=24)
        phantom.write_source_task(tmp_path / name, seed, images=48)
    once, again, other = (digests(tmp_path / name) for name in "abc")
    assert once == again
    unseeded = {once[name] for name in once if name.endswith(("IM0009.dcm", "EXPORT.TXT"))}
    assert len(unseeded) == 2
    assert unseeded == set(once.values()) & {digest for name, digest in other.items() if name != "README.txt"}


def test_a_folder_that_holds_a_hospital_is_left_alone(hospital):
    before = digests(hospital[0])
    with pytest.raises(StorageError, match="already holds a hospital"):
        phantom.write_hospital(hospital[0], seed=9)
    assert digests(hospital[0]) == before


def test_an_interrupted_write_is_no_hospital_and_can_be_done_again(tmp_path):
    (tmp_path / "hospital" / ".DICOM.partial" / "HX1").mkdir(parents=True)
    (tmp_path / "hospital" / ".DICOM.partial" / "HX1" / "ST01_IM0001.dcm").write_bytes(b"half a fi")
    for name in ("hospital", "fresh"):
        phantom.write_hospital(tmp_path / name, patients=24)
    assert digests(tmp_path / "hospital") == digests(tmp_path / "fresh")


def test_too_few_patients_or_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="23 is too few"):
        phantom.write_hospital(tmp_path, patients=23)
    with pytest.raises(ValueError, match="47 is too few"):
        phantom.write_source_task(tmp_path, images=47)
    assert not list(tmp_path.iterdir())


def test_every_header_is_complete_and_valid(headers):
    for header in headers.values():
        assert all(header.get(name) for name in TYPE_1)
        assert all(name in header for name in TYPE_2)
        assert header.SOPClassUID == header.file_meta.MediaStorageSOPClassUID == ComputedRadiographyImageStorage
        assert header.SOPInstanceUID == header.file_meta.MediaStorageSOPInstanceUID
        assert header.SOPInstanceUID.is_valid and header.SOPInstanceUID.startswith("2.25.")


def test_all_but_one_header_has_pixels_of_its_own_depth(hospital, headers, pixels):
    summary = hospital[1]
    assert summary.images == len(pixels) == len(headers) - summary.truncated
    assert 200 <= summary.images <= 240
    assert {headers[path].BitsStored for path in pixels} == {10, 12}
    for path, image in pixels.items():
        assert min(image.shape) >= 96 and max(image.shape) <= 160
        assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.02, path


def test_broken_files_are_broken_in_the_promised_way(hospital, headers, pixels):
    folder, summary = hospital
    (truncated,) = headers.keys() - pixels.keys()
    with pytest.raises(ValueError, match="less than expected"):
        _ = pydicom.dcmread(folder / truncated).pixel_array
    empty = [p for p in (folder / "DICOM").rglob("*.dcm") if p.stat().st_size == 0]
    texts = list((folder / "DICOM").rglob("*.TXT"))
    assert (len(empty), len(texts)) == (summary.empty, summary.text_files) == (1, 1)
    with pytest.raises(InvalidDicomError):
        pydicom.dcmread(texts[0])


def test_inverted_and_compressed_images_are_there_and_decode(headers, pixels):
    inverted = [p for p, h in headers.items() if h.PhotometricInterpretation == "MONOCHROME1"]
    syntaxes = Counter(h.file_meta.TransferSyntaxUID for h in headers.values())
    assert syntaxes[JPEG2000Lossless] == syntaxes[RLELossless] == len(inverted) == 1
    image = pixels[inverted[0]]
    rows, columns = image.shape
    centre = image[rows // 3 : -rows // 3, columns * 9 // 20 : columns * 11 // 20]  # spine: bright once turned round
    corners = np.concatenate([image[:4, :4].ravel(), image[:4, -4:].ravel()])
    assert centre.mean() > corners.mean() + 0.2


def test_copies_are_there_by_bytes_and_by_pixels(hospital, headers, pixels, rows):
    summary = hospital[1]
    by_bytes, by_pixels = (
        Counter(digests(hospital[0] / "DICOM").values()),
        Counter(p.tobytes() for p in pixels.values()),
    )
    assert sum(n - 1 for n in by_bytes.values()) == summary.duplicate_files == 1
    assert sum(n - 1 for n in by_pixels.values()) == summary.duplicate_files + summary.pixel_copies
    resent = next(p for p in pixels if p.endswith("_resent.dcm"))
    original = resent.replace("_resent", "")
    assert headers[resent].SOPInstanceUID != headers[original].SOPInstanceUID
    assert headers[resent].PatientID == headers[original].PatientID
    assert {resent, original} <= {row["path"] for row in rows}


def test_one_patient_has_two_studies(hospital, headers):
    studies: dict[str, set[str]] = {}
    for header in headers.values():
        studies.setdefault(header.PatientID, set()).add(header.StudyInstanceUID)
    assert Counter(len(uids) for uids in studies.values()) == {1: hospital[1].patients - 1, 2: 1}


def test_one_image_has_no_row_and_one_row_no_image(hospital, rows):
    folder, summary = hospital
    named, present = {row["path"] for row in rows}, {p.relative_to(folder).as_posix() for p in folder.rglob("*.dcm")}
    assert len(rows) == len(named) == summary.rows
    assert len(present - named) == summary.images_without_row == 1
    assert len(named - present) == summary.rows_without_image == 1


def test_each_patient_has_one_label_and_each_scanner_both_classes_alike(hospital, rows):
    labels = {row["patient"]: row["label"] for row in rows}
    assert all(labels[row["patient"]] == row["label"] for row in rows)
    assert Counter(labels.values())["lesion"] == hospital[1].lesion_patients == round(0.45 * 150)
    for site in ("north", "south"):
        at_site = [row["label"] for row in rows if row["site"] == site]
        assert 0.40 <= at_site.count("lesion") / len(at_site) <= 0.50
        assert 0.45 <= len(at_site) / len(rows) <= 0.55


def test_headers_and_label_table_agree(headers, rows):
    for row in rows:
        if row["path"] in headers:
            header = headers[row["path"]]
            said = (header.PatientID, header.PatientSex, int(header.PatientAge[:3]), header.InstitutionName.split()[-1])
            assert said == (row["patient"], row["sex"], int(row["age"]), row["site"])


def test_age_fits_birth_and_study_date(headers):
    for header in headers.values():
        birth, study = header.PatientBirthDate, header.StudyDate
        age = int(study[:4]) - int(birth[:4]) - (study[4:] < birth[4:])
        assert abs(age - int(header.PatientAge[:3])) <= 1


def test_the_canary_is_in_pixels_files_headers_and_table(hospital, headers, rows):
    folder, summary = hospital
    (path, *_), header = zip(*[(p, h) for p, h in headers.items() if h.PatientName == "CANARY^WILHELMINA"], strict=True)
    assert summary.canary_patients == 1 and "CANARY" in Path(path).name and "CANARY" in Path(path).parent.name
    first = header[0]
    assert (first.PatientID, first.PatientBirthDate) == ("CANARY-31415926", "19310314")
    assert (first.AccessionNumber, first.PatientAddress) == ("CANARYACC777", "CANARY LANE 1")
    assert any(row["patient"] == "CANARY-31415926" and row["path"] == path for row in rows)
    assert all(text.encode() in (folder / path).read_bytes() for text in phantom.CANARY)


def test_the_readme_counts_every_kind_of_dirt(hospital):
    text = (hospital[0] / "README.txt").read_text(encoding="utf-8")
    counts = {
        k: v for k, v in asdict(hospital[1]).items() if k not in ("patients", "lesion_patients", "images", "rows")
    }
    assert all(n == 1 for n in counts.values())
    assert sum(line.startswith("   1  ") for line in text.splitlines()) == len(counts) == 12


@pytest.mark.parametrize("statistic", [np.mean, np.std, np.max, np.median], ids=lambda f: f.__name__)
def test_no_statistic_of_the_whole_image_tells_the_classes_apart(statistic, pixels, rows):
    known = [row for row in rows if row["path"] in pixels]
    truth = [row["label"] == "lesion" for row in known]
    for site in (None, "north", "south"):
        pick = [i for i, row in enumerate(known) if site in (None, row["site"])]
        values = [statistic(pixels[known[i]["path"]]) for i in pick]
        assert 0.35 <= roc_auc_score([truth[i] for i in pick], values) <= 0.65


def test_a_lesion_adds_a_small_soft_local_bright_spot():
    rng = np.random.default_rng(0)
    body = phantom._body(rng, 128, 128)
    added = phantom._lesion(rng, body)
    assert 0.1 < added.max() < 0.5 * body.tissue.max()
    assert 0.001 < (added > 0.05).mean() < 0.08


def test_the_source_task_is_laid_out_as_medmnist(source):
    with np.load(source, allow_pickle=False) as task:
        arrays = dict(task)
    assert {k: (a.dtype.name, a.shape) for k, a in arrays.items()} == {
        "train_images": ("uint8", (420, 64, 64)),
        "train_labels": ("uint8", (420, 1)),
        "val_images": ("uint8", (60, 64, 64)),
        "val_labels": ("uint8", (60, 1)),
    }
    for part in ("train", "val"):
        assert set(arrays[f"{part}_labels"].ravel().tolist()) == set(range(len(phantom.SOURCE_CLASSES)))
    images = np.concatenate([arrays["train_images"], arrays["val_images"]])
    assert len({image.tobytes() for image in images}) == 480
    assert min(image.std() for image in images) > 5


def test_mean_brightness_does_not_name_a_structure(source):
    with np.load(source, allow_pickle=False) as task:
        brightness, labels = task["train_images"].mean(axis=(1, 2)), task["train_labels"].ravel()
    for label in range(1, len(phantom.SOURCE_CLASSES)):
        pair = np.isin(labels, (0, label))
        assert 0.3 < roc_auc_score(labels[pair] == label, brightness[pair]) < 0.7
