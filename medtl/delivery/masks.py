"""Predicted masks become files that others read, on the source's own voxels: NIfTI, PNG, DICOM SEG. Pure: bytes out.

A mask comes as codes on the voxels of its scan: 0 background; of structures that exclude each other k is the k-th; of
structures that overlap bit k - 1 is the k-th; 255 does not count and is in no structure. Nothing is resampled or
turned here. The same mask of the same series by the same release gives the same bytes: every identifier is derived
from what it names, every date comes from the source.

Source: DICOM PS3.3 A.51 and C.8.20 (segmentation), PS3.5 B.2 (identifiers); NIfTI-1 (nifti1.h).
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import unicodedata
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from medtl import __version__
from medtl.delivery.table import Row, inert
from medtl.errors import ScanError
from medtl.records import AnyArray, Exclusion, FloatArray, GridPlan, IntArray

if TYPE_CHECKING:
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

Affine = Sequence[Sequence[float]]
Kind = Literal["binary", "labelmap"]
Code = tuple[str, str, str]  # value, scheme, meaning

UNCOUNTED = 255
_TILED, _GRID = frozenset({"MOSAIC", "VFRAME"}), (0x0065, 0x1050)  # Siemens; United Imaging
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS+ from LPS and back
_SQUARE = 1e-4  # of direction cosines; what is more oblique has no qform
_GZIP = 31  # zlib's word for a gzip file with the largest window
_SAME_PLACE = 0.05  # voxels
_SAME_WAY = 1e-3  # of direction cosines, and of the spacing
_DATES = ("ContentDate", "AcquisitionDate", "SeriesDate", "StudyDate")
_UNSHOWN = re.compile(r"[^A-Za-z0-9 ._/()+-]")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Who drew a mask."""

    name: str  # of the model
    release: str  # its identifier


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a structure is, in codes that other systems know. Source: DICOM PS3.16 CID 7150 and 7151."""

    category: Code
    type: Code


_ANATOMY: Code = ("91723000", "SCT", "Anatomical Structure")
_ALTERED: Code = ("49755003", "SCT", "Morphologically Abnormal Structure")
_UNKNOWN = Meaning(_ANATOMY, ("85756007", "SCT", "Tissue"))


def _named(category: Code, codes: Mapping[str, tuple[str, str]]) -> dict[str, Meaning]:
    return {name: Meaning(category, (value, "SCT", meaning)) for name, (value, meaning) in codes.items()}


MEANINGS: Mapping[str, Meaning] = {
    **_named(
        _ANATOMY,
        {
            "aorta": ("15825003", "Aorta"),
            "bladder": ("89837001", "Bladder"),
            "bone": ("272673000", "Bone"),
            "brain": ("12738006", "Brain"),
            "colon": ("71854001", "Colon"),
            "esophagus": ("32849002", "Esophagus"),
            "gallbladder": ("28231008", "Gallbladder"),
            "heart": ("80891009", "Heart"),
            "hippocampus": ("5366008", "Hippocampus"),
            "kidney": ("64033007", "Kidney"),
            "left atrium": ("82471001", "Left atrium"),
            "left ventricle": ("87878005", "Left ventricle"),
            "liver": ("10200004", "Liver"),
            "lung": ("39607008", "Lung"),
            "pancreas": ("15776009", "Pancreas"),
            "prostate": ("41216001", "Prostate"),
            "right ventricle": ("53085002", "Right ventricle"),
            "spinal cord": ("2748008", "Spinal cord"),
            "spleen": ("78961009", "Spleen"),
            "stomach": ("69695003", "Stomach"),
            "vertebra": ("51282000", "Vertebra"),
            "vessel": ("59820001", "Blood Vessel"),
        },
    ),
    **_named(
        _ALTERED,
        {
            "cyst": ("367643001", "Cyst"),
            "edema": ("79654002", "Edema"),
            "hemorrhage": ("50960005", "Hemorrhage"),
            "lesion": ("52988006", "Lesion"),
            "necrosis": ("6574001", "Necrosis"),
            "nodule": ("27925004", "Nodule"),
            "tumor": ("108369006", "Neoplasm"),
        },
    ),
}
_SPELLED = {"oesophagus": "esophagus", "oedema": "edema", "haemorrhage": "hemorrhage", "tumour": "tumor"}


def meaning_of(structure: str, meanings: Mapping[str, Meaning] = MEANINGS) -> Meaning:
    """Give the codes of a structure by its name, whatever its case, spelling, number and side; else those of tissue."""
    words = re.sub(r"[^a-z]+", " ", structure.lower()).strip()
    plain = re.sub(r"^(left|right) | (left|right)$", "", words)
    for name in (words, plain, words.removesuffix("s"), plain.removesuffix("s")):
        if (name := _SPELLED.get(name, name)) in meanings:
            return meanings[name]
    return _UNKNOWN


# ------------------------------------------------------------------------------------------------------- codes


def segments(codes: AnyArray, plan: GridPlan) -> Iterator[npt.NDArray[np.bool_]]:
    """Give where each structure is, in the order of the plan.

    Raises:
        ScanError: ``bad_mask``, for codes that no structure has.
    """
    inside = _counted(codes, plan)
    for number in range(len(plan.structures)):
        yield (inside >> number) & 1 == 1 if plan.overlapping else inside == number + 1


def _counted(codes: AnyArray, plan: GridPlan) -> AnyArray:
    inside = np.where(codes == UNCOUNTED, 0, codes)
    most = (1 << len(plan.structures)) - 1 if plan.overlapping else len(plan.structures)
    if inside.max(initial=0) > most:
        raise ScanError("bad_mask", f"codes above {most}, which stand for no structure")
    return inside


# ----------------------------------------------------------------------------------------------- NIfTI and PNG


def mask_nifti(values: AnyArray, affine: Affine, gzipped: bool = True) -> bytes:
    """Write a mask as NIfTI-1 on the voxels that it has: sform and qform (scanner), mm, no free text.

    A sheared affine, which no qform can say, has the sform alone.

    Args:
        values: uint8 or uint16, shape (slices, rows, columns).
        affine: voxel (column, row, slice) -> RAS+ mm.

    Raises:
        ScanError: ``bad_geometry``, or ``too_large`` for a side above 32,767.
    """
    import nibabel

    if values.ndim != 3 or values.dtype not in (np.uint8, np.uint16):
        raise ValueError("a mask is (slices, rows, columns), of uint8 or uint16")
    matrix = _matrix(affine)
    if max(values.shape) > 32_767:
        raise ScanError("too_large", f"a side of {max(values.shape)} voxels; NIfTI-1 ends at 32,767")
    turn = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    square = bool(np.abs(turn.T @ turn - np.eye(3)).max() < _SQUARE)
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape[::-1])
    header.set_xyzt_units("mm")
    header.set_qform(matrix, code=int(square))
    header.set_sform(matrix, code=1)
    header["vox_offset"], header["scl_slope"], header["scl_inter"] = 352, 1, 0
    stored = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    pieces = (header.binaryblock, bytes(4), stored.data)  # C order is NIfTI's own: columns fastest
    if not gzipped:
        return b"".join(pieces)
    packer = zlib.compressobj(1, wbits=_GZIP)  # no name and no time in it
    return b"".join([*(packer.compress(piece) for piece in pieces), packer.flush()])


def mask_png(values: AnyArray) -> bytes:
    """Write a mask of an image as a grey PNG of the same size, with nothing but pixels in it.

    Args:
        values: uint8 or uint16, shape (rows, columns).
    """
    from PIL import Image

    if values.ndim != 2 or values.dtype not in (np.uint8, np.uint16):
        raise ValueError("a mask of an image is (rows, columns), of uint8 or uint16")
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(stream, "PNG")
    return stream.getvalue()


def _matrix(affine: Affine) -> FloatArray:
    matrix = np.array(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise ScanError("bad_geometry", "an affine that is not finite, or flat")
    return matrix


# --------------------------------------------------------------------------------------------------- DICOM SEG


def source_header(data: bytes) -> Dataset:
    """Read what a DICOM file says, without its pixels.

    Raises:
        ScanError: ``bad_header``.
    """
    from pydicom import dcmread

    with _quiet(), _translated("the header of a source cannot be read"):
        return dcmread(io.BytesIO(data), stop_before_pixels=True, force=data[128:132] != b"DICM")


def dicom_seg(
    codes: AnyArray,
    plan: GridPlan,
    affine: Affine | None,
    sources: Sequence[Dataset],
    algorithm: Algorithm,
    *,
    kind: Kind = "binary",
    when: datetime | None = None,
    meanings: Mapping[str, Meaning] = MEANINGS,
) -> bytes:
    """Write a mask as a DICOM segmentation of the series it was drawn on, one segment for each structure.

    Patient and study are the source's, word for word: a de-identified series has a de-identified segmentation.

    Args:
        codes: shape (slices, rows, columns) of a volume, (rows, columns) of an image.
        affine: of the volume, voxel (column, row, slice) -> RAS+ mm; ``None`` of an image.
        sources: headers of all files of the volume, in any order; of an image the one.
        kind: ``labelmap`` has one frame for all structures, which must not share voxels; few systems read it yet.
        when: date and time of the content; default: the source's own.

    Returns:
        A DICOM file, uncompressed; frames that hold nothing are left out.

    Raises:
        ScanError: ``no_decoder`` (highdicom is missing), ``mask_geometry``, ``no_geometry``, ``bad_geometry``,
            ``bad_mask`` or ``bad_header``.
    """
    try:
        from highdicom.seg import Segmentation
    except ImportError as error:
        raise ScanError(
            "no_decoder", "DICOM segmentations are written by highdicom: pip install 'medtl[masks]'"
        ) from error
    if not sources:
        raise ScanError("no_geometry", "a DICOM segmentation needs the files that it was drawn on")
    with _quiet(), _translated("a segmentation cannot be made of this series"):
        pixels, frame = _stacked(codes, plan, kind), _frame(codes, affine, sources)
        first = frame.sources[0]
        content = when or _moment(first)
        series = _uid("series", algorithm.release, str(first.SeriesInstanceUID))
        seg: Any = Segmentation(
            source_images=frame.sources,
            pixel_array=pixels if pixels.any() else pixels[:1],
            segmentation_type=kind.upper(),
            segment_descriptions=_descriptions(plan, algorithm, meanings),
            series_instance_uid=series,
            series_number=1000 + max(int(first.get("SeriesNumber") or 0), 0),
            sop_instance_uid=_UNNAMED,
            instance_number=1,
            manufacturer="medtl",
            manufacturer_model_name=_shown(algorithm.name),
            software_versions=__version__,
            device_serial_number=_shown(algorithm.release),
            content_label="SEGMENTATION",
            content_description=_shown(f"{algorithm.name} {algorithm.release}"),
            series_description=_shown(f"{algorithm.name} segmentation"),
            content_date=content.date(),
            content_time=content.time(),
            **(frame.geometry if pixels.any() else frame.of_first_slice()),
        )
        if affine is None and "ImageOrientationPatient" not in first:
            seg.PatientOrientation = first.get("PatientOrientation") or ""
        return _settled(seg, content, series)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where the planes of a mask lie: sources in slice order, or a geometry of its own beside them."""

    sources: list[Dataset]
    geometry: dict[str, Any]  # plane_positions, plane_orientation and pixel_measures; empty: the sources' own

    def of_first_slice(self) -> dict[str, Any]:
        """Give the geometry of an empty mask, which is said once; of a series, leave its other slices out."""
        if self.geometry:
            return self.geometry | {"plane_positions": self.geometry["plane_positions"][:1]}
        del self.sources[1:]
        return {}


