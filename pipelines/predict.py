"""New scans -> a table of probabilities and decisions, by a release's own plan and operating point."""

from typing import Any

from prefect import flow

from medtl.config import Config
from pipelines import tasks
from pipelines.apply import Request
from pipelines.trail import recorded


@flow(name="predict")
@recorded
async def predict(config: Config, request: Request) -> dict[str, Any]:
    """Apply a release to a folder of new scans."""
    only_these = config.scans.model_copy(update={"source": request.scans, "pacs": None})
    config = config.model_copy(update={"scans": only_these})
    scans = await tasks.ingest_scans(config)
    return await tasks.apply_release(config, scans, request)
