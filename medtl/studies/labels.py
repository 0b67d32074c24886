"""Label rows find their scans. Pure; raw names are turned into keys as soon as they are seen.

A row finds a scan by path, else by bare file name, else by stem, each only where it is the one scan with that name; or
by any of its DICOM UIDs, which may find several. Nothing is guessed: a row without a scan, a scan without a row, a
blank, unknown or contradictory label becomes an exclusion with its reason.

Attributes (view, department) are kept in the table's own words, and pages show them. A column that tells patients apart
instead of grouping them could hold their names, and is refused.

A cohort holds images or volumes, never both: the kind that more rows find; volumes where as many find each, since an
image that shares a row with a volume is nearly always its localiser. The other kind is excluded.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from medtl.config import LabelsConfig, StudiesConfig
from medtl.errors import StudyError
from medtl.pseudonyms import SEVERAL, Pseudonymiser
from medtl.records import Cohort, Exclusion, Part, Scan, Study, Task
from medtl.studies.grouping import connected

_PARTS: Mapping[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SEXES = {"f": "F", "female": "F", "w": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
_ON, _OFF = {"1", "1.0", "true", "yes", "positive"}, {"0", "0.0", "false", "no", "negative"}
OLDEST_YEARS = 90.0  # ages above 89 identify; all of them become 90
MOST_VALUES = 20  # of an attribute; a column of more is an identifier, not a group
Box = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A further file that a row names: what it is called in the list of refusals, and its keys."""

    item: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One row of a label table without anything that names a person or a file."""

    item: str
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    patient: str | None = None
    site: str | None = None
    sex: str | None = None
    age_years: float | None = None
    part: Part | None = None
    groups: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    mask: NamedFile | None = None
    field: NamedFile | None = None
    box: Box | None = None  # as it was given; NaN where a cell holds no finite number


def rows_of(
    columns: Sequence[str], rows: Iterable[Mapping[str, str]], config: LabelsConfig, names: Pseudonymiser
) -> tuple[LabelRow, ...]:
    """Read the configured columns of a label table.

    Raises:
        StudyError: a configured column is missing (the nearest one is named), an attribute has too many values, or a
            split value is not known.
    """
    label_columns = () if config.mask else (config.label,) if isinstance(config.label, str) else config.label
    finder = config.uid or config.path
    if finder is None:
        raise StudyError("Neither studies.labels.path nor studies.labels.uid is set: nothing tells a row's scan.")
    wanted = [("uid" if config.uid else "path", finder), *(("label", column) for column in label_columns)]
    wanted += [
        (k, v) for k in ("site", "sex", "age", "split", "mask", "field") if (v := getattr(config, k)) is not None
    ]
    wanted += [("groups", column) for column in config.groups]
    wanted += [("box", column) for column in config.box or ()]
    wanted += [("attributes", column) for column in config.attributes]
    for key, column in wanted:
        _require(column, columns, key)
    patient = config.patient if config.patient in columns else None
    made = tuple(_row(row, finder, label_columns, patient, config, names) for row in rows)
    for column in config.attributes:
        _check_few(column, {row.attributes[column] for row in made if column in row.attributes})
    return made


def rows_from_scans(scans: Iterable[Scan]) -> tuple[LabelRow, ...]:
    """Take the labels and parts that scans carry themselves (MedMNIST's ``.npz``)."""
    return tuple(
        LabelRow(scan.scan_id, (f"scan:{scan.scan_id}",), tuple(map(str, scan.label)), part=_PARTS.get(scan.part or ""))
        for scan in scans
        if scan.label is not None
    )


def build_cohort(scans: Sequence[Scan], rows: Sequence[LabelRow], config: StudiesConfig) -> Cohort:
    """Join scans and label rows into a cohort.

    Raises:
        StudyError: no labelled scan is left, one class only, an attribute tells patients apart, or patients are
            unknown and the config does not allow one image to be taken as one patient.
    """
    images = [scan for scan in scans if scan.mask_of is None]
    matched, exclusions = join(images, rows, find_images(images, rows))
    classes, task = _classes(rows, config.labels)
    numbered = _are_numbered(rows, classes)
    usable: list[tuple[Scan, LabelRow, tuple[int | None, ...]]] = []
    named = Counter(row.item for _, row in matched)
    for scan, row in matched:
        target = _target(row.labels, classes, task, numbered)
        if isinstance(target, str):
            exclusions.append(exclude(row.item, target))
        elif row.box is not None and (fault := _fault(row.box, scan, named[row.item])):
            exclusions.append(exclude(row.item, fault))
        else:
            usable.append((scan, row, target))
    patients, warnings = patients_of([(scan, row) for scan, row, _ in usable], config)
    studies = [
        replace(study_of(scan, row, target, patient), box=row.box)
        for (scan, row, target), patient in zip(usable, patients, strict=True)
    ]
    check_attributes(studies)
    studies.sort(key=lambda study: study.study_id)
    cohort = Cohort(task, classes, tuple(studies), tuple(exclusions), not warnings, tuple(warnings))
    check_some_left(cohort)
    _check_classes(cohort)
    return cohort


def by_keys(scans: Iterable[Scan]) -> dict[str, list[Scan]]:
    """List the scans that each key is one of."""
    by_key: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        for key in (*scan.keys, f"scan:{scan.scan_id}"):
            by_key[key].append(scan)
    return by_key


def find_images(scans: Sequence[Scan], rows: Sequence[LabelRow]) -> list[list[Scan]]:
    """Find the scans that each row names."""
    by_key = by_keys(scans)
    return [_scans_of(row, by_key) for row in rows]


def join(
    scans: Sequence[Scan], rows: Sequence[LabelRow], hits: Sequence[Sequence[Scan]]
) -> tuple[list[tuple[Scan, LabelRow]], list[Exclusion]]:
    """Give each scan its row, or an exclusion.

    Args:
        hits: the scans that each row names.
    """
    several = {key.removeprefix(SEVERAL) for scan in scans for key in scan.keys if key.startswith(SEVERAL)}
    found: dict[str, list[LabelRow]] = defaultdict(list)
    exclusions = []
    for row, named in zip(rows, hits, strict=True):
        if not named:
            one = several.isdisjoint(row.keys)
            exclusions.append(exclude(row.item, "label_without_image" if one else "several_volumes"))
        for scan in named:
            found[scan.scan_id].append(row)
    volumes = _are_volumes(scans, found)
    matched = []
    for scan in scans:
        own = found.get(scan.scan_id, [])
        if scan.is_volume and not volumes:
            exclusions.append(exclude(scan.scan_id[:16], "volume"))
        elif volumes and own and not scan.is_volume:
            exclusions.append(exclude(scan.scan_id[:16], "image"))
        elif not own:
            exclusions.append(exclude(scan.scan_id[:16], "image_without_label"))
        elif len({(row.labels, row.mask, row.field, row.box) for row in own}) > 1:
            exclusions.append(exclude(scan.scan_id[:16], "conflicting_labels"))
        elif len({row.patient for row in own}) > 1:
            exclusions.append(exclude(scan.scan_id[:16], "conflicting_patients"))
        elif len({row.part for row in own}) > 1:
            exclusions.append(exclude(scan.scan_id[:16], "conflicting_parts"))
        else:
            groups = tuple(sorted({g for row in own for g in row.groups}))
            matched.append((scan, replace(own[0], groups=groups, attributes=_agreed(own))))
    return matched, exclusions


def _agreed(rows: Sequence[LabelRow]) -> dict[str, str]:
    """Give the attributes of a scan that none of its rows contradicts."""
    said: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for column, value in row.attributes.items():
            said[column].add(value)
    return {column: next(iter(values)) for column, values in said.items() if len(values) == 1}


def _are_volumes(scans: Sequence[Scan], found: Mapping[str, Sequence[LabelRow]]) -> bool:
    """Tell whether more label rows find volumes than find images."""
    by_kind = {
        kind: {row.item for scan in scans if scan.is_volume is kind for row in found.get(scan.scan_id, ())}
        for kind in (True, False)
    }
    return bool(by_kind[True]) and len(by_kind[True]) >= len(by_kind[False])


def _scans_of(row: LabelRow, by_key: Mapping[str, list[Scan]]) -> list[Scan]:
    for key in row.keys:
        hits = by_key.get(key, [])
        if hits and (len(hits) == 1 or key.startswith("uid:")):
            return hits
    return []


def _row(
    row: Mapping[str, str],
    finder: str,
    label_columns: Sequence[str],
    patient: str | None,
    config: LabelsConfig,
    names: Pseudonymiser,
) -> LabelRow:
    cell = row[finder].strip()
    raw_patient = row[patient].strip() if patient else ""
    part = None
    if config.split:
        value = row[config.split].strip().lower()
        part = _PARTS.get(value)
        if part is None:
            raise StudyError(f"The split column '{config.split}' holds a value that is not train, val or test.")
    return LabelRow(
        item=names.file(cell),
        keys=(names.uid_key(cell),) if config.uid else names.file_keys(cell),
        labels=tuple(row[column].strip() for column in label_columns),
        patient=names.name("patient", raw_patient) if raw_patient else None,
        site=(row[config.site].strip() or None) if config.site else None,
        sex=_SEXES.get(row[config.sex].strip().lower()) if config.sex else None,
        age_years=_age(row[config.age]) if config.age else None,
        part=part,
        groups=tuple(names.name(f"group {c}", cell) for c in config.groups if (cell := row[c].strip())),
        attributes={c: cell for c in config.attributes if (cell := row[c].strip())},
        mask=_named(row, config.mask, names),
        field=_named(row, config.field, names),
        box=_box([row[column].strip() for column in config.box]) if config.box else None,
    )


def _named(row: Mapping[str, str], column: str | None, names: Pseudonymiser) -> NamedFile | None:
    cell = row[column].strip() if column else ""
    return NamedFile(names.file(cell), names.file_keys(cell)) if cell else None


def _box(cells: Sequence[str]) -> Box | None:
    """Read the four cells of a box; all blank: none."""
    if not any(cells):
        return None
    x0, y0, x1, y1 = map(_number, cells)
    return x0, y0, x1, y1


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan  # one NaN: rows that say the same stay equal


def _fault(box: Box, scan: Scan, scans: int) -> str | None:
    """Give the code of why a box cannot be laid on a scan.

    Args:
        scans: how many the row names.
    """
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):  # nor does NaN
        return "box_unreadable"
    if scan.is_volume or scans > 1:
        return "box_unclear"
    rows, columns = scan.shape[:2]
    return None if min(x0, y0) >= 0 and x1 <= columns and y1 <= rows else "box_outside"


