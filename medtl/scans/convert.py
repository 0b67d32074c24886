"""A folder of files becomes validated NIfTI files, without a workspace: the same checks, nothing remembered.

Two threads each take a series: its pixels are read into the volume in memory, checked there, and written once. Outputs
are named by pseudonyms; what was left out stands in ``refused.csv`` with its reason.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtl.config import ScansConfig
from medtl.errors import ConfigError, ScanError, StorageError
from medtl.progress import advance
from medtl.pseudonyms import Pseudonymiser
from medtl.records import AnyArray, Exclusion
from medtl.scans import io
from medtl.scans.checks import action_of, check_policy
from medtl.scans.faults import faults_refused
from medtl.scans.frames import UNCOMPRESSED, stored_type
from medtl.scans.headers import Header
from medtl.scans.intake import judge_with_pixels
from medtl.scans.series import REFUSED, Member, Verdict
from medtl.scans.sources import SourceFile, list_files, unpack

_COPY = ScanError("duplicate_file", "the same bytes as another file of its series")


@dataclass(frozen=True, slots=True)
class Converted:
    """One file that was written, and where it came from."""

    output: str
    item: str  # pseudonym of its series, or of its one file
    files: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of a folder."""

    files: int
    volumes: tuple[Converted, ...]
    refused: tuple[Exclusion, ...]


def convert(source: Path, out: Path, config: ScansConfig, names: Pseudonymiser, gzip: bool = False) -> Conversion:
    """Write every volume below ``source`` that passes all checks as NIfTI into ``out``.

    Args:
        out: a folder; made if missing. What an earlier call wrote of the same series is replaced or removed.
        gzip: write ``.nii.gz``.

    Raises:
        ConfigError: the output lies inside the source.
        StorageError: the source does not exist or holds nothing, or the outputs cannot be written.
    """
    check_policy(config.checks.policy)
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"'{out}' lies inside '{source}': it would be read the next time. Name a folder elsewhere.")
    if not source.exists():
        raise StorageError(f"'{source}' does not exist. Name a folder of scans, an archive, or one file.")
    config = config.model_copy(update={"read": "volumes"})
    files = list_files(source, config)
    if not files:
        raise StorageError(f"'{source}' holds no files.")
    io.prepare_folder(out)
    writer = _Writer(out, config, names, gzip)
    with writer.reader:
        return _converted(files, writer, config, names)


def _converted(files: Sequence[SourceFile], writer: _Writer, config: ScansConfig, names: Pseudonymiser) -> Conversion:
    members = list(writer.headers([file for file in files if file.refusal is None]))
    archives = [member.file for member in members if member.kind == "npz"]
    if archives:
        inside = [file for archive in archives for file in unpack(archive, config)]
        files = [*(file for file in files if file not in archives), *inside]
        members = [member for member in members if member.kind != "npz"]
        members += writer.headers([file for file in inside if file.refusal is None])
    refused = [_exclude(names.file(f.relative), f.refusal, config) for f in files if f.refusal is not None]
    bundles: dict[str, list[Member]] = defaultdict(list)
    for number, member in enumerate(members):
        series = member.header.series if member.header else None
        bundles[names.name("series", series) if series else f"#{number}"].append(member)
    written: list[Converted] = []
    with ThreadPoolExecutor(config.workers) as pool:
        for number, (volumes, left_out) in enumerate(pool.map(writer.series, bundles.items()), 1):
            written += volumes
            refused += left_out
            advance("converting series", number, len(bundles))
    io.remove_volumes(
        writer.out, {one.item for one in written} | {one.item for one in refused}, {one.output for one in written}
    )
    result = Conversion(len(files), tuple(written), tuple(refused))
    io.write_conversion(writer.out, result.refused)
    return result


