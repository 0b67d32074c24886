"""Compressed frames become arrays, in a process that may die.

The first half is pure: :func:`split_frames` finds the frames in encapsulated pixel data, :func:`decode_frame` decodes
one. What a codestream says of itself (rows, columns, samples, precision) is held against the DICOM header before a
decoder sees it, and what a decoder would silently fill up (a JPEG cut off inside) is found.

Pictures (PNG, JPEG, TIFF, GIF) are decoded by :mod:`medtl.scans.pictures`, in the same process.

The second half is the process. Decoders are native code fed by strangers: here they run in a child with limits on
memory and time, a bare environment and no core dumps. A child that crashes, hangs or asks for too much costs that
frame alone; the next frames go to a fresh child. The child opens the scan and writes the pixels itself, which no other
module outside ``io.py`` may do, because pixels that travelled through a pipe would be copied twice and a parent that
parses them would not be protected. A picture's bytes and values do go through the pipe, as they are: nothing of it then
lies in a temporary file, and there is nothing to parse. Children speak length-prefixed JSON and are never believed:
what they say is matched against patterns, and nothing they send is unpickled.

Codes of the errors: ``truncated``, ``too_large``, ``decode_failed``, ``no_decoder``, ``changed``, ``unreadable``, of
pictures ``bad_size``, ``multi_frame`` and ``undecodable``; ``decoder_crash``, ``decoder_timeout``, ``decoder_memory``.
Source of the formats: DICOM PS3.5 8.2, A.4 and annex G; ISO/IEC 10918-1, 14495-1, 15444-1.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import queue
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medtl.errors import MedtlError, ScanError, StorageError
from medtl.scans.pictures import DTYPES, decode_picture

if TYPE_CHECKING:
    from medtl.scans.headers import Header

AnyArray = npt.NDArray[Any]
Fragments = list[tuple[int, int]]  # (start, length) of each piece of one frame

RLE = "1.2.840.10008.1.2.5"
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_JPEG_2000 = (
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.92",  # part 2; streams that use its extensions are refused
    "1.2.840.10008.1.2.4.93",
    "1.2.840.10008.1.2.4.201",  # the same with the high-throughput block coder
    "1.2.840.10008.1.2.4.202",
    "1.2.840.10008.1.2.4.203",
)
_YBR_TO_RGB = np.array(  # full range, PS3.3 C.7.6.3.1.2
    [[1, 1, 1], [0, -0.114 * 1.772 / 0.587, 1.772], [1.402, -0.299 * 1.402 / 0.587, 0]], dtype=np.float32
)
_STRIP = 1 << 18  # pixels whose colours are turned at a time; they take twelve times the memory meanwhile
_PACKBITS_GAIN = 64  # two bytes of RLE become at most 128
_ITEM, _SEQUENCE_END = 0xE000FFFE, 0xE0DDFFFE  # as little-endian words


@dataclass(frozen=True, slots=True)
class FrameFormat:
    """What the DICOM header says of every frame.

    Raises:
        ScanError: ``no_decoder`` for samples or bits that no compressed transfer syntax here can carry.
    """

    transfer_syntax: str
    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str

    def __post_init__(self) -> None:
        if self.samples not in (1, 3) or self.bits_allocated not in (8, 16, 32):
            what = f"{self.samples} samples of {self.bits_allocated} bits per pixel"
            raise ScanError("no_decoder", f"compressed pixels with {what}; 1 or 3 of 8, 16 or 32 are known")
        if not (1 <= self.bits_stored <= self.bits_allocated and self.rows > 0 and self.columns > 0):
            raise ScanError("decode_failed", "the header's rows, columns or bits stored are impossible")

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, columns)``, or ``(rows, columns, 3)`` for colour."""
        return (self.rows, self.columns) if self.samples == 1 else (self.rows, self.columns, self.samples)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a decoded value, little-endian."""
        return np.dtype(f"<{'i' if self.signed else 'u'}{self.bits_allocated // 8}")

    @property
    def nbytes(self) -> int:
        """Bytes of one decoded frame."""
        return self.rows * self.columns * self.samples * self.bits_allocated // 8


def format_of(header: Header) -> FrameFormat:
    """Take from a header what a decoder has to know.

    Raises:
        ScanError: ``no_decoder`` or ``decode_failed``, see :class:`FrameFormat`.
    """
    return FrameFormat(
        header.transfer_syntax,
        header.rows,
        header.columns,
        header.samples,
        header.bits_allocated,
        header.bits_stored,
        header.signed,
        header.photometric,
    )


def can_decode(transfer_syntax: str) -> bool:
    """Tell whether frames of this transfer syntax are decoded here."""
    return transfer_syntax in _DECODERS


def split_frames(data: bytes | mmap.mmap, offset: int, frames: int, extended: Sequence[int] = ()) -> list[Fragments]:
    """Find the pieces of each frame in encapsulated pixel data.

    Args:
        data: the file, or as much of it as holds the pixel data.
        offset: of the first byte after the length of the PixelData element.
        frames: how many the header declares.
        extended: extended offset table (7FE0,0001), where there is one.

    Returns:
        For each frame its fragments as (start, length) in ``data``.

    Raises:
        ScanError: ``truncated``, ``decode_failed`` or ``too_large``. Source: DICOM PS3.5 A.4.
    """
    table_at, table_size = next(items := _items(data, offset), (None, 0))
    if table_at is None:
        raise ScanError("truncated", "compressed pixel data without a single item")
    fragments: Fragments = []
    for fragment in items:
        fragments.append(fragment)
        if len(fragments) > 64 * frames + 100_000:
            raise ScanError("too_large", f"more than {len(fragments) - 1} fragments for {frames} frames")
    if len(fragments) != frames:
        fragments = [f for f in fragments if f[1]]
    if len(fragments) < frames:
        raise ScanError("truncated", f"{len(fragments)} fragments of pixel data for {frames} frames")
    if frames == 1 or len(fragments) == frames:
        return [fragments] if frames == 1 else [[fragment] for fragment in fragments]
    table = tuple(extended) or struct.unpack_from(f"<{table_size // 4}I", data, table_at)
    if len(table) == frames:
        first = table_at + table_size + 8
        return _group(fragments, [place + first for place in table])
    starts = [at for at, _ in fragments if data[at : at + 2] in (b"\xff\xd8", b"\xff\x4f")]
    if len(starts) != frames:
        raise ScanError("decode_failed", f"{len(fragments)} fragments, {frames} frames and no table that parts them")
    return _group(fragments, starts)


def _items(data: bytes | mmap.mmap, at: int) -> Iterator[tuple[int, int]]:
    """Walk the items up to the sequence delimiter."""
    while True:
        if at + 8 > len(data):
            raise ScanError("truncated", "the compressed pixel data ends without a delimiter")
        tag, length = struct.unpack_from("<II", data, at)
        if tag == _SEQUENCE_END:
            return
        if tag != _ITEM:
            raise ScanError("decode_failed", "something else than an item among the compressed pixel data")
        if length > len(data) - at - 8:  # an undefined length, too
            raise ScanError("truncated", "a fragment of pixel data reaches past the end of the file")
        yield at + 8, length
        at += 8 + length


def _group(fragments: Fragments, starts: Sequence[int]) -> list[Fragments]:
    places = {start: index for index, (start, _) in enumerate(fragments)}
    indices = [places.get(start, -1) for start in starts]
    if indices[0] != 0 or any(b <= a for a, b in pairwise(indices)):
        raise ScanError("decode_failed", "the offset table does not point at the fragments")
    return [fragments[a:b] for a, b in zip(indices, [*indices[1:], len(fragments)], strict=True)]


def decode_frame(codestream: bytes, wanted: FrameFormat) -> AnyArray:
    """Decode one compressed frame.

    Args:
        codestream: all fragments of the frame, joined.
        wanted: what the DICOM header says of it.

    Returns:
        Array of ``wanted.shape`` and ``wanted.dtype``. Colour is RGB, interleaved, whatever it was before;
        ``PALETTE COLOR`` stays indices.

    Raises:
        ScanError: ``too_large`` where the codestream holds more than the header declares, ``truncated``,
            ``no_decoder``, ``decoder_memory``, and ``decode_failed`` for everything else.
    """
    decoder = _DECODERS.get(wanted.transfer_syntax)
    if decoder is None:
        raise ScanError("no_decoder", "no decoder for this transfer syntax")
    try:
        values = decoder(codestream, wanted)
    except ScanError:
        raise
    except ImportError:  # an imagecodecs that was built without this codec
        values = decode_with_pydicom(codestream, wanted)
    except MemoryError as error:
        raise ScanError("decoder_memory", "decoding takes more memory than a decoder is given") from error
    except Exception as error:
        # A decoder given hostile bytes may raise anything; its text may quote the file and is not kept.
        raise ScanError("decode_failed", f"the compressed pixels are damaged ({type(error).__name__})") from error
    if values.shape != wanted.shape or values.dtype != wanted.dtype:
        raise ScanError("decode_failed", "the decoded frame is not of the size that the header declares")
    return values


def decode_with_pydicom(codestream: bytes, wanted: FrameFormat) -> AnyArray:
    """Decode one frame with whatever plugin pydicom finds; slower, and the second opinion of the tests.

    Raises:
        ScanError: ``no_decoder`` or ``decode_failed``.
    """
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    decoder = get_decoder(UID(wanted.transfer_syntax))
    if not decoder.is_available:
        raise ScanError("no_decoder", "no decoder for this transfer syntax is installed")
    options: dict[str, Any] = {
        "number_of_frames": 1,
        "rows": wanted.rows,
        "columns": wanted.columns,
        "samples_per_pixel": wanted.samples,
        "bits_allocated": wanted.bits_allocated,
        "bits_stored": wanted.bits_stored,
        "pixel_representation": int(wanted.signed),
        "photometric_interpretation": wanted.photometric,
        "planar_configuration": 0,
        "pixel_keyword": "PixelData",
    }
    try:
        values, _ = decoder.as_array(encapsulate([codestream]), **options)
    except Exception as error:  # as above: whatever a decoder raises costs this frame
        raise ScanError("decode_failed", f"the compressed pixels are damaged ({type(error).__name__})") from error
    return values


# ── what a codestream says of itself ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Stream:
    """The size that a codestream's own header declares."""

    rows: int
    columns: int
    samples: int
    precision: int
    signed: bool = False
    ybr: bool | None = None  # None: it does not say
    planes: bool = False  # one scan per sample

    def check(self, wanted: FrameFormat) -> None:
        """Refuse a codestream that is not what the DICOM header declares, before anything is allocated for it."""
        if (self.rows, self.columns, self.samples) != (wanted.rows, wanted.columns, wanted.samples):
            larger = self.rows * self.columns * self.samples > wanted.rows * wanted.columns * wanted.samples
            raise ScanError(
                "too_large" if larger else "decode_failed",
                f"the codestream holds {self.rows} x {self.columns} x {self.samples} values, the header declares "
                f"{wanted.rows} x {wanted.columns} x {wanted.samples}",
            )
        if not 1 <= self.precision <= wanted.bits_allocated:
            raise ScanError(
                "decode_failed", f"values of {self.precision} bits where the header allots {wanted.bits_allocated}"
            )


