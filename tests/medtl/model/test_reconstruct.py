"""Blocks are hidden and filled in: what is hidden cannot be seen, it alone counts, and stopping changes nothing."""

from __future__ import annotations

import copy
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from medtl.config import ModelConfig, ReconstructConfig
from medtl.model.devices import make_deterministic
from medtl.model.io import FolderSaver, build_network
from medtl.model.reconstruct import (
    WATCHED,
    HiddenPatches,
    explained,
    hidden_blocks,
    hide,
    loss_of_hidden,
    model_to_pretrain,
    plan_of_values,
    transferable,
)
from medtl.model.segment_fit import SegmentMaterial, fit_segmenter
from medtl.model.segmenter import SegmenterNetwork, build
from medtl.model.trainer import Progress
from medtl.model.vault import WeightsFile
from medtl.model.weights import stored_form
from medtl.records import FloatArray, GridPlan, Structure

PLAN = GridPlan(
    structures=(Structure("square", (1,)), Structure("stripe", (2,))), ignore=None, dimensions=2, axis=None,
    neighbours=0, channels=1, spacing_mm=None, intensity="zscore", low=None, high=None, mean=None, std=None,
    landmarks=(), patch=(16, 16), batch_size=4, strides=((1, 1), (2, 2), (2, 2)), kernels=((3, 3),) * 3,
    filters=(4, 8, 16), mirror=(), facts={}, reasons={},
)  # fmt: skip
VALUES = plan_of_values(PLAN)
CPU = torch.device("cpu")


class Waves:
    """Smooth waves, which what is shown of them foretells."""

    def __len__(self) -> int:
        return 3

    def step(self, phase: int, epoch: int, step: int, augmented: bool) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([phase, epoch, step])
        rows, columns = np.mgrid[:16, :16] / 16 * np.pi
        images = [np.sin(rows * rng.uniform(0.5, 1) + rng.uniform(0, 6)) + columns * rng.normal() for _ in range(4)]
        return torch.from_numpy(np.stack(images)[:, None].astype(np.float32)), torch.zeros(4, 16, 16, dtype=torch.uint8)


def hidden_waves(config: ReconstructConfig | None = None) -> HiddenPatches:
    return HiddenPatches(Waves(), config or ReconstructConfig(blocks=4), 0)


def model(epochs: int = 6, **options: Any) -> ModelConfig:
    given = {"precision": "fp32", "device": "cpu", "save_every_s": 0.0, "segmenter": {"validate_every": 1}, **options}
    return model_to_pretrain(ModelConfig(reconstruct={"epochs": epochs, "lr": 0.02, "blocks": 4}, **given))


