"""The table of predictions on disk."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from medtl.artifacts import storage_errors, write_bytes


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV in one step, readable by its owner alone.

    Raises:
        StorageError: the folder cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.getvalue().encode())
        path.chmod(0o600)
