"""Kept activations are those that would be computed; a torn file is computed again; the decision follows the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medtl.config import PhaseConfig
from medtl.errors import ModelError
from medtl.model import cache
from medtl.model.cache import Images, Trunk, decide, fill, from_stored, sharing, to_images, to_stored, views_of
from medtl.model.io import FolderActivations, build_network
from medtl.model.phases import set_learning

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
HEAD = PhaseConfig(name="head", unfreeze="head", epochs=6, augment=False)
LAST = PhaseConfig(name="last", unfreeze=1, epochs=6, views=2)
ALL = PhaseConfig(name="all", unfreeze="all", epochs=2)
PIXELS = np.random.default_rng(0).integers(0, 255, (21, 24, 24, 1), dtype=np.uint8)
CPU = torch.device("cpu")


def trunk(boundaries: list[int], precision: Any = "fp32", numbers: Any = "fp32", batch_size: int = 4) -> Trunk:
    network, _ = build_network("monai_resnet10_narrow", 24, 1, 2, 0.0, None, 0.9, seed=0)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_learning(network, HEAD)
    return Trunk(network, boundaries, precision, numbers, batch_size, CPU)


@pytest.mark.parametrize("precision, numbers", [("fp32", "fp32"), ("fp32", "fp16"), ("bf16", "bf16")])
def test_an_image_has_the_same_bits_in_any_company(precision: Any, numbers: Any) -> None:
    frozen = trunk([3, 5], precision, numbers)
    together = frozen(to_images(PIXELS[:4], CPU))
    for row in range(4):
        alone = frozen(to_images(PIXELS[row : row + 1], CPU))
        for boundary in (3, 5):
            assert torch.equal(alone[boundary][0], together[boundary][row])


@pytest.mark.parametrize("numbers", ["fp32", "fp16", "bf16"])
def test_what_is_stored_comes_back_to_the_bit(numbers: Any) -> None:
    for shape in ((3, 5), (3, 5, 4, 2), (2, 3, 4, 5, 6)):
        x = torch.randn(shape).to(cache.TYPES[numbers])
        stored = to_stored(x)
        assert stored.dtype == cache.STORED[numbers]
        assert torch.equal(from_stored(stored, numbers, CPU), x)


def filled(folder: Path, boundaries: list[int]) -> tuple[Trunk, Images, dict[int, Any]]:
    frozen = trunk(boundaries, batch_size=2)
    images = Images(np.arange(21), lambda rows, _: PIXELS[rows], lambda view: str(view))
    store = FolderActivations(folder, 100)
    shapes = cache.measure(frozen, to_images(PIXELS[:2], CPU)).shapes
    kept = {b: store.entry(f"k{b}", (21, *shapes[b]), np.dtype("<f4"), cache.chunk_rows(2)) for b in boundaries}
    fill(frozen, images, cache.CLEAN, kept, (0, 1), "x")
    return frozen, images, kept


def test_one_pass_keeps_every_boundary(tmp_path: Path) -> None:
    frozen, _, kept = filled(tmp_path, [3, 5])
    direct = frozen(to_images(PIXELS[5:7], CPU))
    for boundary in (3, 5):
        assert torch.equal(from_stored(kept[boundary].array[5:7], "fp32", CPU), direct[boundary])
        assert kept[boundary].missing() == []
    assert FolderActivations(tmp_path, 100).has("k3") and not FolderActivations(tmp_path, 100).has("k4")


def test_a_torn_or_altered_chunk_is_computed_again(tmp_path: Path) -> None:
    _, _, kept = filled(tmp_path, [5])
    whole = np.array(kept[5].array)
    with (tmp_path / "k5" / "numbers").open("r+b") as stream:
        stream.seek((tmp_path / "k5" / "numbers").stat().st_size - 3)
        stream.write(b"\xff")
    assert kept[5].missing() == [1]
    _, _, again = filled(tmp_path, [5])
    assert again[5].missing() == [] and np.array_equal(again[5].array, whole)


def test_one_pass_measures_every_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    real = Trunk.__call__

    def counting(self: Trunk, images: torch.Tensor, passed: Callable[[int], None] | None = None) -> Any:
        passes.append(1)
        return real(self, images, passed)

    monkeypatch.setattr(Trunk, "__call__", counting)
    found = cache.measure(trunk([1, 3, 5]), to_images(PIXELS[:2], CPU))
    assert len(passes) == 1 and 0 < found.seconds[1] < found.seconds[3] < found.seconds[5]
    assert found.mb[5] == np.prod(found.shapes[5]) * 4 / 1e6


def test_what_was_measured_is_not_computed_again(tmp_path: Path) -> None:
    frozen, images, kept = filled(tmp_path / "plain", [3, 5])
    store, measured = FolderActivations(tmp_path / "told", 100), cache.measure(frozen, to_images(PIXELS[:2], CPU))
    told = {b: store.entry(f"k{b}", (21, *measured.shapes[b]), np.dtype("<f4"), cache.chunk_rows(2)) for b in (3, 5)}
    asked: list[int] = []
    counted = replace(images, view=lambda rows, _: (asked.extend(rows.tolist()), PIXELS[rows])[1])
    fill(frozen, counted, cache.CLEAN, told, (0, 1), "x", measured.handed)
    assert asked == list(range(2, 21))
    assert all(np.array_equal(told[b].array, kept[b].array) for b in (3, 5))


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = Trunk.__call__

    def counting(self: Trunk, images: torch.Tensor, passed: Callable[[int], None] | None = None) -> Any:
        asked.append(len(images))
        if len(asked) == 11:  # one to measure, eight of the first chunk
            raise KeyboardInterrupt
        return real(self, images, passed)

    monkeypatch.setattr(Trunk, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, [5])
    asked.clear()
    filled(tmp_path, [5])
    assert sum(asked) < 21, "the first chunk of 16 images was there"


def test_the_longest_unused_activations_make_room(tmp_path: Path) -> None:
    store = FolderActivations(tmp_path, 3.0)
    for number, key in enumerate(("old", "new")):
        kept = store.entry(key, (250, 1000), np.dtype("<f4"), 250)
        kept.write(0, np.ones((250, 1000), np.float32))
        os.utime(tmp_path / key, (number, number))
    later = FolderActivations(tmp_path, 3.0)
    assert later.room_mb() == pytest.approx(3.0)
    later.entry("third", (250, 1000), np.dtype("<f4"), 250)
    assert not (tmp_path / "old").exists() and (tmp_path / "new").exists()


def test_numbers_too_large_for_sixteen_bits_are_said() -> None:
    frozen = trunk([1], numbers="fp16")
    with torch.no_grad():
        for module in frozen.stages[0].modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(1e9)
    with pytest.raises(ModelError, match=r"model\.cache\.numbers to fp32"):
        frozen(to_images(PIXELS[:4], CPU))


def test_views_are_cycled_through_all_phases() -> None:
    phases = (HEAD, LAST, LAST.model_copy(update={"views": "live"}))
    assert views_of(HEAD, 0, phases) == [cache.CLEAN] * 6
    assert views_of(LAST, 1, phases) == [0, 1, 0, 1, 0, 1]
    live = views_of(phases[2], 2, phases)
    assert len(set(live)) == 6 and min(live) > 1000


def test_only_phases_whose_trunk_has_not_moved_share_a_pass() -> None:
    deep = PhaseConfig(name="deep", unfreeze=2, epochs=1)
    assert sharing((HEAD, LAST, deep, ALL), 0, STAGES) == [0, 1, 2]
    assert sharing((HEAD, deep, LAST), 0, STAGES) == [0, 1], "the last stages have moved by then"
    assert sharing((ALL, HEAD), 0, STAGES) == []


def decision(
    phases: tuple[PhaseConfig, ...], room: float = 1e6, use: Any = "auto", slow: float = 0.02
) -> cache.Decision:
    seconds, mb = {4: slow * 0.9, 5: slow}, {4: 0.05, 5: 0.002}
    return decide(phases, 0, STAGES, (800, 200), seconds, mb, room, use)


def test_keeping_pays_where_images_are_shown_again() -> None:
    assert decision((HEAD, LAST, ALL)).boundaries == (5, 4)
    assert "save about" in decision((HEAD, LAST, ALL)).reason
    once = HEAD.model_copy(update={"epochs": 1})
    assert decision((once,)).boundaries == ()
    assert decision((HEAD,), slow=1e-7).boundaries == ()
    assert decision((once,), use="always").boundaries == (5,)
    assert decision((HEAD,), use="never").boundaries == ()


def test_what_does_not_fit_is_left_out_the_latest_phase_first() -> None:
    assert decision((HEAD, LAST), room=20).boundaries == (5,)
    none = decision((HEAD, LAST), room=1)
    assert none.boundaries == () and "do not fit" in none.reason


def test_processes_that_look_at_different_times_leave_no_chunk_out(tmp_path: Path) -> None:
    frozen = trunk([5], batch_size=2)
    images = Images(np.arange(84), lambda rows, _: PIXELS[rows % 21], str)
    store = FolderActivations(tmp_path, 100)
    kept = {5: store.entry("k", (84, 128), np.dtype("<f4"), cache.chunk_rows(2))}
    for process in (0, 1):  # the second begins when the first has finished
        fill(frozen, images, cache.CLEAN, kept, (process, 2), "x")
    assert kept[5].missing() == [] and store.has("k")
