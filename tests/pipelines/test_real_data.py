"""Real scans with real labels (make test-data)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydicom
import pytest

pytestmark = [pytest.mark.data, pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
WEIGHTS = "squeezenet1_0-deepcompression.pth"


def run(name: str, data: Path, workspace: Path, *more: str) -> dict[str, Any]:
    sets = [f"scans.source={data / 'data' / name}", f"model.weights={data / 'weights' / WEIGHTS}"]
    sets += [f"workspace={workspace}", *more]
    command = [sys.executable, "-m", "pipelines.cli", "run", str(ROOT / "configs" / f"{name}.yaml"), "--json"]
    for one in sets:
        command += ["--set", one]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def test_malaria_by_patient_reaches_what_staged_transfer_should(real_data: Path, tmp_path: Path) -> None:
    summary = run("malaria", real_data, tmp_path)
    assert summary["metrics"]["auroc"]["value"] >= 0.98
    assert summary["scratch"]["auroc"]["value"] < summary["metrics"]["auroc"]["high"]
    assert sum(summary["split"].values()) == 4040


SHORT = (
    "model.phases=[{name: head, unfreeze: head, epochs: 1, lr: 2e-3}, {name: deep, unfreeze: 2, epochs: 2, lr: 1e-3}]"
)


def test_pneumoniamnist_runs_on_its_own_split(real_data: Path, tmp_path: Path) -> None:
    summary = run("pneumoniamnist", real_data, tmp_path, SHORT, "model.scratch=false", "registry.promotion.gate=[]")
    assert summary["split"]["val"] == 524
    assert summary["metrics"]["auroc"]["low"] > 0.9
    assert summary["excluded"]["copy_across_parts"] > 0


def test_ham10000_reports_seven_classes(real_data: Path, tmp_path: Path) -> None:
    summary = run("ham10000", real_data, tmp_path, SHORT, "model.scratch=false")
    assert summary["metrics"]["auroc"]["value"] > 0.75
    evaluation = next((tmp_path / "artifacts" / "evaluation").glob("*/evaluation.json"))
    assert len(json.loads(evaluation.read_text())["classes"]) == 7


@pytest.mark.parametrize(
    ("policy", "taken"),
    [
        ("{}", 12),  # the others are secondary captures, ultrasound without a word on burned-in text, broken, or copies
        ("{derived: accept, burned_in: accept, multi_frame: accept}", 90),
    ],
)
def test_pydicoms_own_files_are_taken_or_refused_each_with_a_reason(
    real_data: Path, tmp_path: Path, policy: str, taken: int
) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "ingest", str(ROOT / "configs" / "malaria.yaml"), "--json"]
    settings = {
        "scans.source": real_data / "data" / "dicom" / "pydicom",
        "scans.read": "auto" if policy == "{}" else "images",
        "scans.checks.policy": policy,
        "workspace": tmp_path,
    }
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["files"] - summary["excluded_files"] >= taken
    assert summary["scans"] >= taken
    if policy == "{}":
        assert summary["scans"] + summary["excluded_files"] == summary["files"]


def test_hippocampus_is_outlined_and_a_dicom_series_gets_its_segmentation(real_data: Path, tmp_path: Path) -> None:
    short = "[{name: all, unfreeze: all, epochs: 5, lr: 2.0e-3, decay: 1.0, batchnorm: with_stage}]"
    gate = "registry.promotion.gate=[{metric: dice, bound: low, at_least: 0.7}]"
    settings = [f"workspace={tmp_path / 'w'}", f"model.phases={short}", "model.segmenter.ema=0.98", gate]
    config = ROOT / "configs" / "hippocampus.yaml"
    summary = call("run", config, f"scans.source={real_data / 'data' / 'hippocampus'}", *settings)
    assert sum(summary["split"].values()) == 205 and summary["excluded"] == {}
    assert summary["metrics"]["dice"]["low"] > 0.75

    series, out = real_data / "data" / "dicom" / "mr_t1_study", tmp_path / "out"
    told = call("predict", config, f"workspace={tmp_path / 'w'}", scans=series, out=out)
    segmentations = sorted(out.glob("*.dcm"))
    assert told["scans"] == 2 and len(segmentations) == 2
    sources = [pydicom.dcmread(path) for path in series.rglob("*") if path.is_file() and pydicom.misc.is_dicom(path)]
    for path in segmentations:
        seg = pydicom.dcmread(path)
        own = [s for s in sources if s.SeriesInstanceUID == seg.ReferencedSeriesSequence[0].SeriesInstanceUID]
        assert (
            seg.FrameOfReferenceUID == own[0].FrameOfReferenceUID
            and (seg.Rows, seg.Columns) == own[0].pixel_array.shape
        )
        places = {tuple(map(float, s.ImagePositionPatient)) for s in own}
        frames = [f.PlanePositionSequence[0].ImagePositionPatient for f in seg.PerFrameFunctionalGroupsSequence]
        assert frames and {tuple(map(float, place)) for place in frames} <= places
    nameless = call(
        "predict", config, f"workspace={tmp_path / 'w'}", "--pseudonymous", scans=series, out=tmp_path / "p"
    )
    assert nameless["doubts"] == {"no DICOM SEG: it would name the patient": 2} | told["doubts"]
    assert not list((tmp_path / "p").glob("*.dcm"))
    together = tmp_path / "together"
    shutil.copytree(series, together)
    for path in segmentations:
        shutil.copy(path, together)
    again = call("ingest", config, f"workspace={tmp_path / 'v'}", f"scans.source={together}")
    assert again["masks"] >= 2, "our own intake lays the segmentations on the voxels of their series"


def call(verb: str, config: Path, *settings: str, **options: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipelines.cli", verb, str(config), "--json"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    for one in settings:
        command += [one] if one.startswith("--") else ["--set", one]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
