"""An impossible record cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtl.errors import ModelError, SplitError, StudyError
from medtl.records import PARTS, Cohort, Evaluation, Phase, Predictions, Scan, Score, Split, Study

STUDY = Study("s-1", "scan", "p-1", (1, None), "digest")
SCORE = Score("auroc", "yes", 0.9, 0.8, 1.0, 10, 10)


def test_a_cohort_names_each_study_once_and_gives_each_class_an_entry() -> None:
    with pytest.raises(StudyError, match="1 study identifiers occur twice"):
        Cohort("multilabel", ("a", "b"), (STUDY, STUDY))
    with pytest.raises(StudyError, match="one entry per class"):
        Cohort("multilabel", ("a",), (STUDY,))


def test_an_unknown_target_is_nan_and_never_zero() -> None:
    targets = Cohort("multilabel", ("a", "b"), (STUDY,)).targets
    assert targets[0, 0] == 1
    assert np.isnan(targets[0, 1])
    assert Cohort("multilabel", ("a", "b"), ()).targets.shape == (0, 2)


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.integers(0, 5)), max_size=12))
def test_a_split_exists_if_and_only_if_no_group_crosses(members: list[tuple[str, int]]) -> None:
    ids = {part: tuple(f"s{n}" for n, (p, _) in enumerate(members) if p == part) for part in PARTS}
    groups = {f"s{n}": f"g{group}" for n, (_, group) in enumerate(members)}
    crosses = any(len({p for p, g in members if g == group}) > 1 for _, group in members)
    try:
        split = Split(ids["train"], ids["val"], ids["test"], groups, predefined=False)
    except SplitError:
        assert crosses
    else:
        assert not crosses
        assert tuple(split.part(part) for part in PARTS) == (split.train, split.val, split.test)


@pytest.mark.parametrize("part", PARTS)
def test_a_split_holds_each_study_once(part: str) -> None:
    parts: dict[str, Any] = {name: (f"s-{name}",) for name in PARTS}
    groups = {f"s-{name}": f"g-{name}" for name in PARTS}
    Split(**parts, groups=groups, predefined=False)
    with pytest.raises(SplitError, match=f"'{part}' part holds a study twice"):
        Split(**{**parts, part: (f"s-{part}",) * 2}, groups=groups, predefined=False)


def test_a_phase_that_moved_a_frozen_layer_cannot_be_written_down() -> None:
    facts: dict[str, Any] = {"frozen_digest_before": "a", "best_epoch": 1, "val_loss": 0.1, "val_auroc": None}
    Phase("head", ("head",), ("layer1",), 1, 1, {"head": 0.1}, frozen_digest_after="a", **facts)
    with pytest.raises(ModelError, match="Phase 'head' changed a frozen layer"):
        Phase("head", ("head",), ("layer1",), 1, 1, {"head": 0.1}, frozen_digest_after="b", **facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, patients=("a",)),
        lambda p: replace(p, targets=p.targets[:1]),
        lambda p: replace(p, probabilities=p.probabilities[:, :1]),
        lambda p: replace(p, study_ids=("a",)),
    ],
)
def test_predictions_have_one_row_per_study(change: Callable[[Predictions], Predictions]) -> None:
    predictions = Predictions("test", ("a", "b"), ("p", "p"), np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="per study"):
        change(predictions)


@pytest.mark.parametrize(
    ("labels", "headline"), [(("no", "yes", "macro"), "macro"), (("no", "yes"), "yes"), (("yes", "all"), "all")]
)
def test_the_headline_is_the_mean_where_there_is_one_and_else_the_positive_class(
    labels: tuple[str, ...], headline: str
) -> None:
    scores = tuple(replace(SCORE, label=label) for label in labels)
    evaluation = Evaluation("binary", ("no", "yes"), scores, (), (), (), 10, 10, 100)
    assert evaluation.score("auroc").label == headline
    assert {name: score.label for name, score in evaluation.metrics.items()} == {"auroc": headline}
    with pytest.raises(KeyError):
        evaluation.score("dice")


def test_a_scan_knows_grey_from_colour_and_stays_as_it_is() -> None:
    scan = Scan("id", "image", (4, 5), "uint8", "digest", (), 8)
    assert (scan.channels, replace(scan, shape=(4, 5, 3)).channels) == (1, 3)
    with pytest.raises(FrozenInstanceError):
        scan.bits = 16  # type: ignore[misc]
