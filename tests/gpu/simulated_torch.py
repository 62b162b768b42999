"""torch.cuda as it is within `simulated`: all of it that the engine uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulated_cuda import Simulation
from simulated_graphs import Event, Graph, Stream
from torch import Tensor

__all__ = ["simulated"]


@contextmanager
def simulated() -> Iterator[Simulation]:
    """torch.cuda, and all tensors on "cuda", simulated within; at the end AssertionError for memory given back too early."""
    simulation = Simulation()
    Simulation.active = simulation
    with pytest.MonkeyPatch.context() as patch, simulation:
        _replace_torch(patch, simulation)
        yield simulation
    assert not simulation.freed, simulation.freed[:5]


def _replace_torch(patch: pytest.MonkeyPatch, simulation: Simulation) -> None:
    cuda = torch.cuda
    runtime = SimpleNamespace(cudaHostRegister=simulation.register, cudaHostUnregister=simulation.unregister)

    def set_device(given: Any) -> None:
        simulation.current_device = torch.device(given).index

    def current_stream(given: Any = None) -> Stream:
        simulation.check_device("the current stream", given)
        return simulation.current

    @contextmanager
    def device(given: Any) -> Iterator[None]:
        before = simulation.current_device
        simulation.current_device = before if given is None else torch.device(given).index
        try:
            yield
        finally:
            simulation.current_device = before

    for name, value in {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: simulation.current_device,
        "set_device": set_device,
        "device": device,
        "get_device_name": lambda given=None: "Simulated",
        "get_device_capability": lambda given=None: (9, 0),
        "mem_get_info": lambda given=None: (60 << 30, 80 << 30),
        "memory_reserved": lambda given=None: 0,
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: (0, 0),
        "cudart": lambda: runtime,
        "Stream": simulation.stream,
        "Event": lambda enable_timing=False: Event(simulation, enable_timing),
        "CUDAGraph": lambda: Graph(simulation),
        "graph": simulation.graph,
        "stream": simulation.on,
        "current_stream": current_stream,
        "synchronize": simulation.synchronize,
        "is_current_stream_capturing": lambda: simulation.capturing,
    }.items():
        patch.setattr(cuda, name, value)
    make = torch.tensor

    def tensor(data: Any, *, dtype: Any = None, device: Any = None, pin_memory: bool = False) -> Tensor:
        made = make(data, dtype=dtype)
        if pin_memory:
            return simulation.pin(made)
        return made if device is None else made.to(device)

    patch.setattr(torch, "tensor", tensor)
    patch.setattr(torch.Tensor, "pin_memory", lambda self: simulation.pin(self.clone()))
