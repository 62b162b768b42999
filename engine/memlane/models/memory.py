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

__all__ = ["Asked", "LayerWeights", "MemoryLayer", "Pending", "PendingMemory", "Prepared"]


class Pending(Protocol):
    """A layer's output that waits for something. `finish` ends it, `close` gives it up (idempotent, fine after the end)."""

    def launched(self) -> None:
        """As `Lookup.launched`."""

    def fetch(self) -> None:
        """As `Lookup.fetch`."""

    def finish(self) -> Tensor:
        """-> [T, D], in the dtype of the layer's input."""

    def close(self) -> None: ...


class Prepared(NamedTuple):
    """The factors of a layer's output that need no rows, where it has them: silu(swilu(x)) [T, width] and sigmoid [T, 1]."""

    swilu: Tensor | None
    gate: Tensor | None


class LayerWeights(NamedTuple):
    """Weight and bias of each product; None where there is none."""

    query: tuple[Tensor, Tensor]
    swilu: tuple[Tensor, Tensor] | None
    gate: tuple[Tensor, Tensor] | None
    value_proj: tuple[Tensor, Tensor] | None


class Asked(NamedTuple):
    """What a layer makes of its input x before it knows any rows, computed elsewhere. query: fp32 [T, H * Q]."""

    query: Tensor
    prepared: Prepared


class PendingMemory:
    """A memory layer whose rows are on their way."""

    def __init__(
        self, layer: MemoryLayer, x: Tensor, prepared: Prepared, weights: Tensor, lookups: Sequence[Lookup]
    ) -> None:
        """Use MemoryLayer.begin. x [T, D], weights fp32 [T, H*K], a lookup of the same rows in each table."""
        self._layer, self._x, self.prepared = layer, x, prepared
        self._weights, self._lookups = weights, lookups

    def launched(self) -> None:
        for lookup in self._lookups:
            lookup.launched()

    def fetch(self) -> None:
        for lookup in self._lookups:
            lookup.fetch()

    def finish(self) -> Tensor:
        """Wait for the rows -> [T, D], in x's dtype. Raises RowReadError if a row could not be read."""
        return self._layer.project(self.sum(), self.prepared, self._x.dtype)

    def sum(self) -> Tensor:
        """Wait for the rows -> what comes of them in itself, fp32 [T, width]. Raises RowReadError as `finish`."""
        try:
            return self._layer.sum(self._x, self._weights, self._lookups)
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

    def begin(self, x: Tensor, asked: Asked | None = None, live: Tensor | None = None) -> PendingMemory:
        """Choose rows for x [T, D] and ask every table for them (PEER's V is read while its U is used); don't wait.

        asked: what was computed of x already; then only PEER needs its numbers, others its shape and dtype. live: as
        `Table.begin` has it.
        """
        ids, weights = self.choose(x) if asked is None else self.choose(x, asked.query)
        with ExitStack() as opened:
            lookups = [opened.enter_context(closing(table.begin(ids, live))) for table in self._tables]
            pending = PendingMemory(
                self, x, self.prepare(x) if asked is None else asked.prepared, weights, lookups
            )
            opened.pop_all()
            return pending

    def weights(self) -> LayerWeights:
        """What its products take, for who computes them elsewhere."""

        def of(part: nn.Linear | None) -> tuple[Tensor, Tensor] | None:
            return None if part is None else (part.weight, part.bias)

        return LayerWeights(
            (self.query.weight, self.query.bias), of(self.swilu), of(self.gate), of(self.value_proj)
        )

    def prepare(self, x: Tensor) -> Prepared:
        """What of the output needs no rows, for x [T, D]; in x's dtype."""
        return Prepared(
            None if self.swilu is None else F.silu(self.swilu(x)),
            None if self.gate is None else torch.sigmoid(self.gate(x)),
        )

    def sum(self, x: Tensor, weights: Tensor, lookups: Sequence[Lookup]) -> Tensor:
        """x [T, D], weights fp32 [T, H*K] and the rows they belong to -> fp32 [T, width]. Ends the lookups."""
        if self.config.kind == "peer":
            experts_in, experts_out = lookups
            return experts_out.weighted_sum(experts_in.activations(x.float(), weights))
        return lookups[0].weighted_sum(weights)

    def project(self, bag: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        """bag fp32 [T, width] -> [T, D] in that dtype; the product with silu is rounded once."""
        if prepared.swilu is not None:
            bag = bag * prepared.swilu
        out = bag.to(dtype)
        if self.value_proj is not None:
            out = self.value_proj(out)
        return out if prepared.gate is None else out * prepared.gate

    def choose(self, x: Tensor, query: Tensor | None = None) -> Choice:
        """x [T, D] -> the ids int64 and softmax weights fp32 of the rows to read, both [T, H*K], heads one after another.

        query fp32 [T, H * Q]: that of x, where it is known.
        """
        planes = self._query(x) if query is None else self._planes(query)
        return choose(planes, self.keys, self.config.knn, self.log_score_scale)

    def select(self, x: Tensor) -> Selection:
        """x [T, D] -> row ids int64 and raw scores fp32, both [T, H, K], best first."""
        return search(self._query(x), self.keys, self.config.knn)

    def _query(self, x: Tensor) -> Tensor:
        """x [T, D] -> fp32 [T, H, 2, Q/2]"""
        with ieee_products(x.device):
            query = linear(x.float(), self.query.weight, self.query.bias)
        return self._planes(query)

    def _planes(self, query: Tensor) -> Tensor:
        return query.view(-1, self.config.num_heads, 2, self.config.key_dim // 2)

    def _check_tables(self) -> None:
        wanted = (self.config.rows, self.config.value_dim)
        if len(self._tables) != (2 if self.config.kind == "peer" else 1):
            raise ValueError(f"a {self.config.kind} layer got {len(self._tables)} tables")
        for table in self._tables:
            if (table.rows, table.width) != wanted:
                raise ValueError(
                    f"table {table.name!r} is {table.rows} x {table.width}, the layer needs {wanted}"
                )
