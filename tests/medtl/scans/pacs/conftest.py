"""Small CT objects, a sender, and a real Orthanc where there is one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification

from medtl.pseudonyms import Pseudonymiser

STUDY, SERIES = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.1.1"


def make_ct(number: int, size: int = 16, **attributes: Any) -> Dataset:
    """Make one slice of a CT series."""
    slice_ = Dataset()
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = CTImageStorage
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"{SERIES}.{number}"
    slice_.StudyInstanceUID, slice_.SeriesInstanceUID = STUDY, SERIES
    slice_.PatientID, slice_.PatientName, slice_.StudyDate = "ID-1", "DOE^JANE", "20260102"
    slice_.Modality, slice_.InstanceNumber = "CT", number
    slice_.Rows = slice_.Columns = size
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 0
    slice_.BitsAllocated = slice_.BitsStored = 16
    slice_.HighBit = 15
    slice_.PixelData = number.to_bytes(2, "little") * size * size
    for keyword, value in attributes.items():
        setattr(slice_, keyword, value)
    slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
    return slice_


@pytest.fixture
def ct() -> Callable[..., Dataset]:
    return make_ct


@pytest.fixture(scope="session")
def series() -> list[Dataset]:
    """Make 200 slices; the pixel data of the hundredth end in the middle."""
    return [make_ct(number, 32, **({"PixelData": bytes(32 * 32)} if number == 100 else {})) for number in range(1, 201)]


@contextmanager
def _sending(
    address: tuple[str, int], caller: str = "SENDER", classes: Sequence[str] = (), timeout_s: float = 20, **more: Any
) -> Iterator[Association]:
    """Associate with a receiver."""
    entity = AE(caller)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = timeout_s
    for one in classes or (CTImageStorage, Verification):
        entity.add_requested_context(one)
    opened: list[socket.socket] = []
    remember: Any = [(evt.EVT_CONN_OPEN, lambda event: opened.append(event.assoc.dul.socket.socket))]
    assoc = entity.associate(*address, ae_title="MEDTL", evt_handlers=remember, **more)
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()
        for one in opened:  # pynetdicom leaves a connection open that the other side has closed
            one.close()


@pytest.fixture
def sending() -> Callable[..., AbstractContextManager[Association]]:
    return _sending


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs Orthanc and dcmtk, unless MEDTL_TEST_SERVICES=1 says that they must be there."""
    if os.environ.get("MEDTL_TEST_SERVICES") != "1":
        needing = [item for item in items if item.get_closest_marker("services")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in set(needing)]


@pytest.fixture
def names() -> Pseudonymiser:
    return Pseudonymiser(bytes(range(32)))


@dataclass(frozen=True)
class Orthanc:
    """A running archive that knows medtl at ``our_port``."""

    http: int
    dicom: int
    our_port: int
    password: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def rest(self, method: str, path: str, **more: Any) -> requests.Response:
        answer = requests.request(method, self.url + path, auth=("medtl", self.password), timeout=60, **more)
        answer.raise_for_status()
        return answer


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    return _program


def _program(name: str) -> str:
    """Find an installed program: not pynetdicom's of the same name, and Orthanc where only root looks for programs."""
    folders = [one for one in os.environ.get("PATH", "").split(os.pathsep) if one != str(Path(sys.executable).parent)]
    found = shutil.which(name, path=os.pathsep.join([*folders, "/usr/sbin"]))
    if found is None:
        pytest.fail(f"{name} is not installed; these tests need orthanc, orthanc-dicomweb and dcmtk")
    return found


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    folder = tmp_path_factory.mktemp("orthanc")
    plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    if not plugin.exists():
        pytest.fail("Orthanc's DICOMweb plugin is not installed (orthanc-dicomweb)")
    one = Orthanc(free_port(), free_port(), free_port(), secrets.token_hex(8))
    settings = {
        "Name": "test", "HttpPort": one.http, "DicomPort": one.dicom, "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True, "RegisteredUsers": {"medtl": one.password}, "DicomAet": "ORTHANC",
        "StorageDirectory": str(folder / "storage"), "IndexDirectory": str(folder / "storage"),
        "DicomAlwaysAllowFind": True, "DicomAlwaysAllowGet": True, "DicomAlwaysAllowMove": True,
        "DicomModalities": {"MEDTL": ["MEDTL", "127.0.0.1", one.our_port]}, "Plugins": [str(plugin)],
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([_program("Orthanc"), str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        _wait_for(one, process, folder / "log")
        yield one
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(one: Orthanc, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        try:
            one.rest("GET", "/system")
        except requests.exceptions.ConnectionError:
            if process.poll() is not None:
                break
            time.sleep(0.25)
        else:
            return
    pytest.fail("Orthanc did not start: " + log.read_text(errors="replace")[-500:])
