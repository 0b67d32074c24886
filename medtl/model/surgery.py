"""Cut a network into its stages, give it a new head, fit its stem to the image.

A :class:`StagedNetwork` is a plain chain: stem, stages, head. That is what lets a frozen prefix run without gradients,
in evaluation mode, and be computed once. Weights are loaded into the source network's own names before it is cut; a
flat network's are inflated to a volume's before that.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medtl.errors import ConfigError
from medtl.model.backbones import Backbone, backbone

HEAD = "head"


class Pool(nn.Module):
    """Average over space: (n, c, h, w) or (n, c, d, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the mean of each channel."""
        return x.mean(tuple(range(2, x.ndim)))


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
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], 1)
        embedded: Tensor = self.dropout(tokens + self.pos_embedding)
        return embedded


class PaddedShortcut(nn.Module):
    """Thin an image out and fill missing channels with zeros: shortcut A.

    MONAI's own cuts the gradient of what passes through it, and holds on to the whole source network.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, option A.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Take every ``stride``-th value along each axis of space: (n, c, ...) to (n, channels, ...)."""
        every = slice(None, None, self.stride)
        thinned = x[(slice(None), slice(None), *[every] * (x.ndim - 2))]
        missing = self.channels - x.shape[1]
        return nn.functional.pad(thinned, (0, 0) * (x.ndim - 2) + (0, missing))


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
        dimensions: of space: 2 for images, 3 for volumes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, stages: Mapping[str, nn.Module], mean: tuple[float, ...], std: tuple[float, ...], dimensions: int = 2
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.dimensions = dimensions
        shape = (1, -1, *(1,) * dimensions)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names from stem to head."""
        return tuple(self.stages)

    @property
    def memory_format(self) -> torch.memory_format:
        """How its weights and inputs lie in memory where convolutions are fastest."""
        return torch.channels_last if self.dimensions == 2 else torch.channels_last_3d

    def normalise(self, images: Tensor) -> Tensor:
        """Bring images in 0 to 1 to the mean and deviation of what the backbone was trained on."""
        return (images - self.mean) / self.std

    def run(self, x: Tensor, start: int, stop: int | None = None) -> Tensor:
        """Apply the stages ``start`` to ``stop - 1`` one after the other; without ``stop``, up to the head's logits.

        Args:
            x: what stage ``start`` takes: normalised images where it is 0, else what the stage before handed on.
            start: number of the first stage; the stem is 0.
            stop: number of the stage that is no longer applied.
        """
        for stage in list(self.stages.values())[start:stop]:
            x = stage(x)
        return x

    def forward(self, images: Tensor, frozen: int = 0) -> Tensor:
        """Give logits.

        Args:
            images: (n, channels, rows, columns) or (n, channels, slices, rows, columns), 0 to 1.
            frozen: how many stages from the stem on are frozen; they run without gradients.

        Returns:
            (n, classes).
        """
        x = self.normalise(images)
        if frozen == 0:
            return self.run(x, 0)
        with torch.no_grad():
            x = self.run(x, 0, frozen)
        return self.run(x, frozen)


def boundary_shapes(network: StagedNetwork, size: int | tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Find the shape that each stage but the head hands on for one image, without the batch.

    One image of zeros goes through in evaluation mode; every module's mode is put back.

    Args:
        network: any staged network.
        size: of the image along every axis of space, or one number for all.
    """
    space = (size,) * network.dimensions if isinstance(size, int) else size
    modes = {module: module.training for module in network.modules()}
    shapes = []
    network.eval()
    try:
        with torch.no_grad():
            x = network.normalise(network.mean.new_zeros((1, network.mean.shape[1], *space)))
            for number in range(len(network.stages) - 1):
                x = network.run(x, number, number + 1)
                shapes.append(tuple(x.shape[1:]))
    finally:
        for module, training in modes.items():
            module.training = training
    return tuple(shapes)


def source_network(name: str, size: int) -> nn.Module:
    """Build the source network of a row, with random weights and its own classifier.

    Args:
        name: a key of :data:`~medtl.model.backbones.BACKBONES`.
        size: rows of the input; a vision transformer's positions depend on it.

    Raises:
        ConfigError: no such backbone, or a size it cannot take (the nearest is named).
    """
    row = backbone(name)
    _check_size(name, row, size)
    options = dict(row.options)
    network: nn.Module
    if row.library == "torchvision":
        import torchvision

        if row.builder.startswith("vit_"):
            options["image_size"] = size
        elif row.builder.startswith("maxvit_"):
            options["input_size"] = (size, size)
        network = getattr(torchvision.models, row.builder)(weights=None, **options)
        return network
    from monai.networks import nets

    channels, classes = _MONAI_ARGUMENTS[row.builder]
    network = getattr(nets, row.builder)(**options, **{channels: len(row.mean), classes: 2})
    _replace_partial_shortcuts(network)
    return network


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
    _fit_stem(stages[row.stages[0][0]], channels)
    mean, std = row.mean, row.std
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    head = nn.Linear(row.features, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    stages[HEAD] = nn.Sequential(nn.Dropout(dropout), head)
    for module in stages.values():
        _not_in_place(module)
    return StagedNetwork(stages, mean, std, row.dimensions)


def inflate(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inflate a flat network's kernels to a volume's: repeated along depth and divided by the depth.

    A volume that is the same in every slice then gives, away from its first and last slices, what the flat network
    gives for the slice. What has no fitting counterpart in ``like`` stays as it is.

    Args:
        state: names to tensors; kernels (out, in, rows, columns).
        like: the volume network's own; kernels (out, in, slices, rows, columns).

    Source: Carreira and Zisserman, Quo Vadis, Action Recognition?, CVPR 2017, section 2.4.1.
    """
    return {key: _inflated(value, like[key]) if key in like else value for key, value in state.items()}


def _inflated(kernel: Tensor, like: Tensor) -> Tensor:
    flat = (*like.shape[:2], *like.shape[3:])
    if kernel.ndim != 4 or like.ndim != 5 or tuple(kernel.shape) != flat:
        return kernel
    depth = like.shape[2]
    return kernel.unsqueeze(2).repeat(1, 1, depth, 1, 1) / depth


def interpolate_positions(state: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Resize a vision transformer's position embeddings to another image size (bicubic).

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, section 3.2.
    """
    key, patches = "encoder.pos_embedding", "conv_proj.weight"
    if key not in state or patches not in state:
        return state
    old, side = state[key], size // state[patches].shape[-1]
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


# What MONAI's builders call the channels of the input and the number of classes.
_MONAI_ARGUMENTS: Mapping[str, tuple[str, str]] = {
    "ResNet": ("n_input_channels", "num_classes"),
    "DenseNet121": ("in_channels", "out_channels"),
    "SEResNet50": ("in_channels", "num_classes"),
    "EfficientNetBN": ("in_channels", "num_classes"),
}


def _check_size(name: str, row: Backbone, size: int) -> None:
    if size >= row.min_size and size % row.multiple == 0:
        return
    nearest = max(row.min_size, int(size / row.multiple + 0.5) * row.multiple)
    rule = f"multiples of {row.multiple}" if row.multiple > 1 else f"sizes of {row.min_size} or more"
    raise ConfigError(f"'{name}' takes {rule}, not {size}; the nearest is {nearest} (dataset.plan.size).")


def _replace_partial_shortcuts(network: nn.Module) -> None:
    for block in list(network.modules()):
        shortcut = getattr(block, "downsample", None)
        if isinstance(shortcut, functools.partial):
            block.downsample = PaddedShortcut(shortcut.keywords["planes"], shortcut.keywords["stride"])


def _fit_stem(stem: nn.Module, channels: int) -> None:
    """Give the first convolution of the stem ``channels`` inputs, unless it has so many."""
    for path, module in stem.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            if module.in_channels != channels:
                parent, _, own = path.rpartition(".")
                setattr(stem.get_submodule(parent), own, _with_channels(module, channels))
            return


def _with_channels(conv: nn.Conv2d | nn.Conv3d, channels: int) -> nn.Module:
    """Copy a convolution for another number of input channels, each of which gets its share of the summed filters."""
    if channels % conv.groups:
        raise ConfigError(
            f"The stem's {conv.groups} groups of channels cannot share {channels} (dataset.plan.channels)."
        )
    fitted = type(conv)(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    each = channels // conv.groups
    with torch.no_grad():
        summed = conv.weight.sum(1, keepdim=True)
        fitted.weight.copy_(summed.repeat(1, each, *(1,) * (summed.ndim - 2)) / each)
        if conv.bias is not None and fitted.bias is not None:
            fitted.bias.copy_(conv.bias)
    return fitted


def _not_in_place(module: nn.Module) -> None:
    """An in-place activation would overwrite what a frozen stage handed on."""
    for child in module.modules():
        if hasattr(child, "inplace"):
            child.inplace = False  # type: ignore[assignment]
