"""The networks of segmentation, as a table you can read.

A row says how a network is built from a plan, and what scans it takes. Depth, strides, kernels and widths come from the
plan where a network has them to choose. ``encoder_unet`` has no builder of its own: it is a decoder on a row of
:data:`~medtl.model.backbones.BACKBONES` (:mod:`medtl.model.segmenter`). One contract test runs over every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from medtl.records import GridPlan

Builder = Callable[[GridPlan, str, float], nn.Module]  # plan, norm (batch or instance), dropout


@dataclass(frozen=True, slots=True)
class Segmenter:
    """One row.

    ``attends``: a voxel's answer rests on all of its window, so tiles cannot give what the whole volume gives.
    ``fixed``: the network takes the plan's patch and no other size.
    """

    build: Builder | None
    multiple: Callable[[GridPlan], tuple[int, ...]] | None  # sizes are multiples of it, one for each axis
    citation: str
    attends: bool = False
    fixed: bool = False
    least: int = 1  # that the sides of patches are multiples of, whatever the plan says


def of_strides(plan: GridPlan) -> tuple[int, ...]:
    """Multiply the strides of all levels."""
    return tuple(math.prod(axis) for axis in zip(*plan.strides, strict=True))


def _halvings(plan: GridPlan) -> tuple[int, ...]:
    return (2 ** (len(plan.strides) - 1),) * plan.dimensions


def _sixteen(plan: GridPlan) -> tuple[int, ...]:
    return (16,) * plan.dimensions


def _thirty_two(plan: GridPlan) -> tuple[int, ...]:
    return (32,) * plan.dimensions


def _norm(norm: str) -> tuple[str, Mapping[str, Any]]:
    return ("BATCH", {}) if norm == "batch" else ("INSTANCE", {"affine": True})


def _dynunet(plan: GridPlan, norm: str, dropout: float) -> nn.Module:
    from monai.networks.nets import DynUNet

    network: nn.Module = DynUNet(
        plan.dimensions,
        plan.channels,
        plan.outputs,
        plan.kernels,
        plan.strides,
        plan.strides[1:],
        plan.filters,
        dropout=dropout or None,
        norm_name=_norm(norm),
        act_name=("leakyrelu", {"inplace": False, "negative_slope": 0.01}),
    )
    return network


def _unet(plan: GridPlan, norm: str, dropout: float) -> nn.Module:
    from monai.networks.nets import UNet

    network: nn.Module = UNet(
        plan.dimensions,
        plan.channels,
        plan.outputs,
        plan.filters,
        plan.strides[1:],
        num_res_units=2,
        norm=_norm(norm),
        dropout=dropout,
    )
    return network


def _segresnet(plan: GridPlan, norm: str, dropout: float) -> nn.Module:
    from monai.networks.nets import SegResNet

    levels = len(plan.strides)
    down = (1, *(2,) * (levels - 2), 4)
    network: nn.Module = SegResNet(
        plan.dimensions,
        plan.filters[0],
        plan.channels,
        plan.outputs,
        dropout_prob=dropout or None,
        norm=_norm(norm),
        blocks_down=down,
        blocks_up=(1,) * (levels - 1),
        upsample_mode="deconv",  # interpolation has no deterministic gradient on a GPU
    )
    return network


def _attention_unet(plan: GridPlan, norm: str, dropout: float) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    network: nn.Module = AttentionUnet(
        plan.dimensions,
        plan.channels,
        plan.outputs,
        plan.filters,
        plan.strides[1:],
        dropout=dropout,
    )
    if norm == "instance":
        _to_instance_norm(network)
    return network


def _unetr(plan: GridPlan, norm: str, dropout: float) -> nn.Module:
    from monai.networks.nets import UNETR

    network: nn.Module = UNETR(
        plan.channels,
        plan.outputs,
        plan.patch,
        feature_size=max(4, plan.filters[0] // 2),
        hidden_size=384,  # a ViT-S: with 768 most of 90 million parameters learn from some hundred scans
        mlp_dim=1536,
        num_heads=6,
        norm_name=_norm(norm),
        dropout_rate=dropout,
        spatial_dims=plan.dimensions,
    )
    return network


def _swin_unetr(plan: GridPlan, norm: str, dropout: float) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    network: nn.Module = SwinUNETR(
        plan.channels,
        plan.outputs,
        feature_size=12 * max(1, plan.filters[0] // 16),
        drop_rate=dropout,
        norm_name=_norm(norm),
        spatial_dims=plan.dimensions,
    )
    return network


def _to_instance_norm(network: nn.Module) -> None:
    kinds: Mapping[type, Any] = {nn.BatchNorm2d: nn.InstanceNorm2d, nn.BatchNorm3d: nn.InstanceNorm3d}
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) in kinds:
                setattr(module, name, kinds[type(child)](child.num_features, affine=True))


_ISENSEE = "Isensee et al., nnU-Net, Nature Methods 2021; as MONAI's DynUNet"
_KERFOOT = "Kerfoot et al., Left-Ventricle Quantification Using Residual U-Net, STACOM 2018; as MONAI's UNet"
_MYRONENKO = "Myronenko, 3D MRI brain tumor segmentation using autoencoder regularization, BrainLes 2018"
_OKTAY = "Oktay et al., Attention U-Net, MIDL 2018"
_HATAMIZADEH = "Hatamizadeh et al., UNETR, WACV 2022"
_HATAMIZADEH_SWIN = "Hatamizadeh et al., Swin UNETR, BrainLes 2021"
_RONNEBERGER = "Ronneberger et al., U-Net, MICCAI 2015; encoder as model.backbone"

SEGMENTERS: Mapping[str, Segmenter] = {
    "unet": Segmenter(_unet, of_strides, _KERFOOT),
    "dynunet": Segmenter(_dynunet, of_strides, _ISENSEE),
    "segresnet": Segmenter(_segresnet, _halvings, _MYRONENKO),
    "attention_unet": Segmenter(_attention_unet, of_strides, _OKTAY),
    "unetr": Segmenter(_unetr, _sixteen, _HATAMIZADEH, attends=True, fixed=True, least=16),
    "swin_unetr": Segmenter(_swin_unetr, _thirty_two, _HATAMIZADEH_SWIN, attends=True, least=32),
    "encoder_unet": Segmenter(None, None, _RONNEBERGER),
}
