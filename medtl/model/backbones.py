"""The backbones, as a table you can read.

A row names the ordered stages of a network from stem to head, the input it was trained on, and where its ImageNet
weights come from. A stage is a list of module paths in the source network, applied one after the other; a word in angle
brackets is an operation without weights (:data:`medtl.model.surgery.OPERATIONS`). The head is always new: the source
network's own classifier is not part of any stage, and neither is what belongs to it alone (SqueezeNet's last ReLU,
which would cut a new head's negative logits off). One contract test runs over every row.

``sha256`` is the full digest where it is known to us, else the first eight digits, which torchvision publishes in the
file's name; a download is checked against all digits that are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Stages = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where ImageNet weights are published. ``url`` is relative to torchvision's download host."""

    file: str
    sha256: str
    licence: str = (
        "BSD-3-Clause (torchvision); trained on ImageNet-1k, whose terms restrict commercial use of the images"
    )


@dataclass(frozen=True, slots=True)
class Backbone:
    """One row: how a network is built, cut into stages and fed."""

    library: str  # torchvision or monai
    builder: str
    stages: Stages
    features: int  # width of what enters the head
    citation: str
    min_size: int = 32
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    weights: WeightsSource | None = None
    options: Mapping[str, object] = field(default_factory=dict)


_RESNET: Stages = (
    ("stem", ("conv1", "bn1", "<relu>", "maxpool")),
    ("layer1", ("layer1",)),
    ("layer2", ("layer2",)),
    ("layer3", ("layer3",)),
    ("layer4", ("layer4", "<pool>")),
)
_MONAI_RESNET: Stages = (("stem", ("conv1", "bn1", "<relu>", "maxpool")), *_RESNET[1:])
_DENSENET: Stages = (
    ("stem", ("features.conv0", "features.norm0", "features.relu0", "features.pool0")),
    ("denseblock1", ("features.denseblock1", "features.transition1")),
    ("denseblock2", ("features.denseblock2", "features.transition2")),
    ("denseblock3", ("features.denseblock3", "features.transition3")),
    ("denseblock4", ("features.denseblock4", "features.norm5", "<relu>", "<pool>")),
)


def _sequence(prefix: str, *groups: tuple[str, range], last: tuple[str, ...] = ("<pool>",)) -> Stages:
    """Cut a numbered sequence of modules into stages; ``last`` closes the last of them."""
    stages = [(name, tuple(f"{prefix}.{i}" for i in numbers)) for name, numbers in groups]
    name, modules = stages[-1]
    return (*stages[:-1], (name, modules + last))


_RESNET_PAPER = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016"

