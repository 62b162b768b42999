"""The kernels of a simulated GPU: launched by their own launchers, whose arguments are checked, computed by their twins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from simulated_cuda import CudaTensor, Simulation
from simulated_graphs import Refused, Uses
from torch import Tensor

from memlane.kernels import RowMemory, reference, reference_cache, row_cache, row_copy, rows, selection
from memlane.kernels.cache_state import CacheState, LookupBuffers
from memlane.kernels.jit import row_cache as jit_row_cache
from memlane.kernels.jit import row_copy as jit_row_copy
from memlane.kernels.jit import rows as jit_rows
from memlane.kernels.jit import selection as jit_selection
from memlane.models.product_keys import select_reference

__all__ = ["replace_kernels"]

_KERNELS: dict[Any, Sequence[str]] = {
    jit_rows: ("weighted_sum", "dot", "gather"),
    jit_row_copy: ("copy_rows",),
    jit_row_cache: ("lookup", "touch", "claim"),
    jit_selection: ("choose",),
}
_SPECIALISED = (
    "choose",
)  # kernels of which whole numbers are compiled in where they are 1 or multiples of 16


class _Kernel:
    """Takes a Triton kernel's place: refuses what a launch would, and what would make it compile in a capture."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self._simulation, self._name = simulation, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(type(n) is int and 0 < n < 2**31 for n in grid), f"{self._name}: {grid} programs"
        return self._launch

    def _launch(self, *args: Any, **constants: Any) -> None:
        kinds: list[Any] = []
        for at, value in enumerate(args):
            if isinstance(value, Tensor):
                if not self._simulation.readable(value):
                    raise Refused(f"argument {at} of {self._name} is memory that the GPU cannot read")
                strides = self._name != "choose" or at > 0  # whose scores come with their strides
                assert value.is_contiguous() or not strides, (
                    f"argument {at} of {self._name} is not contiguous"
                )
                kinds.append((value.dtype, value.data_ptr() % 16 == 0))
            else:
                assert type(value) is int, f"argument {at} of {self._name}: {value!r}"
                assert -(2**63) <= value < 2**63
                special = (value == 1, value % 16 == 0) if self._name in _SPECIALISED else ()
                kinds.append((-(2**31) <= value < 2**31, *special))
        self._simulation.first_launch((self._name, tuple(kinds), tuple(sorted(constants.items()))))


def replace_kernels(patch: pytest.MonkeyPatch, simulation: Simulation) -> None:
    for module, names in _KERNELS.items():
        for name in names:
            patch.setattr(module, name, _Kernel(simulation, name))
    for name in ("weighted_sum", "dot", "activations"):
        patch.setattr(rows, name, _sums(simulation, name))
    patch.setattr(rows, "gather", _gather(simulation))
    patch.setattr(row_cache, "lookup", _lookup(simulation))
    patch.setattr(row_cache, "copy_rows", _copy_rows(simulation))
    patch.setattr(selection, "choose", _choose(simulation, selection.choose))
    patch.setattr(selection, "select", _select(simulation, selection.select))


def _host(value: Any) -> Any:
    if isinstance(value, RowMemory):
        return value._replace(data=_host(value.data))
    return value.host if isinstance(value, CudaTensor) else value


def _there(*values: Any) -> list[CudaTensor]:
    return [value for value in values if isinstance(value, CudaTensor)]


def _near_rows(near: RowMemory, slots: Tensor) -> Callable[[], list[tuple[CudaTensor, Sequence[int], bool]]]:
    """The rows that a sum reads, apart from each other: those of a cache are written while others are read."""

    def found() -> list[tuple[CudaTensor, Sequence[int], bool]]:
        flat = _host(slots).flatten()
        return (
            [(near.data, flat[flat >= 0].unique().tolist(), False)]
            if isinstance(near.data, CudaTensor)
            else []
        )

    return found


