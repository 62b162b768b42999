"""What attention from a library has in common: where it runs, and a step as libraries want it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from importlib import metadata
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.models import ModelConfig
from memlane.models.attention import Attention, Lines
from memlane.runner.batch import Batch
from memlane.runner.decode_batch import DecodeBatch
from memlane.runner.kv import KVCache
from memlane.runner.transfer import upload

__all__ = [
    "FLASH_HEAD_DIMS",
    "DeviceStep",
    "HostStep",
    "LibraryAttention",
    "LibraryBackend",
    "device_step",
    "host_step",
    "refused",
    "running_sums",
    "static_step",
    "version_of",
]

FLASH_HEAD_DIMS = range(8, 257, 8)  # of FlashAttention 2

_AMPERE = (8, 0)


class LibraryBackend(ABC):
    """Settings of a model that is served by a library's attention; the base of the backends that are."""

    name: str
    words: str  # what it is, for the line that says so
    block_size: int | None = None

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Imports the library: only where `supports` found nothing against it."""
        self.config, self.dtype, self.device = config, dtype, device

    @staticmethod
    @abstractmethod
    def supports(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot serve this model here; None if nothing is known to be in the way."""

    @abstractmethod
    def attention(self, cache: KVCache, batch: Batch) -> Attention:
        """As AttentionBackend."""

    @abstractmethod
    def decode(self, cache: KVCache, static: DecodeBatch) -> Attention:
        """As AttentionBackend."""

    def prepare(self, static: DecodeBatch) -> None:  # noqa: B027 (doing nothing is right for most)
        """Nothing, where a library finds all it needs on the device."""

    def bound(self, longest: int, most: int) -> int:
        return most


def refused(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, head_dims: Container[int]
) -> str | None:
    """Why kernels of the FlashAttention family, for heads of these sizes, cannot serve a model; None if they can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < _AMPERE:
        return "it needs compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not compute in {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in head_dims:
        return f"it does not take heads of {config.head_dim}"
    return None


class HostStep(NamedTuple):
    """A step of N chunks on the host, all int32.

    cu_q, cu_k [N + 1]: where each chunk's queries, and its sequence's keys, begin if laid end to end. lengths [N]:
    keys of each. tables [N, m]: blocks, each row padded with its own last one.
    """

    cu_q: NDArray[np.int32]
    cu_k: NDArray[np.int32]
    lengths: NDArray[np.int32]
    tables: NDArray[np.int32]


def host_step(batch: Batch) -> HostStep:
    queries = [1] * batch.singles + [prefill.end - prefill.begin for prefill in batch.prefills]
    tables = np.empty((len(batch.blocks), max(map(len, batch.blocks))), np.int32)
    for row, blocks in zip(tables, batch.blocks, strict=True):
        row[: len(blocks)] = blocks
        row[len(blocks) :] = blocks[-1]
    lengths = np.array(batch.lengths, np.int32)
    return HostStep(running_sums(queries), running_sums(lengths), lengths, tables)


class DeviceStep(NamedTuple):
    """A HostStep on the device, and of its N chunks the most queries and an upper bound of the keys."""

    slots: Tensor
    cu_q: Tensor
    cu_k: Tensor
    lengths: Tensor
    tables: Tensor
    max_q: int
    max_k: int


def device_step(batch: Batch) -> DeviceStep:
    step, device = host_step(batch), batch.slots.device
    cu_q, cu_k, lengths, tables = (upload(numbers, torch.int32, device) for numbers in step)
    max_q = max(prefill.end - prefill.begin for prefill in batch.prefills) if batch.prefills else 1
    return DeviceStep(batch.slots, cu_q, cu_k, lengths, tables, max_q, max(batch.lengths))


def static_step(static: DecodeBatch) -> DeviceStep:
    """cu_k is left to be worked out in each step."""
    cu_q = torch.arange(static.n + 1, dtype=torch.int32, device=static.slots.device)
    return DeviceStep(
        static.slots, cu_q, torch.zeros_like(cu_q), static.lengths, static.tables, 1, static.longest
    )


class LibraryAttention:
    """Writes keys and values, then has `compute` read them: q [T, H, hd], k and v as KVCache.views, the step -> as q."""

    def __init__(
        self,
        cache: KVCache,
        step: DeviceStep,
        compute: Callable[[Tensor, Tensor, Tensor, DeviceStep], Tensor],
        *,
        static: bool = False,
    ) -> None:
        """static: the numbers in the step's tensors change from one step to the next."""
        self.cache, self.step, self.compute, self.static = cache, step, compute, static

    def lines(self, layer: int) -> Lines:
        return self.cache.lines(layer, self.step.slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool = False) -> Tensor:
        """q [T, H, hd], k and v [T, KV, hd] -> [T, H, hd]."""
        step = self.step
        if self.static and layer == 0:
            torch.cumsum(step.lengths, 0, dtype=torch.int32, out=step.cu_k[1:])
        if not written:
            self.cache.write(layer, step.slots, k, v)
        return self.compute(q, *self.cache.views(layer), step)


def running_sums(counts: list[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    """0, and then the sum up to each."""
    sums = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=sums[1:])
    return sums


def version_of(package: str) -> str | None:
    """The installed version, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
