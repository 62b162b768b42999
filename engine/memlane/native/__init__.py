"""The native core: row index, row reader and CPU kernels. Knows bytes, slots and row ids; knows no model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memlane.native import _core
from memlane.native._core import (
    Arena,
    ReadRequest,
    RowIndex,
    RowReader,
    RowView,
    SlotStates,
    StackDistances,
    cache_policies,
    crc32c,
    crc32c_blocks,
    crc32c_tables,
    crc32c_variant,
    force_kernel_variant,
    get_threads,
    kernel_variant,
    kernel_variants,
    matvec,
    row_index_bytes,
    set_threads,
)

__all__ = [
    "Arena",
    "ReadRequest",
    "RowIndex",
    "RowReader",
    "RowView",
    "SlotStates",
    "StackDistances",
    "cache_policies",
    "crc32c",
    "crc32c_blocks",
    "crc32c_tables",
    "crc32c_variant",
    "force_kernel_variant",
    "get_threads",
    "kernel_variant",
    "kernel_variants",
    "matvec",
    "row_index_bytes",
    "search_product_keys",
    "select_product_keys",
    "set_threads",
]


def select_product_keys(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k product keys with the largest sum of sub-key scores, exactly (Lample et al. 2019, section 3.2).

    scores: fp32 [m, 2, n] on the CPU, n <= 65,536: the score of each sub-key of both halves.
    Returns (ids int64 [m, k], sums fp32 [m, k]), best first; id = first sub-key * n + second sub-key.
    Ties: a half's top k prefer the smaller sub-key; of their pairs those with (rank1 + 1)(rank2 + 1) <= k compete,
    equal sums prefer the smaller id. Needs 1 <= k <= n, else ValueError. Not differentiable.
    """
    if scores.dtype != torch.float32 or scores.device.type != "cpu":
        raise TypeError(f"scores must be fp32 on the CPU, not {scores.dtype} on {scores.device}")
    if scores.dim() != 3 or scores.shape[1] != 2:
        raise ValueError(f"scores must be [m, 2, keys], not {list(scores.shape)}")
    ids, sums = np.empty((scores.shape[0], k), np.int64), np.empty((scores.shape[0], k), np.float32)
    _core.select_product_keys(scores.detach().contiguous().numpy(), ids, sums)
    return torch.from_numpy(ids), torch.from_numpy(sums)


def search_product_keys(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores the sub-keys of every head and selects as `select_product_keys` does; scores never leave the cache.

    query: fp32 [tokens, heads, 2, width]; keys: fp32 [heads, 2, n, width], 4 <= n <= 65,536, both on the CPU. A score
    is query . key as 16 interleaved partial sums of fused multiply-adds, added in a fixed tree: its bits depend on
    neither batch, threads nor instruction set. Returns (ids int64, sums fp32), both [tokens, heads, k], best first.
    Needs 1 <= k <= n and at least one number a key, else ValueError. Not differentiable.
    """
    for name, tensor in (("query", query), ("keys", keys)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise TypeError(f"{name} must be fp32 on the CPU, not {tensor.dtype} on {tensor.device}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have four dimensions, not {list(tensor.shape)}")
    shape = (query.shape[0], query.shape[1], k)
    ids, sums = np.empty(shape, np.int64), np.empty(shape, np.float32)
    _core.search_product_keys(
        query.detach().contiguous().numpy(), keys.detach().contiguous().numpy(), ids, sums
    )
    return torch.from_numpy(ids), torch.from_numpy(sums)
