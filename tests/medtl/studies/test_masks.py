"""Masks find their images and lie on them, or are left out with a reason; real files, read by intake."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from medtl.config import Config, LabelsConfig, parse_config
from medtl.errors import ConfigError, StudyError
from medtl.progress import listening
from medtl.records import Cohort, Scan
from medtl.scans.intake import read_exclusions, read_scans
from medtl.studies.io import read_cohort
from medtl.studies.masks import different, misplaced
from pipelines import steps

Array = np.ndarray[Any, Any]
SPACE = (8, 7, 6)  # columns, rows, slices
AFFINE = np.diag([-1.0, -1.5, 2.0, 1.0])
LABELS = {"path": "image", "mask": "mask", "structures": {"head": 1, "tail": 2}}


def volume(number: int) -> Array:
    return np.random.default_rng(number).normal(100, 20, SPACE).astype(np.float32)


def mask(*values: int) -> Array:
    drawn = np.zeros(SPACE, np.uint8)
    for at, value in enumerate(values or (1, 2)):
        drawn[2 + at, 3, 1:4] = value
    return drawn


def save(path: Path, values: Array, affine: Array = AFFINE, slope: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    nibabel.save(image, path)


def table(folder: Path, *rows: str, columns: str = "image,mask,patient") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.csv").write_text("\n".join((columns, *rows)) + "\n")


def configured(folder: Path, policy: dict[str, str] | None = None, **labels: Any) -> Config:
    scans = {"source": str(folder / "scans"), "key_file": str(folder / "key"), "stable_seconds": 0}
    checks = {"checks": {"policy": policy or {}}}
    named = {"labels": LABELS | labels}
    return parse_config({"name": "t", "workspace": str(folder / "w"), "scans": scans | checks, "studies": named})


def cohort_of(config: Config) -> Cohort:
    return read_cohort(steps.build_cohort(config, steps.ingest_scans(config)).path)


def why(cohort: Cohort) -> dict[str, str]:
    return {one.code: one.reason for one in cohort.exclusions}


@pytest.fixture
def one_more(tmp_path: Path) -> Callable[..., Cohort]:
    """Give the cohort of two good cases and one whose mask is as the test wants it."""

    def build(write: Callable[[Path], None], **options: Any) -> Cohort:
        source = tmp_path / "scans"
        for number in range(3):
            save(source / f"images/{number}.nii.gz", volume(number))
        for number in range(2):
            save(source / f"labels/{number}.nii.gz", mask(1 + number, 2))
        write(source / "labels/2.nii.gz")
        table(source, *(f"images/{n}.nii.gz,labels/{n}.nii.gz,p{n}" for n in range(3)))
        return cohort_of(configured(tmp_path, **options))

    return build


def test_an_image_and_its_mask_of_the_same_name_become_one_study(one_more: Callable[..., Cohort]) -> None:
    cohort = one_more(lambda path: save(path, mask(1)))
    assert cohort.exclusions == ()
    assert (cohort.task, cohort.classes, cohort.ignore) == ("multilabel", ("head", "tail"), None)
    assert sorted(study.target for study in cohort.studies) == [(0, 1), (1, 0), (1, 1)]
    assert len({study.mask for study in cohort.studies} | {study.scan_id for study in cohort.studies}) == 6


def shifted(millimetres: float) -> Array:
    moved = AFFINE.copy()
    moved[0, 3] += millimetres
    return moved


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "mask_shape_differs": (lambda path: save(path, mask()[:-1]), "6 x 7 x 7 voxels on an image of 6 x 7 x 8"),
    "mask_affine_differs": (lambda path: save(path, mask(), shifted(0.2)), r"a corner lies 0\.2 voxels from"),
    "mask_flipped": (lambda path: save(path, mask(), AFFINE @ np.diag([-1, 1, -1, 1])), "columns and slices run"),
    "mask_unknown_values": (lambda path: save(path, mask(1, 3, 7)), r"holds 3, 7; .*studies\.labels\.structures"),
    "mask_not_integer": (lambda path: save(path, mask() * np.float32(0.4)), "not whole numbers"),
    "mask_empty": (lambda path: save(path, np.zeros(SPACE, np.uint8)), r"studies\.labels\.empty_masks: keep"),
    "mask_several_volumes": (lambda path: save(path, np.stack([mask(1), mask(2)], axis=3)), "4-D"),
    "mask_missing": (lambda path: None, r"not among the scans; give its path below scans\.source"),
}


@pytest.mark.parametrize("code", REFUSED)
def test_a_mask_that_does_not_fit_is_left_out_and_told_why(one_more: Callable[..., Cohort], code: str) -> None:
    write, reason = REFUSED[code]
    cohort = one_more(write)
    assert len(cohort.studies) == 2
    assert re.search(reason, why(cohort)[code])
    assert set(why(cohort)) - {code} <= {"image_without_label"}


def test_a_mask_that_intake_left_out_is_told_with_its_code(one_more: Callable[..., Cohort]) -> None:
    cohort = one_more(lambda path: path.write_bytes(b""))
    assert why(cohort)["mask_missing"].startswith("intake left it out (empty_file)")


def test_a_mask_a_hair_off_or_stored_as_float_or_scaled_is_accepted(one_more: Callable[..., Cohort]) -> None:
    cohort = one_more(lambda path: save(path, (mask(2) * 127.5).astype(np.float32), shifted(0.05), slope=1 / 127.5))
    assert cohort.exclusions == ()
    assert sorted(study.target for study in cohort.studies) == [(0, 1), (0, 1), (1, 1)]


def test_a_name_that_only_a_mask_has_does_not_make_it_the_image(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    for number in range(2):
        save(source / f"labels/{number}.nii", mask())
    save(source / "images/0.nii", volume(0))
    table(source, "images/0.nii,labels/0.nii,a", "images/1.nii,labels/1.nii,b")
    cohort = cohort_of(configured(tmp_path))
    assert len(cohort.studies) == 1
    assert set(why(cohort)) == {"label_without_image"}


@pytest.mark.parametrize("kept", [True, False])
def test_attributes_stand_beside_masks_unless_they_tell_patients_apart(tmp_path: Path, kept: bool) -> None:
    source = tmp_path / "scans"
    for number in range(2):
        save(source / f"images/{number}.nii", volume(number))
        save(source / f"labels/{number}.nii", mask(1 + number, 2))
    views = ["PA", "PA" if kept else "AP"]
    rows = [f"images/{n}.nii,labels/{n}.nii,p{n},{view}" for n, view in enumerate(views)]
    table(source, *rows, columns="image,mask,patient,view")
    config = configured(tmp_path, attributes=["view"])
    if kept:
        assert [study.attributes for study in cohort_of(config).studies] == [{"view": "PA"}] * 2
    else:
        with pytest.raises(StudyError, match="shared by two patients"):
            cohort_of(config)


def test_a_bare_name_means_the_one_that_no_row_names_as_a_mask(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    for number in range(2):
        save(source / f"images/{number}.nii", volume(number))
        save(source / f"labels/{number}.nii", mask(1 + number))
    table(source, "0.nii,labels/0.nii,a", "1.nii,labels/1.nii,b")
    assert sorted(study.target for study in cohort_of(configured(tmp_path)).studies) == [(0, 1), (1, 0)]


def test_a_four_dimensional_image_or_one_with_nan_is_left_out(tmp_path: Path) -> None:
    source, broken = tmp_path / "scans", volume(1)
    broken[2, 2, 2] = np.nan
    save(source / "images/0.nii", np.stack([volume(0), volume(3)], axis=3))
    save(source / "images/1.nii", broken)
    save(source / "images/2.nii", volume(2))
    for number in range(3):
        save(source / f"labels/{number}.nii", mask(*[1] * (1 + number)))
    table(source, *(f"images/{n}.nii,labels/{n}.nii,p{n}" for n in range(3)))
    config = configured(tmp_path)
    cohort = cohort_of(config)
    assert len(cohort.studies) == 1
    assert "4-D" in why(cohort)["several_volumes"]
    assert [one.code for one in read_exclusions(steps.ingest_scans(config).path)] == ["non_finite"]


@pytest.mark.parametrize("copied", [False, True])
def test_one_mask_for_two_images_serves_neither(tmp_path: Path, copied: bool) -> None:
    source = tmp_path / "scans"
    for number in range(3):
        save(source / f"images/{number}.nii", volume(number))
    for number, values in enumerate([(1,), (2,), (2,)]):
        save(source / f"labels/{number}.nii", mask(*values))
    last = 2 if copied else 1
    table(source, "images/0.nii,labels/0.nii,a", "images/1.nii,labels/1.nii,b", f"images/2.nii,labels/{last}.nii,c")
    cohort = cohort_of(configured(tmp_path))
    assert len(cohort.studies) == 1
    assert [one.code for one in cohort.exclusions] == ["mask_shared"] * 2


def test_a_file_that_is_image_and_mask_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    save(source / "0.nii", mask())
    save(source / "1.nii", volume(1))
    save(source / "m.nii", mask())
    table(source, "0.nii,0.nii,a", "1.nii,m.nii,b")
    with pytest.raises(StudyError, match="mask_is_image"):  # the mask's bytes are those of the image
        cohort_of(configured(tmp_path))


def test_a_blank_cell_is_a_missing_mask_and_two_masks_for_one_image_contradict(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    for number in range(3):
        save(source / f"images/{number}.nii", volume(number))
        save(source / f"labels/{number}.nii", mask(*[1] * (1 + number)))
    rows = [
        "images/0.nii,labels/0.nii,a",
        "images/1.nii,,b",
        "images/2.nii,labels/1.nii,c",
        "images/2.nii,labels/2.nii,c",
    ]
    table(source, *rows)
    cohort = cohort_of(configured(tmp_path))
    assert set(why(cohort)) == {"mask_missing", "conflicting_labels"}
    assert "'mask' is blank" in why(cohort)["mask_missing"]


def test_empty_masks_are_kept_where_they_are_meant_however_alike(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    for number in range(3):
        save(source / f"images/{number}.nii", volume(number))
        save(source / f"labels/{number}.nii", mask() if number == 0 else np.zeros(SPACE, np.uint8))
    table(source, *(f"images/{n}.nii,labels/{n}.nii,p{n}" for n in range(3)))
    cohort = cohort_of(configured(tmp_path, policy={"blank": "accept"}, empty_masks="keep"))
    assert cohort.exclusions == ()
    assert sorted(study.target for study in cohort.studies) == [(0, 0), (0, 0), (1, 1)]


def test_keeping_empty_masks_needs_an_intake_that_takes_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scans\.checks\.policy: \{blank: accept\}"):
        configured(tmp_path, empty_masks="keep")


def test_masks_without_a_table_are_refused() -> None:
    with pytest.raises(ValidationError, match="give table too"):
        LabelsConfig(**{**LABELS, "table": None})


def test_a_structure_that_no_mask_shows_is_a_warning(one_more: Callable[..., Cohort]) -> None:
    cohort = one_more(lambda path: save(path, mask(1)), structures={"head": 1, "tail": 2, "body": 9}, ignore=4)
    assert cohort.patients_known
    assert len(cohort.warnings) == 1
    assert "'body' (value 9)" in cohort.warnings[0]


def test_values_that_do_not_count_and_regions_of_several_are_known(one_more: Callable[..., Cohort]) -> None:
    cohort = one_more(lambda path: save(path, mask(3, 4)), structures={"organ": [1, 2, 3], "tumour": 2}, ignore=4)
    assert cohort.exclusions == ()
    assert cohort.ignore == 4
    assert [one.values for one in cohort.structures] == [(1, 2, 3), (2,)]
    assert sorted(study.target for study in cohort.studies) == [(1, 0), (1, 1), (1, 1)]


def pictures(source: Path, number: int, field: Array | None = None) -> None:
    """Write a colour image with a vessel, its mask and its field as a retina camera's data set has them."""
    for folder in ("images", "manual", "mask"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    vessel = np.zeros((20, 30), np.uint8)
    vessel[5 + number, 4:20] = 255
    Image.fromarray(colours).save(source / f"images/{number}.tif")
    Image.fromarray(vessel).save(source / f"manual/{number}.gif")
    inside = np.full((20, 30), 255, np.uint8) if field is None else field
    Image.fromarray(inside).save(source / f"mask/{number}.gif")


COLUMNS = "image,mask,fov,patient"
VESSELS: dict[str, Any] = {"structures": {"vessel": 255}, "field": "fov"}


def test_gif_masks_and_fields_lie_on_colour_images_and_a_field_may_be_shared(tmp_path: Path) -> None:
    source, field = tmp_path / "scans", np.zeros((20, 30), np.uint8)
    field[2:18, 2:28] = 255
    for number in range(2):
        pictures(source, number, field)
    table(source, *(f"images/{n}.tif,manual/{n}.gif,mask/{n}.gif,p{n}" for n in range(2)), columns=COLUMNS)
    config = configured(tmp_path, **VESSELS)
    cohort = cohort_of(config)
    assert (cohort.exclusions, [study.target for study in cohort.studies]) == ((), [(1,), (1,)])
    assert len({study.field for study in cohort.studies}) == 1  # the same bytes
    channels = {scan.scan_id: scan.channels for scan in read_scans(steps.ingest_scans(config).path)}
    assert {(channels[study.scan_id], channels[study.mask or ""]) for study in cohort.studies} == {(3, 1)}


def test_what_a_mask_shows_outside_its_field_does_not_count(tmp_path: Path) -> None:
    source, field = tmp_path / "scans", np.zeros((20, 30), np.uint8)
    field[6:9] = 255
    for number in range(2):  # the first vessel lies above the field
        pictures(source, number, field)
    table(source, *(f"images/{n}.tif,manual/{n}.gif,mask/{n}.gif,p{n}" for n in range(2)), columns=COLUMNS)
    cohort = cohort_of(configured(tmp_path, **VESSELS))
    assert (len(cohort.studies), set(why(cohort))) == (1, {"mask_empty"})


def test_a_blank_field_is_told_to_be_left_out_and_a_mask_in_colour_to_be_saved_with_one_channel(tmp_path: Path) -> None:
    source, field = tmp_path / "scans", np.zeros((20, 30), np.uint8)
    field[2:18] = 1
    for number in range(3):
        pictures(source, number, None if number == 1 else field)
    Image.fromarray(np.dstack([np.eye(20, 30, dtype=np.uint8) * 200] * 2 + [np.zeros((20, 30), np.uint8)])).save(
        source / "manual/2.png"
    )
    names = ["manual/0.gif,mask/0.gif", "manual/1.gif,mask/1.gif", "manual/2.png,"]
    table(source, *(f"images/{n}.tif,{name},p{n}" for n, name in enumerate(names)), columns=COLUMNS)
    reasons = why(cohort_of(configured(tmp_path, **VESSELS)))
    assert "leave the cell blank" in reasons["field_missing"]
    assert "one channel" in reasons["mask_colour"]


def test_a_field_of_fractions_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    for number in range(2):
        save(source / f"images/{number}.nii", volume(number))
        save(source / f"labels/{number}.nii", mask(1 + number))
        save(source / f"fov/{number}.nii", (volume(2) > 100) * np.float32(1 - 0.6 * number))
    rows = [f"images/{n}.nii,labels/{n}.nii,fov/{n}.nii,p{n}" for n in range(2)]
    table(source, *rows, columns=COLUMNS)
    assert set(why(cohort_of(configured(tmp_path, field="fov")))) == {"field_not_integer"}


def test_a_gif_of_several_frames_or_cut_off_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    pictures(source, 0)
    frames = [Image.fromarray(np.eye(20, 30, number, dtype=np.uint8) * 255) for number in range(3)]
    frames[0].save(source / "film.gif", save_all=True, append_images=frames[1:])
    (source / "cut.gif").write_bytes((source / "manual/0.gif").read_bytes()[:-20])
    table(source, "images/0.tif,manual/0.gif,a")
    refused = {one.code for one in read_exclusions(steps.ingest_scans(configured(tmp_path)).path)}
    assert refused == {"multi_frame", "undecodable", "blank"}


def test_fingerprints_of_a_cohort_are_of_its_images_alone(one_more: Callable[..., Cohort], tmp_path: Path) -> None:
    cohort = one_more(lambda path: save(path, mask(1)))
    config = configured(tmp_path)
    scans = steps.ingest_scans(config)
    made = steps.fingerprint_scans(config, scans, steps.build_cohort(config, scans))
    assert set(json.loads((made.path / "digests.json").read_text())) == {one.pixel_digest for one in cohort.studies}


def test_reading_masks_says_how_far_it_is(one_more: Callable[..., Cohort]) -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *what: heard.append(what)):
        one_more(lambda path: save(path, mask(1)))
    assert [one for one in heard if one[0] == "reading masks"] == [("reading masks", n, 3) for n in (1, 2, 3)]


