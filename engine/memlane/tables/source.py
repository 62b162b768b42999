"""Where rows come from when they are not cached: a file, or memory. It does not know who caches them."""

from __future__ import annotations

import errno
import logging
import os
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from memlane.native import Arena, ReadRequest, RowReader, SlotStates
from memlane.tables.checksums import read_checksums
from memlane.tables.errors import RowReadError, TableError, TableFormatError
from memlane.tables.layout import TableLayout

__all__ = ["FileIO", "FileRead", "FileSource", "RamSource", "Read", "RowSource", "SlotMemory"]

logger = logging.getLogger(__name__)

FileIO = Literal["auto", "direct", "buffered"]

DEADLINE = 30.0  # seconds after which a read counts as failed
MERGE_GAP = 4096  # bytes read rather than starting another read, where the device was not measured


class SlotMemory(NamedTuple):
    """Memory for rows, and for each slot whether its row is there: slot i is `stride` bytes at i * stride."""

    arena: Arena
    states: SlotStates

    @classmethod
    def of(cls, slots: int, stride: int) -> SlotMemory:
        return cls(Arena(slots * stride), SlotStates(slots))


class Read(Protocol):
    """Rows on their way. Dropping it does not stop it: finish it before the slots are used for anything else."""

    @property
    def seconds(self) -> float:
        """From the start to the last row that came so far."""

    def wait(self, patience: float) -> bool:
        """Whether all rows have come or failed; waits at most `patience` seconds for that."""

    def finish(self) -> None:
        """Waits for all rows. RowReadError names every row that failed; the others are there."""


class RowSource(Protocol):
    """Fills rows into slots. One thread at a time, except for the counters."""

    def start(
        self, rows: NDArray[np.int64], slots: NDArray[np.int32], out: SlotMemory, background: bool = False
    ) -> Read:
        """Begins to put row rows[i] into slot slots[i] of `out` and returns. Rows are ascending and unique, none is fine.

        background: what is asked for later may be read first.
        A row's slot reads `ready` in out.states once its bytes are whole, or `failed`. Never half a row or zeros.
        """

    def drain(self) -> None:
        """Waits for all reads under way, whoever started them."""

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
    def corrupt_pages(self) -> int: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def buffer_bytes(self) -> int:
        """Memory the source holds for itself."""

    def close(self) -> None: ...


class FileRead:
    """Rows on their way from a file. `native` is what kernels need to sum the rows as they come."""

    def __init__(self, source: FileSource, rows: NDArray[np.int64], request: ReadRequest) -> None:
        self._source, self._rows, self._request = source, rows, request

    @property
    def native(self) -> tuple[RowReader, ReadRequest]:
        return self._source.reader, self._request

    @property
    def seconds(self) -> float:
        return self._request.seconds

    def wait(self, patience: float) -> bool:
        return self._source.reader.wait(self._request, patience)

    def finish(self) -> None:
        positions, errors = self._source.reader.finish(self._request)
        if len(positions):
            bad = self._rows[positions]
            raise RowReadError(
                self._source.name, bad.tolist(), self._source.reason(int(bad[0]), int(errors[0]))
            )


