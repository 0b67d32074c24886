"""Whether a probability of 0.8 comes true eight times in ten, and what to do where it does not.

A calibrator is fitted on validation only and is a handful of plain numbers. ``auto`` takes none unless one is better:
each is fitted on four fifths of the patients and judged on the last fifth, and a less simple one replaces a simpler
one only where its log loss is lower by more than one standard error over patients.
Source: Breiman et al., Classification and Regression Trees (1984), for the rule of one standard error.

A temperature above 1 makes all answers less sure. It keeps the order of studies in binary and multi-label tasks, and
the order of a study's classes where there are several. Platt's slope and intercept also move a class's prevalence;
isotonic regression follows any rising curve, and wants about a thousand studies to do so (Niculescu-Mizil and Caruana,
ICML 2005). Both treat each class against the rest, so that of several classes the sum is brought back to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, log_softmax, logit, softmax
from sklearn.isotonic import IsotonicRegression

from medtl.config import CalibrationConfig, EvaluationConfig, UncertaintyConfig
from medtl.evaluation.folds import patient_folds
from medtl.evaluation.metrics import calibration_error, sensitivity
from medtl.evaluation.questions import Question, answers, basis_of, known_only
from medtl.evaluation.uncertainty import Estimate, difference_of, mean_of, score_of
from medtl.records import CalibrationFindings, Calibrator, Curve, FloatArray, Predictions, Score, Task

_SUREST = 1e-12  # a probability this near to 0 or 1 is taken as this far from it
_HOTTEST = 20.0  # temperatures from 1 / 20 to 20; a better one beyond means that validation cannot tell
_FOLDS = 5
_SIMPLEST_FIRST = ("none", "temperature", "platt", "isotonic")
Knots = tuple[tuple[float, float], ...]


def reliability(truth: FloatArray, score: FloatArray, bins: int, label: str) -> Curve:
    """Give mean probability and observed share in bins of equal width; empty bins are left out."""
    member = np.minimum((score * bins).astype(int), bins - 1)
    count = np.bincount(member, minlength=bins)
    filled = count > 0
    mean = np.bincount(member, score, bins)[filled] / count[filled]
    observed = np.bincount(member, truth, bins)[filled] / count[filled]
    return Curve(
        "calibration",
        label,
        tuple(map(float, mean)),
        tuple(map(float, observed)),
        tuple(map(float, count[filled])),
    )


def fit(val: Predictions, task: Task, classes: Sequence[str], config: CalibrationConfig, seed: int) -> Calibrator:
    """Fit a calibrator on validation, or say why there is none.

    A label of a multi-label task with too few patients is left as it is; in other tasks one class with too few leaves
    all of them.
    """
    patients = len(set(val.patients))
    none = Calibrator(task, "none", "not wanted (evaluation.calibration.method)", patients=patients)
    if config.method == "none":
        return none
    usable = [c for c in range(len(classes)) if _fewest(val, c) >= config.fewest_patients]
    if not usable or (task != "multilabel" and len(usable) < len(classes)):
        lacking = ", ".join(name for c, name in enumerate(classes) if c not in usable)
        need = f"validation has fewer than {config.fewest_patients} patients with, or without, {lacking}"
        return replace(none, reason=need)
    left = ", ".join(name for c, name in enumerate(classes) if c not in usable)
    aside = f"; left as they are, with too few patients: {left}" if left else ""
    if config.method == "auto":
        chosen = _choose(val, task, usable, seed)
        return replace(chosen, reason=chosen.reason + aside, patients=patients)
    fitted = _fitted(config.method, val, task, usable)
    if isinstance(fitted, str):
        return replace(none, reason=fitted)
    return replace(fitted, reason=f"wanted (evaluation.calibration.method){aside}", patients=patients)


def apply(calibrator: Calibrator, probabilities: FloatArray) -> FloatArray:
    """Give calibrated probabilities, (n, classes); those of a single-label task sum to 1."""
    task, multilabel = calibrator.task, calibrator.task == "multilabel"
    if calibrator.method == "none":
        return np.array(probabilities, dtype=np.float64)
    if calibrator.method == "temperature":
        if multilabel:
            cooled: FloatArray = expit(_log_odds(probabilities) / calibrator.temperature)
        else:
            cooled = softmax(_logs(probabilities) / calibrator.temperature, axis=1)
        return cooled
    columns = _columns(task, probabilities)
    if calibrator.method == "platt":
        made: FloatArray = expit(np.array(calibrator.slopes) * _log_odds(columns) + np.array(calibrator.intercepts))
    else:
        made = np.stack([_along(k, column) for k, column in zip(calibrator.knots, columns.T, strict=True)], axis=1)
    if task == "binary":
        return np.concatenate([1 - made, made], axis=1)
    if not multilabel:
        made = np.divide(made, made.sum(axis=1, keepdims=True))
    return made


def calibrated(calibrator: Calibrator, predictions: Predictions) -> Predictions:
    """Give the same predictions with calibrated probabilities."""
    return replace(predictions, probabilities=apply(calibrator, predictions.probabilities))


def _fewest(val: Predictions, index: int) -> int:
    """Count the patients with a class, or without it, whichever are fewer."""
    people = np.asarray(val.patients, dtype=np.str_)
    truth = val.targets[:, index]
    return min(len(np.unique(people[truth == kind])) for kind in (0, 1))


def _choose(val: Predictions, task: Task, usable: Sequence[int], seed: int) -> Calibrator:
    """Fit the calibrator with the lowest cross-validated log loss, or a simpler one that is not clearly worse."""
    losses = _cross_validated(val, task, usable, seed)
    means = {method: float(loss.mean()) for method, loss in losses.items()}
    best, refused = "none", ""
    for method in losses:
        gain, error = _paired(losses[best] - losses[method], val.patients)
        if gain > error:
            best = method
    fitted = _fitted(best, val, task, usable)
    if isinstance(fitted, str):
        best, refused = "none", f"; {fitted}"
    said = ", ".join(f"{method} {mean:.4f}" for method, mean in means.items())
    verdict = "no other is better by more than one standard error" if best == "none" else "better than simpler ones"
    reason = f"{best}: {verdict} over patients (cross-validated log loss on validation: {said}){refused}"
    chosen = Calibrator(task, "none", reason) if isinstance(fitted, str) else replace(fitted, reason=reason)
    return replace(chosen, log_losses=means)


def _cross_validated(val: Predictions, task: Task, usable: Sequence[int], seed: int) -> Mapping[str, FloatArray]:
    """Give each method's log loss of each study by a calibrator that did not see its patient; (n,) each."""
    kinds = (np.nan_to_num(val.targets) * np.arange(1, val.targets.shape[1] + 1)).max(axis=1).astype(np.int64)
    fold = patient_folds(val.study_ids, val.patients, kinds, _FOLDS, seed)
    losses = {}
    for method in _SIMPLEST_FIRST:
        made = np.full(val.probabilities.shape, np.nan)
        for number in range(int(fold.max()) + 1):
            fitted = _fitted(method, _rows(val, fold != number), task, usable)
            if isinstance(fitted, str):
                break
            made[fold == number] = apply(fitted, val.probabilities[fold == number])
        else:
            losses[method] = _log_loss(made, val.targets, task, usable)
    return losses


