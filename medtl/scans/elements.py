"""Walk the elements of a DICOM data set by hand: where each one lies, not what it means. Pure: bytes in, places out.

pydicom believes a declared length: a value that runs past the end of the file comes back short, without a word, and
nesting is recursion. Here every element must end inside what holds it and nesting is a list, so that nothing is
silently short, nothing overflows, and a header costs microseconds. What is legal but unusual raises :class:`Unclear`
in the fast walks and is left to :func:`walk` and pydicom. Source of the encoding: DICOM PS3.5 7.

A tag is one number here, its four bytes read as little endian: ``element << 16 | group`` (see :func:`tag`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from struct import Struct
from typing import Final

from medtl.errors import ScanError

UNDEFINED: Final = 0xFFFFFFFF
DEEPEST: Final = 64  # sequences within sequences; real headers need fewer than ten
MOST_ELEMENTS: Final = 100_000  # outside of sequences; real headers have hundreds
LONGEST_SEQUENCE: Final = 64 << 20  # bytes; geometry of 20,000 frames, and walked in seconds
INFLATED_LEAST: Final = 64 << 20  # bytes; what a deflated data set may always grow to ...
INFLATED_MOST: Final = 512 << 20  # ... and what it may never
INFLATED_RATIO: Final = 100  # times its size, in between
RUN: Final = 12  # elements that are compared with those of the file before at once
SHORTEST_RUN, LONGEST_RUN, MOST_RUNS = 50, 16_384, 512  # bytes, bytes, runs: what is kept of the files before
Run = tuple[bytes, Mapping[int, bytes]]  # elements as they lay in a file, and the wanted values among them
_ITEMS: Final = 0xFFFE  # the group of items and delimiters
_ITEM, _ITEM_END, _SEQUENCE_END = 0xE000FFFE, 0xE00DFFFE, 0xE0DDFFFE
MARKS: Final[Mapping[int, int]] = {_ITEM: 0, _ITEM_END: 0, _SEQUENCE_END: 0}  # wanted, with no VR there is: to stop at
_SHORT_VRS: Final = "AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US"
_LONG_VRS: Final = "OB OD OF OL OV OW SQ SV UC UN UR UT UV"


class Unclear(Exception):
    """Bytes that the fast walk does not understand completely; they may be legal."""


def tag(group: int, element: int) -> int:
    """Give the number by which a tag is known here."""
    return element << 16 | group


META_CLASS: Final = tag(0x0002, 0x0002)
META_SYNTAX: Final = tag(0x0002, 0x0010)
PIXEL_DATA: Final = tag(0x7FE0, 0x0010)
PIXELS: Final[Mapping[int, str]] = {
    PIXEL_DATA: "PixelData",
    tag(0x7FE0, 0x0008): "FloatPixelData",
    tag(0x7FE0, 0x0009): "DoubleFloatPixelData",
}


def vr_number(vr: str, little: bool = True) -> int:
    """Give a value representation as the number its two bytes make."""
    return int.from_bytes(vr.encode(), "little" if little else "big")


@dataclass(frozen=True, slots=True)
class Order:
    """A byte order: how element heads are read and what the value representations look like as numbers."""

    little: bool
    head: Struct  # group, element, VR, 16-bit length
    item: Struct  # group, element, 32-bit length
    length: Struct
    short: frozenset[int]
    long: frozenset[int]
    sequence: int
    unknown: int


def _order(little: bool) -> Order:
    mark = "<" if little else ">"
    short, long = (frozenset(vr_number(vr, little) for vr in vrs.split()) for vrs in (_SHORT_VRS, _LONG_VRS))
    sequence, unknown = vr_number("SQ", little), vr_number("UN", little)
    return Order(
        little, Struct(mark + "HHHH"), Struct(mark + "HHI"), Struct(mark + "I"), short, long, sequence, unknown
    )


LITTLE, BIG = _order(True), _order(False)
_EXPLICIT, _IMPLICIT, _LENGTH = Struct("<IHH").unpack_from, Struct("<II").unpack_from, Struct("<I").unpack_from
_SHORT, _LONG, _SQ, _UN = LITTLE.short, LITTLE.long, LITTLE.sequence, LITTLE.unknown


def read_meta(data: bytes, position: int, size: int) -> tuple[dict[int, bytes], int]:
    """Read the file meta elements (group 2) and give the position after them.

    Raises:
        ScanError: ``length_past_end`` or ``bad_header``.
        struct.error: ``data`` ends inside the head of an element.
    """
    found: dict[int, bytes] = {}
    explicit = has_vr(data, position)
    while data[position : position + 2] == b"\x02\x00":
        key, vr, length = _EXPLICIT(data, position)
        start = position + 8
        if not explicit or vr not in _SHORT:
            key, _, length, start = read_head(data, position, explicit, LITTLE)
        position = start + length
        if position > size:
            raise past_end()
        found[key] = data[start:position]
    return found, position


def walk_explicit(
    data: bytes,
    position: int,
    size: int,
    wanted: Mapping[int, int],
    found: dict[int, bytes],
    seen: dict[int, Run] | None = None,
) -> int:
    """Walk a data set in explicit VR little endian up to its pixels; collect the wanted values.

    Args:
        data: the file, or its start.
        position: of the first element.
        size: of the whole file; elements must end before it.
        wanted: tag -> the value representation it must have, as :func:`vr_number`; and :data:`MARKS`.
        found: filled with the bytes of the values.
        seen: runs of elements of the files before, by their first tag, walked with the same ``wanted``. The files of a
            series say the same thing many times over: bytes that were walked once need not be walked again. Updated.

    Returns:
        Position of the pixel element, or ``size`` where there is none.

    Raises:
        Unclear: an unknown value representation, or another than a wanted tag must have.
        ScanError: ``length_past_end``, ``too_deep`` or ``bad_header``.
        struct.error: ``data`` ends inside the head of an element.
    """
    short, long, head = _SHORT, _LONG, _EXPLICIT
    mine: dict[int, bytes] = {}  # of the present run
    first, begin, left = 0, position, 0
    try:
        for _ in repeat(None, MOST_ELEMENTS):
            if position >= size:
                break
            key, vr, length = head(data, position)
            if not left and seen is not None:
                found.update(mine)
                _remember(seen, first, data[begin:position], mine)
                first, begin, left, mine = key, position, RUN, {}
                run = seen.get(key)
                if run is not None and data.startswith(run[0], position):
                    found.update(run[1])
                    position += len(run[0])
                    begin, left = position, 0
                    continue
            left -= 1
            start = position + 8
            if vr in short:
                position = start + length
            elif vr not in long:
                raise Unclear
            elif key in PIXELS:
                return position
            else:
                (length,) = _LENGTH(data, start)
                start += 4
                if vr == _SQ or length == UNDEFINED or (vr == _UN and _is_item(data, start, length)):
                    position = _skip(data, start, size, length, vr in (_SQ, _UN), LITTLE)
                else:
                    position = start + length
            if key in wanted:
                if wanted[key] == vr or (vr == _UN and length != UNDEFINED):
                    mine[key] = data[start:position]
                elif not key & 1:
                    raise Unclear
        else:
            raise _too_many()
    finally:  # what was read before a fault still tells whose file it is
        found.update(mine)
    if position > size:
        raise past_end()
    return position


def walk_implicit(data: bytes, position: int, size: int, wanted: Mapping[int, int], found: dict[int, bytes]) -> int:
    """Walk a data set in implicit VR little endian up to its pixels; otherwise as :func:`walk_explicit`."""
    for _ in repeat(None, MOST_ELEMENTS):
        if position >= size:
            return position
        key, length = _IMPLICIT(data, position)
        if key in PIXELS:
            return position
        start = position + 8
        if key == 0 or key in MARKS:
            raise Unclear
        if length == UNDEFINED or _is_item(data, start, length):
            end = skip_sequence(data, start, size, length, False, LITTLE)
        else:
            end = start + length
        if end > size:
            raise past_end()
        if key in wanted:
            if length == UNDEFINED and wanted[key] != _SQ:
                raise Unclear
            found[key] = data[start:end]
        position = end
    raise _too_many()


def walk(
    data: bytes, position: int, size: int, explicit: bool, order: Order, found: dict[int, bytes], to_pixels: bool = True
) -> int:
    """Walk a data set of any encoding, however odd, as pydicom does; collect short values.

    Zeros at the end are padding, not elements.

    Args:
        to_pixels: stop at the pixel element; otherwise walk to the end.

    Returns:
        Position of the pixel element, or where the data set ends.

    Raises:
        ScanError, struct.error: as :func:`walk_explicit`.
    """
    for _ in repeat(None, MOST_ELEMENTS):
        if position + 8 > size or _only_zeros(data, position):
            break
        key, vr, length, start = read_head(data, position, explicit, order)
        if key in PIXELS and to_pixels:
            return position
        if key in MARKS:
            raise ScanError("bad_header", "an item outside of any sequence")
        if _holds_items(data, start, vr, length, order):
            end = _skip(data, start, size, length, vr in (None, order.sequence, order.unknown), order, explicit)
        else:
            end = start + length
        if end > size:
            raise past_end()
        if end - start <= 1024:
            found[key] = data[start:end]
        position = end
    else:
        raise _too_many()
    if not _only_zeros(data, position):
        raise ScanError("truncated", "the file ends inside an element")
    if to_pixels and size - position > _PIECE:  # pydicom would take every eight of them for an element
        raise ScanError("truncated", "nothing but zeros where elements should be: not written to its end")
    return size


def skip_sequence(data: bytes, position: int, limit: int, length: int, explicit: bool, order: Order) -> int:
    """Walk through one sequence and everything in it, without recursion.

    Args:
        position: of its first item.
        limit: what it must end before.
        length: as declared; ``UNDEFINED`` where a delimiter ends it.
        explicit: whether what holds it is in explicit VR; items may still be implicit (PS3.5 6.2.2).

    Returns:
        Position after it.

    Raises:
        ScanError, struct.error: as :func:`walk_explicit`.
    """
    end = None if length == UNDEFINED else position + length
    if end is not None and end > limit:
        raise past_end()
    farthest, item = position + LONGEST_SEQUENCE, order.item.unpack_from
    # of each open sequence and item, in turn: its end where declared, the limit of what it holds, its encoding
    open_: list[tuple[int | None, int, bool]] = [(end, limit if end is None else end, explicit)]
    while open_:
        if position > farthest:
            raise _too_many()
        end, limit, explicit = open_[-1]
        if end is not None and position >= end:
            open_.pop()
            continue
        if len(open_) % 2:  # inside a sequence: its end or an item, whose elements follow
            group, element, length = item(data, position)
            key, position = tag(group, element), position + 8
            if key == _SEQUENCE_END and end is None:
                open_.pop()
                continue
            if key != _ITEM:
                raise ScanError("bad_header", "a sequence holds something that is not an item")
            end = None if length == UNDEFINED else position + length
            if end is not None and end > limit:
                raise past_end()
            limit = limit if end is None else end
            explicit = explicit and (length == 0 or has_vr(data, position))
            open_.append((end, limit, explicit))
        position, nested = _elements(data, position, end, limit, explicit, order)
        if nested is None:
            open_.pop()
            continue
        if len(open_) >= 2 * DEEPEST:
            raise ScanError("too_deep", f"sequences nested deeper than {DEEPEST} levels")
        end = None if nested == UNDEFINED else position + nested
        if end is not None and end > limit:
            raise past_end()
        open_.append((end, limit if end is None else end, explicit))
    return position


def skip_fragments(data: bytes, position: int, limit: int, order: Order = LITTLE) -> tuple[int, list[int]]:
    """Walk the fragments of encapsulated pixel data.

    Args:
        position: of the first item (the offset table).

    Returns:
        Position after the sequence delimiter, and the length of every item, the offset table first.

    Raises:
        ScanError: ``truncated``: a fragment runs past the end, or the delimiter is missing.
    """
    lengths: list[int] = []
    read = order.item.unpack_from
    while position + 8 <= limit:
        group, element, length = read(data, position)
        position += 8
        if group != _ITEMS or element not in (0xE000, 0xE0DD):
            raise ScanError("truncated", "encapsulated pixel data hold something that is not a fragment")
        if element == 0xE0DD:
            return position, lengths
        lengths.append(length)
        position += length
    raise ScanError("truncated", "encapsulated pixel data run past the end of the file")


def inflate(data: bytes) -> bytes:
    """Unpack a deflated data set (PS3.5 A.5) that may be a bomb.

    Raises:
        ScanError: ``too_large``, ``truncated`` or ``bad_header``.
    """
    limit = min(INFLATED_MOST, max(INFLATED_LEAST, INFLATED_RATIO * len(data)))
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unpacked = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ScanError("bad_header", "the deflated data set cannot be unpacked") from error
    if len(unpacked) > limit:
        raise ScanError("too_large", f"a deflated data set grows past {limit >> 20} MiB")
    if not stream.eof:
        raise ScanError("truncated", "the deflated data set is cut off")
    return unpacked


def past_end() -> ScanError:
    """Say that an element is longer than what holds it."""
    return ScanError("length_past_end", "an element declares more bytes than are left of its sequence or of the file")


def _remember(seen: dict[int, Run], first: int, run: bytes, found: Mapping[int, bytes]) -> None:
    """Keep a run of elements for the next file, and not too much of them."""
    if SHORTEST_RUN <= len(run) <= LONGEST_RUN:
        if len(seen) >= MOST_RUNS:
            seen.clear()
        seen[first] = run, found


def _too_many() -> ScanError:
    return ScanError("too_large", "a header of more elements than any real one")


_PIECE = 1 << 20


def _only_zeros(data: bytes, position: int) -> bool:
    if data[position : position + 8].strip(b"\0"):
        return False
    pieces = (data[start : start + _PIECE] for start in range(position, len(data), _PIECE))
    return all(piece == bytes(len(piece)) for piece in pieces)  # a comparison: counting takes minutes for a gigabyte


def has_vr(data: bytes, position: int) -> bool:
    """Tell explicit from implicit VR by an element's fifth and sixth byte, as pydicom does."""
    vr = data[position + 4 : position + 6]
    return len(vr) == 2 and 0x40 < vr[0] < 0x5B and 0x40 < vr[1] < 0x5B


