"""Synthetic chest radiographs: a small hospital with its usual dirt, and another task to learn from beforehand.

Beside ``io.py`` this is the one module of the room that writes files, and it writes only these: an example and a test
are worth most where they start from real bytes on a disk, and no patient's scan may be shipped to make that possible.
Nothing that reads scans imports it.

Everything is drawn from a seed; the same seed gives the same bytes. Tissue is painted in body coordinates (v down, u to
the right, both -1 to 1 over the image) as what a detector would see, then passed through the response of one of two
scanners. Lesions are small, soft and faint; vessels seen end-on, crossing ribs and smooth clutter lie in both classes,
so that neither brightness nor any other statistic of the whole image tells them apart.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from medtl.errors import StorageError

CANARY = ("CANARY", "WILHELMINA", "31415926", "19310314")
"""Strings of one patient's identity. They are in the hospital's files and must never be seen in any output."""

CLASSES = ("normal", "lesion")
SOURCE_CLASSES = ("none", "nodule", "ring", "star", "bundle", "ground glass")
FEWEST_PATIENTS = 24  # each kind of dirt has a patient of its own, in either class
LESION_SHARE = 0.45
LESION_CONTRAST = (0.22, 0.34)  # peak, in units of the tissue's full range
SOURCE_CONTRAST = (0.20, 0.34)
SOURCE_SIZE = 64
SOURCE_RENDER_SIZE = 96  # painted finer, then shrunk: noise and edges are those of a hospital image made smaller
SIDES = (96, 112, 128, 144, 160)
FAMILIES = ("ALDER", "BIRCH", "CEDAR", "DOGWOOD", "ELM", "FIR", "HAZEL", "JUNIPER", "LARCH", "MAPLE", "OAK", "PINE")
GIVEN = ("ADA", "BRUNO", "CLARA", "DANIEL", "EDITH", "FELIX", "GRETA", "HUGO", "IDA", "JONAS", "KLARA", "LEO")

Floats = npt.NDArray[np.float32]
Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Scanner:
    """A detector's response: stored value = ``full scale * (offset + gain * tissue ** gamma + noise)``."""

    manufacturer: str
    model: str
    site: str
    bits: int
    gain: float
    offset: float
    gamma: float
    noise: float


SCANNERS = (
    Scanner("Norrland Imaging", "NI Plate 12", "north", bits=12, gain=0.72, offset=0.06, gamma=0.9, noise=0.014),
    Scanner("Sudwerk Medical", "SM Cassette X", "south", bits=10, gain=0.60, offset=0.16, gamma=1.25, noise=0.022),
)


@dataclass(frozen=True, slots=True)
class HospitalSummary:
    """What :func:`write_hospital` wrote; every kind of dirt is counted in files or rows."""

    patients: int
    lesion_patients: int
    images: int  # DICOM files that decode, the duplicate and the pixel copy included
    rows: int  # of labels.csv
    truncated: int
    empty: int
    monochrome1: int
    jpeg2000: int
    rle: int
    patients_with_two_studies: int
    duplicate_files: int
    pixel_copies: int
    images_without_row: int
    rows_without_image: int
    text_files: int
    canary_patients: int


@dataclass(frozen=True, slots=True)
class _Patient:
    number: int
    label: str
    scanner: Scanner
    images: int
    patient_id: str
    name: str
    sex: str
    birth: str  # YYYYMMDD
    age: int  # years, at the study
    address: str
    folder: str
    dirt: str = ""


@dataclass(frozen=True, slots=True)
class _Body:
    """One person in front of the detector: coordinates, tissue and where the lungs are."""

    v: Floats
    u: Floats
    tissue: Floats
    lungs: tuple[tuple[float, float, float, float], ...]  # centre v, u and half axes


