"""The dense parts shared by every architecture: RMSNorm, rotary embedding, SwiGLU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeedForward", "RMSNorm", "Rope", "rope_at", "rotate"]


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x ** 2) + eps) * gain, computed in fp32 with one rounding to x's dtype at the end."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: w_down(silu(gate) * up). `w_gate_up` holds gate rows first, then up rows. No biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w_gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.w_down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.w_down(F.silu(gate) * up)
        return out


class Rope(NamedTuple):
    """Cosines and sines of a step's positions, fp32 [T, 1, head_dim / 2] (1: all heads alike)."""

    cos: Tensor
    sin: Tensor


def rope_at(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """Angles position * theta ** (-2i / head_dim), i < head_dim / 2, in fp32 whatever the model's dtype."""
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = torch.outer(positions.to(torch.float32), 1.0 / (theta ** (even / head_dim)))[:, None, :]
    return Rope(angles.cos(), angles.sin())


def rotate(x: Tensor, rope: Rope, *, interleaved: bool) -> Tensor:
    """Rotate the pairs of x [T, heads, head_dim]: (2i, 2i+1) if interleaved, else (i, i + head_dim/2). fp32 inside."""
    wide = x.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    turned = (first * rope.cos - second * rope.sin, first * rope.sin + second * rope.cos)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return out.to(x.dtype)
