"""What a header says, before anything is allocated or decoded. Pure: no file is opened here.

A header is hostile until checked: sizes are bounded before pixels are touched, text that leaves this module is matched
against a pattern, names and identifiers leave it as pseudonyms only. Source of the attributes: DICOM PS3.3 C.7.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medtl.config import ScansConfig
from medtl.errors import ScanError
from medtl.pseudonyms import Pseudonymiser

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_TEXT = re.compile(r"[^A-Za-z0-9 ._/()+-]")
_AGE = re.compile(r"^(\d{3})([DWMY])$")
_PER_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}
OLDEST_YEARS = 90.0  # ages above 89 identify; all of them become 90 (45 CFR 164.514(b)(2))


def check_size(rows: int, columns: int, config: ScansConfig) -> None:
    """Refuse an image whose header asks for nothing, or for too much.

    Raises:
        ScanError: ``bad_size`` or ``too_large``.
    """
    if rows < 1 or columns < 1:
        raise ScanError("bad_size", f"the header declares {rows} rows and {columns} columns")
    if rows * columns > config.max_megapixels * 1e6:
        raise ScanError(
            "too_large", f"{rows} x {columns} pixels, more than scans.max_megapixels = {config.max_megapixels:g}"
        )


def check_dicom(header: Dataset, config: ScansConfig) -> None:
    """Refuse a DICOM object that is not one plain, complete, two-dimensional image.

    Raises:
        ScanError: ``no_pixels``, ``bad_size``, ``too_large``, ``multi_frame`` or ``bad_header``.
    """
    if "PixelData" not in header and "FloatPixelData" not in header and "DoubleFloatPixelData" not in header:
        raise ScanError("no_pixels", "a DICOM object without pixel data (a report, a plan, a cut-off file)")
    try:
        rows, columns = int(header.Rows), int(header.Columns)
        frames = int(header.get("NumberOfFrames") or 1)
        samples = int(header.get("SamplesPerPixel") or 1)
    except (AttributeError, TypeError, ValueError) as error:
        raise ScanError("bad_header", "rows, columns or frames are missing or not numbers") from error
    check_size(rows, columns, config)
    if frames != 1:
        raise ScanError("multi_frame", f"{frames} frames in one object; this pipeline reads two-dimensional images")
    if samples not in (1, 3):
        raise ScanError("bad_header", f"{samples} samples per pixel; 1 or 3 are known")
    _check_length(header, rows * columns * samples)


def describe_dicom(header: Dataset, names: Pseudonymiser) -> dict[str, Any]:
    """Give the fields of a Scan that a DICOM header knows, identifiers as pseudonyms."""
    patient = _text(header, "PatientID")
    study = _text(header, "StudyInstanceUID")
    uids = [_text(header, key) for key in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")]
    issuer = _text(header, "IssuerOfPatientID") or ""
    device = " ".join(_shown(header, key) for key in ("Manufacturer", "ManufacturerModelName")).strip()
    sex = _text(header, "PatientSex")
    return {
        "keys": tuple(names.uid_key(uid) for uid in uids if uid),
        "patient": names.name("patient", f"{patient}\0{issuer}" if issuer else patient) if patient else None,
        "study": names.name("study", study) if study else None,
        "modality": _shown(header, "Modality") or None,
        "scanner": device[:64] or None,
        "sex": sex if sex in ("F", "M", "O") else None,
        "age_years": age_in_years(_text(header, "PatientAge")),
    }


def age_in_years(text: str | None) -> float | None:
    """Read a DICOM age string (``045Y``); above 89 becomes 90. Source: DICOM PS3.5 6.2, AS."""
    match = _AGE.match(text or "")
    if match is None:
        return None
    years = int(match[1]) / _PER_YEAR[match[2]]
    return round(years, 2) if years < OLDEST_YEARS else OLDEST_YEARS


def _check_length(header: Dataset, values: int) -> None:
    """Find uncompressed pixel data that was cut off: pydicom reads it without a word."""
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    if "PixelData" not in header or (syntax is not None and syntax.is_compressed):
        return
    bits = int(header.get("BitsAllocated") or 0)
    subsampled = str(header.get("PhotometricInterpretation", "")) == "YBR_FULL_422"
    wanted = values * bits // 8 * (2 if subsampled else 3) // 3
    found = len(header.PixelData or b"")
    if found < wanted:
        raise ScanError("truncated", f"{found} bytes of pixel data where the header declares {wanted}")


def _text(header: Dataset, keyword: str) -> str | None:
    value = header.get(keyword)
    text = "" if value is None else str(value).strip()
    return text or None


def _shown(header: Dataset, keyword: str) -> str:
    return _TEXT.sub("", _text(header, keyword) or "")


Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one frame lies and what its values mean; ``None`` is unknown. Source: DICOM PS3.3 C.7.6.2, C.7.6.16.2.

    Positions are of the centre of the first pixel, in the patient's system (LPS, mm); ``orientation`` is the row
    direction followed by the column direction; ``spacing_mm`` is (between rows, between columns).
    """

    position_mm: Vector | None = None
    orientation: tuple[float, float, float, float, float, float] | None = None
    spacing_mm: tuple[float, float] | None = None
    thickness_mm: float | None = None
    between_mm: float | None = None  # SpacingBetweenSlices
    slope: float | None = None
    intercept: float | None = None
    rescale_type: str | None = None
    splits: tuple[
        tuple[str, str], ...
    ] = ()  # what parts one series honestly: (keyword, value), e.g. ("EchoTime", "30")


@dataclass(frozen=True, slots=True)
class Header:
    """What the rest of intake needs of one DICOM file. Raw identifiers stay in memory; nothing here is written down.

    ``planes`` has one entry per frame. ``pixel_offset`` is the place of the value of PixelData in the file (for
    encapsulated data: of the first byte after the element's length), ``pixel_length`` its declared length
    (``None`` where it is undefined, that is encapsulated).
    """

    file_size: int
    transfer_syntax: str
    sop_class: str | None
    sop_instance: str | None
    series: str | None
    study: str | None
    patient: str | None
    issuer: str | None
    frame_of_reference: str | None
    modality: str | None
    image_type: tuple[str, ...]
    instance_number: int | None
    rows: int
    columns: int
    frames: int
    samples: int
    planar: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    photometric: str
    planes: tuple[Plane, ...]
    pixel_offset: int | None
    pixel_length: int | None
    pixel_keyword: str | None = "PixelData"  # or FloatPixelData, DoubleFloatPixelData; None: no pixels
    gantry_tilt_degrees: float | None = None
    burned_in: str | None = None  # BurnedInAnnotation
    manufacturer: str | None = None
    model: str | None = None
    sex: str | None = None
    age: str | None = None
    executable: str | None = None  # "PE" or "ELF" where the preamble is a program's
    mosaic: bool = False  # Siemens: many slices tiled into one frame
    window: tuple[float, float] | None = None  # first centre and width
    has_lut: bool = False  # a modality LUT sequence instead of slope and intercept
    plain: bool = True  # False: it took pydicom to understand it
