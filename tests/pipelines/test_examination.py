"""What is looked at beyond the metrics, step by step and without Prefect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from medtl.artifacts import load_array, read_record
from medtl.audit import AuditLog
from medtl.config import load_config
from medtl.dataset.io import read_split
from medtl.records import PARTS, FeatureCheck, Tally
from pipelines import examination, steps
from pipelines.prepared import Prepared, Trained

pytestmark = pytest.mark.slow


def test_the_features_of_all_parts_are_compared_across_them_without_another_look_at_the_test_part(
    config_file: Path, study: Path, tmp_path: Path
) -> None:
    table = (study / "labels.csv").read_text().splitlines()
    views = ["view", *(["PA", "AP", ""][row % 3] for row in range(len(table) - 1))]
    (study / "labels.csv").write_text("\n".join(f"{row},{view}" for row, view in zip(table, views, strict=True)))
    config = load_config(config_file, ["model.phases=features", "studies.labels.attributes=[view]"])
    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    split = steps.split_by_patient(config, scans, cohort)
    plan = steps.make_plan(config, scans, cohort, split)
    prepared = Prepared(scans, cohort, split, plan, steps.pack_images(config, scans, cohort, plan))
    shared = (cohort, split, plan, prepared.pack)
    checkpoint = steps.fit_in_phases(config, *shared, False)
    val = steps.predict_part(config, checkpoint, cohort, split, prepared.pack, "val")
    calibrator = examination.calibrate(config, plan, val)
    test = steps.predict_part(config, checkpoint, cohort, split, prepared.pack, "test", "model")
    trained = Trained(checkpoint, calibrator, test, val, test, steps.evaluate(config, plan, val, test))
    inside = examination.look_inside(config, checkpoint, prepared)
    stressed = examination.stress(config, prepared, trained)
    trained = replace(trained, examination=examination.examine(config, prepared, trained, inside, stressed))
    assert trained.examination is not None
    examined = examination.read_examination(trained.examination.path)
    found = examined.neighbours

    assert {group.value for group in examined.subgroups.groups if group.column == "view"} == {"PA", "AP", "unknown"}
    assert (trained.examination.path / "found_neighbours.json").is_file()
    known = read_split(split.path)
    counted = read_record(trained.examination.path / examination.TALLY, Tally)
    assert (counted.scans, counted.patients) == (len(known.test), len({known.groups[study] for study in known.test}))
    assert set(counted.answers) >= {"decision", "probability", "novelty"}
    assert {sum(counts.values()) for counts in counted.answers.values()} == {len(known.test)}
    features = np.concatenate([load_array(inside.path / f"{part}.npy") for part in PARTS]).astype(np.float64)
    sides = np.array([part for part in PARTS for _ in known.part(part)])
    owners = np.array([known.groups[study] for part in PARTS for study in known.part(part)])
    distance = cdist(features, features, "cosine")
    distance[owners[:, None] == owners] = np.inf
    logs = np.log(distance.min(axis=1))
    low, high = np.quantile(logs, [0.25, 0.75])
    assert isinstance(found, FeatureCheck) and found.images == 48
    assert found.threshold == pytest.approx(np.exp(low - 3 * (high - low)), rel=0.05)
    assert found.nearest == pytest.approx(distance[sides[:, None] != sides].min(), rel=0.05)
    assert set(found.suspects) == {"train-val", "train-test", "val-test"}
    assert [e["action"] for e in AuditLog(tmp_path / "workspace").events()].count("test.opened") == 1