def placed(affine: Array) -> Scan:
    rows = tuple(tuple(float(v) for v in row) for row in affine)
    return Scan("a", "nifti", SPACE[::-1], "|u1", "p", (), 8, affine=rows)  # type: ignore[arg-type]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 2), st.floats(-0.09, 0.09), st.floats(-3, 3), st.floats(0.5, 3), st.booleans())
def test_masks_are_where_their_corners_are_wherever_the_image_lies(
    axis: int, off: float, turn: float, spacing: float, flip: bool
) -> None:
    image = np.eye(4)
    image[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    image[:3, :3] *= spacing
    image[:3, 3] = 40, -30, 7
    moved = np.eye(4)
    moved[axis, 3] = off
    assert misplaced(placed(image), placed(image @ moved)) is None
    moved[axis, 3] = off + (0.2 if off > 0 else -0.2)
    assert getattr(misplaced(placed(image), placed(image @ moved)), "code", None) == "mask_affine_differs"
    turned = np.eye(4)
    turned[axis, axis] = -1
    turned[axis, 3] = SPACE[axis] - 1 if flip else 0  # the same voxels the other way, or the sign alone
    assert getattr(misplaced(placed(image), placed(image @ turned)), "code", None) == "mask_flipped"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.sampled_from(["|u1", "<i2", "<u4", "<i8", "<f4"]), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 2.0]))
