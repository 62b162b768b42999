"""Tests on a GPU, a process for each file and several files at once, so that one bad kernel hides nothing else.

A test that hangs costs its own time limit and its process; so does one that crashes it, or leaves its GPU context broken.
The rest of the file then runs in a fresh process. How each test went is read from a ledger: see gpu_ledger.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpu_process import Check, Ended

__all__ = ["Found", "Problem", "run_files"]

_MOST_PROCESSES = 8  # for one file: each takes some seconds to load torch
_LEAST_SECONDS = 5.0  # that are worth starting one
_LAST_TEST = 10.0  # seconds for the test under way when time is up


class Problem(NamedTuple):
    """A test that did not do as it should."""

    test: str
    why: str


class Found(NamedTuple):
    """How the tests of a file went. incomplete: why some of them did not run, "" if all did. slowest: a test, seconds.
    output: of all processes."""

    file: str
    passed: int
    skipped: int
    problems: list[Problem]
    incomplete: str
    seconds: float
    slowest: tuple[str, float]
    statuses: list[int | None]
    output: str


def run_files(
    check: Check,
    stage: str,
    files: Sequence[str],
    seconds: float,
    *,
    prefix: Sequence[str] = (),
    select: str = "",
    timeout: float = 60.0,
    **environment: str,
) -> list[Found]:
    """Runs each file's tests, all together within `seconds`. prefix: a command that is given pytest to run.

    select: as pytest's -k. timeout: seconds that one test may take.
    """
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(check.jobs) as pool:
        job = partial(_run_file, check, stage, deadline, tuple(prefix), select, timeout, environment)
        return list(pool.map(job, files))


def _run_file(
    check: Check,
    stage: str,
    deadline: float,
    prefix: tuple[str, ...],
    select: str,
    timeout: float,
    environment: dict[str, str],
    file: str,
) -> Found:
    name = f"{stage}-{Path(file).stem}"
    ledger = check.folder / f"{name}.jsonl"
    ledger.unlink(missing_ok=True)
    check.log(name).unlink(missing_ok=True)
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "gpu_ledger", "-p", "no:cacheprovider"]
    command += [
        f"--timeout={timeout:.0f}",
        "--timeout-method=thread",
        file,
        *(["-k", select] if select else []),
    ]
    started, ended = time.monotonic(), Ended(0, "")
    statuses: list[int | None] = []
    output, incomplete = "", "no time left"
    for _ in range(_MOST_PROCESSES):
        left = deadline - time.monotonic()
        if left < _LEAST_SECONDS:
            break
        known = len(_entries(ledger))
        ended = check.run(
            name, *command, limit=left, **environment, MEMLANE_LEDGER=str(ledger),
            MEMLANE_LEDGER_SECONDS=f"{max(1.0, left - _LAST_TEST):.0f}",
        )  # fmt: skip
        statuses.append(ended.status)
        output += ended.output
        new = _entries(ledger)[known:]
        if ended.status is None or not _stopped(new):
            died = _dangling(_entries(ledger))
            if died:
                _note(ledger, ended=died, outcome="failed", seconds=0.0, why=_death(ended, timeout))
            elif ended.status is not None:
                incomplete = _death(ended, timeout)
                break
        elif not new[-1]["stopped"]:
            incomplete = "" if ended.status in (0, 1, 5) or prefix else f"exit status {ended.status}"
            break
        if new and new[-1].get("stopped") == "no time left":
            break
    else:
        incomplete = f"{_MOST_PROCESSES} processes were not enough"
    return _found(file, _entries(ledger), incomplete, time.monotonic() - started, statuses, output)


def _found(
    file: str,
    entries: list[dict[str, Any]],
    incomplete: str,
    seconds: float,
    statuses: list[int | None],
    output: str,
) -> Found:
    done = [entry for entry in entries if "ended" in entry]
    problems = [Problem(entry["ended"], entry["why"]) for entry in done if entry["outcome"] == "failed"]
    if not problems and statuses and statuses[-1] == 1:
        problems = [Problem(file, "tests were skipped that should run here; see the log")]
    slowest = max(
        ((e["ended"].split("::", 1)[-1], e["seconds"]) for e in done), key=lambda e: e[1], default=("", 0.0)
    )
    counts = {what: sum(entry["outcome"] == what for entry in done) for what in ("passed", "skipped")}
    return Found(
        file,
        counts["passed"],
        counts["skipped"],
        problems,
        incomplete,
        round(seconds, 1),
        slowest,
        statuses,
        output,
    )


def _death(ended: Ended, timeout: float) -> str:
    """What became of a process that did not end as pytest does."""
    if ended.status is None:
        return "did not end before time was up"
    if "+++ Timeout +++" in ended.output:
        return f"hung: more than {timeout:.0f} s"
    if ended.status < 0:
        return f"took the process with it ({signal.Signals(-ended.status).name})"
    lines = re.findall(r"\S.*", ended.output)
    return f"took the process with it (exit status {ended.status}): {lines[-1][:200] if lines else ''}"


def _stopped(entries: list[dict[str, Any]]) -> bool:
    return bool(entries) and "stopped" in entries[-1]


def _dangling(entries: list[dict[str, Any]]) -> str | None:
    """The test that began and never ended, if there is one."""
    return entries[-1].get("began") if entries else None


def _note(ledger: Path, **entry: Any) -> None:
    with ledger.open("a") as file:
        file.write(json.dumps(entry) + os.linesep)


def _entries(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
