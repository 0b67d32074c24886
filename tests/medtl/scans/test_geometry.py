"""Planes become the volumes that they are, whatever the order of the files."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.config import ScansConfig
from medtl.errors import ScanError
from medtl.scans.checks import CODES, check_series, decide, examine
from medtl.scans.geometry import Volume, assemble, build, group, is_tilted, shear, untilt
from medtl.scans.headers import Header, Plane, read_header

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def image(**changes: Any) -> Header:
    """Give the header of one MR slice of 16 x 12 pixels; changes of its plane go by the plane's names."""
    plane = Plane((-10.0, -20.0, 0.0), AXIAL, (0.5, 0.75), 2.0, 2.0)
    of_plane = {name: changes.pop(name) for name in list(changes) if name in Plane.__dataclass_fields__}
    header = Header(
        file_size=1000, transfer_syntax="1.2.840.10008.1.2.1", sop_class=None, sop_instance="1.9", series="1.2",
        study="1.1", patient="P", issuer=None, frame_of_reference="1.3", modality="MR",
        image_type=("ORIGINAL", "PRIMARY"), instance_number=1, rows=16, columns=12, frames=1, samples=1, planar=0,
        bits_allocated=16, bits_stored=12, high_bit=11, signed=False, photometric="MONOCHROME2",
        planes=(replace(plane, **of_plane),), pixel_offset=None, pixel_length=None,
    )  # fmt: skip
    return replace(header, **changes)


def slices(count: int = 6, **changes: Any) -> list[Header]:
    """Give the headers of an axial stack of slices, 2 mm apart."""
    return [
        image(**({"position_mm": (-10.0, -20.0, 2.0 * n), "sop_instance": f"1.9.{n}", "instance_number": n} | changes))
        for n in range(count)
    ]


def moved(header: Header, **changes: Any) -> Header:
    return replace(header, planes=(replace(header.planes[0], **changes),))


def tilted(count: int = 8, shear_mm: float = 0.6) -> list[Header]:
    """Give a stack whose slices move along the columns' direction."""
    return [moved(h, position_mm=(-10.0, -20.0 + shear_mm * n, 2.0 * n)) for n, h in enumerate(slices(count))]


def times_of(volumes: Sequence[Volume]) -> list[list[int]]:
    return [[index for index, _ in volume.members] for volume in volumes]


# Affine


def test_the_affine_maps_column_row_slice_to_ras_millimetres() -> None:
    (volume,) = assemble(slices())
    assert volume.shape == (6, 16, 12)
    assert volume.spacing_mm == (0.75, 0.5, 2.0)
    assert volume.affine == (
        (-0.75, 0.0, 0.0, 10.0),
        (0.0, -0.5, 0.0, 20.0),
        (0.0, 0.0, 2.0, 0.0),
        (0.0, 0.0, 0.0, 1.0),
    )


def test_slices_go_up_along_the_normal_whatever_their_numbers_say() -> None:
    headers = [replace(h, instance_number=100 - n) for n, h in enumerate(slices())][::-1]
    assert times_of(assemble(headers)) == [[5, 4, 3, 2, 1, 0]]
    upside_down = [moved(h, orientation=(1.0, 0.0, 0.0, 0.0, -1.0, 0.0)) for h in slices()]
    assert times_of(assemble(upside_down)) == [[5, 4, 3, 2, 1, 0]]


def test_the_affine_of_a_tilted_stack_is_sheared_like_the_stack() -> None:
    (volume,) = assemble(tilted())
    for k, header in enumerate(tilted()):
        x, y, z = header.planes[0].position_mm or ()
        np.testing.assert_allclose(np.array(volume.affine) @ (0, 0, k, 1), (-x, -y, z, 1))
    assert is_tilted(volume) and shear(volume)[0] == pytest.approx(math.degrees(math.atan(0.3)))


def test_one_slice_is_as_deep_as_its_header_says() -> None:
    (one,) = group(slices(1))
    assert build(slices(1), one).affine[2] == (0.0, 0.0, 2.0, 0.0)
    unknown = slices(1, thickness_mm=None, between_mm=None)
    with pytest.raises(ScanError) as caught:
        build(unknown, one)
    assert caught.value.code == "single_slice"


