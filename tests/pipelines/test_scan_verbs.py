"""The verbs for scans by themselves, as a person calls them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom import dcmread

from ct_files import ct_series, write_series
from medtl.audit import AuditLog
from pipelines.cli import call
from pipelines.trail import verify_workspace

ROOT = Path(__file__).parents[2]


def write_secret(folder: Path, slices: int = 6, **attributes: Any) -> list[Path]:
    volume = np.arange(256).reshape(16, 16) + np.arange(slices)[:, None, None]
    named = {"PatientID": "SECRET-ID", "PatientName": "SECRET^NAME", "RescaleIntercept": -1024, **attributes}
    return write_series(folder, ct_series(volume, corner=(0, 0, 0), **named), "SECRET-")


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def config(tmp_path: Path, source: Path, more: str = "") -> str:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: x\nworkspace: {tmp_path / 'ws'}\nscans:\n  source: {source}\n  stable_seconds: 0\n{more}")
    return str(path)


@pytest.mark.parametrize("packed", [False, True])
def test_convert_writes_what_passes_and_a_table_of_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    write_secret(tmp_path / "in" / "good")
    write_secret(tmp_path / "in" / "bad")[3].unlink()
    assert (
        call(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--json", *(["--gzip"] if packed else [])]) == 0
    )
    summary = said(capsys)
    assert (summary["files"], summary["excluded"]) == (11, {"missing_slices": 1})
    (volume,) = summary["volumes"]
    image = nibabel.load(tmp_path / "out" / volume["output"])
    assert isinstance(image, nibabel.Nifti1Image)
    assert volume["output"].endswith(".nii.gz" if packed else ".nii")
    assert np.asarray(image.dataobj)[3, 2, 5] == 2 * 16 + 3 + 5 - 1024
    (row,) = csv.DictReader((tmp_path / "out" / "refused.csv").read_text().splitlines())
    assert (row["code"], row["files"]) == ("missing_slices", "5")
    assert b"SECRET" not in b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir())


def test_convert_fails_where_nothing_comes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_secret(tmp_path / "in")[3].unlink()
    assert call(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "Not one volume" in capsys.readouterr().err


def test_convert_names_a_source_that_is_not_there_and_an_output_inside_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_secret(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert call(["convert", str(tmp_path / "nowhere"), str(out)]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert call(["convert", str(tmp_path / "empty"), str(out)]) == 1
    assert "holds no files" in capsys.readouterr().err
    assert call(["convert", str(tmp_path / "in"), str(tmp_path / "in" / "out")]) == 2
    assert not out.exists()


def test_a_key_table_that_cannot_be_written_is_said_before_anything_is_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_secret(tmp_path / "in")
    table = tmp_path / "nowhere" / "key.csv"
    assert call(["deidentify", str(tmp_path / "in"), str(tmp_path / "out"), "--key-table", str(table)]) == 1
    assert "is no folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_copied_from_a_table_is_never_broken_over_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write_secret(tmp_path / "in" / "a-folder-with-a-long-name", BurnedInAnnotation="YES")
    run = config(tmp_path, tmp_path / "in")
    assert call(["quarantine", "list", run, "--json"]) == 0
    (row,) = said(capsys)
    assert call(["quarantine", "list", run]) == 0
    assert row["item"] in capsys.readouterr().out


def test_show_excluded_names_the_files_of_a_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_secret(tmp_path / "in")[3].unlink()
    assert call(["show", "excluded", config(tmp_path, tmp_path / "in"), "--json"]) == 0
    (row,) = said(capsys)
    assert "SECRET-0.dcm" in row["file"]


def test_deidentify_leaves_no_trace_but_in_the_key_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_secret(tmp_path / "in")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    table = tmp_path / "key.csv"
    arguments = ["deidentify", str(tmp_path / "in"), str(tmp_path / "out"), "--key-table", str(table), "--json"]
    assert call(arguments) == 0
    summary = said(capsys)
    assert (summary["files"], summary["written"], summary["excluded"]) == (7, 6, {"not_an_image": 1})
    outputs = sorted((tmp_path / "out").rglob("*.dcm"))
    assert len(outputs) == 6
    assert not [path for path in (tmp_path / "out").rglob("*") if "SECRET" in path.name]
    assert b"SECRET" not in b"".join(path.read_bytes() for path in outputs)
    headers = [dcmread(path) for path in outputs]
    assert len({header.PatientID for header in headers}) == len({header.SeriesInstanceUID for header in headers}) == 1
    assert {header.pixel_array[0, 0] for header in headers} == set(range(6))
    assert "SECRET-ID" in table.read_text()
    assert table.stat().st_mode & 0o077 == 0
    assert call(arguments) == 1  # the key table is not written over


def test_the_key_table_cannot_lie_among_what_is_given_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_secret(tmp_path / "in")
    out = tmp_path / "out"
    assert call(["deidentify", str(tmp_path / "in"), str(out), "--key-table", str(out / "key.csv")]) == 2
    assert "given away" in capsys.readouterr().err
    assert call(["deidentify", str(tmp_path / "in"), str(tmp_path / "in" / "out")]) == 2


def test_what_was_refused_is_listed_shown_and_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_secret(tmp_path / "in" / "written-on", BurnedInAnnotation="YES")
    write_secret(tmp_path / "in" / "broken")[3].unlink()
    run = config(tmp_path, tmp_path / "in")
    assert call(["quarantine", "list", run, "--json"]) == 0
    rows = {row["code"]: row for row in said(capsys)}
    assert set(rows) == {"burned_in", "missing_slices"}
    assert "written-on/SECRET-0.dcm" in rows["burned_in"]["where"]
    table = (tmp_path / "ws" / "quarantine" / "reasons.csv").read_text()
    assert "burned_in" in table
    assert "SECRET" not in table
    item = rows["burned_in"]["item"]
    assert call(["quarantine", "show", run, item[:10], "--json"]) == 0
    assert said(capsys)["files"] == "6"
    assert call(["quarantine", "readmit", run, rows["missing_slices"]["item"], "--why", "please"]) == 2
    assert "nobody's word" in capsys.readouterr().err
    assert call(["quarantine", "readmit", run, item, "--why", "a protocol name"]) == 0
    events = AuditLog(tmp_path / "ws").events()
    assert [e["details"]["why"] for e in events if e["action"] == "scan.readmitted"] == ["a protocol name"]
    assert {e["action"] for e in events if e["outcome"] == "refused"} == {
        "excluded.burned_in", "excluded.missing_slices",
    }  # fmt: skip
    capsys.readouterr()
    assert call(["quarantine", "list", run, "--json"]) == 0
    assert [row["code"] for row in said(capsys)] == ["missing_slices"]


KILLED = """
import os, sys
from medtl.scans import io
from pipelines.cli import call
before = sys.argv.pop(1) == "before"
def killed(workspace, words, write=io.write_readmissions):
    before or write(workspace, words)
    os.kill(os.getpid(), 9)
