"""The door between files and values: what a file is, and its pixels.

Uncompressed pixels of a series are read straight into the volume, at their place, by several threads; nothing is
copied. Compressed ones are decoded in a process that may die (``decoding``). The source is only read.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import gzip
import io
import json
import os
import re
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from medtl.artifacts import storage_errors, write_bytes, write_record
from medtl.config import ScansConfig
from medtl.errors import ScanError, StorageError
from medtl.pseudonyms import Pseudonymiser
from medtl.records import AnyArray, Exclusion
from medtl.scans import decoding, formats, frames, masks, mosaic, nifti, nuclear
from medtl.scans.checks import action_of
from medtl.scans.deidentify import burned_in_risk, deidentified, strip_nifti
from medtl.scans.faults import ends_the_run, faults_refused
from medtl.scans.formats import Decoded
from medtl.scans.geometry import Affine, Finding, Volume, untilt
from medtl.scans.headers import DamagedError, Header, hush_pydicom, partial_header, read_header
from medtl.scans.mosaic import with_tiles
from medtl.scans.pictures import check_size
from medtl.scans.pixels import check_pixels, compact, dicom_pixels, nifti_slice
from medtl.scans.profile import Rules
from medtl.scans.quarantine import FOLDER, READMITTED, TABLE, Readmission, reasons_table
from medtl.scans.series import Member, Verdict
from medtl.scans.sources import SourceFile, Stamp, open_regular, opened, read_bytes, stamp_of

HEAD = 32_768  # bytes; nearly every header ends before
_VOLUME = re.compile(r"([fs]-[0-9a-f]+)-\d+(-\d+)?\.nii(\.gz)?")  # what a conversion writes
_AIR_HU = -1024.0
_CHUNK = 1 << 24  # bytes that are held of what is passed on
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_RELEASED = re.compile(r"p-([0-9a-f]{16}|unknown)/f-[0-9a-f]{16}\.dcm|f-[0-9a-f]{16}\.nii(\.gz)?")
_HALF_RELEASED = re.compile(r"\.f-[0-9a-f]{16}\.(dcm|nii|nii\.gz)\.tmp")


def look(file: SourceFile) -> Member:
    """Read a file's first bytes and, of DICOM, its header. Whatever the bytes are, nothing is raised."""
    start = b""
    try:
        with faults_refused():
            start = _first_bytes(file)
            kind = formats.kind_of(start)
            if kind is None:
                reason = "none of DICOM, NIfTI, PNG, JPEG, TIFF, GIF or .npz by its first bytes"
                return Member(file, None, damage=ScanError("not_an_image", reason))
            if kind != "dicom":
                return Member(file, kind)
            header = read_header(start, file.size, lambda: read_bytes(file))
        return _placed(file, header)
    except DamagedError as error:
        return Member(file, "dicom", error.header, error)
    except ScanError as error:  # its series lacks it: that much must be known of it
        known = partial_header(start, file.size) if error.code == "program_fault" else None
        return Member(file, "dicom" if known else None, known, error)
    except OSError as error:
        return Member(file, None, damage=ScanError("unreadable", f"cannot be read ({error.strerror})"))


def _placed(file: SourceFile, header: Header) -> Member:
    """Find where the slices lie that the frames' own planes do not place: tiles of a mosaic, frames of a SPECT."""
    place = with_tiles if header.mosaic else nuclear.with_places if nuclear.is_reconstructed(header) else None
    if place is None:
        return Member(file, "dicom", header)
    try:
        with faults_refused():
            return Member(file, "dicom", place(header, _dataset(read_bytes(file), stop_before_pixels=True)))
    except ScanError as error:
        return Member(file, "dicom", header, error)


def _first_bytes(file: SourceFile) -> bytes:
    if file.member is not None:
        with opened(file) as stream:
            return stream.read(HEAD)
    handle = open_regular(file.path)
    try:
        return os.pread(handle, HEAD, 0)
    finally:
        os.close(handle)


def digest(file: SourceFile) -> str:
    """Name a file by its bytes; one that cannot be read by its name: whoever wants its pixels will find out too."""
    try:
        return sha256(read_bytes(file)).hexdigest()
    except ScanError:
        return file.relative


def write_quarantine(workspace: Path, exclusions: Iterable[Exclusion]) -> Path:
    """Write the table of refusals, ``quarantine/reasons.csv``; give its path."""
    prepare_folder(workspace / FOLDER)
    write_bytes(workspace / FOLDER / TABLE, reasons_table(exclusions))
    return workspace / FOLDER / TABLE


