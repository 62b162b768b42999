"""What a table counted. Plain numbers, taken without stopping it; the server turns them into metrics."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TableStats"]


@dataclass(frozen=True)
class TableStats:
    """Counters since open (they only grow), then gauges. A hit is an id whose row was cached when its batch began."""

    name: str
    placement: str  # what was asked for: "device", "host" or "disk"
    tier: str  # where misses are read from: "host", "disk"; "device" where rows are never missed on a GPU
    backend: str  # how: "ram", "io_uring+direct", "threads+buffered", "gpu+pinned", ...
    policy: str  # which rows the cache gives up: "lru", ...; "" where there is none

    calls: int = 0
    requested_rows: int = 0  # ids asked for
    unique_rows: int = 0  # different rows per batch; counted only where there is a cache
    hits: int = 0
    misses: int = 0
    unique_misses: int = 0  # rows read for a batch
    conflict_misses: int = 0  # of the misses, those whose set of a GPU's cache was full of rows in use
    evictions: int = 0
    scratch_rows: int = (
        0  # rows that went through the scratch region, because their batch had locked every slot
    )
    warmed_rows: int = (
        0  # rows read to warm the cache; nowhere else counted but in bytes_read and read_seconds
    )
    bytes_read: int = 0
    reads: int = 0  # read operations, neighbouring rows merged into one
    retries: int = 0  # reads repeated after a short read or EAGAIN
    read_seconds: float = (
        0.0  # from start to end of each batch's reads, summed; computing may go on meanwhile
    )
    stall_seconds: float = 0.0  # time in which a batch could do nothing but wait for reads
    errors: int = 0  # rows that could not be read
    corrupt_pages: int = 0  # pages whose bytes did not match their checksum

    in_flight: int = 0  # reads in flight now
    warming_rows: int = 0  # rows that are still to be read to warm the cache
    cache_slots: int = 0
    used_slots: int = 0
    pinned_slots: int = 0  # of the used ones, those that are never evicted
    row_bytes: int = 0
    capacity_bytes: int = 0  # budget of the cache, or the whole table where it lies in RAM
    resident_bytes: int = 0  # rows held now, with index, scratch, read buffers and checksums
    page_cache_bytes: int = -1  # of the table's file, in the system's page cache; -1 where unknown

    @property
    def hit_rate(self) -> float:
        """Hits per requested row; 0 before the first request."""
        return self.hits / self.requested_rows if self.requested_rows else 0.0
