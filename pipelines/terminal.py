"""How the command line talks: tables and JSON on stdout, bars on a terminal, and the parameters that verbs share."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from medtl.config import Config, load_config
from medtl.errors import ConfigError
from medtl.model.backbones import backbone

WHOLE = frozenset({"item", "output", "release", "result"})  # columns that people copy from: never broken over two lines
ConfigFile = Annotated[Path, Parameter(help="YAML file of the run, for instance configs/demo.yaml")]
Sets = Annotated[
    list[str] | None,
    Parameter(name="--set", help="override: a.b=c; of a list a.NAME.c or a.0.c (again for more)", negative=""),
]
Json = Annotated[
    bool,
    Parameter(name="--json", help="last line of stdout: JSON; one object, or a list of them for a table", negative=""),
]
Workspace = Annotated[Path, Parameter(help="workspace of the runs")]


def load(path: Path, overrides: Sequence[str] | None) -> Config:
    """Read a config with its overrides; a backbone that nobody knows is refused before anything is begun.

    Raises:
        ConfigError: it is no valid config, or there is no such backbone.
    """
    config = load_config(path, overrides or [])
    backbone(config.model.backbone)
    return config


def load_diagnosis(path: Path, overrides: Sequence[str] | None, verb: str) -> Config:
    """Read the config of a diagnosis.

    Raises:
        ConfigError: it is one of a segmentation, which this verb does not do.
    """
    config = load(path, overrides)
    if config.segments:
        raise ConfigError(
            f"`medtl {verb}` is for diagnosis, and this config has masks (studies.labels.mask): a segmentation. It "
            "takes run, train, evaluate, crossval, predict and elsewhere."
        )
    return config


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """Draw progress bars, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )  # fmt: skip

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
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
        drawn.add_column(escape(column), overflow="fold", no_wrap=column in WHOLE)
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    Console().print(drawn)


def say(text: str) -> None:
    """Print one line."""
    print(text)


def number(value: float | None) -> str:
    """Write a figure, or that there is none."""
    return "not estimable" if value is None else f"{value:.3f}"


def log_to_file(workspace: Path) -> None:
    """Write the log into the workspace too: ``logs/medtl.log``."""
    from logging.handlers import RotatingFileHandler

    from medtl.artifacts import storage_errors

    path = workspace.absolute() / "logs" / "medtl.log"
    logger = logging.getLogger("medtl")
    if any(getattr(handler, "baseFilename", None) == str(path) for handler in logger.handlers):
        return
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=10_000_000, backupCount=5, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)
