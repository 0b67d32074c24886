"""Features are computed once; the hints agree with their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch import nn

from medtl.model import cache
from medtl.model.features import describe, features_of, gaussian_distances, logme, seconds_per_image, source_distance
from medtl.model.io import FolderActivations, build_network
from medtl.model.surgery import HEAD, StagedNetwork

CPU = torch.device("cpu")
PIXELS = np.random.default_rng(0).integers(0, 256, (14, 24, 24, 1), dtype=np.uint8)
ROWS = np.array([0, 2, 3, 5, 7, 8, 9, 11, 13])


def network(name: str = "monai_resnet10_narrow", size: int = 24) -> StagedNetwork:
    return build_network(name, size, 1, 2, 0.0, None, 0.9, 0)[0].eval()


def features(of: StagedNetwork, store: FolderActivations, rows: Any = ROWS, name: str = "pack") -> Any:
    return features_of(of, PIXELS, rows, 4, CPU, "fp32", store, name)


def test_features_are_what_enters_the_head(tmp_path: Path) -> None:
    net = network()
    found = features(net, FolderActivations(tmp_path, 10))
    with torch.no_grad():
        images = net.normalise(cache.to_images(PIXELS[ROWS], CPU))
        direct = net.run(images, 0, len(net.stages) - 1)
    assert found.dtype == np.float32
    assert found == pytest.approx(direct.numpy(), abs=1e-5)


def test_a_picture_is_described_by_the_means_of_two_levels_whoever_is_beside_it() -> None:
    net = network().train()
    pictures = np.random.default_rng(1).integers(0, 256, (35, 24, 24, 1), dtype=np.uint8)
    found = describe(net, pictures, CPU)
    assert found == pytest.approx(np.vstack([describe(net, one[None], CPU) for one in pictures]), abs=1e-5)
    assert describe(net, pictures, CPU).tobytes() == found.tobytes()
    with torch.no_grad():
        x = net.normalise(cache.to_images(pictures, CPU))
        levels = [net.run(x, 0, 4).mean((2, 3)).numpy(), net.run(x, 0, 5).numpy()]
    assert found == pytest.approx(np.hstack([v / np.linalg.norm(v, axis=1, keepdims=True) for v in levels]), abs=1e-5)


def test_a_second_call_runs_the_trunk_on_nothing_but_one_image(tmp_path: Path) -> None:
    net, seen = network(), []
    first = features(net, FolderActivations(tmp_path, 10))
    next(iter(net.stages.values())).register_forward_hook(lambda *_: seen.append(1))
    again = features(net, FolderActivations(tmp_path, 10))
    assert (len(seen), again.tobytes()) == (1, first.tobytes())


def test_other_rows_pixels_or_weights_are_other_features(tmp_path: Path) -> None:
    net, store = network(), FolderActivations(tmp_path, 10)
    features(net, store)
    features(net, store, ROWS[:5])
    features(net, store, name="another pack")
    with torch.no_grad():
        next(net.parameters()).add_(0.1)
    features(net, store)
    assert len(list(tmp_path.iterdir())) == 4


def test_without_room_features_are_the_same_and_nothing_is_kept(tmp_path: Path) -> None:
    kept = features(network(), FolderActivations(tmp_path / "a", 10))
    live = features(network(), FolderActivations(tmp_path / "b", 0.0))
    assert live.tobytes() == kept.tobytes()
    assert not list((tmp_path / "b").iterdir())


def test_the_time_of_an_image_is_more_than_none() -> None:
    assert 0 < seconds_per_image(network(), PIXELS[:4], 4, CPU, "fp32") < 10


def test_the_distance_is_frechets_of_full_matrices_that_happen_to_be_diagonal() -> None:
    rng = np.random.default_rng(1)
    m1, m2 = rng.normal(size=(2, 5))
    v1, v2 = rng.uniform(0.1, 3, size=(2, 5))
    full = ((m1 - m2) ** 2).sum() + np.trace(np.diag(v1) + np.diag(v2) - 2 * sqrtm(np.diag(v1 * v2)).real)
    assert gaussian_distances(m1, v1, m2, v2).sum() == pytest.approx(full)


def trained_like(net: StagedNetwork, shift: float = 0.0) -> nn.Module:
    """Give the last BatchNorm the statistics of its input on the images, off by some of its deviations."""
    layers = [m for n, s in net.stages.items() if n != HEAD for m in s.modules() if isinstance(m, nn.BatchNorm2d)]
    last, given = layers[-1], []
    handle = last.register_forward_pre_hook(lambda _, x: given.append(x[0].double()))
    with torch.no_grad():
        net.run(net.normalise(cache.to_images(PIXELS[ROWS], CPU)), 0, len(net.stages) - 1)
        handle.remove()
        values = given[0].movedim(1, -1).flatten(0, -2)
        variance = values.var(0, correction=0)
        last.running_mean.copy_(values.mean(0) + shift * (variance + last.eps).sqrt())
        last.running_var.copy_(variance)
    return last


@pytest.mark.parametrize(("shift", "per_channel"), [(0.0, 0.0), (2.0, 4.0)])
def test_the_distance_to_the_source_counts_in_its_deviations(shift: float, per_channel: float) -> None:
    net = network()
    last = trained_like(net, shift)
    found = source_distance(net, PIXELS, ROWS, 4, CPU)
    assert found is not None
    assert found.per_channel == pytest.approx(per_channel, abs=1e-4)
    assert found.frechet == pytest.approx(per_channel * float((last.running_var + last.eps).sum()), rel=1e-3, abs=1e-4)
    assert found.images == len(ROWS)


def test_without_batchnorm_the_distance_is_not_estimable() -> None:
    assert source_distance(network("squeezenet1_0", 32), PIXELS.repeat(2, 1).repeat(2, 2), ROWS, 4, CPU) is None


def evidence(x: Any, y: Any) -> float:
    """Maximise the marginal likelihood itself, with the covariance written out."""

    def against(logs: Any) -> float:
        covariance = x @ x.T / np.exp(logs[0]) + np.eye(len(y)) / np.exp(logs[1])
        return -float(multivariate_normal.logpdf(y, np.zeros(len(y)), covariance))

    return -minimize(against, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}).fun / len(y)


@pytest.mark.parametrize("width", [4, 60])
def test_logme_is_the_greatest_evidence_of_a_linear_model(width: int) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(40, width))
    y = (x[:, 0] + rng.normal(size=40) > 0).astype(np.float64)
    targets = np.stack([1 - y, y], axis=1)
    direct = (evidence(x, 1 - y) + evidence(x, y)) / 2
    assert logme(x, targets) == pytest.approx(direct, abs=2e-4)


def test_logme_leaves_out_what_is_unknown_and_labels_of_one_kind() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 3)), (np.arange(30) % 2).astype(np.float64)
    with_gaps = np.where(np.arange(30) < 10, np.nan, y)
    both = np.stack([y, with_gaps, np.zeros(30)], axis=1)
    parts = [logme(x, y[:, None]), logme(x[10:], y[10:, None])]
    assert logme(x, both) == pytest.approx(np.mean(parts))
    assert logme(x, np.zeros((30, 1))) is None
