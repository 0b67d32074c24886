"""What a report is made from, and what is counted from it.

The caller hands over finished records; nothing is measured here. Counts of people are protected where they are made:
a cell of fewer than five patients becomes ``<5``, and where it alone is hidden its smallest neighbour becomes ``≥5``,
because the total would give it away. Paths of the machine that ran are left out: the same model is the same report
wherever it was made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from medtl.records import (
    PARTS,
    Checkpoint,
    CleanProof,
    Cohort,
    Comparison,
    Evaluation,
    Examination,
    Exclusion,
    Explanations,
    GateCheck,
    GridPlan,
    LearningCurve,
    Part,
    Plan,
    Predictions,
    Split,
    Study,
)
from medtl.report.acquired import Acquisition

PART_NAMES: Mapping[Part, str] = {"train": "Training", "val": "Validation", "test": "Test"}
SMALLEST_CELL = 5
MOST_VALUES = 12  # of one variable; the rest are counted together
MOST_SIZES = 6  # of images, rows by columns; more of them are told by their median
OLDEST_SHOWN = 90  # a higher age can identify a person
LOCAL_PATHS = (
    "workspace",
    "scans.source",
    "scans.key_file",
    "studies.labels.table",
    "model.vault",
    "dataset.split.pretraining_hashes",
    "audit.anchor_file",
    "audit.anchor_command",
)
UNKNOWN = "not recorded"
HISTOGRAM_BINS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything a report may say.

    ``config`` is ``Config.model_dump(mode="json")``; ``files``, ``scans`` and ``scan_patients`` (``None``: not of every
    scan is it known whose it is) are counts; ``acquisitions`` say of a study how its scan was taken; ``provenance``
    holds the digests of data, config, code, weights and environment; ``resources`` (seconds, memory) is shown where it
    is given and differs from run to run; ``test_openings`` is how often the sealed test part was read. ``predictions``
    are those of the test part; they are counted and not shown.
    """

    title: str
    config: Mapping[str, Any]
    intended_use: str | None
    limits: tuple[str, ...]
    files: int
    scans: int
    exclusions: tuple[Exclusion, ...]
    cohort: Cohort
    split: Split
    proof: CleanProof
    plan: Plan | GridPlan
    checkpoint: Checkpoint
    evaluation: Evaluation
    scratch: Checkpoint | None
    scratch_evaluation: Evaluation | None
    comparison: Comparison | None
    release_status: str
    gate: tuple[GateCheck, ...]
    release_id: str
    provenance: Mapping[str, Any]
    test_openings: int
    scan_patients: int | None = None
    acquisitions: Mapping[str, Acquisition] = field(default_factory=dict)
    examination: Examination | None = None
    explanations: Explanations | None = None
    beside: Comparison | None = None  # with the live release, where that was asked for and could be done
    beside_note: str = ""  # why it could not be done; else how many of the test patients taught the live one
    predictions: Predictions | None = None
    growth: LearningCurve | None = None  # on validation; where it was asked for
    resources: Mapping[str, Any] = field(default_factory=dict)

    @property
    def level_percent(self) -> str:
        """Coverage of the intervals, in percent."""
        return f"{100 * float(self.config['evaluation']['uncertainty']['level']):g}"


@dataclass(frozen=True, slots=True)
class ReasonCount:
    """How many items one stage left out for one reason."""

    stage: str
    code: str
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class FlowBox:
    """One box of the flow; ``patients`` is ``None`` where they are not known."""

    name: str
    items: int
    unit: Literal["files", "scans", "studies"]
    patients: int | None


@dataclass(frozen=True, slots=True)
class FlowStep:
    """One box on the way from files to parts, and what left the way after it.

    ``patients_lost`` are in this box and not in the next: whoever loses one scan and keeps another is not lost.
    """

    box: FlowBox
    left_out: tuple[ReasonCount, ...]
    patients_lost: int | None


@dataclass(frozen=True, slots=True)
class Flow:
    """The way from files to the parts of the split."""

    steps: tuple[FlowStep, ...]
    parts: tuple[FlowBox, ...]


