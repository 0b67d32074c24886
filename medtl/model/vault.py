"""The weight vault: weights kept on this machine, with where they come from and what they were trained to see.

One folder per entry: ``entry.json`` names the sha256 of the safetensors file beside it. The weights are written first,
under a name made from their digest, and ``entry.json`` is replaced last, in one step: whoever reads finds the old
weights or the new ones, whole, and a crash leaves at most a file that nobody names. Writers hold the vault's lock;
readers need none, so a vault may be mounted read-only.

Where the images are known that weights were trained on, their hashes lie beside them, one a line, as
``dataset.split.pretraining_hashes`` reads them: whoever starts from these weights keeps such images out of his test
part.

What comes and goes is on the vault's own trail (:mod:`medtl.audit`), ``audit.jsonl``. An entry that is not as the trail
says is refused, whoever altered it together with its weights.

Weights are stored as safetensors, under the names of the network they are for. A pickle is read in a child process
(:mod:`medtl.model.pickles`); a download is checked against its published sha256 before anything opens it. Nothing is
downloaded but by :meth:`Vault.fetch`.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from medtl.artifacts import file_digest, read_record, record_bytes, storage_errors, sync_folder, write_bytes
from medtl.audit import AuditLog
from medtl.errors import StorageError, TamperedError, WeightsError
from medtl.model.backbones import Backbone, backbone
from medtl.model.download import Patience, base_address, download
from medtl.model.pickles import PickleLimits, convert_pickle
from medtl.model.surgery import source_network, trunk_keys
from medtl.model.weights import OURS, InputContract, adapt, load_source, to_house_input
from medtl.model.weights import stored_form as stored_form
from medtl.progress import advance
from medtl.records import LoadReport

WEIGHTS, ENTRY = "model.safetensors", "entry.json"
HOST = "https://download.pytorch.org/models/"
HOST_VARIABLE = "MEDTL_WEIGHTS_HOST"  # another server with the same files: a hospital's mirror
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_USUAL_SIZE = 224


@dataclass(frozen=True, slots=True)
class VaultEntry:
    """One set of weights in the vault, where it came from and what it was trained to see; ``None`` is unknown."""

    name: str
    backbone: str | None
    sha256: str  # of the safetensors file in the vault
    source: str
    original_sha256: str | None = None
    licence: str | None = None
    citation: str | None = None
    contract: InputContract | None = None  # for values from 0 to 1 and RGB, whatever it was
    added: str | None = None  # UTC, ISO 8601
    layout: str | None = None  # whose names it came under, and what was changed
    tensors: int | None = None
    parameters: int | None = None  # without running statistics
    trained_on: str | None = None  # sha256 of the list of hashes of the images it was trained on


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file of weights that a run starts from."""

    path: Path
    sha256: str
    source: str  # what a report may say: a vault name or a bare file name
    licence: str | None = None
    citation: str | None = None
    contract: InputContract | None = None
    network: str | None = None  # backbone or segmentation network whose names it has; None: not known


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one entry."""

    name: str
    what: str


class Vault:
    """Weights kept on this machine: ``<vault>/<name>/entry.json`` and the safetensors file that it names.

    Args:
        folder: made where something is first added.
        now: gives the time of an addition.
    """

    def __init__(self, folder: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.folder = folder
        self.trail = AuditLog(folder)
        self._now = now

    @property
    def told(self) -> bool:
        """Tell whether there is a trail, or was: a vault of before it had one has no head, and nothing in the log."""
        path = self.trail.path
        return self.trail.head_path.exists() or (path.exists() and path.stat().st_size > 0)

    def names(self) -> tuple[str, ...]:
        """List what is there by name, whole or not."""
        with storage_errors(self.folder):
            found = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return tuple(sorted(n for n in found if _NAME.fullmatch(n) and (self.folder / n).is_dir()))

    def entries(self) -> tuple[VaultEntry, ...]:
        """List the entries that can be read; :meth:`verify` names the others."""
        found = []
        for name in self.names():
            with contextlib.suppress(WeightsError):
                found.append(self.entry(name))
        return tuple(found)

    def entry(self, name: str) -> VaultEntry:
        """Read one entry.

        Raises:
            WeightsError: there is none of that name (the nearest is named), or it is damaged.
        """
        check_name(name)
        if not (self.folder / name).is_dir():
            near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.3)
            held = f"did you mean '{near[0]}'?" if near else f"it holds {', '.join(self.names()) or 'nothing'}."
            raise WeightsError(f"The vault holds no '{name}'; {held}")
        try:
            entry = read_record(self.folder / name / ENTRY, VaultEntry)
        except StorageError as error:
            raise WeightsError(f"'{name}' in the vault has no readable {ENTRY}. {_anew(name)}") from error
        if entry.name != name or not all(
            _DIGEST.fullmatch(d) for d in (entry.sha256, entry.trained_on) if d is not None
        ):
            raise WeightsError(f"The {ENTRY} of '{name}' in the vault is not its own. {_anew(name)}")
        return entry

    def find(self, name: str) -> WeightsFile | None:
        """Find an entry and check its bytes, and the trail by which it is judged.

        Raises:
            WeightsError: the entry is damaged, the weights are not what was put in, or the trail was altered.
        """
        check_name(name)
        if not (self.folder / name).is_dir():
            return None
        if self.told:
            try:
                self.trail.verify()
            except TamperedError as error:
                raise WeightsError(f"The vault of '{name}' has a trail that cannot be trusted. {error}") from error
        for attempt in range(2):  # it may be replaced between the two looks: then the second sees the new one
            entry = self.entry(name)
            fault = self._fault_of(entry)
            if fault is None:
                return WeightsFile(
                    self._weights_of(entry), entry.sha256, f"vault:{name}", entry.licence, entry.citation,
                    entry.contract, entry.backbone,
                )  # fmt: skip
            if attempt:
                raise WeightsError(f"The weights '{name}' in the vault {fault}. {_anew(name)}")
        return None

    def verify(self) -> tuple[Fault, ...]:
        """Hash everything again and hold it against the trail.

        Returns:
            What was altered, is missing, has a broken entry, or came or went without a word on the trail; the trail
            itself, by its file's name, where it cannot be trusted.
        """
        names, faults = self.names(), []
        try:
            self.trail.verify()
        except TamperedError as error:
            faults.append(Fault(self.trail.path.name, str(error)))
        advance("verifying weights", 0, len(names))
        for done, name in enumerate(names, start=1):
            try:
                entry = self.entry(name)
            except WeightsError:
                faults.append(Fault(name, f"has no readable {ENTRY} of its own"))
            else:
                fault = self._fault_of(entry)
                faults += [Fault(name, fault)] if fault else []
            advance("verifying weights", done, len(names))
        for file, allowed in sorted(self.trail.files().items()):
            name = file.removesuffix(f"/{ENTRY}")
            if name not in names and "" not in allowed:
                faults.append(Fault(name, "is gone, and the trail does not say who took it out"))
        return tuple(faults)

    def add(
        self,
        name: str,
        backbone_name: str | None,
        state: Mapping[str, Tensor],
        source: str,
        original_sha256: str | None = None,
        licence: str | None = None,
        citation: str | None = None,
        contract: InputContract | None = None,
        layout: str | None = None,
        trained_on: Sequence[str] = (),
    ) -> VaultEntry:
        """Put weights in as they are, replacing an entry of the same name.

        Args:
            trained_on: hashes of the images they were trained on, where that is known.

        Raises:
            WeightsError: a name that is none, no tensors, or values that are not numbers.
        """
        check_name(name)
        _check_values(state)
        data = safetensors_save(stored_form(state))
        sha256, folder = hashlib.sha256(data).hexdigest(), self.folder / name
        hashes = "".join(f"{line}\n" for line in trained_on).encode()
        listed = hashlib.sha256(hashes).hexdigest() if hashes else None
        with self._lock("vault"):
            self._bring_up_to_date()
            place = folder if folder.is_dir() else self.folder / f".new-{name}"  # a new entry appears whole
            with storage_errors(folder):
                for rubbish in self.folder.glob(".new-*"):  # of a crash; whoever holds the lock is alone
                    shutil.rmtree(rubbish)
                place.mkdir(exist_ok=True)
                write_bytes(place / _file_name(sha256), data)
                if listed is not None:
                    write_bytes(place / list_name(listed), hashes)
                sync_folder(place)
            entry = VaultEntry(
                name=name,
                backbone=backbone_name,
                sha256=sha256,
                source=source,
                original_sha256=original_sha256,
                licence=licence,
                citation=citation,
                contract=contract,
                added=self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                layout=layout,
                tensors=len(state),
                parameters=sum(v.numel() for k, v in state.items() if not k.endswith(_BUFFERS)),
                trained_on=listed,
            )
            kept = {ENTRY, _file_name(sha256), *([list_name(listed)] if listed is not None else [])}
            record = record_bytes(entry)
            said = {key: getattr(entry, key) for key in ("sha256", "original_sha256", "source", "licence", "backbone")}
            self.trail.note_ahead("weights.adding", name, folder / ENTRY, record, said)
            write_bytes(place / ENTRY, record)  # from here on it is the new one
            with storage_errors(folder):
                sync_folder(place)
                if place != folder:
                    place.replace(folder)
                sync_folder(self.folder)
                for left in folder.iterdir():
                    if left.is_file() and left.name not in kept:
                        left.unlink()
            self.trail.note_files("weights.added", name, [folder / ENTRY])
        return entry

    def add_file(
        self,
        path: Path,
        backbone_name: str | None,
        name: str | None = None,
        *,
        licence: str | None = None,
        citation: str | None = None,
        contract: InputContract | None = None,
        min_share: float = 0.9,
        limits: PickleLimits | None = None,
    ) -> tuple[VaultEntry, LoadReport | None]:
        """Put a checkpoint file in: converted to safetensors and, where the backbone is known, to its names.

        Returns:
            The entry, and how much of the backbone's trunk it fills (``None`` where the backbone is unknown).

        Raises:
            WeightsError: not a readable set of weights, or too little of it belongs to the backbone.
        """
        chosen = name or path.name.split(".")[0]
        check_name(chosen)
        state, original = read_weights(path, limits), file_digest(path)
        state, layout, report = _for_backbone(state, backbone_name, path.name, contract, min_share)
        if contract is not None:
            state, contract, note = to_house_input(state, contract)
            layout = f"{layout}; {note}" if note else layout
        entry = self.add(
            chosen, backbone_name, state, path.name, original, licence, citation, contract, layout
        )  # fmt: skip
        return entry, report

    def fetch(
        self,
        backbone_name: str,
        host: str | None = None,
        other_hosts: bool = False,
        patience: Patience | None = None,
    ) -> VaultEntry:
        """Download a backbone's ImageNet weights, check them, and put them in; what is there and whole is kept.

        Args:
            backbone_name: a row of the table; a network of volumes takes the weights of the flat one it inflates.
            host: address of the folder with the files; default: ``MEDTL_WEIGHTS_HOST``, else torchvision's.
            other_hosts: follow redirects to other hosts.
            patience: how long, how often and how much.

        Raises:
            WeightsError: none are published, no connection, or the wrong checksum.
        """
        flat = flat_backbone(backbone_name)
        row, name = backbone(flat), imagenet_name(backbone_name)
        if row.weights is None:
            raise WeightsError(
                f"No ImageNet weights are published for '{backbone_name}'. Use a file, or weights: none."
            )
        base = base_address(host or os.environ.get(HOST_VARIABLE) or HOST)
        with self._lock(name):  # two runs that want the same file: the second finds it
            with contextlib.suppress(WeightsError):
                if self.find(name) is not None:
                    return self.entry(name)
            path = self._bring(base, row.weights.file, row.weights.sha256, other_hosts, patience)
            try:
                state, original = read_weights(path), file_digest(path)
            finally:
                path.unlink()
        state, layout, _ = _for_backbone(state, flat, row.weights.file, None, 0.9)
        licence, contract = row.weights.licence, _contract_of(row)
        return self.add(name, flat, state, row.weights.file, original, licence, row.citation, contract, layout)

    def remove(self, name: str) -> None:
        """Take an entry out, whole or broken.

        Raises:
            WeightsError: there is none of that name; the nearest is named.
        """
        check_name(name)
        with self._lock("vault"):
            self._bring_up_to_date()
            there, file = name in self.names(), f"{name}/{ENTRY}"
            if not there and "" in self.trail.files().get(file, {""}):
                self.entry(name)  # says which is near
            self.trail.append("weights.removing", name, details={"ahead": {file: ""}})
            if there:
                with storage_errors(self.folder / name):
                    gone = (self.folder / name).replace(self.folder / f".new-{name}.removed")
                    shutil.rmtree(gone)
            self.trail.append("weights.removed", name, details={"files": {file: ""}})

    def _bring(self, base: str, file: str, sha256: str, other_hosts: bool, patience: Patience | None) -> Path:
        """Download a file and check it; what does not pass is not kept."""
        folder = self.folder / ".downloads"
        part, path = folder / f"{file}.part", folder / file
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        resumed = part.exists()
        try:
            with storage_errors(part):
                download(base + file, part, patience, other_hosts)
                found = file_digest(part)
                if resumed and not found.startswith(sha256):  # what was kept may have been of another file
                    part.unlink()
                    download(base + file, part, patience, other_hosts)
                    found = file_digest(part)
        except WeightsError as error:
            raise WeightsError(
                f"'{file}' could not be downloaded: {error}. Without a connection, bring the file and add it: medtl "
                f"weights add FILE --backbone NAME --name imagenet-NAME; a mirror goes into {HOST_VARIABLE}."
            ) from error
        if not found.startswith(sha256):
            part.unlink()
            raise WeightsError(
                f"'{file}' has sha256 {found[:16]}…, expected {sha256[:16]}…: damaged on the way or not that file. "
                "Nothing was kept; try again, or another server."
            )
        return part.replace(path)

    def _bring_up_to_date(self) -> None:
        """Begin the trail with what a vault of before it had one holds; enter what a crash kept from being entered."""
        if self.told:
            self.trail.finish_files()
        else:
            older = [path for name in self.names() if (path := self.folder / name / ENTRY).is_file()]
            self.trail.note_files("weights.found", "vault", older)

    def _fault_of(self, entry: VaultEntry) -> str | None:
        fault = _fault_of(self._weights_of(entry), entry.sha256) or self._unsaid(entry.name)
        if fault is not None or entry.trained_on is None:
            return fault
        lost = _fault_of(self.folder / entry.name / list_name(entry.trained_on), entry.trained_on) is not None
        return "have no whole list of the images they were trained on beside them" if lost else None

    def _unsaid(self, name: str) -> str | None:
        """Hold an entry against the trail, where there is one."""
        if not self.told:
            return None
        with storage_errors(self.folder / name):
            now = file_digest(self.folder / name / ENTRY)
        allowed = self.trail.files().get(f"{name}/{ENTRY}", frozenset(("",)))
        if now in allowed:
            return None
        if allowed == {""}:
            return "were put in by hand: the trail does not know them"
        return f"have another {ENTRY} than was put in"

    def _weights_of(self, entry: VaultEntry) -> Path:
        path = self.folder / entry.name / _file_name(entry.sha256)
        old = path.with_name(WEIGHTS)  # how the first vaults called it
        return old if old.exists() and not path.exists() else path

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold a lock in the vault; it dies with the process."""
        folder = self.folder / ".locks"
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            handle = (folder / name).open("w")
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def flat_backbone(backbone_name: str) -> str:
    """Name the backbone whose published weights this one takes: itself, or the flat one that it inflates."""
    return backbone(backbone_name).inflates or backbone_name


