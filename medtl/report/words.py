"""Numbers and findings in words, so that a page and a person say the same.

Three decimals; what is unknown is an en dash, never 0; what is not zero never reads as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medtl.records import Comparison, Evaluation, FeatureCheck, Leak, LearningCurve, OperatingPoint, Score
from medtl.report.facts import (
    UNKNOWN,
    Facts,
    FlowBox,
    FlowStep,
    compose,
    count_parts,
    has_unseen_sites,
    studies_by_part,
)

DASH = "–"
SHOWN_CLASSES = 8

METRICS = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "Positive predictive value",
    "npv": "Negative predictive value",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "mcc": "Matthews correlation (−1 to 1)",
    "kappa": "Cohen’s kappa (−1 to 1)",
    "weighted_kappa": "Kappa, quadratic weights (−1 to 1)",
    "positive_likelihood_ratio": "Positive likelihood ratio",
    "negative_likelihood_ratio": "Negative likelihood ratio (lower is better)",
    "net_benefit": "Net benefit at the operating point",
    "brier": "Brier score (lower is better)",
    "log_loss": "Log loss (lower is better)",
    "calibration_error": "Calibration error (lower is better)",
    "calibration_slope": "Calibration slope (1 is right)",
    "calibration_intercept": "Calibration intercept (0 is right)",
    "prevalence": "Share with the finding",
    "dice": "Dice",
    "iou": "IoU",
    "nsd": "Normalised surface distance",
    "hd95_mm": "HD95, mm (lower is better)",
    "hd_mm": "Hausdorff distance, mm (lower is better)",
    "assd_mm": "Mean surface distance, mm (lower is better)",
    "volume_error_mm3": "Volume error, mm³ (0 is right)",
    "absolute_volume_error_mm3": "Size of the volume error, mm³ (lower is better)",
    "relative_volume_error": "Relative volume error (0 is right)",
    "absolute_relative_volume_error": "Size of the relative volume error (lower is better)",
    "lesion_sensitivity": "Lesions found",
    "lesion_precision": "Predicted lesions that are right",
    "lesion_f1": "F1 of lesions",
    "false_lesions_per_study": "Invented lesions in a study (lower is better)",
    "pixel_auroc": "AUROC of pixels, all images together",
    "mean_pixel_auroc": "AUROC of pixels, mean over images",
    "dice_foretold_error": "Error of the foretold Dice (lower is better)",
    "pointing_hits": "Highest place in the mark",
    "pointing_hits_chance": "Highest place in the mark, by chance",
    "pointing_hits_gain": "Highest place in the mark, minus chance",
    "relevance_inside": "Share of what speaks for it in the mark",
    "relevance_inside_chance": "Share of what speaks for it in the mark, by chance",
    "relevance_inside_gain": "Share of what speaks for it in the mark, minus chance",
    "flagged": "Share of studies that are flagged",
    "failures_flagged": "Share of failures that are flagged",
}
LOWER_IS_BETTER = frozenset({
    "negative_likelihood_ratio", "brier", "log_loss", "calibration_error", "hd95_mm", "hd_mm", "assd_mm",
    "absolute_volume_error_mm3", "absolute_relative_volume_error", "false_lesions_per_study",
})  # fmt: skip
HEADLINE_METRICS = (
    "auroc", "average_precision", "sensitivity", "specificity", "ppv", "npv", "balanced_accuracy", "prevalence",
)  # fmt: skip
# A bar from 0 to 1 says nothing of these, even where a value happens to lie there.
UNBOUNDED = frozenset({
    "mcc", "kappa", "weighted_kappa", "positive_likelihood_ratio", "negative_likelihood_ratio", "net_benefit",
    "log_loss", "calibration_slope", "calibration_intercept", "hd95_mm", "hd_mm", "assd_mm", "volume_error_mm3",
    "absolute_volume_error_mm3", "relative_volume_error", "absolute_relative_volume_error", "false_lesions_per_study",
    "pointing_hits_gain", "relevance_inside_gain",
})  # fmt: skip
PARTS_IN_WORDS = {"train": "training", "val": "validation", "test": "test"}
STATUSES = {
    "validated": "Validated: every condition of the gate was met.",
    "candidate": "Candidate: not validated. Not to be used on patients.",
    "refused": "Refused: the gate was not passed. Not to be used on patients.",
}
Verdict = Literal["helped", "hurt", "no clear difference", "not estimable"]


@dataclass(frozen=True, slots=True)
class Headline:
    """One large figure of the summary, with its meaning in plain words."""

    name: str
    score: Score | None
    meaning: str


def number(value: float | None, decimals: int = 3) -> str:
    """Write a figure; a small one that is not zero is not written as zero."""
    if value is None:
        return DASH
    least = 10.0**-decimals
    if 0 < abs(value) < least / 2:
        return f"<{least:.{decimals}f}" if value > 0 else f">−{least:.{decimals}f}"
    return f"{value:.{decimals}f}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Write the p value of a test, as journals ask: to the thousandth, and below that ``<0.001``."""
    return "<0.001" if value is not None and value < 0.001 else number(value)