def _stacked(codes: AnyArray, plan: GridPlan, kind: Kind) -> AnyArray:
    """Give numbered segments, shape (planes, rows, columns), or of overlapping ones with a last axis."""
    whole = codes if codes.ndim == 3 else codes[None]
    if not plan.overlapping:
        return _counted(whole, plan)
    stacked = np.stack([one.astype(np.uint8) for one in segments(whole, plan)], axis=-1)
    if kind == "labelmap" and (stacked.sum(axis=-1) > 1).any():
        raise ScanError("bad_mask", "structures share voxels, which a label map cannot say: write it as binary")
    return stacked


def _frame(codes: AnyArray, affine: Affine | None, sources: Sequence[Dataset]) -> _Frame:
    if len({(str(one.get("StudyInstanceUID")), str(one.get("SeriesInstanceUID"))) for one in sources}) > 1:
        raise ScanError("mask_geometry", "the files are of more than one series")
    stand_ins = [_stand_in(one) for one in sorted(sources, key=lambda one: str(one.SOPInstanceUID))]
    if affine is None:
        if len(sources) > 1 or int(sources[0].get("NumberOfFrames") or 1) > 1:
            raise ScanError("no_geometry", "an image of one frame is wanted where there is no place in space")
        if (sources[0].get("Rows"), sources[0].get("Columns")) != codes.shape:
            raise ScanError("mask_geometry", "the mask has another shape than its image")
        if not all(float(step) > 0 for step in stand_ins[0].get("PixelSpacing") or ()):
            stand_ins[0].pop("PixelSpacing")
        return _Frame(stand_ins, {})
    if not stand_ins[0].get("FrameOfReferenceUID"):
        raise ScanError("no_geometry", "the series does not say in which frame of reference it lies")
    matrix = _LPS @ _matrix(affine)
    if _is_tiled(sources[0]):
        own = _planes(matrix, codes.shape[0], stand_ins[0])
        for one in stand_ins:
            _place(one, own)
        return _Frame(stand_ins, own)
    if "NumberOfFrames" in stand_ins[0] and len(sources) > 1:
        raise ScanError("mask_geometry", "its image was cut into several objects, to which no segmentation can refer")
    if "NumberOfFrames" in stand_ins[0] and "PerFrameFunctionalGroupsSequence" not in stand_ins[0]:
        raise ScanError("no_geometry", "the frames of its image do not say one by one where they lie")
    if "NumberOfFrames" in stand_ins[0]:
        _check_frames(stand_ins[0], matrix, codes.shape[0])
    elif (ordered := _in_order(stand_ins, matrix, codes.shape)) is not None:
        return _Frame(ordered, {})
    return _Frame(stand_ins, _planes(matrix, codes.shape[0], stand_ins[0]))


