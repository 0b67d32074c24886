"""The findings beyond the metrics, as tables and sentences: calibration, abstention, novelty, subgroups, shortcuts,
and what beside other models means. What is hidden to protect people is said to be hidden, never left out.
"""

from __future__ import annotations

from medtl.records import (
    AbstentionFindings,
    CalibrationFindings,
    Comparison,
    Explanations,
    FeatureCheck,
    Gap,
    NoveltyFindings,
    PointingFindings,
    Probe,
    Robustness,
    Score,
    ShortcutFindings,
    Subgroup,
    SubgroupFindings,
)
from medtl.report.facts import Facts
from medtl.report.tables import ScoreGroup, Table
from medtl.report.words import (
    DASH,
    compact,
    interval,
    label_name,
    metric_name,
    neighbours_warning,
    not_estimable,
    number,
    p_value,
)

SUBGROUP_METRICS = ("auroc", "sensitivity", "specificity", "calibration_error")
MOST_ROWS_OPEN = 40  # of a table that is not folded away
HIDDEN = "hidden"
_METHODS = {
    "none": "not changed",
    "temperature": "divided by one temperature",
    "platt": "moved along a line on the log odds (Platt)",
    "isotonic": "replaced along a rising staircase (isotonic)",
}
_SETS = {"lac": "answers that are probable enough", "aps": "the most probable answers until enough are in"}
_NOVELTY = {
    "mahalanobis": "Mahalanobis distance to the nearest class",
    "relative": "Mahalanobis distance to the nearest class, less that to all of training",
    "knn": "cosine distance to the nearest training images",
}
_VERDICTS = {
    "superior": "Better than",
    "non-inferior": "Not worse, by the margin, than",
    "inconclusive": "Not decided against",
    "inferior": "Worse than",
}


def _cell(score: Score | None) -> str:
    return DASH if score is None else compact(score)


def calibration_sentence(facts: Facts, findings: CalibrationFindings) -> str:
    """Say how probabilities were made to come true, and on how many patients that was learned."""
    made, who = findings.calibrator, "patients" if facts.cohort.patients_known else "images"
    how = f"The model's probabilities are {_METHODS[made.method]}"
    learned = f", fitted on {made.patients:,} validation {who}" if made.method != "none" else ""
    return f"{how}{learned}: {made.reason.rstrip('.')}." if made.reason else f"{how}{learned}."


def calibration_table(findings: CalibrationFindings) -> Table:
    """Tabulate what the calibrator did on the test part."""
    rows = tuple(
        (metric_name(old.metric), compact(old), compact(new), compact(apart))
        for old, new, apart in zip(findings.before, findings.after, findings.differences, strict=True)
    )
    return Table("What calibration did on the test part", ("Metric", "Before", "After", "After minus before"), rows)


def abstention_sentence(findings: AbstentionFindings) -> str:
    """Say when the model does not answer, and how often that is."""
    rule = findings.rule
    if rule.method == "none":
        return "The model always answers: abstention is switched off (evaluation.abstention.method)."
    each = " of each class" if rule.per_class else ""
    promise = (
        f"For each study a set of {_SETS[rule.method]} is made so that, for {100 * rule.coverage:g} % of new "
        f"patients{each} like those of validation, it holds the truth. With one answer in the set the model answers; "
        "with several or none a person has to."
    )
    score = next(iter(findings.answered), None)
    if rule.task == "multilabel" or score is None or score.value is None:
        return promise
    return f"{promise} On the test part it answered {100 * score.value:.0f} of 100 studies."


def abstention_table(findings: AbstentionFindings, classes: tuple[str, ...]) -> Table:
    """Tabulate what the conformal sets held on the test part."""
    columns = (findings.coverage, findings.answered, findings.right, findings.set_size, findings.patients_covered)
    rows = tuple(
        (label_name(scores[0].label, classes), f"{scores[0].n:,}", *(compact(score) for score in scores))
        for scores in zip(*columns, strict=True)
    )
    head = ("Studies of", "n", "Truth in the set", "One answer", "Right where answered", "Answers in a set",
            "Patients all in")  # fmt: skip
    wanted = f"{100 * findings.rule.coverage:g} % wanted"
    return Table(f"Conformal sets on the test part ({wanted})", head, rows, frozenset({1}))


def novelty_sentence(findings: NoveltyFindings) -> str:
    """Say how images unlike those of training are told, and how often that happens by itself."""
    if findings.method == "none":
        return f"Images unlike those of training are not told: {findings.reason or 'novelty is switched off'}."
    how = f"By its features an image is flagged as unlike those of training: {_NOVELTY[findings.method]}"
    if findings.threshold is None:
        return f"{how}. There is no threshold: {findings.reason or 'validation has too few patients'}."
    return f"{how}; the threshold was set so that {100 * findings.promised:g} % of studies like validation's are."


