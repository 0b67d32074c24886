"""The page of a segmentation: how well each structure is outlined, in whom it fails, and what that looks like.

What a diagnosis has too (people, split, weights, phases, gate, provenance, checklists) is drawn by the parts of the
main page; nothing is measured here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

from medtl.records import AnyArray, ComponentChoice, FloatArray, GridPlan, MaskQuality, MaskResult, Score
from medtl.report import fairness, figures, findings, tables, words
from medtl.report.checklists import Answer, Checklist, checklists
from medtl.report.facts import Facts, flow, weights_name
from medtl.report.facts import as_json as facts_as_json
from medtl.report.figures import COLOURS, FAINT, INK, MOST_CURVES, STYLE, as_svg, drawable
from medtl.report.page import as_data, sealed
from medtl.report.tables import ScoreGroup, Table
from medtl.report.words import DASH, Headline, compact, find_score, interval, label_score, metric_in, number

if TYPE_CHECKING:
    from medtl.report.viewer import Viewed

SECTIONS: Mapping[str, str] = {
    "summary": "Summary",
    "data": "Data",
    "split": "Split",
    "model": "Model",
    "results": "Results",
    "cases": "Cases",
    "doubt": "When to doubt a mask",
    "comparison": "Comparisons",
    "plan": "Plan",
    "gate": "Gate",
    "provenance": "Provenance",
    "limits": "Limits",
    "checklists": "Checklists",
}
STRUCTURE_METRICS = ("dice", "median_dice", "nsd", "hd95_mm", "assd_mm", "relative_volume_error")
LESION_METRICS = ("lesion_sensitivity", "lesion_precision", "lesion_f1", "false_lesions_per_study")
PIXEL_METRICS = ("pixel_auroc", "mean_pixel_auroc")
MOST_ROWS = 24  # structures of the plot of Dice; the rest are in the table
LONGEST_SIDE = 320  # pixels of a picture
TRUE_LINE, PREDICTED_LINE = (0, 229, 255), (255, 149, 0)
_OUTLINE, _DASH = 2, 4  # pixels
_DECADE = 10.0  # of volumes: an axis that spans less has no label at its powers of ten
_LIMITS = 1.96  # standard deviations on each side: limits of agreement
_PLANES: Mapping[str, tuple[str, str, str]] = {
    "axial": ("axial", "coronal", "sagittal"),
    "coronal": ("coronal", "axial", "sagittal"),
    "sagittal": ("sagittal", "axial", "coronal"),
}
MEMBERS = (
    "each trained without one fold of the training part; their probabilities are averaged; phases and curves are the "
    "first one's"
)
_ANALYSIS = "Analysis of failures"
_PREDICTIVE = "Predictive values"  # begins the limit that speaks of decisions, which a mask has none of

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Picture:
    """One plane of a study with the true and the predicted outlines."""

    plane: str
    png: str  # base64


@dataclass(frozen=True, slots=True)
class MaskCase:
    """One study of the test part, with its pictures; nothing on the page says whose it is."""

    worst: bool  # one of the worst, else of the best
    results: tuple[MaskResult, ...]
    pictures: tuple[Picture, ...]
    viewed: Viewed | None = None  # for the viewer, where there is one and the scan is small enough

    @property
    def dice(self) -> float | None:
        """Mean over the structures that have a Dice."""
        known = [value for one in self.results if (value := one.values.get("dice")) is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFacts(Facts):
    """Everything the page of a segmentation may say: the facts of any model, and what was measured of its masks.

    ``results`` are those of the test part; they are drawn without names and counted.
    """

    plan: GridPlan
    results: tuple[MaskResult, ...]
    cases: tuple[MaskCase, ...] = ()
    components: tuple[ComponentChoice, ...] = ()
    quality: MaskQuality | None = None
    quality_scores: tuple[Score, ...] = ()  # of the test part
    unit: Literal["mm", "pixels"] = "mm"
    viewer: str | None = None  # name of the page beside this one that shows the cases themselves

    @property
    def volume_unit(self) -> str:
        """In what the volumes of the results are."""
        return "ml" if self.unit == "mm" else "thousand pixels"

    @property
    def fail_below(self) -> float:
        """Dice below which a mask counts as failed."""
        return float(self.config["evaluation"]["masks"]["fail_below"])


def render(facts: MaskFacts) -> str:
    """Write the page; the same facts give the same text."""
    drawn = {
        "training": training_curve(facts),
        "growth": figures.growth(facts),
        "strip": dice_strip(facts),
        "agreement": volume_agreement(facts),
        "size": dice_by_volume(facts),
        "difference": None if facts.comparison is None else figures.difference(facts.comparison),
        "beside": None
        if facts.beside is None
        else figures.difference(facts.beside, ("this model", "the live release")),
        "both": None if (terms := fairness.of(facts)) is None else fairness.curves(terms),
    }
    return sealed(
        "masks.html.jinja",
        facts=facts,
        terms=terms,
        flow=flow(facts),
        evaluation=facts.evaluation,
        sections=SECTIONS,
        checklists=_checklists(facts),
        limits=(*facts.limits, *limits(facts)),
        headlines=headlines(facts),
        summary=summary(facts),
        purpose=purpose(facts),
        model=_model_table(facts),
        phases=_phase_table(facts),
        refit=_refit_table(facts),
        refit_sentence=refit_sentence(facts),
        learned_from=learned_from(facts),
        components=_component_table(facts),
        structures=structure_table(facts),
        pixels=_group(facts, "Pixels", PIXEL_METRICS),
        lesions=_lesion_groups(facts),
        shown=_shown_table(facts),
        folds=_fold_table(facts),
        plan=_plan_table(facts.plan),
        case_lines=case_lines,
        doubt=quality_sentence(facts),
        quality=ScoreGroup("On the test part", facts.quality_scores) if facts.quality_scores else None,
        tables=tables,
        findings=findings,
        words=words,
        figures={name: None if svg is None else as_data(svg) for name, svg in drawn.items()},
    )


def as_json(facts: MaskFacts) -> dict[str, Any]:
    """Reduce the facts to a JSON value; pictures and whose they are are left out."""
    return facts_as_json(facts) | {
        "masks": {
            "unit": facts.unit,
            "components": [asdict(one) for one in facts.components],
            "quality": None if facts.quality is None else asdict(facts.quality),
            "quality_scores": [asdict(one) for one in facts.quality_scores],
            "cases": [
                {"worst": case.worst, "dice": case.dice, "structures": [list(line) for line in case_lines(case, facts)]}
                for case in facts.cases
            ],
        },
        "checklists": {
            one.name: [
                {"item": i.number, "asks": i.asks, "sections": list(i.answer.sections), "remark": i.answer.remark}
                for i in one.items
            ]
            for one in _checklists(facts)
        },
    }


# -- words ---------------------------------------------------------------------------------------------------------


def purpose(facts: MaskFacts) -> str:
    """Say in one sentence what the model does."""
    classes, what = facts.evaluation.classes, "volume" if facts.plan.axis else "image"
    share = " They may share voxels." if facts.plan.overlapping else ""
    if len(classes) == 1:
        return f"Reads one {what} and outlines {words.class_list(classes)}."
    return f"Reads one {what} and outlines {len(classes)} structures: {words.class_list(classes)}.{share}"


def headlines(facts: MaskFacts) -> tuple[Headline, ...]:
    """Give the three figures of the summary with their meaning."""
    dice, nsd, hd95, median = (find_score(facts.evaluation, m) for m in ("dice", "nsd", "hd95_mm", "median_dice"))
    tolerance = facts.config["evaluation"]["masks"]["tolerance_mm"]
    half = (
        "" if median is None or median.value is None else f" Half of the studies have {number(median.value)} or more."
    )
    return (
        Headline("Dice", dice, f"Overlap with the true outline: 1 is all, 0 is none.{half}" if _known(dice) else ""),
        Headline(
            "Normalised surface distance",
            nsd,
            f"Share of the outline within {tolerance:g} {facts.unit} of the true one." if _known(nsd) else "",
        ),
        Headline(
            f"HD95, {facts.unit}",
            hd95,
            "95 % of the outline is at most this far off, on average over studies." if _known(hd95) else "",
        ),
    )


def _known(score: Score | None) -> bool:
    return score is not None and score.value is not None


def summary(facts: MaskFacts) -> tuple[tuple[str, str], ...]:
    """Say what a reader needs first: the weakest structure, how many studies fail, how volumes come out."""
    said = []
    scores = [s for name in facts.evaluation.classes if (s := label_score(facts.evaluation, "dice", name)) is not None]
    known = [score for score in scores if score.value is not None]
    if len(facts.evaluation.classes) > 1 and known:
        weakest = min(known, key=lambda score: score.value or 0.0)
        said.append(("Weakest structure", f"“{weakest.label}”: Dice {interval(weakest)}."))
    dice = _dice_by_study(facts)
    failed = sum(value < facts.fail_below for value in dice)
    if dice:
        found = f"{failed:,} of {len(dice):,} test studies have a mean Dice below {facts.fail_below:g}."
        said.append(("Failures", found))
    volume = find_score(facts.evaluation, "relative_volume_error")
    if volume is not None and volume.value is not None:
        way = "too large" if volume.value > 0 else "too small"
        said.append(("Volumes", f"On average {number(abs(100 * volume.value), 1)} % {way}, mean over structures."))
    return tuple(said)


def _dice_by_study(facts: MaskFacts) -> list[float]:
    by_study: dict[str, list[MaskResult]] = {}
    for one in facts.results:
        by_study.setdefault(one.study_id, []).append(one)
    means = (MaskCase(False, tuple(rows), ()).dice for rows in by_study.values())
    return [value for value in means if value is not None]


def learned_from(facts: MaskFacts) -> str:
    """Say how many studies taught the network, and whose weights it started from."""
    refit, weights = facts.checkpoint.refit, weights_name(facts.checkpoint.weights.source)
    if refit is None:
        return f"{len(facts.split.train):,} training studies; pretrained weights: {weights}."
    return f"{refit.studies:,} studies of training and validation together; pretrained weights: {weights}."


def refit_sentence(facts: MaskFacts) -> str:
    """Say what the second training was, and what the first one decided for it; nothing where there was one alone."""
    refit = facts.checkpoint.refit
    if refit is None:
        return ""
    return (
        f"These weights come from a second training, on training and validation together ({refit.studies:,} studies, "
        f"{refit.patients:,} patients), as long as the best state of the first one took; nothing chose among its "
        "states. The phases above, the curve, what is kept of a mask and how a Dice is foretold are the first "
        "network's, which never saw the validation part. The test part measures the second."
    )


def quality_sentence(facts: MaskFacts) -> str:
    """Say whether a study's Dice can be foretold without a true mask, and what that is worth."""
    made = facts.quality
    if made is None:
        return "It was not examined how unsure the model is of a mask."
    if made.method == "none":
        return f"The Dice of a study cannot be foretold: {made.reason}. No mask is flagged by itself: look at each."
    how = {"linear": "a line through", "isotonic": "a staircase along one of"}[made.method]
    return (
        f"Without a true mask, the Dice of a study is foretold by {how} {len(made.features)} numbers of uncertainty, "
        f"learned on {made.studies:,} validation studies ({made.reason}). A study is flagged where less than "
        f"{made.fail_below:g} is foretold, or nothing, as where a structure is not outlined at all; of "
        f"{made.failures:,} failures on validation {made.failures_flagged:,} were, and "
        f"{made.flagged - made.failures_flagged:,} studies that had not failed."
    )


