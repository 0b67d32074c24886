"""Reading headers: as pydicom where pydicom is right, refusing where it is fooled."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, FileMetaDataset, Sequence, config, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
)

from functional_groups import item, place_two_echoes
from medtl.errors import ScanError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.headers import (
    DamagedError,
    Header,
    Plane,
    describe,
    header_from_dataset,
    read_doubtful_header,
    read_header,
)

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
PLACE = {"ImagePositionPatient": [-10.5, 20, 31.25], "ImageOrientationPatient": [1, 0, 0, 0, 0.8, -0.6]}
PIXEL_TAG = b"\xe0\x7f\x10\x00OW\0\0"


def slice_of(sop_class: str = CTImageStorage, syntax: str = ExplicitVRLittleEndian, **attributes: Any) -> Dataset:
    """Make one slice of a series, with sequences, private elements and an icon."""
    made = item(SOPClassUID=sop_class, SOPInstanceUID="1.2.3.4", StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.1")
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID, made.file_meta.MediaStorageSOPClassUID = syntax, sop_class
    made.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    made.update(item(
        PatientID="ID-1", PatientName="DOE^JANE", PatientSex="F", PatientAge="045Y", Modality="CT", InstanceNumber=7,
        Manufacturer="Maker", ManufacturerModelName="Model 1", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        SliceThickness=2.5, PixelSpacing=[0.5, 0.75], RescaleSlope=1, RescaleIntercept=-1024, AcquisitionNumber=3,
        WindowCenter=[40, 400], WindowWidth=[80, 2000], FrameOfReferenceUID="1.2.9", SamplesPerPixel=1, Rows=6,
        Columns=4, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=12, HighBit=11,
        PixelRepresentation=1, PixelData=np.arange(24, dtype=np.int16).tobytes(), **PLACE,
    ))  # fmt: skip
    icon = item(Rows=2, Columns=2, SamplesPerPixel=1, BitsAllocated=8, PixelData=b"icon")
    made.IconImageSequence = Sequence([icon])
    made.ReferencedImageSequence = Sequence([item(ReferencedSOPInstanceUID="1.2"), item()])
    made.ReferencedImageSequence.is_undefined_length = True
    made.private_block(0x0009, "MAKER", create=True).add_new(0x10, "OB", bytes(range(100)))
    made.update(item(**attributes))
    for element in made:
        if element.keyword in ("PixelData", "SmallestImagePixelValue"):
            element.VR = "OW"
    return made


def enhanced(syntax: str = ExplicitVRLittleEndian, frames: int = 4) -> Dataset:
    """Make an enhanced object of two positions and two echoes."""
    made = slice_of(EnhancedMRImageStorage, syntax, NumberOfFrames=frames, PixelData=bytes(48 * frames))
    for keyword in (*PLACE, "PixelSpacing", "SliceThickness", "RescaleSlope", "RescaleIntercept"):
        delattr(made, keyword)
    place_two_echoes(made, frames)
    for frame, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        group.PixelValueTransformationSequence = [item(RescaleSlope=2 + frame, RescaleIntercept=-5, RescaleType="US")]
    return made


def rle(frames: int = 1) -> Dataset:
    from pydicom.encaps import encapsulate

    made = slice_of(MRImageStorage, RLELossless, PixelData=encapsulate([b"not decoded here"] * frames))
    if frames > 1:
        made.NumberOfFrames = frames
    made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
    return made


def written(made: Dataset) -> bytes:
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def read(data: bytes, head: int = 32768) -> Header:
    return read_header(data[:head], len(data), lambda: data)


def refusal(data: bytes) -> DamagedError:
    with pytest.raises(DamagedError) as caught:
        read(data)
    return caught.value


def both(data: bytes) -> None:
    """Hold that the two ways agree, or refuse, in less than a second."""
    started = time.perf_counter()
    try:
        fast = read(data)
    except ScanError:
        fast = None
    middle = time.perf_counter()
    try:
        slow = read_doubtful_header(data)
    except ScanError:
        slow = None
    assert middle - started < 1, time.perf_counter() - middle < 1
    if fast is not None:
        assert slow == replace(fast, plain=False)


def mutated(data: bytes, seed: int, donor: bytes) -> bytes:
    """Damage a file: flipped bits, cuts, patched lengths, spliced chunks; most of it in the header."""
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = min(len(out) - 1, 128 + rng.randrange(rng.choice((100, 2000, len(out)))))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", bytes(4), b"\xfe\xff\x00\xe0", struct.pack("<I", at)))
        elif kind == 2 and rng.random() < 0.3:
            del out[at:]
        elif kind == 3:
            del out[at : at + rng.randint(1, 12)]
        else:
            start = rng.randrange(len(donor))
            out[at : at + rng.randint(0, 20)] = donor[start : start + rng.randint(1, 40)]
        if not out:
            break
    return bytes(out)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_slice_says_where_it_lies_and_what_its_values_mean(syntax: str) -> None:
    header = read(written(slice_of(syntax=syntax)))
    assert header.planes == (
        Plane(
            (-10.5, 20.0, 31.25), (1.0, 0.0, 0.0, 0.0, 0.8, -0.6), (0.5, 0.75), 2.5, None, 1.0, -1024.0, None,
            (("ImageType", "AXIAL"), ("AcquisitionNumber", "3")),
        ),
    )  # fmt: skip
    assert (header.rows, header.columns, header.frames, header.samples) == (6, 4, 1, 1)
    assert (header.bits_allocated, header.bits_stored, header.high_bit, header.signed) == (16, 12, 11, True)
    assert (header.patient, header.study, header.series, header.sop_instance) == ("ID-1", "1.2.3", "1.2.3.1", "1.2.3.4")
    assert (header.instance_number, header.window, header.issuer) == (7, (40.0, 80.0), None)
    assert header.plain == (syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian))
    assert not header.has_lut


def test_a_header_longer_than_the_start_asks_for_the_whole_file() -> None:
    data = written(slice_of())
    first = data.index(b"\x08\x00\x08\x00CS")
    for head in (first + 8, first + 50, first + 300, data.index(PIXEL_TAG) + 4, len(data)):
        assert read(data, head) == read(data)
    with pytest.raises(ScanError, match="changed"):
        read_header(data[:200], len(data), lambda: data[:-1])


@pytest.mark.parametrize("made", [slice_of(), slice_of(syntax=ImplicitVRLittleEndian), enhanced()])
def test_a_short_header_is_read_without_asking_for_more(made: Dataset) -> None:
    data = written(made)

    def never() -> bytes:
        raise AssertionError("asked for the whole file")

    header = read_header(data, len(data), never)
    assert header.pixel_offset is not None
    pixels = np.frombuffer(data, np.int16, header.rows * header.columns * header.frames, header.pixel_offset)
    assert np.array_equal(pixels.reshape(-1, 6, 4), dcmread(io.BytesIO(data)).pixel_array.reshape(-1, 6, 4))


def test_every_frame_of_an_enhanced_object_has_its_plane() -> None:
    header = read(written(enhanced()))
    assert [plane.position_mm for plane in header.planes] == [(0, 0, 0), (0, 0, 0), (0, 0, 3), (0, 0, 3)]
    assert [plane.slope for plane in header.planes] == [2, 3, 4, 5]
    assert {plane.spacing_mm for plane in header.planes} == {(0.5, 0.75)}
    assert {plane.orientation for plane in header.planes} == {(1, 0, 0, 0, 1, 0)}
    assert {(plane.thickness_mm, plane.between_mm) for plane in header.planes} == {(2, 3)}
    assert dict(header.planes[1].splits) == {
        "ImageType": "AXIAL", "StackID": "1", "EffectiveEchoTime": "20", "InversionTimeIndex": "2",
    }  # fmt: skip


@pytest.mark.parametrize("times", [(1, 2, 3, 3, 4, 5), (1, 1, 1, 2, 2, 3), (2, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize("dimension", ["times", "bogus"])
def test_a_dimension_stands_in_for_an_attribute_that_tears_volumes_apart(times: Sequence[int], dimension: str) -> None:
    """Three places twice; the times go on from slice to slice."""
    made = enhanced(frames=6)
    made.DimensionIndexSequence = [item(DimensionIndexPointer=0x00209057), item(DimensionIndexPointer=0x00209128)]
    for frame, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3.0 * (frame % 3)]
        group.MREchoSequence[0].EffectiveEchoTime = 10.0
        content = group.FrameContentSequence[0]
        content.TemporalPositionIndex = times[frame]
        counted = frame // 3 + 1 if dimension == "times" else frame % 2 + 1 + (frame == 5)
        content.DimensionIndexValues = [frame % 3 + 1, counted]
    planes = read(written(made)).planes
    found = [[value for key, value in plane.splits if key.startswith("TemporalPosition")] for plane in planes]
    if dimension == "times":
        assert found == [["1"]] * 3 + [["2"]] * 3
    elif len(set(times)) > 1:  # the dimension tears them apart as well
        assert found == [[str(time)] for time in times]
    else:  # nothing else is said; what comes of it repeats places, and is refused
        assert found == [["1"], ["2"], ["1"], ["2"], ["1"], ["3"]]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_an_enhanced_object_is_the_same_in_every_transfer_syntax(syntax: str) -> None:
    assert read(written(enhanced(syntax))).planes == read(written(enhanced())).planes


def test_functional_groups_must_be_of_every_frame() -> None:
    made = enhanced()
    made.NumberOfFrames = 3
    assert refusal(written(made)).code == "bad_header"


@pytest.mark.parametrize(
    ("attributes", "split"),
    [
        ({"EchoTime": "30.0"}, ("EchoTime", "30")),
        ({"DiffusionBValue": 1000.0}, ("DiffusionBValue", "1000")),
        ({"TemporalPositionIdentifier": 4}, ("TemporalPositionIdentifier", "4")),
        ({"TriggerTime": 12.5}, ("TriggerTime", "12.5")),
        ({"InversionTime": 900}, ("InversionTime", "900")),
        ({"FlipAngle": 15}, ("FlipAngle", "15")),
        ({"ComplexImageComponent": "PHASE"}, ("ComplexImageComponent", "PHASE")),
        ({"ImageType": ["DERIVED", "PRIMARY", "P", "FFE"]}, ("ImageType", "P\\FFE")),
    ],
)
def test_what_parts_a_series_honestly_is_said(attributes: dict[str, Any], split: tuple[str, str]) -> None:
    assert split in read(written(slice_of(MRImageStorage, **attributes))).planes[0].splits


@pytest.mark.parametrize(
    ("attributes", "declared"),
    [
        ({}, None),
        ({"ImagesInAcquisition": 22}, 22),
        ({"ImagesInAcquisition": 22, "NumberOfSlices": 47}, 22),
        ({"ImagesInAcquisition": 22, "NumberOfSlices": 47, "Modality": "PT"}, 47),
        ({"ImagesInAcquisition": None}, None),
    ],
)
def test_how_many_images_there_must_be_is_read(attributes: dict[str, Any], declared: int | None) -> None:
    assert read(written(slice_of(**attributes))).declared == declared


@pytest.mark.parametrize(
    ("tag", "vr", "raw"),
    [
        (0x00180082, "DS", b"n/a "),
        (0x00180082, "DS", b"900,5 "),
        (0x00180082, "LO", b"none"),
        (0x00181314, "DS", b"90 deg"),
        (0x00181314, "DS", b"1e10"),
        (0x00201002, "IS", b"all "),
        (0x00540081, "LO", b"many"),
        (0x00651009, "FD", b"\0\0\0\0\0\0\xf8\x7f"),
        (0x00651050, "DS", b"x "),
    ],
)
@pytest.mark.parametrize("modality", ["MR", "PT"])
def test_what_no_scan_needs_may_say_anything(tag: int, vr: str, raw: bytes, modality: str) -> None:
    """Both ways to read a header leave it out; without it, only places that repeat are refused."""
    made = slice_of(MRImageStorage, Modality=modality)
    made.private_block(0x0065, "Image Private Header", create=True)
    plain = read(written(made))
    made._dict[BaseTag(tag)] = RawDataElement(BaseTag(tag), vr, len(raw), raw, 0, False, True)
    data = written(made)
    both(data)
    odd = read(data)
    assert (odd.planes, odd.declared, odd.mosaic) == (plain.planes, None, False)


@pytest.mark.parametrize(
    ("group", "creator", "element", "vr", "value", "split"),
    [
        (0x0019, "SIEMENS MR HEADER", 0x0C, "IS", "700", ("DiffusionBValue", "700")),
        (0x0043, "GEMS_PARM_01", 0x39, "IS", [1000000800, 8, 0, 0], ("DiffusionBValue", "800")),
        (0x0043, "GEMS_PARM_01", 0x2F, "SS", 1, ("ComplexImageComponent", "PHASE")),
        (0x0065, "Image Private Header", 0x09, "FD", 900.0, ("DiffusionBValue", "900")),
        (0x0065, "Image Private Header", 0x37, "FD", [0.0, 0.6, 0.8], ("DiffusionGradientOrientation", "0\\0.6\\0.8")),
        (0x2001, "Philips Imaging DD 001", 0x03, "FL", 600.0, ("DiffusionBValue", "600")),
    ],
)
@pytest.mark.parametrize("syntax", SYNTAXES[:3])
def test_private_elements_count_only_under_their_creator(
    syntax: str, group: int, creator: str, element: int, vr: str, value: Any, split: tuple[str, str]
) -> None:
    for name, there in ((creator, True), ("SOMEBODY ELSE", False)):
        made = slice_of(MRImageStorage, syntax)
        made.private_block(group, name, create=True).add_new(element, vr, value)
        assert (split in read(written(made)).planes[0].splits) == there


@pytest.mark.parametrize(
    ("group", "creator", "element", "vr", "raw"),
    [
        (0x0019, "SIEMENS MR HEADER", 0x0C, "IS", b"many"),
        (0x0019, "SIEMENS MR HEADER", 0x0E, "FD", b"\0\0\0\0\0\0\xf8\x7f"),
        (0x0043, "GEMS_PARM_01", 0x39, "IS", b"many"),
        (0x2001, "Philips Imaging DD 001", 0x03, "FL", b"\0\0\xc0\x7f"),
    ],
)
def test_a_b_value_that_is_none_is_refused(group: int, creator: str, element: int, vr: str, raw: bytes) -> None:
    made = slice_of(MRImageStorage)
    made.private_block(group, creator, create=True)
    tag = BaseTag(group << 16 | 0x1000 | element)
    made._dict[tag] = RawDataElement(tag, vr, len(raw), raw, 0, False, True)
    assert refusal(written(made)).code == "bad_header"


def test_frames_of_a_dose_grid_lie_at_its_offsets_and_no_others_are_placed() -> None:
    many = {"NumberOfFrames": 3, "PixelData": bytes(144)}
    placed = read(written(slice_of(GridFrameOffsetVector=[0, 2, 4], **many)))
    assert [plane.position_mm for plane in placed.planes] == [
        pytest.approx((-10.5, 20 + 0.6 * way, 31.25 + 0.8 * way)) for way in (0, 2, 4)
    ]
    assert [plane.position_mm for plane in read(written(slice_of(**many))).planes] == [None] * 3


def test_a_mosaic_that_the_scanner_took_apart_is_none() -> None:
    """Siemens XA leaves the word in the image type; source: rordenlab/dcm2niix issue 553."""
    made = enhanced()
    made.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    data = written(made)
    both(data)
    assert not read(data).mosaic
    thickness = read(data).planes[0].thickness_mm
    assert thickness
    for step in (0, 0.1 * thickness):  # frames that each are a whole mosaic share their place, or follow a moving head
        for frame, group in enumerate(made.PerFrameFunctionalGroupsSequence):
            group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, frame * step]
        assert read(written(made)).mosaic
    one = enhanced(frames=1)
    one.ImageType = made.ImageType
    assert read(written(one)).mosaic
    grids = enhanced()
    block = grids.private_block(0x0065, "Image Private Header", create=True)
    block.add_new(0x50, "DS", "9")
    assert read(written(grids)).mosaic


def test_a_mosaic_a_lut_and_an_executable_are_recognised() -> None:
    made = slice_of(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    made.ModalityLUTSequence = [item(LUTExplanation="x")]
    data = written(made)
    assert read(data).mosaic
    assert read(data).has_lut
    assert read(data).executable is None
    assert read(b"MZ" + data[2:]).executable == "PE"
    assert read(b"\x7fELF" + data[4:]).executable == "ELF"


def test_a_patient_of_another_alphabet_is_the_same_in_either_way() -> None:
    made = slice_of(SpecificCharacterSet="ISO_IR 144", PatientID="Иванов")
    assert read(written(made)).patient == "Иванов"


def test_a_data_set_without_preamble_is_read_and_other_bytes_are_not_dicom() -> None:
    data = written(slice_of(syntax=ImplicitVRLittleEndian))
    start = data.index(b"\x08\x00\x08\x00")
    assert read(data[start:]).planes == read(data).planes
    for other in (b"", b"{}", b"\x08\x00", b"\x08\x00hello, this is a text", b"MZ" + bytes(500), data[:100]):
        assert refusal(other).code == "not_dicom"


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"PixelData": bytes(46)}, "truncated"),
        ({"NumberOfFrames": 2}, "truncated"),
        ({"NumberOfFrames": 900_000_000, "PixelData": b""}, "too_large"),
        ({"NumberOfFrames": 0}, "bad_header"),
        ({"Rows": 0}, "bad_size"),
        ({"Rows": None}, "bad_header"),
        ({"BitsAllocated": 12}, "bad_header"),
        ({"BitsStored": 17}, "bad_header"),
        ({"PixelRepresentation": None}, "bad_header"),
        ({"SOPClassUID": None}, None),
        ({"SliceThickness": None}, None),
    ],
)
def test_a_header_that_does_not_fit_its_pixels_is_refused(attributes: dict[str, Any], code: str | None) -> None:
    data = written(slice_of(**attributes))
    both(data)
    if code is None:
        assert read(data)
    else:
        assert refusal(data).code == code


@pytest.mark.parametrize("text", ["nan", "inf", "1e99", "0.5x", "1_0", "--1", "1,5", "\\5"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    data = written(slice_of(RescaleSlope="123456"))
    raw = data.replace(b"123456", text.encode().ljust(6))
    assert raw != data
    both(raw)
    assert refusal(raw).code == "bad_header"


def test_one_bit_and_subsampled_pixels_are_counted_as_they_are_stored() -> None:
    for attributes in (
        {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "PixelRepresentation": 0, "PixelData": b"abc\0"},
        {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0, "SamplesPerPixel": 3,
         "PhotometricInterpretation": "YBR_FULL_422", "PlanarConfiguration": 0, "PixelData": bytes(48)},
    ):  # fmt: skip
        assert read(written(slice_of(**attributes))).pixel_length in (4, 48)
        attributes["PixelData"] = attributes["PixelData"][:-2]  # type: ignore[index]
        assert refusal(written(slice_of(**attributes))).code == "truncated"


def test_lengths_that_pydicom_believes_are_refused() -> None:
    data = written(slice_of())
    at = data.index(PIXEL_TAG) + 8
    long_pixels = data[:at] + struct.pack("<I", 4000) + data[at + 4 :]
    cut_off = data[:-20]
    trailing = data + struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, 99)
    for bad, code in ((long_pixels, "length_past_end"), (cut_off, "truncated"), (trailing, "length_past_end")):
        assert len(dcmread(io.BytesIO(bad)).PixelData) <= 48  # without a word
        assert refusal(bad).code == code
    padded = data + struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, 4) + bytes(4)
    assert replace(read(padded), file_size=len(data)) == read(data)
    assert replace(read(data + bytes(512)), file_size=len(data)) == read(data)


def test_encapsulated_pixels_must_end_and_hold_every_frame() -> None:
    data = written(rle())
    assert (read(data).pixel_length, read(data).plain) == (None, True)
    assert data[read(data).pixel_offset :].startswith(b"\xfe\xff\x00\xe0")
    made = rle(2)
    assert read(written(made)).frames == 2
    made.NumberOfFrames = 3
    for bad in (data[:-8], data[:-20], written(made)):
        assert refusal(bad).code == "truncated"


def test_deep_nesting_costs_no_time_and_no_recursion() -> None:
    data = written(slice_of())
    deep = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    at = data.index(b"\x08\x00\x08\x00CS")
    started = time.perf_counter()
    assert refusal(data[:at] + deep * 200_000).code == "too_deep"
    assert time.perf_counter() - started < 1


def test_a_deflated_bomb_is_refused() -> None:
    made = slice_of(syntax=DeflatedExplicitVRLittleEndian)
    made.private_block(0x0009, "MAKER", create=True).add_new(0x11, "OB", bytes(70 << 20))
    started = time.perf_counter()
    data = written(made)
    assert len(data) < 1 << 20
    started = time.perf_counter()
    assert refusal(data).code == "too_large"
    assert time.perf_counter() - started < 1


def test_a_damaged_file_still_tells_its_series() -> None:
    data = written(slice_of())
    broken = pickle.loads(pickle.dumps(refusal(data[:-20])))
    assert (broken.code, broken.header.series, broken.header.rows) == ("truncated", "1.2.3.1", 6)
    bad = data.replace(b"-10.5", b"-1x.5")
    assert (refusal(bad).header.series, refusal(bad).header.patient) == ("1.2.3.1", "ID-1")
    cut_in_the_header = data[: data.index(b"\x28\x00\x10\x00US")]
    assert refusal(cut_in_the_header[:-1]).header.study == "1.2.3"
    assert refusal(b"x").header is None or refusal(b"x").header.series is None
    assert "ID-1" not in str(broken) + str(refusal(bad))


def test_a_header_is_described_by_pseudonyms_and_what_does_not_identify() -> None:
    names = Pseudonymiser(b"a key of enough bytes")
    header = read(written(slice_of(PatientSex="X", PatientAge="093Y")))
    found = describe(header, names)
    assert found["patient"] == names.name("patient", "ID-1")
    assert (found["sex"], found["age_years"], found["modality"]) == (None, 90.0, header.modality)
    assert found["keys"] == tuple(names.uid_key(u) for u in (header.sop_instance, header.series, header.study) if u)
    elsewhere = describe(read(written(slice_of(IssuerOfPatientID="H"))), names)
    assert elsewhere["patient"] not in (found["patient"], None)
    assert describe(read(written(slice_of(PatientID=""))), names)["patient"] is None


@pytest.mark.parametrize("syntax", SYNTAXES[:2])
def test_a_data_set_in_memory_gives_the_same_header(syntax: str) -> None:
    for made in (slice_of(syntax=syntax), enhanced(syntax)):
        data = written(made)
        given = header_from_dataset(made, len(data))
        expected = replace(read(data), plain=False, pixel_offset=None, pixel_length=None)
        assert given == expected


MADE: dict[str, Callable[[], Dataset]] = {
    "explicit": slice_of,
    "implicit": lambda: slice_of(MRImageStorage, ImplicitVRLittleEndian, EchoTime=3),
    "big endian": lambda: slice_of(syntax=ExplicitVRBigEndian),
    "deflated": lambda: slice_of(syntax=DeflatedExplicitVRLittleEndian),
    "enhanced": enhanced,
    "encapsulated": rle,
}


@pytest.mark.parametrize("name", MADE)
def test_both_ways_agree_on_damaged_files_or_refuse(name: str) -> None:
    data, donor = written(MADE[name]()), written(slice_of(PatientID="ID-2"))
    both(data)
    refused = 0
    for seed in range(400):
        bad = mutated(data, seed, donor)
        both(bad)
        try:
            read(bad)
        except DamagedError:
            refused += 1
    assert 50 < refused < 400


def real_files() -> Iterator[Path]:
    folder = Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "dicom"
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.data
def test_every_real_file_reads_the_same_in_both_ways_and_as_pydicom_says() -> None:
    read_well = plain = 0
    for path in real_files():
        data = path.read_bytes()
        both(data)
        try:
            header = read(data)
        except DamagedError:
            continue
        read_well, plain = read_well + 1, plain + header.plain
        compare(header, data)
    assert plain > 800
    assert read_well > 860


def compare(header: Header, data: bytes) -> None:
    """Hold a header against what pydicom's own attributes say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.settings.reading_validation_mode = config.IGNORE
        said = dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
    assert header.series == (said.get("SeriesInstanceUID") or None)
    assert header.patient == (str(said.get("PatientID", "")).strip() or None)
    assert (header.rows, header.columns) == (said.get("Rows") or 0, said.get("Columns") or 0)
    if header.frames == 1 and "PerFrameFunctionalGroupsSequence" not in said:
        for value, keyword in (
            (header.planes[0].position_mm, "ImagePositionPatient"),
            (header.planes[0].orientation, "ImageOrientationPatient"),
            (header.planes[0].spacing_mm, "PixelSpacing"),
        ):
            assert list(value or ()) == [float(number) for number in said.get(keyword) or ()]
        assert header.planes[0].slope == said.get("RescaleSlope")


