"""Siemens mosaics: the slices of one volume as tiles of one image. Pure.

How many tiles there are and which way they go stands in a private element (CSA image header, version 2). The position
in the header is the one that an image of the mosaic's size would have around the same centre. What does not fit is left
to be refused (``mosaic``). Source: the layout as SPM and dcm2niix read it; checked against dcm2niix's volumes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from medtl.errors import ScanError
from medtl.records import AnyArray
from medtl.scans.geometry import Volume, as_rows
from medtl.scans.headers import Header, Tiles

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_CSA = (0x0029, 0x1010)
_MARK = b"SV10"
_MOST_FIELDS, _MOST_ITEMS = 1000, 1000
_ALONG = 0.999  # cosine between the tiles' direction and the normal


def with_tiles(header: Header, dataset: Dataset) -> Header:
    """Give a mosaic's header with its tiles, where they are told completely and fit; otherwise as it is."""
    element = dataset.get(_CSA)
    fields = read_csa(bytes(element.value)) if element is not None and isinstance(element.value, bytes) else {}
    try:
        count = int(fields["NumberOfImagesInMosaic"][0])
        x, y, z = (float(text) for text in fields["SliceNormalVector"][:3])
        first = int(fields["ProtocolSliceNumber"][0])
    except (KeyError, IndexError, ValueError):
        return header
    plane = header.planes[0] if len(header.planes) == 1 else None
    across = math.ceil(math.sqrt(count)) if count > 0 else 0
    if plane is None or plane.orientation is None or not plane.between_mm or count < 2 or first != 0:
        return header
    if header.samples != 1 or header.rows % across or header.columns % across or plane.between_mm <= 0:
        return header
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    if not abs(float(np.cross(row, column) @ (x, y, z))) > _ALONG:
        return header
    return replace(header, tiles=Tiles(count, across, (x, y, z)))


def read_csa(data: bytes) -> dict[str, list[str]]:
    """Read the fields of a CSA header, version 2; nothing where it is another version or damaged."""
    found: dict[str, list[str]] = {}
    if data[:4] != _MARK or len(data) < 16:
        return found
    at = 16
    try:
        for _ in range(min(struct.unpack_from("<I", data, 8)[0], _MOST_FIELDS)):
            name, items = struct.unpack_from("<64s12xi4x", data, at)
            at += 84
            values = []
            for _ in range(min(items, _MOST_ITEMS)):
                length = struct.unpack_from("<4i", data, at)[1]
                if not 0 <= length <= len(data) - at - 16:
                    return {}
                values.append(data[at + 16 : at + 16 + length].split(b"\0")[0].decode("ascii", "replace").strip())
                at += 16 + (length + 3) // 4 * 4
            found[name.split(b"\0")[0].decode("ascii", "replace")] = [value for value in values if value]
    except struct.error:
        return {}
    return found


def mosaic_volume(header: Header, index: int) -> Volume:
    """Say where the tiles of a mosaic lie.

    Args:
        header: with its tiles.
        index: of the header, for ``members``, which has this one frame.
    """
    tiles, plane = header.tiles, header.planes[0]
    assert tiles is not None and plane.orientation and plane.position_mm and plane.spacing_mm and plane.between_mm
    rows, columns = header.rows // tiles.across, header.columns // tiles.across
    between_rows, between_columns = plane.spacing_mm
    right, down = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1] = right * between_columns, down * between_rows
    matrix[:3, 2] = np.array(tiles.normal) * plane.between_mm
    aside = right * between_columns * (header.columns - columns) / 2 + down * between_rows * (header.rows - rows) / 2
    matrix[:3, 3] = np.array(plane.position_mm) + aside
    matrix[:2] *= -1.0  # LPS -> RAS
    spacing = (between_columns, between_rows, plane.between_mm)
    return Volume(((index, 0),), (tiles.count, rows, columns), as_rows(matrix), spacing, plane.splits)


def cut(image: AnyArray, tiles: Tiles) -> AnyArray:
    """Cut a mosaic into its slices.

    Args:
        image: (rows, columns) of the whole mosaic.

    Returns:
        A new array, (slices, rows, columns).

    Raises:
        ScanError: ``mosaic`` where the last slice is empty or a tile behind it is not: their number is not as is said.
    """
    rows, columns = image.shape[0] // tiles.across, image.shape[1] // tiles.across
    grid = image.reshape(tiles.across, rows, tiles.across, columns).swapaxes(1, 2)
    pieces = np.ascontiguousarray(grid).reshape(-1, rows, columns)
    if pieces[tiles.count :].any():
        raise ScanError("mosaic", "a tile behind the last slice is not empty")
    if not pieces[tiles.count - 1].any():
        raise ScanError("mosaic", "the last slice is empty")
    return pieces[: tiles.count]
