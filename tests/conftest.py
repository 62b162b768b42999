"""Shared by all tests: the passive OpenMP wait that the engine runs with, and the rule about skips."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Spinning OpenMP threads stall each other on small machines; must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _has_gpu() -> bool:
    """Asked of the driver, not of torch, which must not be imported yet."""
    return Path("/dev/nvidiactl").exists()


# Without a GPU Triton's kernels run in its interpreter; it must be told before they are defined.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DATA = Path(__file__).parent / "data"

# Reasons a test may be skipped even where everything is installed: what the machine itself cannot do.
EXPECTED_SKIPS = ("no CUDA device", "io_uring is not available", "O_DIRECT is not available", "AVX-512")
EXPECTED_SKIPS += (
    "a file system of its own is not available",
)  # needs user namespaces, or to be allowed to mount
EXPECTED_SKIPS += ("FUSE is not available",)

_unexpected: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not any(expected in reason for expected in EXPECTED_SKIPS):
            _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected and os.environ.get("MEMLANE_CI"):
        for line in _unexpected:
            print(f"\nunexpected skip: {line}")
        session.exitstatus = 1


@pytest.fixture(scope="session")
def data() -> Path:
    """The golden vectors and other files that tests read."""
    return DATA
