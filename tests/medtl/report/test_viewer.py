"""The viewer of cases: NIfTI that any program reads, a page that runs nothing but itself, and what Chromium draws."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import re
from dataclasses import fields, replace
from urllib.parse import quote

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medtl.errors import MedtlError
from medtl.records import GridPlan, MaskResult, Structure
from medtl.report import viewer
from medtl.report.io import viewer_digest, write_mask_report
from medtl.report.masks import MaskCase, MaskFacts
from medtl.report.masks import render as render_report

HOSTILE = '"></script><script>window.hurt=1</script><img src=http://127.0.0.1:9/i onerror=hurt=2>{{ 7*7 }}'
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1.1, 0, 20], [0, 0.2, 2.0, -9], [0, 0, 0, 1]])
SOURCE = "var n=1;export{NVImage,Niivue,SLICE_TYPE};"
NAME = "balls-r-3f9a1c20-viewer.html"


def ball(centre, shape=(16, 30, 34), size=6):
    return np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) * (2, 1, 1) - centre, axis=-1) < size


def study(shift=0):
    """Give values, true and predicted codes of two structures side by side."""
    one, two = ((k * ball((16, 14, 9 + 12 * (k - 1) + move))).astype(np.uint8) for k in (1, 2) for move in (0,))
    truth = np.maximum(one, two)
    predicted = np.roll(truth, (3 + shift, 0), axis=(2, 1))
    values = np.random.default_rng(shift).normal(300, 30, truth.shape).astype(np.float32) + 200 * (truth > 0)
    return values, truth, predicted


@pytest.fixture(scope="session")
def facts(make_facts):
    names = ("anterior", HOSTILE)
    base = make_facts("multilabel", names, scratch=False)
    structures = tuple(Structure(name, (k,)) for k, name in enumerate(names, 1))
    plan = GridPlan(
        structures, None, 3, "axial", 0, 1, (2.0, 1.1, 1.0), "zscore", None, None, None, None, (), (16, 32, 32), 2,
        ((1, 1, 1),), ((3, 3, 3),), (32,), (), {}, {},
    )  # fmt: skip
    packed = [viewer.view(*study(place), AFFINE) for place in range(2)]
    results = [
        MaskResult(
            f"s-secret-{k}", f"p-secret-{k}", "anterior", truth_ml=1, predicted_ml=1, values={"dice": 0.5 + k / 10}
        )
        for k in range(2)
    ]
    cases = tuple(MaskCase(place < 1, (results[place],), (), packed[place]) for place in range(2))
    known = {field.name: getattr(base, field.name) for field in fields(base)}
    return MaskFacts(**known | {"title": HOSTILE, "plan": plan, "results": (), "cases": cases, "viewer": NAME})


def read(file):
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(file))


def test_a_study_is_packed_on_the_scans_own_voxels():
    values, truth, predicted = study()
    packed = viewer.view(values, truth, predicted, AFFINE)
    for file, array in ((packed.truth, truth), (packed.predicted, predicted)):
        np.testing.assert_array_equal(np.asanyarray(read(file).dataobj), array.transpose(2, 1, 0))
        np.testing.assert_allclose(read(file).affine, AFFINE, atol=1e-6)
        assert read(file).header["intent_code"] == 1002
    np.testing.assert_allclose(read(packed.image).affine, AFFINE, atol=1e-6)
    assert (values < packed.window[0]).mean() == pytest.approx(0.005, abs=1e-3)
    assert not packed.cropped
    column, row, level = np.linalg.inv(AFFINE)[:3] @ (*packed.place_mm, 1.0)
    assert truth[round(level), round(row), round(column)]
    assert packed == viewer.view(values, truth, predicted, AFFINE)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.sampled_from(["int16", "uint16", "int32", "float32"]),
    st.floats(-1e5, 1e5),
    st.just(0.0) | st.floats(1e-3, 1e5),
    st.booleans(),
)
def test_values_come_back_within_a_step_of_their_range(kind, start, width, holes):
    values = (start + width * np.random.default_rng(0).random((3, 4, 5))).astype(np.float64)
    values = values.clip(*((np.iinfo(kind).min, np.iinfo(kind).max) if kind != "float32" else (-1e9, 1e9))).astype(kind)
    wanted = values.astype(np.float64)
    if holes and kind == "float32":
        values[0, 0, 0], wanted[0, 0, 0] = np.nan, np.nanmin(wanted.ravel()[1:])
    empty = np.zeros(values.shape, np.uint8)
    found = read(viewer.view(values, empty, empty, AFFINE).image).get_fdata().transpose(2, 1, 0)
    step = (wanted.max() - wanted.min()) / 65_535
    whole = kind != "float32" and step <= 1
    np.testing.assert_allclose(found, wanted, atol=0 if whole else step + 1e-6 * abs(wanted).max(), rtol=0)


def test_a_large_scan_is_cropped_to_both_masks_and_stays_where_it_was(monkeypatch):
    values, truth, predicted = (np.pad(part, 40) for part in study())
    whole = viewer.view(values, truth, predicted, AFFINE)
    monkeypatch.setattr(viewer, "WHOLE", 10)
    packed = viewer.view(values, truth, predicted, AFFINE)
    assert packed.cropped
    assert np.prod(read(packed.truth).shape) < truth.size / 2
    assert packed.place_mm == pytest.approx(whole.place_mm)
    for name in ("truth", "predicted"):
        full, part = read(getattr(whole, name)), read(getattr(packed, name))
        start = np.rint((np.linalg.inv(full.affine) @ part.affine)[:3, 3]).astype(int)
        box = tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))
        np.testing.assert_array_equal(part.get_fdata(), full.get_fdata()[box])
        assert np.count_nonzero(part.get_fdata()) == np.count_nonzero(full.get_fdata())
    monkeypatch.setattr(viewer, "MOST_VOXELS", 10)
    assert viewer.view(values, truth, predicted, AFFINE) is None


def test_the_worst_come_first_and_what_has_no_room_is_counted(facts, monkeypatch):
    assert viewer.chosen(facts.cases) == (1, 2)
    assert "too large for this page" not in viewer.render(facts, SOURCE, "BSD")
    monkeypatch.setattr(viewer, "MOST_CHARACTERS", facts.cases[0].viewed.characters)
    assert viewer.chosen(facts.cases) == (1,)
    page = viewer.render(facts, SOURCE, "BSD")
    assert "1 of the report's cases is too large" in page
    assert 'id="image-1"' in page
    assert 'id="image-2"' not in page
    assert viewer.chosen([replace(case, viewed=None) for case in facts.cases]) == ()


def test_the_policy_allows_this_script_and_this_style_and_no_request(facts):
    page = viewer.render(facts, SOURCE, "BSD")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    for tag, rule in (('script type="module"', "script-src"), ("style", "style-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag.split()[0]}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"connect-src|unsafe|http|\*", policy)
    assert not re.search(r'\s(src|href|style|on\w+)="', page)


def test_nothing_on_the_page_says_who_it_is(facts):
    assert "secret" not in viewer.render(facts, SOURCE, "BSD")


def test_the_same_facts_are_the_same_bytes_beside_a_page_that_links_to_them(facts, tmp_path, monkeypatch):
    monkeypatch.setattr("medtl.report.io._read_niivue", lambda: (SOURCE, "BSD"))
    monkeypatch.setattr("medtl.report.pdf.is_installed", lambda: False)
    evaluated = replace(facts, cases=facts.cases)
    first, second = (write_mask_report(tmp_path / name, evaluated) for name in "ab")
    assert [path.name for path in first] == ["report.html", "report.json", NAME]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert f'<a href="{NAME}">' in first[0].read_text()


def test_without_the_extra_the_page_says_how_to_get_it(facts, tmp_path, monkeypatch):
    monkeypatch.setattr(viewer.importlib.util, "find_spec", lambda name: None)
    assert viewer_digest() is None
    said = render_report(replace(facts, viewer=None))
    assert "pip install &#39;medtl[viewer]&#39;" in said or "pip install 'medtl[viewer]'" in said
    assert "-viewer.html" not in said
    with pytest.raises(MedtlError, match=r"pip install 'medtl\[viewer\]'"):
        write_mask_report(tmp_path, facts)


def test_images_need_no_viewer(facts):
    said = render_report(replace(facts, viewer=None, plan=replace(facts.plan, axis=None, dimensions=2), unit="pixels"))
    assert "medtl[viewer]" not in said


def test_niivue_is_taken_out_of_its_package():
    text = "let a=`é`\r\n;" + SOURCE
    assert viewer.niivue_in(f'x="{quote("b;export{c};")}";y="{quote(text)}";export{{w as default}};') == text.replace(
        "\r", ""
    )


@pytest.mark.parametrize(
    "source", ["", "export{Other};", "export{NVImage,Niivue};", SOURCE + "//", "'</script>';" + SOURCE]
)
def test_a_package_that_carries_another_thing_is_refused(source):
    with pytest.raises(MedtlError, match="medtl\\[viewer\\]"):
        viewer.niivue_in(f'x="{quote(source)}"')


# -- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(browser, facts, tmp_path_factory):
    """Give the browser with the viewer open and its first case drawn."""
    folder = tmp_path_factory.mktemp("viewer")
    write_mask_report(folder, facts)
    browser.open(folder / NAME, 1280)
    browser.wait("document.getElementById('canvas').dataset.place === '1'")
    return browser


def drawn(browser):
    """Photograph the canvas alone, (rows, columns, 3)."""
    box = browser.ask("JSON.stringify(document.getElementById('canvas').getBoundingClientRect())")
    clip = {name: value for name, value in json.loads(box).items() if name in ("x", "y", "width", "height")}
    taken = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip | {"scale": 1})
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")).astype(int)


def coloured(pixels):
    """Count the pixels that lean to cyan, to orange, to green and to magenta."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    cyan = (blue > red + 40) & (green > red + 40)
    orange = (red > blue + 40) & (green > blue + 15) & (red > green + 15)
    both = (green > red + 40) & (green > blue + 40)
    other = (red > green + 40) & (blue > green + 40)
    counted = zip(("true", "predicted", "both", "other"), (cyan, orange, both, other), strict=True)
    return {name: int(found.sum()) for name, found in counted}


