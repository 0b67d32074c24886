"""Checkpoint -> evaluation."""

import logging
from dataclasses import replace
from typing import Any

from prefect import flow

from medtl.config import Config
from medtl.errors import ModelError, SplitError
from medtl.records import Artifact
from pipelines import growth, results, tasks
from pipelines.prepared import Prepared, Segmented, Trained
from pipelines.trail import recorded
from pipelines.train import fit, fit_again, prepare

log = logging.getLogger("medtl")


async def measure(config: Config, prepared: Prepared, scratch: bool = False) -> Trained:
    """Train one model, open the test part, measure; of the model that may serve, look at what its answers are worth."""
    checkpoint = await fit(config, prepared, scratch)
    trained = await measured(config, prepared, prepared.split, checkpoint, "reference" if scratch else "model")
    if scratch:
        return trained
    inside = await tasks.look_inside(config, checkpoint, prepared)
    stressed = await tasks.stress(config, prepared, trained)
    examination = await tasks.examine(config, prepared, trained, inside, stressed)
    return replace(trained, examination=examination, explanations=await tasks.explain(config, prepared, trained))


async def measured(config: Config, prepared: Prepared, split: Artifact, checkpoint: Artifact, purpose: str) -> Trained:
    """Predict, calibrate on validation, open the test part, measure."""
    shared = (checkpoint, prepared.cohort, split, prepared.pack)
    val = await tasks.predict_part(config, *shared, "val")
    calibrator = await tasks.calibrate(config, prepared.plan, val)
    test = await tasks.predict_part(config, *shared, "test", purpose)
    told_val, told_test = [await tasks.apply_calibrator(config, calibrator, part) for part in (val, test)]
    evaluation = await tasks.evaluate(config, prepared.plan, told_val, told_test)
    return Trained(checkpoint, calibrator, test, told_val, told_test, evaluation)


async def measure_masks(config: Config, prepared: Prepared, purpose: str = "model", scratch: bool = False) -> Segmented:
    """Train one segmentation, choose on validation how masks are cleaned, open the test part, measure.

    Where it is trained once more on validation too, what was chosen there was chosen with the network before.
    """
    chosen = await fit(config, prepared, scratch)
    val = await tasks.predict_masks(config, prepared, chosen, "val")
    checkpoint = await fit_again(config, prepared, chosen, scratch)
    test = await tasks.predict_masks(config, prepared, checkpoint, "test", purpose)
    return Segmented(checkpoint, val, test, await tasks.evaluate_masks(config, prepared, val, test), chosen=chosen)


async def learning_curve(config: Config, prepared: Prepared, checkpoint: Artifact) -> Artifact | None:
    """Do the model's training again on fewer patients, as often as asked for; the test part stays closed."""
    if not config.report.learning_curve:
        return None
    *sizes, whole = growth.sizes_of(config, prepared)
    found, note = [growth.Grown(prepared.split, await _validated(config, prepared, checkpoint))], ""
    for size in reversed(sizes):
        log.info("learning curve: training on %d of %d patients", size, whole)
        try:
            split = await tasks.take_patients(config, prepared.cohort, prepared.split, size)
            fewer = replace(prepared, split=split)
            found.append(growth.Grown(split, await _validated(config, fewer, await fit(config, fewer))))
        except (SplitError, ModelError) as error:  # what so few cannot do, fewer cannot either; the page says it
            note = f"training on {size:,} patients failed: {error}"
            log.warning("learning curve: %s", note)
            break
    note = note or growth.why_no_more(config, len(sizes))
    return await tasks.draw_learning_curve(config, prepared, found[::-1], note)


async def _validated(config: Config, prepared: Prepared, checkpoint: Artifact) -> Artifact:
    if config.segments:
        return await tasks.predict_masks(config, prepared, checkpoint, "val")
    return await tasks.predict_part(config, checkpoint, prepared.cohort, prepared.split, prepared.pack, "val")


@flow(name="evaluate")
@recorded
async def evaluate(config: Config) -> dict[str, Any]:
    """Measure the model on the test part, training it first if that is not done."""
    prepared = await prepare(config)
    if config.segments:
        return results.summarise_evaluation(await measure_masks(config, prepared))
    return results.summarise_evaluation(await measure(config, prepared))
