"""A source task -> weights in the vault, for a target that has none to start from."""

from typing import Any

from prefect import flow

from medtl.config import Config
from pipelines import tasks
from pipelines.trail import recorded
from pipelines.train import fit, prepare


@flow(name="pretrain")
@recorded
async def pretrain(config: Config, target: Config) -> dict[str, Any]:
    """Train on the source task; put the trunk into the target's vault under the source's name."""
    checkpoint = await fit(config, await prepare(config))
    return await tasks.add_to_vault(config, target, checkpoint)
