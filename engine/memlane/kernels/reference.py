"""The slow, obvious twins of memlane.kernels.rows in plain torch: same names, same arguments, same bits, any device.

Only `activations` may differ in its last bits: there is more than one gelu. Bits are the processor's (ValueTable's) too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memlane.kernels.row_memory import RowMemory

__all__ = ["activations", "dot", "fma", "gather", "weighted_sum"]

_PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PARTIAL_SUMS = 16


def weighted_sum(near: RowMemory, slots: Tensor, weights: Tensor, far: RowMemory | None = None) -> Tensor:
    """slots [tokens, k], weights fp32 [tokens, k] -> fp32 [tokens, width]. See memlane.kernels.rows."""
    rows = _read(near, slots, far)
    scaled = weights * rows.scale
    out = torch.zeros(slots.shape[0], near.width, device=slots.device)
    for k in range(slots.shape[1]):
        out = fma(scaled[:, k, None], rows.numbers[:, k], out)
    return out


def dot(near: RowMemory, slots: Tensor, x: Tensor, far: RowMemory | None = None) -> Tensor:
    """slots [tokens, k], x fp32 [tokens, width] -> fp32 [tokens, k]. See memlane.kernels.rows."""
    rows = _read(near, slots, far)
    steps = -(-near.width // _PARTIAL_SUMS)
    padding = (0, steps * _PARTIAL_SUMS - near.width)
    numbers = F.pad(rows.numbers, padding).view(*slots.shape, steps, _PARTIAL_SUMS)
    inputs = F.pad(x, padding).view(len(x), steps, _PARTIAL_SUMS)
    sums = torch.zeros(*slots.shape, _PARTIAL_SUMS, device=slots.device)
    for step in range(steps):
        sums = fma(numbers[:, :, step], inputs[:, None, step], sums)
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, dim=-1)
        sums = low + high
    return sums[..., 0] * rows.scale


def activations(
    near: RowMemory, slots: Tensor, x: Tensor, weights: Tensor, far: RowMemory | None = None
) -> Tensor:
    """slots [tokens, k], x fp32 [tokens, width], weights fp32 [tokens, k] -> gelu(dot) * weights, fp32 [tokens, k]."""
    return F.gelu(dot(near, slots, x, far)) * weights


def gather(near: RowMemory, slots: Tensor, far: RowMemory | None = None) -> Tensor:
    """slots [n] -> the rows as fp32 [n, width]. See memlane.kernels.rows."""
    rows = _read(near, slots, far)
    return rows.numbers * rows.scale[..., None] + 0.0  # the processor adds them to zeros: no -0 is left


class _Rows(NamedTuple):
    numbers: Tensor  # fp32 [..., width], what is stored; for fp8 / 256
    scale: Tensor  # fp32 [...]


def _read(near: RowMemory, slots: Tensor, far: RowMemory | None) -> _Rows:
    """The rows in `slots`, of any shape, not yet multiplied with their scales."""
    is_near, slots = slots >= 0, slots.long()
    first = _decode(near, torch.where(is_near, slots, 0))
    if far is None:
        return first
    second = _decode(far, torch.where(is_near, 0, -1 - slots))
    return _Rows(
        torch.where(is_near[..., None], first.numbers, second.numbers),
        torch.where(is_near, first.scale, second.scale),
    )


def _decode(memory: RowMemory, rows: Tensor) -> _Rows:
    data, width = memory.data, memory.width
    if len(data) == 0:  # nothing is there, so nothing is asked for
        data = data.new_zeros(1, data.shape[1])
    stored = data[rows.to(data.device)].to(rows.device)
    if memory.row_format in _PLAIN:
        dtype = _PLAIN[memory.row_format]
        numbers = _piece(stored, 0, width * dtype.itemsize).view(dtype).float()
        return _Rows(numbers, torch.ones(rows.shape, device=rows.device))
    size = width // 2 if memory.row_format == "int4" else width
    codes = _piece(stored, 0, size)
    scale = _piece(stored, size, size + 2).view(torch.float16).float()[..., 0]
    if memory.row_format == "int4":
        return _Rows(torch.cat([codes & 15, codes >> 4], dim=-1).float() - 8, scale)
    if memory.row_format == "int8":
        return _Rows(codes.view(torch.int8).float(), scale)
    wide = codes.int()
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(torch.uint16).view(torch.float16)
    return _Rows(half.float(), scale * 256)


def _piece(stored: Tensor, begin: int, end: int) -> Tensor:
    """A copy, which lies where any dtype may."""
    return stored[..., begin:end].clone(memory_format=torch.contiguous_format)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 numbers, rounded once.

    fp64 holds the product exactly, but not the sum. Rounding that to fp64 and then to fp32 can differ from rounding once,
    unless the first rounding is to odd (Boldo and Melquiond 2008, Emulation of a FMA and correctly rounded sums).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (
        addend - part
    )  # exact (Knuth's two-sum); NaN where something is infinite
    even = (total.view(torch.int64) & 1) == 0
    beyond = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where(even & error.abs().gt(0), torch.nextafter(total, beyond), total).float()