def imagenet_name(backbone_name: str) -> str:
    """Name the vault's entry for ``weights: imagenet``."""
    return f"imagenet-{flat_backbone(backbone_name)}"


def resolve_weights(spec: str, backbone_name: str, vault: Vault, fetch: bool = True) -> WeightsFile | None:
    """Find what ``model.weights`` means: ``none``, ``imagenet``, ``vault:NAME`` or a file.

    Args:
        spec: the word or path.
        backbone_name: of the network.
        vault: where to look.
        fetch: imagenet weights that the vault lacks may be downloaded.

    Raises:
        WeightsError: it is not there, may not or cannot be fetched, or was altered.
    """
    backbone(backbone_name)
    if spec == "none":
        return None
    if spec == "imagenet":
        return _imagenet(backbone_name, vault, fetch)
    if spec.startswith("vault:"):
        name = spec.removeprefix("vault:")
        found = vault.find(name)
        if found is None:
            raise WeightsError(f"The vault holds no '{name}'; it holds {', '.join(vault.names()) or 'nothing'}.")
        return found
    path = Path(spec)
    if not path.is_file():
        raise WeightsError(f"model.weights: '{path.name}' is not a file. Write none, imagenet, vault:NAME or a path.")
    return WeightsFile(path, file_digest(path), path.name)


