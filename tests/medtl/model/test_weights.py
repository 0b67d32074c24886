"""Weights of many libraries arrive under one name, or the run is refused; what arrived is what computes."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from medtl.errors import WeightsError
from medtl.model.io import build_network
from medtl.model.surgery import source_network, trunk_keys
from medtl.model.vault import Vault, resolve_weights
from medtl.model.weights import (
    LAYOUTS,
    InputContract,
    adapt,
    fit_channels,
    load_source,
    normalisation,
    state_in,
    to_house_input,
)
from medtl.records import LoadReport

NAME = "squeezenet1_0"
NOTHING = LoadReport("test", None, 0, (), (), 0.0)
# Names and shapes of timm's networks and the first logits that timm computes with `invented` weights (timm 1.0.31).
TIMM: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("timm_names.json").read_text())


def invented(names: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Give every name weights of its own that are the same on every machine."""
    state = {}
    for name, shape in names.items():
        phase = zlib.crc32(name.encode()) % 1000
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 12.9898 + phase).reshape(shape)
        if len(shape) > 1:
            wave = wave * math.sqrt(2 / max(1, math.prod(shape[1:])))
        elif name.endswith((".weight", "running_var")):
            wave = 1 + 0.3 * wave
        else:
            wave = 0.1 * wave
        state[name] = wave.float()
    return state


def image(size: int) -> Tensor:
    return torch.sin(torch.arange(3 * size * size, dtype=torch.float64) * 0.37).reshape(1, 3, size, size).float()


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    state = network.state_dict()
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith(("num_batches_tracked", "position_index"))}


def expanded(modules: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Undo the fixture's shorthand: a number is a batch normalisation of so many channels."""
    names: dict[str, tuple[int, ...]] = {}
    for module, inside in modules.items():
        parts = ("weight", "bias", "running_mean", "running_var")
        tensors = {part: [inside] for part in parts} if isinstance(inside, int) else inside
        names |= {f"{module}.{part}".lstrip("."): tuple(shape) for part, shape in tensors.items()}
    return names


@pytest.mark.parametrize("theirs", TIMM)
def test_weights_of_timm_compute_in_torchvision_what_they_compute_in_timm(theirs: str) -> None:
    fact = TIMM[theirs]
    ours = getattr(torchvision.models, fact["ours"])(weights=None).eval()
    state, layout = adapt(invented(expanded(fact["modules"])), shapes(ours))
    assert layout == fact["layout"]
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and not [k for k in missing if not k.endswith(("num_batches_tracked", "position_index"))]
    with torch.no_grad():
        logits = ours(image(fact["size"]))[0, :4]
    assert torch.allclose(logits, torch.tensor(fact["logits"]), rtol=1e-3, atol=1e-4)


def test_the_table_of_names_is_timms_own() -> None:
    timm = pytest.importorskip("timm")
    for name, fact in TIMM.items():
        assert expanded(fact["modules"]) == shapes(timm.create_model(name)), name


def test_a_normalisation_gives_the_same_with_torchvisions_epsilon() -> None:
    x, given = torch.randn(2, 4, 3, 3), {"weight": torch.rand(4), "bias": torch.rand(4)}
    given |= {"running_mean": torch.rand(4), "running_var": torch.tensor([1e-4, 1e-3, 0.1, 10.0])}
    state = LAYOUTS["timm MobileNetV3"]({f"bn1.{part}": value for part, value in given.items()})
    ours = {part: state[f"features.0.1.{part}"] for part in given}

    def normalised(of: Mapping[str, Tensor], epsilon: float) -> Tensor:
        return nn.functional.batch_norm(x, of["running_mean"], of["running_var"], of["weight"], of["bias"], eps=epsilon)

    assert torch.allclose(normalised(given, 1e-5), normalised(ours, 1e-3), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(normalised(given, 1e-5), normalised(given, 1e-3), rtol=1e-3)


def test_timms_convolutions_of_a_vgg_become_linear_layers() -> None:
    kernel = torch.randn(8, 4, 7, 7)
    adapted, layout = adapt({"pre_logits.fc1.weight": kernel}, {"classifier.0.weight": (8, 4 * 49)})
    assert layout == "timm VGG"
    image, linear = torch.randn(1, 4, 7, 7), adapted["classifier.0.weight"]
    expected = nn.functional.conv2d(image, kernel).flatten()
    assert torch.allclose(linear @ image.flatten(), expected, atol=1e-4)


def children(network: nn.Module) -> nn.Module:
    holder = nn.Module()
    holder.backbone = nn.Sequential(*list(network.children())[:-1])
    return holder


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet50", "RadImageNet ResNet"),
        ("densenet121", "RadImageNet DenseNet"),
        ("inception_v3", "RadImageNet Inception"),
    ],
)
def test_radimagenets_numbers_become_names(name: str, layout: str) -> None:
    trained = source_network(name, 96)
    report, loaded = load(name, children(trained).state_dict(), 96)
    assert (report.share, report.missing, report.layout) == (1.0, (), f"{layout}, without 'backbone.'")
    assert same_trunk(trained, loaded, name)


