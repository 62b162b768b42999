"""A record of which rows were asked for, in their order: written while serving, read to choose a cache.

magic | header: one line of JSON | block | block | ...

header   version, model, tables: name, rows, row_bytes, cache_bytes (of the cache it had; null: it lay in RAM)
block    stored length u32 | unpacked length u32 | CRC-32 of what is stored u32 | zlib
           unpacked:  records u32 | their table numbers u32 each | their counts u32 each | ids
           ids:       all first bytes, all second bytes, all third, all fourth (of u32, lowest first)

A record is one lookup: the ids of one batch of one table. All numbers are little-endian. Ids are stored byte by byte
because their upper bytes are alike: that takes 16 % off the file and 20 % off the time. A process that is killed loses
the block it was filling, and may leave half of one behind, which the reader leaves out.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlane.tables.cache import Ids
from memlane.tables.errors import TableError

__all__ = ["Record", "RowRecorder", "Trace", "TraceFormatError", "TracedTable", "read_trace"]

logger = logging.getLogger(__name__)

MAGIC = b"memlane rows\n"
_VERSION = 1
_BLOCK = struct.Struct("<III")
_BLOCK_IDS = 65_536  # ids in a block: packing them takes some milliseconds, in which a step waits
_BLOCK_SECONDS = 5.0  # a block older than this is written at the next record
_LEVEL = 1
_LONGEST_HEADER = 1 << 20
_MOST_ROWS = 1 << 31


class TraceFormatError(TableError):
    """The file is no record of rows, or of a version that is not known."""


@dataclass(frozen=True)
class TracedTable:
    """A table whose lookups are recorded. cache_bytes: of the row cache it was served with, None where it lay in RAM."""

    name: str
    rows: int
    row_bytes: int
    cache_bytes: int | None = None

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class Record(NamedTuple):
    """One lookup: the number of its table among the trace's, and its ids as they were asked for."""

    table: int
    ids: NDArray[np.uint32]


class RowRecorder:
    """Writes lookups to a new file, up to a limit of bytes. One thread at a time, as the tables it records.

    Nothing that goes wrong with the file after it was made reaches the caller: recording ends with one warning.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tables: Sequence[TracedTable],
        *,
        model: str = "",
        limit: int = 1 << 30,
    ) -> None:
        """Makes the file and writes its header. FileExistsError if there is one already; OSError."""
        self.path = Path(path)
        self.tables = tuple(tables)
        self._limit = limit
        header = {"version": _VERSION, "model": model, "tables": [asdict(table) for table in tables]}
        text = MAGIC + json.dumps(header).encode() + b"\n"
        self._file: io.BufferedWriter | None = self.path.open("xb")
        self._written = len(text)
        self._begin_block()
        self._write(text)

    @property
    def recording(self) -> bool:
        """Whether lookups are still written: not after close, the limit, or a failure."""
        return self._file is not None

    def of(self, table: str) -> Callable[[Ids], None]:
        """What to call with the ids of each lookup of a table."""
        number = [t.name for t in self.tables].index(table)
        return lambda ids: self.record(number, ids)

    def record(self, table: int, ids: Ids) -> None:
        """One lookup, ids [n] inside the table. They are copied. Never raises over the file."""
        if self._file is None or not len(ids):
            return
        now = time.monotonic()
        if not self._ids:
            self._begun = now
        self._numbers.append(table)
        self._ids.append(ids.astype("<u4"))
        self._count += len(ids)
        if self._count >= _BLOCK_IDS or now - self._begun > _BLOCK_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was recorded so far."""
        if self._file is None or not self._ids:
            return
        block = _pack(self._numbers, self._ids)
        self._begin_block()
        if self._written + len(block) > self._limit:
            logger.warning(
                "recording rows ends: %s has reached its limit of %d bytes", self.path, self._limit
            )
            self._end()
            return
        self._written += len(block)
        self._write(block)

    def close(self) -> None:
        """Write the rest and close the file. Idempotent."""
        self.flush()
        self._end()

    def _begin_block(self) -> None:
        self._numbers: list[int] = []
        self._ids: list[NDArray[np.uint32]] = []
        self._count = 0
        self._begun = 0.0

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
            self._file.flush()  # what lies in a buffer of ours is lost when the process is killed
        except OSError as error:
            logger.warning("recording rows ends: %s: %s", self.path, error.strerror)
            self._end()

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # it would write again what it could not write before
                file.close()


