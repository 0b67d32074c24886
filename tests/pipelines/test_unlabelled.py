"""Scans without labels give weights that a segmentation starts from, and never a test part that they have seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medtl.dataset.io import read_split
from medtl.model.io import read_checkpoint
from medtl.studies.io import read_cohort

pytestmark = [pytest.mark.prefect, pytest.mark.slow]

SHARED = """
workspace: {folder}/workspace
dataset:
  split: {{val: 0.25, test: 0.25}}
  grid: {{filters: 8, patch: [8, 16, 16], batch_size: 4}}
model:
  threads: 1
  save_every_s: 0
  vault: {folder}/vault
  segmenter: {{network: dynunet, deep_supervision: false}}
  reconstruct: {{epochs: 3, blocks: 4}}
"""
UNLABELLED = (
    """
name: archive
scans: {{source: {folder}/archive}}
studies: {{image_is_patient: true, labels: {{table: null}}}}
"""
    + SHARED
)
STUDY = """
name: balls
scans: {{source: {folder}/study}}
studies:
  labels: {{path: image, mask: mask, patient: patient, structures: {{ball: 1}}}}
""" + SHARED.replace(
    "model:", "model:\n  phases: [{{name: all, unfreeze: all, epochs: 1, decay: 1.0, batchnorm: with_stage}}]"
)


def write_study(folder: Path, patients: int = 12) -> None:
    """Write volumes of 18 x 17 x 9 voxels with a ball, and its mask."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    rows = ["image,mask,patient"]
    for patient in range(patients):
        place = np.moveaxis(np.indices((18, 17, 9)), 0, -1) - rng.uniform((6, 6, 3), (12, 11, 6))
        mask = (np.linalg.norm(place, axis=-1) < rng.uniform(3, 4)).astype(np.uint8)
        waves = np.sin(place @ rng.uniform(0.2, 0.8, 3)) * 60
        values = (rng.normal(300, 10, mask.shape) + waves + 300.0 * mask).astype(np.int16)
        for kind, array in (("images", values), ("masks", mask)):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 1.5, 1.0])), folder / kind / f"{patient}.nii.gz")
        rows.append(f"images/{patient}.nii.gz,masks/{patient}.nii.gz,patient-{patient}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def medtl(*arguments: object, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"said": done.stderr}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a study, an archive without labels that holds half of its scans, and both configs."""
    folder = tmp_path_factory.mktemp("unlabelled")
    write_study(folder / "study")
    (folder / "archive").mkdir()
    for number in range(6):
        shutil.copy(folder / "study" / "images" / f"{number}.nii.gz", folder / "archive" / f"scan{number}.nii.gz")
    for name, text in (("archive", UNLABELLED), ("study", STUDY)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def pretrained(hospital: Path) -> dict[str, Any]:
    return medtl(
        "pretrain", hospital / "archive.yaml", "--into", "archive", "--licence", "CC-BY-4.0", "--citation", "Ward 7"
    )


def artifacts(folder: Path, kind: str) -> set[Path]:
    return {path for path in (folder / "workspace" / "artifacts" / kind).iterdir() if (path / "manifest.json").exists()}


def test_scans_without_labels_become_weights_in_the_vault(hospital: Path, pretrained: dict[str, Any]) -> None:
    assert (pretrained["scans"], pretrained["patients"], pretrained["network"]) == (6, 6, "dynunet")
    assert pretrained["explained"] is not None and pretrained["explained"] < 1
    entry = json.loads((hospital / "vault" / "archive" / "entry.json").read_text())
    assert (entry["licence"], entry["citation"], entry["backbone"]) == ("CC-BY-4.0", "Ward 7", "dynunet")
    hashes = (hospital / "vault" / "archive" / f"{entry['trained_on'][:32]}.hashes.txt").read_text().splitlines()
    assert sum(len(line) == 32 for line in hashes) == 6
    assert medtl("weights", "verify", "--vault", hospital / "vault")["faults"] == {}
    assert medtl("audit", "verify", "--workspace", hospital / "workspace")["faults"] == []


def test_the_same_command_again_computes_nothing(hospital: Path, pretrained: dict[str, Any]) -> None:
    before = (hospital / "vault" / "archive" / "entry.json").read_bytes()
    again = medtl(
        "pretrain", hospital / "archive.yaml", "--into", "archive", "--licence", "CC-BY-4.0", "--citation", "Ward 7"
    )
    assert again == {**pretrained, "reused": True}
    assert (hospital / "vault" / "archive" / "entry.json").read_bytes() == before


def test_a_segmentation_starts_from_them_and_tests_on_nobody_they_have_seen(
    hospital: Path, pretrained: dict[str, Any]
) -> None:
    splits = artifacts(hospital, "split")
    found = medtl("train", hospital / "study.yaml", "--set", "model.weights=vault:archive")
    assert found["weights"]["source"] == "vault:archive" and found["weights"]["share"] > 0.9
    assert read_checkpoint(Path(found["artifact"])).weights.licence == "CC-BY-4.0"
    (split,) = (read_split(path) for path in artifacts(hospital, "split") - splits)
    (archive, study) = sorted(
        (read_cohort(path) for path in artifacts(hospital, "cohort")), key=lambda cohort: len(cohort.studies)
    )
    seen = {one.pixel_digest for one in archive.studies}
    learned = {one.study_id for one in study.studies if one.pixel_digest in seen}
    assert len(learned) == 6 and learned <= set(split.train) and split.val and split.test


def test_a_study_pretrains_on_its_own_training_part_and_keeps_its_split(hospital: Path) -> None:
    own = medtl("pretrain", hospital / "study.yaml", "--into", "own", "--set", "model.weights=vault:own")
    assert own["scans"] == 6  # of 12: neither validation nor test
    splits = artifacts(hospital, "split")
    whole = {read_split(path).train for path in splits if read_split(path).test}
    medtl("train", hospital / "study.yaml", "--set", "model.weights=vault:own")
    (split,) = (read_split(path) for path in artifacts(hospital, "split") - splits)
    assert split.train in whole and (len(split.train), len(split.val), len(split.test)) == (6, 3, 3)


def test_weights_of_another_network_are_refused_before_anything_is_learned(
    hospital: Path, pretrained: dict[str, Any]
) -> None:
    words = ("--set", "model.weights=vault:archive", "--set", "model.segmenter.network=unet")
    said = medtl("train", hospital / "study.yaml", *words, code=1)["said"]
    assert "are of a 'dynunet', and this network is 'unet'. Set model.segmenter.network to dynunet." in said


def test_a_name_that_is_none_is_refused_at_once(hospital: Path) -> None:
    said = medtl("pretrain", hospital / "archive.yaml", "--into", "../up", code=1)["said"]
    assert "cannot name an entry of the vault" in said


def test_a_killed_pretraining_ends_with_the_same_bits(
    hospital: Path, pretrained: dict[str, Any], tmp_path: Path
) -> None:
    words = ["--set", f"workspace={tmp_path / 'w'}", "--set", f"model.vault={tmp_path / 'vault'}"]
    command = [sys.executable, "-m", "pipelines.cli", "pretrain", str(hospital / "archive.yaml"), "--into", "archive"]
    process = subprocess.Popen(
        [*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("progress.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
    process.wait(30)
    assert list(tmp_path.rglob("progress.safetensors")), "it was killed before it saved anything"
    again = medtl("pretrain", hospital / "archive.yaml", "--into", "archive", *words)
    assert again["checkpoint"] == pretrained["checkpoint"]
