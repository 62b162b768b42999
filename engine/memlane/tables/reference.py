"""The slow, obvious twin of ValueTable: a plain fp32 torch matrix with autograd. Trains tables and checks fast paths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlane.tables.protocol import Lookup, Table

__all__ = ["ReferenceLookup", "ReferenceTable"]


class ReferenceLookup:
    """A lookup that reads nothing ahead: it keeps the ids and asks the table when it ends."""

    def __init__(self, table: Table, ids: Tensor) -> None:
        self._table = table
        self._ids: Tensor | None = ids

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """weights fp32 [tokens, k] -> fp32 [tokens, width]. RuntimeError if the lookup has ended."""
        return self._table.weighted_sum(self._end(), weights)

    def dot(self, x: Tensor) -> Tensor:
        """x fp32 [tokens, width] -> fp32 [tokens, k]. RuntimeError if the lookup has ended."""
        return self._table.dot(self._end(), x)

    def activations(self, x: Tensor, weights: Tensor) -> Tensor:
        """gelu(dot(x)) * weights. RuntimeError if the lookup has ended."""
        return F.gelu(self.dot(x)) * weights

    def launched(self) -> None:
        pass

    def fetch(self) -> None:
        pass

    def close(self) -> None:
        self._ids = None

    def _end(self) -> Tensor:
        ids, self._ids = self._ids, None
        if ids is None:
            raise RuntimeError(f"this lookup of table {self._table.name!r} has ended")
        return ids


class ReferenceTable(nn.Module):
    """A value table as one fp32 parameter `weight` [rows, width]; same methods as ValueTable, on any device.

    Gradients flow into `weight`, the weights of a sum and the x of a dot. `sparse_grad=True` makes the gradient of
    `weighted_sum` and `gather` a sparse tensor (for SparseAdam and for tables far larger than a batch touches).
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        name: str = "values",
        init_std: float | None = None,
        sparse_grad: bool = False,
    ) -> None:
        """A table of normal(0, init_std) rows; init_std defaults to width ** -0.5 as in Memory Layers at Scale."""
        super().__init__()
        self._table_name = name
        self.sparse_grad = sparse_grad
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=torch.float32))
        nn.init.normal_(self.weight, std=width**-0.5 if init_std is None else init_std)

    @classmethod
    def from_tensor(
        cls, values: Tensor, *, name: str = "values", sparse_grad: bool = False
    ) -> ReferenceTable:
        """A table holding `values` [rows, width], widened to fp32. fp32 input is shared, not copied."""
        table = cls(0, values.shape[1], name=name, sparse_grad=sparse_grad)
        table.weight = nn.Parameter(values.detach().to(torch.float32))
        return table

    @property
    def name(self) -> str:
        return self._table_name

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def begin(self, ids: Tensor, live: Tensor | None = None) -> Lookup:
        """ids [tokens, k], checked now (IndexError) -> a lookup that reads them when it ends."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise IndexError(f"table {self.name!r} has {self.rows} rows; ids run {ids.min()} to {ids.max()}")
        return ReferenceLookup(self, ids)

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids [tokens, k], weights fp32 [tokens, k] -> fp32 [tokens, width]."""
        if ids.numel() == 0:
            return self.weight.new_zeros(ids.shape[0], self.width)
        return F.embedding_bag(
            ids, self.weight, per_sample_weights=weights, mode="sum", sparse=self.sparse_grad
        )

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids [tokens, k], x fp32 [tokens, width] -> fp32 [tokens, k]."""
        rows = F.embedding(ids, self.weight, sparse=self.sparse_grad)
        return torch.einsum("tkw,tw->tk", rows, x)

    def gather(self, ids: Tensor) -> Tensor:
        """ids [n] -> fp32 [n, width]."""
        return F.embedding(ids, self.weight, sparse=self.sparse_grad)

    def extra_repr(self) -> str:
        return f"rows={self.rows}, width={self.width}, name={self.name!r}"
