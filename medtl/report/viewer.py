"""Turn cases of a segmentation into a page to turn and leaf through: NiiVue, the scans and both masks in one file.

NiiVue is taken from an installed package, an extra (``pip install medtl[viewer]``): the package ipyniivue carries it
whole, as the text that its own pages are saved with. It stands in the page itself, and so do the volumes, because a
page that is opened from a folder may load nothing: neither a module nor a file. The policy allows this one script by
its digest and no request at all.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import nibabel
import numpy as np
from markupsafe import Markup

from medtl.errors import MedtlError
from medtl.records import AnyArray, FloatArray
from medtl.report.masks import MaskCase, MaskFacts, fullest
from medtl.report.page import environment, sealed
from medtl.report.words import number

PACKAGE, SCRIPT = "ipyniivue", "static/widget.js"
MOST_CHARACTERS = 40_000_000  # of the volumes in one page
WHOLE = 4_000_000  # voxels; a larger scan is cropped to its masks
MOST_VOXELS = 64_000_000  # of a cropped scan; what is larger is not tried
MARGIN_MM = 20.0
IGNORED = 255  # code of a voxel that does not count
_LABEL_INTENT = 1002  # NIFTI_INTENT_LABEL
_EXPORTS = re.compile(r"export\{([^{}]*)\};?\s*$")
_WANTED = {"Niivue", "NVImage", "SLICE_TYPE"}
_LEVELS = 65_535  # of int16, one kept


@dataclass(frozen=True, slots=True)
class Viewed:
    """A study as it is looked at: NIfTI files in the scan's own voxels, gzipped."""

    image: bytes
    truth: bytes  # codes; 255 does not count
    predicted: bytes
    window: tuple[float, float]  # values that are black and white
    place_mm: tuple[float, float, float]  # RAS+: where the true masks are largest
    cropped: bool

    @property
    def characters(self) -> int:
        """Count what it takes in a page."""
        return sum(4 * -(-len(file) // 3) for file in (self.image, self.truth, self.predicted))


def is_installed() -> bool:
    """Tell whether the extra is there; nothing of it is imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def niivue_in(package: str) -> str:
    """Take NiiVue's source out of the script of its package.

    Raises:
        MedtlError: the script carries none, as far as is known here.
    """
    texts = [text for text in package.split('"') if "export%7B" in text]
    source = unquote(max(texts, key=len, default="")).replace("\r\n", "\n").replace("\r", "\n")
    exported = _EXPORTS.search(source)
    names = set(re.split(r"[\s,]+", exported[1])) if exported else set()
    if not names >= _WANTED or re.search(r"</script|<!--|\0", source, re.IGNORECASE):
        raise MedtlError(
            f"The installed {PACKAGE} does not carry NiiVue as this version of medtl knows it. Install the one that "
            f"medtl[viewer] names, or remove {PACKAGE}: the report is written without a viewer then."
        )
    return source


def view(pixels: AnyArray, truth: AnyArray, predicted: AnyArray, affine: FloatArray) -> Viewed | None:
    """Pack a study for the page; a large one cropped to both masks; ``None`` where that is too large too.

    Args:
        pixels: values of a volume, (slices, rows, columns).
        truth: codes of the same shape.
        predicted: codes of the same shape.
        affine: 4 x 4, voxel (column, row, slice) to RAS+, mm.
    """
    cropped = truth.size > WHOLE
    box = _around(truth, predicted, affine) if cropped else (slice(None),) * 3
    pixels, truth, predicted = (part[box] for part in (pixels, truth, predicted))
    if truth.size > MOST_VOXELS:
        return None
    start = np.array([part.start or 0 for part in reversed(box)])
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] += moved[:3, :3] @ start
    place = [fullest(truth, predicted, axis) for axis in (2, 1, 0)]
    x, y, z = (float(v) for v in moved[:3, :3] @ place + moved[:3, 3])
    finite = pixels[np.isfinite(pixels)]
    low, high = (float(v) for v in np.percentile(finite, (0.5, 99.5))) if finite.size else (0.0, 0.0)
    return Viewed(
        _image(pixels, moved), _nifti(truth.astype(np.uint8), moved, _LABEL_INTENT),
        _nifti(predicted.astype(np.uint8), moved, _LABEL_INTENT),
        (low, max(high, low + 1e-6)), (x, y, z), cropped,
    )  # fmt: skip


def _around(truth: AnyArray, predicted: AnyArray, affine: FloatArray) -> tuple[slice, ...]:
    """Give the box of both masks with a margin; the whole where both are empty."""
    shown = ((truth > 0) & (truth != IGNORED)) | (predicted > 0)
    spacing = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)[::-1]
    box = []
    for axis, step in enumerate(spacing):
        others = tuple(other for other in range(3) if other != axis)
        places = np.flatnonzero(shown.any(axis=others))
        margin = int(np.ceil(MARGIN_MM / step))
        ends = (places[0] - margin, places[-1] + margin + 1) if places.size else (0, truth.shape[axis])
        box.append(slice(max(0, int(ends[0])), min(truth.shape[axis], int(ends[1]))))
    return tuple(box)


def _image(values: AnyArray, affine: FloatArray) -> bytes:
    """Write values as int16: as they are where that holds them, else in 65,535 equal steps; NaN is the least."""
    finite = np.isfinite(values)
    known = values[finite]
    least, most = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    whole = values.dtype.kind in "iub" or np.array_equal(np.rint(known), known)
    if whole and least >= -32_768 and most <= 32_767:
        return _nifti(np.where(finite, values, least).astype(np.int16), affine)
    slope = 1.0 if whole and most - least <= _LEVELS else max((most - least) / _LEVELS, 1e-12)
    steps = np.rint((np.where(finite, values, least).astype(np.float64) - least) / slope) - 32_768
    return _nifti(
        np.clip(steps, -32_768, 32_767).astype(np.int16), affine, slope=slope, intercept=least + 32_768 * slope
    )


def _nifti(array: AnyArray, affine: FloatArray, intent: int = 0, slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """Write (slices, rows, columns) as a NIfTI-1 file, gzipped; the same array gives the same bytes."""
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape[::-1])
    header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    header["intent_code"], header["vox_offset"] = intent, 352
    header["scl_slope"], header["scl_inter"] = slope, intercept
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()  # columns run fastest, as NIfTI wants it
    return gzip.compress(header.binaryblock + bytes(4) + data, 6, mtime=0)


def chosen(cases: Sequence[MaskCase]) -> tuple[int, ...]:
    """Choose the cases that the page has room for, from the worst on; give their places, from 1."""
    found, room = [], MOST_CHARACTERS
    for place, case in enumerate(cases, 1):
        if case.viewed is not None and case.viewed.characters <= room:
            found.append(place)
            room -= case.viewed.characters
    return tuple(found)


def render(facts: MaskFacts, niivue: str, licence: str) -> str:
    """Write the page of the cases that there is room for; the same facts and the same NiiVue give the same text.

    Args:
        facts: of the report.
        niivue: its source, an ECMAScript module.
        licence: of NiiVue, which asks to be named wherever it is copied to.
    """
    places = chosen(facts.cases)
    shown = [(place, case, case.viewed) for place, case in enumerate(facts.cases, 1) if place in places and case.viewed]
    plain = {
        "overlapping": facts.plan.overlapping,
        "cases": {str(place): {"window": v.window, "place": v.place_mm} for place, _, v in shown},
    }
    own: str = environment().get_template("viewer.js.jinja").render()
    return sealed(
        "viewer.html.jinja",
        style_sheet="viewer.css",
        script=f"{niivue}\n{own}",
        facts=facts,
        licence=licence,
        structures=[one.name for one in facts.plan.structures],
        cases=[(place, _name(place, case, v)) for place, case, v in shown],
        left_out=len(facts.cases) - len(shown),
        cropped=any(v.cropped for _, _, v in shown),
        margin=f"{MARGIN_MM:g} mm",
        # Digits, brackets and words of ours; < is escaped all the same.
        plain=Markup(json.dumps(plain, sort_keys=True).replace("<", "\\u003c")),  # noqa: S704
        volumes=[
            (f"{part}-{place}", base64.b64encode(getattr(v, part)).decode())
            for (place, _, v), part in itertools.product(shown, ("image", "truth", "predicted"))
        ],
    )


def _name(place: int, case: MaskCase, viewed: Viewed) -> str:
    group = "among the worst" if case.worst else "among the best"
    return f"Case {place}, {group}: Dice {number(case.dice)}{', cropped' if viewed.cropped else ''}"
