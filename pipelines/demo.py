"""A small synthetic hospital and a source task, written once, with the configs that run on them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from medtl.artifacts import storage_errors
from medtl.config import Config, load_config
from medtl.errors import ConfigError

log = logging.getLogger("medtl")
SOURCE = "demo-source"


def builtin_config(name: str) -> Path:
    """Give the path of a config that comes with medtl: in the source tree, or inside the installed package.

    Raises:
        ConfigError: there is none of this name.
    """
    here = Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ConfigError(f"There is no built-in config '{name}'.")


def prepare_demo(folder: Path, overrides: Sequence[str]) -> tuple[Config, Config]:
    """Write the hospital and the source task where they are missing; give the configs of target and source.

    Raises:
        StorageError: the folder cannot be written.
    """
    from medtl.scans.phantom import write_hospital, write_source_task

    hospital, source = folder / "hospital", folder / "source"
    workspace = f"workspace={(folder / 'workspace').as_posix()}"
    target = load_config(
        builtin_config("demo"),
        [workspace, f"scans.source={hospital.as_posix()}", f"model.weights=vault:{SOURCE}", *overrides],
    )
    general = [o for o in overrides if o.startswith(("workspace=", "seed="))]
    pretraining = load_config(builtin_config(SOURCE), [workspace, f"scans.source={source.as_posix()}", *general])
    # both are written under another name and renamed when complete
    for place, last, write in ((hospital, "DICOM", write_hospital), (source, "source_task.npz", write_source_task)):
        if not (place / last).exists():
            log.info("writing %s", place)
            with storage_errors(place):
                place.mkdir(parents=True, exist_ok=True)
                write(place)
    return target, pretraining