def _classes(rows: Sequence[LabelRow], config: LabelsConfig) -> tuple[tuple[str, ...], Task]:
    if not isinstance(config.label, str):
        return tuple(config.label), "multilabel"
    if rows and all(len(row.labels) > 1 for row in rows):
        width = len(rows[0].labels)
        return config.classes or tuple(str(n) for n in range(width)), "multilabel"
    found = sorted({row.labels[0] for row in rows if row.labels[0]}, key=_numbers_first)
    classes = config.classes if config.classes is not None else tuple(found)
    if config.classes and all(label.isdecimal() for label in found) and _are_numbered(rows, classes):
        found = [config.classes[int(label)] for label in found if int(label) < len(config.classes)]
    if len(classes) < 2 or len(found) < 2:
        raise StudyError(
            f"The label column holds one class only ({', '.join(found) or 'none'}); a diagnosis needs at least two."
        )
    return classes, "binary" if len(classes) == 2 else "multiclass"


def _are_numbered(rows: Sequence[LabelRow], classes: tuple[str, ...]) -> bool:
    """Tell whether labels may be numbers of classes: not where any row calls a class by its name."""
    return not {row.labels[0] for row in rows if row.labels} & set(classes)


def _target(
    labels: tuple[str, ...], classes: tuple[str, ...], task: Task, numbered: bool
) -> tuple[int | None, ...] | str:
    """Give the target, or the code of why there is none."""
    if task == "multilabel":
        marks = [1 if c.lower() in _ON else 0 if c.lower() in _OFF else None for c in labels]
        return tuple(marks) if any(mark is not None for mark in marks) else "blank_label"
    label = labels[0]
    if not label:
        return "blank_label"
    if numbered and label.isdecimal() and int(label) < len(classes):
        label = classes[int(label)]  # numbered classes (MedMNIST) that the config gives names
    if label not in classes:
        return "unknown_class"
    return tuple(int(label == name) for name in classes)


