"""FlashAttention 2 from the package flash-attn.

Read in flash-attn 2.8 (flash_attn_interface.py, flash_api.cpp): as in varlen.py beside this file, and lengths come as
cu_seqlens_k in the one function and as cache_seqlens in the other. hd that is no multiple of 8 would be padded by copying
the whole cache in each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlane.models import ModelConfig
from memlane.models.attention import Attention
from memlane.runner.attention.library import (
    FLASH_HEAD_DIMS,
    DeviceStep,
    LibraryAttention,
    LibraryBackend,
    device_step,
    refused,
    static_step,
    version_of,
)
from memlane.runner.batch import Batch
from memlane.runner.decode_batch import DecodeBatch
from memlane.runner.kv import KVCache

__all__ = ["FlashAttnBackend"]


class FlashAttnBackend(LibraryBackend):
    """The package flash-attn."""

    name = "flash-attn"
    block_size = 256

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        import flash_attn

        self.words = f"FlashAttention {flash_attn.__version__}"
        self._varlen = flash_attn.flash_attn_varlen_func
        self._with_kvcache = flash_attn.flash_attn_with_kvcache

    @staticmethod
    def supports(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = refused(config, dtype, device, FLASH_HEAD_DIMS)
        if reason is not None:
            return reason
        return "it is not installed" if version_of("flash-attn") is None else None

    def attention(self, cache: KVCache, batch: Batch) -> Attention:
        return LibraryAttention(cache, device_step(batch), self._compute)

    def decode(self, cache: KVCache, static: DecodeBatch) -> Attention:
        return LibraryAttention(cache, static_step(static), self._compute)

    def _compute(self, q: Tensor, k: Tensor, v: Tensor, step: DeviceStep) -> Tensor:
        if step.max_q > 1:
            out: Tensor = self._varlen(
                q,
                k,
                v,
                cu_seqlens_q=step.cu_q,
                cu_seqlens_k=step.cu_k,
                max_seqlen_q=step.max_q,
                max_seqlen_k=step.max_k,
                causal=True,
                block_table=step.tables,
            )
            return out
        # Splits long sequences among more of the GPU, and reads no cu_k, which a captured step would have to work out.
        out = self._with_kvcache(
            q[:, None], k, v, cache_seqlens=step.lengths, block_table=step.tables, causal=True
        )
        return out[:, 0]
