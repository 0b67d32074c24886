"""Ways to the right answer that help no patient: the scanner's signature, the site's habits, the picture's brightness.

Three questions, put the same way: a linear discriminant tells one thing from another for patients that it did not see,
and an AUROC with its interval over patients says how well.

* *Source*: do the features tell site or scanner? Patients are permuted among those of the same label, so that chance is
  what the label gives away: a site with more diseased patients is not told by the disease alone.
* *Association*: does the site or scanner alone tell the label? If both answers are yes, the model can be right without
  looking at the disease, and where it is used next it may not be.
* *Properties*: do size, brightness and contrast alone tell the label, and is the model clearly better than they are?

The discriminant is the first step of logistic regression from nothing; its solution for a hundred permutations costs
hardly more than for one, and its ranking is as a rule the same. Source: Zech et al., PLOS Medicine 15 (2018), and
DeGrave, Janizek and Lee, Nature Machine Intelligence 3 (2021), for what happens; Ojala and Garriga, JMLR 11 (2010), for
permutation; Friedman, JASA 84 (1989), for the discriminant with a covariance drawn towards a round one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from sklearn.covariance import ledoit_wolf_shrinkage

from medtl.config import UncertaintyConfig
from medtl.evaluation.bounds import Counts
from medtl.evaluation.folds import patient_folds
from medtl.evaluation.metrics import auroc
from medtl.evaluation.questions import Question, answers, closed_forms, known_only
from medtl.evaluation.uncertainty import Estimate, difference_of, mean_of, score_of
from medtl.records import AnyArray, FloatArray, IntArray, Predictions, Probe, Score, ShortcutFindings, Task

PROPERTIES = (
    "rows", "columns", "aspect", "brightness", "contrast", "edge brightness", "black", "saturated", "file size",
)  # fmt: skip
_ALONE = "label from image properties alone"
_PERMUTATIONS = 199
_FOLDS = 5
_FEWEST = 10  # patients of a value that is told apart
_MOST_STUDIES = 10_000  # that are looked at
_FURTHEST = 5.0  # standard deviations; one odd image shall not carry a fit
_CHANCE = 0.05
_AT_ONCE = 256  # images
_NO_SPREAD = 1e-12


@dataclass(frozen=True, slots=True)
class Part:
    """What is looked at of the studies of one part; rows belong together."""

    study_ids: tuple[str, ...]
    patients: tuple[str, ...]
    targets: FloatArray  # (n, classes), NaN where unknown
    properties: FloatArray | None = None  # (n, 9), of image_properties
    features: FloatArray | None = None  # (n, d), that enter the head


def image_properties(pixels: AnyArray, shapes: Sequence[tuple[int, int]], sizes: Sequence[int]) -> FloatArray:
    """Give what an image tells without being looked at, (n, 9), in the order of ``PROPERTIES``.

    Args:
        pixels: (n, rows, columns, channels), uint8 or uint16, as the network is shown them.
        shapes: rows and columns of the images as they came.
        sizes: bytes of the files that they came in.
    """
    size = np.log(np.array(shapes, dtype=np.float64).reshape(len(pixels), 2))
    full = float(np.iinfo(pixels.dtype).max)
    found = np.empty((len(pixels), len(PROPERTIES)))
    found[:, :2], found[:, 2] = size, size[:, 1] - size[:, 0]
    found[:, -1] = np.log(np.maximum(sizes, 1))
    for start in range(0, len(pixels), _AT_ONCE):
        some = pixels[start : start + _AT_ONCE].astype(np.float32) / full
        edge = np.concatenate([some[:, 0], some[:, -1], some[:, :, 0], some[:, :, -1]], axis=1).mean(axis=(1, 2))
        flat = some.reshape(len(some), -1)
        columns = (flat.mean(axis=1), flat.std(axis=1), edge, (flat == 0).mean(axis=1), (flat == 1).mean(axis=1))
        found[start : start + len(some), 3:-1] = np.stack(columns, axis=1)
    return found


def examine(
    train: Part,
    test: Part,
    model: Predictions,
    columns: Mapping[str, Sequence[str | None]],
    task: Task,
    classes: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> ShortcutFindings:
    """Ask the three questions: of the training part's features and sites, and of the test part's image properties.

    Args:
        model: predictions of the test part, the same studies in the same order.
        columns: site, scanner and the like: one value for each study of the training part, None where unknown.
    """
    source: list[Probe] = []
    linked: list[Probe] = []
    for name, values in columns.items():
        source.append(told_by_features(train, values, f"{name} from the features", config, seed))
        linked.append(told_by_value(train, values, task, classes, f"label from the {name} alone", config, seed))
    properties, difference = told_by_properties(train, test, model, task, classes, config, seed)
    alarms = [probe.alarm for probe in (*source, *linked) if probe.alarm]
    for name, seen, tied in zip(columns, source, linked, strict=True):
        if seen.alarm and tied.alarm:
            alarms.append(
                f"The features tell the {name} and the {name} tells the label: the model can be right by recognising "
                f"the {name}. Judge it on a {name} that it was not trained on."
            )
    alarms += [properties.alarm] if properties and properties.alarm else []
    asked = [*source, *linked, *([properties] if properties else [])]
    notes = [f"{probe.question}: {probe.auroc.note}." for probe in asked if probe.auroc.value is None]
    return ShortcutFindings(tuple(source), tuple(linked), properties, difference, tuple(alarms), tuple(notes))


def table(findings: ShortcutFindings) -> list[Probe]:
    """Give one row for each question that was asked."""
    return [*findings.source, *findings.association, *([findings.properties] if findings.properties else [])]


def told_by_features(
    part: Part, values: Sequence[str | None], question: str, config: UncertaintyConfig, seed: int
) -> Probe:
    """Ask whether the features tell a value, such as the site, beyond what the label gives away.

    Studies without a value and values of fewer than 10 patients are left out.
    """
    kept, names = _enough(values, part, seed)
    if part.features is None:
        return _unasked(question, "macro", "there are no features", len(names))
    if len(names) < 2:
        return _unasked(question, "macro", f"fewer than two values have {_FEWEST} patients", len(names))
    some = _rows(part, kept)
    truth = (np.array([values[k] for k in kept])[:, None] == np.array(names)).astype(np.float64)
    truth = truth[:, 1:] if len(names) == 2 else truth
    probe = _cross_validated(
        question, part.features[kept], truth, some, _kinds(some.targets), names[-truth.shape[1] :], config, seed
    )
    alarm = f"{question}: AUROC {_said(probe.auroc)}, by the label alone {probe.chance:.2f}." if _found(probe) else ""
    return _with_alarm(probe, alarm, len(names))


def told_by_value(
    part: Part,
    values: Sequence[str | None],
    task: Task,
    classes: Sequence[str],
    question: str,
    config: UncertaintyConfig,
    seed: int,
) -> Probe:
    """Ask whether a value alone, such as the site, tells the label; unknown is a value too, for it may tell as well."""
    label = classes[-1] if task == "binary" else "macro"
    some = _rows(part, _sampled(part, seed))
    named = ["" if values[k] is None else values[k] for k in _sampled(part, seed)]
    found, member = np.unique(np.array(named, dtype=np.str_), return_inverse=True)
    if len(found) < 2:
        return _unasked(question, label, "all studies have one value", len(found))
    if len(set(some.patients)) < _FEWEST:
        return _unasked(question, label, f"fewer than {_FEWEST} patients", len(found))
    truth, names = _reported(some.targets, task, classes)
    nobody = np.zeros(len(member), dtype=np.int64)
    probe = _cross_validated(question, np.eye(len(found))[member], truth, some, nobody, names, config, seed)
    alarm = f"{question}: AUROC {_said(probe.auroc)}." if _found(probe) else ""
    return _with_alarm(probe, alarm, len(found))


def told_by_properties(
    train: Part,
    test: Part,
    model: Predictions,
    task: Task,
    classes: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> tuple[Probe | None, Score | None]:
    """Ask whether image properties alone, learned on the training part, tell the label of the test part.

    Returns:
        The answer, and the model's AUROC minus theirs, paired by patient; None where there are no properties, and for
        the difference where training has too few patients.

    Raises:
        ValueError: the model did not predict the studies of the test part in their order.
    """
    if train.properties is None or test.properties is None:
        return None, None
    if model.study_ids != test.study_ids:
        raise ValueError("the model must have predicted the studies of the test part in their order")
    learned, names = _reported(train.targets, task, classes)
    label = names[0] if len(names) == 1 else "macro"
    if len(set(train.patients)) < _FEWEST:
        return _unasked(_ALONE, label, f"training has fewer than {_FEWEST} patients", len(PROPERTIES)), None
    truth, _ = _reported(test.targets, task, classes)
    given, _ = _reported(model.probabilities, task, classes)
    inputs, others = _curved(train.properties, test.properties)
    solve = _solver(inputs)
    theirs = others @ solve(learned)
    nobody = np.zeros(len(learned), dtype=np.int64)
    chance = [_plain(others @ solve(learned[order]), truth) for order in _orders(train, nobody, seed)]
    one, other = _estimates((given, theirs), truth, test, names, config, seed)
    score = score_of("auroc", label, other, config.level, test.patients)
    difference = score_of(
        "auroc difference", label, difference_of(one, other, config.level), config.level, test.patients
    )
    probe = _answered(_ALONE, score, np.array(chance), len(PROPERTIES))
    alarm = ""
    if _found(probe):
        alarm = f"Image properties alone ({', '.join(PROPERTIES)}) tell the label: AUROC {_said(score)}."
        if difference.low is None or difference.low <= 0:
            alarm += " The model is not clearly better: it may have learned nothing else."
    return _with_alarm(probe, alarm, len(PROPERTIES)), difference


def _cross_validated(
    question: str,
    inputs: FloatArray,
    truth: FloatArray,
    part: Part,
    strata: IntArray,
    names: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> Probe:
    """Tell ``truth`` (n, columns) from ``inputs`` for patients not seen, and again where patients are permuted."""
    fold = patient_folds(part.study_ids, part.patients, _kinds(truth), _FOLDS, seed)
    sides = []
    for number in range(int(fold.max()) + 1):
        mine = fold == number
        centre, spread = inputs[~mine].mean(axis=0), inputs[~mine].std(axis=0)
        scaled = np.clip((inputs - centre) / np.where(spread > _NO_SPREAD, spread, 1), -_FURTHEST, _FURTHEST)
        sides.append((mine, scaled[mine], _solver(scaled[~mine])))

    def told(wanted: FloatArray) -> FloatArray:
        made = np.empty(wanted.shape)
        for mine, seen, solve in sides:
            made[mine] = seen @ solve(wanted[~mine]) + _mean(wanted[~mine])
        return made

    (found,) = _estimates((told(truth),), truth, part, names, config, seed)
    label = names[0] if len(names) == 1 else "macro"
    score = score_of("auroc", label, found, config.level, part.patients)
    chance = [_plain(told(truth[order]), truth[order]) for order in _orders(part, strata, seed)]
    return _answered(question, score, np.array(chance), len(names))


def _solver(inputs: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """Give the function that finds the discriminant's weights, (d, columns), for a truth with NaN where unknown."""
    towards = float(ledoit_wolf_shrinkage(inputs)) if inputs.shape[1] > 1 else 0.0
    apart = inputs - inputs.mean(axis=0)
    covariance = apart.T @ apart / len(apart)
    width = len(covariance)
    floor = max(towards, 1e-6) * max(float(np.trace(covariance)) / width, _NO_SPREAD)
    inverse = np.linalg.inv((1 - towards) * covariance + floor * np.eye(width))
    shared = inverse @ apart.T

    def solve(truth: FloatArray) -> FloatArray:
        weights: FloatArray = shared @ np.where(np.isfinite(truth), truth - _mean(truth), 0.0) / len(truth)
        return weights

    return solve


