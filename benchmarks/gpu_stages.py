"""The stages of gpu_check.py, each a command with a time limit and a log. It does not know in which order they run."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

from gpu_packages import needs

__all__ = ["Check", "Stage", "benchmark", "build", "environment", "probe", "sanitize", "tests"]

_SANITIZER_FOUND = 86  # exit status that compute-sanitizer is told to use
_LAST_TEST = 15.0  # seconds that the test under way may take when time is up

# Run by the machine's own python3, which is not to be burdened with torch here.
_PROBE = """
import json, platform, sys
found = {"python": platform.python_version(), "cpu_count": __import__("os").cpu_count()}
for name in ("torch", "triton", "numpy"):
    try:
        found[name] = __import__(name).__version__
    except ImportError as error:
        found[name] = None
if found["torch"]:
    import torch
    found["cuda"] = torch.version.cuda
    found["gpus"] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            found["gpus"].append({"name": card.name, "capability": f"{card.major}.{card.minor}",
                                  "memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count})
print(json.dumps(found))
"""
_SMOKE = "import memlane.native as n; print('native core', n.kernel_variant(), 'from', n.__file__)"


class Stage(NamedTuple):
    """How a stage went. outcome: passed, failed or skipped; detail: in a line; figures: for the record."""

    name: str
    outcome: str
    seconds: float
    detail: str
    figures: dict[str, Any] | None = None


class Ended(NamedTuple):
    """How a command ended. status: None where it ran out of time."""

    status: int | None
    output: str


class Tests(NamedTuple):
    """What pytest counted."""

    passed: int
    failed: int
    skipped: int


class Check:
    """One run: where things are, how much time is left, what the stages' commands see of the world."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.root: Path = options.root.resolve()
        self.folder = self.root / "build" / "gpu-check"
        self.site = self.folder / "site"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + options.limit
        paths = [str(self.site), str(self.root / "clients" / "python"), os.environ.get("PYTHONPATH", "")]
        self.environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join(path for path in paths if path),
            PYTHONUNBUFFERED="1",
            MEMLANE_CI="1",  # a test that skips for an unknown reason is a failure
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            PIP_ROOT_USER_ACTION="ignore",
            CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count() or 1),
        )
        if options.without_gpu:
            self.environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def limit(self, seconds: float, leave: float = 0.0) -> float:
        """A stage's own limit, or what is left of everything; `leave` is for the stages after it."""
        return max(1.0, min(seconds, self.deadline - time.monotonic() - leave))

    def log(self, stage: str) -> Path:
        return self.folder / f"{stage}.log"

    def run(self, stage: str, *command: str | Path, limit: float, **environment: str) -> Ended:
        """Runs a command, its output appended to the stage's log; ends it and its children when time is up."""
        with self.log(stage).open("a+", errors="replace") as log:
            log.write(f"$ {' '.join(map(str, command))}\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment | environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            status: int | None = None
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                log.write(f"\nended after {limit:.0f} s\n")
            finally:
                if status is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(begin)
            return Ended(status, log.read())


def environment(check: Check, machine: dict[str, Any]) -> Stage:
    """What there is, and whether what is missing has been brought along."""
    found = needs(check.root, check.options.wheels)
    tools = {}
    for tool in ("g++", "cmake", "ninja", "nvcc", "compute-sanitizer"):
        version = re.search(r"\d+\.\d+(\.\d+)*", _output(tool, "--version"))
        tools[tool] = version.group() if version else None
    machine["tools"] = tools
    lines = [json.dumps(machine, indent=1), f"wheels to install: {[path.name for path in found.wheels]}"]
    lines += [_output("nvidia-smi"), _output("bash", "-c", "ulimit -a; df -h /dev/shm; free -g")]
    check.log("environment").write_text("\n".join(lines) + "\n")
    if found.missing:
        where = f"deploy/gpu/wheels.sh {'.'.join(machine['python'].split('.')[:2])} where there is internet"
        return Stage("environment", "failed", 0, f"missing: {', '.join(found.missing)}; run {where}")
    versions = [f"{name} {machine.get(name)}" for name in ("driver", "python", "torch", "triton")]
    return Stage("environment", "passed", 0, ", ".join([machine["card"], *versions]))


def build(check: Check) -> Stage:
    """The wheels that are needed, and memlane, into a folder of its own: nothing of the machine's is changed."""
    shutil.rmtree(check.site, ignore_errors=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(check.site),
    ]
    wheels = needs(check.root, check.options.wheels).wheels
    commands = [[*pip, *map(str, wheels)]] if wheels else []
    native = f"--config-settings=build-dir={check.folder / 'native'}"
    commands.append([*pip, "--no-build-isolation", "--upgrade", native, str(check.root)])
    commands.append([sys.executable, "-c", _SMOKE])
    deadline = time.monotonic() + check.limit(180)
    for command in commands:
        ended = check.run("build", *command, limit=max(1.0, deadline - time.monotonic()))
        if ended.status != 0:
            return Stage("build", "failed", 0, _how(ended))
    return Stage("build", "passed", 0, f"{len(wheels)} wheels; {ended.output.strip()}")


def tests(check: Check) -> Stage:
    """All tests of the GPU path."""
    report = check.folder / "tests.xml"
    report.unlink(missing_ok=True)
    ended = check.run(
        "tests",
        *_pytest(report),
        *check.options.tests,
        limit=check.limit(200, leave=min(150, check.options.limit / 3)),
    )
    counted = _counted(report)
    detail = f"{_how(ended)}, {counted.passed} passed, {counted.failed} failed, {counted.skipped} skipped"
    outcome = "passed" if ended.status == 0 and counted.passed else "failed"
    return Stage("tests", outcome, 0, detail, counted._asdict())


def sanitize(check: Check, tool: str) -> Stage:
    """Some tests under compute-sanitizer, as many as its time allows; what it finds, or a test that fails, is a failure."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return Stage(tool, "skipped", 0, "compute-sanitizer is not installed")
    report = check.folder / f"{tool}.xml"
    report.unlink(missing_ok=True)
    limit = check.limit(75, leave=90)
    selection = [*check.options.tests, "-k", check.options.sanitize]
    ended = check.run(
        tool, sanitizer, "--tool", tool, f"--error-exitcode={_SANITIZER_FOUND}",
        *_pytest(report), f"--session-timeout={max(1.0, limit - _LAST_TEST):.0f}", *selection, limit=limit,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else what lies beyond a tensor is torch's, and no error
        MEMLANE_SANITIZER="1",  # tests may take smaller inputs
    )  # fmt: skip
    counted = _counted(report)
    stopped = ended.status == 1 and not counted.failed and "session-timeout" in ended.output
    if ended.status == _SANITIZER_FOUND:
        detail = next(
            (line for line in ended.output.splitlines() if "SUMMARY" in line), "errors found"
        ).strip("= ")
    else:
        detail = "as many as time allowed" if stopped else _how(ended)
    passed = (ended.status == 0 or stopped) and counted.passed > 0
    detail += f", {counted.passed} passed, {counted.failed} failed, {counted.skipped} skipped"
    return Stage(tool, "passed" if passed else "failed", 0, detail, counted._asdict())


def benchmark(check: Check) -> Stage:
    """The figures, in the time that is left."""
    program: Path = check.root / check.options.benchmark
    if not program.exists():
        return Stage("benchmark", "skipped", 0, f"there is no {program.relative_to(check.root)}")
    found = check.folder / "benchmark.json"
    found.unlink(missing_ok=True)
    limit = check.limit(150)
    ended = check.run(
        "benchmark", sys.executable, program, f"--seconds={max(1.0, limit - 20):.0f}", "--json", found, limit=limit
    )  # fmt: skip
    print(ended.output)
    if ended.status != 0:
        return Stage("benchmark", "failed", 0, _how(ended))
    try:
        figures = json.loads(found.read_text())
    except (OSError, ValueError) as error:
        return Stage("benchmark", "failed", 0, f"it left no figures: {error}")
    return Stage("benchmark", "passed", 0, "figures above", figures)


def _pytest(report: Path) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]


def _counted(report: Path) -> Tests:
    try:
        suites = ElementTree.parse(report).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return Tests(0, 0, 0)
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        total = {name: count + int(suite.get(name, 0)) for name, count in total.items()}
    failed = total["failures"] + total["errors"]
    return Tests(total["tests"] - failed - total["skipped"], failed, total["skipped"])


def _how(ended: Ended) -> str:
    return "out of time" if ended.status is None else f"exit status {ended.status}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=20, stdin=subprocess.DEVNULL
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def probe(check: Check) -> dict[str, Any]:
    """The machine, as its own Python and driver describe it. card: None where there is no GPU."""
    check.log("environment").unlink(missing_ok=True)
    ended = check.run("environment", sys.executable, "-c", _PROBE, limit=90)
    try:
        machine: dict[str, Any] = json.loads(ended.output.splitlines()[-1])
    except (IndexError, ValueError):
        machine = {"python": sys.version.split()[0], "torch": None, "problem": ended.output[-2000:]}
    gpus = machine.get("gpus") or []
    machine["card"] = gpus[0]["name"] if gpus else None
    machine["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split(
        "\n"
    )[0]
    return machine