@pytest.mark.data
def test_pixels_lie_where_the_header_says() -> None:
    seen = 0
    for path in list(real_files())[::7]:
        data = path.read_bytes()
        try:
            header = read(data)
        except DamagedError:
            continue
        if header.pixel_offset is None or header.pixel_length is None or header.bits_allocated not in (8, 16, 32):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = dcmread(io.BytesIO(data), force=True)
        assert (
            data[header.pixel_offset : header.pixel_offset + header.pixel_length]
            == said[header.pixel_keyword or ""].value
        )
        if header.samples == 1 and header.plain and "pydicom" not in path.parts:  # those are odd on purpose
            kind = np.dtype(f"<{'i' if header.signed else 'u'}{header.bits_allocated // 8}")
            count = header.frames * header.rows * header.columns
            pixels = np.frombuffer(data, kind, count, header.pixel_offset)
            assert np.array_equal(pixels, said.pixel_array.reshape(-1))
            seen += 1
    assert seen > 50


@pytest.mark.data
def test_both_ways_agree_on_damaged_real_files_or_refuse() -> None:
    small = [path.read_bytes() for path in list(real_files())[::9] if path.stat().st_size < 600_000]
    assert len(small) > 30
    for number, data in enumerate(small):
        for seed in range(25):
            both(mutated(data, 1000 * number + seed, small[seed % len(small)]))


def test_a_file_that_was_never_written_to_its_end_is_refused_at_once() -> None:
    data = bytes(128) + b"DICM" + bytes(200_000_000)
    since = time.monotonic()
    with pytest.raises(DamagedError, match="zeros"):
        read_header(data[:32_768], len(data), lambda: data)
    assert time.monotonic() - since < 10
