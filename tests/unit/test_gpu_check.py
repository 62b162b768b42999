"""`make gpu-check` on a toy checkout: what it runs, what it says, and how it ends."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_process import Check
from gpu_tests import Found, Part, Way, run_parts

DRIVER = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "memlane"
version = "0.1.0"
dependencies = ["numpy>=1", "toy-need[extra]>=2", "never; python_version < '3'"]

[dependency-groups]
dev = ["pytest>=7", "not-needed-here"]
"""

# Builds a wheel of the one package, as scikit-build-core does of the real ones.
BACKEND = """
import zipfile
def build_wheel(directory, config_settings=None, metadata_directory=None):
    print("settings", config_settings)
    name = "memlane-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.write("engine/memlane/__init__.py", "memlane/__init__.py")
        wheel.write("engine/memlane/native.py", "memlane/native.py")
        wheel.writestr("memlane-0.1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: memlane\\nVersion: 0.1.0\\n")
        wheel.writestr("memlane-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\nRoot-Is-Purelib: true\\n")
        wheel.writestr("memlane-0.1.0.dist-info/RECORD", "")
    return name
"""

TESTS = """
import os, time
import pytest
import toy_need, toy_deeper

def test_sees_the_interpreter():
    without = "TOY_GPU" not in os.environ
    assert (os.environ.get("TRITON_INTERPRET") == "1") == without
    assert (os.environ.get("CUDA_VISIBLE_DEVICES") == "") == without

def test_graph():
    assert "MEMLANE_SANITIZER" not in os.environ

def test_may_fail():
    assert os.environ.get("TOY") != "fail", "toy failure"

@pytest.mark.skipif(True, reason="no CUDA device")
def test_skipped(): ...
"""

# Each of these would keep the others from being seen.
BAD_TESTS = """
import ctypes, os, time
import torch

def test_good(): ...

def test_hangs():
    ctypes.CDLL(None).sleep(60)  # as a kernel that never ends: no signal is handled meanwhile

def test_hangs_with_the_gil():
    ctypes.PyDLL(None).sleep(60)

def test_good_after_a_hang(): ...

def test_crashes():
    os.kill(os.getpid(), 11)

def test_good_after_a_crash(): ...

def test_breaks_the_gpu():
    torch.cuda.break_it()
    torch.cuda.synchronize()

def test_good_after_a_broken_gpu():
    torch.cuda.synchronize()

def test_may_wait():
    time.sleep(60 if os.environ["TOY"] == "wait" else 0)
"""

SANITIZER = """#!/usr/bin/env bash
[ "$1" = --version ] && { printf 'NVIDIA (R) Compute Sanitizer\\nCopyright (c) 2020-2025\\nVersion 2025.3.1\\n'; exit; }
[ "$1 $3" = "--tool --error-exitcode=86" ] || exit 7
tool=$2
shift 3
"$@" || exit
if [ "$TOY" = races ] && [ $tool = racecheck ]; then
  echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
  exit 86
fi
"""

# In place of torch, which takes seconds to import.
TORCH = """
import os, types
__version__ = "2.11.0+toy"
version = types.SimpleNamespace(cuda="13.0")
card = types.SimpleNamespace(name="NVIDIA Toy 1", major=9, minor=0, total_memory=1 << 37, multi_processor_count=132)
class Cuda:
    broken = False
    device_count = is_initialized = lambda self: 1
    get_device_properties = lambda self, i: card
    def is_available(self): return "TOY_GPU" in os.environ
    def break_it(self): self.broken = True
    def synchronize(self):
        if self.broken: raise RuntimeError("CUDA error: an illegal memory access was encountered")
cuda = Cuda()
"""

