"""Planted copies of real pictures: what tells them, by pictures alone, by a network's features too, and by the peer.

Pictures of different people are taken from a set. Five of them, five times other ones, are copied in each of thirteen
ways and given to somebody who does not exist: copies are few, as they are in a real cohort. Counted are those that are
paired with their original, and pairs of two real people. The peer is imagehash's `phash`, at most 8 bits apart.

    python benchmarks/leaks.py --data FOLDER --weights FILE [--sets malaria ...] [--images 800] [--json]

FOLDER holds ``malaria/``, ``ham10000/`` and ``pneumoniamnist/`` with the public files that the configs name; FILE is
torchvision's checkpoint of squeezenet1_0.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from medtl.artifacts import file_digest
from medtl.dataset.leaks import bounds_of, fingerprint_scans, near_duplicates
from medtl.dataset.lookalikes import SIDE, near_by_features, thumbnail
from medtl.model.features import describe
from medtl.model.io import build_network
from medtl.model.surgery import StagedNetwork
from medtl.model.vault import WeightsFile
from medtl.records import AnyArray, Scan

OWNER = {"malaria": "patient", "ham10000": "lesion"}  # column of the label table; chest films have none
ROUNDS, COPIES, BITS = 5, 5, 8  # copies of each kind in a round; bits of a hash
HOW = ("pictures", "with features", "phash")
Pairs = set[tuple[int, int]]


def encoded(pixels: AnyArray, quality: int) -> AnyArray:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], -1))


def cropped(pixels: AnyArray, share: float) -> AnyArray:
    """Take half the share off every side."""
    rows, columns = (int(side * share / 2) for side in pixels.shape[:2])
    return pixels[rows : pixels.shape[0] - rows, columns : pixels.shape[1] - columns]


def turned(pixels: AnyArray, degrees: float) -> AnyArray:
    rows, columns = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D((columns / 2, rows / 2), degrees, 1)
    return np.asarray(cv2.warpAffine(pixels, matrix, (columns, rows), borderMode=cv2.BORDER_REFLECT_101))


def shown(pixels: AnyArray, slope: float, shift: float) -> AnyArray:
    return np.clip(pixels * slope + shift, 0, 255).astype(np.uint8)


def noisy(pixels: AnyArray) -> AnyArray:
    return shown(pixels + np.random.default_rng(1).normal(0, 12, pixels.shape), 1, 0)


WAYS: dict[str, Callable[[AnyArray], AnyArray]] = {
    "JPEG 30": lambda p: encoded(p, 30),
    "0.6 of the size": lambda p: np.asarray(cv2.resize(p, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)),
    "crop 5 %": lambda p: cropped(p, 0.05),
    "crop 10 %": lambda p: cropped(p, 0.10),
    "crop 20 %": lambda p: cropped(p, 0.20),
    "contrast": lambda p: shown(p, 1.3, -20),
    "mirrored": lambda p: np.ascontiguousarray(p[:, ::-1]),
    "90 degrees": lambda p: np.ascontiguousarray(np.rot90(p)),
    "5 degrees": lambda p: turned(p, 5),
    "10 degrees": lambda p: turned(p, 10),
    "noise": noisy,
    "blur": lambda p: np.asarray(cv2.GaussianBlur(p, (0, 0), max(p.shape) / 80)),
    "crop, contrast, JPEG": lambda p: encoded(shown(cropped(p, 0.06), 1.2, -10), 50),
}


def pictures_of(folder: Path, name: str, count: int) -> tuple[list[AnyArray], list[int]]:
    """Read some pictures of a set and number their owners."""
    rng = np.random.default_rng(0)
    if name not in OWNER:
        (file,) = sorted((folder / name).glob("*.npz"))
        images = np.load(file)["train_images"]
        chosen = rng.permutation(len(images))[:count]
        return list(images[chosen]), list(range(len(chosen)))
    with (folder / name / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    chosen = rng.permutation(len(rows))[:count]
    pictures = [np.asarray(Image.open(folder / name / rows[n]["image"])) for n in chosen]
    owners = np.unique([rows[n][OWNER[name]] for n in chosen], return_inverse=True)[1]
    return pictures, owners.tolist()


def hashed(pictures: list[AnyArray], owners: AnyArray) -> Pairs:
    """Pair what the peer's perceptual hash takes for the same."""
    bits = np.stack([imagehash.phash(Image.fromarray(picture)).hash.ravel() for picture in pictures]).astype(np.float32)
    different = bits @ (1 - bits).T
    return as_pairs(np.argwhere(np.triu(different + different.T <= BITS, 1) & (owners[:, None] != owners)))


