"""Attention over KV blocks: the maths of models.attention.CausalAttention, reading what earlier steps wrote."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memlane.runner.batch import Batch, Prefill
from memlane.runner.kv import KVCache

__all__ = ["PagedAttention"]


class PagedAttention:
    """The attention of one step. Writes the step's keys and values first, then reads each sequence's blocks.

    Single tokens go together, padded to the longest of them; longer chunks one sequence at a time. Writing the same
    step twice is harmless: a step may be run again after a row could not be read.
    """

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self.cache, self.batch = cache, batch
        self._mask: Tensor | None = None
        if batch.singles > 1:
            padded = torch.arange(batch.tables.shape[1] * cache.block_size, device=batch.lengths.device)
            self._mask = (padded[: batch.longest] < batch.lengths[:, None])[:, None, None, :]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, hd], k and v [T, KV, hd] -> [T, H, hd]."""
        self.cache.write(layer, self.batch.slots, k, v)
        if not self.batch.prefills:
            return self._singles(layer, q)
        parts = [self._singles(layer, q[: self.batch.singles])] if self.batch.singles else []
        for prefill in self.batch.prefills:
            part = slice(prefill.begin, prefill.end)
            if prefill.table is None:
                parts.append(_attend(q[part], k[part], v[part]))
            else:
                parts.append(self._prefill(layer, q[part], prefill, prefill.table))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _singles(self, layer: int, q: Tensor) -> Tensor:
        """q [n, H, hd]. The query heads that share a KV head take the place of query positions."""
        n, heads, head_dim = q.shape
        k, v = self.cache.gather(layer, self.batch.tables)
        longest = self.batch.longest
        out = F.scaled_dot_product_attention(
            q.view(n, k.shape[1], -1, head_dim), k[:, :, :longest], v[:, :, :longest], attn_mask=self._mask
        )
        return out.reshape(n, heads, head_dim)

    def _prefill(self, layer: int, q: Tensor, prefill: Prefill, table: Tensor) -> Tensor:
        """q [n, H, hd] at positions start … start + n - 1; key j is seen by query i if j <= start + i."""
        n, length = q.shape[0], prefill.start + q.shape[0]
        k, v = self.cache.gather(layer, table)
        mask = torch.ones(n, length, dtype=torch.bool, device=q.device).tril_(prefill.start)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[:, :, :length],
            v[:, :, :length],
            attn_mask=mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A chunk that begins its sequence: nothing but itself to attend to."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
