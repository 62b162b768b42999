"""What the benchmarks share: turns, foreign load, the machine, the disk's ceiling by fio, memory of a process, the report."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

Result = dict[str, Any]

QUIET = 0.15  # CPUs' worth of foreign work above which figures are not to be trusted


def in_turns(repetitions: int, **bodies: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each body, all run once per repetition, in rotating order; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for repetition in range(repetitions + 1):
        for name in rotated(list(bodies), repetition):
            started = time.perf_counter()
            bodies[name]()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rotated(names: list[str], turn: int) -> list[str]:
    """The names, beginning with another one each turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def foreign_load(seconds: float = 1.0) -> float:
    """CPUs' worth of work done by others while this process sleeps."""

    def busy() -> int:
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4]

    before = busy()
    time.sleep(seconds)
    return round((busy() - before) / os.sysconf("SC_CLK_TCK") / seconds, 2)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def header(benchmark: str) -> Result:
    """The beginning of a result: what was measured, when, on what, and how busy others kept it."""
    load = foreign_load()
    print(f"foreign load {load} CPU(s){'' if load <= QUIET else ': TOO BUSY, trust no figure'}")
    return {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "machine": {
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "torch": torch.__version__,
        },
        "foreign_load_cpus": load,
    }


def finish(result: Result, out: Path | None) -> None:
    """Prints the result as one line of JSON, and writes it to a file where one is wanted."""
    write(result, out)
    print(json.dumps(result))


def write(result: Result, out: Path | None) -> None:
    """Writes what there is so far, whole or not at all, to a file where one is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(out)


class DiskSpeed(NamedTuple):
    """What fio got out of a file, past the page cache: reads of one size, so many in flight."""

    reads_per_s: float
    bytes_per_s: float
    engine: str


def fio(
    path: Path, *, sequential: bool = False, block: int = 4096, depth: int = 256, seconds: float = 3
) -> DiskSpeed | None:
    """The disk's ceiling: `seconds` of direct reads of an existing file. None, said once a call, where fio is missing."""
    if shutil.which("fio") is None:
        print("  fio is not installed: the disk's ceiling is left out")
        return None
    for engine in ("io_uring", "libaio"):
        done = subprocess.run(
            [
                *("fio", "--name=ceiling", f"--filename={path}", "--readonly", "--direct=1"),
                *(f"--ioengine={engine}", f"--rw={'read' if sequential else 'randread'}", f"--bs={block}"),
                *(f"--iodepth={depth}", "--norandommap", "--randrepeat=0", "--time_based"),
                *(f"--runtime={seconds}", "--output-format=json"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
            return DiskSpeed(read["iops"], read["bw_bytes"], engine)
    print(f"  fio cannot read {path.name}: {done.stderr.strip().splitlines()[-1:]}; its ceiling is left out")
    return None


def leave_page_cache(path: Path) -> None:
    """Asks the system to forget what it holds of a file. What a host below a virtual machine holds is out of reach."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of(process: int | str = "self") -> dict[str, int]:
    """Bytes of a process: resident now (VmRSS), at most so far (VmHWM), and of those now, its own ones (RssAnon) and pages
    of files such as libraries (RssFile)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    wanted = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) * 1024 for name in wanted}


class MemoryWatch:
    """Looks at a process's memory every 50 ms, from outside, until stopped. `samples`: VmRSS in bytes."""

    def __init__(self, process: int) -> None:
        self.samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(process,), daemon=True)
        self._thread.start()

    def _look(self, process: int) -> None:
        while not self._stop.wait(0.05):
            try:
                self.samples.append(memory_of(process)["VmRSS"])
            except (OSError, KeyError):  # it has ended: a dead process has no memory
                return

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
