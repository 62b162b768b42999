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

    Masks are made once for all layers, as numbers to be added to the scores: each layer would make that of a bool mask.
    """

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self.cache, self.batch = cache, batch
        self._mask: Tensor | None = None
        if batch.singles > 1:
            seen = torch.arange(batch.longest, device=batch.lengths.device) < batch.lengths[:, None]
            self._mask = self._hiding(~seen)[:, None, None, :]
        self._prefill_masks = [
            None if prefill.table is None else self._prefill_mask(prefill) for prefill in batch.prefills
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, hd], k and v [T, KV, hd] -> [T, H, hd]."""
        self.cache.write(layer, self.batch.slots, k, v)
        if not self.batch.prefills:
            return self._singles(layer, q)
        parts = [self._singles(layer, q[: self.batch.singles])] if self.batch.singles else []
        for prefill, mask in zip(self.batch.prefills, self._prefill_masks, strict=True):
            part = slice(prefill.begin, prefill.end)
            if prefill.table is None or mask is None:
                parts.append(_attend(q[part], k[part], v[part]))
            else:
                parts.append(self._prefill(layer, q[part], prefill.table, mask))
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

    def _prefill(self, layer: int, q: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        """q [n, H, hd] over the positions of a sequence up to its own, which lie in the blocks of `table`."""
        length = mask.shape[1]
        k, v = self.cache.gather(layer, table)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[:, :, :length],
            v[:, :, :length],
            attn_mask=mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)

    def _prefill_mask(self, prefill: Prefill) -> Tensor:
        """[n, start + n]: key j is seen by query i, which is at position start + i, if j <= start + i."""
        n = prefill.end - prefill.begin
        hidden = torch.ones(n, prefill.start + n, dtype=torch.bool, device=self.batch.slots.device)
        return self._hiding(hidden.triu_(prefill.start + 1))

    def _hiding(self, hidden: Tensor) -> Tensor:
        """0 where a key is seen, -inf where it is hidden, in the dtype of keys and queries."""
        zeros = torch.zeros(hidden.shape, dtype=self.cache.layers[0].dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A chunk that begins its sequence: nothing but itself to attend to."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
