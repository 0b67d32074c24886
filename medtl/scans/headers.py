"""What a header says, before anything is allocated or decoded. Pure: no file is opened here.

A header is hostile until checked: sizes are bounded before pixels are touched, text that leaves this module is matched
against a pattern, names and identifiers leave it as pseudonyms only. Source of the attributes: DICOM PS3.3 C.7.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableSequence, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from io import BytesIO
from itertools import pairwise
from logging import LogRecord
from math import dist, isfinite
from struct import Struct
from struct import error as struct_error
from threading import RLock
from typing import TYPE_CHECKING, Any

from medtl.errors import ScanError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.elements import (
    BIG,
    LITTLE,
    MARKS,
    META_CLASS,
    META_SYNTAX,
    PIXELS,
    UNDEFINED,
    Order,
    Run,
    Unclear,
    has_vr,
    inflate,
    past_end,
    read_head,
    read_meta,
    skip_fragments,
    tag,
    vr_number,
    walk,
    walk_explicit,
    walk_implicit,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_TEXT = re.compile(r"[^A-Za-z0-9 ._/()+-]")
_AGE = re.compile(r"^(\d{3})([DWMY])$")
_PER_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}
OLDEST_YEARS = 90.0  # ages above 89 identify; all of them become 90 (45 CFR 164.514(b)(2))


def age_in_years(text: str | None) -> float | None:
    """Read a DICOM age string (``045Y``); above 89 becomes 90. Source: DICOM PS3.5 6.2, AS."""
    match = _AGE.match(text or "")
    if match is None:
        return None
    years = int(match[1]) / _PER_YEAR[match[2]]
    return round(years, 2) if years < OLDEST_YEARS else OLDEST_YEARS


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
class Tiles:
    """How the slices of a mosaic lie in its one frame, and which way they go (LPS, unit vector)."""

    count: int
    across: int  # tiles in a row
    down: int  # tiles in a column
    normal: Vector
    between_mm: float  # from slice to slice
    first_mm: Vector | None = None  # position of the first slice, where the header gives those of all


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a multi-frame object this one is, where it was cut into several. Source: PS3.3 C.7.6.16.2.2.4."""

    whole: str  # ConcatenationUID
    number: int  # from 1; 0 where it is not said
    total: int | None = None
    offset: int | None = None  # frames in the parts before


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
    mosaic: bool = False  # Siemens, United Imaging: many slices tiled into one frame
    window: tuple[float, float] | None = None  # first centre and width
    has_lut: bool = False  # a modality LUT sequence instead of slope and intercept
    tiles: Tiles | None = None  # of a mosaic, where they are told completely
    part: Part | None = None  # of an object that was cut into several (a concatenation)
    declared: int | None = None  # images that its acquisition has, or slices that its PET series has, as is said
    plain: bool = True  # False: it took pydicom to understand it


class DamagedError(ScanError):
    """A DICOM file that cannot be believed.

    ``header`` is what could be read of it before the damage (at least its identifiers, where they came before), so
    that a series knows which members it has lost; numbers that were not reached are 0 in it and ``planes`` is empty.
    """

    def __init__(self, code: str, reason: str, header: Header | None = None) -> None:
        super().__init__(code, reason)
        self.header = header

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.reason, self.header)


@dataclass(frozen=True, slots=True)
class PixelPlace:
    """Where the pixels lie among the bytes of a data set; ``length`` is ``None`` where it is undefined."""

    keyword: str
    offset: int
    length: int | None
    end: int  # of the element, as declared
    left: int  # bytes from the offset to the end of the file
    fragments: int = 0  # encapsulated: without the offset table


IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
DEFLATED, BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
UIH_CREATOR = "Image Private Header"  # of United Imaging's private block in group 0065
_ENCAPSULATED = ("1.2.840.10008.1.2.4.", "1.2.840.10008.1.2.5")  # their beginnings
_VIDEO = "1.2.840.10008.1.2.4.10"  # MPEG-2, MPEG-4, HEVC: many frames in a fragment
MOST_FRAMES = 1_000_000
ABSURD = 1e9  # no length, time or scale in a header is larger
_ITEM = b"\xfe\xff\x00\xe0"

