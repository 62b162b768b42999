"""How many kernels a step of decoding launches on a GPU: every one costs about 2 us of a step of one sequence.

The numbers are torch 2.13's. `python benchmarks/launches.py --list` names each launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "launches.py"


def test_launches_of_a_step_of_one_sequence() -> None:
    # A process of its own: it pretends that there is a GPU, and code for one is not made under Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    numbers = {part: len(names) for part, names in found.items()}
    assert numbers == {"begin": 2, "dense_layer": 6, "memory_layer": 10, "end": 4}, found
    # Else every program of the product that follows would work it out again.
    assert sum("silu" in name for name in found["dense_layer"]) == 1, found