def _jpeg_stream(stream: bytes, frame_markers: frozenset[int]) -> tuple[_Stream, int]:
    """Read the frame header of a JPEG or JPEG-LS codestream; the number is where its first scan's data start."""
    if stream[:2] != b"\xff\xd8":
        raise ScanError("decode_failed", "the compressed pixels are not of the kind that the transfer syntax names")
    size: tuple[int, int, int, int] | None = None
    names = scan = b""
    ybr: bool | None = None
    start = 2
    for marker, body, end in _segments(stream, 2):
        start = end
        if marker in frame_markers and len(body) >= 6 and size is None:
            size = struct.unpack_from(">BHHB", body)
            names = body[6::3]
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            raise ScanError("decode_failed", "a kind of JPEG that the transfer syntax does not allow")
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            ybr = body[11] == 1
        elif marker == 0xE0 and body[:4] == b"JFIF" and ybr is None:
            ybr = True
        scan = body
    if size is None or len(scan) < 4:
        raise ScanError("decode_failed", "the codestream does not say how large it is")
    precision, rows, columns, samples = size
    rgb = names[:3] in (b"RGB", b"rgb")
    return _Stream(rows, columns, samples, precision, ybr=False if rgb else ybr, planes=scan[-2] == 0), start


def _segments(stream: bytes, at: int) -> Iterator[tuple[int, bytes, int]]:
    """Walk marker segments up to and including a start of scan: marker, body, where the body ends."""
    marker = 0
    while marker != 0xDA:
        while stream[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if at + 4 > len(stream) or stream[at] != 0xFF:
            raise ScanError("decode_failed", "the codestream's header is damaged")
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4])
        if length < 2 or at + 2 + length > len(stream):
            raise ScanError("truncated", "the codestream ends within its header")
        at += 2 + length
        yield marker, stream[at - length + 2 : at], at


