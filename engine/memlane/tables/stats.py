"""What a table counted. Plain numbers, taken without stopping it; the server turns them into metrics."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TableStats"]


@dataclass(frozen=True)
class TableStats:
    """Counters since open (they only grow), then gauges. A hit is an id whose row was cached when its batch began."""

    name: str
    placement: str  # what was asked for: "host" or "disk"
    tier: str  # where misses are read from: "host" (never missed) or "disk"
    backend: str  # how: "ram", "io_uring+direct", "threads+buffered", ...

    calls: int
    requested_rows: int  # ids asked for
    unique_rows: int  # different rows per batch; counted only where there is a cache
    hits: int
    misses: int
    unique_misses: int  # rows read for a batch
    evictions: int
    scratch_rows: int  # rows that went through the scratch region, because their batch had locked every slot
    warmed_rows: int  # rows read to warm the cache; nowhere else counted but in bytes_read and read_seconds
    bytes_read: int
    reads: int  # read operations, neighbouring rows merged into one
    retries: int  # reads repeated after a short read or EAGAIN
    read_seconds: float  # time spent in reads
    stall_seconds: float  # time in which a batch waited for reads
    errors: int  # rows that could not be read

    in_flight: int  # reads in flight now
    cache_slots: int
    used_slots: int
    row_bytes: int
    capacity_bytes: int  # budget of the cache, or the whole table where it lies in RAM
    resident_bytes: int  # rows held now, with index, scratch and read buffers

    @property
    def hit_rate(self) -> float:
        """Hits per requested row; 0 before the first request."""
        return self.hits / self.requested_rows if self.requested_rows else 0.0
