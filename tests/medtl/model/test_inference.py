"""Exact tiles give the whole scan's bits, windows what a plain loop gives; nothing is known of what was not seen."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medtl.config import InferenceConfig, ModelConfig
from medtl.errors import ConfigError, ModelError
from medtl.model.inference import Doubt, Quality, choose_way, codes, predict_grid, predict_slabs
from medtl.model.reach import bytes_per_voxel, reach_of
from medtl.model.segmenter import SegmenterNetwork, Whole, build
from medtl.model.surgery import HEAD
from medtl.records import FloatArray, GridPlan, Structure

CPU = torch.device("cpu")
TWO = (Structure("liver", (1,)), Structure("tumour", (2,)))
REGIONS = (Structure("whole", (1, 2)), Structure("core", (2,)))


def a_plan(dimensions: int = 3, side: int = 16, levels: int = 2, **changes: Any) -> GridPlan:
    each = tuple((1 + (level > 0),) * dimensions for level in range(levels))
    plan = GridPlan(
        structures=TWO,
        ignore=None,
        dimensions=dimensions,
        axis="axial" if dimensions == 3 else None,
        neighbours=0,
        channels=1,
        spacing_mm=(1.0, 1.0, 1.0) if dimensions == 3 else None,
        intensity="zscore",
        low=None,
        high=None,
        mean=None,
        std=None,
        landmarks=(),
        patch=(side,) * dimensions,
        batch_size=1,
        strides=each,
        kernels=((3,) * dimensions,) * levels,
        filters=(4, 8, 16)[:levels],
        mirror=(),
        facts={},
        reasons={},
    )
    return replace(plan, **changes)


def a_network(plan: GridPlan, norm: str = "batch", seed: int = 0, network: str = "unet") -> SegmenterNetwork:
    """Build one whose BatchNorm has statistics of its own, as after training."""
    segmenter = {"network": network, "norm": norm}
    built, _ = build(plan, ModelConfig.model_validate({"weights": "none", "segmenter": segmenter}), seed, None)
    for name, buffer in built.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return built.eval()


def a_scan(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)


def predicted(network: Any, image: FloatArray, plan: GridPlan, doubt: Doubt | None = None, **config: Any) -> FloatArray:
    return predict_grid(network, image, plan, InferenceConfig(**config), CPU, "fp32", doubt)


def by_hand(network: SegmenterNetwork, image: FloatArray) -> FloatArray:
    with torch.no_grad():
        return network(torch.from_numpy(image)[None]).softmax(1)[0].numpy()


def tight(network: SegmenterNetwork, plan: GridPlan, voxels: int) -> float:
    """Give the memory in GB in which so many voxels pass."""
    return voxels * bytes_per_voxel(network, plan.channels, plan.patch, CPU, "fp32") / 1e9


def test_the_whole_scan_passes_at_once_where_it_fits() -> None:
    plan = a_plan()
    network, image = a_network(plan), a_scan(24, 20, 32)
    assert np.array_equal(predicted(network, image, plan), by_hand(network, image))


def test_tiles_give_the_bits_of_the_whole_volume() -> None:
    plan = a_plan(filters=(16, 32))  # at these sizes tiles and the whole are large enough for one and the same kernel
    network, image = a_network(plan), a_scan(152, 160, 12)
    config = InferenceConfig(memory_gb=tight(network, plan, 152 * 160 * 12 * 6 // 10))
    way = choose_way([network], plan, config, image.shape[1:], CPU, "fp32")
    assert way.name == "tiles" and way.size[0] * way.size[1] < 152 * 160
    tiled = predict_grid(network, image, plan, config, CPU, "fp32")
    assert np.array_equal(tiled, by_hand(network, image))


def test_tiles_give_the_bits_of_the_whole_image() -> None:
    plan = a_plan(2, side=64, levels=3)
    network, image = a_network(plan), a_scan(512, 640)
    config = InferenceConfig(memory_gb=tight(network, plan, 512 * 640 // 3))
    assert choose_way([network], plan, config, (512, 640), CPU, "fp32").name == "tiles"
    assert np.array_equal(predict_grid(network, image, plan, config, CPU, "fp32"), by_hand(network, image))


@pytest.mark.parametrize("way", ["auto", "whole", "tiles", "windows"])
@pytest.mark.parametrize("shape", [(5, 7, 6), (16, 16, 16), (31, 18, 23)])
def test_every_way_gives_every_voxel_probabilities(way: Any, shape: tuple[int, ...]) -> None:
    plan = a_plan()
    found = predicted(a_network(plan), a_scan(*shape), plan, way=way)
    assert found.shape == (3, *shape) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_memory_that_holds_no_tile_is_said_to_be_too_little() -> None:
    plan = a_plan()
    with pytest.raises(ConfigError, match=r"memory_gb .* Raise it"):
        predicted(a_network(plan), a_scan(40, 40, 40), plan, way="tiles", memory_gb=1e-6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(shape=st.tuples(*[st.integers(3, 30)] * 3), memory=st.sampled_from([0.003, 0.01, 4.0]))
def test_tiles_are_the_whole_for_any_shape(shape: tuple[int, int, int], memory: float) -> None:
    plan = a_plan()
    network, image = a_network(plan), a_scan(*shape)
    whole = predicted(network, image, plan, way="whole")
    tiles = predicted(network, image, plan, way="tiles", memory_gb=memory)
    np.testing.assert_allclose(tiles, whole, atol=1e-5)  # small tiles take other kernels, which round differently


def test_windows_are_a_plain_loop_with_gaussian_weights() -> None:
    plan = a_plan()
    network, image = a_network(plan, "instance"), a_scan(24, 16, 30)
    middle = np.exp(-0.5 * ((np.arange(16) - 7.5) / 2) ** 2)
    weight = middle[:, None, None] * middle[:, None] * middle
    total, weights = np.zeros((3, 24, 16, 30)), np.zeros((24, 16, 30))
    for a, b in product((0, 8), (0, 7, 14)):
        here = np.s_[a : a + 16, :, b : b + 16]
        total[:, *here] += by_hand(network, np.ascontiguousarray(image[:, *here])) * weight
        weights[here] += weight
    np.testing.assert_allclose(predicted(network, image, plan), total / weights, atol=1e-5)


def test_a_network_that_sees_its_window_gets_windows_and_no_tiles() -> None:
    plan = a_plan()
    network = a_network(plan, "instance")
    assert reach_of(network, 1, network.multiple).halo is None
    assert choose_way([network], plan, InferenceConfig(), (40, 40, 40), CPU, "fp32").name == "windows"
    with pytest.raises(ConfigError, match=r"InstanceNorm3d takes its mean .* Set it to auto or windows"):
        predicted(network, a_scan(40, 40, 40), plan, way="tiles")


@pytest.mark.parametrize(("dimensions", "name"), [(2, "unet"), (2, "dynunet"), (3, "unet"), (3, "dynunet")])
def test_nothing_beyond_the_halo_is_seen_and_something_within_is(dimensions: int, name: str) -> None:
    plan = a_plan(dimensions, levels=3)
    network = a_network(plan, network=name)
    reach = reach_of(network, 1, network.multiple)
    assert reach.halo is not None
    halo, step = reach.halo[0], network.multiple[0]
    image = a_scan(2 * halo + 3 * step, *(16,) * (dimensions - 1))
    middle = np.s_[:, halo + step : halo + 2 * step]
    before = by_hand(network, image)[middle]
    beyond, within = image.copy(), image.copy()
    beyond[:, :step] += 5
    within[:, step : 2 * step] += 5
    np.testing.assert_allclose(by_hand(network, beyond)[middle], before, atol=1e-6)
    assert np.abs(by_hand(network, within)[middle] - before).max() > 1e-6


def test_a_network_of_one_size_gets_windows_of_that_size() -> None:
    plan = a_plan()
    inner = Whole(nn.Conv3d(1, 3, 3, padding=1))
    network = SegmenterNetwork("unetr", {HEAD: inner}, [], (0.0,), (1.0,), plan, (16, 16, 16))
    assert network.window == (16, 16, 16)
    with pytest.raises(ConfigError, match=r"way is 'whole', and the network takes one size of input"):
        predicted(network, a_scan(20, 16, 16), plan, way="whole")
    found = predicted(network, a_scan(20, 16, 10), plan)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


class Shifted(nn.Module):
    """Adds what depends on where in its input a voxel lies."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + torch.arange(x.shape[2]).view(-1, *(1,) * (x.ndim - 3))


