"""Checkpoints, unfinished training and kept activations on disk. Weights to start from are in the vault (vault.py)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from medtl.artifacts import file_digest, read_record, storage_errors, write_bytes, write_record
from medtl.config import InferenceConfig, ModelConfig
from medtl.errors import ModelError, WeightsError
from medtl.model.fit import put_head
from medtl.model.heads import BANK, VOTES, NearestNeighbours
from medtl.model.segmenter import SegmenterNetwork
from medtl.model.segmenter import build as build_segmenter
from medtl.model.surgery import HEAD, StagedNetwork, cut, source_network
from medtl.model.trainer import Progress
from medtl.model.vault import WEIGHTS, WeightsFile, read_weights
from medtl.model.weights import OURS, load_source, load_staged, normalisation, stored_form
from medtl.records import AnyArray, Checkpoint, Epoch, GridPlan, LoadReport, Phase

CHECKPOINT, BUILT = "checkpoint.json", "segmenter.json"
_SPARE_MB = 1024.0  # of the disk that kept activations leave free
_DIGEST = 32  # bytes of a sha256


@dataclass(frozen=True, slots=True)
class Built:
    """What a segmentation's network is built from, beside its plan."""

    backbone: str
    segmenter: Mapping[str, Any]  # model.segmenter
    inference: Mapping[str, Any]  # model.inference: what it was measured with is what it serves with


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
        report = load_staged(network, name, state, report, min_share)
    else:
        report = load_source(source, name, state, size, report, min_share)
        network = cut(source, name, channels, classes, dropout)
    seen = normalisation(weights.contract, channels)
    if seen is not None:  # what the weights were trained to see, where their entry in the vault says so
        _set_input(network, *seen)
    return network, report


def write_checkpoint(folder: Path, network: StagedNetwork, checkpoint: Mapping[str, Any]) -> Checkpoint:
    """Write the network's weights and its description."""
    data = safetensors_save(stored_form(network.state_dict()))
    write_bytes(folder / WEIGHTS, data)
    kind = "knn" if _neighbours(network) is not None else "linear"
    record = Checkpoint(
        **checkpoint,
        head=kind,
        mean=tuple(network.mean.flatten().tolist()),
        std=tuple(network.std.flatten().tolist()),
        weights_sha256=file_digest(folder / WEIGHTS),
    )
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
    if record.mean and record.std:
        _set_input(network, record.mean, record.std)
    state = read_weights(folder / WEIGHTS)
    if record.head == "knn":
        put_head(network, NearestNeighbours(state[BANK], state[VOTES], 1, record.task == "multilabel"))
    network.load_state_dict(state)
    return network.eval()


def write_segmenter(
    folder: Path, network: SegmenterNetwork, checkpoint: Mapping[str, Any], config: ModelConfig
) -> Checkpoint:
    """Write a segmentation's weights, its description, and what it is built from beside its plan."""
    write_bytes(folder / WEIGHTS, safetensors_save(stored_form(network.state_dict())))
    record = Checkpoint(**checkpoint, head="mask", weights_sha256=file_digest(folder / WEIGHTS))
    write_record(folder / CHECKPOINT, record)
    settings = {
        **config.segmenter.model_dump(mode="json", exclude={"members", "refit"}),
        "network": network.kind,
    }  # "auto" has become a network
    write_record(folder / BUILT, Built(config.backbone, settings, config.inference.model_dump(mode="json")))
    return record


def join_segmenters(folder: Path, members: Sequence[Path]) -> Checkpoint:
    """Write several checkpoints of one plan and one config as one; it is described as the first of them is."""
    first, others = members[0], members[1:]
    write_bytes(folder / WEIGHTS, (first / WEIGHTS).read_bytes())
    for number, member in enumerate(others, 2):
        write_bytes(folder / _member_file(number), (member / WEIGHTS).read_bytes())
    record = replace(read_checkpoint(first), members=tuple(read_checkpoint(one).weights_sha256 for one in others))
    write_record(folder / CHECKPOINT, record)
    write_record(folder / BUILT, read_record(first / BUILT, Built))
    return record