# Everything that is read of a data set, and the value representation that the standard gives it.
ATTRIBUTES: Mapping[str, tuple[int, int, str]] = {
    "SpecificCharacterSet": (0x0008, 0x0005, "CS"),
    "ImageType": (0x0008, 0x0008, "CS"),
    "SOPClassUID": (0x0008, 0x0016, "UI"),
    "SOPInstanceUID": (0x0008, 0x0018, "UI"),
    "Modality": (0x0008, 0x0060, "CS"),
    "Manufacturer": (0x0008, 0x0070, "LO"),
    "ManufacturerModelName": (0x0008, 0x1090, "LO"),
    "FrameType": (0x0008, 0x9007, "CS"),
    "ComplexImageComponent": (0x0008, 0x9208, "CS"),
    "PatientID": (0x0010, 0x0020, "LO"),
    "IssuerOfPatientID": (0x0010, 0x0021, "LO"),
    "PatientSex": (0x0010, 0x0040, "CS"),
    "PatientAge": (0x0010, 0x1010, "AS"),
    "SliceThickness": (0x0018, 0x0050, "DS"),
    "EchoTime": (0x0018, 0x0081, "DS"),
    "InversionTime": (0x0018, 0x0082, "DS"),
    "SpacingBetweenSlices": (0x0018, 0x0088, "DS"),
    "TriggerTime": (0x0018, 0x1060, "DS"),
    "GantryDetectorTilt": (0x0018, 0x1120, "DS"),
    "FlipAngle": (0x0018, 0x1314, "DS"),
    "EffectiveEchoTime": (0x0018, 0x9082, "FD"),
    "DiffusionBValue": (0x0018, 0x9087, "FD"),
    "DiffusionGradientOrientation": (0x0018, 0x9089, "FD"),
    "StudyInstanceUID": (0x0020, 0x000D, "UI"),
    "SeriesInstanceUID": (0x0020, 0x000E, "UI"),
    "AcquisitionNumber": (0x0020, 0x0012, "IS"),
    "InstanceNumber": (0x0020, 0x0013, "IS"),
    "ImagePositionPatient": (0x0020, 0x0032, "DS"),
    "ImageOrientationPatient": (0x0020, 0x0037, "DS"),
    "FrameOfReferenceUID": (0x0020, 0x0052, "UI"),
    "TemporalPositionIdentifier": (0x0020, 0x0100, "IS"),
    "ImagesInAcquisition": (0x0020, 0x1002, "IS"),
    "StackID": (0x0020, 0x9056, "SH"),
    "TemporalPositionIndex": (0x0020, 0x9128, "UL"),
    "NominalCardiacTriggerDelayTime": (0x0020, 0x9153, "FD"),
    "FrameAcquisitionNumber": (0x0020, 0x9156, "US"),
    "DimensionIndexValues": (0x0020, 0x9157, "UL"),
    "ConcatenationUID": (0x0020, 0x9161, "UI"),
    "InConcatenationNumber": (0x0020, 0x9162, "US"),
    "InConcatenationTotalNumber": (0x0020, 0x9163, "US"),
    "ConcatenationFrameOffsetNumber": (0x0020, 0x9228, "UL"),
    "SamplesPerPixel": (0x0028, 0x0002, "US"),
    "PhotometricInterpretation": (0x0028, 0x0004, "CS"),
    "PlanarConfiguration": (0x0028, 0x0006, "US"),
    "NumberOfFrames": (0x0028, 0x0008, "IS"),
    "Rows": (0x0028, 0x0010, "US"),
    "Columns": (0x0028, 0x0011, "US"),
    "PixelSpacing": (0x0028, 0x0030, "DS"),
    "BitsAllocated": (0x0028, 0x0100, "US"),
    "BitsStored": (0x0028, 0x0101, "US"),
    "HighBit": (0x0028, 0x0102, "US"),
    "PixelRepresentation": (0x0028, 0x0103, "US"),
    "BurnedInAnnotation": (0x0028, 0x0301, "CS"),
    "WindowCenter": (0x0028, 0x1050, "DS"),
    "WindowWidth": (0x0028, 0x1051, "DS"),
    "RescaleIntercept": (0x0028, 0x1052, "DS"),
    "RescaleSlope": (0x0028, 0x1053, "DS"),
    "RescaleType": (0x0028, 0x1054, "LO"),
    "ModalityLUTSequence": (0x0028, 0x3000, "SQ"),
    "NumberOfSlices": (0x0054, 0x0081, "US"),
    "ReferencedSegmentNumber": (0x0062, 0x000B, "US"),
    "GridFrameOffsetVector": (0x3004, 0x000C, "DS"),
    "SharedFunctionalGroupsSequence": (0x5200, 0x9229, "SQ"),
    "PerFrameFunctionalGroupsSequence": (0x5200, 0x9230, "SQ"),
    # private, believed only where the block's creator is named (see _vendor_splits)
    "SiemensCreator": (0x0019, 0x0010, "LO"),
    "SiemensBValue": (0x0019, 0x100C, "IS"),
    "SiemensDiffusionDirection": (0x0019, 0x100E, "FD"),
    "GeCreator": (0x0043, 0x0010, "LO"),
    "GeImageKind": (0x0043, 0x102F, "SS"),
    "GeBValue": (0x0043, 0x1039, "IS"),
    "UihCreator": (0x0065, 0x0010, "LO"),
    "UihBValue": (0x0065, 0x1009, "FD"),
    "UihDiffusionDirection": (0x0065, 0x1037, "FD"),
    "UihSlices": (0x0065, 0x1050, "DS"),
    "PhilipsCreator": (0x2001, 0x0010, "LO"),
    "PhilipsBValue": (0x2001, 0x1003, "FL"),
}
_TAG = {keyword: tag(group, element) for keyword, (group, element, _) in ATTRIBUTES.items()}
_VR = {keyword: vr for keyword, (_, _, vr) in ATTRIBUTES.items()}
_KEYWORD = {group << 16 | element: keyword for keyword, (group, element, _) in ATTRIBUTES.items()}
_WANTED = {_TAG[keyword]: vr_number(vr) for keyword, vr in _VR.items()} | dict(MARKS)
_BINARY = {"US": Struct("<H"), "SS": Struct("<h"), "UL": Struct("<I"), "FL": Struct("<f"), "FD": Struct("<d")}
# Text in the character set of the file; all other text that is read here is plain ASCII by the standard.
_LOCAL = ("PatientID", "IssuerOfPatientID", "Manufacturer", "ManufacturerModelName", "RescaleType")
_SEEN: dict[int, Run] = {}  # of the files before, for the next of their series
_CHARSET = _TAG["SpecificCharacterSet"]
_LOCAL_TAGS = tuple(_TAG[keyword] for keyword in _LOCAL)
# What parts a series honestly, beside the kind of image and the stack.
_SPLIT_NUMBERS = (
    "EchoTime", "EffectiveEchoTime", "DiffusionBValue", "DiffusionGradientOrientation", "TemporalPositionIdentifier",
    "TemporalPositionIndex", "ReferencedSegmentNumber",
)  # fmt: skip
_HINTS = (
    "InversionTime", "FlipAngle", "TriggerTime", "NominalCardiacTriggerDelayTime", "AcquisitionNumber",
    "FrameAcquisitionNumber",
)  # fmt: skip
# What no scan needs, and what may therefore say anything.
_SOFT = frozenset((
    "InversionTime", "FlipAngle", "ImagesInAcquisition", "NumberOfSlices", "UihBValue", "UihDiffusionDirection",
    "UihSlices",
))  # fmt: skip
_HINT_TAGS = tuple(_TAG[keyword] for keyword in _HINTS)
_WINDOW = (_TAG["WindowCenter"], _TAG["WindowWidth"])
# What differs within a series; the rest is made once.
_VARYING = frozenset((
    "SOPClassUID", "SOPInstanceUID", "PatientID", "IssuerOfPatientID", "InstanceNumber", "ImagePositionPatient",
    "WindowCenter", "WindowWidth", "GridFrameOffsetVector", "ConcatenationUID", "InConcatenationNumber",
    "InConcatenationTotalNumber", "ConcatenationFrameOffsetNumber", *_HINTS,
))  # fmt: skip
_CONSTANT = tuple(key for keyword, key in _TAG.items() if keyword not in _VARYING)
_SPLIT_TAGS = frozenset(_TAG[keyword] for keyword in _SPLIT_NUMBERS)
_GROUP_TAGS = frozenset(
    _TAG[keyword] for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
)
_VENDOR_TAGS = frozenset(_TAG[keyword] for keyword in ("SiemensCreator", "GeCreator", "UihCreator", "PhilipsCreator"))
# A series' identifier behind its study's, as they follow each other at the top of a data set and not in a reference to
# another series; of lengths as explicit and implicit VR have them.
_SERIES_BYTES = re.compile(
    rb"\x20\0\x0d\0(?:UI..|.\0\0\0)[0-9.]{1,64}[\0 ]?\x20\0\x0e\0(?:UI..|.\0\0\0)([0-9.]{1,64})", re.DOTALL
)
# Functional groups whose first item says something about the frame (PS3.3 C.7.6.16.2); others hold references.
_MACROS = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
    "FrameContentSequence", "MREchoSequence", "MRDiffusionSequence", "CardiacSynchronizationSequence",
    "MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence", "XAXRFFrameCharacteristicsSequence",
    "SegmentIdentificationSequence", "FrameVOILUTSequence", "PlanePositionVolumeSequence",
)  # fmt: skip
Values = Mapping[int, bytes]
Splits = tuple[tuple[str, str], ...]


