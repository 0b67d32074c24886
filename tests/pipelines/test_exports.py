"""A release leaves medtl: the graph and the bundle answer as medtl does, or there is none."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medtl.artifacts import file_digest, read_record, write_bytes, write_record
from medtl.audit import AuditedStore, AuditLog
from medtl.config import Config, load_config
from medtl.dataset.io import read_plan, write_plan
from medtl.dataset.plan import make_plan
from medtl.dataset.transforms import prepare_scan
from medtl.errors import ConfigError, ModelError, TamperedError
from medtl.evaluation import abstention, calibration, novelty
from medtl.evaluation.assess import assess
from medtl.evaluation.io import write_evaluation, write_novelty
from medtl.model.backbones import BACKBONES
from medtl.model.io import build_network, read_network, write_checkpoint
from medtl.model.onnx import as_graph, as_input, ask_graph
from medtl.records import Calibrator, GateCheck, Predictions, Release
from medtl.registry.io import RELEASE, Register
from medtl.registry.parcel import write_sums
from medtl.scans.intake import read_scans
from medtl.scans.segments import PixelStore
from pipelines import bundle, steps
from pipelines.apply import apply_release
from pipelines.cli import call
from pipelines.examination import CALIBRATOR, CONFORMAL
from pipelines.exports import TOLERANCE, write_tried
from pipelines.predict import Request

CLASSES = ("dark", "bright")
FACTS = ("phases", "history", "stages")


def guesses(part: str, n: int, seed: int) -> Predictions:
    """Give answers about people whose truth is half guessed."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2
    sure = 1 / (1 + np.exp(-3 * (truth - 0.5 + rng.normal(0, 0.8, n))))
    names = tuple(f"{part}{number}" for number in range(n))
    return Predictions(part, names, names, np.eye(2)[truth], np.stack([1 - sure, sure], 1))


