"""Checkpoint -> evaluation."""

from typing import Any

from prefect import flow

from medtl.config import Config
from pipelines import results, steps, tasks
from pipelines.train import fit, prepare


async def measure(config: Config, prepared: steps.Prepared, scratch: bool = False) -> steps.Trained:
    """Train one model, open the test part, measure."""
    checkpoint = await fit(config, prepared, scratch)
    shared = (checkpoint, prepared.cohort, prepared.split, prepared.pack)
    val = await tasks.predict_part(config, *shared, "val")
    test = await tasks.predict_part(config, *shared, "test", "reference" if scratch else "model")
    return steps.Trained(checkpoint, val, test, await tasks.evaluate(config, prepared.plan, val, test))


@flow(name="evaluate")
async def evaluate(config: Config) -> dict[str, Any]:
    """Measure the model on the test part, training it first if that is not done."""
    prepared = await prepare(config)
    return results.summarise_evaluation(await measure(config, prepared))
