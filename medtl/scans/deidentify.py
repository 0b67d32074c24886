"""Take a patient's identity out of a DICOM or NIfTI file. Pure: bytes in, bytes out; no file is opened here.

One walk over the header. What stays is copied in runs, what does not is written anew, and pixels are only named as a
range of the input, so that the caller can let the kernel copy them. Every nested item is walked, also behind the
pixels; preamble, group lengths, private elements, overlays, curves and file meta information never pass. What is not
understood completely is refused with a reason, never passed on. Text burned into pixels is out of reach.

Source: DICOM PS3.15 Annex E (what: see ``profile``), PS3.5 7 (encoding), PS3.10 7.1 (file meta information).
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple, Protocol

import numpy as np

from medtl.errors import ScanError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.checks import check_burned_in
from medtl.scans.geometry import Finding
from medtl.scans.headers import OLDEST_YEARS, Header, age_in_years
from medtl.scans.profile import (
    CHARSET,
    DEIDENTIFICATION_CODES,
    IDENTITY_REMOVED,
    ISSUER,
    LONG,
    METHOD_TEXT,
    PATIENT_ID,
    SAFE_CREATORS,
    SAFE_PRIVATE,
    SAFE_VRS,
    SOP_CLASS,
    SOP_INSTANCE,
    STUDY_INSTANCE,
    TEXT,
    TIME_MODIFIED,
    Action,
    Profile,
    Rules,
    profile,
)

Piece = bytes | tuple[int, int]


class Readable(Protocol):
    """Bytes, a memoryview or an mmap: what has a length and gives slices."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


@dataclass(frozen=True, slots=True)
class Deidentified:
    """The new file in pieces: bytes, or (start, length) of the input, in order.

    ``pairs`` are (kind, raw, pseudonym) of every patient and identifier that was replaced, for a key table where the
    user wants one; they are the only place that holds raw identifiers.
    """

    pieces: tuple[Piece, ...]
    pairs: tuple[tuple[str, str, str], ...] = field(repr=False)
    instance: str | None  # new SOP Instance UID
    patient: str | None  # pseudonym
    picture: Picture | None = None  # None: the file holds no pixels


class Picture(NamedTuple):
    """What a header says of its picture: enough to tell the risk that text is burned into it."""

    sop_class: str
    modality: str
    image_type: tuple[str, ...]
    burned_in: str


@lru_cache(maxsize=256)
def burned_in_risk(picture: Picture) -> tuple[Finding, ...]:
    """Find the risk that a patient's name is part of the picture, as intake does."""
    header = Header(
        file_size=0,
        transfer_syntax="",
        sop_class=picture.sop_class,
        sop_instance=None,
        series=None,
        study=None,
        patient=None,
        issuer=None,
        frame_of_reference=None,
        modality=picture.modality,
        image_type=picture.image_type,
        instance_number=None,
        rows=0,
        columns=0,
        frames=0,
        samples=0,
        planar=0,
        bits_allocated=0,
        bits_stored=0,
        high_bit=0,
        signed=False,
        photometric="",
        planes=(),
        pixel_offset=None,
        pixel_length=None,
        burned_in=picture.burned_in,
    )
    return check_burned_in(header)


IMPLEMENTATION_UID = "2.25.226337519340617412396157871098123561877"
IMPLEMENTATION_NAME = "MEDTL"
METHOD = "medtl: DICOM PS3.15 Annex E, Basic Profile"

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.8.1")
MAX_INFLATED = 1 << 30  # bytes of a deflated data set; more is a bomb
MAX_DEPTH = 48  # sequences inside sequences
FIRST_YEAR = 1800  # an earlier one is no date of an examination
MAX_SHORT = 0xFFFE  # bytes of a value whose length has 16 bits
MAX_KINDS = 1 << 16  # remembered decisions; hostile files cannot grow the memory
MAX_PEOPLE, MAX_VALUES, MAX_SEQUENCES = 8, 1 << 12, 1 << 8  # remembered: patients, and of each of them
MAX_VALUE, MAX_SEQUENCE = 1 << 10, 1 << 12  # bytes of what is remembered
HEADS = (1 << 15, 1 << 20, 1 << 24)  # how much is read before all of it is

_OPEN = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"
_ITEM_HEAD, _ITEM_TAIL, _SEQUENCE_TAIL = _ITEM + b"\xff" * 4, _ITEM_END + b"\0" * 4, _SEQUENCE_END + b"\0" * 4
_DELIMITER = 63  # in a table of decisions: the end of an item
_TAG = struct.Struct("<HH")
_U32 = struct.Struct("<I")
_HEAD = struct.Struct("<4sI")
_IMAGE_TYPE, _MODALITY, _BURNED_IN = 0x00080008, 0x00080060, 0x00280301
_NOTED = frozenset({CHARSET, SOP_CLASS, SOP_INSTANCE, STUDY_INSTANCE, PATIENT_ID, ISSUER})
_NOTED |= {_IMAGE_TYPE, _MODALITY, _BURNED_IN}
# Plain numbers for the innermost loop, where looking up a member of an enumeration would double the time.
_KEEP, _PHASES = int(Action.KEEP), 7
_DROP, _DUMMY = int(Action.DROP), int(Action.DUMMY)
_CHECK, _PIXELS, _UID = int(Action.CHECK), int(Action.PIXELS), int(Action.UID)
_LONG = frozenset(vr.encode("ascii") for vr in LONG)
_NESTING = frozenset({int(Action.WALK), int(Action.SCRUB)})

