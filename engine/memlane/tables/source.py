"""Where rows come from when they are not cached: a file, or memory. It does not know who caches them."""

from __future__ import annotations

import errno
import logging
import os
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from memlane.native import Arena, RowReader
from memlane.tables.errors import RowReadError, TableError, TableFormatError
from memlane.tables.layout import TableLayout

__all__ = ["FileIO", "FileSource", "RamSource", "RowSource"]

logger = logging.getLogger(__name__)

FileIO = Literal["auto", "direct", "buffered"]


class RowSource(Protocol):
    """Fills rows into a caller-owned arena. One thread at a time, except for the counters."""

    def read(self, rows: NDArray[np.int64], out: Arena, slots: NDArray[np.int32]) -> None:
        """Puts row rows[i] at byte slots[i] * stride of `out`. Rows are ascending and unique; an empty batch is fine.

        Raises RowReadError naming every row that failed; the others have been delivered. Never delivers zeros or
        half a row in place of an error.
        """

    @property
    def backend(self) -> str:
        """How rows are read, in a word or two, for logs and metrics."""

    @property
    def bytes_read(self) -> int: ...

    @property
    def reads(self) -> int: ...

    @property
    def retries(self) -> int: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def scratch_bytes(self) -> int:
        """Memory the source holds for itself."""

    def close(self) -> None: ...


class FileSource:
    """Rows of a file: io_uring and O_DIRECT where the system allows them, else threads and buffered reads.

    io: "direct" insists on O_DIRECT (TableError where refused), "buffered" does without, "auto" tries. Buffered
    reads give their pages back to the system at once, so no way of reading fills memory behind our back.
    """

    def __init__(
        self,
        layout: TableLayout,
        *,
        io: FileIO = "auto",
        allow_uring: bool = True,
        depth: int = 128,
        merge_gap: int = 4096,
    ) -> None:
        """Opens the file and tries the ways of reading. OSError, TableFormatError (file too short), TableError."""
        self._layout = layout
        try:
            reader = RowReader(
                os.fspath(layout.path),
                layout.offset,
                layout.stride,
                layout.rows,
                allow_uring=allow_uring,
                allow_direct=io != "buffered",
                depth=depth,
                merge_gap=merge_gap,
            )
        except ValueError as error:
            raise TableFormatError(f"table {layout.name!r}: {error}") from None
        except RuntimeError as error:
            raise TableError(f"table {layout.name!r}: {error}") from None
        if io == "direct" and not reader.backend.endswith("+direct"):
            raise TableError(
                f"table {layout.name!r}: direct reads were asked for and refused ({reader.reason})"
            )
        self._reader: RowReader | None = reader
        self._backend = reader.backend
        self._totals = (0, 0, 0)  # counters once closed
        why = f" ({reader.reason})" if reader.reason else ""
        logger.info("table %s: rows are read by %s%s", layout.name, reader.backend, why)

    @property
    def _open(self) -> RowReader:
        if self._reader is None:
            raise TableError(f"table {self._layout.name!r} is closed")
        return self._reader

    def read(self, rows: NDArray[np.int64], out: Arena, slots: NDArray[np.int32]) -> None:
        try:
            positions, errors = self._open.read(rows, slots, out)
        except RuntimeError as error:  # the ring itself failed: nothing of this batch can be trusted
            raise RowReadError(self._layout.name, rows.tolist(), str(error)) from None
        if len(positions):
            bad = rows[positions]
            raise RowReadError(self._layout.name, bad.tolist(), self._reason(int(bad[0]), int(errors[0])))

    def _reason(self, row: int, error: int) -> str:
        at = self._layout.offset + row * self._layout.stride
        what = (
            f"{os.strerror(error)} ({errno.errorcode.get(error, error)})"
            if error
            else "the file ends before it"
        )
        # The name alone: the reason reaches clients, whom the path does not concern.
        return f"{self._layout.path.name}: row {row} at byte {at}: {what}"

    def inject_fault(self, first: int, last: int, error: int, times: int) -> None:
        """For tests: the next `times` reads of rows [first, last] fail with errno `error` (0: the file ends there)."""
        self._open.inject_fault(first, last, error, times)

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def bytes_read(self) -> int:
        return self._totals[0] if self._reader is None else self._reader.bytes_read

    @property
    def reads(self) -> int:
        return self._totals[1] if self._reader is None else self._reader.reads

    @property
    def retries(self) -> int:
        return self._totals[2] if self._reader is None else self._reader.retries

    @property
    def in_flight(self) -> int:
        return 0 if self._reader is None else self._reader.in_flight

    @property
    def scratch_bytes(self) -> int:
        return 0 if self._reader is None else self._reader.scratch_bytes

    def close(self) -> None:
        """Closes the file and frees its read buffers; the counters stay. Idempotent."""
        self._totals = (self.bytes_read, self.reads, self.retries)
        self._reader = None


class RamSource:
    """Rows of a byte matrix [rows, stride] in memory: the obvious source, and the twin FileSource is tested against."""

    backend = "ram"
    retries = 0
    in_flight = 0
    scratch_bytes = 0

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        self._rows = rows
        self.bytes_read = 0
        self.reads = 0

    def read(self, rows: NDArray[np.int64], out: Arena, slots: NDArray[np.int32]) -> None:
        stride = self._rows.shape[1]
        memory = out.array()
        target = memory[: len(memory) // stride * stride].reshape(-1, stride)
        target[slots] = self._rows[rows]
        self.bytes_read += len(rows) * stride
        self.reads += len(rows)

    def close(self) -> None:
        """Nothing to give back."""
