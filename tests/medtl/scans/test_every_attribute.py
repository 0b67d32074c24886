"""Whatever one attribute says, its file is taken, or refused with a code that names a fault of the file."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag
from pydicom.uid import EnhancedMRImageStorage

from functional_groups import place_two_echoes
from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.convert import convert
from mosaics import UP, WHOLE, grid, mosaic
from spect import spect

NAMES = Pseudonymiser(b"0123456789abcdef")
CONFIG = ScansConfig(stable_seconds=0)
NUMBERS = (b"", b"nan", b"-1", b"0", b"1e30", b"1\\2", b"abc")
SHORTS = (b"", b"\0\0", b"\1\0", b"\xff\xff", bytes(4))
LONGS = (b"", bytes(8), b"\xff" * 8, b"\0\0\0\0\0\0\xf8\x7f", bytes(16))  # f8 7f: not a number
WORDS = (b"", b"A\\B\\C\\MOSAIC", b"VFRAME", b"1.2", b"YES")
OTHERS = dict.fromkeys(("DS", "IS"), NUMBERS) | dict.fromkeys(("US", "SS"), SHORTS)
OTHERS |= dict.fromkeys(("UL", "FL", "FD", "OB", "UN"), LONGS)
Path_ = tuple[int | BaseTag, ...]


def enhanced(dicom: Callable[..., Dataset]) -> Dataset:
    """Make a multi-frame object of three places and two echoes."""
    pixels = np.random.default_rng(3).integers(1, 4000, (6, 16, 20)).astype(np.uint16)
    made = dicom(pixels[0], SOPClassUID=EnhancedMRImageStorage, Modality="MR", FrameOfReferenceUID="1.2.3")
    made.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    made.NumberOfFrames, made.PixelData = 6, pixels.tobytes()
    place_two_echoes(made, 6)
    return made


def stack(dicom: Callable[..., Dataset]) -> Dataset:
    """Make one slice; the others of its series are it, moved."""
    pixels = np.random.default_rng(4).integers(1, 4000, (16, 20)).astype(np.uint16)
    made = dicom(pixels, Modality="MR", FrameOfReferenceUID="1.2.3", InstanceNumber=1, EchoTime=30, TriggerTime=1)
    made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.SliceThickness, made.SpacingBetweenSlices = [2, 2], 3, 3
    made.RescaleSlope, made.RescaleIntercept, made.WindowCenter, made.WindowWidth = 1, 0, 40, 400
    made.ImageType, made.NumberOfFrames, made.AcquisitionNumber = ["ORIGINAL", "PRIMARY", "M"], 1, 1
    return made


def tiles(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).integers(1, 4000, (count, 16, 20)).astype(np.uint16)


MADE: dict[str, Callable[[Callable[..., Dataset]], Dataset]] = {
    "stack": stack,
    "enhanced": enhanced,
    "mosaic": lambda dicom: mosaic(dicom, tiles(6), **WHOLE),
    "spect": lambda dicom: spect(dicom, tiles(5), -4.0),
    "grid": lambda dicom: grid(dicom, tiles(7), UP, ImagePositionPatient=UP[0]),
}


def elements(holder: Dataset, path: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """Name every element, those of the first two items of a sequence too."""
    for element in holder:
        if element.keyword != "PixelData":
            yield (*path, element.tag), element.VR
        if element.VR == "SQ":
            for number, one in enumerate(element.value[:2]):
                yield from elements(one, (*path, element.tag, number))


def changed(whole: Dataset, path: Path_, vr: str, raw: bytes | None) -> Dataset:
    """Copy an object, and give one element of it other bytes (``None``: take it away)."""
    made = copy.deepcopy(whole)
    holder: Any = made
    for step in path[:-1]:
        holder = holder[step].value if isinstance(step, BaseTag) else holder[step]
    tag = path[-1]
    assert isinstance(tag, BaseTag)
    if raw is None:
        del holder[tag]
    else:
        padded = raw + b" " * (len(raw) % 2)
        holder._dict[tag] = RawDataElement(tag, vr, len(padded), padded, 0, False, True)
    return made


def others(vr: str) -> tuple[bytes | None, ...]:
    return (None, b"") if vr == "SQ" else (None, *OTHERS.get(vr, WORDS))


@pytest.mark.parametrize("kind", MADE)
def test_every_attribute_may_be_absent_or_say_anything(
    tmp_path: Path, dicom: Callable[..., Dataset], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = MADE[kind](dicom)
    whole["PixelData"].VR = "OW"  # or pydicom looks for it in what is taken away
    seen: Counter[str] = Counter()
    for path, vr in list(elements(whole)):
        for raw in others(vr):
            folder = tmp_path / f"in{sum(seen.values())}"
            folder.mkdir()
            files = [changed(whole, path, vr, raw)]
            if kind == "stack":
                files += [moved(whole, number) for number in (1, 2)]
            for number, one in enumerate(files):
                buffer = io.BytesIO()
                one.save_as(buffer)
                (folder / f"{number}.dcm").write_bytes(buffer.getvalue())
            done = convert(folder, tmp_path / "out" / folder.name, CONFIG, NAMES)
            codes = {one.code for one in done.refused}
            assert "program_fault" not in codes, (path, raw, caplog.text)
            assert sum(one.files for one in (*done.volumes, *done.refused)) >= len(files)
            seen.update(codes or {"taken"})
    assert seen["taken"] > 50
    assert len(seen) > 5, seen


def moved(whole: Dataset, number: int) -> Dataset:
    made = copy.deepcopy(whole)
    made.ImagePositionPatient, made.InstanceNumber = [0, 0, 3 * number], number + 1
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = f"1.2.77.{number}"
    made.PixelData = np.roll(np.frombuffer(whole.PixelData, np.uint16), number).tobytes()
    return made
