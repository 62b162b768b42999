"""torch's scaled_dot_product_attention over gathered blocks: the fallback everywhere, and what the others must agree with.

A captured gather has a fixed size, so decode steps are padded to a length on a ladder: 256, 512, 1024, …
"""

from __future__ import annotations

from torch import Tensor

from memlane.models.attention import Attention, Lines
from memlane.runner.batch import Batch
from memlane.runner.decode_batch import DecodeBatch
from memlane.runner.kv import KVCache
from memlane.runner.paged import PagedAttention, attend_singles, seen_mask

__all__ = ["SdpaBackend"]

_FIRST_RUNG = 256


class SdpaBackend:
    """Any device, dtype and block size."""

    name = "sdpa"
    block_size: int | None = None

    def attention(self, cache: KVCache, batch: Batch) -> Attention:
        return PagedAttention(cache, batch)

    def decode(self, cache: KVCache, static: DecodeBatch) -> Attention:
        return _StaticAttention(cache, static)

    def prepare(self, static: DecodeBatch) -> None:
        """Nothing: the mask is made on the device."""

    def bound(self, longest: int, most: int) -> int:
        rung = _FIRST_RUNG
        while rung < longest:
            rung *= 2
        return min(rung, most)


class _StaticAttention:
    """PagedAttention of single tokens, always padded to `static.longest`."""

    def __init__(self, cache: KVCache, static: DecodeBatch) -> None:
        self.cache, self.static = cache, static
        self._mask: Tensor | None = None

    def lines(self, layer: int) -> Lines:
        return self.cache.lines(layer, self.static.slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool = False) -> Tensor:
        """q [n, H, hd], k and v [n, KV, hd] -> [n, H, hd]."""
        static = self.static
        if layer == 0:
            self._mask = seen_mask(static.lengths, static.longest, self.cache.dtype)
        if not written:
            self.cache.write(layer, static.slots, k, v)
        return attend_singles(self.cache, layer, q, static.tables, static.longest, self._mask)
