"""What is wrong with a scan is found, under the right code, and what is right passes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medtl
from medtl.config import ScansConfig
from medtl.errors import ConfigError
from medtl.scans import checks
from medtl.scans.checks import CODES, check_header, check_series, decide, drop_copies, examine
from medtl.scans.geometry import Finding, Volume, assemble, build, group
from medtl.scans.headers import Header, Part, Plane

CT, MR, SC = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "4", "7"))
CONFIG = ScansConfig()


def image(**changes: Any) -> Header:
    """Give the header of one axial CT slice of 16 x 12 pixels; changes of its plane go by the plane's names."""
    plane = Plane((-10.0, -20.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.5, 0.5), 2.0, None, 1.0, -1024.0, "HU")
    of_plane = {name: changes.pop(name) for name in list(changes) if name in Plane.__dataclass_fields__}
    header = Header(
        file_size=1000, transfer_syntax="1.2.840.10008.1.2.1", sop_class=CT, sop_instance="1.9", series="1.2",
        study="1.1", patient="P", issuer=None, frame_of_reference="1.3", modality="CT",
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"), instance_number=1, rows=16, columns=12, frames=1, samples=1,
        planar=0, bits_allocated=16, bits_stored=12, high_bit=11, signed=False, photometric="MONOCHROME2",
        planes=(replace(plane, **of_plane),), pixel_offset=600, pixel_length=384,
    )  # fmt: skip
    return replace(header, **changes)


def stack(heights: Sequence[float] = range(0, 20, 2), **changes: Any) -> list[Header]:
    """Give the headers of an axial stack, slices at these heights."""
    return [
        image(**({"position_mm": (-10.0, -20.0, float(z)), "sop_instance": f"1.9.{n}", "instance_number": n} | changes))
        for n, z in enumerate(heights, 1)
    ]


def codes(headers: Sequence[Header], **more: Any) -> set[str]:
    """Give the codes of a series that makes one volume."""
    (volume,) = examine(headers, CONFIG, **more)
    return {finding.code for finding in volume.findings}


def moved(header: Header, **changes: Any) -> Header:
    return replace(header, planes=(replace(header.planes[0], **changes),))


# The ten folders that today's loaders read without a word


def test_a_clean_stack_has_no_findings() -> None:
    assert codes(stack()) == set()


def test_slices_four_to_six_missing_are_counted() -> None:
    (volume,) = examine([h for h in stack() if h.instance_number not in (4, 5, 6)], CONFIG)
    assert volume.findings == (Finding("missing_slices", "a gap of 8 mm where 2 mm is usual: 3 slices are missing"),)


def test_every_second_slice_missing_is_found_by_the_numbers() -> None:
    assert codes(stack(thickness_mm=None)[::2]) == {"decimated"}


def test_every_second_slice_missing_is_found_by_the_thickness() -> None:
    assert codes(stack(range(0, 40, 4))) == {"decimated"}


def test_every_second_slice_missing_is_found_by_the_declared_spacing() -> None:
    assert codes(stack(range(0, 40, 4), between_mm=2.0, thickness_mm=3.0)) == {"decimated"}


def test_equal_instance_numbers_change_nothing() -> None:
    headers = [replace(h, instance_number=1) for h in stack()]
    assert codes(headers) == set()
    assert [m[0] for m in examine(headers[::-1], CONFIG)[0].members] == list(range(9, -1, -1))


def test_two_series_in_one_folder_become_two_volumes() -> None:
    both = [h for pair in zip(stack(), stack(range(1, 21, 2), series="1.2.8"), strict=True) for h in pair]
    first, second = assemble(both)
    assert {i % 2 for i, _ in first.members} == {0} and {i % 2 for i, _ in second.members} == {1}


def test_a_truncated_file_makes_its_series_incomplete() -> None:
    assert codes(stack()[:-1], refused=1) == {"incomplete"}
    assert check_header(image(pixel_length=380), CONFIG)[0].code == "truncated"
    assert check_header(image(file_size=700), CONFIG)[0].code == "truncated"


