"""Decisions follow from the training images, and say why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medtl.config import PlanConfig
from medtl.dataset.io import read_plan, write_plan
from medtl.dataset.plan import make_plan, misfit
from medtl.errors import PlanError
from medtl.records import Plan, Scan

AUTO = PlanConfig()


def scan(
    name: str, shape: tuple[int, ...] = (100, 80), dtype: str = "|u1", bits: int = 8, modality: str | None = None
) -> Scan:
    return Scan(name, "image", shape, dtype, name, (), bits, modality=modality)


def pixels(given: Scan) -> Any:
    rng = np.random.default_rng(len(given.scan_id))
    return rng.integers(0, 2**given.bits, given.shape).astype(given.dtype)


def plan(*scans: Scan, config: PlanConfig = AUTO, min_size: int = 32) -> Plan:
    return make_plan(scans, pixels, "binary", ("healthy", "ill"), config, min_size)


def test_eight_bits_are_taken_as_they_are() -> None:
    found = plan(scan("a"), scan("b"))
    assert (found.bits, found.intensity, found.low, found.high, found.channels) == (8, "fixed", 0.0, 255.0, 1)


def test_ct_values_get_one_range_from_the_training_images() -> None:
    found = plan(scan("a", dtype="<i2", bits=12, modality="CT"), scan("b", dtype="<i2", bits=12, modality="CT"))
    assert (found.bits, found.intensity) == (16, "fixed")
    assert found.low is not None and found.high is not None
    assert found.low == pytest.approx(0.005 * 4096, abs=15) and found.high == pytest.approx(0.995 * 4096, abs=15)


@pytest.mark.parametrize("modalities", [("CR", "CR"), ("MR", "MR"), ("CT", "MR"), (None, None)])
def test_values_without_an_absolute_scale_are_fitted_image_by_image(modalities: tuple[str | None, str | None]) -> None:
    found = plan(*(scan(f"{i}", dtype="<u2", bits=12, modality=m) for i, m in enumerate(modalities)))
    assert (found.bits, found.intensity, found.low, found.high) == (16, "per_image", None, None)


def test_one_deep_image_makes_the_pack_sixteen_bits() -> None:
    found = plan(scan("a"), scan("b"), scan("c", dtype="<u2", bits=10))
    assert (found.bits, found.facts["bits"]) == (16, 10)


@pytest.mark.parametrize(
    "side, min_size, wanted", [(100, 32, 112), (96, 32, 96), (1000, 32, 224), (20, 64, 64), (1000, 256, 256)]
)
def test_the_size_is_the_median_side_within_its_bounds(side: int, min_size: int, wanted: int) -> None:
    found = plan(
        scan("a", (side, side // 2)), scan("b", (side // 2, side)), scan("c", (side * 3, 9)), min_size=min_size
    )
    assert found.size == (wanted, wanted)
    assert str(wanted) in found.reasons["size"]


@pytest.mark.parametrize("colour, wanted", [(0, 1), (1, 1), (2, 3), (3, 3)])
def test_colour_is_kept_where_most_images_have_it(colour: int, wanted: int) -> None:
    shapes = [(64, 64, 3)] * colour + [(64, 64)] * (3 - colour)
    assert plan(*(scan(f"{i}", shape) for i, shape in enumerate(shapes))).channels == wanted


def test_the_config_goes_before_the_facts() -> None:
    config = PlanConfig(size=48, channels=3, intensity="per_image")
    found = plan(scan("a"), config=config)
    assert (found.size, found.channels, found.intensity) == ((48, 48), 3, "per_image")
    assert all("set by the config" in found.reasons[key] for key in ("size", "channels", "intensity"))


def test_a_size_below_what_the_backbone_takes_is_refused() -> None:
    with pytest.raises(PlanError, match="size is 48; this backbone takes 64"):
        plan(scan("a"), config=PlanConfig(size=48), min_size=64)


def test_no_training_image_is_refused() -> None:
    with pytest.raises(PlanError, match="no training image"):
        plan()


def test_nothing_but_the_training_images_is_read() -> None:
    read = []

    def watched(given: Scan) -> Any:
        read.append(given.scan_id)
        return pixels(given)

    make_plan([scan("a"), scan("b")], watched, "binary", ("healthy", "ill"), AUTO, 32)
    assert sorted(set(read)) == ["a", "b"]


def test_every_decision_has_a_reason_and_all_of_it_comes_back_from_disk(tmp_path: Path) -> None:
    found = plan(scan("a"), scan("b"))
    assert set(found.reasons) == {"size", "channels", "bits", "intensity"}
    write_plan(tmp_path, found)
    assert read_plan(tmp_path) == found


def test_a_scan_of_another_depth_does_not_fit_a_fixed_range() -> None:
    plan = Plan("binary", ("a", "b"), (32, 32), 1, 8, "fixed", 0.0, 255.0, (0.5, 99.5), {}, {})
    eight = Scan("1", "image", (4, 4), "|u1", "x", (), 8)
    deep = Scan("2", "image", (4, 4), "<u2", "y", (), 12)
    assert misfit(eight, plan) is None
    assert "12 bits" in str(misfit(deep, plan))
    assert misfit(deep, replace(plan, intensity="per_image")) is None
    assert misfit(eight, replace(plan, bits=16, low=-1000.0)) is not None


def test_a_volume_does_not_fit_a_plan_of_images() -> None:
    plan = Plan("binary", ("a", "b"), (32, 32), 1, 8, "per_image", 0.0, 255.0, (0.5, 99.5), {}, {})
    place = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    assert "a volume" in str(misfit(replace(scan("a"), affine=place), plan))


FLAT = ((-0.5, 0.0, 0.0, 0.0), (0.0, -0.5, 0.0, 0.0), (0.0, 0.0, 3.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def volume(name: str, slices: int = 20, modality: str | None = "CT", **more: Any) -> Scan:
    return Scan(name, "dicom", (slices, 60, 50), "<i2", name, (), 12, modality=modality, affine=FLAT, **more)


def plan_of(*scans: Scan, dimensions: int = 2, min_size: int = 32, **wished: Any) -> Plan:
    config = PlanConfig(**wished)
    return make_plan(scans, pixels, "binary", ("healthy", "ill"), config, min_size, 1, dimensions)


VOLUMES = [volume(name, slices) for name, slices in (("a", 20), ("bb", 50), ("ccc", 24))]


def test_volumes_become_slices_that_vote_or_stay_whole_as_the_backbone_wants() -> None:
    flat, deep = plan_of(*VOLUMES, neighbours=2), plan_of(*VOLUMES, dimensions=3)
    assert (flat.volumes, flat.axis, flat.slices, flat.channels, flat.depth) == ("slices", "axial", 24, 5, None)
    assert (deep.volumes, deep.axis, deep.slices, deep.channels, deep.depth) == ("whole", "axial", 1, 1, 32)
    assert flat.size == deep.size == (64, 64) and flat.bits == deep.bits == 16
    assert {"volumes", "axis", "slices", "size", "channels", "bits", "intensity"} == set(flat.reasons)
    assert "vote" in flat.reasons["volumes"]


def test_the_plan_of_volumes_stays_within_its_bounds() -> None:
    long = [replace(volume(n), shape=(200, 300, 300)) for n in "ab"]
    assert plan_of(*long).slices == 32
    deep = plan_of(*long, dimensions=3)
    assert (deep.depth, deep.size) == (96, (128, 128))
    assert "the most of a whole volume" in deep.reasons["size"]
    assert plan_of(*VOLUMES, dimensions=3, depth=48).depth == 48


def test_the_range_of_a_ct_volume_is_in_hu() -> None:
    found = plan_of(*(replace(v, intercept=-1024.0) for v in VOLUMES))
    assert found.intensity == "fixed" and found.low is not None and found.high is not None
    assert (found.low, found.high) == pytest.approx((0.005 * 4096 - 1024, 0.995 * 4096 - 1024), abs=15)
    assert plan_of(*(replace(v, modality="MR") for v in VOLUMES)).intensity == "per_image"


@pytest.mark.parametrize(
    "scans, dimensions, wished, reason",
    [
        ([scan("a")], 3, {}, "reads volumes"),
        ([scan("a")], 2, {"neighbours": 1}, "neighbours is 1, and the scans are images"),
        ([scan("a")], 2, {"axis": "coronal"}, "axis is coronal, and the scans are images"),
        ([scan("a"), VOLUMES[0]], 2, {}, "one kind"),
        (VOLUMES, 2, {"volumes": "whole"}, "it takes slices"),
        (VOLUMES, 3, {"neighbours": 1}, "sees them all"),
        (VOLUMES, 2, {"depth": 32}, "depth does not apply"),
        (VOLUMES, 2, {"channels": 3}, r"2 \* dataset.plan.neighbours \+ 1 = 1"),
        (VOLUMES, 3, {"depth": 16}, "takes 32 or more slices"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_refused(scans: Any, dimensions: int, wished: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plan_of(*scans, dimensions=dimensions, **wished)


def test_images_masks_and_other_modalities_do_not_fit_a_plan_of_volumes(tmp_path: Path) -> None:
    found = plan_of(*VOLUMES)
    assert misfit(VOLUMES[0], found) is None
    assert "an image" in str(misfit(scan("a"), found))
    assert "a mask" in str(misfit(replace(VOLUMES[0], mask_of="x"), found))
    assert "of MR" in str(misfit(replace(VOLUMES[0], modality="MR"), found))
    write_plan(tmp_path, found)
    assert read_plan(tmp_path) == found
