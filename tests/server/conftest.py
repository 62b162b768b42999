"""One server with the fake engine for all tests that do not harm it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running import Server
from toys import byte_level, write


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write(tmp_path_factory.mktemp("shared") / "toy", byte_level())
    with Server(model, "--max-body-bytes", "100000", "--max-queued-requests", "64") as server:
        yield server.ready()


@pytest.fixture
def http(shared: Server) -> httpx.Client:
    return shared.client


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A model directory of a test's own."""
    return write(tmp_path / "toy", byte_level())
