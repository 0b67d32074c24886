"""What can be wrong with a scan, one reason code and one function each, and what becomes of it.

``CODES`` explains every code that intake can give: those found here in headers and geometry, and those that the other
modules of this room raise as :class:`~medtl.errors.ScanError`. The default is to fail closed: what is not known to be
right is quarantined. The policy of a site (``scans.checks.policy``) may choose another action of those a code allows;
``accept`` is not among them where the volume would be wrong, ``repair`` only where it is exact (or, for a tilted
gantry, a resampling that is recorded).

Decisions: a localiser is never a diagnostic image and is quarantined. A secondary capture is a picture of a screen
(text burned in, no geometry) and is quarantined; a reformatted or computed series that has its full geometry is
accepted and recorded (``derived_volume``). Ultrasound, endoscopy and secondary captures carry burned-in text more often
than not, so they need BurnedInAnnotation NO; other modalities only must not say YES. Source: DICOM PS3.3 C.7.6.1.1.2,
C.8.6.1; the classes at risk are those of the RSNA CTP pixel anonymiser's script.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from medtl.config import Action, ScansConfig
from medtl.errors import ConfigError
from medtl.scans.geometry import (
    BY_ORDER,
    GAP_TOLERANCE,
    MAX_SPACING_MM,
    ORIENTATION_TOLERANCE,
    SPACING_TOLERANCE,
    STRONG,
    Affine,
    Finding,
    Group,
    Member,
    Placed,
    Volume,
    build,
    displacement_mm,
    fault,
    group,
    is_tilted,
    measure,
    shear,
    split_values,
    unevenness,
)
from medtl.scans.headers import Header, Part

STRENGTH: tuple[Action, ...] = ("accept", "repair", "quarantine", "reject")
CROSS_SECTIONAL = frozenset({"CT", "MR", "PT"})


@dataclass(frozen=True, slots=True)
class Code:
    """One reason code: what it means, what becomes of a scan, and what a person can try."""

    meaning: str
    default: Action
    allowed: tuple[Action, ...]
    what_to_try: str


_REFUSE: tuple[Action, ...] = ("reject", "quarantine")
_ANY: tuple[Action, ...] = ("reject", "quarantine", "accept")


def _refused(meaning: str, what_to_try: str, default: Action = "quarantine") -> Code:
    return Code(meaning, default, _REFUSE, what_to_try)


def _quarantined(meaning: str, what_to_try: str) -> Code:
    return Code(meaning, "quarantine", _ANY, what_to_try)


def _recorded(meaning: str, what_to_try: str) -> Code:
    return Code(meaning, "accept", _ANY, what_to_try)


_AGAIN = "Export the series once more from the archive."
_SEND = "Copy the file once more from where it came from."

CODES: Mapping[str, Code] = {
    # Geometry of a volume
    "missing_slices": _refused("Gaps between slices are multiples of the usual gap: slices are missing.", _AGAIN),
    "uneven_gaps": _refused(
        "The gaps between slices differ by more than 1 %.",
        "Ask whether several acquisitions share the series; export each as a series of its own.",
    ),
    "decimated": _quarantined(
        "Slices lie further apart than their thickness, declared spacing or numbers say: every second one may be gone.",
        "Export the series once more; accept where the protocol leaves such gaps on purpose.",
    ),
    "duplicate_position": _refused(
        "Two different slices lie at one place and nothing in their headers tells them apart.",
        "Export the series once more; keep repeated acquisitions in series of their own.",
    ),
    "duplicate_pixels": Code(
        "Two slices at one place have the same pixels: one is a copy.",
        "quarantine",
        ("reject", "quarantine", "repair"),
        "repair drops the copy, which is exact.",
    ),
    "repeated_pixels": _quarantined(
        "Slices at different places have the same pixels.", "Look at the series; export it once more."
    ),
    "displaced_slices": _refused("A slice is shifted within its plane against the others.", _AGAIN),
    "gantry_tilt": Code(
        "The stack is sheared: it was scanned with a tilted gantry.",
        "quarantine",
        ("reject", "quarantine", "repair"),
        "repair resamples every slice onto a grid with right angles; values between pixels are blends.",
    ),
    "tilt_conflict": _quarantined(
        "The header's gantry tilt is not the one that positions and orientation show.",
        "Ask whether the series was corrected for tilt before it was sent; accept where it was.",
    ),
    "split_by_order": _recorded(
        "The volumes of one series are told apart only by the order of InstanceNumber or TriggerTime.",
        "Quarantine where series are renumbered on their way.",
    ),
    "mixed_values": _quarantined(
        "Slices of one stack differ in what should make separate volumes (an echo, a b-value, a temporal position).",
        "Look at the series; export each part as a series of its own.",
    ),
    "mixed_orientation": _quarantined("A single slice lies across the others of its series.", _AGAIN),
    "mixed_size": _quarantined("A single slice has another matrix or pixel spacing than its series.", _AGAIN),
    "mixed_format": _quarantined("A single slice stores its pixels in another format than its series.", _AGAIN),
    "mixed_series": _refused(
        "One series identifier is used in two studies, by two modalities or in two frames of reference.",
        "Give each acquisition a series of its own before it is sent.",
    ),
    "foreign_patient": _refused(
        "A series holds images of more than one patient.", "Have the archive's patient merge or split corrected."
    ),
    "incomplete": _quarantined(
        "Files of this series were refused, or its other volumes have more slices or reach further: it may lack some.",
        "See why those files were refused, and send them once more; else look at which slices each echo or time has.",
    ),
    "fewer_than_declared": _quarantined(
        "A series has fewer images than its headers say that its acquisition has: some may not have come yet.",
        "See whether the transfer is complete; accept where a part of an acquisition was exported on purpose.",
    ),
    "bad_geometry": _refused("Positions, orientation or spacing are not finite, or absurd.", _AGAIN),
    "no_geometry": _quarantined(
        "A cross-sectional image does not say where it lies.",
        "Accept to take such images one by one, as pictures.",
    ),
    "single_slice": _recorded(
        "A series of a cross-sectional modality has one slice in this orientation.", "It is taken as an image."
    ),
    "mosaic": _refused(
        "A mosaic or grid (slices tiled into one image) that cannot be taken apart, or is wanted as an image.",
        "Export as enhanced multi-frame, or convert the series with a tool that opens mosaics.",
    ),
    "program_fault": _refused(
        "The program failed on this file or series: a fault of medtl, not known to be one of the file.",
        "Report the place in the program that the reason names; after an update of medtl the file is read again.",
    ),
    "mask_geometry": _refused(
        "A mask does not lie on its image's grid.", "Export mask and image from the same state of the tool."
    ),
    "bad_mask": _refused("A segmentation or its contours contradict themselves.", "Export the mask once more."),
    "empty_mask": _quarantined("A mask holds no voxel.", "Accept where a structure may be absent."),
    "fractional_mask": _recorded(
        "A mask of fractions was cut at one half.", "Quarantine where partial volumes matter; export a binary mask."
    ),
    "open_contour": _quarantined("Contours of a mask enclose nothing.", "Look at the contours; draw them closed."),
    "contour_off_plane": _quarantined(
        "Contours do not lie on the image's slices.",
        "Draw on the image's own slices; accept where laying them on is fine.",
    ),
    "mask_without_image": _refused(
        "A segmentation or structure set whose image is not among the volumes.", "Ingest its image with it."
    ),
    "volume": _refused("A file holds a volume where one image is wanted.", "Set scans.read: volumes."),
    "multi_frame": _quarantined(
        "Several frames that make no volume (a film).", "Accept to take every frame as an image of its own."
    ),
    "qform_sform": _quarantined(
        "The two transforms of a NIfTI file place it differently.",
        "Write the file with one transform; accept where the sform is known to be right.",
    ),
    # What the image is
    "localizer": _quarantined("A localiser (scout) to plan other scans with.", "Leave it out of the export."),
    "derived": _quarantined(
        "A secondary capture, or derived images among original ones.", "Export the original series."
    ),
    "no_scan": _refused(
        "A segmentation or a computed dose: no scanner measured it.",
        "Name a segmentation as a mask in the label table; leave doses out of the export.",
    ),
    "derived_volume": _recorded(
        "A volume computed from others (reformatted, a map); it has its full geometry.",
        "Quarantine where only original acquisitions are wanted.",
    ),
    "burned_in": _quarantined(
        "Text with a patient's name may be part of the picture.",
        "Have the pixels cleaned, and BurnedInAnnotation set to NO.",
    ),
    "executable_preamble": _quarantined(
        "The first bytes of the file are those of a program.", "Have the file looked at by your security team."
    ),
    # What the values mean
    "missing_rescale": _quarantined(
        "A CT image without rescale slope and intercept: its values are of unknown scale.",
        "Export it once more; accept where values are known to be Hounsfield units.",
    ),
    "inconsistent_rescale": _quarantined(
        "Slices of one volume differ in what a stored value means.",
        "Accept where the scanner scales every slice on purpose (PET): each is then scaled by its own header.",
    ),
    "modality_lut": _refused(
        "The values of a volume go through a look-up table, not through slope and intercept.",
        "Take the slices as images (scans.read: images), or export with rescale values.",
    ),
    "scaled_by_slice": _recorded(
        "A PET volume whose slices each have their own scale; its values are computed slice by slice.",
        "Quarantine where one scale per volume is wanted.",
    ),
    "non_finite": _refused("NaN or infinite values among the pixels.", "Write the file with finite values."),
    "embedded_overlay": _refused("An overlay lies in the upper bits of the pixels.", "Export without overlays."),
    "blank": _quarantined("All pixels have the same value.", "Look at the image."),
    "no_window": _refused("The header has no usable window.", "Set scans.window: none, or [centre, width]."),
    "unsupported_type": _refused("Values of a type that no scan has (complex, colour volumes).", "Convert the file."),
    "out_of_range": _refused("Pixels hold values that their declared bits cannot hold.", _AGAIN),
    # What the file is
    "empty_file": _refused("The file has no bytes.", _SEND, "reject"),
    "not_a_file": _refused("A link, a device or a folder where a file is wanted.", "Copy the file itself.", "reject"),
    "unreadable": _refused("The file cannot be read.", "Look at its permissions and at the disk."),
    "missing_file": _refused("A file that a directory names is not there.", "Copy the whole medium."),
    "changed": _refused("The file changed while it was read.", "Run again when nothing is written to the folder."),
    "unstable": _refused("The file was still being written.", "Run again; see scans.stable_seconds."),
    "duplicate_file": _refused("The same bytes as another file.", "Nothing: the other one is used.", "reject"),
    "not_an_image": _refused("No image in a format that is read here.", "Leave the file out.", "reject"),
    "not_dicom": _refused("The file is named or starts like DICOM and is none.", _SEND),
    "dicomdir": _refused("A DICOMDIR that is broken or names files outside of its folder.", "Copy the medium again."),
    "bad_header": _refused("The header cannot be understood.", _SEND),
    "bad_size": _refused("The header declares an image without rows or columns.", _SEND),
    "length_past_end": _refused("An element is declared longer than the file.", _SEND),
    "extra_bytes": _quarantined("Bytes follow the last voxel that the header declares.", _SEND),
    "detached_header": _refused("A header without its pixels (.hdr beside .img).", "Join the two as one .nii file."),
    "truncated": _refused("Pixel data is shorter than the header declares.", _SEND),
    "too_deep": _refused("Sequences are nested too deep.", "Have the file looked at by your security team."),
    "too_large": _refused(
        "More pixels or bytes than the limits allow.",
        "Raise scans.max_megapixels, max_file_mb or max_volume_mb if the scan is real.",
    ),
    "no_pixels": _refused("A DICOM object without pixels (a report, a plan).", "Leave it out.", "reject"),
    "archive_bomb": _refused("An archive grows without bound.", "Unpack it by hand if it is real.", "reject"),
    "archive_path": _refused("An archive names files outside of itself.", "Unpack it by hand if it is real.", "reject"),
    "archive_link": _refused("An archive holds a link or a device.", "Unpack it by hand if it is real.", "reject"),
    "archive_nested": _refused("An archive within an archive.", "Unpack the outer one."),
    "archive_damaged": _refused("An archive is damaged or encrypted.", _SEND),
    # The network
    "not_sent": _refused("The archive lists an object and did not send it.", "Fetch again; look at the archive's log."),
    "not_found": _refused("The archive lists an object and does not have it.", "Look at the archive's index."),
    "cut_off": _refused("The connection ended before the object was whole.", "Fetch or send it again."),
    "connection": _refused("The archive cannot be reached, or went silent.", "See that it runs; fetch again."),
    "wrong_object": _refused("Another object came than was asked for or agreed on.", "Look at the sender's settings."),
    "bad_uid": _refused("An object whose SOP instance UID is none.", "Have it corrected in the archive.", "reject"),
    "empty_object": _refused("An object came without data.", "Send it again.", "reject"),
    "other_kind": _refused("Neither an image nor a mask nor a report.", "Leave it out of the query.", "reject"),
    "disk_full": _refused("The disk is nearly full.", "Make room, or lower min_free_mb; then fetch or send again."),
    # Decoding
    "no_decoder": _refused("No decoder for this compression is installed.", "Install medtl's gdcm extra."),
    "undecodable": _refused("The pixels cannot be decoded.", _SEND),
    "decode_failed": _refused("The pixels cannot be decoded, or are not what the header declares.", _SEND),
    "decoder_crash": _refused("The decoder crashed on this file.", "Have the file looked at."),
    "decoder_timeout": _refused("The decoder did not end in time.", "Have the file looked at."),
    "decoder_memory": _refused("The decoder asked for more memory than it may have.", "Have the file looked at."),
}


def action_of(code: str, policy: Mapping[str, Action]) -> Action:
    """Give what becomes of a scan with this code: what the policy says, otherwise the default.

    An action that the code does not allow is not taken (see :func:`check_policy`); a code without a row is quarantined.
    """
    row = CODES.get(code)
    if row is None:
        return "quarantine"
    wanted = policy.get(code, row.default)
    return wanted if wanted in row.allowed else row.default


def decide(findings: Iterable[Finding], policy: Mapping[str, Action]) -> Action:
    """Give the strongest action of all findings: reject, quarantine, repair, accept. Nothing found: accept."""
    actions = {action_of(finding.code, policy) for finding in findings}
    return next((action for action in reversed(STRENGTH) if action in actions), "accept")


def check_policy(policy: Mapping[str, Action]) -> None:
    """Refuse a policy that names an unknown code, or an action that its code does not allow.

    Raises:
        ConfigError: names the code and what is allowed.
    """
    for code, action in policy.items():
        row = CODES.get(code)
        if row is None:
            raise ConfigError(f"scans.checks.policy: '{code}' is no code; `medtl show codes` lists them.")
        if action not in row.allowed:
            allowed = ", ".join(row.allowed)
            raise ConfigError(f"scans.checks.policy: '{code}' cannot be '{action}'; it allows {allowed}.")


# ── One image ──────────────────────────────────────────────────────────────────────────────────────────────────────

_STORAGE = "1.2.840.10008.5.1.4.1.1"
_CAPTURES = (f"{_STORAGE}.7", f"{_STORAGE}.7.")
_SEGMENTATION = "a segmentation, not a scan: a label table names it as a mask (studies.labels.mask)"
_NO_SCANS = {  # volumes with a place in space that no scanner measured
    f"{_STORAGE}.66.4": _SEGMENTATION,
    f"{_STORAGE}.66.7": _SEGMENTATION,
    f"{_STORAGE}.481.2": "a dose that was computed for a treatment, not a scan",
}
_SONOGRAMS = (f"{_STORAGE}.6.", f"{_STORAGE}.3.1", f"{_STORAGE}.3", f"{_STORAGE}.6")
_VIDEOS = (f"{_STORAGE}.77.1.1.1", f"{_STORAGE}.77.1.2.1", f"{_STORAGE}.77.1.4.1")
_WRITTEN_ON = frozenset({"US", "IVUS", "XA", "OT", "SC", "ES"})  # modalities whose pictures carry text as a rule
_SCOUTS = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SCANOGRAM", "SURVIEW")


def check_too_large(header: Header, config: ScansConfig) -> tuple[Finding, ...]:
    """Find an object whose declared size is past the limits, before anything is allocated."""
    pixels = header.rows * header.columns
    if pixels > config.max_megapixels * 1e6:
        limit = f"scans.max_megapixels = {config.max_megapixels:g}"
        return (Finding("too_large", f"{header.rows} x {header.columns} pixels, more than {limit}"),)
    megabytes = pixels * header.frames * header.samples * header.bits_allocated / 8e6
    if megabytes > config.max_volume_mb:
        limit = f"scans.max_volume_mb = {config.max_volume_mb:g}"
        return (Finding("too_large", f"{megabytes:.0f} MB of pixels in {header.frames} frames, more than {limit}"),)
    return ()


def check_truncated(header: Header) -> tuple[Finding, ...]:
    """Find pixel data that is shorter than the header declares, or runs past the end of the file."""
    if header.pixel_offset is None or header.pixel_length is None:
        return ()
    bits = header.rows * header.columns * header.frames * header.samples * header.bits_allocated
    if header.photometric == "YBR_FULL_422":
        bits = bits * 2 // 3
    wanted, found = (bits + 7) // 8, min(header.pixel_length, header.file_size - header.pixel_offset)
    if found >= wanted and found == header.pixel_length:
        return ()
    return (Finding("truncated", f"{max(found, 0)} bytes of pixel data where the header declares {wanted}"),)


def check_extra_bytes(header: Header) -> tuple[Finding, ...]:
    """Find more uncompressed pixels than rows, columns and frames account for; less than a line of them is padding."""
    if header.pixel_length is None or header.pixel_keyword is None or header.photometric.endswith("_422"):
        return ()
    bits = header.samples * header.bits_allocated
    wanted = (header.rows * header.columns * header.frames * bits + 7) // 8
    extra = header.pixel_length - wanted
    if extra <= 1 or extra * 8 < min(header.rows, header.columns) * bits:
        return ()
    return (Finding("extra_bytes", f"{header.pixel_length} bytes of pixel data where the header declares {wanted}"),)


def check_decoder(header: Header, decodable: Collection[str]) -> tuple[Finding, ...]:
    """Find a compression that nothing here decodes.

    Args:
        decodable: transfer syntaxes that are decoded.
    """
    if header.pixel_keyword is None or header.transfer_syntax in decodable:
        return ()
    return (Finding("no_decoder", f"no decoder is installed for transfer syntax {header.transfer_syntax}"),)


def check_mosaic(header: Header) -> tuple[Finding, ...]:
    """Find many slices tiled into one image."""
    if not header.mosaic or header.tiles is not None:
        return ()
    return (Finding("mosaic", "a mosaic, and the header does not say completely how its slices lie"),)


def check_bad_geometry(header: Header) -> tuple[Finding, ...]:
    """Find a place that is not finite, or absurd."""
    for plane in header.planes:
        words = fault(plane)
        if words not in (None, "missing"):
            return (Finding("bad_geometry", f"the header gives {words}"),)
    return ()


def check_no_geometry(header: Header) -> tuple[Finding, ...]:
    """Find a cross-sectional image that does not say where it lies."""
    if header.modality not in CROSS_SECTIONAL or header.mosaic:
        return ()
    lost = header.frames - sum(fault(plane) != "missing" for plane in header.planes[: header.frames])
    if not lost:
        return ()
    return (Finding("no_geometry", f"{lost} of {header.frames} frames lack position, orientation or pixel spacing"),)


def check_localizer(header: Header) -> tuple[Finding, ...]:
    """Find a scout, by its image type."""
    scout = any(value.strip().upper().startswith(_SCOUTS) for value in header.image_type)
    return (Finding("localizer", "the image type says that it is a localiser"),) if scout else ()


def check_no_scan(header: Header) -> tuple[Finding, ...]:
    """Find a volume with a place in space that no scanner measured."""
    reason = _NO_SCANS.get(header.sop_class or "")
    return (Finding("no_scan", reason),) if reason else ()


def check_derived(header: Header) -> tuple[Finding, ...]:
    """Find a secondary capture, or a derived secondary image without a place in space."""
    if _is_capture(header):
        return (Finding("derived", "a secondary capture: a picture of a screen or of paper"),)
    if header.image_type[:2] == ("DERIVED", "SECONDARY") and not _has_place(header):
        return (Finding("derived", "the image type says DERIVED, SECONDARY, and it has no place in space"),)
    return ()


def check_derived_volume(header: Header) -> tuple[Finding, ...]:
    """Record an image that was computed from others and knows where it lies."""
    if header.image_type[:2] == ("DERIVED", "SECONDARY") and not _is_capture(header) and _has_place(header):
        return (Finding("derived_volume", "the image type says DERIVED, SECONDARY: computed from other images"),)
    return ()


def check_burned_in(header: Header) -> tuple[Finding, ...]:
    """Find the risk of burned-in text: the header says so, or this kind has it and no header denies it."""
    said = (header.burned_in or "").strip().upper()
    if said == "YES":
        return (Finding("burned_in", "the header says that text is burned into the picture"),)
    sop = header.sop_class or ""
    screen = any(value.strip().upper().startswith(("SCREEN", "DOSE_INFO")) for value in header.image_type)
    risky = screen or _is_capture(header) or header.modality in _WRITTEN_ON or sop.startswith(_SONOGRAMS[:1])
    if said != "NO" and (risky or sop in _SONOGRAMS or sop in _VIDEOS):
        return (Finding("burned_in", "this kind of picture often has text in it, and the header does not deny it"),)
    return ()


def check_executable_preamble(header: Header) -> tuple[Finding, ...]:
    """Find a file that is a program too. Source: CVE-2019-11687."""
    if header.executable is None:
        return ()
    return (Finding("executable_preamble", f"the file starts like a program ({header.executable})"),)


def check_missing_rescale(header: Header) -> tuple[Finding, ...]:
    """Find a CT image whose values are of unknown scale."""
    if header.modality != "CT" or header.has_lut or check_localizer(header) or _is_capture(header):
        return ()
    if header.planes and all(plane.slope is not None and plane.intercept is not None for plane in header.planes):
        return ()
    return (Finding("missing_rescale", "a CT image without rescale slope and intercept"),)


HEADER_CHECKS: tuple[Callable[[Header], tuple[Finding, ...]], ...] = (
    check_truncated,
    check_extra_bytes,
    check_executable_preamble,
    check_bad_geometry,
    check_mosaic,
    check_no_geometry,
    check_localizer,
    check_no_scan,
    check_derived,
    check_derived_volume,
    check_burned_in,
    check_missing_rescale,
)


def check_header(header: Header, config: ScansConfig, decodable: Collection[str] | None = None) -> tuple[Finding, ...]:
    """Run every check of one object.

    Args:
        decodable: transfer syntaxes that are decoded; ``None`` leaves that to the decoder.
    """
    findings = [*check_too_large(header, config)]
    if decodable is not None:
        findings += check_decoder(header, decodable)
    return (*findings, *(finding for check in HEADER_CHECKS for finding in check(header)))


def _is_capture(header: Header) -> bool:
    sop = header.sop_class or ""
    return sop == _CAPTURES[0] or sop.startswith(_CAPTURES[1])


def _has_place(header: Header) -> bool:
    return len(header.planes) >= header.frames and all(fault(plane) is None for plane in header.planes)


# ── One series ─────────────────────────────────────────────────────────────────────────────────────────────────────


def check_foreign_patient(headers: Sequence[Header]) -> tuple[Finding, ...]:
    """Find images of several patients under one series identifier; an unknown patient is another one."""
    patients = Counter((header.patient, header.issuer) for header in headers)
    if len(patients) < 2:
        return ()
    fewest = sum(patients.values()) - max(patients.values())
    return (Finding("foreign_patient", f"{fewest} of {len(headers)} images of the series name another patient"),)


def check_mixed_series(headers: Sequence[Header]) -> tuple[Finding, ...]:
    """Find a series identifier that is used in several studies, modalities or frames of reference."""
    kinds: tuple[tuple[str, set[str | None]], ...] = (
        ("studies", {header.study for header in headers}),
        ("modalities", {header.modality for header in headers}),
        ("frames of reference", {header.frame_of_reference for header in headers if not check_localizer(header)}),
    )
    mixed = [f"{len(values)} {what}" for what, values in kinds if len(values) > 1]
    return (Finding("mixed_series", f"one series identifier in {' and '.join(mixed)}"),) if mixed else ()


def check_incomplete(refused: int) -> tuple[Finding, ...]:
    """Find a series of which files were refused.

    Args:
        refused: number of files of the series that could not be read.
    """
    return (Finding("incomplete", f"{refused} files of the series were refused"),) if refused else ()


def check_concatenations(headers: Sequence[Header]) -> tuple[Finding, ...]:
    """Find a multi-frame object that was cut into several of which one is not here.

    Its frames would be missing from an end of the stack unseen, or leave whole volumes out.
    """
    wholes: dict[str, set[tuple[Part, int]]] = defaultdict(set)
    for header in headers:
        if header.part is not None:
            wholes[header.part.whole].add((header.part, header.frames))
    for parts in wholes.values():
        words = _contradiction(parts)
        if words:
            return (Finding("incomplete", f"of an object that was cut into several {words}"),)
    return ()


def _contradiction(parts: Collection[tuple[Part, int]]) -> str | None:
    """Say why parts are not one whole; copies of a part are one."""
    numbers = Counter(part.number for part, _ in parts)
    said = max([*(part.total or 0 for part, _ in parts), *numbers])
    lost = set(range(1, said + 1)) - set(numbers)
    if lost:
        return f"part {min(lost)} of {said} is not here"
    if 0 in numbers or max(numbers.values()) > 1:
        return "the parts are not numbered, or several have one number"
    before = 0
    for part, frames in sorted(parts, key=lambda one: one[0].number):
        if part.offset is not None and part.offset != before:
            return f"part {part.number} begins at frame {part.offset + 1}, and {before} frames are before it"
        before += frames
    return None


def check_scattered(headers: Sequence[Header], groups: Sequence[Group]) -> tuple[Finding, ...]:
    """Find an object that was cut into several whose parts, each read by itself, do not make the same kind of volumes.

    Which of its dimensions parts it into volumes can differ from part to part; a volume would then lack what the other
    parts hold of it.
    """
    kinds: dict[str, set[tuple[str, ...] | None]] = defaultdict(set)
    for one in groups:
        stacked = one.is_stack and len(one.members) > 1
        for index, _ in one.members:
            part = headers[index].part
            if part is not None and part.total != 1:
                kinds[part.whole].add(tuple(sorted(key for key, _ in one.splits)) if stacked else None)
    if all(len(kind) == 1 and None not in kind for kind in kinds.values()):
        return ()
    return (Finding("incomplete", "the parts of an object that was cut into several do not make the same volumes"),)


def check_fewer_than_declared(headers: Sequence[Header]) -> tuple[Finding, ...]:
    """Find a series that has fewer images than ImagesInAcquisition, or NumberOfSlices of a PET, says.

    It is what shows that slices are missing at an end of a stack. Images computed from others keep the number of those;
    where an acquisition became several series (or volumes of one), the number is no more than a bound.
    """
    own = [header for header in headers if not (header.mosaic or check_localizer(header) or _is_capture(header))]
    original = [header for header in own if header.frames == 1 and header.image_type[:1] != ("DERIVED",)]
    declared = max((header.declared or 0 for header in original), default=0)
    found = sum({one.sop_instance or n: one.frames for n, one in enumerate(own)}.values())  # a copy is no other image
    if declared <= found:
        return ()
    return (Finding("fewer_than_declared", f"{found} images, and a header declares {declared}"),)


def check_lost_slices(headers: Sequence[Header], groups: Sequence[Group]) -> tuple[Finding, ...]:
    """Find frames of a series of slices whose own place is absurd (``bad_geometry``) or missing (``no_geometry``)."""
    if not any(one.is_stack and len(one.members) > 1 for one in groups):
        return ()
    findings = {}
    for one in groups:
        for index, frame in () if one.is_stack else one.members:
            header = headers[index]
            if header.mosaic or check_localizer(header) or _is_capture(header):
                continue
            words = fault(header.planes[frame]) if frame < len(header.planes) else "missing"
            if words == "missing":
                findings["no_geometry"] = "an image of a series of slices does not say where it lies"
            elif words:
                findings["bad_geometry"] = f"an image of a series of slices has {words}"
    return tuple(Finding(code, reason) for code, reason in sorted(findings.items()))


def check_mixed_slices(headers: Sequence[Header], groups: Sequence[Group]) -> tuple[Finding, ...]:
    """Find the odd slice of a series: another orientation, matrix, spacing or format than the many.

    Several stacks of a series are no fault (a spine, the planes of a survey): a part is odd where it is a single slice,
    or less than a tenth of the largest stack. It would otherwise be missing from the end of the stack unseen.
    """
    stacks = [one for one in groups if one.is_stack or headers[one.members[0][0]].samples > 1]
    stacks = [one for one in stacks if not _is_aside(headers[one.members[0][0]])]
    largest = max(stacks, key=lambda one: (len(one.members), one.is_stack), default=None)
    if largest is None or len(largest.members) < 2 or not largest.is_stack:
        return ()
    findings: dict[str, str] = {}
    for one in stacks:
        lost = len(one.members) == 1 and headers[one.members[0][0]].frames > 1  # no image of its own either
        if len(largest.members) < 3 and not lost:
            continue
        if len(one.members) == 1 or 10 * len(one.members) < len(largest.members):
            found = _difference(headers, one.members[0], largest.members[0])
            if found:
                findings[found[0]] = f"{len(one.members)} beside {len(largest.members)} slices {found[1]}"
    return tuple(Finding(code, reason) for code, reason in sorted(findings.items()))


def check_series(
    headers: Sequence[Header], refused: int = 0, groups: Sequence[Group] | None = None
) -> tuple[Finding, ...]:
    """Run every check of one series; what is found concerns each of its volumes and images.

    Args:
        headers: of one series identifier, all that there are.
        refused: number of its files that could not be read at all.
        groups: what :func:`~medtl.scans.geometry.group` made of them, where it was asked already.
    """
    groups = group(headers) if groups is None else groups
    return (
        *check_foreign_patient(headers),
        *check_mixed_series(headers),
        *check_incomplete(refused),
        *check_concatenations(headers),
        *check_scattered(headers, groups),
        *check_fewer_than_declared(headers),
        *check_lost_slices(headers, groups),
        *check_mixed_slices(headers, groups),
    )


def _is_aside(header: Header) -> bool:
    return bool(check_localizer(header)) or _is_capture(header)


def _difference(headers: Sequence[Header], odd: Member, usual: Member) -> tuple[str, str] | None:
    one, other = headers[odd[0]], headers[usual[0]]
    if (one.rows, one.columns) != (other.rows, other.columns):
        return "mixed_size", "has another matrix"
    if (one.samples, one.bits_allocated, one.signed, one.photometric, one.pixel_keyword) != (
        other.samples,
        other.bits_allocated,
        other.signed,
        other.photometric,
        other.pixel_keyword,
    ):
        return "mixed_format", "stores its pixels in another format"
    plane, reference = one.planes[odd[1]], other.planes[usual[1]]
    if _differs(plane.spacing_mm, reference.spacing_mm, 0.0, SPACING_TOLERANCE):
        return "mixed_size", "has another pixel spacing"
    if _differs(plane.orientation, reference.orientation, ORIENTATION_TOLERANCE, 0.0):
        return "mixed_orientation", "lies in another orientation"
    return None


def _differs(one: Sequence[float] | None, other: Sequence[float] | None, absolute: float, relative: float) -> bool:
    pairs = zip(one or (), other or (), strict=False)
    return any(not math.isclose(a, b, abs_tol=absolute, rel_tol=relative) for a, b in pairs)


# ── One volume ─────────────────────────────────────────────────────────────────────────────────────────────────────


def check_missing_slices(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find gaps that are multiples of the others."""
    missing = _missing(placed)
    if not missing:
        return ()
    gaps = placed.gaps_mm
    reason = f"a gap of {np.max(gaps):.4g} mm where {np.min(gaps):.4g} mm is usual: {missing} slices are missing"
    return (Finding("missing_slices", reason),)


