"""Segmentation from files to a release: the same house, with masks instead of classes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from medtl.audit import AuditLog
from medtl.config import load_config
from medtl.dataset.io import read_grid
from medtl.errors import SplitError
from medtl.model.io import read_checkpoint
from medtl.model.reconstruct import transferable
from medtl.model.vault import Vault
from medtl.progress import listening
from medtl.records import Artifact
from pipelines.prepared import Prepared
from pipelines.segmenting import fit_masks, pack_volumes, plan_grid, predict_masks, refit_masks
from pipelines.steps import build_cohort, ingest_scans, split_by_patient
from pipelines.training import vault_folder

pytestmark = [pytest.mark.prefect, pytest.mark.slow]

CONFIG = """
name: balls
workspace: {workspace}
scans: {{source: {source}}}
studies:
  labels: {{path: image, mask: mask, patient: patient, structures: {{left: 1, right: 2}}}}
dataset:
  split: {{val: 0.25, test: 0.25}}
  folds: {{count: 2}}
  grid: {{filters: 8, patch: [16, 32, 32], batch_size: 4}}
  patches: {{per_study: 4}}
model:
  weights: none
  threads: 1
  save_every_s: 0
  segmenter: {{network: dynunet, deep_supervision: false, ema: 0.8}}
  phases: [{{name: all, unfreeze: all, epochs: 6, lr: 1.0e-2, decay: 1.0, batchnorm: with_stage}}]
