"""Reconstructed slices of nuclear medicine (SPECT): where the frames of one object lie. Pure.

Only the detector's item has a position and an orientation, those of the first slice; the others follow along the
normal, in steps whose sign is their direction. Slice numbers, not the order of the frames, say which is which. What is
not told completely is left without places, to be refused (``multi_frame``), as are projections, which are no slices.
Source: DICOM PS3.3 C.8.4.8 (vectors), C.8.4.11 (detector), C.8.4.15 (reconstruction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from medtl.scans.faults import ends_the_run
from medtl.scans.geometry import fault
from medtl.scans.headers import Header, Plane

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

NUCLEAR_MEDICINE = "1.2.840.10008.5.1.4.1.1.20"
_SLICE_VECTOR = 0x00540080
_VECTORS: Mapping[int, str] = {  # what may part the frames of one place, by its pointer
    0x00540010: "EnergyWindowVector",
    0x00540020: "DetectorVector",
    0x00540030: "PhaseVector",
    0x00540060: "RRIntervalVector",
    0x00540070: "TimeSlotVector",
    0x00540100: "TimeSliceVector",
}


def is_reconstructed(header: Header) -> bool:
    """Tell an object of reconstructed slices."""
    kind = header.image_type[2] if len(header.image_type) > 2 else ""
    return header.sop_class == NUCLEAR_MEDICINE and header.frames > 1 and kind in ("RECON TOMO", "RECON GATED TOMO")


def with_places(header: Header, dataset: Dataset) -> Header:
    """Give the header with a place for every frame, where they are told completely; otherwise as it is."""
    try:
        slices, others = _vectors(header, dataset)
        first, said = _first(header.planes[0], dataset), dataset.get("NumberOfSlices")
    except Exception as error:  # a value is decoded where it is first asked for: a strange one may raise anything
        if ends_the_run(error):
            raise
        return header
    return _placed(header, slices, others, first, said)


def _placed(header: Header, slices: list[int], others: Mapping[str, list[int]], first: Plane, said: Any) -> Header:
    count = max(slices)
    if fault(first) or not first.between_mm or slices[0] != 1 or set(slices) != set(range(1, count + 1)):
        return header
    if said and said != count:
        return header
    assert first.orientation is not None and first.position_mm is not None
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    planes = []
    for frame, number in enumerate(slices):
        x, y, z = (float(mm) for mm in np.add(first.position_mm, (number - 1) * first.between_mm * normal))
        parts = tuple((keyword, str(vector[frame])) for keyword, vector in others.items())
        planes.append(replace(first, position_mm=(x, y, z), splits=first.splits + parts))
    return replace(header, planes=tuple(planes))


def _vectors(header: Header, dataset: Dataset) -> tuple[list[int], dict[str, list[int]]]:
    """Read the number of every frame's slice, and what else the frames are counted by.

    Raises:
        ValueError: the frames are counted by something unknown, or not all of them.
        KeyError: they are not counted by slices.
    """
    pointers = dataset.FrameIncrementPointer
    found = {}
    for pointer in [pointers] if isinstance(pointers, int) else pointers:
        keyword = "SliceVector" if pointer == _SLICE_VECTOR else _VECTORS.get(pointer)
        if keyword is None:
            raise ValueError("frames counted by something unknown")
        found[keyword] = _numbers(dataset.get(keyword))
        if len(found[keyword]) != header.frames:
            raise ValueError("a vector that is not as long as there are frames")
    return found.pop("SliceVector"), found


def _first(plane: Plane, dataset: Dataset) -> Plane:
    """Give the place of the first slice: the one that the detectors agree on.

    Raises:
        ValueError: there is none, or there are several.
    """
    holders = [dataset, *(dataset.get("DetectorInformationSequence") or ())]
    positions = {_floats(holder.get("ImagePositionPatient")) for holder in holders} - {()}
    orientations = {_floats(holder.get("ImageOrientationPatient")) for holder in holders} - {()}
    ((x, y, z),) = positions
    ((a, b, c, d, e, f),) = orientations
    return replace(plane, position_mm=(x, y, z), orientation=(a, b, c, d, e, f))


def _numbers(value: Any) -> list[int]:
    return [int(number) for number in value] if isinstance(value, Sequence) else [int(value)]


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(float(number) for number in value) if value else ()
