"""Where the program fails on one series, that series is refused, and the rest of the night goes on."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import ImplicitVRLittleEndian, SegmentationStorage

from medtl.artifacts import Store
from medtl.config import ScansConfig
from medtl.errors import ScanError, StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans import handover, intake, io
from medtl.scans import series as judging
from medtl.scans.checks import CODES
from medtl.scans.convert import convert
from medtl.scans.faults import faults_refused
from medtl.scans.headers import partial_header
from medtl.scans.sources import survey
from spect import spect

NAMES = Pseudonymiser(b"0123456789abcdef")
CONFIG = ScansConfig(stable_seconds=0)
NAME = "Doe^Jane"
SERIES = ("1.2.1", "1.2.987654321")


@pytest.mark.parametrize(
    "error", [ValueError, KeyError, AssertionError, ZeroDivisionError, RecursionError, RuntimeError, StopIteration]
)
def test_an_error_of_the_program_refuses_what_it_was_at_work_on(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ScanError) as refusal, faults_refused():
        raise error(NAME)
    assert refusal.value.code == "program_fault"
    assert error.__name__ in refusal.value.reason
    assert NAME not in refusal.value.reason + caplog.text


@pytest.mark.parametrize(
    "error",
    [
        OSError("no room"),
        MemoryError(),
        StorageError("no room"),
        ImportError("no library"),
        BrokenProcessPool(),
        RuntimeError("can't start new thread"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_the_machine_lacks_is_no_fault_of_a_file(error: BaseException) -> None:
    with pytest.raises(type(error)), faults_refused():
        raise error


def test_nothing_of_what_was_at_hand_is_kept() -> None:
    """A refusal lives as long as the ingest; the arrays of the frames that failed must not."""
    held: list[weakref.ref[Any]] = []

    def function() -> None:
        pixels = np.zeros(10)
        held.append(weakref.ref(pixels))
        raise ValueError(NAME)

    with pytest.raises(ScanError) as refusal, faults_refused():
        function()
    gc.collect()
    assert held[0]() is None
    assert refusal.value.__suppress_context__


def test_a_refusal_stays_what_it_is() -> None:
    with pytest.raises(ScanError) as refusal, faults_refused():
        raise ScanError("truncated", "cut off")
    assert refusal.value.code == "truncated"


def test_no_policy_takes_what_the_program_failed_on() -> None:
    assert set(CODES["program_fault"].allowed) == {"reject", "quarantine"}


@pytest.fixture
def folder(tmp_path: Path, dicom: Callable[..., Dataset]) -> Path:
    """Two pictures; the program will fail on the second."""
    here = tmp_path / "in"
    here.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 4000, (8, 8)).astype(np.uint16)
        picture = dicom(pixels, SeriesInstanceUID=SERIES[number])
        picture.BurnedInAnnotation = "NO"
        picture.save_as(here / f"{number}.dcm", enforce_file_format=True)
    return here


def failing(real: Callable[..., Any]) -> Callable[..., Any]:
    """Fail where anything in the arguments belongs to the second picture's series."""

    def function(*args: Any, **options: Any) -> Any:
        if SERIES[1] in repr(args):
            raise ValueError(f"{NAME} is not a number")
        return real(*args, **options)

    return function


@pytest.mark.parametrize(
    ("module", "name"),
    [(io, "read_header"), (judging, "check_header"), (intake, "describe")],
    ids=["while looking", "while judging", "while making the record"],
)
def test_an_ingest_goes_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: Any,
    name: str,
) -> None:
    monkeypatch.setattr(module, name, failing(getattr(module, name)))
    out = tmp_path / "out"
    out.mkdir()
    intake.ingest(survey(folder, CONFIG), CONFIG, NAMES, out, Store(tmp_path / "w"))
    assert len(intake.read_scans(out)) == 1
    (refused,) = intake.read_exclusions(out)
    assert (refused.code, refused.action) == ("program_fault", "quarantine")
    assert refused.reason.startswith("the program failed on it: ValueError in medtl/scans/")
    assert caplog.text.count("ValueError") == 1
    assert NAME not in refused.reason + caplog.text


