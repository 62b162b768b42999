"""A GPU that is not there: torch's inductor generates code for it, and nothing runs.

Tensors are torch's fake ones (shape, dtype, device, no numbers). Leans on torch's inside: made for torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._inductor.config
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

__all__ = ["FakeGpu"]

H200 = SimpleNamespace(
    name="H200", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, gcnArchName="",
    shared_memory_per_block_optin=232448, total_memory=141 << 30, L2_cache_size=50 << 20,
)  # fmt: skip

# What only makes room for numbers.
_ROOM = {"empty", "empty_strided", "empty_like", "new_empty", "detach", "_unsafe_view", "lift_fresh", "alias"}


class _NotRun(Exception):
    """In place of a run of generated code."""


class FakeGpu:
    """Counts what functions would launch on it: those that are compiled by inductor, the rest by torch's operations.

    launches: names, in order. Whatever else launches kernels must be replaced by something that calls `note`.
    """

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.mode = FakeTensorMode()
        self.sources: list[str] = []

    def note(self, name: str) -> None:
        self.launches.append(name)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Tensors made within lie on the GPU if they say so; operations count."""
        with self._pretending(), self.mode, _Counter(self.note), torch.no_grad():
            yield

    def compiled(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that torch.compile returned: its kernels count, its results are what it was made of says."""
        with _disable_current_modes(), torch.no_grad():
            try:
                function(*args)
            except _NotRun:
                pass
            else:
                raise AssertionError("it was not compiled")
        plain = function._torchdynamo_orig_callable  # type: ignore[attr-defined]
        with _disable_current_modes(), self.mode, torch.no_grad():
            return plain(*args)

    @contextmanager
    def _pretending(self) -> Iterator[None]:
        def nothing(*_: Any, **__: Any) -> None:
            return None

        def zero(*_: Any) -> int:
            return 0

        def module(graph: GraphLowering) -> Any:
            code, _ = graph.codegen()
            self.sources.append(code.value)
            kernels = _kernels(code.value)

            def call(_: Any) -> Any:
                self.launches += kernels
                raise _NotRun

            return SimpleNamespace(
                call=call, __file__="", key="", cache_key="", cache_path="", cache_linemap=None
            )

        driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=zero,
            get_active_torch_device=lambda: torch.device("cuda", 0),
        )
        on_class: dict[str, Any] = {
            "get_device_properties": staticmethod(lambda _=None: H200),
            "current_device": staticmethod(zero),
            "device_count": staticmethod(lambda: 1),
        }
        replaced: dict[Any, dict[str, Any]] = {
            torch.cuda: {
                "_lazy_init": nothing, "is_available": lambda: True, "device_count": lambda: 1,
                "current_device": lambda: 0, "get_device_properties": lambda _=None: H200,
                "get_device_capability": lambda _=None: (9, 0), "_exchange_device": lambda _: 0,
                "_maybe_exchange_device": lambda _: 0, "get_rng_state": lambda _=None: torch.zeros(1), "set_rng_state": nothing,
            },
            torch.version: {"cuda": "13.0"},
            fake_tensor: {"init_gpu_context": nothing},
            CudaInterface: on_class,
            CudaInterface.Worker: on_class,
            # They make tensors to look for patterns with, none of which is in what is counted here.
            fuse_attention: {"_sfdp_init": nothing},
            pad_mm: {"_pad_mm_init": nothing},
            misc_patterns: {"_misc_patterns_init": nothing},
            triton.runtime.driver: {"_active": driver},
            # Those of torch without CUDA want a guard for the device.
            torch.Tensor: {"copy_": _copy, "__getitem__": _getitem},
            GraphLowering: {"_compile_to_module": module},
        }  # fmt: skip
        with ExitStack() as stack:
            for target, attributes in replaced.items():
                for name, value in attributes.items():
                    stack.enter_context(mock.patch.object(target, name, value, create=True))
            stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
            torch._dynamo.reset()
            DeviceProperties.create.cache_clear()
            try:
                yield
            finally:
                torch._dynamo.reset()
                DeviceProperties.create.cache_clear()


def _kernels(source: str) -> list[str]:
    """Names of what generated code launches, in order."""
    body = source[
        source.index("def call(") : source.index("def get_args(") if "def get_args(" in source else None
    ]
    found = re.findall(
        r"^\s+(?:\w+ = )?(triton_\w+)\.run\(|extern_kernels\.(\w+)\(|(aten\.\w+)|torch\.ops\.([\w.]+)\(",
        _code(body),
        re.M,
    )
    return ["".join(names) for names in found]


def _code(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


class _Counter(TorchDispatchMode):
    """Notes operations that launch a kernel: all that are neither views nor memory without numbers in it."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        on_gpu = any(isinstance(t, Tensor) and t.device.type == "cuda" for t in tree_leaves(out))
        if on_gpu and not func.is_view and name not in _ROOM:
            self._note(name)
        return out


def _copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    out: Tensor = torch.ops.aten.copy_.default(into, source)
    return out


def _getitem(x: Tensor, index: Any) -> Tensor:
    """Of what is used: numbers, slices, None, and tensors where there is nothing else but whole dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Tensor) for part in parts):
        out: Tensor = torch.ops.aten.index.Tensor(x, [p if isinstance(p, Tensor) else None for p in parts])
        return out
    dim = 0
    for part in parts:
        if part is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1), dim + 1
        else:
            x = x.select(dim, part)
    return x