class _Writer:
    """Converts series, several at a time; each thread reads into memory that it uses again."""

    def __init__(self, out: Path, config: ScansConfig, names: Pseudonymiser, gzip: bool) -> None:
        self.out, self._config, self._names, self._gzip = out, config, names, gzip
        self.reader = io.Reader(config, threads=1)
        self._memory = threading.local()

    def headers(self, files: Sequence[SourceFile]) -> Iterator[Member]:
        """Look at every file; at the first compressed one, start what decodes it."""
        started = False
        with ThreadPoolExecutor(self._config.workers) as pool:
            for number, member in enumerate(pool.map(io.look, files, chunksize=32), 1):
                if not started and member.header and member.header.transfer_syntax not in UNCOMPRESSED:
                    self.reader.start_decoders()
                    started = True
                if number % 64 == 0 or number == len(files):
                    advance("reading headers", number, len(files))
                yield member

    def series(self, bundle: tuple[str, list[Member]]) -> tuple[list[Converted], list[Exclusion]]:
        """Convert one series, or one file."""
        key, members = bundle
        written: list[Converted] = []
        members, copies = _once(members)
        refused = [_exclude(self._names.file(copy.relative), _COPY, self._config) for copy in copies]
        for number, verdict in enumerate(judge_with_pixels(members, self._config, lambda _: set(), self.reader)):
            own = [members[index] for index in verdict.members]
            item = key if not key.startswith("#") else self._names.file(own[0].file.relative)
            if verdict.action in REFUSED:
                worst = verdict.findings[0]
                refused.append(Exclusion(item, "scans", worst.code, worst.reason, len(own), verdict.action))
                continue
            try:
                with faults_refused():
                    written += self._convert(own, verdict, item, number)
            except ScanError as error:
                refused.append(_exclude(item, error, self._config, len(own)))
        return written, refused

    def _convert(self, own: list[Member], verdict: Verdict, item: str, number: int) -> Iterator[Converted]:
        unfinished = self.out / f".{item}-{number}.unfinished"
        try:
            for part, voxels in enumerate(self._volumes(own, verdict, unfinished)):
                name = f"{item}-{number}" + (f"-{part}" if part else "") + (".nii.gz" if self._gzip else ".nii")
                io.write_nifti(self.out / name, voxels, self._config.workers)
                spacing = np.linalg.norm(np.array(voxels.affine)[:3, :3], axis=0)
                columns, rows, slices = (round(float(mm), 6) for mm in spacing)
                depth, height, width = (int(n) for n in voxels.stored.shape)
                yield Converted(name, item, len(own), (depth, height, width), (columns, rows, slices), voxels.findings)
        finally:
            io.remove(unfinished)

    def _volumes(self, own: list[Member], verdict: Verdict, unfinished: Path) -> Iterator[io.Voxels]:
        if verdict.volume is not None:
            header = own[0].header
            assert header is not None
            size = int(np.prod(verdict.volume.shape)) * stored_type(header).itemsize
            packed = header.transfer_syntax not in UNCOMPRESSED
            io.remove(unfinished)  # of a run that was killed
            yield self.reader.volume(own, verdict, None if packed else self._room(size), unfinished)
            return
        for decoded in self.reader.decode(own, verdict):
            fields = decoded.fields
            if "affine" not in fields:
                raise ScanError("no_geometry", "an image without a place in space")
            yield io.Voxels(
                decoded.pixels, fields["affine"], fields["slope"], fields["intercept"], fields.get("findings", ())
            )

    def _room(self, size: int) -> AnyArray:
        """Give this thread's memory, larger if need be: fresh pages cost as much as reading them full."""
        held: AnyArray | None = getattr(self._memory, "bytes", None)
        if held is None or len(held) < size:
            if size > self._config.max_volume_mb * 1e6:
                return np.empty(0, np.uint8)  # refused before anything is read
            held = self._memory.bytes = np.empty(size, np.uint8)
        return held


def _once(members: list[Member]) -> tuple[list[Member], list[SourceFile]]:
    """Set files aside that are another one's bytes; only those whose headers are equal are read to the end."""
    if len({member.header and member.header.sop_instance for member in members}) == len(members):
        return members, []
    seen: dict[Header, set[str]] = {}
    alike = Counter(member.header for member in members)
    kept, copies = [], []
    for member in members:
        if member.header is not None and alike[member.header] > 1:
            digest = io.digest(member.file)
            if digest in seen.setdefault(member.header, set()):
                copies.append(member.file)
                continue
            seen[member.header].add(digest)
        kept.append(member)
    return kept, copies


def _exclude(item: str, error: ScanError, config: ScansConfig, files: int = 1) -> Exclusion:
    action = action_of(error.code, config.checks.policy)
    return Exclusion(item, "scans", error.code, error.reason, files, action if action in REFUSED else "quarantine")
