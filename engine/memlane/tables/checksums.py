"""CRC32C of a table's blocks: computed while it is written, read back to verify it. Reads checksums, never rows.

table file | header | block 0 | block 1 | ... | last block (shorter) | crc of block 0 | crc of block 1 | ...
                    ^ row 0, on a page: a block is what one page read brings         ^ tensor "<table>.crc32c", U32

Blocks are cut by bytes, not by rows: a block of 4,096 bytes holds parts of several rows, or a part of one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memlane.native import crc32c_blocks
from memlane.tables.errors import TableFormatError
from memlane.tables.layout import BLOCK, TableLayout

__all__ = ["BlockChecksums", "block_checksums", "read_checksums", "rows_of_blocks"]


class BlockChecksums:
    """The checksums of a table whose bytes come in pieces of any size. Holds 4 bytes a block and one unfinished block."""

    def __init__(self) -> None:
        self._finished: list[NDArray[np.uint32]] = []
        self._rest: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def update(self, piece: NDArray[np.uint8]) -> None:
        """Takes the next bytes, uint8 [n], C-contiguous; they are not kept."""
        if len(self._rest):
            missing = BLOCK - len(self._rest)
            block = np.concatenate([self._rest, piece[:missing]])
            piece = piece[missing:]
            if len(block) < BLOCK:
                self._rest = block
                return
            self._finished.append(crc32c_blocks(block, BLOCK))
        whole = len(piece) - len(piece) % BLOCK
        self._finished.append(crc32c_blocks(piece[:whole], BLOCK))
        self._rest = piece[whole:].copy()

    def finish(self) -> NDArray[np.uint32]:
        """uint32 [blocks]: of all bytes taken. Nothing may follow."""
        return np.concatenate([*self._finished, crc32c_blocks(self._rest, BLOCK)])


def block_checksums(data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """uint8 [n], C-contiguous, beginning on a block's border -> the CRC32C of each of its blocks, uint32 [blocks]."""
    return crc32c_blocks(data, BLOCK)


def read_checksums(layout: TableLayout) -> NDArray[np.uint32] | None:
    """The stored checksums, uint32 [layout.blocks], or None where the table's file holds none.

    4 bytes of memory for each 4 KiB of table. TableFormatError if the file has become too short; OSError.
    """
    if layout.checksum_offset is None:
        return None
    with layout.path.open("rb") as file:
        sums = np.fromfile(file, dtype="<u4", count=layout.blocks, offset=layout.checksum_offset)
    if len(sums) != layout.blocks:
        raise TableFormatError(
            f"{layout.path}: truncated: {len(sums)} of {layout.blocks} checksums are there"
        )
    return sums.astype(np.uint32, copy=False)


def rows_of_blocks(layout: TableLayout, first: int, last: int) -> range:
    """The rows that have bytes in blocks first..last, both included."""
    begin, end = first * BLOCK, min((last + 1) * BLOCK, layout.nbytes)
    return range(begin // layout.stride, (end - 1) // layout.stride + 1)