def _imagenet(backbone_name: str, vault: Vault, fetch: bool) -> WeightsFile | None:
    flat, name = flat_backbone(backbone_name), imagenet_name(backbone_name)
    found = vault.find(name)
    if found is None and not fetch:
        raise WeightsError(
            f"The vault holds no '{name}', and model.fetch is false: nothing is downloaded. Get it with `medtl weights "
            f"fetch {flat}`, or bring the file: medtl weights add FILE --backbone {flat} --name {name} (with --vault "
            "FOLDER: the run's is WORKSPACE/weights)."
        )
    if found is None:
        vault.fetch(backbone_name)
        found = vault.find(name)
    return found


def read_weights(path: Path, limits: PickleLimits | None = None) -> dict[str, Tensor]:
    """Read a state dict from safetensors or, in a child process, from a pickle; the bytes tell which it is.

    Raises:
        WeightsError: neither, damaged, or a pickle that wants to run code.
    """
    try:
        if not path.is_file():
            raise WeightsError(f"'{path.name}' is not a file.")
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise WeightsError(f"'{path.name}' cannot be read ({error.strerror}).") from error
    kind = kind_of(head, path.suffix)
    if kind == "safetensors":
        return _read_safetensors(path, path.name)
    if kind != "pickle":
        raise WeightsError(f"'{path.name}' is not a readable set of weights: {kind}.")
    with tempfile.TemporaryDirectory(prefix="medtl-weights-") as folder:
        target = Path(folder) / WEIGHTS
        convert_pickle(path, target, limits)
        return _read_safetensors(target, path.name)


