"""Opening a table for a GPU: its rows loaded, pinned or left on disk, and a row cache of the right size before them."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import NamedTuple

import torch

from memlane.kernels import RowMemory, device_stride
from memlane.tables.device_cache import DeviceRowCache, plan
from memlane.tables.errors import TableError
from memlane.tables.gpu_disk import DiskStore
from memlane.tables.gpu_host import HostStore
from memlane.tables.gpu_stores import DeviceStore, Store
from memlane.tables.gpu_table import GpuTable
from memlane.tables.host_rows import HostRows, row_pieces
from memlane.tables.layout import TableLayout
from memlane.tables.side_stream import link_speed
from memlane.tables.source import FileSource
from memlane.tables.table import MOST_ROWS, Placement, Reading, ValueTable

__all__ = ["GpuTableOptions", "least_cache_bytes", "open_gpu_table"]

logger = logging.getLogger(__name__)

_SCRATCH_ROWS = 16_384
_WORD_BYTES = 8
_USUAL = Reading()


class GpuTableOptions(NamedTuple):
    """How a table is read by a GPU.

    cache_bytes: of GPU memory for the row cache, scratch and all. decode_ids: ids of the largest lookup that is to go in
    one part, where rows come through the processor. reads_per_token: ids a token asks for, all layers together. shared:
    a table on the host lies in shared memory, one copy for all processes.
    """

    device: torch.device
    placement: Placement
    cache_bytes: int = 0
    decode_ids: int = 0
    reads_per_token: int = 0
    shared: bool = False


def open_gpu_table(
    layout: TableLayout,
    options: GpuTableOptions,
    reading: Reading = _USUAL,
    ram_cache_bytes: int = 64 << 20,
) -> GpuTable:
    """Opens a table for a GPU (or, with the kernels' twins, for the CPU: for tests).

    ram_cache_bytes: of rows kept in pinned RAM where the table stays on disk. A table on the host or on disk never lies
    in GPU memory, not even in passing. Raises OSError, TableFormatError, TableError (also where memory cannot be pinned),
    RowReadError, MemoryError.
    """
    if layout.rows > MOST_ROWS:
        raise TableError(f"table {layout.name!r}: {layout.rows} rows; at most {MOST_ROWS} are supported")
    return GpuTable(layout, _store(layout, options, reading, ram_cache_bytes), options.device)


def least_cache_bytes(rows: int, stride: int, decode_ids: int) -> int:
    """The least GPU memory that a row cache can do with: scratch for two lookups and one set in a hundred."""
    scratch = _scratch_bytes(rows, stride, decode_ids)
    return scratch + (rows // 100 + 32) * (device_stride(stride) + _WORD_BYTES)


def _store(layout: TableLayout, options: GpuTableOptions, reading: Reading, ram_cache_bytes: int) -> Store:
    device = options.device
    if options.placement == "disk":
        with ExitStack() as opened:
            table = ValueTable.open(layout, "disk", ram_cache_bytes, **reading._asdict())
            opened.callback(table.close)
            on_disk = DiskStore(layout, _cache(layout, options), table, device, link_speed(device))
            opened.pop_all()  # the table is the store's now
            return on_disk
    source = FileSource(layout, io=reading.io, merge_gap=reading.merge_gap, deadline=reading.deadline)
    try:
        if options.placement == "device":
            return DeviceStore(layout, _load(layout, source, device), options.reads_per_token)
        host = HostRows(layout, source, stride=device_stride(layout.stride), shared=options.shared)
    finally:
        source.close()
    with ExitStack() as opened:
        opened.callback(host.close)
        if device.type == "cuda":
            host.pin(device)
        on_host = HostStore(layout, _cache(layout, options), host, device, link_speed(device))
        opened.pop_all()
        return on_host


def _load(layout: TableLayout, source: FileSource, device: torch.device) -> RowMemory:
    """All rows in the device's memory, by way of a small buffer in RAM."""
    stride = device_stride(layout.stride)
    data = torch.zeros(layout.rows, stride, dtype=torch.uint8, device=device)
    for begin, rows in row_pieces(layout, source, "loaded into GPU memory"):
        data[begin : begin + len(rows), : layout.stride].copy_(torch.from_numpy(rows))
    return RowMemory(data, layout.dtype.value, layout.width)


def _cache(layout: TableLayout, options: GpuTableOptions) -> DeviceRowCache:
    scratch = _scratch_rows(layout.rows, options.decode_ids)
    left = options.cache_bytes - _scratch_bytes(layout.rows, layout.stride, options.decode_ids)
    sets = plan(layout.rows, layout.stride, left)
    if not sets:
        raise TableError(
            f"table {layout.name!r}: a GPU row cache of {options.cache_bytes} bytes is too small; it needs "
            f"{least_cache_bytes(layout.rows, layout.stride, options.decode_ids)}"
        )
    cache = DeviceRowCache(
        layout.rows,
        layout.stride,
        layout.dtype.value,
        layout.width,
        sets=sets,
        scratch=scratch,
        in_place=options.placement == "host",
        device=options.device,
    )
    logger.info(
        "table %s: %d of %d rows (%.1f %%) fit the GPU's cache, %d sets and %d rows of scratch",
        layout.name,
        cache.slots,
        layout.rows,
        100 * min(1.0, cache.slots / max(1, layout.rows)),
        sets,
        scratch,
    )
    return cache


def _scratch_rows(rows: int, decode_ids: int) -> int:
    """Where rows come through the processor, no lookup takes more ids than this, so each of its rows has a place."""
    return max(decode_ids, min(_SCRATCH_ROWS, rows))


def _scratch_bytes(rows: int, stride: int, decode_ids: int) -> int:
    """For two open lookups, in whole windows."""
    windows = 2 * -(-_scratch_rows(rows, decode_ids) // 32)
    return windows * 32 * (device_stride(stride) + _WORD_BYTES)
