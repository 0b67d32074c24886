"""A release as one network: prepared images in, calibrated probabilities out; in torch and as an ONNX graph.

Everything that turns an image into a probability is in the graph: the scaling of the input, the network, softmax or
sigmoids, the vote of a volume's slices, the calibrator. From the logits on it computes in double precision, as medtl
does: in single precision a calibrator's ends cannot be told from 1. What is not in it is said in its metadata.

ONNX is an extra (``pip install 'medtl[onnx]'``). Nothing of the machine that wrote a graph is left in it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medtl.errors import MedtlError, ModelError
from medtl.model.heads import NearestNeighbours
from medtl.model.surgery import HEAD, StagedNetwork
from medtl.records import AnyArray, Calibrator, FloatArray, Plan

PROBABILITIES = "probabilities"
_SUREST = 1e-12  # as in medtl/evaluation/calibration.py
_LARGEST_BYTES = 2**31 - 2**24  # protobuf holds 2 GiB; the graph itself wants a little
_INSTEAD = "Export a bundle instead (--format bundle): it takes every network."


class AnsweringNetwork(nn.Module):
    """A network with all that follows it.

    Args:
        network: with its head.
        plan: the task, and how many slices vote.
        calibrator: fitted on validation.
    """

    def __init__(self, network: StagedNetwork, plan: Plan, calibrator: Calibrator) -> None:
        super().__init__()
        self.network = network.eval()
        self.multilabel = plan.task == "multilabel"
        self.slices = plan.slices
        self.calibrate = Calibration(calibrator)

    def forward(self, images: Tensor) -> Tensor:
        """Give probabilities.

        Args:
            images: 0 to 1, as :func:`prepared_shape` says.

        Returns:
            (n, classes), double.
        """
        rows = images.flatten(0, 1) if self.slices > 1 else images
        logits = self.network(rows).double()
        made = logits.sigmoid() if self.multilabel else logits.softmax(1)
        if self.slices > 1:
            made = made.unflatten(0, (-1, self.slices)).mean(1)
        calibrated: Tensor = self.calibrate(made)
        return calibrated


class Calibration(nn.Module):
    """A fitted calibrator as a module; the same as ``medtl.evaluation.calibration.apply``."""

    slopes: Tensor
    intercepts: Tensor

    def __init__(self, calibrator: Calibrator) -> None:
        super().__init__()
        self.task, self.method, self.temperature = calibrator.task, calibrator.method, calibrator.temperature
        self.register_buffer("slopes", torch.tensor(calibrator.slopes, dtype=torch.float64))
        self.register_buffer("intercepts", torch.tensor(calibrator.intercepts, dtype=torch.float64))
        self.curves = nn.ModuleList(_Curve(knots) for knots in calibrator.knots)

    def forward(self, made: Tensor) -> Tensor:
        """Calibrate probabilities, (n, classes), double."""
        if self.method == "none":
            return made
        if self.method == "temperature":
            if self.task == "multilabel":
                return (_log_odds(made) / self.temperature).sigmoid()
            return (made.clamp(min=_SUREST).log() / self.temperature).softmax(1)
        columns = made[:, 1:] if self.task == "binary" else made
        if self.method == "platt":
            told = (self.slopes * _log_odds(columns) + self.intercepts).sigmoid()
        else:
            told = torch.stack([curve(columns[:, place]) for place, curve in enumerate(self.curves)], 1)
        if self.task == "binary":
            return torch.cat([1 - told, told], 1)
        return told if self.task == "multilabel" else told / told.sum(1, keepdim=True)


class _Curve(nn.Module):
    """Straight lines between knots, level outside them; without knots, what comes in."""

    first: Tensor
    starts: Tensor
    widths: Tensor
    steps: Tensor

    def __init__(self, knots: tuple[tuple[float, float], ...]) -> None:
        super().__init__()
        before, after = torch.tensor(knots, dtype=torch.float64).reshape(-1, 2).T
        self.knots = len(knots)
        self.register_buffer("first", after[:1].clone())
        self.register_buffer("starts", before[:-1].clone())
        self.register_buffer("widths", before.diff())
        self.register_buffer("steps", after.diff())

    def forward(self, x: Tensor) -> Tensor:
        """Give the curve's height, (n,)."""
        if self.knots == 0:
            return x
        if self.knots == 1:
            return torch.zeros_like(x) + self.first
        passed = ((x[:, None] - self.starts) / self.widths).clamp(0, 1)
        return self.first + (passed * self.steps).sum(1)


class _FixedNeighbours(NearestNeighbours):
    """Nearest neighbours whose number is no longer a tensor: a graph must know it."""

    def __init__(self, head: NearestNeighbours) -> None:
        super().__init__(head.bank, head.votes, int(head.k), head.multilabel)
        self.bank = head.bank  # normalised already; once more would move its last bits
        del self.k
        self.k = int(head.k)  # type: ignore[assignment]


def input_name(plan: Plan) -> str:
    """Name the graph's input by what one of its rows is."""
    return "images" if plan.volumes is None else "volumes" if plan.volumes == "whole" else "slices"


