"""A release leaves medtl: as a parcel for another workspace, as an ONNX graph, or as a MONAI bundle.

A graph is held against ``medtl predict``'s own way from prepared images to probabilities before it gets its name.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from medtl import __version__
from medtl.artifacts import file_digest, read_record, storage_errors
from medtl.config import Config
from medtl.errors import ConfigError, GateRefused, ModelError, StorageError
from medtl.records import AnyArray, Calibrator, FloatArray, Plan, Release
from pipelines.examination import CALIBRATOR

if TYPE_CHECKING:
    from medtl.model.surgery import StagedNetwork
    from medtl.registry.io import Entry, Register

Form = Literal["parcel", "onnx", "bundle"]
TOLERANCE = 1e-4  # of a probability
_BATCHES = (1, 2, 8)  # studies at once that a graph is tried with
_NEVER_ALONE = ("refused", "retired")
_LEFT = (
    "Preparing scans as the plan says (medtl/dataset/transforms.py); the decision at the operating points; when not to "
    "answer and what is unlike training (conformal.json, novelty.json of the release). Not a medical device."
)


def export(register: Register, entry: Entry, out: Path, form: Form, config: Config | None) -> str:
    """Write a release in a form that is wanted elsewhere; enter it on the trail; give its sha256.

    Args:
        config: of a bundle: how scans are read.

    Returns:
        The sha256 of the file; of a bundle that of its SHA256SUMS.

    Raises:
        GateRefused: it was refused or retired, and would run without a register that knows.
        ModelError: a graph would not answer as medtl does, or it is a segmentation.
        StorageError: ``out`` is there already or cannot be written.
        TamperedError: the release is not what was entered.
    """
    from medtl.registry import parcel
    from pipelines.bundle import write_bundle

    release, folder = entry.release, register.open(entry)
    if form != "parcel":
        _require_fit(release, folder)
    if form == "parcel":
        sha256 = parcel.pack(folder, out)
    elif form == "onnx":
        sha256 = write_graph(folder, release.status, out)
    elif config is None:
        raise ConfigError("A bundle reads scans by itself, as the run's config says. Name it: --config CONFIG.")
    else:
        sha256 = write_bundle(folder, release, config, out)
    register.trail.append("release.exported", release.release_id, details={"sha256": sha256, "format": form})
    return sha256


def _require_fit(release: Release, folder: Path) -> None:
    """Refuse what may not run by itself, or what the other forms cannot hold."""
    from medtl.model.io import read_checkpoint

    if release.status in _NEVER_ALONE:
        raise GateRefused(
            f"Release {release.release_id} is {release.status}: it leaves as a parcel only, which another medtl reads."
        )
    if read_checkpoint(folder).head == "mask":
        raise ModelError(f"Release {release.release_id} draws masks, and those leave as a parcel only.")


def write_graph(folder: Path, status: str, out: Path) -> str:
    """Write a release as an ONNX graph that was tried in onnxruntime; give the sha256 of the file.

    Args:
        folder: of the release, verified.
        status: as it stands now.
    """
    from medtl.dataset.io import read_plan
    from medtl.model.io import read_network
    from medtl.model.onnx import as_graph

    plan, network = read_plan(folder), read_network(folder)
    calibrator = read_record(folder / CALIBRATOR, Calibrator)
    graph = as_graph(network, plan, calibrator, told(folder, status))
    write_tried(graph, network, plan, calibrator, out)
    return file_digest(out)


def write_tried(graph: bytes, network: StagedNetwork, plan: Plan, calibrator: Calibrator, out: Path) -> None:
    """Write a graph under a temporary name, try what was written, and only then give it its own.

    Raises:
        ModelError: onnxruntime does not answer as medtl does; nothing is left.
        StorageError: the file is there already, or cannot be written.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    with storage_errors(out):
        if out.exists():
            raise StorageError(f"'{out}' is there already. Name another file.")
        try:
            temporary.write_bytes(graph)
            apart = differences(temporary.read_bytes(), network, plan, calibrator)
            if not apart.max() <= TOLERANCE:  # NaN is no agreement either
                raise ModelError(
                    f"onnxruntime and torch differ by {apart.max():.1e} in a probability, and {TOLERANCE:g} is allowed "
                    f"({int((~(apart <= TOLERANCE)).sum())} of {len(apart)} prepared studies). Nothing was written. "
                    "Export a bundle instead (--format bundle): it computes with torch."
                )
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)


def differences(graph: bytes, network: StagedNetwork, plan: Plan, calibrator: Calibrator) -> FloatArray:
    """Give the largest difference between a graph and medtl in any probability, of each prepared study tried."""
    import torch

    from medtl.dataset.loading import voted
    from medtl.evaluation.calibration import apply
    from medtl.model.onnx import as_input, ask_graph, hard_cases
    from medtl.model.predict import predict

    cases = hard_cases(plan, sum(_BATCHES), 0)
    found = []
    for batch in np.split(cases, np.cumsum(_BATCHES)[:-1] * plan.slices):
        unknown: FloatArray = np.full((len(batch), len(plan.classes)), np.nan)
        shown: list[tuple[AnyArray, FloatArray]] = [(batch, unknown)]
        wanted = apply(calibrator, voted(predict(network, shown, plan.task, torch.device("cpu")), plan.slices))
        found.append(np.abs(ask_graph(graph, as_input(batch, plan)) - wanted).max(axis=1))
    return np.concatenate(found)


def told(folder: Path, status: str) -> dict[str, str]:
    """Say what a graph is and what it leaves to its reader: text, and JSON where there is more than one value."""
    from medtl.dataset.io import read_plan
    from medtl.evaluation.io import read_evaluation
    from medtl.model.io import read_checkpoint
    from medtl.model.onnx import input_name, prepared_shape
    from medtl.registry.io import RELEASE

    plan, checkpoint, release = read_plan(folder), read_checkpoint(folder), read_record(folder / RELEASE, Release)
    calibrator = read_record(folder / CALIBRATOR, Calibrator)
    rule = {name: getattr(plan, name) for name in ("intensity", "low", "high", "percentiles", "bits")}
    shown = {name: getattr(plan, name) for name in ("volumes", "axis", "slices", "neighbours", "depth")}
    points = [asdict(point) for point in read_evaluation(folder).operating_points]
    return {
        "release": release.release_id,
        "name": release.name,
        "status": status,
        "task": plan.task,
        "classes": json.dumps(plan.classes),
        "input": f"{input_name(plan)}, float32, 0 to 1",
        "shape": json.dumps(["studies", *prepared_shape(plan)]),
        "size": json.dumps(plan.size),
        "channels": str(plan.channels),
        "volumes": json.dumps(shown),
        "intensity": json.dumps(rule),
        "modalities": json.dumps(plan.facts.get("modalities")),
        "calibrator": f"{calibrator.method}, in the graph",
        "operating_points": json.dumps(points),
        "backbone": checkpoint.backbone,
        "weights_sha256": checkpoint.weights_sha256,
        "left_to_the_reader": _LEFT,
        "made_by": f"medtl {__version__}",
    }