_FORMS = {
    "AS": re.compile(rb"\d{3}[DWMY] ?"),
    "CS": re.compile(rb"[A-Za-z0-9_ .:\\-]*"),
    "DA": re.compile(rb"(\d{4}\.?\d\d\.?\d\d ?(\\|$))*"),
    "DS": re.compile(rb"[0-9+eE. \\-]*"),
    "DT": re.compile(rb"([0-9.]{4,21}([+-]\d{4})? ?(\\|$))*"),
    "IS": re.compile(rb"[0-9+ \\-]*"),
    "TM": re.compile(rb"[0-9.: \\]*"),
    "UI": re.compile(rb"[0-9.\\]*\0?"),
}
_DATE = re.compile(rb"(\d{4})\.?(\d\d)\.?(\d\d)((?:\d\d){0,3}(?:\.\d{1,6})?(?:[+-]\d{4})?)")
_WORD = re.compile(rb"[A-Za-z0-9.+/-]+")
_PLAIN = re.compile(rb"[ -\[\]-~]*")  # ASCII without backslash and control codes: the same text in every character set

_TEXT_DUMMY = b"REMOVED "
_DUMMIES = {
    "AS": b"000Y",
    "DA": b"19000101",
    "DT": b"19000101000000",
    "TM": b"000000",
    "DS": b"1 ",
    "IS": b"1 ",
    "UR": b"urn:removed ",
    "AT": b"\0" * 4,
    "FL": b"\0" * 4,
    "SL": b"\0" * 4,
    "UL": b"\0" * 4,
    "OF": b"\0" * 4,
    "OL": b"\0" * 4,
    "FD": b"\0" * 8,
    "SV": b"\0" * 8,
    "UV": b"\0" * 8,
    "OD": b"\0" * 8,
    "OV": b"\0" * 8,
    "SS": b"\0" * 2,
    "US": b"\0" * 2,
    "OB": b"\0" * 2,
    "OW": b"\0" * 2,
}


def deidentified(data: Readable, names: Pseudonymiser, rules: Rules | None = None) -> Deidentified:
    """De-identify one DICOM file.

    The output has the input's transfer syntax; deflated and big-endian files become Explicit VR Little Endian.

    Args:
        data: the whole file; an mmap is read only where it has to be.
        names: the key of pseudonyms, UIDs and date shifts.
        rules: the options taken.

    Raises:
        ScanError: ``bad_header``, ``truncated``, ``too_deep``, ``too_large``, ``dicomdir`` or ``embedded_overlay``:
            the file is not understood completely, so that nothing of it may pass.
    """
    rules = rules or Rules()
    head = bytes(data[: HEADS[0]])
    syntax, meta, start = _read_meta(head)
    if syntax != BIG_ENDIAN and syntax not in DEFLATED:
        return _deidentify(data, head, start, syntax, meta, names, rules)
    rest = bytes(data[start:])
    plain = _Swap(rest).dataset() if syntax == BIG_ENDIAN else _inflate(rest)
    return _in_memory(_deidentify(plain, plain, 0, EXPLICIT, meta, names, rules), plain)


def _deidentify(
    data: Readable, head: bytes, start: int, syntax: str, meta: dict[int, bytes], names: Pseudonymiser, rules: Rules
) -> Deidentified:
    memory = _memory(names, rules, syntax == IMPLICIT)
    for size in (*HEADS[1:], len(data)):
        whole = len(head) >= len(data)
        walk = _Walk(data, profile(rules), names, memory, memory.last)
        try:
            walk.dataset(head, start)
        except (ScanError, struct.error, IndexError) as error:
            if whole and isinstance(error, ScanError):
                raise
            if whole:
                raise _truncated() from error
        else:
            if whole or walk.pixels is not None:
                person = walk.who(meta)
                if person is not memory.last:  # another patient than the file before had: with their names and dates
                    walk = _Walk(data, profile(rules), names, memory, person)
                    walk.dataset(head, start)
                    memory.last = person
                return walk.finish(syntax, meta)
        head = bytes(data[:size])  # the header is longer than what was read of it
    raise _truncated()


def _in_memory(result: Deidentified, data: Readable) -> Deidentified:
    pieces = tuple(p if isinstance(p, bytes) else bytes(data[p[0] : p[0] + p[1]]) for p in result.pieces)
    return replace(result, pieces=(b"".join(pieces),))


def _truncated() -> ScanError:
    return ScanError("truncated", "an element's declared length goes past the end of what holds it")


def _malformed(what: str) -> ScanError:
    return ScanError("bad_header", f"not de-identified, because not understood: {what}")


def _read_meta(head: bytes) -> tuple[str, dict[int, bytes], int]:
    """Give transfer syntax, elements of group 0002 and where the data set begins."""
    if head[128:132] != b"DICM":
        raise _malformed("no DICOM prefix after the preamble")
    pos, meta = 132, {}
    while head[pos : pos + 2] == b"\x02\x00" and pos + 8 <= len(head):
        wide = head[pos + 4 : pos + 6] in _LONG
        if pos + 12 > len(head):
            raise _truncated()
        length = _U32.unpack_from(head, pos + 8)[0] if wide else head[pos + 6] | head[pos + 7] << 8
        value = pos + (12 if wide else 8)
        if value + length > len(head):
            raise _truncated()
        meta[head[pos + 2] | head[pos + 3] << 8] = head[value : value + length]
        pos = value + length
    syntax = meta.get(0x0010, b"").rstrip(b"\0 ").decode("latin-1")
    if not syntax.startswith(IMPLICIT):
        raise _malformed("no transfer syntax, or one that is not DICOM's own")
    return syntax, meta, pos


def _inflate(data: bytes) -> bytes:
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = engine.decompress(data, MAX_INFLATED)
    except zlib.error as error:
        raise _malformed("a deflated data set that does not inflate") from error
    if engine.unconsumed_tail:
        raise ScanError("too_large", f"a deflated data set of more than {MAX_INFLATED} bytes")
    if not engine.eof:
        raise _truncated()
    return plain


