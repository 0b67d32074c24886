"""What becomes of the files of one series: volumes, images or refusals. Pure: headers in, verdicts out.

Every file ends in at least one verdict. A file that cannot be read is refused by itself, and what it says of its series
still counts: the volume that it belongs to may not be built without it (``incomplete``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from medtl.config import Action, ScansConfig
from medtl.errors import ScanError
from medtl.scans.checks import STRENGTH, action_of, check_header, check_series, decide, drop_copies, examine
from medtl.scans.formats import Kind
from medtl.scans.geometry import Finding, Volume
from medtl.scans.headers import Header
from medtl.scans.mosaic import mosaic_volume
from medtl.scans.sources import SourceFile

_OF_SPACE = frozenset({"no_geometry", "bad_geometry", "missing_rescale", "single_slice"})  # no matter for a picture
_OF_STACKS = frozenset({"fewer_than_declared", "incomplete"})  # no matter for a single image, whatever it is read as
_OF_PICTURES = frozenset({"foreign_patient"})  # of what is wrong with a series, what concerns its single images
REFUSED = frozenset({"reject", "quarantine"})


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the source and what its first bytes said."""

    file: SourceFile
    kind: Kind | None
    header: Header | None = None
    damage: ScanError | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of some files of a series.

    ``members`` are indices of the files judged; ``volume`` points into ``members``. The strongest finding comes first.
    """

    members: tuple[int, ...]
    action: Action
    findings: tuple[Finding, ...] = ()
    volume: Volume | None = None
    policy: Mapping[str, Action] = field(default_factory=dict)

    @property
    def codes(self) -> tuple[str, ...]:
        """What was found and accepted."""
        return tuple(sorted({finding.code for finding in self.findings}))

    def refuse(self, findings: Sequence[Finding]) -> tuple[Finding, ...]:
        """Judge what was found later by the same policy.

        Raises:
            ScanError: the policy refuses it.
        """
        if decide(findings, self.policy) in REFUSED:
            worst = _strongest_first(findings, self.policy)[0]
            raise ScanError(worst.code, worst.reason)
        return tuple(findings)


def judge(
    members: Sequence[Member],
    config: ScansConfig,
    accepted: Callable[[Sequence[int]], Collection[str]] = lambda _: (),
    digests: Mapping[tuple[int, int], Hashable] | None = None,
) -> tuple[Verdict, ...]:
    """Judge the files of one series, or one file that belongs to none.

    Args:
        accepted: codes that a person accepted for these files.
        digests: of the pixels of some frames, by (file, frame): what tells copies from slices that share a place.
    """
    sound = [i for i, member in enumerate(members) if member.header is not None and member.damage is None]
    verdicts = [refused((i,), m.damage, config.checks.policy) for i, m in enumerate(members) if m.damage is not None]
    verdicts += [
        Verdict((i,), "accept", policy=config.checks.policy)
        for i, member in enumerate(members)
        if member.damage is None and member.header is None
    ]
    headers = [header for i in sound if (header := members[i].header) is not None]
    if not headers:
        return tuple(verdicts)

    def verdict(own: Sequence[int], findings: Iterable[Finding], volume: Volume | None = None) -> Verdict:
        files = tuple(sound[i] for i in own)
        policy: dict[str, Action] = {**config.checks.policy, **dict.fromkeys(accepted(files), "accept")}
        ordered = _strongest_first(findings, policy)
        return Verdict(files, decide(ordered, policy), ordered, volume, policy)

    damaged = len(members) - len(sound)
    place = {i: n for n, i in enumerate(sound)}
    known = digests and {(place[i], f): digest for (i, f), digest in digests.items() if i in place}
    every = _all_digests(headers, known)
    volumes = examine(headers, config, damaged, every) if config.read != "images" else ()
    used: set[int] = set()
    for volume in volumes:
        own = sorted({index for index, _ in volume.members})
        used.update(own)
        found = verdict(own, volume.findings, _within(volume, own))
        if found.action == "repair" and every is not None and "duplicate_pixels" in found.codes:
            kept = drop_copies(headers, volume, every)
            found = Verdict(found.members, "repair", found.findings, _within(kept, own), found.policy)
        verdicts.append(found)
    for i, header in enumerate(headers):
        if header.tiles is not None and config.read != "images":
            used.add(i)
            findings = (*check_header(header, config), *check_series(headers, damaged))
            verdicts.append(verdict((i,), findings, _within(mosaic_volume(header, i), (i,))))
    of_series = [
        finding
        for finding in check_series(headers)
        if finding.code not in _OF_STACKS and (config.read != "images" or finding.code in _OF_PICTURES)
    ]
    for i, header in enumerate(headers):
        if i not in used:
            verdicts.append(_image(verdict, i, header, of_series, config))
    return tuple(verdicts)


def _image(
    verdict: Callable[..., Verdict], index: int, header: Header, of_series: Sequence[Finding], config: ScansConfig
) -> Verdict:
    """Judge one object that is part of no volume."""
    findings = [*check_header(header, config), *of_series]
    if header.pixel_keyword is None:
        findings.append(Finding("no_pixels", "a DICOM object without pixel data (a report, a plan, a cut-off file)"))
    elif header.tiles is not None:
        findings.append(Finding("mosaic", "a mosaic; scans.read is 'images'"))
    elif header.frames > 1:
        findings.append(Finding("multi_frame", f"{header.frames} frames that do not make a volume"))
    if config.read == "images":
        findings = [finding for finding in findings if finding.code not in _OF_SPACE]
    if config.read == "volumes":
        found = verdict((index,), [*findings, Finding("single_slice", "one image; scans.read is 'volumes'")])
        action = found.action if found.action in REFUSED else "quarantine"
        worst = tuple(sorted(found.findings, key=lambda one: one.code != "single_slice"))
        return Verdict(found.members, action, found.findings if found.action in REFUSED else worst, None, found.policy)
    return verdict((index,), findings)


def refused(members: tuple[int, ...], damage: ScanError, policy: Mapping[str, Action]) -> Verdict:
    """Refuse files that cannot be read: quarantined or rejected as the policy says, never taken."""
    action = action_of(damage.code, policy)
    return Verdict(members, action if action in REFUSED else "quarantine", (Finding(damage.code, damage.reason),))


def _strongest_first(findings: Iterable[Finding], policy: Mapping[str, Action]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda one: -STRENGTH.index(action_of(one.code, policy))))


def _within(volume: Volume, own: Sequence[int]) -> Volume:
    """Let a volume's members point into its own files."""
    place = {index: number for number, index in enumerate(own)}
    return replace(volume, members=tuple((place[index], frame) for index, frame in volume.members))


def _all_digests(
    headers: Sequence[Header], known: Mapping[tuple[int, int], Hashable] | None
) -> Mapping[tuple[int, int], Hashable] | None:
    """Give every frame a digest: those that were not read are like no other."""
    if known is None:
        return None
    return {(i, f): known.get((i, f), (i, f)) for i, header in enumerate(headers) for f in range(header.frames)}