def _is_tiled(source: Dataset) -> bool:
    """Tell slices tiled into one image, which has one plane: a mosaic of Siemens, a grid of United Imaging."""
    return not _TILED.isdisjoint(source.get("ImageType") or ()) or _GRID in source


def _place(source: Dataset, planes: Mapping[str, Any]) -> None:
    """Let an object without planes lie where the first slice does: highdicom asks it for a place all the same."""
    values = {
        "ImagePositionPatient": planes["plane_positions"][0][0].ImagePositionPatient,
        "ImageOrientationPatient": planes["plane_orientation"][0].ImageOrientationPatient,
        "PixelSpacing": planes["pixel_measures"][0].PixelSpacing,
    }
    for keyword, value in values.items():
        source.pop(keyword, None)
        setattr(source, keyword, value)


def _in_order(sources: list[Dataset], matrix: FloatArray, shape: tuple[int, ...]) -> list[Dataset] | None:
    """Put a series in the order of a volume's slices; of copies of a slice the first by identifier.

    Returns:
        ``None`` where the volume has planes of its own: it was set upright from a tilted stack.

    Raises:
        ScanError: ``mask_geometry``, where the slices do not lie on the volume's.
    """
    inverse, between = np.linalg.inv(matrix), float(np.linalg.norm(matrix[:3, 2]))
    found: dict[int, tuple[FloatArray, Dataset]] = {}
    for one in sources:
        corner = (inverse @ [*one.ImagePositionPatient, 1.0])[:3]
        steps = inverse[:3, :3] @ _steps(one.ImageOrientationPatient, one.PixelSpacing)
        number = round(float(corner[2]))
        level = abs(corner[2] - number) <= _SAME_PLACE and 0 <= number < shape[0]
        if not level or np.abs(steps - np.eye(3)[:, :2]).max() > _SAME_WAY:
            raise ScanError("mask_geometry", "slices of the series lie elsewhere than the mask's")
        _measure(one, between)
        one["ImageOrientationPatient"] = sources[0]["ImageOrientationPatient"]  # one plane, whatever its last digit
        found.setdefault(number, (corner[:2], one))
    if len(found) < shape[0]:
        raise ScanError("mask_geometry", f"{shape[0] - len(found)} slices of the mask have no file in the series")
    corners = np.array([found[number][0] for number in range(shape[0])])
    sides = np.array([sources[0].Columns, sources[0].Rows])
    if np.abs(corners).max() <= _SAME_PLACE and (sides == shape[:0:-1]).all():
        return [found[number][1] for number in range(shape[0])]
    _check_upright(corners, sides, np.array(shape[:0:-1]))
    return None


