"""Write a report: ``report.html`` for people and ``report.json`` for programs, from the same facts."""

from __future__ import annotations

from pathlib import Path

from medtl.artifacts import storage_errors, write_bytes, write_json
from medtl.report.facts import Facts, as_json
from medtl.report.page import render

PAGE = "report.html"
RECORD = "report.json"


def write_report(folder: Path, facts: Facts) -> tuple[Path, Path]:
    """Write both files into the folder (made if missing); the same facts give the same bytes.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    page, record = folder / PAGE, folder / RECORD
    write_bytes(page, render(facts).encode())
    write_json(record, as_json(facts))
    return page, record
