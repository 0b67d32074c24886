"""The floors, the rooms and the doors, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from medtl.config import Config

ROOT = Path(__file__).parents[1]
MEDTL = ROOT / "medtl"
ROOMS = sorted(p.name for p in MEDTL.iterdir() if (p / "__init__.py").exists())
FOUNDATION = sorted(p.stem for p in MEDTL.glob("*.py"))
# cryptography: the audit trail is signed, and nobody should write that by himself
ALLOWED_BELOW = set(sys.stdlib_module_names) | {"numpy", "pydantic", "yaml", "medtl", "cryptography"}
# Beside io.py: sources.py lists and reads what comes in; the phantom writes the files that everything else is tried on;
# page.py reads its own template; the folder pacs is the network's door and keeps what arrives; vault.py is the weight
# vault: files and network; parcel.py is how a release leaves and arrives as one file.
DOORS = {"io.py", "pacs", "sources.py", "phantom.py", "page.py", "vault.py", "parcel.py"}
# Call by call: the pixel store maps its segments; the children that decode pixels and read pickles open what their
# parents named; a download is kept in the file that the vault named.
EXACTLY = {
    "segments.py": {"open", "memmap"},
    "decoding.py": {"open", "fdopen"},
    "pickles.py": {"torch.load", "save_file"},
    "download.py": {"open", "unlink"},
}
OPENERS = {
    "open", "read_bytes", "write_bytes", "read_text", "write_text", "dcmread", "imread", "imwrite", "memmap", "fdopen",
    "tofile", "fromfile", "loadtxt", "savetxt", "savez", "savez_compressed", "load_file", "save_file", "safe_open",
    "mkdir", "makedirs", "mkdtemp", "unlink", "rmdir", "rmtree", "touch", "symlink_to", "copyfile", "copytree",
}  # fmt: skip
# Names that mean a file only where one of these modules is asked.
LIBRARIES = {"np", "numpy", "nib", "nibabel", "torch"}
LIBRARY_OPENERS = {"load", "save"}
ANONYMOUS = {"utils", "util", "helpers", "common", "base", "manager", "misc"}


def imports(source: str) -> set[str]:
    """Name everything a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def opened(source: str) -> set[str]:
    """Name the calls that touch files; one on bytes in memory (``io.BytesIO(data)``) does not."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [node.func for node in nodes if not (node.args and _is_memory(node.args[0]))]
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}
    asked = {(getattr(f.value, "id", ""), f.attr) for f in calls if isinstance(f, ast.Attribute)}
    return names & OPENERS | {f"{m}.{name}" for m, name in asked if m in LIBRARIES and name in LIBRARY_OPENERS}


def _is_memory(argument: ast.expr) -> bool:
    return isinstance(argument, ast.Call) and ast.unparse(argument.func) in ("io.BytesIO", "BytesIO")


def sideways(source: str, room: str) -> set[str]:
    """Name what a room imports that it may not."""
    others = {f"medtl.{other}" for other in ROOMS if other != room} | {"prefect", "pipelines"}
    return {name for name in imports(source) if any(name == o or name.startswith(f"{o}.") for o in others)}


def test_the_checks_can_fail() -> None:
    assert imports("def f():\n    import torch.nn\n    from medtl.scans import io") >= {"torch.nn", "medtl.scans.io"}
    assert opened("from pathlib import Path\nPath('x').read_text()") == {"read_text"}
    for source in ("np.load(p)", "np.save(p, a)", "nibabel.load(p)", "nib.save(i, p)", "torch.load(p)"):
        assert opened(source) == {source.split("(")[0]}
    for source in ("folder.mkdir()", "path.unlink()", "os.unlink(p)", "shutil.rmtree(p)", "a.tofile(p)", "mkdir(p)"):
        assert len(opened(source)) == 1, source
    assert opened("np.load(io.BytesIO(data))\nImage.open(BytesIO(data))") == set()
    assert opened("json.loads(t)\nyaml.safe_load(t)\nfacts.load(t)\nname.replace('a', 'b')") == set()
    assert sideways("from medtl.scans.io import survey", "model") == {"medtl.scans.io", "medtl.scans.io.survey"}
    assert sideways("from medtl.scans.io import survey", "scans") == set()


@pytest.mark.parametrize("name", FOUNDATION)
def test_the_foundation_stands_on_little(name: str) -> None:
    above = {n for n in imports((MEDTL / f"{name}.py").read_text()) if n.split(".")[0] not in ALLOWED_BELOW}
    assert not above
    rooms = {n for n in imports((MEDTL / f"{name}.py").read_text()) if n.split(".")[:1] == ["medtl"]}
    assert not {n for n in rooms if len(n.split(".")) > 1 and n.split(".")[1] in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_looks_into_another(room: str) -> None:
    for path in (MEDTL / room).rglob("*.py"):
        assert not sideways(path.read_text(), room), path.name


def test_evaluation_is_numpy_and_scikit_learn_only() -> None:
    for path in (MEDTL / "evaluation").glob("*.py"):
        tops = {name.split(".")[0] for name in imports(path.read_text())}
        assert not tops & {"torch", "monai", "torchvision", "matplotlib", "cv2", "pandas"}, path.name


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_doors_open_files(room: str) -> None:
    for path in (MEDTL / room).rglob("*.py"):
        if path.name not in DOORS and path.parent.name not in DOORS:
            calls = opened(path.read_text()) - EXACTLY.get(path.name, set())
            assert not calls, f"{path.name}: {calls}"


@pytest.mark.parametrize("name", EXACTLY)
def test_no_exception_is_wider_than_what_is_used(name: str) -> None:
    (path,) = MEDTL.glob(f"*/{name}")
    assert opened(path.read_text()) == EXACTLY[name]


def test_nothing_is_called_utils() -> None:
    assert not {p.stem for p in [*MEDTL.rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]} & ANONYMOUS


def test_only_tasks_has_tasks_and_the_library_does_not_print() -> None:
    for path in (ROOT / "pipelines").glob("*.py"):
        if path.name != "tasks.py":
            assert "prefect.task" not in imports(path.read_text()), path.name
    for path in MEDTL.rglob("*.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [f for f in calls if getattr(f, "id", "") == "print"], path.name


def sections(model: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            yield (*path, name)
            yield from sections(inner, (*path, name))


def _models(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def test_a_config_path_is_a_code_path() -> None:
    # a list of phases or conditions lives in the module of the section it is a list of
    described_in = {"scratch_phases": "phases", "gate": None, "incumbent": None, "subgroup_floor": None}
    for path in set(sections(Config)):
        last = described_in.get(path[-1], path[-1])
        module = (*path[:-1], last) if last else path[:-1]
        place = MEDTL.joinpath(*module)
        assert place.is_dir() or place.with_suffix(".py").is_file(), ".".join(path)


@pytest.mark.parametrize("module", ["medtl", "pipelines.cli"])
def test_importing_is_cheap(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'monai', 'prefect', 'pydicom') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
