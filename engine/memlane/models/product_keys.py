"""Choosing rows by product keys: the exact, deterministic top-k over the num_keys ** 2 sums of two half scores.

    half 0 scores [N] ── top-k ──┐   sums of rank pairs (a, b) with (a+1)(b+1) <= k
    half 1 scores [N] ── top-k ──┘   ── top-k ── row id = key0 * N + key1

A pair of ranks (a, b) is beaten or equalled by the (a+1)(b+1) - 1 other pairs at or above it, so no other pair can
enter the top k: about k ln k sums instead of k * k. Ties: the smaller key among half scores, the smaller row id
among sums. (Product keys: Lample et al. 2019, "Large Memory Layers with Product Keys", section 3.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from memlane.native import kernel_variant, search_product_keys, select_product_keys

__all__ = [
    "Choice",
    "Selection",
    "choose",
    "choose_reference",
    "ieee_products",
    "search",
    "search_reference",
    "select",
    "select_reference",
]

_LOW = 0xFFFFFFFF

# Scores of a whole prefill chunk would take gigabytes (T * H * 2 * N * 4 bytes); without gradients they are made and
# searched in pieces of about this size. The table still sees all tokens of the step in one call.
_SCORE_BYTES = 32 << 20


class Selection(NamedTuple):
    """Rows chosen for each query, best first. ids int64 [..., k], scores fp32 [..., k] (before the softmax)."""

    ids: Tensor
    scores: Tensor


class Choice(NamedTuple):
    """Rows to read for each token, heads one after another. ids int64 [T, H*k], weights fp32 [T, H*k]."""

    ids: Tensor
    weights: Tensor


@contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """Matrix products of fp32 are of fp32 within, whatever the process allows elsewhere: TF32 keeps 10 bits, which flips
    near-ties. Not for two threads at once; a CPU is left as it is."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def choose(query: Tensor, keys: Tensor, k: int, log_scale: Tensor | None = None) -> Choice:
    """The k best rows by score = query . key and the softmax of score * exp(log_scale), head by head.

    query fp32 [T, H, 2, W], keys fp32 [H, 2, N, W], log_scale fp32 [H]. On a GPU, without gradients, a product and one
    kernel.
    """
    differentiable = torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (query, keys, log_scale)
    )
    if differentiable or not _has_kernel(query, keys.shape[2], k):
        return choose_reference(query, keys, k, log_scale)
    from memlane.kernels import selection  # brings Triton

    parts = [selection.choose(scores, k, log_scale) for scores in _half_scores(query, keys)]
    return Choice(*map(_joined, zip(*parts, strict=True)))


def choose_reference(query: Tensor, keys: Tensor, k: int, log_scale: Tensor | None = None) -> Choice:
    """The torch twin of `choose`: `search`, then a softmax. Differentiable."""
    ids, scores = search(query, keys, k)
    if log_scale is not None:
        scores = scores * log_scale.exp()[:, None]
    return Choice(ids.flatten(1), torch.softmax(scores, dim=-1).flatten(1))


def search(query: Tensor, keys: Tensor, k: int) -> Selection:
    """query fp32 [T, H, 2, W], keys fp32 [H, 2, N, W] -> the k best rows by score = query . key, [T, H, k].

    On a CPU, without gradients, natively: what is chosen for a token then depends on no other token.
    """
    differentiable = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad)
    on_cpu = query.device.type == "cpu" and keys.device.type == "cpu"
    # Without vector instructions torch's product is faster; a native block of scores takes four keys.
    if differentiable or not on_cpu or keys.shape[2] < 4 or kernel_variant() == "scalar":
        return search_reference(query, keys, k)
    return Selection(*search_product_keys(query, keys, k))


def search_reference(query: Tensor, keys: Tensor, k: int) -> Selection:
    """The torch twin of `search`, on any device, differentiable. Its scores are torch's own products."""
    heads, n = query.shape[1], keys.shape[2]
    parts = [select(scores.reshape(-1, 2, n), k) for scores in _half_scores(query, keys)]
    ids, scores = map(_joined, zip(*parts, strict=True))
    return Selection(ids.view(-1, heads, k), scores.view(-1, heads, k))


def _half_scores(query: Tensor, keys: Tensor) -> Iterator[Tensor]:
    """The scores of all sub-keys, some tokens at a time: [t, H, 2, N], laid out as the product leaves them."""
    tokens, heads, _, width = query.shape
    n = keys.shape[2]
    planes = query.reshape(tokens, heads * 2, width).transpose(0, 1)  # [H*2, T, W]
    keys = keys.flatten(0, 1).transpose(1, 2)  # [H*2, W, N]
    step = max(1, tokens if torch.is_grad_enabled() else _SCORE_BYTES // (heads * 2 * n * 4))
    for part in torch.split(planes, step, dim=1):
        with ieee_products(part.device):
            scores = torch.bmm(part, keys)
        yield scores.view(heads, 2, -1, n).permute(2, 0, 1, 3)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _has_kernel(scores: Tensor, n: int, k: int) -> bool:
    if scores.device.type != "cuda":
        return False
    from memlane.kernels import selection  # brings Triton

    return selection.fits(n, k)


def select(scores: Tensor, k: int) -> Selection:
    """scores fp32 [M, 2, N] of both halves -> the k best rows of each query.

    Gradients flow from the chosen scores into `scores`; the choice itself has none.
    """
    detached = scores.detach()
    if detached.device.type == "cpu":
        chosen = Selection(*select_product_keys(detached, k))
    elif _has_kernel(detached, detached.shape[-1], k):
        from memlane.kernels import selection  # brings Triton

        chosen = Selection(*selection.select(detached, k))
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
