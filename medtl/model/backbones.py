"""The backbones, as a table you can read.

A row names the ordered stages of a network from stem to head, the input it was trained on, and where its ImageNet
weights come from. A stage is a list of module paths in the source network, applied one after the other; a word in angle
brackets is an operation without a path (:data:`medtl.model.surgery.OPERATIONS`). The head is always new: the source
network's own classifier is not part of any stage, and neither is what belongs to it alone (SqueezeNet's last ReLU,
which would cut a new head's negative logits off). One contract test runs over every row.

The weights are those that torchvision calls ``DEFAULT``. ``sha256`` is the full digest where it is known to us, else
the first digits, which torchvision publishes in the file's name; a download is checked against all digits that are
here. A row of three dimensions either takes MedicalNet's checkpoints as they are, or names the flat row whose weights
are inflated into it, or starts from nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from medtl.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # mean and deviation of networks trained on -1 to 1
GREY_MEAN, GREY_STD = (0.5,), (0.289,)  # of a value spread evenly over 0 to 1: nearest to MedicalNet's z-scores
Stages = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where ImageNet weights are published. ``file`` is relative to torchvision's download host."""

    file: str
    sha256: str
    licence: str = (
        "BSD-3-Clause (torchvision); trained on ImageNet-1k, whose terms restrict commercial use of the images"
    )


@dataclass(frozen=True, slots=True)
class Backbone:
    """One row: how a network is built, cut into stages and fed. It is built for as many channels as ``mean`` has."""

    library: str  # torchvision or monai
    builder: str
    stages: Stages
    features: int  # width of what enters the head
    citation: str
    min_size: int = 32  # rows, columns (and slices) of the input
    multiple: int = 1  # sizes are multiples of it
    dimensions: Literal[2, 3] = 2
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    weights: WeightsSource | None = None
    inflates: str | None = None  # the flat row whose weights these are; the names of both state dicts are the same
    options: Mapping[str, object] = field(default_factory=dict)


def _published(file: str, sha256: str = "") -> WeightsSource:
    """Name a file of torchvision's host; without a digest, by the digits after the last dash of its name."""
    return WeightsSource(file, sha256 or file.rpartition("-")[2].removesuffix(".pth"))


def _torchvision(
    builder: str, stages: Stages, features: int, citation: str, file: str, sha256: str = "", **how: Any
) -> Backbone:
    """Make the row of a network of torchvision with its published weights."""
    return Backbone("torchvision", builder, stages, features, citation, weights=_published(file, sha256), **how)


def _sequence(prefix: str, *groups: tuple[str, range], last: tuple[str, ...] = ("<pool>",)) -> Stages:
    """Cut a numbered sequence of modules into stages; ``last`` closes the last of them."""
    stages = [(name, tuple(f"{prefix}.{i}" for i in numbers)) for name, numbers in groups]
    name, modules = stages[-1]
    return (*stages[:-1], (name, modules + last))


def _vgg(convolutions: tuple[int, ...], each: int) -> Stages:
    """Cut a VGG at its poolings: ``convolutions`` per block, each of ``each`` modules (with BatchNorm 3, else 2)."""
    groups, start = [], 0
    for number, count in enumerate(convolutions, 1):
        groups.append((f"block{number}", range(start, start + each * count + 1)))
        start += each * count + 1
    blocks = _sequence("features", *groups, last=("avgpool", "<flatten>"))
    return (*blocks, ("classifier", tuple(f"classifier.{i}" for i in range(6))))


def _vit(layers: int) -> Stages:
    """Cut a vision transformer's encoder into quarters."""
    paths = tuple(f"encoder.layers.encoder_layer_{i}" for i in range(layers))
    quarter = layers // 4
    blocks = [(f"blocks{n + 1}", paths[n * quarter : (n + 1) * quarter]) for n in range(4)]
    name, modules = blocks[-1]
    return (("stem", ("<vit_stem>",)), *blocks[:-1], (name, (*modules, "encoder.ln", "<class_token>")))


def _monai_resnet(block: str, layers: tuple[int, ...], width: int = 64, **options: Any) -> dict[str, object]:
    """Spell MONAI's ResNet out; the stem is 7 wide with stride 2 unless ``options`` says otherwise."""
    inplanes = [width, 2 * width, 4 * width, 8 * width]
    named = {"block": block, "layers": list(layers), "block_inplanes": inplanes}
    return {**named, "conv1_t_size": 7, "conv1_t_stride": 2, **options}


