"""Attention as the Transformer sees it, and the plain causal one for training and for checking the paged one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Attention", "CausalAttention", "Lines"]


class Lines(NamedTuple):
    """Where a layer's keys and values are to be written: lines [slots, 2 * KV, hd], the T tokens' at slots int64 [T].

    A line holds the keys of all heads, then their values. The last line may be written by anyone, and is never read.
    """

    lines: Tensor
    slots: Tensor


class Attention(Protocol):
    """What a step gives the model: how its tokens attend. Owns the key/value cache, if there is one."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool = False) -> Tensor:
        """q [T, H, hd], k and v [T, KV, hd], q and k rotated -> [T, H, hd]. Softmax scale is hd ** -0.5.

        written: k and v lie where `lines` says already.
        """

    def lines(self, layer: int) -> Lines | None:
        """Where whoever computes keys and values may write them itself; None where there is no such place."""


class CausalAttention:
    """Full causal attention over `batch` sequences of `length` tokens each, without a cache; differentiable.

    Tokens are the sequences one after another, T = batch * length. With `keep` (int64 [T], ascending) the model gets
    only those cells of the batch x length grid, so that padding costs nothing outside attention. Padding must lie to
    the right of a sequence's tokens: the causal mask then hides it.
    """

    def __init__(self, batch: int, length: int, keep: Tensor | None = None) -> None:
        self.batch, self.length, self.keep = batch, length, keep

    def lines(self, layer: int) -> Lines | None:
        return None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool = False) -> Tensor:
        heads, kv_heads = q.shape[1], k.shape[1]
        out = F.scaled_dot_product_attention(
            self._grid(q), self._grid(k), self._grid(v), is_causal=True, enable_gqa=heads != kv_heads
        )
        flat = out.transpose(1, 2).reshape(self.batch * self.length, heads, -1)
        return flat if self.keep is None else flat.index_select(0, self.keep)

    def _grid(self, x: Tensor) -> Tensor:
        """[T, heads, hd] -> [batch, heads, length, hd], zeros where tokens were left out."""
        if self.keep is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy(0, self.keep, x)
        return x.view(self.batch, self.length, *x.shape[1:]).transpose(1, 2)