def read_header(start: bytes, file_size: int, whole: Callable[[], bytes]) -> Header:
    """Read what intake needs of one DICOM file, and refuse a file that is not what it declares.

    Args:
        start: the first 32 KiB of the file, or all of it.
        file_size: bytes.
        whole: gives all bytes; asked where the header is longer, the pixels are encapsulated, or the bytes are odd.

    Raises:
        DamagedError: ``not_dicom``, ``bad_header``, ``bad_size``, ``length_past_end``, ``truncated``, ``too_deep``,
            ``too_large`` or ``changed``; nothing else, whatever the bytes are.
    """
    return _read(start, file_size, whole, plainly=True)


def read_doubtful_header(data: bytes) -> Header:
    """Read a header the slow way, as :func:`read_header`: every element is walked, pydicom reads the values."""
    return _read(data, len(data), lambda: data, plainly=False)


def _read(start: bytes, file_size: int, whole: Callable[[], bytes], plainly: bool) -> Header:
    found: dict[int, bytes] = {}
    file = _File(start, file_size, whole)
    try:
        if start[128:132] != b"DICM" and not _starts_a_data_set(start):
            raise ScanError("not_dicom", "no DICM after a preamble, and no data set at the start")
        if plainly:
            try:
                return _plain(file, found)
            except (Unclear, struct_error):
                pass  # legal, perhaps: the slow way decides
        try:
            return _doubtful(file, found)
        except struct_error as error:
            raise ScanError("truncated", "the file ends inside an element") from error
    except DamagedError:
        raise
    except ScanError as error:
        header = _partial(found, file_size)
        if start[128:132] != b"DICM" and header.sop_class is None:
            raise DamagedError("not_dicom", "none of DICOM's marks, or only its first two bytes") from error
        raise DamagedError(error.code, error.reason, header) from error


class _File:
    """The bytes of a file, as many of them as were asked for."""

    def __init__(self, start: bytes, size: int, whole: Callable[[], bytes]) -> None:
        self.data, self.size, self._whole = start, size, whole

    def all(self) -> bytes:
        """Give all bytes."""
        if len(self.data) != self.size:
            self.data = self._whole()
            if len(self.data) != self.size:
                raise ScanError("changed", "the file changed while it was being read; it will be taken next time")
        return self.data

    @property
    def executable(self) -> str | None:
        """Tell whether the preamble makes a program of the file (CVE-2019-11687)."""
        if self.data[128:132] != b"DICM":
            return None
        return "PE" if self.data[:2] == b"MZ" else "ELF" if self.data[:4] == b"\x7fELF" else None


def _starts_a_data_set(start: bytes) -> bool:
    """Tell a data set without preamble: group 2 or 8 comes first, in either byte order."""
    return start[:2] in (b"\x02\x00", b"\x08\x00") or (start[:2] == b"\x00\x08" and has_vr(start, 0))


def _plain(file: _File, found: dict[int, bytes]) -> Header:
    """Read a header in explicit or implicit VR little endian, of one plane, by hand.

    Raises:
        Unclear, struct.error: not plainly understood.
    """
    data, size = file.data, file.size
    if data[128:132] != b"DICM":
        raise Unclear
    meta, position = read_meta(data, 132, size)
    syntax = _uid(meta.get(META_SYNTAX))
    explicit = syntax == EXPLICIT or (syntax or "").startswith(_ENCAPSULATED)
    if syntax is None or not (explicit or syntax == IMPLICIT) or has_vr(data, position) != explicit:
        raise Unclear
    step: Callable[..., int] = partial(walk_explicit, seen=_SEEN) if explicit else walk_implicit
    try:
        end = step(data, position, size, _WANTED, found)
        short = end > len(data) - 12 and len(data) < size
    except struct_error:
        short = True
    if short:
        data = file.all()
        found.clear()
        end = step(data, position, size, _WANTED, found)
    if _is_enhanced(found):
        raise Unclear
    local = b"".join([found[key] for key in _LOCAL_TAGS if key in found])
    if not local.isascii() or b"\x1b" in local or b"\0" in found.get(_CHARSET, b"")[:-1]:
        raise Unclear
    place = None if end >= size else _place(file, end, explicit, LITTLE, syntax)
    header = _header(found, size, syntax, place, meta, file.executable, plain=True)
    return _checked(header, file, place, explicit, LITTLE)


