"""Our own form, a Hugging Face style folder:

config.json                  written last: a folder without it is not a model
model.safetensors            dense weights
table-<name>.safetensors     one table each: [rows, width] of plain numbers, or uint8 [rows, stride] of encoded rows;
                             beside it <name>.crc32c, the checksums of its blocks (see tables/checksums.py)
generation_config.json       bos and eos ids
tokenizer.json, tokenizer_config.json, chat_template.jinja    where there is a tokenizer
hot_rows.npy                 row ids, most read first; hot_rows-<table>.npy where there are several tables
memlane-checksums.json       file name -> sha256
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlane.checkpoints.safetensors_file import read_header
from memlane.checkpoints.source import (
    Checkpoint,
    DenseTensor,
    FloatRows,
    TableSource,
    check_shapes,
    row_format_of,
)
from memlane.checkpoints.tensors import StoredTensor
from memlane.checkpoints.verified import VerifiedRows
from memlane.errors import CheckpointError, ConfigError
from memlane.models.config import MODEL_TYPE, ModelConfig
from memlane.tables import RowFormat, TableError, TableLayout

__all__ = [
    "CONFIG",
    "EncodedRows",
    "hot_rows_name",
    "open_directory",
    "read_config",
    "sha256",
    "table_file_name",
    "verify",
]

CONFIG = "config.json"
DENSE = "model.safetensors"
CHECKSUMS = "memlane-checksums.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def table_file_name(table: str) -> str:
    return f"table-{table}.safetensors"


def hot_rows_name(table: str, tables: int) -> str:
    """The file of a table's hot rows in a model of so many tables."""
    return "hot_rows.npy" if tables == 1 else f"hot_rows-{table}.npy"


@dataclass(frozen=True)
class EncodedRows:
    """A table of quantised rows with their scales."""

    name: str
    tensor: StoredTensor
    width: int
    row_format: str

    @property
    def rows(self) -> int:
        return self.tensor.shape[0]

    def chunks(self, rows: int) -> Iterator[Tensor]:
        return self.tensor.chunks(rows)


def read_config(directory: Path) -> ModelConfig:
    """The config of a model directory. Raises CheckpointError if it is missing, malformed or of another model type."""
    path = directory / CONFIG
    data = read_json(path)
    if data.get("model_type") != MODEL_TYPE:
        raise CheckpointError(path, f"is of model_type {data.get('model_type')!r}, which is not supported")
    try:
        return ModelConfig.from_dict(data)
    except ConfigError as error:
        raise CheckpointError(path, str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file, or CheckpointError."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(path, "is not a JSON object")
    return data


def open_directory(directory: Path) -> Checkpoint:
    """The model in a directory of our own form; reads headers only, and checks every shape against the config."""
    config = read_config(directory)
    tensors = read_header(directory / DENSE)
    dense = tuple(DenseTensor(name, tensor.shape, (tensor,)) for name, tensor in tensors.items())
    tables = tuple(_open_table(directory, name, config) for name in config.table_names())
    check_shapes(directory / DENSE, config, dense, tables)
    hot = {name: directory / hot_rows_name(name, len(tables)) for name in config.table_names()}
    hot = {name: path for name, path in hot.items() if path.exists()}
    own = [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
    write = functools.partial(_copy, own) if own else None
    return Checkpoint(directory, "memlane", config, dense, tables, hot, write)


def verify(directory: Path, names: Collection[str] | None = None) -> None:
    """Compare files with memlane-checksums.json (all it lists, or those of `names` that it lists).

    Raises CheckpointError naming the first file that is missing or differs. Without a checksum file, nothing is checked.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return
    for name, digest in read_json(path).items():
        if names is None or name in names:
            file = directory / Path(name).name
            if sha256(file) != digest:
                raise CheckpointError(file, f"corrupt: its sha256 is not the one in {CHECKSUMS}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file as hex, or CheckpointError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error


def _copy(files: list[Path], into: Path) -> None:
    for file in files:
        shutil.copyfile(file, into / file.name)


def _open_table(directory: Path, name: str, config: ModelConfig) -> TableSource:
    path = directory / table_file_name(name)
    tensors = read_header(path)
    if name not in tensors:
        raise CheckpointError(path, f"holds no tensor named {name}")
    tensor, memory = tensors[name], config.memory
    assert memory is not None
    if tensor.dtype != torch.uint8:
        found = row_format_of(path, name, tensor.dtype)
        plain = (memory.rows, memory.value_dim)
        if found != memory.row_format or tensor.shape != plain:
            raise CheckpointError(
                path, f"is {found} {list(tensor.shape)}, {CONFIG} says {memory.row_format} {list(plain)}"
            )
        return _verified(path, FloatRows(name, tensor, found))
    wanted = (memory.rows, memory.row_bytes)
    if not RowFormat(memory.row_format).is_quantised or tensor.shape != wanted:
        raise CheckpointError(
            path,
            f"is uint8 {list(tensor.shape)}, but {memory.row_format} rows as in {CONFIG} take {list(wanted)}",
        )
    return _verified(path, EncodedRows(name, tensor, memory.value_dim, memory.row_format))


def _verified(path: Path, table: TableSource) -> TableSource:
    """The table, compared with its checksums when it is read, if it has any."""
    try:
        layout = TableLayout.from_safetensors(path, table.name, table.row_format, table.width)
    except TableError as error:
        raise CheckpointError(path, str(error).removeprefix(f"{path}: ")) from error
    return table if layout.checksum_offset is None else VerifiedRows(table, layout)
