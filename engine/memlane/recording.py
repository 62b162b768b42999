"""Recording which rows are asked for (`--record-rows`): from options to a recorder on the model's tables."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from memlane.config import EngineConfig, parse_bytes
from memlane.errors import ConfigError
from memlane.models.loading import LoadedModel
from memlane.tables.trace import RowRecorder, TracedTable

__all__ = ["check", "start"]

logger = logging.getLogger(__name__)


def check(config: EngineConfig) -> None:
    """Refuse a file that cannot be made or is there already, before anything is loaded. Raises ConfigError."""
    if config.record_rows is None:
        return
    path = Path(config.record_rows)
    if path.exists() or path.is_symlink():
        raise _refusal(path, errno.EEXIST)
    if not path.parent.is_dir():
        raise _refusal(path, errno.ENOENT)
    if not os.access(path.parent, os.W_OK):
        raise _refusal(path, errno.EACCES)


def start(config: EngineConfig, model: LoadedModel) -> RowRecorder | None:
    """Record the lookups of all tables from now on, if that is asked for. The caller closes the recorder.

    Raises ConfigError if the file cannot be made.
    """
    if config.record_rows is None:
        return None
    found = [(table, table.tiers()[-1]) for table in model.tables.values()]
    traced = [
        TracedTable(s.name, t.rows, s.row_bytes, s.capacity_bytes if s.placement == "disk" else None)
        for t, s in found
    ]
    limit = parse_bytes(config.record_rows_limit, option="record_rows_limit")
    path = Path(config.record_rows)
    try:
        recorder = RowRecorder(path, traced, model=model.directory.name, limit=limit)
    except OSError as error:
        raise _refusal(path, error.errno) from error
    for table, _ in found:
        table.recorder = recorder.of(table.name)
    logger.info("rows asked for are recorded in %s, up to %s", path, config.record_rows_limit)
    return recorder


def _refusal(path: Path, error: int | None) -> ConfigError:
    if error == errno.EEXIST:
        return ConfigError(f"record_rows: {path} exists already; nothing is overwritten")
    return ConfigError(f"record_rows: {path}: {os.strerror(error or errno.EIO)}")
