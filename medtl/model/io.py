"""Weights, checkpoints and unfinished training on disk; the one door for downloads of weights.

Weights are stored as safetensors. A pickle is read with ``weights_only`` and converted; a download is checked
against its published sha256 before anything opens it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from medtl.artifacts import file_digest, read_record, storage_errors, write_bytes, write_record
from medtl.errors import ModelError, WeightsError
from medtl.model.fit import Progress
from medtl.model.surgery import StagedNetwork, backbone, cut, source_network
from medtl.model.weights import OURS, load_source, load_staged
from medtl.records import Checkpoint, Epoch, LoadReport, Phase

WEIGHTS, CHECKPOINT, ENTRY = "model.safetensors", "checkpoint.json", "entry.json"
HOST = "https://download.pytorch.org/models/"
HOST_VARIABLE = "MEDTL_WEIGHTS_HOST"  # another server with the same files: a hospital's mirror
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class VaultEntry:
    """One set of weights in the vault and where it came from."""

    name: str
    backbone: str
    sha256: str  # of the safetensors file in the vault
    source: str
    original_sha256: str | None = None
    licence: str | None = None
    citation: str | None = None


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file of weights that a run starts from."""

    path: Path
    sha256: str
    source: str  # what a report may say: a vault name or a bare file name
    licence: str | None = None
    citation: str | None = None


