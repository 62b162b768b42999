"""Autograd functions over the kernels of ops.cpp, and the trainable value table.

The served model never needs these: the same tensors load into ``memlane.models`` and give the same results
(tests/demo holds the two against each other). They exist because plain torch spends most of a training step on one
CPU core in the dense backward of sparse selections.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("ops.cpp")
# The parts of -ffast-math that the loops need. The whole of it would also switch the process that loads the library
# to flushing subnormal numbers to zero.
MATH = (
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
)
FLAGS = ("-O3", "-march=native", *MATH, "-std=c++20", "-shared", "-fPIC")


@cache
def library() -> ctypes.CDLL:
    """Compile ops.cpp once for this machine (cached by source and CPU in the user's cache folder) and load it."""
    cpu = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].split(b"flags")[-1].split(b"\n")[0]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + cpu).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memlane"
    target = folder / f"unicode-facts-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / "ops.so"
            subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, str(SOURCE), "-o", str(built)], check=True)
            built.replace(target)
    loaded = ctypes.CDLL(str(target))
    loaded.cross_entropy.restype = ctypes.c_double
    return loaded


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous(), "the kernels read dense row-major arrays"
    return ctypes.c_void_p(tensor.data_ptr())


def long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


class TrainingTable:
    """A value table [rows, width] fp32 with its gradient, lazy Adam state and access counts.

    Not an ``nn.Parameter``: a step touches a few thousand of 65,536 rows, so gradient and optimiser work on those only.
    """

    def __init__(self, name: str, rows: int, width: int, generator: torch.Generator) -> None:
        self.name, self.rows, self.width = name, rows, width
        # std 1.0: smaller starts learn much more slowly, because a row's gradient reaches the query through its values.
        self.values = torch.randn(rows, width, generator=generator)
        self.grad = torch.zeros(rows, width)
        self.first = torch.zeros(rows, width)
        self.second = torch.zeros(rows, width)
        self.steps = torch.zeros(rows, dtype=torch.int32)
        self.touched = torch.zeros(rows, dtype=torch.uint8)

    def adam(self, lr: float, beta1: float, beta2: float, epsilon: float = 1e-10) -> None:
        c = ctypes.c_float
        library().lazy_adam(
            pointer(self.values), pointer(self.grad), pointer(self.first), pointer(self.second), pointer(self.touched),
            pointer(self.steps), long(self.rows), self.width, c(lr), c(beta1), c(beta2), c(epsilon),
        )  # fmt: skip

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in ("values", "first", "second", "steps")}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name in ("values", "first", "second", "steps"):
            getattr(self, name).copy_(state[name])


