"""A segmentation applied to new scans: a mask for each, in its own voxels, and a table of volumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medtl.artifacts import file_digest
from medtl.audit import AuditLog
from medtl.config import Config
from medtl.errors import ModelError, ScanError
from medtl.progress import advance
from medtl.records import AnyArray, Artifact, Evaluation, Exclusion, MaskQuality, Scan, Tally
from pipelines import segmenting, steps
from pipelines.apply import Request, counted, left_out

if TYPE_CHECKING:
    from medtl.delivery.masks import Drawn
    from medtl.registry.io import Entry
    from medtl.scans.sources import SourceFile

TABLE = "predictions.csv"
DOUBTED = "the mask may be wrong: a low Dice is foretold, or none can be"
NOTHING = "nothing was found"
_IS_DOUBTED = "mask doubted"  # the question, where drift is measured


@dataclass(frozen=True, slots=True)
class _Source:
    """What a scan came from."""

    files: tuple[SourceFile, ...]
    names: tuple[str, ...]
    shown: bool  # whether what is written may say whose it is


def apply_segmentation(config: Config, scans: Artifact, request: Request, entry: Entry, folder: Path) -> dict[str, Any]:
    """Predict, clean and write the mask of every scan that fits; write the table of volumes and of what was left out.

    Args:
        folder: of the release, verified.
    """
    from medtl.dataset import grid
    from medtl.delivery.io import write_table
    from medtl.delivery.masks import volumes_table
    from medtl.evaluation.io import read_components, read_evaluation, read_quality
    from medtl.monitoring.tally import tally
    from medtl.scans.intake import files_of, names_of, read_scans
    from medtl.scans.segments import PixelStore

    network = segmenting.Segmenter(config, folder, folder)
    components, quality = read_components(folder), read_quality(folder)
    files, read = steps.source_files(config), PixelStore(steps.pixel_folder(config))
    names, made_of = names_of(files, scans.path), files_of(files, scans.path)
    known = {scan: grid.misfit(scan, network.plan) for scan in read_scans(scans.path) if scan.mask_of is None}
    fitting = [scan for scan, why in known.items() if why is None]
    release = entry.release.release_id
    out = request.out or Path(f"predictions-{release}")
    drawn: list[Drawn] = []
    written: list[Path] = []
    people: list[str | None] = []
    failed: list[tuple[Exclusion, str]] = []
    for number, scan in enumerate(fitting, 1):
        source = _Source(made_of.get(scan.scan_id, ()), tuple(names[scan.scan_id]), request.names)
        try:
            predicted = network(read(scan), scan)
            codes = segmenting.cleaned(predicted.codes, network.plan, components)
            one, paths = _write(config, out, scan, codes, network, source, release, _doubts(quality, predicted.doubts))
        except (ScanError, ModelError) as error:  # one scan's trouble is not the others'
            code = error.code if isinstance(error, ScanError) else "not_predicted"
            failed += [(Exclusion(scan.scan_id[:16], "delivery", code, str(error)), name) for name in source.names]
            continue
        drawn.append(one)
        people.append(scan.patient)
        written += paths
        advance("segmenting scans", number, len(fitting))
    unfit = [
        (Exclusion(scan.scan_id[:16], "dataset", "grid_differs", why), name)
        for scan, why in known.items()
        if why is not None
        for name in names[scan.scan_id]
    ]
    excluded = [*left_out(config, scans, files), *unfit, *failed]
    columns, rows = volumes_table(drawn, excluded, request.names)
    table = out / TABLE
    write_table(table, columns, rows)
    details = {
        "scans": scans.digest,
        "table": file_digest(table),
        "masks": {path.name: file_digest(path) for path in written},
        "count": len(drawn),
        "excluded": len(excluded),
        **counted(tally(people, mask_counts(quality, drawn)), doubted_when_released(read_evaluation(folder))),
    }
    AuditLog(config.workspace).append("release.applied", release, details=details)
    return {
        "release": release,
        "status": entry.release.status,
        "table": str(table),
        "scans": len(drawn),
        "masks": len(written),
        "excluded": dict(Counter(exclusion.code for exclusion, _ in excluded)),
        "decisions": {},
        "doubts": dict(Counter(doubt for one in drawn for doubt in one.doubts)),
    }


def _write(
    config: Config,
    out: Path,
    scan: Scan,
    codes: AnyArray,
    network: segmenting.Segmenter,
    source: _Source,
    release: str,
    doubts: Sequence[str],
) -> tuple[Drawn, list[Path]]:
    """Write one mask in every form that its scan allows: NIfTI of a volume, PNG of an image, SEG of DICOM.

    Regions that share voxels are a file each: one map of values could not hold them.
    """
    from medtl.dataset.restore import codes_to_values
    from medtl.delivery.io import write_file, write_mask_nifti
    from medtl.delivery.masks import Drawn, mask_png, volumes

    name, ending = scan.scan_id[:16], "nii.gz" if scan.is_volume else "png"
    values = codes_to_values(codes, network.plan)
    if isinstance(values, list):
        maps = {f"{name}-{number}.{ending}": region for number, region in enumerate(values, 1)}
    else:
        maps = {f"{name}.{ending}": values}
    paths = [out / file for file in maps]
    for path, labels in zip(paths, maps.values(), strict=True):
        if scan.affine is not None:
            write_mask_nifti(path, labels, scan.affine)
        else:
            write_file(path, mask_png(labels))
    if scan.source == "dicom" and not source.shown:
        doubts = (*doubts, "no DICOM SEG: it would name the patient")
    elif scan.source == "dicom":
        try:
            write_file(out / f"{name}.dcm", _seg(config, scan, codes, network, source, release))
            paths.append(out / f"{name}.dcm")
        except ScanError as error:
            doubts = (*doubts, f"no DICOM SEG ({error.code}): {error.reason}")
    found = volumes(codes, network.plan, scan.affine)
    if not any(one.voxels for one in found):
        doubts = (*doubts, NOTHING)
    return Drawn(scan.scan_id, source.names, " ".join(maps), found, tuple(doubts)), paths


def _seg(
    config: Config, scan: Scan, codes: AnyArray, network: segmenting.Segmenter, source: _Source, release: str
) -> bytes:
    from medtl.delivery.masks import Algorithm, dicom_seg, source_header
    from medtl.scans import sources

    headers = [source_header(sources.read_bytes(file)) for file in source.files]
    return dicom_seg(codes, network.plan, scan.affine, headers, Algorithm(config.name, release))


def _doubts(quality: MaskQuality, said: Mapping[str, float | None]) -> tuple[str, ...]:
    from medtl.evaluation.quality import foretell, is_flagged

    return (DOUBTED,) if is_flagged(quality, foretell(quality, [said]))[0] else ()


def mask_counts(quality: MaskQuality, drawn: Sequence[Drawn]) -> Mapping[str, Mapping[str, int]]:
    """Count the masks that are doubted, where the release can doubt, and those that show nothing."""
    from medtl.monitoring.tally import flagged

    asked = {"nothing found": NOTHING} | ({} if quality.method == "none" else {_IS_DOUBTED: DOUBTED})
    return {name: flagged(np.array([doubt in one.doubts for one in drawn])) for name, doubt in asked.items()}


def doubted_when_released(evaluation: Evaluation) -> Tally | None:
    """Read how many masks of the test part were doubted."""
    known = next((score for score in evaluation.scores if score.metric == "flagged"), None)
    if known is None or known.value is None:
        return None
    yes = round(known.value * known.n)
    return Tally(known.n, known.patients, {_IS_DOUBTED: {"no": known.n - yes, "yes": yes}})
