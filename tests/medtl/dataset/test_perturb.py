"""A change is what its name says, of the strength that is asked for, and the same each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medtl.dataset.perturb import PERTURBATIONS, perturbed


def images(shape: tuple[int, ...] = (3, 100, 80, 1), dtype: Any = np.uint8) -> Any:
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0.25, 0.75, (*shape[:-3], shape[-3] // 5, shape[-2] // 5, shape[-1]))
    fine = coarse.repeat(5, axis=-3).repeat(5, axis=-2)
    return np.rint(fine * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("name", PERTURBATIONS)
@pytest.mark.parametrize("shape", [(3, 100, 80, 1), (2, 100, 80, 3), (2, 4, 100, 80, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_strong_is_further_from_the_image_than_mild_and_twice_is_the_same(
    name: str, shape: tuple[int, ...], dtype: Any
) -> None:
    plain = images(shape, dtype)
    mild, strong = perturbed(plain, name, "mild", 1), perturbed(plain, name, "strong", 1)
    assert mild.shape == plain.shape and mild.dtype == plain.dtype
    assert np.array_equal(mild, perturbed(plain, name, "mild", 1))
    near, far = (np.abs(one.astype(float) - plain).mean() for one in (mild, strong))
    assert 0 < near < far


def test_each_does_what_it_says() -> None:
    plain = images().astype(float)

    def made(name: str) -> Any:
        return perturbed(images(), name, "mild", 1).astype(float)

    assert made("noise").std() > plain.std() and abs(made("noise").mean() - plain.mean()) < 0.5
    assert made("less contrast").std() < 0.85 * plain.std() < plain.std() < made("more contrast").std()
    assert made("darker").mean() < plain.mean() - 10 and made("brighter").mean() > plain.mean() + 10
    for name in ("blur", "coarser"):
        edges = [np.abs(np.diff(one, axis=1)).max() for one in (made(name), plain)]
        assert edges[0] < edges[1]


def test_noise_differs_between_images_and_seeds() -> None:
    same = np.repeat(images()[:1], 2, axis=0)
    one, other = perturbed(same, "noise", "strong", 1)
    assert not np.array_equal(one, other)
    assert not np.array_equal(perturbed(same, "noise", "strong", 2)[0], one)