class Vault:
    """Weights kept on this machine: ``<vault>/<name>/model.safetensors`` with its ``entry.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self) -> tuple[VaultEntry, ...]:
        """List what is there, by name."""
        return tuple(read_record(path, VaultEntry) for path in sorted(self.folder.glob(f"*/{ENTRY}")))

    def add(
        self,
        name: str,
        backbone_name: str,
        state: Mapping[str, Tensor],
        source: str,
        original_sha256: str | None = None,
        licence: str | None = None,
        citation: str | None = None,
    ) -> VaultEntry:
        """Put weights in, replacing an entry of the same name."""
        folder = self.folder / name
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / WEIGHTS, safetensors_save(_plain(state)))
        entry = VaultEntry(
            name, backbone_name, file_digest(folder / WEIGHTS), source, original_sha256, licence, citation
        )
        write_record(folder / ENTRY, entry)
        return entry

    def find(self, name: str) -> WeightsFile | None:
        """Find an entry and check its bytes.

        Raises:
            WeightsError: the weights are not what was put in.
        """
        folder = self.folder / name
        if not (folder / ENTRY).exists():
            return None
        entry = read_record(folder / ENTRY, VaultEntry)
        if not (folder / WEIGHTS).exists() or file_digest(folder / WEIGHTS) != entry.sha256:
            raise WeightsError(f"The weights '{name}' in the vault were altered. Remove that folder, add them again.")
        return WeightsFile(folder / WEIGHTS, entry.sha256, f"vault:{name}", entry.licence, entry.citation)

    def add_file(self, path: Path, backbone_name: str, name: str | None = None) -> VaultEntry:
        """Put a checkpoint file in, converted to safetensors.

        Raises:
            WeightsError: not a readable set of weights.
        """
        state = read_weights(path)
        return self.add(name or path.stem, backbone_name, state, path.name, original_sha256=file_digest(path))

    def fetch(self, backbone_name: str, host: str | None = None) -> VaultEntry:
        """Download a backbone's ImageNet weights, check them, and put them in as ``imagenet-<backbone>``.

        Raises:
            WeightsError: none are published, no connection, or the wrong checksum.
        """
        row = backbone(backbone_name)
        if row.weights is None:
            raise WeightsError(
                f"No ImageNet weights are published for '{backbone_name}'. Use a file, or weights: none."
            )
        base = host or os.environ.get(HOST_VARIABLE) or HOST
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / row.weights.file
            _download(base.rstrip("/") + "/" + row.weights.file, path)
            found = file_digest(path)
            if not found.startswith(row.weights.sha256):
                raise WeightsError(
                    f"'{row.weights.file}' has sha256 {found[:16]}…, expected {row.weights.sha256[:16]}…: damaged on "
                    "the way or not that file. Nothing was kept; try again, or another server."
                )
            state = read_weights(path)
        return self.add(
            f"imagenet-{backbone_name}",
            backbone_name,
            state,
            row.weights.file,
            original_sha256=found,
            licence=row.weights.licence,
            citation=row.citation,
        )


def resolve_weights(spec: str, backbone_name: str, vault: Vault) -> WeightsFile | None:
    """Find what ``model.weights`` means: ``none``, ``imagenet``, ``vault:NAME`` or a file.

    Raises:
        WeightsError: it is not there, cannot be fetched, or was altered.
    """
    backbone(backbone_name)
    if spec == "none":
        return None
    if spec == "imagenet":
        found = vault.find(f"imagenet-{backbone_name}")
        if found is None:
            vault.fetch(backbone_name)
            found = vault.find(f"imagenet-{backbone_name}")
        return found
    if spec.startswith("vault:"):
        found = vault.find(spec.removeprefix("vault:"))
        if found is None:
            names = ", ".join(entry.name for entry in vault.entries()) or "nothing"
            raise WeightsError(f"The vault holds no '{spec.removeprefix('vault:')}'; it holds {names}.")
        return found
    path = Path(spec)
    if not path.is_file():
        raise WeightsError(f"model.weights: '{path.name}' is not a file. Write none, imagenet, vault:NAME or a path.")
    return WeightsFile(path, file_digest(path), path.name)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or, with ``weights_only``, from a pickle.

    Raises:
        WeightsError: neither, damaged, or a pickle that wants to run code.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors_load(path.read_bytes())
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Parsers of a hostile file raise anything; whatever it is, these are no weights.
        raise WeightsError(
            f"'{path.name}' is not a readable set of weights ({type(error).__name__}): damaged, or a pickle that holds "
            "more than tensors, which is refused because it could run code."
        ) from error
    state = loaded.get("state_dict", loaded.get("model", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"'{path.name}' holds no state dict (names to tensors).")
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def build_network(
    name: str,
    size: int,
    channels: int,
    classes: int,
    dropout: float,
    weights: WeightsFile | None,
    min_share: float,
    seed: int,
) -> tuple[StagedNetwork, LoadReport]:
    """Build a staged network, with weights if there are any; what has none is drawn from the seed.

    Raises:
        WeightsError: too little of the weights fits.
    """
    torch.manual_seed(seed)
    source = source_network(name, size)
    if weights is None:
        return cut(source, name, channels, classes, dropout), LoadReport("none", None, 0, (), (), 0.0)
    report = LoadReport(weights.source, weights.sha256, 0, (), (), 0.0, weights.licence, weights.citation)
    state = read_weights(weights.path)
    if any(key.startswith(OURS) for key in state):
        network = cut(source, name, channels, classes, dropout)
        return network, load_staged(network, name, state, report, min_share)
    report = load_source(source, name, state, size, report, min_share)
    return cut(source, name, channels, classes, dropout), report


def write_checkpoint(folder: Path, network: StagedNetwork, checkpoint: Mapping[str, Any]) -> Checkpoint:
    """Write the network's weights and its description."""
    data = safetensors_save(_plain(network.state_dict()))
    write_bytes(folder / WEIGHTS, data)
    record = Checkpoint(**checkpoint, weights_sha256=file_digest(folder / WEIGHTS))
    write_record(folder / CHECKPOINT, record)
    return record


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's description."""
    return read_record(folder / CHECKPOINT, Checkpoint)