def neighbours_sentence(found: FeatureCheck | None) -> str:
    """Say whether images of different people lie suspiciously near to each other across the parts."""
    if found is None:
        return "Whether studies of different people come too near by the model's features was not looked at."
    if found.threshold is None:
        return f"Whether studies of different people come too near by the model's features is {found.note}."
    if any(found.suspects.values()):
        return f"Warning. {neighbours_warning(found)}"
    return (
        "By the model's features, no study of a later part lies suspiciously near to another person's in an earlier "
        f"one: the least cosine distance is {number(found.nearest, 4)}; up to {number(found.threshold, 4)} would be "
        f"suspicious among these {found.images:,} studies."
    )


def novelty_table(findings: NoveltyFindings) -> Table:
    """Tabulate the share of the test part that is flagged, and how well known differences are found."""
    rows = [("Share of the test part that is flagged", compact(findings.flagged))]
    rows += [(f"AUROC of {score.label} against the test part", compact(score)) for score in findings.detection]
    return Table("Novelty score", ("What", "Value [low, high]"), tuple(rows))


def subgroup_sentence(findings: SubgroupFindings) -> str:
    """Say which difference between groups is the largest, and whether it is more than chance."""
    estimable = [gap for gap in findings.gaps if gap.difference.value is not None]
    if not estimable:
        return "No two groups could be compared."
    clear = [gap for gap in estimable if gap.difference.low is not None and gap.difference.low > 0]
    if clear:
        first = max(clear, key=_size)
        return f"It works less well for some: {first.statement}"
    return (
        f"Of {findings.differences:,} differences between groups none is more than chance. That does not show that "
        f"there is none; the largest: {max(estimable, key=_size).statement}"
    )


def _size(gap: Gap) -> float:
    return gap.difference.value or 0.0


def subgroup_table(findings: SubgroupFindings) -> Table:
    """Tabulate every group; of one too small to show, that it is hidden."""
    several = len({group.label for group in findings.groups}) > 1
    rows = tuple(_subgroup_row(group, several) for group in findings.groups)
    head = ("Group", *(("Class",) if several else ()), "Patients", "Studies", "With the finding",
            *(metric_name(metric).removesuffix(" (lower is better)") for metric in SUBGROUP_METRICS))  # fmt: skip
    shift = int(several)
    return Table("Groups of the test part", head, rows, frozenset({1 + shift, 2 + shift, 3 + shift}))


def _subgroup_row(group: Subgroup, several: bool) -> tuple[str, ...]:
    scores = {score.metric: score for score in group.scores}
    counts = (
        HIDDEN if group.patients is None else f"{group.patients:,}",
        HIDDEN if group.n is None else f"{group.n:,}",
        HIDDEN if group.prevalence is None else f"{100 * group.prevalence:.0f} %",
    )
    cells = [_cell(scores.get(metric)) for metric in SUBGROUP_METRICS] if scores else [HIDDEN] * len(SUBGROUP_METRICS)
    return (f"{group.column}: {group.value}", *((group.label,) if several else ()), *counts, *cells)


def gap_table(findings: SubgroupFindings) -> Table:
    """Tabulate the largest difference of each column and metric."""
    several = len({group.label for group in findings.groups}) > 1
    rows = tuple(
        (
            gap.column,
            *((gap.label,) if several else ()),
            metric_name(gap.metric),
            gap.best,
            gap.worst,
            compact(gap.difference),
            p_value(gap.p_adjusted),
        )
        for gap in findings.gaps
    )
    head = ("By", *(("Class",) if several else ()), "Metric", "Best for", "Worst for", "Difference", "p, corrected")
    return Table("Largest differences between two groups", head, rows, frozenset({len(head) - 1}))


def probe_table(findings: ShortcutFindings) -> Table:
    """Tabulate what tells what, beside what chance gives."""
    probes = (*findings.source, *findings.association, *((findings.properties,) if findings.properties else ()))
    rows = tuple(_probe_row(probe) for probe in probes)
    head = ("Question", "AUROC", "By chance", "95 % of chance below", "p", "Result")
    return Table("Ways to the answer that help no patient", head, rows, frozenset({2, 3, 4}))


def _probe_row(probe: Probe) -> tuple[str, ...]:
    said = DASH if probe.auroc.value is None else ("✗ told" if probe.alarm else "✓ not found")
    chances = (number(probe.chance, 2), number(probe.chance_high, 2), p_value(probe.p))
    return (probe.question, compact(probe.auroc), *chances, said)


