"""Probabilities become decisions and rows of a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medtl.records import Evaluation, Exclusion, FloatArray

Row = dict[str, str]


def decide(probabilities: FloatArray, evaluation: Evaluation) -> tuple[str, ...]:
    """Give each study its decision at the operating points that were chosen on validation.

    Binary: the positive class at or above its threshold, else the other. Multi-class: the most probable class.
    Multi-label: every label at or above its threshold, joined by ``;``, or ``none``.

    Args:
        probabilities: (n, classes).
    """
    classes = evaluation.classes
    if evaluation.task == "multiclass":
        return tuple(classes[int(index)] for index in probabilities.argmax(1)) if len(probabilities) else ()
    thresholds = {point.label: point.threshold for point in evaluation.operating_points}
    if evaluation.task == "binary":
        positive = thresholds[classes[-1]]
        return tuple(classes[-1] if row[-1] >= positive else classes[0] for row in probabilities)
    called = ([name for name, p in zip(classes, row, strict=True) if p >= thresholds[name]] for row in probabilities)
    return tuple(";".join(names) or "none" for names in called)


def rows_of(
    scans: Sequence[tuple[str, Sequence[str]]],
    probabilities: FloatArray,
    decisions: Sequence[str],
    doubts: Sequence[Sequence[str]],
    classes: Sequence[str],
    excluded: Sequence[tuple[Exclusion, str]],
    named: bool,
) -> tuple[list[str], list[Row]]:
    """Make one row per file, the excluded ones included: nobody's scan is lost without a word.

    Args:
        scans: identifier and file names of each predicted scan.
        doubts: why a person should look at a scan whatever the decision says; empty where there is no reason.
        excluded: what was left out, with its file name.
        named: put file names into the table.

    Returns:
        Column names and rows.
    """
    shown = [f"probability_{name}" for name in classes]
    columns = ["scan", *(["file"] if named else []), *shown, "decision", "look", "reason"]
    rows: list[Row] = []
    for (scan, files), values, decision, why in zip(scans, probabilities, decisions, doubts, strict=True):
        # a class is named by the label table
        cells = {"scan": scan[:16], "decision": inert(decision), "look": "; ".join(why), "reason": ""}
        numbers = {name: f"{value:.6f}" for name, value in zip(shown, values, strict=True)}
        for file in files if named and files else [""]:
            rows.append(_row({**cells, **numbers}, file, named))
    for exclusion, file in excluded:
        said = f"{exclusion.code}: {exclusion.reason}"
        cells = {"scan": exclusion.item, "decision": "excluded", "look": "", "reason": said}
        rows.append(_row({**cells, **dict.fromkeys(shown, "")}, file, named))
    return columns, rows


def inert(cell: str) -> str:
    """Keep a spreadsheet from running a cell as a formula. Source: OWASP, CSV injection."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def _row(cells: Mapping[str, str], file: str, named: bool) -> Row:
    return {**cells, **({"file": inert(file)} if named else {})}
