"""Doubts about masks are counted as they were when the release was made."""

from __future__ import annotations

from medtl.delivery.masks import Drawn
from medtl.records import Evaluation, MaskQuality, Score, Tally
from pipelines.apply_masks import DOUBTED, NOTHING, doubted_when_released, mask_counts

DRAWN = [Drawn(str(n), (), "", (), doubts) for n, doubts in enumerate([(), (DOUBTED,), (DOUBTED, NOTHING), (NOTHING,)])]


def test_masks_are_doubted_only_by_a_release_that_can_doubt() -> None:
    nothing = {"nothing found": {"no": 2, "yes": 2}}
    assert mask_counts(MaskQuality("none", "few", (), 0.7), DRAWN) == nothing
    linear = MaskQuality("linear", "", ("entropy",), 0.7)
    assert mask_counts(linear, DRAWN) == {**nothing, "mask doubted": {"no": 2, "yes": 2}}


def test_the_share_doubted_of_the_test_part_is_read_off_the_evaluation() -> None:
    flagged = Score("flagged", "all", 0.3, 0.1, 0.6, 10, 8)
    evaluation = Evaluation("multilabel", ("liver",), (flagged,), (), (), (), 10, 8, 0)
    assert doubted_when_released(evaluation) == Tally(10, 8, {"mask doubted": {"no": 7, "yes": 3}})
    unknown = Score("flagged", "all", None, None, None, 0, 0, "not estimable")
    assert doubted_when_released(Evaluation("multilabel", ("liver",), (unknown,), (), (), (), 10, 8, 0)) is None