@pytest.mark.parametrize("lost", [0, 5])
def test_a_series_lacks_the_slice_that_the_program_failed_on(
    tmp_path: Path, series: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """At an end of the stack nothing else would show that it is missing."""
    series(tmp_path / "in", 6)
    sick = next(f for f in (tmp_path / "in").iterdir() if dcmread(f).InstanceNumber == lost + 1).read_bytes()
    real = io.read_header

    def fails_on_one(start: bytes, *rest: Any) -> Any:
        if start == sick[: len(start)]:
            raise ValueError(NAME)
        return real(start, *rest)

    monkeypatch.setattr(io, "read_header", fails_on_one)
    done = convert(tmp_path / "in", tmp_path / "out", CONFIG, NAMES)
    assert (done.volumes, sorted(one.code for one in done.refused)) == ((), ["incomplete", "program_fault"])


@pytest.mark.parametrize("implicit", [False, True])
def test_the_series_of_a_file_is_found_by_the_look_of_its_bytes(
    tmp_path: Path, dicom: Callable[..., Dataset], implicit: bool
) -> None:
    picture = dicom(np.ones((8, 8), np.uint16), SeriesInstanceUID=SERIES[1], StudyInstanceUID="1.2.55")
    other = Dataset()
    other.SeriesInstanceUID = SERIES[0]  # that it refers to: it comes first in the file
    picture.ReferencedSeriesSequence = [other]
    if implicit:
        picture.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    picture.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    header = partial_header((tmp_path / "x.dcm").read_bytes(), 0)
    assert header is not None and header.series == SERIES[1]
    assert partial_header(b"no DICOM", 0) is None


def test_what_the_program_failed_on_is_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, the same settings and the same program may fail once: a library was another one."""
    files = survey(folder, CONFIG)
    with monkeypatch.context() as once:
        once.setattr(judging, "check_header", failing(judging.check_header))
        taken = ingested(files, tmp_path / "first", tmp_path / "w")
    assert taken == (1, ["program_fault"])
    assert ingested(files, tmp_path / "second", tmp_path / "w") == (2, [])


def test_places_that_cannot_be_found_leave_the_series_known(
    tmp_path: Path, dicom: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    header = spect(dicom, np.ones((5, 8, 8), np.uint16), 4.0, SeriesInstanceUID=SERIES[0])
    header.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    monkeypatch.setattr(io.nuclear, "with_places", lambda *_: 1 // 0)
    (file,) = survey(tmp_path, CONFIG)
    member = io.look(file)
    assert member.damage is not None and member.damage.code == "program_fault"
    assert member.header is not None and member.header.series == SERIES[0]


def test_a_volume_that_the_disk_does_not_give_is_unreadable_and_the_others_are_converted(
    tmp_path: Path, series: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path / "in" / "a", 4)
    series(tmp_path / "in" / "b", 4, SeriesInstanceUID=SERIES[1])
    real = io.Reader._frames

    def bad_sector(self: io.Reader, files: Any, headers: Any, *rest: Any) -> Any:
        if headers[0].series == SERIES[1]:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, files, headers, *rest)

    monkeypatch.setattr(io.Reader, "_frames", bad_sector)
    done = convert(tmp_path / "in", tmp_path / "out", CONFIG, NAMES)
    assert (len(done.volumes), [one.code for one in done.refused]) == (1, ["unreadable"])


def ingested(files: Any, out: Path, workspace: Path) -> tuple[int, list[str]]:
    out.mkdir()
    intake.ingest(files, CONFIG, NAMES, out, Store(workspace))
    return len(intake.read_scans(out)), [one.code for one in intake.read_exclusions(out)]


def test_an_ingest_goes_on_after_the_program_failed_on_a_mask(
    folder: Path, tmp_path: Path, dicom: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = dicom(np.ones((8, 8), np.uint8), SOPClassUID=SegmentationStorage, Modality="SEG")
    mask.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    mask.save_as(folder / "mask.dcm", enforce_file_format=True)
    monkeypatch.setattr(io.Reader, "mask_source", lambda *_: 1 // 0)
    out = tmp_path / "out"
    out.mkdir()
    intake.ingest(survey(folder, CONFIG), CONFIG, NAMES, out, Store(tmp_path / "w"))
    assert len(intake.read_scans(out)) == 2
    assert [one.code for one in intake.read_exclusions(out)] == ["program_fault"]


def test_a_conversion_goes_on(
    tmp_path: Path, series: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path / "in" / "a", 4)
    series(tmp_path / "in" / "b", 4, SeriesInstanceUID=SERIES[1])
    monkeypatch.setattr(io.Reader, "volume", failing(io.Reader.volume))
    done = convert(tmp_path / "in", tmp_path / "out", CONFIG, NAMES)
    assert [one.files for one in done.volumes] == [4]
    assert [(one.code, one.files) for one in done.refused] == [("program_fault", 4)]


def test_a_handover_goes_on_and_gives_nothing_of_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter((False, True))
    real = io.deidentified

    def second_fails(*args: Any) -> Any:
        if next(calls):
            raise IndexError(NAME)
        return real(*args)

    monkeypatch.setattr(io, "deidentified", second_fails)
    done = handover.hand_over(folder, tmp_path / "out", CONFIG, NAMES)
    assert [one.code for one in done.refused] == ["program_fault"]
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 1