def test_a_stack_that_lost_its_end_is_found_by_what_its_headers_declare() -> None:
    whole = stack(declared=10)
    assert codes(whole) == set()
    assert codes(whole[:-1]) == codes(whole[2:]) == {"fewer_than_declared"}
    copies = [replace(one, instance_number=90 + n) for n, one in enumerate(whole[:1])]
    scouts = [replace(one, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"), sop_instance="1.7") for one in whole[:1]]
    for others in (copies, scouts):
        assert "fewer_than_declared" in {f.code for f in check_series([*whole[:-1], *others])}
    object_of_nine = replace(image(frames=9), planes=tuple(one.planes[0] for one in whole[1:]))
    assert "fewer_than_declared" not in {f.code for f in check_series([whole[0], object_of_nine])}
    assert codes(stack(declared=7)) == set()  # an acquisition that became two volumes of one series
    assert codes([*whole[:8], image(declared=10, position_mm=(-10.0, -20.0, 16.0), instance_number=9)]) == {
        "fewer_than_declared"
    }


@pytest.mark.parametrize(
    "changes",
    [{"image_type": ("DERIVED", "SECONDARY", "REFORMATTED")}, {"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}],
)
def test_what_was_computed_from_others_and_scouts_keep_another_number(changes: dict[str, Any]) -> None:
    assert "fewer_than_declared" not in codes(stack(declared=99, **changes))


def test_parts_of_an_object_are_counted_and_their_frames_too() -> None:
    def parts(*chosen: int, **changes: Any) -> list[Header]:
        made = [replace(one, part=Part("1.7", n, 10, n - 1)) for n, one in enumerate(stack(), 1)]
        return [replace(made[n - 1], part=replace(made[n - 1].part or Part("", 0), **changes)) for n in chosen]

    assert codes(parts(*range(1, 11))) == set()
    assert codes(parts(*range(1, 10))) == codes(parts(*range(2, 11))) == {"incomplete"}
    assert codes(parts(*range(1, 10), total=None)) == set()  # nothing says that there was a last one
    assert codes(parts(*range(2, 11), total=None)) == {"incomplete"}
    assert codes(parts(*range(1, 11), offset=None)) == set()
    twice = [*parts(*range(1, 11), offset=None), *parts(4, offset=7)]
    assert {f.code for f in check_series(twice)} == {f.code for f in check_series(twice[::-1])} == {"incomplete"}
    assert "incomplete" not in {f.code for f in check_series([*parts(*range(1, 11)), *parts(4)])}  # a copy
    longer = [replace(one, frames=2, planes=one.planes * 2) for one in parts(4, offset=None)]
    assert "incomplete" in {f.code for f in check_series([*parts(*range(1, 11), offset=None), *longer])}
    assert codes(parts(*range(1, 11), offset=3)) == {"incomplete"}
    assert codes(parts(*range(1, 11), number=0)) == {"incomplete"}
    nameless = parts(10, number=0, total=None, offset=None)
    assert codes([*parts(*range(1, 10), total=None, offset=None), *nameless]) == {"incomplete"}


def test_more_pixels_than_rows_and_columns_account_for_are_found() -> None:
    assert [f.code for f in check_header(image(rows=8), CONFIG)] == ["extra_bytes"]
    assert check_header(image(pixel_length=386, file_size=2000), CONFIG) == ()  # padding


def test_a_slope_of_zero_in_every_slice_is_refused() -> None:
    assert codes(stack(slope=0.0)) == {"bad_header"}


def test_a_spacing_between_slices_with_a_sign_is_still_the_spacing() -> None:
    assert codes(stack(between_mm=-2.0, thickness_mm=1.0)) == set()


def test_positions_written_to_a_tenth_of_a_millimetre_are_even() -> None:
    assert codes(stack([round(10 + 1.25 * n, 1) for n in range(20)], thickness_mm=None)) == set()
    through_float32 = [float(np.float32(round(10 + 1.25 * n, 1))) for n in range(20)]
    assert codes(stack(through_float32, thickness_mm=None)) == set()


@pytest.mark.parametrize("wrong", [None, 7, 12])
def test_a_slanting_stack_whose_middles_were_rounded_is_even(wrong: int | None) -> None:
    """As an old scanner wrote it: middles to a tenth of a millimetre, then corners to six figures."""
    normal, corner = np.array([0.0, -0.134158, 0.99096]), np.array([-110.5, 29.3937, -14.7575])
    heights = 7.0005 * np.arange(20) - 58.0
    if wrong is not None:
        heights[wrong] += 0.3
    places = [[float(f"{x:.6g}") for x in np.round(height * normal, 1) + corner] for height in heights]
    along = (1.0, 0.0, 0.0, 0.0, 0.99096, 0.134158)
    headers = [
        moved(one, position_mm=tuple(at), orientation=along) for one, at in zip(stack(range(20)), places, strict=True)
    ]
    gaps = np.diff(np.array(places) @ normal)
    assert gaps.max() / gaps.min() > 1.01
    found = codes([moved(one, thickness_mm=5.0, between_mm=None) for one in headers])
    assert found == (set() if wrong is None else {"uneven_gaps"})


def test_a_missing_slice_is_seen_where_slices_lie_as_close_as_digits_go() -> None:
    heights = [round(0.1 * n, 1) for n in range(40) if n != 20]
    assert codes(stack(heights, thickness_mm=0.1)) == {"missing_slices"}


def test_a_frame_of_a_volume_that_lies_across_it_is_not_lost() -> None:
    (header,) = stack([0.0])
    planes = [replace(header.planes[0], position_mm=(0.0, 0.0, float(z))) for z in (0, 2, 4)]
    planes[2] = replace(planes[2], orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    assert codes([replace(header, frames=3, planes=tuple(planes), pixel_length=3 * 384, file_size=1800)]) == {
        "mixed_orientation"
    }


@pytest.mark.parametrize(
    ("kind", "what"), [("66.4", "a segmentation"), ("66.7", "a segmentation"), ("481.2", "a dose")]
)
def test_what_no_scanner_measured_is_no_scan(kind: str, what: str) -> None:
    made = image(sop_class=f"1.2.840.10008.5.1.4.1.1.{kind}", modality="OT")
    (finding,) = (one for one in check_header(made, CONFIG) if one.code == "no_scan")
    assert what in finding.reason and "accept" not in CODES["no_scan"].allowed
    assert codes([replace(one, sop_class=made.sop_class) for one in stack()]) == {"no_scan"}


def test_stacks_that_only_look_torn_are_left_alone() -> None:
    fine, coarse = timed(range(0, 20, 2), "1"), [moved(one, thickness_mm=4.0) for one in timed(range(0, 20, 4), "2")]
    assert [volume.findings for volume in examine([*fine, *coarse], CONFIG)] == [(), ()]  # another step, the same reach
    beside = [moved(one, position_mm=(390.0, -20.0, 2.0 * n + 6)) for n, one in enumerate(timed(range(0, 20, 2), "2"))]
    assert [volume.findings for volume in examine([*fine, *beside], CONFIG)] == [(), ()]  # the other hip
    drifted = timed([1.2 + z for z in range(0, 20, 2)], "2")
    assert [volume.findings for volume in examine([*fine, *drifted], CONFIG)] == [(), ()]  # less than a slice


def timed(heights: Sequence[float], time: str) -> list[Header]:
    """Give the slices of one temporal position."""
    return stack(heights, splits=(("TemporalPositionIndex", time),), sop_instance=f"1.9.{time}.{heights[0]}")


def test_parts_that_follow_each_other_in_space_are_no_volumes() -> None:
    """As where times go on from slice to slice: the longest part is a part too."""
    torn = [*timed(range(0, 20, 2), "1"), *timed(range(20, 40, 2), "2"), *timed(range(0, 40, 2), "3")]
    *parts, whole = examine(torn, CONFIG)
    assert [[f.code for f in volume.findings] for volume in (*parts, whole)] == [["incomplete"], ["incomplete"], []]
    halves = examine(
        [*timed(range(0, 20, 2), "1"), *timed(range(20, 40, 2), "2"), *timed(range(0, 20, 2), "3")], CONFIG
    )
    reasons = [[f.reason for f in volume.findings] for volume in halves]
    assert reasons == [["another part of the series, alike but for its values, reaches 20 mm further"]] * 3


def test_parts_whose_steps_were_rounded_apart_are_parts_of_one_stack() -> None:
    heights = [round(6.95 * n, 1) for n in range(12)]
    steps = {round((part[-1] - part[0]) / 3, 3) for part in (heights[:4], heights[4:8], heights[8:])}
    assert len(steps) > 1
    torn = [*timed(heights[:4], "1"), *timed(heights[4:8], "2"), *timed(heights[8:], "3"), *timed(heights[:4], "4")]
    torn = [moved(one, thickness_mm=None) for one in torn]
    assert [[f.code for f in volume.findings] for volume in examine(torn, CONFIG)] == [["incomplete"]] * 4


def test_volumes_that_lack_a_slice_each_at_another_end_are_both_incomplete() -> None:
    found = examine([*timed(range(0, 18, 2), "1"), *timed(range(2, 20, 2), "2")], CONFIG)
    assert [[f.code for f in volume.findings] for volume in found] == [["incomplete"], ["incomplete"]]
    assert "reaches 2 mm further" in found[0].findings[0].reason
    apart = examine([*timed(range(0, 18, 2), "1"), *timed(range(22, 40, 2), "2")], CONFIG)  # another station
    assert [volume.findings for volume in apart] == [(), ()]
    alike = examine([*timed(range(0, 18, 2), "1"), *timed([0.4 + z for z in range(0, 18, 2)], "2")], CONFIG)
    assert [volume.findings for volume in alike] == [(), ()]  # moved by less than half a gap: a table that gave way


def test_a_volume_that_has_fewer_slices_than_its_siblings_is_incomplete() -> None:
    echoes = [stack(splits=(("EchoTime", str(echo)),)) for echo in (10, 20, 30)]
    volumes = examine([*echoes[0], *echoes[1], *echoes[2][:7]], CONFIG)
    assert [[f.code for f in volume.findings] for volume in volumes] == [[], [], ["incomplete"]]


def test_a_different_slice_at_the_same_place_is_a_duplicate_position() -> None:
    headers = [*stack(), replace(stack()[4], sop_instance="1.8", instance_number=77)]
    assert codes(headers) == {"duplicate_position"}
    digests = {(i, 0): i for i in range(11)}
    assert codes(headers, digests=digests) == {"duplicate_position"}


def test_a_copy_at_the_same_place_is_dropped_by_the_repair() -> None:
    headers = [*stack(), replace(stack()[4], sop_instance="1.8", instance_number=77)]
    digests = {(i, 0): i if i < 10 else 4 for i in range(11)}
    assert codes(headers, digests=digests) == {"duplicate_pixels"}
    (doubled,) = assemble(headers)
    repaired = drop_copies(headers, doubled, digests)
    assert repaired == assemble(stack())[0]


def test_ct_without_rescale_is_found_and_mr_without_is_not() -> None:
    assert codes(stack(slope=None, intercept=None)) == {"missing_rescale"}
    assert codes([*stack()[:9], *stack(slope=None)[9:]]) == {"missing_rescale", "inconsistent_rescale"}
    assert codes(stack(slope=None, intercept=None, modality="MR", sop_class=MR)) == set()


def test_one_slice_with_another_intercept_is_found() -> None:
    headers = stack()
    headers[3] = moved(headers[3], intercept=0.0)
    assert codes(headers) == {"inconsistent_rescale"}


@pytest.mark.parametrize("patient", ["Q", None])
def test_one_slice_of_another_patient_condemns_the_whole_series(patient: str | None) -> None:
    headers = stack()
    headers[9] = replace(headers[9], patient=patient)
    assert codes(headers) == {"foreign_patient"}


# Geometry


def test_a_gap_that_is_no_multiple_is_uneven() -> None:
    assert codes(stack([0, 2, 4, 6, 9, 11, 13])) == {"uneven_gaps"}


def test_a_gap_two_percent_off_is_uneven_and_half_a_percent_is_not() -> None:
    assert codes(stack([0, 2, 4, 6.04, 8, 10])) == {"uneven_gaps"}
    assert codes(stack([0, 2, 4, 6.01, 8.01, 10])) == set()


def test_positions_rounded_to_a_tenth_are_even() -> None:
    assert codes(stack([round(1.25 * n + 1e-9, 1) for n in range(20)], thickness_mm=1.25)) == set()


def test_a_slice_moved_by_a_tenth_of_a_millimetre_is_no_rounding() -> None:
    assert codes(stack([0, 2, 4, 6.1, 8, 10])) == {"uneven_gaps"}


@pytest.mark.parametrize(
    ("thickness", "between", "gap"),
    [
        (3.0, 5.0, 5.0),
        (2.0, 1.0, 1.0),
        (5.0, 6.5, 6.5),
        (2.0, None, 1.0),
        (3.0, None, 3.3),
        (5.0, 1.0, 6.0),
        (1.0, 10.0, 10.0),
    ],
)
def test_gapped_and_overlapping_acquisitions_pass(thickness: float, between: float | None, gap: float) -> None:
    heights = [gap * n for n in range(12)]
    assert codes(stack(heights, thickness_mm=thickness, between_mm=between, modality="MR", sop_class=MR)) == set()


def test_numbers_that_another_echo_has_are_no_gaps() -> None:
    echoes = [
        replace(moved(h, splits=(("EchoTime", echo),)), instance_number=2 * n + k, sop_instance=f"1.{n}.{k}")
        for n, h in enumerate(stack())
        for k, echo in enumerate(("10", "80"))
    ]
    assert [volume.findings for volume in examine(echoes, CONFIG)] == [(), ()]


def test_huge_instance_numbers_take_no_time() -> None:
    assert codes([replace(h, instance_number=n * 100_000_000) for n, h in enumerate(stack())]) == {"decimated"}


def test_a_slice_shifted_in_its_plane_is_found() -> None:
    headers = stack()
    headers[4] = moved(headers[4], position_mm=(-9.0, -20.0, 8.0))
    assert codes(headers) == {"displaced_slices"}


def test_a_sheared_stack_is_a_tilted_gantry() -> None:
    tilted = [moved(h, position_mm=(-10.0, -20.0 + 0.6 * n, 2.0 * n)) for n, h in enumerate(stack())]
    assert codes(tilted) == {"gantry_tilt"}
    angle = math.degrees(math.atan(0.3))
    assert codes([replace(h, gantry_tilt_degrees=-angle) for h in tilted]) == {"gantry_tilt"}
    assert codes([replace(h, gantry_tilt_degrees=0.0) for h in tilted]) == {"gantry_tilt", "tilt_conflict"}


def test_a_declared_tilt_that_nothing_shows_is_a_conflict() -> None:
    assert codes([replace(h, gantry_tilt_degrees=15.0) for h in stack()]) == {"tilt_conflict"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"position_mm": (0.0, math.nan, 0.0)}, "bad_geometry"),
        ({"position_mm": (0.0, 0.0, 2e4)}, "bad_geometry"),
        ({"spacing_mm": (0.0, 0.5)}, "bad_geometry"),
        ({"spacing_mm": (0.5, 200.0)}, "bad_geometry"),
        ({"orientation": (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)}, "bad_geometry"),
        ({"orientation": (2.0, 0.0, 0.0, 0.0, 1.0, 0.0)}, "bad_geometry"),
        ({"orientation": (0.0,) * 6}, "bad_geometry"),
        ({"position_mm": None}, "no_geometry"),
        ({"orientation": None}, "no_geometry"),
    ],
)
def test_an_absurd_or_missing_place_is_found_and_condemns_its_series(changes: dict[str, Any], code: str) -> None:
    headers = stack()
    headers[9] = moved(headers[9], **changes)
    assert [f.code for f in check_header(headers[9], CONFIG)] == [code]
    assert codes(headers) == {code}


def test_an_odd_slice_at_the_end_does_not_vanish_unseen() -> None:
    odd = {
        "mixed_orientation": {"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)},
        "mixed_size": {"spacing_mm": (0.6, 0.6)},
    }
    for code, changes in odd.items():
        assert codes([*stack()[:9], moved(stack()[9], **changes)]) == {code}
    assert codes([*stack()[:9], replace(stack()[9], rows=8)]) == {
        "mixed_size",
    }
    assert codes([*stack()[:9], replace(stack()[9], signed=True)]) == {"mixed_format"}


def test_three_planes_of_a_survey_are_three_clean_volumes() -> None:
    planes = [(1.0, 0, 0, 0, 1.0, 0), (0, 1.0, 0, 0, 0, -1.0), (1.0, 0, 0, 0, 0, -1.0)]
    headers = [
        moved(image(), orientation=o, position_mm=tuple(2.0 * n * np.cross(o[:3], o[3:])))
        for o in planes
        for n in range(3)
    ]
    assert [(v.shape[0], v.findings) for v in examine(headers, CONFIG)] == [(3, ())] * 3


def test_a_localiser_inside_a_series_leaves_the_stack_alone() -> None:
    scout = image(orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0), image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    assert codes([scout, *stack()]) == set()
    assert [f.code for f in check_header(scout, CONFIG)] == ["localizer"]


def test_one_series_identifier_in_two_studies_is_mixed() -> None:
    headers = [*stack()[:5], *(replace(h, study="1.1.7") for h in stack()[5:])]
    assert [f.code for f in check_series(headers)] == ["mixed_series"]


def test_echoes_within_one_stack_are_mixed_values() -> None:
    assert codes([moved(h, splits=(("EchoTime", str(10 * (1 + n % 2))),)) for n, h in enumerate(stack())]) == {
        "mixed_values"
    }


def test_derived_slices_among_original_ones_are_found() -> None:
    headers = stack()
    headers[2] = replace(headers[2], image_type=("DERIVED", "PRIMARY"))
    assert codes(headers) == {"derived"}


def test_the_same_pixels_elsewhere_are_found_unless_blank() -> None:
    digests = {(i, 0): "air" if i in (0, 9) else i for i in range(10)}
    assert codes(stack(), digests=digests) == {"repeated_pixels"}
    assert codes(stack(), digests=digests, blank={"air"}) == set()


def test_a_volume_past_the_limit_is_refused_from_its_headers() -> None:
    (volume,) = examine(stack(), ScansConfig(max_volume_mb=0.001))
    assert volume.findings[0].code == "too_large"


def test_a_mosaic_is_recognised_and_makes_no_volume() -> None:
    headers = [replace(h, mosaic=True) for h in stack()]
    assert examine(headers, CONFIG) == ()
    assert [f.code for f in check_header(headers[0], CONFIG)] == ["mosaic"]


# One image


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"modality": "CR"}, []),
        ({"modality": "US"}, ["burned_in"]),
        ({"modality": "US", "burned_in": "NO"}, []),
        ({"modality": "XA"}, ["burned_in"]),
        ({"burned_in": "YES"}, ["burned_in"]),
        ({"modality": "CR", "burned_in": "YES"}, ["burned_in"]),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.6.1"}, ["burned_in"]),
        ({"sop_class": SC}, ["burned_in", "derived"]),
        ({"sop_class": SC, "burned_in": "NO"}, ["derived"]),
        ({"image_type": ("DERIVED", "SECONDARY", "SCREEN SAVE")}, ["burned_in", "derived_volume"]),
        ({"image_type": ("DERIVED", "SECONDARY"), "position_mm": None, "modality": "DX"}, ["derived"]),
        ({"image_type": ("DERIVED", "PRIMARY")}, []),
        ({"executable": "PE"}, ["executable_preamble"]),
        ({"rows": 30_000, "columns": 30_000, "pixel_length": None}, ["too_large"]),
        ({"frames": 10_000_000, "planes": (), "modality": "XC", "pixel_length": None}, []),
        ({"frames": 100_000_000, "planes": (), "modality": "XC", "pixel_length": None}, ["too_large"]),
        ({"slope": None, "has_lut": True}, []),
    ],
)
def test_one_image_gets_its_codes(changes: dict[str, Any], expected: list[str]) -> None:
    assert sorted(finding.code for finding in check_header(image(**changes), CONFIG)) == expected