def _pack(numbers: list[int], ids: list[NDArray[np.uint32]]) -> bytes:
    flat = np.concatenate(ids)
    heads = np.array([len(numbers), *numbers, *map(len, ids)], "<u4")
    unpacked = heads.tobytes() + flat.view(np.uint8).reshape(-1, 4).T.tobytes()
    stored = zlib.compress(unpacked, _LEVEL)
    return _BLOCK.pack(len(stored), len(unpacked), zlib.crc32(stored)) + stored


class Trace:
    """A record of rows in a file. Iterating reads it from the beginning, a block in memory at a time; any number of times.

    torn: what was left out at the end, in words; None if nothing was. Known once an iteration has come to the end.
    """

    def __init__(self, path: Path, model: str, tables: Sequence[TracedTable], begin: int) -> None:
        """Use read_trace."""
        self.path = path
        self.model = model
        self.tables = tuple(tables)
        self.torn: str | None = None
        self._begin = begin

    def __iter__(self) -> Iterator[Record]:
        """All records in their order. OSError if the file cannot be read."""
        with self.path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            at = file.seek(self._begin)
            while at < size:
                records = self._block(file.read(_BLOCK.size), file)
                if records is None:
                    self.torn = f"the last {size - at} of {size} bytes are not a whole block and are left out"
                    return
                yield from records
                at = file.tell()
        self.torn = None

    def _block(self, head: bytes, file: io.BufferedReader) -> list[Record] | None:
        """The records of a block, or None if it is not whole."""
        if len(head) < _BLOCK.size:
            return None
        length, unpacked_length, crc = _BLOCK.unpack(head)
        stored = file.read(length)
        if len(stored) < length or zlib.crc32(stored) != crc:
            return None
        try:
            unpacked = zlib.decompressobj().decompress(stored, unpacked_length + 1)
        except zlib.error:
            return None
        return self._records(unpacked) if len(unpacked) == unpacked_length else None

    def _records(self, unpacked: bytes) -> list[Record] | None:
        words = np.frombuffer(unpacked[: len(unpacked) // 4 * 4], "<u4")
        records = int(words[0]) if len(words) else 0
        numbers, counts = words[1 : 1 + records], words[1 + records : 1 + 2 * records].astype(np.int64)
        if len(counts) != records or len(unpacked) != 4 * (1 + 2 * records + int(counts.sum())):
            return None
        planes = np.frombuffer(unpacked, np.uint8, offset=4 * (1 + 2 * records)).reshape(4, -1)
        flat = np.ascontiguousarray(planes.T).reshape(-1).view("<u4").astype(np.uint32, copy=False)
        found = []
        for number, ids in zip(numbers.tolist(), np.split(flat, np.cumsum(counts)[:-1]), strict=True):
            if number >= len(self.tables) or (len(ids) and int(ids.max()) >= self.tables[number].rows):
                return None
            found.append(Record(number, ids))
        return found


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """The record in a file. TraceFormatError if it is none; OSError if it cannot be read."""
    path = Path(path)
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise TraceFormatError(f"{path}: not a record of rows")
        line = file.readline(_LONGEST_HEADER)
        begin = file.tell()
    try:
        header = json.loads(line)
        version = header["version"]
        tables = [_table(entry) for entry in header["tables"]] if version == _VERSION else []
        model = str(header["model"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TraceFormatError(f"{path}: its header is malformed") from None
    if version != _VERSION:
        raise TraceFormatError(f"{path}: is of version {version}; this program reads version {_VERSION}")
    return Trace(path, model, tables, begin)


def _table(entry: dict[str, Any]) -> TracedTable:
    table = TracedTable(**entry)
    numbers = (table.rows, table.row_bytes, table.cache_bytes or 0)
    if not isinstance(table.name, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("malformed")
    if table.rows >= _MOST_ROWS or table.row_bytes == 0:
        raise ValueError("malformed")
    return table
