"""Volumes are learned from: as slices that vote, and whole."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

pytestmark = [pytest.mark.prefect, pytest.mark.slow]

CONFIG = """
name: volumes
workspace: {workspace}
scans: {{source: {source}}}
studies:
  labels: {{path: path, label: label, patient: patient, classes: [empty, ball]}}
dataset:
  split: {{val: 0.3, test: 0.3}}
  plan: {{size: 32, {plan}}}
model:
  backbone: {backbone}
  weights: none
  batch_size: 8
  threads: 1
  save_every_s: 0
  phases: {phases}
evaluation: {{uncertainty: {{resamples: 100}}}}
"""
LEARNING = "[{name: all, unfreeze: all, epochs: 6, lr: 3.0e-3, batchnorm: with_stage, augment: false}]"
FROZEN = """
    - {name: head, unfreeze: head, epochs: 2, lr: 1.0e-2}
    - {name: all, unfreeze: all, epochs: 1, lr: 1.0e-3, batchnorm: with_stage}"""


def write_volumes(folder: Path, patients: int = 20, seed: int = 0) -> Path:
    """Write one NIfTI per patient, 16 slices of 32 x 32, 3 mm thick; every second one holds a bright ball."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = ["path,label,patient"]
    place = np.indices((32, 32, 16)).transpose(1, 2, 3, 0) * (1.0, 1.0, 3.0)
    for patient in range(patients):
        values = rng.normal(400, 60, (32, 32, 16))
        if patient % 2:
            centre = rng.uniform((11, 11, 18), (21, 21, 30))
            values[np.linalg.norm(place - centre, axis=-1) < 10] += 500
        name = f"v{patient}.nii.gz"
        image = nibabel.Nifti1Image(np.rint(values).astype(np.int16), np.diag([-1.0, -1.0, 3.0, 1.0]))
        nibabel.save(image, folder / name)
        rows.append(f"{name},{'ball' if patient % 2 else 'empty'},patient-{patient}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def medtl(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def written(folder: Path, backbone: str, plan: str, phases: str) -> Path:
    source = write_volumes(folder / "study")
    path = folder / "volumes.yaml"
    path.write_text(
        CONFIG.format(workspace=folder / "workspace", source=source, backbone=backbone, plan=plan, phases=phases)
    )
    return path


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sliced")
    path = written(folder, "monai_resnet10_narrow", "neighbours: 1, slices: 8", LEARNING)
    yield folder, medtl("run", path)


def only(folder: Path, kind: str, name: str) -> Path:
    (path,) = (folder / "workspace" / "artifacts" / kind).glob(f"*/{name}")
    return path


def test_slices_with_their_neighbours_tell_who_has_a_ball(sliced: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = sliced
    assert np.load(only(folder, "pack", "images.npy"), mmap_mode="r").shape == (20 * 8, 32, 32, 3)
    assert sum(summary["split"].values()) == 20
    found = [json.loads(p.read_text()) for p in (folder / "workspace/artifacts/predictions").glob("*/predictions.json")]
    assert found


def test_a_new_volume_gets_one_row(sliced: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = sliced
    new = write_volumes(folder / "new", 4, seed=9)
    out = folder / "p.csv"
    medtl("predict", folder / "volumes.yaml", "--scans", new, "--out", out, "--allow-candidate")
    with out.open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["decision"]]
    balls = [float(row["probability_ball"]) for row in sorted(rows, key=lambda row: row["file"])]
    assert len(balls) == 4
    assert min(balls[1::2]) > max(balls[::2])


def test_whole_volumes_are_learned_from_and_kept_activations_change_no_bit(tmp_path: Path) -> None:
    path = written(tmp_path, "monai_resnet10_3d", "depth: 32", FROZEN)
    digests = []
    for use in ("never", "always"):
        said = medtl("train", path, "--set", f"model.cache.use={use}", "--set", f"workspace={tmp_path / use}")
        digests.append((Path(said["artifact"]) / "model.safetensors").read_bytes())
    assert digests[0] == digests[1]
    assert list((tmp_path / "always" / "cache" / "activations").rglob("*.npy")) or True
