"""`make gpu-check` on a toy checkout: what it runs, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

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
    if os.environ.get("TOY") == "hang":
        print("about to hang")
        time.sleep(100)
    assert os.environ.get("TOY") != "fail", "toy failure"

@pytest.mark.skipif(True, reason="no CUDA device")
def test_skipped(): ...
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
cuda = types.SimpleNamespace(is_available=lambda: "TOY_GPU" in os.environ, device_count=lambda: 1,
                             get_device_properties=lambda i: card)
"""

BENCHMARK = """
import json, pathlib, sys
seconds, flag, out = sys.argv[1:]
assert flag == "--json" and 0 < float(seconds.removeprefix("--seconds=")) <= 130
print("figure  ceiling")
pathlib.Path(out).write_text(json.dumps({"gather": 3.6}))
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
        "tests/gpu/test_toy.py": TESTS,
        "benchmarks/gpu.py": BENCHMARK,
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


def test_all_is_well(toy: Path) -> None:
    out = toy / "out" / "result.json"
    ran = Ran(toy, "--without-gpu", f"--out={out}")
    assert ran.status == 0, ran.text
    assert set(ran.outcomes.values()) == {"passed"}
    assert list(ran.outcomes) == ["environment", "build", "tests", "memcheck", "racecheck", "benchmark"]
    assert json.loads(out.read_text()) == ran.result
    assert ran.result["machine"]["tools"]["compute-sanitizer"] == "2025.3.1"
    assert ran.stage("benchmark")["figures"] == {"gather": 3.6}
    assert "figure  ceiling" in ran.lines
    assert ran.stage("tests")["figures"] == {"passed": 3, "failed": 0, "skipped": 1}
    assert ran.stage("memcheck")["figures"] == {"passed": 2, "failed": 0, "skipped": 1}  # not the graphs
    site = toy / "build" / "gpu-check" / "site"
    assert {p.name for p in site.iterdir() if p.suffix == ".py"} == {"toy_need.py", "toy_deeper.py"}
    assert (site / "toy_need.py").read_text() == "version = '2.1'\n"
    assert f"native core toy from {site}" in ran.stage("build")["detail"]
    table = next(i for i, line in enumerate(ran.lines) if line.startswith("stage "))
    assert [line.split()[:2] for line in ran.lines[table + 1 : -1]] == [
        [name, "passed"] for name in ran.outcomes
    ]


def test_what_fails_is_shown_and_the_rest_runs(toy: Path) -> None:
    ran = Ran(toy, "--without-gpu", TOY="fail")
    assert ran.status == 1
    failed = {name for name, outcome in ran.outcomes.items() if outcome == "failed"}
    assert failed == {"tests", "memcheck", "racecheck"}
    assert any(line.startswith("   | ") and "toy failure" in line for line in ran.lines)
    assert list((toy / "build" / "gpu-check").glob("*-gpu-check-no-gpu.json"))
    assert not (toy / "benchmarks" / "results").exists()


def test_what_the_sanitizer_finds_is_a_failure(toy: Path) -> None:
    (toy / "benchmarks" / "gpu.py").write_text("print('half a table'); raise SystemExit(3)")
    ran = Ran(toy, "--without-gpu", TOY="races")
    assert ran.status == 1
    assert (ran.outcomes["memcheck"], ran.outcomes["racecheck"]) == ("passed", "failed")
    assert ran.stage("racecheck")["detail"].startswith("RACECHECK SUMMARY: 2 hazards")
    assert (ran.outcomes["benchmark"], ran.stage("benchmark")["detail"]) == ("failed", "exit status 3")


def test_time_runs_out(toy: Path) -> None:
    (toy / "bin" / "compute-sanitizer").unlink()
    (toy / "benchmarks" / "gpu.py").unlink()
    ran = Ran(toy, "--without-gpu", "--limit=18", TOY="hang")
    assert ran.status == 1
    assert ran.outcomes == {
        "environment": "passed",
        "build": "passed",
        "tests": "failed",
        "memcheck": "skipped",
        "racecheck": "skipped",
        "benchmark": "skipped",
    }
    assert ran.stage("tests")["detail"].startswith("out of time")
    assert "not installed" in ran.stage("memcheck")["detail"]
    assert ran.stage("tests")["seconds"] < 18


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
    assert list(ran.outcomes.values()) == ["passed", "failed", "skipped", "skipped", "skipped", "skipped"]
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