def _paired(gain: FloatArray, patients: Sequence[str]) -> tuple[float, float]:
    """Give the mean gain over studies and its standard error over patients."""
    _, member = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    count = int(member.max()) + 1
    sums = np.bincount(member, gain - gain.mean())
    return float(gain.mean()), float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(gain))


def _log_loss(made: FloatArray, targets: FloatArray, task: Task, usable: Sequence[int]) -> FloatArray:
    if task != "multilabel":
        loss: FloatArray = -(_logs(made) * targets).sum(axis=1)
        return loss
    truth = targets[:, usable]
    known = np.isfinite(truth)
    odds = _log_odds(made[:, usable])
    each = np.where(known, -log_expit(np.where(truth > 0.5, odds, -odds)), 0.0)
    mean: FloatArray = each.sum(axis=1) / max(1, len(usable))
    return mean


def _fitted(method: str, val: Predictions, task: Task, usable: Sequence[int]) -> Calibrator | str:
    """Fit one method, or say why it cannot be."""
    if method == "none":
        return Calibrator(task, "none", "")
    if method == "temperature":
        return _fit_temperature(val, task, usable)
    columns, truths = _columns(task, val.probabilities), _columns(task, val.targets)
    chosen = set(range(columns.shape[1])) if task != "multilabel" else set(usable)
    lines: list[tuple[float, float]] = []
    knots: list[Knots] = []
    for index in range(columns.shape[1]):
        known = np.isfinite(truths[:, index])
        truth, score = truths[known, index], columns[known, index]
        if index not in chosen or len(np.unique(truth)) < 2:
            lines.append((1.0, 0.0))
            knots.append(())
        elif method == "platt":
            lines.append(_fit_platt(truth, score))
        else:
            people = len({p for p, is_known in zip(val.patients, known, strict=True) if is_known})
            knots.append(_fit_isotonic(truth, score, people))
    if method == "isotonic":
        return Calibrator(task, "isotonic", "", knots=tuple(knots))
    if min(slope for slope, _ in lines) <= 0:
        return "Platt's slope is not positive: a higher probability is no sign of the class on validation"
    slopes, intercepts = zip(*lines, strict=True)
    return Calibrator(task, "platt", "", slopes=slopes, intercepts=intercepts)