def write_hospital(folder: Path, seed: int = 0, patients: int = 150) -> HospitalSummary:
    """Write DICOM files, ``labels.csv`` and a ``README.txt`` of a small, untidy radiology department.

    Args:
        folder: made if it is missing; must not hold a hospital yet. ``DICOM`` gets its name last: where it is, all is.
        seed: same seed, same bytes.
        patients: at least ``FEWEST_PATIENTS``; about one and a half images each.

    Raises:
        ValueError: too few patients for every kind of dirt.
        StorageError: the folder already holds a hospital.
    """
    if patients < FEWEST_PATIENTS:
        raise ValueError(f"patients: {patients} is too few; {FEWEST_PATIENTS} are needed to show every kind of dirt")
    if (folder / "DICOM").exists():
        raise StorageError(f"'{folder}' already holds a hospital. Choose another folder, or delete that one.")
    unfinished = folder / ".DICOM.partial"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a write that was interrupted
    rng = np.random.default_rng([seed, 0])
    rows: list[Row] = []
    written = 0
    people = _people(rng, patients)
    for person in people:
        files = _files(person, seed)
        for name, data in files.items():
            path = unfinished / person.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        written += sum(data[128:132] == b"DICM" for data in files.values())
        rows += _rows(person, files)
    summary = HospitalSummary(
        patients=patients,
        lesion_patients=sum(person.label == "lesion" for person in people),
        images=written - 1,  # the truncated one has a header and does not decode
        rows=len(rows),
        **dict.fromkeys(DIRT_COUNTS, 1),
    )
    (folder / "README.txt").write_text(_readme(summary), encoding="utf-8", newline="\n")
    (folder / "labels.csv").write_text(_table(rows), encoding="utf-8", newline="")
    unfinished.rename(folder / "DICOM")
    return summary


def write_source_task(folder: Path, seed: int = 1, images: int = 2400) -> Path:
    """Write a six-class task of local structure, for a small backbone to learn from before it meets the hospital.

    Same physics as the hospital, other persons and another question: which structure, if any, is somewhere in the body?
    The file is laid out as MedMNIST's are: ``train_images``, ``train_labels``, ``val_images``, ``val_labels``; images
    uint8 of shape (n, 64, 64), labels uint8 of shape (n, 1) counting ``SOURCE_CLASSES``. One image in eight validates.

    Args:
        folder: made if it is missing.
        seed: same seed, same bytes.
        images: of both parts together, at least 48.

    Raises:
        ValueError: fewer than 48 images.
    """
    if images < 48:
        raise ValueError(f"images: {images} is too few; 48 are needed for every class to be in both parts")
    rng = np.random.default_rng([seed, 1])
    pictures = np.empty((images, SOURCE_SIZE, SOURCE_SIZE), np.uint8)
    labels = (np.arange(images) % len(SOURCE_CLASSES)).astype(np.uint8)[:, None]
    for picture, label in zip(pictures, labels[:, 0], strict=True):
        picture[...] = _source_image(rng, SOURCE_CLASSES[label])
    first = images // 8
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "source_task.npz"
    with path.open("wb") as stream:
        np.savez_compressed(
            stream,
            train_images=pictures[first:],
            train_labels=labels[first:],
            val_images=pictures[:first],
            val_labels=labels[:first],
        )
    return path


# ---------------------------------------------------------------------------------------------------- pictures


def _body(rng: np.random.Generator, rows: int, columns: int) -> _Body:
    """Paint a body without lesions: outline, lungs, heart, ribs, vessels, clutter."""
    turn, zoom = np.deg2rad(rng.uniform(-9, 9)), rng.uniform(0.88, 1.14)
    down, right = rng.uniform(-0.08, 0.08, 2)
    y = np.linspace(-1, 1, rows, dtype=np.float32)[:, None] - np.float32(down)
    x = np.linspace(-1, 1, columns, dtype=np.float32)[None, :] - np.float32(right)
    v = ((y * np.cos(turn) - x * np.sin(turn)) / zoom).astype(np.float32)
    u = ((y * np.sin(turn) + x * np.cos(turn)) / zoom).astype(np.float32)
    height, width, apart = rng.uniform(0.58, 0.70), rng.uniform(0.27, 0.33), rng.uniform(0.38, 0.43)
    lungs = tuple(
        (float(rng.uniform(-0.06, 0.04)), side * float(apart), float(height), float(width)) for side in (-1, 1)
    )
    inside = np.zeros_like(v)
    for centre_v, centre_u, axis_v, axis_u in lungs:
        radius = ((v - centre_v) / axis_v) ** 2 + ((u - centre_u) / axis_u) ** 2
        inside = np.maximum(inside, _step(1 - radius, 0.12))
    outline = _step(1 - (np.abs(u) / 0.92) ** 4 - (np.abs(v) / 1.05) ** 6, 0.10)
    heart = _blob(v, u, (0.28, rng.uniform(0.06, 0.16)), 0.24 * rng.uniform(0.85, 1.15), sharp=3)
    spine = np.exp(-((u / 0.11) ** 2))
    tissue = outline * (0.62 + 0.10 * spine - rng.uniform(0.26, 0.32) * inside) + 0.16 * heart * outline
    tissue += outline * (_ribs(rng, v, u) + _clutter(rng, rows, columns))
    tissue += inside * _vessels(rng, v, u, lungs)
    return _Body(v, u, tissue.astype(np.float32), lungs)


