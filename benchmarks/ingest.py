"""A folder of DICOM series to NIfTI on disk: medtl with all its checks on, beside what people use, and the floor.

Every contender turns the same folder into one NIfTI file per series, in a process of its own. A program (dcm2niix, and
`medtl convert` as it is typed) is started in every round, and its whole wall time counts; a library (medtl among them)
has one process for all rounds, so that imports and the first, uncounted round are not measured. The floor reads every
byte and writes as many, and does nothing else. Contenders are interleaved, in another order each round (what one leaves
of free memory is the next one's), and the median is given. Peak memory is of the process. The last table is a second
ingest into a workspace: all files unchanged, then one file more.

    python benchmarks/ingest.py [--json] [--quick] [--source FOLDER] [--cases plain,rle,j2k]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

SERIES, SLICES, SIDE = 20, 120, 512
PYTHON = (sys.executable, __file__, "--run")
TOOK = "seconds: "  # before the figure that a library's process prints


# ---------------------------------------------------------------------------------------------------- the scans


def write_series(folder: Path, series: int, slices: int, side: int, syntax: str) -> None:
    """Write CT series with the headers that a scanner writes: some ninety elements, sequences and private ones."""
    import numpy as np
    from pydicom.uid import generate_uid

    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    for number in range(series):
        body = (xx**2 / 0.7 + yy**2 / 0.5 < 1).astype(np.float64)
        series_uid, study_uid, frame_uid = (generate_uid() for _ in range(3))
        for index in range(slices):
            inside = body * (40 + 60 * np.sin(6 * xx + index / 9) * np.cos(5 * yy + number)) - 1000 * (1 - body)
            pixels = np.rint(inside + rng.normal(0, 12, inside.shape) + 1024).clip(0, 4095).astype(np.int16)
            header = _header(pixels, index, number, series_uid, study_uid, frame_uid)
            _save(header, folder / f"s{number:02d}" / f"i{(index * 37) % slices:04d}.dcm", syntax)


def _header(pixels: Any, index: int, number: int, series: str, study: str, frame: str) -> Any:
    from pydicom import Dataset, FileMetaDataset, Sequence
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]
    header.StudyDate = header.SeriesDate = header.AcquisitionDate = header.ContentDate = "20260102"
    header.StudyTime = header.SeriesTime = "101500"
    header.AcquisitionTime = header.ContentTime = f"1015{index % 60:02d}.5"
    header.AccessionNumber, header.Modality, header.Manufacturer = f"A{number}", "CT", "Maker"
    header.InstitutionName, header.StationName, header.ManufacturerModelName = "Hospital", "CT1", "Model 64"
    header.StudyDescription, header.SeriesDescription = "Thorax^Routine", "Thorax 1.0 B31f"
    header.ReferringPhysicianName, header.PatientName, header.PatientID = "DOE^JOHN", f"PATIENT^{number}", f"P{number}"
    header.PatientBirthDate, header.PatientSex, header.PatientAge, header.PatientWeight = "19700101", "F", "056Y", 70
    header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, frame
    header.StudyID, header.SeriesNumber, header.AcquisitionNumber, header.InstanceNumber = "1", 2, 1, index + 1
    header.BodyPartExamined, header.ScanOptions, header.KVP, header.SliceThickness = "CHEST", "SPI", 120, 1.0
    header.DataCollectionDiameter, header.ReconstructionDiameter, header.GantryDetectorTilt = 500, 350, 0
    header.TableHeight, header.RotationDirection, header.ExposureTime, header.XRayTubeCurrent = 150, "CW", 500, 200
    header.Exposure, header.FilterType, header.GeneratorPower, header.ConvolutionKernel = 100, "0", 24, "B31f"
    header.PatientPosition, header.ProtocolName, header.SoftwareVersions = "HFS", "ThoraxRoutine", "syngo CT"
    header.ImagePositionPatient = [-175.0, -175.0, round(-300.0 + index, 3)]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.SliceLocation, header.PixelSpacing = round(-300.0 + index, 3), [350 / SIDE, 350 / SIDE]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.Rows, header.Columns = pixels.shape
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
    header.WindowCenter, header.WindowWidth, header.RescaleIntercept, header.RescaleSlope = 40, 400, -1024, 1
    header.RescaleType = "HU"
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, study
    header.ReferencedImageSequence = Sequence([item] * 3)
    block = header.private_block(0x0029, "MAKER CSA HEADER", create=True)
    block.add_new(0x10, "OB", bytes(3000))
    block.add_new(0x20, "OB", bytes(1500))
    header.PixelData = pixels.tobytes()
    return header


def _save(header: Any, path: Path, syntax: str) -> None:
    import imagecodecs
    import numpy as np
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless, RLELossless

    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax == "rle":
        header.compress(RLELossless)
    elif syntax == "j2k":
        pixels = np.frombuffer(header.PixelData, "<i2").reshape(header.Rows, header.Columns)
        packed = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", reversible=True)
        header.PixelData = encapsulate([packed])
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = JPEG2000Lossless
    header.save_as(path, enforce_file_format=True)


# ---------------------------------------------------------------------------------------------------- contenders


def run_medtl(source: Path, out: Path, threads: int, gzip: bool = False) -> int:
    """Convert with medtl."""
    from medtl.config import ScansConfig
    from medtl.pseudonyms import Pseudonymiser
    from medtl.scans.convert import convert

    done = convert(source, out, ScansConfig(workers=threads), Pseudonymiser(b"benchmark-key-16"), gzip)
    return len(done.volumes)


def run_floor(source: Path, out: Path, threads: int) -> int:
    """Read every byte of a series and write as many, one series after the other (or two at a time)."""
    from concurrent.futures import ThreadPoolExecutor

    folders = sorted(path for path in source.iterdir() if path.is_dir())

    def copy(folder: Path) -> None:
        paths = sorted(folder.iterdir())
        buffer = bytearray(sum(path.stat().st_size for path in paths))
        view, at = memoryview(buffer), 0
        for path in paths:
            with path.open("rb", buffering=0) as stream:
                at += stream.readinto(view[at:])
        with (out / f"{folder.name}.bin").open("wb", buffering=0) as stream:
            stream.write(view[:at])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, folders))
    return len(folders)


def run_simpleitk(source: Path, out: Path) -> int:
    """Convert with SimpleITK's series reader."""
    import SimpleITK

    count = 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        for series in SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series))
            SimpleITK.WriteImage(reader.Execute(), str(out / f"{folder.name}-{count}.nii"))
            count += 1
    return count