def _jpeg_2000_stream(stream: bytes) -> tuple[_Stream, bool]:
    """Read the main header of a JPEG 2000 codestream; the flag tells whether it was coded in YCbCr."""
    if stream[:4] != b"\xff\x4f\xff\x51" or len(stream) < 45:
        raise ScanError("decode_failed", "the compressed pixels are not of the kind that the transfer syntax names")
    length, features, right, bottom, left, top = struct.unpack_from(">HHIIII", stream, 4)
    samples = int.from_bytes(stream[40:42])
    if features & 0x8000:
        raise ScanError("no_decoder", "a JPEG 2000 codestream that uses extensions of part 2")
    if length != 38 + 3 * samples or 42 + 3 * samples > len(stream) or right <= left or bottom <= top:
        raise ScanError("decode_failed", "the codestream's header is damaged")
    kinds = {stream[at : at + 3] for at in range(42, 42 + 3 * samples, 3)}
    if len(kinds) != 1 or next(iter(kinds))[1:] != b"\x01\x01":
        raise ScanError("decode_failed", "samples of different size or depth in one JPEG 2000 codestream")
    depth = next(iter(kinds))[0]
    transformed = False
    at = 4 + length
    while stream[at : at + 2] not in (b"\xff\x90", b""):  # up to the first tile
        if stream[at : at + 2] == b"\xff\x52":
            transformed = stream[at + 8 : at + 9] == b"\x01"
        at += 2 + max(2, int.from_bytes(stream[at + 2 : at + 4]))
    return _Stream(bottom - top, right - left, samples, (depth & 0x7F) + 1, signed=depth > 0x7F), transformed


# ── decoders, one per family ────────────────────────────────────────────────────────────────────────────────────────


