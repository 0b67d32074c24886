"""The header pass: every file of a CT series read as far as a volume needs it, ours against pydicom.

Files as scanners write them: about 120 elements, sequences, private elements and a private block of 6 kB; they lie in
memory, so that parsing is compared and not the disk. `pydicom` is `dcmread(stop_before_pixels=True)` alone, which reads
no value; `pydicom, values` also asks for the values that ours gives. One process, one thread, contenders interleaved,
warm-up dropped, median of five.

    python benchmarks/headers.py [--json] [--quick] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pydicom
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rich.console import Console
from rich.table import Table

from medtl.scans.headers import ATTRIBUTES, read_doubtful_header, read_header

START = 32 * 1024
ASKED = tuple(
    keyword for keyword, (group, element, _) in ATTRIBUTES.items() if not group % 2 and (group, element) < (0x5200, 0)
)


def write_series(count: int) -> list[bytes]:
    """Make a CT series with headers as long as real ones, without pixels worth reading."""
    series, study = generate_uid(entropy_srcs=["series"]), generate_uid(entropy_srcs=["study"])
    return [_slice(number, series, study) for number in range(count)]


def _slice(number: int, series: str, study: str) -> bytes:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID, made.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    uid = generate_uid(entropy_srcs=[str(number)])
    made.SOPClassUID, made.SOPInstanceUID, made.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, uid, uid
    made.SeriesInstanceUID, made.StudyInstanceUID, made.FrameOfReferenceUID = series, study, study + ".1"
    made.ImageType, made.Modality, made.Manufacturer = ["ORIGINAL", "PRIMARY", "AXIAL"], "CT", "Maker"
    made.PatientID, made.PatientName, made.PatientSex, made.PatientAge = "ID-1", "DOE^JANE", "F", "045Y"
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 512, 512, 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.ImagePositionPatient, made.ImageOrientationPatient = [-180.25, -171.5, 1.25 * number], [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.SliceThickness, made.InstanceNumber = [0.703125, 0.703125], 1.25, number + 1
    made.RescaleSlope, made.RescaleIntercept, made.WindowCenter, made.WindowWidth = 1, -1024, [40, 400], [80, 2000]
    made.SliceLocation, made.AcquisitionNumber, made.GantryDetectorTilt = 1.25 * number, 1, 0
    for keyword in _DATES_AND_TEXT:
        setattr(made, keyword, {"Date": "20260102", "Time": "101112.345"}.get(keyword[-4:], "a text of 24 characters "))
    for keyword in _NUMBERS:
        setattr(made, keyword, 120.5)
    for keyword in ("ReferencedImageSequence", "SourceImageSequence", "ReferencedStudySequence"):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
        setattr(made, keyword, [item, item])
    block = made.private_block(0x0043, "MAKER PARAMETERS", create=True)
    for element in range(40):
        block.add_new(0x10 + element, "DS", "12.5")
    block.add_new(0x80, "OB", bytes(6000))
    made.PixelData = bytes(512 * 512 * 2)
    made["PixelData"].VR = "OW"
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


_DATES_AND_TEXT = (
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "StudyTime", "SeriesTime", "AcquisitionTime",
    "ContentTime", "InstitutionName", "StationName", "StudyDescription", "SeriesDescription", "ProtocolName",
    "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber", "BodyPartExamined", "ConvolutionKernel",
)  # fmt: skip
_NUMBERS = (
    "KVP", "DataCollectionDiameter", "ReconstructionDiameter", "DistanceSourceToDetector", "DistanceSourceToPatient",
    "TableHeight", "ExposureTime", "XRayTubeCurrent", "Exposure", "GeneratorPower", "FocalSpots",
    "SingleCollimationWidth", "TotalCollimationWidth", "TableSpeed", "SpiralPitchFactor", "PatientWeight",
)  # fmt: skip


def ours(start: bytes, data: bytes) -> None:
    """Read and check a header from the start of the file."""
    read_header(start, len(data), lambda: data)


def ours_doubtful(_: bytes, data: bytes) -> None:
    """Read and check a header as if it were not understood at first sight."""
    read_doubtful_header(data)


def pydicom_alone(_: bytes, data: bytes) -> None:
    """Let pydicom pass the elements; no value is converted."""
    pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)


def pydicom_values(_: bytes, data: bytes) -> None:
    """Let pydicom pass the elements and convert those that a volume needs."""
    read = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    for keyword in ASKED:
        read.get(keyword)


CONTENDERS: dict[str, Callable[[bytes, bytes], None]] = {
    "medtl": ours,
    "medtl, doubtful files": ours_doubtful,
    "pydicom": pydicom_alone,
    "pydicom, values": pydicom_values,
}


def measure(files: Sequence[bytes], repeats: int) -> dict[str, float]:
    """Give each contender's microseconds per file: interleaved, warm-up dropped, median."""
    both = [(data[:START], data) for data in files]
    spent: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for repeat in range(repeats + 1):
        for name, read in CONTENDERS.items():
            started = time.perf_counter()
            for start, data in both:
                read(start, data)
            if repeat:
                spent[name].append((time.perf_counter() - started) / len(files) * 1e6)
    return {name: median(values) for name, values in spent.items()}


def main() -> None:
    """Run, print the table, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="few files, one repeat: to see that it works")
    parser.add_argument("--folder", type=Path, help="also every DICOM file of this folder that both read")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sets = {"generated CT series": write_series(10 if arguments.quick else 120)}
    if arguments.folder is not None:
        real = [path.read_bytes() for path in sorted(arguments.folder.rglob("*")) if path.is_file()]
        sets["real files"] = [data for data in real if data[128:132] == b"DICM" and _read_by_all(data)]
    rows: list[dict[str, Any]] = []
    for label, files in sets.items():
        times = measure(files, 1 if arguments.quick else 5)
        table = Table("contender", "µs per file", "medtl is faster by", title=f"header pass, {label}, {len(files)}")
        for name, spent in times.items():
            ratio = spent / times["medtl"]
            table.add_row(name, f"{spent:,.0f}", f"{ratio:,.1f}x")
            rows.append({"name": name, "case": label, "median": spent, "unit": "us/file", "ratio": ratio})
        Console().print(table)
    if arguments.json:
        print(json.dumps({"benchmark": "headers", "files": {n: len(f) for n, f in sets.items()}, "rows": rows}))


def _read_by_all(data: bytes) -> bool:
    try:
        for read in CONTENDERS.values():
            read(data[:START], data)
    except Exception:  # a file that one of them refuses is not compared
        return False
    return True


if __name__ == "__main__":
    main()
