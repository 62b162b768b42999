"""A table whose rows take their time, and which minds what `Table.begin` asks of its callers."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from memlane.tables import Lookup, RowReadError, Table

Event = tuple[str, int]


class SlowTable:
    """Another table, with reads of `seconds` in the background of each lookup. Rows in `bad` cannot be read.

    events: ("begin" | "end", tokens of the lookup), in order.
    """

    def __init__(self, table: Table, seconds: float = 0.0, bad: Iterable[int] = ()) -> None:
        self.table, self.seconds, self.bad = table, seconds, set(bad)
        self.name, self.rows, self.width = table.name, table.rows, table.width
        self.events: list[Event] = []
        self.open: list[SlowLookup] = []

    def begin(self, ids: Tensor, live: Tensor | None = None) -> Lookup:
        assert len(self.open) < 2, "more than two lookups are open"
        self.events.append(("begin", ids.shape[0]))
        self.open.append(SlowLookup(self, ids))
        return self.open[-1]

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.begin(ids).weighted_sum(weights)

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.begin(ids).dot(x)

    def gather(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class SlowLookup:
    def __init__(self, table: SlowTable, ids: Tensor) -> None:
        self._table, self._ids = table, ids
        self._read = threading.Timer(table.seconds, lambda: None)
        self._read.start()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        self._end()
        return self._table.table.weighted_sum(self._ids, weights)

    def dot(self, x: Tensor) -> Tensor:
        self._end()
        return self._table.table.dot(self._ids, x)

    def activations(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.dot(x)) * weights

    def launched(self) -> None:
        pass

    def fetch(self) -> None:
        pass

    def close(self) -> None:
        if self in self._table.open:
            self._table.open.remove(self)
            self._read.cancel()

    def _end(self) -> None:
        assert self._table.open[0] is self, "lookups end in the order in which they began"
        self._read.join()
        self._table.open.remove(self)
        self._table.events.append(("end", self._ids.shape[0]))
        needs = [bool(self._table.bad.intersection(row)) for row in self._ids.tolist()]
        if any(needs):
            found = sorted(self._table.bad.intersection(self._ids.flatten().tolist()))
            tokens = [token for token, bad in enumerate(needs) if bad]
            raise RowReadError(self._table.name, found, "broken on purpose", tokens)
