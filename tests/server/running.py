"""Starts a server process on a port of the system's choosing, and ends it again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

LAUNCH = [sys.executable, str(Path(__file__).with_name("launch.py"))]
REAL = [sys.executable, "-m", "memlane_server.cli"]


class Server:
    """A running `memlane serve`. Use as a context manager; leaving it kills what is left."""

    def __init__(
        self, model: Path, *flags: str, command: list[str] = LAUNCH, env: dict[str, str] | None = None
    ) -> None:
        self.model = model
        self._log_path = model.with_name(f"{model.name}-{time.monotonic_ns()}.log")
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "serve", str(model), "--port", "0", *flags],
                stderr=log,
                stdout=log,
                env=os.environ | (env or {}),
            )
        self.url = self._wait_for_line(r"listening on (http://\S+?);")
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        for _ in range(2):  # the second signal does not wait for requests; a server ended so leaves no files
            if self.process.poll() is None:
                self.process.terminate()
                time.sleep(0.1)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def received(self) -> list[str]:
        """What the fake engine was told."""
        file = self.model / "received.log"
        return file.read_text().splitlines() if file.exists() else []

    def _wait_for_line(self, pattern: str) -> str:
        for _ in range(600):
            if found := re.search(pattern, self.log):
                return found.group(1)
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(f"no line {pattern!r} in: {self.log}")

    def ready(self, seconds: float = 30) -> Server:
        self.until(lambda: self.client.get("/ready").status_code == 200, seconds)
        return self

    def until(self, condition: object, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():  # type: ignore[operator]
                return
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s; log: {self.log}")

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics; all given labels must match."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith((name + "{", name + " ")) and all(
                f'{k}="{v}"' in line for k, v in labels.items()
            ):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no {name} with {labels}")

    def engine_pid(self) -> int:
        """The process of the engine: the server's only child."""
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        return int(listed.stdout.split()[0])