def kind_of(head: bytes, suffix: str) -> str:
    """Tell what a file is from its first bytes: ``safetensors``, ``pickle``, or in words what else."""
    begins: Mapping[bytes, str] = {
        b"\x7fELF": "it is a program",
        b"MZ": "it is a program",
        b"\x89HDF": "it is a Keras (HDF5) file. Export the weights for PyTorch",
        b"\x93NUMPY": "it is a NumPy array",
        b"version https://git-lfs": "it is a Git LFS pointer, not the file. Run `git lfs pull`",
        b"\x1f\x8b": "it is an archive. Unpack it first",
        b"BZh": "it is an archive. Unpack it first",
        b"\xfd7zXZ": "it is an archive. Unpack it first",
        b"7z\xbc\xaf": "it is an archive. Unpack it first",
    }
    known = next((what for magic, what in begins.items() if head.startswith(magic)), None)
    if not head:
        return "it is empty"
    if head[8:9] == b"{":  # first: the length before it may look like anything, `<` and `MZ` too
        return "safetensors"
    if known is not None:
        return known
    if head[257:262] == b"ustar":
        return "it is an archive. Unpack it first"
    if head.lstrip()[:1] == b"<":
        return "it is a web page: a proxy or a login page answered instead of the server"
    if suffix == ".safetensors":
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "pickle"
    return "it is neither safetensors nor a checkpoint of PyTorch: damaged, or something else"


