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
SHORT = (
    "model.phases=[{name: head, unfreeze: head, epochs: 1, lr: 2e-3}, {name: deep, unfreeze: 2, epochs: 2, lr: 1e-3}]"
)
REFERENCE = (  # two thirds of the config's epochs, which benchmarks/results.py trains
    "model.scratch_phases=[{name: scratch, unfreeze: all, epochs: 8, lr: 3.0e-4, decay: 1.0, batchnorm: with_stage}]"
)


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
    summary = run("malaria", real_data, tmp_path, REFERENCE)
    assert summary["metrics"]["auroc"]["value"] >= 0.98
    assert summary["scratch"]["auroc"]["value"] < summary["metrics"]["auroc"]["high"]
    assert sum(summary["split"].values()) == 4040


@pytest.mark.parametrize(
    ("policy", "taken"),
    [
        ("{}", 9),  # the others are secondary captures, ultrasound that may have text in it, doses, broken, or copies
        ("{derived: accept, burned_in: accept, multi_frame: accept}", 89),
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


def test_a_network_for_hippocampi_outlines_a_dicom_series_and_its_segmentation_lies_on_it(
    real_data: Path, tmp_path: Path
) -> None:
    few = copied(real_data / "data" / "hippocampus", tmp_path / "few", 40)
    own = f"workspace={tmp_path / 'w'}"
    quick = ["dataset.grid.filters=16", "model.segmenter.ema=0.98", "model.threads=1"]
    quick += ["model.phases=[{name: all, unfreeze: all, epochs: 8, lr: 4e-3, decay: 1.0, batchnorm: with_stage}]"]
    gate = "registry.promotion.gate=[{metric: dice, bound: low, at_least: 0.6}]"
    summary = call("run", own, f"scans.source={few}", gate, *quick)
    assert sum(summary["split"].values()) == 40 and summary["excluded"] == {} and summary["status"] == "validated"

    series = real_data / "data" / "dicom" / "mr_t1_study" / "13_HCropVolume"
    told = call("predict", own, *quick, "--scans", series, "--out", tmp_path / "out")
    written = [pydicom.dcmread(path) for path in sorted((tmp_path / "out").glob("*.dcm"))]
    assert told["scans"] == len(written) == 1
    sources = [pydicom.dcmread(path) for path in sorted(series.rglob("*.dcm"))]
    for seg in written:
        of = [one for one in sources if one.SeriesInstanceUID == seg.ReferencedSeriesSequence[0].SeriesInstanceUID]
        assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == (of[0].StudyInstanceUID, of[0].FrameOfReferenceUID)
        assert (seg.Rows, seg.Columns) == (of[0].Rows, of[0].Columns)
        shared = seg.SharedFunctionalGroupsSequence[0]
        assert shared.PixelMeasuresSequence[0].PixelSpacing == of[0].PixelSpacing
        assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == of[0].ImageOrientationPatient
        places = {tuple(one.ImagePositionPatient) for one in of}
        frames = [one.PlanePositionSequence[0].ImagePositionPatient for one in seg.PerFrameFunctionalGroupsSequence]
        assert frames and {tuple(place) for place in frames} <= places

    call("predict", own, *quick, "--scans", series, "--out", tmp_path / "nameless", "--pseudonymous")
    assert not list((tmp_path / "nameless").glob("*.dcm")), "a DICOM SEG would name the patient"
    together = tmp_path / "together"
    shutil.copytree(series, together)
    shutil.copytree(tmp_path / "out", together / "masks", ignore=shutil.ignore_patterns("*.nii.gz", "*.csv"))
    again = call("ingest", f"workspace={tmp_path / 'again'}", f"scans.source={together}")
    assert again["masks"] >= 1, "our own intake lays the segmentation on the voxels of its series"


def copied(cohort: Path, folder: Path, count: int) -> Path:
    """Copy the first cases of a cohort with their table."""
    head, *cases = (cohort / "cases.csv").read_text().splitlines()
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for case in cases[:count]:
        for file in case.split(",")[:2]:
            shutil.copyfile(cohort / file, folder / file)
    (folder / "cases.csv").write_text("\n".join([head, *cases[:count]]) + "\n")
    return folder


def call(verb: str, *arguments: object) -> dict[str, Any]:
    """Give what a verb on the hippocampus's config says; KEY=VALUE is a setting."""
    command = [sys.executable, "-m", "pipelines.cli", verb, str(ROOT / "configs" / "hippocampus.yaml"), "--json"]
    for one in map(str, arguments):
        command += ["--set", one] if "=" in one else [one]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
