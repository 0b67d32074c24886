"""A release applied to new scans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtl.artifacts import file_digest, read_record
from medtl.audit import AuditLog
from medtl.config import Config
from medtl.pseudonyms import load_pseudonymiser
from medtl.records import AnyArray, Artifact, Evaluation, Exclusion, FloatArray, Plan, Scan, Tally
from pipelines import training
from pipelines.examination import TALLY, Weighed, weigh
from pipelines.results import excluded

if TYPE_CHECKING:
    from medtl.scans.sources import SourceFile


@dataclass(frozen=True)
class Request:
    """What to predict, with which release, and where the table goes."""

    scans: Path
    out: Path | None = None
    release: str | None = None
    allow_candidate: bool = False
    names: bool = True


def apply_release(config: Config, scans: Artifact, request: Request) -> dict[str, Any]:
    """Prepare new scans by a release's plan, predict, decide at its operating point, write the table."""
    from medtl.dataset.io import read_plan
    from medtl.dataset.plan import misfit
    from medtl.delivery import table
    from medtl.delivery.io import write_table
    from medtl.evaluation.io import read_evaluation
    from medtl.model import io
    from medtl.monitoring.tally import tally
    from medtl.registry.io import Register
    from medtl.scans.intake import names_of, read_scans
    from pipelines.steps import note_unvalidated, source_files

    register = Register(config.workspace)
    entry = register.choose(config.name, request.release, request.allow_candidate)
    note_unvalidated(config, entry.release)
    folder = register.open(entry)
    if io.read_checkpoint(folder).head == "mask":
        from pipelines.apply_masks import apply_segmentation

        return apply_segmentation(config, scans, request, entry, folder)
    plan, evaluation = read_plan(folder), read_evaluation(folder)
    known = {scan: misfit(scan, plan) for scan in read_scans(scans.path) if scan.mask_of is None}
    found = [scan for scan, why in known.items() if why is None]
    probabilities, weighed = _probabilities(config, folder, found, plan, evaluation)
    decisions = table.decide(probabilities, evaluation)

    files = source_files(config)
    names = names_of(files, scans.path)
    excluded_here = left_out(config, scans, files)
    unfit = [
        (Exclusion(scan.scan_id[:16], "dataset", _misfit_code(scan, plan), why), name)
        for scan, why in known.items()
        if why is not None
        for name in names[scan.scan_id]
    ]
    columns, rows = table.rows_of(
        [(scan.scan_id, names[scan.scan_id]) for scan in found],
        probabilities,
        decisions,
        weighed.doubts,
        plan.classes,
        excluded_here + unfit,
        request.names,
    )
    release = entry.release.release_id
    out = request.out or Path(f"predictions-{release}.csv")
    write_table(out, columns, rows)
    details = {
        "scans": scans.digest,
        "table": file_digest(out),
        "count": len(found),
        "excluded": len(excluded_here) + len(unfit),
        **counted(tally([scan.patient for scan in found], weighed.counts, weighed.promised), released_with(folder)),
    }
    AuditLog(config.workspace).append("release.applied", release, details=details)
    return {
        "release": release,
        "status": entry.release.status,
        "table": str(out),
        "scans": len(found),
        "excluded": dict(Counter(e.code for e in (*excluded(scans), *(e for e, _ in unfit)))),
        "decisions": dict(Counter(decisions)),
        "doubts": dict(Counter(doubt for one in weighed.doubts for doubt in one)),
    }


def _probabilities(
    config: Config, folder: Path, scans: Sequence[Scan], plan: Plan, evaluation: Evaluation
) -> tuple[FloatArray, Weighed]:
    """Predict scans that fit the plan, (scans, classes); weigh what speaks against believing it."""
    from medtl.dataset.loading import voted
    from medtl.dataset.transforms import prepare_scan
    from medtl.model import devices, io
    from medtl.model.predict import look
    from medtl.scans.segments import PixelStore
    from pipelines.steps import pixel_folder

    devices.make_deterministic(config.seed, training.threads_for(config.model, 1))
    if not scans:
        return np.zeros((0, len(plan.classes))), Weighed()
    pixels, size = PixelStore(pixel_folder(config)), max(1, config.model.batch_size // plan.slices)

    def batches() -> Iterator[tuple[AnyArray, FloatArray]]:
        for start in range(0, len(scans), size):
            images = np.concatenate([prepare_scan(pixels(scan), scan, plan) for scan in scans[start : start + size]])
            yield images, np.full((len(images), len(plan.classes)), np.nan)

    by_row, inside = look(io.read_network(folder), batches(), plan.task, devices.device_of(config.model))
    features = inside.reshape(len(scans), -1, inside.shape[1]).mean(axis=1)
    return weigh(folder, voted(by_row, plan.slices), features, evaluation)


def released_with(folder: Path) -> Tally | None:
    """Read what a release said of its own test part; a release from before that was counted does not know."""
    path = folder / TALLY
    return read_record(path, Tally) if path.is_file() else None


def counted(now: Tally | None, then: Tally | None) -> dict[str, Any]:
    """Give what the trail holds of a use, for drift to be measured by: nothing where it was of too few."""
    return {} if now is None else {"tally": asdict(now), "released_with": then and asdict(then)}


def left_out(config: Config, scans: Artifact, files: Sequence[SourceFile]) -> list[tuple[Exclusion, str]]:
    """Give what intake left out with the name of its file; a duplicate has a row of its own already."""
    keys = load_pseudonymiser(config.scans.key_file)
    by_item = {keys.file(file.relative): file.relative for file in files}
    return [(e, by_item.get(e.item, "")) for e in excluded(scans) if e.code != "duplicate_file"]


def _misfit_code(scan: Scan, plan: Plan) -> str:
    return "depth_differs" if scan.is_volume == (plan.volumes is not None) else "kind_differs"
