"""Pictures and arrays that are not DICOM or NIfTI, from bytes. Pure: no file is opened here.

The format is told by the first bytes, never by the file's name. Sizes are checked before anything is allocated.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from medtl.config import ScansConfig
from medtl.errors import ScanError
from medtl.records import AnyArray
from medtl.scans.pictures import check_size
from medtl.scans.pixels import compact, native

Kind = Literal["dicom", "picture", "npz", "nifti", "gzip"]
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"GIF87a", b"GIF89a")
_PARTS = ("train", "val", "test")
_DICOM_TAGS = (b"\x08\x00", b"\x02\x00")  # a data set without preamble starts with an identifying or a meta element


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image or volume and what its file said about it."""

    pixels: AnyArray
    fields: dict[str, Any]  # of its Scan


def kind_of(start: bytes) -> Kind | None:
    """Tell a file's format by its first bytes (540 are enough); None: none that is known."""
    if start[128:132] == b"DICM" or start[:2] in _DICOM_TAGS:
        return "dicom"
    if start.startswith(_PICTURES):
        return "picture"
    if start.startswith(b"PK\x03\x04"):
        return "npz"
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    if start[344:347] in (b"n+1", b"ni1") or start[4:7] in (b"n+2", b"ni2"):
        return "nifti"
    return None


def picture(values: AnyArray) -> Decoded:
    """Take in what :func:`medtl.scans.pictures.decode_picture` gave."""
    pixels = compact(values) if values.dtype == np.int32 else native(values)
    return Decoded(pixels, {"source": "image", "bits": 8 if pixels.dtype == np.uint8 else 16})


def decode_npz(data: bytes, config: ScansConfig) -> list[Decoded]:
    """Read the MedMNIST convention: ``{train,val,test}_images`` (n, rows, columns[, 3]) and ``…_labels`` (n, k).

    Raises:
        ScanError: ``too_large``, ``bad_header``, ``bad_size`` or ``not_an_image``.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > config.max_file_mb * 1e6:
            raise ScanError("too_large", f"grows past scans.max_file_mb = {config.max_file_mb:g} when it is unpacked")
    decoded = []
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for part in _PARTS:
            if f"{part}_images" not in arrays:
                continue
            images = arrays[f"{part}_images"]
            labels = arrays.get(f"{part}_labels")
            if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
                raise ScanError("bad_header", f"{part}_images is not (n, rows, columns) or (n, rows, columns, 1 or 3)")
            if labels is not None and len(labels) != len(images):
                raise ScanError("bad_header", f"{part}_labels has another length than {part}_images")
            check_size(images.shape[1], images.shape[2], config.max_megapixels)
            for row, image in enumerate(images):
                label = None if labels is None else tuple(int(v) for v in np.atleast_1d(labels[row]))
                pixels = native(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
                bits = 8 if pixels.dtype == np.uint8 else 16
                decoded.append(Decoded(pixels, {"source": "npz", "bits": bits, "label": label, "part": part}))
    if not decoded:
        raise ScanError("not_an_image", "an archive without train_images, val_images or test_images")
    return decoded
