"""What a child process that reads strangers' files is given: no secret, and no more memory and time than it needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # where some installations keep their libraries


def bare_environment() -> dict[str, str]:
    """Give a child what it needs to find its libraries, and no secret."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    places = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
    # One thread: a BLAS pool would take address space for work that is not done there.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **threads, "PYTHONPATH": os.pathsep.join(places), "LC_ALL": "C.UTF-8"}


def limit_this_process(more_memory_bytes: int, cpu_seconds: int, file_bytes: int) -> None:
    """Hold this process to so much more memory and processor time than it has used, and to files of that size.

    No core dump: it would hold what was read. Where the system does not tell how much address space is in use (not
    Linux), memory is held to 64 GiB and the allowance.
    """
    import resource

    pages = _pages_in_use()
    in_use = pages * resource.getpagesize() if pages is not None else 64 << 30
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + cpu_seconds + 1
    resource.setrlimit(resource.RLIMIT_AS, (in_use + more_memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (until, until + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _pages_in_use() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