def test_radimagenets_inception_with_its_auxiliary_classifier_counts_on() -> None:
    trained = torchvision.models.inception_v3(weights=None, init_weights=False)
    report, loaded = load("inception_v3", children(trained).state_dict(), 96)
    assert (report.share, report.layout.split(",")[1]) == (1.0, " auxiliary")
    assert torch.equal(loaded.state_dict()["Mixed_7c.branch1x1.conv.weight"], trained.Mixed_7c.branch1x1.conv.weight)


def load(name: str, state: Mapping[str, Tensor], size: int = 64) -> tuple[LoadReport, nn.Module]:
    network = source_network(name, size)
    return load_source(network, name, state, size, NOTHING, 0.9), network


def same_trunk(one: nn.Module, other: nn.Module, name: str) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return all(torch.equal(a[key], b[key]) for key in trunk_keys(other, name))


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "net.", "model.encoder.", "module.encoder_q.", "_orig_mod.module.", "network."]
)
def test_wrappers_are_taken_off_and_what_lies_beside_is_reported(prefix: str) -> None:
    trained = source_network("resnet18", 64)
    state = {f"{prefix}{key}": value for key, value in trained.state_dict().items()}
    state |= {"module.encoder_k.conv1.weight": torch.zeros(64, 3, 7, 7), "queue": torch.zeros(128, 4)}
    report, loaded = load("resnet18", state)
    assert (report.share, report.layout) == (1.0, f"native, without '{prefix}'")
    beside = {key.removeprefix(prefix) for key in ("queue", "module.encoder_k.conv1.weight")}
    assert beside <= set(report.unexpected)
    assert same_trunk(trained, loaded, "resnet18")


def test_medicalnets_checkpoint_fills_a_network_of_volumes() -> None:
    from monai.networks import nets

    trained = nets.ResNet(
        "basic", [1, 1, 1, 1], [64, 128, 256, 512], n_input_channels=1, num_classes=2, bias_downsample=False
    )
    state = {f"module.{k}": v for k, v in trained.state_dict().items() if not k.startswith("fc.")}
    state["module.conv_seg.0.weight"] = torch.zeros(512, 32, 2, 2, 2)
    own = {key: shape for key, shape in shapes(trained).items() if not key.startswith("fc.")}
    adapted, layout = adapt(state_in({"state_dict": state, "epoch": 3}), own)
    assert layout == "native, without 'module.'"
    assert all(torch.equal(adapted[key], trained.state_dict()[key]) for key in own)


