"""The verbs of the registry: list, show, promote, retire, rollback, export, import. They need no Prefect."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from pipelines.audit_verbs import By, Reason, Role
from pipelines.terminal import Json, Sets, Workspace, load, number, show_table
from pipelines.weights import KEEP

if TYPE_CHECKING:
    from medtl.registry.history import Word
    from medtl.registry.io import Entry, Register

registry = App(
    name="registry",
    help="Releases and how they stand: candidate, validated, approved, live, retired.",
    group=KEEP,
)
_DEFAULT = Path("workspace")
ReleaseId = Annotated[str, Parameter(help="a release, or the beginning of its identifier: `medtl registry list`")]


@registry.command(name="list")
def registry_list(*, workspace: Workspace = _DEFAULT, json_: Json = False) -> None:
    """List the releases and what they are called now."""
    from medtl.registry.io import Register

    entries = Register(workspace).entries()
    rows = [(e.release.release_id, e.release.name, e.release.status, e.artifact) for e in entries]
    columns = ("release", "name", "status", "artifact")
    show_table([dict(zip(columns, row, strict=True)) for row in rows], json_, f"Releases in {workspace}", columns, rows)


@registry.command(name="show")
def registry_show(release: ReleaseId, *, workspace: Workspace = _DEFAULT, json_: Json = False) -> None:
    """Show one release: its gate as observed, what it was made from, and its way so far. Checks every byte of it."""
    from medtl.registry.history import changes
    from medtl.registry.io import Register

    register = Register(workspace)
    entry = register.called(release)
    folder = register.open(entry)
    way = [c for c in changes(register.trail.events()) if c.release_id == entry.release.release_id]
    rows: list[tuple[Any, ...]] = [("status", entry.release.status), ("folder", folder)]
    rows += [
        (f"gate: {c.condition}", f"{number(c.observed)}, {'passed' if c.passed else 'failed'}")
        for c in entry.release.checks
    ]
    rows += [(f"{c.time} {c.state}", _said(c.details)) for c in way]
    rows += [(key, value) for key, value in entry.release.provenance.items() if isinstance(value, str)]
    value = {**asdict(entry.release), "folder": str(folder), "way": [asdict(c) for c in way]}
    show_table(value, json_, f"Release {entry.release.release_id} of '{entry.release.name}'", ("what", "value"), rows)


@registry.command(name="promote")
def registry_promote(
    release: ReleaseId,
    *,
    to: Annotated[Literal["validated", "approved", "live"], Parameter(help="the next step")],
    by: By,
    role: Role,
    reason: Reason,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """Approve a validated release, or put an approved one into service; the one that was live steps back to approved.

    The gate alone makes a release validated. Exit code 3 if the step is refused, which goes on the trail too.
    """
    from medtl.artifacts import Store
    from medtl.registry.io import Register

    with Store(workspace).lock("registry"):  # of two people who promote at once, the second sees what the first did
        _step(Register(workspace), release, to, _word(by, role, reason), json_)


@registry.command(name="retire")
def registry_retire(
    release: ReleaseId, *, by: By, role: Role, reason: Reason, workspace: Workspace = _DEFAULT, json_: Json = False
) -> None:
    """Take a release out of service for good; it is never used again, and its files stay."""
    from medtl.artifacts import Store
    from medtl.registry.io import Register

    with Store(workspace).lock("registry"):
        _step(Register(workspace), release, "retired", _word(by, role, reason), json_)


@registry.command(name="rollback")
def registry_rollback(
    name: Annotated[str, Parameter(help="of the config whose live release goes")],
    *,
    by: By,
    role: Role,
    reason: Reason,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """Put the release that served before back into service; the one that is live now needs a new approval."""
    from medtl.artifacts import Store
    from medtl.audit import Event
    from medtl.registry.history import to_roll_back_to
    from medtl.registry.io import Register

    register, word = Register(workspace), _word(by, role, reason)
    with Store(workspace).lock("registry"):
        live, before = to_roll_back_to(register.trail.events(), name)
        register.open(register.called(before))
        said = {"name": name, **asdict(word)}
        register.trail.extend(
            [
                Event("release.rolled_back", live, details={**said, "for": before}),
                Event("release.live", before, details=said),
            ]
        )
    value = {"live": before, "rolled_back": live}
    show_table(value, json_, f"Rolled back '{name}'", ("live", "validated, no longer live"), [(before, live)])


@registry.command(name="export")
def registry_export(
    release: ReleaseId,
    out: Annotated[Path, Parameter(help="zip, ONNX file, or folder of a bundle to write")],
    *,
    format_: Annotated[
        Literal["parcel", "onnx", "bundle"],
        Parameter(name="--format", help="parcel: for `medtl registry import`; onnx: the network; bundle: MONAI's"),
    ] = "parcel",
    config: Annotated[Path | None, Parameter(help="of a bundle: YAML file that says how scans are read")] = None,
    set_: Sets = None,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """Write a release as one zip that `medtl registry import` takes in elsewhere, or as others can run it.

    An ONNX file takes prepared images; it is tried in onnxruntime first, and refused where an answer differs by more
    than 1e-4. A bundle takes scans: `python -m monai.bundle run` gives the answers of `medtl predict`.
    """
    from medtl.registry.io import Register
    from pipelines.exports import export

    register = Register(workspace)
    entry = register.called(release)
    sha256 = export(register, entry, out, format_, None if config is None else load(config, set_))
    value = {"release": entry.release.release_id, "file": str(out), "format": format_, "sha256": sha256}
    show_table(value, json_, "Exported", tuple(value), [tuple(value.values())])


@registry.command(name="import")
def registry_import(
    file: Annotated[Path, Parameter(help="zip that `medtl registry export` wrote")],
    *,
    by: By,
    role: Role,
    reason: Reason,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """Take a release in that was made elsewhere. It is validated here if it passed its gate there; never approved."""
    from medtl.artifacts import file_digest, read_record
    from medtl.audit import AuditedStore
    from medtl.errors import TamperedError
    from medtl.records import Release
    from medtl.registry import parcel
    from medtl.registry.io import RELEASE, Register
    from medtl.registry.promotion import status_of

    word = asdict(_word(by, role, reason))
    artifact = parcel.unpack(file, AuditedStore(workspace))
    release, register = read_record(artifact.path / RELEASE, Release), Register(workspace)
    claimed = status_of(release.checks, has_gate=bool(release.checks))
    if not re.fullmatch(r"r-[0-9a-f]{12}", release.release_id) or release.status not in ("candidate", claimed):
        raise TamperedError(f"'{file}' holds a release that calls itself what its gate does not. It was not entered.")
    known = next((e for e in register.entries() if e.release.release_id == release.release_id), None)
    if known is not None and known.digest != artifact.digest:
        raise TamperedError(f"Another release is entered as {release.release_id} already. This one was not.")
    sha256 = file_digest(file)
    register.trail.append(
        "release.imported", release.release_id, details={**word, "name": release.name, "sha256": sha256}
    )
    observed = [{"condition": c.condition, "observed": c.observed, "passed": c.passed} for c in release.checks]
    new = register.enter(release, artifact, {"gate": observed, "imported": sha256})
    value = {"release": release.release_id, "name": release.name, "status": release.status, "new": new}
    show_table(value, json_, "Imported", tuple(value), [tuple(value.values())])


def _step(
    register: Register, release: str, to: Literal["validated", "approved", "live", "retired"], word: Word, json_: bool
) -> None:
    from medtl.audit import Event
    from medtl.errors import GateRefused
    from medtl.registry.history import check_promotion

    entry = register.called(release)
    release_id, said = entry.release.release_id, {"name": entry.release.name, **asdict(word)}
    try:
        check_promotion(entry.release, to)
    except GateRefused as error:
        register.trail.append(f"promotion.{to}", release_id, "refused", {**said, "why": str(error)})
        raise
    if to != "retired":
        register.open(entry)  # nothing is approved that is not what was entered
    events = [Event(f"release.{to}", release_id, details=said)]
    replaced = _live(register, entry) if to == "live" else None
    if replaced is not None:
        events.insert(0, Event("release.replaced", replaced, details={**said, "for": release_id}))
    register.trail.extend(events)
    value = {"release": release_id, "was": entry.release.status, "is": to, "replaced": replaced}
    show_table(
        value, json_, "Entered on the trail", tuple(value), [tuple("-" if v is None else v for v in value.values())]
    )


def _live(register: Register, entry: Entry) -> str | None:
    others = (one.release for one in register.entries() if one.release.name == entry.release.name)
    return next((one.release_id for one in others if one.status == "live"), None)


def _word(by: str, role: str, reason: str) -> Word:
    from medtl.registry.history import Word

    return Word(by, role, reason)


def _said(details: Any) -> str:
    return f"{details['by']}, {details['role']}: {details['reason']}" if "by" in details else "the gate"