def interval(score: Score) -> str:
    """Write ``value [low, high]``, or that it is not estimable and why."""
    if score.value is None:
        return not_estimable(score)
    if score.low is None or score.high is None:
        return f"{number(score.value)} [{DASH}]"
    return f"{number(score.value)} [{number(score.low)}, {number(score.high)}]"


def compact(score: Score) -> str:
    """Write ``value [low, high]`` so that a narrow column breaks it before the bracket only."""
    return interval(score) if score.value is None else interval(score).replace(", ", ",\u00a0")


def not_estimable(score: Score) -> str:
    """Say why a figure is missing."""
    reason = score.note.removeprefix("not estimable").removeprefix(":").strip()
    return f"not estimable: {reason}" if reason else "not estimable"


def metric_name(metric: str) -> str:
    """Give a metric's name as a clinician writes it."""
    known = METRICS.get(metric.removeprefix("median_"))
    if known is None:
        return metric.replace("_", " ").capitalize()
    return known if metric in METRICS else f"{known}, median"


def metric_in(metric: str, unit: Literal["mm", "pixels"]) -> str:
    """Give a metric's name with the unit that distances are really in: of pictures without a spacing, pixels."""
    name = metric_name(metric)
    return name if unit == "mm" else name.replace(", mm³", ", pixels").replace(", mm", ", pixels")


def label_name(label: str, classes: tuple[str, ...]) -> str:
    """Give a label's name: a class, or the mean over all of them."""
    if label in classes:
        return label
    return {"macro": f"Mean over {len(classes)} classes", "all": "All classes together"}.get(label, label)


def class_list(classes: tuple[str, ...]) -> str:
    """Name the classes, the first few of many."""
    shown = ", ".join(f"“{name}”" for name in classes[:SHOWN_CLASSES])
    return shown if len(classes) <= SHOWN_CLASSES else f"{shown} and {len(classes) - SHOWN_CLASSES} more"


def purpose(facts: Facts) -> str:
    """Say in one sentence what the model does."""
    classes = facts.evaluation.classes
    if facts.evaluation.task == "multilabel":
        return (
            f"Reads one image and gives, for each of {len(classes)} findings, its probability: {class_list(classes)}."
        )
    if facts.evaluation.task == "multiclass":
        return f"Reads one image and gives the probability of each of {len(classes)} classes: {class_list(classes)}."
    against = f", against “{classes[0]}”" if len(classes) > 1 else ""
    return f"Reads one image and gives the probability of “{classes[-1]}”{against}."


def find_score(evaluation: Evaluation, metric: str) -> Score | None:
    """Give the headline score of a metric: never one class in place of the mean over many."""
    wanted = ("macro", "all") if evaluation.task != "binary" else ("macro", "all", evaluation.classes[-1])
    return next((s for label in wanted for s in evaluation.scores if (s.metric, s.label) == (metric, label)), None)


def label_score(evaluation: Evaluation, metric: str, label: str) -> Score | None:
    """Give one metric of one label, where it was computed."""
    return next((s for s in evaluation.scores if (s.metric, s.label) == (metric, label)), None)