class _Level(NamedTuple):
    """Where in the tree of items the walk is."""

    depth: int
    implicit: bool
    emit: bool = True
    scrub: bool = False
    open_ended: bool = False  # ends at a delimiter, not at a length


class _Decision(NamedTuple):
    """What is done with every element that begins with the same bytes, and what of it can be known beforehand."""

    action: int
    tag: int
    wide: bool  # its length has 32 bits
    vr: str
    noted: bool = False
    fixed: bytes = b""  # the new element, where it does not depend on the value
    empty: bytes = b""  # the new element, where there was no value
    form: re.Pattern[bytes] | None = None
    short: bool = False  # the new element's length has 16 bits


class _Table:
    """What is known of elements by their first bytes, for one encoding.

    ``decisions``: by tag and, if explicit, VR. ``steps``: by the first eight bytes, in which the length stands too: how
    far to go over what is kept whatever its value, or minus that over what is dropped (see ``_phase``).
    """

    def __init__(self, implicit: bool) -> None:
        self.decisions: dict[bytes, _Decision] = {}
        self.steps: tuple[dict[bytes, int], ...] = tuple({} for _ in range(_PHASES))
        delimiter = _ITEM_END if implicit else _ITEM_END + b"\0\0"
        self.decisions[delimiter] = _Decision(_DELIMITER, 0xFFFEE00D, implicit, "")


_Pairs = list[tuple[str, str, str]]


class _Known(NamedTuple):
    """What came of an element with this very value."""

    new: bytes | None  # None: it stays
    pairs: _Pairs
    noted: int  # its tag, where its value is needed; otherwise 0


class _Person:
    """A patient, as far as one file names them, and what was worked out for them: the values of a series repeat.

    ``known`` is by whole elements (see ``_phase``), ``sequences`` by whole sequences at the top.
    """

    def __init__(self, whole: str | None, name: str | None, days: int) -> None:
        self.whole, self.name, self.days = whole, name, days
        self.known: tuple[dict[bytes, _Known], ...] = tuple({} for _ in range(_PHASES))
        self.sequences: dict[bytes, tuple[bytes, _Pairs]] = {}


class _Memory:
    """What was worked out for one key and one set of rules.

    It holds raw values, as the files do, and is never written down. What is full is emptied: files cannot grow it.
    """

    def __init__(self, rules: Rules, implicit: bool) -> None:
        self.implicit = implicit
        # explicit, implicit, and the two inside what is scrubbed
        self.tables = (_Table(False), _Table(True), _Table(False), _Table(True))
        self.marks = _marks(rules, implicit)
        self.people: dict[tuple[bytes | None, ...], _Person] = {}
        self.last = _Person(None, None, 1)


@lru_cache(maxsize=8)
def _memory(names: Pseudonymiser, rules: Rules, implicit: bool) -> _Memory:
    return _Memory(rules, implicit)


def _keep(memory: dict[Any, Any], key: object, value: object, most: int) -> None:
    if len(memory) >= most:
        memory.clear()
    memory[key] = value


