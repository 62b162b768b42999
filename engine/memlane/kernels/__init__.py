"""Kernels for GPUs, written in Triton, each with a slow twin in plain torch. Imports nothing of ours.

Triton is imported by the modules that hold kernels, so import those only where a GPU is to be used.
"""

from memlane.kernels.row_memory import RowMemory, device_stride

__all__ = ["RowMemory", "device_stride"]
