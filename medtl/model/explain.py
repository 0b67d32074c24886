"""Where a network looked when it spoke for a class, right way up, and whether that depends on what it learned.

An explanation says where a network looked, not why it is right.

High means: speaks for the class. Both maps are about the log odds of the class against all others (of one label: of
present against absent), because a softmax leaves a single logit open up to a shared amount, and probabilities near 1
no longer move. Grad-CAM weighs the channels of a late map by their mean gradient (Selvaraju et al., ICCV 2017);
occlusion covers one patch after the other and notes by how much the log odds fall (Zeiler and Fergus, ECCV 2014).

``monai.visualize`` has both, and the tests hold that ours agree with them; but its Grad-CAM is upside down unless told
otherwise, its occlusion gives what remains and not what was lost, takes one image at a time, and neither knows a chain
of stages or tokens. Grad-CAM is coarse (a 96-pixel image has 5 x 5 places at the end of a SqueezeNet) but costs one
pass; occlusion asks the network itself, whatever it is made of, and costs a hundred.

A map that looks right proves little: an edge detector's looks right, too. :func:`check_sanity` lets the network forget
what it learned, stage by stage from the head down, and looks whether the map changes (Adebayo et al., NeurIPS 2018);
:mod:`medtl.evaluation.pointing` measures maps against masks.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from medtl.errors import ConfigError, ModelError
from medtl.model.heads import NearestNeighbours
from medtl.model.surgery import HEAD, StagedNetwork, VitStem
from medtl.progress import advance
from medtl.records import AnyArray, FloatArray, SanityCheck, Task

Baseline = Literal["blur", "mean"]
Layout = Literal["channels first", "channels last", "tokens"]
THUMBNAIL = 160  # pixels, the longer side
_PATCHES = 6  # a patch is so many times as small as the image, along each axis
_WIDER = 3  # the blur's deviation, in patches: of 1.5 patches erf(1.5 / sqrt(8) / 3) ** 2 = 4 % are left
_ROUNDING = 1e-5  # log odds (or a share of them): what float32 makes of the same image in another batch
_PERCEPTUAL = cv2.COLORMAP_INFERNO  # as bright as it is high, also in grey and for the colour-blind


@dataclass(frozen=True, slots=True)
class Overlay:
    """A picture with relevance in colour; nothing is coloured at or below ``low``, and all of it from ``high`` on."""

    picture: AnyArray  # (rows, columns, 3), uint8, red first
    low: float
    high: float
    slice: int | None  # of a volume, along its first axis


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the chain of modules a map is taken, and how it lies there."""

    stage: str
    modules: int  # applied before it
    layout: Layout
    grid: tuple[int, ...]


def grad_cam(
    network: StagedNetwork,
    images: Tensor,
    classes: Sequence[int],
    task: Task,
    stage: str | None = None,
    batch_size: int = 32,
) -> FloatArray:
    """Weigh the channels of a late map by how much the class's log odds rise with them; what speaks against is 0.

    Of a vision transformer the map is what enters the last attention: after it only the class token is heard.

    Args:
        images: (n, channels, ...), 0 to 1.
        classes: (n,) which class each image is asked about.
        stage: whose last map with places in the image is taken; default: the last stage that has one.

    Returns:
        (n, ...) on the grid of the images, 0 or more, linearly interpolated.

    Raises:
        ConfigError: the stage has no such map, or the head compares with neighbours; occlusion is named instead.

    Source: Selvaraju et al., Grad-CAM, ICCV 2017.
    """
    if any(isinstance(module, NearestNeighbours) for module in network.stages[HEAD].modules()):
        raise ConfigError("Grad-CAM has no gradient through a head of nearest neighbours; explain by occlusion.")
    found = np.zeros((len(images), *images.shape[2:]), dtype=np.float32)
    wanted = _asked(images, classes)
    images = images.to(network.mean.device)
    chain = [module for _, module in _chain(network)]
    with _evaluating(network):
        place = _place(network, images[:1], stage)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            with torch.no_grad():
                x = _through(chain[: place.modules], network.normalise(images[rows]))
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                score = log_odds(_through(chain[place.modules :], x), wanted[rows], task).sum()
                (gradient,) = torch.autograd.grad(score, x)
            maps, slopes = _on_grid(x.detach(), place), _on_grid(gradient, place)
            weights = slopes.mean(tuple(range(2, slopes.ndim)), keepdim=True)
            relevance = (weights * maps).sum(1, keepdim=True).relu()
            mode = "bilinear" if network.dimensions == 2 else "trilinear"
            wide = nn.functional.interpolate(relevance.float(), size=images.shape[2:], mode=mode, align_corners=False)
            found[rows] = wide[:, 0].cpu().numpy()
            advance("weighing images", min(start + batch_size, len(images)), len(images))
    return found


