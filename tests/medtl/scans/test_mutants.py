"""Two thousand damaged files in one folder: none stops the batch, none is lost, none gets out."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from medtl.artifacts import Store
from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.checks import CODES
from medtl.scans.intake import ingest, read_exclusions, read_scans
from medtl.scans.sources import survey

NAMES = Pseudonymiser(b"0123456789abcdef")
COUNT = 2000
SYNTAXES = (
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless,
    JPEGLSLossless,
)  # fmt: skip


def originals(dicom: Callable[..., Any]) -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for syntax in SYNTAXES:
        header = dicom(rng.integers(0, 4000, (40, 48)).astype(np.uint16), BitsStored=12, HighBit=11)
        if syntax.is_compressed and not syntax.is_deflated:
            header.compress(syntax)
        else:
            header.file_meta.TransferSyntaxUID = syntax
        buffer = io.BytesIO()
        header.save_as(buffer, enforce_file_format=True)
        found.append(buffer.getvalue())
    values = rng.integers(-1000, 1000, (6, 9, 7)).astype(np.int16)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        found += [kind(values, np.diag([2, 2, 3, 1])).to_bytes()]
    return [*found, gzip.compress(found[-2])]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, overwrite, cut, repeat or splice; mostly in the first kilobytes, where the structure is."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(0, min(len(out), 3000) if rng.random() < 0.7 else len(out)))
        match int(rng.integers(0, 6)):
            case 0:
                out[place] ^= 1 << int(rng.integers(0, 8))
            case 1:
                out[place : place + 4] = bytes(rng.choice([0x00, 0xFF, 0x7F], 4).astype(np.uint8))
            case 2:
                out[place : place + 4] = int(rng.integers(0, 2**32)).to_bytes(4, "little")
            case 3:
                del out[place : place + int(rng.integers(1, 200))]
            case 4:
                out[place:place] = out[: int(rng.integers(1, 400))]
            case _:
                del out[max(place, 16) :]
    return bytes(out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what pydicom and Pillow say of broken files
def test_two_thousand_damaged_files_cost_themselves_alone(tmp_path: Path, dicom: Callable[..., Any]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    rng = np.random.default_rng(20261121)
    sound, broken = originals(dicom), originals(dicom)  # of other series: a mutant may foul its own
    for number, data in enumerate(sound):
        (folder / f"sound{number}").write_bytes(data)
    for number in range(COUNT):
        (folder / f"{number:04d}").write_bytes(mutate(broken[number % len(broken)], rng))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = ScansConfig(stable_seconds=0)
    files = survey(folder, config)
    ingest(files, config, NAMES, out, Store(tmp_path / "workspace"))
    scans, exclusions = read_scans(out), read_exclusions(out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {exclusion.code for exclusion in exclusions} <= set(CODES)
    assert len({exclusion.code for exclusion in exclusions}) > 6
    # Mutants of one object may still name its series: they are judged together, and each is counted once.
    assert sum(scan.files for scan in scans) + sum(exclusion.files for exclusion in exclusions) == len(files)
    assert len(scans) > len(sound)
    kept = {scan.scan_id for scan in scans}
    by_bytes = {file.relative: (file.sha256 or "")[:32] for file in files}
    assert all(by_bytes[f"sound{number}"] in kept for number in range(len(sound)))
