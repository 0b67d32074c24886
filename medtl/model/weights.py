"""Did the weights arrive? Names are adapted, shapes compared, and what loaded is counted in parameters. Pure.

Never ``strict=False`` without looking: a set of weights of which less than ``model.min_share`` of the trunk's
parameters arrive is refused, because a network that starts from noise looks just like one that does not.

One architecture goes under many names. :data:`LAYOUTS` is the table of the ways libraries name the same tensors. An
adapter renames, reshapes what a library keeps flat, and scales a normalisation where two libraries add another epsilon;
it never invents a value. Which adapter was right is not guessed from the file's name: :func:`adapt` tries them and
takes the one under which most parameters fit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medtl.errors import WeightsError
from medtl.model.backbones import backbone
from medtl.model.surgery import HEAD, StagedNetwork, inflate, interpolate_positions, trunk_keys
from medtl.records import LoadReport

OURS = "stages."
Shape = tuple[int, ...]
Adapter = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Rules = tuple[tuple[str, str], ...]

# What training code wraps a network into: DDP, torch.compile, Lightning modules, MoCo, DINO, segmentation encoders.
WRAPPERS = (
    "module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.", "encoder_q.", "base_encoder.",
    "feature_extractor.", "trunk.", "resnet.", "student.", "teacher.",
)  # fmt: skip
_DEEPEST = 4  # wrappers in one another
# Where checkpoints keep the state dict among epochs, optimisers and settings; the first that is there is taken.
_PLACES = (
    "state_dict", "model_state_dict", "model_state", "model", "network", "net", "teacher", "student", "encoder",
    "module", "weights", "params",
)  # fmt: skip


# ── reading a checkpoint ────────────────────────────────────────────────────────────────────────────────────────────


def state_in(loaded: Any) -> dict[str, Tensor]:
    """Find the state dict in what a checkpoint file holds.

    Args:
        loaded: a mapping of names to tensors, or one that holds such a mapping, two levels down at most.

    Raises:
        WeightsError: there is none.
    """
    for candidate in _mappings(loaded, depth=2):
        tensors = {key: value for key, value in candidate.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise WeightsError("it holds no state dict (names to tensors).")


def stored_form(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into contiguous memory of their own, sorted: safetensors then writes the same bytes every time."""
    return {key: state[key].detach().cpu().contiguous().clone() for key in sorted(state)}


def _mappings(loaded: Any, depth: int) -> Iterator[Mapping[Any, Any]]:
    if not isinstance(loaded, Mapping):
        return
    inner = [loaded[place] for place in _PLACES if isinstance(loaded.get(place), Mapping)]
    if depth and inner:
        for one in inner:
            yield from _mappings(one, depth - 1)
    yield loaded


@dataclass(frozen=True, slots=True)
class InputContract:
    """What weights were trained to see; ``None`` where nobody said.

    ``mean`` and ``std`` are in the order of the channels and in the units of ``value_range``.
    """

    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, ...] | None = None  # rows, columns (or slices, rows, columns)
    value_range: tuple[float, float] = (0.0, 1.0)
    colour_order: str = "RGB"  # or BGR, or grey

    def __post_init__(self) -> None:
        low, high = self.value_range
        if not low < high:
            raise WeightsError(f"A value range goes up, not from {low:g} to {high:g}.")
        if self.colour_order not in ("RGB", "BGR", "grey"):
            raise WeightsError(f"A colour order is RGB, BGR or grey, not '{self.colour_order}'.")
        if (self.mean is None) != (self.std is None):
            raise WeightsError("An input contract has both mean and std, or neither.")
        if self.mean is not None and self.std is not None:
            counts = {len(self.mean), len(self.std)} | ({self.channels} if self.channels else set())
            if len(counts) != 1 or min(self.std) <= 0:
                raise WeightsError("Mean and std have one value per channel, and a std is above 0.")


