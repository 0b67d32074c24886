"""A release as a MONAI bundle, and what runs when somebody runs it.

How medtl prepares a scan cannot be said in MONAI's transforms. So the bundle holds the release as it is, says how scans
are read, and its target is :func:`predict` here: in a workspace that is gone afterwards it does what ``medtl predict``
does. It holds no pickle and no expression. Before the release is loaded, every file is held against ``SHA256SUMS``.
MONAI has read ``configs`` by then: look into a stranger's bundle before you run it.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtl import __version__
from medtl.artifacts import code_digest, file_digest, read_record, storage_errors, write_bytes, write_json
from medtl.audit import AuditedStore
from medtl.config import Config, parse_config
from medtl.errors import ConfigError, StorageError, TamperedError
from medtl.pseudonyms import KEY_BYTES
from medtl.records import Calibrator, Checkpoint, Plan, Release
from pipelines.examination import CALIBRATOR

if TYPE_CHECKING:
    from medtl.model.onnx import AnsweringNetwork

log = logging.getLogger("medtl")
SETTINGS = "configs/medtl.json"
# https://docs.monai.io, MONAI Bundle Specification
_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_ROOMS = ("scans", "dataset", "model", "evaluation")  # whose code decides a probability
_INFERENCE = {
    "bundle_root": ".",
    "input_dir": None,
    "output": None,
    "names": True,
    "network_def": {"_target_": "pipelines.bundle.network", "bundle_root": "@bundle_root"},
    "run": [
        {
            "_target_": "pipelines.bundle.predict",
            "bundle_root": "@bundle_root",
            "input_dir": "@input_dir",
            "output": "@output",
            "names": "@names",
        }
    ],
}


def predict(bundle_root: str, input_dir: str | None, output: str | None, names: bool = True) -> dict[str, Any]:
    """Apply the bundle's release to a folder of scans; write the table that ``medtl predict`` writes.

    Nothing is kept but the table: no trail, no pixels. The pseudonyms of scans that were left out are new each time.

    Args:
        names: put file names into the table.

    Raises:
        ConfigError: no folder or no table is named.
        TamperedError: a file of the bundle is not what was written.
    """
    root = check(bundle_root)
    if not input_dir or not output:
        raise ConfigError("Name a folder of scans and a table to write: --input_dir FOLDER --output FILE.csv.")
    out = Path(str(output))
    if out.absolute().is_relative_to(root.absolute()):
        raise ConfigError("The table would lie in the bundle, which then is not what was written. Name another folder.")
    with tempfile.TemporaryDirectory(prefix="medtl-bundle-") as folder:
        workspace, key = Path(folder) / "workspace", Path(folder) / "key"
        key.write_bytes(secrets.token_bytes(KEY_BYTES))
        return _predicted(root, workspace, key, Path(str(input_dir)), out, names)


def network(bundle_root: str) -> AnsweringNetwork:
    """Give the bundle's network: prepared images in, calibrated probabilities out.

    Raises:
        TamperedError: a file of the bundle is not what was written.
    """
    from medtl.dataset.io import read_plan
    from medtl.model.io import read_network
    from medtl.model.onnx import AnsweringNetwork

    models = check(bundle_root) / "models"
    return AnsweringNetwork(read_network(models), read_plan(models), read_record(models / CALIBRATOR, Calibrator))


def check(bundle_root: str | Path) -> Path:
    """Hold every file of a bundle against its SHA256SUMS; give its folder.

    Raises:
        StorageError: there is no bundle.
        TamperedError: a file is altered, missing, or was put there.
    """
    from medtl.registry.parcel import SUMS

    root = Path(str(bundle_root))
    try:
        lines = (root / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"'{root}' is no bundle that medtl wrote: its {SUMS} cannot be read.") from error
    said = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    with storage_errors(root):
        there = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != SUMS}
        wrong = sorted(name for name in said if name not in there or file_digest(root / name) != said[name])
    added = len(there - said.keys())
    if wrong or added:
        raise TamperedError(
            f"The bundle in '{root}' is not what was written: altered or missing {', '.join(wrong) or 'none'}; "
            f"{added} files that are not its own. Fetch it again."
        )
    return root


def write_bundle(folder: Path, release: Release, config: Config, out: Path) -> str:
    """Write a release as a bundle in one step; give the sha256 of its SHA256SUMS.

    Args:
        folder: of the release, verified.
        release: as it stands now.
        config: how scans are read.

    Raises:
        ConfigError: the config is another model's.
        StorageError: ``out`` is there already, or cannot be written.
    """
    from medtl.registry import parcel

    if config.name != release.name:
        raise ConfigError(f"The config is that of '{config.name}', and the release is one of '{release.name}'.")
    temporary: Path | None = None
    with storage_errors(out):
        if out.exists():
            raise StorageError(f"'{out}' is there already. Name another folder.")
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
            for name in ("configs", "docs"):
                (temporary / name).mkdir()
            shutil.copytree(folder, temporary / "models")
            write_json(temporary / SETTINGS, settings(config))
            write_json(temporary / "configs" / "inference.json", _INFERENCE)
            write_json(temporary / "configs" / "metadata.json", described(folder, release))
            told = (folder / parcel.CARD).read_text(encoding="utf-8") + _how_to_run(release)
            write_bytes(temporary / "docs" / "README.md", told.encode())
            write_bytes(temporary / "LICENSE", _licence(folder).encode())
            parcel.write_sums(temporary)
            temporary.rename(out)
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
    return file_digest(out / parcel.SUMS)


def settings(config: Config) -> dict[str, Any]:
    """Take from a config what decides how scans are read and computed; no path of this machine is among it."""
    scans = config.scans.model_dump(mode="json", exclude={"source", "key_file", "pacs", "deidentify"})
    table = config.studies.labels.table
    beside = {} if table is not None and table.is_absolute() else {"table": None if table is None else str(table)}
    return {
        "medtl": code_digest(*_ROOMS),
        "config": {
            "name": config.name,
            "seed": config.seed,
            "scans": scans,
            "studies": {"labels": beside},  # a label table among the scans is none of them
            "model": config.model.model_dump(mode="json", include={"batch_size", "threads"}),
        },
    }


def described(folder: Path, release: Release) -> dict[str, Any]:
    """Describe a bundle in the words of MONAI's metadata."""
    from medtl.dataset.io import read_plan
    from medtl.model.io import read_checkpoint
    from medtl.model.onnx import input_name, prepared_shape

    plan, checkpoint = read_plan(folder), read_checkpoint(folder)
    size = " x ".join(map(str, prepared_shape(plan)))
    return {
        "schema": _SCHEMA,
        "version": f"0.0.0+{release.release_id}",
        "changelog": {f"0.0.0+{release.release_id}": f"release {release.release_id}, {release.status} when exported"},
        "monai_version": metadata.version("monai"),
        "pytorch_version": metadata.version("torch"),
        "numpy_version": metadata.version("numpy"),
        "required_packages_version": {"medtl": __version__, "fire": "0.7"},
        "name": release.name,
        "task": f"{plan.task} classification: {', '.join(plan.classes)}",
        "description": f"{checkpoint.backbone}, calibrated; network_def takes prepared {input_name(plan)} ({size}) and "
        "gives probabilities; the run takes scans, which medtl prepares",
        "authors": "not stated",
        "copyright": "see LICENSE",
        "intended_use": "see docs/README.md; not a medical device: a qualified person takes every decision",
        "data_source": "see docs/README.md",
        "network_data_format": {
            "inputs": {"image": _input(plan)},
            "outputs": {"pred": _output(plan)},
        },
    }