def limits(facts: MaskFacts) -> tuple[str, ...]:
    """State the limits that hold whatever the figures are."""
    own = (
        "Outlines that people drew are taken as the truth. Where two readers differ as much as the model does from "
        "one of them, a higher figure shows nothing.",
        "A mean hides single failures: see the worst cases, and look at every mask before it is used.",
    )
    common = [limit for limit in words.standing_limits(facts) if not limit.startswith(_PREDICTIVE)]
    return (*common, *own)


def case_lines(case: MaskCase, facts: MaskFacts) -> tuple[tuple[str, str], ...]:
    """Give each structure of a case with its figures."""
    return tuple(
        (
            one.structure,
            f"Dice {number(one.values.get('dice'))}, HD95 {number(one.values.get('hd95_mm'), 1)} {facts.unit}"
            + (f" ({one.note})" if one.note else ""),
        )
        for one in case.results
    )


# -- tables --------------------------------------------------------------------------------------------------------


def structure_table(facts: MaskFacts) -> Table:
    """Tabulate the main figures of each structure, the mean over all of them last."""
    evaluation = facts.evaluation
    labels = [*evaluation.classes, *(("macro",) if len(evaluation.classes) > 1 else ())]
    shown = [m for m in STRUCTURE_METRICS if any(s.metric == m for s in evaluation.scores)]
    rows = tuple(
        (
            "Mean over structures" if label == "macro" and label not in evaluation.classes else label,
            *(DASH if (s := label_score(evaluation, m, label)) is None else compact(s) for m in shown),
        )
        for label in labels
    )
    return Table("Each structure", ("Structure", *(_named(m, facts) for m in shown)), rows)


