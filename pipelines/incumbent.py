"""The release that is live, measured on a candidate's test part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medtl.artifacts import MANIFEST, file_digest
from medtl.audit import AuditLog
from medtl.config import Config
from medtl.errors import ConfigError, PlanError
from medtl.pseudonyms import load_pseudonymiser
from medtl.records import Artifact, Study
from pipelines import examination, steps
from pipelines.prepared import Prepared, Trained

if TYPE_CHECKING:
    from medtl.registry.promotion import Beside


def compare_with_live(config: Config, prepared: Prepared, trained: Trained) -> Beside | None:
    """Let the live release of this name predict the candidate's test part, by its own plan; compare, paired by patient.

    Gives None where nobody asks for it, or nothing is live.

    Raises:
        ConfigError: the metric rests on decisions, or is not one.
        TamperedError: the live release is not what was entered.
    """
    from medtl.dataset.io import read_plan
    from medtl.evaluation.io import read_comparison
    from medtl.evaluation.metrics import METRICS
    from medtl.registry.io import Register
    from medtl.registry.promotion import Beside

    wanted = config.registry.promotion.incumbent
    if wanted is None:
        return None
    if wanted.metric not in METRICS or METRICS[wanted.metric].needs != "scores":
        known = ", ".join(name for name, row in METRICS.items() if row.needs == "scores")
        raise ConfigError(f"'registry.promotion.incumbent.metric': '{wanted.metric}' is not one of {known}.")
    register = Register(config.workspace)
    live = next((e for e in register.entries() if e.release.name == config.name and e.release.status == "live"), None)
    if live is None:
        return None
    folder = register.open(live)
    theirs, ours = read_plan(folder), read_plan(prepared.plan.path)
    if (theirs.task, theirs.classes) != (ours.task, ours.classes):
        return Beside(live.release.release_id, None, "it answers another question: task or classes differ")
    # a release holds its plan and its checkpoint, under the names that steps look for
    as_both = Artifact("release", file_digest(folder / "manifest.json"), live.digest, folder, reused=True)
    try:
        pack = steps.pack_images(config, prepared.scans, prepared.cohort, as_both)
    except PlanError:  # its plan is what it is; nothing in this config could change it
        return Beside(live.release.release_id, None, "its plan does not fit these scans")
    test = steps.predict_part(config, as_both, prepared.cohort, prepared.split, pack, "test", "incumbent")
    test = examination.apply_calibrator(config, as_both, test)
    names = ("candidate", live.release.release_id)
    found = steps.compare(config, trained.test, test, names, wanted.metric, wanted.margin)
    return Beside(
        live.release.release_id, read_comparison(found.path), _taught(config, live.release.provenance, prepared)
    )


def _taught(config: Config, provenance: Mapping[str, Any], prepared: Prepared) -> str:
    """Say how many of the test patients the live release learned from: these flatter it."""
    from medtl.dataset.io import read_split
    from medtl.studies.io import read_cohort

    known = taught(config, provenance)
    if known is None:
        return "how many of these patients taught it is not known"
    now = {s.study_id: s.patient for s in read_cohort(prepared.cohort.path).studies}
    tested = {now[study] for study in read_split(prepared.split.path).test}
    return f"{len({s.patient for s in known} & tested)} of these {len(tested)} patients taught it"


def taught(config: Config, provenance: Mapping[str, Any]) -> list[Study] | None:
    """Give the studies that a release learned from or was chosen on; None where this workspace cannot tell.

    It cannot where the release was imported, its split is gone, or patients had pseudonyms of another key then.
    """
    from medtl.dataset.io import read_split
    from medtl.studies.io import read_cohort

    root, made = config.workspace.absolute(), {}
    for event in AuditLog(config.workspace).events():
        if event["action"] in ("split.made", "cohort.made"):
            made[event["subject"]] = root / event["details"]["folder"]
    split, cohort = made.get(provenance.get("split")), made.get(provenance.get("cohort"))
    if split is None or cohort is None or not (split.is_dir() and cohort.is_dir()):
        return None
    key = json.loads((cohort / MANIFEST).read_bytes())["inputs"].get("key")
    if key != load_pseudonymiser(config.scans.key_file).fingerprint:
        return None
    parts = read_split(split)
    seen = {*parts.train, *parts.val}
    return [study for study in read_cohort(cohort).studies if study.study_id in seen]
