"""Config, artifacts, audit, pseudonyms, records: what everything else stands on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtl.artifacts import Store, canonical, digest_of, write_bytes, write_json
from medtl.audit import GENESIS, AuditLog
from medtl.config import load_config, parse_config
from medtl.errors import ConfigError, GateRefused, MedtlError, SplitError, StorageError, TamperedError
from medtl.progress import advance, listening
from medtl.pseudonyms import Pseudonymiser, load_pseudonymiser
from medtl.records import Split

ROOT = Path(__file__).parents[2]

# -------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"name": "x", "modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        ({"name": "x", "dataset": {"split": {"tset": 0.1}}}, "'dataset.split.tset'; did you mean 'test'"),
        (
            {"name": "x", "model": {"phases": [{"name": "a", "epochs": 1, "lr": 1, "unfreez": 1}]}},
            "did you mean 'unfreeze'",
        ),
        ({"name": "x", "dataset": {"split": {"test": 1.5}}}, "less than or equal to 1"),
        ({"name": "../x"}, "'name'"),
        ({}, "'name': Field required"),
    ],
)
def test_a_wrong_config_says_what_and_what_instead(raw: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system [ls]", "a: &x 1\nb: *x", "- 1", "a: [", "\0"])
def test_yaml_that_is_more_than_data_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")


def test_overrides_are_yaml_and_reach_every_depth(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: x\nmodel: {batch_size: 8}\n")
    sets = ["model.batch_size=16", "dataset.split.test=3e-1", "studies.labels.classes=[a, b]", "scans.source=null"]
    config = load_config(tmp_path / "c.yaml", sets)
    assert (config.model.batch_size, config.dataset.split.test) == (16, 0.3)
    assert config.studies.labels.classes == ("a", "b")
    for bad in ("model", "=1", "name.x=1"):
        with pytest.raises(ConfigError, match="--set"):
            load_config(tmp_path / "c.yaml", [bad])


# ----------------------------------------------------------------------------------------------- artifacts


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=6))
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert digest_of(value) == digest_of(dict(reversed(value.items())))
    assert json.loads(canonical(value)) == value
    assert digest_of({**value, "more": 1}) != digest_of({**value, "more": 2})


def write_x(folder: Path) -> None:
    write_json(folder / "x.json", {"a": 1})


def test_a_result_is_made_once_and_found_by_its_inputs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.make("kind", {"n": 1}, write_x)
    again = store.make("kind", {"n": 1}, lambda folder: pytest.fail("made twice"))
    assert (first.reused, again.reused) == (False, True)
    assert first.digest == again.digest
    assert store.find("kind", {"n": 2}) is None


@pytest.mark.parametrize("change", ["alter", "add", "delete", "manifest"])
def test_what_was_changed_on_the_disk_is_named(tmp_path: Path, change: str) -> None:
    store = Store(tmp_path)
    folder = store.make("kind", {}, write_x).path
    if change == "alter":
        (folder / "x.json").write_text("{}")
    elif change == "add":
        (folder / "y.json").write_text("{}")
    elif change == "delete":
        (folder / "x.json").unlink()
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": "0" * 64}))
    with pytest.raises(TamperedError, match={"add": "y.json", "manifest": "manifest"}.get(change, "x.json")):
        store.find("kind", {})


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def half(folder: Path) -> None:
        write_x(folder)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        store.make("kind", {}, half)
    assert list((tmp_path / "artifacts" / "kind").iterdir()) == []
    assert store.make("kind", {}, write_x).reused is False


BUILD = """
import sys, time
from pathlib import Path
from medtl.artifacts import Store
def build(folder):
    (folder / "x").write_text("1")
    Path(sys.argv[2]).open("a").write("built\\n")
    time.sleep(float(sys.argv[3]))
