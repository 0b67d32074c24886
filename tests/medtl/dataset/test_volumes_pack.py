"""Packed volumes hold what was put in, and a crop is read from the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medtl.config import PatchesConfig
from medtl.dataset.io import MASKS, VALUES, VOLUMES, read_volumes, write_volumes
from medtl.dataset.patches import Patches
from medtl.errors import PlanError, StorageError
from medtl.records import AnyArray, FloatArray, GridPlan, Structure

PLAN = GridPlan(
    (Structure("front", (1,)), Structure("back", (2,))), None, 3, "axial", 0, 1, (1.0, 1.0, 1.0), "zscore", None, None,
    None, None, (), (8, 8, 8), 2, ((1, 1, 1),), ((3, 3, 3),), (8,), (), {}, {},
)  # fmt: skip
Item = tuple[str, FloatArray, AnyArray]


def items(shapes: tuple[tuple[int, int, int], ...] = ((9, 10, 11), (5, 7, 6))) -> Iterator[Item]:
    rng = np.random.default_rng(0)
    for number, shape in enumerate(shapes):
        codes = rng.integers(0, 3, shape).astype(np.uint8)
        codes[0] = 255
        yield f"s-{number}", rng.normal(size=(1, *shape)).astype(np.float32), codes


def test_every_volume_comes_back_in_its_shape(tmp_path: Path) -> None:
    write_volumes(tmp_path, items(), PLAN)
    volumes = read_volumes(tmp_path)
    assert len(volumes) == 2 and volumes.study_ids == ("s-0", "s-1")
    for number, (_, image, codes) in enumerate(items()):
        assert volumes.image(number).dtype == np.float16 and np.array_equal(volumes.codes(number), codes)
        assert np.array_equal(volumes.image(number), image.astype(np.float16))
        assert volumes.fills[number] == volumes.image(number).min()


def test_places_lie_in_their_structure_and_not_where_nothing_counts(tmp_path: Path) -> None:
    write_volumes(tmp_path, items(), PLAN)
    volumes = read_volumes(tmp_path)
    for number in range(2):
        for structure, places in enumerate(volumes.places(number)):
            codes = volumes.codes(number)
            assert np.all(codes[tuple(places.T)] == structure + 1)
            assert len(places) == np.sum(codes == structure + 1)


def test_scans_without_structures_are_packed_and_patches_come_from_anywhere(tmp_path: Path) -> None:
    plan = replace(PLAN, structures=())
    write_volumes(tmp_path, ((name, image, np.zeros_like(codes)) for name, image, codes in items()), plan)
    volumes = read_volumes(tmp_path)
    assert volumes.counts == ((), ()) and np.array_equal(volumes.image(0), next(items())[1].astype(np.float16))
    images, codes = Patches(volumes, [0, 1], plan, PatchesConfig(), 0).step(0, 0, 0)
    assert images.shape == (2, 1, 8, 8, 8) and not codes.any() and images.std() > 0.5


def test_of_a_large_structure_some_thousand_places_are_kept_everywhere_in_it(tmp_path: Path) -> None:
    image, codes = np.zeros((1, 30, 30, 30), np.float32), np.ones((30, 30, 30), np.uint8)
    write_volumes(tmp_path, iter([("s", image, codes)]), PLAN)
    front, back = read_volumes(tmp_path).places(0)
    assert 1000 < len(front) <= 5000 and len(back) == 0 and len(np.unique(front, axis=0)) == len(front)
    assert np.abs(front.mean(0) - 14.5).max() < 1


def test_values_beyond_half_precision_are_held_to_it(tmp_path: Path) -> None:
    image = np.full((1, 3, 3, 3), 1e6, np.float32)
    write_volumes(tmp_path, iter([("s", image, np.zeros((3, 3, 3), np.uint8))]), PLAN)
    assert np.all(read_volumes(tmp_path).image(0) == np.finfo(np.float16).max)


def test_the_same_volumes_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_volumes(tmp_path / name, items(((30, 30, 30),)), PLAN)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_what_is_written_into_a_view_does_not_reach_the_file(tmp_path: Path) -> None:
    write_volumes(tmp_path, items(), PLAN)
    before = (tmp_path / VALUES).read_bytes()
    read_volumes(tmp_path).image(0)[:] = 9
    assert (tmp_path / VALUES).read_bytes() == before


@pytest.mark.parametrize("name", [VALUES, MASKS])
def test_a_cut_file_is_refused(tmp_path: Path, name: str) -> None:
    write_volumes(tmp_path, items(), PLAN)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2])
    with pytest.raises(StorageError, match="has not the size"):
        read_volumes(tmp_path)
    (tmp_path / VOLUMES).unlink()
    with pytest.raises(StorageError, match="not a readable"):
        read_volumes(tmp_path)


def test_a_mask_of_another_shape_and_an_empty_pack_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="another shape"):
        write_volumes(tmp_path, iter([("s", np.zeros((1, 3, 3, 3), np.float32), np.zeros((3, 3, 4), np.uint8))]), PLAN)
    with pytest.raises(PlanError, match="no scan to pack"):
        write_volumes(tmp_path, iter([]), PLAN)
