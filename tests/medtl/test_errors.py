"""The error tree is the one that its docstring draws, and an error survives a process border."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from medtl import errors
from medtl.errors import MedtlError, ScanError

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MedtlError)]


def test_the_drawing_in_the_docstring_is_the_tree() -> None:
    rows = re.findall(r"^    ([│├└─ ]*)(\w+) +exit (\d)", errors.__doc__ or "", re.M)
    drawn = {name: int(code) for _, name, code in rows}
    assert drawn == {kind.__name__: kind.exit_code for kind in TREE}
    parents = {len(bars): name for bars, name, _ in rows[:1]}
    for bars, name, _ in rows[1:]:
        parents[len(bars)] = name
        assert issubclass(getattr(errors, name), getattr(errors, parents[len(bars) - 4]))


@pytest.mark.parametrize("kind", [kind for kind in TREE if kind is not ScanError])
def test_an_error_crosses_a_process_border(kind: type[MedtlError]) -> None:
    back = pickle.loads(pickle.dumps(kind("what, where and what to try")))
    assert type(back) is kind
    assert str(back) == "what, where and what to try"


def test_a_scan_error_keeps_its_code_and_says_its_reason() -> None:
    back = pickle.loads(pickle.dumps(ScanError("damaged", "The file ends early.")))
    assert (back.code, back.reason, str(back)) == ("damaged", "The file ends early.", "The file ends early.")
