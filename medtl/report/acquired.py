"""What a report says of the decoded scans: whose they are, and how they were taken. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from medtl.records import Cohort, Scan


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How one scan was taken, as far as recorded; spacings are those of volumes, in the plane the mean of both."""

    modality: str | None = None
    rows: int | None = None
    columns: int | None = None
    slice_mm: float | None = None
    in_plane_mm: float | None = None

    @property
    def size(self) -> str | None:
        """Rows and columns in words."""
        return None if self.rows is None else f"{self.rows} × {self.columns}"


def acquisitions(scans: Iterable[Scan], cohort: Cohort) -> dict[str, Acquisition]:
    """Say of each study of the cohort how its scan was taken."""
    by_id = {scan.scan_id: scan for scan in scans}
    return {study.study_id: _acquisition(by_id[study.scan_id]) for study in cohort.studies}


def _acquisition(scan: Scan) -> Acquisition:
    if scan.affine is None:
        return Acquisition(scan.modality, scan.shape[0], scan.shape[1])
    columns, rows, slices = np.linalg.norm(np.array(scan.affine)[:3, :3], axis=0).tolist()
    return Acquisition(scan.modality, scan.shape[1], scan.shape[2], slices, (columns + rows) / 2)


def count_patients(scans: Iterable[Scan], cohort: Cohort) -> int | None:
    """Count the patients of all decoded scans; ``None`` where one is of nobody known.

    The scan of a study is its patient's, whom a label table may have named, and so is its mask. Any other is whose its
    header says, and a header that stands on a study's scan too means the patient of that study.
    """
    scans = tuple(scans)
    owner = {
        scan_id: study.patient
        for study in cohort.studies
        for scan_id in (*(region for region, _ in study.regions), study.mask, study.field, study.scan_id)
        if scan_id is not None
    }
    same: dict[str | None, str] = {scan.patient: owner[scan.scan_id] for scan in scans if scan.scan_id in owner}
    same.pop(None, None)
    found = {owner.get(scan.scan_id) or same.get(scan.patient) or scan.patient for scan in scans}
    return None if None in found else len(found | {study.patient for study in cohort.studies})