def _doubtful(file: _File, found: dict[int, bytes]) -> Header:
    """Walk every element first; then let pydicom read the values, and hold that both saw the same data set."""
    data = file.all()
    meta, position = read_meta(data, 132 if data[128:132] == b"DICM" else 0, len(data))
    syntax = _uid(meta.get(META_SYNTAX)) or _guess(data, position)
    order = BIG if syntax == BIG_ENDIAN else LITTLE
    inside = file
    if syntax == DEFLATED:
        data, position = inflate(data[position:]), 0
        inside = _File(data, len(data), lambda: data)
    explicit = has_vr(data, position)
    end = walk(data, position, len(data), explicit, order, found)
    place = None if end >= len(data) else _place(inside, end, explicit, order, syntax)
    with _pydicom():
        dataset = _with_pydicom(data, position, end, explicit, order)
        values = _values(dataset)
        planes = _frame_planes(dataset, values) if place is not None and _is_enhanced(values) else None
    header = _header(values, file.size, syntax, place, meta, file.executable, planes)
    header = _checked(header, inside, place, explicit, order)
    return replace(header, pixel_offset=None) if syntax == DEFLATED else header


def _guess(data: bytes, position: int) -> str:
    """Guess the encoding of a data set that does not name it, as pydicom does."""
    if not has_vr(data, position):
        return IMPLICIT
    return BIG_ENDIAN if int.from_bytes(data[position : position + 2], "little") >= 0x0400 else EXPLICIT


def _place(file: _File, position: int, explicit: bool, order: Order, syntax: str) -> PixelPlace:
    """Read the head of the pixel element; of encapsulated pixels, walk the fragments."""
    key, _, length, offset = read_head(file.data, position, explicit, order)
    encapsulated = syntax.startswith(_ENCAPSULATED)
    if length != UNDEFINED:
        if encapsulated:
            raise ScanError("bad_header", "compressed pixels that are not encapsulated")
        return PixelPlace(PIXELS[key], offset, length, offset + length, file.size - offset)
    if syntax in (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN):
        raise ScanError("bad_header", "encapsulated pixels where the transfer syntax has none")
    end, lengths = skip_fragments(file.all(), offset, file.size, order)
    return PixelPlace(PIXELS[key], offset, None, end, file.size - offset, len(lengths) - 1)


def _checked(header: Header, file: _File, place: PixelPlace | None, explicit: bool, order: Order) -> Header:
    """Hold that the pixels are all there, and that what follows them ends inside the file."""
    if place is None:
        return header
    try:
        _check_pixels(header, place)
        if place.end > file.size:
            raise past_end()
        if place.end < file.size:
            walk(file.all(), place.end, file.size, explicit, order, {}, to_pixels=False)
    except struct_error as error:
        raise DamagedError("truncated", "the file ends inside an element", header) from error
    except ScanError as error:
        raise DamagedError(error.code, error.reason, header) from error
    return header


def _check_pixels(header: Header, place: PixelPlace) -> None:
    """Refuse fewer pixels than the header declares; pydicom says so only when it decodes them."""
    if place.length is None:
        if place.fragments < (1 if header.transfer_syntax.startswith(_VIDEO) else header.frames):
            raise ScanError("truncated", f"{place.fragments} fragments of pixels for {header.frames} frames")
        return
    samples = 2 if header.photometric in ("YBR_FULL_422", "YBR_PARTIAL_422") else header.samples
    wanted = (header.rows * header.columns * header.frames * samples * header.bits_allocated + 7) // 8
    there = min(place.length, place.left)
    if there < wanted:
        raise ScanError("truncated", f"{there} bytes of pixel data where the header declares {wanted}")


def _header(
    values: Values,
    file_size: int,
    syntax: str,
    place: PixelPlace | None,
    meta: Values,
    executable: str | None,
    planes: tuple[Plane, ...] | None = None,
    plain: bool = False,
) -> Header:
    """Make the record from the bytes of the values, the same ones whichever way they were found.

    Raises:
        ScanError: ``bad_header``, ``bad_size`` or ``too_large``.
    """
    constant, plane = _constant(tuple(map(values.get, _CONSTANT)), None if place is None else place.keyword)
    sop_class = _string(values, "SOPClassUID") or _uid(meta.get(META_CLASS))
    if sop_class is None:
        raise ScanError("bad_header", "looks like DICOM but names no SOP class: damaged, or not DICOM")
    if constant["mosaic"] and planes is not None and _have_places_of_their_own(planes) and not _is_grid(values):
        constant = {**constant, "mosaic": False}
    return Header(
        file_size=file_size,
        transfer_syntax=syntax,
        sop_class=sop_class,
        sop_instance=_string(values, "SOPInstanceUID"),
        patient=_string(values, "PatientID"),
        issuer=_string(values, "IssuerOfPatientID"),
        instance_number=_integer(values, "InstanceNumber"),
        planes=_classic_planes(values, constant["frames"], plane) if planes is None else planes,
        pixel_offset=None if place is None else place.offset,
        pixel_length=None if place is None else place.length,
        pixel_keyword=None if place is None else place.keyword,
        executable=executable,
        window=_window(tuple(map(values.get, _WINDOW))),
        part=_part(values) if _TAG["ConcatenationUID"] in values else None,
        plain=plain,
        **constant,
    )


@lru_cache(maxsize=256)
def _constant(raws: tuple[bytes | None, ...], pixels: str | None) -> tuple[dict[str, Any], Plane]:
    """Give the fields that the files of a series share, from their bytes: made once a series, not once a file."""
    values = {key: raw for key, raw in zip(_CONSTANT, raws, strict=True) if raw is not None}
    parts = tuple(part.strip() for part in (_string(values, "ImageType") or "").split("\\"))
    fields = {
        "image_type": parts if parts != ("",) else (),
        "gantry_tilt_degrees": _number(values, "GantryDetectorTilt"),
        "mosaic": not {"MOSAIC", "VFRAME"}.isdisjoint(parts) or _is_grid(values),
        "declared": _declared(values),
        "has_lut": values.get(_TAG["ModalityLUTSequence"], b"")[:4] == _ITEM,
        **_names(values),
        **_image(values, pixels),
    }
    return fields, _plane(values)


def _part(values: Values) -> Part | None:
    """Read which part of a concatenation this object is."""
    whole = _string(values, "ConcatenationUID")
    if whole is None:
        return None
    total = _integer(values, "InConcatenationTotalNumber")
    offset = _integer(values, "ConcatenationFrameOffsetNumber")
    return Part(whole, _integer(values, "InConcatenationNumber") or 0, total, offset)


