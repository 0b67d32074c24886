"""An event is whole or absent, and nobody rewrites one, not even its spelling."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medtl.audit import GENESIS, AuditLog
from medtl.errors import StorageError, TamperedError

ROOT = Path(__file__).parents[2]

FULL = """
import resource, sys
from pathlib import Path
from medtl.audit import AuditLog
from medtl.errors import StorageError
log = AuditLog(Path(sys.argv[1]))
log.append("did", "first")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    log.append("did", "second", details={"text": "x" * 5000})
except StorageError as error:
    print(error)
log.append("did", "third")
"""


def test_a_full_disk_does_not_end_the_log(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("The disk is full")
    assert [event["subject"] for event in AuditLog(tmp_path).events()] == ["first", "third"]


@pytest.mark.parametrize(
    "respell",
    [
        lambda line: line.replace(b'"outcome"', b'"outcome": "done", "outcome"'),
        lambda line: line.replace(b'"actor": ', b'"actor":  '),
        lambda line: line.replace(b"refused", b"refuse\\u0064"),
        lambda line: line[:-1],
        lambda line: line + b"\n",
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b"1\n",
    ],
    ids=["said twice", "spaced", "escaped", "no line end", "empty line", "deep", "number"],
)
def test_a_line_that_is_spelled_another_way_is_named(tmp_path: Path, respell: Callable[[bytes], bytes]) -> None:
    log = AuditLog(tmp_path)
    log.append("release.refused", "r-1", outcome="refused")
    whole = log.path.read_bytes()
    assert respell(whole) != whole
    log.path.write_bytes(respell(whole))
    with pytest.raises(TamperedError, match=r"line [12] "):
        log.verify()


def test_details_of_every_kind_keep_the_chain(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    details = {"by number": {10: 1, 9: 2}, "path": Path("a"), "pair": (1, 2.5), "name": "caf\udce9", "word": "Größe"}
    log.append("did", "it", details=details)
    (event,) = log.events()
    assert event["details"]["by number"] == {"10": 1, "9": 2}
    assert event["details"]["name"] == details["name"]
    assert "Größe" in log.path.read_text()


def test_the_head_of_an_empty_log_is_a_head(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    assert log.verify(GENESIS).events == 0
    log.append("did", "it")
    assert log.verify(GENESIS).events == 1


def test_every_earlier_head_stays_good_and_a_deleted_log_is_found(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    heads = [log.append("did", str(number)) for number in range(3)]
    assert [log.verify(head).head for head in heads] == [heads[-1]] * 3
    log.path.unlink()
    with pytest.raises(TamperedError, match="is gone"):
        log.verify(heads[0])


def test_a_log_that_is_a_folder_is_one_sentence(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.path.mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        log.append("did", "it")
    with pytest.raises(StorageError, match="cannot be read"):
        log.verify()