def patients_of(pairs: Sequence[tuple[Scan, LabelRow]], config: StudiesConfig) -> tuple[list[str], list[str]]:
    """Give each image its patient, and warnings where patients are unknown.

    Raises:
        StudyError: patients are unknown and the config does not allow one image to be taken as one patient.
    """
    known = [row.patient or scan.patient for scan, row in pairs]
    unknown = sum(patient is None for patient in known)
    both = [(row.patient or scan.patient, scan.patient or row.patient) for scan, row in pairs]
    same = connected((left, right) for left, right in both if left and right)
    known = [same[patient] if patient else None for patient in known]
    if unknown == 0:
        return [str(patient) for patient in known], []
    if not config.image_is_patient:
        raise StudyError(
            f"{unknown} of {len(pairs)} images have no known patient (no patient column, none in the header), so "
            "nothing can keep one patient on one side of the split. Name the column (studies.labels.patient), or, if "
            "each image really is another person, say so: --set studies.image_is_patient=true"
        )
    warning = (
        f"PATIENTS ARE UNKNOWN for {unknown} of {len(pairs)} images: each of these was taken as one patient. If a "
        "person has several images here, the split leaks and every figure is too good, every interval too narrow."
    )
    return [patient or f"i-{scan.scan_id[:16]}" for patient, (scan, _) in zip(known, pairs, strict=True)], [warning]


