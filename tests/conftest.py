"""What every test may use; no test touches the user's home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a home folder with a key of pseudonyms that is the same in every session.

    Which patients train and which are tested follows from their pseudonyms: under a new key each time, what a small
    network learns would be another thing each time too.
    """
    folder = tmp_path_factory.mktemp("home")
    key = folder / ".config" / "medtl" / "pseudonym.key"
    key.parent.mkdir(parents=True, mode=0o700)
    key.write_bytes(b"the key of every session of tests")
    key.chmod(0o600)
    saved = dict(os.environ)
    os.environ.update(HOME=str(folder), XDG_CONFIG_HOME=str(folder / ".config"))
    for name in ("PREFECT_HOME", "PREFECT_API_URL"):
        os.environ.pop(name, None)
    yield folder
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Give the folder that holds ``data/`` and ``weights/``; `make test-data` names it."""
    named = os.environ.get("MEDTL_TEST_DATA")
    if not named or not (Path(named) / "data").is_dir():
        pytest.fail("MEDTL_TEST_DATA does not name a folder that holds data/ and weights/")
    return Path(named)
