"""Choosing rows by product keys: the exact, deterministic top-k over the num_keys ** 2 sums of two half scores.

    half 0 scores [N] ── top-k ──┐   sums of rank pairs (a, b) with (a+1)(b+1) <= k
    half 1 scores [N] ── top-k ──┘   ── top-k ── row id = key0 * N + key1

A pair of ranks (a, b) is beaten or equalled by the (a+1)(b+1) - 1 other pairs at or above it, so no other pair can
enter the top k: about k ln k sums instead of k * k. Ties: the smaller key among half scores, the smaller row id
among sums. (Product keys: Lample et al. 2019, "Large Memory Layers with Product Keys", section 3.)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from memlane.native import select_product_keys

__all__ = ["Selection", "select", "select_reference"]

_LOW = 0xFFFFFFFF


class Selection(NamedTuple):
    """Rows chosen for each of M queries, best first. ids int64 [M, k], scores fp32 [M, k] (before the softmax)."""

    ids: Tensor
    scores: Tensor


def select(scores: Tensor, k: int) -> Selection:
    """scores fp32 [M, 2, N] of both halves -> the k best rows of each query.

    Gradients flow from the chosen scores into `scores`; the choice itself has none.
    """
    detached = scores.detach()
    if detached.device.type == "cpu":
        chosen = Selection(*select_product_keys(detached, k))
    else:
        chosen = select_reference(detached, k)
    if not (scores.requires_grad and torch.is_grad_enabled()):
        return chosen
    return Selection(chosen.ids, pair_scores(scores, chosen.ids))


def pair_scores(scores: Tensor, ids: Tensor) -> Tensor:
    """The sums of half scores [M, 2, N] that belong to rows ids [M, k], fp32 [M, k]; differentiable."""
    n = scores.shape[-1]
    return scores[:, 0].gather(1, ids // n) + scores[:, 1].gather(1, ids % n)


def select_reference(scores: Tensor, k: int, *, sum_dtype: torch.dtype = torch.float32) -> Selection:
    """The plain torch twin of `select`, on any device, without gradients.

    sum_dtype: round pair sums to this dtype before comparing them, as bf16 kernels do.
    """
    n = scores.shape[-1]
    keys = _best(scores.to(torch.float32), torch.arange(n, device=scores.device), k)
    rank0, rank1 = _rank_pairs(k, str(scores.device))
    key0, key1 = keys[:, 0].index_select(1, rank0), keys[:, 1].index_select(1, rank1)
    rows = key0 * n + key1
    sums = pair_scores(scores, rows).to(sum_dtype).to(torch.float32)
    ids = _best(sums, rows, k)
    return Selection(ids, pair_scores(scores, ids).to(sum_dtype).to(torch.float32))


@functools.lru_cache(maxsize=16)
def _rank_pairs(k: int, device: str) -> tuple[Tensor, Tensor]:
    pairs = [(a, b) for a in range(k) for b in range(k // (a + 1))]
    both = torch.tensor(pairs, dtype=torch.int64, device=device)
    return both[:, 0], both[:, 1]


def _best(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Labels (integers in [0, 2**32), broadcast against scores) of the k largest scores, best first, ties by smaller label.

    torch.topk leaves ties unspecified, so score and label are packed into one int64 without ties:

        | order-preserving score bits (32, signed) | 2**32 - 1 - label (32) |
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 must tie with 0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    packed = (order << 32) + (_LOW - labels)
    return _LOW - (packed.topk(k, dim=-1).values & _LOW)
