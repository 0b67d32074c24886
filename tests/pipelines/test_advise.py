"""``medtl advise``, as a person calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App
from safetensors.torch import save_file

from medtl.audit import AuditLog
from medtl.config import parse_config
from medtl.errors import ConfigError, PlanError, WeightsError
from medtl.model.surgery import source_network
from medtl.model.vault import Vault, read_weights
from medtl.records import Split
from pipelines.advise import advise, to_split

NAME = "monai_resnet10_narrow"
Advise = Callable[..., Any]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(source_network(NAME, 32).state_dict(), tmp_path / "ours.safetensors")
    return tmp_path / "ours.safetensors"


@pytest.fixture
def said(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Advise:
    def call(*arguments: object) -> Any:
        app = App(name="medtl")
        app.command(advise)
        tokens = ["advise", str(config_file), "--json", *map(str, arguments)]
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    return call


def kept(workspace: Path, kind: str = "*") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in workspace.glob(f"artifacts/{kind}/*/manifest.json")}


def test_heads_and_references_are_measured_and_a_second_call_measures_nothing(
    tmp_path: Path, said: Advise, weights: Path
) -> None:
    how = ("--quick", "--set", f"model.weights={weights}")
    found = said(*how)
    workspace = tmp_path / "workspace"
    (split,) = [
        Split(**{**raw, "exclusions": ()})
        for path in workspace.glob("artifacts/split/*/split.json")
        if (raw := json.loads(path.read_bytes()))["test"]
    ]
    assert [way["strategy"] for way in found["ways"]] == ["logistic_regression", "knn", "staged", "scratch"]
    assert [way["judged"] for way in found["ways"]] == ["cross-validation"] * 2 + ["hold-out"] * 2
    assert found["studies"] == len(split.train) + len(split.val) == 48 - len(split.test)
    for way in found["ways"]:
        part = split.val if way["judged"] == "hold-out" else (*split.train, *split.val)
        assert way["score"]["n"] == len(part)
        assert way["seconds"] > 0
    best = max(found["ways"][:2], key=lambda way: way["score"]["value"])
    assert found["ways"][0]["score"]["low"] < found["ways"][0]["score"]["value"] <= 1
    assert found["best"] in {best["name"], *(way["name"] for way in found["ways"][2:])}
    assert found["recommended"]["name"] in {way["name"] for way in found["ways"]}
    assert found["hints"][0]["per_channel"] > 0 and found["hints"][0]["logme"] is not None
    page = Path(found["page"]).read_text()
    assert found["recommended"]["name"] in page and "patient-" not in page and str(tmp_path) not in page
    before = kept(workspace)
    assert said(*how) == found
    assert kept(workspace) == before


def test_the_test_part_is_not_opened(tmp_path: Path, said: Advise) -> None:
    said("--backbones", f"{NAME}=none", "--heads", "knn", "--quick")
    trail = AuditLog(tmp_path / "workspace")
    opened = trail.events() if trail.path.exists() else []
    assert "test.opened" not in [event["action"] for event in opened]
    assert not kept(tmp_path / "workspace", "predictions")


def test_weights_are_not_fetched_for_the_split_alone(tmp_path: Path, weights: Path) -> None:
    config = parse_config({"name": "advice", "workspace": str(tmp_path / "w"), "scans": {"source": str(tmp_path)}})
    assert not to_split(config).dataset.split.near_in_features
    here = parse_config(
        config.model_dump(mode="json"), overrides=[f"model.backbone={NAME}", f"model.weights={weights}"]
    )
    assert to_split(here) == here


def test_another_backbone_is_all_that_is_measured_anew(tmp_path: Path, said: Advise, weights: Path) -> None:
    first = said("--no-references", "--backbones", f"{NAME}=none", "--heads", "knn")
    before = kept(tmp_path / "workspace", "probe")
    both = said("--no-references", "--backbones", f"{NAME}=none,{NAME}={weights}", "--heads", "knn")
    after = kept(tmp_path / "workspace", "probe")
    assert (len(before), len(after)) == (1, 2) and before.items() <= after.items()
    assert both["ways"][0]["score"] == first["ways"][0]["score"]
    names = [way["name"] for way in both["ways"]]
    assert names == [f"{NAME} (without weights), nearest neighbours", f"{NAME}, nearest neighbours"]
    assert [hint["frechet"] is None for hint in both["hints"]] == [True, False]
    assert not kept(tmp_path / "workspace", "reference")


def test_a_backbone_that_cannot_take_the_images_is_left_out_and_said(said: Advise) -> None:
    how = ("--no-references", "--heads", "knn", "--set", "dataset.plan.size=40")
    found = said("--backbones", f"{NAME}=none,vit_b_16=none", *how)
    assert [way["backbone"] for way in found["ways"]] == [NAME]
    assert "vit_b_16 (without weights) was left out" in found["notes"][0]
    with pytest.raises((ConfigError, PlanError), match="16"):
        said("--backbones", "vit_b_16=none", *how)


def test_weights_in_the_vault_are_compared_and_told_apart(tmp_path: Path, said: Advise, weights: Path) -> None:
    vault = Vault(tmp_path / "workspace" / "weights")
    for name in ("one", "two"):
        vault.add(name, NAME, read_weights(weights), "a test")
    found = said("--no-references", "--heads", "knn")
    assert [way["name"] for way in found["ways"]] == [f"{NAME} ({name}), nearest neighbours" for name in ("one", "two")]
    assert found["ways"][0]["settings"][1] == "model.weights=vault:one"
    assert not found["clear"] and "No clear winner" in found["sentence"]  # they are the same weights


def test_without_weights_it_says_how_to_get_some(said: Advise) -> None:
    with pytest.raises(WeightsError, match="medtl weights fetch"):
        said()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--heads", "forest"), "not 'forest'"),
        (("--backbones", "resnet81"), "did you mean 'resnet"),
        (("--backbones", "monai_resnet10_3d"), "reads volumes"),
        (("--backbones", ","), "--backbones names one or more"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, said: Advise, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        said(*arguments)
    assert not kept(tmp_path / "workspace")
