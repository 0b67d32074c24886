"""A release as one graph: whatever the task, the head and the calibrator, onnxruntime answers as medtl does."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medtl.dataset.loading import voted
from medtl.errors import MedtlError, ModelError
from medtl.evaluation.calibration import apply
from medtl.model.fit import put_head
from medtl.model.heads import NearestNeighbours
from medtl.model.onnx import Calibration, as_graph, as_input, ask_graph, hard_cases, prepared_shape
from medtl.model.predict import predict
from medtl.model.surgery import ClassToken, Pool, StagedNetwork, VitStem, cut, source_network
from medtl.records import Calibrator, FloatArray, Plan, Task

CLASSES = ("none", "benign", "malignant")
STEEP = ((0.0, 0.1), (0.3, 0.2), (0.300001, 0.7), (1.0, 0.95))
PLAIN = Calibrator("multiclass", "none", "")


def plan_for(
    task: Task = "multiclass", slices: int = 1, channels: int = 1, depth: int | None = None, bits: int = 8
) -> Plan:
    shown = "whole" if depth else "slices" if slices > 1 else None
    classes = CLASSES[1:] if task == "binary" else CLASSES
    return Plan(
        task, classes, (32, 32), channels, bits, "per_image", None, None, (0.5, 99.5), {}, {}, shown,
        "axial" if shown else None, slices, (channels - 1) // 2, depth,
    )  # fmt: skip


def network_for(plan: Plan, name: str | None = None) -> StagedNetwork:
    """Give a row of the table of backbones, or two layers, with a head that has an opinion."""
    torch.manual_seed(0)
    head = nn.Linear(6, len(plan.classes))
    stem = nn.Sequential(nn.Conv2d(plan.channels, 6, 3, stride=2), nn.ReLU(), Pool())
    network = StagedNetwork({"stem": stem, "head": nn.Sequential(nn.Dropout(0.5), head)}, (0.4,), (0.2,))
    if name is not None:
        network = cut(source_network(name, 32), name, plan.channels, len(plan.classes), 0.0)
    for parameter in network.stages["head"].parameters():
        nn.init.normal_(parameter, std=2.0 if name is None else 0.5)
    return network.eval()


def apart(network: StagedNetwork, plan: Plan, calibrator: Calibrator, graph: bytes) -> float:
    """Give the largest difference between onnxruntime and medtl's own way, over several batch sizes."""
    cases, worst = hard_cases(plan, 10, 3), 0.0
    for batch in np.split(cases, np.array([1, 3]) * plan.slices):
        shown = [(batch, np.full((len(batch), len(plan.classes)), np.nan))]
        wanted = apply(calibrator, voted(predict(network, shown, plan.task, torch.device("cpu")), plan.slices))
        found = ask_graph(graph, as_input(batch, plan))
        assert found.shape == wanted.shape and found.dtype == np.float64
        worst = max(worst, float(np.abs(found - wanted).max()))
    return worst


@pytest.mark.parametrize(
    ("plan", "calibrator"),
    [
        (plan_for("binary"), Calibrator("binary", "platt", "", slopes=(1.5,), intercepts=(-0.2,))),
        (plan_for("multiclass", bits=16), Calibrator("multiclass", "temperature", "", temperature=2.2)),
        (plan_for("multilabel"), Calibrator("multilabel", "isotonic", "", knots=(STEEP, (), ((0.5, 0.4),)))),
        (plan_for("binary", slices=3, channels=3), Calibrator("binary", "isotonic", "", knots=(STEEP,))),
    ],
    ids=["platt", "temperature", "isotonic", "slices-that-vote"],
)
def test_onnxruntime_answers_as_medtl_does(plan: Plan, calibrator: Calibrator) -> None:
    network = network_for(plan)
    graph = as_graph(network, plan, calibrator, {})
    assert apart(network, plan, calibrator, graph) < 1e-5
    other = Calibrator(plan.task, "temperature", "", temperature=0.7)
    assert apart(network, plan, other, graph) > 1e-3, "the calibrator is in the graph"


