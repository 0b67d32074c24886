"""The whole way: a folder of scans in, a validated model and its report out.

Flow modules do not postpone annotations: Prefect checks a scheduled run's parameters against them in a process of its
own, where it cannot resolve their names, and the run would fail without a word.
"""

import time
from dataclasses import replace
from typing import Any

from prefect import flow

from medtl.config import Config
from pipelines import results, tasks
from pipelines.evaluate import learning_curve, measure, measure_masks
from pipelines.prepared import Prepared
from pipelines.trail import recorded
from pipelines.train import prepare


@flow(name="run")
@recorded
async def run(config: Config) -> dict[str, Any]:
    """Ingest, train, measure, release, report; a run whose every input is unchanged does nothing."""
    started = time.perf_counter()
    if results.fetches(config):
        await tasks.fetch_scans(config)
    key, done = results.key_now(config), results.finished_run(config)
    if done is not None:
        return {**done, "reused": True, "seconds": _since(started), "peak_memory_mb": results.peak_memory_mb()}
    prepared = await prepare(config)
    if config.segments:
        return await _segment(config, prepared, key, started)
    trained = await measure(config, prepared)
    trained = replace(trained, growth=await learning_curve(config, prepared, trained.checkpoint))
    scratch = await measure(config, prepared, scratch=True) if config.model.scratch else None
    comparison = None
    if scratch:
        both = (trained.evaluation, scratch.evaluation)
        comparison = await tasks.compare(config, trained.test, scratch.test, evaluations=both)
    beside = await tasks.compare_with_live(config, prepared, trained)
    artifact, release = await tasks.make_release(config, prepared, trained, beside)
    resources = {"seconds": _since(started), "peak_memory_mb": results.peak_memory_mb()}
    report, page = await tasks.write_report(config, prepared, trained, scratch, comparison, release, resources, beside)
    summary = results.summarise(config, prepared, trained, scratch, comparison, release, page)
    results.remember_run(
        config, key, (*results.artifacts_of(prepared, trained, scratch, comparison), artifact, report), summary
    )
    return {**summary, "reused": False, **resources}


async def _segment(config: Config, prepared: Prepared, key: str, started: float) -> dict[str, Any]:
    """Go the second half of the way for a segmentation."""
    segmented = await measure_masks(config, prepared)
    segmented = replace(segmented, growth=await learning_curve(config, prepared, segmented.chosen))
    scratch = await measure_masks(config, prepared, "reference", scratch=True) if config.model.scratch else None
    comparison = await tasks.compare_masks(config, [segmented], [scratch]) if scratch else None
    artifact, release = await tasks.release_masks(config, prepared, segmented)
    resources = {"seconds": _since(started), "peak_memory_mb": results.peak_memory_mb()}
    report, page = await tasks.report_masks(config, prepared, segmented, scratch, comparison, release, resources)
    summary = results.summarise(config, prepared, segmented, scratch, comparison, release, page)
    found = (*results.artifacts_of(prepared, segmented, scratch, comparison), artifact, report)
    results.remember_run(config, key, found, summary)
    return {**summary, "reused": False, **resources}


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