def write_readmissions(workspace: Path, words: Sequence[Readmission]) -> Path:
    """Write what was taken back, ``quarantine/readmitted.json``; give its path."""
    prepare_folder(workspace / FOLDER)
    write_record(workspace / FOLDER / READMITTED, tuple(words))
    return workspace / FOLDER / READMITTED


def prepare_folder(folder: Path) -> None:
    """Make a folder for results, readable by its owner alone.

    Raises:
        StorageError: it cannot be made.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def remove(path: Path) -> None:
    """Remove a file of ours, if it is there."""
    with storage_errors(path):
        path.unlink(missing_ok=True)


def remove_volumes(folder: Path, items: Collection[str], kept: Collection[str]) -> None:
    """Remove what an earlier conversion wrote of these items and this one did not: they are refused now."""
    with storage_errors(folder):
        for path in folder.iterdir():
            found = _VOLUME.fullmatch(path.name)
            if found and found[1] in items and path.name not in kept:
                path.unlink()


def write_conversion(folder: Path, refused: Iterable[Exclusion]) -> None:
    """Write the table of what a conversion left out: ``refused.csv``."""
    write_bytes(folder / "refused.csv", reasons_table(refused))


def write_nifti(path: Path, voxels: Voxels, threads: int) -> None:
    """Write a volume under a temporary name, then rename it; ``.nii.gz`` is compressed in threads.

    Raises:
        ScanError: the values or the affine have no place in a NIfTI file.
        StorageError: the file cannot be written.
    """
    stored = voxels.stored
    head = nifti.nifti_header(stored.shape, stored.dtype.str, voxels.affine, voxels.slope, voxels.intercept)
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        if voxels.file is not None and path.suffix != ".gz":  # the values lie there already
            with voxels.file.open("r+b", buffering=0) as stream:
                stream.write(head)
            voxels.file.replace(path)
            return
        try:
            with temporary.open("wb", buffering=0) as stream:
                if path.suffix == ".gz":
                    for member in nifti.gzip_members(np.frombuffer(head, np.uint8), threads=1):
                        stream.write(member)
                    for member in nifti.gzip_members(stored, threads=threads):
                        stream.write(member)
                else:
                    stream.write(head)
                    whole = memoryview(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
                    while whole:  # one call writes at most 2 GiB
                        whole = whole[stream.write(whole) :]
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def deidentify_file(
    file: SourceFile, folder: Path, names: Pseudonymiser, rules: Rules, config: ScansConfig
) -> Released | None:
    """Write a DICOM or NIfTI file without its patient's identity into ``folder``, under a name of ours.

    DICOM: ``<patient's pseudonym>/<file's pseudonym>.dcm``; what stays as it is (the pixels) is copied by the kernel.
    No NIfTI is held in memory as a whole. The name appears when the file is complete.

    Returns:
        ``None`` for a zip archive: nothing of it was written.

    Raises:
        ScanError: the file is not understood completely, or may have text burned in: nothing of it is written.
        StorageError: the output cannot be written.
    """
    own = names.file(file.relative)
    try:
        if file.member is not None:
            data = read_bytes(file)
            return _release(file, data, bytes(data[:HEAD]), _Target(folder, own, None), names, rules, config)
        handle = open_regular(file.path)
        try:
            status = os.fstat(handle)
            start = os.pread(handle, HEAD, 0)
            target = _Target(folder, own, handle, stamp_of(status) if file.stamp is None else file.stamp)
            return _release(file, _OnDisk(handle, status.st_size, start), start, target, names, rules, config)
        finally:
            os.close(handle)
    except OSError as error:
        raise ScanError("unreadable", f"cannot be read ({error.strerror})") from error


@dataclass(frozen=True, slots=True)
class Released:
    """A file that left: its name below the folder, and (kind, raw, pseudonym) of what was replaced in it."""

    output: str
    pairs: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)


class _OnDisk:
    """The bytes of an open file, read where they are asked for; its beginning is there already."""

    def __init__(self, handle: int, size: int, start: bytes) -> None:
        self.handle, self.size, self.start = handle, size, start

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(self.size)
        if last <= len(self.start):
            return self.start if (first, last) == (0, len(self.start)) else self.start[first:last]
        return os.pread(self.handle, last - first, first) if first < last else b""


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a file without an identity goes, and the open file that its ranges come from."""

    folder: Path
    own: str
    handle: int | None
    stamp: Stamp | None = None

    def write(self, relative: str, pieces: Iterable[bytes | tuple[int, int]]) -> None:
        """Write pieces (bytes, or start and length of the source) under a temporary name, then rename."""
        path = f"{self.folder}/{relative}"
        below, _, name = path.rpartition("/")
        temporary = f"{below}/.{name}.tmp"
        with storage_errors(self.folder):
            written = _create(temporary)
            try:
                try:
                    for piece in pieces:
                        if isinstance(piece, bytes):
                            _write_all(written, piece)
                        else:
                            self._copy(written, *piece)
                finally:
                    os.close(written)
                if self.handle is not None and stamp_of(os.fstat(self.handle)) != self.stamp:
                    raise ScanError("changed", "the file changed while it was being read; it will be taken next time")
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def _copy(self, written: int, start: int, length: int) -> None:
        assert self.handle is not None
        while length:
            try:
                done = os.copy_file_range(self.handle, written, length, offset_src=start)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                chunk = os.pread(self.handle, min(length, _CHUNK), start)
                _write_all(written, chunk)
                done = len(chunk)
            if not done:
                raise ScanError("truncated", "the file became shorter while it was being read")
            start, length = start + done, length - done