def test_frames_without_a_place_make_no_volume() -> None:
    lost = slices(3, position_mm=None)
    assert assemble(lost) == ()
    (one,) = group(lost)
    assert not one.is_stack
    with pytest.raises(ScanError) as caught:
        build(lost, one)
    assert caught.value.code == "no_geometry"


@st.composite
def stacks(draw: st.DrawFn) -> tuple[list[Header], np.ndarray[Any, Any]]:
    """Draw a clean stack anywhere in space, and its true affine."""
    count, gap = draw(st.integers(2, 30)), draw(st.floats(0.4, 8.0))
    spacing = (draw(st.floats(0.2, 3.0)), draw(st.floats(0.2, 3.0)))
    quaternion = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(v * v for v in q) > 0.1)))
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    axes = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    origin = np.array(draw(st.tuples(*[st.floats(-400, 400)] * 3)))
    orientation = tuple(round(float(v), 8) for v in (*axes[:, 0], *axes[:, 1]))
    headers = [
        replace(
            image(
                position_mm=tuple(round(float(v), 5) for v in origin + n * gap * axes[:, 2]),
                orientation=orientation, spacing_mm=spacing, thickness_mm=gap, between_mm=None,
            ),
            sop_instance=f"1.{n}", instance_number=n,
        )
        for n in range(count)
    ]  # fmt: skip
    affine = np.eye(4)
    affine[:3] = np.column_stack((axes[:, 0] * spacing[1], axes[:, 1] * spacing[0], axes[:, 2] * gap, origin))
    affine[:2] *= -1
    return headers, affine


@settings(derandomize=True, deadline=None, max_examples=80)
@given(stacks())
def test_any_rotation_and_translation_is_accepted_with_its_affine(drawn: Any) -> None:
    headers, affine = drawn
    (volume,) = examine(headers, ScansConfig())
    assert volume.findings == ()
    np.testing.assert_allclose(volume.affine, affine, atol=2e-4)


def recordings() -> dict[str, list[Header]]:
    """Give series of every kind that is split."""
    echoes = [moved(h, splits=(("EchoTime", t),)) for h in slices() for t in ("10", "80")]
    cine = [moved(h, splits=(("TriggerTime", str(10 * t + n)),)) for n, h in enumerate(slices(4)) for t in range(5)]
    numbered = [replace(h, instance_number=100 * t + n) for t in range(3) for n, h in enumerate(slices(4))]
    copies = [*slices(), replace(slices()[2], sop_instance="1.8")]
    return {"clean": slices(), "echoes": echoes, "cine": cine, "numbered": numbered, "copies": copies, "tilt": tilted()}


@pytest.mark.parametrize("kind", recordings())
@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.randoms(use_true_random=False))
def test_any_order_of_the_files_gives_the_same_volumes(kind: str, seed: random.Random) -> None:
    headers = recordings()[kind]
    order = seed.sample(range(len(headers)), len(headers))

    def seen(headers: list[Header]) -> list[Any]:
        volumes = examine(headers, ScansConfig())
        return sorted((v.splits, v.affine, v.shape, v.findings, [headers[i] for i, _ in v.members]) for v in volumes)

    def unordered(volumes: list[Any]) -> list[Any]:
        return [(*one[:4], [(h.sop_instance, h.instance_number, h.planes) for h in one[4]]) for one in volumes]

    assert unordered(seen([headers[i] for i in order])) == unordered(seen(headers))


# What splits a series


@pytest.mark.parametrize(
    "keyword", ["EchoTime", "DiffusionBValue", "TemporalPositionIdentifier", "StackID", "ComplexImageComponent"]
)
def test_what_splits_a_series_honestly_gives_several_volumes(keyword: str) -> None:
    headers = [moved(h, splits=((keyword, v),)) for h in slices() for v in ("1", "2", "3")]
    volumes = assemble(headers)
    assert times_of(volumes) == [[0, 3, 6, 9, 12, 15], [1, 4, 7, 10, 13, 16], [2, 5, 8, 11, 14, 17]]
    assert [volume.splits for volume in volumes] == [((keyword, v),) for v in ("1", "2", "3")]