BACKBONES: Mapping[str, Backbone] = {
    "resnet18": Backbone(
        "torchvision",
        "resnet18",
        _RESNET,
        512,
        _RESNET_PAPER,
        weights=WeightsSource(
            "resnet18-f37072fd.pth", "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"
        ),
    ),
    "resnet50": Backbone(
        "torchvision",
        "resnet50",
        _RESNET,
        2048,
        _RESNET_PAPER,
        weights=WeightsSource(
            "resnet50-11ad3fa6.pth", "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"
        ),
    ),
    "densenet121": Backbone(
        "torchvision",
        "densenet121",
        _DENSENET,
        1024,
        "Huang et al., Densely Connected Convolutional Networks, CVPR 2017",
        weights=WeightsSource(
            "densenet121-a639ec97.pth", "a639ec97d7c33b07ae66f0b5fb7d0192f95a3b11b7576c66c0126c2a727c4395"
        ),
    ),
    "vgg16": Backbone(
        "torchvision",
        "vgg16",
        (
            *_sequence(
                "features",
                ("block1", range(0, 5)),
                ("block2", range(5, 10)),
                ("block3", range(10, 17)),
                ("block4", range(17, 24)),
                ("block5", range(24, 31)),
                last=("avgpool", "<flatten>"),
            ),
            (
                "classifier",
                ("classifier.0", "classifier.1", "classifier.2", "classifier.3", "classifier.4", "classifier.5"),
            ),
        ),
        4096,
        "Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015",
        weights=WeightsSource("vgg16-397923af.pth", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    ),
    "inception_v3": Backbone(
        "torchvision",
        "inception_v3",
        (
            ("stem", ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1")),
            ("stem2", ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2")),
            ("mixed5", ("Mixed_5b", "Mixed_5c", "Mixed_5d")),
            ("mixed6", ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e")),
            ("mixed7", ("Mixed_7a", "Mixed_7b", "Mixed_7c", "<pool>")),
        ),
        2048,
        "Szegedy et al., Rethinking the Inception Architecture, CVPR 2016",
        min_size=80,
        mean=(0.5, 0.5, 0.5),  # what torchvision's transform_input turns ImageNet's convention into
        std=(0.5, 0.5, 0.5),
        weights=WeightsSource(
            "inception_v3_google-0cc3c7bd.pth", "0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef"
        ),
        options={"aux_logits": False, "transform_input": False, "init_weights": True},
    ),
    "efficientnet_b0": Backbone(
        "torchvision",
        "efficientnet_b0",
        _sequence(
            "features",
            ("stem", range(0, 2)),
            ("stage2", range(2, 3)),
            ("stage3", range(3, 4)),
            ("stage4", range(4, 6)),
            ("stage5", range(6, 9)),
        ),
        1280,
        "Tan and Le, EfficientNet, ICML 2019",
        weights=WeightsSource(
            "efficientnet_b0_rwightman-7f5810bc.pth", "7f5810bc96def8f7552d5b7e68d53c4786f81167d28291b21c0d90e1fca14934"
        ),
    ),
    "mobilenet_v3_small": Backbone(
        "torchvision",
        "mobilenet_v3_small",
        (
            *_sequence(
                "features",
                ("stem", range(0, 2)),
                ("stage2", range(2, 4)),
                ("stage3", range(4, 9)),
                ("stage4", range(9, 13)),
            ),
            ("classifier", ("classifier.0", "classifier.1")),
        ),
        1024,
        "Howard et al., Searching for MobileNetV3, ICCV 2019",
        weights=WeightsSource(
            "mobilenet_v3_small-047dcff4.pth", "047dcff4addef86ea5bc2eff13c9614dc11f47ab1160d0a71a25e7db994f4e1f"
        ),
    ),
    "squeezenet1_0": Backbone(
        "torchvision",
        "squeezenet1_0",
        _sequence(
            "features",
            ("stem", range(0, 3)),
            ("fire2", range(3, 7)),
            ("fire5", range(7, 10)),
            ("fire7", range(10, 12)),
            ("fire9", range(12, 13)),
        ),
        512,
        "Iandola et al., SqueezeNet, arXiv:1602.07360",
        weights=WeightsSource("squeezenet1_0-b66bff10.pth", "b66bff10"),
    ),
    "convnext_tiny": Backbone(
        "torchvision",
        "convnext_tiny",
        (
            ("stem", ("features.0",)),
            ("stage1", ("features.1",)),
            ("stage2", ("features.2", "features.3")),
            ("stage3", ("features.4", "features.5")),
            ("stage4", ("features.6", "features.7", "avgpool", "classifier.0", "<flatten>")),
        ),
        768,
        "Liu et al., A ConvNet for the 2020s, CVPR 2022",
        weights=WeightsSource(
            "convnext_tiny-983f1562.pth", "983f1562536e84ff750a1576fb08e54de751dbf2e17c0d8a4a13704341fdcd3d"
        ),
    ),
    "vit_b_16": Backbone(
        "torchvision",
        "vit_b_16",
        (
            ("stem", ("<vit_stem>",)),
            *(
                (f"blocks{n}", tuple(f"encoder.layers.encoder_layer_{i}" for i in range(3 * n - 3, 3 * n)))
                for n in range(1, 4)
            ),
            (
                "blocks4",
                (*(f"encoder.layers.encoder_layer_{i}" for i in range(9, 12)), "encoder.ln", "<class_token>"),
            ),
        ),
        768,
        "Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021",
        min_size=32,
        weights=WeightsSource(
            "vit_b_16-c867db91.pth", "c867db91d3e12c6cbadabb610d73c24a546bf82d8c03a9fea34f43a712ddb0e9"
        ),
    ),
    "monai_resnet10": Backbone(
        "monai",
        "ResNet",
        _MONAI_RESNET,
        512,
        f"{_RESNET_PAPER}; MONAI implementation, 2-D",
        options={
            "block": "basic",
            "layers": [1, 1, 1, 1],
            "block_inplanes": [64, 128, 256, 512],
            "spatial_dims": 2,
            "conv1_t_size": 7,
            "conv1_t_stride": 2,
        },
    ),
    "monai_resnet10_narrow": Backbone(
        "monai",
        "ResNet",
        _MONAI_RESNET,
        128,
        f"{_RESNET_PAPER}; MONAI, 2-D, a quarter of the width, stem 3x3 without stride: for small images",
        min_size=16,
        options={
            "block": "basic",
            "layers": [1, 1, 1, 1],
            "block_inplanes": [16, 32, 64, 128],
            "spatial_dims": 2,
            "conv1_t_size": 3,
            "conv1_t_stride": 1,
        },
    ),
    "monai_densenet121": Backbone(
        "monai",
        "DenseNet121",
        (*_DENSENET[:-1], ("denseblock4", ("features.denseblock4", "features.norm5", "<relu>", "<pool>"))),
        1024,
        "Huang et al., Densely Connected Convolutional Networks, CVPR 2017; MONAI implementation, 2-D",
        options={"spatial_dims": 2},
    ),
}
