"""A table as a GPU has it: its rows within reach, or brought by the host into memory that stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import tape
import torch
from torch import Tensor

from memlane.tables import Lookup, RowReadError


class StagedTable:
    """Rows of `values` [rows, width], by the host, or not. Those in `bad` cannot be read then.

    events: ("begin" | "fetch" | "sum" | "close", tokens of the lookup), in order; what is replayed leaves none.
    """

    name = "staged"

    def __init__(self, values: Tensor, *, by_host: bool = True, bad: Iterable[int] = ()) -> None:
        self.values, self.by_host, self.bad = values, by_host, set(bad)
        self.rows, self.width = values.shape
        self.on_launched: Callable[[], object] = lambda: None
        self.events: list[tuple[str, int]] = []

    def begin(self, ids: Tensor, live: Tensor | None = None) -> Lookup:
        self.events.append(("begin", len(ids)))
        return StagedLookup(self, ids)

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.begin(ids).weighted_sum(weights)

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.begin(ids).dot(x)

    def gather(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class StagedLookup:
    def __init__(self, table: StagedTable, ids: Tensor) -> None:
        self._table, self._ids = table, ids
        self._staging = torch.full((*ids.shape, table.width), float("nan"), device=ids.device)
        self._fetched = False

    def launched(self) -> None:
        self._table.on_launched()

    def fetch(self) -> None:
        if not self._table.by_host:
            return
        assert not tape.capturing(), "the host's part is in no graph"
        self._table.events.append(("fetch", len(self._ids)))
        needs = [bool(self._table.bad.intersection(row)) for row in self._ids.tolist()]
        if any(needs):
            found = sorted(self._table.bad.intersection(self._ids.flatten().tolist()))
            tokens = [token for token, bad in enumerate(needs) if bad]
            raise RowReadError(self._table.name, found, "broken on purpose", tokens)
        self._staging.copy_(self._table.values[self._ids])
        self._fetched = True

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return (self._rows() * weights[..., None]).sum(1)

    def dot(self, x: Tensor) -> Tensor:
        return (self._rows() * x[:, None]).sum(-1)

    def activations(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.dot(x)) * weights

    def close(self) -> None:
        self._table.events.append(("close", len(self._ids)))

    def _rows(self) -> Tensor:
        self._table.events.append(("sum", len(self._ids)))
        if not self._table.by_host:
            return self._table.values[self._ids]
        if not tape.capturing() and not self._fetched:
            self.fetch()
        return self._staging
