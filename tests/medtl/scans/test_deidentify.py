from __future__ import annotations

import hashlib
import hmac
import io
import mmap
import os
import pickle
import re
import shutil
import struct
import subprocess
import unicodedata
import warnings
import zlib
from collections.abc import Iterable
from datetime import date, timedelta
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medtl.errors import ScanError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.deidentify import Deidentified, _memory, deidentified, strip_nifti
from medtl.scans.headers import describe, read_header
from medtl.scans.profile import LONG, SAFE_PRIVATE, Action, Rules, profile

NAMES = Pseudonymiser(b"a key of these tests")
CT = "1.2.840.10008.5.1.4.1.1.2"
IMPLICIT, EXPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".1.99"))
CANARY, CANARY_NUMBER, CANARY_DATE = b"CANARY", b"1.666777888", b"19870613"
PLAIN = Rules(dates="remove")
ALL_OPTIONS = Rules("retain", True, True, True, True, True, ("chest", "ct"))
SETS = {
    "default": Rules(),
    "no dates": PLAIN,
    "every option": ALL_OPTIONS,
    "device": Rules(retain_device=True, retain_institution=True),
}


# --- files: an encoder of our own, so that nothing is corrected on the way --------------------------------------------


def element(tag: int, vr: str, value: bytes, implicit: bool = False, order: str = "<") -> bytes:
    value += b"\0" * (len(value) % 2) if vr in ("UI", "OB", "UN") else b" " * (len(value) % 2)
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<I", len(value)) + value
    if vr in LONG:
        return head + vr.encode() + b"\0\0" + struct.pack(order + "I", len(value)) + value
    return head + vr.encode() + struct.pack(order + "H", len(value)) + value


def sequence(tag: int, *items: bytes, implicit: bool = False, open_ended: bool = False) -> bytes:
    if not open_ended:
        body = b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(item)) + item for item in items)
        return element(tag, "SQ", body, implicit)
    body = b"".join(b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + item + b"\xfe\xff\x0d\xe0\0\0\0\0" for item in items)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + (b"" if implicit else b"SQ\0\0") + b"\xff" * 4
    return head + body + b"\xfe\xff\xdd\xe0\0\0\0\0"


def file_of(body: bytes, syntax: str = EXPLICIT, preamble: bytes = b"\0" * 128) -> bytes:
    meta = b"".join(
        (
            element(0x00020001, "OB", b"\0\1"),
            element(0x00020002, "UI", CT.encode()),
            element(0x00020003, "UI", b"1.2.3.4"),
            element(0x00020010, "UI", syntax.encode()),
            element(0x00020012, "UI", b"1.2.3.9999"),
            element(0x00020016, "AE", CANARY),
        )
    )
    return preamble + b"DICM" + element(0x00020000, "UL", struct.pack("<I", len(meta))) + meta + body


def identity(implicit: bool = False, patient: bytes = b"4711", instance: bytes = b"1.2.3.4") -> list[bytes]:
    return [
        element(0x00080016, "UI", CT.encode(), implicit),
        element(0x00080018, "UI", instance, implicit),
        element(0x00080020, "DA", b"20240229", implicit),
        element(0x00080030, "TM", b"101112", implicit),
        element(0x00100010, "PN", b"Doe^Jane", implicit),
        element(0x00100020, "LO", patient, implicit),
        element(0x0020000D, "UI", b"1.2.3.1", implicit),
    ]


PIXELS = bytes(range(64)) * 2


def image(*more: bytes, implicit: bool = False, **identifiers: bytes) -> bytes:
    rows = [element(0x00280010, "US", b"\x08\0", implicit), element(0x00280011, "US", b"\x08\0", implicit)]
    elements = sorted((*identity(implicit, **identifiers), *rows, *more), key=lambda e: struct.unpack("<HH", e[:4]))
    first = [e for e in elements if e[:2] < b"\xe0\x7f" or struct.unpack("<H", e[:2])[0] < 0x7FE0]
    last = [e for e in elements if struct.unpack("<H", e[:2])[0] >= 0x7FE0]
    return b"".join((*first, element(0x7FE00010, "OW", PIXELS, implicit), *last))


def written(data: bytes, result: Deidentified) -> bytes:
    return b"".join(p if isinstance(p, bytes) else data[p[0] : p[0] + p[1]] for p in result.pieces)


def cleaned(data: bytes, rules: Rules | None = None) -> bytes:
    return written(data, deidentified(data, NAMES, rules))


def read(data: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(data))


# --- the canary -------------------------------------------------------------------------------------------------------