def _named(metric: str, facts: MaskFacts) -> str:
    return metric_in(metric, facts.unit).removesuffix(" (lower is better)")


def _group(facts: MaskFacts, name: str, metrics: Sequence[str]) -> ScoreGroup | None:
    found = tuple(s for s in facts.evaluation.scores if s.metric in metrics)
    return ScoreGroup(name, found) if found else None


def _lesion_groups(facts: MaskFacts) -> tuple[ScoreGroup, ...]:
    scores = facts.evaluation.scores
    labels = list(dict.fromkeys(s.label for s in scores if s.metric in LESION_METRICS))
    if len(labels) == 2:  # one structure: all lesions are its own
        labels = [label for label in labels if label != "all"]
    return tuple(
        ScoreGroup(
            "All structures together" if label == "all" else label,
            tuple(s for s in scores if s.label == label and s.metric in LESION_METRICS),
        )
        for label in labels
    )


def _shown_table(facts: MaskFacts) -> Table | None:
    counts, classes = facts.evaluation.confusion, facts.evaluation.classes
    if not counts:
        return None
    rows = tuple(
        (name, *(f"{n:,}" for row in (counts[2 * i + 1], counts[2 * i]) for n in reversed(row)))
        for i, name in enumerate(classes)
    )
    head = ("Structure", "there, outlined", "there, missed", "absent, invented", "absent, left empty")
    return Table("Whether masks show a structure at all, studies", head, rows, frozenset(range(1, 5)))


