"""One contract for every row of the table; each row's network is built once and goes through all of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medtl.config import PhaseConfig
from medtl.errors import ConfigError
from medtl.model.backbones import BACKBONES, Backbone, backbone
from medtl.model.features import describe
from medtl.model.phases import frozen_digests, parameter_groups, set_learning
from medtl.model.surgery import StagedNetwork, boundary_shapes, cut, source_network, trunk_keys

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TRANSFORMERS = ("vit_", "swin_", "maxvit_")


@dataclass(frozen=True)
class Built:
    """A row with its networks."""

    name: str
    row: Backbone
    size: int
    source: nn.Module
    network: StagedNetwork

    def images(self, n: int = 2, channels: int | None = None) -> Tensor:
        """Random images of the row's size."""
        return torch.rand(n, channels or len(self.row.mean), *(self.size,) * self.row.dimensions)


@pytest.fixture(scope="module", params=BACKBONES)
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    """Build a row, once for all tests."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    row = BACKBONES[request.param]
    size = max(row.min_size, 32)
    source = source_network(request.param, size)
    for name, parameter in source.named_parameters():
        if name.endswith("layer_scale"):
            parameter.data.fill_(1.0)  # ConvNeXt's blocks begin at a millionth: nothing would be compared
    yield Built(request.param, row, size, source, cut(source, request.param, len(row.mean), 3, 0.0))
    torch.set_num_threads(threads)


def test_all_but_the_classifier_lies_in_a_stage(built: Built) -> None:
    counted = {key for key in built.source.state_dict() if not key.endswith("num_batches_tracked")}
    left = counted - set(trunk_keys(built.source, built.name))
    assert {key.rpartition(".")[2] for key in left} in ({"weight", "bias"}, {"weight"})
    assert len({key.rpartition(".")[0] for key in left}) == 1
    assert built.network.stage_names == (*(name for name, _ in built.row.stages), "head")
    assert 4 <= len(built.row.stages) <= 6


def test_the_stages_compute_what_the_source_library_computes(built: Built) -> None:
    classifier = [m for m in built.source.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)][-1]
    seen: list[Tensor] = []
    hook = classifier.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    images = built.images()
    built.source.eval()
    built.network.eval()
    with torch.no_grad():
        built.source((images - built.network.mean) / built.network.std)
        ours = built.network.run(built.network.normalise(images), 0, len(built.row.stages))
    hook.remove()
    theirs = seen[0].flatten(2).mean(2) if seen[0].ndim > 2 else seen[0]
    assert ours.shape == (2, built.row.features)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_every_boundary_can_be_stopped_at(built: Built) -> None:
    network, images = built.network.eval(), built.images(1)
    shapes = boundary_shapes(network, built.size)
    assert len(shapes) == len(built.row.stages)
    assert shapes[-1] == (built.row.features,)
    with torch.no_grad():
        whole = network(images)
        assert whole.shape == (1, 3)
        handed_on = network.normalise(images)
        for boundary, stage in enumerate(network.stages, 1):
            before, kept = handed_on, handed_on.clone()
            handed_on = network.run(before, boundary - 1, boundary)
            assert torch.equal(before, kept), f"'{stage}' overwrote what it was given"
            assert stage == "head" or tuple(handed_on.shape[1:]) == shapes[boundary - 1]
            assert torch.equal(network.run(handed_on, boundary), whole)
        assert torch.equal(network(images, len(shapes)), whole)


def test_pictures_are_described_by_two_levels_of_any_flat_row(built: Built) -> None:
    if built.row.dimensions == 3:
        pytest.skip("pictures are flat")
    pictures = np.random.default_rng(0).integers(0, 256, (2, built.size, built.size, 3), dtype=np.uint8)
    network = copy.deepcopy(built.network).train()
    found = describe(network, pictures, torch.device("cpu"))
    before = [shape for shape in boundary_shapes(network, built.size)[:-1] if len(shape) > 1][-1]
    width = before[0] if len(before) == 3 and before[1] == before[2] else before[-1]  # transformers: channels are last
    assert found.shape == (2, width + built.row.features)
    with torch.no_grad():
        images = network.normalise(torch.from_numpy(pictures / np.float32(255)).movedim(-1, 1))
        last = network.run(images, 0, len(built.row.stages))
    assert found[:, width:] == pytest.approx(nn.functional.normalize(last, dim=1).numpy(), abs=1e-4)


def test_each_boundary_leaves_exactly_its_stages_to_learn(built: Built) -> None:
    network = built.network
    names = network.stage_names
    choices: list[tuple[str | int, int]] = [("head", 1), ("all", len(names))]
    choices += [(n, n + 1) for n in range(1, len(names))]
    for unfreeze, learning in choices:
        for batchnorm in ("frozen", "with_stage"):
            phase = PhaseConfig(name="p", unfreeze=unfreeze, batchnorm=batchnorm)
            assert set_learning(network, phase) == len(names) - learning
            found = {key for key, p in network.stages.named_parameters() if p.requires_grad}
            assert found == learnable(network, names[len(names) - learning :], batchnorm == "with_stage")
            assert all(network.stages[n].training == (n in names[len(names) - learning :]) for n in names)


def learnable(network: StagedNetwork, stages: tuple[str, ...], with_norms: bool) -> set[str]:
    """Name the parameters of stages, with or without those of BatchNorm."""
    return {
        f"{stage}.{path}.{key}"
        for stage in stages
        for path, module in network.stages[stage].named_modules()
        if with_norms or not isinstance(module, _BatchNorm)
        for key, _ in module.named_parameters(recurse=False)
    } | {f"{stage}.{key}" for stage in stages for key, _ in network.stages[stage].named_parameters(recurse=False)}


def test_a_step_moves_what_learns_and_nothing_else(built: Built) -> None:
    network = built.network
    phase = PhaseConfig(name="deep", unfreeze=1, epochs=1, lr=0.1, decay=0.5)
    frozen = set_learning(network, phase)
    groups = parameter_groups(network, phase)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in network.parameters())
    before = frozen_digests(network, phase)
    head = next(network.stages["head"].parameters())
    was = head.detach().clone()
    network(built.images(), frozen).square().sum().backward()
    torch.optim.SGD(groups, lr=1e-6).step()
    assert frozen_digests(network, phase) == before
    assert not torch.equal(head, was)
    assert all(p.grad is None for n in network.stage_names[:frozen] for p in network.stages[n].parameters())
    network.zero_grad()


def test_a_gradient_reaches_every_parameter(built: Built) -> None:
    network = built.network
    frozen = set_learning(network, PhaseConfig(name="full", unfreeze="all", batchnorm="with_stage"))
    assert frozen == 0
    network(built.images()).square().sum().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None] == []
    network.zero_grad()


def test_the_memory_format_changes_nothing(built: Built) -> None:
    network, images = built.network.eval(), built.images(1)
    with torch.no_grad():
        plain = network(images)
        network.to(memory_format=network.memory_format)
        fast = network(images.contiguous(memory_format=network.memory_format))
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5 * max(1.0, float(plain.abs().max())))


def test_a_copy_takes_what_was_saved(built: Built) -> None:
    network, images = built.network.eval(), built.images(1)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
        assert not torch.equal(other(images), network(images))
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(images), network(images))


def test_any_number_of_channels_goes_in(built: Built) -> None:
    native = len(built.row.mean)
    for channels in (4, 4 - native, native):  # 1, 3 and 4; the last leaves the shared stem as the other tests want it
        network = cut(built.source, built.name, channels, 2, 0.0).eval()
        with torch.no_grad():
            assert network(built.images(1, channels)).shape == (1, 2)
        assert network.mean.shape == network.std.shape == (1, channels, *(1,) * built.row.dimensions)


@pytest.mark.parametrize("name", [name for name, row in BACKBONES.items() if row.library == "torchvision"])
def test_a_row_agrees_with_what_torchvision_publishes(name: str) -> None:
    from torchvision import models

    row = BACKBONES[name]
    published = models.get_model_weights(row.builder).DEFAULT
    assert row.weights is not None
    assert row.weights.file == published.url.rpartition("/")[2]
    digits = re.search(r"-([0-9a-f]+)\.pth$", row.weights.file)
    assert digits is not None
    assert row.weights.sha256.startswith(digits[1])
    assert "license" not in published.meta, "a licence of its own"
    least = max(published.meta["min_size"])
    if name.startswith(TRANSFORMERS):  # there it is the size they were trained with
        assert least >= row.min_size and least % row.multiple == 0
    else:
        assert row.min_size >= least
    x = torch.rand(2, 3, 4, 4)
    how = published.transforms()
    theirs = (x - torch.tensor(how.mean).view(3, 1, 1)) / torch.tensor(how.std).view(3, 1, 1)
    if "transform_input" in row.options:  # torchvision's own weights come with this second normalisation
        options = {**row.options, "transform_input": True, "init_weights": False}
        theirs = getattr(models, row.builder)(weights=None, **options)._transform_input(theirs)
    ours = (x - torch.tensor(row.mean).view(3, 1, 1)) / torch.tensor(row.std).view(3, 1, 1)
    torch.testing.assert_close(ours, theirs)


def test_the_table_holds_the_families_that_people_use() -> None:
    families = "resnet resnext wide_resnet densenet efficientnet_b efficientnet_v2 mobilenet_v2 mobilenet_v3 shufflenet"
    families += (
        " mnasnet regnet_x regnet_y convnext swin_t swin_v2 vit maxvit vgg inception googlenet squeezenet alexnet"
    )
    for family in families.split():
        assert any(name.startswith(family) for name in BACKBONES), family
    assert sum(row.dimensions == 3 for row in BACKBONES.values()) == 9
    assert all(row.citation for row in BACKBONES.values())


def test_an_inflated_row_names_a_flat_one_with_the_same_file() -> None:
    for row in BACKBONES.values():
        if row.inflates is not None:
            flat = BACKBONES[row.inflates]
            assert (row.dimensions, flat.dimensions) == (3, 2)
            assert (row.weights, row.mean, row.std) == (flat.weights, flat.mean, flat.std)


def test_an_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        backbone("resnet188")


def test_squeezenets_new_head_can_say_no() -> None:
    network = cut(source_network("squeezenet1_0", 64), "squeezenet1_0", 3, 2, 0.0).eval()
    with torch.no_grad():
        head = network.get_submodule("stages.head.1")
        assert isinstance(head, nn.Linear)
        head.bias.copy_(torch.tensor([-5.0, 5.0]))
        assert network(torch.rand(1, 3, 64, 64)).min() < 0
