"""Every network of the table keeps one contract; encoders keep their stages, their weights and their resolutions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from medtl.config import ModelConfig
from medtl.errors import ConfigError, WeightsError
from medtl.model.mask_losses import coarsened, loss_of, sums
from medtl.model.segmenter import Decoder, SegmenterNetwork, build, choose
from medtl.model.segmenters import SEGMENTERS
from medtl.model.surgery import source_network
from medtl.model.vault import WeightsFile
from medtl.model.weights import stored_form
from medtl.records import GridPlan, Structure

NARROW = {2: "shufflenet_v2_x0_5", 3: "monai_resnet10_3d"}


def grid(
    dimensions: int = 2, channels: int = 1, outputs: int = 3, patch: int = 32, intensity: Any = "zscore"
) -> GridPlan:
    each = (1,) * dimensions
    return GridPlan(
        structures=tuple(Structure(f"part{k}", (k,)) for k in range(1, outputs)),
        ignore=None, dimensions=dimensions, axis="axial" if dimensions == 3 else None, neighbours=0, channels=channels,
        spacing_mm=None, intensity=intensity, low=None, high=None, mean=None, std=None, landmarks=(),
        patch=(patch,) * dimensions, batch_size=2, strides=(each, (2,) * dimensions, (2,) * dimensions),
        kernels=((3,) * dimensions,) * 3, filters=(4, 8, 16), mirror=(), facts={}, reasons={},
    )  # fmt: skip


def make(network: str, plan: GridPlan, seed: int = 0, **model: Any) -> SegmenterNetwork:
    settings = {"network": network, **model.pop("segmenter", {})}
    given = {"backbone": NARROW[plan.dimensions], "weights": "none", "segmenter": settings, **model}
    return build(plan, ModelConfig(**given), seed, None)[0]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("network", SEGMENTERS)
def test_every_network_keeps_the_contract(network: str, dimensions: int) -> None:
    if SEGMENTERS[network].attends:
        pytest.importorskip("einops")
    plan = grid(dimensions)
    built, again = make(network, plan), make(network, plan)
    assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), again.state_dict().values(), strict=True))
    assert built.stage_names[-1] == "head" and len(built.multiple) == dimensions
    space = (32,) * dimensions if SEGMENTERS[network].fixed else (2 * built.multiple[0], *built.multiple[1:])
    torch.manual_seed(1)
    images, codes = torch.randn(1, 1, *space), torch.randint(0, 3, (1, *space)).to(torch.uint8)
    optimiser = torch.optim.AdamW(built.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        found = built.train()(images)
        outputs = found if isinstance(found, list) else [found]
        loss = loss_of(sum(sums(one, coarsened(codes, one.shape[2:]), False, "dice_ce") for one in outputs), "dice_ce")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert all(p.grad is not None for name, p in built.named_parameters() if "norm_cross_attn" not in name)
    whole = built.eval()(images)
    assert isinstance(whole, torch.Tensor) and whole.shape == (1, 3, *space)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_cut_dynunet_gives_what_monai_gives(norm: str) -> None:
    plan = grid(3)
    ours = make("dynunet", plan, segmenter={"norm": norm})
    row = SEGMENTERS["dynunet"].build
    assert row is not None
    torch.manual_seed(0)
    theirs: Any = row(plan, norm, 0.0)
    images = torch.randn(1, 1, 16, 24, 16)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))
    assert ours.stage_names == ("stem", "level2", "level3", "head")


def test_coarser_outputs_learn_in_training_alone() -> None:
    network = make("encoder_unet", grid())
    images = torch.randn(2, 1, 64, 64)
    assert [tuple(one.shape[2:]) for one in network.train()(images)] == [(64, 64), (32, 32), (16, 16)]
    assert network.eval()(images).shape == (2, 3, 64, 64)
    alone = make("encoder_unet", grid(), segmenter={"deep_supervision": False})
    assert alone.train()(images).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "efficientnet_b0", "mobilenet_v3_small", "squeezenet1_1"])
def test_a_backbone_hands_on_features_of_every_resolution(name: str) -> None:
    network = make("encoder_unet", grid(channels=3), backbone=name).eval()
    seen: list[list[int]] = []
    network.stages["head"].register_forward_pre_hook(lambda _, given: seen.append([f.shape[2] for f in given[1]]))
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    assert seen[0] == sorted(seen[0], reverse=True) and len(set(seen[0])) == len(seen[0]) >= 4
    assert 28 <= seen[0][0] <= 32  # half the image: what a stem's pooling takes away is handed on before it


@pytest.mark.parametrize("name", ["squeezenet1_0", "alexnet", "googlenet", "resnet18"])
def test_features_lie_over_their_own_pixels_at_both_edges_of_the_image(name: str) -> None:
    network = make("encoder_unet", grid(2), backbone=name).eval()
    stem = network.stages[network.stage_names[0]]
    assert isinstance(stem, torch.nn.Sequential)
    first = stem[: min(place for stage, place in network.taps if stage == 0) + 1]
    for place in (8, 96, 184):
        image = torch.rand(1, network.mean.shape[1], 192, 192, requires_grad=True)
        found = first(image)
        step = 192 / found.shape[-1]
        assert step == int(step)  # as many features as fit, and none taken off an edge
        (grown,) = torch.autograd.grad(found[0, :, :, round(place / step)].abs().sum(), image)
        columns = grown[0].abs().sum((0, 1))
        seen = float((columns * torch.arange(192)).sum() / columns.sum())
        assert abs(seen - place) <= 1.5


def test_an_edge_that_is_taken_off_again_is_no_resolution() -> None:
    assert make("encoder_unet", grid(3), backbone="monai_efficientnet_b0_3d").eval()(
        torch.randn(1, 1, 32, 32, 32)
    ).shape == (1, 3, 32, 32, 32)


def saved(folder: Path, state: dict[str, torch.Tensor]) -> WeightsFile:
    save_file(stored_form(state), folder / "weights.safetensors")
    return WeightsFile(folder / "weights.safetensors", "0" * 64, "ours", "MIT", "nobody")


def test_weights_of_a_backbone_arrive_in_the_stages_they_are_named_after(tmp_path: Path) -> None:
    source = source_network("resnet18", 64)
    model = ModelConfig(backbone="resnet18")
    network, report = build(grid(channels=3), model, 0, saved(tmp_path, source.state_dict()))
    assert report.share == 1.0 and report.licence == "MIT" and set(report.shares) == set(network.stage_names) - {"head"}
    arrived = network.state_dict()["stages.layer4.0.1.conv2.weight"]
    assert torch.equal(arrived, source.state_dict()["layer4.1.conv2.weight"])


def test_flat_weights_are_inflated_into_an_encoder_of_volumes(tmp_path: Path) -> None:
    source = source_network("resnet18", 64)
    network, report = build(grid(3), ModelConfig(backbone="resnet18_3d"), 0, saved(tmp_path, source.state_dict()))
    kernel = network.state_dict()["stages.layer1.0.0.conv1.weight"]
    assert report.share == 1.0
    torch.testing.assert_close(kernel.sum(2), source.state_dict()["layer1.0.conv1.weight"])


@pytest.mark.parametrize("depth", [10, 18])
def test_medicalnets_checkpoint_arrives_in_an_encoder_of_volumes(depth: int, tmp_path: Path) -> None:
    name = f"monai_resnet{depth}_3d"
    torch.manual_seed(7)
    source = source_network(name, 64).state_dict()
    published = {f"module.{key}": value for key, value in source.items() if not key.startswith("fc.")}
    network, report = build(grid(3), ModelConfig(backbone=name), 0, saved(tmp_path, published))
    assert report.share == 1.0 and report.missing == () and report.layout == "native, without 'module.'"
    assert set(report.shares) == set(network.stage_names) - {"head"} and set(report.shares.values()) == {1.0}
    own = network.state_dict()
    stem = next(key for key in own if key.startswith("stages.stem.") and own[key].shape == source["conv1.weight"].shape)
    assert torch.equal(own[stem], source["conv1.weight"])
    assert torch.equal(own["stages.layer4.0.0.conv2.weight"], source["layer4.0.conv2.weight"])


def test_weights_of_another_network_are_refused_with_its_name(tmp_path: Path) -> None:
    weights = replace(saved(tmp_path, make("dynunet", grid()).state_dict()), network="dynunet")
    with pytest.raises(WeightsError, match=r"are of a 'dynunet', and this network is 'encoder_unet'\. Set model\.segm"):
        build(grid(), ModelConfig(backbone=NARROW[2]), 0, weights)


def test_frozen_stages_take_no_gradient_and_change_no_number() -> None:
    network = make("encoder_unet", grid())
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(network.eval()(images, 2), network(images), rtol=0, atol=0)
    network(images, 2).sum().backward()
    learned = {name.split(".")[1] for name, p in network.named_parameters() if p.grad is not None}
    assert learned == set(network.stage_names[2:])


def test_pictures_are_normalised_as_the_weights_were_trained_and_scans_as_planned(tmp_path: Path) -> None:
    picture, scan = (make("encoder_unet", grid(2, 3, intensity=kind)) for kind in ("unit", "zscore"))
    assert picture.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert scan.mean.flatten().tolist() == [0, 0, 0]
    assert torch.equal(picture.state_dict()["mean"], picture.mean)


def test_own_weights_arrive_but_for_other_structures(tmp_path: Path) -> None:
    before = make("dynunet", grid(outputs=3), seed=5)
    weights = saved(tmp_path, before.state_dict())
    model = ModelConfig(segmenter={"network": "dynunet"}, min_share=0.9)
    network, report = build(grid(outputs=5), model, 0, weights)
    assert 0.9 < report.share < 1 and all("conv" in name for name in report.missing)
    for stage in ("stem", "level3"):
        mine, theirs = network.stages[stage].state_dict(), before.stages[stage].state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    with pytest.raises(WeightsError, match=r"Only .* of the parameters of 'segresnet'"):
        build(grid(), ModelConfig(segmenter={"network": "segresnet"}), 0, weights)


def test_the_network_follows_from_the_weights_that_are_wanted() -> None:
    assert choose(ModelConfig(weights="none")) == "dynunet"
    assert choose(ModelConfig(weights="imagenet")) == "encoder_unet"
    assert choose(ModelConfig(weights="imagenet", phases="scratch")) == "dynunet"
    assert choose(ModelConfig(weights="none", segmenter={"network": "unet"})) == "unet"


def test_what_cannot_work_is_said_with_what_can() -> None:
    with pytest.raises(ConfigError, match=r"multiples of \[4, 4\], not \[30, 30\]\. Set .* to \[32, 32\]"):
        make("dynunet", grid(patch=30))
    with pytest.raises(ConfigError, match="takes 2 dimensions"):
        make("encoder_unet", grid(3), backbone="resnet18")
    with pytest.raises(ConfigError, match="no features in space"):
        make("encoder_unet", grid(), backbone="vit_b_16")


def test_a_level_less_is_supervised_than_there_are() -> None:
    head = make("dynunet", grid()).stages["head"]
    assert isinstance(head, Decoder) and len(head.coarser) == 1