def _read_safetensors(path: Path, called: str) -> dict[str, Tensor]:
    try:
        state = safetensors_load(path.read_bytes())
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise WeightsError(
            f"'{called}' is not a readable set of weights: its header and its contents do not agree "
            f"({type(error).__name__}): damaged or cut off."
        ) from error
    if not state:
        raise WeightsError(f"'{called}' is not a readable set of weights: it holds no tensors.")
    return state


def _for_backbone(
    state: dict[str, Tensor],
    backbone_name: str | None,
    source: str,
    contract: InputContract | None,
    min_share: float,
) -> tuple[dict[str, Tensor], str | None, LoadReport | None]:
    """Give weights the names of a backbone, if enough of them belong to it."""
    if backbone_name is None:
        return state, None, None
    if any(key.startswith(OURS) for key in state):
        return state, "medtl", None
    row = backbone(backbone_name)
    size = _size_for(row, contract)
    network = source_network(backbone_name, size)
    own = network.state_dict()
    adapted, layout = adapt(state, {key: tuple(own[key].shape) for key in trunk_keys(network, backbone_name)})
    report = LoadReport(source, None, 0, (), (), 0.0)
    report = load_source(network, backbone_name, adapted, size, report, min_share)
    return adapted, layout, replace(report, layout=layout)


def _size_for(row: Backbone, contract: InputContract | None) -> int:
    """Choose a size that the network can be built for."""
    wanted = contract.size[-1] if contract is not None and contract.size else _USUAL_SIZE
    return max(row.min_size, row.multiple * max(1, round(wanted / row.multiple)))


def _contract_of(row: Backbone) -> InputContract:
    return InputContract(channels=len(row.mean), mean=row.mean, std=row.std)


def check_name(name: str) -> None:
    """Refuse what cannot name an entry.

    Raises:
        WeightsError: says what can.
    """
    if not _NAME.fullmatch(name):
        raise WeightsError(
            f"'{name[:100]}' cannot name an entry of the vault: letters, digits, dots, dashes and underscores, 100 at "
            "most, and not a dot first. Give one with --name."
        )


def _check_values(state: Mapping[str, Tensor]) -> None:
    if not state:
        raise WeightsError("There are no tensors to keep.")
    for key, value in state.items():
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise WeightsError(f"The weights hold values that are not numbers, first in '{key[:100]}': damaged.")


def _fault_of(path: Path, sha256: str) -> str | None:
    try:
        if not path.is_file():
            return "are missing"
        return None if file_digest(path) == sha256 else "were altered"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _anew(name: str) -> str:
    return f"Remove it (medtl weights remove {name}) and add or fetch it again."


def list_name(sha256: str) -> str:
    """Name the file that holds the hashes of the images an entry was trained on."""
    return f"{sha256[:32]}.hashes.txt"


def _file_name(sha256: str) -> str:
    return f"{sha256[:32]}.safetensors"
