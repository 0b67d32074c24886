"""The verbs of the weight vault, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts import App
from safetensors.torch import save_file

from medtl.errors import ConfigError, WeightsError
from medtl.model.surgery import source_network
from pipelines.weights import weights

NAME = "squeezenet1_0"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(source_network(NAME, 64).state_dict(), tmp_path / "ours.safetensors")
    return tmp_path / "ours.safetensors"


def call(*arguments: object) -> None:
    app = App(name="medtl")
    app.command(weights)
    tokens = ["weights", *map(str, arguments)]
    app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_weights_go_in_are_listed_verified_and_removed(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault = tmp_path / "vault"
    call("add", file, "--backbone", NAME, "--name", "mine", "--licence", "MIT", "--vault", vault, "--json")
    added = said(capsys)
    assert (added["name"], added["layout"], added["load"]["share"]) == ("mine", "native", 1.0)
    call("list", "--vault", vault, "--json")
    (listed,) = said(capsys)
    assert (listed["backbone"], listed["licence"], listed["sha256"]) == (NAME, "MIT", added["sha256"])
    call("verify", "--vault", vault, "--json")
    assert said(capsys) == {"entries": 1, "faults": {}, "trail": True}
    call("remove", "mine", "--vault", vault, "--json")
    assert said(capsys) == {"removed": "mine"}
    call("list", "--vault", vault)
    assert "mine" not in capsys.readouterr().out


def test_verify_fails_and_names_what_is_wrong(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault = tmp_path / "vault"
    for name in ("altered", "broken"):
        call("add", file, "--name", name, "--vault", vault)
    next((vault / "altered").glob("*.safetensors")).write_bytes(b"x")
    (vault / "broken" / "entry.json").write_text("{")
    capsys.readouterr()
    with pytest.raises(
        WeightsError, match=r"2 of what is in .*'altered' were altered; 'broken' has no readable"
    ) as caught:
        call("verify", "--vault", vault, "--json")
    assert caught.value.exit_code == 1
    assert said(capsys)["faults"].keys() == {"altered", "broken"}
    call("list", "--vault", vault)
    assert "damaged" in capsys.readouterr().out


def test_the_input_contract_is_kept_in_the_units_of_the_house(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = ("--mean", "51,102,153", "--std", "51,51,51", "--size", "224,224", "--value-range", "0,255")
    call("add", file, "--backbone", NAME, "--vault", tmp_path / "vault", *contract, "--colour-order", "BGR", "--json")
    kept = said(capsys)
    assert kept["contract"]["mean"] == pytest.approx([0.6, 0.4, 0.2])
    assert (kept["contract"]["size"], kept["contract"]["colour_order"]) == ([224, 224], "RGB")
    assert "BGR turned to RGB" in kept["layout"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backbone", "resnet81"), "did you mean 'resnet"),
        (("--mean", "half", "--std", "1"), "numbers with commas"),
        (("--value-range", "3"), "two numbers"),
        (("--min-share", "2"), "from 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    file: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        call("add", file, "--vault", tmp_path / "vault", *arguments)
    assert not (tmp_path / "vault").exists()


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        call("add", tmp_path / "nowhere.pth", "--vault", tmp_path / "vault")


def test_removing_what_is_not_there_names_the_nearest(file: Path, tmp_path: Path) -> None:
    call("add", file, "--name", "chest", "--vault", tmp_path / "vault")
    with pytest.raises(WeightsError, match="did you mean 'chest'"):
        call("remove", "chset", "--vault", tmp_path / "vault")


def test_fetching_from_nowhere_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"https://HOST/FOLDER/"):
        call("fetch", NAME, "--host", "ftp://mirror.example/", "--vault", tmp_path / "vault")


def test_verify_says_where_nobody_can_say_who_put_weights_in(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    vault = tmp_path / "vault"
    call("add", file, "--name", "mine", "--vault", vault)
    call("verify", "--vault", vault)
    assert not caplog.messages
    for path in vault.glob("audit.*"):
        path.unlink()
    capsys.readouterr()
    call("verify", "--vault", vault, "--json")
    assert said(capsys) == {"entries": 1, "faults": {}, "trail": False}
    assert "has no audit trail" in caplog.text
