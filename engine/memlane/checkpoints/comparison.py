"""How far a model's tables are from those of another checkpoint of the same model, typically the unquantised one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memlane.checkpoints.source import Checkpoint, TableSource
from memlane.errors import CheckpointError
from memlane.models.config import ModelConfig
from memlane.tables import RowFormat, decode_rows

__all__ = ["TableComparison", "compare_tables", "tables_to_compare"]

_CHUNK_BYTES = 8 << 20  # of decoded rows


@dataclass(frozen=True)
class TableComparison:
    """The error of decoded rows, measured on the rows of the checkpoint that they are compared with.

    rms_error: root mean square of all differences over the root mean square of all numbers.
    worst_error, worst_row: the row whose difference is longest for its own length (both in L2), the first on ties;
    infinite where a row of zeros is no longer one, or a row is not finite.
    mean_cosine: of all pairs of rows; 1 where both are zeros, 0 where one is.
    """

    rms_error: float
    worst_error: float
    worst_row: int
    mean_cosine: float


def tables_to_compare(config: ModelConfig, other: Checkpoint) -> Mapping[str, TableSource]:
    """The tables of `other` by name. CheckpointError unless it has all that the config names, in their shape."""
    memory = config.memory
    found = {table.name: table for table in other.tables}
    for name in config.table_names():
        assert memory is not None
        if name not in found:
            raise CheckpointError(
                other.directory, f"has no table {name} to compare with; it has {sorted(found)}"
            )
        shape, wanted = (found[name].rows, found[name].width), (memory.rows, memory.value_dim)
        if shape != wanted:
            raise CheckpointError(
                other.directory,
                f"cannot be compared with: its table {name} is {shape[0]} x {shape[1]}, "
                f"the model's is {wanted[0]} x {wanted[1]}",
            )
    return found


def compare_tables(
    ours: TableSource, theirs: TableSource, progress: Callable[[int], object] = lambda rows: None
) -> TableComparison:
    """Streams both tables, of one shape, side by side. progress: told the number of rows done after each chunk."""
    differences = numbers = cosines = 0.0
    worst_error, worst_row, at = -1.0, 0, 0
    height = max(1, _CHUNK_BYTES // (4 * ours.width))
    for our_chunk, their_chunk in zip(ours.chunks(height), theirs.chunks(height), strict=True):
        a, b = _decoded(our_chunk, ours), _decoded(their_chunk, theirs)
        squares, size_a, size_b = _squares(a - b), _squares(a), _squares(b)
        differences += squares.sum().item()
        numbers += size_b.sum().item()
        cosines += _cosines(a, b, size_a, size_b).sum().item()
        # 0 / 0 is a row of zeros that stayed one; every other NaN or x / 0 is as wrong as can be
        errors = (squares / size_b).sqrt().nan_to_num(nan=math.inf, posinf=math.inf)
        errors[(squares == 0) & (size_b == 0)] = 0
        if len(errors) and errors.max().item() > worst_error:
            worst_error, worst_row = errors.max().item(), at + int(errors.argmax())
        at += len(a)
        progress(len(a))
    return TableComparison(_relative(differences, numbers), worst_error, worst_row, cosines / max(at, 1))


def _decoded(chunk: Tensor, table: TableSource) -> Tensor:
    row_format = RowFormat(table.row_format)
    return decode_rows(chunk, row_format, table.width) if row_format.is_quantised else chunk.float()


def _squares(rows: Tensor) -> Tensor:
    """Squared length of each row, in fp64: fp32 would overflow on rows that are merely large."""
    return rows.double().square().sum(dim=1)


def _cosines(a: Tensor, b: Tensor, size_a: Tensor, size_b: Tensor) -> Tensor:
    dots = (a.double() * b.double()).sum(dim=1)
    cosines = torch.where((size_a == 0) | (size_b == 0), 0.0, dots / (size_a * size_b).sqrt())
    return torch.where((size_a == 0) & (size_b == 0), 1.0, cosines)


def _relative(differences: float, numbers: float) -> float:
    if numbers == 0:
        return 0.0 if differences == 0 else math.inf
    return math.sqrt(differences / numbers)