def read_segmenters(folder: Path, plan: GridPlan) -> tuple[SegmenterNetwork, ...]:
    """Build the segmentation of a checkpoint with its weights: one network, or several that are asked together.

    Raises:
        WeightsError: the weights are not those that the description names.
    """
    record, built = read_checkpoint(folder), read_record(folder / BUILT, Built)
    settings = {"backbone": built.backbone, "segmenter": built.segmenter, "weights": "none"}
    found = []
    for number, digest in enumerate((record.weights_sha256, *record.members), 1):
        file = folder / (WEIGHTS if number == 1 else _member_file(number))
        if file_digest(file) != digest:
            raise WeightsError(f"The checkpoint's weights ({file.name}) were altered after they were written.")
        network, _ = build_segmenter(plan, ModelConfig.model_validate(settings), 0, None)
        try:
            network.load_state_dict(read_weights(file))
        except RuntimeError as error:
            raise WeightsError(
                f"The weights ({file.name}) are of another network than this version of medtl builds from that plan. "
                "Train it again, or take the version that made it: the release's bill of materials names it."
            ) from error
        found.append(network.eval())
    return tuple(found)


def _member_file(number: int) -> str:
    return f"model-{number}.safetensors"


def read_inference(folder: Path) -> InferenceConfig:
    """Read how a segmentation predicts: as it did when it was measured, whatever a config says today."""
    return InferenceConfig.model_validate(dict(read_record(folder / BUILT, Built).inference))