def _is_item(data: bytes, position: int, length: int) -> bool:
    """Tell a sequence whose kind is not declared by its first item."""
    return length >= 8 and data[position : position + 4] == b"\xfe\xff\x00\xe0"


def read_head(data: bytes, position: int, explicit: bool, order: Order) -> tuple[int, int | None, int, int]:
    """Read the head of an element: its tag, VR, length and where its value starts; VR ``None`` is implicit."""
    if explicit:
        group, element, vr, length = order.head.unpack_from(data, position)
        if tag(group, element) not in MARKS:
            if vr in order.short:
                return tag(group, element), vr, length, position + 8
            if vr in order.long:
                (length,) = order.length.unpack_from(data, position + 8)
                return tag(group, element), vr, length, position + 12
            if b"AA" <= data[position + 4 : position + 6] <= b"ZZ":  # a VR of its own: pydicom reads 16 bits
                return tag(group, element), vr, length, position + 8
    group, element, length = order.item.unpack_from(data, position)
    return tag(group, element), None, length, position + 8


def _holds_items(data: bytes, start: int, vr: int | None, length: int, order: Order) -> bool:
    if length == UNDEFINED or vr == order.sequence:
        return True
    if vr is not None and vr != order.unknown:
        return False
    item = b"\xfe\xff\x00\xe0" if order.little else b"\xff\xfe\xe0\x00"
    return length >= 8 and data[start : start + 4] == item


