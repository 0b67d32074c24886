"""What stored values mean: modality LUT, window, inversion, colour. Pure: arrays and headers in, arrays out.

The full depth is kept: 16 bits stay 16 bits until the plan says otherwise. A MONOCHROME1 image (high values dark) is
inverted over the range its stored bits can hold, so that two images of one device stay comparable.
Source: DICOM PS3.3 C.7.6.3.1.2, C.11.1, C.11.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from medtl.config import ScansConfig
from medtl.errors import ScanError
from medtl.records import AnyArray
from medtl.scans.geometry import Finding

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_INTEGERS = (np.uint8, np.uint16, np.int16, np.int32)


def dicom_pixels(
    header: Dataset, config: ScansConfig, stored: AnyArray | None = None, frame: int = 0
) -> tuple[AnyArray, int]:
    """Turn one DICOM frame into meaningful values.

    Args:
        stored: its decoded values, colour as RGB; None: they lie uncompressed in the header's pixel data.
        frame: which frame of the object.

    Returns:
        Array of shape (rows, columns) or (rows, columns, 3), and the number of significant bits of a value.

    Raises:
        ScanError: ``bad_header`` for a photometric interpretation that is not known, ``no_window``.
    """
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    if stored is None:
        stored = pixel_array(header, index=frame)  # YBR comes back as RGB
    stored = native(stored)
    photometric = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    if photometric == "PALETTE COLOR":
        return _eight_bits(apply_color_lut(stored, header)), 8
    if stored.ndim == 3:
        return stored, int(header.get("BitsStored") or stored.dtype.itemsize * 8)
    if not photometric.startswith("MONOCHROME"):
        raise ScanError("bad_header", "a photometric interpretation that is not known for one sample per pixel")
    _without_empty_scale(header)
    values = compact(apply_modality_lut(stored, header))
    bits = int(header.get("BitsStored") or stored.dtype.itemsize * 8)
    if config.window != "none":
        return windowed(values, header, config), 16
    if photometric == "MONOCHROME1":
        signed = int(header.get("PixelRepresentation") or 0) == 1
        lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        ends = apply_modality_lut(np.array([lowest, highest], dtype=np.int64).astype(stored.dtype), header)
        values = compact(float(ends[0]) + float(ends[1]) - values.astype(np.float64))
    return values, bits


def _without_empty_scale(header: Dataset) -> None:
    """Drop a look-up table and a slope that are there and say nothing, as some devices write them."""
    tables = header.get("ModalityLUTSequence")
    if tables is not None and not any(item.get("LUTDescriptor") for item in tables):
        del header.ModalityLUTSequence
    if any(header.get(keyword, 0) is None for keyword in ("RescaleSlope", "RescaleIntercept")):
        for keyword in ("RescaleSlope", "RescaleIntercept"):
            if keyword in header:
                delattr(header, keyword)


def native(values: AnyArray) -> AnyArray:
    """Give the values in this machine's byte order."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def windowed(values: AnyArray, header: Dataset, config: ScansConfig) -> AnyArray:
    """Apply the VOI window and, for MONOCHROME1, the inversion; give 16 bits from black to white.

    Raises:
        ScanError: ``no_window`` where the header's own window is wanted and there is none.
    """
    if config.window == "header":
        centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
        if centre is None or width is None:
            raise ScanError("no_window", "scans.window is 'header' and the header has no window")
    else:
        assert not isinstance(config.window, str)
        centre, width = config.window
    if not (np.isfinite(centre) and np.isfinite(width) and width >= 1):
        raise ScanError("no_window", "the window is not a finite centre with a width of at least 1")
    # PS3.3 C.11.2.1.2.1, linear
    share = np.clip((values.astype(np.float64) - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1)
    if str(header.get("PhotometricInterpretation")) == "MONOCHROME1":
        share = 1 - share
    return np.rint(share * 65535).astype(np.uint16)


def nifti_slice(values: AnyArray) -> AnyArray:
    """Lay a one-slice NIfTI array as its DICOM image lies: anterior or superior first, right or anterior
    first.

    Args:
        values: canonical (RAS+) order, with one axis of length 1, or two axes.

    Raises:
        ScanError: ``volume`` for more than one slice.
    """
    squeezed = np.squeeze(values) if values.ndim > 2 else values
    if squeezed.ndim != 2:
        raise ScanError("volume", "a volume; this pipeline reads two-dimensional images")
    return np.ascontiguousarray(squeezed[::-1, ::-1].T)


def compact(values: AnyArray) -> AnyArray:
    """Store whole numbers in the smallest of uint8, uint16, int16, int32, all others as float32."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        if not np.all(values == np.rint(values)):
            return values.astype(np.float32)
        if np.abs(values).max(initial=0) >= 2**31:
            return values.astype(np.float32)
    values = native(values)
    low, high = values.min(initial=0), values.max(initial=0)
    for dtype in _INTEGERS:
        info = np.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return values.astype(dtype)
    return values.astype(np.float32)


def check_pixels(values: AnyArray) -> tuple[Finding, ...]:
    """Find pixels that nothing can be learned from: ``non_finite`` or ``blank``."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return (Finding("non_finite", "NaN or infinite values among the pixels"),)
    if values.size == 0 or values.min() == values.max():
        return (Finding("blank", "every pixel has the same value"),)
    return ()


def _eight_bits(rgb: AnyArray) -> AnyArray:
    return (rgb >> 8).astype(np.uint8) if rgb.dtype == np.uint16 else rgb.astype(np.uint8)


def _first(value: Any) -> float | None:
    if value is None or str(value).strip() == "":
        return None
    first = value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value
    try:
        return float(first)
    except (TypeError, ValueError):
        return None
