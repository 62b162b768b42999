"""The engine's own counters as Prometheus samples, per table and tier where they are a table's.

Counters must never shrink, but a restarted engine counts from zero: what dead engines had counted is kept
and added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from memlane import ipc

# Field of ipc.Stats → metric. Counters get `_total` from the exposition.
COUNTERS: Final[dict[str, tuple[str, str]]] = {
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "preemptions": ("num_preemptions", "Preemptions of running sequences."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed."),
    "generation_tokens": ("generation_tokens", "Tokens generated."),
    "steps": ("engine_steps", "Steps of the engine."),
}

# Counter of a table (tables/stats.py) → metric, and whether it is counted per tier of the storage.
TABLE_COUNTERS: Final[dict[str, tuple[str, str]]] = {
    "calls": ("table_calls", "Batches looked up in the table."),
    "requested_rows": ("table_rows_requested", "Rows asked for: tokens × top-k, summed over layers."),
    "unique_rows": ("table_rows_unique", "Different rows per batch, where there is a cache."),
    "hits": ("table_cache_hits", "Requested rows that were cached when their batch began."),
    "misses": ("table_cache_misses", "Requested rows that were not."),
    "unique_misses": ("table_rows_read", "Rows read from where the table lies."),
    "conflict_misses": (
        "table_cache_conflict_misses",
        "Missing rows for which a GPU's cache had no way free in their set.",
    ),
    "evictions": ("table_cache_evictions", "Cached rows that made way for others."),
    "warmed_rows": ("table_warmed_rows", "Rows read to warm the cache; no request asked for them."),
    "scratch_rows": ("table_scratch_rows", "Rows read past a cache that their batch had filled."),
    "bytes_read": ("table_bytes_read", "Bytes read from where the table lies."),
    "reads": ("table_reads", "Read operations; neighbouring rows are read in one."),
    "retries": ("table_read_retries", "Reads repeated after a short read or EAGAIN."),
    "read_seconds": (
        "table_read_seconds",
        "Time from start to end of each batch's reads; computing may go on.",
    ),
    "stall_seconds": ("table_stall_seconds", "Time in which a step could do nothing but wait for reads."),
    "errors": ("table_io_errors", "Rows that could not be read."),
    "corrupt_pages": ("table_corrupt_pages", "Pages of 4 KiB whose bytes did not match their checksum."),
}
TABLE_GAUGES: Final[dict[str, tuple[str, str]]] = {
    "in_flight": ("table_io_inflight", "Reads in flight."),
    "warming_rows": ("table_warming_rows", "Rows still to be read to warm the cache."),
    "cache_slots": ("table_cache_slots", "Rows that the cache has room for."),
    "used_slots": ("table_cache_used_slots", "Rows in the cache."),
    "pinned_slots": ("table_cache_pinned_slots", "Rows in the cache that are never evicted."),
    "row_bytes": ("table_row_bytes", "Bytes of one row as it is stored."),
    "capacity_bytes": ("table_capacity_bytes", "Budget of the cache, or the table where it lies in RAM."),
    "resident_bytes": ("table_resident_bytes", "Bytes of rows, index and buffers in RAM."),
    "page_cache_bytes": ("table_page_cache_bytes", "Bytes of the table's file in the system's page cache."),
}

PREFIX: Final = "memlane:"
Key = tuple[str, ...]  # ("prompt_tokens",) or ("hits", table, tier)


class EngineCollector(Collector):
    """Samples of the latest ipc.Stats. Used in the event loop's thread only."""

    def __init__(self, names: dict[str, str]) -> None:
        self._label_names = list(names)
        self._labels = list(names.values())
        self._before: dict[Key, float] = {}  # counted by engines that have ended
        self._now: dict[Key, float] = {}
        self._stats: ipc.Stats | None = None
        self._ready: ipc.Ready | None = None

    def started(self, ready: ipc.Ready) -> None:
        self._ready = ready

    def update(self, stats: ipc.Stats) -> None:
        self._stats = stats
        self._now = {(name,): float(getattr(stats, name)) for name in COUNTERS}
        for table in stats.tables:
            for name in TABLE_COUNTERS:
                self._now[name, table.table, table.tier] = table.counters.get(name, 0.0)

    def ended(self) -> None:
        for key, value in self._now.items():
            self._before[key] = self._before.get(key, 0.0) + value
        self._now, self._stats, self._ready = {}, None, None

    def describe(self) -> list[Metric]:
        """Nothing: collecting at registration would fix the set of tables before one is known."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield self._gauge("engine_up", "Whether the engine is ready for requests.", self._ready is not None)
        yield self._gauge(
            "num_requests_running", "Sequences in the running batch.", stats.running if stats else 0
        )
        yield self._gauge(
            "num_requests_waiting", "Sequences waiting to be scheduled.", stats.waiting if stats else 0
        )
        yield self._waiting_by_reason()
        usage = stats.kv_blocks_used / max(stats.kv_blocks_total, 1) if stats else 0
        yield self._gauge("kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1.", usage)
        yield self._gauge(
            "engine_resident_bytes", "Resident memory of the engine.", stats.resident_bytes if stats else 0
        )
        yield self._cache_config()
        for name, (metric, text) in COUNTERS.items():
            family = CounterMetricFamily(PREFIX + metric, text, labels=self._label_names)
            family.add_metric(self._labels, self._total((name,)))
            yield family
        yield self._cached_prompt_tokens()
        yield self._prompt_tokens_by_source()
        yield from self._tables()

    def _total(self, key: Key) -> float:
        return self._before.get(key, 0.0) + self._now.get(key, 0.0)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, text, labels=self._label_names)
        family.add_metric(self._labels, float(value))
        return family

    def _waiting_by_reason(self) -> GaugeMetricFamily:
        labels = [*self._label_names, "reason"]
        family = GaugeMetricFamily(
            PREFIX + "num_requests_waiting_by_reason",
            "Waiting sequences by what they wait for.",
            labels=labels,
        )
        family.add_metric([*self._labels, "capacity"], self._stats.waiting if self._stats else 0)
        family.add_metric([*self._labels, "deferred"], 0)
        return family

    def _cache_config(self) -> GaugeMetricFamily:
        blocks, size = (self._ready.kv_blocks, self._ready.block_size) if self._ready else (0, 0)
        family = GaugeMetricFamily(
            PREFIX + "cache_config_info",
            "Shape of the KV cache.",
            labels=[*self._label_names, "block_size", "num_kv_blocks"],
        )
        family.add_metric([*self._labels, str(size), str(blocks)], 1)
        return family

    def _cached_prompt_tokens(self) -> CounterMetricFamily:
        family = CounterMetricFamily(
            PREFIX + "prompt_tokens_cached", "Prompt tokens not computed again.", labels=self._label_names
        )
        family.add_metric(self._labels, self._total(("prefix_cache_hits",)))
        return family

    def _prompt_tokens_by_source(self) -> CounterMetricFamily:
        family = CounterMetricFamily(
            PREFIX + "prompt_tokens_by_source",
            "Prompt tokens by where their keys and values came from.",
            labels=[*self._label_names, "source"],
        )
        family.add_metric([*self._labels, "local_compute"], self._total(("prompt_tokens",)))
        family.add_metric([*self._labels, "local_cache_hit"], self._total(("prefix_cache_hits",)))
        return family

    def _tables(self) -> Iterator[Metric]:
        labels = [*self._label_names, "table", "tier"]
        places = {key[1:] for key in [*self._before, *self._now] if len(key) == 3}
        for name, (metric, text) in TABLE_COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + metric, text, labels=labels)
            for place in sorted(places):
                counter.add_metric([*self._labels, *place], self._total((name, *place)))
            yield counter
        for name, (metric, text) in TABLE_GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + metric, text, labels=labels)
            for table in self._stats.tables if self._stats else []:
                if name in table.gauges:
                    gauge.add_metric([*self._labels, table.table, table.tier], table.gauges[name])
            yield gauge
        yield self._table_info()
        yield self._per_table("table_cache_hit_ratio", "Hits per requested row since start.", "hits", labels)
        yield self._per_table(
            "table_dedup_ratio", "Different rows per requested row since start.", "unique_rows", labels
        )

    def _table_info(self) -> GaugeMetricFamily:
        names = ["placement", "backend", "policy"]
        family = GaugeMetricFamily(
            PREFIX + "table_info",
            "How the table is served.",
            labels=[*self._label_names, "table", "tier", *names],
        )
        for table in self._stats.tables if self._stats else []:
            values = [table.info.get(name, "") for name in names]
            family.add_metric([*self._labels, table.table, table.tier, *values], 1)
        return family

    def _per_table(self, metric: str, text: str, name: str, labels: list[str]) -> GaugeMetricFamily:
        """A counter in proportion to the rows requested, for people who look without a query language."""
        gauge = GaugeMetricFamily(PREFIX + metric, text, labels=labels)
        for table in self._stats.tables if self._stats else []:
            asked = table.counters.get("requested_rows", 0.0)
            ratio = table.counters.get(name, 0.0) / asked if asked else 0.0
            gauge.add_metric([*self._labels, table.table, table.tier], ratio)
        return gauge
