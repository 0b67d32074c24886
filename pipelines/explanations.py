"""Where a network looked in its surest wrong and right answers, and whether that depends on what it learned."""

from __future__ import annotations

import base64
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medtl.artifacts import code_digest, read_record, write_record
from medtl.audit import AuditedStore
from medtl.config import Config
from medtl.errors import ConfigError
from medtl.records import AnyArray, Artifact, Case, Explanations
from pipelines.prepared import Prepared, Trained

EXPLANATIONS = "explanations.json"
_EACH = 4  # failures, and successes
_CHECKED = 8  # images of the check by forgetting


def explain(config: Config, prepared: Prepared, trained: Trained) -> Artifact:
    """Checkpoint and the test part -> pictures of telling cases with maps that were checked."""
    inputs = {
        "checkpoint": trained.checkpoint.digest,
        "test": trained.test.digest,
        "evaluation": trained.evaluation.digest,
        "cohort": prepared.cohort.digest,
        "plan": prepared.plan.digest,
        "pack": prepared.pack.digest,
        "seed": config.seed,
        "code": code_digest("model", "dataset", "evaluation"),
    }
    return AuditedStore(config.workspace).make(
        "explanations", inputs, lambda folder: _explain(config, prepared, trained, folder)
    )


def read_explanations(folder: Path) -> Explanations:
    """Read explanations back."""
    return read_record(folder / EXPLANATIONS, Explanations)


def _explain(config: Config, prepared: Prepared, trained: Trained, folder: Path) -> None:
    from medtl.dataset.io import read_pack, read_plan
    from medtl.dataset.loading import slices_of
    from medtl.evaluation.cases import telling_cases
    from medtl.evaluation.io import read_evaluation, read_predictions
    from medtl.model import fit, io
    from medtl.model.cache import to_images
    from medtl.model.explain import check_sanity, grad_cam, occlusion
    from medtl.studies.io import read_cohort

    plan, test, known = (
        read_plan(prepared.plan.path), read_predictions(trained.test.path), read_cohort(prepared.cohort.path),
    )  # fmt: skip
    points = read_evaluation(trained.evaluation.path).operating_points
    telling = telling_cases(test, plan.task, plan.classes, points, _EACH)
    pixels, device = read_pack(prepared.pack.path), fit.device_of(config.model)
    slices = slices_of(pixels, len(known.studies))
    place = {study.study_id: row for row, study in enumerate(known.studies)}
    # of a volume that is shown as slices, the middle one
    rows = [place[test.study_ids[one.row]] * slices + slices // 2 for one in telling]
    asked = [one.asked for one in telling]
    fit.make_deterministic(config.seed, config.model.threads)
    network = io.read_network(trained.checkpoint.path).to(device).eval()
    images, method, note = to_images(pixels[rows], device), "Grad-CAM", ""
    how: Any = grad_cam
    try:
        maps = grad_cam(network, images, asked, plan.task)
    except ConfigError as error:  # a head of neighbours, or nothing with places in the image
        how, method, note = occlusion, "occlusion", str(error)
        maps = occlusion(network, images, asked, plan.task)
    few = partial(how, images=images[:_CHECKED], classes=asked[:_CHECKED], task=plan.task)
    sanity = check_sanity(network, few, method, config.seed, draws=5 if how is grad_cam else 2)
    cases = tuple(
        Case(one.right, one.truth, one.decision, one.probability, *_pictures(image, relevance, plan.neighbours))
        for one, image, relevance in zip(telling, images.cpu().numpy(), maps, strict=True)
    )
    write_record(folder / EXPLANATIONS, Explanations(method, cases, sanity, note))


def _pictures(image: AnyArray, relevance: AnyArray, neighbours: int) -> tuple[str, str]:
    """Give an image as it is and with its map, as PNG in base64; of neighbouring slices the middle one."""
    from medtl.model.explain import overlay, thumbnail

    shown = image[neighbours : neighbours + 1] if neighbours else image
    plain = overlay(shown, np.zeros_like(relevance)).picture
    return tuple(base64.b64encode(thumbnail(one)).decode() for one in (plain, overlay(shown, relevance).picture))  # type: ignore[return-value]