def _measure(source: Dataset, between: float) -> None:
    """Let a slice say how far the next one is: what headers say of it is often something else."""
    from pydicom.valuerep import DSfloat

    measured = DSfloat(between, auto_format=True)
    source.pop("SpacingBetweenSlices", None)
    source.SpacingBetweenSlices = measured
    if not source.get("SliceThickness"):
        source.pop("SliceThickness", None)
        source.SliceThickness = measured


def _check_upright(corners: FloatArray, sides: IntArray, frame: IntArray) -> None:
    """See that slices move evenly from one to the next within a frame that holds them all, as a tilted stack does.

    Args:
        corners: column and row of the first pixel of each slice, shape (slices, 2).
        sides: columns and rows of a slice.
        frame: columns and rows of the volume.
    """
    even = np.linspace(corners[0], corners[-1], len(corners))
    within = corners.min() >= -_SAME_PLACE and ((corners + sides).max(axis=0) <= frame + _SAME_PLACE).all()
    tilted = np.abs(corners[-1] - corners[0]).max() > _SAME_PLACE and np.abs(corners - even).max() <= _SAME_PLACE
    if not (within and tilted):
        raise ScanError("mask_geometry", "slices of the series lie elsewhere, or are of another shape, than the mask's")


def _check_frames(source: Dataset, matrix: FloatArray, count: int) -> None:
    """See that every slice of a volume has a frame of the enhanced image that it was made of."""
    shared = source.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    inverse = np.linalg.inv(matrix)
    steps = inverse[:3, :3] @ _steps(orientation, shared.PixelMeasuresSequence[0].PixelSpacing)
    groups = [
        frame.get("PlanePositionSequence") or shared.PlanePositionSequence
        for frame in source.PerFrameFunctionalGroupsSequence
    ]
    places = np.array([[*group[0].ImagePositionPatient, 1.0] for group in groups], dtype=np.float64)
    off = np.abs((inverse @ places.T)[2] - np.arange(count)[:, None]).min(axis=1)
    if off.max() > _SAME_PLACE or np.abs(steps - np.eye(3)[:, :2]).max() > _SAME_WAY:
        raise ScanError("mask_geometry", "frames of the image lie elsewhere than the mask's")