_RESNET: Stages = (
    ("stem", ("conv1", "bn1", "<relu>", "maxpool")),
    ("layer1", ("layer1",)),
    ("layer2", ("layer2",)),
    ("layer3", ("layer3",)),
    ("layer4", ("layer4", "<pool>")),
)
_SENET: Stages = (("stem", ("layer0",)), *_RESNET[1:])
_DENSENET: Stages = (
    ("stem", ("features.conv0", "features.norm0", "features.relu0", "features.pool0")),
    ("denseblock1", ("features.denseblock1", "features.transition1")),
    ("denseblock2", ("features.denseblock2", "features.transition2")),
    ("denseblock3", ("features.denseblock3", "features.transition3")),
    ("denseblock4", ("features.denseblock4", "features.norm5", "<relu>", "<pool>")),
)
_EFFICIENTNET = _sequence(
    "features",
    ("stem", range(0, 2)),
    ("stage2", range(2, 3)),
    ("stage3", range(3, 4)),
    ("stage4", range(4, 6)),
    ("stage5", range(6, 9)),
)
_EFFICIENTNET_V2_S = _sequence(
    "features",
    ("stem", range(0, 2)),
    ("stage2", range(2, 3)),
    ("stage3", range(3, 4)),
    ("stage4", range(4, 6)),
    ("stage5", range(6, 8)),
)
_MONAI_EFFICIENTNET: Stages = (
    ("stem", ("_conv_stem_padding", "_conv_stem", "_bn0", "_swish", "_blocks.0")),
    ("stage2", ("_blocks.1",)),
    ("stage3", ("_blocks.2",)),
    ("stage4", ("_blocks.3", "_blocks.4")),
    ("stage5", ("_blocks.5", "_blocks.6", "_conv_head_padding", "_conv_head", "_bn1", "_swish", "<pool>")),
)
_MOBILENET_V2 = _sequence(
    "features",
    ("stem", range(0, 2)),
    ("stage2", range(2, 4)),
    ("stage3", range(4, 7)),
    ("stage4", range(7, 14)),
    ("stage5", range(14, 19)),
)
_MOBILENET_V3_SMALL: Stages = (
    *_sequence(
        "features",
        ("stem", range(0, 2)),
        ("stage2", range(2, 4)),
        ("stage3", range(4, 9)),
        ("stage4", range(9, 13)),
    ),
    ("classifier", ("classifier.0", "classifier.1")),
)
_MOBILENET_V3_LARGE: Stages = (
    *_sequence(
        "features",
        ("stem", range(0, 2)),
        ("stage2", range(2, 4)),
        ("stage3", range(4, 7)),
        ("stage4", range(7, 13)),
        ("stage5", range(13, 17)),
    ),
    ("classifier", ("classifier.0", "classifier.1")),
)
_SHUFFLENET: Stages = (
    ("stem", ("conv1", "maxpool")),
    ("stage2", ("stage2",)),
    ("stage3", ("stage3",)),
    ("stage4", ("stage4", "conv5", "<pool>")),
)
_MNASNET = _sequence(
    "layers",
    ("stem", range(0, 8)),
    ("stage2", range(8, 9)),
    ("stage3", range(9, 10)),
    ("stage4", range(10, 12)),
    ("stage5", range(12, 17)),
)
_REGNET: Stages = (
    ("stem", ("stem",)),
    ("block1", ("trunk_output.block1",)),
    ("block2", ("trunk_output.block2",)),
    ("block3", ("trunk_output.block3",)),
    ("block4", ("trunk_output.block4", "<pool>")),
)
_CONVNEXT: Stages = (
    ("stem", ("features.0",)),
    ("stage1", ("features.1",)),
    ("stage2", ("features.2", "features.3")),
    ("stage3", ("features.4", "features.5")),
    ("stage4", ("features.6", "features.7", "avgpool", "classifier.0", "<flatten>")),
)
_SWIN: Stages = (  # between stages the channels are last: (n, rows, columns, channels)
    ("stem", ("features.0",)),
    ("stage1", ("features.1",)),
    ("stage2", ("features.2", "features.3")),
    ("stage3", ("features.4", "features.5")),
    ("stage4", ("features.6", "features.7", "norm", "permute", "<pool>")),
)
_MAXVIT: Stages = (
    ("stem", ("stem",)),
    ("block1", ("blocks.0",)),
    ("block2", ("blocks.1",)),
    ("block3", ("blocks.2",)),
    ("block4", ("blocks.3", *(f"classifier.{i}" for i in range(5)))),
)
_INCEPTION: Stages = (
    ("stem", ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1")),
    ("stem2", ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2")),
    ("mixed5", ("Mixed_5b", "Mixed_5c", "Mixed_5d")),
    ("mixed6", ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e")),
    ("mixed7", ("Mixed_7a", "Mixed_7b", "Mixed_7c", "<pool>")),
)
_GOOGLENET: Stages = (
    ("stem", ("conv1", "maxpool1", "conv2", "conv3", "maxpool2")),
    ("inception3", ("inception3a", "inception3b", "maxpool3")),
    ("inception4", ("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4")),
    ("inception5", ("inception5a", "inception5b", "<pool>")),
)
_ALEXNET: Stages = (
    *_sequence(
        "features",
        ("stem", range(0, 3)),
        ("block2", range(3, 6)),
        ("block3", range(6, 10)),
        ("block4", range(10, 13)),
        last=("avgpool", "<flatten>"),
    ),
    ("classifier", tuple(f"classifier.{i}" for i in range(6))),
)
_SQUEEZENET_1_0 = _sequence(
    "features",
    ("stem", range(0, 3)),
    ("fire2", range(3, 7)),
    ("fire5", range(7, 10)),
    ("fire7", range(10, 12)),
    ("fire9", range(12, 13)),
)
_SQUEEZENET_1_1 = _sequence(
    "features",
    ("stem", range(0, 3)),
    ("fire2", range(3, 6)),
    ("fire4", range(6, 9)),
    ("fire6", range(9, 11)),
    ("fire8", range(11, 13)),
)

_HE = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016"
_XIE = "Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017"
_ZAGORUYKO = "Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016"
_HUANG = "Huang et al., Densely Connected Convolutional Networks, CVPR 2017"
_SIMONYAN = "Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015"
_TAN = "Tan and Le, EfficientNet, ICML 2019"
_TAN_V2 = "Tan and Le, EfficientNetV2, ICML 2021"
_HOWARD = "Howard et al., Searching for MobileNetV3, ICCV 2019"
_MA = "Ma et al., ShuffleNet V2, ECCV 2018"
_TAN_MNASNET = "Tan et al., MnasNet: Platform-Aware Neural Architecture Search for Mobile, CVPR 2019"
_RADOSAVOVIC = "Radosavovic et al., Designing Network Design Spaces, CVPR 2020"
_LIU_CONVNEXT = "Liu et al., A ConvNet for the 2020s, CVPR 2022"
_LIU_SWIN = "Liu et al., Swin Transformer, ICCV 2021"
_LIU_SWIN_V2 = "Liu et al., Swin Transformer V2, CVPR 2022"
_DOSOVITSKIY = "Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021"
_IANDOLA = "Iandola et al., SqueezeNet, arXiv:1602.07360"
_SANDLER = "Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018"
_SZEGEDY_V3 = "Szegedy et al., Rethinking the Inception Architecture, CVPR 2016"
_SZEGEDY = "Szegedy et al., Going Deeper with Convolutions, CVPR 2015"
_KRIZHEVSKY = "Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv:1404.5997"
_TU = "Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022"
_CHEN = f"{_HE}; Chen et al., Med3D, arXiv:1904.00625: MedicalNet's layout; MONAI, 3-D"
_CARREIRA = f"{_HE}; inflated as in Carreira and Zisserman, Quo Vadis, CVPR 2017; MONAI, 3-D"

BACKBONES: Mapping[str, Backbone] = {
    "resnet18": _torchvision(
        "resnet18",
        _RESNET,
        512,
        _HE,
        "resnet18-f37072fd.pth",
        "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    ),
    "resnet34": _torchvision("resnet34", _RESNET, 512, _HE, "resnet34-b627a593.pth"),
    "resnet50": _torchvision(
        "resnet50",
        _RESNET,
        2048,
        _HE,
        "resnet50-11ad3fa6.pth",
        "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
    ),
    "resnet101": _torchvision("resnet101", _RESNET, 2048, _HE, "resnet101-cd907fc2.pth"),
    "resnet152": _torchvision("resnet152", _RESNET, 2048, _HE, "resnet152-f82ba261.pth"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d", _RESNET, 2048, _XIE, "resnext50_32x4d-1a0047aa.pth"),
    "resnext101_32x8d": _torchvision("resnext101_32x8d", _RESNET, 2048, _XIE, "resnext101_32x8d-110c445d.pth"),
    "wide_resnet50_2": _torchvision("wide_resnet50_2", _RESNET, 2048, _ZAGORUYKO, "wide_resnet50_2-9ba9bcbe.pth"),
    "wide_resnet101_2": _torchvision("wide_resnet101_2", _RESNET, 2048, _ZAGORUYKO, "wide_resnet101_2-d733dc28.pth"),
    "densenet121": _torchvision(
        "densenet121",
        _DENSENET,
        1024,
        _HUANG,
        "densenet121-a639ec97.pth",
        "a639ec97d7c33b07ae66f0b5fb7d0192f95a3b11b7576c66c0126c2a727c4395",
    ),
    "densenet161": _torchvision("densenet161", _DENSENET, 2208, _HUANG, "densenet161-8d451a50.pth"),
    "densenet169": _torchvision("densenet169", _DENSENET, 1664, _HUANG, "densenet169-b2777c0a.pth"),
    "densenet201": _torchvision("densenet201", _DENSENET, 1920, _HUANG, "densenet201-c1103571.pth"),
    "efficientnet_b0": _torchvision(
        "efficientnet_b0",
        _EFFICIENTNET,
        1280,
        _TAN,
        "efficientnet_b0_rwightman-7f5810bc.pth",
        "7f5810bc96def8f7552d5b7e68d53c4786f81167d28291b21c0d90e1fca14934",
    ),
    "efficientnet_b1": _torchvision("efficientnet_b1", _EFFICIENTNET, 1280, _TAN, "efficientnet_b1-c27df63c.pth"),
    "efficientnet_b2": _torchvision(
        "efficientnet_b2", _EFFICIENTNET, 1408, _TAN, "efficientnet_b2_rwightman-c35c1473.pth"
    ),
    "efficientnet_b3": _torchvision(
        "efficientnet_b3", _EFFICIENTNET, 1536, _TAN, "efficientnet_b3_rwightman-b3899882.pth"
    ),
    "efficientnet_b4": _torchvision(
        "efficientnet_b4", _EFFICIENTNET, 1792, _TAN, "efficientnet_b4_rwightman-23ab8bcd.pth"
    ),
    "efficientnet_b5": _torchvision(
        "efficientnet_b5", _EFFICIENTNET, 2048, _TAN, "efficientnet_b5_lukemelas-1a07897c.pth"
    ),
    "efficientnet_b6": _torchvision(
        "efficientnet_b6", _EFFICIENTNET, 2304, _TAN, "efficientnet_b6_lukemelas-24a108a5.pth"
    ),
    "efficientnet_b7": _torchvision(
        "efficientnet_b7", _EFFICIENTNET, 2560, _TAN, "efficientnet_b7_lukemelas-c5b4e57e.pth"
    ),
    "efficientnet_v2_s": _torchvision(
        "efficientnet_v2_s", _EFFICIENTNET_V2_S, 1280, _TAN_V2, "efficientnet_v2_s-dd5fe13b.pth", min_size=40
    ),
    "efficientnet_v2_m": _torchvision(
        "efficientnet_v2_m", _EFFICIENTNET, 1280, _TAN_V2, "efficientnet_v2_m-dc08266a.pth", min_size=40
    ),
    "efficientnet_v2_l": _torchvision(
        "efficientnet_v2_l",
        _EFFICIENTNET,
        1280,
        _TAN_V2,
        "efficientnet_v2_l-59c71312.pth",
        min_size=40,
        mean=HALF,
        std=HALF,
    ),
    "mobilenet_v2": _torchvision("mobilenet_v2", _MOBILENET_V2, 1280, _SANDLER, "mobilenet_v2-7ebf99e0.pth"),
    "mobilenet_v3_small": _torchvision(
        "mobilenet_v3_small",
        _MOBILENET_V3_SMALL,
        1024,
        _HOWARD,
        "mobilenet_v3_small-047dcff4.pth",
        "047dcff4addef86ea5bc2eff13c9614dc11f47ab1160d0a71a25e7db994f4e1f",
    ),
    "mobilenet_v3_large": _torchvision(
        "mobilenet_v3_large", _MOBILENET_V3_LARGE, 1280, _HOWARD, "mobilenet_v3_large-5c1a4163.pth"
    ),
    "shufflenet_v2_x0_5": _torchvision(
        "shufflenet_v2_x0_5", _SHUFFLENET, 1024, _MA, "shufflenetv2_x0.5-f707e7126e.pth"
    ),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0", _SHUFFLENET, 1024, _MA, "shufflenetv2_x1-5666bf0f80.pth"),
    "shufflenet_v2_x1_5": _torchvision("shufflenet_v2_x1_5", _SHUFFLENET, 1024, _MA, "shufflenetv2_x1_5-3c479a10.pth"),
    "shufflenet_v2_x2_0": _torchvision("shufflenet_v2_x2_0", _SHUFFLENET, 2048, _MA, "shufflenetv2_x2_0-8be3c8ee.pth"),
    "mnasnet0_5": _torchvision("mnasnet0_5", _MNASNET, 1280, _TAN_MNASNET, "mnasnet0.5_top1_67.823-3ffadce67e.pth"),
    "mnasnet0_75": _torchvision("mnasnet0_75", _MNASNET, 1280, _TAN_MNASNET, "mnasnet0_75-7090bc5f.pth"),
    "mnasnet1_0": _torchvision("mnasnet1_0", _MNASNET, 1280, _TAN_MNASNET, "mnasnet1.0_top1_73.512-f206786ef8.pth"),
    "mnasnet1_3": _torchvision("mnasnet1_3", _MNASNET, 1280, _TAN_MNASNET, "mnasnet1_3-a4c69d6f.pth"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf", _REGNET, 440, _RADOSAVOVIC, "regnet_y_400mf-e6988f5f.pth"),
    "regnet_y_800mf": _torchvision("regnet_y_800mf", _REGNET, 784, _RADOSAVOVIC, "regnet_y_800mf-58fc7688.pth"),
    "regnet_y_1_6gf": _torchvision("regnet_y_1_6gf", _REGNET, 888, _RADOSAVOVIC, "regnet_y_1_6gf-0d7bc02a.pth"),
    "regnet_y_3_2gf": _torchvision("regnet_y_3_2gf", _REGNET, 1512, _RADOSAVOVIC, "regnet_y_3_2gf-9180c971.pth"),
    "regnet_y_8gf": _torchvision("regnet_y_8gf", _REGNET, 2016, _RADOSAVOVIC, "regnet_y_8gf-dc2b1b54.pth"),
    "regnet_x_400mf": _torchvision("regnet_x_400mf", _REGNET, 400, _RADOSAVOVIC, "regnet_x_400mf-62229a5f.pth"),
    "regnet_x_800mf": _torchvision("regnet_x_800mf", _REGNET, 672, _RADOSAVOVIC, "regnet_x_800mf-94a99ebd.pth"),
    "regnet_x_1_6gf": _torchvision("regnet_x_1_6gf", _REGNET, 912, _RADOSAVOVIC, "regnet_x_1_6gf-a12f2b72.pth"),
    "regnet_x_3_2gf": _torchvision("regnet_x_3_2gf", _REGNET, 1008, _RADOSAVOVIC, "regnet_x_3_2gf-7071aa85.pth"),
    "regnet_x_8gf": _torchvision("regnet_x_8gf", _REGNET, 1920, _RADOSAVOVIC, "regnet_x_8gf-2b70d774.pth"),
    "convnext_tiny": _torchvision(
        "convnext_tiny",
        _CONVNEXT,
        768,
        _LIU_CONVNEXT,
        "convnext_tiny-983f1562.pth",
        "983f1562536e84ff750a1576fb08e54de751dbf2e17c0d8a4a13704341fdcd3d",
    ),
    "convnext_small": _torchvision("convnext_small", _CONVNEXT, 768, _LIU_CONVNEXT, "convnext_small-0c510722.pth"),
    "convnext_base": _torchvision("convnext_base", _CONVNEXT, 1024, _LIU_CONVNEXT, "convnext_base-6075fbad.pth"),
    "convnext_large": _torchvision("convnext_large", _CONVNEXT, 1536, _LIU_CONVNEXT, "convnext_large-ea097f82.pth"),
    "swin_t": _torchvision("swin_t", _SWIN, 768, _LIU_SWIN, "swin_t-704ceda3.pth"),
    "swin_s": _torchvision("swin_s", _SWIN, 768, _LIU_SWIN, "swin_s-5e29d889.pth"),
    "swin_b": _torchvision("swin_b", _SWIN, 1024, _LIU_SWIN, "swin_b-68c6b09e.pth"),
    "swin_v2_t": _torchvision("swin_v2_t", _SWIN, 768, _LIU_SWIN_V2, "swin_v2_t-b137f0e2.pth"),
    "swin_v2_s": _torchvision("swin_v2_s", _SWIN, 768, _LIU_SWIN_V2, "swin_v2_s-637d8ceb.pth"),
    "swin_v2_b": _torchvision("swin_v2_b", _SWIN, 1024, _LIU_SWIN_V2, "swin_v2_b-781e5279.pth"),
    "vit_b_16": _torchvision(
        "vit_b_16",
        _vit(12),
        768,
        _DOSOVITSKIY,
        "vit_b_16-c867db91.pth",
        "c867db91d3e12c6cbadabb610d73c24a546bf82d8c03a9fea34f43a712ddb0e9",
        multiple=16,
    ),
    "vit_b_32": _torchvision("vit_b_32", _vit(12), 768, _DOSOVITSKIY, "vit_b_32-d86f8d99.pth", multiple=32),
    "vit_l_16": _torchvision("vit_l_16", _vit(24), 1024, _DOSOVITSKIY, "vit_l_16-852ce7e3.pth", multiple=16),
    # Four stages of windows of 7 x 7: 224 is the least that all of them divide.
    "maxvit_t": _torchvision("maxvit_t", _MAXVIT, 512, _TU, "maxvit_t-bc5ab103.pth", min_size=224, multiple=224),
    "vgg11": _torchvision("vgg11", _vgg((1, 1, 2, 2, 2), 2), 4096, _SIMONYAN, "vgg11-8a719046.pth"),
    "vgg13": _torchvision("vgg13", _vgg((2, 2, 2, 2, 2), 2), 4096, _SIMONYAN, "vgg13-19584684.pth"),
    "vgg16": _torchvision(
        "vgg16",
        _vgg((2, 2, 3, 3, 3), 2),
        4096,
        _SIMONYAN,
        "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "vgg19": _torchvision("vgg19", _vgg((2, 2, 4, 4, 4), 2), 4096, _SIMONYAN, "vgg19-dcbb9e9d.pth"),
    "vgg11_bn": _torchvision("vgg11_bn", _vgg((1, 1, 2, 2, 2), 3), 4096, _SIMONYAN, "vgg11_bn-6002323d.pth"),
    "vgg13_bn": _torchvision("vgg13_bn", _vgg((2, 2, 2, 2, 2), 3), 4096, _SIMONYAN, "vgg13_bn-abd245e5.pth"),
    "vgg16_bn": _torchvision("vgg16_bn", _vgg((2, 2, 3, 3, 3), 3), 4096, _SIMONYAN, "vgg16_bn-6c64b313.pth"),
    "vgg19_bn": _torchvision("vgg19_bn", _vgg((2, 2, 4, 4, 4), 3), 4096, _SIMONYAN, "vgg19_bn-c79401a0.pth"),
    # Mean and deviation of these two are what torchvision's transform_input turns ImageNet's convention into.
    "inception_v3": _torchvision(
        "inception_v3",
        _INCEPTION,
        2048,
        _SZEGEDY_V3,
        "inception_v3_google-0cc3c7bd.pth",
        "0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef",
        min_size=80,
        mean=HALF,
        std=HALF,
        options={"aux_logits": False, "transform_input": False, "init_weights": True},
    ),
    "googlenet": _torchvision(
        "googlenet",
        _GOOGLENET,
        1024,
        _SZEGEDY,
        "googlenet-1378be20.pth",
        mean=HALF,
        std=HALF,
        options={"aux_logits": False, "transform_input": False, "init_weights": True},
    ),
    "squeezenet1_0": _torchvision("squeezenet1_0", _SQUEEZENET_1_0, 512, _IANDOLA, "squeezenet1_0-b66bff10.pth"),
    "squeezenet1_1": _torchvision("squeezenet1_1", _SQUEEZENET_1_1, 512, _IANDOLA, "squeezenet1_1-b8a52dc0.pth"),
    "alexnet": _torchvision("alexnet", _ALEXNET, 4096, _KRIZHEVSKY, "alexnet-owt-7be5be79.pth", min_size=64),
    # MONAI in two dimensions, without weights.
    "monai_resnet10": Backbone(
        "monai",
        "ResNet",
        _RESNET,
        512,
        f"{_HE}; MONAI implementation, 2-D",
        options=_monai_resnet("basic", (1, 1, 1, 1), spatial_dims=2),
    ),
    "monai_resnet10_narrow": Backbone(
        "monai",
        "ResNet",
        _RESNET,
        128,
        f"{_HE}; MONAI, 2-D, a quarter of the width, stem 3x3 without stride: for small images",
        min_size=16,
        options=_monai_resnet("basic", (1, 1, 1, 1), width=16, spatial_dims=2, conv1_t_size=3, conv1_t_stride=1),
    ),
    "monai_densenet121": Backbone(
        "monai", "DenseNet121", _DENSENET, 1024, f"{_HUANG}; MONAI implementation, 2-D", options={"spatial_dims": 2}
    ),
    # Volumes, grey. The ResNets take MedicalNet's checkpoints: shortcut A in 18 and 34, B without bias in 10 and 50.
    "monai_resnet10_3d": Backbone(
        "monai",
        "ResNet",
        _RESNET,
        512,
        _CHEN,
        dimensions=3,
        mean=GREY_MEAN,
        std=GREY_STD,
        options=_monai_resnet("basic", (1, 1, 1, 1), shortcut_type="B", bias_downsample=False),
    ),
    "monai_resnet18_3d": Backbone(
        "monai",
        "ResNet",
        _RESNET,
        512,
        _CHEN,
        dimensions=3,
        mean=GREY_MEAN,
        std=GREY_STD,
        options=_monai_resnet("basic", (2, 2, 2, 2), shortcut_type="A", bias_downsample=False),
    ),
    "monai_resnet34_3d": Backbone(
        "monai",
        "ResNet",
        _RESNET,
        512,
        _CHEN,
        dimensions=3,
        mean=GREY_MEAN,
        std=GREY_STD,
        options=_monai_resnet("basic", (3, 4, 6, 3), shortcut_type="A", bias_downsample=False),
    ),
    "monai_resnet50_3d": Backbone(
        "monai",
        "ResNet",
        _RESNET,
        2048,
        _CHEN,
        dimensions=3,
        mean=GREY_MEAN,
        std=GREY_STD,
        options=_monai_resnet("bottleneck", (3, 4, 6, 3), shortcut_type="B", bias_downsample=False),
    ),
    "monai_densenet121_3d": Backbone(
        "monai",
        "DenseNet121",
        _DENSENET,
        1024,
        f"{_HUANG}; MONAI implementation, 3-D",
        dimensions=3,
        mean=GREY_MEAN,
        std=GREY_STD,
        options={"spatial_dims": 3},
    ),
    "monai_seresnet50_3d": Backbone(
        "monai",
        "SEResNet50",
        _SENET,
        2048,
        "Hu et al., Squeeze-and-Excitation Networks, CVPR 2018; MONAI implementation, 3-D",
        dimensions=3,
        mean=GREY_MEAN,
        std=GREY_STD,
        options={"spatial_dims": 3},
    ),
    "monai_efficientnet_b0_3d": Backbone(
        "monai",
        "EfficientNetBN",
        _MONAI_EFFICIENTNET,
        1280,
        f"{_TAN}; MONAI implementation, 3-D",
        dimensions=3,
        mean=GREY_MEAN,
        std=GREY_STD,
        options={"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 3},
    ),
    # Volumes that start from ImageNet: MONAI names these ResNets' parameters as torchvision does.
    "resnet18_3d": Backbone(
        "monai",
        "ResNet",
        _RESNET,
        512,
        _CARREIRA,
        dimensions=3,
        inflates="resnet18",
        weights=_published("resnet18-f37072fd.pth", "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"),
        options=_monai_resnet("basic", (2, 2, 2, 2), bias_downsample=False),
    ),
    "resnet50_3d": Backbone(
        "monai",
        "ResNet",
        _RESNET,
        2048,
        _CARREIRA,
        dimensions=3,
        inflates="resnet50",
        weights=_published("resnet50-11ad3fa6.pth", "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"),
        options=_monai_resnet("bottleneck", (3, 4, 6, 3), bias_downsample=False),
    ),
}


def backbone(name: str) -> Backbone:
    """Look a backbone up.

    Raises:
        ConfigError: no such row; the nearest one is named.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`medtl backbones` lists them."
        raise ConfigError(f"'model.backbone': there is no backbone '{name}'; {hint}")
    return BACKBONES[name]