io.write_readmissions = killed
call(sys.argv[1:])
"""


@pytest.mark.parametrize("when, found", [("before", []), ("after", [("unfinished", "quarantine/readmitted.json")])])
def test_a_kill_while_something_is_taken_back_leaves_no_accusation_and_is_finished_by_the_next_ingest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], when: str, found: list[tuple[str, str]]
) -> None:
    write_secret(tmp_path / "in" / "written-on", BurnedInAnnotation="YES")
    run = config(tmp_path, tmp_path / "in")
    assert call(["quarantine", "list", run, "--json"]) == 0
    (row,) = said(capsys)
    readmit = ["quarantine", "readmit", run, row["item"], "--why", "a protocol name"]
    done = subprocess.run([sys.executable, "-c", KILLED, when, *readmit], check=False, cwd=ROOT)
    assert done.returncode == -9
    trail, words = AuditLog(tmp_path / "ws"), tmp_path / "ws" / "quarantine" / "readmitted.json"

    def faults() -> list[tuple[str, str]]:
        return [(f.what, f.where) for f in verify_workspace(tmp_path / "ws", trail.verify(), trail.events())]

    assert faults() == found
    if words.is_file():
        whole = words.read_bytes()
        words.write_bytes(whole.replace(b"protocol", b"Protocol"))
        assert faults() == [("altered", "quarantine/readmitted.json")]
        words.write_bytes(whole)
    assert call(["quarantine", "list", run, "--json"]) == 0
    assert faults() == []
    assert len(said(capsys)) == (when == "before")  # taken back, or to be asked for again


def test_nothing_is_taken_back_that_the_audit_log_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_secret(tmp_path / "in", BurnedInAnnotation="YES")
    run = config(tmp_path, tmp_path / "in")
    assert call(["quarantine", "list", run, "--json"]) == 0
    (row,) = said(capsys)
    trail = tmp_path / "ws" / "audit.jsonl"
    trail.rename(tmp_path / "kept")
    trail.mkdir()
    assert call(["quarantine", "readmit", run, row["item"], "--why", "a protocol name"]) == 1
    assert "cannot be" in capsys.readouterr().err
    trail.rmdir()
    (tmp_path / "kept").rename(trail)
    assert call(["quarantine", "list", run, "--json"]) == 0
    assert said(capsys) == [row]


def test_every_code_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path, tmp_path, "  checks:\n    policy: {burned_in: reject}\n")
    assert call(["show", "codes", run, "--json"]) == 0
    rows = {row["code"]: row for row in said(capsys)}
    assert rows["burned_in"]["action"] == "reject"
    assert all(row["meaning"] and row["what to try"] for row in rows.values())


def test_a_second_ingest_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_secret(tmp_path / "in")
    run = config(tmp_path, tmp_path / "in")
    assert call(["quarantine", "list", run, "--json"]) == 0  # ingests
    capsys.readouterr()
    assert call(["ingest", run, "--json"]) == 0
    summary = said(capsys)
    assert (summary["files"], summary["scans"], summary["volumes"], summary["reused"]) == (6, 1, 1, True)
    assert summary["seconds"] < 1


def test_listen_without_callers_in_the_config_says_what_to_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["listen", config(tmp_path, tmp_path)]) == 2
    assert "scans.pacs.listen" in capsys.readouterr().err
