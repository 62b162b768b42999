"""The stages of gpu_check.py, each of commands with a time limit and a log. It does not know in which order they run."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_packages import needs
from gpu_process import Check, output_of
from gpu_tests import Found, Part, Way, run_parts

__all__ = [
    "Stage",
    "build",
    "environment",
    "kernel_files",
    "measure",
    "other_files",
    "probe",
    "sanitize",
    "tests",
    "write_models",
]

_SANITIZER_FOUND = 86  # exit status that compute-sanitizer is told to use
_TAIL = 25  # lines of a log that are shown after a failure
_WIDE = 160  # characters of such a line

# Tests of single kernels, which are quick, and come first. What else lies in tests/gpu is about tables and engines.
_KERNEL_TESTS = (
    "test_rows",
    "test_row_cache",
    "test_selection",
    "test_device_cache",
    "test_attention_backends",
)
_SANITIZED = ("test_rows", "test_row_cache", "test_selection")
_IN_PARTS = {"test_rows": 4, "test_selection": 2, "test_placements": 4, "test_graphs": 2}

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
    """How a stage went. outcome: passed, failed or skipped; detail: in a line; figures: for the record; shown: what else
    is to be seen at once."""

    name: str
    outcome: str
    seconds: float
    detail: str
    figures: dict[str, Any] | None = None
    shown: str = ""


def environment(check: Check, machine: dict[str, Any]) -> Stage:
    """What there is, and whether what is missing has been brought along."""
    found = needs(check.root, check.options.wheels)
    tools = {}
    for tool in ("g++", "cmake", "ninja", "nvcc", "compute-sanitizer"):
        version = re.search(r"\d+\.\d+(\.\d+)*", output_of(_tool(tool) or tool, "--version"))
        tools[tool] = version.group() if version else None
    machine["tools"] = tools
    machine["link"] = output_of(
        "nvidia-smi", "--query-gpu=pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"
    )
    machine["locked_memory"] = output_of("bash", "-c", "ulimit -l")
    lines = [json.dumps(machine, indent=1), f"wheels to install: {[path.name for path in found.wheels]}"]
    lines += [output_of("nvidia-smi"), output_of("bash", "-c", "ulimit -a; df -h . /dev/shm; free -g")]
    check.log("environment").write_text("\n".join(lines) + "\n")
    if found.missing:
        where = f"deploy/gpu/wheels.sh {'.'.join(machine['python'].split('.')[:2])} where there is internet"
        return Stage("environment", "failed", 0, f"missing: {', '.join(found.missing)}; run {where}")
    named = (
        f"{name} {machine.get(name)}" for name in ("driver", "python", "torch", "triton") if machine.get(name)
    )
    return Stage("environment", "passed", 0, ", ".join([machine["card"], *named]))


def build(check: Check) -> Stage:
    """The wheels that are needed, and memlane, into a folder of its own: nothing of the machine's is changed."""
    shutil.rmtree(check.site, ignore_errors=True)
    check.log("build").unlink(missing_ok=True)
    pip: list[str] = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--target", str(check.site)]
    wheels = needs(check.root, check.options.wheels).wheels
    commands = [[*pip, *map(str, wheels)]] if wheels else []
    native = f"--config-settings=build-dir={check.folder / 'native'}"
    commands.append([*pip, "--no-build-isolation", "--upgrade", native, str(check.root)])
    commands.append([sys.executable, "-c", _SMOKE])
    deadline = time.monotonic() + check.limit(180)
    for command in commands:
        ended = check.run("build", *command, limit=max(1.0, deadline - time.monotonic()))
        if ended.status != 0:
            return Stage("build", "failed", 0, str(ended), shown=_tail(check.log("build")))
    return Stage("build", "passed", 0, f"{len(wheels)} wheels; {ended.output.strip()}")


def kernel_files(check: Check) -> list[str]:
    """Tests of single kernels."""
    return [file for file in _files(check) if Path(file).stem in _KERNEL_TESTS]


def other_files(check: Check) -> list[str]:
    """Tests of what is made of kernels."""
    return [file for file in _files(check) if Path(file).stem not in _KERNEL_TESTS]


def tests(check: Check, name: str, files: Sequence[str], seconds: float) -> Stage:
    """Files of tests, each in processes of its own."""
    # All kernels are compiled for all cards only where there are processors for it.
    way = Way(
        timeout=120.0 if check.options.without_gpu else 60.0,
        environment={"MEMLANE_AOT": "all"} if check.jobs >= 4 else {},
    )
    found = run_parts(check, name, _parts(check, files), seconds, way)
    failed = any(one.problems or one.incomplete for one in found) or not any(one.passed for one in found)
    return _of_tests(check, name, failed, [], found)