def _sums(simulation: Simulation, name: str) -> Callable[..., Tensor]:
    launched, twin = getattr(rows, name), getattr(reference, name)

    def compute(near: RowMemory, slots: Tensor, *rest: Any) -> Tensor:
        far = rest[-1] if rest and not isinstance(rest[-1], Tensor) else None
        given = [value for value in rest if isinstance(value, Tensor)]
        out: CudaTensor = launched(near, slots, *given, far)
        hosts = [_host(value) for value in (near, slots, *given, far)]
        uses = Uses(name, _there(slots, *given), [out], _near_rows(near, slots))
        simulation.launch(uses, lambda: out.host.copy_(twin(*hosts)))
        return out

    return compute


def _gather(simulation: Simulation) -> Callable[..., Tensor]:
    launched = rows.gather

    def gather(near: RowMemory, slots: Tensor, far: RowMemory | None = None) -> Tensor:
        out = launched(near, slots, far)
        assert isinstance(out, CudaTensor)
        hosts = _host(near), _host(slots), _host(far)
        uses = Uses("gather", _there(slots), [out], _near_rows(near, slots))
        simulation.launch(uses, lambda: out.host.copy_(reference.gather(*hosts)))
        return out

    return gather


def _lookup(simulation: Simulation) -> Callable[..., None]:
    launched = row_cache.lookup

    def lookup(
        state: CacheState,
        ids: Tensor,
        buffers: LookupBuffers,
        open_lookups: int = 1,
        live: Tensor | None = None,
    ) -> None:
        launched(state, ids, buffers, open_lookups, live)
        hosts = state._replace(
            words=_host(state.words), clock=_host(state.clock), counters=_host(state.counters)
        )
        ids_there, into = _host(ids), LookupBuffers(*map(_host, buffers))
        writes = _there(state.words, state.clock, state.counters, *buffers)
        uses = Uses("lookup", _there(ids), writes)
        simulation.launch(
            uses, lambda: reference_cache.lookup(hosts, ids_there, into, open_lookups, _host(live))
        )

    return lookup


def _copy_rows(simulation: Simulation) -> Callable[..., None]:
    launched = row_copy.copy_rows

    def copy_rows(
        source: RowMemory, source_rows: Tensor, dest: RowMemory, dest_slots: Tensor, count: Tensor
    ) -> None:
        launched(source, source_rows, dest, dest_slots, count)
        hosts = [_host(value) for value in (source, source_rows, dest, dest_slots, count)]

        def written() -> list[tuple[CudaTensor, Sequence[int], bool]]:
            assert isinstance(dest.data, CudaTensor)
            return [(dest.data, _host(dest_slots)[: int(_host(count))].tolist(), True)]

        uses = Uses("copy of rows", _there(source_rows, dest_slots, count), [], written)
        if simulation.capture is not None and simulation.capturing:
            simulation.capture.keep(_host(dest.data))
        simulation.launch(uses, lambda: reference_cache.copy_rows(*hosts))

    return copy_rows


def _choose(simulation: Simulation, launched: Callable[..., Any]) -> Callable[..., Any]:
    def choose(scores: Tensor, k: int, log_scale: Tensor | None = None) -> selection.Chosen:
        out = launched(scores, k, log_scale)
        there, scale = _host(scores), _host(log_scale)
        tokens, heads, _, n = scores.shape

        def compute() -> None:
            found = select_reference(there.reshape(-1, 2, n), k)
            values = found.scores.view(tokens, heads, k)
            values = values if scale is None else values * scale.exp()[:, None]
            out.ids.host.copy_(found.ids.view(tokens, heads * k))
            out.values.host.copy_(torch.softmax(values, -1).flatten(1))

        simulation.launch(Uses("choose", _there(scores, log_scale), [out.ids, out.values]), compute)
        return out

    return choose


def _select(simulation: Simulation, launched: Callable[..., Any]) -> Callable[..., Any]:
    def select(scores: Tensor, k: int) -> selection.Chosen:
        out = launched(scores, k)
        there = _host(scores)

        def compute() -> None:
            for into, found in zip(out, select_reference(there, k), strict=True):
                into.host.copy_(found)

        simulation.launch(Uses("select", _there(scores), list(out)), compute)
        return out

    return select
