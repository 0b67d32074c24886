"""What the store promises when bytes, disks, permissions and inputs are not what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtl.artifacts import (
    Store,
    canonical,
    code_digest,
    digest_of,
    load_array,
    read_record,
    save_array,
    verify,
    write_bytes,
    write_record,
)
from medtl.errors import StorageError, TamperedError
from medtl.records import Exclusion

ROOT = Path(__file__).parents[2]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def write(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "x").write_text(text)
        (folder / "y").write_text(text * 2)

    return build


# ------------------------------------------------------------------------------------------------- digests


@given(PLAIN, PLAIN)
def test_two_values_share_a_digest_only_if_they_are_the_same_json(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest_of(one) == digest_of(other)) is same


@given(st.dictionaries(st.integers() | st.text(st.characters(codec=None), max_size=3), PLAIN, max_size=5))
def test_what_is_read_back_has_the_digest_of_what_was_written(value: dict[Any, Any]) -> None:
    value = dict(zip(map(str, value), value.values(), strict=True)) if len({*map(str, value)}) == len(value) else {}
    assert digest_of(json.loads(canonical(value))) == digest_of(value)


def test_keys_that_are_numbers_sort_as_they_do_when_read_back() -> None:
    assert canonical({10: "a", 9: "b"}) == canonical({"10": "a", "9": "b"}) == b'{"10":"a","9":"b"}'


@pytest.mark.parametrize("value", [{1, 2}, object(), np.int64(3), b"x"])
def test_a_value_whose_text_may_differ_from_run_to_run_has_no_digest(value: object) -> None:
    with pytest.raises(TypeError, match="no canonical form"):
        digest_of({"a": value})
    assert digest_of(Path("a/b")) == digest_of("a/b")


def test_neither_nan_nor_a_name_outside_utf8_is_lost_in_silence() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        digest_of(float("nan"))
    assert json.loads(canonical(os.fsdecode(b"caf\xe9"))) == "caf\udce9"


def test_the_code_of_a_room_that_does_not_exist_has_no_digest() -> None:
    assert code_digest("scans") != code_digest("dataset") != code_digest()
    with pytest.raises(ValueError, match="no scnas"):
        code_digest("scnas")


# ------------------------------------------------------------------------------------- what was altered is named


def test_results_that_swapped_places_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, two = (store.make("kind", {"n": n}, write(str(n))).path for n in (1, 2))
    one.rename(tmp_path / "away")
    two.rename(one)
    (tmp_path / "away").rename(two)
    for n in (1, 2):
        with pytest.raises(TamperedError, match="holds another result"):
            store.find("kind", {"n": n})


def test_files_that_swapped_contents_are_both_named(tmp_path: Path) -> None:
    folder = Store(tmp_path).make("kind", {}, write("1")).path
    x, y = (folder / "part" / "x").read_bytes(), (folder / "y").read_bytes()
    (folder / "part" / "x").write_bytes(y)
    (folder / "y").write_bytes(x)
    with pytest.raises(TamperedError, match=r"\(part/x, y\)"):
        verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": {"n": 2}},
        {"fingerprint": "0" * 64},
        {"kind": "other"},
        {"files": ["y"]},
        {"files": {}},
        {"inputs": None},
        {"kind": None},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    store = Store(tmp_path)
    path = store.make("kind", {"n": 1}, write("1")).path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TamperedError):
        store.find("kind", {"n": 1})


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "[" * 100_000])
def test_a_result_without_a_manifest_is_refused_before_it_is_computed_again(tmp_path: Path, text: str | None) -> None:
    store = Store(tmp_path)
    manifest = store.make("kind", {}, write("1")).path / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(TamperedError, match=r"no readable manifest\.json"):
        store.make("kind", {}, lambda folder: pytest.fail("was built"))


def test_a_result_with_inputs_of_every_kind_is_found_again(tmp_path: Path) -> None:
    inputs = {"path": Path("a"), "sizes": (1, 2), "by number": {10: 0.1, 9: None}, "name": "caf\udce9"}
    store = Store(tmp_path)
    made = store.make("kind", inputs, write("1"))
    found = store.find("kind", inputs)
    assert found is not None
    assert (found.digest, found.reused) == (made.digest, True)


# ------------------------------------------------------------------------------------------ disks and permissions


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from medtl.artifacts import Store, save_array, write_bytes
from medtl.errors import StorageError
store = Store(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for write in (lambda x: save_array(x, np.zeros(9999)), lambda x: write_bytes(x, bytes(9999))):
    try:
        store.make("big", {}, lambda folder: write(folder / "x"))
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_is_said_in_one_sentence_for_arrays_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.count("The disk is full, or a file-size limit was reached") == 2
    assert not list((tmp_path / "artifacts" / "big").iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_a_folder_of_somebody_else_is_refused() -> None:
    code = "import os, sys; from pathlib import Path; from medtl.artifacts import Store; from medtl.errors import *\n"
    code += "os.setuid(65534)\ntry: Store(Path(sys.argv[1]))\nexcept StorageError as error: print(error)"
    with tempfile.TemporaryDirectory() as theirs:  # outside tmp_path, whose parents nobody may enter
        Path(theirs).chmod(0o755)
        command = [sys.executable, "-c", code, theirs]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "cannot be written (Permission denied). Name another folder (of a run: --set workspace=" in done.stdout


UNREADABLE = """
import os, sys
from pathlib import Path
from medtl.artifacts import Store
from medtl.errors import StorageError
if os.getuid() == 0:
    os.setuid(65534)
