"""What becomes of each attribute when a scan is de-identified: DICOM PS3.15 Annex E as a function of (tag, VR).

The table of the Basic Application Level Confidentiality Profile is dicom-anonymizer's (``dicomfields_2026c``); the
options and everything that the table is silent about are decided here, and they fail closed: an attribute that the
DICOM dictionary does not know, or whose VR does not fit its tag, is removed. Where the table leaves a choice (X/Z,
X/D, X/Z/D) the form that breaks no information object is taken: an empty or a dummy value.

Pixels are out of reach of any table: text that is burned into them stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Literal

Dates = Literal["shift", "retain", "remove"]


@dataclass(frozen=True, slots=True)
class Rules:
    """Which options of PS3.15 Annex E are taken; the defaults are the Basic Profile with shifted dates."""

    dates: Dates = "shift"  # shift: whole days per patient, times kept (113107); retain (113106); remove
    retain_uids: bool = False  # 113110
    retain_patient_characteristics: bool = False  # 113108: age (90 and above as 090Y), sex, size, weight ...
    retain_device: bool = False  # 113109
    retain_institution: bool = False  # 113112
    retain_safe_private: bool = False  # 113111: numbers that the standard's own list calls safe
    descriptor_words: tuple[str, ...] = ()  # 113105: words that may stay in descriptions; none: they are removed

    def __post_init__(self) -> None:
        if self.dates not in ("shift", "retain", "remove"):
            raise ValueError("dates is shift, retain or remove")
        if not all(re.fullmatch(r"[A-Za-z0-9.+/-]{1,64}", word) for word in self.descriptor_words):
            raise ValueError("descriptor_words are single words of ASCII letters, digits and . + / -")

    @property
    def codes(self) -> tuple[tuple[str, str], ...]:
        """Give (code, meaning) of the profile and the options taken. Source: DICOM PS3.16 CID 7050."""
        taken = {
            "113100": True,
            "113105": bool(self.descriptor_words),
            "113106": self.dates == "retain",
            "113107": self.dates == "shift",
            "113108": self.retain_patient_characteristics,
            "113109": self.retain_device,
            "113110": self.retain_uids,
            "113111": self.retain_safe_private,
            "113112": self.retain_institution,
        }
        return tuple((code, _MEANINGS[code]) for code, yes in taken.items() if yes)


_MEANINGS = {
    "113100": "Basic Application Confidentiality Profile",
    "113105": "Clean Descriptors Option",
    "113106": "Retain Longitudinal Temporal Information Full Dates Option",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
    "113109": "Retain Device Identity Option",
    "113110": "Retain UIDs Option",
    "113111": "Retain Safe Private Option",
    "113112": "Retain Institution Identity Option",
}


class Action(IntEnum):
    """What is done with one element."""

    KEEP = 0
    DROP = 1  # X
    EMPTY = 2  # Z
    DUMMY = 3  # D
    UID = 4  # U: keyed UID, well-known ones kept
    DATE = 5  # DA, DT: shifted
    CHECK = 6  # kept where the value has the form of its VR, else as the table says
    AGE = 7  # kept, above 89 as 090Y
    CLEAN = 8  # only the allowed words stay
    NAME = 9  # Patient's Name: the patient's pseudonym
    PATIENT = 10  # Patient ID: the patient's pseudonym
    WALK = 11  # sequence: the rules for each item
    SCRUB = 12  # sequence that is identifying as a whole: its structure stays, its content becomes dummies
    PRIVATE = 13  # kept if its creator and number are on the safe list
    PIXELS = 14
    OVERLAY_BIT = 15  # removed; graphics hidden in the pixels' upper bits are refused
    NOTE = 16  # remembered until the patient is known, removed
    REFUSE = 17


PATIENT_NAME, PATIENT_ID, ISSUER = 0x00100010, 0x00100020, 0x00100021
CHARSET, SOP_CLASS, SOP_INSTANCE, STUDY_INSTANCE = 0x00080005, 0x00080016, 0x00080018, 0x0020000D
PIXEL_DATA = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
IDENTITY_REMOVED, METHOD_TEXT, DEIDENTIFICATION_CODES, TIME_MODIFIED = 0x00120062, 0x00120063, 0x00120064, 0x00280303
MARKS = frozenset({IDENTITY_REMOVED, METHOD_TEXT, DEIDENTIFICATION_CODES, TIME_MODIFIED})  # written anew

TEXT = frozenset(["AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"])
NUMBERS = frozenset(["AT", "FD", "FL", "SL", "SS", "SV", "UL", "US", "UV", "OB", "OD", "OF", "OL", "OV", "OW"])
# 32-bit length. Source: PS3.5 7.1.2
LONG = frozenset(["OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"])
VRS = TEXT | NUMBERS | {"SQ", "UN"}

# Retain Device Identity, Institution Identity, Patient Characteristics: the cells K of PS3.15 Table E.1-1, and no other
# (a C would want cleaning). Newer rows whose cell is not known here stay out: what is not in these lists is removed.
_DEVICE = frozenset(
    {
        *(0x00081010, 0x00181000, 0x00181002, 0x00181004, 0x00181005, 0x00181007, 0x00181008, 0x00181009, 0x0018100A),
        *(
            0x0018100B,
            0x0018700A,
            0x00189367,
            0x00189371,
            0x00189373,
            0x00321020,
            0x00321021,
            0x00400001,
            0x00400010,
            0x00400011,
            0x00400241,
        ),
        *(0x00400242, 0x00404025, 0x00404027, 0x00404028, 0x00404030, 0x00500020, 0x3010002D, 0x30100043, 0x30080105),
        *(0x300A00B2, 0x300A0216),
    }
)
_INSTITUTION = frozenset(
    {
        *(0x00080080, 0x00080081, 0x00080082, 0x00081040, 0x00081041),
        *(0x00120030, 0x00120031, 0x00120060, 0x00120081),
    }
)
_PATIENT = frozenset({0x00100040, 0x00101010, 0x00101020, 0x00101030, 0x00102160, 0x00102203, 0x001021A0, 0x001021C0})
_AGE = 0x00101010

# The birth date is no longitudinal date: it is in the table and in neither date option.
_BIRTH = frozenset({0x00100030, 0x00100032})
_DESCRIPTOR = re.compile(
    r"(Description|Comments?|Label|Notes|Narrative)$|^(ProtocolName|ContrastBolusAgent|ReasonForStudy|RTPlanName"
    r"|StructureSetName|ROIName|ContentLabel|AcquisitionProtocolName|TreatmentSite|TreatmentSites)$"
)

_REFERENCED_STUDY = 0x00081110

# Not in the table, yet they identify or can: alternative calendars of birth and death, encrypted originals, contacts.
_BEYOND = {
    0x00100033: "X",
    0x00100034: "X",
    0x00100035: "X",
    0x04000500: "X",  # EncryptedAttributesSequence
    0x0074100C: "X",
    0x21000160: "X",
    0x30020020: "Z",
    0x00880130: "Z",
    0x00081190: "X",
}
# UIDs of a kind, not of an instance, and texts of coding schemes: needed to read codes at all.
_KIND_UID = re.compile(r"SOPClass|TransferSyntax|CodingSchemeUID|ContextUID|MappingResourceUID|CreatorVersionUID")
_CODING = frozenset({0x0008010E, 0x00080114, 0x00080115, 0x00080116, 0x00080120})
_FREE = frozenset({"AE", "LT", "PN", "ST", "UR", "UT"})  # outside the table: what a person types, or an address

# (creator, group, element in block): what reading the pixels needs, all numbers or codes.
# Source: PS3.15 Table E.3.10-1, the rows on mosaics, diffusion, standardised uptake and pitch.
SAFE_PRIVATE = frozenset(
    (creator, group, element)
    for creator, group, elements in (
        ("SIEMENS MR HEADER", 0x0019, (0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x27, 0x28, 0x29)),
        ("Philips Imaging DD 001", 0x2001, (0x03, 0x04)),
        ("Philips PET Private Group", 0x7053, (0x00, 0x09)),
        ("GEMS_ACQU_01", 0x0019, (0x23, 0x24, 0x27, 0xBB, 0xBC, 0xBD)),
        ("GEMS_PARM_01", 0x0043, (0x39,)),
    )
    for element in elements
)
SAFE_CREATORS = frozenset((creator, group) for creator, group, _ in SAFE_PRIVATE)
SAFE_VRS = NUMBERS - {"OB", "AT"} | {"DS", "IS", "CS"}


@dataclass(frozen=True, slots=True)
class Profile:
    """The table under one set of rules.

    ``dictionary`` is tag -> (VRs, keyword); ``table`` is tag -> the profile's letters (``X``, ``X_Z_D`` ...).
    """

    rules: Rules
    table: Mapping[int, str]
    dictionary: Mapping[int, tuple[tuple[str, ...], str]]
    words: frozenset[str] = field(default_factory=frozenset)

    def vr(self, tag: int) -> str:
        """Give the VR that the dictionary has for a tag, ``UN`` where it has none."""
        known = self.dictionary.get(tag)
        return known[0][-1] if known else "UN"

    def action(self, tag: int, vr: str, scrub: bool = False) -> Action:
        """Decide on one element; ``scrub``: inside a sequence that is identifying as a whole."""
        group, element = tag >> 16, tag & 0xFFFF
        if group in (0x0004, 0xFFFE) or vr not in VRS:
            return Action.REFUSE  # a directory of a medium, a stray delimiter, or no VR: not understood
        if tag in PIXEL_DATA:
            return Action.PIXELS if vr in NUMBERS else Action.REFUSE
        if element == 0 or group in (0x0000, 0x0002) or tag in MARKS:
            return Action.DROP
        if group % 2:
            return Action.PRIVATE if self.rules.retain_safe_private and not scrub else Action.DROP
        if 0x5000 <= group <= 0x50FF or 0x6000 <= group <= 0x60FF:
            return Action.OVERLAY_BIT if group >= 0x6000 and element == 0x0102 else Action.DROP
        if vr == "UN":
            return self._unknown(tag, scrub)
        if not self._fits(tag, vr):
            return Action.DROP
        if vr == "SQ":
            return self._sequence(tag, scrub)
        return self._value(tag, vr, scrub)

    def base(self, tag: int, vr: str) -> Action:
        """Give what the table says without options: what a value gets that an option cannot keep."""
        letters = self.table.get(tag, "X" if vr in ("DS", "IS") else "D")  # a made-up number is worse than none
        if "D" in letters:
            return Action.DUMMY
        return Action.EMPTY if "Z" in letters else Action.DROP

    def _unknown(self, tag: int, scrub: bool) -> Action:
        """Decide on a known element that a converter wrote as UN: as on its own VR, and only if it has its form."""
        vr = self.vr(tag)
        if vr in ("SQ", "UN"):
            return Action.DROP
        action = self.action(tag, vr, scrub)
        return Action.CHECK if action == Action.KEEP else action

    def _fits(self, tag: int, vr: str) -> bool:
        known = self.dictionary.get(tag)
        if known is None:
            return tag in self.table
        vrs = known[0]
        return vr in vrs or any(vr in family and not family.isdisjoint(vrs) for family in (TEXT, NUMBERS))

    def _sequence(self, tag: int, scrub: bool) -> Action:
        letters = self.table.get(tag)
        if letters is None or "U" in letters or self._retained(tag):
            return Action.SCRUB if scrub else Action.WALK
        if "D" in letters:
            return Action.SCRUB
        return Action.EMPTY if "Z" in letters else Action.DROP

    def _retained(self, tag: int) -> bool:
        rules = self.rules
        return (
            (rules.retain_device and tag in _DEVICE)
            or (rules.retain_institution and tag in _INSTITUTION)
            or (rules.retain_patient_characteristics and tag in _PATIENT)
        )

    def _value(self, tag: int, vr: str, scrub: bool) -> Action:
        special = _SPECIAL.get(tag)
        if special is not None and vr in TEXT:
            return special
        letters = self.table.get(tag)
        keyword = self.dictionary[tag][1] if tag in self.dictionary else ""
        if vr == "UI":
            kind = letters is None and _KIND_UID.search(keyword)
            if letters == "U" or letters is None:
                return Action.CHECK if kind or self.rules.retain_uids else Action.UID
        if vr in ("DA", "DT", "TM") and self.rules.dates != "remove" and tag not in _BIRTH:
            return Action.CHECK if vr == "TM" or self.rules.dates == "retain" else Action.DATE
        if self._retained(tag):
            return Action.AGE if tag == _AGE else Action.CHECK
        if letters is not None:
            if self.words and vr in TEXT and _DESCRIPTOR.search(keyword):
                return Action.CLEAN
            base = Action.DROP if letters in ("X", "U", "X_Z_U_STAR") else self.base(tag, vr)
            return Action.UID if vr == "UI" and base == Action.DUMMY else base
        return self._beyond_the_table(tag, vr, scrub)

    def _beyond_the_table(self, tag: int, vr: str, scrub: bool) -> Action:
        if tag in _CODING and not scrub:
            return Action.KEEP
        vrs = self.dictionary[tag][0]
        if vr in ("DA", "DT", "TM") or vr in _FREE or not _FREE.isdisjoint(vrs):
            return Action.CLEAN if self.words and vr in ("LT", "ST", "UT") else Action.DUMMY
        if scrub:
            structure = vr == "CS" or (vr in NUMBERS and not vr.startswith("O"))
            return Action.KEEP if structure else Action.DUMMY
        return Action.KEEP


_SPECIAL = {
    PATIENT_NAME: Action.NAME,
    PATIENT_ID: Action.PATIENT,
    ISSUER: Action.NOTE,
    CHARSET: Action.CHECK,
    SOP_CLASS: Action.CHECK,
}


@lru_cache(maxsize=16)
def profile(rules: Rules) -> Profile:
    """Give the profile under these rules."""
    return Profile(rules, _table(), _dictionary(), frozenset(word.lower() for word in rules.descriptor_words))


@lru_cache(maxsize=1)
def _table() -> Mapping[int, str]:
    from dicomanonymizer.dicom_anonymization_databases import dicomfields_2026c as source

    table = dict(_BEYOND)
    for letters in ("X", "X_Z", "X_D", "X_Z_D", "X_Z_U_STAR", "Z", "Z_D", "D", "U"):
        for tag in getattr(source, f"{letters}_TAGS"):
            if len(tag) == 2:  # four numbers are a mask: overlays and curves, removed as groups
                table[tag[0] << 16 | tag[1]] = letters
    table[_REFERENCED_STUDY] = "X"  # of X/Z: many objects forbid it to be empty
    return table


@lru_cache(maxsize=1)
def _dictionary() -> Mapping[int, tuple[tuple[str, ...], str]]:
    from pydicom._dicom_dict import DicomDictionary

    return {
        tag: (tuple(entry[0].split(" or ")), entry[4]) for tag, entry in DicomDictionary.items() if entry[0] != "NONE"
    }