def _fold_table(facts: MaskFacts) -> Table | None:
    folds, shown = facts.evaluation.folds, ("dice", "nsd", "hd95_mm")
    if not folds:
        return None
    rows = tuple(
        (one.fold, f"{one.n:,}", f"{one.patients:,}", *(number(one.values.get(m)) for m in shown)) for one in folds
    )
    head = ("Fold", "Studies", "Patients", *(_named(m, facts) for m in shown))
    return Table("Each fold's own test part", head, rows, frozenset(range(1, len(head))))


def _model_table(facts: MaskFacts) -> Table:
    table, made = tables.model_table(facts.checkpoint), facts.checkpoint
    channels = "1 channel" if made.channels == 1 else f"{made.channels} channels"
    size = f"patches of {_times(made.size)}, {channels}"
    count = 1 + len(made.members)
    network = made.backbone if count == 1 else f"{count} of {made.backbone}, {MEMBERS}"
    named = {"Input": ("Input", size), "Backbone": ("Network", network)}
    return replace(table, rows=tuple(named.get(row[0], row) for row in table.rows))


def _phase_table(facts: MaskFacts) -> Table:
    table = tables.phase_table(facts.checkpoint)
    watched = [number(phase.watched) for phase in facts.checkpoint.phases]
    rows = tuple((*row[:6], dice, *row[8:]) for row, dice in zip(table.rows, watched, strict=True))
    return Table(table.caption, (*table.head[:6], "Val. Dice", *table.head[8:]), rows, frozenset({3, 5, 6}))


def _refit_table(facts: MaskFacts) -> Table | None:
    refit = facts.checkpoint.refit
    if refit is None:
        return None
    table = tables.phase_table(replace(facts.checkpoint, phases=refit.phases))
    last = {epoch.phase: epoch.train_loss for epoch in refit.history}
    rows = tuple(
        (*row[:5], f"{phase.epochs:,}", number(last[phase.name]), row[8])
        for row, phase in zip(table.rows, refit.phases, strict=True)
    )
    head = (*table.head[:5], "Epochs", "Last loss on training", table.head[8])
    return Table("Phases of the second training", head, rows, frozenset({3, 5, 6}))


