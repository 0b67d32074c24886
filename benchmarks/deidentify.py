"""De-identification: what `medtl deidentify` runs against pydicom with the same rules, gdcmanon and copying the files.

A generated set of CT slices (512 x 512, 16 bit, realistic headers with private elements and nested references), or a
folder of real files. medtl is `hand_over` as a whole, with its listing, temporary names, records and a key it has not
seen before, on one thread and on two; copying is `cp -r`, and a loop over the files on one thread and on two. Page
cache warm; what was written before is on the disk before a contender starts; the order is another in every repeat;
median of the repeats. pydicom applies medtl's own table; gdcmanon (where it is installed) is given ten rules only, so
that its ratio is conservative.

    python benchmarks/deidentify.py [--json] [--quick] [--folder DICOM]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from statistics import median

import numpy as np
import pydicom
from pydicom._uid_dict import UID_dictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, generate_uid
from rich.console import Console
from rich.table import Table

from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.deidentify import deidentified
from medtl.scans.handover import hand_over
from medtl.scans.profile import Action, Profile, Rules, profile

NAMES, RULES = Pseudonymiser(b"a key of this benchmark"), Rules()
NUMBERS = (
    "SliceThickness KVP DataCollectionDiameter ReconstructionDiameter GantryDetectorTilt TableHeight ExposureTime "
    "XRayTubeCurrent Exposure GeneratorPower FocalSpots SeriesNumber AcquisitionNumber InstanceNumber SliceLocation "
    "WindowCenter WindowWidth RescaleIntercept RescaleSlope DistanceSourceToDetector DistanceSourceToPatient"
)
GDCM_RULES = ["--empty", "10,10", "--empty", "10,30", "--empty", "8,50", "--empty", "8,90", "--empty", "8,20"]
GDCM_RULES += [
    "--remove",
    "8,80",
    "--remove",
    "8,81",
    "--remove",
    "8,1070",
    "--remove",
    "8,103e",
    "--remove",
    "10,1010",
]


def write_series(folder: Path, count: int) -> None:
    """Write CT slices with about a hundred elements each."""
    pixels = np.random.default_rng(0).integers(-1000, 2000, (512, 512), dtype=np.int16).tobytes()
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for number in range(count):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1")
        uid = generate_uid()
        texts = {
            "SpecificCharacterSet": "ISO_IR 100",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
            "SOPInstanceUID": uid,
            "AccessionNumber": "A123",
            "Modality": "CT",
            "Manufacturer": "MAKER",
            "InstitutionName": "HOSPITAL",
            "ReferringPhysicianName": "Doe^John",
            "StationName": "CT1",
            "StudyDescription": "Chest",
            "SeriesDescription": "Lung",
            "OperatorsName": "Roe^Jane",
            "ManufacturerModelName": "Model",
            "PatientName": "Poe^Ann",
            "PatientID": "4711",
            "PatientBirthDate": "19600101",
            "PatientSex": "F",
            "PatientAge": "064Y",
            "BodyPartExamined": "CHEST",
            "ProtocolName": "Thorax",
            "DeviceSerialNumber": "998",
            "PatientPosition": "HFS",
            "StudyInstanceUID": study,
            "SeriesInstanceUID": series,
            "FrameOfReferenceUID": frame,
            "PhotometricInterpretation": "MONOCHROME2",
            "ImagePositionPatient": [0, 0, number],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.7, 0.7],
        }
        for when in ("Study", "Series", "Acquisition", "Content", "InstanceCreation"):
            texts |= {f"{when}Date": "20240229", f"{when}Time": "101112.5"}
        numbers = dict.fromkeys(NUMBERS.split(), 1)
        shape = {"SamplesPerPixel": 1, "Rows": 512, "Columns": 512, "BitsAllocated": 16, "BitsStored": 16}
        for keyword, value in (texts | numbers | shape | {"HighBit": 15, "PixelRepresentation": 1}).items():
            setattr(dataset, keyword, value)
        references = []
        for _ in range(3):
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = texts["SOPClassUID"], generate_uid()
            references.append(item)
        dataset.ReferencedImageSequence = references
        block = dataset.private_block(0x0019, "MAKER PRIVATE", create=True)
        for element in range(20):
            block.add_new(element, "LO", f"value {element}")
        dataset.add_new("PixelData", "OW", pixels)
        dataset.save_as(folder / f"{number:05d}.dcm", enforce_file_format=True)


def hand_over_files(folder: Path, out: Path, threads: int) -> Callable[[], None]:
    """De-identify with a new key each time: nothing is remembered from the last repeat."""

    def run() -> None:
        done = hand_over(folder, out, ScansConfig(workers=threads), Pseudonymiser(os.urandom(32)))
        if done.refused:
            raise SystemExit(f"{len(done.refused)} files were refused: no comparison")

    return run


def copy_files(files: list[Path], out: Path, threads: int) -> Callable[[], None]:
    def copy(some: list[Path]) -> None:
        for path in some:
            shutil.copyfile(path, out / path.name)

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(copy, [files[at : at + 32] for at in range(0, len(files), 32)]))

    return run


def pydicom_file(source: Path, target: Path) -> None:
    dataset = pydicom.dcmread(source)
    patient = str(dataset.get("PatientID") or "")
    name, days = NAMES.name("patient", patient), NAMES.days(patient)
    apply_rules(dataset, profile(RULES), name, days)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.preamble = b"\0" * 128
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "benchmark"
    dataset.save_as(target)


def apply_rules(dataset: Dataset, rules: Profile, name: str, days: int, nested: bool = False) -> None:
    """Apply medtl's table the way a pydicom script does: element by element, items included."""
    for tag in list(dataset.keys()):
        raw = dataset.get_item(tag)
        vr = raw.VR or rules.vr(int(tag))
        action = rules.action(int(tag), vr)
        if action in (Action.KEEP, Action.PIXELS, Action.CHECK, Action.AGE):
            continue
        if action in (Action.DROP, Action.PRIVATE, Action.OVERLAY_BIT):
            del dataset[tag]
            continue
        element = dataset[tag]
        if action in (Action.WALK, Action.SCRUB):
            for item in element.value:
                apply_rules(item, rules, name, days, nested=True)
        elif action == Action.UID:
            values = element.value if element.VM > 1 else [element.value]
            element.value = [uid if uid in UID_dictionary else NAMES.uid(str(uid)) for uid in values]
        elif action == Action.DATE and element.value:
            text = str(element.value)
            day = date(int(text[:4]), int(text[4:6]), int(text[6:8])) - timedelta(days=days)
            element.value = day.strftime("%Y%m%d") + text[8:]
        elif action in (Action.NAME, Action.PATIENT):
            element.value = "" if nested and action == Action.NAME else name
        else:
            dataset[tag] = DataElement(tag, vr, "REMOVED" if action == Action.DUMMY and vr != "SQ" else None)


