"""Write a report from one set of facts: HTML for people, JSON for programs, PDF to be filed."""

from __future__ import annotations

from pathlib import Path

from medtl.artifacts import storage_errors, write_bytes, write_json
from medtl.report import pdf
from medtl.report.checklists import as_json as checklists_as_json
from medtl.report.facts import Facts, as_json
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
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    page, record = folder / PAGE, folder / RECORD
    text = render(facts)
    write_bytes(page, text.encode())
    write_json(record, as_json(facts) | {"checklists": checklists_as_json(facts)})
    if not pdf.is_installed():
        return page, record
    write_bytes(folder / PRINT, pdf.as_pdf(text))
    return page, record, folder / PRINT
