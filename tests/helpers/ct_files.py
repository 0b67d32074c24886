"""CT series that other programs take as well: highdicom makes segmentations and structure sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


def ct_series(
    volume: np.ndarray[Any, Any],
    spacing: tuple[float, float, float] = (1.0, 1.0, 3.0),
    corner: Sequence[float] = (-10.0, -10.0, 0.0),
    axes: Any = AXIAL,
    **attributes: Any,
) -> list[Dataset]:
    """Make the slices of one series.

    Args:
        volume: (slices, rows, columns), whole numbers that 16 bits hold.
        spacing: of rows, columns and slices, in mm.
        corner: where the first voxel's centre lies; mm in DICOM's axes.
        axes: directions along a row and down a column.
        attributes: what every slice says besides, or instead.
    """
    shared = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    shared |= {"FrameOfReferenceUID": generate_uid(), **attributes}
    signed, slices = volume.min() < 0, []
    for number, pixels in enumerate(volume.astype(np.int16 if signed else np.uint16)):
        ct = Dataset()
        ct.file_meta = FileMetaDataset()
        ct.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ct.SOPClassUID = ct.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ct.SOPInstanceUID = ct.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ct.PatientID, ct.PatientName, ct.PatientBirthDate, ct.PatientSex = "1", "A^B", "", "O"
        ct.StudyDate = ct.StudyTime = ct.StudyID = ct.AccessionNumber = ct.ReferringPhysicianName = ""
        ct.Modality, ct.SeriesNumber, ct.InstanceNumber = "CT", 1, number + 1
        ct.ImageType, ct.PositionReferenceIndicator = ["ORIGINAL", "PRIMARY", "AXIAL"], ""
        ct.Rows, ct.Columns = pixels.shape
        ct.SamplesPerPixel, ct.PhotometricInterpretation = 1, "MONOCHROME2"
        ct.BitsAllocated, ct.BitsStored, ct.HighBit, ct.PixelRepresentation = 16, 16, 15, int(signed)
        ct.RescaleSlope, ct.RescaleIntercept = 1, 0
        ct.PixelSpacing, ct.SliceThickness = list(spacing[:2]), spacing[2]
        ct.ImageOrientationPatient = [*axes[0], *axes[1]]
        ct.ImagePositionPatient = (np.array(corner) + number * spacing[2] * np.cross(*axes)).tolist()
        ct.PixelData = pixels.tobytes()
        for keyword, value in shared.items():
            setattr(ct, keyword, value)
        slices.append(ct)
    return slices


def write_series(folder: Path, slices: Sequence[Dataset], name: str = "") -> list[Path]:
    """Write each slice as a file of a new folder."""
    folder.mkdir(parents=True)
    paths = [folder / f"{name}{number}.dcm" for number in range(len(slices))]
    for path, one in zip(paths, slices, strict=True):
        one.save_as(path, enforce_file_format=True)
    return paths
