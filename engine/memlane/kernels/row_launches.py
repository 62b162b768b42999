"""How the kernels over rows are launched: rows as a kernel's constants, and the shape of a launch. Launches nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from memlane.kernels.jit.rows import RowLayout

__all__ = ["UNITS", "Launch", "dot_launch", "gather_launch", "row_layout", "sum_launch"]

# What a row is an array of: its numbers, or bytes of codes.
UNITS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.uint8,
    "int4": torch.uint8,
    "fp8": torch.uint8,
}


def row_layout(row_format: str, width: int, near_stride: int, far_stride: int | None) -> RowLayout:
    """Strides in units. Rows are taken to begin on even addresses if their strides are even."""
    units = width // 2 if row_format == "int4" else width
    scale = "none"
    if UNITS[row_format] is torch.uint8:
        scale = "bytes" if (units | near_stride | (far_stride or 0)) % 2 else "half"
    return RowLayout(row_format, units, near_stride, far_stride or 0, far_stride is not None, scale)


class Launch(NamedTuple):
    programs: int
    constants: dict[str, Any]
    options: dict[str, int]


class _SumShape(NamedTuple):
    most_tokens: float  # the first shape that is enough is taken
    thread_bytes: int  # of a row that one thread loads at once
    rows: int  # asked for at once
    registers: (
        int  # of a thread; the compiler holds back with loads unless it is told that it may use as many
    )
    one_warp: bool  # programs of one warp, so that a token's columns spread over many multiprocessors


# What is under way is what counts: 4.8 TB/s that take about 0.8 us to come are 3.8 MB, 29 KB for each of 132
# multiprocessors. It is  rows asked for * thread_bytes * threads  whose registers fit, however columns are split:
#
#   16 B *  8 rows: 72 registers leave room for 28 warps, which have 112 KB under way: 7 tokens of 2 KiB rows on each
#   16 B * 16 rows: 256 tokens of 2 KiB rows, two on each multiprocessor, have 8 MB under way
#    8 B * 32 rows: 64 such tokens have 4 MB
#    2 B * 64 rows: one token of 1,024 columns is spread over 32 multiprocessors; 128 rows take two turns, not 16
#
# Quantised rows are shorter, and 8 bytes of them at once: 35 to 56 KB a multiprocessor. Splitting columns never touches
# the order of additions.
_SUM_SHAPES = (
    _SumShape(4, 2, 64, 168, True),
    _SumShape(128, 8, 32, 168, True),
    _SumShape(512, 16, 16, 128, False),
    _SumShape(float("inf"), 16, 8, 72, False),
)
_MOST_WARPS = 8
_MOST_UNITS = 8  # of a thread: taking more codes apart keeps more registers busy than their rows do
_MANY_ROWS = 16384  # programs of four rows a thread are then still several for each multiprocessor


def sum_launch(layout: RowLayout, tokens: int, k: int, step: int) -> Launch:
    shape = next(shape for shape in _SUM_SHAPES if tokens <= shape.most_tokens)
    block = _block(layout, shape.thread_bytes, 1 if shape.one_warp else _MOST_WARPS)
    constants = {
        "LAYOUT": layout,
        "K": k,
        "SLOT_STEP": step,
        "BLOCK": block.units,
        "GROUP": min(shape.rows, k),
    }
    options = {"num_warps": block.warps, "maxnreg": shape.registers}
    return Launch(tokens * block.per_row, constants, options)


class _Block(NamedTuple):
    units: int  # of a row, in one program
    warps: int
    per_row: int


def _block(layout: RowLayout, thread_bytes: int, most_warps: int) -> _Block:
    size = UNITS[layout.row_format].itemsize
    of_warp = 32 * min(_MOST_UNITS, max(1, thread_bytes // size))
    warps = 1
    while warps < most_warps and warps * of_warp < layout.units:
        warps *= 2
    return _Block(warps * of_warp, warps, -(-layout.units // (warps * of_warp)))


def gather_launch(layout: RowLayout, n: int, step: int) -> Launch:
    """Four rows a program: what is written is as much as what is read, or more; both take their time side by side."""
    block = _block(layout, 16, _MOST_WARPS)
    constants = {"LAYOUT": layout, "SLOT_STEP": step, "BLOCK": block.units, "GROUP": 4}
    return Launch(-(-n // 4) * block.per_row, constants, {"num_warps": block.warps, "maxnreg": 72})


def dot_launch(layout: RowLayout, tokens: int, k: int, step: int, activate: bool) -> Launch:
    """A program is one warp, whose threads load 16 bytes at once: 16 columns of a row come through 4, 2 or 1 of them.

    Few rows: one a thread, 16 steps of it at once. Many: up to four a thread, which share the reads of x; 8 reads at once.
    """
    size = UNITS[layout.row_format].itemsize
    rows_of_thread = min(4, 2 * size) if tokens * k >= _MANY_ROWS else 1
    rows = rows_of_thread * 32 // size
    constants = {
        "LAYOUT": layout,
        "K": k,
        "SLOT_STEP": step,
        "ROWS": rows,
        "GROUP": max(1, min(16 if rows_of_thread == 1 else 8 // rows_of_thread, layout.units // 16)),
        "ACTIVATE": activate,
    }
    return Launch(tokens * -(-k // rows), constants, {"num_warps": 1, "maxnreg": 128})
