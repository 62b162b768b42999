"""Records the rows that the demo model asks for while it answers questions as people do: some far more often than others.

    python benchmarks/record_demo.py demo.rows
    memlane cache-sim demo.rows --plot docs/cache-sim-demo.png --json benchmarks/results/DATE-cache-sim.json

The plot and the table of policies in docs/tables.md were made so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from decode import DEMO, answer, questions

from memlane import LLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="where to write the record; must not exist")
    parser.add_argument("--questions", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16, help="questions answered at a time")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with LLM(DEMO, placement="disk", row_cache="25%", record_rows=str(options.file), warm_start="off") as llm:
        answer(llm, questions(options.questions, "zipf", rng), options.batch)


if __name__ == "__main__":
    main()
