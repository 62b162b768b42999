"""What a model needs, tier by tier, and how to serve it in a given amount of memory. Reads headers; loads nothing."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memlane.checkpoints import open_checkpoint
from memlane.checkpoints.cache import cache_directory
from memlane.checkpoints.source import Checkpoint
from memlane.choices import Choices, available_memory
from memlane.config import EngineConfig
from memlane.errors import ConfigError, MemlaneError
from memlane.models.loading import served_dtype
from memlane.runner import KVCache
from memlane.tables.cache import cache_overhead
from memlane.tables.layout import RowFormat
from memlane.tables.simulate import LruCurve, lru_curve, summarise
from memlane.tables.table import Placement
from memlane.tables.trace import Trace, TraceFormatError, read_trace

__all__ = ["DiskUse", "Expected", "KVUse", "Plan", "TableSize", "available_memory", "make_plan"]

# What a table on disk takes beside its cached rows. Upper ends: a plan that is too small ends in swapping.
_POLICY_SLOT = 16  # bytes a slot, of policies other than LRU
_READ_BUFFERS = 8 << 20
_CHECKSUM_SHARE = 1024  # one byte of checksums for so many of the table

# Two Python processes with their libraries, the activations of a step, and a twentieth for the rest of the system.
_PROCESSES = 512 << 20
_SYSTEM_SHARE = 0.05

_MIB = 1 << 20


@dataclass(frozen=True)
class TableSize:
    """A value table as it will be served."""

    name: str
    rows: int
    row_bytes: int
    row_format: str

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class KVUse:
    """The KV cache: what a thousand tokens take, and what is set aside for how many by default."""

    dtype: str
    per_1000_tokens: int
    nbytes: int
    tokens: int
    max_model_len: int


@dataclass(frozen=True)
class DiskUse:
    """What lies in RAM of tables that are served from disk, all of them together."""

    cached_rows: int
    row_cache: int
    index: int
    buffers: int
    checksums: int

    @property
    def nbytes(self) -> int:
        return self.row_cache + self.index + self.buffers + self.checksums


@dataclass(frozen=True)
class Expected:
    """Hit rates of one table by a trace: with all the memory there is, and with the size that is recommended.

    short: the trace is too short for its sizes to be trusted.
    """

    table: str
    at_most: float
    recommended: float
    short: bool


@dataclass(frozen=True)
class Plan:
    """What to do and the numbers it follows from; all sizes in bytes.

    stored, weights: dense weights by dtype, in the checkpoint and in RAM. left: memory for tables (negative: nothing
    fits). host_fits: whether all tables go into it. disk: None where not even an empty cache does, or there are no
    tables. placement, command: None where the model cannot be served in this memory.
    """

    model: str
    form: str
    stored: dict[str, int]
    weights: dict[str, int]
    kv: KVUse
    tables: tuple[TableSize, ...]
    memory: int
    reserve: int
    left: int
    host_fits: bool
    disk: DiskUse | None
    expected: tuple[Expected, ...]
    placement: Placement | None
    command: str | None
    tables_lie_in: Path
    must_convert: bool

    @property
    def table_bytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    @property
    def short_of(self) -> int:
        """Bytes of memory that are missing to serve the model at all."""
        fixed = sum(_beside(table, 1) + table.row_bytes for table in self.tables)
        return max(0, min(fixed, self.table_bytes) - self.left)


def make_plan(model: str, memory: int | None = None, trace_file: str | None = None) -> Plan:
    """The plan for a model directory or a checkpoint of another form, which is not converted.

    memory: bytes to plan with, None for what is available. trace_file: rows recorded from this model.
    Raises CheckpointError, ConfigError (memory unknown; a trace of other tables), MemlaneError (an unreadable trace).
    """
    memory = available_memory() if memory is None else memory
    if memory is None:
        raise ConfigError("--memory: how much is available here is not known; state it")
    checkpoint = open_checkpoint(model, verify=False)
    choices = Choices(EngineConfig(model=model))
    dtype = getattr(torch, choices.dtype("cpu"))
    stored: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for tensor in checkpoint.dense:
        numbers = math.prod(tensor.shape)
        held = served_dtype(tensor.name, dtype)
        stored[_name(tensor.dtype)] += numbers * tensor.dtype.itemsize
        weights[_name(held)] += numbers * held.itemsize
    kv = _kv(checkpoint, choices, dtype, memory)
    tables = tuple(_table(t.name, t.rows, t.width, t.row_format) for t in checkpoint.tables)
    reserve = int(_PROCESSES + _SYSTEM_SHARE * memory)
    left = memory - sum(weights.values()) - kv.nbytes - reserve
    host_fits = sum(table.nbytes for table in tables) <= left
    slots = _slots(tables, left)
    expected: tuple[Expected, ...] = ()
    if trace_file is not None and tables and slots is not None:
        slots, expected = _fewest_slots(_curves(trace_file, tables), slots)
    placement: Placement | None = "host" if host_fits else "disk" if slots is not None else None
    disk = None if slots is None or not tables else _disk(tables, slots)
    must_convert = checkpoint.form != "memlane"
    return Plan(
        model=model,
        form=checkpoint.form,
        stored=dict(stored),
        weights=dict(weights),
        kv=kv,
        tables=tables,
        memory=memory,
        reserve=reserve,
        left=left,
        host_fits=host_fits,
        disk=disk,
        expected=expected,
        placement=placement,
        command=None if placement is None else _command(model, placement, kv, disk, bool(tables)),
        tables_lie_in=cache_directory() if must_convert else checkpoint.directory,
        must_convert=must_convert,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(name: str, rows: int, width: int, row_format: str) -> TableSize:
    return TableSize(name, rows, RowFormat(row_format).stride(width), row_format)


def _kv(checkpoint: Checkpoint, choices: Choices, dtype: torch.dtype, memory: int) -> KVUse:
    block_size = choices.block_size
    block = KVCache.block_bytes(checkpoint.config, block_size, dtype)
    size = choices.kv_size(checkpoint.config, dtype, memory)
    return KVUse(
        _name(dtype),
        1000 * block // block_size,
        size.blocks * block,
        size.blocks * block_size,
        size.max_model_len,
    )


def _beside(table: TableSize, slots: int) -> int:
    """RAM that a table on disk takes beside the rows of a cache of so many slots."""
    index = cache_overhead(table.rows, table.row_bytes, slots) + _POLICY_SLOT * slots
    return index + _READ_BUFFERS + table.nbytes // _CHECKSUM_SHARE


def _slots(tables: Sequence[TableSize], left: int) -> int | None:
    """The most rows that each table can have cached, its part being equal; None if not even one row each fits."""

    def fits(slots: int) -> bool:
        each = [min(slots, table.rows) for table in tables]
        return (
            sum(n * table.row_bytes + _beside(table, n) for n, table in zip(each, tables, strict=True))
            <= left
        )

    if not tables or not fits(1):
        return None
    # What is beside the rows grows in steps, so this may miss a few slots more; it never takes too many.
    low, high = 1, max(table.rows for table in tables) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _disk(tables: Sequence[TableSize], slots: int) -> DiskUse:
    cached = [min(slots, table.rows) for table in tables]
    checksums = sum(table.nbytes // _CHECKSUM_SHARE for table in tables)
    buffers = _READ_BUFFERS * len(tables)
    beside = sum(_beside(table, n) for table, n in zip(tables, cached, strict=True))
    return DiskUse(
        cached_rows=sum(cached),
        row_cache=sum(n * table.row_bytes for n, table in zip(cached, tables, strict=True)),
        index=beside - buffers - checksums,
        buffers=buffers,
        checksums=checksums,
    )


def _curves(trace_file: str, tables: Sequence[TableSize]) -> dict[str, LruCurve]:
    """The LRU curve of each table of the model that lookups were recorded of."""
    try:
        trace = read_trace(trace_file)
        _check(trace, tables)
        summaries = summarise(trace)
        curves = {
            table.name: lru_curve(trace, number, summaries[number])
            for number, table in enumerate(trace.tables)
        }
    except TraceFormatError as error:
        raise MemlaneError(str(error)) from error
    except OSError as error:
        raise MemlaneError(f"{trace_file}: {error.strerror}") from error
    return {name: curve for name, curve in curves.items() if curve.ids}


def _check(trace: Trace, tables: Sequence[TableSize]) -> None:
    rows = {table.name: table.rows for table in tables}
    for table in trace.tables:
        if rows.get(table.name) != table.rows:
            raise ConfigError(
                f"--trace: {trace.path} was recorded from another model: table {table.name} of {table.rows} rows"
            )


def _fewest_slots(curves: dict[str, LruCurve], most: int) -> tuple[int, tuple[Expected, ...]]:
    """The size that loses half a percentage point at most in every table; they share the cache in equal parts."""
    slots = max((curve.as_good_as(most) for curve in curves.values()), default=most)
    return slots, tuple(
        Expected(name, curve.hit_rate(most), curve.hit_rate(slots), curve.is_short)
        for name, curve in curves.items()
    )


def _command(model: str, placement: Placement, kv: KVUse, disk: DiskUse | None, tables: bool) -> str:
    words = ["memlane", "serve", model]
    if tables:
        words += ["--placement", placement]
    if placement == "disk" and disk is not None:
        words += ["--row-cache", _size_option(disk.row_cache)]
    return shlex.join([*words, "--kv-cache", _size_option(kv.nbytes)])


def _size_option(count: int) -> str:
    """A size as options take it, rounded up so that it holds what was counted."""
    if count >= 64 * _MIB:
        return f"{-(-count // _MIB)}MiB"
    return f"{-(-count // 1024)}KiB"
