"""Patients are dealt to folds, not images."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.evaluation.folds import patient_folds


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=60), st.integers(2, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_patient_is_in_one_fold_and_folds_are_even(rows: list[tuple[int, int]], folds: int) -> None:
    people, kinds = [f"p-{p}" for p, _ in rows], np.array([kind for _, kind in rows])
    found = patient_folds([f"s-{i:03d}" for i in range(len(rows))], people, kinds, folds, 0)
    assert len({(p, int(f)) for p, f in zip(people, found, strict=True)}) == len(set(people))
    sizes = [len({p for p, f in zip(people, found, strict=True) if f == number}) for number in range(max(found) + 1)]
    assert max(sizes) - min(sizes) <= 1 and len(sizes) == min(folds, len(set(people)))


def test_every_fold_has_its_part_of_the_rare_kind() -> None:
    kinds = np.array([1] * 10 + [0] * 90)
    found = patient_folds([f"s-{i:03d}" for i in range(100)], [f"p-{i}" for i in range(100)], kinds, 5, 3)
    assert np.bincount(found[:10]).tolist() == [2] * 5


def test_names_and_order_do_not_move_the_folds_and_the_seed_does() -> None:
    ids, people, kinds = [f"s-{i:02d}" for i in range(40)], [f"p-{i // 2}" for i in range(40)], np.arange(40) % 2
    one = patient_folds(ids, people, kinds, 4, 0)
    other = patient_folds(ids[::-1], [f"x{40 - int(p[2:])}" for p in people[::-1]], kinds[::-1], 4, 0)
    assert (one == other[::-1]).all()
    assert (one != patient_folds(ids, people, kinds, 4, 1)).any()