def canary(vr: str) -> bytes:
    if vr == "UI":
        return CANARY_NUMBER
    if vr in ("DS", "IS"):
        return b"666777888"
    if vr in ("FL", "FD", "US", "SS", "UL", "SL", "OF", "OD", "OL", "OW", "UV", "SV", "OV", "AT"):
        return b"CANARY##"
    return CANARY_DATE if vr == "DA" else CANARY


def planted(implicit: bool, rules: Rules) -> list[bytes]:
    """Every attribute of the table with a value that nothing else holds; sequences with an item that has it, too."""
    table, made = profile(rules), []
    for tag in sorted(table.table):
        vr = table.vr(tag)
        if tag >> 16 in (0, 2, 4) or vr == "UN":
            continue
        if vr == "SQ":
            item = element(0x00080018, "UI", CANARY_NUMBER, implicit) + element(0x00100010, "PN", CANARY, implicit)
            item += element(0x00080104, "LO", CANARY, implicit) if "U" not in table.table[tag] else b""
            made.append(sequence(tag, item, implicit=implicit, open_ended=tag % 4 == 0))
        else:
            made.append(element(tag, vr, canary(vr), implicit))
    return made


def ordered(parts: Iterable[bytes]) -> bytes:
    return b"".join(sorted(parts, key=lambda e: struct.unpack("<HH", e[:4])))


@pytest.mark.parametrize("rules", [Rules(), PLAIN], ids=["shifted dates", "no dates"])
@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
def test_no_canary_is_left(implicit: bool, rules: Rules) -> None:
    every = planted(implicit, rules)
    assert len(every) > 600
    nested = sequence(
        0x00082218,
        sequence(0x00082220, ordered(every), implicit=implicit, open_ended=True),
        implicit=implicit,
    )
    elsewhere = [
        nested,
        element(0x00090010, "LO", b"CANARY CREATOR", implicit),
        element(0x00091001, "UN", CANARY, implicit),
        sequence(0x00091002, ordered(every), implicit=implicit, open_ended=True),
        element(0x00280000, "UL", b"CANA", implicit),
        element(0x50003000, "OB", CANARY, implicit),
        element(0x50022500, "LO", CANARY, implicit),
        element(0x60003000, "OW", CANARY, implicit),
        element(0x601E1500, "LO", CANARY, implicit),
        element(0x00100033, "LO", CANARY, implicit),
        element(0x00420099, "LO", CANARY, implicit),  # even group, in no dictionary
        element(0x7FE10010, "LO", CANARY, implicit),
        element(0x00081190, "UR", CANARY, implicit),
        element(0x00140104, "PN", CANARY, implicit),
    ]
    body = [*every, *elsewhere, element(0x7FE00010, "OW", PIXELS, implicit)]
    data = file_of(ordered(body), IMPLICIT if implicit else EXPLICIT, preamble=CANARY.ljust(128))
    assert data.count(CANARY) > 1000
    out = cleaned(data, rules)
    left = [m.start() for m in re.finditer(b"CANA|666777888|19870613", out)]
    assert not left, out[left[0] - 40 : left[0] + 20]
    assert PIXELS in out
    for found in everything(read(out)):
        assert not found[0][-1] >> 16 & 1, "a private element"


def test_a_canary_behind_a_wrong_vr_is_gone() -> None:
    more = [
        element(0x00081030, "UN", CANARY),
        element(0x00181151, "UN", CANARY),  # a number by the dictionary
        element(0x00082218, "OB", CANARY),  # a sequence by the dictionary
        element(0x00280030, "OW", CANARY),
        element(0x00200052, "LO", CANARY),  # a UID by the table
    ]
    assert CANARY not in cleaned(file_of(image(*more)))


def test_known_elements_that_were_written_as_un_are_treated_as_what_they_are() -> None:
    parts = [(struct.unpack("<HH", e[:4]), e[8:]) for e in identity()]
    body = ordered(element(group << 16 | number, "UN", value) for (group, number), value in parts)
    assert_like_reference(file_of(body), Rules())
    assert b"4711" not in cleaned(file_of(body)) and b"Doe" not in cleaned(file_of(body))


def test_a_text_in_a_place_for_times_is_no_time() -> None:
    out = cleaned(file_of(image(element(0x00080032, "TM", CANARY), element(0x0008002A, "DT", CANARY))))
    assert CANARY not in out


# --- against the same rules through pydicom ---------------------------------------------------------------------------

