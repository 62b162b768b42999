"""Sums, inner products and copies of a table's rows on a GPU. Launches memlane.kernels.jit.rows; twin: reference.py.

Slots are int32 or int64 on the GPU. Slot s >= 0 is row s of `near`, memory of the GPU; s < 0 is row -1 - s of `far`, pinned
host memory that the GPU reads in place. A slot that is no row reads what lies there: nothing is checked on the GPU.

Numbers are fp32 and bit-identical to those of the processor's kernels: a sum is one chain of fused multiply-adds in the
order k = 0..K-1, a product 16 interleaved chains added in a tree, whatever the shape of a launch. Results belong to the
caller. Launched on the current stream; nothing waits for the GPU, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlane.kernels.aot import Compilation
from memlane.kernels.jit import rows as jit
from memlane.kernels.jit.rows import RowLayout
from memlane.kernels.row_launches import UNITS, dot_launch, gather_launch, row_layout, sum_launch
from memlane.kernels.row_memory import RowMemory, device_stride

__all__ = ["AOT", "activations", "dot", "gather", "weighted_sum"]

_MOST_ROWS = (1 << 31) - 1  # kernels read 32 bits of a slot


def weighted_sum(near: RowMemory, slots: Tensor, weights: Tensor, far: RowMemory | None = None) -> Tensor:
    """slots [tokens, k], weights fp32 [tokens, k] -> sum over k of weight * row, fp32 [tokens, width].

    Quantised rows: weight * scale is rounded first, then multiplied with the codes. ValueError, TypeError: arguments that
    do not fit together.
    """
    tokens, k = _shape(slots, 2)
    _check_floats("weights", weights, slots, (tokens, k))
    if tokens == 0 or k == 0:
        return weights.new_zeros(tokens, near.width)
    rows, words = _operands(near, far), _words(slots)
    launch = sum_launch(rows.layout, tokens, k, words.step)
    out = weights.new_empty(tokens, near.width)
    jit.weighted_sum[(launch.programs,)](
        rows.near, rows.far, words.data, weights.contiguous(), out, **launch.constants, **launch.options
    )
    return out


def dot(near: RowMemory, slots: Tensor, x: Tensor, far: RowMemory | None = None) -> Tensor:
    """slots [tokens, k], x fp32 [tokens, width] -> inner products of each row with its token's x, fp32 [tokens, k].

    ValueError, TypeError: arguments that do not fit together.
    """
    return _dot(near, slots, x, None, far)


def activations(
    near: RowMemory, slots: Tensor, x: Tensor, weights: Tensor, far: RowMemory | None = None
) -> Tensor:
    """slots [tokens, k], x fp32 [tokens, width], weights fp32 [tokens, k] -> gelu(dot) * weights, fp32 [tokens, k].

    What the experts of PEER (He 2024, Mixture of a million experts) are weighted with. gelu is the one with erf, to
    the last bits. ValueError, TypeError: arguments that do not fit together.
    """
    _check_floats("weights", weights, slots, _shape(slots, 2))
    return _dot(near, slots, x, weights.contiguous(), far)


def gather(near: RowMemory, slots: Tensor, far: RowMemory | None = None) -> Tensor:
    """slots [n] -> the rows as fp32 [n, width]. ValueError, TypeError: arguments that do not fit together."""
    (n,) = _shape(slots, 1)
    out = torch.empty(n, near.width, device=slots.device)
    if n == 0:
        return out
    rows, words = _operands(near, far), _words(slots)
    launch = gather_launch(rows.layout, n, words.step)
    jit.gather[(launch.programs,)](
        rows.near, rows.far, words.data, out, n, **launch.constants, **launch.options
    )
    return out


def _dot(near: RowMemory, slots: Tensor, x: Tensor, weights: Tensor | None, far: RowMemory | None) -> Tensor:
    tokens, k = _shape(slots, 2)
    _check_floats("x", x, slots, (tokens, near.width))
    out = x.new_empty(tokens, k)
    if out.numel() == 0:
        return out
    rows, words = _operands(near, far), _words(slots)
    launch = dot_launch(rows.layout, tokens, k, words.step, activate=weights is not None)
    given = (rows.near, rows.far, words.data, x.contiguous(), out if weights is None else weights, out)
    jit.dot[(launch.programs,)](*given, **launch.constants, **launch.options)
    return out


class _Operands(NamedTuple):
    near: Tensor  # [rows, stride] in units of the layout
    far: Tensor
    layout: RowLayout


def _operands(near: RowMemory, far: RowMemory | None) -> _Operands:
    memories = [near] if far is None else [near, far]
    if far is not None and (far.row_format, far.width) != (near.row_format, near.width):
        raise ValueError(
            f"rows of two kinds: {near.row_format} x {near.width}, {far.row_format} x {far.width}"
        )
    unit = UNITS[near.row_format]
    for memory in memories:
        rows, stride = memory.data.shape
        if rows > _MOST_ROWS:
            raise ValueError(f"{rows} rows; at most {_MOST_ROWS} can be told apart")
        if memory.data.data_ptr() % unit.itemsize or stride % unit.itemsize:
            raise ValueError(
                f"{memory.row_format} rows that do not lie on multiples of {unit.itemsize} bytes"
            )
    data = [memory.data.view(unit) for memory in memories]
    layout = row_layout(
        near.row_format, near.width, data[0].shape[1], None if far is None else data[1].shape[1]
    )
    if layout.scale == "half" and any(memory.data.data_ptr() % 2 for memory in memories):
        layout = layout._replace(scale="bytes")
    return _Operands(data[0], data[-1], layout)


class _Words(NamedTuple):
    data: Tensor  # int32
    step: int  # words from one slot to the next


def _words(slots: Tensor) -> _Words:
    """Slots as 32-bit words: half the registers where they wait for their rows."""
    return _Words(slots.contiguous().view(torch.int32), slots.dtype.itemsize // 4)


def _shape(slots: Tensor, dim: int) -> tuple[int, ...]:
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slots must be int32 or int64, not {slots.dtype}")
    if slots.dim() != dim:
        raise ValueError(f"slots must have {dim} dimension(s), not shape {list(slots.shape)}")
    return tuple(slots.shape)


def _check_floats(what: str, values: Tensor, slots: Tensor, shape: tuple[int, ...]) -> None:
    if values.dtype != torch.float32 or values.device != slots.device:
        raise TypeError(
            f"{what} must be fp32 on {slots.device} like the slots, not {values.dtype} on {values.device}"
        )
    if values.shape != shape:
        raise ValueError(f"{what} are {list(values.shape)}, expected {list(shape)}")


def _compilations() -> list[Compilation]:
    """What a table of 1,024 columns is read with, 128 rows a token, slots as torch has them (int64)."""
    found = []
    for row_format, unit in UNITS.items():
        size = (512 if row_format == "int4" else 1024) * unit.itemsize + (2 if unit is torch.uint8 else 0)
        stride = device_stride(size) // unit.itemsize
        near = row_layout(row_format, 1024, stride, None)
        launches = {("weighted_sum", jit.weighted_sum): sum_launch(near, 4096, 128, 2)}
        if row_format in ("bfloat16", "int4"):
            launches["dot", jit.dot] = dot_launch(near, 4096, 128, 2, activate=False)
        if row_format == "bfloat16":
            both = row_layout(row_format, 1024, stride, stride)
            launches |= {
                ("weighted_sum of 1 token", jit.weighted_sum): sum_launch(near, 1, 128, 2),
                ("weighted_sum of 64 tokens", jit.weighted_sum): sum_launch(near, 64, 128, 2),
                ("weighted_sum of 256 tokens", jit.weighted_sum): sum_launch(near, 256, 128, 2),
                ("weighted_sum from near and far", jit.weighted_sum): sum_launch(both, 4096, 128, 2),
                ("dot of 1 token", jit.dot): dot_launch(near, 1, 128, 2, activate=False),
                ("activations", jit.dot): dot_launch(near, 4096, 128, 2, activate=True),
                ("gather", jit.gather): gather_launch(near, 4096, 2),
            }
        types = {"near": _POINTERS[unit], "far": _POINTERS[unit], "slots": "*i32", "n": "i32"}
        for (name, kernel), launch in launches.items():
            arguments = [one for one in kernel.arg_names if one not in launch.constants]
            signature = {one: types.get(one, "*fp32") for one in arguments}
            found.append(
                Compilation(f"{name}, {row_format}", kernel, signature, launch.constants, **launch.options)
            )
    return found


_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
AOT = _compilations()
