"""Write a report from one set of facts: HTML for people, JSON for programs, PDF to be filed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medtl.artifacts import storage_errors, write_bytes, write_json
from medtl.report import masks, pdf
from medtl.report.checklists import as_json as checklists_as_json
from medtl.report.facts import Facts, as_json
from medtl.report.masks import MaskFacts
from medtl.report.page import render

PAGE = "report.html"
RECORD = "report.json"
PRINT = "report.pdf"


def write_report(folder: Path, facts: Facts) -> tuple[Path, ...]:
    """Write page, record and, where the extra ``pdf`` is installed, the PDF; the same facts give the same bytes.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
        MedtlError: WeasyPrint is installed and cannot work.
    """
    return _write(folder, render(facts), as_json(facts) | {"checklists": checklists_as_json(facts)})


def write_mask_report(folder: Path, facts: MaskFacts) -> tuple[Path, ...]:
    """Write the report of a segmentation, as :func:`write_report` does that of a diagnosis."""
    return _write(folder, masks.render(facts), masks.as_json(facts))


def _write(folder: Path, text: str, facts: dict[str, Any]) -> tuple[Path, ...]:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    page, record = folder / PAGE, folder / RECORD
    write_bytes(page, text.encode())
    write_json(record, facts)
    if not pdf.is_installed():
        return page, record
    write_bytes(folder / PRINT, pdf.as_pdf(text))
    return page, record, folder / PRINT