def _steps(orientation: Sequence[float], spacing: Sequence[float]) -> FloatArray:
    """Give the steps from column to column and from row to row, shape (3, 2), LPS mm."""
    axes = np.array(orientation, dtype=np.float64).reshape(2, 3)
    between_rows, between_columns = (float(step) for step in spacing)
    return np.stack([axes[0] * between_columns, axes[1] * between_rows], axis=1)


def _planes(matrix: FloatArray, count: int, source: Dataset) -> dict[str, Any]:
    """Give the planes of a volume in highdicom's words."""
    from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence

    columns, rows, slices = np.linalg.norm(matrix[:3, :3], axis=0)
    axes = (matrix[:3, :2] / [columns, rows]).T.ravel()
    positions = matrix[:3, 3] + np.arange(count)[:, None] * matrix[:3, 2]
    return {
        "plane_positions": [PlanePositionSequence("PATIENT", position.tolist()) for position in positions],
        "plane_orientation": PlaneOrientationSequence("PATIENT", axes.tolist()),
        "pixel_measures": PixelMeasuresSequence(
            pixel_spacing=(float(rows), float(columns)),
            slice_thickness=float(source.get("SliceThickness") or slices),
            spacing_between_slices=float(slices),
        ),
    }


def _stand_in(source: Dataset) -> Dataset:
    """Copy a header for highdicom: what it must find and is missing is empty, what it would stumble over is emptied."""
    from pydicom.dataset import Dataset
    from pydicom.valuerep import DA, TM

    copy = Dataset(dict(source.items()))

    def empty(keyword: str) -> None:
        copy.pop(keyword, None)  # its element is the source's, too
        setattr(copy, keyword, "")

    for keyword in ("PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName"):
        if copy.get(keyword) is None:
            empty(keyword)
    if copy.get("PatientSex") not in ("M", "F", "O"):
        empty("PatientSex")
    for keyword, parse in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        try:
            if not parse(str(copy.get(keyword) or "")):
                empty(keyword)
        except ValueError:
            empty(keyword)
    if not copy.get("FrameOfReferenceUID"):
        copy.pop("FrameOfReferenceUID", None)
    if "PerFrameFunctionalGroupsSequence" in copy:
        copy["SharedFunctionalGroupsSequence"] = _shared(copy)
    elif int(copy.get("NumberOfFrames") or 1) == 1:
        copy.pop("NumberOfFrames", None)
    return copy


