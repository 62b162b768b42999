"""A memory layer: product keys choose rows of a value table, their weighted sum replaces the feed-forward output.

    x [T, D] ─ query ─ [T, H, 2, Q/2] · keys [H, 2, N, Q/2] ─ scores [T, H, 2, N] ─ top-k ─ ids, weights [T, H*K]
                                                                                              │
       out = gate(x) * value_proj( silu(swilu(x)) * table.weighted_sum(ids, weights) )  ◄─────┘

It works in two steps, so that something else can be computed while rows are read: `begin` chooses the rows, asks the
table for them and computes what needs none of them (silu, gate), `finish` sums them.

Weights are a softmax over the K rows of each head; heads add up, and a row chosen by two heads counts twice.
Sources: "Memory Layers at Scale" (Berges et al. 2024) for Memory+; "Mixture of A Million Experts" (He 2024) for PEER.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlane.models.config import MemoryConfig
from memlane.models.layers import Linear, linear
from memlane.models.product_keys import Choice, Selection, choose, ieee_products, search
from memlane.tables.protocol import Lookup, Table

__all__ = ["MemoryLayer", "Pending", "PendingMemory", "Prepared"]


class Pending(Protocol):
    """A layer's output that waits for something. `finish` ends it, `close` gives it up (idempotent, fine after the end)."""

    def asked(self) -> None:
        """As `Lookup.asked`."""

    def fetch(self) -> None:
        """As `Lookup.fetch`."""

    def finish(self) -> Tensor:
        """-> [T, D], in the dtype of the layer's input."""

    def close(self) -> None: ...


class Prepared(NamedTuple):
    """The factors of a layer's output that need no rows, where it has them: silu(swilu(x)) [T, width] and sigmoid [T, 1]."""

    swilu: Tensor | None
    gate: Tensor | None


class PendingMemory:
    """A memory layer whose rows are on their way."""

    def __init__(
        self, layer: MemoryLayer, x: Tensor, prepared: Prepared, weights: Tensor, lookups: Sequence[Lookup]
    ) -> None:
        """Use MemoryLayer.begin. x [T, D], weights fp32 [T, H*K], a lookup of the same rows in each table."""
        self._layer, self._x, self._prepared = layer, x, prepared
        self._weights, self._lookups = weights, lookups

    def asked(self) -> None:
        for lookup in self._lookups:
            lookup.asked()

    def fetch(self) -> None:
        for lookup in self._lookups:
            lookup.fetch()

    def finish(self) -> Tensor:
        """Wait for the rows -> [T, D], in x's dtype. Raises RowReadError if a row could not be read."""
        try:
            return self._layer.combine(self._x, self._prepared, self._weights, self._lookups)
        finally:
            self.close()

    def close(self) -> None:
        with ExitStack() as closing_all:  # the others, even if one fails
            for lookup in self._lookups:
                closing_all.callback(lookup.close)


class MemoryLayer(nn.Module):
    """One memory layer over tables it does not own: they are not parameters of it, nor part of its state dict.

    tables: as `MemoryConfig.table_names` lists them: one, or two for PEER (U, then V).
    Queries, keys, scores and the choice of rows are fp32 whatever the model's dtype: in bf16, near-ties flip rows.
    """

    def __init__(self, hidden: int, config: MemoryConfig, tables: Sequence[Table]) -> None:
        super().__init__()
        self.config = config
        heads, half, width = config.num_heads, config.key_dim // 2, config.value_dim
        self.query = Linear(hidden, heads * config.key_dim)
        self.keys = nn.Parameter(torch.empty(heads, 2, config.num_keys, half))
        self.swilu = Linear(hidden, width) if config.swilu else None
        self.value_proj = Linear(width, hidden) if config.value_proj else None
        self.gate = Linear(hidden, 1) if config.gated else None
        self.log_score_scale = nn.Parameter(torch.zeros(heads)) if config.score_scale else None
        self._tables = tuple(tables)  # in a tuple, so that nn.Module does not adopt tables that are modules
        self._check_tables()

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] after the norm -> [T, D], in x's dtype. Raises RowReadError if a row cannot be read."""
        return self.begin(x).finish()

    def begin(self, x: Tensor) -> Pending:
        """Choose rows for x [T, D] and ask every table for them (PEER's V is read while its U is used); don't wait."""
        ids, weights = self.choose(x)
        with ExitStack() as opened:
            lookups = [opened.enter_context(closing(table.begin(ids))) for table in self._tables]
            pending = PendingMemory(self, x, self.prepare(x), weights, lookups)
            opened.pop_all()
            return pending

    def prepare(self, x: Tensor) -> Prepared:
        """What of the output needs no rows, for x [T, D]; in x's dtype."""
        return Prepared(
            None if self.swilu is None else F.silu(self.swilu(x)),
            None if self.gate is None else torch.sigmoid(self.gate(x)),
        )

    def combine(self, x: Tensor, prepared: Prepared, weights: Tensor, lookups: Sequence[Lookup]) -> Tensor:
        """The second step: x [T, D], weights fp32 [T, H*K] and the rows they belong to -> [T, D]. Ends the lookups."""
        if self.config.kind == "peer":
            experts_in, experts_out = lookups
            activation = experts_in.activations(x.float(), weights)
            out = experts_out.weighted_sum(activation).to(x.dtype)
        else:
            out = self._project(lookups[0].weighted_sum(weights), prepared.swilu, x.dtype)
        return out if prepared.gate is None else out * prepared.gate

    def choose(self, x: Tensor) -> Choice:
        """x [T, D] -> the ids int64 and softmax weights fp32 of the rows to read, both [T, H*K], heads one after another."""
        return choose(self._query(x), self.keys, self.config.knn, self.log_score_scale)

    def select(self, x: Tensor) -> Selection:
        """x [T, D] -> row ids int64 and raw scores fp32, both [T, H, K], best first."""
        return search(self._query(x), self.keys, self.config.knn)

    def _query(self, x: Tensor) -> Tensor:
        """x [T, D] -> fp32 [T, H, 2, Q/2]"""
        with ieee_products(x.device):
            query = linear(x.float(), self.query.weight, self.query.bias)
        return query.view(-1, self.config.num_heads, 2, self.config.key_dim // 2)

    def _project(self, bag: Tensor, swilu: Tensor | None, dtype: torch.dtype) -> Tensor:
        """bag fp32 [T, width], swilu [T, width] -> [T, D] in that dtype; the product with silu is rounded once."""
        if swilu is not None:
            bag = bag * swilu
        out = bag.to(dtype)
        return out if self.value_proj is None else self.value_proj(out)

    def _check_tables(self) -> None:
        wanted = (self.config.rows, self.config.value_dim)
        if len(self._tables) != (2 if self.config.kind == "peer" else 1):
            raise ValueError(f"a {self.config.kind} layer got {len(self._tables)} tables")
        for table in self._tables:
            if (table.rows, table.width) != wanted:
                raise ValueError(
                    f"table {table.name!r} is {table.rows} x {table.width}, the layer needs {wanted}"
                )