def to_house_input(
    state: Mapping[str, Tensor], contract: InputContract
) -> tuple[dict[str, Tensor], InputContract, str | None]:
    """Turn weights for any input into weights for the house's: values from 0 to 1, colours in RGB order.

    Mean and deviation are scaled to the range from 0 to 1, which is exact; weights for BGR get the input channels of
    their first convolution reversed.

    Returns:
        Weights, their contract, and what was done to them, if anything.

    Raises:
        WeightsError: BGR, and which convolution comes first cannot be told.
    """
    low, high = contract.value_range
    changed, notes, mean, std = dict(state), [], contract.mean, contract.std
    if (low, high) != (0.0, 1.0) and mean is not None and std is not None:
        mean = tuple((value - low) / (high - low) for value in mean)
        std = tuple(value / (high - low) for value in std)
        notes.append(f"values {low:g} to {high:g} scaled to 0 to 1")
    if contract.colour_order == "BGR":
        stems = [key for key, value in state.items() if value.ndim in (4, 5) and value.shape[1] == 3]
        if len(stems) != 1:
            raise WeightsError(f"{len(stems)} convolutions take three channels: which one sees BGR cannot be told.")
        changed[stems[0]] = state[stems[0]].flip(1)
        mean, std = mean and mean[::-1], std and std[::-1]
        notes.append("BGR turned to RGB")
    order = "grey" if contract.colour_order == "grey" else "RGB"
    known = replace(contract, mean=mean, std=std, value_range=(0.0, 1.0), colour_order=order)
    return changed, known, ", ".join(notes) or None


def normalisation(contract: InputContract | None, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Give mean and deviation for values from 0 to 1 and so many channels; ``None`` where the contract says nothing.

    Another number of channels than the contract's gets the mean over its channels, as a stem that is fitted to them.
    """
    if contract is None or contract.mean is None or contract.std is None:
        return None
    if len(contract.mean) == channels:
        return contract.mean, contract.std
    count = len(contract.mean)
    return (sum(contract.mean) / count,) * channels, (sum(contract.std) / count,) * channels


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Rename every key by the first rule whose pattern matches its beginning; the others keep their names."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    result = {}
    for key, value in state.items():
        rule = next(((pattern, new) for pattern, new in compiled if pattern.match(key)), None)
        result[rule[0].sub(rule[1], key, count=1) if rule else key] = value
    return result


def moved(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename the tensors of the modules in the table; the others keep their names."""
    result = {}
    for key, value in state.items():
        module, dot, name = key.rpartition(".")
        result[f"{table.get(module, module)}{dot}{name}"] = value
    return result


_OLD_DENSENET: Rules = ((r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12])(?=\.)", r"\1\2"),)
_TO_MONAI_DENSENET: Rules = (
    (r"^(features\.denseblock\d+\.denselayer\d+)\.(norm|conv)\.?([12])\.", r"\1.layers.\2\3."),
    (r"^classifier\.", "class_layers.out."),
)
_FROM_MONAI_DENSENET: Rules = (
    (r"^(features\.denseblock\d+\.denselayer\d+)\.layers\.", r"\1."),
    (r"^class_layers\.out\.", "classifier."),
)
_TIMM_VIT: Rules = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.encoder_layer_\1.ln_\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
)
_CHILDREN: Mapping[str, tuple[str, ...]] = {  # nn.Sequential(*network.children()): what each number is
    "resnet": ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"),
    "densenet": ("features", "classifier"),
    "inception": (
        "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2",
        "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a",
        "Mixed_7b", "Mixed_7c", "avgpool", "dropout", "fc",
    ),
}  # fmt: skip
_AUX_AT = 15  # an Inception that was built with its auxiliary classifier has it here, and everything later one on


def _numbered(children: Sequence[str]) -> Rules:
    return tuple((rf"^{number}\.", f"{name}.") for number, name in enumerate(children))


def _old_densenet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``denselayer1.norm.1`` is ``denselayer1.norm1``: torchvision's published files kept the dots of 2017."""
    return renamed(state, _OLD_DENSENET)


