"""The dense parts of a block as pure functions that a compiler makes few kernels of, for a single token and for several.

Products with one token are written as sums over the columns of the weights. Inductor then makes each of them one kernel
that reads the weights once, with all that comes before and after them in it: the norm (every program works it out anew:
a row of 1,024 numbers costs less than a launch), silu, the residual. What several kernels would each work out again is
made a result of the function, which has it stored once.

Written for tracing on a device that is not there, too (see benchmarks/launches.py): subscripts are not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlane.models.layers import resolve, rms_norm, rope_at
from memlane.models.memory import LayerWeights

__all__ = ["RotaryHeads"]


class RotaryHeads(NamedTuple):
    """Heads of queries, keys and values, and whether pairs of numbers that rotate together are neighbours."""

    heads: int
    kv_heads: int
    interleaved: bool


# --- sums ---


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, in] or [out, in], the same in every row, weight [out, in] -> fp32 [out]."""
    return (x.float() * weight.float()).sum(-1)


def normed_rows(x: Tensor, gain: Tensor, eps: float, rows: int) -> Tensor:
    """x [1, D] -> `rms_norm` of it, over and over: [rows, D]. Rounded as there."""
    wide = x.float().expand(rows, x.shape[-1])
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain.float()).to(x.dtype)


def with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.float()


# --- beginning of a step ---


def begin(
    token_ids: Tensor, positions: Tensor, previous: Tensor, embedding: Tensor, head_dim: int, theta: float
) -> tuple[Tensor, Tensor]:
    """token_ids, positions int64 [T] -> x [T, D] and the angles' cosines and sines [T, 2, hd / 2].

    Token ids below 0 stand for rows of `previous` int64 [m]: see `resolve`.
    """
    tokens = resolve(token_ids, previous)
    x = F.embedding(tokens, embedding)
    cos, sin = rope_at(positions, head_dim, theta)
    return x, torch.where(torch.arange(2, device=x.device).view(2, 1) == 0, cos, sin)  # one kernel, not two


# --- before attention ---


def project(
    x: Tensor, rope: Tensor, slots: Tensor, lines: Tensor, gain: Tensor, wqkv: Tensor,
    shape: RotaryHeads, eps: float,
) -> Tensor:  # fmt: skip
    """x [T, D] -> norm, product, rotation [T, H + 2 KV, hd]: q, k, v; k and v are written to `lines` too.

    lines [slots, 2 KV, hd]: those of `slots` int64 [T] get the tokens' keys and values, and the last one whatever.
    """
    return _place(F.linear(rms_norm(x, gain, eps), wqkv), rope, slots, lines, shape)


def project_one(
    x: Tensor, rope: Tensor, slots: Tensor, lines: Tensor, gain: Tensor, wqkv: Tensor,
    shape: RotaryHeads, eps: float,
) -> Tensor:  # fmt: skip
    """`project` of a single token."""
    qkv = product(normed_rows(x, gain, eps, wqkv.shape[0]), wqkv).to(x.dtype)
    return _place(qkv.unsqueeze(0), rope, slots, lines, shape)