def _predicted(root: Path, workspace: Path, key: Path, scans: Path, out: Path, names: bool) -> dict[str, Any]:
    from pipelines import steps
    from pipelines.apply import Request, apply_release

    said = json.loads((root / SETTINGS).read_bytes())
    if said["medtl"] != code_digest(*_ROOMS):
        log.warning("this medtl is not the one that wrote the bundle: its answers may differ in their last digits")
    raw = said["config"] | {"workspace": str(workspace)}
    raw["scans"] |= {"source": str(scans), "key_file": str(key)}
    config = parse_config(raw, SETTINGS)
    workspace.mkdir(mode=0o700)
    release = _enter(root / "models", workspace)
    found = apply_release(config, steps.ingest_scans(config), Request(scans, out, release, True, names))
    log.info("%d scans, table %s", found["scans"], out)
    return found


def _enter(models: Path, workspace: Path) -> str:
    """Enter the bundle's release in the register of a new workspace; give its identifier."""
    from medtl.registry import parcel
    from medtl.registry.io import RELEASE, Register

    packed = workspace / "release.zip"
    parcel.pack(models, packed)
    artifact = parcel.unpack(packed, AuditedStore(workspace))
    release = read_record(artifact.path / RELEASE, Release)
    Register(workspace).enter(release, artifact, {})
    return release.release_id


def _input(plan: Plan) -> dict[str, Any]:
    modalities = plan.facts.get("modalities")
    return {
        "type": "image",
        "format": "magnitude",
        "modality": ", ".join(modalities) if modalities else "n/a",
        "num_channels": plan.channels,
        "spatial_shape": [*(() if plan.depth is None else (plan.depth,)), *plan.size],
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": False,
        "channel_def": {str(number): f"channel {number}" for number in range(plan.channels)},
    }


def _output(plan: Plan) -> dict[str, Any]:
    return {
        "type": "probabilities",
        "format": "classes",
        "num_channels": len(plan.classes),
        "spatial_shape": [],
        "dtype": "float64",
        "value_range": [0, 1],
        "is_patch_data": False,
        "channel_def": {str(number): name for number, name in enumerate(plan.classes)},
    }


def _how_to_run(release: Release) -> str:
    return f"""
## How to run it

Release {release.release_id}, {release.status} when this bundle was written. It needs medtl and fire
(`pip install 'medtl[bundle]'`), since scans are prepared by medtl. With BUNDLE for this folder:

```
(cd BUNDLE && sha256sum --quiet -c SHA256SUMS)
python -m monai.bundle run --config_file BUNDLE/configs/inference.json --bundle_root BUNDLE \\
  --input_dir FOLDER --output FILE.csv
```

The table holds a row for each scan: probabilities, the decision at the operating point, whether a person should look,
and why a scan was left out. `--names False` leaves the file names out. Pixels lie in a temporary folder (TMPDIR) while
it runs. The answers are those of `medtl predict`; no trail is kept: where it is to serve patients, take the release
into a workspace (`medtl registry import`).
"""


def _licence(folder: Path) -> str:
    from medtl.model.io import read_checkpoint

    checkpoint: Checkpoint = read_checkpoint(folder)
    weights = checkpoint.weights
    started = "at random" if weights.sha256 is None else f"from weights under: {weights.licence or 'licence not known'}"
    cited = f"Cite: {weights.citation}\n" if weights.citation else ""
    return (
        "The model in this folder belongs to whoever trained it; nothing here grants a right to it.\n"
        f"Its training started {started}.\n{cited}"
        "medtl, which runs it, is licensed under Apache-2.0.\n"
    )