def _component_table(facts: MaskFacts) -> Table | None:
    if not facts.components:
        return None
    kept = {"all": "all parts", "largest": "the largest part alone"}
    rows = tuple(
        (
            one.structure, kept[one.keep], one.reason,
            "filled" if one.fill else "left", one.fill_reason or "they were not looked at",
        )
        for one in facts.components
    )  # fmt: skip
    head = ("Structure", "Kept", "Reason", "Holes", "Reason")
    return Table("What is kept of the parts of a structure, and what becomes of holes in it", head, rows)


def _plan_table(plan: GridPlan) -> Table:
    """Tabulate every decision of the plan with its reason."""
    levels = len(plan.strides)
    window = f", values from {tables.leaf(plan.low)} to {tables.leaf(plan.high)}" if plan.intensity == "window" else ""
    values = {
        "dimensions": f"{plan.dimensions}-D" + (f" with {plan.neighbours} neighbours" if plan.neighbours else ""),
        "axis": plan.axis or "",
        "spacing_mm": _times(plan.spacing_mm) + " mm" if plan.spacing_mm else "as it is",
        "intensity": f"{plan.intensity}{window}",
        "patch": _times(plan.patch),
        "batch_size": f"{plan.batch_size:,}",
        "strides": f"{levels} levels: " + ", ".join(_times(one) for one in plan.strides),
        "kernels": ", ".join(_times(one) for one in plan.kernels),
        "filters": ", ".join(map(str, plan.filters)),
        "mirror": ", ".join(f"axis {axis + 1}" for axis in plan.mirror) or "nothing",
        "structures": ("may share voxels" if plan.overlapping else "exclude each other"),
    }
    rows = [(key.replace("_mm", "").replace("_", " "), value, plan.reasons.get(key, DASH))
            for key, value in values.items() if value]  # fmt: skip
    rows += [(key.replace("_", " "), DASH, plan.reasons[key]) for key in sorted(set(plan.reasons) - set(values))]
    return Table("How a scan becomes the network's input", ("Decision", "Value", "Reason"), tuple(rows))


def _times(sizes: Sequence[float]) -> str:
    return " × ".join(f"{size:g}" for size in sizes)


def _checklists(facts: MaskFacts) -> tuple[Checklist, ...]:
    """Give the checklist for imaging; failures are shown as cases here."""
    answer = Answer(("cases", "results"), "the worst cases as pictures") if facts.cases else Answer(("results",))
    return tuple(
        Checklist(one.name, tuple(replace(i, answer=answer) if i.asks == _ANALYSIS else i for i in one.items))
        for one in checklists(facts)
        if one.name.startswith("CLAIM")
    )


# -- plots ---------------------------------------------------------------------------------------------------------


def training_curve(facts: MaskFacts) -> str | None:
    """Draw the loss and the validation Dice over all epochs; ``None`` without epochs. Not every epoch is validated."""
    history, kept = facts.checkpoint.history, {(p.name, p.best_epoch) for p in facts.checkpoint.phases if p.kept}
    if not history:
        return None
    dice = np.array([1 - epoch.val_loss for epoch in history])  # what training minimises on validation
    epochs, seen = np.arange(1, len(history) + 1), np.isfinite(dice)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(epochs, [epoch.train_loss for epoch in history], color=COLOURS[1])
        left.set(ylabel="Loss on training")
        right.plot(epochs[seen], dice[seen], color=COLOURS[0], marker="o", ms=3)
        right.set(ylabel="Dice on validation")
        for place, epoch in enumerate(history):
            if (epoch.phase, epoch.epoch) in kept and seen[place]:
                right.plot([place + 1], [dice[place]], "o", ms=9, mfc="none", mec=COLOURS[1], mew=1.6, label="kept")
                right.legend(loc="lower right")
        for axes in (left, right):
            axes.set(xlabel="Epoch", xlim=(0.5, len(history) + 0.5))
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            for place in range(1, len(history)):
                if history[place].phase != history[place - 1].phase:
                    axes.axvline(place + 0.5, color=INK, lw=0.8, ls=(0, (3, 3)))
        return as_svg(figure)