def _timm_convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Count the steps between stages as torchvision does; timm's names, or those of the authors' own code."""
    rules: list[tuple[str, str]] = [
        (r"^stem\.", "features.0."),
        (r"^downsample_layers\.0\.", "features.0."),
        (r"^head\.norm\.", "classifier.0."),
        (r"^norm\.", "classifier.0."),
        (r"^head\.fc\.", "classifier.2."),
        (r"^head\.", "classifier.2."),
    ]
    parts = {r"conv_dw": "block.0", r"dwconv": "block.0", r"norm": "block.2", r"mlp\.fc1": "block.3"}
    parts |= {r"pwconv1": "block.3", r"mlp\.fc2": "block.5", r"pwconv2": "block.5"}
    for stage in range(4):
        rules += [(rf"^stages\.{stage}\.downsample\.", f"features.{2 * stage}.")]
        rules += [(rf"^downsample_layers\.{stage}\.", f"features.{2 * stage}.")]
        for part, ours in parts.items():
            rules += [(rf"^stages\.{stage}\.(?:blocks\.)?(\d+)\.{part}\.", rf"features.{2 * stage + 1}.\1.{ours}.")]
        rules += [(rf"^stages\.{stage}\.(?:blocks\.)?(\d+)\.gamma$", rf"features.{2 * stage + 1}.\1.layer_scale")]
    names = renamed(state, tuple(rules))
    return {
        key: value.reshape(-1, 1, 1) if key.endswith(".layer_scale") and value.ndim == 1 else value
        for key, value in names.items()
    }


def _timm_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move patch merging from the beginning of a stage (its end, before timm 0.9) to where torchvision has it."""
    rules: list[tuple[str, str]] = [
        (r"^patch_embed\.proj\.", "features.0.0."),
        (r"^patch_embed\.norm\.", "features.0.2."),
        (r"^head\.(?:fc\.)?", "head."),
    ]
    new = "layers.0.downsample.reduction.weight" not in state
    for stage in range(4):
        merging, blocks = 2 * stage + (0 if new else 2), rf"^layers\.{stage}\.blocks\.(\d+)\."
        rules += [(rf"^layers\.{stage}\.downsample\.", f"features.{merging}.")]
        rules += [(rf"{blocks}mlp\.fc1\.", rf"features.{2 * stage + 1}.\1.mlp.0.")]
        rules += [(rf"{blocks}mlp\.fc2\.", rf"features.{2 * stage + 1}.\1.mlp.3.")]
        rules += [(blocks, rf"features.{2 * stage + 1}.\1.")]
    return renamed(state, tuple(rules))


_REGNET_BLOCK: Mapping[str, str] = {
    "conv1.conv": "f.a.0", "conv1.bn": "f.a.1", "conv2.conv": "f.b.0", "conv2.bn": "f.b.1", "conv3.conv": "f.c.0",
    "conv3.bn": "f.c.1", "se.fc1": "f.se.fc1", "se.fc2": "f.se.fc2", "downsample.conv": "proj.0",
    "downsample.bn": "proj.1",
}  # fmt: skip


