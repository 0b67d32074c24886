"""Reconstructed slices of nuclear medicine in one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.uid import NuclearMedicineImageStorage

SLICE_VECTOR, TIME_SLOT_VECTOR, ENERGY_WINDOW_VECTOR = 0x00540080, 0x00540070, 0x00540010


def spect(dicom: Callable[..., Dataset], pixels: np.ndarray[Any, Any], between_mm: float, **attributes: Any) -> Dataset:
    """Make an object whose frames are slices upwards (``between_mm`` > 0) or downwards."""
    made = dicom(pixels[0], SOPClassUID=NuclearMedicineImageStorage, Modality="NM", FrameOfReferenceUID="1.2.3")
    made.file_meta.MediaStorageSOPClassUID = NuclearMedicineImageStorage
    made.ImageType, made.BurnedInAnnotation = ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"], "NO"
    made.NumberOfFrames, made.PixelData = len(pixels), pixels.tobytes()
    made.FrameIncrementPointer, made.SliceVector = SLICE_VECTOR, list(range(1, len(pixels) + 1))
    made.NumberOfSlices = len(pixels)
    made.PixelSpacing, made.SliceThickness, made.SpacingBetweenSlices = [2, 3], abs(between_mm), between_mm
    place, empty = Dataset(), Dataset()
    place.ImagePositionPatient, place.ImageOrientationPatient = [-30, -20, 100], [1, 0, 0, 0, 1, 0]
    empty.ImagePositionPatient = None
    made.DetectorInformationSequence = [place, empty]
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made
