"""Scans that nobody has labelled, as a cohort without classes: to pre-train on.

A table may still say whose scans they are (and which are meant); without one every scan is taken, and its patient is
the header's. Whether a file is a mask that somebody drew cannot be told from its voxels: where masks lie beside the
scans, a table names the scans.
"""

from __future__ import annotations

from collections.abc import Sequence

from medtl.config import LabelsConfig, StudiesConfig
from medtl.errors import StudyError
from medtl.records import Cohort, Scan
from medtl.studies.labels import (
    LabelRow,
    check_attributes,
    find_images,
    join,
    patients_of,
    rows_from_scans,
    study_of,
)


def is_unlabelled(labels: LabelsConfig) -> bool:
    """Tell a config of scans without labels: no table, or one without a column of labels or masks."""
    return labels.table is None or (labels.label == () and labels.mask is None)


def rows_of_every_scan(scans: Sequence[Scan]) -> tuple[LabelRow, ...]:
    """Give each scan a row of its own, without a label; a part that its source gave it stays."""
    parts = {row.keys: row.part for row in rows_from_scans(scans)}
    keys = [(scan, (f"scan:{scan.scan_id}",)) for scan in scans if scan.mask_of is None]
    return tuple(LabelRow(scan.scan_id[:16], key, (), part=parts.get(key)) for scan, key in keys)


def gather(scans: Sequence[Scan], rows: Sequence[LabelRow], config: StudiesConfig) -> Cohort:
    """Join scans with the rows that name them into a cohort without classes.

    Raises:
        StudyError: no scan is left, an attribute tells patients apart, or patients are unknown and the config does not
            allow one image to be taken as one patient.
    """
    images = [scan for scan in scans if scan.mask_of is None]
    matched, exclusions = join(images, rows, find_images(images, rows))
    if not matched:
        reasons = ", ".join(sorted({e.code for e in exclusions})) or "no scans"
        raise StudyError(
            f"There is no scan to pre-train on ({reasons}). Check scans.source, and studies.labels.path where a table "
            "names the scans; studies.labels.table=null takes every scan."
        )
    patients, warnings = patients_of(matched, config)
    studies = [study_of(scan, row, (), patient) for (scan, row), patient in zip(matched, patients, strict=True)]
    check_attributes(studies)
    studies.sort(key=lambda study: study.study_id)
    return Cohort("multilabel", (), tuple(studies), tuple(exclusions), not warnings, tuple(warnings))
