"""A pickle becomes safetensors, in a process that may die.

A pickle is a program. It is read with ``weights_only``, which knows tensors and little else, and because that guard has
been passed by before, in a child with limits on memory, time and file size, a bare environment and no core dumps. The
child writes safetensors into a temporary folder; the parent believes nothing else that it says: its answer is matched
against patterns. A child that crashes, hangs or asks for too much costs that file alone.

The child opens the pickle and writes the safetensors itself, which no other module outside the doors may do, because a
parent that parses a pickle would not be protected.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medtl.errors import WeightsError
from medtl.limits import bare_environment, limit_this_process

_MB = 1 << 20
_MOST_REPLY = 1000  # bytes
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,99}")
_GLOBAL = re.compile(r"GLOBAL ([A-Za-z_][A-Za-z0-9_.]{0,99})")
_REASONS: Mapping[str, str] = {
    "damaged": "it is damaged or cut off ({name})",
    "forbidden": "it holds more than tensors ({name}), which is refused because it could run code. Save the network's "
    "state_dict() alone, or as safetensors",
    "no_state": "it holds no state dict (names to tensors)",
    "torchscript": "it is a TorchScript program. Save the network's state_dict() instead",
    "archive": "it is an archive of files. Unpack it, and name one of the files",
    "unstorable": "its tensors cannot be stored ({name}): sparse or quantised, perhaps. Save plain tensors",
    "memory": "reading it takes more memory than a file of its size should",
    "size": "its tensors are far larger than the file: made to fill the disk, or compressed",
    "time": "reading it does not come to an end",
    "crash": "the process that reads it crashed on it",
}


@dataclass(frozen=True, slots=True)
class PickleLimits:
    """What reading a pickle may take beyond importing torch; grows with the size of the file."""

    seconds: float = 120.0
    seconds_per_mb: float = 0.1
    memory_bytes: int = 1 << 30
    memory_per_byte: float = 4.0
    start_seconds: float = 120.0  # importing torch from a cold disk


def convert_pickle(source: Path, target: Path, limits: PickleLimits | None = None) -> None:
    """Turn a pickled state dict into a safetensors file, in a child process.

    Args:
        source: the pickle.
        target: the file to write; its bytes are as untrusted as the pickle's.
        limits: what the child may take.

    Raises:
        WeightsError: it is no set of weights; nothing was run.
    """
    limits, size = limits or PickleLimits(), source.stat().st_size
    seconds = limits.seconds + limits.seconds_per_mb * size / _MB
    memory = limits.memory_bytes + int(limits.memory_per_byte * size)
    command = (sys.executable, "-P", "-m", "medtl.model.pickles", str(source.resolve()), str(target.resolve()))
    child = subprocess.Popen(  # noqa: S603 - our own module
        (*command, str(memory), str(math.ceil(seconds)), str(2 * size + 64 * _MB)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=bare_environment(),
        start_new_session=True,  # Ctrl-C is the parent's to handle
    )
    try:
        answer, _ = child.communicate(timeout=limits.start_seconds + seconds)
        reason = _understood(answer, child.returncode)
    except subprocess.TimeoutExpired:
        reason = _REASONS["time"]
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # with whatever it may have started
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    if reason is None and not target.is_file():
        reason = _REASONS["crash"]
    if reason is not None:
        raise WeightsError(f"'{source.name}' is not a readable set of weights: {reason}.")


def _understood(answer: bytes, code: int) -> str | None:
    """Take from a child's answer what can be true: ``None`` where it says that all went well."""
    by_signal = {-signal.SIGXCPU: "time", -signal.SIGKILL: "memory"}
    if code:
        return _REASONS[by_signal.get(code, "crash")]
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(answer[:_MOST_REPLY]):
            case ["done", ""]:
                return None
            case [str(kind), str(name)] if kind in _REASONS:
                return _REASONS[kind].format(name=name if _NAME.fullmatch(name) else "something without a name")
    return _REASONS["crash"]


# ── the child ───────────────────────────────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one pickle: the child's whole life."""
    source, target, memory, seconds, file_bytes = arguments if arguments is not None else sys.argv[1:]
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    import torch
    from safetensors.torch import save_file

    from medtl.model.weights import state_in, stored_form

    torch.set_num_threads(1)
    limit_this_process(int(memory), int(seconds), int(file_bytes))
    stage = "damaged"
    try:
        answer = _kind_of_archive(source)
        if not answer[0]:
            loaded = torch.load(source, map_location="cpu", weights_only=True)
            stage = "no_state"
            state = state_in(loaded)
            stage = "unstorable"
            save_file(stored_form(state), target)
            answer = ("done", "")
    except MemoryError:
        answer = ("memory", "")
    except Exception as error:  # a hostile file raises anything; whatever it is, these are no weights
        answer = _said(stage, error)
    os.write(replies, json.dumps(answer).encode())
    return 0


def _kind_of_archive(source: str) -> tuple[str, str]:
    """Tell a zip archive that torch did not write as a state dict."""
    if not zipfile.is_zipfile(source):
        return "", ""
    with zipfile.ZipFile(source) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    if "data.pkl" not in names:
        return "archive", ""
    return ("torchscript", "") if "constants.pkl" in names else ("", "")


def _said(stage: str, error: Exception) -> tuple[str, str]:
    text = str(error)
    if "alloc" in text and isinstance(error, RuntimeError):
        return "memory", ""
    if stage == "unstorable" and ("File too large" in text or isinstance(error, OSError)):
        return "size", ""
    if isinstance(error, pickle.UnpicklingError) and (found := _GLOBAL.search(text)):
        return "forbidden", found[1].rstrip(".")
    if isinstance(error, pickle.UnpicklingError) and "Unsupported" in text:
        return "forbidden", type(error).__name__
    return stage, type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
