"""The map's highest place lies in what alone decides the class, and a map that ignores what was learned is caught."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medtl.artifacts import read_record, write_record
from medtl.errors import ConfigError, ModelError
from medtl.model.explain import (
    check_sanity,
    grad_cam,
    log_odds,
    occlusion,
    overlay,
    spatial_stages,
    thumbnail,
)
from medtl.model.heads import NearestNeighbours
from medtl.model.io import build_network
from medtl.model.phases import stage_digest
from medtl.model.surgery import HEAD, ClassToken, Pool, StagedNetwork, VitStem
from medtl.progress import listening
from medtl.records import SanityCheck

SPACES = [(48, 48), (32, 80), (72, 40), (24, 32, 40)]
EXPLAIN: dict[str, Callable[..., Any]] = {"grad_cam": grad_cam, "occlusion": occlusion}
BLUR_AND_MEAN = [grad_cam, occlusion, partial(occlusion, baseline="mean")]


class Brightness(nn.Module):
    """Give a channel that sees what is bright and one that sees what is dark, at a quarter of the grid."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool by 4 and split around the middle."""
        pooled = (nn.functional.avg_pool2d if x.ndim == 4 else nn.functional.avg_pool3d)(x, 4)
        return torch.cat([pooled.relu(), (-pooled).relu()], 1)


def by_hand(dimensions: int) -> StagedNetwork:
    """Build a network that says class 1 for what is bright and class 0 for what is dark."""
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]) * 20)
        head.bias.zero_()
    stages = {"stem": nn.Sequential(Brightness(), Pool()), HEAD: nn.Sequential(head)}
    return StagedNetwork(stages, (0.5,), (0.25,), dimensions)


def planted(space: tuple[int, ...], seed: int, edge: int = 12, value: float = 1.0) -> tuple[Tensor, Any]:
    """Draw grey noise with one square (or cube) of another brightness, and the mark of where it is."""
    rng = np.random.default_rng(seed)
    image = 0.5 + 0.02 * rng.standard_normal((1, 1, *space)).astype(np.float32)
    where = tuple(slice(start, start + edge) for start in (int(rng.integers(0, n - edge + 1)) for n in space))
    image[(0, 0, *where)] = value
    mark = np.zeros(space, dtype=bool)
    mark[where] = True
    return torch.from_numpy(image), mark


def points_at(relevance: Any, mark: Any) -> bool:
    return bool(mark[np.unravel_index(relevance.argmax(), relevance.shape)])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("explain", BLUR_AND_MEAN)
def test_the_highest_place_lies_in_the_square_that_decides(explain: Callable[..., Any], space: Any) -> None:
    network = by_hand(len(space))
    for seed in range(4):
        image, mark = planted(space, seed)
        (relevance,) = explain(network, image, [1], "binary")
        assert relevance.shape == space
        assert points_at(relevance, mark)
        assert not points_at(-relevance, mark), "upside down must fail"


@pytest.mark.parametrize("explain", BLUR_AND_MEAN)
def test_what_is_bright_speaks_for_one_class_and_what_is_dark_for_the_other(explain: Callable[..., Any]) -> None:
    bright, mark = planted((48, 64), 5)
    dark, other = planted((48, 64), 6, value=0.0)
    both = torch.minimum(bright, dark) + torch.maximum(bright, dark) - 0.5  # the noise adds up, the squares stay
    for target, right, wrong in ((1, mark & ~other, other & ~mark), (0, other & ~mark, mark & ~other)):
        (relevance,) = explain(by_hand(2), both, [target], "binary")
        assert points_at(relevance, right)
        assert relevance[wrong].max() <= relevance.max() / 4


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("explain", BLUR_AND_MEAN)
def test_turning_the_image_turns_the_map(explain: Callable[..., Any], turn: int) -> None:
    image, _ = planted((48, 96), 7)
    (one,) = explain(by_hand(2), image, [1], "binary")
    (turned,) = explain(by_hand(2), image.rot90(turn, (2, 3)), [1], "binary")
    assert np.rot90(turned, -turn) == pytest.approx(one, abs=2e-3 * float(one.max()))


