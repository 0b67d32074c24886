"""Planes become volumes. Pure: no pixel and no file is needed.

Order, spacing and affine come from positions along the slice normal, never from InstanceNumber or file names. The
affine maps voxel (column, row, slice) to RAS+ millimetres; DICOM's own axes are LPS. Source: DICOM PS3.3 C.7.6.2.1.1.
"""

from __future__ import annotations

from dataclasses import dataclass

Affine = tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a check saw. The policy of its code decides what becomes of the scan; see ``checks.CODES``.

    ``reason`` is one sentence for a person; it holds no name and no identifier.
    """

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Volume:
    """One volume of a series: which frames in which order, and where they lie.

    ``members`` are (index of the header, index of the frame in it), in slice order. ``shape`` is (slices, rows,
    columns). ``affine`` is 4 x 4, rows of floats, voxel (column, row, slice) -> RAS+ mm. ``spacing_mm`` is of columns,
    rows, slices.
    """

    members: tuple[tuple[int, int], ...]
    shape: tuple[int, int, int]
    affine: Affine
    spacing_mm: tuple[float, float, float]
    splits: tuple[tuple[str, str], ...] = ()  # what tells it from the other volumes of its series
    findings: tuple[Finding, ...] = ()