class _Walk:
    """One pass over one data set."""

    def __init__(self, data: Readable, rules: Profile, names: Pseudonymiser, memory: _Memory, person: _Person) -> None:
        self.data, self.profile, self.names, self.memory, self.person = data, rules, names, memory, person
        self.top = _Level(0, memory.implicit)
        self.out: list[bytes] = []
        self.noted: dict[int, bytes] = {}
        self.pairs: _Pairs = []
        self.uids: dict[bytes, bytes] = {}  # new ones by the old ones
        self.pixels: tuple[int, int, int] | None = None  # place in the output, start and length in the input
        self.marks = list(memory.marks)

    def dataset(self, head: bytes, start: int) -> None:
        """Walk the data set that begins at ``start``; ``head`` is the beginning of the file."""
        pos = self._elements(head, start, len(head), self.top)
        if pos < len(head):  # stopped at the pixels
            stop = self._pixels_end(head, pos)
            self.pixels = (len(self.out), pos, stop - pos)
            tail = bytes(self.data[stop:]) if stop < len(self.data) else b""
            if tail.strip(b"\0") and self._elements(tail, 0, len(tail), self.top) < len(tail):
                raise _malformed("two elements of pixel data")
        self.out += [mark for _, mark in reversed(self.marks)]

    def _pixels_end(self, head: bytes, pos: int) -> int:
        short = self.top.implicit
        length = _U32.unpack_from(head, pos + (4 if short else 8))[0]
        value = pos + (8 if short else 12)
        if length == _OPEN and not short:
            return _fragments_end(self.data, value, len(self.data))
        if value + length > len(self.data):
            raise _truncated()
        return value + int(length)

    def finish(self, syntax: str, meta: dict[int, bytes]) -> Deidentified:
        """Write the file meta information, and join the output."""
        noted, person = self.noted, self.person
        instance = noted.get(SOP_INSTANCE) or meta.get(0x0003, b"")
        kind = noted.get(SOP_CLASS) or meta.get(0x0002, b"")
        if person.whole and person.name:
            self.pairs.append(("patient", person.whole, person.name))
        if not self.profile.rules.retain_uids or _FORMS["UI"].fullmatch(instance) is None:
            instance = self._new_uids(instance)
        head = _meta(kind if _FORMS["UI"].fullmatch(kind) else b"", instance, syntax)
        new_instance = instance.strip(b"\0 ").decode("ascii") or None
        return Deidentified(self._pieces(head), tuple(self.pairs), new_instance, person.name, self._picture(kind))

    def _picture(self, kind: bytes) -> Picture | None:
        if self.pixels is None:
            return None
        return _picture(kind, *(self.noted.get(tag, b"") for tag in (_MODALITY, _IMAGE_TYPE, _BURNED_IN)))

    def _pieces(self, head: bytes) -> tuple[Piece, ...]:
        """Join the output around the pixels."""
        if self.pixels is None:
            return (b"".join([head, *self.out]),)
        place, start, length = self.pixels
        before, after = b"".join([head, *self.out[:place]]), b"".join(self.out[place:])
        return (before, (start, length), after) if after else (before, (start, length))

    def _elements(self, head: bytes, pos: int, end: int, level: _Level) -> int:
        """Walk elements up to ``end``, or to the delimiter of an open-ended item; give the place after them.

        At the top the walk stops before pixel data.
        """
        depth, implicit, emit, scrub, open_ended = level
        out, noted, unpack = self.out, self.noted, _U32.unpack_from
        table, phase = self.memory.tables[2 * scrub + implicit], self._phase(level)
        jump, known = table.steps[phase].get, self.person.known[phase].get
        width = 4 if implicit else 6
        blocks: dict[int, str] = {}
        run = pos
        while pos < end:
            step = jump(head[pos : pos + 8])
            if step is not None:
                if step > 0:
                    pos += step
                    continue
                if run < pos and emit:
                    out.append(head[run:pos])
                run = pos = pos - step
                continue
            # 0 where the length has 32 bits and follows: such an element is never known
            length = unpack(head, pos + 4)[0] if implicit else head[pos + 6] | head[pos + 7] << 8
            seen = known(head[pos : pos + 8 + length]) if emit and length <= MAX_VALUE else None
            if seen is not None:
                new, pairs, tag = seen
                if tag:
                    noted[tag] = head[pos + 8 : pos + 8 + length]
                if new is not None:
                    if run < pos:
                        out.append(head[run:pos])
                    out.append(new)
                    self.pairs += pairs
                    run = pos + 8 + length
                pos += 8 + length
                continue
            decision = table.decisions.get(head[pos : pos + width]) or self._decide(head[pos : pos + width], level)
            if depth == 0 and self.marks and decision.tag >= self.marks[-1][0]:
                run, phase = self._insert_marks(head, run, pos, decision.tag)
                jump, known = table.steps[phase].get, self.person.known[phase].get
            stop = self._stays(decision, head, pos, end, level)
            if stop:
                pos = stop
                continue
            if run < pos and emit:
                out.append(head[run:pos])
            if decision.action == _DELIMITER and open_ended:
                return pos + 8
            if decision.action == _PIXELS and depth == 0:
                return pos
            pos = run = self._act(decision, head, pos, end, level, blocks)
        if open_ended or pos > end:
            raise _truncated()
        if run < pos and emit:
            out.append(head[run:pos])
        return end

    def _phase(self, level: _Level) -> int:
        """Give under what a step or a value is remembered, so that none is taken where it would not be the same.

        At the top: how many marks are still to be written, for no element before which one belongs may be stepped over.
        Inside: whether all of it is scrubbed.
        """
        return 5 + level.scrub if level.depth else len(self.marks)

    def _stays(self, decision: _Decision, head: bytes, pos: int, end: int, level: _Level) -> int:
        """Give the place after an element that stays as it is, and 0 for every other."""
        if decision.action not in (_KEEP, _CHECK):
            return 0
        value, length = _extent(decision, head, pos, level.implicit)
        stop, phase, short = value + length, self._phase(level), value == pos + 8
        noted = decision.tag if decision.noted and level.depth == 0 else 0
        if decision.action == _KEEP and not decision.noted:
            if short:
                _keep(
                    self.memory.tables[2 * level.scrub + level.implicit].steps[phase],
                    head[pos:value],
                    8 + length,
                    MAX_KINDS,
                )
            return stop
        if stop > end or (decision.form is not None and decision.form.fullmatch(head, value, stop) is None):
            return stop if decision.action == _KEEP else 0
        if noted:
            self.noted[noted] = head[value:stop]
        if short and length <= MAX_VALUE and level.emit:
            _keep(self.person.known[phase], head[pos:stop], _Known(None, [], noted), MAX_VALUES)
        return stop

    def _decide(self, key: bytes, level: _Level) -> _Decision:
        if len(key) < (4 if level.implicit else 6):
            raise _truncated()
        written = "UN" if level.implicit else key[4:6].decode("latin-1")
        tag, rules = _tag(key), self.profile
        own = rules.vr(tag) if written == "UN" else written
        vr = own if level.implicit or own != "SQ" else written  # a known element that was written as UN: its own
        action = rules.action(tag, own if level.implicit else written, level.scrub)
        if action == Action.REFUSE:
            if tag >> 16 == 0x0004:
                raise ScanError("dicomdir", "a directory of a medium holds no image; its files are read by themselves")
            raise _malformed("an element without a value representation, or a stray delimiter")
        wide = level.implicit or written in LONG
        empty = fixed = b""
        if action not in (Action.KEEP, Action.DROP):
            empty = fixed = _encoded(key[:4], vr, b"", level.implicit)
        if action == Action.DUMMY:
            fixed = _encoded(key[:4], vr, _DUMMIES.get(vr, _TEXT_DUMMY), level.implicit)
        short = not level.implicit and vr not in LONG
        made = _Decision(int(action), tag, wide, vr, tag in _NOTED, fixed, empty, _FORMS.get(vr), short)
        table = self.memory.tables[2 * level.scrub + level.implicit]
        if len(table.decisions) < MAX_KINDS:
            table.decisions[key] = made
        return made

    def _insert_marks(self, head: bytes, run: int, pos: int, tag: int) -> tuple[int, int]:
        """Write the marks that come before ``tag``; give where the run of kept bytes now begins, and the new phase."""
        if run < pos:
            self.out.append(head[run:pos])
        while self.marks and self.marks[-1][0] <= tag:
            self.out.append(self.marks.pop()[1])
        return pos, len(self.marks)

    def _act(self, decision: _Decision, head: bytes, pos: int, end: int, level: _Level, blocks: dict[int, str]) -> int:
        """Do what was decided with one element that does not stay as it is; give the place after it."""
        action, emit = decision.action, level.emit
        if action == _DELIMITER:
            raise _malformed("the end of an item where no item is open")
        value, length = _extent(decision, head, pos, level.implicit)
        stop, short = value + length, value == pos + 8
        if decision.vr == "SQ" and action in _NESTING:
            if level.depth == 0:
                return self._repeated(decision, head, pos, value, length, end)
            if length != _OPEN and stop <= end:
                return self._sequence(decision, head, value, stop, level, open_ended=False) if emit else stop
        if length == _OPEN:
            return self._open(decision, head, value, end, level)
        if stop > end:
            raise _truncated()
        if action == _DROP:
            if short:
                steps = self.memory.tables[2 * level.scrub + level.implicit].steps[self._phase(level)]
                _keep(steps, head[pos:value], pos - stop, MAX_KINDS)
            return stop
        raw = head[value:stop]
        noted = decision.tag if decision.noted and level.depth == 0 else 0
        if noted:
            self.noted[noted] = raw
        if action == Action.OVERLAY_BIT and raw.strip(b"\0"):
            raise ScanError("embedded_overlay", "an overlay lies in the upper bits of the pixels, out of reach here")
        if not emit or action in (Action.OVERLAY_BIT, Action.PIXELS):
            return stop  # also pixels of an icon inside an item
        if action == Action.PRIVATE:
            self._private(decision, raw, level, blocks)
            return stop
        before = len(self.pairs)
        new = b"" if action == Action.NOTE else self._rewritten(decision, raw, level.depth)
        self.out.append(new)
        if short and length <= MAX_VALUE:
            known = self.person.known[self._phase(level)]
            _keep(known, head[pos:stop], _Known(new, self.pairs[before:], noted), MAX_VALUES)
        return stop

    def _repeated(self, decision: _Decision, head: bytes, pos: int, value: int, length: int, end: int) -> int:
        """Walk a sequence at the top, or take what came of the same bytes before; give the place after it."""
        stop = value + length
        if length == _OPEN:  # where no other one lies inside, the first end is its own
            stop = head.find(_SEQUENCE_TAIL, value, value + MAX_SEQUENCE) + 8
        known = self.person.sequences.get(head[pos:stop]) if stop <= end else None
        if known is not None:
            self.out.append(known[0])
            self.pairs += known[1]
            return stop
        out, pairs = len(self.out), len(self.pairs)
        if length == _OPEN:
            last = self._sequence(decision, head, value, end, self.top, open_ended=True)
        elif stop > end:
            raise _truncated()
        else:
            last = self._sequence(decision, head, value, stop, self.top, open_ended=False)
        if last == stop and last - pos <= MAX_SEQUENCE:
            new = b"".join(self.out[out:])
            _keep(self.person.sequences, head[pos:stop], (new, self.pairs[pairs:]), MAX_SEQUENCES)
        return last

    def _open(self, decision: _Decision, head: bytes, value: int, end: int, level: _Level) -> int:
        """Walk an element of undefined length, to copy, empty or skip it; give the place after it."""
        action, vr = decision.action, decision.vr
        if action in (Action.WALK, Action.SCRUB) and vr == "SQ":
            return self._sequence(decision, head, value, end, level, open_ended=True)
        if action in (Action.DROP, Action.EMPTY, Action.PRIVATE) and vr in ("SQ", "UN"):
            implicit = level.implicit or vr == "UN"  # PS3.5 6.2.2, CP-246
            stop = self._items(head, value, end, _Level(level.depth + 1, implicit, emit=False), open_ended=True)
            if action == Action.EMPTY and level.emit:
                self.out.append(decision.empty)
            return stop
        if action in (Action.PIXELS, Action.DROP) and not level.implicit and vr in ("OB", "OW"):
            return _fragments_end(head, value, end)
        raise _malformed("an undefined length where the value representation has none")

    def _sequence(self, decision: _Decision, head: bytes, value: int, end: int, level: _Level, open_ended: bool) -> int:
        if value == end and not open_ended:
            self.out.append(decision.empty)
            return end
        scrub = level.scrub or decision.action == Action.SCRUB
        if level.emit:
            self.out.append(decision.empty[: 4 if level.implicit else 8] + b"\xff" * 4)
        inner = _Level(level.depth + 1, level.implicit, level.emit, scrub)
        stop = self._items(head, value, end, inner, open_ended)
        if level.emit:
            self.out.append(_SEQUENCE_TAIL)
        return stop

    def _items(self, head: bytes, pos: int, end: int, level: _Level, open_ended: bool) -> int:
        if level.depth > MAX_DEPTH:
            raise ScanError("too_deep", f"sequences nested more than {MAX_DEPTH} deep")
        opened = level._replace(open_ended=True)
        while open_ended or pos < end:
            tag, length = _HEAD.unpack_from(head, pos)
            pos += 8
            if pos > end:
                raise _truncated()
            if tag == _SEQUENCE_END and open_ended:
                return pos
            if tag != _ITEM:
                raise _malformed("something other than items in a sequence")
            if level.emit:
                self.out.append(_ITEM_HEAD)
            if length == _OPEN:
                pos = self._elements(head, pos, end, opened)
            elif pos + length > end:
                raise _truncated()
            else:
                pos = self._elements(head, pos, pos + length, level)
            if level.emit:
                self.out.append(_ITEM_TAIL)
        return pos

    def _private(self, decision: _Decision, raw: bytes, level: _Level, blocks: dict[int, str]) -> None:
        """Keep a private element that the standard lists as safe, and the creator it belongs to."""
        group, number, vr = decision.tag >> 16, decision.tag & 0xFFFF, decision.vr
        keep = False
        if 0x10 <= number <= 0xFF:
            creator = raw.strip(b" \0").decode("latin-1")
            keep = (creator, group) in SAFE_CREATORS and vr in ("LO", "UN")
            if keep:
                blocks[group << 8 | number] = creator
        elif (blocks.get(group << 8 | number >> 8), group, number & 0xFF) in SAFE_PRIVATE:
            form = _FORMS.get(vr, _FORMS["DS"] if level.implicit else None)
            keep = (level.implicit or vr in SAFE_VRS) and (form is None or form.fullmatch(raw) is not None)
        if keep:
            self.out.append(_encoded(_key(decision.tag), vr, raw, level.implicit))

    def _rewritten(self, decision: _Decision, raw: bytes, depth: int) -> bytes:
        """Give one element anew."""
        action, person, new = decision.action, self.person, None
        if action <= _DUMMY:  # the same whatever the value, but for an empty one
            return decision.fixed if raw.strip(b" \0") else decision.empty
        if action == _UID:
            new = self._new_uids(raw) if decision.vr == "UI" else None
        elif action == Action.DATE:
            new = _shifted(raw, person.days, decision.vr)
        elif action == Action.NAME:
            new = b"" if depth else (person.name or "").encode("ascii")
        elif action == Action.PATIENT:
            new = (self._person(self._text(PATIENT_ID, raw)) if depth else person.name or "").encode("ascii")
        elif action == Action.AGE:
            new = _age(raw) if decision.vr == "AS" else None
        elif action == Action.CLEAN:
            kept = [word for word in _WORD.findall(raw) if word.decode("ascii").lower() in self.profile.words]
            new = b" ".join(kept) or None
        return self._written(decision, raw, new)

    def _written(self, decision: _Decision, raw: bytes, new: bytes | None) -> bytes:
        """Encode a new value; where there is none, what the table says without options."""
        if new is None:
            action = self.profile.base(decision.tag, decision.vr)
            if action == Action.DROP:
                return b""
            if action == Action.EMPTY or not raw.strip(b" \0"):
                return decision.empty
            new = _DUMMIES.get(decision.vr, _TEXT_DUMMY)
        if len(new) % 2:
            new += b"\0" if decision.vr == "UI" else b" "
        if not decision.short:
            return decision.empty[:-4] + _U32.pack(len(new)) + new
        if len(new) > MAX_SHORT:
            raise ScanError("too_large", "a list of identifiers that is too long for its element once it is mapped")
        return decision.empty[:6] + len(new).to_bytes(2, "little") + new

    def who(self, meta: dict[int, bytes]) -> _Person:
        """Give the patient whom the walked file names; dates of nobody known are moved by study."""
        noted = self.noted
        study = noted.get(STUDY_INSTANCE) or noted.get(SOP_INSTANCE) or meta.get(0x0003, b"")
        named = noted.get(PATIENT_ID, b"")
        key = (named, noted.get(ISSUER), noted.get(CHARSET), b"" if named.strip(b"\0 ") else study)
        person = self.memory.people.get(key)
        if person is None:
            whole = self._patient()
            name = self.names.name("patient", whole) if whole else None
            person = _Person(whole, name, self.names.days(whole or study.decode("latin-1").strip("\0 ")))
            _keep(self.memory.people, key, person, MAX_PEOPLE)
        return person

    def _patient(self) -> str | None:
        """Give the patient as the label table knows them: the ID, and who issued it where that is said."""
        raw = self._text(PATIENT_ID, self.noted.get(PATIENT_ID, b""))
        issuer = self._text(ISSUER, self.noted.get(ISSUER, b""))
        return f"{raw}\0{issuer}" if raw and issuer else raw or None

    def _person(self, raw: str) -> str:
        """Give the pseudonym of a patient's identifier; an item that names the file's patient gets the file's."""
        if not raw:
            return ""
        whole = self.person.whole
        if whole and whole.split("\0")[0] == raw:
            raw = whole
        name = self.names.name("patient", raw)
        self.pairs.append(("patient", raw, name))
        return name

    def _text(self, tag: int, raw: bytes) -> str:
        bare = raw.strip(b" \0")
        if _PLAIN.fullmatch(bare):
            return bare.decode("ascii")
        return _decoded(tag, raw, self.noted.get(CHARSET, b""))

    def _new_uids(self, raw: bytes) -> bytes:
        """Map UIDs; those of the standard itself stay."""
        uid = raw.strip(b" \0")
        if b"\\" in uid:
            return b"\\".join(self._new_uids(part) for part in uid.split(b"\\"))
        if not uid or uid in _well_known():
            return uid
        new = self.uids.get(uid)
        if new is None:
            new = self.uids[uid] = self.names.uid(uid.decode("latin-1")).encode("ascii")
        self.pairs.append(("uid", uid.decode("latin-1"), new.decode("ascii")))
        return new