@dataclass(frozen=True, slots=True)
class PartCount:
    """One part of the split in numbers; ``positive`` and ``unknown`` have one entry per class."""

    part: Part
    studies: int
    patients: int
    groups: int
    positive: tuple[int, ...]
    unknown: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Composition:
    """One value of one variable, as protected counts of patients in each part."""

    variable: str
    value: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Studies of one class by the probability they were given, in bins of equal width from 0 to 1."""

    label: str
    absent: tuple[int, ...]
    present: tuple[int, ...]


def all_exclusions(facts: Facts) -> tuple[Exclusion, ...]:
    """Join the exclusions of all stages; one that was handed on is counted once."""
    return tuple(dict.fromkeys((*facts.exclusions, *facts.cohort.exclusions, *facts.split.exclusions)))


def count_reasons(exclusions: Iterable[Exclusion]) -> tuple[ReasonCount, ...]:
    """Count exclusions per stage and code, with the wording most of them share."""
    wordings: dict[tuple[str, str], Counter[str]] = {}
    for item in exclusions:
        wordings.setdefault((item.stage, item.code), Counter())[item.reason] += 1
    rows = [
        ReasonCount(stage, code, words.total(), min(words, key=lambda text: (-words[text], text)))
        for (stage, code), words in wordings.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.stage, -row.count, row.code)))


def studies_by_part(facts: Facts) -> dict[Part, list[Study]]:
    """Give the studies of each part of the split."""
    by_id = {study.study_id: study for study in facts.cohort.studies}
    return {part: [by_id[study_id] for study_id in facts.split.part(part)] for part in PARTS}


def count_parts(facts: Facts) -> tuple[PartCount, ...]:
    """Count studies, patients, groups and classes of each part."""
    return tuple(_count_part(facts, part, studies) for part, studies in studies_by_part(facts).items())


def _count_part(facts: Facts, part: Part, studies: list[Study]) -> PartCount:
    classes = range(len(facts.cohort.classes))
    return PartCount(
        part=part,
        studies=len(studies),
        patients=len({study.patient for study in studies}),
        groups=len({facts.split.groups[study.study_id] for study in studies}),
        positive=tuple(sum(study.target[c] == 1 for study in studies) for c in classes),
        unknown=tuple(sum(study.target[c] is None for study in studies) for c in classes),
    )


def flow(facts: Facts) -> Flow:
    """Count patients and what there is of them from files to parts, and what was left out at each step."""
    parts, everybody = studies_by_part(facts), facts.cohort.studies
    reasons = count_reasons(all_exclusions(facts))
    in_parts = _patients(facts, [study for studies in parts.values() for study in studies])
    scans = "Scans decoded, masks among them" if facts.cohort.structures else "Scans decoded"
    studies = f"Studies with a {'mask' if facts.cohort.structures else 'label'}"
    boxes = (
        FlowBox("Files found", facts.files, "files", None),
        FlowBox(scans, facts.scans, "scans", facts.scan_patients if facts.cohort.patients_known else None),
        FlowBox(studies, len(everybody), "studies", _patients(facts, everybody)),
    )
    after = (*(box.patients for box in boxes[1:]), in_parts)
    steps = tuple(
        FlowStep(
            box,
            tuple(reason for reason in reasons if reason.stage == stage),
            None if box.patients is None or left is None else box.patients - left,
        )
        for box, stage, left in zip(boxes, ("scans", "studies", "dataset"), after, strict=True)
    )
    return Flow(
        steps,
        tuple(FlowBox(PART_NAMES[part], len(some), "studies", _patients(facts, some)) for part, some in parts.items()),
    )


def _patients(facts: Facts, studies: Iterable[Study]) -> int | None:
    return len({study.patient for study in studies}) if facts.cohort.patients_known else None


def compose(facts: Facts) -> tuple[Composition, ...]:
    """Count the patients of each part by who they are and how they were scanned, with small cells protected."""
    parts = list(studies_by_part(facts).values())
    variables: tuple[tuple[str, Callable[[Study], str | None]], ...] = (
        ("Sex", lambda study: study.sex),
        ("Site", lambda study: study.site),
        ("Scanner", lambda study: study.scanner),
    )
    rows = [row for name, value_of in variables for row in _compose_variable(name, value_of, parts)]
    age = _compose_number("Age, years", lambda study: study.age_years, _age, parts)
    named = sorted({name for studies in parts for study in studies for name in study.attributes})
    further = [row for name in named for row in _compose_variable(name, partial(_attribute, name), parts)]
    return (*rows, age, *_compose_acquisition(facts, parts), *further)


def _compose_acquisition(facts: Facts, parts: list[list[Study]]) -> Iterable[Composition]:
    def of(study: Study) -> Acquisition:
        return facts.acquisitions.get(study.study_id, Acquisition())

    yield from _compose_variable("Modality", lambda study: of(study).modality, parts)
    if len({of(study).size for studies in parts for study in studies}) <= MOST_SIZES:
        yield from _compose_variable("Rows × columns", lambda study: of(study).size, parts)
    else:
        yield _compose_number("Rows", lambda study: of(study).rows, _whole, parts)
        yield _compose_number("Columns", lambda study: of(study).columns, _whole, parts)
    if any(of(study).slice_mm is not None for studies in parts for study in studies):
        yield _compose_number("Slice spacing, mm", lambda study: of(study).slice_mm, _mm, parts)
        yield _compose_number("In-plane spacing, mm", lambda study: of(study).in_plane_mm, _mm, parts)


def _attribute(name: str, study: Study) -> str | None:
    return study.attributes.get(name)


def _compose_variable(
    name: str, value_of: Callable[[Study], str | None], parts: list[list[Study]]
) -> Iterable[Composition]:
    overall = Counter(value for value, _ in {(value_of(s), s.patient) for studies in parts for s in studies})
    named = sorted((v for v in overall if v is not None), key=lambda v: (-overall[v], v))
    shown, rest = named[:MOST_VALUES], set(named[MOST_VALUES:])
    keys: list[tuple[str, set[str | None]]] = [(value, {value}) for value in shown]
    if rest:
        keys.append((f"{len(rest)} others", set(rest)))
    if None in overall or not named:
        keys.append((UNKNOWN, {None}))
    columns = [
        protect_cells([len({s.patient for s in studies if value_of(s) in values}) for _, values in keys])
        for studies in parts
    ]
    return (Composition(name, key, tuple(column[i] for column in columns)) for i, (key, _) in enumerate(keys))


def protect_cells(counts: list[int]) -> list[str]:
    """Write counts of patients so that none below five can be read, or told from the total.

    Source: primary and complementary cell suppression, as in statistical disclosure control.
    """
    small = [i for i, n in enumerate(counts) if 0 < n < SMALLEST_CELL]
    cells = [f"<{SMALLEST_CELL}" if i in small else f"{n:,}" for i, n in enumerate(counts)]
    large = [i for i, n in enumerate(counts) if n >= SMALLEST_CELL]
    if len(small) == 1 and large:
        cells[min(large, key=lambda i: counts[i])] = f"≥{SMALLEST_CELL}"
    return cells


def _compose_number(
    name: str, value_of: Callable[[Study], float | None], write: Callable[[float], str], parts: list[list[Study]]
) -> Composition:
    known = any(value_of(study) is not None for studies in parts for study in studies)
    cells = tuple(_median_cell(studies, value_of, write) for studies in parts)
    return Composition(name, "median (quartiles)" if known else UNKNOWN, cells)


def _median_cell(studies: list[Study], value_of: Callable[[Study], float | None], write: Callable[[float], str]) -> str:
    """Write median and quartiles over patients, each with the median of his own studies."""
    of_patient: dict[str, list[float]] = {}
    for study in studies:
        if (value := value_of(study)) is not None:
            of_patient.setdefault(study.patient, []).append(value)
    if len(of_patient) < SMALLEST_CELL:
        return "–" if not of_patient else f"<{SMALLEST_CELL} known"
    lower, middle, upper = (write(v) for v in quantiles(map(median, of_patient.values()), n=4, method="inclusive"))
    return f"{middle} ({lower} to {upper})"


def _age(years: float) -> str:
    return f"{years:.0f}" if years < OLDEST_SHOWN else f"{OLDEST_SHOWN}+"


def _whole(pixels: float) -> str:
    return f"{pixels:.0f}"


def _mm(length: float) -> str:
    return f"{length:.3g}"


def score_histograms(facts: Facts) -> tuple[Histogram, ...]:
    """Count studies with and without each finding by probability; empty without predictions."""
    given, classes = facts.predictions, facts.evaluation.classes
    if given is None:
        return ()
    reported = [len(classes) - 1] if facts.evaluation.task == "binary" else range(len(classes))
    made = []
    for index in reported:
        truth, score = given.targets[:, index], given.probabilities[:, index]
        counts = [np.histogram(score[truth == is_so], HISTOGRAM_BINS, (0, 1))[0].tolist() for is_so in (0, 1)]
        made.append(Histogram(classes[index], tuple(counts[0]), tuple(counts[1])))
    return tuple(made)


def has_unseen_sites(facts: Facts) -> bool:
    """Tell whether every test study is of a site, and none of these sites was trained or chosen on."""
    by_part = studies_by_part(facts)
    tested, learned = {s.site for s in by_part["test"]}, {s.site for s in (*by_part["train"], *by_part["val"])}
    return bool(tested) and None not in tested | learned and not tested & learned


def shown_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a configuration to dotted keys, without the paths of the machine that ran it."""
    flat = {key: value for key, value in flatten(config).items() if key not in LOCAL_PATHS}
    if isinstance(weights := flat.get("model.weights"), str):
        flat["model.weights"] = weights_name(weights)
    return flat


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give the leaves of nested mappings under dotted keys, sorted."""
    leaves: dict[str, Any] = {}
    for key in sorted(mapping):
        value = mapping[key]
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def weights_name(source: str) -> str:
    """Name where weights came from; of a local path only the file's own name."""
    if source == "none":
        return "none (random start)"
    path = PurePath(source)
    return path.name if path.suffix in {".pth", ".safetensors"} and "://" not in source else source


