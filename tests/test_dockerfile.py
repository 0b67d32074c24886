"""No engine runs here, so the Dockerfile is read, and its install steps are run in a clean environment."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n\s*", "", TEXT).splitlines()


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{name} ")]


def test_what_is_copied_exists_in_git() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    for copy in instructions("COPY"):
        if not copy.startswith("--from"):
            for source in copy.split()[:-1]:
                assert any(f == source or f.startswith(f"{source}/") for f in tracked), source


def test_the_image_is_slim_fixed_private_and_not_root() -> None:
    assert len(instructions("FROM")) == 2
    assert all(re.match(r"python:3\.11-slim-\w+", base) for base in instructions("FROM"))
    assert instructions("USER")[-1] not in ("root", "0")
    assert instructions("VOLUME") == ["/workspace"]
    assert instructions("HEALTHCHECK")
    for private in (
        "PREFECT_SERVER_ANALYTICS_ENABLED=false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY=false",
        "DO_NOT_TRACK=1",
    ):
        assert any(private in line.split() for line in instructions("ENV")), private


def test_nothing_is_installed_but_what_a_lock_pins_with_hashes() -> None:
    steps = [step for run in instructions("RUN") for step in run.split("&&") if "pip install" in step]
    assert len(steps) == 3
    for step in steps:
        assert "--no-deps" in step
        assert "--require-hashes -r requirements" in step or step.split()[-1] == "/build/dist/medtl-*.whl", step


def test_the_wheel_is_built_with_the_versions_that_the_tests_ran_with() -> None:
    build, dev = ((ROOT / f"requirements-{name}.lock").read_text() for name in ("build", "dev"))
    entries = re.findall(r"^[a-zA-Z0-9._-]+==.*?(?=^\S|\Z)", build, re.M | re.S)
    assert "".join(entries) == build and all("--hash=sha256:" in entry for entry in entries)
    assert all(entry in dev for entry in entries)
    pinned, wanted = {entry.split("==")[0] for entry in entries}, {"hatchling"}
    for name in pinned:  # each is wanted, and what it wants is there
        needs = [Requirement(line) for line in requires(name) or ()]
        wanted |= {need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})}
    assert wanted == pinned


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_the_lock_pins_every_dependency_with_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    entries = re.findall(r"^([a-zA-Z0-9._-]+)==(\S+)(.*?)(?=^\S|\Z)", text, re.M | re.S)
    pinned: dict[str, list[str]] = {}
    for name, version, rest in entries:
        assert "--hash=sha256:" in rest, name
        pinned.setdefault(name.lower(), []).append(version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ["test", "lint", "build"] if "dev" in lock else []
    wanted = project["dependencies"] + [r for extra in extras for r in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, wanted):
        versions = pinned[requirement.name.lower()]
        assert all(requirement.specifier.contains(version) for version in versions), requirement


@pytest.mark.slow
def test_its_install_steps_work_in_a_clean_environment(tmp_path: Path) -> None:
    (build,) = [run for run in instructions("RUN") if "pip wheel" in run]
    tree = tmp_path / "build"
    subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
    tree.mkdir()
    for copy in instructions("COPY"):
        if not copy.startswith("--from") and "/opt" not in copy:
            for source in copy.split()[:-1]:
                subprocess.run(["cp", "-r", str(ROOT / source), str(tree / source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "opt" / "venv")], check=True)
    command = build.replace("python -m venv", f"{sys.executable} -m venv")
    command = command.replace("/opt/", f"{tmp_path}/opt/").replace("/build/dist", f"{tree}/dist")
    subprocess.run(["bash", "-euc", command], cwd=tree, check=True, capture_output=True, timeout=300)
    site = next((tmp_path / "opt" / "venv" / "lib").glob("python3*/site-packages"))
    assert (tmp_path / "opt" / "venv" / "bin" / "medtl").is_file()
    for inside in (
        "pipelines/configs/demo.yaml",
        "medtl/report/page.html.jinja",
        "medtl/report/page.css",
        "medtl/config.py",
    ):
        assert (site / inside).is_file(), inside