def occlusion(
    network: StagedNetwork,
    images: Tensor,
    classes: Sequence[int],
    task: Task,
    patch: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    baseline: Baseline = "blur",
    batch_size: int = 32,
) -> FloatArray:
    """Cover one patch after the other and note by how much the class's log odds fall.

    A patch is covered by the image's own blur (a Gaussian three patches wide): the network sees a place without detail
    instead of a foreign grey square, whose edges are detail again, and of an object half as large again as the patch
    less than a twentieth is left. ``mean`` covers with each channel's mean over the image, which leaves nothing, but
    is strange where the background is black. An object larger than the patch is covered in parts only; where a part
    of it is enough for the network, give a larger patch.

    Args:
        images: (n, channels, ...), 0 to 1.
        classes: (n,) which class each image is asked about.
        patch: along each axis of space; default: a sixth of the axis.
        stride: from one patch to the next; default: half a patch, of volumes a whole one.

    Returns:
        (n, ...) on the grid of the images: the mean fall over the patches that cover a place. Above 0 it speaks for
        the class, below 0 against it.

    Raises:
        ConfigError: a patch is larger than the image, or it or a stride is not at least 1.

    Source: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014.
    """
    space = tuple(images.shape[2:])
    edges = tuple(patch) if patch else tuple(max(1, round(length / _PATCHES)) for length in space)
    steps = tuple(stride) if stride else tuple(max(1, e // 2) if len(space) == 2 else e for e in edges)
    corners = _corners(space, edges, steps)
    wanted = _asked(images, classes)
    images = images.to(network.mean.device)
    covers = _blurred(images, tuple(_WIDER * edge for edge in edges)) if baseline == "blur" else _means(images)
    found = np.zeros((len(images), *space), dtype=np.float32)
    with _evaluating(network), torch.no_grad():
        for row, (image, cover) in enumerate(zip(images, covers, strict=True)):
            whole = log_odds(network(image[None]), wanted[row : row + 1], task)
            falls = []
            for start in range(0, len(corners), batch_size):
                some = corners[start : start + batch_size]
                rest = log_odds(network(_covered(image, cover, some, edges)), wanted[row].expand(len(some)), task)
                falls.append(whole - rest)
                advance("covering patches", row * len(corners) + start + len(some), len(images) * len(corners))
            fall = torch.cat(falls)
            fall[fall.abs() <= _ROUNDING * whole.abs().clamp(min=1)] = 0
            found[row] = _spread(fall.double().cpu().numpy(), corners, edges, space)
    return found


def log_odds(logits: Tensor, classes: Tensor, task: Task) -> Tensor:
    """Give the log odds of one class of each row: against all others, or of a label of its own its logit.

    Args:
        logits: (n, classes).
        classes: (n,) numbers of classes.
    """
    classes = classes.to(logits.device)
    own = logits.gather(1, classes[:, None])
    if task == "multilabel":
        return own[:, 0]
    others = logits.scatter(1, classes[:, None], -math.inf)
    return own[:, 0] - others.logsumexp(1)


def spatial_stages(network: StagedNetwork, image: Tensor) -> tuple[str, ...]:
    """Name the stages at which Grad-CAM can look, stem first.

    Args:
        image: any one, (1, channels, ...).
    """
    with _evaluating(network):
        return tuple(dict.fromkeys(place.stage for place in _places(network, image.to(network.mean.device))))


def check_sanity(
    network: StagedNetwork,
    explain: Callable[[StagedNetwork], FloatArray],
    method: str,
    seed: int,
    draws: int = 5,
    bound: float = 0.5,
) -> SanityCheck:
    """Let a copy of the network forget from the head down to the stem, and compare its maps with those of before.

    Each parameter of a forgotten stage is drawn anew, normal, with the root mean square that it had, so that the
    signal neither dies nor explodes; of a head of neighbours the votes are shuffled. Maps are compared by their
    ranks (Spearman), and one that shows nothing afterwards has nothing in common with the one before: 0. One draw may
    resemble by luck, so the mean over several is taken. The network itself is left as it is.

    Args:
        explain: gives the maps, (n, ...), of the same images and classes by the network that it is handed.
        method: how the maps are made, for the record.
        draws: of random weights.
        bound: on the mean rank correlation with all stages forgotten; below it the maps depend on what was learned.

    Source: Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018: cascading randomisation.
    """
    before = explain(network)
    telling = [row for row, one in enumerate(before) if np.ptp(one) > 0]
    stages = tuple(reversed(network.stage_names))
    if not telling:
        note = "not estimable: no map shows anything"
        return SanityCheck(method, len(before), draws, tuple((stage, None) for stage in stages), bound, note)
    ranks = [_ranks(before[row]) for row in telling]
    common = np.zeros((draws, len(stages)))
    for draw in range(draws):
        forgetting = copy.deepcopy(network)
        generator = torch.Generator().manual_seed(seed + draw)
        for number, stage in enumerate(stages):
            _forget(forgetting.stages[stage], generator)
            after = explain(forgetting)
            common[draw, number] = np.mean(
                [_correlation(one, _ranks(after[row])) for row, one in zip(telling, ranks, strict=True)]
            )
            advance("forgetting stages", draw * len(stages) + number + 1, draws * len(stages))
    curve = tuple((stage, float(value)) for stage, value in zip(stages, common.mean(axis=0), strict=True))
    left = len(before) - len(telling)
    note = f"{left} of {len(before)} maps show nothing and were left out" if left else ""
    return SanityCheck(method, len(telling), draws, curve, bound, note)


def overlay(image: AnyArray, relevance: FloatArray, top: float | None = None, alpha: float = 0.6) -> Overlay:
    """Lay relevance over an image in colour; of a volume, over the slice that holds most of it.

    What speaks against the class is not coloured. The colours run from 0 (black) to ``top`` (bright), and the higher,
    the less of the image shows through.

    Args:
        image: (channels, rows, columns) or (channels, slices, rows, columns), 0 to 1; 3 channels are colours, of any
            other number the middle one is shown. Where three channels are neighbouring slices hand the middle one over.
        relevance: the same without channels.
        top: relevance of the brightest colour; default: the largest there is.
        alpha: opacity of the brightest colour.

    Raises:
        ModelError: the map is not on the grid of the image.
    """
    if image.shape[1:] != relevance.shape:
        raise ModelError(f"A map of {relevance.shape} cannot lie on an image of {image.shape[1:]}.")
    positive = np.nan_to_num(np.maximum(relevance, 0), nan=0.0)
    number = None
    if positive.ndim == 3:
        number = int(positive.sum(axis=(1, 2)).argmax())
        image, positive = image[:, number], positive[number]
    shown = image if len(image) == 3 else np.repeat(image[len(image) // 2][None], 3, axis=0)
    high = float(positive.max()) if top is None else float(top)
    share = np.clip(positive / high, 0, 1) if high > 0 else np.zeros(positive.shape)
    colours = cv2.applyColorMap(np.rint(share * 255).astype(np.uint8), _PERCEPTUAL)[..., ::-1]
    opacity = (alpha * share)[..., None]
    under = np.clip(np.moveaxis(shown, 0, -1), 0, 1) * 255
    picture = np.rint(under * (1 - opacity) + colours * opacity).astype(np.uint8)
    return Overlay(picture, 0.0, high, number)


def thumbnail(picture: AnyArray, longest: int = THUMBNAIL) -> bytes:
    """Write a picture as PNG, no side longer than ``longest`` pixels; a smaller one keeps its size.

    Args:
        picture: (rows, columns, 3), uint8, red first.
    """
    factor = longest / max(picture.shape[:2])
    if factor < 1:
        rows, columns = (max(1, round(length * factor)) for length in picture.shape[:2])
        picture = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    return data.tobytes()


@contextmanager
def _evaluating(network: StagedNetwork) -> Iterator[None]:
    """Put a network into evaluation mode for a while, and every module's mode back."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _asked(images: Tensor, classes: Sequence[int]) -> Tensor:
    if len(images) != len(classes):
        raise ModelError(f"{len(images)} images are asked about {len(classes)} classes; one class each is wanted.")
    return torch.as_tensor(np.asarray(classes, dtype=np.int64))


def _chain(network: StagedNetwork) -> list[tuple[str, nn.Module]]:
    """Take the stages apart into the modules that they apply one after the other."""
    chain: list[tuple[str, nn.Module]] = []
    for name, stage in network.stages.items():
        chain += [(name, module) for module in (stage if isinstance(stage, nn.Sequential) else [stage])]
    return chain


def _through(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _place(network: StagedNetwork, image: Tensor, stage: str | None) -> _Place:
    """Choose the last map of a stage, or of all.

    Raises:
        ConfigError: there is none.
    """
    places = _places(network, image)
    chosen = [place for place in places if stage in (None, place.stage)]
    if chosen:
        return chosen[-1]
    names = ", ".join(dict.fromkeys(place.stage for place in places))
    if stage is None or not names:
        raise ConfigError("Nothing in this network has places in the image for Grad-CAM; explain by occlusion.")
    raise ConfigError(
        f"Stage '{stage}' has no map with places in the image for Grad-CAM. Name one of {names}, or explain by "
        "occlusion."
    )


def _places(network: StagedNetwork, image: Tensor) -> list[_Place]:
    """Find every map of the chain in whose places the image's can be seen again, by sending one image through."""
    from torchvision.ops.misc import Permute

    chain = _chain(network)
    last_turn = max((i for i, (_, module) in enumerate(chain) if isinstance(module, Permute)), default=-1)
    last_mixing = max((i for i, (_, module) in enumerate(chain) if _attends(module)), default=-1)
    patches: tuple[int, ...] = ()
    found = []
    with torch.no_grad():
        x = network.normalise(image)
        for number, (stage, module) in enumerate(chain):
            x = module(x)
            if isinstance(module, VitStem):
                kernel = module.conv_proj.kernel_size
                patches = tuple(length // side for length, side in zip(image.shape[2:], kernel, strict=True))
            grid, layout = _layout(x, network.dimensions, number < last_turn, patches)
            # adaptive pooling repeats places of a small map, and tokens that are no longer mixed have no say
            unheard = layout == "tokens" and number >= last_mixing
            if math.prod(grid) > 1 and not isinstance(module, nn.AdaptiveAvgPool2d) and not unheard:
                found.append(_Place(stage, number + 1, layout, grid))
    return [place for place in found if place.stage != HEAD]


def _attends(module: nn.Module) -> bool:
    return any(isinstance(part, nn.MultiheadAttention) for part in module.modules())


def _layout(x: Tensor, dimensions: int, turned: bool, patches: tuple[int, ...]) -> tuple[tuple[int, ...], Layout]:
    """Say over which places a tensor extends, and how it lies; without any it has an empty grid."""
    shape = tuple(x.shape[1:])
    if len(shape) == dimensions + 1:
        return (shape[:-1], "channels last") if turned else (shape[1:], "channels first")
    if len(shape) == 2 and patches and shape[0] == 1 + math.prod(patches):
        return patches, "tokens"
    return (), "channels first"


def _on_grid(x: Tensor, place: _Place) -> Tensor:
    """Lay a map out as (n, channels, ...)."""
    if place.layout == "channels last":
        return x.movedim(-1, 1)
    if place.layout == "tokens":
        return x[:, 1:].transpose(1, 2).reshape(len(x), -1, *place.grid)
    return x


def _corners(space: tuple[int, ...], edges: tuple[int, ...], steps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Lay patches over an image and beyond its ends, so that its edges are covered as often as its middle."""
    if not len(space) == len(edges) == len(steps) or min(*edges, *steps) < 1:
        raise ConfigError(f"A patch and a stride of 1 or more along each of {len(space)} axes are wanted.")
    if any(edge > length for edge, length in zip(edges, space, strict=True)):
        raise ConfigError(f"A patch of {edges} is larger than the image of {space}; make it smaller.")
    axes = [range(min(0, step - edge), length, step) for length, edge, step in zip(space, edges, steps, strict=True)]
    return list(itertools.product(*axes))


def _inside(corner: tuple[int, ...], edges: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(max(0, start), start + edge) for start, edge in zip(corner, edges, strict=True))


def _covered(image: Tensor, cover: Tensor, corners: Sequence[tuple[int, ...]], edges: tuple[int, ...]) -> Tensor:
    """Copy an image for each corner and cover one patch of each."""
    batch = image.expand(len(corners), *image.shape).clone()
    for row, corner in zip(batch, corners, strict=True):
        where = (slice(None), *_inside(corner, edges))
        row[where] = cover[where]
    return batch.contiguous(memory_format=torch.channels_last if image.ndim == 3 else torch.channels_last_3d)


def _spread(
    falls: FloatArray, corners: Sequence[tuple[int, ...]], edges: tuple[int, ...], space: tuple[int, ...]
) -> FloatArray:
    """Give each place the mean over the patches that cover it."""
    sums, counts = np.zeros(space), np.zeros(space)
    for fall, corner in zip(falls, corners, strict=True):
        where = _inside(corner, edges)
        sums[where] += fall
        counts[where] += 1
    mean: FloatArray = sums / np.maximum(counts, 1)  # a stride wider than the patch leaves places uncovered: 0
    return mean


def _means(images: Tensor) -> Tensor:
    return images.mean(tuple(range(2, images.ndim)), keepdim=True).expand_as(images)


def _blurred(images: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Blur along each axis by a Gaussian with this deviation; beyond the edge there is nothing to weigh."""
    for axis, width in enumerate(widths, 2):
        at = torch.arange(images.shape[axis], dtype=images.dtype, device=images.device)
        weights = torch.exp(-0.5 * ((at[:, None] - at) / width) ** 2)
        weights = weights / weights.sum(1, keepdim=True)
        images = (images.movedim(axis, -1) @ weights.T).movedim(-1, axis)
    return images


def _forget(stage: nn.Module, generator: torch.Generator) -> None:
    """Draw a stage's parameters anew; running statistics, which say how large its input is, stay."""
    with torch.no_grad():
        for parameter in stage.parameters():
            size = parameter.double().pow(2).mean().sqrt()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size.float().cpu())
        for module in stage.modules():
            if isinstance(module, NearestNeighbours):
                module.votes = module.votes[torch.randperm(len(module.votes), generator=generator)]


def _ranks(one: FloatArray) -> FloatArray:
    """Give the ranks of a map, around 0 and of length 1; all 0 where it shows nothing."""
    ranks: FloatArray = rankdata(one.ravel()).astype(np.float64)
    ranks -= ranks.mean()
    length = math.sqrt(float(ranks @ ranks))
    return ranks / length if length > 0 else ranks


def _correlation(one: FloatArray, other: FloatArray) -> float:
    return float(one @ other)
