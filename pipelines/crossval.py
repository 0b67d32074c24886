"""A cohort in folds: each fold tested by a model that saw nobody of it, pooled with intervals over patients.

By patient or by site, as ``dataset.folds`` says. Folds whose plans agree share one array and one pass through the
frozen layers. No model of a fold becomes a release: what they say is about the way of training.
"""

import time
from typing import Any

from prefect import flow

from medtl.config import Config
from medtl.records import Artifact
from pipelines import pooling, tasks
from pipelines.evaluate import measure_masks, measured
from pipelines.prepared import Prepared, Segmented, Trained
from pipelines.trail import recorded
from pipelines.train import packed


@flow(name="crossval")
@recorded
async def crossval(config: Config) -> dict[str, Any]:
    """Train and test every fold, pool, write one page."""
    started = time.perf_counter()
    scans = await tasks.ingest_scans(config)
    cohort = await tasks.build_cohort(config, scans)
    found, scratch = [], []
    for name, repeat, split in await tasks.split_into_folds(config, scans, cohort):
        prepared = await packed(config, scans, cohort, split)
        found.append(pooling.Tested(name, repeat, await _tested(config, prepared), prepared))
        if config.model.scratch:
            bare = await _tested(config, prepared, scratch=True)
            scratch.append(pooling.Tested(name, repeat, bare, prepared))
    pool = tasks.pool_mask_folds if config.segments else tasks.pool_folds
    pooled = await pool(config, cohort, found)
    beside = None
    if scratch:
        both = await pool(config, cohort, scratch), await _compared(config, cohort, found, scratch)
        beside = pooling.Reference(scratch, *both)
    page, figures = await tasks.write_folds(config, cohort, pooled, found, beside)
    return {**figures, "report": str(page), "seconds": round(time.perf_counter() - started, 2)}


async def _tested(config: Config, prepared: Prepared, scratch: bool = False) -> Trained | Segmented:
    """Train on one fold and measure on its test part."""
    purpose = "reference" if scratch else "fold"
    if config.segments:
        return await measure_masks(config, prepared, purpose, scratch)
    cohort, split, plan, pack = prepared.cohort, prepared.split, prepared.plan, prepared.pack
    checkpoint = await tasks.fit_in_phases(config, cohort, split, plan, pack, scratch, True)
    return await measured(config, prepared, split, checkpoint, purpose)


async def _compared(
    config: Config, cohort: Artifact, found: list[pooling.Tested], scratch: list[pooling.Tested]
) -> Artifact:
    if not config.segments:
        return await tasks.compare_folds(config, cohort, found, scratch)
    sides = [[one.trained for one in side if isinstance(one.trained, Segmented)] for side in (found, scratch)]
    return await tasks.compare_masks(config, *sides)
