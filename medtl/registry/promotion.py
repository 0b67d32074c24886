"""Whether a candidate may be called validated. Pure."""

from __future__ import annotations

from typing import Literal

from medtl.config import GateConfig, PromotionConfig
from medtl.errors import ConfigError
from medtl.records import Evaluation, GateCheck


def check(evaluation: Evaluation, config: PromotionConfig) -> tuple[GateCheck, ...]:
    """Hold every condition of the gate against the evaluation; what is not estimable does not pass.

    Raises:
        ConfigError: a condition names a metric that was not computed.
    """
    return tuple(_check(evaluation, gate) for gate in config.gate)


def status_of(checks: tuple[GateCheck, ...]) -> Literal["candidate", "validated", "refused"]:
    """Give ``candidate`` without a gate, else ``validated`` if every condition passed, else ``refused``."""
    if not checks:
        return "candidate"
    return "validated" if all(one.passed for one in checks) else "refused"


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
