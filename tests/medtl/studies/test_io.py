"""A table that could be read in two ways is not read; a cohort comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtl.errors import StudyError
from medtl.records import Cohort, Exclusion, Study
from medtl.studies.io import read_cohort, read_table, write_cohort


def table(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_quotes_accents_and_empty_lines_are_read(tmp_path: Path) -> None:
    columns, rows = read_table(table(tmp_path, 'path , label\n"a, b.png",é\n\n"two\nlines",no\n'))
    assert columns == ("path", "label")
    assert [row["path"] for row in rows] == ["a, b.png", "two\nlines"]
    assert rows[0]["label"] == "é"


@pytest.mark.parametrize("row", ["x", "x,1,2", "x,1\ny"])
def test_an_uneven_row_is_named_by_its_number(tmp_path: Path, row: str) -> None:
    with pytest.raises(StudyError, match=f"row {2 + row.count(chr(10))}"):
        read_table(table(tmp_path, f"path,label\n{row}\n"))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="more than one column named 'label'"):
        read_table(table(tmp_path, "path,label,label\nx,no,yes\n"))


def test_an_open_quote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not a readable CSV"):
        read_table(table(tmp_path, 'path,label\n"x,no\n'))


@pytest.mark.parametrize("text", ["", "\n", "path,label", "path,label\n\n"])
def test_a_table_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(StudyError, match="no rows"):
        read_table(table(tmp_path, text))


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read"):
        read_table(tmp_path)


def test_a_cohort_comes_back_with_its_unknowns(tmp_path: Path) -> None:
    studies = (
        Study("s-1", "a", "p-1", (1, None), "x", age_years=44.0, part="test", attributes={"view": "PA"}),
        Study("s-2", "b", "p-2", (0, 1), "y"),
    )
    left_out = (Exclusion("f-1", "studies", "blank_label", "the label is blank"),)
    cohort = Cohort("multilabel", ("mass", "edema"), studies, left_out, False, ("careful",))
    write_cohort(tmp_path, cohort)
    assert read_cohort(tmp_path) == cohort