Flat = tuple[tuple[int, ...], str, bytes]
DUMMIES = {"AS": b"000Y", "DA": b"19000101", "DT": b"19000101000000", "TM": b"000000", "DS": b"1", "IS": b"1"}
SIZES = {"FL": 4, "SL": 4, "UL": 4, "AT": 4, "OF": 4, "OL": 4, "FD": 8, "SV": 8, "UV": 8, "OD": 8, "OV": 8}
MARKS = (0x00120062, 0x00120063, 0x00120064, 0x00280303)
FORMS = {
    "DA": r"(\d{4}\.?\d\d\.?\d\d ?(\\|$))*",
    "DT": r"([0-9.]{4,21}([+-]\d{4})? ?(\\|$))*",
    "TM": r"[\d.: \\]*",
    "UI": "[0-9.\\\\]*\0?",
    "DS": r"[\d+eE. \\-]*",
    "IS": r"[\d+ \\-]*",
    "CS": r"[\w .:\\-]*",
}


def raw_element(dataset: Dataset, tag: int) -> tuple[str, bytes | Sequence]:
    """Give (VR, value): bytes as they lie in the file, or the items of a sequence."""
    raw = dataset.get_item(tag)
    own = profile(Rules()).vr(int(tag))
    vr = own if raw.VR is None or (raw.VR == "UN" and own != "SQ") else raw.VR
    if vr == "SQ" and not isinstance(raw.value, Sequence):
        raw = dataset[tag]
    if isinstance(raw.value, Sequence | bytes):
        return vr, raw.value
    if isinstance(raw.value, int):
        return vr, raw.value.to_bytes(2, "little")  # PixelRepresentation, decoded to read what depends on it
    texts = [raw.value] if isinstance(raw.value, str) else raw.value or []  # the character set, decoded on reading
    return vr, "\\".join(texts).encode()


def everything(dataset: Dataset, path: tuple[int, ...] = ()) -> list[Flat]:
    """Flatten what pydicom reads: (path, VR, raw value without padding)."""
    found: list[Flat] = []
    for tag in sorted(dataset.keys()):
        vr, value = raw_element(dataset, tag)
        here = (*path, int(tag))
        if isinstance(value, Sequence):
            found.append((here, "SQ", b"%d" % len(value)))
            for number, item in enumerate(value):
                found += everything(item, (*here, number))
        else:
            found.append((here, vr, value.rstrip(b"\0 ")))
    return found


