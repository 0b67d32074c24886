"""The trail of a real run finds every altered file; a release goes its way only step by step, by somebody's word."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from medtl.artifacts import Store
from medtl.audit import AuditLog
from medtl.config import load_config
from medtl.registry.parcel import pack
from pipelines import steps
from pipelines.apply import Request, apply_release
from pipelines.trail import NOT_EVIDENCE
from verbs import faults_of, medtl

pytestmark = [pytest.mark.prefect, pytest.mark.slow]
WORD = ["--by", "A. Auditor", "--role", "head of radiology", "--reason", "read the report"]


def test_one_bit_in_any_file_of_a_finished_run_is_named(workspace: Path) -> None:
    assert faults_of(workspace) == []
    evidence = [
        path
        for path in sorted(workspace.rglob("*"))
        if path.is_file() and path.relative_to(workspace).parts[0] not in (*NOT_EVIDENCE, "audit.jsonl", "audit.head")
    ]
    kinds = {path.relative_to(workspace).parts[0] for path in evidence}
    assert {"artifacts", "registry", "reports", "runs", "quarantine"} <= kinds
    for path in evidence:
        whole, times = path.read_bytes(), path.stat()
        place = len(whole) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = faults_of(workspace)
        path.write_bytes(whole)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        name = path.relative_to(workspace).as_posix()
        assert len(found) == 1 and name.startswith(found[0]), (name, found)
    assert faults_of(workspace) == []


def test_what_is_missing_or_was_put_there_by_hand_is_named(workspace: Path) -> None:
    gone = next((workspace / "artifacts" / "evaluation").iterdir())
    shutil.rmtree(gone)
    added = workspace / "artifacts" / "plan" / ("0" * 32)
    shutil.copytree(next((workspace / "artifacts" / "plan").iterdir()), added)
    bare = workspace / "artifacts" / "evaluation" / "abc"
    bare.mkdir()
    by_hand = [workspace / name for name in ("registry/r-mine.json", "reports/mine.html", "audit.torn-9")]
    for path in by_hand:
        path.write_text("{}")
    (workspace / "runs" / ".x.json.1.tmp").write_text("half")
    names = [path.relative_to(workspace).as_posix() for path in (gone, added, bare, *by_hand)]
    assert sorted(faults_of(workspace)) == sorted(names)


def test_every_step_of_a_run_is_on_the_trail(finished: Path) -> None:
    events = AuditLog(finished).events()
    actions = [event["action"] for event in events]
    made = ("scans", "cohort", "split", "plan", "checkpoint", "evaluation", "release", "report")
    assert [actions.count(f"{kind}.made") for kind in made] == [1, 1, 2, 2, 2, 2, 2, 2]
    assert actions.count("run.started") == actions.count("run.finished") == actions.count("test.opened") == 2
    assert {event["software"].split()[0] for event in events} == {"medtl"}


def test_a_release_walks_step_by_step_and_each_step_wants_its_gate_and_its_name(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--workspace", workspace]
    first, second = (row["release"] for row in medtl(capsys, "registry", "list", *here)[1])

    def promote(release: str, to: str, *word: str) -> tuple[int, str]:
        code, _, why = medtl(capsys, "registry", "promote", release, "--to", to, *word, *here)
        return code, why

    code, why = promote(first, "live", *WORD)
    assert code == 3 and "only one that is approved can become live" in why
    assert promote(first, "approved", "--by", " ", "--role", "x", "--reason", "y")[0] == 1
    assert promote(first, "approved", "--role", "x", "--reason", "y")[0] == 2
    assert promote(first, "approved", *WORD)[0] == 0
    assert promote(first, "live", *WORD)[0] == 0
    assert promote(second, "approved", *WORD)[0] == 0
    assert medtl(capsys, "registry", "promote", second, "--to", "live", *WORD, *here)[1]["replaced"] == first
    assert stands(capsys, workspace) == {first: "approved", second: "live"}

    nameless = ("--role", "x", "--reason", "y")
    assert medtl(capsys, "registry", "rollback", "tiny", *nameless, *here)[0] == 2
    assert medtl(capsys, "registry", "retire", second, *nameless, *here)[0] == 2
    assert stands(capsys, workspace) == {first: "approved", second: "live"}
    assert medtl(capsys, "registry", "rollback", "tiny", *WORD, *here)[1] == {"live": first, "rolled_back": second}
    assert stands(capsys, workspace) == {first: "live", second: "validated"}
    code, _, why = medtl(capsys, "registry", "rollback", "tiny", *WORD, *here)
    assert code == 3 and "may serve again" in why

    assert medtl(capsys, "registry", "retire", second, *WORD, *here)[0] == 0
    assert promote(second, "approved", *WORD)[0] == 3
    events = AuditLog(workspace).events()
    refused = [event["details"]["by"] for event in events if event["action"].startswith("promotion.")]
    assert refused == ["A. Auditor", "A. Auditor"]
    assert medtl(capsys, "audit", "verify", *here)[0] == 0


def stands(capsys: pytest.CaptureFixture[str], workspace: Path) -> dict[str, str]:
    rows = medtl(capsys, "registry", "list", "--workspace", workspace)[1]
    return {row["release"]: row["status"] for row in rows}


def test_an_altered_release_is_not_approved(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = medtl(capsys, "registry", "list", "--workspace", workspace)[1][0]
    path = workspace / release["artifact"] / "plan.json"
    path.write_bytes(path.read_bytes().replace(b"32", b"33"))
    code, _, why = medtl(
        capsys, "registry", "promote", release["release"], "--to", "approved", *WORD, "--workspace", workspace
    )
    assert code == 1 and "altered" in why


def test_who_was_live_when_is_read_off_the_trail(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--workspace", workspace]
    release = medtl(capsys, "registry", "list", *here)[1][0]["release"]
    for to in ("approved", "live"):
        assert medtl(capsys, "registry", "promote", release, "--to", to, *WORD, *here)[0] == 0
    today = datetime.now(UTC).date()
    (served,) = medtl(capsys, "audit", "live", "--on", today, *here)[1]
    assert (served["release_id"], served["end"], served["approved_by"]["by"]) == (release, None, "A. Auditor")
    assert served["evidence"]["gate"][0]["passed"] is True
    assert medtl(capsys, "audit", "live", "--on", today - timedelta(days=1), *here)[1] == []
    code, _, why = medtl(capsys, "audit", "live", "--on", "yesterday", *here)
    assert code == 2 and "2026-01-31" in why


def test_the_report_of_a_period_tells_runs_incidents_and_faults(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trail = AuditLog(workspace)
    trail.append("run.started", "run-killed", details={"verb": "run", "name": "<script>alert(1)</script>"})
    today = str(datetime.now(UTC).date())
    command = [
        "audit",
        "report",
        "--from",
        today,
        "--to",
        today,
        "--workspace",
        workspace,
        "--out",
        tmp_path / "p.html",
    ]
    code, counts, _ = medtl(capsys, *command)
    assert code == 0
    assert (counts["runs"], counts["trainings"], counts["looks at a test part"], counts["incidents"]) == (3, 2, 2, 1)
    page = (tmp_path / "p.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "run without an end" in page and "was verified when this was written" in page
    page_of = next((workspace / "reports").glob("*.html"))
    page_of.write_text("another")
    assert medtl(capsys, *command)[1]["not as the trail says today"] == 1
    assert f"reports/{page_of.name}" in (tmp_path / "p.html").read_text()


def test_drift_of_a_release_in_use_is_in_the_report_and_nobody_is_in_the_trail(
    finished: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(finished.parent / "tiny.yaml", [f"workspace={workspace}"])
    scans = steps.ingest_scans(config)
    for out in ("a.csv", "b.csv"):
        told = apply_release(config, scans, Request(finished.parent / "study", tmp_path / out))
    events = [event for event in AuditLog(workspace).events() if event["action"] == "release.applied"]
    details = events[-1]["details"]
    assert details["tally"]["answers"]["decision"] == {"bright": 0, "dark": 0} | told["decisions"]
    assert (details["tally"]["scans"], details["tally"]["patients"]) == (48, None)
    assert (details["released_with"]["scans"], details["released_with"]["patients"]) == (12, 6)
    assert "images/" not in json.dumps(events) and "patient-" not in json.dumps(events)

    today, page = str(datetime.now(UTC).date()), tmp_path / "p.html"
    period = ["--from", today, "--to", today, "--workspace", workspace, "--out", page]
    code, counts, why = medtl(capsys, "audit", "report", *period)
    assert code == 0, why
    assert counts["uses of a release"] == 2 and "signs of drift" in counts
    told_of = page.read_text()
    assert "Releases in use" in told_of and "Answers beside those of the release’s own test part" in told_of
    assert f'<th scope="row">{told["release"]}</th>\n<td class="number">1</td>\n<td class="number">48</td>' in told_of


def test_an_anchored_head_finds_a_log_that_was_replaced(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, kept = ["--workspace", workspace], tmp_path / "elsewhere" / "heads"
    assert medtl(capsys, "audit", "anchor", "--to", kept, *here)[0] == 0
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    command = shlex.join([sys.executable, "-c", script, str(tmp_path / "posted"), "{head}"])
    assert medtl(capsys, "audit", "anchor", *here, "--command", command)[0] == 0
    assert (tmp_path / "posted").read_text() == kept.read_text().split()[-1] == AuditLog(workspace).verify().head
    assert medtl(capsys, "audit", "verify", "--anchors", kept, *here)[0] == 0
    for name in ("audit.jsonl", "audit.head"):
        (workspace / name).unlink()
    AuditLog(workspace).append("did", "nothing wrong")
    code, _, why = medtl(capsys, "audit", "verify", "--anchors", kept, *here)
    assert code == 1 and "cut off or replaced" in why


def test_a_result_is_discarded_by_somebodys_word_and_a_serving_release_is_not(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--workspace", workspace]
    pack = next((workspace / "artifacts" / "pack").iterdir())
    assert medtl(capsys, "audit", "discard", pack, *WORD, *here)[0] == 0
    assert not pack.exists() and faults_of(workspace) == []
    release = next((workspace / "artifacts" / "release").iterdir())
    code, _, why = medtl(capsys, "audit", "discard", release, *WORD, *here)
    assert code == 1 and "Retire it first" in why and release.exists()
    assert medtl(capsys, "audit", "discard", workspace / "registry", *WORD, *here)[0] == 2


def test_a_release_travels_to_another_workspace_and_starts_there_as_validated(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = medtl(capsys, "registry", "list", "--workspace", workspace)[1][0]["release"]
    assert medtl(capsys, "registry", "promote", release, "--to", "approved", *WORD, "--workspace", workspace)[0] == 0
    assert medtl(capsys, "registry", "export", release, tmp_path / "r.zip", "--workspace", workspace)[0] == 0
    there = ["--workspace", tmp_path / "there"]
    assert medtl(capsys, "registry", "import", tmp_path / "r.zip", *there)[0] == 2
    code, taken, why = medtl(capsys, "registry", "import", tmp_path / "r.zip", *WORD, *there)
    assert code == 0, why
    assert taken == {"release": release, "name": "tiny", "status": "validated", "new": True}
    assert medtl(capsys, "audit", "verify", *there)[0] == 0
    (imported,) = (e for e in AuditLog(tmp_path / "there").events() if e["action"] == "release.imported")
    assert imported["details"]["by"] == "A. Auditor"
    shown = medtl(capsys, "registry", "show", release, *there)[1]
    folder = Path(shown["folder"])
    assert {"card.md", "sbom.cdx.json", "SHA256SUMS", "calibrator.json"} <= {path.name for path in folder.iterdir()}
    assert "Not a medical device" in (folder / "card.md").read_text()


def test_a_parcel_that_calls_itself_more_than_its_gate_does_is_not_entered(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = medtl(capsys, "registry", "list", "--workspace", workspace)[1][0]
    whole = workspace / listed["artifact"]
    inputs = json.loads((whole / "manifest.json").read_bytes())["inputs"]
    for number, change in enumerate(({"status": "live"}, {"release_id": "../../evil"})):
        said = {**json.loads((whole / "release.json").read_bytes()), **change}

        def build(folder: Path, said: dict[str, Any] = said) -> None:
            for path in whole.iterdir():
                if path.name != "manifest.json":
                    shutil.copy(path, folder)
            (folder / "release.json").write_text(json.dumps(said))

        forged = Store(tmp_path / f"forge{number}").make("release", inputs, build)
        pack(forged.path, tmp_path / f"{number}.zip")
        there = ["--workspace", tmp_path / f"there{number}"]
        code, _, why = medtl(capsys, "registry", "import", tmp_path / f"{number}.zip", *WORD, *there)
        assert code == 1 and "was not entered" in why
        assert medtl(capsys, "registry", "list", *there)[1] == []
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    "words", [("live", "--on", "9999-12-31"), ("log", "--to", "9999-12-31"), ("anchor", "--command", "'x")]
)
def test_a_word_that_makes_no_sense_is_one_sentence(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, _, why = medtl(capsys, "audit", *words, "--workspace", workspace)
    assert code == 2 and "Traceback" not in why
