"""Few patients leave much open, and the bounds say how much."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from scipy.stats import binomtest

from medtl.evaluation.bounds import Basis, Counts, RestsOn, evenness, least_of_a_perfect, least_share, together
from medtl.evaluation.metrics import auroc, average_precision, kappa, mcc


def counts(diseased: int, healthy: int) -> Counts:
    both = diseased + healthy
    return Counts(diseased, healthy, diseased, healthy, both, healthy / diseased)


@pytest.mark.parametrize("patients", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_bound_of_a_share_is_clopper_and_pearsons(patients: int, level: float) -> None:
    wanted = binomtest(patients, patients).proportion_ci(level, method="exact").low
    assert least_share(patients, level) == pytest.approx(wanted)


@pytest.mark.parametrize("rests_on", get_args(RestsOn))
def test_more_patients_leave_less_open_and_never_nothing(rests_on: RestsOn) -> None:
    bounds = [least_of_a_perfect(rests_on, counts(n, 2 * n), 0.95) for n in (2, 5, 20, 100, 10_000)]
    assert bounds == sorted(set(bounds)) and bounds[0] >= 0 and 0.99 < bounds[-1] < 1
    nobody = Counts(0, 0, 0, 0, 0, 0.0)
    assert least_of_a_perfect(rests_on, nobody, 0.95) == 0


@pytest.mark.parametrize("diseased, healthy", [(4, 4), (5, 20), (20, 5)])
@pytest.mark.parametrize("who", ["diseased", "healthy"])
def test_a_population_below_the_bound_seldom_looks_perfect(diseased: int, healthy: int, who: str) -> None:
    """A hidden share of one kind looks like the other: how often do so few patients not show it?"""
    rng = np.random.default_rng(0)
    found = counts(diseased, healthy)
    hidden = 1 - least_share({"diseased": diseased, "healthy": healthy}[who], 0.95)
    trials = 20_000
    seen = rng.random((trials, {"diseased": diseased, "healthy": healthy}[who])) < hidden
    assert (~seen.any(1)).mean() == pytest.approx(0.025, abs=0.004)
    # the same population's own AUROC and average precision: not below what the bounds say
    size, share = 20_000, diseased / (diseased + healthy)
    truth = (np.arange(size) < share * size).astype(np.float64)
    score, ones = truth + rng.random(size) / 2, np.ones((1, size))
    astray = np.flatnonzero(truth == (who == "diseased"))[: int(hidden * (truth == (who == "diseased")).sum())]
    score[astray] += -2.0 if who == "diseased" else 2.0
    assert auroc(truth, score, ones)[0] >= least_of_a_perfect("rarer", found, 0.95) - 1e-3
    assert average_precision(truth, score, ones)[0] >= least_of_a_perfect("ranking", found, 0.95) - 1e-3


def test_a_patient_with_images_of_two_kinds_counts_in_both() -> None:
    found = Counts.of(["a", "a", "b", "b"], np.array([1.0, 0, 1, 1]), np.array([1.0, 1, 1, 0]))
    assert (found.diseased, found.healthy, found.called, found.cleared, found.all) == (2, 1, 2, 1, 2)
    assert found.odds == pytest.approx(1 / 3)
    assert [found.needed(kind) for kind in ("all", "diseased", "called")] == [2, 1, 1]


def test_patients_with_equally_many_studies_count_fully_and_one_with_most_hardly() -> None:
    assert evenness(["a", "b", "c"] * 4) == pytest.approx(1)
    assert evenness(["a"] * 98 + ["b", "c"]) == pytest.approx(100**2 / (3 * (98**2 + 2)))
    assert evenness([]) == 1


def test_the_least_even_kind_of_studies_decides() -> None:
    people = ["a", "b", "c", "d", "d", "d", "e", "f"]
    truth = np.array([1.0, 1, 1, 0, 0, 0, 0, 0])
    found = Counts.of(people, truth, truth)
    assert found.evenness == pytest.approx(5**2 / (3 * (9 + 1 + 1)))
    assert found.basis("diseased", 0.95) == Basis(3, least_share(3, 0.95), found.evenness)


@pytest.mark.parametrize("patients", [2, 15, 400])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_even_patients_have_one_vote_each_and_uneven_ones_less(patients: int, level: float) -> None:
    assert Basis(patients, least_share(patients, level)).votes(level) == pytest.approx(patients)
    assert Basis(patients, least_share(patients, level), 0.5).votes(level) == pytest.approx(patients / 2)
    assert Basis(patients, 0.0).votes(level) == 0


@pytest.mark.parametrize("diseased, healthy", [(5, 5), (5, 20), (20, 5)])
def test_mcc_and_kappa_of_a_perfect_table_leave_what_both_its_bounds_leave(diseased: int, healthy: int) -> None:
    size = 100_000
    truth = np.concatenate([np.ones(diseased * size), np.zeros(healthy * size)])
    missed, alarms = (int(n * size * (1 - least_share(n, 0.95))) for n in (diseased, healthy))
    called = truth.copy()
    called[:missed], called[-alarms:] = 0, 1
    found, ones = counts(diseased, healthy), np.ones((1, len(truth)))
    assert least_of_a_perfect("association", found, 0.95) == pytest.approx(
        (1 + mcc(truth, called, ones)[0]) / 2, abs=1e-4
    )
    assert least_of_a_perfect("agreement", found, 0.95) == pytest.approx(
        (1 + kappa(truth, called, ones)[0]) / 2, abs=1e-4
    )


def test_patients_of_several_parts_show_what_they_would_in_one() -> None:
    parts = [Basis(n, least_share(n, 0.95)) for n in (10, 20, 30)]
    joined = together(parts, 0.95, [str(number) for number in range(60)])
    assert (joined.needed, joined.least, joined.evenness) == pytest.approx((60, least_share(60, 0.95), 1))
    assert together([Basis(0, 0.0)], 0.95, []).least == 0