def _extent(decision: _Decision, head: bytes, pos: int, implicit: bool) -> tuple[int, int]:
    """Give where an element's value begins, and its length."""
    if not decision.wide:
        return pos + 8, head[pos + 6] | head[pos + 7] << 8
    value = pos + (8 if implicit else 12)
    return value, int(_U32.unpack_from(head, value - 4)[0])


@lru_cache(maxsize=256)
def _picture(*raw: bytes) -> Picture:
    sop, modality, image_type, burned_in = (value.decode("latin-1").strip("\0 ") for value in raw)
    return Picture(sop, modality, tuple(image_type.split("\\")), burned_in)


@lru_cache(maxsize=32)
def _marks(rules: Rules, implicit: bool) -> tuple[tuple[int, bytes], ...]:
    """Encode the standard's marks of a de-identified file, the last one first. Source: PS3.15 E.1.1, step 6."""
    items = b"".join(_ITEM_HEAD + _code(code, meaning, implicit) + _ITEM_TAIL for code, meaning in rules.codes)
    codes = _key(DEIDENTIFICATION_CODES) + (b"" if implicit else b"SQ\0\0") + b"\xff" * 4 + items + _SEQUENCE_TAIL
    said = {"shift": b"MODIFIED", "retain": b"UNMODIFIED", "remove": b"REMOVED"}[rules.dates]
    return (
        (TIME_MODIFIED, _encoded(_key(TIME_MODIFIED), "CS", said, implicit)),
        (DEIDENTIFICATION_CODES, codes),
        (METHOD_TEXT, _encoded(_key(METHOD_TEXT), "LO", METHOD.encode("ascii"), implicit)),
        (IDENTITY_REMOVED, _encoded(_key(IDENTITY_REMOVED), "CS", b"YES", implicit)),
    )


