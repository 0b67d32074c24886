"""Stages, stems, sizes and inflation."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medtl.errors import ConfigError
from medtl.model.backbones import BACKBONES
from medtl.model.surgery import (
    Pool,
    StagedNetwork,
    _fit_stem,
    boundary_shapes,
    cut,
    inflate,
    interpolate_positions,
    source_network,
    trunk_keys,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def small(dimensions: int = 2) -> StagedNetwork:
    """Two stages and a head, with a dropout that only evaluation mode silences."""
    conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
    torch.manual_seed(0)
    stages = {
        "stem": nn.Sequential(conv(2, 4, 3, padding=1), nn.Dropout(0.5)),
        "last": nn.Sequential(conv(4, 6, 2, stride=2), Pool()),
        "head": nn.Linear(6, 3),
    }
    return StagedNetwork(stages, (0.25, 0.5), (0.5, 0.25), dimensions)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_images_and_volumes_are_normalised_by_channel(dimensions: int) -> None:
    x = torch.full((1, 2, *(4,) * dimensions), 0.75)
    ours = small(dimensions).normalise(x)
    assert ours.shape == x.shape
    assert (ours[:, 0] == 1.0).all() and (ours[:, 1] == 1.0).all()


def test_a_frozen_prefix_hands_on_no_gradient() -> None:
    network = small().eval()
    x = torch.rand(1, 2, 4, 4)
    assert torch.equal(network(x, 0), network(x, 2))
    network(x, 1).sum().backward()
    got = {name.split(".")[1] for name, p in network.named_parameters() if p.grad is not None}
    assert got == {"last", "head"}


@pytest.mark.parametrize(
    ("dimensions", "size", "stem"), [(2, 8, (4, 8, 8)), (2, (8, 6), (4, 8, 6)), (3, 4, (4, 4, 4, 4))]
)
def test_boundary_shapes_are_found_without_touching_the_network(
    dimensions: int, size: int | tuple[int, ...], stem: tuple[int, ...]
) -> None:
    network = small(dimensions)
    network.stages["stem"].eval()
    before = copy.deepcopy(network.state_dict())
    assert boundary_shapes(network, size) == (stem, (6,))
    assert network.training and network.stages["last"].training and not network.stages["stem"].training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_modes_come_back_after_a_size_that_does_not_fit() -> None:
    network = small()
    with pytest.raises(RuntimeError):
        boundary_shapes(network, 1)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("name", "size", "near"),
    [
        ("vit_b_16", 100, 96),
        ("vit_b_16", 104, 112),
        ("vit_b_32", 48, 64),
        ("vit_b_16", 16, 32),
        ("maxvit_t", 256, 224),
        ("maxvit_t", 400, 448),
        ("maxvit_t", 64, 224),
        ("inception_v3", 64, 80),
        ("resnet18", 8, 32),
        ("monai_resnet10_3d", 16, 32),
    ],
)
def test_an_impossible_size_is_refused_and_the_nearest_named(name: str, size: int, near: int) -> None:
    with pytest.raises(ConfigError, match=rf"not {size}; the nearest is {near} \(dataset\.plan\.size\)"):
        source_network(name, size)
    row = BACKBONES[name]
    assert near >= row.min_size and near % row.multiple == 0


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "convnext_tiny", "resnet18", "densenet121"])
def test_odd_sizes_are_taken_where_the_network_pads(name: str) -> None:
    network = cut(source_network(name, 75), name, 1, 2, 0.0).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 1, 75, 75)).shape == (1, 2)


@pytest.mark.parametrize("name", ["vit_b_32", "maxvit_t"])
def test_a_transformer_is_built_for_the_size(name: str) -> None:
    size = 2 * BACKBONES[name].multiple if name != "maxvit_t" else 448
    network = cut(source_network(name, size), name, 3, 2, 0.0).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, size, size)).shape == (1, 2)


@pytest.mark.parametrize(("patch", "size"), [(16, 64), (32, 96)])
def test_positions_are_resized_as_torchvision_resizes_them(patch: int, size: int) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    torch.manual_seed(0)
    state = {
        "conv_proj.weight": torch.rand(8, 3, patch, patch),
        "encoder.pos_embedding": torch.rand(1, 7 * 7 + 1, 8),
        "other": torch.rand(2),
    }
    ours = interpolate_positions(state, size)
    theirs = interpolate_embeddings(size, patch, copy.deepcopy(state))
    assert ours["encoder.pos_embedding"].shape == (1, (size // patch) ** 2 + 1, 8)
    torch.testing.assert_close(ours["encoder.pos_embedding"], theirs["encoder.pos_embedding"])
    assert ours["other"] is state["other"]
    assert interpolate_positions(state, 7 * patch) is state


def test_a_grey_stem_gives_what_three_equal_channels_give() -> None:
    torch.manual_seed(0)
    colour = cut(source_network("resnet18", 32), "resnet18", 3, 2, 0.0).eval()
    torch.manual_seed(0)
    grey = cut(source_network("resnet18", 32), "resnet18", 1, 2, 0.0).eval()
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        theirs = colour.get_submodule("stages.stem.0")(x.expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey.get_submodule("stages.stem.0")(x), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_fitted_stem_keeps_everything_but_its_channels(dimensions: int, channels: int) -> None:
    kind = nn.Conv2d if dimensions == 2 else nn.Conv3d
    conv = kind(3, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular", bias=True)
    stem = nn.Sequential(nn.Sequential(nn.Identity(), conv), kind(6, 4, 1))
    _fit_stem(stem, channels)
    fitted, later = stem.get_submodule("0.1"), stem.get_submodule("1")
    assert isinstance(fitted, kind) and isinstance(later, kind)
    assert (later.in_channels, fitted.in_channels, fitted.out_channels) == (6, channels, 6)
    for what in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(fitted, what) == getattr(conv, what), what
    grey = torch.rand(1, 1, *(8,) * dimensions)
    with torch.no_grad():
        ours = fitted(grey.expand(-1, channels, *(-1,) * dimensions))
        torch.testing.assert_close(ours, conv(grey.expand(-1, 3, *(-1,) * dimensions)))


def test_groups_of_channels_share_what_can_be_shared() -> None:
    stem = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    _fit_stem(stem, 2)
    fitted = stem.get_submodule("0")
    assert isinstance(fitted, nn.Conv2d)
    assert (fitted.in_channels, fitted.groups) == (2, 2)
    with pytest.raises(ConfigError, match="2 groups of channels cannot share 3"):
        _fit_stem(stem, 3)


@pytest.mark.parametrize("name", ["resnet18", "monai_resnet10_3d"])
def test_a_stem_that_fits_is_left_alone(name: str) -> None:
    source = source_network(name, 32)
    network = cut(source, name, len(BACKBONES[name].mean), 2, 0.0)
    assert network.get_submodule("stages.stem.0") is source.get_submodule("conv1")


@given(depth=st.integers(1, 7), side=st.sampled_from([1, 3, 7]), seed=st.integers(0, 99))
@settings(derandomize=True, max_examples=40, deadline=None)
def test_an_inflated_kernel_sums_to_the_flat_one(depth: int, side: int, seed: int) -> None:
    flat = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(seed))
    kernel = inflate({"w": flat}, {"w": torch.empty(4, 3, depth, side, side)})["w"]
    assert kernel.shape == (4, 3, depth, side, side)
    torch.testing.assert_close(kernel.sum(2), flat)
    assert all(torch.equal(kernel[:, :, 0], kernel[:, :, i]) for i in range(depth))


def test_what_does_not_fit_stays_flat() -> None:
    like = {"other_side": torch.empty(4, 3, 5, 5, 5), "other_width": torch.empty(8, 3, 3, 3, 3), "bias": torch.empty(4)}
    state = {"other_side": torch.rand(4, 3, 3, 3), "other_width": torch.rand(4, 3, 3, 3), "bias": torch.rand(4)}
    state["unknown"] = torch.rand(4, 3, 3, 3)
    assert all(inflate(state, like)[key] is value for key, value in state.items())


def spread_statistics(network: nn.Module) -> None:
    """Give every BatchNorm statistics of its own, as after training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
            nn.init.normal_(module.running_mean, 0.0, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet18_3d", "resnet50_3d"])
def test_an_inflated_network_sees_in_a_constant_volume_what_the_flat_one_sees_in_its_slice(name: str) -> None:
    flat_name = BACKBONES[name].inflates
    assert flat_name is not None
    torch.manual_seed(0)
    flat_source, source = source_network(flat_name, 32), source_network(name, 32)
    spread_statistics(flat_source)
    inflated = inflate(flat_source.state_dict(), source.state_dict())
    trunk = trunk_keys(source, name)
    assert set(trunk) == set(trunk_keys(flat_source, flat_name))
    assert all(inflated[key].shape == source.state_dict()[key].shape for key in trunk)
    source.load_state_dict({**source.state_dict(), **{key: inflated[key] for key in trunk}})
    flat, volume = cut(flat_source, flat_name, 3, 2, 0.0).eval(), cut(source, name, 3, 2, 0.0).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        ours = volume.run(volume.normalise(image.unsqueeze(2).expand(-1, -1, 64, -1, -1)), 0, 2)
        theirs = flat.run(flat.normalise(image), 0, 2)
    middle = ours.shape[2] // 2
    torch.testing.assert_close(ours[:, :, middle], theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours[:, :, 0], theirs, rtol=1e-3, atol=1e-4), "the border has zeros beside it"


def medicalnet_state(depth: int) -> dict[str, tuple[int, ...]]:
    """Name the tensors of MedicalNet's checkpoint of a depth, from its model file (models/resnet.py), with shapes."""
    expansion, blocks, shortcut = {
        10: (1, (1, 1, 1, 1), "B"),
        18: (1, (2, 2, 2, 2), "A"),
        34: (1, (3, 4, 6, 3), "A"),
        50: (4, (3, 4, 6, 3), "B"),
    }[depth]
    shapes: dict[str, tuple[int, ...]] = {"module.conv1.weight": (64, 1, 7, 7, 7)}

    def norm(path: str, width: int) -> None:
        shapes.update({f"{path}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")})

    norm("module.bn1", 64)
    before = 64
    for layer, count in enumerate(blocks, 1):
        width = 32 * 2**layer
        for number in range(count):
            path = f"module.layer{layer}.{number}"
            kernels = [(width, before, 3), (width, width, 3)]
            if expansion == 4:
                kernels = [(width, before, 1), (width, width, 3), (4 * width, width, 1)]
            for index, (out, into, side) in enumerate(kernels, 1):
                shapes[f"{path}.conv{index}.weight"] = (out, into, side, side, side)
                norm(f"{path}.bn{index}", out)
            if number == 0 and shortcut == "B" and (layer > 1 or expansion == 4):
                shapes[f"{path}.downsample.0.weight"] = (expansion * width, before, 1, 1, 1)
                norm(f"{path}.downsample.1", expansion * width)
            before = expansion * width
    return shapes