def _set_input(network: StagedNetwork, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with torch.no_grad():
        network.mean.copy_(torch.tensor(mean).view_as(network.mean))
        network.std.copy_(torch.tensor(std).view_as(network.std))


def _neighbours(network: StagedNetwork) -> NearestNeighbours | None:
    return next((m for m in network.stages[HEAD].modules() if isinstance(m, NearestNeighbours)), None)


class FolderSaver:
    """Unfinished training in a folder: one safetensors file, replaced in one step."""

    _STATES = ("current", "best", "best_val", "phase_best", "phase_val")
    _PLAIN = ("phase", "epoch", "step", "phase_best_epoch", "phase_digest", "scaler", "losses", "count")

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
        for part in self._STATES:
            tensors |= {f"{part}/{key}": value for key, value in getattr(progress, part).items()}
        optimiser = progress.optimiser
        if optimiser is not None:
            for index, slots in optimiser["state"].items():
                for slot, value in slots.items():
                    if value is not None:  # momentum that has not begun
                        tensors[f"optimiser/{index}/{slot}"] = value
        plain = {name: getattr(progress, name) for name in self._PLAIN} | {
            "phase_score": progress.phase_score,
            "phases": [asdict(phase) for phase in progress.phases],
            "history": [asdict(epoch) for epoch in progress.history],
            "groups": None if optimiser is None else optimiser["param_groups"],
        }
        write_bytes(self.path, safetensors_save(stored_form(tensors), metadata={"progress": json.dumps(plain)}))

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
    fields: dict[str, Any] = {name: plain[name] for name in FolderSaver._PLAIN}
    fields |= {name: part(name) for name in FolderSaver._STATES}
    return Progress(
        **fields,
        optimiser=optimiser,
        phase_score=None if plain["phase_score"] is None else tuple(plain["phase_score"]),
        phases=[
            Phase(**phase | {name: tuple(phase[name]) for name in ("unfrozen", "frozen", "trainable")})
            for phase in plain["phases"]
        ],
        history=[Epoch(**epoch) for epoch in plain["history"]],
    )


class FolderActivations:
    """Activations of frozen layers under one folder, within a budget; the longest unused make room for new ones.

    An entry is two files: the numbers, and a sha256 per chunk, written after the chunk. Nothing is flushed to the disk
    on purpose: what a crash tore no longer has its digest and is computed again. Entries may be deleted at any time.

    Args:
        folder: of this project alone.
        budget_mb: that all entries together may take.
    """

    def __init__(self, folder: Path, budget_mb: float) -> None:
        self.folder, self.budget_mb = folder, budget_mb
        self._ours: set[str] = set()

    def has(self, key: str) -> bool:
        """Tell whether every chunk of an entry has its digest."""
        try:
            digests = (self.folder / key / "digests").read_bytes()
            self.shape(key)
        except (OSError, ValueError):
            return False
        return bool(digests) and all(any(digests[i : i + _DIGEST]) for i in range(0, len(digests), _DIGEST))

    def shape(self, key: str) -> tuple[int, ...]:
        """Tell the shape of an entry."""
        return tuple(json.loads((self.folder / key / "shape").read_bytes()))

    def room_mb(self) -> float:
        """Tell how many MB may be added: of the budget, and of the disk, if everything unused is removed."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            free = shutil.disk_usage(self.folder).free / 1e6 - _SPARE_MB
        sizes = self._sizes()
        ours = sum(mb for key, mb in sizes.items() if key in self._ours)
        return max(0.0, min(self.budget_mb - ours, free + sum(sizes.values()) - ours))

    def entry(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk: int) -> KeptFolder:
        """Open or begin an entry.

        Args:
            chunk: rows that are written at a time.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        self._ours.add(key)
        self._make_room(float(np.prod(shape)) * dtype.itemsize / 1e6, key)
        with storage_errors(self.folder):
            (self.folder / key).mkdir(parents=True, mode=0o700, exist_ok=True)
            (self.folder / key / "shape").write_text(json.dumps(shape))
            os.utime(self.folder / key)
            return KeptFolder(self.folder / key, shape, dtype, chunk)

    def _sizes(self) -> dict[str, float]:
        sizes = {}
        for entry in self.folder.glob("*/numbers"):
            with contextlib.suppress(OSError):  # another run removes entries too
                sizes[entry.parent.name] = entry.stat().st_blocks * 512 / 1e6
        return sizes

    def _make_room(self, mb: float, key: str) -> None:
        sizes = self._sizes()
        total = sum(sizes.values()) - sizes.get(key, 0.0) + mb
        ages = []
        for name in sizes.keys() - self._ours:
            with contextlib.suppress(OSError):
                ages.append(((self.folder / name).stat().st_mtime, name))
        for _, name in sorted(ages):
            if total <= self.budget_mb:
                break
            shutil.rmtree(self.folder / name, ignore_errors=True)  # whoever has it open keeps it until he closes it
            total -= sizes[name]


class KeptFolder:
    """One entry of :class:`FolderActivations`."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any], chunk: int) -> None:
        self.folder, self.chunk = folder, chunk
        self._row = int(np.prod(shape[1:])) * dtype.itemsize
        self._rows = shape[0]
        self._numbers = os.open(folder / "numbers", os.O_RDWR | os.O_CREAT, 0o600)
        self._digests = os.open(folder / "digests", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._numbers, self._rows * self._row)
        os.ftruncate(self._digests, -(-self._rows // chunk) * _DIGEST)
        self.array: AnyArray = np.memmap(folder / "numbers", dtype, "r", shape=shape)

    def missing(self) -> list[int]:
        """Give the numbers of the chunks that are not there, or not as they were written; reads everything once."""
        found = []
        for number in range(-(-self._rows // self.chunk)):
            rows = self.array[number * self.chunk : (number + 1) * self.chunk]
            written = os.pread(self._digests, _DIGEST, number * _DIGEST)
            if not any(written) or sha256(rows.data).digest() != written:
                found.append(number)
        return found

    def write(self, chunk: int, data: AnyArray) -> None:
        """Keep a chunk.

        Raises:
            StorageError: the disk is full.
        """
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        with storage_errors(self.folder):
            place = chunk * self.chunk * self._row
            done = 0
            while done < len(raw):
                done += os.pwrite(self._numbers, raw[done:], place + done)
            os.pwrite(self._digests, sha256(raw).digest(), chunk * _DIGEST)

    def __del__(self) -> None:
        for handle in (getattr(self, "_numbers", None), getattr(self, "_digests", None)):
            if handle is not None:
                os.close(handle)
