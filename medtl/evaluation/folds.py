"""Patients dealt to folds, so that nobody helps to judge himself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medtl.records import IntArray


def patient_folds(
    study_ids: Sequence[str], patients: Sequence[str], kinds: IntArray, folds: int, seed: int
) -> IntArray:
    """Deal patients to folds, those of each kind evenly; a patient of several kinds counts as of his rarest.

    Patients are told apart by their studies, so that neither pseudonyms nor the order of studies move the folds.

    Args:
        kinds: (n,) number of each study's kind.
        folds: at most one per patient is made.

    Returns:
        (n,) fold of each study, from 0.
    """
    often = np.bincount(kinds)
    rarest: dict[str, tuple[int, int]] = {}
    for _, patient, kind in sorted(zip(study_ids, patients, kinds.tolist(), strict=True)):
        rarest[patient] = min(rarest.get(patient, (int(often[kind]), kind)), (int(often[kind]), kind))
    shuffled = np.random.default_rng([seed, 0xF01D]).permutation(len(rarest))
    order = [list(rarest)[number] for number in shuffled]  # first studies, then drawn
    dealt = {p: turn % min(folds, len(order)) for turn, p in enumerate(sorted(order, key=lambda p: rarest[p]))}
    return np.array([dealt[patient] for patient in patients], dtype=np.int64)
