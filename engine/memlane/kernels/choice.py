"""Which implementation of the kernels runs where: Triton on a GPU, the torch twins elsewhere."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from memlane.kernels import reference, reference_cache
from memlane.kernels.cache_state import CacheState, LookupBuffers
from memlane.kernels.row_memory import RowMemory

__all__ = ["CacheKernels", "cache_kernels", "row_kernels"]


class CacheKernels(Protocol):
    """What row_cache and reference_cache have in common."""

    def lookup(
        self,
        state: CacheState,
        ids: Tensor,
        buffers: LookupBuffers,
        open_lookups: int = 1,
        live: Tensor | None = None,
    ) -> None: ...

    def copy_rows(
        self, source: RowMemory, source_rows: Tensor, dest: RowMemory, dest_slots: Tensor, count: Tensor
    ) -> None: ...


def row_kernels(device: torch.device) -> ModuleType:
    """Sums, products and gathers over rows: `kernels.rows`, or its twin `kernels.reference`."""
    if device.type != "cuda":
        return reference
    from memlane.kernels import rows  # brings Triton, which a CPU does without

    return rows


def cache_kernels(device: torch.device, interpreted: bool = False) -> CacheKernels:
    """The row cache's kernels. interpreted: on a CPU too, in Triton's interpreter, which must be on."""
    if device.type != "cuda" and not interpreted:
        return reference_cache
    from memlane.kernels import row_cache

    return row_cache