def _declared(values: Values) -> int | None:
    """Read how many images there must be; of numbers that are none, nothing."""
    keywords = ("ImagesInAcquisition", *(("NumberOfSlices",) if _string(values, "Modality") == "PT" else ()))
    return max((int(number) for keyword in keywords for number in _soft_numbers(values, keyword)), default=0) or None


def _is_grid(values: Values) -> bool:
    """Tell a grid of United Imaging by the number of its slices, whatever its image type says."""
    return _string(values, "UihCreator") == UIH_CREATOR and max(_soft_numbers(values, "UihSlices"), default=0) > 1


def _have_places_of_their_own(planes: Sequence[Plane]) -> bool:
    """Tell the slices of a mosaic that was taken apart: Siemens XA leaves ``MOSAIC`` in the image type.

    Whole mosaics that follow a moving head differ in place too, but by less than slices do.
    """
    thinnest = min((plane.thickness_mm or 0.0 for plane in planes), default=0.0)
    places = sorted({tuple(round(mm, 2) for mm in plane.position_mm or ()) for plane in planes})
    if len(places) < 2 or not all(places) or not thinnest > 0:
        return False
    return min(dist(one, other) for one, other in pairwise(places)) >= thinnest / 2


@lru_cache(maxsize=1024)
def _window(raws: tuple[bytes | None, ...]) -> tuple[float, float] | None:
    """Read the first window of a header."""
    values = {key: raw for key, raw in zip(_WINDOW, raws, strict=True) if raw is not None}
    center, width = _numbers(values, "WindowCenter"), _numbers(values, "WindowWidth")
    return (center[0], width[0]) if center and width else None


def _names(values: Values) -> dict[str, Any]:
    """Give the fields of a header that are text, as they are."""
    return {
        "series": _string(values, "SeriesInstanceUID"),
        "study": _string(values, "StudyInstanceUID"),
        "frame_of_reference": _string(values, "FrameOfReferenceUID"),
        "modality": _string(values, "Modality"),
        "burned_in": _string(values, "BurnedInAnnotation"),
        "manufacturer": _string(values, "Manufacturer"),
        "model": _string(values, "ManufacturerModelName"),
        "sex": _string(values, "PatientSex"),
        "age": _string(values, "PatientAge"),
    }


def _image(values: Values, pixels: str | None) -> dict[str, Any]:
    """Give the fields of a header that say how pixels are stored; without pixels, what there is of them.

    Raises:
        ScanError: ``bad_header``, ``bad_size`` or ``too_large``: what pixels cannot be read without is not there.
    """
    rows, columns = _integer(values, "Rows"), _integer(values, "Columns")
    frames, samples = _integer(values, "NumberOfFrames"), _integer(values, "SamplesPerPixel")
    allocated, stored = _integer(values, "BitsAllocated"), _integer(values, "BitsStored")
    high, signed = _integer(values, "HighBit"), _integer(values, "PixelRepresentation")
    photometric = _string(values, "PhotometricInterpretation")
    if pixels is not None:
        if rows is None or columns is None or samples is None or allocated is None or photometric is None:
            raise ScanError("bad_header", "rows, columns, samples, bits or photometric interpretation are missing")
        if pixels == "PixelData" and (stored is None or signed is None):
            raise ScanError("bad_header", "bits stored or pixel representation are missing")
        if rows < 1 or columns < 1:
            raise ScanError("bad_size", f"the header declares {rows} rows and {columns} columns")
        _check_bits(pixels, allocated, stored, high, signed, samples)
        if frames is None:
            frames = 1
        if not 1 <= frames <= MOST_FRAMES:
            code = "too_large" if frames > MOST_FRAMES else "bad_header"
            raise ScanError(code, f"the header declares {frames} frames")
    bits = stored or allocated or 0
    return {
        "rows": rows or 0,
        "columns": columns or 0,
        "frames": frames or 0 if pixels is not None else 0,
        "samples": samples or 0,
        "planar": _integer(values, "PlanarConfiguration") or 0,
        "bits_allocated": allocated or 0,
        "bits_stored": bits,
        "high_bit": high if high is not None else max(bits - 1, 0),
        "signed": signed == 1,
        "photometric": photometric or "",
    }


def _check_bits(
    keyword: str, allocated: int, stored: int | None, high: int | None, signed: int | None, samples: int
) -> None:
    known = {"PixelData": (1, 8, 16, 32, 64), "FloatPixelData": (32,), "DoubleFloatPixelData": (64,)}[keyword]
    if allocated not in known:
        raise ScanError("bad_header", f"{allocated} bits allocated; {', '.join(map(str, known))} are known")
    if stored is not None and not 1 <= stored <= allocated:
        raise ScanError("bad_header", f"{stored} bits stored of {allocated}")
    if high is not None and not 0 <= high < allocated:
        raise ScanError("bad_header", f"high bit {high} of {allocated}")
    if signed not in (None, 0, 1):
        raise ScanError("bad_header", f"pixel representation {signed}")
    if not 1 <= samples <= 4:
        raise ScanError("bad_header", f"{samples} samples per pixel")


def partial_header(start: bytes, file_size: int) -> Header | None:
    """Give what a file's first bytes say of its series, by their look alone; ``None`` where they do not."""
    match = _SERIES_BYTES.search(start)
    return None if match is None else _partial({_TAG["SeriesInstanceUID"]: match[1]}, file_size)


def _partial(found: Values, file_size: int) -> Header:
    """Give what is known of a damaged file: who it belongs to."""
    number: dict[str, Any] = dict.fromkeys(
        ("rows", "columns", "frames", "samples", "planar", "bits_allocated", "bits_stored", "high_bit"), 0
    )
    names = _names(found)
    return Header(
        file_size=file_size,
        transfer_syntax="",
        sop_class=_string(found, "SOPClassUID"),
        sop_instance=_string(found, "SOPInstanceUID"),
        patient=_string(found, "PatientID"),
        issuer=_string(found, "IssuerOfPatientID"),
        image_type=(),
        instance_number=None,
        signed=False,
        photometric="",
        planes=(),
        pixel_offset=None,
        pixel_length=None,
        pixel_keyword=None,
        plain=False,
        **names,
        **number,
    )