def test_nearest_neighbours_fit_into_a_graph() -> None:
    plan = plan_for()
    network = network_for(plan)
    put_head(network, NearestNeighbours(torch.rand(20, 6), torch.eye(3).repeat(7, 1)[:20], 5, False))
    assert apart(network, plan, PLAIN, as_graph(network, plan, PLAIN, {})) < 1e-5


@pytest.mark.parametrize(
    ("name", "plan"), [("monai_resnet10_narrow", plan_for()), ("monai_resnet10_3d", plan_for(depth=32))]
)
def test_backbones_of_images_and_of_whole_volumes_fit_into_a_graph(name: str, plan: Plan) -> None:
    network = network_for(plan, name)
    assert prepared_shape(plan) == ((1, 32, 32) if plan.depth is None else (1, 32, 32, 32))
    assert apart(network, plan, PLAIN, as_graph(network, plan, PLAIN, {})) < 1e-5


def test_a_transformer_fits_into_a_graph_whatever_the_number_of_studies() -> None:
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16)
    vit.conv_proj = nn.Conv2d(1, 8, 16, 16)
    last = nn.Sequential(vit.encoder.layers, vit.encoder.ln, ClassToken())
    network = StagedNetwork({"stem": VitStem(vit), "blocks": last, "head": nn.Linear(8, 3)}, (0.5,), (0.3,)).eval()
    assert apart(network, plan_for(), PLAIN, as_graph(network, plan_for(), PLAIN, {})) < 1e-5


def test_a_network_that_counts_its_images_is_refused() -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) * len(x)

    stages = {"stem": nn.Conv2d(1, 4, 3), "last": Counting(), "head": nn.Linear(4, 3)}
    with pytest.raises(ModelError, match="--format bundle"):
        as_graph(StagedNetwork(stages, (0.5,), (0.3,)), plan_for(), PLAIN, {})


def test_a_graph_says_what_it_is_and_nothing_of_the_machine() -> None:
    import onnx

    plan = plan_for()
    graph = as_graph(network_for(plan), plan, PLAIN, {"release": "r-1"})
    assert graph == as_graph(network_for(plan), plan, PLAIN, {"release": "r-1"}), "the same bytes each time"
    model = onnx.load_model_from_string(graph)
    assert [(one.key, one.value) for one in model.metadata_props] == [("release", "r-1")]
    (named,) = model.graph.input
    assert (named.name, named.type.tensor_type.shape.dim[0].dim_param) == ("images", "studies")
    for trace in (str(Path.cwd()), "site-packages", "forward", ".py"):
        assert trace.encode() not in graph, trace


chance = st.floats(0, 1)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.sampled_from(["binary", "multiclass", "multilabel"]),
    st.lists(st.tuples(chance, chance, chance), min_size=1, max_size=5),
    st.lists(chance, min_size=1, max_size=6, unique=True),
    st.floats(0.05, 20),
)
def test_the_module_calibrates_as_the_calibrator_does(
    task: Task, rows: list[tuple[float, ...]], before: list[float], number: float
) -> None:
    made: FloatArray = np.array(rows) + 1e-9
    if task != "multilabel":
        made = made[:, : 2 if task == "binary" else 3]
        made = made / made.sum(1, keepdims=True)
    made = np.clip(made, 0, 1)
    count = 1 if task == "binary" else made.shape[1]
    after = np.linspace(0.1, 0.9, len(before))
    knots = tuple(zip(sorted(before), after.tolist(), strict=True))
    for calibrator in (
        Calibrator(task, "none", ""),
        Calibrator(task, "temperature", "", temperature=number),
        Calibrator(task, "platt", "", slopes=(number,) * count, intercepts=(0.3,) * count),
        Calibrator(task, "isotonic", "", knots=(knots,) * count),
    ):
        told = Calibration(calibrator)(torch.from_numpy(made)).numpy()
        assert told == pytest.approx(apply(calibrator, made), abs=1e-9), calibrator.method


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_extra_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MedtlError, match=r"pip install 'medtl\[onnx\]'"):
        as_graph(network_for(plan_for()), plan_for(), PLAIN, {})