def _shared(source: Dataset) -> DataElement:
    """Give the shared groups of an enhanced image, where highdicom looks for what may be said for each frame."""
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

    shared = Dataset(dict(source.SharedFunctionalGroupsSequence[0].items()))
    for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if keyword not in shared and keyword in source.PerFrameFunctionalGroupsSequence[0]:
            shared[keyword] = source.PerFrameFunctionalGroupsSequence[0][keyword]
    measures = Dataset(dict(shared.PixelMeasuresSequence[0].items()))
    measures.pop("SpacingBetweenSlices", None)  # measured instead: what headers say of it is often something else
    shared["PixelMeasuresSequence"] = DataElement("PixelMeasuresSequence", "SQ", [measures])
    return DataElement("SharedFunctionalGroupsSequence", "SQ", [shared])


def _moment(source: Dataset) -> datetime:
    """Give the date and time of a source's content.

    Raises:
        ScanError: ``bad_header``, where it has none.
    """
    for keyword in _DATES:
        day = str(source.get(keyword) or "").strip()
        clock = str(source.get(keyword.replace("Date", "Time")) or "").strip()
        try:
            found = date(int(day[:4]), int(day[4:6]), int(day[6:8]))
        except ValueError:
            continue
        try:
            return datetime.combine(found, time(int(clock[:2]), int(clock[2:4]), int(clock[4:6])))
        except ValueError:
            return datetime.combine(found, time())
    raise ScanError("bad_header", "the series has no date; a segmentation must have one")


def _descriptions(plan: GridPlan, algorithm: Algorithm, meanings: Mapping[str, Meaning]) -> list[Any]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept

    drawn_by = AlgorithmIdentificationSequence(
        name=_shown(algorithm.name),
        family=CodedConcept("123110", "DCM", "Artificial Intelligence"),
        version=_shown(algorithm.release),
    )
    described = []
    for number, structure in enumerate(plan.structures, 1):
        meaning = meaning_of(structure.name, meanings)
        described.append(
            SegmentDescription(
                segment_number=number,
                segment_label=_shown(structure.name) or f"structure {number}",
                segmented_property_category=CodedConcept(*meaning.category),
                segmented_property_type=CodedConcept(*meaning.type),
                algorithm_type="AUTOMATIC",
                algorithm_identification=drawn_by,
            )
        )
    return described


def _settled(seg: Any, content: datetime, series: str) -> bytes:
    """Give the bytes of a segmentation without anything in them that another call would write otherwise."""
    from pydicom.valuerep import DA, TM

    seg.InstanceCreationDate, seg.InstanceCreationTime = DA(content.date()), TM(content.time())
    organization = _uid("dimensions", series)
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    for item in seg.ContributingEquipmentSequence:
        item.pop("ContributionDateTime", None)
    stream = io.BytesIO()
    seg.save_as(stream, enforce_file_format=True)
    data = stream.getvalue()
    # Named by its own bytes, so that other bytes never have the same name. A name of the same length is put in its
    # place in the meta header and in the data set: writing all of it again would take as long as all else.
    own = _uid("instance", hashlib.sha256(data).hexdigest())
    return data.replace(_UNNAMED.encode(), own.encode(), 2)