def squares(space: tuple[int, int], n: int, channels: int = 1, other: float = 0.0) -> tuple[Tensor, Tensor, Any]:
    """Draw images with a bright square, class 1, or a dark one (of 0.5: none), class 0."""
    drawn = [planted(space, 100 + i, value=1.0 if i % 2 else other) for i in range(n)]
    images = torch.cat([image for image, _ in drawn]).expand(-1, channels, -1, -1)
    return images, torch.arange(n) % 2, np.stack([mark for _, mark in drawn])


def trained(network: StagedNetwork, images: Tensor, targets: Tensor, steps: int = 40, rate: float = 5e-3) -> Any:
    optimiser = torch.optim.Adam(network.parameters(), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), targets).backward()
        optimiser.step()
    network.zero_grad(set_to_none=True)
    network.eval()
    assert (network(images).argmax(1) == targets).all()
    return network


@pytest.fixture(scope="module")
def convolutional() -> StagedNetwork:
    torch.manual_seed(0)
    stages = {
        "stem": nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU()),
        "block": nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), Pool()),
        HEAD: nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 2)),
    }
    images, targets, _ = squares((48, 48), 32)
    return trained(StagedNetwork(stages, (0.5,), (0.25,)), images, targets)


@pytest.fixture(scope="module")
def vit() -> StagedNetwork:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    source = VisionTransformer(48, 8, 2, 2, 16, 32)
    layers = source.encoder.layers
    stages = {
        "stem": VitStem(source),
        "blocks1": nn.Sequential(layers[0]),
        "blocks2": nn.Sequential(layers[1], source.encoder.ln, ClassToken()),
        HEAD: nn.Sequential(nn.Linear(16, 2)),
    }
    images, targets, _ = squares((48, 48), 64, 3, 0.5)
    return trained(StagedNetwork(stages, (0.5,) * 3, (0.25,) * 3), images, targets)


@pytest.fixture(scope="module")
def swin() -> StagedNetwork:
    from torchvision.models import SwinTransformer

    torch.manual_seed(0)
    source = SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0)
    stages = {
        "stem": nn.Sequential(source.features[0]),
        "stage1": nn.Sequential(source.features[1]),
        "stage2": nn.Sequential(source.features[2], source.features[3], source.norm, source.permute, Pool()),
        HEAD: nn.Sequential(nn.Linear(32, 2)),
    }
    images, targets, _ = squares((32, 64), 32, 3, 0.5)
    return trained(StagedNetwork(stages, (0.5,) * 3, (0.25,) * 3), images, targets)


@pytest.mark.parametrize("method", EXPLAIN)
def test_a_trained_network_is_explained_by_the_square(convolutional: StagedNetwork, method: str) -> None:
    images, targets, marks = squares((48, 80), 24)
    maps = EXPLAIN[method](convolutional, images, targets.tolist(), "binary")
    assert np.mean([points_at(one, mark) for one, mark in zip(maps, marks, strict=True)]) >= 0.9
    assert not any(points_at(-one, mark) for one, mark in zip(maps, marks, strict=True))


@pytest.mark.parametrize(
    ("kind", "space", "explain"),
    [
        ("vit", (48, 48), grad_cam),
        ("vit", (48, 48), occlusion),
        ("swin", (32, 64), partial(grad_cam, stage="stage1")),  # the last stage's few windows see everything everywhere
        ("swin", (32, 64), occlusion),
    ],
)
def test_tokens_are_laid_back_on_the_image_the_right_way_round(
    request: pytest.FixtureRequest, kind: str, space: tuple[int, int], explain: Callable[..., Any]
) -> None:
    images, _, marks = squares(space, 48, 3, 0.5)
    images, marks = images[1::2], marks[1::2]
    maps = explain(request.getfixturevalue(kind), images, [1] * len(images), "binary")

    def hit(maps: Any) -> float:
        return float(np.mean([points_at(one, mark) for one, mark in zip(maps, marks, strict=True)]))

    wrong = {
        "upside down": -maps,
        "mirrored": maps[:, :, ::-1],
        "head over": maps[:, ::-1],
        "turned": np.stack([cv2.resize(one.T, space[::-1], interpolation=cv2.INTER_NEAREST) for one in maps]),
    }
    assert hit(maps) >= 0.55
    assert max(hit(others) for others in wrong.values()) <= 0.3, {name: hit(others) for name, others in wrong.items()}