def _create(path: str) -> int:
    """Make a file, and its folder where that is missing; what a killed run left under this name goes."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        Path(path).parent.mkdir(0o700, parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)


def _write_all(handle: int, data: bytes) -> None:
    done = os.write(handle, data)
    while done < len(data):  # one call writes at most 2 GiB
        done += os.write(handle, memoryview(data)[done:])


def _release(
    file: SourceFile,
    data: bytes | _OnDisk,
    start: bytes,
    target: _Target,
    names: Pseudonymiser,
    rules: Rules,
    config: ScansConfig,
) -> Released | None:
    kind = formats.kind_of(start)
    if kind == "dicom":
        done = deidentified(data, names, rules)
        if done.picture is not None:
            _accept(burned_in_risk(done.picture), config)
        output = f"{done.patient or 'p-unknown'}/{target.own}.dcm"
        target.write(output, done.pieces if target.handle is not None else _joined(done.pieces, data))
        return Released(output, done.pairs)
    if kind == "nifti":
        head, begins, length = strip_nifti(start)
        _check_voxels(begins + length, len(data), length, config)
        output = f"{target.own}.nii"
        pieces = (head, (begins, length))
        target.write(output, pieces if target.handle is not None else _joined(pieces, data))
        return Released(output)
    if kind == "gzip":
        output = f"{target.own}.nii.gz"
        with opened(file) as packed, gzip.GzipFile(fileobj=packed) as stream:
            target.write(output, _repacked(stream, config))
        return Released(output)
    if kind == "npz" and file.member is None:
        return None
    raise ScanError("not_an_image", "neither DICOM nor NIfTI: nothing is known of where it names a patient")


def _joined(pieces: Iterable[bytes | tuple[int, int]], data: bytes | _OnDisk) -> Iterator[bytes]:
    for piece in pieces:
        yield piece if isinstance(piece, bytes) else bytes(data[piece[0] : piece[0] + piece[1]])


def _accept(findings: Iterable[Finding], config: ScansConfig) -> None:
    """Refuse what the policy does not accept."""
    for finding in findings:
        if action_of(finding.code, config.checks.policy) != "accept":
            raise ScanError(finding.code, finding.reason)


def _check_voxels(wanted: int, size: int, length: int, config: ScansConfig) -> None:
    if length > config.max_volume_mb * 1e6:
        raise ScanError("too_large", f"more voxels than scans.max_volume_mb = {config.max_volume_mb:g}")
    if wanted > size:
        raise ScanError("truncated", f"{size} bytes where the header declares {wanted}")
    if wanted < size:  # they could say anything: never copied, and only left out where the policy accepts it
        _accept([Finding("extra_bytes", "bytes follow the last voxel that the header declares")], config)


def _repacked(stream: gzip.GzipFile, config: ScansConfig) -> Iterator[bytes]:
    """Unpack a NIfTI file, strip it and pack it again, piece by piece."""
    try:
        start = stream.read(HEAD)
        if not nifti.is_nifti(start):
            raise ScanError("not_an_image", "a gzip file that holds no NIfTI")
        pending, begins, length = strip_nifti(start)
        _check_voxels(0, 0, length, config)
        stream.seek(begins)
        while length:
            chunk = stream.read(min(length, _CHUNK))
            if not chunk:
                raise ScanError("truncated", "fewer voxels than the header declares")
            length -= len(chunk)
            pending += chunk
            if len(pending) >= _CHUNK or not length:
                yield from nifti.gzip_members(pending)
                pending = b""
        if stream.read(1):
            _check_voxels(0, 1, 0, config)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ScanError("archive_damaged", "the gzip stream is damaged") from error
    except EOFError as error:
        raise ScanError("truncated", "the gzip stream ends before its end mark") from error


def handover_record(path: Path) -> dict[str, Any] | None:
    """Read what an earlier call said of a folder; ``None``: nothing. What cannot be read says nothing of the kind."""
    with storage_errors(path):
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return {}
    return record if isinstance(record, dict) else {}


def released_files(folder: Path) -> set[str]:
    """List the outputs of :func:`deidentify_file` in a folder; remove what a killed run left half written.

    Raises:
        StorageError: the folder cannot be read.
    """
    found: set[str] = set()
    with storage_errors(folder):
        for below in ("", *(f"{one.name}/" for one in os.scandir(folder) if one.is_dir(follow_symlinks=False))):
            for one in os.scandir(folder / below):
                if _RELEASED.fullmatch(below + one.name):
                    found.add(below + one.name)
                elif _HALF_RELEASED.fullmatch(one.name):
                    Path(one.path).unlink()
    return found


def remove_released(folder: Path, outputs: Iterable[str]) -> None:
    """Remove outputs, and the folders that they leave empty."""
    with storage_errors(folder):
        for output in outputs:
            (folder / output).unlink(missing_ok=True)
            patient = (folder / output).parent
            if patient != folder and not any(patient.iterdir()):
                patient.rmdir()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for one run; the lock dies with the process.

    Raises:
        StorageError: another run is writing there.
    """
    with storage_errors(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"Another run is writing to '{folder}'. Wait for its end.") from error
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without such locks
                raise
        yield
    finally:
        os.close(handle)