KERNELS = """
import json, pathlib, sys
*_, flag, out = sys.argv
assert flag == "--json"
print("figure  ceiling")
found = {"ceilings": {"device_bytes_per_s": 4e12}, "host_misses": [
    {"row_format": "bfloat16", "of_copy": 0.85, "bytes": 5e9, "seconds": 0.1}, {"row_format": "int4", "of_copy": 0.7, "bytes": 1e9, "seconds": 0.1}]}
pathlib.Path(out).write_text(json.dumps(found))
print(json.dumps(found))
"""
DECODE = """
import json, pathlib, sys
if "--write" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--write") + 1]).mkdir()
    print("two toys written")
    raise SystemExit
assert pathlib.Path(sys.argv[sys.argv.index("--models") + 1]).is_dir()
row_format = sys.argv[sys.argv.index("--formats") + 1]
one = {"placement": "device", "row_format": row_format, "batch": 1, "step_seconds": 1 / 3, "bandwidth_bound_seconds": 0.25,
       "of_bandwidth_bound": 0.75, "hit_rate": None}
pathlib.Path(sys.argv[-1]).write_text(json.dumps({"decode": [one]}))
"""


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        archive.writestr(f"{info}/METADATA", "\n".join(lines + [f"Requires-Dist: {n}" for n in needs]) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for path, text in {
        "pyproject.toml": PYPROJECT,
        "backend.py": BACKEND,
        "engine/memlane/__init__.py": "",
        "engine/memlane/native.py": "def kernel_variant(): return 'toy'\n",
        "tests/gpu/test_rows.py": TESTS,
        "tests/gpu/test_toy.py": "def test_toy(): ...",
        "benchmarks/gpu_kernels.py": KERNELS,
        "benchmarks/gpu_decode.py": DECODE,
        "bin/compute-sanitizer": SANITIZER,
        "stubs/torch.py": TORCH,
        "stubs/triton.py": "__version__ = '3.6.0'",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "bin" / "compute-sanitizer").chmod(0o755)
    (root / "wheels").mkdir()
    wheel(root / "wheels", "toy_need", "1.0")  # too old
    wheel(root / "wheels", "toy_need", "2.1", "toy_deeper", "only-with-extra; extra == 'extra2'", "pytest")
    wheel(root / "wheels", "toy_deeper", "0.1")
    wheel(root / "wheels", "pytest", "0.1")  # the machine's own is newer
    return root


# The others take their time to load.
PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_timeout"}


class Ran:
    """What the driver printed and wrote."""

    def __init__(self, root: Path, *arguments: str, **environment: str) -> None:
        # A bare Python that finds packages as on a machine where none of ours is installed.
        python = getattr(sys, "_base_executable", sys.executable)
        packages = f"{root / 'stubs'}{os.pathsep}{Path(pytest.__file__).parents[1]}"
        path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [python, str(DRIVER), f"--root={root}", *arguments],
            env={k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")}
            | {"PYTHONPATH": packages, "PATH": path, **PLUGINS, **environment},
            capture_output=True, text=True, timeout=110, check=False,
        )  # fmt: skip
        self.status, self.text = done.returncode, done.stdout + done.stderr
        self.lines = done.stdout.splitlines()

    @property
    def result(self) -> Any:
        return json.loads(self.lines[-1])

    @property
    def outcomes(self) -> dict[str, str]:
        return {stage["name"]: stage["outcome"] for stage in self.result["stages"]}

    def stage(self, name: str) -> Any:
        return next(stage for stage in self.result["stages"] if stage["name"] == name)


STAGES = [
    "environment", "build", "kernel tests", "models", "kernels", "engine tests", "memcheck", "racecheck",
    "decode", "decode int4", "other formats",
]  # fmt: skip


def test_all_is_well(toy: Path) -> None:
    out = toy / "out" / "result.json"
    ran = Ran(toy, "--without-gpu", f"--out={out}")
    assert ran.status == 0, ran.text
    assert set(ran.outcomes.values()) == {"passed"}
    assert list(ran.outcomes) == STAGES
    assert json.loads(out.read_text()) == ran.result
    assert ran.result["machine"]["tools"]["compute-sanitizer"] == "2025.3.1"
    counts = {"passed": 3, "failed": [], "skipped": 1, "incomplete": ""}
    assert ran.stage("kernel tests")["figures"]["test_rows"].items() >= counts.items()
    assert ran.stage("engine tests")["figures"]["test_toy"]["passed"] == 1
    assert (
        ran.stage("memcheck")["figures"]["test_rows"].items() >= (counts | {"passed": 2}).items()
    )  # not the graphs
    site = toy / "build" / "gpu-check" / "site"
    assert {p.name for p in site.iterdir() if p.suffix == ".py"} == {"toy_need.py", "toy_deeper.py"}
    assert (site / "toy_need.py").read_text() == "version = '2.1'\n"
    assert f"native core toy from {site}" in ran.stage("build")["detail"]
    assert ran.stage("models")["detail"] == "two toys written"
    assert ran.stage("decode")["figures"]["decode"][0]["step_seconds"] == 0.3333
    assert "figure  ceiling" in ran.lines
    table = next(i for i in reversed(range(len(ran.lines))) if ran.lines[i].startswith("stage "))
    rows = [line.split("passed")[0].strip() for line in ran.lines[table + 1 : table + 1 + len(STAGES)]]
    assert rows == STAGES
    assert not (toy / "build" / "gpu-check" / "models").exists()
    assert "==== build.log" in (toy / "build" / "gpu-check" / "all-logs.txt").read_text()


def test_goals_are_told_beside_what_was_measured(toy: Path) -> None:
    ran = Ran(toy, "--without-gpu", "--limit=60")
    goals = {goal["what"]: goal for goal in ran.result["goals"]}
    assert len(goals) == 15
    met = {what: goal["met"] for what, goal in goals.items() if goal["got"] is not None}
    assert met == {
        "misses from the host, bfloat16: of pinned copy": True,
        "misses from the host, int4: of pinned copy": False,
        "decode 1, bfloat16: of bandwidth bound": True,
        "decode 1, int4: of bandwidth bound": True,
    }
    line = next(line for line in reversed(ran.lines) if line.startswith("misses from the host, bfloat16"))
    assert line.split()[-6:] == [">=", "0.8", "0.85", "yes", "50.0", "GB/s"]


def test_what_is_found_is_told_after_every_stage(toy: Path) -> None:
    """So that a run that is cut off has said it, and left it in the file."""
    (toy / "benchmarks" / "gpu_kernels.py").write_text("import os; os.kill(os.getppid(), 9)")
    ran = Ran(toy, "--without-gpu")
    assert ran.status == -9
    (written,) = (toy / "build" / "gpu-check").glob("*-gpu-check-no-gpu.json")
    told = next(json.loads(line) for line in ran.lines if line.startswith("{"))
    assert told == json.loads(written.read_text())
    assert [stage["name"] for stage in told["stages"]] == STAGES[:4]


def test_what_fails_is_shown_and_the_rest_runs(toy: Path) -> None:
    (toy / "benchmarks" / "gpu_kernels.py").write_text(KERNELS + "raise SystemExit(3)")
    ran = Ran(toy, "--without-gpu", TOY="fail")
    assert ran.status == 1
    failed = {name for name, outcome in ran.outcomes.items() if outcome == "failed"}
    assert failed == {"kernel tests", "memcheck", "racecheck", "kernels", "other formats"}
    assert "tests/gpu/test_rows.py::test_may_fail: AssertionError: toy failure" in ran.text
    assert any(line.startswith("   | ") and "toy failure" in line for line in ran.lines)
    assert ran.stage("kernels")["detail"] == "exit status 3, some figures"
    assert ran.stage("kernels")["figures"]["host_misses"][0]["of_copy"] == 0.85
    assert list((toy / "build" / "gpu-check").glob("*-gpu-check-no-gpu.json"))
    assert not (toy / "benchmarks" / "results").exists()


def test_what_the_sanitizer_finds_is_a_failure(toy: Path) -> None:
    ran = Ran(toy, "--without-gpu", TOY="races")
    assert ran.status == 1
    assert (ran.outcomes["memcheck"], ran.outcomes["racecheck"]) == ("passed", "failed")
    assert ran.stage("racecheck")["detail"].startswith("RACECHECK SUMMARY: 2 hazards")


def run_bad_tests(toy: Path, seconds: float, **environment: str) -> Found:
    (toy / "tests" / "gpu" / "test_bad.py").write_text(BAD_TESTS)
    check = Check(argparse.Namespace(root=toy, limit=100.0, without_gpu=False))
    way = Way(timeout=1.0, grace=0.5, environment={
        "PYTHONPATH": f"{DRIVER.parent / 'plugin'}{os.pathsep}{toy / 'stubs'}", "TOY_GPU": "1", **PLUGINS, **environment,
    })  # fmt: skip
    (found,) = run_parts(check, "toy", [Part("tests/gpu/test_bad.py")], seconds, way)
    return found


def test_bad_tests_hide_no_others(toy: Path) -> None:
    found = run_bad_tests(toy, 60, TOY="")
    assert {problem.test.split("::")[1]: problem.why for problem in found.problems} == {
        "test_hangs": "hung: more than 1 s",
        "test_hangs_with_the_gil": "hung: more than 1 s",
        "test_crashes": "took the process with it (SIGSEGV)",
        "test_breaks_the_gpu": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    assert (found.passed, found.incomplete, len(found.statuses)) == (5, "", 5)


def test_time_runs_out(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toy / "tests" / "gpu" / "test_bad.py").write_text(
        "def test_good(): ...\ndef test_long(): __import__('time').sleep(60)"
    )
    monkeypatch.setattr("gpu_tests._LEAST_SECONDS", 1.0)
    check = Check(argparse.Namespace(root=toy, limit=100.0, without_gpu=True))
    (found,) = run_parts(check, "toy", [Part("tests/gpu/test_bad.py")], 3, Way())
    assert found.seconds < 9
    assert found.passed == 1
    assert found.problems == [("tests/gpu/test_bad.py::test_long", "did not end before time was up")]
    assert found.incomplete == "no time left"
    assert check.limit(50) == 50
    assert 45 < check.limit(1000, 0.4) < 60


def test_a_package_that_nobody_brought(toy: Path) -> None:
    (toy / "wheels" / "toy_deeper-0.1-py3-none-any.whl").unlink()
    ran = Ran(toy, "--without-gpu")
    assert ran.status == 1
    assert re.fullmatch(
        r"missing: toy[-_]deeper; run deploy/gpu/wheels.sh 3\.\d+ where there is internet",
        ran.stage("environment")["detail"],
    )
    assert set(list(ran.outcomes.values())[1:]) == {"skipped"}


def test_a_build_that_fails(toy: Path) -> None:
    (toy / "engine" / "memlane" / "native.py").write_text("raise ImportError('no core')")
    ran = Ran(toy, "--without-gpu")
    assert ran.status == 1
    assert list(ran.outcomes.values()) == ["passed", "failed", *["skipped"] * (len(STAGES) - 2)]
    assert any("no core" in line for line in ran.lines)


def test_with_a_gpu_results_are_dated(toy: Path) -> None:
    (toy / "bin" / "compute-sanitizer").unlink()
    ran = Ran(toy, TOY_GPU="1")
    assert ran.status == 0, ran.text
    (written,) = (toy / "benchmarks" / "results").iterdir()
    assert written.name == f"{ran.result['date']}-gpu-check-nvidia-toy-1.json"
    assert json.loads(written.read_text()) == ran.result
    assert ran.result["machine"]["gpus"][0]["capability"] == "9.0"


@pytest.mark.parametrize("torch", ["raise ImportError", TORCH])
def test_without_a_gpu_it_says_so(toy: Path, torch: str) -> None:
    (toy / "stubs" / "torch.py").write_text(torch)
    ran = Ran(toy)
    assert ran.status == 2
    why = "torch finds none" if torch is TORCH else "python3 here has no torch"
    assert ran.lines == [f"gpu-check: no GPU ({why}); --without-gpu tries this program itself"]
