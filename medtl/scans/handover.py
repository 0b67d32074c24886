"""A folder of scans without the patients' identities, for somebody else.

What cannot be understood completely does not leave. The outputs are named by pseudonyms, and ``refused.csv`` beside
them says what stayed behind, and why. Raw identifiers are in one place only: the key table, where one is asked for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from medtl.config import ScansConfig
from medtl.errors import ConfigError, ScanError
from medtl.progress import advance
from medtl.pseudonyms import Pseudonymiser
from medtl.records import Exclusion
from medtl.scans import io
from medtl.scans.checks import action_of
from medtl.scans.profile import Rules
from medtl.scans.sources import SourceFile, list_files


@dataclass(frozen=True, slots=True)
class Handover:
    """What left, and what stayed."""

    files: int
    written: int
    refused: tuple[Exclusion, ...]


def hand_over(
    source: Path, out: Path, config: ScansConfig, names: Pseudonymiser, key_table: Path | None = None
) -> Handover:
    """De-identify every DICOM and NIfTI file below ``source`` into ``out``.

    Args:
        key_table: a new CSV file for (kind, raw, pseudonym); it must lie outside ``out``.

    Raises:
        ConfigError: the key table would lie among what is given away, or the output inside the source.
        StorageError: the source holds nothing, or an output cannot be written.
    """
    if key_table is not None and key_table.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"'{key_table}' lies inside '{out}': the key would be given away. Name a file elsewhere.")
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"'{out}' lies inside '{source}': it would be read the next time. Name a folder elsewhere.")
    rules = Rules(**config.deidentify.model_dump())
    files = list_files(source, config)
    io.prepare_folder(out)
    pairs: set[tuple[str, str, str]] = set()
    refused: list[Exclusion] = []

    def one(file: SourceFile) -> ScanError | None:
        try:
            if file.refusal is not None:
                return file.refusal
            found = io.deidentify_file(file, out, names, rules)
        except ScanError as error:
            return error
        if key_table is not None:
            pairs.update(found)
        return None

    with ThreadPoolExecutor(config.workers) as pool:
        for number, (file, error) in enumerate(zip(files, pool.map(one, files), strict=True), 1):
            if error is not None:
                action = action_of(error.code, config.checks.policy)
                refused.append(Exclusion(names.file(file.relative), "scans", error.code, error.reason, 1, action))
            advance("de-identifying", number, len(files))
    if key_table is not None:
        io.write_key_table(key_table, pairs)
    io.write_conversion(out, refused)
    return Handover(len(files), len(files) - len(refused), tuple(refused))
