"""A plan becomes a network that says of every voxel what it shows.

The encoder is a chain of named stages, stem first, as that of a diagnosis (:mod:`medtl.model.surgery`): a frozen prefix
runs in evaluation mode without gradients, and its digest is taken before and after. The head is the decoder: it takes
what the encoder handed on at each resolution. A network that MONAI builds in one piece is a head without an encoder.

What is frozen is computed each time and not kept: features of every resolution are large, the decoder costs most of a
step, and keeping them was worth a factor of 1.2 to 1.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from medtl.config import ModelConfig, SegmenterConfig
from medtl.errors import ConfigError, WeightsError
from medtl.model.backbones import backbone
from medtl.model.instance_norm import keep_channels_last
from medtl.model.segmenters import SEGMENTERS
from medtl.model.surgery import HEAD, Pool, StagedNetwork, cut, source_network
from medtl.model.vault import WeightsFile, read_weights
from medtl.model.weights import OURS, load_source, load_staged, normalisation
from medtl.records import GridPlan, LoadReport

Tap = tuple[int, int]  # stage and module after which features are handed to the decoder
_WIDEST = 256  # channels of a decoder's level
_COARSER = 2  # outputs besides that of full resolution that learn too
_NOT_CONVOLUTIONS = ("vit_", "swin_", "maxvit_")  # no features in space, or of one size alone


class SegmenterNetwork(StagedNetwork):
    """An encoder in stages and a decoder as its head.

    Args:
        kind: a key of :data:`~medtl.model.segmenters.SEGMENTERS`.
        stages: name to module, the encoder's first; the head takes the input and the features at the taps.
        taps: where features are handed to the head, finest first.
        mean: subtracted from the input, one value per channel.
        std: divided by.
        plan: it was built from.
        multiple: sizes of the input are multiples of it, one for each axis.
    """

    def __init__(
        self,
        kind: str,
        stages: Mapping[str, nn.Module],
        taps: Sequence[Tap],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        plan: GridPlan,
        multiple: tuple[int, ...],
    ) -> None:
        super().__init__(stages, mean, std, plan.dimensions)
        self.register_buffer("mean", self.mean)  # kept with the weights: nothing else says what they were trained to
        self.register_buffer("std", self.std)
        self.kind, self.taps, self.multiple = kind, frozenset(taps), multiple
        self.window = plan.patch if SEGMENTERS[kind].fixed else None  # the one size it takes; None: any

    def forward(self, images: Tensor, frozen: int = 0) -> Tensor | list[Tensor]:  # type: ignore[override]
        """Give logits.

        Args:
            images: (n, channels, *space), normalised as the plan says.
            frozen: how many stages from the stem on are frozen; they run without gradients.

        Returns:
            (n, outputs, *space); of a head in training mode with deep supervision a list, each coarser than the last.
        """
        images = self.normalise(images)
        x, features = images, []
        for number, stage in enumerate(list(self.stages.values())[:-1]):
            assert isinstance(stage, nn.Sequential)
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= frozen):
                for place, module in enumerate(stage):
                    x = module(x)
                    if (number, place) in self.taps:
                        features.append(x)
        logits: Tensor | list[Tensor] = self.stages[HEAD](images, features)
        return logits


class Whole(nn.Module):
    """A network that is not cut: its encoder is part of the head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, features: list[Tensor]) -> Tensor:
        """Give logits."""
        logits: Tensor = self.network(images)
        return logits