def properties_sentence(findings: ShortcutFindings) -> str:
    """Say whether the model is better than brightness, size and the like alone."""
    score = findings.model_minus_properties
    if score is None:
        return "The model was not held against image properties alone."
    if score.value is None:
        return f"The model against image properties alone: {not_estimable(score)}."
    return f"AUROC of the model minus that of brightness, contrast and size alone: {interval(score)}."


def no_incumbent(facts: Facts) -> str:
    """Say why this model stands beside no live release."""
    if facts.beside_note:
        return f"The live release could not be compared with: {facts.beside_note}."
    if not facts.config.get("registry", {}).get("promotion", {}).get("incumbent"):
        return "A comparison with the live release was not asked for (registry.promotion.incumbent)."
    return "No release of this name was live to compare with."


def incumbent_sentence(facts: Facts, comparison: Comparison) -> str:
    """Say what the comparison with the release that is live means."""
    metric, score = metric_name(comparison.metric), comparison.difference
    if score.value is None or comparison.verdict is None:
        return f"Whether this model is better than the live release cannot be said: {not_estimable(score)}."
    margin = "" if comparison.margin is None else f"; margin {number(comparison.margin)}"
    meaning = {
        "superior": "the whole interval is better",
        "non-inferior": "no value of the interval is worse by the margin",
        "inconclusive": "the interval allows both",
        "inferior": "the whole interval is worse" + (" by more than the margin" if comparison.margin else ""),
    }[comparison.verdict]
    span = f"{facts.level_percent} % interval{margin}"
    return (
        f"{_VERDICTS[comparison.verdict]} the live release: {meaning}. {metric}, this model minus the live one, is "
        f"{interval(score)} ({span}), on the same {score.n:,} test studies."
    )


def paired_table(comparison: Comparison) -> Table | None:
    """Tabulate the tests of no difference, where any was made."""
    if not comparison.tests:
        return None
    rows = tuple(
        (test.name, number(test.statistic), p_value(test.p_value), test.note or DASH) for test in comparison.tests
    )
    return Table("Tests of no difference, two-sided", ("Test", "Statistic", "p", "Note"), rows, frozenset({1, 2}))


def robustness_table(findings: Robustness) -> Table:
    """Tabulate what each change of the images does."""
    rows = tuple(
        (
            f"{test.name}, {test.strength}",
            test.meaning,
            compact(test.auroc),
            compact(test.difference),
            f"{100 * test.changed:.1f} %",
        )
        for test in findings.tests
    )
    head = ("Change", "Meaning", "AUROC", "Minus unchanged", "Most probable class changed")
    return Table("The test part's images, changed as another scanner or hand would", head, rows, frozenset({4}))


def robustness_sentence(findings: Robustness) -> str:
    """Name the changes under which the model is worse, beyond chance."""
    worse = [
        f"{t.name} ({t.strength})" for t in findings.tests if t.difference.high is not None and t.difference.high < 0
    ]
    if not worse:
        return "No change made the AUROC worse beyond chance."
    return f"Worse beyond chance, one change looked at a time: {', '.join(worse)}."


def sanity_sentence(found: Explanations) -> str:
    """Say whether the maps depend on what the network learned."""
    check = found.sanity
    if check is None or check.passed is None:
        return "Whether the maps depend on what was learned could not be told."
    last = check.correlations[-1][1]
    return (
        f"When the network forgets everything, its maps have a rank correlation of {number(last)} with those of before "
        f"({check.images} images, {check.draws} draws of random weights; below {check.bound:g} is asked for): the map "
        f"{check.verdict}."
    )


def pointing_sentence(found: PointingFindings) -> str:
    """Say whether the maps of a class point at what a person marked, beyond chance."""
    gain, notes = found.hits_gain, "".join(f" Note: {note}." for note in found.notes)
    if gain.value is None:
        return f"{found.label}: whether the maps point at the mark is {not_estimable(gain)}.{notes}"
    more, less = gain.low is not None and gain.low > 0, gain.high is not None and gain.high < 0
    often = "more often" if more else "less often" if less else "not clearly more often"
    near = f" or at most {found.tolerance:g} pixels beside it" if found.tolerance else ""
    return f"{found.label}: the highest place of a map lies in the mark{near} {often} than chance would have it.{notes}"


def pointing_groups(found: Explanations) -> tuple[ScoreGroup, ...]:
    """Group what was held against marks, by class."""
    return tuple(
        ScoreGroup(
            one.label, (one.hits, one.hits_chance, one.hits_gain, one.inside, one.inside_chance, one.inside_gain)
        )
        for one in found.pointing
    )
