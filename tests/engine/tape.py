"""CUDA graphs as a CPU can have them: operations are written down with their tensors, and done again on the same ones.

Unlike TwinCapture this runs no Python again, so it shows what a graph would: what lies elsewhere the next time, what was
decided once and for all, what was left to the host. Operations that a capture could not contain are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

# What waits for the device, or has a result whose shape depends on numbers.
FORBIDDEN = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "masked_select", "bincount", "repeat_interleave",
}  # fmt: skip

_capturing = False


def capturing() -> bool:
    """As torch.cuda.is_current_stream_capturing."""
    return _capturing or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class CapturableOnly(TorchDispatchMode):
    """Refuses operations that a capture could not contain: RuntimeError, as from torch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        masks = name.startswith("index") and any(t.dtype == torch.bool for t in tensors(args[1:2]))
        if name in FORBIDDEN or masks:
            raise RuntimeError(f"{name} is not permitted when a stream is capturing")
        return self.done(func, args, kwargs or {})

    def done(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class _Recorder(CapturableOnly):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def done(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        fresh = [t.untyped_storage().data_ptr() not in given for t in tensors(out)]
        if any(fresh) or func._schema.is_mutable:  # else it is a view, which stays what it is
            kept = tensors(out)

            def again() -> None:
                for old, new, copied in zip(kept, tensors(func(*args, **kwargs)), fresh, strict=True):
                    if copied:
                        old.copy_(new)

            self.steps.append(again)
        return out


class TapeCapture:
    """A memlane.runner.graphs.Capture. captured: graphs made; replayed: how often any of them was."""

    nbytes = 0

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def warm_up(self, function: Callable[[], object]) -> None:
        function()

    def capture(self, function: Callable[[], T]) -> TapeGraph[T]:
        recorder = _Recorder()
        with _marked(), recorder:
            result = function()
        self.captured += 1
        return TapeGraph(self, recorder.steps, result)


class TapeGraph(Generic[T]):
    def __init__(self, owner: TapeCapture, steps: list[Callable[[], None]], result: T) -> None:
        self._owner, self._steps, self._result = owner, steps, result

    def replay(self) -> T:
        self._owner.replayed += 1
        for step in self._steps:
            step()
        return self._result


@contextmanager
def _marked() -> Iterator[None]:
    global _capturing
    _capturing = True
    try:
        yield
    finally:
        _capturing = False
