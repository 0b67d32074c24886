"""Label tables come in and cohorts go out here."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from medtl.artifacts import read_record, write_record
from medtl.errors import StudyError
from medtl.records import Cohort

COHORT = "cohort.json"
Table = tuple[tuple[str, ...], tuple[dict[str, str], ...]]


def read_table(path: Path) -> Table:
    """Read a label table: its column names and its rows.

    Comma, semicolon or tab separated, UTF-8 with or without byte-order mark, first line the column names.

    Raises:
        StudyError: missing, not UTF-8 text, without rows, with two columns of one name, or with an uneven row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise StudyError(
            f"The label table '{path.name}' is not there. Put it beside the scans, or name it: "
            "--set studies.labels.table=FILE (null for labels inside an .npz)"
        ) from error
    except UnicodeDecodeError as error:
        raise StudyError(f"The label table '{path.name}' is not UTF-8 text. Save it as CSV in UTF-8.") from error
    except OSError as error:
        raise StudyError(f"The label table '{path.name}' cannot be read ({error.strerror}).") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        columns = tuple(name.strip() for name in reader.fieldnames or ())
        reader.fieldnames = columns
        rows = tuple(dict(row) for row in reader)
    except csv.Error as error:
        raise StudyError(f"The label table '{path.name}' is not a readable CSV: {error}.") from error
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise StudyError(f"The label table '{path.name}' has more than one column named '{twice[0]}'; rename one.")
    uneven = [n for n, row in enumerate(rows, 2) if None in row or None in row.values()]
    if uneven:
        raise StudyError(f"The label table '{path.name}' has another number of cells than columns in row {uneven[0]}.")
    if not rows:
        raise StudyError(f"The label table '{path.name}' has no rows below its column names.")
    return columns, rows


def write_cohort(folder: Path, cohort: Cohort) -> None:
    """Write a cohort."""
    write_record(folder / COHORT, cohort)


def read_cohort(folder: Path) -> Cohort:
    """Read a cohort back."""
    return read_record(folder / COHORT, Cohort)
