"""How long work says how far it is, without knowing who listens.

A stage calls :func:`advance`; whoever started it (the CLI on a terminal, a test, nobody) installs a listener with
:func:`listening`. The listener lives in a context variable, so it follows work into asyncio's and Prefect's tasks. A
bare thread starts without it: a stage that uses a pool advances from the thread that started the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]

_listener: ContextVar[Listener | None] = ContextVar("medtl_progress", default=None)


def advance(step: str, done: int, total: int) -> None:
    """Tell the listener, if there is one, that ``done`` of ``total`` units of ``step`` are finished."""
    listener = _listener.get()
    if listener is not None:
        listener(step, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send every :func:`advance` inside the block to ``listener(step, done, total)``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
