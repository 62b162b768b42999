"""From a checkpoint to a model that can run: dense weights in memory, tables opened where the user wants them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from memlane.checkpoints import open_directory, read_config, resolve, verify
from memlane.checkpoints.directory import DENSE, table_file_name
from memlane.checkpoints.source import Checkpoint
from memlane.errors import CheckpointError, ConfigError
from memlane.models.config import DTYPES, ModelConfig
from memlane.models.transformer import Transformer
from memlane.tables import Table, TableLayout, ValueTable
from memlane.tables.errors import TableError
from memlane.tables.layout import RowFormat
from memlane.tables.table import Placement

__all__ = ["LoadedModel", "load_model", "served_dtype", "table_bytes"]

# Weights that stay fp32 in a bf16 model: those that choose rows (near-ties flip rows), and norm gains, which multiply
# before the cast.
_ALWAYS_FP32 = (
    "memory.keys",
    "memory.query.weight",
    "memory.query.bias",
    "memory.log_score_scale",
    "norm.weight",
)

# Table files up to this size are checked against their checksum at start; larger ones would delay it by minutes.
_VERIFY_BYTES = 256 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. Owns its tables: close it, or use it as a context manager.

    directory: the model directory it was loaded from, where tokenizer files lie.
    """

    config: ModelConfig
    transformer: Transformer
    tables: dict[str, ValueTable]
    directory: Path

    def close(self) -> None:
        """Close all tables."""
        for table in self.tables.values():
            table.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_model(
    path: str | Path,
    *,
    placement: Placement = "host",
    cache_bytes: int = 0,
    dtype: str = "auto",
    warm: bool = True,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Load a checkpoint of any form that `convert` reads; foreign forms are converted once into the cache directory.

    placement: "host" (tables in RAM) or "disk" (read row by row through a cache of `cache_bytes`, divided among the
    tables). dtype: of the dense weights, "auto" for the one the checkpoint names. warm: fill the cache with hot rows.
    Raises CheckpointError naming the file and its defect, ConfigError on options that cannot work.
    """
    directory = resolve(path, tokenizer=tokenizer)
    checkpoint = open_directory(directory)
    config = checkpoint.config
    weights_dtype = _dtype(dtype, config)
    small = [table_file_name(t.name) for t in checkpoint.tables]
    small = [name for name in small if (directory / name).stat().st_size <= _VERIFY_BYTES]
    verify(directory, [DENSE, *small])
    with ExitStack() as opened:
        tables = {}
        for name in config.table_names():
            tables[name] = _open_table(directory, config, name, placement, cache_bytes)
            opened.callback(tables[name].close)
            if warm and placement == "disk" and name in checkpoint.hot_rows:
                _warm(tables[name], checkpoint.hot_rows[name])
        transformer = _build(checkpoint, tables, weights_dtype)
        opened.pop_all()  # loaded: the tables now belong to the LoadedModel
    return LoadedModel(config, transformer, tables, directory)


def table_bytes(directory: Path) -> int:
    """Bytes of all tables of a model directory together, as a cache budget is stated in parts of it."""
    config = read_config(directory)
    memory = config.memory
    return 0 if memory is None else memory.rows * memory.row_bytes * len(config.table_names())


def served_dtype(weight: str, dtype: torch.dtype) -> torch.dtype:
    """What a dense weight is held in by a model of that dtype."""
    return torch.float32 if weight.endswith(_ALWAYS_FP32) else dtype


def _dtype(dtype: str, config: ModelConfig) -> torch.dtype:
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _open_table(
    directory: Path, config: ModelConfig, name: str, placement: Placement, cache_bytes: int
) -> ValueTable:
    """One table with its part of the cache budget: all tables of a model are of one size, so the parts are equal."""
    memory = config.memory
    assert memory is not None
    path = directory / table_file_name(name)
    share = cache_bytes // len(config.table_names())
    try:
        layout = TableLayout.from_safetensors(path, name, RowFormat(memory.row_format), memory.value_dim)
        return ValueTable.open(layout, placement=placement, cache_bytes=share)
    except TableError as error:
        raise CheckpointError(path, str(error)) from error


def _build(checkpoint: Checkpoint, tables: Mapping[str, Table], dtype: torch.dtype) -> Transformer:
    """The model over open tables, its weights read one by one so that no second copy of them is ever whole."""
    with torch.device("meta"):
        model = Transformer(checkpoint.config, tables)
    weights = {}
    for tensor in checkpoint.dense:
        weights[tensor.name] = tensor.load().to(served_dtype(tensor.name, dtype))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def _warm(table: ValueTable, hot_rows: Path) -> None:
    """Fill the cache with the rows that are read most."""
    slots = table.stats().cache_slots
    try:
        ids = np.load(hot_rows, mmap_mode="r", allow_pickle=False)[:slots]
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(hot_rows, f"is not a .npy file of row ids: {error}") from error
    if ids.ndim != 1 or ids.dtype != np.int64 or (len(ids) and not 0 <= ids.min() <= ids.max() < table.rows):
        raise CheckpointError(hot_rows, f"does not hold int64 row ids of a table of {table.rows} rows")
    table.warm(torch.from_numpy(np.array(ids)))
