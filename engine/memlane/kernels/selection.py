"""Product-key selection on half scores: launches kernels/jit/selection.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from memlane.kernels.jit import selection as jit

__all__ = ["MAX_K", "choose", "select"]

MAX_K = 128


def select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids, sums = _launch(scores[:, None], k, None, softmax=False)
    return ids, sums


def choose(scores: Tensor, k: int, log_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tokens, heads = scores.shape[:2]
    ids, weights = _launch(scores, k, log_scale, softmax=True)
    return ids.view(tokens, heads * k), weights.view(tokens, heads * k)


def _shape(n, k, warps=None):
    kp = max(2, 1 << (k - 1).bit_length())
    pairs = sum(k // (a + 1) for a in range(k))
    tile = max(128, 1 << (n - 1).bit_length())
    lanes = max(32, tile // 32)
    pair_tile = max(128, 1 << (pairs - 1).bit_length())
    pair_lanes = max(32, pair_tile // 32)
    return dict(
        N=n, K=k, KP=kp, TILE=tile, LANES=lanes, PAIRS=pairs, PAIR_TILE=pair_tile, PAIR_LANES=pair_lanes
    ), warps or max(1, min(32, lanes // 32))


def _launch(scores, k, log_scale, softmax):
    tokens, heads, _, n = scores.shape
    ids = torch.empty(tokens * heads, k, dtype=torch.int64, device=scores.device)
    out = torch.empty(tokens * heads, k, dtype=torch.float32, device=scores.device)
    sizes, warps = _shape(n, k)
    if tokens * heads:
        jit.choose[(tokens * heads,)](
            scores,
            _rank_pairs(k, str(scores.device)),
            log_scale if log_scale is not None else out,
            ids,
            out,
            heads,
            *scores.stride()[:3],
            SOFTMAX=softmax,
            SCALED=log_scale is not None,
            num_warps=warps,
            **sizes,
        )
    return ids, out


@functools.lru_cache(maxsize=16)
def _rank_pairs(k: int, device: str) -> Tensor:
    pairs = [a | b << 16 for a in range(k) for b in range(k // (a + 1))]
    return torch.tensor(pairs, dtype=torch.int32, device=device)