class Reference:
    """The rules on pydicom's own tree: no walking, no splicing, no patching."""

    def __init__(self, source: Dataset, rules: Rules) -> None:
        self.source, self.rules, self.profile = source, rules, profile(rules)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy = Dataset()
            for keyword in ("PatientID", "IssuerOfPatientID", "SpecificCharacterSet"):
                raw = source.get_item(keyword) if keyword in source else None
                if raw is not None:
                    copy[keyword] = raw
            copy.decode()
            self.id = str(copy.get("PatientID") or "").strip()
            issuer = str(copy.get("IssuerOfPatientID") or "").strip()
        whole = f"{self.id}\0{issuer}" if self.id and issuer else self.id
        self.patient = NAMES.name("patient", whole) if whole else ""
        given = [raw_element(source, tag)[1] for tag in (0x0020000D, 0x00080018) if tag in source]
        given.append(source.file_meta.get("MediaStorageSOPInstanceUID", "").encode())
        uid = next((value for value in given if value and isinstance(value, bytes)), b"")
        self.days = NAMES.days(whole or uid.rstrip(b"\0 ").decode())

    def flat(self) -> list[Flat]:
        return self.of(self.source, (), False)

    def of(self, dataset: Dataset, path: tuple[int, ...], scrub: bool) -> list[Flat]:
        found: list[Flat] = []
        for tag in sorted(dataset.keys()):
            here = (*path, int(tag))
            vr, raw = raw_element(dataset, tag)
            action = self.profile.action(int(tag), "UN" if dataset.get_item(tag).VR == "UN" else vr, scrub)
            if action == Action.PRIVATE:
                action = self.private(dataset, int(tag), vr, raw)
            if isinstance(raw, Sequence):
                if action in (Action.WALK, Action.SCRUB):
                    found.append((here, "SQ", b"%d" % len(raw)))
                    for number, item in enumerate(raw):
                        found += self.of(item, (*here, number), scrub or action == Action.SCRUB)
                elif action == Action.EMPTY:
                    found.append((here, "SQ", b"0"))
                continue
            value = self.value(action, int(tag), vr, raw, bool(path))
            if value is not None:
                found.append((here, vr, value.rstrip(b"\0 ")))
        return found

    def private(self, dataset: Dataset, tag: int, vr: str, raw: object) -> Action:
        group, block = tag >> 16, tag >> 8 & 0xFF
        if 0x10 <= tag & 0xFFFF <= 0xFF:
            safe = bytes(raw).strip(b" \0").decode("latin-1") in {c for c, g, _ in SAFE_PRIVATE if g == group}
            return Action.KEEP if safe and isinstance(raw, bytes) else Action.DROP
        creator = (group << 16) + block
        name = bytes(raw_element(dataset, creator)[1]).strip(b" \0").decode("latin-1") if creator in dataset else ""
        if (name, group, tag & 0xFF) not in SAFE_PRIVATE or not isinstance(raw, bytes):
            return Action.DROP
        text = raw.decode("latin-1")
        if vr == "UN":
            number = self.source.file_meta.TransferSyntaxUID == IMPLICIT and re.fullmatch(FORMS["DS"], text)
            return Action.KEEP if number else Action.DROP
        return Action.KEEP if re.fullmatch(FORMS.get(vr, r"(?s).*"), text, re.A) else Action.DROP

    def value(self, action: Action, tag: int, vr: str, raw: bytes, nested: bool) -> bytes | None:
        new: bytes | None = None
        if action == Action.KEEP or (action == Action.PIXELS and not nested):
            return raw
        if action in (Action.DROP, Action.NOTE, Action.PIXELS, Action.OVERLAY_BIT, Action.PRIVATE):
            return None
        if action == Action.CHECK and re.fullmatch(FORMS.get(vr, r"(?s).*"), raw.decode("latin-1"), re.A):
            return raw
        if action == Action.NAME:
            return b"" if nested else self.patient.encode()
        if action == Action.PATIENT:
            text = raw.strip(b" \0").decode("latin-1")
            own = self.patient if not nested or text == self.id else NAMES.name("patient", text) if text else ""
            return own.encode()
        if action == Action.UID:
            new = b"\\".join(self.uid(part.strip(b" \0")) for part in raw.split(b"\\"))
        elif action == Action.DATE:
            new = self.shifted(raw.strip(b" \0").decode("latin-1"), vr)
        elif action == Action.AGE and re.fullmatch(rb"(\d{3}[DWMY])? ?", raw):
            new = b"090Y" if raw[3:4] == b"Y" and int(raw[:3]) > 89 else raw
        elif action == Action.CLEAN:
            kept = [w for w in re.findall(rb"[A-Za-z0-9.+/-]+", raw) if w.lower().decode() in self.profile.words]
            new = b" ".join(kept) or None
        if new is not None:
            return new
        final = action if action in (Action.EMPTY, Action.DUMMY) else self.profile.base(tag, vr)
        if final == Action.DROP:
            return None
        if final == Action.EMPTY or not raw.strip(b" \0"):
            return b""
        if vr in SIZES or vr in ("OB", "OW", "US", "SS"):
            return b"\0" * SIZES.get(vr, 2)
        return DUMMIES.get(vr, b"urn:removed" if vr == "UR" else b"REMOVED")

    def uid(self, raw: bytes) -> bytes:
        known = not raw or raw.decode("latin-1") in pydicom.uid.UID_dictionary
        return raw if known else NAMES.uid(raw.decode("latin-1")).encode()

    def shifted(self, raw: str, vr: str) -> bytes | None:
        moved = []
        for part in raw.split("\\"):
            match = re.fullmatch(r"(\d{4})\.?(\d\d)\.?(\d\d)(.*)", part.strip(" \0"))
            if part.strip(" \0") and match is None:
                return None
            if match is None:
                moved.append("")
                continue
            if (vr == "DA" and match[4]) or not re.fullmatch(r"(\d\d){0,3}(\.\d{1,6})?([+-]\d{4})?", match[4]):
                return None
            try:
                day = date(int(match[1]), int(match[2]), int(match[3])) - timedelta(days=self.days)
            except (ValueError, OverflowError):
                return None
            if day.year < 1800:
                return None
            moved.append(day.strftime("%Y%m%d") + match[4])
        return "\\".join(moved).encode()


def assert_like_reference(data: bytes, rules: Rules) -> None:
    expected = Reference(read(data), rules).flat()
    found = [e for e in everything(read(cleaned(data, rules))) if e[0][0] not in MARKS]
    assert found == expected


@pytest.mark.parametrize("rules", SETS.values(), ids=SETS)
@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
def test_the_walker_and_pydicom_give_the_same_elements(implicit: bool, rules: Rules) -> None:
    keep = [p for p in planted(implicit, rules) if struct.unpack("<H", p[:2])[0] < 0xFFF0]
    known = identity(implicit)
    tags = {e[:4] for e in known}
    body = [*known, *(p for p in keep if p[:4] not in tags)]
    assert_like_reference(file_of(ordered(body), IMPLICIT if implicit else EXPLICIT), rules)


