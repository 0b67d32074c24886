"""NIfTI headers are hostile until checked; what is written, everyone reads."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.quaternions import quat2mat

from medtl.config import ScansConfig
from medtl.errors import ScanError, StorageError
from medtl.scans.nifti import (
    NiftiHeader,
    bounded_gunzip,
    gunzip_start,
    gzip_members,
    is_nifti,
    nifti_header,
    nifti_volume,
    pack_volume,
    parse_nifti,
    unpack_patch,
    unpack_volume,
)

Array = np.ndarray[Any, Any]
CONFIG = ScansConfig()
OBLIQUE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([0.7, 0.8, 2.5]), [-90, 12.5, 40]
)
KINDS = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


def ramp(shape: tuple[int, ...] = (5, 6, 7), dtype: str = "i2") -> Array:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def written(values: Array, affine: Array = OBLIQUE, version: int = 1, **fields: Any) -> bytes:
    """Let nibabel write values of shape ([volumes,] slices, rows, columns); then set header fields."""
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(values.T, affine, dtype=values.dtype)
    image.set_qform(affine, 1)
    data = image.to_bytes()
    header = kind.header_class(data[: 348 if version == 1 else 540])
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock) + data[len(header.binaryblock) :]


def parsed(data: bytes) -> NiftiHeader:
    return parse_nifti(data[:540], len(data), CONFIG)


def patched(data: bytes, offset: int, form: str, *values: Any) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, offset, *values)
    return bytes(changed)


def refusal(data: bytes) -> str:
    with pytest.raises(ScanError) as caught:
        parsed(data)
    return caught.value.code


def codes(header: NiftiHeader) -> list[str]:
    return [finding.code for finding in header.findings]


@st.composite
def affines(draw: st.DrawFn) -> Array:
    """Draw rotation, spacing, handedness and origin."""
    real = st.floats(-1, 1, width=32)
    quaternion = np.array([draw(real) for _ in range(4)])
    length = np.linalg.norm(quaternion)
    turn = quat2mat(quaternion / length) if length > 0.1 else np.eye(3)
    spacing = [draw(st.floats(0.2, 8)) for _ in range(3)]
    spacing[2] *= draw(st.sampled_from([1, -1]))
    return nibabel.affines.from_matvec(turn @ np.diag(spacing), [draw(st.floats(-300, 300)) for _ in range(3)])


# ------------------------------------------------------------------------------------------------- reading


@settings(derandomize=True, max_examples=60, deadline=None)
@given(affine=affines(), kind=st.sampled_from(KINDS), order=st.sampled_from("<>"), version=st.sampled_from([1, 2]))
def test_values_and_affine_are_those_of_nibabel(affine: Array, kind: str, order: str, version: int) -> None:
    made = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = made(ramp(dtype=kind).T, affine, dtype=np.dtype(kind))
    head = type(image.header)(endianness=order)
    head.set_data_dtype(kind)
    head.set_data_shape(image.shape)
    head.set_sform(affine, 1)
    head.set_qform(affine, 1)
    head["magic"], head["vox_offset"] = (b"n+1", 352) if version == 1 else (b"n+2", 544)
    data = head.binaryblock + bytes(4) + ramp(dtype=kind).astype(order + kind).tobytes()
    header = parsed(data)
    values, findings = nifti_volume(header, data)
    np.testing.assert_allclose(header.affine, affine, atol=1e-4, rtol=1e-6)
    assert (values == ramp(dtype=kind)).all() and values.dtype.isnative
    assert findings == () and header.findings == () and header.affine_from == "sform"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(affine=affines())
def test_a_qform_alone_is_enough(affine: Array) -> None:
    header = parsed(written(ramp(), affine, sform_code=0))
    assert header.affine_from == "qform"
    np.testing.assert_allclose(header.affine, affine, atol=0.02)


def test_voxels_are_views_of_the_bytes() -> None:
    data = written(ramp())
    values, _ = nifti_volume(parsed(data), data)
    assert values.base is not None and not values.flags.owndata and not values.flags.writeable


def test_four_dimensions_are_several_volumes() -> None:
    series = ramp((3, 4, 5, 6))
    data = written(series)
    header = parsed(data)
    assert header.volumes == 3 and header.shape == (4, 5, 6)
    assert all((nifti_volume(header, data, n)[0] == series[n]).all() for n in range(3))
    with pytest.raises(ScanError, match="volume 4 of 3"):
        nifti_volume(header, data, 3)


def test_colour_keeps_its_channels() -> None:
    rgb = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    header = nifti_header(rgb.shape, "u1", parsed(written(ramp())).affine)
    data = header + rgb.tobytes()
    values, _ = nifti_volume(parsed(data), data)
    assert (values == rgb).all()
    image = nibabel.Nifti1Image.from_bytes(data)
    assert image.shape == (4, 3, 2) and (np.asarray(image.dataobj)["G"] == rgb[..., 1].T).all()


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [(2.0, -5.0, (2.0, -5.0)), (0.0, 7.0, (1.0, 0.0)), (float("nan"), 7.0, (1.0, 0.0)), (-1.0, 0.0, (-1.0, 0.0))],
)
def test_scaling_follows_the_standard(slope: float, intercept: float, expected: tuple[float, float]) -> None:
    header = parsed(patched(written(ramp()), 112, "<2f", slope, intercept))
    assert (header.slope, header.intercept) == expected


def test_a_slope_without_an_intercept_is_refused() -> None:
    assert refusal(patched(written(ramp()), 112, "<2f", 2.0, float("nan"))) == "bad_header"
    assert refusal(patched(written(ramp()), 112, "<2f", float("inf"), 0.0)) == "bad_header"


@pytest.mark.parametrize(("unit", "factor"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001)])
def test_units_become_millimetres(unit: int, factor: float) -> None:
    header = parsed(patched(written(ramp(), np.diag([0.5, 0.5, 0.5, 1])), 123, "B", unit))
    assert header.spacing_mm == pytest.approx([0.5 * factor] * 3)


def test_two_forms_that_differ_are_named_with_axis_and_angle() -> None:
    image = nibabel.Nifti1Image(ramp().T, OBLIQUE)
    turned = OBLIQUE.copy()
    turned[:3, :3] = nibabel.eulerangles.euler2mat(0.2, 0, 0) @ turned[:3, :3]
    image.set_qform(turned, 1)
    header = parsed(image.to_bytes())
    assert codes(header) == ["qform_sform"]
    assert "columns turned by 11." in header.findings[0].reason
    np.testing.assert_allclose(header.affine, OBLIQUE, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: a + np.array([[0, 0, 0, 3.0]] + [[0] * 4] * 3), "first voxel 3.00 mm away"),
        (lambda a: a @ np.diag([1, 1, 2, 1]), "slices 2.500 mm apart in sform and 5.000 mm in qform"),
        (lambda a: a @ np.diag([-1, 1, 1, 1]), "columns turned by 180.0 degrees"),
    ],
)
def test_shift_stretch_and_flip_are_told(change: Any, told: str) -> None:
    image = nibabel.Nifti1Image(ramp().T, OBLIQUE)
    image.set_qform(change(OBLIQUE), 1, strip_shears=True)
    header = parsed(image.to_bytes())
    assert codes(header) == ["qform_sform"] and told in header.findings[0].reason


def test_the_rounding_of_half_a_turn_is_no_conflict() -> None:
    for angle in np.linspace(np.pi - 2e-3, np.pi + 2e-3, 41):
        turn = nibabel.eulerangles.euler2mat(angle, 0, 0) @ np.diag([0.5, 0.5, 5])
        assert codes(parsed(written(ramp(), nibabel.affines.from_matvec(turn, [120, 130, -600])))) == []


def test_no_form_at_all_is_a_finding() -> None:
    header = parsed(written(ramp(), sform_code=0, qform_code=0))
    assert codes(header) == ["no_geometry"] and header.affine_from == "pixdim"


def test_values_that_are_not_finite_are_counted_and_kept() -> None:
    floats = ramp(dtype="f4")
    floats[1, 2, 3], floats[4, 0, 0] = np.nan, np.inf
    data = written(floats)
    values, findings = nifti_volume(parsed(data), data)
    assert [f.code for f in findings] == ["non_finite"] and findings[0].reason.startswith("2 of 210")
    np.testing.assert_array_equal(values, floats)


def test_bytes_after_the_last_voxel_are_a_finding() -> None:
    assert codes(parsed(written(ramp()) + b"xx")) == ["extra_bytes"]


# ------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    ("offset", "form", "values", "code"),
    [
        (42, "<h", [-4], "bad_size"),
        (42, "<h", [0], "bad_size"),
        (40, "<h", [0], "bad_size"),
        (40, "<h", [8], "bad_size"),
        (42, "<3h", [30_000] * 3, "too_large"),
        (40, "<6h", [5, 7, 6, 5, 1, 3], "bad_size"),
        (70, "<2h", [32, 64], "unsupported_type"),
        (70, "<2h", [1, 1], "unsupported_type"),
        (72, "<h", [8], "bad_header"),
        (108, "<f", [float("nan")], "bad_header"),
        (108, "<f", [100.0], "bad_header"),
        (108, "<f", [1e30], "bad_header"),
        (108, "<f", [4096.0], "truncated"),
        (123, "B", [5], "bad_header"),
        (252, "<2h", [1, 77], "bad_header"),
        (280, "<f", [float("nan")], "bad_geometry"),
        (280, "<f", [float("inf")], "bad_geometry"),
        (280, "<f", [1e30], "bad_geometry"),
        (280, "<12f", [0.0] * 12, "bad_geometry"),
        (280, "<12f", [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0], "bad_geometry"),
        (280, "<12f", [5000, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0], "bad_geometry"),
        (292, "<f", [1e7], "bad_geometry"),
        (344, "4s", [b"ni1\0"], "detached_header"),
        (344, "4s", [b"\0\0\0\0"], "bad_header"),
        (0, "<i", [17], "bad_header"),
    ],
)
def test_a_header_that_asks_for_the_impossible_is_refused(offset: int, form: str, values: list[Any], code: str) -> None:
    assert refusal(patched(written(ramp()), offset, form, *values)) == code


@pytest.mark.parametrize(
    ("offset", "form", "values"), [(256, "<f", [1.5]), (80, "<f", [-1.0]), (268, "<f", [float("nan")])]
)
def test_a_qform_that_is_none_is_refused_where_it_is_needed(offset: int, form: str, values: list[float]) -> None:
    alone = patched(written(ramp(), sform_code=0), offset, form, *values)
    assert refusal(alone) == "bad_geometry"
    beside = patched(written(ramp()), offset, form, *values)
    assert codes(parsed(beside)) == ["qform_sform"]


def test_377_bytes_that_ask_for_18_gigabytes_get_none() -> None:
    small = patched(written(ramp((1, 1, 25), "u1")), 40, "<8h", 3, 30_000, 30_000, 20, 1, 1, 1, 1)[:377]
    tracemalloc.start()
    wide = ScansConfig(max_megapixels=1e6, max_volume_mb=1e6)
    with pytest.raises(ScanError, match="377 bytes where the header declares 18000000352") as caught:
        parse_nifti(small, len(small), wide)
    assert caught.value.code == "truncated" and tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert refusal(small) == "too_large"


@pytest.mark.parametrize("length", [0, 3, 100, 347, 351, 400])
def test_a_file_that_is_cut_off_is_refused(length: int) -> None:
    data = written(ramp())[:length]
    assert refusal(data) in ("truncated", "bad_header")
    assert is_nifti(data) == (length >= 348)


def test_500_mutated_files_are_read_or_refused_and_nothing_else() -> None:
    rng = np.random.default_rng(7)
    originals = [written(ramp()), written(ramp((2, 3, 4, 5), "f4"), version=2), written(ramp(dtype="u1"), sform_code=0)]
    outcomes = {"read": 0}
    for number in range(500):
        data = bytearray(originals[number % 3])
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(0, 540 if rng.random() < 0.9 else len(data))] = rng.integers(0, 256)
        if rng.random() < 0.1:
            data = data[: rng.integers(0, len(data))]
        try:
            header = parsed(bytes(data))
            for volume in range(header.volumes):
                nifti_volume(header, bytes(data), volume)
            outcomes["read"] += 1
        except ScanError as error:
            outcomes[error.code] = outcomes.get(error.code, 0) + 1
    assert outcomes["read"] > 50 and len(outcomes) >= 6 and sum(outcomes.values()) == 500


# ---------------------------------------------------------------------------------------------------- gzip


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    cut=st.integers(0, 400),
    ours=st.booleans(),
    repeat=st.integers(1, 40),
)
def test_any_gzip_file_comes_back_or_is_refused(parts: list[bytes], cut: int, ours: bool, repeat: int) -> None:
    whole = b"".join(part * repeat for part in parts)
    pack = (lambda part: b"".join(gzip_members(part, member=64))) if ours else gzip.compress
    packed = b"".join(pack(part * repeat) for part in parts)
    assert bytes(bounded_gunzip(packed, len(whole))) == whole
    assert gzip.decompress(packed) == whole
    assert gunzip_start(packed, 100) == whole[:100]
    if whole:
        with pytest.raises(ScanError) as grown:
            bounded_gunzip(packed, len(whole) - 1)
        assert grown.value.code == "archive_bomb"
    for damaged in (packed + b"more", packed[: -(cut % len(packed)) - 1]):
        try:
            assert bytes(bounded_gunzip(damaged, len(whole))) == whole[: len(bounded_gunzip(damaged, len(whole)))]
            assert gzip.decompress(damaged) is not None  # cut exactly between two members
        except ScanError as error:
            assert error.code in ("truncated", "archive_damaged")


def test_two_members_that_are_alike_are_two() -> None:
    part = gzip.compress(b"same" * 1000)
    assert bytes(bounded_gunzip(part + part, 10_000)) == b"same" * 2000


@pytest.mark.parametrize("size", [*range((1 << 20) - 3, (1 << 20) + 300, 37), 3 << 20])
def test_long_runs_in_several_foreign_members_come_back_whole(size: int) -> None:
    packed = gzip.compress(bytes(size)) + gzip.compress(b"\1" * size)
    assert bytes(bounded_gunzip(packed, 2 * size)) == bytes(size) + b"\1" * size


@pytest.mark.parametrize(("cut", "code"), [(slice(0, -1), "truncated"), (slice(0, 40), "truncated")])
def test_a_gzip_file_that_is_cut_off_is_truncated(cut: slice, code: str) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    for packed in (gzip.compress(noise), b"".join(gzip_members(noise, member=1000))):
        with pytest.raises(ScanError) as caught:
            bounded_gunzip(packed[cut], 5000)
        assert caught.value.code == code


def test_a_flipped_bit_is_seen() -> None:
    noise = np.random.default_rng(0).bytes(5000)
    for packed in (gzip.compress(noise), b"".join(gzip_members(noise, member=1000))):
        changed = bytearray(packed)
        changed[2500] ^= 4
        with pytest.raises(ScanError) as caught:
            bounded_gunzip(bytes(changed), 5000)
        assert caught.value.code == "archive_damaged"


def test_a_gzip_bomb_costs_no_more_than_its_limit() -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(300)) + compressor.flush()
    honest_looking = bomb[:-4] + struct.pack("<I", 1 << 20)
    ours = b"".join(gzip_members(bytes(300 << 20)))
    for packed in (bomb, honest_looking, ours):
        tracemalloc.start()
        with pytest.raises(ScanError) as caught:
            bounded_gunzip(packed, 2 << 20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert caught.value.code == "archive_bomb" and peak < 16 << 20
    with pytest.raises(ScanError, match="empty members"):
        bounded_gunzip(gzip.compress(b"") * 100, 1000)


# ------------------------------------------------------------------------------------------------- writing


@settings(derandomize=True, max_examples=60, deadline=None)
@given(affine=affines(), kind=st.sampled_from(KINDS), slope=st.sampled_from([1.0, 0.5, -2.0]))
def test_what_is_written_nibabel_reads(affine: Array, kind: str, slope: float) -> None:
    values = ramp(dtype=kind)
    frozen = parsed(written(ramp(), affine)).affine
    data = nifti_header(values.shape, values.dtype.str, frozen, slope, 3.0) + values.tobytes()
    image = nibabel.Nifti1Image.from_bytes(data)
    np.testing.assert_allclose(image.affine, frozen, atol=1e-6)
    np.testing.assert_allclose(image.get_qform(), frozen, atol=0.02)
    assert image.header["qform_code"] == image.header["sform_code"] == 1
    np.testing.assert_allclose(np.asarray(image.dataobj).T, values.astype(float) * slope + 3)
    assert image.header["descrip"] == b"" and image.header.get_xyzt_units()[0] == "mm"
    header = parsed(data)
    assert header.findings == () and (header.slope, header.intercept) == (slope, 3.0)


def test_the_written_header_is_the_first_352_bytes() -> None:
    assert len(nifti_header((2, 3, 4), "i2", parsed(written(ramp())).affine)) == 352


def test_a_sheared_affine_has_no_qform() -> None:
    sheared = OBLIQUE.copy()
    sheared[:3, 2] += 0.3 * sheared[:3, 1]
    frozen = parsed(written(ramp(), sheared, qform_code=0)).affine
    data = nifti_header((5, 6, 7), "i2", frozen) + ramp().tobytes()
    header = parsed(data)
    assert header.findings == () and header.affine_from == "sform"
    np.testing.assert_allclose(header.affine, sheared, atol=1e-5)
    assert nibabel.Nifti1Image.from_bytes(data).header["qform_code"] == 0


def test_a_type_without_a_code_or_a_side_too_long_is_refused() -> None:
    affine = parsed(written(ramp())).affine
    for shape, kind, code in (((2, 2, 2), "f2", "unsupported_type"), ((2, 2, 40_000), "u1", "too_large")):
        with pytest.raises(ScanError) as caught:
            nifti_header(shape, kind, affine)
        assert caught.value.code == code


def test_the_compressed_file_is_the_same_for_nibabel_and_simpleitk(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    values = np.random.default_rng(0).integers(-1000, 2000, (20, 100, 90)).astype(np.int16)
    header = nifti_header(values.shape, "i2", parsed(written(ramp())).affine)
    members = list(itertools.chain(gzip_members(header), gzip_members(values, member=1 << 16)))
    assert len(members) > 4
    path = tmp_path / "volume.nii.gz"
    path.write_bytes(b"".join(members))
    image = nibabel.load(path)
    assert (values == np.asarray(image.dataobj).T).all()
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
    read = sitk.ReadImage(str(path))
    assert (sitk.GetArrayFromImage(read) == values).all()
    np.testing.assert_allclose(read.GetOrigin(), OBLIQUE[:3, 3] * [-1, -1, 1], atol=1e-4)


def test_members_do_not_depend_on_the_number_of_threads() -> None:
    data = np.random.default_rng(0).integers(0, 50, 100_000).astype(np.int16)
    one, three = (list(gzip_members(data, member=4096, threads=threads)) for threads in (1, 3))
    assert one == three and gzip.decompress(b"".join(one)) == data.tobytes()


# -------------------------------------------------------------------------------------------------- packed


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    kind=st.sampled_from(KINDS),
    colour=st.booleans(),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_a_packed_volume_comes_back_whole_and_in_part(
    sides: tuple[int, int, int], kind: str, colour: bool, corner: tuple[float, float, float]
) -> None:
    values = np.random.default_rng(1).integers(0, 99, (*sides, 3) if colour else sides).astype(kind)
    packed = pack_volume(values)
    whole = unpack_volume(packed)
    assert whole.dtype == values.dtype and (whole == values).all()
    start = tuple(int(share * (side - 1)) for share, side in zip(corner, sides, strict=True))
    stop = tuple(min(at + 40, side) for at, side in zip(start, sides, strict=True))
    inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert (unpack_patch(packed, start, stop) == values[inside]).all()


def test_a_patch_reads_only_its_blocks() -> None:
    values = np.random.default_rng(1).integers(0, 99, (64, 128, 128)).astype(np.uint8)
    packed = bytearray(pack_volume(values))
    packed[-20_000:] = bytes(20_000)
    assert (unpack_patch(bytes(packed), (0, 0, 0), (32, 64, 64)) == values[:32, :64, :64]).all()
    with pytest.raises(StorageError, match="damaged"):
        unpack_volume(bytes(packed))


def test_a_packed_volume_that_is_cut_off_is_refused() -> None:
    packed = pack_volume(ramp())
    for length in (0, 20, 60, len(packed) - 1):
        with pytest.raises(StorageError, match="cut off"):
            unpack_volume(packed[:length])
    with pytest.raises(IndexError):
        unpack_patch(packed, (0, 0, 0), (6, 6, 7))


# --------------------------------------------------------------------------------------------------- data


@pytest.mark.data
@pytest.mark.parametrize("folder", ["images", "labels"])
def test_the_hippocampus_volumes_are_as_nibabel_reads_them(folder: str) -> None:
    paths = sorted((Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "hippocampus" / folder).glob("*.nii.gz"))[:10]
    assert paths
    for path in paths:
        packed = path.read_bytes()
        header = parse_nifti(gunzip_start(packed), -1, CONFIG)
        data = bounded_gunzip(packed, header.file_bytes)
        values, findings = nifti_volume(parsed(bytes(data)), data)
        image = nibabel.load(path)
        assert (values == np.asanyarray(image.dataobj).T).all() and not findings and not header.findings
        np.testing.assert_allclose(header.affine, image.affine, atol=1e-5)
