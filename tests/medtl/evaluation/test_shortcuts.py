"""A site that shows in the features, a label that shows in the site, and a picture that tells by its brightness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from medtl.artifacts import read_record, write_record
from medtl.config import UncertaintyConfig
from medtl.evaluation.folds import patient_folds
from medtl.evaluation.shortcuts import (
    PROPERTIES,
    Part,
    examine,
    image_properties,
    table,
    told_by_features,
    told_by_properties,
    told_by_value,
)
from medtl.records import Predictions, ShortcutFindings

FEW = UncertaintyConfig(resamples=200)
CLASSES = ("well", "ill")


def part(
    n: int = 240, seed: int = 0, per_patient: int = 2, site_shows: float = 0.0, label_shows: float = 1.0,
    site_tells: float = 0.0, bright: float = 0.0,
) -> tuple[Part, list[str | None]]:  # fmt: skip
    """Draw patients of two sites; ``site_tells`` is how much more often those of the second are ill."""
    rng = np.random.default_rng([seed, n])
    site = (rng.random(n // per_patient) < 0.5).repeat(per_patient) * 1
    ill = (rng.random(n // per_patient).repeat(per_patient) < 0.5 + site_tells * (site - 0.5)) * 1
    features = rng.normal(size=(n, 20))
    features[:, 0] += label_shows * ill
    features[:, 1] += site_shows * site
    properties = rng.normal(size=(n, len(PROPERTIES)))
    properties[:, 3] += bright * ill
    ids, people = tuple(f"s-{seed}-{i:04d}" for i in range(n)), tuple(f"p-{seed}-{i // per_patient}" for i in range(n))
    return Part(ids, people, np.eye(2)[ill], properties, features), [f"site {k}" for k in site]


def model_for(test: Part, strength: float = 2.0) -> Predictions:
    score = 1 / (
        1 + np.exp(-strength * (test.targets[:, 1] - 0.5) - np.random.default_rng(1).normal(size=len(test.targets)))
    )
    return Predictions("test", test.study_ids, test.patients, test.targets, np.stack([1 - score, score], 1))


def source(**given: Any) -> Any:
    some, sites = part(**given)
    return told_by_features(some, sites, "site from the features", FEW, 0)


def test_a_site_that_shows_in_the_features_is_found_and_said() -> None:
    probe = source(site_shows=2.0)
    assert probe.auroc.value > 0.85 and probe.p == pytest.approx(1 / 200) and probe.chance < 0.6
    assert probe.alarm.startswith("site from the features: AUROC 0.")


def test_a_site_that_does_not_show_raises_no_alarm() -> None:
    alarms = [bool(source(seed=seed).alarm) for seed in range(12)]
    assert sum(alarms) <= 2


def test_a_site_that_is_told_by_its_patients_disease_alone_raises_no_alarm() -> None:
    probe = source(n=600, label_shows=4.0, site_tells=0.8)
    assert probe.auroc.low > 0.75 and probe.chance > 0.75
    assert probe.p > 0.05 and not probe.alarm


def test_images_of_one_patient_do_not_teach_the_probe_about_him() -> None:
    rng = np.random.default_rng(0)
    people = np.arange(30).repeat(20)
    features = rng.normal(size=(30, 40))[people] + 0.01 * rng.normal(size=(600, 40))
    some = Part(
        tuple(f"s-{i:03d}" for i in range(600)), tuple(f"p-{p}" for p in people), np.eye(2)[people % 2], None, features
    )
    probe = told_by_features(some, [f"site {p % 3 % 2}" for p in people], "site", FEW, 0)
    assert not probe.alarm and probe.auroc.value is not None and probe.auroc.value < 0.8


def test_the_discriminant_ranks_as_logistic_regression_does() -> None:
    some, sites = part(n=600, per_patient=1, site_shows=1.0, seed=3)
    truth = (np.array(sites) == "site 1") * 1
    folds = PredefinedSplit(patient_folds(some.study_ids, some.patients, truth, 5, 0))
    chances = cross_val_predict(LogisticRegression(), some.features, truth, cv=folds, method="predict_proba")
    probe = told_by_features(some, sites, "site", FEW, 0)
    assert probe.auroc.value == pytest.approx(roc_auc_score(truth, chances[:, 1]), abs=0.005)


def test_three_scanners_are_a_mean_and_small_or_unknown_ones_are_left_out() -> None:
    some, _ = part(n=300, per_patient=1)
    values = [["a", "b", "c"][i % 3] if i < 280 else ("d" if i < 285 else None) for i in range(300)]
    assert some.features is not None
    shown = replace(some, features=some.features + 3.0 * np.eye(20)[[2 + "abcd".find(v or "d") for v in values]])
    probe = told_by_features(shown, values, "scanner", FEW, 0)
    assert (probe.values, probe.auroc.label, probe.auroc.n) == (3, "macro", 280)
    assert probe.auroc.value is not None and probe.auroc.value > 0.95


@pytest.mark.parametrize("values", [["a"] * 240, [None] * 240, ["a"] * 235 + ["b"] * 5])
def test_one_site_cannot_be_told_from_another(values: list[str | None]) -> None:
    probe = told_by_features(part()[0], values, "site", FEW, 0)
    assert probe.auroc.value is None and "fewer than two values" in probe.auroc.note and not probe.alarm


@pytest.mark.parametrize(("site_tells", "alarm"), [(0.0, False), (0.8, True)])
def test_a_site_with_more_diseased_patients_tells_the_label(site_tells: float, alarm: bool) -> None:
    some, sites = part(site_tells=site_tells)
    probe = told_by_value(some, sites, "binary", CLASSES, "label from the site alone", FEW, 0)
    assert bool(probe.alarm) == alarm and probe.auroc.label == "ill"


def test_that_the_site_is_unknown_may_tell_the_label_too() -> None:
    some, _ = part()
    values = [None if ill and i % 4 else "a" for i, ill in enumerate(some.targets[:, 1])]
    assert told_by_value(some, values, "binary", CLASSES, "label", FEW, 0).alarm


def test_labels_that_are_partly_unknown_are_judged_where_they_are_known() -> None:
    some, sites = part(site_tells=0.9)
    targets = np.stack([some.targets[:, 1], some.targets[:, 0]], 1)
    targets[:100, 0] = np.nan
    probe = told_by_value(replace(some, targets=targets), sites, "multilabel", ("a", "b"), "label", FEW, 0)
    assert probe.auroc.label == "macro" and probe.auroc.value is not None and probe.auroc.value > 0.7


@pytest.mark.parametrize(
    ("bright", "strength", "said"), [(0.0, 2.0, ""), (2.0, 4.0, "tell the label"), (3.0, 0.5, "not clearly better")]
)
def test_brightness_that_gives_the_label_away_is_said_and_compared_with_the_model(
    bright: float, strength: float, said: str
) -> None:
    (train, _), (test, _) = part(bright=bright), part(seed=1, bright=bright)
    probe, difference = told_by_properties(train, test, model_for(test, strength), "binary", CLASSES, FEW, 0)
    assert probe is not None and difference is not None
    assert (said in probe.alarm) and bool(probe.alarm) == bool(said)
    wanted = roc_auc_score(test.targets[:, 1], model_for(test, strength).probabilities[:, 1]) - probe.auroc.value
    assert difference.value == pytest.approx(wanted)


def test_few_patients_are_asked_nothing() -> None:
    (train, sites), (test, _) = part(n=16), part(seed=1)
    found = examine(train, test, model_for(test), {"site": sites}, "binary", CLASSES, FEW, 0)
    assert all(probe.auroc.value is None for probe in table(found)) and not found.alarms
    assert len(found.notes) == 3 and found.notes[2].endswith("training has fewer than 10 patients.")


def test_too_dark_and_too_bright_both_tell() -> None:
    train, test = part(seed=2)[0], part(seed=3)[0]
    for some in (train, test):
        assert some.properties is not None
        some.properties[:, 3] += 3 * np.sign(some.properties[:, 3]) * some.targets[:, 1]
    probe, _ = told_by_properties(train, test, model_for(test), "binary", CLASSES, FEW, 0)
    assert probe is not None and probe.auroc.value is not None and probe.auroc.value > 0.9


def test_a_model_of_other_studies_is_refused() -> None:
    train, test = part()[0], part(seed=1)[0]
    with pytest.raises(ValueError, match="in their order"):
        told_by_properties(train, test, model_for(train), "binary", CLASSES, FEW, 0)


def test_both_alarms_together_say_what_to_do() -> None:
    (train, sites), (test, _) = part(site_shows=3, site_tells=0.8), part(seed=1, site_shows=3, site_tells=0.8)
    found = examine(train, test, model_for(test), {"site": sites, "scanner": [None] * 240}, "binary", CLASSES, FEW, 0)
    assert any("Judge it on a site that it was not trained on" in alarm for alarm in found.alarms)
    assert any(note.startswith("scanner from the features: not estimable") for note in found.notes)
    assert [probe.question for probe in table(found)][-1] == "label from image properties alone"


def test_without_properties_nothing_is_said_of_them() -> None:
    (train, sites), (test, _) = part(), part(seed=1)
    bare = replace(train, properties=None)
    found = examine(bare, test, model_for(test), {"site": sites}, "binary", CLASSES, FEW, 0)
    assert found.properties is None and found.model_minus_properties is None and len(table(found)) == 2


def test_properties_are_what_they_are_called() -> None:
    pixels = np.zeros((2, 4, 6, 1), dtype=np.uint8)
    pixels[1, 1:3, 1:5] = 255
    found = dict(zip(PROPERTIES, image_properties(pixels, [(40, 60), (50, 50)], [2000, 4000]).T, strict=True))
    assert found["aspect"] == pytest.approx([np.log(1.5), 0])
    assert found["brightness"] == pytest.approx([0, 8 / 24]) and found["edge brightness"].tolist() == [0, 0]
    assert found["black"] == pytest.approx([1, 16 / 24]) and found["saturated"] == pytest.approx([0, 8 / 24])
    assert found["file size"] == pytest.approx(np.log([2000, 4000]))
    assert found["contrast"] == pytest.approx([0, np.std([1] * 8 + [0] * 16)])


def test_sixteen_bits_and_colours_are_read_alike() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    deep, colour = grey.astype(np.uint16) * 257, grey.repeat(3, 3)
    shapes, sizes = [(8, 8)] * 3, [100, 200, 300]
    assert image_properties(deep, shapes, sizes) == pytest.approx(image_properties(grey, shapes, sizes), abs=1e-6)
    assert image_properties(colour, shapes, sizes) == pytest.approx(image_properties(grey, shapes, sizes), abs=1e-6)


def test_findings_come_back_from_their_file(tmp_path: Path) -> None:
    (train, sites), (test, _) = part(site_shows=2), part(seed=1)
    found = examine(train, test, model_for(test), {"site": sites}, "binary", CLASSES, FEW, 0)
    write_record(tmp_path / "found.json", found)
    assert read_record(tmp_path / "found.json", ShortcutFindings) == found


def test_names_and_the_order_of_studies_change_nothing() -> None:
    some, sites = part(site_shows=1)
    assert some.features is not None
    back = Part(
        some.study_ids[::-1], tuple(f"x{p}" for p in some.patients[::-1]), some.targets[::-1], None, some.features[::-1]
    )
    one, other = (told_by_features(p, s, "site", FEW, 0) for p, s in ((some, sites), (back, sites[::-1])))
    assert one.auroc.value == pytest.approx(other.auroc.value) and one.p == other.p
