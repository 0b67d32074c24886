"""A map that points at the mark, one that points away, and one that knows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.artifacts import read_record, write_record
from medtl.config import UncertaintyConfig
from medtl.evaluation.pointing import (
    UNNAMED,
    box,
    box_on,
    hits,
    marked_studies,
    measure_pointing,
    relevance_inside,
    within,
)
from medtl.records import PointingFindings, Predictions, Scan, Task

FEW = UncertaintyConfig(resamples=200)


def studies(n: int = 60, seed: int = 0, size: int = 24) -> tuple[Any, list[str], list[str]]:
    """Mark a square of 4 pixels somewhere in each image; two images a patient."""
    corners = np.random.default_rng(seed).integers(0, size - 4, (n, 2))
    marks = np.stack([box((size, size), corner, corner + 4) for corner in corners])
    return marks, [f"s-{i:03d}" for i in range(n)], [f"p-{i // 2}" for i in range(n)]


def measured(maps: Any, marks: Any, ids: list[str], people: list[str], **more: Any) -> PointingFindings:
    return measure_pointing(maps, marks, "occlusion", "ill", ids, people, FEW, 0, **more)


def test_a_map_of_the_marks_themselves_is_right_everywhere_and_better_than_chance() -> None:
    marks, ids, people = studies()
    found = measured(marks.astype(float), marks, ids, people)
    assert (found.hits.value, found.inside.value) == (1.0, 1.0)
    assert found.hits.low is not None and found.hits.low > 0.85
    assert found.hits_chance.value == pytest.approx(16 / 24**2)
    assert found.hits_gain.value == pytest.approx(1 - 16 / 24**2)
    assert found.hits_gain.low is not None and found.hits_gain.low > 0.7


def test_the_map_upside_down_is_wrong_everywhere() -> None:
    marks, ids, people = studies()
    found = measured(1.0 - marks, marks, ids, people)
    assert (found.hits.value, found.inside.value) == (0.0, 0.0)
    assert found.hits_gain.high is not None and found.hits_gain.high < 0.1


def test_a_map_that_knows_nothing_gains_nothing() -> None:
    marks, ids, people = studies(400)
    noise = np.random.default_rng(1).random(marks.shape)
    found = measured(noise, marks, ids, people)
    for gain in (found.hits_gain, found.inside_gain):
        assert gain.low is not None and gain.high is not None
        assert gain.low <= 0.005 and gain.high >= -0.005
    assert found.inside.value == pytest.approx(16 / 24**2, rel=0.1)


def test_relevance_is_that_share_which_is_inside_and_what_speaks_against_does_not_count() -> None:
    maps, inside = np.array([[3.0, 1.0, -9.0]]), np.array([[True, False, True]])
    assert relevance_inside(maps, inside).tolist() == [0.75]


def test_of_equally_high_places_those_in_the_mark_count() -> None:
    inside = np.array([[True, False, False, False]])
    assert hits(np.array([[2.0, 2.0, 1.0, 2.0]]), inside).tolist() == pytest.approx([1 / 3])
    assert hits(np.array([[1.0, 2.0, 2.0, 2.0]]), inside).tolist() == [0.0]


def test_a_map_that_shows_nothing_is_a_miss_and_said() -> None:
    marks, ids, people = studies(10)
    maps = marks.astype(float)
    maps[3], maps[4] = 0.0, -1.0
    found = measured(maps, marks, ids, people)
    assert (found.hits.value, found.inside.value, found.hits.n) == (0.8, 0.8, 10)
    assert found.notes == ("2 studies with a map that shows nothing: counted as misses",)


def test_studies_without_a_mark_and_maps_without_numbers_are_left_out_and_counted() -> None:
    marks, ids, people = studies(10)
    maps = marks.astype(float)
    marks[0], marks[1], maps[2, 5, 5] = False, False, np.nan
    found = measured(maps, marks, ids, people)
    assert (found.hits.n, found.hits.patients, found.hits.value) == (7, 4, 1.0)
    assert found.notes == (
        "2 studies without a mark: left out",
        "1 studies with a map that is not all numbers: left out",
    )


@pytest.mark.parametrize("n", [0, 3])
def test_without_marks_nothing_is_estimable(n: int) -> None:
    marks, ids, people = studies(3)
    found = measured(marks[:n].astype(float), np.zeros_like(marks)[:n], ids[:n], people[:n])
    for score in (found.hits, found.hits_chance, found.hits_gain, found.inside, found.inside_chance, found.inside_gain):
        assert score.value is None
        assert score.note.startswith("not estimable")


def test_a_near_miss_hits_within_the_tolerance_and_chance_grows_with_it() -> None:
    mark = box((20, 30), (5, 5), (8, 8))[None]
    maps = np.zeros((1, 20, 30))
    maps[0, 6, 9] = 1.0  # two pixels right of the mark
    near, far = (measured(maps, mark, ["s"], ["p"], tolerance=t) for t in (2.0, 1.0))
    assert (near.hits.value, far.hits.value) == (1.0, 0.0)
    assert near.hits_chance.value == pytest.approx(within(mark[0], 2.0).mean())
    assert near.inside.value == 0.0  # the share of relevance has no tolerance


def test_volumes_and_boxes_at_the_edge_are_marks_too() -> None:
    mark = box((4, 6, 8), (-2, 3, 6), (2, 99, 8))
    assert mark.sum() == 2 * 3 * 2
    assert measured(mark[None].astype(float), mark[None], ["s"], ["p"]).hits.value == 1.0


@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 3)])
def test_a_box_of_a_table_lies_on_every_pixel_that_it_touches_columns_first(shape: tuple[int, ...]) -> None:
    image = Scan("i", "image", shape, "|u1", "x", (), 8)
    mark = box_on(image, (7.0, 1.0, 10.0, 3.0))
    assert mark.shape == (6, 10)
    assert np.array_equal(mark, box((6, 10), (1, 7), (3, 10)))
    assert np.argwhere(box_on(image, (4.2, 0.9, 4.3, 2.1))).tolist() == [[0, 4], [1, 4], [2, 4]]


def test_maps_on_another_grid_are_refused() -> None:
    marks, ids, people = studies(4)
    with pytest.raises(ValueError, match="not on one grid"):
        measured(marks[:, :-1].astype(float), marks, ids, people)


def test_patients_not_images_make_the_interval() -> None:
    marks, ids, people = studies(80)
    maps = np.where((np.arange(80) % 4 < 2)[:, None, None], marks, 1.0 - marks)  # both images of a patient agree
    pairs, alone = measured(maps, marks, ids, people), measured(maps, marks, ids, ids)
    widths = [s.high - s.low for s in (pairs.hits, alone.hits) if s.high is not None and s.low is not None]
    assert pairs.hits.value == alone.hits.value == 0.5
    assert widths[0] > 1.25 * widths[1]


def test_the_findings_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    marks, ids, people = studies(10)
    found = measured(marks.astype(float), marks, ids, people, tolerance=1.0)
    write_record(tmp_path / "pointing.json", found)
    assert read_record(tmp_path / "pointing.json", PointingFindings) == found


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 5), st.floats(0.01, 100))
def test_neither_turning_nor_scaling_map_and_mark_together_changes_anything(seed: int, turn: int, by: float) -> None:
    rng = np.random.default_rng(seed)
    maps, inside = rng.normal(size=(3, 6, 9)), rng.random((3, 6, 9)) < 0.3
    turned, marked = np.rot90(maps, turn, (1, 2)) * by, np.rot90(inside, turn, (1, 2))
    assert hits(turned, marked) == pytest.approx(hits(maps, inside))
    assert relevance_inside(turned, marked) == pytest.approx(relevance_inside(maps, inside))


def asked(task: Task, targets: Any, **regions: tuple[Any, ...]) -> tuple[dict[int, dict[int, list[Any]]], str]:
    """Give, by class and row, the regions that count as its marks; studies are called a, b, c and on."""
    truth = np.array(targets, dtype=np.float64)
    ids = tuple("abcdef"[: len(truth)])
    classes = ("none", "Tumour", "cyst")[-truth.shape[1] :] if task == "multilabel" else ("none", "Tumour", "cyst")
    masks = {
        study: [
            name if isinstance(name, tuple) else Scan(f"m{n}", "mask", (2, 2, 2), "|u1", "x", (), 1, region=name)
            for n, name in enumerate(names)
        ]
        for study, names in regions.items()
    }
    found, note = marked_studies(Predictions("test", ids, ids, truth, truth), task, classes[: truth.shape[1]], masks)
    return {
        k: {one.row: [mark.region if isinstance(mark, Scan) else mark for mark in one.marks] for one in v}
        for k, v in found.items()
    }, note


def test_only_studies_that_hold_the_class_and_were_drawn_on_are_asked() -> None:
    binary = [[0, 1], [1, 0], [0, 1]]
    assert asked("binary", binary, a=("1 liver",), b=("1 liver",)) == ({1: {0: ["1 liver"]}}, UNNAMED)
    assert asked("binary", binary, b=("1 liver",)) == ({}, "")
    assert asked("binary", binary) == ({}, "")
    three = [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert asked("multiclass", three, b=(None,), c=("3",))[0] == {1: {2: ["3"]}, 2: {1: [None]}}


def test_a_mask_called_as_a_class_is_a_mark_of_that_class_alone() -> None:
    drawn = ("1 liver", "2 TUMOUR ", "3 tumour")
    assert asked("binary", [[0, 1], [0, 1]], a=drawn, b=("1 liver",)) == ({1: {0: ["2 TUMOUR ", "3 tumour"]}}, "")
    assert asked("binary", [[0, 1]], a=("1 none",)) == ({}, "")
    both = asked("multilabel", [[1, 1], [np.nan, 1]], a=("1 cyst", "2 tumour"), b=("1 tumour",))
    assert both == ({0: {0: ["2 tumour"]}, 1: {0: ["1 cyst"]}}, "")


def test_what_was_drawn_without_a_name_is_no_mark_where_it_could_be_of_either_label() -> None:
    found = asked("multilabel", [[1, 1], [1, 0], [np.nan, 1]], a=("1 x",), b=("1 x",), c=("1 x",))
    assert found == ({0: {1: ["1 x"]}, 1: {2: ["1 x"]}}, UNNAMED)


def test_a_box_is_a_mark_of_the_one_class_that_its_study_holds() -> None:
    here = (0.0, 0.0, 1.0, 1.0)
    found = asked("multilabel", [[1, 0], [0, 1], [1, 1]], a=(here,), b=(here,), c=(here,))
    assert found == ({0: {0: [here]}, 1: {1: [here]}}, UNNAMED)