def dice_strip(facts: MaskFacts) -> str | None:
    """Draw the Dice of every patient for each structure, over a box of its quartiles; ``None`` without any."""
    rows = [(name, values) for name in facts.evaluation.classes if (values := _by_patient(facts.results, name))]
    rows = rows[:MOST_ROWS]
    if not rows:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.9 + 0.55 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, values) in enumerate(reversed(rows)):
            axes.boxplot([values], positions=[place], orientation="horizontal", widths=0.62, showfliers=False,
                         medianprops={"color": COLOURS[1], "lw": 2}, boxprops={"color": INK},
                         whiskerprops={"color": INK}, capprops={"color": INK})  # fmt: skip
            apart = place + 0.22 * np.array([(7 * rank) % 5 / 2 - 1 for rank in range(len(values))])
            axes.plot(sorted(values), apart, "o", ms=4, color=COLOURS[0], alpha=0.6, mew=0)
        axes.set_yticks(range(len(rows)), [drawable(name) for name, _ in reversed(rows)])
        axes.set(xlabel="Dice", xlim=(min(0.98, *(min(values) for _, values in rows)) - 0.02, 1.01))
        axes.grid(axis="y", visible=False)
        return as_svg(figure)


def _by_patient(results: Sequence[MaskResult], structure: str) -> list[float]:
    """Give the mean Dice of each patient's studies."""
    found: dict[str, list[float]] = {}
    for one in results:
        value = one.values.get("dice")
        if one.structure == structure and value is not None:
            found.setdefault(one.patient, []).append(value)
    return [float(np.mean(values)) for values in found.values()]


def volume_agreement(facts: MaskFacts) -> str | None:
    """Draw predicted minus true volume over their mean, with bias and limits of agreement; ``None`` without any.

    Source: Bland and Altman, Lancet 327 (1986).
    """
    shown = [name for name in facts.evaluation.classes if len(_volumes(facts.results, name)) > 1][:MOST_CURVES]
    if not shown:
        return None
    down = -(-len(shown) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.4 + 2.6 * down), layout="constrained")
        for axes, name in zip(figure.subplots(down, 2, squeeze=False).flat, shown, strict=False):
            true, told = _volumes(facts.results, name).T
            apart = told - true
            bias, spread = float(apart.mean()), float(apart.std(ddof=1))
            axes.plot((true + told) / 2, apart, "o", ms=4, color=COLOURS[0], alpha=0.6, mew=0)
            axes.axhline(0, color=FAINT, lw=1)
            axes.axhline(bias, color=COLOURS[1], lw=1.4)
            for end in (bias - _LIMITS * spread, bias + _LIMITS * spread):
                axes.axhline(end, color=COLOURS[1], lw=1, ls=(0, (3, 3)))
            axes.set(title=drawable(name), xlabel=f"Mean volume, {facts.volume_unit}", ylabel="Predicted minus true")
        for axes in figure.axes[len(shown) :]:
            axes.remove()
        return as_svg(figure)


def _volumes(results: Sequence[MaskResult], structure: str) -> FloatArray:
    """Give the true and the predicted volume of each study where one of the two is not empty, (n, 2)."""
    rows = [(r.truth_ml, r.predicted_ml) for r in results if r.structure == structure and r.truth_ml + r.predicted_ml]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def dice_by_volume(facts: MaskFacts) -> str | None:
    """Draw the Dice of every study over its true volume; ``None`` where no structure has both."""
    points = {
        name: [
            (one.truth_ml, value)
            for one in facts.results
            if one.structure == name and one.truth_ml > 0 and (value := one.values.get("dice")) is not None
        ]
        for name in facts.evaluation.classes[:MOST_CURVES]
    }
    every = [point for some in points.values() for point in some]
    if not every:
        return None
    least = min(value for _, value in every)
    wide = max(volume for volume, _ in every) / min(volume for volume, _ in every)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for (name, some), colour, marker in zip(points.items(), COLOURS, "osD^vP*X", strict=False):
            volumes, dice = zip(*some, strict=True) if some else ((), ())
            axes.plot(volumes, dice, marker, ms=4.5, color=colour, alpha=0.7, mew=0, label=drawable(name))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # powers would be set as mathematics
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if wide < _DECADE else "")
        axes.set(xlabel=f"True volume, {facts.volume_unit}", ylabel="Dice", ylim=(min(0.9, least) - 0.03, 1.01))
        axes.legend(loc="lower right")
        return as_svg(figure)


# -- pictures ------------------------------------------------------------------------------------------------------


