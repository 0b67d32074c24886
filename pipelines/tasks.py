"""The only file with ``@task``: a name, nothing more. A task is one step, a second of work or more.

Tasks are asynchronous and do their work in a thread: an asynchronous flow costs a tenth of a second where a synchronous
one costs a whole one, and its heartbeat goes on while a step computes. They run without Prefect's cache, because a path
that stays the same says nothing about the bytes behind it; :mod:`medtl.artifacts` decides what is done already.
Nothing is retried: a step that failed on its input fails again, and after a crash the same command goes on
where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipelines import apply, steps

P = ParamSpec("P")
R = TypeVar("R")


def _task(step: Callable[P, R]) -> Callable[P, Awaitable[R]]:
    @wraps(step)
    async def in_thread(*args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.to_thread(step, *args, **kwargs)

    made: Any = task(name=step.__name__.replace("_", "-"), cache_policy=NO_CACHE, persist_result=False, tags=["medtl"])
    named: Callable[P, Awaitable[R]] = made(in_thread)
    return named


ingest_scans = _task(steps.ingest_scans)
build_cohort = _task(steps.build_cohort)
split_by_patient = _task(steps.split_by_patient)
make_plan = _task(steps.make_plan)
pack_images = _task(steps.pack_images)
fit_in_phases = _task(steps.fit_in_phases)
predict_part = _task(steps.predict_part)
evaluate = _task(steps.evaluate)
compare = _task(steps.compare)
make_release = _task(steps.make_release)
write_report = _task(steps.write_report)
apply_release = _task(apply.apply_release)
add_to_vault = _task(steps.add_to_vault)
