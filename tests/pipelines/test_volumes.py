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

from medtl.config import Config
from medtl.evaluation.io import read_predictions
from medtl.model.fit import macro_auroc
from medtl.records import Cohort, Split, Study
from pipelines.training import material_for

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


def probabilities_of_balls(config: Path, folder: Path) -> list[float]:
    """Predict four new volumes; the second and the fourth hold a ball."""
    new, out = write_volumes(folder / "new", 4, seed=9), folder / "p.csv"
    medtl("predict", config, "--scans", new, "--out", out, "--allow-candidate")
    with out.open() as stream:
        rows = sorted((row for row in csv.DictReader(stream) if row["decision"]), key=lambda row: row["file"])
    assert [row["file"] for row in rows] == [f"v{n}.nii.gz" for n in range(4)]
    return [float(row["probability_ball"]) for row in rows]


@pytest.mark.prefect
@pytest.mark.slow
def test_slices_with_their_neighbours_tell_who_has_a_ball(sliced: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = sliced
    assert sum(summary["split"].values()) == 20
    assert np.load(only(folder, "pack", "images.npy"), mmap_mode="r").shape == (20 * 8, 32, 32, 3)
    places = (folder / "workspace" / "artifacts" / "predictions").glob("[0-9a-f]*")
    val = next(found for place in places if (found := read_predictions(place)).part == "val")
    assert val.probabilities.shape == (6, 2)  # one row per study
    assert macro_auroc(val.targets, val.probabilities) > 0.8  # type: ignore[operator]


@pytest.mark.prefect
@pytest.mark.slow
def test_a_new_volume_gets_one_row_and_the_right_answer(sliced: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = sliced
    found = probabilities_of_balls(folder / "volumes.yaml", folder)
    assert min(found[1::2]) > max(found[::2])


@pytest.mark.prefect
@pytest.mark.slow
def test_whole_volumes_are_learned_from_and_kept_activations_change_no_bit(tmp_path: Path) -> None:
    path = written(tmp_path, "monai_resnet10_3d", "depth: 32", FROZEN)
    never = ("--set", "model.cache.use=never", "--set", f"workspace={tmp_path / 'other'}")
    other = Path(medtl("train", path, *never)["artifact"])
    medtl("run", path, "--set", "model.cache.use=always")
    kept = only(tmp_path, "checkpoint", "model.safetensors")
    assert kept.read_bytes() == (other / "model.safetensors").read_bytes()
    assert list((tmp_path / "workspace" / "cache" / "activations").glob("*/numbers"))
    assert not list((tmp_path / "other" / "cache" / "activations").glob("*/numbers"))
    assert np.load(only(tmp_path, "pack", "images.npy"), mmap_mode="r").shape == (20, 32, 32, 32, 1)
    assert len(probabilities_of_balls(path, tmp_path)) == 4


def test_every_slice_brings_its_own_target_and_patient_and_the_judge_hears_one_vote_a_study() -> None:
    studies = tuple(Study(f"s-{n}", f"{n}", f"p-{n}", (n % 2, 1 - n % 2), f"d{n}") for n in range(6))
    ids = [study.study_id for study in studies]
    split = Split((ids[4], ids[1]), (ids[0], ids[3]), (ids[2], ids[5]), {s.study_id: s.patient for s in studies}, False)
    config, images = Config(name="x", seed=0), np.zeros((18, 8, 8, 1), np.uint8)
    found = material_for(config, Cohort("binary", ("a", "b"), studies), split, images, "pack")
    assert list(found.train.rows) == [12, 13, 14, 3, 4, 5]
    assert list(found.groups) == ["p-4"] * 3 + ["p-1"] * 3
    assert found.train.targets[[3, 4, 5, 12], 0].tolist() == [1, 1, 1, 0]
    assert sorted(found.val.rows) == [0, 1, 2, 9, 10, 11]
    right = np.repeat(found.val.targets[[0, 9]], 3, 0) * 0.8 + 0.1
    assert found.judge(right, 1 - right) > 0.5 > found.judge(1 - right, right)
