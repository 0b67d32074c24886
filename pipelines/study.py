"""A cohort study: every strategy on one split, and how much data each of them needs.

Every contender is trained on the same training part, chosen on the same validation part and measured on the same test
part, with intervals over its patients and the paired difference to training from scratch. The test part is opened once
for each; the audit log counts that, and so does every later report on this split.
"""

import time
from typing import Any

from prefect import flow

from medtl.config import Config
from medtl.records import Artifact, Trial
from pipelines import contenders, results, tasks
from pipelines.evaluate import measured
from pipelines.prepared import Prepared, Trained
from pipelines.trail import recorded
from pipelines.train import prepare

REFERENCE = "scratch"


async def _measure(config: Config, strategy: str, prepared: Prepared, split: Artifact) -> Trained:
    chosen = contenders.with_strategy(config, strategy)
    checkpoint = await tasks.fit_in_phases(chosen, prepared.cohort, split, prepared.plan, prepared.pack, False)
    return await measured(chosen, prepared, split, checkpoint, "study")


@flow(name="study")
@recorded
async def study(config: Config, strategies: list[str], curve: list[str], patients: list[int]) -> dict[str, Any]:
    """Train and measure every strategy on all patients, and those of ``curve`` on fewer; write one page."""
    started = time.perf_counter()
    for name in {*strategies, *curve}:
        contenders.with_strategy(config, name)
    prepared = await prepare(config)
    whole = results.training_patients(prepared)
    trials = await _side_by_side(config, strategies, prepared, prepared.split, whole)
    points: list[Trial] = []
    for size in (patients or contenders.curve_sizes(whole)) if curve else []:
        split = (
            await tasks.take_patients(config, prepared.cohort, prepared.split, size) if size < whole else prepared.split
        )
        points += await _side_by_side(config, curve, prepared, split, whole)
    page, figures = contenders.write_study(config, trials, points, results.study_facts(config, prepared))
    return {**figures, "report": str(page), "seconds": round(time.perf_counter() - started, 2)}


async def _side_by_side(
    config: Config, strategies: list[str], prepared: Prepared, split: Artifact, whole: int
) -> list[Trial]:
    trained = {name: await _measure(config, name, prepared, split) for name in strategies}
    paired: dict[str, Artifact | None] = {}
    for name, one in trained.items():
        compared = REFERENCE in trained and name != REFERENCE
        paired[name] = await tasks.compare(config, one.test, trained[REFERENCE].test) if compared else None
    chances = contenders.p_values(paired)
    return [
        contenders.trial_of(config, name, split, whole, one, paired[name], chances.get(name), trained.get(REFERENCE))
        for name, one in trained.items()
    ]
