"""Slices tiled into one image: mosaics of Siemens, grids of United Imaging."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.uid import MRImageStorage

Array = np.ndarray[Any, Any]
WHOLE = {"NumberOfImagesInMosaic": ["6"], "SliceNormalVector": ["0.0", "0.0", "1.0"], "ProtocolSliceNumber": ["0"]}
UP = [[-60.0, -48.0, 10.0 + 4 * n] for n in range(7)]  # positions of seven slices


def csa(**fields: list[str]) -> bytes:
    """Write a CSA header, version 2."""
    out = b"SV10\4\3\2\1" + struct.pack("<II", len(fields), 77)
    for name, values in fields.items():
        out += struct.pack("<64si4siii", name.encode(), len(values), b"FD\0\0", 4, len(values), 77)
        for value in values:
            text = value.encode() + b"\0"
            out += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + bytes(-len(text) % 4)
    return out


def tiled(dicom: Callable[..., Dataset], slices: Array, across: int, down: int) -> Dataset:
    """Make an MR image of ``across`` x ``down`` tiles; those behind the last slice are zero."""
    height, width = slices.shape[1:]
    image = np.zeros((down * height, across * width), np.uint16)
    for number, one in enumerate(slices):
        top, left = number // across * height, number % across * width
        image[top : top + height, left : left + width] = one
    header = dicom(image, SOPClassUID=MRImageStorage, Modality="MR")
    header.file_meta.MediaStorageSOPClassUID = MRImageStorage
    header.ImageOrientationPatient, header.FrameOfReferenceUID = [1, 0, 0, 0, 1, 0], "1.2.3"
    header.SliceThickness, header.SpacingBetweenSlices, header.InstanceNumber = 3, 4, 1
    return header


def mosaic(dicom: Callable[..., Dataset], slices: Array, **fields: list[str]) -> Dataset:
    """Make a mosaic of Siemens; ``fields`` are those of its CSA header."""
    across = math.ceil(math.sqrt(len(slices)))
    header = tiled(dicom, slices, across, across)
    header.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    header.ImagePositionPatient, header.PixelSpacing = [-60, -48, 10], [2, 2]
    if fields:
        header.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", csa(**fields))
    return header


def grid(dicom: Callable[..., Dataset], slices: Array, positions: list[list[float]], **attributes: Any) -> Dataset:
    """Make a grid of United Imaging, after the vendor's description (rordenlab/dcm2niix issue 225)."""
    across = math.ceil(math.sqrt(len(slices)))
    header = tiled(dicom, slices, across, math.ceil(len(slices) / across))
    header.ImageType, header.Manufacturer = ["ORIGINAL", "PRIMARY", "M", "VFRAME"], "UIH"
    header.SeriesNumber, header.PixelSpacing = 5, [2, 3]
    block = header.private_block(0x0065, "Image Private Header", create=True)
    block.add_new(0x50, "DS", str(len(slices)))
    items = []
    for position in positions:
        item = Dataset()
        item.ImagePositionPatient = position
        items.append(item)
    block.add_new(0x51, "SQ", items)
    for keyword, value in attributes.items():
        setattr(header, keyword, value)
    return header
