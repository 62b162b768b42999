"""FlashAttention 2 as torch brings it along: torch.nn.attention.varlen.

Read in torch 2.13 (varlen.py, and mha_varlen_fwd in aten's flash_api.cpp): lengths, offsets and block tables are int32;
block tables [N, m] have a contiguous last dimension; keys and values [blocks, block_size, KV, hd] may have any strides
but the last; blocks are multiples of 256 tokens; hd is a multiple of 8, at most 256. May be captured: grid and splits
follow from max_q and max_k, which are numbers of the host. Where a torch has no block_table, it cannot be used.
"""

from __future__ import annotations

import inspect

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
)
from memlane.runner.batch import Batch
from memlane.runner.decode_batch import DecodeBatch
from memlane.runner.kv import KVCache

__all__ = ["VarlenBackend"]

_NEEDED = {"seqused_k", "block_table", "enable_gqa"}


class VarlenBackend(LibraryBackend):
    """torch's own FlashAttention."""

    name = "varlen"
    words = "torch's own FlashAttention"
    block_size = 256

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        # Imported late: it brings torch._dynamo, 1.5 s of a start that may not need it.
        from torch.nn.attention.varlen import varlen_attn

        self._varlen_attn = varlen_attn

    @staticmethod
    def supports(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = refused(config, dtype, device, FLASH_HEAD_DIMS)
        if reason is not None:
            return reason
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return f"torch {torch.__version__} does not have it"
        if not inspect.signature(varlen_attn).parameters.keys() >= _NEEDED:
            return f"that of torch {torch.__version__} takes no block tables"
        return None

    def attention(self, cache: KVCache, batch: Batch) -> Attention:
        return LibraryAttention(cache, device_step(batch), self._compute)

    def decode(self, cache: KVCache, static: DecodeBatch) -> Attention:
        return LibraryAttention(cache, static_step(static), self._compute, static=True)

    def _compute(self, q: Tensor, k: Tensor, v: Tensor, step: DeviceStep) -> Tensor:
        out = self._varlen_attn(
            q,
            k,
            v,
            step.cu_q,
            step.cu_k,
            step.max_q,
            step.max_k,
            window_size=(-1, 0),  # causal, the last query at the last key
            enable_gqa=q.shape[1] != k.shape[2],
            seqused_k=step.lengths,
            block_table=step.tables,
        )
        assert isinstance(out, Tensor)  # not a pair: no return_aux
        return out