def _uid(*parts: str) -> str:
    """Derive an identifier of 44 characters under the root 2.25. Source: PS3.5 B.2."""
    digest = b"medtl"
    while True:
        digest = hashlib.sha256("\0".join((digest.hex(), *parts)).encode()).digest()
        number = uuid.UUID(bytes=digest[:16], version=5).int
        if number >= 10**38:
            return f"2.25.{number}"


_UNNAMED = _uid("not named yet")


def _shown(text: str) -> str:
    """Give what a DICOM long string may hold, in any character set."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return _UNSHOWN.sub("", plain).strip()[:64]


_one_at_a_time = RLock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Let pydicom and highdicom work without a word: what they say quotes patients. Silence is of the process."""
    from pydicom import config

    library = logging.getLogger("highdicom")
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, level = config.settings.reading_validation_mode, library.level
        config.settings.reading_validation_mode = config.IGNORE
        config.logger.disabled = True
        library.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            library.setLevel(level)
            config.logger.disabled = False
            config.settings.reading_validation_mode = before


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn whatever a strange header makes pydicom or highdicom raise into ``bad_header``.

    A value is decoded where it is first asked for, so that anything may be raised anywhere; the text may quote the
    header, so only the kind of error is kept.
    """
    try:
        yield
    except (ScanError, MemoryError):
        raise
    except Exception as error:
        raise ScanError("bad_header", f"{what} ({type(error).__name__})") from error


# ------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True, slots=True)
class StructureVolume:
    """How much of a scan one structure takes; ``ml`` is ``None`` where the size of a voxel is not known."""

    structure: str
    voxels: int
    ml: float | None


def volumes(codes: AnyArray, plan: GridPlan, affine: Affine | None) -> tuple[StructureVolume, ...]:
    """Measure each structure of a mask.

    Args:
        codes: on the voxels of the scan.
        affine: of the scan; ``None`` of an image.

    Raises:
        ScanError: ``bad_mask`` or ``bad_geometry``.
    """
    ml = None if affine is None else abs(float(np.linalg.det(_matrix(affine)[:3, :3]))) / 1000
    counts = [int(np.count_nonzero(inside)) for inside in segments(codes, plan)]
    return tuple(
        StructureVolume(one.name, n, None if ml is None else n * ml)
        for one, n in zip(plan.structures, counts, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Drawn:
    """One scan whose mask was written."""

    scan: str
    files: tuple[str, ...]  # of the source
    mask: str  # name of its file
    volumes: tuple[StructureVolume, ...]
    doubts: tuple[str, ...] = ()  # why a person should look at it


def volumes_table(
    drawn: Sequence[Drawn], excluded: Sequence[tuple[Exclusion, str]], named: bool
) -> tuple[list[str], list[Row]]:
    """Make one row per scan and structure, and one for what was left out: nobody's scan is lost without a word.

    Args:
        excluded: what was left out, with its file name.
        named: put names of source files into the table; of a series the first.

    Returns:
        Column names and rows.
    """
    columns = ["scan", *(["file"] if named else []), "structure", "voxels", "ml", "mask", "look", "reason"]
    rows: list[Row] = []

    def add(file: str, **cells: str) -> None:
        shown = cells | ({"file": file} if named else {})
        rows.append({column: inert(shown.get(column, "")) for column in columns})

    for one in drawn:
        for volume in one.volumes:
            add(
                min(one.files, default=""),
                scan=one.scan[:16],
                structure=volume.structure,
                voxels=str(volume.voxels),
                ml="" if volume.ml is None else f"{volume.ml:.3f}",
                mask=one.mask,
                look="; ".join(one.doubts),
            )
    for exclusion, file in excluded:
        add(file, scan=exclusion.item, reason=f"{exclusion.code}: {exclusion.reason}")
    return columns, rows
