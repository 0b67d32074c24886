"""Progress goes to whoever listens: the innermost, in tasks too, and never after the block."""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor

import pytest

from medtl.progress import advance, listening

Heard = list[tuple[str, int, int]]


def test_the_innermost_listener_hears_and_the_outer_one_hears_again_afterwards() -> None:
    outer: Heard = []
    inner: Heard = []
    with listening(lambda *what: outer.append(what)):
        with listening(lambda *what: inner.append(what)):
            advance("a", 1, 2)
        advance("b", 2, 2)
    assert (inner, outer) == ([("a", 1, 2)], [("b", 2, 2)])


def test_a_listener_is_gone_after_an_error() -> None:
    heard: Heard = []
    with pytest.raises(RuntimeError), listening(lambda *what: heard.append(what)):
        raise RuntimeError
    advance("after", 1, 1)
    assert heard == []


def test_asynchronous_tasks_and_copied_contexts_hear_and_bare_threads_do_not() -> None:
    heard: Heard = []

    async def work() -> None:
        await asyncio.gather(*(asyncio.create_task(asyncio.to_thread(advance, "task", n, 2)) for n in (1, 2)))

    with listening(lambda *what: heard.append(what)), ThreadPoolExecutor(1) as pool:
        asyncio.run(work())
        pool.submit(advance, "bare", 1, 1).result()
        pool.submit(contextvars.copy_context().run, advance, "copied", 1, 1).result()
    assert sorted(heard) == [("copied", 1, 1), ("task", 1, 2), ("task", 2, 2)]