@pytest.mark.parametrize(
    ("name", "target", "space"),
    [
        ("monai_resnet10_narrow", "layer4", (32, 48)),
        ("squeezenet1_0", "fire9", (64, 96)),
        ("monai_resnet10_3d", "layer3", (32, 48, 40)),
    ],
)
def test_grad_cam_is_monais_the_right_way_up(name: str, target: str, space: tuple[int, ...]) -> None:
    from monai.visualize import GradCAM

    network = build_network(name, 32, 1, 3, 0.0, None, 0.9, 0)[0].eval()
    with torch.no_grad():
        network.stages[HEAD][-1].weight[2].abs_()  # so that there is something to see
    images = torch.rand(2, 1, *space, generator=torch.Generator().manual_seed(1))
    ours = grad_cam(network, images, [2, 2], "multilabel", stage=target)
    with warnings.catch_warnings():  # of PyTorch, about hooks on inputs without gradients
        warnings.simplefilter("ignore")
        theirs = GradCAM(network, f"stages.{target}.0", postprocessing=lambda x: x)(images, class_idx=2)
        flipped = GradCAM(network, f"stages.{target}.0")(images, class_idx=2)
    assert ours == pytest.approx(theirs[:, 0].detach().numpy(), abs=1e-6 + 1e-4 * float(ours.max()))
    assert np.corrcoef(ours[0].ravel(), flipped[0].detach().numpy().ravel())[0, 1] == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("space", [(32, 48), (24, 24, 32)])
def test_occlusion_is_what_monais_leaves_taken_from_the_whole(space: tuple[int, ...]) -> None:
    from monai.visualize import OcclusionSensitivity

    network = by_hand(len(space))
    image, _ = planted(space, 3, edge=10)
    ours = occlusion(network, image, [1], "binary", (8,) * len(space), (4,) * len(space), "mean")
    middle = tuple(slice(8, -8) for _ in space)  # ours covers the edges as often as the middle, MONAI's does not
    odds = OcclusionSensitivity(
        network, 8, mode="mean_img", overlap=0.5, verbose=False,
        activate=lambda x: torch.stack([log_odds(x, torch.full((len(x),), c), "binary") for c in (0, 1)], 1),
    )  # fmt: skip
    with warnings.catch_warnings():  # of PyTorch, about how MONAI indexes
        warnings.simplefilter("ignore")
        remaining = odds(image)[0][0, 1].numpy()
    with torch.no_grad():
        whole = float(log_odds(network(image), torch.tensor([1]), "binary"))
    assert ours[0][middle].any()
    assert ours[0][middle] == pytest.approx(whole - remaining[middle], abs=1e-4)


def test_a_shared_amount_on_all_logits_changes_no_map() -> None:
    image, _ = planted((48, 48), 1)
    network, shifted = by_hand(2), by_hand(2)
    with torch.no_grad():
        shifted.stages[HEAD][0].weight.add_(30.0)  # a softmax does not see it; Grad-CAM of one logit would
    for explain in EXPLAIN.values():
        assert explain(shifted, image, [1], "binary") == pytest.approx(
            explain(network, image, [1], "binary"), rel=1e-3, abs=1e-3
        )


def test_the_log_odds_are_those_of_the_probabilities() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classes = torch.tensor([0, 1, 2, 3, 1])
    chance = logits.softmax(1)[range(5), classes]
    assert log_odds(logits, classes, "multiclass") == pytest.approx(torch.logit(chance))
    assert log_odds(logits, classes, "multilabel") == pytest.approx(torch.logit(logits.sigmoid()[range(5), classes]))


def test_batches_do_not_change_maps_and_each_image_is_asked_about_its_own_class(convolutional: StagedNetwork) -> None:
    images, targets, _ = squares((48, 48), 5)
    for explain in EXPLAIN.values():
        together = explain(convolutional, images, targets.tolist(), "binary", batch_size=64)
        apart = [
            explain(convolutional, images[i : i + 1], [int(targets[i])], "binary", batch_size=3)[0] for i in range(5)
        ]
        assert together == pytest.approx(np.stack(apart), abs=1e-4 * float(together.max()))