def _timm_regnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Count blocks from 0 within a stage."""
    table = {"stem.conv": "stem.0", "stem.bn": "stem.1", "head.fc": "fc"}
    for key in state:
        path = key.rpartition(".")[0]
        match = re.match(r"^s(\d+)\.b(\d+)\.(.+)$", path)
        if match and match[3] in _REGNET_BLOCK:
            block = f"trunk_output.block{match[1]}.block{match[1]}-{int(match[2]) - 1}"
            table[path] = f"{block}.{_REGNET_BLOCK[match[3]]}"
    return moved(state, table)


# A block of EfficientNet or MobileNetV3 in timm, in the order of computation: convolution, its normalisation.
# torchvision counts what is there: expansion, depthwise convolution, squeeze-and-excitation, projection.
_BLOCKS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("se", ""), ("conv_pwl", "bn3")),  # inverted residual
    (("conv_dw", "bn1"), ("se", ""), ("conv_pw", "bn2")),  # the same without expansion
    (("conv_exp", "bn1"), ("se", ""), ("conv_pwl", "bn2")),  # expansion and depthwise in one
    (("conv", "bn1"),),  # one convolution
)


def _timm_blocks(state: Mapping[str, Tensor], place: Callable[[int, int], str], bare: bool) -> dict[str, str]:
    """Say where the modules of ``blocks.S.B`` are in torchvision.

    Args:
        state: names to tensors, as timm has them.
        place: gives the name of a block.
        bare: a block that is one convolution has no list of parts.
    """
    table: dict[str, str] = {}
    for (stage, number), parts in _block_parts(state).items():
        theirs, ours = f"blocks.{stage}.{number}", place(stage, number)
        kind = next((k for k in _BLOCKS if {conv for conv, _ in k} - {"se"} == parts - {"se"}), ())
        for index, (conv, norm) in enumerate([part for part in kind if part[0] in parts]):
            where = ours if bare and len(kind) == 1 else f"{ours}.block.{index}"
            if conv == "se":
                table |= {f"{theirs}.se.conv_reduce": f"{where}.fc1", f"{theirs}.se.conv_expand": f"{where}.fc2"}
            else:
                table |= {f"{theirs}.{conv}": f"{where}.0", f"{theirs}.{norm}": f"{where}.1"}
    return table


def _block_parts(state: Mapping[str, Tensor]) -> dict[tuple[int, int], set[str]]:
    """Tell which parts each block has."""
    found: dict[tuple[int, int], set[str]] = defaultdict(set)
    for key in state:
        match = re.match(r"^blocks\.(\d+)\.(\d+)\.(conv_pwl|conv_pw|conv_dw|conv_exp|conv|se)\.", key)
        if match:
            found[int(match[1]), int(match[2])].add(match[3])
    return dict(sorted(found.items()))


def _timm_efficientnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Count EfficientNet (V1 and V2) as torchvision does: the stem, the stages, the last convolution."""
    last = 2 + max((stage for stage, _ in _block_parts(state)), default=-1)
    table = _timm_blocks(state, lambda stage, number: f"features.{stage + 1}.{number}", bare=False)
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": f"features.{last}.0"}
    names = moved(state, {**table, **ends, "bn2": f"features.{last}.1", "classifier": "classifier.1"})
    deep = "blocks.0.2.conv_pw.weight" in state  # B5 and larger
    second = any(re.match(r"^blocks\.\d+\.\d+\.conv_exp\.", key) for key in state)  # V2
    return _for_torchvision_epsilon(names) if deep or second else names


def _timm_mobilenetv3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Count the blocks through; timm's last convolution is the first linear layer of torchvision's classifier."""
    blocks = {block: index for index, block in enumerate(_block_parts(state), start=1)}
    table = _timm_blocks(state, lambda stage, number: f"features.{blocks[stage, number]}", bare=True)
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "classifier.0"}
    names = moved(state, {**table, **ends, "classifier": "classifier.3"})
    key = "classifier.0.weight"
    if "conv_head.weight" in state and names[key].ndim == 4:
        names[key] = names[key].flatten(1)
    return _for_torchvision_epsilon(names)


def _for_torchvision_epsilon(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scale normalisations trained with an epsilon of 1e-5 for torchvision's 1e-3; exact in evaluation mode."""
    scaled = dict(state)
    for key, variance in state.items():
        weight = key.removesuffix("running_var") + "weight"
        if key.endswith(".running_var") and weight in state:
            scaled[weight] = state[weight] * ((variance + 1e-3) / (variance + 1e-5)).sqrt()
    return scaled


def _timm_vgg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the convolutions of timm's classifier into linear layers."""
    table = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
    names = moved(state, table)
    linear = ("classifier.0.weight", "classifier.3.weight")
    return {key: value.flatten(1) if key in linear and value.ndim == 4 else value for key, value in names.items()}