def run_monai(source: Path, out: Path) -> int:
    """Convert with MONAI's LoadImage (PydicomReader) and SaveImage's writer."""
    from monai.data import NibabelWriter
    from monai.transforms import LoadImage

    load, count = LoadImage(reader="PydicomReader", image_only=True), 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        image = load(str(folder))
        writer = NibabelWriter(output_dtype="int16")
        writer.set_data_array(image, channel_dim=None)
        writer.set_metadata({"affine": image.affine, "original_affine": image.affine})
        writer.write(str(out / f"{folder.name}.nii"))
        count += 1
    return count


def _dcm2niix() -> str | None:
    beside = Path(sys.executable).with_name("dcm2niix")
    return str(beside) if beside.exists() else shutil.which("dcm2niix")


def contenders(case: str, quick: bool) -> dict[str, tuple[Sequence[str], int]]:
    """Name the commands of one case, and how many series each converts (0: all)."""
    rows: dict[str, tuple[Sequence[str], int]] = {
        "medtl, one thread": ((*PYTHON, "medtl", "1"), 0),
        "medtl, two threads": ((*PYTHON, "medtl", "2"), 0),
    }
    if case == "plain":
        rows["medtl convert, as typed"] = ((sys.executable, "-m", "pipelines.cli", "convert"), 0)
        rows["floor, one thread"] = ((*PYTHON, "floor", "1"), 0)
        rows["floor, two threads"] = ((*PYTHON, "floor", "2"), 0)
    niix = _dcm2niix()
    if niix:
        rows["dcm2niix"] = ((niix, "-z", "n", "-b", "n", "-f", "%j"), 0)
    rows["SimpleITK"] = ((*PYTHON, "simpleitk", "1"), 4 if case == "rle" else 0)  # of RLE it reads few files a second
    if case == "plain" and not quick:
        rows["MONAI LoadImage"] = ((*PYTHON, "monai", "1"), 2)
    if case == "plain" and niix:
        rows["medtl .nii.gz"] = ((*PYTHON, "medtl-gz", "2"), 4)
        rows["dcm2niix .nii.gz"] = ((niix, "-z", "y", "-b", "n", "-f", "%j"), 4)
        rows["dcm2niix .nii.gz -1"] = ((niix, "-z", "y", "-1", "-b", "n", "-f", "%j"), 4)
    return rows


