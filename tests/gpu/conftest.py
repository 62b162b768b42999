"""Tests of GPU code: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

# Where there is a GPU nothing of it is simulated: the other tests are the real thing.
collect_ignore = ["test_simulated.py"] if torch.cuda.is_available() else []


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: "cuda", or "cpu" in the interpreter, which is slow: keep inputs small there."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def scale(device: str) -> int:
    """How much larger than in the interpreter inputs may be: 1 there, 1000 on a GPU, 20 where every access is checked."""
    return 1 if device == "cpu" else 20 if os.environ.get("MEMLANE_SANITIZER") else 1000


@pytest.fixture(scope="session", autouse=True)
def _quick_calls() -> Iterator[None]:
    """The interpreter patches all of Triton's language whenever one function calls another, which takes most of its time.

    A launch patches what its kernel's module sees; of Triton's own modules, once is enough: that is never undone.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang

    patched: set[str] = set()

    def call(self: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            _patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(scope="session", autouse=True)
def _fused_multiply_add() -> Iterator[None]:
    """The interpreter rounds tl.fma twice; the hardware, once. Here it rounds once too, so that bits can be compared."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from memlane.kernels.reference import fma

    def create_fma(_: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        a, b, c = (torch.from_numpy(np.ascontiguousarray(one.data)) for one in (x, y, z))
        return TensorHandle(fma(a, b, c).numpy(), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fma", create_fma)
        yield