def test_echo_times_that_are_written_differently_are_one_echo() -> None:
    echoes = [("2.46", "7.38"), ("2.461", "7.385")]
    headers = [moved(h, splits=(("EchoTime", t),)) for n, h in enumerate(slices()) for t in echoes[n % 2]]
    volumes = examine(headers, ScansConfig())
    assert [(v.shape[0], v.splits, v.findings) for v in volumes] == [
        (6, (("EchoTime", "2.46"),), ()),
        (6, (("EchoTime", "7.38"),), ()),
    ]


def test_what_tells_nothing_new_is_not_named() -> None:
    headers = [moved(h, splits=(("EchoTime", v), ("EffectiveEchoTime", v))) for h in slices() for v in ("1", "2")]
    assert [volume.splits for volume in assemble(headers)] == [(("EchoTime", v),) for v in ("1", "2")]


def test_two_hints_together_tell_apart_what_neither_does() -> None:
    headers = [
        replace(moved(h, splits=(("TriggerTime", t), ("AcquisitionNumber", a))), instance_number=None)
        for t in "12"
        for a in "12"
        for h in slices(3)
    ]
    assert times_of(assemble(headers)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_magnitude_and_phase_are_two_volumes_even_where_they_do_not_meet() -> None:
    kinds = ["ORIGINAL/PRIMARY/M/ND"] * 3 + ["ORIGINAL/PRIMARY/P/ND"] * 3
    headers = [moved(h, splits=(("ImageType", kind),)) for h, kind in zip(slices() + slices(), kinds * 2, strict=True)]
    assert len(assemble(headers)) == 2


def test_image_type_splits_only_repeated_places() -> None:
    once = [
        replace(h, image_type=("ORIGINAL", "PRIMARY", "AXIAL", *("ADD",) * (n % 2))) for n, h in enumerate(slices())
    ]
    twice = [*slices(), *(replace(h, image_type=("DERIVED", "PRIMARY", "ADC")) for h in slices())]
    assert len(assemble(once)) == 1
    assert times_of(assemble(twice)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("keyword", ["InversionTime", "FlipAngle", "TriggerTime", "AcquisitionNumber", "Vendor"])
def test_a_hint_splits_only_where_it_alone_tells_repeated_places_apart(keyword: str) -> None:
    per_slice = [moved(h, splits=((keyword, str(n)),)) for n, h in enumerate(slices())]
    phases = [moved(h, splits=((keyword, str(t)),)) for t in range(3) for h in slices()]
    unequal = phases[:-1]
    nameless = [replace(h, instance_number=None) for h in unequal]
    assert len(assemble(per_slice)) == 1
    assert times_of(assemble(phases)) == [[*range(6)], [*range(6, 12)], [*range(12, 18)]]
    assert [volume.shape[0] for volume in assemble(nameless)] == [17]


def test_trigger_times_that_differ_at_every_place_give_phases_by_their_order() -> None:
    volumes = assemble(recordings()["cine"])
    assert times_of(volumes) == [[t, t + 5, t + 10, t + 15] for t in range(5)]
    assert volumes[0].splits == (("TriggerTimeRank", "1"),)


def test_numbers_that_run_through_all_places_again_and_again_are_times_and_it_is_recorded() -> None:
    by_time = [replace(h, instance_number=100 * t + n) for t in range(3) for n, h in enumerate(slices(4))]
    by_place = [replace(h, instance_number=100 * n + t) for t in range(3) for n, h in enumerate(slices(4))]
    for headers in (by_time, by_place):
        volumes = examine(headers, ScansConfig())
        assert times_of(volumes) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert [f.code for v in volumes for f in v.findings] == ["split_by_order"] * 3


@pytest.mark.parametrize("numbers", [[7] * 12, [None] * 12, [0, 1, 2, 3, 5, 4, 6, 7, 9, 8, 10, 11]])
def test_repeated_places_that_nothing_tells_apart_are_never_stacked_silently(numbers: list[int | None]) -> None:
    headers = [replace(h, instance_number=n) for h, n in zip(slices(4) * 3, numbers, strict=True)]
    (volume,) = examine(headers, ScansConfig())
    assert [f.code for f in volume.findings] == ["duplicate_position"]
    assert decide(volume.findings, {}) == "quarantine"


def test_patients_studies_and_frames_of_reference_are_never_mixed() -> None:
    for change in ({"patient": "Q"}, {"study": "7"}, {"series": "7"}, {"frame_of_reference": "7"}, {"issuer": "X"}):
        headers = [replace(h, **change) if n % 2 else h for n, h in enumerate(slices())]  # type: ignore[arg-type]
        assert times_of(assemble(headers)) == [[0, 2, 4], [1, 3, 5]]


def test_images_of_an_unknown_series_are_not_put_together() -> None:
    assert assemble([replace(h, series=None) for h in slices()]) == ()


def test_frames_of_a_multi_frame_object_become_its_volumes() -> None:
    planes = tuple(h.planes[0] for h in slices())
    split = tuple(replace(p, splits=(("TemporalPositionIndex", str(t)),)) for t in (1, 2) for p in planes)
    (first, second) = assemble([image(frames=12, planes=split)])
    assert first.members == tuple((0, n) for n in range(6))
    assert second.members == tuple((0, n) for n in range(6, 12))
    several = [image(frames=6, planes=planes, instance_number=n) for n in (2, 1)]
    assert [(v.members[0], v.splits) for v in assemble(several)] == [
        ((0, 0), (("Object", "2"),)),
        ((1, 0), (("Object", "1"),)),
    ]


def test_a_multi_frame_object_with_fewer_planes_than_frames_is_no_stack() -> None:
    groups = group([image(frames=3, planes=(image().planes[0],))])
    assert [(one.members, one.is_stack) for one in groups] == [(((0, 0),), True), (((0, 1), (0, 2)), False)]


# Gantry tilt


@pytest.mark.parametrize("shear_mm", [(0, 0.6), (0, -0.6), (0.5, 0.5), (-0.7, 0.2)])
def test_untilting_puts_every_value_back_where_it_is(shear_mm: tuple[float, float]) -> None:
    """Values that are a linear function of the place in space keep it, to rounding."""
    x, y = shear_mm
    headers = [moved(h, position_mm=(x * n - 10, y * n - 20, 2.0 * n)) for n, h in enumerate(slices(8))]
    (volume,) = assemble(headers)
    field = np.array([3.0, -2.0, 5.0])

    def values_of(volume: Volume) -> np.ndarray[Any, Any]:
        k, r, c = np.indices(volume.shape)
        return np.einsum(
            "i,i...->...", field, np.einsum("ij,j...->i...", np.array(volume.affine)[:3], [c, r, k, k * 0 + 1])
        )

    result, upright = untilt(values_of(volume), volume, fill=-1e6)
    assert result.shape == upright.shape and result.shape[1] > volume.shape[1]
    assert not is_tilted(upright) and shear(upright)[0] == pytest.approx(0, abs=1e-9)
    inside = result > -200
    assert inside.sum() > 0.8 * math.prod(volume.shape)
    np.testing.assert_allclose(result[inside], values_of(upright)[inside], atol=1e-9)


def test_untilting_by_whole_pixels_moves_and_loses_nothing() -> None:
    (volume,) = assemble(tilted(shear_mm=0.5))
    values = np.random.default_rng(0).integers(0, 4000, volume.shape).astype(np.int16)
    result, _ = untilt(values, volume, fill=-1000)
    assert result.dtype == np.int16
    for k in range(8):
        np.testing.assert_array_equal(result[k, k : k + 16, :12], values[k])
    assert (result == -1000).sum() == result.size - values.size


def test_untilting_rounds_integers() -> None:
    (volume,) = assemble(tilted())
    values = np.random.default_rng(0).integers(0, 4000, volume.shape).astype(np.int16)
    exact, _ = untilt(values.astype(np.float64), volume, fill=0)
    np.testing.assert_array_equal(untilt(values, volume, fill=0)[0], np.rint(exact))


def test_thousands_of_orientations_in_one_object_take_no_time() -> None:
    angles = np.linspace(0, math.pi, 20_000)
    planes = tuple(
        replace(image().planes[0], orientation=(1.0, 0.0, 0.0, 0.0, math.cos(a), math.sin(a))) for a in angles
    )
    started = time.perf_counter()
    assert 700 < len(group([image(frames=len(planes), planes=planes)])) < 7000
    assert time.perf_counter() - started < 5


def test_untilting_refuses_values_of_another_shape() -> None:
    (volume,) = assemble(tilted())
    with pytest.raises(ScanError, match="for a volume of shape"):
        untilt(np.zeros((2, 3, 4)), volume, fill=0)


# Real series


def header_of(path: Path) -> Header:
    data = path.read_bytes()
    return read_header(data[:32768], len(data), lambda: data)


def folder(name: str) -> tuple[list[Path], list[Header]]:
    paths = sorted((Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "dicom" / name).glob("**/*.dcm"))
    return paths, [header_of(path) for path in paths]


def codes(volume: Volume) -> set[str]:
    return {finding.code for finding in volume.findings}


def assert_like_dcm2niix(paths: list[Path], volumes: Sequence[Volume], reference: str) -> None:
    """Compare affine and values with the reference, both in the canonical order: dcm2niix turns axes around."""
    image = nib.load(Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "dicom" / reference)
    stored = np.atleast_3d(image.dataobj.get_unscaled()).reshape(*image.shape[:3], -1)
    frames = {path: np.atleast_3d(pydicom.dcmread(path).pixel_array.T).T for path in paths}
    assert stored.shape[3] == len(volumes)
    for number, volume in enumerate(volumes):
        values = np.stack([frames[paths[index]][frame] for index, frame in volume.members]).T
        ours = nib.as_closest_canonical(nib.Nifti1Image(values.astype(np.int32), np.array(volume.affine)))
        theirs = nib.as_closest_canonical(nib.Nifti1Image(stored[..., number].astype(np.int32), image.affine))
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-2)
        np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)


