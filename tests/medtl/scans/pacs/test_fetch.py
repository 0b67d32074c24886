"""An archive may be slow, wrong, silent or hostile: what it sends is kept, and what it does not is said."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.uid import EncapsulatedPDFStorage

from medtl.config import PacsConfig, QueryConfig
from medtl.errors import ConfigError, ScanError, StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.pacs.dicomweb import object_of
from medtl.scans.pacs.fetch import FetchResult, fetch, find

NAMES = Pseudonymiser(bytes(range(32)))
Answer = Callable[[str, dict[str, list[str]]], tuple[int, str, bytes]]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtl.scans.pacs.query.PAUSE_S", 0.01)


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """Serve HTTP with a function; give the root and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            asked.append(parts.path)
            code, kind, body = answer(parts.path, parse_qs(parts.query))
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


class Archive:
    """A DICOMweb server with one series; each object may be told to fail."""

    def __init__(self, slices: list[Dataset], troubles: dict[str, list[int]] | None = None) -> None:
        self.slices = {str(one.SOPInstanceUID): one for one in slices}
        self.troubles = troubles or {}  # UID -> codes that are answered first; 0 is half an object
        self.knows_offsets = True
        self.sends: dict[str, Dataset] = {}  # in place of what it lists

    def __call__(self, path: str, params: dict[str, list[str]]) -> tuple[int, str, bytes]:
        last = path.rsplit("/", 1)[-1]
        if last in self.slices:
            return self.send(last)
        rows = [] if self.knows_offsets and params.get("offset", ["0"]) != ["0"] else list(self.slices.values())
        rows = rows if last == "instances" else rows[:1]
        return 200, "application/dicom+json", json.dumps([self.row(one) for one in rows]).encode()

    def row(self, one: Dataset) -> dict[str, Any]:
        tags = {"0020000D": "StudyInstanceUID", "0020000E": "SeriesInstanceUID", "00080060": "Modality"}
        tags |= {"00080018": "SOPInstanceUID", "00080016": "SOPClassUID"}
        return {tag: {"vr": "UI", "Value": [str(one[keyword].value)]} for tag, keyword in tags.items()}

    def send(self, uid: str) -> tuple[int, str, bytes]:
        buffer = io.BytesIO()
        self.sends.get(uid, self.slices[uid]).save_as(buffer, enforce_file_format=True)
        data = b"\r\n--xx\r\nContent-Type: application/dicom\r\n\r\n" + buffer.getvalue() + b"\r\n--xx--\r\n"
        trouble = self.troubles[uid].pop(0) if self.troubles.get(uid) else 200
        if trouble == 0:
            data, trouble = data[: len(data) // 2], 200
        return trouble, 'multipart/related; type="application/dicom"; boundary=xx', data


def pacs(root: str, **more: Any) -> PacsConfig:
    common: dict[str, Any] = {"query": QueryConfig(modality=("CT",)), "retries": 2, "min_free_mb": 1, "timeout_s": 5}
    return PacsConfig(kind="dicomweb", url=root, **common | more)


def fetched(archive: Archive, folder: Path, **more: Any) -> tuple[FetchResult, list[str]]:
    with serving(archive) as (root, asked):
        return fetch(pacs(root, **more), NAMES, folder), asked


def test_an_object_that_fails_for_a_while_comes_in_the_end(tmp_path: Path, ct: Callable[..., Dataset]) -> None:
    slices = [ct(number) for number in range(5)]
    troubles = {str(slices[1].SOPInstanceUID): [503, 0], str(slices[3].SOPInstanceUID): [500]}
    result, asked = fetched(Archive(slices, troubles), tmp_path)
    assert (result.received, result.failed) == (5, ())
    assert sum(path.count("/instances/") for path in asked) == 5 + 2 + 1  # the others were not asked for again
    assert [dcmread(path) in slices for path in result.folder.iterdir()] == [True] * 5


def test_an_object_that_never_comes_is_named_by_its_pseudonym_and_stops_nothing(
    tmp_path: Path, ct: Callable[..., Dataset]
) -> None:
    slices = [ct(number) for number in range(5)]
    troubles = {str(slices[0].SOPInstanceUID): [500] * 9, str(slices[1].SOPInstanceUID): [404] * 9}
    result, asked = fetched(Archive(slices, troubles), tmp_path)
    assert result.received == 3
    assert {one.item: one.code for one in result.failed} == {
        NAMES.name("uid", str(slices[0].SOPInstanceUID)): "not_sent",
        NAMES.name("uid", str(slices[1].SOPInstanceUID)): "not_found",
    }
    assert sum(path.endswith(slices[1].SOPInstanceUID) for path in asked) == 1  # not found stays not found


def test_another_object_than_was_asked_for_is_not_taken(tmp_path: Path, ct: Callable[..., Dataset]) -> None:
    archive = Archive([ct(1), ct(2)])
    archive.sends[str(ct(1).SOPInstanceUID)] = ct(3)
    result, _ = fetched(archive, tmp_path)
    assert (result.received, [one.code for one in result.failed]) == (1, ["wrong_object"])


def test_a_server_that_does_not_know_offsets_is_asked_twice_only(tmp_path: Path, ct: Callable[..., Dataset]) -> None:
    archive = Archive([ct(number) for number in range(3)])
    archive.knows_offsets = False
    result, asked = fetched(archive, tmp_path)
    assert result.received == 3
    assert sum(path.endswith("/instances") for path in asked) == 2


def test_a_document_is_left_where_it_is(tmp_path: Path, ct: Callable[..., Dataset]) -> None:
    result, asked = fetched(Archive([ct(1), ct(2, SOPClassUID=EncapsulatedPDFStorage)]), tmp_path)
    assert (result.received, [one.code for one in result.failed]) == (1, ["other_kind"])
    assert not [path for path in asked if path.endswith(str(ct(2).SOPInstanceUID))]


def test_an_archive_that_is_not_there_is_said_without_a_word_about_patients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(Archive([])) as (root, _):
        pass
    caplog.set_level("DEBUG")
    query = QueryConfig(study_uid=("1.2.3.4.5",))
    with pytest.raises(StorageError, match=r"does not answer .*scans\.pacs\.url") as caught:
        fetch(pacs(root, query=query), NAMES, tmp_path)
    assert "1.2.3.4.5" not in str(caught.value) + caplog.text
    there = {"host": "127.0.0.1", "port": int(root.rsplit(":", 1)[1]), "called_ae": "ELSEWHERE"}
    with pytest.raises(StorageError, match=r"'ELSEWHERE' at 127\.0\.0\.1:\d+ cannot be reached"):
        fetch(PacsConfig(kind="cget", query=query, retries=1, **there), NAMES, tmp_path)
    assert "1.2.3.4.5" not in caplog.text


def test_a_page_that_is_not_dicomweb_is_said(tmp_path: Path) -> None:
    with (
        serving(lambda *_: (200, "text/html", b"<html>")) as (root, _),
        pytest.raises(StorageError, match="not DICOM JSON"),
    ):
        fetch(pacs(root), NAMES, tmp_path)


def test_a_token_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_TOKEN"):
        find(pacs("http://127.0.0.1:9", token_env="NO_SUCH_TOKEN"))


def test_last_days_count_from_today(ct: Callable[..., Dataset]) -> None:
    dates: list[str] = []

    def answer(path: str, params: dict[str, list[str]]) -> tuple[int, str, bytes]:
        dates.extend(params.get("StudyDate", []))
        return 204, "application/dicom+json", b""

    with serving(answer) as (root, _):
        assert find(pacs(root, query=QueryConfig(last_days=2)), today=date(2026, 3, 1)) == ()
    assert dates == ["20260227-"]


def test_a_fetch_stops_when_it_is_told(tmp_path: Path, ct: Callable[..., Dataset]) -> None:
    stop = threading.Event()
    stop.set()
    with serving(Archive([ct(1)])) as (root, _), pytest.raises(StorageError, match="was stopped"):
        fetch(pacs(root), NAMES, tmp_path, stop)


def test_a_full_disk_stops_the_fetch(tmp_path: Path, ct: Callable[..., Dataset]) -> None:
    with serving(Archive([ct(1)])) as (root, _), pytest.raises(StorageError, match=r"min_free_mb"):
        fetch(pacs(root, min_free_mb=1e12), NAMES, tmp_path)


class Pieces(requests.Response):
    """An answer that comes in pieces of any size."""

    def __init__(self, data: bytes, cuts: list[int]) -> None:
        super().__init__()
        self.headers["Content-Type"] = "multipart/related; boundary=b-1"
        ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
        self.pieces = [data[a:b] for a, b in pairwise(ends)]

    def iter_content(self, *_: Any, **__: Any) -> Iterator[bytes]:
        return iter(self.pieces)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(body=st.binary(max_size=60) | st.just(b"\r\n--b-\r\n--b"), cuts=st.lists(st.integers(0, 140)))
def test_an_object_is_taken_out_of_its_envelope_however_it_is_cut(body: bytes, cuts: list[int]) -> None:
    envelope = b"\r\n--b-1\r\nContent-Type: application/dicom\r\n\r\n" + body + b"\r\n--b-1--\r\n"
    assert b"".join(object_of(Pieces(envelope, cuts))) == body
    with pytest.raises(ScanError, match="no whole object"):
        list(object_of(Pieces(envelope[: 44 + len(body)], cuts)))