class Decoder(nn.Module):
    """From the coarsest features up, each step with the features of its resolution.

    Args:
        steps: take the coarser and the finer features; coarsest first.
        output: takes the finest.
        coarser: outputs that take what the last steps but one gave, finest first; they learn too.
        detail: makes features of the image itself for the last step, where the encoder's begin coarser.
    """

    def __init__(
        self,
        steps: Sequence[nn.Module],
        output: nn.Module,
        coarser: Sequence[nn.Module],
        detail: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.steps, self.output, self.coarser = nn.ModuleList(steps), output, nn.ModuleList(coarser)
        self.detail = detail

    def forward(self, images: Tensor, features: list[Tensor]) -> Tensor | list[Tensor]:
        """Give logits of full resolution; in training those of ``coarser`` behind them."""
        finer = [self.detail(images), *features] if self.detail is not None else features
        x, passed = finer[-1], []
        for step, skip in zip(self.steps, finer[-2::-1], strict=True):
            x = step(x, skip)
            passed.append(x)
        logits: Tensor = self.output(x)
        if not (self.training and len(self.coarser)):
            return logits
        return [logits, *(head(x) for head, x in zip(self.coarser, passed[-2::-1], strict=False))]


class UpStep(nn.Module):
    """Bring features to the size of finer ones, join them, and convolve twice.

    The nearest value is taken: interpolation has no deterministic gradient on a GPU.
    """

    def __init__(self, dimensions: int, coarse: int, skip: int, width: int, norm: str) -> None:
        super().__init__()
        self.block = twice(dimensions, coarse + skip, width, norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Give features of the size of ``skip``."""
        x = nn.functional.interpolate(x, size=skip.shape[2:], mode="nearest")
        found: Tensor = self.block(torch.cat([x, skip.to(x.dtype)], 1))
        return found


def twice(dimensions: int, channels: int, width: int, norm: str) -> nn.Sequential:
    """Make two convolutions, each with its norm and a ReLU."""
    conv, normed = _LAYERS[dimensions, norm]
    layers: list[nn.Module] = []
    for taken in (channels, width):
        layers += [conv(taken, width, 3, padding=1, bias=False), normed(width, affine=True), nn.ReLU()]
    return nn.Sequential(*layers)


_LAYERS: Mapping[tuple[int, str], tuple[type, type]] = {
    (2, "instance"): (nn.Conv2d, nn.InstanceNorm2d),
    (3, "instance"): (nn.Conv3d, nn.InstanceNorm3d),
    (2, "batch"): (nn.Conv2d, nn.BatchNorm2d),
    (3, "batch"): (nn.Conv3d, nn.BatchNorm3d),
}


def choose(model: ModelConfig) -> str:
    """Name the network: the wanted one, else an encoder where weights are wanted, and DynUNet from nothing."""
    if model.segmenter.network != "auto":
        return model.segmenter.network
    return "dynunet" if model.origin == "none" else "encoder_unet"


def least_multiple(model: ModelConfig) -> int:
    """Tell what the sides of a plan's patches have to be multiples of, before there is a plan.

    Raises:
        ConfigError: the backbone has no features in space.
    """
    kind = choose(model)
    if kind != "encoder_unet":
        return SEGMENTERS[kind].least
    size = max(backbone(model.backbone).min_size, 64)
    trunk = _open_trunk(model.backbone, source_network(model.backbone, size), 1)
    _, _, sizes = _find_taps(trunk, size)
    return _multiple(size, sizes)


def build(
    plan: GridPlan, model: ModelConfig, seed: int, weights: WeightsFile | None
) -> tuple[SegmenterNetwork, LoadReport]:
    """Build the network of a plan, with weights if there are any; what has none is drawn from the seed.

    Weights are those of a backbone (``encoder_unet``), or of a network of this kind that medtl trained.

    Raises:
        ConfigError: the network does not take the plan's patches, or the backbone has no features in space.
        WeightsError: too little of the weights fits, or they are of another network.
    """
    torch.manual_seed(seed)
    kind = choose(model)
    if weights is not None and weights.network in SEGMENTERS and weights.network != kind:
        raise WeightsError(
            f"The weights '{weights.source}' are of a '{weights.network}', and this network is '{kind}'. Set "
            f"model.segmenter.network to {weights.network}."
        )
    if kind == "encoder_unet":
        network, report = _encoder_unet(plan, model, weights)
    else:
        network, report = _from_monai(kind, plan, model, weights)
    _refuse_size(kind, plan.patch, network.multiple)
    keep_channels_last(network)
    return network, report


def _from_monai(
    kind: str, plan: GridPlan, model: ModelConfig, weights: WeightsFile | None
) -> tuple[SegmenterNetwork, LoadReport]:
    row, settings = SEGMENTERS[kind], model.segmenter
    assert row.build is not None and row.multiple is not None
    if row.fixed:  # said before MONAI says it in its own words
        _refuse_size(kind, plan.patch, row.multiple(plan))
    built = row.build(plan, settings.norm, settings.dropout)
    stages: dict[str, nn.Module] = {HEAD: Whole(built)}
    taps: list[Tap] = []
    if kind == "dynunet":
        stages, taps = _cut_dynunet(built, plan, settings)
    none, one = (0.0,) * plan.channels, (1.0,) * plan.channels
    network = SegmenterNetwork(kind, stages, taps, none, one, plan, row.multiple(plan))
    return network, _load_own(network, weights, model.min_share)


def _cut_dynunet(built: Any, plan: GridPlan, settings: SegmenterConfig) -> tuple[dict[str, nn.Module], list[Tap]]:
    """Cut MONAI's DynUNet at its levels: the same numbers; coarser outputs are judged as coarse as they are."""
    from monai.networks.blocks.dynunet_block import UnetOutBlock

    downs = [built.input_block, *built.downsamples, built.bottleneck]
    names = ["stem", *(f"level{n + 1}" for n in range(1, len(downs)))]
    stages: dict[str, nn.Module] = {name: nn.Sequential(down) for name, down in zip(names, downs, strict=True)}
    count = min(_COARSER, len(downs) - 2) if settings.deep_supervision else 0
    coarser = [UnetOutBlock(plan.dimensions, plan.filters[level], plan.outputs) for level in range(1, count + 1)]
    for output in coarser:
        output.apply(built.initialize_weights)
    stages[HEAD] = Decoder(list(built.upsamples), built.output_block, coarser)
    return stages, [(number, 0) for number in range(len(downs))]


def _encoder_unet(
    plan: GridPlan, model: ModelConfig, weights: WeightsFile | None
) -> tuple[SegmenterNetwork, LoadReport]:
    """Put a U-Net's decoder on a backbone, whose stages keep their names."""
    name, row = model.backbone, backbone(model.backbone)
    if row.dimensions != plan.dimensions:
        raise ConfigError(
            f"'{name}' takes {row.dimensions} dimensions and the plan's patches have {plan.dimensions}. Set "
            f"model.backbone to one of {plan.dimensions} (`medtl backbones`), dataset.grid.dimensions to "
            f"{row.dimensions}, or model.weights to none for a network without a backbone."
        )
    size = max(row.min_size, 64)
    source = source_network(name, size)
    report = LoadReport("none", None, 0, (), (), 0.0)
    state: Mapping[str, Tensor] | None = None
    if weights is not None:
        report = replace(report, source=weights.source, sha256=weights.sha256)
        report = replace(report, licence=weights.licence, citation=weights.citation)
        state = read_weights(weights.path)
    ours = state is not None and any(key.startswith(OURS) for key in state)
    if state is not None and not ours:
        report = load_source(source, name, state, size, report, model.min_share)
    trunk = _open_trunk(name, source, plan.channels)
    taps, widths, sizes = _find_taps(trunk, size)
    stages: dict[str, nn.Module] = {key: stage for key, stage in trunk.stages.items() if key != HEAD}
    stages[HEAD] = _make_decoder(plan, model.segmenter, widths, sees_image=sizes[0] < size)
    mean, std = (0.0,) * plan.channels, (1.0,) * plan.channels
    if plan.intensity == "unit":  # the pictures of 0 to 1 that a backbone knows; other plans have mean 0, deviation 1
        mean, std = tuple(trunk.mean.flatten().tolist()), tuple(trunk.std.flatten().tolist())
        seen = normalisation(weights.contract, plan.channels) if weights is not None else None
        mean, std = seen or (mean, std)
    multiple = (_multiple(size, sizes),) * plan.dimensions
    network = SegmenterNetwork("encoder_unet", stages, taps, mean, std, plan, multiple)
    if state is not None and ours:
        report = load_staged(network, name, state, report, model.min_share)
    return network, report


def _open_trunk(name: str, source: nn.Module, channels: int) -> StagedNetwork:
    """Cut a backbone into stages that hand on features in space to the end."""
    if backbone(name).builder.startswith(_NOT_CONVOLUTIONS):
        raise ConfigError(f"'{name}' hands on no features in space. Set model.backbone to a ResNet or a DenseNet.")
    trunk = cut(source, name, channels, 1, 0.0)
    _open_end(trunk)
    _align(name, trunk)
    return trunk


def _align(name: str, trunk: StagedNetwork) -> None:
    """Pad what takes an edge off, so that features lie over their own pixels at every size of the image.

    SqueezeNet does not pad: its features, stretched over the image, would lie three pixels off at the edges. Inception
    stays as it is, since its pools are not modules; MONAI's EfficientNet pads by modules of its own.
    """
    modules = list(trunk.modules())
    if name.startswith("inception") or any(isinstance(one, nn.ConstantPad2d | nn.ConstantPad3d) for one in modules):
        return
    for module in modules:
        if isinstance(module, nn.Conv2d | nn.Conv3d) and not isinstance(module.padding, str):
            axes = zip(module.kernel_size, module.stride, module.dilation, module.padding, strict=True)
            module.padding = tuple(p if k <= s else max(p, d * (k - 1) // 2) for k, s, d, p in axes)
        elif isinstance(module, nn.MaxPool2d | nn.MaxPool3d):
            assert isinstance(module.kernel_size, int)
            module.padding, module.ceil_mode = (module.kernel_size - 1) // 2, False


def _multiple(size: int, sizes: Sequence[int]) -> int:
    """Give the power of two by which a trunk makes an image smaller."""
    return int(2 ** round(math.log2(size / sizes[-1])))


def _open_end(trunk: StagedNetwork) -> None:
    """Take what ends in one vector off a trunk; what is left keeps its names."""
    flat = (Pool, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten)
    for name, stage in list(trunk.stages.items()):
        assert isinstance(stage, nn.Sequential)
        if any(isinstance(module, nn.Linear) for module in stage) and name != HEAD:
            del trunk.stages[name]
            continue
        for place, module in enumerate(stage):
            if isinstance(module, flat):
                stage[place] = nn.Identity()


def _find_taps(trunk: StagedNetwork, size: int) -> tuple[list[Tap], list[int], list[int]]:
    """Find the last features of each resolution: their places, their channels and their size, finest first."""
    taps: list[Tap] = []
    widths: list[int] = []
    sizes: list[int] = []
    trunk.eval()
    with torch.no_grad():
        x = trunk.mean.new_zeros((1, trunk.mean.shape[1], *(size,) * trunk.dimensions))
        for number, (name, stage) in enumerate(trunk.stages.items()):
            if name == HEAD:
                break
            assert isinstance(stage, nn.Sequential)
            for place, module in enumerate(stage):
                x = module(x)
                if x.shape[2] > (sizes[-1] if sizes else size):
                    continue  # the edge that a convolution will take off again
                if sizes and sizes[-1] == x.shape[2]:
                    taps[-1], widths[-1] = (number, place), x.shape[1]
                else:
                    taps.append((number, place))
                    widths.append(x.shape[1])
                    sizes.append(x.shape[2])
    trunk.train()
    return taps, widths, sizes


def _make_decoder(plan: GridPlan, settings: SegmenterConfig, widths: Sequence[int], sees_image: bool) -> Decoder:
    fine = max(8, plan.filters[0] // 2)
    skips = [fine, *widths] if sees_image else list(widths)
    wide = [min(fine * 2**level, _WIDEST) for level in range(len(skips) - 1)]
    steps, coarse = [], skips[-1]
    for level in reversed(range(len(wide))):
        steps.append(UpStep(plan.dimensions, coarse, skips[level], wide[level], settings.norm))
        coarse = wide[level]
    conv = _LAYERS[plan.dimensions, settings.norm][0]
    count = min(_COARSER, len(wide) - 1) if settings.deep_supervision else 0
    coarser = [conv(wide[level], plan.outputs, 1) for level in range(1, count + 1)]
    detail = twice(plan.dimensions, plan.channels, fine, settings.norm) if sees_image else None
    return Decoder(steps, conv(wide[0], plan.outputs, 1), coarser, detail)


def _load_own(network: SegmenterNetwork, weights: WeightsFile | None, min_share: float) -> LoadReport:
    """Load what medtl wrote of a network of this kind: all but the outputs, which may be of other structures.

    Raises:
        WeightsError: less than ``min_share`` of the parameters arrived.
    """
    if weights is None:
        return LoadReport("none", None, 0, (), (), 0.0)
    state, own = read_weights(weights.path), network.state_dict()
    loaded = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    share = sum(value.numel() for value in loaded.values()) / max(1, sum(value.numel() for value in own.values()))
    if share < min_share:
        raise WeightsError(
            f"Only {share:.1%} of the parameters of '{network.kind}' are in the weights '{weights.source}'. Give "
            "weights of this network that medtl wrote, set model.segmenter.network to encoder_unet for those of a "
            "backbone, or model.weights to none."
        )
    network.load_state_dict(loaded, strict=False)  # what is missing is said below
    missing = tuple(key for key in own if key not in loaded)
    strange = tuple(key for key in state if key not in loaded)
    names = (weights.source, weights.sha256, len(loaded), missing, strange, share)
    return LoadReport(*names, weights.licence, weights.citation, layout="medtl")


def _refuse_size(kind: str, patch: tuple[int, ...], multiple: tuple[int, ...]) -> None:
    if all(side % step == 0 for side, step in zip(patch, multiple, strict=True)):
        return
    nearest = [max(step, round(side / step) * step) for side, step in zip(patch, multiple, strict=True)]
    raise ConfigError(
        f"'{kind}' takes patches whose sides are multiples of {list(multiple)}, not {list(patch)}. Set "
        f"dataset.grid.patch to {nearest}."
    )
