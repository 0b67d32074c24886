"""What stands on two sides is found, whoever it is called; what only looks alike is not."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from medtl.config import Config, SplitConfig, parse_config
from medtl.dataset.io import read_split
from medtl.dataset.leaks import (
    HASH_ALIKE,
    LOOSEST,
    STRICTEST,
    Bounds,
    Fingerprints,
    bounds_of,
    fingerprint_scans,
    hash_lines,
    hash_of,
    near_duplicates,
    near_in_features,
    near_pairs,
    overlap,
    prove_clean,
    read_hashes,
    require_clean,
)
from medtl.dataset.split import split_cohort
from medtl.errors import SplitError, StorageError, WeightsError
from medtl.model.surgery import source_network
from medtl.records import AnyArray, CleanProof, Cohort, Scan, Split, Study
from pipelines import steps

STRAIGHT = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.2, 0.0), (0.0, 0.0, 0.0, 1.0))


def picture(seed: int, rows: int = 96, columns: int = 112) -> AnyArray:
    """Draw a picture as nature does: the finer the fainter."""
    rng = np.random.default_rng([seed, 77])
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(columns), np.fft.fftfreq(rows)))
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(rows, columns))) / np.maximum(frequency, 0.02) ** 1.5).real
    return np.array(np.clip(128 + 38 * (field - field.mean()) / field.std(), 5, 235), dtype=np.uint8)


def encoded(pixels: AnyArray, quality: int = 60) -> AnyArray:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], -1))


def resized(pixels: AnyArray, share: float) -> AnyArray:
    return np.asarray(cv2.resize(pixels, None, fx=share, fy=share, interpolation=cv2.INTER_AREA))


def recast(pixels: AnyArray) -> AnyArray:
    """Do to a picture what an export does: smaller, brighter, flatter, JPEG."""
    small = resized(pixels, 0.7)
    return encoded(np.clip(small.astype(np.float64) * 0.9 + 20, 0, 255).astype(np.uint8))


def turned(pixels: AnyArray, orientation: int) -> AnyArray:
    rotated = np.rot90(pixels, orientation % 4)
    return np.array(rotated[:, ::-1] if orientation > 3 else rotated)


def prints_of(pictures: list[AnyArray], **fields: Any) -> Fingerprints:
    scans = [
        Scan(f"{n:032d}", "image", p.shape, p.dtype.str, f"{n:04d}{0:028d}", (), 8, **fields)
        for n, p in enumerate(pictures)
    ]
    return fingerprint_scans(scans, lambda scan: pictures[int(scan.pixel_digest[:4])])


def found_in(prints: Fingerprints, owners: list[int] | None = None) -> list[list[int]]:
    own = np.arange(len(prints.digests)) if owners is None else np.array(owners)
    found: list[list[int]] = near_duplicates(prints.spectra, own, bounds_of(prints.spectra, own)).tolist()
    return found


def cohort_of(prints: Fingerprints, patients: list[str] | None = None) -> Cohort:
    named = patients or [f"p-{n}" for n in range(len(prints.digests))]
    studies = [
        Study(f"s-{n:04d}", f"{n:032d}", who, (1 - n % 2, n % 2), digest)
        for n, (digest, who) in enumerate(zip(prints.digests, named, strict=True))
    ]
    return Cohort("binary", ("well", "ill"), tuple(studies))


COPIES: dict[str, Callable[[AnyArray], AnyArray]] = {
    "JPEG": lambda p: encoded(p, 40),
    "smaller": lambda p: resized(p, 0.5),
    "larger": lambda p: np.asarray(cv2.resize(p, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)),
    "brighter": lambda p: (p.astype(np.int16) + 20).clip(0, 255).astype(np.uint8),
    "flatter": lambda p: (p.astype(np.float64) * 0.7 + 30).astype(np.uint8),
    "an export": recast,
    "cropped": lambda p: p[3:-2, 2:-4],
    "16 bits": lambda p: p.astype(np.uint16) * 257,
    "colour": lambda p: np.repeat(p[..., None], 3, axis=2),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_stays_a_copy_whichever_way_it_is_turned(name: str) -> None:
    others = [picture(seed) for seed in range(50)]
    for orientation in range(8):
        copy = turned(COPIES[name](others[orientation]), orientation)
        assert found_in(prints_of([*others, copy])) == [[orientation, 50]], orientation


@pytest.mark.parametrize("seed", range(3))
def test_a_cropped_copy_is_found_whichever_of_the_two_comes_first(seed: int) -> None:
    whole = picture(seed)
    for pictures in ([whole, whole[4:-2, 2:-4]], [whole[4:-2, 2:-4], whole]):
        spectra = prints_of(pictures).spectra
        assert near_duplicates(spectra, np.arange(2), Bounds(near=0.99, look=0.6)).tolist() == [[0, 1]]


def test_pictures_of_one_protocol_are_not_copies() -> None:
    average = picture(1000).astype(np.float64)  # chest films agree in what every chest has
    films = [(0.7 * average + 0.3 * picture(seed)).astype(np.uint8) for seed in range(45)]
    assert found_in(prints_of([*films, recast(films[7])])) == [[7, 45]]


def test_noise_and_black_are_not_copies_and_black_is_said_to_be_too_plain() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (64, 64), dtype=np.uint8) for _ in range(60)]
    black = [np.full((64, 64), value, np.uint8) for value in (0, 0, 1)]
    ramps = [np.tile(np.linspace(0, top, 64), (64, 1)).astype(np.uint8) for top in (100, 200)]
    nearly = [rng.integers(0, 2, (64, 64), dtype=np.uint8) * np.uint8(row == 3) for row in range(6)]
    prints = prints_of([*noise, *black, *ramps, *nearly])
    assert found_in(prints) == []
    assert prints.comparable[:60].all()
    assert not prints.comparable[60:65].any()


def test_one_owners_pictures_are_not_compared_with_each_other() -> None:
    pictures = [picture(seed) for seed in range(40)]
    prints = prints_of([*pictures, recast(pictures[0])])
    assert found_in(prints, [*range(40), 0]) == []


def test_a_copied_volume_is_found_also_resampled_mirrored_and_in_reverse() -> None:
    volumes = [np.stack([picture(seed * 3 + part) for part in range(3)]).repeat(8, axis=0) for seed in range(12)]
    small = np.stack([resized(one, 0.6) for one in volumes[4]])[::2]
    copies = [*volumes, small, volumes[5][::-1, :, ::-1]]
    scans = [
        Scan(f"{n:032d}", "nifti", v.shape, "|u1", f"{n:04d}{0:028d}", (), 8, affine=STRAIGHT)
        for n, v in enumerate(copies)
    ]
    prints = fingerprint_scans(scans, lambda scan: copies[int(scan.pixel_digest[:4])])
    assert prints.spectra.shape[1] == 3
    assert found_in(prints) == [[4, 12], [5, 13]]


def test_the_bound_comes_from_how_alike_different_people_are() -> None:
    one = np.arange(80)
    different = bounds_of(prints_of([picture(seed) for seed in range(80)]).spectra, one)
    assert different.near == LOOSEST
    average = picture(1000).astype(np.float64)
    alike = [(0.93 * average + 0.07 * picture(seed) + seed % 7).astype(np.uint8) for seed in range(80)]
    assert LOOSEST < bounds_of(prints_of(alike).spectra, one).near <= STRICTEST
    assert bounds_of(prints_of(alike[:10]).spectra, one[:10]).near == STRICTEST


def test_thousands_of_pictures_are_compared_in_seconds() -> None:
    rng = np.random.default_rng(0)
    spectra = rng.normal(size=(6000, 1, 32, 32)).astype(np.float16)
    spectra[5999] = spectra[17]
    started = time.perf_counter()
    assert found_in(Fingerprints(tuple(f"{n:05d}" for n in range(6000)), spectra)) == [[17, 5999]]
    assert time.perf_counter() - started < 30


def hospital(folder: Path, plant: str) -> Config:
    """Write 48 patients with one PNG each, one leak among them, and a config that splits them itself."""
    (folder / "scans").mkdir(parents=True)
    sides = ["train"] * 30 + ["val"] * 8 + ["test"] * 10
    rows = [
        {"path": f"{n}.png", "label": "ny"[n % 2], "patient": f"n{n}", "lesion": f"l{n}", "source": "", "part": part}
        for n, part in enumerate(sides)
    ]
    pictures = {row["path"]: picture(n) for n, row in enumerate(rows)}
    if plant == "same patient renamed":  # an old film sent again, and a new one
        rows[47]["patient"] = rows[46]["patient"] = "renamed"
        pictures["47.png"] = encoded(pictures["3.png"], 90)
    elif plant == "identical pixels":
        pictures["47.png"] = pictures["3.png"]
    elif plant == "near duplicate":
        pictures["47.png"] = turned(recast(pictures["3.png"]), 5)
    elif plant == "turned by some degrees":  # each picture has a colour, or a network that has learned nothing is lost
        colours = np.random.default_rng(5).uniform(0.3, 1, (48, 3))
        pictures = {f"{n}.png": (picture(n)[..., None] * colours[n]).astype(np.uint8) for n in range(48)}
        matrix = cv2.getRotationMatrix2D((56, 48), 7, 1)
        pictures["47.png"] = np.asarray(
            cv2.warpAffine(pictures["3.png"], matrix, (112, 96), borderMode=cv2.BORDER_REFLECT_101)
        )
    elif plant == "two studies":
        rows[47]["patient"] = rows[3]["patient"]
    elif plant == "same lesion":
        rows[47]["lesion"] = rows[3]["lesion"]
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / "scans" / name, compress_level=1 if name == "47.png" else 9)
    with (folder / "scans" / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    place = {
        "model": {"weights": "none"},
        "workspace": str(folder / "workspace"),
        "studies": {"labels": {"groups": ["lesion", "source"]}},
    }
    scans = {"source": str(folder / "scans"), "key_file": str(folder / "key")}
    return parse_config({"name": "hospital", "scans": scans, **place})


def split_of(config: Config, *overrides: str) -> tuple[Split, CleanProof]:
    changed = parse_config(config.model_dump(mode="json"), overrides=overrides)
    scans = steps.ingest_scans(changed)
    cohort = steps.build_cohort(changed, scans)
    split = steps.split_by_patient(changed, scans, cohort)
    return read_split(split.path), steps.prove_again(changed, cohort, split)


GIVEN, ALLOWED = "studies.labels.split=part", "dataset.split.allow_leaky_split=true"
PLANTED = {
    "same patient renamed": "1 pair of nearly the same image",
    "near duplicate": "1 pair of nearly the same image",
    "two studies": "1 patient",
    "same lesion": "1 group (studies.labels.groups)",
}


def encoder(folder: Path) -> list[str]:
    """Write weights of a small network, as they are drawn, and give the settings that start from them."""
    torch.manual_seed(0)
    save_file(source_network("monai_resnet10_narrow", 128).state_dict(), folder / "drawn.safetensors")
    return ["model.backbone=monai_resnet10_narrow", f"model.weights={folder / 'drawn.safetensors'}", "model.threads=1"]


def test_a_copy_turned_by_some_degrees_is_refused_by_the_features_of_the_pretrained_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, weights = hospital(tmp_path, "turned by some degrees"), encoder(tmp_path)
    split, proof = split_of(config, *weights)
    assert max(Counter(split.groups.values()).values()) == 2 and proof.clean
    assert proof.by_features is not None and (proof.pairs, proof.by_features.pairs) == (1, 1)
    said = "1 pair of nearly the same image in both 'train' and 'test'"
    with pytest.raises(SplitError, match=rf"leaks: {re.escape(said)}\. .*allow_leaky_split=true") as refused:
        split_of(config, GIVEN, *weights)
    assert "47" not in str(refused.value) and "p-" not in str(refused.value)
    split, proof = split_of(config, GIVEN, ALLOWED, *weights)
    assert proof.leaks == split.leaks and not proof.clean
    assert f"THE SPLIT LEAKS (allow_leaky_split): {said}" in caplog.text

    for without, why in (
        ("dataset.split.near_in_features=false", "near_in_features is off"),
        ("model.weights=none", "no network of two dimensions with weights"),
    ):
        split, proof = split_of(config, GIVEN, *weights, without)
        assert not split.leaks and proof.by_features is None and why in proof.notes[-1]


def test_the_second_proof_is_by_the_network_of_the_split_whichever_model_is_tested(tmp_path: Path) -> None:
    config, weights = hospital(tmp_path, "turned by some degrees"), encoder(tmp_path)
    changed = parse_config(config.model_dump(mode="json"), overrides=[GIVEN, ALLOWED, *weights])
    scans = steps.ingest_scans(changed)
    cohort = steps.build_cohort(changed, scans)
    split = steps.split_by_patient(changed, scans, cohort)
    scratch = changed.model_copy(update={"model": changed.model.model_copy(update={"weights": "none"})})
    assert [leak.count for leak in steps.prove_again(scratch, cohort, split).leaks] == [1]
    assert steps.split_by_patient(changed, scans, cohort).reused
    (tmp_path / "config.yaml").write_text(json.dumps(changed.model_dump(mode="json")))
    code = (
        "import sys; from pathlib import Path; from medtl.config import load_config; from pipelines import steps; "
        "config = load_config(Path(sys.argv[1])); scans = steps.ingest_scans(config); "
        "cohort = steps.build_cohort(config, scans); "
        "print(steps.split_by_patient(config, scans, cohort).reused, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]  # what is there is found without waking torch
    shutil.rmtree(tmp_path / "workspace" / "artifacts" / "lookalikes")
    with pytest.raises(StorageError, match="features of the images are gone"):
        steps.prove_again(changed, cohort, split)


def test_weights_that_are_not_there_stop_the_split_as_they_stop_training(tmp_path: Path) -> None:
    config = hospital(tmp_path, "")
    for weights, message in (("imagenet", "model.fetch is false"), ("vault:gone", "holds no 'gone'")):
        with pytest.raises(WeightsError, match=message):
            split_of(config, f"model.weights={weights}", "model.fetch=false")


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_leak_is_linked_or_refused_or_said(
    tmp_path: Path, plant: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = hospital(tmp_path, plant)
    split, proof = split_of(config)
    sizes = Counter(split.groups.values())
    assert max(sizes.values()) == (3 if plant == "same patient renamed" else 2)
    assert proof.clean and not split.leaks
    assert proof.pairs == (1 if "image" in PLANTED[plant] else 0)
    assert {proof.checked[kind] for kind in ("patient", "pixels", "near", "group")} == {48}

    said = f"{PLANTED[plant]} in both 'train' and 'test'"
    with pytest.raises(SplitError, match=rf"leaks: {re.escape(said)}\. .*allow_leaky_split=true") as refused:
        split_of(config, GIVEN)
    assert "47" not in str(refused.value) and "p-" not in str(refused.value)

    split, proof = split_of(config, GIVEN, ALLOWED)
    assert [(leak.sides, leak.count) for leak in split.leaks] == [(("train", "test"), 1)]
    assert proof.leaks == split.leaks and not proof.clean
    assert f"THE SPLIT LEAKS (allow_leaky_split): {said}" in caplog.text
    with pytest.raises(SplitError, match="not what was proved: 1 "):
        require_clean(proof, replace(split, groups={s: s for s in split.groups}, leaks=()))


def test_identical_pixels_are_linked_or_leave_the_less_precious_part(tmp_path: Path) -> None:
    config = hospital(tmp_path, "identical pixels")
    split, proof = split_of(config)
    assert max(Counter(split.groups.values()).values()) == 2 and proof.clean
    split, proof = split_of(config, GIVEN)
    assert [e.code for e in split.exclusions] == ["copy_across_parts"]
    assert proof.clean and proof.studies == {"train": 29, "val": 8, "test": 10}


def test_the_proof_does_not_believe_the_splits_own_groups() -> None:
    pictures = [picture(seed) for seed in range(45)]
    prints = prints_of([*pictures, recast(pictures[0]), picture(99)])
    people = [*(f"p-{n}" for n in range(46)), "p-1"]
    cohort = cohort_of(prints, people)
    ids = [study.study_id for study in cohort.studies]
    split = Split(tuple(ids[:30]), tuple(ids[30:40]), tuple(ids[40:]), {name: name for name in ids}, predefined=False)
    proof = prove_clean(cohort, split, prints)
    assert [(leak.kind, leak.sides, leak.count) for leak in proof.leaks] == [
        ("near", ("train", "test"), 1),
        ("patient", ("train", "test"), 1),
    ]
    with pytest.raises(SplitError, match="of other images"):
        prove_clean(cohort, split, prints_of(pictures))


def test_what_a_proof_does_not_cover_is_said() -> None:
    prints = prints_of([*(picture(seed) for seed in range(40)), np.zeros((64, 64), np.uint8)])
    cohort = replace(cohort_of(prints, [f"i-{n}" for n in range(41)]), patients_known=False)
    proof = prove_clean(cohort, split_cohort(cohort, SplitConfig(), 0), prints)
    assert (proof.checked["patient"], proof.checked["near"], proof.listed) == (0, 40, None)
    assert [note.split()[0] for note in proof.notes] == ["Patients", "1", "No"]


def test_pictures_the_weights_were_trained_on_are_found_by_file_pixels_or_hash() -> None:
    pictures = [picture(seed) for seed in range(60)]
    prints = prints_of(pictures)
    copies = prints_of([turned(encoded(pictures[5], 90), 6), picture(500)])
    near = [line for line in hash_lines(copies) if line.startswith("near:")]
    text = "\n".join(["# trained on", *near, f"{7:032d}{0:032d}  image.png", "", prints.digests[9].upper()])
    cohort = cohort_of(prints)
    listed = read_hashes(text)
    assert len(listed) == 2
    pretrained = overlap(cohort, prints, listed)
    assert pretrained == {"s-0005", "s-0007", "s-0009"}
    split = split_cohort(cohort, SplitConfig(), 0, pretrained=pretrained)
    assert pretrained <= set(split.train)
    assert prove_clean(cohort, split, prints, listed).clean
    given = replace(cohort, studies=tuple(replace(s, part=_third(n)) for n, s in enumerate(cohort.studies)))
    with pytest.raises(SplitError, match=r"2 images in both 'pretraining' and 'test'.*take weights"):
        split_cohort(given, SplitConfig(), 0, pretrained=pretrained)
    leaky = split_cohort(given, SplitConfig(allow_leaky_split=True), 0, pretrained=pretrained)
    assert prove_clean(given, leaky, prints, listed).leaks == leaky.leaks


def _third(number: int) -> Any:
    return ("train", "test")[number in (5, 9)] if number < 40 else ("val", "test")[number > 50]


@pytest.mark.parametrize("line", ["cat.png", "abc", "near:" + "0" * 32, "g" * 64])
def test_a_line_that_is_no_hash_is_named_by_its_number(line: str) -> None:
    with pytest.raises(SplitError, match=r"Line 2 of dataset\.split.pretraining_hashes"):
        read_hashes(f"# list\n{line}\n")


def test_listed_hashes_are_found_up_to_their_distance_as_a_plain_search_finds_them() -> None:
    rng = np.random.default_rng(3)
    spectra = rng.normal(size=(40, 1, 32, 32)).astype(np.float16)
    prints = Fingerprints(tuple(f"{n:032d}" for n in range(40)), spectra)
    bits = np.unpackbits(hash_of(spectra).view(np.uint8), axis=1)
    changed = range(2, 42)  # bits of each
    for row, count in enumerate(changed):
        bits[row, np.linspace(1, 255, count).astype(int)] ^= 1  # one in nearly every band
    lines = "\n".join("near:" + np.packbits(row).tobytes().hex() for row in bits)
    found = overlap(cohort_of(prints), prints, read_hashes(lines))
    assert found == {f"s-{row:04d}" for row, count in enumerate(changed) if count <= HASH_ALIKE}


def test_a_neighbour_in_features_across_sides_is_counted_and_ordinary_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 16))
    sides: Any = ["train"] * 200 + ["val"] * 50 + ["test"] * 50
    people = [f"p-{n}" for n in range(300)]
    clean = near_in_features(features, sides, people)
    assert clean.threshold is not None and clean.nearest is not None and clean.nearest > clean.threshold
    assert clean.suspects == {"train-val": 0, "train-test": 0, "val-test": 0}
    features[299] = features[3] * 2 + rng.normal(size=16) * 1e-3
    features[298] = features[4]
    people[298] = people[4]
    assert near_in_features(features, sides, people).suspects == {"train-val": 0, "train-test": 1, "val-test": 0}


@pytest.mark.parametrize("features", [np.ones((60, 4)), np.zeros((60, 4)), np.full((60, 4), np.nan), np.eye(5)])
def test_features_that_say_nothing_give_no_estimate(features: AnyArray) -> None:
    sides: Any = ["train", "test", "val"] * 20
    found = near_in_features(features, sides[: len(features)], [str(n) for n in range(len(features))])
    assert found.threshold is None and found.suspects == {} and found.note.startswith("not estimable")


@pytest.mark.data
@pytest.mark.parametrize("name, image, patient", [("malaria", "image", "patient"), ("ham10000", "image", "lesion")])
def test_no_two_real_patients_are_taken_for_copies(real_data: Path, name: str, image: str, patient: str) -> None:
    folder = real_data / "data" / name
    with (folder / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    pictures = [np.asarray(Image.open(folder / row[image])) for row in rows]
    owners = np.unique([row[patient] for row in rows], return_inverse=True)[1]
    prints = prints_of(pictures)
    assert found_in(prints, owners.tolist()) == []


@pytest.mark.data
def test_near_duplicates_of_real_chest_films_are_the_identical_ones(real_data: Path) -> None:
    stored = np.load(real_data / "data" / "pneumoniamnist" / "pneumoniamnist_trainval.npz")
    films = [*stored["train_images"], *stored["val_images"]]
    found = found_in(prints_of(films))
    assert len(found) == 28
    assert all(np.array_equal(films[one], films[other]) for one, other in found)
    assert near_pairs(cohort_of(prints := prints_of(films[:300])), prints).pairs == ()
