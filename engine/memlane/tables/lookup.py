"""One batch of row ids on its way: the reads begin with it, the sums end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memlane.native import RowView
from memlane.tables.cache import CacheBatch, Ids, Part
from memlane.tables.errors import RowReadError, TableError
from memlane.tables.source import FileRead

if TYPE_CHECKING:
    from memlane.tables.table import ValueTable

__all__ = ["TableLookup"]


class TableLookup:
    """ids [tokens, k] asked for, rows on their way. See `memlane.tables.protocol.Lookup`."""

    def __init__(self, table: ValueTable, flat: Ids, tokens: int, k: int, batch: CacheBatch | None) -> None:
        """Use ValueTable.begin. batch: None where the whole table lies in memory."""
        self._table, self._flat, self._tokens, self._k = table, flat, tokens, k
        self._batch = batch
        self._ended = False

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """weights fp32 [tokens, k] -> fp32 [tokens, width]. Rows are added as they come, each token's in order."""
        given = _floats(weights, "weights")
        if weights.shape != (self._tokens, self._k):
            raise ValueError(f"weights are {list(weights.shape)}, ids {[self._tokens, self._k]}")
        make = torch.zeros if self._k == 0 else torch.empty
        out = make(self._tokens, self._table.width)
        into = out.numpy()
        self._end(
            whole=lambda view, ids, begin: view.weighted_sum(ids, given, into, begin),
            as_ready=lambda view, part, read: view.weighted_sum_as_ready(
                part.slots, given, into, part.begin, self._table.states, *read.native
            ),
        )
        return out

    def dot(self, x: Tensor) -> Tensor:
        """x fp32 [tokens, width] -> fp32 [tokens, k]: each row with its token's x."""
        given = _floats(x, "x")
        if x.shape != (self._tokens, self._table.width):
            raise ValueError(f"x is {list(x.shape)}, expected {[self._tokens, self._table.width]}")
        out = torch.empty(self._tokens, self._k)
        into = out.numpy()
        self._end(
            whole=lambda view, ids, begin: view.dot(ids, given, into, begin),
            as_ready=lambda view, part, read: view.dot_as_ready(
                part.slots, given, into, part.begin, self._table.states, *read.native
            ),
        )
        return out

    def activations(self, x: Tensor, weights: Tensor) -> Tensor:
        """x fp32 [tokens, width], weights fp32 [tokens, k] -> gelu(row . x) * weights, fp32 [tokens, k]."""
        return F.gelu(self.dot(x)) * weights

    def gather(self) -> Tensor:
        """The rows as fp32 [tokens * k, width]."""
        out = torch.empty(len(self._flat), self._table.width)
        into = out.numpy()
        self._end(whole=lambda view, ids, begin: view.gather(ids, into[begin : begin + len(ids)]))
        return out

    def launched(self) -> None:
        """Nothing: rows are asked for at once."""

    def fetch(self) -> None:
        """Nothing: whoever sums the rows waits for them."""

    def places(self) -> Iterator[Part]:
        """Ends the lookup with where its rows lie, for whoever copies them: part by part, each once its rows have come.

        A part's slots hold until the next is asked for, the last one's until `close`. RowReadError after the last part
        where rows could not be read; those parts are left out. TableError on a table that is not on disk.
        """
        cache = self._table.cache
        if cache is None or self._batch is None:
            raise TableError(f"table {self._table.name!r} has no cache that rows could lie in")
        self._begin_to_end()
        parts = self._batch.parts()
        while True:
            with self._table.busy():
                part = next(parts, None)
                if part is None:
                    break
                ready = self._has_come(part)
            if ready:
                yield part
        self._table.count(len(self._flat))
        self._raise_for_bad_rows()

    def wait(self) -> None:
        """Ends the lookup without computing anything: its rows are cached then, as far as they fit."""
        self._end(whole=lambda view, ids, begin: None)

    def close(self) -> None:
        """Gives the lookup up, if it has not ended. Waits for reads under way: their slots are not free before."""
        self._ended = True
        if self._batch is not None and not self._batch.closed:
            with self._table.busy(wait=True):  # a batch left open would keep its slots for ever
                self._batch.close()

    def _begin_to_end(self) -> None:
        if self._ended:
            raise TableError(f"a lookup of table {self._table.name!r} was ended twice")
        self._ended = True

    def _end(
        self,
        whole: Callable[[RowView, Ids, int], None],
        as_ready: Callable[[RowView, Part, FileRead], tuple[float, bool]] | None = None,
    ) -> None:
        self._begin_to_end()
        with self._table.busy() as view:
            if self._batch is None:
                if len(self._flat):
                    whole(view, self._flat, 0)
            else:
                try:
                    for part in self._batch.parts():
                        self._compute(view, part, whole, as_ready)
                finally:
                    self._batch.close()
                self._raise_for_bad_rows()
            self._table.count(len(self._flat))

    def _compute(
        self,
        view: RowView,
        part: Part,
        whole: Callable[[RowView, Ids, int], None],
        as_ready: Callable[[RowView, Part, FileRead], tuple[float, bool]] | None,
    ) -> None:
        cache = self._table.cache
        assert cache is not None
        if isinstance(part.read, FileRead) and as_ready is not None:
            stalled, failed = as_ready(view, part, part.read)
            cache.stall_seconds += stalled
            assert not failed or len(cache.memory.states.failed(part.slots)), "rows that nobody reads"
            return
        if self._has_come(part):
            whole(view, part.slots, part.begin)

    def _has_come(self, part: Part) -> bool:
        """Waits for the rows of a part; False where some cannot be read. The batch finds the same, and remembers."""
        cache = self._table.cache
        assert cache is not None
        if part.read is not None:
            started = time.perf_counter()
            try:
                part.read.finish()
            except RowReadError:
                return False
            finally:
                cache.stall_seconds += time.perf_counter() - started
        return not len(cache.memory.states.failed(part.slots))

    def _raise_for_bad_rows(self) -> None:
        assert self._batch is not None
        rows = self._batch.bad_rows()
        if rows:
            assert self._table.cache is not None
            tokens = np.unique(np.flatnonzero(np.isin(self._flat, rows)) // max(self._k, 1))
            raise RowReadError(self._table.name, rows, self._table.cache.last_reason, tokens.tolist())


def _floats(values: Tensor, what: str) -> NDArray[np.float32]:
    if values.dtype != torch.float32 or values.device.type != "cpu":
        raise TypeError(f"{what} must be fp32 on the CPU, not {values.dtype} on {values.device}")
    if values.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{what} require a gradient; a ValueTable has none (train on a ReferenceTable)")
    array: NDArray[np.float32] = values.detach().contiguous().numpy()
    return array
