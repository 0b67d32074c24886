"""What happened goes on the audit trail, and the trail is held against what is there.

A run is entered when it begins and when it ends, whatever way it ends; a run without an end was killed. Every result is
entered by the store that holds it (:class:`medtl.audit.AuditedStore`), every release by the register.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, cast

from medtl.artifacts import MANIFEST, Store, digest_of, file_digest, storage_errors, verify
from medtl.audit import GONE, AuditLog, Chain
from medtl.config import AuditConfig, Config
from medtl.errors import MedtlError, StorageError
from medtl.progress import advance

log = logging.getLogger("medtl")
NOT_EVIDENCE = ("cache", "index", "locks", "logs", "prefect", "unfinished")  # folders that prove nothing
_LONGEST = 2000  # characters of an error on the trail
_LISTED = ("registry", "runs", "reports")  # folders whose every file is on the trail
P = ParamSpec("P")
Flow = Callable[Concatenate[Config, P], Coroutine[Any, Any, dict[str, Any]]]


def recorded(run: Flow[P]) -> Flow[P]:
    """Enter a flow's beginning and end on the trail of its workspace."""

    @functools.wraps(run)
    async def entered(config: Config, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        trail, verb = AuditLog(config.workspace), run.__name__
        run_id = f"run-{uuid.uuid4().hex[:12]}"
        said = {"verb": verb, "name": config.name, "config": _config_digest(config), "process": os.getpid()}
        trail.append("run.started", run_id, details=said)
        try:
            with Store(config.workspace).at_work():
                summary = await run(config, *args, **kwargs)
        except BaseException as error:  # also a signal: whatever ends it is entered, then goes on its way
            # our own messages never hold a patient; anybody else's may
            why = str(error)[:_LONGEST] if isinstance(error, MedtlError) else ""
            details = {**said, "error": type(error).__name__, "why": why}
            trail.append("run.failed", run_id, "failed", details)
            anchor(trail, config.audit)
            raise
        results: dict[str, Any] = {k: summary[k] for k in ("release", "status", "reused", "seconds") if k in summary}
        trail.append("run.finished", run_id, details={**said, **results})
        anchor(trail, config.audit)
        return summary

    return cast("Flow[P]", entered)


def unchanged(config: Config, summary: Mapping[str, Any]) -> None:
    """Enter a run that had nothing to do."""
    details = {"name": config.name, "config": _config_digest(config), "release": summary["release"]}
    trail = AuditLog(config.workspace)
    trail.finish_files()
    trail.append("run.unchanged", f"run-{uuid.uuid4().hex[:12]}", details=details)
    anchor(trail, config.audit)


def _config_digest(config: Config) -> str:
    return digest_of(config.model_dump(mode="json", exclude={"workspace": True, "scans": {"source", "key_file"}}))


# ------------------------------------------------------------------------------------------------------ anchoring


def anchor(trail: AuditLog, config: AuditConfig) -> str | None:
    """Keep the head of the trail where the config says; a place out of reach is entered, and ends no run."""
    if config.anchor_file is None and not config.anchor_command:
        return None
    chain = trail.verify()
    try:
        if config.anchor_file is not None:
            anchor_to_file(chain, config.anchor_file)
        if config.anchor_command:
            anchor_by_command(chain, config.anchor_command)
    except MedtlError as error:
        log.warning("the head of the audit trail was not anchored: %s", error)
        trail.append("trail.not_anchored", chain.head, "failed", {"why": str(error)})
    return chain.head


def anchor_to_file(chain: Chain, path: Path) -> None:
    """Add the head to a file that lies somewhere else, one line each.

    Raises:
        StorageError: it cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write(f"{chain.events} {chain.head}\n")
            stream.flush()
            os.fsync(stream.fileno())


def anchor_by_command(chain: Chain, command: Sequence[str]) -> None:
    """Give the head to a command, in place of ``{head}`` and ``{events}`` in its words.

    Raises:
        StorageError: it cannot be run, takes over a minute, or fails.
    """
    words = [word.replace("{head}", chain.head).replace("{events}", str(chain.events)) for word in command]
    try:
        # the words are the config's own, and no shell reads them
        done = subprocess.run(  # noqa: S603
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StorageError(f"audit.anchor_command: {words[0]} did not run ({type(error).__name__}).") from error
    if done.returncode:
        raise StorageError(f"audit.anchor_command: {words[0]} ended with {done.returncode}. Run it by hand to see why.")


def anchored(path: Path) -> list[str]:
    """Read the heads that were anchored in a file.

    Raises:
        StorageError: it cannot be read, or a line of it is no head.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read. Name the file that heads were anchored in.") from error
    heads = [line.split()[-1] for line in lines if line.strip()]
    wrong = next((number for number, head in enumerate(heads, 1) if len(head) != 64), None)
    if wrong is not None:
        raise StorageError(f"{path}: line {wrong} is not a head of an audit trail.")
    return heads


# ------------------------------------------------------------------------------------------------------ verifying


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as the trail says."""

    what: str  # altered, missing, unknown, or unfinished
    where: str  # relative to the workspace
    why: str


def verify_workspace(workspace: Path, chain: Chain, events: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """Hold every result, release and report of a workspace against its verified trail; name all that differs."""
    root = workspace.absolute()
    faults = _end_faults(chain)
    entered, deleted = _entered(events)
    there = {path.relative_to(root).as_posix() for path in (root / "artifacts").glob("*/[!.]*") if path.is_dir()}
    names = sorted(entered.keys() | there)
    for done, folder in enumerate(names, 1):
        faults += _result_faults(root, folder, entered.get(folder), deleted.get(folder))
        advance("verifying results", done, len(names))
    found = faults + list(_file_faults(root, events)) + list(_torn_faults(root, events))
    if any(fault.what == "unknown" for fault in found):
        return _without_the_latest(root, found)
    return found


def _without_the_latest(root: Path, faults: Sequence[Fault]) -> list[Fault]:
    """Look again for entries of what was unknown: a run beside this one may have entered it meanwhile."""
    time.sleep(1.0)
    events = AuditLog(root).events()
    folders, files = _entered(events)[0], {name for event in events for name in _files_of(event)}
    return [f for f in faults if f.what != "unknown" or (f.where not in folders and f.where not in files)]


def _torn_faults(root: Path, events: Sequence[Mapping[str, Any]]) -> Iterator[Fault]:
    """Hold the pieces of lines that crashes left against what was said of them."""
    said = {event["subject"] for event in events if event["action"] == "log.recovered"}
    for path in sorted(root.glob("audit.torn-*")):
        if file_digest(path) not in said:
            yield Fault("unknown", path.name, "nobody said of this piece that it was set aside")


def _end_faults(chain: Chain) -> list[Fault]:
    faults = []
    if chain.torn:
        faults.append(Fault("unfinished", "audit.jsonl", f"{chain.torn} bytes of a line that a crash, or a hand, left"))
    if chain.ahead:
        faults.append(Fault("unfinished", "audit.head", f"{chain.ahead} events came after it was written"))
    return faults


_Entries = dict[str, Mapping[str, Any]]


def _entered(events: Sequence[Mapping[str, Any]]) -> tuple[_Entries, _Entries]:
    """Give the last entry of every result by its folder: of those that were made, and of those deleted since."""
    made: _Entries = {}
    deleted: _Entries = {}
    for event in events:
        folder = event["details"].get("folder")
        if folder and event["action"].endswith(".made"):
            made[folder] = event
            deleted.pop(folder, None)
        elif folder and event["action"] in GONE:
            made.pop(folder, None)
            deleted[folder] = event
    return made, deleted


def _result_faults(
    root: Path, folder: str, event: Mapping[str, Any] | None, deleted: Mapping[str, Any] | None
) -> list[Fault]:
    path = root / folder
    if event is None and deleted is not None and _is(path, deleted["subject"]):
        why = f"it was about to be deleted at {deleted['time']}: sweep, or discard it, again"
        return [Fault("unfinished", folder, why)]
    if event is None:
        return [Fault("unknown", folder, "nobody entered it on the trail")]
    if not path.is_dir():
        return [Fault("missing", folder, f"it was made at {event['time']} and nobody entered that it was deleted")]
    try:
        digest = verify(path)
    except MedtlError as error:
        return [Fault("altered", folder, str(error))]
    if digest != event["subject"] or file_digest(path / MANIFEST) != event["details"]["manifest"]:
        return [Fault("altered", folder, "its bytes agree with one another, and not with the trail")]
    return []


def _is(folder: Path, digest: str) -> bool:
    """Tell whether a result is whole and has this digest."""
    try:
        return verify(folder) == digest
    except MedtlError:
        return False


def _file_faults(root: Path, events: Sequence[Mapping[str, Any]]) -> Iterator[Fault]:
    """Hold single files that the trail names by their sha256 against it: register, pages, runs, table of quarantine."""
    last: dict[str, tuple[str, str]] = {}
    ahead: dict[str, tuple[str, str]] = {}
    for event in events:
        for name, sha256 in _files_of(event).items():
            last[name] = sha256, event["time"]
            ahead.pop(name, None)
        ahead |= {name: (sha256, event["time"]) for name, sha256 in _files_of(event, "ahead").items()}
    for name in sorted(last.keys() | ahead.keys()):
        path, (said, when), (begun, begun_at) = root / name, last.get(name, ("", "")), ahead.get(name, ("", ""))
        there = file_digest(path) if path.is_file() else ""
        if there == said:  # also where neither was: it was begun, and a crash came before it was written
            continue
        if there == begun:
            yield Fault("unfinished", name, f"it is what was begun at {begun_at}; the next run enters it")
        elif not there:
            yield Fault("missing", name, f"it was written at {when}")
        else:
            yield Fault("altered", name, f"it is not what was written at {when or begun_at}")
    for folder in _LISTED:
        for path in sorted((root / folder).glob("*")):
            name = path.relative_to(root).as_posix()
            if name not in last and not path.name.startswith("."):  # half written by what was killed
                yield Fault("unknown", name, "nobody entered it on the trail")


def _files_of(event: Mapping[str, Any], how: str = "files") -> Mapping[str, str]:
    """Give the files that an event names by their sha256: those that are there, or were about to be (``ahead``)."""
    files = event["details"].get(how)
    return files if isinstance(files, dict) else {}
