"""Lookups begun and ended in one call: what tables of every kind offer beside `begin`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ["AtOnce"]


class _Lookup(Protocol):
    """What is ended here."""

    def weighted_sum(self, weights: Tensor) -> Tensor: ...

    def dot(self, x: Tensor) -> Tensor: ...

    def gather(self) -> Tensor: ...

    def close(self) -> None: ...


class AtOnce(ABC):
    """A table by its `begin`. Ids are int32 or int64, on the table's device, as weights, x and results are."""

    @abstractmethod
    def begin(self, ids: Tensor, live: Tensor | None = None) -> _Lookup:
        """The table's own."""

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids [tokens, k], weights fp32 [tokens, k] -> fp32 [tokens, width].

        On the CPU IndexError: an id outside the table. RowReadError: rows could not be read; names rows and tokens.
        """
        return self._once(ids, lambda lookup: lookup.weighted_sum(weights))

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids [tokens, k], x fp32 [tokens, width] -> fp32 [tokens, k]: each row with its token's x."""
        return self._once(ids, lambda lookup: lookup.dot(x))

    def gather(self, ids: Tensor) -> Tensor:
        """ids [n] -> the rows as fp32 [n, width]."""
        if ids.dim() != 1:
            raise ValueError(f"ids must have 1 dimension, not shape {list(ids.shape)}")
        return self._once(ids[:, None], lambda lookup: lookup.gather())

    def _once(self, ids: Tensor, end: Callable[[_Lookup], Tensor]) -> Tensor:
        lookup = self.begin(ids)
        try:
            return end(lookup)
        finally:
            lookup.close()
