"""Weights arrive or the run is refused; a download is checked, against a real server."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from medtl.errors import WeightsError
from medtl.model import io
from medtl.model.backbones import BACKBONES, WeightsSource
from medtl.model.io import Vault, build_network, read_weights, resolve_weights
from medtl.model.surgery import source_network
from medtl.model.weights import plain_keys

NAME = "squeezenet1_0"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return source_network(NAME, 64).state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def build(spec: str | Path, vault: Path, name: str = NAME, channels: int = 3, min_share: float = 0.9):  # type: ignore[no-untyped-def]
    weights = resolve_weights(str(spec), name, Vault(vault))
    return build_network(name, 64, channels, 2, 0.0, weights, min_share, seed=0)


def test_weights_arrive_whole_and_the_report_says_so(
    checkpoint: Path, tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    network, report = build(checkpoint, tmp_path)
    assert (report.share, report.missing, report.source) == (1.0, (), "weights.pth")
    assert report.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert torch.equal(network.state_dict()["stages.stem.0.weight"], state["features.0.weight"])
    grey, _ = build(checkpoint, tmp_path, channels=1)
    assert torch.allclose(grey.state_dict()["stages.stem.0.weight"], state["features.0.weight"].sum(1, keepdim=True))


def test_weights_of_another_architecture_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"Only 0\.0% .* another architecture"):
        build(checkpoint, tmp_path, name="resnet18")


def test_wrapped_names_are_unwrapped(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pth")
    assert build(tmp_path / "w.pth", tmp_path)[1].share == 1.0
    old = {"features.denseblock1.denselayer1.norm.1.weight": torch.zeros(1)}
    assert list(plain_keys(old)) == ["features.denseblock1.denselayer1.norm1.weight"]


class Bad:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("pwned"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "data", [b"", b"rubbish" * 50, pickle.dumps(Bad(), protocol=2)], ids=["empty", "rubbish", "code"]
)
def test_a_file_that_is_no_weights_is_refused_and_runs_nothing(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(WeightsError, match="not a readable set of weights"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="not a readable set of weights"):
        read_weights(tmp_path / "w.safetensors")
    assert not (tmp_path / "pwned").exists()


def test_the_vault_keeps_and_checks(checkpoint: Path, tmp_path: Path) -> None:
    vault = Vault(tmp_path / "vault")
    entry = vault.add_file(checkpoint, NAME, "mine")
    assert [e.name for e in vault.entries()] == ["mine"]
    assert entry.original_sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert build("vault:mine", tmp_path / "vault")[1].share == 1.0
    with pytest.raises(WeightsError, match="it holds mine"):
        build("vault:other", tmp_path / "vault")
    stored = tmp_path / "vault" / "mine" / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match="altered"):
        build("vault:mine", tmp_path / "vault")


@pytest.fixture
def server(checkpoint: Path) -> Iterator[tuple[str, Path, list[str]]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = checkpoint.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if "cut" in self.path else data)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/models/", checkpoint, asked
    running.shutdown()
    thread.join()
    running.server_close()


def publish(monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    row = replace(BACKBONES[NAME], weights=WeightsSource("squeezenet1_0.pth", sha256))
    monkeypatch.setattr("medtl.model.surgery.BACKBONES", {**BACKBONES, NAME: row})


def test_imagenet_weights_are_fetched_once_and_checked(
    server: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, checkpoint, asked = server
    monkeypatch.setenv(io.HOST_VARIABLE, host)
    publish(monkeypatch, hashlib.sha256(checkpoint.read_bytes()).hexdigest())
    for _ in range(2):
        assert build("imagenet", tmp_path / "vault")[1].share == 1.0
    assert asked == ["/models/squeezenet1_0.pth"]
    (entry,) = Vault(tmp_path / "vault").entries()
    assert (entry.name, entry.licence is not None) == (f"imagenet-{NAME}", True)


def test_a_wrong_checksum_keeps_nothing(
    server: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(io.HOST_VARIABLE, server[0])
    publish(monkeypatch, "0" * 64)
    with pytest.raises(WeightsError, match="expected 0000"):
        build("imagenet", tmp_path / "vault")
    assert Vault(tmp_path / "vault").entries() == ()


@pytest.mark.parametrize("host", ["http://127.0.0.1:9/", None])
def test_a_dead_or_cut_connection_says_what_to_try(
    server: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str | None
) -> None:
    monkeypatch.setenv(io.HOST_VARIABLE, host or server[0] + "cut/")
    publish(monkeypatch, "0" * 64)
    with pytest.raises(WeightsError, match="medtl weights add FILE"):
        build("imagenet", tmp_path / "vault")


def test_every_published_digest_agrees_with_its_file_name() -> None:
    for row in BACKBONES.values():
        if row.weights is not None:
            assert row.weights.file.removesuffix(".pth").endswith(row.weights.sha256[:8])
            assert len(row.weights.sha256) in (8, 64)
