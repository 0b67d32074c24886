"""A model's card: what it is, for whom, how good, on what evidence, and where not to use it; one page of Markdown.

Source: Mitchell et al., Model Cards for Model Reporting, FAT* 2019; the sections are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medtl.records import Checkpoint, Evaluation, GateCheck, GridPlan, Plan
from medtl.report.words import DASH, interval, metric_name, number

_NOT_SAID = "Not stated."
_STEERING = str.maketrans({"\n": " ", "\r": " ", "|": "/", "<": "‹", ">": "›", "`": "'"})  # of text that others wrote


def card(
    name: str,
    intended_use: str | None,
    limits: Sequence[str],
    plan: Plan | GridPlan,
    checkpoint: Checkpoint,
    evaluation: Evaluation,
    checks: Sequence[GateCheck],
    provenance: Mapping[str, Any],
) -> str:
    """Write the card; the same facts give the same text."""
    weights = checkpoint.weights
    source = (
        "none, from scratch"
        if weights.sha256 is None
        else f"{weights.source} ({weights.licence or 'licence not known'})"
    )
    kept = next((phase.name for phase in checkpoint.phases if phase.kept), DASH)
    several = f"{1 + len(checkpoint.members)} of " if checkpoint.members else ""
    refit = checkpoint.refit
    people = f"{refit.patients:,} patients" if refit else ""
    again = [f"- Trained a second time, on training and validation together: {people}"] if refit else []
    lines = [
        f"# {_plain(name)}",
        "",
        "Not a medical device. A qualified person takes every decision.",
        "",
        "## What it is",
        "",
        f"- Task: {_task(plan)}",
        f"- Network: {several}{checkpoint.backbone}, {checkpoint.parameters:,} parameters; kept phase: {_plain(kept)}",
        *again,
        f"- Start weights: {_plain(source)}",
        f"- Input: {_input(plan)}",
        "",
        "## For whom",
        "",
        _plain(intended_use or _NOT_SAID),
        "",
        "## How good",
        "",
        f"{evaluation.n:,} studies of {evaluation.patients:,} patients who were held back; intervals over patients.",
        "",
        "| metric | value | interval |",
        "|---|---|---|",
        *(f"| {metric_name(m)} | {number(s.value)} | {interval(s)} |" for m, s in evaluation.metrics.items()),
        "",
        "Operating points, chosen on validation: "
        + (
            "; ".join(f"{_plain(p.label)} at {p.threshold:.3f} ({p.rule})" for p in evaluation.operating_points) or DASH
        ),
        "",
        "## Gate",
        "",
        *(
            [f"- {_plain(c.condition)}: {number(c.observed)}, {'passed' if c.passed else 'failed'}" for c in checks]
            or [_NOT_SAID]
        ),
        "",
        "## Where not to use it",
        "",
        *([f"- {_plain(limit)}" for limit in (*limits, *evaluation.notes)] or [_NOT_SAID]),
        "",
        "## Made from",
        "",
        *(f"- {key}: `{value}`" for key, value in provenance.items() if isinstance(value, str)),
        "",
    ]
    return "\n".join(lines)


def _task(plan: Plan | GridPlan) -> str:
    if isinstance(plan, Plan):
        return f"{plan.task}, classes {', '.join(map(_plain, plan.classes))}"
    return f"segmentation of {', '.join(_plain(one.name) for one in plan.structures)}"


def _input(plan: Plan | GridPlan) -> str:
    if isinstance(plan, Plan):
        shown = f", {plan.volumes}" if plan.volumes else ""
        return f"{' x '.join(map(str, plan.size))} pixels, {plan.channels} channels{shown}"
    patch, spacing = (" x ".join(f"{side:g}" for side in sizes) for sizes in (plan.patch, plan.spacing_mm or ()))
    return f"patches of {patch} {'voxels' if plan.dimensions == 3 else 'pixels'}" + (
        f" at {spacing} mm" if spacing else ""
    )


def _plain(text: str) -> str:
    return text.translate(_STEERING)
