"""A release travels as one file, and arrives as it left or not at all."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from medtl.artifacts import Store, write_bytes, write_json
from medtl.errors import StorageError, TamperedError
from medtl.records import Artifact
from medtl.registry.parcel import SBOM, SUMS, bill_of_materials, pack, unpack, write_sums


def release(workspace: Path) -> Artifact:
    def build(folder: Path) -> None:
        write_bytes(folder / "model.safetensors", b"weights" * 100)
        write_json(folder / "plan.json", {"size": 32})
        write_json(folder / SBOM, bill_of_materials())
        write_sums(folder)

    return Store(workspace).make("release", {"name": "study"}, build)


def test_a_parcel_has_the_same_bytes_each_time_and_arrives_whole(tmp_path: Path) -> None:
    sent = release(tmp_path / "here")
    assert pack(sent.path, tmp_path / "a.zip") == pack(sent.path, tmp_path / "b.zip")
    taken = unpack(tmp_path / "a.zip", Store(tmp_path / "there"))
    assert (taken.digest, taken.fingerprint) == (sent.digest, sent.fingerprint)
    assert unpack(tmp_path / "a.zip", Store(tmp_path / "there")).reused
    with pytest.raises(StorageError, match="is there already"):
        pack(sent.path, tmp_path / "a.zip")


def test_the_sums_are_checked_without_medtl(tmp_path: Path) -> None:
    folder = release(tmp_path).path
    command = [shutil.which("sha256sum") or "sha256sum", "--check", "--strict", SUMS]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count(": OK") == 3
    (folder / "plan.json").write_text("{}")
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 1


def test_the_bill_of_materials_names_what_is_installed() -> None:
    said = bill_of_materials()
    versions = {part["name"]: part["version"] for part in said["components"]}
    import numpy as np

    assert versions["numpy"] == np.__version__ and len(versions) > 50
    assert said == bill_of_materials() and json.loads(json.dumps(said)) == said


def rewritten(parcel: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(parcel) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    change(files)
    with zipfile.ZipFile(parcel, "w") as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return parcel


def forged(files: dict[str, bytes]) -> None:
    manifest = json.loads(files["manifest.json"])
    manifest["inputs"]["name"] = "another"
    files["manifest.json"] = json.dumps(manifest).encode()
    files["model.safetensors"] += b"!"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda files: files.update({"model.safetensors": b"other"}), "model.safetensors"),
        (lambda files: files.pop("plan.json"), "plan.json"),
        (lambda files: files.update({"more.txt": b""}), "more.txt"),
        (lambda files: files.pop("manifest.json"), "missing or unreadable"),
        (lambda files: files.update({"manifest.json": b"[]"}), "missing or unreadable"),
        (lambda files: files.update({"../evil": b"x"}), "leads elsewhere"),
        (lambda files: files.update({"/evil": b"x"}), "leads elsewhere"),
        (forged, "model.safetensors"),
    ],
)
def test_an_altered_parcel_is_refused_and_leaves_nothing(
    tmp_path: Path, change: Callable[[dict[str, bytes]], None], said: str
) -> None:
    pack(release(tmp_path / "here").path, tmp_path / "a.zip")
    with pytest.raises(TamperedError, match=said):
        unpack(rewritten(tmp_path / "a.zip", change), Store(tmp_path / "there"))
    assert not list((tmp_path / "there" / "artifacts").glob("release/*"))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_zip_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="no zip that can be read"):
        unpack(path, Store(tmp_path / "there"))


def test_a_cut_off_parcel_is_refused(tmp_path: Path) -> None:
    pack(release(tmp_path / "here").path, tmp_path / "a.zip")
    whole = (tmp_path / "a.zip").read_bytes()
    for share in (0.3, 0.6, 0.9):
        (tmp_path / "cut.zip").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises((StorageError, TamperedError)):
            unpack(tmp_path / "cut.zip", Store(tmp_path / "there"))


def test_a_parcel_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as opened:
        for number in range(300):
            opened.writestr(f"{number}", b"")
    (tmp_path / "many.zip").write_bytes(data.getvalue())
    with pytest.raises(TamperedError, match="more than a release does"):
        unpack(tmp_path / "many.zip", Store(tmp_path / "there"))
