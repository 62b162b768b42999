"""What a read costs on the device that a file lies on, measured briefly and remembered.

    seconds of a batch = reads * read_seconds + bytes * byte_seconds         many reads in flight

So a gap between two wanted rows is worth reading through while it has fewer than read_seconds / byte_seconds bytes.
The denser a batch, the more of its reads join; one that touches every such gap of the table streams it whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from memlane.native import Arena, RowReader, SlotStates
from memlane.tables.layout import PAGE, TableLayout
from memlane.tables.source import MERGE_GAP, FileIO

__all__ = ["DeviceSpeed", "device_speed", "measure"]

logger = logging.getLogger(__name__)

_WORTH_MEASURING = 64 << 20  # bytes of a table: smaller ones are read in little time whatever the device
_LONG_READ = 512 << 10
_ROUNDS = 3
_SHORT_READS, _LONG_READS = 256, 16  # a round
_LARGEST_GAP = 256 << 10  # half of the longest read


class DeviceSpeed(NamedTuple):
    """Seconds that a read costs beside its bytes, and that each of its bytes costs, with many reads in flight."""

    read_seconds: float
    byte_seconds: float

    @property
    def merge_gap(self) -> int:
        """Bytes between two rows up to which one read of both is quicker than two."""
        if self.byte_seconds <= 0:
            return _LARGEST_GAP
        return int(min(max(self.read_seconds / self.byte_seconds, MERGE_GAP), _LARGEST_GAP)) // PAGE * PAGE

    @property
    def reads_per_second(self) -> float:
        """Of single pages."""
        return 1 / (self.read_seconds + PAGE * self.byte_seconds)

    @property
    def bytes_per_second(self) -> float:
        """Of long reads."""
        return _LONG_READ / (self.read_seconds + _LONG_READ * self.byte_seconds)


def device_speed(layout: TableLayout, remembered: Path, io: FileIO = "auto") -> DeviceSpeed | None:
    """The speed of the device under a table: remembered in a JSON file, else measured now and remembered there.

    None for tables too small to be worth it, or where measuring failed (logged). A file that cannot be read or
    written only means measuring again.
    """
    if layout.nbytes < _WORTH_MEASURING:
        return None
    known = _load(remembered)
    key = f"{os.major(layout.path.stat().st_dev)}:{os.minor(layout.path.stat().st_dev)} {io}"
    if key in known:
        return _told(layout, known[key], f"as measured before, in {remembered}")
    try:
        found = measure(layout.path, io)
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning("table %s: the device could not be measured: %s", layout.name, error)
        return None
    _save(remembered, {**known, key: found})
    return _told(layout, found, "measured now")


def measure(path: Path, io: FileIO = "auto", seed: int | None = None) -> DeviceSpeed:
    """Reads pages and long pieces of a file at random places; takes some tenths of a second on a slow disk.

    Meaningful for files of 64 MiB and more. OSError; RuntimeError or ValueError where the file cannot be read.
    """
    rng = np.random.default_rng(seed)
    page = _seconds_per_read(path, io, PAGE, _SHORT_READS, rng)
    long = _seconds_per_read(path, io, _LONG_READ, _LONG_READS, rng)
    byte = max(0.0, (long - page) / (_LONG_READ - PAGE))
    return DeviceSpeed(max(0.0, page - PAGE * byte), byte)


def _seconds_per_read(path: Path, io: FileIO, size: int, reads: int, rng: np.random.Generator) -> float:
    pieces = path.stat().st_size // size
    reader = RowReader(os.fspath(path), 0, size, pieces, allow_direct=io != "buffered", merge_gap=0)
    count = min(reads, pieces)
    arena, states = Arena(count * size), SlotStates(count)
    seconds = []
    for _ in range(_ROUNDS):
        # No two of them neighbours, which would be joined into one read.
        rows = np.unique(rng.integers(0, max(1, pieces // 2), count)) * 2
        started = time.perf_counter()
        failed, _ = reader.finish(
            reader.start(rows, np.arange(len(rows), dtype=np.int32), arena, states)
        )  # fmt: skip
        seconds.append((time.perf_counter() - started) / len(rows))
        if len(failed):
            raise RuntimeError(f"{len(failed)} of {len(rows)} reads failed")
    return median(seconds)


def _told(layout: TableLayout, speed: DeviceSpeed, how: str) -> DeviceSpeed:
    logger.info(
        "table %s: its device gives %.0f reads/s or %.2f GB/s (%s): gaps up to %d KiB are read through",
        layout.name,
        speed.reads_per_second,
        speed.bytes_per_second / 1e9,
        how,
        speed.merge_gap // 1024,
    )
    return speed


def _load(path: Path) -> dict[str, DeviceSpeed]:
    try:
        found = json.loads(path.read_text())
        return {
            str(key): DeviceSpeed(float(value["read_seconds"]), float(value["byte_seconds"]))
            for key, value in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _save(path: Path, speeds: dict[str, DeviceSpeed]) -> None:
    text = json.dumps({key: speed._asdict() for key, speed in speeds.items()}, indent=1)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        logger.warning("the device's speed cannot be remembered in %s: %s", path, error.strerror)