@st.composite
def bodies(draw: st.DrawFn, depth: int = 0) -> bytes:
    tags = sorted(profile(Rules()).dictionary)
    parts: dict[int, bytes] = {}
    for tag in draw(st.lists(st.sampled_from([t for t in tags if t >> 16 not in (0, 2, 4)]), max_size=8)):
        vr = draw(st.sampled_from(profile(Rules()).dictionary[tag][0]))
        if tag in (0x00080005, 0x60000102) or tag >> 16 in (0x7FE0, 0xFFFE) or (vr == "UN"):
            continue
        if vr == "SQ":
            items = draw(st.lists(bodies(depth + 1), max_size=2)) if depth < 2 else []
            parts[tag] = sequence(tag, *items, open_ended=draw(st.booleans()))
        else:
            parts[tag] = element(tag, vr, draw(st.sampled_from(VALUES)))
    return ordered(list(parts.values()))


VALUES = [b"", b"A1 chest", b"20240131", b"1.2.3", b"19991231235959.5+0100", b"12", b"0001.01.01", b"077Y", b"1\\2"]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(bodies())
def test_generated_headers_are_treated_like_through_pydicom(body: bytes) -> None:
    assert_like_reference(file_of(body), Rules(descriptor_words=("chest",)))


# --- names, dates, identifiers ----------------------------------------------------------------------------------------


def test_a_patient_has_one_name_and_one_shift_in_all_files() -> None:
    first, second = (read(cleaned(file_of(image(instance=uid)))) for uid in (b"1.2.3.5", b"1.2.3.6"))
    assert first.PatientID == second.PatientID == str(first.PatientName) == NAMES.name("patient", "4711")
    assert first.StudyDate == second.StudyDate != "20240229"
    assert first.StudyTime == "101112"
    assert first.StudyInstanceUID == second.StudyInstanceUID != "1.2.3.1"
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert read(cleaned(file_of(image(patient=b"4712")))).StudyDate != first.StudyDate


@pytest.mark.parametrize(
    "extra",
    [
        [element(0x00100021, "LO", b"HOSPITAL A")],
        [element(0x00080005, "CS", b"ISO_IR 192"), element(0x00100021, "LO", "Köln ".encode())],
        [],
    ],
    ids=["issuer", "utf-8", "plain"],
)
def test_the_pseudonym_is_the_one_that_intake_gives(extra: list[bytes]) -> None:
    grey = [element(0x00280002, "US", b"\1\0"), element(0x00280004, "CS", b"MONOCHROME2 ")]
    bits = [
        element(0x00280100, "US", b"\x10\0"),
        element(0x00280101, "US", b"\x10\0"),
        element(0x00280103, "US", b"\0\0"),
    ]
    data = file_of(image(*extra, *grey, *bits))
    wanted = describe(read_header(data, len(data), lambda: data), NAMES)["patient"]
    result = deidentified(data, NAMES)
    assert result.patient == read(written(data, result)).PatientID == wanted


def test_references_to_a_file_still_find_it() -> None:
    reference = sequence(0x00081140, element(0x00081150, "UI", CT.encode()) + element(0x00081155, "UI", b"1.2.3.4"))
    target, pointer = read(cleaned(file_of(image()))), read(cleaned(file_of(image(reference, instance=b"1.2.3.7"))))
    item = pointer.ReferencedImageSequence[0]
    assert item.ReferencedSOPInstanceUID == target.SOPInstanceUID == target.file_meta.MediaStorageSOPInstanceUID
    assert item.ReferencedSOPClassUID == CT
    assert re.fullmatch(r"2\.25\.[1-9]\d{0,38}", target.SOPInstanceUID)


def test_pairs_lead_back_and_nothing_shows_them_by_accident() -> None:
    result = deidentified(file_of(image()), NAMES)
    assert ("patient", "4711", result.patient) in result.pairs
    assert ("uid", "1.2.3.4", result.instance) in result.pairs
    assert "4711" not in repr(result)


