"""Scans -> checkpoint."""

from typing import Any

from prefect import flow

from medtl.config import Config
from medtl.records import Artifact
from pipelines import results, tasks
from pipelines.prepared import Prepared
from pipelines.trail import recorded


async def prepare(config: Config) -> Prepared:
    """Bring scans and labels as far as one packed array."""
    scans = await tasks.ingest_scans(config)
    cohort = await tasks.build_cohort(config, scans)
    return await packed(config, scans, cohort, await tasks.split_by_patient(config, scans, cohort))


async def packed(config: Config, scans: Artifact, cohort: Artifact, split: Artifact) -> Prepared:
    """Plan from the training part of a split, and pack what it needs."""
    if config.segments:
        plan = await tasks.plan_grid(config, scans, cohort, split)
        return Prepared(scans, cohort, split, plan, await tasks.pack_volumes(config, scans, cohort, plan))
    plan = await tasks.make_plan(config, scans, cohort, split)
    return Prepared(scans, cohort, split, plan, await tasks.pack_images(config, scans, cohort, plan))


async def fit(config: Config, prepared: Prepared, scratch: bool = False) -> Artifact:
    """Train one model on what was prepared."""
    if config.segments:
        return await tasks.fit_masks(config, prepared, scratch)
    return await tasks.fit_in_phases(config, prepared.cohort, prepared.split, prepared.plan, prepared.pack, scratch)


async def fit_again(config: Config, prepared: Prepared, chosen: Artifact, scratch: bool = False) -> Artifact:
    """Train once more on validation too, where that is asked for; otherwise what validation chose is what serves."""
    if not (config.segments and config.model.segmenter.refit):
        return chosen
    return await tasks.refit_masks(config, prepared, chosen, scratch)


@flow(name="train")
@recorded
async def train(config: Config) -> dict[str, Any]:
    """Train a model in phases; the test part stays sealed."""
    prepared = await prepare(config)
    chosen = await fit(config, prepared)
    return results.summarise_training(await fit_again(config, prepared, chosen))
