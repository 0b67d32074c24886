"""Where a network looked in its surest wrong and right answers, and whether that depends on what it learned."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtl.artifacts import code_digest, read_record, write_record
from medtl.audit import AuditedStore
from medtl.config import Config
from medtl.errors import ConfigError
from medtl.progress import advance
from medtl.records import (
    AnyArray,
    Artifact,
    Case,
    Cohort,
    Explanations,
    FloatArray,
    Plan,
    PointingFindings,
    Predictions,
    Scan,
    Task,
)
from pipelines import training
from pipelines.prepared import Prepared, Trained

if TYPE_CHECKING:
    from medtl.evaluation.pointing import Mark

EXPLANATIONS = "explanations.json"
_EACH = 4  # failures, and successes
_CHECKED = 8  # images of the check by forgetting
_AT_ONCE = 8  # images
_POINTED = {"Grad-CAM": 512, "occlusion": 32}  # images of a class whose maps are held against what was drawn, at most
_PLACES = 1 << 26  # of those maps together, at most: 256 MB
Maps = Callable[[Sequence[int], int], FloatArray]  # rows of the pack, number of the class


def explain(config: Config, prepared: Prepared, trained: Trained) -> Artifact:
    """Checkpoint and the test part -> pictures of telling cases with maps that were checked."""
    inputs = {
        "checkpoint": trained.checkpoint.digest,
        "test": trained.test.digest,
        "evaluation": trained.evaluation.digest,
        "scans": prepared.scans.digest,
        "cohort": prepared.cohort.digest,
        "plan": prepared.plan.digest,
        "pack": prepared.pack.digest,
        "uncertainty": config.evaluation.uncertainty.model_dump(mode="json"),
        "explain": config.evaluation.explain,
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
    from medtl.model import devices, io
    from medtl.model.cache import to_images
    from medtl.model.explain import check_sanity
    from medtl.studies.io import read_cohort

    plan, test, known = (
        read_plan(prepared.plan.path), read_predictions(trained.test.path), read_cohort(prepared.cohort.path),
    )  # fmt: skip
    points = read_evaluation(trained.evaluation.path).operating_points
    telling = telling_cases(test, plan.task, plan.classes, points, _EACH)
    pixels, device = read_pack(prepared.pack.path), devices.device_of(config.model)
    slices = slices_of(pixels, len(known.studies))
    place = {study.study_id: row for row, study in enumerate(known.studies)}
    # of a volume that is shown as slices, the middle one
    rows = [place[test.study_ids[one.row]] * slices + slices // 2 for one in telling]
    asked = [one.asked for one in telling]
    devices.make_deterministic(config.seed, training.threads_for(config.model, 1))
    network = io.read_network(trained.checkpoint.path).to(device).eval()
    images = to_images(pixels[rows], device)
    how, method, note, maps = _look(config.evaluation.explain, network, images, asked, plan.task)
    few = partial(how, images=images[:_CHECKED], classes=asked[:_CHECKED], task=plan.task)
    sanity = check_sanity(network, few, method, config.seed, draws=5 if method == "Grad-CAM" else 2)
    cases = tuple(
        Case(one.right, one.truth, one.decision, one.probability, *_pictures(image, relevance, plan.neighbours))
        for one, image, relevance in zip(telling, images.cpu().numpy(), maps, strict=True)
    )
    asking = partial(_maps, partial(how, network, task=plan.task), pixels, device)
    pointing = _point(config, prepared, plan, known, test, method, slices, asking)
    write_record(folder / EXPLANATIONS, Explanations(method, cases, sanity, note, pointing))


def _look(wanted: str, network: Any, images: Any, asked: Sequence[int], task: Task) -> tuple[Any, str, str, FloatArray]:
    """Make maps as it is wanted: the function that makes them, its name, why it is not Grad-CAM, and the maps.

    Raises:
        ConfigError: Grad-CAM is wanted and the network has no map for it.
    """
    from medtl.model.explain import grad_cam, occlusion

    note = "occlusion was asked for (evaluation.explain)"
    if wanted != "occlusion":
        try:
            return grad_cam, "Grad-CAM", "", grad_cam(network, images, asked, task)
        except ConfigError as error:  # a head of neighbours, or nothing with places in the image
            if wanted == "grad_cam":
                raise ConfigError(
                    f"evaluation.explain is grad_cam, and this network cannot be explained so: {error} "
                    "--set evaluation.explain=auto"
                ) from error
            note = str(error)
    return occlusion, "occlusion", note, occlusion(network, images, asked, task)


def _point(
    config: Config,
    prepared: Prepared,
    plan: Plan,
    cohort: Cohort,
    test: Predictions,
    method: str,
    slices: int,
    asking: Maps,
) -> tuple[PointingFindings, ...]:
    """Hold maps against what was drawn, class by class."""
    from medtl.evaluation.pointing import marked_studies, measure_pointing

    place = {study.study_id: row for row, study in enumerate(cohort.studies)}
    images, drawn = _drawn(prepared, cohort)
    marked, said = marked_studies(test, plan.task, plan.classes, drawn)
    each = slices * math.prod(plan.size) * (plan.depth or 1)
    most, found = max(1, min(_POINTED[method] // slices, _PLACES // each)), []
    for index, every in marked.items():
        some = every[:most]
        ids = [test.study_ids[one.row] for one in some]
        maps = asking([place[study] * slices + number for study in ids for number in range(slices)], index)
        one = measure_pointing(
            maps.reshape(len(some), slices, *maps.shape[1:]),
            _marks(config, plan, [(images[study], one.marks) for study, one in zip(ids, some, strict=True)]),
            method,
            plan.classes[index],
            ids,
            [test.patients[one.row] for one in some],
            config.evaluation.uncertainty,
            config.seed,
        )
        few = f"the first {most} of {len(every)} studies with a mark" if len(every) > most else ""
        found.append(replace(one, notes=(*one.notes, *filter(None, (said, few)))))
    return tuple(found)


def _drawn(prepared: Prepared, cohort: Cohort) -> tuple[dict[str, Scan], dict[str, list[Mark]]]:
    """Give the scan of each study, and the masks and boxes of those on which anything was drawn."""
    from medtl.scans.intake import read_scans

    scans = {scan.scan_id: scan for scan in read_scans(prepared.scans.path)}
    images = {study.study_id: scans[study.scan_id] for study in cohort.studies}
    masks: dict[str, list[Mark]] = defaultdict(list)
    for scan in scans.values():
        if scan.mask_of is not None:
            masks[scan.mask_of].append(scan)
    found: dict[str, list[Mark]] = {}
    for study in cohort.studies:
        marks = [*masks.get(study.scan_id, ()), *([study.box] if study.box is not None else [])]
        if marks:
            found[study.study_id] = marks
    return images, found


def _marks(config: Config, plan: Plan, drawn: Sequence[tuple[Scan, Sequence[Mark]]]) -> AnyArray:
    """Lay all marks of each scan together, where the network sees it."""
    from medtl.dataset.transforms import prepare_mark
    from medtl.evaluation.pointing import box_on
    from medtl.scans.segments import PixelStore
    from pipelines.steps import pixel_folder

    read, marks = PixelStore(pixel_folder(config)), []
    for number, (image, some) in enumerate(drawn, 1):
        each = [read(one) > 0 if isinstance(one, Scan) else box_on(image, one) for one in some]
        marks.append(prepare_mark(np.any(each, axis=0), image, plan))
        advance("reading masks", number, len(drawn))
    return np.stack(marks)


def _maps(how: Any, pixels: AnyArray, device: Any, rows: Sequence[int], asked: int) -> FloatArray:
    """Make the maps of some rows of the pack, all of one class, a few at a time."""
    from medtl.model.cache import to_images

    parts = [list(rows[start : start + _AT_ONCE]) for start in range(0, len(rows), _AT_ONCE)]
    return np.concatenate([how(to_images(pixels[part], device), [asked] * len(part)) for part in parts])


def _pictures(image: AnyArray, relevance: AnyArray, neighbours: int) -> tuple[str, str]:
    """Give an image as it is and with its map, as PNG in base64; of neighbouring slices the middle one."""
    from medtl.model.explain import overlay, thumbnail

    shown = image[neighbours : neighbours + 1] if neighbours else image
    plain = overlay(shown, np.zeros_like(relevance)).picture
    return tuple(base64.b64encode(thumbnail(one)).decode() for one in (plain, overlay(shown, relevance).picture))  # type: ignore[return-value]
