"""A pytest plugin that notes each test when it begins and when it ends, so that what is known outlives the process.

    {"began": "tests/gpu/test_rows.py::test_odd_widths[fp8]"}
    {"ended": "tests/gpu/test_rows.py::test_odd_widths[fp8]", "outcome": "passed", "seconds": 0.4, "why": ""}
    {"stopped": ""}            all that was collected has been run; else the reason why not

A test that began and never ended hung until its time limit, or took the process with it. Run again with the same ledger,
pytest leaves out the tests that are in it. After a failure that left the GPU unusable to this process, as every error
inside a kernel does, no further test is begun: all would fail. Nor is one once time is up.

    MEMLANE_LEDGER=file MEMLANE_LEDGER_SECONDS=60 MEMLANE_LEDGER_PART=2/3 python -m pytest -p gpu_ledger ...

runs every third test, beginning with the second.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

__all__ = ["pytest_configure"]

_NO_TIME = "no time left"
_BROKEN = "the GPU's context is broken"


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("MEMLANE_LEDGER")
    if path:
        config.pluginmanager.register(_Ledger(Path(path), float(os.environ["MEMLANE_LEDGER_SECONDS"])))


class _Ledger:
    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._deadline = time.monotonic() + seconds
        self._known = {entry.get("began") for entry in _entries(path)}
        part, parts = os.environ.get("MEMLANE_LEDGER_PART", "1/1").split("/")
        self._part = slice(int(part) - 1, None, int(parts))
        self._session: pytest.Session | None = None
        self._reports: list[pytest.TestReport] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left = [item for item in items[self._part] if item.nodeid not in self._known]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._write(began=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = [report for report in self._reports if report.failed]
        skipped = any(report.skipped for report in self._reports)
        self._write(
            ended=nodeid,
            outcome="failed" if failed else "skipped" if skipped else "passed",
            seconds=round(sum(report.duration for report in self._reports), 2),
            why=_why(failed[0]) if failed else "",
        )
        assert self._session is not None
        if failed and _gpu_is_unusable():
            self._session.shouldstop = _BROKEN
        elif time.monotonic() > self._deadline:
            self._session.shouldstop = _NO_TIME

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(began=report.nodeid)
            self._write(ended=report.nodeid, outcome="failed", seconds=0.0, why=_why(report))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._write(stopped=str(session.shouldstop or ""))

    def _write(self, **entry: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The error in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(report.longrepr if crash is None else crash.message).strip().splitlines() or [""]
    return (lines[0] if crash is not None else lines[-1])[:300]


def _gpu_is_unusable() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # what every call says from the first error of a kernel on
        return True
    return False
