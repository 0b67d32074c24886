"""What the program itself trips over in one file or series: that one is refused, the rest goes on.

Reading is written to raise :class:`~medtl.errors.ScanError` for every file that is not as it should be. Where it raises
something else, the program is wrong, and one file could end every night's run. So it costs that file (or series) alone:
it is refused as ``program_fault``, which no policy accepts. The log says where the program failed, not what the error
says, which may be what a header says. What the machine lacks (memory, disk, processes) is no fault of a file and ends
the run as before.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path

from medtl.errors import MedtlError, ScanError

_PACKAGE = Path(__file__).parent.parent
_MACHINE = (MedtlError, MemoryError, ImportError, BrokenExecutor)
_STARVED = ("start new thread", "after shutdown", "after interpreter shutdown")  # what such a RuntimeError says

log = logging.getLogger(__name__)


def ends_the_run(error: Exception) -> bool:
    """Tell what a file cannot be blamed for: errors of our own, no memory, no threads, a library that is not there."""
    starved = type(error) is RuntimeError and any(words in str(error) for words in _STARVED)
    return starved or isinstance(error, _MACHINE)


@contextmanager
def faults_refused() -> Iterator[None]:
    """Turn a fault of the program into the refusal of what it is at work on.

    Raises:
        ScanError: ``program_fault``.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or ends_the_run(error):
            raise
        where, kind = _place(error), type(error).__name__
        log.error("the program failed on one file or series, which is refused: %s in %s", kind, where)
        traceback.clear_frames(error.__traceback__)  # the refusal stays until the end; what was at hand must not
        raise ScanError("program_fault", f"the program failed on it: {kind} in {where}") from None


def _place(error: Exception) -> str:
    """Name the innermost line of medtl that the error passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_PACKAGE)]
    inner = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    if not inner:
        return "a library"
    return f"medtl/{Path(inner[-1].filename).relative_to(_PACKAGE).as_posix()}, line {inner[-1].lineno}"
