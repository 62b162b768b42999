"""Checks and measures the GPU path on a machine with torch, Triton and a compiler, and no internet: `make gpu-check`.

    environment    card, driver, versions; which packages are missing, and whether the wheels folder brings them
    build          those wheels and memlane, with its native core, into build/gpu-check/site
    kernel tests   tests/gpu, what concerns single kernels     | at the same time: models for the benchmarks
    kernels        gpu_kernels.py, what there are goals for
    engine tests   tests/gpu, the rest                         | at the same time: memcheck, racecheck, kernel tests under
                                                               | compute-sanitizer, where that is installed
    decode         gpu_decode.py, tables of bf16 rows
    decode int4    the same of int4 rows
    other formats  gpu_kernels.py, the rest

What matters most comes first. Every stage has a time limit, all together at most 9 minutes, and a log in build/gpu-check;
after each group of stages the table, the goals and one line of JSON are printed, and the JSON is written, so that a run
that is cut off leaves what it found. Tests that hang or break their process do not keep others from running.
Exit status: 0 if every stage passed, 1 if not, 2 without a GPU. Goals that are missed are no failure.
--without-gpu runs the same stages in Triton's interpreter, to try this program itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from gpu_goals import goals, table
from gpu_process import Check
from gpu_stages import (
    Stage,
    build,
    environment,
    kernel_files,
    measure,
    other_files,
    probe,
    sanitize,
    tests,
    write_models,
)

ROOT = Path(__file__).parents[1]
LIMIT = 525.0  # seconds, all stages together

Bodies = Mapping[str, Callable[[], Stage]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--without-gpu", action="store_true", help="in Triton's interpreter, on the CPU")
    parser.add_argument("--tests", nargs="+", default=["tests/gpu"], help="folders or files of tests")
    parser.add_argument(
        "--sanitize", default="not graph and not large", help="pytest -k of the tests under compute-sanitizer"
    )
    parser.add_argument("--limit", type=float, help=f"seconds for everything [{LIMIT:.0f}]")
    parser.add_argument(
        "--wheels", type=Path, default=None, help="folder of wheels [wheels, in the checkout]"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON of the results [dated, in benchmarks/results]"
    )
    options = parser.parse_args()
    options.wheels = options.wheels or options.root / "wheels"
    options.limit = options.limit or LIMIT * (2 if options.without_gpu else 1)  # the interpreter is slow
    check = Check(options)
    machine = probe(check)
    if machine["card"] is None and not options.without_gpu:
        why = "torch finds none" if machine["torch"] else "python3 here has no torch"
        print(f"gpu-check: no GPU ({why}); --without-gpu tries this program itself")
        return 2
    machine["card"] = "no GPU" if options.without_gpu else machine["card"]
    stages: list[Stage] = []
    for group in groups(check, machine):
        if any(stage.outcome == "failed" for stage in stages[:2]):
            stages += [Stage(name, "skipped", 0, "nothing was built") for name in group]
            continue
        stages += run(group)
        if len(stages) > 2:
            report(check, machine, stages)
    shutil.rmtree(check.models, ignore_errors=True)
    if any(stage.outcome == "failed" for stage in stages[:2]):
        report(check, machine, stages)
    return 0 if all(stage.outcome != "failed" for stage in stages) else 1


def groups(check: Check, machine: dict[str, Any]) -> Iterator[Bodies]:
    """Stages in the order of their weight; those of a group run at the same time."""
    decode = ["--models", check.models, "--formats"]
    of_tests = 240 if check.options.without_gpu else 120
    yield {"environment": lambda: environment(check, machine)}
    yield {"build": lambda: build(check)}
    yield {
        "kernel tests": lambda: tests(
            check, "kernel tests", kernel_files(check), check.limit(of_tests, 0.45)
        ),
        "models": lambda: write_models(check, check.limit(120, 0.45)),
    }
    formats = ["--formats", "bfloat16", "int4"]
    yield {"kernels": lambda: measure(check, "kernels", "gpu_kernels.py", formats, check.limit(75), 20)}
    yield {
        "engine tests": lambda: tests(check, "engine tests", other_files(check), check.limit(of_tests, 0.25)),
        "memcheck": lambda: sanitize(check, "memcheck", check.limit(90, 0.25)),
        "racecheck": lambda: sanitize(check, "racecheck", check.limit(90, 0.25)),
    }
    yield {
        "decode": lambda: measure(
            check, "decode", "gpu_decode.py", [*decode, "bfloat16"], check.limit(180, 0.01), 30
        )
    }
    yield {
        "decode int4": lambda: measure(
            check, "decode int4", "gpu_decode.py", [*decode, "int4"], check.limit(120, 0.01), 30
        )
    }
    rest = ["--parts", "gather", "--formats", "float32", "float16", "int8", "fp8"]
    yield {
        "other formats": lambda: measure(check, "other formats", "gpu_kernels.py", rest, check.limit(60), 15)
    }


def run(group: Bodies) -> list[Stage]:
    """The stages of a group at once, told of as they end; in the order of the group."""

    def timed(name: str) -> Stage:
        started = time.monotonic()
        return group[name]()._replace(seconds=round(time.monotonic() - started, 1))

    print(f"== {', '.join(group)}", flush=True)
    with ThreadPoolExecutor(len(group)) as pool:
        futures = {pool.submit(timed, name): name for name in group}
        for future in as_completed(futures):
            stage = future.result()
            if stage.shown:
                print(stage.shown)
            print(f"   {stage.name} {stage.outcome}: {stage.detail} ({stage.seconds:.1f} s)", flush=True)
    found = {name: future.result() for future, name in futures.items()}
    return [found[name] for name in group]


def report(check: Check, machine: dict[str, Any], stages: list[Stage]) -> None:
    """The tables, the file and the line of JSON; logs all in one file."""
    width = max(len(stage.name) for stage in stages)
    print(f"\n{'stage':{width}}  {'outcome':8} {'seconds':>7}  detail")
    for stage in stages:
        print(f"{stage.name:{width}}  {stage.outcome:8} {stage.seconds:7.1f}  {stage.detail}")
    figures = {stage.name: stage.figures or {} for stage in stages}
    decoded = [
        entry for name in ("decode", "decode int4") for entry in figures.get(name, {}).get("decode", ())
    ]
    found = goals(figures.get("kernels", {}), decoded)
    print("", *table(found), sep="\n")
    if check.options.without_gpu:
        print("(tiny sizes without a GPU: these figures mean nothing)")
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    result = {
        "benchmark": "gpu_check",
        "date": date,
        "machine": machine,
        "goals": [goal._asdict() | {"met": goal.met} for goal in found],
        "stages": [{k: v for k, v in stage._asdict().items() if k != "shown"} for stage in stages],
    }
    result = rounded(result)
    card = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    # What was tried without a GPU is no result.
    place = check.folder if check.options.without_gpu else check.root / "benchmarks" / "results"
    out: Path = check.options.out or place / f"{date}-gpu-check-{card}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    logs = sorted(check.folder.glob("*.log"), key=lambda log: log.stat().st_mtime)
    texts = (f"==== {log.name}\n{log.read_text(errors='replace')}\n" for log in logs)
    (check.folder / "all-logs.txt").write_text("".join(texts))
    print(f"logs: {check.folder / 'all-logs.txt'}; results: {out}")
    print(json.dumps(result, separators=(",", ":")), flush=True)


def rounded(value: Any) -> Any:
    """Numbers to four digits: more were never measured, and would hide what is of use."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
