"""Real series against the NIfTI that dcm2niix made of them, and against each other."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.valuerep import DSfloat

from medtl.artifacts import Store
from medtl.config import ScansConfig
from medtl.pseudonyms import Pseudonymiser
from medtl.scans.convert import convert
from medtl.scans.intake import ingest, read_exclusions, read_scans
from medtl.scans.mosaic import read_csa
from medtl.scans.sources import SourceIndex, survey
from mosaics import with_fields

pytestmark = pytest.mark.data
NAMES = Pseudonymiser(b"0123456789abcdef")
CONFIG = ScansConfig(stable_seconds=0)


@pytest.fixture
def scans() -> Path:
    return Path(os.environ["MEDTL_TEST_DATA"]) / "data" / "dicom"


def volumes(path: Path) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Give the stored values and the affine of each volume of a NIfTI file, canonically turned."""
    image = nibabel.load(path)
    assert isinstance(image, nibabel.Nifti1Image)
    raw = nibabel.Nifti1Image(image.dataobj.get_unscaled(), image.affine)
    turned = nibabel.as_closest_canonical(raw)
    values = np.asarray(turned.dataobj)
    return [(v, turned.affine) for v in (np.moveaxis(values, 3, 0) if values.ndim == 4 else values[None])]


@pytest.mark.parametrize(("name", "expected"), [("dcm_qa_nih", 48), ("dcm_qa_enh", 6), ("dcm_qa_ts", 9)])
def test_every_volume_is_the_one_that_dcm2niix_made(scans: Path, tmp_path: Path, name: str, expected: int) -> None:
    done = convert(scans / name / "In", tmp_path, CONFIG, NAMES)
    references = [v for path in sorted((scans / name / "Ref").glob("*.nii*")) for v in volumes(path)]
    assert len(done.volumes) == expected
    for volume in done.volumes:
        ((values, affine),) = volumes(tmp_path / volume.output)
        same = [
            1
            for r, a in references
            if r.shape == values.shape and np.allclose(a, affine, atol=2e-3) and (r == values).all()
        ]
        assert same, volume.output


def from_head_to_foot(path: Path) -> Dataset:
    """Number the images of a mosaic the other way, as a scanner can be told to: the last slice is the first tile."""
    scan = dcmread(path)
    csa = scan[0x0029, 0x1010].value
    count = int(read_csa(csa)["NumberOfImagesInMosaic"][0])
    across = math.ceil(math.sqrt(count))
    side = scan.Rows // across
    image = scan.pixel_array
    tiles = [image[n // across * side :, n % across * side :][:side, :side].copy() for n in range(count)]
    turned = image.copy()
    for n, tile in enumerate(reversed(tiles)):
        turned[n // across * side :, n % across * side :][:side, :side] = tile
    scan.PixelData = turned.tobytes()
    normal = np.array([float(part) for part in read_csa(csa)["SliceNormalVector"][:3]])
    last = np.array(scan.ImagePositionPatient) + normal * scan.SpacingBetweenSlices * (count - 1)
    scan.ImagePositionPatient = [DSfloat(value, auto_format=True) for value in last]
    fields = {"SliceNormalVector": [f"{-x:.8f}" for x in normal], "ProtocolSliceNumber": [str(count - 1)]}
    scan[0x0029, 0x1010].value = with_fields(csa, **fields)
    return scan


@pytest.mark.parametrize("path", ["dcm_qa_nih/In/20180918Si/mr_0003/epi_pe_ap-00001.dcm", "dcm_qa_ts/In/1.dcm"])
def test_a_mosaic_numbered_from_head_to_foot_is_the_same_volume(scans: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "in").mkdir()
    from_head_to_foot(scans / path).save_as(tmp_path / "in" / "x.dcm")
    (other,) = convert(tmp_path / "in", tmp_path / "other", CONFIG, NAMES).volumes
    shutil.copy(scans / path, tmp_path / "in" / "x.dcm")
    (usual,) = convert(tmp_path / "in", tmp_path / "usual", CONFIG, NAMES).volumes
    ((values, affine),) = volumes(tmp_path / "other" / other.output)
    ((wanted, at),) = volumes(tmp_path / "usual" / usual.output)
    assert np.array_equal(values, wanted)
    assert np.allclose(affine, at, atol=1e-4)


def test_what_is_no_sound_volume_is_left_out_by_name(scans: Path, tmp_path: Path) -> None:
    done = convert(scans / "dcm_qa_ct_ge" / "In", tmp_path, CONFIG, NAMES)
    assert (done.volumes, [(e.code, e.files) for e in done.refused]) == ((), [("uneven_gaps", 28)])


def test_the_same_series_in_every_transfer_syntax_gives_the_same_voxels(scans: Path, tmp_path: Path) -> None:
    done = convert(scans / "dcm_qa_ts" / "In", tmp_path, CONFIG, NAMES)
    assert len(done.volumes) == len(list((scans / "dcm_qa_ts" / "In").iterdir()))
    first, *others = (volumes(tmp_path / one.output)[0] for one in done.volumes)
    assert all(np.array_equal(first[0], values) and np.array_equal(first[1], affine) for values, affine in others)


def test_nothing_is_lost_and_nothing_real_stops_the_batch(scans: Path, tmp_path: Path) -> None:
    def take(number: int) -> tuple[Any, Any, int]:
        out = tmp_path / str(number)
        out.mkdir()
        files = survey(scans, CONFIG, index=SourceIndex(tmp_path / "index", NAMES))
        ingest(files, CONFIG, NAMES, out, Store(tmp_path / "workspace"))
        return read_scans(out), read_exclusions(out), len(files)

    found, left_out, files = take(1)
    one_file_each = {s.scan_id for s in found if s.files == 1 and s.source != "npz"}
    counted = sum(s.files for s in found) + sum(e.files for e in left_out)
    assert counted >= files  # an enhanced object may hold several volumes, each of which counts its file
    assert len(one_file_each) > 50
    assert sum(s.is_volume for s in found) > 90
    assert take(2)[:2] == (found, left_out)
    text = b"".join(p.read_bytes() for p in tmp_path.rglob("*.json"))
    assert b"1.2.840.113619" not in text
