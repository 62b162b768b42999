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
    policy: str  # which rows the cache gives up: "lru", ...; "" where there is none

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
    read_seconds: float  # from start to end of each batch's reads, summed; computing may go on meanwhile
    stall_seconds: float  # time in which a batch could do nothing but wait for reads
    errors: int  # rows that could not be read
    corrupt_pages: int  # pages whose bytes did not match their checksum

    in_flight: int  # reads in flight now
    warming_rows: int  # rows that are still to be read to warm the cache
    cache_slots: int
    used_slots: int
    pinned_slots: int  # of the used ones, those that are never evicted
    row_bytes: int
    capacity_bytes: int  # budget of the cache, or the whole table where it lies in RAM
    resident_bytes: int  # rows held now, with index, scratch, read buffers and checksums
    page_cache_bytes: int  # of the table's file, in the system's page cache; -1 where unknown

    @property
    def hit_rate(self) -> float:
        """Hits per requested row; 0 before the first request."""
        return self.hits / self.requested_rows if self.requested_rows else 0.0
