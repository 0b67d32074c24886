"""Write a report from one set of facts: HTML for people, JSON for programs, PDF to be filed, a viewer of masks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from medtl.artifacts import digest_of, storage_errors, write_bytes, write_json
from medtl.errors import MedtlError
from medtl.report import fairness, masks, pdf, viewer
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
    return _write(folder, render(facts), as_json(facts) | {"checklists": checklists_as_json(facts)} | _terms(facts))


def write_mask_report(folder: Path, facts: MaskFacts) -> tuple[Path, ...]:
    """Write the report of a segmentation, as :func:`write_report` does that of a diagnosis, and the viewer it names.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
        MedtlError: the package of the viewer holds none that is known here.
    """
    written = _write(folder, masks.render(facts), masks.as_json(facts) | _terms(facts))
    if facts.viewer is None:
        return written
    write_bytes(folder / facts.viewer, viewer.render(facts, *_read_niivue()).encode())
    return *written, folder / facts.viewer


def viewer_digest() -> str | None:
    """Give the digest of what a viewer would be written with; ``None`` where the extra is not installed."""
    return digest_of(_read_niivue()) if viewer.is_installed() else None


def _terms(facts: Facts) -> dict[str, Any]:
    terms = fairness.of(facts)
    return {"trainings": None if terms is None else terms.plain()}


def _read_niivue() -> tuple[str, str]:
    """Read NiiVue and its licence from the package that carries it."""
    found = importlib.util.find_spec(viewer.PACKAGE)
    script = (
        Path(found.submodule_search_locations[0], viewer.SCRIPT) if found and found.submodule_search_locations else None
    )
    if script is None or not script.is_file():
        raise MedtlError(f"{viewer.PACKAGE} is not installed as a whole. Try: pip install 'medtl[viewer]'.")
    with storage_errors(script):
        source = viewer.niivue_in(script.read_text(encoding="utf-8"))
    licence = importlib.metadata.distribution(viewer.PACKAGE).read_text("licenses/LICENSE")
    if not licence:
        raise MedtlError(
            f"The installed {viewer.PACKAGE} brings no licence; it is left out of no page. Install it anew."
        )
    return source, licence


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
