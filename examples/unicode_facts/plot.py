"""Draw exact match against exposures for all runs into curves.png, and print the table of the README."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"memory": "tab:blue", "dense": "tab:orange"}


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Reports of a run by step, and its last line if it is finished."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "final" not in line], next((x for x in lines if "final" in x), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--to", type=Path, default=HERE / "curves.png")
    args = parser.parse_args()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    print("| run | steps | exposures | loss | exact match | hours on one core |\n|---|---|---|---|---|---|")
    for folder in sorted(p.parent for p in args.runs.glob("*/log.jsonl")):
        kind, _, seed = folder.name.partition("-")
        if kind not in COLOURS:
            continue
        reports, final = read(folder)
        style = {
            "color": COLOURS[kind],
            "linestyle": "-" if seed == "0" else "--",
            "label": f"{kind}, seed {seed}",
        }
        match = [100 * r["exact_match"] for r in reports]
        panels[0].plot([r["exposures"] for r in reports], match, **style)
        panels[1].plot([r["seconds"] / 60 for r in reports], match, **style)
        last = reports[-1]
        exact = (
            f"{100 * final['exact_match']:.2f} %"
            if final
            else f"({100 * last['exact_match']:.1f} %, unfinished)"
        )
        print(f"| {folder.name} | {last['step']} | {last['exposures']:.1f} | {last['loss']:.4f} | {exact} | "
              f"{last['seconds'] / 3600:.2f} |")  # fmt: skip
    panels[0].set(xlabel="exposures of each name", ylabel="exact match, %", ylim=(0, 100))
    panels[1].set(xlabel="minutes of training, one thread")
    panels[0].legend()
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.to, dpi=110)


if __name__ == "__main__":
    main()
