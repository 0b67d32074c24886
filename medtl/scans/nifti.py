"""NIfTI in and out, and the packed form of a volume. Pure: bytes and arrays in, values out; io.py opens the files.

A header is hostile until checked: what it asks for is bounded, and compared with the bytes that are there, before
anything is allocated. The voxels are never turned or copied: NIfTI's file order, columns fastest, is (slices, rows,
columns) as it lies, and the affine maps voxel (column, row, slice) to RAS+ mm. Free text, intents and extensions are
never read. Source: NIfTI-1 (nifti1.h) and NIfTI-2 (nifti2.h) of the NIH data format working group.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from medtl.config import ScansConfig
from medtl.errors import ScanError, StorageError
from medtl.records import AnyArray, FloatArray
from medtl.scans.geometry import Affine, Finding

Bytes = bytes | bytearray | memoryview

NIFTI1_HEADER, NIFTI2_HEADER = 348, 540
_MAGICS = {b"n+1\0": 1, b"n+2\0": 2, b"ni1\0": 1, b"ni2\0": 2}
_KINDS = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 128: "u1", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_RGB = 128
_CODES = {kind: code for code, kind in _KINDS.items() if code != _RGB}
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown is taken as mm, as every reader does
_AXES = ("columns", "rows", "slices")
_SPACING_MM = (1e-5, 1e3)  # outside of it no scanner and no microscope measures
_FARTHEST_MM = 1e5
_LARGEST = 1e12  # of an entry of an affine, in whatever unit; beyond it arithmetic itself overflows
_FLATTEST = 1e-3  # |det| over the product of the spacings; 1 is a right angle everywhere, 0 a plane
_TURN_DEGREES = 0.1  # a quaternion in float32 is uncertain by up to 0.05 degrees near half a turn
_STRETCH = 1e-3
_SHIFT = 0.1  # of the smallest spacing


@dataclass(frozen=True, slots=True)
class NiftiHeader:
    """What a NIfTI header says, checked. Shape is (slices, rows, columns); ``volumes`` of it follow each other.

    A value means ``slope * stored + intercept``; ``affine`` maps voxel (column, row, slice) to RAS+ mm.
    """

    version: int
    dtype: str  # with its byte order, as numpy writes it: "<i2"
    channels: int  # 1, or 3 for RGB
    shape: tuple[int, int, int]
    volumes: int
    offset: int  # of the first voxel in the file
    slope: float
    intercept: float
    affine: Affine
    spacing_mm: tuple[float, float, float]  # of columns, rows, slices
    affine_from: str  # sform, qform or pixdim
    findings: tuple[Finding, ...] = ()

    @property
    def volume_bytes(self) -> int:
        """Bytes of one volume."""
        return math.prod(self.shape) * self.channels * np.dtype(self.dtype).itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of a file, unpacked, that holds all it declares."""
        return self.offset + self.volumes * self.volume_bytes


# ----------------------------------------------------------------------------------------------------- reading


def is_nifti(start: Bytes) -> bool:
    """Tell a NIfTI file by its first 348 bytes (unpacked)."""
    return bytes(start[344:348]) in _MAGICS or bytes(start[4:8]) in _MAGICS


def parse_nifti(start: Bytes, file_size: int, config: ScansConfig) -> NiftiHeader:
    """Read and check the header of a NIfTI-1 or NIfTI-2 file.

    Args:
        start: first 540 bytes of the file, unpacked; 348 will do for NIfTI-1.
        file_size: bytes of the whole file, unpacked; negative where that is not known yet (a ``.nii.gz``).

    Returns:
        The header. Its findings may hold ``qform_sform``, ``no_geometry`` and ``extra_bytes``.

    Raises:
        ScanError: ``bad_header``, ``detached_header``, ``bad_size``, ``too_large``, ``unsupported_type``,
            ``bad_geometry`` or ``truncated``.
    """
    raw = _Raw.read(start)
    shape, volumes = _shape(raw.dim)
    dtype, channels = _type(raw)
    _bound(shape, volumes, channels, np.dtype(dtype).itemsize, config)
    affine, source, findings = _place(raw, shape)
    slope, intercept = (1.0, 0.0) if channels == 3 else _scaling(raw.slope, raw.intercept)
    header = NiftiHeader(
        version=raw.version,
        dtype=dtype,
        channels=channels,
        shape=shape,
        volumes=volumes,
        offset=_offset(raw),
        slope=slope,
        intercept=intercept,
        affine=as_affine(affine),
        spacing_mm=_triple(np.linalg.norm(affine[:3, :3], axis=0)),
        affine_from=source,
        findings=findings,
    )
    return header if file_size < 0 else _fits(header, file_size)