def _tag(key: bytes) -> int:
    return (key[0] | key[1] << 8) << 16 | key[2] | key[3] << 8


def _key(tag: int) -> bytes:
    return _TAG.pack(tag >> 16, tag & 0xFFFF)


def _encoded(tag: bytes, vr: str, value: bytes, implicit: bool) -> bytes:
    if len(value) % 2:
        value += b"\0" if vr == "UI" or vr not in TEXT else b" "
    if implicit:
        return tag + _U32.pack(len(value)) + value
    if vr in LONG:
        return tag + vr.encode("ascii") + b"\0\0" + _U32.pack(len(value)) + value
    return tag + vr.encode("ascii") + len(value).to_bytes(2, "little") + value


def _code(code: str, meaning: str, implicit: bool) -> bytes:
    parts = ((0x0100, "SH", code), (0x0102, "SH", "DCM"), (0x0104, "LO", meaning))
    return b"".join(_encoded(_TAG.pack(0x0008, n), vr, text.encode("ascii"), implicit) for n, vr, text in parts)


def _meta(kind: bytes, instance: bytes, syntax: str) -> bytes:
    """Encode the file meta information: of the input's only class and transfer syntax pass."""
    before, after = _around_instance(kind, syntax)
    body = before + _encoded(b"\2\0\3\0", "UI", instance.rstrip(b"\0 "), False) + after if instance else before + after
    return b"\0" * 128 + b"DICM\2\0\0\0UL\4\0" + _U32.pack(len(body)) + body