def _classic_planes(values: Values, frames: int, plane: Plane) -> tuple[Plane, ...]:
    """Give one plane per frame of an object without functional groups.

    Only the frames of a dose grid lie where its offsets say; the position of any other multi-frame object is that of
    its first frame, and no frame of it is placed.
    """
    if frames == 0:
        return ()
    place, hints = _numbers(values, "ImagePositionPatient", 3), _hints(values)
    plane = Plane(
        None if place is None else (place[0], place[1], place[2]),
        plane.orientation,
        plane.spacing_mm,
        plane.thickness_mm,
        plane.between_mm,
        plane.slope,
        plane.intercept,
        plane.rescale_type,
        plane.splits + hints if hints else plane.splits,
    )
    if frames == 1:
        return (plane,)
    offsets = _numbers(values, "GridFrameOffsetVector")
    position, way = plane.position_mm, plane.orientation
    if offsets is None or len(offsets) != frames or offsets[0] != 0.0 or position is None or way is None:
        return (replace(plane, position_mm=None),) * frames
    normal = (way[1] * way[5] - way[2] * way[4], way[2] * way[3] - way[0] * way[5], way[0] * way[4] - way[1] * way[3])
    x, y, z = position
    return tuple(replace(plane, position_mm=(x + normal[0] * o, y + normal[1] * o, z + normal[2] * o)) for o in offsets)


def _plane(values: Values) -> Plane:
    """Read where a plane lies, what its values mean and what it is told apart by."""
    x = _numbers(values, "ImagePositionPatient", 3)
    way = _numbers(values, "ImageOrientationPatient", 6)
    spacing = _numbers(values, "PixelSpacing", 2)
    return Plane(
        None if x is None else (x[0], x[1], x[2]),
        None if way is None else (way[0], way[1], way[2], way[3], way[4], way[5]),
        None if spacing is None else (spacing[0], spacing[1]),
        _number(values, "SliceThickness"),
        _number(values, "SpacingBetweenSlices"),
        _number(values, "RescaleSlope"),
        _number(values, "RescaleIntercept"),
        _string(values, "RescaleType"),
        _splits(values) + _hints(values),
    )


def _hints(values: Values) -> Splits:
    """Give what may part a series, and differs per slice in many a plain one: geometry decides whether it helps."""
    return _hints_of(tuple(map(values.get, _HINT_TAGS)))


@lru_cache(maxsize=1024)
def _hints_of(raws: tuple[bytes | None, ...]) -> Splits:
    values = {key: raw for key, raw in zip(_HINT_TAGS, raws, strict=True) if raw is not None}
    return tuple(_numeric_splits(values, _HINTS))


def _numeric_splits(values: Values, keywords: Sequence[str]) -> Iterator[tuple[str, str]]:
    for keyword in keywords:
        numbers = _parting(values, keyword)
        if numbers:
            yield keyword, "\\".join(f"{number:.10g}" for number in numbers)


def _parting(values: Values, keyword: str) -> tuple[float, ...] | None:
    """Read what may part a series. Of what may say anything, nothing is no fault: places that repeat are refused."""
    return _soft_numbers(values, keyword) if keyword in _SOFT else _numbers(values, keyword)


def _splits(values: Values) -> Splits:
    """Give what parts a series honestly, as stable text in a fixed order."""
    splits = []
    kinds = _string(values, "FrameType") or _string(values, "ImageType")
    parts = [part.strip() for part in kinds.split("\\")[2:]] if kinds else []
    if any(parts):
        splits.append(("ImageType", "\\".join(parts)))
    for keyword in ("ComplexImageComponent", "StackID"):
        text = _string(values, keyword)
        if text is not None:
            splits.append((keyword, text))
    if not _SPLIT_TAGS.isdisjoint(values):
        splits += _numeric_splits(values, _SPLIT_NUMBERS)
    if not _VENDOR_TAGS.isdisjoint(values):
        splits += _vendor_splits(values, {keyword for keyword, _ in splits})
    return tuple(splits)


def _vendor_splits(values: Values, known: Set[str]) -> list[tuple[str, str]]:
    """Read b-value, direction and kind of image from private elements whose creator is named in the file."""
    splits = []
    siemens = _string(values, "SiemensCreator") == "SIEMENS MR HEADER"
    ge = _string(values, "GeCreator") == "GEMS_PARM_01"
    philips = _string(values, "PhilipsCreator") in ("Philips Imaging DD 001", "PHILIPS IMAGING DD 001")
    uih = _string(values, "UihCreator") == UIH_CREATOR
    b_values = (siemens, "SiemensBValue"), (ge, "GeBValue"), (uih, "UihBValue"), (philips, "PhilipsBValue")
    for vendor, keyword in b_values:
        numbers = _parting(values, keyword) if vendor and "DiffusionBValue" not in known else None
        if numbers:
            # GE adds 1e9 to the b-value of some sequences, as a flag
            splits.append(("DiffusionBValue", f"{numbers[0] % 1e9 if ge else numbers[0]:.10g}"))
    for vendor, keyword in ((siemens, "SiemensDiffusionDirection"), (uih, "UihDiffusionDirection")):
        direction = _parting(values, keyword) if vendor else None
        if direction and "DiffusionGradientOrientation" not in known:
            splits.append(("DiffusionGradientOrientation", "\\".join(f"{number:.10g}" for number in direction)))
    kind = _integer(values, "GeImageKind") if ge and "ComplexImageComponent" not in known else None
    if kind in range(4):
        splits.append(("ComplexImageComponent", ("MAGNITUDE", "PHASE", "REAL", "IMAGINARY")[kind or 0]))
    return splits


def _uid(raw: bytes | None) -> str | None:
    return (raw or b"").decode("latin-1").strip(" \0") or None


def _string(values: Values, keyword: str) -> str | None:
    raw = values.get(_TAG[keyword])
    if not raw:
        return None
    text = raw.decode("utf-8", "surrogateescape") if keyword in _LOCAL else raw.decode("latin-1")
    return text.strip(" \0") or None


def _soft_numbers(values: Values, keyword: str) -> tuple[float, ...]:
    """Read the numbers of a value that may be anything without harm: of what is no number, nothing."""
    try:
        return _numbers(values, keyword) or ()
    except ScanError:
        return ()


