"""Maps are held against what was drawn on the scans of the test part, step by step and without Prefect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from ct_files import ct_series, write_series
from medtl.audit import AuditLog
from medtl.config import Config, load_config
from medtl.dataset.io import read_pack, read_split
from medtl.errors import ConfigError
from medtl.evaluation.pointing import UNNAMED, hits, relevance_inside
from medtl.model import io
from medtl.model.cache import to_images
from medtl.model.explain import grad_cam, occlusion
from medtl.model.heads import NearestNeighbours
from medtl.model.surgery import HEAD
from medtl.records import Explanations, PointingFindings
from medtl.scans.intake import read_scans
from medtl.studies.io import read_cohort
from pipelines import examination, explanations, steps
from pipelines.prepared import Prepared, Trained

hd = pytest.importorskip("highdicom")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:highdicom")]

Array = np.ndarray[Any, Any]
CONFIG = """
name: drawn
workspace: {folder}/workspace
scans: {{source: {folder}/study}}
studies:
  labels: {{path: path, label: label, patient: patient, classes: [empty, cube], box: {box}}}
dataset:
  split: {{val: 0.25, test: 0.5}}
  plan: {{size: 32, {plan}}}
model:
  backbone: {backbone}
  weights: none
  batch_size: 8
  threads: 1
  save_every_s: 0
  phases: [{{name: all, unfreeze: all, epochs: 1, lr: 3.0e-3, batchnorm: with_stage}}]
evaluation: {{uncertainty: {{resamples: 100}}}}
"""


def write_drawn(folder: Path, region: str, patients: int = 16) -> None:
    """Write a series for each patient, every second with a bright cube, and what a person drew on each as DICOM SEG."""
    rng, rows = np.random.default_rng(0), ["path,label,patient"]
    for patient in range(patients):
        volume, inside = rng.integers(0, 30, (6, 32, 32)), np.zeros((6, 32, 32), np.uint8)
        row, column = rng.integers(3, 18, 2)
        inside[1 + patient % 3 : 4, row : row + 11, column : column + 8] = 1
        if patient % 2:
            volume[inside > 0] = 1000
        described = hd.seg.SegmentDescription(
            1, region, codes.SCT.Tissue, codes.SCT.Bone, algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        slices = ct_series(volume, spacing=(2.0, 2.0, 5.0), corner=(-30.0, -30.0, 0.0), PatientID=f"{patient}")
        write_series(folder / f"ct{patient}", slices)
        hd.seg.Segmentation(
            slices, inside, "BINARY", [described], generate_uid(), 2, generate_uid(), 1, "M", "M", "1", "1"
        ).save_as(folder / f"seg{patient}.dcm")
        rows.append(f"ct{patient},{'cube' if patient % 2 else 'empty'},patient-{patient}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def write_boxed(folder: Path, patients: int = 16) -> None:
    """Write a wide picture for each patient, every second with a bright square and a box around it in the table."""
    rng, rows = np.random.default_rng(0), ["path,label,patient,x0,y0,x1,y1"]
    folder.mkdir(parents=True)
    for patient in range(patients):
        pixels, given = rng.integers(0, 30, (36, 48)), ",,,"
        if patient % 2:
            row, column = rng.integers(0, 26), rng.integers(0, 34)
            pixels[row : row + 9, column : column + 12] = 255
            given = f"{column},{row}.0,{column + 12},{row + 9}"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{patient}.png")
        rows.append(f"{patient}.png,{'cube' if patient % 2 else 'empty'},patient-{patient},{given}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


@dataclass(frozen=True)
class Drawn:
    """A study up to its measured model."""

    config: Config
    prepared: Prepared
    trained: Trained

    def explained(self, method: str = "auto", **changes: Any) -> Explanations:
        wanted = self.config.evaluation.model_copy(update={"explain": method})
        config = self.config.model_copy(update={"evaluation": wanted, **changes})
        artifact = explanations.explain(config, self.prepared, self.trained)
        return explanations.read_explanations(artifact.path)

    def point(self, **changes: Any) -> tuple[PointingFindings, ...]:
        return self.explained(**changes).pointing


def measured(folder: Path, backbone: str, plan: str, box: str) -> Drawn:
    """Train on the scans of a folder, and measure the model."""
    (folder / "drawn.yaml").write_text(CONFIG.format(folder=folder, backbone=backbone, plan=plan, box=box))
    config = load_config(folder / "drawn.yaml")
    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    split = steps.split_by_patient(config, scans, cohort)
    artifact = steps.make_plan(config, scans, cohort, split)
    prepared = Prepared(scans, cohort, split, artifact, steps.pack_images(config, scans, cohort, artifact))
    checkpoint = steps.fit_in_phases(config, cohort, split, artifact, prepared.pack, False)
    shared = (checkpoint, cohort, split, prepared.pack)
    val, test = steps.predict_part(config, *shared, "val"), steps.predict_part(config, *shared, "test", "model")
    calibrator = examination.calibrate(config, artifact, val)
    evaluation = steps.evaluate(config, artifact, val, test)
    return Drawn(config, prepared, Trained(checkpoint, calibrator, test, val, test, evaluation))


@pytest.fixture(
    scope="module",
    params=[("lesion", "monai_resnet10_narrow", "slices: 6"), ("cube", "monai_resnet10_3d", "depth: 32")],
    ids=["slices", "whole"],
)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn")
    region, backbone, plan = request.param
    write_drawn(folder / "study", region)
    return measured(folder, backbone, plan, "null")


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    folder = tmp_path_factory.mktemp("boxed")
    write_boxed(folder / "study")
    return measured(folder, "monai_resnet10_narrow", "intensity: fixed", "[x0, y0, x1, y1]")


def shown(drawn: Drawn) -> tuple[torch.Tensor, Array]:
    """Give what the network sees of the test part's studies with a cube, and where that is bright, study by study."""
    known = read_cohort(drawn.prepared.cohort.path).studies
    pack = read_pack(drawn.prepared.pack.path)
    each, test = len(pack) // len(known), set(read_split(drawn.prepared.split.path).test)
    chosen = [n for n, study in enumerate(known) if study.study_id in test and study.target == (0, 1)]
    images = to_images(pack[[n * each + k for n in chosen for k in range(each)]], torch.device("cpu"))
    return images, (images.numpy() > 0.5).reshape(len(chosen), -1, 32, 32)


