"""Keep a run on a schedule."""

from __future__ import annotations

import re
from datetime import timedelta

from medtl.config import Config
from medtl.errors import ConfigError

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def interval_of(text: str) -> timedelta:
    """Read ``24h``, ``30m``, ``20s`` or ``7d``.

    Raises:
        ConfigError: none of these.
    """
    match = re.fullmatch(r"(\d+)\s*([smhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--every {text}: write a number and s, m, h or d, for instance 24h.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def serve(config: Config, every: timedelta | None, cron: str | None) -> None:
    """Serve the run flow until stopped; one run at a time, a run that is due meanwhile is left out.

    Prefect's server must be running (:func:`pipelines.environment.server`).
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.types.entrypoint import EntrypointType

    from pipelines.run import run

    run.serve(
        name=config.name,
        interval=every,
        cron=cron,
        parameters={"config": config.model_dump(mode="json")},
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        pause_on_shutdown=False,  # else a service that is stopped comes back with its schedule switched off
        print_starting_message=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
