"""FlashInfer: wrappers that are planned on the host for each step, and then run in every layer.

Read in FlashInfer 0.6 (decode.py, prefill.py, batch_decode.cu, batch_prefill_sm90.cu):
- keys and values may be views with any strides but the last, if both have the same ones ("NHD": [blocks, block_size, KV, hd]);
- a step is given as int32: indptr [N + 1] of each sequence's blocks in `indices`, and how full its last block is. `plan`
  reads indptr on the host; indices that do not lie on the device already are copied while the host waits;
- with use_cuda_graph the batch size is fixed, `plan` writes into buffers that stay, and `run` may be captured. `plan` may not;
- `plan` sends its result from one pinned buffer per wrapper without waiting: the next `plan` must not come before that
  has left;
- the decode kernel without tensor cores is compiled for few numbers of query heads per KV head, and slower from 4 on.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.models import ModelConfig
from memlane.models.attention import Attention, Lines
from memlane.runner.attention.library import (
    LibraryBackend,
    host_step,
    refused,
    running_sums,
    version_of,
)
from memlane.runner.batch import Batch
from memlane.runner.decode_batch import DecodeBatch
from memlane.runner.kv import KVCache
from memlane.runner.transfer import upload

__all__ = ["FlashInferBackend"]

_WORKSPACE = (
    128 << 20
)  # what FlashInfer recommends; for partial results within one call, so all wrappers share it
_HEAD_DIMS = (64, 128, 256)
_PLAIN_GROUPS = (1, 2)


class FlashInferBackend(LibraryBackend):
    """The package flashinfer-python."""

    name = "flashinfer"

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        import flashinfer

        self.words = f"FlashInfer {flashinfer.__version__}"
        self._library = flashinfer
        self._workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        self._tensor_cores = config.num_heads // config.num_kv_heads not in _PLAIN_GROUPS
        self._mixed: list[_Planned] = []
        self._singles: list[_Planned] = []
        self._static: dict[DecodeBatch, _Planned] = {}

    @staticmethod
    def supports(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = refused(config, dtype, device, _HEAD_DIMS)
        if reason is not None:
            return reason
        return "it is not installed" if version_of("flashinfer-python") is None else None

    def attention(self, cache: KVCache, batch: Batch) -> Attention:
        step = host_step(batch)
        pages = _pages(step.lengths, step.tables, cache.block_size)
        if batch.prefills:
            planned = self._idle(self._mixed)
            planned.plan(
                torch.from_numpy(step.cu_q),
                *self._arguments(pages, cache.block_size),
                causal=True,
                q_data_type=self.dtype,
                kv_data_type=self.dtype,
            )
        else:
            planned = self._idle(self._singles)
            self._plan_decode(planned, pages, cache.block_size)
        attention = _FlashInferAttention(cache, batch.slots, planned.wrapper)
        planned.user = weakref.ref(attention)
        return attention

    def decode(self, cache: KVCache, static: DecodeBatch) -> Attention:
        """What `prepare` plans from then on. Takes 8 MiB of the device, and as much pinned, for every `static`."""

        def buffer(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self.device)

        n = static.n
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._tensor_cores,
            paged_kv_indptr_buffer=buffer(n + 1),
            paged_kv_indices_buffer=buffer(static.tables.numel()),
            paged_kv_last_page_len_buffer=buffer(n),
        )
        self._static[static] = _Planned(wrapper, self.device)
        return _FlashInferAttention(cache, static.slots, wrapper)

    def prepare(self, static: DecodeBatch) -> None:
        pages = _pages(static.host_lengths, static.host_tables, static.block_size)
        self._plan_decode(self._static[static], pages, static.block_size)

    def _plan_decode(self, planned: _Planned, pages: _Pages, block_size: int) -> None:
        planned.plan(*self._arguments(pages, block_size), q_data_type=self.dtype, kv_data_type=self.dtype)

    def _arguments(self, pages: _Pages, block_size: int) -> tuple[Any, ...]:
        """The middle of both kinds of `plan`: all that has no default."""
        c = self.config
        return (
            torch.from_numpy(pages.indptr),
            upload(pages.indices, torch.int32, self.device),
            torch.from_numpy(pages.last),
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            block_size,
        )

    def _idle(self, pool: list[_Planned]) -> _Planned:
        """A wrapper whose plan nobody needs any more. The halves of a step need one each."""
        for planned in pool:
            if planned.user() is None:
                return planned
        library = self._library
        if pool is self._mixed:
            wrapper = library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        else:
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "NHD", use_tensor_cores=self._tensor_cores
            )
        pool.append(_Planned(wrapper, self.device))
        return pool[-1]


class _FlashInferAttention:
    """Runs a wrapper that was planned for the step."""

    def __init__(self, cache: KVCache, slots: Tensor, wrapper: Any) -> None:
        self.cache, self.slots, self.wrapper = cache, slots, wrapper

    def lines(self, layer: int) -> Lines:
        return self.cache.lines(layer, self.slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool = False) -> Tensor:
        """q [T, H, hd], k and v [T, KV, hd] -> [T, H, hd]."""
        if not written:
            self.cache.write(layer, self.slots, k, v)
        out: Tensor = self.wrapper.run(q, self.cache.views(layer))
        return out


class _Planned:
    """A wrapper, and who needs its plan: nobody, once that is no longer alive."""

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self.wrapper = wrapper
        self.user: weakref.ref[_FlashInferAttention] | _Nobody = _Nobody()
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def plan(self, *arguments: Any, **options: Any) -> None:
        if self._sent is not None:
            self._sent.synchronize()
        self.wrapper.plan(*arguments, **options)
        if self._sent is not None:
            self._sent.record()


class _Nobody:
    def __call__(self) -> None:
        return None


class _Pages(NamedTuple):
    """FlashInfer's page table, int32: indptr [N + 1], indices [indptr[-1]], last [N]."""

    indptr: NDArray[np.int32]
    indices: NDArray[np.int32]
    last: NDArray[np.int32]


def _pages(lengths: NDArray[np.int32], tables: NDArray[np.int32], block_size: int) -> _Pages:
    """Of sequences of these lengths [N] in blocks [N, m], the padding of which falls away."""
    counts = -(-lengths // block_size)
    used = np.arange(tables.shape[1]) < counts[:, None]
    return _Pages(running_sums(counts), tables[used], (lengths - 1) % block_size + 1)
