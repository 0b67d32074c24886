"""Which mask belongs to which image, whether it lies on it, and what it shows. Pure: scans and their pixels in.

A mask must lie on the very voxels of its image. Nothing is moved, resampled or turned over to make it fit: a mask that
does not fit was drawn on something else, or one of the two headers is wrong, and from here both look the same. What a
mask may hold is what the config names: any other value could be a structure that a network would be taught not to see.

A DICOM segmentation or structure set comes from intake in pieces, one for each region, already laid on its image. The
pieces that the config names are put together (:func:`medtl.regions.paint`) and then judged like any other mask.

A mask without any structure is left out unless ``studies.labels.empty_masks`` says ``keep``: where every scan shows the
organ, an empty mask is a case that nobody finished; where lesions are sought, it is a person without one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from medtl.config import LabelsConfig, StudiesConfig
from medtl.progress import advance
from medtl.pseudonyms import SEVERAL
from medtl.records import AnyArray, Cohort, Exclusion, FloatArray, Scan, Structure, Study
from medtl.regions import paint
from medtl.studies.labels import (
    LabelRow,
    NamedFile,
    by_keys,
    check_attributes,
    check_some_left,
    join,
    patients_of,
    study_of,
)

OFF_VOXELS = 0.1  # how far the corners of a mask may lie from those of its image
OFF_WHOLE = 1e-3  # how far a value may be from a whole number: what is left of one by a scale of 1/255
_LISTED = 8  # values that a reason names
_AXES = ("columns", "rows", "slices")
_EXACT = ("path:", "uid:", "scan:")  # keys by which a row means one file; a bare name may be anybody's
Role = Literal["image", "mask", "field"]
Read = Callable[[Scan], AnyArray]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a mask cannot be used, and what to try."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Shown:
    """What the mask of an image shows: 0 or 1 for each structure; the scan that it is, or whose pieces come first."""

    target: tuple[int, ...]
    mask: str
    regions: tuple[tuple[str, int], ...] = ()


def structures_of(config: LabelsConfig) -> tuple[Structure, ...]:
    """Give what the masks show, in the config's order; regions that are named by words are numbered."""
    shown = {name: (one,) if isinstance(one, int | str) else one for name, one in config.structures.items()}
    numbers = _numbers(config)
    return tuple(
        Structure(name, tuple(numbers[part.casefold()] if isinstance(part, str) else part for part in parts))
        for name, parts in shown.items()
    )


def _numbers(config: LabelsConfig) -> dict[str, int]:
    """Number the regions that the config names by words, in its order."""
    shown = ((one,) if isinstance(one, int | str) else one for one in config.structures.values())
    words = dict.fromkeys(part.casefold() for parts in shown for part in parts if isinstance(part, str))
    return {word: number for number, word in enumerate(words, 1)}


def build_cohort(
    scans: Sequence[Scan],
    rows: Sequence[LabelRow],
    config: StudiesConfig,
    read: Read,
    refused: Iterable[Exclusion] = (),
) -> Cohort:
    """Join images, masks and label rows into a cohort for segmentation; every mask is read.

    Args:
        read: gives a scan's pixels.
        refused: what intake left out, so that a row whose mask is among it is told why.

    Raises:
        StudyError: no image with a usable mask is left, an attribute tells patients apart, or patients are unknown and
            the config does not allow one image to be taken as one patient.
    """
    structures, files = structures_of(config.labels), _Files(scans, rows)
    images = [scan for scan in scans if scan.mask_of is None and not files.is_mask(scan)]
    matched, exclusions = join(images, rows, [files.named("image", row.keys) for row in rows])
    refusals = {one.item: one.code for one in refused}
    judge = _Judge(files, structures, config.labels, _numbers(config.labels), read, refusals)
    usable: list[tuple[Scan, LabelRow, _Shown]] = []
    for number, (scan, row) in enumerate(matched, 1):
        shown = judge(scan, row)
        if isinstance(shown, Fault):
            exclusions.append(Exclusion(row.item, "studies", shown.code, shown.reason))
        else:
            usable.append((scan, row, shown))
        advance("reading masks", number, len(matched))
    usable, shared = _alone(usable)
    exclusions += shared
    patients, warnings = patients_of([(scan, row) for scan, row, _ in usable], config)
    studies = [
        _study(scan, row, shown, patient, files) for (scan, row, shown), patient in zip(usable, patients, strict=True)
    ]
    check_attributes(studies)
    studies.sort(key=lambda study: study.study_id)
    cohort = Cohort(
        task="multilabel",
        classes=tuple(one.name for one in structures),
        studies=tuple(studies),
        exclusions=tuple(exclusions),
        patients_known=not warnings,
        warnings=(*warnings, *_unseen(structures, studies)),
        structures=structures,
        ignore=config.labels.ignore,
    )
    check_some_left(cohort)
    return cohort