def as_json(facts: Facts) -> dict[str, Any]:
    """Reduce the facts to a JSON value: studies become counts, paths are left out."""
    parts = count_parts(facts)
    return {
        "title": facts.title,
        "release": {"id": facts.release_id, "status": facts.release_status, "gate": _plain(facts.gate)},
        "intended_use": facts.intended_use,
        "limits": list(facts.limits),
        "config": _plain(shown_config(facts.config)),
        "data": {
            "files": facts.files,
            "scans": facts.scans,
            "studies": len(facts.cohort.studies),
            "patients": len({study.patient for study in facts.cohort.studies}),
            "patients_known": facts.cohort.patients_known,
            "task": facts.cohort.task,
            "classes": list(facts.cohort.classes),
            "warnings": list(facts.cohort.warnings),
            "exclusions": _plain(count_reasons(all_exclusions(facts))),
            "flow": _plain(flow(facts)),
            "composition": _plain(compose(facts)),
        },
        "split": {
            "predefined": facts.split.predefined,
            "proof": _plain(facts.proof),
            "unseen_sites": has_unseen_sites(facts),
            "parts": _plain(parts),
            "test_openings": facts.test_openings,
        },
        "plan": _plain(facts.plan),
        "model": _checkpoint(facts.checkpoint),
        "evaluation": _plain(facts.evaluation),
        "scratch": {
            "model": None if facts.scratch is None else _checkpoint(facts.scratch),
            "evaluation": _plain(facts.scratch_evaluation),
            "comparison": _plain(facts.comparison),
        },
        "examination": _plain(facts.examination),
        "explanations": None if facts.explanations is None else _explanations(facts.explanations),
        "incumbent": _plain(facts.beside),
        "learning_curve": _plain(facts.growth),
        "histograms": _plain(score_histograms(facts)),
        "provenance": _plain(facts.provenance),
        "resources": _plain(facts.resources),
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    value: dict[str, Any] = _plain(checkpoint)
    value["weights"]["source"] = weights_name(checkpoint.weights.source)
    return value


def _explanations(found: Explanations) -> dict[str, Any]:
    """Reduce explanations to what was measured; the single cases are pictures, and stay on the page."""
    value: dict[str, Any] = _plain(found)
    del value["cases"]
    return value


def _plain(record: Any) -> Any:
    return _finite(TypeAdapter(Any).dump_python(record, mode="json"))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
