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
from contextlib import contextmanager
from pathlib import Path

from medtl.errors import MedtlError, ScanError

_PACKAGE = Path(__file__).parent.parent
_OURS = (RecursionError, NotImplementedError)  # of RuntimeError; the others are threads and processes that end
_NOT_A_FILES = (MedtlError, OSError, MemoryError, RuntimeError)

log = logging.getLogger(__name__)


@contextmanager
def faults_refused() -> Iterator[None]:
    """Turn a fault of the program into the refusal of what it is at work on.

    Raises:
        ScanError: ``program_fault``.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _NOT_A_FILES) and not isinstance(error, _OURS):
            raise
        where = _place(error)
        log.error("the program failed on one file or series, which is refused: %s in %s", type(error).__name__, where)
        raise ScanError("program_fault", f"the program failed on it: {type(error).__name__} in {where}") from error


def _place(error: Exception) -> str:
    """Name the innermost line of medtl that the error passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_PACKAGE)]
    inner = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    if not inner:
        return "a library"
    return f"medtl/{Path(inner[-1].filename).relative_to(_PACKAGE).as_posix()}, line {inner[-1].lineno}"