def write_key_table(path: Path, pairs: Iterable[tuple[str, str, str]]) -> None:
    """Write which raw identifier became which pseudonym, readable by its owner alone; the file must not exist yet.

    Raises:
        StorageError: it exists, or cannot be written.
    """
    with storage_errors(path):
        if path.exists():
            raise StorageError(f"'{path}' exists. Name a new file for the key table.")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "w", newline="", encoding="utf-8") as stream:
                rows = csv.writer(stream)
                rows.writerow(("kind", "raw", "pseudonym"))
                rows.writerows(sorted(set(pairs)))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Voxels:
    """The values of a volume: ``slope * stored + intercept``, voxel (column, row, slice) to RAS+ mm by ``affine``."""

    stored: AnyArray  # (slices, rows, columns)
    affine: Affine
    slope: float
    intercept: float
    findings: tuple[str, ...]  # codes that the policy accepted or repaired
    file: Path | None = None  # whose bytes, behind the place of a NIfTI header, they are


@contextmanager
def _of_the_file() -> Iterator[None]:
    """Turn what reading a file raises into a refusal of that file.

    A decoder given hostile bytes may raise anything. Its text may quote the file's content, so only the kind is kept.

    Raises:
        ScanError: what was raised as such; ``unreadable``, ``too_deep`` or ``undecodable`` for the rest.
    """
    try:
        yield
    except RecursionError as error:
        raise ScanError("too_deep", "sequences nested deeper than a header needs") from error
    except Exception as error:
        if ends_the_run(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:  # without a number it is a decoder's own
            raise ScanError("unreadable", f"cannot be read ({error.strerror})") from error
        reason = f"the file is damaged or its pixels cannot be decoded ({type(error).__name__})"
        raise ScanError("undecodable", reason) from error


class Reader:
    """Gives the pixels of what was judged fit.

    Args:
        config: limits, policy, and how many threads read and decode.
        threads: that read one volume, where several volumes are read at the same time; default: ``config.workers``.
    """

    def __init__(self, config: ScansConfig, threads: int | None = None) -> None:
        self._config, self._threads = config, threads or config.workers
        self._ends = ExitStack()
        limits = decoding.Limits(threads=config.workers)
        self._pool = self._ends.enter_context(decoding.DecodingPool(config.workers, limits))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def decode(self, members: Sequence[Member], verdict: Verdict) -> list[Decoded]:
        """Give one volume, or what is in one file.

        Raises:
            ScanError: the pixels cannot be had, or a check of them refuses.
            StorageError: decoded pixels cannot be written.
            MedtlError: the decoding process cannot be started. Neither is the file's fault.
        """
        with _of_the_file():
            if verdict.volume is not None:
                return [self._series(members, verdict)]
            (member,) = members
            data = read_bytes(member.file)
            match member.kind:
                case "dicom":
                    return self._images(member, data, verdict)
                case "nifti" | "gzip":
                    return self._nifti(data, verdict)
                case "npz":
                    decoded = formats.decode_npz(data, self._config)
                case _:
                    decoded = [formats.picture(self._pool.picture(data, self._config.max_megapixels))]
            return [
                Decoded(one.pixels, one.fields | {"findings": _codes(verdict.refuse(check_pixels(one.pixels)))})
                for one in decoded
            ]

    def start_decoders(self) -> None:
        """Start the decoding processes that will be wanted soon."""
        for _ in range(self._config.workers):
            self._pool.start()

    def volume(
        self, members: Sequence[Member], verdict: Verdict, out: AnyArray | None = None, file: Path | None = None
    ) -> Voxels:
        """Read one volume of a series, check its values, and say what they mean.

        Args:
            out: bytes to use again, as many as the volume has or more; a new array otherwise.
            file: to be made where all values are compressed: they are decoded into it, behind the place of a header.

        Raises:
            ScanError: as :meth:`decode`.
        """
        with _of_the_file():
            return self._volume(members, verdict, out, file)

    def _volume(self, members: Sequence[Member], verdict: Verdict, out: AnyArray | None, file: Path | None) -> Voxels:
        volume, headers = verdict.volume, [member.header for member in members]
        assert volume is not None
        own = [header for header in headers if header is not None]
        files = [member.file for member in members]
        into = file if self._goes_straight(files, own, volume) else None
        stored, sums = (
            self._frames(files, own, volume, out) if into is None else self._decode_into(into, files, own, volume)
        )
        found, written = stored, volume
        findings = (*verdict.findings, *verdict.refuse(frames.compare(stored, sums)))
        slope, intercept, stored = _meaning(stored, own, volume)
        if any(finding.code == "gantry_tilt" for finding in findings):
            fill = (_AIR_HU - intercept) / slope if own[0].modality == "CT" else float(stored.min())
            stored, volume = untilt(stored, volume, max(fill, float(stored.min())))
        codes = tuple(sorted({finding.code for finding in findings}))
        same = stored is found and volume is written
        return Voxels(stored, volume.affine, slope, intercept, codes, into if same else None)

    def digests(self, members: Sequence[Member], verdict: Verdict) -> dict[tuple[int, int], str]:
        """Give a digest of the stored values of every frame of a volume, by (file, frame)."""
        volume, headers = verdict.volume, [member.header for member in members if member.header is not None]
        assert volume is not None
        with _of_the_file():
            stored, _ = self._frames([member.file for member in members], headers, volume, None)
        return {place: sha256(frame.data).hexdigest() for place, frame in zip(volume.members, stored, strict=True)}

    def mask_source(self, member: Member) -> tuple[str | None, set[str]]:
        """Tell which series a mask was drawn on, and in which frames of reference; raw identifiers.

        Raises:
            ScanError: it cannot be read, or its pixels are compressed in a way that could end this process.
        """
        header = member.header
        assert header is not None
        if header.pixel_keyword and header.transfer_syntax not in (*frames.UNCOMPRESSED, decoding.RLE):
            raise ScanError("no_decoder", "a compressed mask; uncompressed ones and RLE are read")
        with _of_the_file():
            dataset = _dataset(read_bytes(member.file), stop_before_pixels=True)
        return masks.drawn_on(dataset), masks.frames_of_reference(dataset)

    def masks(self, member: Member, verdict: Verdict, grid: masks.Grid, image: str) -> list[Decoded]:
        """Lay what is drawn in a segmentation or structure set on an image's voxels, a mask for each region.

        Raises:
            ScanError: it does not fit the image, or cannot be read.
        """
        found = []
        with _of_the_file():
            dataset = _dataset(read_bytes(member.file))
        for mask in masks.dicom_masks(dataset, grid, self._config):
            codes = tuple(sorted({finding.code for finding in verdict.refuse(mask.findings)}))
            fields = {
                "source": "mask",
                "bits": 1,
                "affine": mask.affine,
                "findings": codes,
                "mask_of": image,
                "region": f"{mask.number} {mask.label or ''}".strip(),
            }
            found.append(Decoded(mask.values, fields))
        return found

    def _series(self, members: Sequence[Member], verdict: Verdict) -> Decoded:
        voxels = self.volume(members, verdict)
        header = members[0].header
        assert header is not None
        fields = {
            "source": "dicom",
            "bits": header.bits_stored,
            "affine": voxels.affine,
            "slope": voxels.slope,
            "intercept": voxels.intercept,
            "findings": voxels.findings,
        }
        return Decoded(voxels.stored, fields)

    # ------------------------------------------------------------------------------------------------ frames

    def _frames(
        self, files: Sequence[SourceFile], headers: Sequence[Header], volume: Volume, out: AnyArray | None
    ) -> tuple[AnyArray, list[int]]:
        """Read the stored values of a volume's frames, in slice order; with a checksum of each."""
        first = headers[volume.members[0][0]]
        if first.tiles is not None:
            return self._mosaic(files, headers, volume)
        types = {frames.stored_type(headers[index]) for index, _ in volume.members}
        if len(types) > 1:
            raise ScanError("mixed_format", "the slices' values are stored at different depths or signs")
        dtype = types.pop()
        size = int(np.prod(volume.shape)) * dtype.itemsize
        self._check_size(size)
        flat = np.empty(size, np.uint8) if out is None or len(out) < size else out[:size]
        voxels = flat.view(dtype).reshape(volume.shape)
        sums = [0] * len(volume.members)
        direct = [n for n, (index, _) in enumerate(volume.members) if _is_direct(files[index], headers[index])]

        def fill(numbers: Sequence[int]) -> None:
            for number in numbers:
                index, frame = volume.members[number]
                _read_frame(files[index], headers[index], frame, voxels[number])
                sums[number] = frames.settle(voxels[number], headers[index])

        if self._threads == 1 or len(direct) < 2:
            fill(direct)
        elif direct:
            step = -(-len(direct) // self._threads)
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(fill, [direct[start : start + step] for start in range(0, len(direct), step)]))
        rest = sorted(set(range(len(volume.members))) - set(direct))
        places = [(files[volume.members[n][0]], headers[volume.members[n][0]], volume.members[n][1]) for n in rest]
        for place, frame in self._decoded(places):
            number = rest[place]
            header = headers[volume.members[number][0]]
            if frame.shape != volume.shape[1:]:
                raise ScanError("decode_failed", "a frame of another size than the header declares")
            voxels[number] = frame
            sums[number] = frames.settle(voxels[number], header)
        return voxels, sums

    def _mosaic(
        self, files: Sequence[SourceFile], headers: Sequence[Header], volume: Volume
    ) -> tuple[AnyArray, list[int]]:
        """Read a mosaic as the one image that it is stored as, and cut it."""
        header = headers[volume.members[0][0]]
        assert header.tiles is not None
        whole = replace(volume, shape=(1, header.rows, header.columns))
        image, _ = self._frames(files, [replace(one, tiles=None) for one in headers], whole, None)
        voxels = mosaic.cut(image[0], header.tiles)
        return voxels, [frames.settle(piece, header) for piece in voxels]

    def _goes_straight(self, files: Sequence[SourceFile], headers: Sequence[Header], volume: Volume) -> bool:
        """Tell whether decoded values are the stored ones as they are, for every frame."""
        own = [headers[index] for index, _ in volume.members]
        return (
            own[0].tiles is None
            and not any(header.transfer_syntax in frames.UNCOMPRESSED for header in own)
            and not any(files[index].member for index, _ in volume.members)
            and len({decoding.format_of(header) for header in own}) == 1
            and decoding.format_of(own[0]).shape == volume.shape[1:]
        )

    def _decode_into(
        self, path: Path, files: Sequence[SourceFile], headers: Sequence[Header], volume: Volume
    ) -> tuple[AnyArray, list[int]]:
        """Decode all frames of a volume into a file, behind the place of a NIfTI header, and map it."""
        kind = decoding.format_of(headers[volume.members[0][0]])
        size = kind.nbytes * len(volume.members)
        self._check_size(size)
        start = nifti.NIFTI1_HEADER + 4
        with storage_errors(path), path.open("xb") as stream:
            stream.truncate(start + size)
        jobs = [
            _job(files[index], files[index].path, headers[index], frame, kind, start + number * kind.nbytes)
            for number, (index, frame) in enumerate(volume.members)
        ]
        for error in self._pool.decode(jobs, path):
            if error is not None:
                raise error
        voxels = np.memmap(path, kind.dtype, "r+", start, volume.shape)
        return voxels, [
            frames.settle(voxels[number], headers[index]) for number, (index, _) in enumerate(volume.members)
        ]

    def _check_size(self, size: int) -> None:
        if size > self._config.max_volume_mb * 1e6:
            limit = f"scans.max_volume_mb = {self._config.max_volume_mb:g}"
            raise ScanError("too_large", f"{size / 1e6:.0f} MB, more than {limit}")

    def _decoded(self, places: Sequence[tuple[SourceFile, Header, int]]) -> Iterator[tuple[int, AnyArray]]:
        """Give frames that do not lie in their file as they are: by the decoding process, or by pydicom."""
        packed = [n for n, (_, header, _) in enumerate(places) if header.transfer_syntax not in frames.UNCOMPRESSED]
        if len(packed) < len(places):
            left = set(range(len(places))).difference(packed)
            for file, chosen in _by_file(places, left).items():  # each is read once, however many frames it has
                data, syntax = read_bytes(file), places[chosen[0]][1].transfer_syntax
                dataset = None if all(frames.is_direct(places[n][1]) for n in chosen) else _dataset(data, False, syntax)
                for number in chosen:
                    _, header, frame = places[number]
                    direct = frames.is_direct(header)
                    yield number, _frame_of(data, header, frame) if direct else _unpacked(dataset, header, frame)
        if not packed:
            return
        with storage_errors(Path(tempfile.gettempdir(), "medtl")):
            made = tempfile.TemporaryDirectory(prefix="medtl-")
        with made as name:
            folder = Path(name)
            jobs, size, paths = [], 0, dict[tuple[Path, str | None], Path]()
            for number in packed:
                file, header, frame = places[number]
                key = file.path, file.member
                if key not in paths:
                    paths[key] = _on_disk(file, folder, len(paths))
                kind = decoding.format_of(header)
                jobs.append(_job(file, paths[key], header, frame, kind, size))
                size += kind.nbytes
            output = folder / "pixels"
            with storage_errors(output), output.open("xb") as stream:
                stream.truncate(size)
            for error in self._pool.decode(jobs, output):
                if error is not None:
                    raise error
            values = np.memmap(output, np.uint8, "r")
            for number, job in zip(packed, jobs, strict=True):
                piece = values[job.output_offset : job.output_offset + job.format.nbytes]
                yield number, piece.view(job.format.dtype).reshape(job.format.shape)

    # ------------------------------------------------------------------------------------------------ files

    def _images(self, member: Member, data: bytes, verdict: Verdict) -> list[Decoded]:
        """Decode the frames of one object, each an image of its own."""
        header = member.header
        assert header is not None
        check_size(header.rows, header.columns, self._config.max_megapixels)
        if header.samples not in (1, 3):
            raise ScanError("bad_header", f"{header.samples} samples per pixel; 1 or 3 are known")
        dataset = _dataset(data, syntax=header.transfer_syntax)
        stored: dict[int, AnyArray] = {}
        if header.transfer_syntax not in frames.UNCOMPRESSED:
            places = [(member.file, header, frame) for frame in range(header.frames)]
            stored = {number: np.array(frame) for number, frame in self._decoded(places)}
        elif frames.is_direct(header):
            stored = {number: _frame_of(data, header, number).copy() for number in range(header.frames)}
            for frame in stored.values():
                frames.settle(frame, header)
        found = []
        for number in range(header.frames):
            pixels, bits = dicom_pixels(dataset, self._config, stored.get(number), number)
            codes = _codes((*verdict.findings, *verdict.refuse(check_pixels(pixels))))
            found.append(Decoded(pixels, {"source": "dicom", "bits": bits, "findings": codes}))
        return found

    def _nifti(self, data: bytes, verdict: Verdict) -> list[Decoded]:
        """Give the volumes of a NIfTI file, or its one slice as an image."""
        packed = data.startswith(b"\x1f\x8b")
        start = nifti.gunzip_start(data) if packed else data[: nifti.NIFTI2_HEADER]
        if not nifti.is_nifti(start):
            raise ScanError("not_an_image", "a gzip file that holds no NIfTI")
        header = nifti.parse_nifti(start, -1 if packed else len(data), self._config)
        whole = nifti.bounded_gunzip(data, header.file_bytes, self._threads) if packed else data
        flat = sum(side > 1 for side in header.shape) <= 2 and header.volumes == 1 and self._config.read != "volumes"
        if flat:
            return [self._nifti_image(whole, start, verdict)]
        if self._config.read == "images":
            raise ScanError("volume", "a volume; scans.read is 'images'")
        found = []
        for number in range(header.volumes):
            values, seen = nifti.nifti_volume(header, whole, number)
            known = verdict.refuse((*header.findings, *seen))
            if header.channels != 1:
                raise ScanError("unsupported_type", "a colour volume")
            codes = _codes((*verdict.findings, *known, *verdict.refuse(check_pixels(values))))
            fields = {
                "source": "nifti",
                "bits": values.dtype.itemsize * 8,
                "affine": header.affine,
                "slope": header.slope,
                "intercept": header.intercept,
                "findings": codes,
            }
            found.append(Decoded(values, fields))
        return found

    def _nifti_image(self, data: bytes | bytearray, start: bytes, verdict: Verdict) -> Decoded:
        import nibabel

        kind = nibabel.Nifti2Image if start[4:7] in (b"n+2", b"ni2") else nibabel.Nifti1Image
        image = kind.from_bytes(bytes(data))
        rows, columns = ([int(side) for side in image.shape if side != 1] + [1, 1])[:2]
        check_size(rows, columns, self._config.max_megapixels)
        values = np.asarray((nibabel.as_closest_canonical(image) if image.ndim > 2 else image).dataobj)
        pixels = nifti_slice(compact(values))
        codes = _codes(verdict.refuse(check_pixels(pixels)))
        return Decoded(pixels, {"source": "nifti", "bits": 8 if pixels.dtype == np.uint8 else 16, "findings": codes})


def _codes(findings: Iterable[Finding]) -> tuple[str, ...]:
    return tuple(sorted({finding.code for finding in findings}))


def _is_direct(file: SourceFile, header: Header) -> bool:
    return file.member is None and frames.is_direct(header)


def _read_frame(file: SourceFile, header: Header, frame: int, target: AnyArray) -> None:
    """Read an uncompressed frame to its place."""
    assert header.pixel_offset is not None
    handle = open_regular(file.path)
    try:
        if file.stamp is not None and stamp_of(os.fstat(handle)) != file.stamp:
            raise ScanError("changed", "a file changed while it was being read; it will be taken next time")
        offset = header.pixel_offset + frame * target.nbytes
        if os.preadv(handle, [target.reshape(-1).view(np.uint8).data], offset) != target.nbytes:
            raise ScanError("truncated", "the pixel data ends before the last row")
    finally:
        os.close(handle)


def _dataset(data: bytes, stop_before_pixels: bool = False, syntax: str | None = None) -> Any:
    from pydicom import dcmread
    from pydicom.uid import UID

    hush_pydicom()
    dataset = dcmread(io.BytesIO(data), force=data[128:132] != b"DICM", stop_before_pixels=stop_before_pixels)
    if syntax and "TransferSyntaxUID" not in dataset.file_meta:  # a bare data set: told by its first elements
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
    return dataset


def _by_file(places: Sequence[tuple[SourceFile, Header, int]], numbers: Iterable[int]) -> dict[SourceFile, list[int]]:
    found: dict[SourceFile, list[int]] = {}
    for number in sorted(numbers):
        found.setdefault(places[number][0], []).append(number)
    return found


def _frame_of(data: bytes, header: Header, frame: int) -> AnyArray:
    """Give an uncompressed frame from the bytes of its file, as it lies there."""
    kind, count = frames.stored_type(header), header.rows * header.columns
    assert header.pixel_offset is not None
    offset = header.pixel_offset + frame * count * kind.itemsize
    return np.frombuffer(data, kind, count, offset).reshape(header.rows, header.columns)


def _unpacked(dataset: Any, header: Header, frame: int) -> AnyArray:
    """Read an uncompressed frame in whatever byte order and packing; python alone, nothing that can crash.

    Raises:
        ScanError: ``bad_header``, see :func:`_check_high_bit`.
    """
    from pydicom.pixels.utils import pixel_array

    _check_high_bit(header)
    return np.asarray(pixel_array(dataset, index=frame)).astype(frames.stored_type(header), copy=False)


def _check_high_bit(header: Header) -> None:
    """Refuse values that do not end at the lowest bit where others unpack them: they may, or may not, have moved them.

    Raises:
        ScanError: ``bad_header``.
    """
    if header.bits_stored < header.bits_allocated and header.high_bit != header.bits_stored - 1:
        raise ScanError("bad_header", f"{header.bits_stored} bits stored of which the highest is {header.high_bit}")


def _job(
    file: SourceFile, path: Path, header: Header, frame: int, kind: decoding.FrameFormat, place: int
) -> decoding.FrameJob:
    assert header.pixel_offset is not None
    _check_high_bit(header)
    return decoding.FrameJob(path, file.size, header.pixel_offset, header.frames, frame, kind, place)


def _on_disk(file: SourceFile, folder: Path, number: int) -> Path:
    """Give a path that the decoding process can open; a member of an archive is copied under a name of ours."""
    if file.member is None:
        return file.path
    path, data = folder / f"member{number}", read_bytes(file)
    with storage_errors(path):
        path.write_bytes(data)
    return path


def _meaning(stored: AnyArray, headers: Sequence[Header], volume: Volume) -> tuple[float, float, AnyArray]:
    """Give slope, intercept and stored values; values of slices that differ in both are scaled, each by its own."""
    if any(headers[index].has_lut for index, _ in volume.members):
        raise ScanError("modality_lut", "the values of a volume go through a look-up table")
    planes = [headers[index].planes[frame] for index, frame in volume.members]
    scales = [
        (1.0 if plane.slope is None else plane.slope, 0.0 if plane.intercept is None else plane.intercept)
        for plane in planes
    ]
    if len(set(scales)) == 1:
        return (*scales[0], stored)
    factors, offsets = (np.array(column, np.float32)[:, None, None] for column in zip(*scales, strict=True))
    return 1.0, 0.0, stored.astype(np.float32) * factors + offsets
