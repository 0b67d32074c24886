"""Real DICOM files, one kind each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, CTImageStorage, ExplicitVRLittleEndian, generate_uid


def make_dicom(pixels: np.ndarray[Any, Any], **attributes: Any) -> Dataset:
    """Make a complete grey or colour image object."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    header.SOPClassUID = ComputedRadiographyImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    header.StudyInstanceUID, header.SeriesInstanceUID = generate_uid(), generate_uid()
    header.PatientID, header.PatientName, header.PatientAge, header.PatientSex = "ID-1", "DOE^JANE", "045Y", "F"
    header.Modality, header.Manufacturer, header.ManufacturerModelName = "CR", "Maker", "Model 1"
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    header.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        header.PlanarConfiguration = 0
    header.BitsAllocated = pixels.dtype.itemsize * 8
    header.BitsStored, header.HighBit = header.BitsAllocated, header.BitsAllocated - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes()
    for keyword, value in attributes.items():
        setattr(header, keyword, value)
    return header


def make_series(folder: Path, slices: int = 12, **attributes: Any) -> list[Path]:
    """Write a complete CT series whose files are named in another order than the slices lie."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), "Modality": "CT"}
    shared |= {"FrameOfReferenceUID": generate_uid(), "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}
    paths = []
    for index in range(slices):
        pixels = rng.integers(0, 4000, (64, 72)).astype(np.int16)
        own = {
            "SOPClassUID": CTImageStorage,
            "ImagePositionPatient": [-10.0, 20.0, 5.0 + 2.5 * index],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.5, 0.75],
            "SliceThickness": 2.5,
            "InstanceNumber": index + 1,
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
        }
        header = make_dicom(pixels, **(shared | own | attributes))
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
        paths.append(folder / f"{(index * 7) % slices:03d}.dcm")
        header.save_as(paths[-1], enforce_file_format=True)
    return paths


@pytest.fixture(scope="session")
def dicom() -> Callable[..., Dataset]:
    return make_dicom


@pytest.fixture(scope="session")
def series() -> Callable[..., list[Path]]:
    return make_series


@pytest.fixture
def ramp() -> np.ndarray[Any, Any]:
    return np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"
