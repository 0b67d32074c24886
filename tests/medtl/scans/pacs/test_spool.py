"""What an archive sends is a DICOM file of the object that was asked for, or it is refused."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset

from medtl.errors import ScanError
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.pacs.spool import Spool, digest_of_file

NAMES = Pseudonymiser(b"0123456789abcdef")


def written(dicom: Callable[..., Dataset]) -> bytes:
    made = dicom(np.ones((4, 4), np.uint16), SOPInstanceUID="1.2.3")
    made.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def answered(spool: Spool, data: bytes, sop_uid: str = "1.2.3") -> str:
    part = spool.receive()
    part.write(data)
    try:
        return digest_of_file(part, sop_uid)
    finally:
        part.discard()


def test_a_hostile_answer_is_refused_whatever_pydicom_raises(tmp_path: Path, dicom: Callable[..., Dataset]) -> None:
    spool, whole = Spool(tmp_path, NAMES, 100, 1), written(dicom)
    known, refused = answered(spool, whole), 0
    for seed in range(600):
        chance, data = random.Random(seed), bytearray(whole)
        for _ in range(3):
            data[chance.randrange(128, 360)] = chance.randrange(256)
        try:
            assert answered(spool, bytes(data)) != known or bytes(data[360:]) == whole[360:]
        except ScanError as error:
            refused += error.code in ("not_dicom", "wrong_object")
    assert 200 < refused < 600


def test_another_object_than_was_asked_for_is_refused(tmp_path: Path, dicom: Callable[..., Dataset]) -> None:
    with pytest.raises(ScanError) as refusal:
        answered(Spool(tmp_path, NAMES, 100, 1), written(dicom), "1.2.4")
    assert refusal.value.code == "wrong_object"
