"""An event is whole or absent, and nobody rewrites one, not even its spelling."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medtl.artifacts import Store, digest_of, file_digest, write_bytes
from medtl.audit import GENESIS, AuditedStore, AuditLog, Event, make_key, read_public_key
from medtl.errors import ConfigError, StorageError, TamperedError
from medtl.records import Artifact

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
    with pytest.raises(TamperedError, match="line 1 is missing"):
        log.verify(heads[0])


def test_a_log_that_is_a_folder_is_one_sentence(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.path.mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        log.append("did", "it")
    with pytest.raises(StorageError, match="cannot be read"):
        log.verify()


# ------------------------------------------------------------------------------------------------- edits and crashes


def filled(folder: Path, count: int = 12) -> AuditLog:
    log = AuditLog(folder)
    log.extend(
        [Event("did", f"thing {number}", details={"number": number, "word": "Größe"}) for number in range(count)]
    )
    return log


def edits(lines: list[bytes], rng: random.Random) -> list[bytes]:
    """Give the lines after one edit of any kind."""
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    changed = list(lines)
    line = lines[at]
    match rng.randrange(9):
        case 0:  # one bit
            place = rng.randrange(len(line))
            changed[at] = line[:place] + bytes([line[place] ^ (1 << rng.randrange(8))]) + line[place + 1 :]
        case 1:  # a line gone
            del changed[at]
        case 2:  # two swapped
            changed[at], changed[other] = changed[other], changed[at]
        case 3:  # said twice
            changed.insert(other, line)
        case 4:  # cut off after a line
            del changed[at:]
        case 5:  # cut off within a line
            changed[at:] = [line[: rng.randrange(len(line))]]
        case 6:  # a byte gone
            place = rng.randrange(len(line))
            changed[at] = line[:place] + line[place + 1 :]
        case 7:  # bytes put in
            place = rng.randrange(len(line))
            changed[at] = line[:place] + rng.randbytes(1 + rng.randrange(5)) + line[place:]
        case _:  # a line rewritten with a hash that fits it
            event = json.loads(line)
            event["actor"] = "somebody else"
            del event["hash"]
            event["hash"] = digest_of(event)
            changed[at] = json.dumps(event, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    return changed


def test_a_thousand_random_edits_of_the_log_are_all_found(tmp_path: Path) -> None:
    log = filled(tmp_path)
    whole = log.path.read_bytes()
    rng, tried = random.Random(5), 0
    while tried < 1000:
        edited = b"".join(edits(whole.splitlines(keepends=True), rng))
        if edited == whole:
            continue
        log.path.write_bytes(edited)
        tried += 1
        try:
            chain = log.verify()
        except TamperedError as error:
            assert re.search(r"line \d+ ", str(error))
        else:
            assert chain.torn or chain.ahead, edited


def test_the_first_line_that_is_wrong_is_the_one_that_is_named(tmp_path: Path) -> None:
    log = filled(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    lines[6], lines[9] = lines[9], lines[6]
    log.path.write_bytes(b"".join(lines))
    with pytest.raises(TamperedError, match="line 7 "):
        log.verify()


def test_a_chain_that_somebody_wrote_anew_is_not_the_one_that_was_anchored(tmp_path: Path) -> None:
    head = filled(tmp_path / "a").verify().head
    forged = filled(tmp_path / "b")
    assert forged.verify().events == 12
    with pytest.raises(TamperedError, match="cut off or replaced"):
        forged.verify(anchors=[head])


CRASH = """
import os, sys
from pathlib import Path
from medtl import audit
log = audit.AuditLog(Path(sys.argv[1]))
log.append("did", "first")
def half(stream, lines):
    stream.write(lines[: len(lines) // 2])
    os._exit(9)
def headless(last):
    os._exit(9)
if sys.argv[2] == "line":
    audit._write_whole = half
else:
    log._keep_head = headless
log.append("did", "second")
"""


@pytest.mark.parametrize("where, there", [("line", ["first"]), ("head", ["first", "second"])])
def test_a_crash_in_the_middle_of_a_write_is_survived_and_said(tmp_path: Path, where: str, there: list[str]) -> None:
    subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), where], check=False, cwd=ROOT)
    log = AuditLog(tmp_path)
    chain = log.verify()
    assert (chain.torn > 0, chain.ahead) == (where == "line", int(where == "head"))
    assert [event["subject"] for event in log.events()] == there
    log.append("did", "third")
    assert [event["action"] for event in log.events()][-2:] == ["log.recovered", "did"]
    assert log.events()[-2]["details"] == {"bytes": chain.torn, "events": chain.ahead}
    assert len(list(tmp_path.glob("audit.torn-*"))) == (where == "line")
    assert (log.verify().torn, log.verify().ahead) == (0, 0)


def test_nothing_is_added_to_a_log_whose_end_is_gone(tmp_path: Path) -> None:
    log = filled(tmp_path)
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(TamperedError, match="its end is not"):
        log.append("did", "more")


def test_many_processes_write_one_chain(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from medtl.audit import AuditLog\n"
    code += "for n in range(20): AuditLog(Path(sys.argv[1])).append('did', sys.argv[2])"
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert AuditLog(tmp_path).verify().events == 60


def test_an_event_that_is_there_is_not_entered_again(tmp_path: Path) -> None:
    log, event = AuditLog(tmp_path), Event("scans.made", "digest", details={"folder": "a"})
    assert [log.once([event]), log.once([event]), AuditLog(tmp_path).once([event])] == [1, 0, 0]
    assert log.once([Event("scans.made", "digest", details={"folder": "b"})]) == 1
    log.path.unlink()
    log.head_path.unlink()
    assert log.once([event]) == 1


def test_a_file_is_noted_when_it_changed_and_only_then(tmp_path: Path) -> None:
    log, page = AuditLog(tmp_path), tmp_path / "page.html"
    for text in ("one", "one", "two", "one"):
        page.write_text(text)
        log.note_files("report.published", "r-1", [page])
    assert len(log.events()) == 3
    assert log.events()[-1]["details"]["files"] == {"page.html": file_digest(page)}


WRITE = """
import os, sys
from pathlib import Path
from medtl.artifacts import write_bytes
from medtl.audit import AuditLog
log, page = AuditLog(Path(sys.argv[1])), Path(sys.argv[1]) / "page.html"
write_bytes(page, b"one")
log.note_files("did", "r-1", [page])
log.note_ahead("began", "r-1", page, b"two", {"why": "asked"})
if sys.argv[2] == "after":
    write_bytes(page, b"two")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("killed, text, finished", [("before", b"one", 0), ("after", b"two", 1)])
def test_a_file_that_a_crash_kept_from_being_entered_is_entered_later(
    tmp_path: Path, killed: str, text: bytes, finished: int
) -> None:
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), killed], check=False, cwd=ROOT)
    log, page = AuditLog(tmp_path), tmp_path / "page.html"
    assert page.read_bytes() == text
    assert [log.finish_files(), log.finish_files()] == [finished, 0]
    (last,) = [event["details"]["files"] for event in log.events() if "files" in event["details"]][-1:]
    assert last == {"page.html": file_digest(page)}