print(Store(Path(sys.argv[1])).make("kind", {}, build).digest)
"""


def builder(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(tmp_path / "w"), str(tmp_path / "count"), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_two_processes_build_once(tmp_path: Path) -> None:
    both = [builder(tmp_path, 0.5), builder(tmp_path, 0.5)]
    digests = {process.communicate(timeout=60)[0] for process in both}
    assert len(digests) == 1
    assert (tmp_path / "count").read_text() == "built\n"


def test_a_killed_builder_leaves_no_lie_and_no_lock(tmp_path: Path) -> None:
    process = builder(tmp_path, 60)
    while not (tmp_path / "count").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()
    store = Store(tmp_path / "w")
    assert store.find("kind", {}) is None
    assert store.make("kind", {}, write_x).reused is False
    assert [p.name for p in (tmp_path / "w" / "artifacts" / "kind").iterdir() if p.name.startswith(".")] == []


FULL = """
import resource, sys
from pathlib import Path
from medtl.artifacts import Store
from medtl.errors import StorageError
store = Store(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    store.make("big", {}, lambda folder: (folder / "x").write_bytes(bytes(100_000)))
except StorageError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_costs_nothing_finished(tmp_path: Path) -> None:
    kept = Store(tmp_path).make("small", {}, write_x)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith("The disk is full")
    assert list((tmp_path / "artifacts" / "big").iterdir()) == []
    again = Store(tmp_path).find("small", {})
    assert again is not None
    assert again.digest == kept.digest


def test_a_workspace_that_cannot_be_written_says_what_to_try(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--set workspace=FOLDER"):
        Store(tmp_path / "file" / "w")


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"1")
    write_bytes(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"2"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --------------------------------------------------------------------------------------------------- audit


@pytest.fixture
def trail(tmp_path: Path) -> AuditLog:
    log = AuditLog(tmp_path)
    for number in range(5):
        log.append("did", f"subject-{number}", details={"n": number})
    return log


def test_a_whole_chain_verifies(trail: AuditLog, tmp_path: Path) -> None:
    chain = trail.verify()
    assert chain.events == 5
    assert trail.verify(chain.head) == chain
    assert AuditLog(tmp_path / "none").verify().head == GENESIS


@pytest.mark.parametrize(("change", "line"), [("edit", 3), ("drop", 3), ("swap", 2), ("insert", 4)])
def test_a_changed_line_is_named(trail: AuditLog, change: str, line: int) -> None:
    lines = trail.path.read_bytes().splitlines(keepends=True)
    if change == "edit":
        lines[2] = lines[2].replace(b"subject-2", b"subject-9")
    elif change == "drop":
        del lines[2]
    elif change == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines.insert(3, lines[1])
    trail.path.write_bytes(b"".join(lines))
    with pytest.raises(TamperedError, match=f"line {line} "):
        trail.verify()


def test_a_cut_log_is_found_with_the_head_that_was_kept(trail: AuditLog) -> None:
    head = trail.verify().head
    lines = trail.path.read_bytes().splitlines(keepends=True)
    trail.path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(TamperedError, match="line 4 is missing"):
        trail.verify()
    # whoever cuts the log and its head together is found by a head that was kept elsewhere
    trail.head_path.unlink()
    assert trail.verify().events == 3
    with pytest.raises(TamperedError, match="cut off"):
        trail.verify(head)


def test_a_broken_last_line_is_not_written_after(trail: AuditLog) -> None:
    trail.path.write_bytes(trail.path.read_bytes()[:-10])
    with pytest.raises(TamperedError, match="its end is not what was written last"):
        trail.append("did", "more")


def test_writers_at_once_keep_the_chain(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from medtl.audit import AuditLog\n"
    code += "for n in range(20): AuditLog(Path(sys.argv[1])).append('did', str(n))"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert AuditLog(tmp_path).verify().events == 60


# ---------------------------------------------------------------------------------------------- the others


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    first, second = (load_pseudonymiser(tmp_path / "deep" / "key") for _ in range(2))
    assert (tmp_path / "deep" / "key").stat().st_mode & 0o777 == 0o600
    assert (
        first.name("patient", "A")
        == second.name("patient", " A ")
        != Pseudonymiser(os.urandom(32)).name("patient", "A")
    )
    assert first.file_keys("./a\\b.tar.gz") == first.file_keys("a/b.tar.gz")
    assert first.name("patient", "e\u0301") == first.name("patient", "\u00e9")
    with pytest.raises(StorageError, match="shorter"):
        Pseudonymiser(b"short")


def test_a_split_that_shares_a_patient_cannot_be_built() -> None:
    with pytest.raises(SplitError, match="in both 'train' and 'test'"):
        Split(("a",), ("b",), ("c",), {"a": "g1", "b": "g2", "c": "g1"}, predefined=False)


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(GateRefused, MedtlError)
    assert (MedtlError.exit_code, GateRefused.exit_code, ConfigError.exit_code) == (1, 3, 2)


def test_progress_reaches_whoever_listens_and_nobody_else() -> None:
    heard: list[tuple[str, int, int]] = []
    advance("before", 1, 1)
    with listening(lambda *what: heard.append(what)):
        advance("during", 1, 2)
    advance("after", 1, 1)
    assert heard == [("during", 1, 2)]
