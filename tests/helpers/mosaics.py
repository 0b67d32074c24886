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


def with_fields(header: bytes, **fields: list[str]) -> bytes:
    """Give a CSA header, version 2, with other values of some fields, which must fit where the old ones are."""
    data, at = bytearray(header), 16
    for _ in range(struct.unpack_from("<I", header, 8)[0]):
        name, items = struct.unpack_from("<64s12xi4x", data, at)
        at += 84
        values = fields.get(name.split(b"\0")[0].decode(), [])
        for number in range(items):
            length = struct.unpack_from("<4i", data, at)[1]
            at += 16
            if number < len(values):
                assert len(values[number]) <= length
                data[at : at + length] = values[number].encode().ljust(length, b"\0")
            at += (length + 3) // 4 * 4
    return bytes(data)


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


def mosaic(dicom: Callable[..., Dataset], slices: Array, protocol: str | None = None, **fields: list[str]) -> Dataset:
    """Make a mosaic of Siemens; ``fields`` are those of its CSA image header, ``protocol`` is in that of the series."""
    across = math.ceil(math.sqrt(len(slices)))
    header = tiled(dicom, slices, across, across)
    header.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    header.ImagePositionPatient, header.PixelSpacing = [-60, -48, 10], [2, 2]
    if fields:
        block = header.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", csa(**fields))
        if protocol is not None:
            block.add_new(0x20, "OB", csa(MrPhoenixProtocol=[protocol]))
    return header


def protocol_of(middles: list[list[float]]) -> str:
    """Write the part of a protocol that says where the slices are; a coordinate that is zero is left out."""
    lines = [f"sSliceArray.lSize\t = \t{len(middles)}"]
    for number, middle in enumerate(middles):
        for axis, value in zip(("Sag", "Cor", "Tra"), middle, strict=True):
            if value:
                lines.append(f"sSliceArray.asSlice[{number}].sPosition.d{axis}\t = \t{value}")
        lines.append(f"sSliceArray.asSlice[{number}].sNormal.dTra\t = \t1.0")
    return "<XProtocol>\n### ASCCONV BEGIN object=x ###\n" + "\n".join(lines) + "\n### ASCCONV END ###\n"


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
