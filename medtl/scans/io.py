"""The only door between files and scans.

Two passes. :func:`survey` names every file by its bytes (size and sha256) without understanding it; that is what
decides whether anything is new. :func:`ingest` decodes each file once into a flat pixel store. A file that cannot be
taken becomes an :class:`~medtl.records.Exclusion` with a code and a reason; the others go on. The source is only read.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from medtl.artifacts import file_digest, read_record, write_record
from medtl.config import ScansConfig
from medtl.errors import ScanError, StorageError
from medtl.progress import advance
from medtl.pseudonyms import Pseudonymiser
from medtl.records import AnyArray, Exclusion, Scan
from medtl.scans.headers import check_dicom, check_size, describe_dicom
from medtl.scans.pixels import check_pixels, compact, dicom_pixels, native, nifti_slice

log = logging.getLogger(__name__)
SCANS, EXCLUSIONS, PIXELS = "scans.json", "exclusions.json", "pixels.bin"
_NIFTI_HEADER = 540
_ALIGN = 16  # bytes; a view of wider values wants an even start
_MEDMNIST_PARTS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the source, known by its bytes."""

    path: Path
    relative: str
    size: int
    sha256: str | None  # None: not read, and why
    refusal: ScanError | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image and what its file said about it."""

    pixels: AnyArray
    fields: dict[str, Any]


def survey(source: Path | None, config: ScansConfig, ignore: frozenset[Path] = frozenset()) -> tuple[SourceFile, ...]:
    """List and hash every regular file below the source, in order of their names.

    Args:
        source: folder, or one file.
        ignore: files that are not scans (the label table).

    Raises:
        StorageError: the source is not set, does not exist, cannot be read or is empty.
    """
    if source is None:
        raise StorageError("No source of scans is set. Name a folder: --set scans.source=FOLDER")
    if not source.exists():
        raise StorageError(f"scans.source '{source}' does not exist. Name a folder of scans, or one file.")
    root = source if source.is_dir() else source.parent
    ignored = {path.resolve() for path in ignore}
    paths = [p for p in _walk(source) if p.resolve() not in ignored]
    if not paths:
        raise StorageError(f"scans.source '{source}' holds no files.")
    with ThreadPoolExecutor(config.workers) as pool:
        return tuple(pool.map(lambda path: _identify(path, root, config), paths))


def ingest(files: Sequence[SourceFile], config: ScansConfig, names: Pseudonymiser, folder: Path) -> None:
    """Decode every file once; write scans, exclusions and pixels into ``folder``."""
    scans: dict[str, Scan] = {}
    exclusions: list[Exclusion] = []
    offset = 0
    first_of: dict[str, str] = {}  # file digest -> the scan that has these bytes
    with (folder / PIXELS).open("wb") as store, ThreadPoolExecutor(config.workers) as pool:
        for number, (file, result) in enumerate(_decode_all(files, config, names, pool), 1):
            advance("reading scans", number, len(files))
            if isinstance(result, ScanError):
                exclusions.append(Exclusion(names.file(file.relative), "scans", result.code, result.reason))
                continue
            if result is None:  # bytes that were seen before
                kept = first_of.get(str(file.sha256))
                if kept is not None:
                    keys = dict.fromkeys((*scans[kept].keys, *names.file_keys(file.relative)))
                    scans[kept] = replace(scans[kept], keys=tuple(keys))
                reason = "the same bytes as another file; its names still find the one that is kept"
                exclusions.append(Exclusion(names.file(file.relative), "scans", "duplicate_file", reason))
                continue
            for index, decoded in enumerate(result):
                scan = _scan(file, index, len(result), decoded, offset)
                store.write(np.ascontiguousarray(decoded.pixels).data)
                store.write(bytes(-decoded.pixels.nbytes % _ALIGN))
                offset += decoded.pixels.nbytes + -decoded.pixels.nbytes % _ALIGN
                scans[scan.scan_id] = scan
                first_of.setdefault(str(file.sha256), scan.scan_id)
    write_record(folder / SCANS, tuple(scans.values()))
    write_record(folder / EXCLUSIONS, tuple(exclusions))


def read_scans(folder: Path) -> tuple[Scan, ...]:
    """Read the scans of an ingested folder."""
    return read_record(folder / SCANS, tuple[Scan, ...])


def read_exclusions(folder: Path) -> tuple[Exclusion, ...]:
    """Read what was left out, and why."""
    return read_record(folder / EXCLUSIONS, tuple[Exclusion, ...])


def names_of(files: Sequence[SourceFile], scans: Sequence[Scan]) -> dict[str, list[str]]:
    """Tell which files a scan came from, by their bytes; for an archive, its part and row (``x.npz#test/12``).

    For the terminal and for a table that somebody must act on; the names are nowhere in the workspace.
    """
    names: dict[str, list[str]] = {scan.scan_id: [] for scan in scans}
    parts = {scan.scan_id: scan.part for scan in scans}
    for file in files:
        if file.sha256 is None:
            continue
        if file.sha256[:32] in names:
            names[file.sha256[:32]].append(file.relative)
            continue
        rows: dict[str | None, int] = {}
        index = 0
        while (scan_id := _row_id(file.sha256, index)) in names:
            part = parts[scan_id]
            names[scan_id].append(f"{file.relative}#{part}/{rows.get(part, 0)}")
            rows[part] = rows.get(part, 0) + 1
            index += 1
    return names


class PixelStore:
    """All decoded pixels of an ingested folder, memory-mapped and read-only.

    Args:
        folder: what :func:`ingest` wrote.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / PIXELS
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)

    def __call__(self, scan: Scan) -> AnyArray:
        """Give one scan's pixels, shape ``scan.shape``, without copying them."""
        dtype = np.dtype(scan.dtype)
        size = int(np.prod(scan.shape)) * dtype.itemsize
        return self._bytes[scan.offset : scan.offset + size].view(dtype).reshape(scan.shape)


