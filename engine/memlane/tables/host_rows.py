"""A whole table in host memory: this process's own, or shared with others; read by the CPU, or in place by a GPU.

file    | row 0 | row 1 | row 2 | ...                  as stored, `layout.stride` bytes each
memory  | row 0 |...| row 1 |...| row 2 |...| ...      `stride` bytes each: as stored, or with zeros after each
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from memlane.kernels import RowMemory
from memlane.native import Arena, SlotStates
from memlane.tables.errors import TableError
from memlane.tables.layout import TableLayout
from memlane.tables.pinning import PIECE_BYTES, PinnedRange, Register, Unregister
from memlane.tables.progress import Progress
from memlane.tables.shared_memory import SHM, SharedMemory
from memlane.tables.source import FileSource, Read, SlotMemory

__all__ = ["HostRows", "Piece", "load_rows", "row_pieces"]

_LOAD_BYTES = 64 << 20  # read at once


class HostRows:
    """The rows of a table, all in host memory. A context manager; one thread opens, pins and closes it.

    arena: the memory, row i at i * stride. loaded: False where another process had loaded it.
    """

    def __init__(
        self,
        layout: TableLayout,
        source: FileSource,
        *,
        stride: int | None = None,
        shared: bool = False,
        directory: Path = SHM,
    ) -> None:
        """Reads all rows from `source` now, unless they are shared and there already.

        stride: bytes from one row to the next [as stored]; `kernels.device_stride` of it for a GPU. shared: in a file
        of `directory`, one copy for all processes that ask for the same; the first loads it, the others wait.
        RowReadError (part of it cannot be read), MemoryError, TableError (no room for shared memory; the file changed
        while it was read).
        """
        self.layout = layout
        self.stride = layout.stride if stride is None else stride
        if self.stride < layout.stride:
            raise ValueError(f"rows of {layout.stride} bytes do not fit a stride of {self.stride}")
        self._shared: SharedMemory | None = None
        self._pinned: PinnedRange | None = None
        nbytes = layout.rows * self.stride
        if shared:
            self._shared = SharedMemory(
                _key(layout, self.stride, source.verifies), nbytes, lambda arena: self._fill(arena, source),
                f"table {layout.name}", directory,
            )  # fmt: skip
            self.arena, self.loaded = self._shared.arena, self._shared.filled
        else:
            self.arena, self.loaded = Arena(nbytes), True
            load_rows(layout, source, self.arena, self.stride)

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes

    @property
    def shared(self) -> bool:
        return self._shared is not None

    @property
    def pinned(self) -> bool:
        return self._pinned is not None

    @property
    def memory(self) -> RowMemory:
        """The rows as kernels take them: a CPU tensor [rows, stride] over this memory, to be read only."""
        rows = torch.from_numpy(self.arena.array()).view(self.layout.rows, self.stride)
        return RowMemory(rows, self.layout.dtype.value, self.layout.width)

    def pin(
        self,
        device: torch.device | str | int | None = None,
        *,
        register: Register | None = None,
        unregister: Unregister | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """Lets GPUs read the rows in place, until `close`. As PinnedRange has it; once pinned, nothing more is done."""
        if self._pinned is None:
            self._pinned = PinnedRange.of_arena(
                self.arena,
                what=f"table {self.layout.name}",
                device=device,
                register=register,
                unregister=unregister,
                piece_bytes=piece_bytes,
            )

    def close(self) -> None:
        """Unpins the rows and gives the memory up once no array of it is left. Idempotent."""
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None
        self.arena = Arena(0)
        if self._shared is not None:
            self._shared.close()

    def __enter__(self) -> HostRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, arena: Arena, source: FileSource) -> None:
        before = _identity(self.layout)
        load_rows(self.layout, source, arena, self.stride)
        if _identity(self.layout) != before:
            raise TableError(f"table {self.layout.name!r}: {self.layout.path} changed while it was read")


def load_rows(layout: TableLayout, source: FileSource, arena: Arena, stride: int) -> None:
    """The whole table into `arena`. RowReadError. With padding the bytes between rows are left as they are."""
    what = "loaded into RAM"
    if stride == layout.stride:
        for _ in _pieces(layout, source, what, [SlotMemory(arena, SlotStates(layout.rows))]):
            pass
        return
    padded = arena.array().reshape(layout.rows, stride)
    for piece in row_pieces(layout, source, what):
        padded[piece.begin : piece.begin + len(piece.rows), : layout.stride] = piece.rows


class Piece(NamedTuple):
    """Rows from `begin` on: uint8 [n, stride], as stored."""

    begin: int
    rows: NDArray[np.uint8]


def row_pieces(layout: TableLayout, source: FileSource, what: str) -> Iterator[Piece]:
    """The whole table in pieces of some megabytes, each valid until the next is asked for. RowReadError.

    what: is done with them, for the log.
    """
    most = min(layout.rows, _rows_at_once(layout))
    return _pieces(layout, source, what, [SlotMemory.of(most, layout.stride) for _ in range(2)])


def _pieces(
    layout: TableLayout, source: FileSource, what: str, memories: Sequence[SlotMemory]
) -> Iterator[Piece]:
    """One piece is read while the one before is used. They take turns in two memories, or lie one after another in one
    that holds the whole table."""
    progress = Progress(f"table {layout.name}", what, layout.nbytes)
    step = _rows_at_once(layout)

    def start(number: int) -> _Coming:
        begin = number * step
        rows = np.arange(begin, min(begin + step, layout.rows), dtype=np.int64)
        memory = memories[number % len(memories)]
        first = begin if len(memories) == 1 else 0
        slots = (rows - begin + first).astype(np.int32)
        read = source.start(rows, slots, memory)
        at = memory.arena.array()[first * layout.stride : (first + len(rows)) * layout.stride]
        return _Coming(Piece(begin, at.reshape(len(rows), layout.stride)), read)

    try:
        coming = start(0) if layout.rows else None
        for number in range(1, 1 + -(-layout.rows // step)):
            assert coming is not None
            piece, read = coming
            coming = start(number) if number * step < layout.rows else None
            read.finish()
            progress.advance(len(piece.rows) * layout.stride)
            yield piece
    except BaseException:
        source.drain()  # what is on its way must not arrive in memory that is given up
        raise
    progress.finish()


class _Coming(NamedTuple):
    """A piece that is being read."""

    piece: Piece
    read: Read


def _rows_at_once(layout: TableLayout) -> int:
    return max(1, _LOAD_BYTES // layout.stride)


def _identity(layout: TableLayout) -> tuple[int, int]:
    status = layout.path.stat()
    return status.st_size, status.st_mtime_ns


def _key(layout: TableLayout, stride: int, verified: bool) -> str:
    """All that the bytes in memory depend on, as 32 hexadecimal digits."""
    where = (os.path.realpath(layout.path), *_identity(layout), layout.name, layout.offset)
    form = (layout.rows, layout.width, layout.dtype.value, layout.stride, stride, verified)
    return hashlib.sha256(repr((where, form)).encode()).hexdigest()[:32]