evaluation: {{uncertainty: {{resamples: 200}}}}
registry: {{promotion: {{gate: [{{metric: dice, bound: value, at_least: 0.3}}]}}}}
"""
AFFINE = np.array([[-1.2, 0, 0, 90.0], [0, -1.1, 0, 100.0], [0, 0, 2.0, -40.0], [0, 0, 0, 1.0]])


def write_masked(folder: Path, patients: int = 16, seed: int = 0, who: str = "patient") -> Path:
    """Write volumes of 28-31 x 30 x 14 voxels with two balls, one brighter than the other, and their masks."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rows = ["image,mask,patient"]
    for patient in range(patients):
        shape = (28 + patient % 4, 30, 14)
        place = np.moveaxis(np.indices(shape), 0, -1) * (1.2, 1.1, 2.0)
        values, mask = rng.normal(300, 40, shape), np.zeros(shape, np.uint8)
        for label, centre in enumerate(
            rng.uniform((9, 10, 10), (13, 22, 18), (2, 3)) + np.array(((0, 0, 0), (12, 0, 0))), 1
        ):
            inside = np.linalg.norm(place - centre, axis=-1) < rng.uniform(5, 6.5)
            values[inside], mask[inside] = values[inside] + 250 * label, label
        for kind, array in (("images", values.astype(np.int16)), ("masks", mask)):
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), folder / kind / f"case{patient}.nii.gz")
        rows.append(f"images/case{patient}.nii.gz,masks/case{patient}.nii.gz,{who}-{patient}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def medtl(*arguments: object, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"error": done.stderr}
    return found


def written(folder: Path) -> Path:
    path = folder / "balls.yaml"
    path.write_text(CONFIG.format(workspace=folder / "workspace", source=write_masked(folder / "study")))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("segmented")
    yield folder, medtl("run", written(folder))


def test_a_run_measures_every_structure_and_makes_a_release(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert summary["status"] == "validated" and summary["split"] == {"train": 8, "val": 4, "test": 4}
    dice = summary["metrics"]["dice"]
    assert 0.3 < dice["low"] < dice["value"] < dice["high"] <= 1
    assert {"iou", "hd95_mm", "assd_mm", "nsd"} <= set(summary["metrics"])
    page = Path(summary["report"]).read_text()
    assert "left" in page and "right" in page and "NSD" in page
    actions = [event["action"] for event in AuditLog(folder / "workspace").events()]
    assert actions.count("test.opened") == 1 and "release.validated" in actions


def test_the_same_command_again_computes_nothing(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    again = medtl("run", folder / "balls.yaml")
    assert again["reused"] and again["digests"] == summary["digests"]


def test_neither_another_title_nor_a_learning_curve_looks_at_the_test_part(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, summary = finished
    more = ("--set", "report.title=Two balls", "--set", "report.learning_curve=1")
    other = medtl("run", folder / "balls.yaml", *more)
    page = Path(other["report"]).read_text()
    assert other["metrics"] == summary["metrics"] and "Two balls" in page
    assert "Learning curve: Dice on validation" in page
    actions = [event["action"] for event in AuditLog(folder / "workspace").events()]
    assert actions.count("test.opened") == 1
    assert actions.count("masks.made") == 3, (
        "validation and test of the model, validation of the one with fewer patients"
    )


def test_every_byte_of_it_is_on_the_trail(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    assert medtl("audit", "verify", "--workspace", folder / "workspace")["faults"] == []


def test_masks_of_new_scans_come_out_on_their_own_voxels(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = finished
    new = write_masked(tmp_path / "new", patients=5, seed=5)
    out = tmp_path / "out"
    told = medtl("predict", folder / "balls.yaml", "--scans", new / "images", "--out", out)
    assert told["scans"] == 5
    masks = sorted(out.glob("*.nii.gz"))
    assert len(masks) == 5
    (used,) = (e for e in AuditLog(folder / "workspace").events() if e["action"] == "release.applied")
    assert used["details"]["tally"]["answers"] == {"nothing found": {"no": 5, "yes": 0}}
    settings = ("--set", "model.inference.way=windows", "--set", "model.inference.overlap=0.2")
    medtl("predict", folder / "balls.yaml", "--scans", new / "images", "--out", tmp_path / "again", *settings)
    for path in masks:  # what a release was measured with is what it serves with
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    dice = []
    truth = {nibabel.load(p).shape: nibabel.load(p) for p in (new / "masks").iterdir()}
    for path in masks:
        found = nibabel.load(path)
        wanted = truth[found.shape]
        np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-4)
        a, b = np.asarray(found.dataobj) > 0, np.asarray(wanted.dataobj) > 0
        dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert min(dice) > 0.3


def test_a_killed_training_ends_with_the_same_bits(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, summary = finished
    path = written(tmp_path)
    command = [sys.executable, "-m", "pipelines.cli", "run", str(path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, **quiet) as process:  # type: ignore[call-overload]
        unfinished = tmp_path / "workspace"
        deadline = time.monotonic() + 120
        while not list(unfinished.rglob("progress.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
    assert list(unfinished.rglob("progress.safetensors")), "it was killed before it saved anything"
    again = medtl("run", path)
    assert "an interrupted training was found" in (tmp_path / "workspace" / "logs" / "medtl.log").read_text()
    assert again["digests"]["checkpoint"] == summary["digests"]["checkpoint"]
    assert again["metrics"] == summary["metrics"]


def test_folds_are_pooled_over_patients(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    told = medtl("crossval", folder / "balls.yaml")
    assert [one["n"] for one in told["folds"]] == [8, 8]
    assert told["metrics"]["dice"]["n"] == 16
    assert "left" in Path(told["report"]).read_text()


def test_folds_stand_beside_the_same_network_without_weights(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    config, checkpoint = load_config(folder / "balls.yaml"), summary["digests"]["checkpoint"]
    manifests = [
        json.loads(path.read_text()) for path in (folder / "workspace" / "artifacts").glob("*/*/manifest.json")
    ]
    made = {one["digest"]: one for one in manifests}
    plan = made[made[checkpoint]["inputs"]["plan"]]
    grid = read_grid(folder / "workspace" / "artifacts" / "plan" / plan["fingerprint"][:32])
    state = {name: torch.from_numpy(array) for name, array in trained(folder)[checkpoint].items()}
    state = transferable(state, grid, config.model, "dynunet")
    Vault(vault_folder(config)).add("balls", "dynunet", state, "a run on the same patients", layout="medtl")
    once = "[{name: all, unfreeze: all, epochs: 1, lr: 3.0e-3, decay: 1.0, batchnorm: with_stage}]"
    settings = (
        "model.weights=vault:balls",
        "model.scratch=true",
        f"model.phases={once}",
        f"model.scratch_phases={once}",
    )
    told = medtl("crossval", folder / "balls.yaml", *(part for one in settings for part in ("--set", one)))
    assert told["scratch"].keys() == told["metrics"].keys() > {"dice", "nsd"}
    apart = told["metrics"]["dice"]["value"] - told["scratch"]["dice"]["value"]
    assert told["difference"]["dice"]["value"] == pytest.approx(apart) and told["difference"]["dice"]["low"] > 0
    page, both = Path(told["report"]).read_text(), told["trainings"]
    assert "Transfer or scratch" in page and "hollow" in page and "How both were trained" in page
    assert both["transfer"]["rate"] == both["scratch"]["rate"] == pytest.approx(3e-3)
    assert both["transfer"]["epochs"] == both["scratch"]["epochs"] == 1 and both["cautions"] == []
    assert [len(side["courses"]) for side in (both["transfer"], both["scratch"])] == [len(told["folds"])] * 2
    assert told["twice"] is False and "second time" not in page

    settings = (*settings, "model.segmenter.refit=true")
    twice = medtl("crossval", folder / "balls.yaml", *(part for one in settings for part in ("--set", one)))
    page, again = Path(twice["report"]).read_text(), twice["trainings"]
    assert twice["twice"] is True
    assert "Both were trained a second time" in page and "nothing chose among its states" in page
    assert again["transfer"]["again"] == again["scratch"]["again"] == 1 and both["transfer"]["again"] is None
    assert again["transfer"]["courses"] == both["transfer"]["courses"]  # validation watched the first ones alone
    assert twice["metrics"]["dice"] != told["metrics"]["dice"] and twice["scratch"]["dice"] != told["scratch"]["dice"]


def test_it_is_measured_on_masks_from_elsewhere(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = finished
    other = write_masked(tmp_path / "other", patients=6, seed=11, who="someone")
    for path in (other / "masks").iterdir():  # somebody else's values
        mask = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(mask.dataobj).astype(np.uint8) * 10, AFFINE), path)
    values = ("--set", "studies.labels.structures={left: 10, right: 20}")
    asked = ("--release", summary["release"])
    told = medtl("elsewhere", folder / "balls.yaml", "--scans", other, *asked, *values)
    assert (told["studies"], told["patients"], told["release"]) == (6, 6, summary["release"])
    inside, outside, change = (told[key]["dice"] for key in ("released_with", "metrics", "change"))
    assert inside["value"] == pytest.approx(summary["metrics"]["dice"]["value"])
    assert outside["value"] > 0.3 and change["low"] <= change["value"] <= change["high"]
    page = Path(told["report"]).read_text()
    assert "Dice of each structure" in page and "what is kept of a mask" in page and "someone-" not in page
    events = AuditLog(folder / "workspace").events()
    assert [e["details"]["purpose"] for e in events if e["action"] == "test.opened"][-1] == "external"
    (measured,) = (e for e in events if e["action"] == "release.validated_elsewhere")
    assert measured["details"]["dice"][0] == pytest.approx(outside["value"])

    again = medtl("elsewhere", folder / "balls.yaml", "--scans", folder / "study", code=1)  # they taught it
    wrong = medtl("elsewhere", folder / "balls.yaml", "--scans", other, "--set",
                  "studies.labels.structures={right: 10, left: 20}", code=1)  # fmt: skip
    assert "taught release" in again["error"] and "patient-" not in again["error"]
    assert "in this order" in wrong["error"]
    turned = ("--set", "studies.labels.structures={left: 20, right: 10}")
    swapped = medtl("elsewhere", folder / "balls.yaml", "--scans", other, *turned)
    assert swapped["metrics"]["dice"]["value"] < 0.2, "what the masks mean is part of what is measured"


def test_two_processes_train_what_one_trains(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, alone = finished
    before = trained(folder)
    both = medtl("evaluate", folder / "balls.yaml", "--set", "model.processes=2")
    assert both["metrics"]["dice"]["value"] == pytest.approx(alone["metrics"]["dice"]["value"], abs=0.03)
    (another,) = (weights for digest, weights in trained(folder).items() if digest not in before)
    one = before[alone["digests"]["checkpoint"]]
    assert another.keys() == one.keys()
    apart = np.concatenate([np.abs(another[name] - value).reshape(-1) for name, value in one.items()])
    # sums in another order, in bf16: AdamW turns the sign of a gradient near 0 into a step of its rate, 0.01
    assert apart.mean() < 1e-2
    twice = ("--set", "model.segmenter.refit=true", "--set", "model.processes=2")
    told = medtl("train", folder / "balls.yaml", *twice)
    second = read_checkpoint(found_checkpoint(folder, told["checkpoint"])).refit
    assert second is not None and (second.studies, second.chosen_by) == (12, told["refit"]["chosen_by"])


def trained(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the weights of all checkpoints, by their digests."""
    found = (folder / "workspace" / "artifacts" / "checkpoint").glob("*/manifest.json")
    return {json.loads(p.read_text())["digest"]: load_file(p.with_name("model.safetensors")) for p in found}


def test_several_networks_are_one_release(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, one = finished
    several = ("--set", "model.segmenter.members=2", "--set", "report.title=Two networks")
    told = medtl("run", folder / "balls.yaml", *several)
    assert told["status"] == "validated" and told["digests"]["checkpoint"] != one["digests"]["checkpoint"]
    assert told["split"] == one["split"]  # the folds are of the training part; nobody else learns
    assert "2 of dynunet" in Path(told["report"]).read_text()
    release = folder / "workspace" / "artifacts" / "release"
    (kept,) = (path.parent for path in release.rglob("model-2.safetensors"))
    assert (kept / "model.safetensors").read_bytes() != (kept / "model-2.safetensors").read_bytes()
    told_of = json.loads((kept / "quality.json").read_text())
    assert "agreement left" in told_of["features"]  # both networks were asked
    new = write_masked(tmp_path / "new", patients=2, seed=7)
    asked = ("--scans", new / "images", "--release", told["release"])
    assert medtl("predict", folder / "balls.yaml", *asked, "--out", tmp_path / "out")["scans"] == 2
    assert "2 of dynunet" in (kept / "card.md").read_text()
    genuine = (kept / "model-2.safetensors").read_bytes()
    (kept / "model-2.safetensors").write_bytes(b"another network")
    refused = medtl("predict", folder / "balls.yaml", *asked, "--out", tmp_path / "again", code=1)
    (kept / "model-2.safetensors").write_bytes(genuine)
    assert "model-2.safetensors" in refused["error"]


def test_a_second_training_learns_from_validation_too_and_decides_nothing(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, one = finished
    grid = ("--set", "model.segmenter.refit=true", "--set", "report.title=Trained twice")
    grid += ("--set", "report.learning_curve=1")
    told = medtl("run", folder / "balls.yaml", *grid)
    before, after = one["digests"]["checkpoint"], told["digests"]["checkpoint"]
    assert told["status"] == "validated" and after != before and told["split"] == one["split"]
    first, second = read_checkpoint(found_checkpoint(folder, before)), read_checkpoint(found_checkpoint(folder, after))
    refit = second.refit
    assert told["refit"] == {"chosen_by": first.weights_sha256, "patients": 12} and "refit" not in one
    assert refit is not None and first.refit is None and refit.chosen_by == first.weights_sha256
    assert (refit.studies, refit.patients) == (12, 12)  # 8 of training and 4 of validation; the 4 of test stay away
    assert (second.phases, len(second.history)) == (first.phases, len(first.history))
    assert [phase.epochs for phase in refit.phases] == [first.phases[0].best_epoch] == [len(refit.history)]
    assert trained(folder)[after].keys() == trained(folder)[before].keys()
    trained_alone = medtl("train", folder / "balls.yaml", *grid)
    assert trained_alone["reused"] and trained_alone["checkpoint"] == after
    # what validation decides was decided by the first network, of which nothing is computed again
    masks = [json.loads(p.read_text()) for p in (folder / "workspace/artifacts/masks").glob("*/manifest.json")]
    parts = {(m["inputs"]["checkpoint"], m["inputs"]["part"]) for m in masks}
    assert {(before, "val"), (before, "test"), (after, "test")} <= parts and (after, "val") not in parts
    config = load_config(folder / "balls.yaml")
    scans = ingest_scans(config)
    cohort = build_cohort(config, scans)
    split = split_by_patient(config, scans, cohort)
    plan = plan_grid(config, scans, cohort, split)
    prepared = Prepared(scans, cohort, split, plan, pack_volumes(config, scans, cohort, plan))
    twice = Artifact("checkpoint", "", after, found_checkpoint(folder, after), reused=True)
    with pytest.raises(SplitError, match="learned from the validation part"):
        predict_masks(config, prepared, twice, "val")
    once = load_config(folder / "balls.yaml", ["model.phases.all.epochs=1"])
    heard: dict[str, int] = {}
    with listening(lambda label, _, total: heard.update({label: total})):
        refit_masks(once, prepared, fit_masks(once, prepared))
    assert heard["training on validation too"] / heard["training"] == 12 / 8  # patches of all twelve are drawn
    page = Path(told["report"]).read_text()
    assert "Learning curve: Dice on validation" in page  # of first trainings
    assert "The second training" in page and "12 studies of training and validation together" in page
    (card,) = (p for p in (folder / "workspace/artifacts/release").rglob("card.md") if "second time" in p.read_text())
    assert "12 patients" in card.read_text()
    assert json.loads((card.parent / "release.json").read_text())["provenance"]["chosen_by"] == first.weights_sha256
    new = write_masked(tmp_path / "new", patients=2, seed=7)
    asked = ("--scans", new / "images", "--release", told["release"], "--out", tmp_path / "out")
    assert medtl("predict", folder / "balls.yaml", *asked)["scans"] == 2
    both = medtl("run", folder / "balls.yaml", *grid, "--set", "model.segmenter.members=2", code=2)
    assert "set one of them" in both["error"]


def found_checkpoint(folder: Path, digest: str) -> Path:
    """Find the folder of a checkpoint by its digest."""
    made = (folder / "workspace" / "artifacts" / "checkpoint").glob("*/manifest.json")
    return next(path.parent for path in made if json.loads(path.read_text())["digest"] == digest)


def test_a_verb_that_is_for_diagnosis_says_so(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    for verb in ("study", "advise", "lr-find"):
        command = [sys.executable, "-m", "pipelines.cli", verb, str(folder / "balls.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 2 and "segmentation" in done.stderr, verb


def test_the_viewer_of_its_cases_comes_along_with_the_report(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary = finished
    for name, text in {
        "ipyniivue/static/widget.js": 'const saved="export%7BNVImage%2CNiivue%2CSLICE_TYPE%7D%3B";',
        "ipyniivue-2.4.4.dist-info/METADATA": "Metadata-Version: 2.4\nName: ipyniivue\nVersion: 2.4.4\n",
        "ipyniivue-2.4.4.dist-info/licenses/LICENSE": "BSD",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "ipyniivue/__init__.py").write_text("raise RuntimeError('it is read, never run')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    again = medtl("run", folder / "balls.yaml")
    page = Path(again["report"])
    viewer = page.with_name(f"{page.stem}-viewer.html")
    assert f'href="{viewer.name}"' in page.read_text()
    text = viewer.read_text()
    assert text.count('id="image-') == summary["split"]["test"]
    assert not any(word in text for word in ("patient-", "case1", str(folder)))
    assert medtl("audit", "verify", "--workspace", folder / "workspace")["faults"] == []
    viewer.write_text(text + " ")
    assert medtl("audit", "verify", "--workspace", folder / "workspace", code=1)["faults"]