@pytest.mark.data
@pytest.mark.parametrize("number", [4, 5, 6, 7])
def test_ge_time_series_are_ten_volumes_equal_to_dcm2niix(number: int) -> None:
    paths, headers = folder(f"dcm_qa_nih/In/20180918GE/mr_000{number}")
    volumes = examine(headers, ScansConfig())
    assert [codes(volume) for volume in volumes] == [{"split_by_order"}] * 10
    volumes = sorted(volumes, key=lambda volume: int(volume.splits[0][1]))
    assert_like_dcm2niix(paths, volumes, f"dcm_qa_nih/Ref/DCM2NIIX_regression_test_{number}.nii")


@pytest.mark.data
def test_siemens_enhanced_objects_are_four_volumes_equal_to_dcm2niix() -> None:
    paths, headers = folder("dcm_qa_enh/In/Siemens")
    volumes = examine(headers, ScansConfig())
    assert [codes(volume) for volume in volumes] == [set()] * 4
    assert_like_dcm2niix(paths, volumes, "dcm_qa_enh/Ref/Siemens_REST1_w_SMS_PF7-8_6.nii")


@pytest.mark.data
def test_a_philips_field_map_is_a_magnitude_and_a_map() -> None:
    paths, headers = folder("dcm_qa_enh/In/Philips")
    volumes = examine(headers, ScansConfig())
    assert [(volume.shape, codes(volume)) for volume in volumes] == [((32, 64, 64), set())] * 2
    assert_like_dcm2niix(paths, volumes[:1], "dcm_qa_enh/Ref/Philips_WIP_B0_NS_801_e1.nii")