def _skip(data: bytes, start: int, size: int, length: int, nested: bool, order: Order, explicit: bool = True) -> int:
    """Pass a sequence, or encapsulated bytes that are not the image's."""
    if nested:
        return skip_sequence(data, start, size, length, explicit, order)
    return skip_fragments(data, start, size, order)[0]


def _elements(
    data: bytes, position: int, end: int | None, limit: int, explicit: bool, order: Order
) -> tuple[int, int | None]:
    """Pass the elements of an item; give where its end or its next sequence is, and that sequence's length."""
    stop = limit if end is None else end
    plain, head, short = explicit and order.little, _EXPLICIT, _SHORT
    for _ in repeat(None, MOST_ELEMENTS):
        if position >= stop:
            break
        if plain:  # what nearly every element is, without a call
            key, vr, length = head(data, position)
            if vr in short and key & 0xFFFF != _ITEMS:
                position += 8 + length
                continue
        key, vr, length, start = read_head(data, position, explicit, order)
        if key in MARKS:
            if key == _ITEM_END and end is None:
                return position + 8, None
            raise ScanError("bad_header", "items and delimiters of a sequence do not match")
        if _holds_items(data, start, vr, length, order):
            # an icon's pixels are encapsulated too, and are not the image's
            if vr in (order.sequence, order.unknown) or (vr is None and key not in PIXELS):
                return start, length
            position, _ = skip_fragments(data, start, limit, order)
        else:
            position = start + length
    else:
        raise _too_many()
    if position > stop or end is None:
        raise past_end()
    return position, None