@pytest.mark.parametrize(
    ("name", "size", "names"),
    [
        ("resnet18", 64, ("stem", "layer1", "layer2", "layer3", "layer4")),
        ("vgg11", 64, ("block1", "block2", "block3", "block4", "block5")),
        ("vit_b_32", 64, ("stem", "blocks1", "blocks2", "blocks3", "blocks4")),
        ("swin_t", 64, ("stem", "stage1", "stage2", "stage3", "stage4")),
    ],
)
def test_stages_with_places_in_the_image_are_named(name: str, size: int, names: tuple[str, ...]) -> None:
    network = build_network(name, size, 1, 2, 0.0, None, 0.9, 0)[0]
    assert spatial_stages(network, torch.zeros(1, 1, size, size)) == names


def test_adaptive_pooling_adds_no_places() -> None:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten(1))
    stages = {"stem": nn.Conv2d(1, 2, 3, 8), "pool": pool, HEAD: nn.Linear(2 * 49, 2)}
    assert spatial_stages(StagedNetwork(stages, (0.5,), (0.25,)), torch.zeros(1, 1, 24, 24)) == ("stem",)


def test_a_stage_can_be_chosen_and_is_finer_the_earlier_it_is(convolutional: StagedNetwork) -> None:
    images, _, _ = squares((48, 48), 2)
    early, late = (grad_cam(convolutional, images, [0, 1], "binary", stage=s) for s in ("stem", "block"))
    default = grad_cam(convolutional, images, [0, 1], "binary")
    assert np.array_equal(default, late)
    assert np.abs(np.diff(early, axis=2)).sum() / early.sum() > np.abs(np.diff(late, axis=2)).sum() / late.sum()


def test_what_grad_cam_cannot_explain_is_refused_and_occlusion_named(convolutional: StagedNetwork) -> None:
    images, _, _ = squares((48, 48), 1)
    with pytest.raises(ConfigError, match=r"'head' has no map .* Name one of stem, block, or explain by occlusion"):
        grad_cam(convolutional, images, [1], "binary", stage=HEAD)
    flat = StagedNetwork({"stem": nn.Flatten(1), HEAD: nn.Linear(48 * 48, 2)}, (0.5,), (0.25,))
    with pytest.raises(ConfigError, match="explain by occlusion"):
        grad_cam(flat, images, [1], "binary")
    assert occlusion(flat, images, [1], "binary").any()


def neighbours() -> StagedNetwork:
    network = by_hand(2)
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    votes = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    network.stages[HEAD] = nn.Sequential(NearestNeighbours(bank, votes, 3, False))
    return network


def test_a_head_of_neighbours_is_explained_by_occlusion_only() -> None:
    image, mark = planted((48, 48), 2)
    with pytest.raises(ConfigError, match="nearest neighbours; explain by occlusion"):
        grad_cam(neighbours(), image, [1], "binary")
    (relevance,) = occlusion(neighbours(), image, [1], "binary")
    assert points_at(relevance, mark)


@pytest.mark.parametrize("method", EXPLAIN)
def test_the_network_is_left_as_it_was(convolutional: StagedNetwork, method: str) -> None:
    convolutional.train()
    convolutional.stages["block"].eval()
    before = stage_digest(convolutional), [m.training for m in convolutional.modules()], torch.get_rng_state().tolist()
    images, targets, _ = squares((48, 48), 4)
    explain = partial(EXPLAIN[method], images=images, classes=targets.tolist(), task="binary")
    check_sanity(convolutional, explain, method, 0, draws=1)
    after = stage_digest(convolutional), [m.training for m in convolutional.modules()], torch.get_rng_state().tolist()
    assert after == before
    assert all(parameter.grad is None for parameter in convolutional.parameters())
    convolutional.eval()