@pytest.mark.parametrize("depth", [10, 18, 34, 50])
def test_medicalnets_checkpoints_fit_tensor_by_tensor(depth: int) -> None:
    name = f"monai_resnet{depth}_3d"
    source = source_network(name, 32)
    state = source.state_dict()
    own = {key: tuple(state[key].shape) for key in trunk_keys(source, name)}
    assert own == {key.removeprefix("module."): shape for key, shape in medicalnet_state(depth).items()}


def test_shortcut_a_gives_what_monai_gives_and_lets_the_gradient_through() -> None:
    from monai.networks.nets import ResNet

    torch.manual_seed(0)
    options = dict(BACKBONES["monai_resnet18_3d"].options)
    theirs = ResNet(**options, n_input_channels=1, num_classes=2).eval()
    ours = source_network("monai_resnet18_3d", 32).eval()
    ours.load_state_dict(theirs.state_dict())
    assert any(isinstance(getattr(m, "downsample", None), partial) for m in theirs.modules())
    assert not any(isinstance(getattr(m, "downsample", None), partial) for m in ours.modules())
    x = torch.rand(1, 1, 33, 32, 40)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    shortcut = ours.get_submodule("layer2.0.downsample")
    features = torch.rand(1, 64, 4, 4, 4, requires_grad=True)
    shortcut(features).sum().backward()
    assert features.grad is not None
    assert features.grad.sum() == 64 * 2**3


def test_a_cut_network_does_not_carry_its_source_along() -> None:
    network = cut(source_network("monai_resnet18_3d", 32), "monai_resnet18_3d", 1, 2, 0.0)
    kept = [m for m in copy.deepcopy(network).modules() if type(m).__name__ == "ResNet"]
    held = [v for m in network.modules() for v in vars(m).values() if isinstance(v, partial)]
    assert not kept
    assert not held


def test_nothing_writes_over_its_input() -> None:
    for name in ("monai_efficientnet_b0_3d", "vgg11_bn", "mobilenet_v3_small"):
        network = cut(source_network(name, 32), name, 1, 2, 0.0)
        assert not any(getattr(module, "inplace", False) for module in network.modules()), name


def test_the_pool_is_the_mean_over_space() -> None:
    x: Tensor = torch.rand(2, 3, 4, 5, 6)
    torch.testing.assert_close(Pool()(x), x.flatten(2).mean(2))
    torch.testing.assert_close(Pool()(x[:, :, 0]), x[:, :, 0].flatten(2).mean(2))
