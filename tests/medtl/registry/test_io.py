"""The register gives out what was entered, and nothing that was refused by accident."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from medtl.artifacts import Store, write_json
from medtl.errors import MedtlError, StorageError, TamperedError
from medtl.records import Artifact, Release
from medtl.registry.io import Register


def made(workspace: Path, number: int = 0) -> Artifact:
    return Store(workspace).make("release", {"n": number}, lambda folder: write_json(folder / "x.json", number))


def register(workspace: Path, *statuses: Any) -> Register:
    found = Register(workspace)
    for number, status in enumerate(statuses):
        found.enter(Release(f"r-{number}", "study", status, ()), made(workspace, number), {})
    return found


@pytest.mark.parametrize("asked, given", [(None, "r-2"), ("r-0", "r-0"), ("r-1", "r-1"), ("r-2", "r-2")])
def test_a_refused_release_is_given_only_by_its_name(tmp_path: Path, asked: str | None, given: str) -> None:
    found = register(tmp_path, "validated", "refused", "candidate", "refused")
    assert found.choose("study", asked, candidates=True).release.release_id == given


@pytest.mark.parametrize("asked", ["r-1", "r-2", "r-9"])
def test_without_leave_only_a_validated_release_is_given(tmp_path: Path, asked: str) -> None:
    found = register(tmp_path, "validated", "refused", "candidate")
    assert found.choose("study", None, candidates=False).release.release_id == "r-0"
    with pytest.raises(MedtlError, match="no validated release"):
        found.choose("study", asked, candidates=False)


def test_a_status_written_into_the_register_by_hand_changes_nothing(tmp_path: Path) -> None:
    found = register(tmp_path, "refused")
    path = tmp_path / "registry" / "r-0.json"
    path.write_text(path.read_text().replace('"refused"', '"live"'))
    assert [entry.release.status for entry in found.entries()] == ["refused"]
    (tmp_path / "audit.jsonl").unlink()
    (tmp_path / "audit.head").unlink()
    assert [entry.release.status for entry in found.entries()] == ["candidate"]


def test_a_release_whose_event_a_crash_swallowed_is_entered_the_next_time(tmp_path: Path) -> None:
    found = register(tmp_path, "validated")
    (tmp_path / "audit.jsonl").unlink()
    (tmp_path / "audit.head").unlink()
    assert not found.enter(Release("r-0", "study", "validated", ()), made(tmp_path, 0), {})
    assert [entry.release.status for entry in found.entries()] == ["validated"]
    assert len(found.trail.events()) == 1


def test_the_live_release_is_given_before_newer_ones_and_a_retired_one_never(tmp_path: Path) -> None:
    found = register(tmp_path, "validated", "validated", "validated")
    found.trail.append("release.live", "r-0")
    assert found.choose("study", None, candidates=False).release.release_id == "r-0"
    found.trail.append("release.retired", "r-0")
    found.trail.append("release.approved", "r-1")
    assert found.choose("study", None, candidates=False).release.release_id == "r-1"
    with pytest.raises(MedtlError, match=r"r-0 \(retired\)"):
        found.choose("study", "r-0", candidates=True)


def test_an_empty_workspace_has_no_release(tmp_path: Path) -> None:
    with pytest.raises(MedtlError, match="found: none"):
        Register(tmp_path).choose("study", None, candidates=True)


def test_another_artifact_in_its_place_is_refused_though_its_own_manifest_fits(tmp_path: Path) -> None:
    found = register(tmp_path, "validated")
    entry = found.entries()[0]
    other = made(tmp_path, 7)
    assert found.open(entry) == made(tmp_path, 0).path
    shutil.rmtree(tmp_path / entry.artifact)
    shutil.copytree(other.path, tmp_path / entry.artifact)
    with pytest.raises(TamperedError, match="not what was entered"):
        found.open(entry)


def test_a_release_whose_files_are_gone_says_so(tmp_path: Path) -> None:
    found = register(tmp_path, "validated")
    entry = found.entries()[0]
    shutil.rmtree(tmp_path / entry.artifact)
    with pytest.raises(StorageError, match="are gone"):
        found.open(entry)


def test_a_beginning_that_fits_several_releases_is_refused_and_names_them(tmp_path: Path) -> None:
    found = Register(tmp_path)
    for number, release_id in enumerate(("r-12ab", "r-12cd", "r-12", "r-345")):
        found.enter(Release(release_id, "study", "validated", ()), made(tmp_path, number), {})
    found.enter(Release("r-3477", "other", "validated", ()), made(tmp_path, 9), {})
    with pytest.raises(MedtlError, match=r"'r-1' fits several releases: r-12ab \(validated\), r-12cd .*, r-12 "):
        found.choose("study", "r-1", candidates=False)
    for asked, given in (("r-12", "r-12"), ("r-12a", "r-12ab"), ("r-3", "r-345")):
        assert found.choose("study", asked, candidates=False).release.release_id == given


def test_a_register_that_points_elsewhere_is_not_believed(tmp_path: Path) -> None:
    found = register(tmp_path, "validated", "refused")
    good, bad = (tmp_path / "registry" / f"r-{n}.json" for n in (0, 1))
    other = json.loads(bad.read_text())
    forged = {**json.loads(good.read_text()), "artifact": other["artifact"], "digest": other["digest"]}
    good.write_text(json.dumps(forged))
    with pytest.raises(TamperedError, match="not what was entered"):
        found.open(found.called("r-0"))


def test_another_release_under_a_known_name_is_refused(tmp_path: Path) -> None:
    found = register(tmp_path, "validated")
    with pytest.raises(TamperedError, match="entered as r-0 already"):
        found.enter(Release("r-0", "study", "validated", ()), made(tmp_path, 5), {})
