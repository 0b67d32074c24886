"""A mosaic or grid is cut into its slices where its header tells how, and refused where it does not."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.convert import convert
from medtl.scans.mosaic import read_csa
from mosaics import UP, WHOLE, csa, grid, mosaic, protocol_of

NAMES = Pseudonymiser(b"0123456789abcdef")
COUNT, ROWS, COLUMNS = 6, 16, 20


@pytest.fixture
def slices() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(1, 4000, (COUNT, ROWS, COLUMNS)).astype(np.uint16)


def taken(folder: Path, header: Dataset, out: Path) -> Any:
    folder.mkdir(exist_ok=True)
    header.save_as(folder / "x.dcm", enforce_file_format=True)
    return convert(folder, out, ScansConfig(stable_seconds=0), NAMES)


def test_the_tiles_become_slices_that_lie_where_they_were_measured(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any]
) -> None:
    done = taken(tmp_path / "in", mosaic(dicom, slices, **WHOLE), tmp_path / "out")
    (volume,) = done.volumes
    image = nibabel.load(tmp_path / "out" / volume.output)
    assert isinstance(image, nibabel.Nifti1Image)
    assert np.array_equal(np.asarray(image.dataobj).T, slices)
    # the mosaic is 60 columns wide, a slice 20: its corner lies 20 columns of 2 mm further in
    assert np.allclose(image.affine @ [0, 0, 0, 1], [60 - 40, 48 - 32, 10, 1])
    assert np.allclose(image.affine @ [19, 15, 5, 1], [20 - 38, 16 - 30, 10 + 20, 1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**WHOLE, "NumberOfImagesInMosaic": ["5"]},
        {**WHOLE, "NumberOfImagesInMosaic": ["7"]},
        {**WHOLE, "NumberOfImagesInMosaic": ["0"]},
        {**WHOLE, "SliceNormalVector": ["0.0", "1.0", "0.0"]},
        {**WHOLE, "SliceNormalVector": ["0.0", "0.0"]},
        {**WHOLE, "ProtocolSliceNumber": ["4"]},
    ],
    ids=["no CSA", "too few", "too many", "none", "another way", "no way", "another order"],
)
def test_a_mosaic_that_is_not_told_completely_is_refused(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any], fields: dict[str, list[str]]
) -> None:
    done = taken(tmp_path / "in", mosaic(dicom, slices, **fields), tmp_path / "out")
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["mosaic"])


@pytest.mark.parametrize(
    ("attribute", "value", "code"),
    [
        ("ImagePositionPatient", None, "mosaic"),
        ("ImageOrientationPatient", None, "mosaic"),
        ("PixelSpacing", None, "mosaic"),
        ("SpacingBetweenSlices", None, "mosaic"),
        ("PixelSpacing", [0, 0], "bad_geometry"),
        ("ImageOrientationPatient", [1, 0, 0, 0, 5, 0], "bad_geometry"),
        ("ImagePositionPatient", [1e6, 0, 0], "bad_geometry"),
    ],
)
def test_a_mosaic_without_a_sound_place_is_refused_and_the_rest_goes_on(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any], attribute: str, value: Any, code: str
) -> None:
    mosaic(dicom, slices, **WHOLE).save_as(tmp_path / "whole.dcm", enforce_file_format=True)
    broken = mosaic(dicom, slices, **WHOLE)
    setattr(broken, attribute, value)
    done = taken(tmp_path, broken, tmp_path.parent / "out")
    assert len(done.volumes) == 1
    assert [one.code for one in done.refused] == [code]


# Images numbered from head to foot: the first tile is the last slice of the protocol. The middle of a mosaic of 60 x 48
# pixels of 2 mm at (-60, -48) is (0, 0); the tiles go down from 10 mm, in steps of 4.
DOWN = {**WHOLE, "SliceNormalVector": ["0.0", "0.0", "-1.0"], "ProtocolSliceNumber": ["5"]}
PLANNED: list[list[float]] = [[0.0, 0.0, -10.0 + 4 * number] for number in range(COUNT)]


def test_a_mosaic_from_head_to_foot_is_what_dcm2niix_makes_of_it(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any]
) -> None:
    converter = pytest.importorskip("dcm2niix").bin
    header = mosaic(dicom, slices, protocol_of(PLANNED), **DOWN)
    header.Manufacturer = "SIEMENS"
    (volume,) = taken(tmp_path / "in", header, tmp_path / "out").volumes
    ours = nibabel.load(tmp_path / "out" / volume.output)
    assert isinstance(ours, nibabel.Nifti1Image)
    assert np.array_equal(np.asarray(ours.dataobj).T, slices)
    for number in range(COUNT):
        assert np.allclose(ours.affine @ [0, 0, number, 1], [60 - 40, 48 - 32, 10 - 4 * number, 1])
    (tmp_path / "theirs").mkdir()
    command = [converter, "-z", "n", "-f", "x", "-o", str(tmp_path / "theirs"), str(tmp_path / "in")]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = (nibabel.as_closest_canonical(one) for one in (ours, nibabel.load(tmp_path / "theirs" / "x.nii")))
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    assert np.allclose(ours.affine, theirs.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("protocol", "fields"),
    [
        (None, DOWN),
        ("", DOWN),
        (protocol_of(PLANNED).replace("lSize", "lOther"), DOWN),
        (protocol_of(PLANNED).replace("ASCCONV END", "ASCCONV"), DOWN),
        (protocol_of(PLANNED).replace("-10.0", "ten"), DOWN),
        (protocol_of(PLANNED[::-1]), DOWN),
        (protocol_of(PLANNED[1:]), DOWN),
        (protocol_of([*PLANNED[:-1], [0.0, 0.0, 10.2]]), DOWN),
        (protocol_of([[1.0, *rest] for _, *rest in PLANNED]), DOWN),
        (protocol_of([[0.0, 0.0, float("nan")], *PLANNED[1:]]), DOWN),
        (protocol_of(PLANNED), {**DOWN, "SliceNormalVector": ["0.0", "0.0", "1.0"]}),
        (protocol_of([[0.0, 0.0, 10.0 + 4 * n] for n in range(COUNT)]), {**DOWN, "SliceNormalVector": ["0", "0", "1"]}),
        (protocol_of(PLANNED), {**DOWN, "ProtocolSliceNumber": ["4"]}),
        (protocol_of(PLANNED), {**DOWN, "ProtocolSliceNumber": ["-1"]}),
    ],
    ids=[
        "no protocol", "an empty one", "no number", "no end", "no coordinate", "the other order", "one too few",
        "the first tile aside", "all aside", "not finite", "the other way", "upwards from the last", "the last but one",
        "less than none",
    ],
)  # fmt: skip
def test_a_mosaic_from_head_to_foot_must_lie_where_the_protocol_has_its_slices(
    tmp_path: Path,
    dicom: Callable[..., Dataset],
    slices: np.ndarray[Any, Any],
    protocol: str | None,
    fields: dict[str, list[str]],
) -> None:
    done = taken(tmp_path / "in", mosaic(dicom, slices, protocol, **fields), tmp_path / "out")
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["mosaic"])


def test_the_csa_header_is_where_its_creator_made_room_for_it(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any]
) -> None:
    header = mosaic(dicom, slices)
    header.private_block(0x0029, "SIEMENS MEDCOM HEADER", create=True).add_new(0x10, "OB", b"else")
    header.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", csa(**WHOLE))
    assert (0x0029, 0x1110) in header
    (volume,) = taken(tmp_path / "in", header, tmp_path / "out").volumes
    assert volume.shape == (COUNT, ROWS, COLUMNS)


def test_a_csa_header_whose_creator_was_taken_away_is_read_all_the_same(
    tmp_path: Path, dicom: Callable[..., Dataset], slices: np.ndarray[Any, Any]
) -> None:
    header = mosaic(dicom, slices, **WHOLE)
    del header[0x0029, 0x0010]
    (volume,) = taken(tmp_path / "in", header, tmp_path / "out").volumes
    assert volume.shape == (COUNT, ROWS, COLUMNS)


def test_a_damaged_csa_header_gives_nothing() -> None:
    whole = csa(**WHOLE)
    assert read_csa(whole) == WHOLE
    rng = np.random.default_rng(0)
    for _ in range(500):
        broken = bytearray(whole[: int(rng.integers(0, len(whole)))])
        for place in rng.integers(0, max(len(broken), 1), 4):
            if broken:
                broken[place] = int(rng.integers(0, 256))
        assert isinstance(read_csa(bytes(broken)), dict)
    assert read_csa(whole[:-40]) == {}


NUMBER, SEQUENCE = (0x0065, 0x1050), (0x0065, 0x1051)


@pytest.fixture
def seven() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(1, 4000, (7, ROWS, COLUMNS)).astype(np.uint16)


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("positions", [UP, UP[::-1]], ids=["upwards", "downwards"])
def test_a_grid_becomes_slices_at_the_positions_that_it_gives(
    tmp_path: Path, dicom: Callable[..., Dataset], seven: np.ndarray[Any, Any], positions: Any, implicit: bool
) -> None:
    header = grid(dicom, seven, positions)
    if implicit:  # a private sequence is bytes there: its VR is in no dictionary
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    (volume,) = taken(tmp_path / "in", header, tmp_path / "out").volumes
    image = nibabel.load(tmp_path / "out" / volume.output)
    assert isinstance(image, nibabel.Nifti1Image)
    assert np.array_equal(np.asarray(image.dataobj).T, seven)
    for number, (x, y, z) in enumerate(positions):
        assert np.allclose(image.affine @ [0, 0, number, 1], [-x, -y, z, 1])
        assert np.allclose(image.affine @ [5, 7, number, 1], [-x - 5 * 3, -y - 7 * 2, z, 1])


@pytest.mark.parametrize("count", [2, 5, 7])
def test_a_grid_is_what_dcm2niix_makes_of_it(
    tmp_path: Path, dicom: Callable[..., Dataset], seven: np.ndarray[Any, Any], count: int
) -> None:
    """Two slices are 2 x 1 tiles, five 3 x 2, seven 3 x 3."""
    converter = pytest.importorskip("dcm2niix").bin
    header = grid(dicom, seven[:count], UP[:count], ImagePositionPatient=UP[0])
    (volume,) = taken(tmp_path / "in", header, tmp_path / "out").volumes
    (tmp_path / "theirs").mkdir()
    command = [converter, "-z", "n", "-f", "x", "-o", str(tmp_path / "theirs"), str(tmp_path / "in")]
    subprocess.run(command, check=True, capture_output=True)
    ours = nibabel.as_closest_canonical(nibabel.load(tmp_path / "out" / volume.output))
    theirs = nibabel.as_closest_canonical(nibabel.load(tmp_path / "theirs" / "x.nii"))
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    assert np.allclose(ours.affine, theirs.affine, atol=1e-4)


def move(header: Dataset, axis: int, by: float) -> None:
    item = header[SEQUENCE].value[3]
    place = [float(number) for number in item.ImagePositionPatient]
    place[axis] += by
    item.ImagePositionPatient = place


def keep(header: Dataset, order: list[int]) -> None:
    items = list(header[SEQUENCE].value)
    header[SEQUENCE].value = [copy.deepcopy(items[number]) for number in order]


SPOILT: dict[str, Callable[[Dataset], None]] = {
    "a position too few": lambda header: keep(header, [0, 1, 2, 3, 4, 5]),
    "a position too many": lambda header: keep(header, [0, 1, 2, 3, 4, 5, 6, 6]),
    "no positions": lambda header: keep(header, []),
    "another order": lambda header: keep(header, [0, 2, 1, 3, 4, 5, 6]),
    "one place twice": lambda header: keep(header, [0, 1, 2, 3, 4, 5, 5]),
    "a slice aside": lambda header: move(header, 0, 1.0),
    "a slice too high": lambda header: move(header, 2, 1.0),
    "a slice at infinity": lambda header: move(header, 2, 1e12),
    "a slice without a position": lambda header: header[SEQUENCE].value[3].__delitem__("ImagePositionPatient"),
    "another number": lambda header: setattr(header[NUMBER], "value", "9"),
    "no number": lambda header: header.__delitem__(NUMBER),
    "no creator": lambda header: header.__delitem__((0x0065, 0x0010)),
    "a sequence that is none": lambda header: header.add_new(SEQUENCE, "LO", "1"),
    "the place of no slice": lambda header: setattr(header, "ImagePositionPatient", [-60, -48, 12]),
    "no orientation": lambda header: header.__delitem__("ImageOrientationPatient"),
    "no spacing": lambda header: header.__delitem__("PixelSpacing"),
    "columns that cannot be divided": lambda header: header.update({"Columns": 40, "Rows": 72}),
    "rows that cannot be divided": lambda header: header.update({"Columns": 72, "Rows": 40}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_grid_that_contradicts_itself_is_refused(
    tmp_path: Path, dicom: Callable[..., Dataset], seven: np.ndarray[Any, Any], what: str
) -> None:
    header = grid(dicom, seven, UP)
    SPOILT[what](header)
    done = taken(tmp_path / "in", header, tmp_path / "out")
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["mosaic"])


def test_a_sheared_grid_is_refused(tmp_path: Path, dicom: Callable[..., Dataset], seven: np.ndarray[Any, Any]) -> None:
    header = grid(dicom, seven, [[x, y + 2 * n, z] for n, (x, y, z) in enumerate(UP)])
    done = taken(tmp_path / "in", header, tmp_path / "out")
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["mosaic"])


def test_a_tile_behind_the_last_slice_of_a_grid_must_be_empty(
    tmp_path: Path, dicom: Callable[..., Dataset], seven: np.ndarray[Any, Any]
) -> None:
    header = grid(dicom, seven, UP)
    pixels = np.frombuffer(header.PixelData, np.uint16).copy()
    pixels[-1] = 1
    header.PixelData = pixels.tobytes()
    done = taken(tmp_path / "in", header, tmp_path / "out")
    assert (done.volumes, [one.code for one in done.refused]) == ((), ["mosaic"])


def test_an_empty_slice_of_a_grid_is_one(
    tmp_path: Path, dicom: Callable[..., Dataset], seven: np.ndarray[Any, Any]
) -> None:
    seven[-1] = 0
    (volume,) = taken(tmp_path / "in", grid(dicom, seven, UP), tmp_path / "out").volumes
    assert volume.shape[0] == 7


def test_a_grid_is_known_by_its_number_of_slices_too(
    tmp_path: Path, dicom: Callable[..., Dataset], seven: np.ndarray[Any, Any]
) -> None:
    header = grid(dicom, seven, UP, ImageType=["ORIGINAL", "PRIMARY", "M"])
    (volume,) = taken(tmp_path / "in", header, tmp_path / "out").volumes
    assert volume.shape == (7, ROWS, COLUMNS)


def test_repetitions_of_a_grid_are_volumes_of_their_own(
    tmp_path: Path, dicom: Callable[..., Dataset], seven: np.ndarray[Any, Any]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        one = grid(dicom, np.roll(seven, number, axis=1), UP, SeriesInstanceUID="1.2.7", StudyInstanceUID="1.2")
        one.save_as(tmp_path / "in" / f"{number}.dcm", enforce_file_format=True)
    done = convert(tmp_path / "in", tmp_path / "out", ScansConfig(stable_seconds=0), NAMES)
    assert [one.shape for one in done.volumes] == [(7, ROWS, COLUMNS)] * 2
    assert done.refused == ()