def nifti_volume(header: NiftiHeader, data: Bytes, volume: int = 0) -> tuple[AnyArray, tuple[Finding, ...]]:
    """Give one volume as it is stored, without a copy where the bytes have the machine's order.

    Args:
        data: the whole file, unpacked (bytes, or a view of a memory map).
        volume: which of ``header.volumes``.

    Returns:
        Array of shape (slices, rows, columns), colour with a last axis of 3; and ``non_finite`` where a float volume
        holds NaN or infinity, with their number. Nothing is replaced.

    Raises:
        ScanError: ``truncated``.
    """
    start = header.offset + volume * header.volume_bytes
    if not 0 <= volume < header.volumes or start + header.volume_bytes > len(data):
        raise ScanError("truncated", f"volume {volume + 1} of {header.volumes} lies past the end of the file")
    dtype = np.dtype(header.dtype)
    flat = np.frombuffer(data, dtype, math.prod(header.shape) * header.channels, start)
    values = flat.reshape(header.shape if header.channels == 1 else (*header.shape, header.channels))
    if not dtype.isnative:
        values = values.astype(dtype.newbyteorder("="))
    return values, _not_finite(values)


def _not_finite(values: AnyArray) -> tuple[Finding, ...]:
    if values.dtype.kind != "f":
        return ()
    bad = sum(plane.size - int(np.count_nonzero(np.isfinite(plane))) for plane in values)
    if not bad:
        return ()
    return (Finding("non_finite", f"{bad} of {values.size} values are NaN or infinite"),)


@dataclass(frozen=True, slots=True)
class _Raw:
    """The fields of either version, as they stand."""

    version: int
    order: str
    dim: tuple[int, ...]
    datatype: int
    bitpix: int
    pixdim: tuple[float, ...]
    offset: float
    slope: float
    intercept: float
    units: int
    qform_code: int
    sform_code: int
    quaternion: tuple[float, ...]
    origin: tuple[float, ...]
    rows: tuple[float, ...]  # srow_x, srow_y, srow_z

    @classmethod
    def read(cls, start: Bytes) -> _Raw:
        start = bytes(start[:NIFTI2_HEADER])
        version = _MAGICS.get(start[344:348]) or _MAGICS.get(start[4:8])
        if version is None:
            raise ScanError("bad_header", "no NIfTI magic; an ANALYZE file has no orientation and is not read")
        if len(start) < (NIFTI1_HEADER if version == 1 else NIFTI2_HEADER):
            raise ScanError("truncated", "the file ends inside its header")
        if (start[344:347] if version == 1 else start[4:7]) in (b"ni1", b"ni2"):
            raise ScanError("detached_header", "a .hdr/.img pair; join the two as one .nii file")
        size = NIFTI1_HEADER if version == 1 else NIFTI2_HEADER
        order = next((o for o in "<>" if struct.unpack_from(o + "i", start)[0] == size), None)
        if order is None:
            raise ScanError("bad_header", f"sizeof_hdr is not {size} in either byte order")
        return cls._version_1(start, order) if version == 1 else cls._version_2(start, order)

    @classmethod
    def _version_1(cls, start: bytes, order: str) -> _Raw:
        def at(offset: int, form: str) -> tuple[Any, ...]:
            return struct.unpack_from(order + form, start, offset)

        datatype, bitpix = at(70, "2h")
        offset, slope, intercept = at(108, "3f")
        qform_code, sform_code = at(252, "2h")
        return cls(
            version=1,
            order=order,
            dim=at(40, "8h"),
            datatype=datatype,
            bitpix=bitpix,
            pixdim=at(76, "8f"),
            offset=offset,
            slope=slope,
            intercept=intercept,
            units=start[123],
            qform_code=qform_code,
            sform_code=sform_code,
            quaternion=at(256, "3f"),
            origin=at(268, "3f"),
            rows=at(280, "12f"),
        )

    @classmethod
    def _version_2(cls, start: bytes, order: str) -> _Raw:
        def at(offset: int, form: str) -> tuple[Any, ...]:
            return struct.unpack_from(order + form, start, offset)

        datatype, bitpix = at(12, "2h")
        offset, slope, intercept = at(168, "q2d")
        qform_code, sform_code = at(344, "2i")
        return cls(
            version=2,
            order=order,
            dim=at(16, "8q"),
            datatype=datatype,
            bitpix=bitpix,
            pixdim=at(104, "8d"),
            offset=offset,
            slope=slope,
            intercept=intercept,
            units=at(500, "i")[0],
            qform_code=qform_code,
            sform_code=sform_code,
            quaternion=at(352, "3d"),
            origin=at(376, "3d"),
            rows=at(400, "12d"),
        )


