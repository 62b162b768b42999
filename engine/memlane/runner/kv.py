"""Where keys and values lie.

One tensor a layer, [blocks, block_size, 2 * kv_heads, head_dim]: the keys of a token's heads, then its values, so that
a token is written, and a block is gathered, in one piece.

    block 0            block 1
    | K0 K1 V0 V1 |    | K0 K1 V0 V1 |     slot = block * block_size + offset
    | K0 K1 V0 V1 |    | ...                names one line

After the blocks that sequences get lies one more, the sink: rows that only fill up a batch of fixed size write there,
and nobody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memlane.models import ModelConfig
from memlane.models.attention import Lines
from memlane.runner.transfer import upload

__all__ = ["KVCache"]


class KVCache:
    """The tensors of all layers. Starts as zeros and never holds anything non-finite for long (see `clear`)."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.blocks, self.block_size, self.dtype = blocks, block_size, dtype
        self.layers = [
            torch.zeros(
                blocks + 1, block_size, 2 * config.num_kv_heads, config.head_dim, dtype=dtype, device=device
            )
            for _ in range(config.num_layers)
        ]

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes in all layers together."""
        return config.num_layers * block_size * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize

    @property
    def sink(self) -> int:
        """The slot that may be written by any number of tokens at once, and is never read."""
        return self.blocks * self.block_size

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def lines(self, layer: int, slots: Tensor) -> Lines:
        """Where the keys and values of tokens with these slots int64 [T] go, for code that writes them itself."""
        return Lines(self.layers[layer].flatten(0, 1), slots)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [T, kv_heads, head_dim] into slots int64 [T]."""
        self.layers[layer].flatten(0, 1).index_copy_(0, slots, torch.cat((k, v), dim=1))

    def gather(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Block tables int64 [n, m] -> keys and values, each [n, kv_heads, m * block_size, head_dim] (views)."""
        n, m = tables.shape
        kv = self.layers[layer].index_select(0, tables.flatten())
        k, v = kv.view(n, m * self.block_size, -1, kv.shape[-1]).transpose(1, 2).chunk(2, dim=1)
        return k, v

    def views(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all blocks, each [blocks + 1, block_size, kv_heads, head_dim], with equal strides."""
        k, v = self.layers[layer].chunk(2, dim=2)
        return k, v

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero these blocks. A masked position has weight 0, but 0 * NaN is NaN: leftovers must be finite."""
        if blocks:
            index = upload(blocks, torch.int64, self.layers[0].device)
            for layer in self.layers:
                layer.index_fill_(0, index, 0.0)
