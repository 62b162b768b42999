"""Tests on a GPU, a process for each file and several files at once, so that one bad kernel hides nothing else.

A test that hangs costs its own time limit and its process; so does one that crashes it, or leaves its GPU context broken.
The rest of the file then runs in a fresh process. How each test went is read from a ledger: see plugin/gpu_ledger.py.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpu_process import Check, Ended

__all__ = ["Found", "Part", "Problem", "Way", "run_parts"]

_MOST_PROCESSES = 8  # for one part: each takes some seconds to load torch
_LEAST_SECONDS = 5.0  # that are worth starting one
_LAST_TEST = 10.0  # seconds for the test under way when time is up
_NO_TIME = "no time left"  # as the ledger says it


class Part(NamedTuple):
    """Some tests of a file: every so many, beginning with that of a number, from 1 on."""

    file: str
    number: int = 1
    parts: int = 1

    @property
    def name(self) -> str:
        return Path(self.file).stem + (f"-{self.number}" if self.parts > 1 else "")


class Way(NamedTuple):
    """How tests are run. timeout: seconds that one may take, then pytest ends its process and says where it was; grace:
    seconds later the process is ended if it could not do that. select: as pytest's -k. prefix: a command that is given pytest
    to run. environment: beside the usual."""

    timeout: float = 60.0
    grace: float = 5.0
    select: str = ""
    prefix: Sequence[str | Path] = ()
    environment: Mapping[str, str] = {}


class Problem(NamedTuple):
    """A test that did not do as it should."""

    test: str
    why: str


@dataclass
class Found:
    """How the tests of a part went. incomplete: why some of them did not run, "" if all did. statuses, output: of all its
    processes."""

    part: Part
    entries: list[dict[str, Any]] = field(default_factory=list)  # of the ledger
    incomplete: str = _NO_TIME
    seconds: float = 0.0
    statuses: list[int | None] = field(default_factory=list)
    output: str = ""

    @property
    def problems(self) -> list[Problem]:
        found = [Problem(entry["ended"], entry["why"]) for entry in self._ended("failed")]
        if not found and self.statuses and self.statuses[-1] == 1:
            found = [Problem(self.part.file, "tests were skipped that should run here; see the log")]
        return found

    @property
    def passed(self) -> int:
        return len(self._ended("passed"))

    @property
    def skipped(self) -> int:
        return len(self._ended("skipped"))

    @property
    def slowest(self) -> tuple[float, str]:
        """Seconds and name of a test; 0 and "" if none ended."""
        times = [
            (entry["seconds"], entry["ended"].split("::", 1)[-1])
            for entry in self.entries
            if "ended" in entry
        ]
        return max(times, default=(0.0, ""))

    def _ended(self, outcome: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry.get("outcome") == outcome]


def run_parts(check: Check, stage: str, parts: Sequence[Part], seconds: float, way: Way) -> list[Found]:
    """Runs the tests of all parts within `seconds`, as many parts at once as there are jobs."""
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(check.jobs) as pool:
        return list(
            pool.map(lambda part: _run_part(check, f"{stage}-{part.name}", part, deadline, way), parts)
        )


def _run_part(check: Check, name: str, part: Part, deadline: float, way: Way) -> Found:
    ledger = check.log(name).with_suffix(".jsonl")
    ledger.unlink(missing_ok=True)
    check.log(name).unlink(missing_ok=True)
    command = [
        *way.prefix,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "gpu_ledger",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--timeout={way.timeout:.0f}", "--timeout-method=thread", part.file]
    command += ["-k", way.select] if way.select else []
    found, started = Found(part), time.monotonic()
    while (left := deadline - time.monotonic()) > _LEAST_SECONDS:
        if len(found.statuses) == _MOST_PROCESSES:
            found.incomplete = f"{_MOST_PROCESSES} processes were not enough"
            break
        ended = check.run(
            name, *command, limit=left, hangs=lambda: _hangs(ledger, way), **way.environment, MEMLANE_LEDGER=str(ledger),
            MEMLANE_LEDGER_SECONDS=f"{max(1.0, left - _LAST_TEST):.0f}",
            MEMLANE_LEDGER_PART=f"{part.number}/{part.parts}",
        )  # fmt: skip
        found.statuses.append(ended.status)
        found.output += ended.output
        known, found.entries = len(found.entries), _entries(ledger)
        last = found.entries[-1] if len(found.entries) > known else {}
        if "stopped" in last:
            if last["stopped"] in ("", _NO_TIME):
                found.incomplete = last["stopped"]
                break
        elif "began" in last:  # and never ended
            with ledger.open("a") as file:
                entry = {
                    "ended": last["began"],
                    "outcome": "failed",
                    "seconds": 0.0,
                    "why": _death(ended, way.timeout),
                }
                file.write(json.dumps(entry) + "\n")
        else:
            found.incomplete = _death(ended, way.timeout)
            break
    found.entries = _entries(ledger)
    found.seconds = round(time.monotonic() - started, 1)
    return found


def _hangs(ledger: Path, way: Way) -> bool:
    """Whether a test began long ago and has not ended."""
    entries = _entries(ledger)
    began = bool(entries) and "began" in entries[-1]
    return began and time.time() - ledger.stat().st_mtime > way.timeout + way.grace


def _death(ended: Ended, timeout: float) -> str:
    """What became of a process that did not end as pytest does."""
    if ended.hung or "+++ Timeout +++" in ended.output:
        return f"hung: more than {timeout:.0f} s"
    if ended.status is None:
        return "did not end before time was up"
    if ended.status < 0:
        return f"took the process with it ({signal.Signals(-ended.status).name})"
    lines = re.findall(r"\S.*", ended.output)
    return f"took the process with it (exit status {ended.status}): {lines[-1][:200] if lines else ''}"


def _entries(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
