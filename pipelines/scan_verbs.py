"""The verbs that handle scans by themselves: convert, deidentify, listen, quarantine. They need no Prefect."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from medtl.config import Config, parse_config
from medtl.errors import ConfigError, MedtlError
from medtl.progress import listening
from pipelines.terminal import ConfigFile, Json, Sets, load, log_to_file, progress, show_table

log = logging.getLogger("medtl")
SCANS = Group("Scans by themselves", sort_key=4)
Source = Annotated[Path, Parameter(help="folder, zip archive, DICOMDIR or file; it is only read")]
Out = Annotated[Path, Parameter(help="folder for the results; made if missing")]
Optional = Annotated[Path | None, Parameter(name="--config", help="YAML file whose section 'scans' is used")]


def convert(
    source: Source,
    out: Out,
    *,
    gzip: Annotated[bool, Parameter(help="write .nii.gz", negative="")] = False,
    config: Optional = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Turn a folder of DICOM into NIfTI volumes that passed every check.

    Outputs are named by pseudonyms; refused.csv beside them says what was left out, why, and what to try. Nothing else
    is written, but the key of the pseudonyms on first use. Exit code 1 if not one volume came out.
    """
    from medtl.pseudonyms import load_pseudonymiser
    from medtl.scans.convert import convert as convert_folder

    settings = _settings(config, set_)
    names = load_pseudonymiser(settings.scans.key_file)
    with progress() as listener, listening(listener) if listener else nullcontext():
        done = convert_folder(source, out, settings.scans, names, gzip)
    refused = dict(Counter(one.code for one in done.refused))
    rows: list[tuple[Any, ...]] = [
        (one.output, " x ".join(map(str, one.shape)), " x ".join(f"{mm:g}" for mm in one.spacing_mm), one.files)
        for one in done.volumes
    ]
    summary = {
        "files": done.files,
        "volumes": [asdict(one) for one in done.volumes],
        "excluded": refused,
        "out": str(out),
    }
    show_table(summary, json_, f"Volumes in {out}", ("output", "slices x rows x columns", "mm", "files"), rows)
    if not json_:
        print(_told(refused, out / "refused.csv"))
    if not done.volumes:
        raise MedtlError(f"Not one volume came out of '{source}'. {out / 'refused.csv'} says why.")


def deidentify(
    source: Source,
    out: Out,
    *,
    key_table: Annotated[
        Path | None, Parameter(help="new CSV file: which raw identifier became which pseudonym (0600)")
    ] = None,
    config: Optional = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Copy DICOM and NIfTI files without the patients' identities (DICOM PS3.15 Annex E, Basic Profile).

    Pseudonyms, identifiers and date shifts come from the secret key: the same patient stays one patient. What is kept
    is set by scans.deidentify. A file that is not understood completely, or that may have text in its picture, is not
    copied; refused.csv says why. Nobody looks at the pixels themselves. OUT belongs to one source and one key: the same
    call again writes all of it anew, and removes what is no longer given away.
    """
    from medtl.pseudonyms import load_pseudonymiser
    from medtl.scans.handover import hand_over

    settings = _settings(config, set_)
    names = load_pseudonymiser(settings.scans.key_file)
    with progress() as listener, listening(listener) if listener else nullcontext():
        done = hand_over(source, out, settings.scans, names, key_table)
    refused = dict(Counter(one.code for one in done.refused))
    counts = {"files": done.files, "written": done.written, "removed": done.removed}
    show_table(
        {**counts, "excluded": refused, "out": str(out)}, json_, "De-identified", ("what", "count"), [*counts.items()]
    )
    if not json_:
        print(_told(refused, out / "refused.csv"))


def listen(config: ConfigFile, *, set_: Sets = None, json_: Json = False) -> None:
    """Receive scans over the network (DICOM C-STORE) until stopped (Ctrl-C); the run takes them with the next ingest.

    scans.pacs.listen in the config sets port, AE titles and limits. What is acknowledged is on the disk.
    """
    from medtl.artifacts import Store
    from medtl.audit import AuditLog
    from medtl.pseudonyms import load_pseudonymiser
    from medtl.scans.pacs.listen import listen as receive
    from medtl.scans.pacs.listen import stopped_by_signals
    from pipelines.steps import spool_folder

    settings = load(config, set_)
    pacs = settings.scans.pacs
    if pacs is None or pacs.listen is None:
        raise ConfigError("scans.pacs.listen is not set: say at least which AE titles may send (docs/pacs.md).")
    names = load_pseudonymiser(settings.scans.key_file)
    trail = AuditLog(Store(settings.workspace).workspace)
    log_to_file(settings.workspace)

    def opened(address: str, port: int) -> None:
        log.info("listening on %s, port %d", address, port)

    with stopped_by_signals() as stop, progress() as listener, listening(listener) if listener else nullcontext():
        received = receive(pacs.listen, names, spool_folder(settings).parent, stop, opened)
    details = {"stored": received.stored, "known": received.known, "refused": dict(received.refused)}
    trail.append("scans.received", settings.name, details=details)
    summary = {"stored": received.stored, "known": received.known, "refused": dict(received.refused)}
    rows = [("stored", received.stored), ("came again", received.known)]
    rows += [(f"refused: {code}", count) for code, count in received.refused.items()]
    show_table(summary, json_, "Received", ("what", "objects"), rows)


quarantine = App(name="quarantine", help="What ingest refused: list, show, readmit.", group=SCANS)
Item = Annotated[str, Parameter(help="pseudonym or content, as `medtl quarantine list` shows it")]


@quarantine.command(name="list")
def quarantine_list(config: ConfigFile, *, set_: Sets = None, json_: Json = False) -> None:
    """List what was refused, with the names of its files (on your terminal only).

    Ingests first, where that is not done.
    """
    from pipelines import look

    title, columns, rows = look.refused(load(config, set_))
    show_table([dict(zip(columns, row, strict=True)) for row in rows], json_, title, columns, rows)


@quarantine.command(name="show")
def quarantine_show(config: ConfigFile, item: Item, *, set_: Sets = None, json_: Json = False) -> None:
    """Show one refused item: what is wrong, what to try, and which files it is."""
    from pipelines import look

    title, columns, rows = look.refused_item(load(config, set_), item)
    show_table(dict(rows), json_, title, columns, rows)


@quarantine.command(name="readmit")
def quarantine_readmit(
    config: ConfigFile,
    item: Item,
    *,
    why: Annotated[str, Parameter(help="for whoever asks later; it stands in the audit log")],
    set_: Sets = None,
) -> None:
    """Take an item although a check refused it: for these bytes and this reason only.

    Only where the check judges (burned-in text, a localiser); nobody's word makes a damaged series whole. The next
    ingest takes it.
    """
    from pipelines import look

    print(look.readmit(load(config, set_), item, why))


def _settings(path: Path | None, overrides: list[str] | None) -> Config:
    if path is not None:
        return load(path, overrides)
    return parse_config({"name": "scans"}, overrides=overrides or ())


def _told(refused: dict[str, int], table: Path) -> str:
    if not refused:
        return "nothing was left out"
    codes = ", ".join(f"{code} {count}" for code, count in sorted(refused.items()))
    return f"left out: {codes} (reasons in {table})"