class _Files:
    """Which scan each row means by its image, its mask and its field.

    ``images/7.nii`` and ``labels/7.nii`` share their bare name. A file that some row names by its path in one role is
    found by bare name in that role only.
    """

    def __init__(self, scans: Sequence[Scan], rows: Sequence[LabelRow]) -> None:
        wanted = {(role, keys) for row in rows for role, keys in _wanted(row)}
        by_key = by_keys(scan for scan in scans if scan.mask_of is None)
        self._regions = by_keys(
            replace(scan, keys=tuple(key.removeprefix(SEVERAL) for key in scan.keys))
            for scan in scans
            if scan.mask_of is not None
        )
        self.several = {key.removeprefix(SEVERAL) for key in by_key if key.startswith(SEVERAL)}
        self._roles: dict[str, set[Role]] = defaultdict(set)
        self._hits: dict[tuple[Role, tuple[str, ...]], list[Scan]] = {}
        for exact in (True, False):
            found = {}
            for role, keys in wanted - self._hits.keys():
                own = [key for key in keys if key.startswith(_EXACT) is exact]
                hits = (self._free(by_key.get(key, []), role) for key in own)
                chosen = next(
                    (h for h, key in zip(hits, own, strict=True) if len(h) == 1 or (h and key.startswith("uid:"))), []
                )
                if chosen:
                    found[role, keys] = chosen
            self._hits |= found
            for (role, _), hit in found.items():
                for scan in hit:
                    self._roles[scan.scan_id].add(role)

    def _free(self, scans: Sequence[Scan], role: Role) -> list[Scan]:
        return [scan for scan in scans if not self._roles.get(scan.scan_id) or role in self._roles[scan.scan_id]]

    def named(self, role: Role, keys: tuple[str, ...]) -> list[Scan]:
        """Give the scans that a row means by these keys."""
        return self._hits.get((role, keys), [])

    def file(self, role: Role, file: NamedFile | None) -> Scan | None:
        """Give the scan of a named file."""
        hits = self.named(role, file.keys) if file is not None else []
        return hits[0] if hits else None

    def regions(self, file: NamedFile | None) -> list[Scan]:
        """Give the pieces that the named file, a DICOM segmentation or structure set, came as.

        Pieces of one file have the same names; a bare name that is two files' means neither.
        """
        found = (self._regions.get(key, []) for key in (file.keys if file is not None else ()))
        return next((hit for hit in found if len({one.keys for one in hit}) == 1), [])

    def is_mask(self, scan: Scan) -> bool:
        """Tell a scan that rows name as mask or field alone."""
        return bool(self._roles.get(scan.scan_id)) and "image" not in self._roles[scan.scan_id]

    def has_one_role(self, scan: Scan) -> bool:
        """Tell a scan that is not, say, image and mask in one."""
        return len(self._roles[scan.scan_id]) == 1


def _wanted(row: LabelRow) -> Iterator[tuple[Role, tuple[str, ...]]]:
    yield "image", row.keys
    if row.mask is not None:
        yield "mask", row.mask.keys
    if row.field is not None:
        yield "field", row.field.keys


