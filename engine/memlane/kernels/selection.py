"""Product-key selection on half scores: launches kernels/jit/selection.py. Its twin is models/product_keys.py.

Nothing here waits for the device, so launches can be captured; the table of rank pairs of a k goes to the device at the
first launch, which must not be a captured one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from memlane.kernels.aot import Compilation
from memlane.kernels.jit import selection as jit

__all__ = ["AOT", "Chosen", "choose", "fits", "select"]

_MAX_K = 128  # about k ln k pairs lie in registers
_MAX_KEYS = 65536  # of a half: a row id has 32 bits

# Numbers that a word of the kernel's tiles has bits for: fewer lanes would not do.
_WORD = 32


class Chosen(NamedTuple):
    """Rows, best first: ids int64, values fp32 (scores or weights)."""

    ids: Tensor
    values: Tensor


def fits(n: int, k: int) -> bool:
    """Whether there is a kernel for the k best of n * n rows."""
    return 1 <= k <= min(n, _MAX_K) and n <= _MAX_KEYS


def select(scores: Tensor, k: int) -> Chosen:
    """scores fp32 [M, 2, N] of both halves -> the k best rows of each query, ids and scores [M, k].

    As `select_reference`, bit for bit, where no score is NaN; a NaN still gives rows of the table. ValueError unless
    `fits(N, k)`.
    """
    return _launch(scores.unsqueeze(1), k, None, softmax=False)


def choose(scores: Tensor, k: int, log_scale: Tensor | None = None) -> Chosen:
    """scores fp32 [T, H, 2, N] -> the rows that `select` gives and the softmax over each head's k scores, [T, H*k].

    log_scale fp32 [H]: scores are multiplied by its exponential first. The keys of a half must lie one after another,
    whatever the other strides. ValueError unless `fits(N, k)`.
    """
    tokens, heads = scores.shape[:2]
    ids, weights = _launch(scores, k, log_scale, softmax=True)
    return Chosen(ids.view(tokens, heads * k), weights.view(tokens, heads * k))


def _launch(scores: Tensor, k: int, log_scale: Tensor | None, *, softmax: bool) -> Chosen:
    if scores.dtype != torch.float32:
        raise TypeError(f"scores must be fp32, not {scores.dtype}")
    tokens, heads, halves, n = scores.shape
    if halves != 2 or not fits(n, k):
        raise ValueError(f"cannot choose {k} rows by scores of {list(scores.shape)}")
    if scores.stride(3) != 1:
        scores = scores.contiguous()
    ids = torch.empty(tokens * heads, k, dtype=torch.int64, device=scores.device)
    values = torch.empty(tokens * heads, k, dtype=torch.float32, device=scores.device)
    if tokens * heads:
        constants = _constants(n, k)
        kept = torch.empty(tokens * heads, constants["KEPT"], dtype=torch.int64, device=scores.device)
        jit.choose[(tokens * heads,)](
            scores,
            _rank_pairs(k, str(scores.device)),
            values if log_scale is None else log_scale.detach(),
            ids,
            values,
            kept,
            heads,
            *scores.stride()[:3],
            SOFTMAX=softmax,
            SCALED=log_scale is not None,
            **constants,
            **_options(n, k),
        )
    return Chosen(ids, values)


def _constants(n: int, k: int) -> dict[str, int]:
    pairs = len(_pairs(k))
    tile, pair_tile, slots = _power_of_two(n, 128), _power_of_two(pairs, 128), _power_of_two(k, 2)
    lanes, pair_lanes = max(32, tile // _WORD), max(32, pair_tile // _WORD)
    alone = _options(n, k)["num_warps"] == 1
    return {
        "N": n,
        "K": k,
        "SLOTS": slots,
        "TILE": tile,
        "LANES": lanes,
        "PAIRS": pairs,
        "PAIR_TILE": pair_tile,
        "PAIR_LANES": pair_lanes,
        # words and counts of both halves; later the best of both and words and counts of pairs
        "KEPT": 0 if alone else max(2 * lanes, 2 * slots + pair_lanes),
        "ALONE": alone,
    }


def _options(n: int, k: int) -> dict[str, int]:
    """A thread keeps 32 numbers of each half; pairs of more than 64 rows are shared by four warps."""
    warps = min(32, max(1, _power_of_two(n, 128) // (32 * _WORD), 4 * (k > 64)))
    # Without spills, and room for 16 warps. Halves that no vector load fits need an address a number.
    return {"num_warps": warps, "maxnreg": 128} if warps <= 16 and n % 16 == 0 else {"num_warps": warps}


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


@functools.lru_cache(maxsize=16)
def _pairs(k: int) -> list[int]:
    """Pairs of ranks that can be among the best k, as rank0 | rank1 << 16."""
    return [first | second << 16 for first in range(k) for second in range(k // (first + 1))]


@functools.lru_cache(maxsize=16)
def _rank_pairs(k: int, device: str) -> Tensor:
    return torch.tensor(_pairs(k), dtype=torch.int32, device=device)


def _compilation(n: int, k: int) -> Compilation:
    pointers = {
        "scores": "*fp32",
        "pairs": "*i32",
        "log_scale": "*fp32",
        "ids": "*i64",
        "out": "*fp32",
        "kept": "*i64",
    }
    # Strides as a product of 256 tokens leaves them: constants, since that they are multiples of 16 is what counts.
    strides = {"stride_token": n, "stride_head": 2 * 256 * n, "stride_half": 256 * n}
    constants = {**_constants(n, k), **strides, "SOFTMAX": True, "SCALED": True}
    return Compilation(
        f"choose {k} of {n}**2", jit.choose, {**pointers, "heads": "i32"}, constants, **_options(n, k)
    )


AOT = [_compilation(n, k) for n, k in ((256, 8), (1024, 32), (1024, 128), (4096, 32))]