def headlines(facts: Facts) -> tuple[Headline, ...]:
    """Give the three figures of the summary with their meaning."""
    evaluation = facts.evaluation
    one = f"“{evaluation.classes[-1]}”" if evaluation.task == "binary" else "the class in question"
    auroc, sensitivity, specificity = (find_score(evaluation, m) for m in ("auroc", "sensitivity", "specificity"))
    return (
        Headline("AUROC", auroc, _auroc_meaning(auroc, one)),
        Headline("Sensitivity", sensitivity, _share_meaning(sensitivity, f"with {one}", "found")),
        Headline("Specificity", specificity, _share_meaning(specificity, f"without {one}", "cleared")),
    )


def _auroc_meaning(score: Score | None, one: str) -> str:
    if score is None or score.value is None:
        return ""
    if score.low is not None and score.low <= 0.5:
        return "Not shown to be better than chance (0.5): the interval reaches it."
    times = _percent(score.value)
    return f"Of two studies, one with {one} and one without, it ranks the right one higher {times} times in 100."


def _share_meaning(score: Score | None, of: str, what: str) -> str:
    if score is None or score.value is None:
        return ""
    return f"Of 100 studies {of}, about {_percent(score.value)} {what}."  # a name may hold braces: no str.format


def _percent(value: float) -> str:
    percent = 100 * value
    if 99.5 <= percent < 100:
        return "more than 99"
    return "fewer than 1" if 0 < percent < 0.5 else f"{percent:.0f}"


def operating_point(point: OperatingPoint) -> str:
    """Say where a threshold lies, by which rule and on which part it was chosen."""
    part = PARTS_IN_WORDS.get(point.chosen_on, point.chosen_on)
    return f"threshold {number(point.threshold)}, chosen on the {part} part by {point.rule}"


def operating_points(evaluation: Evaluation) -> str:
    """Say in one sentence where the decisions of the test part come from."""
    points = evaluation.operating_points
    if not points:
        return "Decisions take the most probable class; there is no threshold to choose."
    if len(points) == 1:
        return f"Operating point: {operating_point(points[0])}. The test part had no say in it."
    return f"Operating points: one threshold for each of {len(points)} classes, listed with the results."


def verdict(comparison: Comparison) -> Verdict:
    """Say honestly whether transfer helped: an interval that holds 0 is no clear difference."""
    score = comparison.difference
    if score.value is None or score.low is None or score.high is None:
        return "not estimable"
    if score.low <= 0 <= score.high:
        return "no clear difference"
    better = score.value < 0 if comparison.metric in LOWER_IS_BETTER else score.value > 0
    return "helped" if better else "hurt"


def verdict_sentence(facts: Facts, comparison: Comparison) -> str:
    """Say what the comparison with the model from scratch means."""
    score = comparison.difference
    same = f"on the same {_studies(facts, score.n, score.patients)}"
    return transfer_sentence(comparison, facts.level_percent, same, facts.checkpoint.weights.share == 0)


def transfer_sentence(comparison: Comparison, level_percent: str, same: str, from_random: bool) -> str:
    """Say what the comparison with the model from scratch means.

    Args:
        same: on whom both were measured.
        from_random: the model had no weights to start from either.
    """
    metric, score = metric_name(comparison.metric), comparison.difference
    if from_random:
        return "This model started from random weights too, so the comparison says nothing about transfer."
    if score.value is None or score.low is None or score.high is None:
        return f"Whether transfer helped cannot be said: the difference is {not_estimable(score)}."
    span = f"{level_percent} % interval {number(score.low)} to {number(score.high)}"
    moved = "higher" if score.value > 0 else "lower"
    by = f"{metric} is {moved} by {number(abs(score.value))} ({span}) than that of the model from scratch, {same}"
    return {
        "helped": f"Transfer helped: {by}.",
        "hurt": f"Transfer hurt: {by}.",
        "no clear difference": f"No clear difference: {by}. The interval contains 0, so this test does not show that "
        "transfer helped or hurt.",
        "not estimable": "",
    }[verdict(comparison)]


