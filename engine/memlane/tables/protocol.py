"""What a memory layer may ask of a value table. It does not know where rows lie or how they are cached."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Lookup", "Table"]


class Lookup(Protocol):
    """Rows that were asked for. One of weighted_sum and dot, each of which waits for what is missing, or close ends it."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """weights fp32 [tokens, k] -> sum over k of weights * rows, fp32 [tokens, width]."""

    def dot(self, x: Tensor) -> Tensor:
        """x fp32 [tokens, width] -> inner products of each row with its token's x, fp32 [tokens, k]."""

    def close(self) -> None:
        """Gives the lookup up; nothing where it has ended. Idempotent."""


@runtime_checkable
class Table(Protocol):
    """A matrix [rows, width] read by row id.

    Ids are int32 or int64 on the table's device; an id outside [0, rows) raises IndexError. Empty batches are
    allowed and give empty results. Results are fp32 and owned by the caller.
    """

    @property
    def name(self) -> str:
        """Name of the table's tensor, as errors and metrics show it."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def width(self) -> int:
        """Numbers in a row."""

    def begin(self, ids: Tensor) -> Lookup:
        """ids [tokens, k]: starts whatever reads they need and returns without waiting. Lookups end in their order."""

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids [tokens, k], weights fp32 [tokens, k] -> sum over k of weights * rows, fp32 [tokens, width]."""

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids [tokens, k], x fp32 [tokens, width] -> inner products of each row with its token's x, [tokens, k]."""

    def gather(self, ids: Tensor) -> Tensor:
        """ids [n] -> the rows as fp32 [n, width]."""