def turn(browser, name):
    """Press the space bar on a control, as a hand on a keyboard does, and wait until it is painted."""
    before = browser.ask("document.getElementById('canvas').dataset.painted")
    browser.ask(f"document.querySelector('[name={name}]').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=" ", code="Space", windowsVirtualKeyCode=32, text=" ")
    browser.wait(f"document.getElementById('canvas').dataset.painted !== '{before}'")


@pytest.mark.browser
def test_the_case_is_drawn_with_both_masks_and_each_can_be_laid_off(opened):
    first = drawn(opened)
    assert first.std() > 10
    counts = coloured(first)
    assert min(counts.values()) > 50
    turn(opened, "predicted")
    alone = drawn(opened)
    assert (np.abs(alone - first).max(axis=-1) > 30).mean() > 0.005
    assert coloured(alone)["true"] > counts["true"]
    assert coloured(alone)["predicted"] + coloured(alone)["both"] < 20
    turn(opened, "truth")
    assert max(coloured(drawn(opened)).values()) < 20
    turn(opened, "truth")
    turn(opened, "predicted")
    assert coloured(drawn(opened)) == counts


@pytest.mark.browser
def test_another_case_a_structure_and_a_plane_are_chosen_from_the_keyboard(opened):
    first = drawn(opened)
    opened.ask("document.querySelector('[name=place]').focus()")
    for kind in ("keyDown", "keyUp"):
        opened.call("Input.dispatchKeyEvent", type=kind, key="ArrowDown", code="ArrowDown", windowsVirtualKeyCode=40)
    opened.wait("document.getElementById('canvas').dataset.place === '2'")
    second = drawn(opened)
    assert np.abs(second - first).mean() > 0.5
    opened.ask("const s = document.querySelector('[name=structure]'); s.value = 1; s.dispatchEvent(new Event('input'))")
    alone = coloured(drawn(opened))
    assert sum(alone.values()) < 0.8 * sum(coloured(second).values())
    assert alone["other"] < 10 < coloured(second)["other"]
    told = opened.ask("document.getElementById('told').textContent")
    opened.ask("document.getElementById('canvas').focus()")
    opened.call("Input.dispatchKeyEvent", type="keyDown", key="PageUp", code="PageUp", windowsVirtualKeyCode=33)
    assert opened.ask("document.getElementById('told').textContent") != told
    assert " mm (right, front, head)" in told
    axial = drawn(opened)
    opened.ask(
        "const p = document.querySelector('[name=plane]'); p.value = 'AXIAL'; p.dispatchEvent(new Event('input'))"
    )
    assert np.abs(drawn(opened) - axial).mean() > 5


@pytest.mark.browser
def test_no_request_leaves_and_nothing_hostile_runs(opened):
    inside = [url for url in opened.requests() if not url.startswith("data:")]
    assert [url.rsplit("/", 1)[1] for url in inside] == [NAME]
    assert inside[0].startswith("file://")
    assert not opened.named("Log.entryAdded")
    assert not opened.named("Runtime.exceptionThrown")
    assert not opened.named("Page.javascriptDialogOpening")
    assert opened.ask("window.hurt") is None
    assert opened.ask("document.querySelectorAll('option[value=\"2\"]')[0].textContent") == HOSTILE
    assert opened.ask("document.querySelector('h1').textContent") == HOSTILE
    assert opened.ask("document.images.length") == 0


@pytest.mark.browser
def test_the_policy_would_stop_a_request(opened):
    assert opened.ask("typeof fetch") == "function"
    opened.call(
        "Runtime.evaluate", expression="fetch('http://127.0.0.1:9/x').catch(() => document.body.id = 'stopped')"
    )
    opened.wait("document.body.id === 'stopped'")
    assert any("Content Security Policy" in said["entry"]["text"] for said in opened.named("Log.entryAdded"))


@pytest.mark.browser
def test_a_browser_without_webgl_is_told_so(browser, facts, tmp_path):
    write_mask_report(tmp_path, facts)
    script = "HTMLCanvasElement.prototype.getContext = () => null"
    number = browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    browser.open(tmp_path / NAME, 1280)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=number)
    assert "this browser does not run" in browser.ask("document.getElementById('told').textContent")
    assert browser.ask("document.getElementById('controls').hidden") is True
    assert not browser.named("Runtime.exceptionThrown")


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1280])
def test_the_viewer_is_not_wider_than_the_screen(browser, facts, tmp_path, width):
    write_mask_report(tmp_path, replace(facts, title="Hippocampus"))
    browser.open(tmp_path / NAME, width)
    assert browser.ask("document.documentElement.scrollWidth") <= width