@pytest.mark.parametrize("method", EXPLAIN)
def test_maps_of_a_trained_network_depend_on_what_it_learned(convolutional: StagedNetwork, method: str) -> None:
    images, targets, _ = squares((48, 48), 8)
    explain = partial(EXPLAIN[method], images=images, classes=targets.tolist(), task="binary")
    found = check_sanity(convolutional, explain, method, 0)
    assert [stage for stage, _ in found.correlations] == [HEAD, "block", "stem"]
    assert found.verdict == "depends on what was learned", found
    assert check_sanity(convolutional, explain, method, 0) == found
    assert check_sanity(convolutional, explain, method, 1) != found
    one_draw = check_sanity(convolutional, explain, method, 0, draws=1)
    assert [v for _, v in one_draw.correlations] != pytest.approx([v for _, v in found.correlations], abs=1e-6)


def test_an_edge_detector_that_looks_right_is_caught(convolutional: StagedNetwork) -> None:
    images, _, marks = squares((48, 48), 8)
    edges = np.abs(np.stack(np.gradient(images[:, 0].numpy(), axis=(1, 2)))).sum(axis=0)
    assert all(edges[i][marks[i]].mean() > edges[i][~marks[i]].mean() for i in range(8))  # it does look right
    found = check_sanity(convolutional, lambda _: edges, "edges", 0)
    assert [value for _, value in found.correlations] == pytest.approx([1.0] * 3)
    assert found.verdict == "does not depend on what was learned"


def test_votes_of_neighbours_are_forgotten_too() -> None:
    images = torch.cat([planted((24, 24), seed, 8)[0] for seed in range(3)])
    explain = partial(occlusion, images=images, classes=[1, 1, 1], task="binary")
    found = check_sanity(neighbours(), explain, "occlusion", 0, draws=8)
    assert dict(found.correlations)[HEAD] < 0.9


def test_without_maps_that_show_anything_sanity_is_not_estimable(convolutional: StagedNetwork) -> None:
    found = check_sanity(convolutional, lambda _: np.zeros((2, 8, 8)), "nothing", 0)
    assert (found.passed, found.verdict) == (None, "not estimable")
    assert found.note == "not estimable: no map shows anything"


def test_a_map_that_shows_nothing_afterwards_has_nothing_in_common(convolutional: StagedNetwork) -> None:
    first = iter([np.arange(9.0).reshape(1, 3, 3)])
    found = check_sanity(convolutional, lambda _: next(first, np.zeros((1, 3, 3))), "once", 0)
    assert [value for _, value in found.correlations] == [0.0] * 3


def test_maps_are_compared_by_their_ranks(convolutional: StagedNetwork) -> None:
    first = iter([np.arange(9.0).reshape(1, 3, 3)])
    found = check_sanity(convolutional, lambda _: next(first, np.exp(np.arange(9.0)).reshape(1, 3, 3)), "exp", 0)
    assert [value for _, value in found.correlations] == pytest.approx([1.0] * 3)


def test_the_sanity_check_is_read_back_in_its_order(tmp_path: Path) -> None:
    check = SanityCheck("occlusion", 8, 3, (("head", 0.4), ("fire9", 0.2), ("conv", None)), 0.5)
    write_record(tmp_path / "sanity.json", check)
    assert read_record(tmp_path / "sanity.json", SanityCheck) == check


def test_a_network_that_sees_nothing_has_a_map_that_shows_nothing() -> None:
    network = by_hand(2)
    with torch.no_grad():
        network.stages[HEAD][0].weight.zero_()
    image, _ = planted((48, 48), 0)
    for explain in EXPLAIN.values():
        assert not explain(network, image, [1], "binary").any()


def test_an_image_without_anything_in_it_has_no_relevance_by_rounding(convolutional: StagedNetwork) -> None:
    flat = torch.tensor([0.3, 1 / 3, 0.7])[:, None, None, None].expand(-1, 1, 48, 48)
    for baseline in ("blur", "mean"):
        assert not occlusion(convolutional, flat, [1, 1, 1], "binary", baseline=baseline).any()


@pytest.mark.parametrize(
    ("patch", "stride", "says"),
    [((50, 8), None, "larger than the image"), ((0, 8), None, "1 or more"), ((8, 8), (4,), "along each of 2 axes")],
)
def test_a_patch_that_cannot_be_laid_is_refused(patch: Any, stride: Any, says: str) -> None:
    image, _ = planted((48, 48), 0)
    with pytest.raises(ConfigError, match=says):
        occlusion(by_hand(2), image, [1], "binary", patch, stride)