def _mean(truth: FloatArray) -> FloatArray:
    """Give the mean of each column over what is known of it; 0 where nothing is."""
    known = np.isfinite(truth)
    mean: FloatArray = np.where(known, truth, 0.0).sum(axis=0) / np.maximum(1, known.sum(axis=0))
    return mean


def _curved(train: FloatArray, test: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Scale by the training part and add squares: too dark and too bright may both tell."""
    centre, spread = train.mean(axis=0), train.std(axis=0)
    made = []
    for rows in (train, test):
        scaled = np.clip((rows - centre) / np.where(spread > _NO_SPREAD, spread, 1), -_FURTHEST, _FURTHEST)
        made.append(np.concatenate([scaled, scaled**2], axis=1))
    return made[0], made[1]


def _estimates(
    made: Sequence[FloatArray],
    truth: FloatArray,
    part: Part,
    names: Sequence[str],
    config: UncertaintyConfig,
    seed: int,
) -> list[Estimate]:
    """Measure each one's AUROC on the same resamples; the mean over columns where there are several."""
    questions = []
    for chances in made:
        for column, label in zip(chances.T, truth.T, strict=True):
            known = np.isfinite(label)
            people = [p for p, is_known in zip(part.patients, known, strict=True) if is_known]
            ranked = label[known], column[known]
            basis = Counts.of(people, label[known], label[known]).basis("rarer", config.level)
            limits = closed_forms(*ranked, label[known], people, config.level)["auroc"]
            questions.append(Question(known_only(partial(auroc, *ranked), known), basis, limits=limits))
    found = answers(questions, part.study_ids, part.patients, config, seed)
    each = truth.shape[1]
    sides = [found[start : start + each] for start in range(0, len(found), each)]
    return [side[0] if each == 1 else mean_of(side, names) for side in sides]


def _plain(made: FloatArray, truth: FloatArray) -> float:
    """Give the mean AUROC over columns, without an interval; NaN where a column has one kind only."""
    areas = []
    for column, label in zip(made.T, truth.T, strict=True):
        known = np.isfinite(label)
        areas.append(float(auroc(label[known], column[known], np.ones((1, int(known.sum()))))[0]))
    return float(np.mean(areas))


def _orders(part: Part, strata: IntArray, seed: int) -> Iterator[IntArray]:
    """Give each patient the rows of another patient of the same stratum, again and again; (n,) row numbers each."""
    rows: dict[str, list[int]] = {}
    for _, patient, row in sorted(zip(part.study_ids, part.patients, range(len(strata)), strict=True)):
        rows.setdefault(patient, []).append(row)
    groups: dict[int, list[list[int]]] = {}
    for mine in rows.values():
        groups.setdefault(int(strata[mine].max()), []).append(mine)
    rng = np.random.default_rng([seed, 0x5117])
    for _ in range(_PERMUTATIONS):
        order = np.empty(len(strata), dtype=np.int64)
        for _, group in sorted(groups.items()):
            for mine, giver in zip(group, rng.permutation(len(group)), strict=True):
                order[mine] = [group[giver][turn % len(group[giver])] for turn in range(len(mine))]
        yield order


def _kinds(targets: FloatArray) -> IntArray:
    """Number the combinations of targets; unknown is a value too."""
    return np.asarray(np.unique(np.nan_to_num(targets, nan=-1.0), axis=0, return_inverse=True)[1].ravel())


def _reported(rows: FloatArray, task: Task, classes: Sequence[str]) -> tuple[FloatArray, list[str]]:
    return (rows[:, -1:], [classes[-1]]) if task == "binary" else (rows, list(classes))


def _enough(values: Sequence[str | None], part: Part, seed: int) -> tuple[IntArray, list[str]]:
    """Choose the studies of values that enough patients have, and name these values."""
    kept = _sampled(part, seed)
    people: dict[str, set[str]] = {}
    for k in kept.tolist():
        value = values[k]
        if value is not None:
            people.setdefault(value, set()).add(part.patients[k])
    names = sorted(value for value, those in people.items() if len(those) >= _FEWEST)
    return np.array([k for k in kept.tolist() if values[k] in names], dtype=np.int64), names


def _sampled(part: Part, seed: int) -> IntArray:
    """Choose all studies of as many patients, drawn at random, as are looked at."""
    n = len(part.study_ids)
    if n <= _MOST_STUDIES:
        return np.arange(n)
    fold = patient_folds(part.study_ids, part.patients, np.zeros(n, dtype=np.int64), -(-n // _MOST_STUDIES), seed)
    return np.flatnonzero(fold == 0)


def _rows(part: Part, kept: IntArray) -> Part:
    rows = kept.tolist()
    ids, people = tuple(part.study_ids[k] for k in rows), tuple(part.patients[k] for k in rows)
    return Part(ids, people, part.targets[kept])


def _unasked(question: str, label: str, why: str, values: int) -> Probe:
    score = Score("auroc", label, None, None, None, 0, 0, f"not estimable: {why}")
    return Probe(question, score, None, None, None, values, "")


def _answered(question: str, score: Score, chance: FloatArray, values: int) -> Probe:
    finite = chance[np.isfinite(chance)]
    if score.value is None or not len(finite):
        return Probe(question, score, None, None, None, values, "")
    p = float((1 + (finite >= score.value - _NO_SPREAD).sum()) / (1 + len(finite)))
    return Probe(question, score, float(finite.mean()), float(np.quantile(finite, 0.95)), p, values, "")


def _found(probe: Probe) -> bool:
    return probe.p is not None and probe.p <= _CHANCE and (probe.auroc.low or 0.0) > 1 / 2


def _with_alarm(probe: Probe, alarm: str, values: int) -> Probe:
    return replace(probe, alarm=alarm, values=values)


def _said(score: Score) -> str:
    return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"