def _ribs(rng: np.random.Generator, v: Floats, u: Floats) -> Floats:
    """Paint faint arcs from the back, and fainter ones from the front that cross them."""
    arcs = np.zeros_like(v)
    for bend, strength in ((0.45, 0.055), (-0.55, 0.04)):
        wave = np.cos(rng.uniform(19, 23) * (v + bend * u * u) + rng.uniform(0, 2 * np.pi))
        arcs += np.float32(strength * rng.uniform(0.7, 1.3)) * np.clip(wave, 0, None) ** 2
    ribs: Floats = arcs * _step(np.abs(u) - np.float32(0.14), 0.05)
    return ribs


def _clutter(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    """Draw smooth soft-tissue clutter on two scales, the finer one near the size of a lesion."""
    field = np.zeros((rows, columns), np.float32)
    for cells, strength in ((5, 0.035), (14, 0.014)):
        coarse = rng.standard_normal((cells, cells)).astype(np.float32)
        field += np.float32(strength) * cv2.resize(coarse, (columns, rows), interpolation=cv2.INTER_CUBIC)
    return field


def _vessels(
    rng: np.random.Generator, v: Floats, u: Floats, lungs: Iterable[tuple[float, float, float, float]]
) -> Floats:
    """Paint vessels that run out from the hilum, and some seen end-on: small and bright, in both classes."""
    field = np.zeros_like(v)
    for lung in lungs:
        start = np.array([lung[0] + 0.05, lung[1] * 0.45])
        for _ in range(4):
            end = np.array(_place(rng, lung, 0.95))
            field += _line(v, u, start, end, rng.uniform(0.012, 0.022)) * np.float32(rng.uniform(0.05, 0.11))
        for _ in range(int(rng.integers(1, 5))):
            dot = _blob(v, u, _place(rng, lung, 0.9), rng.uniform(0.018, 0.030), sharp=1)
            field += dot * np.float32(rng.uniform(0.10, 0.20))
    return field


def _lesion(rng: np.random.Generator, body: _Body) -> Floats:
    """Paint one or two faint nodules, smooth or spiculated, in the lung fields."""
    field = np.zeros_like(body.tissue)
    for _ in range(1 + int(rng.random() < 0.35)):
        where = _place(rng, body.lungs[int(rng.integers(2))], 0.75)
        kind = "star" if rng.random() < 0.5 else "nodule"
        field += _structure(rng, body, kind, where, rng.uniform(1.0, 1.35)) * np.float32(rng.uniform(*LESION_CONTRAST))
    return field


def _source_image(rng: np.random.Generator, kind: str) -> npt.NDArray[np.uint8]:
    """Paint one image of the source task, shape (64, 64)."""
    body = _body(rng, SOURCE_RENDER_SIZE, SOURCE_RENDER_SIZE)
    tissue = body.tissue
    if kind != "none":
        where = (float(rng.uniform(-0.7, 0.7)), float(rng.uniform(-0.7, 0.7)))
        shape = _structure(rng, body, kind, where, rng.uniform(1.0, 1.6))
        tissue = tissue + shape * np.float32(rng.uniform(*SOURCE_CONTRAST))
    scanner = SCANNERS[int(rng.integers(2))]
    seen = _expose(rng, tissue, scanner).astype(np.float32) * np.float32(255 / (2**scanner.bits - 1))
    small = cv2.resize(seen, (SOURCE_SIZE, SOURCE_SIZE), interpolation=cv2.INTER_AREA)
    return np.rint(small).astype(np.uint8)


def _structure(rng: np.random.Generator, body: _Body, kind: str, where: tuple[float, float], size: float) -> Floats:
    """Paint one local structure of peak about 1."""
    v, u = body.v - np.float32(where[0]), body.u - np.float32(where[1])
    if kind == "bundle":
        angle, gap = rng.uniform(0, np.pi), 0.045 * size
        along, across = np.array([np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), -np.sin(angle)])
        ends = [(across * gap * k - along * 0.16 * size, across * gap * k + along * 0.16 * size) for k in (-1, 0, 1)]
        return np.maximum.reduce([_line(v, u, a, b, 0.014) for a, b in ends])
    radius, angle_field = np.hypot(v, u), np.arctan2(v, u)
    if kind == "ring":
        return np.exp(-(((radius - 0.085 * size) / 0.024) ** 2)).astype(np.float32)
    if kind == "ground glass":
        grain = cv2.GaussianBlur(rng.standard_normal(v.shape).astype(np.float32), (0, 0), 1.2)
        return (np.exp(-((radius / (0.17 * size)) ** 2)) * (0.45 + 1.2 * grain)).astype(np.float32)
    if kind == "star":
        spikes = 1 + 0.45 * np.cos(int(rng.integers(5, 9)) * angle_field + rng.uniform(0, 2 * np.pi))
        return np.exp(-((radius / (0.075 * size * spikes)) ** 1.6)).astype(np.float32)
    if kind == "nodule":
        lobes = 1 + 0.12 * np.cos(int(rng.integers(2, 4)) * angle_field + rng.uniform(0, 2 * np.pi))
        return np.exp(-((radius / (0.075 * size * lobes)) ** 3)).astype(np.float32)
    raise ValueError(f"kind: '{kind}' is none of {', '.join(SOURCE_CLASSES[1:])}")