def test_the_values_of_a_mask_are_those_that_numpy_lists(dtype: str, seed: int, slope: float) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.choice(rng.integers(0, 120, 4), (3, 4, 5)).astype(dtype)
    inside = rng.random(drawn.shape) > 0.7
    scan = Scan("a", "nifti", drawn.shape, dtype, "p", (), 8, slope=slope, intercept=-1.0)
    found = different(drawn, scan), different(drawn, scan, inside)
    assert np.array_equal(found[0], np.unique(drawn.astype(float)) * slope - 1)  # type: ignore[arg-type]
    assert np.array_equal(found[1], np.unique(drawn[inside].astype(float)) * slope - 1)  # type: ignore[arg-type]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "studies", "labels"),
    [
        ("hippocampus", 205, {"table": "cases.csv", "structures": {"anterior": 1, "posterior": 2}}),
        ("drive", 20, {"field": "field", "structures": {"vessel": 255}}),
    ],
)
def test_public_data_sets_are_whole(tmp_path: Path, name: str, studies: int, labels: dict[str, Any]) -> None:
    source = Path(os.environ["MEDTL_TEST_DATA"]) / "data" / name
    if name == "drive":
        rows = [
            f"images/{n}_training.tif,1st_manual/{n}_manual1.gif,mask/{n}_training_mask.gif,{n}" for n in range(21, 41)
        ]
        table(tmp_path, *rows, columns="image,mask,field,patient")
        labels = labels | {"table": str(tmp_path / "labels.csv")}
    config = configured(tmp_path, **labels)
    config = config.model_copy(update={"scans": config.scans.model_copy(update={"source": source})})
    cohort = cohort_of(config)
    assert (len(cohort.studies), cohort.exclusions, cohort.warnings) == (studies, (), ())
    assert all(all(study.target) for study in cohort.studies)