@pytest.mark.data
def test_siemens_mosaics_are_recognised_and_refused() -> None:
    _, headers = folder("dcm_qa_nih/In/20180918Si")
    assert examine(headers, ScansConfig()) == () and all(header.mosaic for header in headers)


@pytest.mark.data
def test_the_tilted_head_ct_is_refused_for_its_tilt_and_its_gaps() -> None:
    _, headers = folder("dcm_qa_ct_ge/In")
    (volume,) = examine(headers, ScansConfig())
    assert codes(volume) == {"gantry_tilt", "uneven_gaps"}
    assert "18.5 degrees" in next(f.reason for f in volume.findings if f.code == "gantry_tilt")
    assert decide(volume.findings, dict.fromkeys(CODES, "repair")) == "quarantine"


@pytest.mark.data
def test_a_study_of_one_patient_gives_two_clean_volumes() -> None:
    _, acquired = folder("mr_t1_study/12-T1post-05670")
    _, cropped = folder("mr_t1_study/13_HCropVolume")
    assert check_series(acquired) == ()
    assert [codes(volume) for volume in examine(acquired, ScansConfig())] == [set()]
    assert [codes(volume) for volume in examine(cropped, ScansConfig())] == [{"derived_volume"}]
    assert [volume.shape[0] for volume in assemble(acquired + cropped)] == [22, 32]