def _expose(rng: np.random.Generator, tissue: Floats, scanner: Scanner) -> npt.NDArray[np.uint16]:
    """Give the stored values of tissue on a scanner; the exposure varies from image to image."""
    gain, offset = scanner.gain * rng.uniform(0.85, 1.15), scanner.offset + rng.uniform(-0.03, 0.03)
    seen = offset + gain * np.clip(tissue, 0, 1.2) ** scanner.gamma
    seen = seen + scanner.noise * rng.standard_normal(tissue.shape, dtype=np.float32)
    full = 2**scanner.bits - 1
    return np.clip(np.rint(seen * full), 0, full).astype(np.uint16)


def _place(rng: np.random.Generator, lung: tuple[float, float, float, float], reach: float) -> tuple[float, float]:
    radius, angle = reach * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
    return float(lung[0] + lung[2] * radius * np.sin(angle)), float(lung[1] + lung[3] * radius * np.cos(angle))


def _step(distance: Floats, width: float) -> Floats:
    return (1 / (1 + np.exp(np.clip(-distance / width, -30, 30)))).astype(np.float32)


def _blob(v: Floats, u: Floats, where: tuple[float, float], size: float, sharp: int) -> Floats:
    squared = ((v - np.float32(where[0])) ** 2 + (u - np.float32(where[1])) ** 2) / np.float32(size * size)
    return np.exp(-(squared**sharp)).astype(np.float32)