def test_a_network_that_knows_where_it_is_has_no_exact_tiles() -> None:
    reach = reach_of(Shifted(nn.Conv3d(1, 2, 3, padding=1)).eval(), 1, (2, 2, 2))
    assert reach.halo is None and "other numbers" in reach.why


def test_memory_is_counted_as_tensors_come_and_go() -> None:
    chain = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 1, 1)).eval()
    # the input and eight channels, then eight channels and two: floats of four bytes and a quarter for scratch
    assert bytes_per_voxel(chain, 1, (32, 32), CPU, "fp32") == pytest.approx((1 + 8 + 2) * 4 * 1.25)


def test_mirrored_views_and_networks_are_averaged() -> None:
    plan = a_plan(mirror=(0, 2))
    networks, image = [a_network(plan, seed=seed) for seed in (1, 2)], a_scan(16, 16, 16)
    views = [
        np.flip(by_hand(network, np.ascontiguousarray(np.flip(image, axes))), axes)
        for network in networks
        for axes in [(), (1,), (3,), (1, 3)]
    ]
    np.testing.assert_allclose(predicted(networks, image, plan, mirror=True), np.mean(views, 0), atol=1e-6)
    alone = predicted(networks, image, plan)
    np.testing.assert_allclose(alone, np.mean([by_hand(n, image) for n in networks], 0), atol=1e-6)