def _place(qkv: Tensor, rope: Tensor, slots: Tensor, lines: Tensor, shape: RotaryHeads) -> Tensor:
    """Rotate q and k of qkv [T, (H + 2 KV) hd] and write k and v: one kernel, as all of it is done for every head.

    So values are rotated, too, and not used; and queries are written, to where nobody reads.
    """
    tokens, (last, own, head_dim) = qkv.shape[0], lines.shape
    heads = shape.heads + own
    pairs, at = ((head_dim // 2, 2), -1) if shape.interleaved else ((2, head_dim // 2), -2)
    wide = qkv.float().view(tokens, heads, *pairs)
    first = torch.arange(2, device=qkv.device).view((2,) if shape.interleaved else (2, 1)) == 0
    cos, sin = (part.unsqueeze(1).unsqueeze(at) for part in rope.unbind(1))
    turned = wide * cos + wide.flip(at) * torch.where(first, -sin, sin)
    head = torch.arange(heads, device=qkv.device)
    rotates = (head < shape.heads + shape.kv_heads).view(heads, 1, 1)
    out = torch.where(rotates, turned, wide).to(qkv.dtype).view(tokens, heads, head_dim)
    there = slots.view(tokens, 1) * own + (head - shape.heads)
    line = torch.where(head < shape.heads, (last - 1) * own + head % own, there)
    lines.view(last * own, head_dim).index_put_((line,), out)
    return out


# --- after attention ---


def feed_forward(
    x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """All that a block does after attention, where it has a feed-forward part: [T, D]."""
    h = x + F.linear(attended, wo)
    gate, up = F.linear(rms_norm(h, gain, eps), w_gate_up).chunk(2, dim=-1)
    return (h + F.linear(F.silu(gate) * up, w_down),)


def feed_forward_one(
    x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """`feed_forward` of a single token, and what is stored in between."""
    h = x + product(attended, wo).to(x.dtype)
    width = w_down.shape[1]
    normed = normed_rows(h, gain, eps, width)
    w_gate, w_up = w_gate_up.view(2, width, -1).unbind(0)
    gate, up = product(normed, w_gate).to(x.dtype), product(normed, w_up).to(x.dtype)
    active = F.silu(gate) * up
    return h + product(active.unsqueeze(0), w_down).to(x.dtype), active


# --- around a memory layer ---


def ask(
    x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, weights: LayerWeights, keep_norm: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """x [T, D], attended [T, H * hd] -> x after attention, its norm, the query fp32, silu(swilu) and the gate.

    keep_norm: whether the norm is wanted; else something of the same shape and dtype may come in its place.
    """
    h = x + F.linear(attended, wo)
    normed = rms_norm(h, gain, eps)
    silu = None if weights.swilu is None else F.silu(F.linear(normed, *weights.swilu))
    gate = None if weights.gate is None else torch.sigmoid(F.linear(normed, *weights.gate))
    return h, normed, F.linear(normed.float(), *weights.query), silu, gate


def ask_one(
    x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, weights: LayerWeights, keep_norm: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`ask` of a single token."""
    h = x + product(attended, wo).to(x.dtype)

    def of(part: tuple[Tensor, Tensor]) -> Tensor:
        weight, bias = part
        return with_bias(product(normed_rows(h, gain, eps, weight.shape[0]), weight), bias).unsqueeze(0)

    silu = None if weights.swilu is None else F.silu(of(weights.swilu).to(x.dtype))
    gate = None if weights.gate is None else torch.sigmoid(of(weights.gate).to(x.dtype))
    return h, rms_norm(h, gain, eps) if keep_norm else h, of(weights.query), silu, gate


def answer(
    x: Tensor, bag: Tensor, silu: Tensor | None, gate: Tensor | None, value_proj: tuple[Tensor, Tensor] | None
) -> Tensor:
    """x [T, D], bag fp32 [T, width] -> x plus what the memory layer makes of the rows' sum."""
    out = (bag if silu is None else bag * silu).to(x.dtype)
    if value_proj is not None:
        out = F.linear(out, *value_proj)
    return x + (out if gate is None else out * gate)


def answer_one(
    x: Tensor, bag: Tensor, silu: Tensor | None, gate: Tensor | None, value_proj: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`answer` of a single token."""
    out = (bag if silu is None else bag * silu).to(x.dtype)
    if value_proj is not None:
        weight, bias = value_proj
        out = with_bias(product(out, weight), bias).to(x.dtype).unsqueeze(0)
    return x + (out if gate is None else out * gate)


# --- end of a step ---


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return rms_norm(x, gain, eps)


def logits(hidden: Tensor, out: Tensor, weight: Tensor) -> None:
    """hidden [T, D] -> fp32 [T, vocab], in `out`; rounded to the model's dtype as elsewhere."""
    out.copy_(F.linear(hidden, weight))


def logits_one(hidden: Tensor, out: Tensor, weight: Tensor) -> None:
    """`logits` of a single token."""
    out.copy_(product(hidden, weight).to(hidden.dtype).unsqueeze(0))


_CHUNKS = 128  # programs that share a row of logits: one would take longer than all else


def greedy(logits: Tensor, tokens: Tensor, choices: Tensor) -> None:
    """logits fp32 [T, vocab] -> the best tokens, in `tokens` and `choices`, int64 [T].

    As `sampler.launch` chooses where nobody asks for anything else: where logits are not finite, token 0 and choice -1.
    """
    rows, vocab = logits.shape
    chunks = max(n for n in range(1, _CHUNKS + 1) if vocab % n == 0)
    parts = logits.view(rows, chunks, vocab // chunks)
    best, at, total = parts.amax(-1), parts.argmax(-1), parts.sum(-1)
    finite = torch.isfinite(total.sum(-1))
    chunk = best.argmax(-1, keepdim=True)
    found = (chunk * (vocab // chunks) + at.gather(-1, chunk)).squeeze(-1)
    choice = (found + 1) * finite - 1
    choices.copy_(choice)
    tokens.copy_(choice.clamp(min=0))