def test_a_compression_that_nothing_decodes_is_found() -> None:
    header = image(transfer_syntax="1.2.840.10008.1.2.4.100")
    assert [f.code for f in check_header(header, CONFIG, decodable={"1.2.840.10008.1.2.1"})] == ["no_decoder"]
    assert check_header(image(), CONFIG, decodable={"1.2.840.10008.1.2.1"}) == ()


# Masks


def test_a_mask_on_its_images_grid_passes_and_any_other_does_not() -> None:
    (volume,) = assemble(stack())
    matrix = np.array(volume.affine)
    flipped, shifted, absurd = matrix.copy(), matrix.copy(), matrix.copy()
    flipped[:3, 1] *= -1
    shifted[0, 3] += 0.2
    absurd[0, 0] = np.nan

    def found(shape: tuple[int, int, int], affine: Any) -> list[str]:
        rows = tuple(tuple(row) for row in affine)
        return [f.code for f in checks.check_mask_geometry(shape, rows, volume.shape, volume.affine)]

    assert found(volume.shape, matrix.astype(np.float32)) == []
    assert found((10, 12, 16), matrix) == ["mask_geometry"]
    assert [found(volume.shape, one) for one in (flipped, shifted, absurd)] == [["mask_geometry"]] * 3


# The table and the policy


