"""A tiny real study: DICOM files, a label table, a config. Small enough to train in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import environment

CONFIG = """
name: tiny
workspace: {workspace}
scans: {{source: {source}}}
studies:
  labels: {{path: path, label: label, patient: patient, classes: [dark, bright]}}
dataset:
  split: {{val: 0.25, test: 0.25}}
  plan: {{size: 32}}
model:
  backbone: monai_resnet10_narrow
  weights: none
  batch_size: 8
  threads: 1
  save_every_s: 0
  phases:
    - {{name: head, unfreeze: head, epochs: 1, lr: 1.0e-2}}
    - {{name: all, unfreeze: all, epochs: 2, lr: 3.0e-3, batchnorm: with_stage}}
evaluation: {{uncertainty: {{resamples: 200}}}}
"""
LONGEST = (
    "test_real_data",
    "test_segmenting",
    "test_run",
    "test_demo",
    "test_training",
    "test_volumes",
    "test_unlabelled",
)
# Whose commands each start Prefect's server, as they do at a user's; that takes 16 of a small run's 38 seconds.
EMBEDDED = ("test_run", "test_demo", "test_training", "test_cli")
GATE = "registry.promotion.gate=[{metric: auroc, bound: value, at_least: 0.0}]"


def write_study(folder: Path, patients: int = 24, seed: int = 0) -> Path:
    """Write two PNGs per patient: class ``bright`` has a bright square."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = ["path,label,patient"]
    for patient in range(patients):
        bright = patient % 2 == 1
        for image in range(2):
            pixels = rng.normal(90, 20, (32, 32))
            if bright:
                row, column = rng.integers(4, 20, 2)
                pixels[row : row + 8, column : column + 8] += 90
            name = f"images/p{patient}_{image}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
            rows.append(f"{name},{'bright' if bright else 'dark'},patient-{patient}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take minutes first: whichever worker ends early then has small ones left to take.

    A worker always holds the test after the one that it runs: what follows the longest in a file should be short.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def core_of_its_own() -> None:
    """Keep each of pytest-xdist's workers, and the commands that it starts, to one core.

    A network of two threads beside another process is many times slower than one of one thread.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory, home: Path, core_of_its_own: None) -> Iterator[str]:
    """Run one of Prefect's servers; give its API's address."""
    folder, before = tmp_path_factory.mktemp("server"), dict(os.environ)
    environment.prepare_prefect(folder)
    with environment.server(folder) as url:
        os.environ.clear()  # what was set is for the server alone: a command has its own home and settings
        os.environ.update(before)
        yield url


@pytest.fixture(scope="module", autouse=True)
def shared_server(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the module's commands use one server, where they run flows and a command's own server is not the subject."""
    path, items = request.path, request.session.items
    flows = any(i.path == path and (i.get_closest_marker("prefect") or i.get_closest_marker("data")) for i in items)
    if not flows or path.stem in EMBEDDED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", request.getfixturevalue("prefect_server"))
        yield


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study")


@pytest.fixture
def config_file(tmp_path: Path, study: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(workspace=tmp_path / "workspace", source=study))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    """Give the workspace of two finished runs of one name, each with a validated release; nobody may write into it."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(workspace=folder / "w", source=write_study(folder / "study")))
    for seed in (0, 1):
        command = [sys.executable, "-m", "pipelines.cli", "run", str(config), "--set", GATE, "--set", f"seed={seed}"]
        server = {**os.environ, "PREFECT_API_URL": prefect_server}
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=server)
        assert done.returncode == 0, done.stderr
    return folder / "w"


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """Give a copy of the finished runs' workspace, to write into."""
    shutil.copytree(finished, tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Give labelled scans of other patients, a little darker."""
    folder = write_study(tmp_path / "elsewhere", patients=16, seed=9)
    table = folder / "labels.csv"
    table.write_text(table.read_text().replace(",patient-", ",other-"))
    return folder
