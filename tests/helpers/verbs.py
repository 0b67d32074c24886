"""Commands called in this process, and what the trail says against the workspace that they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medtl.audit import AuditLog
from pipelines.cli import call
from pipelines.trail import verify_workspace


def medtl(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Call a command with ``--json``; give its exit code, what it told, and what it said on stderr."""
    capsys.readouterr()
    code = call([*map(str, arguments), "--json"])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return code, json.loads(lines[-1]) if lines else None, said.err


def faults_of(workspace: Path) -> list[str]:
    """Name what in a workspace is not as its trail says."""
    trail = AuditLog(workspace)
    return [fault.where for fault in verify_workspace(workspace, trail.verify(), trail.events())]