secret, workspace = Path(sys.argv[1]), Path(sys.argv[2])
for build in (lambda folder: secret.read_bytes(), lambda folder: (secret.parent / "new").write_bytes(b"1")):
    try:
        Store(workspace).make("kind", {}, build)
    except StorageError as error:
        print(error)
"""


def test_what_may_not_be_read_is_not_called_a_workspace_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as folder:  # outside tmp_path, whose parents nobody may enter
        Path(folder).chmod(0o755)
        source, workspace = Path(folder) / "source", Path(folder) / "workspace"
        source.mkdir()
        workspace.mkdir()
        workspace.chmod(0o777)
        (source / "Doe^Jane.dcm").write_bytes(b"1")
        (source / "Doe^Jane.dcm").chmod(0)
        source.chmod(0o555)
        command = [sys.executable, "-c", UNREADABLE, str(source / "Doe^Jane.dcm"), str(workspace)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        source.chmod(0o755)
    read, written = done.stdout.splitlines()
    assert "Something that is read cannot be (Permission denied)" in read and "Jane" not in read
    assert "cannot be written (Permission denied)" in written


def half_built(store: Store, kind: str, fingerprint: str, hours: float) -> Path:
    folder = store.root / kind / f".{fingerprint}.abc"
    folder.mkdir(parents=True)
    (folder / "x").write_text("half")
    os.utime(folder, (time.time() - 3600 * hours,) * 2)
    return folder


def test_what_a_killed_run_left_is_swept_after_a_day_whatever_is_made_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, fresh = half_built(store, "other", "a" * 16, 25), half_built(store, "other", "b" * 16, 23)
    store.make("kind", {}, write("1"))
    assert (old.exists(), fresh.exists()) == (False, True)


def test_what_somebody_is_still_building_is_not_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    slow = half_built(store, "other", "a" * 16, 50)
    with store.lock("other-" + "a" * 16):
        store.make("kind", {}, write("1"))
        assert slow.exists()
    store.make("kind", {"n": 2}, write("1"))
    assert not slow.exists()


def test_nothing_else_with_a_dot_is_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    other = half_built(store, "other", "notes", 99)
    store.make("kind", {}, write("1"))
    assert other.exists()


def test_a_file_is_not_written_over_a_folder_or_under_an_impossible_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / ("x" * 255)):
        with pytest.raises(StorageError, match="cannot be written"):
            write_bytes(path, b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# ------------------------------------------------------------------------------------------- arrays and records


@pytest.mark.parametrize("array", [np.zeros((0, 3)), np.arange(6).reshape(2, 3).T, np.array(2.5), np.ones(3, "u1")])
def test_an_array_comes_back_as_it_was(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    save_array(tmp_path / "a.npy", array)
    back = load_array(tmp_path / "a.npy")
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_an_array_of_objects_is_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        save_array(tmp_path / "a.npy", np.array([{}]))
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_array(tmp_path / "b.npy")


def test_a_mapped_array_cannot_be_written_to(tmp_path: Path) -> None:
    save_array(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match="read-only"):
        load_array(tmp_path / "a.npy", mapped=True)[0] = 1


def test_records_come_back_as_records(tmp_path: Path) -> None:
    rows = (Exclusion("f-1", "scans", "damaged", "The file ends early."),)
    write_record(tmp_path / "r.json", rows)
    assert read_record(tmp_path / "r.json", tuple[Exclusion, ...]) == rows
    with pytest.raises(StorageError, match="not a readable Exclusion"):
        read_record(tmp_path / "r.json", Exclusion)
    with pytest.raises(StorageError, match="not a readable Exclusion"):
        read_record(tmp_path / "missing.json", Exclusion)


def test_a_result_knows_when_it_was_wanted_last_and_is_not_touched_for_that(tmp_path: Path) -> None:
    store = Store(tmp_path / "w")
    made = store.make("thing", {"a": 1}, lambda folder: (folder / "x").write_text("1") and None)
    for path in (made.path, *made.path.iterdir()):
        os.utime(path, (1e9, 1e9))
    assert store.last_used(made.path) == pytest.approx(time.time(), abs=60)  # nothing is known of before the marks
    os.utime(tmp_path / "w" / "index" / "used" / ".since", (5e8, 5e8))
    assert Store(tmp_path / "w").last_used(made.path) == 1e9
    assert store.find("thing", {"a": 2}) is None and store.last_used(made.path) == 1e9
    assert store.find("thing", {"a": 1}) is not None
    assert store.last_used(made.path) == pytest.approx(time.time(), abs=60)
    assert {path.stat().st_mtime for path in (made.path, *made.path.iterdir())} == {1e9}
    other = store.make("thing", {"a": 3}, lambda folder: (folder / "x").write_text("1") and None)
    assert store.last_used(other.path) == pytest.approx(time.time(), abs=60)
    with pytest.raises(FileNotFoundError):
        store.last_used(made.path.with_name("gone"))
