"""The plot of a range test shows what was found, and its page runs nothing."""

from __future__ import annotations

import re
from html import unescape

import numpy as np

from medtl.report.curves import page, range_test

RATES = [float(rate) for rate in np.geomspace(1e-6, 1, 40)]
LOSSES = [*np.linspace(0.7, 0.3, 30), *np.geomspace(0.3, 400, 10)]


def test_the_same_numbers_give_the_same_bytes_and_each_mark_shows() -> None:
    def draw(safe: float | None) -> str:
        return range_test(RATES, LOSSES, LOSSES, {"safe": safe, "configured": 1e-3})

    assert draw(1e-2) == draw(1e-2)
    assert draw(1e-2) != draw(1e-3) != draw(None)


def test_rates_are_written_plainly() -> None:
    svg = range_test(RATES, LOSSES, LOSSES, {})
    assert "<!-- 1e-04 -->" in svg
    assert "math" not in svg


def test_one_step_can_be_drawn() -> None:
    assert "<svg" in range_test([1e-6], [0.7], [0.7], {"configured": 1e-3})


def test_the_page_runs_nothing_and_escapes_what_it_is_told() -> None:
    written = page("<script>", range_test(RATES, LOSSES, LOSSES, {}), [("note", "a\u202eb & c")])
    assert "default-src 'none'" in unescape(written)
    assert "&lt;script&gt;" in written
    assert "<script" not in written
    assert "\u202e" not in written
    assert not re.search(r'(src|href)="(?!data:)', written)
    assert 'style="' not in written
