"""What was refused, as a table, and a person's word that takes one item back.

The table lies beside the results: ``quarantine/reasons.csv``, one row per item, under pseudonyms. Nothing is moved or
copied: the files stay where they are. A readmission names the content (a digest of the files' bytes) and the code: it
holds for these bytes and this reason only, and a file that was damaged cannot be talked into being whole.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medtl.artifacts import digest_of, read_record
from medtl.errors import ConfigError
from medtl.records import Exclusion
from medtl.scans.checks import CODES

FOLDER, TABLE, READMITTED = "quarantine", "reasons.csv", "readmitted.json"
COLUMNS = ("item", "code", "action", "files", "reason", "what_to_try", "content")


@dataclass(frozen=True, slots=True)
class Readmission:
    """A person's word that what a check refused is to be taken."""

    content: str  # digest of the refused files' bytes
    code: str
    members: tuple[str, ...]  # sha256 of each file
    why: str


def content_of(members: Iterable[str]) -> str:
    """Name a set of files by their bytes."""
    return digest_of(sorted(members))[:32]


def reasons_table(exclusions: Iterable[Exclusion]) -> bytes:
    """Give the table of refusals as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in exclusions:
        advice = CODES[one.code].what_to_try if one.code in CODES else ""
        writer.writerow([one.item, one.code, one.action, one.files, one.reason, advice, one.content or ""])
    return text.getvalue().encode()


def readmissions(workspace: Path) -> tuple[Readmission, ...]:
    """Read what was taken back so far."""
    path = workspace / FOLDER / READMITTED
    if not path.is_file():
        return ()
    return read_record(path, tuple[Readmission, ...])


def find(exclusions: Sequence[Exclusion], item: str) -> Exclusion:
    """Find a refused item by its pseudonym or content digest; the beginning is enough where it says which.

    Raises:
        ConfigError: none, or several.
    """
    found = [one for one in exclusions if one.item == item or one.content == item]
    found = found or [one for one in exclusions if one.item.startswith(item) or (one.content or "").startswith(item)]
    if len({(one.item, one.content) for one in found}) == 1:
        return found[0]
    several = ", ".join(sorted({one.item for one in found})[:5])
    raise ConfigError(
        f"'{item}' names {'several items: ' + several if found else 'nothing'} in quarantine. "
        "List them: medtl quarantine list CONFIG"
    )


def readmit(
    words: Sequence[Readmission], one: Exclusion, members: tuple[str, ...], why: str
) -> tuple[Readmission, ...]:
    """Add a person's word that an item is taken although a check refused it.

    Args:
        words: what was taken back so far.
        members: sha256 of the item's files.
        why: a sentence for whoever asks later.

    Raises:
        ConfigError: its code cannot be accepted, or no reason is given.
    """
    code = CODES.get(one.code)
    if code is None or "accept" not in code.allowed or one.content is None:
        advice = f" {code.what_to_try}" if code is not None else ""
        raise ConfigError(f"'{one.item}' cannot be readmitted: nobody's word mends '{one.code}'.{advice}")
    if not why.strip():
        raise ConfigError("Say why, for whoever asks later: --why 'TEXT'")
    kept = tuple(word for word in words if (word.content, word.code) != (one.content, one.code))
    return (*kept, Readmission(one.content, one.code, members, why.strip()))
