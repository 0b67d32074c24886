"""The only file with ``@task``: a name, nothing more. A task is one step, a second of work or more.

Tasks are asynchronous and do their work in a thread: an asynchronous flow costs a tenth of a second where a synchronous
one costs a whole one, and its heartbeat goes on while a step computes. They run without Prefect's cache, because a path
that stays the same says nothing about the bytes behind it; :mod:`medtl.artifacts` decides what is done already.
Nothing is retried: a step that failed on its input fails again, and after a crash the same command goes on
where it was.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipelines import (
    apply,
    contenders,
    examination,
    explanations,
    growth,
    incumbent,
    pooling,
    segmenting,
    steps,
    unlabelled,
    validation,
)

P = ParamSpec("P")
R = TypeVar("R")


async def _beside(work: Callable[[], R]) -> R:
    """Do work in a daemon thread: a signal ends the process at once instead of after the work (which is resumable)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[R] = loop.create_future()
    context = copy_context()

    def finish(result: R | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = context.run(work)
        except BaseException as caught:  # handed on to whoever awaits, whatever it is
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, daemon=True, name="medtl-step").start()
    return await future


def _task(step: Callable[P, R]) -> Callable[P, Awaitable[R]]:
    @wraps(step)
    async def in_thread(*args: P.args, **kwargs: P.kwargs) -> R:
        return await _beside(partial(step, *args, **kwargs))

    made: Any = task(name=step.__name__.replace("_", "-"), cache_policy=NO_CACHE, persist_result=False, tags=["medtl"])
    named: Callable[P, Awaitable[R]] = made(in_thread)
    return named


fetch_scans = _task(steps.fetch_scans)
ingest_scans = _task(steps.ingest_scans)
build_cohort = _task(steps.build_cohort)
split_by_patient = _task(steps.split_by_patient)
split_into_folds = _task(steps.split_into_folds)
make_plan = _task(steps.make_plan)
pack_images = _task(steps.pack_images)
fit_in_phases = _task(steps.fit_in_phases)
predict_part = _task(steps.predict_part)
calibrate = _task(examination.calibrate)
apply_calibrator = _task(examination.apply_calibrator)
evaluate = _task(steps.evaluate)
look_inside = _task(examination.look_inside)
stress = _task(examination.stress)
examine = _task(examination.examine)
explain = _task(explanations.explain)
pool_folds = _task(pooling.pool_folds)
compare_folds = _task(pooling.compare_folds)
write_folds = _task(pooling.write_folds)
compare = _task(steps.compare)
compare_with_live = _task(incumbent.compare_with_live)
make_release = _task(steps.make_release)
plan_grid = _task(segmenting.plan_grid)
pack_volumes = _task(segmenting.pack_volumes)
fit_masks = _task(segmenting.fit_masks)
refit_masks = _task(segmenting.refit_masks)
predict_masks = _task(segmenting.predict_masks)
evaluate_masks = _task(segmenting.evaluate_masks)
compare_masks = _task(segmenting.compare_masks)
pool_mask_folds = _task(segmenting.pool_mask_folds)
release_masks = _task(segmenting.release_masks)
report_masks = _task(segmenting.report_masks)
write_report = _task(steps.write_report)
validate_elsewhere = _task(validation.validate_elsewhere)
apply_release = _task(apply.apply_release)
take_patients = _task(contenders.take_patients)
draw_learning_curve = _task(growth.draw_learning_curve)
add_to_vault = _task(steps.add_to_vault)
gather_cohort = _task(unlabelled.gather_cohort)
hold_out = _task(unlabelled.hold_out)
plan_scans = _task(unlabelled.plan_scans)
pack_scans = _task(unlabelled.pack_scans)
fit_reconstruction = _task(unlabelled.fit_reconstruction)
keep_weights = _task(unlabelled.keep_weights)
