"""How long `memlane serve` of the demo model takes to be ready, and how much memory it holds then.

Starts the real command a few times on a free port and polls `/ready`. Imports (torch above all) are timed
apart, in a process of their own, because they are the floor that no code of ours can lower: the figure to
watch is `after_imports_s`, the median time to ready less the median import time of the engine process.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from measuring import finish, header

IMPORTS = "import memlane.worker, memlane.engine"  # the worker itself brings torch in only when it loads


def time_imports() -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.monotonic() - start


def time_start(placement: str) -> dict[str, float]:
    """One start until `/ready` answers 200, then a clean stop."""
    start = time.monotonic()
    server = subprocess.Popen(
        [sys.executable, "-m", "memlane_server.cli", "serve", "--port", "0", "--placement", placement],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MEMLANE_LOG_LEVEL": "info"},
    )
    try:
        assert server.stderr is not None
        url = None
        for line in server.stderr:
            if found := re.search(r"http://[\d.]+:\d+", line):
                url = found.group(0)
                break
        if url is None:
            raise RuntimeError("the server ended before it printed its address")
        deadline = start + 120
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        else:
            raise RuntimeError("not ready after 120 s")
        ready = time.monotonic() - start
        process = psutil.Process(server.pid)
        engine = sum(child.memory_info().rss for child in process.children(recursive=True))
        return {
            "ready_s": ready,
            "server_rss_mib": process.memory_info().rss / 2**20,
            "engine_rss_mib": engine / 2**20,
        }
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    imports = statistics.median(time_imports() for _ in range(arguments.runs))
    result: dict[str, Any] = {
        **header("startup"),
        "runs": arguments.runs,
        "imports_s": round(imports, 2),
    }
    print(f"importing the engine alone: {imports:.2f} s (median of {arguments.runs})")
    print(f"{'placement':<10} {'ready':>8} {'after imports':>14} {'server RSS':>12} {'engine RSS':>12}")
    for placement in ("host", "disk"):
        runs = [time_start(placement) for _ in range(arguments.runs)]
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        median["after_imports_s"] = median["ready_s"] - imports
        result[placement] = {key: round(value, 2) for key, value in median.items()}
        print(
            f"{placement:<10} {median['ready_s']:>6.2f} s {median['after_imports_s']:>12.2f} s"
            f" {median['server_rss_mib']:>8.0f} MiB {median['engine_rss_mib']:>8.0f} MiB"
        )
    finish(result, arguments.out)


if __name__ == "__main__":
    main()
