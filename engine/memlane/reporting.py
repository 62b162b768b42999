"""What the engine says about itself, in the form that travels."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from memlane import ipc
from memlane.tables import TableStats

__all__ = ["resident_bytes", "table_stats"]

_GAUGES = (
    "in_flight",
    "warming_rows",
    "cache_slots",
    "used_slots",
    "pinned_slots",
    "row_bytes",
    "capacity_bytes",
    "resident_bytes",
    "page_cache_bytes",
)
_NAMES = ("name", "placement", "tier", "backend", "policy")


def table_stats(stats: TableStats) -> ipc.TableStats:
    """A table's own counters as a message."""
    values = {k: v for k, v in dataclasses.asdict(stats).items() if k not in _NAMES}
    return ipc.TableStats(
        table=stats.name,
        tier=stats.tier,
        counters={k: v for k, v in values.items() if k not in _GAUGES},
        gauges={k: values[k] for k in _GAUGES if values[k] >= 0},  # below: unknown
        info={"placement": stats.placement, "backend": stats.backend, "policy": stats.policy},
    )


def resident_bytes() -> int:
    """Memory of this process in RAM; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