def test_marks_say_what_was_done() -> None:
    dataset = read(cleaned(file_of(image()), Rules(retain_device=True)))
    assert (dataset.PatientIdentityRemoved, dataset.LongitudinalTemporalInformationModified) == ("YES", "MODIFIED")
    codes = [item.CodeValue for item in dataset.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113107", "113109"]
    assert list(dataset.keys()) == sorted(dataset.keys())


def test_ages_above_89_become_90_and_only_where_ages_are_kept() -> None:
    data = file_of(image(element(0x00101010, "AS", b"093Y"), element(0x00100040, "CS", b"F ")))
    kept = read(cleaned(data, Rules(retain_patient_characteristics=True)))
    assert (kept.PatientAge, kept.PatientSex) == ("090Y", "F")
    assert "PatientAge" not in read(cleaned(data))


def test_only_allowed_words_stay_in_descriptions() -> None:
    data = file_of(image(element(0x0008103E, "LO", b"CT Chest Dr. Miller")))
    assert read(cleaned(data, Rules(descriptor_words=("ct", "chest")))).SeriesDescription == "CT Chest"
    assert "SeriesDescription" not in read(cleaned(data))


def test_safe_private_numbers_stay_where_wanted_and_nothing_else_private() -> None:
    more = [
        element(0x00190010, "LO", b"SIEMENS MR HEADER "),
        element(0x00190011, "LO", b"OTHER "),
        element(0x0019100C, "IS", b"1000"),
        element(0x0019100D, "CS", b"Dr. Who?"),
        element(0x0019110C, "IS", b"1234"),
        element(0x00191008, "CS", CANARY),
    ]
    kept = read(cleaned(file_of(image(*more)), Rules(retain_safe_private=True)))
    assert sorted(hex(e.tag) for e in kept if e.tag.is_private) == ["0x190010", "0x19100c"]
    assert not [e for e in read(cleaned(file_of(image(*more)))) if e.tag.is_private]


def test_an_option_retains_what_the_standard_keeps_and_nothing_that_sounds_like_it() -> None:
    more = [
        element(0x00181000, "LO", b"SN-1"),  # K
        element(0x00181010, "LO", CANARY),  # a number of a device, and no K
        element(0x00203401, "CS", CANARY),
        element(0x00500021, "ST", CANARY),
        element(0x00080080, "LO", CANARY),  # K of another option
    ]
    out = cleaned(file_of(image(*more)), Rules(retain_device=True))
    assert read(out).DeviceSerialNumber == "SN-1"
    assert CANARY not in out


def test_impossible_rules_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="dates"):
        Rules(dates="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="single words"):
        Rules(descriptor_words=("two words",))


# --- pixels and other encodings ---------------------------------------------------------------------------------------


def test_pixels_are_a_range_of_the_input_and_what_follows_is_walked() -> None:
    tail = [sequence(0xFFFAFFFA, element(0x04000120, "OB", CANARY)), element(0xFFFCFFFC, "OB", CANARY)]
    data = file_of(image(*tail))
    (_, pixels, *rest) = deidentified(data, NAMES).pieces
    assert isinstance(pixels, tuple) and not rest
    assert data[pixels[0] : sum(pixels)].endswith(PIXELS)


def test_a_mapped_file_gives_the_same_as_its_bytes(tmp_path: Path) -> None:
    data = file_of(image(element(0x00280008, "IS", b"1"), element(0x00281201, "OW", bytes(80_000))))
    (tmp_path / "scan").write_bytes(data)
    with (tmp_path / "scan").open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert deidentified(view, NAMES) == deidentified(data, NAMES) == deidentified(memoryview(data), NAMES)


def test_encapsulated_pixels_are_walked_to_their_end() -> None:
    fragments = (
        b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0\x04\0\0\0\xff\xd8\xff\xd9" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    )
    body = b"".join(identity()) + b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" + fragments
    out = cleaned(file_of(body + element(0xFFFCFFFC, "OB", CANARY), "1.2.840.10008.1.2.4.50"))
    assert out.endswith(fragments)
    with pytest.raises(ScanError, match="past the end"):
        cleaned(file_of(body[:-8], "1.2.840.10008.1.2.4.50"))


def test_pixels_of_an_icon_in_an_item_are_not_the_end() -> None:
    icon = element(0x00280010, "US", b"\1\0") + element(0x7FE00010, "OW", CANARY)
    data = file_of(image(sequence(0x00081140, icon, open_ended=True), sequence(0x00880200, icon)))
    out = read(cleaned(data))
    assert out.PixelData == PIXELS
    assert "PixelData" not in out.ReferencedImageSequence[0]


def test_a_deflated_file_comes_out_plain() -> None:
    engine = zlib.compressobj(wbits=-15)
    data = file_of(engine.compress(image()) + engine.flush(), DEFLATED)
    out = read(cleaned(data))
    assert out.file_meta.TransferSyntaxUID == EXPLICIT
    assert out.PixelData == PIXELS


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtl.scans.deidentify.MAX_INFLATED", 1 << 20)
    engine = zlib.compressobj(wbits=-15)
    packed = engine.compress(image() + bytes(4 << 20)) + engine.flush()
    with pytest.raises(ScanError) as caught:
        cleaned(file_of(packed, DEFLATED))
    assert caught.value.code == "too_large"


def test_big_endian_values_are_the_same_numbers() -> None:
    parts = [
        element(0x00080018, "UI", b"1.2.3.4", order=">"),
        element(0x00080020, "DA", b"20240229", order=">"),
        element(0x00280010, "US", b"\0\x08", order=">"),
        element(0x00280030, "DS", b"1\\1 ", order=">"),
        element(0x00289001, "UL", b"\0\0\1\0", order=">"),
        element(0x7FE00010, "OW", np.arange(64, dtype=">u2").tobytes(), order=">"),
    ]
    out = read(cleaned(file_of(b"".join(parts), BIG)))
    assert (out.Rows, out[0x00289001].value) == (8, 256)
    assert out.PixelData == np.arange(64, dtype="<u2").tobytes()


# --- what is refused --------------------------------------------------------------------------------------------------


def deep(levels: int, open_ended: bool) -> bytes:
    body = b""
    for _ in range(levels):
        body = sequence(0x00082218, body, open_ended=open_ended)
    return body


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("bad_header", b"no DICOM at all" * 40),
        ("bad_header", b""),
        ("truncated", file_of(image())[:-1]),
        ("truncated", file_of(image())[: 128 + 300]),
        ("truncated", file_of(b"".join(identity()) + element(0x00181030, "LO", b"x" * 40)[:-20])),
        ("truncated", file_of(image())[:140]),
        ("truncated", file_of(b"".join(identity()) + deep(3, True)[:-20])),
        ("too_deep", file_of(deep(200, True))),
        ("too_deep", file_of(deep(200, False))),
        ("dicomdir", file_of(sequence(0x00041220, b""))),
        ("bad_header", file_of(image(), "1.2.840.113619.5.2")),
        ("bad_header", file_of(image(element(0x00181030, "ZZ", CANARY)))),
        ("bad_header", file_of(image() + element(0x7FE00010, "OW", PIXELS))),
        ("bad_header", file_of(b"\xfe\xff\x0d\xe0\0\0\0\0" + image())),
        ("bad_header", file_of(b"not deflated", DEFLATED)),
        ("too_large", file_of(image(element(0x00080058, "UI", b"1.2\\1.3\\" * 3000)))),
        ("embedded_overlay", file_of(image(element(0x60000102, "US", b"\x0c\0")))),
    ],
)
def test_what_is_not_understood_is_refused(code: str, data: bytes) -> None:
    with pytest.raises(ScanError) as caught:
        deidentified(data, NAMES)
    assert caught.value.code == code
    assert "CANARY" not in caught.value.reason


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_keeps_no_secret(draw: st.DataObject) -> None:
    secret = b"4711SECRET"
    body = image(sequence(0x00081140, element(0x00100020, "LO", secret), open_ended=True), patient=secret)
    data = bytearray(file_of(body))
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(132, len(data) - 1))
        data[place] = draw.draw(st.integers(0, 255))
    try:
        deidentified(bytes(data), NAMES)
    except ScanError as error:
        assert error.code in ("bad_header", "truncated", "too_deep", "too_large", "dicomdir", "embedded_overlay")


