"""Things that go wrong, for tests: a table with unreadable rows, a model whose output is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import tiny
import torch
from torch import Tensor

from memlane.models import Transformer
from memlane.tables import Lookup, RowReadError
from memlane.tables.reference import ReferenceLookup

POISON = tiny.VOCAB - 2  # a token whose embedding is NaN in `poisoned`


class FaultyTable:
    """The tiny model's table; rows in `bad` cannot be read, which it reports as ValueTable does."""

    def __init__(self, *, names_tokens: bool = True) -> None:
        self._table = tiny.table()
        self._names_tokens = names_tokens
        self.bad: set[int] = set()
        self.asked: set[int] = set()
        self.name, self.rows, self.width = self._table.name, self._table.rows, self._table.width

    def begin(self, ids: Tensor, live: Tensor | None = None) -> Lookup:
        return ReferenceLookup(self, ids)

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        self.asked.update(ids.flatten().tolist())
        found = sorted(self.bad & set(ids.flatten().tolist()))
        if found:
            tokens = torch.isin(ids, torch.tensor(found)).any(1).nonzero().flatten().tolist()
            raise RowReadError(self.name, found, "broken on purpose", tokens if self._names_tokens else ())
        return self._table.weighted_sum(ids, weights)

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def gather(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


def rows_of(token_ids: Sequence[int]) -> set[int]:
    """The table rows that computing these tokens reads."""
    table = FaultyTable()
    tiny.logits_naive(tiny.transformer({"values": table}), token_ids)
    return table.asked


def poisoned() -> Transformer:
    model = tiny.transformer()
    model.embed.weight[POISON] = float("nan")
    return model
