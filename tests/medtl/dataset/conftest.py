"""A plan to change."""

from __future__ import annotations

import pytest

from medtl.records import Plan


@pytest.fixture
def plan() -> Plan:
    return Plan("binary", ("healthy", "ill"), (32, 32), 1, 8, "fixed", 0.0, 255.0, (0.0, 100.0), {}, {})