@lru_cache(maxsize=64)
def _around_instance(kind: bytes, syntax: str) -> tuple[bytes, bytes]:
    rows = [
        (0x0001, "OB", b"\0\1"),
        (0x0002, "UI", kind.rstrip(b"\0 ")),
        (0x0010, "UI", syntax.encode("ascii")),
        (0x0012, "UI", IMPLEMENTATION_UID.encode("ascii")),
        (0x0013, "SH", IMPLEMENTATION_NAME.encode("ascii")),
    ]
    coded = [_encoded(_TAG.pack(0x0002, number), vr, value, False) for number, vr, value in rows if value]
    return b"".join(coded[:-3]), b"".join(coded[-3:])


def _fragments_end(data: Readable, pos: int, end: int) -> int:
    """Give the place after encapsulated pixel data, whose fragments begin at ``pos``. Source: PS3.5 A.4."""
    while pos + 8 <= end:
        tag, length = _HEAD.unpack(bytes(data[pos : pos + 8]))
        if tag == _SEQUENCE_END:
            return pos + 8
        if tag != _ITEM:
            raise _malformed("something other than fragments in encapsulated pixel data")
        pos += 8 + length
    raise _truncated()


def _age(raw: bytes) -> bytes | None:
    """Keep an age; above 89 years it identifies. Source: 45 CFR 164.514(b)(2)."""
    if not raw.strip(b" \0"):
        return b""
    if _FORMS["AS"].fullmatch(raw) is None:
        return None
    years = age_in_years(raw.decode("ascii").strip())
    return b"090Y" if years is not None and years >= OLDEST_YEARS else raw


def _shifted(raw: bytes, days: int, vr: str) -> bytes | None:
    """Move dates (DA, DT; several are parted by backslashes) back by whole days; ``None``: not a full date."""
    moved = []
    for part in raw.strip(b" \0").split(b"\\"):
        text = part.strip(b" \0")
        match = _DATE.fullmatch(text)
        if not text:
            moved.append(b"")
        elif match is None or (vr == "DA" and match[4]):
            return None
        else:
            try:
                day = date.fromordinal(date(int(match[1]), int(match[2]), int(match[3])).toordinal() - days)
            except ValueError:
                return None
            if day.year < FIRST_YEAR:
                return None
            moved.append(b"%d%02d%02d" % (day.year, day.month, day.day) + match[4])
    return b"\\".join(moved)


@lru_cache(maxsize=1)
def _well_known() -> frozenset[bytes]:
    from pydicom._uid_dict import UID_dictionary

    return frozenset(uid.encode("ascii") for uid in UID_dictionary)


def _decoded(tag: int, raw: bytes, charset: bytes) -> str:
    """Decode a text that is not plain ASCII as the rest of intake does: by pydicom."""
    from pydicom.filereader import read_dataset

    parts = ((CHARSET, "CS", charset), (tag, "LO", raw))
    data = b"".join(_encoded(_TAG.pack(t >> 16, t & 0xFFFF), vr, value, False) for t, vr, value in parts)
    try:
        return str(read_dataset(BytesIO(data), is_implicit_VR=False, is_little_endian=True)[tag].value).strip()
    except (LookupError, ValueError) as error:  # unknown character sets, bytes that they do not have
        raise _malformed("a patient identifier in a character set that cannot be read") from error


_WIDTHS = {"AT": 2, "OW": 2, "SS": 2, "US": 2, "FL": 4, "OF": 4, "OL": 4, "SL": 4, "UL": 4}
_WIDTHS |= {"FD": 8, "OD": 8, "OV": 8, "SV": 8, "UV": 8}