def pydicom_files(files: list[Path], out: Path) -> Callable[[], None]:
    def run() -> None:
        for path in files:
            pydicom_file(path, out / path.name)

    return run


def command(*words: str) -> Callable[[], None]:
    return lambda: void(subprocess.run(words, check=True, capture_output=True))


def gdcmanon(program: str, folder: Path, out: Path) -> Callable[[], None]:
    return command(program, "--dumb", "--continue", "-r", "-i", str(folder), "-o", str(out), *GDCM_RULES)


def void(_: object) -> None:
    return None


def measure(contenders: dict[str, Callable[[], None]], out: Path, repeats: int) -> dict[str, float]:
    """Give the median seconds of each contender, in turns, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repeat in range(repeats + 1):
        for name in random.Random(repeat).sample(names, len(names)):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()  # nobody pays for what the one before wrote
            started = time.perf_counter()
            contenders[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def header_rewrites(files: list[Path]) -> float:
    """Give headers a second that are rewritten in memory, of files that were not seen before."""
    heads = [path.read_bytes() for path in files]
    names = Pseudonymiser(os.urandom(32))
    deidentified(heads[0], names, RULES)
    started = time.perf_counter()
    for data in heads:
        deidentified(data, names, RULES)
    return len(heads) / (time.perf_counter() - started)


def main() -> None:
    """Run, print the table, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="few files, one repeat: to see that it works")
    parser.add_argument("--folder", type=Path, help="real files, all of them plain DICOM, instead of generated ones")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    count, repeats = (12, 1) if arguments.quick else (480, 7)
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "in", Path(temporary) / "out"
        folder.mkdir()
        if arguments.folder is None:
            write_series(folder, count)
        else:
            for number, path in enumerate(sorted(p for p in arguments.folder.rglob("*") if p.is_file())):
                shutil.copyfile(path, folder / f"{number:05d}.dcm")
        files = sorted(folder.iterdir())
        contenders = {
            "medtl, 1 thread": hand_over_files(folder, out, 1),
            "medtl, 2 threads": hand_over_files(folder, out, 2),
            "copy, 1 thread": copy_files(files, out, 1),
            "copy, 2 threads": copy_files(files, out, 2),
            "cp -r": command("cp", "-r", f"{folder}/.", str(out)),
            "pydicom, same rules": pydicom_files(files, out),
        }
        program = shutil.which("gdcmanon")
        if program:
            contenders["gdcmanon, ten rules"] = gdcmanon(program, folder, out)
        header_only = header_rewrites(files)
        seconds = measure(contenders, out, repeats)
    by = ("medtl, 1 thread", "medtl, 2 threads")
    table = Table(
        "contender", "files/s", *(f"{name}: times" for name in by), title=f"De-identification of {len(files)}"
    )
    rows = []
    for name, spent in seconds.items():
        one, two = (spent / seconds[own] for own in by)
        table.add_row(name, f"{len(files) / spent:,.0f}", f"{one:,.2f}x", f"{two:,.2f}x")
        rows.append(
            {"name": name, "median": len(files) / spent, "unit": "files/s", "ratio": two, "ratio_one_thread": one}
        )
    Console().print(table)
    Console().print(f"header rewrite alone, in memory: {header_only:,.0f} files/s")
    if arguments.json:
        print(json.dumps({"benchmark": "deidentify", "files": len(files), "header_only": header_only, "rows": rows}))


if __name__ == "__main__":
    main()
