"""What every reader of a checkpoint hands over: a config, dense weights under our names, tables, and what comes with them.

Readers only describe; bytes are read when `DenseTensor.load` and `TableSource.chunks` are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from memlane.checkpoints.tensors import LazyTensor
from memlane.errors import CheckpointError
from memlane.models.config import ModelConfig
from memlane.models.transformer import Transformer
from memlane.tables.protocol import Lookup

__all__ = ["Checkpoint", "DenseTensor", "FloatRows", "TableSource", "check_shapes", "row_format_of"]

_ROW_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class DenseTensor:
    """A dense weight: `parts` stacked along the first dimension and viewed as `shape`, or whatever `make` makes of them."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[LazyTensor, ...]
    make: Callable[[Sequence[Tensor]], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def load(self) -> Tensor:
        """The tensor, contiguous, in `dtype` and `shape`. Raises CheckpointError if it cannot be read."""
        loaded = [part.load() for part in self.parts]
        whole = (
            self.make(loaded)
            if self.make is not None
            else torch.cat(loaded)
            if len(loaded) > 1
            else loaded[0]
        )
        return whole.reshape(self.shape).to(self.dtype).contiguous()


class TableSource(Protocol):
    """A value table as a checkpoint stores it, read from front to back."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def row_format(self) -> str:
        """One of `models.config.ROW_FORMATS`."""

    def chunks(self, rows: int) -> Iterator[Tensor]:
        """At most `rows` rows at a time: [n, width] of the plain dtype, or uint8 [n, stride] of encoded rows."""


@dataclass(frozen=True)
class FloatRows:
    """A table of plain numbers."""

    name: str
    tensor: LazyTensor
    row_format: str

    @property
    def rows(self) -> int:
        return self.tensor.shape[0]

    @property
    def width(self) -> int:
        return self.tensor.shape[1]

    def chunks(self, rows: int) -> Iterator[Tensor]:
        return self.tensor.chunks(rows)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any form. form: "memlane", "lingua", "lingua-dcp" or "smlm".

    hot_rows: table name -> .npy file of its row ids, most read first. write_tokenizer: writes tokenizer files into a
    directory; None where the checkpoint holds none.
    """

    directory: Path
    form: str
    config: ModelConfig
    dense: tuple[DenseTensor, ...]
    tables: tuple[TableSource, ...]
    hot_rows: Mapping[str, Path] = field(default_factory=dict)
    write_tokenizer: Callable[[Path], None] | None = None


def row_format_of(path: Path, name: str, dtype: torch.dtype) -> str:
    """The row format of a table of plain numbers. Raises CheckpointError on dtypes that no table has."""
    if dtype not in _ROW_FORMATS:
        raise CheckpointError(path, f"table {name} is of {dtype}, expected float32, bfloat16 or float16")
    return _ROW_FORMATS[dtype]


@dataclass(frozen=True)
class _ShapeOnly:
    """A table that has a shape and nothing else, to build a model for its parameter names."""

    name: str
    rows: int
    width: int

    def begin(self, ids: Tensor, live: Tensor | None = None) -> Lookup:
        raise NotImplementedError

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def gather(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the dense weights a model of this config has."""
    memory = config.memory
    tables = {n: _ShapeOnly(n, memory.rows, memory.value_dim) for n in config.table_names()} if memory else {}
    with torch.device("meta"):
        model = Transformer(config, tables)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def check_shapes(
    path: Path, config: ModelConfig, dense: Sequence[DenseTensor], tables: Sequence[TableSource]
) -> None:
    """Raise CheckpointError unless these are exactly the weights and tables that the config asks for."""
    found = {tensor.name: tensor for tensor in dense}
    wanted = dense_shapes(config)
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(path, f"weight {name} is missing")
        if found[name].shape != shape:
            raise CheckpointError(
                path, f"weight {name} is {list(found[name].shape)}, the config asks for {list(shape)}"
            )
        if not found[name].dtype.is_floating_point:
            raise CheckpointError(path, f"weight {name} is of {found[name].dtype}, which is not a float")
    if extra := sorted(set(found) - set(wanted)):
        raise CheckpointError(path, f"unexpected weight {extra[0]} ({len(extra)} in all)")
    memory = config.memory
    for table in tables:
        if memory is None or (table.rows, table.width) != (memory.rows, memory.value_dim):
            raise CheckpointError(
                path, f"table {table.name} is {table.rows} x {table.width}, which the config rules out"
            )
    if missing := set(config.table_names()) - {table.name for table in tables}:
        raise CheckpointError(path, f"table {sorted(missing)[0]} is missing")