def sanitize(check: Check, tool: str, seconds: float) -> Stage:
    """Tests of kernels under compute-sanitizer, as many as its time allows; what it finds, or a test that fails, is a
    failure."""
    sanitizer = _tool("compute-sanitizer")
    if sanitizer is None:
        return Stage(tool, "skipped", 0, "compute-sanitizer is not installed")
    files = [file for file in _files(check) if Path(file).stem in _SANITIZED]
    way = Way(
        timeout=seconds,
        select=check.options.sanitize,
        prefix=(sanitizer, "--tool", tool, f"--error-exitcode={_SANITIZER_FOUND}"),
        environment={
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # else what lies beyond a tensor is torch's, and no error
            "MEMLANE_SANITIZER": "1",  # tests take smaller inputs
        },
    )
    found = run_parts(check, tool, _parts(check, files), seconds, way)
    errors = [
        next((line for line in reversed(one.output.splitlines()) if "SUMMARY" in line), "errors").strip("= ")
        for one in found
        if _SANITIZER_FOUND in one.statuses
    ]
    failed = bool(errors) or any(one.problems for one in found) or not any(one.passed for one in found)
    return _of_tests(check, tool, failed, errors, found)


def measure(
    check: Check, name: str, program: str, arguments: Sequence[str | Path], seconds: float, least: float
) -> Stage:
    """A benchmark of its own process. Figures that it wrote before its time was up count. least: seconds that it is worth
    starting with."""
    if seconds < (5 if check.options.without_gpu else least):
        return Stage(name, "skipped", 0, f"{seconds:.0f} s are too few")
    check.log(name).unlink(missing_ok=True)
    found = check.log(name).with_suffix(".json")
    found.unlink(missing_ok=True)
    small = ["--small"] if check.options.without_gpu else []
    path = check.root / "benchmarks" / program
    ended = check.run(name, sys.executable, path, *arguments, *small, "--json", found, limit=seconds)
    try:
        figures = json.loads(found.read_text())
    except (OSError, ValueError):
        figures = None
    shown = "\n".join(line for line in ended.output.splitlines() if not line.startswith("{"))
    done = ended.status == 0 and figures is not None
    detail = "figures above" if done else f"{ended}, {'some' if figures else 'no'} figures"
    return Stage(name, "passed" if done else "failed", 0, detail, figures, shown)


def write_models(check: Check, seconds: float) -> Stage:
    """Models for the benchmarks that decode, while tests run."""
    name = "models"
    check.log(name).unlink(missing_ok=True)
    shutil.rmtree(check.models, ignore_errors=True)
    small = ["--small"] if check.options.without_gpu else []
    path = check.root / "benchmarks" / "gpu_decode.py"
    ended = check.run(name, sys.executable, path, "--write", check.models, *small, limit=seconds)
    failed = ended.status != 0
    last = (ended.output.strip().splitlines() or [""])[-1]
    return Stage(name, "failed" if failed else "passed", 0, str(ended) if failed else last, None,
                 _tail(check.log(name)) if failed else "")  # fmt: skip


def _files(check: Check) -> list[str]:
    asked = [check.root / path for path in check.options.tests]
    found = [file for path in asked for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
    return [str(file.relative_to(check.root)) for file in found]


def _parts(check: Check, files: Sequence[str]) -> list[Part]:
    """One for each file, but several of one whose kernels or graphs take long to make."""
    found = []
    for file in files:
        parts = min(check.jobs, _IN_PARTS.get(Path(file).stem, 1))
        found += [Part(file, number, parts) for number in range(1, parts + 1)]
    return found


def _of_tests(check: Check, name: str, failed: bool, errors: Sequence[str], found: Sequence[Found]) -> Stage:
    passed, skipped = sum(one.passed for one in found), sum(one.skipped for one in found)
    counts = f"{passed} passed, {sum(len(one.problems) for one in found)} failed, {skipped} skipped"
    slowest = max((one.slowest for one in found), default=(0.0, ""))
    incomplete = [f"{one.part.name}: {one.incomplete}" for one in found if one.incomplete]
    figures = {
        one.part.name: {
            "passed": one.passed,
            "failed": [f"{test.split('::', 1)[-1]}: {why[:_WIDE]}" for test, why in one.problems],
            "skipped": one.skipped,
            "incomplete": one.incomplete,
            "seconds": one.seconds,
        }
        for one in found
    }
    detail = "; ".join([*errors, counts, *incomplete, f"slowest {slowest[1]} {slowest[0]:.0f} s"])
    shown = _troubles(check, name, found) if failed else ""
    return Stage(name, "failed" if failed else "passed", 0, detail, figures, shown)


def _troubles(check: Check, stage: str, found: Sequence[Found]) -> str:
    """What failed, a line each, and how the logs of those parts end."""
    lines = []
    for one in found:
        if one.problems or one.incomplete or _SANITIZER_FOUND in one.statuses:
            log = check.log(f"{stage}-{one.part.name}")
            lines += [f"{problem.test}: {problem.why}"[: 2 * _WIDE] for problem in one.problems]
            lines += [f"{one.part.name}: {one.incomplete}"] if one.incomplete else []
            lines += [f"the end of {log}:", _tail(log)] if log.exists() else []
    return "\n".join(lines)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
    return "\n".join(f"   | {line[:_WIDE]}" for line in lines)


def _tool(name: str) -> str | None:
    """Where a tool is, also where CUDA is installed but not on the path."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


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
    machine["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split(
        "\n"
    )[0]
    return machine