def growth_sentence(curve: LearningCurve, level: str) -> str:
    """Say whether the larger half of the patients helped; empty where one number of patients was trained on alone.

    Args:
        level: coverage of the interval, in percent.
    """
    gain = curve.gain
    if gain is None:
        return ""
    few, many = (one.patients for one in curve.points[-2:])
    if gain.value is None or gain.low is None or gain.high is None:
        return f"What {many:,} patients give over {few:,} cannot be said: the difference is {not_estimable(gain)}."
    moved, name = "higher" if gain.value > 0 else "lower", metric_name(curve.points[-1].score.metric)
    said = (
        f"with {many:,} patients instead of {few:,}, {name} on validation is {moved} by {number(abs(gain.value))} "
        f"({level} % interval {number(gain.low)} to {number(gain.high)}, paired by patient)"
    )
    if gain.low > 0:
        return f"More patients still helped: {said}."
    if gain.high < 0:
        return f"More patients did harm: {said}."
    return f"Whether more patients help is not clear: {said}. The interval contains 0."


def tested_on(facts: Facts) -> str:
    """Say on whom the figures were measured."""
    test = studies_by_part(facts)["test"]
    said = f"{_studies(facts, len(test), len({study.patient for study in test}))} that were kept out of training"
    sites = {study.site for study in test} - {None}
    if sites:
        said += f", from {len(sites)} {'site' if len(sites) == 1 else 'sites'}"
    age = next(row for row in compose(facts) if row.variable == "Age, years")
    if age.value != UNKNOWN and age.cells[-1][0].isdigit():
        said += f"; age {age.cells[-1]}, median (quartiles)"
    return f"{said[0].upper()}{said[1:]}."


def not_for(facts: Facts) -> tuple[str, ...]:
    """Say where the model must not be used, as far as its limits and findings tell."""
    found = list(facts.limits)
    if not has_unseen_sites(facts):
        found.append("Other sites, scanners or kinds of people than those under Data: it was not tested there.")
    if facts.examination is not None:
        gaps = facts.examination.subgroups.gaps
        clear = [gap for gap in gaps if gap.difference.low is not None and gap.difference.low > 0]
        if clear:
            worst = max(clear, key=lambda gap: gap.difference.value or 0.0)
            found.append(f"With care where {worst.column} is {worst.worst}: it works less well there.")
        if facts.examination.novelty.threshold is not None:
            found.append("Images that the model flags as unlike those it learned from.")
    return tuple(found)


def alarms(facts: Facts) -> tuple[str, ...]:
    """Collect what a reader must not miss, loudest first."""
    found = []
    if facts.release_status == "refused":
        failed = sum(not check.passed for check in facts.gate)
        found.append(f"The release was refused: {failed} of {len(facts.gate)} gate conditions were not met.")
    if facts.split.leaks:
        found.append(leak_warning(facts.split.leaks))
    if not facts.cohort.patients_known and not facts.cohort.warnings:
        found.append("Patients are not known: images of one person may be in training and test, and figures too good.")
    found.extend(facts.cohort.warnings)
    if facts.test_openings > 1:
        found.append(
            f"The sealed test part was opened {facts.test_openings} times. From the second time on it can guide "
            "choices, and its figures may be too good."
        )
    if facts.examination is not None:
        if facts.examination.neighbours is not None and any(facts.examination.neighbours.suspects.values()):
            found.append(neighbours_warning(facts.examination.neighbours))
        found.extend(facts.examination.shortcuts.alarms)
    if facts.beside is not None and facts.beside.verdict == "inferior":
        found.append("The release that is live now does better on the same patients: see the comparison.")
    if facts.intended_use is None:
        found.append("No intended use was stated: take this as a research model only.")
    return tuple(dict.fromkeys(found))


def box_lines(box: FlowBox, patients_known: bool) -> tuple[str, ...]:
    """Say how many patients are in a box of the flow, and how much there is of them; of files nobody knows it."""
    items = _counted(box.items, {"files": "file", "scans": "scan", "studies": "study"}[box.unit], box.unit)
    if box.unit == "files":
        return (items,)
    if box.patients is None:
        return items, "patients not known yet" if patients_known else "patients not known"
    return _counted(box.patients, "patient", "patients"), items


