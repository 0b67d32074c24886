"""The port takes what it may, puts it on the disk before it says so, and outlives everybody who is hostile."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, EncapsulatedPDFStorage, JPEG2000Lossless
from pynetdicom import AE, evt

from medtl.config import ListenConfig
from medtl.errors import StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.pacs.listen import Receiver, listen, stopped_by_signals
from medtl.scans.pacs.spool import Spool

Ct = Callable[..., Dataset]
Sending = Callable[..., Any]
NAMES = Pseudonymiser(bytes(range(32)))
OPEN: dict[str, Any] = {"port": 0, "callers": ("SENDER",), "min_free_mb": 1, "timeout_s": 2}


@contextmanager
def receiving(folder: Path, **more: Any) -> Iterator[Receiver]:
    config = ListenConfig(**OPEN | more)
    with Receiver(config, Spool(folder, NAMES, config.max_object_mb, config.min_free_mb)) as receiver:
        yield receiver


def objects(folder: Path) -> list[Path]:
    return sorted((folder / "objects").iterdir())


def unfinished(folder: Path) -> list[Path]:
    return list((folder / "incoming").iterdir())


def soon(true: Callable[[], bool]) -> bool:
    """Wait until it is so, ten seconds at most."""
    for _ in range(200):
        if true():
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------------------------ what is kept


def test_an_acknowledged_object_is_a_whole_file_under_a_name_that_says_nothing(
    tmp_path: Path, ct: Ct, sending: Sending
) -> None:
    one = ct(7)
    with receiving(tmp_path) as receiver, sending(receiver.address) as sender:
        assert sender.send_c_echo().Status == 0
        assert sender.send_c_store(one).Status == 0
        (path,) = objects(tmp_path)  # before the association has ended
    there = dcmread(path)
    assert there == one
    assert there.file_meta.TransferSyntaxUID == one.file_meta.TransferSyntaxUID
    assert there.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID
    assert not any(text in path.name for text in (one.SOPInstanceUID, one.PatientID, "DOE"))
    assert path.stat().st_mode & 0o077 == tmp_path.joinpath("objects").stat().st_mode & 0o077 == 0
    counts = receiver.spool.counts()
    assert (counts.stored, counts.known, counts.conflicting, counts.refused) == (1, 0, 0, {})
    assert counts.last is not None


def test_the_same_object_is_kept_once_and_another_content_beside_it(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    other = ct(1, PatientID="ID-2")
    for _ in range(2):  # and again after a restart
        with receiving(tmp_path) as receiver, sending(receiver.address) as sender:
            assert [sender.send_c_store(one).Status for one in (ct(1), ct(1), other)] == [0, 0, 0]
    assert len(objects(tmp_path)) == 2
    assert receiver.spool.counts().known == 3
    assert {dcmread(path).PatientID for path in objects(tmp_path)} == {"ID-1", "ID-2"}


def test_a_compressed_object_stays_as_it_is(tmp_path: Path, ct: Ct, sending: Sending) -> None:

    one = ct(1, PixelData=encapsulate([b"no codestream at all"]))
    one["PixelData"].is_undefined_length = True
    one.file_meta.TransferSyntaxUID = JPEG2000Lossless
    entity = AE("SENDER")
    entity.add_requested_context(CTImageStorage, JPEG2000Lossless)
    with receiving(tmp_path) as receiver:
        assoc = entity.associate(*receiver.address, ae_title="MEDTL")
        assert assoc.send_c_store(one).Status == 0
        assoc.release()
    (path,) = objects(tmp_path)
    assert dcmread(path).file_meta.TransferSyntaxUID == JPEG2000Lossless
    assert dcmread(path).PixelData == one.PixelData


def test_no_log_line_names_anybody(
    tmp_path: Path, ct: Ct, sending: Sending, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    caplog.set_level(logging.DEBUG, logger="")
    caplog.set_level(logging.DEBUG, logger="medtl")
    one = ct(1, PatientID="CANARY-1")
    with receiving(tmp_path, max_object_mb=0.002) as receiver, sending(receiver.address) as sender:
        sender.send_c_store(one)
        sender.send_c_store(ct(1))
        sender.send_c_store(ct(2, PixelData=bytes(4000)))
    assert "was refused" in caplog.text
    assert "another content" in caplog.text
    assert not [text for text in (one.SOPInstanceUID, "CANARY", "DOE", one.StudyInstanceUID) if text in caplog.text]
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------ who and what may


@pytest.mark.parametrize("callers", [("OTHER",), ()])
def test_who_is_not_on_the_list_is_refused(tmp_path: Path, sending: Sending, callers: tuple[str, ...], ct: Ct) -> None:
    with receiving(tmp_path, callers=callers) as receiver, sending(receiver.address) as sender:
        assert not sender.is_established
    assert not objects(tmp_path)


def test_another_called_title_is_refused(tmp_path: Path, sending: Sending) -> None:
    with receiving(tmp_path, ae_title="ELSE") as receiver, sending(receiver.address) as sender:
        assert sender.is_rejected


def test_a_document_is_not_an_image_and_is_not_agreed_on(tmp_path: Path, sending: Sending, ct: Ct) -> None:
    with receiving(tmp_path) as receiver:
        with sending(receiver.address, classes=(EncapsulatedPDFStorage,)) as sender:
            assert not sender.is_established
        with sending(receiver.address, classes=(EncapsulatedPDFStorage, CTImageStorage)) as sender:
            assert [str(one.abstract_syntax) for one in sender.accepted_contexts] == [CTImageStorage]
            # the class of another context, said in this one
            document = ct(1, SOPClassUID=EncapsulatedPDFStorage)
            sender.accepted_contexts[0].abstract_syntax = EncapsulatedPDFStorage
            assert sender.send_c_store(document).Status != 0
    assert not objects(tmp_path)


def test_no_more_senders_than_allowed_send_at_one_time(tmp_path: Path, sending: Sending) -> None:
    with receiving(tmp_path, max_associations=1) as receiver:
        with sending(receiver.address) as first, sending(receiver.address) as second:
            assert first.is_established
            assert second.is_rejected
        assert soon(lambda: receiver.idle)
        with sending(receiver.address) as third:
            assert third.is_established


def test_a_uid_that_is_a_path_leads_nowhere(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    with warnings.catch_warnings(action="ignore"):
        one = ct(1, SOPInstanceUID="../../../etc/cron.d/x")
        with receiving(tmp_path) as receiver, sending(receiver.address) as sender:
            assert sender.send_c_store(one).Status == 0x0117
            assert sender.send_c_store(ct(1)).Status == 0
    assert receiver.spool.counts().refused == {"bad_uid": 1}
    assert [path.parent for path in tmp_path.rglob("*.*")] == [tmp_path / "objects"]


# ------------------------------------------------------------------------------------------------ bounds


def test_an_object_that_is_too_large_is_refused_and_the_next_one_taken(
    tmp_path: Path, ct: Ct, sending: Sending
) -> None:
    with receiving(tmp_path, max_object_mb=1) as receiver, sending(receiver.address) as sender:
        refused = sender.send_c_store(ct(1, PixelData=bytes(1_500_000)))
        assert (refused.Status, refused.ErrorComment) == (0xC000, "larger than max_object_mb = 1")
        assert not unfinished(tmp_path)
        assert sender.send_c_store(ct(2)).Status == 0
    assert len(objects(tmp_path)) == 1


def test_an_object_without_an_end_ends_its_association(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    with receiving(tmp_path, max_object_mb=1) as receiver:
        with sending(receiver.address) as sender:
            assert "Status" not in sender.send_c_store(ct(1, PixelData=bytes(8_000_000)))
            assert soon(lambda: bool(sender.is_aborted))
        with sending(receiver.address) as sender:
            assert sender.send_c_store(ct(2)).Status == 0
    assert not unfinished(tmp_path)


def test_memory_does_not_grow_with_the_object(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    receiver, address = start(tmp_path)
    with sending(address) as sender:
        assert sender.send_c_store(ct(1)).Status == 0
        before = peak_mb(receiver.pid)
        assert sender.send_c_store(ct(2, PixelData=bytes(96_000_000))).Status == 0
        grown = peak_mb(receiver.pid) - before
    assert stop(receiver) == 0
    assert grown < 24
    assert max(path.stat().st_size for path in objects(tmp_path)) > 96_000_000


def test_a_disk_that_is_nearly_full_takes_nothing(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    with receiving(tmp_path, min_free_mb=1e12) as receiver, sending(receiver.address) as sender:
        assert sender.send_c_store(ct(1)).Status == 0xA700
    assert receiver.spool.counts().refused == {"disk_full": 1}
    assert not objects(tmp_path) + unfinished(tmp_path)


def test_what_the_disk_does_not_take_is_not_acknowledged(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    receiver, address = start(tmp_path, file_limit=50_000)
    with sending(address) as sender:
        statuses = [sender.send_c_store(ct(1, PixelData=bytes(size))).Status for size in (40_000, 60_000, 6_000_000)]
        assert statuses == [0, 0xA700, 0xA700]
        assert sender.send_c_store(ct(2)).Status == 0
    assert stop(receiver) == 0
    assert len(objects(tmp_path)) == 2
    assert not unfinished(tmp_path)


# ------------------------------------------------------------------------------------------------ hostile


def recorded(folder: Path, ct: Ct, sending: Sending) -> list[bytes]:
    """Give the messages that an honest sender sends: an association request, an object, a release."""
    said: list[bytes] = []
    with receiving(folder) as receiver:
        entity = AE("SENDER")
        entity.add_requested_context(CTImageStorage)
        assoc = entity.associate(
            *receiver.address,
            ae_title="MEDTL",
            evt_handlers=[(evt.EVT_DATA_SENT, lambda event: said.append(event.data))],
        )
        assoc.send_c_store(ct(99))
        assoc.release()
    return said


def throw(address: tuple[str, int], messages: list[bytes], wait: float = 0.2, hello: bytes = b"") -> bytes:
    """Send bytes and give what is answered before ``wait`` is over; to ``hello``, however long it takes."""
    answers = b""
    with socket.create_connection(address, timeout=20) as connection:
        try:
            if hello:
                connection.sendall(hello)
                answers += connection.recv(65536)
            for message in messages:
                connection.sendall(message)
                connection.settimeout(wait)
                with suppress(TimeoutError):
                    answers += connection.recv(65536)
        except OSError:  # it hung up on us, as it may
            pass
    return answers


def pdata(*fragments: tuple[int, bytes], context: int = 1) -> bytes:
    """Give a P-DATA-TF message. Source: DICOM PS3.8 9.3.5."""
    items = b"".join(struct.pack(">LBB", len(data) + 2, context, control) + data for control, data in fragments)
    return struct.pack(">BBL", 4, 0, len(items)) + items


def element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, number, len(value)) + value


HOSTILE = {
    "junk": [random.Random(1).randbytes(4096)],
    "http": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    "a length of 4 GB": [struct.pack(">BBL", 1, 0, 0xFFFFFFFF) + bytes(4096)],
    "data before an association": [pdata((2, b"x"))],
    "nothing": [],
}
HOSTILE_ASSOCIATED = {
    "a length of 4 GB": [struct.pack(">BBL", 4, 0, 0xFFFFFFFF) + bytes(4096)],
    "an item longer than its message": [struct.pack(">BBLLBB", 4, 0, 20, 0xFFFFFFF0, 1, 3) + bytes(14)],
    "an empty item": [struct.pack(">BBLL", 4, 0, 4, 0)],
    "a data set without a command": [pdata((2, b"x" * 100))],
    "a command that is junk": [pdata((3, random.Random(2).randbytes(300)))],
    "a command that nobody knows": [pdata((3, element(0x0100, b"\x77\x77") + element(0x0800, b"\x01\x01")))],
    "a store without a UID": [pdata((3, element(0x0100, b"\x01\x00") + element(0x0800, b"\x00\x00")), (2, b"x"))],
    "a context that was not agreed": [
        pdata((3, element(0x0100, b"\x01\x00") + element(0x0800, b"\x00\x00")), (2, b"x"), context=99)
    ],
    "a command without an end": [pdata((1, bytes(10_000)))] * 12,
    "a second association request": [b"RQ"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_port_outlives_whoever_connects(tmp_path: Path, ct: Ct, sending: Sending, name: str) -> None:
    with receiving(tmp_path) as receiver:
        throw(receiver.address, HOSTILE[name])
        with sending(receiver.address) as sender:
            assert sender.send_c_store(ct(1)).Status == 0
        assert soon(lambda: receiver.idle)
    assert not unfinished(tmp_path)


@pytest.mark.parametrize("name", HOSTILE_ASSOCIATED)
def test_the_port_outlives_whoever_may_send(tmp_path: Path, ct: Ct, sending: Sending, name: str) -> None:
    hello = recorded(tmp_path / "honest", ct, sending)[0]
    messages = [hello if message == b"RQ" else message for message in HOSTILE_ASSOCIATED[name]]
    with receiving(tmp_path / "spool") as receiver:
        answers = throw(receiver.address, messages, hello=hello)
        assert answers[:1] == b"\x02"  # it was let in
        with sending(receiver.address) as sender:
            assert sender.send_c_store(ct(1)).Status == 0
        assert soon(lambda: receiver.idle)
    assert len(objects(tmp_path / "spool")) == 1
    assert not unfinished(tmp_path / "spool")


def test_the_port_outlives_honest_messages_with_broken_bytes(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    said = recorded(tmp_path / "honest", ct, sending)
    chance = random.Random(3)
    with receiving(tmp_path / "spool") as receiver:
        for _ in range(150):
            broken = [bytearray(message) for message in said]
            for _ in range(chance.randint(1, 6)):
                message = chance.choice(broken)
                message[chance.randrange(min(len(message), 300))] = chance.randrange(256)
            throw(receiver.address, [bytes(message) for message in broken], wait=0.01)
        with sending(receiver.address) as sender:
            assert sender.send_c_store(ct(1)).Status == 0
        assert soon(lambda: receiver.idle)
    assert not unfinished(tmp_path / "spool")
    assert not list((tmp_path / "spool").glob("*.*"))


def test_who_says_nothing_does_not_keep_the_others_out(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    said = recorded(tmp_path / "honest", ct, sending)
    with receiving(tmp_path / "spool", max_associations=2, timeout_s=1) as receiver:
        idle = [socket.create_connection(receiver.address, timeout=5) for _ in range(10)]
        for number, one in enumerate(idle):
            one.sendall(said[0][: number * 7])  # some begin a sentence and stop
        with sending(receiver.address) as sender:
            assert sender.send_c_store(ct(1)).Status == 0
        assert soon(lambda: receiver.idle)  # all were cut off
        for one in idle:
            one.close()


def test_half_an_object_leaves_nothing(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    said = recorded(tmp_path / "honest", ct, sending)
    with receiving(tmp_path / "spool", timeout_s=1) as receiver:
        throw(receiver.address, said[:2])  # the command only, and away
        throw(receiver.address, [*said[:2], said[2][: len(said[2]) // 2]])
        assert soon(lambda: receiver.idle)
        assert not unfinished(tmp_path / "spool")
        with socket.create_connection(receiver.address) as connection:  # stays, and says no more
            for message in (*said[:2], said[2][: len(said[2]) // 2]):
                connection.sendall(message)
            assert soon(lambda: receiver.idle)
    assert not objects(tmp_path / "spool") + unfinished(tmp_path / "spool")


# ------------------------------------------------------------------------------------------------ TLS


def certificate(program: Callable[[str], str], folder: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate that vouches for itself."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    kind = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    also = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([program("openssl"), "req", *kind, *also], check=True, capture_output=True)
    return cert, key


@pytest.mark.services
def test_tls_asks_the_sender_for_a_certificate_and_waits_for_nobody(
    tmp_path: Path, ct: Ct, sending: Sending, program: Callable[[str], str]
) -> None:
    (ours, our_key), (theirs, their_key) = (certificate(program, tmp_path, name) for name in ("us", "them"))
    files = {"cert_file": ours, "key_file": our_key, "ca_file": theirs}
    with receiving(tmp_path / "spool", **files) as receiver:
        silent = socket.create_connection(receiver.address)  # never shakes hands
        for shown in (False, True):
            context = ssl.create_default_context(cafile=ours)
            if shown:
                context.load_cert_chain(theirs, their_key)
            with sending(receiver.address, timeout_s=5, tls_args=(context, "localhost")) as sender:
                assert sender.is_established == shown
                if shown:
                    assert sender.send_c_store(ct(1, 400)).Status == 0
        silent.close()
    assert len(objects(tmp_path / "spool")) == 1


@pytest.mark.services
def test_a_certificate_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no certificate")
    with (
        pytest.raises(StorageError, match="cert_file, key_file and ca_file"),
        receiving(tmp_path / "spool", cert_file=tmp_path / "x.pem", key_file=tmp_path / "x.pem"),
    ):
        pass


# ------------------------------------------------------------------------------------------------ start and stop


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with (
        receiving(tmp_path) as receiver,
        pytest.raises(StorageError, match=r"cannot be opened .*listen\.port"),
        receiving(tmp_path, port=receiver.address[1]),
    ):
        pass


def test_a_start_sweeps_what_a_dead_process_left_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    spool = Spool(tmp_path, NAMES, 1, 1)
    living = spool.receive()
    (tmp_path / "incoming" / "dead.part").write_bytes(b"x")
    Spool(tmp_path, NAMES, 1, 1)
    assert unfinished(tmp_path) == [living.path]
    living.discard()


def test_listen_counts_and_stops_when_it_is_told(tmp_path: Path, ct: Ct, sending: Sending) -> None:
    stop_now, addresses, counted = threading.Event(), [], []
    config = ListenConfig(**OPEN)

    def run() -> None:
        counted.append(listen(config, NAMES, tmp_path, stop_now, lambda *address: addresses.append(address)))

    thread = threading.Thread(target=run)
    thread.start()
    assert soon(lambda: bool(addresses))
    with sending(addresses[0]) as sender:
        assert sender.send_c_store(ct(1)).Status == 0
        stop_now.set()
        thread.join(timeout=10)
    assert counted[0].stored == 1
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(addresses[0], timeout=1)


def test_what_was_acknowledged_is_there_after_kill_9(tmp_path: Path, series: list[Dataset], sending: Sending) -> None:
    receiver, address = start(tmp_path)
    acknowledged = []
    with sending(address, timeout_s=60) as sender:
        for one in series:
            if len(acknowledged) == 60:
                threading.Timer(0.02, receiver.kill).start()
            if not sender.is_established:
                break
            answer = sender.send_c_store(one)
            if answer.get("Status") == 0:
                acknowledged.append(one)
    assert receiver.wait(timeout=10) == -9
    assert 60 <= len(acknowledged) < 200
    there = {str(one.SOPInstanceUID): one for one in map(dcmread, objects(tmp_path))}
    assert all(there[str(one.SOPInstanceUID)] == one for one in acknowledged)

    receiver, address = start(tmp_path)
    assert not unfinished(tmp_path)
    with sending(address) as sender:
        assert {sender.send_c_store(one).Status for one in series} == {0}
    assert stop(receiver) == 0
    assert len(objects(tmp_path)) == 200


START = """
import resource, sys
from pathlib import Path
from medtl.config import ListenConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.pacs.listen import listen, stopped_by_signals

limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
with stopped_by_signals() as stop:
    config = ListenConfig(port=0, callers=("SENDER",), min_free_mb=1)
    opened = lambda address, port: print(port, flush=True)
    listen(config, Pseudonymiser(bytes(range(32))), Path(sys.argv[1]), stop, opened)
"""


def start(folder: Path, file_limit: int = 0) -> tuple[subprocess.Popen[str], tuple[str, int]]:
    """Start a receiver in a process of its own."""
    command = [sys.executable, "-c", START, str(folder), str(file_limit)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        return process, ("127.0.0.1", int(said.readline()))


def stop(process: subprocess.Popen[str]) -> int:
    """Stop a receiver with SIGTERM; give its exit code."""
    process.terminate()
    return process.wait(timeout=20)


def peak_mb(pid: int) -> float:
    """Give the most memory that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def test_a_signal_stops_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by_signals() as stop_now:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_now.wait(5)
    assert signal.getsignal(signal.SIGTERM) == before