def test_what_nobody_began_is_not_entered_as_finished(tmp_path: Path) -> None:
    log, page = AuditLog(tmp_path), tmp_path / "page.html"
    log.note_ahead("began", "r-1", page, b"two")
    assert log.finish_files() == 0
    page.write_bytes(b"something else")
    assert log.finish_files() == 0
    page.write_bytes(b"two")
    log.note_files("did", "r-1", [page])
    log.note_ahead("began", "r-1", page, b"two")
    assert (log.finish_files(), len(log.events())) == (0, 2)


# --------------------------------------------------------------------------------------------------------- signatures


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys" / "audit.pem"
    path.parent.mkdir()
    make_key(path)
    monkeypatch.setenv("MEDTL_AUDIT_KEY", str(path))
    return path


def test_a_signed_log_is_verified_by_the_public_half_alone(tmp_path: Path, key: Path) -> None:
    log = filled(tmp_path / "w")
    public = read_public_key(key.with_name("audit.pem.pub"))
    assert log.verify(public_keys=[public]).signed == 12
    assert key.stat().st_mode & 0o777 == 0o600
    make_key(tmp_path / "other.pem")
    with pytest.raises(TamperedError, match="line 1 is not signed"):
        log.verify(public_keys=[read_public_key(tmp_path / "other.pem.pub")])


