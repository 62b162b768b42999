"""Attention over KV blocks: the maths of models.attention.CausalAttention, reading what earlier steps wrote."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlane.models.attention import Lines
from memlane.runner.batch import Batch, Prefill
from memlane.runner.kv import KVCache
from memlane.runner.transfer import upload

__all__ = ["PagedAttention", "attend_singles", "seen_mask"]


class PagedAttention:
    """The attention of one step. Writes the step's keys and values first, then reads each sequence's blocks.

    Single tokens go together, padded to the longest of them; longer chunks one sequence at a time. Writing the same
    step twice is harmless: a step may be run again after a row could not be read.

    Masks are made once for all layers, as numbers to be added to the scores: each layer would make that of a bool mask.
    """

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self.cache, self.batch = cache, batch
        self._device = batch.slots.device
        singles = batch.singles
        self._longest = max(batch.lengths[:singles], default=0)
        self._tables = self._tensor(_padded(batch.blocks[:singles]))
        self._mask: Tensor | None = None
        if singles > 1:
            self._mask = seen_mask(self._tensor(batch.lengths[:singles]), self._longest, cache.dtype)
        # A chunk that begins its sequence has nothing but itself to attend to.
        self._prefills = [
            _Prefix(self._tensor([blocks]), self._prefill_mask(prefill)) if prefill.start else None
            for prefill, blocks in zip(batch.prefills, batch.blocks[singles:], strict=True)
        ]

    def lines(self, layer: int) -> Lines:
        return self.cache.lines(layer, self.batch.slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool = False) -> Tensor:
        """q [T, H, hd], k and v [T, KV, hd] -> [T, H, hd]."""
        if not written:
            self.cache.write(layer, self.batch.slots, k, v)
        if not self.batch.prefills:
            return self._singles(layer, q)
        parts = [self._singles(layer, q[: self.batch.singles])] if self.batch.singles else []
        for prefill, prefix in zip(self.batch.prefills, self._prefills, strict=True):
            part = slice(prefill.begin, prefill.end)
            if prefix is None:
                parts.append(_attend(q[part], k[part], v[part]))
            else:
                parts.append(self._prefill(layer, q[part], prefix))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _singles(self, layer: int, q: Tensor) -> Tensor:
        return attend_singles(self.cache, layer, q, self._tables, self._longest, self._mask)

    def _prefill(self, layer: int, q: Tensor, prefix: _Prefix) -> Tensor:
        """q [n, H, hd] over the positions of a sequence up to its own."""
        length = prefix.mask.shape[1]
        k, v = self.cache.gather(layer, prefix.table)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[:, :, :length],
            v[:, :, :length],
            attn_mask=prefix.mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)

    def _prefill_mask(self, prefill: Prefill) -> Tensor:
        """[n, start + n]: key j is seen by query i, which is at position start + i, if j <= start + i."""
        n = prefill.end - prefill.begin
        hidden = torch.ones(n, prefill.start + n, dtype=torch.bool, device=self._device)
        return _hiding(hidden.triu_(prefill.start + 1), self.cache.dtype)

    def _tensor(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return upload(numbers, torch.int64, self._device)


class _Prefix(NamedTuple):
    """What a chunk needs that attends to earlier ones: blocks int64 [1, m], and a mask [n, start + n]."""

    table: Tensor
    mask: Tensor


def attend_singles(
    cache: KVCache, layer: int, q: Tensor, tables: Tensor, longest: int, mask: Tensor | None
) -> Tensor:
    """q [n, H, hd], one token a sequence, over the first `longest` positions of blocks [n, m] -> [n, H, hd].

    mask: as `seen_mask` makes it. The query heads that share a KV head take the place of query positions.
    """
    n, heads, head_dim = q.shape
    k, v = cache.gather(layer, tables)
    out = F.scaled_dot_product_attention(
        q.view(n, k.shape[1], -1, head_dim), k[:, :, :longest], v[:, :, :longest], attn_mask=mask
    )
    return out.reshape(n, heads, head_dim)


def seen_mask(lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """[n, 1, 1, longest]: a sequence sees as many positions as `lengths` [n] says."""
    hidden = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return _hiding(hidden, dtype)[:, None, None, :]


def _hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen, -inf where it is hidden, in the dtype of keys and queries."""
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill_(hidden, float("-inf"))


def _padded(tables: list[list[int]]) -> list[list[int]]:
    """All of one length, each padded with its own last block: padding is masked, but a NaN shows through a mask, and
    another sequence's block may hold one."""
    widest = max(map(len, tables), default=0)
    return [table + table[-1:] * (widest - len(table)) for table in tables]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A chunk that begins its sequence: nothing but itself to attend to."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
