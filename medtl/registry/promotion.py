"""Whether a candidate may be called validated. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medtl.config import FloorConfig, GateConfig, IncumbentConfig, PromotionConfig
from medtl.errors import ConfigError
from medtl.records import Comparison, Evaluation, GateCheck, Leak, SubgroupFindings


@dataclass(frozen=True, slots=True)
class Beside:
    """The live release on the candidate's test part."""

    live: str
    comparison: Comparison | None  # candidate minus live; None where the two cannot be compared
    note: str  # why they cannot; else how many of the test patients taught the live one


def check(evaluation: Evaluation, config: PromotionConfig) -> tuple[GateCheck, ...]:
    """Hold every condition on a metric against the evaluation; what is not estimable does not pass.

    Raises:
        ConfigError: a condition names a metric that was not computed.
    """
    return tuple(_check(evaluation, gate) for gate in config.gate)


def check_clean(leaks: Sequence[Leak]) -> GateCheck:
    """Ask that nobody is on two sides of the split."""
    found = sum(leak.count for leak in leaks)
    return GateCheck("patients, exams, groups or pictures on two sides of the split <= 0", float(found), found == 0)


def check_licence(licence: str | None, allowed: Sequence[str], started: bool) -> GateCheck:
    """Ask that the start weights may be used; weights whose licence nobody wrote down may not.

    Args:
        started: the model began from weights at all.
    """
    passed = not started or licence in allowed
    had = "none were used" if not started else licence or "not known"
    return GateCheck(f"licence of the start weights ({had}) is one of {', '.join(allowed)}", None, passed)


def check_incumbent(beside: Beside | None, config: IncumbentConfig) -> GateCheck:
    """Ask that the candidate is not worse than the live release, paired on the candidate's test part.

    Args:
        beside: None where nothing is live.
    """
    if beside is None:
        return GateCheck(f"{config.metric} not worse than the live release's (none is live)", None, passed=True)
    condition = f"{config.metric} - that of live {beside.live} > -{config.margin:g} ({beside.note})"
    if beside.comparison is None:
        return GateCheck(condition, None, passed=False)
    passed = beside.comparison.verdict in ("superior", "non-inferior")
    return GateCheck(condition, beside.comparison.difference.low, passed)


def check_subgroups(found: SubgroupFindings, config: FloorConfig) -> GateCheck:
    """Ask that no subgroup with figures does worse than a floor; where none has figures, nothing is shown to pass."""
    observed: list[float | None] = []
    for group in found.groups:
        for score in group.scores:
            if score.metric == config.metric:
                observed.append(score.value if config.bound == "value" else score.low)
    known = [value for value in observed if value is not None]
    worst = min(known, default=None)
    what = "lower bound of " if config.bound == "low" else ""
    condition = f"{what}{config.metric} of every subgroup >= {config.at_least:g} ({len(known)} subgroups with figures)"
    return GateCheck(condition, worst, bool(known) and len(known) == len(observed) and min(known) >= config.at_least)


def status_of(checks: Sequence[GateCheck], has_gate: bool) -> Literal["candidate", "validated", "refused"]:
    """Give ``refused`` if a condition failed, ``validated`` if a gate on a metric was passed, else ``candidate``."""
    if not all(one.passed for one in checks):
        return "refused"
    return "validated" if has_gate else "candidate"


def _check(evaluation: Evaluation, gate: GateConfig) -> GateCheck:
    if gate.metric not in evaluation.metrics:
        known = ", ".join(evaluation.metrics)
        raise ConfigError(f"'registry.promotion.gate': there is no metric '{gate.metric}'; there are {known}.")
    score = evaluation.score(gate.metric)
    observed: float | None = {"value": score.value, "low": score.low, "high": score.high}[gate.bound]
    passed = observed is not None
    if observed is not None and gate.at_least is not None:
        passed = passed and observed >= gate.at_least
    if observed is not None and gate.at_most is not None:
        passed = passed and observed <= gate.at_most
    bounds = ((">=", gate.at_least), ("<=", gate.at_most))
    limits = [f"{sign} {limit:g}" for sign, limit in bounds if limit is not None]
    bound = {"value": "", "low": "lower bound of ", "high": "upper bound of "}[gate.bound]
    return GateCheck(f"{bound}{gate.metric} {' and '.join(limits)}", observed, passed)