def lost_line(step: FlowStep) -> str:
    """Say how many patients leave the flow at a step."""
    lost = "not known" if step.patients_lost is None else f"{step.patients_lost:,}"
    return f"Patients who leave here: {lost}"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def openings(times: int) -> str:
    """Say how often the sealed test part was opened."""
    return {0: "never opened", 1: "opened once"}.get(times, f"opened {times} times")


_STANDING = {
    "patient": ("patient", "patients"),
    "exam": ("exam", "exams"),
    "group": ("named group", "named groups"),
    "pixels": ("set of identical pixels", "sets of identical pixels"),
    "near": ("pair of nearly the same picture", "pairs of nearly the same picture"),
    "pretraining": ("picture that the weights were trained on", "pictures that the weights were trained on"),
}


def leak_warning(leaks: Sequence[Leak]) -> str:
    """Say what stands on two sides of a split where that was allowed: counts, never who."""
    found = ", ".join(
        f"{leak.count:,} {_STANDING[leak.kind][leak.count > 1]} in both {leak.sides[0]} and {leak.sides[1]}"
        for leak in leaks
    )
    return f"This split leaks: {found}. It was given with the data and allowed; every figure here may be too good."


def neighbours_warning(found: FeatureCheck) -> str:
    """Say how many studies of a later part lie too near to somebody else's in an earlier one: counts, never who."""
    counts = ", ".join(
        f"{count:,} of {sides.partition('-')[2]} near one of {sides.partition('-')[0]}"
        for sides, count in found.suspects.items()
        if count
    )
    return (
        f"By the model's features, studies lie suspiciously near to another person's: {counts}. This proves nothing; "
        "look whether they show the same person under two names, because figures would then be too good."
    )


def split_sentence(facts: Facts) -> str:
    """Say how the parts were made."""
    who = "patient" if facts.cohort.patients_known else "image (patients are not known)"
    if facts.split.predefined:
        made = "The parts were given with the data; one that was missing was taken from training, by patient."
    else:
        asked = facts.config["dataset"]["split"]
        made = (
            f"Made at random by {who}, stratified by class, with seed {facts.config['seed']}, asking for "
            f"{100 * asked['val']:g} % in validation and {100 * asked['test']:g} % in test."
        )
    if facts.split.leaks:
        return made
    return (
        f"{made} Nothing is in two parts that belongs together: the same patient, exam, named group, identical pixels "
        "or nearly the same picture. This was proved when the parts were made and again before the test part was "
        "opened."
    )


def _studies(facts: Facts, studies: int, patients: int) -> str:
    people = f" of {patients:,} patients" if facts.cohort.patients_known else ""
    return f"{studies:,} test studies{people}"


def _design(facts: Facts) -> str:
    if has_unseen_sites(facts):
        return "The sites of the test part were not trained on, but they were at hand when the study was made."
    if facts.evaluation.folds:
        return f"{len(facts.evaluation.folds)} folds of one source, pooled; each was tested by a model of its own."
    return "One hold-out from the same source as the training data."


def standing_limits(facts: Facts) -> tuple[str, ...]:
    """State the limits that hold whatever the figures are."""
    test = next(part for part in count_parts(facts) if part.part == "test")
    limits = [
        "This is not a medical device. No authority has cleared it; a qualified person must take every decision.",
        f"{_design(facts)} Nothing here shows how the model does in another hospital, on another scanner, or in "
        "another year.",
        f"The {facts.level_percent} % intervals cover the choice of test patients ({facts.evaluation.resamples:,} "
        "resamples over patients), not another training run, another split or another population.",
        "Labels are taken as the truth. How they were made, and how well readers agree, was not examined.",
        "Predictive values hold for the share of disease in this test part and change with it.",
        f"All rests on {_studies(facts, test.studies, test.patients)}; groups within it are smaller "
        "still, and equal performance between them was not shown.",
    ]
    if not facts.cohort.patients_known:
        limits.append("Patients are not known, so the parts are disjoint by image only.")
    return tuple(limits)