def test_the_maps_of_studies_that_hold_the_class_are_held_against_what_was_drawn(drawn: Drawn) -> None:
    (found,) = drawn.point()
    images, cube = shown(drawn)
    network = io.read_network(drawn.trained.checkpoint.path).eval()
    maps = grad_cam(network, images, [1] * len(images), "binary").reshape(cube.shape)
    assert (found.method, found.label, found.hits.n, found.hits.patients) == ("Grad-CAM", "cube", 4, 4)
    assert found.hits.value == pytest.approx(hits(maps, cube).mean())
    assert found.inside.value == pytest.approx(relevance_inside(maps, cube).mean(), rel=1e-4)
    assert found.inside_chance.value == pytest.approx(cube.mean()) and 0.02 < cube.mean() < 0.05
    assert found.inside.value != found.inside_chance.value


def test_a_mask_that_is_not_called_as_a_class_counts_and_is_said_to(drawn: Drawn) -> None:
    (found,) = drawn.point()
    regions = {scan.region for scan in read_scans(drawn.prepared.scans.path) if scan.mask_of is not None}
    assert regions in ({"1 cube"}, {"1 lesion"})
    assert (UNNAMED in found.notes) is (regions == {"1 lesion"})


def test_the_test_part_is_not_opened_again_and_a_second_time_nothing_is_done(drawn: Drawn) -> None:
    drawn.point()
    events = AuditLog(drawn.config.workspace).events()
    assert [e["action"] for e in events].count("test.opened") == 1
    assert explanations.explain(drawn.config, drawn.prepared, drawn.trained).reused


def test_where_maps_are_dear_the_first_studies_are_measured_and_the_rest_counted(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, cube = shown(drawn)
    monkeypatch.setitem(explanations._POINTED, "Grad-CAM", 2 * len(images) // len(cube))
    (found,) = drawn.point(seed=1)
    assert found.hits.n == 2
    assert "the first 2 of 4 studies with a mark" in found.notes


def test_the_maps_of_images_are_held_against_the_boxes_of_the_label_table(boxed: Drawn) -> None:
    (found,) = boxed.point()
    images, square = shown(boxed)
    network = io.read_network(boxed.trained.checkpoint.path).eval()
    maps = grad_cam(network, images, [1] * len(images), "binary").reshape(square.shape)
    assert (found.method, found.label, found.hits.n) == ("Grad-CAM", "cube", 4)
    assert found.notes == (UNNAMED,)
    assert found.hits.value == pytest.approx(hits(maps, square).mean())
    assert found.inside.value == pytest.approx(relevance_inside(maps, square).mean(), rel=1e-4)
    assert found.inside_chance.value == pytest.approx(square.mean()) and 0.03 < square.mean() < 0.06
    assert found.inside.value != found.inside_chance.value


def test_occlusion_is_what_is_asked_for_although_grad_cam_has_a_map(
    boxed: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "_CHECKED", 1)
    found = boxed.explained("occlusion")
    images, square = shown(boxed)
    network = io.read_network(boxed.trained.checkpoint.path).eval()
    maps = occlusion(network, images, [1] * len(images), "binary").reshape(square.shape)
    assert found.sanity is not None
    assert {found.method, found.sanity.method, *(one.method for one in found.pointing)} == {"occlusion"}
    assert "was asked for" in found.note
    assert found.pointing[0].inside.value == pytest.approx(relevance_inside(maps, square).mean(), rel=1e-4)
    assert (boxed.explained("auto").method, boxed.explained("grad_cam").method) == ("Grad-CAM", "Grad-CAM")


def test_grad_cam_is_refused_where_there_is_none_and_otherwise_occlusion_stands_in(boxed: Drawn) -> None:
    network, (images, _) = io.read_network(boxed.trained.checkpoint.path).eval(), shown(boxed)
    network.stages[HEAD][-1] = NearestNeighbours(
        torch.eye(2, network.stages[HEAD][-1].in_features), torch.eye(2), 1, False
    )
    with pytest.raises(ConfigError, match=r"explain is grad_cam, .*nearest neighbours.*evaluation\.explain=auto"):
        explanations._look("grad_cam", network, images[:1], [1], "binary")
    how, name, note, _ = explanations._look("auto", network, images[:1], [1], "binary")
    assert (how, name) == (occlusion, "occlusion") and "nearest neighbours" in note