def write_release(config: Config, folder: Path) -> None:
    """Write what a run's release holds, of a network that learned nothing."""
    scans = steps.ingest_scans(config)
    read = PixelStore(steps.pixel_folder(config))
    plan = make_plan(read_scans(scans.path), read, "binary", CLASSES, config.dataset.plan, 16)
    write_plan(folder, plan)
    name = config.model.backbone
    network, weights = build_network(name, plan.size[0], plan.channels, 2, 0.0, None, 0.5, 3)
    torch.nn.init.normal_(network.stages["head"].get_submodule("1").weight, std=0.3)
    described: dict[str, Any] = dict.fromkeys(FACTS, ())
    write_checkpoint(
        folder,
        network,
        described
        | {"backbone": name, "task": "binary", "classes": CLASSES, "channels": plan.channels, "size": plan.size}
        | {"weights": weights, "parameters": 1, "environment": {}},
    )
    val, wanted = guesses("val", 60, 0), config.evaluation
    fitted = Calibrator("binary", "platt", "wanted", slopes=(1.7,), intercepts=(0.2,))
    write_record(folder / CALIBRATOR, fitted)
    shown = calibration.calibrated(fitted, val)
    write_record(folder / CONFORMAL, abstention.fit(shown, "binary", CLASSES, wanted.abstention))
    features = np.random.default_rng(0).normal(size=(60, BACKBONES[config.model.backbone].features))
    write_novelty(folder, novelty.fit(features, val.targets, val.patients, features, val.patients, wanted.novelty))
    write_evaluation(folder, assess(shown, guesses("test", 60, 1), "binary", CLASSES, wanted, 0))
    checks = (GateCheck("auroc, value, at least 0", 0.8, True),)
    write_record(folder / RELEASE, Release("r-0123456789ab", config.name, "validated", checks, {"model": "x"}))
    write_bytes(folder / "card.md", b"# tiny\n")
    write_sums(folder)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Give the config of a workspace that holds one release; it lies beside it as YAML."""
    folder = tmp_path_factory.mktemp("released")
    rng = np.random.default_rng(4)
    (folder / "scans").mkdir()
    for number in range(7):
        picture = rng.integers(0, 60 + 25 * number, (40, 32)).astype(np.uint8)
        Image.fromarray(picture).save(folder / "scans" / f"Doe^John {number}.png")
    (folder / "scans" / "torn.png").write_bytes(b"no picture")
    (folder / "scans" / "labels.csv").write_text("path,label,patient\n")
    settings = {
        "name": "tiny",
        "workspace": str(folder / "w"),
        "scans": {"source": str(folder / "scans"), "key_file": str(folder / "key")},
        "dataset": {"plan": {"size": 32}},
        "model": {"backbone": "monai_resnet10_narrow", "weights": "none", "batch_size": 4, "threads": 1},
        "evaluation": {"uncertainty": {"resamples": 100}},
    }
    (folder / "tiny.yaml").write_text(json.dumps(settings))
    config = load_config(folder / "tiny.yaml")
    artifact = AuditedStore(config.workspace).make("release", {"of": "a test"}, lambda at: write_release(config, at))
    Register(config.workspace).enter(read_record(artifact.path / RELEASE, Release), artifact, {})
    return config


@pytest.fixture(scope="module")
def bundled(released: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundled") / "tiny"
    assert export(released, out, "bundle", "--config", released.workspace.parent / "tiny.yaml") == 0
    return out


def export(config: Config, out: Path, form: str, *more: object) -> int:
    words = ["registry", "export", "r-01", out, "--format", form, "--workspace", config.workspace, "--json", *more]
    return call([str(word) for word in words])


def release_folder(config: Config) -> Path:
    register = Register(config.workspace)
    return register.open(register.called("r-01"))


def predicted(config: Config, out: Path) -> list[dict[str, str]]:
    """Do what `medtl predict` does, without Prefect."""
    apply_release(config, steps.ingest_scans(config), Request(config.workspace, out))
    return rows_of(out)


def rows_of(table: Path) -> list[dict[str, str]]:
    """Read a table; a scan that was left out has another pseudonym each time."""
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    return [row | ({"scan": ""} if row["decision"] == "excluded" else {}) for row in rows]


def test_a_graph_answers_as_predict_does_and_says_what_it_is(
    released: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    out = tmp_path / "tiny.onnx"
    assert export(released, out, "onnx") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    event = AuditLog(released.workspace).events()[-1]
    assert (event["action"], event["subject"]) == ("release.exported", "r-0123456789ab")
    assert event["details"] == {"sha256": file_digest(out), "format": "onnx"} and said["sha256"] == file_digest(out)

    plan = read_plan(release_folder(released))
    known = read_scans(steps.ingest_scans(released).path)
    read = PixelStore(steps.pixel_folder(released))
    packed = np.concatenate([prepare_scan(read(scan), scan, plan) for scan in known])
    found = {
        scan.scan_id[:16]: p for scan, p in zip(known, ask_graph(out.read_bytes(), as_input(packed, plan)), strict=True)
    }
    table = [row for row in predicted(released, tmp_path / "p.csv") if row["decision"] != "excluded"]
    assert len(table) == 7
    for row in table:
        assert float(row["probability_bright"]) == pytest.approx(found[row["scan"]][1], abs=TOLERANCE)

    told = {one.key: one.value for one in onnx.load(out).metadata_props}
    assert (told["release"], told["status"], told["task"]) == ("r-0123456789ab", "validated", "binary")
    assert json.loads(told["classes"]) == ["dark", "bright"] and json.loads(told["size"]) == [32, 32]
    assert json.loads(told["intensity"])["intensity"] == plan.intensity and told["channels"] == "1"
    assert json.loads(told["operating_points"])[0]["label"] == "bright"
    assert "platt, in the graph" in told["calibrator"] and "Preparing scans" in told["left_to_the_reader"]

    capsys.readouterr()
    assert export(released, out, "onnx") == 1 and "is there already" in capsys.readouterr().err


def test_a_graph_that_answers_otherwise_is_not_left_behind(released: Config, tmp_path: Path) -> None:
    folder = release_folder(released)
    plan, network = read_plan(folder), read_network(folder)
    graph = as_graph(network, plan, Calibrator("binary", "none", ""), {})
    with pytest.raises(ModelError, match=r"differ by .* in a probability"):
        write_tried(graph, network, plan, read_record(folder / CALIBRATOR, Calibrator), tmp_path / "g.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_the_gate_refused_leaves_as_a_parcel_only(released: Config, tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    shutil.copytree(released.workspace, workspace)
    AuditLog(workspace).append("release.retired", "r-0123456789ab", details={"name": "tiny"})
    config = released.model_copy(update={"workspace": workspace})
    assert export(config, tmp_path / "g.onnx", "onnx") == 3
    assert export(config, tmp_path / "b", "bundle") == 3
    assert export(config, tmp_path / "p.zip", "parcel") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"w", "p.zip"}


@pytest.mark.slow
def test_monai_runs_the_bundle_and_gets_the_answers_of_predict(released: Config, bundled: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", bundled / "configs" / "inference.json"]
    spare = tmp_path / "t"
    spare.mkdir()
    asked = ["--bundle_root", bundled, "--input_dir", released.scans.source, "--output", tmp_path / "b.csv"]
    done = subprocess.run(
        [str(word) for word in (*command, *asked)],
        env=os.environ | {"TMPDIR": str(spare), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "b.csv")
    assert rows == predicted(released, tmp_path / "p.csv") and len(rows) == 8
    assert "Doe" not in done.stdout + done.stderr
    assert list(spare.iterdir()) == [], "nothing of the scans is left"


def test_a_bundle_is_described_in_monais_words_and_holds_nothing_that_runs(bundled: Path) -> None:
    described = json.loads((bundled / "configs" / "metadata.json").read_text())
    wanted = {"version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"}
    wanted |= {"description", "authors", "copyright", "network_data_format", "schema", "changelog"}
    assert wanted <= described.keys() and "medtl" in described["required_packages_version"]
    tensor = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"}
    image, told = (described["network_data_format"][k] for k in ("inputs", "outputs"))
    assert tensor <= image["image"].keys() and tensor <= told["pred"].keys()
    assert (image["image"]["spatial_shape"], told["pred"]["channel_def"]) == ([32, 32], {"0": "dark", "1": "bright"})
    assert "$" not in (bundled / "configs" / "inference.json").read_text()
    assert not [path for path in bundled.rglob("*") if path.suffix in (".pt", ".pth", ".pkl", ".py")]
    assert {"LICENSE", "SHA256SUMS", "docs", "models", "configs"} == {path.name for path in bundled.iterdir()}
    assert (bundled / "docs" / "README.md").read_text().startswith("# tiny\n")
    for path in bundled.rglob("*.json"):
        assert str(bundled.parent) not in path.read_text() and "key_file" not in path.read_text(), path.name


def test_monai_gets_the_network_of_a_bundle(released: Config, bundled: Path) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser(json.loads((bundled / "configs" / "inference.json").read_text()))
    parser["bundle_root"] = str(bundled)
    network = parser.get_parsed_content("network_def")
    images = torch.rand(3, 1, 32, 32)
    plain = read_network(release_folder(released))(images).double().softmax(1).detach().numpy()
    with torch.no_grad():
        told = network(images).numpy()
    fitted = read_record(release_folder(released) / CALIBRATOR, Calibrator)
    assert told == pytest.approx(calibration.apply(fitted, plain), abs=1e-6)


def test_a_bundle_looks_at_every_byte_of_itself_before_it_loads_any(bundled: Path, tmp_path: Path) -> None:
    whole = tmp_path / "b"
    shutil.copytree(bundled, whole)
    for path in [path for path in sorted(whole.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(TamperedError, match=path.name):
            bundle.network(str(whole))
        path.write_bytes(data)
    assert bundle.check(whole) == whole
    (whole / "models" / "Doe^John.png").write_bytes(b"")
    with pytest.raises(TamperedError, match="1 files that are not its own") as refused:
        bundle.predict(str(whole), str(tmp_path), str(tmp_path / "t.csv"))
    assert "Doe" not in str(refused.value) and not (tmp_path / "t.csv").exists()


def test_a_bundle_wants_to_know_how_scans_are_read(
    released: Config, bundled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(released, tmp_path / "b", "bundle") == 2 and "--config CONFIG" in capsys.readouterr().err
    said = ("--config", released.workspace.parent / "tiny.yaml")
    assert export(released, tmp_path / "b", "bundle", *said, "--set", "name=other") == 2
    assert export(released, bundled, "bundle", *said) == 1 and "is there already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    for scans, table in ((None, "t.csv"), (str(tmp_path), None), (str(tmp_path), str(bundled / "t.csv"))):
        with pytest.raises(ConfigError):
            bundle.predict(str(bundled), scans, table)
