"""Reads a whole table once, front to back, and says what is wrong with it. Knows files and blocks; knows no model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memlane.tables.checksums import block_checksums, read_checksums, rows_of_blocks
from memlane.tables.layout import BLOCK, TableLayout

__all__ = ["BadBlocks", "Piece", "RowSpan", "TableScan", "read_through", "scan_table"]

_PIECE_BYTES = 8 << 20  # a whole number of blocks; long enough for any disk to run at its full speed
_EXPONENT = 0x7C  # of an fp16 number, in its second byte: all ones mean infinity or NaN


@dataclass(frozen=True)
class RowSpan:
    """Rows first..last, both included."""

    first: int
    last: int


@dataclass(frozen=True)
class BadBlocks:
    """Neighbouring blocks first..last (both included) with the same defect, and the rows that have bytes in them."""

    first: int
    last: int
    rows: RowSpan
    defect: str


@dataclass(frozen=True)
class TableScan:
    """What one pass over a table found.

    has_checksums: whether its blocks were compared with anything; unreadable blocks are found either way.
    bad_scales: quantised rows whose scale is infinite or not a number.
    """

    has_checksums: bool
    bad_blocks: tuple[BadBlocks, ...]
    bad_scales: tuple[RowSpan, ...]


@dataclass(frozen=True)
class Piece:
    """Bytes begin..begin + len(data) of a stretch of a file; `data` is overwritten by the next piece.

    unreadable: block of the piece -> why; such blocks are zeros in `data`.
    """

    begin: int
    data: NDArray[np.uint8]
    unreadable: dict[int, str]


def scan_table(layout: TableLayout, progress: Callable[[int], object] = lambda nbytes: None) -> TableScan:
    """Compares every block with its checksum and looks at every scale, at disk speed, in a few megabytes of memory.

    progress: told the number of bytes done after each piece. OSError if the file cannot be opened, TableFormatError
    if it lost its checksums meanwhile; blocks that cannot be read are part of the result.
    """
    stored = read_checksums(layout)
    blocks, scales = _Runs(), _Runs()
    for piece in read_through(layout.path, layout.offset, layout.nbytes):
        for block, defect in _bad_blocks(piece, stored):
            blocks.add(block, defect)
        if layout.dtype.is_quantised:
            for row in _bad_scales(piece, layout.stride):
                scales.add(row, "")
        progress(len(piece.data))
    bad_blocks = []
    for first, last, defect in blocks.runs:
        rows = rows_of_blocks(layout, first, last)
        bad_blocks.append(BadBlocks(first, last, RowSpan(rows[0], rows[-1]), defect))
    bad_scales = tuple(RowSpan(first, last) for first, last, _ in scales.runs)
    return TableScan(stored is not None, tuple(bad_blocks), bad_scales)


def read_through(path: Path, offset: int, nbytes: int) -> Iterator[Piece]:
    """The bytes offset..offset + nbytes of a file, read from the disk itself and not kept in the page cache."""
    buffer = np.empty(min(_PIECE_BYTES, nbytes), dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        os.posix_fadvise(
            descriptor, 0, 0, os.POSIX_FADV_DONTNEED
        )  # cached pages would hide what the disk holds
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for begin in range(0, nbytes, _PIECE_BYTES):
            data = buffer[: nbytes - begin]
            unreadable = _fill(descriptor, offset + begin, data)
            os.posix_fadvise(descriptor, offset + begin, len(data), os.POSIX_FADV_DONTNEED)
            yield Piece(begin, data, unreadable)


def _fill(descriptor: int, offset: int, data: NDArray[np.uint8]) -> dict[int, str]:
    """Reads `data` from `offset` on; block by block where that fails, so that one bad sector costs one block."""
    if _read(descriptor, offset, data) is None:
        return {}
    unreadable = {}
    for begin in range(0, len(data), BLOCK):
        block = data[begin : begin + BLOCK]
        defect = _read(descriptor, offset + begin, block)
        if defect is not None:
            block[:] = 0
            unreadable[begin // BLOCK] = defect
    return unreadable


def _read(descriptor: int, offset: int, data: NDArray[np.uint8]) -> str | None:
    """Fills `data`, or says what prevented it."""
    done = 0
    while done < len(data):
        try:
            got = os.preadv(descriptor, [data[done:].data], offset + done)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if got == 0:
            return "cannot be read: the file ends before it"
        done += got
    return None


def _bad_blocks(piece: Piece, stored: NDArray[np.uint32] | None) -> Iterator[tuple[int, str]]:
    """Number of each bad block in the table, ascending, and its defect."""
    first = piece.begin // BLOCK
    bad = dict(piece.unreadable)
    if stored is not None:
        found = block_checksums(piece.data)
        for block in np.flatnonzero(found != stored[first : first + len(found)]).tolist():
            bad.setdefault(block, "differs from its checksum")
    for block in sorted(bad):
        yield first + block, bad[block]


def _bad_scales(piece: Piece, stride: int) -> list[int]:
    """Rows that end in the piece with a scale that is not finite. A row's last byte is its scale's upper one."""
    row = piece.begin // stride
    upper = piece.data[(row + 1) * stride - 1 - piece.begin :: stride]
    bad: list[int] = (np.flatnonzero(upper & _EXPONENT == _EXPONENT) + row).tolist()
    return bad


class _Runs:
    """Ascending numbers, neighbours with the same remark joined."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, str]] = []

    def add(self, number: int, remark: str) -> None:
        if self.runs and self.runs[-1][1:] == (number - 1, remark):
            number_first = self.runs.pop()[0]
            self.runs.append((number_first, number, remark))
        else:
            self.runs.append((number, number, remark))