LAYOUTS: Mapping[str, Adapter] = {
    "native": dict,
    "torchvision, old DenseNet": _old_densenet,
    "timm ViT": partial(renamed, rules=_TIMM_VIT),
    "timm ConvNeXt": _timm_convnext,
    "timm EfficientNet": _timm_efficientnet,
    "timm MobileNetV3": _timm_mobilenetv3,
    "timm Swin": _timm_swin,
    "timm RegNet": _timm_regnet,
    "timm VGG": _timm_vgg,
    "RadImageNet ResNet": partial(renamed, rules=_numbered(_CHILDREN["resnet"])),
    "RadImageNet DenseNet": partial(renamed, rules=_numbered(_CHILDREN["densenet"])),
    "RadImageNet Inception": partial(renamed, rules=_numbered(_CHILDREN["inception"])),
    "RadImageNet Inception, auxiliary": partial(
        renamed,
        rules=_numbered((*_CHILDREN["inception"][:_AUX_AT], "AuxLogits", *_CHILDREN["inception"][_AUX_AT:])),
    ),
    "torchvision DenseNet to MONAI": partial(renamed, rules=_TO_MONAI_DENSENET),
    "MONAI DenseNet to torchvision": partial(renamed, rules=_FROM_MONAI_DENSENET),
}