def study_of(scan: Scan, row: LabelRow, target: tuple[int | None, ...], patient: str) -> Study:
    """Make the study of a scan and its row."""
    return Study(
        study_id=f"s-{scan.scan_id[:16]}",
        scan_id=scan.scan_id,
        patient=patient,
        target=target,
        pixel_digest=scan.pixel_digest,
        site=row.site,
        sex=row.sex or scan.sex,
        age_years=row.age_years if row.age_years is not None else scan.age_years,
        scanner=scan.scanner,
        part=row.part,
        exam=scan.study,
        groups=row.groups,
        attributes=row.attributes,
    )


def check_attributes(studies: Iterable[Study]) -> None:
    """Refuse an attribute of which no value is shared by two patients: it could be their name.

    Raises:
        StudyError: names the column, and none of its values.
    """
    owners: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for study in studies:
        for column, value in study.attributes.items():
            owners[column][value].add(study.patient)
    for column, patients in owners.items():
        if all(len(some) == 1 for some in patients.values()):
            raise StudyError(
                f"No value of the column '{column}' (studies.labels.attributes) is shared by two patients, so that it "
                "could name one. Write fewer, wider values into it, or leave it out of the attributes."
            )


def check_some_left(cohort: Cohort) -> None:
    """Refuse a cohort without studies.

    Raises:
        StudyError: names why they were left out.
    """
    if not cohort.studies:
        reasons = ", ".join(sorted({e.code for e in cohort.exclusions})) or "no scans"
        raise StudyError(
            f"No labelled scan is left ({reasons}). Check studies.labels.path: it should hold paths below "
            "scans.source, file names, or (studies.labels.uid) DICOM UIDs."
        )


def _check_classes(cohort: Cohort) -> None:
    counts = cohort.targets
    if cohort.task != "multilabel" and ((counts > 0).any(axis=0)).sum() < 2:
        present = [name for name, column in zip(cohort.classes, counts.T, strict=True) if (column > 0).any()]
        raise StudyError(
            f"The usable scans hold one class only ({', '.join(present)}); a diagnosis needs at least two. See the "
            "exclusions: `medtl show excluded CONFIG`."
        )


_REASONS = {
    "label_without_image": "a label row whose image is not among the readable scans",
    "several_volumes": "a label row whose file holds several volumes (4-D): which of them is meant is not said; write "
    "each into a file of its own",
    "image_without_label": "a scan that no label row names",
    "volume": "a volume among images, which most labels name (scans.read=images takes each slice as an image)",
    "image": "an image among volumes, which most labels name",
    "blank_label": "the label is blank",
    "unknown_class": "the label is not one of studies.labels.classes",
    "conflicting_labels": "several label rows name this image and contradict each other",
    "box_unreadable": "its box is not four numbers with x0 < x1 and y0 < y1 (four blank cells: no box)",
    "box_outside": "its box reaches beyond the image, which has fewer pixels",
    "box_unclear": "its box is of one image, and the row names a volume or several images",
    "conflicting_patients": "several label rows name this image and different patients",
    "conflicting_parts": "several label rows name this image and different parts of the predefined split",
}


def exclude(item: str, code: str) -> Exclusion:
    """Leave an item out for one of the reasons of this module."""
    return Exclusion(item, "studies", code, _REASONS[code])


def _require(column: str, columns: Sequence[str], key: str) -> None:
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise StudyError(
            f"The label table has no column '{column}' (studies.labels.{key}); {hint}It has: {', '.join(columns)}."
        )


def _check_few(column: str, values: Collection[str]) -> None:
    if len(values) > MOST_VALUES:
        raise StudyError(
            f"The column '{column}' (studies.labels.attributes) has {len(values)} different values, more than "
            f"{MOST_VALUES}: it tells patients apart, it does not group them. Write fewer, wider values into it, or "
            "leave it out of the attributes."
        )


def _numbers_first(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def _age(cell: str) -> float | None:
    try:
        years = float(cell)
    except ValueError:
        return None
    return min(years, OLDEST_YEARS) if 0 <= years < 130 else None