def _shape(dim: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """Give (slices, rows, columns) and the number of volumes."""
    if not 1 <= dim[0] <= 7:
        raise ScanError("bad_size", f"the header declares {dim[0]} dimensions")
    sides = (*dim[1 : dim[0] + 1], 1, 1, 1, 1)
    if min(sides) < 1:
        raise ScanError("bad_size", f"the header declares a side of {min(sides)} voxels")
    if any(side > 1 for side in sides[4:]):
        raise ScanError("bad_size", "more than four dimensions: a vector or tensor field, not a scan")
    return (sides[2], sides[1], sides[0]), sides[3]


def _type(raw: _Raw) -> tuple[str, int]:
    if raw.datatype not in _KINDS:
        raise ScanError("unsupported_type", f"values of NIfTI type {raw.datatype}: complex, bits, RGBA or not known")
    channels = 3 if raw.datatype == _RGB else 1
    dtype = np.dtype(raw.order + _KINDS[raw.datatype])
    if raw.bitpix != dtype.itemsize * channels * 8:
        raise ScanError("bad_header", f"{raw.bitpix} bits a voxel do not fit NIfTI type {raw.datatype}")
    return dtype.str, channels


def _bound(shape: tuple[int, int, int], volumes: int, channels: int, itemsize: int, config: ScansConfig) -> None:
    slices, rows, columns = shape
    if rows * columns > config.max_megapixels * 1e6:
        raise ScanError(
            "too_large", f"{rows} x {columns} pixels, more than scans.max_megapixels = {config.max_megapixels:g}"
        )
    megabytes = slices * rows * columns * channels * itemsize * volumes / 1e6
    if megabytes > config.max_volume_mb:
        raise ScanError(
            "too_large", f"it asks for {megabytes:.0f} MB, more than scans.max_volume_mb = {config.max_volume_mb:g}"
        )


def _offset(raw: _Raw) -> int:
    """Give the place of the first voxel: after the header and the four bytes that announce extensions."""
    least = (NIFTI1_HEADER if raw.version == 1 else NIFTI2_HEADER) + 4
    if raw.offset == 0:
        return least
    if not math.isfinite(raw.offset) or raw.offset != int(raw.offset) or not least <= raw.offset < 2**62:
        raise ScanError("bad_header", "the place of the first voxel lies inside the header, or is no number")
    return int(raw.offset)


def _fits(header: NiftiHeader, file_size: int) -> NiftiHeader:
    wanted = header.file_bytes
    if file_size < wanted:
        raise ScanError("truncated", f"{file_size} bytes where the header declares {wanted}")
    if file_size == wanted:
        return header
    extra = Finding("extra_bytes", f"{file_size - wanted} bytes follow the last voxel that the header declares")
    return replace(header, findings=(*header.findings, extra))


def _scaling(slope: float, intercept: float) -> tuple[float, float]:
    """Give slope and intercept; a slope of 0 or NaN means that values are as stored, whatever the intercept."""
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise ScanError("bad_header", "scl_slope or scl_inter is not finite")
    return float(slope), float(intercept)


def _place(raw: _Raw, shape: tuple[int, int, int]) -> tuple[FloatArray, str, tuple[Finding, ...]]:
    """Choose the affine: the sform where it is set, else the qform, else spacing alone with a finding."""
    if not (0 <= raw.qform_code <= 5 and 0 <= raw.sform_code <= 5):
        raise ScanError("bad_header", "qform_code or sform_code is not known")
    if raw.units & 7 not in _MM:
        raise ScanError("bad_header", "a spatial unit that is not known")
    scale = np.diag([_MM[raw.units & 7]] * 3 + [1.0])
    source = "sform" if raw.sform_code else "qform" if raw.qform_code else "pixdim"
    findings: tuple[Finding, ...] = ()
    if source == "sform":
        affine = np.vstack([np.array(raw.rows, dtype=np.float64).reshape(3, 4), [0, 0, 0, 1]])
    elif source == "qform":
        affine = _qform(raw)
    else:
        affine = np.diag([*raw.pixdim[1:4], 1.0])
        findings = (Finding("no_geometry", "neither sform nor qform is set: orientation and place are not known"),)
    _check_finite(affine)
    if shape[0] == 1 and not affine[:3, 2].any():
        # one slice needs no thickness; its normal makes the affine invertible
        findings += (Finding("no_geometry", "one slice, and its thickness is not given"),)
        affine[:3, 2] = _unit(np.cross(affine[:3, 0], affine[:3, 1]))
    affine = scale @ affine
    check_affine(affine)
    if source == "sform" and raw.qform_code:
        findings += _conflict(affine, raw, scale)
    return affine, source, findings


def check_affine(affine: FloatArray) -> None:
    """Refuse an affine that no scanner measures.

    Raises:
        ScanError: ``bad_geometry``.
    """
    _check_finite(affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    for axis, step in zip(_AXES, spacing, strict=True):
        if not _SPACING_MM[0] <= step <= _SPACING_MM[1]:
            raise ScanError("bad_geometry", f"a spacing of {step:g} mm along {axis}")
    if np.abs(affine[:3, 3]).max() > _FARTHEST_MM:
        raise ScanError("bad_geometry", "the first voxel lies more than 100 m from the origin")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < _FLATTEST:
        raise ScanError("bad_geometry", "two axes of the affine point the same way")


def _check_finite(affine: FloatArray) -> None:
    if not (np.abs(affine) <= _LARGEST).all():
        raise ScanError("bad_geometry", "the affine is not finite")


def _qform(raw: _Raw) -> FloatArray:
    """Turn quaternion, pixdim and offset into a matrix. Source: nifti1.h, method 2.

    Raises:
        ScanError: ``bad_geometry``.
    """
    b, c, d = raw.quaternion
    rest = 1.0 - (b * b + c * c + d * d)
    if not math.isfinite(rest) or rest < -1e-5:
        raise ScanError("bad_geometry", "the quaternion of the qform is not a rotation")
    if not all(0 < step < math.inf for step in raw.pixdim[1:4]):
        raise ScanError("bad_geometry", "the qform has a spacing that is not a positive number")
    length = math.sqrt(max(b * b + c * c + d * d, 1.0)) if rest < 0 else 1.0
    b, c, d, a = b / length, c / length, d / length, math.sqrt(max(rest, 0.0))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    hand = -1.0 if raw.pixdim[0] < 0 else 1.0
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array([raw.pixdim[1], raw.pixdim[2], raw.pixdim[3] * hand])
    affine[:3, 3] = raw.origin
    _check_finite(affine)
    return affine


def _conflict(sform: FloatArray, raw: _Raw, scale: FloatArray) -> tuple[Finding, ...]:
    """Say where the qform puts the volume elsewhere than the sform that is used: readers differ in what they take."""
    try:
        qform = scale @ _qform(raw)
        check_affine(qform)
    except ScanError as error:
        return (Finding("qform_sform", f"sform is used; qform cannot be: {error.reason}"),)
    told = []
    steps = np.linalg.norm(sform[:3, :3], axis=0), np.linalg.norm(qform[:3, :3], axis=0)
    cosines = (sform[:3, :3] * qform[:3, :3]).sum(axis=0) / (steps[0] * steps[1])
    for axis, s_step, q_step, cosine in zip(_AXES, *steps, cosines, strict=True):
        angle = math.degrees(math.acos(float(np.clip(cosine, -1, 1))))
        if angle > _TURN_DEGREES:
            told.append(f"{axis} turned by {angle:.1f} degrees")
        if abs(s_step - q_step) > _STRETCH * s_step:
            told.append(f"{axis} {s_step:.3f} mm apart in sform and {q_step:.3f} mm in qform")
    shift = float(np.linalg.norm(sform[:3, 3] - qform[:3, 3]))
    if shift > _SHIFT * steps[0].min():
        told.append(f"the first voxel {shift:.2f} mm away")
    return (Finding("qform_sform", "qform against sform, which is used: " + ", ".join(told)),) if told else ()


def _unit(vector: FloatArray) -> FloatArray:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def as_affine(matrix: FloatArray) -> Affine:
    """Freeze a 4 x 4 matrix."""
    a, b, c, d = ((float(r[0]), float(r[1]), float(r[2]), float(r[3])) for r in matrix)
    return (a, b, c, d)


def _triple(values: FloatArray) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


# ------------------------------------------------------------------------------------------------------- gzip

GZIP = b"\x1f\x8b\x08"
_CHUNK = 1 << 18
_EMPTY_MEMBERS = 64
_EXTRA = struct.Struct("<H2sHI")  # length of the extra field, our mark, length of the mark's value, bytes of the member
_MARK = b"mt"
_FIXED = 10 + _EXTRA.size  # bytes of a member before its deflate stream


def gunzip_start(data: Bytes, size: int = NIFTI2_HEADER) -> bytes:
    """Unpack the first bytes of a gzip file, at most ``size``; fewer where it holds fewer.

    Raises:
        ScanError: ``archive_damaged``.
    """
    out = bytearray()
    for piece, _ in _inflated(data, size):
        out += piece
        if len(out) >= size:
            break
    return bytes(out[:size])


def bounded_gunzip(data: Bytes, limit: int, threads: int = 2) -> bytes | bytearray:
    """Unpack a gzip file of one or more members, never past the limit.

    Args:
        limit: bytes; the caller has it from the header that :func:`gunzip_start` shows.

    Raises:
        ScanError: ``archive_bomb``, ``truncated`` or ``archive_damaged`` (also for bytes after the last member).
    """
    fast = _gunzip_members(data, limit, threads) or _gunzip_one(data, limit)
    if fast is not None:
        return fast
    out = bytearray()
    whole = False
    for piece, ended in _inflated(data, limit + 1):
        out += piece
        whole = ended
        if len(out) > limit:
            raise ScanError("archive_bomb", f"it grows past {limit} bytes when it is unpacked")
    if not whole:
        raise ScanError("truncated", "the gzip stream ends before its end mark")
    return out


def _inflated(data: Bytes, limit: int) -> Iterator[tuple[bytes, bool]]:
    """Unpack piece by piece with zlib, and tell whether a piece ends its member; stop after ``limit`` bytes."""
    view, at, grown, empty = memoryview(data), 0, 0, 0
    while at < len(view) and grown < limit:
        if bytes(view[at : at + 3]) != GZIP[: len(view) - at]:
            raise ScanError("archive_damaged", "bytes that are not gzip follow the last member" if at else "not gzip")
        stream, before, pending = zlib.decompressobj(31), grown, b""
        while not stream.eof and grown < limit:
            chunk = pending or bytes(view[at : at + _CHUNK])
            try:
                piece = stream.decompress(chunk, min(_CHUNK * 4, limit - grown))
            except zlib.error as error:
                raise ScanError("archive_damaged", "the gzip stream is damaged") from error
            at += 0 if pending else len(chunk)
            pending = stream.unconsumed_tail
            grown += len(piece)
            yield piece, stream.eof
            if not (chunk or piece or stream.eof):  # nothing left to read, nothing held back
                return
        if stream.eof:
            at -= len(stream.unused_data)
            empty += grown == before
            if empty > _EMPTY_MEMBERS:
                raise ScanError("archive_damaged", f"more than {_EMPTY_MEMBERS} empty members")


def _gunzip_one(packed: Bytes, limit: int) -> bytes | None:
    """Unpack a file of one member in one go, three times as fast; ``None`` where it is not that or is not whole."""
    from imagecodecs import DeflateError, gzip_decode

    data = bytes(packed)
    if len(data) < 18:
        return None
    size = int.from_bytes(data[-4:], "little")
    if not 0 < size <= min(limit, len(data) * 1032):  # deflate shrinks to 1/1032 at most
        return None
    try:
        out = bytes(gzip_decode(data, out=size))
    except DeflateError:
        return None
    # The decoder stops after the first member without a word. That member ends where its checksum and size stand.
    end = struct.pack("<II", zlib.crc32(out), len(out))
    return out if data.find(end, 10) == len(data) - 8 else None


def _gunzip_members(data: Bytes, limit: int, threads: int) -> bytearray | None:
    """Unpack what :func:`gzip_members` wrote, in threads; ``None`` where it is something else."""
    from imagecodecs import DeflateError, gzip_decode

    view: Any = memoryview(data)  # imagecodecs takes any buffer, its annotations do not
    places = _members(view)
    if not places or sum(size for _, _, size in places) > limit:
        return None
    if any(size > (end - start) * 1032 for start, end, size in places):
        return None
    out = bytearray(sum(size for _, _, size in places))

    def unpack(place: tuple[int, int, int], to: int) -> bool:
        start, end, size = place
        try:
            piece = gzip_decode(view[start:end], out=size)
        except DeflateError:
            return False
        out[to : to + len(piece)] = piece
        return len(piece) == size

    tos = np.cumsum([0, *(size for _, _, size in places)]).tolist()
    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(unpack, places, tos[:-1]))
    return out if all(done) else None


def _members(view: memoryview) -> list[tuple[int, int, int]] | None:
    """Give start, end and unpacked size of each member, where all of them carry our mark."""
    places, at = [], 0
    while at < len(view):
        if len(view) - at < _FIXED + 8 or bytes(view[at : at + 4]) != GZIP + b"\x04":
            return None
        length, mark, value, size = _EXTRA.unpack_from(view, at + 10)
        if (length, mark, value) != (_EXTRA.size - 2, _MARK, 4) or not _FIXED + 8 <= size <= len(view) - at:
            return None
        places.append((at, at + size, int.from_bytes(view[at + size - 4 : at + size], "little")))
        at += size
    return places


def gzip_members(data: Bytes | AnyArray, member: int = 4 << 20, threads: int = 2) -> Iterator[bytes]:
    """Compress into concatenated gzip members, in threads; joined they are one legal gzip file (RFC 1952, 2.2).

    Each member carries its own length in an extra field, so that :func:`bounded_gunzip` can unpack them in threads.
    The same bytes give the same members, whatever the number of threads (not on every processor: ISA-L has other code
    for each); few of them are in memory at a time.

    Args:
        data: bytes, or an array in C order, which is written as it lies.
        member: bytes of data in each member.
    """
    from isal import isal_zlib

    whole: Any = np.ascontiguousarray(data).reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else data
    flat: Any = memoryview(whole)

    def pack(at: int) -> bytes:
        packed = isal_zlib.compress(flat[at : at + member], 3, 31)  # its slowest level; 31: with a header of gzip
        extra = _EXTRA.pack(_EXTRA.size - 2, _MARK, 4, len(packed) + _EXTRA.size)
        return b"".join((packed[:3], b"\x04", packed[4:10], extra, packed[10:]))

    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[bytes]] = deque()
        for at in range(0, max(len(flat), 1), member):
            waiting.append(pool.submit(pack, at))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ----------------------------------------------------------------------------------------------------- writing


