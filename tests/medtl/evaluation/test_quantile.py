"""The quantile that the next patient stays below."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl.evaluation.quantile import patient_quantile, votes


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.5, 0.98))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_with_one_image_each_it_is_the_quantile_of_split_conformal_prediction(
    scores: list[float], share: float
) -> None:
    rank = int(np.ceil(share * (len(scores) + 1) - 1e-9))
    found = patient_quantile(np.array(scores), [str(i) for i in range(len(scores))], share)
    assert found == (sorted(scores)[rank - 1] if rank <= len(scores) else None)


def test_too_few_patients_have_no_quantile() -> None:
    assert patient_quantile(np.arange(8.0), list("abcdefgh"), 0.9) is None
    assert patient_quantile(np.arange(9.0), list("abcdefghi"), 0.9) == 8
    assert patient_quantile(np.array([]), [], 0.9) is None


def test_many_images_of_one_patient_are_one_vote() -> None:
    scores = np.concatenate([np.linspace(0, 1, 20), np.full(500, 9.0)])
    people = [f"p-{i}" for i in range(20)] + ["p-many"] * 500
    assert patient_quantile(scores, people, 0.8) == pytest.approx(np.linspace(0, 1, 20)[17])
    assert votes(people).sum() == pytest.approx(21)


def test_images_repeated_within_every_patient_change_nothing() -> None:
    scores, people = np.random.default_rng(0).random(40), [f"p-{i // 2}" for i in range(40)]
    assert patient_quantile(scores, people, 0.9) == patient_quantile(
        np.repeat(scores, 3), np.repeat(people, 3).tolist(), 0.9
    )


def test_the_next_patient_stays_below_as_often_as_promised_and_images_alone_would_not_hold_it() -> None:
    rng = np.random.default_rng(0)
    held, by_images = [], []
    for _ in range(1500):
        studies = rng.choice([1, 40], size=30, p=[0.7, 0.3])  # the ill have many images, and they are harder
        level = rng.normal(size=30) + 2 * (studies == 1)
        people = np.repeat(np.arange(30), studies).astype(str)
        scores = np.repeat(level, studies) + 0.3 * rng.normal(size=studies.sum())
        new = rng.normal() + 2 * (rng.random() < 0.7) + 0.3 * rng.normal()
        limit = patient_quantile(scores, people.tolist(), 0.9)
        assert limit is not None
        held.append(new <= limit)
        by_images.append(new <= np.quantile(scores, 0.9))
    assert 0.89 < np.mean(held) < 0.95
    assert np.mean(by_images) < 0.8
