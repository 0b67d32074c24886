"""The walk through the elements: where each lies, and that none lies about its length."""

from __future__ import annotations

import struct
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.errors import ScanError
from medtl.scans.elements import (
    BIG,
    DEEPEST,
    INFLATED_LEAST,
    LITTLE,
    PIXEL_DATA,
    UNDEFINED,
    Run,
    Unclear,
    inflate,
    skip_fragments,
    skip_sequence,
    tag,
    vr_number,
    walk,
    walk_explicit,
    walk_implicit,
)

ITEM_END, SEQUENCE_END = b"\xfe\xff\x0d\xe0" + bytes(4), b"\xfe\xff\xdd\xe0" + bytes(4)
PATIENT, ROWS = tag(0x0010, 0x0020), tag(0x0028, 0x0010)
WANTED = {PATIENT: vr_number("LO"), ROWS: vr_number("US")}


def short(group: int, element: int, vr: str, value: bytes) -> bytes:
    return struct.pack("<HH2sH", group, element, vr.encode(), len(value)) + value


def long(group: int, element: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HH2sHI", group, element, vr.encode(), 0, len(value) if length is None else length) + value


def item(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value) if length is None else length) + value


def implicit(group: int, element: int, value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HHI", group, element, len(value) if length is None else length) + value


def nested(levels: int, declared: bool) -> bytes:
    """Give sequences in sequences; the inside is built once, so that 200,000 levels are quick to write."""
    if declared:
        lengths = [20 * level for level in range(levels)]
        return b"".join(long(8, 0x1140, "SQ", b"", n + 8) + item(b"", n) for n in reversed(lengths))
    return (long(8, 0x1140, "SQ", b"", UNDEFINED) + item(b"", UNDEFINED)) * levels + (ITEM_END + SEQUENCE_END) * levels


def test_wanted_values_are_collected_up_to_the_pixels() -> None:
    head = short(0x10, 0x20, "LO", b"ID-1") + short(0x28, 0x10, "US", b"\x02\x01")
    data = head + long(0x7FE0, 0x10, "OW", bytes(8))
    found: dict[int, bytes] = {}
    assert walk_explicit(data, 0, len(data), WANTED, found) == len(head)
    assert found == {PATIENT: b"ID-1", ROWS: b"\x02\x01"}


def test_an_icon_in_a_sequence_is_not_the_image() -> None:
    for pixels in (long(0x7FE0, 0x10, "OB", item(b"") + item(b"1234") + SEQUENCE_END, UNDEFINED),
                   long(0x7FE0, 0x10, "OW", bytes(6))):  # fmt: skip
        inside = short(0x28, 0x10, "US", b"\x09\x00") + pixels
        for icon in (item(inside), item(inside + ITEM_END, UNDEFINED)):
            for sequence in (long(0x88, 0x200, "SQ", icon), long(0x88, 0x200, "SQ", icon + SEQUENCE_END, UNDEFINED)):
                data = sequence + long(0x7FE0, 0x10, "OW", bytes(8))
                found: dict[int, bytes] = {}
                assert walk_explicit(data, 0, len(data), WANTED, found) == len(sequence)
                assert found == {}


def test_implicit_sequences_are_passed_whether_their_length_is_declared_or_not() -> None:
    inside = implicit(0x28, 0x10, b"\x09\x00") + implicit(0x7FE0, 0x10, bytes(6))
    for sequence in (
        implicit(0x88, 0x200, item(inside)),
        implicit(0x88, 0x200, item(inside + ITEM_END, UNDEFINED) + SEQUENCE_END, UNDEFINED),
    ):
        data = sequence + implicit(0x7FE0, 0x10, bytes(8))
        found: dict[int, bytes] = {}
        assert walk_implicit(data, 0, len(data), WANTED, found) == len(sequence)
        assert found == {}


def test_unknown_sequences_may_hold_implicit_items() -> None:
    """PS3.5 6.2.2: UN of undefined length is implicit inside."""
    inside = item(implicit(0x28, 0x10, b"\x09\x00") + ITEM_END, UNDEFINED) + SEQUENCE_END
    data = long(0x29, 0x1010, "UN", inside, UNDEFINED) + short(0x28, 0x10, "US", b"\x02\x01")
    found: dict[int, bytes] = {}
    assert walk_explicit(data, 0, len(data), WANTED, found) == len(data)
    assert found == {ROWS: b"\x02\x01"}


def test_what_a_file_before_said_is_not_mixed_with_what_this_one_says() -> None:
    def file(rows: int, comments: int) -> bytes:
        comment = short(0x28, 0x4000, "LT", b"a comment that makes the run long enough to be kept")
        return comment * comments + short(0x28, 0x10, "US", bytes((rows, 0))) + comment * (30 - comments)

    seen: dict[int, Run] = {}
    for rows, comments in ((1, 3), (1, 3), (2, 3), (2, 20), (1, 11), (1, 12), (3, 13), (1, 3)):
        data = file(rows, comments)
        for _ in range(2):
            found: dict[int, bytes] = {}
            end = walk_explicit(data + long(0x7FE0, 0x10, "OW", b""), 0, len(data) + 12, WANTED, found, seen)
            assert (end, found) == (len(data), {ROWS: bytes((rows, 0))})
    assert seen


@pytest.mark.parametrize(
    "data",
    [
        short(0x10, 0x20, "LO", b"ID-1")[:-1],
        long(0x09, 0x1010, "OB", b"abc", 4),
        long(0x09, 0x1010, "OB", b"abc", 0xFFFFFFFE),
        long(8, 0x1140, "SQ", item(b"", 0), 12) + bytes(2),
        long(8, 0x1140, "SQ", item(short(8, 0x1155, "UI", b"1.2"), 9)) + bytes(20),
        long(8, 0x1140, "SQ", item(short(8, 0x1155, "UI", b"1.2")[:-1])) + bytes(20),
        long(8, 0x1140, "SQ", item(b"", 8)) + short(0x10, 0x20, "LO", b"ID-1"),
    ],
)
def test_a_length_past_the_end_of_file_sequence_or_item_is_refused(data: bytes) -> None:
    with pytest.raises(ScanError) as caught:
        walk_explicit(data, 0, len(data), WANTED, {})
    assert caught.value.code == "length_past_end"


@pytest.mark.parametrize("declared", [True, False])
def test_deep_nesting_is_refused_at_once_and_normal_nesting_is_not(declared: bool) -> None:
    fine = nested(DEEPEST, declared)
    assert walk_explicit(fine, 0, len(fine), {}, {}) == len(fine)
    for levels in (DEEPEST + 1, 300, 200_000):
        data = nested(levels, declared)
        started = time.perf_counter()
        with pytest.raises(ScanError) as caught:
            walk_explicit(data, 0, len(data), {}, {})
        assert caught.value.code == "too_deep"
        assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "data",
    [
        short(0x28, 0x10, "IS", b"12"),  # a number where two bytes belong
        short(0x09, 0x1010, "ZZ", b"ab"),
        implicit(0x28, 0x10, b"\x02\x01"),
        ITEM_END,
    ],
)
def test_what_is_not_plain_is_left_to_others(data: bytes) -> None:
    with pytest.raises(Unclear):
        walk_explicit(data, 0, len(data), WANTED, {})


