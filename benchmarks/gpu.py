"""The GPU path measured within a given time: kernels, then decoding. What `make gpu-check` runs last.

    python benchmarks/gpu.py [--seconds 200] [--json FILE]

Parts that do not fit the time are left out and named. Without a GPU tiny sizes run, to try the program; their figures mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_kernels import gpu_header
from measuring import Result, finish

HERE = Path(__file__).parent
# Parts in the order of their weight: program, arguments, the least seconds that they are worth starting with.
PARTS = {
    "kernels": ("gpu_kernels.py", [], 40),
    "decode_bf16": ("gpu_decode.py", ["--formats", "bfloat16"], 60),
    "decode_int4": ("gpu_decode.py", ["--formats", "int4"], 40),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    small = not torch.cuda.is_available()
    result = gpu_header("gpu", torch.device("cpu" if small else "cuda"))
    result["parts"], failed = {}, False
    for name, (program, arguments, least) in PARTS.items():
        left = deadline - time.monotonic()
        if left < (5 if small else least):
            print(f"{name}: left out, {left:.0f} s are too few")
            result["parts"][name] = None
            continue
        done = run(program, [*arguments, *(["--small"] if small else [])], left)
        failed |= done is None
        result["parts"][name] = done
    finish(result, options.json)
    return 1 if failed else 0


def run(program: str, arguments: list[str], seconds: float) -> Result | None:
    """A program of its own: what one leaves in a GPU's memory does not concern the next. None where it fails."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        command = [sys.executable, str(HERE / program), "--json", str(out), *arguments]
        try:
            status = subprocess.run(command, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"{program}: ended after {seconds:.0f} s")
            return None
        if status or not out.exists():
            print(f"{program}: exit status {status}")
            return None
        found: Result = json.loads(out.read_text())
        return found


if __name__ == "__main__":
    sys.exit(main())