@pytest.mark.parametrize("neighbours", [0, 1])
def test_a_volume_is_predicted_slice_by_slice_with_its_neighbours(neighbours: int) -> None:
    plan = a_plan(2, axis="axial", neighbours=neighbours, channels=2 * neighbours + 1)
    network, image = a_network(plan), a_scan(7, 16, 20)
    near = [np.clip(np.arange(s - neighbours, s + neighbours + 1), 0, 6) for s in range(7)]
    wanted = np.stack([by_hand(network, image[0, numbers]) for numbers in near], 1)
    np.testing.assert_allclose(predicted(network, image, plan), wanted, atol=1e-6)
    np.testing.assert_allclose(predicted(network, image, plan, way="tiles"), wanted, atol=1e-5)


def test_what_is_put_around_a_small_scan_is_its_least_value() -> None:
    plan = a_plan()
    network, image = a_network(plan, "instance"), a_scan(9, 16, 12)
    padded = np.pad(image, ((0, 0), (3, 4), (0, 0), (2, 2)), constant_values=float(image.min()))
    wanted = by_hand(network, padded)[:, 3:12, :, 2:14]
    np.testing.assert_allclose(predicted(network, image, plan), wanted, atol=1e-6)


def test_slabs_follow_one_another_and_are_no_larger_than_a_window() -> None:
    plan = a_plan()
    network, image = a_network(plan, "instance"), a_scan(41, 16, 16)
    slabs = list(predict_slabs(network, image, plan, InferenceConfig(), CPU, "fp32"))
    assert len(slabs) > 3 and max(slab.shape[1] for slab in slabs) <= 16
    assert np.array_equal(np.concatenate(slabs, 1), predicted(network, image, plan))