def nifti_header(
    shape: tuple[int, ...], dtype: str, affine: Affine, slope: float = 1.0, intercept: float = 0.0
) -> bytes:
    """Give the 352 bytes before the voxels of a NIfTI-1 file, with no free text in them.

    sform and qform are both set, with code 1 (scanner); a sheared affine, which no qform can say, has the sform alone.

    Args:
        shape: (slices, rows, columns), of colour with a last 3.
        dtype: of the stored values, which are written little-endian.
        affine: voxel (column, row, slice) -> RAS+ mm.

    Raises:
        ScanError: ``too_large`` for a side above 32,767; ``unsupported_type``; ``bad_geometry``.
    """
    kind = np.dtype(dtype).str[1:]
    colour = len(shape) == 4
    if kind not in _CODES or (colour and (kind != "u1" or shape[3] != 3)):
        raise ScanError("unsupported_type", f"values of type {kind} have no place in a NIfTI file")
    if max(shape) > 32_767:
        raise ScanError("too_large", f"a side of {max(shape)} voxels; NIfTI-1 ends at 32,767")
    matrix = np.array(affine, dtype=np.float64)
    check_affine(matrix)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    turn = matrix[:3, :3] / spacing
    hand = -1.0 if np.linalg.det(turn) < 0 else 1.0
    turn[:, 2] *= hand
    square = bool(np.abs(turn.T @ turn - np.eye(3)).max() < 1e-4)
    quaternion = _quaternion(turn) if square else (0.0, 0.0, 0.0)
    head = bytearray(NIFTI1_HEADER + 4)
    struct.pack_into("<i", head, 0, NIFTI1_HEADER)
    head[38] = ord("r")
    struct.pack_into("<8h", head, 40, 3, shape[2], shape[1], shape[0], 1, 1, 1, 1)
    struct.pack_into(
        "<2h", head, 70, _RGB if colour else _CODES[kind], np.dtype(kind).itemsize * 8 * (3 if colour else 1)
    )
    struct.pack_into("<8f", head, 76, hand, *spacing, 0, 0, 0, 0)
    struct.pack_into("<3f", head, 108, NIFTI1_HEADER + 4, slope, intercept)
    head[123] = 2  # mm
    struct.pack_into("<2h", head, 252, int(square), 1)
    struct.pack_into("<6f", head, 256, *quaternion, *(matrix[:3, 3] if square else (0, 0, 0)))
    struct.pack_into("<12f", head, 280, *matrix[:3].ravel())
    head[344:348] = b"n+1\0"
    return bytes(head)