@dataclass(frozen=True, slots=True)
class _Judge:
    """Say what the mask of an image shows, or why it cannot be used."""

    files: _Files
    structures: tuple[Structure, ...]
    config: LabelsConfig
    numbers: Mapping[str, int]  # of regions that are named by words
    read: Read
    refused: Mapping[str, str]  # code by item

    def __call__(self, image: Scan, row: LabelRow) -> _Shown | Fault:
        pieces = self.files.regions(row.mask)
        mask = self._named_of(pieces, image) if pieces else self._laid("mask", row.mask, image)
        if isinstance(mask, Fault):
            return mask
        if self.numbers and isinstance(mask, Scan):
            return Fault("mask_has_no_regions", "structures are named by words, and this file has values; give them")
        field = None if row.field is None else self._laid("field", row.field, image)
        if isinstance(field, Fault):
            return field
        regions: tuple[tuple[str, int], ...] = ()
        if isinstance(mask, Scan):
            drawn, scan = self.read(mask), mask
        else:
            regions = tuple((piece.scan_id, value) for piece, value in mask)
            whole = paint(((self.read(piece), value) for piece, value in mask), self.structures, self.config.ignore)
            if whole is None:
                return _OVERLAP
            drawn, scan = whole, mask[0][0]
        values = different(drawn, scan)
        if values is None:
            return Fault("mask_not_integer", _NOT_WHOLE)
        if fault := unknown_values(values, self.structures, self.config.ignore):
            return fault
        if field is not None:
            bounds = different(self.read(field), field)
            if bounds is None:
                return Fault("field_not_integer", _NOT_WHOLE)
            if not bounds.any():
                return Fault(
                    "field_empty", "nothing of the image lies in its field; leave the cell blank if all counts"
                )
            values = different(drawn, scan, inside_of(self.read(field), field))
            assert values is not None
        shown = tuple(int(np.isin(one.values, values).any()) for one in self.structures)
        if not any(shown) and self.config.empty_masks != "keep":
            return _EMPTY
        return _Shown(shown, scan.scan_id, regions)

    def _named_of(self, pieces: Sequence[Scan], image: Scan) -> list[tuple[Scan, int]] | Fault:
        """Give the pieces of a DICOM mask that structures names, each with its value."""
        if any(piece.mask_of != image.scan_id for piece in pieces):
            return Fault("mask_elsewhere", "it was drawn on another image than the row's; name the one it lies on")
        known = {self.config.ignore, *(value for one in self.structures for value in one.values)}
        found, others = [], []
        for piece in pieces:
            number, _, label = (piece.region or "").partition(" ")
            value = self.numbers.get(label.casefold()) if self.numbers else int(number)
            if value is None or value not in known:
                others.append(number)
            else:
                found.append((piece, value))
        if others and self.config.other_regions == "refuse":
            listed = ", ".join(others[:_LISTED]) + (f" and {len(others) - _LISTED} more" if others[_LISTED:] else "")
            reason = (
                f"nothing names its regions of number {listed}; name each under studies.labels.structures, or set "
                "studies.labels.other_regions: background"
            )
            return Fault("mask_unknown_values", reason)
        return found or Fault("mask_empty", "structures names none of its regions")

    def _laid(self, role: Role, file: NamedFile | None, image: Scan) -> Scan | Fault:
        """Give the mask that a row names, if it lies on the image's voxels."""
        found = self.files.file(role, file)
        if found is None:
            return self._missing(role, file)
        if not (self.files.has_one_role(found) and self.files.has_one_role(image)):
            return Fault("mask_is_image", "one file is named as image and as mask, or as mask and as field; name each")
        return misplaced(image, found, role) or found

    def _missing(self, role: Role, file: NamedFile | None) -> Fault:
        if file is None:
            return Fault("mask_missing", f"the row's cell in column '{self.config.mask}' is blank; name its mask")
        if not self.files.several.isdisjoint(file.keys):
            reason = "its file holds several volumes (4-D); write the one that lies on the image into a file of its own"
            return Fault(f"{role}_several_volumes", reason)
        code = self.refused.get(file.item)
        if code == "blank" and role == "mask":
            return _EMPTY
        if code == "blank":
            return Fault("field_missing", "it has one value only; leave the cell blank if all of the image counts")
        if code is not None:
            return Fault(f"{role}_missing", f"intake left it out ({code}); `medtl quarantine list CONFIG` says why")
        return Fault(f"{role}_missing", "it is not among the scans; give its path below scans.source")


_OVERLAP = Fault(
    "mask_regions_overlap",
    "two of its regions overlap and no structure says that one is part of the other; say it: whole: [inner, outer]",
)
_NOT_WHOLE = "its values are not whole numbers; write labels, not probabilities"
_EMPTY = Fault(
    "mask_empty",
    "it shows no structure at all; finish it, or, where a scan without any is meant, set studies.labels.empty_masks: "
    "keep and scans.checks.policy: {blank: accept}",
)