class FileSource:
    """Rows of a file: io_uring and O_DIRECT where the system allows them, else threads and buffered reads.

    io: "direct" insists on O_DIRECT (TableError where refused), "buffered" does without, "auto" tries. Buffered
    reads give their pages back to the system at once, so no way of reading fills memory behind our back.
    Each page that is read is compared with its checksum, where the file has them and `verify` is on.
    """

    def __init__(
        self,
        layout: TableLayout,
        *,
        io: FileIO = "auto",
        allow_uring: bool = True,
        depth: int = 256,
        merge_gap: int = MERGE_GAP,
        deadline: float = DEADLINE,
        verify: bool = True,
    ) -> None:
        """Opens the file and tries the ways of reading. OSError, TableFormatError (file too short), TableError.

        depth: reads in flight. merge_gap: unwanted bytes that are read rather than starting another read. deadline:
        seconds that a read may take before its rows count as unreadable.
        """
        self._layout = layout
        checksums = read_checksums(layout) if verify else None
        try:
            reader = RowReader(
                os.fspath(layout.path),
                layout.offset,
                layout.stride,
                layout.rows,
                checksums=checksums,
                allow_uring=allow_uring,
                allow_direct=io != "buffered",
                depth=depth,
                merge_gap=merge_gap,
                deadline=deadline,
            )
        except ValueError as error:
            raise TableFormatError(f"table {layout.name!r}: {error}") from None
        except RuntimeError as error:
            raise TableError(f"table {layout.name!r}: {error}") from None
        if io == "direct" and not reader.direct:
            raise TableError(
                f"table {layout.name!r}: direct reads were asked for and refused ({reader.reason})"
            )
        self._reader: RowReader | None = reader
        self._backend = reader.backend
        self._checksum_bytes = 0 if checksums is None else checksums.nbytes
        self._totals = (0, 0, 0, 0)  # counters once closed
        why = f" ({reader.reason})" if reader.reason else ""
        checked = "checksums verified" if checksums is not None else "no checksums"
        logger.info(
            "table %s: rows are read by %s%s, gaps to %d bytes read through, %s",
            layout.name,
            reader.backend,
            why,
            merge_gap,
            checked,
        )

    @property
    def reader(self) -> RowReader:
        """The native reader. TableError once closed."""
        if self._reader is None:
            raise TableError(f"table {self._layout.name!r} is closed")
        return self._reader

    @property
    def name(self) -> str:
        return self._layout.name

    def start(
        self, rows: NDArray[np.int64], slots: NDArray[np.int32], out: SlotMemory, background: bool = False
    ) -> FileRead:
        return FileRead(self, rows, self.reader.start(rows, slots, out.arena, out.states, background))

    def drain(self) -> None:
        self.reader.drain()

    def read(self, rows: NDArray[np.int64], slots: NDArray[np.int32], out: SlotMemory) -> None:
        """start and finish in one."""
        self.start(rows, slots, out).finish()

    def reason(self, row: int, error: int) -> str:
        """Why a row could not be read, in words; error as the native reader has it."""
        at = self._layout.offset + row * self._layout.stride
        if error == errno.EBADMSG:
            what = "its bytes do not match their checksum"
        elif error:
            what = f"{os.strerror(error)} ({errno.errorcode.get(error, error)})"
        else:
            what = "the file ends before it"
        # The name alone: the reason reaches clients, whom the path does not concern.
        return f"{self._layout.path.name}: row {row} at byte {at}: {what}"

    def inject_fault(self, first: int, last: int, error: int, times: int) -> None:
        """For tests: the next `times` reads of rows [first, last] fail with errno `error`.

        error 0: the file ends there; -1: reads do not end until the fault is cleared (times = 0).
        """
        self.reader.inject_fault(first, last, error, times)

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def verifies(self) -> bool:
        """Whether pages are compared with checksums."""
        return self._checksum_bytes > 0

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
    def corrupt_pages(self) -> int:
        return self._totals[3] if self._reader is None else self._reader.corrupt_pages

    @property
    def in_flight(self) -> int:
        return 0 if self._reader is None else self._reader.in_flight

    @property
    def buffer_bytes(self) -> int:
        return 0 if self._reader is None else self._reader.buffer_bytes + self._checksum_bytes

    @property
    def page_cache_bytes(self) -> int:
        """Bytes of the file that the system's page cache holds; -1 where it cannot be asked (Linux before 6.5)."""
        return 0 if self._reader is None else self._reader.page_cache_bytes

    def close(self) -> None:
        """Closes the file and frees its read buffers; the counters stay. Idempotent."""
        self._totals = (self.bytes_read, self.reads, self.retries, self.corrupt_pages)
        self._reader = None


class _Done:
    """Rows that came at once."""

    seconds = 0.0

    def wait(self, patience: float) -> bool:
        return True

    def finish(self) -> None:
        """Nothing to wait for."""


class RamSource:
    """Rows of a byte matrix [rows, stride] in memory: the obvious source, and the twin FileSource is tested against."""

    backend = "ram"
    retries = 0
    corrupt_pages = 0
    in_flight = 0
    buffer_bytes = 0

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        self._rows = rows
        self.bytes_read = 0
        self.reads = 0

    def drain(self) -> None:
        """Nothing is ever under way."""

    def start(
        self, rows: NDArray[np.int64], slots: NDArray[np.int32], out: SlotMemory, background: bool = False
    ) -> Read:
        stride = self._rows.shape[1]
        memory = out.arena.array()
        target = memory[: len(memory) // stride * stride].reshape(-1, stride)
        target[slots] = self._rows[rows]
        self.bytes_read += len(rows) * stride
        self.reads += len(rows)
        return _Done()

    def close(self) -> None:
        """Nothing to give back."""