class _Swap:
    """Explicit VR Big Endian (retired) to Little Endian. Source: PS3.5 7.3."""

    def __init__(self, data: bytes) -> None:
        self.data, self.bits = data, 0

    def dataset(self) -> bytes:
        """Give the data set in little-endian byte order."""
        try:
            return b"".join(self._elements(0, len(self.data), 0, False)[0])
        except (struct.error, IndexError) as error:
            raise _truncated() from error

    def _elements(self, pos: int, end: int, depth: int, open_ended: bool) -> tuple[list[bytes], int]:
        if depth > MAX_DEPTH:
            raise ScanError("too_deep", f"sequences nested more than {MAX_DEPTH} deep")
        out: list[bytes] = []
        while pos < end:
            group, number = struct.unpack_from(">HH", self.data, pos)
            if open_ended and (group, number) == (0xFFFE, 0xE00D):
                return [*out, _ITEM_TAIL], pos + 8
            vr = self.data[pos + 4 : pos + 6].decode("latin-1")
            wide = vr in LONG
            length = struct.unpack_from(">I" if wide else ">H", self.data, pos + (8 if wide else 6))[0]
            out.append(_TAG.pack(group, number) + vr.encode("latin-1"))
            out.append(b"\0\0" + _U32.pack(length) if wide else length.to_bytes(2, "little"))
            pos += 12 if wide else 8
            if vr == "SQ":
                items, pos = self._items(pos, end if length == _OPEN else pos + length, depth, length == _OPEN)
                out += items
                continue
            if pos + length > end:
                raise _truncated()
            out.append(self._swapped(group << 16 | number, vr, self.data[pos : pos + length]))
            pos += length
        if open_ended:
            raise _truncated()
        return out, pos

    def _items(self, pos: int, end: int, depth: int, open_ended: bool) -> tuple[list[bytes], int]:
        out: list[bytes] = []
        if end > len(self.data):
            raise _truncated()
        while open_ended or pos < end:
            group, number, length = struct.unpack_from(">HHI", self.data, pos)
            pos += 8
            out.append(_TAG.pack(group, number) + _U32.pack(length))
            if (group, number) == (0xFFFE, 0xE0DD) and open_ended:
                break
            if (group, number) != (0xFFFE, 0xE000):
                raise _malformed("something other than items in a sequence")
            last = end if length == _OPEN else pos + length
            if last > end:
                raise _truncated()
            inner, pos = self._elements(pos, last, depth + 1, length == _OPEN)
            out += inner
        return out, pos

    def _swapped(self, tag: int, vr: str, value: bytes) -> bytes:
        if tag == 0x00280100 and len(value) == 2:
            self.bits = int.from_bytes(value, "big")
        width = _WIDTHS.get(vr, 1)
        if tag == 0x7FE00010 and vr == "OW" and self.bits in (32, 64):
            width = self.bits // 8
        if len(value) % width:
            raise _malformed("a value whose length does not fit its value representation")
        return value if width == 1 else np.frombuffer(value, f">u{width}").astype(f"<u{width}").tobytes()


def strip_nifti(head: bytes) -> tuple[bytes, int, int]:
    """Blank the free text of a NIfTI-1 or -2 header and drop its extensions.

    Args:
        head: the beginning of the uncompressed file, at least 348 (NIfTI-1) or 540 bytes.

    Returns:
        The new header with its four bytes of extender, where the voxels begin in the input, and how many bytes of them
        the header declares: these are appended unchanged, and nothing else is.

    Raises:
        ScanError: ``bad_header``, ``bad_size``, ``truncated``, or ``detached_header`` of a ``.hdr`` file.
    """
    for order in "<>":
        for size, magic, places, offset, shape, bits in _NIFTI:
            if head[:4] != struct.pack(order + "i", size):
                continue
            if len(head) < size:
                raise ScanError("truncated", f"a NIfTI header of less than {size} bytes")
            kind = head[magic : magic + 4]
            if kind not in (b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0"):
                raise _malformed("a header without the mark of NIfTI")
            if kind[1:2] == b"i":
                raise ScanError("detached_header", "a NIfTI header whose voxels lie in another file")
            new = bytearray(head[:size])
            for start, length in places:
                new[start : start + length] = bytes(length)
            form = order + offset[1]
            begins = struct.unpack_from(form, head, offset[0])[0] or size + 4
            if not size + 4 <= begins < 1 << 40 or begins != int(begins):
                raise _malformed("voxels that begin inside the header")
            struct.pack_into(form, new, offset[0], size + 4)
            dims = struct.unpack_from(order + shape[1], head, shape[0])
            return bytes(new) + b"\0" * 4, int(begins), _voxel_bytes(dims, *struct.unpack_from(order + "h", head, bits))
    raise _malformed("neither NIfTI-1 nor NIfTI-2")


def _voxel_bytes(dims: tuple[int, ...], bits: int) -> int:
    """Give how many bytes of voxels a NIfTI header declares."""
    if not 1 <= dims[0] <= 7 or min(sides := dims[1 : dims[0] + 1]) < 1:
        raise ScanError("bad_size", "the header declares no shape that a scan can have")
    if bits < 8 or bits % 8:
        raise _malformed("voxels that are no whole number of bytes")
    return math.prod(sides) * bits // 8


# (size, magic, free text and unused fields as (start, length), (vox_offset, its type), (dim, its type), bitpix).
# Source: nifti1.h, nifti2.h.
_Place = tuple[int, str]
_NIFTI: tuple[tuple[int, int, tuple[tuple[int, int], ...], _Place, _Place, int], ...] = (
    (348, 344, ((4, 35), (148, 80), (228, 24), (328, 16)), (108, "f"), (40, "8h"), 72),
    (540, 4, ((240, 80), (320, 24), (508, 16), (525, 15)), (168, "q"), (16, "8q"), 14),
)