def test_an_array_of_half_precision_on_disk_serves_for_both_ends(tmp_path: Path) -> None:
    plan = a_plan()
    network, image = a_network(plan), a_scan(16, 18, 20).astype(np.float16)
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=(3, 16, 18, 20))
    config = InferenceConfig()
    assert predict_grid(network, image, plan, config, CPU, "fp32", out=out) is out
    np.testing.assert_allclose(out, by_hand(network, image.astype(np.float32)), atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_empty_surroundings_are_background_only_where_that_is_asked_for(norm: str) -> None:
    plan = a_plan()
    network, image = a_network(plan, norm), a_scan(96, 16, 16)
    image[:, :64] = image.min()
    way = "tiles" if norm == "batch" else "windows"
    looked, skipped = (predicted(network, image, plan, way=way, skip_empty=s) for s in (False, True))
    np.testing.assert_allclose(skipped[0, :16], 1, atol=1e-6)
    assert looked[0, :16].max() < 0.99
    np.testing.assert_array_equal(skipped[:, 64:], looked[:, 64:])


def test_bf16_agrees_with_fp32() -> None:
    plan = a_plan()
    network, image = a_network(plan), a_scan(24, 24, 24)
    config = InferenceConfig()
    half, full = (predict_grid(network, image, plan, config, CPU, precision) for precision in ("bf16", "fp32"))
    assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < 0.05


def test_a_network_that_overflows_is_not_believed() -> None:
    plan = a_plan()
    network = a_network(plan)
    with torch.no_grad():
        next(network.parameters()).fill_(float("inf"))
    with pytest.raises(ModelError, match=r"not a number.*fp32"):
        predicted(network, a_scan(16, 16, 16), plan)


def test_codes_are_the_largest_or_every_half() -> None:
    given = np.array([[0.5, 0.2, 0.1], [0.3, 0.2, 0.6], [0.2, 0.6, 0.3]], np.float32)[:, :, None]
    assert codes(given, a_plan())[:, 0].tolist() == [0, 2, 1]
    regions = np.array([[0.5, 0.9, 0.1, 0.4], [0.2, 0.7, 0.6, 0.3]], np.float32)
    assert codes(regions, a_plan(structures=REGIONS)).tolist() == [1, 3, 2, 0]


def test_regions_get_a_sigmoid_each() -> None:
    plan = a_plan(structures=REGIONS)
    network, image = a_network(plan), a_scan(16, 16, 16)
    with torch.no_grad():
        wanted = network(torch.from_numpy(image)[None]).sigmoid()[0].numpy()
    np.testing.assert_allclose(predicted(network, image, plan), wanted, atol=1e-6)


def quality(probabilities: FloatArray, plan: GridPlan) -> Quality:
    """See one prediction slice by slice."""
    doubt = Doubt(plan)
    for number in range(probabilities.shape[1]):
        doubt.see(probabilities[:, number])
    return doubt.quality


def test_certainty_has_no_entropy_and_an_absent_structure_has_none_to_tell() -> None:
    plan = a_plan()
    sure = np.zeros((3, 4, 4, 4), np.float32)
    sure[1] = 1
    assert quality(sure, plan) == Quality((pytest.approx(0, abs=1e-9), None), (None, None), (pytest.approx(1.0), 1.0))
    torn = np.full((3, 4, 4, 4), 0.25, np.float32)
    torn[2] = 0.5
    assert quality(torn, plan).entropy == (None, pytest.approx(1.0))


def test_the_expected_dice_is_that_of_a_mask_with_its_probabilities() -> None:
    plan = a_plan()
    torn = np.full((3, 4, 4, 4), 0.25, np.float32)
    torn[2] = 0.5
    first, second = quality(torn, plan).expected
    assert first == pytest.approx(1 / (0.25 * 64 + 1))  # nothing was outlined, and much looked like it
    assert second == pytest.approx((2 * 0.5 * 64 + 1) / (0.5 * 64 + 64 + 1))
    faint = np.full((3, 4, 4, 4), 0.01, np.float32)
    faint[0] = 0.98
    assert quality(faint, plan).expected == (1.0, 1.0)


def test_agreement_is_the_dice_of_networks_and_alike_ones_agree() -> None:
    plan = a_plan()
    one, other, image = a_network(plan, seed=1), a_network(plan, seed=2), a_scan(16, 16, 16)
    first, second = codes(by_hand(one, image), plan), codes(by_hand(other, image), plan)
    doubt = Doubt(plan)
    predicted([one, other], image, plan, doubt)
    for number, dice in enumerate(doubt.quality.agreement, 1):
        either = int((first == number).sum() + (second == number).sum())
        both = int(((first == number) & (second == number)).sum())
        assert dice == (pytest.approx(2 * both / either) if either else None)
    alike = Doubt(plan)
    predicted([one, one], image, plan, alike)
    assert {value for value in alike.quality.agreement if value is not None} == {1.0}
    assert alike.quality.entropy == pytest.approx(quality(predicted(one, image, plan), plan).entropy)


def test_a_doubt_sees_the_same_in_slabs_as_in_the_whole() -> None:
    plan = a_plan()
    network, image, doubt = a_network(plan, "instance"), a_scan(41, 16, 16), Doubt(plan)
    found = predicted(network, image, plan, doubt)
    assert doubt.quality.entropy == pytest.approx(quality(found, plan).entropy, rel=1e-6)
    assert doubt.quality.expected == pytest.approx(quality(found, plan).expected, rel=1e-6)


@pytest.mark.slow
def test_a_large_scan_stays_under_its_memory() -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "segmentation.py"
    done = subprocess.run([sys.executable, str(script), "--large"], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 8.0