def adapt(state: Mapping[str, Tensor], wanted: Mapping[str, Shape]) -> tuple[dict[str, Tensor], str]:
    """Give weights the names that are wanted, whoever named them.

    Every adapter of :data:`LAYOUTS` is tried on the names as they are and without their wrappers (:data:`WRAPPERS`);
    the one under which the largest share of parameters fits wins, and the first of equals.

    Args:
        state: names to tensors; what is not part of the network stays under its own name.
        wanted: names to shapes.

    Returns:
        The renamed weights and the layout's name, with the wrapper that was taken off.
    """
    best: tuple[int, dict[str, Tensor], str] | None = None
    for prefix in _wrappers(state):
        for layout, adapter in LAYOUTS.items():
            inside = adapter({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
            fitting = _fitting(inside, wanted)
            if best is None or fitting > best[0]:
                best = fitting, {**outside, **inside}, layout + (f", without '{prefix}'" if prefix else "")
    assert best is not None  # the empty prefix and the native layout are always tried
    return best[1], best[2]


def _wrappers(state: Mapping[str, Tensor]) -> list[str]:
    """List the chains of wrappers that occur, the shortest first."""
    found, newest = [""], [""]
    for _ in range(_DEEPEST):
        tried = [prefix + wrapper for prefix in newest for wrapper in WRAPPERS]
        newest = [prefix for prefix in tried if any(key.startswith(prefix) for key in state)]
        found += newest
    return found


def _fitting(state: Mapping[str, Tensor], wanted: Mapping[str, Shape]) -> int:
    """Count the wanted parameters that are there, in a shape that fits or can be made to."""
    names = (key for key, shape in wanted.items() if key in state and _can_fit(key, tuple(state[key].shape), shape))
    return sum(torch.Size(wanted[key]).numel() for key in names)


def _can_fit(key: str, given: Shape, shape: Shape) -> bool:
    if given == shape:
        return True
    if "pos_embed" in key:
        return len(given) == len(shape) == 3 and given[2] == shape[2]
    flat = shape[:2] + shape[3:] if len(shape) == 5 and len(given) == 4 else shape
    return len(flat) == len(given) >= 4 and flat[0] == given[0] and flat[2:] == given[2:] and _is_stem(given, flat)


def _is_stem(given: Shape, shape: Shape) -> bool:
    return given[1] == shape[1] or (given[1] in (1, 3) and shape[1] <= 3)


def fit_channels(value: Tensor, channels: int) -> Tensor:
    """Give a first convolution another number of input channels, so that equal channels give the same output.

    The filters are summed and shared out: exact from three equal channels to one, and back.
    """
    if value.shape[1] == channels:
        return value
    return value.sum(1, keepdim=True).repeat_interleave(channels, 1) / channels


def _fit_shapes(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit input channels and, for a network of volumes, the depth of kernels."""
    fitted = dict(state)
    for key, value in state.items():
        given, shape = tuple(value.shape), tuple(like[key].shape) if key in like else ()
        if value.ndim in (4, 5) and given != shape and _can_fit(key, given, shape):
            fitted[key] = fit_channels(value, shape[1])
    deeper = any(key in fitted and fitted[key].ndim == 4 and value.ndim == 5 for key, value in like.items())
    return inflate(fitted, like) if deeper else fitted


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_source(
    source: nn.Module, name: str, state: Mapping[str, Tensor], size: int, report: LoadReport, min_share: float
) -> LoadReport:
    """Load weights in any library's names into the source network's trunk.

    Args:
        source: network in its library's form, before it is cut.
        name: backbone.
        state: names to tensors.
        size: rows of the input (positions of a vision transformer are resized to it).
        report: says where the weights come from; its counts are filled in.
        min_share: least share of the trunk's parameters.

    Raises:
        WeightsError: less than ``min_share`` arrived.
    """
    own, wanted = source.state_dict(), trunk_keys(source, name)
    adapted, layout = adapt(state, {key: tuple(own[key].shape) for key in wanted})
    given = _fit_shapes(interpolate_positions(adapted, size), own)
    return _load(source, given, _stages_of(wanted, name), replace(report, layout=layout), min_share, name)


def load_staged(
    network: StagedNetwork, name: str, state: Mapping[str, Tensor], report: LoadReport, min_share: float
) -> LoadReport:
    """Load weights that medtl wrote (names begin with ``stages.``) into every stage but the head.

    Raises:
        WeightsError: less than ``min_share`` arrived.
    """
    own, head = network.state_dict(), f"{OURS}{HEAD}."
    wanted = {
        key: key.split(".")[1]
        for key in own
        if key.startswith(OURS) and not key.startswith(head) and not key.endswith("num_batches_tracked")
    }
    given = _fit_shapes({key: value for key, value in state.items() if not key.startswith(head)}, own)
    return _load(network, given, wanted, replace(report, layout="medtl"), min_share, name)


def _stages_of(keys: Sequence[str], name: str) -> dict[str, str]:
    """Tell the stage of every key of a source network; a transformer's stem is spread over it."""
    stages = backbone(name).stages
    paths = [(stage, f"{path}.") for stage, inside in stages for path in inside if not path.startswith("<")]
    return {key: next((stage for stage, path in paths if f"{key}.".startswith(path)), stages[0][0]) for key in keys}


def _load(
    module: nn.Module,
    given: Mapping[str, Tensor],
    stage_of: Mapping[str, str],
    report: LoadReport,
    min_share: float,
    name: str,
) -> LoadReport:
    own, wanted = module.state_dict(), tuple(stage_of)
    fitting = {key: given[key] for key in wanted if key in given and given[key].shape == own[key].shape}
    missing = tuple(key for key in wanted if key not in fitting)
    shares = stage_shares({key: own[key].numel() for key in wanted}, fitting.keys(), stage_of)
    total = sum(own[key].numel() for key in wanted)
    share = sum(value.numel() for value in fitting.values()) / max(total, 1)
    if share < min_share:
        example = missing[0] if missing else "-"
        stages = ", ".join(f"{stage} {part:.0%}" for stage, part in shares.items())
        raise WeightsError(
            f"Only {share:.1%} of the parameters of '{name}' are in the weights '{report.source}' ({len(missing)} of "
            f"{len(wanted)} tensors missing or of another shape, first '{example}'; {stages}; names read as: "
            f"{report.layout}): they belong to another architecture. "
            "Give weights of this backbone, or another model.backbone; model.min_share sets the limit."
        )
    own.update(fitting)  # in place: the state carries a version that some networks ask for
    module.load_state_dict(own)
    unexpected = tuple(sorted(key for key in given if key not in own))
    return replace(
        report,
        loaded=len(fitting),
        missing=missing,
        unexpected=unexpected,
        share=round(share, 6),
        shares={stage: round(part, 6) for stage, part in shares.items()},
    )


def stage_shares(sizes: Mapping[str, int], arrived: Collection[str], stage_of: Mapping[str, str]) -> dict[str, float]:
    """Give the share of each stage's parameters that arrived, 0 to 1, in the order of the stages."""
    total: dict[str, int] = defaultdict(int)
    there: dict[str, int] = defaultdict(int)
    for key, size in sizes.items():
        total[stage_of[key]] += size
        there[stage_of[key]] += size if key in arrived else 0
    return {stage: there[stage] / max(count, 1) for stage, count in total.items()}