def _fit_temperature(val: Predictions, task: Task, usable: Sequence[int]) -> Calibrator | str:
    """Find the temperature with the least log loss. Source: Guo et al., ICML 2017."""
    if task == "multilabel":
        truth, odds = val.targets[:, usable], _log_odds(val.probabilities[:, usable])
        known = np.isfinite(truth)
        ahead = np.where(truth > 0.5, odds, -odds)[known]

        def loss(cold: float) -> float:
            return -float(log_expit(np.exp(cold) * ahead).mean())
    else:
        logs, true = _logs(val.probabilities), val.targets > 0.5
        ahead = logs[true] - np.where(true, -np.inf, logs).max(axis=1)

        def loss(cold: float) -> float:
            return -float(log_softmax(np.exp(cold) * logs, axis=1)[true].mean())

    if ahead.min() > 0:
        return "no temperature has the least log loss: validation is told apart without an error"
    end = float(np.log(_HOTTEST))
    cold = float(minimize_scalar(loss, bounds=(-end, end), method="bounded", options={"xatol": 1e-10}).x)
    if cold < -end + 1e-3:
        return "no temperature has the least log loss: the probabilities are no sign of the classes on validation"
    return Calibrator(task, "temperature", "", temperature=float(np.exp(-cold)))


def _fit_platt(truth: FloatArray, score: FloatArray) -> tuple[float, float]:
    """Fit a slope and an intercept on the log odds; truth is drawn in, so that a separation has an end too.

    Source: Platt, Probabilistic outputs for support vector machines (1999).
    """
    odds, diseased = _log_odds(score), float((truth > 0.5).sum())
    healthy = len(truth) - diseased
    aim = np.where(truth > 0.5, (diseased + 1) / (diseased + 2), 1 / (healthy + 2))
    unit = max(1.0, float(np.abs(odds).max()))

    def loss(line: FloatArray) -> tuple[float, FloatArray]:
        value = line[0] * odds / unit + line[1]
        miss = expit(value) - aim
        cost = -(aim * log_expit(value) + (1 - aim) * log_expit(-value)).sum()
        return float(cost), np.array([miss @ odds / unit, miss.sum()])

    start = np.array([0.0, np.log((diseased + 1) / (healthy + 1))])
    slope, intercept = minimize(loss, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-8, "ftol": 1e-15}).x
    return float(slope / unit), float(intercept)


def _fit_isotonic(truth: FloatArray, score: FloatArray, patients: int) -> Knots:
    """Fit a rising curve; it comes no nearer to 0 and 1 than so many patients can show (Laplace's rule)."""
    least = 1 / (patients + 2)
    curve = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(score, truth)
    return tuple(zip(map(float, curve.X_thresholds_), map(float, curve.y_thresholds_), strict=True))


def _along(knots: Knots, score: FloatArray) -> FloatArray:
    if not knots:
        return score
    before, after = np.array(knots).T
    return np.asarray(np.interp(score, before, after))