@pytest.mark.parametrize("code", CODES)
def test_every_row_says_what_it_means_and_allows_its_default(code: str) -> None:
    row = CODES[code]
    assert re.fullmatch(r"[a-z_]+", code)
    assert row.default in row.allowed and "reject" in row.allowed
    assert row.meaning.endswith(".") and row.what_to_try.endswith(".") and "\n" not in row.meaning


def test_every_code_that_the_room_raises_or_finds_has_a_row() -> None:
    source = "".join(path.read_text() for path in (Path(medtl.__file__).parent / "scans").rglob("*.py"))
    raised = set(re.findall(r'(?:ScanError|Finding)\(\s*"([a-z_]+)"', source))
    assert len(raised) > 40
    assert raised <= set(CODES)


def test_the_strongest_action_wins() -> None:
    findings = [Finding(code, "x") for code in ("split_by_order", "localizer", "empty_file", "gantry_tilt")]
    assert decide([], {}) == "accept"
    assert decide(findings[:1], {}) == "accept"
    assert decide(findings[:2], {}) == "quarantine"
    assert decide(findings, {}) == "reject"
    assert decide([findings[0], findings[3]], {"gantry_tilt": "repair"}) == "repair"
    assert decide(findings[:2], {"localizer": "accept"}) == "accept"


