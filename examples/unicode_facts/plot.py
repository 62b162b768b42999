"""Draw exact match against exposures for all finished runs into curves.png, and print the tables of the README.

The logs of finished runs are kept in results/; `--collect runs` copies them there first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"memory": "tab:blue", "dense": "tab:orange"}


class Run(NamedTuple):
    """A training: its reports by step, and its last line if it is finished."""

    kind: str
    width: str
    seed: str
    reports: list[dict[str, Any]]
    final: dict[str, Any] | None


def read(log: Path) -> Run:
    """A log called KIND-SEED.jsonl or KIND-WIDTH-SEED.jsonl."""
    kind, *width, seed = log.stem.split("-")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    reports = [line for line in lines if "final" not in line]
    return Run(
        kind, width[0] if width else "128", seed, reports, next((x for x in lines if "final" in x), None)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", type=Path, help="folder of runs to copy logs from")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--to", type=Path, default=HERE / "curves.png")
    args = parser.parse_args()
    if args.collect:
        args.results.mkdir(exist_ok=True)
        for log in sorted(log for log in args.collect.glob("*/log.jsonl") if '"final"' in log.read_text()):
            shutil.copyfile(log, args.results / f"{log.parent.name}.jsonl")
    runs = [read(log) for log in sorted(args.results.glob("*.jsonl"))]
    draw(runs, args.to)
    print_ends(runs)
    print_ways(runs)


def draw(runs: list[Run], to: Path) -> None:
    """One panel per width, one line per run."""
    widths = sorted({run.width for run in runs}, key=int, reverse=True)
    figure, panels = plt.subplots(
        1, len(widths), figsize=(5.5 * len(widths), 4.2), sharey=True, squeeze=False
    )
    for panel, width in zip(panels[0], widths, strict=True):
        for run in (r for r in runs if r.width == width):
            panel.plot(
                [r["exposures"] for r in run.reports],
                [100 * r["exact_match"] for r in run.reports],
                color=COLOURS[run.kind],
                linestyle="-" if run.seed == "0" else "--",
                label=f"{run.kind}, seed {run.seed}",
            )
        panel.set(title=f"width {width}", xlabel="exposures of each name", ylim=(0, 100))
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left")
    panels[0][0].set_ylabel("whole names right, %")
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def print_ends(runs: list[Run]) -> None:
    print("| twin | width | seed | exposures | exact match, all names, all phrasings | training, minutes |")
    print("|---|---|---|---|---|---|")
    for run in runs:
        last = run.reports[-1]
        exact = f"{100 * run.final['exact_match']:.2f} %" if run.final else "unfinished"
        print(f"| {run.kind} | {run.width} | {run.seed} | {last['exposures']:.1f} | {exact} | "
              f"{last['seconds'] / 60:.0f} |")  # fmt: skip


def print_ways(runs: list[Run], every: int = 2000) -> None:
    """Exact match of 1,000 names on the way, each run at the same steps."""
    names = [f"{run.kind} {run.width} seed {run.seed}" for run in runs]
    print("\n| step | " + " | ".join(names) + " |\n|---|" + "---|" * len(runs))
    by_step = [{r["step"]: r["exact_match"] for r in run.reports} for run in runs]
    for step in range(every, max(max(steps) for steps in by_step) + 1, every):
        cells = (f"{100 * steps[step]:.1f}" if step in steps else "" for steps in by_step)
        print(f"| {step} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