def pictures(
    image: FloatArray,
    truth: AnyArray,
    predicted: AnyArray,
    spacing_mm: Sequence[float],
    structures: int,
    overlapping: bool,
    axis: Literal["sagittal", "coronal", "axial"] | None = None,
) -> tuple[Picture, ...]:
    """Draw a study with the outlines of its true masks (solid) and of the predicted ones (dashed).

    Of a volume three planes, each where the true masks are largest; where they are empty, the predicted ones.

    Args:
        image: from 0 to 1, of the masks' shape, or with a last axis of 3 colours.
        truth: codes of uint8; 255 does not count. (slices, rows, columns) turned as ``axis`` says, or (rows, columns).
        predicted: codes, of the same shape.
        spacing_mm: along each axis of the masks.
        structures: how many there are.
        overlapping: whether codes are bits.
        axis: how a volume is turned; needed for volumes.

    Raises:
        ValueError: other shapes, or a volume without an axis.
    """
    if truth.shape != predicted.shape or image.shape[: truth.ndim] != truth.shape or len(spacing_mm) != truth.ndim:
        raise ValueError(
            f"pictures of shapes {image.shape}, {truth.shape} and {predicted.shape}: equal ones are wanted"
        )
    if truth.ndim == 2:
        return (Picture("image", _picture(image, truth, predicted, spacing_mm, structures, overlapping)),)
    if axis is None:
        raise ValueError("pictures of a volume want to know how it is turned")
    drawn = []
    for fixed, plane in enumerate(_PLANES[axis]):
        place = fullest(truth, predicted, fixed)
        cut = [_upright(np.take(part, place, fixed), fixed, axis) for part in (image, truth, predicted)]
        others = [size for number_, size in enumerate(spacing_mm) if number_ != fixed]
        spacing = others[::-1] if fixed and _lies(fixed, axis) else others
        drawn.append(Picture(plane, _picture(cut[0], cut[1], cut[2], spacing, structures, overlapping)))
    return tuple(drawn)


def fullest(truth: AnyArray, predicted: AnyArray, fixed: int) -> int:
    """Give the plane with the most of the true masks; of the predicted ones, else the middle, where there are none."""
    others = tuple(other for other in range(3) if other != fixed)
    for mask in (truth, predicted):
        area = np.count_nonzero((mask > 0) & (truth != 255), axis=others)
        if area.any():
            return int(np.argmax(area))
    return int(truth.shape[fixed]) // 2


def _upright(plane: AnyArray, fixed: int, axis: str) -> AnyArray:
    """Turn a plane so that the head or the front is at the top and the patient's right, or front, on the left.

    Slices run towards the right, the front or the head, rows to the back or the feet, columns to the left or the back.
    """
    if fixed == 0:
        return plane
    return plane.swapaxes(0, 1)[:, ::-1] if _lies(fixed, axis) else plane[::-1]


def _lies(fixed: int, axis: str) -> bool:
    """Tell the planes in which slices run across the picture."""
    return axis == "sagittal" or (axis == "coronal" and fixed == 2)


def _picture(
    image: AnyArray, truth: AnyArray, predicted: AnyArray, spacing: Sequence[float], structures: int, overlapping: bool
) -> str:
    size = np.array(truth.shape) * np.asarray(spacing, dtype=np.float64)
    height, width = (max(1, round(float(side))) for side in size * (LONGEST_SIDE / size.max()))
    rows = ((np.arange(height) + 0.5) * truth.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * truth.shape[1] / width).astype(np.intp)
    image, truth, predicted = (part[rows][:, columns] for part in (image, truth, predicted))
    grey = np.rint(np.clip(np.nan_to_num(image.astype(np.float64)), 0, 1) * 255).astype(np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=2) if grey.ndim == 2 else grey.copy()
    colour[truth == 255] //= 2  # what does not count
    truth, predicted = (np.where(truth == 255, 0, mask) for mask in (truth, predicted))
    across, along = np.indices((height, width)) // _DASH
    dashes: BoolArray = (across + along) % 2 == 0
    for code in range(structures):
        one, other = ((mask >> code & 1 == 1) if overlapping else mask == code + 1 for mask in (truth, predicted))
        colour[_outline(one)] = TRUE_LINE
        colour[_outline(other) & dashes] = PREDICTED_LINE
    stream = io.BytesIO()
    Image.fromarray(colour).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def _outline(mask: BoolArray) -> BoolArray:
    inner: BoolArray = ndimage.binary_erosion(mask, iterations=_OUTLINE) if mask.any() else mask
    return mask & ~inner
