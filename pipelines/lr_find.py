"""``medtl lr-find``: raise the learning rate of one phase until the loss breaks away. It needs no Prefect."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from medtl.artifacts import Store, storage_errors, write_bytes
from medtl.audit import AuditLog
from medtl.config import Config
from medtl.progress import listening
from pipelines.terminal import ConfigFile, Json, Sets, load_diagnosis, log_to_file, progress, show_table
from pipelines.upkeep import at_work

if TYPE_CHECKING:
    from medtl.model.lr_find import RangeTest


def lr_find(
    config: ConfigFile,
    *,
    phase: Annotated[
        str | None, Parameter(help="name of the phase; default: the first that trains part of the trunk")
    ] = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Try learning rates from 1e-6 to 3 on the training part; suggest one for a phase, or say that none stands out.

    The network is as it starts, with its weights and before any phase; validation and test are not looked at. Writes
    the curve as a page into the workspace's reports.
    """
    settings = load_diagnosis(config, set_, "lr-find")
    Store(settings.workspace)  # says at once if the workspace cannot be written
    log_to_file(settings.workspace)
    with progress() as listener, listening(listener) if listener else nullcontext():
        found = measure(settings, phase)
    page = write_page(settings, found)
    value = {**asdict(found), "page": str(page)}
    show_table(
        value, json_, f"Learning rate of phase '{found.phase}'", ("what", "value"), [*rows_of(found), ("page", page)]
    )


@at_work
def measure(config: Config, phase: str | None) -> RangeTest:
    """Bring the training part and the network together, and run the test; what is prepared already is used."""
    from medtl.dataset.io import read_pack, read_plan, read_split
    from medtl.model import devices
    from medtl.model.lr_find import find_learning_rate
    from medtl.studies.io import read_cohort
    from pipelines import steps, training

    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    split = steps.split_by_patient(config, scans, cohort)
    plan = steps.make_plan(config, scans, cohort, split)
    pack = steps.pack_images(config, scans, cohort, plan)
    known, parts, how = read_cohort(cohort.path), read_split(split.path), read_plan(plan.path)
    devices.make_deterministic(config.seed, training.threads_for(config.model, 1))
    network, _ = training.network_for(config, known, how)
    material = training.material_for(config, known, parts, read_pack(pack.path), pack.digest)
    return find_learning_rate(network, material, config.model, config.seed, phase)


def rows_of(found: RangeTest) -> list[tuple[str, Any]]:
    """Give what a person wants to know of a test."""
    return [
        ("suggested (safe)", _rate(found.safe)),
        ("steepest descent", _rate(found.steepest)),
        ("configured now", _rate(found.configured)),
        ("tried", f"{found.rates[0]:.1e} to {found.rates[-1]:.1e}" if found.rates else "none"),
        ("ended by", found.ended),
        ("batches", f"{len(found.losses)} steps on {found.batches} batches of the training part"),
        ("note", found.note),
    ]


def write_page(config: Config, found: RangeTest) -> Path:
    """Write the curve as a page into the workspace's reports; give its path."""
    from medtl.report.curves import page, range_test

    marks = {"safe": found.safe, "steepest": found.steepest, "configured": found.configured}
    svg = range_test(found.rates, found.losses, found.smoothed, marks)
    folder = Store(config.workspace).workspace / "reports"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    path = folder / f"{config.name}-lr-find-{found.phase}.html"
    rows = [(name, str(value)) for name, value in rows_of(found)]
    write_bytes(path, page(f"Learning rate of phase '{found.phase}'", svg, rows).encode())
    AuditLog(config.workspace).note_files("report.published", f"lr-find {found.phase}", [path])
    return path


def _rate(rate: float | None) -> str:
    return "no clear minimum" if rate is None else f"{rate:.1e}"
