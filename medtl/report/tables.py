"""Tables of a report as plain text cells; the page escapes and draws them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medtl.records import Checkpoint, Evaluation, LeakKind, LearningCurve, Plan, Score
from medtl.report.facts import (
    PART_NAMES,
    Facts,
    all_exclusions,
    compose,
    count_parts,
    count_reasons,
    flatten,
    shown_config,
    weights_name,
)
from medtl.report.words import (
    DASH,
    HEADLINE_METRICS,
    compact,
    find_score,
    interval,
    label_name,
    metric_name,
    number,
    operating_point,
)

CLASS_METRICS = ("auroc", "average_precision", "sensitivity", "specificity", "ppv", "npv")
PLAN_NAMES = {
    "size": "Size, rows × columns",
    "channels": "Channels",
    "bits": "Bits of one value",
    "intensity": "Intensity",
    "range": "Values that become 0 and 1",
    "percentiles": "Percentiles",
    "volumes": "Volumes",
    "axis": "Sliced along",
    "slices": "Slices of a volume",
    "depth": "Slices of a whole volume",
}


@dataclass(frozen=True, slots=True)
class Table:
    """A captioned table; the first cell of a row names the row. ``numeric`` columns are set to the right."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    mono: bool = False


@dataclass(frozen=True, slots=True)
class ScoreGroup:
    """The scores of one label, for the table of results."""

    label: str
    scores: tuple[Score, ...]


def exclusion_table(facts: Facts) -> Table:
    """Tabulate what was left out, how often and why."""
    rows = tuple((row.code, row.stage, f"{row.count:,}", row.reason) for row in count_reasons(all_exclusions(facts)))
    return Table("What was left out, and why", ("Code", "Stage", "Count", "Reason"), rows, frozenset({2}))


def part_table(facts: Facts) -> Table:
    """Tabulate studies, patients, groups and class balance of each part."""
    parts = count_parts(facts)
    rows: list[tuple[str, ...]] = [("Studies", *(f"{p.studies:,}" for p in parts))]
    rows.append(("Patients", *(f"{p.patients:,}" if facts.cohort.patients_known else DASH for p in parts)))
    rows.append(("Groups kept together", *(f"{p.groups:,}" for p in parts)))
    for index, name in enumerate(facts.cohort.classes):
        rows.append((f"Class “{name}”", *(_share(p.positive[index], p.studies - p.unknown[index]) for p in parts)))
        if any(p.unknown[index] for p in parts):
            rows.append((f"Class “{name}”, not stated", *(f"{p.unknown[index]:,}" for p in parts)))
    head = ("", *(PART_NAMES[p.part] for p in parts))
    return Table("Studies, patients and class balance in each part", head, tuple(rows), frozenset({1, 2, 3}))


def _share(count: int, total: int) -> str:
    if not total:
        return DASH
    percent = "<1" if 0 < count < total / 200 else f"{100 * count / total:.0f}"
    return f"{count:,} ({percent} %)"


def composition_table(facts: Facts) -> Table:
    """Tabulate who the patients of each part are."""
    rows = tuple((f"{row.variable}: {row.value}", *row.cells) for row in compose(facts))
    caption = "Patients in each part, as far as recorded (fewer than five are shown as <5)"
    return Table(caption, ("", *PART_NAMES.values()), rows, frozenset({1, 2, 3}))


def model_table(checkpoint: Checkpoint) -> Table:
    """Tabulate what the network is and where its weights came from."""
    weights = checkpoint.weights
    loaded = f"{100 * weights.share:.1f} % of the trunk's parameters ({weights.loaded:,} tensors)"
    rows = (
        ("Backbone", checkpoint.backbone),
        ("Parameters", f"{checkpoint.parameters:,}"),
        ("Input", f"{checkpoint.size[0]} × {checkpoint.size[1]} pixels, {_channels(checkpoint.channels)}"),
        ("Weights from", weights_name(weights.source)),
        ("Share loaded", loaded),
        ("Not in the weights", _names(weights.missing)),
        ("Not in the network", _names(weights.unexpected)),
        ("Licence of the weights", weights.licence or DASH),
        ("To cite", weights.citation or DASH),
        ("Digest of the weights (sha256)", weights.sha256 or DASH),
    )
    return Table("The network and the weights it started from", ("", "Value"), rows)