def misplaced(image: Scan, mask: Scan, role: Role = "mask") -> Fault | None:
    """Find a mask that does not lie on its image's voxels; corners may be a tenth of a voxel off."""
    if mask.channels != 1:
        return Fault(f"{role}_colour", "it is a picture in colour; save it with one channel, each value a structure")
    space = image.shape if image.is_volume else image.shape[:2]
    if mask.is_volume != image.is_volume or mask.shape != space:
        sides = [" x ".join(map(str, shape)) for shape in (mask.shape, space)]
        return Fault(f"{role}_shape_differs", f"{sides[0]} voxels on an image of {sides[1]}; draw it on this image")
    if image.affine is None or mask.affine is None:
        return None
    step = np.linalg.inv(np.array(image.affine)) @ np.array(mask.affine)  # mask's voxel -> image's voxel
    turned = np.rint(np.clip(step[:3, :3], -2, 2))
    if np.array_equal(np.abs(turned), np.eye(3)) and (turned < 0).any():
        ways = " and ".join(name for name, sign in zip(_AXES, np.diag(turned), strict=True) if sign < 0)
        reason = (
            f"its header says that its {ways} run the other way; find out which is right, and save it like the image"
        )
        return Fault(f"{role}_flipped", reason)
    ends = np.array(space[::-1]) - 1
    corners = np.array([[*(ends * pick), 1] for pick in np.ndindex(2, 2, 2)], dtype=np.float64)
    off = float(np.abs(corners @ step.T - corners)[:, :3].max())
    if off > OFF_VOXELS:
        reason = f"a corner lies {off:.2g} voxels from the image's; resample it onto the image's grid"
        return Fault(f"{role}_affine_differs", reason)
    return None


def unknown_values(values: FloatArray, structures: Iterable[Structure], ignore: int | None) -> Fault | None:
    """Find values of a mask that are neither 0, nor of a structure, nor ignored."""
    named = {0, ignore, *(value for one in structures for value in one.values)}
    unknown = [f"{value:g}" for value in values if int(value) not in named]
    if not unknown:
        return None
    listed = ", ".join(unknown[:_LISTED]) + (f" and {more} more" if (more := len(unknown) - _LISTED) > 0 else "")
    return Fault("mask_unknown_values", f"it holds {listed}; name each under studies.labels.structures, or as ignore")


def different(pixels: AnyArray, scan: Scan, inside: AnyArray | None = None) -> FloatArray | None:
    """List the different values of a mask, ascending; ``None`` where one is further than 0.001 from a whole number.

    Args:
        pixels: stored values; a value means ``slope * stored + intercept``.
        inside: of the same shape; only where it is true.
    """
    found: set[float] = set()
    for at, block in enumerate(_planes(pixels)):
        chosen = block if inside is None else block[_planes(inside)[at]]
        values = scan.slope * np.unique(chosen).astype(np.float64) + scan.intercept
        whole = np.rint(values)
        if (np.abs(values - whole) > OFF_WHOLE).any():
            return None
        found.update(whole.tolist())
    return np.array(sorted(found), dtype=np.float64)


def inside_of(pixels: AnyArray, scan: Scan) -> AnyArray:
    """Tell where a field is: wherever its value is not 0."""
    inside: AnyArray = np.abs(pixels + scan.intercept / scan.slope) > OFF_WHOLE if scan.intercept else pixels != 0
    return inside


def _planes(values: AnyArray) -> AnyArray:
    return np.asarray(values).reshape(-1, *values.shape[-2:])


def _alone(
    usable: Sequence[tuple[Scan, LabelRow, _Shown]],
) -> tuple[list[tuple[Scan, LabelRow, _Shown]], list[Exclusion]]:
    """Leave out images that share one mask; empty ones are alike in many a case."""
    times = Counter(shown.mask for _, _, shown in usable if any(shown.target))
    reason = "one mask, or two with the same bytes, serves several images; find out whose it is"
    kept, exclusions = [], []
    for one in usable:
        if any(one[2].target) and times[one[2].mask] > 1:
            exclusions.append(Exclusion(one[1].item, "studies", "mask_shared", reason))
        else:
            kept.append(one)
    return kept, exclusions


def _study(image: Scan, row: LabelRow, shown: _Shown, patient: str, files: _Files) -> Study:
    field = files.file("field", row.field)
    return replace(
        study_of(image, row, shown.target, patient),
        mask=shown.mask,
        field=field.scan_id if field is not None else None,
        regions=shown.regions,
    )


def _unseen(structures: Iterable[Structure], studies: Sequence[Study]) -> list[str]:
    """Warn of structures that no mask shows."""
    return [
        f"NO MASK SHOWS '{one.name}' (value {', '.join(map(str, one.values))}): nothing can be learned or measured of "
        "it. Give its value in the masks, or leave it out of studies.labels.structures."
        for at, one in enumerate(structures)
        if studies and not any(study.target[at] for study in studies)
    ]
