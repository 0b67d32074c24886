"""Turn a page into a PDF with WeasyPrint, an extra (``pip install medtl[pdf]``).

Nothing is fetched: only what lies in the page itself may be loaded, and anything else stops the rendering. The
document is named after the digest of the page, and no date is written, so that the same page is the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os

from medtl.errors import MedtlError


def is_installed() -> bool:
    """Tell whether the extra is there."""
    return importlib.util.find_spec("weasyprint") is not None


def as_pdf(page: str) -> bytes:
    """Give the page as a PDF.

    Raises:
        MedtlError: WeasyPrint is there and pango, which it draws text with, is not; or the page asks for something that
            does not lie in it.
    """
    try:
        from weasyprint import HTML
        from weasyprint.urls import FatalURLFetchingError, URLFetcher
    except OSError as error:
        raise MedtlError(
            "WeasyPrint does not find pango, which it draws text with. Install it (Debian: libpango-1.0-0, "
            "libpangoft2-1.0-0, libharfbuzz-subset0), or remove WeasyPrint: the page is written without a PDF then."
        ) from error
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # else fontTools dates the fonts, where harfbuzz-subset is missing
    fetcher = URLFetcher(allowed_protocols=("data",), fail_on_errors=True)
    identifier = hashlib.sha256(page.encode()).hexdigest()[:32].encode()
    try:
        made: bytes = HTML(string=page, url_fetcher=fetcher).write_pdf(pdf_identifier=identifier, pdf_tags=True)
    except FatalURLFetchingError as error:
        raise MedtlError("The page asks for something that does not lie in it. Report this: no page may.") from error
    return made