def test_without_the_key_nobody_writes_into_a_signed_log(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(tmp_path / "w")
    monkeypatch.delenv("MEDTL_AUDIT_KEY")
    with pytest.raises(ConfigError, match="is signed"):
        log.append("did", "more")
    forged = filled(tmp_path / "forged")
    with pytest.raises(TamperedError, match="no event is signed"):
        forged.verify(public_keys=[read_public_key(key.with_name("audit.pem.pub"))])


def test_a_signature_that_was_taken_off_or_changed_is_found(tmp_path: Path, key: Path) -> None:
    log = filled(tmp_path / "w", 3)
    whole = log.path.read_text()
    signature = json.loads(whole.splitlines()[1])["signature"]
    log.path.write_text(whole.replace(signature, signature[::-1]))
    with pytest.raises(TamperedError, match="line 2 does not carry the signature"):
        log.verify()
    log.path.write_text(whole.replace(f', "signature": "{signature}"', ""))
    with pytest.raises(TamperedError, match="line 2 "):
        log.verify()


@pytest.mark.parametrize("content", ["", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    path = tmp_path / "key.pem"
    path.write_text(content)
    monkeypatch.setenv("MEDTL_AUDIT_KEY", str(path))
    with pytest.raises(ConfigError, match="holds no key"):
        AuditLog(tmp_path).append("did", "it")
    with pytest.raises(ConfigError, match="no readable public key"):
        read_public_key(path)
    with pytest.raises(StorageError, match="never overwritten"):
        make_key(path)


def test_a_log_that_began_without_a_key_is_verified_from_the_first_signed_line_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(tmp_path / "w", 2)
    make_key(tmp_path / "late.pem")
    monkeypatch.setenv("MEDTL_AUDIT_KEY", str(tmp_path / "late.pem"))
    log.append("did", "signed")
    assert log.verify(public_keys=[read_public_key(tmp_path / "late.pem.pub")]).signed == 1


def test_the_user_is_the_systems_and_not_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "head.of.radiology")
    monkeypatch.setenv("USER", "head.of.radiology")
    log = filled(tmp_path, 1)
    assert log.events()[0]["actor"] != "head.of.radiology"


def test_a_very_long_event_does_not_end_the_log(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.append("did", "much", details={"text": "x" * 3_000_000})
    log.append("did", "more")
    assert log.verify().events == 2


def test_a_number_that_is_none_is_a_line_that_is_named(tmp_path: Path) -> None:
    log = filled(tmp_path, 2)
    log.path.write_bytes(log.path.read_bytes().replace(b'"number": 1', b'"number": NaN'))
    with pytest.raises(TamperedError, match="line 2 "):
        log.verify()


# ------------------------------------------------------------------------------------------------ results on the trail


def test_an_altered_result_whose_own_manifest_fits_is_refused_and_not_entered(tmp_path: Path) -> None:
    def result(text: str) -> Artifact:
        return AuditedStore(tmp_path).make("plan", {"n": 1}, lambda folder: write_bytes(folder / "x", text.encode()))

    made = result("0.6")
    forged = Store(tmp_path / "other").make("plan", {"n": 1}, lambda folder: write_bytes(folder / "x", b"0.9"))
    shutil.rmtree(made.path)
    shutil.copytree(forged.path, made.path)
    with pytest.raises(TamperedError, match="not what the audit trail says"):
        result("0.6")
    assert len(AuditLog(tmp_path).events()) == 1


def test_a_result_that_was_deleted_or_discarded_is_entered_anew(tmp_path: Path) -> None:
    def result() -> Artifact:
        return AuditedStore(tmp_path).make("plan", {"n": 1}, lambda folder: write_bytes(folder / "x", b"0.6"))

    trail, made = AuditLog(tmp_path), result()
    folder = made.path.relative_to(tmp_path).as_posix()
    assert result().reused and len(trail.events()) == 1
    trail.append("result.discarded", made.digest, details={"folder": folder})
    shutil.rmtree(made.path)
    result()
    assert [event["action"] for event in trail.events()] == ["plan.made", "result.discarded", "plan.made"]


def test_a_result_whose_event_a_crash_swallowed_is_entered_when_it_is_found(tmp_path: Path) -> None:
    Store(tmp_path).make("plan", {"n": 1}, lambda folder: write_bytes(folder / "x", b"0.6"))
    assert AuditedStore(tmp_path).make("plan", {"n": 1}, lambda _: None).reused
    assert [event["action"] for event in AuditLog(tmp_path).events()] == ["plan.made"]
