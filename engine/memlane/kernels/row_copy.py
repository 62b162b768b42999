"""Launches the copy of rows that a lookup missed. How much is in flight is decided here.

A link with b bytes a second and a latency of t seconds is busy only while b * t bytes are asked for: 55 GB/s * 2 us =
110 KB on PCIe 5, and for the latency to grow under load several times that. A program of 4 warps asks for a tile of 8 KiB
at once (four vectors of 16 bytes a thread) and waits for it before the next, so that on average it has half a tile to a
whole one in flight:

    128 programs * 8 KiB = 1 MiB asked for, at least 512 KiB in flight; less only where there are fewer rows

and 128 programs are one on almost every multiprocessor of a large GPU, and fit a small one too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlane.kernels.aot import Compilation
from memlane.kernels.jit import row_copy as jit
from memlane.kernels.row_memory import ALIGNMENT, RowMemory

__all__ = ["AOT", "copy_rows"]

_PROGRAMS = 128
_WARPS = 4
_TILE = 8 << 10  # bytes
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # bytes of an element


class _Shape(NamedTuple):
    """How rows are cut: the meaning of each is at the kernel's parameters, in elements of `unit` bytes."""

    unit: int
    source_stride: int
    dest_stride: int
    length: int
    shifted: bool
    pieces: int
    piece: int
    rows: int


def copy_rows(
    source: RowMemory, source_rows: Tensor, dest: RowMemory, dest_slots: Tensor, count: Tensor
) -> None:
    """Row source_rows[i] of source into row dest_slots[i] of dest, for i < count.

    source may be the host's memory if that is pinned. source_rows: int64 [most]. dest_slots: int32 [most], each once.
    count: int64 [1], on the device, at most `most`. A row's bytes may be padded on either side; the shorter stride is
    copied. ValueError where memory does not start on 16 bytes.
    """
    if not len(source_rows):
        return
    for memory in (source, dest):
        if memory.data.data_ptr() % ALIGNMENT:
            raise ValueError(f"rows of a {memory.row_format} table do not start on {ALIGNMENT} bytes")
    shape = _shape(source.data.shape[1], dest.data.shape[1])
    items = -(-len(source_rows) // shape.rows) * shape.pieces
    dtype = _UNITS[shape.unit]
    jit.copy_rows[(min(_PROGRAMS, items),)](
        _as_units(source.data, dtype),
        source_rows,
        _as_units(dest.data, dtype),
        dest_slots,
        count,
        **_constants(shape),
        num_warps=_WARPS,
    )


def _shape(source_stride: int, dest_stride: int) -> _Shape:
    """Strides in bytes."""
    whole = source_stride % ALIGNMENT == 0 and dest_stride % ALIGNMENT == 0
    unit = 4 if whole else 1 if source_stride % 2 or dest_stride % 2 else 2
    length = min(source_stride, dest_stride)
    window = length if whole else length + 2 * ALIGNMENT - 2 * unit  # up to so much is read of a shifted row
    piece = max(ALIGNMENT, 1 << (window - 1).bit_length())
    # A piece of a power of two reaches past most rows. Smaller ones waste less, down to what one warp reads at once.
    while piece > 2048 or (piece > 512 and -(-window // piece) * piece > window * 9 // 8):
        piece //= 2
    return _Shape(
        unit,
        source_stride // unit,
        dest_stride // unit,
        length // unit,
        not whole,
        -(-window // piece),
        piece // unit,
        _TILE // piece,
    )


def _as_units(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.view(-1).view(dtype)


def _constants(shape: _Shape) -> dict[str, int]:
    return {
        "SOURCE_STRIDE": shape.source_stride,
        "DEST_STRIDE": shape.dest_stride,
        "LENGTH": shape.length,
        "VECTOR": ALIGNMENT // shape.unit,
        "SHIFTED": shape.shifted,
        "PIECES": shape.pieces,
        "PIECE": shape.piece,
        "ROWS": shape.rows,
    }


def _compilations() -> list[Compilation]:
    """Rows of 1,024 columns: bf16, int8 and int4 as files hold them, and one of an odd number of bytes."""
    pointers = {4: "*i32", 2: "*i16", 1: "*u8"}
    found = []
    for source, dest in ((2048, 2048), (1040, 1040), (1026, 1040), (514, 528), (67, 80)):
        shape = _shape(source, dest)
        signature = {
            "source": pointers[shape.unit],
            "source_rows": "*i64",
            "dest": pointers[shape.unit],
            "dest_slots": "*i32",
            "count": "*i64",
        }
        name = f"copy of rows of {source} bytes into {dest}"
        found.append(Compilation(name, jit.copy_rows, signature, _constants(shape), _WARPS))
    return found


AOT = _compilations()