class ProductKeyRead(torch.autograd.Function):
    """query [M, H, 2, c], keys [H, 2, n, c] -> weighted sum of the top rows [M, width]; table gradients go to ``table.grad``."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, keys: torch.Tensor, table: TrainingTable, knn: int
    ) -> torch.Tensor:
        tokens, heads, _, half = query.shape
        n = keys.shape[2]
        query, keys = query.contiguous(), keys.contiguous()
        by_half = query.view(tokens, heads * 2, half).transpose(0, 1)
        scores = torch.bmm(by_half, keys.view(heads * 2, n, half).transpose(1, 2))
        ids = torch.empty(tokens, heads * knn, dtype=torch.int32)
        weights = torch.empty(tokens, heads * knn)
        out = torch.empty(tokens, table.width)
        lib = library()
        lib.product_key_top_k(pointer(scores), long(tokens), heads, n, knn, pointer(ids), pointer(weights))
        lib.weighted_sum(
            pointer(table.values),
            pointer(ids),
            pointer(weights),
            long(tokens),
            heads * knn,
            table.width,
            pointer(out),
        )
        ctx.save_for_backward(query, keys, ids, weights)
        ctx.table, ctx.knn = table, knn
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:  # type: ignore[override]
        query, keys, ids, weights = ctx.saved_tensors
        table: TrainingTable = ctx.table
        tokens, heads, _, half = query.shape
        grad_out = grad_out.contiguous()
        grad_weights = torch.empty_like(weights)
        lib = library()
        lib.weighted_sum_backward(
            pointer(table.values), pointer(ids), pointer(weights), pointer(grad_out), long(tokens), heads * ctx.knn,
            table.width, pointer(table.grad), pointer(table.touched), pointer(grad_weights),
        )  # fmt: skip
        grad_query, grad_keys = torch.empty_like(query), torch.zeros_like(keys)
        lib.product_key_backward(
            pointer(query), pointer(keys), pointer(ids), pointer(weights), pointer(grad_weights), long(tokens), heads,
            keys.shape[2], ctx.knn, half, pointer(grad_query), pointer(grad_keys),
        )  # fmt: skip
        return grad_query, grad_keys, None, None


class PrefixAttention(torch.autograd.Function):
    """Causal attention of packed nodes [N, H, e] over the path of each node (``packing.Batch``) -> [N, H, e]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        path: torch.Tensor, owner: torch.Tensor, position: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        nodes, heads, width = q.shape
        length = path.shape[1]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, probabilities = torch.empty_like(q), torch.empty(nodes, heads, length)
        ctx.scale = width**-0.5
        library().prefix_attention(
            pointer(q), pointer(k), pointer(v), pointer(path), pointer(owner), pointer(position), long(nodes), length,
            heads, width, ctypes.c_float(ctx.scale), pointer(out), pointer(probabilities),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, probabilities, path, owner, position)
        return out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        q, k, v, probabilities, path, owner, position = ctx.saved_tensors
        nodes, heads, width = q.shape
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        library().prefix_attention_backward(
            pointer(q), pointer(k), pointer(v), pointer(probabilities), pointer(grad_out.contiguous()), pointer(path),
            pointer(owner), pointer(position), long(nodes), path.shape[1], heads, width, ctypes.c_float(ctx.scale),
            pointer(grad_q), pointer(grad_k), pointer(grad_v),
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None, None


class Bfloat16Linear(torch.autograd.Function):
    """x [N, in] by weight [out, in], products in bf16 with fp32 accumulation; parameters and gradients stay fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        return (x @ weight.T).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.bfloat16()
        return (grad @ weight).float(), (grad.T @ x).float()


class Rotate(torch.autograd.Function):
    """``memlane.models.layers.rotate`` of x [N, H, e] (halves) by cosines and sines [N, 1, e/2], in one pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _rotated(grad, *ctx.saved_tensors, -1.0), None, None


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sign: float) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    library().rotate_halves(
        pointer(x), pointer(cosine), pointer(sine), long(x.shape[0]), x.shape[1], x.shape[2],
        ctypes.c_float(sign), pointer(out),
    )  # fmt: skip
    return out


class SwiGLU(torch.autograd.Function):
    """gate_up [N, 2f], gate first -> silu(gate) * up [N, f]."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        nodes, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(nodes, width)
        library().swiglu(pointer(gate_up), long(nodes), width, pointer(out))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty_like(gate_up)
        library().swiglu_backward(
            pointer(gate_up),
            pointer(grad_out.contiguous()),
            long(grad.shape[0]),
            grad.shape[1] // 2,
            pointer(grad),
        )
        return grad


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy (nats) of hidden [A, D] against targets int64 [A] through the output matrix [V, D].

    Logits are overwritten by their gradient in the forward: one pass of exponentials over the largest array of a step.
    They are computed in fp32 whatever `dtype` is, since bf16 would round logits of 20 to steps of 0.1; the two
    products of the backward use `dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        logits = hidden @ head.T
        mean = library().cross_entropy(pointer(logits), pointer(targets), long(len(targets)), head.shape[0])
        ctx.save_for_backward(hidden.to(dtype), head.to(dtype), logits.to(dtype))
        return hidden.new_tensor(mean)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:  # type: ignore[override]
        hidden, head, grad_logits = ctx.saved_tensors
        return grad * (grad_logits @ head).float(), grad * (grad_logits.T @ hidden).float(), None, None