def test_the_general_walk_understands_odd_elements_and_padding() -> None:
    odd = short(0x09, 0x1010, "ZZ", b"ab") + implicit(0x28, 0x11, b"\x02\x01") + short(0x28, 0x10, "US", b"\x02\x01")
    found: dict[int, bytes] = {}
    assert walk(odd + bytes(100), 0, len(odd) + 100, True, LITTLE, found) == len(odd) + 100
    assert found[ROWS] == found[tag(0x28, 0x11)] == b"\x02\x01"


def test_the_general_walk_reads_big_endian() -> None:
    data = struct.pack(">HH2sH", 0x28, 0x10, b"US", 2) + b"\x01\x02"
    sequence = struct.pack(">HH2sHI", 8, 0x1140, b"SQ", 0, UNDEFINED) + struct.pack(">HHI", 0xFFFE, 0xE0DD, 0)
    found: dict[int, bytes] = {}
    assert walk(data + sequence, 0, len(data + sequence), True, BIG, found) == len(data + sequence)
    assert found[ROWS] == b"\x01\x02"


def test_an_item_outside_of_a_sequence_is_refused() -> None:
    """pydicom stops there without a word, and the rest of the header is gone."""
    data = ITEM_END + short(0x28, 0x10, "US", b"\x02\x01")
    with pytest.raises(ScanError, match="outside"):
        walk(data, 0, len(data), True, LITTLE, {})


def test_fragments_are_counted_and_must_end() -> None:
    fragments = item(b"") + item(b"12") + item(SEQUENCE_END)  # a delimiter inside of a fragment is none
    data = fragments + SEQUENCE_END
    assert skip_fragments(data, 0, len(data)) == (len(data), [0, 2, 8])
    for broken in (fragments, data[:-1], item(b"12", 99) + SEQUENCE_END, item(b"12") + b"\xff" * 16, b""):
        with pytest.raises(ScanError) as caught:
            skip_fragments(broken, 0, len(broken))
        assert caught.value.code == "truncated"


def test_a_deflated_bomb_is_refused_and_a_cut_off_stream_too() -> None:
    def deflate(data: bytes) -> bytes:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(data) + packer.flush()

    assert inflate(deflate(b"abc" * 999)) == b"abc" * 999
    for packed, code in (
        (deflate(bytes(INFLATED_LEAST + 1)), "too_large"),
        (deflate(b"abc" * 999)[:-4], "truncated"),
        (b"\xff" * 50, "bad_header"),
    ):
        with pytest.raises(ScanError) as caught:
            inflate(packed)
        assert caught.value.code == code


@settings(derandomize=True, max_examples=300, deadline=1000)
@given(st.binary(max_size=300), st.booleans(), st.sampled_from([LITTLE, BIG]))
def test_no_bytes_whatever_break_the_walk(data: bytes, explicit: bool, order: object) -> None:
    for sequence in (data, item(b"", UNDEFINED) + data):
        try:
            end = skip_sequence(sequence, 0, len(sequence), UNDEFINED, explicit, order)  # type: ignore[arg-type]
        except (ScanError, struct.error):
            continue
        assert end <= len(sequence)


@settings(derandomize=True, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 0x7FDF), st.binary(max_size=40)), max_size=20))
def test_every_well_formed_data_set_is_walked_to_its_end(values: list[tuple[int, bytes]]) -> None:
    explicit = b"".join(short(group, 0x10, "LO", value) for group, value in values)
    assert walk_explicit(explicit, 0, len(explicit), {}, {}) == len(explicit)
    found: dict[int, bytes] = {}
    assert walk(explicit, 0, len(explicit), True, LITTLE, found) == len(explicit)
    assert found == {tag(group, 0x10): value for group, value in values}


def test_the_pixel_tag_is_where_the_walk_stops_in_every_encoding() -> None:
    data = implicit(0x7FE0, 0x10, bytes(8))
    assert walk_implicit(data, 0, len(data), {}, {}) == 0
    assert walk(data, 0, len(data), False, LITTLE, {}) == 0
    assert tag(0x7FE0, 0x10) == PIXEL_DATA