def read_network(folder: Path) -> StagedNetwork:
    """Build the network of a checkpoint with its weights.

    Raises:
        WeightsError: the weights are not those that the description names.
    """
    record = read_checkpoint(folder)
    if file_digest(folder / WEIGHTS) != record.weights_sha256:
        raise WeightsError("The checkpoint's weights were altered after they were written.")
    source = source_network(record.backbone, record.size[0])
    network = cut(source, record.backbone, record.channels, len(record.classes), 0.0)
    network.load_state_dict(read_weights(folder / WEIGHTS))
    return network.eval()


class FolderSaver:
    """Unfinished training in a folder: one safetensors file replaced in one step after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.safetensors"

    def load(self) -> Progress | None:
        """Give what was saved last; a file that is not readable counts as nothing."""
        try:
            data = self.path.read_bytes()
            tensors = safetensors_load(data)
            length = int.from_bytes(data[:8], "little")
            plain = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["progress"])
            return _progress(plain, tensors)
        except (OSError, SafetensorError, ValueError, KeyError, ModelError):
            return None

    def save(self, progress: Progress) -> None:
        """Keep it, in one step."""
        tensors: dict[str, Tensor] = {}
        for part in ("current", "best", "phase_best"):
            tensors |= {f"{part}/{key}": value for key, value in getattr(progress, part).items()}
        optimiser = progress.optimiser
        if optimiser is not None:
            for index, slots in optimiser["state"].items():
                tensors |= {f"optimiser/{index}/{slot}": value for slot, value in slots.items()}
        plain = {
            "phase": progress.phase,
            "epoch": progress.epoch,
            "best_score": progress.best_score,
            "phase_score": progress.phase_score,
            "phase_best_epoch": progress.phase_best_epoch,
            "phase_digest": progress.phase_digest,
            "phases": [asdict(phase) for phase in progress.phases],
            "history": [asdict(epoch) for epoch in progress.history],
            "groups": None if optimiser is None else optimiser["param_groups"],
        }
        write_bytes(self.path, safetensors_save(_plain(tensors), metadata={"progress": json.dumps(plain)}))

    def clear(self) -> None:
        """Remove it: the training it belongs to is finished."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


def _progress(plain: dict[str, Any], tensors: Mapping[str, Tensor]) -> Progress:
    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}

    optimiser = None
    if plain["groups"] is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimiser").items():
            index, slot = key.split("/")
            state.setdefault(int(index), {})[slot] = value
        optimiser = {"state": state, "param_groups": plain["groups"]}
    return Progress(
        phase=plain["phase"],
        epoch=plain["epoch"],
        current=part("current"),
        best=part("best"),
        phase_best=part("phase_best"),
        optimiser=optimiser,
        best_score=None if plain["best_score"] is None else tuple(plain["best_score"]),
        phase_score=None if plain["phase_score"] is None else tuple(plain["phase_score"]),
        phase_best_epoch=plain["phase_best_epoch"],
        phase_digest=plain["phase_digest"],
        phases=[
            Phase(**{**phase, "unfrozen": tuple(phase["unfrozen"]), "frozen": tuple(phase["frozen"])})
            for phase in plain["phases"]
        ],
        history=[Epoch(**epoch) for epoch in plain["history"]],
    )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into contiguous memory of their own, sorted: safetensors then writes the same bytes every time."""
    return {key: state[key].detach().cpu().contiguous().clone() for key in sorted(state)}


def _download(url: str, path: Path) -> None:
    try:
        with (
            contextlib.closing(urllib.request.urlopen(url, timeout=_TIMEOUT_S)) as answer,  # noqa: S310 - host is ours
            path.open("wb") as stream,
        ):
            shutil.copyfileobj(answer, stream, 1 << 20)
            wanted = answer.headers.get("Content-Length")
        if wanted is not None and path.stat().st_size != int(wanted):
            raise OSError("the connection ended early")
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise WeightsError(
            f"'{path.name}' could not be downloaded ({_short(error)}). Without a connection, bring the file and add "
            f"it: medtl weights add FILE --backbone NAME; a mirror goes into {HOST_VARIABLE}."
        ) from error


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error or type(error).__name__)[:120]