def prepared_shape(plan: Plan) -> tuple[int, ...]:
    """Give the shape of one study in the graph's input, without the batch.

    (channels, rows, columns) of an image, (channels, depth, rows, columns) of a whole volume, (slices, channels, rows,
    columns) where slices vote.
    """
    space = plan.size if plan.depth is None else (plan.depth, *plan.size)
    return (*((plan.slices,) if plan.slices > 1 else ()), plan.channels, *space)


def as_input(packed: AnyArray, plan: Plan) -> FloatArray:
    """Turn packed rows into the graph's input.

    Args:
        packed: (studies * slices, ..., channels), uint8 or uint16.

    Returns:
        (studies, ...), float32, 0 to 1.
    """
    scaled = np.multiply(packed, np.float32(1.0 / np.iinfo(packed.dtype).max), dtype=np.float32)
    rows = np.moveaxis(scaled, -1, 1)
    return np.ascontiguousarray(rows.reshape(-1, *prepared_shape(plan)))


def hard_cases(plan: Plan, studies: int, seed: int) -> AnyArray:
    """Draw prepared studies that a graph is tried on: noise, black, white, half, a chequerboard, one bright point.

    Returns:
        (studies * slices, ..., channels), uint8 or uint16 as the plan says.
    """
    top, dtype = (255, np.uint8) if plan.bits == 8 else (65535, np.uint16)
    space = plan.size if plan.depth is None else (plan.depth, *plan.size)
    shape = (plan.slices, *space, plan.channels)
    rng = np.random.default_rng(seed)
    board = np.indices(shape).sum(0) % 2 * top
    point = np.zeros(shape)
    point[tuple(side // 2 for side in shape)] = top
    fixed = [np.zeros(shape), np.full(shape, top), np.full(shape, top // 2), board, point]
    drawn = (rng.integers(0, top, shape, endpoint=True) for _ in itertools.count())
    chosen = [case for pair in zip(drawn, fixed, strict=False) for case in pair]
    chosen += itertools.islice(drawn, max(0, studies - len(chosen)))
    return np.concatenate(chosen[:studies]).astype(dtype)


def as_graph(network: StagedNetwork, plan: Plan, calibrator: Calibrator, told: Mapping[str, str]) -> bytes:
    """Write a release as an ONNX graph with a free number of studies.

    Args:
        told: metadata of the graph.

    Raises:
        MedtlError: the extra is not installed.
        ModelError: torch cannot write the network so, or it is larger than a graph can be.
    """
    onnx = _extra("onnx")
    _extra("onnxscript")
    answering = AnsweringNetwork(_exportable(network), plan, calibrator).cpu()
    size = sum(p.nbytes for p in (*answering.parameters(), *answering.buffers()))
    if size > _LARGEST_BYTES:
        raise ModelError(f"The network takes {size / 1e9:.1f} GB, and an ONNX graph holds 2. {_INSTEAD}")
    example = torch.rand(2, *prepared_shape(plan), generator=torch.Generator().manual_seed(0))
    with _quiet():
        try:
            program = torch.onnx.export(
                answering,
                (example,),
                input_names=[input_name(plan)],
                output_names=[PROBABILITIES],
                dynamic_shapes=({0: torch.export.Dim("studies")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ModelError(f"torch cannot write this network as an ONNX graph. {_INSTEAD}") from error
    assert program is not None
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ModelError(f"torch fixes the number of studies in a graph of this network. {_INSTEAD}")
    _forget_the_machine(model)
    onnx.helper.set_model_props(model, dict(told))
    onnx.checker.check_model(model)
    written: bytes = model.SerializeToString(deterministic=True)
    return written


def ask_graph(graph: bytes, images: FloatArray) -> FloatArray:
    """Give what onnxruntime makes of prepared studies, (n, classes).

    Raises:
        MedtlError: the extra is not installed.
    """
    runtime = _extra("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found: FloatArray = session.run([PROBABILITIES], {session.get_inputs()[0].name: images})[0]
    return found


def _exportable(network: StagedNetwork) -> StagedNetwork:
    """Put a head that a graph can hold in the place of nearest neighbours; all else is shared."""
    stages = dict(network.stages.items())
    head = stages[HEAD]
    if not any(isinstance(module, NearestNeighbours) for module in head.modules()):
        return network
    assert isinstance(head, nn.Sequential)
    stages[HEAD] = nn.Sequential(*(_FixedNeighbours(m) if isinstance(m, NearestNeighbours) else m for m in head))
    fixed = StagedNetwork(stages, (0.0,), (1.0,), network.dimensions)
    fixed.mean, fixed.std = network.mean, network.std
    return fixed.eval()


def _forget_the_machine(model: Any) -> None:
    """Take out what the exporter notes of source files and their paths."""
    parts = [model.graph, *model.functions, *(node for node in model.graph.node)]
    parts += [node for function in model.functions for node in function.node]
    parts += [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    model.doc_string = ""


def _extra(name: str) -> Any:
    """Import a package of the extra.

    Raises:
        MedtlError: it is not there.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MedtlError(f"ONNX wants the package {name}. Install it: pip install 'medtl[onnx]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about itself from a person who can do nothing about them."""
    loud = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)


def _log_odds(made: Tensor) -> Tensor:
    kept = made.clamp(_SUREST, 1 - _SUREST)
    return (kept / (1 - kept)).log()