def _quaternion(turn: FloatArray) -> tuple[float, float, float]:
    """Give b, c, d of a rotation with a >= 0. Source: S. W. Shepperd, J. Guidance and Control 1(3), 1978."""
    trace = float(np.trace(turn))
    squares = np.array([trace, *np.diag(turn)])
    first = int(np.argmax(squares))
    if first == 0:
        a = math.sqrt(max(1 + trace, 0)) / 2
        b, c, d = (turn[k, j] - turn[j, k] for j, k in ((1, 2), (2, 0), (0, 1)))
        return float(b / (4 * a)), float(c / (4 * a)), float(d / (4 * a))
    i = first - 1
    j, k = (i + 1) % 3, (i + 2) % 3
    long = math.sqrt(max(1 + turn[i, i] - turn[j, j] - turn[k, k], 0)) / 2
    vector = np.zeros(3)
    vector[i] = long
    vector[j] = (turn[i, j] + turn[j, i]) / (4 * long)
    vector[k] = (turn[i, k] + turn[k, i]) / (4 * long)
    if turn[k, j] - turn[j, k] < 0:  # a < 0: the same rotation with the other sign
        vector = -vector
    return _triple(vector)


# ------------------------------------------------------------------------------------------------------ packed

_PACKED = b"medtlvol"
_PACK_HEAD = struct.Struct("<8s8sB3x4q")  # mark, type, number of axes, shape (1 where there is no axis)
_BLOCK = (32, 64, 64)  # voxels compressed together: 256 KiB of int16, the least that is still fast; a patch reads few


