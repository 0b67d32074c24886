"""The page in a real headless Chromium, spoken to over a pipe: what it asks for, how wide it is, how it looks."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from medtl.records import Exclusion, GateCheck
from medtl.report.page import render

pytestmark = pytest.mark.browser

PHONE, DESKTOP = 360, 1280
CALLS_HOME = '"><script src=http://127.0.0.1:9/s></script><img src=http://127.0.0.1:9/i onerror=alert(1)>'


class Chromium:
    """One tab of a headless Chromium, over the DevTools protocol (JSON, each message closed by a zero byte)."""

    def __init__(self, folder):
        inward, outward = os.pipe(), os.pipe()
        program = shutil.which("chromium") or shutil.which("chromium-browser") or "google-chrome"
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        joined = f'exec "$@" 3<&{inward[0]} 4>&{outward[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", joined, "bash", program, *flags, "about:blank"],
            pass_fds=(inward[0], outward[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(inward[0])
        os.close(outward[1])
        self.write, self.read, self.rest = inward[1], outward[0], b""
        self.numbers, self.events, self.session = itertools.count(1), [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        answer = self.until(lambda said: said.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def until(self, wanted, seconds=60):
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self.rest:
                line, self.rest = self.rest.split(b"\0", 1)
                said = json.loads(line)
                self.events.append(said)
                if wanted(said):
                    return said
            assert select.select([self.read], [], [], max(0, end - time.monotonic()))[0], "Chromium does not answer"
            self.rest += os.read(self.read, 1 << 20)

    def open(self, path, width, dark=False):
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=path.as_uri())
        self.until(lambda said: said.get("method") == "Page.loadEventFired")
        time.sleep(0.3)  # for a late request

    def ask(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def photograph(self, path):
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(taken))
        return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"))

    def named(self, method):
        return [said["params"] for said in self.events if said.get("method") == method]

    def requests(self):
        return [said["request"]["url"] for said in self.named("Network.requestWillBeSent")]

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.read)
        os.close(self.write)


def written(folder, facts):
    (folder / "report.html").write_text(render(facts))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Chromium(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


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
    assert all(url.startswith("data:image/svg+xml;base64,") for url in browser.requests()[1:])
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
    assert browser.ask("document.images.length") == 9
    links = "[...document.querySelectorAll('a[href^=\"#\"]')]"
    assert browser.ask(f"{links}.filter(a => !document.getElementById(a.hash.slice(1))).length") == 0


def test_folded_parts_are_open_in_print(browser, report, tmp_path):
    browser.open(report, DESKTOP)
    printed = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    (tmp_path / "printed.pdf").write_bytes(printed)
    text = subprocess.run(["pdftotext", tmp_path / "printed.pdf", "-"], capture_output=True, check=True).stdout.decode()
    assert "Agreement of annotators" in text