class Library:
    """A contender whose process lives through all rounds."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self, source: Path, out: Path) -> float:
        """Convert once; give the seconds."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{json.dumps([str(source), str(out)])}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(TOOK):
                return float(line.removeprefix(TOOK))
        raise SystemExit(f"{' '.join(map(str, self.command))} ended; without it the table is no use")

    def peak_mb(self) -> float:
        """End the process; give the most memory that it had."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return used.ru_maxrss / 1024


class Program:
    """A contender that is started in every round."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command, self.peak = command, 0.0

    def __call__(self, source: Path, out: Path) -> float:
        """Convert once; give the seconds."""
        niix = Path(self.command[0]).name == "dcm2niix"
        arguments = [*self.command, "-o", str(out), str(source)] if niix else [*self.command, str(source), str(out)]
        started = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            words = " ".join(map(str, self.command))
            raise SystemExit(f"{words} failed ({process.returncode}); without it the table is no use")
        self.peak = max(self.peak, used.ru_maxrss / 1024)
        return seconds

    def peak_mb(self) -> float:
        """Give the most memory that it had in any round."""
        return self.peak


def measure(case: str, source: Path, root: Path, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Run every contender, interleaved; give files per second, peak memory and bytes."""
    series = sorted(path for path in source.iterdir() if path.is_dir())
    some: dict[int, Path] = {0: source}
    for count in {limit for _, limit in contenders(case, quick).values() if limit}:
        some[count] = root / f"first{count}"
        some[count].mkdir(exist_ok=True)
        for folder in series[:count]:
            if not (some[count] / folder.name).exists():
                shutil.copytree(folder, some[count] / folder.name, copy_function=os.link)
    all_of_them = contenders(case, quick)
    started: dict[str, Library | Program] = {
        name: Library(command) if command[: len(PYTHON)] == PYTHON else Program(command)
        for name, (command, _) in all_of_them.items()
    }
    runs: dict[str, list[float]] = {}
    written: dict[str, int] = {}
    out = root / "out"
    for repeat in range(repeats + 1):
        for name in random.Random(repeat).sample(list(all_of_them), len(all_of_them)):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()  # what the one before wrote is not to be paid by this one
            seconds = started[name](some[all_of_them[name][1]], out)
            if repeat or quick:
                runs.setdefault(name, []).append(seconds)
            written[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    rows = []
    for name, (_, limit) in all_of_them.items():
        files = sum(1 for path in some[limit].rglob("*") if path.is_file())
        rows.append(
            {
                "case": case,
                "name": name,
                "median": files / median(runs[name]),
                "unit": "files/s",
                "peak_mb": started[name].peak_mb(),
                "bytes": written[name],
            }
        )
    best = next(row["median"] for row in rows if row["name"] == "medtl, two threads")
    return [{**row, "ratio": best / row["median"]} for row in rows]


def measure_second(source: Path, root: Path, repeats: int) -> list[dict[str, Any]]:
    """Ingest a folder into a workspace, once more unchanged, and once more with one file added."""
    from medtl.artifacts import Store
    from medtl.config import ScansConfig
    from medtl.pseudonyms import Pseudonymiser
    from medtl.scans.intake import ingest
    from medtl.scans.sources import SourceIndex, survey

    names, config, store = Pseudonymiser(b"benchmark-key-16"), ScansConfig(), Store(root / "workspace")
    spent: dict[str, list[float]] = {}
    time.sleep(max(0.0, 3 - (time.time() - max(path.stat().st_ctime for path in source.rglob("*")))))

    def take(case: str) -> None:
        out = root / f"scans{sum(map(len, spent.values()))}"
        out.mkdir()
        started = time.perf_counter()
        files = survey(source, config, index=SourceIndex(root / "index", names))
        ingest(files, config, names, out, store)
        spent.setdefault(case, []).append(time.perf_counter() - started)

    take("medtl, first ingest")
    for _ in range(repeats):
        take("medtl, second ingest, unchanged")
    extra = source / "one-more"
    shutil.copytree(next(path for path in sorted(source.iterdir()) if path.is_dir()), extra)
    for path in sorted(extra.iterdir())[1:]:
        path.unlink()
    time.sleep(3)
    take("medtl, one file more")
    shutil.rmtree(extra)
    base = median(spent["medtl, second ingest, unchanged"])
    return [
        {
            "case": "again",
            "name": name,
            "median": median(s),
            "unit": "s",
            "ratio": median(s) / base,
            "peak_mb": 0,
            "bytes": 0,
        }
        for name, s in spent.items()
    ]


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own: a contender begins with the memory of the one that started it, as Linux counts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a case as a table."""
    from rich.console import Console
    from rich.table import Table

    rate = rows[0]["unit"] == "files/s"
    last = "medtl (two threads) is faster by" if rate else "of a second ingest"
    table = Table("contender", rows[0]["unit"], last, "peak MB", "MB written", title=title)
    for row in rows:
        memory, written = (f"{row['peak_mb']:,.0f}", f"{row['bytes'] / 1e6:,.0f}") if rate else ("-", "-")
        table.add_row(row["name"], f"{row['median']:,.{0 if rate else 2}f}", f"{row['ratio']:,.2f}x", memory, written)
    Console().print(table)


def child(name: str, threads: int) -> None:
    """Be one contender that is a library: convert what standard input names, line by line."""
    work: dict[str, Callable[[Path, Path], int]] = {
        "medtl": lambda source, out: run_medtl(source, out, threads),
        "medtl-gz": lambda source, out: run_medtl(source, out, threads, gzip=True),
        "floor": lambda source, out: run_floor(source, out, threads),
        "simpleitk": run_simpleitk,
        "monai": run_monai,
    }
    for line in sys.stdin:
        source, out = map(Path, json.loads(line))
        started = time.perf_counter()
        work[name](source, out)
        print(f"{TOOK}{time.perf_counter() - started}", flush=True)


def main() -> None:
    """Run, print the tables, and the figures for machines."""
    if sys.argv[1:2] == ["--run"]:
        child(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="few small series, one round: to see that it works")
    parser.add_argument("--source", type=Path, help="real series to convert too: a folder of folders")
    parser.add_argument("--cases", default="plain,rle,j2k", help="which generated sets")
    arguments = parser.parse_args()
    series, slices, repeats = (2, 12, 1) if arguments.quick else (SERIES, SLICES, 5)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for case in filter(None, arguments.cases.split(",")):
            few = max(2, series // 5) if case == "j2k" else series
            apart(write_series, root / case, few, slices, SIDE, case)
            found = measure(case, root / case, root, repeats, arguments.quick)
            show(f"{few} CT series x {slices} slices, {SIDE} x {SIDE}, int16, {case}", found)
            if case == "plain":
                again = apart(measure_second, root / case, root, repeats)
                show(f"the same {few * slices} files into a workspace", again)
                found += again
            rows += found
            shutil.rmtree(root / case)
        if arguments.source:
            rows += measure("real", arguments.source, root, repeats, arguments.quick)
            show(f"real series in {arguments.source.name}", [row for row in rows if row["case"] == "real"])
    if arguments.json:
        print(json.dumps({"benchmark": "ingest", "rows": rows}))


if __name__ == "__main__":
    main()