def pack_volume(values: AnyArray, threads: int = 2) -> bytes:
    """Compress a volume without loss, in blocks, for a store where disk is short: blosc2, bits shuffled, zstd 1.

    Args:
        values: (slices, rows, columns), of colour with a last axis.
    """
    from imagecodecs import blosc2_encode

    if values.ndim not in (3, 4) or values.dtype.kind not in "uif":
        raise ValueError("a volume is (slices, rows, columns), of numbers")

    def pack(block: tuple[slice, ...]) -> bytes:
        flat: Any = np.ascontiguousarray(values[block]).reshape(-1).view(np.uint8)
        return bytes(
            blosc2_encode(
                flat, 1, compressor="zstd", shuffle="bitshuffle", typesize=values.dtype.itemsize, numthreads=1
            )
        )

    with ThreadPoolExecutor(threads) as pool:
        blocks = list(pool.map(pack, _blocks(values.shape)))
    shape = (*values.shape, 1)[:4]
    head = _PACK_HEAD.pack(_PACKED, values.dtype.str.encode(), values.ndim, *shape)
    ends = np.cumsum([0, *map(len, blocks)], dtype="<u8") + _PACK_HEAD.size + 8 * (len(blocks) + 1)
    return b"".join((head, ends.astype("<u8").tobytes(), *blocks))