def test_an_action_that_a_code_does_not_allow_is_not_taken() -> None:
    assert decide([Finding("missing_slices", "x")], {"missing_slices": "accept"}) == "quarantine"
    assert decide([Finding("never_heard_of", "x")], {"never_heard_of": "accept"}) == "quarantine"
    with pytest.raises(ConfigError, match="cannot be 'accept'; it allows reject, quarantine"):
        checks.check_policy({"missing_slices": "accept"})
    with pytest.raises(ConfigError, match="is no code"):
        checks.check_policy({"mising_slices": "reject"})


@pytest.mark.parametrize(
    "code", ["missing_slices", "uneven_gaps", "duplicate_position", "foreign_patient", "bad_geometry", "mask_geometry"]
)
def test_what_would_give_a_wrong_volume_can_never_be_accepted(code: str) -> None:
    assert not {"accept", "repair"} & set(CODES[code].allowed)


# Properties


@settings(derandomize=True, deadline=None, max_examples=60)
@given(count=st.integers(4, 40), gone=st.data(), gap=st.floats(0.3, 12.0))
def test_any_inner_slice_that_is_gone_is_missed(count: int, gone: st.DataObject, gap: float) -> None:
    headers = stack([gap * n for n in range(count)], thickness_mm=gap)
    del headers[gone.draw(st.integers(1, count - 2))]
    assert codes(headers) == {"missing_slices"}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(step=st.integers(2, 6), count=st.integers(3, 20), gap=st.floats(0.3, 5.0))
