"""Run the benchmarks of this folder, but for scale.py, one after the other, and date its result.

`make bench` is this. Each program prints its own table with the ceiling beside the result and writes one
JSON file; a program that fails is named at the end and makes the exit status 1.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Not scale.py: it writes 33 GB, which is to be asked for.
PROGRAMS = ["tables.py", "policies.py", "cold_reads.py", "decode.py", "startup.py", "smlm.py"]


def main() -> int:
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    failed = []
    for program in PROGRAMS:
        out = HERE / "results" / f"{date}-{Path(program).stem}.json"
        print(f"\n== {program} → {out.relative_to(HERE.parent)}", flush=True)
        if subprocess.run([sys.executable, str(HERE / program), "--out", str(out)], check=False).returncode:
            failed.append(program)
    for program in failed:
        print(f"failed: {program}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