def unpack_volume(data: Bytes, threads: int = 2) -> AnyArray:
    """Give back the whole array that :func:`pack_volume` took.

    Raises:
        StorageError: the bytes are not whole. They are trusted otherwise: verify their digest first.
    """
    shape, _ = _packed(data)
    return unpack_patch(data, (0, 0, 0), shape[:3], threads)


def unpack_patch(data: Bytes, start: tuple[int, ...], stop: tuple[int, ...], threads: int = 1) -> AnyArray:
    """Give the voxels from ``start`` up to, without, ``stop`` of a packed volume; only the blocks they touch are read.

    Args:
        data: what :func:`pack_volume` gave (bytes, or a view of a memory map).
        start: slice, row, column.
        stop: slice, row, column.

    Raises:
        StorageError: the bytes are not whole.
        IndexError: the patch leaves the volume.
    """
    from imagecodecs import Blosc2Error, blosc2_decode

    shape, dtype = _packed(data)
    if not all(0 <= a < b <= side for a, b, side in zip(start, stop, shape[:3], strict=True)):
        raise IndexError("the patch leaves the volume")
    blocks = _blocks(shape)
    view: Any = memoryview(data)
    ends = np.frombuffer(view, "<u8", len(blocks) + 1, _PACK_HEAD.size)
    patch = np.empty((*(b - a for a, b in zip(start, stop, strict=True)), *shape[3:]), dtype=dtype)

    def unpack(number: int) -> None:
        block = blocks[number]
        sides = [side.stop - side.start for side in block]
        stored = view[int(ends[number]) : int(ends[number + 1])]
        flat = np.frombuffer(blosc2_decode(stored, numthreads=1), dtype)
        low = [max(a, side.start) for a, side in zip(start, block, strict=True)]
        high = [min(b, side.stop) for b, side in zip(stop, block, strict=True)]
        inside = tuple(slice(a - s.start, b - s.start) for a, b, s in zip(low, high, block, strict=True))
        target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
        patch[target] = flat.reshape(*sides, *shape[3:])[inside]

    touched = [
        number
        for number, block in enumerate(blocks)
        if all(side.start < b and a < side.stop for a, b, side in zip(start, stop, block, strict=True))
    ]
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(unpack, touched))
    except (Blosc2Error, ValueError) as error:
        raise StorageError("A packed volume is damaged. Ingest its files again.") from error
    return patch


def _packed(data: Bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read shape and type of a packed volume and see that it is whole."""
    if len(data) >= _PACK_HEAD.size:
        mark, kind, axes, *sides = _PACK_HEAD.unpack_from(data)
        if mark == _PACKED and axes in (3, 4) and min(sides) > 0:
            shape, dtype = tuple(sides[:axes]), np.dtype(kind.rstrip(b"\0").decode("ascii"))
            last = _PACK_HEAD.size + 8 * math.prod(-(-side // step) for side, step in zip(shape, _BLOCK, strict=False))
            if len(data) >= last + 8 and struct.unpack_from("<Q", data, last)[0] == len(data):
                return shape, dtype
    raise StorageError("A packed volume is cut off, or is none. Ingest its files again.")


def _blocks(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """List the blocks of a volume, the last axis fastest."""
    cuts = (
        [slice(at, min(at + step, side)) for at in range(0, side, step)]
        for side, step in zip(shape[:3], _BLOCK, strict=True)
    )
    return list(product(*cuts))
