"""Rows of a table as kernels read them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ALIGNMENT", "RowMemory", "device_stride", "without_rows"]

ALIGNMENT = 16  # bytes: what one thread loads at once


class RowMemory(NamedTuple):
    """Rows in one piece of memory that the device can read in place: its own, or the host's if that is pinned.

    data: uint8 [rows, stride], contiguous; a row's bytes are those of `memlane.tables.layout`, then padding.
    row_format: a name of that module's RowFormat. width: numbers in a row.
    """

    data: Tensor
    row_format: str
    width: int


def without_rows(memory: RowMemory) -> RowMemory:
    """The same with no rows, and no hold on the memory they lay in."""
    return memory._replace(data=memory.data.new_empty(0, memory.data.shape[1]))


def device_stride(stride: int) -> int:
    """Bytes from one row to the next where rows of `stride` bytes are laid out for a GPU: whole vector loads."""
    return -(-stride // ALIGNMENT) * ALIGNMENT