def test_every_image_is_asked_about_one_class() -> None:
    image, _ = planted((48, 48), 0)
    with pytest.raises(ModelError, match="1 images are asked about 2 classes"):
        occlusion(by_hand(2), image, [1, 0], "binary")


def test_long_work_says_how_far_it_is() -> None:
    heard: list[tuple[str, int, int]] = []
    image, _ = planted((24, 24), 0)
    with listening(lambda *said: heard.append(said)):
        occlusion(by_hand(2), image.expand(2, -1, -1, -1), [1, 1], "binary")
    assert {step for step, _, _ in heard} == {"covering patches"}
    assert heard[-1][1] == heard[-1][2] == 2 * 13**2


def test_the_overlay_is_brightest_where_relevance_is_and_leaves_the_rest_of_the_image_alone() -> None:
    image, mark = planted((48, 64), 3)
    found = overlay(image[0].numpy(), mark * 2.5)
    assert (found.picture.shape, found.picture.dtype) == ((48, 64, 3), np.uint8)
    assert (found.low, found.high, found.slice) == (0.0, 2.5, None)
    grey = np.rint(np.clip(image[0, 0].numpy(), 0, 1) * 255)
    assert np.array_equal(found.picture[~mark], np.repeat(grey[~mark][:, None], 3, axis=1))
    assert (found.picture[mark][:, 0].astype(int) - found.picture[mark][:, 2]).min() > 0  # the bright end is yellow


def test_colours_are_monotone_in_brightness_and_keep_a_common_range() -> None:
    ramp = np.linspace(0, 1, 256)[None]
    shown = overlay(np.zeros((1, 1, 256)), ramp, alpha=1.0).picture[0] @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(shown) > -1).all() and shown[-1] > 200
    half = overlay(np.zeros((1, 1, 256)), ramp / 2, top=1.0)
    assert half.high == 1.0
    assert np.array_equal(half.picture[0, -1], overlay(np.zeros((1, 1, 256)), ramp, top=1.0).picture[0, 127])


def test_of_a_volume_the_slice_with_most_relevance_is_shown() -> None:
    volume, relevance = np.random.default_rng(0).random((1, 6, 8, 10)), np.zeros((6, 8, 10))
    relevance[4, 2:4, 3:5], relevance[1] = 1.0, -5.0
    found = overlay(volume, relevance)
    assert (found.slice, found.picture.shape) == (4, (8, 10, 3))


def test_colour_stays_colour_and_of_other_channels_the_middle_one_is_shown() -> None:
    image, nothing = np.random.default_rng(0).random((5, 4, 4)), np.zeros((4, 4))
    assert np.array_equal(overlay(image[:3], nothing).picture, np.rint(np.moveaxis(image[:3], 0, -1) * 255))
    assert np.array_equal(overlay(image, nothing).picture[..., 0], np.rint(image[2] * 255))


def test_a_map_that_shows_nothing_and_one_that_does_not_fit() -> None:
    found = overlay(np.full((1, 4, 4), 0.5), np.full((4, 4), -1.0))
    assert (found.high, len(np.unique(found.picture))) == (0.0, 1)
    with pytest.raises(ModelError, match="cannot lie on"):
        overlay(np.zeros((1, 4, 4)), np.zeros((4, 5)))


@pytest.mark.parametrize(("shape", "wanted"), [((320, 100), (160, 50)), ((90, 400), (36, 160)), ((28, 28), (28, 28))])
def test_a_thumbnail_is_small_the_right_way_round_and_the_same_bytes_again(shape: Any, wanted: Any) -> None:
    picture = np.zeros((*shape, 3), dtype=np.uint8)
    picture[: shape[0] // 2, :, 0], picture[:, : shape[1] // 2, 2] = 255, 255  # red above, blue left
    data = thumbnail(picture)
    assert data == thumbnail(picture.copy())
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert read.shape[:2] == wanted
    assert read[0, -1].tolist() == [255, 0, 0] and read[-1, 0].tolist() == [0, 0, 255]
