"""The page in a real headless Chromium, spoken to over a pipe: what it asks for, how wide it is, how it looks."""

from __future__ import annotations

import base64
import socket
import subprocess
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from medtl.records import Exclusion, GateCheck
from medtl.report.page import render

pytestmark = pytest.mark.browser

PHONE, DESKTOP = 360, 1280
DRAWN, THUMBNAIL = "data:image/svg+xml;base64", "data:image/png;base64"
CALLS_HOME = '"><script src=http://127.0.0.1:9/s></script><img src=http://127.0.0.1:9/i onerror=alert(1)>'


def written(folder, facts):
    (folder / "report.html").write_text(render(facts))
    return folder / "report.html"


@pytest.fixture(scope="module")
def report(tmp_path_factory, make_facts):
    return written(tmp_path_factory.mktemp("report"), make_facts(full=True))


@pytest.fixture(scope="module")
def many(tmp_path_factory, make_facts):
    names = tuple(f"finding number {i} with-a-name-that-does-not-break" for i in range(14))
    return written(tmp_path_factory.mktemp("many"), make_facts("multilabel", names, full=True))


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_nothing_leaves_the_page_and_nothing_is_refused(browser, report, width):
    browser.open(report, width)
    assert browser.requests()[0] == report.as_uri()
    assert {url.partition(",")[0] for url in browser.requests()[1:]} == {DRAWN, THUMBNAIL}
    assert not browser.named("Log.entryAdded")
    assert not browser.named("Runtime.exceptionThrown")


def test_the_eye_that_sees_no_request_would_see_one(browser, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen = []
        listener = threading.Thread(target=lambda: seen.append(server.accept()[0].close()), daemon=True)
        listener.start()
        page = tmp_path / "control.html"
        page.write_text(f'<img src="http://127.0.0.1:{server.getsockname()[1]}/pixel">')
        browser.open(page, DESKTOP)
        listener.join(10)
    assert seen == [None]
    assert any(url.endswith("/pixel") for url in browser.requests())


def test_hostile_text_neither_runs_nor_calls_home(browser, tmp_path, make_facts):
    facts = make_facts(classes=("normal", CALLS_HOME), full=True)
    facts = replace(facts, title=CALLS_HOME, intended_use=CALLS_HOME, limits=(CALLS_HOME,), release_id=CALLS_HOME,
                    exclusions=(Exclusion("f-1", "scans", CALLS_HOME, CALLS_HOME),),
                    provenance={CALLS_HOME: CALLS_HOME}, gate=(GateCheck(CALLS_HOME, None, False),))  # fmt: skip
    browser.open(written(tmp_path, facts), DESKTOP)
    assert browser.ask("document.scripts.length + document.querySelectorAll('[onerror]').length") == 0
    assert browser.ask("document.querySelector('h1').textContent") == CALLS_HOME
    assert not [url for url in browser.requests() if url.startswith("http")]
    assert not browser.named("Page.javascriptDialogOpening")


@pytest.mark.parametrize("width", [PHONE, 768, DESKTOP])
@pytest.mark.parametrize("name", ["report", "many"])
def test_the_page_is_not_wider_than_the_screen(browser, request, name, width):
    browser.open(request.getfixturevalue(name), width)
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg'))"
    assert browser.ask(f"{wide}.filter(e => e.getBoundingClientRect().right > innerWidth + 1).length") == 0


@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (DESKTOP, False), (DESKTOP, True)])
def test_the_page_can_be_seen(browser, report, tmp_path, width, dark):
    browser.open(report, width, dark)
    pixels = browser.photograph(tmp_path / f"{width}{'-dark' if dark else ''}.png")
    assert pixels.shape[1] == width
    assert pixels.shape[0] > 3000
    assert (np.median(pixels) < 60) == dark
    written = np.abs(pixels.astype(int) - int(np.median(pixels))) > 60
    screens = [written[top : top + 800].mean() for top in range(0, len(written) - 800, 800)]
    assert min(screens) > 0.003  # no screen of it is blank
    assert max(screens) < 0.5


def test_every_picture_is_drawn_and_every_heading_can_be_reached(browser, report):
    browser.open(report, DESKTOP)
    assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
    kinds = browser.ask("[...document.images].map(i => i.src.split(',')[0])")
    assert Counter(kinds) == {DRAWN: 11, THUMBNAIL: 8}
    links = "[...document.querySelectorAll('a[href^=\"#\"]')]"
    assert browser.ask(f"{links}.filter(a => !document.getElementById(a.hash.slice(1))).length") == 0


def test_folded_parts_are_open_in_print(browser, report, tmp_path):
    browser.open(report, DESKTOP)
    printed = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    (tmp_path / "printed.pdf").write_bytes(printed)
    text = subprocess.run(["pdftotext", tmp_path / "printed.pdf", "-"], capture_output=True, check=True).stdout.decode()
    assert "Agreement of annotators" in text