class Memory:
    """Keep progress; optionally stop after some saves, as a kill would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.progress: Progress | None = None
        self.left = stop_after

    def load(self) -> Progress | None:
        return self.progress

    def save(self, progress: Progress) -> None:
        self.progress = copy.deepcopy(progress)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def pretrain(saver: Any, epochs: int = 6, kind: Any = "l2") -> tuple[Any, Any, dict[str, Tensor]]:
    make_deterministic(0, 1)
    network, _ = build(VALUES, model(epochs), 0, None)

    def validate(trained: SegmenterNetwork) -> FloatArray:
        return np.array([[explained(trained, hidden_waves().held_out(), CPU, "fp32")]])

    material = SegmentMaterial(hidden_waves(), validate, lambda new, old: 1.0, loss_of_hidden(kind), WATCHED)
    phases, history = fit_segmenter(network, material, VALUES, model(epochs), 0, saver)
    return phases, history, network.state_dict()


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    patch=st.lists(st.integers(8, 40), min_size=2, max_size=3),
    share=st.floats(0.01, 0.99),
    blocks=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_whole_blocks_are_hidden_as_many_as_wanted(patch: list[int], share: float, blocks: int, seed: int) -> None:
    config = ReconstructConfig(hidden=share, blocks=blocks)
    codes = hidden_blocks(np.random.default_rng(seed), tuple(patch), config)
    assert codes.shape == tuple(patch) and set(np.unique(codes)) == {0, 1}
    sides = [max(4, -(-n // blocks)) for n in patch]
    firsts = codes[tuple(slice(None, None, side) for side in sides)]
    assert abs(firsts.sum() - share * firsts.size) <= 1
    whole = firsts
    for axis, side in enumerate(sides):
        whole = whole.repeat(side, axis)
    np.testing.assert_array_equal(whole[tuple(slice(0, n) for n in patch)], codes)


def test_what_is_hidden_follows_from_the_place_in_training_alone() -> None:
    one, other = hidden_waves().step(0, 3, 1, True), hidden_waves().step(0, 3, 1, True)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    later = hidden_waves().step(0, 3, 2, True)[1]
    assert not torch.equal(one[1], later) and not torch.equal(one[1][0], one[1][1])
    held, again = hidden_waves().held_out(), hidden_waves().held_out()
    assert torch.equal(held[0], again[0]) and torch.equal(held[1], again[1])


def test_nothing_of_what_is_hidden_reaches_the_network() -> None:
    images, codes = hidden_waves().step(0, 0, 0, False)
    other = torch.where(codes.unsqueeze(1) == 1, images + 100, images)
    assert torch.equal(hide(images, codes), hide(other, codes))
    shown = (codes == 0).unsqueeze(1)
    assert torch.equal(hide(images, codes)[shown], images[shown])
    mean = images[0, 0][codes[0] == 0].mean()
    torch.testing.assert_close(hide(images, codes)[0, 0][codes[0] == 1], mean.expand(int(codes[0].sum())))


@pytest.mark.parametrize(("kind", "wanted"), [("l2", 4.0), ("l1", 2.0)])
def test_the_loss_is_of_hidden_voxels_alone(kind: Any, wanted: float) -> None:
    images, codes = hidden_waves().step(0, 0, 0, False)
    hidden = (codes == 1).unsqueeze(1)
    told = torch.where(hidden, images + 2, images + 50).requires_grad_()
    loss = loss_of_hidden(kind)(lambda seen: told, images, codes)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert told.grad is not None and not told.grad[~hidden].any() and told.grad[hidden].all()


def test_the_explained_share_is_one_for_all_and_nought_for_the_mean() -> None:
    images, codes = hidden_waves().held_out()
    network = build(VALUES, model(), 0, None)[0].eval()
    hidden = (codes == 1).unsqueeze(1)

    def share(told: Tensor) -> float:
        network.forward = lambda *_: told  # type: ignore[method-assign]
        return explained(network, (images, codes), CPU, "fp32")

    assert share(images) == pytest.approx(1)
    assert share(torch.full_like(images, float(images[hidden].mean()))) == pytest.approx(0, abs=1e-6)
    assert share(images + 100) < -10
    assert np.isnan(explained(network, (torch.ones_like(images), codes), CPU, "fp32"))


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_a_network_learns_to_fill_in(kind: Any) -> None:
    phases, history, _ = pretrain(Memory(), 40, kind)
    assert phases[0].monitor == WATCHED and phases[0].watched is not None and phases[0].watched > 0.3
    assert phases[0].val_loss == pytest.approx(1 - phases[0].watched)
    assert history[-1].train_loss < 0.6 * history[0].train_loss


@pytest.mark.parametrize("saves", [1, 4, 9])
def test_pretraining_stopped_anywhere_ends_with_the_same_bits(saves: int, tmp_path: Path) -> None:
    _, whole_history, whole = pretrain(Memory())
    stopped = Memory(stop_after=saves)
    with pytest.raises(KeyboardInterrupt):
        pretrain(stopped)
    assert stopped.progress is not None
    FolderSaver(tmp_path).save(stopped.progress)
    _, history, resumed = pretrain(FolderSaver(tmp_path))
    assert history == whole_history
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize("network", ["dynunet", "unet", "segresnet"])
def test_a_segmentation_starts_from_all_but_the_output(network: str, tmp_path: Path) -> None:
    settings = model(segmenter={"network": network})
    state = build(VALUES, settings, 1, None)[0].state_dict()
    kept = transferable(state, PLAN, settings, network)
    left = set(state) - set(kept)
    assert left and sum(state[key].numel() for key in left) < 0.1 * sum(v.numel() for v in state.values())
    save_file(stored_form(kept), tmp_path / "kept.safetensors")
    weights = WeightsFile(tmp_path / "kept.safetensors", "0" * 64, "vault:kept", network=network)
    study = ModelConfig(weights="vault:kept", segmenter={"network": network, "deep_supervision": False})
    ours, report = build(PLAN, study, 0, weights)
    assert set(report.missing) == left and report.share > 0.9
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in kept.items())


def test_an_encoder_starts_a_segmentation_of_its_own_kind(tmp_path: Path) -> None:
    """The mean and deviation of the input lie among the weights, and belong to no stage."""
    settings = model(segmenter={"network": "encoder_unet"}, backbone="shufflenet_v2_x0_5")
    plan = replace(PLAN, patch=(32, 32), channels=3)
    network, _ = build(plan_of_values(plan), settings, 1, None)
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    kept = transferable(network.state_dict(), plan, settings, network.kind)
    save_file(stored_form(kept), tmp_path / "kept.safetensors")
    weights = WeightsFile(tmp_path / "kept.safetensors", "0" * 64, "vault:kept", network="shufflenet_v2_x0_5")
    study = ModelConfig(weights="vault:kept", backbone="shufflenet_v2_x0_5")
    ours, report = build(plan, study, 0, weights)
    assert report.share == 1.0 and report.layout == "medtl"
    stem = "stages.stem.0.0.weight"
    assert torch.equal(ours.state_dict()[stem], kept[stem])
    _, report = build_network("shufflenet_v2_x0_5", 64, 3, 2, 0.0, weights, 0.9, 0)  # and a diagnosis
    assert report.share == 1.0


def test_pretraining_starts_from_nothing_and_gives_one_output_for_each_channel() -> None:
    settled = model_to_pretrain(ModelConfig(weights="vault:mine", phases="staged", reconstruct={"epochs": 7}))
    assert settled.origin == "none" and not settled.segmenter.deep_supervision
    assert [(phase.unfreeze, phase.epochs) for phase in settled.schedule] == [("all", 7)]
    assert [plan_of_values(replace(PLAN, channels=n)).outputs for n in (1, 3)] == [1, 3]


def _in_a_process(rank: int, place: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    _, history, state = pretrain(Memory(), 2)
    results.put((rank, [e.train_loss for e in history], {k: v.numpy() for k, v in state.items()}))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_pretrain_as_one(tmp_path: Path) -> None:
    _, history, whole = pretrain(Memory(), 2)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_in_a_process, args=(r, str(tmp_path / "meet"), results)) for r in range(2)]
    for process in processes:
        process.start()
    found = {rank: (losses, state) for rank, losses, state in (results.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert found[0][0] == pytest.approx([e.train_loss for e in history], rel=1e-4)
    for key, value in whole.items():
        np.testing.assert_allclose(found[0][1][key], value.numpy(), rtol=2e-2, atol=2e-3)
        np.testing.assert_array_equal(found[0][1][key], found[1][1][key])
