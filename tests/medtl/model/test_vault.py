"""The vault keeps what was put in and says what was altered; strangers' files and servers cost one clear sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from medtl.audit import AuditLog
from medtl.errors import StorageError, TamperedError, WeightsError
from medtl.model import pickles
from medtl.model import vault as vault_module
from medtl.model.backbones import BACKBONES, WeightsSource
from medtl.model.download import Patience, base_address, download
from medtl.model.pickles import PickleLimits
from medtl.model.surgery import source_network
from medtl.model.vault import Vault, imagenet_name, list_name, read_weights, resolve_weights
from medtl.model.weights import InputContract
from medtl.progress import listening

NAME = "squeezenet1_0"
STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.running_mean": torch.ones(3)}
HASTY = Patience(attempts=3, backoff_s=0.01, stalled_s=0.5, total_s=20.0, most_bytes=8 << 20)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "vault", lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


# ── entries ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_entry_says_where_it_comes_from_and_what_it_was_trained_to_see(vault: Vault) -> None:
    contract = InputContract(3, (0.5,) * 3, (0.25,) * 3, (224, 224))
    entry = vault.add("mine", "resnet18", STATE, "ward 7", "ab" * 32, "CC-BY", "A paper", contract, "native")
    assert vault.entries() == (entry,)
    assert (entry.added, entry.tensors, entry.parameters) == ("2026-01-02T03:04:05Z", 2, 6)
    assert (entry.licence, entry.citation, entry.contract) == ("CC-BY", "A paper", contract)
    found = vault.find("mine")
    assert found is not None
    assert (found.sha256, found.source, found.contract) == (entry.sha256, "vault:mine", contract)
    assert hashlib.sha256(found.path.read_bytes()).hexdigest() == entry.sha256
    assert torch.equal(read_weights(found.path)["b.weight"], STATE["b.weight"])


def test_the_images_that_weights_were_trained_on_are_listed_beside_them(vault: Vault) -> None:
    entry = vault.add("mine", "dynunet", STATE, "ward 7", trained_on=("ab" * 16, f"near:{'cd' * 32}"))
    assert entry.trained_on is not None
    path = vault.folder / "mine" / list_name(entry.trained_on)
    assert path.read_text() == f"{'ab' * 16}\nnear:{'cd' * 32}\n"
    found = vault.find("mine")
    assert found is not None and found.network == "dynunet"
    path.write_text("")
    assert "list of the images" in vault.verify()[0].what
    with pytest.raises(WeightsError, match=r"no whole list of the images.*medtl weights remove mine"):
        vault.find("mine")
    assert vault.add("mine", "dynunet", STATE, "ward 7").trained_on is None
    assert not list((vault.folder / "mine").glob("*.hashes.txt")) and vault.verify() == ()


def test_replacing_keeps_the_old_weights_until_the_new_are_whole(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    vault.add("mine", None, STATE, "old")

    written = vault_module.write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.name == vault_module.ENTRY:
            raise OSError(28, "No space left on device")
        written(path, data)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(vault_module, "write_bytes", full)
        vault.add("mine", None, {"c": torch.zeros(2)}, "new")
    assert vault.verify() == () and vault.entry("mine").source == "old"
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(vault_module, "write_bytes", full)
        vault.add("other", None, STATE, "new")
    assert vault.names() == ("mine",)
    vault.add("mine", None, {"c": torch.zeros(2)}, "new")
    assert len(list((vault.folder / "mine").iterdir())) == 2
    assert [path.name for path in vault.folder.iterdir() if path.name.startswith(".new")] == []


def test_two_who_add_at_once_leave_one_whole_entry(vault: Vault) -> None:
    states = [{"a": torch.full((1000,), float(n))} for n in range(8)]
    threads = [threading.Thread(target=vault.add, args=("mine", None, s, f"{n}")) for n, s in enumerate(states)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not vault.names() or vault.find("mine") is not None
    for thread in threads:
        thread.join()
    assert vault.verify() == ()
    found = vault.find("mine")
    assert found is not None
    assert float(read_weights(found.path)["a"][0]) == float(vault.entry("mine").source)


def test_verify_names_what_was_altered_is_missing_or_has_a_broken_entry(vault: Vault) -> None:
    for name in ("altered", "missing", "broken", "moved", "whole", "empty"):
        vault.add(name, None, {"a": torch.ones(9)}, "here")
    (altered,) = (vault.folder / "altered").glob("*.safetensors")
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    next((vault.folder / "missing").glob("*.safetensors")).unlink()
    (vault.folder / "broken" / "entry.json").write_text('{"name": "broken", "sha256": 3}')
    (vault.folder / "moved" / "entry.json").write_bytes((vault.folder / "whole" / "entry.json").read_bytes())
    (vault.folder / "empty" / "entry.json").write_bytes(b"")
    seen: list[tuple[str, int, int]] = []
    with listening(lambda *step: seen.append(step)):
        faults = {fault.name: fault.what for fault in vault.verify()}
    assert faults.keys() == {"altered", "missing", "broken", "moved", "empty"}
    assert (faults["altered"], faults["missing"]) == ("were altered", "are missing")
    assert seen[-1] == ("verifying weights", 6, 6)
    assert [entry.name for entry in vault.entries()] == ["altered", "missing", "whole"]
    for name in faults:
        with pytest.raises(WeightsError, match=f"medtl weights remove {name}"):
            vault.find(name)


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "/etc", "a b", "a\n", "x" * 101, "..", "é"])
def test_a_name_cannot_lead_out_of_the_vault(vault: Vault, name: str) -> None:
    for act in (lambda: vault.add(name, None, STATE, "x"), lambda: vault.find(name), lambda: vault.remove(name)):
        with pytest.raises(WeightsError, match="cannot name an entry"):
            act()
    assert not vault.folder.exists()


def test_removing_names_the_nearest_and_takes_broken_entries_too(vault: Vault) -> None:
    vault.add("imagenet-resnet18", None, STATE, "x")
    with pytest.raises(WeightsError, match="did you mean 'imagenet-resnet18'"):
        vault.remove("imagenet-resnet81")
    (vault.folder / "imagenet-resnet18" / "entry.json").write_text("{")
    vault.remove("imagenet-resnet18")
    assert vault.names() == ()
    with pytest.raises(WeightsError, match="it holds nothing"):
        vault.remove("imagenet-resnet18")


def test_an_entry_of_the_first_vaults_is_still_read(vault: Vault) -> None:
    folder = vault.folder / "old"
    folder.mkdir(parents=True)
    save_file(STATE, folder / "model.safetensors")
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "entry.json").write_text(json.dumps({"name": "old", "backbone": NAME, "sha256": sha256, "source": "x"}))
    assert vault.find("old") is not None and vault.verify() == ()


def said(vault: Vault) -> list[tuple[str, str]]:
    return [(event["action"], event["subject"]) for event in vault.trail.events()]


def test_the_trail_says_what_came_and_went(vault: Vault) -> None:
    vault.add("mine", NAME, STATE, "first.pth", "ab" * 32, "CC0")
    old = vault.entry("mine").sha256
    vault.add("mine", None, {"c": torch.zeros(2)}, "second.pth")
    vault.remove("mine")
    assert said(vault) == [
        (f"weights.{what}", "mine") for what in ("adding", "added", "adding", "added", "removing", "removed")
    ]
    first = vault.trail.events()[0]["details"]
    told = {key: first[key] for key in ("sha256", "original_sha256", "source", "licence", "backbone")}
    assert told == {
        "sha256": old, "original_sha256": "ab" * 32, "source": "first.pth", "licence": "CC0", "backbone": NAME,
    }  # fmt: skip
    assert vault.verify() == ()


def test_a_vault_may_be_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vault = Vault(Path("weights"))
    vault.add("mine", None, STATE, "x")
    vault.add("mine", None, {"c": torch.zeros(2)}, "y")
    assert vault.find("mine") is not None and vault.verify() == () and len(said(vault)) == 4


def test_an_entry_that_agrees_with_itself_and_not_with_the_trail_is_refused(vault: Vault) -> None:
    vault.add("mine", None, STATE, "x", licence="CC BY-NC 4.0")
    vault.add("other", None, {"c": torch.zeros(2)}, "x")
    path = vault.folder / "mine" / "entry.json"
    path.write_text(path.read_text().replace("CC BY-NC 4.0", "CC0"))
    shutil.copytree(vault.folder / "other", vault.folder / "by-hand")
    entry = vault.folder / "by-hand" / "entry.json"
    entry.write_text(entry.read_text().replace('"other"', '"by-hand"'))
    for name, why in (("mine", "another entry.json than was put in"), ("by-hand", "were put in by hand")):
        with pytest.raises(WeightsError, match=why):
            vault.find(name)
    for _ in range(2):
        assert {fault.name for fault in vault.verify()} == {"mine", "by-hand"} and vault.find("other") is not None
        vault.add("third", None, STATE, "x")  # does not make good what else is there


def test_what_was_taken_out_by_hand_is_missed_until_somebody_says_so(vault: Vault) -> None:
    vault.add("mine", None, STATE, "x")
    shutil.rmtree(vault.folder / "mine")
    assert [fault.name for fault in vault.verify()] == ["mine"] and vault.find("mine") is None
    vault.remove("mine")
    assert vault.verify() == ()
    with pytest.raises(WeightsError, match="it holds nothing"):
        vault.remove("mine")


def test_a_crash_before_the_trail_was_ended_costs_nothing(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    note = AuditLog.note_files

    def killed(log: AuditLog, action: str, *rest: Any) -> None:
        if action == "weights.added":
            raise KeyboardInterrupt
        note(log, action, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AuditLog, "note_files", killed)
        vault.add("mine", None, STATE, "x")
    assert vault.find("mine") is not None and vault.verify() == ()
    vault.add("mine", None, STATE, "y")
    assert vault.verify() == () and said(vault)[-1] == ("weights.added", "mine")


def test_a_crash_once_the_entry_is_another_leaves_one_that_the_trail_knows(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.add("mine", None, STATE, "old")
    written = vault_module.write_bytes

    def killed(path: Path, data: bytes) -> None:
        written(path, data)
        if path.name == vault_module.ENTRY:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(vault_module, "write_bytes", killed)
        vault.add("mine", None, {"c": torch.zeros(2)}, "new")
    assert vault.entry("mine").source == "new"
    assert vault.find("mine") is not None and vault.verify() == ()


def test_a_vault_of_before_gets_its_trail_with_the_next_that_is_put_in(vault: Vault) -> None:
    vault.add("old", None, STATE, "x")
    for path in vault.folder.glob("audit.*"):
        path.unlink()
    assert vault.find("old") is not None and vault.verify() == ()
    vault.add("new", None, STATE, "x")
    assert said(vault)[0] == ("weights.found", "vault") and vault.verify() == ()
    entry = vault.folder / "old" / "entry.json"
    entry.write_text(entry.read_text() + " ")
    assert [fault.name for fault in vault.verify()] == ["old"]


def test_a_full_disk_does_not_make_a_vault_of_before_one_whose_trail_is_gone(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.add("old", None, STATE, "x")
    for path in vault.folder.glob("audit.*"):
        path.unlink()

    def full(*_: object) -> None:
        raise StorageError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StorageError):
        patched.setattr("medtl.audit._write_whole", full)
        vault.add("new", None, STATE, "x")
    assert vault.trail.path.exists()  # and is empty
    assert vault.find("old") is not None and vault.verify() == ()
    vault.add("new", None, STATE, "x")
    assert said(vault)[0] == ("weights.found", "vault") and vault.verify() == ()


def test_an_entry_that_agrees_with_an_altered_trail_is_refused(vault: Vault) -> None:
    vault.add("mine", None, STATE, "x", licence="CC BY-NC 4.0")
    entry, log = vault.folder / "mine" / "entry.json", vault.folder / "audit.jsonl"
    before = hashlib.sha256(entry.read_bytes()).hexdigest()
    entry.write_text(entry.read_text().replace("CC BY-NC 4.0", "CC0"))
    log.write_text(log.read_text().replace(before, hashlib.sha256(entry.read_bytes()).hexdigest()))
    with pytest.raises(WeightsError, match=r"trail that cannot be trusted.*line 1"):
        Vault(vault.folder).find("mine")


@pytest.mark.parametrize("killed_in", ["adding", "removing"])
def test_the_next_addition_enters_what_a_crash_kept_from_being_entered(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    vault.add("other", None, STATE, "x")
    append, action = AuditLog.append, "weights.added" if killed_in == "adding" else "weights.removed"

    def killed(log: AuditLog, what: str, *rest: Any, **more: Any) -> str:
        if what == action:
            raise KeyboardInterrupt
        return append(log, what, *rest, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AuditLog, "append", killed)
        if killed_in == "adding":
            vault.add("mine", None, STATE, "x")
        else:
            vault.remove("other")
    vault.add("third", None, STATE, "x")
    sure = {file: len(allowed) for file, allowed in vault.trail.files().items()}
    assert set(sure.values()) == {1} and vault.verify() == ()
    if killed_in == "adding":
        shutil.rmtree(vault.folder / "mine")
        assert [fault.name for fault in vault.verify()] == ["mine"]
    else:
        assert vault.names() == ("third",)


def test_a_trail_that_was_altered_is_named_and_nothing_is_added_to_it(vault: Vault) -> None:
    vault.add("mine", None, STATE, "x")
    path = vault.folder / "audit.jsonl"
    path.write_text(path.read_text().replace("weights.added", "weights.addet"))
    assert [fault.name for fault in vault.verify()] == ["audit.jsonl"]
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(TamperedError):
        vault.add("other", None, STATE, "x")
    assert vault.names() == ("mine",)
    path.unlink()  # its head is left: this is no vault of before
    with pytest.raises(WeightsError, match="trail that cannot be trusted"):
        vault.find("mine")
    with pytest.raises(TamperedError):
        vault.add("other", None, STATE, "x")
    assert [fault.name for fault in vault.verify()] == ["audit.jsonl", "mine"]


def test_weights_that_are_not_numbers_are_not_kept(vault: Vault) -> None:
    with pytest.raises(WeightsError, match=r"not numbers, first in 'a'"):
        vault.add("mine", None, {"a": torch.tensor([1.0, float("nan")])}, "x")
    assert vault.names() == ()


def test_a_file_is_stored_under_the_names_of_its_backbone(vault: Vault, tmp_path: Path) -> None:
    own = source_network(NAME, 64).state_dict()
    save_file({f"module.{k}": v.clone() for k, v in own.items()}, tmp_path / "w.safetensors")
    entry, report = vault.add_file(tmp_path / "w.safetensors", NAME, licence="MIT")
    assert report is not None
    assert (entry.name, report.share, entry.layout) == ("w", 1.0, "native, without 'module.'")
    assert entry.original_sha256 == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    found = vault.find("w")
    assert found is not None and read_weights(found.path).keys() == own.keys()
    with pytest.raises(WeightsError, match="another architecture"):
        vault.add_file(tmp_path / "w.safetensors", "resnet18", "x")
    assert vault.names() == ("w",)
    entry, report = vault.add_file(tmp_path / "w.safetensors", None, "unknown")
    assert (entry.backbone, entry.layout, entry.contract, report) == (None, None, None, None)


# ── files of strangers ──────────────────────────────────────────────────────────────────────────────────────────────


class Runs:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.sentinel}",)


def endless() -> bytes:
    """A pair of pairs of pairs, forty deep, whose hash takes 2^40 steps."""
    deeper = b"".join(b"q%ch%c\x86" % (n, n) for n in range(2, 42))
    return b"\x80\x02}" + b")" + deeper + b"K\x01s."


def bomb(folder: Path) -> bytes:
    """A tensor of 2 GiB that lies on one number."""
    torch.save({"a": torch.zeros(1).expand(1 << 29)}, folder / "bomb.pth")
    return (folder / "bomb.pth").read_bytes()


def saved(folder: Path, value: Any) -> bytes:
    torch.save(value, folder / "saved.pth")
    return (folder / "saved.pth").read_bytes()


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "runs a command": (lambda f: pickle.dumps(Runs(f / "pwned"), protocol=2), "more than tensors .posix.system"),
    "runs one inside": (lambda f: saved(f, {"state_dict": Runs(f / "pwned")}), "more than tensors .posix.system"),
    "asks for memory": (bomb, "more memory than|far larger than the file"),
    "does not end": (lambda _: endless(), "does not come to an end"),
    "is cut off": (lambda f: saved(f, STATE)[:-200], "damaged|archive"),
    "holds no tensors": (lambda f: saved(f, {"epoch": 3}), "no state dict"),
    "holds objects": (lambda f: pickle.dumps(np.array([{}], dtype=object)), "more than tensors|damaged"),
}  # fmt: skip


def forked(path: Path) -> str | None:
    """Run the child's whole life in a fork of this process, which has imported torch; give what its parent says."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(sink, 1)
        os._exit(pickles.main([str(path), str(path.with_suffix(".safetensors")), str(1 << 30), "1", str(1 << 26)]))
    os.close(sink)
    with os.fdopen(source, "rb") as answers:
        answer = answers.read()
    return pickles._understood(answer, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_costs_one_sentence_and_runs_nothing(what: str, tmp_path: Path) -> None:
    make, said = HOSTILE[what]
    path = tmp_path / "w.pth"
    path.write_bytes(make(tmp_path))
    reason = forked(path)
    assert reason is not None and re.search(said, reason), reason
    assert str(tmp_path) not in reason
    assert not (tmp_path / "pwned").exists() and not path.with_suffix(".safetensors").exists()


def test_the_real_child_refuses_what_its_fork_refuses(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(Runs(tmp_path / "pwned"), protocol=2))
    with pytest.raises(WeightsError, match=r"'w\.pth' is not a readable set of weights: it holds more than tensors"):
        read_weights(path)
    assert not (tmp_path / "pwned").exists()


def test_a_child_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not come to an end"):
        read_weights(tmp_path / "w.pth", PickleLimits(seconds=0.0, start_seconds=0.05))


@pytest.mark.parametrize("answer", [b"", b"[]", b'["done", "x"]', b'["pwned", ""]', b"[" * 900, b'{"a": 1}', b"\xff"])
def test_a_child_that_answers_nonsense_is_not_believed(answer: bytes) -> None:
    assert pickles._understood(answer, 0) == "the process that reads it crashed on it"
    assert "\n" not in str(pickles._understood(b'["forbidden", "a\\nb"]', 0))


def tar(folder: Path) -> bytes:
    with tarfile.open(folder / "w.tar", "w") as archive:
        archive.add(__file__, "weights.py")
    return (folder / "w.tar").read_bytes()


def archive(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "w.zip", "w") as made:
        made.writestr("ResNet50.pt", b"x")
    return (folder / "w.zip").read_bytes()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: b"", "it is empty"),
        (lambda _: Path(sys.executable).read_bytes()[:4096], "it is a program"),
        (lambda _: b"rubbish" * 50, "neither safetensors nor"),
        (lambda _: b"\n<!DOCTYPE html><html>Please log in", "login page"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda _: b"\x89HDF\r\n\x1a\n", "Keras"),
        (tar, "Unpack it"),
        (lambda _: struct.pack("<Q", 1 << 60) + b'{"a"', "do not agree"),
        (lambda _: struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}' + b"\0" * 4,
         "do not agree"),
        (lambda _: struct.pack("<Q", 2) + b"{}", "no tensors"),
    ],
    ids=["empty", "ELF", "rubbish", "html", "lfs", "hdf5", "tar", "long header", "lying shape", "no tensors"],
)  # fmt: skip
def test_a_file_that_is_something_else_is_called_by_its_name(
    make: Callable[[Path], bytes], said: str, tmp_path: Path
) -> None:
    for name in ("w.pth", "w.bin"):
        (tmp_path / name).write_bytes(make(tmp_path))
        with pytest.raises(WeightsError, match=said):
            read_weights(tmp_path / name)