def _numbers(values: Values, keyword: str, count: int | None = None) -> tuple[float, ...] | None:
    """Read the numbers of a value; ``None`` where it is absent or empty.

    Raises:
        ScanError: ``bad_header``: not numbers, not finite, absurd, or not as many as there must be.
    """
    raw = values.get(_TAG[keyword])
    if not raw:
        return None
    vr = _VR[keyword]
    try:
        if vr in _BINARY:
            numbers = tuple(float(number) for (number,) in _BINARY[vr].iter_unpack(raw))
        else:
            if raw[-1] == 0 or raw.isspace():
                raw = raw.rstrip(b" \0")
            if not raw.strip(b"\\ "):
                return None
            if b"_" in raw:  # Python's numbers may have it, the standard's not
                raise ValueError
            numbers = tuple(map(float, raw.split(b"\\")))
    except (ValueError, struct_error) as error:
        raise ScanError("bad_header", f"{keyword} is not a number") from error
    if count is not None and len(numbers) != count:
        raise ScanError("bad_header", f"{keyword} has {len(numbers)} values; {count} are wanted")
    for number in numbers:
        if not -ABSURD < number < ABSURD and not (keyword == "GeBValue" and isfinite(number)):
            raise ScanError("bad_header", f"{keyword} is not a finite number of a plausible size")
    return numbers


def _number(values: Values, keyword: str) -> float | None:
    """Read one number."""
    numbers = _numbers(values, keyword, 1)
    return None if numbers is None else numbers[0]


def _integer(values: Values, keyword: str) -> int | None:
    """Read one whole number."""
    raw = values.get(_TAG[keyword])
    if not raw:
        return None
    if _VR[keyword] == "IS" and raw.isdigit() and len(raw) < 10:
        return int(raw)
    if len(raw) == 2 and _VR[keyword] == "US":
        return raw[0] | raw[1] << 8
    number = _numbers(values, keyword, 1)
    if number is None:
        return None
    if number[0] != int(number[0]):
        raise ScanError("bad_header", f"{keyword} is not a whole number")
    return int(number[0])


def describe(header: Header, names: Pseudonymiser) -> dict[str, Any]:
    """Give the fields of a Scan that a header knows, identifiers as pseudonyms."""
    uids = (header.sop_instance, header.series, header.study)
    patient = f"{header.patient}\0{header.issuer}" if header.issuer else header.patient
    device = " ".join(_TEXT.sub("", text or "") for text in (header.manufacturer, header.model)).strip()
    return {
        "keys": tuple(names.uid_key(uid) for uid in uids if uid),
        "patient": names.name("patient", patient) if header.patient and patient else None,
        "study": names.name("study", header.study) if header.study else None,
        "modality": _TEXT.sub("", header.modality or "") or None,
        "scanner": device[:64] or None,
        "sex": header.sex if header.sex in ("F", "M", "O") else None,
        "age_years": age_in_years(header.age),
    }


def header_from_dataset(dataset: Dataset, file_size: int, place: PixelPlace | None = None) -> Header:
    """Make the record from a data set that pydicom has read or somebody has built; nothing is checked against bytes.

    Args:
        place: where the pixels lie, if that is known.

    Raises:
        ScanError: ``bad_header``, ``bad_size`` or ``too_large``.
    """
    meta = getattr(dataset, "file_meta", None)
    syntax = str(meta.get("TransferSyntaxUID", "")) if meta is not None else ""
    if place is None:
        keyword = next((keyword for keyword in PIXELS.values() if keyword in dataset), None)
        place = None if keyword is None else PixelPlace(keyword, 0, None, 0, 0)
        unplaced = True
    else:
        unplaced = False
    with _pydicom():
        values = _values(dataset)
        planes = _frame_planes(dataset, values) if place is not None and _is_enhanced(values) else None
    header = _header(values, file_size, syntax or IMPLICIT, place, {}, None, planes)
    return replace(header, pixel_offset=None) if unplaced else header


def hush_pydicom() -> None:
    """Keep pydicom from warning and logging, in the whole process: its words quote what a file says."""
    from pydicom import config

    config.settings.reading_validation_mode = config.IGNORE
    config.logger.addFilter(_nothing)
    warnings.filterwarnings("ignore", module=r"pydicom(\..*)?$")


def _nothing(record: LogRecord) -> bool:
    return False


_one_at_a_time = RLock()


@contextmanager
def _pydicom() -> Iterator[None]:
    """Let pydicom work without a word (its warnings quote what a file says), and turn all it raises into ScanError.

    Silence is of the whole process, hence one reader at a time.

    Raises:
        ScanError: ``bad_header`` or ``too_deep``.
    """
    from pydicom import config

    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.settings.reading_validation_mode = config.IGNORE
        config.logger.disabled = True
        try:
            yield
        except (ScanError, struct_error):
            raise
        except RecursionError as error:
            raise ScanError("too_deep", "sequences nested deeper than a header needs") from error
        except Exception as error:
            # Hostile bytes may make a parser raise anything; its text may quote them, so only its kind is kept.
            raise ScanError("bad_header", f"the header cannot be read ({type(error).__name__})") from error
        finally:
            config.logger.disabled = False


def _with_pydicom(data: bytes, position: int, end: int, explicit: bool, order: Order) -> Dataset:
    """Read a data set up to its pixels with pydicom, and hold that it ends where the walk ended.

    Raises:
        ScanError: ``bad_header``.
    """
    from pydicom.filereader import _at_pixel_data, read_dataset

    stream = BytesIO(data)
    stream.seek(position)
    dataset = read_dataset(stream, not explicit, order.little, stop_when=_at_pixel_data)
    if stream.tell() != end:
        raise ScanError("bad_header", "two ways to read the header do not see the same elements")
    return dataset


def _values(dataset: Dataset) -> dict[int, bytes]:
    """Give the wanted values of a data set as the bytes they would have in little endian."""
    values = {}
    for number in dataset.keys():  # noqa: SIM118 (iterating converts every value)
        keyword = _KEYWORD.get(number)
        raw = None if keyword is None else _value(dataset, number, keyword, _VR[keyword])
        if keyword is not None and raw is not None:
            values[_TAG[keyword]] = raw
    return values


