"""Cut a network into its stages, give it a new head, fit its stem to the image.

A :class:`StagedNetwork` is a plain chain: stem, stages, head. That is what lets a frozen prefix run without gradients,
in evaluation mode, and be computed once. Weights are loaded into the source network's own names before it is cut.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medtl.errors import ConfigError
from medtl.model.backbones import BACKBONES, Backbone

HEAD = "head"


class Pool(nn.Module):
    """Average over space: (n, c, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the mean of each channel."""
        return x.mean((-2, -1))


class ClassToken(nn.Module):
    """Take a vision transformer's first token: (n, tokens, c) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the class token."""
        return x[:, 0]


class VitStem(nn.Module):
    """Patches, class token and positions of a torchvision vision transformer: (n, c, h, w) to (n, tokens, width)."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.conv_proj = vit.conv_proj
        self.class_token = vit.class_token
        self.pos_embedding = vit.encoder.pos_embedding
        self.dropout = vit.encoder.dropout

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1)
        embedded: Tensor = self.dropout(tokens + self.pos_embedding)
        return embedded


OPERATIONS: Mapping[str, Any] = {
    "<relu>": lambda _: nn.ReLU(inplace=False),
    "<pool>": lambda _: Pool(),
    "<flatten>": lambda _: nn.Flatten(1),
    "<class_token>": lambda _: ClassToken(),
    "<vit_stem>": VitStem,
}


class StagedNetwork(nn.Module):
    """A backbone as a chain of named stages with a linear head.

    Args:
        stages: name to module, in order; the head is last.
        mean: subtracted from the input, which is in 0 to 1; one value per channel.
        std: divided by.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, stages: Mapping[str, nn.Module], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names from stem to head."""
        return tuple(self.stages)

    def forward(self, images: Tensor, frozen: int = 0) -> Tensor:
        """Give logits.

        Args:
            images: (n, channels, rows, columns), 0 to 1.
            frozen: how many stages from the stem on are frozen; they run without gradients.

        Returns:
            (n, classes).
        """
        x = (images - self.mean) / self.std
        for number, stage in enumerate(self.stages.values()):
            if number < frozen:
                with torch.no_grad():
                    x = stage(x)
            else:
                x = stage(x)
        return x


def source_network(name: str, size: int) -> nn.Module:
    """Build the source network of a row, with random weights and its own classifier.

    Args:
        name: a key of :data:`~medtl.model.backbones.BACKBONES`.
        size: rows of the input; a vision transformer's positions depend on it.

    Raises:
        ConfigError: no such backbone (the nearest is named), or a size it cannot take.
    """
    row = backbone(name)
    options = dict(row.options)
    network: nn.Module
    if row.library == "torchvision":
        import torchvision

        if name.startswith("vit"):
            if size % 16:
                raise ConfigError(f"'{name}' takes sizes that are multiples of 16, not {size} (dataset.plan.size).")
            options["image_size"] = size
        network = getattr(torchvision.models, row.builder)(weights=None, **options)
        return network
    from monai.networks import nets

    if row.builder == "ResNet":
        network = nets.ResNet(**options, n_input_channels=3, num_classes=2)
    else:
        network = getattr(nets, row.builder)(**options, in_channels=3, out_channels=2)
    return network


def backbone(name: str) -> Backbone:
    """Look a backbone up.

    Raises:
        ConfigError: no such row; the nearest one is named.
    """
    import difflib

    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`medtl backbones` lists them."
        raise ConfigError(f"'model.backbone': there is no backbone '{name}'; {hint}")
    return BACKBONES[name]


def cut(source: nn.Module, name: str, channels: int, classes: int, dropout: float) -> StagedNetwork:
    """Cut a source network into stages, fit the stem to ``channels`` and put a new linear head on.

    Grey input: the stem's colour filters are summed, which is exact for an image whose three channels are equal, up to
    the normalisation (the mean of the three means and deviations is used). More channels share the mean filter.

    Args:
        channels: of the input images.
        classes: outputs of the head.
        dropout: before the head.
    """
    row = backbone(name)
    stages: dict[str, nn.Module] = {}
    for stage, paths in row.stages:
        modules = [OPERATIONS[p](source) if p.startswith("<") else source.get_submodule(p) for p in paths]
        stages[stage] = nn.Sequential(*modules)
    mean, std = row.mean, row.std
    if channels != 3:
        _fit_stem(stages, channels)
        mean, std = (sum(mean) / 3,) * channels, (sum(std) / 3,) * channels  # type: ignore[assignment]
    head = nn.Linear(row.features, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    stages[HEAD] = nn.Sequential(nn.Dropout(dropout), head)
    for module in stages.values():
        _not_in_place(module)
    return StagedNetwork(stages, mean, std)


def interpolate_positions(state: dict[str, Tensor], size: int, patch: int = 16) -> dict[str, Tensor]:
    """Resize a vision transformer's position embeddings to another image size (bicubic)."""
    key = "encoder.pos_embedding"
    if key not in state:
        return state
    old, side = state[key], size // patch
    tokens = old.shape[1] - 1
    before = math.isqrt(tokens)
    if before * before != tokens or before == side:
        return state
    grid = old[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=True)
    return {**state, key: torch.cat([old[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], 1)}


def trunk_keys(source: nn.Module, name: str) -> tuple[str, ...]:
    """Name the parameters and buffers of the source network that lie in a stage: what weights should bring."""
    prefixes = [p for _, paths in backbone(name).stages for p in paths if not p.startswith("<")]
    if any(p == "<vit_stem>" for _, paths in backbone(name).stages for p in paths):
        prefixes += ["conv_proj", "class_token", "encoder.pos_embedding"]
    pattern = re.compile("|".join(rf"{re.escape(p)}(\.|$)" for p in prefixes))
    return tuple(key for key in source.state_dict() if pattern.match(key) and not key.endswith("num_batches_tracked"))


def _fit_stem(stages: Mapping[str, nn.Module], channels: int) -> None:
    stem = next(iter(stages.values()))
    for parent in stem.modules():
        for child_name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.in_channels == 3:
                fitted = nn.Conv2d(
                    channels,
                    child.out_channels,
                    child.kernel_size,  # type: ignore[arg-type]
                    child.stride,  # type: ignore[arg-type]
                    child.padding,  # type: ignore[arg-type]
                    bias=child.bias is not None,
                )
                with torch.no_grad():
                    fitted.weight.copy_(child.weight.sum(1, keepdim=True).repeat(1, channels, 1, 1) / channels)
                    if child.bias is not None and fitted.bias is not None:
                        fitted.bias.copy_(child.bias)
                setattr(parent, child_name, fitted)
                return


def _not_in_place(module: nn.Module) -> None:
    """An in-place activation would overwrite what a frozen stage handed on."""
    for child in module.modules():
        if hasattr(child, "inplace"):
            child.inplace = False  # type: ignore[assignment]
