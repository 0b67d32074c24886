"""The verbs of the audit trail: verify, log, live, report, anchor, keygen, discard, sweep. They need no Prefect."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from medtl.errors import ConfigError, MedtlError, TamperedError
from medtl.progress import listening
from pipelines.terminal import Json, Workspace, progress, say, show_table
from pipelines.weights import KEEP

if TYPE_CHECKING:
    from medtl.audit import AuditLog
    from medtl.registry.history import Service

audit = App(
    name="audit",
    help="Verify and read the audit trail: what happened, who did it, which release served, and is it all still so.",
    group=KEEP,
)
_DEFAULT = Path("workspace")
By = Annotated[str, Parameter(help="your name; it stands on the trail")]
Role = Annotated[str, Parameter(help="in which role you say so, for instance 'head of radiology'")]
Reason = Annotated[str, Parameter(help="for whoever asks later; no patient's name")]


@audit.command(name="verify")
def audit_verify(
    *,
    workspace: Workspace = _DEFAULT,
    head: Annotated[str | None, Parameter(help="hash noted earlier: finds out whether the log was cut off")] = None,
    anchors: Annotated[Path | None, Parameter(help="file that heads were anchored in")] = None,
    public_key: Annotated[
        list[Path] | None, Parameter(help="every event must be signed with it (or one of them)")
    ] = None,
    json_: Json = False,
) -> None:
    """Verify every line of the log, and every result, release and page against it. Exit code 1 if anything differs.

    Names the first line that was altered, dropped, swapped or cut off, and each file whose bytes are not what was
    entered. Caches, logs, Prefect's own files and unfinished work are not evidence and are left out.
    """
    from medtl.audit import read_public_key
    from pipelines.trail import anchored, verify_workspace

    trail = _trail(workspace)
    keys = [read_public_key(path) for path in public_key or ()]
    with progress() as listener, listening(listener) if listener else nullcontext():
        chain = trail.verify(head, anchored(anchors) if anchors else (), keys)
        faults = verify_workspace(workspace, chain, trail.events())
    found = {"events": chain.events, "head": chain.head, "signed": chain.signed, "faults": [asdict(f) for f in faults]}
    if faults:
        show_table(
            found, json_, "Not as the trail says", ("what", "where", "why"), [tuple(asdict(f).values()) for f in faults]
        )
        raise TamperedError(
            f"{len(faults)} things are not as the audit trail of '{workspace}' says; the first: {faults[0].what} "
            f"{faults[0].where}. Keep a copy before anything else is run."
        )
    rows = [(chain.events, chain.signed, chain.head)]
    show_table(found, json_, "The chain is whole, and all that it names is there", ("events", "signed", "head"), rows)


@audit.command(name="log")
def audit_log(
    *,
    workspace: Workspace = _DEFAULT,
    action: Annotated[str | None, Parameter(help="only events whose action begins so: release, test, excluded")] = None,
    from_: Annotated[str | None, Parameter(name="--from", help="first day, 2026-01-31 (UTC)")] = None,
    to: Annotated[str | None, Parameter(help="last day (UTC)")] = None,
    json_: Json = False,
) -> None:
    """List what happened, oldest first; --json adds the details."""
    start, end = _period(from_, to)
    events = [
        event
        for event in _trail(workspace).events()
        if (action is None or event["action"].startswith(action))
        and start <= datetime.fromisoformat(event["time"]) < end
    ]
    rows = [(e["sequence"], e["time"], e["actor"], e["action"], e["subject"][:16], e["outcome"]) for e in events]
    show_table(events, json_, "Audit log", ("no", "time", "actor", "action", "subject", "outcome"), rows)


@audit.command(name="live")
def audit_live(
    *,
    on: Annotated[
        str | None, Parameter(help="a day, 2026-01-31, or a moment, 2026-01-31T14:30; UTC; default: now")
    ] = None,
    name: Annotated[str | None, Parameter(help="of the config; default: all")] = None,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """Tell which release served on a day, who approved it and put it into service, and on what evidence."""
    from medtl.registry.history import live_on

    when = _moment(on) if on else datetime.now(UTC)
    found = live_on(_trail(workspace).events(), when, name)
    rows = [
        (s.release_id, s.name, s.start, s.end or "still live", _who(s.approved_by), _who(s.live_by), _gate(s))
        for s in found
    ]
    columns = ("release", "name", "from", "to", "approved by", "put into service by", "gate, as observed")
    show_table([asdict(one) for one in found], json_, f"Live on {when.isoformat()} (UTC)", columns, rows)
    if not found and not json_:
        say("No release was live then.")


@audit.command(name="report")
def audit_report(
    *,
    from_: Annotated[str, Parameter(name="--from", help="first day, 2026-01-01 (UTC)")],
    to: Annotated[str, Parameter(help="last day (UTC)")],
    out: Annotated[Path | None, Parameter(help="HTML to write; default: audit-FROM-TO.html in this folder")] = None,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """Write the report of a period: runs, failures, exclusions, looks at test parts, releases, drift, incidents."""
    from medtl.artifacts import write_bytes
    from medtl.monitoring.drift import measure
    from medtl.report.period import facts_of, page
    from pipelines.trail import verify_workspace

    trail = _trail(workspace)
    start, end = _period(from_, to)
    with progress() as listener, listening(listener) if listener else nullcontext():
        chain = trail.verify()
        events = trail.events()
        faults = verify_workspace(workspace, chain, events)
    drifts = measure(events, start, end)
    facts = facts_of(events, start, end, chain.head, [(f.what, f.where, f.why) for f in faults], drifts)
    path = out or Path(f"audit-{from_}-{to}.html")
    write_bytes(path, page(facts).encode())
    rows = [(what, count) for what, count in facts.counts.items()]
    show_table({"report": str(path), **facts.counts}, json_, f"{from_} to {to}", ("what", "count"), rows)
    if not json_:
        say(f"report  {path}")


@audit.command(name="anchor")
def audit_anchor(
    *,
    to: Annotated[
        Path | None, Parameter(help="file to add the head to; keep it where the workspace's owner cannot write")
    ] = None,
    command: Annotated[
        str | None, Parameter(help="program and words, {head} and {events} filled in; no shell reads them")
    ] = None,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """Keep the head of the log elsewhere: `verify --anchors FILE` then finds a log that was cut off or replaced."""
    from pipelines.trail import anchor_by_command, anchor_to_file

    if to is None and not command:
        raise ConfigError("Name a file (--to FILE) or a program (--command 'curl ... {head}').")
    chain = _trail(workspace).verify()
    if to is not None:
        anchor_to_file(chain, to)
    if command:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigError(f"--command {command}: {error}. Close the quotation.") from error
        anchor_by_command(chain, words)
    show_table(
        {"events": chain.events, "head": chain.head},
        json_,
        "Anchored",
        ("events", "head"),
        [(chain.events, chain.head)],
    )


@audit.command(name="keygen")
def audit_keygen(
    file: Annotated[Path, Parameter(help="where the private key goes; the public half goes to FILE.pub")],
    *,
    json_: Json = False,
) -> None:
    """Make an Ed25519 key to sign events with: name its file in MEDTL_AUDIT_KEY, and keep it out of the workspace."""
    from medtl.audit import make_key

    fingerprint = make_key(file)
    value = {"private": str(file), "public": f"{file}.pub", "fingerprint": fingerprint}
    show_table(value, json_, "A new key", ("private", "public", "fingerprint"), [tuple(value.values())])


@audit.command(name="discard")
def audit_discard(
    folder: Annotated[Path, Parameter(help="a result: WORKSPACE/artifacts/KIND/NAME")],
    *,
    by: By,
    role: Role,
    reason: Reason,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """Delete a result, and enter who did it and why; a release must be retired first."""
    from medtl.artifacts import verify
    from medtl.registry.history import Word
    from medtl.registry.io import Register
    from pipelines.upkeep import delete_entered

    root, path, word = workspace.absolute(), folder.absolute(), Word(by, role, reason)
    if not (path / "manifest.json").is_file() or path.parent.parent != root / "artifacts":
        raise ConfigError(f"'{folder}' is not a result of '{workspace}': name WORKSPACE/artifacts/KIND/NAME.")
    inside = path.relative_to(root).as_posix()
    serving = [
        e.release.release_id
        for e in Register(workspace).entries()
        if e.artifact == inside and e.release.status != "retired"
    ]
    if serving:
        raise MedtlError(f"'{folder}' holds release {serving[0]}. Retire it first: medtl registry retire {serving[0]}")
    try:
        digest = verify(path)
    except TamperedError:
        digest = "altered"
    delete_entered(_trail(workspace.absolute()), path, digest, "result.discarded", word)
    show_table({"discarded": inside}, json_, "Discarded", ("result",), [(inside,)])


@audit.command(name="sweep")
def audit_sweep(
    *,
    unused: Annotated[float, Parameter(help="days in which nothing wanted it")] = 30.0,
    delete: Annotated[bool, Parameter(help="delete it; without, it is only listed", negative="")] = False,
    by: By | None = None,
    role: Role | None = None,
    reason: Reason | None = None,
    workspace: Workspace = _DEFAULT,
    json_: Json = False,
) -> None:
    """List what takes room and was not wanted for a month; --delete --by --role --reason deletes it, each entered.

    Only copies of pixels, which are made again when something wants them as long as the scans' files are there (packed
    images, and decoded pixels that no scans used since rest on), and training that nobody went on with. Evidence stays:
    scans, cohorts, splits, checkpoints, predictions, evaluations, releases, reports. What is not as the trail says
    stays too, and exits with 1. Nothing is deleted while a command is at work in the workspace.
    """
    from medtl.registry.history import Word
    from pipelines import upkeep

    _trail(workspace)
    words = [word for word in (by, role, reason) if word is not None]
    if delete and len(words) < 3:
        raise ConfigError("--delete takes --by, --role and --reason: who asks later must find them on the audit trail.")
    if delete:
        with progress() as listener, listening(listener) if listener else nullcontext():
            found, altered = upkeep.sweep(workspace, unused, Word(*words))
    else:
        found, altered = upkeep.unused(workspace, unused), []
    megabytes = sum(one.megabytes for one in found)
    title = f"{'Deleted, not' if delete else 'Not'} wanted for {unused:g} days: {len(found)}, {megabytes:,.1f} MB"
    told: dict[str, Any] = {
        "deleted": delete,
        "megabytes": round(megabytes, 1),
        "found": [asdict(one) for one in found],
    }
    rows = [(one.folder, f"{one.megabytes:,.1f}", one.since) for one in found]
    if rows or json_:
        told["altered"] = [one.folder for one in altered]
        show_table(told, json_, title, ("result", "MB", "not wanted since"), rows)
    else:
        say(f"Nothing that is made again when it is wanted lay unused for {unused:g} days.")
    if altered:
        raise TamperedError(
            f"{len(altered)} results were left because they are not what the trail says was made there; the first: "
            f"{altered[0].folder}. See what `medtl audit verify` says of them."
        )


def _trail(workspace: Path) -> AuditLog:
    from medtl.audit import AuditLog

    trail = AuditLog(workspace)
    if not trail.path.exists() and not trail.head_path.exists():
        raise MedtlError(f"There is no audit log in '{workspace}'. Name the run's workspace: --workspace FOLDER")
    return trail


def _moment(text: str) -> date | datetime:
    try:
        found = date.fromisoformat(text) if len(text) == 10 else datetime.fromisoformat(text)
        if not 2000 <= found.year < 9999:
            raise ValueError
        return found
    except ValueError as error:
        raise ConfigError(f"'{text}' is no day and no moment: write 2026-01-31 or 2026-01-31T14:30.") from error


def _period(from_: str | None, to: str | None) -> tuple[datetime, datetime]:
    """Read two days as the moments between which events count."""
    first = _moment(from_) if from_ else date(2000, 1, 1)
    last = _moment(to) if to else date(9998, 1, 1)
    if isinstance(first, datetime) or isinstance(last, datetime):
        raise ConfigError("--from and --to are days: 2026-01-31.")
    if last < first:
        raise ConfigError(f"--to {to} is before --from {from_}.")
    start = datetime(first.year, first.month, first.day, tzinfo=UTC)
    return start, datetime(last.year, last.month, last.day, tzinfo=UTC) + timedelta(days=1)


def _who(word: Any) -> str:
    return f"{word['by']}, {word['role']}: {word['reason']} ({word['time']})" if word.get("by") else "-"


def _gate(service: Service) -> str:
    return "; ".join(f"{one['condition']}: {one['observed']}" for one in service.evidence["gate"]) or "-"
