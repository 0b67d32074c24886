"""The PDF: the same bytes in any process, the same words as the page, and nothing fetched."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from medtl.errors import MedtlError
from medtl.records import Exclusion, GateCheck
from medtl.report import pdf
from medtl.report.io import write_report

HOSTILE = "<script>alert(1)</script>=cmd|'/c calc'!A1 \u202eexe.nangilam"


def words_of(path):
    """Read the text of a PDF with poppler, every space one space."""
    printed = subprocess.run(["pdftotext", "-layout", path, "-"], capture_output=True, check=True).stdout.decode()
    return " ".join(printed.split())


def test_without_the_extra_page_and_record_are_written_alone(tmp_path, make_facts, monkeypatch):
    monkeypatch.setattr(pdf, "is_installed", lambda: False)
    assert [path.name for path in write_report(tmp_path, make_facts(full=True))] == ["report.html", "report.json"]


def test_weasyprint_without_pango_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "weasyprint.py").write_text("raise OSError('cannot load library libpango-1.0-0')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "weasyprint", raising=False)
    with pytest.raises(MedtlError, match="libpango"):
        pdf.as_pdf("<p>text</p>")


@pytest.mark.browser
def test_two_processes_write_the_same_bytes(tmp_path):
    made = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("facts", {str(Path(__file__).parent / "conftest.py")!r})
facts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(facts)
from medtl.report.io import write_report
write_report(pathlib.Path(sys.argv[1]), facts.make_facts(full=True))
"""
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", made, tmp_path / seed], check=True, env=_environment(seed))
    for name in ("report.html", "report.json", "report.pdf"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def _environment(seed):
    return os.environ | {"PYTHONHASHSEED": seed, "TZ": ("UTC", "Asia/Tokyo")[seed == "2"]}


@pytest.mark.browser
def test_no_date_gets_in_where_fonts_are_cut_by_fonttools(monkeypatch):
    import weasyprint.pdf.fonts

    monkeypatch.setattr(weasyprint.pdf.fonts, "harfbuzz_subset", None)
    first = pdf.as_pdf("<p>text</p>")
    time.sleep(1.1)
    assert pdf.as_pdf("<p>text</p>") == first


@pytest.mark.browser
def test_the_pdf_names_the_page_that_it_was_made_from():
    assert hashlib.sha256(b"<p>text</p>").hexdigest()[:32].encode() in pdf.as_pdf("<p>text</p>")


@pytest.mark.browser
def test_the_pdf_says_what_the_page_says(tmp_path, make_facts):
    said = words_of(write_report(tmp_path, make_facts(full=True))[-1])
    for text in ("Pneumonia on chest radiographs", "0.912", "11,180,000", "Not worse, by the margin", "hidden",
                 "Agreement of annotators", "not reported", "Limits"):  # fmt: skip
        assert text in said


@pytest.mark.browser
def test_no_page_of_the_pdf_is_blank_and_nothing_reaches_into_its_margins(tmp_path, make_facts, check_print):
    check_print(write_report(tmp_path, make_facts(full=True))[-1])


def objects_of(pdf):
    """Give what a reader acts on: streams of objects, and all but the other streams, whose bytes may spell anything."""
    found = [re.sub(rb"\bstream\r?\n.*?endstream", b"", pdf, flags=re.DOTALL)]
    for head, data in re.findall(rb"<<((?:(?!endobj).)*?)>>\s*stream\r?\n(.*?)\r?\nendstream", pdf, flags=re.DOTALL):
        if b"/ObjStm" in head:
            found.append(zlib.decompress(data))
    return b"\n".join(found)


def test_an_action_is_found_wherever_a_pdf_keeps_it():
    packed = zlib.compress(b"1 0 << /S /JavaScript /JS (app.alert(1)) >>")
    hidden = b"2 0 obj\n<</Type /ObjStm /Filter /FlateDecode>>\nstream\n" + packed + b"\nendstream\nendobj\n"
    plain = b"1 0 obj\n<</S /JavaScript>>\nendobj\n"
    drawn = b"3 0 obj\n<</Filter /FlateDecode>>\nstream\nx/JSx\nendstream\nendobj\n"
    assert b"/JS" in objects_of(hidden) and b"/JavaScript" in objects_of(plain) and b"/JS" not in objects_of(drawn)


@pytest.mark.browser
def test_hostile_text_stays_text_in_the_pdf(tmp_path, make_facts):
    facts = make_facts(classes=("normal", "x"))
    facts = replace(facts, title=HOSTILE, intended_use=HOSTILE, limits=(HOSTILE,), gate=(GateCheck(HOSTILE, 0, False),),
                    exclusions=(Exclusion("f-1", "scans", "odd", HOSTILE),))  # fmt: skip
    path = write_report(tmp_path, facts)[-1]
    said = words_of(path)
    assert said.count("<script>alert(1)</script>=cmd|'/c calc'!A1") >= 4
    assert "�exe.nangilam" in said  # and not turned around
    for action in (b"/JavaScript", b"/JS", b"/Launch", b"/URI", b"/EmbeddedFile", b"/AA"):
        assert action not in objects_of(path.read_bytes())


@pytest.mark.browser
@pytest.mark.parametrize("address", ["file:///etc/hostname", "http://127.0.0.1:9/pixel.png", "/etc/hostname"])
def test_a_page_that_would_fetch_something_is_refused(address):
    with pytest.raises(MedtlError, match="does not lie in it"):
        pdf.as_pdf(f'<base href="file:///"><img src="{address}" alt="nothing">')