def _walk(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    for folder, folders, files in os.walk(source, followlinks=False):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted(files + links):
            yield Path(folder) / name


def _identify(path: Path, root: Path, config: ScansConfig) -> SourceFile:
    relative = path.relative_to(root).as_posix()
    try:
        if path.is_symlink() or not path.is_file():
            refusal = ScanError("not_a_file", "a link or a device, not a regular file; links are not followed")
            return SourceFile(path, relative, 0, None, refusal)
        size = path.stat().st_size
        if size == 0:
            return SourceFile(path, relative, 0, None, ScanError("empty_file", "the file has no bytes"))
        if size > config.max_file_mb * 1e6:
            limit = f"larger than scans.max_file_mb = {config.max_file_mb:g}"
            return SourceFile(path, relative, size, None, ScanError("too_large", limit))
        return SourceFile(path, relative, size, file_digest(path))
    except OSError as error:
        return SourceFile(path, relative, 0, None, ScanError("unreadable", f"cannot be read ({error.strerror})"))


def _decode_all(
    files: Sequence[SourceFile], config: ScansConfig, names: Pseudonymiser, pool: ThreadPoolExecutor
) -> Iterator[tuple[SourceFile, list[Decoded] | ScanError | None]]:
    """Decode in threads, a bounded number at a time, and hand results on in order."""
    seen: set[str] = set()
    step = 16 * config.workers
    for start in range(0, len(files), step):
        jobs = []
        for file in files[start : start + step]:
            again = file.sha256 is not None and file.sha256 in seen
            if file.sha256 is not None:
                seen.add(file.sha256)
            jobs.append((file, None if again else pool.submit(_decode_file, file, config, names)))
        for file, job in jobs:
            yield file, None if job is None else job.result()


def _decode_file(file: SourceFile, config: ScansConfig, names: Pseudonymiser) -> list[Decoded] | ScanError:
    if file.refusal is not None:
        return file.refusal
    try:
        data = file.path.read_bytes()
        if len(data) != file.size or sha256(data).hexdigest() != file.sha256:
            return ScanError("changed", "the file changed while it was being read; it will be taken next time")
        decoded = _decode(data, config, names)
        keys = names.file_keys(file.relative)
        for item in decoded:
            check_pixels(item.pixels)
            own = item.fields.get("keys", ())
            item.fields["keys"] = (*own, *keys) if len(decoded) == 1 else own
    except ScanError as error:
        return error
    except RecursionError:
        return ScanError("too_deep", "sequences nested deeper than a header needs")
    except Exception as error:
        # A decoder given hostile bytes may raise anything; whatever it is costs this file alone. Its text may quote the
        # file's content, so only the kind of error is kept.
        return ScanError("undecodable", f"the file is damaged or its pixels cannot be decoded ({type(error).__name__})")
    return decoded


def _decode(data: bytes, config: ScansConfig, names: Pseudonymiser) -> list[Decoded]:
    """Tell the format by its first bytes, never by the file's name."""
    if data[128:132] == b"DICM" or data[:2] in (b"\x08\x00", b"\x02\x00"):
        return [_decode_dicom(data, config, names)]
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")):
        return [_decode_image(data, config)]
    if data.startswith(b"PK\x03\x04"):
        return _decode_npz(data, config)
    if _is_nifti(data):
        return [_decode_nifti(data, config)]
    raise ScanError("not_an_image", "none of DICOM, NIfTI, PNG, JPEG, TIFF or .npz by its first bytes")


def _decode_dicom(data: bytes, config: ScansConfig, names: Pseudonymiser) -> Decoded:
    from pydicom import config as pydicom_config
    from pydicom import dcmread

    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    header = dcmread(io.BytesIO(data), force=data[128:132] != b"DICM")
    if "SOPClassUID" not in header:
        raise ScanError("bad_header", "looks like DICOM but names no SOP class: damaged, or not DICOM")
    check_dicom(header, config)
    pixels, bits = dicom_pixels(header, config)
    return Decoded(pixels, {"source": "dicom", "bits": bits, **describe_dicom(header, names)})


def _decode_image(data: bytes, config: ScansConfig) -> Decoded:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
        check_size(image.height, image.width, config)
        if getattr(image, "n_frames", 1) > 1:
            raise ScanError("multi_frame", "several pages in one file; this pipeline reads two-dimensional images")
        image.load()
        upright = ImageOps.exif_transpose(image) or image
        if upright.mode in ("1", "LA"):
            upright = upright.convert("L")
        elif upright.mode not in ("L", "RGB", "F", "I") and not upright.mode.startswith("I;16"):
            upright = upright.convert("RGB")
        pixels = np.asarray(upright)
    pixels = compact(pixels) if pixels.dtype == np.int32 else native(pixels)
    return Decoded(pixels, {"source": "image", "bits": 8 if pixels.dtype == np.uint8 else 16})


def _is_nifti(data: bytes) -> bool:
    head = data[:_NIFTI_HEADER]
    if data.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(io.BytesIO(data)) as stream:
                head = stream.read(_NIFTI_HEADER)
        except (OSError, EOFError, zlib.error):
            return False
    return head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2")


def _decode_nifti(data: bytes, config: ScansConfig) -> Decoded:
    import nibabel

    limit = int(config.max_megapixels * 1e6 * 8) + 4096
    if data.startswith(b"\x1f\x8b"):
        with gzip.open(io.BytesIO(data)) as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise ScanError("too_large", "grows past scans.max_megapixels when it is unpacked")
    kind = nibabel.Nifti2Image if data[4:7] in (b"n+2", b"ni2") else nibabel.Nifti1Image
    image = kind.from_bytes(data)
    sides = [int(side) for side in image.shape if side != 1]
    if len(sides) > 2:
        raise ScanError("volume", "a volume; this pipeline reads two-dimensional images")
    rows, columns = (*sides, 1, 1)[:2]
    check_size(rows, columns, config)
    values = np.asarray((nibabel.as_closest_canonical(image) if image.ndim > 2 else image).dataobj)
    pixels = nifti_slice(compact(values))
    return Decoded(pixels, {"source": "nifti", "bits": 8 if pixels.dtype == np.uint8 else 16})


def _decode_npz(data: bytes, config: ScansConfig) -> list[Decoded]:
    """Read the MedMNIST convention: ``{train,val,test}_images`` (n, rows, columns[, 3]) and ``…_labels`` (n, k)."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > config.max_file_mb * 1e6:
            raise ScanError("too_large", f"grows past scans.max_file_mb = {config.max_file_mb:g} when it is unpacked")
    decoded = []
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for part in _MEDMNIST_PARTS:
            if f"{part}_images" not in arrays:
                continue
            images = arrays[f"{part}_images"]
            labels = arrays.get(f"{part}_labels")
            if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
                raise ScanError("bad_header", f"{part}_images is not (n, rows, columns) or (n, rows, columns, 1 or 3)")
            if labels is not None and len(labels) != len(images):
                raise ScanError("bad_header", f"{part}_labels has another length than {part}_images")
            check_size(images.shape[1], images.shape[2], config)
            for row, image in enumerate(images):
                label = None if labels is None else tuple(int(v) for v in np.atleast_1d(labels[row]))
                pixels = native(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
                bits = 8 if pixels.dtype == np.uint8 else 16
                decoded.append(Decoded(pixels, {"source": "npz", "bits": bits, "label": label, "part": part}))
    if not decoded:
        raise ScanError("not_an_image", "an archive without train_images, val_images or test_images")
    return decoded


def _scan(file: SourceFile, index: int, count: int, decoded: Decoded, offset: int) -> Scan:
    own = str(file.sha256)[:32] if count == 1 else _row_id(str(file.sha256), index)
    pixels = np.ascontiguousarray(decoded.pixels)
    described = f"{pixels.dtype.str}{pixels.shape}".encode()
    return Scan(
        scan_id=own,
        shape=tuple(int(n) for n in pixels.shape),
        dtype=pixels.dtype.str,
        offset=offset,
        pixel_digest=sha256(described + pixels.tobytes()).hexdigest()[:32],
        **decoded.fields,
    )


def _row_id(file: str, index: int) -> str:
    return sha256(f"{file}/{index}".encode()).hexdigest()[:32]
