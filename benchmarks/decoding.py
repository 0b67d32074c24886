"""Compressed frames: medtl's decoding process against the plugins of pydicom, codec by codec.

A CT-like series of 512 x 512 slices, encoded once per transfer syntax. medtl reads the files, decodes in its child
process with two threads and writes the volume to disk; `decode_frame` is one thread of the same, in memory; pydicom's
plugins decode in memory, one thread, from the same codestreams. Wall time, contenders interleaved, median of three.

    python benchmarks/decoding.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import logging
import struct
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.encoders.base import get_encoder
from pydicom.uid import UID, RLELossless
from rich.console import Console
from rich.table import Table

from medtl.scans.decoding import DecodingPool, FrameFormat, FrameJob, decode_frame

Slice = npt.NDArray[np.uint16]
Ways = dict[str, Callable[[], object]]
END = struct.pack("<II", 0xE0DDFFFE, 0)


def ct_like(count: int, size: int) -> list[Slice]:
    """Draw a body in air: smooth inside, with noise everywhere."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size - 0.5
    body = (x / 0.4) ** 2 + (y / 0.3) ** 2 < 1
    slices = []
    for n in range(count):
        inside = 1064 + 300 * np.exp(-((x - n / 400) ** 2 + y**2) * 30) + rng.normal(0, 12, x.shape)
        slices.append(np.where(body, inside, 24 + rng.normal(0, 6, x.shape)).clip(0).astype(np.uint16))
    return slices


def rle(values: Slice) -> bytes:
    rows, columns = values.shape
    encoded = get_encoder(RLELossless).encode(
        values,
        rows=rows,
        columns=columns,
        samples_per_pixel=1,
        bits_allocated=16,
        bits_stored=16,
        pixel_representation=0,
        photometric_interpretation="MONOCHROME2",
        number_of_frames=1,
        encoding_plugin="pydicom",
    )
    return bytes(encoded)


CODECS: dict[str, tuple[str, Callable[[Slice], bytes]]] = {
    "RLE": ("1.2.840.10008.1.2.5", rle),
    "JPEG 2000": (
        "1.2.840.10008.1.2.4.90",
        lambda s: bytes(imagecodecs.jpeg2k_encode(s, level=0, codecformat="j2k", reversible=True)),
    ),
    "HTJ2K": ("1.2.840.10008.1.2.4.201", lambda s: bytes(imagecodecs.htj2k_encode(s, reversible=True))),
    "JPEG-LS": ("1.2.840.10008.1.2.4.80", lambda s: bytes(imagecodecs.jpegls_encode(s))),
    "JPEG lossless": (
        "1.2.840.10008.1.2.4.70",
        lambda s: bytes(imagecodecs.jpeg8_encode(s, lossless=True, predictor=1)),
    ),
}


def contenders(folder: Path, kind: FrameFormat, streams: list[bytes], pool: DecodingPool) -> Ways:
    """Name the ways from codestreams to arrays; each takes nothing and decodes all."""
    jobs, output = [], folder / "volume"
    for n, stream in enumerate(streams):
        path = folder / f"{n}.dcm"
        path.write_bytes(encapsulate([stream]) + END)
        jobs.append(FrameJob(path, path.stat().st_size, 0, 1, 0, kind, n * kind.nbytes))

    def ours() -> None:
        with output.open("wb") as file:
            file.truncate(kind.nbytes * len(jobs))
        if any(pool.decode(jobs, output)):
            raise SystemExit("a frame of the benchmark's own was refused")

    options: dict[str, Any] = {
        "number_of_frames": 1,
        "rows": kind.rows,
        "columns": kind.columns,
        "samples_per_pixel": 1,
        "bits_allocated": 16,
        "bits_stored": 16,
        "pixel_representation": 0,
        "photometric_interpretation": "MONOCHROME2",
        "pixel_keyword": "PixelData",
    }
    decoder = get_decoder(UID(kind.transfer_syntax))
    sources = [encapsulate([stream]) for stream in streams]

    def plugin(name: str) -> Callable[[], object]:
        return lambda: [decoder.as_array(source, decoding_plugin=name, **options) for source in sources]

    found: Ways = {"medtl, two threads in a child": ours}
    found["decode_frame, one thread"] = lambda: [decode_frame(stream, kind) for stream in streams]
    found |= {f"pydicom with {name}": plugin(name) for name in decoder.available_plugins}
    return found


def rates(ways: Ways, frames: int, repeats: int) -> dict[str, float]:
    """Measure frames per second, interleaved; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, act in ways.items():
            start = time.perf_counter()
            act()
            seconds[name].append(time.perf_counter() - start)
    return {name: frames / median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    """Run, print the tables, and the figures for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.add_argument("--quick", action="store_true", help="small slices, one repeat: to see that it works")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    count, size, repeats = (4, 128, 1) if arguments.quick else (40, 512, 3)
    slices = ct_like(count, size)
    rows: list[dict[str, Any]] = []
    with DecodingPool() as pool:
        for codec, (syntax, encode) in CODECS.items():
            kind = FrameFormat(syntax, size, size, 1, 16, 16, False, "MONOCHROME2")
            with tempfile.TemporaryDirectory() as folder:
                ways = contenders(Path(folder), kind, [encode(s) for s in slices], pool)
                found = rates(ways, count, repeats)
            table = Table("contender", "frames/s", "medtl is faster by", title=f"{codec}, {size} x {size} x 16 bit")
            ours = next(iter(found.values()))
            for name, rate in found.items():
                table.add_row(name, f"{rate:,.0f}", f"{ours / rate:,.2f}x")
                rows.append({"name": name, "case": codec, "median": rate, "unit": "frames/s", "ratio": ours / rate})
            Console().print(table)
    if arguments.json:
        print(json.dumps({"benchmark": "decoding", "slices": count, "rows": rows}))


if __name__ == "__main__":
    main()