# --- what was seen before ---------------------------------------------------------------------------------------------


def test_an_implicit_item_in_an_explicit_file_teaches_nothing_about_explicit_elements() -> None:
    names = Pseudonymiser(b"a key of this test alone")
    length = int.from_bytes(b"CS\x08\0", "little")  # what an explicit element has where an implicit one has its length
    inside = struct.pack("<HHI", 0x0008, 0x0008, length) + bytes(length)
    unknown = b"\x09\0\x10\x10UN\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" + inside
    unknown += b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    first = file_of(image(unknown))
    assert b"\x09\0\x10\x10" not in written(first, deidentified(first, names))
    second = file_of(image(element(0x00080008, "CS", b"ORIGINAL"), element(0x0040A160, "UT", CANARY * 200_000)))
    result = written(second, deidentified(second, names))
    assert CANARY not in result and b"4711" not in result


def test_files_of_several_patients_in_turns_are_each_as_if_they_were_alone() -> None:
    names = Pseudonymiser(b"a key of this test alone")
    nested = sequence(0x00081140, element(0x00100020, "LO", b"4712"), element(0x00080022, "DA", b"20240102"))
    files = [file_of(image(nested, patient=patient)) for patient in (b"4711", b"4712", b"", b"4711", b"4713")] * 3
    together = [written(data, deidentified(data, names)) for data in files]
    alone = [written(data, deidentified(data, Pseudonymiser(b"a key of this test alone"))) for data in files]
    assert together == alone
    assert len(set(together)) == 4


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for most in ("MAX_VALUES", "MAX_SEQUENCES", "MAX_PEOPLE", "MAX_KINDS"):
        monkeypatch.setattr(f"medtl.scans.deidentify.{most}", 4)
    names = Pseudonymiser(b"a key of this test alone")
    for number in range(40):
        reference = sequence(0x00081140, element(0x00081155, "UI", b"1.2.%d" % number))
        data = file_of(image(reference, patient=b"%d" % number, instance=b"1.2.3.%d" % number))
        assert written(data, deidentified(data, names)) == cleaned_with(data, b"a key of this test alone")
    memory = _memory(names, Rules(), False)
    assert len(memory.people) <= 4
    for person in memory.people.values():
        assert max(len(person.sequences), *map(len, person.known)) <= 4


