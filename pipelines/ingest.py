"""Files -> scans."""

from typing import Any

from prefect import flow

from medtl.config import Config
from pipelines import results, tasks
from pipelines.trail import recorded


@flow(name="ingest")
@recorded
async def ingest(config: Config) -> dict[str, Any]:
    """Read every file of the source once; count what became a scan and what did not."""
    if results.fetches(config):
        await tasks.fetch_scans(config)
    scans = await tasks.ingest_scans(config)
    return results.summarise_ingest(scans)