def _frame_planes(dataset: Dataset, values: Values) -> tuple[Plane, ...]:
    """Give the plane of every frame from its functional groups, shared ones first. Source: PS3.3 C.7.6.16.

    Raises:
        ScanError: ``bad_header``: unreadable, or not one group per frame.
    """
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    frames = _integer(values, "NumberOfFrames") or 1
    if len(groups) not in (0, frames):
        raise ScanError("bad_header", f"functional groups of {len(groups)} frames; there are {frames}")
    common = {_TAG[k]: values[_TAG[k]] for k in ("ImageType", "ComplexImageComponent") if _TAG[k] in values}
    for item in shared:
        common |= _group_values(item)
    if not groups:
        plane = _plane(common)
        return (plane if frames == 1 else replace(plane, position_mm=None),) * min(frames, MOST_FRAMES)
    merged = [common | _group_values(item) for item in groups]
    planes = [_plane(group) for group in merged]
    names = [_dimension(item) for item in dataset.get("DimensionIndexSequence") or []]
    return _with_dimensions(planes, names, [_numbers(group, "DimensionIndexValues") for group in merged])


def _is_enhanced(values: Values) -> bool:
    """Tell an object whose frames have functional groups."""
    return not _GROUP_TAGS.isdisjoint(values)


def _group_values(group: Dataset) -> dict[int, bytes]:
    """Give the wanted values of one frame's functional groups."""
    values: dict[int, bytes] = {}
    for keyword in _MACROS:
        sequence = group.get(keyword)
        if not sequence:
            continue
        values |= _values(sequence[0])
        direction = sequence[0].get("MRDiffusionGradientDirectionSequence") if keyword == "MRDiffusionSequence" else ()
        if direction:
            values |= _values(direction[0])
    return values


def _dimension(item: Dataset) -> str:
    """Name a dimension by the attribute it counts."""
    from pydicom.datadict import keyword_for_tag

    pointer = int(item.get("DimensionIndexPointer") or 0)
    return keyword_for_tag(pointer) or f"{pointer:08X}"


def _with_dimensions(
    planes: list[Plane], names: list[str], indices: list[tuple[float, ...] | None]
) -> tuple[Plane, ...]:
    """Add the dimensions that part a volume from another: those of whose values some has more than one position.

    A dimension each of whose values has one position counts slices (or moments of slices), whatever it is called. Where
    an attribute tears volumes apart (times that go on from slice to slice) and the dimension that counts it gives each
    of its values all positions, the dimension stands in its place.
    """
    rows = [row for row in indices if row is not None and len(row) == len(names)]
    if len(rows) != len(planes):
        return tuple(planes)
    several = len({plane.position_mm for plane in planes}) > 1
    kept = []
    for column, name in enumerate(names):
        positions = _positions(planes, [row[column] for row in rows])
        said = _positions(planes, [dict(plane.splits).get(name) for plane in planes])
        if len(said) > 1 and (_cover_alike(said) or not _cover_alike(positions)):
            continue
        if len(positions) > 1 and (not several or any(len(at) > 1 for at in positions)):
            kept.append((column, name))
    replaced = {name for _, name in kept}
    return tuple(
        replace(
            plane,
            splits=tuple((key, value) for key, value in plane.splits if key not in replaced)
            + tuple((f"{name}Index", f"{row[column]:.10g}") for column, name in kept),
        )
        for plane, row in zip(planes, rows, strict=True)
    )


def _positions(planes: Sequence[Plane], values: Sequence[Hashable]) -> list[set[Vector | None]]:
    """Give where the frames of each value lie."""
    found: dict[Hashable, set[Vector | None]] = {}
    for plane, value in zip(planes, values, strict=True):
        at = plane.position_mm
        found.setdefault(value, set()).add(None if at is None else (round(at[0], 3), round(at[1], 3), round(at[2], 3)))
    return list(found.values())


def _cover_alike(parts: Sequence[set[Vector | None]]) -> bool:
    return all(part == parts[0] for part in parts)


def _value(dataset: Dataset, number: int, keyword: str, vr: str) -> bytes | None:
    """Give one value; private ones only where they have the known value representation."""
    from pydicom.dataelem import RawDataElement
    from pydicom.sequence import Sequence as DicomSequence

    item: Any = dataset.get_item(number)
    if isinstance(item, RawDataElement) and isinstance(item.value, bytes | None):
        raw: bytes = item.value or b""
        found = item.VR if item.VR not in (None, "UN") else vr
        if vr == "SQ":
            return _ITEM if raw[:4] in (_ITEM, b"\xff\xfe\xe0\x00") else b""
        if found == vr and item.is_little_endian and not _is_local(keyword, raw):
            return raw
        if found == vr and vr in _BINARY:
            size = _BINARY[vr].size
            return b"".join(raw[at : at + size][::-1] for at in range(0, len(raw), size))
        if found == vr and not _is_local(keyword, raw):
            return raw
    elif isinstance(item.value, DicomSequence):
        return _ITEM if vr == "SQ" and len(item.value) else b""
    else:
        found = str(item.VR)
    if number >> 16 & 1 and found != vr:
        return None
    try:
        return _encode(dataset, number, keyword, vr)
    except Exception as error:  # a value is decoded where it is first asked for: a strange one may raise anything
        if keyword in _SOFT and not isinstance(error, MemoryError):
            return None
        raise


def _is_local(keyword: str, raw: bytes) -> bool:
    """Tell text that only its character set explains."""
    return keyword in _LOCAL and (not raw.isascii() or b"\x1b" in raw)


def _encode(dataset: Dataset, number: int, keyword: str, vr: str) -> bytes:
    """Give a value that pydicom has understood in the representation that the standard gives the attribute."""
    value = dataset[number].value
    parts = [] if value is None else list(value) if isinstance(value, MutableSequence) else [value]
    if vr in _BINARY:
        kind = float if vr in ("FL", "FD") else int
        return b"".join(_BINARY[vr].pack(kind(part)) for part in parts if part != "")
    text = "\\".join(part.decode("latin-1") if isinstance(part, bytes) else str(part) for part in parts)
    return text.encode("utf-8", "surrogateescape") if keyword in _LOCAL else text.encode("latin-1", "replace")
