"""What a memory layer may ask of a value table. It does not know where rows lie or how they are cached."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Lookup", "Table"]


class Lookup(Protocol):
    """Rows that were asked for with `Table.begin` and may still be on their way.

    Exactly one of `weighted_sum`, `dot` and `activations` ends it: that waits for the rows that are missing, and raises RowReadError,
    with tokens counted within this lookup, if some could not be read. What is no longer wanted must be closed.
    """

    def launched(self) -> None:
        """What asks for the rows has been given to the device. Whoever replays a graph that it was captured in says so, each
        time, before giving it anything else: `fetch` waits for no more than that."""

    def fetch(self) -> None:
        """The processor's own part in bringing rows to a GPU, where there is one; else nothing.

        Whoever ends the lookup calls it, if nobody has. A captured graph leaves it out, so whoever replays one calls it
        before the piece that ends the lookup, each time.
        """

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """weights fp32 [tokens, k] -> sum over k of weights * rows, fp32 [tokens, width]."""

    def dot(self, x: Tensor) -> Tensor:
        """x fp32 [tokens, width] -> inner products of each row with its token's x, fp32 [tokens, k]."""

    def activations(self, x: Tensor, weights: Tensor) -> Tensor:
        """x fp32 [tokens, width], weights fp32 [tokens, k] -> gelu(row . x) * weights [tokens, k]; ends it as `dot` does."""

    def close(self) -> None:
        """Give the rows up. Idempotent, and allowed after the end.

        Of a lookup in captured graphs: give up what the last replay asked for, where the piece that ends it is not
        going to be replayed. It can be replayed again afterwards.
        """


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

    def begin(self, ids: Tensor, live: Tensor | None = None) -> Lookup:
        """ids [tokens, k] -> a lookup whose missing rows are being read; does not wait for them.

        At most two lookups of a table are open at a time, and they end in the order in which they began.

        live: int64 [1] on the table's device, where the last tokens of a batch are padding, copies of others: ids from
        there on, counted over all tokens, are looked up but not counted.
        """

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids [tokens, k], weights fp32 [tokens, k] -> fp32 [tokens, width]; `begin(ids).weighted_sum(weights)`."""

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids [tokens, k], x fp32 [tokens, width] -> inner products of each row with its token's x, [tokens, k]."""

    def gather(self, ids: Tensor) -> Tensor:
        """ids [n] -> the rows as fp32 [n, width]."""
