"""Mosaics: the slices of one volume as tiles of one image. Pure.

Siemens says how many tiles there are and which way they go in a private element (CSA image header, version 2); the
position in the header is the one that an image of the mosaic's size would have around the same centre. Where the
first tile is the protocol's last slice (images numbered from head to foot), the positions that the protocol (CSA series
header) gives must be those of the tiles from the last to the first. United Imaging gives the number and, in a private
sequence, the position of every slice (its "grid"). What does not fit is left to be refused (``mosaic``). Source: the
layouts as SPM and dcm2niix read them; Siemens checked against dcm2niix's volumes of real scans, United Imaging against
its volumes of objects made after the vendor's description.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from medtl.errors import ScanError
from medtl.records import AnyArray, FloatArray
from medtl.scans.faults import ends_the_run
from medtl.scans.geometry import GAP_TOLERANCE, Placed, Volume, as_rows, displacement_mm, fault, measure, unevenness
from medtl.scans.headers import UIH_CREATOR, Header, Plane, Tiles, Vector

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_CSA_GROUP, _CSA_CREATOR, _CSA_IMAGE, _CSA_SERIES = 0x0029, "SIEMENS CSA HEADER", 0x10, 0x20
_PROTOCOL = re.compile(r"### ASCCONV BEGIN(.*?)### ASCCONV END", re.DOTALL)
_CENTRE = re.compile(r"^sSliceArray\.asSlice\[(\d{1,4})\]\.sPosition\.d(Sag|Cor|Tra)\s*=\s*(\S{1,32})", re.MULTILINE)
_COUNT = re.compile(r"^sSliceArray\.lSize\s*=\s*(\d{1,4})\s*$", re.MULTILINE)
_UIH_GROUP, _UIH_SLICES, _UIH_SEQUENCE = 0x0065, 0x50, 0x51
_MARK = b"SV10"
_MOST_FIELDS, _MOST_ITEMS = 1000, 1000
_ALONG = 0.999  # cosine between the tiles' direction and the normal
_ASIDE_MM = 0.1  # that a slice may lie beside the line through the first and the last one
_PLANNED_MM = 0.1  # that a slice may lie from where the protocol has it


def with_tiles(header: Header, dataset: Dataset) -> Header:
    """Give a mosaic's header with its tiles, where they are told completely and fit; otherwise as it is."""
    plane = header.planes[0] if len(header.planes) == 1 else None
    if plane is None or header.samples != 1:
        return header
    fields = _csa(dataset, _CSA_IMAGE)
    tiles = _united_imaging(header, plane, dataset) if fields is None else _siemens(header, plane, dataset, fields)
    if tiles is None or header.rows % tiles.down or header.columns % tiles.across:
        return header
    return replace(header, tiles=tiles)


def _siemens(header: Header, plane: Plane, dataset: Dataset, fields: dict[str, list[str]]) -> Tiles | None:
    try:
        count = int(fields["NumberOfImagesInMosaic"][0])
        x, y, z = (float(text) for text in fields["SliceNormalVector"][:3])
        first = int(fields["ProtocolSliceNumber"][0])
    except (KeyError, IndexError, ValueError):
        return None
    if fault(plane) or plane.orientation is None or not plane.between_mm or count < 2 or first not in (0, count - 1):
        return None
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    if not (abs(float(np.cross(row, column) @ (x, y, z))) > _ALONG and plane.between_mm > 0):
        return None
    across = math.ceil(math.sqrt(count))
    tiles = Tiles(count, across, across, (x, y, z), plane.between_mm)
    return tiles if first == 0 or _are_in_reverse(_centres(header, plane, tiles), dataset) else None


def _centres(header: Header, plane: Plane, tiles: Tiles) -> FloatArray:
    """Give the middles of the tiles as a protocol has them: (count, 3), LPS, mm, at pixel ``rows / 2, columns / 2``."""
    assert plane.orientation and plane.spacing_mm and plane.position_mm
    right, down = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    between_rows, between_columns = plane.spacing_mm
    middle = right * between_columns * header.columns / 2 + down * between_rows * header.rows / 2
    steps = np.arange(tiles.count)[:, None] * np.array(tiles.normal) * tiles.between_mm
    centres: FloatArray = np.array(plane.position_mm) + middle + steps
    return centres


def _are_in_reverse(centres: FloatArray, dataset: Dataset) -> bool:
    """Tell whether tiles lie where the protocol has its slices, from the last one to the first."""
    fields = _csa(dataset, _CSA_SERIES) or {}
    planned = _planned("".join(fields.get("MrPhoenixProtocol") or fields.get("MrProtocol") or []))
    return planned.shape == centres.shape and bool(np.max(np.abs(planned[::-1] - centres)) <= _PLANNED_MM)


def _planned(text: str) -> FloatArray:
    """Read the middles of the slices from a protocol, (count, 3), LPS in mm; a coordinate that is zero is left out."""
    found = _PROTOCOL.search(text)
    size = found and _COUNT.search(found[1])
    if found is None or not size:
        return np.empty((0, 3))
    centres = np.zeros((int(size[1]), 3))
    try:
        for number, axis, value in _CENTRE.findall(found[1]):
            if int(number) < len(centres):
                centres[int(number), ("Sag", "Cor", "Tra").index(axis)] = float(value)
    except ValueError:
        return np.empty((0, 3))
    return centres


