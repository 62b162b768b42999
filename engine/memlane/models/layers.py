"""The dense parts shared by every architecture: RMSNorm, rotary embedding, SwiGLU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlane.native import kernel_variant, matvec

__all__ = ["FeedForward", "Linear", "RMSNorm", "Rope", "linear", "resolve", "rms_norm", "rope_at", "rotate"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, which is its twin: x [T, in], weight [out, in], bias [out] -> [T, out].

    A single token in fp32 on a CPU goes through the native core: torch's product of a matrix and one vector reads weights
    at a third of the memory's speed on some processors.
    """
    ours = (
        len(x) == 1
        and len(weight) >= 4
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
    )
    if not ours or torch.compiler.is_compiling() or torch.is_grad_enabled() or kernel_variant() == "scalar":
        return F.linear(x, weight, bias)
    out = torch.empty(1, len(weight))
    matvec(weight.detach().numpy(), x.contiguous().view(-1).numpy(), out.view(-1).numpy())
    return out if bias is None else out.add_(bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x ** 2) + eps) * gain, computed in fp32 with one rounding to x's dtype at the end."""
    return F.rms_norm(x.float(), (x.shape[-1],), gain.float(), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a gain of its own."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: w_down(silu(gate) * up). `w_gate_up` holds gate rows first, then up rows. No biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w_gate_up = Linear(hidden, 2 * intermediate, bias=False)
        self.w_down = Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.w_down(F.silu(gate) * up)
        return out


def resolve(token_ids: Tensor, previous: Tensor) -> Tensor:
    """Token ids int64 [T], in which -(row + 1) stands for what the step before sampled: `previous` int64 [m] at that row.

    Needs no host: may be captured in a graph.
    """
    # In two's complement it is ~row. Known tokens are looked up too, and that must not go astray.
    rows = token_ids.bitwise_not().clamp_(0, len(previous) - 1)
    return torch.where(token_ids < 0, previous.index_select(0, rows), token_ids)


class Rope(NamedTuple):
    """Cosines and sines of a step's positions, fp32 [T, 1, head_dim / 2] (1: all heads alike)."""

    cos: Tensor
    sin: Tensor


def rope_at(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """Angles position * theta ** (-2i / head_dim), i < head_dim / 2, in fp32 whatever the model's dtype."""
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = torch.outer(positions.to(torch.float32), 1.0 / (theta ** (even / head_dim))).unsqueeze(1)
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
