"""What all stages of gpu_check.py share: where things are, how much time is left, and commands with a limit and a log."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Check", "Ended", "output_of"]

_MOST_JOBS = 8  # processes on one GPU at a time, where nothing is measured
_LOOK = 1.0  # seconds between looks at whether a command hangs
_UNTIL_DEAD = 20.0  # seconds: a driver may hold on to a process whose kernel does not end


class Ended(NamedTuple):
    """How a command ended. status: None where it was ended, out of time or because it hung."""

    status: int | None
    output: str
    hung: bool = False

    def __str__(self) -> str:
        if self.status is None:
            return "hung" if self.hung else "out of time"
        return f"exit status {self.status}"


class Check:
    """One run: what was asked for, and what the stages' commands see of the world. Threads share it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.root: Path = options.root.resolve()
        self.folder = self.root / "build" / "gpu-check"
        self.site = self.folder / "site"
        self.models = self.folder / "models"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + options.limit
        self.jobs = max(1, min(_MOST_JOBS, (os.cpu_count() or 1) // 2))
        plugin = Path(__file__).parent / "plugin"  # of pytest
        here = [str(self.site), str(self.root / "clients" / "python"), str(plugin)]
        self.environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join(path for path in (*here, os.environ.get("PYTHONPATH")) if path),
            PYTHONUNBUFFERED="1",
            MEMLANE_CI="1",  # a test that skips for an unknown reason is a failure
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            PIP_ROOT_USER_ACTION="ignore",
            CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count() or 1),
        )
        if options.without_gpu:
            self.environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def limit(self, seconds: float, leave: float = 0.0) -> float:
        """A stage's own limit, or what is left of everything. leave: the part of all time that is for stages after it."""
        left = self.deadline - time.monotonic() - leave * self.options.limit
        return max(1.0, min(seconds, left))

    def log(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.log"

    def run(
        self,
        log_name: str,
        *command: str | Path,
        limit: float,
        hangs: Callable[[], bool] | None = None,
        **environment: str,
    ) -> Ended:
        """Runs a command, its output appended to a log; ends it and its children when time is up, or when it hangs.

        hangs: asked about once a second.
        """
        with self.log(log_name).open("a+", errors="replace") as log:
            log.write(f"$ {' '.join(map(str, command))}\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment | environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            status, hung, deadline = None, False, time.monotonic() + limit
            try:
                while status is None and not hung and (left := deadline - time.monotonic()) > 0:
                    try:
                        status = process.wait(min(_LOOK, left))
                    except subprocess.TimeoutExpired:
                        hung = hangs is not None and hangs()
            finally:
                if status is None:
                    _kill(process)
                    log.write(f"\nended, it {'hung' if hung else f'took more than {limit:.0f} s'}\n")
            log.seek(begin)
            return Ended(status, log.read(), hung)


def output_of(*command: str) -> str:
    """What a command prints; "" where it is missing or takes long."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=20, stdin=subprocess.DEVNULL
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(_UNTIL_DEAD)
    except subprocess.TimeoutExpired:
        print(f"   process {process.pid} cannot be ended", flush=True)
