"""Stored values of one frame: their type, the bits that count, and what they have in common with other frames. Pure.

Source: DICOM PS3.5 8.1.1 (bits outside of Bits Stored are no part of a value), PS3.3 C.7.6.3.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from medtl.errors import ScanError
from medtl.records import AnyArray
from medtl.scans.geometry import Finding
from medtl.scans.headers import Header

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
BIG, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
UNCOMPRESSED = frozenset({EXPLICIT, IMPLICIT, BIG, DEFLATED})
_FLOATS = {"FloatPixelData": "<f4", "DoubleFloatPixelData": "<f8"}


def stored_type(header: Header) -> np.dtype[np.generic]:
    """Give the type of the stored values, little endian.

    Raises:
        ScanError: ``bad_header`` for a depth that is not whole bytes.
    """
    if header.pixel_keyword in _FLOATS:
        return np.dtype(_FLOATS[header.pixel_keyword])
    if header.bits_allocated not in (8, 16, 32, 64):
        raise ScanError("bad_header", f"{header.bits_allocated} bits per value; 8, 16, 32 and 64 are known here")
    return np.dtype(f"<{'i' if header.signed else 'u'}{header.bits_allocated // 8}")


def is_direct(header: Header) -> bool:
    """Tell whether the values lie in the file as they are: one sample, whole bytes, little endian, uncompressed."""
    return (
        header.transfer_syntax in (EXPLICIT, IMPLICIT)
        and header.samples == 1
        and header.pixel_offset is not None
        and (header.pixel_keyword in _FLOATS or header.bits_allocated in (8, 16, 32))
        and not header.photometric.startswith(("PALETTE", "YBR"))
    )


def settle(frame: AnyArray, header: Header) -> int:
    """Clear the bits of a frame that are no part of its values, in place.

    Args:
        frame: (rows, columns), contiguous, of the type of :func:`stored_type`.

    Returns:
        A checksum (CRC-32) of its middle: frames that differ in it are different, others may be.

    Raises:
        ScanError: ``non_finite``; ``bad_header`` or ``out_of_range`` where High Bit contradicts the values.
    """
    if frame.dtype.kind == "f":
        if not np.isfinite(frame).all():
            raise ScanError("non_finite", "NaN or infinite values among the pixels")
    elif header.bits_stored < header.bits_allocated and _outside(frame, header):
        bits = frame.dtype.itemsize * 8
        below = header.high_bit + 1 - header.bits_stored
        if below < 0:
            raise ScanError("bad_header", f"{header.bits_stored} bits stored of which the highest is {header.high_bit}")
        if below and (frame & ((1 << below) - 1)).any():  # a wrong High Bit: moving them would cut them off
            raise ScanError("out_of_range", f"values below bit {below}, where the header says that there are none")
        np.left_shift(frame, bits - 1 - header.high_bit, out=frame)
        np.right_shift(frame, bits - header.bits_stored, out=frame)  # of signed values: keeps the sign
    rows = len(frame)
    middle = frame[rows * 7 // 16 : max(rows * 9 // 16, rows * 7 // 16 + 1)]
    return zlib.crc32(middle.reshape(-1).view(np.uint8).data)


def compare(frames: AnyArray, checksums: Sequence[int]) -> tuple[Finding, ...]:
    """Find a volume that is blank, and slices that hold the very same values.

    Slices without any content (air above the head) are alike in many a good volume and do not count.

    Args:
        frames: (slices, rows, columns).
        checksums: of each slice, from :func:`settle`.
    """
    first: dict[int, int] = {}
    alike = [(first.setdefault(one, index), index) for index, one in enumerate(checksums)]
    if len(first) == 1 and frames.min() == frames.max():
        return (Finding("blank", "every voxel has the same value"),)
    same = [
        b for a, b in alike if a != b and np.array_equal(frames[a], frames[b]) and frames[b].min() != frames[b].max()
    ]
    if same:
        reason = f"{len(same)} of {len(checksums)} slices hold the same values as another slice"
        return (Finding("repeated_pixels", reason),)
    return ()


def _outside(frame: AnyArray, header: Header) -> bool:
    if header.high_bit != header.bits_stored - 1:
        return True
    top = 1 << header.bits_stored - (1 if header.signed else 0)
    return int(frame.max()) >= top or (header.signed and int(frame.min()) < -top)
