"""README, docs and command line cannot drift apart."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.cli import app
from pipelines.look import config_reference

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_shows_every_verb_and_no_other() -> None:
    known = {name for name in app if not name.startswith("-")}
    shown = set(re.findall(r"`medtl ([a-z-]+)", README))
    assert shown == known


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)", README, re.M)) <= targets


def test_the_config_reference_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == config_reference(), "run `make docs`"
