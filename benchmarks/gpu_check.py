"""Checks and measures the GPU path on a machine with torch, Triton and a compiler, and no internet: `make gpu-check`.

    environment   card, driver, versions; which packages are missing, and whether the wheels folder brings them
    build         those wheels and memlane, with its native core, into build/gpu-check/site
    tests         pytest tests/gpu
    memcheck      part of the tests under compute-sanitizer, where that is installed
    racecheck
    benchmark     benchmarks/gpu.py

Every stage has a time limit, all together at most 9 minutes, and a log in build/gpu-check. At the end one table and one
line of JSON, which also goes to benchmarks/results. Exit status: 0 if every stage passed, 1 if not, 2 without a GPU.
--without-gpu runs the same stages in Triton's interpreter, to try this program itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from gpu_stages import Check, Stage, benchmark, build, environment, probe, sanitize, tests

ROOT = Path(__file__).parents[1]
LIMIT = 530.0  # seconds, all stages together
TAIL = 40  # lines of a log that are shown after a failure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--without-gpu", action="store_true", help="in Triton's interpreter, on the CPU")
    parser.add_argument("--tests", nargs="+", default=["tests/gpu"], help="what pytest is given")
    parser.add_argument(
        "--sanitize", default="not graph", help="pytest -k of the tests under compute-sanitizer"
    )
    parser.add_argument(
        "--benchmark", default="benchmarks/gpu.py", help="program that takes --seconds and --json"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument(
        "--wheels", type=Path, default=None, help="folder of wheels [wheels, in the checkout]"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON of the results [dated, in benchmarks/results]"
    )
    options = parser.parse_args()
    options.wheels = options.wheels or options.root / "wheels"
    check = Check(options)
    machine = probe(check)
    if machine["card"] is None and not options.without_gpu:
        why = "torch finds none" if machine["torch"] else "python3 here has no torch"
        print(f"gpu-check: no GPU ({why}); --without-gpu tries this program itself")
        return 2
    machine["card"] = "no GPU" if options.without_gpu else machine["card"]
    stages = run_stages(check, machine)
    report(check, machine, stages)
    return 0 if all(stage.outcome != "failed" for stage in stages) else 1


def run_stages(check: Check, machine: dict[str, Any]) -> list[Stage]:
    """All of them, each whatever became of the others, but nothing where there is no build to try."""
    bodies = {
        "environment": lambda: environment(check, machine),
        "build": lambda: build(check),
        "tests": lambda: tests(check),
        "memcheck": lambda: sanitize(check, "memcheck"),
        "racecheck": lambda: sanitize(check, "racecheck"),
        "benchmark": lambda: benchmark(check),
    }
    stages: list[Stage] = []
    for name, body in bodies.items():
        if name != "environment":
            check.log(name).unlink(missing_ok=True)
        if any(stage.outcome == "failed" for stage in stages[:2]):
            stages.append(Stage(name, "skipped", 0, "nothing was built"))
            continue
        print(f"== {name}", flush=True)
        started = time.monotonic()
        stage = body()._replace(seconds=round(time.monotonic() - started, 1))
        stages.append(stage)
        print(f"   {stage.outcome}: {stage.detail}", flush=True)
        if stage.outcome == "failed":
            tail = check.log(name).read_text(errors="replace").splitlines()[-TAIL:]
            print("\n".join(f"   | {line}" for line in tail))
    return stages


def report(check: Check, machine: dict[str, Any], stages: list[Stage]) -> None:
    """The table, the file and the line of JSON."""
    width = max(len(stage.name) for stage in stages)
    print(f"\n{'stage':{width}}  {'outcome':8} {'seconds':>7}  detail")
    for stage in stages:
        print(f"{stage.name:{width}}  {stage.outcome:8} {stage.seconds:7.1f}  {stage.detail}")
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    result = {
        "benchmark": "gpu_check",
        "date": date,
        "machine": machine,
        "stages": [s._asdict() for s in stages],
    }
    card = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    # What was tried without a GPU is no result.
    place = check.folder if check.options.without_gpu else check.root / "benchmarks" / "results"
    out: Path = check.options.out or place / f"{date}-gpu-check-{card}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
