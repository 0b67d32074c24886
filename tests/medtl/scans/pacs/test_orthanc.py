"""Against a real archive: what is there comes, all of it, once; one corrupt object stops nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from medtl.config import ListenConfig, PacsConfig, QueryConfig
from medtl.errors import ConfigError, StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.pacs.fetch import fetch, find
from medtl.scans.pacs.listen import Receiver
from medtl.scans.pacs.spool import Spool

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def filled(orthanc: Any, series: list[Dataset]) -> Any:
    """Put the 200 slices into the archive."""
    for one in series:
        buffer = io.BytesIO()
        one.save_as(buffer, enforce_file_format=True)
        orthanc.rest("POST", "/instances", data=buffer.getvalue())
    return orthanc


def pacs(orthanc: Any, kind: str, **more: Any) -> PacsConfig:
    listener = ListenConfig(port=orthanc.our_port, callers=("ORTHANC",), min_free_mb=1)
    common: dict[str, Any] = {"query": QueryConfig(modality=("CT",)), "retries": 1, "min_free_mb": 1, "timeout_s": 20}
    if kind == "dicomweb":
        auth = {"username_env": "TEST_USER", "password_env": "TEST_PASSWORD"}
        return PacsConfig(kind="dicomweb", url=orthanc.url + "/dicom-web", **common | auth | more)
    there = {"host": "localhost", "port": orthanc.dicom, "called_ae": "ORTHANC", "listen": listener}
    return PacsConfig.model_validate({"kind": kind, **there, **common, **more})


@pytest.fixture(autouse=True)
def _secrets(orthanc: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TEST_USER", "medtl")
    monkeypatch.setenv("TEST_PASSWORD", orthanc.password)
    monkeypatch.setattr("medtl.scans.pacs.query.PAUSE_S", 0.05)
    return


def uids(folder: Path) -> list[str]:
    return sorted(str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID) for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["cget", "cmove", "dicomweb"])
def test_everything_comes_once(
    filled: Any, series: list[Dataset], kind: str, tmp_path: Path, names: Pseudonymiser
) -> None:
    first = fetch(pacs(filled, kind), names, tmp_path)
    assert (first.series, first.received, first.known, first.failed) == (1, 200, 0, ())
    assert uids(first.folder) == sorted(str(one.SOPInstanceUID) for one in series)
    second = fetch(pacs(filled, kind), names, tmp_path)
    assert (second.received, second.known, second.failed) == (0, 200, ())
    assert not list((tmp_path / "incoming").iterdir())


@pytest.mark.parametrize("kind", ["cget", "cmove", "dicomweb"])
def test_only_what_is_missing_is_fetched(filled: Any, kind: str, tmp_path: Path, names: Pseudonymiser) -> None:
    folder = fetch(pacs(filled, kind), names, tmp_path).folder
    for path in sorted(folder.iterdir())[:5]:
        path.unlink()
    again = fetch(pacs(filled, kind), names, tmp_path)
    assert (again.received, again.known) == (5, 195)


def test_three_ways_bring_the_same_object(filled: Any, tmp_path: Path, names: Pseudonymiser) -> None:
    for kind in ("dicomweb", "cget", "cmove"):
        fetch(pacs(filled, kind), names, tmp_path / kind)
    named = [{path.name for path in (tmp_path / kind / "objects").iterdir()} for kind in ("dicomweb", "cget", "cmove")]
    assert named[0] == named[1] == named[2]


def test_an_archive_that_sends_to_our_port_is_taken(filled: Any, tmp_path: Path, names: Pseudonymiser) -> None:
    spool = Spool(tmp_path, names, 100, 1)
    with Receiver(ListenConfig(port=filled.our_port, callers=("ORTHANC",)), spool):
        everything = filled.rest("GET", "/series").json()
        sent = filled.rest("POST", "/modalities/MEDTL/store", json={"Resources": everything}).json()
    assert (sent["InstancesCount"], sent["FailedInstancesCount"]) == (200, 0)
    assert spool.counts().stored == len(set(uids(spool.objects))) == 200


@pytest.mark.parametrize("kind", ["cget", "dicomweb"])
def test_a_query_narrows(filled: Any, kind: str, tmp_path: Path, names: Pseudonymiser) -> None:
    def found(**query: Any) -> int:
        return len(find(pacs(filled, kind, query=QueryConfig(**query))))

    assert found(modality=("CT", "MR")) == found(study_date="20260101-20260131") == 1
    assert found(modality=("MR",)) == found(study_date="20270101-") == found(study_uid=("1.2.3",)) == 0
    study = find(pacs(filled, kind))[0]
    assert found(study_uid=(study.study_uid,), series_uid=(study.series_uid,)) == 1
    assert found(study_uid=(study.study_uid,), series_uid=("1.2.3",)) == 0


def test_an_object_that_is_too_large_is_left_out_and_the_others_come(
    filled: Any, series: list[Dataset], tmp_path: Path, names: Pseudonymiser
) -> None:
    limit = 0.0019  # between the corrupt object and the whole ones
    for kind in ("cget", "dicomweb"):
        result = fetch(pacs(filled, kind, max_object_mb=limit), names, tmp_path / kind)
        assert (result.received, len(result.failed)) == (1, 199), kind
        assert {one.code for one in result.failed} == {"too_large"}
        assert not {str(one.SOPInstanceUID) for one in series} & {one.item for one in result.failed}


def test_a_wrong_password_is_said(filled: Any, tmp_path: Path, names: Pseudonymiser, monkeypatch: Any) -> None:
    monkeypatch.setenv("TEST_PASSWORD", "wrong")
    with pytest.raises(StorageError, match=r"refuses this user \(HTTP 401\).*username_env"):
        fetch(pacs(filled, "dicomweb"), names, tmp_path)
    monkeypatch.delenv("TEST_PASSWORD")
    with pytest.raises(ConfigError, match=r"TEST_PASSWORD.* is not set"):
        fetch(pacs(filled, "dicomweb"), names, tmp_path)


def test_a_move_to_a_destination_that_the_archive_does_not_know_is_said(
    filled: Any, tmp_path: Path, names: Pseudonymiser
) -> None:
    listener = ListenConfig(port=0, callers=("ORTHANC",), ae_title="NOBODY", min_free_mb=1)
    with pytest.raises(StorageError, match="'NOBODY'"):
        fetch(pacs(filled, "cmove", listen=listener, retries=0), names, tmp_path)


def test_dcmtk_sends_and_the_receiver_dies(
    program: Callable[[str], str], orthanc: Any, series: list[Dataset], tmp_path: Path, names: Pseudonymiser
) -> None:
    slices, spool = tmp_path / "slices", tmp_path / "spool"
    slices.mkdir()
    for number, one in enumerate(series):
        one.save_as(slices / f"{number:03}.dcm", enforce_file_format=True)
    files = sorted(map(str, slices.iterdir()))
    command = [program("storescu"), "-v", "-aet", "SENDER", "-aec", "MEDTL", "127.0.0.1", str(orthanc.our_port)]

    receiver = start_receiver(orthanc.our_port, spool)
    with subprocess.Popen(command + files, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sender:
        while len(list((spool / "objects").iterdir())) < 60:
            time.sleep(0.005)
        receiver.kill()  # -9
        said = sender.stdout.read() if sender.stdout else ""
    receiver.wait()
    acknowledged = said.count("Received Store Response (Success)")
    there = uids(spool / "objects")
    assert 0 < acknowledged < 200
    assert set(there) >= {str(one.SOPInstanceUID) for one in series[:acknowledged]}
    assert all(dcmread(path).PixelData for path in (spool / "objects").iterdir())

    receiver = start_receiver(orthanc.our_port, spool)
    assert not list((spool / "incoming").iterdir())
    subprocess.run(command + files, check=True, capture_output=True)
    receiver.terminate()
    assert receiver.wait(timeout=20) == 0
    assert uids(spool / "objects") == sorted(str(one.SOPInstanceUID) for one in series)


def start_receiver(port: int, folder: Path) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path\n"
        "from medtl.config import ListenConfig; from medtl.pseudonyms import Pseudonymiser\n"
        "from medtl.scans.pacs.listen import listen, stopped_by_signals\n"
        "with stopped_by_signals() as stop:\n"
        "    config = ListenConfig(port=int(sys.argv[1]), callers=('SENDER',), min_free_mb=1)\n"
        "    listen(config, Pseudonymiser(bytes(range(32))), Path(sys.argv[2]), stop,\n"
        "           lambda *address: print('open', flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(port), str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == "open\n"
    return process


def test_an_ingest_asks_the_archive_first_and_counts_what_came(filled: Any, tmp_path: Path) -> None:
    settings = pacs(filled, "dicomweb").model_dump(mode="json", exclude_none=True)
    config = {"name": "nightly", "workspace": str(tmp_path / "ws"), "scans": {"pacs": settings, "read": "images"}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pipelines.cli", "ingest", str(tmp_path / "run.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["files"], summary["excluded"]) == (200, {"blank": 199, "truncated": 1})  # the slices are empty
    events = (tmp_path / "ws" / "audit.jsonl").read_text()
    assert "scans.fetched" in events
