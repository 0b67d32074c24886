"""Whoever reads the page: contrast by WCAG 2.2, order of headings, words for pictures, a size that can be mailed."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import pairwise

import pytest

from medtl.report.io import write_report
from medtl.report.page import render

TEXT = [("ink", "paper"), ("ink", "wash"), ("soft", "paper"), ("soft", "wash"), ("accent", "paper"), ("warn", "paper"),
        ("good", "paper"), ("bad", "paper"), ("good", "good-wash"), ("warn", "warn-wash"), ("bad", "bad-wash"),
        ("ink", "good-wash"), ("ink", "bad-wash")]  # fmt: skip
STYLE = (files("medtl.report") / "page.css").read_text()


def themes():
    """Give the colours of each theme: of the screen, of the dark screen, of print."""
    return [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
    ]


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    """Source: WCAG 2.2, contrast ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_wcag_says():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#fff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("theme", range(3))
@pytest.mark.parametrize(("front", "back"), TEXT)
def test_text_can_be_read_on_its_ground(theme, front, back):
    colours = themes()[theme]
    assert contrast(colours[front], colours[back]) >= 4.5


@pytest.fixture(scope="module")
def page(make_facts):
    return render(make_facts(full=True))


def test_headings_skip_no_level(page):
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_section_is_named_by_its_heading_and_linked_from_the_top(page):
    for name in re.findall(r'<section id="(\w+)"', page):
        assert f'aria-labelledby="{name}-title"' in page
        assert f'id="{name}-title"' in page
        assert f'<li><a href="#{name}">' in page


def test_what_scrolls_can_be_reached_by_keyboard(page):
    assert page.count('class="scroll"') == page.count('class="scroll" tabindex="0" role=')


def test_no_two_pictures_are_described_alike(page):
    words = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(set(words)) == len(words) == 19
    assert min(map(len, words)) > 40


def test_no_identifier_is_used_twice(page):
    names = re.findall(r' id="([^"]+)"', page)
    assert len(set(names)) == len(names)


def test_many_classes_and_groups_stay_small_enough_to_mail(tmp_path, make_facts):
    names = tuple(f"finding number {i}" for i in range(40))
    for path in write_report(tmp_path, make_facts("multilabel", names, full=True)):
        assert path.stat().st_size < 5_000_000