def _rle(stream: bytes, wanted: FrameFormat) -> AnyArray:
    """Decode RLE: one segment of PackBits per byte of a sample, most significant first. Source: DICOM PS3.5 G."""
    from imagecodecs import packbits_decode

    width = wanted.dtype.itemsize
    pixels = wanted.rows * wanted.columns
    count = wanted.samples * width
    if len(stream) < 64:
        raise ScanError("truncated", "an RLE frame without its header")
    if wanted.nbytes > _PACKBITS_GAIN * len(stream):
        raise ScanError("too_large", f"{len(stream)} bytes of RLE cannot hold the {wanted.nbytes} that are declared")
    found, *offsets = struct.unpack_from("<16I", stream)
    edges = [*offsets[:count], len(stream)]
    if found != count or edges[0] != 64 or any(b <= a for a, b in pairwise(edges)):
        raise ScanError("decode_failed", f"an RLE header that does not describe {count} segments")
    samples: list[AnyArray] = []
    for index in range(count):
        segment = stream[edges[index] : edges[index + 1]]
        if len(segment) > 2 * pixels + 64:
            raise ScanError("decode_failed", "an RLE segment longer than its pixels can need")
        try:
            plane = np.frombuffer(packbits_decode(segment), np.uint8)
        except RuntimeError:  # perhaps a padding byte that is none of RLE's; the number of pixels tells
            plane = np.frombuffer(packbits_decode(segment[:-1]), np.uint8)
        if not pixels <= plane.size <= pixels + 1:  # some encoders pad to an even number
            raise ScanError("decode_failed", f"an RLE segment of {plane.size} values for {pixels} pixels")
        if index % width == 0:
            samples.append(plane[:pixels].astype(f"<u{width}"))
        else:
            samples[-1] <<= 8
            samples[-1] |= plane[:pixels]
    values = samples[0] if wanted.samples == 1 else np.stack(samples, axis=1)
    return _coloured(_fitted(values.reshape(wanted.shape), wanted.bits_stored, False, wanted), None, wanted)


def _jpeg(stream: bytes, wanted: FrameFormat) -> AnyArray:
    """Decode JPEG: baseline, extended (8 and 12 bits) and lossless (all predictors)."""
    from imagecodecs import jpeg8_decode

    said, at = _jpeg_stream(stream, frozenset((0xC0, 0xC1, 0xC3)))
    said.check(wanted)
    filled = _filled_up(stream, at)
    # Asked for the colours that it has, libjpeg leaves them alone; they are converted once, below.
    colours: dict[str, Any] = {"colorspace": "YCBCR", "outcolorspace": "YCBCR"} if said.samples == 3 else {}
    values = jpeg8_decode(stream, **colours)
    if not np.array_equal(values, jpeg8_decode(filled, **colours)):
        raise ScanError("truncated", "the compressed pixels end before the image does")
    return _coloured(_fitted(values, wanted.bits_stored, False, wanted), said.ybr, wanted)


