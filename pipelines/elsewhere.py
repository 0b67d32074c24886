"""Labelled scans from elsewhere -> whether a release holds there."""

from typing import Any

from prefect import flow

from medtl.config import Config
from pipelines import tasks
from pipelines.trail import recorded
from pipelines.validation import Elsewhere


@flow(name="elsewhere")
@recorded
async def elsewhere(config: Config, asked: Elsewhere) -> dict[str, Any]:
    """Measure a release on labelled scans of another hospital, another scanner or another year."""
    only_these = config.scans.model_copy(update={"source": asked.scans, "pacs": None})
    config = config.model_copy(update={"scans": only_these})
    scans = await tasks.ingest_scans(config)
    return await tasks.validate_elsewhere(config, scans, asked)
