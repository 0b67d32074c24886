"""The learning curve of a run: halves of halves, as far down as anything can be trained."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from medtl.config import Config
from medtl.errors import MedtlError, ModelError, SplitError, StorageError
from medtl.records import Artifact
from pipelines import evaluate, growth, tasks
from pipelines.prepared import Prepared

WHOLE = 40


def named(name: object) -> Artifact:
    return Artifact("kind", str(name), str(name), Path(str(name)))


def drawn(monkeypatch: pytest.MonkeyPatch, wanted: int, fails: dict[int, MedtlError]) -> tuple[list[str], str]:
    """Give whose validation is drawn, in order, and the note."""
    config = Config(name="x", report={"learning_curve": wanted})  # type: ignore[arg-type]
    sizes = [5, 10, 20, WHOLE][-1 - wanted :] if wanted < 4 else [5, 10, 20, WHOLE]

    async def fewer(config: Config, cohort: Artifact, split: Artifact, size: int) -> Artifact:
        return named(size)

    async def fit(config: Config, prepared: Prepared) -> Artifact:
        size = int(prepared.split.digest)
        if size in fails:
            raise fails[size]
        return named(f"trained on {size}")

    async def validated(config: Config, prepared: Prepared, checkpoint: Artifact) -> Artifact:
        return checkpoint

    async def draw(config: Config, prepared: Prepared, found: list[growth.Grown], note: str) -> Any:
        return [one.val.digest for one in found], note

    monkeypatch.setattr(growth, "sizes_of", lambda config, prepared: sizes)
    monkeypatch.setattr(tasks, "take_patients", fewer)
    monkeypatch.setattr(tasks, "draw_learning_curve", draw)
    monkeypatch.setattr(evaluate, "fit", fit)
    monkeypatch.setattr(evaluate, "_validated", validated)
    prepared = Prepared(*(named(name) for name in ("scans", "cohort", "split", "plan", "pack")))
    found: Any = asyncio.run(evaluate.learning_curve(config, prepared, named("the model")))
    return found


def test_sizes_come_from_few_to_all_and_the_model_itself_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    points, note = drawn(monkeypatch, 3, {})
    assert points == ["trained on 5", "trained on 10", "trained on 20", "the model"]
    assert note == ""


def test_fewer_sizes_than_were_asked_for_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    points, note = drawn(monkeypatch, 6, {})
    assert len(points) == 4
    assert note == "Nothing is trained on fewer than 4 patients."


@pytest.mark.parametrize("error", [ModelError("The loss is not finite."), SplitError("ill missing")])
def test_a_size_that_cannot_be_trained_on_ends_the_curve_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, error: MedtlError
) -> None:
    points, note = drawn(monkeypatch, 3, {10: error})
    assert points == ["trained on 20", "the model"], "nothing smaller is tried"
    assert note == f"training on 10 patients failed: {error}"


def test_what_is_not_about_the_patients_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError):
        drawn(monkeypatch, 3, {10: StorageError("the disk is full")})


def test_no_curve_is_made_where_none_was_asked_for() -> None:
    nothing: Any = None
    assert asyncio.run(evaluate.learning_curve(Config(name="x"), nothing, nothing)) is None


def test_no_member_of_several_networks_goes_without_a_patient() -> None:
    several = Config.model_validate(
        {
            "name": "x",
            "studies": {"labels": {"table": "t.csv", "path": "p", "mask": "m", "structures": {"a": 1}}},
            "model": {"weights": "none", "segmenter": {"members": 6}},
            "report": {"learning_curve": 1},
        }
    )
    assert growth.why_no_more(several, 0) == "Nothing is trained on fewer than 6 patients."
