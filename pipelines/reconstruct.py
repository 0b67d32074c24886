"""Scans without labels -> weights in the vault, for a segmentation that has none to start from."""

from typing import Any

from prefect import flow

from medtl.config import Config
from pipelines import tasks, unlabelled
from pipelines.prepared import Prepared
from pipelines.trail import recorded


@flow(name="reconstruct")
@recorded
async def reconstruct(config: Config, into: str, licence: str | None, citation: str | None) -> dict[str, Any]:
    """Hide blocks of scans and learn to fill them in; put the weights into the vault under a name."""
    config = unlabelled.settled(config)
    scans = await tasks.ingest_scans(config)
    whole = None
    if unlabelled.is_unlabelled(config):
        cohort = await tasks.gather_cohort(config, scans)
    else:
        cohort = await tasks.build_cohort(config, scans)
        whole = await tasks.split_by_patient(config, scans, cohort)
    split = await tasks.hold_out(config, cohort, whole)
    if config.segments and whole is not None:  # the study's own plan: its weights see what it will see
        plan = await tasks.plan_grid(config, scans, cohort, whole)
    else:
        plan = await tasks.plan_scans(config, scans, cohort, split)
    pack = await tasks.pack_scans(config, scans, cohort, split, plan)
    prepared = Prepared(scans, cohort, split, plan, pack)
    checkpoint = await tasks.fit_reconstruction(config, prepared)
    return await tasks.keep_weights(config, prepared, checkpoint, into, licence, citation)
