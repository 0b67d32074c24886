"""What a YAML file may not do, and what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from medtl.config import MAX_CONFIG_BYTES, Config, load_config, parse_config
from medtl.errors import ConfigError


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nseed: 1\nseed: 2", "'seed' is given twice"),
        ("name: a\nmodel: {dropout: 0}\nmodel: {batch_size: 4}", "'model' is given twice"),
        ("name: a\nmodel:\n  phases:\n  - {lr: 1, lr: 2}", "'lr' is given twice"),
        ("name: a\nreport: {title: 2024-13-45}", "Put it in quotes"),
        ("name: a\nseed: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("name: a\nseed: " + "[" * 400_000, "nested more than 50 deep"),
        ("name: a\n---\nname: b", "not valid YAML"),
        ("name: a\nmodel: {dropout: .nan}", "'model.dropout'"),
        ("name: a\nscans: {max_megapixels: .inf}", "finite number"),
        ("name: a\ndataset: {plan: {percentiles: [99, 1]}}", "the lower one first"),
        ("name: a\ndataset: {plan: {percentiles: [-1, 101]}}", "between 0 and 100"),
        ("name: a\nscans: {window: [40, 0]}", "width is more than 0"),
        ("name: a\nmodel:", "'model'"),
        ("", "a mapping of keys is wanted"),
        (b"\xff\xfe\x00bin\x00", "cannot be read"),
        (b"name: a\x01", "not valid YAML"),
        ("#" * (MAX_CONFIG_BYTES + 1), "larger than"),
    ],
)
@pytest.mark.timeout(20)
def test_a_file_that_could_be_misread_is_refused_in_one_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=[", "not valid YAML"),
        ("report.title=2024-13-45", "Put it in quotes"),
        ("model={dropout: 0, dropout: 1}", "'dropout' is given twice"),
        ("studies.labels.classes=[&a x, *a]", "aliases"),
        ("seed=!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("model..dropout=1", "write it as a.b=c"),
        ("model.droput=1", "did you mean 'dropout'"),
        ("model.segmenter={members: 2, refit: true}", "set one of them"),
    ],
)
def test_an_override_is_held_to_the_same_rules_as_the_file(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "name: a", override)
    assert words in str(caught.value)


def test_the_last_override_of_a_key_wins_and_an_empty_section_can_be_filled(tmp_path: Path) -> None:
    assert load(tmp_path, "name: a\nmodel:", "model.dropout=0.1", "model.dropout=0.3").model.dropout == 0.3


def test_an_entry_of_a_list_goes_by_its_name_or_its_number(tmp_path: Path) -> None:
    text = (
        "name: a\nmodel: {phases: [{name: head, unfreeze: head, epochs: 2}, {name: '0', unfreeze: all, epochs: 3}, "
        "{unfreeze: all, epochs: 4}]}"
    )
    given = ("model.phases.head.epochs=9", "model.phases.0.epochs=8", "model.phases.2.lr=0.5", "model.phases.2.name=x")
    phases = load(tmp_path, text, *given).model.phases
    assert phases is not None and [(one.name, one.epochs) for one in phases] == [("head", 9), ("0", 8), ("x", 4)]
    assert phases[2].lr == 0.5
    (alone,) = (
        load(
            tmp_path, text, "model.phases=[{name: a}]", "model.phases.a={name: b, unfreeze: all, epochs: 7}"
        ).model.phases
        or ()
    )
    assert (alone.name, alone.epochs) == ("b", 7)
    for wrong in ("model.phases.3.epochs=1", "model.phases.tail.epochs=1", "model.phases.-1.epochs=1"):
        with pytest.raises(ConfigError, match=r"no entry '(3|tail|-1)'; its entries are: head, 0, 2"):
            load(tmp_path, text, wrong)
    with pytest.raises(ConfigError, match="'epochs' is a value"):
        load(tmp_path, text, "model.phases.head.epochs.x=1")
    twice = "name: a\nmodel: {phases: [{name: a}, {name: a}]}"
    with pytest.raises(ConfigError, match="no entry 'a'"):
        load(tmp_path, twice, "model.phases.a.epochs=1")


@pytest.mark.parametrize("what", ["folder", "missing"])
def test_what_is_no_file_cannot_be_read(tmp_path: Path, what: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / what)


def test_a_stream_without_an_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        load_config(Path("/dev/zero"))


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "a", "sed": 1, "model": {"dropout": 2}})
    assert "did you mean 'seed'" in str(caught.value)
    assert "'model.dropout'" in str(caught.value)


def fields(model: type[BaseModel], path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    for name, field in model.model_fields.items():
        yield path, name
        for inner, steps in nested(field.annotation):
            yield from fields(inner, (*path, name, *steps))


def nested(annotation: Any) -> Iterator[tuple[type[BaseModel], tuple[int, ...]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ()
    for inner in get_args(annotation):
        for model, steps in nested(inner):
            yield model, (0, *steps) if getattr(annotation, "__origin__", None) is tuple else steps


ALL_FIELDS = list(fields(Config))


@pytest.mark.parametrize(("path", "name"), ALL_FIELDS, ids=[".".join(map(str, (*p, n))) for p, n in ALL_FIELDS])
def test_a_slip_in_any_key_names_the_key_that_was_meant(path: tuple[Any, ...], name: str) -> None:
    value: Any = {name + "x": None}
    for step in reversed(path):
        value = [value] if step == 0 else {step: value}
    with pytest.raises(ConfigError) as caught:
        parse_config(value)
    assert f"'{'.'.join(map(str, (*path, name + 'x')))}'; did you mean '{name}'?" in str(caught.value)


def test_a_config_is_frozen_all_the_way_down() -> None:
    config = parse_config({"name": "a"})
    with pytest.raises(ValidationError, match="frozen"):
        config.model.schedule[0].epochs = 2  # type: ignore[misc]