def _filled_up(stream: bytes, at: int) -> bytes:
    """Put bits that mean something behind every run of coded pixels.

    libjpeg makes up pixels, without a word, where the coded ones end too early. What it makes up depends on the bits
    that it meets, so that an image which decodes to the same values with and without these bits is complete.
    """
    parts, done = [stream[:at]], False
    while not done:
        coded = _CODED.match(stream, at)
        assert coded is not None  # the pattern matches nothing, too
        parts.append(_RESTART.sub(_FILLER + rb"\1", coded[0]) + _FILLER)
        at = coded.end()
        while stream[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        marker = stream[at : at + 2]
        if len(marker) < 2:
            raise ScanError("truncated", "the compressed pixels end before the image does")
        if done := marker == b"\xff\xd9":
            parts.append(marker)
            continue
        for _, _, end in _segments(stream, at):  # the tables and the header of the next scan
            parts.append(stream[at:end])
            at = end
    return b"".join(parts)


_CODED = re.compile(rb"(?:[^\xff]++|\xff[\x00\xd0-\xd7])*+")
_RESTART = re.compile(rb"(\xff[\xd0-\xd7])")
_FILLER = bytes.fromhex("a9535ac936d29b6c") * 16


def _jpeg_ls(stream: bytes, wanted: FrameFormat) -> AnyArray:
    """Decode JPEG-LS, lossless and near-lossless."""
    from imagecodecs import jpegls_decode

    said, at = _jpeg_stream(stream, frozenset((0xF7,)))
    said.check(wanted)
    if stream.find(b"\xff\xd9", at) < 0:  # CharLS needs seconds to find that out
        raise ScanError("truncated", "the compressed pixels end before the image does")
    values = jpegls_decode(stream)
    if said.samples == 3 and said.planes and values.shape == (3, said.rows, said.columns):
        values = np.moveaxis(values, 0, 2)
    return _coloured(_fitted(values, said.precision, False, wanted), None, wanted)


def _jpeg_2000(stream: bytes, wanted: FrameFormat) -> AnyArray:
    """Decode JPEG 2000 and HTJ2K; OpenJPEG in strict mode, which refuses a codestream that was cut off."""
    from imagecodecs import jpeg2k_decode

    stream = _out_of_jp2(stream)
    said, transformed = _jpeg_2000_stream(stream)
    said.check(wanted)
    if not transformed and wanted.photometric in ("YBR_RCT", "YBR_ICT"):
        raise ScanError("decode_failed", f"the header says {wanted.photometric}, the codestream has no such transform")
    values = jpeg2k_decode(stream)
    return _coloured(_fitted(values, said.precision, said.signed, wanted), False if transformed else None, wanted)


def _out_of_jp2(stream: bytes) -> bytes:
    """Find the codestream in a JP2 file, which DICOM does not allow and some devices write."""
    if stream[4:8] != b"jP  ":
        return stream
    at = 0
    while at + 8 <= len(stream):
        length, kind = int.from_bytes(stream[at : at + 4]), stream[at + 4 : at + 8]
        if kind == b"jp2c":
            return stream[at + 8 : at + length if length else len(stream)]
        if length < 8:
            break
        at += length
    raise ScanError("decode_failed", "a JP2 file without a codestream")


def _fitted(values: AnyArray, bits: int, signed: bool, wanted: FrameFormat) -> AnyArray:
    """Give values of ``bits`` bits the type of the header; where only one of both is signed, the bits decide."""
    spare = wanted.bits_allocated - bits
    if signed == wanted.signed and (signed or spare <= 0):
        return values.astype(wanted.dtype, copy=False)
    unsigned = np.dtype(f"<u{wanted.dtype.itemsize}")
    wide = values.astype(f"<{'i' if signed else 'u'}{wanted.dtype.itemsize}", copy=False).view(unsigned)
    if spare <= 0:
        return wide.view(wanted.dtype)
    kept: AnyArray = (wide << spare).view(wanted.dtype) >> spare
    return kept


def _coloured(values: AnyArray, ybr: bool | None, wanted: FrameFormat) -> AnyArray:
    """Turn YCbCr into RGB, where the codestream or else the header says that it is; of 8 bits only."""
    if wanted.samples != 3 or ybr is False or (ybr is None and wanted.photometric == "RGB"):
        return values
    if ybr is None and wanted.photometric not in ("YBR_FULL", "YBR_FULL_422"):
        raise ScanError("decode_failed", "colours of a kind that does not go with this codestream")
    if wanted.dtype != np.uint8:
        raise ScanError("no_decoder", "YCbCr colours of more than 8 bits")
    rgb = np.empty(wanted.shape, np.uint8)
    step = max(1, _STRIP // wanted.columns)
    for top in range(0, wanted.rows, step):
        strip = values[top : top + step].astype(np.float32) - np.array([0, 128, 128], np.float32)
        rgb[top : top + step] = np.clip(np.floor(strip @ _YBR_TO_RGB + np.float32(0.5)), 0, 255)
    return rgb


_DECODERS: Mapping[str, Callable[[bytes, FrameFormat], AnyArray]] = {
    RLE: _rle,
    **dict.fromkeys(_JPEG, _jpeg),
    **dict.fromkeys(_JPEG_LS, _jpeg_ls),
    **dict.fromkeys(_JPEG_2000, _jpeg_2000),
}


# ── the child ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class FrameJob:
    """One frame to decode: where it is, what it should be, where its values go.

    ``pixel_offset`` is :attr:`Header.pixel_offset`; ``output_offset`` counts bytes in the output file, which already
    has its full size.
    """

    path: Path
    file_size: int
    pixel_offset: int
    frames: int
    frame: int
    format: FrameFormat
    output_offset: int
    extended: tuple[int, ...] = ()  # extended offset table, where the file has one


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may take: address space, seconds per frame, threads."""

    memory_bytes: int = 4 << 30
    seconds: float = 60.0
    threads: int = 2


class _Unwritable(Exception):
    """The output cannot be written: the run's fault, not the frame's."""


class _Worker:
    """One request inside the child: frames of some files, decoded by several threads into one output file."""

    def __init__(self, request: Mapping[str, Any], limits: Limits, replies: IO[bytes]) -> None:
        self.files = [
            (path, int(size), int(offset), int(frames), FrameFormat(**kind), extended)
            for path, size, offset, frames, kind, extended in request["files"]
        ]
        self.jobs = iter(enumerate(request["jobs"]))
        self.limits = limits
        self.replies = replies
        self.lock = threading.Lock()
        self.open_files: dict[int, tuple[mmap.mmap, list[Fragments]]] = {}
        self.fault = ""
        try:
            self.output = os.open(request["output"], os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self.output_size = os.fstat(self.output).st_size
        except OSError as error:
            self.output, self.output_size, self.fault = -1, 0, str(error.strerror)

    def run(self) -> None:
        """Decode everything; one reply per frame."""
        others = [threading.Thread(target=self._work, daemon=True) for _ in range(self.limits.threads - 1)]
        for thread in others:
            thread.start()
        self._work()
        for thread in others:
            thread.join()
        if self.output >= 0:
            os.close(self.output)

    def _work(self) -> None:
        while True:
            with self.lock:
                index, job = next(self.jobs, (None, None))
                if index is None or job is None:
                    return
                _allow_seconds(self.limits)
            code, reason = "", ""
            try:
                self._decode(*job)
            except ScanError as error:
                code, reason = error.code, error.reason
            except _Unwritable as error:
                code, reason = "unwritable", str(error)
            except MemoryError:
                code, reason = "decoder_memory", "decoding takes more memory than a decoder is given"
            except OSError as error:
                code, reason = "unreadable", f"cannot be read ({error.strerror})"
            except Exception as error:  # a thread that ended here would leave the parent waiting
                code, reason = "decode_failed", f"the compressed pixels are damaged ({type(error).__name__})"
            with self.lock:
                _write(self.replies, [index, code, reason])

    def _decode(self, file: int, frame: int, output_offset: int) -> None:
        if self.fault:
            raise _Unwritable(self.fault)
        data, frames = self._frames(file)
        kind = self.files[file][4]
        codestream = b"".join([data[start : start + length] for start, length in frames[frame]])
        values = decode_frame(codestream, kind)
        if output_offset < 0 or output_offset + values.nbytes > self.output_size:
            raise _Unwritable("a frame would lie past the end of the output")
        rest = np.ascontiguousarray(values).data.cast("B")
        try:
            while rest:
                written = os.pwrite(self.output, rest, output_offset)
                rest, output_offset = rest[written:], output_offset + written
        except OSError as error:
            raise _Unwritable(str(error.strerror)) from error

    def _frames(self, file: int) -> tuple[mmap.mmap, list[Fragments]]:
        with self.lock:
            known = self.open_files.get(file)
        if known is not None:
            return known
        path, size, offset, frames, _, extended = self.files[file]
        descriptor = os.open(os.fsencode(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != size or size == 0:
                raise ScanError("changed", "the file changed after its header was read; it will be taken next time")
            data = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        found = data, split_frames(data, offset, frames, extended)
        with self.lock:
            while len(self.open_files) > 2 * self.limits.threads:  # of a series of single frames, only the last few
                self.open_files.pop(next(iter(self.open_files)))
            self.open_files[file] = found
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve decoding requests on standard input until it closes: the child's whole life.

    The limits stand before the first byte is read. The CPU limit ends a child that hangs after its parent is gone.
    """
    import resource

    memory, seconds, threads = arguments if arguments is not None else sys.argv[1:]
    limits = Limits(int(memory), float(seconds), int(threads))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold a patient's pixels
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a native library prints is no reply
    _write(replies, [-1, "", ""])
    while (request := _read(sys.stdin.buffer)) is not None:
        if "picture" in request:
            _serve_picture(request, limits, replies)
        else:
            _Worker(request, limits, replies).run()
    return 0


def _serve_picture(request: Mapping[str, Any], limits: Limits, replies: IO[bytes]) -> None:
    """Decode one picture; the reply names shape and kind of the values, which follow as they are."""
    _allow_seconds(limits)
    try:
        values = decode_picture(sys.stdin.buffer.read(request["picture"]), request["megapixels"])
    except ScanError as error:
        _write(replies, [0, error.code, error.reason])
    except MemoryError:
        _write(replies, [0, "decoder_memory", _FATES["decoder_memory"]])
    else:
        _write(replies, [0, "", "", list(values.shape), values.dtype.str])
        replies.write(values.data.cast("B"))
        replies.flush()


def _allow_seconds(limits: Limits) -> None:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(used.ru_utime + used.ru_stime + (limits.seconds + 5) * limits.threads)
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _write(stream: IO[bytes], message: object) -> None:
    text = json.dumps(message).encode()
    stream.write(struct.pack("<I", len(text)) + text)
    stream.flush()


def _read(stream: IO[bytes]) -> Any:
    head = stream.read(4)
    return json.loads(stream.read(struct.unpack("<I", head)[0])) if len(head) == 4 else None


# ── its parent ──────────────────────────────────────────────────────────────────────────────────────────────────────

_MOST_REPLY = 4096  # bytes
_PATIENCE = 5  # frames of one series that may cost a child before the rest is given up
_REASON = re.compile(r"[A-Za-z0-9 .,;:()_+=-]{1,300}")
_CODES = frozenset(
    ("truncated", "too_large", "decode_failed", "no_decoder", "changed", "unreadable", "decoder_memory", "unwritable")
)
_OF_PICTURES = frozenset(("bad_size", "too_large", "multi_frame", "undecodable", "decoder_memory"))
_PICTURES = [*(([], dtype) for dtype in DTYPES), ([3], np.dtype(np.uint8).str)]  # (channels, kind) of values
_FATES = {
    "decoder_crash": "the decoder crashed on it",
    "decoder_timeout": "the decoder did not finish in time",
    "decoder_memory": "decoding takes more memory than a decoder is given",
}
_PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # where some installations keep the codecs' libraries


class DecodingProcess:
    """One child and the pipes to it.

    Args:
        limits: what it may take.
        command: the program and its first arguments, where it is not this module; the limits are appended.

    Raises:
        MedtlError: the child ends before it is ready.
    """

    def __init__(self, limits: Limits, command: Sequence[str] | None = None) -> None:
        self._limits = limits
        ours = (sys.executable, "-P", "-m", "medtl.scans.decoding")
        arguments = (str(limits.memory_bytes), str(limits.seconds), str(limits.threads))
        try:
            self._child = subprocess.Popen(  # noqa: S603 - our own module, or what a test puts in its place
                (*(command or ours), *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_bare_environment(),
                bufsize=0,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        except OSError as error:  # no more processes, files or memory: no scan's fault
            raise MedtlError(
                f"The process that decodes compressed pixels does not start ({error.strerror}). Let this user have "
                "more processes and open files (ulimit -u, ulimit -n), or give scans.workers a smaller number."
            ) from error
        assert self._child.stdin is not None and self._child.stdout is not None
        self._to, self._from = self._child.stdin, self._child.stdout
        os.set_blocking(self._to.fileno(), False)
        self._received = bytearray()
        self._fate: str | None = None
        if self._reply(time.monotonic() + max(30.0, limits.seconds)) != [-1, "", ""]:
            self.close()
            raise MedtlError(
                "The process that decodes compressed pixels does not start. Try `python -c 'import imagecodecs, PIL'` "
                f"and give it more than {limits.memory_bytes >> 20} MiB of address space."
            )

    def run(self, jobs: Sequence[FrameJob], output: Path) -> tuple[dict[int, ScanError | None], str | None]:
        """Decode frames into the output file.

        Returns:
            By the job's index what became of it (``None``: its values are written), and what became of the child:
            ``None`` where it lives, or ``decoder_crash``, ``decoder_timeout``, ``decoder_memory``.
        """
        results: dict[int, ScanError | None] = {}
        if not self._send(_request(jobs, output)):
            return results, self._fate
        while len(results) < len(jobs):
            reply = self._reply(time.monotonic() + self._limits.seconds)
            if self._fate is not None:
                break
            index, error = _understood(reply)
            if index is None or not 0 <= index < len(jobs) or index in results:
                self._end("decoder_crash")  # nonsense: whatever it is now, it is no decoder
                break
            results[index] = error
        return results, self._fate

    def picture(self, data: bytes, most_megapixels: float) -> tuple[AnyArray | ScanError | None, str | None]:
        """Decode a PNG, JPEG, TIFF or GIF.

        Returns:
            Its values or what is wrong with it, ``None`` where there is no answer; and what became of the child, as of
            :meth:`run`.
        """
        text = json.dumps({"picture": len(data), "megapixels": most_megapixels}).encode()
        if not self._send(struct.pack("<I", len(text)) + text) or not self._send(data):
            return None, self._fate
        until = time.monotonic() + self._limits.seconds
        reply = self._reply(until)
        if self._fate is not None:
            return None, self._fate
        if (found := _described(reply, most_megapixels)) is not None:
            values = np.empty(*found)
            return (values if self._fill(values.data.cast("B"), until) else None), self._fate
        index, error = _understood(reply, _OF_PICTURES)
        if index != 0 or error is None:
            self._end("decoder_crash")
        elif error.code == "decoder_memory":
            self._end(error.code)  # who knows whether it read the whole request
        return error if self._fate is None else None, self._fate

    @property
    def alive(self) -> bool:
        """Tell whether the child can still be asked."""
        if self._fate is None and self._child.poll() is not None:
            self._end(None)
        return self._fate is None

    def close(self) -> None:
        """End the child."""
        self._end("closed")

    def _send(self, message: bytes) -> bool:
        rest = memoryview(message)
        poll = select.poll()
        poll.register(self._to, select.POLLOUT)
        until = time.monotonic() + self._limits.seconds
        while rest:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                self._end("decoder_timeout")
                return False
            try:
                rest = rest[os.write(self._to.fileno(), rest) :]
            except BlockingIOError:
                continue
            except OSError:
                self._end(None)
                return False
        return True

    def _reply(self, until: float) -> Any:
        """Read one message; ``None`` and a fate where there is none."""
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        while True:
            if len(self._received) >= 4:
                length = struct.unpack_from("<I", self._received)[0]
                if length > _MOST_REPLY:
                    return self._end("decoder_crash")
                if len(self._received) >= 4 + length:
                    text = bytes(self._received[4 : 4 + length])
                    del self._received[: 4 + length]
                    with contextlib.suppress(ValueError, RecursionError):
                        return json.loads(text)
                    return self._end("decoder_crash")
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                return self._end("decoder_timeout")
            more = os.read(self._from.fileno(), 65_536)
            if not more:
                return self._end(None)
            self._received += more

    def _fill(self, values: memoryview, until: float) -> bool:
        """Read as many bytes as there is room for; false and a fate where they do not come."""
        begun = min(len(self._received), len(values))
        values[:begun] = self._received[:begun]
        del self._received[:begun]
        rest, poll = values[begun:], select.poll()
        poll.register(self._from, select.POLLIN)
        while rest:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                self._end("decoder_timeout")
                return False
            done = os.readv(self._from.fileno(), [rest])
            if not done:
                self._end(None)
                return False
            rest = rest[done:]
        return True

    def _end(self, fate: str | None) -> None:
        """Kill the child and note why; ``None``: it ended by itself, and its signal tells."""
        if self._fate is not None:
            return
        if fate is None:
            try:
                code = self._child.wait(1)
            except subprocess.TimeoutExpired:  # it closed its pipes and lives
                code = 0
            by_signal = {-signal.SIGXCPU: "decoder_timeout", -signal.SIGKILL: "decoder_memory"}
            fate = by_signal.get(code, "decoder_crash")
        self._fate = fate
        self._child.kill()
        self._child.wait()
        self._to.close()
        self._from.close()


class DecodingPool:
    """Children that decode, started when they are first wanted and used again.

    Args:
        workers: how many series are decoded at the same time; each uses ``limits.threads`` threads.
        limits: what each child may take.
        command: as of :class:`DecodingProcess`.
    """

    def __init__(self, workers: int = 1, limits: Limits | None = None, command: Sequence[str] | None = None) -> None:
        self._limits, self._command = limits or Limits(), command
        self._idle: queue.LifoQueue[DecodingProcess | None] = queue.LifoQueue()
        self._workers = workers
        for _ in range(workers):
            self._idle.put(None)

    def __enter__(self) -> DecodingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all children; waits for those at work."""
        for _ in range(self._workers):
            child = self._idle.get()
            if child is not None:
                child.close()
        for _ in range(self._workers):
            self._idle.put(None)

    def start(self) -> None:
        """Start a child that will be wanted soon, if none has been started; returns at once."""
        threading.Thread(target=self._start, name="medtl-decoder", daemon=True).start()

    def _start(self) -> None:
        with contextlib.suppress(MedtlError, OSError), self._lent() as child:  # said when it is wanted
            child()

    def decode(self, jobs: Sequence[FrameJob], output: Path) -> list[ScanError | None]:
        """Decode the frames of one series into the output file. May be called from several threads.

        Frames that were in work when a child died are tried again alone, so that only the guilty one is lost. After
        five such frames the rest of the call is given up, too.

        Returns:
            For each job ``None``, where its values are written, or why not.

        Raises:
            StorageError: the output cannot be written.
            MedtlError: no child can be started.
        """
        results: dict[int, ScanError | None] = {}
        batches, lost = deque([list(range(len(jobs)))] if jobs else []), 0
        with self._lent() as child:
            while batches:
                batch = batches.popleft()
                answers, fate = child().run([jobs[i] for i in batch], output)
                results.update({batch[i]: error for i, error in answers.items()})
                if fate is None:
                    continue
                rest = [i for i in batch if i not in results]
                if len(batch) == 1:
                    lost += 1
                    results[batch[0]] = ScanError(fate, _FATES[fate])
                    continue
                if lost >= _PATIENCE:
                    given_up = ScanError(fate, "given up, after several frames of the series that no decoder survived")
                    results.update(dict.fromkeys(rest, given_up))
                    continue
                suspects = self._limits.threads
                batches.extendleft([i] for i in reversed(rest[:suspects]))
                batches.extend([rest[suspects:]] if rest[suspects:] else [])
        for error in results.values():
            if error is not None and error.code == "unwritable":
                raise StorageError(f"Decoded pixels cannot be written ({error.reason}). Is the disk full?")
        return [results[i] for i in range(len(jobs))]

    def picture(self, data: bytes, most_megapixels: float) -> AnyArray:
        """Decode a PNG, JPEG, TIFF or GIF. May be called from several threads.

        Args:
            most_megapixels: a larger picture is refused by what its header says, before anything is allocated.

        Returns:
            As :func:`medtl.scans.pictures.decode_picture`.

        Raises:
            ScanError: as there, or ``decoder_crash``, ``decoder_timeout``, ``decoder_memory``.
            MedtlError: no child can be started.
        """
        with self._lent() as child:
            found, fate = child().picture(data, most_megapixels)
        if fate is not None:
            raise ScanError(fate, _FATES[fate])
        if isinstance(found, ScanError):
            raise found
        assert found is not None
        return found

    @contextlib.contextmanager
    def _lent(self) -> Iterator[Callable[[], DecodingProcess]]:
        """Lend one child: what is given gives it, or a new one where it has ended."""
        child = self._idle.get()

        def living() -> DecodingProcess:
            nonlocal child
            if child is None or not child.alive:  # it may have been killed while it waited, too
                child = DecodingProcess(self._limits, self._command)
            return child

        try:
            yield living
        except BaseException:  # interrupted: a child that is still answering is of no more use
            if child is not None:
                child.close()
            raise
        finally:
            self._idle.put(child)


def _request(jobs: Sequence[FrameJob], output: Path) -> bytes:
    files: dict[tuple[Path, int], int] = {}
    described: list[list[object]] = []
    items: list[list[int]] = []
    for job in jobs:
        key = (job.path, job.pixel_offset)
        if key not in files:
            files[key] = len(files)
            kind = asdict(job.format)
            described.append([str(job.path), job.file_size, job.pixel_offset, job.frames, kind, job.extended])
        items.append([files[key], job.frame, job.output_offset])
    text = json.dumps({"output": str(output), "files": described, "jobs": items}).encode()
    return struct.pack("<I", len(text)) + text


def _described(reply: Any, most_megapixels: float) -> tuple[tuple[int, ...], str] | None:
    """Take shape and kind of a picture's values from a child's reply, if they can be true."""
    match reply:
        case [0, "", "", [int(rows), int(columns), *colours], str(dtype)] if (
            rows > 0 and columns > 0 and rows * columns <= most_megapixels * 1e6
        ) and (colours, dtype) in _PICTURES:
            return (rows, columns, *colours), dtype
    return None


def _understood(reply: Any, codes: Set[str] = _CODES) -> tuple[int | None, ScanError | None]:
    """Take from a child's reply what can be true."""
    match reply:
        case [int(index), "", ""]:
            return index, None
        case [int(index), str(code), str(reason)] if code in codes:
            return index, ScanError(code, reason if _REASON.fullmatch(reason) else "the decoder gives no clear reason")
    return None, None


def _bare_environment() -> dict[str, str]:
    """Give a child what it needs to find its libraries, and no secret."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    places = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
    # One thread: a BLAS pool would take address space for work that is not done here. Memory of one frame is kept for
    # the next: given back after each, its pages are made anew every time, a third of the time that RLE takes (glibc).
    memory = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
    found = {"PYTHONPATH": os.pathsep.join(places), "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    return {**kept, **found, **memory}


if __name__ == "__main__":
    sys.exit(main())
