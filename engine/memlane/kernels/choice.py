"""Which implementation of the kernels runs where: Triton on a GPU, the torch twins elsewhere."""

from __future__ import annotations

from types import ModuleType

import torch

from memlane.kernels import reference, reference_cache

__all__ = ["cache_kernels", "row_kernels"]


def row_kernels(device: torch.device) -> ModuleType:
    """Sums, products and gathers over rows: `kernels.rows`, or its twin `kernels.reference`."""
    if device.type != "cuda":
        return reference
    from memlane.kernels import rows  # here, because it imports Triton

    return rows


def cache_kernels(device: torch.device) -> ModuleType:
    """The row cache's kernels: `kernels.row_cache`, or its twin `kernels.reference_cache`."""
    if device.type != "cuda":
        return reference_cache
    from memlane.kernels import row_cache

    return row_cache