def cleaned_with(data: bytes, key: bytes) -> bytes:
    return written(data, deidentified(data, Pseudonymiser(key)))


# --- real files -------------------------------------------------------------------------------------------------------


def real_files() -> list[Path]:
    root = Path(os.environ.get("MEDTL_TEST_DATA", "")) / "data" / "dicom"
    return [path for path in sorted(root.rglob("*")) if path.is_file() and path.read_bytes()[128:132] == b"DICM"]


def little(path: Path) -> bytes | None:
    """Give a file that the rules can be compared on, or ``None`` where they refuse it."""
    data = path.read_bytes()
    try:
        deidentified(data, NAMES)
    except ScanError:
        return None
    syntax = read(data).file_meta.TransferSyntaxUID
    return None if syntax in (BIG, DEFLATED) else data


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_real_files_are_treated_like_through_pydicom() -> None:
    compared = 0
    for path in real_files():
        data = little(path)
        if data is not None:
            assert_like_reference(data, Rules())
            compared += 1
    assert compared > 800


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_pixels_of_real_big_endian_and_deflated_files_stay() -> None:
    compared = 0
    for path in real_files():
        data = path.read_bytes()
        try:
            before = read(data)
            if before.file_meta.TransferSyntaxUID in (BIG, DEFLATED) and "PixelData" in before:
                np.testing.assert_array_equal(read(cleaned(data)).pixel_array, before.pixel_array)
                compared += 1
        except (ScanError, AttributeError):
            continue
    assert compared > 5


def complaints(path: Path) -> set[str]:
    told = subprocess.run(
        ["dciodvfy", "-new", str(path)], capture_output=True, text=True, errors="replace", check=False
    )
    lines = (told.stdout + told.stderr).splitlines()
    return {re.sub(r"<[0-9.]+>", "<UID>", line) for line in lines if line.startswith("Error")}


@pytest.mark.data
def test_dciodvfy_finds_no_new_errors(tmp_path: Path) -> None:
    assert shutil.which("dciodvfy"), "dciodvfy (dicom3tools) is wanted for this test"
    kinds: dict[str, Path] = {}
    for path in real_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, stop_before_pixels=True)
            key = f"{header.get('SOPClassUID')} {header.get('Manufacturer')}"
        if key not in kinds and little(path) is not None and header.file_meta.get("MediaStorageSOPClassUID"):
            kinds[key] = path
    assert len(kinds) > 10
    new: dict[str, set[str]] = {}
    for key, path in kinds.items():
        (tmp_path / "out").write_bytes(cleaned(path.read_bytes()))
        more = complaints(tmp_path / "out") - complaints(path)
        if more:
            new[key] = more
    assert not new


# --- NIfTI ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_text_and_extensions_go_and_voxels_stay(tmp_path: Path, kind: type) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    scan = kind(voxels, np.diag([1, 2, 3, 1]))
    for name in ("descrip", "aux_file", "intent_name"):
        scan.header[name] = "CANARY"
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"CANARY" * 40))
    nib.save(scan, tmp_path / "in.nii")
    data = (tmp_path / "in.nii").read_bytes()
    head, begins, length = strip_nifti(data)
    (tmp_path / "out.nii").write_bytes(head + data[begins : begins + length])
    assert begins + length == len(data)
    assert b"CANARY" in data and b"CANARY" not in (tmp_path / "out.nii").read_bytes()
    again = nib.load(tmp_path / "out.nii")
    np.testing.assert_array_equal(np.asarray(again.dataobj), voxels)
    np.testing.assert_array_equal(again.affine, scan.affine)


@pytest.mark.parametrize("head", [b"", b"\x5c\x01\0\0" + bytes(344), b"\x5c\x01\0\0", bytes(600)])
def test_what_is_no_nifti_is_refused(head: bytes) -> None:
    with pytest.raises(ScanError):
        strip_nifti(head)


# --- the key ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, derandomize=True)
@given(st.binary(min_size=16, max_size=90), st.text(max_size=40))
def test_a_pseudonym_is_an_hmac(key: bytes, raw: str) -> None:
    text = unicodedata.normalize("NFC", raw).strip()
    told = hmac.new(key, f"patient\0{text}".encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
    names = pickle.loads(pickle.dumps(Pseudonymiser(key)))
    assert names.name("patient", raw) == f"p-{told[:16]}"
    assert 1 <= names.days(raw) <= 3650
