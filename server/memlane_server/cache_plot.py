"""Hit rates over cache sizes as a picture. Needs matplotlib: imported only when a picture is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memlane_server.cache_sim import Report

_COLOURS = ("#1f5fa8", "#d1611b", "#2b8a4b", "#8a3fa0", "#8c6d1f", "#b0303a")
_MARKS = "osD^vP"


def draw(path: str, reports: Sequence[Report]) -> None:
    """One panel a table, written to `path` in the format its name ends in. OSError, ValueError (no such format)."""
    figure = Figure(figsize=(7.5, 0.6 + 3.9 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, report in zip(figure.subplots(len(reports), squeeze=False)[:, 0], reports, strict=True):
        _panel(axes, report)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, report: Report) -> None:
    rows, simulation = max(1, report.table.rows), report.simulation
    smallest = min((p.slots for p in simulation.points if p.slots), default=1)
    least = max(1, min(smallest, rows // 200))
    slots = np.unique(np.geomspace(least, rows, 400).astype(np.int64))
    axes.plot(
        100 * slots / rows,
        [simulation.curve.hit_rate(int(s)) for s in slots],
        color="0.55",
        linewidth=1.5,
        label="LRU, all sizes at once",
    )
    names = list(dict.fromkeys(point.policy for point in simulation.points))
    for i, name in enumerate(names):
        own = sorted((p for p in simulation.points if p.policy == name and p.slots), key=lambda p: p.slots)
        axes.plot(
            [100 * p.slots / rows for p in own],
            [p.hit_rate for p in own],
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKS[i % len(_MARKS)],
            markersize=5,
            linewidth=0.8,
            linestyle="--",
            label=f"{name}, replayed",
        )
    if report.budget:
        axes.axvline(100 * report.budget / rows, color="0.2", linewidth=1, linestyle=":")
        axes.annotate(
            " budget",
            (100 * report.budget / rows, 0.02),
            xycoords=("data", "axes fraction"),
            fontsize=9,
            color="0.2",
        )
    axes.set_xscale("log")
    axes.set_xlim(100 * least / rows, 100)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlabel("cache size, part of the table")
    axes.set_ylabel("reads that hit")
    axes.set_title(
        f"table {report.table.name}: {report.summary.ids:,} ids of {report.table.rows:,} rows", fontsize=11
    )
    axes.grid(True, which="both", color="0.92")
    axes.legend(loc="best", fontsize=9, frameon=False)
