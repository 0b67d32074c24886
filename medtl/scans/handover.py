"""A folder of scans without the patients' identities, for somebody else.

What cannot be understood completely does not leave, nor what may have a patient's name burned into its picture, unless
the policy accepts it. The outputs are named by pseudonyms; ``refused.csv`` beside them says what stayed behind, and
why, and ``handover.json`` what was done. Raw identifiers are in one place only: the key table, where one is asked for.

The output folder belongs to one source and one key. A call that was cut off, or one with other options, is simply made
again: every file is written anew (the same bytes for the same file, each under a temporary name first), and what an
earlier call wrote for a file that is now refused or gone is removed. Nothing is skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medtl.artifacts import write_json
from medtl.config import ScansConfig
from medtl.errors import ConfigError, ScanError, StorageError
from medtl.progress import advance
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Exclusion
from medtl.scans import io
from medtl.scans.checks import action_of
from medtl.scans.faults import faults_refused
from medtl.scans.profile import Rules
from medtl.scans.sources import SourceFile, list_files, survey

RECORD = "handover.json"
FORMAT = 1
_BATCH = 32  # files that a thread takes at a time


@dataclass(frozen=True, slots=True)
class Handover:
    """What left, and what stayed; ``files`` counts the members of archives, not the archives."""

    files: int
    written: int
    refused: tuple[Exclusion, ...]
    removed: int = 0  # outputs of an earlier call that this one would not give away


def hand_over(
    source: Path, out: Path, config: ScansConfig, names: Pseudonymiser, key_table: Path | None = None
) -> Handover:
    """De-identify every DICOM and NIfTI file below ``source`` into ``out``.

    Args:
        source: folder, zip archive, DICOMDIR, or one file; archives inside a folder are read, too.
        out: a new or empty folder, or one that an earlier call for the same source and key has written.
        key_table: a new CSV file for (kind, raw, pseudonym); it must lie outside ``out``.

    Raises:
        ConfigError: the key table would lie among what is given away, the output inside the source, or among files that
            are not its own.
        StorageError: the source holds nothing, the key table exists, or an output cannot be written.
    """
    _check_places(source, out, key_table)
    rules = Rules(**config.deidentify.model_dump())
    files = list_files(source, config)
    if not files:
        raise StorageError(f"'{source}' holds no files.")
    io.prepare_folder(out)
    with io.alone_in(out):
        record = _record(source, names, rules)
        _check_owner(out, record)
        write_json(out / RECORD, record | {"finished": False})
        done = _write_all(files, out, config, names, rules, key_table)
        counts = {"files": done.files, "written": done.written}
        refused = dict(Counter(one.code for one in done.refused))
        write_json(out / RECORD, record | counts | {"refused": refused, "finished": True})
    return done


def _check_places(source: Path, out: Path, key_table: Path | None) -> None:
    if key_table is not None and key_table.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"'{key_table}' lies inside '{out}': the key would be given away. Name a file elsewhere.")
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"'{out}' lies inside '{source}': it would be read the next time. Name a folder elsewhere.")
    if source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"'{source}' lies inside '{out}': it would be given away. Name a folder elsewhere.")
    if not source.exists():
        raise StorageError(f"'{source}' does not exist. Name a folder of scans, an archive, or one file.")
    if key_table is not None and key_table.exists():
        raise StorageError(f"'{key_table}' exists. Name a new file for the key table.")
    if key_table is not None and not key_table.parent.is_dir():
        raise StorageError(f"'{key_table.parent}' is no folder. Make it, or name a key table elsewhere.")


def _record(source: Path, names: Pseudonymiser, rules: Rules) -> dict[str, Any]:
    """Say what is done, without a name: the source is a pseudonym, the key a fingerprint."""
    return {
        "format": FORMAT,
        "source": names.name("source", str(source.resolve())),
        "key": names.fingerprint,
        "options": [f"{code} {meaning}" for code, meaning in rules.codes],
    }


def _check_owner(out: Path, record: dict[str, Any]) -> None:
    """Refuse a folder that holds anything that an earlier call for this source and key has not written.

    Raises:
        ConfigError: names the folder.
    """
    held = io.handover_record(out / RECORD)
    if held is None:
        if any(out.iterdir()):
            raise ConfigError(f"'{out}' holds other files, which would be given away, too. Name an empty folder.")
    elif (held.get("source"), held.get("key")) != (record["source"], record["key"]):
        what = "source" if held.get("key") == record["key"] else "key"
        raise ConfigError(f"'{out}' holds what was made with another {what}. Name an empty folder.")


def _write_all(
    files: Sequence[SourceFile],
    out: Path,
    config: ScansConfig,
    names: Pseudonymiser,
    rules: Rules,
    key_table: Path | None,
) -> Handover:
    earlier = io.released_files(out)
    pairs: set[tuple[str, str, str]] = set()
    refused: list[Exclusion] = []
    number = written = 0

    def batch(some: Sequence[SourceFile]) -> list[tuple[SourceFile, io.Released | ScanError]]:
        return [one for file in some for one in _release(file, out, config, names, rules)]

    pool = ThreadPoolExecutor(config.workers)
    try:
        for done in pool.map(batch, [files[at : at + _BATCH] for at in range(0, len(files), _BATCH)]):
            for file, result in done:
                number += 1
                if isinstance(result, ScanError):
                    action = action_of(result.code, config.checks.policy)
                    item = names.file(file.relative)
                    refused.append(Exclusion(item, "scans", result.code, result.reason, 1, action))
                    continue
                written += 1
                earlier.discard(result.output)
                if key_table is not None:
                    pairs.update(result.pairs)
            advance("de-identifying", min(number, len(files)), len(files))
    finally:
        pool.shutdown(cancel_futures=True)
    io.remove_released(out, earlier)
    if key_table is not None:
        io.write_key_table(key_table, pairs)
    io.write_conversion(out, refused)
    return Handover(number, written, tuple(refused), len(earlier))


def _release(
    file: SourceFile, out: Path, config: ScansConfig, names: Pseudonymiser, rules: Rules
) -> Iterator[tuple[SourceFile, io.Released | ScanError]]:
    """De-identify one file, or every member of an archive; give what became of each."""
    try:
        if file.refusal is not None:
            raise file.refusal
        with faults_refused():
            released = io.deidentify_file(file, out, names, rules, config)
    except ScanError as error:
        yield file, error
        return
    if released is not None:
        yield file, released
        return
    for member in _members(file, config):
        if member.member is None:  # the archive itself: it cannot be read, or holds arrays
            reason = "neither DICOM nor NIfTI: nothing is known of where it names a patient"
            yield member, member.refusal or ScanError("not_an_image", reason)
        else:
            yield from _release(member, out, config, names, rules)


def _members(file: SourceFile, config: ScansConfig) -> Iterator[SourceFile]:
    """List what a zip archive holds, under names below the source; of two members of one name neither is taken."""
    folder = PurePosixPath(file.relative).parent
    seen: set[str] = set()
    for member in survey(file.path, config.model_copy(update={"stable_seconds": 0.0})):
        if member.relative in seen:
            twice = ScanError("archive_damaged", "two members of an archive have one name")
            member = replace(member, refusal=twice)
        seen.add(member.relative)
        yield replace(member, relative=str(folder / member.relative))
