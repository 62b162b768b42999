"""The dense parts of a block as few kernels: torch.compile over pure functions, compiled once and shared by all layers.

launches of a dense layer beside attention, as torch 2.13 generates code for compute capability 9.0:

                 plain torch                 several tokens            a single one
  project        norm 3, product, rotate 18  norm, product, rotate 2   norm, product, rotate
  feed_forward   product, add, norm 3,       product, add + norm,      product, add + norm,
                 product, silu 2,            product, silu,            product with the norm's scale,
                 product, add                product, add              product with silu and add
                                    about 34                     10                               7

For a single token products are no matrix products but sums: inductor writes and tunes them itself, and joins what comes
before and after them (as gpt-fast does: its config.coordinate_descent_tuning is what turns that on).

Knows nothing of modules: `Block` calls these instead of its own, which stay the twin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlane.models.config import ModelConfig
from memlane.models.layers import Rope, rms_norm, rope_at

__all__ = ["Fused", "FusedHeads"]

logger = logging.getLogger(__name__)


class FusedHeads(NamedTuple):
    """What attention gets: q [T, H, hd], k and v [T, KV, hd], q and k rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


def project(
    x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, wqkv: Tensor,
    heads: int, kv_heads: int, interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [T, D] -> norm, product, rotation: q [T, H, hd], k and v [T, KV, hd]."""
    qkv = F.linear(rms_norm(x, gain, eps), wqkv).view(x.shape[0], heads + 2 * kv_heads, -1)
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    q, k = torch.split(_rotate(qk, cos, sin, interleaved), [heads, kv_heads], dim=1)
    return q.contiguous(), k, v  # a kernel more, except for a single token


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As `rotate`, but every element of the result is made in one place: what is put together takes a kernel a part."""
    tokens, heads, head_dim = x.shape
    shape = (tokens, heads, head_dim // 2, 2) if interleaved else (tokens, heads, 2, head_dim // 2)
    pair = -1 if interleaved else -2
    wide = x.float().view(shape)
    first = torch.arange(2, device=x.device).view((2,) if interleaved else (2, 1)) == 0
    cos, sin = cos.unsqueeze(pair), sin.unsqueeze(pair)
    turned = wide * cos + wide.flip(pair) * torch.where(first, -sin, sin)
    return turned.to(x.dtype).view(x.shape)


def add_attention(x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D], attended [T, H, hd] -> what goes on, and its norm, which a memory layer gets; both [T, D]."""
    h = x + F.linear(attended.flatten(1), wo)
    return h, rms_norm(h, gain, eps)


def feed_forward(
    x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float
) -> Tensor:
    """All that a block does after attention, where it has a feed-forward part: [T, D]."""
    h, normed = add_attention(x, attended, wo, gain, eps)
    gate, up = F.linear(normed, w_gate_up).chunk(2, dim=-1)
    return h + F.linear(F.silu(gate) * up, w_down)


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return rms_norm(x, gain, eps)


def angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    cos, sin = rope_at(positions, head_dim, theta)
    return cos, sin


class _Compiled:
    """A function whose tensors of tokens come first, compiled for a single token and for any greater number of them."""

    def __init__(self, function: Callable[..., Any], tokenwise: int, backend: str) -> None:
        self._tokenwise = tokenwise
        tuned: dict[str, Any] | None = {"coordinate_descent_tuning": True} if backend == "inductor" else None
        self._single = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=tuned)
        self._many = torch.compile(function, fullgraph=True, backend=backend)

    def __call__(self, *args: Any) -> Any:
        if args[0].shape[0] == 1:
            return self._single(*args)
        for x in args[: self._tokenwise]:
            torch._dynamo.mark_dynamic(x, 0)
        return self._many(*args)


class Fused:
    """The compiled functions of one model. Results are those of the plain ones within rounding."""

    def __init__(self, config: ModelConfig, backend: str = "inductor") -> None:
        """backend: of torch.compile. Compiles nothing yet: each function when it is first called. See Transformer.fuse."""
        self._config = config
        self._project = _Compiled(project, tokenwise=3, backend=backend)
        self._add_attention = _Compiled(add_attention, tokenwise=2, backend=backend)
        self._feed_forward = _Compiled(feed_forward, tokenwise=2, backend=backend)
        self._norm = _Compiled(norm, tokenwise=1, backend=backend)
        self._angles = _Compiled(angles, tokenwise=1, backend=backend)

    def rope(self, positions: Tensor) -> Rope:
        """As `rope_at`."""
        return Rope(*self._angles(positions, self._config.head_dim, self._config.rope_theta))

    def project(self, x: Tensor, rope: Rope, gain: Tensor, wqkv: Tensor) -> FusedHeads:
        """x [T, D] before the norm -> q, k, v."""
        c = self._config
        return FusedHeads(
            *self._project(x, *rope, gain, wqkv, c.num_heads, c.num_kv_heads, c.rope_interleaved, c.norm_eps)
        )

    def add_attention(self, x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D], attended [T, H, hd] -> x plus the product, and its norm."""
        h, normed = self._add_attention(x, attended, wo, gain, self._config.norm_eps)
        return h, normed

    def feed_forward(
        self, x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, w_gate_up: Tensor, w_down: Tensor
    ) -> Tensor:
        """x [T, D], attended [T, H, hd] -> the block's output [T, D]."""
        out: Tensor = self._feed_forward(x, attended, wo, gain, w_gate_up, w_down, self._config.norm_eps)
        return out

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """As RMSNorm."""
        out: Tensor = self._norm(x, gain, self._config.norm_eps)
        return out
