"""A function's work on the device, captured once and replayed: a CUDA graph, or its twin that runs the function again.

What is captured may not wait for the device, nor let shapes or addresses depend on what it computes. Whatever it reads
from outside must stay where it is for as long as the graph lives.

One pool holds what all graphs of a Capture compute in between, so a graph may overwrite what another one left there:
results are valid until the next replay of any of them, and two must never run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Capture", "CudaCapture", "Graph", "TwinCapture"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Graph(Protocol[T_co]):
    """Work that can be done again."""

    def replay(self) -> T_co:
        """Do it. Returns what the function returned: a tensor at the same address each time, or whatever else."""


class Capture(Protocol):
    """Makes graphs. They must be replayed by one thread, on its current stream."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that its graphs hold."""

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run what is going to be captured once, outside: libraries load, tune and take workspaces where they may."""

    def capture(self, function: Callable[[], T]) -> Graph[T]:
        """Capture what the function does, which need not happen yet. RuntimeError where it cannot be captured."""


class CudaCapture:
    """CUDA graphs that share a memory pool. See "CUDA Graphs" in torch's notes on CUDA semantics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # The same for all: libraries keep a workspace for each stream, and the pool one for each stream, too.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def warm_up(self, function: Callable[[], object]) -> None:
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            function()
        before.wait_stream(self._stream)

    def capture(self, function: Callable[[], T]) -> Graph[T]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # as torch.cuda.graph does: the difference is then what the pool grew by
        reserved = torch.cuda.memory_reserved(self._device)
        # The outer context gives the stream back where a capture fails: torch.cuda.graph would not. thread_local: other
        # threads may ask CUDA for something meanwhile, and that is none of the graph's business.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            result = function()
        self._nbytes += torch.cuda.memory_reserved(self._device) - reserved
        return _CudaGraph(graph, result)


class _CudaGraph(Generic[T]):
    def __init__(self, graph: torch.cuda.CUDAGraph, result: T) -> None:
        self._graph, self._result = graph, result

    def replay(self) -> T:
        self._graph.replay()
        return self._result


class TwinCapture:
    """The twin: runs the function, now and at each replay, and copies its tensor to where the first one lies."""

    nbytes = 0

    def warm_up(self, function: Callable[[], object]) -> None:
        function()

    def capture(self, function: Callable[[], T]) -> Graph[T]:
        return _TwinGraph(function)


class _TwinGraph(Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result = function()

    def replay(self) -> T:
        found = self._function()
        if not isinstance(self._result, Tensor) or not isinstance(found, Tensor):
            return found
        self._result.copy_(found)
        return self._result