def test_densenet_goes_to_monai_and_back() -> None:
    theirs, ours = source_network("densenet121", 64), source_network("monai_densenet121", 64)
    report, loaded = load("monai_densenet121", theirs.state_dict())
    assert (report.share, report.layout) == (1.0, "torchvision DenseNet to MONAI")
    report, back = load("densenet121", loaded.state_dict())
    assert (report.share, report.layout) == (1.0, "MONAI DenseNet to torchvision")
    assert same_trunk(theirs, back, "densenet121") and not same_trunk(ours, loaded, "monai_densenet121")


def test_the_dots_of_torchvisions_old_densenet_are_taken_out() -> None:
    trained = source_network("densenet121", 64)
    dotted = {}
    for key, value in trained.state_dict().items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in key else key
        dotted[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in dotted
    report, loaded = load("densenet121", dotted)
    assert report.share == 1.0 and same_trunk(trained, loaded, "densenet121")


def test_a_flat_network_is_inflated_into_one_of_volumes() -> None:
    flat = source_network("resnet18", 64)
    report, loaded = load("resnet18_3d", flat.state_dict())
    assert (report.share, report.layout) == (1.0, "native")
    kernel, deep = flat.state_dict()["layer1.0.conv1.weight"], loaded.state_dict()["layer1.0.conv1.weight"]
    assert deep.ndim == 5 and torch.allclose(deep.sum(2), kernel, atol=1e-6)


def test_a_grey_networks_own_weights_start_a_colour_one_and_back(tmp_path: Path) -> None:
    grey, _ = build("none", tmp_path, "monai_resnet10_narrow", channels=1)
    save_file({k: v.contiguous() for k, v in grey.state_dict().items()}, tmp_path / "grey.safetensors")
    colour, report = build(tmp_path / "grey.safetensors", tmp_path, "monai_resnet10_narrow", channels=3)
    assert (report.share, report.layout) == (1.0, "medtl")
    before, after = (next(v for v in n.state_dict().values() if v.ndim == 4) for n in (grey, colour))
    assert after.shape[1] == 3 and torch.allclose(after.sum(1), before[:, 0], atol=1e-6)


def test_a_contract_gives_mean_and_deviation_for_any_number_of_channels() -> None:
    contract = InputContract(3, (0.1, 0.2, 0.6), (0.2, 0.2, 0.2))
    assert normalisation(contract, 3) == ((0.1, 0.2, 0.6), (0.2, 0.2, 0.2))
    assert normalisation(contract, 1) == (pytest.approx((0.3,)), pytest.approx((0.2,)))
    assert normalisation(None, 3) is None and normalisation(InputContract(), 3) is None


@given(given_channels=st.sampled_from([1, 3]), channels=st.integers(1, 9), seed=st.integers(0, 99))
@settings(derandomize=True, max_examples=25, deadline=None)
def test_equal_channels_give_the_same_output_whatever_their_number(
    given_channels: int, channels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    kernel, grey = torch.randn(4, given_channels, 3, 3), torch.randn(1, 1, 8, 8)
    before = nn.functional.conv2d(grey.repeat(1, given_channels, 1, 1), kernel)
    after = nn.functional.conv2d(grey.repeat(1, channels, 1, 1), fit_channels(kernel, channels))
    assert torch.allclose(before, after, atol=1e-4)


@given(st.permutations(sorted(shapes(torchvision.models.squeezenet1_0(weights=None)))), st.integers(0, 20))
@settings(derandomize=True, max_examples=20, deadline=None)
def test_what_fits_natively_is_never_renamed(names: list[str], kept: int) -> None:
    wanted = shapes(torchvision.models.squeezenet1_0(weights=None))
    state = {key: torch.zeros(wanted[key]) for key in names[: kept + 1]}
    adapted, layout = adapt(state, wanted)
    assert layout == "native" and adapted.keys() == state.keys()


@pytest.mark.parametrize(
    "loaded",
    [
        {"state_dict": {"a": torch.ones(1)}, "optimizer": {"state": {0: torch.zeros(9)}}},
        {"epoch": 3, "model": {"state_dict": {"a": torch.ones(1)}}},
        {"teacher": {"a": torch.ones(1)}, "student": {"a": torch.zeros(1)}},
        {"a": nn.Parameter(torch.ones(1)), "epoch": 1},
    ],
)
def test_the_state_dict_is_found_among_epochs_and_optimisers(loaded: Any) -> None:
    found = state_in(loaded)
    assert list(found) == ["a"] and torch.equal(found["a"].detach(), torch.ones(1))


@pytest.mark.parametrize("loaded", [None, 3, {}, {"state_dict": {}}, [torch.ones(1)], {"epoch": 1}, {0: torch.ones(1)}])
def test_a_checkpoint_without_a_state_dict_is_refused(loaded: Any) -> None:
    with pytest.raises(WeightsError, match="no state dict"):
        state_in(loaded)


def test_weights_for_bgr_from_0_to_255_see_the_same_image_as_before() -> None:
    torch.manual_seed(0)
    state, mean, std = {"conv.weight": torch.randn(4, 3, 3, 3)}, (103.9, 116.8, 123.7), (57.0, 58.0, 59.0)
    rgb = torch.rand(1, 3, 8, 8)
    theirs = (rgb.flip(1) * 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    contract = InputContract(3, mean, std, None, (0.0, 255.0), "BGR")
    changed, house, note = to_house_input(state, contract)
    assert (house.value_range, house.colour_order) == ((0.0, 1.0), "RGB")
    assert note == "values 0 to 255 scaled to 0 to 1, BGR turned to RGB"
    ours = (rgb - torch.tensor(house.mean).view(3, 1, 1)) / torch.tensor(house.std).view(3, 1, 1)
    expected = nn.functional.conv2d(theirs, state["conv.weight"])
    assert torch.allclose(nn.functional.conv2d(ours, changed["conv.weight"]), expected, atol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"value_range": (1.0, 1.0)}, {"colour_order": "CMYK"}, {"mean": (0.5,)}, {"mean": (0.5,), "std": (0.0,)},
        {"mean": (0.5,), "std": (0.5,), "channels": 3}, {"mean": (0.5, 0.5), "std": (0.5,)},
    ],
)  # fmt: skip
def test_an_impossible_input_contract_cannot_be_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(WeightsError):
        InputContract(**wrong)


# ── into a network ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return source_network(NAME, 64).state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def build(spec: str | Path, vault: Path, name: str = NAME, channels: int = 3, min_share: float = 0.9):  # type: ignore[no-untyped-def]
    weights = resolve_weights(str(spec), name, Vault(vault))
    return build_network(name, 64, channels, 2, 0.0, weights, min_share, seed=0)


def test_weights_arrive_whole_and_the_report_says_so(
    checkpoint: Path, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    network, report = build(checkpoint, tmp_path)
    assert (report.share, report.missing, report.source) == (1.0, (), "weights.safetensors")
    assert report.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert torch.equal(network.state_dict()["stages.stem.0.weight"], state["features.0.weight"])
    grey, _ = build(checkpoint, tmp_path, channels=1)
    assert torch.allclose(grey.state_dict()["stages.stem.0.weight"], state["features.0.weight"].sum(1, keepdim=True))


def test_weights_of_another_architecture_are_refused_stage_by_stage(state: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"Only 0\.0% .* stem 0%, layer1 0%.* another architecture"):
        load("resnet18", state)


def test_a_lost_stage_is_named_and_the_limit_can_be_set() -> None:
    trained = source_network("resnet18", 64).state_dict()
    part = {key: value for key, value in trained.items() if not key.startswith("layer4")}
    with pytest.raises(WeightsError, match=r"layer3 100%, layer4 0%; names read as: native"):
        load("resnet18", part)
    network = source_network("resnet18", 64)
    assert load_source(network, "resnet18", part, 64, NOTHING, 0.2).share < 0.5
