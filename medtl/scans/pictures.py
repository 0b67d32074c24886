"""PNG, JPEG, TIFF and GIF become arrays. Pure, and light: this is what the decoding process imports.

Nobody else decodes a picture: Pillow's codecs are native code fed by strangers, so that
:meth:`medtl.scans.decoding.DecodingPool.picture` hands the bytes to a process that may die.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medtl.errors import ScanError

if TYPE_CHECKING:
    from PIL import Image

AnyArray = npt.NDArray[Any]
DTYPES = frozenset(np.dtype(kind).str for kind in (np.uint8, np.uint16, np.int32, np.float32))  # of what is decoded


def check_size(rows: int, columns: int, most_megapixels: float) -> None:
    """Refuse an image whose header asks for nothing, or for too much.

    Raises:
        ScanError: ``bad_size`` or ``too_large``.
    """
    if rows < 1 or columns < 1:
        raise ScanError("bad_size", f"the header declares {rows} rows and {columns} columns")
    if rows * columns > most_megapixels * 1e6:
        raise ScanError("too_large", f"{rows} x {columns} pixels, more than scans.max_megapixels = {most_megapixels:g}")


def decode_picture(data: bytes, most_megapixels: float) -> AnyArray:
    """Decode an image at its full depth and the right way up; a palette of greys becomes one channel.

    Returns:
        Values of one of :data:`DTYPES`, (rows, columns) or (rows, columns, 3).

    Raises:
        ScanError: ``bad_size``, ``too_large``, ``multi_frame`` or ``undecodable``.
    """
    try:
        return _decode(data, most_megapixels)
    except (ScanError, MemoryError):
        raise
    except Exception as error:  # a decoder given hostile bytes may raise anything, in words that quote the file
        reason = f"the file is damaged or its pixels cannot be decoded ({type(error).__name__})"
        raise ScanError("undecodable", reason) from error


def _decode(data: bytes, most_megapixels: float) -> AnyArray:
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # the limit is ours, and checked before anything is allocated
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF", "GIF")) as image:
        check_size(image.height, image.width, most_megapixels)
        if getattr(image, "n_frames", 1) > 1:
            raise ScanError(
                "multi_frame", "several pages or frames in one file: which of them is the image is not said"
            )
        image.load()
        upright = ImageOps.exif_transpose(image) or image
        if upright.mode in ("1", "LA") or (upright.mode == "P" and _is_grey(upright)):
            upright = upright.convert("L")
        elif upright.mode not in ("L", "RGB", "F", "I") and not upright.mode.startswith("I;16"):
            upright = upright.convert("RGB")
        pixels = np.asarray(upright)
    return np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))


def _is_grey(image: Image.Image) -> bool:
    """Tell whether every colour that a palette image uses is a grey."""
    palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    used = palette[np.flatnonzero(image.histogram()[: len(palette)])]
    return bool((used == used[:, :1]).all())
