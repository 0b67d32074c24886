"""How the command line talks: tables and JSON on stdout, bars on a terminal, and the parameters that verbs share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from medtl.config import Config, load_config

ConfigFile = Annotated[Path, Parameter(help="YAML file of the run, for instance configs/demo.yaml")]
Sets = Annotated[list[str] | None, Parameter(name="--set", help="override: a.b=c (again for more)", negative="")]
Json = Annotated[bool, Parameter(name="--json", help="last line of stdout: one JSON object", negative="")]
Workspace = Annotated[Path, Parameter(help="workspace of the runs")]


def load(path: Path, overrides: Sequence[str] | None) -> Config:
    """Read a config with its overrides."""
    return load_config(path, overrides or [])


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """Draw progress bars, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        known: dict[str, Any] = {}

        def listener(step: str, done: int, total: int) -> None:
            if step not in known:
                known[step] = bars.add_task(step, total=total)
            bars.update(known[step], completed=done, total=total)

        yield listener


def show_table(value: Any, as_json: bool, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a value for machines, or its table for people."""
    if as_json:
        print(json.dumps(value))
    else:
        table(title, columns, rows)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=escape(title), title_justify="left")
    for column in columns:
        drawn.add_column(escape(column), overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    Console().print(drawn)


def number(value: float | None) -> str:
    """Write a figure, or that there is none."""
    return "not estimable" if value is None else f"{value:.3f}"