def _channels(channels: int) -> str:
    return {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")


def _names(names: tuple[str, ...]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def phase_table(checkpoint: Checkpoint) -> Table:
    """Tabulate the phases of unfreezing and the proof that frozen layers stayed as they were."""
    head = ("Phase", "Trained", "Frozen", "Trainable", "Peak rates", "Best epoch", "Val. loss", "Val. AUROC",
            "Frozen layers", "Kept", "Why")  # fmt: skip
    rows = tuple(
        (
            phase.name,
            ", ".join(phase.unfrozen) or "nothing",
            ", ".join(phase.frozen) or "nothing",
            _share(phase.trainable_parameters, phase.trainable_parameters + phase.frozen_parameters),
            ", ".join(f"{stage} {rate:.2g}" for stage, rate in phase.learning_rates.items()),
            f"{phase.best_epoch} of {phase.epochs}" if phase.head == "gradient" else f"solved: {phase.head}",
            number(phase.val_loss),
            number(phase.val_auroc),
            _untouched(phase.frozen_digest_before, phase.frozen_digest_after) if phase.frozen else "none frozen",
            "✓ kept" if phase.kept else DASH,
            phase.reason or DASH,
        )
        for phase in checkpoint.phases
    )
    return Table("Phases of unfreezing", head, rows, frozenset({3, 5, 6, 7}))


def growth_table(curve: LearningCurve) -> Table:
    """Tabulate a learning curve."""
    name = metric_name(curve.points[-1].score.metric)
    rows = tuple((f"{one.patients:,}", f"{one.studies:,}", interval(one.score)) for one in curve.points)
    return Table("Fewer training patients, on validation", ("Patients", "Studies", name), rows, frozenset({1}))


def _untouched(before: str, after: str) -> str:
    return f"unchanged ({after[:10]}…)" if before == after else "CHANGED"


def confusion_tables(evaluation: Evaluation) -> tuple[Table, ...]:
    """Tabulate truth against decision: one table, or one for each finding of a multi-label model."""
    counts, classes = evaluation.confusion, evaluation.classes
    if not counts:
        return ()
    if evaluation.task != "multilabel":
        decision = "decision at the operating point" if evaluation.task == "binary" else "most probable class"
        caption = f"Truth (rows) against {decision} (columns), studies"
        return (_confusion_table(caption, classes, counts),)
    rows = tuple(
        (name, *(f"{n:,}" for row in (counts[i + 1], counts[i]) for n in reversed(row)))
        for i, name in zip(range(0, len(counts), 2), classes, strict=True)
    )
    head = ("Finding", "present, found", "present, missed", "absent, false alarm", "absent, cleared")
    return (Table("Truth and decision at the operating point, studies", head, rows, frozenset(range(1, 5))),)


def _confusion_table(caption: str, names: tuple[str, ...], counts: tuple[tuple[int, ...], ...]) -> Table:
    head = ("Truth", *(f"decided “{name}”" for name in names))
    rows = tuple((f"“{name}”", *(f"{n:,}" for n in row)) for name, row in zip(names, counts, strict=True))
    return Table(caption, head, rows, frozenset(range(1, len(head))))


def operating_table(evaluation: Evaluation) -> Table:
    """Tabulate the thresholds and where they were chosen."""
    rows = tuple((point.label, operating_point(point)) for point in evaluation.operating_points)
    return Table("Operating points", ("Class", "Threshold"), rows)


def score_groups(evaluation: Evaluation) -> tuple[ScoreGroup, ...]:
    """Group the scores by label: the mean over classes first, then the classes, then anything else."""
    order = {label: i for i, label in enumerate(("macro", "all", *evaluation.classes))}
    labels = sorted(dict.fromkeys(s.label for s in evaluation.scores), key=lambda label: order.get(label, len(order)))
    return tuple(
        ScoreGroup(label_name(label, evaluation.classes), tuple(s for s in evaluation.scores if s.label == label))
        for label in labels
    )


def headline_group(evaluation: Evaluation) -> ScoreGroup | None:
    """Give the few figures that a reader needs: of the positive class, or the mean over classes."""
    found = tuple(s for s in (find_score(evaluation, metric) for metric in HEADLINE_METRICS) if s is not None)
    if not found:
        return None
    return ScoreGroup(label_name(found[0].label, evaluation.classes), found)


def class_table(evaluation: Evaluation) -> Table | None:
    """Tabulate the few figures of each class side by side, where there are several."""
    if evaluation.task == "binary":
        return None
    found = {(s.label, s.metric): s for s in evaluation.scores}
    shown = [m for m in CLASS_METRICS if any((name, m) in found for name in evaluation.classes)]
    rows = tuple(
        (name, *(compact(found[name, m]) if (name, m) in found else DASH for m in shown)) for name in evaluation.classes
    )
    return Table("Each class", ("Class", *(metric_name(m) for m in shown)), rows) if shown else None


def fold_table(evaluation: Evaluation) -> Table | None:
    """Tabulate what each fold's test part gave, where folds are pooled."""
    if not evaluation.folds:
        return None
    shown = [m for m in CLASS_METRICS if any(m in fold.values for fold in evaluation.folds)]
    several = len({fold.repeat for fold in evaluation.folds}) > 1
    rows = tuple(
        (
            f"{fold.fold}, repeat {fold.repeat + 1}" if several else fold.fold,
            f"{fold.n:,}",
            f"{fold.patients:,}",
            *(number(fold.values.get(m)) for m in shown),
        )
        for fold in evaluation.folds
    )
    head = ("Fold", "Studies", "Patients", *(metric_name(m) for m in shown))
    return Table("Each fold's own test part", head, rows, frozenset(range(1, len(head))))


def comparison_table(facts: Facts) -> Table | None:
    """Tabulate the headline figures of both models side by side, where there are two."""
    if facts.scratch_evaluation is None:
        return None
    rows = []
    for metric in dict.fromkeys(s.metric for s in facts.evaluation.scores):
        pair = (find_score(facts.evaluation, metric), find_score(facts.scratch_evaluation, metric))
        rows.append((metric_name(metric), *(DASH if s is None else compact(s) for s in pair)))
    return Table("Both models on the same test part", ("Metric", "With transfer", "From scratch"), tuple(rows))


def plan_table(plan: Plan) -> Table:
    """Tabulate every decision of the plan with its reason."""
    values = {
        "size": f"{plan.size[0]} × {plan.size[1]}",
        "channels": f"{plan.channels} neighbouring slices" if plan.neighbours else _channels(plan.channels),
        "bits": str(plan.bits),
        "intensity": "one fixed range for all" if plan.intensity == "fixed" else "each by its own range",
        "range": f"{leaf(plan.low)} and {leaf(plan.high)}" if plan.intensity == "fixed" else "",
        "percentiles": f"{plan.percentiles[0]:g} and {plan.percentiles[1]:g}" if plan.intensity == "per_image" else "",
        "volumes": {"slices": "as slices that vote", "whole": "whole"}.get(plan.volumes or "", ""),
        "axis": plan.axis or "",
        "slices": str(plan.slices) if plan.volumes == "slices" else "",
        "depth": str(plan.depth) if plan.depth else "",
    }
    rows = [(PLAN_NAMES[key], value, plan.reasons.get(key, DASH)) for key, value in values.items() if value]
    rows += [(key.replace("_", " "), DASH, plan.reasons[key]) for key in sorted(set(plan.reasons) - set(values))]
    return Table("How an image becomes the network's input", ("Decision", "Value", "Reason"), tuple(rows))


def gate_table(facts: Facts) -> Table:
    """Tabulate the conditions of the gate and how they went."""
    rows = tuple((c.condition, number(c.observed), "✓ met" if c.passed else "✗ not met") for c in facts.gate)
    return Table("Conditions of the gate", ("Condition", "Observed", "Result"), rows, frozenset({1}))


def provenance_table(facts: Facts) -> Table:
    """Tabulate the digests that say exactly what was used."""
    rows = {"release": facts.release_id, "model weights (sha256)": facts.checkpoint.weights_sha256}
    named = {"environment": dict(facts.checkpoint.environment)} | dict(facts.provenance)
    rows |= {key: leaf(value) for key, value in flatten(named).items()}
    return Table("Digests and versions", ("What", "Value"), tuple(rows.items()), mono=True)


def mapping_table(caption: str, mapping: Mapping[str, Any]) -> Table:
    """Tabulate a mapping, nested keys dotted."""
    rows = tuple((key.replace("_", " "), leaf(value)) for key, value in flatten(mapping).items())
    return Table(caption, ("What", "Value"), rows)


def config_table(facts: Facts) -> Table:
    """Tabulate every setting of the run; paths of the machine are left out."""
    rows = tuple((key, leaf(value)) for key, value in shown_config(facts.config).items())
    return Table("Settings of the run (paths left out)", ("Key", "Value"), rows, mono=True)


def leaf(value: Any) -> str:
    """Write one value of a mapping as text."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(leaf(item) for item in value) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


_ASKED: Mapping[LeakKind, str] = {
    "patient": "The same patient",
    "exam": "The same exam",
    "group": "The same named group",
    "pixels": "Identical pixels",
    "near": "Nearly the same picture",
    "pretraining": "A picture that the weights were trained on",
}


def proof_table(facts: Facts) -> Table:
    """List what was looked for on two sides of the split, in how many studies, and how much was found."""
    proof = facts.proof
    rows = []
    for kind, asked in _ASKED.items():
        studies = proof.checked.get(kind)
        found = sum(leak.count for leak in proof.leaks if leak.kind == kind)
        how = DASH if studies is None else f"{studies:,}"
        if kind == "near":
            asked += ", by pixels alone" if proof.by_features is None else ", by pixels and by a network's features"
        rows.append((asked, how, DASH if studies is None else f"{found:,}"))
    return Table("On two sides of the split", ("Looked for", "In studies", "Found"), tuple(rows), frozenset({1, 2}))