def check_uneven_gaps(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find gaps that differ by more than 1 %, and are no multiples."""
    if unevenness(placed) <= GAP_TOLERANCE or _missing(placed):
        return ()
    gaps = placed.gaps_mm
    usual = float(np.median(gaps))
    return (Finding("uneven_gaps", f"gaps of {np.min(gaps):.4g} to {np.max(gaps):.4g} mm, {usual:.4g} mm as a rule"),)


def check_decimated(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find an even stack from which slices were taken out evenly.

    In this order: a gap that is a multiple of the declared spacing between slices says so, a gap that is equal to it
    clears the series (gapped and overlapping acquisitions declare theirs); without that, numbers that skip 1, 2, ...
    that no other image of the series has, and a gap that is a multiple of the slice thickness, say so.
    Some scanners write the space *between* slices into SpacingBetweenSlices; then thickness + space is the gap. Others
    give it a sign for the direction (PS3.3 C.8.4.15 does, for NM).
    """
    gaps = placed.gaps_mm
    if not len(gaps) or unevenness(placed) > GAP_TOLERANCE:
        return ()
    gap = float(np.median(gaps))
    thickness = _usual(plane.thickness_mm for plane in placed.planes)
    between = _usual(None if mm is None else abs(mm) for mm in (plane.between_mm for plane in placed.planes))
    step = _number_step(headers, volume)
    found = f"slices lie {gap:.4g} mm apart"
    if between is not None:
        if math.isclose(gap, between, rel_tol=0.02):
            return ()
        is_space = (
            thickness is not None and between < thickness / 2 and math.isclose(gap, thickness + between, rel_tol=0.02)
        )
        if _multiple(gap, between) and not (is_space and step == 1):
            return (Finding("decimated", f"{found}, the header declares {between:.4g} mm between slices"),)
    if step > 1:
        return (Finding("decimated", f"{found} and their numbers go in steps of {step}"),)
    if between is None and thickness is not None and _multiple(gap, thickness):
        return (Finding("decimated", f"{found} and are {thickness:.4g} mm thick"),)
    return ()


def check_displaced(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find slices that are off the straight line of the others by more than a tenth of a pixel."""
    away = displacement_mm(placed)
    if away <= max(0.1, 0.1 * min(volume.spacing_mm[:2])):
        return ()
    return (Finding("displaced_slices", f"a slice lies {away:.3g} mm off within its plane"),)


def check_gantry_tilt(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find a sheared stack."""
    if not is_tilted(volume):
        return ()
    declared = _declared_tilt(headers, volume)
    said = "the header declares none" if declared is None else f"the header declares {declared:.1f}"
    return (Finding("gantry_tilt", f"positions are sheared by {shear(volume)[0]:.1f} degrees; {said}"),)


def check_tilt_conflict(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find a declared gantry tilt that positions and orientation do not show."""
    declared = _declared_tilt(headers, volume)
    if declared is None or placed.step_mm is None:
        return ()
    angle = shear(volume)[0] if is_tilted(volume) else 0.0
    inclined = math.degrees(math.acos(min(1.0, abs(float(placed.axes[2][2])))))  # of the slices against the axial plane
    if abs(angle - abs(declared)) <= 1.0 or (angle == 0.0 and abs(inclined - abs(declared)) <= 1.0):
        return ()
    return (Finding("tilt_conflict", f"the header declares {declared:.1f} degrees, positions show {angle:.1f}"),)


def check_split_by_order(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Record that only the order of a number tells this volume from others."""
    keyword = next((keyword for keyword, _ in volume.splits if keyword in BY_ORDER), None)
    if keyword is None:
        return ()
    words = keyword.removesuffix("Rank")
    return (Finding("split_by_order", f"only the order of {words} tells the volumes of this series apart"),)


def check_mixed_values(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find slices of one stack that differ in what makes separate volumes."""
    mixed = _mixed(headers, volume)
    return (Finding("mixed_values", f"slices of one stack differ in {', '.join(mixed)}"),) if mixed else ()


def check_mixed_derived(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find derived slices among original ones."""
    kinds = Counter((headers[index].image_type or ("?",))[0] for index, _ in volume.members)
    if len(kinds) < 2 or "DERIVED" not in kinds:
        return ()
    return (Finding("derived", f"{kinds['DERIVED']} of {len(volume.members)} slices are derived, the others are not"),)


def check_inconsistent_rescale(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find slices that differ in what a stored value means; PET scanners scale every slice, and say so in each."""
    scales = Counter((plane.slope, plane.intercept, plane.rescale_type) for plane in placed.planes)
    if len(scales) < 2:
        return ()
    units = {unit for _, _, unit in scales}
    complete = all(slope is not None and intercept is not None for slope, intercept, _ in scales)
    if complete and len(units) == 1 and {headers[index].modality for index, _ in volume.members} == {"PT"}:
        return (Finding("scaled_by_slice", f"{len(scales)} different scales in {len(placed.planes)} slices"),)
    fewest = len(placed.planes) - max(scales.values())
    reason = f"{fewest} of {len(placed.planes)} slices have another rescale slope, intercept or unit"
    return (Finding("inconsistent_rescale", reason),)


def check_zero_slope(headers: Sequence[Header], volume: Volume, placed: Placed) -> tuple[Finding, ...]:
    """Find a rescale slope of 0 in every slice: all values would be one; an empty PET slice may have it."""
    if any(plane.slope != 0 for plane in placed.planes):
        return ()
    return (Finding("bad_header", "a rescale slope of 0 in every slice"),)


VOLUME_CHECKS: tuple[Callable[[Sequence[Header], Volume, Placed], tuple[Finding, ...]], ...] = (
    check_missing_slices,
    check_uneven_gaps,
    check_displaced,
    check_decimated,
    check_gantry_tilt,
    check_tilt_conflict,
    check_mixed_values,
    check_mixed_derived,
    check_inconsistent_rescale,
    check_zero_slope,
    check_split_by_order,
)


def check_duplicates(
    headers: Sequence[Header], volume: Volume, placed: Placed, digests: Mapping[Member, Hashable] | None = None
) -> tuple[Finding, ...]:
    """Find slices at one place: copies (``duplicate_pixels``) or not (``duplicate_position``).

    Args:
        digests: of the pixels of each member; without them, no slice is known to be a copy.
    """
    shared = [there for there in _by_place(volume, placed).values() if len(there) > 1]
    if not shared:
        return ()
    copies = [there for there in shared if digests and len({_content(headers, m, digests) for m in there}) == 1]
    findings = []
    if len(copies) < len(shared):
        extra = sum(map(len, shared)) - sum(map(len, copies)) - (len(shared) - len(copies))
        findings.append(Finding("duplicate_position", f"{extra} slices lie where another slice lies"))
    if copies:
        extra = sum(map(len, copies)) - len(copies)
        findings.append(Finding("duplicate_pixels", f"{extra} slices are copies of another slice at the same place"))
    return tuple(findings)


def check_repeated_pixels(
    headers: Sequence[Header],
    volume: Volume,
    placed: Placed,
    digests: Mapping[Member, Hashable],
    blank: Collection[Hashable] = (),
) -> tuple[Finding, ...]:
    """Find the same pixels at different places of a volume.

    Args:
        digests: of the pixels of each member.
        blank: digests of images of one value, which may repeat.
    """
    places: dict[Hashable, set[int]] = defaultdict(set)
    for place, there in _by_place(volume, placed).items():
        for member in there:
            places[digests[member]].add(place)
    repeated = sum(len(where) - 1 for digest, where in places.items() if len(where) > 1 and digest not in blank)
    return (Finding("repeated_pixels", f"{repeated} slices repeat the pixels of another place"),) if repeated else ()


def check_volume(
    headers: Sequence[Header],
    volume: Volume,
    digests: Mapping[Member, Hashable] | None = None,
    blank: Collection[Hashable] = (),
) -> tuple[Finding, ...]:
    """Run every check of one volume.

    Args:
        headers: those that the volume was built from, all of its series: numbers that other images have are not gaps.
        digests: of the stored pixels of each member, where they are known.
        blank: digests of images of one value.
    """
    placed = measure(headers, volume.members)
    findings = [finding for check in VOLUME_CHECKS for finding in check(headers, volume, placed)]
    findings += check_duplicates(headers, volume, placed, digests)
    if digests is not None:
        findings += check_repeated_pixels(headers, volume, placed, digests, blank)
    return tuple(findings)


def examine(
    headers: Sequence[Header],
    config: ScansConfig,
    refused: int = 0,
    digests: Mapping[Member, Hashable] | None = None,
    blank: Collection[Hashable] = (),
) -> tuple[Volume, ...]:
    """Build and judge every volume of two or more slices of one series.

    Each has its findings: its own, those of its series and those of its images. Frames that are in no volume are single
    images, for :func:`check_header` and :func:`check_series`.
    """
    groups = group(headers)
    of_series = check_series(headers, refused, groups)
    of_header = [check_header(header, config) for header in headers]
    volumes = []
    for one in groups:
        if one.is_stack and len(one.members) > 1:
            volume = build(headers, one)
            indices = sorted({index for index, _ in volume.members})
            own = (*check_volume(headers, volume, digests, blank), *_check_bytes(headers, volume, config))
            images = _summed([of_header[index] for index in indices])
            volumes.append(replace(volume, findings=_once((*own, *of_series, *images))))
    return _with_shorter(headers, volumes)


def _with_shorter(headers: Sequence[Header], volumes: Sequence[Volume]) -> tuple[Volume, ...]:
    """Find volumes that lack slices at an end, which only shows beside the other echoes, b-values or times.

    They may be shorter than those, or lie elsewhere: parts that follow each other in space are parts of one stack.
    """
    alike: dict[Hashable, list[int]] = defaultdict(list)
    parts: dict[Hashable, list[int]] = defaultdict(list)
    for number, volume in enumerate(volumes):
        keywords = tuple(keyword for keyword, _ in volume.splits if keyword != "StackID")
        stack = tuple(value for keyword, value in volume.splits if keyword == "StackID")
        rows = [[round(value, 3) for value in row[:3]] for row in volume.affine[:3]]
        kind = (headers[volume.members[0][0]].series, stack, volume.shape[1:], tuple(tuple(row[:2]) for row in rows))
        if keywords:
            alike[kind, keywords, tuple(row[2] for row in rows)].append(number)
        if strong := tuple(keyword for keyword in keywords if keyword in STRONG):
            parts[kind, strong].append(number)  # whatever their steps: those of a part are rounded otherwise
    reasons: dict[int, str] = {}
    for numbers in parts.values():
        for number, missing in zip(numbers, _ends_early([volumes[number] for number in numbers]), strict=True):
            if missing:
                reasons[number] = (
                    f"another part of the series, alike but for its values, reaches {missing:.4g} mm further"
                )
    for numbers in alike.values():
        most = max(volumes[number].shape[0] for number in numbers)
        for number in numbers:
            if (count := volumes[number].shape[0]) < most:
                reasons[number] = (
                    f"{count} slices where another part of the series, alike but for its values, has {most}"
                )
    return tuple(
        replace(one, findings=_once((*one.findings, Finding("incomplete", reasons[number]))))
        if number in reasons
        else one
        for number, one in enumerate(volumes)
    )


def _ends_early(volumes: Sequence[Volume]) -> list[float]:
    """Tell by how many mm each volume ends before the others that it touches or overlaps; 0: by less than a slice.

    What lies apart from it is another stack: the other hip, another station of the table.
    """
    reach = [_reach(volume) for volume in volumes]
    short = [0.0] * len(volumes)
    joined: list[list[int]] = []
    for number in sorted(range(len(volumes)), key=lambda n: reach[n]):
        low, _, gap = reach[number]
        near = next((some for some in joined if _side_by_side(volumes[some[-1]], volumes[number])), None)
        if near is None or low - max(reach[n][1] for n in near) > 1.5 * max(gap, *(reach[n][2] for n in near)):
            joined.insert(0, near := [])
        near.append(number)
    for some in joined:
        lowest, highest = min(reach[n][0] for n in some), max(reach[n][1] for n in some)
        for n in some:
            missing = max(reach[n][0] - lowest, highest - reach[n][1])
            short[n] = missing if missing > 0.9 * reach[n][2] else 0.0
    return short


def _side_by_side(one: Volume, other: Volume) -> bool:
    """Tell whether two volumes of one orientation lie above each other: in plane they are within half a field."""
    first, second = (np.array(volume.affine)[:3] for volume in (one, other))
    for axis, side in ((0, one.shape[2]), (1, one.shape[1])):
        size = float(np.linalg.norm(first[:, axis]))
        if abs(float((second[:, 3] - first[:, 3]) @ first[:, axis]) / size) > size * side / 2:
            return False
    return True


def _reach(volume: Volume) -> tuple[float, float, float]:
    """Give the heights of the lowest and the highest slice along the normal, and what lies between two, in mm."""
    matrix = np.array(volume.affine)[:3]
    row, column = (matrix[:, axis] / np.linalg.norm(matrix[:, axis]) for axis in (0, 1))
    normal = np.cross(row, column)
    step = float(matrix[:, 2] @ normal)
    ends = sorted((float(matrix[:, 3] @ normal), float(matrix[:, 3] @ normal) + (volume.shape[0] - 1) * step))
    return ends[0], ends[1], abs(step)


def drop_copies(headers: Sequence[Header], volume: Volume, digests: Mapping[Member, Hashable]) -> Volume:
    """Build a volume once more without the copies that ``duplicate_pixels`` found.

    Of slices at one place with the same pixels and scale the first stays. Nothing else changes: the repair is exact.
    """
    kept: list[Member] = []
    for there in _by_place(volume, measure(headers, volume.members)).values():
        first: dict[Hashable, Member] = {}
        for member in there:
            first.setdefault(_content(headers, member, digests), member)
        kept += first.values()
    return build(headers, Group(tuple(sorted(kept)), True, volume.splits))


def check_mask_geometry(
    mask_shape: tuple[int, int, int],
    mask_affine: Affine,
    image_shape: tuple[int, int, int],
    image_affine: Affine,
) -> tuple[Finding, ...]:
    """Find a mask that does not lie on its image's grid: another shape, or a corner more than a tenth of a voxel away.

    Args:
        mask_shape: slices, rows, columns; so is the image's.
        mask_affine: voxel (column, row, slice) -> RAS+ mm; so is the image's.
    """
    if tuple(mask_shape) != tuple(image_shape):
        return (Finding("mask_geometry", f"the mask has the shape {mask_shape}, its image {image_shape}"),)
    ends = [(0.0, float(size - 1)) for size in reversed(image_shape)]
    corners = np.array([(x, y, z, 1.0) for x in ends[0] for y in ends[1] for z in ends[2]]).T
    of_mask, of_image = np.array(mask_affine), np.array(image_affine)
    away = float(np.max(np.linalg.norm((of_mask @ corners - of_image @ corners)[:3], axis=0)))
    smallest = float(np.min(np.linalg.norm(of_image[:3, :3], axis=0)))
    if away <= 0.1 * smallest:  # not the other way round: NaN is no match
        return ()
    return (Finding("mask_geometry", f"a corner of the mask lies {away:.3g} mm from that of its image"),)


def _check_bytes(headers: Sequence[Header], volume: Volume, config: ScansConfig) -> tuple[Finding, ...]:
    bits = headers[volume.members[0][0]].bits_allocated
    megabytes = math.prod(volume.shape) * bits / 8e6
    if megabytes <= config.max_volume_mb:
        return ()
    limit = f"scans.max_volume_mb = {config.max_volume_mb:g}"
    return (Finding("too_large", f"a volume of {megabytes:.0f} MB, more than {limit}"),)


def _missing(placed: Placed) -> int:
    """Count the slices that would make the gaps even; 0 where they are even, or cannot be made even."""
    gaps = placed.gaps_mm
    if unevenness(placed) <= GAP_TOLERANCE:
        return 0
    smallest = gaps[gaps < 1.1 * np.min(gaps)]
    times = gaps / float(np.median(smallest))
    whole = np.round(times)
    if np.any(np.abs(times - whole) > np.maximum(0.05, 0.01 * whole)):
        return 0
    return int(np.sum(whole - 1))


def _number_step(headers: Sequence[Header], volume: Volume) -> int:
    """Give the step of InstanceNumber where no other image of the series has the numbers between; otherwise 1."""
    indices = {index for index, _ in volume.members}
    own = sorted({number for i in indices if (number := headers[i].instance_number) is not None})
    steps = {later - earlier for earlier, later in pairwise(own)}
    if len(own) < max(3, len(volume.members)) or len(steps) != 1:
        return 1
    series = headers[volume.members[0][0]].series
    others = {header.instance_number for header in headers if header.series == series}.difference(own)
    return 1 if any(other is not None and own[0] < other < own[-1] for other in others) else steps.pop()


def _usual(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and 0 < value <= MAX_SPACING_MM]
    return float(np.median(known)) if known else None


def _multiple(gap: float, unit: float) -> bool:
    times = round(gap / unit)
    return times >= 2 and math.isclose(gap, times * unit, rel_tol=0.02)


def _declared_tilt(headers: Sequence[Header], volume: Volume) -> float | None:
    return _signed_usual([headers[index].gantry_tilt_degrees for index, _ in volume.members])


def _signed_usual(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.median(known)) if known else None


def _mixed(headers: Sequence[Header], volume: Volume) -> list[str]:
    values = split_values(headers, volume.members)
    return [keyword for keyword in STRONG if len(set(values.get(keyword, ()))) > 1]


def _by_place(volume: Volume, placed: Placed) -> dict[int, list[Member]]:
    places: dict[int, list[Member]] = defaultdict(list)
    for member, place in zip(volume.members, placed.places.tolist(), strict=True):
        places[place].append(member)
    return places


def _content(headers: Sequence[Header], member: Member, digests: Mapping[Member, Hashable]) -> Hashable:
    plane = headers[member[0]].planes[member[1]]
    return digests[member], plane.slope, plane.intercept, plane.rescale_type


def _summed(found: Sequence[tuple[Finding, ...]]) -> tuple[Finding, ...]:
    """Give each code of many images once, with the number of images that have it."""
    counts = Counter(finding.code for findings in found for finding in findings)
    first = {finding.code: finding for findings in reversed(found) for finding in findings}
    return tuple(
        Finding(code, first[code].reason if n == len(found) else f"{n} of {len(found)} images: {first[code].reason}")
        for code, n in sorted(counts.items())
    )


def _once(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Keep the first finding of every code."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.code, finding)
    return tuple(first.values())