def measure(folder: Path, name: str, count: int, weights: Path, threads: int) -> dict[str, Any]:
    """Plant copies in a set, some at a time, and look for them in three ways."""
    real, people = pictures_of(folder, name, count)
    hits: dict[str, Counter[str]] = {how: Counter() for how in HOW}
    false, seconds = Counter(dict.fromkeys(HOW, 0)), Counter(dict.fromkeys(HOW, 0.0))
    network, _ = build_network(
        "squeezenet1_0", SIDE, 3, 1, 0.0, WeightsFile(weights, file_digest(weights), weights.name), 0.9, 0
    )
    for number in range(ROUNDS):
        rng = np.random.default_rng(number)
        planted = [(way, int(one)) for way in WAYS for one in rng.permutation(len(real))[:COPIES]]
        pictures = real + [WAYS[way](real[one]) for way, one in planted]
        owners = np.array([*people, *range(len(real), len(pictures))])
        for how, (pairs, taken) in look(pictures, owners, network, threads).items():
            hits[how].update(way for n, (way, one) in enumerate(planted) if (one, len(real) + n) in pairs)
            false[how] += sum(other < len(real) for _, other in pairs)
            seconds[how] += taken / ROUNDS
    share = {how: {way: hits[how][way] / (ROUNDS * COPIES) for way in WAYS} for how in HOW}
    false = {how: false[how] / ROUNDS for how in HOW}
    return {
        "images": len(real),
        "copies": ROUNDS * COPIES * len(WAYS),
        "found": share,
        "false": false,
        "seconds": seconds,
    }


def look(
    pictures: list[AnyArray], owners: AnyArray, network: StagedNetwork, threads: int
) -> dict[str, tuple[Pairs, float]]:
    """Pair pictures in three ways; give the pairs, and the seconds that each way takes."""
    scans = [Scan(f"{n}", "image", p.shape, p.dtype.str, f"{n:08d}", (), 8) for n, p in enumerate(pictures)]
    times = [time.perf_counter()]
    prints = fingerprint_scans(scans, lambda scan: pictures[int(scan.pixel_digest)], threads)
    alone = as_pairs(near_duplicates(prints.spectra, owners, bounds_of(prints.spectra, owners), threads))
    times.append(time.perf_counter())
    small = np.stack([thumbnail(pixels, scan) for pixels, scan in zip(pictures, scans, strict=True)])
    more, _ = near_by_features(describe(network, small, torch.device("cpu")), prints, owners, threads)
    times.append(time.perf_counter())
    peer = hashed(pictures, owners)
    times.append(time.perf_counter())
    return {
        "pictures": (alone, times[1] - times[0]),
        "with features": (alone | as_pairs(more), times[2] - times[0]),
        "phash": (peer, times[3] - times[2]),
    }


def as_pairs(rows: AnyArray) -> Pairs:
    return {(int(one), int(other)) for one, other in rows}


def main() -> None:
    """Measure every set and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of torchvision's squeezenet1_0")
    parser.add_argument("--sets", nargs="+", choices=[*OWNER, "pneumoniamnist"], default=list(OWNER))
    parser.add_argument("--images", type=int, default=800, help="of each set, before copies are planted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = {name: measure(given.data, name, given.images, given.weights, given.threads) for name in given.sets}
    table = Table("copy", *(f"{name}: {how}" for name in found for how in HOW))
    shares = [one["found"][how] for one in found.values() for how in HOW]
    for way in WAYS:
        table.add_row(way, *(f"{share[way]:.2f}" for share in shares))
    table.add_row("all", *(f"{np.mean(list(share.values())):.2f}" for share in shares))
    for what in ("false", "seconds"):
        table.add_row(what, *(f"{one[what][how]:.1f}" for one in found.values() for how in HOW))
    Console().print(table)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
