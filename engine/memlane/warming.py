"""Warm starts: which rows a cache begins with, loading them beside the serving, and remembering them for next time."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memlane.checkpoints.cache import cache_root
from memlane.config import EngineConfig, parse_bytes
from memlane.errors import CheckpointError
from memlane.models.loading import LoadedModel
from memlane.tables import ValueTable

__all__ = ["WarmStart"]

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 300.0  # between two saves while the engine is idle
_FORGET_SECONDS = 90 * 24 * 3600.0

Rows = NDArray[np.int64]


class WarmStart:
    """Warms the tables of one model, and keeps what their caches hold for the next start.

    The state of a cache is a .npy file of row ids, the one to be kept longest first, in the cache directory. It
    belongs to one table file: another file, or one that was changed, has a state of its own.
    """

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        """Begins to warm every table on disk; with `warm_wait`, does all of it now. Raises CheckpointError."""
        self._tables = [t.on_disk for t in model.tables.values() if t.on_disk is not None]
        # Named now: at the end another file may lie where the table's did.
        self._states = {table.name: _state_path(table) for table in self._tables}
        self._wanted = config.warm_start
        self._saved = time.monotonic()
        self._calls_saved = self._calls()  # steps that warmed a GPU up are no use of a cache
        for table in self._tables:
            self._begin(table, config, model)
        if config.warm_wait:
            while self.advance(1.0):
                pass

    def advance(self, patience: float) -> bool:
        """Goes on warming, waiting at most `patience` seconds; whether there is more to do."""
        left = [table.warm_some(patience) for table in self._tables]
        return any(left)

    def save_now_and_then(self) -> None:
        """Saves the caches' state if the last time was long ago and they were used since. For idle moments."""
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Saves what the caches hold. Where that fails it is logged, and the next start is a colder one."""
        self._saved = time.monotonic()
        calls = self._calls()
        if self._wanted == "off" or calls == self._calls_saved:
            return
        self._calls_saved = calls
        for table in self._tables:
            path = self._states[table.name]
            try:
                _write(path, _npy(table.ranking().astype("<u4")))
                _forget_old_states(path.parent)
            except OSError as error:
                logger.warning("table %s: what its cache held is not saved: %s", table.name, error)

    def _calls(self) -> int:
        return sum(table.stats().calls for table in self._tables)

    def _begin(self, table: ValueTable, config: EngineConfig, model: LoadedModel) -> None:
        hot = model.hot_rows.get(table.name)
        slots = table.stats().cache_slots
        share = parse_bytes(config.pin_rows, whole=slots * table.layout.stride, option="pin_rows")
        pins = min(slots, share // table.layout.stride)
        first: Rows = np.empty(0, np.int64)
        if hot is not None and (pins or self._wanted in ("auto", "hot-rows")):
            first = _read_hot_rows(hot, table.rows, slots)
            pins = min(pins, len(first))
        elif pins:
            logger.warning("table %s: has no hot_rows to pin", table.name)
            pins = 0
        saved = (
            _read_state(self._states[table.name], table.rows) if self._wanted in ("auto", "saved") else None
        )
        if self._wanted == "off":
            ids, why = first[:pins], "the rows to be pinned"
        elif saved is not None:
            ids, why = np.concatenate([first[:pins], saved]), "what the cache held last time"
        else:
            ids, why = first, "hot_rows"
        if len(ids):
            logger.info("table %s: its cache is warmed by %s", table.name, why)
            table.start_warming(ids, pins)


def _state_path(table: ValueTable) -> Path:
    path = table.layout.path.resolve()
    stat = path.stat()
    digest = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{table.name}".encode())
    return cache_root() / "warm" / f"{table.name}-{digest.hexdigest()[:16]}.npy"


def _npy(ids: NDArray[np.uint32]) -> bytes:
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    """All or nothing. OSError, which leaves no part of it behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _forget_old_states(directory: Path) -> None:
    """States of tables that nobody has served for months, or that have become other files since."""
    for path in directory.glob("*.npy"):
        if time.time() - path.stat().st_mtime > _FORGET_SECONDS:
            path.unlink(missing_ok=True)


def _read_state(path: Path, rows: int) -> Rows | None:
    """Row ids saved by an earlier run, or None; a damaged file is as good as none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("what the cache held last time cannot be read: %s", error)
        return None
    # Compared with what would have been written: np.load fails on foreign bytes in more ways than can be listed.
    overhead = len(_npy(np.empty(0, "<u4")))
    ids = np.frombuffer(content[overhead : overhead + (len(content) - overhead) // 4 * 4], "<u4")
    if _npy(ids) != content or (len(ids) and int(ids.max()) >= rows):
        logger.warning("%s does not hold rows of this table: what the cache held is not known", path)
        return None
    rows_by_rank: Rows = ids.astype(np.int64)
    return rows_by_rank


def _read_hot_rows(path: Path, rows: int, most: int) -> Rows:
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
        ids = np.array(mapped[:most])
    except (OSError, ValueError, EOFError, IndexError, SyntaxError, TypeError, KeyError) as error:
        raise CheckpointError(path, f"is not a .npy file of row ids: {error}") from error
    if ids.ndim != 1 or ids.dtype != np.int64 or (len(ids) and not 0 <= ids.min() <= ids.max() < rows):
        raise CheckpointError(path, f"does not hold int64 row ids of a table of {rows} rows")
    return ids