def _line(v: Floats, u: Floats, start: npt.NDArray[Any], end: npt.NDArray[Any], width: float) -> Floats:
    direction = (end - start).astype(np.float32)
    dv, du = v - np.float32(start[0]), u - np.float32(start[1])
    along = np.clip((dv * direction[0] + du * direction[1]) / np.float32(direction @ direction + 1e-6), 0, 1)
    squared = (dv - along * direction[0]) ** 2 + (du - along * direction[1]) ** 2
    return np.exp(squared / np.float32(-width * width)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- people

DIRT: tuple[str, ...] = ("truncated", "empty", "monochrome1", "jpeg2000", "rle", "studies", "duplicate", "copy")
DIRT += ("no row", "no image", "text", "canary")
DIRT_COUNTS: tuple[str, ...] = (
    "truncated",
    "empty",
    "monochrome1",
    "jpeg2000",
    "rle",
    "patients_with_two_studies",
    "duplicate_files",
)
DIRT_COUNTS += ("pixel_copies", "images_without_row", "rows_without_image", "text_files", "canary_patients")


def _people(rng: np.random.Generator, patients: int) -> list[_Patient]:
    """Draw persons; scanner and number of images are dealt out alike within each class, all else is independent."""
    lesions = round(LESION_SHARE * patients)
    dealt = [("lesion", i) for i in range(lesions)] + [("normal", i) for i in range(patients - lesions)]
    order = rng.permutation(patients)
    dirt = dict(zip(rng.choice(patients, len(DIRT), replace=False).tolist(), DIRT, strict=True))
    numbers = rng.choice(900_000, patients, replace=False) + 100_000
    people = []
    for number, deal in enumerate(order):
        label, place = dealt[deal]
        birth_year, month, day = int(rng.integers(1932, 1996)), int(rng.integers(1, 13)), int(rng.integers(1, 29))
        person = _Patient(
            number=number,
            label=label,
            scanner=SCANNERS[place % 2],
            images=1 + place // 2 % 2,
            patient_id=f"HX{numbers[number]}",
            name=f"{rng.choice(FAMILIES)}^{rng.choice(GIVEN)}",
            sex="FM"[int(rng.integers(2))],
            birth=f"{birth_year}{month:02d}{day:02d}",
            age=2018 - birth_year,
            address=f"{int(rng.integers(1, 99))} EXAMPLE STREET",
            folder=f"HX{numbers[number]}",
            dirt=dirt.get(number, ""),
        )
        if person.dirt == "canary":
            who: dict[str, Any] = {
                "patient_id": f"{CANARY[0]}-{CANARY[2]}",
                "name": f"{CANARY[0]}^{CANARY[1]}",
                "birth": CANARY[3],
            }
            person = replace(person, **who, age=87, sex="F", address="CANARY LANE 1", folder=f"{CANARY[0]}-{CANARY[2]}")
        people.append(person)
    return people


def _files(person: _Patient, seed: int) -> dict[str, bytes]:
    """Make one person's files, by name, with whatever is wrong in that folder."""
    rng = np.random.default_rng([seed, 2, person.number])
    images = max(person.images, 2) if person.dirt in ("studies", "no row") else person.images
    prefix = f"{CANARY[0]}_" if person.dirt == "canary" else ""
    files: dict[str, bytes] = {}
    for instance in range(1, images + 1):
        study = instance if person.dirt == "studies" else 1
        header = _header(person, seed, study, instance)
        rows = int(rng.choice(SIDES))
        columns = int(np.clip(rows + rng.choice((-16, 0, 16)), SIDES[0], SIDES[-1]))
        body = _body(rng, rows, columns)
        tissue = body.tissue + _lesion(rng, body) if person.label == "lesion" else body.tissue
        pixels = _expose(rng, tissue, person.scanner)
        form = person.dirt if instance == 1 else ""
        data = _encode(header, pixels, person.scanner, form)
        files[f"{prefix}ST{study:02d}_IM{instance:04d}.dcm"] = data
        if form == "duplicate":
            files[f"ST{study:02d}_IM{instance:04d}_copy.dcm"] = data
        if form == "copy":
            again = _header(person, seed, study, instance, copy=True)
            files[f"ST{study:02d}_IM{instance:04d}_resent.dcm"] = _encode(again, pixels, person.scanner, "")
    if person.dirt == "empty":
        files["ST01_IM0009.dcm"] = b""
    if person.dirt == "text":
        files["EXPORT.TXT"] = b"Export finished. 1 warning: see the archive's log.\r\n"
    return files


def _rows(person: _Patient, files: Iterable[str]) -> list[Row]:
    """Make one person's rows of the label table."""
    names = [name for name in files if name.endswith(".dcm")]
    if person.dirt == "no row":
        names = names[:-1]
    if person.dirt == "no image":
        names.append("ST01_IM0007.dcm")
    facts = {"label": person.label, "patient": person.patient_id, "site": person.scanner.site, "sex": person.sex}
    return [{"path": f"DICOM/{person.folder}/{name}", **facts, "age": str(person.age)} for name in names]


# ---------------------------------------------------------------------------------------------------- DICOM


def _uid(*parts: object) -> str:
    """Derive a UUID-rooted UID (PS3.5 B.2) from whatever names the object."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def _header(person: _Patient, seed: int, study: int, instance: int, copy: bool = False) -> Dataset:
    """Make the patient, study, series and equipment modules (type 1 and 2 attributes, and usual others)."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["DERIVED" if copy else "ORIGINAL", "PRIMARY"]
    ds.SOPClassUID = ComputedRadiographyImageStorage
    ds.SOPInstanceUID = _uid(seed, person.number, study, instance, "copy" if copy else "image")
    ds.StudyInstanceUID = _uid(seed, person.number, study)
    ds.SeriesInstanceUID = _uid(seed, person.number, study, "resent" if copy else "series")
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = person.name, person.patient_id, person.birth
    ds.PatientSex, ds.PatientAge, ds.PatientAddress = person.sex, f"{person.age:03d}Y", person.address
    day = f"2019{1 + person.number % 11:02d}{1 + person.number % 28:02d}" if study == 1 else "20191224"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = f"{7 + person.number % 12:02d}{person.number % 60:02d}00"
    ds.ContentTime = f"{7 + person.number % 12:02d}{person.number % 60:02d}{10 * instance:02d}"
    accession = "CANARYACC777" if person.dirt == "canary" else f"A{person.number:05d}"
    ds.AccessionNumber = accession if study == 1 else f"{accession}-{study}"
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = str(study), 2 if copy else 1, instance
    ds.ReferringPhysicianName, ds.StudyDescription = "WILLOW^RUTH", "CHEST PA"
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "CR", "CHEST", "PA"
    ds.PatientOrientation = ["L", "F"]
    ds.Manufacturer, ds.ManufacturerModelName = person.scanner.manufacturer, person.scanner.model
    ds.InstitutionName, ds.DeviceSerialNumber = f"Example Hospital {person.scanner.site}", f"{person.scanner.bits}001"
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    return ds


def _encode(ds: Dataset, pixels: npt.NDArray[np.uint16], scanner: Scanner, form: str) -> bytes:
    """Write header and pixels as a DICOM file (PS3.10), in one of the forms an archive may hold."""
    full = 2**scanner.bits - 1
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    if form == "monochrome1":
        pixels, ds.PhotometricInterpretation = (full - pixels).astype(np.uint16), "MONOCHROME1"
    ds.Rows, ds.Columns = pixels.shape
    ds.ImagerPixelSpacing = [round(350 / pixels.shape[0], 3)] * 2
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, scanner.bits, scanner.bits - 1, 0
    ds.WindowCenter, ds.WindowWidth = str((full + 1) // 2), str(full + 1)
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.PixelData = pixels.astype("<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds["PixelData"].VR = "OW"
    if form in ("jpeg2000", "rle"):  # a new SOP instance UID would be a random one
        syntax = JPEG2000Lossless if form == "jpeg2000" else RLELossless
        ds.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    return data[: len(data) - pixels.nbytes // 2] if form == "truncated" else data


# ---------------------------------------------------------------------------------------------------- papers


def _table(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "label", "patient", "site", "sex", "age"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _readme(summary: HospitalSummary) -> str:
    """Say what is in the folder and what is wrong with it, so that a reader can check what became of each item."""
    why = {
        "truncated": "file whose pixel data ends half-way; it has a label row",
        "empty": "file of 0 bytes; it has a label row",
        "monochrome1": "valid image whose low values are bright (MONOCHROME1)",
        "jpeg2000": "valid image, JPEG 2000 lossless",
        "rle": "valid image, RLE lossless",
        "patients_with_two_studies": "patient seen twice",
        "duplicate_files": "file copied byte for byte under another name, with a row of its own",
        "pixel_copies": "image sent again with other headers and a new SOP instance UID, with a row of its own",
        "images_without_row": "valid image that labels.csv does not know",
        "rows_without_image": "row of labels.csv whose file is not there",
        "text_files": "text file among the DICOM files",
        "canary_patients": "patient named CANARY: nothing of that name, number or birth date may leave this folder",
    }
    facts = asdict(summary)
    lines = [
        "Synthetic chest radiographs of people who do not exist. Made by medtl.scans.phantom; free to use.",
        "",
        f"{summary.patients} patients ({summary.lesion_patients} with a lesion), {summary.images} images that decode, "
        f"{summary.rows} rows in labels.csv. Two scanners, one per site; both hold both classes in equal share.",
        "",
        "What is wrong here, on purpose:",
        *(f"{facts[name]:4d}  {text}" for name, text in why.items()),
    ]
    return "\n".join(lines) + "\n"
