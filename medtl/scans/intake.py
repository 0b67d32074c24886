"""The conductor of intake: which files belong together, what is known about them already, and what is read.

::

    survey ─▶ headers ─▶ series.judge ─▶ pixels ─▶ a segment of the pixel store ─▶ scans.json, exclusions.json

Files that belong together (a series; otherwise one file) are a *bundle* and are judged together; each volume or image
of it is a *unit*. A unit is known by its files' bytes, the settings and the judgement. While a bundle is there as it
was, its files are not opened again; a file that joins a series opens that series, and no other.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from itertools import compress, islice
from pathlib import Path, PurePosixPath

from medtl.artifacts import Store, code_digest, digest_of, read_record, write_record
from medtl.config import ScansConfig
from medtl.errors import ScanError, StorageError
from medtl.progress import advance
from medtl.pseudonyms import SEVERAL, Pseudonymiser
from medtl.records import AnyArray, Exclusion, Scan
from medtl.scans import io
from medtl.scans.checks import check_policy
from medtl.scans.faults import faults_refused
from medtl.scans.formats import Decoded
from medtl.scans.headers import describe
from medtl.scans.masks import SEGMENTATIONS, STRUCTURES, Grid
from medtl.scans.quarantine import Readmission, content_of
from medtl.scans.segments import (
    KIND,
    PixelStore,
    Refused,
    Taken,
    Unit,
    known_units,
    mark_used,
    pixel_digest,
    write_segment,
)
from medtl.scans.series import REFUSED, Member, Verdict, judge, refused
from medtl.scans.sources import SourceFile

log = logging.getLogger(__name__)
SCANS, EXCLUSIONS, ORIGINS, SIZES = "scans.json", "exclusions.json", "origins.json", "sizes.json"
_SEGMENT_BYTES, _SEGMENT_UNITS = 256_000_000, 2000
# Refusals that say nothing of the bytes: tried again each time.
_PASSING = frozenset({"changed", "unreadable", "program_fault"})
_NOT_SETTINGS = {"source", "key_file", "workers", "pacs", "stable_seconds", "max_archive_files", "max_archive_ratio"}


@dataclass(frozen=True, slots=True)
class _Job:
    """One unit to be made."""

    digest: str
    bundle: str
    key: str | None
    members: tuple[Member, ...]
    verdict: Verdict
    images: tuple[Scan, ...] = ()  # of a mask: the volumes of the series that it was drawn on

    @property
    def size(self) -> int:
        return sum(member.file.size for member in self.members)


def ingest(
    files: Sequence[SourceFile],
    config: ScansConfig,
    names: Pseudonymiser,
    folder: Path,
    store: Store,
    readmitted: Sequence[Readmission] = (),
) -> None:
    """Take every file once: pixels into the store's segments, ``scans.json`` and ``exclusions.json`` into ``folder``.

    A file or series that cannot be taken becomes an exclusion with a code and a reason; the others go on.

    Args:
        files: what :func:`~medtl.scans.sources.survey` found.
        readmitted: what a person took back from quarantine.
    """
    check_policy(config.checks.policy)
    with io.Reader(config) as reader:
        intake = _Intake(config, names, store, tuple(readmitted), reader)
        _write(files, intake.units(_by_bytes(files)), names, folder)


def restore(
    files: Sequence[SourceFile],
    config: ScansConfig,
    names: Pseudonymiser,
    folder: Path,
    store: Store,
    readmitted: Sequence[Readmission] = (),
) -> int:
    """Decode again what an earlier ingest of the same files took and the pixel store no longer holds.

    Args:
        folder: what that :func:`ingest` wrote.

    Returns:
        Of how many scans the pixels were gone.

    Raises:
        StorageError: the files give other pixels than they did.
    """
    scans, pixels = read_scans(folder), PixelStore(store.root / KIND)
    mark_used(store, pixels, scans)
    gone = [scan for scan in scans if scan not in pixels]
    if not gone:
        return 0
    log.warning("the pixels of %d scans are gone from the store: their files are read again", len(gone))
    with io.Reader(config) as reader:
        _Intake(config, names, store, tuple(readmitted), reader).units(_by_bytes(files))
    if without_pixels(folder, store.root / KIND):
        raise StorageError(
            "The pixels of a scan are gone from the store, and its file no longer gives them. If a file is being "
            "changed, run the same command again when it is done."
        )
    return len(gone)


def without_pixels(folder: Path, root: Path) -> list[Scan]:
    """Name the scans of an ingested folder whose pixels are not in the store (``root``: where its segments are)."""
    pixels = PixelStore(root)
    return [scan for scan in read_scans(folder) if scan not in pixels]


def libraries() -> dict[str, str | None]:
    """Give the versions of what reads files: another one may read what this one could not."""
    found: dict[str, str | None] = {}
    for name in ("pydicom", "pillow", "imagecodecs", "nibabel", "highdicom", "pylibjpeg", "pyjpegls"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def read_scans(folder: Path) -> tuple[Scan, ...]:
    """Read the scans of an ingested folder."""
    return read_record(folder / SCANS, tuple[Scan, ...])


def read_exclusions(folder: Path) -> tuple[Exclusion, ...]:
    """Read what was left out, and why."""
    return read_record(folder / EXCLUSIONS, tuple[Exclusion, ...])


def read_origins(folder: Path) -> dict[str, list[str]]:
    """Read which files (sha256) each scan, and each refused content, is made of."""
    return read_record(folder / ORIGINS, dict[str, list[str]])


def read_sizes(folder: Path) -> dict[str, int]:
    """Read how many bytes the files of each scan have together."""
    return read_record(folder / SIZES, dict[str, int])


class _Intake:
    """One ingest: its settings and the store that it adds to."""

    def __init__(
        self,
        config: ScansConfig,
        names: Pseudonymiser,
        store: Store,
        readmitted: tuple[Readmission, ...],
        reader: io.Reader,
    ) -> None:
        self._config, self._names, self._store, self._readmitted = config, names, store, readmitted
        self._reader = reader
        self._tries: Counter[str] = Counter()  # of each unit, in ingests before, that left nothing to use
        settings = config.model_dump(mode="json", exclude=_NOT_SETTINGS)
        self._settings = digest_of([settings, names.fingerprint, code_digest("scans"), libraries()])

    def units(self, first: Mapping[str, SourceFile]) -> list[Unit]:
        """Give the units of these files, from the store where it has them."""
        every, pixels = list(known_units(self._store)), PixelStore(self._store.root / KIND)
        useless = [_passed(unit) or not all(taken.scan in pixels for taken in unit.taken) for unit in every]
        failed = {unit.bundle for unit in compress(every, useless)}
        self._tries = Counter(unit.digest for unit in compress(every, useless))
        known = [unit for unit, no in zip(every, useless, strict=True) if not no]
        kept = self._standing((unit for unit in known if unit.bundle not in failed), first)
        covered = {sha for units in kept.values() for unit in units for sha in unit.members}
        members = self._headers([file for sha, file in first.items() if sha not in covered])
        reopened = {_key(member, self._names) for member in members} - {None}
        again = [b for b, units in kept.items() if units[0].key in reopened]
        opened = dict.fromkeys(sha for b in again for unit in kept.pop(b) for sha in unit.members)
        members += self._headers([first[sha] for sha in opened])
        by_digest = {unit.digest: unit for unit in known}
        drawn = [member for member in members if _is_mask(member)]
        jobs = [
            job
            for bundle in self._bundles([member for member in members if not _is_mask(member)])
            for job in self._jobs(bundle)
        ]
        done = [unit for units in kept.values() for unit in units]
        reused = [*done, *(by_digest[job.digest] for job in jobs if job.digest in by_digest)]
        mark_used(self._store, pixels, (taken.scan for unit in reused for taken in unit.taken))
        done += self._made(jobs, by_digest)
        return done + self._made([self._mask_job(member, done) for member in drawn], by_digest)

    def _made(self, jobs: Sequence[_Job], by_digest: Mapping[str, Unit]) -> list[Unit]:
        """Make units, a segment at a time."""
        total, seen = sum(len(job.members) for job in jobs), 0
        done: list[Unit] = []
        for batch in _batches(jobs):
            artifact = write_segment(
                self._store,
                tuple(self._written(job, job.digest in by_digest) for job in batch),
                partial(self._finished, batch, by_digest, seen, total),
            )
            done += read_record(artifact.path / "units.json", tuple[Unit, ...])
            seen += sum(len(job.members) for job in batch)
        return done

    def _written(self, job: _Job, known: bool) -> str:
        """Name a unit as its segment holds it: of one that is known already only the findings, no pixels."""
        return f"{job.digest}/{job.bundle}" + "+" * self._tries[job.digest] + "=" * known

    def _standing(self, known: Iterable[Unit], first: Mapping[str, SourceFile]) -> dict[str, list[Unit]]:
        """Give the bundles that are there as they were, of each series one."""
        bundles: dict[str, dict[str, Unit]] = defaultdict(dict)
        for unit in known:
            bundles[unit.bundle][unit.digest] = unit
        standing: dict[str, list[Unit]] = {}
        taken: set[str] = set()
        whole = {
            name: sorted({sha for unit in units.values() for sha in unit.members}) for name, units in bundles.items()
        }
        for name in sorted(bundles, key=lambda name: (-len(whole[name]), name)):
            members = whole[name]
            if not all(sha in first for sha in members) or not taken.isdisjoint(members):
                continue
            if self._bundle_digest(members) == name:
                standing[name] = list(bundles[name].values())
                taken.update(members)
        # two parts of one series, each there as it once was, belong together now
        series = Counter(units[0].key for units in standing.values())
        return {name: units for name, units in standing.items() if not units[0].key or series[units[0].key] == 1}

    def _bundle_digest(self, members: Iterable[str]) -> str:
        shas = sorted(members)
        inside = set(shas)
        words = [[one.content, one.code] for one in self._readmitted if inside.issuperset(one.members)]
        return digest_of([self._settings, shas, sorted(words)])[:32]

    def _headers(self, files: Sequence[SourceFile]) -> list[Member]:
        with ThreadPoolExecutor(self._config.workers) as pool:
            members = []
            for number, member in enumerate(pool.map(io.look, files), 1):
                members.append(member)
                advance("reading headers", number, len(files))
        return members

    def _bundles(self, members: Sequence[Member]) -> list[list[Member]]:
        together: dict[str, list[Member]] = defaultdict(list)
        for member in members:
            together[_key(member, self._names) or str(member.file.sha256)].append(member)
        # in the order of their bytes: what files are called must not show in the result
        return [sorted(files, key=lambda one: str(one.file.sha256)) for files in together.values()]

    def _jobs(self, members: list[Member]) -> Iterator[_Job]:
        shas = [str(member.file.sha256) for member in members]
        bundle, key = self._bundle_digest(shas), _key(members[0], self._names)
        words: dict[str, set[str]] = defaultdict(set)  # one item may have been taken back for several reasons
        for one in self._readmitted:
            words[one.content].add(one.code)

        def accepted(chosen: Sequence[int]) -> set[str]:
            return words.get(content_of(shas[index] for index in chosen), set())

        for verdict in judge_with_pixels(members, self._config, accepted, self._reader):
            own = [shas[index] for index in verdict.members]
            frames = verdict.volume.members if verdict.volume else None
            judged = [verdict.action, [[f.code, f.reason] for f in verdict.findings], frames]
            digest = digest_of([self._settings, own, judged, sorted(accepted(verdict.members))])[:32]
            yield _Job(digest, bundle, key, tuple(members[index] for index in verdict.members), verdict)

    def _mask_job(self, member: Member, units: Sequence[Unit]) -> _Job:
        """Judge a mask by the volumes that its series became; it is judged anew whenever they change."""
        sha = str(member.file.sha256)
        images: tuple[Scan, ...] = ()
        try:
            if member.damage is not None:
                raise member.damage
            with faults_refused():
                series, frames = self._reader.mask_source(member)
            key = self._names.name("series", series) if series else None
            own = {self._names.name("reference", frame) for frame in frames}
            found = [t.scan for unit in units if unit.key == key for t in unit.taken if key and t.scan.is_volume]
            fitting = (scan for scan in found if scan.frame is None or scan.frame in own)
            images = tuple(sorted(fitting, key=lambda scan: scan.scan_id))
            if not images:
                reason = (
                    "another frame of reference than its image's" if found else "its image is not among the volumes"
                )
                raise ScanError("mask_geometry" if found else "mask_without_image", reason)
            verdict = Verdict((0,), "accept", policy=self._config.checks.policy)
        except ScanError as error:
            verdict = refused((0,), error, self._config.checks.policy)
        lies_on = [[scan.scan_id, scan.pixel_digest, scan.affine] for scan in images]
        digest = digest_of([self._settings, sha, lies_on, [[f.code, f.reason] for f in verdict.findings]])[:32]
        return _Job(digest, f"mask-{digest}", None, (member,), verdict, images)

    def _masks(self, job: _Job) -> list[Decoded]:
        """Lay a mask on the first volume that it fits."""
        problem = ScanError("mask_without_image", "its image is not among the volumes")
        for image in job.images:
            assert image.affine is not None
            slices, rows, columns = image.shape
            try:
                grid = Grid((slices, rows, columns), image.affine)  # frames of reference were compared by their keys
                return self._reader.masks(job.members[0], job.verdict, grid, image.scan_id)
            except ScanError as error:
                problem = error
        raise problem

    def _finished(
        self, jobs: Sequence[_Job], known: Mapping[str, Unit], seen: int, total: int
    ) -> Iterator[tuple[Unit, list[AnyArray] | None]]:
        """Make the units in order: images in threads, volumes one at a time (they use the threads inside)."""
        with ThreadPoolExecutor(self._config.workers) as pool:
            todo = iter(jobs)
            while window := list(islice(todo, 8 * self._config.workers)):
                started = [
                    None if job.digest in known or job.verdict.volume else pool.submit(self._make, job)
                    for job in window
                ]
                for job, running in zip(window, started, strict=True):
                    if job.digest in known:
                        yield replace(known[job.digest], bundle=job.bundle, key=job.key), None
                    else:
                        yield running.result() if running is not None else self._make(job)
                    seen += len(job.members)
                    advance("reading scans", seen, total)

    def _make(self, job: _Job) -> tuple[Unit, list[AnyArray]]:
        shas = tuple(str(member.file.sha256) for member in job.members)
        unit = Unit(job.digest, job.bundle, job.key, shas, (), ())
        if job.verdict.action in REFUSED:
            worst = job.verdict.findings[0]
            return replace(unit, refused=(Refused(shas, worst.code, worst.reason, job.verdict.action),)), []
        try:
            with faults_refused():
                decoded = self._masks(job) if job.images else self._reader.decode(job.members, job.verdict)
                taken = [Taken(self._scan(job, index, len(decoded), one), shas) for index, one in enumerate(decoded)]
        except ScanError as error:
            action = refused((0,), error, self._config.checks.policy).action
            return replace(unit, refused=(Refused(shas, error.code, error.reason, action),)), []
        return replace(unit, taken=tuple(taken)), [one.pixels for one in decoded]

    def _scan(self, job: _Job, index: int, count: int, decoded: Decoded) -> Scan:
        content = str(job.members[0].file.sha256)
        if job.verdict.volume is not None:  # one file may hold several
            content = digest_of([[m.file.sha256 for m in job.members], job.verdict.volume.members])
        described = describe(job.members[0].header, self._names) if job.members[0].header else {"keys": ()}
        return Scan(
            scan_id=content[:32] if count == 1 else _row_id(content, index),
            shape=tuple(int(n) for n in decoded.pixels.shape),
            dtype=decoded.pixels.dtype.str,
            pixel_digest=pixel_digest(decoded.pixels),
            files=len(job.members),
            series=job.key,
            frame=self._frame(job.members[0]),
            **(described | decoded.fields),
        )

    def _frame(self, member: Member) -> str | None:
        frame = member.header.frame_of_reference if member.header else None
        return self._names.name("reference", frame) if frame else None


def names_of(files: Sequence[SourceFile], folder: Path) -> dict[str, list[str]]:
    """Tell which files a scan came from, by their bytes; for an archive, its part and row (``x.npz#test/12``).

    For the terminal and for a table that somebody must act on; the names are nowhere in the workspace.

    Args:
        folder: what :func:`ingest` wrote.
    """
    origins = read_origins(folder)
    by_sha: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if file.sha256 is not None:
            by_sha[file.sha256].append(file.relative)
    names, rows = {}, defaultdict[tuple[str, str | None], int](int)
    for scan in read_scans(folder):
        names[scan.scan_id] = [name for sha in origins[scan.scan_id] for name in by_sha.get(sha, ())]
        if scan.part is not None:
            row = rows[origins[scan.scan_id][0], scan.part]
            rows[origins[scan.scan_id][0], scan.part] += 1
            names[scan.scan_id] = [f"{name}#{scan.part}/{row}" for name in names[scan.scan_id]]
    return names


def files_of(files: Sequence[SourceFile], folder: Path) -> dict[str, tuple[SourceFile, ...]]:
    """Give the files that each scan was made of, by their bytes; what has changed since is not among them.

    Args:
        folder: what :func:`ingest` wrote.
    """
    first = _by_bytes(files)
    return {scan: tuple(first[sha] for sha in shas if sha in first) for scan, shas in read_origins(folder).items()}


def judge_with_pixels(
    members: Sequence[Member], config: ScansConfig, accepted: Callable[[Sequence[int]], set[str]], reader: io.Reader
) -> tuple[Verdict, ...]:
    """Judge files that belong together; where slices share a place, their pixels tell copies from others."""
    try:
        with faults_refused():
            return _judged(members, config, accepted, reader)
    except ScanError as error:
        return (refused(tuple(range(len(members))), error, config.checks.policy),)


def _judged(
    members: Sequence[Member], config: ScansConfig, accepted: Callable[[Sequence[int]], set[str]], reader: io.Reader
) -> tuple[Verdict, ...]:
    verdicts = judge(members, config, accepted)
    crowded = [one for one in verdicts if one.volume is not None and "duplicate_position" in one.codes]
    digests: dict[tuple[int, int], str] = {}
    for one in crowded:
        with suppress(ScanError):  # what cannot be read stays at its place and is refused
            found = reader.digests([members[index] for index in one.members], one)
            digests |= {(one.members[index], frame): digest for (index, frame), digest in found.items()}
    return judge(members, config, accepted, digests) if digests else verdicts


def _by_bytes(files: Iterable[SourceFile]) -> dict[str, SourceFile]:
    """Give the first file of each content."""
    first: dict[str, SourceFile] = {}
    for file in files:
        if file.sha256 is not None and file.refusal is None:
            first.setdefault(file.sha256, file)
    return first


def _row_id(content: str, index: int) -> str:
    """Name one of several scans of the same bytes."""
    return digest_of([content, index])[:32]


def _key(member: Member, names: Pseudonymiser) -> str | None:
    series = member.header.series if member.header else None
    return names.name("series", series) if series else None


def _passed(unit: Unit) -> bool:
    return any(refused.code in _PASSING for refused in unit.refused)


def _is_mask(member: Member) -> bool:
    return member.header is not None and member.header.sop_class in (*SEGMENTATIONS, STRUCTURES)


def _batches(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    batch: list[_Job] = []
    size = 0
    for job in jobs:
        # a bundle is in a segment whole: half of one, after a crash, would pass for all of it
        full = size + job.size > _SEGMENT_BYTES or len(batch) >= _SEGMENT_UNITS
        if batch and full and job.bundle != batch[-1].bundle:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.size
    if batch:
        yield batch


def _write(files: Sequence[SourceFile], units: Iterable[Unit], names: Pseudonymiser, folder: Path) -> None:
    """Write what became of every file, in order of the files' names."""
    unit_of: dict[str, list[Unit]] = defaultdict(list)
    named: dict[str, list[str]] = defaultdict(list)
    for unit in units:
        for sha in unit.members:
            unit_of[sha].append(unit)
    for file in files:
        if file.sha256 is not None and file.refusal is None:
            named[file.sha256].append(file.relative)
    scans: dict[str, Scan] = {}
    origins: dict[str, list[str]] = {}
    exclusions: list[Exclusion] = []
    written: set[str] = set()
    seen: set[str] = set()
    for file in files:
        item = names.file(file.relative)
        if file.refusal is not None or file.sha256 is None:
            refusal = file.refusal or ScanError("unreadable", "cannot be read")
            exclusions.append(Exclusion(item, "scans", refusal.code, refusal.reason))
            continue
        if file.sha256 in seen:
            reason = "the same bytes as another file; its names still find the one that is kept"
            exclusions.append(Exclusion(item, "scans", "duplicate_file", reason))
            continue
        seen.add(file.sha256)
        for unit in sorted(unit_of[file.sha256], key=lambda one: one.digest):
            if unit.digest in written:
                continue
            written.add(unit.digest)
            for taken in unit.taken:
                keys = (*taken.scan.keys, *_named_keys(taken, len(unit.taken), named, names))
                scans[taken.scan.scan_id] = replace(taken.scan, keys=tuple(dict.fromkeys(keys)))
                origins[taken.scan.scan_id] = list(taken.members)
            exclusions += [_exclusion(refused, unit, named, names) for refused in unit.refused]
            origins |= {content_of(refused.members): list(refused.members) for refused in unit.refused}
    write_record(folder / SCANS, tuple(scans.values()))
    write_record(folder / EXCLUSIONS, tuple(exclusions))
    write_record(folder / ORIGINS, origins)
    bytes_of = {file.sha256: file.size for file in files}
    write_record(folder / SIZES, {scan: sum(bytes_of[sha] for sha in origins[scan]) for scan in scans})


def _named_keys(taken: Taken, count: int, named: Mapping[str, list[str]], names: Pseudonymiser) -> tuple[str, ...]:
    """Give the keys of the names that a label table may call a scan by: its files, or the folder of its series."""
    paths = [path for sha in taken.members for path in named[sha]]
    if len(taken.members) > 1:
        paths = sorted({PurePosixPath(path).parent.as_posix() for path in paths} - {"."})
    mark = ""
    if len(taken.members) == 1 and count > 1:  # rows of an archive, or volumes of one file
        if not taken.scan.is_volume:
            return ()
        mark = SEVERAL  # lets a row that names the file be told why it finds none
    return tuple(mark + key for path in paths for key in names.file_keys(path))


def _exclusion(refused: Refused, unit: Unit, named: Mapping[str, list[str]], names: Pseudonymiser) -> Exclusion:
    single = len(refused.members) == 1
    item = names.file(named[refused.members[0]][0]) if single or unit.key is None else unit.key
    content = content_of(refused.members)
    return Exclusion(item, "scans", refused.code, refused.reason, len(refused.members), refused.action, content)
