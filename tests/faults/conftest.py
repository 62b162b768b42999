"""Helpers of the server's and the engine's tests are used here too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for folder in ("server", "engine"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture(autouse=True)
def _no_state_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What servers keep for their next start stays within the test."""
    monkeypatch.setenv("MEMLANE_CACHE", str(tmp_path / "cache"))
