"""One contract for every row of the table."""

from __future__ import annotations

import pytest
import torch

from medtl.config import PhaseConfig
from medtl.errors import ConfigError
from medtl.model.backbones import BACKBONES
from medtl.model.phases import frozen_digest, parameter_groups, set_learning
from medtl.model.surgery import backbone, cut, source_network, trunk_keys


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_every_backbone_keeps_the_contract(name: str) -> None:
    row = BACKBONES[name]
    size = max(row.min_size, 32)
    torch.manual_seed(0)
    source = source_network(name, size)
    trunk = trunk_keys(source, name)
    left = {key for key in source.state_dict() if not key.endswith("num_batches_tracked")} - set(trunk)
    assert len(left) == 2, "all but the classifier's weight and bias lies in a stage"
    grey = cut(source, name, 1, 3, 0.0).eval()
    images = torch.rand(2, 1, size, size)
    with torch.no_grad():
        assert grey(images).shape == (2, 3)

    network = cut(source_network(name, size), name, 3, 3, 0.0)
    assert network.stage_names[-1] == "head"
    phase = PhaseConfig(name="deep", unfreeze=1, epochs=1, lr=0.1, decay=0.5)
    frozen = set_learning(network, phase)
    assert frozen == len(network.stage_names) - 2
    groups = parameter_groups(network, phase)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in network.parameters())
    before = frozen_digest(network, phase)
    optimiser = torch.optim.SGD(groups, lr=0.1)
    loss = network(torch.rand(2, 3, size, size), frozen).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    head = next(network.stages["head"].parameters()).detach().clone()
    optimiser.step()
    assert frozen_digest(network, phase) == before
    assert not torch.equal(head, next(network.stages["head"].parameters()))
    assert all(p.grad is None for n in network.stage_names[:frozen] for p in network.stages[n].parameters())


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "squeezenet1_0", "vit_b_16", "convnext_tiny"])
def test_the_stages_compute_what_torchvision_computes(name: str) -> None:
    torch.manual_seed(0)
    size = 64
    source = source_network(name, size).eval()
    classifier = [m for m in source.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1]
    seen: list[torch.Tensor] = []
    classifier.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    network = cut(source, name, 3, 2, 0.0).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        source((images - network.mean) / network.std)
        x = (images - network.mean) / network.std
        for stage in list(network.stages.values())[:-1]:
            x = stage(x)
    features = seen[0].mean((-2, -1)) if seen[0].ndim == 4 else seen[0]
    assert torch.allclose(x, features, atol=1e-5)


def test_a_grey_stem_gives_what_three_equal_channels_give() -> None:
    torch.manual_seed(0)
    colour = cut(source_network("resnet18", 32), "resnet18", 3, 2, 0.0).eval()
    torch.manual_seed(0)
    grey = cut(source_network("resnet18", 32), "resnet18", 1, 2, 0.0).eval()
    x = torch.rand(1, 1, 32, 32)
    stem_grey = grey.stages["stem"][0](x)
    assert torch.allclose(stem_grey, colour.stages["stem"][0](x.expand(-1, 3, -1, -1)), atol=1e-5)


def test_an_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        backbone("resnet188")


def test_squeezenets_new_head_can_say_no() -> None:
    network = cut(source_network("squeezenet1_0", 64), "squeezenet1_0", 3, 2, 0.0).eval()
    with torch.no_grad():
        network.stages["head"][1].bias.copy_(torch.tensor([-5.0, 5.0]))
        assert network(torch.rand(1, 3, 64, 64)).min() < 0