def test_an_archive_of_files_is_to_be_unpacked(tmp_path: Path) -> None:
    archive(tmp_path)
    assert "an archive of files. Unpack it" in (forked(tmp_path / "w.zip") or "")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(WeightsError, match="is not a file"):
            read_weights(path)


@given(st.binary(max_size=80), st.integers(0, 400), st.booleans())
@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_safetensors_are_weights_or_a_clear_error(tmp_path: Path, noise: bytes, at: int, cut: bool) -> None:
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    data = path.read_bytes()
    path.write_bytes(data[:at] + noise + (b"" if cut else data[at + len(noise) :]))
    try:
        assert read_weights(path)
    except WeightsError as error:
        assert "not a readable set of weights" in str(error)


def test_a_pickled_checkpoint_arrives_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    state = {"t": shared.T, "half": shared.half(), "whole": shared, "flag": torch.tensor(True)}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"state": {0: torch.zeros(4)}}}, tmp_path / "w.ckpt")
    before = resource.getrlimit(resource.RLIMIT_AS)
    read = read_weights(tmp_path / "w.ckpt")
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)


# ── servers ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Answer = Callable[[BaseHTTPRequestHandler, int], None]


class Server:
    """A real server whose manners a test chooses: the first answers are taken from ``answers``, later ones are good."""

    def __init__(self, data: bytes) -> None:
        self.data, self.answers, self.asked = data, list[Answer](), list[tuple[str, str | None]]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.asked.append((self.path, wanted))
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    (outer.answers.pop(0) if outer.answers else outer.good)(self, start)

            def log_message(self, *_: object) -> None:
                pass

        self.running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.running.daemon_threads = True
        self.thread = threading.Thread(target=self.running.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.running.server_port}/models/"

    def head(self, to: BaseHTTPRequestHandler, code: int, **headers: object) -> None:
        to.send_response(code)
        for name, value in headers.items():
            to.send_header(name.replace("_", "-"), str(value))
        to.end_headers()

    def good(self, to: BaseHTTPRequestHandler, start: int) -> None:
        if start > len(self.data) - 1:
            self.head(to, 416, Content_Range=f"bytes */{len(self.data)}", Content_Length=0)
            return
        rest = self.data[start:]
        where = {"Content_Range": f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"} if start else {}
        self.head(to, 206 if start else 200, Content_Length=len(rest), **where)
        to.wfile.write(rest)

    def dies_half_way(self, to: BaseHTTPRequestHandler, start: int) -> None:
        rest = self.data[start:]
        where = {"Content_Range": f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"} if start else {}
        self.head(to, 206 if start else 200, Content_Length=len(rest), **where)
        to.wfile.write(rest[: len(rest) // 2])

    def without_length(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self.head(to, 200)
        to.wfile.write(self.data)

    def never_ends(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self.head(to, 200)
        while True:
            to.wfile.write(b"\0" * (1 << 20))

    def stalls(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self.head(to, 200, Content_Length=len(self.data))
        to.wfile.write(self.data[:10])
        to.wfile.flush()
        time.sleep(1.5)

    def says(self, code: int, **headers: object) -> Answer:
        return lambda to, _: self.head(to, code, Content_Length=0, **headers)

    def close(self) -> None:
        self.running.shutdown()
        self.thread.join()
        self.running.server_close()


@pytest.fixture(scope="module")
def published() -> bytes:
    torch.manual_seed(7)
    state: dict[str, Tensor] = source_network(NAME, 64).state_dict()
    from safetensors.torch import save

    return save(state)


@pytest.fixture
def server(published: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server(published)
    monkeypatch.setenv(vault_module.HOST_VARIABLE, running.url)
    publish(monkeypatch, hashlib.sha256(published).hexdigest())
    yield running
    running.close()


def publish(monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    row = replace(BACKBONES[NAME], weights=WeightsSource("squeezenet1_0.pth", sha256))
    monkeypatch.setattr("medtl.model.backbones.BACKBONES", {**BACKBONES, NAME: row})


def test_imagenet_weights_are_fetched_once_and_say_what_they_are(server: Server, vault: Vault) -> None:
    for _ in range(2):
        found = resolve_weights("imagenet", NAME, vault)
        assert found is not None and found.contract is not None and found.contract.mean == BACKBONES[NAME].mean
    assert server.asked == [("/models/squeezenet1_0.pth", None)]
    entry = vault.fetch(NAME)
    assert (entry.name, entry.licence is not None, entry.citation) == (
        imagenet_name(NAME),
        True,
        BACKBONES[NAME].citation,
    )
    assert len(server.asked) == 1 and not any((vault.folder / ".downloads").iterdir())


def test_an_altered_entry_is_fetched_again(server: Server, vault: Vault) -> None:
    entry = vault.fetch(NAME)
    (path,) = (vault.folder / entry.name).glob("*.safetensors")
    path.write_bytes(b"x")
    assert vault.fetch(NAME).sha256 == entry.sha256 and vault.verify() == ()


def test_nothing_is_fetched_unless_that_is_allowed(server: Server, vault: Vault) -> None:
    with pytest.raises(WeightsError, match=r"medtl weights fetch squeezenet1_0`, or bring the file: medtl weights add"):
        resolve_weights("imagenet", NAME, vault, fetch=False)
    assert server.asked == [] and not vault.folder.exists()


def test_a_wrong_checksum_keeps_nothing(server: Server, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "0" * 64)
    with pytest.raises(WeightsError, match=r"expected 0000.*Nothing was kept"):
        vault.fetch(NAME)
    assert vault.names() == () and not any((vault.folder / ".downloads").iterdir())


def test_a_broken_download_goes_on_where_it_was(server: Server, vault: Vault) -> None:
    server.answers = [server.dies_half_way, server.dies_half_way]
    seen: list[tuple[str, int, int]] = []
    with listening(lambda *step: seen.append(step)):
        vault.fetch(NAME, patience=HASTY)
    half = len(server.data) // 2
    assert [wanted for _, wanted in server.asked] == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]
    assert seen[-1][0] == "squeezenet1_0.pth, MB" and seen[-1][1] == seen[-1][2] == len(server.data) // 1_000_000


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server: Server, vault: Vault) -> None:
    server.answers = [server.dies_half_way, *[server.says(503)] * 3]
    with pytest.raises(WeightsError, match=r"answer 503.*goes on from there.*medtl weights add FILE"):
        vault.fetch(NAME, patience=HASTY)
    vault.fetch(NAME, patience=HASTY)
    assert server.asked[-1][1] == f"bytes={len(server.data) // 2}-"


def test_a_part_of_another_file_is_thrown_away(server: Server, vault: Vault) -> None:
    part = vault.folder / ".downloads" / "squeezenet1_0.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"an older version of the file")
    assert vault.fetch(NAME, patience=HASTY).sha256
    part.write_bytes(b"\0" * (len(server.data) + 5))
    vault.remove(imagenet_name(NAME))
    assert vault.fetch(NAME, patience=HASTY).sha256


def test_a_part_that_is_whole_is_not_brought_again(server: Server, vault: Vault) -> None:
    part = vault.folder / ".downloads" / "squeezenet1_0.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.data)
    assert vault.fetch(NAME, patience=HASTY).sha256
    assert server.asked == [("/models/squeezenet1_0.pth", f"bytes={len(server.data)}-")]


def test_a_server_without_content_length_is_enough(server: Server, vault: Vault) -> None:
    server.answers = [server.without_length]
    assert vault.fetch(NAME, patience=HASTY).tensors


@pytest.mark.parametrize("code", [404, 403])
def test_a_refusal_is_not_tried_again(server: Server, vault: Vault, code: int) -> None:
    server.answers = [server.says(code)] * 3
    with pytest.raises(WeightsError, match=f"does not have it .answer {code}.*medtl weights add FILE"):
        vault.fetch(NAME, patience=HASTY)
    assert len(server.asked) == 1


def test_a_stalled_server_is_left(server: Server, vault: Vault) -> None:
    server.answers = [server.stalls] * 5
    started = time.monotonic()
    with pytest.raises(WeightsError, match="timed out"):
        vault.fetch(NAME, patience=replace(HASTY, attempts=2, stalled_s=0.2))
    assert time.monotonic() - started < 5


def test_a_server_that_never_ends_is_left(server: Server, vault: Vault) -> None:
    server.answers, seen = [server.never_ends], list[int]()
    with listening(lambda _, done, __: seen.append(done)), pytest.raises(WeightsError, match="it has no end"):
        vault.fetch(NAME, patience=HASTY)
    assert 7 <= max(seen) <= 8 and not any((vault.folder / ".downloads").iterdir())
    server.answers = [server.says(200, Content_Type="text/html")]
    with pytest.raises(WeightsError, match="a web page came instead"):
        vault.fetch(NAME, patience=HASTY)


def test_a_file_that_says_it_is_too_large_is_not_begun(server: Server, vault: Vault) -> None:
    with pytest.raises(WeightsError, match="more than 100 are not taken"):
        vault.fetch(NAME, patience=replace(HASTY, most_bytes=100))


def test_a_redirect_to_another_host_is_followed_only_where_that_is_said(server: Server, vault: Vault) -> None:
    elsewhere = server.url.replace("127.0.0.1", "localhost") + "moved.pth"
    server.answers = [server.says(302, Location=elsewhere)]
    with pytest.raises(WeightsError, match=r"127\.0\.0\.1 sends on to localhost, which was not named"):
        vault.fetch(NAME, patience=HASTY)
    server.answers = [server.says(302, Location="/models/moved.pth")]
    assert vault.fetch(NAME, patience=HASTY).sha256
    vault.remove(imagenet_name(NAME))
    server.answers = [server.says(302, Location=elsewhere)]
    assert vault.fetch(NAME, other_hosts=True, patience=HASTY).sha256


def test_nobody_at_the_other_end_says_what_to_try(server: Server, vault: Vault) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(WeightsError, match="MEDTL_WEIGHTS_HOST"):
        vault.fetch(NAME, f"http://127.0.0.1:{port}/", patience=HASTY)


def test_attempts_wait_longer_each_time(server: Server, tmp_path: Path) -> None:
    server.answers, waited = [server.says(503)] * 4, list[float]()
    with pytest.raises(WeightsError, match="503"):
        download(server.url + "x", tmp_path / "x.part", Patience(attempts=4), wait=waited.append)
    assert waited == [1.0, 2.0, 4.0]


def test_https_is_meant_unless_http_is_written_out() -> None:
    assert base_address("mirror.example/weights") == "https://mirror.example/weights/"
    assert base_address("http://mirror.example") == "http://mirror.example/"
    for wrong in ("ftp://mirror.example", "file:///etc", "https://", "https://[", "https://me:secret@mirror.example/"):
        with pytest.raises(WeightsError) as caught:
            base_address(wrong)
        assert "secret" not in str(caught.value)


def test_every_published_digest_agrees_with_its_file_name() -> None:
    for row in BACKBONES.values():
        if row.weights is not None:
            published = row.weights.file.removesuffix(".pth").rpartition("-")[2]
            assert len(published) >= 8 and row.weights.sha256.startswith(published)
            assert len(row.weights.sha256) in (len(published), 64)