def _csa(dataset: Dataset, element: int) -> dict[str, list[str]] | None:
    """Read a CSA header, from where its creator made room for it, or the usual place; ``None`` where there is none."""
    try:
        value = dataset.private_block(_CSA_GROUP, _CSA_CREATOR)[element].value
    except KeyError:  # de-identification may take the creator and leave the rest: its first bytes say what it is
        usual = (_CSA_GROUP, 0x1000 + element)
        if usual not in dataset:
            return None
        value = dataset[usual].value
    return read_csa(value) if isinstance(value, bytes) else {}


def _united_imaging(header: Header, plane: Plane, dataset: Dataset) -> Tiles | None:
    """Read a grid: as many positions as there are said to be slices, in one even line along the normal.

    A position in the header itself, where there is one, must be that of one of the slices.
    """
    positions = _slice_positions(dataset)
    count = len(positions)
    planes = tuple(replace(plane, position_mm=position) for position in positions)
    if count < 2 or any(map(fault, planes)):
        return None
    placed = measure([replace(header, frames=count, planes=planes)], [(0, i) for i in range(count)])
    if not _is_even_line(placed):
        return None
    step = np.subtract(positions[-1], positions[0]) / (count - 1)
    between = float(np.linalg.norm(step))
    if abs(float(step @ placed.axes[2])) <= _ALONG * between:
        return None
    if plane.position_mm and np.min(np.linalg.norm(placed.positions_mm - plane.position_mm, axis=1)) > _ASIDE_MM:
        return None
    across = math.ceil(math.sqrt(count))
    x, y, z = (float(part) for part in step / between)
    return Tiles(count, across, math.ceil(count / across), (x, y, z), between, positions[0])


def _is_even_line(placed: Placed) -> bool:
    """Tell whether slices follow each other upwards or downwards, evenly, on one straight line."""
    places, count = placed.places, len(placed.places)
    in_order = np.array_equal(places, np.arange(count)) or np.array_equal(places, np.arange(count)[::-1])
    return in_order and unevenness(placed) <= GAP_TOLERANCE and displacement_mm(placed) <= _ASIDE_MM


def _slice_positions(dataset: Dataset) -> tuple[Vector, ...]:
    """Give the positions that a grid has for its slices; none where they are not as many as it says, or unreadable."""
    try:
        block = dataset.private_block(_UIH_GROUP, UIH_CREATOR)
        count = int(block[_UIH_SLICES].value)
        items = _items(dataset, block[_UIH_SEQUENCE].value)
        positions = [[float(number) for number in item.ImagePositionPatient] for item in items]
        found = tuple((x, y, z) for x, y, z in positions)
    except Exception as error:  # a value is decoded where it is first asked for: a strange one may raise anything
        if ends_the_run(error):
            raise
        return ()
    return found if len(found) == count else ()


def _items(dataset: Dataset, value: object) -> list[Dataset]:
    """Give the items of a sequence; in implicit VR a private one is not known to be one and comes as bytes."""
    from pydicom.filereader import read_sequence

    if isinstance(value, bytes):
        return list(read_sequence(BytesIO(value), True, True, len(value), dataset.original_character_set or "iso8859"))
    return list(value)  # type: ignore[call-overload, no-any-return]


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
    assert tiles is not None and plane.orientation and plane.spacing_mm
    rows, columns = header.rows // tiles.down, header.columns // tiles.across
    between_rows, between_columns = plane.spacing_mm
    right, down = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1] = right * between_columns, down * between_rows
    matrix[:3, 2] = np.array(tiles.normal) * tiles.between_mm
    if tiles.first_mm is not None:
        matrix[:3, 3] = tiles.first_mm
    else:
        aside = right * between_columns * (header.columns - columns) / 2
        matrix[:3, 3] = np.array(plane.position_mm) + aside + down * between_rows * (header.rows - rows) / 2
    matrix[:2] *= -1.0  # LPS -> RAS
    spacing = (between_columns, between_rows, tiles.between_mm)
    return Volume(((index, 0),), (tiles.count, rows, columns), as_rows(matrix), spacing, plane.splits)


def cut(image: AnyArray, tiles: Tiles) -> AnyArray:
    """Cut a mosaic into its slices.

    Args:
        image: (rows, columns) of the whole mosaic.

    Returns:
        A new array, (slices, rows, columns).

    Raises:
        ScanError: ``mosaic``: a tile behind the last slice is not empty, or the last slice is and only the header's
            number (not a position of its own) says that it is one.
    """
    rows, columns = image.shape[0] // tiles.down, image.shape[1] // tiles.across
    grid = image.reshape(tiles.down, rows, tiles.across, columns).swapaxes(1, 2)
    pieces = np.ascontiguousarray(grid).reshape(-1, rows, columns)
    if pieces[tiles.count :].any():
        raise ScanError("mosaic", "a tile behind the last slice is not empty")
    if tiles.first_mm is None and not pieces[tiles.count - 1].any():
        raise ScanError("mosaic", "the last slice is empty")
    return pieces[: tiles.count]