def _columns(task: Task, rows: FloatArray) -> FloatArray:
    """Give the columns that are calibrated each for itself: of a binary task the positive one."""
    return rows[:, 1:] if task == "binary" else rows


def _logs(probabilities: FloatArray) -> FloatArray:
    return np.log(np.maximum(probabilities.astype(np.float64), _SUREST))


def _log_odds(probabilities: FloatArray) -> FloatArray:
    odds: FloatArray = logit(np.clip(probabilities.astype(np.float64), _SUREST, 1 - _SUREST))
    return odds


def _rows(predictions: Predictions, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Predictions:
    rows = np.flatnonzero(chosen)
    return Predictions(
        predictions.part,
        tuple(predictions.study_ids[row] for row in rows),
        tuple(predictions.patients[row] for row in rows),
        predictions.targets[rows],
        predictions.probabilities[rows],
    )


def examine(
    test: Predictions, calibrator: Calibrator, classes: Sequence[str], config: EvaluationConfig, seed: int
) -> CalibrationFindings:
    """Measure what the calibrator does on the test part: Brier score and calibration error, before and after, paired.

    Args:
        test: with the probabilities of the model, not yet calibrated.
    """
    bins, level = config.calibration_bins, config.uncertainty.level
    made = calibrated(calibrator, test)
    reported = [len(classes) - 1] if calibrator.task == "binary" else list(range(len(classes)))
    label = classes[-1] if len(reported) == 1 else "macro"
    names = [classes[c] for c in reported]
    estimates = _estimates(test, made, names, reported, bins, config.uncertainty, seed)
    before, after, differences = [], [], []
    for metric, (one, other) in estimates.items():
        before.append(score_of(metric, label, one, level, test.patients))
        after.append(score_of(metric, label, other, level, test.patients))
        apart = difference_of(other, one, level)
        differences.append(score_of(f"{metric} difference", label, apart, level, test.patients))
    curves, old = (_reliabilities(one, reported, classes, bins) for one in (made, test))
    return CalibrationFindings(calibrator, tuple(before), tuple(after), tuple(differences), curves, old)


def _reliabilities(
    predictions: Predictions, reported: Sequence[int], classes: Sequence[str], bins: int
) -> tuple[Curve, ...]:
    curves = []
    for index in reported:
        known = np.isfinite(predictions.targets[:, index])
        if known.any():
            truth, score = predictions.targets[known, index], predictions.probabilities[known, index]
            curves.append(reliability(truth, score, bins, classes[index]))
    return tuple(curves)


def _estimates(
    one: Predictions,
    other: Predictions,
    names: Sequence[str],
    reported: Sequence[int],
    bins: int,
    config: UncertaintyConfig,
    seed: int,
) -> dict[str, tuple[Estimate, Estimate]]:
    """Measure both on the same resamples; the mean over classes where there are several."""
    questions = []
    for predictions in (one, other):
        for index in reported:
            known = np.isfinite(predictions.targets[:, index])
            truth, score = predictions.targets[known, index], predictions.probabilities[known, index]
            people = [p for p, is_known in zip(predictions.patients, known, strict=True) if is_known]
            basis = basis_of(people, config.level)
            miss = partial(sensitivity, np.ones(len(truth)), (score - truth) ** 2)
            error = partial(calibration_error, truth, score, bins=bins)
            questions += [Question(known_only(of, known), basis) for of in (miss, error)]
    found = answers(questions, one.study_ids, one.patients, config, seed)
    half = len(found) // 2
    joined = {}
    for turn, metric in enumerate(("brier", "calibration_error")):
        sides = (found[turn:half:2], found[half + turn :: 2])
        pair = [side[0] if len(side) == 1 else mean_of(side, names) for side in sides]
        joined[metric] = (pair[0], pair[1])
    return joined


def table(findings: CalibrationFindings) -> list[tuple[str, Score, Score, Score]]:
    """Give one row for each metric: its name, before, after, and their difference."""
    names = [score.metric for score in findings.before]
    return list(zip(names, findings.before, findings.after, findings.differences, strict=True))
