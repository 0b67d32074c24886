"""Tables and masks on disk, each in one step, readable by their owner alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from medtl.artifacts import storage_errors, write_bytes
from medtl.delivery.masks import Affine, mask_nifti
from medtl.records import AnyArray


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV in one step, readable by its owner alone.

    Raises:
        StorageError: the folder cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def write_mask_nifti(path: Path, values: AnyArray, affine: Affine) -> None:
    """Write a mask as ``.nii`` or ``.nii.gz`` on the voxels that it has; the same mask gives the same bytes.

    Args:
        values: uint8 or uint16, shape (slices, rows, columns).
        affine: voxel (column, row, slice) -> RAS+ mm.

    Raises:
        ScanError: the values or the affine have no place in a NIfTI file.
        StorageError: the folder cannot be written.
    """
    write_file(path, mask_nifti(values, affine, gzipped=path.suffix == ".gz"))


def write_file(path: Path, data: bytes) -> None:
    """Write what goes out (a DICOM segmentation, a picture, a table) in one step, readable by its owner alone.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        path.chmod(0o600)