def test_any_even_thinning_is_found(step: int, count: int, gap: float) -> None:
    headers = stack([gap * n for n in range(step * count)], thickness_mm=gap)[::step]
    assert codes(headers) == {"decimated"}
    assert codes([replace(h, instance_number=n) for n, h in enumerate(headers)]) == {"decimated"}


_NUMBERS = st.one_of(st.none(), st.floats(), st.floats(-300, 300))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.none()
            | st.tuples(*[st.floats(allow_infinity=True)] * 3)
            | st.tuples(*[st.integers(-3, 3).map(float)] * 3),
            st.none() | st.tuples(*[st.sampled_from([0.0, 1.0, -1.0, math.nan, 1e308])] * 6),
            st.none() | st.tuples(*[st.sampled_from([0.5, 0.0, -1.0, 1e-300, math.inf])] * 2),
            _NUMBERS,
            st.none() | st.integers(-(2**31), 2**31),
            st.lists(
                st.tuples(st.sampled_from(["EchoTime", "TriggerTime", "ImageType", "X"]), st.text(max_size=3)),
                max_size=3,
            ),
        ),
        max_size=12,
    )
)
def test_no_header_makes_the_checks_fail(rows: list[Any]) -> None:
    headers = [
        replace(
            image(position_mm=p, orientation=o, spacing_mm=s, thickness_mm=number, between_mm=number),
            instance_number=instance, gantry_tilt_degrees=number,
        )
        for p, o, s, number, instance, _ in rows
    ]  # fmt: skip
    headers = [moved(header, splits=tuple(row[-1])) for header, row in zip(headers, rows, strict=True)]
    volumes = examine(headers, CONFIG)
    members = [member for one in group(headers) for member in one.members]
    assert sorted(members) == [(i, 0) for i in range(len(headers))]
    for volume in volumes:
        assert isinstance(volume, Volume) and np.isfinite(volume.affine).all()
        assert (
            build(headers, next(g for g in group(headers) if set(g.members) == set(volume.members))).shape
            == volume.shape
        )
