"""Turn facts into one self-contained HTML page.

Nothing is fetched and nothing runs: a content security policy allows the one inline style sheet, by its digest, and
images that lie in the page itself; on a page with a script (the viewer's) that one too, by its digest. Text from data
is escaped by the template engine; characters that would steer the reader's eye or terminal (control, bidirectional
override) are replaced.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medtl.records import Curve, Score
from medtl.report import fairness, figures, findings, tables, words
from medtl.report.checklists import SECTIONS, checklists
from medtl.report.facts import Facts, flow, score_histograms

STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def render(facts: Facts) -> str:
    """Write the page; the same facts give the same text."""
    return sealed(
        "page.html.jinja",
        facts=facts,
        flow=flow(facts),
        sections=SECTIONS,
        most_curves=figures.MOST_CURVES,
        checklists=checklists(facts),
        tables=tables,
        findings=findings,
        words=words,
        figures=_figures(facts),
        terms=fairness.of(facts),
    )


def sealed(template: str, *, style_sheet: str = "page.css", script: str | None = None, **values: Any) -> str:
    """Write a page that fetches nothing and runs nothing but what is given here.

    Its policy allows its own style sheet and its own script, both by their digests, and images within it.

    Args:
        template: name of a file of this folder; it prints ``policy``, ``style`` and, where one is given, ``script``.
        style_sheet: name of a file of this folder.
        script: source of a module that holds nothing from data.
    """
    templates = environment()
    style = templates.get_template(style_sheet).render()
    scripts = "" if script is None else f" script-src '{_digest(script)}';"
    return templates.get_template(template).render(
        style=Markup(style),  # noqa: S704  our own file, without a variable in it
        script=None if script is None else Markup(script),  # noqa: S704  a program, allowed by its digest alone
        policy=f"default-src 'none'; style-src '{_digest(style)}';{scripts} img-src data:; base-uri 'none'; "
        "form-action 'none'",
        **values,
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _figures(facts: Facts) -> dict[str, str | None]:
    evaluation, examined = facts.evaluation, facts.examination
    drawn = {
        "training": figures.training_curves(facts.checkpoint) if facts.checkpoint.history else None,
        "growth": figures.growth(facts),
        "roc": figures.roc(evaluation),
        "pr": figures.precision_recall(evaluation),
        "calibration": figures.calibration(evaluation.curves, _before(facts)),
        "decision": figures.decision(evaluation),
        "histograms": figures.histograms(score_histograms(facts)),
        "forest": None if examined is None else figures.forest(examined.subgroups, evaluation),
        "difference": None if facts.comparison is None else figures.difference(facts.comparison),
        "beside": None
        if facts.beside is None
        else figures.difference(facts.beside, ("this model", "the live release")),
        "both": None if (terms := fairness.of(facts)) is None else fairness.curves(terms),
    }
    return {name: None if svg is None else as_data(svg) for name, svg in drawn.items()}


def _before(facts: Facts) -> tuple[Curve, ...]:
    """Give the calibration curves from before the calibrator, where there was one."""
    examined = facts.examination
    if examined is None or examined.calibration.calibrator.method == "none":
        return ()
    return examined.calibration.curves_before


def as_data(svg: str) -> str:
    """Give an SVG as the source of an image."""
    # An <img>: matplotlib writes style attributes, which the page's own policy would block in inline SVG.
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


@functools.cache
def environment() -> Environment:
    """Give the template engine, with every expression escaped and the words of the house as filters."""
    made = Environment(
        loader=PackageLoader("medtl.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    made.filters |= {
        "number": words.number,
        "interval": words.interval,
        "p_value": words.p_value,
        "compact": words.compact,
        "metric": words.metric_name,
        "bar": bar,
        "count": "{:,}".format,
    }
    return made


def _finalize(value: Any) -> Any:
    if value is None:
        return words.DASH
    return STEERING.sub("�", value) if type(value) is str else value


def bar(score: Score) -> dict[str, str] | None:
    """Give the ends and the middle of a score on a line from 0 to 100; ``None`` where it does not fit there."""
    if (
        score.metric.removeprefix("median_") in words.UNBOUNDED
        or score.value is None
        or score.low is None
        or score.high is None
    ):
        return None
    if not 0 <= score.low <= score.high <= 1:
        return None
    return {"low": f"{100 * score.low:.2f}", "value": f"{100 * score.value:.2f}", "high": f"{100 * score.high:.2f}"}
